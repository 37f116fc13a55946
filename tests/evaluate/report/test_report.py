"""The report: all it shows is in the rows, all it says is true of them, and the page needs nothing but itself."""

import csv
import html
import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.conftest import shorten_reference

from fewstep import ArtifactError, FewstepError, load_model
from fewstep.evaluate.benchmark.plan import BenchmarkConfig
from fewstep.evaluate.benchmark.run import benchmark
from fewstep.evaluate.report.findings import grouped, read_folders
from fewstep.evaluate.report.plots import DARK, LIGHT, Point, strip, svg, work_precision
from fewstep.evaluate.report.verdict import key_of
from fewstep.evaluate.report.write import to_csv, to_markdown, write_report
from fewstep.evaluate.rows import picture_file

OLD = {"library": "fewstep", "num": 64, "guidance": 1.0, "fd": 0.5, "fd_features": "digits", "seconds": 1.0, "solver_seconds": 0.1}
NEW = ("rmse_ci", "error_median", "error_mean", "error_p95", "error_p99", "parted", "fd_ci", "kd", "kd_ci", "precision", "recall")
NEW += ("labels", "peak_memory", "failed")
SINGLE = ("error_median", "error_mean", "error_p95", "error_p99", "parted")  # of single samples
HOSTILE = "<script>alert('x|`$^')</script>"


def row(solver: str, nfe: int, rmse: float | None, grid: str = "angle", **more: Any) -> dict[str, Any]:
    return {**OLD, "solver": solver, "grid": grid, "nfe": nfe, "rmse": rmse, **more}


def results(rows: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A results.json of these rows."""
    known = {"version": "0.1.0", "command": "fewstep bench m --out DIR", "model": "m", "machine": {"device": "cpu", "torch": "2.13.0"}}
    known |= {"problem": {"fingerprint": "abc", "seed": 0, "num": 64, "guidance": 1.0, "batch": 64}}
    known |= {"reference": {"solver": "unipc-3", "nfe": 128, "error": 1e-4, "fd": 0.12, "fd_data_halves": 0.8}, "skipped": []}
    return {**known, "rows": list(rows), **more}


def many_rows(scale: float = 1.0) -> dict[str, Any]:
    """80 rows: as many solvers, grids and numbers of evaluations as a benchmark has."""
    rows = []
    for s in range(10):
        for nfe in (5, 6, 8, 10):
            for g, grid in enumerate(("karras", "angle")):
                error = scale * (0.3 + 0.1 * s) * (1 + 0.2 * g) / nfe**1.5
                new = {"rmse_ci": [0.95 * error, 1.05 * error], "error_median": 0.8 * error, "error_p95": 2 * error, "kd": error / 7}
                new |= {"error_mean": 0.9 * error, "error_p99": 4 * error, "parted": 0.004 + s / 1000}
                new |= {"fd_ci": [0.4, 0.6], "precision": 0.91, "recall": 0.83, "labels": 0.97, "peak_memory": 12_345_678 + s}
                rows.append(row(f"solver-with-a-long-name-{s}:option={s}" if s == 7 else f"solver-{s}", nfe, error, grid, **new))
    return results(rows)


def put(folder: Path, made: dict[str, Any], shape: Sequence[int] | None = (3, 64, 64)) -> Path:
    """A benchmark's folder with samples of this shape, or without."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(made))
    generator = torch.Generator().manual_seed(0)
    if shape is not None:
        (folder / "samples").mkdir(exist_ok=True)
        save_file({"x": torch.rand(16, *shape, generator=generator) * 2 - 1}, folder / "reference.safetensors")
        for one in made["rows"]:
            kept = {"x": torch.rand(16, *shape, generator=generator) * 2 - 1, "error": torch.rand(64, generator=generator) + 0.01}
            save_file(kept, picture_file(folder, key_of(one)))
    return folder


class Page(HTMLParser):
    """Numbers with what they are shown as, tags, addresses, and the text that is neither number nor name."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.values: list[tuple[str, str, str]] = []  # exact number, what is shown, unit
        self.ratios: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.loose, self.open = "", "", list[tuple[str, dict[str, str | None]]]()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tags, (_, attrs) = {tag for tag, _ in self.open}, self.open[-1] if self.open else ("", {})
        if "data-value" in attrs:
            self.values.append((str(attrs["data-value"]), data, attrs.get("data-unit") or "1"))
        elif "data-ratio" in attrs:
            self.ratios.append((str(attrs["data-ratio"]), data))
        elif not tags & {"code", "style", "title", "svg", "pre", "a"} and "data-count" not in attrs and attrs.get("class") != "grid":
            self.loose += data
        self.text += "" if "style" in tags else data


def numbers_in(value: Any) -> set[str]:
    """All numbers of a JSON value, as JSON writes them."""
    if isinstance(value, dict):
        return set().union(*map(numbers_in, value.values()))
    if isinstance(value, list):
        return set().union(*map(numbers_in, value))
    return {json.dumps(value)} if isinstance(value, int | float) and not isinstance(value, bool) else set()


def check_numbers(page: Page, *made: dict[str, Any]) -> None:
    """Every number of the page is one of the files', shown as it is; no other text has digits."""
    known = set().union(*map(numbers_in, made))
    assert page.values
    for exact, shown, unit in page.values:
        assert exact in known, f"{shown} is not in results.json"
        decimals = len(shown.partition(".")[2])
        if "e" in shown or (decimals and exact not in ("0.0",) and float(shown) and len(shown.strip("-0.")) <= 3 and unit == "1"):
            assert float(shown) == pytest.approx(float(exact), rel=0.06, abs=0.5 * 10**-decimals)
        else:
            assert shown == f"{float(exact) / float(unit):.{decimals}f}"
    for exact, shown in page.ratios:
        over, under = exact.split()
        assert {over, under} <= known and shown == f"{float(over) / float(under):.2f}"
    words = re.sub("95 %|9[59]th percentile", "", page.loose)
    assert not re.search(r"\d", words), re.findall(r".*\d.*", words)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small benchmark of the bundled model, and its report."""
    out = tmp_path_factory.mktemp("measured")
    config = BenchmarkConfig(("ddim", "unipc-2", "heun"), ("karras", "angle"), (4, 5), num=8, batch=8)
    with pytest.MonkeyPatch.context() as patch:
        shorten_reference(patch)
        benchmark(load_model("digits-edm"), config, out, command="fewstep bench digits-edm --num 8")
    write_report([out], out)
    return out


# -- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_number_of_the_page_is_in_results_json(measured: Path) -> None:
    made = json.loads((measured / "results.json").read_text())
    page = Page(measured / "report.html")
    check_numbers(page, made)
    exact = {value for value, _, _ in page.values}
    for one in made["rows"]:
        for field in ("rmse", "fd", "seconds", *(field for field in SINGLE if one.get(field) is not None)):
            assert json.dumps(one[field]) in exact, f"{field} of a row is not shown"


def test_the_page_needs_nothing_but_itself(measured: Path) -> None:
    text, page = (measured / "report.html").read_text(), Page(measured / "report.html")
    assert not re.search(r"https?:|//[a-z]", re.sub(r'base64,[^"]*', "", text))
    assert not any(tag in ("link", "script", "iframe", "object", "base") for tag, _ in page.tags)
    addresses = [value for _, attrs in page.tags for name in ("src", "href", "xlink:href") if (value := attrs.get(name)) is not None]
    assert addresses and all(address.startswith(("data:", "#")) for address in addresses)
    assert "url(" not in re.sub(r"url\(#[\w.-]+\)", "", text)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and {address[1:] for address in addresses if address.startswith("#")} <= set(ids)


def test_it_is_light_and_dark_and_plots_follow(measured: Path) -> None:
    text = (measured / "report.html").read_text()
    assert "@media (prefers-color-scheme: dark)" in text and all(colour in text for colour in (*LIGHT.values(), *DARK.values()))
    drawing = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    painted = re.findall(r"(?:fill|stroke): ?([^;\"]+)", drawing)
    assert painted and all(colour.startswith(("var(--", "none", "url")) for colour in painted), set(painted)


def test_samples_are_embedded_with_the_same_seeds(measured: Path) -> None:
    page = Page(measured / "report.html")
    strips = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(strips) == 3 + 4 and all(str(one["src"]).startswith("data:image/png;base64,") for one in strips)
    assert sum(one["alt"] == "samples of exact trajectory" for one in strips) == 2


@pytest.mark.slow
def test_all_files_are_written_and_again_the_same(measured: Path, tmp_path: Path) -> None:
    names = {"error", "distance", "errors-4", "errors-5", "schedules-4", "schedules-5"}
    assert {path.name for path in (measured / "plots").iterdir()} == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    assert write_report([measured], tmp_path) == tmp_path / "report.html"
    for path in ("report.html", "results.csv", "results.md", *(f"plots/{name}.{kind}" for name in names for kind in ("svg", "png"))):
        assert (tmp_path / path).read_bytes() == (measured / path).read_bytes(), path
    assert not list(tmp_path.rglob(".*"))
    for path in (measured / "plots").glob("*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 5
    for path in (measured / "plots").glob("*.svg"):
        assert path.read_text().startswith('<svg xmlns="http://www.w3.org/2000/svg"') and "prefers-color-scheme" in path.read_text()


def test_skipped_rows_are_said(measured: Path) -> None:
    assert "2 evaluations a step" in Page(measured / "report.html").text  # heun with 5


@pytest.mark.slow
def test_80_rows_of_pictures_are_less_than_3_megabytes(tmp_path: Path) -> None:
    out = write_report([put(tmp_path / "run", many_rows())], tmp_path)
    assert len(many_rows()["rows"]) == 80 and out.stat().st_size < 3e6
    check_numbers(Page(out), many_rows())


@pytest.mark.slow
def test_large_pictures_become_small_ones(tmp_path: Path) -> None:
    made = results([row("ddim", 5, 0.1)])
    page = write_report([put(tmp_path / "run", made, (3, 256, 512))], tmp_path).read_text()
    assert len(page) < 6e5
    picture = Image.open(io.BytesIO(strip(torch.ones(4, 3, 256, 512), 3)))
    assert picture.size == (3 * 64, 32) and picture.mode == "L"


def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    rows = [row(HOSTILE, 5, 0.1, HOSTILE), row(HOSTILE, 6, None, HOSTILE, failed=HOSTILE), row("$x^$", 5, 0.2)]
    made = results(rows, model=HOSTILE, command=HOSTILE, skipped=[{"key": [], "why": HOSTILE}])
    text = write_report([put(tmp_path / HOSTILE.replace("/", "_"), made)], tmp_path, title=HOSTILE).read_text()
    page = Page(tmp_path / "report.html")
    assert "<script" not in text and HOSTILE in page.text and "$x^$" in page.text
    assert not any(tag == "script" for tag, _ in page.tags)
    assert all("<script" not in path.read_text() for path in (tmp_path / "plots").glob("*.svg"))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [None, (2,), (4, 8, 8), (1, 3, 5)], ids=str)
def test_old_results_and_samples_that_are_no_pictures(tmp_path: Path, shape: Sequence[int] | None) -> None:
    rows = [row("ddim", 5, 0.2), row("unipc-2", 5, 0.1, fd=None, fd_features=None)]
    made = {"rows": rows, "model": "m"} if shape is None else results(rows)
    page = Page(write_report([put(tmp_path / "run", made, shape)], tmp_path))
    check_numbers(page, made)
    assert any(tag == "img" for tag, _ in page.tags) == (shape is not None and len(shape) == 3)
    assert ("Errors of single samples" in page.text) == (shape is not None)


def test_a_point_or_nothing_can_be_drawn(tmp_path: Path) -> None:
    one = svg(work_precision({"a": [Point(5, 0.1, None)]}), "one")
    assert one.startswith("<svg viewBox=") and "http" not in one and 'id="one-' in one
    none = results([row("ddim", 5, None, failed="out of memory"), row("heun", 6, float("nan"))])
    page = Page(write_report([put(tmp_path / "run", none, None)], tmp_path))
    assert "all rows failed" in page.text and "out of memory" in page.text and not any(tag == "svg" for tag, _ in page.tags)
    write_report([put(tmp_path / "empty", results([]), None)], tmp_path)
    assert "There are no rows" in Page(tmp_path / "report.html").text


def test_failed_rows_are_shown_as_failed(tmp_path: Path) -> None:
    rows = [row("ddim", 5, 0.1), row("ddim", 6, None, fd=None, failed="it was not finite"), row("heun", 6, None, failed="no memory")]
    page = Page(write_report([put(tmp_path / "run", results(rows), None)], tmp_path))
    assert "it was not finite" in page.text and "no memory" in page.text and "2 of 3 rows failed." in page.text
    assert (tmp_path / "results.md").read_text().count("failed") == 2


# -- several runs -----------------------------------------------------------------------------------------------------


def changed(before: dict[str, Any], after: dict[str, Any], tmp_path: Path, **more: Any) -> tuple[Page, str]:
    folders = [put(tmp_path / "before", results([before]), None), put(tmp_path / "after", results([after], **more), None)]
    page = Page(write_report(folders, tmp_path))
    check_numbers(page, results([before]), results([after], **more))
    marks = [set(str(attrs.get("class")).split()) & {"worse", "better"} for tag, attrs in page.tags if tag == "td"]
    verdicts = [mark for found in marks for mark in found]
    assert len(verdicts) <= 1
    return page, next(iter(verdicts), "equal")


REGRESSIONS = [  # error and interval before and after
    ((0.100, None), (0.1021, None), "worse"),
    ((0.100, None), (0.1019, None), "equal"),
    ((0.100, None), (0.0979, None), "better"),
    ((0.100, [0.09, 0.11]), (0.12, [0.111, 0.13]), "worse"),
    ((0.100, [0.09, 0.11]), (0.12, [0.109, 0.13]), "equal"),
    ((0.100, [0.09, 0.11]), (0.08, [0.07, 0.089]), "better"),
    ((0.100, None), (0.12, [0.11, 0.13]), "worse"),
    ((0.100, None), (None, None), "worse"),
    ((None, None), (0.1, None), "better"),
    ((None, None), (None, None), "equal"),
]


def test_regressions_are_marked(tmp_path: Path) -> None:
    runs = []
    for part in range(2):
        ends = [case[part] for case in REGRESSIONS]
        rows = [row(f"s{k}", 5, error, rmse_ci=ci, failed="why" if error is None else None) for k, (error, ci) in enumerate(ends)]
        runs.append(results(rows))
    folders = [put(tmp_path / name, made, None) for name, made in zip(("before", "after"), runs, strict=True)]
    (group,) = grouped(read_folders(folders))
    assert [change.verdict for change in group.changes] == [verdict for *_, verdict in REGRESSIONS]
    page = Page(write_report(folders, tmp_path))
    check_numbers(page, *runs)
    assert "In two runs: 10 rows; 4 got worse, 3 better." in page.text
    marks = [str(attrs.get("class")).split() for tag, attrs in page.tags if tag == "td"]
    assert [sum(mark in one for one in marks) for mark in ("worse", "better")] == [4, 3]


def test_errors_on_other_noises_are_compared_by_intervals_only(tmp_path: Path) -> None:
    other = {"problem": {"fingerprint": "abc", "seed": 7, "num": 64, "guidance": 1.0}}
    assert changed(row("ddim", 5, 0.1), row("ddim", 5, 0.2), tmp_path, **other)[1] == "equal"
    with_intervals = (row("ddim", 5, 0.1, rmse_ci=[0.09, 0.11]), row("ddim", 5, 0.2, rmse_ci=[0.19, 0.21]))
    assert changed(*with_intervals, tmp_path, **other)[1] == "worse"


@pytest.mark.slow
def test_runs_are_merged_and_the_last_is_shown(tmp_path: Path) -> None:
    first = put(tmp_path / "first", results([row("ddim", 5, 0.3), row("heun", 6, 0.5)]), None)
    second = put(tmp_path / "second", results([row("ddim", 5, 0.2), row("unipc-2", 5, 0.1)]), None)
    write_report([first, second, first / "." / ".." / "first"], tmp_path)  # the same folder twice is one
    table = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert [(one["run"], one["solver"], one["rmse"]) for one in table] == [
        ("second", "ddim", "0.2"),
        ("first", "heun", "0.5"),
        ("second", "unipc-2", "0.1"),
    ]
    other = put(tmp_path / "other", results([row("ddim", 5, 7.0)], model="n", problem={"fingerprint": "x", "guidance": 2.0}), None)
    page = Page(write_report([first, second, other], tmp_path))
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == ["p0-m", "p1-n-guidance-2"]
    assert {path.stem for path in (tmp_path / "plots").iterdir()} >= {"p0-m.error", "p1-n-guidance-2.error"}


def test_distances_in_other_features_are_not_mixed(tmp_path: Path) -> None:
    first = put(tmp_path / "first", results([row("ddim", 5, 0.3, fd=77.5, fd_features="pixels"), row("heun", 6, 0.5, fd=78.5)]), None)
    second = put(tmp_path / "second", results([row("unipc-2", 5, 0.1, fd=0.25), row("unipc-2", 6, 0.1, fd=0.2)]), None)
    first_rows = json.loads((first / "results.json").read_text())["rows"]
    shown = {value for value, _, _ in Page(write_report([first, second], tmp_path)).values}
    assert {"0.25", "78.5"} <= shown and "77.5" not in shown and first_rows[0]["fd"] == 77.5


def test_folders_that_hold_no_benchmark_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match="cannot read"):
        write_report([tmp_path / "nowhere"], tmp_path)
    for wrong in ({"rows": [{"row": "another table"}]}, {"rows": 3}, {}):
        with pytest.raises(ArtifactError, match=r"results.json is damaged: rows"):
            write_report([put(tmp_path / "wrong", wrong, None)], tmp_path)
    with pytest.raises(FewstepError, match="at least one folder"):
        write_report([], tmp_path)
    monkeypatch.setattr("fewstep.evaluate.report.template.find_spec", lambda name: None)
    with pytest.raises(FewstepError, match=r"needs jinja2 and matplotlib: pip install 'fewstep\[report\]'"):
        write_report([tmp_path], tmp_path)


# -- tables as text ---------------------------------------------------------------------------------------------------


def test_csv_gives_back_every_number(measured: Path) -> None:
    for made in (json.loads((measured / "results.json").read_text()), many_rows(), results([row(HOSTILE, 5, None, failed='a, "b"\nc')])):
        for one, flat in zip(made["rows"], csv.DictReader(io.StringIO(to_csv(made))), strict=True):
            for name, value in one.items():
                if name.endswith("_ci"):
                    ends = [flat[f"{name}_{end}"] for end in ("low", "high")]
                    assert ends == (["", ""] if value is None else list(map(repr, value)))
                elif name == "levels":
                    assert flat[name] == " ".join(map(repr, value))
                elif isinstance(value, int | float):
                    assert json.loads(flat[name]) == value
                else:
                    assert flat[name] == ("" if value is None else value)
    assert (measured / "results.csv").read_text() == to_csv(json.loads((measured / "results.json").read_text()))


def test_markdown_gives_back_the_best_of_each_sampler(measured: Path) -> None:
    made = json.loads((measured / "results.json").read_text())
    lines = [line for line in to_markdown(made).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    counts = list(map(int, cells[0][1:]))
    least = {n: min(one["rmse"] for one in made["rows"] if one["nfe"] == n) for n in counts}
    assert [line[0] for line in cells[2:]] == ["`unipc-2`", "`ddim`", "`heun`"]
    for line in cells[2:]:
        for n, cell in zip(counts, line[1:], strict=True):
            mine = [one for one in made["rows"] if f"`{one['solver']}`" == line[0] and one["nfe"] == n]
            if mine:
                best = min(mine, key=lambda one: one["rmse"])
                error = f"**{best['rmse']:.4f}**" if best["rmse"] == least[n] else f"{best['rmse']:.4f}"
                assert cell == f"{error} ({best['fd']:.2f}) `{best['grid']}`"
            else:
                assert cell == ""
    hostile = to_markdown(results([row(HOSTILE, 5, 0.1)])).splitlines()
    assert len(hostile) == 5 and len(re.findall(r"(?<!\\)\|", hostile[-1])) == 3


@pytest.mark.parametrize("name", [HOSTILE, "a|b", "a\\|b", "``", "`", "a\nb|c", "", "\\", "<b>|", "=1+1"])
def test_markdown_shows_a_name_as_it_is_in_one_cell(name: str) -> None:
    line = to_markdown(results([row(name, 5, 0.1, name)])).splitlines()[-1]
    assert line.count("|") == 3 and "\\" not in line  # nothing that would escape a bar
    shown = re.fullmatch(r"\| (.*) \| \*\*0.1000\*\* \(0.50\) (.*) \|", line)
    assert shown is not None and shown[1] == shown[2]
    code = re.fullmatch(r"`([^`]+)`|<code>([^<]*)</code>", shown[1])
    assert code is not None and (code[1] or html.unescape(code[2])) == " ".join(name.split())


@pytest.mark.parametrize("name", ["=HYPERLINK(1)", "+1", "-1", "@SUM(1)", "\t=1", "\r=1"])
def test_no_cell_of_the_csv_is_a_formula(name: str) -> None:
    made = results([{**row(name, 5, -0.5, name, failed=name, levels=[-1.0, None]), name: name}])
    (flat,) = csv.DictReader(io.StringIO(to_csv(made), newline=""))
    shown = f"'{name}".replace("\r", " ")
    assert {key for key, value in flat.items() if value == shown} == {"solver", "grid", "failed", shown}
    assert flat["rmse"] == "-0.5"  # a number stays one
    assert flat["levels"] == "'-1.0 "


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rmse_ci": -1}, "rows.0.rmse_ci: "),
        ({"rmse_ci": [0.1]}, "rows.0.rmse_ci: "),
        ({"rmse": "x"}, "rows.0.rmse: "),
        ({"nfe": 0}, "rows.0.nfe: "),
        ({"nfe": 5.0}, "rows.0.nfe: "),
        ({"solver": ["a"]}, "rows.0.solver: "),
        ({"failed": True}, "rows.0.failed: "),
        ({"levels": [1.0, "x"]}, "rows.0.levels.1"),
        ({"peak_memory": -1}, "rows.0.peak_memory: "),
    ],
)
def test_a_row_of_wrong_types_is_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    folder = put(tmp_path / "run", results([{**row("ddim", 5, 0.1), **change}]), None)
    with pytest.raises(ArtifactError, match=f"results.json is damaged: {says}"):
        write_report([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["rows", "version", "command", "model", "machine", "problem", "reference", "skipped"])
def test_a_table_of_wrong_types_is_named(tmp_path: Path, field: str) -> None:
    folder = put(tmp_path / "run", {**results([row("ddim", 5, 0.1)]), field: 3.5}, None)
    with pytest.raises(ArtifactError, match=f"results.json is damaged: {field}: "):
        write_report([folder], tmp_path / "out")


def test_the_template_is_within_the_package() -> None:
    assert (files("fewstep.evaluate.report") / "report.html.j2").is_file()


def test_new_fields_are_in_the_table(tmp_path: Path) -> None:
    page = Page(write_report([put(tmp_path / "run", many_rows(), None)], tmp_path))
    known = many_rows()["rows"][0]
    exact = {value for value, _, _ in page.values}
    for field in NEW[:-1]:
        values = known[field] if isinstance(known.get(field), list) else [known.get(field)]
        assert all(json.dumps(value) in exact for value in values if value is not None), field
