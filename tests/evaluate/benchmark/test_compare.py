"""The front door: anything that samples is compared, is called by a name of its own, and every mistake says what to pass instead."""

import csv
import doctest
import io
import json
import re
from dataclasses import dataclass, replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evaluate.problems import LAW, toy
from tests.problems import DSNO
from torch import Tensor, nn

import fewstep
from fewstep import (
    ArtifactError,
    FewstepError,
    GridError,
    Model,
    ModelError,
    NoiseSchedule,
    Sampler,
    Solver,
    SolverError,
    TimeGrid,
    compare,
    load_model,
)
from fewstep.core.statistics import ModelStatistics
from fewstep.core.tableau import Nodes
from fewstep.evaluate.benchmark.comparison import Comparison
from fewstep.evaluate.benchmark.plan import BenchmarkConfig
from fewstep.evaluate.benchmark.run import benchmark
from fewstep.evaluate.benchmark.third_party import ThirdPartySampler
from fewstep.evaluate.report.table import plain_table
from fewstep.evaluate.rows import REFERENCE, Row, picture_file, read_errors, read_samples
from fewstep.models.carried import OPTIMIZED
from fewstep.models.problem import Problem
from fewstep.solvers import UniPC

SMALL: dict[str, Any] = {"num": 6, "batch": 4, "grid": "karras"}
FLOAT32 = 1e-4
MEASURED = ("seconds", "solver_seconds", "peak_memory")  # what no two runs share


class Own(Solver):
    """First-order steps, too long by a factor."""

    order = memory = 1

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        ratio, gain = nodes.first_order(i, i + 1)
        end = ratio * x + self.factor * gain * history[0]
        return end, end


@dataclass(frozen=True)
class WithOptions(Solver):
    """The same with options."""

    factor: float = 1.0
    table: Any = None
    order = memory = 1
    update = Own.update


@dataclass(frozen=True)
class Broken(Solver):
    """A solver with a mistake."""

    early: bool = False
    order = memory = 1

    def nodes(self, grid: TimeGrid, schedule: NoiseSchedule) -> Nodes:
        return {}[self.early] if self.early else super().nodes(grid, schedule)

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        raise IndexError("there is no such evaluation")


def euler(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None) -> Tensor:
    """Euler's method as k-diffusion has it."""
    for here, there in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (x - model(x, here)) / here * (there - here)
    return x


def scaled(model: Any, x: Tensor, sigmas: Tensor, factor: float = 1.0, **_: Any) -> Tensor:
    return factor * euler(model, x, sigmas)


def made_for(model: Model, nfe: int, name: str = "fitted", solver: str = "unipc-2", **card: Any) -> Sampler:
    """A sampler as a learner returns it."""
    return Sampler.build(solver, "angle", model.schedule, nfe=nfe, card={**Problem(model).card(), "name": name, **card})


def by_name(table: Comparison) -> dict[tuple[str, str, int], Row]:
    return {(row.solver, row.grid, row.nfe): row for row in table.rows}


def without_times(table: Comparison) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in table.results["rows"]]


# -- what can be compared ---------------------------------------------------------------------------------------------


def test_every_kind_of_sampler_is_a_row_under_its_name() -> None:
    model = toy(LAW)
    by_hand = Sampler.build("ddim", TimeGrid([20.0, 1.0, 0.05]), LAW)
    what = ["ddim", "DPM++ 2M", "ddim:eta=0.5", UniPC(2), UniPC(3, weights="bh1"), Own(), WithOptions(0.5), by_hand]
    what += [{3: made_for(model, 3), 5: made_for(model, 5)}, euler, lambda model, x, sigmas, **_: model(x, sigmas[0])]
    table = compare(model, what, nfe=[3], **SMALL)
    rows = by_name(table)
    named = ("ddim", "DPM++ 2M", "unipc-2", "unipc-3:weights=bh1", "Own", "WithOptions:factor=0.5", "euler")
    ((key, why),) = [(one["key"], one["why"]) for one in table.results["skipped"]]
    assert key == ["fewstep", "ddim:eta=0.5", "karras", 3] and "adds noise, so its samples follow no trajectory" in why
    assert set(rows) == {
        *((name, "karras", 3) for name in named),
        ("lambda", "karras", 1),  # one evaluation
        ("ddim", "own grid", 2),
        *(("fitted", OPTIMIZED, nfe) for nfe in (3, 5)),
    }
    assert all(row.failed is None and row.rmse is not None for row in table.rows)
    assert {row.library for row in table.rows} == {"fewstep", __name__}
    same = [rows[name, "karras", 3].rmse for name in ("ddim", "Own", "euler")]  # three writings of one formula
    assert same == pytest.approx([same[0]] * 3, rel=FLOAT32)
    assert rows["Own", "karras", 3].artifact != rows["WithOptions:factor=0.5", "karras", 3].artifact
    assert [row.key[3] for row in table.rows] == [3] * 9 + [2, 5]


@pytest.mark.slow
def test_one_thing_alone_and_folders_and_peers(tmp_path: Path) -> None:
    model = toy(LAW)
    for what in ("ddim", UniPC(2), euler, {5: made_for(model, 5)}, made_for(model, 5), ("ddim",), (one for one in ["ddim"])):
        assert len(compare(model, what, nfe=5, **SMALL).rows) == 1
    made_for(model, 3).save(tmp_path / "nfe-03")
    assert set(by_name(compare(model, tmp_path, **SMALL))) == {("fitted", str(tmp_path), 3)}
    table = compare(model, [], peers=["diffusers", f"{__name__}:euler"], nfe=4, **SMALL)
    assert {"ddim", "lms", "euler"} < {row.solver for row in table.rows} and {row.library for row in table.rows} == {"diffusers", __name__}


def test_the_same_sampler_twice_is_one_row_and_two_of_one_name_are_two() -> None:
    model, tensor = toy(LAW), torch.ones(2)
    fitted = made_for(model, 3)
    once = ["ddim", "unipc-2", UniPC(2), UniPC(2), fitted, replace(fitted), {3: fitted}, euler, euler, Own]
    once[-1] = (own := Own())
    assert len(compare(model, [*once, own], nfe=3, **SMALL).rows) == 5
    other = {3: made_for(model, 3, solver="ddim"), 5: made_for(model, 5, solver="ddim")}
    assert {(row.solver, row.nfe) for row in compare(model, [fitted, other], **SMALL).rows} == {
        ("fitted", 3),
        ("fitted#2", 3),
        ("fitted#2", 5),
    }
    twice = [fitted, other, Own(1.0), Own(0.5), partial(scaled, factor=1.0), partial(scaled, factor=0.5)]
    twice += [WithOptions(table=tensor), WithOptions(table=2 * tensor), {"a": made_for(model, 5), "b": made_for(model, 5, solver="deis-3")}]
    rows = by_name(compare(model, twice, nfe=3, **SMALL))
    names = ("Own", "Own#2", "scaled", "scaled#2", "WithOptions", "WithOptions#2")
    assert set(rows) == {
        *((name, "karras", 3) for name in names),
        ("fitted", OPTIMIZED, 3),
        *(("fitted#2", OPTIMIZED, nfe) for nfe in (3, 5)),  # of one dict, so under one name
        ("fitted", OPTIMIZED, 5),
        ("fitted#3", OPTIMIZED, 5),
    }
    for one, two in (("Own", "Own#2"), ("scaled", "scaled#2")):
        assert rows[one, "karras", 3].rmse != rows[two, "karras", 3].rmse
    assert rows["fitted", OPTIMIZED, 3].rmse != rows["fitted#2", OPTIMIZED, 3].rmse


def test_the_front_door_and_the_command_line_make_the_same_rows(tmp_path: Path) -> None:
    model = toy(LAW)
    config = BenchmarkConfig(("ddim", "unipc-2", "heun"), ("karras", "angle"), (4, 5), num=6, batch=4, peers=(f"{__name__}:euler",))
    theirs = benchmark(model, config, tmp_path, command="fewstep bench toy")
    mine = compare(model, ["ddim", UniPC(2), "heun", euler], nfe=(4, 5), num=6, batch=4, out=tmp_path)
    assert mine.results["rows"] == theirs.results["rows"] and mine.results["skipped"] == theirs.results["skipped"]  # the same seconds
    assert mine.results["command"].startswith("fewstep bench toy && fewstep.compare(toy, [ddim, unipc-2, heun, euler], nfe=[4, 5]")
    assert without_times(compare(model, ["ddim", UniPC(2), "heun", euler], nfe=(4, 5), num=6, batch=4)) == without_times(theirs)


def test_a_folder_collects_rows_and_runs_again_what_has_changed(tmp_path: Path) -> None:
    model = toy(LAW)

    def rows(*what: Any) -> dict[tuple[str, str, int], Row]:
        return by_name(compare(model, list(what), nfe=3, out=tmp_path, **SMALL))

    first = rows("ddim", Own(), WithOptions(), partial(scaled, factor=1.0), made_for(model, 3))
    more = rows("unipc-2")
    assert {key: more[key] for key in first} == first and set(more) == {*first, ("unipc-2", "karras", 3)}
    assert rows(Own(), WithOptions(), made_for(model, 3)) == more
    again = rows("ddim", Own(0.5), WithOptions(), partial(scaled, factor=0.5), made_for(model, 3, solver="ddim"))
    changed = {key for key in more if again[key] != more[key]}
    assert changed == {("Own", "karras", 3), ("scaled", "karras", 3), ("fitted", OPTIMIZED, 3)}
    assert all(again[key].rmse != more[key].rmse and again[key].artifact != more[key].artifact for key in changed)


def test_fingerprints_of_functions_tell_apart_what_one_file_holds(tmp_path: Path) -> None:
    def within(factor: float) -> Any:
        return lambda model, x, sigmas, **_: factor * x

    class Callable:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def __call__(self, model: Any, x: Tensor, sigmas: Tensor, **_: Any) -> Tensor:
            return self.factor * x

        def method(self, model: Any, x: Tensor, sigmas: Tensor, **_: Any) -> Tensor:
            return x

    assert ThirdPartySampler.of(euler) == ThirdPartySampler.load(f"{__name__}:euler")
    different = [euler, within(1.0), within(2.0), partial(scaled, factor=1.0), partial(scaled, factor=2.0)]
    different += [Callable(1.0), Callable(2.0), Callable(1.0).method, lambda m, x, s, **_: x, lambda m, x, s, **_: 2 * x]
    prints = [ThirdPartySampler.of(one).fingerprint for one in different]
    assert len(set(prints)) == len(prints) and None not in prints
    assert ThirdPartySampler.of(within(1.0)).fingerprint == prints[1] and ThirdPartySampler.of(Callable(2.0)).fingerprint == prints[6]
    assert [ThirdPartySampler.of(one).name for one in (different[1], different[3], different[5], different[7])] == [
        *("lambda", "scaled", "Callable", "method")
    ]


def test_failures_are_rows_and_the_others_go_on() -> None:
    def forgets(model: Any, x: Tensor, sigmas: Tensor, **_: Any) -> None:
        model(x, sigmas[0])

    another = Sampler.build("ddim", "karras", fewstep.VPLinear(), nfe=5)
    table = compare(toy(LAW), ["ddim", "heun", "dpm-solver-v3", Broken(), Broken(True), forgets, another], nfe=5, **SMALL)
    why = {row.solver: row.failed for row in table.rows if row.failed is not None}
    assert why["Broken"] == "IndexError: there is no such evaluation" and why["Broken:early=True"] == "KeyError: True"
    assert "answered a NoneType" in str(why["forgets"])
    assert "made for another noise schedule" in str(why["ddim"]) and len(table.rows) == 5
    assert [row.solver for row in table.rows if row.failed is None] == ["ddim"]
    text = str(table)
    for said in (
        "failed: Broken on karras with 5: IndexError",
        "no row: Heun takes 2 evaluations",
        "no row: dpm-solver-v3 needs statistics",
    ):
        assert said in text
    assert "failed" in table._repr_html_() and repr(table) == "Comparison(toy, 5 rows, 4 failed, evaluations 5)"


def test_the_model_is_sampled_with_its_own_guidance_by_default() -> None:
    class Guided(Model):
        default_guidance = 3.0

        def guided(self, scale: float = 1.0) -> Any:
            asked.append(scale)
            return self

    asked: list[float] = []
    exact = toy(LAW)
    model = Guided(exact.network, LAW, "sample", shape=(1, 2, 2), name="guided")
    assert {row.guidance for row in compare(model, "ddim", nfe=3, **SMALL).rows} == {3.0} == set(asked)
    assert {row.guidance for row in compare(model, "ddim", nfe=3, guidance=2, **SMALL).rows} == {2.0}


@pytest.mark.slow
def test_a_student_is_compared_along_its_own_times() -> None:
    table = compare(load_model(DSNO), ["ddim", "unipc-2", euler], nfe=(1, 2), grid=OPTIMIZED, num=4, batch=4)
    assert [(row.solver, row.nfe) for row in table.rows] == [("ddim", 1), ("ddim", 2)]
    assert all(row.arithmetic is not None and row.arithmetic > row.nfe for row in table.rows)
    assert "1 pass of digits-dsno: the arithmetic of" in str(table) and "is a student" in str(table)


@pytest.mark.slow
def test_its_example_is_right() -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(compare, "compare", globs={})
    assert len(example.examples) == 4 and doctest.DocTestRunner().run(example).failed == 0


def test_progress_is_reported() -> None:
    seen: list[tuple[int, str]] = []
    compare(toy(LAW), ["ddim", "heun"], nfe=4, on_progress=lambda done, note: seen.append((done, note)), **SMALL)
    assert seen == [(0, "reference trajectory"), (0, "ddim karras 4"), (1, "heun karras 4"), (2, "")]


# -- what comes back --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> Comparison:
    """One that was made in memory."""
    return compare(toy(LAW), ["ddim", "unipc-2", euler, {3: made_for(toy(LAW), 3)}], nfe=(3, 5), num=6, batch=4, grid=("karras", "angle"))


def test_it_knows_the_best_row(table: Comparison) -> None:
    for nfe in (3, 5):
        assert table.best(nfe).rmse == min(row.rmse for row in table.rows if row.nfe == nfe and row.rmse is not None)
    with pytest.raises(FewstepError, match="no sampler here made 4 evaluations; there are rows with: 3, 5"):
        table.best(4)
    assert [row.__dict__ for row in table.rows] == table.results["rows"]


def test_it_prints_as_a_table(table: Comparison) -> None:
    assert repr(table) == "Comparison(toy, 13 rows, evaluations 3, 5)"
    title, _, head, rule, *lines = str(table).splitlines()
    assert title == "toy, guidance 1, 6 noises: RMSE to the exact trajectory by network evaluations"
    assert re.split(r" {2,}", head) == ["solver", "grid", "3", "5"] and set(rule) == {"-"}
    body = lines[: lines.index("")]
    shown = [re.split(r" {2,}", line.strip()) for line in body]
    assert len({len(line.rstrip(" *")) for line in body if not line.endswith("-")}) == 1  # aligned
    assert [line[0] for line in shown] == ["ddim", "unipc-2", "ddim", "unipc-2", "fitted", f"euler ({__name__})", f"euler ({__name__})"]
    rows = by_name(table)
    for name, grid, *cells in shown:
        for nfe, cell in zip((3, 5), cells, strict=True):
            row = rows.get((name.split(" ")[0], grid, nfe))
            assert (cell == "-") if row is None else float(cell.rstrip("*")) == pytest.approx(row.rmse, rel=0.05)
            assert row is None or cell.endswith("*") == (row.rmse <= table.best(nfe).rmse * (1 + FLOAT32))
    assert lines[lines.index("") + 1 :][0] == "* best of its column"
    assert lines[-1].startswith("reference: unipc-3 with 128 evaluations, own error ")


class Balanced(HTMLParser):
    """HTML whose tags are closed; its attributes and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n"


def test_a_notebook_shows_the_table_with_intervals_and_pictures(table: Comparison) -> None:
    page = Balanced(table._repr_html_())
    for row in table.rows:
        assert f"{row.rmse:.4f}" in page.text
    tips = [str(attrs["title"]) for tag, attrs in page.tags if tag == "td" and "title" in attrs]
    assert len(tips) == 13 and all("RMSE 95 %" in tip and "median error" in tip for tip in tips)
    marked = [attrs for tag, attrs in page.tags if tag == "td" and "bold" in str(attrs.get("style"))]
    assert len(marked) >= 2
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 1 + 3 and all(str(one["src"]).startswith("data:image/png;base64,") for one in pictures)  # like ones are one
    assert not any("http" in str(attrs.get("src")) for _, attrs in page.tags)


@pytest.mark.parametrize("shape", [(3,), (4, 2, 2)], ids=str)
def test_samples_that_are_no_pictures_are_not_shown(shape: tuple[int, ...]) -> None:
    made = compare(toy(LAW, shape=shape), "ddim", nfe=3, **SMALL)
    assert "<img" not in made._repr_html_() and "ddim" in made._repr_html_()


def test_names_are_only_text() -> None:
    hostile = "<script>alert('x')</script>"
    sampler = Sampler.build("ddim", "karras", LAW, nfe=3, card={"name": hostile, "grid": hostile})
    made = compare(replace(toy(LAW), name=hostile), sampler, **SMALL)
    page = made._repr_html_()
    assert "<script" not in page and hostile in Balanced(page).text and hostile in str(made)


@pytest.mark.slow
def test_the_data_is_compared_with_too() -> None:
    made = compare(load_model("digits-edm"), "ddim", nfe=3, features="pixels", **SMALL)
    (row,) = made.rows
    assert row.fd_features == "pixels" and row.fd is not None
    assert f"({row.fd:.2f})" in str(made) and "its Frechet distance" in str(made) and "(Frechet distance to the data)" in str(made)
    assert f"Frechet distance {row.fd:.2f}, 95 %" in made._repr_html_()


@pytest.mark.slow
def test_it_is_written_as_a_page_and_for_a_spreadsheet(table: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = table.to_html(tmp_path / "deep" / "page.html", title="Mine")
    text = page.read_text()
    assert page == tmp_path / "deep" / "page.html" and "<title>Mine</title>" in text and text.count("<img") > 4
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]
    assert "fewstep.compare(toy, [ddim, unipc-2, euler, fitted]" in text and "To make one row again" not in text
    rows = list(csv.DictReader(io.StringIO(table.to_csv(str(tmp_path / "rows.csv")).read_text())))
    assert [float(row["rmse"]) for row in rows] == [row.rmse for row in table.rows]
    with pytest.raises(ArtifactError, match=r"is a folder: name a file in it, as .*report\.html"):
        table.to_html(tmp_path)
    with pytest.raises(ArtifactError, match=r"is a folder: name a file in it, as .*results\.csv"):
        table.to_csv(tmp_path)
    monkeypatch.setattr("fewstep.evaluate.report.template.find_spec", lambda name: None)
    with pytest.raises(FewstepError, match=r"needs jinja2 and matplotlib: pip install 'fewstep\[report\]'"):
        table.to_html(tmp_path / "page.html")


def test_what_is_in_memory_goes_with_the_object_and_with_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = compare(toy(LAW), "ddim", nfe=3, num=20, batch=20)
    assert [made.folder] == list(tmp_path.iterdir())
    assert len(read_samples(made.folder / REFERENCE)) == 16  # as many as of each row
    assert len(read_errors(picture_file(made.folder, made.rows[0].key))) == 20
    two = replace(made)
    del made
    assert two.folder.exists() and "<img" in two._repr_html_()
    del two
    assert list(tmp_path.iterdir()) == []

    def interrupt(done: int, note: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as first:
        compare(toy(LAW), "ddim", nfe=3, on_progress=interrupt, **SMALL)
    with pytest.raises(SolverError, match="use 4 or 6") as second:
        compare(toy(LAW), "heun", nfe=5, **SMALL)
    assert first.tb is not None and second.tb is not None and list(tmp_path.iterdir()) == []  # while the frames are alive


# -- mistakes ---------------------------------------------------------------------------------------------------------


def no_sampler(model: Any, x: Tensor) -> Tensor:
    return x


WRONG: dict[str, tuple[Any, dict[str, Any], type[FewstepError], str]] = {
    "a misspelt solver": ("unipc2", {}, SolverError, "did you mean"),
    "a misspelt option": ("ddim:etta=1", {}, SolverError, "has no option etta"),
    "a solver's class": (Own, {}, SolverError, r"pass an object of it, as in Own\(\)"),
    "a number": (5, {}, FewstepError, "a int is nothing that can be compared"),
    "nothing": (None, {}, FewstepError, "a NoneType is nothing that can be compared; samplers are names of solvers"),
    "an empty list": ([], {}, FewstepError, "nothing to compare"),
    "a dict of names": ({5: "ddim"}, {}, FewstepError, "a dict to compare holds Samplers, .* not a str"),
    "a tableau": (Sampler.build("ddim", "karras", LAW, nfe=3).tableau, {}, FewstepError, "pass the Sampler that it is of"),
    "a network": (nn.Flatten(), {}, FewstepError, "compare takes one model and several samplers"),
    "a second model": ([toy(LAW)], {}, FewstepError, "and a Model is no sampler"),
    "another signature": (no_sampler, {}, FewstepError, "no_sampler cannot be called as a sampler"),
    "a folder without samplers": (Path("nowhere"), {}, ArtifactError, "no sampler below nowhere"),
    "a sampler of another model": (made_for(toy(fewstep.VPLinear()), 3), {}, ArtifactError, "is a sampler of toy .* not of toy"),
    "a sampler of another guidance": (made_for(toy(LAW), 3, guidance=2.0), {}, ArtifactError, "at guidance 2, not of toy"),
    "a misspelt grid": ("ddim", {"grid": "karas"}, GridError, "did you mean karras"),
    "times for a grid": ("ddim", {"grid": TimeGrid([1.0, 0.1])}, GridError, r"pass fewstep.Sampler.build\(solver, grid"),
    "no grid": ("ddim", {"grid": ()}, FewstepError, "at least one nfe and one grid"),
    "no evaluations": ("ddim", {"nfe": 0}, SolverError, "nfe must be a whole number of at least 1"),
    "half an evaluation": ("ddim", {"nfe": 2.5}, FewstepError, r"nfe is a whole number or a list of them, as \[5, 8\], got 2.5"),
    "a word for nfe": ("ddim", {"nfe": "five"}, FewstepError, "nfe is a whole number"),
    "one noise": ("ddim", {"num": 1}, FewstepError, "num is at least 2, got 1"),
    "half a noise": ("ddim", {"num": 10.5}, FewstepError, "num is a whole number, got 10.5"),
    "a negative seed": ("ddim", {"seed": -1}, FewstepError, "seeds must lie"),
    "an empty batch": ("ddim", {"batch": 0}, FewstepError, "batch is at least 1, got 0"),
    "an unknown peer": ("ddim", {"peers": "difusers"}, FewstepError, "did you mean diffusers"),
    "features without data": ("ddim", {"features": "pixels"}, FewstepError, "name the data, or leave the features out"),
    "data that is not there": ("ddim", {"data": "nowhere"}, FewstepError, "no images at nowhere"),
    "an unknown argument": ("ddim", {"solvers": 3}, FewstepError, "compare: .*unexpected keyword argument 'solvers'"),
    "a word for guidance": ("ddim", {"guidance": "two"}, FewstepError, "guidance is a number, got 'two'"),
    "a tensor of data": ("ddim", {"data": torch.zeros(2)}, FewstepError, "data is 'digits', an .npz file or a folder of pictures"),
    "a number for features": ("ddim", {"features": 5}, FewstepError, "features is the name of a feature network"),
    "a number for a folder": ("ddim", {"out": 5}, FewstepError, "out is a folder, got 5"),
    "no function for progress": ("ddim", {"on_progress": True}, FewstepError, "on_progress is a function"),
    "guidance without a null label": ("ddim", {"guidance": 2}, ModelError, "cannot be guided"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.every(2)
def test_mistakes_say_what_to_pass(wrong: str) -> None:
    what, options, error, says = WRONG[wrong]
    with pytest.raises(error, match=says):
        compare(toy(LAW), what, **{"nfe": 3, **SMALL, **options})


def test_models_that_are_none_are_refused() -> None:
    for wrong, says in (
        (nn.Flatten(), "this takes a fewstep.Model, not a Flatten"),
        ("digits-edm", "not a str"),
        (replace(toy(LAW), shape=None), "does not know the shape of its samples"),
        (replace(load_model(DSNO), folder=None, name="orphan"), "orphan is a student that does not say who its teacher was"),
    ):
        with pytest.raises(ModelError, match=says):
            compare(wrong, "ddim", nfe=1, **SMALL)  # pyright: ignore[reportArgumentType]


def test_statistics_are_those_of_the_model_and_tell_solvers_apart() -> None:
    model = toy(LAW)
    ends = LAW.lam(torch.tensor([LAW.t_max, LAW.t_min], dtype=torch.float64))
    lam, values = torch.linspace(float(ends[0]), float(ends[1]), 5, dtype=torch.float64), torch.ones(5, 1, 1, 1)

    def statistics(l: float, model: str) -> ModelStatistics:
        return ModelStatistics(lam, l * values, 0 * values, 0 * values, (1, 2, 2), LAW, model)

    one, two = (statistics(l, model.fingerprint) for l in (1.0, 0.9))
    what = [fewstep.DPMSolverV3(one), fewstep.DPMSolverV3(one), fewstep.DPMSolverV3(two)]
    what += [fewstep.DPMSolverV3(one, gate=lambda part: part > 0.1), fewstep.DPMSolverV3(one, gate=lambda part: part > 0.9)]
    table = compare(model, what, nfe=4, **SMALL)
    assert [(row.solver, row.statistics, row.failed) for row in table.rows] == [
        ("dpm-solver-v3", one.fingerprint, None),
        ("dpm-solver-v3#2", two.fingerprint, None),
        ("DPMSolverV3", one.fingerprint, None),
        ("DPMSolverV3#2", one.fingerprint, None),
    ]
    assert len({row.rmse for row in table.rows}) == 4
    with pytest.raises(ArtifactError, match="0000"):
        compare(model, fewstep.DPMSolverV3(statistics(1.0, "0" * 16)), nfe=3, **SMALL)


# -- results of earlier versions --------------------------------------------------------------------------------------

FOUND = sorted((Path(__file__).parents[3] / "benchmarks" / "results").rglob("results.json"))
COMMITTED = [path for path in FOUND if path.parent.name != "restoration"]  # which is no benchmark of samplers
COMMITTED = [path for path in COMMITTED if path.parent.name != "tuned_models"]  # a table of a study, not of a benchmark
COMMITTED = [path for path in COMMITTED if path.parent.parent.name != "noise"]  # of samplers that add noise, without errors


def test_committed_results_are_read() -> None:
    assert len(COMMITTED) > 10
    for path in COMMITTED:
        results = json.loads(path.read_text())
        table = Comparison(results, path.parent)
        assert len(table.rows) == len(results["rows"])
        assert len({row.key for row in table.rows}) == len(table.rows)
        assert results["model"] in plain_table(results) and results["model"] in table._repr_html_()
