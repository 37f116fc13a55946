"""Learned rivals begin as the solver that their file says, improve their own loss, and spend no more than they plan."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.rivals import gs, s4s, study
from benchmarks.rivals.amed import AMED, PLUGIN, AmedSampler
from benchmarks.rivals.bns import BNS, NonStationary, flow_uniform
from benchmarks.rivals.drawn import Drawn, DrawnSampler, LearnedSampler, run_drawn, solver_on, steps_of
from benchmarks.rivals.epd import EPD
from benchmarks.rivals.gits import GITS, path
from benchmarks.rivals.gs import GAS, GS, Generalized
from benchmarks.rivals.ld3 import LD3, TimesOf
from benchmarks.rivals.levels import polynomial, vp_uniform
from benchmarks.rivals.oss import OSS, apart
from benchmarks.rivals.rival import Point, Rival
from benchmarks.rivals.s4s import S4S, Multistep
from benchmarks.rivals.teacher import Counted, Teacher
from benchmarks.rivals.training import Ball, Descent, Progress
from benchmarks.tables import printed
from tests.problems import LAW, tiny_folder

from fewstep import Model, Sampler, SolverError, TimeGrid, VPLinear, load_model
from fewstep.core.schedule import NoiseSchedule
from fewstep.evaluate.benchmark.entries import SamplerEntry
from fewstep.models.analytic import MixtureDenoiser
from fewstep.models.problem import Problem
from fewstep.sampling.loop import run

NFE, DDIM, SINGLE = 5, "dpm-solver-pp-2m:steps=1", "dpm-solver-2s"
ALIKE = 2e-5  # relative: float32 states in another order of arithmetic


def toy(schedule: NoiseSchedule = LAW) -> Model:
    """A mixture of pictures [1, 2, 2], at any time of each sample."""
    means = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 0.8
    denoiser = MixtureDenoiser(schedule, means, torch.full((4,), 0.25))

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return denoiser(x, t.double())

    return Model(network, schedule, "sample", shape=(1, 2, 2), name="toy", identity="toy")


def teacher() -> Teacher:
    return Teacher(Problem(toy()))


def middle_inserted(t: torch.Tensor) -> torch.Tensor:
    """Times with the geometric mean of neighbours between them."""
    inner = torch.sqrt(t[:-1] * t[1:])
    return torch.cat([torch.stack([t[:-1], inner], 1).flatten(), t[-1:]])


# -- what each is at first ----------------------------------------------------------------------------------------------


def first_ld3() -> tuple[LearnedSampler, str, torch.Tensor]:
    return DrawnSampler.of(TimesOf(LAW, "ipndm", NFE).drawn()), "ipndm", TimeGrid.logsnr(LAW, NFE).t


def first_s4s(move: bool) -> tuple[LearnedSampler, str, torch.Tensor]:
    t = polynomial(LAW, NFE)
    return DrawnSampler.of(Multistep(LAW, t, move=move).drawn()), s4s.PARENT, t


def first_bns() -> tuple[LearnedSampler, str, torch.Tensor]:
    return DrawnSampler.of(NonStationary(LAW, NFE).drawn()), DDIM, flow_uniform(LAW, NFE)


def first_gs() -> tuple[LearnedSampler, str, torch.Tensor]:
    return DrawnSampler.of(Generalized(LAW, NFE).drawn()), gs.PARENT, vp_uniform(LAW, NFE)


def first_amed() -> tuple[LearnedSampler, str, torch.Tensor]:
    stepper = AMED(features="none").stepper(teacher(), 6)
    torch.nn.init.zeros_(stepper.predictor.out.weight)  # r = 1/2 and no scales: DPM-Solver-2
    torch.nn.init.zeros_(stepper.predictor.out.bias)
    return AmedSampler(stepper, 6), SINGLE, vp_uniform(LAW, 3)


def first_plugin() -> tuple[LearnedSampler, str, torch.Tensor]:
    stepper = replace(PLUGIN, features="none").stepper(teacher(), 6)
    torch.nn.init.zeros_(stepper.predictor.out.weight)
    torch.nn.init.zeros_(stepper.predictor.out.bias)
    return AmedSampler(stepper, 6), "ipndm", middle_inserted(polynomial(LAW, 3))


def first_epd() -> tuple[LearnedSampler, str, torch.Tensor]:
    return DrawnSampler.of(EPD(points=1).ensemble(teacher(), 6).drawn()), SINGLE, polynomial(LAW, 3)


@pytest.mark.parametrize(
    "first",
    [
        first_ld3,
        lambda: first_s4s(move=False),
        lambda: first_s4s(move=True),
        first_bns,
        first_gs,
        first_amed,
        first_plugin,
        first_epd,
    ],
    ids=["ld3", "s4s", "s4s-alt", "bns", "gs", "amed", "plugin", "epd"],
)
def test_each_begins_as_the_solver_that_it_says(first: Callable[[], tuple[LearnedSampler, str, torch.Tensor]]) -> None:
    sampler, solver, t = first()
    problem = Problem(toy())
    x, known = problem.start(range(6)), Sampler.build(solver, TimeGrid(t), LAW)
    wanted = run(problem.teacher, known.tableau, x)
    made = sampler.samples(problem.teacher, x, None)
    assert sampler.nfe == known.nfe
    assert float((made - wanted).abs().max()) < ALIKE * float(x.abs().max())
    assert sampler.ends.tolist() == [LAW.t_max, LAW.t_min]


@pytest.mark.parametrize("rival", [AMED(features="none"), replace(PLUGIN, features="none"), EPD()], ids=["amed", "plugin", "epd"])
def test_an_odd_number_of_evaluations_has_its_first_for_nothing(rival: AMED | EPD) -> None:
    learner = teacher()
    if isinstance(rival, AMED):
        sampler: Any = AmedSampler(rival.stepper(learner, NFE), NFE)
    else:
        sampler = DrawnSampler.of(rival.ensemble(learner, NFE).drawn())
    counted = Counted(learner.problem.teacher)
    sampler.samples(counted, learner.problem.start(range(3)), None)
    assert counted.cost.evaluations == 3 * NFE and sampler.nfe == NFE


def test_told_times_of_the_tableau_change_nothing_and_others_do() -> None:
    problem, tableau = Problem(toy()), solver_on("ipndm", LAW, polynomial(LAW, NFE))
    x, times = problem.start(range(4)), tuple(tableau.nodes.t[:-1])
    plain = run_drawn(problem.teacher, Drawn(tableau), x)
    for carried in ("epsilon", "sample"):
        same = run_drawn(problem.teacher, Drawn(tableau, times, carried), x)
        torch.testing.assert_close(same, plain, rtol=0, atol=1e-4)
    others = [
        run_drawn(problem.teacher, Drawn(tableau, (times[0], *(1.1 * t for t in times[1:])), carried), x)
        for carried in ("epsilon", "sample")
    ]
    assert float((others[0] - plain).abs().max()) > 1e-2 < float((others[1] - others[0]).abs().max())


def test_a_ball_holds_its_starts() -> None:
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double()
    ball = Ball(x.clone(), x, radius=0.1, unit=2.0)
    for _ in range(5):
        ball.near = ball.moved(torch.arange(3), torch.ones(3, 2, dtype=torch.float64))
    torch.testing.assert_close((ball.near - x).norm(dim=1), torch.full((3,), 0.2, dtype=torch.float64))


def test_errors_can_be_those_of_features() -> None:
    features = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).requires_grad_(False)
    learner = Teacher(Problem(toy()), features)
    made, wanted = torch.randn(2, 5, 1, 2, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    found = learner.distance(made.requires_grad_(), wanted)
    torch.testing.assert_close(found, (features(made) - features(wanted)).square().mean(1))
    assert float(torch.autograd.grad(found.sum(), made)[0].abs().max()) > 0
    torch.testing.assert_close(teacher().distance(made, wanted), (made - wanted).square().mean((1, 2, 3)))


def test_a_gain_is_one_of_logarithms_too() -> None:
    progress, numbers = Progress(), torch.nn.Linear(1, 1)
    assert [progress.check(value, i, numbers) for i, value in enumerate([math.inf, 1.0, 0.9999, 0.9, -2.0, -2.001, -2.1, -2.0])] == [
        *(False, True, False, True, True, False, True, False)
    ]
    assert (progress.best, progress.gained) == (-2.1, 6)
    assert [Descent(n, 1, 1, 1).checks for n in (1, 50, 175)] == [2, 51, 60]


def test_dynamic_programs_find_the_least() -> None:
    costs = torch.rand(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def total(way: tuple[int, ...]) -> float:
        return sum(1.15**k * float(costs[i, j]) for k, (i, j) in enumerate(itertools.pairwise((0, *way, 6))))

    best = min(itertools.combinations(range(1, 6), 3), key=total)
    assert path(costs, 4, 1.15) == [0, *best, 6]
    assert apart(torch.tensor([0.0, 0, 0, 5, 6]), 6) == [0, 1, 2, 5, 6]
    assert apart(torch.tensor([0.0, 6, 6, 6, 6]), 6) == [0, 3, 4, 5, 6]


def test_a_schedule_of_oss_ends_where_its_program_says() -> None:
    learner, rival = teacher(), OSS(teacher_steps=20, num=2)
    t, (x, cond) = polynomial(LAW, 20), learner.start(range(2))
    places = rival.schedules(learner, t, x, cond, 3)
    exact = run(learner.problem.teacher, solver_on(DDIM, LAW, t), x)
    assert places[:, 0].tolist() == [0, 0] and places[:, -1].tolist() == [20, 20]

    def error(k: int, way: list[int]) -> float:
        made = run(learner.problem.teacher, solver_on(DDIM, LAW, t[torch.tensor(way)]), x[k : k + 1])
        return float((made - exact[k : k + 1]).square().mean())

    for k in range(2):
        assert error(k, places[k].tolist()) <= error(k, [0, 7, 14, 20])


def test_what_a_rival_is_not_for_is_refused() -> None:
    assert EPD().why_not(4) and not any(EPD().why_not(n) for n in (3, 5, 6, 8)) and GITS().why_not(61) and OSS().why_not(201)
    law = Teacher(Problem(toy(VPLinear())))
    for rival in (AMED(features="none"), EPD()):
        with pytest.raises(SolverError, match="written for the law"):
            rival.fit(law, 4)
    with pytest.raises(SolverError, match="has no mid_block"):
        AMED().fit(teacher(), 4)
    with pytest.raises(SolverError, match="the critic sees pictures"):
        GAS().against((4,))
    with pytest.raises(SolverError, match="start from one of DPM-Solver"):
        steps_of(solver_on("ipndm", LAW, polynomial(LAW, 3)))
    with pytest.raises(SolverError, match="2 evaluations in each step"):
        solver_on("heun", LAW, polynomial(LAW, 3))


# -- what they learn ----------------------------------------------------------------------------------------------------

SHORT = {"num": 64, "held_out": 32}
LEARNERS: dict[str, Rival] = {
    "ld3": LD3(iterations=15, num=16, held_out=32),
    "s4s": S4S(iterations=25, **SHORT),
    "s4s-alt": S4S(iterations=24, alternations=4, **SHORT),
    "bns": BNS(iterations=40, batch=16, rate=2e-3, **SHORT),
    "gs": GS(iterations=40, batch=16, **SHORT),
    "gas": GAS(iterations=40, batch=16, **SHORT),
    "amed": AMED(features="none", iterations=15, batch=32),
    "amed, exact": AMED(features="none", iterations=15, batch=32, exact=24),
    "plugin": replace(PLUGIN, features="none", iterations=20, batch=32),
    "epd": EPD(iterations=15, batch=32),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_each_improves_its_own_loss_at_the_cost_that_it_plans(name: str) -> None:
    rival, learner = LEARNERS[name], teacher()
    found = rival.fit(learner, NFE)
    held_out = [point.held_out for point in found.curve if point.held_out is not None]
    if held_out:
        change = min(held_out) - held_out[0] if name == "bns" else math.log(min(held_out) / held_out[0])  # BNS has a logarithm already
    else:  # fresh noises in every iteration, the same ones without a rate
        unlearned = replace(rival, rate=0.0).fit(teacher(), NFE).curve
        ratios = [one.loss / other.loss for one, other in zip(found.curve, unlearned, strict=True)]
        change = math.log(sorted(ratios[-9:])[4])  # the median: a sample between two pictures decides a mean
    assert change < -0.05
    planned, spent = rival.cost(NFE), learner.cost
    assert 0 < spent.gradient <= planned.gradient and planned.forward / 2 < spent.forward <= planned.forward
    made = found.sampler.samples(learner.problem.teacher, learner.problem.start(range(4)), None)
    assert found.sampler.nfe == NFE and bool(torch.isfinite(made).all())


@pytest.mark.parametrize("rival", [GITS(teacher_steps=20, num=16), OSS(teacher_steps=20, num=2)], ids=["gits", "oss"])
def test_programs_take_no_gradient_and_cost_what_they_plan(rival: Rival) -> None:
    learner = teacher()
    found = rival.fit(learner, 4)
    assert learner.cost.gradient == 0 and not found.curve and found.sampler.nfe == 4
    assert 0.7 * rival.cost(4).forward < learner.cost.forward <= rival.cost(4).forward


@pytest.mark.slow
def test_amed_sees_the_image(tmp_path: Path) -> None:
    model = load_model(tiny_folder(tmp_path / "tiny"))
    learner = Teacher(Problem(model))
    sampler = AMED(iterations=3, batch=8).fit(learner, NFE).sampler
    assert isinstance(sampler, AmedSampler)
    bottleneck, predictor = sampler.stepper.bottleneck, sampler.stepper.predictor
    assert bottleneck is not None and predictor.features > 0
    x, t = learner.problem.start(range(3)), LAW.ends[0] / 4
    with bottleneck.watched(), torch.no_grad():
        learner.denoiser(x, t)
        places, _, _ = predictor(bottleneck.of(3), t, t / 2)
    assert len(set(places.tolist())) == 3
    together = sampler.samples(learner.denoiser, x, None)
    alone = torch.cat([sampler.samples(learner.denoiser, x[k : k + 1], None) for k in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


# -- the study ----------------------------------------------------------------------------------------------------------


def test_figures_and_curves() -> None:
    errors = torch.tensor([0.1] * 97 + [0.2, 0.5, 0.9])
    found = study.figures(errors)
    assert found["parted"] == pytest.approx(0.02) and found["p99"] == pytest.approx(0.504, abs=1e-3)
    curve = [Point(0, math.nan, 2.0), *(Point(i, 1 / i, 1 / i if i % 2 == 0 else None) for i in range(1, 400))]
    shown = study.thinned(curve)
    assert shown[0] == [0, None, 2.0] and len(shown) <= study.SHOWN + 1 and shown[-1] == [398, 0.002513, 0.002513]
    assert study.thinned([]) == []
    assert BNS().longer(0.1).iterations == 1500 and GITS().longer(0.1) == GITS()


@pytest.mark.slow
def test_a_study_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = toy()
    short = {
        "gits": GITS(teacher_steps=20, num=8),
        "bns": BNS(iterations=10, batch=8, num=16, held_out=8),
        "epd": EPD(iterations=2, batch=8),
    }
    monkeypatch.setattr(study, "RIVALS", short)
    monkeypatch.setattr(study, "MODELS", {"toy": (32, "pixels")})
    monkeypatch.setattr(study, "load_model", lambda name: model)
    known = Sampler.build("ipndm", "karras", LAW, nfe=4)
    monkeypatch.setattr(study.Bench, "fitted", lambda self, nfe: SamplerEntry(self.problem, "fitted", "optimized", nfe, given=known))
    out, work = tmp_path / "out.json", ["--work", str(tmp_path / "work"), "--nfe", "4"]
    study.main(["--out", str(out), *work, "--plan"])
    assert "together" in capsys.readouterr().out and not out.exists()
    study.main(["--out", str(out), *work, "--rival", "gits"])
    study.main(["--out", str(out), *work])
    first = out.read_text()
    rows = json.loads(first)["rows"]
    assert [row["rival"] for row in rows] == ["fitted", "gits", "bns", "epd"] and "multiple of 3" in rows[3]["refused"]
    assert rows[2]["gradient"] > 0 == rows[1]["gradient"] and rows[2]["verdict"] in ("better", "worse", "equal") and rows[2]["curve"]
    assert {"rmse", "mean_error", "p99", "parted", "forward", "seconds", "needs"} <= set(rows[1])
    study.main(["--out", str(out), *work])
    assert out.read_text() == first
    study.main(["--out", str(out), *work, "--times", "0.5", "--rival", "bns"])
    assert [row["rival"] for row in json.loads(out.read_text())["rows"]] == ["fitted", "gits", "bns", "epd", "bns"]


def test_rivals_are_printed_beside_the_fitted_sampler(tmp_path: Path) -> None:
    def row(rival: str, nfe: int, error: float, **more: Any) -> dict[str, Any]:
        return {
            "model": "m",
            "num": 4,
            "nfe": nfe,
            "rival": rival,
            "mean_error": error,
            "rmse": 2 * error,
            "p99": 3 * error,
            "parted": 0.01,
            **more,
        }

    def learned(rival: str, nfe: int, error: float, verdict: str, iterations: int = 9) -> dict[str, Any]:
        spent = {"forward": 1000, "gradient": 500, "seconds": 90, "needs": "gradients"}
        return row(rival, nfe, error, distance="l2", verdict=verdict, settings={"iterations": iterations}, **spent)

    refused = {"model": "m", "num": 4, "nfe": 4, "rival": "epd", "distance": "l2", "settings": {"iterations": 3}, "refused": "why"}
    rows = [row("fitted", 4, 0.1), learned("bns", 4, 0.05, "better"), refused, row("fitted", 5, 0.02), learned("bns", 5, 0.03, "worse")]
    rows.append(learned("bns", 5, 0.02, "equal", 18))
    (tmp_path / "rows").write_text(json.dumps({"rows": rows}))
    lines = printed(["rivals", str(tmp_path / "rows")]).splitlines()
    assert lines[2:] == [
        "| `m` | fitted | 0.1000 (0.2000) | 0.0200 (0.0400) |",
        "| `m` | bns, 9 iterations | **0.0500 (0.1000)** | 0.0300 (0.0600) |",
        "| `m` | epd | refused |  |",
        "| `m` | bns, 18 iterations |  | 0.0200 (0.0400) |",
    ]
    assert "| **0.1500, 1.0%** | 0.0900, 1.0% |" in printed(["rivals", str(tmp_path / "rows"), "--part", "tails"])
    assert "| bns, 9 iterations | gradients | 1,000 | 500 | 1.5 |" in printed(["rivals", str(tmp_path / "rows"), "--part", "cost"])
