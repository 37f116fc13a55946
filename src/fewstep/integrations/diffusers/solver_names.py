"""The solvers of this library in the options of diffusers' schedulers: from options to a name, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import VPLinear
from fewstep.core.tableau import Solver, tabulate
from fewstep.runtime.errors import SolverError, look_up
from fewstep.runtime.spec import parse_spec
from fewstep.solvers import make_solver, takes_statistics
from fewstep.solvers.stencil import ALWAYS, NEVER

__all__ = ["DESCRIPTIVE", "end_of", "options_of", "solver_of"]

NOISE_PREDICTION = ("deis", "dpmsolver", "sde-dpmsolver")  # algorithm types

DESCRIPTIVE = (
    "solver_order",
    "algorithm_type",
    "solver_type",
    "lower_order_final",
    "euler_at_final",
    "predict_x0",
    "disable_corrector",
)  # diffusers' options that say which solver; a name says it too, and wins


def solver_of(options: Mapping[str, Any]) -> str:
    """Return the name of the solver that the options of diffusers' DPM-Solver, UniPC or DEIS describe.

    Raises:
        SolverError: an unknown word, or a variant that does not exist here.
    """
    order, algorithm, kind = options["solver_order"], str(options["algorithm_type"]), str(options["solver_type"])
    if not options.get("predict_x0", True):
        raise SolverError("UniPC in noise prediction (predict_x0=False) is not offered: use the default, or deis-3")
    known = {"dpmsolver": "", "dpmsolver++": "", "sde-dpmsolver": "", "sde-dpmsolver++": "", "deis": ""}
    look_up(algorithm, known, "algorithm_type", SolverError)
    look_up(kind, {"midpoint": "", "heun": "", "bh1": "", "bh2": "", "logrho": ""}, "solver_type", SolverError)
    form = ":form=taylor" if kind == "heun" else ""
    final = ":euler_at_final=true" if options.get("euler_at_final") else ""
    below = "" if options.get("lower_order_final", True) else f":lower_order_below={NEVER}"
    if algorithm == "deis" or kind == "logrho":
        return f"deis-3{'' if order == 3 else f':steps={order}'}{below}"
    if algorithm == "dpmsolver++" and kind in ("bh1", "bh2"):
        given = options.get("disable_corrector") or ()
        skipped = list(given) if isinstance(given, list | tuple) else [given]
        return (
            _steps("unipc-{}", order) + (":weights=bh1" if kind == "bh1" else "") + below + (f":uncorrected={skipped}" if skipped else "")
        )
    if algorithm == "sde-dpmsolver++" and order == 1:
        return "ddim:eta=1"
    if algorithm.startswith("sde") and order > 2:
        raise SolverError(f"{algorithm} has solver_order 1 or 2, got {order}: the formula that diffusers runs for 3 is of first order only")
    family = {
        "dpmsolver": "dpm-solver-{}m",
        "dpmsolver++": "dpm-solver-pp-{}m",
        "sde-dpmsolver": "sde-dpm-solver-{}m",
        "sde-dpmsolver++": "sde-dpm-solver-pp-{}m",
    }[algorithm]
    return _steps(family, order) + form + below + final


def end_of(algorithm: str, *, clean: bool, chosen: bool | None) -> dict[str, Any]:
    """Return the options that say where the grid of a solver ends, in words that diffusers' schedulers take too.

    Args:
        algorithm: its ``algorithm_type``; in noise prediction diffusers refuses a step to the clean image.
        clean: whether the grid ends there.
        chosen: what ``to_clean`` says so far.
    """
    if clean and algorithm in NOISE_PREDICTION:
        return {"final_sigmas_type": "sigma_min", "to_clean": True}
    return {} if chosen is None else {"final_sigmas_type": "zero" if clean else "sigma_min", "to_clean": None}


def _steps(family: str, order: int) -> str:
    """Return the registry name of a family's solver of this order; order 1 is that of order 2 with ``steps=1``."""
    if order not in (1, 2, 3):
        raise SolverError(f"solver_order is 1, 2 or 3, got {order}")
    return family.format(2) + ":steps=1" if order == 1 else family.format(order)


def _adds_noise(solver: Solver) -> bool:
    law = VPLinear()
    return tabulate(solver, solver.nodes(TimeGrid.logsnr(law, 4), law)).stochastic


def options_of(name: str) -> dict[str, Any]:
    """Return the options of diffusers' schedulers that describe a solver best, for those made from a `FewstepScheduler`'s configuration."""
    bare, written = parse_spec(name, SolverError)
    steps = written.get("steps") or (
        2 if takes_statistics(name) else getattr(make_solver(name), "steps", 2 if "2m" in bare else 3 if "3m" in bare else 1)
    )
    kind = "bh2"
    if "unipc" in bare:
        kind = str(written.get("weights", "bh2")) if written.get("weights") != "exact" else "bh2"
    elif "dpm-solver" in bare and bare.endswith("m"):
        kind = "heun" if written.get("form") == "taylor" else "midpoint"
    elif "deis" in bare:
        kind = "logrho"
    noisy = written.get("eta") == 1 if bare == "ddim" else not takes_statistics(name) and _adds_noise(make_solver(name))
    sde = "sde-" if noisy else ""
    algorithm = "deis" if "deis" in bare else f"{sde}dpmsolver" if bare.removeprefix("sde-") in ("dpm-solver-2m", "dpm-solver-3m") else ""
    return {
        "solver_order": min(int(steps), 3),
        "algorithm_type": algorithm or f"{sde}dpmsolver++",
        "solver_type": kind,
        "lower_order_final": written.get("lower_order_below", ALWAYS) != NEVER,
        "euler_at_final": bool(written.get("euler_at_final", False)),
        "predict_x0": True,
        "disable_corrector": list(written.get("uncorrected", ())),
    }
