"""The page: its tabs put together, its looks, and the server, which answers this machine alone and lets the page ask no other."""

from __future__ import annotations

import os
import re
import socket
import warnings
from collections.abc import Awaitable, Callable, MutableMapping
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from gradio.themes import Base
from PIL import Image
from starlette.middleware import Middleware

from fewstep.apps.page import compare, fit, inspect, restore, sample
from fewstep.apps.page.workshop import Workshop
from fewstep.runtime.errors import FewstepError

__all__ = ["HOST", "PORT", "Offline", "OwnPage", "build", "serve"]

HOST, PORT, TRIED = "127.0.0.1", 7860, 20
NAMES = (HOST, "localhost")  # what a browser on this machine, or at the end of a tunnel, calls it
UPLOAD = "8mb"  # at most
PIXELS = 2**24  # of a picture that is decoded, at most
RULES = (  # what the browser may load: from this page alone
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; frame-src 'self' blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)
FILE = "/gradio_api/file"
FILE_RULES = "sandbox allow-downloads; default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'"  # runs nothing
TABS: tuple[tuple[str, Callable[[Workshop, gr.Blocks], None]], ...] = (
    ("Sample", sample.tab),
    ("Compare", compare.tab),
    ("Fit", fit.tab),
    ("Inspect", inspect.tab),
    ("Restore", restore.tab),
)


def build(shop: Workshop) -> gr.Blocks:
    """Return the page of a workshop."""
    with gr.Blocks(title="fewstep", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as page, gr.Tabs():
        for name, tab in TABS:
            with gr.Tab(name, id=name.lower()):
                tab(shop, page)
    return page


def serve(shop: Workshop, *, port: int | None = None, share: bool = False, show: bool = True) -> gr.Blocks:
    """Serve the page from a thread of its own, and return it; ``page.local_url`` is its address, ``page.close()`` ends it.

    Args:
        shop: what it works with.
        port: by default the first from 7860 on that is free.
        share: also through a public link of gradio's.
        show: in a browser.

    Raises:
        FewstepError: the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str((shop.out / ".page" / "uploads").resolve())
    Image.MAX_IMAGE_PIXELS = PIXELS  # twice as many are an error of Pillow's own, for what gradio decodes
    if port is not None and not _free(port):
        raise FewstepError(f"port {port} of {HOST} is taken, by another page perhaps: name another one, or leave --port out")
    port = next((one for one in range(PORT, PORT + TRIED) if _free(one)), None) if port is None else port
    if port is None:
        raise FewstepError(f"ports {PORT} to {PORT + TRIED - 1} of {HOST} are taken: name another one by --port")
    page = build(shop)
    page.queue(default_concurrency_limit=4, max_size=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what gradio itself is deprecated in
        page.launch(
            server_name=HOST,
            server_port=port,
            share=share,
            inbrowser=show,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            ssr_mode=False,
            allowed_paths=[str(shop.out.resolve())],
            max_file_size=UPLOAD,
            theme=_theme(),
            css=(files("fewstep.apps.page") / "look.css").read_text(encoding="utf-8"),
            footer_links=[],
            app_kwargs={"middleware": [Middleware(Offline), *([] if share else [Middleware(OwnPage)])]},
        )
    return page


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _theme() -> Base:
    """Return a plain theme in the fonts of the machine: nothing is fetched for it."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace"]
    return Base(primary_hue="blue", neutral_hue="slate", radius_size="sm", spacing_size="sm", text_size="md", font=sans, font_mono=mono)


# -- nothing from elsewhere ---------------------------------------------------------------------------------------------

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ELSEWHERE = re.compile(
    rb"<(?:link|script)\b[^>]*\b(?:href|src)=\"https?://[^>]*>(?:\s*</script>)?|<meta[^>]*\bcontent=\"https?://[^>]*>", re.I
)


class Offline:
    """Middleware that leaves links to other hosts out of gradio's page, and tells the browser to load nothing from them.

    Args:
        app: the application that it stands before.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        held: list[Message] = []
        body = bytearray()

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = FILE_RULES if str(scope.get("path", "")).startswith(FILE) else RULES
                rules = [(b"content-security-policy", policy.encode()), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message["headers"], *rules]
                if any(key == b"content-type" and value.startswith(b"text/html") for key, value in message["headers"]):
                    held.append(message)
                    return
            elif held:
                body.extend(message.get("body", b""))
                if message.get("more_body"):
                    return
                page, begin = ELSEWHERE.sub(b"", bytes(body)), held.pop()
                kept = [(key, value) for key, value in begin["headers"] if key != b"content-length"]
                begin["headers"] = [*kept, (b"content-length", str(len(page)).encode())]
                await send(begin)
                message = {"type": "http.response.body", "body": page}
            await send(message)

        await self.app(scope, receive, answer)


class OwnPage:
    """Middleware that answers this page alone: no other page that the browser has open, under whatever name it found this machine.

    Args:
        app: the application that it stands before.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, one of another page by 403."""
        if scope["type"] != "http" or self._is_own({key.lower(): value.decode("latin-1") for key, value in scope["headers"]}):
            await self.app(scope, receive, send)
            return
        why = f"the page answers its own requests alone, at http://{HOST} or http://localhost; see --share for others"
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": why.encode()})

    def _is_own(self, headers: dict[bytes, str]) -> bool:
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        try:
            return urlsplit(f"//{host}").hostname in NAMES and (origin is None or urlsplit(origin).netloc == host)
        except ValueError:  # no address
            return False
