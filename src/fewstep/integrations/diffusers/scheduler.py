"""`FewstepScheduler`: every solver and every saved sampler of this library as a scheduler of diffusers.

A facade without mathematics of its own: `set_timesteps` makes the tableau, and `step` is ``x0 = a x + b output``, `advance`, cast. So a
pipeline gives what `fewstep.sample` gives.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.core.schedule import RectifiedFlow
from fewstep.core.statistics import ModelStatistics
from fewstep.core.tableau import Row, Solver, advance
from fewstep.integrations.diffusers.arguments import check_generators, check_states, one_time, plain_time, refuse_asked, refuse_unknown
from fewstep.integrations.diffusers.chains import Chain, Chains, Plan
from fewstep.integrations.diffusers.forward_process import NoisingScheduler
from fewstep.integrations.diffusers.noise_levels import all_times, checked_times, default_sigmas_count, grid_from_config
from fewstep.integrations.diffusers.same_steps import check_same_as
from fewstep.integrations.diffusers.saved_samplers import SavedSamplers
from fewstep.integrations.diffusers.scheduler_files import (
    BaseOutput,
    SchedulerMixin,
    randn_tensor,
    register_to_config,
    resolve_artifact,
)
from fewstep.integrations.diffusers.solver_names import DESCRIPTIVE, solver_of
from fewstep.integrations.diffusers.their_levels import their_levels
from fewstep.models.formats.diffusers_law import NoiseLaw, ends_clean, noise_law, shift_kind
from fewstep.models.guidance import thresholded
from fewstep.runtime.errors import FewstepError, GridError, SolverError
from fewstep.runtime.front_door import is_count, number
from fewstep.runtime.process import usable_device
from fewstep.sampling.sampler import Sampler
from fewstep.sampling.start import level_of
from fewstep.solvers import make_solver, takes_statistics
from fewstep.solvers.aliases import ALIASES

log = logging.getLogger("fewstep")
LEVEL_SLACK = 1e-6  # by which a step's level may exceed the one asked for: float32 levels come back as they were printed

__all__ = ["FewstepScheduler", "FewstepSchedulerOutput", "SchedulerMixin"]  # the last is what a pipeline's loader looks for here


@dataclass
class FewstepSchedulerOutput(BaseOutput):
    """The result of one scheduler step.

    Attributes:
        prev_sample: the state at which the network is evaluated next, ``[B, *D]``.
        pred_original_sample: the network's estimate of the image, ``[B, *D]``.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class FewstepScheduler(NoisingScheduler):
    """A diffusers scheduler whose steps are this library's.

    Its state is that of the network (variance preserving, or a flow), so `scale_model_input` does nothing; but for Stable Audio's, which
    grows with the noise. One instance can follow several samples at once; a loop can be run again without `set_timesteps`.

    Args:
        solver: a name of the registry with options (``unipc-3``, ``dpm-solver-pp-2m:form=taylor``); by default the solver that diffusers'
            options `solver_order`, `algorithm_type`, `solver_type`, `lower_order_final`, `euler_at_final` and `disable_corrector`
            describe: UniPC of order 2 if they say nothing.
        grid: one of this library's spacings by name (``angle``, ``karras:rho=5``), from the model's first time to the clean image, or to
            its last time with ``final_sigmas_type="sigma_min"``; by default the spacing that diffusers' options describe.
        statistics: statistics of the model for ``dpm-solver-v3``: a `ModelStatistics`, or its folder or hub id.
        sampler: saved samplers in place of a solver and grid: a folder or hub id, see `from_sampler`.
        strength: image to image: the share of noise to begin with, ``sigma / (alpha + sigma)``, above 0 and up to 1; None or 1 is the
            model's whole range. All steps lie below that level, whatever the spacing and their number, and a saved sampler is re-spread
            there (`Sampler.from_level`). The pipeline is then called with its own ``strength=1``, since that counts steps.
        to_clean: step to the clean image at the end; by default as ``final_sigmas_type`` says. The configuration of a solver in noise
            prediction writes it down, beside the ``final_sigmas_type="sigma_min"`` without which diffusers refuses such solvers.
        same_as: the class and options of one of diffusers' schedulers, whose `set_timesteps` chooses the levels and times; `from_scheduler`
            writes it.

    All other arguments are those of diffusers' DPM-Solver and UniPC schedulers, with their meanings; ``invert_sigmas`` is that of its flow
    scheduler, ``snr_shift_scale`` that of CogVideoX's. ``sigma_data`` marks the law of Stable Audio, whose levels ``sigma_schedule`` and
    ``rho`` space.

    Raises:
        FewstepError: an unknown name or option, or artifacts of another model.
    """

    __module__ = "fewstep.integrations.diffusers"  # by which saved pipelines and pickles name it

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,  # noqa: ANN401 - an array or a list
        prediction_type: str = "epsilon",
        solver: str | None = None,
        grid: str | None = None,
        statistics: Any = None,  # noqa: ANN401 - ModelStatistics, a path or a hub id
        sampler: Any = None,  # noqa: ANN401 - Samplers by evaluations, a path or a hub id
        strength: float | None = None,
        solver_order: int = 2,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "bh2",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        predict_x0: bool = True,
        disable_corrector: Sequence[int] = (),
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        final_sigmas_type: str = "zero",
        to_clean: bool | None = None,
        lambda_min_clipped: float = -float("inf"),
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float = 1.0,
        invert_sigmas: bool = False,
        sigma_data: float | None = None,
        sigma_schedule: str = "exponential",
        rho: float = 7.0,
        same_as: Any = None,  # noqa: ANN401 - the class and options of one of diffusers' schedulers
    ) -> None:
        check_same_as(self.config)
        given = {key: self.config[key] for key in DESCRIPTIVE}
        name = solver_of(given) if solver is None else ALIASES.get(str(solver), str(solver))
        if not 0 <= dynamic_thresholding_ratio <= 1 or not sample_max_value > 0:
            raise FewstepError(
                "thresholding wants a dynamic_thresholding_ratio between 0 and 1 and a sample_max_value above 0, got "
                f"{dynamic_thresholding_ratio} and {sample_max_value}"
            )
        self._level = math.inf if strength is None else level_of(strength)
        self._samplers = resolve_artifact(sampler, SavedSamplers)
        self._statistics = resolve_artifact(statistics, ModelStatistics)
        self._settle(name, sampler, statistics)
        if self._samplers is None:
            self._solver = self._made(name)
        unshifted = 0.0 if shift_kind(self.config) == "exponential" else 1.0
        self._law: NoiseLaw = noise_law(self.config, mu=unshifted, to_clean=ends_clean(self.config))
        self.init_noise_sigma = 1 / float(self._law.schedule.alpha(self._law.schedule.ends[0])) if self._law.grows else 1.0
        known = self._law.schedule.times
        if self._law.betas is not None and known is not None:
            self.betas, self.alphas = self._law.betas, 1 - self._law.betas
            self.alphas_cumprod = (self._law.schedule.alpha(known[1:]) ** 2).float()  # known[0] is the clean image
        self._told_of_held = False
        self._times: list[float] = []
        self._noised = False
        self._held: list[tuple[int, float, float]] = []  # evaluations beyond the table: number, time that the network is told, t
        self.num_inference_steps: int | None = None
        self.timesteps = all_times(num_train_timesteps, self._law)
        self.sigmas = torch.exp(-self._law.schedule.lam(self._law.t_of_time(self.timesteps.double()))).float()
        self._begin_index: int | None = None
        self._forget()

    def _made(self, name: str) -> Solver:
        if not takes_statistics(name):
            return make_solver(name)
        if self._statistics is None:
            raise SolverError(f"{name} needs statistics of its model: make them with 'fewstep calibrate', and pass statistics=")
        return make_solver(name, statistics=self._statistics)

    # -- times ------------------------------------------------------------------------------------------------------

    @property
    def order(self) -> int:
        """The number of evaluations per step of the grid."""
        return self._samplers.stages if self._samplers is not None else self._solver.stages

    @property
    def step_index(self) -> int | None:
        """The number of evaluations done for the sample of the last `step`; None before the first."""
        return self._last

    @property
    def begin_index(self) -> int | None:
        """The evaluation that a sample starts from, if `set_begin_index` was called."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start from this evaluation (image to image): the solver is put on the rest of the grid as on one of its own.

        Args:
            begin_index: its number, a multiple of `order`.

        Raises:
            GridError: no evaluation has this number, or the scheduler starts at a strength of its own.
        """
        count = math.inf if self.num_inference_steps is None else len(self._times)
        if not (begin_index == 0 or is_count(begin_index)) or begin_index >= count:
            raise GridError(
                f"begin_index is the number of an evaluation, from 0 to {count - 1}, got {begin_index}: "
                "take more steps, or a larger strength"
            )
        if begin_index and self._level < math.inf:
            raise GridError(
                f"this scheduler starts at strength {self.config['strength']:g} with its first step, and not at evaluation {begin_index}: "
                "call the pipeline with strength=1 (an inpainting pipeline of Stable Diffusion 3 with 0.999), or make it without strength="
            )
        self._begin_index = int(begin_index)

    def set_begin_level(self, level: float) -> int:
        """Start from the first step whose noise level ``sigma/alpha`` is at most this, and return the number of its evaluation.

        Of a strength counted in steps, the noise depends on the spacing; of a level it does not.

        Raises:
            GridError: before `set_timesteps`, no number, or no step starts at so low a level.
        """
        if self.num_inference_steps is None:
            raise GridError("run set_timesteps before set_begin_level: it chooses the levels")
        level = number(level, "the noise level to begin at", GridError)
        begins = list(self._sampler.begins)
        levels = torch.exp(-self._sampler.tableau.nodes.lam[begins])
        below = (levels <= level * (1 + LEVEL_SLACK)).nonzero()
        if not len(below):
            raise GridError(f"no step starts at noise level {level:g} or below: the last starts at {float(levels[-1]):.3g}")
        self.set_begin_index(begins[int(below[0])])
        return begins[int(below[0])]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Any = None,  # noqa: ANN401 - a list, an array or a tensor
        sigmas: Any = None,  # noqa: ANN401
        mu: float | None = None,
        original_inference_steps: int | None = None,
        **unknown: Any,  # noqa: ANN401
    ) -> None:
        """Choose the times and put the solver on them. Run it before the loop.

        Args:
            num_inference_steps: steps of the grid; solvers of several stages make `order` evaluations in each.
            device: the device of the loop's tensors.
            timesteps: the network's own times, decreasing, in place of a number of steps.
            sigmas: noise levels ``sigma/alpha``, or a flow's ``sigma`` before its shift, in place of a number of steps. Timesteps beside a
                flow's sigmas are what its network is told at those levels.
            mu: the shift of a flow that depends on the image size.
            original_inference_steps: of an LCM whose levels are those of diffusers' class (`from_scheduler`); else None, since there is no
                ODE for such a network.
            unknown: arguments of other schedulers, which are refused.

        Raises:
            GridError: times that do not decrease, or a saved sampler that has not so many steps.
            FewstepError: an argument that this scheduler does not have, or a device that is not there.
        """
        same_as = self.config["same_as"]
        if original_inference_steps is not None and same_as is None:
            unknown["original_inference_steps"] = original_inference_steps
        refuse_unknown("set_timesteps", unknown)
        device = None if device is None else usable_device(device)
        law, theirs = self._law_of(mu), None
        own_levels = self._samplers is not None or bool(self.config["grid"])
        if self._level < math.inf and (timesteps is not None or (sigmas is not None and default_sigmas_count(sigmas) is None)):
            raise GridError(
                f"this scheduler lays its levels from strength {self.config['strength']:g}: leave timesteps and sigmas out, or make it "
                "without strength="
            )
        if sigmas is not None and timesteps is not None and same_as is None:  # what the network is told at these levels, and so at others
            pairs = grid_from_config({**self.config, "grid": None}, law, num_inference_steps, timesteps=timesteps, sigmas=sigmas)
            law = law.paired(pairs.t[:-1], checked_times(self.config, law, timesteps))
            if own_levels:
                num_inference_steps, timesteps, sigmas = pairs.steps, None, None
        elif sigmas is not None and own_levels and isinstance(law.schedule, RectifiedFlow):
            count = default_sigmas_count(sigmas)  # some pipelines say their number of steps so
            num_inference_steps, sigmas = (num_inference_steps, sigmas) if count is None else (count, None)
        if same_as is not None:
            theirs = their_levels(
                same_as,
                law,
                num_inference_steps=num_inference_steps,
                timesteps=timesteps,
                sigmas=sigmas,
                mu=mu,
                original_inference_steps=original_inference_steps,
            )
            sampler = Sampler.build(self._solver, theirs.grid, law.schedule)
            theirs.check_count(sampler.tableau.evaluations)
        elif self._samplers is None:
            grid = grid_from_config(self.config, law, num_inference_steps, timesteps=timesteps, sigmas=sigmas)
            sampler = Sampler.build(self._solver, grid, law.schedule)
        else:
            if timesteps is not None or sigmas is not None:
                raise GridError("a saved sampler has times of its own: leave timesteps and sigmas out")
            sampler = self._samplers.of(num_inference_steps, law.schedule)
            sampler = sampler.from_level(self._level, statistics=self._statistics) if self._level < math.inf else sampler
        self._law, self._sampler = law, sampler  # once nothing is wrong with them
        nodes = self._sampler.tableau.nodes
        times = self._network_times(nodes.t[:-1]) if theirs is None else theirs.times
        self.init_noise_sigma = self.init_noise_sigma if theirs is None else theirs.start
        whole = torch.equal(times, times.round()) and self._law.schedule.times is not None
        self.timesteps = times.to(torch.int64 if whole else torch.float32).to(device)
        self._whole = self.timesteps  # pipelines may put a part of it in its place
        self._times, self._noised = times.float().tolist(), False
        beyond = (times != self._law.time(nodes.t[:-1])).nonzero().flatten().tolist()
        self._held = [(i, self._times[i], float(nodes.t[i])) for i in beyond[::-1]]  # the first of those with one time counts
        of_flow = nodes.alpha if self.config["invert_sigmas"] else nodes.sigma
        level = of_flow if self.config["use_flow_sigmas"] else torch.exp(-nodes.lam)
        self.sigmas = level.float()
        self.num_inference_steps = len(times) if self.order == 1 else self._sampler.grid.steps
        self._plans: dict[Any, Plan] = {}
        self._begin_index = None
        self._forget()
        self._plan(0, torch.float32, self.timesteps.device)

    def _law_of(self, mu: float | None) -> NoiseLaw:
        """Return the law of a call. A flow's shift only moves ``t``: where a call chooses it, a saved sampler keeps its own."""
        config = dict(self.config)
        if self._samplers is not None and config["use_dynamic_shifting"] and isinstance(self._samplers.schedule, RectifiedFlow):
            config |= {"use_dynamic_shifting": False, "flow_shift": self._samplers.schedule.shift}
        return noise_law(config, mu=mu, to_clean=ends_clean(config))

    def _network_times(self, t: Tensor) -> Tensor:
        """Return the times ``[*]`` that the network is told at ``t [*]``; where a level lies beyond its table, the table's last time."""
        times = self._law.held_time(t)
        if not self._told_of_held and bool((times != self._law.time(t)).any()):
            self._told_of_held = True
            levels = torch.exp(-self._law.schedule.lam(self._law.schedule.ends.clamp(min=self._law.schedule.t_last))).tolist()
            log.warning(
                "noise levels beyond the model's own, %.3g to %.3g: they are kept, and the network is told its first or last time",
                *levels,
            )
        return times

    def _plan(self, begin: int, dtype: torch.dtype, device: torch.device) -> Plan:
        """Return the rows of the tableau from evaluation ``begin`` on, ready for a dtype and device; made once for each."""
        key = (begin, dtype, device)
        if key not in self._plans:
            tail = self._sampler.tail(begin, statistics=self._statistics).tableau
            like = torch.empty(0, dtype=dtype, device=device)
            self._plans[key] = Plan.of(tail, self._law.prediction, begin, like=like, grows=self._law.grows)
        return self._plans[key]

    # -- the loop ---------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: Any = None, *args: Any) -> Tensor:  # noqa: ANN401, ARG002
        """Return ``sample`` itself, since the state is the network's input; of Stable Audio, scaled to what its network sees.

        Raises:
            FewstepError: a noise level in place of a sample, as a pipeline scales it whose state grows with the noise.
        """
        if sample.ndim == 0:
            raise FewstepError(
                "a pipeline that scales a noise level (StableDiffusionLatentUpscalePipeline) works on a state that grows with the noise, "
                "which a FewstepScheduler does not have: keep its EulerDiscreteScheduler"
            )
        if not self._law.grows:
            return sample
        at = torch.as_tensor(plain_time(timestep, 1), dtype=torch.float64)
        return sample * float(self._law.schedule.alpha(self._law.t_of_time(at)))

    @torch.compiler.disable
    def step(
        self,
        model_output: Tensor,
        timestep: Any,  # noqa: ANN401 - a number or a tensor of one
        sample: Tensor,
        generator: Any = None,  # noqa: ANN401 - a torch.Generator, or one for each sample
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        eta: float | None = 0.0,
        use_clipped_model_output: bool | None = None,
        **unknown: Any,  # noqa: ANN401
    ) -> FewstepSchedulerOutput | tuple[Tensor, Tensor]:
        """Take the step after one evaluation of the network, to the state at which it is evaluated next.

        The state is kept in at least float32 whatever the dtype of ``sample``; changes that a callback has made to it are taken over.

        Args:
            model_output: the network's output at ``sample``, ``[B, *D]``; beside it a predicted variance may follow, ``[B, 2C, ...]``.
            timestep: the network's time, one of `timesteps`.
            sample: the state, ``[B, *D]``.
            generator: a ``torch.Generator`` for solvers that add noise, or one for each sample.
            variance_noise: the noise itself, standard normal ``[B, *D]``.
            return_dict: return a `FewstepSchedulerOutput` rather than a pair.
            eta: 0 or None, which pipelines pass; how much noise is added is an option of the solver (``ddim:eta=0.5``).
            use_clipped_model_output: False or None, as pipelines of DDIM pass it; say ``thresholding=True`` instead.
            unknown: arguments of other schedulers, which are refused.

        Raises:
            FewstepError: before `set_timesteps`, shapes that do not fit, several times in one batch or one that no network has, what are no
                floating point numbers, or an argument that would change the step of another scheduler and means nothing here.
        """
        refuse_asked("step", unknown, eta=eta, use_clipped_model_output=use_clipped_model_output)
        if self.num_inference_steps is None:
            raise FewstepError("run set_timesteps before step: it chooses the times")
        check_states(model_output=model_output, sample=sample)
        check_generators(generator, len(sample))
        if model_output.shape != sample.shape:
            model_output = self._mean(model_output, sample)
        chain = self._chain(timestep, sample)
        plan, i = chain.plan, chain.at - chain.plan.begin
        x = chain.enter(sample)
        x0 = torch.addcmul(plan.a[i] * x, plan.b[i], model_output.to(x.dtype))
        if self.config["thresholding"]:
            x0 = thresholded(x0, self.config["dynamic_thresholding_ratio"], 1.0, self.config["sample_max_value"])
        noise = self._noise(plan.rows[i], x, generator, variance_noise)
        chain.state, chain.at = advance(plan.rows[i], chain.state._replace(x=x), x0, noise), chain.at + 1
        result, self._last = plan.returned(chain.state.x, chain.at, sample.dtype), chain.at
        self._chains.step_done(chain, result, last=chain.at == len(self._times))
        x0 = x0.clone() if x0.dtype == sample.dtype else x0.to(sample.dtype)  # the solver may remember it
        return FewstepSchedulerOutput(result, x0) if return_dict else (result, x0)

    def _mean(self, output: Tensor, sample: Tensor) -> Tensor:
        """Return the output without the variance that some networks predict beside it.

        Raises:
            FewstepError: its shape is neither the sample's nor that with a variance.
        """
        if output.shape[1:2] == (2 * sample.shape[1],) and output.shape[2:] == sample.shape[2:] and len(output) == len(sample):
            return output[:, : sample.shape[1]]
        raise FewstepError(f"the network's output has shape {tuple(output.shape)}, but the sample has {tuple(sample.shape)}")

    def _noise(self, row: Row, x: Tensor, generator: Any, given: Tensor | None) -> Tensor | None:  # noqa: ANN401
        if row.noise is None:
            return None
        if given is None:
            generator = list(generator) if isinstance(generator, tuple) else generator
            return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        check_states(variance_noise=given)
        if given.shape != x.shape:
            raise FewstepError(f"variance_noise has shape {tuple(given.shape)}, but the sample has {tuple(x.shape)}")
        return given.to(x)

    def _chain(self, timestep: Any, sample: Tensor) -> Chain:  # noqa: ANN401
        """Return the trajectory that a sample continues, or a new one."""
        places = self._places(timestep)
        known = self._chains.find(sample, places)
        if places is None and not (known is not None and known.output() is sample) and timestep.device.type != "meta":
            places = self._places(timestep.cpu())  # a copy of the times on a device, and a sample that is not known: wait for the number
            known = self._chains.find(sample, places)
        starting = places is not None and self._begin_index in places  # an older loop may wait where a new one starts
        if known is not None and (known.output() is sample or not starting):
            return known
        if self._level < math.inf and not self._noised:
            raise FewstepError(
                f"this scheduler starts at strength {self.config['strength']:g}, from an image noised by add_noise(image, noise, "
                "timesteps[:1]), and none was: text to image, and an inpainting pipeline that starts from pure noise at its strength=1, "
                "want a scheduler without strength="
            )
        plan = self._plan(self._first(timestep, places), torch.promote_types(sample.dtype, torch.float32), sample.device)
        return self._chains.begin(plan, sample)

    def _places(self, timestep: Any) -> list[int] | None:  # noqa: ANN401
        """Return the evaluations that a timestep may belong to, without waiting for a device; None if that would need its value."""
        if isinstance(timestep, Tensor):
            timestep = one_time(timestep)
            if timestep.untyped_storage().data_ptr() == self._whole.untyped_storage().data_ptr():  # a view: its place says it
                return [int(timestep.storage_offset() - self._whole.storage_offset())]
            if timestep.device.type != "cpu":
                return None
        value = torch.tensor(plain_time(timestep, len(self)), dtype=torch.float32).item()
        return [i for i, time in enumerate(self._times) if time == value]

    def _first(self, timestep: Any, places: list[int] | None) -> int:  # noqa: ANN401
        """Return the first evaluation of a new sample: that of its timestep, that of `set_begin_index`, or the nearest in time."""
        starts = range(0, len(self._times), self.order)
        if places is None:
            return self._begin_index or 0
        if self._begin_index is not None and self._begin_index in places:
            return self._begin_index
        found = [i for i in places if i in starts]
        time = one_time(timestep) if isinstance(timestep, Tensor) else timestep
        return found[0] if found else min(starts, key=lambda i: abs(self._times[i] - float(time)))

    def _forget(self) -> None:
        self._chains = Chains()
        self._last: int | None = None

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])
