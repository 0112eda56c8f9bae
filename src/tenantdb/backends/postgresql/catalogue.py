"""What the shared catalogue says of tenants' databases and roles: a few queries, however many tenants there are.

`Catalogue.read` asks, `doors` and `drift` judge. A door lets somebody in who must stay out, and none is open when a tenant has just been
made; drift is what has changed since, by a role that altered itself, an operator, or a change of the settings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg
from psycopg import sql

from tenantdb.backends.postgresql.bootstrap import OWNER_CONNECTIONS, OWNER_GROUP
from tenantdb.backends.weakness import Severity, Weakness
from tenantdb.model import Fence, Tenant
from tenantdb.settings import Settings

Connection = psycopg.Connection[Any]

PROBLEM, WARNING = Severity.PROBLEM, Severity.WARNING
INVALID = -2  # datconnlimit of a database whose DROP was interrupted
LINGERING = 4  # backends whose client has gone and that the server still counts
NAME_PATTERN = "^t_[0-9a-f]{16}$"
ATTRIBUTES = ("SUPERUSER", "CREATEROLE", "CREATEDB", "REPLICATION", "BYPASSRLS")

_ME = "SELECT current_user::text"
_DATABASES = """
SELECT datname, pg_get_userbyid(datdba), datallowconn, datconnlimit FROM pg_database
WHERE %(databases)s::text[] IS NULL OR datname = ANY(%(databases)s)
"""
# A NULL datacl is not "nothing granted" but the default, which lets PUBLIC connect; hence acldefault.
_GRANTS = """
SELECT d.datname, CASE a.grantee WHEN 0 THEN NULL ELSE pg_get_userbyid(a.grantee) END, a.privilege_type
FROM pg_database d, aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) AS a
WHERE %(databases)s::text[] IS NULL OR d.datname = ANY(%(databases)s)
ORDER BY 1, 2 NULLS FIRST, 3
"""
_ROLES = f"""
SELECT rolname, rolcanlogin, rolconnlimit, rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls FROM pg_roles
WHERE rolname = ANY(%(roles)s) OR (%(databases)s::text[] IS NULL AND rolname ~ '{NAME_PATTERN}')
"""
_MEMBERSHIPS = """
SELECT g.rolname, m.rolname FROM pg_auth_members a JOIN pg_roles g ON g.oid = a.roleid JOIN pg_roles m ON m.oid = a.member
WHERE (g.rolname = ANY(%(roles)s) OR m.rolname = ANY(%(roles)s)) AND m.rolname <> current_user ORDER BY 1, 2
"""
_SETTINGS = """
SELECT d.datname, r.rolname, s.setconfig
FROM pg_db_role_setting s LEFT JOIN pg_database d ON d.oid = s.setdatabase LEFT JOIN pg_roles r ON r.oid = s.setrole
WHERE r.rolname = ANY(%(roles)s) OR (s.setrole = 0 AND (%(databases)s::text[] IS NULL OR d.datname = ANY(%(databases)s)))
"""


@dataclass(frozen=True, slots=True)
class Database:
    """A row of pg_database. ``grants`` by grantee; None is PUBLIC."""

    owner: str
    accepts: bool
    limit: int
    grants: Mapping[str | None, frozenset[str]]

    @property
    def invalid(self) -> bool:
        return self.limit == INVALID


@dataclass(frozen=True, slots=True)
class Role:
    """A row of pg_roles. ``groups`` are what it is a member of, ``members`` who is a member of it, the provisioner left out; ``settings``
    by database, None for all."""

    login: bool
    limit: int
    attributes: tuple[str, ...]
    groups: frozenset[str]
    members: frozenset[str]
    settings: Mapping[str | None, Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The shared catalogue at one moment. ``me`` is who asked: the provisioner."""

    me: str
    databases: Mapping[str, Database]
    roles: Mapping[str, Role]
    database_settings: Mapping[str, frozenset[str]]

    @classmethod
    def read(cls, connection: Connection, tenants: Iterable[Tenant], *, whole: bool) -> Catalogue:
        """What concerns these tenants; ``whole``: all databases, and all roles whose name looks like ours."""
        tenants = list(tenants)
        roles = [name for tenant in tenants for name in (tenant.owner_role, tenant.runtime_role) if name]
        asked = {"databases": None if whole else [tenant.database for tenant in tenants], "roles": roles}
        grants: dict[str, dict[str | None, set[str]]] = defaultdict(lambda: defaultdict(set))
        for database, grantee, privilege in connection.execute(_GRANTS, asked):
            grants[database][grantee].add(privilege)
        groups, members = defaultdict(set), defaultdict(set)
        for group, member in connection.execute(_MEMBERSHIPS, asked):
            groups[member].add(group)
            members[group].add(member)
        of_roles: dict[str, dict[str | None, dict[str, str]]] = defaultdict(dict)
        of_databases: dict[str, frozenset[str]] = {}
        for database, role, config in connection.execute(_SETTINGS, asked):
            values = dict(entry.split("=", 1) for entry in config)
            if role is not None:
                of_roles[role][database] = values
            elif database is not None:
                of_databases[database] = frozenset(values)
        return cls(
            me=_one(connection, _ME),
            databases={
                name: Database(owner, accepts, limit, {who: frozenset(what) for who, what in grants[name].items()})
                for name, owner, accepts, limit in connection.execute(_DATABASES, asked)
            },
            roles={
                name: Role(
                    login,
                    limit,
                    tuple(attribute for attribute, has in zip(ATTRIBUTES, has_them, strict=True) if has),
                    frozenset(groups[name]),
                    frozenset(members[name]),
                    of_roles[name],
                )
                for name, login, limit, *has_them in connection.execute(_ROLES, asked)
            },
            database_settings=of_databases,
        )


def _one(connection: Connection, query: str) -> Any:
    row = connection.execute(query).fetchone()
    return None if row is None else row[0]


def runtime_connections(settings: Settings) -> int:
    """The CONNECTION LIMIT of a runtime role: what the budget lets all processes together open, and what lingers."""
    return settings.budget.per_tenant * settings.budget.share_of + LINGERING


def statement(text: str, *names: str | sql.Composable) -> str:
    """SQL with quoted names, to be shown or run."""
    parts = [sql.Identifier(name) if isinstance(name, str) else name for name in names]
    return sql.SQL(text).format(*parts).as_string(None)


def run(*statements: str) -> Callable[[Connection], None]:
    """A way to mend: each statement by itself, for where one is refused the next may still help. What became of it is looked up."""

    def mend(connection: Connection) -> None:
        for each in statements:
            try:
                connection.execute(each.encode())
            except psycopg.OperationalError:
                raise  # the connection is gone, or the server is
            except psycopg.Error:
                continue

    return mend


@dataclass(frozen=True, slots=True)
class Findings:
    """Makes weaknesses of one tenant, or of none: the parts that they have in common."""

    tenant: UUID | None = None

    def problem(self, code: str, subject: str, text: str, repair: str | Sequence[str], mend: object = None) -> Weakness:
        return self._make(PROBLEM, code, subject, text, repair, mend)

    def warning(self, code: str, subject: str, text: str, repair: str | Sequence[str], mend: object = None) -> Weakness:
        return self._make(WARNING, code, subject, text, repair, mend)

    def _make(self, severity: Severity, code: str, subject: str, text: str, repair: str | Sequence[str], mend: object) -> Weakness:
        """``mend`` is True where the statements of ``repair`` are it, or a way of its own."""
        statements = [repair] if isinstance(repair, str) else list(repair)
        way: Any = run(*statements) if mend is True else mend
        return Weakness(code, severity, subject, text, "; ".join(statements), self.tenant, way)


def roles_of(tenant: Tenant) -> Iterator[tuple[str, str]]:
    """(``owner`` or ``runtime``, name) of both."""
    yield "owner", tenant.owner_role or ""
    yield "runtime", tenant.runtime_role or ""


def doors(catalogue: Catalogue, tenant: Tenant, settings: Settings) -> Iterator[Weakness]:
    """Who may enter, own or become what he must not."""
    database = catalogue.databases.get(tenant.database or "")
    if database is not None:
        yield from _database_doors(catalogue.me, database, tenant, settings)
    for which, name in roles_of(tenant):
        role = catalogue.roles.get(name)
        if role is not None:
            yield from _role_doors(which, name, role, tenant, settings)
        else:
            text = "a role of the tenant is missing"
            repair = f"find out who dropped it; CREATE ROLE {name} LOGIN, its grants, then `tenantdb doctor --repair` for its password"
            yield Findings(tenant.id).problem("role-missing", f"role {name}", text, repair)


def _database_doors(me: str, database: Database, tenant: Tenant, settings: Settings) -> Iterator[Weakness]:
    make, name, own = Findings(tenant.id), tenant.database or "", dict(roles_of(tenant))
    subject = f"database {name}"
    if database.owner != me:
        text = "the database does not belong to the provisioner"
        yield make.problem("database-owner", subject, text, statement("ALTER DATABASE {} OWNER TO {}", name, me))
    for grantee, privileges in database.grants.items():
        if grantee in (me, database.owner):
            continue
        for privilege in sorted(privileges):
            word = sql.SQL(privilege)
            if grantee is None:
                repair = statement("REVOKE {} ON DATABASE {} FROM PUBLIC", word, name)
                text = f"the database grants {privilege} for PUBLIC"
                yield make.problem(f"public-{privilege.lower()}", subject, text, repair, mend=True)
                continue
            repair = statement("REVOKE {} ON DATABASE {} FROM {}", word, name, grantee)
            which = next((which for which, role in own.items() if role == grantee), None)
            if which is None:
                yield make.problem("foreign-grant", subject, f"the database grants {privilege} for a foreign role", repair)
            elif privilege == "CREATE":
                yield make.problem("schema-creation", subject, f"the {which} role may create schemas in the database", repair)
            elif privilege == "TEMPORARY" and not settings.temporary_tables:
                text = f"the {which} role may create temporary tables, and temporary_tables is False"
                yield make.problem("temporary-granted", subject, text, repair)
    for which, role in own.items():
        if "CONNECT" not in database.grants.get(role, ()):
            repair = statement("GRANT CONNECT ON DATABASE {} TO {}", name, role)
            yield make.problem("connect-missing", subject, f"the {which} role may not connect to the database", repair, mend=True)


def _role_doors(which: str, name: str, role: Role, tenant: Tenant, settings: Settings) -> Iterator[Weakness]:
    make, subject = Findings(tenant.id), f"role {name}"
    if role.attributes:
        repairs = [statement("ALTER ROLE {} {}", name, sql.SQL(f"NO{attribute}")) for attribute in role.attributes]
        yield make.problem("role-attributes", subject, f"the {which} role has more rights than LOGIN", repairs, mend=True)
    allowed = {OWNER_GROUP} if which == "owner" and settings.hardening == "full" else set()
    if groups := sorted(role.groups - allowed):
        repairs = [statement("REVOKE {} FROM {}", group, name) for group in groups]
        yield make.problem("role-in-group", subject, f"the {which} role is a member of another role", repairs)
    if members := sorted(role.members):
        repairs = [statement("REVOKE {} FROM {}", name, member) for member in members]
        yield make.problem("role-has-members", subject, f"another role is a member of the {which} role", repairs)


def drift(catalogue: Catalogue, tenant: Tenant, settings: Settings) -> Iterator[Weakness]:
    """What is no longer as it was made."""
    make, name = Findings(tenant.id), tenant.database or ""
    subject, database = f"database {name}", catalogue.databases.get(name)
    if database is None:
        repair = "restore the tenant from a backup, or delete and purge it"
        yield make.problem("database-missing", subject, "the registry says that the database is here, and it is not", repair)
    elif database.invalid:
        text = "a DROP of the database was interrupted, and nobody can enter it any more"
        yield make.problem("database-invalid", subject, text, "restore the tenant from a backup, or delete and purge it")
    else:
        yield from _database_drift(catalogue, database, tenant, settings)
    for which, role_name in roles_of(tenant):
        if (role := catalogue.roles.get(role_name)) is not None:
            yield from _role_drift(which, role_name, role, tenant, settings)


def _database_drift(catalogue: Catalogue, database: Database, tenant: Tenant, settings: Settings) -> Iterator[Weakness]:
    make, name = Findings(tenant.id), tenant.database or ""
    subject = f"database {name}"
    if not database.accepts:
        text = f"the tenant is {tenant.state}, and its database accepts no connections"
        yield make.problem("database-closed", subject, text, statement("ALTER DATABASE {} ALLOW_CONNECTIONS true", name))
    wanted = runtime_connections(settings) + OWNER_CONNECTIONS
    if database.limit != wanted:
        yield _limit(make, subject, database.limit, wanted, statement("ALTER DATABASE {} CONNECTION LIMIT {}", name, sql.Literal(wanted)))
    if names := sorted(catalogue.database_settings.get(name, ())):
        repairs = [statement("ALTER DATABASE {} RESET {}", name, _setting(each)) for each in names]
        yield make.warning("database-settings", subject, f"the database has settings of its own: {', '.join(names)}", repairs)


def _role_drift(which: str, name: str, role: Role, tenant: Tenant, settings: Settings) -> Iterator[Weakness]:
    make, subject, full = Findings(tenant.id), f"role {name}", settings.hardening == "full"
    shut_out = which == "runtime" and tenant.fence is not None  # on purpose
    if not role.login and not shut_out:
        text = f"the tenant is {tenant.state}, and its {which} role may not log in"
        yield make.problem("login-lost", subject, text, statement("ALTER ROLE {} LOGIN", name), mend=True)
    if role.login and shut_out and tenant.fence is Fence.DONE:
        text = f"the tenant is {tenant.state}, and its {which} role may log in all the same"
        yield make.problem("fence-open", subject, text, statement("ALTER ROLE {} NOLOGIN", name))
    wanted = OWNER_CONNECTIONS if which == "owner" else runtime_connections(settings)
    if role.limit != wanted:
        yield _limit(make, subject, role.limit, wanted, statement("ALTER ROLE {} CONNECTION LIMIT {}", name, sql.Literal(wanted)))
    if full and which == "owner" and OWNER_GROUP not in role.groups:
        repair = statement("GRANT {} TO {}", OWNER_GROUP, name)
        text = f"the owner role is not a member of {OWNER_GROUP}, so migrations cannot use PL/pgSQL"
        yield make.problem("owner-group-missing", subject, text, repair)
    changed, repairs = set(), []
    for database, values in sorted(role.settings.items(), key=lambda item: item[0] or ""):
        for each in sorted(values):
            if full and (which, database, each) == ("runtime", None, "temp_file_limit"):
                continue
            where = sql.SQL("") if database is None else sql.SQL(" IN DATABASE {}").format(sql.Identifier(database))
            changed.add(each)
            repairs.append(statement("ALTER ROLE {}{} RESET {}", name, where, _setting(each)))
    if changed:
        text = f"the {which} role has settings of its own, which only it or an operator can have made: {', '.join(sorted(changed))}"
        yield make.problem("role-settings", subject, text, repairs, mend=True)
    if full and which == "runtime" and role.settings.get(None, {}).get("temp_file_limit", "-1") == "-1":
        repair = statement("ALTER ROLE {} SET temp_file_limit = '1GB'", name)
        yield make.problem("temp-file-limit", subject, "the runtime role can fill the disk with temporary files", repair)


def _limit(make: Findings, subject: str, found: int, wanted: int, repair: str) -> Weakness:
    if found == -1:
        return make.problem("connection-limit", subject, f"there is no CONNECTION LIMIT; the budget asks for {wanted}", repair, mend=True)
    text = f"the CONNECTION LIMIT is {found}; the budget of this process's settings asks for {wanted}"
    return make.warning("connection-limit", subject, text, repair, mend=True)


def _setting(name: str) -> sql.Composable:
    return sql.SQL(".").join(sql.Identifier(part) for part in name.split("."))
