"""Fill a page's template; all pages share their looks, ``look.css.j2``, and are complete in themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fewstep.evaluate.report import plots
from fewstep.evaluate.report.findings import Name, Number
from fewstep.runtime.artifact import check_writable, write_whole
from fewstep.runtime.errors import FewstepError

__all__ = ["check_packages", "rendered", "write_page"]


def check_packages() -> None:
    """Check that pages can be made, before long work that is to end with one.

    Raises:
        FewstepError: matplotlib or jinja2 is missing.
    """
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise FewstepError(f"a report needs {' and '.join(missing)}: pip install 'fewstep[report]'")


def write_page(page: Callable[[], str], out: Path) -> Path:
    """Write ``report.html`` in a folder as a function makes it, once it can be made and written, and return its path.

    Raises:
        FewstepError: matplotlib or jinja2 is missing.
        ArtifactError: the folder cannot be written.
    """
    check_packages()
    check_writable(out)
    write_whole(out / "report.html", page().encode())
    return out / "report.html"


def rendered(template: str, page: Mapping[str, Any]) -> str:
    """Return a template of this folder, filled."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def load(name: str) -> str:
        return (files("fewstep.evaluate.report") / name).read_text(encoding="utf-8")

    options = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    made = Environment(loader=FunctionLoader(load), **options)
    made.tests |= {"number": lambda value: isinstance(value, Number), "name": lambda value: isinstance(value, Name)}
    return made.get_template(template).render({**page, "light": plots.LIGHT, "dark": plots.DARK})
