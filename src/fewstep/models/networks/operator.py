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

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Cond
from fewstep.core.prediction import Prediction, aligned, prediction
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes
from fewstep.models.networks.beside import load_beside
from fewstep.models.networks.calls import image_size, network_device, network_dtype, plain_call, refusals, unet_call, whole_times
from fewstep.models.networks.extra_embedding import level_features
from fewstep.models.networks.slot_rows import SlotRows
from fewstep.models.networks.temporal_unet import Mixing, TemporalUNet, has_blocks
from fewstep.runtime.artifact import ArtifactRecord, Number, listed, load_artifact, named_path, save_artifact
from fewstep.runtime.errors import ArtifactError, ModelError, look_up
from fewstep.runtime.front_door import check_fields, checked_class

__all__ = ["OperatorForm", "OperatorStudent"]

NETWORK = ("operator.unet.", "operator.network.")  # its weights, which lie in a file of their own
FEATURES = 16  # of a time that the network is given beside its own


@checked_class
@dataclass(frozen=True)
class OperatorForm:
    """The parts of an operator student, as options.

    Args:
        output: the meaning of the network's output: ``denoised``, ``skip`` or ``state``.
        time: the time that is the network's own input: that of the ``start`` (an extra embedding then gives it the slot's), or the
            ``slot``'s, as in DSNO.
        anywhere: whether it starts at any of its times, so that several passes are possible, or at the first only.
        mixing: the temporal layers.

    Raises:
        ModelError: an unknown word; slots that share an encoder, which then cannot be given a time of their own.
    """

    output: str = "denoised"
    time: str = "start"
    anywhere: bool = True
    mixing: Mixing = field(default_factory=Mixing)

    def __post_init__(self) -> None:
        check_fields(self)
        look_up(self.output, dict.fromkeys(("denoised", "skip", "state")), "output of an operator", ModelError)
        look_up(self.time, dict.fromkeys(("start", "slot")), "time of an operator", ModelError)
        if self.time == "slot" and self.mixing.branch_at == "inner":
            raise ModelError("slots that branch at the inner half of the network share its encoder, and so its time: use time start")


@dataclass(frozen=True)
class OperatorRecord(ArtifactRecord):
    """The fields of ``operator.json``, see `OperatorStudent`."""

    FORMAT = "fewstep-operator"

    form: dict[str, Any]
    times: list[Number]
    card: dict[str, Any]


class Teacher(Protocol):
    """The parts of a model that an operator student takes over."""

    @property
    def network(self) -> Any: ...  # noqa: ANN401 - a module
    @property
    def call(self) -> Callable[..., Any] | None: ...
    @property
    def dtype(self) -> torch.dtype | None: ...
    @property
    def time_dtype(self) -> torch.dtype | None: ...
    @property
    def schedule(self) -> NoiseSchedule: ...
    @property
    def prediction(self) -> str | Prediction: ...
    @property
    def time(self) -> Callable[[Tensor], Tensor]: ...


class OperatorStudent(nn.Module):
    """A network from a noisy state to later states of its trajectory: ``(x [B, *D], t [T], cond) -> x(t) [B, T, *D]``.

    Args:
        teacher: the model to begin with; its network gets hooks, so pass a copy.
        times: ``t_0 > ... > t_M``, float64: the start and the slots.
        form: its parts.
        card: provenance, plain JSON values.

    Raises:
        ModelError: fewer than two times, or one that the network cannot be told; a form that wants the blocks of a ``UNet2DModel``, of any
            other network.
    """

    operator: TemporalUNet | SlotRows

    def __init__(self, teacher: Teacher, times: Tensor, form: OperatorForm, card: dict[str, Any] | None = None) -> None:
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
        self.dtype, self.time_dtype = teacher.dtype, teacher.time_dtype
        if has_blocks(teacher.network):
            features = FEATURES if form.time == "start" or form.anywhere else 0
            self.operator = TemporalUNet(teacher.network, len(times) - 1, form.mixing, features)
        else:
            _check_rows(form, len(times) - 1, type(teacher.network).__name__)
            self.operator = SlotRows(teacher.network, teacher.call or plain_call)
        told = self._told(used)
        if isinstance(self.operator, SlotRows) and form.time == "slot" and len(told.unique()) < len(told):
            raise ModelError(f"two slots are one time to the network, {told.tolist()}: use fewer, or end the trajectories earlier")

    @property
    def slots(self) -> int:
        """The number of slots ``M``."""
        return len(self.times) - 1

    def coefficients(self, start: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``a, b [T]``, float64, of ``x(t) = a x_s + b output`` at the times ``t [T]`` below ``start []``."""
        nodes, one = Nodes.at(self.schedule, torch.cat([start.reshape(1), t])), torch.ones_like(t)
        if self.form.output == "state":
            return torch.zeros_like(t), torch.sqrt(nodes.alpha[1:] ** 2 + nodes.sigma[1:] ** 2)
        ratio, gain = nodes.first_order(0, slice(1, None))
        if self.form.output == "skip":
            return ratio, one
        of_x, of_output = 0 * one, one  # an output that says little of x0 where alpha is small is learned to be x0 itself
        if not self.prediction.undefined_at_zero_alpha:
            of_x, of_output = self.prediction.coefficients(nodes.alpha[0], nodes.sigma[0])
        return ratio + gain * of_x, gain * of_output

    def _told(self, t: Tensor) -> Tensor:
        """Return the network's own time at ``t [T]``; a network that is no ``UNet2DModel`` is told no time beyond its table.

        Raises:
            ModelError: a fraction, where it takes whole times.
        """
        if isinstance(self.operator, TemporalUNet):
            return self.time(t)
        return (
            self.time(self.schedule.held(t)) if self.time_dtype is None else whole_times(self.time(self.schedule.held(t)), self.time_dtype)
        )

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None, start: Tensor | None = None, last_only: bool = False) -> Tensor:
        """Return the states ``[B, T, *D]`` at the times ``t [T]``, or ``[B, 1, *D]`` at the last of them.

        Args:
            x: states ``[B, *D]`` at ``start``.
            t: consecutive times of `times`, on the CPU.
            cond: class labels ``[B]``, or None.
            start: one of `times`, ``[]`` on the CPU; by default the first.
            last_only: return the last state alone, and skip the work that it does not need.

        Raises:
            ModelError: the network refused its inputs (what it said).
        """
        start = self.times[0] if start is None else start
        a, b = (coefficient[-1:] if last_only else coefficient for coefficient in self.coefficients(start, t))
        alpha, sigma = self.schedule.alpha(start), self.schedule.sigma(start)
        dtype = self.dtype or network_dtype(self.operator.network, x.dtype)
        scaled = x if self.prediction.input_scale is None else x * aligned(self.prediction.input_scale(alpha, sigma), x)
        given, other = (start.expand(len(t)), t) if self.form.time == "start" else (t, start.expand(len(t)))
        time = self._told(given).to(self.time_dtype or torch.promote_types(dtype, torch.float32)).to(x.device)
        features = (
            None if self.operator.extra_embedding is None else level_features(self.schedule.lam(other), FEATURES).to(dtype).to(x.device)
        )
        with refusals(x):
            output = self.operator(scaled.to(dtype), time, cond, features, last_only).to(x.dtype)
        a, b = (coefficient.to(x.dtype).to(x.device).reshape(-1, *(1,) * (x.ndim - 1)) for coefficient in (a, b))
        return a * x[:, None] + b * output

    @torch.no_grad()
    def denoise_once(self, x_T: Tensor, cond: Cond = None) -> Tensor:  # noqa: N803 - the field's name
        """Return the samples ``[B, *D]`` of the noises ``x_T [B, *D]``: the last slot, from one pass."""
        return self.jump(x_T, self.times[0], self.times[-1], cond)

    def jump(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the states ``[B, *D]`` at time ``t`` on the trajectories through ``x`` at time ``s``, with as little work as possible.

        Args:
            x: states ``[B, *D]``.
            s: one of `times`, ``[]``.
            t: a later one of `times`, ``[]``.
            cond: class labels ``[B]``, or None.

        Raises:
            ModelError: these are not two of its times, the second later.
        """
        slots = self.times[self.times < s]
        if not bool((self.times == s).any() and (slots == t).any()):
            raise ModelError(f"an operator leads from one of its times {self.times.tolist()} to a later one, not from {s:g} to {t:g}")
        if self.form.mixing.last_alone:  # a slot reads none, or those after it
            wanted = slots <= t if self.form.mixing.form == "one-way" else slots == t
            if self.form.mixing.branch_at == "inner":  # the outer encoder has the time of the last slot of all, whichever is computed
                wanted = wanted | (slots == slots[-1])
            slots = slots[wanted]
        if bool(slots[-1] == t):
            return self(x, slots, cond, s, last_only=True)[:, 0]
        return self(x, slots, cond, s)[:, int((slots == t).nonzero())]

    def arithmetic(self, passes: Sequence[float] | Tensor) -> float:
        """Return the cost of going through the times ``passes``, in evaluations of the network alone, by counting FLOPs."""
        from torch.utils.flop_counter import FlopCounterMode

        times = torch.as_tensor(passes, dtype=torch.float64)
        if isinstance(self.operator, SlotRows):
            return float(len(times) - 1)  # each pass computes one row, that of the slot it leads to
        unet = self.operator.unet
        x = torch.zeros(1, unet.config.in_channels, *image_size(unet), device=network_device(unet))
        cond = None if unet.config.num_class_embeds is None else torch.zeros(1, dtype=torch.int64, device=x.device)

        def operations(slots: Tensor, start: Tensor) -> int:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                self.jump(x, start, slots, cond)
            return counter.get_total_flops()

        with torch.no_grad(), FlopCounterMode(display=False) as alone:
            dtype = network_dtype(unet, x.dtype)
            unet_call(unet, x.to(dtype), torch.zeros(1, device=x.device), cond)
        return sum(operations(t, s) for s, t in zip(times[:-1], times[1:], strict=True)) / alone.get_total_flops()

    # -- as a folder ------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, trust: bool = False) -> Path:
        """Write ``operator.json``, ``operator.safetensors`` and a card; the network itself is saved beside them by `save_like`.

        Args:
            folder: of the model.
            trust: whether it names code to import, for the commands of the card.

        Raises:
            ArtifactError: the folder cannot be written, or the card is not JSON-able.
        """
        folder = named_path(folder)
        tensors = {name: value for name, value in self.state_dict().items() if not name.startswith(NETWORK)}
        meta = {"form": asdict(self.form), "times": self.times.tolist(), "card": self.card}
        return save_artifact(folder, "operator", meta, tensors, self._readme(folder.name, trust))

    @classmethod
    def load(cls, folder: str | Path, network: Teacher) -> OperatorStudent:
        """Load a student that `save` wrote, around the network of the same folder.

        Args:
            folder: with ``operator.json``.
            network: the model that was read from this folder.

        Raises:
            ArtifactError: a file is missing, damaged or of another version, or the student is of fewstep 0.1.
        """

        def build(meta: OperatorRecord, tensors: dict[str, Tensor]) -> OperatorStudent:
            if "fan" in meta.form["mixing"]:
                raise ArtifactError(
                    f"{folder} holds a student of fewstep 0.1, whose parts had other names: distil it again, or use that version"
                )
            form = OperatorForm(**{**meta.form, "mixing": Mixing(**meta.form["mixing"])})
            student = cls(network, torch.tensor(meta.times, dtype=torch.float64), form, meta.card)
            load_beside(student, tensors, *NETWORK)
            return student.eval().requires_grad_(False)

        return load_artifact(folder, "operator", OperatorRecord, build)

    def _readme(self, name: str, trust: bool) -> str:
        typed = f"{name} --trust" if trust else name
        ways = f", by way of {self.slots} slots of time" if self.slots > 1 else ""
        return f"""# {name}

An operator student: one pass of its network leads from noise to the image{ways}.

{listed(self.card)}

```
fewstep sample {typed} --out runs/sample
fewstep bench {typed} --out runs/bench
```
"""


def _check_rows(form: OperatorForm, slots: int, kind: str) -> None:
    """Refuse a form that a network other than a ``UNet2DModel`` cannot have: it is told one time, and has no known places for layers.

    Raises:
        ModelError: it is one (and which can be had).
    """
    if form.mixing.form != "none":
        raise ModelError(
            f"temporal layers (dsno) go between the blocks of a diffusers UNet2DModel, which a {kind} does not have: use the method kd "
            "(one slot), or the method slots with time slot and one pass"
        )
    if slots > 1 and (form.time == "start" or form.anywhere):
        raise ModelError(
            f"a {kind} is told one time, and slots that start anywhere, or at the time start, want two: use time slot and one pass "
            "(OperatorForm(time='slot', anywhere=False), or --time slot --one-pass), or one slot (the method kd)"
        )
