r"""k-diffusion's calling convention (and ComfyUI's, which is the same): `sample_fewstep` stands where ``sample_dpmpp_2m`` did.

There a model is ``model(x, sigma [B], **extra_args) -> denoised`` and the state is ``x = x0 + sigma eps``. A sampler of this library may
be made for another noise law; both states are the same image with noise at the same ``lam``, scaled differently:

    x_theirs = c x,     c = 1/alpha  (law "eps", sigma in [0, inf)),     c = 1/(alpha + sigma)  (law "flow", sigma in [0, 1])

so a tableau runs in the space that it was made for, and the state is scaled before each call of the model and after the last step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond
from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule, RectifiedFlow, VarianceExploding
from fewstep.core.spacings import is_curve
from fewstep.core.statistics import ModelStatistics
from fewstep.core.tableau import Solver, Tableau, tabulate
from fewstep.runtime.errors import ArtifactError, GridError, ModelError, SolverError, look_up
from fewstep.sampling.brownian import NoisePath
from fewstep.sampling.loop import steps
from fewstep.sampling.sampler import Sampler
from fewstep.sampling.start import begin, level_of, spacing_from
from fewstep.solvers import make_solver, takes_statistics

__all__ = ["Callback", "Law", "NoiseSampler", "sample_fewstep", "sigmas_for"]

Law = Literal["eps", "flow"]
Callback = Callable[[dict[str, Any]], None]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]  # (sigma [], sigma_next []) -> standard normal [B, *D]

SLACK = 1e-4  # relative: hosts keep their levels in float32, some after a few operations


class _Bridge(NamedTuple):
    """A tableau with the noise law of its own states, and the scale that leads from them to the host's."""

    tableau: Tableau
    schedule: NoiseSchedule
    scale: Tensor  # [N+1] c
    sigma: Tensor  # [N+1] the host's
    begins: tuple[int, ...]  # [M] the evaluation with which each interval begins


def sample_fewstep(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor | Sequence[float] | None = None,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    *,
    solver: str | Solver = "unipc-2",
    statistics: ModelStatistics | str | Path | None = None,
    sampler: Sampler | str | Path | None = None,
    law: Law = "eps",
    seeds: Sequence[int] | Tensor | None = None,
    noise_sampler: NoiseSampler | None = None,
    path: NoisePath = "steps",
    labels: Tensor | None = None,
) -> Tensor:
    """Sample as k-diffusion's functions do, with any solver or saved sampler of this library; gradients flow through everything.

    The state is kept in at least float32; the model sees, and the answer has, the dtype of ``x``.

    Args:
        model: ``model(x [B, *D], sigma [B], **extra_args) -> denoised [B, *D]``.
        x: ``[B, *D]``, noise included: ``x0 + sigmas[0] eps``, or ``(1 - sigmas[0]) x0 + sigmas[0] eps`` under the law ``flow``.
        sigmas: ``[M+1]``, decreasing, the last usually 0: the ends of the intervals, in which a solver of several stages evaluates more
            than once. Fewer than two: nothing to do. With ``sampler`` they only have to start and end where it does, or are left out.
        extra_args: handed to the model.
        callback: called after every evaluation with ``x``, ``i`` (the interval, ``0 .. M-1``), ``sigma``, ``sigma_hat``, ``denoised``.
        disable: ``False`` shows a progress bar.
        solver: a name, options included (``"unipc-3:weights=bh1"``), or a `Solver`.
        statistics: of this model, for a solver that takes some; or their folder.
        sampler: a saved or fitted sampler, or its folder, in place of ``solver``.
        law: what the host's ``sigmas`` are: ``eps`` (k-diffusion) or ``flow`` (ComfyUI's flow models).
        seeds: one per sample, for solvers that add noise: the noise of `fewstep.sample`.
        noise_sampler: in place of seeds, k-diffusion's function ``(sigma [], sigma_next []) -> standard normal [B, *D]``.
        path: how seeds make noise: ``steps`` or ``brownian``, see `fewstep.steps`.
        labels: class labels ``[B]``, whole numbers, for a sampler that foresees its first answer by them; the model gets ``extra_args``.

    Returns:
        The samples ``[B, *D]`` at the last sigma, in the dtype of ``x``.

    Raises:
        GridError: ``sigmas`` that do not decrease (which), or that are not those of ``sampler``.
        SolverError: an unknown solver or option; one that adds noise with neither ``seeds`` nor ``noise_sampler``.
        ModelError: an answer of another shape or not finite (at which evaluation), or an ``x`` that has not the sampler's shape.
        ArtifactError: a folder that cannot be read, or statistics of samples of another shape.
    """
    levels = None if sigmas is None else torch.as_tensor(sigmas)
    if sampler is None and levels is not None and len(levels) < 2:
        return x
    bridge = _bridge_on(solver, statistics, levels, law, x) if sampler is None else _bridge_of(sampler, statistics, levels, law)
    first = bridge.tableau.first
    if first is not None:
        bridge = bridge._replace(tableau=replace(bridge.tableau, first=first.at(labels)))
    elif labels is not None:
        raise SolverError("labels are for a sampler that foresees its first answer: put the model's own into extra_args")
    noise = _noise_of(bridge, x, seeds, noise_sampler)
    report = _reporter(callback, bridge, x if levels is None else levels)
    denoiser = _HostDenoiser(model, bridge, x, report)
    with _progress(bridge.tableau.evaluations, shows=disable is False) as tick:
        end = start = x.to(denoiser.scale.dtype) / denoiser.scale[0]
        for step in steps(denoiser, bridge.tableau, start, extra_args or {}, seeds=seeds, noise=noise, path=path):
            end = step.x_next
            tick()
    return (denoiser.scale[-1] * end).to(x.dtype)


class _HostDenoiser:
    """A host's model as a `Denoiser` for one run of a tableau: called with scaled states and the host's sigma, in the dtype of ``like``."""

    def __init__(self, model: Callable[..., Tensor], bridge: _Bridge, like: Tensor, report: Callable[[int, Tensor, Tensor], None]) -> None:
        self.model, self.schedule, self.report = model, bridge.schedule, report
        self.evaluations = int(bridge.tableau.first is not None)  # which is not asked for
        self.scale = bridge.scale.to(torch.promote_types(like.dtype, torch.float32)).to(like.device)
        self.sigma = bridge.sigma.to(like.dtype).to(like.device)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        i, self.evaluations = self.evaluations, self.evaluations + 1  # by number: a solver may evaluate twice at one time
        seen = (self.scale[i] * x).to(self.sigma.dtype)
        denoised = self.model(seen, self.sigma[i] * seen.new_ones(len(seen)), **cond)
        if denoised.shape != seen.shape:  # before a callback draws it
            raise ModelError(f"the model answered shape {tuple(denoised.shape)} to a state of shape {tuple(seen.shape)}")
        self.report(i, seen, denoised)
        return denoised


def sigmas_for(
    source: Sampler | Path | TimeGrid | str,
    steps: int | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    *,
    schedule: NoiseSchedule | None = None,
    end: Literal["clean", "append", "sigma_min"] = "clean",
    law: Law = "eps",
    strength: float = 1.0,
) -> Tensor:
    """Return the ``sigmas [M+1]``, float32, for a host's sampling loop: those of a saved sampler, or of a spacing of this library.

    Args:
        source: a `Sampler` or the `Path` of its folder; the name of a spacing (``"karras:rho=5"``) of ``steps`` intervals; or a grid.
        steps: intervals, for a spacing.
        sigma_min, sigma_max: the model's range in the host's sigmas, where ``schedule`` does not say it.
        schedule: the noise law in whose time the spacing, or the grid, is. On a discrete one the levels are the model's own.
        end: of a spacing: ``clean`` moves the last level from ``sigma_min`` to 0, so that no evaluation is spent near it; ``append`` is
            k-diffusion's habit, ``sigma_min`` and then 0; ``sigma_min`` stops there. Levels with a name of another program end as there.
        law: what the host's sigmas are, as for `sample_fewstep`.
        strength: image to image: the share of noise to begin with, ``sigma / (alpha + sigma)``. All ``steps`` lie below that level; a grid
            is re-spread there. A sampler takes it by `Sampler.from_level`, since `sample_fewstep` needs the same one.

    Raises:
        GridError: an unknown spacing, a range or schedule that is missing, a strength at which no step can begin, or a start of pure noise,
            which the law ``eps`` cannot say.
        ArtifactError: a folder that cannot be read.

    Examples:
        >>> from fewstep.integrations.kdiffusion import sigmas_for
        >>> sigmas_for("karras", 3, 0.03, 14.6).tolist()[-1]
        0.0
    """
    level = level_of(strength)
    if isinstance(source, (Sampler, Path)):
        if level < math.inf:
            raise GridError(
                f"a sampler's numbers belong to its own levels: take sampler.from_level({level:.4g}), which starts at strength "
                f"{strength:g}, and pass it here and to sample_fewstep"
            )
        sampler = source if isinstance(source, Sampler) else Sampler.load(source)
        return _levels(sampler.schedule, sampler.grid.t, law)
    if isinstance(source, TimeGrid):
        if schedule is None:
            raise GridError("a grid alone does not say its noise levels: pass schedule=, the one that it was made for")
        return _levels(schedule, (source if level == math.inf else source.below(schedule, begin(schedule, level))).t, law)
    if steps is None or steps < 1 or end not in ("clean", "append", "sigma_min"):
        raise GridError(
            f"the spacing {source!r} needs at least 1 step and an end of clean, append or sigma_min; got {steps} and {end!r} (a sampler's "
            f"folder is given as a Path)"
        )
    if schedule is None:
        if sigma_min is None or sigma_max is None:
            raise GridError("a spacing needs the model's range: pass sigma_min and sigma_max, or schedule")
        schedule = look_up(law, SPACES, "law", GridError).schedule(t_min=float(sigma_min), t_max=float(sigma_max))
    inner = steps - (end == "append")
    start = begin(schedule, level)
    if is_curve(source):
        if end != "clean":
            raise GridError(
                f"the levels of {source!r} have an end of their own: leave end out, or say it in the name, as exponential:end=clean"
            )
        return _levels(schedule, spacing_from(source, schedule, steps, start).t, law)
    t = spacing_from(source, schedule, inner, start).t if inner else torch.tensor([start], dtype=torch.float64)
    sigma = _levels(schedule, t, law)
    if end == "sigma_min" or (end == "clean" and sigma[-1] == 0):
        return sigma
    return torch.cat([sigma if end == "append" else sigma[:-1], sigma.new_zeros(1)])


def _levels(schedule: NoiseSchedule, t: Tensor, law: str) -> Tensor:
    """Return the host's sigmas ``[*]``, float32, at the times ``t [*]`` of a schedule.

    Raises:
        GridError: an unknown law, or pure noise under the law ``eps``.
    """
    alpha, sigma = schedule.alpha(t.detach()), schedule.sigma(t.detach())
    levels = sigma * look_up(law, SPACES, "law", GridError).scale(alpha, sigma)
    if not bool(torch.isfinite(levels).all()):
        raise GridError("these levels start at pure noise (alpha = 0), for which the law eps has no finite sigma: use law flow")
    return levels.float()


# -- the two spaces -------------------------------------------------------------------------------------------------------------------


class _Space(NamedTuple):
    """A host's convention: its own noise law, whose time is its sigma, and ``c`` from the ``alpha`` and ``sigma`` of another law."""

    schedule: type[VarianceExploding] | type[RectifiedFlow]
    scale: Callable[[Tensor, Tensor], Tensor]


SPACES = {
    "eps": _Space(VarianceExploding, lambda alpha, sigma: 1 / alpha),
    "flow": _Space(RectifiedFlow, lambda alpha, sigma: 1 / (alpha + sigma)),
}


def _bridge(tableau: Tableau, schedule: NoiseSchedule, grid: TimeGrid, law: str) -> _Bridge:
    nodes = tableau.nodes
    scale = look_up(law, SPACES, "law", GridError).scale(nodes.alpha, nodes.sigma)
    if not bool(torch.isfinite(scale.detach()).all()):
        raise GridError("the sampler starts at pure noise (alpha = 0), for which the law eps has no finite sigma: use it with a flow model")
    return _Bridge(tableau, schedule, scale, nodes.sigma * scale, nodes.begins(grid.t))


def _bridge_of(source: Sampler | str | Path, statistics: ModelStatistics | str | Path | None, levels: Tensor | None, law: str) -> _Bridge:
    """Return the bridge of a sampler with its own numbers; the host's levels have to start and end where it does."""
    if statistics is not None:
        raise SolverError("a sampler has its statistics in its numbers: pass sampler= or statistics=, not both")
    sampler = source if isinstance(source, Sampler) else Sampler.load(source)
    sampler.check_unbounded("the host")
    bridge = _bridge(sampler.tableau, sampler.schedule, sampler.grid, law)
    if levels is not None:
        if len(levels) < 2:
            raise GridError(f"a sampler takes the sigmas of its start and its end, or none at all, got {levels.tolist()}")
        _check_ends(bridge.sigma, levels, "the sampler", "sigmas_for(sampler)")
    return bridge


def _bridge_on(
    solver: str | Solver, statistics: ModelStatistics | str | Path | None, levels: Tensor | None, law: str, x: Tensor
) -> _Bridge:
    """Return the bridge of a solver on the host's levels; with statistics in the space of their schedule, to whose time options refer."""
    if levels is None:
        raise GridError("say which sigmas to sample at; only a saved sampler has its own")
    levels = levels.cpu().double()
    host, grid = _on_levels(levels, law)
    own: NoiseSchedule = host
    if statistics is not None:
        solver = _with_statistics(solver, statistics, tuple(x.shape[1:]))
    solver = make_solver(solver) if isinstance(solver, str) else solver
    driving = getattr(solver, "statistics", None)
    if isinstance(driving, ModelStatistics):
        own = driving.schedule
        grid = TimeGrid(_times(levels, host, own))
    bridge = _bridge(tabulate(solver, solver.nodes(grid, own)), own, grid, law)
    _check_ends(bridge.sigma, levels, "with these options the solver", "integrals=exact, or levels of the statistics")
    return bridge


def _on_levels(levels: Tensor, law: str) -> tuple[VarianceExploding | RectifiedFlow, TimeGrid]:
    """Return the host's law on the range of these levels ``[M+1]``, and the grid through them.

    Raises:
        GridError: levels outside the law's range, or that do not decrease.
    """
    plain = levels.detach()
    if bool((plain < 0).any()) or (law == "flow" and bool((plain > 1).any())):
        raise GridError(f"sigmas lie between 0 and {'1' if law == 'flow' else 'infinity'} under the law {law}, got {plain.tolist()}")
    try:
        grid = TimeGrid(levels)
    except GridError as error:
        raise GridError(f"these sigmas cannot be sampled: {error}") from error
    return look_up(law, SPACES, "law", GridError).schedule(t_min=float(plain[-1]), t_max=float(plain[0])), grid


def _with_statistics(solver: str | Solver, source: ModelStatistics | str | Path, shape: tuple[int, ...]) -> Solver:
    if not isinstance(solver, str) or not takes_statistics(solver):
        raise SolverError(f"the solver {solver!r} takes no statistics: leave them out, or name one that does, as dpm-solver-v3")
    statistics = source if isinstance(source, ModelStatistics) else ModelStatistics.load(source)
    if statistics.shape != shape:
        raise ArtifactError(f"these statistics are for samples of shape {statistics.shape}, not {shape}: calibrate for these")
    return make_solver(solver, statistics=statistics)


def _times(levels: Tensor, host: NoiseSchedule, own: NoiseSchedule) -> Tensor:
    """Return the times of another law that have the host's ``lam``, ``[M+1]``. An end of infinite ``lam`` is fixed: its gradient is NaN."""
    lam = host.lam(levels.detach())
    fixed = torch.where(torch.isposinf(lam), own.t_clean, own.t_of_lam(lam))
    inner = own.t_of_lam(host.lam(torch.where(torch.isfinite(lam), levels, 0.5)))
    return torch.where(torch.isfinite(lam), inner, fixed)


# -- checks ---------------------------------------------------------------------------------------------------------------------------


def _check_ends(ours: Tensor, theirs: Tensor, what: str, use: str) -> None:
    for name, k in (("start", 0), ("end", -1)):
        one, two = float(ours[k].detach()), float(theirs[k].detach())
        if not abs(one - two) <= SLACK * max(one, two):
            raise GridError(f"{what} {name}s at sigma = {one:.6g}, but the sigmas given {name} at {two:.6g}: use {use}")


# -- noise, callbacks, progress --------------------------------------------------------------------------------------------------------


def _noise_of(
    bridge: _Bridge, x: Tensor, seeds: Sequence[int] | Tensor | None, noise_sampler: NoiseSampler | None
) -> Callable[[int], Tensor] | None:
    """Return the host's noise sampler by evaluation, ``i -> standard normal [B, *D]``; None where no noise is added or seeds give it.

    Raises:
        SolverError: neither or both of the two for a stochastic sampler, another number of seeds, or noise of another shape.
    """
    if not bridge.tableau.stochastic:
        return None
    if (seeds is None) == (noise_sampler is None):
        raise SolverError("this solver adds noise: pass seeds=, one for each sample, or noise_sampler=, and not both")
    if seeds is not None and len(seeds) != len(x):
        raise SolverError(f"{len(seeds)} seeds for {len(x)} samples: pass one for each")
    if noise_sampler is None:
        return None
    noisy, intervals, sigma = (bridge.tableau.noise.detach() != 0).tolist(), bridge.tableau.noise_intervals, bridge.sigma.detach()
    sigma = sigma.to(torch.promote_types(x.dtype, torch.float32)).to(x.device)

    def noise(i: int) -> Tensor:
        if not noisy[i]:
            return torch.zeros_like(x)
        first, last = intervals[i]
        drawn = noise_sampler(sigma[first], sigma[last])
        if drawn.shape != x.shape:
            raise SolverError(f"the noise sampler answered shape {tuple(drawn.shape)} for samples of shape {tuple(x.shape)}")
        return drawn

    return noise


def _reporter(callback: Callback | None, bridge: _Bridge, like: Tensor) -> Callable[[int, Tensor, Tensor], None]:
    """Return a function ``(i, x, denoised)`` that calls ``callback`` with k-diffusion's dictionary, its sigma in the dtype of ``like``."""
    if callback is None:
        return lambda i, x, denoised: None
    dtype = like.dtype if like.is_floating_point() else torch.float32
    sigma = bridge.sigma.to(dtype).to(like.device)

    def report(i: int, x: Tensor, denoised: Tensor) -> None:
        interval = bisect_right(bridge.begins, i) - 1
        callback({"x": x, "i": interval, "sigma": sigma[i], "sigma_hat": sigma[i], "denoised": denoised})

    return report


@contextmanager
def _progress(total: int, *, shows: bool) -> Iterator[Callable[[], None]]:
    """Show a progress bar on stderr, or none; the function it gives is called after each evaluation."""
    if not shows:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("sampling", total=total)
        yield lambda: bar.advance(task)
