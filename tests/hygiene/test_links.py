"""No link between files of the repository is dead, and the strict build of the documentation fails on one that is."""

import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SHOWN_BY_GITHUB = [
    *ROOT.glob("*.md"),
    *(ROOT / ".github").rglob("*.md"),
    *(ROOT / "comfyui").rglob("*.md"),
    *(ROOT / "assets").glob("*/README.md"),
]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
OURS = re.compile(r"https://github\.com/fewstep/fewstep/(?:blob|tree)/main/([^\s)#\"]+)")
SITE = re.compile(r"https://fewstep\.github\.io/fewstep/([\w/-]*)")
FENCED = re.compile(r"^```.*?^```", re.M | re.S)


def text_of(path: Path) -> str:
    return FENCED.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path, *, github: bool) -> set[str]:
    """The anchors of a page's headings, as GitHub or the site makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+?)\s*$", text_of(path), re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading).lower()
        if github:
            slug, joint = re.sub(r"[^\w\- ]", "", words).replace(" ", "-"), "-"
        else:
            plain = unicodedata.normalize("NFKD", words).encode("ascii", "ignore").decode()
            slug, joint = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip()), "_"
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}{joint}{found[slug]}"] = 0
    return set(found)


def dead(path: Path, *, github: bool) -> list[str]:
    """The links of a file that lead nowhere in the repository."""
    text, gone = text_of(path), []
    for link in LINK.findall(text):
        where, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (path.parent / where).resolve() if where else path
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target, github=github)):
            gone.append(link)
    gone += [link for link in OURS.findall(text) if not (ROOT / link).exists()]
    sources = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in PAGES} | {""}
    return gone + [link for link in SITE.findall(text) if link.strip("/") not in sources]


@pytest.mark.parametrize("path", SHOWN_BY_GITHUB, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_of_files_lead_somewhere(path: Path) -> None:
    assert dead(path, github=True) == []


def test_links_of_pages_lead_somewhere() -> None:
    assert {path.name: gone for path in PAGES if (gone := dead(path, github=False))} == {}


def test_links_of_the_forms_lead_somewhere() -> None:
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert dead(path, github=True) == [], path.name


def test_every_page_stands_once_in_the_menu() -> None:
    """The strict build refuses one that does not, and takes a minute to say so."""
    menu = re.search(r"^nav:.*?(?=^\w|\Z)", (ROOT / "mkdocs.yml").read_text(), re.M | re.S)
    assert menu
    assert sorted(re.findall(r"[\w/.-]+\.md", menu[0])) == sorted(path.relative_to(ROOT / "docs").as_posix() for path in PAGES)


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Two words\n# Two words\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md#two-words) [b](other.md#two-words-1) [c](other.md#three) ![d](gone.png) [e](https://x.example)")
    assert dead(page, github=True) == ["other.md#three", "gone.png"]
    page.write_text(
        "https://github.com/fewstep/fewstep/blob/main/gone.py https://fewstep.github.io/fewstep/choose/ https://fewstep.github.io/fewstep/gone/"
    )
    assert dead(page, github=True) == ["gone.py", "gone/"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "link", ["[x](there.md#here)", "[x](gone.md)", "[x](there.md#gone)", "![x](gone.png)", "[x](../src/gone)", "[x](/docs/gone)"]
)
def test_the_strict_build_fails_on_a_dead_link(link: str, tmp_path: Path) -> None:
    """By the words of `make docs` and the validation of mkdocs.yml: with --quiet no warning is counted, and nothing fails."""
    (words,) = re.findall(r"mkdocs (build .*)$", (ROOT / "Makefile").read_text(), re.M)
    validation = re.search(r"^validation:.*?(?=^\w)", (ROOT / "mkdocs.yml").read_text(), re.M | re.S)
    assert validation
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Home\n\n{link}\n")
    (tmp_path / "docs" / "there.md").write_text("# There\n\n## Here\n")
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump({"site_name": "t", **yaml.safe_load(validation[0])}))
    run = subprocess.run([sys.executable, "-m", "mkdocs", *words.split()], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode == 0) == (link == "[x](there.md#here)"), run.stderr
