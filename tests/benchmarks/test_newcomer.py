"""The first table and the first picture of a newcomer: what is timed is what the guides say."""

import json
from pathlib import Path

import pytest
from benchmarks.newcomer import PAGE, ROOT, first_table, requirements
from benchmarks.ten_minutes import GUIDE, steps

WHEEL = Path("/dist/fewstep-0.2.0-py3-none-any.whl")
RESULT = ROOT / "benchmarks" / "results" / "newcomer.json"


def test_the_first_table_is_that_of_the_first_benchmark() -> None:
    found = [step.name for step in steps(first_table(GUIDE.read_text(encoding="utf-8")))]
    assert found[:2] == ["digits_model.py", "python digits_model.py"] and found[-1].startswith("fewstep bench digits_model:model")
    assert sum(name.startswith("fewstep bench") for name in found) == 1


@pytest.mark.parametrize(("guide", "extra"), [(GUIDE, "all"), (PAGE, "ui")])
def test_a_wheel_takes_the_place_of_the_package(guide: Path, extra: str) -> None:
    assert requirements(guide.read_text(encoding="utf-8"), WHEEL)[0] == f"fewstep[{extra}] @ {WHEEL.as_uri()}"


def test_other_packages_stay_as_they_are() -> None:
    assert requirements('`pip install fewstep "torch>=2.6" my-fewstep`', WHEEL) == [
        f"fewstep @ {WHEEL.as_uri()}",
        "torch>=2.6",
        "my-fewstep",
    ]
    with pytest.raises(ValueError, match="does not say what to install"):
        requirements("nothing", WHEEL)


def test_the_rows_are_quick_enough() -> None:
    found = json.loads(RESULT.read_text())
    assert found["minutes"] == {
        name: pytest.approx(sum(row["seconds"] for row in found[name]) / 60, abs=0.06) for name in ("table", "picture")
    }
    assert found["minutes"]["table"] <= 10 and found["minutes"]["picture"] <= 2
    guide = [step.name for step in steps(first_table(GUIDE.read_text(encoding="utf-8"))) if not step.is_file]
    assert [row["step"] for row in found["table"][1:]] == guide  # after the installation
