"""Records for both colours: a thread looks up, a coroutine has a thread look up; what is in memory costs neither anything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar
from uuid import UUID

from tenantdb.connections.locate import Locator
from tenantdb.connections.threads import Threads
from tenantdb.errors import RegistryUnavailable
from tenantdb.model import Tenant
from tenantdb.registry import Registry
from tenantdb.registry.records import TenantRecord

P = ParamSpec("P")
R = TypeVar("R")

_THREADS = 4  # apart from those for management, so that a request never waits behind a migration


class Lookups:
    """Tenant records by key, and the tenants that may be served. A coroutine waits ``patience`` seconds for an answer and no longer."""

    def __init__(self, registry: Registry, locator: Locator, *, patience: float) -> None:
        self._registry = registry
        self._locator = locator
        self._patience = patience
        self._threads = Threads(_THREADS, "tenantdb-lookup")

    async def run(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Ask the registry a short question from the event loop.

        While the registry swallows what it is sent, each thread is busy for as long as a connect may take, and the requests in line behind
        them would wait for minutes. Raises: `RegistryUnavailable`, also for one whose turn did not come in time.
        """
        try:
            return await asyncio.wait_for(self._threads.run(fn, *args, **kwargs), self._patience)
        except asyncio.TimeoutError:
            raise RegistryUnavailable(f"it has not answered for {self._patience:.0f} s") from None

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
