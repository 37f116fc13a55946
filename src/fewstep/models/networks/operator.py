r"""An operator student: one pass of a network from a noisy state to all later states of its sampling trajectory.

At the times ``t_k`` below the time ``s`` of the state it is given, its estimate is affine in that state and the network's output,

    x(t_k) = a_k x_s + b_k output_k,

where ``r = sigma_k/sigma_s`` and

- ``state``: ``a = 0, b = sqrt(alpha_k^2 + sigma_k^2)``; the output is the state itself, as in DSNO (arXiv 2211.13449);
- ``skip``: ``a = r, b = 1``; what the noise that is left does not say;
- ``denoised``: ``x(t_k) = r x_s + (alpha_k - r alpha_s) g_k``, with ``g_k = A x_s + B output_k`` as the network predicts ``x0``. The exact
  ``g_k`` is the mean of the teacher's ``x0`` over the way from ``s`` to ``t_k``, so all slots ask for pictures on one scale; and while
  the network is still the teacher's, a slot is the first-order step to its time. (Where ``x0`` cannot be had from the output at
  ``alpha = 0``, as with epsilon, the output is learned to be ``g_k`` itself.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Cond
from fewstep.core.prediction import Prediction, aligned, prediction
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes, Tableau, advance
from fewstep.models.denoiser import AdaptedDenoiser, image_size, refusals, unet_call
from fewstep.models.networks.temporal_unet import Mixing, TemporalUNet
from fewstep.runtime.artifact import load_artifact, save_artifact
from fewstep.runtime.errors import ModelError, SolverError, look_up

__all__ = ["OperatorDenoiser", "OperatorForm", "OperatorStudent"]

FEATURES = 16  # of a time that the network is told beside its own


@dataclass(frozen=True)
class OperatorForm:
    """What an operator student is made of.

    Args:
        output: what the network's output means: ``denoised``, ``skip`` or ``state``.
        time: which time the network itself is given: that of the ``start`` (a new embedding then tells it the slot's), or the ``slot``'s,
            as in DSNO.
        anywhere: whether it starts at any of its times, so that several passes are possible, or at the first only.
        mixing: how the slots meet.

    Raises:
        ModelError: an unknown word; slots that share an encoder, which then cannot be given a time of their own.
    """

    output: str = "denoised"
    time: str = "start"
    anywhere: bool = True
    mixing: Mixing = field(default_factory=Mixing)

    def __post_init__(self) -> None:
        look_up(self.output, dict.fromkeys(("denoised", "skip", "state")), "output of an operator", ModelError)
        look_up(self.time, dict.fromkeys(("start", "slot")), "time of an operator", ModelError)
        if self.time == "slot" and self.mixing.fan == "inner":
            raise ModelError("slots that part in the inner half of the network share its encoder, and so its time: use time start")


class OperatorStudent(nn.Module):
    """``(x [B, *D], t [T], cond) -> x(t) [B, T, *D]``: the states at later times of the trajectory through ``x``.

    Args:
        teacher: the network to begin with (it gets hooks, so give it a copy) and what it predicts.
        times: ``t_0 > ... > t_M`` float64: the start and the slots.
        form: see `OperatorForm`.
        card: where it comes from; plain JSON values.

    Raises:
        ModelError: fewer than two times, or one at which the network's own time is infinite.
    """

    def __init__(self, teacher: AdaptedDenoiser, times: Tensor, form: OperatorForm, card: dict[str, Any] | None = None) -> None:
        super().__init__()
        times = torch.as_tensor(times, dtype=torch.float64)
        if times.ndim != 1 or len(times) < 2 or not bool((times.diff() < 0).all()):
            raise ModelError(f"an operator needs a start and at least one slot at decreasing times, got {times.tolist()}")
        self.schedule, self.prediction, self.time = teacher.schedule, prediction(teacher.prediction), teacher.time
        self.form, self.card = form, dict(card or {})
        used = times[:-1] if form.time == "start" else times[1:]
        if not bool(torch.isfinite(self.time(used)).all()):
            raise ModelError(f"the network's own time is not finite at all of the times {used.tolist()}: end the trajectories earlier")
        self.times = times  # no buffer: they stay float64 and on the CPU whatever the network does
        told = FEATURES if form.time == "start" or form.anywhere else 0
        self.operator = TemporalUNet(teacher.network, len(times) - 1, form.mixing, told)

    @property
    def slots(self) -> int:
        """``M``."""
        return len(self.times) - 1

    def coefficients(self, start: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``a, b [T]`` of ``x(t) = a x_s + b output`` at the times ``t [T]`` below ``start []``, float64."""
        here, there = Nodes.at(self.schedule, start), Nodes.at(self.schedule, t)
        ratio, one = there.sigma / here.sigma, torch.ones_like(t)
        if self.form.output == "state":
            return torch.zeros_like(t), torch.sqrt(there.alpha**2 + there.sigma**2)
        if self.form.output == "skip":
            return ratio, one
        gain = there.alpha - ratio * here.alpha
        of_x, of_output = 0 * one, one  # an output that says little of x0 where alpha is small is learned to be x0 itself
        if not self.prediction.undefined_at_zero_alpha:
            of_x, of_output = self.prediction.coefficients(here.alpha, here.sigma)
        return ratio + gain * of_x, gain * of_output

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None, start: Tensor | None = None, last_only: bool = False) -> Tensor:
        """The states ``[B, T, *D]`` at the times ``t [T]``, or ``[B, 1, *D]`` at the last of them.

        Args:
            x: states at ``start``.
            t: consecutive times of `times`, on the CPU.
            cond: class labels ``[B]``, or None.
            start: one of `times`, ``[]`` on the CPU; by default the first.
            last_only: leave out what the last one does not need.

        Raises:
            ModelError: the network refused its inputs (what it said).
        """
        start = self.times[0] if start is None else start
        a, b = (coefficient[-1:] if last_only else coefficient for coefficient in self.coefficients(start, t))
        alpha, sigma = self.schedule.alpha(start), self.schedule.sigma(start)
        dtype = next(self.operator.unet.parameters()).dtype
        scaled = x if self.prediction.input_scale is None else x * aligned(self.prediction.input_scale(alpha, sigma), x)
        given, other = (start.expand(len(t)), t) if self.form.time == "start" else (t, start.expand(len(t)))
        time = self.time(given).to(torch.promote_types(dtype, torch.float32)).to(x.device)
        told = None if self.operator.told is None else _features(self.schedule, other).to(dtype).to(x.device)
        with refusals(x):
            output = self.operator(scaled.to(dtype), time, cond, told, last_only).to(x.dtype)
        a, b = (coefficient.to(x.dtype).to(x.device).reshape(-1, *(1,) * (x.ndim - 1)) for coefficient in (a, b))
        return a * x[:, None] + b * output

    @torch.no_grad()
    def denoise_once(self, x_T: Tensor, cond: Cond = None) -> Tensor:  # noqa: N803 - the field's name
        """The samples ``[B, *D]`` of the noises ``x_T``: the last slot, from one pass."""
        return self.jump(x_T, self.times[0], self.times[-1], cond)

    def jump(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """The states ``[B, *D]`` at the slot ``t []`` on the trajectories through ``x`` at ``s []``, with as little work as there is.

        Raises:
            ModelError: these are not two of its times, the second later.
        """
        slots = self.times[self.times < s]
        if not bool((self.times == s).any() and (slots == t).any()):
            raise ModelError(f"an operator leads from one of its times {self.times.tolist()} to a later one, not from {s:g} to {t:g}")
        if self.form.mixing.last_alone:  # a slot reads none, or those after it
            wanted = slots <= t if self.form.mixing.form == "one-way" else slots == t
            if self.form.mixing.fan == "inner":  # the outer encoder is told the last slot of all, whichever is asked for
                wanted = wanted | (slots == slots[-1])
            slots = slots[wanted]
        if bool(slots[-1] == t):
            return self(x, slots, cond, s, last_only=True)[:, 0]
        return self(x, slots, cond, s)[:, int((slots == t).nonzero())]

    def arithmetic(self, passes: Sequence[float] | Tensor) -> float:
        """What going through the times ``passes`` costs, in evaluations of the network alone: floating-point operations, counted."""
        from torch.utils.flop_counter import FlopCounterMode

        unet, times = self.operator.unet, torch.as_tensor(passes, dtype=torch.float64)
        x = torch.zeros(1, unet.config.in_channels, *image_size(unet), device=next(unet.parameters()).device)
        cond = None if unet.config.num_class_embeds is None else torch.zeros(1, dtype=torch.int64, device=x.device)

        def operations(slots: Tensor, start: Tensor) -> int:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                self.jump(x, start, slots, cond)
            return counter.get_total_flops()

        with torch.no_grad(), FlopCounterMode(display=False) as alone:
            dtype = next(unet.parameters()).dtype
            unet_call(unet, x.to(dtype), torch.zeros(1, device=x.device), cond)
        return sum(operations(t, s) for s, t in zip(times[:-1], times[1:], strict=True)) / alone.get_total_flops()

    # -- as a folder ------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write ``operator.json`` and ``operator.safetensors`` (all but the network itself, whose folder this goes to), and a card.

        Raises:
            ArtifactError: the folder cannot be written, or the card is not JSON-able.
        """
        tensors = {name: value for name, value in self.state_dict().items() if not name.startswith("operator.unet.")}
        meta = {"form": asdict(self.form), "times": self.times.tolist(), "card": self.card}
        return save_artifact(Path(folder), "operator", meta, tensors, self._readme(Path(folder).name))

    @classmethod
    def load(cls, folder: str | Path, network: AdaptedDenoiser) -> OperatorStudent:
        """Read what `save` wrote, around the network of the same folder.

        Raises:
            ArtifactError: a file is missing, damaged or of another version.
        """

        def build(meta: dict[str, Any], tensors: dict[str, Tensor]) -> OperatorStudent:
            form = OperatorForm(**{**meta["form"], "mixing": Mixing(**meta["form"]["mixing"])})
            student = cls(network, torch.tensor(meta["times"], dtype=torch.float64), form, dict(meta["card"]))
            try:
                missing, unexpected = student.load_state_dict(tensors, strict=False)
            except RuntimeError as error:  # torch's, for weights of another shape
                raise ValueError(str(error).splitlines()[-1].strip()) from error
            missing = [name for name in missing if not name.startswith("operator.unet.")]
            if missing or unexpected:
                raise ValueError(f"the weights {', '.join([*missing, *unexpected][:3])} are missing or too many")
            return student.eval().requires_grad_(False)

        return load_artifact(Path(folder), "operator", build)

    def _readme(self, name: str) -> str:
        facts = "\n".join(f"- {key}: {value}" for key, value in self.card.items())
        return f"""# {name}

An operator student: one pass of its network leads from noise to the image, by way of {self.slots} slots of time.

{facts}

```
fewstep sample {name} --out runs/sample
fewstep bench {name} --out runs/bench
```
"""


def _features(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """What tells the network of times ``t [T]``: waves in ``arctan(sigma/alpha)`` and in ``lam`` from -8 to 8, ``[T, FEATURES]``."""
    angle = torch.atan2(schedule.sigma(t), schedule.alpha(t)) * (2 / math.pi)
    level = (schedule.lam(t).clamp(-8, 8) + 8) / 16
    waves = math.pi * torch.arange(1, FEATURES // 2 + 1, dtype=torch.float64)
    return torch.cos(torch.cat([angle[:, None] * waves, level[:, None] * waves], 1))


@dataclass(frozen=True, eq=False)
class OperatorDenoiser:
    """An operator student where a `Denoiser` is wanted: in first-order steps along some of its times, each a pass, it lands where it says.

    A first-order step from ``s`` to ``t`` leads to ``r x + (alpha_t - r alpha_s) x0``: its ``x0`` is the one with which that is its own
    estimate of ``x(t)``. Which ``t`` comes next it is told by `aimed`.
    """

    network: OperatorStudent

    @property
    def schedule(self) -> NoiseSchedule:
        return self.network.schedule

    @property
    def prediction(self) -> Prediction:
        return self.network.prediction

    def time(self, t: Tensor) -> Tensor:
        """The network's own time."""
        return self.network.time(t)

    def aimed(self, tableau: Tableau) -> _Aimed:
        """This operator for the steps of one sampler.

        Raises:
            SolverError: not a first-order sampler, or one along other times than the operator's.
        """
        nodes, times = tableau.nodes, self.network.times
        known = ", ".join(f"{t:.6g}" for t in times.tolist())
        use = "use --solver ddim --grid optimized with the numbers of passes that it has"
        if not bool(torch.isin(nodes.t, times).all()):
            raise SolverError(f"an operator jumps between its own times only, {known}: {use}")
        if nodes.t[0] != times[0] and not self.network.form.anywhere:
            raise SolverError(f"this operator starts at t = {times[0]:g} only, not at {nodes.t[0]:g}: {use}")
        if nodes.evaluations > 1 and not self.network.form.anywhere:
            raise SolverError(f"this operator makes one pass only, not {nodes.evaluations}: {use}")
        first_order = f"an operator answers for first-order steps alone: {use}"
        if tableau.stochastic or tableau.update.ndim > 3:  # coefficients per channel or pixel
            raise SolverError(first_order)
        ratio = nodes.sigma[1:] / nodes.sigma[:-1]
        gain = nodes.alpha[1:] - ratio * nodes.alpha[:-1]
        x = torch.ones(2, dtype=torch.float64)
        state = tableau.start(x)
        for i, row in enumerate(tableau.rows(x)):
            x0 = torch.tensor([0.0, 1.0 + i * i], dtype=x.dtype)  # another each time: on a constant one all solvers agree
            before, state = state, advance(row, state, x0)
            if not torch.allclose(state.x, ratio[i] * before.x + gain[i] * x0, rtol=1e-9, atol=1e-12):
                raise SolverError(first_order)
        return _Aimed(self.network, nodes)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        raise ModelError("an operator student has to know where a step leads: sample it by fewstep.sample, in steps of DDIM")


@dataclass(frozen=True, eq=False)
class _Aimed:
    """An operator that knows its steps."""

    network: OperatorStudent
    nodes: Nodes

    @property
    def schedule(self) -> NoiseSchedule:
        return self.network.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        i = int((self.nodes.t == t).nonzero())
        here, there = (Nodes(*(column[k] for column in self.nodes)) for k in (i, i + 1))
        ratio = there.sigma / here.sigma
        landed = self.network.jump(x, here.t, there.t, cond)
        return (landed - aligned(ratio, x) * x) / aligned(there.alpha - ratio * here.alpha, x)
