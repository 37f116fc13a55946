"""What the tests of the page share: its models, its folder, and jobs that are forked rather than started anew."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'fewstep[ui]'")

from fewstep.apps.page.jobs import Jobs
from fewstep.apps.page.models import Models
from fewstep.apps.page.workshop import Workshop


@pytest.fixture(scope="module", autouse=True)
def _loops_are_closed() -> Iterator[None]:
    """Gradio makes event loops for its locks and leaves them open, which Python warns of whenever it comes across them."""
    made, new = [], asyncio.new_event_loop

    def recorded() -> asyncio.AbstractEventLoop:
        made.append(new())
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradio.utils.asyncio.new_event_loop", recorded)
        yield
    for loop in made:
        if not loop.is_running():
            loop.close()
    asyncio.set_event_loop(None)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The bundled models, loaded once."""
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def shop(tmp_path: Path, models: Models) -> Iterator[Workshop]:
    """A page's workshop in a folder of its own."""
    here = Models(tmp_path)
    here._held = models._held
    made = Workshop(tmp_path, here, Jobs(tmp_path, "fork"))
    yield made
    made.jobs.close()
