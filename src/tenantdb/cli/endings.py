"""Verbs that take a tenant away, for a while or for ever, and that give it back."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from uuid import UUID

import click

from tenantdb.cli import output
from tenantdb.cli.app import Invocation, UsageProblem, json_option, pass_invocation
from tenantdb.cli.ask import confirm, yes_option
from tenantdb.model import Fence, Tenant, TenantState


@click.command()
@click.argument("slug")
@json_option
@pass_invocation
def maintenance(invocation: Invocation, slug: str) -> None:
    """Stop serving a tenant for a while.

    Requests get 503 and may come again. `activate` ends it.
    """
    db = invocation.database()
    _told(invocation, db.maintenance(db.tenants.get(slug, suggest=True)))


@click.command()
@click.argument("slug")
@yes_option
@json_option
@pass_invocation
def delete(invocation: Invocation, slug: str, yes: bool) -> None:
    """Stop serving a tenant and shut its database.

    Its data stays until the retention has ended; `restore` takes it back until then.
    """
    db = invocation.database()
    tenant = db.tenants.get(slug, suggest=True)
    confirm(f"Delete {tenant.slug} ({tenant.name})? It can be restored for {db.settings.retention:g} days.", yes=yes)
    _told(invocation, db.delete(tenant))


@click.command()
@click.argument("slug")
@json_option
@pass_invocation
def restore(invocation: Invocation, slug: str) -> None:
    """Serve a deleted tenant again."""
    db = invocation.database()
    _told(invocation, db.restore(db.tenants.get(slug, suggest=True)))


@click.command()
@click.argument("slug", required=False)
@click.option("--confirm", "again", metavar="SLUG", help="The slug once more; asked for on a terminal.")
@click.option("--immediately", is_flag=True, help="Although it could still be restored.")
@click.option("--certificate", type=click.Path(path_type=Path, dir_okay=False), help="Write the certificate to this file too.")
@click.option("--expired", is_flag=True, help="List the deleted tenants whose retention has ended, and purge nothing.")
@json_option
@pass_invocation
def purge(invocation: Invocation, slug: str | None, again: str | None, immediately: bool, certificate: Path | None, expired: bool) -> None:
    """Erase a deleted tenant for ever.

    Its database, roles, secrets and memberships, and what the registry knows of it. Prints a certificate that says what was erased, and
    what else may still hold data until when.
    """
    db = invocation.database()
    if expired:
        _list_expired(invocation, db.tenants.expired())
        return
    if slug is None:
        raise UsageProblem("say which tenant; `tenantdb purge --expired` lists those whose time has come")
    tenant = db.tenants.get(slug, suggest=True)
    if again is None:
        again = _asked_again(tenant)
    if certificate is not None:
        _reserve(certificate)
    try:
        purged = db.purge(tenant, confirm=again, immediately=immediately)
    except BaseException:
        if certificate is not None:
            certificate.unlink()
        raise
    if purged.state is not TenantState.PURGED:
        if certificate is not None:
            certificate.unlink()
        output.say(f"`tenantdb worker` erases it; then `tenantdb certificate {tenant.id}` prints the certificate.")
        _told(invocation, purged)
        return
    proof = dict(db.tenants.certificate(tenant.id))
    if certificate is not None:
        certificate.write_text(json.dumps(proof, indent=2) + "\n", encoding="utf-8")
    if invocation.json:
        output.document(proof)
    else:
        output.record(proof)


@click.command()
@click.argument("tenant_id", metavar="ID", type=click.UUID)
@json_option
@pass_invocation
def certificate(invocation: Invocation, tenant_id: UUID) -> None:
    """Print what was erased when a tenant was purged.

    ID is the tenant's id: its slug is free again, and may be somebody else's.
    """
    proof = dict(invocation.database().tenants.certificate(tenant_id))
    if invocation.json:
        output.document(proof)
    else:
        output.record(proof)


def _reserve(path: Path) -> None:
    """Before anything is erased: a place for what is told only once. Raises: `UsageProblem`."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        raise UsageProblem(f"{path} exists already; nothing was purged") from None
    except OSError as error:
        raise UsageProblem(f"{path} cannot be written ({error.strerror}); nothing was purged") from None


def _asked_again(tenant: Tenant) -> str:
    if not sys.stdin.isatty():
        raise UsageProblem(f"there is no terminal to ask; say --confirm {tenant.slug}, and {tenant.slug} is erased for ever")
    answer: str = click.prompt(f"This erases {tenant.slug} ({output.shown(tenant.name)}) for ever. Type its slug to go on", err=True)
    return answer.strip()


def _list_expired(invocation: Invocation, tenants: list[Tenant]) -> None:
    if invocation.json:
        output.document([output.tenant(tenant) for tenant in tenants])
    elif tenants:
        rows = [[tenant.slug, str(tenant.deleted_at), str(tenant.purge_after)] for tenant in tenants]
        output.table(("slug", "deleted", "retention ended"), rows)
    else:
        output.say("No deleted tenant's retention has ended.")


@click.command()
@click.argument("slug")
@click.option("--reason", required=True, help="Why it must not be erased, such as the number of a case.")
@json_option
@pass_invocation
def hold(invocation: Invocation, slug: str, reason: str) -> None:
    """Put a legal hold on a tenant: it cannot be purged."""
    db = invocation.database()
    _told(invocation, db.hold(db.tenants.get(slug, suggest=True), reason))


@click.command()
@click.argument("slug")
@yes_option
@json_option
@pass_invocation
def release(invocation: Invocation, slug: str, yes: bool) -> None:
    """End a legal hold."""
    db = invocation.database()
    tenant = db.tenants.get(slug, suggest=True)
    confirm(f"Release {tenant.slug} from its legal hold ({tenant.legal_hold})?", yes=yes)
    _told(invocation, db.release(tenant))


def _told(invocation: Invocation, tenant: Tenant) -> None:
    if invocation.json:
        output.document(output.tenant(tenant))
        return
    click.echo(f"{tenant.slug} is {tenant.state}" + (", under a legal hold" if tenant.legal_hold else ""))
    if tenant.fence is Fence.PENDING:
        output.say("Its database server does not know yet; `tenantdb worker` or `tenantdb resume` tells it.")
    if tenant.purge_after is not None:
        output.say(f"It can be restored until {tenant.purge_after:%Y-%m-%d %H:%M} UTC.")
