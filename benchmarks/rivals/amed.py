r"""AMED-Solver and its plugin: a small network places an evaluation inside each step, for each image (Zhou et al., arXiv 2312.00094).

Formula, in ``dx/ds = d(x, s) = (x - D(x, s)) / s``: from ``s_n`` an Euler step leads to ``s_m = s_n^{1-r} s_{n+1}^r``, and

    AMED:    x_{n+1} = x_n + c (s_{n+1} - s_n) d_m,          d_m = (x_m - D(x_m, a s_m)) / s_m,
    plugin:  x_m by iPNDM from x_n, and x_{n+1} = x_m + c (s_{n+1} - s_m) AB(d_m, past directions).

``r, c, a`` are the sigmoids of a small network that sees the mean over channels of the U-Net's bottleneck at ``(x_n, s_n)``, and both
levels. They differ between images, so no table holds them; the kernel is given rows with numbers of their own for each sample. With an odd
number of evaluations the first direction is ``x / sqrt(1 + s^2)``, for nothing (AFS), and the network sees zeros.

Loss: ``|x_{n+1} - y_{n+1}|^2`` to a teacher's state, one step after the other.

Authors' numbers (their commands for CIFAR-10): 10,000 noises in batches of 128, Adam at 5e-3, ``c`` within 1 percent of 1. AMED: ``a = 1``,
levels uniform in the time of a variance-preserving law, Heun with one level inserted as teacher, each step begun at the teacher's state.
Plugin: ``a`` within 20 percent of 1, EDM's levels, iPNDM with two levels inserted, each step begun where the student is. Their teachers err
themselves: ``exact=64`` follows exact trajectories instead.

Assumed: both times enter the embedding as logarithms of levels. Gradients reach ``r, c, a`` through the network's answer at ``x_m``.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from benchmarks.rivals.drawn import unit_gain
from benchmarks.rivals.levels import levels_of
from benchmarks.rivals.rival import Found, Needs, Note, Rival, _silent
from benchmarks.rivals.stepwise import Along, learn_steps
from benchmarks.rivals.teacher import Cost, Teacher
from torch import Tensor, nn
from torch.nn.functional import silu

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.schedule import NoiseSchedule, VarianceExploding
from fewstep.core.tableau import Row, State, advance
from fewstep.runtime.errors import SolverError
from fewstep.solvers.deis import ADAMS_BASHFORTH

Form = Literal["amed", "ipndm"]
ORDER = 4  # directions that iPNDM reads
BANDS = 8  # of the embedding of a level


def check_law(schedule: NoiseSchedule) -> None:
    """Refuse a law in which the state is not ``x0 + s eps``.

    Raises:
        SolverError: it is another.
    """
    if not isinstance(schedule, VarianceExploding):
        raise SolverError(f"this rival is written for the law x = x0 + s eps, as of EDM, not for {type(schedule).__name__}")
    levels_of(schedule)


class Bottleneck:
    """The activations in the middle of a U-Net at its last call, for each sample a mean over channels."""

    def __init__(self, network: Any) -> None:
        middle = getattr(network, "mid_block", None)
        if not isinstance(middle, nn.Module):
            raise SolverError(f"{type(network).__name__} has no mid_block, whose activations AMED reads: use features=none")
        self.middle, self.last = middle, None

    @contextmanager
    def watched(self) -> Generator[None, None, None]:
        """Listen to the calls of the network."""

        def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.last = output.detach().mean(1).flatten(1)

        handle = self.middle.register_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()

    def of(self, count: int) -> Tensor:
        """Return the activations of ``count`` samples, ``[count, F]``."""
        if self.last is None or len(self.last) != count:
            raise SolverError("AMED reads one call of the network for each evaluation: sample without guidance")
        return self.last


class Predictor(nn.Module):
    """Where the inner evaluation lies, and two scales, from activations and two levels.

    Args:
        features: activations of a sample; 0 for none.
        scale_dir, scale_time: how far from 1 the scales of the direction and of the told level may be.
        hidden: width of the layer that reads activations.
    """

    def __init__(self, features: int, scale_dir: float, scale_time: float, hidden: int = 128) -> None:
        super().__init__()
        self.features, self.scale_dir, self.scale_time = features, scale_dir, scale_time
        self.of_level = nn.Linear(BANDS, BANDS)
        self.of_features = nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, 4)) if features else None
        self.out = nn.Linear(2 * BANDS + 4 * bool(features), 3)

    def forward(self, features: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``r, c, a``, each ``[B]``, for steps from level ``s []`` to ``t []``."""
        inputs = [silu(self.of_level(_embedding(level))).expand(len(features), -1) for level in (s, t)]
        if self.of_features is not None:
            inputs.append(self.of_features(features))
        r, c, a = torch.sigmoid(self.out(torch.cat(inputs, 1))).unbind(1)
        return r, 1 + self.scale_dir * (2 * c - 1), 1 + self.scale_time * (2 * a - 1)


def _embedding(level: Tensor) -> Tensor:
    """Return sines and cosines of the logarithm of a level, ``[BANDS]``."""
    angle = torch.log(level).float() * 2.0 ** torch.arange(-2, BANDS // 2 - 2)
    return torch.cat([angle.sin(), angle.cos()])


def adams(order: int) -> list[float]:
    """Return the Adams-Bashforth weights of ``order`` directions, newest first, and zeros up to `ORDER`."""
    return [*ADAMS_BASHFORTH[order - 1], *[0.0] * (ORDER - order)]


def _column(value: Tensor | float, x: Tensor) -> Tensor:
    value = torch.as_tensor(value, dtype=x.dtype)
    return value.reshape(-1, *[1] * (x.ndim - 1)) if value.ndim else value


@dataclass(eq=False)
class Stepper:
    """The steps of a student, on the kernel.

    Attributes:
        form: of the steps.
        levels: of the student, ``[M+1]``.
        predictor: of ``r, c, a``.
        bottleneck: what it sees; None for nothing.
        first_for_nothing: whether the first direction is analytical.
    """

    form: Form
    levels: Tensor
    predictor: Predictor
    bottleneck: Bottleneck | None
    first_for_nothing: bool

    def step(self, denoiser: Denoiser, k: int, state: State, cond: Cond) -> State:
        """Take step ``k`` from a state to the next level's."""
        x, s, t = state.x, self.levels[k], self.levels[k + 1]
        free = self.first_for_nothing and k == 0
        with torch.no_grad():
            answer = unit_gain(denoiser.schedule, s).to(x.dtype) * x if free else denoiser(x, s, cond)
        size = 0 if self.bottleneck is None else self.predictor.features
        seen = torch.zeros(len(x), size) if free or self.bottleneck is None else self.bottleneck.of(len(x))
        r, c, a = (value.double() for value in self.predictor(seen, s, t))
        middle = s ** (1 - r) * t**r
        past = 2 * k if self.form == "ipndm" else 0
        state = advance(self._row(s, middle - s, past, x, keep=True), state, answer)
        answer = denoiser(state.x, a * middle, cond)
        if self.form == "amed":
            return advance(self._row(middle, c * (t - s), 0, x, keep=False, from_anchor=True), state, answer)
        return advance(self._row(middle, c * (t - middle), past + 1, x, keep=False), state, answer)

    def start(self, x: Tensor) -> State:
        """Return the state before the first step."""
        return State(x, x.clone(), tuple(torch.zeros_like(x) for _ in range(ORDER)))

    def _row(self, level: Tensor, length: Tensor, past: int, x: Tensor, *, keep: bool, from_anchor: bool = False) -> Row:
        """Return the row that records the direction at a level and goes ``length [B]`` along the mean of it and ``past`` earlier ones.

        Args:
            level: of the evaluation, ``[]`` or ``[B]``.
            length: of the way.
            past: directions before this one.
            x: for its shape and dtype.
            keep: whether the anchor becomes the state of the evaluation; else it becomes the new state.
            from_anchor: whether the way begins at the anchor, and not at the state of the evaluation.
        """
        inverse, one = _column(1 / level, x), torch.ones((), dtype=x.dtype)
        way = [_column(length * weight, x) for weight in adams(min(past + 1, ORDER))]
        begin = (one, None) if from_anchor else (None, one)
        onward = (*begin, *way)
        anchor = (None, one, *[None] * ORDER) if keep else onward
        return Row(record=(inverse, -inverse), anchor=anchor, x=onward, bias=(None, None), noise=None)


@dataclass(eq=False)
class AmedSampler:
    """AMED's sampler: the steps with the predictor as it was learned."""

    stepper: Stepper
    evaluations: int

    @property
    def nfe(self) -> int:
        return self.evaluations

    @property
    def ends(self) -> Tensor:
        return self.stepper.levels[[0, -1]]

    @torch.no_grad()
    def samples(self, denoiser: Denoiser, x: Tensor, cond: Cond) -> Tensor:
        stepper, state = self.stepper, self.stepper.start(x)
        with stepper.bottleneck.watched() if stepper.bottleneck is not None else _nothing():
            for k in range(len(stepper.levels) - 1):
                state = stepper.step(denoiser, k, state, cond)
        return state.x

    def tensors(self) -> dict[str, Tensor]:
        return {"levels": self.stepper.levels, **{name: value.detach() for name, value in self.stepper.predictor.state_dict().items()}}


@contextmanager
def _nothing() -> Generator[None, None, None]:
    yield


@dataclass(frozen=True)
class AMED(Rival):
    """The hyper-parameters of AMED-Solver; those of its plugin to iPNDM are `PLUGIN`.

    Attributes:
        form: of the steps: ``amed``, or ``ipndm`` for the plugin.
        features: what the predictor sees of an image: ``bottleneck`` or ``none``.
        scale_dir, scale_time: see `Predictor`.
        spacing, solver, inserted, batch, rate, from_teacher, exact: see `Along`.
    """

    paper = "2312.00094"
    needs = Needs(features=True, per_image=True)
    iterations: int = 79
    form: Form = "amed"
    features: Literal["bottleneck", "none"] = "bottleneck"
    scale_dir: float = 0.01
    scale_time: float = 0.0
    spacing: str = "time_uniform"
    solver: str = "heun"
    inserted: int = 1
    batch: int = 128
    rate: float = 5e-3
    from_teacher: bool = True
    exact: int | None = None

    def steps(self, nfe: int) -> int:
        """Return the steps of a sampler of ``nfe`` evaluations: two for each, but for the first of an odd number."""
        return (nfe + 1) // 2

    @property
    def along(self) -> Along:
        """What it follows."""
        return Along(self.spacing, self.solver, self.inserted, self.iterations, self.batch, self.rate, self.from_teacher, self.exact)

    def cost(self, nfe: int) -> Cost:
        return self.along.cost(self.steps(nfe), 1, 1)  # at most: the first of an odd number is free

    def stepper(self, teacher: Teacher, nfe: int) -> Stepper:
        """Return the steps as they are before anything is learned."""
        schedule, network = teacher.schedule, teacher.problem.model.network
        check_law(schedule)
        bottleneck, size = None, 0
        if self.features == "bottleneck":
            bottleneck = Bottleneck(network)
            x, cond = teacher.start(range(1))
            with bottleneck.watched(), torch.no_grad():
                teacher.denoiser(x, schedule.ends[0], cond)
            size = bottleneck.of(1).shape[1]
        state = torch.random.get_rng_state()
        torch.manual_seed(0)
        predictor = Predictor(size, self.scale_dir, self.scale_time)
        torch.random.set_rng_state(state)
        return Stepper(self.form, self.along.times(schedule, self.steps(nfe)), predictor, bottleneck, nfe % 2 == 1)

    def fit(self, teacher: Teacher, nfe: int, note: Note = _silent) -> Found:
        stepper = self.stepper(teacher, nfe)

        def step(k: int, x: Tensor, cond: Cond, memory: State | None) -> tuple[Tensor, State]:
            before = stepper.start(x) if memory is None else memory._replace(x=x, anchor=x)
            after = stepper.step(teacher.denoiser, k, before, cond)
            return after.x, State(after.x.detach(), after.x.detach(), tuple(h.detach() for h in after.history))

        with stepper.bottleneck.watched() if stepper.bottleneck is not None else _nothing():
            curve = learn_steps(teacher, self.along, stepper.levels, step, stepper.predictor, note)
        return Found(AmedSampler(stepper, nfe), curve)


PLUGIN = AMED(form="ipndm", scale_time=0.2, spacing="polynomial", solver="ipndm", inserted=2, from_teacher=False)
