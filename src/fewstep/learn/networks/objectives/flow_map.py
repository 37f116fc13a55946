r"""Distil a model into a flow map: one student for any number of passes (after Boffi et al., arXiv 2406.07505).

Each row of a batch is a pair of times ``s > t`` and a state at ``s``. What the student should answer there is said by a target, see
`flow_map_targets`; the error is taken in the network's own output, where all pairs have one size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.between import between_in_angle
from fewstep.core.prediction import add_noise, aligned
from fewstep.core.tableau import Nodes
from fewstep.data.images import Images
from fewstep.learn.networks.objectives.config import StudentConfig
from fewstep.learn.networks.objectives.distances import DISTANCES
from fewstep.learn.networks.objectives.flow_map_targets import LOWEST, TARGETS, Mean, Pairs, Step, ratio
from fewstep.learn.networks.objectives.objective import Networks, StudentObjective
from fewstep.learn.networks.score_matching import check_images, draw_images
from fewstep.learn.teacher.batches import Batch, TeacherData
from fewstep.learn.teacher.jvp import JVP_METHODS, choose_jvp
from fewstep.learn.teacher.trajectories import TrajectoryConfig
from fewstep.models.flow_map_student import FlowMapForm, FlowMapStudent
from fewstep.models.formats.folders import as_student, imports_code, save_like
from fewstep.models.guidance import scale_range
from fewstep.models.guided import GuidedForm, form_of, guided_model, save_guided, untold
from fewstep.models.model import Model
from fewstep.models.networks.extra_embedding import ConditionedNetwork
from fewstep.models.problem import Problem
from fewstep.runtime.errors import FewstepError, ModelError, look_up
from fewstep.runtime.front_door import at_least, checked_class
from fewstep.runtime.process import share

__all__ = ["PRESETS", "FlowMapConfig", "FlowMapObjective"]

# names in the literature: the target that each is, and the options that it fixes
PRESETS: dict[str, tuple[str, dict[str, float]]] = {
    "consistency": ("eulerian", {"last": 1.0}),
    "consistency-continuous": ("eulerian-jvp", {"last": 1.0}),
    "ctm": ("eulerian", {}),
    "meanflow": ("eulerian-jvp", {}),
    "shortcut": ("semigroup", {}),
    "progressive": ("semigroup", {}),
}
EXACT = ("trajectory",)  # targets that read stored trajectories between their ends
LONG = 0.5  # the ratio of noise levels of a step that is long enough to come back from where a student is
SHARES = {"first": 0.5, "last": 0.4, "anchor": 0.6}


@checked_class
@dataclass(frozen=True)
class FlowMapConfig(StudentConfig):
    """Configure the distillation of a flow map, one student for any number of passes.

    Args:
        target: what the student should answer: trajectory, lagrangian, eulerian, semigroup, lagrangian-jvp, eulerian-jvp or matching; or a
            name in the literature: consistency, consistency-continuous, ctm, meanflow, shortcut, progressive.
        slots: number of stored times below the start, between which pairs are drawn.
        grid: the spacing of those times, or optimized: the model's own for ddim.
        states: where pairs start: on the ``stored`` trajectories, or at their ends ``noised`` anew in each step.
        first: share of each batch that starts at the noise; by default 0.5.
        last: share that leads to the image; by default 0.4, and 1 of consistency.
        own: share of the pairs of trajectory that start where the averaged student itself comes to from the noise, by one jump or two, and
            lead to where the trajectory is; of long steps alone, since a short one could not come back.
        anchor: share of the pairs of semigroup whose times are neighbours, and of matching whose times are one; by default 0.6.
        max_passes: numbers of passes, from 1 on, whose inner times are chosen after training.
        form: the student's parts.
        loss: huber, l1 or l2.
        scales: the least and the largest guidance scale that the student is told, of a model with a null label; by default it has one,
            ``guidance``. A student of a model that is told its scale is told the same scales.

    Raises:
        FewstepError: a number out of range, or an unknown word.
    """

    target: str = "trajectory"
    slots: int = 16
    grid: str = "angle"
    states: str = "stored"
    first: float | None = None
    last: float | None = None
    anchor: float | None = None
    own: float = 0.0
    max_passes: int = 8
    form: FlowMapForm = field(default_factory=FlowMapForm)
    loss: str = "huber"
    scales: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.form, FlowMapForm):
            raise FewstepError(f"form is a fewstep.FlowMapForm, got {str(self.form)[:80]!r}")
        at_least(self, slots=2, max_passes=1)
        if self.scales is not None:
            object.__setattr__(self, "scales", scale_range(self.scales))
            if self.guidance != 1:
                raise FewstepError(
                    f"a flow map has one guidance, or is told one of its scales, not {self.guidance:g} and {self.scales}: leave one out"
                )
        look_up(self.target, {**TARGETS, **PRESETS}, "target of a flow map", FewstepError)
        look_up(self.loss, DISTANCES, "loss", FewstepError)
        look_up(self.states, dict.fromkeys(("stored", "noised")), "states of a flow map", FewstepError)
        for name in SHARES:
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise FewstepError(f"{name}, a share of each batch, lies in [0, 1], got {value}")
        if self.anchor is not None and self.equation not in ("semigroup", "matching"):
            raise FewstepError(f"anchor is a share of the pairs of semigroup and matching, not of {self.target}: leave it out")
        for name, value in PRESETS.get(self.target, ("", {}))[1].items():
            if getattr(self, name) not in (None, value):
                raise FewstepError(
                    f"{self.target} is {PRESETS[self.target][0]} with {name} {value:g}: leave {name} out, or name that target"
                )
        if not 0 <= self.own <= 1 or (self.own and self.equation != "trajectory"):
            raise FewstepError(f"own, a share of the pairs of the target trajectory, lies in [0, 1], got {self.own} of {self.target}")
        if self.max_passes > self.slots:
            raise FewstepError(f"{self.max_passes} passes go through as many of the {self.slots} slots: ask for fewer passes or more slots")
        if self.equation == "lagrangian-jvp" and self.mixed_precision != "no":
            raise FewstepError(
                "the target lagrangian-jvp is differentiated forward, which mixed precision does not know: leave that out, or use the "
                "target lagrangian"
            )
        if self.states == "noised" and self.equation in EXACT:
            raise FewstepError(f"the target {self.target} needs stored trajectories: leave states out, or use another target")

    @property
    def equation(self) -> str:
        """The key of `TARGETS` that the target is."""
        return PRESETS[self.target][0] if self.target in PRESETS else self.target

    def share(self, name: str) -> float:
        """Return the share ``first``, ``last`` or ``anchor`` that holds."""
        value = getattr(self, name)
        return PRESETS.get(self.target, ("", {}))[1].get(name, SHARES[name]) if value is None else value


class FlowMapObjective(StudentObjective):
    """Regression of a flow map onto one of the equations that it satisfies.

    Args:
        problem: the teacher and its guidance.
        config: how to distil.
        images: pictures whose noised states pairs start from; by default those of the teacher's trajectories.

    Raises:
        FewstepError: images that the target does not take, or none where it needs some.
        ModelError: a network that no flow map can be made of, that cannot be differentiated, or that cannot be told these scales.
    """

    kind = "flow-map"

    def __init__(self, problem: Problem, config: FlowMapConfig, images: Images | None = None) -> None:
        self.problem, self.config, self.images = problem, config, images
        self.equation, self.scales = config.equation, self._scales()
        self.averaged = self.equation not in ("trajectory", "lagrangian-jvp") or config.own > 0
        if images is not None and self.equation == "trajectory":
            raise FewstepError("the target trajectory learns from the teacher's trajectories: leave data out, or use another target")
        if images is None and self.equation == "matching":
            raise FewstepError("the target matching learns from pictures: pass images=..., the data that the model was trained on (--data)")
        if self.equation == "matching" and (self.scales is not None or problem.guidance != 1):
            mend = "" if self.scales is not None else ", or guidance 1"
            raise FewstepError(f"the target matching learns the data, not what guidance makes of it: use another target{mend}")
        if images is not None:
            config.check_unused("num", "fresh")
            check_images(images, problem.model)
        self.grid = problem.model.trajectory_grid(config.grid, config.slots, problem.guidance)
        self.from_pictures = images is not None or config.states == "noised"
        student = self.student()  # what cannot be made or asked is refused before long work
        self.prediction = student.prediction
        _ = self._derivative if self.equation in ("eulerian-jvp", "matching") else None
        if self.equation == "lagrangian-jvp":
            self._try_derivative(student)
        with torch.no_grad():
            student(problem.start([0]), self.grid.t[0], self.grid.t[-1], problem.cond([0]))

    @property
    def trajectories(self) -> TrajectoryConfig:
        made = replace(self.config.trajectories, scales=self.scales, guidance=1.0 if self.scales else self.config.guidance)
        return made if self.images is None else replace(made, num=self.config.held_out)

    @property
    def identity(self) -> str:
        return "" if self.images is None else self.images.identity

    def student(self) -> FlowMapStudent:
        teacher = self._told(self.problem.model.with_network(self.copied()))
        first, last = float(self.grid.t[0]), float(self.grid.t[-1])
        return FlowMapStudent(teacher, first, last, self.config.form).to(self.problem.device)

    def take_over(self, student: nn.Module, begin: Model) -> None:
        """Begin with the weights of another student of the same form, teacher and guidance.

        Raises:
            ModelError: it is of another (which).
        """
        assert isinstance(student, FlowMapStudent)
        theirs: Any = begin.network
        if isinstance(theirs, FlowMapStudent):
            forms = [(one.form.features, one.prediction.name, one.form.insert_at, one.scales) for one in (student, theirs)]
            if forms[0] != forms[1]:
                features, output, insert_at, scales = forms[1]
                told = "no guidance scale" if scales is None else f"guidance scales from {scales[0]:g} to {scales[1]:g}"
                raise ModelError(
                    f"{begin.name} has another form, of {features} features, read as {output}, told at {insert_at or 'the usual place'}, "
                    f"and of {told}: "
                    "ask for that form, or begin with another student"
                )
            self.check_teacher(begin, self.sampled_by(self.problem.guidance)[0])
        super().take_over(student, begin)

    # -- guidance scales that it is told ------------------------------------------------------------------------------

    def _scales(self) -> tuple[float, float] | None:
        """Return the range of guidance scales that the student is told, if any.

        Raises:
            ModelError: the model is told its scale already, or cannot be guided.
        """
        model, asked = self.problem.model.need_denoiser(), self.config.scales
        if asked is None:
            return model.scales
        if model.scales is not None:
            low, high = model.scales
            raise ModelError(f"{model.name} is told its guidance scale, from {low:g} to {high:g}, and so is its flow map: leave scales out")
        if model.null_label is None:
            raise ModelError(f"{model.name} cannot be guided, since it has no null label: leave scales out")
        return asked

    def _told(self, model: Model, network: ConditionedNetwork | None = None) -> Model:
        """Return a model that is told the scales, as its flow map is; the model itself where that is told none, or it is told already."""
        if self.config.scales is None:
            return model
        return guided_model(model, GuidedForm(*self.config.scales, insert_at=self.config.form.insert_at), network)

    # -- data -------------------------------------------------------------------------------------------------------

    def batch(self, data: TeacherData | None, size: int, generator: torch.Generator) -> Batch:
        if self.images is None:
            assert data is not None  # without pictures there are trajectories
            found = data.draw(size, generator)
            return Batch(found.x[:, -1], found.cond) if self.from_pictures else found
        found, scale = draw_images(self.images, size, generator), None
        if self.scales is not None:
            low, high = self.scales
            scale = (low + (high - low) * torch.rand(size, generator=generator, dtype=torch.float64))[torch.tensor(share(range(size)))]
        return Batch(found.x, found.cond if self.problem.model.classes is not None else None, scale)

    def pairs(self, batch: Batch, generator: torch.Generator) -> Pairs:
        """Draw a pair of times for each sample of a batch: the same for any number of processes."""
        config, count, steps = self.config, self.config.batch, self.grid.steps
        rows = torch.tensor(share(range(count)))

        def chosen(name: str) -> Tensor:
            return torch.rand(count, generator=generator) < config.share(name)

        i = torch.where(chosen("first"), 0, torch.randint(steps, (count,), generator=generator))
        j = i + 1 + (torch.rand(count, generator=generator) * (steps - i)).long()
        j = torch.where(chosen("last"), steps, j.clamp(max=steps))
        near, weight = chosen("anchor"), torch.rand(2, count, generator=generator, dtype=torch.float64)
        noise = torch.randn(count, *batch.x.shape[1:], generator=generator) if self.from_pictures else None
        if self.equation == "semigroup":
            j = torch.where(near, i + 1, j)
        v = {"lagrangian": j - 1, "eulerian": i + 1, "semigroup": (i + j) // 2}.get(self.equation, i)
        i, j, v, near = i[rows], j[rows], v[rows], near[rows]
        t = self.grid.t
        s_, v_, t_ = t[i], t[v], t[j]
        if self.equation in ("lagrangian-jvp", "matching", "eulerian-jvp"):  # any times between: no neighbours are needed
            if noise is not None:
                lower = between_in_angle(self.problem.schedule, s_, t[i + 1], weight[1, rows])
                s_ = torch.where(i > 0, lower, s_)
            t_ = torch.minimum(between_in_angle(self.problem.schedule, s_, t_, weight[0, rows]), s_)
            t_ = torch.where(j == steps, t[j], t_)
        if self.equation == "matching":
            t_ = torch.where(near, s_, t_)
        if noise is None:
            at = torch.arange(len(i), device=batch.x.device)
            x, x_v, x_t = (batch.x[at, one.to(batch.x.device)] for one in (i, v, j))
            return Pairs(x, s_, v_, t_, batch.cond, x_v, x_t, scale=batch.scale)
        alpha, sigma = self.problem.schedule.alpha(s_), self.problem.schedule.sigma(s_)
        x = add_noise(batch.x, noise[rows].to(batch.x.device), alpha, sigma)
        return Pairs(x, s_, v_, t_, batch.cond, x0=batch.x, scale=batch.scale)

    # -- training ---------------------------------------------------------------------------------------------------

    def loss(self, networks: Networks, batch: Batch, generator: torch.Generator) -> Tensor:
        pairs = self.pairs(batch, generator)
        if self.config.own:
            pairs = self._from_own_states(pairs, batch, networks.averaged, generator)
        problem, scale = self.problem, pairs.scale
        teacher = problem.teacher if scale is None else problem.teacher_at(scale)
        student, averaged = (_at(network, scale) for network in networks)
        step = Step(pairs, problem.schedule, student, averaged, teacher, self._derivative_now, problem.teacher_at)
        answer, target = TARGETS[self.equation](step)
        error = (answer - target) / aligned(self.output_scale(pairs.s), answer)
        return DISTANCES[self.config.loss](error[:, None]).mean()

    @torch.no_grad()
    def _from_own_states(self, pairs: Pairs, batch: Batch, averaged: FlowMapStudent, generator: torch.Generator) -> Pairs:
        """Return the pairs with some of their states replaced by those that the averaged student comes to from the noise."""
        chosen, weight = torch.rand(2, self.config.batch, generator=generator, dtype=torch.float64)[:, torch.tensor(self._share)]
        t, schedule = self.grid.t, self.problem.schedule
        wanted = (chosen < self.config.own) & (pairs.s != t[0]) & (ratio(schedule, pairs.s, pairs.t) < LONG)
        rows = wanted.nonzero()[:, 0]
        if not len(rows):
            return pairs
        at, first, s = rows.to(batch.x.device), t[:1].expand(len(rows)), pairs.s[rows]
        cond, scale = (None if of is None else of[rows.to(of.device)] for of in (pairs.cond, pairs.scale))
        middle = torch.where(weight[rows] < 0.5, s, between_in_angle(schedule, first, s, 2 * weight[rows] - 1))
        x = averaged.jump(batch.x[at, 0], first, middle, cond, scale)
        again = (middle != s).nonzero()[:, 0]
        if len(again):
            here = again.to(x.device)
            conds, scales = (None if of is None else of[again.to(of.device)] for of in (cond, scale))
            x[here] = averaged.jump(x[here], middle[again], s[again], conds, scales)
        states = pairs.x.clone()
        states[at] = x
        return replace(pairs, x=states)

    @property
    def _share(self) -> range:
        return share(range(self.config.batch))

    def output_scale(self, s: Tensor) -> Tensor:
        """Return what the network's output counts in ``g``, at the times ``s [B]``."""
        return self.prediction.coefficients(self.problem.schedule.alpha(s), self.problem.schedule.sigma(s))[1].abs()

    @property
    def _derivative_now(self) -> Any:  # noqa: ANN401 - a Derivative, or None
        return self._derivative if self.equation in ("eulerian-jvp", "matching") else None

    @cached_property
    def _derivative(self) -> Any:  # noqa: ANN401 - a Derivative
        """The way to differentiate the student along a trajectory that works for this network.

        Raises:
            ModelError: none does.
        """
        student, (mean, point, direction, level) = self.student().requires_grad_(False), self._trial()
        try:
            return JVP_METHODS[choose_jvp(lambda x, lam: mean(student, x, lam), point, direction, level)]
        except ModelError as error:
            raise ModelError(
                f"the target {self.config.target} is a derivative along trajectories: {error}, or use the target eulerian, which needs none"
            ) from error

    def _trial(self) -> Any:  # noqa: ANN401
        schedule, problem = self.problem.schedule, self.problem
        seeds = range(2)
        t = between_in_angle(schedule, self.grid.t[:1], self.grid.t[-1:], 0.5).expand(2)
        lam = schedule.lam(t).clamp_min(LOWEST)
        x, cond = problem.start(list(seeds)) / float(schedule.sigma(schedule.ends[0])), problem.cond(list(seeds))
        scaled = x * float(torch.exp(-lam[0]))

        def mean(student: Mean, scaled: Tensor, lam: Tensor) -> Tensor:
            s = schedule.t_of_lam(lam)
            return student(scaled * aligned(schedule.alpha(s), scaled), s, self.grid.t[-1].expand(len(scaled)), cond)

        return mean, (scaled, lam), (-scaled, torch.ones_like(lam)), float(torch.exp(-lam[0]))

    def _try_derivative(self, student: FlowMapStudent) -> None:
        """Refuse a network whose derivative in the target time has no gradient.

        Raises:
            ModelError: it has none.
        """
        from fewstep.learn.networks.objectives.flow_map_targets import lagrangian_jvp

        problem, seeds = self.problem, [0, 1]
        s, t = self.grid.t[:1].expand(2), self.grid.t[-2:-1].expand(2)
        student.requires_grad_(True)
        pairs = Pairs(problem.start(seeds), s, s, t, problem.cond(seeds))
        try:
            answer, target = lagrangian_jvp(Step(pairs, problem.schedule, student, student, problem.teacher))
            (answer - target).square().mean().backward()
        except Exception as error:  # whatever a network's own code raises when it cannot be differentiated
            raise ModelError(
                f"the network cannot be differentiated ({error}): use the target lagrangian, which needs no derivative"
            ) from error

    # -- afterwards -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def finish(self, student: nn.Module, data: TeacherData) -> dict[str, Any]:
        """Measure the student, and choose the inner times of its passes on the first half of the held-out trajectories.

        Returns:
            ``slots``: RMSE of one pass from the noise to each stored time, over ``sqrt(alpha^2 + sigma^2)``; ``passes``: for each number of
            passes the times to go through, and the RMSE to the teacher's endpoints on the other half; ``arithmetic``: of each number of
            passes; ``trained_on``: RMSE of one pass on as many trajectories that it was trained on, None where there are none. Of a student
            that is told its guidance scale also ``passes_by_scale``: by the third of the scales, the RMSE of each number of passes.
        """
        assert isinstance(student, FlowMapStudent)
        t, size = self.grid.t, torch.sqrt(self._nodes.alpha[1:] ** 2 + self._nodes.sigma[1:] ** 2)
        half = data.held_out // 2
        held_out = [batch for batch in data.batches_held_out(max(1, half))]
        search, judge = held_out[:1], held_out[1:]
        paths = self._paths(student, search)
        slots = torch.zeros(len(size), dtype=torch.float64)
        for batch in judge:
            ends = [student.jump(batch.x[:, 0], t[0], t[k], batch.cond, batch.scale) for k in range(1, len(t))]
            gap = torch.stack(ends, 1) - batch.x[:, 1:]
            slots += gap.double().cpu().square().mean((0, *range(2, gap.ndim))) * len(batch.x) / (data.held_out - half)
        passes = {n: (t[list(path)].tolist(), self._rmse(student, path, judge)) for n, path in paths.items()}
        known = list(data.batches_trained_on(data.held_out)) if data.num else []
        by_scale = {} if self.scales is None else {"passes_by_scale": self._by_scale(student, paths, judge, self.scales)}
        return {
            "slots": (slots.sqrt() / size).tolist(),
            "passes": passes,
            "arithmetic": {n: float(n) for n in passes},
            "trained_on": self._rmse(student, (0, len(t) - 1), known) if known else None,
            **by_scale,
        }

    def _by_scale(
        self, student: FlowMapStudent, paths: Mapping[int, tuple[int, ...]], batches: list[Batch], scales: tuple[float, float]
    ) -> dict[str, dict[int, float | None]]:
        """Return the RMSE of each number of passes in each third of the guidance scales; None where no trajectory has such a scale."""
        low, high = scales
        edges = [low + (high - low) * k / 3 for k in range(4)]
        third = torch.cat([torch.bucketize(batch.scale, torch.tensor(edges[1:3]).double()) for batch in batches if batch.scale is not None])
        found: dict[str, dict[int, float | None]] = {f"{a:.3g} to {b:.3g}": {} for a, b in itertools.pairwise(edges)}
        for n, path in paths.items():
            squares = [(end - x).double().square().flatten(1).mean(1).cpu() for end, x in self._ends(student, path, batches, {})]
            for k, errors in enumerate(found.values()):
                mine = torch.cat(squares)[third == k]
                errors[n] = float(mine.mean().sqrt()) if len(mine) else None
        return found

    @cached_property
    def _nodes(self) -> Nodes:
        return Nodes.at(self.problem.schedule, self.grid.t)

    def _rmse(self, student: FlowMapStudent, path: tuple[int, ...], batches: list[Batch]) -> float:
        square = sum(float((end - x).double().square().mean()) * len(x) for end, x in self._ends(student, path, batches, {}))
        return (square / sum(len(batch.x) for batch in batches)) ** 0.5

    def _ends(self, student: FlowMapStudent, path: tuple[int, ...], batches: list[Batch], known: dict[Any, Tensor]) -> Iterator[Any]:
        """Yield where a path of places leads from each batch, and where the teacher's trajectories end."""
        t = self.grid.t
        for number, (x, cond, scale) in enumerate(batches):
            here = x[:, 0]
            for k in range(1, len(path)):
                key = number, path[: k + 1]
                here = known[key] if key in known else student.jump(here, t[path[k - 1]], t[path[k]], cond, scale)
                if k < len(path) - 1:
                    known[key] = here
            yield here, x[:, -1]

    def _paths(self, student: FlowMapStudent, batches: list[Batch]) -> dict[int, tuple[int, ...]]:
        """Return the best places to go through for each number of passes.

        From the best path of one pass less, all places are tried for one more; then each is moved to its neighbours while that gains.
        """
        last, errors, known = self.grid.steps, dict[tuple[int, ...], float](), dict[Any, Tensor]()

        def error(path: tuple[int, ...]) -> float:
            if path not in errors:
                gaps = self._ends(student, path, batches, known)
                errors[path] = sum(float((end - x).double().square().mean()) * len(x) for end, x in gaps)
            return errors[path]

        best: dict[int, tuple[int, ...]] = {1: (0, last)}
        for n in range(2, self.config.max_passes + 1):
            before = best[n - 1]
            tried = [tuple(sorted({*before, k})) for k in range(1, last) if k not in before]
            path = min(tried, key=error)
            while True:
                moves = {tuple(sorted({*path[:k], path[k] + by, *path[k + 1 :]})) for k in range(1, n) for by in (-1, 1)}
                moves = {one for one in moves if len(one) == n + 1 and one[0] == 0 and one[-1] == last}
                better = min(moves, key=error, default=path)
                if error(better) >= error(path):
                    break
                path = better
            best[n] = path
        return best

    def network(self, student: nn.Module) -> nn.Module:
        assert isinstance(student, FlowMapStudent)
        return student.network.network

    def sampled_by(self, guidance: float) -> tuple[float | None, str | None, int | None]:
        return None if self.scales is not None else guidance, "ddim", 1

    def facts(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        told = {} if self.scales is None else {"guidance": f"{self.scales[0]:g} to {self.scales[1]:g}, told"}
        return {
            **told,
            "target": self.config.target,
            "passes": list(figures["passes"]),
            "RMSE to the teacher on trajectories held out": [round(error, 4) for _, error in figures["passes"].values()],
        }

    def describe(self, student: nn.Module, facts: Mapping[str, Any]) -> None:
        assert isinstance(student, FlowMapStudent)
        student.card.update(facts)

    def model(self, student: nn.Module) -> Model:
        assert isinstance(student, FlowMapStudent)
        return as_student(self._told(self.problem.model, student.network), student)

    def save(self, student: nn.Module, folder: Path) -> None:
        assert isinstance(student, FlowMapStudent)
        if self.scales is not None:
            save_guided(student.network, form_of(self._told(self.problem.model, student.network)), {}, folder)
        student.save(folder, trust=imports_code(untold(self.problem.model)))
        save_like(self.problem.model, student.network.network, folder)


def _at(network: Any, scale: Tensor | None) -> Mean:  # noqa: ANN401 - a FlowMapStudent, maybe wrapped, or None
    """Return the mean that a student answers when it is told guidance scales ``[B]``."""
    return network if scale is None else lambda x, s, t, cond: network(x, s, t, cond, scale)
