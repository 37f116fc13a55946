"""The bar of long work, on a terminal."""

import io
import sys

import pytest
from rich.console import Console

from fewstep.apps import console
from fewstep.apps.console import aside, progress

CLEARED = "\r\x1b[1A\x1b[2K"  # to the line of the bar, which is empty then


def test_what_is_printed_aside_does_not_begin_in_the_line_of_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(console, "Console", lambda stderr: Console(file=terminal, force_terminal=True, width=100))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress("working", 2) as report:
        report(1)
        with aside():
            before = terminal.getvalue()
            print("the plan", file=terminal)
        report(2)
    assert "working" in before and before.endswith(CLEARED)
    after = terminal.getvalue().removeprefix(f"{before}the plan\n")
    assert "working" in after and "2/2" in after


def test_without_a_bar_nothing_is_cleared(capsys: pytest.CaptureFixture) -> None:
    with aside():
        print("the plan")
    assert capsys.readouterr().out == "the plan\n"
