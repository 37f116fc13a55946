"""The grids by name: the spacings of this library, and the noise levels that other programs call by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from inspect import signature
from typing import Any

from fewstep.core.curves import CURVES
from fewstep.core.flow_shifts import SHIFTS
from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule
from fewstep.runtime.errors import GridError, look_up
from fewstep.runtime.front_door import checked, number
from fewstep.runtime.spec import check_options, merged, parse_spec

__all__ = ["ALIASES", "GRIDS", "KNOWN", "REFUSED", "check_grid_name", "is_curve", "make_grid", "standard_grids"]

# The spacings of this library, which searches and benchmarks compare with each other.
GRIDS: dict[str, Callable[..., TimeGrid]] = {
    name: getattr(TimeGrid, name) for name in ("angle", "karras", "leading", "linspace", "logsnr", "quadratic", "trailing", "uniform")
}

KNOWN: dict[str, Callable[..., TimeGrid]] = {**GRIDS, **CURVES, **SHIFTS}  # every name, without those of `ALIASES`

LTX_TOKENS = "base_image_seq_len=1024:max_image_seq_len=4096:image_seq_len=4096"
ALIASES: dict[str, str] = {  # their name -> ours, with the option that makes the meaning theirs
    # A1111's menu
    "Align Your Steps": "align_your_steps:end=append",
    "Beta": "beta:over=sigmas",
    "DDIM": "ddim_uniform",
    "Exponential": "exponential",
    "KL Optimal": "kl_optimal:end=sigma_min",
    "Normal": "normal",
    "Polyexponential": "polyexponential",
    "SGM Uniform": "sgm_uniform",
    "SGMUniform": "sgm_uniform",
    "Simple": "simple",
    "Uniform": "normal",
    # ComfyUI's nodes, and RES4LYF's entry of its menu
    "AlignYourStepsScheduler": "align_your_steps:table=times",
    "BetaSamplingScheduler": "beta",
    "ExponentialScheduler": "exponential",
    "KarrasScheduler": "Karras",
    "LTXVScheduler": f"dynamic_shift:base_shift=0.95:max_shift=2.05:{LTX_TOKENS}:shift_terminal=0.1",
    "LaplaceScheduler": "laplace",
    "PolyexponentialScheduler": "polyexponential",
    "VPScheduler": "vp",
    "beta57": "beta:alpha=0.5:beta=0.7",
    # k-diffusion's functions
    "get_sigmas_exponential": "exponential",
    "get_sigmas_karras": "Karras",
    "get_sigmas_laplace": "laplace",
    "get_sigmas_polyexponential": "polyexponential",
    "get_sigmas_vp": "vp",
    # diffusers' options, and its AysSchedules
    "StableDiffusionSigmas": "align_your_steps",
    "StableDiffusionTimesteps": "align_your_steps:table=times",
    "StableDiffusionVideoSigmas": "align_your_steps:model=SVD",
    "StableDiffusionXLSigmas": "align_your_steps:model=SDXL",
    "StableDiffusionXLTimesteps": "align_your_steps:model=SDXL:table=times",
    "use_beta_sigmas": "beta:over=sigmas",
    "use_dynamic_shifting": "dynamic_shift",
    "use_exponential_sigmas": "exponential",
    "use_karras_sigmas": "Karras",
    "use_lu_lambdas": "exponential",
}

TABLE = (
    "its levels are tables that others computed for {}, which are not this library's to copy: find those of your own model by "
    "fewstep.optimize or 'fewstep optimize', or pass the levels, as TimeGrid.from_sigmas(schedule, sigmas)"
)
REFUSED: dict[str, str] = {  # their name -> why there is no grid of it here
    "GITSScheduler": TABLE.format("Stable Diffusion (GITS, arXiv 2405.11326)"),
    "OptimalStepsScheduler": TABLE.format("FLUX, Wan and Chroma"),
    "Automatic": (
        "it is a choice by sampler: 'Karras' of DPM++ 2M, DPM++ SDE, DPM++ 2S a, DPM2, DPM2 a and Restart, 'Exponential' of DPM++ 2M SDE, "
        "its Heun and DPM++ 3M SDE, and 'Uniform' of all others"
    ),
    "SDTurboScheduler": "it has the first of the times 999, 899, ..., 99: pass them as TimeGrid([999, 899, schedule.t_clean])",
    "Turbo": "it is 'trailing' with its end at the clean image: make_grid('trailing', schedule, steps).to_clean(schedule)",
    "Flux2Scheduler": "its shift depends on the number of steps, too: name the one that it comes to, as in 'dynamic_shift:mu=2.2'",
}


@checked
def make_grid(name: str, schedule: NoiseSchedule, steps: int, **options: Any) -> TimeGrid:  # noqa: ANN401 - the spacing's own options
    """Make a grid by the name of its spacing, with options (``karras:rho=5``).

    The names are those of this library (`GRIDS`) and those of A1111, ComfyUI, k-diffusion and diffusers (`fewstep.core.curves`), which
    have the meaning that they have there, their own end included.

    On a discrete schedule a spacing of this library is snapped to the model's own times; levels of other programs are met exactly. Where
    such a schedule ends at the clean image, a spacing of this library is that to its last time, and the last step is prolonged.

    Args:
        name: one of ``angle``, ``karras``, ``logsnr``, ``uniform``, ``quadratic``, and for discrete times ``linspace``, ``leading`` and
            ``trailing``; or a name of another program, as ``exponential``, ``sgm_uniform``, ``beta`` or ``Align Your Steps``.
        schedule: the noise law in whose time it is laid out.
        steps: number of intervals ``M``.
        options: options of the spacing. ``t_max`` and ``t_min`` are its ends, by default the schedule's. ``snap`` says whether its times
            are moved to the nearest that the network knows.

    Examples:
        >>> import fewstep
        >>> grid = fewstep.make_grid("exponential", fewstep.VarianceExploding(0.1, 10), 4)
        >>> [round(float(sigma), 3) for sigma in grid.t]
        [10.0, 2.154, 0.464, 0.1, 0.0]

    Raises:
        GridError: an unknown name or option, a law that the spacing is not for, or times that coincide.
    """
    bare, written = _parsed(name)
    options = merged(name, written, options, GridError)
    if not isinstance(schedule, NoiseSchedule):
        raise GridError(f"a spacing is laid out on a noise law, as in make_grid('angle', fewstep.VPLinear(), 8), got {schedule!r}")
    own = bare in GRIDS
    spacing = look_up(bare, KNOWN, "grid", GridError)
    snap = options.pop("snap", own)
    if not isinstance(snap, bool):
        raise GridError(f"option snap of grid {bare!r} is true or false, got {snap!r}")
    check_options(options, spacing, f"grid {bare!r}", GridError, hidden=("schedule", "steps"))
    for key, value in options.items():
        if not isinstance(signature(spacing).parameters[key].default, str):
            options[key] = number(value, f"option {key} of grid {bare!r}", GridError)
    to_clean = own and schedule.t_min < schedule.t_last and "t_min" not in options
    if to_clean:
        options["t_min"] = schedule.t_last
    try:
        grid = spacing(schedule, steps, **options)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise GridError(f"grid {bare!r} cannot take {options}: {error}") from error
    grid = grid.known_to(schedule) if snap else grid
    return grid.to_clean(schedule) if to_clean else grid


def check_grid_name(name: str, *others: str) -> None:
    """Refuse a name that `make_grid` does not know; its options are not looked at.

    Args:
        name: of a spacing, options included.
        others: names that stand for something else where it is used, as ``optimized``.

    Raises:
        GridError: there is no such grid (with the nearest names).
    """
    bare, _ = _parsed(name)
    look_up(bare, {**KNOWN, **dict.fromkeys(others)}, "grid", GridError)


def standard_grids(schedule: NoiseSchedule, steps: int) -> dict[str, TimeGrid]:
    """Return the grids by name that run from a schedule's first time to its last in so many steps.

    Those that are not for this schedule, are too fine for a discrete one, or start elsewhere (``leading``) are left out.
    """
    found: dict[str, TimeGrid] = {}
    for name in GRIDS:
        with suppress(GridError):
            grid = make_grid(name, schedule, steps)
            if (float(grid.t[0]), float(grid.t[-1])) == (schedule.t_max, schedule.t_min):
                found[name] = grid
    return found


def is_curve(name: str) -> bool:
    """Return whether a name, options included, stands for noise levels of another program, which have an end of their own."""
    return _parsed(name)[0] in KNOWN.keys() - GRIDS.keys()


def _parsed(name: str) -> tuple[str, dict[str, Any]]:
    """Return our name and the options of a grid's name, which may be that of another program.

    Raises:
        GridError: it is not read, or there is no such grid here (and why).
    """
    bare, written = parse_spec(name, GridError)
    if bare in REFUSED:
        raise GridError(f"{bare} is no grid here: {REFUSED[bare]}")
    if bare not in ALIASES:
        return bare, written
    bare, meant = parse_spec(ALIASES[bare], GridError)
    return bare, {**meant, **written}
