"""The report in a real browser: opened from the disk it asks for nothing, complains of nothing, and fits a desk and a phone."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.report.test_report import many_rows, put

from fewstep.evaluate.report.write import write_report

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))), None)
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update")
WIDTHS = {"desk": 1280, "phone": 390}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")]


class Browser:
    """Chromium driven by its own protocol over a pipe."""

    def __init__(self, profile: str) -> None:
        (from_us, self.to_it), (self.from_it, to_us) = os.pipe(), os.pipe()
        command = f'exec "$0" "$@" 3<&{from_us} 4>&{to_us}'
        words = [str(CHROMIUM), *QUIET, "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(["bash", "-c", command, *words], pass_fds=(from_us, to_us), stderr=subprocess.DEVNULL)
        os.close(from_us)
        os.close(to_us)
        self.number, self.rest, self.events, self.session = 0, b"", [], None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            more = os.read(self.from_it, 1 << 20)
            assert more, "the browser has gone"
            self.rest += more
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        whole = json.dumps(message).encode() + b"\0"
        while whole:
            whole = whole[os.write(self.to_it, whole) :]
        while (answer := self._next()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path, width: int, scheme: str = "light") -> None:
        """Show a page from the disk, as wide as a screen of this kind, until it has loaded."""
        self.events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, expression: str) -> Any:
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def picture(self, path: Path, height: int | None = None) -> None:
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]))

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and whatever was not answered."""
        bad = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Network.loadingFailed")
        return [json.dumps(event) for event in self.events if event.get("method") in bad]

    def requests(self) -> list[str]:
        sent = [event["params"]["request"]["url"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    def close(self) -> None:
        os.close(self.to_it)
        self.process.terminate()
        self.process.wait(20)
        os.close(self.from_it)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        made = Browser(profile)
        yield made
        made.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    return write_report([put(out / "earlier", many_rows(scale=0.8)), put(out / "now", many_rows())], out)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", WIDTHS)
def test_it_opens_from_the_disk_and_fits(browser: Browser, page: Path, screen: str, scheme: str) -> None:
    browser.open(page, WIDTHS[screen], scheme)
    assert browser.value("document.readyState") == "complete"
    assert browser.value("innerWidth") == WIDTHS[screen]
    assert browser.value("document.scrollingElement.scrollWidth") <= WIDTHS[screen]
    browser.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.value("document.scrollingElement.scrollWidth") <= WIDTHS[screen]
    assert browser.complaints() == [] and browser.requests() == [page.as_uri()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_plots_take_the_scheme(browser: Browser, page: Path, scheme: str) -> None:
    browser.open(page, 1280, scheme)
    shades = {
        name: sum(json.loads(browser.value(f"JSON.stringify({expression}.match(/\\d+/g).slice(0, 3).map(Number))"))) / 3
        for name, expression in {
            "paper": "getComputedStyle(document.body).backgroundColor",
            "ink": "getComputedStyle(document.body).color",
            "label": "getComputedStyle(document.querySelector('figure svg text')).fill",
        }.items()
    }
    assert (shades["paper"] > shades["ink"]) == (scheme == "light")
    assert abs(shades["paper"] - shades["label"]) > 80


def test_the_tables_numbers_are_on_the_screen(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    seen = set(browser.value("document.body.innerText").split())
    rows = many_rows()["rows"]
    for nfe in {row["nfe"] for row in rows}:
        assert f"{min(row['rmse'] for row in rows if row['nfe'] == nfe):.4f}" in seen


def test_text_is_no_smaller_than_nine_pixels_on_a_phone(browser: Browser, page: Path) -> None:
    browser.open(page, 390)
    script = (
        "Math.min(...[...document.querySelectorAll('figure svg')].map(s => 10 * s.getBoundingClientRect().width / s.viewBox.baseVal.width))"
    )
    assert browser.value(script) >= 8.9  # names in plots are 10 of the plot's own units
    assert (
        browser.value(
            "Math.min(...[...document.querySelectorAll('p,td,th,code,small')].map(e => parseFloat(getComputedStyle(e).fontSize)))"
        )
        >= 11
    )
