"""Phase 1 whole: what it leaves on disk, never worse than a standard grid where it counts, and a killed run that goes on."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep import (
    AdaptedDenoiser,
    ArtifactError,
    DiscreteVP,
    FewstepError,
    GridError,
    MixtureDenoiser,
    Model,
    ModelError,
    RectifiedFlow,
    Sampler,
    SolverError,
    VarianceExploding,
    make_grid,
    make_solver,
    sample,
    seeded_noise,
)
from fewstep.core.grid import GRIDS
from fewstep.core.schedule import NoiseSchedule
from fewstep.learn.samplers import optimize as module
from fewstep.learn.samplers.optimize import OptimizeConfig, Optimized, optimize, solver_folder
from fewstep.learn.search.bound import Bound
from fewstep.learn.teacher.gram import Gram
from fewstep.learn.teacher.trajectories import Trajectories
from fewstep.sampling.grid_table import GridTable

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward mode of some PyTorch releases says so

SHAPE = (2, 2)
LAW = VarianceExploding(0.05, 20.0)
TINY = OptimizeConfig(levels=12, num=8, noises=8, held_out=8, iterations=2)
FLOAT32 = 1e-6  # of a number: rounding of one operation or two
Found = tuple[Gram, dict[str, dict[int, Optimized]]]


class Counted:
    """An analytic denoiser as a network, which counts its calls and can be told to stop at one or to fail there."""

    def __init__(self, denoiser: MixtureDenoiser, stop: int = -1, bad: int = -1) -> None:
        self.denoiser, self.stop, self.bad, self.calls = denoiser, stop, bad, 0

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        answer = self.denoiser(x, t[0].double()) * (torch.nan if self.calls == self.bad else 1)
        return answer if label is None else answer + (label.float() - 2)[:, None, None] / 10  # class 2 stands for none


@pytest.fixture(scope="module", autouse=True)
def few_evaluations() -> Iterator[None]:
    """Of the trajectories that all errors are measured against here: what is tested needs no better ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "REFERENCE_NFE", 24)
        yield


def toy(schedule: NoiseSchedule = LAW, *, classes: int | None = None, **options: int) -> Model:
    means = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)) * 0.8
    network = Counted(MixtureDenoiser(schedule, means, torch.full((4,), 0.25)), **options)
    return Model("toy", AdaptedDenoiser(network, schedule, "sample"), SHAPE, classes, classes)


def calls(model: Model) -> int:
    return model.denoiser.network.calls


def made(
    folder: Path,
    model: Model | None = None,
    solvers: Sequence[str] = ("ddim", "unipc-2"),
    nfe: Sequence[int] = (2, 3),
    config: OptimizeConfig = TINY,
    **options: object,
) -> Found:
    return optimize(model or toy(), {name: make_solver(name) for name in solvers}, nfe, config, folder, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """All files, but of the moments only the numbers: the order of the words in front of them is nobody's."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in files.keys() & {"gram-0-of-1.safetensors"}:
        files[name] = files[name][8 + int.from_bytes(files[name][:8], "little") :]
    return files


# -- what it leaves --------------------------------------------------------------------------------------------------


PROBLEMS: Mapping[str, Callable[[], NoiseSchedule]] = {
    "edm": lambda: LAW,
    "flow": RectifiedFlow,
    "table": lambda: DiscreteVP.linear(60),
}


@pytest.mark.parametrize("law", [pytest.param(law, marks=[pytest.mark.slow] if law == "edm" else []) for law in PROBLEMS])
def test_schedules_are_kept_and_no_worse_than_standard_grids(tmp_path: Path, law: str) -> None:
    """By the mean error of the samples held out, measured here once more from the artifacts."""
    schedule, told = PROBLEMS[law](), []
    model = toy(schedule)
    gram, found = made(tmp_path, model, nfe=(4, 2, 4), command="it", observe=lambda done, note: told.append((done, note)))
    exact = Trajectories.load(tmp_path / "exact")
    start, end = (exact.states(range(8, 16))[:, k] for k in (0, -1))
    sigma = float(schedule.sigma(torch.tensor(schedule.t_max, dtype=torch.float64)))
    torch.testing.assert_close(start, sigma * seeded_noise(range(TINY.seed + 8, TINY.seed + 16), SHAPE), rtol=FLOAT32, atol=0)

    def errors(sampler: Sampler) -> Tensor:
        return (sample(model.denoiser, sampler, start) - end).double().square().mean((1, 2)).sqrt()

    assert list(found) == ["ddim", "unipc-2"] and gram.count == 8
    for name, of in found.items():
        table = GridTable.load(solver_folder(tmp_path, name))
        assert (table.solver, table.model, table.guidance) == (name, model.fingerprint, 1.0) and list(of) == list(table.grids) == [2, 4]
        for (nfe, one), row in zip(of.items(), table.card["rows"], strict=True):
            loaded, card = Sampler.load(solver_folder(tmp_path, name) / f"nfe-{nfe:02d}"), one.sampler.card
            assert loaded.nfe == nfe and torch.equal(loaded.grid.t, one.sampler.grid.t) and torch.equal(table.grid(nfe).t, loaded.grid.t)
            assert loaded.card == json.loads(json.dumps(dict(card))) and (card["command"], card["held_out_noises"]) == ("it", 8)
            assert row == {"solver": name, "nfe": nfe} | {key: card[key] for key in row.keys() - {"solver", "nfe"}}
            assert float(errors(loaded).square().mean().sqrt()) == pytest.approx(card["rmse"][0], rel=1e-4)
            standard = Sampler.build(make_solver(name), make_grid(card["best_standard_grid"], schedule, nfe), schedule)
            assert float(errors(standard).square().mean().sqrt()) == pytest.approx(card["rmse"][1], rel=1e-4)
            assert float(errors(loaded).mean()) <= float(errors(standard).mean()) * (1 + FLOAT32)
            assert law != "table" or torch.equal(loaded.grid.t, loaded.grid.t.round())
    assert told[-5:] == [*((n, f"{name}, {nfe} evaluations") for n, (name, nfe) in enumerate(product(found, (2, 4)))), (4, "")]
    assert {(0, "8 of 8 trajectories"), (0, "16 of 16 exact ends")} <= set(told)


def test_a_schedule_is_chosen_from_many(tmp_path: Path) -> None:
    """All standard grids, four programmes of each kind, the neighbours' schedules, and the best two refined."""
    config = replace(TINY, num=32, noises=64, held_out=64, iterations=6)
    gram, found = made(tmp_path, solvers=("dpm-solver-pp-2m",), nfe=(2, 3, 4), config=config)
    bound = Bound(gram)
    for nfe, one in found["dpm-solver-pp-2m"].items():
        refined = {name.removesuffix(", refined") for name in one.candidates if name.endswith(", refined")}
        tried = [name for name in one.candidates if not name.endswith(", refined")]
        assert len(refined) == 2 and min(tried, key=lambda name, one=one: one.candidates[name][0]) in refined
        assert {"angle", "karras", "logsnr", "quadratic", "uniform"} == GRIDS.keys() & set(tried)
        assert sum("first-order programme" in name for name in tried) == sum("pair programme" in name for name in tried) == 4
        assert {name for name in tried if "stretched" in name} == {f"that of {steps} steps, stretched" for steps in range(2, nfe)}
        best = "first-order programme (plain, sum)"
        assert one.candidates[best][1] == pytest.approx(bound(bound.best(nfe)[nfe]), rel=1e-9)
        assert all(value is None or value >= one.candidates[best][1] * (1 - 1e-9) for _, value in one.candidates.values())
        assert one.sampler.card["rmse"][0] < 0.95 * one.sampler.card["rmse"][1]  # measured 0.88, 0.79, 0.62


def test_a_solver_of_two_stages(tmp_path: Path) -> None:
    _, found = made(tmp_path, model := toy(), ("heun",), (4, 2))
    assert [(nfe, one.sampler.nfe, one.sampler.grid.steps) for nfe, one in found["heun"].items()] == [(2, 2, 1), (4, 4, 2)]
    flow = made(tmp_path / "flow", toy(RectifiedFlow()), ("heun",), (3, 1))[1]["heun"]  # its last step is one evaluation
    assert [(nfe, one.sampler.nfe, one.sampler.grid.steps) for nfe, one in flow.items()] == [(1, 1, 1), (3, 3, 2)]
    before = calls(model)
    with pytest.raises(SolverError, match="Heun takes 2 evaluations a step and cannot use exactly 5: use 4 or 6"):
        made(tmp_path, model, ("heun",), (4, 5))
    assert calls(model) == before


def test_a_guided_model(tmp_path: Path) -> None:
    model = toy(classes=2)
    _, found = made(tmp_path, model, ("ddim",), (3,), guidance=3.0)
    one, exact = found["ddim"][3].sampler, Trajectories.load(tmp_path / "exact")
    assert one.card["guidance"] == GridTable.load(tmp_path / "ddim").guidance == exact.guidance == 3.0
    states, labels = exact.states(range(8, 16)), exact.labels(range(8, 16))
    gap = sample(model.guided(3.0), one, states[:, 0], labels) - states[:, -1]
    assert float(gap.double().square().mean().sqrt()) == pytest.approx(one.card["rmse"][0], rel=1e-4)
    with pytest.raises(ModelError, match="cannot be guided"):
        made(tmp_path / "none", guidance=3.0)
    assert not (tmp_path / "none").exists()


def test_solvers_with_options_have_folders_of_their_own(tmp_path: Path) -> None:
    names = ("unipc-2", "unipc-2:corrector=false")
    _, found = made(tmp_path, solvers=names, nfe=(2,))
    assert solver_folder(tmp_path, names[1]) == tmp_path / "unipc-2_corrector_false"
    for name in names:
        assert GridTable.load(solver_folder(tmp_path, name)).solver == name
    assert [of[2].sampler.options["corrector"] for of in found.values()] == [True, False]


# -- killed, continued, and refused ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run that nobody killed, and its calls of the network."""
    folder = tmp_path_factory.mktemp("whole")
    made(folder, model := toy())
    return folder, calls(model)


@pytest.mark.parametrize(
    "where", [0.02, pytest.param(0.12, marks=pytest.mark.slow), pytest.param(0.5, marks=pytest.mark.slow), 0.97]
)  # moments, exact ends, schedules
def test_a_run_killed_in_the_network_continues_to_the_same_files(tmp_path: Path, whole: tuple[Path, int], where: float) -> None:
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, toy(stop=int(where * whole[1])))
    kept = len(contents(tmp_path))
    made(tmp_path, model := toy())
    assert contents(tmp_path) == contents(whole[0])
    assert calls(model) <= (whole[1] if where < 0.3 else 0.7 * whole[1]) and (kept > 0) == (where > 0.1)


def test_a_finished_folder_is_only_read(whole: tuple[Path, int]) -> None:
    before = contents(whole[0])
    _, found = made(whole[0], model := toy())
    assert calls(model) == 0 and contents(whole[0]) == before
    for name, of in found.items():
        assert list(of) == [2, 3] and all(one.candidates for one in of.values())
        for nfe, one in of.items():
            assert torch.equal(one.sampler.grid.t, GridTable.load(solver_folder(whole[0], name)).grid(nfe).t)


def test_a_run_killed_between_schedules_repeats_nothing(tmp_path: Path, whole: tuple[Path, int]) -> None:
    def mortal(done: int, note: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, killed := toy(), observe=mortal)
    assert GridTable.load(tmp_path / "ddim").grids.keys() == {2, 3} and not (tmp_path / "unipc-2").exists()
    made(tmp_path, again := toy())
    assert calls(killed) + calls(again) == whole[1] and contents(tmp_path) == contents(whole[0])


def test_more_evaluations_and_solvers_can_be_added(tmp_path: Path, whole: tuple[Path, int]) -> None:
    made(tmp_path, one := toy(), ("ddim",), (2,))
    made(tmp_path, two := toy())
    assert contents(tmp_path) == contents(whole[0]) and calls(one) + calls(two) == whole[1]


def test_other_work_is_not_mixed_in(tmp_path: Path) -> None:
    made(tmp_path, toy(classes=2), ("ddim",), (2,))
    before, other = contents(tmp_path), VarianceExploding(0.05, 20.5)
    requests = [(toy(other, classes=2), TINY, 1.0), (toy(classes=2), TINY, 2.0), (toy(classes=2), replace(TINY, levels=13), 1.0)]
    requests += [(toy(classes=2), replace(TINY, num=9), 1.0), (toy(classes=2), replace(TINY, seed=4), 1.0)]
    requests += [(toy(classes=2), replace(TINY, iterations=3), 1.0), (toy(classes=2), replace(TINY, held_out=9), 1.0)]
    for model, config, guidance in requests:
        with pytest.raises(ArtifactError, match=r"remove it|use another folder"):
            made(tmp_path, model, ("ddim",), (2,), config, guidance=guidance)
    assert contents(tmp_path) == before
    with pytest.raises(
        ArtifactError, match=r"nfe-02 holds a schedule of another model, solver or configuration: remove it, or use another"
    ):
        optimize(toy(classes=2), {"ddim": make_solver("unipc-2")}, [2], TINY, tmp_path)
    (tmp_path / "ddim" / "nfe-02" / "sampler.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtifactError, match="sampler.safetensors is damaged"):
        made(tmp_path, toy(classes=2), ("ddim",), (2,))


def test_mistakes_are_named_before_any_work(tmp_path: Path, whole: tuple[Path, int]) -> None:
    (tmp_path / "file").write_text("mine")
    few = DiscreteVP.linear(6)
    for error, says, request in [
        (GridError, "13 steps need at least as many cells between levels; toy has 12: ask for more levels", {"nfe": (2, 13)}),
        (GridError, "6 steps need at least as many cells between levels; toy has 5", {"model": toy(few), "nfe": (6,)}),
        (SolverError, "nfe must be a whole number of at least 1, got 0", {"nfe": (0, 3)}),
        (ArtifactError, "cannot write .*: .*file is a file; choose a folder", {"folder": tmp_path / "file"}),
        (ArtifactError, "cannot write .*: .*file is a file; choose a folder", {"folder": tmp_path / "file" / "below"}),
    ]:
        asked = {"folder": tmp_path / "new", "model": toy(), **request}
        with pytest.raises(error, match=says):
            made(**asked)
        assert calls(asked["model"]) == 0 and not (tmp_path / "new").exists()
    with pytest.raises(SolverError, match="DDIM adds noise, and has no exact ends to compare with: use a deterministic solver"):
        made(tmp_path / "noisy", solvers=("ddim:eta=1",), nfe=(2,))
    for bad in (1, 5, 6, int(0.9 * whole[1])):  # a derivative, an output, a derivative, a schedule
        with pytest.raises(ModelError, match="not finite"):
            made(tmp_path / f"bad-{bad}", toy(bad=bad))
    for options in ({"noises": 1}, {"held_out": 1}, {"seed": -1}, {"iterations": -1}, {"levels": 3}, {"num": 0}):
        with pytest.raises(FewstepError, match="at least"):
            OptimizeConfig(**options)
