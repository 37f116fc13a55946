r"""DPM-Solver-v3 (Zheng et al., arXiv 2310.13268): a predictor and corrector driven by empirical model statistics ``l, s, b``.

With ``X = x/alpha``, ``F = (1 - l) X - D`` and ``E(lam) = exp int_{lam_s}^{lam} (l + s)`` the solution is exactly

    x_t/alpha_t = e^{-int l} [ x_s/alpha_s - int E (g + beta) dlam ],     beta = int e^{-int s} b,     g = e^{-int s} F - beta,

all integrals from ``lam_s``. Only ``g`` is unknown between evaluations: it gets a polynomial through past ones. Any ``l, s, b``
keep the order of accuracy; those of the model make ``g`` nearly constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.statistics import ModelStatistics, Rule
from fewstep.core.tableau import Nodes, Solver
from fewstep.runtime.errors import SolverError, look_up
from fewstep.runtime.front_door import checked_class
from fewstep.solvers.ddim import first_order
from fewstep.solvers.phi import divided_difference_weights, interpolation_weights
from fewstep.solvers.stencil import ALWAYS, NEVER, effective_order

__all__ = ["PUBLISHED", "DPMSolverV3", "Setting", "published"]

Gate = Callable[[float], bool]
GATES: dict[str, Gate] = {  # of the time as a part of the first one
    "always": lambda part: True,
    "half": lambda part: part <= 0.5,  # as the paper and the authors' README say
    "half-as-coded": lambda part: part > 0.5,  # as their code does
}


@checked_class
@dataclass(frozen=True)
class DPMSolverV3(Solver):
    """DPM-Solver-v3 of 1, 2 or 3 past evaluations (Zheng et al., arXiv 2310.13268), driven by statistics of the model.

    Args:
        statistics: of the model that is sampled; a path is loaded.
        steps: ``p``, the past evaluations that the predictor reads.
        predictor: ``true`` takes all derivatives from one polynomial through ``p`` points, at order ``p``; ``pseudo`` takes the k-th
            derivative from ``k + 1`` points only: of order 2 at most, but calmer on few steps.
        corrector: ``none``; ``same`` redoes each step with the new evaluation in place of the oldest, at order ``p``; ``pseudo`` adds
            it with pseudo derivatives; ``true``, which the authors' code lacks, adds it at order ``p + 1``.
        gate: when to correct: ``always``, ``half`` (the later half of the time range), ``half-as-coded`` (the earlier half, which
            is what the authors' code does), or a function of the time as a part of the first.
        integrals: ``exact``, or ``trapezoid`` as in the authors' code, which moves all times to the statistics' grid.
        lower_order_below: grids of fewer steps end with orders ..., 2, 1 (see `stencil.effective_order`); by default all.

    Raises:
        SolverError: an option that is none of these, or a grid outside the range of the statistics.
    """

    statistics: ModelStatistics
    steps: int = 3
    predictor: Literal["true", "pseudo"] = "pseudo"
    corrector: Literal["none", "same", "pseudo", "true"] = "pseudo"
    gate: Literal["always", "half", "half-as-coded"] | Gate = "always"
    integrals: Rule = "exact"
    lower_order_below: int = ALWAYS
    references = ("2310.13268",)

    def __post_init__(self) -> None:
        if isinstance(self.statistics, (str, Path)):
            object.__setattr__(self, "statistics", ModelStatistics.load(self.statistics))
        if not isinstance(self.statistics, ModelStatistics):
            raise SolverError(f"DPM-Solver-v3 needs ModelStatistics or a path to some; got {self.statistics!r}")
        choices = {
            "steps": (1, 2, 3),
            "predictor": ("true", "pseudo"),
            "corrector": ("none", "same", "pseudo", "true"),
            "integrals": ("exact", "trapezoid"),
            **({} if callable(self.gate) else {"gate": tuple(GATES)}),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise SolverError(f"DPM-Solver-v3 has {name} {', '.join(map(str, known))}; got {getattr(self, name)!r}")

    @property
    def order(self) -> int:
        predicted = min(self.steps, 2) if self.predictor == "pseudo" else self.steps
        corrected = {"none": 0, "same": self.steps, "pseudo": 2, "true": self.steps + 1}[self.corrector]
        return min(corrected, predicted + 1) if corrected > 1 else predicted  # the new point itself is of the predictor's order

    @property
    def memory(self) -> int:
        return self.steps + (self.corrector in ("pseudo", "true"))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.statistics.element

    def nodes(self, grid: TimeGrid, schedule: NoiseSchedule) -> Nodes:
        """Return the grid's own times; with trapezoid integrals the nearest points of the statistics' grid."""
        nodes, table = Nodes.at(schedule, grid.t), self.statistics.lam
        if not self.statistics.covers(nodes.lam):
            raise SolverError(
                f"the statistics cover noise levels {torch.exp(-table[-1]):.3g} to {torch.exp(-table[0]):.3g}, the grid runs from "
                f"{torch.exp(-nodes.lam[0]):.3g} to {torch.exp(-nodes.lam[-1]):.3g}: calibrate that range, or shorten the grid"
            )
        return nodes if self.integrals == "exact" else Nodes.at(schedule, self.statistics.snap(grid, schedule).t)

    def record(self, nodes: Nodes, i: int, x: Tensor, x0: Tensor) -> Tensor:
        """Return ``F``; where ``alpha = 0`` it does not exist, and ``x0`` is recorded."""
        if not bool(torch.isfinite(nodes.lam[i])):
            return x0
        return self._linear(nodes, i) * x - x0

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        p = effective_order(nodes, i, self.steps, self.lower_order_below)
        if not bool(torch.isfinite(nodes.lam[i : i + 2]).all()):  # an end of the process: the statistics say nothing there
            x0 = self._linear(nodes, i) * x - history[0] if bool(torch.isfinite(nodes.lam[i])) else history[0]
            return x, first_order(nodes, i, i + 1, x, x0)
        if i > 0 and self._corrects(nodes, i):
            points = effective_order(nodes, i - 1, self.steps, self.lower_order_below) + (self.corrector != "same")
            if points > 1:
                order = [i - 1, i, *range(i - 2, -1, -1)][:points]
                x = self.step(nodes, i - 1, i, anchor, {k: history[i - k] for k in order}, pseudo=self.corrector == "pseudo")
        return x, self.step(nodes, i, i + 1, x, {i - k: history[k] for k in range(p)}, pseudo=self.predictor == "pseudo")

    def step(self, nodes: Nodes, s: int, t: int, x: Tensor, past: dict[int, Tensor], *, pseudo: bool) -> Tensor:
        """Return the state at node ``t`` from ``x`` at node ``s``, with ``F`` at the nodes ``past``, the first of which is ``s``."""
        ems, lam = self.statistics, nodes.lam
        over = ems.integrals(lam[s], lam[t], len(past), self.integrals)
        g = []
        for p, remembered in past.items():
            to = ems.integrals(lam[s], lam[p], 0, self.integrals)
            g.append(torch.exp(-to.s) * remembered - to.beta)
        offsets = [lam[p] - lam[s] for p in past]
        weights = (divided_difference_weights if pseudo else interpolation_weights)(offsets, list(over.moments))
        change = over.drift + sum(weight * value for weight, value in zip(weights, g, strict=True))
        return nodes.alpha[t] * torch.exp(-over.l) * (x / nodes.alpha[s] - change)

    def _linear(self, nodes: Nodes, i: int) -> Tensor:
        """Return ``(1 - l) / alpha [*E]`` at a node."""
        return (1 - self.statistics.at(nodes.lam[i : i + 1])[0][0]) / nodes.alpha[i]

    def _corrects(self, nodes: Nodes, i: int) -> bool:
        if self.corrector == "none" or not bool(torch.isfinite(nodes.lam[i - 1])):
            return False
        gate = self.gate if callable(self.gate) else GATES[self.gate]
        return gate(float(nodes.t[i].detach() / nodes.t[0].detach()))


class Setting(NamedTuple):
    """Options of the authors' experiments: those of the solver, the grid and the end time, for up to ``most`` evaluations."""

    most: int
    grid: str
    t_min: float
    options: dict[str, Any]


def _theirs(most: int, grid: str, t_min: float, **options: Any) -> Setting:  # noqa: ANN401
    return Setting(most, grid, t_min, {"steps": 3, "predictor": "true", "integrals": "trapezoid", **options})


PUBLISHED: dict[str, tuple[Setting, ...]] = {  # from the authors' scripts; where the paper's text differs, the scripts
    "cifar10-scoresde": (
        _theirs(5, "logsnr", 1e-3, predictor="pseudo", corrector="same", lower_order_below=NEVER),
        _theirs(8, "logsnr", 1e-3, corrector="same"),
        _theirs(10, "logsnr", 1e-3, corrector="none"),
        _theirs(25, "logsnr", 1e-4, corrector="same"),
    ),
    "cifar10-edm": (
        _theirs(5, "logsnr", 0.002, predictor="pseudo", corrector="same"),
        _theirs(6, "logsnr", 0.002, corrector="same"),
        _theirs(25, "logsnr", 0.002, corrector="none"),
    ),
    "lsun-bedroom-latent": (_theirs(20, "uniform", 1e-3, corrector="pseudo"),),
    "imagenet-256-guided": (_theirs(20, "uniform", 1e-3, steps=2, corrector="pseudo"),),
    "stable-diffusion-1.5": (_theirs(20, "uniform", 1e-3, steps=2, corrector="pseudo"),),  # guidance 1.5
    "stable-diffusion-7.5": (_theirs(20, "uniform", 1e-3, steps=2, corrector="none"),),  # guidance 7.5
}


def published(setting: str, nfe: int) -> Setting:
    """Return the authors' own options for one of their experiments at this number of evaluations.

    Args:
        setting: a key of `PUBLISHED`.
        nfe: number of evaluations.

    Raises:
        SolverError: an experiment they did not make, or more evaluations than they had.
    """
    rows = look_up(setting, PUBLISHED, "published setting", SolverError)
    found = next((row for row in rows if nfe <= row.most), None)
    if found is None:
        raise SolverError(f"{setting} was published with up to {rows[-1].most} evaluations, not {nfe}")
    return found
