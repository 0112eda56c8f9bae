"""Verbs for custom domains: host names of the customers' own."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

import click

from tenantdb.cli import output
from tenantdb.cli.app import Invocation, json_option, pass_invocation
from tenantdb.cli.ask import confirm, yes_option
from tenantdb.errors import TenantNotFound

if TYPE_CHECKING:
    from tenantdb.database import TenantDB


@click.group()
def domains() -> None:
    """Host names that lead to a tenant."""


@domains.command("list")
@click.option("--tenant", metavar="SLUG", help="Of this tenant alone.")
@json_option
@pass_invocation
def list_domains(invocation: Invocation, tenant: str | None) -> None:
    """Domains, by name."""
    db = invocation.database()
    found = db.domains.list(None if tenant is None else db.tenants.get(tenant, suggest=True))
    slugs = {tenant_id: _slug(db, tenant_id) for tenant_id in {each.tenant_id for each in found}}
    if invocation.json:
        output.document([{"domain": each.domain, "tenant": slugs[each.tenant_id], "created_at": each.created_at} for each in found])
    elif found:
        output.table(("domain", "tenant"), [[each.domain, slugs[each.tenant_id]] for each in found])
    else:
        output.say("No domains.")


@domains.command()
@click.argument("domain")
@click.argument("slug")
@json_option
@pass_invocation
def add(invocation: Invocation, domain: str, slug: str) -> None:
    """Lead a domain to a tenant.

    That it is the customer's to give is yours to find out before.
    """
    db = invocation.database()
    tenant = db.tenants.get(slug, suggest=True)
    db.domains.add(domain, tenant)
    _tell(invocation, domain, "leads to", tenant.slug)


@domains.command()
@click.argument("domain")
@yes_option
@json_option
@pass_invocation
def remove(invocation: Invocation, domain: str, yes: bool) -> None:
    """Lead a domain nowhere."""
    db = invocation.database()
    slug = _slug(db, db.domains.tenant_of(domain))
    confirm(f"Take the domain {domain} from {slug}?", yes=yes)
    db.domains.remove(domain)
    _tell(invocation, domain, "leads no more to", slug)


def _slug(db: TenantDB, tenant_id: UUID) -> str:
    try:
        return db.tenants.get(tenant_id).slug
    except TenantNotFound:  # purged a moment ago
        return str(tenant_id)


def _tell(invocation: Invocation, domain: str, what: str, slug: str) -> None:
    if invocation.json:
        output.document({"domain": domain, "tenant": slug})
    else:
        click.echo(output.shown(f"{domain} {what} {slug}"))
