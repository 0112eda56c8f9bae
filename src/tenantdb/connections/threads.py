"""Worker threads for blocking work that an event loop asks for."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from tenantdb.forking import follow

P = ParamSpec("P")
R = TypeVar("R")


class Threads:
    """At most ``size`` threads, started when they are needed; closed ones start again, so that an application can be started twice."""

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._executor: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        follow(self)

    async def run(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call ``fn`` in a thread, with the caller's context: the bound tenant, and who acts."""
        call = functools.partial(contextvars.copy_context().run, functools.partial(fn, *args, **kwargs))
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self._size, thread_name_prefix=self._name)
            future = self._executor.submit(call)
        return await asyncio.wrap_future(future)

    def start_empty(self) -> object:
        """In the child after a fork, where no thread came along."""
        inherited, self._executor = self._executor, None
        self._lock = threading.Lock()
        return inherited

    def close(self) -> None:
        """End the threads when what they do is done; does not wait for it."""
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False)
