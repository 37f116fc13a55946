"""Functions that commands name as ``tests.apps.own_models:function``: a network of one's own, and mistakes."""

import torch

import fewstep
from fewstep.models.zoo import WEIGHTS

NUMBER = 5


class Shrink(torch.nn.Module):
    """Estimates the clean image of Gaussian data with standard deviation 0.5, and a little more: something to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.25))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        variance = time.reshape(-1, *(1,) * (x.ndim - 1)) ** 2
        return x * self.weight / (self.weight + variance) + 0.1 * torch.sin(3 * x) / (1 + variance)


def shrink() -> fewstep.Model:
    return fewstep.Model(Shrink(), fewstep.VarianceExploding(0.05, 20.0), "sample", shape=(1, 4, 4))


def points() -> fewstep.Model:
    return fewstep.Model(Shrink(), fewstep.VarianceExploding(0.05, 20.0), "sample", shape=(3,), name="points on a line")


def nameless() -> fewstep.Model:
    return fewstep.Model(Shrink(), fewstep.VarianceExploding(), "sample", shape=(1, 4, 4), call=lambda net, x, t, cond: net(x, t))


def digits() -> fewstep.Model:
    return fewstep.load_model("digits-edm")


def folder() -> fewstep.Model:
    return fewstep.load_model(WEIGHTS / "digits-edm")


def shapeless() -> fewstep.Model:
    return fewstep.Model(Shrink(), fewstep.VarianceExploding(), "sample")


def network() -> torch.nn.Module:
    return Shrink()


def nothing() -> None:
    return None


def wants(path: str) -> fewstep.Model:
    return shrink()


def breaks() -> fewstep.Model:
    return fewstep.Model(torch.load("nowhere.pt"), fewstep.VarianceExploding(), "sample")


def misuses() -> fewstep.Model:
    return fewstep.Model(Shrink(), fewstep.VarianceExploding(), "epsilonn", shape=(3,))


def grumbles() -> fewstep.Model:
    raise RuntimeError("first line\nsecond line")


def unet() -> fewstep.Model:
    """The model in the folder ``model`` of the working directory, which students can be saved like."""
    return fewstep.load_model("./model")


def leaves() -> fewstep.Model:
    raise SystemExit("bye")
