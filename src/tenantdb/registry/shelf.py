"""What of the registry is kept in memory, and what has changed meanwhile: the pure parts of every look-up that is remembered.

No lock, no clock, no I/O: `RecordCache` and `Answers` call these under their own lock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(slots=True, eq=False)
class Kept(Generic[V]):
    """A value, believed until ``expires``; whether it was used since somebody asked for what is `Shelf.used`."""

    value: V
    expires: float
    used: bool = True


class Shelf(Generic[K, V]):
    """The ``size`` values that were used last, each believed for its time. A value that is in use can be believed for longer without being
    looked up again, once somebody has compared it with the registry: `used`, then `confirm`.

    Not an LRUCache, because every request asks several times, and what it uses is moved up once between two comparisons, not every time.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[K, Kept[V]] = OrderedDict()  # who was used longest ago first
        self._used: dict[K, Kept[V]] = {}

    def get(self, key: K, now: float) -> V | None:
        """The value, if there is one that is believed now."""
        kept = self._kept.get(key)
        if kept is None or now >= kept.expires:
            return None
        if not kept.used:
            kept.used = True
            self._kept.move_to_end(key)
            self._note(key, kept)
        return kept.value

    def put(self, key: K, value: V, expires: float) -> None:
        self._kept[key] = kept = Kept(value, expires)
        self._kept.move_to_end(key)
        if len(self._kept) > self._size:
            self._kept.popitem(last=False)
        self._note(key, kept)

    def drop(self, key: K) -> None:
        self._kept.pop(key, None)

    def drop_where(self, matches: Callable[[K], bool]) -> None:
        for key in [key for key in self._kept if matches(key)]:
            del self._kept[key]

    def clear(self) -> None:
        self._kept.clear()
        self._used.clear()

    def used(self, *, everything: bool = False) -> list[tuple[K, Kept[V]]]:
        """What was used since this was asked last; or all that is kept."""
        found = list((self._kept if everything else self._used).items())
        self._used = {}
        for _, kept in found:
            kept.used = False
        return found

    def confirm(self, asked: list[tuple[K, Kept[V]]], true: Mapping[K, object], expires: float, stamp: Callable[[V], object]) -> list[K]:
        """Believe until ``expires`` what is on the shelf as it was ``asked`` for, and is ``true``; drop and return what is not."""
        untrue = []
        for key, kept in asked:
            if self._kept.get(key) is not kept:  # somebody has looked it up meanwhile, or was told of a change
                continue
            if true.get(key) == stamp(kept.value):
                kept.expires = max(kept.expires, expires)
            else:
                untrue.append(key)
                del self._kept[key]
        return untrue

    def values(self) -> Iterator[V]:
        return (kept.value for kept in self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def _note(self, key: K, kept: Kept[V]) -> None:
        if len(self._used) >= self._size:  # nobody asks: no process watches
            self._used.clear()
        self._used[key] = kept


class Meanwhile:
    """What has changed while look-ups were under way, so that a late answer is told from a true one.

    A change is remembered only for as long as somebody is under way who set out before; more than ``most`` of them count as everything.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.reset()

    def reset(self) -> None:
        """Nobody is under way."""
        self._under_way = 0
        self._moment = 0
        self._everything = 0
        self._changed: dict[Hashable, int] = {}

    def begin(self) -> int:
        """Somebody sets out. What is returned is for `since`; `end` comes once for each."""
        self._under_way += 1
        return self._moment

    def end(self) -> None:
        self._under_way -= 1
        if not self._under_way:
            self._changed.clear()

    def changed(self, subject: Hashable) -> None:
        """Whoever is under way and asks for the subject may bring back what was."""
        if not self._under_way:
            return
        self._moment += 1
        self._changed[subject] = self._moment
        if len(self._changed) > self._most:
            self.all_changed()

    def all_changed(self) -> None:
        self._moment += 1
        self._everything = self._moment
        self._changed.clear()

    def since(self, began: int, *subjects: Hashable) -> bool:
        """Whether one of the subjects has changed since somebody began; without any: whether anything has."""
        if self._everything > began or not subjects:
            return self._moment > began
        return any(self._changed.get(subject, 0) > began for subject in subjects)
