"""How a thread and how a coroutine wait for the verdict on a claim, side by side in one queue.

A verdict is written under the ledger's lock; delivering it only wakes who waits, and comes after the lock. So whoever stops waiting, for
whatever reason, finds out under the lock whether there is something to give back.
"""

from __future__ import annotations

import asyncio
import threading

from sqlalchemy.util import await_only

await_in_greenlet = await_only
"""Await from plain code that SQLAlchemy runs for asyncio."""


class ThreadWaiter:
    """For the threads' lane."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wait(self, timeout: float) -> None:
        """Until `deliver`, or ``timeout`` seconds."""
        self._lock.acquire(timeout=min(max(timeout, 0.0), threading.TIMEOUT_MAX))

    def deliver(self) -> bool:
        """Wake who waits, from any thread. False where nobody can be woken any more."""
        self._lock.release()
        return True


class LoopWaiter:
    """For one event loop's lane; made and waited for inside SQLAlchemy's greenlet."""

    __slots__ = ("_future", "_loop")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] = self._loop.create_future()

    def wait(self, timeout: float) -> None:
        await_in_greenlet(self._wait(timeout))

    async def _wait(self, timeout: float) -> None:
        handle = self._loop.call_later(min(max(timeout, 0.0), threading.TIMEOUT_MAX), self._wake)
        try:
            await self._future
        finally:
            handle.cancel()

    def _wake(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def deliver(self) -> bool:
        try:
            if asyncio._get_running_loop() is self._loop:
                self._wake()  # no need to knock at the loop's door from inside
            else:
                self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # the loop is closed, and with it everything that waited in it
            return False
        return True
