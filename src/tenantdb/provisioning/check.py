"""Looks at an installation and changes nothing: settings, keys, registry, servers, rights."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from tenantdb.backends import backend
from tenantdb.errors import TenantDBError
from tenantdb.model import Server, StrEnum
from tenantdb.registry import Registry
from tenantdb.settings import SQLITE, Settings


class Severity(StrEnum):
    """A problem keeps something from working; a warning leaves something more open than it could be."""

    PROBLEM = "problem"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that `TenantDB.check` found, where, and in words."""

    severity: Severity
    subject: str
    text: str


def check(registry: Registry, settings: Settings) -> list[Finding]:
    """Problems first, then warnings."""
    findings = _settings(settings)
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
        try:
            report = backend(server.backend).check_server(server, url, settings)
        except TenantDBError as error:
            findings.append(Finding(Severity.PROBLEM, f"server {name}", error.explain()))
        else:
            findings += [Finding(Severity.PROBLEM, f"server {name}", text) for text in report.problems]
            findings += [Finding(Severity.WARNING, f"server {name}", text) for text in report.warnings]
    return sorted(findings, key=lambda finding: finding.severity is Severity.WARNING)


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


def _settings(settings: Settings) -> list[Finding]:
    def warn(text: str) -> Finding:
        return Finding(Severity.WARNING, "settings", text)

    findings = []
    if not settings.provisioners and any(":" not in key.get_secret_value() for key in settings.secret_keys):
        findings.append(
            warn(
                "this process makes no databases and holds root keys, with which it could open owner secrets;"
                " give it what `tenantdb generate-key --derive runtime` prints"
            )
        )
    if settings.insecure_transport:
        findings.append(warn("insecure_transport=True: connections off this machine may be read and redirected"))
    if settings.migrations is None:
        findings.append(warn("no migrations are configured: new tenants start with an empty schema"))
    return findings
