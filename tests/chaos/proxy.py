"""A network between tenantdb and PostgreSQL that a test can break: refuse, fall silent, hang up."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from typing import Any

_RESET = struct.pack("ii", 1, 0)  # a close that waits for nothing and tells the other side by RST


class Proxy:
    """Forwards TCP from a port of its own to another, in a thread of its own. Its methods may be called from any thread; each has taken
    effect when it returns."""

    host = "127.0.0.1"

    def __init__(self, target: int) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._flows = asyncio.Event()
        self._listening: socket.socket | None = None
        self._links: set[asyncio.Task[None]] = set()
        self.port = 0
        self.arrivals = 0  # connections that were accepted so far

    def __enter__(self) -> Proxy:
        self._thread.start()
        self.heal()
        return self

    def __exit__(self, *exc: object) -> None:
        self.refuse()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def refuse(self) -> None:
        """The host is up and nothing listens: what is connected is cut off, what comes is refused."""
        self._do(self._unlisten())
        self.drop()

    def stall(self) -> None:
        """Not a byte passes in either direction, and nobody is told: what comes is accepted and never answered."""
        self._loop.call_soon_threadsafe(self._flows.clear)
        self._do(asyncio.sleep(0))

    def flow(self) -> None:
        """The opposite of `stall`; what was held up arrives."""
        self._loop.call_soon_threadsafe(self._flows.set)
        self._do(asyncio.sleep(0))

    def drop(self) -> None:
        """Cut off every connection."""
        self._do(self._drop())

    def heal(self) -> None:
        """Listen again, and let everything pass."""
        self._do(self._listen())
        self.flow()

    def _do(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _listen(self) -> None:
        if self._listening is None:
            listener = socket.create_server((self.host, self.port), backlog=512)
            listener.setblocking(False)
            self.port = listener.getsockname()[1]
            self._listening = listener
            self._loop.add_reader(listener, self._accept, listener)

    async def _unlisten(self) -> None:
        if self._listening is not None:
            self._loop.remove_reader(self._listening)
            self._listening.close()
            self._listening = None

    async def _drop(self) -> None:
        for link in self._links:
            link.cancel()
        if self._links:
            await asyncio.wait(self._links)

    def _accept(self, listener: socket.socket) -> None:
        """Not by a coroutine, which may be cancelled with a connection in its hands."""
        try:
            here, _ = listener.accept()
        except BlockingIOError:
            return
        here.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.arrivals += 1
        link = self._loop.create_task(self._link(here))
        self._links.add(link)
        link.add_done_callback(self._links.discard)
        link.add_done_callback(lambda _, here=here: here.close())  # also of one that is cut off before it has begun

    async def _link(self, here: socket.socket) -> None:
        with socket.socket() as there, contextlib.suppress(OSError):
            here.setblocking(False)
            there.setblocking(False)
            there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            await self._flows.wait()
            await self._loop.sock_connect(there, (self.host, self._target))
            pumps = [asyncio.create_task(self._pump(here, there)), asyncio.create_task(self._pump(there, here))]
            try:
                await asyncio.gather(*pumps)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        while data := await self._loop.sock_recv(source, 65536):
            await self._flows.wait()
            await self._loop.sock_sendall(sink, data)
        await self._flows.wait()
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
