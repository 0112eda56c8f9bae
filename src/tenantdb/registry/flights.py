"""One look-up for many who ask at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future
from typing import Generic, TypeVar

from tenantdb.forking import follow

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SingleFlight(Generic[K, V]):
    """Runs one call per key at a time; whoever asks meanwhile waits for it and gets its result, or its error.

    The lock is never held while the call runs. A leader that is interrupted (Ctrl-C) is not a result: the next in line flies anew.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[K, Future[V]] = {}
        follow(self)

    def run(self, key: K, call: Callable[[], V]) -> V:
        while True:
            with self._lock:
                flight = self._flights.get(key)
                if flight is None:
                    mine = self._flights[key] = Future()
                    break
            try:
                return flight.result()
            except CancelledError:
                continue
        try:
            result = call()
        except Exception as error:
            self._land(key, mine)
            mine.set_exception(error)
            raise
        except BaseException:
            self._land(key, mine)
            mine.cancel()
            raise
        self._land(key, mine)
        mine.set_result(result)
        return result

    def detach(self) -> None:
        """Let nobody join what is in flight now: it may bring back what has since changed."""
        with self._lock:
            self._flights.clear()

    def start_empty(self) -> object:
        """In the child after a fork, where nobody flies."""
        inherited, self._flights = self._flights, {}
        self._lock = threading.Lock()
        return inherited

    def _land(self, key: K, flight: Future[V]) -> None:
        with self._lock:
            if self._flights.get(key) is flight:
                del self._flights[key]
