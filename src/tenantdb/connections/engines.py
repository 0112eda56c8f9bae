"""A bounded number of engines, one per (tenant, generation, role, lane), made on demand.

A lane is "threads", or one event loop: a connection never changes lane. Within a lane the least recently used engine that nobody leases
from is retired when there are too many; one that is leased from is never evicted, so their number may exceed the bound while they are all
busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar
from uuid import UUID

from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import NullPool

from tenantdb.backends import Location, backend
from tenantdb.connections.locate import Locator, ensure_servable
from tenantdb.connections.pools import AsyncTenantPool, TenantPool
from tenantdb.model import DatabaseRole
from tenantdb.registry.records import TenantRecord
from tenantdb.settings import Settings

E = TypeVar("E", bound=Engine | AsyncEngine)
_Key = tuple[UUID, int, DatabaseRole]


class Lane(Generic[E]):
    """The engines of the threads, or of one event loop, least recently used first."""

    def __init__(self, limit: int, pool_of: Callable[[E], Any]) -> None:
        self._limit = limit
        self._pool_of = pool_of
        self._engines: OrderedDict[_Key, E] = OrderedDict()
        self._lock = threading.Lock()
        self.retiring: set[Any] = set()  # tasks that close connections of an event loop

    def get(self, key: _Key, make: Callable[[], E]) -> E:
        engine = self._engines.get(key)
        if engine is not None:
            with self._lock, contextlib.suppress(KeyError):  # evicted in between: it still works, and closes what comes back
                self._engines.move_to_end(key)
            if len(self._engines) > self._limit:  # more were busy at once than may be kept, and some may be idle by now
                self._trim(key)
            return engine
        made = make()  # opens nothing, so making one too many is harmless; reading secrets under the lock would not be
        with self._lock:
            engine = self._engines.setdefault(key, made)
            self._engines.move_to_end(key)
        self._trim(key)
        return engine

    def _trim(self, newest: _Key) -> None:
        with self._lock:
            victims = self._choose_victims(newest)
        for victim in victims:
            self._retire(victim)

    def _choose_victims(self, newest: _Key) -> list[E]:
        tenant_id, _, role = newest
        outdated = [key for key in self._engines if key[0] == tenant_id and key[2] is role and key != newest]
        victims = [self._engines.pop(key) for key in outdated]  # leased or not: what comes back is closed
        for key in list(self._engines):
            if len(self._engines) <= self._limit:
                break
            if key != newest and self._pool_of(self._engines[key]).checkedout() == 0:
                victims.append(self._engines.pop(key))
        return victims

    def forget(self, tenant_id: UUID) -> None:
        """Retire every engine of a tenant."""
        with self._lock:
            victims = [self._engines.pop(key) for key in list(self._engines) if key[0] == tenant_id]
        for victim in victims:
            self._retire(victim)

    def take_all(self) -> list[E]:
        with self._lock:
            engines = list(self._engines.values())
            self._engines.clear()
        return engines

    def _retire(self, engine: E) -> None:
        task = self._pool_of(engine).retire()
        if task is not None:
            self.retiring.add(task)
            task.add_done_callback(self.retiring.discard)


def _sync_pool(engine: Engine) -> Any:
    return engine.pool


def _async_pool(engine: AsyncEngine) -> Any:
    return engine.sync_engine.pool


class Engines:
    """From a tenant's record to an engine on its database; here an unservable tenant is refused. Safe to share between threads."""

    def __init__(self, locator: Locator, settings: Settings) -> None:
        self._locator = locator
        self._settings = settings
        self._threads: Lane[Engine] = Lane(settings.max_engines, _sync_pool)
        # Not by weak references: a loop that was collected would take its lane along, and the lane's connections would stay open.
        self._loops: dict[asyncio.AbstractEventLoop, Lane[AsyncEngine]] = {}
        self._lock = threading.Lock()

    def engine_of(self, record: TenantRecord, key: Hashable) -> Engine:
        """The threads' engine of a tenant; ``key`` is how the caller named it. Raises: what `ensure_servable` raises."""
        tenant = ensure_servable(record.tenant, key)
        return self._threads.get((tenant.id, tenant.generation, DatabaseRole.RUNTIME), lambda: self._make(record))

    def async_engine_of(self, record: TenantRecord, key: Hashable) -> AsyncEngine:
        """The running event loop's engine of a tenant."""
        tenant = ensure_servable(record.tenant, key)
        lane = self._loop_lane(asyncio.get_running_loop())
        return lane.get((tenant.id, tenant.generation, DatabaseRole.RUNTIME), lambda: self._make_async(record))

    def forget(self, tenant_id: UUID) -> None:
        """A tenant has changed: retire its engines, each event loop's in that loop. From any thread."""
        self._threads.forget(tenant_id)
        with self._lock:
            lanes = list(self._loops.items())
        for loop, lane in lanes:
            with contextlib.suppress(RuntimeError):  # closed: its connections are dropped when a lane is next made, or at the end
                loop.call_soon_threadsafe(lane.forget, tenant_id)

    def close(self) -> None:
        """Retire the threads' engines and drop those of event loops that are closed."""
        for engine in self._threads.take_all():
            _sync_pool(engine).retire()
        self._drop_closed_loops()

    async def aclose(self) -> None:
        """Retire the engines of the running event loop and wait until their idle connections are closed."""
        lane = self._loop_lane(asyncio.get_running_loop())
        tasks = [_async_pool(engine).retire() for engine in lane.take_all()]
        await asyncio.gather(*tasks, *lane.retiring)

    def _loop_lane(self, loop: asyncio.AbstractEventLoop) -> Lane[AsyncEngine]:
        lane = self._loops.get(loop)
        if lane is None:
            self._drop_closed_loops()
            with self._lock:
                lane = self._loops.setdefault(loop, Lane(self._settings.max_engines, _async_pool))
        return lane

    def _drop_closed_loops(self) -> None:
        with self._lock:
            closed = [loop for loop in self._loops if loop.is_closed()]
            lanes = [self._loops.pop(loop) for loop in closed]
        for lane in lanes:
            for engine in lane.take_all():
                _async_pool(engine).abandon()

    def _make(self, record: TenantRecord) -> Engine:
        location = self._locator.locate(record, DatabaseRole.RUNTIME)
        engine = backend(location.server.backend).engine(location, self._settings, poolclass=TenantPool, **self._pool_options())
        _sync_pool(engine).tenant_slug = record.tenant.slug
        return engine

    def _make_async(self, record: TenantRecord) -> AsyncEngine:
        location = self._locator.locate(record, DatabaseRole.RUNTIME)
        engine = backend(location.server.backend).async_engine(location, self._settings, poolclass=AsyncTenantPool, **self._pool_options())
        _async_pool(engine).tenant_slug = record.tenant.slug
        return engine

    def _pool_options(self) -> dict[str, Any]:
        settings = self._settings
        return {"pool_size": settings.pool_size, "max_overflow": 0, "pool_timeout": settings.acquire_timeout}


@contextlib.contextmanager
def one_engine(location: Location, settings: Settings) -> Iterator[Engine]:
    """An engine without a pool, for one step of provisioning or one migration, whatever the tenant's state."""
    engine = backend(location.server.backend).engine(location, settings, poolclass=NullPool)
    try:
        yield engine
    finally:
        engine.dispose()
