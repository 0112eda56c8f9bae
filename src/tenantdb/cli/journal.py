"""Verbs for what happens in the background: spares, passwords, and what was interrupted."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from tenantdb.cli import output
from tenantdb.cli.app import Invocation, UsageProblem, json_option, pass_invocation
from tenantdb.cli.ask import confirm, yes_option
from tenantdb.cli.progress import progress
from tenantdb.errors import TenantDBError
from tenantdb.model import Tenant

if TYPE_CHECKING:
    from tenantdb.database import TenantDB


@click.command()
@json_option
@pass_invocation
def resume(invocation: Invocation) -> None:
    """Finish what was interrupted, and look for orphans.

    Databases and roles that no tenant knows, and tenants without a database, are listed; nothing of them is dropped. Exit code 3 when
    something failed again, 1 when there are orphans.
    """
    report = invocation.database().resume()
    if invocation.json:
        output.document(
            {
                "finished": [{"tenant": tenant, "operation": kind} for tenant, kind in report.finished],
                "failed": [{"tenant": tenant, "operation": kind, "problem": problem} for tenant, kind, problem in report.failed],
                "in_progress": [{"tenant": tenant, "operation": kind} for tenant, kind in report.in_progress],
                "orphans": [asdict(orphan) for orphan in report.orphans],
            }
        )
    else:
        for tenant, kind, problem in report.failed:
            output.say(f"{kind} of {tenant}: {problem}")
        for tenant, kind in report.in_progress:
            output.say(f"{kind} of {tenant}: another worker is at it")
        for orphan in report.orphans:
            owner = f" of {orphan.tenant}" if orphan.tenant else ""
            click.echo(f"orphan: {orphan.kind} {orphan.name}{owner} on {orphan.server}")
        click.echo(f"finished: {len(report.finished)}; failed: {len(report.failed)}; orphans: {len(report.orphans)}")
    if report.failed:
        click.get_current_context().exit(output.SOME_FAILED)
    if report.orphans:
        click.get_current_context().exit(output.FAILED)


@click.command("rotate-credentials")
@click.argument("slug", required=False)
@click.option("--all", "everybody", is_flag=True, help="Of every tenant and spare, one after the other.")
@json_option
@pass_invocation
def rotate_credentials(invocation: Invocation, slug: str | None, everybody: bool) -> None:
    """Give a tenant's database roles new passwords.

    No request fails; the old passwords are refused afterwards. Exit code 3 when some tenants failed.
    """
    if (slug is None) == (not everybody):
        raise UsageProblem("give the slug of one tenant, or --all")
    db = invocation.database()
    chosen = _everybody(db) if slug is None else [db.tenants.get(slug, suggest=True)]
    rotated: list[str] = []
    failed: list[dict[str, object]] = []
    with progress("new passwords", quiet=invocation.json) as tell:
        for number, tenant in enumerate(chosen):
            tell(number, len(chosen))
            try:
                rotated.append(db.rotate_credentials(tenant).slug)
            except TenantDBError as error:
                if slug is not None:
                    raise
                failed.append({"tenant": tenant.slug, "error": output.problem(error)})
                output.say(f"{tenant.slug}: {error.explain()}")
    if invocation.json:
        output.document({"rotated": rotated, "failed": failed})
    else:
        click.echo(f"new passwords: {len(rotated)}; failed: {len(failed)}")
    if failed:
        click.get_current_context().exit(output.SOME_FAILED)


def _everybody(db: TenantDB) -> list[Tenant]:
    """Whoever has passwords; the deleted too, which may be restored, and spares."""
    states = ("active", "suspended", "maintenance", "deleted")
    found = [tenant for state in states for tenant in db.tenants.list(state) if tenant.database is not None]
    return found + [spare for spare in db.spares.list() if spare.ready_at is not None]


@click.group()
def spares() -> None:
    """Databases that are ready for whoever signs up next."""


@spares.command("list")
@json_option
@pass_invocation
def list_spares(invocation: Invocation) -> None:
    """All spares, the oldest first."""
    found = invocation.database().spares.list()
    if invocation.json:
        output.document([_spare(spare) for spare in found])
    elif found:
        rows = [[str(spare.id), spare.server, spare.revision, "ready" if spare.ready_at else "not ready"] for spare in found]
        output.table(("id", "server", "revision", ""), rows)
    else:
        output.say("No spares; `tenantdb spares fill COUNT` makes some.")


@spares.command()
@click.argument("count", type=click.IntRange(min=0), required=False)
@click.option("--server", help="On this server alone.")
@json_option
@pass_invocation
def fill(invocation: Invocation, count: int | None, server: str | None) -> None:
    """Make spares until COUNT are ready on each server.

    Without COUNT it is the setting `spares`. Those that are behind the newest revision are migrated first.
    """
    db = invocation.database()
    with progress("spares", quiet=invocation.json) as tell:
        ready = db.spares.fill(count, server=server, progress=tell)
    if invocation.json:
        output.document([_spare(spare) for spare in ready])
    else:
        click.echo(f"ready: {len(ready)}")


@spares.command()
@json_option
@pass_invocation
def distrust(invocation: Invocation) -> None:
    """After the registry was restored from a backup: offer no spare.

    Some may have been taken since. None is dropped; each has a legal hold until somebody has looked into it.
    """
    kept = invocation.database().spares.distrust()
    if invocation.json:
        output.document({"distrusted": kept})
    else:
        click.echo(f"distrusted: {kept}")


@spares.command()
@yes_option
@json_option
@pass_invocation
def drain(invocation: Invocation, yes: bool) -> None:
    """Drop all spares."""
    db = invocation.database()
    confirm(f"Drop {len(db.spares.list())} spares?", yes=yes)
    dropped = db.spares.drain()
    if invocation.json:
        output.document({"dropped": dropped})
    else:
        click.echo(f"dropped: {dropped}")


def _spare(spare: Tenant) -> dict[str, object]:
    return {"id": spare.id, "server": spare.server, "revision": spare.revision, "ready_at": spare.ready_at}
