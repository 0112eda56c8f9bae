"""Tenant records in memory: bounded, believed for a few seconds, looked up once however many ask.

What it keeps true, from any number of threads:
1. A record is served for at most ``ttl`` seconds after the *beginning* of the look-up that brought it, so a slow answer is not believed
   longer than a quick one.
2. Slug and id lead to the same entry, and a renamed tenant is not found under its old slug once the new record is here.
3. An older version never replaces a newer one.
4. After `forget` returns, no look-up that began before it is stored, joined, or returned to whoever waits for it: they look again.
5. "No such tenant" is remembered apart, so that a flood of unknown names pushes out no record; other errors are not remembered at all: an
   outage must not look like an absence, nor outlive itself.
6. Whoever compares the records that are in use with the registry (`check`) has them believed for another ``ttl`` seconds, from before the
   comparison; without that, or where it fails, they end as they would.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from uuid import UUID

from cachetools import LRUCache

from tenantdb.errors import TenantNotFound
from tenantdb.forking import follow
from tenantdb.registry.answers import MOST_LOOKS
from tenantdb.registry.flights import SingleFlight
from tenantdb.registry.records import Stamp, TenantRecord
from tenantdb.registry.shelf import Meanwhile, Shelf

Key = str | UUID


class RecordCache:
    """Records by slug and by id. ``size`` bounds the records and, apart, the unknown names; ``ttl`` is in seconds of ``clock``."""

    def __init__(self, *, size: int, ttl: float, clock: Callable[[], float]) -> None:
        self._size = size
        self._ttl = ttl
        self._clock = clock
        self._lock = threading.Lock()
        self._records: Shelf[UUID, TenantRecord] = Shelf(size)
        self._ids: dict[str, UUID] = {}  # by slug; of what is kept, and of some that went
        self._missing: LRUCache[Key, float] = LRUCache(size)
        self._flights: SingleFlight[Key, TenantRecord] = SingleFlight()
        self._meanwhile = Meanwhile(size)
        follow(self)

    def peek(self, key: Key) -> TenantRecord | None:
        """The record, or None where only a look-up can tell. Never waits. Raises: `TenantNotFound` where that is remembered."""
        with self._lock:
            now = self._clock()
            tenant_id = key if isinstance(key, UUID) else self._ids.get(key)
            if tenant_id is not None:
                record = self._records.get(tenant_id, now)
                if record is not None and (tenant_id is key or record.tenant.slug == key):
                    return record
            if now < self._missing.get(key, now):
                raise TenantNotFound(str(key))
            return None

    def get(self, key: Key, load: Callable[[Key], TenantRecord]) -> TenantRecord:
        """The record, from memory or by ``load``; at most one load per key runs at a time and its error reaches all who wait for it."""
        return self.peek(key) or self._flights.run(key, lambda: self._load(key, load))

    def forget(self, tenant_id: UUID, slug: str | None = None) -> None:
        """The tenant has changed: drop its record, and what is remembered as missing under its id and ``slug``."""
        with self._lock:
            self._drop(tenant_id)
            self._missing.pop(tenant_id, None)
            if slug is not None:
                self._missing.pop(slug, None)
        self._flights.detach()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._records.clear()
            self._ids.clear()
            self._missing.clear()
            self._meanwhile.all_changed()
        self._flights.detach()

    def check(self, ask: Callable[[Sequence[UUID]], Mapping[UUID, Stamp]], *, everything: bool) -> list[UUID]:
        """Compare the records that were used since the last time with the stamps that ``ask`` finds: those that are unchanged are believed
        anew, the others are forgotten, and returned. ``everything``: those that were not used as well, and what is remembered as missing is
        forgotten. Raises: what ``ask`` raises; nothing is believed for longer then."""
        with self._lock:
            asked = self._records.used(everything=everything)
            if everything:
                self._missing.clear()
                self._meanwhile.all_changed()
            expires = self._clock() + self._ttl
        if not asked:
            return []
        true = ask([tenant_id for tenant_id, _ in asked])
        with self._lock:
            changed = self._records.confirm(asked, true, expires, _stamp)
            for tenant_id in changed:
                self._drop(tenant_id)
        if changed:
            self._flights.detach()
        return changed

    def start_empty(self) -> object:
        """In the child after a fork, where somebody may have held the lock; what is remembered is believed on."""
        inherited, self._lock = self._lock, threading.Lock()
        self._meanwhile.reset()
        return inherited

    def _drop(self, tenant_id: UUID) -> None:
        self._records.drop(tenant_id)
        self._meanwhile.changed(tenant_id)

    def _load(self, key: Key, load: Callable[[Key], TenantRecord]) -> TenantRecord:
        for _ in range(MOST_LOOKS):
            if (found := self.peek(key)) is not None:  # it landed between our look and our take-off
                return found
            with self._lock:
                began, expires = self._meanwhile.begin(), self._clock() + self._ttl
            try:
                record = load(key)
                with self._lock:
                    if not self._meanwhile.since(began, record.tenant.id):
                        return self._store(record, expires)
            except TenantNotFound:
                with self._lock:
                    if not self._meanwhile.since(began):  # whatever has changed may be what has this name now
                        self._missing[key] = expires
                raise
            finally:
                with self._lock:
                    self._meanwhile.end()
        return record

    def _store(self, record: TenantRecord, expires: float) -> TenantRecord:
        tenant = record.tenant
        known = self._records.get(tenant.id, self._clock())
        if known is not None and known.tenant.version > tenant.version:
            return known
        self._records.put(tenant.id, record, expires)
        self._ids[tenant.slug] = tenant.id
        if len(self._ids) > 2 * self._size:
            kept = {each.tenant.id: each.tenant.slug for each in self._records.values()}
            self._ids = {slug: tenant_id for slug, tenant_id in self._ids.items() if kept.get(tenant_id) == slug}
        self._missing.pop(tenant.id, None)
        self._missing.pop(tenant.slug, None)
        return record


def _stamp(record: TenantRecord) -> object:
    return record.stamp
