"""Every example runs, quickly here and as a program before a release; what guides show of it is in it."""

import ast
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fewstep

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
STUDENT = {"steps": 4, "batch": 4, "held_out": 4}
SMALLER = {  # than examples write it down, so that all of them run in a minute
    "FitConfig": {"budget": 1500},
    "CalibrationConfig": {"num": 8, "levels": 8},
    "OptimizeConfig": {"levels": 12, "num": 4, "noises": 8, "held_out": 8},
    "DistillConfig": {**STUDENT, "num": 8},
    "FlowMapConfig": {**STUDENT, "num": 8},
    "GuidedConfig": STUDENT,
    "ProgressiveConfig": STUDENT,
}
QUICK = {"config", "num"}  # arguments that only make an example quick, which guides leave out
SHOWN = re.compile(r"<!-- from (examples/\w+\.py) -->\n```python\n(.*?)```", re.S)
SAID = {  # what its last lines are about
    "01": "unipc-2",
    "02": "the same from disk: True",
    "03": "dpm-solver-v3",
    "04": "evaluations at noise levels",
    "05": "digits-flow-map",
    "06": "the whole report: bench/report.html",
    "07": "5 steps by fitted",
    "08": "TwoStep",
    "09": "resumed, to the bit: True",
    "10": "from noise level",
    "11": "fitted, 6 evaluations",
    "12": "calls instead of 64",
    "13": "100% are the digit that was asked for",
    "14": "unipc-2 on karras: RMSE after 8, 9 and 10 evaluations",
    "15": "fitted on its own levels: 5 evaluations from t = 0.429",
    "16": "evaluations a sample: 10, backward passes: 0",
    "17": "image to image moves by",
    "18": "4 images at guidance 3 in 2 calls each",
    "19": "galaxygrad",  # whether it is installed or not
}


def test_there_is_an_example_for_each_number_and_each_is_short() -> None:
    assert [path.name[:2] for path in EXAMPLES] == list(SAID)
    assert all(len(path.read_text().splitlines()) < 60 for path in EXAMPLES)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learners with smaller numbers than an example passes, and comparisons of 8 noises."""
    for name, smaller in SMALLER.items():
        config = getattr(fewstep, name)
        call = lambda config=config, smaller=smaller, **written: config(**{**written, **smaller})  # noqa: E731
        monkeypatch.setattr(fewstep, name, call, raising=False)
    compare = fewstep.compare
    monkeypatch.setattr(fewstep, "compare", lambda *args, **options: compare(*args, **{**options, "num": 8}), raising=False)


@pytest.mark.slow
@pytest.mark.usefixtures("quick", "short_reference")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert SAID[path.name[:2]] in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=() if path == EXAMPLES[1] else pytest.mark.release, id=path.stem) for path in EXAMPLES]
)
def test_an_example_is_a_program(path: Path, tmp_path: Path) -> None:
    """As it is written, in a process of its own; the first one runs where nothing but the package is installed, too."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    run = subprocess.run([sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert SAID[path.name[:2]] in run.stdout


def test_what_guides_show_of_an_example_is_in_it() -> None:
    """Statement by statement, but for arguments that make an example quick."""
    shown = [
        (page, *found) for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) for found in SHOWN.findall(page.read_text("utf-8"))
    ]
    assert {example for _, example, _ in shown} >= {
        f"examples/{path.name}" for path in EXAMPLES if path.name[:2] in ("01", "02", "03", "04", "05")
    }
    for page, example, block in shown:
        whole = set(statements(ast.parse((ROOT / example).read_text())))
        for statement in ast.parse(block).body:
            assert plain(statement) in whole, f"{page.name} shows what {example} does not have: {ast.unparse(statement)}"


def test_every_example_is_named_by_a_guide() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    assert all(f"examples/{path.name}" in text for path in EXAMPLES)


def statements(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            yield plain(node)


def plain(node: ast.stmt) -> str:
    """The text of a statement without comments, and without arguments that make it quick."""
    copy = ast.parse(ast.unparse(node))
    for call in ast.walk(copy):
        if isinstance(call, ast.Call):
            call.keywords = [keyword for keyword in call.keywords if keyword.arg not in QUICK]
    return ast.unparse(copy)
