"""The thread that watches the registry: it listens where there is something to hear, and looks from time to time.

One per process and `TenantDB`, started by whoever needs it first, also in a child after a fork, where no thread comes along. A connection
that is lost is opened again, ever less often; what was missed meanwhile is found by looking. Nothing that goes wrong in here ends the
thread, and an outage is logged once.
"""

from __future__ import annotations

import contextlib
import logging
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tenantdb.errors import TenantDBError
from tenantdb.forking import follow

if TYPE_CHECKING:
    from tenantdb.backends import Ear

logger = logging.getLogger("tenantdb.registry")

_FIRST_DELAY, _LAST_DELAY = 0.1, 5.0  # seconds between attempts to listen again
_NOT_HEARD = "the registry cannot be listened to, so its changes are found by looking"
_NOT_COMPARED = "what is cached could not be compared with the registry, so it expires"
_NOT_READ = "what the registry told of could not be read"
_GOODBYE = 10.0  # seconds that `stop` waits: a connect may be under way, and a question


class Watcher:
    """``listen()`` opens an `Ear`, or returns None where the database tells nothing; ``heard(payloads)`` and ``check(everything=...)`` are
    called in the thread, the latter every ``every`` seconds."""

    def __init__(
        self,
        listen: Callable[[], Ear | None],
        heard: Callable[[Sequence[str]], object],
        check: Callable[..., object],
        *,
        every: float,
    ) -> None:
        self._listen = listen
        self._heard = heard
        self._check = check
        self._every = every
        self._lock = threading.Lock()
        self._watch: _Watch | None = None
        follow(self)

    def start(self) -> None:
        """Watch, unless that is being done. Costs nothing then, and never waits for the registry."""
        if self._watch is not None:
            return
        with self._lock:
            if self._watch is None:
                self._watch = watch = _Watch(self._listen, self._heard, self._check, self._every)
                watch.start()

    def stop(self) -> None:
        """End the thread and its connection. May be called twice; `start` begins anew."""
        with self._lock:
            watch, self._watch = self._watch, None
        if watch is not None:
            watch.stop()

    @property
    def listening(self) -> bool:
        """Whether there is a connection that listens, at this moment."""
        watch = self._watch
        return watch is not None and watch.ear is not None

    def start_empty(self) -> object:
        """In the child after a fork: the thread is not here, and the connection is the parent's."""
        inherited = [self._lock, self._watch]
        self._lock, self._watch = threading.Lock(), None
        return inherited


class _Watch:
    """One life of the thread."""

    def __init__(
        self, listen: Callable[[], Ear | None], heard: Callable[[Sequence[str]], object], check: Callable[..., object], every: float
    ) -> None:
        self._listen, self._heard, self._check, self._every = listen, heard, check, every
        self.ear: Ear | None = None
        self._stopping = threading.Event()
        self._mine, self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="tenantdb-watch", daemon=True)
        self._failing: set[str] = set()
        self._deaf = False  # there is nothing to listen to
        self._delay, self._listens_since = 0.0, 0.0
        self._next_listen, self._next_check = 0.0, 0.0
        self._missed = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        with contextlib.suppress(OSError):  # the thread has seen it already, and closed its end
            self._wake.send(b"\0")
        if self._thread is not threading.current_thread():
            self._thread.join(_GOODBYE)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    self._turn()
                except Exception:
                    logger.exception("watching the registry failed, and is tried again")
                    self._hang_up()
                    self._stopping.wait(_LAST_DELAY)
        finally:
            self._hang_up()
            self._mine.close()
            self._wake.close()

    def _turn(self) -> None:
        now = time.monotonic()
        if self.ear is None and not self._deaf and now >= self._next_listen:
            self._try_to_listen(now)
        if now >= self._next_check:
            self._look(now)
        self._wait()

    def _try_to_listen(self, now: float) -> None:
        try:
            self.ear = self._listen()
        except Exception as error:
            self._failed(_NOT_HEARD, error)
            self._wait_longer(now)
            return
        if self.ear is None:
            self._deaf = True
            return
        self._works(_NOT_HEARD)
        self._listens_since, self._next_check = now, now
        self._missed = True  # whatever was told before

    def _wait_longer(self, now: float) -> None:
        self._delay = min(max(_FIRST_DELAY, self._delay * 2), _LAST_DELAY)
        self._next_listen = now + self._delay * random.uniform(0.5, 1.0)

    def _look(self, now: float) -> None:
        self._next_check = now + self._every
        try:
            self._check(everything=self._missed)
        except Exception as error:
            self._failed(_NOT_COMPARED, error)
        else:
            self._missed = False
            self._works(_NOT_COMPARED)

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._mine, select.POLLIN)
        due = self._next_check
        ear = self.ear
        if ear is not None:
            poll.register(ear.fileno(), select.POLLIN)
        elif not self._deaf:
            due = min(due, self._next_listen)
        ready = {descriptor for descriptor, _ in poll.poll(max(0.0, due - time.monotonic()) * 1000)}
        if self._mine.fileno() in ready:
            self._mine.recv(4096)
        if ear is not None and ready - {self._mine.fileno()}:
            self._hear(ear)

    def _hear(self, ear: Ear) -> None:
        try:
            payloads = ear.heard()
        except Exception as error:
            self._hang_up()
            now = time.monotonic()
            if now - self._listens_since > _LAST_DELAY:
                self._delay, self._next_listen = 0.0, now
            else:  # somebody lets us in and throws us out again
                self._wait_longer(now)
            self._failed(_NOT_HEARD, error)
            return
        try:
            if payloads:
                self._heard(payloads)
        except Exception as error:
            self._next_check = 0.0
            self._failed(_NOT_READ, error)
        else:
            self._works(_NOT_READ)

    def _hang_up(self) -> None:
        ear, self.ear = self.ear, None
        if ear is not None:
            with contextlib.suppress(Exception):
                ear.close()

    def _failed(self, what: str, error: Exception) -> None:
        if what not in self._failing:
            self._failing.add(what)
            said = error.explain() if isinstance(error, TenantDBError) else type(error).__name__
            logger.warning("%s: %s", what, said, exc_info=None if isinstance(error, TenantDBError) else error)

    def _works(self, what: str) -> None:
        if what in self._failing:
            self._failing.discard(what)
            logger.info("over: %s", what)
