"""Who wants to know that something in the registry has changed, be it here or in another process.

What is cached is forgotten first, so whoever is called and asks again gets the new answer.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from tenantdb.forking import follow

logger = logging.getLogger("tenantdb.registry")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """``kind`` says what has changed and which ids are there: a ``tenant`` (``tenant_id``, and its ``generation`` where that is known), a
    ``user`` (``user_id``), a ``membership`` (both), the list of revoked tokens (``revocation``), or perhaps ``everything``."""

    kind: Literal["tenant", "user", "membership", "revocation", "everything"]
    tenant_id: UUID | None = None
    user_id: UUID | None = None
    generation: int | None = None


class Changes:
    """Calls whoever has subscribed, in the thread that learnt of a change: the watching one, or whichever wrote. It must be quick."""

    def __init__(self) -> None:
        # Re-entrant, because the garbage collector may end a coroutine's subscription in the middle of another.
        self._lock = threading.RLock()
        self._callbacks: dict[object, Callable[[Change], object]] = {}
        follow(self)

    def subscribe(self, callback: Callable[[Change], object]) -> Callable[[], None]:
        """Call with every `Change` from now on. What is returned ends that, and may be called twice."""
        mine = object()
        with self._lock:
            self._callbacks[mine] = callback

        def end() -> None:
            with self._lock:
                self._callbacks.pop(mine, None)

        return end

    def tell(self, change: Change) -> None:
        with self._lock:  # not while they are called: who is told may subscribe, or end that
            callbacks = [*self._callbacks.values()]
        for callback in callbacks:
            try:
                callback(change)
            except Exception:
                logger.exception("a subscriber to changes failed")

    def start_empty(self) -> object:
        """In the child after a fork, where somebody may have held the lock. Whoever subscribed came along."""
        inherited, self._lock = self._lock, threading.RLock()
        return inherited
