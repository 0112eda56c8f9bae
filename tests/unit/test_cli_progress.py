"""A long command says how far it is, to people and to logs, and a short one says nothing."""

from __future__ import annotations

import io
import sys

import pytest

from tenantdb.cli.progress import progress
from tests.unit.registry_fixtures import Clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_short_command_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("sealing", clock=clock) as tell:
        clock.now += 0.9
        tell(1, 3)

    assert capsys.readouterr() == ("", "")


def test_a_long_one_writes_a_line_to_stderr_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("sealing", clock=clock) as tell:
        for done in range(1, 31):
            clock.now += 1
            tell(done, 30)

    assert capsys.readouterr() == ("", "sealing: 1 of 30\nsealing: 11 of 30\nsealing: 21 of 30\n")


def test_a_program_that_reads_json_is_spared(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("sealing", quiet=True, clock=clock) as tell:
        clock.now += 60
        tell(1, 3)

    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_it_is_a_bar_that_goes_away(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress("sealing", clock=clock) as tell:
        tell(0, 3)
        assert terminal.getvalue() == ""
        clock.now += 2
        tell(1, 3)
        tell(2, 3)

    shown = terminal.getvalue()
    assert "sealing" in shown and "/3" in shown
    assert shown.endswith("\x1b[2K")  # the line is erased


def test_the_bar_goes_away_when_the_command_fails(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(RuntimeError), progress("sealing", clock=clock) as tell:
        clock.now += 2
        tell(1, 3)
        raise RuntimeError

    assert terminal.getvalue().endswith("\x1b[2K")
