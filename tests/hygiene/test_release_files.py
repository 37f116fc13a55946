"""What a release is made of: one version, a changelog in its form, supported versions that CI tests, forms that GitHub can read."""

import datetime
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:  # of pytest
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CHANGES = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
RELEASES = re.findall(r"^## (.*)$", CHANGES, re.M)
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}  # of Keep a Changelog


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def lower_bound(name: str) -> str:
    asked = [*PROJECT["dependencies"], *(one for many in PROJECT["optional-dependencies"].values() for one in many)]
    (bound,) = {found[1] for one in asked if (found := re.fullmatch(rf"{name}>=([\d.]+)", one))}
    return bound


def constraint(file: str, name: str) -> str:
    (version,) = re.findall(rf"^{name}==([\d.]+)$", (ROOT / file).read_text(), re.M)
    return version


def test_the_version_stands_in_one_place() -> None:
    version = re.compile(rf"(?<![\d.]){re.escape(PROJECT['version'])}(?![\d.])")
    others = [ROOT / "CITATION.cff", ROOT / "mkdocs.yml", ROOT / "README.md", *(ROOT / "src").rglob("*.py")]
    assert [path for path in others if version.search(path.read_text(encoding="utf-8"))] == []


def test_the_changelog_begins_with_this_version_and_has_the_form() -> None:
    versions = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d|Unreleased)", release) for release in RELEASES]
    assert all(versions), RELEASES
    first, *others = [(found[1], found[2]) for found in versions if found]
    assert first[0] == PROJECT["version"]
    dates = [datetime.date.fromisoformat(date) for _, date in others]  # of all but the first none is unreleased
    assert dates == sorted(dates, reverse=True)
    for release in re.split(r"^## .*$", CHANGES, flags=re.M)[1:]:
        kinds = re.findall(r"^### (.*)$", release, re.M)
        assert kinds and len(kinds) == len(set(kinds)) and set(kinds) <= KINDS


def test_supported_versions_are_those_that_are_required_and_tested() -> None:
    page = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    jobs = read(".github/workflows/ci.yml")["jobs"]
    oldest = next(step["with"]["python-version"] for step in jobs["oldest"]["steps"] if "with" in step)
    said = {name: (low, high) for name, low, high in re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)}
    assert said["Python"] == (oldest, jobs["test"]["strategy"]["matrix"]["python"][-1])
    assert PROJECT["requires-python"] == f">={oldest}" and f"Programming Language :: Python :: {oldest}" in PROJECT["classifiers"]
    for name, package in (("PyTorch", "torch"), ("diffusers", "diffusers")):
        low, high = constraint("constraints-oldest.txt", package), constraint("constraints.txt", package)
        assert said[name] == (low.rpartition(".")[0], high.rpartition(".")[0]) and said[name][0] == lower_bound(package)


def test_workflows_run_what_there_is() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text())["jobs"]
        lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
        assert lines
        for line in lines:
            what = line.split()
            assert (what[0] == "make" and what[1] in targets) or (ROOT / what[0]).is_file(), line


def test_the_citation_has_what_the_form_asks_for() -> None:
    cited = read("CITATION.cff")
    assert cited["cff-version"] == "1.2.0" and {"message", "title", "authors", "license", "repository-code"} <= set(cited)
    assert cited["license"] == PROJECT["license"] and cited["authors"] == [{"name": one["name"]} for one in PROJECT["authors"]]
    assert cited["repository-code"] == PROJECT["urls"]["Repository"]


@pytest.mark.parametrize("name", ["bug", "solver"])
def test_an_issue_form_is_one_that_github_reads(name: str) -> None:
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= set(form) and set(form) <= {"name", "description", "labels", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    for field in fields:
        assert field["type"] in ("input", "textarea", "dropdown", "checkboxes") and field["attributes"]["label"]
        assert set(field) <= {"type", "id", "attributes", "validations"}
    assert any(field.get("validations", {}).get("required") for field in fields)
