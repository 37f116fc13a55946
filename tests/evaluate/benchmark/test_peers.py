"""Peers that this library has no solver of the name of, against their formulas written down here; where peers evaluate."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep import DiscreteVP, SolverError, TimeGrid, VarianceExploding
from fewstep.core.tableau import Nodes
from fewstep.evaluate.benchmark.peers import PEERS, peer_nodes, peer_steps, run_peer
from fewstep.models.analytic import MixtureDenoiser
from fewstep.sampling.noise import seeded_noise
from fewstep.solvers import SOLVERS

EDM, DISCRETE = VarianceExploding(), DiscreteVP.linear()
GRIDS = {"edm": (EDM, TimeGrid.karras), "discrete": (DISCRETE, TimeGrid.linspace)}
FLOAT64 = 1e-9  # of the largest value: what float64 leaves of 20 steps from sigma = 80


def mixture(schedule) -> MixtureDenoiser:
    return MixtureDenoiser(schedule, seeded_noise(range(6), (1, 4, 4)).double(), torch.full((6,), 0.2, dtype=torch.float64))


class Exploding:
    """A denoiser as the papers of these methods have it: ``D(z, s)`` for ``z = x/alpha``, ``s = sigma/alpha``."""

    def __init__(self, law: str, steps: int, clean: bool) -> None:
        self.schedule, spacing = GRIDS[law]
        grid = spacing(self.schedule, steps)
        self.grid = grid.to_clean(self.schedule) if clean else grid
        self.denoiser = mixture(self.schedule)
        nodes = Nodes.at(self.schedule, self.grid.t)
        self.level = [float(v) for v in nodes.sigma / nodes.alpha]
        self.alpha = nodes.alpha
        self.x = seeded_noise(range(4), (1, 4, 4)).double() * nodes.sigma[0]

    def d(self, z: Tensor, i: int) -> Tensor:
        return self.denoiser(z * self.alpha[i], self.grid.t[i])

    def eps(self, z: Tensor, i: int) -> Tensor:
        return (z - self.d(z, i)) / self.level[i]

    def check(self, name: str, z: Tensor) -> None:
        theirs = run_peer(name, self.denoiser, self.grid, self.x)
        ours = z * self.alpha[-1]
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < FLOAT64


CASES = [(law, steps, clean) for law in GRIDS for steps in (3, 5, 8, 20) for clean in (False, True)]


@pytest.mark.parametrize(("law", "steps", "clean"), CASES)
@pytest.mark.every(3)
def test_lms_integrates_the_polynomial_through_the_last_four_slopes(law: str, steps: int, clean: bool) -> None:
    problem, slopes = Exploding(law, steps, clean), []
    z, s = problem.x / problem.alpha[0], problem.level
    for i in range(steps):
        slopes.append(problem.eps(z, i))
        places, newest = [s[j] / s[i] for j in range(max(0, i - 3), i + 1)], slopes[-4:]
        for k, slope in enumerate(newest):
            others = [p for j, p in enumerate(places) if j != k]
            basis = np.poly1d(others, r=True) / math.prod(places[k] - p for p in others) if others else np.poly1d([1.0])
            integral = np.polyint(basis)
            z = z + s[i] * (integral(s[i + 1] / s[i]) - integral(1.0)) * slope
    problem.check("lms", z)


@pytest.mark.parametrize(("law", "steps", "clean"), CASES)
@pytest.mark.every(4, 2)
def test_pndm_is_adams_bashforth_after_a_trapezoid(law: str, steps: int, clean: bool) -> None:
    problem = Exploding(law, steps, clean)
    z, s = problem.x / problem.alpha[0], problem.level
    first = problem.eps(z, 0)
    guess = z + (s[1] - s[0]) * first
    z = z + (s[1] - s[0]) * (first + problem.eps(guess, 1)) / 2
    past = [first]
    weights = ((3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
    for i in range(1, steps):
        past.append(problem.eps(z, i))
        used = weights[min(len(past), 4) - 2]
        z = z + (s[i + 1] - s[i]) * sum(w * e for w, e in zip(used, reversed(past), strict=False))
    problem.check("pndm", z)


def singlestep(problem: Exploding, orders: list[int]) -> Tensor:
    """DPM-Solver++(2S, 3S) whose stages are consecutive levels: a Taylor expansion of ``D`` at the first of them."""
    s, z = problem.level, problem.x / problem.alpha[0]
    lam = [-math.log(v) if v else math.inf for v in s]
    start, answers, begin = z, [], 0
    for i, order in enumerate(orders):
        if order == 1:
            start, answers, begin = z, [], i
        answers.append(problem.d(z, i))
        h = lam[i + 1] - lam[begin]
        first, ratio, decay = answers[0], s[i + 1] / s[begin], -math.expm1(-h)
        z = ratio * start + decay * first
        if order == 2:
            z = z + decay / 2 * (answers[1] - first) / ((lam[i] - lam[begin]) / h)
        if order == 3:  # the slope from the newest alone, as the "midpoint" form has it
            z = z + (1 - decay / h) * (answers[2] - first) / ((lam[i] - lam[begin]) / h)
    return z


ORDERS = {
    ("dpm-solver-pp-2s", 8, False): [1, 2] * 4,
    ("dpm-solver-pp-2s", 5, False): [1, 2, 1, 2, 1],
    ("dpm-solver-pp-2s", 8, True): [1, 2, 1, 2, 1, 2, 1, 1],
    ("dpm-solver-pp-2s", 5, True): [1, 2, 1, 2, 1],
    ("dpm-solver-pp-3s", 6, False): [1, 2, 3] * 2,
    ("dpm-solver-pp-3s", 5, False): [1, 2, 3, 1, 2],
    ("dpm-solver-pp-3s", 7, True): [1, 2, 3, 1, 2, 3, 1],
    ("dpm-solver-pp-3s", 6, True): [1, 2, 3, 1, 2, 1],
}


@pytest.mark.parametrize(("case", "law"), [(case, law) for case in ORDERS for law in GRIDS])
@pytest.mark.every(4, 2)
def test_singlestep_methods_take_the_levels_for_their_stages(case: tuple[str, int, bool], law: str) -> None:
    name, steps, clean = case
    problem = Exploding(law, steps, clean)
    problem.check(name, singlestep(problem, ORDERS[case]))


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.every(4, 2)
def test_peers_evaluate_as_often_as_was_said(name: str, clean: bool) -> None:
    for nfe in (1, 2, 3, 4, 5, 6, 9, 12):
        try:
            steps = peer_steps(name, nfe, to_clean=clean)
        except SolverError as error:
            assert "use" in str(error)
            continue
        grid = TimeGrid.karras(EDM, steps)
        assert peer_nodes(name, grid.to_clean(EDM) if clean else grid, EDM).evaluations == nfe


def test_pndm_needs_its_first_step_twice() -> None:
    assert [peer_steps("pndm", nfe) for nfe in (1, 3, 6)] == [1, 2, 5]
    with pytest.raises(SolverError, match="use 1 or 3"):
        peer_steps("pndm", 2)


@pytest.mark.slow
def test_every_peer_arrives_with_many_steps() -> None:
    schedule, exact = EDM, mixture(EDM)
    grid = TimeGrid.logsnr(schedule, 120)
    x = seeded_noise(range(4), (1, 4, 4)).double() * 80
    ends = {name: run_peer(name, exact, grid, x) for name in PEERS}
    for name, end in ends.items():
        first_order = name in ("ddim", "euler", "edm-euler")
        assert float((end - ends["unipc-3"]).abs().max()) < (0.3 if first_order else 0.02), name
    assert {name for name in PEERS if name not in SOLVERS} == {
        *("dpm-solver-pp-2s", "dpm-solver-pp-3s", "edm-euler", "edm-dpm-solver-pp-2m", "edm-dpm-solver-pp-3m")
    }
