"""Will it pay to sample in parallel on this device, and with which window? From the time of one call at each batch."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.tableau import Tableau
from fewstep.models.analytic import MixtureDenoiser
from fewstep.runtime.errors import ModelError
from fewstep.sampling.noise import start_noise
from fewstep.sampling.parallel import ParallelConfig, evaluated, opened, rounds
from fewstep.sampling.sampler import Sampler

__all__ = ["ParallelPlan", "plan_parallel"]

NUMBERS = 256  # of a state of the stand-in
PICTURES, SPREAD, SIZE = 10, 0.3, 0.8  # its Gaussians: how many, their standard deviation, and that of their means
SMOOTHER = 0.4  # tolerance at which it takes the rounds that a network takes at 1: a mixture is smoother
SAMPLES = 2  # of the stand-in, at most: rounds hardly depend on the batch
REPEATED = 3  # calls that are timed at each width, of which the fastest counts


@dataclass(frozen=True)
class ParallelPlan:
    """The time that sampling takes in sequence and in parallel, predicted.

    Attributes:
        window: of the configuration.
        rounds: calls that it will take, about, by window.
        evaluations: evaluations of each sample, about, by window.
        seconds: of the whole, about, by window.
        sequential: seconds of the sequential sampler.
    """

    window: int
    rounds: dict[int, int]
    evaluations: dict[int, int]
    seconds: dict[int, float]
    sequential: float

    @property
    def best(self) -> int:
        """The window that takes least time."""
        return min(self.seconds, key=self.seconds.__getitem__)

    @property
    def gain(self) -> float:
        """How many times faster than in sequence, with the window of the configuration."""
        return self.sequential / self.seconds[self.window]

    def __str__(self) -> str:
        said = f"about {self.rounds[self.window]} rounds, {self.seconds[self.window]:.2g} s; in sequence {self.sequential:.2g} s"
        if self.sequential <= min(self.seconds.values()):
            return f"{said}: it does not pay on this device, whose call takes as much longer as its batch is larger"
        if self.best == self.window:
            return f"{said}: {self.gain:.1f} times faster"
        return f"{said}; best with a window of {self.best}: {self.sequential / self.seconds[self.best]:.1f} times faster"


@torch.no_grad()
def plan_parallel(
    denoiser: Denoiser, sampler: Sampler | Tableau, x: Tensor, cond: Cond = None, config: ParallelConfig | None = None
) -> ParallelPlan:
    """Predict the time of `sample_in_parallel` on this device: time a call at widths of 1 to the window, and count rounds on a stand-in.

    The stand-in is a mixture of ten Gaussians under the model's noise law, which costs nothing and whose rounds are those of image models
    to a tenth or two.

    Args:
        denoiser: the model.
        sampler: the sampler.
        x: the start ``[B, *D]``, which is what is timed.
        cond: the condition of the batch.
        config: the window, which is the largest that is tried; the tolerance and the memory.

    Raises:
        ModelError, SolverError: as `sample_in_parallel`.
    """
    config = ParallelConfig() if config is None else config
    tableau, _ = opened(denoiser, sampler, x, range(len(x)))
    if not len(x):
        raise ModelError("there are no samples to plan for: x is empty")
    count = tableau.nodes.evaluations
    widest = min(config.window, count)
    windows = sorted({config.window, *(2**k for k in range(1, 12) if 2**k < config.window)})
    timed = {
        width: _seconds(denoiser, x, tableau.nodes.t[:width], cond) for width in sorted({1, widest, *(w for w in windows if w < widest)})
    }
    stages, evaluations, seconds = dict[int, int](), dict[int, int](), dict[int, float]()
    for window in windows:
        widths = _widths(tableau, denoiser, len(x), replace(config, window=window))
        stages[window], evaluations[window] = len(widths), sum(widths)
        seconds[window] = sum(_between(timed, width) for width in widths)
    return ParallelPlan(config.window, stages, evaluations, seconds, count * timed[1])


def _seconds(denoiser: Denoiser, x: Tensor, t: Tensor, cond: Cond) -> float:
    """Return the seconds of one call at as many states of each sample as there are times."""
    states, taken = x.expand(len(t), *x.shape), list[float]()
    for _ in range(1 + REPEATED):  # the first one warms up
        begin = time.perf_counter()
        float(evaluated(denoiser, states, t, cond).sum())  # read: a device computes behind our back
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])


def _widths(tableau: Tableau, denoiser: Denoiser, batch: int, config: ParallelConfig) -> list[int]:
    """Return the width of each round that the sampler takes on the stand-in."""
    shape, samples = tableau.element or (NUMBERS,), range(min(batch, SAMPLES))
    generator = torch.Generator().manual_seed(0)
    means = SIZE * torch.randn(PICTURES, *shape, generator=generator)
    stand_in = MixtureDenoiser(denoiser.schedule, means, torch.full((PICTURES,), SPREAD))
    x, config = start_noise(tableau.nodes, samples, shape), replace(config, tol=SMOOTHER * config.tol)
    return [made.last - made.first for made in rounds(stand_in, tableau, x, seeds=samples, config=config)]


def _between(timed: dict[int, float], width: int) -> float:
    """Return the seconds at a width between two that were timed, linearly."""
    above = min(known for known in timed if known >= width)
    below = max(known for known in timed if known <= width)
    if above == below:
        return timed[width]
    return timed[below] + (timed[above] - timed[below]) * (width - below) / (above - below)
