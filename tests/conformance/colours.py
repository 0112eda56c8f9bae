"""Both colours behind one face, so that a scenario is written once.

Scenarios are coroutines. In the blocking colour the names of `TenantDB` are called and do not wait for the event loop; in asyncio those of
`AsyncTenantDB` are awaited. Nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from tenantdb import AsyncTenantDB, TenantDB
from tests.conformance.app import MARKER

COLOURS = ("sync", "async")
WAYS = ("session", "begin", "connect", "engine")
"""Every way to a tenant's rows."""
COLLECTIONS = ("tenants", "servers", "users", "memberships", "refresh_tokens", "audit", "spares")


class Awaited:
    """A blocking object whose methods are awaited and whose ``with`` is ``async with``."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._target, name)
        if name in COLLECTIONS:
            return Awaited(member)
        if not callable(member):
            return member

        async def call(*args: Any, **kwargs: Any) -> Any:
            return member(*args, **kwargs)

        return call

    async def __aenter__(self) -> Any:
        entered = self._target.__enter__()
        return Awaited(entered) if isinstance(entered, (Session, Connection)) else entered

    async def __aexit__(self, *exc: Any) -> Any:
        return self._target.__exit__(*exc)


class Face:
    """A `TenantDB` in one colour. ``do`` has its verbs and collections, awaited."""

    def __init__(self, db: TenantDB, colour: str) -> None:
        self.db = db
        self.colour = colour
        self.adb = AsyncTenantDB(db) if colour == "async" else None
        self.do: Any = self.adb or Awaited(db)

    def session(self, *tenant: Any, **options: Any) -> Any:
        return self.adb.session(*tenant, **options) if self.adb else Awaited(self.db.session(*tenant, **options))

    def begin(self, *tenant: Any) -> AbstractAsyncContextManager[Any]:
        return self.adb.begin(*tenant) if self.adb else Awaited(self.db.begin(*tenant))

    def connect(self, *tenant: Any) -> AbstractAsyncContextManager[Any]:
        return self.adb.connect(*tenant) if self.adb else Awaited(self.db.connect(*tenant))

    def bound(self, tenant: Any, *, switch: bool = False) -> AbstractAsyncContextManager[Any]:
        """``tenant_context`` as the context manager of this colour."""
        context = self.db.tenant_context(tenant, switch=switch)
        return context if self.adb else Awaited(context)

    async def read(self, way: str, *tenant: Any) -> Any:
        """The marker, by one of the `WAYS`; the tenant is left out where none is given."""
        if way == "engine":
            source = (await self.adb.engine(*tenant)).connect() if self.adb else Awaited(self.db.engine(*tenant).connect())
        else:
            source = getattr(self, way)(*tenant)
        async with source as open_source:
            return await open_source.scalar(MARKER)

    async def marker(self, *tenant: Any) -> Any:
        return await self.read("session", *tenant)

    async def write(self, statement: Any, *tenant: Any) -> None:
        async with self.begin(*tenant) as session:
            await session.execute(statement)

    async def rows(self, query: Any, *tenant: Any) -> list[Any]:
        async with self.session(*tenant) as session:
            return list((await session.scalars(query)).all())

    async def close(self) -> None:
        if self.adb:
            await self.adb.close()
        self.db.close()


class Clock:
    """What the records cache of a process goes by, moved by hand."""

    def __init__(self, db: TenantDB, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(db._registry._cache, "_clock", lambda: self.now)


MakeFace = Callable[..., Face]
MakeProcess = Callable[..., TenantDB]
