"""`AsyncTenantDB`: the same `TenantDB` for asyncio.

The data path is native: a session waits for its connection and its rows in the event loop. Management is written once, blocking, and runs
here in a few worker threads of our own. A cancelled ``await adb.provision(...)`` does not stop the thread: the operation carries on in
the journal.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from tenantdb.connections.records import AuditTrail
from tenantdb.connections.session import Pin, check_session_options
from tenantdb.connections.threads import Threads
from tenantdb.connections.waiting import await_in_greenlet
from tenantdb.context import TenantContext
from tenantdb.database import TenantDB, TenantKey
from tenantdb.errors import NotATenantsSession
from tenantdb.model import Tenant
from tenantdb.resolvers import tenant_key

P = ParamSpec("P")
R = TypeVar("R")

_THREADS = 8


class AsyncTenantDB:
    """A view of a `TenantDB` (`sync_db`): same registry, same settings, same names, awaited.

    ``tenants``, ``servers``, ``users``, ``memberships``, ``refresh_tokens``, ``domains``, ``revocations``, ``spares`` and ``audit`` have
    the methods of the synchronous ones, awaited, in a worker thread; ``audit.record`` alone runs in the event loop, in the session that
    it is given.
    """

    def __init__(self, db: TenantDB, *, session_class: type[AsyncSession] = AsyncSession) -> None:
        self.sync_db = db
        self.session_class = session_class
        self._manage = Threads(_THREADS, "tenantdb-manage")
        self._work = Threads(_THREADS, "tenantdb-work")  # apart: a crowd of sign-ups must not keep anybody from signing in
        self.tenants = _Awaited(db.tenants, self._manage.run)
        self.servers = _Awaited(db.servers, self._manage.run)
        self.users = _Awaited(db.users, self._manage.run)
        self.memberships = _Awaited(db.memberships, self._manage.run)
        self.refresh_tokens = _Awaited(db.refresh_tokens, self._manage.run)
        self.domains = _Awaited(db.domains, self._manage.run)
        self.revocations = _Awaited(db.revocations, self._manage.run)
        self.audit = _AwaitedTrail(db.audit, self._manage.run)
        self.provision = _awaited(db.provision, self._work)
        self.suspend = _awaited(db.suspend, self._work)
        self.activate = _awaited(db.activate, self._work)
        self.maintenance = _awaited(db.maintenance, self._work)
        self.delete = _awaited(db.delete, self._work)
        self.restore = _awaited(db.restore, self._work)
        self.purge = _awaited(db.purge, self._work)
        self.adopt = _awaited(db.adopt, self._work)
        self.give_back = _awaited(db.give_back, self._work)
        self.hold = _awaited(db.hold, self._manage)
        self.release = _awaited(db.release, self._manage)
        self.rotate_credentials = _awaited(db.rotate_credentials, self._work)
        self.export = _awaited(db.export, self._work)
        self.import_ = _awaited(db.import_, self._work)
        self.clone = _awaited(db.clone, self._work)
        self.export_rows = _awaited(db.export_rows, self._work)
        self.update = _awaited(db.update, self._manage)
        self.work = _awaited(db.work, self._work)
        self.resume = _awaited(db.resume, self._work)
        self.operation = _awaited(db.operation, self._manage)
        self.for_each = _awaited(db.for_each, self._work)
        self.init = _awaited(db.init, self._work)
        self.check = _awaited(db.check, self._work)
        self.doctor = _awaited(db.doctor, self._work)
        self.rotate_keys = _awaited(db.rotate_keys, self._work)
        self.keys_in_use = _awaited(db.keys_in_use, self._work)

    @functools.cached_property
    def spares(self) -> Any:
        """See `TenantDB.spares`; its methods are awaited."""
        return _Awaited(self.sync_db.spares, self._work.run)

    @functools.cached_property
    def migrations(self) -> Any:
        """See `TenantDB.migrations`; its methods are awaited. Alembic's ``env.py`` uses `sync_db`."""
        return _Awaited(self.sync_db.migrations, self._work.run)

    def __repr__(self) -> str:
        return f"Async{self.sync_db!r}"

    # -- data --------------------------------------------------------------------------------------------------------------------------

    def session(self, tenant: TenantKey | None = None, **options: Any) -> AsyncSession:
        """See `TenantDB.session`."""
        return self._session(tenant, None, options)

    def _session(self, tenant: TenantKey | None, execution_options: dict[str, Any] | None, options: dict[str, Any]) -> AsyncSession:
        db = self.sync_db
        pin = Pin(db._pin_key(tenant), self._lookup_engine, execution_options, is_async=True)
        options = {**db.session_options, **check_session_options(options)}
        return self.session_class(sync_session_class=db._pinned, pin=pin, **options)

    @asynccontextmanager
    async def begin(self, tenant: TenantKey | None = None, **options: Any) -> AsyncIterator[AsyncSession]:
        """See `TenantDB.begin`."""
        async with self._session(tenant, {"tenantdb_begin": "IMMEDIATE"}, options) as session, session.begin():
            yield session

    @asynccontextmanager
    async def connect(self, tenant: TenantKey | None = None) -> AsyncIterator[AsyncConnection]:
        """See `TenantDB.connect`."""
        engine = await self.engine(tenant)
        async with engine.connect() as connection:
            yield connection

    async def engine(self, tenant: TenantKey | None = None) -> AsyncEngine:
        """The running event loop's engine of the tenant as it is now; see `TenantDB.engine`."""
        key = self.sync_db._pin_key(tenant)
        return self.sync_db._engines.async_engine_of(await self.sync_db._lookups.arecord(key), key)

    def tenant_context(self, tenant: TenantKey, *, switch: bool = False) -> TenantContext:
        """See `TenantDB.tenant_context`; ``async with`` looks the tenant up without blocking the event loop."""
        return self.sync_db.tenant_context(tenant, switch=switch)

    async def resolve(self, tenant: TenantKey) -> Tenant:
        """See `TenantDB.resolve`."""
        return await self.sync_db._lookups.aservable(tenant_key(tenant))

    def _lookup_engine(self, key: str | UUID) -> tuple[UUID, Engine]:
        """Called by a session inside SQLAlchemy's greenlet, where a coroutine can be awaited from plain code."""
        db = self.sync_db
        record = db._registry.peek(key) or await_in_greenlet(db._lookups.arecord(key))
        return record.tenant.id, db._engines.loop_engine_of(record, key)

    # -- the installation --------------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def lifespan(self, app: Any = None) -> AsyncIterator[None]:
        """An ASGI lifespan: refuses to start without a usable registry, watches it (`TenantDB.watch`), and closes at the end.
        ``FastAPI(lifespan=adb.lifespan)``."""
        await self._manage.run(self.sync_db.ping)
        await self._manage.run(self.sync_db._compare_at_start)
        self.sync_db.watch()
        try:
            yield
        finally:
            await self.close()

    async def close(self) -> None:
        """Close this event loop's connections, then the `TenantDB`. May be called twice."""
        self.sync_db._engines.close_loop()
        await self._manage.run(self.sync_db.close)
        self._manage.close()
        self._work.close()


def _awaited(fn: Callable[P, R], threads: Threads) -> Callable[P, Coroutine[Any, Any, R]]:
    @functools.wraps(fn)
    async def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return await threads.run(fn, *args, **kwargs)

    return call


class _Awaited:
    """A collection whose methods run in a worker thread."""

    def __init__(self, collection: object, run: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        self._collection = collection
        self._run = run

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        method = getattr(self._collection, name)
        if not inspect.ismethod(method):
            raise AttributeError(name)
        return functools.partial(self._run, method)


class _AwaitedTrail(_Awaited):
    """``db.audit``, whose `record` is part of a session's transaction and so stays in the session's event loop."""

    def __init__(self, trail: AuditTrail, run: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        super().__init__(trail, run)
        self._trail = trail

    async def record(self, session: AsyncSession, action: str, object: object | None = None, **said: Any) -> None:
        """See `AuditTrail.record`."""
        if not isinstance(session, AsyncSession):
            raise NotATenantsSession(type(session).__name__)
        await session.run_sync(self._trail.record, action, object, **said)
