"""The part of a tab that shows its jobs: which one, how it goes, stop and continue; and what it made, once there is something.

The address of the page names the job that is shown, as ``?fit=fit-3``. So it is there again when the page is loaded again, and two tabs of
a browser show two jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import gradio as gr

from fewstep.apps.page.shown import progress, refused
from fewstep.apps.page.workshop import Workshop
from fewstep.runtime.errors import FewstepError

__all__ = ["Running"]

EVERY = 1.0  # seconds between two looks at a job
REMEMBER = """(name) => {{
  const here = new URL(window.location.href);
  name ? here.searchParams.set("{verb}", name) : here.searchParams.delete("{verb}");
  window.history.replaceState(null, "", here);
}}"""


class Running:
    """The jobs of one verb on a tab. Make it where they are to be shown, then call `connect`.

    Args:
        shop: the page's.
        verb: of fewstep.
        label: what the list of its jobs is called.
    """

    def __init__(self, shop: Workshop, verb: str, label: str = "Runs") -> None:
        self.shop, self.verb = shop, verb
        with gr.Row(equal_height=False, elem_classes="fs-jobs"):
            self.jobs = gr.Dropdown(self._choices(), value=None, label=label, allow_custom_value=True, scale=3, min_width=150)
            self.stop = gr.Button("Stop", scale=1, min_width=80)
            self.resume = gr.Button("Continue", scale=1, min_width=80)
        self.status = gr.HTML("")
        self.timer = gr.Timer(EVERY, active=False)

    def _choices(self) -> list[str]:
        return self.shop.jobs.names(self.verb)

    def connect(
        self,
        page: gr.Blocks,
        go: gr.Button,
        fields: Sequence[Any],
        begin: Callable[..., str],
        outputs: Sequence[Any],
        made: Callable[[str], list[Any]],
    ) -> None:
        """Connect a button to what it begins, and jobs to what they made.

        Args:
            page: that the tab is on.
            go: the button that begins a job.
            fields: the components whose values it is begun with.
            begin: begins one with these values, and returns its name.
            outputs: the components that show what a job made.
            made: returns their values for a job, in their order, as far as it is.
        """
        kept = [gr.skip() for _ in outputs]

        def begun(*values: Any) -> list[Any]:  # noqa: ANN401 - from a browser
            try:
                name = begin(*values)
            except (FewstepError, OSError) as error:
                return [gr.skip(), refused(error)]
            return [gr.update(choices=self._choices(), value=name), gr.skip()]

        def looked(name: Any, *, again: bool = False) -> Iterator[list[Any]]:  # noqa: ANN401 - from a browser
            if not name:
                yield ["", gr.Timer(active=False), *kept]
                return
            try:
                state = self.shop.jobs.state(str(name))
                runs, line = state.state == "running", progress(str(name), state, self.shop.jobs.command(str(name)))
                yield [line, gr.Timer(active=runs), *kept]
                if not (runs and again):
                    yield [gr.skip(), gr.skip(), *made(str(name))]
            except (FewstepError, OSError) as error:
                yield [refused(error), gr.Timer(active=False), *kept]

        def asked(act: Callable[[str], None]) -> Callable[[Any], Iterator[list[Any]]]:
            def handler(name: Any) -> Iterator[list[Any]]:  # noqa: ANN401 - from a browser
                try:
                    act(str(name or ""))
                except (FewstepError, OSError) as error:
                    yield [refused(error), gr.skip(), *kept]
                    return
                yield from looked(name)

            return handler

        def remembered(request: gr.Request) -> Any:  # noqa: ANN401 - an update
            wanted = request.query_params.get(self.verb)
            names = self._choices()
            return gr.update(choices=names, value=wanted if wanted in names else None)

        shown = [self.status, self.timer, *outputs]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        go.click(begun, list(fields), [self.jobs, self.status], **quiet)
        self.jobs.change(looked, self.jobs, shown, **quiet)
        self.jobs.change(None, self.jobs, None, js=REMEMBER.format(verb=self.verb))
        self.timer.tick(partial(looked, again=True), self.jobs, shown, **quiet)
        self.stop.click(asked(self.shop.jobs.stop), self.jobs, shown, **quiet)
        self.resume.click(asked(self.shop.jobs.resume), self.jobs, shown, **quiet)
        page.load(remembered, None, self.jobs, **quiet)
