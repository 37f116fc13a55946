"""The solvers, one file per family, and their names. To add one: write the file, add a line to `SOLVERS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from inspect import signature
from typing import Any

from fewstep.core.tableau import Solver
from fewstep.runtime.errors import SolverError, nearest
from fewstep.runtime.front_door import checked, number
from fewstep.runtime.spec import check_options, merged, parse_spec
from fewstep.solvers.aliases import ALIASES, GRID_HINT, LEVELS, REFUSED
from fewstep.solvers.ancestral import DPM2Ancestral, DPMSolverPP2SAncestral, EulerAncestral, RESAncestral
from fewstep.solvers.churn import DPM2Churn, EulerChurn, HeunChurn
from fewstep.solvers.ddim import DDIM, DDPM, LCM
from fewstep.solvers.deis import DEIS, IPNDM
from fewstep.solvers.dpm_solver import DPMSolver2S, DPMSolver3S, DPMSolverFast, DPMSolverM
from fewstep.solvers.dpm_solver_pp import DPMSolverPP, SDEDPMSolverPP2M
from fewstep.solvers.dpm_solver_sde import DPMSolverPPSDE, SDEDPMSolverPP3M
from fewstep.solvers.dpm_solver_v3 import DPMSolverV3
from fewstep.solvers.er_sde import ERSDE
from fewstep.solvers.exponential_ab import ExponentialAB
from fewstep.solvers.heun import Euler, Heun, HeunPP2
from fewstep.solvers.lms import ABM, LMS, GradientEstimation
from fewstep.solvers.pndm import PNDM
from fewstep.solvers.restart import Restart
from fewstep.solvers.runge_kutta import ETDRK4, RES2S, RES3S, RhoRK3, RhoRK4
from fewstep.solvers.sa_solver import SASolver, SASolverPECE
from fewstep.solvers.seeds import SEEDS2, SEEDS3
from fewstep.solvers.unipc import UniPC

__all__ = [
    "ABM",
    "DDIM",
    "DDPM",
    "DEIS",
    "ERSDE",
    "ETDRK4",
    "IPNDM",
    "LCM",
    "LMS",
    "PNDM",
    "RES2S",
    "RES3S",
    "SEEDS2",
    "SEEDS3",
    "SOLVERS",
    "DPM2Ancestral",
    "DPM2Churn",
    "DPMSolver2S",
    "DPMSolver3S",
    "DPMSolverFast",
    "DPMSolverM",
    "DPMSolverPP",
    "DPMSolverPP2SAncestral",
    "DPMSolverPPSDE",
    "DPMSolverV3",
    "Euler",
    "EulerAncestral",
    "EulerChurn",
    "ExponentialAB",
    "GradientEstimation",
    "Heun",
    "HeunChurn",
    "HeunPP2",
    "RESAncestral",
    "Restart",
    "RhoRK3",
    "RhoRK4",
    "SASolver",
    "SASolverPECE",
    "SDEDPMSolverPP2M",
    "SDEDPMSolverPP3M",
    "UniPC",
    "make_solver",
    "solvers_by_family",
    "spec_of",
    "takes_statistics",
]

SOLVERS: dict[str, Callable[..., Solver]] = {
    "euler": Euler,
    "ddim": DDIM,
    "heun": Heun,
    "dpm-solver-2s": DPMSolver2S,
    "dpm-solver-3s": DPMSolver3S,
    "dpm-solver-fast": DPMSolverFast,
    "dpm-solver-2m": partial(DPMSolverM, steps=2),
    "dpm-solver-3m": partial(DPMSolverM, steps=3),
    "dpm-solver-pp-2m": partial(DPMSolverPP, steps=2),
    "dpm-solver-pp-3m": partial(DPMSolverPP, steps=3),
    "sde-dpm-solver-pp-2m": SDEDPMSolverPP2M,
    "sde-dpm-solver-2m": partial(DPMSolverM, steps=2, sde=True),
    "unipc-2": partial(UniPC, steps=2),
    "unipc-3": partial(UniPC, steps=3),
    "deis-3": partial(DEIS, steps=3),
    "ipndm": IPNDM,
    "ipndm-v": partial(LMS, euler_at_clean=True),
    "lms": LMS,
    "pndm": PNDM,
    "heunpp2": HeunPP2,
    "rho-ab-3": partial(LMS, steps=3, euler_at_clean=True),
    "rho-rk-3": RhoRK3,
    "rho-rk-4": RhoRK4,
    "abm-3": partial(ABM, steps=3),
    "exp-ab-2": partial(ExponentialAB, steps=2),
    "exp-ab-3": partial(ExponentialAB, steps=3),
    "exp-ab-4": partial(ExponentialAB, steps=4),
    "res-2s": RES2S,
    "res-3s": RES3S,
    "etdrk-4": ETDRK4,
    "gradient-estimation": GradientEstimation,
    "dpm-solver-v3": DPMSolverV3,
    "ddpm": DDPM,
    "lcm": LCM,
    "euler-ancestral": EulerAncestral,
    "dpm2-ancestral": DPM2Ancestral,
    "dpm-solver-pp-2s-ancestral": DPMSolverPP2SAncestral,
    "res-multistep-ancestral": RESAncestral,
    "dpm-solver-pp-sde": DPMSolverPPSDE,
    "sde-dpm-solver-pp-3m": SDEDPMSolverPP3M,
    "euler-churn": EulerChurn,
    "heun-churn": HeunChurn,
    "dpm2-churn": DPM2Churn,
    "er-sde-1": partial(ERSDE, steps=1),
    "er-sde-2": partial(ERSDE, steps=2),
    "er-sde-3": partial(ERSDE, steps=3),
    "seeds-2": SEEDS2,
    "seeds-3": SEEDS3,
    "sa-solver": SASolver,
    "sa-solver-pece": SASolverPECE,
    "restart": Restart,
}


@checked
def make_solver(name: str, **options: Any) -> Solver:  # noqa: ANN401 - the solver's own options
    """Make a solver by its name: one of this library, of A1111's or ComfyUI's menus, or of an installed ``fewstep.solvers`` entry point.

    Options may be given as arguments or in the name: ``make_solver("ddim:eta=0.5")``.

    Examples:
        >>> from fewstep import make_solver
        >>> make_solver("DPM++ 2M") == make_solver("dpmpp_2m") == make_solver("dpm-solver-pp-2m")
        True

    Raises:
        SolverError: an unknown name (with the nearest ones) or option (with those it has).
    """
    bare, written = _parsed(name)
    factory, loaded = _factory(bare), {key: value for key, value in options.items() if key == "statistics"}  # a name has their folder
    options = merged(name, written, {key: value for key, value in options.items() if key not in loaded}, SolverError) | loaded
    check_options(options, factory, f"solver {bare!r}", SolverError)
    for key, value in options.items():
        if isinstance(signature(factory).parameters[key].default, float):
            options[key] = number(value, f"option {key} of solver {bare!r}", SolverError)
    for key, value in written.items():  # corrector=true is a word where words are wanted
        if options[key] is value and isinstance(signature(factory).parameters[key].default, str) and isinstance(value, bool):
            options[key] = str(value).lower()
    if "statistics" not in options and takes_statistics(name):
        raise SolverError(f"{bare} needs statistics of its model: make them with 'fewstep calibrate', and pass statistics=")
    try:
        solver: Solver = factory(**options)
    except TypeError as error:
        raise SolverError(f"solver {bare!r} cannot take {options}: {error}") from error
    return solver


def takes_statistics(name: str) -> bool:
    """Return whether a solver, named as for `make_solver`, is driven by `ModelStatistics`."""
    return "statistics" in signature(_factory(_parsed(name)[0])).parameters


def solvers_by_family() -> dict[str, dict[str, str]]:
    """Return the names of the registry by family, the first line of its file, each with the first line of its class."""
    found: dict[str, dict[str, str]] = {}
    for name, factory in SOLVERS.items():
        cls: Any = factory.func if isinstance(factory, partial) else factory
        family = _first_line(import_module(cls.__module__).__doc__)
        found.setdefault(family, {})[name] = _first_line(cls.__doc__)
    return found


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n", 1)[0].rstrip(".").replace("`", "")


def spec_of(kind: str, options: Mapping[str, Any]) -> str | None:
    """Return the name with options by which `make_solver` makes a solver, as short as it gets; None if it makes no such solver.

    Args:
        kind: the name of the solver's class.
        options: its fields, with tuples as lists; statistics do not count.
    """
    found: list[tuple[int, str]] = []
    for name, factory in SOLVERS.items():
        cls: Any = factory.func if isinstance(factory, partial) else factory
        if cls.__name__ != kind:
            continue
        known = {one.name: one.default for one in fields(cls)} | (factory.keywords if isinstance(factory, partial) else {})
        others = {key: value for key, value in options.items() if key in known and key != "statistics" and value != _listed(known[key])}
        words = (f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in others.items())
        found.append((len(others), ":".join([name, *words])))
    return min(found)[1] if found else None


def _listed(value: Any) -> Any:  # noqa: ANN401 - as JSON gives a tuple back
    return list(value) if isinstance(value, tuple) else value


def _parsed(name: str) -> tuple[str, dict[str, Any]]:
    """Return the registry name and the options of a solver's name, which may be that of another program's menu."""
    bare, written = parse_spec(name, SolverError)
    if bare in SOLVERS or bare not in ALIASES:
        return bare, written
    bare, meant = parse_spec(ALIASES[bare], SolverError)
    return bare, {**meant, **written}


def _factory(bare: str) -> Callable[..., Solver]:
    factory = SOLVERS.get(bare) or next((entry.load() for entry in entry_points(group="fewstep.solvers", name=bare)), None)
    if factory is None:
        if bare in REFUSED:
            raise SolverError(f"{bare} has no solver here: {REFUSED[bare]}")
        levels = next((words for words in LEVELS if bare.lower().endswith(words.lower())), None)
        if levels is not None:
            raise SolverError(
                f"unknown solver {bare!r}: {levels.strip()} is a choice of noise levels, so name them by the grid, as in {GRID_HINT}"
            )
        raise SolverError(f"unknown solver {bare!r}: {nearest(bare.replace('++', '-pp'), [*SOLVERS, *ALIASES])}")  # as the papers write it
    return factory
