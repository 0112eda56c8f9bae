"""PostgreSQL 15 to 18 through psycopg 3: two roles and one database per tenant."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql
from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool, Pool

from tenantdb.backends.base import Location, ServerReport
from tenantdb.backends.postgresql.connect import (
    connect_problem,
    has_news,
    password_argument,
    provisioner_connection,
    session_options,
    transport,
    without_frames,
)
from tenantdb.backends.postgresql.inspect import server_report
from tenantdb.backends.postgresql.workshop import PostgreSQLWorkshop
from tenantdb.errors import RegistryUnavailable, ServerUnavailable, WrongDatabase
from tenantdb.model import DatabaseRole, Server, Tenant
from tenantdb.settings import POSTGRESQL, ConnectionURL, Settings

_IDENTITY = "SELECT current_database(), tenant_id FROM tenantdb.identity"


class PostgreSQL:
    """The backend for production."""

    name = POSTGRESQL

    def engine(self, location: Location, settings: Settings, *, poolclass: type[Pool], **pool_options: Any) -> Engine:
        engine = create_engine(_url(location), **_arguments(location, settings), poolclass=poolclass, **pool_options)
        self._prepare(engine, location)
        return engine

    def async_engine(self, location: Location, settings: Settings, *, poolclass: type[Pool], **pool_options: Any) -> AsyncEngine:
        engine = create_async_engine(_url(location), **_arguments(location, settings), poolclass=poolclass, **pool_options)
        self._prepare(engine.sync_engine, location)
        return engine

    def registry_engine(self, url: ConnectionURL, settings: Settings) -> Engine:
        engine = create_engine(
            URL.create("postgresql+psycopg", url.username, None, url.host, url.port, url.database),
            connect_args=transport(url.host, settings, url.tls) | session_options(None, settings),
            use_native_hstore=False,
            hide_parameters=True,
            pool_size=settings.pool_size,
            max_overflow=0,
            pool_timeout=settings.acquire_timeout,
            pool_pre_ping=True,
        )

        @event.listens_for(engine, "do_connect")
        def connect(dialect: Any, record: Any, cargs: Any, cparams: dict[str, Any]) -> Any:
            try:
                return dialect.connect(*cargs, **cparams, **password_argument(url))
            except psycopg.OperationalError as error:
                raise RegistryUnavailable(connect_problem(error)) from without_frames(error)

        return engine

    def prepare_registry(self, url: ConnectionURL) -> None:
        """Nothing to do: the registry's database is the application's to make."""

    @contextmanager
    def workshop(self, server: Server, url: ConnectionURL, settings: Settings) -> Iterator[PostgreSQLWorkshop]:
        with provisioner_connection(url, settings, server.name) as connection:
            yield PostgreSQLWorkshop(connection, server, url, settings)

    @contextmanager
    def scratch_engine(self, server: Server, url: ConnectionURL, settings: Settings) -> Iterator[Engine]:
        with provisioner_connection(url, settings, server.name) as connection:
            database = f"t_{secrets.token_hex(8)}"
            name = sql.Identifier(database)
            connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(name))
            try:
                connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(name))
                engine = create_engine(
                    "postgresql+psycopg://",
                    creator=lambda: provisioner_connection(url, settings, server.name, database=database, autocommit=False),
                    poolclass=NullPool,
                    use_native_hstore=False,
                )
                with engine.begin() as inside:
                    for extension in server.extensions:
                        inside.exec_driver_sql(f"CREATE EXTENSION IF NOT EXISTS {sql.Identifier(extension).as_string(None)} CASCADE")
                    for schema in server.schemas:
                        inside.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {sql.Identifier(schema).as_string(None)}")
                yield engine
                engine.dispose()
            finally:
                connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))

    def check_server(self, server: Server, url: ConnectionURL, settings: Settings) -> ServerReport:
        with provisioner_connection(url, settings, server.name) as connection:
            return server_report(connection, settings)

    def _prepare(self, engine: Engine, location: Location) -> None:
        tenant, server = location.tenant, location.server

        @event.listens_for(engine, "do_connect")
        def connect(dialect: Any, record: Any, cargs: Any, cparams: dict[str, Any]) -> Any:
            try:
                return dialect.connect(*cargs, **cparams, password=location.password())
            except psycopg.OperationalError as error:
                raise ServerUnavailable(server.name, connect_problem(error)) from without_frames(error)

        @event.listens_for(engine, "checkout")
        def look(dbapi_connection: Any, record: Any, proxy: Any) -> None:
            """A socket that has something to read while idle means that the server said something: most often goodbye."""
            if has_news(_driver(dbapi_connection)):
                raise DisconnectionError("the server closed or addressed an idle connection")

        @event.listens_for(engine, "connect")
        def check(dbapi_connection: Any, record: Any) -> None:
            try:
                _check_identity(dbapi_connection, tenant, engine.url.username or "")
            except BaseException:
                dbapi_connection.close()
                raise


def _url(location: Location) -> URL:
    tenant = location.tenant
    role = tenant.owner_role if location.role is DatabaseRole.OWNER else tenant.runtime_role
    return URL.create("postgresql+psycopg", role, None, location.host, location.port, tenant.database)


def _arguments(location: Location, settings: Settings) -> dict[str, Any]:
    return {
        "connect_args": transport(location.host, settings) | session_options(location.role, settings),
        "use_native_hstore": False,
        "hide_parameters": True,
    }


def _driver(connection: Any) -> Any:
    """psycopg's own connection under the asyncio adapter, if there is one."""
    return getattr(connection, "driver_connection", connection)


def _check_identity(connection: Any, tenant: Tenant, role: str) -> None:
    """Once per physical connection, before any statement of the application. Raises: `WrongDatabase`."""
    info = _driver(connection).info
    if info.parameter_status("is_superuser") != "off":
        raise WrongDatabase(tenant.slug, "the login is a superuser")
    if info.parameter_status("session_authorization") != role:
        raise WrongDatabase(tenant.slug, "the session runs as another role")
    connection.autocommit = True  # one round trip instead of three, and no transaction left open
    try:
        cursor = connection.cursor()
        try:
            cursor.execute(_IDENTITY)
            rows = cursor.fetchall()
        except psycopg.Error as error:
            raise WrongDatabase(tenant.slug, "the database carries no identity stamp that this role can read") from error
        finally:
            cursor.close()
    finally:
        if not connection.closed:
            connection.autocommit = False
    if [(name, str(found)) for name, found in rows] != [(tenant.database, str(tenant.id))]:
        raise WrongDatabase(tenant.slug, "its identity stamp names another tenant")
