"""The claims of the README that take minutes: speed against diffusers, quality of the bundled models, the built wheel."""

import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks import kernel_traffic, step_overhead
from fewstep import Sampler, TimeGrid, VarianceExploding, advance, load_model, make_grid, make_solver
from fewstep.data.images import load_images
from fewstep.evaluate.metrics.distances import frechet_distance, load_features, rmse
from fewstep.learn.search.endpoint import per_sample_rmse
from fewstep.models.generate import sample, solver_for
from fewstep.sampling.reference import reference_sampler

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LEARNED = (
    *("digits-edm/optimized/ddim/grids.json", "digits-edm/fitted/nfe-05/sampler.safetensors"),
    *("digits-edm-3step/tuned.json", "digits-flow-map/flow-map.json"),
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers hands tensors to numpy in ways that numpy 2 deprecates
@pytest.mark.parametrize("shape", step_overhead.SHAPES)
def test_a_step_without_the_network_costs_less_than_diffusers(shape: tuple[int, ...]) -> None:
    row = step_overhead.measure(shape, rounds=15)
    assert row["ratio"] <= step_overhead.SHAPES[shape]


def test_bundled_models_are_good() -> None:
    data, features = load_images("digits").x, load_features("digits", (1, 8, 8))
    first, second = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))].chunk(2)
    halves = frechet_distance(first, second, features)
    for name in ("digits-edm", "digits-ddpm"):
        model, solver, seeds = load_model(name), make_solver("heun"), range(512)
        schedule = model.schedule
        steps = solver.steps_for(200 if name == "digits-edm" else 50)
        grid = make_grid("karras", schedule, steps) if name == "digits-edm" else TimeGrid.karras(schedule, steps)
        labels = model.labels(seeds)
        samples = sample(model, Sampler.build(solver, grid, schedule), seeds=seeds)
        assert frechet_distance(data, samples, features) <= 1.5 * halves
        assert labels is None or (features.labels(samples) == labels).float().mean() >= 0.97


FRESH = range(7_000_000, 7_000_512)  # noises that nothing was fitted to
COUNTS = {"digits-edm": 512, "digits-ddpm": 256}  # of exact samples that are made


def fresh_samples(name: str, sampler: Sampler, seeds: range = FRESH) -> torch.Tensor:
    model = load_model(name)
    return sample(model, sampler, seeds=seeds)


@cache
def exact_samples(name: str) -> torch.Tensor:
    """The exact samples of the fresh noises, which several tests measure against and none may change."""
    return fresh_samples(name, reference_sampler(load_model(name).schedule), FRESH[: COUNTS[name]])


def test_optimized_schedules_have_less_error_than_every_standard_one() -> None:
    for name, solver, nfe in (("digits-edm", "ddim", 20), ("digits-edm", "dpm-solver-v3", 8), ("digits-ddpm", "dpm-solver-pp-2m", 10)):
        model = load_model(name)
        schedule, method = model.schedule, solver_for(solver, model)
        grids = {grid: make_grid(grid, schedule, nfe) for grid in ("karras", "logsnr", "uniform", "quadratic", "angle")}
        grids["optimized"] = model.optimized(solver, nfe)
        exact = exact_samples(name)[:256]
        samples = {key: fresh_samples(name, Sampler.build(method, grid, schedule), FRESH[:256]) for key, grid in grids.items()}
        found = {key: rmse(made, exact) for key, made in samples.items()}
        assert found.pop("optimized") < min(found.values())


@pytest.mark.parametrize(("name", "rival"), [("digits-edm", "angle"), ("digits-ddpm", "quadratic")])
def test_five_fitted_evaluations_have_less_error_than_eight_of_a_hand_made_solver(name: str, rival: str) -> None:
    model, seeds = load_model(name), FRESH[:256]
    schedule, by_hand = model.schedule, make_solver("unipc-2")
    exact = exact_samples(name)[:256]
    ours = fresh_samples(name, model.fitted(5), seeds)
    for nfe, factor in ((5, 0.6), (8, 1.0)):
        theirs = fresh_samples(name, Sampler.build(by_hand, make_grid(rival, schedule, nfe), schedule), seeds)
        assert per_sample_rmse(ours - exact).mean() < factor * per_sample_rmse(theirs - exact).mean()


def test_three_tuned_steps_land_near_the_teacher() -> None:
    teacher, tuned, data = load_model("digits-edm"), load_model("digits-edm-3step"), load_images("digits").x
    schedule, ddim = teacher.schedule, make_solver("ddim")
    exact = exact_samples("digits-edm")
    untuned = fresh_samples("digits-edm", Sampler.build(ddim, teacher.optimized("ddim", 3), schedule))
    student = fresh_samples("digits-edm-3step", Sampler.build(ddim, tuned.optimized("ddim", 3), schedule))
    features = load_features("digits", (1, 8, 8))
    assert rmse(student, exact) <= 0.65 * rmse(untuned, exact)
    assert frechet_distance(data, student, features) <= 1.25 * frechet_distance(data, exact, features)


def test_one_distilled_pass_is_better_than_two_evaluations_and_two_are_better_still() -> None:
    teacher, student, data = load_model("digits-edm"), load_model("digits-flow-map"), load_images("digits").x
    schedule, features = teacher.schedule, load_features("digits", (1, 8, 8))
    exact = exact_samples("digits-edm")
    four = fresh_samples("digits-edm", Sampler.build(make_solver("dpm-solver-pp-2m"), make_grid("angle", schedule, 4), schedule))
    error: dict[int, float] = {}
    for nfe in (1, 2):
        made = fresh_samples("digits-flow-map", Sampler.build(make_solver("ddim"), student.optimized("ddim", nfe), schedule))
        error[nfe] = rmse(made, exact)
        asked = student.labels(FRESH)
        agree, theirs = ((features.labels(x) == asked).float().mean() for x in (made, exact))
        assert frechet_distance(data, made, features) < frechet_distance(data, four, features)
        assert agree >= theirs - 0.03
    grids = [make_grid(name, schedule, nfe) for name in ("angle", "karras", "logsnr") for nfe in (1, 2)]
    solvers = [make_solver("unipc-2"), solver_for("dpm-solver-v3", teacher)]
    rivals = [(grid.steps, rmse(fresh_samples("digits-edm", Sampler.build(s, grid, schedule)), exact)) for grid in grids for s in solvers]
    assert error[2] < error[1] < min(found for _, found in rivals)
    assert error[1] < 0.5 * min(found for steps, found in rivals if steps == 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, inside inductor
def test_the_kernel_compiled_by_inductor_is_the_kernel() -> None:
    schedule = VarianceExploding()
    tableau = Sampler.build(make_solver("unipc-3"), TimeGrid.angle(schedule, 6), schedule).tableau
    x = torch.randn(2, 3, 4, 4)
    compiled, rows = torch.compile(advance, fullgraph=True), tableau.rows(x)
    eager, fast = tableau.start(x), tableau.start(x)
    for row in rows:
        eager, fast = advance(row, eager, eager.x.tanh()), compiled(row, fast, fast.x.tanh())
    torch.testing.assert_close(fast.x, eager.x, rtol=1e-5, atol=1e-5)  # float32, fused in another order


@pytest.mark.filterwarnings("ignore")  # torch's own, inside inductor
@pytest.mark.parametrize("solver", ["dpm-solver-pp-2m", "unipc-3", "ipndm"])
def test_the_compiled_kernel_reads_and_writes_each_tensor_once(solver: str) -> None:
    with torch.no_grad():
        row = kernel_traffic.traffic(solver, rounds=1)
    assert row["compiled_to_least"] == 1
    assert row["eager_to_least"] <= 4 and row["new_tensors"] <= 2


def test_the_wheel_holds_the_models_and_stays_small(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("fewstep-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.stat().st_size < 13e6  # four models and what belongs to them
    for file in ("digits-edm/fewstep.json", "digits-ddpm/model_index.json", *LEARNED):
        assert f"fewstep/models/weights/{file}" in names
    assert {"fewstep/evaluate/metrics/weights/digits-features/features.safetensors", "fewstep/py.typed"} <= names
