"""The server: it answers this machine alone, the page asks no other host, and gradio's own doors are closed."""

import asyncio
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from tests.apps.conftest import run

from fewstep import FewstepError
from fewstep.apps.page.jobs import Jobs
from fewstep.apps.page.models import Models
from fewstep.apps.page.page import FILE_RULES, HOST, RULES, TABS, Offline, OwnPage, build, serve
from fewstep.apps.page.workshop import Workshop


def test_the_page_has_its_tabs(shop: Workshop) -> None:
    page = build(shop)
    assert [block.label for block in page.blocks.values() if isinstance(block, gr.Tab)] == [name for name, _ in TABS]
    assert page.analytics_enabled is False


@pytest.mark.parametrize("name", ["digits-edm-3step", "digits-flow-map"])
def test_a_model_that_cannot_be_inspected_has_a_page(name: str, shop: Workshop) -> None:
    """The model of the command is the first of each tab."""
    named = Models(shop.out, name)
    page = build(Workshop(shop.out, named, shop.jobs))
    assert any("its teacher" in str(block.value) for block in page.blocks.values() if isinstance(block, gr.HTML))
    made_for = named.open(name).num_jumps or (3,)
    counts = [block.value for block in page.blocks.values() if getattr(block, "label", None) in ("Network evaluations", "Evaluations")]
    assert counts[:2] == [made_for[0], ",".join(map(str, made_for))]  # of the tabs Sample and Compare


def test_links_to_other_hosts_are_left_out() -> None:
    page = (
        b'<head><link rel="preconnect" href="https://fonts.example/" /><script src="https://cdn.example/a.js" async></script>'
        b'<meta property="og:image" content="https://example/x.jpg" /><link href="./own.css" /><script>own()</script></head>'
    )
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html"), (b"content-length", b"9")]})
        await send({"type": "http.response.body", "body": page[:50], "more_body": True})
        await send({"type": "http.response.body", "body": page[50:]})

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Offline(app)({"type": "http"}, send, send))
    headers = dict(sent[0]["headers"])
    assert sent[1]["body"] == b'<head><link href="./own.css" /><script>own()</script></head>'
    assert headers[b"content-length"] == str(len(sent[1]["body"])).encode() and headers[b"content-security-policy"] == RULES.encode()


@pytest.mark.parametrize(
    ("headers", "answered"),
    [
        ({"host": "127.0.0.1:7860"}, True),
        ({"host": "localhost:9000", "origin": "http://localhost:9000"}, True),  # at the end of a tunnel
        ({"host": "localhost"}, True),
        ({"host": "evil.example:7860"}, False),  # a name that was led here
        ({"host": "evil.example", "origin": "http://evil.example"}, False),
        ({"host": "127.0.0.1:7860", "origin": "http://evil.example"}, False),  # a form of another site
        ({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:8080"}, False),
        ({"host": "127.0.0.1:7860", "origin": "null"}, False),
        ({"host": "[", "origin": "http://["}, False),
        ({}, False),
    ],
)
def test_it_answers_its_own_requests_alone(headers: dict[str, str], answered: bool) -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent.append("answered")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(key.encode(), value.encode()) for key, value in headers.items()]}
    asyncio.run(OwnPage(app)(scope, send, send))
    assert (sent == ["answered"]) == answered
    if not answered:
        assert sent[0]["status"] == 403 and b"answers its own requests alone" in sent[1]["body"]


def test_without_gradio_the_command_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr("fewstep.apps.commands.ui.find_spec", lambda name: None)
    assert run(monkeypatch, "ui", "--out", tmp_path / "out") == 2
    assert "pip install 'fewstep[ui]'" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A page that is served, and its workshop."""
    out = tmp_path_factory.mktemp("ui")
    shop = Workshop(out, Models(out), Jobs(out))
    page = serve(shop, show=False)
    yield page, shop
    page.close()
    shop.jobs.close()


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status, answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode("utf-8", "replace")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what gradio and its libraries are deprecated in
def test_its_doors(served: Any, tmp_path: Path) -> None:
    page, shop = served
    assert page.local_url.startswith(f"http://{HOST}:") and page.share_url is None
    status, text = get(page.local_url)
    assert status == 200 and not re.findall(r'(?:src|href)="https?://', text)
    secret = tmp_path / "secret.txt"
    secret.write_text("what nobody may read")
    (shop.out / "mine.txt").write_text("mine")
    for path in (secret, "/etc/passwd", f"{shop.out}/../{secret.name}", Path(__file__).parents[3] / "pyproject.toml"):
        status, text = get(f"{page.local_url}gradio_api/file={path}")
        assert status in (403, 404) and "what nobody may read" not in text
    assert get(f"{page.local_url}gradio_api/file={shop.out / 'mine.txt'}") == (200, "mine")
    with urllib.request.urlopen(f"{page.local_url}gradio_api/file={shop.out / 'mine.txt'}", timeout=60) as answer:
        assert answer.headers["content-security-policy"] == FILE_RULES  # an uploaded page runs no script in the name of this one
    for strange in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(f"{page.local_url}config", headers=strange), timeout=60)
    port = int(page.local_url.rstrip("/").rpartition(":")[2])
    with pytest.raises(FewstepError, match=f"port {port} of {HOST} is taken"):
        serve(shop, port=port, show=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_program_gets_sentences_too(served: Any) -> None:
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(served[0].local_url, verbose=False, analytics_enabled=False)
    words = ["digits-edm", "recommended", "default", "ddim", "default", 5, 1, "one of each", 0, 2, False, ""]
    pictures, command, _ = client.predict(*words, api_name="/sample")
    assert "<img" in pictures and "fewstep sample digits-edm --solver fitted --nfe 5" in json.dumps(command)
    with pytest.raises(AppError, match="21 is greater than maximum value 20"):  # what a field refuses gradio says
        client.predict(*[*words[:5], 21, *words[6:]], api_name="/sample")
    pictures, *_ = client.predict(*words[:2], "karras", *words[3:], api_name="/sample")
    assert "the recommended sampler has a grid of its own" in pictures and "Traceback" not in pictures
