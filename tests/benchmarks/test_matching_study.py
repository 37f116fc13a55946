"""The study of distribution matching: it writes a row for each training, and a killed run continues; its clusters know spread samples."""

import json
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.topics import students

from benchmarks import matching_study as study
from fewstep.data.images import load_images
from fewstep.evaluate.metrics.judge import Judge


def test_samples_spread_as_the_data_are_have_its_clusters_and_diversity() -> None:
    data = load_images("digits")
    clusters = study.Clusters(Judge.of(data), data)
    found = clusters(data.x, data.labels)
    assert found["clusters"] == 0 and found["diversity"] == pytest.approx(1)
    one = torch.stack([data.x[data.labels == label][0] for label in range(10)])[data.labels]  # one picture for each label
    found = clusters(one, data.labels)
    assert found["clusters"] > 0.5 and found["diversity"] == pytest.approx(0)


def test_a_row_that_is_none_is_refused_with_those_that_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["study", "--out", str(tmp_path / "rows.json"), "--only", "digit/dmd"])
    with pytest.raises(SystemExit):
        study.main()
    assert "no row begins with 'digit/dmd'" in (said := capsys.readouterr().err) and "digits/dmd/0" in said


@pytest.mark.slow
def test_the_study_writes_its_rows_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(study, "COUNTED", range(600))
    monkeypatch.setattr(study, "SEEDS", 2)
    out = tmp_path / "rows.json"
    words = ["study", "--out", str(out), "--work", str(tmp_path / "work"), "--steps", "2", "--num", "32"]
    for only in ("ring-6/teacher", "ring-6/dmd", "ring-6/langevin 4/1", "digits/after kd, paired/1", "digits/kd", "digits/teacher"):
        monkeypatch.setattr(sys, "argv", [*words, "--only", only])
        study.main()
    rows = {row["row"]: row for row in json.loads(out.read_text())["rows"]}
    assert {"ring-6/dmd/0", "ring-6/dmd/1", "ring-6/langevin 4/1", "digits/after kd, paired/1", "digits/kd, longer/1"} <= set(rows)
    least, most = rows["ring-6/teacher/0"]["masses"]
    assert 0.8 < least < 1 < most < 1.2 and rows["ring-6/teacher/0"]["near"] > 0.95
    matched = rows["digits/after kd, paired/1"]
    assert matched["config"]["pair"] == 1 and matched["curves"]["step"] == [0, 1, 2] and matched["curves"]["seconds"][0] == 0
    assert matched["config"]["seed"] == rows["ring-6/dmd/1"]["config"]["seed"] == rows["ring-6/dmd/0"]["config"]["seed"] + 1
    for part in ("ring-6", "digits", "curves"):
        students.matching_study(list(rows.values()), part)
    capsys.readouterr()
    study.main()
    assert json.loads(out.read_text())["rows"] == list(rows.values()) and not capsys.readouterr().out  # nothing was measured again
