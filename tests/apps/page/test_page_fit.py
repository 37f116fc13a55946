"""The tab *Fit*: the plan is the library's, and what was made is shown, taken away and exported."""

from zipfile import ZipFile

import pytest

from fewstep import FewstepError, FitConfig, fit, plan_fit
from fewstep.apps.page.fit import _typed, begin_fit, export_of, gain_of, planned, samplers_in, zipped
from fewstep.apps.page.workshop import Workshop

SMALL = FitConfig(num=8, held_out=4, noises=4, levels=8, iterations=0, move=False)


def test_the_plan_says_what_a_fit_costs(shop: Workshop) -> None:
    text = planned(shop.models, "digits-edm", "5, 8", 1.0, 3000)
    plan = plan_fit(shop.models.open("digits-edm"), [5, 8], FitConfig(budget=3000))
    assert f"{plan.evaluations:,}" in text and f"{plan.num} trajectories" in text and "seconds" in text


@pytest.mark.parametrize(
    ("nfe", "guidance", "budget", "says"),
    [("five", 1.0, None, "whole numbers"), ("40", 1.0, None, "1 to 20"), ("5", 1.0, 3, "budget"), ("5", "x", None, "guidance is a number")],
)
def test_what_cannot_be_fitted_is_refused_before_it_begins(shop: Workshop, nfe: str, guidance: object, budget: int, says: str) -> None:
    with pytest.raises(FewstepError, match=says):
        begin_fit(shop, "digits-edm", nfe, guidance, budget)
    assert shop.jobs.names("fit") == []


@pytest.mark.parametrize("budget", ["1e9", "-5", "²", "9" * 5000])
def test_a_budget_that_is_no_number(budget: str) -> None:
    with pytest.raises(FewstepError, match="a budget is a number of network evaluations"):
        _typed(("digits-edm", "5", 1.0, budget))
    assert _typed(("digits-edm", "5", 1.0, "3,000"))[3] == 3000 and _typed(("digits-edm", "5", 1.0, None))[3] is None


def test_what_it_makes(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.apps.cli.main", lambda: None)
    job = begin_fit(shop, "digits-edm", "3", 1.0, 2000)
    assert shop.jobs.words(job) == ["fit", "digits-edm", "--nfe", "3", "--budget", "2000", "--out", str(shop.out / job)]
    assert gain_of([]) == ""
    with pytest.raises(FewstepError, match="none is there yet"):
        zipped(shop, job, "nfe-03")
    fit(shop.models.open("digits-edm"), [3], out=shop.out / job, config=SMALL)
    made = samplers_in(shop.out / job)
    assert list(made) == ["nfe-03"] and made["nfe-03"].card["best_hand_made"] in gain_of(list(made.values()))
    with ZipFile(zipped(shop, job, "nfe-03")) as archive:
        assert f"{job}-nfe-03/sampler.safetensors" in archive.namelist()
    assert len(export_of(shop, job, "nfe-03", "sigmas", True).values) == 4
    with pytest.raises(FewstepError, match="has no sampler"):
        export_of(shop, job, "../../nfe-03", "sigmas", True)
