"""Tenant records in memory: bounded, believed for a few seconds, looked up once however many ask.

What it keeps true, from any number of threads:
1. A record is served for at most ``ttl`` seconds after the *beginning* of the look-up that brought it, so a slow answer is not believed
   longer than a quick one.
2. Slug and id lead to the same entry, and a renamed tenant is not found under its old slug once the new record is here.
3. An older version never replaces a newer one.
4. After `forget` returns, no look-up that began before it is stored or joined.
5. "No such tenant" is remembered apart, so that a flood of unknown names pushes out no record; other errors are not remembered at all: an
   outage must not look like an absence, nor outlive itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from cachetools import LRUCache

from tenantdb.errors import TenantNotFound
from tenantdb.forking import follow
from tenantdb.registry.flights import SingleFlight
from tenantdb.registry.records import TenantRecord

Key = str | UUID


@dataclass(frozen=True, slots=True)
class _Entry:
    record: TenantRecord
    expires: float


class RecordCache:
    """Records by slug and by id. ``size`` bounds the records and, apart, the unknown names; ``ttl`` is in seconds of ``clock``."""

    def __init__(self, *, size: int, ttl: float, clock: Callable[[], float]) -> None:
        self._ttl = ttl
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: LRUCache[UUID, _Entry] = LRUCache(size)
        self._ids: LRUCache[str, UUID] = LRUCache(size)
        self._missing: LRUCache[Key, float] = LRUCache(size)
        self._flights: SingleFlight[Key, TenantRecord] = SingleFlight()
        self._epoch = 0  # grows with every forget
        follow(self)

    def peek(self, key: Key) -> TenantRecord | None:
        """The record, or None where only a look-up can tell. Never waits. Raises: `TenantNotFound` where that is remembered."""
        with self._lock:
            now = self._clock()
            tenant_id = key if isinstance(key, UUID) else self._ids.get(key)
            if tenant_id is not None:
                entry = self._entries.get(tenant_id)
                if entry is not None and now < entry.expires and key in (entry.record.tenant.id, entry.record.tenant.slug):
                    return entry.record
            if now < self._missing.get(key, now):
                raise TenantNotFound(str(key))
            return None

    def get(self, key: Key, load: Callable[[Key], TenantRecord]) -> TenantRecord:
        """The record, from memory or by ``load``; at most one load per key runs at a time and its error reaches all who wait for it."""
        return self.peek(key) or self._flights.run(key, lambda: self._load(key, load))

    def forget(self, tenant_id: UUID, slug: str | None = None) -> None:
        """The tenant has changed: drop its record, and what is remembered as missing under its id and ``slug``."""
        with self._lock:
            self._epoch += 1
            self._entries.pop(tenant_id, None)
            self._missing.pop(tenant_id, None)
            if slug is not None:
                self._missing.pop(slug, None)
        self._flights.detach()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._epoch += 1
            self._entries.clear()
            self._ids.clear()
            self._missing.clear()
        self._flights.detach()

    def start_empty(self) -> object:
        """In the child after a fork, where somebody may have held the lock; what is remembered is believed on."""
        inherited, self._lock = self._lock, threading.Lock()
        return inherited

    def _load(self, key: Key, load: Callable[[Key], TenantRecord]) -> TenantRecord:
        if (found := self.peek(key)) is not None:  # it landed between our look and our take-off
            return found
        with self._lock:
            epoch, expires = self._epoch, self._clock() + self._ttl
        try:
            record = load(key)
        except TenantNotFound:
            with self._lock:
                if epoch == self._epoch:
                    self._missing[key] = expires
            raise
        with self._lock:
            return self._store(record, expires) if epoch == self._epoch else record

    def _store(self, record: TenantRecord, expires: float) -> TenantRecord:
        tenant = record.tenant
        known = self._entries.get(tenant.id)
        if known is not None and self._clock() < known.expires and known.record.tenant.version > tenant.version:
            return known.record
        self._entries[tenant.id] = _Entry(record, expires)
        self._ids[tenant.slug] = tenant.id
        self._missing.pop(tenant.id, None)
        self._missing.pop(tenant.slug, None)
        return record
