"""Records for both colours: a thread looks up, a coroutine has a thread look up; what is in memory costs neither anything."""

from __future__ import annotations

from uuid import UUID

from tenantdb.connections.locate import Locator
from tenantdb.connections.threads import Threads
from tenantdb.model import Tenant
from tenantdb.registry import Registry
from tenantdb.registry.records import TenantRecord

_THREADS = 4  # apart from those for management, so that a request never waits behind a migration


class Lookups:
    """Tenant records by key, and the tenants that may be served."""

    def __init__(self, registry: Registry, locator: Locator) -> None:
        self._registry = registry
        self._locator = locator
        self._threads = Threads(_THREADS, "tenantdb-lookup")
        self.run = self._threads.run  # for other short questions to the registry, from the event loop

    def record(self, key: str | UUID) -> TenantRecord:
        """Raises: `TenantNotFound`, `RegistryUnavailable`."""
        return self._registry.lookup(key)

    async def arecord(self, key: str | UUID) -> TenantRecord:
        """The same, without blocking the event loop."""
        found = self._registry.peek(key)
        return await self.run(self._registry.lookup, key) if found is None else found

    def servable(self, key: str | UUID) -> Tenant:
        """Raises: also what `Locator.ensure_servable` raises."""
        return self._locator.ensure_servable(self.record(key).tenant, key)

    async def aservable(self, key: str | UUID) -> Tenant:
        return self._locator.ensure_servable((await self.arecord(key)).tenant, key)

    def close(self) -> None:
        self._threads.close()
