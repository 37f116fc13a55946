"""The published reference implementations, number for number (see tests/golden/README.md)."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep import GridError, NoiseSchedule, Sampler, Solver, TimeGrid, VarianceExploding, VPLinear, make_solver, sample
from fewstep.core.statistics import ModelStatistics
from fewstep.models.analytic import MixtureDenoiser
from fewstep.solvers import DPMSolverPP, DPMSolverV3, UniPC
from fewstep.solvers.stencil import ALWAYS, NEVER

pytestmark = pytest.mark.usefixtures("each_integral_once")

GOLDEN_STEP = 1e-10  # two float64 implementations of the same formulas over 20 steps from sigma = 80; measured 6e-13
ROUNDED_TIMES = 5e-6  # the reference rounds the times of past evaluations to float32; measured 1.8e-6
EXACT = 1e-5  # 300 steps of third and fourth order, against a tight Runge-Kutta solution; measured 1e-6


FOLDER = Path(__file__).parents[1] / "golden"


def read(name: str) -> dict[str, torch.Tensor]:
    with np.load(FOLDER / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def mixture(schedule: NoiseSchedule) -> MixtureDenoiser:
    return MixtureDenoiser(schedule, PROBLEM["means"].reshape(5, 3, 2, 2), PROBLEM["stds"], PROBLEM["weights"])


PROBLEM, SAMPLES = read("mixture.npz"), read("baselines.npz")
SCHEDULE = VarianceExploding(t_min=float(PROBLEM["t_0"]), t_max=float(PROBLEM["t_T"]))
DENOISER = mixture(SCHEDULE)
FORMS = {"dpmsolver": "midpoint", "taylor": "taylor"}


def parse(key: str) -> tuple[Solver, int]:
    """The solver and the number of steps that made a sample, from its name."""
    if match := re.fullmatch(r"dpmpp_o(\d)_(\w+)_lof(\d)_n(\d+)", key):
        order, form, lowers, steps = match.groups()
        return DPMSolverPP(int(order), FORMS[form], lower_order_below=10 if lowers == "1" else NEVER), int(steps)
    weights, order, lowers, steps = re.fullmatch(r"unipc_(bh\d)_o(\d)_lof(\d)_n(\d+)", key).groups()
    return UniPC(int(order), weights, lower_order_below=ALWAYS if lowers == "1" else NEVER), int(steps)


@pytest.mark.parametrize("key", sorted(SAMPLES))
@pytest.mark.every(5)
def test_reference_samples(key):
    solver, steps = parse(key)
    sampler = Sampler.build(solver, TimeGrid.logsnr(SCHEDULE, steps), SCHEDULE)
    torch.testing.assert_close(sample(DENOISER, sampler, PROBLEM["x_T"]), SAMPLES[key], rtol=GOLDEN_STEP, atol=GOLDEN_STEP)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpm-solver-3s", "unipc-3"])
def test_many_steps_reach_the_exact_solution(name):
    sampler = Sampler.build(make_solver(name), TimeGrid.logsnr(SCHEDULE, 300), SCHEDULE)
    torch.testing.assert_close(sample(DENOISER, sampler, PROBLEM["x_T"]), PROBLEM["x_exact"], rtol=EXACT, atol=EXACT)


# -- DPM-Solver-v3 --------------------------------------------------------------------------------------------------------------------

LAWS = {"v3_edm": SCHEDULE, "v3_vp": VPLinear()}
SPACINGS = {"logSNR": TimeGrid.logsnr, "time_uniform": TimeGrid.uniform, "time_quadratic": TimeGrid.quadratic, "edm": TimeGrid.karras}
TIES = {"v3_vp-logSNR-8", "v3_vp-logSNR-20"}  # times half-way between two points of the statistics' grid: rounding decides
TWICE = {"v3_edm-time_uniform-20"}  # points of that grid that this spacing meets twice


class Golden:
    """One file of the reference's samples, with the statistics that made them."""

    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz") as arrays:
            self.skips, tensors = arrays["cfg_skip"].tolist(), {key: torch.from_numpy(arrays[key]) for key in arrays if key != "cfg_skip"}
        self.schedule, self.start, self.configs, self.samples = LAWS[name], tensors["x_T"], tensors["cfg"].tolist(), tensors["x_out"]
        self.indices, self.times = (
            {key.removeprefix(f"{kind}__"): value for key, value in tensors.items() if key.startswith(f"{kind}__")} for kind in ("idx", "t")
        )
        lam = tensors["lambda_grid"]
        self.statistics = ModelStatistics(lam, *(tensors[key] for key in "lsb"), (3, 2, 2), self.schedule)
        constants = (torch.full((len(lam), 1, 1, 1), value, dtype=torch.float64) for value in (1, 0, 0))
        self.degenerate = ModelStatistics(lam, *constants, (3, 2, 2), self.schedule)

    def run(self, solver: DPMSolverV3, grid: TimeGrid) -> torch.Tensor:
        return sample(mixture(self.schedule), Sampler.build(solver, grid, self.schedule), self.start)


V3 = {name: Golden(name) for name in LAWS}
GRIDS = {f"{name}-{'-'.join(key.rsplit('_', 1))}": (golden, key) for name, golden in V3.items() for key in golden.times}
CONFIGS = defaultdict(list)  # by grid
for name, golden in V3.items():
    for skip, (steps, *config), samples in zip(golden.skips, golden.configs, golden.samples, strict=True):
        CONFIGS[f"{name}-{skip}-{steps}"].append((golden, f"{skip}_{steps}", config, samples))


@pytest.mark.parametrize("key", CONFIGS)
@pytest.mark.every(6)
def test_v3_samples(key):
    for golden, grid, config, expected in CONFIGS[key]:
        order, corrects, pseudo_corrector, pseudo_predictor, lowers, degenerate = config
        statistics = golden.degenerate if degenerate else golden.statistics
        solver = DPMSolverV3(
            statistics,
            steps=order,
            predictor="pseudo" if pseudo_predictor else "true",
            corrector="none" if not corrects else "pseudo" if pseudo_corrector else "same",
            integrals="trapezoid",
            lower_order_below=ALWAYS if lowers else NEVER,
        )
        actual = golden.run(solver, statistics.grid(golden.schedule, golden.indices[grid]))
        where = lambda text, config=config: f"{config}: {text}"  # noqa: E731
        torch.testing.assert_close(actual, expected, rtol=GOLDEN_STEP, atol=GOLDEN_STEP, msg=where)


def test_all_samples_of_the_reference_are_met():
    assert sum(map(len, CONFIGS.values())) == sum(len(golden.samples) for golden in V3.values()) == 350


@pytest.mark.parametrize("gate", ["always", "half-as-coded"])
@pytest.mark.parametrize("steps", [5, 10, 20])
def test_v3_half_corrector(steps, gate):
    golden = V3["v3_vp"]
    solver = DPMSolverV3(golden.statistics, 2, "true", "pseudo", gate=gate, integrals="trapezoid")
    expected = read("v3_vp_half.npz")[f"time_uniform_{steps}_half{int(gate != 'always')}"]
    torch.testing.assert_close(golden.run(solver, TimeGrid.uniform(golden.schedule, steps)), expected, rtol=GOLDEN_STEP, atol=GOLDEN_STEP)


@pytest.mark.parametrize("corrector", ["none", "pseudo"])
@pytest.mark.parametrize("steps", [5, 10, 20])
def test_v3_as_shipped(steps, corrector):
    golden, shipped = V3["v3_edm"], read("v3_edm_native_precision.npz")
    solver = DPMSolverV3(golden.statistics, 3, "true", corrector, integrals="trapezoid")
    actual = golden.run(solver, golden.statistics.grid(golden.schedule, shipped[f"idx_{steps}"]))
    expected = shipped[f"steps{steps}_cor{'00' if corrector == 'none' else '11'}"]
    torch.testing.assert_close(actual, expected, rtol=0, atol=ROUNDED_TIMES)


@pytest.mark.parametrize("key", GRIDS)
@pytest.mark.every(4, 2)
def test_v3_times(key):
    """Those that the reference moved to the statistics' grid, by their indices and by snapping the spacing."""
    golden, name = GRIDS[key]
    skip, steps = name.rsplit("_", 1)
    spaced, indices = SPACINGS[skip](golden.schedule, int(steps)), golden.indices[name]
    nearest = golden.statistics.indices(golden.schedule.lam(spaced.t))
    if key in TIES:
        assert int((nearest - indices).abs().max()) <= 1
    else:
        assert torch.equal(nearest, indices)
    if key in TWICE:
        with pytest.raises(GridError, match="appears twice"):
            golden.statistics.snap(spaced, golden.schedule)
        return
    by_index = golden.statistics.grid(golden.schedule, indices)
    torch.testing.assert_close(by_index.t, golden.times[name], rtol=GOLDEN_STEP, atol=0)
    if key not in TIES:
        assert torch.equal(golden.statistics.snap(spaced, golden.schedule).t, by_index.t)
