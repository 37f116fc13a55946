"""Scripts of benchmarks say the command by which they run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "benchmarks").rglob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_that_reads_others_is_run_as_a_module(path: Path) -> None:
    """By ``python benchmarks/x.py`` Python looks for `benchmarks` inside of benchmarks."""
    text = path.read_text(encoding="utf-8")
    module, place = ".".join(path.relative_to(ROOT).with_suffix("").parts), path.relative_to(ROOT).as_posix()
    said = re.findall(rf"python (-m {re.escape(module)}\b|{re.escape(place)})", text)
    assert said, "say how it is run"
    if re.search(r"^from benchmarks|^import benchmarks", text, re.M):
        assert set(said) == {f"-m {module}"}
