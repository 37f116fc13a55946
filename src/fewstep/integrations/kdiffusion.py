r"""k-diffusion's calling convention (and ComfyUI's, which is the same): `sample_fewstep` stands where ``sample_dpmpp_2m`` did.

There a model is ``model(x, sigma [B], **extra_args) -> denoised`` and the state is ``x = x0 + sigma eps``. A sampler of this library may
be made for another noise law; both states are the same image with noise at the same ``lam``, scaled differently:

    x_theirs = c x,     c = 1/alpha  (law "eps", sigma in [0, inf)),     c = 1/(alpha + sigma)  (law "flow", sigma in [0, 1])

so a tableau runs in the space that it was made for, and the state is scaled before each call of the model and after the last step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid, make_grid
from fewstep.core.schedule import NoiseSchedule, RectifiedFlow, VarianceExploding
from fewstep.core.statistics import ModelStatistics
from fewstep.core.tableau import Solver, Tableau, advance, tabulate
from fewstep.runtime.errors import ArtifactError, GridError, ModelError, SolverError, look_up
from fewstep.sampling.loop import FiniteCheck
from fewstep.sampling.noise import seeded_noise
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import make_solver, takes_statistics

__all__ = ["Callback", "Law", "NoiseSampler", "sample_fewstep", "sigmas_for"]

Law = Literal["eps", "flow"]
Callback = Callable[[dict[str, Any]], None]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]  # (sigma [], sigma_next []) -> standard normal [B, *D]

SLACK = 1e-4  # relative: hosts keep their levels in float32, some after a few operations


class _Bridge(NamedTuple):
    """A tableau and what the host has to be told: at each evaluation and at the end."""

    tableau: Tableau
    scale: Tensor  # [N+1] c
    sigma: Tensor  # [N+1] the host's
    intervals: int  # M

    @property
    def stages(self) -> int:
        """Evaluations per interval; a last one to ``sigma = 0`` may have a single one."""
        evaluations = self.tableau.nodes.evaluations
        clean = self.intervals > 1 and bool(self.sigma[-1] == 0)
        return (evaluations - 1) // (self.intervals - 1) if clean else evaluations // self.intervals


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
        noise_sampler: the same as k-diffusion has it, ``(sigma, sigma_next) -> [B, *D]``.

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
    _check_shape(bridge.tableau, x)
    noise = _noise_of(bridge, x, seeds, noise_sampler)
    tell = _teller(callback, bridge, x if levels is None else levels)
    with _progress(bridge.tableau.nodes.evaluations, shows=disable is False) as tick:
        return _run(partial(model, **(extra_args or {})), x, bridge, noise, lambda *seen: (tell(*seen), tick()))


def _run(
    model: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    bridge: _Bridge,
    noise: Callable[[int], Tensor | None],
    observe: Callable[[int, Tensor, Tensor], Any],
) -> Tensor:
    wide = _wide(x)
    scale, sigma = bridge.scale.to(wide).to(x.device), bridge.sigma.to(x.dtype).to(x.device)
    state = bridge.tableau.start(x.to(wide) / scale[0])
    ones, finite = x.new_ones(len(x)), FiniteCheck()
    for i, row in enumerate(bridge.tableau.rows(state.x)):
        seen = (scale[i] * state.x).to(x.dtype)
        denoised = model(seen, sigma[i] * ones)
        if denoised.shape != x.shape:
            raise ModelError(f"the model answered shape {tuple(denoised.shape)} to a state of shape {tuple(x.shape)}")
        finite.note(denoised)
        observe(i, seen, denoised)
        state = advance(row, state, denoised.to(wide), noise(i))
    finite.done(lambda i: f"sigma = {float(bridge.sigma[i]):g}")
    return (scale[-1] * state.x).to(x.dtype)


def sigmas_for(
    source: Sampler | Path | TimeGrid | str,
    steps: int | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    *,
    schedule: NoiseSchedule | None = None,
    end: Literal["clean", "append", "sigma_min"] = "clean",
    law: Law = "eps",
) -> Tensor:
    """The ``sigmas [M+1]``, float32, that a host wants: those of a saved sampler, or of a spacing of this library.

    Args:
        source: a `Sampler` or the `Path` of its folder; the name of a spacing (``"karras:rho=5"``) of ``steps`` intervals; or a grid.
        steps: intervals, for a spacing.
        sigma_min, sigma_max: the model's range in the host's sigmas, where ``schedule`` does not say it.
        schedule: the noise law in whose time the spacing, or the grid, is. On a discrete one the levels are the model's own.
        end: of a spacing: ``clean`` moves the last level from ``sigma_min`` to 0, so that no evaluation is spent near it; ``append`` is
            k-diffusion's habit, ``sigma_min`` and then 0; ``sigma_min`` stops there.
        law: what the host's sigmas are, as for `sample_fewstep`.

    Raises:
        GridError: an unknown spacing, a range or schedule that is missing, or a start of pure noise, which the law ``eps`` cannot say.
        ArtifactError: a folder that cannot be read.

    Example:
        >>> sigmas_for("karras", 3, 0.03, 14.6).tolist()[-1]
        0.0
    """
    if isinstance(source, (Sampler, Path)):
        sampler = source if isinstance(source, Sampler) else Sampler.load(source)
        return _levels(sampler.schedule, sampler.grid.t, law)
    if isinstance(source, TimeGrid):
        if schedule is None:
            raise GridError("a grid alone does not say its noise levels: pass schedule=, the one that it was made for")
        return _levels(schedule, source.t, law)
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
    t = make_grid(source, schedule, inner).t if inner else torch.tensor([schedule.t_max], dtype=torch.float64)
    sigma = _levels(schedule, t, law)
    if end == "sigma_min" or (end == "clean" and sigma[-1] == 0):
        return sigma
    return torch.cat([sigma if end == "append" else sigma[:-1], sigma.new_zeros(1)])


def _levels(schedule: NoiseSchedule, t: Tensor, law: str) -> Tensor:
    """The host's sigmas ``[*]``, float32, at the times ``t [*]`` of a schedule."""
    alpha, sigma = schedule.alpha(t.detach()), schedule.sigma(t.detach())
    levels = sigma * look_up(law, SPACES, "law", GridError).scale(alpha, sigma)
    if not bool(torch.isfinite(levels).all()):
        raise GridError("these levels start at pure noise (alpha = 0), for which the law eps has no finite sigma: use law flow")
    return levels.float()


# -- the two spaces -------------------------------------------------------------------------------------------------------------------


class _Space(NamedTuple):
    """The host's own law, whose time is its sigma, and ``c`` from ``alpha`` and ``sigma`` of any other."""

    schedule: type[VarianceExploding] | type[RectifiedFlow]
    scale: Callable[[Tensor, Tensor], Tensor]


SPACES = {
    "eps": _Space(VarianceExploding, lambda alpha, sigma: 1 / alpha),
    "flow": _Space(RectifiedFlow, lambda alpha, sigma: 1 / (alpha + sigma)),
}


def _bridge(tableau: Tableau, intervals: int, law: str) -> _Bridge:
    nodes = tableau.nodes
    scale = look_up(law, SPACES, "law", GridError).scale(nodes.alpha, nodes.sigma)
    if not bool(torch.isfinite(scale.detach()).all()):
        raise GridError("the sampler starts at pure noise (alpha = 0), for which the law eps has no finite sigma: use it with a flow model")
    return _Bridge(tableau, scale, nodes.sigma * scale, intervals)


def _bridge_of(source: Sampler | str | Path, statistics: ModelStatistics | str | Path | None, levels: Tensor | None, law: str) -> _Bridge:
    """A sampler as it is, on the host's levels only if these are its own."""
    if statistics is not None:
        raise SolverError("a sampler has its statistics in its numbers: pass sampler= or statistics=, not both")
    sampler = source if isinstance(source, Sampler) else Sampler.load(source)
    bridge = _bridge(sampler.tableau, sampler.grid.steps, law)
    if levels is not None:
        if len(levels) < 2:
            raise GridError(f"a sampler takes the sigmas of its start and its end, or none at all, got {levels.tolist()}")
        _check_ends(bridge.sigma, levels, "the sampler", "sigmas_for(sampler)")
    return bridge


def _bridge_on(
    solver: str | Solver, statistics: ModelStatistics | str | Path | None, levels: Tensor | None, law: str, x: Tensor
) -> _Bridge:
    """A solver on the host's levels; with statistics in the space of their own schedule, whose time its options may speak of."""
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
    bridge = _bridge(tabulate(solver, solver.nodes(grid, own)), grid.steps, law)
    _check_ends(bridge.sigma, levels, "with these options the solver", "integrals=exact, or levels of the statistics")
    return bridge


def _on_levels(levels: Tensor, law: str) -> tuple[VarianceExploding | RectifiedFlow, TimeGrid]:
    """The host's law on the range of these levels ``[M+1]``, and the grid through them."""
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
    """The times of another law with the host's ``lam``. An end whose ``lam`` is infinite is fixed: a gradient there would be NaN."""
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


def _check_shape(tableau: Tableau, x: Tensor) -> None:
    element = torch.broadcast_shapes(tableau.record.shape[2:], tableau.update.shape[3:], tableau.bias.shape[2:])
    shape = tuple(x.shape[1:])
    fits = len(element) <= len(shape) and all(e in (1, d) for e, d in zip(reversed(element), reversed(shape), strict=False))
    if not fits:
        raise ModelError(f"this sampler has numbers for samples of shape {tuple(element)}, which {shape} is not: fit one for this model")


# -- noise, callbacks, progress --------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _noise_of(
    bridge: _Bridge, x: Tensor, seeds: Sequence[int] | Tensor | None, noise_sampler: NoiseSampler | None
) -> Callable[[int], Tensor | None]:
    """Standard normal noise for evaluation ``i``, or ``None`` of an ODE solver."""
    if not bridge.tableau.stochastic:
        return lambda i: None
    if (seeds is None) == (noise_sampler is None):
        raise SolverError("this solver adds noise: pass seeds=, one for each sample, or noise_sampler=, and not both")
    if seeds is not None and len(seeds) != len(x):
        raise SolverError(f"{len(seeds)} seeds for {len(x)} samples: pass one for each")
    noisy, wide = (bridge.tableau.noise.detach() != 0).tolist(), _wide(x)
    sigma = bridge.sigma.detach().to(wide).to(x.device)

    def noise(i: int) -> Tensor:
        if not noisy[i]:
            return torch.zeros_like(x, dtype=wide)
        if noise_sampler is None:
            return seeded_noise(() if seeds is None else seeds, x.shape[1:], stream=i + 1).to(wide).to(x.device)
        drawn = noise_sampler(sigma[i], sigma[i + 1])
        if drawn.shape != x.shape:
            raise SolverError(f"the noise sampler answered shape {tuple(drawn.shape)} for samples of shape {tuple(x.shape)}")
        return drawn.to(x.device).to(wide)

    return noise


def _teller(callback: Callback | None, bridge: _Bridge, like: Tensor) -> Callable[[int, Tensor, Tensor], None]:
    """k-diffusion's dictionary to ``callback``, its sigma in the dtype and on the device of the tensor ``like``."""
    if callback is None:
        return lambda i, x, denoised: None
    dtype = like.dtype if like.is_floating_point() else torch.float32
    sigma = bridge.sigma.to(dtype).to(like.device)

    def tell(i: int, x: Tensor, denoised: Tensor) -> None:
        interval = min(i // bridge.stages, bridge.intervals - 1)
        callback({"x": x, "i": interval, "sigma": sigma[i], "sigma_hat": sigma[i], "denoised": denoised})

    return tell


@contextmanager
def _progress(total: int, *, shows: bool) -> Iterator[Callable[[], None]]:
    """A bar on stderr where one is wanted; ``tick()`` after each evaluation."""
    if not shows:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("sampling", total=total)
        yield lambda: bar.advance(task)
