"""The verb that looks for weaknesses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from tenantdb.cli import output
from tenantdb.cli.app import Invocation, json_option, pass_invocation

if TYPE_CHECKING:
    from tenantdb.provisioning.doctor import DoctorFinding


@click.command()
@click.option("--repair", is_flag=True, help="Mend what can harm nobody. Never drops data, roles, extensions or functions.")
@click.option("--server", metavar="NAME", help="This database server alone.")
@click.option("--tenant", metavar="SLUG", help="This tenant alone.")
@json_option
@pass_invocation
def doctor(invocation: Invocation, repair: bool, server: str | None, tenant: str | None) -> None:
    """Look for what is weaker than it must be.

    Grants, roles, passwords, limits, templates and strangers on every server, and inside every tenant's database. Exit code 1 when a
    problem remains, 0 with warnings alone.
    """
    from tenantdb.backends.weakness import Severity

    db = invocation.database()
    chosen = None if tenant is None else db.tenants.get(tenant, suggest=True)
    findings = db.doctor(repair=repair, server=server, tenant=chosen)
    left = [finding for finding in findings if not finding.repaired]
    problems = [finding for finding in left if finding.severity is Severity.PROBLEM]
    if invocation.json:
        output.document({"ok": not problems, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            for line in _lines(finding):
                click.echo(output.shown(line))
        summary = f"problems: {len(problems)}; warnings: {len(left) - len(problems)}"
        click.echo(f"{summary}; repaired: {len(findings) - len(left)}" if repair else summary)
    if problems:
        click.get_current_context().exit(output.FAILED)


def _lines(finding: DoctorFinding) -> Iterator[str]:
    where = ": ".join(part for part in (finding.server, finding.tenant, finding.subject) if part)
    yield f"{'repaired' if finding.repaired else finding.severity}: {where}: {finding.text} [{finding.code}]"
    if not finding.repaired:
        yield f"    {finding.repair}"
