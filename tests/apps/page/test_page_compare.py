"""The tabs *Compare* and *Inspect*: what they begin is what is typed, and only what lies below the page's folder is opened."""

import json
from pathlib import Path

import pytest

from fewstep import FewstepError, compare
from fewstep.apps.page.compare import begin_compare, report_of, runs_below, samplers_to_compare
from fewstep.apps.page.inspect import begin_inspect, cost_of, page_of
from fewstep.apps.page.workshop import Workshop


@pytest.fixture
def still(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """A workshop whose jobs do nothing."""
    monkeypatch.setattr("fewstep.apps.cli.main", lambda: None)
    return shop


def test_a_comparison_is_a_benchmark(still: Workshop) -> None:
    solvers, grids = samplers_to_compare(still.models, "digits-edm")
    assert solvers[0] == "fitted" and "karras" in grids and "recommended" not in solvers
    assert {"heun", "dpm-solver-3s", "dpm-solver-v3"} < set(solvers) and not {"ddpm", "heun-churn", "seeds-3", "sa-solver"} & set(solvers)
    job = begin_compare(still, "digits-edm", ["ddim", "unipc-2"], ["angle"], "8,5", 16, 3, 2.0)
    typed = "bench digits-edm --guidance 2 --solver ddim,unipc-2 --grid angle --nfe 5,8 -n 16 --seed 3 --report --out"
    assert still.jobs.words(job) == [*typed.split(), str(still.out / job)]
    own = begin_compare(still, "digits-flow-map", [], [], "1,2", 16, 0, 1.0)
    assert still.jobs.words(own)[:4] == ["bench", "digits-flow-map", "--nfe", "1,2"]


@pytest.mark.parametrize(
    ("solvers", "grids", "nfe", "num", "says"),
    [
        (["--help"], ["angle"], "5", 16, "choose from the list"),
        (["ddim"], ["../x"], "5", 16, "choose from the list"),
        ([], ["angle"], "5", 16, "at least one solver"),
        (["ddim"], ["angle"], "0", 16, "1 to 200 evaluations"),
        (["ddim"], ["angle"], "5,1000000000", 16, "1 to 200 evaluations"),
        (["ddim"], ["angle"], "5", 10**9, "noises"),
        (["ddim", "unipc-2"], ["angle"], ",".join(map(str, range(1, 120))), 16, "238 rows"),
    ],
)
def test_rows_that_it_does_not_take(shop: Workshop, solvers: list[str], grids: list[str], nfe: str, num: int, says: str) -> None:
    with pytest.raises(FewstepError, match=says):
        begin_compare(shop, "digits-edm", solvers, grids, nfe, num, 0, 1.0)


@pytest.mark.slow
@pytest.mark.usefixtures("short_reference")
def test_reports_of_runs_below_its_folder(shop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "results.json").write_text("{}")
    compare(shop.models.open("digits-edm"), "ddim", nfe=3, grid="angle", num=4, out=shop.out / "typed")
    assert runs_below(shop.out) == [str(shop.out / "typed")]
    assert "sandbox" in report_of(shop, str(shop.out / "typed")) and "ddim" in report_of(shop, str(shop.out / "typed"))
    for place in (str(elsewhere), str(shop.out / "typed" / ".." / ".." / elsewhere.name), ""):
        with pytest.raises(FewstepError, match="choose one of the list"):
            report_of(shop, place)
    (shop.out / "typed" / "results.json").write_text(json.dumps({"rows": "<script>"}))
    with pytest.raises(FewstepError):
        report_of(shop, str(shop.out / "typed"))


def test_an_inspection_is_a_command(still: Workshop) -> None:
    assert cost_of(still, "digits-edm", 8, 8).startswith("up to ")
    job = begin_inspect(still, "digits-edm", "unipc-2", "default", 6, 4, 1.0)
    assert still.jobs.words(job)[:-2] == ["inspect", "digits-edm", "--solver", "unipc-2", "--nfe", "6", "-n", "4"]
    assert page_of(still, job) == ""
    Path(still.out / job).mkdir()
    (still.out / job / "inspect.html").write_text('<p class="a">page</p>')
    assert 'srcdoc="&lt;p class=&quot;a&quot;&gt;page' in page_of(still, job)
    with pytest.raises(FewstepError, match="is a student"):
        begin_inspect(still, "digits-flow-map", "recommended", "default", 6, 4, 1.0)
