r"""Distil guidance: a student that is told the scale and answers with one call (Meng et al., arXiv 2210.03142, stage 1).

With the guided denoiser ``D^w(x, t, y) = D(x, t, 0) + w (D(x, t, y) - D(x, t, 0))``, the loss is

    E_w  distance( (S(x, t, y, w) - D^w(x, t, y)) / b(t) ),      w uniform in [w_min, w_max],

with ``b`` the coefficient of the network's output in ``x0``: the error in the network's own output, where all levels have one size; or
with 1 in place of ``b``. A finite network has to be taught where it will be used, so what matters is which states it sees: see
`GuidedConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.grid import TimeGrid
from fewstep.core.prediction import add_noise, aligned, prediction
from fewstep.core.tableau import Nodes
from fewstep.data.images import Images
from fewstep.learn.networks.loop import step_of
from fewstep.learn.networks.objectives.config import STORED, StudentConfig
from fewstep.learn.networks.objectives.distances import DISTANCES
from fewstep.learn.networks.objectives.objective import Networks, StudentObjective
from fewstep.learn.networks.objectives.rollout import Rollout, Rows
from fewstep.learn.networks.score_matching import check_images, draw_images
from fewstep.learn.teacher.batches import FIRST_FRESH, Batch, TeacherData
from fewstep.learn.teacher.trajectories import TrajectoryConfig
from fewstep.models.formats.folders import imports_code, save_like
from fewstep.models.guidance import both_answers
from fewstep.models.guided import GuidedForm, form_of, guided_model, save_guided
from fewstep.models.model import Model
from fewstep.models.networks.extra_embedding import ConditionedNetwork
from fewstep.models.networks.scaled_call import ScaledCall
from fewstep.models.problem import Problem
from fewstep.runtime.errors import FewstepError, ModelError, look_up
from fewstep.runtime.front_door import at_least, checked_class
from fewstep.runtime.process import share
from fewstep.sampling.loop import steps
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import make_solver

__all__ = ["STATES", "GuidedConfig", "GuidedObjective"]

STATES = ("fresh", "guided", "teacher", "noised", "data")
WEIGHTS = ("output", "equal")  # the unit of an error
ROLLING = ("fresh", "guided")  # which go on from step to step
FINE = 24  # evaluations of the guided trajectories along which a student is measured
ABOVE = 3 * 2**40  # where their seeds begin


@checked_class
@dataclass(frozen=True)
class GuidedConfig(StudentConfig):
    """Configure the distillation of guidance: a student that is told its scale.

    Args:
        form: the scales that it is told, and its parts.
        states: where it is taught: on ``fresh`` trajectories of the teacher without guidance, which go on from step to step; on such
            ``guided`` ones, each at a scale of its own; on stored ones of the ``teacher``; on their ends ``noised`` anew; or on noised
            pictures (``data``).
        slots: number of times of these trajectories.
        grid: the spacing of those times.
        loss: huber, l1 or l2.
        weights: the unit of an error: ``output``, in which the teacher was trained, of the network's own output, so that all noise levels
            have one size; or ``equal``, of the denoised picture, where the levels count that decide the picture.

    Raises:
        FewstepError: a number out of range, or an unknown word.
    """

    lr: float = 5e-4
    form: GuidedForm = field(default_factory=GuidedForm)
    states: str = "fresh"
    slots: int = 24
    grid: str = "angle"
    loss: str = "huber"
    weights: str = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.form, GuidedForm):
            raise FewstepError(f"form is a fewstep.GuidedForm, got {str(self.form)[:80]!r}")
        at_least(self, slots=2)
        look_up(self.states, dict.fromkeys(STATES), "states of guided distillation", FewstepError)
        look_up(self.loss, DISTANCES, "loss", FewstepError)
        look_up(self.weights, dict.fromkeys(WEIGHTS), "weights of guided distillation", FewstepError)
        if self.states not in ("teacher", "noised"):
            self.check_unused(*STORED)


class GuidedObjective(StudentObjective):
    """Regression of a student that is told its scale onto the guided teacher.

    Args:
        problem: the teacher, without guidance.
        config: how to distil.
        images: for the states ``data``.

    Raises:
        ModelError: a teacher that cannot be guided, is a student, or whose network cannot be told a scale.
        FewstepError: a teacher at a guidance scale; images that the states do not take, or none where they need some.
    """

    kind = "guided"

    def __init__(self, problem: Problem, config: GuidedConfig, images: Images | None = None) -> None:
        model = problem.model.need_denoiser()
        if problem.guidance != 1:
            low, high = config.form.w_min, config.form.w_max
            raise FewstepError(
                f"a guided student is told its scale, from {low:g} to {high:g}: leave guidance out, and sample it at {problem.guidance:g}"
            )
        if model.null_label is None:
            raise ModelError(f"{model.name} cannot be guided, since it has no null label: there is nothing to distil")
        if (config.states == "data") != (images is not None):
            needs = "the states data are noised pictures: pass images=... (--data)"
            raise FewstepError(needs if images is None else f"the states {config.states} need no pictures: leave data out")
        if images is not None:
            check_images(images, model)
        self.problem, self.config, self.images = problem, config, images
        self.grid = model.trajectory_grid(config.grid, config.slots)
        self.nodes, self.output = Nodes.at(problem.schedule, self.grid.t), prediction(model.prediction)
        with torch.no_grad():  # what cannot be made or asked is refused before long work
            self._told(self.student(), config.form.w_max)(problem.start([0]), self.grid.t[0], problem.cond([0]))

    @property
    def trajectories(self) -> TrajectoryConfig | None:
        return self.config.trajectories if self.config.states in ("teacher", "noised") else None

    @property
    def identity(self) -> str:
        return "" if self.images is None else self.images.identity

    def student(self) -> ConditionedNetwork:
        made: Any = guided_model(self.problem.model.with_network(self.copied()), self.config.form).network
        return made.to(self.problem.device)

    def take_over(self, student: nn.Module, begin: Model) -> None:
        """Begin with the weights of another guided student of the same form and teacher.

        Raises:
            ModelError: it is none, or of another (which).
        """
        tuned = begin.tuned
        if tuned is None or tuned.form != self.kind or begin.scales is None:
            raise ModelError(f"{begin.name} is no guided student to begin with: name one, or leave it out")
        if form_of(begin) != self.config.form:
            raise ModelError(f"{begin.name} has another form, {form_of(begin)}: ask for that form, or begin with another student")
        if tuned.fingerprint != self.problem.fingerprint:
            raise ModelError(f"{begin.name} is a student of {tuned.teacher} ({tuned.fingerprint}): begin with one of the same teacher")
        super().take_over(student, begin)

    # -- training ---------------------------------------------------------------------------------------------------

    def batch(self, data: TeacherData | None, size: int, generator: torch.Generator) -> Batch:
        if self.images is not None:
            return draw_images(self.images, size, generator)
        if data is not None:
            return data.draw(size, generator)
        return Batch(torch.empty(len(share(range(size))), 0), None)

    def rows(self, batch: Batch, generator: torch.Generator) -> Rows:
        """Return the states of a training step with their times and scales, this process's share."""
        config, form = self.config, self.config.form
        rolling = self._rollout.at(step_of(generator, config.seed)) if config.states in ROLLING else None
        if rolling is not None and config.states == "guided":
            return rolling
        mine, steps = torch.tensor(share(range(config.batch))), self.grid.steps
        u = torch.rand(config.batch, generator=generator, dtype=torch.float64)[mine]
        scale, where = form.w_min + (form.w_max - form.w_min) * u, torch.arange(len(mine), device=batch.x.device)
        if rolling is not None:
            return rolling._replace(scale=scale)
        i = torch.randint(steps, (config.batch,), generator=generator)[mine]
        if config.states == "teacher":
            x = batch.x[where, i.to(batch.x.device)]
        else:
            x0 = batch.x if self.images is not None else batch.x[:, -1]
            noise = torch.randn(config.batch, *x0.shape[1:], generator=generator)[mine].to(x0.device)
            x = add_noise(x0, noise, self.nodes.alpha[i], self.nodes.sigma[i])
        return Rows(x, i, batch.cond, scale, torch.zeros_like(x))

    def loss(self, networks: Networks, batch: Batch, generator: torch.Generator) -> Tensor:
        rows = self.rows(batch, generator)
        t = self.grid.t[rows.i]
        with torch.no_grad():
            null, wanted = self._answers(rows)
            target = torch.lerp(null, wanted, aligned(rows.scale, wanted))
        student = self._told(networks.student, rows.scale)
        error = student(rows.x, t, rows.cond) - target
        if self.config.states in ROLLING:
            self._rollout.advance(*self._moved(rows, target if self.config.states == "guided" else wanted))
        if self.config.weights == "output":
            error = error / aligned(self.output.coefficients(self.nodes.alpha[rows.i], self.nodes.sigma[rows.i])[1].abs(), error)
        return DISTANCES[self.config.loss](error[:, None]).mean()

    def _told(self, network: Any, scale: float | Tensor) -> Model:  # noqa: ANN401 - a ConditionedNetwork, maybe wrapped
        form = self.config.form
        call = ScaledCall(form.w_max, form.features, scale)
        return replace(self.problem.model, network=network, call=call, null_label=None).at_any_time()

    def mend(self) -> str | None:
        if self.config.states not in ROLLING or self._rollout.finite():
            return None
        return f"the answers of {self.problem.name} itself are not finite, so check its weights and dtype"

    @cached_property
    def _rollout(self) -> Rollout:
        form = self.config.form

        scales = (form.w_min, form.w_max) if self.config.states == "guided" else (1.0, 1.0)

        def move(rows: Rows) -> tuple[Tensor, Tensor]:
            null, wanted = self._answers(rows)
            return self._moved(rows, torch.lerp(null, wanted, aligned(rows.scale, wanted)) if self.config.states == "guided" else wanted)

        return Rollout(self.problem, self.nodes, self.config.batch, scales, move, self.config.seed)

    def _answers(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return the teacher's answers without a label and with it, from one call on a doubled batch."""
        model = self.problem.model.at_any_time()
        assert model.null_label is not None  # checked at the beginning
        return both_answers(model.conditional, rows.x, self.grid.t[rows.i], rows.cond, torch.tensor(model.null_label))

    def _moved(self, rows: Rows, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows' states at their next times by DPM-Solver++ 2M (arXiv 2211.01095), and ``x0`` to remember."""
        i, lam = rows.i, self.nodes.lam
        ratio, gain = self.nodes.first_order()
        h, before = lam[i + 1] - lam[i], lam[i] - lam[(i - 1).clamp(min=0)]
        weight = torch.where((i > 0) & torch.isfinite(h) & torch.isfinite(before), h / (2 * before), torch.zeros_like(h))
        weight = torch.where(weight.isfinite(), weight, 0)
        extrapolated = x0 + aligned(weight, x0) * (x0 - rows.before)
        return aligned(ratio[i], x0) * rows.x + aligned(gain[i], x0) * extrapolated, x0

    # -- afterwards -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def finish(self, student: nn.Module, data: TeacherData | None) -> dict[str, Any]:
        """Measure the student along the guided teacher's own trajectories.

        Returns:
            ``calls``: for some scales the RMSE of one call to the guided teacher, over all states, and that at the worst time.
        """
        form, problem = self.config.form, self.problem
        sampler = Sampler.build(make_solver("dpm-solver-pp-2m"), TimeGrid(problem.model.trajectory_grid("angle", FINE).t), problem.schedule)
        seeds = [ABOVE + FIRST_FRESH + k for k in range(min(128, self.config.held_out))]
        calls: dict[str, tuple[float, float]] = {}
        for scale in sorted({form.w_min, min(max(2.0, form.w_min), form.w_max), form.w_max}):
            teacher, told, cond = problem.teacher_at(scale), self._told(student, scale), problem.cond(seeds)
            errors = []
            for step in steps(teacher, sampler.tableau, problem.start(seeds, sampler.tableau.nodes), cond):
                errors.append(float((told(step.x, step.t, cond) - step.x0).double().square().mean()))
            calls[f"{scale:g}"] = ((sum(errors) / len(errors)) ** 0.5, max(errors) ** 0.5)
        return {"calls": calls}

    def network(self, student: nn.Module) -> nn.Module:
        assert isinstance(student, ConditionedNetwork)
        return student.network

    def sampled_by(self, guidance: float) -> tuple[float | None, str | None, int | None]:
        return None, None, None

    def facts(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        form = self.config.form
        return {
            "guidance": f"{form.w_min:g} to {form.w_max:g}, told",
            "RMSE of one call to the guided teacher": {scale: round(error, 4) for scale, (error, _) in figures["calls"].items()},
        }

    def describe(self, student: nn.Module, facts: Mapping[str, Any]) -> None:
        self._card = dict(facts)

    def model(self, student: nn.Module) -> Model:
        assert isinstance(student, ConditionedNetwork)
        return guided_model(self.problem.model, self.config.form, student)

    def save(self, student: nn.Module, folder: Path) -> None:
        assert isinstance(student, ConditionedNetwork)
        save_guided(student, self.config.form, self._card, folder, trust=imports_code(self.problem.model))
        save_like(self.problem.model, student.network, folder)
