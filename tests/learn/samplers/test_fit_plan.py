"""A plan stays within its budget, does more with more, keeps what is named, and is refused where there is no room for it."""

from dataclasses import replace
from pathlib import Path

import pytest
from tests.problems import toy

from fewstep import FewstepError, FitConfig, FitForm, ModelError, SolverError, load_model
from fewstep.learn.samplers import fit_plan
from fewstep.learn.samplers.fit import plan_fit
from fewstep.learn.samplers.fit_plan import EFFORTS, LARGE, SMALL, default_budget, plan_of

SHAPES = {"digits": (1, 8, 8), "sdxl": (4, 128, 128), "flux": (16, 128, 128), "wan": (16, 21, 60, 104)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("counts", [(5,), (5, 8), (1, 2, 3), (4, 5, 6, 8, 10)], ids=str)
@pytest.mark.every(5)
def test_a_budget_is_kept_and_used(shape: str, counts: tuple[int, ...]) -> None:
    seen = []
    for budget in (3000, 10_000, 30_000, 150_000):
        plan = plan_of(FitConfig(), counts, SHAPES[shape], budget)
        assert plan.evaluations == sum(plan.stages().values()) <= budget
        seen.append((plan.num, EFFORTS.index(plan.effort)))
        if shape == "digits" and counts != (1, 2, 3):
            assert plan.evaluations > 0.7 * budget
    assert [effort for _, effort in seen] == sorted((effort for _, effort in seen), reverse=True)  # the first is the most thorough


@pytest.mark.slow
def test_memory_and_disk_do_not_grow_with_the_budget() -> None:
    """States of video models fit in what a workstation has; the number of noises stops where they would not."""
    for shape, memory, disk in (("sdxl", 3, 1), ("flux", 6, 2), ("wan", 16, 12)):
        plan = plan_of(FitConfig(), (5, 8), SHAPES[shape], 3000)
        assert plan.memory < memory * 2**30 and plan.disk < disk * 2**30
        assert plan.form.shape(SHAPES[shape]) == ()  # one coefficient for all
        large = plan_of(FitConfig(), (5, 8), SHAPES[shape], 10**6)
        assert large.memory < 24 * 2**30
    assert plan_of(FitConfig(), (5, 8), SHAPES["digits"], 3000).form == FitForm(pool="element")
    each = plan_of(FitConfig(FitForm(pool="element")), (5, 8), SHAPES["sdxl"], 3000)
    assert each.form.shape(SHAPES["sdxl"]) == SHAPES["sdxl"] and each.memory > plan_of(FitConfig(), (5, 8), SHAPES["sdxl"], 3000).memory
    channel = FitForm(pool="channel")
    assert plan_of(FitConfig(channel), (5, 8), SHAPES["wan"], 3000).form == channel


@pytest.mark.slow
def test_what_is_named_stays() -> None:
    named = {"num": 40, "held_out": 7, "levels": 30, "noises": 11, "iterations": 3, "batch": 5}
    plan = plan_of(FitConfig(**named), (5,), SHAPES["digits"], 3000)  # as many as are named, whatever it costs
    assert {name: getattr(plan.config, name) for name in named} == named and plan.sweeps(5) == 3
    assert plan_of(FitConfig(num=1000), (5,), SHAPES["digits"], 3000).evaluations > 3000
    with pytest.raises(
        FewstepError, match="a budget of 3000 network evaluations is too small for samplers of 5 with the num that are named"
    ):
        plan_of(FitConfig(num=1000, budget=3000), (5,), SHAPES["digits"], 3000)
    assert plan_of(FitConfig(), (30,), SHAPES["digits"], 30_000).levels >= 60  # at least two cells for each evaluation
    assert plan_of(FitConfig(num=16, iterations=0), (5,), SHAPES["digits"], 3000).sweeps(5) == 0
    assert plan_of(FitConfig(noises=40), (5, 8), SHAPES["digits"], 30_000).num >= 40  # they are some of the trajectories
    with pytest.raises(FewstepError, match=r"too small for samplers of 5, 8 with the noises that are named: the least fit takes \d{4}"):
        plan_of(FitConfig(noises=200), (5, 8), SHAPES["digits"], 3000)


@pytest.mark.slow
def test_a_budget_that_is_too_small_says_what_the_least_is() -> None:
    with pytest.raises(
        FewstepError, match=r"a budget of 100 network evaluations is too small for samplers of 5, 8: the least fit takes \d+"
    ) as error:
        plan_of(FitConfig(budget=100), (5, 8), SHAPES["digits"], 3000)
    least = int(str(error.value).split()[-1])
    assert plan_of(FitConfig(budget=least), (5, 8), SHAPES["digits"], 3000).evaluations == least


def test_the_default_budget_goes_by_the_size_of_the_model() -> None:
    assert default_budget(load_model("digits-edm")) == SMALL and default_budget(toy()) in (SMALL, LARGE)
    assert default_budget(replace(load_model("digits-edm"), shape=(3, 64, 64))) == LARGE


def test_a_plan_is_refused_where_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(FitConfig(), (5, 8), SHAPES["wan"], 3000)
    monkeypatch.setattr(fit_plan, "available_memory", lambda: None)  # not said
    monkeypatch.setattr(fit_plan.shutil, "disk_usage", lambda path: type("", (), {"free": plan.disk}))
    plan.check(tmp_path / "not" / "there")
    monkeypatch.setattr(fit_plan, "available_memory", lambda: 2**30)
    with pytest.raises(FewstepError, match=r"this fit needs about \d+\.\d GiB of memory, and 1\.0 GiB are free: give it a smaller budget"):
        plan.check(tmp_path)
    monkeypatch.setattr(fit_plan.shutil, "disk_usage", lambda path: type("", (), {"free": 2**20}))
    with pytest.raises(FewstepError, match=r"GiB of disk, and 0\.0 GiB are free"):
        plan.check(tmp_path)


def test_mistakes_are_named() -> None:
    for nfe in ((), (0,), (3, -1)):
        with pytest.raises(SolverError, match="a fit takes at least 1 evaluation, got"):
            plan_fit(toy(), nfe)
    with pytest.raises(FewstepError, match="unexpected keyword argument 'budget'"):
        plan_fit(toy(), 5, budget=3000)
    with pytest.raises(ModelError, match="this takes a fewstep.Model"):
        plan_fit("digits-edm", 5)
