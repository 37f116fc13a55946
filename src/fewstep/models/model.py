"""The `Model`: a trained network with its noise law, prediction type and sample shape, and the artifacts that belong to it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Cond, Denoiser, FlowMap
from fewstep.core.grid import TimeGrid, make_grid
from fewstep.core.prediction import Prediction, aligned, prediction, to_x0
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.statistics import ModelStatistics
from fewstep.models.carried import OPTIMIZED, Carried
from fewstep.models.guidance import classifier_free
from fewstep.models.networks.calls import network_device, network_dtype, plain_call, refusals, same_time
from fewstep.models.tuned import Tuned
from fewstep.runtime.errors import ArtifactError, GridError, ModelError, SolverError
from fewstep.runtime.front_door import checked_class, is_count
from fewstep.sampling.sampler import Sampler

__all__ = ["Model"]


@checked_class
@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A trained network as a model to sample. It is a `Denoiser`: ``model(x, t, cond)`` estimates the clean image.

    Attributes:
        network: the module or function. It is called as ``call(network, x, time, cond)`` in its own dtype.
        schedule: the noise law it was trained with.
        prediction: its prediction type: ``epsilon``, ``sample`` (x0), ``v``, ``score``, ``flow``, ``edm(sigma_data)``.
        shape: the shape of one sample without the batch, ``(C, H, W)``; needed to draw noise.
        time: function from the schedule's ``t`` to the network's own time; by default ``t`` itself. ``[*] -> [*]``.
        call: function that calls the network; by default ``network(x, time)``, and ``network(x, time, cond)`` when there is a condition.
        classes: number of class labels, or None without.
        null_label: the label that stands for no condition, or None if it has none.
        flow_map: for a student, the map along the trajectory that takes the place of denoising.
        name: the model's name in tables and errors; by default the class of the network.
        data: the data set it was trained on, by the name `load_images` knows, or None.
        folder: the folder it was loaded from, with the artifacts below it.
        given: artifacts in memory, in place of those in the folder.
        card: provenance and figures of the learner that made it.

    Raises:
        ModelError: an unknown prediction type, or a value that is no shape, schedule, function, number of classes or flow map.

    Example:
        >>> import torch, fewstep
        >>> net = torch.nn.Module(); net.forward = lambda x, t: 0 * x
        >>> model = fewstep.Model(net, fewstep.DiscreteVP.linear(), "epsilon", shape=(3,))
        >>> model(torch.ones(2, 3), torch.tensor(0.0)).shape
        torch.Size([2, 3])
    """

    network: Callable[..., Any]
    schedule: NoiseSchedule
    prediction: str | Prediction
    _: KW_ONLY
    shape: tuple[int, ...] | None = None
    time: Callable[[Tensor], Tensor] = same_time
    call: Callable[..., Any] | None = None
    classes: int | None = None
    null_label: int | None = None
    flow_map: FlowMap | None = None
    name: str = ""
    data: str | None = None
    folder: Path | None = None
    given: Carried | None = None
    card: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.network):
            raise ModelError(f"a model's network is a module or a function, got {type(self.network).__name__}")
        if not isinstance(self.schedule, NoiseSchedule):
            raise ModelError(
                f"a schedule is a noise law, as fewstep.DiscreteVP.scaled_linear() or fewstep.RectifiedFlow(), got {self.schedule!r}"
            )
        if self.shape is not None:
            if isinstance(self.shape, str) or not isinstance(self.shape, Sequence) or not self.shape or not all(map(is_count, self.shape)):
                raise ModelError(f"shape is that of one sample without the batch, as (4, 64, 64), got {self.shape!r}")
            object.__setattr__(self, "shape", tuple(int(side) for side in self.shape))
        if self.classes is not None and not is_count(self.classes):
            raise ModelError(f"classes is the number of class labels, or None, got {self.classes!r}")
        if not callable(self.time) or not (self.call is None or callable(self.call)):
            raise ModelError(f"time and call are functions, t -> time and (network, x, time, cond) -> output, got {self.time}, {self.call}")
        if not isinstance(self.flow_map, FlowMap | None):
            raise ModelError(f"flow_map is a fewstep.FlowMap, got {type(self.flow_map).__name__}: subclass it")
        object.__setattr__(self, "prediction", prediction(self.prediction))
        object.__setattr__(self, "name", self.name or type(self.network).__name__)

    def __repr__(self) -> str:
        kind = "flow map" if self.flow_map is not None else prediction(self.prediction).name
        facts = [self.name, kind, f"samples of {self.shape}" if self.shape is not None else "no shape"]
        return f"Model({', '.join([*facts, *([] if self.classes is None else [f'{self.classes} classes'])])})"

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Estimate the clean image ``x0 [B, *D]`` from the state ``x [B, *D]`` at time ``t`` (``[]`` or ``[B]``).

        Raises:
            ModelError: the network refused its inputs (what it said), the prediction is undefined at ``t``, or the model is a student.
        """
        if self.flow_map is not None:
            raise ModelError(f"{self.name} is a student, which has to know where a step leads: sample it by fewstep.sample")
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        kind = prediction(self.prediction)  # resolved at birth
        dtype = network_dtype(self.network, x.dtype)
        scaled = x if kind.input_scale is None else x * aligned(kind.input_scale(alpha, sigma), x)
        time = self.time(t).to(torch.promote_types(dtype, torch.float32)).to(x.device).expand(len(x))
        with refusals(x):
            output = (self.call or plain_call)(self.network, scaled.to(dtype), time, cond)
        if not isinstance(output, Tensor):
            what = type(output).__name__
            raise ModelError(f"the network answered a {what}, not a tensor: pass call=lambda net, x, t, cond: net(x, t).sample, or alike")
        if output.shape != x.shape:
            raise ModelError(f"the network answered shape {tuple(output.shape)} to a state of shape {tuple(x.shape)}")
        return to_x0(kind, output, x, alpha, sigma)

    # -- how it is sampled ------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of the network's weights."""
        return network_device(self.network)

    @property
    def default_guidance(self) -> float:
        """The guidance scale of calls that name none."""
        return 1.0

    @property
    def conditional(self) -> Denoiser:
        """The denoiser without guidance."""
        return self

    def guided(self, scale: float = 1.0) -> Denoiser | FlowMap:
        """Return the denoiser with classifier-free guidance; scale 1 is the model as it is, and a student is its flow map.

        Raises:
            ModelError: the model has no null label to guide away from, or is a student and the scale is not 1.
        """
        if self.flow_map is not None:
            if scale != 1:
                raise ModelError(f"{self.name} is a student: its guidance is in its weights; use guidance 1")
            return self.flow_map
        if scale == 1:
            return self.conditional
        if self.null_label is None:
            raise ModelError(f"{self.name} cannot be guided: it is not class-conditional with a null label; use guidance 1")
        return classifier_free(self.conditional, scale, torch.tensor(self.null_label))

    def labels(self, seeds: Sequence[int], label: int | None = None) -> Tensor | None:
        """Return one class label per sample, ``[len(seeds)]``: ``label``, or the seed modulo the number of classes; None without classes.

        Raises:
            ModelError: a label the model does not have.
        """
        if self.classes is None:
            if label is not None:
                raise ModelError(f"{self.name} takes no labels")
            return None
        if label is not None and not 0 <= label < self.classes:
            raise ModelError(f"{self.name} has labels 0 to {self.classes - 1}, got {label}")
        return torch.tensor([seed % self.classes if label is None else label for seed in seeds])

    def need_shape(self) -> tuple[int, ...]:
        """Return the shape of a sample.

        Raises:
            ModelError: the model was made without one.
        """
        if self.shape is None:
            raise ModelError(f"{self.name} does not know the shape of its samples: make the Model with shape=, as in shape=(4, 64, 64)")
        return self.shape

    def need_denoiser(self) -> Model:
        """Return the model itself.

        Raises:
            ModelError: it is a student, which nothing can be learned from.
        """
        if self.flow_map is not None:
            raise ModelError(f"{self.name} is a student, which is sampled as it is: name its teacher")
        return self

    def to(self, device: torch.device | str) -> Model:
        """Move the network and return the model."""
        if isinstance(self.network, nn.Module):
            self.network.to(device)
        return self

    # -- what it is -------------------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """The hash of the weights, the noise law, the prediction type and the network's time: the same for the same model anywhere."""
        network, schedule, digest = self.network, self.schedule, hashlib.sha256()
        probes = torch.linspace(schedule.t_min + 1e-3, schedule.t_max, 5, dtype=torch.float64)
        definition: tuple[Any, ...] = (schedule.to_config(), prediction(self.prediction).name, self.time(probes).tolist())
        if self.flow_map is not None:
            definition += self.flow_map.definition
        digest.update(repr(definition).encode())
        for key, value in sorted(network.state_dict().items() if isinstance(network, nn.Module) else ()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else str(value).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def carried(self) -> Carried:
        """The artifacts that belong to the model, of its folder or in memory."""
        return Carried(self.folder) if self.given is None else self.given

    @property
    def tuned(self) -> Tuned | None:
        """The record of what the model was tuned for; None if it was not.

        Raises:
            ArtifactError: its ``tuned.json`` is damaged.
        """
        return self.carried.tuned

    @property
    def num_jumps(self) -> tuple[int, ...]:
        """The numbers of jumps from noise to image that a student can make; empty for any other model."""
        if self.flow_map is None:
            return ()
        return tuple(sorted({nfe for table in self.carried.grids if table.solver == "ddim" for nfe in table.grids}))

    def statistics(self, guidance: float = 1.0) -> ModelStatistics | None:
        """Return the statistics that the model carries for this guidance scale; None if there are none.

        Raises:
            ArtifactError: they are damaged.
        """
        return next((statistics for statistics in self.carried.statistics if statistics.guidance == guidance), None)

    def optimized(self, solver: str, nfe: int, guidance: float = 1.0) -> TimeGrid:
        """Return the optimised time grid of a solver that the model carries.

        Raises:
            GridError: there is none for this solver, number of evaluations and guidance scale (and what there is).
            ArtifactError: it is damaged, or was made for other weights.
        """
        tables = self.carried.grids
        table = next((table for table in tables if (table.solver, table.guidance) == (solver, guidance)), None)
        if table is None and self.flow_map is not None:
            raise GridError(f"{self.name} is a student, sampled by ddim at guidance 1 along its own times: leave --solver and --grid out")
        if table is None:
            known = ", ".join(f"{table.solver} at {table.guidance:g}" for table in tables)
            there = f"there are some for {known}" if tables else "there are none in its folder"
            raise GridError(
                f"no optimized grid of {self.name} for {solver} at guidance {guidance:g}, {there}: make a sampler with "
                f"'fewstep optimize {self.command_name(guidance)} --solver {solver} --out DIR'"
            )
        if table.model != self.fingerprint:
            raise ArtifactError(f"the optimized grids in {self.folder} were made for other weights ({table.model}, not {self.fingerprint})")
        if self.flow_map is not None and nfe not in table.grids:
            raise GridError(f"{self.name} makes {', '.join(map(str, sorted(table.grids)))} passes, not {nfe}")
        return table.grid(nfe)

    def trajectory_grid(self, name: str, slots: int, guidance: float = 1.0) -> TimeGrid:
        """Return the times at which trajectories are stored: a spacing by name, or ``optimized``, the model's own for DDIM.

        Raises:
            GridError: an unknown spacing, or no optimised grid of so many steps.
        """
        return self.optimized("ddim", slots, guidance) if name == OPTIMIZED else make_grid(name, self.schedule, slots)

    def fitted(self, nfe: int, guidance: float = 1.0) -> Sampler:
        """Return the sampler fitted to the model that it carries.

        Raises:
            SolverError: there is none with so many evaluations at this guidance scale (and what there is).
            ArtifactError: it is damaged, or was made for other weights.
        """
        if self.flow_map is not None:
            raise SolverError(f"{self.name} is a student, which has passes and no fitted samplers: leave --solver out")
        samplers = self.carried.samplers
        for sampler in samplers:
            if (sampler.nfe, sampler.card.get("guidance")) == (nfe, guidance):
                if sampler.card.get("model") != self.fingerprint:
                    raise ArtifactError(f"the fitted samplers in {self.folder} were made for other weights, not {self.fingerprint}")
                return sampler
        known = ", ".join(f"{sampler.nfe} at {sampler.card.get('guidance'):g}" for sampler in samplers)
        there = f"there are some of {known}" if known else "there are none in its folder"
        raise SolverError(
            f"no fitted sampler of {self.name} with {nfe} evaluations at guidance {guidance:g}, {there}: make one with "
            f"'fewstep fit {self.command_name(guidance)} --nfe {nfe} --out DIR' and use it with --sampler DIR"
        )

    def command_name(self, guidance: float) -> str:
        """Return how a command names this model and a guidance scale."""
        return f"{self.name if self.data or self.folder is None else self.folder}" + ("" if guidance == 1 else f" --guidance {guidance:g}")
