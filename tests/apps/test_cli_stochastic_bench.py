"""``fewstep bench --stochastic``: its rows, table and page, and options that belong to another benchmark."""

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from tests.apps.conftest import run

from fewstep.evaluate.report.stochastic_page import write_stochastic
from fewstep.evaluate.stochastic.rows import read_noise_results
from fewstep.evaluate.stochastic.run import StochasticBenchConfig
from fewstep.runtime.errors import FewstepError

WORDS = ("bench", "digits-edm", "--stochastic", "--solver", "ddim,ddim:eta=1,heun-churn", "--grid", "karras", "--nfe", 3, "-n", 34)
WORDS += ("--paths", 2, "--seed", 5, "--batch", 34)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run, and what it printed."""
    out, said = tmp_path_factory.mktemp("bench"), io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, redirect_stdout(said):
        assert run(monkeypatch, *WORDS, "--report", "--out", out) == 0
    return out, said.getvalue()


@pytest.fixture(scope="module")
def folder(made: tuple[Path, str]) -> Path:
    return made[0]


def test_the_cost_the_table_the_verdict_and_the_page(made: tuple[Path, str]) -> None:
    folder, said = made
    assert "digits-edm: 2 rows, 34 noises, 2 noise paths: at most 306 network evaluations" in said
    assert "no row: HeunChurn takes 2 evaluations a step and cannot use exactly 3" in said
    assert "digits-edm: Frechet distance (± over noise paths) of 34 samples to 1797 images, in the features digits" in said
    assert "(two halves of the data: 0.79)" in said
    assert re.search(r"3 +ddim +karras +none ", said) and re.search(r"3 +ddim:eta=1 +karras +2 ", said)
    assert len(re.findall(r"with 3 evaluations: (?:noise is better|no noise is better|not apart) \(with noise ", said)) == 1
    assert f"rows: {folder / 'results.json'}" in said and f"report: {folder / 'report.html'}" in said
    page = (folder / "report.html").read_text()
    assert "://" not in page and page.count("<svg") == 1 and page.count("image/png") == 1 + 2
    assert "follows none" in page and "<b>Labels</b>" in page and "prefers-color-scheme: dark" in page
    assert not re.search(r"\bnan\b|\binf\b|None", page.split("<footer>")[0])
    results = json.loads((folder / "results.json").read_text())
    assert (results["problem"]["num"], results["problem"]["seed"], results["problem"]["paths"]) == (34, 5, 2)
    assert all(row["labels"] is not None and row["fd_features"] == "digits" for row in results["rows"])


@pytest.mark.slow
def test_json_alone_is_printed(monkeypatch, capsys, folder: Path) -> None:
    assert run(monkeypatch, *WORDS, "--json", "--out", folder) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((folder / "results.json").read_text()) and len(told["rows"]) == 2


def test_a_page_without_pictures_and_without_rows(folder: Path, tmp_path: Path) -> None:
    results = read_noise_results(folder / "results.json")
    assert "image/png" not in write_stochastic(results, tmp_path).read_text()
    failed = [{**row, "fd": None, "failed": "why"} for row in results["rows"]]
    with pytest.raises(FewstepError, match="no row in .* has figures"):
        write_stochastic({**results, "rows": failed}, tmp_path)


def test_what_is_typed_reaches_the_benchmark(monkeypatch, tmp_path: Path) -> None:
    got = list[StochasticBenchConfig]()

    def planned(problem: object, config: StochasticBenchConfig) -> None:
        got.append(config)
        raise FewstepError("that is enough")

    monkeypatch.setattr("fewstep.apps.commands.bench_stochastic.StochasticBench.of", planned)
    assert run(monkeypatch, "bench", "digits-edm", "--stochastic", "--out", tmp_path) == 2
    assert len(got[0].solvers) == 9 and (got[0].grids, got[0].nfe, got[0].paths, got[0].num) == (("karras", "angle"), (5, 10, 20), 4, 512)
    words = ("--features", "pixels", "--data", "digits", "--guidance", 2, "--peers", "diffusers", "--statistics", tmp_path)
    assert run(monkeypatch, *WORDS[:3], "--solver", "dpm-solver-v3,sa-solver", "--any-statistics", *words, "--out", tmp_path) == 2
    assert (got[1].features, got[1].data, got[1].guidance, got[1].peers) == ("pixels", "digits", 2.0, ("diffusers",))
    assert (got[1].solvers, got[1].statistics, got[1].any_statistics) == (("dpm-solver-v3", "sa-solver"), tmp_path, True)
    assert run(monkeypatch, *WORDS, "--sampler", tmp_path / "mine", "--out", tmp_path) == 2
    assert (got[2].samplers, got[2].num, got[2].seed, got[2].batch, got[2].paths) == ((tmp_path / "mine",), 34, 5, 34, 2)
    assert run(monkeypatch, *WORDS[:3], "--sampler", tmp_path / "mine", "--out", tmp_path) == 2
    assert (got[3].solvers, got[3].grids, got[3].nfe) == ((), (), ())  # these alone


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--paths", 2), "--paths is for comparing samplers that add noise: say --stochastic too"),
        (("--stochastic", "--task", "upscale"), "--stochastic and --task are two benchmarks"),
        (("--task", "upscale", "--paths", 2), "--paths is for comparing samplers that add noise"),
        (("--stochastic", "--method", "moments"), "--method is for restoring pictures"),
        (("--stochastic", "--paths", 1), "paths is at least 2, got 1"),
        (("--stochastic", "-n", 32), "needs more than 32 samples, got 32: make 33 or more (--num)"),
        (("--stochastic", "--solver", "ddim"), "none of ddim adds noise"),
        (("--stochastic", "--solver", "sa-solver", "--any-statistics"), "none of sa-solver takes statistics: leave --any-statistics out"),
        (("--stochastic", "--nfe", "5.5"), "--nfe wants whole numbers"),
        (("--solver", "sa-solver", "--nfe", 3, "--grid", "karras"), "sa-solver adds noise, so its samples follow no trajectory"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(monkeypatch, capsys, tmp_path: Path, words: tuple[object, ...], says: str) -> None:
    assert run(monkeypatch, "bench", "digits-edm", *words, "--out", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert says in said.err and not said.out and not (tmp_path / "out").exists()
