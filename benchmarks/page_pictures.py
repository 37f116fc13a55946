"""The pictures of docs/page.md: the page is served, each of its tabs does its work in a browser, and is photographed.

    pip install 'fewstep[browser]'
    python benchmarks/page_pictures.py --out docs        # page.png, page-compare.png, ...; minutes

It needs chromium or google-chrome. A picture has 256 colours at most, and is below `LIMIT` bytes.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from fewstep.apps.page.jobs import Jobs
from fewstep.apps.page.models import Models
from fewstep.apps.page.page import serve
from fewstep.apps.page.workshop import Workshop
from fewstep.runtime.artifact import write_whole

WIDTH = 1300  # pixels
LIMIT = 150_000
LONGEST = 1_800_000  # milliseconds that a job may take on a busy machine
HOLE = ((1, 3), (6, 3), (6, 4), (1, 4))  # pixels of the picture that the mouse goes over, x and y


def sample(page: Any) -> None:  # noqa: ANN401 - playwright's
    page.get_by_role("button", name="Sample").click()
    page.wait_for_selector("text=/RMSE 0/")


def compare(page: Any) -> None:  # noqa: ANN401
    page.get_by_label("Noises").first.fill("16")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.wait_for_selector("iframe")
    page.frame_locator("iframe").locator("svg, img").first.wait_for()


def fit(page: Any) -> None:  # noqa: ANN401
    page.get_by_label("Evaluations of each sampler").fill("5")
    page.get_by_role("button", name="Plan").click()
    page.wait_for_selector("text=in all, about")
    page.get_by_role("button", name="Fit", exact=True).click()
    page.wait_for_selector("text=Mean error on held-out noises")


def inspect(page: Any) -> None:  # noqa: ANN401
    page.get_by_role("button", name="Inspect", exact=True).click()
    page.wait_for_selector("iframe")
    page.frame_locator("iframe").locator("svg, img").first.wait_for()


def restore(page: Any) -> None:  # noqa: ANN401
    canvas = page.locator("canvas.fs-canvas")
    canvas.wait_for()
    page.wait_for_function("document.querySelector('canvas.fs-canvas').width === 8")
    box = canvas.bounding_box()
    for number, (x, y) in enumerate(HOLE):
        page.mouse.move(box["x"] + (x + 0.5) * box["width"] / 8, box["y"] + (y + 0.5) * box["height"] / 8, steps=12)
        if number == 0:
            page.mouse.down()
    page.mouse.up()
    page.get_by_role("button", name="Restore", exact=True).click()
    page.wait_for_selector("text=uncertainty")


TABS: dict[str, tuple[str, Callable[[Any], None], int]] = {  # by tab: the picture, its work, its height
    "Sample": ("page", sample, 640),
    "Compare": ("page-compare", compare, 960),
    "Fit": ("page-fit", fit, 840),
    "Inspect": ("page-inspect", inspect, 960),
    "Restore": ("page-restore", restore, 720),
}


def small(png: bytes) -> bytes:
    """Return a picture in at most 256 colours."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    if buffer.tell() > LIMIT:
        raise SystemExit(f"a picture of {buffer.tell()} bytes: make it lower")
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the pictures")
    parser.add_argument("--only", choices=[tab.lower() for tab in TABS], help="one tab alone")
    args = parser.parse_args()
    out = args.out.resolve()
    chromium = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if chromium is None:
        raise SystemExit("there is no chromium on this machine")
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        os.chdir(scratch)  # so that commands on the page name runs/ui, as they do for a reader
        folder = Path("runs/ui")
        folder.mkdir(parents=True)
        jobs = Jobs(folder)
        served = serve(Workshop(folder, Models(folder), jobs), show=False)
        jobs.prepare()
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for tab, (name, work, height) in TABS.items():
            if args.only not in (None, tab.lower()):
                continue
            page = browser.new_context(viewport={"width": WIDTH, "height": height}).new_page()
            page.set_default_timeout(LONGEST)
            page.goto(served.local_url)
            page.get_by_role("tab", name=tab).click()
            work(page)
            page.wait_for_timeout(3000)
            write_whole(out / f"{name}.png", small(page.screenshot()))
            page.context.close()
        browser.close()
        served.close()
        jobs.close()


if __name__ == "__main__":
    main()
