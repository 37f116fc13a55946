"""Results as HTML: pictures of the same seeds below each other, tables, commands, pages in a frame."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from torch import Tensor

from fewstep.apps.console import duration
from fewstep.apps.page.jobs import JobState
from fewstep.evaluate.report import plots
from fewstep.runtime.errors import FewstepError

__all__ = ["ACROSS", "Strip", "frame", "progress", "refused", "strips", "table", "tiles"]

ACROSS = 8  # pictures beside each other
SIDE, SMALL = 256, 64  # pixels of a picture's longer side: at most, and up to which they are shown as squares


class Strip(NamedTuple):
    """Samples of one sampler.

    Attributes:
        name: of the sampler.
        note: its error, or how far it is.
        images: ``[B, *D]``; None before there are any.
    """

    name: str
    note: str
    images: Tensor | None


def strips(found: Sequence[Strip], labels: Sequence[str] = ()) -> str:
    """Return samplers below each other, each with the pictures of the same seeds in the same places.

    Args:
        found: the samplers.
        labels: what to call the pictures, as their seeds.
    """
    heads = "".join(f"<span>{escape(label)}</span>" for label in labels[:ACROSS])
    heads = f'<div class="fs-row fs-heads"><div></div><div class="fs-labels">{heads}</div></div>' if labels else ""
    return f'<div class="fs-strips">{heads}{"".join(map(_strip, found))}</div>'


def _strip(one: Strip) -> str:
    notes = "".join(f"<small>{escape(line)}</small>" for line in one.note.splitlines())
    head = f'<div class="fs-name"><b>{escape(one.name)}</b>{notes}</div>'
    if one.images is None:
        return f'<div class="fs-row">{head}<div class="fs-none"></div></div>'
    rows = [_picture(one.images[k : k + ACROSS], one.name) for k in range(0, len(one.images), ACROSS)]
    return f'<div class="fs-row">{head}<div>{"".join(rows)}</div></div>'


def _picture(images: Tensor, name: str) -> str:
    """Return up to `ACROSS` pictures as one image, as wide as their share of a full row.

    Raises:
        FewstepError: samples that are no pictures.
    """
    if images.ndim != 4:
        raise FewstepError(f"samples of shape {tuple(images.shape[1:])} are no pictures, which the page shows: use fewstep sample --npz")
    uri = plots.data_uri(plots.strip(images, len(images), SIDE), "image/png")
    smooth = ";image-rendering:auto" if max(images.shape[2:]) > SMALL else ""
    return f'<img src="{uri}" alt="{len(images)} samples by {escape(name)}" style="width:{100 * len(images) / ACROSS:g}%{smooth}">'


def tiles(found: Sequence[Strip]) -> str:
    """Return single pictures beside each other, each with its name and note below."""
    made = []
    for one in found:
        assert one.images is not None  # a tile is shown once it is there
        uri = plots.data_uri(plots.strip(one.images, 1), "image/png")
        image = f'<img src="{uri}" alt="{escape(one.name)}">'
        made.append(f"<figure>{image}<figcaption><b>{escape(one.name)}</b><small>{escape(one.note)}</small></figcaption></figure>")
    return f'<div class="fs-tiles">{"".join(made)}</div>'


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return a table, its first ``left`` columns aligned to the left, the others as numbers."""
    cell = lambda tag, k, text: f"<{tag}{'' if k < left else ' class=n'}>{escape(text)}</{tag}>"  # noqa: E731
    head = "".join(cell("th", k, text) for k, text in enumerate(headings))
    body = "".join(f"<tr>{''.join(cell('td', k, text) for k, text in enumerate(row))}</tr>" for row in rows)
    return f'<div class="fs-wide"><table class="fs-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def progress(name: str, state: JobState, command: str) -> str:
    """Return how a job goes: a line of words, a bar while it runs, and the command that it is."""
    share = state.done / state.total if state.total else 0.0
    words = {"done": "done", "stopped": "stopped: continue when you like", "failed": f"failed: {state.why}"}
    at = f"{state.done} of {state.total}" if state.total else state.title
    note = words.get(state.state, f"{at}{f', {state.note}' if state.note else ''}")
    bar = f'<div class="fs-bar" role="progressbar" aria-valuenow="{100 * share:.0f}"><div style="width:{100 * share:.1f}%"></div></div>'
    kind = "fs-bad" if state.state == "failed" else "fs-note"
    line = f'<p class="{kind}"><b>{escape(name)}</b> {escape(note)}, {duration(state.seconds)}</p>'
    return f'{line}{bar if state.state == "running" else ""}<code class="fs-command">{escape(command)}</code>'


def refused(error: Exception) -> str:
    """Return an error as a sentence."""
    return f'<p class="fs-bad">{escape(str(error))}</p>'


def frame(page: str, title: str) -> str:
    """Return a whole page of a report in a frame of its own, which can reach nothing outside it."""
    return f'<iframe class="fs-frame" sandbox="allow-popups allow-downloads" title="{escape(title)}" srcdoc="{escape(page)}"></iframe>'
