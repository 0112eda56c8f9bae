"""The registry's answers to one kind of question, in memory: bounded, believed for a few seconds, asked for once however many wait.

It keeps true, from any number of threads, what `tenantdb.registry.cache` does for records: an answer is believed from the *beginning* of
its look-up; after `forget` returns, no look-up that began before it is stored, joined, or returned; "there is none" is kept apart, so that
a flood of unknown names pushes out nothing; an error is not remembered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Generic, TypeVar

from tenantdb.forking import follow
from tenantdb.registry.flights import SingleFlight
from tenantdb.registry.shelf import Kept, Meanwhile, Shelf

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

MOST_LOOKS = 5
"""How often one look-up is begun again because what it asked for has changed under way. Whoever changes more often than that gets its last
answer, which nobody else will."""


class Answers(Generic[K, V]):
    """Answers by key. ``is_absent`` tells those that say that there is nothing; ``subjects`` by which names a key's answer is forgotten."""

    def __init__(
        self,
        *,
        size: int,
        ttl: float,
        clock: Callable[[], float],
        is_absent: Callable[[V], bool],
        subjects: Callable[[K], tuple[Hashable, ...]],
    ) -> None:
        self._ttl = ttl
        self._clock = clock
        self._is_absent = is_absent
        self._subjects = subjects
        self._lock = threading.Lock()
        self._known: Shelf[K, V] = Shelf(size)
        self._absent: Shelf[K, V] = Shelf(size)
        self._meanwhile = Meanwhile(size)
        self._flights: SingleFlight[K, V] = SingleFlight()
        follow(self)

    def peek(self, key: K) -> V | None:
        """The answer, or None where only a look-up can tell. Never waits."""
        with self._lock:
            now = self._clock()
            found = self._known.get(key, now)
            return self._absent.get(key, now) if found is None else found

    def get(self, key: K, load: Callable[[K], V]) -> V:
        """The answer, from memory or by ``load``; at most one load per key runs at a time and its error reaches all who wait for it."""
        found = self.peek(key)
        return self._flights.run(key, lambda: self._load(key, load)) if found is None else found

    def forget(self, key: K) -> None:
        """The answer has changed."""
        with self._lock:
            self._known.drop(key)
            self._absent.drop(key)
            self._meanwhile.changed(key)
        self._flights.detach()

    def forget_where(self, subject: Hashable, matches: Callable[[K], bool]) -> None:
        """Every answer that ``matches``, which are those with this subject, has changed."""
        with self._lock:
            self._known.drop_where(matches)
            self._absent.drop_where(matches)
            self._meanwhile.changed(subject)
        self._flights.detach()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._known.clear()
            self._absent.clear()
            self._meanwhile.all_changed()
        self._flights.detach()

    def check(self, ask: Callable[[list[K]], Mapping[K, V]], *, everything: bool) -> list[K]:
        """Compare what was used since the last time with what ``ask`` finds: what is as it was is believed anew, from before the question;
        the rest is forgotten, and returned. ``everything``: what was not used as well. Raises: what ``ask`` raises, and nothing is believed
        for longer then."""
        with self._lock:
            asked: list[tuple[K, Kept[V]]] = self._known.used(everything=everything)
            if everything:
                self._absent.clear()
                self._meanwhile.all_changed()
            expires = self._clock() + self._ttl
        if not asked:
            return []
        true = ask([key for key, _ in asked])
        with self._lock:
            untrue = self._known.confirm(asked, true, expires, _itself)
            for key in untrue:
                for subject in self._subjects(key):
                    self._meanwhile.changed(subject)
        if untrue:
            self._flights.detach()
        return untrue

    def start_empty(self) -> object:
        """In the child after a fork, where somebody may have held the lock; what is remembered is believed on."""
        inherited, self._lock = self._lock, threading.Lock()
        self._meanwhile.reset()
        return inherited

    def _load(self, key: K, load: Callable[[K], V]) -> V:
        for _ in range(MOST_LOOKS):
            if (found := self.peek(key)) is not None:  # it landed between our look and our take-off
                return found
            with self._lock:
                began, expires = self._meanwhile.begin(), self._clock() + self._ttl
            try:
                answer = load(key)
                with self._lock:
                    if not self._meanwhile.since(began, *self._subjects(key)):
                        shelf, other = (self._absent, self._known) if self._is_absent(answer) else (self._known, self._absent)
                        shelf.put(key, answer, expires)
                        other.drop(key)
                        return answer
            finally:
                with self._lock:
                    self._meanwhile.end()
        return answer


def _itself(value: V) -> object:
    return value
