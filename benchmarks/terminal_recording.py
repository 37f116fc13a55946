"""The terminal of the documentation: commands run in a terminal of their own, kept as a record, and drawn as a picture that moves.

    python benchmarks/terminal_recording.py record --out docs/terminal.json    # runs the commands
    python benchmarks/terminal_recording.py draw docs/terminal.json            # draws docs/terminal.svg from the record alone

The record holds what the commands wrote, piece by piece with its time; of a bar that moves, `KEPT` pieces at most. In the picture a command
takes `LONGEST` seconds at most, so that long work is shown faster. It begins with the first command and ends with the last screen, which is
also what a program shows that plays no animation.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from fewstep.runtime.artifact import write_whole

COMMANDS = (
    "fewstep sample digits-edm --solver fitted --nfe 5 --out runs/sample",
    "fewstep bench digits-edm --solver ddim,unipc-2,fitted --nfe 5,8 -n 64 --out runs/bench",
)
COLUMNS, ROWS = 112, 60
LONGEST = 5.0  # seconds of a command in the picture
KEPT = 60  # repaints of a line in the record of a command
APART = 0.12  # seconds between two screens, at least
TYPED = 1.0  # seconds from a command to its first output
WIDTH, HEIGHT, SIZE, MARGIN = 8.0, 18, 13, 14  # of a letter, of a row, of the font, around the screen
PAPER, INK = "#14181f", "#d6dce5"
COLOURS = ("#59636e", "#f47067", "#6bc46d", "#daaa3f", "#6cb6ff", "#d57bd5", "#56d4dd", "#d6dce5")
CODE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")

Record = list[dict[str, Any]]


# -- the record ---------------------------------------------------------------------------------------------------------


def record(commands: Sequence[str]) -> Record:
    """Run the commands one after the other in one folder, and return for each its ``command`` and ``output``, pairs of seconds and text."""
    made: Record = []
    with tempfile.TemporaryDirectory() as folder:
        for command in commands:
            words = [sys.executable, "-m", *shlex.split(command)]
            made.append({"command": command, "output": thinned([(round(at, 2), text) for at, text in _written(words, folder)])})
    return made


def thinned(output: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Leave out what wrote a line again, where that was written again soon after."""
    repaints = [text.startswith("\r\x1b[2K") and "\n" not in text for _, text in output]
    apart = output[-1][0] / KEPT if output else 0.0
    kept: list[tuple[float, str]] = []
    for (at, text), again, next_again in zip(output, repaints, [*repaints[1:], False], strict=True):
        if not (again and next_again and kept and at - kept[-1][0] < apart):
            kept.append((at, text))
    return kept


def _written(words: Sequence[str], folder: str) -> Iterator[tuple[float, str]]:
    """Give what a command writes to its terminal, with the seconds since its first letter."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
    environment["PYTHONPATH"] = os.pathsep.join(
        str(Path(part).resolve()) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part
    )
    process = subprocess.Popen(words, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    begin, rest = None, b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux says so when the other side was closed
            piece = b""
        if not piece:
            break
        begin = time.monotonic() if begin is None else begin
        whole = rest + piece
        text = whole.decode("utf-8", "ignore")
        rest = whole[len(text.encode()) :]  # a letter of which the end has not come yet
        yield time.monotonic() - begin, text
    os.close(ours)
    if process.wait():
        raise SystemExit(f"{shlex.join(words)} failed")


# -- the screen ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Style:
    """How a letter looks."""

    colour: str = INK
    bold: bool = False
    dim: bool = False


Row = list[tuple[str, Style]]


class Screen:
    """The part of a terminal that these commands use: letters, the colours, and going back over lines to write them again."""

    def __init__(self) -> None:
        self.rows: list[Row] = [[]]
        self.row = self.column = 0
        self.style = Style()

    def write(self, text: str) -> None:
        """Take output."""
        at = 0
        for code in CODE.finditer(text):
            self._letters(text[at : code.start()])
            self._control(code[1], code[2])
            at = code.end()
        self._letters(text[at:])

    def _letters(self, text: str) -> None:
        for letter in text:
            if letter == "\n":
                self._down()
            elif letter == "\r":
                self.column = 0
            else:
                if self.column == COLUMNS:
                    self._down()
                    self.column = 0
                row = self.rows[self.row]
                row += [(" ", Style())] * (self.column + 1 - len(row))
                row[self.column] = (letter, self.style)
                self.column += 1

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append([])

    def _control(self, numbers: str, kind: str) -> None:
        if kind == "m":
            self._look([int(number or 0) for number in numbers.split(";")])
        elif kind == "A":
            self.row = max(0, self.row - int(numbers or 1))
        elif kind == "K":
            self.rows[self.row] = [] if numbers == "2" else self.rows[self.row][: self.column]
        elif kind not in "hl":
            raise ValueError(f"a control code that is not drawn here: {numbers}{kind}")

    def _look(self, codes: list[int]) -> None:
        while codes:
            code = codes.pop(0)
            if code == 0:
                self.style = Style()
            elif code in (1, 2, 22):
                self.style = replace(self.style, bold=code == 1, dim=code == 2)
            elif code in range(30, 38) or code in range(90, 98):
                self.style = replace(self.style, colour=COLOURS[code % 10])
            elif code == 39:
                self.style = replace(self.style, colour=INK)
            elif code == 38:
                form, *_ = kept = codes[: 2 if codes[0] == 5 else 4]
                del codes[: len(kept)]
                self.style = replace(self.style, colour=_of_256(kept[1]) if form == 5 else "#{:02x}{:02x}{:02x}".format(*kept[1:]))


def _of_256(number: int) -> str:
    """Return a colour of the 256 of a terminal."""
    if number < 16:
        return COLOURS[number % 8]
    if number >= 232:
        return "#" + f"{8 + 10 * (number - 232):02x}" * 3
    levels = (0, 95, 135, 175, 215, 255)
    number -= 16
    return "#" + "".join(f"{levels[part]:02x}" for part in (number // 36, number // 6 % 6, number % 6))


# -- the picture --------------------------------------------------------------------------------------------------------


def screens(recorded: Record) -> list[tuple[float, list[Row]]]:
    """Return the screens one after the other, each with the second of the picture at which it appears."""
    screen, now, shown = Screen(), 0.0, []
    for part in recorded:
        screen.write("\x1b[1;32m$\x1b[0m \x1b[1m" + part["command"] + "\x1b[0m\r\n")
        shown.append((now, [list(row) for row in screen.rows]))
        begin = now + TYPED
        faster = max(1.0, part["output"][-1][0] / LONGEST)
        for at, text in part["output"]:
            now = begin + at / faster
            screen.write(text)
            rows = [list(row) for row in screen.rows]
            if now - shown[-1][0] < APART:
                shown[-1] = (shown[-1][0], rows)
            else:
                shown.append((now, rows))
        now += TYPED
    return shown


def _spans(row: Row) -> str:
    """Return a row's text in pieces of one look each."""
    pieces: list[tuple[int, str, Style]] = []
    for column, (letter, style) in enumerate(row):
        if pieces and pieces[-1][2] == style and pieces[-1][0] + len(pieces[-1][1]) == column:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + letter, style)
        else:
            pieces.append((column, letter, style))
    made = []
    for column, text, style in pieces:
        look = (f' fill="{style.colour}"' if style.colour != INK else "") + (
            ' class="b"' if style.bold else ' class="d"' if style.dim else ""
        )
        for word in re.finditer(r"\S+( \S+)*", text):  # wide gaps are places, which no font can shift
            place = (
                f'x="{MARGIN + (column + word.start()) * WIDTH:g}" textLength="{len(word[0]) * WIDTH:g}" lengthAdjust="spacingAndGlyphs"'
            )
            made.append(f"<tspan {place}{look}>{escape(word[0])}</tspan>")
    return "".join(made)


def draw(recorded: Record) -> str:
    """Return the picture: each line once for each text that it ever showed, with the time at which it does."""
    shown = screens(recorded)
    count = max(len(rows) for _, rows in shown)
    count -= not any(_spans(row) for row in shown[-1][1][-1:])
    lines = []
    for k in range(count):
        texts: list[tuple[float, str]] = []  # from when on
        for at, rows in shown:
            text = _spans(rows[k]) if k < len(rows) else ""
            if not texts or texts[-1][1] != text:
                texts.append((at, text))
        for (begin, text), following in zip(texts, [*texts[1:], None], strict=True):
            if not text:
                continue
            place = f'y="{MARGIN + 26 + (k + 1) * HEIGHT - 5}"'
            if following is None:  # stays: hidden until it comes
                before = f'<set attributeName="visibility" to="hidden" begin="0s" dur="{begin:.2f}s"/>' if begin else ""
                lines.append(f"<text {place}>{text}{before}</text>")
            else:
                during = f'<set attributeName="visibility" to="visible" begin="{begin:.2f}s" dur="{following[0] - begin:.2f}s"/>'
                lines.append(f'<text {place} visibility="hidden">{text}{during}</text>')
    width, height = 2 * MARGIN + COLUMNS * WIDTH, 2 * MARGIN + 26 + count * HEIGHT
    buttons = "".join(f'<circle cx="{MARGIN + 6 + 18 * i}" cy="{MARGIN + 4}" r="5" fill="#3d444d"/>' for i in range(3))
    said = "; ".join(part["command"] for part in recorded)
    font = f"{SIZE}px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
    style = f"text{{font:{font};fill:{INK};white-space:pre}}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img">'
        f"<title>{escape(said)}</title><style>{style}.b{{font-weight:bold}}.d{{opacity:.6}}</style>"
        f'<rect width="100%" height="100%" rx="8" fill="{PAPER}"/>{buttons}\n' + "\n".join(lines) + "\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("record", help="run the commands").add_argument("--out", type=Path, required=True, help="the record")
    verbs.add_parser("draw", help="draw a record").add_argument("record", type=Path, help="the record; the picture goes beside it, as .svg")
    args = parser.parse_args()
    if args.verb == "record":
        write_whole(args.out, (json.dumps(record(COMMANDS), indent=1) + "\n").encode())
    else:
        write_whole(args.record.with_suffix(".svg"), draw(json.loads(args.record.read_text())).encode())


if __name__ == "__main__":
    main()
