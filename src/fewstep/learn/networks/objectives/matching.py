r"""Distil a model into a generator whose samples have the right distribution: EM distillation (arXiv 2405.16852), DMD (arXiv 2311.18828).

A regression student answers the mean of where near noises lead. A distribution matching student may send a noise to any picture, and only
has to make the right pictures in the right proportions. Its generator is one first-order step of the teacher's network, or a student of
regression; of several passes see `matching_few`. A second network beside it, the *fake*, learns to denoise the generator's own samples;
where it and the teacher disagree, see `matching_step`, is where the samples are to move.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Cond
from fewstep.core.grid import TimeGrid
from fewstep.core.prediction import add_noise, aligned, prediction
from fewstep.core.spacings import make_grid
from fewstep.core.tableau import Nodes
from fewstep.learn.networks.loop import Companion, Selection
from fewstep.learn.networks.low_rank import LowRankNetwork, ThroughUpdates, memory_in_words
from fewstep.learn.networks.objectives.distances import DISTANCES
from fewstep.learn.networks.objectives.matching_config import MatchingConfig
from fewstep.learn.networks.objectives.matching_passes import Turn
from fewstep.learn.networks.objectives.matching_step import direction, matching_loss
from fewstep.learn.networks.objectives.objective import Networks, StudentObjective
from fewstep.learn.teacher.batches import FIRST_FRESH, Batch, TeacherData
from fewstep.learn.teacher.trajectories import TrajectoryConfig
from fewstep.models.flow_map_student import FlowMapStudent
from fewstep.models.formats.folders import as_student, imports_code, save_like
from fewstep.models.model import Model
from fewstep.models.networks.calls import network_dtype, plain_call, unwrapped
from fewstep.models.networks.operator import OperatorForm, OperatorStudent
from fewstep.models.networks.temporal_unet import Mixing
from fewstep.models.problem import Problem
from fewstep.runtime.errors import ArtifactError, FewstepError, ModelError
from fewstep.runtime.process import share
from fewstep.sampling.loop import run
from fewstep.sampling.noise import seeded_noise
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import make_solver

__all__ = ["JudgeOfSamples", "MatchingObjective", "Rows", "generate"]

log = logging.getLogger("fewstep")

START = 2.5  # the noise level at which the teacher's network makes pictures of noise at once
LEVELS = (0.002, 1000.0)  # beyond them a picture, or the noise, is all there is
FASTER = 2.0  # the fake's learning rate, in those of the generator
FINE = 32  # evaluations of the trajectories whose ends a student is compared with
ABOVE = 3 * 2**40 + FIRST_FRESH  # where the seeds of held-out noises begin
MOST = 256  # samples at a time, of held-out noises
EARLY = 0.1  # the share of a run in which the fake may still be behind
BEHIND = 1.05  # the loss of a fake that does not follow, in those of the teacher on the same samples


class JudgeOfSamples(Protocol):
    """A measure of samples that chooses among weights: ``(samples [n, *D], labels [n] or None) -> figures``.

    Attributes:
        identity: a word for what it measures by, for checkpoints.
    """

    @property
    def identity(self) -> str: ...

    def __call__(self, samples: Tensor, requested: Tensor | None) -> Mapping[str, float | None]:
        """Return plain numbers by name, of which ``value`` is to be least."""
        ...


def generate(network: Any, z: Tensor, cond: Cond) -> Tensor:  # noqa: ANN401 - a student, maybe wrapped
    """Return the samples ``[B, *D]`` that a student's one pass makes of standard normal noise ``z [B, *D]``, with gradients."""
    student = getattr(network, "module", network)
    if isinstance(student, OperatorStudent):
        x = aligned(student.schedule.sigma(student.times[0]), z) * z
        return network(x, student.times[1:], cond, None, True)[:, 0]
    nodes = Nodes.at(student.schedule, torch.tensor([student.first, student.last], dtype=torch.float64))
    ratio, gain = nodes.first_order(0, 1)
    x = aligned(nodes.sigma[0], z) * z
    return aligned(ratio, x) * x + aligned(gain, x) * network(x, nodes.t[0], nodes.t[1], cond)


class MatchingObjective(StudentObjective):
    """Distribution matching: the samples of a one-step generator move where the teacher and a denoiser of those samples disagree.

    Args:
        problem: the teacher and its guidance.
        config: how to distil: a `MatchingConfig` (DMD) or an `EMConfig`.
        judge: measures samples; the weights of least ``value`` are kept.
        begin: a student of one pass to begin with; by default the teacher's own network at the noise level ``start``.

    Attributes:
        fake: the denoiser of the generator's own samples; it starts as the teacher's network.
        scores: the measures that choose the weights.

    Raises:
        FewstepError: no judge; a start outside the noise law, or beside a student to begin with.
        ModelError: a student to begin with that has several slots, or another teacher; a fake of low rank for a network without layers
            for it.
    """

    kind = "matching"

    def __init__(self, problem: Problem, config: MatchingConfig, judge: JudgeOfSamples | None, begin: Model | None = None) -> None:
        problem.model.need_denoiser()
        if judge is None:
            raise FewstepError(
                "distribution matching keeps the best weights that it comes to, by a judge of their samples: pass judge=, as "
                "fewstep.evaluate.metrics.judge.Judge.of_model(model)"
            )
        if not callable(judge) or not isinstance(getattr(judge, "identity", None), str):
            raise FewstepError(f"judge measures samples, as fewstep.evaluate.metrics.judge.Judge.of_model(model), got {str(judge)[:80]!r}")
        if (known := getattr(judge, "shape", problem.shape)) != problem.shape:
            raise FewstepError(
                f"the judge knows images of shape {known}, and {problem.name} makes {problem.shape}: name data of that shape"
            )
        self.problem, self.config, self.judge, self.begin = problem, config, judge, begin
        self.output = prediction(problem.model.prediction)
        self.grid = self.times()
        self.time_of(math.exp(config.p_mean), "the level exp(p_mean), around which teacher and fake are compared,")
        _ = problem.teacher
        self.fake: nn.Module = self.copied().to(problem.device) if config.fake_rank is None else self._fake_of(config.fake_rank)
        self.companion = Companion(self.fake, self._loss_of_fake, FASTER * config.lr, config.updates, config.before, end=config.fake_end)
        self.scores = Selection(self._measured, max(1, config.steps // config.measures))
        self.selection = self.scores
        with torch.no_grad():  # what cannot be made or asked is refused before long work
            self.answers(self.student(), [0])

    @property
    def start(self) -> float:
        """The noise level at which the teacher's network begins."""
        return START if self.config.start is None else self.config.start

    def times(self) -> TimeGrid:
        """Return the times at which the generator's passes begin, and the last one's end.

        Raises:
            FewstepError: the noise law has no such start, or it stands beside a student to begin with.
            ModelError: that is no student of one pass, of another teacher, or at another guidance.
        """
        first = self.time_of(self.start) if self.begin is None else self._first_of(self.begin)
        end = self.problem.model.trajectory_grid("angle", 1, self.problem.guidance).t[-1]
        return TimeGrid(torch.stack([first, end]))

    def _fake_of(self, rank: int) -> LowRankNetwork:
        """Return a fake of the teacher's own weights with updates of low rank."""
        problem = self.problem
        x, cond = torch.zeros(1, *problem.shape, device=problem.device), problem.cond([0])
        network: Any = problem.model.network
        return LowRankNetwork(network, rank, lambda network: self.model_of(network)(x, self.grid.t[:1], cond), seed=self.config.seed)

    def _first_of(self, begin: Model) -> Tensor:
        """Return the time at which a student to begin with starts.

        Raises:
            FewstepError: a start was asked for beside it.
            ModelError: it is no student of one pass, of another teacher, or at another guidance.
        """
        student = begin.network
        if self.config.start is not None:
            raise FewstepError(f"{begin.name} starts where it was made to: leave start out, or begin with the teacher's own network")
        if not isinstance(student, OperatorStudent | FlowMapStudent):
            raise ModelError(f"{begin.name} is no student of one pass to begin with: name one of kd, flow-map, em or dmd, or leave it out")
        if isinstance(student, OperatorStudent) and student.slots != 1:
            raise ModelError(f"{begin.name} has {student.slots} slots, and distribution matching one: begin with a student of kd")
        if isinstance(student, FlowMapStudent) and student.scales is not None:
            raise ModelError(
                f"{begin.name} is told its guidance scale, and distribution matching has one: begin with a flow map of one scale"
            )
        self.check_teacher(begin, self.problem.guidance)
        return student.times[0] if isinstance(student, OperatorStudent) else torch.tensor(student.first, dtype=torch.float64)

    def time_of(self, level: float, name: str = "start") -> Tensor:
        """Return the time with a noise level, or that of the network's table which is nearest; ``name`` is what an error calls the level.

        Raises:
            FewstepError: the noise law has no such level.
        """
        schedule = self.problem.schedule
        last = torch.tensor(schedule.t_last, dtype=torch.float64)
        low, high = (float(torch.exp(-schedule.lam(t))) for t in (last, schedule.ends[0]))
        if not low < level <= high * (1 + 1e-9):
            raise FewstepError(f"{name} is a noise level between {low:.3g} and {high:.3g} of the model's noise law, got {level:g}")
        return self._known(schedule.t_of_lam(-torch.log(torch.tensor([level], dtype=torch.float64))))[0]

    def _known(self, t: Tensor) -> Tensor:
        """Return times ``[n]`` within the noise law, at those of its network's table that are nearest, if it has one."""
        schedule = self.problem.schedule
        t = t.clamp(schedule.t_last, schedule.t_max)
        if schedule.times is None:
            return t
        times = schedule.times[(schedule.times >= schedule.t_last) & (schedule.alpha(schedule.times) > 0)]
        above = torch.searchsorted(times, t.contiguous()).clamp(1, len(times) - 1)
        return torch.where(t - times[above - 1] < times[above] - t, times[above - 1], times[above])

    # -- what is trained --------------------------------------------------------------------------------------------

    @property
    def trajectories(self) -> TrajectoryConfig | None:
        return self.config.trajectories if self.config.pair else None

    @property
    def identity(self) -> str:
        return f" judged by {self.judge.identity}"

    def student(self) -> nn.Module:
        if self.begin is not None:
            torch.manual_seed(self.config.seed)
            made: Any = copy.deepcopy(self.begin.network)
            made.card.clear()
            if isinstance(made, FlowMapStudent):
                made.single = True
            return made.to(self.problem.device)
        form = OperatorForm(anywhere=False, mixing=Mixing(form="none"))
        teacher = self.problem.model.with_network(self.copied())
        return OperatorStudent(teacher, self.grid.t, form).to(self.problem.device)

    def take_over(self, student: nn.Module, begin: Model) -> None:
        """Leave the student as it is: it was made of the one to begin with."""

    def check_data(self, data: TeacherData) -> None:
        """Refuse trajectories that begin at another time than the generator.

        Raises:
            ArtifactError: they do.
        """
        first, ours = float(data.trajectories.t[0]), float(self.grid.t[0])
        if not math.isclose(first, ours, rel_tol=1e-9):
            raise ArtifactError(
                f"the trajectories in {data.trajectories.folder} begin at t = {first:.6g}, the generator at {ours:.6g}: leave them out, "
                "or begin with a student (--from) that starts where they do"
            )

    def _loss_of_fake(self, network: nn.Module, fake: nn.Module, size: int, generator: torch.Generator) -> Tensor:
        """Return the loss ``[]`` of denoising score matching of the fake on the generator's samples."""
        bare = getattr(network, "module", network)
        rows = self.led(bare, self._rows(size, generator))
        with torch.no_grad():
            x0 = self.made_of(bare, rows, rows.z)
        return self.denoising_loss(fake, x0, rows)

    def levels(self, size: int, generator: torch.Generator) -> Tensor:
        """Draw the times ``[size]``, float64, at which teacher and fake are compared: of log-normal noise levels."""
        u = torch.exp(self.config.p_mean + self.config.p_std * torch.randn(size, generator=generator, dtype=torch.float64))
        return self._known(self.problem.schedule.t_of_lam(-torch.log(u.clamp(*LEVELS))))

    def _rows(self, size: int, generator: torch.Generator, injected: int = 0) -> Rows:
        """Draw the rows of a training step and return this process's share: the same for any number of processes."""
        mine, shape, classes = torch.tensor(share(range(size))), self.problem.shape, self.problem.model.classes
        z, e = torch.randn(2, size, *shape, generator=generator)[:, mine].to(self.problem.device)
        noise = torch.randn(injected, 2, size, *shape, generator=generator)[:, :, mine].to(self.problem.device)
        cond = None if classes is None else torch.randint(classes, (size,), generator=generator)[mine].to(self.problem.device)
        t = self.levels(size, generator)[mine]
        turn = self.turn(size, generator)
        return Rows(z, e, noise, cond, t, self.problem.schedule.alpha(t), self.problem.schedule.sigma(t), turn)

    def turn(self, size: int, generator: torch.Generator) -> Turn | None:
        """Draw the pass that each row of a training step trains and return this process's share; of one pass there is nothing to draw."""
        return None

    def led(self, student: Any, rows: Rows) -> Rows:  # noqa: ANN401 - of any kind
        """Return rows led to the pass that they train, by the passes before it."""
        return rows

    def made_of(self, student: Any, rows: Rows, z: Tensor) -> Tensor:  # noqa: ANN401 - of any kind, maybe wrapped
        """Return the samples ``[b, *D]`` that the generator makes of noises ``z [b, *D]`` in each row's pass, with gradients."""
        return generate(student, z, rows.cond)

    def model_of(self, network: Any) -> Model:  # noqa: ANN401 - of the teacher's kind, maybe wrapped
        """Return a network as the teacher's kind of model, without guidance."""
        model = self.problem.model
        if isinstance(network, nn.Module) and isinstance(unwrapped(network), LowRankNetwork):
            dtype = model.dtype or network_dtype(model.network, torch.float32)
            return replace(model, network=network, call=ThroughUpdates(model.call or plain_call), dtype=dtype, identity="", build=None)
        return replace(model, network=network, identity="", build=None)

    def denoiser_of(self, network: Any) -> Model:  # noqa: ANN401 - of the teacher's kind, maybe wrapped
        """Return a network as a conditional denoiser without guidance, which may be asked at any time."""
        return self.model_of(network).at_any_time()

    def denoising_loss(self, network: Any, x0: Tensor, rows: Rows) -> Tensor:  # noqa: ANN401 - of the teacher's kind, maybe wrapped
        """Return the loss ``[]`` of denoising score matching on samples ``x0 [B, *D]``, in the network's own output."""
        answer = self.denoiser_of(network)(add_noise(x0, rows.e, rows.alpha, rows.sigma), rows.t, rows.cond)
        scale = self.output.coefficients(rows.alpha, rows.sigma)[1].abs()
        return ((answer - x0) / aligned(scale, x0)).square().mean()

    # -- training ---------------------------------------------------------------------------------------------------

    def batch(self, data: TeacherData | None, size: int, generator: torch.Generator) -> Batch:
        return Batch(torch.empty(len(share(range(size))), 0), None) if data is None else data.draw(size, generator)

    def loss(self, networks: Networks, batch: Batch, generator: torch.Generator) -> Tensor:
        student, chain = networks.student, self.config.e_step
        bare = getattr(student, "module", student)
        rows = self.led(bare, self._rows(self.config.batch, generator, chain.langevin))
        teacher, fake = self.problem.teacher, self.denoiser_of(self.fake)
        x0 = None if chain.step_z else self.made_of(student, rows, rows.z)
        found = direction(
            lambda x: teacher(x, rows.t, rows.cond),
            lambda x: fake(x, rows.t, rows.cond),
            lambda z: self.made_of(bare, rows, z),
            *(rows.z, rows.e, rows.noise, rows.alpha, rows.sigma),
            step_e=chain.step_e,
            step_z=chain.step_z,
            cancel=chain.cancel,
            made=None if x0 is None else x0.detach(),
        )
        x0 = self.made_of(student, rows, found.z) if x0 is None else x0
        total = matching_loss(x0, found)
        return total + self.config.pair * self._pair_loss(student, batch) if self.config.pair else total

    def _pair_loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of regression onto pairs of noise and picture, in the network's own output, as that of kd."""
        bare: Any = getattr(student, "module", student)
        z = batch.x[:, 0] / aligned(self.problem.schedule.sigma(self.grid.t[0]), batch.x)
        if isinstance(bare, OperatorStudent):
            scale = bare.coefficients(bare.times[0], bare.times[1:])[1]
        else:
            nodes = Nodes.at(bare.schedule, self.grid.t)
            scale = nodes.first_order(0, 1)[1] * bare.prediction.coefficients(nodes.alpha[0], nodes.sigma[0])[1]
        error = (generate(student, z, batch.cond) - batch.x[:, -1]) / aligned(scale.reshape(()), z)
        return DISTANCES["huber"](error[:, None]).mean()

    # -- measured ---------------------------------------------------------------------------------------------------

    @cached_property
    def _held_out(self) -> list[list[int]]:
        """The seeds of held-out noises, some at a time."""
        seeds = [ABOVE + k for k in range(self.config.held_out)]
        return [seeds[k : k + MOST] for k in range(0, len(seeds), MOST)]

    @torch.no_grad()
    def answers(self, student: nn.Module, seeds: Sequence[int]) -> list[Tensor]:
        """Return the samples ``[len(seeds), *D]`` after each pass, the last of which are those of the student."""
        return [generate(student, seeded_noise(seeds, self.problem.shape).to(self.problem.device), self.problem.cond(seeds))]

    def _samples(self, student: nn.Module) -> list[Tensor]:
        return [self.answers(student, seeds)[-1] for seeds in self._held_out]

    @torch.no_grad()
    def _measured(self, student: nn.Module) -> dict[str, Any]:
        """Return what the judge says of a generator's samples of held-out noises, and the losses of the fake and the teacher on them.

        Of several passes the judge sees the samples after the last; the losses are those on the samples of all in turn, as in training.
        """
        answers = [self.answers(student, seeds) for seeds in self._held_out]
        samples = [made[-1] for made in answers]
        if not all(bool(torch.isfinite(made).all()) for made in samples):
            raise ArtifactError("the generator's samples of held-out noises are not finite: lower lr or weight_decay, or raise updates")
        labels = self.problem.labels([seed for seeds in self._held_out for seed in seeds])
        figures: dict[str, Any] = _plain(self.judge(torch.cat(samples).float().cpu(), labels))
        losses, size = torch.zeros(2, dtype=torch.float64), self.config.held_out
        generator = torch.Generator().manual_seed(self.config.seed)
        for made, seeds in zip(answers, self._held_out, strict=True):
            x0 = torch.stack([made[row % len(made)][row] for row in range(len(seeds))])
            t, e = self.levels(len(x0), generator), torch.randn(x0.shape, generator=generator).to(x0.device)
            rows = Rows(x0, e, e, self.problem.cond(seeds), t, self.problem.schedule.alpha(t), self.problem.schedule.sigma(t))
            for k, network in enumerate((self.fake, self.problem.model.network)):
                losses[k] += float(self.denoising_loss(network, x0, rows)) * len(x0) / size
        figures |= {"fake": float(losses[0]), "teacher": float(losses[1])}
        self._check_fake(figures)
        return figures

    def _check_fake(self, figures: Mapping[str, float]) -> None:
        """Warn, once, of a fake that denoises the generator's samples worse than the teacher does, after a tenth of the run."""
        passed = len(self.scores.scores) >= max(1, EARLY * self.config.measures)
        if passed and not self._warned and figures["fake"] > BEHIND * figures["teacher"]:
            self._warned = True
            log.warning(
                "the fake does not follow the generator: its loss on the generator's samples is %.4g, the teacher's %.4g; raise updates "
                "(now %d), or lower lr",
                figures["fake"],
                figures["teacher"],
                self.config.updates,
            )

    _warned = False

    @torch.no_grad()
    def finish(self, student: nn.Module, data: TeacherData | None) -> dict[str, Any]:
        """Measure the student against the ends of the teacher's trajectories of the same noises.

        Returns:
            ``scores``: of each measure, with the losses of the fake and of the teacher on the generator's samples; ``kept``: that of
            the weights that are kept; ``passes``: the times of its passes, and the RMSE to the ends, which says nothing of a student that
            may send a noise anywhere; ``arithmetic``: its cost, in evaluations of the teacher; of a fake of low rank ``fake``: the memory
            that it took, beside that of a copy of the teacher (see `LowRankNetwork.memory`).
        """
        problem, seeds = self.problem, self._held_out[0]
        exact = Sampler.build(make_solver("unipc-3"), make_grid("angle", problem.schedule, FINE), problem.schedule)
        ends = run(problem.teacher, exact.tableau, problem.start(seeds, exact.tableau.nodes), problem.cond(seeds))
        error = float((self._samples(student)[0] - ends).double().square().mean().sqrt())
        count = self.config.passes
        return {
            "scores": self.scores.scores,
            "kept": self.scores.chosen,
            "passes": {count: (self.grid.t.tolist(), error)},
            "arithmetic": {count: float(count)},
            **({"fake": self.fake.memory()} if isinstance(self.fake, LowRankNetwork) else {}),
        }

    # -- the student ------------------------------------------------------------------------------------------------

    def network(self, student: nn.Module) -> nn.Module:
        if isinstance(student, OperatorStudent):
            return student.operator.network
        assert isinstance(student, FlowMapStudent)
        return student.network.network

    @property
    def paired(self) -> bool:
        """Whether the student was made to send each noise where the teacher does, so that an RMSE to the teacher says something."""
        return self.begin is not None or self.config.pair > 0

    def facts(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        chain, chosen, (_, error) = self.config.e_step, figures["kept"], figures["passes"][self.config.passes]
        levels = [float(f"{level:.4g}") for level in torch.exp(-self.problem.schedule.lam(self.grid.t[:-1])).tolist()]
        nothing = "" if self.paired else ", which says nothing: the student may send a noise to any picture"
        return {
            "method": "distribution matching" if chain.langevin == 1 else f"EM distillation, {chain.langevin} Langevin steps",
            **({"noise level of the start": levels[0]} if len(levels) == 1 else {"noise levels of the passes": levels}),
            "weights of step": f"{chosen['step']} of {self.config.steps}, by {self.judge.identity}",
            **{
                name: round(value, 4)
                for name, value in chosen.items()
                if name in ("fd", "precision", "recall", "labels") and value is not None
            },
            "RMSE to the teacher's ends": f"{error:.4f}{nothing}",
            **({"fake": memory_in_words(figures["fake"])} if "fake" in figures else {}),
        }

    def describe(self, student: nn.Module, facts: Mapping[str, Any]) -> None:
        assert isinstance(student, OperatorStudent | FlowMapStudent)
        student.card.update(facts)

    def model(self, student: nn.Module) -> Model:
        assert isinstance(student, OperatorStudent | FlowMapStudent)
        return as_student(self.problem.model, student)

    def save(self, student: nn.Module, folder: Path) -> None:
        assert isinstance(student, OperatorStudent | FlowMapStudent)
        student.save(folder, trust=imports_code(self.problem.model))
        save_like(self.problem.model, self.network(student), folder)


def _plain(figures: object) -> dict[str, Any]:
    """Return what a judge says as plain numbers, which a checkpoint and ``history.json`` hold.

    Raises:
        FewstepError: it says something else, or no ``value``.
    """
    if not isinstance(figures, Mapping) or figures.get("value") is None:
        raise FewstepError(
            f"a judge returns numbers by name, with a value that is to be least, as {{'value': 0.1}}, got {str(figures)[:80]}"
        )
    try:
        return {str(name): None if value is None else float(value) for name, value in figures.items()}
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError of a tensor of several elements
        raise FewstepError(f"a judge returns plain numbers by name, or None, got {str(figures)[:80]}") from error


class Rows(NamedTuple):
    """The draws of a training step, this process's share.

    Attributes:
        z, e: noises that the generator is given, and that are added to its samples, ``[b, *D]``.
        noise: what the Langevin steps inject, ``[K, 2, b, *D]``.
        cond: the conditions.
        t, alpha, sigma: the level of each row, ``[b]``.
        turn: the pass that each row trains, of a generator that makes several.
    """

    z: Tensor
    e: Tensor
    noise: Tensor
    cond: Cond
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    turn: Turn | None = None
