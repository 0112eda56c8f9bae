"""How far a long command is, told on stderr to whoever is still waiting after a second.

A bar on a terminal, which goes away at the end; elsewhere a plain line now and then, for logs. With ``--json`` nothing, because a program
reads stderr then.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tenantdb.cli import output

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Tell = Callable[[int, int], None]
"""Called with how much is done, and of how much; from any thread."""

_PATIENCE = 1.0  # seconds of silence: most commands are done by then
_BETWEEN_LINES = 10.0


@contextmanager
def progress(what: str, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> Iterator[Tell]:
    """``with progress("sealing", quiet=invocation.json) as tell: ... tell(done, total)``."""
    shown: _Bar | _Lines | None = None if quiet else _Bar(what) if sys.stderr.isatty() else _Lines(what, clock)
    began, lock = clock(), threading.Lock()

    def tell(done: int, total: int) -> None:
        if shown is not None and clock() - began >= _PATIENCE:
            with lock:
                shown.show(done, total)

    try:
        yield tell
    finally:
        if shown is not None:
            shown.close()


class _Lines:
    def __init__(self, what: str, clock: Callable[[], float]) -> None:
        self._what = what
        self._clock = clock
        self._next: float | None = None

    def show(self, done: int, total: int) -> None:
        now = self._clock()
        if self._next is None or now >= self._next:
            self._next = now + _BETWEEN_LINES
            output.say(f"{self._what}: {done} of {total}")

    def close(self) -> None:
        """A line stays where it is."""


class _Bar:
    def __init__(self, what: str) -> None:
        self._what = what
        self._drawn: tuple[Progress, TaskID] | None = None

    def show(self, done: int, total: int) -> None:
        if self._drawn is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._drawn = bar, bar.add_task(self._what, total=total)
            bar.start()
        bar, task = self._drawn
        bar.update(task, completed=done, total=total)

    def close(self) -> None:
        if self._drawn is not None:
            self._drawn[0].stop()
