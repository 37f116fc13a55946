"""`compare`: any samplers side by side on one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Solver, Tableau
from fewstep.evaluate.benchmark.comparison import Comparison, TemporaryFolder
from fewstep.evaluate.benchmark.entries import Entry, SamplerEntry, ThirdPartyEntry
from fewstep.evaluate.benchmark.plan import (
    Setup,
    check_names,
    entries_below,
    entries_by_name,
    entries_of_peer,
    in_reading_order,
    on_each_grid,
)
from fewstep.evaluate.benchmark.run import run_entries
from fewstep.evaluate.benchmark.third_party import SIGNATURE, ThirdPartySampler
from fewstep.evaluate.rows import Key, trim_reference
from fewstep.models.carried import OPTIMIZED
from fewstep.models.generate import check_made_for, check_statistics
from fewstep.models.model import Model
from fewstep.models.problem import Problem, check_model
from fewstep.runtime.errors import FewstepError, GridError, SolverError
from fewstep.runtime.front_door import checked, scale_of, whole, wholes
from fewstep.runtime.job import Job, folder_of
from fewstep.runtime.process import need_folder
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import make_solver, spec_of

__all__ = ["compare"]

OWN_GRID = "own grid"  # the grid of a sampler that was put together by hand
LONGEST = 60  # letters of a name that is made of options
KINDS = (
    "names of solvers ('unipc-2', 'DPM++ 2M', 'fitted'), Solver objects, Samplers, dicts of them as fewstep.fit returns, folders of saved "
    f"samplers as pathlib.Path, and functions {SIGNATURE}"
)

Comparable = str | Path | Solver | Sampler | Mapping[int, Sampler] | Callable[..., Tensor]


@checked
def compare(
    model: Model,
    what: Comparable | Sequence[Comparable],
    *,
    nfe: int | Sequence[int] = (5, 6, 8, 10),
    grid: str | Sequence[str] = ("karras", "angle"),
    guidance: float | None = None,
    num: int = 512,
    seed: int = 0,
    batch: int = 256,
    data: str | Path | None = None,
    features: str | nn.Module | None = None,
    peers: str | Sequence[str] = (),
    out: str | Path | None = None,
    on_progress: Callable[[int, str], None] | None = None,
) -> Comparison:
    """Compare samplers on the same noises, by their distance to the exact solution of the sampling ODE.

    A sampler that fails is a row that says why, and the others go on; one that cannot make a number of evaluations at all, or adds noise
    and so has no exact solution to be compared with, is listed as not run (docs/noise.md has a benchmark of these). Everything runs on
    the model's device. docs/benchmarks.md has the protocol and the meaning of each number.

    Args:
        model: what is sampled. A tuned model or a student is measured against its teacher's exact trajectories.
        what: the samplers, one or a list, of any mixture of

            - names of solvers (``"unipc-2"``, ``"DPM++ 2M"``, ``"ddim:eta=0"``), and ``"fitted"`` for those that the model carries;
            - `Solver` objects, also of classes of your own;
            - `Sampler` objects, or dicts of them as `fit` and `optimize` return; they have their own ``nfe`` and grid;
            - folders of saved samplers, as `pathlib.Path`;
            - functions with the signature of k-diffusion's samplers,
              ``f(model, x, sigmas, extra_args=None, callback=None, disable=None)``.
        nfe: network evaluations per sample.
        grid: names of spacings (``"karras"``), or ``"optimized"`` for the grids that the model carries.
        guidance: classifier-free guidance scale; by default the model's own.
        num: number of noises.
        seed: the seed of the first; the next has the next seed.
        batch: samples at a time.
        data: images that samples are compared with as a set: a folder, an ``.npz`` or ``"digits"``; by default the model's own, if known.
        features: the network for that comparison: ``"pixels"``, ``"digits"``, ``"inception:PATH"``, ``"module:function"``, or a module.
        peers: also ``"diffusers"``, all its ODE schedulers, or third-party samplers as ``"module:function"``.
        out: a folder to write results into. Rows that are there already, and are still valid, are not run again; rows of other samplers
            stay. The processes of ``torchrun`` share the rows there. By default nothing is left on disk.
        on_progress: called with the number of rows done and the name of the next.

    Raises:
        FewstepError: something that is no sampler, an unknown name, or nothing to run.
        ModelError: something that is no model, or a model without a shape.
        ArtifactError: a sampler or statistics that were made for another model or guidance scale.

    Examples:
        >>> import fewstep
        >>> model = fewstep.load_model("digits-edm")
        >>> table = fewstep.compare(model, ["ddim", "unipc-2"], nfe=[5, 8], grid="angle", num=16)
        >>> table.best(5).solver
        'unipc-2'
    """
    check_model(model)
    for name, value, kind, says in (
        ("guidance", guidance, int | float, "a number"),
        ("data", data, str | Path, "'digits', an .npz file or a folder of pictures"),
        ("features", features, str | nn.Module, "the name of a feature network, or a torch.nn.Module"),
        ("out", out, str | Path, "a folder"),
    ):
        if value is not None and not isinstance(value, kind):
            raise FewstepError(f"{name} is {says}, got {value!r}")
    if on_progress is not None and not callable(on_progress):
        raise FewstepError(f"on_progress is a function of the rows done and a note, got {on_progress!r}")
    setup = Setup(whole(num, "num"), whole(seed, "seed"), whole(batch, "batch"), features, None if data is None else str(data))
    problem = Problem(model, scale_of(guidance, model.default_guidance), model.device)
    counts = tuple(wholes(nfe, "nfe"))
    grids, named = _words(grid, "grid"), _words(peers, "peers")
    check_names((), grids, counts, named)
    groups = [_entries(one, problem, grids, counts) for one in _listed(what)]
    groups += [entries_of_peer(problem, peer, grids, counts) for peer in named]
    entries = in_reading_order(_distinct(groups), grids, counts)
    if not entries:
        raise FewstepError(f"nothing to compare: pass samplers, and at least one nfe and one grid; samplers are {KINDS}")
    if out is None:
        need_folder("compare")
        temporary = TemporaryFolder()
        folder = temporary.path
    else:
        temporary, folder = None, folder_of(out)
    try:
        with Job.open("compare", folder, device=problem.device, on_progress=on_progress, command=_call(problem, entries, setup)) as job:
            results = run_entries(problem, entries, setup, job)
        if temporary is not None:
            trim_reference(folder)
    except BaseException:
        if temporary is not None:
            temporary.remove()
        raise
    return Comparison(results, folder, temporary)


def _words(value: Any, name: str) -> tuple[str, ...]:  # noqa: ANN401
    """Return one or more names as a tuple.

    Raises:
        GridError, FewstepError: it is something else.
    """
    words = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    for word in words:
        if not isinstance(word, str):
            hint = (
                "; times of your own belong to a sampler: pass fewstep.Sampler.build(solver, grid, model.schedule)"
                if name == "grid"
                else ""
            )
            raise (GridError if name == "grid" else FewstepError)(f"{name} is a name or a list of names, got {word!r}{hint}")
    return tuple(dict.fromkeys(words))


def _listed(what: Any) -> list[Any]:  # noqa: ANN401
    if isinstance(what, Iterable) and not isinstance(what, str | Mapping) and not callable(what):
        return list(what)
    return [what]


def _entries(one: Any, problem: Problem, grids: Sequence[str], nfe: Sequence[int]) -> list[Entry]:  # noqa: ANN401
    """Return the entries of one of the things to compare.

    Raises:
        FewstepError: it is nothing that can be compared.
    """
    if isinstance(one, str):
        check_names((one,), (), (), ())
        return entries_by_name(problem, one, grids, nfe)
    if isinstance(one, Path):
        return entries_below(problem, one)
    if isinstance(one, Sampler):
        return [_sampler_entry(one, problem)]
    if isinstance(one, Mapping):
        others = [value for value in one.values() if not isinstance(value, Sampler)]
        if others:
            raise FewstepError(f"a dict to compare holds Samplers, as fewstep.fit returns it, not a {type(others[0]).__name__}")
        return [_sampler_entry(sampler, problem) for sampler in one.values()]
    if isinstance(one, Solver):
        check_statistics(one, problem.model, problem.guidance)
        name, named = _name(one)
        return on_each_grid(problem, name, one, grids, nfe, named=named)
    _refuse(one)
    third = ThirdPartySampler.of(one)
    return [ThirdPartyEntry(problem, third.name, grid, number, third_party=third) for number in nfe for grid in grids]


def _refuse(one: Any) -> None:  # noqa: ANN401
    """Refuse what is no function of a sampler's signature, with what to pass instead."""
    what = type(one).__name__
    if isinstance(one, type) and issubclass(one, Solver):
        raise SolverError(f"{one.__name__} is the class of a solver: pass an object of it, as in {one.__name__}()")
    if isinstance(one, Tableau):
        raise FewstepError("a Tableau has no name and no grid to show: pass the Sampler that it is of")
    if isinstance(one, nn.Module) or isinstance(getattr(one, "schedule", None), NoiseSchedule):
        raise FewstepError(f"compare takes one model and several samplers, and a {what} is no sampler: compare each model by itself")
    if not callable(one):
        raise FewstepError(f"a {what} is nothing that can be compared; samplers are {KINDS}")


def _sampler_entry(sampler: Sampler, problem: Problem) -> Entry:
    check_made_for(sampler, problem.model, problem.guidance, sampler)
    grid = sampler.card.get("grid") or (OPTIMIZED if sampler.card.get("model") else OWN_GRID)
    return SamplerEntry(problem, sampler.name, str(grid), sampler.nfe, given=sampler)


# -- names --------------------------------------------------------------------------------------------------------------


def _name(solver: Solver) -> tuple[str, bool]:
    """Return the name that tables show of a solver, and whether the name stands for its formulas."""
    known = fields(solver) if is_dataclass(solver) else ()
    options = {one.name: getattr(solver, one.name) for one in known}
    spec = spec_of(type(solver).__name__, {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()})
    if spec is not None:
        try:
            twin = make_solver(spec, **{key: value for key, value in options.items() if key == "statistics"})
        except FewstepError:
            twin = None
        if type(twin) is type(solver) and twin == solver:
            return spec, True
    words = [
        f"{one.name}={options[one.name]}"
        for one in known
        if isinstance(options[one.name], bool | int | float | str) and (one.default is MISSING or options[one.name] != one.default)
    ]
    name = ":".join([type(solver).__name__, *words])
    return (name if len(name) <= LONGEST else type(solver).__name__), False


def _distinct(groups: Sequence[Sequence[Entry]]) -> list[Entry]:
    """Return all entries under keys of their own: the same sampler once, and different ones of one name with a number, as ``mine#2``.

    The entries of a group are renamed together, so that one line of the table is one sampler.
    """
    taken: dict[Key, Entry] = {}
    waiting = [list(group) for group in groups]
    while waiting:
        first: dict[Key, Entry] = {}
        for entry in (group := waiting.pop(0)):
            first.setdefault(entry.key, entry)
        rest = [entry for entry in group if not (entry is first[entry.key] or first[entry.key].same_as(entry))]
        if rest:  # a dict of several samplers with as many evaluations
            waiting.insert(0, rest)
        made, number = list(first.values()), 1
        while any(entry.key in taken and not taken[entry.key].same_as(entry) for entry in made):
            number += 1
            made = [entry.renamed(f"{entry.solver}#{number}") for entry in first.values()]
        for entry in made:
            taken.setdefault(entry.key, entry)
    return list(taken.values())


def _call(problem: Problem, entries: Sequence[Entry], setup: Setup) -> str:
    """Return the call that makes these rows, for readers of the report."""
    what, nfe, grids = (list(dict.fromkeys(getattr(entry, part) for entry in entries)) for part in ("solver", "nfe", "grid"))
    shown = f"[{', '.join(what)}], nfe={sorted(nfe)}, grid={grids}, guidance={problem.guidance:g}, num={setup.num}, seed={setup.seed}"
    return f"fewstep.compare({problem.name}, {shown})"
