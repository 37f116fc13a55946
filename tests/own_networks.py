"""Networks of a user's own, at the top of a module, so that they can be built again by their names."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

import fewstep

TIMES, CLASSES = 50, 3
LAW = fewstep.DiscreteVP.from_betas(torch.linspace(1e-4, 0.2, TIMES))


class TableNet(nn.Module):
    """Looks whole times and labels up in tables, as training scripts do: ``net(x, t_int, y)``."""

    def __init__(self, width: int = 8, *, sides: tuple[int, ...] = (1, 4, 4), dropout: float = 0.0) -> None:
        super().__init__()
        self.sides = sides
        self.time, self.label = nn.Embedding(TIMES, width), nn.Embedding(CLASSES + 1, width)
        self.first, self.last = nn.Linear(torch.Size(sides).numel(), width), nn.Linear(width, torch.Size(sides).numel())
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.label.weight, std=4.0)  # so that guidance leads elsewhere

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        assert t.dtype == torch.int64
        told = self.time(t) if y is None else self.time(t) + self.label(y)
        return self.last(self.dropout(torch.nn.functional.silu(self.first(x.flatten(1)) + told))).unflatten(1, self.sides)


class TimedNet(nn.Module):
    """Embeds its time by a part whose name nobody knows: ``net(x, t, y)``."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.clock, self.label = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width)), nn.Embedding(CLASSES + 1, width)
        self.first, self.last = nn.Linear(16, width), nn.Linear(width, 16)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        told = self.clock(t[:, None].to(x.dtype)) + self.label(y)
        return self.last(torch.nn.functional.silu(self.first(x.flatten(1)) + told)).unflatten(1, (1, 4, 4))


class Tied(nn.Module):
    """Two layers of one weight, with a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("ones", torch.ones(3), persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.second(self.first(x) * self.ones + t[:, None].to(x.dtype))


def stacked(width: int) -> nn.Module:
    """A network of parts of PyTorch's own, which no class stands for."""
    return nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, 3))


def thousandths(t: Tensor) -> Tensor:
    return 1000 * t


def of_state(net: nn.Module, x: Tensor, time: Tensor, cond: object, scale: float = 1.0) -> Tensor:
    return scale * net(x)


def no_network() -> int:
    return 5


def table_model(width: int = 8, seed: int = 0, **given: Any) -> fewstep.Model:
    """A model of whole times and labels with random weights."""
    torch.manual_seed(seed)
    network = TableNet(width, dropout=0.1).eval()
    facts: dict[str, Any] = {"shape": (1, 4, 4), "classes": CLASSES, "null_label": CLASSES, "time_dtype": torch.int64, "name": "toy"}
    return fewstep.Model(network, LAW, "epsilon", **{**facts, "build": functools.partial(TableNet, width=width, dropout=0.1), **given})


def table() -> fewstep.Model:
    return table_model()


def timed_model(seed: int = 0, **given: Any) -> fewstep.Model:
    """A model of a network whose time embedding has to be named, by random weights."""
    torch.manual_seed(seed)
    facts: dict[str, Any] = {"shape": (1, 4, 4), "classes": CLASSES, "null_label": CLASSES, "name": "toy", **given}
    return fewstep.Model(TimedNet().eval(), fewstep.VPLinear(), "v", **facts)
