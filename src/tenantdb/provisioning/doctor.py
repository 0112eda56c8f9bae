"""Looks at every server and every tenant's database for what is weaker than it must be, and mends what is harmless.

`check` asks whether an installation can work; the doctor whether what was built still stands. It compares the registry with the servers,
enters each tenant's database once, a few at a time, and tries the tenants' passwords. What nobody knows is reported and never touched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from uuid import UUID

from pydantic import SecretStr
from sqlalchemy import func, select

from tenantdb.backends import backend
from tenantdb.backends.weakness import Diagnosis, Patient, Severity
from tenantdb.connections.engines import Engines
from tenantdb.errors import ConfigError, SecretKeyError, TenantDBError, TenantNotFound
from tenantdb.model import DatabaseRole, Server, Template, Tenant
from tenantdb.provisioning.check import connection_findings
from tenantdb.registry import Registry, audit
from tenantdb.registry import schema as registry_schema
from tenantdb.registry.secrets import OWNER, RUNTIME
from tenantdb.settings import SQLITE, ConnectionURL, Settings

CONCURRENCY = 4
"""Tenants' databases looked at together: each takes one of the provisioner's few connections, and a place in the budget."""

_PURPOSES = {DatabaseRole.OWNER: OWNER, DatabaseRole.RUNTIME: RUNTIME}


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorFinding:
    """One weakness that `TenantDB.doctor` found.

    ``code`` stays the same between versions. ``server`` and ``tenant`` (a slug, or the id of a spare) say where, ``subject`` what, by its
    opaque name. ``repair`` is how to mend it: SQL, a command, or advice. ``repaired``: it was there, and is gone by now.
    """

    severity: Severity
    code: str
    server: str | None
    tenant: str | None
    subject: str
    text: str
    repair: str
    repaired: bool = False


def doctor(
    registry: Registry, engines: Engines, settings: Settings, *, repair: bool, server: str | None, tenant: Tenant | None
) -> list[DoctorFinding]:
    """See `TenantDB.doctor`."""
    if not settings.provisioners:
        raise ConfigError("this process has no provisioner, with whose eyes a doctor looks; give it in server= or servers={...}")
    chosen = [registry.servers.get(server)] if server is not None else registry.servers.list()
    if tenant is not None:
        chosen = [each for each in chosen if each.name == tenant.server]
    findings = [] if server is not None or tenant is not None else _registry_doors(registry)
    for each in chosen:
        findings += _Rounds(registry, engines, settings, each, tenant, repair=repair).findings()
    counts = Counter(str(finding.severity) for finding in findings if not finding.repaired)
    details = {"problems": counts["problem"], "warnings": counts["warning"], "repaired": sum(finding.repaired for finding in findings)}
    with registry.write() as connection:
        about = None if tenant is None else tenant.id
        audit.record(connection, "doctor.run", tenant_id=about, object=server, details={**details, "repair": repair})
    return sorted(findings, key=lambda finding: finding.severity is Severity.WARNING)


def _registry_doors(registry: Registry) -> list[DoctorFinding]:
    with registry.read() as connection:
        if connection.dialect.name != "postgresql":
            return []
        public = registry_schema.public_doors(connection)
        app = registry_schema.open_doors(connection, str(connection.scalar(select(func.current_user()))))

    def found(severity: Severity, code: str, text: str, repair: str) -> DoctorFinding:
        return DoctorFinding(severity=severity, code=code, server=None, tenant=None, subject="registry", text=text, repair=repair)

    doors = [found(Severity.PROBLEM, "registry-public", text, "the REVOKE, as the owner of the registry's database") for text in public]
    return doors + [found(Severity.WARNING, "registry-door", text, "`tenantdb init`, with a login of its own for it") for text in app]


class _Rounds:
    """One server, from outside and then inside."""

    def __init__(
        self, registry: Registry, engines: Engines, settings: Settings, server: Server, only: Tenant | None, *, repair: bool
    ) -> None:
        self._registry = registry
        self._engines = engines
        self._settings = settings
        self._server = server
        self._only = only
        self._repair = repair
        self._tenants: Mapping[UUID, Tenant] = {}

    def findings(self) -> list[DoctorFinding]:
        url = self._settings.provisioners.get(self._server.name)
        if url is None:
            text = "this process has no provisioner for the server, so nobody looked"
            return [self._finding(Severity.WARNING, "not-examined", text, "give its URL in servers={...}")]
        try:
            return [*self._examine(url)]
        except TenantDBError as error:
            return [self._finding(Severity.PROBLEM, "not-examined", f"nobody could look: {error.explain()}", "run the doctor again then")]

    def _examine(self, url: ConnectionURL) -> Iterator[DoctorFinding]:
        whole = self._only is None
        self._tenants = {tenant.id: tenant for tenant in ([self._only] if self._only else self._on_this_server())}
        patients = [Patient(each, self._now(each), self._passwords(each)) for each in self._tenants.values() if each.database]
        templates = self._registry.templates.list(self._server)
        examiner = backend(self._server.backend).doctor(self._server, url, self._settings)
        with self._engines.place(self._server, "the doctor"):
            outside = examiner.examine_server(patients, templates, whole=whole, repair=self._repair)
        yield from map(self._told, outside.found)
        if whole:
            yield from self._orphans(outside.ours_by_name, templates)
            yield from self._about_the_process(url)

        def inside(patient: Patient) -> list[DoctorFinding]:
            try:
                with self._engines.place(self._server, "the doctor"):
                    return [self._told(diagnosis) for diagnosis in examiner.examine_inside(patient, repair=self._repair)]
            except TenantDBError as error:
                text = f"nobody could look into the database: {error.explain()}"
                return [self._finding(Severity.PROBLEM, "not-examined", text, "run the doctor again then", patient.tenant)]

        enter = [patient for patient in patients if patient.must_be_whole and patient.tenant.database in outside.enterable]
        with ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="tenantdb-doctor") as executor:
            try:
                for found in executor.map(inside, enter):
                    yield from found
            except BaseException:  # Ctrl-C: thousands may wait
                executor.shutdown(wait=False, cancel_futures=True)
                raise

    def _on_this_server(self) -> list[Tenant]:
        return [each for each in (*self._registry.tenants.list(), *self._registry.tenants.spares()) if each.server == self._server.name]

    def _orphans(self, there: Mapping[str, str], templates: Collection[Template]) -> Iterator[DoctorFinding]:
        """What is on the server and in no row. The rows are read again, because a row is written before its database is made."""
        known = {name for each in self._on_this_server() for name in (each.database, each.owner_role, each.runtime_role)}
        known |= {name for each in (*templates, *self._registry.templates.list(self._server)) for name in (each.database, each.owner_role)}
        for name, kind in sorted(there.items()):
            if name not in known:
                text = f"no tenant and no template of this registry has this {kind}: a purged tenant's, another application's, or a crash's"
                repair = f"find out whose it is; a person drops it, no command does: {_drop(kind, name)}"
                yield self._finding(Severity.WARNING, f"orphan-{kind}", text, repair, subject=f"{kind} {name}")

    def _about_the_process(self, url: ConnectionURL) -> Iterator[DoctorFinding]:
        if self._server.backend == SQLITE:
            return
        with self._engines.place(self._server, "the doctor"):
            findings = connection_findings(self._server, url, self._settings, roles=False)
        for finding in findings:
            yield self._finding(finding.severity, "connections", finding.text, "another budget, or another max_connections")
        for role, purpose in _PURPOSES.items():
            if not self._registry.keyring.holds(purpose):
                text = f"this process lacks the {role} keys, so nobody tried the {role} roles' passwords"
                yield self._finding(Severity.WARNING, "logins-not-tried", text, "run the doctor where the secret keys themselves are")

    def _now(self, tenant: Tenant) -> Callable[[], Tenant | None]:
        def now() -> Tenant | None:
            try:
                return self._registry.tenants.row(tenant.id).tenant
            except TenantNotFound:
                return None

        return now

    def _passwords(self, tenant: Tenant) -> Callable[[DatabaseRole], SecretStr | None]:
        """What the registry holds at that moment; None while a password is being changed, and where this process lacks the key."""

        def password(role: DatabaseRole) -> SecretStr | None:
            if self._server.backend == SQLITE or not self._registry.keyring.holds(_PURPOSES[role]):
                return None
            try:
                held = self._registry.passwords(self._registry.tenants.row(tenant.id), role)
            except SecretKeyError:
                return None
            return SecretStr(held[0]) if len(held) == 1 else None

        return password

    def _told(self, diagnosis: Diagnosis) -> DoctorFinding:
        found = diagnosis.weakness
        tenant = None if found.tenant is None else self._tenants[found.tenant]
        return self._finding(
            found.severity, found.code, found.text, found.repair, tenant, subject=found.subject, repaired=diagnosis.repaired
        )

    def _finding(
        self,
        severity: Severity,
        code: str,
        text: str,
        repair: str,
        tenant: Tenant | None = None,
        *,
        subject: str | None = None,
        repaired: bool = False,
    ) -> DoctorFinding:
        return DoctorFinding(
            severity=severity,
            code=code,
            server=self._server.name,
            tenant=None if tenant is None else tenant.slug,
            subject=subject or ("server" if tenant is None else f"database {tenant.database}"),
            text=text,
            repair=repair,
            repaired=repaired,
        )


def _drop(kind: str, name: str) -> str:
    return f'DROP {kind.upper()} "{name}"' if kind != "file" else f"rm {name}.sqlite3"
