"""The verbs of one tenant's life."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from tenantdb.cli import output
from tenantdb.cli.app import Invocation, UsageProblem, json_option, pass_invocation
from tenantdb.errors import TenantNotFound
from tenantdb.model import Subscription, Tenant, TenantState
from tenantdb.registry import fields
from tenantdb.resolvers import canonical_slug

if TYPE_CHECKING:
    from tenantdb.database import TenantDB

_COLUMNS = ("slug", "state", "name", "plan", "subscription", "server", "revision")
_CLEARABLE = ("email", "phone", "country", "plan", "subscription-expires-at")
_UNFINISHED = (TenantState.FAILED, TenantState.PROVISIONING)


def _text(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    try:
        return fields.text(parameter.name or "", value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, parameter) from None


@click.command()
@click.argument("slug")
@click.option("--name", callback=_text, help="Shown to people; the slug where it is left out.")
@click.option("--email", callback=_text, help="How to reach the tenant.")
@click.option("--phone", callback=_text)
@click.option("--country", callback=_text)
@click.option("--plan", callback=_text)
@click.option("--subscription", type=click.Choice([str(each) for each in Subscription]), default=str(Subscription.TRIAL), show_default=True)
@click.option("--owner-email", metavar="EMAIL", help="A user of the registry who becomes the owner.")
@click.option("--server", help="The database server to use.")
@click.option("--region", help="Any server in this region.")
@click.option("--exist-ok", is_flag=True, help="Succeed where the tenant exists already.")
@json_option
@pass_invocation
def provision(invocation: Invocation, /, slug: str, owner_email: str | None, exist_ok: bool, **details: Any) -> None:
    """Make a tenant and its database. One that failed or was interrupted is continued, with the details that it has."""
    canonical_slug(slug)
    db = invocation.database()
    tenant = db.provision(
        slug,
        owner=None if owner_email is None else db.users.get(owner_email),
        exist_ok=exist_ok or _unfinished(db, slug),
        **details,
    )
    if invocation.json:
        output.document(output.tenant(tenant))
        return
    click.echo(f"{tenant.slug} is {tenant.state}")
    if tenant.state is TenantState.PROVISIONING:
        output.say("This process has no provisioner, or another is at work on it; `tenantdb worker` carries out what waits.")


def _unfinished(db: TenantDB, slug: str) -> bool:
    """An operator, unlike a stranger who signs up, may continue what somebody began."""
    try:
        return db.tenants.get(slug).state in _UNFINISHED
    except TenantNotFound:
        return False


@click.command("list")
@click.option("--state", type=click.Choice([str(state) for state in TenantState]))
@json_option
@pass_invocation
def list_tenants(invocation: Invocation, state: str | None) -> None:
    """All tenants, by slug."""
    tenants = invocation.database().tenants.list(state)
    if invocation.json:
        output.document([output.tenant(tenant) for tenant in tenants])
    elif tenants:
        output.table(_COLUMNS, [[_cell(tenant, column) for column in _COLUMNS] for tenant in tenants])
    else:
        output.say("No tenants." if state is None else f"No tenants that are {state}.")


def _cell(tenant: Tenant, column: str) -> str | None:
    value = getattr(tenant, column)
    return None if value is None else str(value)


@click.command()
@click.argument("slug")
@json_option
@pass_invocation
def show(invocation: Invocation, slug: str) -> None:
    """All about one tenant.

    SLUG may be an id. Secrets are not shown.
    """
    db = invocation.database()
    tenant = db.tenants.get(slug, suggest=True)
    told = output.tenant(tenant)
    if (operation := db.operation(tenant)) is not None and operation.state != "done":
        told["operation"] = {name: getattr(operation, name) for name in ("kind", "state", "step", "attempt", "worker", "error")}
    output.document(told) if invocation.json else output.record(told)


def _moment(ctx: click.Context, parameter: click.Parameter, value: str | None) -> datetime | None:
    try:
        return None if value is None else fields.moment("it", datetime.fromisoformat(value.replace("Z", "+00:00")))
    except ValueError:
        raise click.BadParameter("a time with its time zone, for example 2030-01-31T00:00:00+00:00", ctx, parameter) from None


@click.command()
@click.argument("slug")
@click.option("--name", callback=_text, help="Shown to people.")
@click.option("--email", callback=_text, help="How to reach the tenant.")
@click.option("--phone", callback=_text)
@click.option("--country", callback=_text)
@click.option("--plan", callback=_text)
@click.option("--subscription", type=click.Choice([str(each) for each in Subscription]))
@click.option("--subscription-expires-at", metavar="TIME", callback=_moment, help="With its time zone, as 2030-01-31T00:00:00+00:00.")
@click.option("--clear", multiple=True, type=click.Choice(_CLEARABLE), help="Empty a field; may be given several times.")
@json_option
@pass_invocation
def update(invocation: Invocation, /, slug: str, clear: tuple[str, ...], **details: Any) -> None:
    """Change what is known about a tenant."""
    changes = {name.replace("-", "_"): None for name in clear}
    given = {name: value for name, value in details.items() if value is not None}
    if twice := sorted(changes.keys() & given.keys()):
        raise UsageProblem(f"{', '.join(twice)} cannot be both given and cleared")
    changes |= given
    if not changes:
        raise UsageProblem("say what to change; `tenantdb update --help` lists it")
    db = invocation.database()
    changed = db.update(db.tenants.get(slug, suggest=True), **changes)
    _print(invocation, changed, in_full=True)


@click.command()
@click.argument("slug")
@json_option
@pass_invocation
def suspend(invocation: Invocation, slug: str) -> None:
    """Stop serving a tenant; its data stays."""
    db = invocation.database()
    _print(invocation, db.suspend(db.tenants.get(slug, suggest=True)))


@click.command()
@click.argument("slug")
@json_option
@pass_invocation
def activate(invocation: Invocation, slug: str) -> None:
    """Serve a suspended tenant again."""
    db = invocation.database()
    _print(invocation, db.activate(db.tenants.get(slug, suggest=True)))


def _print(invocation: Invocation, tenant: Tenant, *, in_full: bool = False) -> None:
    if invocation.json:
        output.document(output.tenant(tenant))
    elif in_full:
        output.record(output.tenant(tenant))
    else:
        click.echo(f"{tenant.slug} is {tenant.state}")
