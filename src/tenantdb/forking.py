"""What a forked child may not share with its parent: sockets, threads, and locks that somebody held at the wrong moment.

The child starts empty. What came along is neither used nor closed: closing the copy of a connection would end the parent's. So it is kept,
because collecting it would close it as well.
"""

from __future__ import annotations

import os
import weakref
from typing import Any, Protocol


class StartsEmpty(Protocol):
    def start_empty(self) -> object:
        """Forget everything that is the parent's, and return what must not be collected."""


_followed: weakref.WeakSet[Any] = weakref.WeakSet()
_inherited: list[object] = []


def follow(thing: StartsEmpty) -> None:
    """Have a thing start empty in every child, for as long as it lives."""
    _followed.add(thing)


def _after_fork() -> None:
    _inherited.extend([thing.start_empty() for thing in list(_followed)])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
