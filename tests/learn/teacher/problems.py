"""Toy teachers that the tests of this folder share: analytic denoisers behind a network that counts its calls."""

import torch
from torch import Tensor

from fewstep import GaussianDenoiser, MixtureDenoiser, Model, VarianceExploding
from fewstep.core.schedule import NoiseSchedule
from fewstep.models.identity import digest, parts

LAW = VarianceExploding(0.05, 20.0)


class Counted:
    """An analytic denoiser as a network, which counts its calls and may be interrupted at one or fail there."""

    def __init__(self, denoiser: MixtureDenoiser, stop: int = -1, bad: int = -1) -> None:
        self.denoiser, self.stop, self.bad, self.calls = denoiser, stop, bad, 0

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        answer = self.denoiser(x, t[0].double()) * (torch.nan if self.calls == self.bad else 1)
        return answer if label is None else answer + column(label)


def column(label: Tensor) -> Tensor:
    """The shift of every answer by a label; class 2 stands for none."""
    return (label.float() - 2)[:, None, None] / 10


def mixture(shape: tuple[int, ...], schedule: NoiseSchedule = LAW, dtype: torch.dtype = torch.float32) -> MixtureDenoiser:
    """Four overlapping Gaussians."""
    means = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype) * 0.6
    return MixtureDenoiser(schedule, means, torch.full((4,), 0.25, dtype=dtype))


def toy(denoiser: MixtureDenoiser | GaussianDenoiser, *, classes: int | None = None, **options: int) -> Model:
    """An analytic denoiser as a model."""
    network, shape = Counted(denoiser, **options), tuple(denoiser.means.shape[1:])
    facts = {"name": "toy", "identity": digest(parts(denoiser))}  # whatever has been counted
    return Model(network, denoiser.schedule, "sample", shape=shape, classes=classes, null_label=classes, **facts)


def calls(model: Model) -> int:
    """How often the network of a toy was called."""
    network = model.network
    assert isinstance(network, Counted)
    return network.calls
