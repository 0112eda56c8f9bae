"""Taking over databases that somebody made by hand, and giving them back."""

from __future__ import annotations

import os
import sys

import click

from tenantdb.cli import output
from tenantdb.cli.app import Invocation, UsageProblem, json_option, pass_invocation
from tenantdb.model import Tenant, TenantState
from tenantdb.settings import SQLITE

_VARIABLE = "TENANTDB_ADOPT_URL"


@click.command()
@click.argument("slug")
@click.option("--database", required=True, help="The database that is there; on SQLite a file, which is copied.")
@click.option("--server", help="The database server that it is on, where there are several.")
@click.option("--revision", help="At which revision its schema is, where it has no alembic_version.")
@click.option("--name", help="Shown to people; the slug where it is left out.")
@click.option("--owner-email", metavar="EMAIL", help="A user of the registry who becomes the owner.")
@json_option
@pass_invocation
def adopt(
    invocation: Invocation,
    slug: str,
    database: str,
    server: str | None,
    revision: str | None,
    name: str | None,
    owner_email: str | None,
) -> None:
    """Make a tenant of a database that somebody else made.

    The URL of a login that owns it, or of a superuser, comes from TENANTDB_ADOPT_URL or is asked for; it is kept nowhere. Who used the
    database till now is shut out.
    """
    db = invocation.database()
    known = db.settings.provisioners
    on_files = all(url.backend == SQLITE for each, url in known.items() if server in (None, each))
    tenant = db.adopt(
        slug,
        database=database,
        owner_url=None if on_files else _owner_url(required=True),
        server=server,
        revision=revision,
        name=name,
        owner=None if owner_email is None else db.users.get(owner_email),
    )
    _told(invocation, tenant)
    if not invocation.json and tenant.revision is not None and db.settings.migrations is not None and tenant.revision != db.migrations.head:
        output.say(f"Its schema is at {tenant.revision}; `tenantdb migrate` brings it to the head.")


@click.command("give-back")
@click.argument("slug")
@click.option("--confirm", "again", metavar="SLUG", required=True, help="The slug once more.")
@json_option
@pass_invocation
def give_back(invocation: Invocation, slug: str, again: str) -> None:
    """Give an adopted database back to who owned it.

    The tenant is deleted before. Its data stays in the database; the audit log of its records, which is tenantdb's, goes. The URL of a
    superuser's login comes from TENANTDB_ADOPT_URL, where one was needed to adopt it.
    """
    db = invocation.database()
    tenant = db.give_back(db.tenants.get(slug, suggest=True), confirm=again, owner_url=_owner_url(required=False))
    if tenant.state is not TenantState.PURGED:
        _told(invocation, tenant)
    elif invocation.json:
        output.document(dict(db.tenants.certificate(tenant.id)))
    else:
        output.record(dict(db.tenants.certificate(tenant.id)))


def _owner_url(*, required: bool) -> str | None:
    """Never from the command line, where other users of the machine would see it."""
    if given := os.environ.get(_VARIABLE):
        return given
    if not required:
        return None
    if not sys.stdin.isatty():
        raise UsageProblem(f"give the URL of a login that owns the database in {_VARIABLE}; there is no terminal to ask")
    answer: str = click.prompt("URL of a login that owns the database, or of a superuser", hide_input=True, err=True)
    return answer.strip()


def _told(invocation: Invocation, tenant: Tenant) -> None:
    if invocation.json:
        output.document(output.tenant(tenant))
    else:
        click.echo(f"{tenant.slug} is {tenant.state}")
