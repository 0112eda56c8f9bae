"""What is more open than it must be: read back from the catalogue, never assumed from the statements that were sent.

Here for who has just made a database (`database_findings`) and for `TenantDB.check` (`server_report`, `room_on`); the doctor asks the same
questions of everything at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from tenantdb.backends.base import ServerReport
from tenantdb.backends.postgresql.bootstrap import OWNER_CONNECTIONS, OWNER_GROUP, TEMPLATE
from tenantdb.backends.postgresql.catalogue import NAME_PATTERN, Catalogue, Connection, Findings, doors, statement
from tenantdb.backends.postgresql.connect import provisioner_connection
from tenantdb.backends.postgresql.interior import SAFE_PATH, look_inside
from tenantdb.backends.weakness import Severity, Weakness
from tenantdb.model import Server, Template, Tenant, TenantState
from tenantdb.settings import ConnectionURL, Settings


def database_findings(connection: Connection, tenant: Tenant, server: Server, settings: Settings) -> list[str]:
    """Look at one tenant's database from inside, as the provisioner: problems alone, in words."""
    connection.execute(SAFE_PATH)
    found = [
        *doors(Catalogue.read(connection, [tenant], whole=False), tenant, settings),
        *look_inside(connection, tenant, server, settings),
    ]
    return [weakness.text for weakness in found if weakness.severity is Severity.PROBLEM]


# What cloning and fitting can have left open, in one question: the rest was looked at in the golden database, and to ask for all of it
# again would take as long as the cloning.
_CLONE = """
WITH me AS (SELECT oid FROM pg_roles WHERE rolname = current_user),
     own AS (SELECT oid, rolname, rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls AS strong
             FROM pg_roles WHERE rolname = ANY(%(roles)s)),
     db AS (SELECT datdba, datacl FROM pg_database WHERE datname = current_database())
SELECT 'the database does not belong to the provisioner' FROM db, me WHERE db.datdba <> me.oid
UNION ALL
SELECT 'the database grants ' || a.privilege_type || CASE a.grantee WHEN 0 THEN ' for PUBLIC' ELSE ' for a foreign role' END
FROM db, me, aclexplode(coalesce(db.datacl, acldefault('d', db.datdba))) AS a
WHERE a.grantee <> me.oid AND (a.grantee NOT IN (SELECT oid FROM own) OR a.privilege_type <> ALL(%(rights)s))
UNION ALL
SELECT 'a role of the tenant is missing' WHERE (SELECT count(*) FROM own) <> 2
UNION ALL
SELECT 'a role of the tenant has more rights than LOGIN' FROM own WHERE strong
UNION ALL
SELECT 'a role of the tenant is a member of another role'
FROM own JOIN pg_auth_members m ON m.member = own.oid JOIN pg_roles g ON g.oid = m.roleid
WHERE own.rolname <> %(owner)s OR g.rolname <> ALL(%(groups)s)
UNION ALL
SELECT 'another role is a member of a role of the tenant' FROM me, own JOIN pg_auth_members m ON m.roleid = own.oid WHERE m.member <> me.oid
UNION ALL
SELECT 'PUBLIC may use schema ' || n.nspname FROM pg_namespace n, aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) AS a
WHERE a.grantee = 0 AND n.nspname NOT IN ('pg_catalog', 'information_schema')
UNION ALL
SELECT 'schema ' || nspname || ' does not belong to the owner role' FROM pg_namespace
WHERE nspname = ANY(%(schemas)s) AND pg_get_userbyid(nspowner) <> %(owner)s
UNION ALL
SELECT 'the identity stamp is not the tenant''s'
WHERE (SELECT array_agg(tenant_id) FROM ONLY tenantdb.identity) IS DISTINCT FROM ARRAY[%(tenant)s::uuid]
"""


def clone_findings(connection: Connection, tenant: Tenant, server: Server, settings: Settings) -> list[str]:
    """The same of a database that was cloned and fitted a moment ago."""
    asked = {
        "roles": [tenant.owner_role, tenant.runtime_role],
        "owner": tenant.owner_role,
        "groups": [OWNER_GROUP] if settings.hardening == "full" else [],
        "rights": ["CONNECT", "TEMPORARY"] if settings.temporary_tables else ["CONNECT"],
        "schemas": ["public", *server.schemas],
        "tenant": str(tenant.id),
    }
    return [text for (text,) in connection.execute(_CLONE, asked)]


def template_findings(connection: Connection, template: Template, server: Server, settings: Settings) -> list[str]:
    """The same of a golden database, which has no runtime role and no identity stamp yet."""
    connection.execute(SAFE_PATH)
    as_tenant = Tenant(
        id=template.id, slug=template.database, name="", state=TenantState.SPARE, database=template.database, owner_role=template.owner_role
    )
    found = look_inside(connection, as_tenant, server, settings)
    return [weakness.text for weakness in found if weakness.code in _OF_A_TEMPLATE]


_OF_A_TEMPLATE = frozenset({"public-schema", "schema-owner", "public-functions", "doors-open", "plpgsql-public", "extension"})


# -- the server ------------------------------------------------------------------------------------------------------------------------

MANAGED_GAPS = (
    "hardening='managed': a tenant's role can take advisory locks until the server's shared lock table is full (D11)",
    "hardening='managed': a tenant's role can write large objects and temporary files without a limit (D10, D13)",
    "hardening='managed': a tenant's role can run PL/pgSQL (DO blocks), for instance to flood the log",
)
"""What only a superuser could close; named by `TenantDB.check` and in the docs."""

_PROVISIONER = """
SELECT rolname, rolsuper, rolcreatedb, rolcreaterole, pg_has_role(current_user, 'pg_signal_backend', 'USAGE'),
       rolreplication OR rolbypassrls OR EXISTS (
           SELECT FROM pg_roles g WHERE g.rolname IN ('pg_execute_server_program', 'pg_read_server_files', 'pg_write_server_files')
                                    AND pg_has_role(current_user, g.oid, 'MEMBER'))
FROM pg_roles WHERE rolname = current_user
"""
_TEMPLATE = "SELECT datistemplate, datallowconn FROM pg_database WHERE datname = %s"
_OPEN_DATABASES = """
SELECT datname FROM pg_database WHERE datname IN ('postgres', 'template1') AND EXISTS
    (SELECT 1 FROM aclexplode(coalesce(datacl, acldefault('d', datdba))) AS a WHERE a.grantee = 0) ORDER BY 1
"""
_KEEP_FROM_WORKING = frozenset({"provisioner-rights", "template-missing", "template-open"})


def server_report(connection: Connection, settings: Settings) -> ServerReport:
    """What keeps this login from provisioning, and what stays open on this server."""
    found = list(server_doors(connection, settings))
    problems = [weakness.text for weakness in found if weakness.code in _KEEP_FROM_WORKING]
    return ServerReport(problems, [weakness.text for weakness in found if weakness.code not in _KEEP_FROM_WORKING])


def server_doors(connection: Connection, settings: Settings) -> Iterator[Weakness]:
    """The provisioner's own rights, the template, the databases that every server has."""
    yield from _provisioner(connection)
    bootstrap = "`tenantdb bootstrap-server`, as a superuser"
    if settings.hardening == "full":
        template, subject = connection.execute(_TEMPLATE, [TEMPLATE]).fetchone(), f"database {TEMPLATE}"
        if template is None:
            text = f"the template {TEMPLATE} is missing; run `tenantdb bootstrap-server`, or set hardening='managed'"
            yield Findings().problem("template-missing", subject, text, bootstrap)
        elif template != (True, False):
            text = f"the template {TEMPLATE} accepts connections or is no template; run `tenantdb bootstrap-server`"
            repair = statement("ALTER DATABASE {} ALLOW_CONNECTIONS false IS_TEMPLATE true", TEMPLATE)
            yield Findings().problem("template-open", subject, text, repair, mend=True)
    else:
        for text in MANAGED_GAPS:
            yield Findings().warning(
                "managed-gap", "server", text, "hardening='full', where a superuser can run `tenantdb bootstrap-server`"
            )
    for (name,) in connection.execute(_OPEN_DATABASES).fetchall():
        text = f"PUBLIC may connect to database {name}; run `tenantdb bootstrap-server`"
        repair = f"as a superuser: {statement('REVOKE CONNECT, TEMPORARY ON DATABASE {} FROM PUBLIC', name)}"
        yield Findings().problem("public-connect", f"database {name}", text, repair)


def _provisioner(connection: Connection) -> Iterator[Weakness]:
    row = connection.execute(_PROVISIONER).fetchone() or ("", False, False, False, False, False)
    name, is_super, may_create_databases, may_create_roles, may_signal, may_more = row
    subject, bootstrap = f"role {name}", "`tenantdb bootstrap-server`, as a superuser"
    if is_super:
        text = "the provisioner is a superuser; `tenantdb bootstrap-server` makes one that is not"
        yield Findings().problem("provisioner-overprivileged", subject, text, bootstrap)
    elif may_more:
        text = "the provisioner may replicate, pass over row security, or reach files or programs of the server, none of which it needs"
        yield Findings().problem("provisioner-overprivileged", subject, text, f"take from {name} what `bootstrap-server` does not give")
    if not (may_create_databases and may_create_roles):
        text = "the provisioner lacks CREATEDB or CREATEROLE; run `tenantdb bootstrap-server`"
        yield Findings().problem("provisioner-rights", subject, text, bootstrap)
    if not may_signal:
        text = "the provisioner lacks pg_signal_backend, so it cannot end a tenant's sessions; run `tenantdb bootstrap-server`"
        yield Findings().warning("provisioner-signal", subject, text, bootstrap)
    if connection.info.server_version < 160000:
        text = "before PostgreSQL 16 a role with CREATEROLE can reach the operating system: guard the provisioner like a superuser"
        yield Findings().warning("provisioner-createrole", subject, text, "PostgreSQL 16 or later")


# -- connections -----------------------------------------------------------------------------------------------------------------------

# Before PostgreSQL 16 there is no reserved_connections. What a login shows of itself in pg_stat_activity every other may read.
_ROOM = """
SELECT current_setting('max_connections')::int,
       current_setting('superuser_reserved_connections')::int + coalesce(current_setting('reserved_connections', true), '0')::int,
       EXISTS (SELECT FROM pg_stat_activity WHERE datname = %(registry)s AND application_name = %(us)s)
"""
# An owner role has a smaller limit than any runtime role, whatever the budget was when the tenant was made.
_NARROW_ROLES = f"""
SELECT count(*), coalesce(min(rolconnlimit), 0) FROM pg_roles
WHERE rolname ~ '{NAME_PATTERN}' AND rolconnlimit > %(owner)s AND rolconnlimit < %(wanted)s
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
