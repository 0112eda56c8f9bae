"""The pools under a tenant's engine: SQLAlchemy's own queue pools, which can be retired.

`Engine.dispose()` leaves checked-out connections to a pool that nobody looks after any more, and lets the engine connect again later. A
retired pool finishes instead: leases go on, and each connection is closed when it comes back.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import TimeoutError
from sqlalchemy.pool import AsyncAdaptedQueuePool, PoolProxiedConnection, QueuePool
from sqlalchemy.util import await_only as await_in_greenlet
from sqlalchemy.util import greenlet_spawn

from tenantdb.errors import BudgetExhausted

if TYPE_CHECKING:
    from sqlalchemy.pool import ConnectionPoolEntry

    _Mixin = QueuePool
else:
    _Mixin = object

__all__ = ["AsyncTenantPool", "TenantPool", "await_in_greenlet"]


class _Retirable(_Mixin):
    tenant_slug = ""  # for the error, set by the cache of engines
    retired = False

    def connect(self) -> PoolProxiedConnection:
        started = time.monotonic()
        try:
            return super().connect()
        except TimeoutError as error:
            raise BudgetExhausted(self.tenant_slug, time.monotonic() - started, self.size()) from error

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        super()._do_return_conn(record)
        if self.retired:
            self.dispose()  # closes what is idle, the connection just returned included


class TenantPool(_Retirable, QueuePool):
    """For threads."""

    def retire(self) -> None:
        """Close what is idle now and what is leased when it comes back. From any thread."""
        self.retired = True
        self.dispose()


class AsyncTenantPool(_Retirable, AsyncAdaptedQueuePool):
    """For one event loop."""

    def retire(self) -> asyncio.Task[Any]:
        """The same, from a coroutine of the pool's loop; the task closes what is idle."""
        self.retired = True
        return asyncio.get_running_loop().create_task(greenlet_spawn(self.dispose))

    def abandon(self) -> None:
        """The pool's loop is gone, so nothing can be awaited: drop the sockets."""
        self.retired = True
        while self.checkedin():
            driver: Any = self._pool.get(block=False).driver_connection
            if driver is None:  # invalidated: there is nothing left to close
                continue
            finish = getattr(getattr(driver, "pgconn", None), "finish", None) or driver.stop
            finish()
