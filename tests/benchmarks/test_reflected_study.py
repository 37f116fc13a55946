"""The study of reflected models: it writes a row for each way and scale, and a killed run continues."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import reflected_study as study


@pytest.mark.slow
def test_the_study_writes_its_rows_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "rows.json"
    words = ["--out", str(out), "--work", str(tmp_path / "work"), "--steps", "2", "--batch", "4", "--channels", "16,16", "--num", "8"]
    monkeypatch.setattr(study, "NFE", 4)
    monkeypatch.setattr(study, "SCALES", (1.0, 8.0))
    monkeypatch.setattr(sys, "argv", ["study", *words])
    study.main()
    made = json.loads(out.read_text())
    assert [(row["way"], row["guidance"]) for row in made["rows"]] == [(way, scale) for way in study.WAYS for scale in (1.0, 8.0)]
    assert all(0 <= row["outside"] <= 1 and row["fd"] > 0 for row in made["rows"])
    out.write_text(json.dumps({**made, "rows": made["rows"][:-1]}))
    capsys.readouterr()
    study.main()
    assert json.loads(out.read_text()) == made and len(capsys.readouterr().out.splitlines()) == 1  # nothing trained, one row measured
    monkeypatch.setattr(sys, "argv", ["study", *words, "--seed", "1"])
    with pytest.raises(SystemExit, match="measured with other options"):
        study.main()
