"""What a newcomer waits for: the first table of a network of one's own, and the first picture on the page, from `pip install` on.

python -m benchmarks.newcomer --constraint constraints.txt --out benchmarks/results/newcomer.json

A wheel of this clone is installed into an environment with nothing in it, by the words of the guides, and the steps of
docs/own-network-in-ten-minutes.md are done up to its first table; then those of docs/page.md, in a browser, up to the first picture. It
needs playwright and a chromium here, none of it there. How long an installation takes is a matter of the connection and of the build of
PyTorch, so it has a row of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from benchmarks.ten_minutes import GUIDE, ROOT, run

from fewstep.runtime.artifact import write_whole

PAGE = ROOT / "docs" / "page.md"
INSTALL = re.compile(r"pip install ((?:'[^']*'|\"[^\"]*\"|[\w\[\],.-]+)(?: (?:'[^']*'|\"[^\"]*\"|[\w\[\],.-]+))*)")
PATIENCE = 600  # seconds for the page and for its first picture
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def first_table(text: str) -> str:
    """Return a guide up to the block of its first benchmark, which prints a table."""
    return text[: text.index("```", text.index("fewstep bench")) + 3]


def requirements(text: str, wheel: Path) -> list[str]:
    """Return what a guide installs first, with a wheel in place of the package of an index."""
    found = INSTALL.search(text)
    if found is None:
        raise ValueError("the guide does not say what to install")
    return [re.sub(r"^fewstep(\[[\w,]*\])?$", rf"fewstep\1 @ {wheel.as_uri()}", one) for one in shlex.split(found[1])]


def install(text: str, wheel: Path, python: str, constraint: Path | None) -> dict[str, Any]:
    """Install what a guide names, and return the row of it."""
    limits = [] if constraint is None else ["--constraint", str(constraint)]
    begin = time.perf_counter()
    subprocess.run([python, "-m", "pip", "install", "--quiet", *limits, *requirements(text, wheel)], check=True)
    found = INSTALL.search(text)
    assert found is not None  # see requirements
    return _row(found[0], begin)


def first_picture(python: str, folder: Path) -> dict[str, Any]:
    """Start the page, press Sample in a browser as soon as there is a button, and return the row up to the first picture.

    Raises:
        RuntimeError: there is no browser, or the page ended before it was there.
    """
    from playwright.sync_api import sync_playwright

    chromium = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if chromium is None:
        raise RuntimeError("there is no chromium on this machine: apt-get install chromium")
    begin = time.perf_counter()
    words = [python, "-m", "fewstep", "ui", "--no-open"]
    page = subprocess.Popen(words, cwd=folder, env={**os.environ, "PYTHONPATH": ""}, stdout=subprocess.PIPE, text=True)
    try:
        assert page.stdout is not None  # a pipe, see above
        url = next((line.split()[1] for line in page.stdout if line.startswith("page: ")), None)
        if url is None:
            raise RuntimeError(f"the page ended with {page.wait()}")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            tab = browser.new_page()
            tab.set_default_timeout(1000 * PATIENCE)
            tab.goto(url)
            tab.get_by_role("button", name="Sample").click()
            tab.wait_for_selector(".fs-row img")
            row = _row("fewstep ui", begin)
            browser.close()
        return row
    finally:
        page.terminate()
        page.wait()


def _row(step: str, begin: float) -> dict[str, Any]:
    row = {"step": step, "seconds": round(time.perf_counter() - begin, 1)}
    print(f"{row['seconds']:6.1f} s  {step}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--constraint", type=Path, help="a file of pip's constraints, as for a build of PyTorch without CUDA")
    args = parser.parse_args()
    constraint = None if args.constraint is None else args.constraint.resolve()
    guide, page = (path.read_text(encoding="utf-8") for path in (GUIDE, PAGE))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder / "dist"), str(ROOT)]
        subprocess.run(build, check=True)
        (wheel,) = (folder / "dist").glob("*.whl")
        venv.create(folder / "venv", with_pip=True)
        python, work = str(folder / "venv" / "bin" / "python"), folder / "work"
        work.mkdir()
        table = [install(guide, wheel, python, constraint), *run(work, first_table(guide), python=python)]
        picture = [install(page, wheel, python, constraint), first_picture(python, work)]
        minutes = {name: round(sum(row["seconds"] for row in rows) / 60, 1) for name, rows in (("table", table), ("picture", picture))}
        machine = {"cores": os.cpu_count(), "python": platform.python_version()}
        found = {"machine": machine, "minutes": minutes, "table": table, "picture": picture}
        write_whole(args.out, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
