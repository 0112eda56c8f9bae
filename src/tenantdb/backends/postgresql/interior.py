"""What a tenant's database says of itself, asked from inside as the provisioner.

The owner role rules in there and may have planted functions, operators, views and triggers, which would run with the rights of whoever
touches them. So everything here is a read of ``pg_catalog`` or a GRANT or REVOKE, which run nobody's code, with ``pg_catalog`` alone on the
search path; and of what is not in ``pg_catalog`` only the identity stamp is read, after a look at whether it is still a table of ours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psycopg
from psycopg import sql

from tenantdb.backends.postgresql import recordlog
from tenantdb.backends.postgresql.bootstrap import DOORS
from tenantdb.backends.postgresql.catalogue import Connection, Findings, run, statement
from tenantdb.backends.weakness import Weakness
from tenantdb.model import Server, Tenant
from tenantdb.settings import Settings

SAFE_PATH = "SET search_path = pg_catalog, pg_temp"

_SCHEMAS = """
SELECT n.nspname, pg_get_userbyid(n.nspowner),
       EXISTS (SELECT FROM aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) AS a WHERE a.grantee = 0)
FROM pg_namespace n WHERE n.nspname NOT IN ('pg_catalog', 'information_schema') ORDER BY 1
"""
_RUNTIME_OWNS = """
SELECT count(*) FROM (
    SELECT relowner AS owner FROM pg_class WHERE relpersistence <> 't'
    UNION ALL SELECT proowner FROM pg_proc UNION ALL SELECT nspowner FROM pg_namespace WHERE nspname !~ '^pg_'
) AS owned WHERE owner = (SELECT oid FROM pg_roles WHERE rolname = %s)
"""
# An extension's, or those that make the values of a range type, which are always the superuser's.
_NOBODYS = "EXISTS (SELECT FROM pg_depend e WHERE e.classid = 'pg_proc'::regclass AND e.objid = p.oid AND e.deptype IN ('e', 'i'))"
_FUNCTIONS = f"""
SELECT n.nspname, format('%%I.%%I(%%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid)),
       EXISTS (SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a WHERE a.grantee = 0),
       p.prosecdef AND NOT EXISTS (SELECT FROM unnest(p.proconfig) AS c WHERE c LIKE 'search_path=%%')
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname NOT IN ('pg_catalog', 'information_schema') AND NOT {_NOBODYS} ORDER BY 2
"""
# An extension brings functions that PUBLIC may execute, and some of them reach files and other servers (dblink, file_fdw). So what the
# template holds must have been asked for, or be required by one that was.
EXTENSIONS = """
WITH RECURSIVE wanted(oid) AS (
    SELECT oid FROM pg_extension WHERE extname = 'plpgsql' OR extname = ANY(%s)
    UNION SELECT d.refobjid FROM pg_depend d JOIN wanted w ON d.objid = w.oid
    WHERE d.classid = 'pg_extension'::regclass AND d.refclassid = 'pg_extension'::regclass
)
SELECT extname FROM pg_extension WHERE oid NOT IN (SELECT oid FROM wanted) ORDER BY extname
"""
_DOORS = f"""
SELECT EXISTS (SELECT FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace AND {DOORS}
                                     AND has_function_privilege('public', oid, 'EXECUTE')),
       has_language_privilege('public', 'plpgsql', 'USAGE')
"""
_DEFAULTS = """
SELECT n.nspname, d.defaclobjtype::text, CASE a.grantee WHEN 0 THEN NULL ELSE pg_get_userbyid(a.grantee) END, a.privilege_type
FROM pg_default_acl d LEFT JOIN pg_namespace n ON n.oid = d.defaclnamespace LEFT JOIN LATERAL aclexplode(d.defaclacl) AS a ON true
WHERE d.defaclrole = (SELECT oid FROM pg_roles WHERE rolname = %s)
"""
_STAMP = """
SELECT c.relkind = 'r' AND c.relowner = me.oid AND n.nspowner = me.oid
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace, pg_roles me
WHERE n.nspname = 'tenantdb' AND c.relname = 'identity' AND me.rolname = current_user
"""
_RECORD_LOG = "SELECT to_regclass('tenantdb.audit') IS NOT NULL OR to_regnamespace('tenantdb') IS NULL"  # without the schema: no stamp
_IDENTITY = "SELECT tenant_id::text FROM ONLY tenantdb.identity"

_KINDS = {
    "r": ("TABLES", frozenset({"SELECT", "INSERT", "UPDATE", "DELETE"})),
    "S": ("SEQUENCES", frozenset({"USAGE", "SELECT"})),
    "f": ("FUNCTIONS", frozenset({"EXECUTE"})),
    "T": ("TYPES", frozenset({"USAGE"})),
}
"""What the runtime role gets of all that migrations make; see `PostgreSQLWorkshop.open_database`."""


def look_inside(connection: Connection, tenant: Tenant, server: Server, settings: Settings) -> Iterator[Weakness]:
    """Everything that is weaker than it must be in one tenant's database."""
    make, subject = Findings(tenant.id), f"database {tenant.database}"
    schemas = connection.execute(_SCHEMAS).fetchall()
    yield from _schemas(make, schemas, tenant, server)
    row = connection.execute(_RUNTIME_OWNS, [tenant.runtime_role]).fetchone()
    if row is None or row[0]:
        repair = statement("REASSIGN OWNED BY {} TO {}", tenant.runtime_role or "", tenant.owner_role or "")
        yield make.problem("runtime-owns", subject, "the runtime role owns relations", f"as a superuser in the database: {repair}")
    yield from _functions(make, connection, tenant)
    known = [name for name, _, _ in schemas if name in ("public", *server.schemas)]
    yield from _defaults(make, connection, tenant, known)
    if settings.hardening == "full":
        yield from _closed_by_the_template(make, connection, subject)
    for (name,) in connection.execute(EXTENSIONS, [list(server.extensions)]).fetchall():
        text = f"the extension {name} is there, and the server's extensions= do not name it"
        repair = statement("as a superuser in the database: DROP EXTENSION {}; or name it in db.servers.add(extensions=...)", name)
        yield make.problem("extension", subject, text, repair)
    if not _stamped(connection, tenant):
        repair = "find out which tenant's database this is before anybody uses it; a restored copy is brought in with its own stamp"
        yield make.problem("identity", subject, "the identity stamp is not the tenant's", repair)
    row = connection.execute(_RECORD_LOG).fetchone()
    if row is None or not row[0]:
        names = sql.Identifier(tenant.owner_role or ""), sql.Identifier(tenant.runtime_role or "")
        yield make.problem(
            "record-log-missing",
            subject,
            "the database has no audit log of its records, as those made before there was one",
            "`tenantdb doctor --repair` makes it",
            mend=lambda inside: recordlog.make(inside, *names),
        )


def _schemas(make: Findings, schemas: Sequence[tuple[Any, ...]], tenant: Tenant, server: Server) -> Iterator[Weakness]:
    owner_role = tenant.owner_role or ""
    for name, owner, is_public in schemas:
        subject = f"schema {name} of {tenant.database}"
        if is_public:
            revoke = statement("REVOKE ALL ON SCHEMA {} FROM PUBLIC", name)
            as_owner = owner == owner_role
            yield make.problem(
                "public-schema",
                subject,
                f"PUBLIC may use schema {name}",
                _inside(tenant, [revoke], as_owner=as_owner),
                mend=acting_as(owner_role, revoke) if as_owner else run(revoke),
            )
        if name in ("public", *server.schemas) and owner != owner_role:
            repair = f"as a superuser in the database: {statement('ALTER SCHEMA {} OWNER TO {}', name, owner_role)}"
            yield make.problem("schema-owner", subject, f"schema {name} does not belong to the owner role", repair)


def _functions(make: Findings, connection: Connection, tenant: Tenant) -> Iterator[Weakness]:
    found = connection.execute(_FUNCTIONS, []).fetchall()
    subject, runtime = f"functions of {tenant.database}", tenant.runtime_role or ""
    if opened := [name for _, name, is_public, _ in found if is_public]:
        # What the runtime role could call only because everybody could, it can still call.
        pairs = [("GRANT EXECUTE ON ROUTINE {} TO {}", runtime), ("REVOKE EXECUTE ON ROUTINE {} FROM PUBLIC",)]
        repairs = [statement(text, sql.SQL(name), *names) for name in opened for text, *names in pairs]
        yield make.problem(
            "public-functions",
            subject,
            "PUBLIC may execute functions of the tenant",
            _inside(tenant, repairs, as_owner=True),
            mend=acting_as(tenant.owner_role or "", *repairs),
        )
    if unsafe := [name for _, name, _, is_unsafe in found if is_unsafe]:
        # What a person makes of it: the functions may need more schemas than these.
        repairs = [statement("ALTER ROUTINE {} SET search_path = pg_catalog, public, pg_temp", sql.SQL(name)) for name in unsafe]
        yield make.warning(
            "security-definer",
            subject,
            f"SECURITY DEFINER functions have no search_path of their own: {', '.join(unsafe)}",
            f"in a migration: {'; '.join(repairs)}",
        )


def _defaults(make: Findings, connection: Connection, tenant: Tenant, schemas: Sequence[str]) -> Iterator[Weakness]:
    """What will hold for objects that later migrations make. Default privileges belong to the role that makes them: the owner."""
    owner, runtime, subject = tenant.owner_role or "", tenant.runtime_role or "", f"default privileges in {tenant.database}"
    granted: dict[tuple[str | None, str], dict[str | None, set[str]]] = defaultdict(lambda: defaultdict(set))
    for schema, kind, grantee, privilege in connection.execute(_DEFAULTS, [owner]):
        granted[schema, kind]  # there, even if it grants nothing
        if privilege is not None:
            granted[schema, kind][grantee].add(privilege)
    for schema in schemas:
        missing = []
        for kind, (plural, wanted) in _KINDS.items():
            if lacking := sorted(wanted - granted[schema, kind][runtime] - granted.get((None, kind), {}).get(runtime, set())):
                words = sql.SQL(", ".join(lacking)), sql.Identifier(schema), sql.SQL(plural), sql.Identifier(runtime)
                grant = sql.SQL("ALTER DEFAULT PRIVILEGES IN SCHEMA {1} GRANT {0} ON {2} TO {3}").format(*words).as_string(None)
                missing.append((plural.lower(), grant))
        if missing:
            text = (
                f"{', '.join(plural for plural, _ in missing)} that later migrations make in schema {schema} are not for the runtime role"
            )
            repair = _inside(tenant, [grant for _, grant in missing], as_owner=True)
            yield make.problem("default-privileges", subject, text, repair)
    for kind, plural, privilege in (("f", "FUNCTIONS", "EXECUTE"), ("T", "TYPES", "USAGE")):
        opened = [where for (where, of), grants in granted.items() if of == kind and None in grants]
        revokes = [_revoke_default(privilege, plural, where) for where in opened]
        if (None, kind) not in granted:  # PostgreSQL's own default holds, and lets PUBLIC in
            revokes.append(_revoke_default(privilege, plural, None))
        if revokes:
            text = f"PUBLIC will have {privilege} on {plural.lower()} that later migrations make"
            repair = _inside(tenant, revokes, as_owner=True)
            yield make.problem("default-public", subject, text, repair, mend=acting_as(owner, *revokes))


def _revoke_default(privilege: str, plural: str, schema: str | None) -> str:
    where = sql.SQL("") if schema is None else sql.SQL(" IN SCHEMA {}").format(sql.Identifier(schema))
    return statement("ALTER DEFAULT PRIVILEGES{} REVOKE {} ON {} FROM PUBLIC", where, sql.SQL(privilege), sql.SQL(plural))


def _closed_by_the_template(make: Findings, connection: Connection, subject: str) -> Iterator[Weakness]:
    functions, plpgsql = connection.execute(_DOORS).fetchone() or (True, True)
    if functions:
        text = "PUBLIC may take advisory locks or write large objects; run `tenantdb bootstrap-server`"
        repair = "as a superuser in the database, the REVOKEs that `tenantdb bootstrap-server --print` shows for the template"
        yield make.problem("doors-open", subject, text, repair)
    if plpgsql:
        repair = "as a superuser in the database: REVOKE USAGE ON LANGUAGE plpgsql FROM PUBLIC"
        yield make.problem("plpgsql-public", subject, "PUBLIC may use PL/pgSQL; run `tenantdb bootstrap-server`", repair)


def _stamped(connection: Connection, tenant: Tenant) -> bool:
    row = connection.execute(_STAMP).fetchone()
    if row is None or not row[0]:  # gone, or somebody else's, perhaps a view that runs what its owner likes
        return False
    return connection.execute(_IDENTITY).fetchall() == [(str(tenant.id),)]


def _inside(tenant: Tenant, statements: Sequence[str], *, as_owner: bool) -> str:
    """Where and as whom a person runs them."""
    who = f"as {tenant.owner_role} " if as_owner else ""
    return f"{who}in {tenant.database}: {'; '.join(statements)}"


def acting_as(role: str, *statements: str) -> Callable[[Connection], None]:
    """A way to mend with the rights of a tenant's owner role: a REVOKE works only as who granted. The provisioner is a member of the role
    for the length of the transaction."""

    def mend(connection: Connection) -> None:
        options = sql.SQL(" WITH INHERIT FALSE, SET TRUE") if connection.info.server_version >= 160000 else sql.SQL("")
        try:
            with connection.transaction():
                connection.execute(statement("GRANT {} TO CURRENT_USER{}", role, options).encode())
                connection.execute(statement("SET LOCAL ROLE {}", role).encode())
                for each in statements:
                    connection.execute(each.encode())
                connection.execute("RESET ROLE")
                connection.execute(statement("REVOKE {} FROM CURRENT_USER", role).encode())
        except psycopg.OperationalError:
            raise
        except psycopg.Error:
            return  # nothing was changed, and the second look says so

    return mend
