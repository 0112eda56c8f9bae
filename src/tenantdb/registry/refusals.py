"""Refused attempts, for the audit log: counted in memory and written once in a while, because whoever is refused can ask a thousand times
a second, and must not make us write as often.

What is lost when a process dies is the last minute's count. Nothing fails when it cannot be written: it is kept, and tried again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from tenantdb.forking import follow
from tenantdb.registry.tables import utcnow

log = logging.getLogger("tenantdb.audit")

EVERY = 60.0  # seconds
MOST = 1000  # different (kind, tenant, actor) in one period
MANY = "many"  # who was refused, when there were more than that


@dataclass(frozen=True, slots=True)
class Refusal:
    """``count`` attempts of one kind since a moment, of one actor on one tenant."""

    kind: str
    tenant_id: UUID | None
    actor: str
    count: int
    since: datetime


class RefusalLog:
    """Counts, and calls ``write(refusals)`` in a thread ``every`` seconds after the first. Safe from any thread and event loop."""

    def __init__(
        self,
        write: Callable[[list[Refusal]], None],
        *,
        every: float = EVERY,
        most: int = MOST,
        clock: Callable[[], datetime] = utcnow,
        timer: Callable[[float, Callable[[], None]], Any] = threading.Timer,
    ) -> None:
        self._write = write
        self._every = every
        self._most = most
        self._clock = clock
        self._timer = timer
        self._pending: Any = None
        self._counts: dict[tuple[str, UUID | None, str], tuple[int, datetime]] = {}
        self._lock = threading.Lock()
        follow(self)

    def add(self, kind: str, tenant_id: UUID | None, actor: str) -> None:
        """One more."""
        with self._lock:
            self._add(kind, tenant_id, actor, 1, self._clock())
            self._plan()

    def flush(self) -> None:
        """Write what was counted."""
        with self._lock:
            counts, self._counts, self._pending = self._counts, {}, None
        refusals = [Refusal(*key, *count) for key, count in counts.items()]
        if not refusals:
            return
        try:
            self._write(refusals)
        except Exception as error:
            log.warning("%d kinds of refused attempts could not be written: %s", len(refusals), type(error).__name__)
            with self._lock:
                for refusal in refusals:
                    self._add(refusal.kind, refusal.tenant_id, refusal.actor, refusal.count, refusal.since)
                self._plan()

    def close(self) -> None:
        """Write what was counted, and plan nothing more. May be called twice."""
        self.flush()
        with self._lock:
            pending, self._pending = self._pending, None
        if pending is not None:
            pending.cancel()

    def start_empty(self) -> object:
        """In the child after a fork: what was counted is the parent's to write."""
        inherited = [self._lock, self._pending]
        self._lock, self._pending, self._counts = threading.Lock(), None, {}
        return inherited

    def _add(self, kind: str, tenant_id: UUID | None, actor: str, count: int, since: datetime) -> None:
        key = (kind, tenant_id, actor)
        if key not in self._counts and len(self._counts) >= self._most:
            key = (kind, None, MANY)
        known = self._counts.get(key)
        self._counts[key] = (count, since) if known is None else (known[0] + count, min(known[1], since))

    def _plan(self) -> None:
        if self._pending is None:
            self._pending = self._timer(self._every, self.flush)
            self._pending.daemon = True
            self._pending.start()
