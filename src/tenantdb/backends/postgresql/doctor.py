"""The doctor's rounds on one PostgreSQL server: the server itself, all tenants as the shared catalogue shows them, each database inside.

Everything happens as the provisioner. What is mended by itself takes from PUBLIC, gives a tenant's own roles what they have had, or sets
back what a role has set for itself. No data, no extension and no function is ever dropped; of databases only one whose DROP was
interrupted, and only where the registry says that its tenant is being purged.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psycopg
from psycopg import sql

from tenantdb.backends.postgresql import scram
from tenantdb.backends.postgresql.catalogue import (
    NAME_PATTERN,
    Catalogue,
    Connection,
    Findings,
    doors,
    drift,
    roles_of,
    run,
    statement,
)
from tenantdb.backends.postgresql.connect import is_refused_password, provisioner_connection, transport
from tenantdb.backends.postgresql.inspect import server_doors
from tenantdb.backends.postgresql.interior import look_inside
from tenantdb.backends.weakness import Diagnosis, Patient, ServerExamination, Weakness, treat
from tenantdb.errors import ServerUnavailable
from tenantdb.model import DatabaseRole, Fence, Server, Template, TemplateState, Tenant, TenantState
from tenantdb.settings import ConnectionURL, Settings, is_local

MANY_DATABASES = 500
"""From so many on, recovery after a crash takes noticeably longer than it must: 45 s against 1.3 s with 2,000 databases (measured)."""

_TIMEOUT = 30  # seconds that one look may take
_SESSION = f"-c search_path=pg_catalog,pg_temp -c statement_timeout={_TIMEOUT}s -c lock_timeout=5s -c default_transaction_read_only=off"

_SETTINGS = """
SELECT current_setting('password_encryption'), current_setting('recovery_init_sync_method', true), (SELECT count(*) FROM pg_database)
"""
_FOREIGN_OPEN = """
SELECT datname FROM pg_database
WHERE datallowconn AND datname NOT IN ('postgres', 'template1') AND datname <> ALL(%s) AND EXISTS
    (SELECT FROM aclexplode(coalesce(datacl, acldefault('d', datdba))) AS a WHERE a.grantee = 0 AND a.privilege_type = 'CONNECT') ORDER BY 1
"""
_GOLDEN = "SELECT datname FROM pg_database WHERE datallowconn AND datname = ANY(%s) ORDER BY 1"


class PostgreSQLDoctor:
    """See `tenantdb.backends.protocols.Doctor`."""

    def __init__(self, server: Server, url: ConnectionURL, settings: Settings) -> None:
        self._server = server
        self._url = url
        self._settings = settings

    def examine_server(self, patients: Sequence[Patient], templates: Sequence[Template], *, whole: bool, repair: bool) -> ServerExamination:
        patients = [patient for patient in patients if patient.tenant.database]
        tenants = [patient.tenant for patient in patients]
        catalogue: Catalogue | None = None

        def look() -> list[Weakness]:
            nonlocal catalogue
            catalogue = Catalogue.read(connection, tenants, whole=whole)
            found = [*self._server_wide(connection, tenants, templates)] if whole else []
            for patient in patients:
                found += map(functools.partial(_only_if_unchanged, patient), self._from_outside(catalogue, patient))
            return found

        with self._session() as connection:
            found = treat(look, connection, repair=repair)
            assert catalogue is not None
            kinds = (("database", "datname", "pg_database"), ("role", "rolname", "pg_roles"))
            ours = {
                name: kind
                for kind, column, table in kinds
                for (name,) in (connection.execute(f"SELECT {column} FROM {table} WHERE {column} ~ '{NAME_PATTERN}'") if whole else ())
            }
        enterable = frozenset(name for name, database in catalogue.databases.items() if database.accepts and not database.invalid)
        return ServerExamination(found, enterable, ours)

    def examine_inside(self, patient: Patient, *, repair: bool) -> list[Diagnosis]:
        tenant = patient.tenant

        def look() -> list[Weakness]:
            found = [*look_inside(connection, tenant, self._server, self._settings), *self._logins(patient)]
            return [_only_if_unchanged(patient, weakness) for weakness in found]

        with self._session(tenant.database) as connection:
            return treat(look, connection, repair=repair)

    @contextmanager
    def _session(self, database: str | None = None) -> Iterator[Connection]:
        try:
            with provisioner_connection(self._url, self._settings, self._server.name, database=database, options=_SESSION) as connection:
                yield connection
        except psycopg.Error as error:
            raise ServerUnavailable(self._server.name, f"it refused a question of the doctor (SQLSTATE {error.sqlstate})") from error

    # -- the server --------------------------------------------------------------------------------------------------------------------

    def _server_wide(self, connection: Connection, tenants: Sequence[Tenant], templates: Sequence[Template]) -> Iterator[Weakness]:
        yield from server_doors(connection, self._settings)
        make = Findings()
        golden = [template.database for template in templates]
        closed = [template.database for template in templates if template.state is not TemplateState.BUILDING]
        for (name,) in connection.execute(_GOLDEN, [closed]).fetchall():
            repair = statement("ALTER DATABASE {} ALLOW_CONNECTIONS false", name)
            text = "a golden database accepts connections, and one session in it keeps it from being cloned"
            yield make.problem("template-open", f"database {name}", text, repair, mend=True)
        known = [*golden, *(tenant.database for tenant in tenants)]
        for (name,) in connection.execute(_FOREIGN_OPEN, [known]).fetchall():
            text = "PUBLIC may connect to this database, tenants' roles too; it is none of ours"
            repair = f"as its owner: {statement('REVOKE CONNECT, TEMPORARY ON DATABASE {} FROM PUBLIC', name)}"
            yield make.warning("foreign-database-open", f"database {name}", text, repair)
        encryption, sync_method, databases = connection.execute(_SETTINGS).fetchone() or ("", None, 0)
        if encryption != "scram-sha-256":
            text = f"password_encryption is {encryption}: passwords that people set are stored in a form that can be guessed quickly"
            yield make.warning("password-encryption", "server", text, "password_encryption = 'scram-sha-256' in postgresql.conf")
        if sync_method == "fsync" and databases >= MANY_DATABASES:
            text = f"recovery_init_sync_method is fsync, and there are {databases} databases: after a crash each of their files is opened"
            yield make.warning("slow-recovery", "server", text, "recovery_init_sync_method = 'syncfs' in postgresql.conf (on Linux)")
        if not is_local(self._url.host) and not connection.pgconn.ssl_in_use:
            text = "the connection to this server, which is not on this machine, is not encrypted"
            yield make.problem("tls-off", "server", text, "a certificate for the server and ssl = on; then no insecure_transport=True")

    # -- one tenant --------------------------------------------------------------------------------------------------------------------

    def _from_outside(self, catalogue: Catalogue, patient: Patient) -> Iterator[Weakness]:
        tenant = patient.tenant
        if patient.must_be_whole:
            yield from doors(catalogue, tenant, self._settings)
            yield from drift(catalogue, tenant, self._settings)
            return
        database, name = catalogue.databases.get(tenant.database or ""), tenant.database or ""
        if database is None:
            return
        make, subject = Findings(tenant.id), f"database {name}"
        if database.invalid and tenant.state is TenantState.PURGING:
            text = "the tenant is being purged, and the DROP of its database was interrupted"
            yield make.problem("database-invalid", subject, text, statement("DROP DATABASE {}", name), mend=True)
        elif database.accepts and tenant.fence is Fence.DONE:
            text = f"the tenant is {tenant.state}, and its database accepts connections all the same"
            yield make.problem("fence-open", subject, text, statement("ALTER DATABASE {} ALLOW_CONNECTIONS false", name))

    def _logins(self, patient: Patient) -> Iterator[Weakness]:
        """Whether the passwords of the registry are those of the server, which only a login can tell: a role may change its own."""
        for (which, name), role in zip(roles_of(patient.tenant), (DatabaseRole.OWNER, DatabaseRole.RUNTIME), strict=True):
            if role is DatabaseRole.RUNTIME and patient.tenant.fence is not None:
                continue
            if not self._is_refused(patient, role, name):
                continue
            text = f"the {which} role's password is not the one that the registry holds"
            repair = f"`tenantdb doctor --repair --tenant {patient.tenant.slug}`, which sets the registry's again"
            mend = functools.partial(self._set_password, patient, role, name)
            yield Findings(patient.tenant.id).problem("password-lost", f"role {name}", text, repair, mend)

    def _is_refused(self, patient: Patient, role: DatabaseRole, name: str) -> bool:
        host, password = self._server.direct_host, patient.password(role)
        if password is None:
            return False
        try:
            psycopg.connect(
                host=host,
                port=self._server.direct_port,
                user=name,
                dbname=patient.tenant.database,
                password=password.get_secret_value(),
                **transport(host, self._settings),
            ).close()
        except psycopg.OperationalError as error:
            return is_refused_password(error)  # whatever else keeps it out has a finding of its own, or passes
        return False

    def _set_password(self, patient: Patient, role: DatabaseRole, name: str, connection: Connection) -> None:
        """What the registry holds now: another process may have begun a rotation since the look."""
        password = patient.password(role)
        if password is None:
            return
        verifier = scram.verifier(password.get_secret_value(), iterations=self._settings.scram_iterations)
        run(statement("ALTER ROLE {} PASSWORD {} VALID UNTIL 'infinity'", name, sql.Literal(verifier)))(connection)


def _only_if_unchanged(patient: Patient, weakness: Weakness) -> Weakness:
    """Its mending, if any, asks the registry first: what was a lost login a moment ago may be the fence of a suspension by now."""
    mend = weakness.mend
    if mend is None:
        return weakness

    def mend_unchanged(connection: Connection) -> None:
        if not patient.unchanged():
            return
        mend(connection)
        now = patient.now()
        if weakness.code == "login-lost" and now is not None and now.fence is not None:  # it came in between
            run(statement("ALTER ROLE {} NOLOGIN", now.runtime_role or ""))(connection)

    return dataclasses.replace(weakness, mend=mend_unchanged)
