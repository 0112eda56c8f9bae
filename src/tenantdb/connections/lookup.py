"""Records for both colours: a thread looks up, a coroutine has a thread look up; what is in memory costs neither anything."""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar
from uuid import UUID

from tenantdb.connections.locate import ensure_servable
from tenantdb.model import Tenant
from tenantdb.registry import Registry
from tenantdb.registry.records import TenantRecord

P = ParamSpec("P")
R = TypeVar("R")

_THREADS = 4  # apart from those for management, so that a request never waits behind a migration


class Lookups:
    """Tenant records by key, and the tenants that may be served."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="tenantdb-lookup")  # starts no thread before its first use

    def record(self, key: str | UUID) -> TenantRecord:
        """Raises: `TenantNotFound`, `RegistryUnavailable`."""
        return self._registry.lookup(key)

    async def arecord(self, key: str | UUID) -> TenantRecord:
        """The same, without blocking the event loop."""
        found = self._registry.peek(key)
        return await self.run(self._registry.lookup, key) if found is None else found

    async def run(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """A short question to the registry, from the event loop."""
        call = functools.partial(contextvars.copy_context().run, functools.partial(fn, *args, **kwargs))
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def servable(self, key: str | UUID) -> Tenant:
        """Raises: also what `ensure_servable` raises."""
        return ensure_servable(self.record(key).tenant, key)

    async def aservable(self, key: str | UUID) -> Tenant:
        return ensure_servable((await self.arecord(key)).tenant, key)

    def close(self) -> None:
        self._executor.shutdown(wait=True)
