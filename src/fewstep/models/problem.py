"""A `Problem`: a model at one guidance scale on a device, to sample, measure and learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewstep.core.condition import moved, repeated
from fewstep.core.denoiser import Cond, Denoiser, FlowMap
from fewstep.core.prediction import prediction
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes
from fewstep.models.model import Model
from fewstep.models.networks.calls import check_evaluating
from fewstep.runtime.errors import FewstepError, ModelError
from fewstep.runtime.front_door import check_size
from fewstep.sampling.noise import seeded_noise
from fewstep.sampling.start import noised

__all__ = ["Problem", "check_model", "check_seeds"]


def check_seeds(first: int, count: int) -> None:
    """Refuse seeds ``first, first + 1, ...`` that are none.

    Raises:
        FewstepError: one is negative or does not fit in 63 bits; there are absurdly many.
    """
    if first < 0 or first + count > 2**63:
        raise FewstepError(f"seeds must lie between 0 and 2^63, got {first} and the {count - 1} after it")
    check_size("num", count)


def check_model(model: object) -> None:
    """Refuse anything but a `Model`.

    Raises:
        ModelError: it is none (and how to make one of it).
    """
    if isinstance(model, Model):
        return
    what = type(model).__name__
    if isinstance(getattr(model, "schedule", None), NoiseSchedule):
        raise ModelError(
            f"a {what} does not know the shape of its samples: make a Model of it, as in "
            'fewstep.Model(denoiser, denoiser.schedule, "sample", shape=(1, 8, 8))'
        )
    raise ModelError(
        f"this takes a fewstep.Model, not a {what}: wrap a network with its noise law and what it predicts, as in "
        'fewstep.Model(net, fewstep.DiscreteVP.scaled_linear(), "epsilon", shape=(4, 64, 64))'
    )


@dataclass(frozen=True, eq=False)
class Problem:
    """A model at one guidance scale on a device, to sample, measure and learn from.

    Attributes:
        model: the model; its network is moved to the device.
        guidance: the guidance scale.
        device: of the network and of the samples.

    Raises:
        ModelError: the model does not know the shape of its samples, cannot be guided, or is in training mode.
    """

    model: Model
    guidance: float = 1.0
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        self.model.need_shape()
        check_evaluating(self.model.network)
        object.__setattr__(self, "guidance", float(self.guidance))
        self.model.to(self.device)
        _ = self.denoiser  # what cannot be guided is refused here

    @cached_property
    def denoiser(self) -> Denoiser | FlowMap:
        """The model with its guidance; a student's flow map."""
        return self.model.guided(self.guidance)

    @cached_property
    def teacher(self) -> Denoiser:
        """The denoiser, for learners, which need the clean image at any time, see `Model.at_any_time`.

        Raises:
            ModelError: the model is a student, was made for few steps alone, or cannot be asked at any time.
        """
        return self.teacher_at(self.guidance)

    def teacher_at(self, scale: float | Tensor) -> Denoiser:
        """Return the denoiser for learners at another guidance scale, or at one for each sample of a batch ``[B]``, see `teacher`.

        Raises:
            ModelError: the model is a student, was made for few steps alone, has no such scale, or cannot be asked at any time.
        """
        model = self.model.need_trajectories()
        if model.scales is not None:
            told = model.guided(scale)
            assert isinstance(told, Model)  # a denoiser, which is told its scale
            return told.at_any_time()
        denoiser = model.at_any_time().guided(scale)
        assert not isinstance(denoiser, FlowMap)  # see above
        return denoiser

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise law."""
        return self.model.schedule

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape ``*D`` of one sample."""
        return self.model.need_shape()

    @property
    def name(self) -> str:
        """The model's name in tables and errors."""
        return self.model.name

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the model."""
        return self.model.fingerprint

    @cached_property
    def identity(self) -> str:
        """The fingerprint of the model with the guidance scale, for work that belongs to them alone."""
        return f"{self.fingerprint} {self.guidance}"

    def start(self, seeds: Sequence[int] | Tensor, nodes: Nodes | None = None, x0: Tensor | None = None) -> Tensor:
        """Return the start ``x_T = sigma_T eps`` of each seed, ``[len(seeds), *D]``, at the first node (by default at ``t_max``).

        From an image ``x0 [*D]`` it is ``alpha_T x0 + sigma_T eps``, see `noised`. Of a reflected model either is folded into its cube.

        Raises:
            FewstepError: an image beyond the cube of a reflected model.
        """
        domain = self.model.domain
        if x0 is not None:
            if domain is not None:
                domain.check(x0, "the images to begin with")
            nodes = Nodes.at(self.schedule, self.schedule.ends) if nodes is None else nodes
            x = noised(x0.expand(len(seeds), *self.shape), nodes, seeds)
        else:
            sigma = self.schedule.sigma(self.schedule.ends[0]) if nodes is None else nodes.sigma[0]
            x = seeded_noise(seeds, self.shape) * sigma.float()
        return (x if domain is None else domain.fold(x)[0]).to(self.device)

    def labels(self, seeds: Sequence[int], label: int | None = None) -> Tensor | None:
        """Return one class label per sample on the CPU, see `Model.labels`."""
        return self.model.labels(seeds, label)

    def cond(self, seeds: Sequence[int], label: int | None = None) -> Cond:
        """Return the condition of each sample on the device: its class label, or None without classes."""
        labels = self.labels(seeds, label)
        return None if labels is None else labels.to(self.device)

    def conditions(self, seeds: Sequence[int], cond: Cond = None) -> Cond:
        """Return the condition of each seed on the device: one for each, one for all ``[1]``, or by default the null label.

        Raises:
            ModelError: nothing was passed, and the model has classes and no null label; labels that it does not have.
        """
        model, count = self.model, len(seeds)
        if cond is None:
            if model.classes is not None and model.null_label is None:
                raise ModelError(
                    f"{model.name} has classes and no null label: pass cond=, the label of what was measured, as torch.tensor([3])"
                )
            return self.unconditional(seeds)
        if isinstance(cond, Tensor) and cond.ndim and len(cond) == 1 and count > 1:
            cond = repeated(cond, count)
        return moved(model.condition(cond, count), self.device)

    def unconditional(self, seeds: Sequence[int]) -> Cond:
        """Return the null label of each sample on the device; the class labels of a model that has none."""
        model = self.model
        if model.classes is None or model.null_label is None:
            return self.cond(seeds)
        return torch.full((len(seeds),), model.null_label, dtype=torch.int64, device=self.device)

    def card(self) -> dict[str, object]:
        """Return whose an artifact is, for its card."""
        domain = self.model.domain
        walls: dict[str, object] = {} if domain is None else {"domain": [domain.low, domain.high]}
        return walls | {
            "of": self.name,
            "model": self.fingerprint,
            "prediction": prediction(self.model.prediction).name,
            "guidance": self.guidance,
        }
