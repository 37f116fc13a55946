r"""Estimate the empirical model statistics of DPM-Solver-v3 (Zheng et al., arXiv 2310.13268, section 3.4) for any denoiser.

One pass over states of the model, at all levels with the same noise and probes, feeds `fewstep.learn.teacher.moments`. The states are those
of the model's own sampling trajectories, solved with the very evaluations made here, or diffused images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.condition import moved
from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.domain import domain_of
from fewstep.core.pooling import POOLED, default_pool, shared_axes
from fewstep.core.prediction import aligned
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.statistics import ModelStatistics
from fewstep.core.tableau import Nodes, tabulate
from fewstep.data.images import Images
from fewstep.learn.teacher.jvp import JVP_METHODS, choose_jvp
from fewstep.learn.teacher.moments import POOLS, Moments
from fewstep.models.model import Model
from fewstep.models.problem import Problem, check_model
from fewstep.runtime.accumulate import Store, accumulate, seed_batches
from fewstep.runtime.errors import FewstepError, ModelError
from fewstep.runtime.front_door import at_least, check_fields, checked, checked_class, config_of, scale_of
from fewstep.runtime.job import Job, Progress
from fewstep.sampling.loop import Step, steps
from fewstep.sampling.noise import seeded_noise
from fewstep.solvers import UniPC

__all__ = ["CalibrationConfig", "States", "calibrate", "collect", "diffused"]

States = Callable[[Sequence[int]], tuple[Tensor | None, Cond]]  # seeds -> clean images [B, *D] or None, conditions

NOISE, PROBE = 1_000_001, 1_000_002  # streams of the seeds: independent of what samplers draw from the same ones
FINITE = (-math.log(200.0), -math.log(5e-4))  # lam: where statistics begin and end if the process itself goes further
LARGEST_VALUE = 30.0  # of an image or latent


@checked_class
@dataclass(frozen=True)
class CalibrationConfig:
    """Configure a calibration: statistics at ``levels + 1`` values of lam, from ``num`` data.

    Args:
        levels: cells of the grid of noise levels.
        num: number of data: sampled trajectories, or diffused images.
        pool: which elements share ``l`` and ``s``, and which ``b``: element (none do), channel (those at one index of dimension 1 of the
            state, which are a token's features where the state is tokens), scalar (all do); scalar/element is one word for ``l`` and
            ``s`` and one for ``b``, a single word is for all three. By default element, and scalar for samples of more than 16,384
            numbers.
        batch: data processed at a time.
        seed: seed of the first datum; the next has the next seed.
        t_max: where the range of times starts; by default where the model's does.
        t_min: where the range of times ends; by default where the model's does.
        jvp: how to differentiate the network: auto (the first that works), forward, reverse, difference.

    Raises:
        FewstepError: fewer than 2 levels or data, an unknown pooling.
    """

    levels: int = 30
    num: int = 128
    pool: str | None = None
    batch: int = 64
    seed: int = 0
    t_max: float | None = None
    t_min: float | None = None
    jvp: str = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, levels=2, num=2, batch=1, seed=0)
        if self.pool not in (None, *POOLS):
            raise FewstepError(f"unknown pooling {self.pool!r}: known are {', '.join(POOLS)} (l and s/b)")

    def lam(self, schedule: NoiseSchedule) -> Tensor:
        """Return the grid of the statistics, ``[levels+1]``, uniform, both ends of sampling included."""
        ends = [schedule.t_max if self.t_max is None else self.t_max, schedule.t_last if self.t_min is None else self.t_min]
        lam = schedule.lam(torch.tensor(ends, dtype=torch.float64)).clamp(*FINITE)
        if not lam[0] < lam[1]:
            raise FewstepError(f"statistics run from t_max down to a smaller t_min, got {ends[0]:g} and {ends[1]:g}")
        if ends[0] > schedule.t_max or ends[1] < schedule.t_clean:
            known = f"{schedule.t_max:g} down to {schedule.t_clean:g}"
            raise FewstepError(f"the model's times run from {known}: statistics from {ends[0]:g} to {ends[1]:g} would leave them")
        return torch.linspace(float(lam[0]), float(lam[1]), self.levels + 1, dtype=torch.float64)

    @property
    def identity(self) -> str:
        """The options that moments depend on; not ``num``, if the last batch is whole: then data can be added later."""
        return f"batch {self.batch} seed {self.seed} jvp {self.jvp} num {self.num if self.num % self.batch else 'any'}"

    @property
    def batches(self) -> list[range]:
        """The seeds of each batch."""
        return seed_batches(self.seed, self.num, self.batch)


def diffused(images: Images, shape: Sequence[int], *, conditional: bool = False) -> States:
    """Return clean images drawn by seed, to be diffused into states, with their labels as conditions if the model takes any.

    Raises:
        FewstepError: images of another shape, without labels for a conditional model, or not in [-1, 1] around 0.
    """
    found, low, high = tuple(images.x.shape[1:]), float(images.x.min()), float(images.x.max())
    if found != tuple(shape):
        raise FewstepError(f"{images.name} has images of shape {found}, the model wants {tuple(shape)}: resize or convert them first")
    if not math.isfinite(low + high) or low >= 0 or max(-low, high) > LARGEST_VALUE:
        raise FewstepError(f"images should have values around 0, as in [-1, 1]; those of {images.name} lie in [{low:g}, {high:g}]")
    if conditional and images.labels is None:
        raise FewstepError(f"the model is class-conditional and {images.name} has no labels: use the model's own trajectories (no data)")

    def states(seeds: Sequence[int]) -> tuple[Tensor, Cond]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        index = [torch.randint(len(images.x), (1,), generator=generator) for generator in generators]
        x0 = torch.cat([images.dequantised(i, generator) for i, generator in zip(index, generators, strict=True)])
        return x0, images.labels[torch.cat(index)] if conditional and images.labels is not None else None

    return states


@checked
def calibrate(
    model: Model,
    *,
    guidance: float | None = None,
    out: str | Path | None = None,
    config: CalibrationConfig | None = None,
    images: Images | None = None,
    conditions: Callable[[Sequence[int]], Cond] | None = None,
    unguided: bool = False,
    device: torch.device | str | None = None,
    command: str = "",
    on_progress: Progress | None = None,
) -> ModelStatistics | None:
    """Estimate the statistics of a model that `DPMSolverV3` needs.

    A killed run continues where it was and ends with the same numbers, and the processes of ``torchrun`` share the data.

    Args:
        model: the model to calibrate.
        guidance: the scale that it will be sampled with; by default the model's own.
        out: a folder to save the statistics in; by default they stay in memory.
        config: how to calibrate.
        images: clean images to diffuse into states; without them the states are those of the model's own sampling trajectories.
        conditions: ``seeds -> cond`` for those trajectories; by default the model's labels by seed.
        unguided: estimate the statistics of the network without guidance, at the states of guided trajectories, as the authors did.
        device: where to compute; the model is moved there.
        command: for the card.
        on_progress: called with the number of network states visited and a note.

    Returns:
        The statistics, whose ``card`` says how they were made; None in all processes but the first.

    Raises:
        FewstepError: images that do not fit the model, see `diffused`.
        ModelError: something that is no `Model`, a model without a shape, or a network that cannot be differentiated, see `collect`.
        ArtifactError: the folder is in use, holds moments of another calibration, or cannot be written.

    Examples:
        >>> import fewstep
        >>> model = fewstep.load_model("digits-edm")
        >>> statistics = fewstep.calibrate(model, config=fewstep.CalibrationConfig(levels=6, num=8))
        >>> fewstep.sample(model, fewstep.DPMSolverV3(statistics), nfe=5, seeds=range(2)).shape
        torch.Size([2, 1, 8, 8])
    """
    config = config_of(config, CalibrationConfig)
    check_model(model)
    pool = config.pool or default_pool(model.need_shape())
    with Job.open("calibrate", out, device=device or model.device, on_progress=on_progress, command=command) as job:
        problem = Problem(model, scale_of(guidance, model.default_guidance), job.device)
        source = "own trajectories" if images is None else f"{images.name}, {len(images.x)} images, diffused"
        condition = conditions or problem.labels
        states: States = lambda seeds: (None, condition(seeds))  # noqa: E731
        if images is not None:
            states = diffused(images, problem.shape, conditional=model.classes is not None)
            if model.classes is not None and images.labels is not None and int(images.labels.max()) >= model.classes:
                highest = int(images.labels.max())
                raise FewstepError(f"{images.name} has labels up to {highest}, the model has labels 0 to {model.classes - 1}")
        mean = 0 if images is None else float(images.x.double().mean())
        identity = f"{problem.fingerprint} {problem.guidance} {unguided} {source} {mean}"
        measured, along = (model.conditional, problem.teacher) if unguided else (problem.teacher, None)
        moments, method = collect(measured, problem.shape, config, states, along=along, job=job, identity=identity)
        if job.rank:
            return None
        card = {
            "of": model.name,
            "states": source,
            "data": moments.count,
            "pool": pool,
            "seed": config.seed,
            "derivatives": method,
            "denoiser": "unguided" if unguided else "as sampled",
            "command": command,
        }
        lam = config.lam(problem.schedule)
        numbers = moments.fit(lam, pool)
        statistics = ModelStatistics(lam, *numbers, problem.shape, problem.schedule, problem.fingerprint, problem.guidance, card)
        if not job.in_memory:
            statistics.save(job.folder)
        return statistics


def collect(
    denoiser: Denoiser,
    shape: Sequence[int],
    config: CalibrationConfig,
    states: States,
    *,
    along: Denoiser | None = None,
    job: Job | None = None,
    identity: str = "",
) -> tuple[Moments, str]:
    """Collect the moments that `Moments.fit` makes statistics of, in one pass over ``config.num`` data.

    Each batch visits all levels with the same images, noise and probes. Memory does not grow with the data. With a ``job`` the moments are
    stored in its folder: a killed run continues and ends with the same numbers, a finished one can be given more data or fitted with
    another pooling at no cost, and the processes of ``torchrun`` share the batches. Of samples of more than 16,384 numbers only the moments
    are taken that the pooling needs.

    Args:
        denoiser: the denoiser to calibrate, with the guidance that it will be sampled with.
        shape: shape ``*D`` of one sample.
        config: how to calibrate.
        states: ``seeds -> (x0 [B, *D], cond)`` gives clean images to diffuse; where ``x0`` is None the states are those of the
            sampling trajectories from seeded noise, solved with the very evaluations made here.
        along: the denoiser that is sampled for those trajectories; by default ``denoiser``.
        job: where the moments are stored; its ``on_progress`` gets the number of network states visited and a note.
        identity: names what is calibrated; moments of anything else in the folder are refused.

    Returns:
        The moments, and how the network was differentiated.

    Raises:
        ModelError: the network cannot be differentiated, or gives numbers that are not finite (where).
        ArtifactError: the folder holds moments of another calibration, or cannot be written.
    """
    device = torch.device("cpu") if job is None else job.device
    on_progress: Progress = (lambda done, note: None) if job is None else job.on_progress
    pass_ = _Pass(denoiser, along, tuple(shape), config.lam(denoiser.schedule), states, device)
    levels = len(pass_.lam)
    _, finest = POOLS[config.pool or default_pool(shape)]  # b is shared by fewer elements than l and s, or by the same
    axes = shared_axes(finest, len(shape)) if math.prod(shape) > POOLED else ()
    size = [1 if axis in axes else shape[axis] for axis in range(-len(shape), 0)]
    whole = f"{identity} {pass_.lam.tolist()} {config.identity}{f' pooled {finest}' if axes else ''}"
    store = None
    if job is not None and not job.in_memory:
        store = Store(job.folder, "moments", whole, Moments(levels, size), work="calibration", again="calibrate")

    def fresh(seeds: range, count: int, method: str) -> Moments:
        return Moments.of(pass_.batch(seeds, method, count * levels, on_progress), levels, size, axes)

    made = accumulate(config.batches, fresh, lambda: Moments(levels, size), store, note=lambda: pass_.method(config), verb="calibrate")
    on_progress(made[0].count * levels, "")
    return made


class _Pass:
    """One pass over data: the states at which the network is evaluated and differentiated."""

    def __init__(
        self, denoiser: Denoiser, along: Denoiser | None, shape: tuple[int, ...], lam: Tensor, states: States, device: torch.device
    ) -> None:
        self.denoiser, self.along, self.shape, self.lam, self.states, self.device = denoiser, along, shape, lam, states, device
        self.nodes = Nodes.at(denoiser.schedule, denoiser.schedule.t_of_lam(lam))
        self.tableau = tabulate(UniPC(3), self.nodes)

    def function(self, cond: Cond) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the denoiser as a function ``(X, lam) -> D``."""
        schedule = self.denoiser.schedule

        def clean(X: Tensor, lam: Tensor) -> Tensor:  # noqa: N803
            t = schedule.t_of_lam(lam)
            return self.denoiser(X * aligned(schedule.alpha(t), X), t, cond)

        return clean

    def folded(self, x: Tensor) -> Tensor:
        """Return states as they are, those of a reflected model folded into its cube."""
        domain = domain_of(self.denoiser)
        return x if domain is None else domain.fold(x)[0]

    def method(self, config: CalibrationConfig) -> str:
        """Choose how to differentiate the network, by trying in the middle of the range."""
        k, (seeds, *_) = len(self.lam) // 2, config.batches
        x0, cond, z, v = self.draw(seeds[:4])
        level = float(torch.exp(-self.lam[k]))
        point = ((torch.zeros_like(z) if x0 is None else x0) + level * z, self.lam[k])
        return choose_jvp(self.function(cond), point, (v, torch.zeros_like(self.lam[k])), level, config.jvp)

    def draw(self, seeds: Sequence[int]) -> tuple[Tensor | None, Cond, Tensor, Tensor]:
        """Draw clean images or None, conditions, noise and probes, the same at all levels."""
        x0, cond = self.states(seeds)
        z = seeded_noise(seeds, self.shape, stream=NOISE).to(self.device)
        v = torch.where(seeded_noise(seeds, self.shape, stream=PROBE) > 0, 1.0, -1.0).to(self.device)
        return None if x0 is None else x0.to(self.device), moved(cond, self.device), z, v

    def batch(self, seeds: Sequence[int], method: str, visited: int, on_progress: Progress) -> Iterator[Tensor]:
        """Yield ``X, D, D', v J v`` level by level, each ``[4, B, *D]``."""
        x0, cond, z, v = self.draw(seeds)
        for k, values in enumerate(self.trajectories(cond, z, v, method) if x0 is None else self.diffusions(x0, cond, z, v, method)):
            if not bool(torch.isfinite(values).all()):
                if x0 is None and bool(torch.isfinite(values[1]).all()):  # only the slope: the next level's fault
                    k = min(k + 1, len(self.lam) - 1)
                raise ModelError(
                    f"the network or its derivative is not finite at noise level {torch.exp(-self.lam[k]):.4g}, t = {self.nodes.t[k]:g}, "
                    f"among the seeds {seeds[0]} to {seeds[-1]}: check its weights and dtype, or calibrate a smaller range of times"
                )
            on_progress(visited + (k + 1) * len(seeds), f"noise level {torch.exp(-self.lam[k]):.3g}")
            yield values

    def diffusions(self, x0: Tensor, cond: Cond, z: Tensor, v: Tensor, method: str) -> Iterator[Tensor]:
        """Differentiate at diffused images: ``D'`` is the derivative along the trajectory through each state."""
        derivative, function = JVP_METHODS[method], self.function(cond)
        one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for lam in self.lam:
            level = float(torch.exp(-lam))
            X = self.folded(x0 + level * z)
            D, Jv = derivative(function, (X, lam), (v, zero), level)
            _, dD = derivative(function, (X, lam), (D - X, one), level)
            yield torch.stack([X, D, dD, v * Jv])

    def trajectories(self, cond: Cond, z: Tensor, v: Tensor, method: str) -> Iterator[Tensor]:
        """Differentiate at the states of sampling trajectories: ``D'`` is the difference of ``D`` at the levels around.

        Its sum over levels is what ``D`` really changes by, however rough the network is in time; point derivatives are
        aliased on any grid coarser than that.
        """
        probe = _Probed(self, cond, v, method)
        end, count = self.folded(z * aligned(self.nodes.sigma[0], z)), len(self.lam)
        for k, step in enumerate(_without_gradients(steps(probe, self.tableau, end, cond))):
            end = step.x_next
            if k:
                yield self._with_slope(probe.seen[-2], probe.seen[-3 if k > 1 else -2], probe.seen[-1])
        probe(end, self.nodes.t[-1], cond)
        yield self._with_slope(probe.seen[-2], probe.seen[-3 if count > 2 else -2], probe.seen[-1])
        yield self._with_slope(probe.seen[-1], probe.seen[-2], probe.seen[-1])

    def _with_slope(self, here: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Return ``X, D, D', v J v`` from ``X, D, v J v`` here and at the levels around (at the ends: here and the one next to it)."""
        cells = 1 if here is before or here is after else 2
        return torch.stack([here[0], here[1], (after[1] - before[1]) / (cells * float(self.lam[1] - self.lam[0])), here[2]])


class _Probed:
    """The denoiser of a pass, which differentiates itself wherever it is evaluated.

    Attributes:
        seen: ``X, D, v J v`` at the last three levels.
    """

    def __init__(self, of: _Pass, cond: Cond, v: Tensor, method: str) -> None:
        self.of, self.v, self.derivative, self.function = of, v, JVP_METHODS[method], of.function(cond)
        self.seen: list[Tensor] = []
        self.count = 0

    @property
    def schedule(self) -> NoiseSchedule:
        return self.of.denoiser.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        lam, zero = self.of.lam[self.count], torch.zeros((), dtype=torch.float64)
        X = x / aligned(self.of.nodes.alpha[self.count], x)
        D, Jv = self.derivative(self.function, (X, lam), (self.v, zero), float(torch.exp(-lam)))
        self.seen, self.count = [*self.seen[-2:], torch.stack([X, D, self.v * Jv])], self.count + 1
        return D if self.of.along is None else self.of.along(x, t, cond)


@torch.no_grad()
def _without_gradients(iterator: Iterator[Step]) -> Iterator[Step]:
    yield from iterator
