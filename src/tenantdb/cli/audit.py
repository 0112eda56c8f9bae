"""The audit log: what was done, and whether what is written about it can be believed."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any
from uuid import UUID

import click

from tenantdb.cli import output
from tenantdb.cli.app import Invocation, UsageProblem, json_option, pass_invocation
from tenantdb.model import AuditEntry, AuditHead, ChainReport

_COLUMNS = ("at", "tenant", "actor", "action", "object", "outcome", "reason")


@click.group()
def audit() -> None:
    """Look through the audit log, verify it, keep it."""


def _moment(ctx: click.Context, parameter: click.Parameter, value: str | None) -> datetime | None:
    try:
        moment = None if value is None else datetime.fromisoformat(value)
    except ValueError:
        raise click.BadParameter("write 2026-01-31 or 2026-01-31T09:30:00+01:00", ctx, parameter) from None
    return moment.replace(tzinfo=timezone.utc) if moment is not None and moment.tzinfo is None else moment


_tenant = click.option("--tenant", metavar="SLUG", help="One tenant's, by slug or id; of a purged tenant by id.")
_records = click.option("--records", is_flag=True, help="The log beside a tenant's records, in its own database.")


@audit.command("search")
@_tenant
@_records
@click.option("--actor", help="Who acted: a user's id, or cli:LOGIN.")
@click.option("--action", help="What was done; with a dot at its end, all that begins so: patient.")
@click.option("--object", help="To what: an id.")
@click.option("--since", callback=_moment, metavar="TIME", help="From this moment on; UTC unless it says otherwise.")
@click.option("--until", callback=_moment, metavar="TIME", help="Before this moment.")
@click.option("--outcome", help="How it ended: done, refused, failed.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True)
@json_option
@pass_invocation
def search(invocation: Invocation, /, tenant: str | None, *, records: bool, **filters: Any) -> None:
    """The newest entries that pass every filter."""
    if records and tenant is None:
        raise UsageProblem("--records are in the tenants' own databases; name one with --tenant")
    _print(invocation, invocation.database().audit.search(tenant, records=records, **filters))


@audit.command("list")
@_tenant
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True)
@json_option
@pass_invocation
def list_entries(invocation: Invocation, tenant: str | None, limit: int) -> None:
    """The newest entries."""
    _print(invocation, invocation.database().audit.list(tenant, limit=limit))


def _print(invocation: Invocation, entries: list[AuditEntry]) -> None:
    if invocation.json:
        output.document([_document(entry) for entry in entries])
    elif entries:
        output.table(_COLUMNS, [[_line(cell) for cell in _cells(entry)] for entry in entries])
    else:
        output.say("No entries.")


def _document(entry: AuditEntry) -> dict[str, Any]:
    names = [name for name in AuditEntry.__dataclass_fields__ if name != "mac"]
    return {**{name: getattr(entry, name) for name in names}, "mac": None if entry.mac is None else entry.mac.hex()}


def _cells(entry: AuditEntry) -> list[str | None]:
    tenant = None if entry.tenant_id is None else str(entry.tenant_id)
    return [entry.at.isoformat(timespec="seconds"), tenant, entry.actor, entry.action, entry.object, entry.outcome, entry.reason]


def _line(text: str | None) -> str | None:
    """One entry is one line, whatever a user wrote into it."""
    return None if text is None else " ".join(text.splitlines())


@audit.command()
@_tenant
@_records
@json_option
@pass_invocation
def verify(invocation: Invocation, tenant: str | None, *, records: bool) -> None:
    """Look whether an entry was edited, taken out, moved or slipped in.

    Compares with the anchors of TENANTDB_AUDIT_ANCHOR. With --records and without --tenant, in the databases of all active tenants. Exit
    code 1 when a chain does not hold.
    """
    report = invocation.database().audit.verify(tenant, records=records)
    if invocation.json:
        chains = [_chain(chain) for chain in report.chains]
        output.document({"ok": report.ok, "entries": report.entries, "anchors": report.anchors, "chains": chains})
    else:
        for chain in report.broken:
            click.echo(f"{_name(chain.tenant_id)}: {chain.why} at entry {chain.broken_at}")
        click.echo(f"chains: {len(report.chains)}; broken: {len(report.broken)}; entries: {report.entries}; anchors: {report.anchors}")
        if report.unauthenticated:
            output.say(f"Not authenticated: {report.unauthenticated} entries. They were written without a key, or no key is given now.")
        if not report.anchors:
            output.say("Nothing was compared with an anchor, so an end that was cut off is not missed; see `tenantdb audit anchor`.")
    if not report.ok:
        click.get_current_context().exit(output.FAILED)


def _chain(chain: ChainReport) -> dict[str, Any]:
    return {**{name: getattr(chain, name) for name in ChainReport.__dataclass_fields__}, "ok": chain.ok}


def _name(tenant_id: UUID | None) -> str:
    return "the installation" if tenant_id is None else f"tenant {tenant_id}"


@audit.command()
@click.option("--records", is_flag=True, help="Also the chains in the databases of all active tenants.")
@json_option
@pass_invocation
def anchor(invocation: Invocation, *, records: bool) -> None:
    """Write down outside how far every chain has come.

    To the file of TENANTDB_AUDIT_ANCHOR, and to what the application registered with @db.audit.on_anchor. Run it from time to time.
    """
    heads = invocation.database().audit.anchor(records=records)
    if invocation.json:
        output.document([_anchored(head) for head in heads])
    else:
        click.echo(f"anchored: {len(heads)} chains")


def _anchored(head: AuditHead) -> dict[str, Any]:
    return {
        "log": head.log,
        "tenant_id": head.tenant_id,
        "seq": head.seq,
        "mac": None if head.mac is None else head.mac.hex(),
        "at": head.at,
    }


@audit.command()
@click.option("--years", type=click.IntRange(min=1), help="Keep so many; by default, and at least, TENANTDB_AUDIT_RETENTION.")
@json_option
@pass_invocation
def retain(invocation: Invocation, years: int | None) -> None:
    """Delete entries of the registry that are older than the retention.

    Tenants under a legal hold, and chains that do not hold, are left as they are; exit code 1 where there are such chains.
    """
    done = invocation.database().audit.retain(years)
    if invocation.json:
        broken = [_chain(chain) for chain in done.broken]
        output.document({"before": done.before, "deleted": done.deleted, "held": list(done.held), "broken": broken})
    else:
        for chain in done.broken:
            output.say(f"{_name(chain.tenant_id)} was left as it is: {chain.why} at entry {chain.broken_at}")
        click.echo(f"before {done.before:%Y-%m-%d}: deleted: {done.deleted}; under a legal hold: {len(done.held)}")
    if done.broken:
        click.get_current_context().exit(output.FAILED)
