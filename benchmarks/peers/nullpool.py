"""Connect per request: no pool at all, and one semaphore that keeps threads and tasks together under the limit."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from benchmarks.peers import Login, Logins


class SharedSemaphore:
    """A semaphore for threads and for tasks, first come, first served: a free permit goes straight to whoever waits longest.

    `asyncio.Semaphore` does not know threads, and `threading.Semaphore` would block the event loop.
    """

    def __init__(self, permits: int) -> None:
        self._permits = permits
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], bool]] = deque()

    def _take_or_queue(self, wake: Callable[[], bool]) -> bool:
        with self._lock:
            if self._permits:
                self._permits -= 1
                return True
            self._waiting.append(wake)
            return False

    def acquire(self) -> None:
        served = threading.Event()

        def wake() -> bool:
            served.set()
            return True

        if not self._take_or_queue(wake):
            served.wait()

    async def acquire_async(self) -> None:
        loop = asyncio.get_running_loop()
        served: asyncio.Future[None] = loop.create_future()

        def deliver() -> None:
            if served.cancelled():
                self.release()
            else:
                served.set_result(None)

        def wake() -> bool:
            if served.cancelled():
                return False
            loop.call_soon_threadsafe(deliver)
            return True

        if not self._take_or_queue(wake):
            await served

    def release(self) -> None:
        with self._lock:
            while self._waiting:
                if self._waiting.popleft()():
                    return
            self._permits += 1


class ConnectPerRequest:
    """`NullPool` engines behind one semaphore."""

    def __init__(self, logins: Logins, *, limit: int) -> None:
        self._logins = logins
        self._semaphore = SharedSemaphore(limit)
        self._engines: dict[str, Engine] = {}
        self._async_engines: dict[str, AsyncEngine] = {}

    @contextmanager
    def session(self, slug: str) -> Iterator[Session]:
        engine = self._engines.get(slug)
        if engine is None:
            engine = self._engines.setdefault(slug, _engine(self._logins[slug]))
        self._semaphore.acquire()
        try:
            with Session(engine) as session:
                yield session
        finally:
            self._semaphore.release()

    @asynccontextmanager
    async def async_session(self, slug: str) -> AsyncIterator[AsyncSession]:
        engine = self._async_engines.get(slug)
        if engine is None:
            engine = self._async_engines.setdefault(slug, _async_engine(self._logins[slug]))
        await self._semaphore.acquire_async()
        try:
            async with AsyncSession(engine) as session:
                yield session
        finally:
            self._semaphore.release()

    async def close(self) -> None:
        """Nothing to do: no connection outlives its session."""


def _engine(login: Login) -> Engine:
    return create_engine(login.url, connect_args=dict(login.connect_args), poolclass=NullPool, use_native_hstore=False)


def _async_engine(login: Login) -> AsyncEngine:
    return create_async_engine(login.url, connect_args=dict(login.connect_args), poolclass=NullPool, use_native_hstore=False)
