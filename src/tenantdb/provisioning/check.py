"""Looks at an installation and changes nothing: settings, keys, registry, servers, rights, room for the budget."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass

from tenantdb.backends import backend
from tenantdb.backends.weakness import Severity
from tenantdb.connections.share import limits_of, registry_connections, registry_is_on
from tenantdb.errors import ConfigError, MigrationError, TenantDBError
from tenantdb.model import Server
from tenantdb.registry import Keyring, Registry
from tenantdb.settings import KMS, SQLITE, ConnectionURL, Settings

logger = logging.getLogger("tenantdb.connections")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that `TenantDB.check` found, where, and in words."""

    severity: Severity
    subject: str
    text: str


def check(registry: Registry, settings: Settings) -> list[Finding]:
    """Problems first, then warnings."""
    findings = [*_settings(settings), *_compatible(settings)]
    try:
        registry.ping()
        servers = {server.name: server for server in registry.servers.list()}
        findings += [Finding(Severity.WARNING, "registry", text) for text in registry.open_doors()]
    except TenantDBError as error:
        return [Finding(Severity.PROBLEM, "registry", error.explain()), *findings]
    if not servers:
        findings.append(Finding(Severity.PROBLEM, "servers", "no database server is registered; give server=... and run `tenantdb init`"))
    for known in servers.values():
        findings += _address(known, settings)
    for name, url in settings.provisioners.items():
        server = servers.get(name)
        if server is None:
            findings.append(Finding(Severity.PROBLEM, f"server {name}", "it is not in the registry; run `tenantdb init`"))
            continue
        subject = f"server {name}"
        try:
            report = backend(server.backend).check_server(server, url, settings)
            findings += [Finding(Severity.PROBLEM, subject, text) for text in report.problems]
            findings += [Finding(Severity.WARNING, subject, text) for text in report.warnings]
            findings += connection_findings(server, url, settings)
        except TenantDBError as error:
            findings.append(Finding(Severity.PROBLEM, subject, error.explain()))
    return sorted(findings, key=lambda finding: finding.severity is Severity.WARNING)


def compare_at_start(registry: Registry, settings: Settings) -> None:
    """Where a process with a provisioner begins its work: whether its servers have room for the budget. What they lack is logged.

    A server that does not answer now keeps nobody from starting. Raises: `ConfigError` where the budget is ``strict``; `RegistryError`.
    """
    if not any(url.backend != SQLITE for url in settings.provisioners.values()):
        return
    findings: list[Finding] = []
    for server in registry.servers.list():
        url = settings.provisioners.get(server.name)
        if url is None:
            continue
        try:
            findings += connection_findings(server, url, settings)
        except TenantDBError as error:
            logger.warning("the budget could not be compared with server %s: %s", server.name, error.explain())
    for finding in findings:
        logger.warning("%s: %s", finding.subject, finding.text)
    problems = [f"{finding.subject}: {finding.text}" for finding in findings if finding.severity is Severity.PROBLEM]
    if problems:
        raise ConfigError("; ".join(problems))


def connection_findings(server: Server, url: ConnectionURL, settings: Settings, *, roles: bool = True) -> list[Finding]:
    """Whether the server has as many connections as all processes together may ask of it, and the tenants' ``roles`` may open as many.

    Raises: `ConfigError`, `ServerUnavailable`.
    """
    if server.backend == SQLITE:
        return []
    from tenantdb.backends.postgresql.inspect import room_on  # psycopg is an extra

    budget, findings = settings.budget, []
    wanted_per_tenant = limits_of(settings, server).per_tenant * budget.share_of
    room = room_on(server.name, url, settings, wanted_per_tenant=wanted_per_tenant)
    asked, total = [f"budget.connections={budget.connections}"], budget.connections
    if room.has_registry and not registry_is_on(settings, server):
        total += registry_connections(settings) * budget.share_of
        asked.append(
            f"registry_pool_size={settings.registry_pool_size} and one that listens in budget.processes={budget.share_of}, because the"
            " registry is on this server under another name"
        )
    if room.has_registry and settings.registry_admin is not None:
        total += settings.registry_pool_size
        asked.append(f"{settings.registry_pool_size} of registry_admin in this process")
    there = room.max_connections - room.reserved
    if total > there:
        more = f"{' and '.join(asked)} are {total} connections" if len(asked) > 1 else asked[0]
        text = (
            f"{more}, and the server has {there}: max_connections={room.max_connections} less {room.reserved} reserved."
            " Lower the budget, or raise max_connections"
        )
        findings.append(Finding(Severity.PROBLEM if budget.strict else Severity.WARNING, f"server {server.name}", text))
    if roles and room.narrow_roles:
        text = (
            f"{room.narrow_roles} of the tenants' roles have a CONNECTION LIMIT below {wanted_per_tenant}, the lowest is {room.narrowest}:"
            f" what budget.per_tenant={budget.per_tenant} in budget.processes={budget.share_of} may ask for is refused by the server before"
            " the budget is used up. Raise it with ALTER ROLE, or lower per_tenant"
        )
        findings.append(Finding(Severity.WARNING, f"server {server.name}", text))
    return findings


def _address(server: Server, settings: Settings) -> list[Finding]:
    """Whether something listens where the registry says, and whether the settings mean the same place."""
    if server.backend == SQLITE:
        return []
    subject, findings = f"server {server.name}", []
    for host, port in dict.fromkeys([(server.host, server.port), (server.direct_host, server.direct_port)]):
        if host is None or host.startswith("/"):
            continue  # a socket's folder: the provisioner's login below tells
        try:
            socket.create_connection((host, port or 5432), settings.connect_timeout).close()
        except OSError as error:
            text = f"nothing answers at {host}:{port or 5432}, where the registry says it is ({type(error).__name__})"
            findings.append(Finding(Severity.PROBLEM, subject, text))
    url = settings.provisioners.get(server.name)
    if url is not None and (url.host, url.port or 5432) != (server.direct_host, server.direct_port or 5432):
        text = "the settings and the registry name different addresses; `db.servers.add` writes a new one"
        findings.append(Finding(Severity.PROBLEM, subject, text))
    return findings


def _is_root(key: str) -> bool:
    return ":" not in key and key != KMS


def _settings(settings: Settings) -> list[Finding]:
    def warn(text: str) -> Finding:
        return Finding(Severity.WARNING, "settings", text)

    findings = []
    if not settings.provisioners and any(_is_root(key.get_secret_value()) for key in settings.secret_keys):
        findings.append(
            warn(
                "this process makes no databases and holds root keys, with which it could open owner secrets;"
                " give it what `tenantdb generate-key --derive runtime` prints"
            )
        )
    if settings.kms is not None and not Keyring([key.get_secret_value() for key in settings.secret_keys], settings.kms).signs:
        findings.append(warn("the key service signs nothing and no audit key is given, so nothing vouches for the audit log"))
    if settings.insecure_transport:
        findings.append(warn("insecure_transport=True: connections off this machine may be read and redirected"))
    if settings.migrations is None:
        findings.append(warn("no migrations are configured: new tenants start with an empty schema"))
    return findings


def _compatible(settings: Settings) -> list[Finding]:
    """Whether the revisions that this code can serve are those of its own migrations."""
    window = settings.compatible_revisions
    if not window or settings.migrations is None:
        return []
    from tenantdb.migrations.scripts import Scripts  # alembic, which a process that only serves does not load

    scripts = Scripts(settings.migrations)
    try:
        head, known = scripts.head, scripts.revisions()
    except MigrationError as error:
        return [Finding(Severity.PROBLEM, "migrations", error.explain())]
    findings = []
    if head not in window:
        text = f"the head of the migrations is {head!r} and not among compatible_revisions, so tenants that are migrated are refused"
        findings.append(Finding(Severity.PROBLEM, "migrations", text))
    findings += [
        Finding(Severity.WARNING, "migrations", f"compatible_revisions names {revision!r}, which the migrations do not know")
        for revision in window
        if revision not in known
    ]
    return findings
