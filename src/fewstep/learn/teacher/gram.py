r"""Second moments of a denoiser along teacher trajectories: all that the error of any schedule depends on, in one small matrix.

In ``z = x/alpha``, ``s = sigma/alpha`` the sampling ODE is ``dz/ds = (z - D)/s``, and its exact solution from level ``s_j`` to ``s_k`` is

    z_k = r z_j + (1 - r) Dbar_jk,      r = s_k/s_j,      Dbar_jk = the mean of D over 1/s in between.

The states at both ends give ``Dbar`` of every cell between neighbouring levels with no quadrature, and the mean over many cells
is a weighted mean of theirs. So the error of a step on the trajectory is a fixed linear combination of the ``K+1`` outputs ``D_k``
and the ``K`` cell means, and its mean square is ``c' G c`` with the averaged Gram matrix ``G`` of those ``2K+1`` pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.grid import TimeGrid
from fewstep.core.prediction import aligned
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes, tabulate
from fewstep.learn.teacher.jvp import JVP_METHODS, choose_jvp
from fewstep.models.problem import Problem
from fewstep.runtime.accumulate import Store, accumulate, seed_batches
from fewstep.runtime.errors import GridError, ModelError
from fewstep.runtime.front_door import at_least, check_fields, checked_class
from fewstep.runtime.job import Job
from fewstep.sampling.loop import steps
from fewstep.sampling.noise import seeded_noise
from fewstep.solvers import UniPC

__all__ = ["Gram", "GramConfig", "collect_gram", "fine_grid", "gram_store", "solve"]

FINITE = 7.0  # |lam| beyond which levels are not uniform any more: an end further out is one level by itself
PROBE = 1_000_002  # stream of the seeds


class Gram:
    """``E<u, v>/dim`` for the outputs ``D_0 .. D_K`` and the cell means ``Dbar_1 .. Dbar_K``, float64; additive over batches.

    Attributes:
        level: ``s_k = sigma/alpha``, ``[K+1]``, decreasing; the first may be infinite, the last zero.
        matrix: ``[2K+1, 2K+1]``.
        slopes: ``[K+1, 2]``, ``E<v, J v>/dim`` and ``E|J v|^2/dim`` of ``J = dD/dz`` for random signs ``v``; NaN if not measured.
        count: trajectories in it.
    """

    def __init__(self, level: Tensor, matrix: Tensor, slopes: Tensor, count: int) -> None:
        self.level, self.matrix, self.slopes, self.count = level, matrix, slopes, count

    @property
    def cells(self) -> int:
        """The number of cells ``K``."""
        return len(self.level) - 1

    @classmethod
    def empty(cls, level: Tensor) -> Gram:
        """Make a matrix of no data."""
        size = 2 * len(level) - 1
        return cls(level, torch.zeros(size, size, dtype=torch.float64), torch.zeros(len(level), 2, dtype=torch.float64), 0)

    @classmethod
    def of(cls, nodes: Nodes, x: Tensor, D: Tensor, slopes: Tensor | None = None) -> Gram:  # noqa: N803
        """Average over one batch of trajectories: states and denoiser outputs at the levels, each ``[K+1, B, *D]``."""
        level = torch.exp(-nodes.lam)
        x, D = x.detach().cpu().double(), D.detach().cpu().double()  # noqa: N806
        pictures = torch.cat([D, torch.stack(_cell_means(nodes, level, x))]).flatten(1)
        if slopes is None:
            slopes = torch.full((len(level), 2), torch.nan, dtype=torch.float64)
        return cls(level, pictures @ pictures.T / pictures.shape[1], slopes, x.shape[1])

    @classmethod
    def along(cls, nodes: Nodes, x: Tensor) -> Gram:
        """Average over one batch of trajectories from their states ``[K+1, B, *D]`` alone: outputs are the slopes of ``x/sigma`` in
        ``alpha/sigma`` of a parabola through neighbouring states, which the cell means are on average.
        """
        level = torch.exp(-nodes.lam)
        means = _cell_means(nodes, level, x.detach().cpu().double())
        width = torch.diff(1 / level)
        width = torch.where(torch.isfinite(width), width, 1e30)  # a last cell to the clean image
        inner = [torch.lerp(a, b, float(h / (h + g))) for a, b, h, g in zip(means, means[1:], width, width[1:], strict=False)]
        first = means[0] if len(means) < 2 else torch.lerp(means[0], means[1], -float(width[0] / (width[0] + width[1])))
        pictures = torch.stack([first, *inner, means[-1], *means]).flatten(1)
        slopes = torch.full((len(level), 2), torch.nan, dtype=torch.float64)
        return cls(level, pictures @ pictures.T / pictures.shape[1], slopes, x.shape[1])

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], count: int) -> Gram:
        """Rebuild a matrix from its `tensors`."""
        return cls(tensors["level"], tensors["matrix"], tensors["slopes"], count)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything except `count`, for serialisation."""
        return {"level": self.level, "matrix": self.matrix, "slopes": self.slopes}

    def merge(self, other: Gram) -> None:
        """Merge the trajectories of another matrix.

        Raises:
            GridError: it has other levels.
        """
        if not torch.equal(self.level, other.level):
            raise GridError(f"two Gram matrices with different levels ({self.cells + 1} and {other.cells + 1}) cannot be merged")
        if not other.count:
            return
        share = other.count / (self.count + other.count)
        self.matrix = self.matrix.lerp(other.matrix, share)
        self.slopes = self.slopes.lerp(other.slopes, share) if self.count else other.slopes
        self.count += other.count

    # -- what follows from it ---------------------------------------------------------------------------------------

    @property
    def D(self) -> Tensor:  # noqa: N802
        """The inner products ``<D_j, D_k>``, ``[K+1, K+1]``."""
        return self.matrix[: self.cells + 1, : self.cells + 1]

    def shares(self) -> Tensor:
        """Return the share of each cell in ``Dbar_jk``, ``[K+1, K+1, K]``; zero unless ``j < k``."""
        s, K = self.level, self.cells  # noqa: N806
        j, k, m = torch.arange(K + 1)[:, None, None], torch.arange(K + 1)[None, :, None], torch.arange(1, K + 1)
        upper = torch.where(m == k, 1.0, s[k] / s[m])
        share = (upper - s[k] / s[m - 1]) / (1 - s[k] / s[j])
        return torch.where((j < m) & (m <= k), share, 0.0)

    def ratio(self) -> Tensor:
        """Return ``r_jk = s_k/s_j``, ``[K+1, K+1]``; 1 unless ``j < k``."""
        r = self.level[None, :] / self.level[:, None]
        return torch.where(torch.ones_like(r).triu(1) > 0, r, 1.0)


def _cell_means(nodes: Nodes, level: Tensor, x: Tensor) -> list[Tensor]:
    """Return the mean of the denoiser over ``1/s`` in each cell, from the states ``[K+1, B, *D]`` at its ends."""
    cells = []
    for k in range(1, len(level)):
        r = level[k] / level[k - 1]
        cells.append((x[k] / nodes.alpha[k] - level[k] * x[k - 1] / nodes.sigma[k - 1]) / (1 - r))
    return cells


@checked_class
@dataclass(frozen=True)
class GramConfig:
    """How to average a Gram matrix.

    Args:
        levels: number of cells between the noise levels.
        num: number of trajectories.
        batch: number of trajectories solved at a time.
        seed: seed of the first trajectory; by default far from the seeds of benchmarks, so that the noises are fresh.
        jacobian: also measure how strongly the denoiser reacts to its state (five times the work).

    Raises:
        FewstepError: fewer than 4 levels, 1 trajectory, a batch of 1; a negative seed.
    """

    levels: int = 128
    num: int = 256
    batch: int = 64
    seed: int = 2_000_000
    jacobian: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, levels=4, num=1, batch=1, seed=0)

    @property
    def batches(self) -> list[range]:
        """The seeds of each batch."""
        return seed_batches(self.seed, self.num, self.batch)

    @property
    def identity(self) -> str:
        """The options that the matrix depends on; more trajectories may be added later, if the last batch is whole."""
        whole = self.num if self.num % self.batch else "any"
        return f"levels {self.levels} batch {self.batch} seed {self.seed} jacobian {self.jacobian} num {whole}"


def fine_grid(schedule: NoiseSchedule, levels: int) -> TimeGrid:
    """Return ``levels + 1`` times uniform in ``lam`` from ``t_max`` to ``t_min``.

    For a discrete model they are rounded to its own times, so there are fewer at the clean end.
    """
    ends = schedule.ends
    known = torch.tensor([schedule.t_max, schedule.t_last], dtype=torch.float64)
    outer = schedule.lam(known)
    first, last = outer.clamp(-FINITE, FINITE).tolist()
    lam = torch.linspace(first, last, levels + 1, dtype=torch.float64)
    gap = float(lam[1] - lam[0]) / 2
    t = schedule.t_of_lam(lam[(lam > outer[0] + gap) & (lam < outer[1] - gap)])
    if schedule.times is not None:
        times = schedule.times.double()
        t = times[(times[:, None] - t).abs().argmin(0)].unique().flip(0)
        t = t[(t < ends[0]) & (t > ends[1])]
        if schedule.t_min < schedule.t_last:
            t = torch.cat([t, known[1:]]).unique().flip(0)
    return TimeGrid(torch.cat([ends[:1], t, ends[1:]]))


def collect_gram(problem: Problem, config: GramConfig, job: Job | None = None) -> Gram:
    """Average the Gram matrix of a model along its own trajectories, solved by UniPC-3 with the very evaluations that it averages.

    Memory does not grow with ``num``. With a ``job`` it is stored in its folder (``gram-*.safetensors``): a killed pass continues, a
    finished one can be given more trajectories, and the processes of ``torchrun`` share the work.

    Args:
        problem: the model and its guidance.
        config: how many trajectories, at how many levels.
        job: where the matrix is stored; its ``on_progress`` gets the number of trajectories done and a note.

    Raises:
        ModelError: the network's output is not finite (where).
        ArtifactError: the folder holds the matrix of another model or configuration, is damaged or cannot be written.
    """
    nodes = Nodes.at(problem.schedule, fine_grid(problem.schedule, config.levels).t)
    level, on_progress = torch.exp(-nodes.lam), _quiet if job is None else job.on_progress

    def fresh(seeds: range, count: int, method: str) -> Gram:
        probe = _signs(problem, seeds)
        made = _along(problem.teacher, nodes, problem.start(seeds, nodes), problem.cond(seeds), probe, method)
        on_progress(count + len(seeds), f"{len(level)} levels")
        return made

    def note() -> str:
        return _method(problem, nodes) if config.jacobian else "none"

    store = None if job is None or job.in_memory else gram_store(problem, config, job.folder)
    made, _ = accumulate(config.batches, fresh, lambda: Gram.empty(level), store, note=note, verb="make a Gram matrix")
    on_progress(made.count, "")
    return made


def gram_store(problem: Problem, config: GramConfig, folder: Path) -> Store[Gram]:
    """Return the store of a Gram matrix in a folder."""
    empty = Gram.empty(torch.exp(-Nodes.at(problem.schedule, fine_grid(problem.schedule, config.levels).t).lam))
    return Store(folder, "gram", f"{problem.identity} {config.identity}", empty, work="Gram matrix", again="run the command")


def _quiet(done: int, note: str) -> None:
    """Show nothing."""


def _signs(problem: Problem, seeds: Sequence[int]) -> Tensor:
    """Return random signs ``[B, *D]``, by seed."""
    return torch.where(seeded_noise(seeds, problem.shape, stream=PROBE) > 0, 1.0, -1.0).to(problem.device)


def _along(denoiser: Denoiser, nodes: Nodes, x: Tensor, cond: Cond, probe: Tensor, method: str) -> Gram:
    """Solve one batch, evaluate at the last level too, and average."""
    states, outputs, slopes = [], [], []
    function = _at(denoiser, cond)

    def check(value: Tensor, what: str, k: int) -> None:
        if not bool(torch.isfinite(value).all()):
            level = float(torch.exp(-nodes.lam[k]))
            raise ModelError(f"the network{what} is not finite at noise level {level:.4g}, t = {nodes.t[k]:g}: check its weights and dtype")

    for k, (state, D) in enumerate(solve(denoiser, nodes, x, cond)):  # noqa: N806
        check(D, "", k)
        states.append(state)
        outputs.append(D)
        if method != "none":
            direction = aligned(nodes.alpha[k], state) * probe  # of x, which is the probe's of z = x/alpha; z itself may be infinite
            _, Jv = JVP_METHODS[method](function, (state, nodes.t[k]), (direction, torch.zeros_like(nodes.t[k])), float(nodes.sigma[k]))  # noqa: N806
            check(Jv, "'s derivative", k)
            slopes.append(torch.stack([(probe * Jv).mean(), Jv.square().mean()]).double().cpu())
    return Gram.of(nodes, torch.stack(states), torch.stack(outputs), torch.stack(slopes) if slopes else None)


@torch.no_grad()
def solve(denoiser: Denoiser, nodes: Nodes, x: Tensor, cond: Cond) -> Iterator[tuple[Tensor, Tensor]]:
    """Solve the trajectory from ``x [B, *D]`` by UniPC-3 and yield, at each node, the (corrected) state and the denoiser's answer."""
    end = x
    for step in steps(denoiser, tabulate(UniPC(3), nodes), x, cond):
        assert step.state.anchor is not None  # UniPC steps from the corrected state
        yield step.state.anchor, step.x0
        end = step.x_next
    yield end, denoiser(end, nodes.t[-1], cond)


def _at(denoiser: Denoiser, cond: Cond) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the denoiser as a function ``(x, t) -> D``."""
    return lambda x, t: denoiser(x, t, cond)


def _method(problem: Problem, nodes: Nodes) -> str:
    """Choose how to differentiate this network, by trials in the middle of the range of noise levels."""
    k, seeds = nodes.evaluations // 2, [0, 1]
    sigma, z = float(nodes.sigma[k]), seeded_noise(seeds, problem.shape).to(problem.device)
    function, point = _at(problem.teacher, problem.cond(seeds)), (sigma * z, nodes.t[k])
    return choose_jvp(function, point, (z.sign(), torch.zeros_like(nodes.t[k])), sigma, "auto")
