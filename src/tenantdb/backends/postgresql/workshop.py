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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
from cachetools import LRUCache
from psycopg import sql
from psycopg.errors import Diagnostic
from pydantic import SecretStr
from sqlalchemy import create_engine
from sqlalchemy.engine import Engine
from sqlalchemy.pool import NullPool

from tenantdb.backends.base import FenceLevel, FoundDatabase, Survey, TemplateMissing
from tenantdb.backends.postgresql import recordlog, scram
from tenantdb.backends.postgresql.bootstrap import OWNER_CONNECTIONS, OWNER_GROUP, TEMPLATE
from tenantdb.backends.postgresql.catalogue import INVALID, runtime_connections
from tenantdb.backends.postgresql.connect import provisioner_connection
from tenantdb.backends.postgresql.handover import Handover
from tenantdb.backends.postgresql.inspect import clone_findings, database_findings, template_findings
from tenantdb.errors import HardeningFailed, OperationInProgress, PurgeRefused, ServerUnavailable
from tenantdb.model import Server, Template, Tenant
from tenantdb.settings import ConnectionURL, Settings

OPAQUE_NAME = re.compile(r"t_[0-9a-f]{16}", re.ASCII)
_NO_EFFECT = frozenset({"01006", "01007"})  # privilege_not_revoked, privilege_not_granted
_MAX_NAME = 63  # bytes; the server cuts what is longer, and then two names are one
_LOCK_PATIENCE, _LOCK_POLL = 5.0, 0.02  # seconds
_END_TIMEOUT = 5_000  # milliseconds for a session to end before its database is given up on

# Whose the schema public is tells where the database comes from: of the golden database's role after cloning, of the tenant's own after
# fitting, of nobody in particular before. What that role owns must be granted anew, for a golden database grants nothing to anybody.
_INSIDE = """
WITH origin AS (SELECT nspowner AS oid, pg_get_userbyid(nspowner)::text AS name FROM pg_namespace WHERE nspname = 'public')
SELECT 'ORIGIN', name FROM origin
UNION ALL SELECT 'FURNISHED', '' FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = 'tenantdb' AND c.relname = 'identity'
UNION ALL
SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, c.oid::regclass::text
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace, origin
WHERE c.relowner = origin.oid AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND n.nspname = ANY(%(schemas)s)
UNION ALL
SELECT 'ROUTINE', p.oid::regprocedure::text FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace, origin
WHERE p.proowner = origin.oid AND n.nspname = ANY(%(schemas)s)
UNION ALL
SELECT 'TYPE', t.oid::regtype::text
FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace LEFT JOIN pg_class r ON r.oid = t.typrelid, origin
WHERE t.typowner = origin.oid AND n.nspname = ANY(%(schemas)s)
  AND (t.typtype IN ('d', 'e', 'r') OR (t.typtype = 'c' AND r.relkind = 'c'))
"""
_LOCK = """
SELECT pg_try_advisory_lock(%s), (SELECT datconnlimit FROM pg_database WHERE datname = %s), current_setting('fsync'),
       EXISTS (SELECT FROM pg_roles WHERE rolname = ANY(%s))
"""
_RIGHTS = {"TABLE": "SELECT, INSERT, UPDATE, DELETE", "SEQUENCE": "USAGE, SELECT", "ROUTINE": "EXECUTE", "TYPE": "USAGE"}
_DEFAULTS = {"TABLES": _RIGHTS["TABLE"], "SEQUENCES": _RIGHTS["SEQUENCE"], "FUNCTIONS": _RIGHTS["ROUTINE"], "TYPES": _RIGHTS["TYPE"]}

_items: LRUCache[tuple[str, tuple[str, ...]], list[tuple[str, str]]] = LRUCache(64)  # of the newest golden databases of a few servers

Connection = psycopg.Connection[Any]
Statement = sql.Composed


class PostgreSQLWorkshop:
    """A provisioner's open session; see `tenantdb.backends.protocols.Workshop`."""

    def __init__(self, connection: Connection, server: Server, url: ConnectionURL, settings: Settings) -> None:
        self._connection = connection
        self._fsync = "on"
        self._free: str | None = None  # a database's name that this session has found free and locked
        self._inside: str | None = None  # the tenant's database that the connection is in
        self._server = self.server = server
        self._url = url
        self._settings = self.settings = settings
        self._runtime_connections = runtime_connections(settings)

    def close(self) -> None:
        self._connection.close()

    # -- looking -----------------------------------------------------------------------------------------------------------------------

    def find_database(self, name: str) -> FoundDatabase | None:
        row = self._connection.execute("SELECT datconnlimit FROM pg_database WHERE datname = %s", [name]).fetchone()
        return None if row is None else FoundDatabase(name, invalid=row[0] == INVALID)

    def find_roles(self, names: Sequence[str]) -> list[str]:
        rows = self._connection.execute("SELECT rolname FROM pg_roles WHERE rolname = ANY(%s)", [list(names)]).fetchall()
        return [row[0] for row in rows]

    def ours(self) -> tuple[set[str], set[str]]:
        pattern = f"^{OPAQUE_NAME.pattern}$"
        databases = self._connection.execute("SELECT datname FROM pg_database WHERE datname ~ %s", [pattern]).fetchall()
        roles = self._connection.execute("SELECT rolname FROM pg_roles WHERE rolname ~ %s", [pattern]).fetchall()
        return {name for (name,) in databases}, {name for (name,) in roles}

    def sizes(self) -> dict[str, int]:
        self._outside()
        query = "SELECT datname, pg_database_size(oid) FROM pg_database WHERE pg_has_role(datdba, 'USAGE') AND datallowconn"
        return {str(name): int(size) for name, size in self._connection.execute(query)}

    def verify(self, tenant: Tenant, *, cloned: bool = False) -> list[str]:
        look = clone_findings if cloned else database_findings
        return look(self._in(tenant.database), tenant, self._server, self._settings)

    def are_taken(self, database: str, roles: Sequence[str]) -> bool:
        locked, limit, self._fsync, found = self._lock(database, roles)
        taken = not locked or limit is not None or bool(found)
        self._free = None if taken else database
        return taken

    def hold(self, name: str) -> FoundDatabase | None:
        """A session that was closed a moment ago, such as that of the attempt before, may hold it a moment longer; so this has patience."""
        self._outside()
        if self._free == name:  # looked for a moment ago, and locked since
            self._free = None
            return None
        deadline = time.monotonic() + _LOCK_PATIENCE
        while True:
            locked, limit, self._fsync, _ = self._lock(name, ())
            if locked:
                break
            if time.monotonic() > deadline:
                raise OperationInProgress(name)
            threading.Event().wait(_LOCK_POLL)
        return None if limit is None else FoundDatabase(name, invalid=limit == INVALID)

    def _lock(self, name: str, roles: Sequence[str]) -> tuple[bool, int | None, str, bool]:
        """Take the lock of a database's name, if nobody has it, and look what is there of it."""
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
        row = self._connection.execute(_LOCK, [key, name, list(roles)]).fetchone()
        return row or (False, None, "on", True)

    # -- a tenant comes to be ----------------------------------------------------------------------------------------------------------

    def create_database(self, tenant: Tenant, template: Template | None) -> None:
        source = (TEMPLATE if self._settings.hardening == "full" else "template0") if template is None else template.database
        try:
            self._create(_name(tenant), sql.Identifier(source), self._runtime_connections + OWNER_CONNECTIONS)
        except psycopg.errors.InvalidCatalogName as error:
            if template is None:
                raise
            raise TemplateMissing(template.database) from error

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
        return "file_copy" if self._fsync == "off" else "wal_log"

    def create_roles(self, tenant: Tenant, owner_password: SecretStr, runtime_password: SecretStr) -> None:
        try:
            self._make_roles(tenant, owner_password, runtime_password, there=())
        except psycopg.errors.DuplicateObject:  # from an earlier attempt
            there = self.find_roles([tenant.owner_role or "", tenant.runtime_role or ""])
            self._make_roles(tenant, owner_password, runtime_password, there=there)

    def _make_roles(self, tenant: Tenant, owner_password: SecretStr, runtime_password: SecretStr, *, there: Sequence[str]) -> None:
        owner, runtime = _role(tenant.owner_role), _role(tenant.runtime_role)
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
        _run(self._connection, *statements)

    def set_passwords(self, tenant: Tenant, owner_password: SecretStr, runtime_password: SecretStr) -> None:
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
        with self._connection.transaction():  # a REVOKE without effect must leave the door shut
            _run(self._connection, *statements)

    def fit(self, tenant: Tenant, template: Template | None = None) -> None:
        connection = self._in(tenant.database)
        owner, runtime = _role(tenant.owner_role), _role(tenant.runtime_role)
        names = ["public", *self._server.schemas]
        items = self._known_items(template, names)
        made_by = next((name for kind, name in items if kind == "ORIGIN"), None)
        furnished = any(kind == "FURNISHED" for kind, _ in items)
        cloned = furnished and made_by != tenant.owner_role  # all is the golden database's role's still
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
            *self._grants(owner, runtime, items, open_to_all=tenant.adopted_from is not None),
            _sql("REVOKE {} FROM CURRENT_USER", owner),
        ]
        _run(connection, *statements)

    def _known_items(self, template: Template | None, schemas: Sequence[str]) -> list[tuple[str, str]]:
        """What is inside. Clones of one golden database hold the same when they are new, so only the first of them is asked."""
        key = None if template is None else (template.database, tuple(schemas))
        items = None if key is None else _items.get(key)
        if items is None:
            items = self._connection.execute(_INSIDE, {"schemas": list(schemas)}).fetchall()
            if key is not None:
                _items[key] = items
        return items

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

    def _grants(
        self, owner: sql.Identifier, runtime: sql.Identifier, items: Sequence[tuple[str, str]], *, open_to_all: bool
    ) -> list[Statement]:
        """As the owner: what the runtime role may do with what is there, and with what later migrations make. ``open_to_all``: whoever made
        the routines let PUBLIC call them."""
        statements = [_sql("SET LOCAL ROLE {}", owner)]
        for schema in (sql.Identifier(name) for name in ("public", *self._server.schemas)):
            statements += [_sql("REVOKE ALL ON SCHEMA {} FROM PUBLIC", schema), _sql("GRANT USAGE ON SCHEMA {} TO {}", schema, runtime)]
            for kind, rights in _DEFAULTS.items():
                statements.append(_sql(f"ALTER DEFAULT PRIVILEGES IN SCHEMA {{}} GRANT {rights} ON {kind} TO {{}}", schema, runtime))
        for kind, rights in _RIGHTS.items():
            if names := [sql.SQL(name) for of, name in items if of == kind]:
                statements.append(_sql(f"GRANT {rights} ON {kind} {{}} TO {{}}", sql.SQL(", ").join(names), runtime))
                if open_to_all and kind == "ROUTINE":
                    statements.append(_sql("REVOKE EXECUTE ON ROUTINE {} FROM PUBLIC", sql.SQL(", ").join(names)))
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
        database, owner, runtime = _name(tenant), _role(tenant.owner_role), _role(tenant.runtime_role)
        there = self.find_roles([tenant.owner_role or "", tenant.runtime_role or ""])
        statements = [
            _sql(f"ALTER ROLE {{}} {'LOGIN' if may else 'NOLOGIN'}", role)
            for name, role, may in (
                (tenant.owner_role, owner, level is not FenceLevel.CLOSED),
                (tenant.runtime_role, runtime, level is FenceLevel.OPEN),
            )
            if name in there
        ]
        if self.find_database(tenant.database or "") and self._is_ours(tenant):
            allowed = sql.SQL("false" if level is FenceLevel.CLOSED else "true")
            statements.insert(0, _sql("ALTER DATABASE {} ALLOW_CONNECTIONS {}", database, allowed))
        if not statements:
            return
        with self._connection.transaction():
            _run(self._connection, *statements)
        if level is FenceLevel.SUSPENDED:
            self.end_sessions(tenant, roles=[tenant.runtime_role or ""])
        elif level is FenceLevel.CLOSED:
            self.end_sessions(tenant)

    def end_sessions(self, tenant: Tenant, *, roles: Sequence[str] | None = None, before: Any = None, idle_for: float | None = None) -> int:
        """A superuser's are left: nobody else may end them. Raises: `ServerUnavailable` where one does not end."""
        query = "SELECT count(*), count(*) FILTER (WHERE NOT pg_terminate_backend(pid, %(timeout)s))"
        query += " FROM pg_stat_activity JOIN pg_roles ON pg_roles.oid = usesysid"
        query += " WHERE datname = %(database)s AND NOT rolsuper AND pid <> pg_backend_pid()"
        if roles is not None:
            query += " AND usename = ANY(%(roles)s)"
        if before is not None:
            query += " AND backend_start < %(before)s"
        if idle_for is not None:
            query += " AND state = 'idle' AND state_change < clock_timestamp() - make_interval(secs => %(idle_for)s)"
        parameters: dict[str, Any] = {"timeout": _END_TIMEOUT, "database": tenant.database, "roles": list(roles or ())}
        parameters |= {"before": before, "idle_for": idle_for}
        ended = 0
        for _ in range(10):  # one that logged in just before the fence came may show up late
            found, alive = self._ask_as_member(tenant, query, parameters)
            if alive:
                raise ServerUnavailable(self._server.name, "a session of a tenant that is to be let go does not end")
            if not found:
                return ended
            ended += found
        return ended

    def sessions(self, tenant: Tenant, *, before: Any) -> int:
        query = "SELECT count(*) FROM pg_stat_activity"
        query += " WHERE datname = %(database)s AND usename = ANY(%(roles)s) AND backend_start < %(before)s"
        roles = [tenant.owner_role, tenant.runtime_role]
        count: int = self._ask_as_member(tenant, query, {"database": tenant.database, "roles": roles, "before": before})[0]
        return count

    def _ask_as_member(self, tenant: Tenant, query: str, parameters: Mapping[str, Any]) -> tuple[Any, ...]:
        """Since when a session lasts the server tells only the members of its role, to others as NULL; so for one question we are one."""
        self._outside()
        with self._connection.transaction(force_rollback=True):
            if roles := self.find_roles([tenant.owner_role or "", tenant.runtime_role or ""]):
                _run(self._connection, *(self._join(_role(name)) for name in roles))
            row = self._connection.execute(query.encode(), parameters).fetchone()
        return row or (0, 0)

    def now(self) -> Any:
        row = self._connection.execute("SELECT clock_timestamp()").fetchone()
        return row[0] if row else None

    def drop_database(self, tenant: Tenant) -> None:
        self._outside()
        if self.find_database(tenant.database or ""):
            if not self._is_ours(tenant):
                raise PurgeRefused(tenant.slug, "its database was never wholly adopted, so it is not dropped; give it back instead")
            _run(self._connection, _sql("DROP DATABASE IF EXISTS {} WITH (FORCE)", _name(tenant)))

    def drop_roles(self, tenant: Tenant) -> None:
        self._outside()
        for name in self.find_roles([tenant.owner_role or "", tenant.runtime_role or ""]):
            _run(self._connection, _sql("DROP ROLE IF EXISTS {}", sql.Identifier(_drawn(name))))

    # -- what somebody else made -------------------------------------------------------------------------------------------------------

    def survey(self, slug: str, database: str, owner_url: ConnectionURL | None) -> Survey:
        return Handover(self).survey(slug, database, owner_url, opaque=OPAQUE_NAME.fullmatch(database) is not None)

    def hand_over(self, tenant: Tenant, owner_url: ConnectionURL | None) -> None:
        Handover(self).hand_over(tenant, owner_url, limit=self._runtime_connections + OWNER_CONNECTIONS)

    def may_hand_back(self, tenant: Tenant, owner_url: ConnectionURL | None) -> None:
        self._outside()
        if self.find_database(tenant.database or "") and self._is_ours(tenant):
            Handover(self).may_hand_back(tenant, owner_url)

    def hand_back(self, tenant: Tenant, owner_url: ConnectionURL | None) -> None:
        self._outside()
        if not self.find_database(tenant.database or "") or not self._is_ours(tenant):
            return
        _run(self._connection, _sql("ALTER DATABASE {} ALLOW_CONNECTIONS true", _name(tenant)))  # its roles may not log in
        try:
            Handover(self).hand_back(tenant, owner_url)
        except BaseException:
            self._outside()
            if self._is_ours(tenant):
                _run(self._connection, _sql("ALTER DATABASE {} ALLOW_CONNECTIONS false", _name(tenant)))
            raise

    def _is_ours(self, tenant: Tenant) -> bool:
        """What is being adopted is its old owner's until it has been handed over, whatever the registry says."""
        query = "SELECT pg_get_userbyid(datdba) = current_user FROM pg_database WHERE datname = %s"
        return tenant.adopted_from is None or self._connection.execute(query, [tenant.database]).fetchone() == (True,)

    # -- plumbing ----------------------------------------------------------------------------------------------------------------------

    @property
    def _version(self) -> int:
        return self._connection.info.server_version

    def _in(self, database: str | None) -> Connection:
        if self._inside != database or self._connection.closed:
            self._connect(database)
        return self._connection

    def inside(self, database: str) -> Connection:
        return self._in(database)

    def outside(self) -> Connection:
        """Where every server lets the provisioner in."""
        return self._in(None)

    def _outside(self) -> None:
        self._in(None)

    def _connect(self, database: str | None) -> None:
        self._connection.close()
        self._free = None
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
    """Execute statements of ours in one message, which the server runs in one transaction; one that it only warns about has had no effect
    and is an error, after which the rest stays unless the caller has begun a transaction."""
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
