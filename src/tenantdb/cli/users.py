"""Verbs for the people of the registry: who may sign in, and to which tenants."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from tenantdb.cli import output
from tenantdb.cli.app import Invocation, json_option, pass_invocation
from tenantdb.cli.ask import confirm, password, yes_option
from tenantdb.errors import TenantNotFound, UserNotFound
from tenantdb.model import MemberRole, Membership, User

if TYPE_CHECKING:
    from tenantdb.database import TenantDB

_PASSWORD = "TENANTDB_USER_PASSWORD"
_ROLES = click.Choice([str(role) for role in MemberRole])

password_option = click.option(
    "--password-stdin", "from_stdin", is_flag=True, help=f"Read the password from standard input. Without it: {_PASSWORD}, or asked for."
)


@click.group()
def users() -> None:
    """Who may sign in."""


@users.command("list")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many.")
@click.option("--after", metavar="EMAIL", help="Those behind this one, the last of the page before.")
@json_option
@pass_invocation
def list_users(invocation: Invocation, limit: int | None, after: str | None) -> None:
    """All users, by e-mail."""
    found = invocation.database().users.list(limit=limit, after=after)
    if invocation.json:
        output.document([_fields(user) for user in found])
    elif found:
        rows = [[user.email, _name(user), "verified" if user.email_verified_at else "unverified", str(user.id)] for user in found]
        output.table(("email", "name", "state", "id"), rows)
    else:
        output.say("No users.")


@users.command()
@click.argument("user")
@json_option
@pass_invocation
def show(invocation: Invocation, user: str) -> None:
    """All about one user, and their memberships.

    USER is an e-mail or an id.
    """
    db = invocation.database()
    found = db.users.get(user)
    memberships = _Members(db).documents(db.memberships.list(user=found))
    if invocation.json:
        output.document({**_fields(found), "memberships": memberships})
    else:
        output.record(_fields(found))
        for each in memberships:
            click.echo(output.shown(f"{'member of:':<24}{each['tenant']} ({each['role']})"))


@users.command()
@click.argument("email")
@click.option("--first-name")
@click.option("--last-name")
@click.option("--platform-admin", is_flag=True, help="Somebody of yours, who runs the whole installation.")
@password_option
@json_option
@pass_invocation
def create(
    invocation: Invocation, email: str, first_name: str | None, last_name: str | None, platform_admin: bool, from_stdin: bool
) -> None:
    """Make a user."""
    db = invocation.database()
    secret = password(f"A password for {email}", variable=_PASSWORD, from_stdin=from_stdin)
    made = db.users.create(email, secret, first_name=first_name, last_name=last_name, platform_admin=platform_admin)
    _tell(invocation, made, "is a user now")


@users.command("set-password")
@click.argument("user")
@password_option
@json_option
@pass_invocation
def set_password(invocation: Invocation, user: str, from_stdin: bool) -> None:
    """Give a user another password.

    Their tokens end with the old one.
    """
    db = invocation.database()
    found = db.users.get(user)
    secret = password(f"A new password for {found.email}", variable=_PASSWORD, from_stdin=from_stdin)
    token = db.users.password_reset_token(found.email)
    if token is None:
        raise UserNotFound(user)  # deleted meanwhile
    _tell(invocation, db.users.reset_password(token, secret), "has a new password")


@users.command()
@click.argument("user")
@json_option
@pass_invocation
def verify(invocation: Invocation, user: str) -> None:
    """Take a user's e-mail for verified.

    For an address that you know by other means; a token that was mailed before no longer works.
    """
    db = invocation.database()
    _tell(invocation, db.users.verify_email(db.users.verification_token(user)), "is verified")


@users.command()
@click.argument("user")
@yes_option
@json_option
@pass_invocation
def delete(invocation: Invocation, user: str, yes: bool) -> None:
    """Delete a user.

    Signing in ends at once, and memberships count no more. The row stays, for the audit log.
    """
    db = invocation.database()
    found = db.users.get(user)
    confirm(f"Delete the user {found.email}?", yes=yes)
    db.users.delete(found)
    _tell(invocation, found, "is deleted")


@click.group()
def memberships() -> None:
    """Who has which role in which tenant."""


@memberships.command("list")
@click.option("--user", metavar="USER", help="Of this user alone: an e-mail or an id.")
@click.option("--tenant", metavar="SLUG", help="In this tenant alone.")
@json_option
@pass_invocation
def list_memberships(invocation: Invocation, user: str | None, tenant: str | None) -> None:
    """Memberships, the oldest first."""
    db = invocation.database()
    chosen = None if tenant is None else db.tenants.get(tenant, suggest=True)
    found = _Members(db).documents(db.memberships.list(user=user, tenant=chosen))
    if invocation.json:
        output.document(found)
    elif found:
        output.table(("user", "tenant", "role"), [[each["user"], each["tenant"], str(each["role"])] for each in found])
    else:
        output.say("No memberships.")


@memberships.command()
@click.argument("user")
@click.argument("slug")
@click.option("--role", type=_ROLES, default=str(MemberRole.USER), show_default=True)
@json_option
@pass_invocation
def add(invocation: Invocation, user: str, slug: str, role: str) -> None:
    """Make a user a member of a tenant, or give them another role.

    USER is an e-mail or an id.
    """
    db = invocation.database()
    _tell_membership(invocation, db, db.memberships.add(user, db.tenants.get(slug, suggest=True), role=role))


@memberships.command("change")
@click.argument("user")
@click.argument("slug")
@click.option("--role", type=_ROLES, required=True)
@json_option
@pass_invocation
def change(invocation: Invocation, user: str, slug: str, role: str) -> None:
    """Give a member another role. Whoever is no member does not become one."""
    db = invocation.database()
    tenant = db.tenants.get(slug, suggest=True)
    member = db.users.get(user)
    db.memberships.get(member, tenant)
    _tell_membership(invocation, db, db.memberships.add(member, tenant, role=role))


@memberships.command()
@click.argument("user")
@click.argument("slug")
@yes_option
@json_option
@pass_invocation
def remove(invocation: Invocation, user: str, slug: str, yes: bool) -> None:
    """End a membership. The user's refresh tokens for the tenant end with it."""
    db = invocation.database()
    member, tenant = db.users.get(user), db.tenants.get(slug, suggest=True)
    found = db.memberships.get(member, tenant)
    confirm(f"End the membership of {member.email} in {tenant.slug}?", yes=yes)
    db.memberships.remove(member, tenant)
    if invocation.json:
        output.document(_Members(db).documents([found])[0])
    else:
        click.echo(output.shown(f"{member.email} is no member of {tenant.slug} any more"))


class _Members:
    """Memberships with the names that people know: e-mail and slug, or the ids of what is gone."""

    def __init__(self, db: TenantDB) -> None:
        self._db = db
        self._names: dict[UUID, str] = {}

    def documents(self, found: list[Membership]) -> list[dict[str, Any]]:
        return [{"user": self._email(each.user_id), "tenant": self._slug(each.tenant_id), **_fields(each)} for each in found]

    def _email(self, user_id: UUID) -> str:
        if user_id not in self._names:
            try:
                self._names[user_id] = self._db.users.get(user_id).email
            except UserNotFound:
                self._names[user_id] = str(user_id)
        return self._names[user_id]

    def _slug(self, tenant_id: UUID) -> str:
        if tenant_id not in self._names:
            try:
                self._names[tenant_id] = self._db.tenants.get(tenant_id).slug
            except TenantNotFound:
                self._names[tenant_id] = str(tenant_id)
        return self._names[tenant_id]


def _fields(value: User | Membership) -> dict[str, Any]:
    """As JSON holds it. A user's record has no password and no token."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _name(user: User) -> str | None:
    return " ".join(part for part in (user.first_name, user.last_name) if part) or None


def _tell(invocation: Invocation, user: User, what: str) -> None:
    if invocation.json:
        output.document(_fields(user))
    else:
        click.echo(output.shown(f"{user.email} {what}"))


def _tell_membership(invocation: Invocation, db: TenantDB, membership: Membership) -> None:
    (document,) = _Members(db).documents([membership])
    if invocation.json:
        output.document(document)
    else:
        click.echo(output.shown(f"{document['user']} is {membership.role} in {document['tenant']}"))
