"""The one background thread: waits for servers to let go of closed connections, and for what is due.

A backend outlives the close of its connection by a moment, so a place in the budget is free only when the server has hung up. Who needs the
place at once waits for that himself; for everybody else this thread waits, for all of them together. It also closes what has been idle for
too long, and does small jobs that must not be done on the way of a request. It starts when it is first needed and ends with `stop`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from tenantdb.backends.hangup import has_hung_up

if TYPE_CHECKING:
    from tenantdb.connections.budget import ServerBudget
    from tenantdb.connections.ledger import Unit

logger = logging.getLogger("tenantdb.connections")

LONGEST_GOODBYE = 5.0  # seconds after which a server that does not hang up is taken for gone
_LONGEST_SLEEP = 60.0


class Reaper:
    """``maintain`` is called when something may be due, and returns when the next thing will be."""

    def __init__(self, maintain: Callable[[float], float], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._maintain = maintain
        self._clock = clock
        self._lock = threading.RLock()  # RLock: the garbage collector gives connections back in the middle of anything, also in here
        self._thread: threading.Thread | None = None
        self._forget()

    def _forget(self) -> None:
        self._arrivals: deque[tuple[int, ServerBudget, Unit, float]] = deque()
        self._jobs: deque[Callable[[], object]] = deque()
        self._wake: socket.socket | None = None
        self._stopping = False
        self._sleeps_until = 0.0

    def watch(self, descriptor: int, budget: ServerBudget, unit: Unit) -> None:
        """Free the unit's place when the server hangs up on the descriptor, which is closed then."""
        self._arrivals.append((descriptor, budget, unit, self._clock() + LONGEST_GOODBYE))
        self.nudge()

    def do(self, job: Callable[[], object]) -> None:
        """Do a short job soon, and log what it raises."""
        self._jobs.append(job)
        self.nudge()

    def due(self, at: float) -> None:
        """Something will be due then; wakes the thread only where it would sleep for longer."""
        if self._thread is None or at < self._sleeps_until:
            self.nudge()

    def nudge(self) -> None:
        """Start the thread, or wake it."""
        with self._lock:
            if self._thread is None:
                mine, wake = socket.socketpair()
                mine.setblocking(False)
                wake.setblocking(False)
                thread = threading.Thread(target=self._run, args=(mine,), name="tenantdb-reaper", daemon=True)
                if self._thread is None:  # still: see the lock
                    self._thread, self._wake, self._stopping = thread, wake, False
                    thread.start()
                else:
                    mine.close()
                    wake.close()
            elif self._wake is not None:
                with contextlib.suppress(BlockingIOError):  # full of nudges: it will wake
                    self._wake.send(b"\0")

    def stop(self, timeout: float = LONGEST_GOODBYE) -> None:
        """End the thread once nothing is watched any more. It starts again when it is needed."""
        with self._lock:
            thread, self._stopping = self._thread, True
            if self._wake is not None:
                with contextlib.suppress(BlockingIOError):
                    self._wake.send(b"\0")
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def start_empty(self) -> list[object]:
        """In the child after a fork, where no thread came along. Returns what belongs to the parent and must not be collected."""
        inherited: list[object] = [self._arrivals, self._jobs, self._wake, self._thread]
        self._lock = threading.RLock()
        self._thread = None
        self._forget()
        return inherited

    def _run(self, mine: socket.socket) -> None:
        watched: dict[int, tuple[ServerBudget, Unit, float]] = {}
        with selectors.DefaultSelector() as selector, mine:
            selector.register(mine, selectors.EVENT_READ)
            while True:
                due = self._look_after(selector, watched)
                with self._lock:
                    if self._stopping and not watched and not self._arrivals and not self._jobs:
                        assert self._wake is not None
                        self._wake.close()
                        self._wake, self._thread = None, None
                        return
                    now = self._clock()
                    self._sleeps_until = min(due, now + _LONGEST_SLEEP)
                for key, _ in selector.select(max(0.0, self._sleeps_until - now)):
                    if key.fileobj is mine:
                        with contextlib.suppress(BlockingIOError):
                            mine.recv(4096)
                    elif has_hung_up(key.fd):
                        self._let_go(selector, watched, key.fd)

    def _look_after(self, selector: selectors.BaseSelector, watched: dict[int, tuple[ServerBudget, Unit, float]]) -> float:
        while self._jobs:
            try:
                self._jobs.popleft()()
            except Exception:
                logger.exception("a job of the background thread failed")
        while self._arrivals:
            descriptor, budget, unit, until = self._arrivals.popleft()
            watched[descriptor] = (budget, unit, until)
            selector.register(descriptor, selectors.EVENT_READ)
        now = self._clock()
        for descriptor, (_, _, until) in list(watched.items()):
            if until <= now:
                self._let_go(selector, watched, descriptor)
        due = min((until for _, _, until in watched.values()), default=float("inf"))
        try:
            return min(due, self._maintain(now))
        except Exception:
            logger.exception("looking after idle connections failed")
            return min(due, now + 1)

    @staticmethod
    def _let_go(selector: selectors.BaseSelector, watched: dict[int, tuple[ServerBudget, Unit, float]], descriptor: int) -> None:
        selector.unregister(descriptor)
        os.close(descriptor)
        budget, unit, _ = watched.pop(descriptor)
        budget.free(unit)
