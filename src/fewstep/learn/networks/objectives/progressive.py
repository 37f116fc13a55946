r"""Halve the number of steps of a model, again and again (progressive distillation, Salimans and Ho, arXiv 2202.00512).

Two first-order steps ``s -> v -> t`` of the present model land where one of the new student must. With ``rho_ab`` the ratio of noise
levels, the student's answer has to be

    [ (rho_vt - rho_st) S(x, s) + (1 - rho_vt) S(X_v, v) ] / (1 - rho_st),

a convex combination, the semigroup equation of flow maps with a frozen teacher. Every row starts where the present model itself comes
to from fresh noise; a model that is told its guidance scale is halved at all scales at once (Meng et al., arXiv 2210.03142, stage 2).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Denoiser, FlowMap
from fewstep.core.grid import TimeGrid
from fewstep.core.prediction import aligned, prediction
from fewstep.core.spacings import make_grid
from fewstep.core.tableau import Nodes
from fewstep.learn.networks.loop import step_of
from fewstep.learn.networks.objectives.config import STORED, StudentConfig
from fewstep.learn.networks.objectives.distances import DISTANCES
from fewstep.learn.networks.objectives.flow_map_targets import composed, jump
from fewstep.learn.networks.objectives.objective import Networks, StudentObjective, write_card
from fewstep.learn.networks.objectives.rollout import Rollout, Rows
from fewstep.learn.teacher.batches import FIRST_FRESH, Batch
from fewstep.learn.teacher.trajectories import TrajectoryConfig
from fewstep.models.carried import OPTIMIZED, Carried
from fewstep.models.formats.folders import imports_code, save_like
from fewstep.models.guided import form_of, save_guided, untold
from fewstep.models.model import Model
from fewstep.models.networks.extra_embedding import ConditionedNetwork
from fewstep.models.problem import Problem
from fewstep.runtime.errors import FewstepError, counted, look_up
from fewstep.runtime.front_door import at_least, checked_class, is_count
from fewstep.runtime.process import share
from fewstep.sampling.loop import run
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import DDIM

__all__ = ["ProgressiveConfig", "ProgressiveObjective"]

ABOVE = 3 * 2**40 + FIRST_FRESH  # where their seeds begin
MEASURED = 128  # of them


@checked_class
@dataclass(frozen=True)
class ProgressiveConfig(StudentConfig):
    """Configure progressive distillation: students of half as many first-order steps each.

    Args:
        nfe: numbers of steps, each half of the one before: a student is trained for each, and the last is the result.
        start: steps of the model that is halved first, twice the first number, which is the default; of a student that was halved before,
            steps of the grid that its own are every second time of, or every fourth, and so on.
        grid: the spacing of those steps, of which each student keeps every second time.
        loss: huber, l1 or l2.

    Raises:
        FewstepError: numbers that do not halve, or out of range, or an unknown word.
    """

    lr: float = 5e-4
    nfe: tuple[int, ...] = (4, 2, 1)
    start: int | None = None
    grid: str = "angle"
    loss: str = "huber"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, start=2)
        look_up(self.loss, DISTANCES, "loss", FewstepError)
        if self.grid == OPTIMIZED:
            raise FewstepError(
                "a grid that is halved again and again is a spacing by name, as angle, not a model's own of one number of steps"
            )
        self.check_unused(*STORED)
        object.__setattr__(self, "nfe", tuple(self.nfe) if isinstance(self.nfe, tuple | list) else (self.nfe,))
        steps = [self.begins, *self.nfe] if self.nfe and all(map(is_count, self.nfe)) else []
        parts = [one / other for one, other in itertools.pairwise(steps)]
        if not steps or parts[0] not in (2.0**k for k in range(1, 32)) or any(part != 2 for part in parts[1:]):
            raise FewstepError(
                f"progressive distillation halves the number of steps, as nfe=(4, 2, 1) from start=8, got nfe={self.nfe} from {self.start}"
            )
        object.__setattr__(self, "nfe", tuple(int(count) for count in self.nfe))

    @property
    def all_steps(self) -> int:
        return self.steps * len(self.nfe)

    @property
    def begins(self) -> int:
        """The number of steps of the model that is halved first."""
        return 2 * self.nfe[0] if self.start is None else self.start


class ProgressiveObjective(StudentObjective):
    """Regression of a student's one step onto two of the present model.

    Args:
        problem: the present model and its guidance.
        config: how to distil; its ``nfe`` is the one number of this student.

    Raises:
        FewstepError: the present model was halved before, and was taught other steps than those that would be halved now; or it was not,
            and the first student would have less than half as many.
    """

    kind = "progressive"

    def __init__(self, problem: Problem, config: ProgressiveConfig) -> None:
        self.problem, self.config, (self.steps,) = problem, config, config.nfe
        self.model_told = problem.model.need_denoiser()
        whole = make_grid(config.grid, problem.schedule, config.begins).t
        stride = config.begins // self.steps
        self.fine, self.grid = TimeGrid(whole[:: stride // 2]), TimeGrid(whole[::stride])
        self.nodes, self.output = Nodes.at(problem.schedule, self.grid.t), prediction(problem.model.prediction)
        self._check_own_steps()
        self.present = replace(problem, model=replace(problem.model, given=Carried()))  # without the record of the steps just checked
        _ = self.present.teacher

    def _check_own_steps(self) -> None:
        """Refuse to halve steps that the present model was not taught, where it knows its own alone, or to more than halve any other's."""
        model, tuned = self.problem.model, self.problem.model.tuned
        if tuned is None or tuned.form != self.kind or tuned.nfe is None:
            if self.fine.steps != self.config.begins:
                whole = self.config.begins
                chain = ", ".join(str(whole // 2**k) for k in range(1, whole.bit_length()) if whole // 2**k >= self.steps)
                raise FewstepError(
                    f"the half of start={whole} steps is {whole // 2}, not {self.steps}: say nfe=({chain}), which halves again and again, "
                    f"or start={2 * self.steps}"
                )
            return
        own = model.optimized("ddim", tuned.nfe).t
        if own.shape != self.fine.t.shape or not torch.allclose(own, self.fine.t, rtol=1e-9):
            times = ", ".join(f"{t:.6g}" for t in own.tolist())
            mend = f"halve those, as nfe={tuned.nfe // 2} on their grid, or name" if tuned.nfe > 1 else "one step cannot be halved; name"
            raise FewstepError(
                f"{model.name} was taught steps of its own alone, between the times {times}, and not the {self.fine.steps} of "
                f"{self.config.grid} that would be halved: {mend} its teacher, {tuned.teacher}"
            )

    @property
    def trajectories(self) -> TrajectoryConfig | None:
        return None

    def student(self) -> nn.Module:
        return self.copied()

    # -- training ---------------------------------------------------------------------------------------------------

    def batch(self, data: Any, size: int, generator: torch.Generator) -> Batch:  # noqa: ANN401 - as of the base
        return Batch(torch.empty(len(share(range(size))), 0), None)

    def loss(self, networks: Networks, batch: Batch, generator: torch.Generator) -> Tensor:
        rows = self._rollout.at(step_of(generator, self.config.seed))
        with torch.no_grad():
            landing, target = self._two_steps(rows)
        error = self._told(networks.student, rows.scale)(rows.x, self.grid.t[rows.i], rows.cond) - target
        self._rollout.advance(landing, torch.zeros_like(landing))
        return DISTANCES[self.config.loss]((error / aligned(self._unit(rows.i), error))[:, None]).mean()

    def _unit(self, i: Tensor) -> Tensor:
        """Return the size of an error in ``x0`` at the places ``i [b]``: that of the output, or of ``v`` where that amplifies noise."""
        kind = prediction("v") if self.output.undefined_at_zero_alpha else self.output
        return kind.coefficients(self.nodes.alpha[i], self.nodes.sigma[i])[1].abs()

    def _told(self, network: Any, scale: float | Tensor) -> Denoiser:  # noqa: ANN401 - a network, maybe wrapped
        model = self.present.model.with_network(network) if isinstance(network, nn.Module) else self.present.model
        if model.scales is None:
            return model.conditional
        found = model.guided(scale)
        assert not isinstance(found, FlowMap)  # a denoiser, as the constructor sees to
        return found

    def _present(self, scale: float | Tensor) -> Denoiser:
        return self.present.teacher if self.problem.model.scales is None else self._told(None, scale)

    def _two_steps(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return where two steps of the present model lead, and the answer whose one step leads there."""
        schedule, fine, present = self.problem.schedule, self.fine.t, self._present(rows.scale)
        s, v, t = (fine[2 * rows.i + k] for k in range(3))
        first = present(rows.x, s, rows.cond)
        middle = jump(schedule, rows.x, first, s, v)
        second = present(middle, v, rows.cond)
        return jump(schedule, middle, second, v, t), composed(schedule, first, second, s, v, t)

    def mend(self) -> str | None:
        if self._rollout.finite():
            return None
        return f"the answers of {self.problem.name} itself are not finite, so check its weights and dtype"

    @cached_property
    def _rollout(self) -> Rollout:
        def move(rows: Rows) -> tuple[Tensor, Tensor]:
            landing, _ = self._two_steps(rows)
            return landing, torch.zeros_like(landing)

        scales = self.problem.model.scales or (1.0, 1.0)
        return Rollout(self.problem, self.nodes, self.config.batch, scales, move, self.config.seed)

    # -- afterwards -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def finish(self, student: nn.Module, data: Any) -> dict[str, Any]:  # noqa: ANN401 - as of the base
        """Measure the student's steps against twice as many of the model that was halved, from the same noises.

        Returns:
            ``ends``: for some guidance scales the RMSE of its steps; ``passes``: the times of its steps, and that RMSE at the first scale.
        """
        seeds = [ABOVE + k for k in range(min(MEASURED, self.config.held_out))]
        problem, told = self.problem, self.problem.model.scales
        low, high = told or (problem.guidance, problem.guidance)
        own, twice = (Sampler.build(DDIM(), grid, problem.schedule) for grid in (self.grid, self.fine))
        start, cond, ends = problem.start(seeds, own.tableau.nodes), problem.cond(seeds), dict[str, float]()
        for scale in sorted({low, min(max(2.0, low), high), high}):
            end = run(self._present(scale), twice.tableau, start, cond)
            ours = run(self._told(student, scale), own.tableau, start, cond)
            ends[f"{scale:g}"] = float((ours - end).double().square().mean().sqrt())
        return {"ends": ends, "passes": {self.steps: (self.grid.t.tolist(), next(iter(ends.values())))}}

    def network(self, student: nn.Module) -> nn.Module:
        return student.network if isinstance(student, ConditionedNetwork) else student

    def sampled_by(self, guidance: float) -> tuple[float | None, str | None, int | None]:
        return (guidance if self.problem.model.scales is None else None), "ddim", self.steps

    def facts(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        return {"steps": self.steps, "RMSE to the model that was halved": {scale: round(end, 4) for scale, end in figures["ends"].items()}}

    def describe(self, student: nn.Module, facts: Mapping[str, Any]) -> None:
        self._card = dict(facts)

    def model(self, student: nn.Module) -> Model:
        return self.problem.model.with_network(student)

    def save(self, student: nn.Module, folder: Path) -> None:
        model = self.problem.model
        if isinstance(student, ConditionedNetwork):
            save_guided(student, form_of(model), self._card, folder, trust=imports_code(untold(model)))
        else:
            about = f"A student of {counted(self.steps, 'first-order step')}, made by halving those of its teacher."
            write_card(folder, about, self._card, trust=imports_code(model))
        save_like(model, self.network(student), folder)
