"""PostgreSQL 15 to 18 through psycopg 3: two roles and one database per tenant."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql
from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

from tenantdb.backends.base import ConnectFailed, Location, SchemaLine, ServerReport
from tenantdb.backends.hangup import await_hangup, is_readable, wait_for_hangup
from tenantdb.backends.postgresql import wire
from tenantdb.backends.postgresql.connect import (
    check_login,
    connect_failure,
    connect_problem,
    is_refused_password,
    password_argument,
    provisioner_connection,
    session_options,
    transport,
    without_frames,
)
from tenantdb.backends.postgresql.inspect import server_report
from tenantdb.backends.postgresql.listening import PostgreSQLEar
from tenantdb.backends.postgresql.workshop import PostgreSQLWorkshop
from tenantdb.errors import RegistryUnavailable, WrongDatabase
from tenantdb.model import DatabaseRole, Server, Tenant
from tenantdb.settings import POSTGRESQL, ConnectionURL, Settings

if TYPE_CHECKING:
    from tenantdb.backends.protocols import Carrier, Doctor, Rows, Wire

_READ_ONLY = "25006"  # read_only_sql_transaction
_IDENTITY = b"SELECT current_database(), tenant_id FROM tenantdb.identity"


class PostgreSQL:
    """The backend for production."""

    name = POSTGRESQL

    def template(self, settings: Settings, *, is_async: bool) -> Engine:
        return wire.template_engine(_never_called, is_async=is_async, pool_reset_on_return=None)

    def url(self, location: Location) -> URL:
        return URL.create("postgresql+psycopg", _login(location), None, location.host, location.port, location.tenant.database)

    def open(self, dialect: Dialect, location: Location, settings: Settings, *, timeout: float) -> Any:
        arguments = transport(location.host, settings) | session_options(location.role, settings, read_only=location.read_only)
        if location.role is DatabaseRole.OWNER:
            arguments["cursor_factory"] = psycopg.Cursor  # a migration may send several statements at once
        arguments["connect_timeout"] = max(2, min(settings.connect_timeout, math.ceil(timeout)))  # 2 is the smallest that libpq knows
        tenant, login = location.tenant, _login(location)
        connection = _connect(dialect, location, settings, {"user": login, "dbname": tenant.database, **arguments})
        try:
            _check_identity(dialect, connection, tenant, login, arguments["connect_timeout"])
        except BaseException as error:
            descriptor = self.wire(dialect, connection).finish()
            if descriptor is not None and dialect.is_async:
                await_only(await_hangup(descriptor, _GOODBYE))
            elif descriptor is not None:
                wait_for_hangup(descriptor, _GOODBYE)
            if isinstance(error, psycopg.OperationalError):
                raise ConnectFailed(connect_failure(error), connect_problem(error)) from error
            raise
        return connection

    def wire(self, dialect: Dialect, connection: Any) -> Wire:
        found: Wire = dialect.get_driver_connection(connection)
        return found

    def refuses_writing(self, error: BaseException) -> bool:
        return getattr(error, "sqlstate", None) == _READ_ONLY

    def registry_engine(self, url: ConnectionURL, settings: Settings) -> Engine:
        engine = create_engine(
            URL.create("postgresql+psycopg", url.username, None, url.host, url.port, url.database),
            connect_args=transport(url.host, settings, url.tls) | session_options(None, settings),
            use_native_hstore=False,
            hide_parameters=True,
            pool_size=settings.registry_pool_size,
            max_overflow=0,
            pool_timeout=settings.budget.acquire_timeout,
        )

        @event.listens_for(engine, "do_connect")
        def connect(dialect: Any, record: Any, cargs: Any, cparams: dict[str, Any]) -> Any:
            try:
                return dialect.connect(*cargs, **cparams, **password_argument(url))
            except psycopg.OperationalError as error:
                raise RegistryUnavailable(connect_problem(error)) from without_frames(error)

        @event.listens_for(engine, "checkout")
        def look(connection: Any, record: Any, proxy: Any) -> None:
            """A server that has hung up says so: the socket is readable then. Asking it would cost a round trip per transaction."""
            if connection.closed or is_readable(connection.pgconn.socket, 0):
                raise DisconnectionError

        return engine

    def listen(self, url: ConnectionURL, settings: Settings, channel: str) -> PostgreSQLEar:
        return PostgreSQLEar(url, settings, channel)

    def prepare_registry(self, url: ConnectionURL) -> None:
        """Nothing to do: the registry's database is the application's to make."""

    @contextmanager
    def workshop(self, server: Server, url: ConnectionURL, settings: Settings) -> Iterator[PostgreSQLWorkshop]:
        workshop = PostgreSQLWorkshop(provisioner_connection(url, settings, server.name), server, url, settings)
        try:
            yield workshop
        finally:
            workshop.close()

    @contextmanager
    def scratch_engine(self, server: Server, url: ConnectionURL, settings: Settings) -> Iterator[Engine]:
        with provisioner_connection(url, settings, server.name) as connection:
            database = f"t_{secrets.token_hex(8)}"
            name = sql.Identifier(database)
            connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0 ALLOW_CONNECTIONS false").format(name))
            try:
                connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(name))
                connection.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(name))
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

    def doctor(self, server: Server, url: ConnectionURL, settings: Settings) -> Doctor:
        from tenantdb.backends.postgresql.doctor import PostgreSQLDoctor

        return PostgreSQLDoctor(server, url, settings)

    def carrier(self, location: Location, settings: Settings) -> Carrier:
        from tenantdb.backends.postgresql.carrier import PostgreSQLCarrier

        return PostgreSQLCarrier(location, settings)

    def keep_copy(self, location: Location) -> None:
        """Nothing to do: a server has backups of its own."""

    async def send_script(self, location: Location, settings: Settings, script: str) -> list[tuple[Any, ...]]:
        from tenantdb.backends.postgresql.script import send_script

        return await send_script(location, settings, script)

    def rows(self, connection: Connection, schemas: Sequence[str]) -> Rows:
        from tenantdb.backends.postgresql.rows import PostgreSQLRows

        return PostgreSQLRows(connection, schemas)

    def schema_lines(self, connection: Connection, tenant: Tenant | None = None) -> list[SchemaLine]:
        from tenantdb.backends.postgresql.fingerprint import schema_lines

        return schema_lines(connection, tenant)


_GOODBYE = 0.5  # seconds to wait for a server to let go of a connection that failed its check


def _never_called() -> Any:
    raise NotImplementedError("a template connects nowhere")


def _connect(dialect: Dialect, location: Location, settings: Settings, arguments: dict[str, Any]) -> Any:
    """Log in; where the password is refused, once more with the other one, if the role's password is being changed.

    Raises: `ConnectFailed`.
    """
    password = location.password  # called in the call itself: tools that report errors show the variables of every frame
    while True:
        try:
            return wire.connect(
                dialect,
                discard_temp=settings.temporary_tables,
                host=location.host,
                port=location.port,
                password=password(),
                **arguments,
            )
        except psycopg.OperationalError as error:
            refused = password is location.password and is_refused_password(error)
            if refused and (other := _other_password(dialect, location)) is not None:
                password = other
                continue
            raise ConnectFailed(connect_failure(error), connect_problem(error)) from without_frames(error)


def _other_password(dialect: Dialect, location: Location) -> Callable[[], str] | None:
    """Reads the registry: in a thread where there is an event loop."""
    if dialect.is_async:
        found: Callable[[], str] | None = await_only(asyncio.to_thread(location.other_password))
        return found
    return location.other_password()


def _login(location: Location) -> str:
    role = location.tenant.owner_role if location.role is DatabaseRole.OWNER else location.tenant.runtime_role
    return role or ""


def _check_identity(dialect: Dialect, connection: Any, tenant: Tenant, role: str, timeout: float) -> None:
    """Once per physical connection, before any statement of the application. Raises: `WrongDatabase`."""
    driver = dialect.get_driver_connection(connection)
    check_login(driver.info, tenant, role)
    try:
        asked = driver.ask(_IDENTITY, timeout)
        rows = await_only(asked) if dialect.is_async else asked
    except psycopg.ProgrammingError as error:
        raise WrongDatabase(tenant.slug, "the database carries no identity stamp that this role can read") from error
    if rows != [(tenant.database, str(tenant.id))]:
        raise WrongDatabase(tenant.slug, "its identity stamp names another tenant")
