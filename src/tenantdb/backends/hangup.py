"""Waiting until a server has hung up on a closed connection, on a copy of its socket.

A server's process outlives the close of its connection by a moment and counts against the server's limits until it is gone. Its own end of
the socket is closed when it is.
"""

from __future__ import annotations

import asyncio
import os
import select
import time


def has_hung_up(descriptor: int) -> bool:
    """Read what was still under way, of a result that nobody will read, and see whether the server has hung up. Never waits."""
    try:
        while os.read(descriptor, 65536):
            pass
    except BlockingIOError:  # libpq made the socket so
        return False
    except OSError:  # reset: gone as well
        return True
    return True


def wait_for_hangup(descriptor: int, timeout: float) -> bool:
    """Wait until the server has closed its end, and close ours whatever happens. False: it had not within ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    try:
        while not has_hung_up(descriptor):
            if not is_readable(descriptor, deadline - time.monotonic()):
                return False
        return True
    finally:
        os.close(descriptor)


async def await_hangup(descriptor: int, timeout: float) -> bool:
    """The same for asyncio."""
    deadline = time.monotonic() + timeout
    try:
        while not has_hung_up(descriptor):
            if not await becomes_readable(descriptor, deadline - time.monotonic()):
                return False
        return True
    finally:
        os.close(descriptor)


def is_readable(descriptor: int, timeout: float) -> bool:
    """Whether there is something to read within ``timeout`` seconds."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return timeout >= 0 and bool(poll.poll(timeout * 1000))


async def becomes_readable(descriptor: int, timeout: float) -> bool:
    """The same for asyncio."""
    loop = asyncio.get_running_loop()
    readable = loop.create_future()

    def wake() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(descriptor, wake)
    try:  # not `wait_for`, which before Python 3.12 may swallow a cancellation
        await asyncio.wait([readable], timeout=max(0.0, timeout))
    finally:
        loop.remove_reader(descriptor)
    return readable.done()
