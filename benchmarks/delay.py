"""A network between this machine and itself: a proxy on 127.0.0.1 that hands on whatever the server says some milliseconds later.

It is a process of its own, so that it takes no time of the interpreter that is measured. It ends with the process that made it, whose end
of its standard input closes then. What the client says is handed on at once: a round trip takes the delay, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def delayed(port: int, seconds: float) -> Iterator[int]:
    """The port of a proxy to a server's port on this machine, for as long as the block lasts."""
    command = [sys.executable, "-m", __name__, str(port), str(seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdin is not None and proxy.stdout is not None
        with proxy.stdin:
            yield int(proxy.stdout.readline())


class _End(asyncio.Protocol):
    """One end of a connection through the proxy. What arrives here is written to the other end ``seconds`` later, its end too."""

    transport: asyncio.Transport

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.other: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.other is not None:
            self._later(self.other.write, data)

    def connection_lost(self, error: Exception | None) -> None:
        if self.other is not None:
            self._later(self.other.close)

    def _later(self, fn: Callable[..., object], *args: object) -> None:
        if self._seconds:  # each a moment after the one before, so timers keep the order
            asyncio.get_running_loop().call_later(self._seconds, fn, *args)
        else:
            fn(*args)


class _Client(_End):
    """The end that a client has connected to; it waits for the server's before it reads."""

    def __init__(self, port: int, seconds: float) -> None:
        super().__init__(0)
        self._port = port
        self._delay = seconds

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.pause_reading()
        self._meeting = asyncio.get_running_loop().create_task(self._meet())

    async def _meet(self) -> None:
        try:
            _, server = await asyncio.get_running_loop().create_connection(lambda: _End(self._delay), "127.0.0.1", self._port)
        except OSError:  # nobody listens: nobody answers here either
            self.transport.close()
            return
        server.other, self.other = self.transport, server.transport
        self.transport.resume_reading()


async def _serve(port: int, seconds: float) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    proxy = await loop.create_server(lambda: _Client(port, seconds), "127.0.0.1", 0)
    print(proxy.sockets[0].getsockname()[1], flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), loop.call_soon_threadsafe(ended.set)), daemon=True).start()
    await ended.wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), float(sys.argv[2])))
