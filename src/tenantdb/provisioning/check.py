"""Looks at an installation and changes nothing: settings, keys, registry, servers, rights."""

from __future__ import annotations

from dataclasses import dataclass

from tenantdb.backends import backend
from tenantdb.errors import TenantDBError
from tenantdb.model import StrEnum
from tenantdb.registry import Registry
from tenantdb.settings import Settings


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
