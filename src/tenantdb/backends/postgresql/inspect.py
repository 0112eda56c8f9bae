"""What is more open than it must be: read back from the catalogue, never assumed from the statements that were sent."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psycopg

from tenantdb.backends.base import ServerReport
from tenantdb.backends.postgresql.bootstrap import DOORS, OWNER_CONNECTIONS
from tenantdb.backends.postgresql.connect import provisioner_connection
from tenantdb.model import Server, Tenant
from tenantdb.settings import ConnectionURL, Settings

Connection = psycopg.Connection[Any]

# A NULL datacl is not "nothing granted" but the default, which lets PUBLIC connect; hence acldefault.
_DATABASE = """
SELECT pg_get_userbyid(d.datdba) = current_user,
       array(SELECT a.privilege_type || ' for ' || CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE 'a foreign role' END
             FROM aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) AS a
             WHERE a.grantee = 0 OR a.grantee NOT IN (SELECT oid FROM pg_roles WHERE rolname = ANY(%(known)s) OR oid = d.datdba))
FROM pg_database d WHERE d.datname = current_database()
"""
_SCHEMAS = """
SELECT n.nspname FROM pg_namespace n, aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) AS a
WHERE a.grantee = 0 AND n.nspname NOT IN ('pg_catalog', 'information_schema')
"""
_ROLES = """
SELECT r.rolname = %(runtime)s, r.rolsuper, r.rolcreaterole, r.rolcreatedb, r.rolreplication, r.rolbypassrls,
       array(SELECT g.rolname::text FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid WHERE m.member = r.oid)
FROM pg_roles r WHERE r.rolname = ANY(%(both)s)
"""
_MEMBERS = """
SELECT r.rolname = %(runtime)s FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.roleid
WHERE r.rolname = ANY(%(both)s) AND m.member <> (SELECT oid FROM pg_roles WHERE rolname = current_user)
"""
_RUNTIME_OWNS = "SELECT count(*) FROM pg_class WHERE relowner = (SELECT oid FROM pg_roles WHERE rolname = %s)"
_PUBLIC_FUNCTIONS = """
SELECT count(*) FROM pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a
WHERE a.grantee = 0 AND p.pronamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
  AND NOT EXISTS (SELECT 1 FROM pg_depend e WHERE e.objid = p.oid AND e.deptype = 'e')
"""
# An extension brings functions that PUBLIC may execute, and some of them reach files and other servers (dblink, file_fdw). So what the
# template holds must have been asked for, or be required by one that was.
_EXTENSIONS = """
WITH RECURSIVE wanted(oid) AS (
    SELECT oid FROM pg_extension WHERE extname = 'plpgsql' OR extname = ANY(%s)
    UNION SELECT d.refobjid FROM pg_depend d JOIN wanted w ON d.objid = w.oid
    WHERE d.classid = 'pg_extension'::regclass AND d.refclassid = 'pg_extension'::regclass
)
SELECT extname FROM pg_extension WHERE oid NOT IN (SELECT oid FROM wanted) ORDER BY extname
"""
_DOORS = f"""
SELECT count(*) FROM pg_proc
WHERE pronamespace = 'pg_catalog'::regnamespace AND {DOORS} AND has_function_privilege('public', oid, 'EXECUTE')
"""
_PUBLIC_PLPGSQL = "SELECT has_language_privilege('public', 'plpgsql', 'USAGE')::int"
_IDENTITY = "SELECT tenant_id::text FROM tenantdb.identity"


def database_findings(connection: Connection, tenant: Tenant, server: Server, settings: Settings) -> list[str]:
    """Look at one tenant's database from inside, as the provisioner."""
    both = [tenant.owner_role, tenant.runtime_role]
    findings: list[str] = []
    row = connection.execute(_DATABASE, {"known": both}).fetchone()
    if row is None or not row[0]:
        findings.append("the database does not belong to the provisioner")
    findings += [f"the database grants {grant}" for grant in (row[1] if row else ())]
    findings += [f"PUBLIC may use schema {name}" for (name,) in connection.execute(_SCHEMAS).fetchall()]
    roles = connection.execute(_ROLES, {"both": both, "runtime": tenant.runtime_role}).fetchall()
    if len(roles) != 2:
        findings.append("a role of the tenant is missing")
    for is_runtime, *attributes, groups in roles:
        which = "runtime" if is_runtime else "owner"
        if any(attributes):
            findings.append(f"the {which} role has more rights than LOGIN")
        allowed = set() if is_runtime or settings.hardening == "managed" else {"tenantdb_owner"}
        if set(groups) - allowed:
            findings.append(f"the {which} role is a member of another role")
    for (is_runtime,) in connection.execute(_MEMBERS, {"both": both, "runtime": tenant.runtime_role}).fetchall():
        findings.append(f"another role is a member of the {'runtime' if is_runtime else 'owner'} role")
    if _count(connection, _RUNTIME_OWNS, tenant.runtime_role):
        findings.append("the runtime role owns relations")
    if _count(connection, _PUBLIC_FUNCTIONS):
        findings.append("PUBLIC may execute functions of the tenant")
    if settings.hardening == "full":
        if _count(connection, _DOORS):
            findings.append("PUBLIC may take advisory locks or write large objects; run `tenantdb bootstrap-server`")
        if _count(connection, _PUBLIC_PLPGSQL):
            findings.append("PUBLIC may use PL/pgSQL; run `tenantdb bootstrap-server`")
    unasked = connection.execute(_EXTENSIONS, [list(server.extensions)]).fetchall()
    findings += [f"the extension {name} is there, and the server's extensions= do not name it" for (name,) in unasked]
    if connection.execute(_IDENTITY).fetchall() != [(str(tenant.id),)]:
        findings.append("the identity stamp is not the tenant's")
    return findings


def _count(connection: Connection, query: str, *parameters: Any) -> int:
    row = connection.execute(query, parameters).fetchone()
    return row[0] if row else 0


# -- the server ------------------------------------------------------------------------------------------------------------------------

MANAGED_GAPS = (
    "hardening='managed': a tenant's role can take advisory locks until the server's shared lock table is full (D11)",
    "hardening='managed': a tenant's role can write large objects and temporary files without a limit (D10, D13)",
    "hardening='managed': a tenant's role can run PL/pgSQL (DO blocks), for instance to flood the log",
)
"""What only a superuser could close; named by `TenantDB.check` and in the docs."""

_PROVISIONER = """
SELECT rolsuper, rolcreatedb, rolcreaterole, pg_has_role(current_user, 'pg_signal_backend', 'USAGE') FROM pg_roles WHERE rolname =
current_user
"""
_TEMPLATE = "SELECT datistemplate, datallowconn FROM pg_database WHERE datname = 'tenantdb_tpl'"
_OPEN_DATABASES = """
SELECT datname FROM pg_database WHERE datname IN ('postgres', 'template1') AND EXISTS
    (SELECT 1 FROM aclexplode(coalesce(datacl, acldefault('d', datdba))) AS a WHERE a.grantee = 0)
"""


def server_report(connection: Connection, settings: Settings) -> ServerReport:
    """What keeps this login from provisioning, and what stays open on this server."""
    problems: list[str] = []
    warnings: list[str] = []
    is_super, may_create_databases, may_create_roles, may_signal = connection.execute(_PROVISIONER).fetchone() or (False,) * 4
    if is_super:
        warnings.append("the provisioner is a superuser; `tenantdb bootstrap-server` makes one that is not")
    if not (may_create_databases and may_create_roles):
        problems.append("the provisioner lacks CREATEDB or CREATEROLE; run `tenantdb bootstrap-server`")
    if not may_signal:
        warnings.append("the provisioner lacks pg_signal_backend, so it cannot end a tenant's sessions; run `tenantdb bootstrap-server`")
    if settings.hardening == "full":
        template = connection.execute(_TEMPLATE).fetchone()
        if template is None:
            problems.append("the template tenantdb_tpl is missing; run `tenantdb bootstrap-server`, or set hardening='managed'")
        elif template != (True, False):
            problems.append("the template tenantdb_tpl accepts connections or is no template; run `tenantdb bootstrap-server`")
    else:
        warnings += MANAGED_GAPS
    warnings += [
        f"PUBLIC may connect to database {name}; run `tenantdb bootstrap-server`" for (name,) in connection.execute(_OPEN_DATABASES)
    ]
    if connection.info.server_version < 160000:
        warnings.append(
            "before PostgreSQL 16 a role with CREATEROLE can reach the operating system: guard the provisioner like a superuser"
        )
    return ServerReport(problems, warnings)


# -- connections -----------------------------------------------------------------------------------------------------------------------

# Before PostgreSQL 16 there is no reserved_connections. What a login shows of itself in pg_stat_activity every other may read.
_ROOM = """
SELECT current_setting('max_connections')::int,
       current_setting('superuser_reserved_connections')::int + coalesce(current_setting('reserved_connections', true), '0')::int,
       EXISTS (SELECT FROM pg_stat_activity WHERE datname = %(registry)s AND application_name = %(us)s)
"""
# An owner role has a smaller limit than any runtime role, whatever the budget was when the tenant was made.
_NARROW_ROLES = """
SELECT count(*), coalesce(min(rolconnlimit), 0) FROM pg_roles
WHERE rolname ~ '^t_[0-9a-f]{16}$' AND rolconnlimit > %(owner)s AND rolconnlimit < %(wanted)s
"""


@dataclass(frozen=True, slots=True)
class Room:
    """How many connections a server has, and who else holds some. ``reserved`` are kept for superusers and the like.

    ``has_registry``: this process's open connections to the registry are connections of this server. ``narrow_roles`` of the tenants'
    runtime roles have a CONNECTION LIMIT below what was asked, ``narrowest`` the lowest of them.
    """

    max_connections: int
    reserved: int
    has_registry: bool
    narrow_roles: int
    narrowest: int


def room_on(server: str, url: ConnectionURL, settings: Settings, *, wanted_per_tenant: int) -> Room:
    """Look with the provisioner's eyes, after the registry was asked something. Raises: `ServerUnavailable`."""
    us = {"registry": settings.url.database, "us": f"tenantdb/{os.getpid()}"}
    with provisioner_connection(url, settings, server) as connection:
        max_connections, reserved, has_registry = connection.execute(_ROOM, us).fetchone() or (0, 0, False)
        wanted = {"owner": OWNER_CONNECTIONS, "wanted": wanted_per_tenant}
        narrow_roles, narrowest = connection.execute(_NARROW_ROLES, wanted).fetchone() or (0, 0)
    return Room(max_connections, reserved, has_registry, narrow_roles, narrowest)
