"""Verbs over many tenants."""

from __future__ import annotations

from typing import Any

import click

from tenantdb.cli import output
from tenantdb.cli.app import Invocation, json_option, pass_invocation
from tenantdb.errors import describe


@click.command()
@click.option("--tenant", metavar="SLUG", help="This one alone, whatever its revision.")
@json_option
@pass_invocation
def migrate(invocation: Invocation, tenant: str | None) -> None:
    """Bring all tenants to the newest revision.

    One after the other, and spares too. One that fails stays where it was, with nothing of the failed migration left behind, and the others
    go on.
    """
    db = invocation.database()
    migrations = db.migrations
    head = migrations.head
    chosen = migrations.pending() if tenant is None else [db.tenants.get(tenant, suggest=True)]
    migrated: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for each in chosen:
        try:
            done = migrations.upgrade(each)
        except Exception as error:  # whatever a migration raises is told under the tenant's name
            failed.append({"tenant": each.slug, "error": output.problem(error)})
            if invocation.traceback:
                output.trace(error)
            if not invocation.json:
                output.say(f"{each.slug}: failed: {describe(error)}")
        else:
            migrated.append({"tenant": each.slug, "from": each.revision, "to": done.revision})
            if not invocation.json:
                click.echo(f"{each.slug}: {each.revision or 'empty'} -> {done.revision or 'empty'}")
    spares = db.spares.refresh() if tenant is None else 0
    at_head = sum(each.revision == head for each in db.tenants.list())
    if invocation.json:
        output.document({"head": head, "migrated": migrated, "failed": failed, "at_head": at_head, "spares": spares})
    else:
        click.echo(f"at head {head or '(there are no revisions)'}: {at_head}; migrated now: {len(migrated)}; failed: {len(failed)}")
    if failed:
        click.get_current_context().exit(output.SOME_FAILED)
