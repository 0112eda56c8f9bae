"""The provisioner's work on one PostgreSQL server, for a login that may create databases and roles and is not a superuser.

Order and rights follow from the server's rules. The provisioner owns every database, so that no tenant's role can alter or drop it; the
owner role owns the schema ``public``, where migrations create tables; the runtime role gets rows through default privileges. A REVOKE by
somebody who is not the grantor "succeeds" with a warning and changes nothing, which is why such warnings are errors here (SQLSTATE 01006
and 01007) and why `verify` looks at the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql
from psycopg.errors import Diagnostic
from pydantic import SecretStr

from tenantdb.backends.base import FoundDatabase
from tenantdb.backends.postgresql import scram
from tenantdb.backends.postgresql.bootstrap import OWNER_CONNECTIONS, OWNER_GROUP, TEMPLATE
from tenantdb.backends.postgresql.connect import provisioner_connection
from tenantdb.backends.postgresql.inspect import database_findings
from tenantdb.errors import HardeningFailed
from tenantdb.model import Server, Tenant
from tenantdb.settings import ConnectionURL, Settings

OPAQUE_NAME = re.compile(r"t_[0-9a-f]{16}", re.ASCII)
_NO_EFFECT = frozenset({"01006", "01007"})  # privilege_not_revoked, privilege_not_granted
_INVALID = -2  # datconnlimit of a database whose DROP was interrupted
_LINGERING = 4  # backends whose client has gone and that the server still counts

Connection = psycopg.Connection[Any]


class PostgreSQLWorkshop:
    """A provisioner's open session; see `tenantdb.backends.base.Workshop`."""

    def __init__(self, connection: Connection, server: Server, url: ConnectionURL, settings: Settings) -> None:
        self._connection = connection
        self._server = server
        self._url = url
        self._settings = settings
        self._runtime_connections = settings.budget.per_tenant * settings.budget.share_of + _LINGERING

    # -- looking -----------------------------------------------------------------------------------------------------------------------

    def find_database(self, name: str) -> FoundDatabase | None:
        row = self._connection.execute("SELECT datconnlimit FROM pg_database WHERE datname = %s", [name]).fetchone()
        return None if row is None else FoundDatabase(name, invalid=row[0] == _INVALID)

    def find_roles(self, names: Sequence[str]) -> list[str]:
        rows = self._connection.execute("SELECT rolname FROM pg_roles WHERE rolname = ANY(%s)", [list(names)]).fetchall()
        return [row[0] for row in rows]

    def verify(self, tenant: Tenant) -> list[str]:
        with self._inside(tenant) as connection:
            return database_findings(connection, tenant, self._server, self._settings)

    # -- acting ------------------------------------------------------------------------------------------------------------------------

    def create_database(self, tenant: Tenant) -> None:
        # CREATE DATABASE leaves the default ACL, which lets PUBLIC in; so nobody may connect until open_database has replaced it.
        _run(
            self._connection,
            "CREATE DATABASE {} TEMPLATE {} ALLOW_CONNECTIONS false CONNECTION LIMIT {}",
            _name(tenant.database),
            sql.Identifier(TEMPLATE if self._settings.hardening == "full" else "template0"),
            sql.Literal(self._runtime_connections + OWNER_CONNECTIONS),
        )

    def drop_invalid_database(self, name: str) -> None:
        _run(self._connection, "DROP DATABASE {}", _name(name))

    def create_roles(self, tenant: Tenant, owner_password: SecretStr, runtime_password: SecretStr) -> None:
        for role, password, limit in (
            (tenant.owner_role, owner_password, OWNER_CONNECTIONS),
            (tenant.runtime_role, runtime_password, self._runtime_connections),
        ):
            verb = "ALTER" if self.find_roles([role or ""]) else "CREATE"
            _run(
                self._connection,
                f"{verb} ROLE {{}} LOGIN INHERIT NOCREATEDB NOCREATEROLE CONNECTION LIMIT {{}} PASSWORD {{}}",
                _name(role),
                sql.Literal(limit),
                sql.Literal(scram.verifier(password.get_secret_value())),
            )
        if self._settings.hardening == "full":
            _run(self._connection, "ALTER ROLE {} SET temp_file_limit = '1GB'", _name(tenant.runtime_role))
            # What migrations need and PUBLIC no longer has comes through this group. Before 16 a role's own INHERIT decides.
            options = sql.SQL(" WITH INHERIT TRUE, SET FALSE") if self._version >= 160000 else sql.SQL("")
            _run(self._connection, "GRANT {} TO {}{}", sql.Identifier(OWNER_GROUP), _name(tenant.owner_role), options)

    def open_database(self, tenant: Tenant) -> None:
        database, owner, runtime = _name(tenant.database), _name(tenant.owner_role), _name(tenant.runtime_role)
        with self._connection.transaction():
            _run(self._connection, "REVOKE ALL ON DATABASE {} FROM PUBLIC", database)
            _run(self._connection, "GRANT CONNECT ON DATABASE {} TO {}, {}", database, owner, runtime)
            if self._settings.temporary_tables:
                _run(self._connection, "GRANT TEMPORARY ON DATABASE {} TO {}", database, runtime)
            _run(self._connection, "ALTER DATABASE {} ALLOW_CONNECTIONS true", database)
        with self._inside(tenant) as connection, connection.transaction():
            self._stamp(connection, tenant)
            for extension in self._server.extensions:
                _run(connection, "CREATE EXTENSION IF NOT EXISTS {} CASCADE", sql.Identifier(extension))
            self._hand_over(connection, tenant)

    def _stamp(self, connection: Connection, tenant: Tenant) -> None:
        """The identity stamp, in a schema that no migration owns and no autogenerate sees."""
        owner, runtime = _name(tenant.owner_role), _name(tenant.runtime_role)
        _run(connection, "CREATE SCHEMA IF NOT EXISTS tenantdb")
        _run(connection, "CREATE TABLE IF NOT EXISTS tenantdb.identity (tenant_id uuid NOT NULL, stamped_at timestamptz NOT NULL)")
        connection.execute(
            "INSERT INTO tenantdb.identity SELECT %s, now() WHERE NOT EXISTS (SELECT 1 FROM tenantdb.identity)", [str(tenant.id)]
        )
        _run(connection, "REVOKE ALL ON SCHEMA tenantdb FROM PUBLIC")
        _run(connection, "GRANT USAGE ON SCHEMA tenantdb TO {}, {}", owner, runtime)
        _run(connection, "GRANT SELECT ON tenantdb.identity TO {}, {}", owner, runtime)

    def _hand_over(self, connection: Connection, tenant: Tenant) -> None:
        """Give the schemas to the owner role and, as that role, their future contents to the runtime role.

        The provisioner is a member of the owner role for these statements only: a REVOKE on a schema works only as its owner, and default
        privileges belong to the role that will create the tables.
        """
        owner, runtime = _name(tenant.owner_role), _name(tenant.runtime_role)
        membership = sql.SQL(" WITH INHERIT FALSE, SET TRUE") if self._version >= 160000 else sql.SQL("")
        _run(connection, "GRANT {} TO CURRENT_USER{}", owner, membership)
        schemas = [sql.Identifier("public")]
        _run(connection, "ALTER SCHEMA public OWNER TO {}", owner)
        for name in self._server.schemas:
            schema = sql.Identifier(name)
            _run(connection, "CREATE SCHEMA IF NOT EXISTS {} AUTHORIZATION {}", schema, owner)
            schemas.append(schema)
        _run(connection, "SET LOCAL ROLE {}", owner)
        for schema in schemas:
            _run(connection, "REVOKE ALL ON SCHEMA {} FROM PUBLIC", schema)
            _run(connection, "GRANT USAGE ON SCHEMA {} TO {}", schema, runtime)
            for privileges, kind in (
                ("SELECT, INSERT, UPDATE, DELETE", "TABLES"),
                ("USAGE, SELECT", "SEQUENCES"),
                ("EXECUTE", "FUNCTIONS"),
                ("USAGE", "TYPES"),
            ):
                _run(connection, f"ALTER DEFAULT PRIVILEGES IN SCHEMA {{}} GRANT {privileges} ON {kind} TO {{}}", schema, runtime)
        # Without IN SCHEMA: a default of PUBLIC can only be taken away for the whole database.
        _run(connection, "ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC")
        _run(connection, "ALTER DEFAULT PRIVILEGES REVOKE USAGE ON TYPES FROM PUBLIC")
        _run(connection, "RESET ROLE")
        _run(connection, "REVOKE {} FROM CURRENT_USER", owner)

    # -- plumbing ----------------------------------------------------------------------------------------------------------------------

    @property
    def _version(self) -> int:
        return self._connection.info.server_version

    @contextmanager
    def _inside(self, tenant: Tenant) -> Iterator[Connection]:
        with provisioner_connection(self._url, self._settings, self._server.name, database=tenant.database) as connection:
            yield connection


def _name(name: str | None) -> sql.Identifier:
    """A name drawn by us, looked at once more right before it goes into DDL."""
    if name is None or not OPAQUE_NAME.fullmatch(name):
        raise HardeningFailed(["the registry holds a database or role name that was not drawn by tenantdb; nothing was done with it"])
    return sql.Identifier(name)


def _run(connection: Connection, statement: str, *parts: sql.Composable) -> None:
    """Execute one statement of ours; one that the server only warns about has had no effect and is an error."""
    warnings: list[str] = []

    def listen(diagnostic: Diagnostic) -> None:
        if diagnostic.sqlstate in _NO_EFFECT:
            warnings.append(diagnostic.message_primary or "a privilege was not changed")

    connection.add_notice_handler(listen)
    try:
        connection.execute(sql.SQL(statement).format(*parts))
    finally:
        connection.remove_notice_handler(listen)
    if warnings:
        raise HardeningFailed(warnings)
