"""The provisioner's work on one PostgreSQL server, for a login that may create databases and roles and is not a superuser.

Order and rights follow from the server's rules. The provisioner owns every database, so that no tenant's role can alter or drop it; the
owner role owns the schema ``public``, where migrations create tables; the runtime role gets rows through default privileges. A REVOKE by
somebody who is not the grantor "succeeds" with a warning and changes nothing, which is why such warnings are errors here (SQLSTATE 01006
and 01007) and why `verify` looks at the result.

A workshop holds one connection at a time: to the provisioner's own database for what concerns the server, and to a tenant's for what can
only be done inside. Inside, ``search_path`` is ``pg_catalog`` alone, so that nothing that a tenant made is ever called.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql
from psycopg.errors import Diagnostic
from pydantic import SecretStr
from sqlalchemy import create_engine
from sqlalchemy.engine import Engine
from sqlalchemy.pool import NullPool

from tenantdb.backends.base import FenceLevel, FoundDatabase
from tenantdb.backends.postgresql import recordlog, scram
from tenantdb.backends.postgresql.bootstrap import OWNER_CONNECTIONS, OWNER_GROUP, TEMPLATE
from tenantdb.backends.postgresql.connect import provisioner_connection
from tenantdb.backends.postgresql.inspect import database_findings, template_findings
from tenantdb.errors import HardeningFailed, OperationInProgress, ServerUnavailable
from tenantdb.model import Server, Template, Tenant
from tenantdb.settings import ConnectionURL, Settings

OPAQUE_NAME = re.compile(r"t_[0-9a-f]{16}", re.ASCII)
_NO_EFFECT = frozenset({"01006", "01007"})  # privilege_not_revoked, privilege_not_granted
_INVALID = -2  # datconnlimit of a database whose DROP was interrupted
_LINGERING = 4  # backends whose client has gone and that the server still counts
_MAX_NAME = 63  # bytes; the server cuts what is longer, and then two names are one
_LOCK_PATIENCE, _LOCK_POLL = 5.0, 0.02  # seconds
_END_TIMEOUT = 5_000  # milliseconds for a session to end before its database is given up on

_ORIGIN = """
SELECT pg_get_userbyid(nspowner), EXISTS (SELECT FROM pg_namespace WHERE nspname = 'tenantdb') FROM pg_namespace WHERE nspname = 'public'
"""
# What a clone brings along and its owner must grant anew: the golden database grants nothing to anybody.
_CLONED = """
SELECT 'TABLE', c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE pg_get_userbyid(c.relowner) = %(owner)s AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND n.nspname = ANY(%(schemas)s)
UNION ALL
SELECT 'SEQUENCE', c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE pg_get_userbyid(c.relowner) = %(owner)s AND c.relkind = 'S' AND n.nspname = ANY(%(schemas)s)
UNION ALL
SELECT 'ROUTINE', p.oid::regprocedure::text FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE pg_get_userbyid(p.proowner) = %(owner)s AND n.nspname = ANY(%(schemas)s)
UNION ALL
SELECT 'TYPE', t.oid::regtype::text FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
LEFT JOIN pg_class r ON r.oid = t.typrelid
WHERE pg_get_userbyid(t.typowner) = %(owner)s AND n.nspname = ANY(%(schemas)s)
  AND (t.typtype IN ('d', 'e', 'r') OR (t.typtype = 'c' AND r.relkind = 'c'))
"""
_RIGHTS = {"TABLE": "SELECT, INSERT, UPDATE, DELETE", "SEQUENCE": "USAGE, SELECT", "ROUTINE": "EXECUTE", "TYPE": "USAGE"}
_DEFAULTS = {"TABLES": _RIGHTS["TABLE"], "SEQUENCES": _RIGHTS["SEQUENCE"], "FUNCTIONS": _RIGHTS["ROUTINE"], "TYPES": _RIGHTS["TYPE"]}

Connection = psycopg.Connection[Any]
Statement = sql.Composed


class PostgreSQLWorkshop:
    """A provisioner's open session; see `tenantdb.backends.protocols.Workshop`."""

    def __init__(self, connection: Connection, server: Server, url: ConnectionURL, settings: Settings) -> None:
        self._connection = connection
        self._inside: str | None = None  # the tenant's database that the connection is in
        self._server = server
        self._url = url
        self._settings = settings
        self._runtime_connections = settings.budget.per_tenant * settings.budget.share_of + _LINGERING

    def close(self) -> None:
        self._connection.close()

    # -- looking -----------------------------------------------------------------------------------------------------------------------

    def find_database(self, name: str) -> FoundDatabase | None:
        row = self._connection.execute("SELECT datconnlimit FROM pg_database WHERE datname = %s", [name]).fetchone()
        return None if row is None else FoundDatabase(name, invalid=row[0] == _INVALID)

    def find_roles(self, names: Sequence[str]) -> list[str]:
        rows = self._connection.execute("SELECT rolname FROM pg_roles WHERE rolname = ANY(%s)", [list(names)]).fetchall()
        return [row[0] for row in rows]

    def are_taken(self, database: str, roles: Sequence[str]) -> bool:
        query = "SELECT EXISTS (SELECT FROM pg_database WHERE datname = %s) OR EXISTS (SELECT FROM pg_roles WHERE rolname = ANY(%s))"
        row = self._connection.execute(query, [database, list(roles)]).fetchone()
        return row is None or bool(row[0])

    def ours(self) -> tuple[set[str], set[str]]:
        pattern = f"^{OPAQUE_NAME.pattern}$"
        databases = self._connection.execute("SELECT datname FROM pg_database WHERE datname ~ %s", [pattern]).fetchall()
        roles = self._connection.execute("SELECT rolname FROM pg_roles WHERE rolname ~ %s", [pattern]).fetchall()
        return {name for (name,) in databases}, {name for (name,) in roles}

    def verify(self, tenant: Tenant, *, cloned: bool = False) -> list[str]:
        return database_findings(self._in(tenant.database), tenant, self._server, self._settings, cloned=cloned)

    def hold(self, name: str) -> FoundDatabase | None:
        """A session that was closed a moment ago, such as that of the attempt before, may hold it a moment longer; so this has patience."""
        self._outside()
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
        query = "SELECT pg_try_advisory_lock(%s), (SELECT datconnlimit FROM pg_database WHERE datname = %s)"
        deadline = time.monotonic() + _LOCK_PATIENCE
        while True:
            locked, limit = self._connection.execute(query, [key, name]).fetchone() or (False, None)
            if locked:
                break
            if time.monotonic() > deadline:
                raise OperationInProgress(name)
            threading.Event().wait(_LOCK_POLL)
        return None if limit is None else FoundDatabase(name, invalid=limit == _INVALID)

    # -- a tenant comes to be ----------------------------------------------------------------------------------------------------------

    def create_database(self, tenant: Tenant, template: Template | None) -> None:
        source = (TEMPLATE if self._settings.hardening == "full" else "template0") if template is None else template.database
        self._create(_name(tenant), sql.Identifier(source), self._runtime_connections + OWNER_CONNECTIONS)

    def _create(self, database: sql.Identifier, source: sql.Identifier, limit: int) -> None:
        # CREATE DATABASE leaves the default ACL, which lets PUBLIC in; so nobody may connect until it has been replaced.
        self._outside()
        _run(
            self._connection,
            _sql(
                "CREATE DATABASE {} TEMPLATE {} ALLOW_CONNECTIONS false CONNECTION LIMIT {} STRATEGY {}",
                database,
                source,
                sql.Literal(limit),
                sql.Identifier(self._strategy()),
            ),
        )

    def _strategy(self) -> str:
        """Copying through the write-ahead log asks for no checkpoint, which on a busy server cost ten times as much as the copy itself.

        Where nothing is synced anyway, copying the files is as fast for one and twice as fast for several at a time.
        """
        row = self._connection.execute("SELECT current_setting('fsync')").fetchone()
        return "wal_log" if row is None or row[0] == "on" else "file_copy"

    def create_roles(self, tenant: Tenant, owner_password: SecretStr, runtime_password: SecretStr) -> None:
        owner, runtime = _role(tenant.owner_role), _role(tenant.runtime_role)
        there = self.find_roles([tenant.owner_role or "", tenant.runtime_role or ""])
        statements = []
        for name, role, password, limit in (
            (tenant.owner_role, owner, owner_password, OWNER_CONNECTIONS),
            (tenant.runtime_role, runtime, runtime_password, self._runtime_connections),
        ):
            verb = "ALTER" if name in there else "CREATE"
            statement = f"{verb} ROLE {{}} LOGIN INHERIT NOCREATEDB NOCREATEROLE CONNECTION LIMIT {{}} PASSWORD {{}}"
            statements.append(_sql(statement, role, sql.Literal(limit), self._verifier(password)))
        if self._settings.hardening == "full":
            statements.append(_sql("ALTER ROLE {} SET temp_file_limit = '1GB'", runtime))
            # What migrations need and PUBLIC no longer has comes through this group. Before 16 a role's own INHERIT decides.
            options = sql.SQL(" WITH INHERIT TRUE, SET FALSE") if self._version >= 160000 else sql.SQL("")
            statements.append(_sql("GRANT {} TO {}{}", sql.Identifier(OWNER_GROUP), owner, options))
        with self._connection.transaction():
            _run(self._connection, *statements)

    def set_passwords(self, tenant: Tenant, owner_password: SecretStr, runtime_password: SecretStr) -> None:
        with self._connection.transaction():
            _run(
                self._connection,
                _sql("ALTER ROLE {} PASSWORD {}", _role(tenant.owner_role), self._verifier(owner_password)),
                _sql("ALTER ROLE {} PASSWORD {}", _role(tenant.runtime_role), self._verifier(runtime_password)),
            )

    def _verifier(self, password: SecretStr) -> sql.Literal:
        return sql.Literal(scram.verifier(password.get_secret_value(), iterations=self._settings.scram_iterations))

    def open_database(self, tenant: Tenant) -> None:
        database, owner, runtime = _name(tenant), _role(tenant.owner_role), _role(tenant.runtime_role)
        statements = [
            _sql("REVOKE ALL ON DATABASE {} FROM PUBLIC", database),
            _sql("GRANT CONNECT ON DATABASE {} TO {}, {}", database, owner, runtime),
            _sql("ALTER DATABASE {} ALLOW_CONNECTIONS true", database),
        ]
        if self._settings.temporary_tables:
            statements.append(_sql("GRANT TEMPORARY ON DATABASE {} TO {}", database, runtime))
        with self._connection.transaction():
            _run(self._connection, *statements)

    def fit(self, tenant: Tenant) -> None:
        connection = self._in(tenant.database)
        owner, runtime = _role(tenant.owner_role), _role(tenant.runtime_role)
        made_by, furnished = connection.execute(_ORIGIN).fetchone() or (None, False)
        cloned = furnished and made_by != tenant.owner_role  # all is the golden database's role's still
        names = ["public", *self._server.schemas]
        items = connection.execute(_CLONED, {"owner": made_by, "schemas": names}).fetchall() if cloned else []
        statements = [*(() if furnished else self._furnish(owner)), self._join(owner)]
        if cloned:
            golden = sql.Identifier(_drawn(made_by))
            # The schemas first: who is to own a function in one must be allowed to create there. What the role does not own but was
            # granted, and its default privileges, would keep it from being dropped one day.
            statements += [_sql("ALTER SCHEMA {} OWNER TO {}", sql.Identifier(name), owner) for name in names]
            statements += [_sql("REASSIGN OWNED BY {} TO {}", golden, owner), _sql("DROP OWNED BY {}", golden)]
        stamp = "INSERT INTO tenantdb.identity SELECT {}, now() WHERE NOT EXISTS (SELECT FROM tenantdb.identity)"
        statements += [
            _sql(stamp, sql.Literal(tenant.id)),
            _sql("GRANT USAGE ON SCHEMA tenantdb TO {}, {}", owner, runtime),
            _sql("GRANT SELECT ON tenantdb.identity TO {}, {}", owner, runtime),
            recordlog.grants(owner, runtime),
            *self._grants(owner, runtime, items),
            _sql("REVOKE {} FROM CURRENT_USER", owner),
        ]
        with connection.transaction():
            _run(connection, *statements)

    def _join(self, role: sql.Identifier) -> Statement:
        """Become a member of a role: a REVOKE on a schema works only as its owner, and default privileges belong to the role that will
        create the tables. REASSIGN OWNED wants INHERIT since 16."""
        return _sql("GRANT {} TO CURRENT_USER{}", role, sql.SQL(" WITH INHERIT TRUE, SET TRUE" if self._version >= 160000 else ""))

    def _furnish(self, owner: sql.Identifier) -> list[Statement]:
        """What every new database has: the schema that no migration owns and no autogenerate sees, extensions, schemas of the owner's."""
        return [
            _sql("CREATE SCHEMA IF NOT EXISTS tenantdb"),
            _sql("CREATE TABLE IF NOT EXISTS tenantdb.identity (tenant_id uuid NOT NULL, stamped_at timestamptz NOT NULL)"),
            _sql("REVOKE ALL ON SCHEMA tenantdb FROM PUBLIC"),
            _sql("{}", recordlog.tables()),
            _sql("SET LOCAL search_path = public"),
            *(_sql("CREATE EXTENSION IF NOT EXISTS {} CASCADE", sql.Identifier(name)) for name in self._server.extensions),
            _sql("SET LOCAL search_path = pg_catalog"),
            self._join(owner),
            _sql("ALTER SCHEMA public OWNER TO {}", owner),
            *(_sql("CREATE SCHEMA IF NOT EXISTS {} AUTHORIZATION {}", sql.Identifier(name), owner) for name in self._server.schemas),
        ]

    def _grants(self, owner: sql.Identifier, runtime: sql.Identifier, items: Sequence[tuple[str, str]]) -> list[Statement]:
        """As the owner: what the runtime role may do with what is there, and with what later migrations make."""
        statements = [_sql("SET LOCAL ROLE {}", owner)]
        for schema in (sql.Identifier(name) for name in ("public", *self._server.schemas)):
            statements += [_sql("REVOKE ALL ON SCHEMA {} FROM PUBLIC", schema), _sql("GRANT USAGE ON SCHEMA {} TO {}", schema, runtime)]
            for kind, rights in _DEFAULTS.items():
                statements.append(_sql(f"ALTER DEFAULT PRIVILEGES IN SCHEMA {{}} GRANT {rights} ON {kind} TO {{}}", schema, runtime))
        for kind, rights in _RIGHTS.items():
            if names := [sql.SQL(name) for of, name in items if of == kind]:
                statements.append(_sql(f"GRANT {rights} ON {kind} {{}} TO {{}}", sql.SQL(", ").join(names), runtime))
        # Without IN SCHEMA: a default of PUBLIC can only be taken away for the whole database.
        return [
            *statements,
            _sql("ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC"),
            _sql("ALTER DEFAULT PRIVILEGES REVOKE USAGE ON TYPES FROM PUBLIC"),
            _sql("RESET ROLE"),
        ]

    # -- golden databases --------------------------------------------------------------------------------------------------------------

    def create_template(self, template: Template) -> None:
        database, owner = sql.Identifier(_drawn(template.database)), sql.Identifier(_drawn(template.owner_role))
        if not self.find_roles([template.owner_role or ""]):
            _run(self._connection, _sql("CREATE ROLE {} NOLOGIN", owner))
        statements = [self._join(owner)]
        if self._settings.hardening == "full":
            options = sql.SQL(" WITH INHERIT TRUE, SET FALSE") if self._version >= 160000 else sql.SQL("")
            statements.append(_sql("GRANT {} TO {}{}", sql.Identifier(OWNER_GROUP), owner, options))
        _run(self._connection, *statements)
        source = TEMPLATE if self._settings.hardening == "full" else "template0"
        self._create(database, sql.Identifier(source), -1)
        with self._connection.transaction():
            _run(
                self._connection,
                _sql("REVOKE ALL ON DATABASE {} FROM PUBLIC", database),
                _sql("ALTER DATABASE {} ALLOW_CONNECTIONS true", database),
            )
        connection = self._in(template.database)
        with connection.transaction():
            _run(
                connection,
                *self._furnish(owner),
                _sql("SET LOCAL ROLE {}", owner),
                *(_sql("REVOKE ALL ON SCHEMA {} FROM PUBLIC", sql.Identifier(name)) for name in ("public", *self._server.schemas)),
                _sql("ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC"),
                _sql("ALTER DEFAULT PRIVILEGES REVOKE USAGE ON TYPES FROM PUBLIC"),
            )

    @contextmanager
    def template_engine(self, template: Template) -> Iterator[Engine]:
        self._connection.close()

        def connect() -> Connection:
            return provisioner_connection(
                self._url,
                self._settings,
                self._server.name,
                database=template.database,
                autocommit=False,
                options=f"-c role={_drawn(template.owner_role)} -c search_path=public",
            )

        engine = create_engine("postgresql+psycopg://", creator=connect, poolclass=NullPool, use_native_hstore=False)
        try:
            yield engine
        finally:
            engine.dispose()
            self._connect(None)

    def close_template(self, template: Template) -> None:
        connection = self._in(template.database)
        owner = sql.Identifier(_drawn(template.owner_role))
        with connection.transaction():
            if findings := template_findings(connection, template, self._server, self._settings):
                raise HardeningFailed(findings)
            _run(  # a role's default privileges in a clone would outlive the role's use; these are the built-in ones again
                connection,
                _sql("SET LOCAL ROLE {}", owner),
                _sql("ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON FUNCTIONS TO PUBLIC"),
                _sql("ALTER DEFAULT PRIVILEGES GRANT USAGE ON TYPES TO PUBLIC"),
            )
        self._outside()
        _run(self._connection, _sql("ALTER DATABASE {} ALLOW_CONNECTIONS false", sql.Identifier(_drawn(template.database))))

    def drop_template(self, template: Template) -> None:
        self._outside()
        _run(self._connection, _sql("DROP DATABASE IF EXISTS {} WITH (FORCE)", sql.Identifier(_drawn(template.database))))
        _run(self._connection, _sql("DROP ROLE IF EXISTS {}", sql.Identifier(_drawn(template.owner_role))))

    # -- fences, and the end -----------------------------------------------------------------------------------------------------------

    def fence(self, tenant: Tenant, level: FenceLevel) -> None:
        self._outside()
        if not self.find_database(tenant.database or ""):
            return
        database, owner, runtime = _name(tenant), _role(tenant.owner_role), _role(tenant.runtime_role)
        with self._connection.transaction():
            _run(
                self._connection,
                _sql("ALTER DATABASE {} ALLOW_CONNECTIONS {}", database, sql.SQL("false" if level is FenceLevel.CLOSED else "true")),
                *(
                    _sql(f"ALTER ROLE {{}} {'LOGIN' if may else 'NOLOGIN'}", role)
                    for name, role, may in (
                        (tenant.owner_role, owner, level is not FenceLevel.CLOSED),
                        (tenant.runtime_role, runtime, level is FenceLevel.OPEN),
                    )
                    if self.find_roles([name or ""])
                ),
            )
        if level is FenceLevel.SUSPENDED:
            self.end_sessions(tenant, roles=[tenant.runtime_role or ""])
        elif level is FenceLevel.CLOSED:
            self.end_sessions(tenant)

    def end_sessions(self, tenant: Tenant, *, roles: Sequence[str] | None = None, before: Any = None) -> int:
        """Raises: `ServerUnavailable` where one does not end."""
        query = "SELECT count(*), count(*) FILTER (WHERE NOT pg_terminate_backend(pid, %(timeout)s)) FROM pg_stat_activity"
        query += " WHERE datname = %(database)s AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
        if roles is not None:
            query += " AND usename = ANY(%(roles)s)"
        if before is not None:
            query += " AND backend_start < %(before)s"
        self._outside()
        parameters = {"timeout": _END_TIMEOUT, "database": tenant.database, "roles": list(roles or ()), "before": before}
        ended = 0
        for _ in range(10):  # one that logged in just before the fence came may show up late
            found, alive = self._connection.execute(query, parameters).fetchone() or (0, 0)
            if alive:
                raise ServerUnavailable(self._server.name, "a session of a tenant that is to be let go does not end")
            if not found:
                return ended
            ended += found
        return ended

    def sessions(self, tenant: Tenant, *, before: Any) -> int:
        row = self._connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND usename = ANY(%s) AND backend_start < %s",
            [tenant.database, [tenant.owner_role, tenant.runtime_role], before],
        ).fetchone()
        return row[0] if row else 0

    def now(self) -> Any:
        row = self._connection.execute("SELECT clock_timestamp()").fetchone()
        return row[0] if row else None

    def drop_database(self, tenant: Tenant) -> None:
        self._outside()
        if self.find_database(tenant.database or ""):
            _run(self._connection, _sql("DROP DATABASE IF EXISTS {} WITH (FORCE)", _name(tenant)))

    def drop_roles(self, tenant: Tenant) -> None:
        self._outside()
        for name in self.find_roles([tenant.owner_role or "", tenant.runtime_role or ""]):
            _run(self._connection, _sql("DROP ROLE IF EXISTS {}", sql.Identifier(_drawn(name))))

    # -- plumbing ----------------------------------------------------------------------------------------------------------------------

    @property
    def _version(self) -> int:
        return self._connection.info.server_version

    def _in(self, database: str | None) -> Connection:
        if self._inside != database or self._connection.closed:
            self._connect(database)
        return self._connection

    def _outside(self) -> None:
        self._in(None)

    def _connect(self, database: str | None) -> None:
        self._connection.close()
        options = None if database is None else "-c search_path=pg_catalog"
        self._connection = provisioner_connection(self._url, self._settings, self._server.name, database=database, options=options)
        self._inside = database


def _drawn(name: str | None) -> str:
    """A name drawn by us, looked at once more right before it goes into DDL."""
    if name is None or not OPAQUE_NAME.fullmatch(name):
        raise HardeningFailed(["the registry holds a database or role name that was not drawn by tenantdb; nothing was done with it"])
    return name


def _name(tenant: Tenant) -> sql.Identifier:
    """The tenant's database. One that was adopted kept the name that it had, which the server must not cut."""
    name = tenant.database
    if tenant.adopted_from is None or name is None:
        return sql.Identifier(_drawn(name))
    if not name or "\0" in name or len(name.encode()) > _MAX_NAME:
        raise HardeningFailed(["the registry holds the name of an adopted database that PostgreSQL cannot have; nothing was done with it"])
    return sql.Identifier(name)


def _role(name: str | None) -> sql.Identifier:
    return sql.Identifier(_drawn(name))


def _sql(statement: str, *parts: sql.Composable) -> Statement:
    return sql.SQL(statement).format(*parts)


def _run(connection: Connection, *statements: Statement) -> None:
    """Execute statements of ours in one message; one that the server only warns about has had no effect and is an error."""
    warnings: list[str] = []

    def listen(diagnostic: Diagnostic) -> None:
        if diagnostic.sqlstate in _NO_EFFECT:
            warnings.append(diagnostic.message_primary or "a privilege was not changed")

    connection.add_notice_handler(listen)
    try:
        connection.execute(sql.SQL("; ").join(statements))
    finally:
        connection.remove_notice_handler(listen)
    if warnings:
        raise HardeningFailed(warnings)
