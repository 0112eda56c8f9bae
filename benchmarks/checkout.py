"""What taking a connection and giving it back costs, without a database: our pool against SQLAlchemy's on the same stub driver."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, cast

from sqlalchemy import create_engine
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, Pool, QueuePool
from sqlalchemy.util import greenlet_spawn

from benchmarks.measure import Result, async_ratio, ratio
from tenantdb import Budget, Settings
from tenantdb.backends import Location
from tenantdb.connections.budget import ServerBudget
from tenantdb.connections.pools import Source, TenantPool
from tenantdb.connections.reaper import Reaper
from tenantdb.connections.share import limits_of
from tenantdb.connections.sqla import Initialisation
from tenantdb.model import DatabaseRole, Server, Tenant, TenantState

_FEW, _MANY = 10, 10_000


class StubConnection:
    """A DBAPI connection that does nothing."""

    def rollback(self) -> None: ...
    def close(self) -> None: ...


class StubWire:
    """A connection that is always clean and alive."""

    def defer(self) -> None: ...
    def send_reset(self) -> bool:
        return True

    def settled(self) -> bool:
        return True

    def finish(self) -> None: ...


class StubBackend:
    """A product whose connections are stubs."""

    def open(self, dialect: Any, location: Location, settings: Settings, *, timeout: float) -> StubConnection:
        return StubConnection()

    def wire(self, dialect: Any, connection: Any) -> StubWire:
        return StubWire()


class Fleet:
    """``tenants`` tenants that were all used once; the pools of the last few have idle connections."""

    def __init__(self, tenants: int, *, is_async: bool) -> None:
        self._settings = Settings(url="sqlite:///benchmark.sqlite3", budget=Budget(connections=60, processes=1))
        self._server = Server(id=uuid.uuid4(), name="stub", backend="sqlite", path="benchmark")
        self._reaper = Reaper(lambda now: float("inf"))
        self._budget = ServerBudget(
            "stub", limits_of(self._settings, self._server), self._reaper, lambda *happened: None, total=60, processes=1
        )
        self._template = _template(is_async=is_async)
        self._is_async = is_async
        self.pools = [self._pool(number) for number in range(tenants)]
        for pool in self.pools:
            pool.connect().close()

    def _pool(self, number: int) -> TenantPool:
        tenant = Tenant(id=uuid.uuid4(), slug=f"tenant-{number}", name="", state=TenantState.ACTIVE)
        location = Location(tenant, self._server, DatabaseRole.RUNTIME, lambda: "")
        backend = cast("Any", StubBackend())
        return TenantPool(
            Source(location, backend, self._template, self._budget, self._settings, None, is_async=self._is_async, parks=True)
        )

    def close(self) -> None:
        for pool in self.pools:
            pool.retire()
        self._reaper.stop()


def _template(*, is_async: bool) -> Engine:
    """A dialect without the listeners that would talk to a real driver."""
    if is_async:
        engine = create_async_engine("sqlite+aiosqlite://", poolclass=NullPool).sync_engine
    else:
        engine = create_engine("sqlite://", poolclass=NullPool)
    engine.pool = NullPool(cast("Any", StubConnection))
    Initialisation.of(engine).done = True  # nothing will ever initialise it
    return engine


def _turns(pools: list[Any], repeats: int) -> Callable[[], None]:
    """Get and return, ``repeats`` times, from one pool after the other."""
    one, *others = pools
    if not others:

        def alone() -> None:
            for _ in range(repeats):
                one.connect().close()

        return alone

    def in_turn() -> None:
        for _ in range(repeats // len(pools)):
            for pool in pools:
                pool.connect().close()

    return in_turn


def run(*, quick: bool) -> Result:
    result = Result()
    rounds, repeats = (15, 2_000) if quick else (61, 10_000)
    few = Fleet(_FEW, is_async=False)
    note = "get and return, hit path / the same with QueuePool"
    theirs = _theirs(QueuePool, few._template)
    result.add("sync_ratio", ratio(_turns(few.pools[-1:], repeats), _turns([theirs], repeats), rounds=rounds), bar="<= 1.5", note=note)
    awaited, alone = asyncio.run(_async_ratios(rounds, repeats))
    result.add("async_ratio", awaited, bar="<= 1.25", note="the same from a coroutine / AsyncAdaptedQueuePool")
    result.add("async_pool_ratio", alone, note="the same without the greenlets that a coroutine needs, for orientation")
    many = Fleet(_MANY, is_async=False)
    scale = ratio(_turns(many.pools[-_FEW:], repeats), _turns(few.pools, repeats), rounds=rounds)
    result.add("scale_ratio", scale, bar="<= 1.15", note=f"{_MANY:,} known tenants / {_FEW}")
    few.close()
    many.close()
    return result


def _theirs(poolclass: type[Pool], template: Engine) -> Pool:
    pool = poolclass(StubConnection, dialect=template.dialect)  # type: ignore[arg-type]
    pool.connect().close()
    return pool


async def _async_ratios(rounds: int, repeats: int) -> tuple[float, float]:
    """As a coroutine takes and returns a connection, each in a greenlet as SQLAlchemy does it; and the pools alone, in one greenlet."""
    fleet = await greenlet_spawn(Fleet, 1, is_async=True)
    theirs = await greenlet_spawn(_theirs, AsyncAdaptedQueuePool, fleet._template)
    ours = fleet.pools[0]
    try:
        awaited = await async_ratio(_awaited(ours, repeats // 4), _awaited(theirs, repeats // 4), rounds=rounds)
        alone = await greenlet_spawn(lambda: ratio(_turns([ours], repeats), _turns([theirs], repeats), rounds=rounds))
    finally:
        await greenlet_spawn(fleet.close)
    return awaited, alone


def _awaited(pool: Pool, repeats: int) -> Callable[[], Awaitable[None]]:
    async def turns() -> None:
        for _ in range(repeats):
            connection = await greenlet_spawn(pool.connect)
            await greenlet_spawn(connection.close)

    return turns
