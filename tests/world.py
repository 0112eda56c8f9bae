"""Whole installations for tests: registry, logins, provisioner, key; on real PostgreSQL from the wheel and on SQLite.

A world stands for a machine. `World.make_db` founds an application on it, with a registry of its own; `World.twin` is a second process of
that application. A world can also do what no application can: edit rows behind tenantdb's back, count what is open, make the registry fail.
"""

from __future__ import annotations

import os
import secrets
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from sqlalchemy import URL, Connection, create_engine, make_url
from sqlalchemy.pool import NullPool

from tenantdb import Settings, Tenant, TenantDB
from tenantdb.backends.postgresql.bootstrap import bootstrap
from tenantdb.backends.sqlite import database_path
from tenantdb.registry.secrets import generate_key
from tenantdb.settings import ConnectionURL
from tenantdb.testing.postgres import EmbeddedServer

_made_lately: list[TenantDB] = []


@contextmanager
def closed_with_the_test() -> Iterator[None]:
    """Close whatever application is made in the block, and forget it. Thousands that are kept until the end take gigabytes, and the garbage
    collector looks at all of them. One that belongs to more than this test can be used again."""
    _made_lately.clear()
    yield
    while _made_lately:
        _made_lately.pop().close()


class World(ABC):
    """Where tests make their applications."""

    backend: str

    def __init__(self) -> None:
        self._made: weakref.WeakSet[TenantDB] = weakref.WeakSet()
        self._given: weakref.WeakKeyDictionary[TenantDB, dict[str, Any]] = weakref.WeakKeyDictionary()

    def make_db(self, *, init: bool = True, **overrides: Any) -> TenantDB:
        """An application with a fresh registry. It is closed with the test that it was made in (`closed_with_the_test`), with the world, or
        earlier by whoever asked for it."""
        given = {**self._new_registry(), **overrides}
        db = self._noted(TenantDB(**given))
        self._given[db] = given
        if init:
            db.init()
        return db

    def twin(self, db: TenantDB, **overrides: Any) -> TenantDB:
        """Another process of the same application: the same registry, nothing shared in memory."""
        given = {name: value for name, value in dict(db.settings).items() if name in db.settings.model_fields_set}
        return self._noted(TenantDB(Settings(**{**given, **overrides}), session_class=db.session_class))

    def given(self, db: TenantDB) -> dict[str, Any]:
        """What one from `make_db` was made of, passwords included, for a process that is really another."""
        return dict(self._given[db])

    def close(self) -> None:
        for db in list(self._made):
            db.close()

    def _noted(self, db: TenantDB) -> TenantDB:
        self._made.add(db)
        _made_lately.append(db)
        return db

    @abstractmethod
    def _new_registry(self) -> dict[str, Any]:
        """A registry database that nobody uses, as the arguments of a `TenantDB`."""

    @abstractmethod
    def registry(self, db: TenantDB) -> AbstractContextManager[Connection]:
        """``with`` a Core connection on the registry's database that may do everything; committed at the end."""

    @abstractmethod
    def inside(self, tenant: Tenant, db: TenantDB) -> AbstractContextManager[Connection]:
        """``with`` a Core connection on the tenant's database that may do everything; committed at the end."""

    @abstractmethod
    def open_connections(self, db: TenantDB, tenants: Sequence[Tenant]) -> int:
        """How many connections to these tenants' databases are open, whoever holds them; on SQLite how many files are."""

    @abstractmethod
    def outage(self, db: TenantDB) -> AbstractContextManager[None]:
        """``with`` the registry out of reach. No connection to it may be open."""


class PostgreSQLWorld(World):
    """One server, prepared by `bootstrap`; each application has a registry database with an ``app`` and an ``admin`` login."""

    backend = "postgresql"
    provisioner = "prov"

    def __init__(self, server: EmbeddedServer) -> None:
        super().__init__()
        self.server = server
        self.key = generate_key()
        self.passwords = {name: secrets.token_urlsafe(16) for name in ("app", "admin", self.provisioner)}
        self.superuser = psycopg.connect(self.superuser_url, autocommit=True)
        for name in ("app", "admin"):
            self._run("CREATE ROLE {} LOGIN PASSWORD {}", sql.Identifier(name), sql.Literal(self.passwords[name]))
        settings = Settings(url=self.superuser_url, secret_keys=[self.key])
        bootstrap(ConnectionURL.parse(self.superuser_url), self.provisioner, self.passwords[self.provisioner], settings)

    @property
    def superuser_url(self) -> str:
        return self.server.url()

    def url(self, login: str, database: str = "postgres") -> str:
        """A URL for ``app``, ``admin`` or ``prov``, with the password."""
        return self.server.url(login, self.passwords[login], database)

    def close(self) -> None:
        super().close()
        self.superuser.close()

    def _new_registry(self) -> dict[str, Any]:
        database = f"central_{secrets.token_hex(4)}"
        name = sql.Identifier(database)
        self._run("CREATE DATABASE {} OWNER admin", name)
        self._run("REVOKE ALL ON DATABASE {} FROM PUBLIC", name)
        self._run("GRANT CONNECT ON DATABASE {} TO app", name)
        return {
            "url": self.url("app", database),
            "registry_admin": self.url("admin", database),
            "server": self.url(self.provisioner),
            "secret_keys": [self.key],
        }

    @contextmanager
    def connect(self, database: str) -> Iterator[Connection]:
        """As the superuser, in one transaction."""
        url = make_url(self.superuser_url).set(drivername="postgresql+psycopg", database=database)
        with _connect(url) as connection:
            yield connection

    def registry(self, db: TenantDB) -> AbstractContextManager[Connection]:
        return self.connect(db.settings.url.database or "")

    def inside(self, tenant: Tenant, db: TenantDB) -> AbstractContextManager[Connection]:
        return self.connect(tenant.database or "")

    def open_connections(self, db: TenantDB, tenants: Sequence[Tenant]) -> int:
        row = self.superuser.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = ANY(%s) AND backend_type = 'client backend'",
            [[tenant.database for tenant in tenants]],
        ).fetchone()
        return int(row[0]) if row else 0

    @contextmanager
    def outage(self, db: TenantDB) -> Iterator[None]:
        name = sql.Identifier(db.settings.url.database or "")
        self._run("ALTER DATABASE {} ALLOW_CONNECTIONS false", name)
        try:
            yield
        finally:
            self._run("ALTER DATABASE {} ALLOW_CONNECTIONS true", name)

    def terminate(self, tenant: Tenant) -> int:
        """End every session in the tenant's database, wait until they are gone, and return how many there were."""
        ended = self.superuser.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s", [tenant.database]
        ).fetchall()
        assert all(gone for (gone,) in ended)
        return len(ended)

    def _run(self, statement: str, *parts: sql.Composable) -> None:
        self.superuser.execute(sql.SQL(statement).format(*parts))


class SQLiteWorld(World):
    """A folder; each application has a folder of its own in it."""

    backend = "sqlite"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def _new_registry(self) -> dict[str, Any]:
        return {"url": f"sqlite:///{self._folder / secrets.token_hex(4) / 'central.sqlite3'}"}

    def registry(self, db: TenantDB) -> AbstractContextManager[Connection]:
        return _connect(URL.create("sqlite", database=db.settings.url.path))

    def path(self, tenant: Tenant, db: TenantDB) -> Path:
        """The tenant's file."""
        return database_path(db.servers.get("default"), tenant)

    def inside(self, tenant: Tenant, db: TenantDB) -> AbstractContextManager[Connection]:
        return _connect(URL.create("sqlite", database=str(self.path(tenant, db))))

    def open_connections(self, db: TenantDB, tenants: Sequence[Tenant]) -> int:
        """Files with at least one connection: the write-ahead log lies beside a file exactly as long as one is open."""
        return sum(os.path.exists(f"{self.path(tenant, db)}-wal") for tenant in tenants)

    @contextmanager
    def outage(self, db: TenantDB) -> Iterator[None]:
        path = Path(db.settings.url.path or "")
        aside = path.with_suffix(".aside")
        path.rename(aside)
        path.mkdir()  # a folder in its place can be opened by nobody
        try:
            yield
        finally:
            path.rmdir()
            aside.rename(path)


@contextmanager
def _connect(url: URL) -> Iterator[Connection]:
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        yield connection


@contextmanager
def pg_world(**settings: str) -> Iterator[PostgreSQLWorld]:
    """A server from the wheel, ready for `World.make_db`; stopped at the end. ``settings`` as in postgresql.conf."""
    with EmbeddedServer(fsync=False, settings=settings) as server:
        world = PostgreSQLWorld(server)
        try:
            yield world
        finally:
            world.close()


@contextmanager
def sqlite_world(folder: Path) -> Iterator[SQLiteWorld]:
    """The same in a folder."""
    world = SQLiteWorld(folder)
    try:
        yield world
    finally:
        world.close()


def eventually(condition: Callable[[], bool], *, within: float = 10.0) -> None:
    """Wait until something holds that another process or thread brings about, and fail when it does not come to hold."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it did not come to hold in time"
        time.sleep(0.01)
