"""A pool per tenant, the least recently used emptied to make room: what most multi-tenant applications on SQLAlchemy do.

Done well. The bound is strict: a pool counts with its full size from the moment it may open a connection until the last one is closed, and
a pool in use, or waited for, is never emptied. Threads and tasks share the bound, so neither colour starves beside room that is kept for
the other. Whoever finds no room queues under its tenant; when a pool falls idle its place goes to the tenant that has waited longest, and
all who wait for that tenant enter at once.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool

from benchmarks.peers import Logins

_TIMEOUT = 30.0  # seconds to wait for a connection of a pool that is in place

Key = tuple[str, bool]  # the tenant's slug, and whether the pool is the event loop's
Wake = Callable[[], None]


class LRUEngines:
    """At most ``engines`` pools of ``pool_size`` connections."""

    def __init__(self, logins: Logins, *, engines: int, pool_size: int) -> None:
        self._logins = logins
        self._limit = engines
        self._pool_size = pool_size
        self._engines: dict[str, Engine] = {}
        self._async_engines: dict[str, AsyncEngine] = {}
        self._lock = threading.Lock()
        self._users: OrderedDict[Key, int] = OrderedDict()  # of each pool in place, least recently used first
        self._closing = 0  # pools being emptied: their places are not free yet
        self._waiting: OrderedDict[Key, list[Wake]] = OrderedDict()  # of these none is in place
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextmanager
    def session(self, slug: str) -> Iterator[Session]:
        key = (slug, False)
        entered = threading.Event()
        here, victim = self._enter(key, entered.set)
        if victim is not None:
            self._empty(victim)
        if not here:
            entered.wait()
        try:
            with Session(self._engine(slug)) as session:
                yield session
        finally:
            if (victim := self._leave(key)) is not None:
                self._empty(victim)

    @asynccontextmanager
    async def async_session(self, slug: str) -> AsyncIterator[AsyncSession]:
        key = (slug, True)
        loop = self._loop = asyncio.get_running_loop()
        entered: asyncio.Future[None] = loop.create_future()
        here, victim = self._enter(key, lambda: _set_soon(loop, entered))
        if victim is not None:
            await self._empty_async(victim)
        if not here:
            await asyncio.shield(entered)  # a task that is cancelled here keeps its tenant's place; fine for a peer that is never cancelled
        try:
            async with AsyncSession(self._async_engine(slug)) as session:
                yield session
        finally:
            if (victim := self._leave(key)) is not None:
                await self._empty_async(victim)

    async def close(self) -> None:
        """Empty every pool. Nobody may be using one."""
        with self._lock:
            victims = list(self._users)
            self._users.clear()
            self._closing += len(victims)
        for victim in victims:
            await self._empty_async(victim)

    # -- who may enter --

    def _enter(self, key: Key, wake: Wake) -> tuple[bool, Key | None]:
        """Whether the caller is in, as one user of its tenant's pool; if not, ``wake`` is called when it is; and what to empty now."""
        with self._lock:
            if key in self._users:
                self._users[key] += 1
                self._users.move_to_end(key)
                return True, None
            self._waiting.setdefault(key, []).append(wake)
            if len(self._users) + self._closing < self._limit:
                self._waiting[key].pop()
                self._admit(key, also=1)
                return True, None
            return False, self._choose_victim()

    def _leave(self, key: Key) -> Key | None:
        with self._lock:
            self._users[key] -= 1
            return self._choose_victim()

    def _choose_victim(self) -> Key | None:
        if len(self._waiting) <= self._closing:
            return None
        victim = next((key for key, users in self._users.items() if not users), None)
        if victim is not None:
            del self._users[victim]
            self._closing += 1
        return victim

    def _emptied(self) -> None:
        with self._lock:
            self._closing -= 1
            while self._waiting and len(self._users) + self._closing < self._limit:
                self._admit(next(iter(self._waiting)))

    def _admit(self, key: Key, also: int = 0) -> None:
        waiting = self._waiting.pop(key)
        self._users[key] = len(waiting) + also
        for wake in waiting:
            wake()

    # -- pools --

    def _empty(self, victim: Key) -> None:
        slug, is_async = victim
        if is_async and self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._async_engine(slug).dispose(), self._loop).result()
        else:
            self._engine(slug).dispose()
        self._emptied()

    async def _empty_async(self, victim: Key) -> None:
        slug, is_async = victim
        if is_async:
            await self._async_engine(slug).dispose()
        else:
            self._engine(slug).dispose()  # closes idle sockets, which waits for nobody
        self._emptied()

    def _engine(self, slug: str) -> Engine:
        engine = self._engines.get(slug)
        if engine is None:
            made = create_engine(self._logins[slug].url, poolclass=QueuePool, **self._options(slug))
            engine = self._engines.setdefault(slug, made)
        return engine

    def _async_engine(self, slug: str) -> AsyncEngine:
        engine = self._async_engines.get(slug)
        if engine is None:
            made = create_async_engine(self._logins[slug].url, poolclass=AsyncAdaptedQueuePool, **self._options(slug))
            engine = self._async_engines.setdefault(slug, made)
        return engine

    def _options(self, slug: str) -> dict[str, Any]:
        return {
            "connect_args": dict(self._logins[slug].connect_args),
            "pool_size": self._pool_size,
            "max_overflow": 0,
            "pool_timeout": _TIMEOUT,
            "use_native_hstore": False,
        }


def _set_soon(loop: asyncio.AbstractEventLoop, entered: asyncio.Future[None]) -> None:
    loop.call_soon_threadsafe(entered.set_result, None)
