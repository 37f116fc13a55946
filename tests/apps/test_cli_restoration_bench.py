"""``fewstep bench --task``: its rows, table and page, and options that belong to the other benchmark."""

import json
import re
from pathlib import Path

import pytest
from tests.apps.conftest import run

from fewstep.apps.commands import bench as module

WORDS = ("bench", "digits-edm", "--task", "upscale,inpaint:box=3", "--method", "moments,projection", "--nfe", "4,5", "-n", 7)
WORDS += ("--samples", 2, "--several", 3, "--seed", 3, "--batch", 32, "--data", "digits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run(monkeypatch, *WORDS, "--out", out) == 0
    return out


@pytest.mark.slow
def test_the_cost_the_table_and_the_files(monkeypatch, capsys, folder: Path, tmp_path: Path) -> None:
    assert run(monkeypatch, *WORDS, "--report", "--out", folder) == 0
    said = capsys.readouterr().out
    assert "digits-edm: 8 rows, 7 pictures, 2 samples of 3 of them: at most 260 network evaluations" in said
    assert "left out: moments ddim 5: Moments takes 2 network evaluations a step" in said
    assert "upscale:factor=2:noise=0.05: PSNR in dB, difference to moments ddim 4" in said and said.count("pseudo-inverse") == 2
    assert f"rows: {folder / 'results.json'}" in said and f"report: {folder / 'report.html'}" in said
    page = (folder / "report.html").read_text()
    assert "://" not in page and page.count("<svg") == 4 and page.count("image/png") == 2 * 6
    assert "rewards the <em>mean</em>" in page and "inpaint:box=3:noise=0" in page and "prefers-color-scheme: dark" in page
    assert not re.search(r"\bnan\b|\binf\b|None", page.split("<footer>")[0])
    results = json.loads((folder / "results.json").read_text())
    assert results["problem"]["num"] == 7 and results["problem"]["batch"] == 32 and results["problem"]["seed"] == 3
    assert {row["samples"] for row in results["rows"]} == {1, 2} and {row["several"] for row in results["rows"]} == {0, 3}


def test_json_alone_is_printed(monkeypatch, capsys, folder: Path) -> None:
    assert run(monkeypatch, *WORDS, "--json", "--out", folder) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((folder / "results.json").read_text()) and len(told["rows"]) == 8


def test_defaults(monkeypatch, tmp_path: Path) -> None:
    got = []
    monkeypatch.setattr(module, "bench_tasks", lambda model, fields, *rest, **options: got.append((model, fields, options)))
    assert run(monkeypatch, "bench", "digits-edm", "--task", "upscale", "--out", tmp_path) == 0
    model, fields, options = got[0]
    assert model == "digits-edm" and {name: value for name, value in fields.items() if value is not None} == {
        "tasks": ("upscale",),
        "seed": 0,
    }
    assert options == {"report": False, "trust": False, "json": False}
    words = ("--grid", "angle", "--solver", "ddim,unipc-2", "--features", "pixels", "--report", "--json")
    assert run(monkeypatch, *WORDS, *words, "--out", tmp_path) == 0
    fields, options = got[1][1:]
    assert fields == {
        "tasks": ("upscale", "inpaint:box=3"),
        "methods": ("moments", "projection"),
        "solvers": ("ddim", "unipc-2"),
        "nfe": (4, 5),
        "grid": "angle",
        "num": 7,
        "batch": 32,
        "samples": 2,
        "several": 3,
        "seed": 3,
        "data": "digits",
        "features": "pixels",
    }
    assert options == {"report": True, "trust": False, "json": True}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--method", "moments"), "--method is for restoring pictures: say --task too"),
        (("--samples", 3, "--several", 2), "--samples and --several are for restoring pictures"),
        (("--task", "upscale", "--peers", "diffusers"), "--peers is for comparing samplers: leave --peers out with --task"),
        (("--task", "upscale", "--sampler", "here"), "--sampler is for comparing samplers"),
        (("--task", "upscale", "--statistics", "here", "--any-statistics"), "--statistics and --any-statistics are for comparing samplers"),
        (("--task", "upscale", "--guidance", 2), "--guidance is for comparing samplers"),
        (("--task", "upscale", "--grid", "karras,angle"), "all rows are on one grid"),
        (("--task", "blur"), "unknown task 'blur'"),
        (("--task", ""), "at least one task"),
        (("--task", "colorize"), "three colours"),
        (("--task", "upscale:factor=3"), "cannot be averaged"),
        (("--task", "upscale", "--method", "constrained"), "a multiple of 11"),
        (("--task", "upscale", "--samples", 0), "samples is at least 1, got 0"),
        (("--task", "upscale", "--nfe", "5.5"), "--nfe wants whole numbers"),
        (("--task", "upscale", "--data", "nowhere"), "no images at nowhere"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(monkeypatch, capsys, tmp_path: Path, words: tuple[object, ...], says: str) -> None:
    assert run(monkeypatch, "bench", "digits-edm", *words, "--out", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1 and not said.out and not (tmp_path / "out").exists()
