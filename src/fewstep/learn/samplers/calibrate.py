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

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.prediction import aligned
from fewstep.core.schedule import DiscreteVP, NoiseSchedule
from fewstep.core.statistics import ModelStatistics
from fewstep.core.tableau import Nodes, advance, tabulate
from fewstep.data.images import Images
from fewstep.learn.teacher.jvp import JVP_METHODS, choose_jvp
from fewstep.learn.teacher.moments import POOLS, Moments
from fewstep.models.formats.folders import Model
from fewstep.runtime.accumulate import Store, accumulate, seed_batches
from fewstep.runtime.errors import FewstepError, ModelError
from fewstep.sampling.noise import seeded_noise
from fewstep.solvers import UniPC

__all__ = ["CalibrationConfig", "States", "calibrate", "collect", "diffused"]

States = Callable[[Sequence[int]], tuple[Tensor | None, Cond]]  # seeds -> clean images [B, *D] or None, conditions

NOISE, PROBE = 1_000_001, 1_000_002  # streams of the seeds: independent of what samplers draw from the same ones
FINITE = (-math.log(200.0), -math.log(5e-4))  # lam: where statistics begin and end if the process itself goes further
LARGEST_VALUE = 30.0  # of an image or latent


@dataclass(frozen=True)
class CalibrationConfig:
    """How to calibrate: the statistics are estimated at ``levels + 1`` values of lam from ``num`` data.

    Args:
        pool: a key of `POOLS`: over which elements ``l`` and ``s`` / ``b`` are shared; one word is for all three.
        batch: data at a time.
        seed: of the first datum; the next has the next seed.
        t_max, t_min: the range of times; by default that of the model.
        jvp: a key of `JVP_METHODS`, or ``auto``: the first that works.

    Raises:
        FewstepError: fewer than 2 levels or data, an unknown pooling.
    """

    levels: int = 30
    num: int = 128
    pool: str = "element"
    batch: int = 64
    seed: int = 0
    t_max: float | None = None
    t_min: float | None = None
    jvp: str = "auto"

    def __post_init__(self) -> None:
        if self.levels < 2 or self.num < 2 or self.batch < 1 or self.seed < 0:
            raise FewstepError(f"calibration needs at least 2 levels, 2 data, a batch of 1 and a seed of at least 0, got {self}")
        if self.pool not in POOLS:
            raise FewstepError(f"unknown pooling {self.pool!r}: known are {', '.join(POOLS)} (l and s / b)")

    def lam(self, schedule: NoiseSchedule) -> Tensor:
        """The grid of the statistics, ``[levels+1]``, uniform, both ends of sampling included."""
        last = schedule.t_last if isinstance(schedule, DiscreteVP) else schedule.t_min
        ends = [schedule.t_max if self.t_max is None else self.t_max, last if self.t_min is None else self.t_min]
        lam = schedule.lam(torch.tensor(ends, dtype=torch.float64)).clamp(*FINITE)
        if not lam[0] < lam[1]:
            raise FewstepError(f"statistics run from t_max down to a smaller t_min, got {ends}")
        return torch.linspace(float(lam[0]), float(lam[1]), self.levels + 1, dtype=torch.float64)

    @property
    def identity(self) -> str:
        """What moments depend on; more data may be added later, if the last batch is whole."""
        return f"batch {self.batch} seed {self.seed} jvp {self.jvp} num {self.num if self.num % self.batch else 'any'}"

    @property
    def batches(self) -> list[range]:
        """The seeds of each batch."""
        return seed_batches(self.seed, self.num, self.batch)


def diffused(images: Images, shape: Sequence[int], *, conditional: bool = False) -> States:
    """States from diffused images: the clean ones, drawn by seed, with their labels as condition if the model takes any.

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


def calibrate(
    model: Model,
    config: CalibrationConfig,
    folder: str | Path | None = None,
    *,
    images: Images | None = None,
    conditions: Callable[[Sequence[int]], Cond] | None = None,
    guidance: float = 1.0,
    unguided: bool = False,
    device: torch.device | None = None,
    command: str = "",
    observe: Callable[[int, str], None] | None = None,
) -> ModelStatistics | None:
    """The statistics of a model, saved in ``folder`` if one is given; None in all processes but the first.

    Args:
        images: clean images to diffuse into states; without them the states are those of the model's own sampling trajectories.
        conditions: ``seeds -> cond`` for those trajectories; by default the model's labels by seed.
        guidance: the scale that the model will be sampled with. The statistics are those of the guided denoiser,
        unguided: ... or of the network without guidance, at the states of guided trajectories, as the authors did.
        device: where to compute; the model is moved there.
        command: for the card.
        observe: see `collect`.

    Raises:
        FewstepError: as `diffused` and `collect`; also the model's own errors.
    """
    device, folder = device or torch.device("cpu"), None if folder is None else Path(folder)
    model.to(device)
    guided, lam = model.guided(guidance), config.lam(model.denoiser.schedule)
    source = "own trajectories" if images is None else f"{images.name}, {len(images.x)} images, diffused"
    condition = conditions or model.labels
    states: States = lambda seeds: (None, condition(seeds))  # noqa: E731
    if images is not None:
        states = diffused(images, model.shape, conditional=model.classes is not None)
        if model.classes is not None and images.labels is not None and int(images.labels.max()) >= model.classes:
            raise FewstepError(f"{images.name} has labels up to {int(images.labels.max())}, the model has labels 0 to {model.classes - 1}")
    identity = f"{model.fingerprint} {guidance} {unguided} {source} {0 if images is None else float(images.x.double().mean())}"
    measured, along = (model.denoiser, guided) if unguided else (guided, None)
    made = collect(measured, model.shape, config, states, along=along, folder=folder, identity=identity, device=device, observe=observe)
    if made is None:
        return None
    moments, method = made
    card = {
        "of": model.name,
        "states": source,
        "data": moments.count,
        "pool": config.pool,
        "seed": config.seed,
        "derivatives": method,
        "denoiser": "unguided" if unguided else "as sampled",
        "command": command,
    }
    numbers = moments.fit(lam, config.pool)
    statistics = ModelStatistics(lam, *numbers, model.shape, model.denoiser.schedule, model.fingerprint, guidance, card)
    if folder is not None:
        statistics.save(folder)
    return statistics


def collect(
    denoiser: Denoiser,
    shape: Sequence[int],
    config: CalibrationConfig,
    states: States,
    *,
    along: Denoiser | None = None,
    folder: Path | None = None,
    identity: str = "",
    device: torch.device | None = None,
    observe: Callable[[int, str], None] | None = None,
) -> tuple[Moments, str] | None:
    """One pass over ``config.num`` data: the moments that `Moments.fit` makes statistics of, and how the network was differentiated.

    Each batch visits all levels with the same images, noise and probes. Memory does not grow with the data. With a
    ``folder`` the moments are kept there: a killed run continues and ends with the same numbers, a finished one can be given more data
    or fitted with another pooling at no cost, and the processes of ``torchrun`` share the batches (all but the first get None).

    Args:
        denoiser: whose statistics; with its guidance, if it is to be sampled with any.
        shape: of one sample, ``*D``.
        states: ``seeds -> (x0 [B, *D], cond)`` gives clean images to diffuse; where ``x0`` is None the states are those of the
            sampling trajectories from seeded noise, solved with the very evaluations made here.
        along: the denoiser whose trajectories those are, if not ``denoiser``.
        identity: what is calibrated, to tell moments in the folder from those of anything else.
        observe: called with the number of network states visited and a note.

    Raises:
        ModelError: the network cannot be differentiated, or gives numbers that are not finite (where).
        ArtifactError: the folder holds moments of another calibration, or cannot be written.
    """
    problem = _Problem(denoiser, along, tuple(shape), config.lam(denoiser.schedule), states, device or torch.device("cpu"))
    levels = len(problem.lam)
    whole = f"{identity} {problem.lam.tolist()} {config.identity}"
    store = None if folder is None else Store(folder, "moments", whole, Moments, work="calibration", again="calibrate")

    def fresh(seeds: range, count: int, method: str) -> Moments:
        return Moments.of(problem.batch(seeds, method, count * levels, observe), levels, shape)

    made = accumulate(config.batches, fresh, lambda: Moments(levels, shape), store, note=lambda: problem.method(config), verb="calibrate")
    if made is not None and observe is not None:
        observe(made[0].count * levels, "")
    return made


class _Problem:
    """Where the network is looked at."""

    def __init__(
        self, denoiser: Denoiser, along: Denoiser | None, shape: tuple[int, ...], lam: Tensor, states: States, device: torch.device
    ) -> None:
        self.denoiser, self.along, self.shape, self.lam, self.states, self.device = denoiser, along, shape, lam, states, device
        self.nodes = Nodes.at(denoiser.schedule, denoiser.schedule.t_of_lam(lam))
        self.tableau = tabulate(UniPC(3), self.nodes)

    def function(self, cond: Cond) -> Callable[[Tensor, Tensor], Tensor]:
        """``(X, lam) -> D``."""
        schedule = self.denoiser.schedule

        def clean(X: Tensor, lam: Tensor) -> Tensor:  # noqa: N803
            t = schedule.t_of_lam(lam)
            return self.denoiser(X * aligned(schedule.alpha(t), X), t, cond)

        return clean

    def method(self, config: CalibrationConfig) -> str:
        """How this network can be differentiated, tried in the middle of the range."""
        k, (seeds, *_) = len(self.lam) // 2, config.batches
        x0, cond, z, v = self.draw(seeds[:4])
        level = float(torch.exp(-self.lam[k]))
        point = ((torch.zeros_like(z) if x0 is None else x0) + level * z, self.lam[k])
        return choose_jvp(self.function(cond), point, (v, torch.zeros_like(self.lam[k])), level, config.jvp)

    def draw(self, seeds: Sequence[int]) -> tuple[Tensor | None, Cond, Tensor, Tensor]:
        """Clean images or None, conditions, noise and probes, the same at all levels."""
        x0, cond = self.states(seeds)
        z = seeded_noise(seeds, self.shape, stream=NOISE).to(self.device)
        v = torch.where(seeded_noise(seeds, self.shape, stream=PROBE) > 0, 1.0, -1.0).to(self.device)
        cond = cond.to(self.device) if isinstance(cond, Tensor) else cond
        return None if x0 is None else x0.to(self.device), cond, z, v

    def batch(self, seeds: Sequence[int], method: str, visited: int, observe: Callable[[int, str], None] | None) -> Iterator[Tensor]:
        """``X, D, D', v J v`` at one level after the other, each ``[4, B, *D]``."""
        x0, cond, z, v = self.draw(seeds)
        for k, values in enumerate(self.trajectories(cond, z, v, method) if x0 is None else self.diffusions(x0, cond, z, v, method)):
            if not bool(torch.isfinite(values).all()):
                if x0 is None and bool(torch.isfinite(values[1]).all()):  # only the slope: the next level's fault
                    k = min(k + 1, len(self.lam) - 1)
                raise ModelError(
                    f"the network or its derivative is not finite at noise level {torch.exp(-self.lam[k]):.4g}, t = {self.nodes.t[k]:g}, "
                    f"among the seeds {seeds[0]} to {seeds[-1]}: check its weights and dtype, or calibrate a smaller range of times"
                )
            if observe is not None:
                observe(visited + (k + 1) * len(seeds), f"noise level {torch.exp(-self.lam[k]):.3g}")
            yield values

    def diffusions(self, x0: Tensor, cond: Cond, z: Tensor, v: Tensor, method: str) -> Iterator[Tensor]:
        """At diffused images: ``D'`` is the derivative along the trajectory through each state."""
        derivative, function = JVP_METHODS[method], self.function(cond)
        one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for lam in self.lam:
            level = float(torch.exp(-lam))
            X = x0 + level * z
            D, Jv = derivative(function, (X, lam), (v, zero), level)
            _, dD = derivative(function, (X, lam), (D - X, one), level)
            yield torch.stack([X, D, dD, v * Jv])

    def trajectories(self, cond: Cond, z: Tensor, v: Tensor, method: str) -> Iterator[Tensor]:
        """At the states of sampling trajectories: ``D'`` is the difference of ``D`` at the levels around.

        Its sum over levels is what ``D`` really changes by, however rough the network is in time; point derivatives are
        aliased on any grid coarser than that.
        """
        derivative, function, zero = JVP_METHODS[method], self.function(cond), torch.zeros((), dtype=torch.float64)
        x = z * aligned(self.nodes.sigma[0], z)
        state, rows = self.tableau.start(x), self.tableau.rows(x)
        seen: list[Tensor] = []  # X, D, v J v of the last levels
        for k, lam in enumerate(self.lam):
            X = state.x / aligned(self.nodes.alpha[k], z)
            D, Jv = derivative(function, (X, lam), (v, zero), float(torch.exp(-lam)))
            seen = [*seen[-2:], torch.stack([X, D, v * Jv])]
            if k:
                yield self._with_slope(seen[-2], seen[-3 if k > 1 else -2], seen[-1])
            if k < len(rows):
                with torch.no_grad():
                    state = advance(rows[k], state, D if self.along is None else self.along(state.x, self.nodes.t[k], cond))
        yield self._with_slope(seen[-1], seen[-2], seen[-1])

    def _with_slope(self, here: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """``X, D, D', v J v`` from ``X, D, v J v`` here and at the levels around (at the ends: here and the one next to it)."""
        cells = 1 if here is before or here is after else 2
        return torch.stack([here[0], here[1], (after[1] - before[1]) / (cells * float(self.lam[1] - self.lam[0])), here[2]])
