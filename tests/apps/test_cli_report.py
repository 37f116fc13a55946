"""Benchmarks as a page, from the command line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewstep.apps import cli
from fewstep.apps.commands import bench


def run(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    monkeypatch.setattr("sys.argv", ["fewstep", *map(str, words)])
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.slow
@pytest.mark.usefixtures("short_reference")
def test_a_benchmark_is_shown_and_two_are_compared(monkeypatch, capsys, tmp_path: Path) -> None:
    words = ("bench", "digits-edm", "--num", "4", "--grid", "angle", "--nfe", "3")
    code, out, _ = run(monkeypatch, capsys, *words, "--solver", "ddim,unipc-2", "--report", "--out", tmp_path / "one")
    assert code == 0 and f"report: {tmp_path / 'one' / 'report.html'}" in out.replace("\n", "")
    page = (tmp_path / "one" / "report.html").read_text()
    for row in json.loads((tmp_path / "one" / "results.json").read_text())["rows"]:
        assert f'"{row["rmse"]!r}"' in page
    code, _, _ = run(monkeypatch, capsys, *words, "--solver", "unipc-2", "--out", tmp_path / "two")
    assert code == 0 and not (tmp_path / "two" / "report.html").exists()
    code, out, _ = run(monkeypatch, capsys, "report", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both", "--title", "Two runs")
    assert code == 0 and "open it in a browser" in out
    assert "Two runs" in (tmp_path / "both" / "report.html").read_text()


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_a_folder_without_rows_is_named(monkeypatch, capsys, tmp_path: Path, what: str) -> None:
    folder = tmp_path / what
    if what == "empty":
        folder.mkdir()
    code, _, err = run(monkeypatch, capsys, "report", folder, "--out", tmp_path / "out")
    assert code == 2 and str(folder) in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_samples_that_are_no_pictures_make_none(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4, 2)}, tmp_path / "reference.safetensors")
    bench._draw({"model": "points", "rows": [{"library": "fewstep", "solver": "ddim", "grid": "angle", "nfe": 3, "rmse": 0.1}]}, tmp_path)
    assert not (tmp_path / "pictures.png").exists()
