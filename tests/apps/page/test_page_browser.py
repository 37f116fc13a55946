"""The page in a browser: it asks no other host, shows what was asked for, is the same after it is loaded again, and fits a phone.

`make test-browser` sets FEWSTEP_BROWSER=required: without a browser these tests fail then, where they are passed over otherwise.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integrations.diffusers import tiny_pipelines

from fewstep.apps.page.jobs import Jobs
from fewstep.apps.page.models import Models
from fewstep.apps.page.page import serve
from fewstep.apps.page.workshop import Workshop

REQUIRED = os.environ.get("FEWSTEP_BROWSER") == "required"
if REQUIRED:
    from playwright import sync_api
else:
    sync_api = pytest.importorskip("playwright.sync_api", reason="these tests drive a browser: pip install 'fewstep[browser]'")
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason="there is no chromium on this machine: apt-get install chromium"),
]
LONGEST = 120_000  # milliseconds that a machine under load may take


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    out = tmp_path_factory.mktemp("ui")
    jobs = Jobs(out)
    page = serve(Workshop(out, Models(out), jobs), show=False)
    jobs.prepare()
    yield page
    page.close()
    jobs.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    assert CHROMIUM, "there is no chromium on this machine: apt-get install chromium"
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


def opened(browser: Any, url: str, width: int = 1300, scheme: str = "light") -> tuple[Any, list[str]]:
    """A page of its own, and the hosts that it asks, in a list that grows."""
    page, hosts = browser.new_context(viewport={"width": width, "height": 860}, color_scheme=scheme).new_page(), list[str]()
    page.set_default_timeout(LONGEST)
    page.on("request", lambda request: hosts.append(request.url.split("/")[2]) if request.url.startswith("http") else None)
    page.goto(url)
    page.get_by_role("button", name="Sample").wait_for()
    return page, hosts


@pytest.mark.parametrize(("width", "scheme"), [(1300, "light"), (390, "dark")])
def test_sampling(served: Any, browser: Any, width: int, scheme: str) -> None:
    page, hosts = opened(browser, served.local_url, width, scheme)
    shown = page.locator("[role=tab]:visible").all_inner_texts()  # a phone has room for all of them
    assert shown == ["Sample", "Compare", "Fit", "Inspect", "Restore"]
    page.get_by_role("button", name="Sample").click()
    page.wait_for_selector("text=/RMSE 0/")
    assert page.locator(".fs-row img").count() == 3
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert set(hosts) == {served.local_url.split("/")[2]}
    page.context.close()


def test_a_job_survives_a_reload_and_leaves_another_tab_alone(served: Any, browser: Any) -> None:
    one, _ = opened(browser, served.local_url)
    two, _ = opened(browser, served.local_url)
    for page in (one, two):
        page.get_by_role("tab", name="Fit").click()
    one.get_by_label("Evaluations of each sampler").fill("3")
    one.get_by_label("Budget").fill("600")
    one.get_by_role("button", name="Fit", exact=True).click()
    one.wait_for_url("**fit=fit-1")
    one.reload()
    one.get_by_role("tab", name="Fit").click()
    one.wait_for_selector("text=Mean error on held-out noises")
    assert "fit-1" not in two.url and not two.locator("text=Mean error on held-out noises").count()
    with one.expect_download() as download:
        one.get_by_role("button", name="Download").first.click()
    assert download.value.suggested_filename == "fit-1-nfe-03.zip"
    one.context.close()
    two.context.close()


def test_a_text_pipeline_has_a_prompt_in_place_of_a_class(browser: Any, tmp_path: Path) -> None:
    pipeline = tiny_pipelines.make("sd", tmp_path / "pipelines")
    jobs = Jobs(tmp_path / "ui")
    served = serve(Workshop(tmp_path / "ui", Models(tmp_path / "ui", str(pipeline)), jobs), show=False)
    page, _ = opened(browser, served.local_url)
    assert page.get_by_label("Guidance").first.input_value() == "7.5" and not page.get_by_label("Class").is_visible()
    page.get_by_label("Prompt").fill("a red cat")
    page.get_by_role("button", name="Sample").click()
    page.wait_for_selector("text=/RMSE .* of latents/")
    assert page.locator(".fs-row img").count() == 3 and "a red cat" in page.locator(".cm-content").last.inner_text()
    if shots := os.environ.get("FEWSTEP_SHOTS"):
        page.screenshot(path=f"{shots}/prompt.png", full_page=True)
    page.get_by_label("Model").first.click()
    page.get_by_role("option", name="digits-edm", exact=True).click()
    page.get_by_label("Class").wait_for()
    assert not page.get_by_label("Prompt").is_visible()
    page.context.close()
    served.close()
    jobs.close()
