"""A database that somebody else made becomes a tenant's, and goes back.

A superuser's login hands it over itself: no membership is granted then, so none can be left behind. A plain owner's login cannot give a
database to the provisioner; so the provisioner must be a member of the owner's role, for the length of one transaction where it may grant
itself that (before PostgreSQL 16).

REASSIGN OWNED is not used: it also moves the role's *other* databases, and a set-up made by hand has one role for all of them. Each object
is altered by itself, in one transaction, and what is left of the old owner then refuses the whole. Nothing that the old owner made is
called: everything is a read of ``pg_catalog`` or an ALTER, with ``pg_catalog`` alone on the search path; a database with event triggers,
which every ALTER would run, is refused before the first. What PUBLIC had is written down in the database itself, in ``tenantdb.adopted``,
as names; what is granted back is put together here, so that nobody can write there what a superuser then executes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from tenantdb.backends.base import Survey
from tenantdb.backends.postgresql.bootstrap import DOORS, OWNER_GROUP
from tenantdb.backends.postgresql.interior import EXTENSIONS
from tenantdb.errors import AdoptRefused
from tenantdb.model import Server, Tenant
from tenantdb.settings import Settings

Connection = psycopg.Connection[Any]
Statement = sql.Composed

_FIRST = 16384  # oids below are PostgreSQL's own
_SHOWN = 20  # of a long list, in a message

# Partitions, views and the like are altered one by one. A sequence that a column owns, an index, a row type and an array follow; what makes
# the values of a range type is the superuser's.
_OBJECTS = f"""
WITH owned(classid, id, owner) AS (
    SELECT 'pg_namespace'::regclass, oid, nspowner FROM pg_namespace
    UNION ALL SELECT 'pg_class'::regclass, c.oid, relowner FROM pg_class c
        WHERE relpersistence <> 't' AND (relkind IN ('r', 'p', 'v', 'm', 'f') OR relkind = 'S' AND NOT EXISTS (
            SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                                      AND d.refclassid = 'pg_class'::regclass AND d.refobjsubid > 0 AND d.deptype IN ('a', 'i')))
    UNION ALL SELECT 'pg_proc'::regclass, oid, proowner FROM pg_proc p WHERE NOT EXISTS (
            SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'i')
    UNION ALL SELECT 'pg_type'::regclass, t.oid, typowner FROM pg_type t LEFT JOIN pg_class r ON r.oid = t.typrelid
        WHERE typtype IN ('d', 'e', 'r') OR typtype = 'c' AND r.relkind = 'c'
           OR typtype = 'm' AND current_setting('server_version_num')::int < 170000
           OR typtype = 'b' AND NOT EXISTS (SELECT FROM pg_type e WHERE e.typarray = t.oid)
    UNION ALL SELECT 'pg_operator'::regclass, oid, oprowner FROM pg_operator
    UNION ALL SELECT 'pg_opclass'::regclass, oid, opcowner FROM pg_opclass
    UNION ALL SELECT 'pg_opfamily'::regclass, oid, opfowner FROM pg_opfamily
    UNION ALL SELECT 'pg_collation'::regclass, oid, collowner FROM pg_collation
    UNION ALL SELECT 'pg_conversion'::regclass, oid, conowner FROM pg_conversion
    UNION ALL SELECT 'pg_statistic_ext'::regclass, oid, stxowner FROM pg_statistic_ext
    UNION ALL SELECT 'pg_ts_config'::regclass, oid, cfgowner FROM pg_ts_config
    UNION ALL SELECT 'pg_ts_dict'::regclass, oid, dictowner FROM pg_ts_dict
    UNION ALL SELECT 'pg_largeobject'::regclass, oid, lomowner FROM pg_largeobject_metadata
    UNION ALL SELECT 'pg_publication'::regclass, oid, pubowner FROM pg_publication
    UNION ALL SELECT 'pg_subscription'::regclass, s.oid, subowner FROM pg_subscription s JOIN pg_database b ON b.oid = s.subdbid
        WHERE b.datname = current_database()
    UNION ALL SELECT 'pg_foreign_server'::regclass, oid, srvowner FROM pg_foreign_server
    UNION ALL SELECT 'pg_foreign_data_wrapper'::regclass, oid, fdwowner FROM pg_foreign_data_wrapper
    UNION ALL SELECT 'pg_event_trigger'::regclass, oid, evtowner FROM pg_event_trigger
    UNION ALL SELECT 'pg_language'::regclass, oid, lanowner FROM pg_language
)
SELECT i.type, i.identity, pg_get_userbyid(owner) FROM owned, pg_identify_object(classid, id, 0) AS i
WHERE id >= {_FIRST} AND coalesce(i.schema, i.name, '') !~ '^pg_(toast|temp)' AND coalesce(i.schema, i.name, '') <> 'tenantdb'
  AND NOT EXISTS (SELECT FROM pg_depend e WHERE e.classid = owned.classid AND e.objid = id AND e.deptype = 'e')
ORDER BY classid <> 'pg_namespace'::regclass, i.type <> 'type', i.identity
"""
_KEYWORDS = {
    kind: kind.upper()
    for kind in (
        "schema,table,foreign table,view,materialized view,sequence,type,function,procedure,aggregate,operator,operator class,"
        "operator family,collation,conversion,text search configuration,text search dictionary,large object"
    ).split(",")
} | {"statistics object": "STATISTICS"}
"""What ALTER ... OWNER TO can give to a role that is no superuser. A publication is not among them: its owner must be allowed to make
schemas, and replication sees everything."""

# Default privileges hold for what the role makes, and it makes nothing here any more. An extension has no ALTER ... OWNER TO.
_LEFT = """
SELECT i.type, i.identity FROM pg_shdepend d, pg_identify_object(d.classid, d.objid, 0) AS i
WHERE d.dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND d.deptype = 'o'
  AND d.refclassid = 'pg_authid'::regclass AND d.refobjid = (SELECT oid FROM pg_roles WHERE rolname = %(role)s)
  AND d.classid <> 'pg_default_acl'::regclass AND (NOT %(keeps)s OR d.classid <> 'pg_extension'::regclass)
  AND NOT EXISTS (SELECT FROM pg_depend e WHERE e.classid = d.classid AND e.objid = d.objid AND e.deptype = 'e')
  AND coalesce(i.schema, '') !~ '^pg_(toast_)?temp'
ORDER BY 1, 2
"""
_DATABASE = """
SELECT d.oid, pg_get_userbyid(d.datdba), d.datallowconn, d.datistemplate, d.datconnlimit, pg_postmaster_start_time(), r.rolsuper
FROM pg_database d JOIN pg_roles r ON r.oid = d.datdba WHERE d.datname = %s
"""
_ME = "SELECT current_user::text, (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)"
_PUBLIC = "CASE a.grantee WHEN 0 THEN NULL ELSE pg_get_userbyid(a.grantee) END"
_DATABASE_GRANTS = f"""
SELECT {_PUBLIC}, a.privilege_type FROM pg_database d, aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) AS a
WHERE d.datname = current_database() ORDER BY 1, 2
"""
_INSIDE = """
SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = 'tenantdb'),
       EXISTS (SELECT FROM pg_class WHERE relname = 'tenantdb_tenants' AND relkind = 'r'),
       (SELECT pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = 'public')
"""
_SCHEMAS = """
SELECT n.nspname FROM pg_namespace n WHERE n.nspname !~ '^pg_' AND n.nspname NOT IN ('public', 'information_schema', 'tenantdb')
  AND NOT EXISTS (SELECT FROM pg_depend e WHERE e.classid = 'pg_namespace'::regclass AND e.objid = n.oid AND e.deptype = 'e') ORDER BY 1
"""
_OPEN = f"""
SELECT EXISTS (SELECT FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace AND {DOORS}
                                     AND has_function_privilege('public', oid, 'EXECUTE')),
       has_language_privilege('public', 'plpgsql', 'USAGE')
"""
# Where it is an ordinary table, reading it runs nobody's code.
_VERSIONS = """
SELECT c.relkind = 'r' AND NOT c.relrowsecurity AND has_table_privilege(c.oid, 'SELECT')
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = 'public' AND c.relname = 'alembic_version'
"""
_SCHEMA_GRANTS = """
SELECT n.nspname, a.privilege_type FROM pg_namespace n, aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) AS a
WHERE n.nspname = ANY(%(schemas)s) AND a.grantee = 0
"""
_CALLABLE = """
SELECT i.identity FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace, pg_identify_object('pg_proc'::regclass, p.oid, 0) AS i
WHERE n.nspname = ANY(%(schemas)s) AND pg_get_userbyid(p.proowner) = %(owner)s
  AND EXISTS (SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a WHERE a.grantee = 0)
"""
_DOORS = f"""
SELECT oid::regprocedure::text, has_function_privilege('public', oid, 'EXECUTE') FROM pg_proc
WHERE pronamespace = 'pg_catalog'::regnamespace AND {DOORS}
"""
_ADOPTED = "SELECT tenant_id::text, was FROM ONLY tenantdb.adopted"
_OWN_TABLES = """
SELECT c.relkind = 'r' AND c.relowner = me.oid AND n.nspowner = me.oid
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace, pg_roles me
WHERE n.nspname = 'tenantdb' AND c.relname = 'adopted' AND me.rolname = %(provisioner)s
"""


@dataclass(frozen=True, slots=True)
class Facts:
    """One database, as pg_database has it."""

    id: int
    owner: str
    accepts: bool
    template: bool
    limit: int
    started: Any
    owner_is_super: bool


def facts(connection: Connection, database: str) -> Facts | None:
    row = connection.execute(_DATABASE, [database]).fetchone()
    return None if row is None else Facts(*row)


@dataclass(frozen=True, slots=True)
class Login:
    """Who a connection is."""

    name: str
    is_super: bool

    @classmethod
    def of(cls, connection: Connection) -> Login:
        return cls(*(connection.execute(_ME).fetchone() or ("", False)))

    def may_use(self, connection: Connection, role: str) -> bool:
        """Whether the login is, or has the rights of, or may give away a role."""
        query = "SELECT pg_has_role(%(role)s, 'USAGE') OR pg_has_role(%(role)s, 'MEMBER WITH ADMIN OPTION')"
        return connection.execute(query, {"role": role}).fetchone() == (True,)

    def may_grant(self, connection: Connection, role: str) -> bool:
        return connection.execute("SELECT pg_has_role(%s, 'MEMBER WITH ADMIN OPTION')", [role]).fetchone() == (True,)


def is_member(connection: Connection, role: str) -> bool:
    """Whether who asks has a role's rights and may become it, so that what the role owns can be given away."""
    right = "SET" if connection.info.server_version >= 160000 else "MEMBER"
    row = connection.execute(
        f"SELECT pg_has_role(%(role)s, 'USAGE') AND pg_has_role(%(role)s, '{right}')".encode(), {"role": role}
    ).fetchone()
    return bool(row and row[0])


def join(connection: Connection, role: str, member: str) -> Statement:
    options = sql.SQL(" WITH INHERIT TRUE, SET TRUE" if connection.info.server_version >= 160000 else "")
    return sql.SQL("GRANT {} TO {}{}").format(sql.Identifier(role), sql.Identifier(member), options)


def leave(role: str, member: str) -> Statement:
    return sql.SQL("REVOKE {} FROM {}").format(sql.Identifier(role), sql.Identifier(member))


def started(connection: Connection) -> Any:
    """When the server started, to the microsecond: two servers do not share that."""
    row = connection.execute("SELECT pg_postmaster_start_time()").fetchone()
    return row[0] if row else None


def is_super(connection: Connection, role: str) -> bool:
    return connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = %s", [role]).fetchone() == (True,)


def end_sessions(connection: Connection) -> None:
    """All others in this database, superusers' too."""
    connection.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )


# -- looking ---------------------------------------------------------------------------------------------------------------------------


def survey(
    connection: Connection, database: str, found: Facts, *, provisioner: str, server: Server, settings: Settings, by_superuser: bool
) -> tuple[Survey, list[str]]:
    """Look at a database from inside, with the eyes of whoever owns it. Everything that speaks against its adoption, in words."""
    problems: list[str] = []
    name = sql.Identifier(database)
    ours, registry, public_owner = connection.execute(_INSIDE).fetchone() or (False, False, None)
    if ours:
        problems.append("it has a schema tenantdb, so it is or was a tenant's: the registry that knows it gives it back first")
    if registry:
        problems.append("a registry of tenantdb lives in it")
    if public_owner is None:
        problems.append("it has no schema public, where the tables of a tenant stand")
    elif public_owner not in (found.owner, "pg_database_owner") and not by_superuser:
        problems.append(f"its schema public belongs to {public_owner}; give a superuser's owner_url")
    problems += _foreign_grants(connection, name, {found.owner, provisioner})
    known = {"public", *server.schemas}
    if strange := [schema for (schema,) in connection.execute(_SCHEMAS) if schema not in known]:
        problems.append(
            f"its schemas {', '.join(strange)} are not among the server's: db.servers.add({server.name!r}, ..., schemas=[...]) names them"
        )
    if strange := [extension for (extension,) in connection.execute(EXTENSIONS, [list(server.extensions)])]:
        problems.append(
            f"its extensions {', '.join(strange)} are not among the server's: db.servers.add({server.name!r}, ..., extensions=[...])"
            " names them"
        )
    objects = connection.execute(_OBJECTS).fetchall()
    if stuck := [f"{kind} {identity}" for kind, identity, _ in objects if kind not in _KEYWORDS]:
        problems.append(f"what cannot be given to a tenant's role must go first: {_some(stuck)}")
    if foreign := [f"{kind} {identity} ({owner})" for kind, identity, owner in objects if kind in _KEYWORDS and owner != found.owner]:
        problems.append(
            f"what does not belong to {found.owner} must be given to it first, with ALTER ... OWNER TO, or go: {_some(foreign)}"
        )
    if settings.hardening == "full" and not by_superuser and any(connection.execute(_OPEN).fetchone() or (True,)):
        problems.append(
            "with hardening='full' PUBLIC must lose advisory locks, large objects and PL/pgSQL in it, which only a superuser can do: give a"
            " superuser's owner_url, or set hardening='managed'"
        )
    return Survey(owner=found.owner, revisions=_revisions(connection)), problems


def _foreign_grants(connection: Connection, name: sql.Identifier, own: set[str]) -> list[str]:
    foreign = dict.fromkeys(who for who, _ in connection.execute(_DATABASE_GRANTS) if who is not None and who not in own)
    if not foreign:
        return []
    revoke = sql.SQL("REVOKE ALL ON DATABASE {} FROM {}").format(name, sql.SQL(", ").join(map(sql.Identifier, foreign)))
    return [f"other roles have rights on it: {', '.join(foreign)}; as its owner: {revoke.as_string(None)}"]


def _revisions(connection: Connection) -> tuple[str, ...] | None:
    row = connection.execute(_VERSIONS).fetchone()
    if row is None:
        return None
    if not row[0]:  # a view, perhaps: what it says is read as the owner role, later
        return ()
    with connection.transaction():  # locked, it stays what it was found to be: a view in its place would run code with a superuser's rights
        connection.execute("LOCK TABLE ONLY public.alembic_version IN ACCESS SHARE MODE")
        if connection.execute(_VERSIONS).fetchone() != (True,):
            return ()
        return tuple(version for (version,) in connection.execute("SELECT version_num FROM ONLY public.alembic_version"))


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


# -- over and back ---------------------------------------------------------------------------------------------------------------------


def is_handed_over(connection: Connection, tenant: Tenant, provisioner: str) -> bool:
    """Whether the database that the provisioner's session is in was handed over for this very tenant."""
    row = connection.execute(_OWN_TABLES, {"provisioner": provisioner}).fetchone()
    return row is not None and bool(row[0]) and [each[0] for each in connection.execute(_ADOPTED)] == [str(tenant.id)]


def hand_over(connection: Connection, tenant: Tenant, server: Server, *, provisioner: str, limit: int, close_doors: bool) -> None:
    """In the caller's transaction, as a superuser, or as the provisioner that is a member of both owners' roles."""
    old, new = tenant.adopted_from or "", tenant.owner_role or ""
    database, owner, prov = sql.Identifier(tenant.database or ""), sql.Identifier(new), sql.Identifier(provisioner)
    found = facts(connection, tenant.database or "")
    objects = connection.execute(_OBJECTS).fetchall()
    if found is None or found.owner != old:
        raise AdoptRefused(tenant.slug, [f"database {tenant.database} does not belong to {old} any more"])
    if stuck := [f"{kind} {identity}" for kind, identity, _ in objects if kind not in _KEYWORDS]:
        raise AdoptRefused(tenant.slug, [f"what cannot be given to a tenant's role must go first: {_some(stuck)}"])
    _execute(
        connection,
        # The owner first: where that may not be done, nothing has been.
        _sql("ALTER DATABASE {} OWNER TO {}", database, prov),
        _sql("ALTER DATABASE {} CONNECTION LIMIT {}", database, sql.Literal(limit)),
        _sql("CREATE SCHEMA tenantdb AUTHORIZATION {}", prov),
        _sql("CREATE TABLE tenantdb.adopted (tenant_id uuid NOT NULL, was jsonb NOT NULL)"),
        _sql("ALTER TABLE tenantdb.adopted OWNER TO {}", prov),
    )
    was = _was(connection, found, server, old, close_doors=close_doors)
    connection.execute("INSERT INTO tenantdb.adopted VALUES (%s, %s)", [tenant.id, json.dumps(was)])
    _execute(connection, _sql("ALTER SCHEMA public OWNER TO {}", owner), *_give(objects, old, owner))
    if close_doors:
        doors = [_sql("REVOKE EXECUTE ON FUNCTION {} FROM PUBLIC", sql.SQL(name)) for name, _ in connection.execute(_DOORS)]
        plpgsql = _sql("REVOKE USAGE ON LANGUAGE plpgsql FROM PUBLIC")
        _execute(connection, *doors, plpgsql, _sql("GRANT USAGE ON LANGUAGE plpgsql TO {}", sql.Identifier(OWNER_GROUP)))
    _nothing_left(connection, tenant, old, keeps_extensions=True)


def closed_doors(connection: Connection) -> bool:
    """Whether handing over took something from PUBLIC that only a superuser can grant again."""
    row = connection.execute(_ADOPTED).fetchone()
    return row is None or bool(row[1].get("doors") or row[1].get("plpgsql"))


def hand_back(connection: Connection, tenant: Tenant, *, closed_by_us: bool) -> None:
    """The other way. What later migrations made goes with the rest; what is tenantdb's own in it is dropped, with the record log."""
    old, new, runtime = tenant.adopted_from or "", tenant.owner_role or "", tenant.runtime_role or ""
    database, before = sql.Identifier(tenant.database or ""), sql.Identifier(old)
    row = connection.execute(_ADOPTED).fetchone()
    was: dict[str, Any] = row[1] if row else {}
    objects = connection.execute(_OBJECTS).fetchall()
    if watching := [identity for kind, identity, _ in objects if kind == "event trigger"]:
        raise AdoptRefused(tenant.slug, [f"event triggers must go first: {_some(watching)}"], "given back")
    _nothing_left(connection, tenant, runtime)
    _execute(
        connection,
        _sql("DROP OWNED BY {}", sql.Identifier(runtime)),  # it owns nothing, so these are its grants
        _sql("REVOKE ALL ON DATABASE {} FROM {}", database, sql.Identifier(new)),
        _sql("ALTER SCHEMA public OWNER TO {}", before),
        *_give(objects, new, before),
        _sql("ALTER SCHEMA public OWNER TO {}", sql.Identifier(was.get("public_owner") or "pg_database_owner")),
    )
    _nothing_left(connection, tenant, new)
    _execute(
        connection,
        _sql("DROP OWNED BY {}", sql.Identifier(new)),  # default privileges, and the grants on what is ours
        _sql("DROP TABLE tenantdb.identity, tenantdb.audit, tenantdb.audit_head, tenantdb.adopted"),
        _sql("DROP SCHEMA tenantdb"),
        *_granted_back(connection, database, was, old, doors=closed_by_us),
        _sql("ALTER DATABASE {} CONNECTION LIMIT {}", database, sql.Literal(int(was.get("limit", -1)))),
        _sql("ALTER DATABASE {} OWNER TO {}", database, before),
    )


def _was(connection: Connection, found: Facts, server: Server, old: str, *, close_doors: bool) -> dict[str, Any]:
    """What PUBLIC had, and what else is changed, by name."""
    asked = {"schemas": ["public", *server.schemas], "owner": old}
    schemas: dict[str, list[str]] = {}
    for schema, privilege in connection.execute(_SCHEMA_GRANTS, asked):
        schemas.setdefault(schema, []).append(privilege)
    public_owner = connection.execute("SELECT pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = 'public'").fetchone()
    _, plpgsql = connection.execute(_OPEN).fetchone() or (False, False)
    return {
        "limit": found.limit,
        "public_owner": public_owner[0] if public_owner else None,
        "database": [privilege for who, privilege in connection.execute(_DATABASE_GRANTS) if who is None],
        "schemas": schemas,
        "routines": [identity for (identity,) in connection.execute(_CALLABLE, asked)],
        "doors": [name for name, is_open in connection.execute(_DOORS) if close_doors and is_open],
        "plpgsql": bool(close_doors and plpgsql),
    }


def _granted_back(connection: Connection, database: sql.Identifier, was: dict[str, Any], old: str, *, doors: bool) -> list[Statement]:
    """To PUBLIC, what it had. Each name is looked for in the catalogue, and no other right is granted than these."""
    statements: list[Statement] = []
    for privilege in ("CONNECT", "TEMPORARY", "CREATE"):
        if privilege in was.get("database", ()):
            statements.append(_sql(f"GRANT {privilege} ON DATABASE {{}} TO PUBLIC", database))
    there = {name for (name,) in connection.execute("SELECT nspname FROM pg_namespace")}
    for schema, privileges in was.get("schemas", {}).items():
        statements += [
            _sql(f"GRANT {privilege} ON SCHEMA {{}} TO PUBLIC", sql.Identifier(schema))
            for privilege in ("USAGE", "CREATE")
            if schema in there and privilege in privileges
        ]
    routines = {identity for kind, identity, owner in connection.execute(_OBJECTS) if kind in _ROUTINES and owner == old}
    statements += [
        _sql("GRANT EXECUTE ON ROUTINE {} TO PUBLIC", sql.SQL(identity)) for identity in was.get("routines", ()) if identity in routines
    ]
    if doors:
        closed = [name for name, _ in connection.execute(_DOORS) if name in was.get("doors", ())]
        statements += [_sql("GRANT EXECUTE ON FUNCTION {} TO PUBLIC", sql.SQL(name)) for name in closed]
    if doors and was.get("plpgsql"):
        statements.append(_sql("GRANT USAGE ON LANGUAGE plpgsql TO PUBLIC"))
        statements.append(_sql("REVOKE USAGE ON LANGUAGE plpgsql FROM {}", sql.Identifier(OWNER_GROUP)))
    return statements


_ROUTINES = frozenset({"function", "procedure", "aggregate"})


def _give(objects: Sequence[tuple[str, str, str]], of: str, to: sql.Identifier) -> list[Statement]:
    """Schemas come first: who is to own a table must be allowed to create in its schema."""
    return [
        _sql(f"ALTER {_KEYWORDS[kind]} {{}} OWNER TO {{}}", sql.SQL(identity), to)
        for kind, identity, owner in objects
        if owner == of and kind in _KEYWORDS
    ]


def _nothing_left(connection: Connection, tenant: Tenant, role: str, *, keeps_extensions: bool = False) -> None:
    asked = {"role": role, "keeps": keeps_extensions}
    left = [f"{kind} {identity}" for kind, identity in connection.execute(_LEFT, asked)]
    if left:
        raise AdoptRefused(tenant.slug, [f"role {role} would still own: {_some(left)}; nothing was changed"])


def _sql(statement: str, *parts: sql.Composable) -> Statement:
    return sql.SQL(statement).format(*parts)


def _execute(connection: Connection, *statements: Statement) -> None:
    if statements:
        connection.execute(sql.SQL("; ").join(statements))
