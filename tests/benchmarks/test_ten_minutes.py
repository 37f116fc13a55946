"""The guide "your own network in ten minutes": its blocks are what the study runs, and they run."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.ten_minutes import GUIDE, Step, figures, run, steps

import fewstep

TEXT = GUIDE.read_text(encoding="utf-8")
RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "ten_minutes.json"
SMALL = {
    "sample": "--num 4",
    "bench": "--num 8",
    "fit": "--num 16 --held-out 8 --noises 8 --levels 12 --iterations 0",
    "finetune": "--rounds 1 --steps 2 --batch 4 --num 16 --held-out 8 --levels 8 --teacher-nfe 8",
    "distill": "--steps 2 --batch 4 --num 16 --held-out 8 --teacher-nfe 4",
}


def test_the_steps_are_those_of_the_rows() -> None:
    found = [step for step in steps(TEXT) if not step.is_file]
    rows = json.loads(RESULT.read_text())
    assert [row["step"] for row in rows["rows"]] == [step.name for step in found]
    assert {step.name.split()[1] for step in found if step.name.startswith("fewstep")} >= {"sample", "bench", "fit", "finetune", "distill"}
    assert rows["minutes"] == pytest.approx(sum(row["seconds"] for row in rows["rows"]) / 60, abs=0.06)
    assert rows["minutes"] <= 10  # as its title says


def test_the_rows_show_what_the_guide_is_for() -> None:
    found = {(row["what"], row["nfe"]): row["rmse"] for row in json.loads(RESULT.read_text())["figures"]}
    assert all(found["fitted", nfe] < found["best by hand", nfe] for nfe in (5, 8))


def test_a_line_that_is_no_command_is_refused() -> None:
    with pytest.raises(ValueError, match="a line that is no command: rm -r"):
        list(steps("```\nfewstep models\nrm -r runs\n```"))


def test_the_training_script_makes_a_model_that_is_saved_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    file, *others = [step for step in steps(TEXT) if step.text]
    Path(file.name).write_text(file.text, encoding="utf-8")
    import digits_model  # type: ignore[import-not-found]

    try:
        digits_model.train(steps=2, batch=8)
        config = fewstep.FitConfig(num=8, held_out=4, levels=6, noises=4, iterations=0, batch=4)
        fewstep.fit(digits_model.model(), nfe=5, config=config, out="fitted")
        names: dict = {}
        for step in others:
            exec(compile(step.text, "guide", "exec"), names)
        assert names["images"].shape == (4, 1, 8, 8) and bool(torch.isfinite(names["images"]).all())
    finally:
        del sys.modules["digits_model"]


@pytest.mark.slow
def test_the_whole_guide_runs(tmp_path: Path) -> None:
    def short(step: Step) -> Step:
        """The same step with little work; options that the guide says are said again, and the last counts."""
        if step.is_file:
            return replace(step, text=step.text.replace("steps=3000", "steps=3"))
        words = step.name.split()
        if words[0] != "fewstep":
            return step
        mine = SMALL[words[1]]
        kept = step.name
        for option in re.findall(r"--[\w-]+", mine):
            kept = re.sub(rf" {option} \S+", "", kept)
        return Step(f"{kept} {mine}")

    rows = run(tmp_path, TEXT, short)
    assert len(rows) == len(list(steps(TEXT))) - 1
    assert {row["what"] for row in figures(tmp_path)} == {"best by hand", "fitted", "tuned", "distilled"}
    assert (tmp_path / "runs" / "sample" / "grid.png").exists() and (tmp_path / "my-model" / "fewstep.json").exists()
