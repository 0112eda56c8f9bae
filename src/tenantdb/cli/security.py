"""Keys, and tokens that count no more."""

from __future__ import annotations

from dataclasses import asdict

import click

from tenantdb.cli import output
from tenantdb.cli.app import Invocation, json_option, pass_invocation
from tenantdb.cli.progress import progress
from tenantdb.errors import SecretKeyError
from tenantdb.registry.secrets import AUDIT, RUNTIME, Keyring
from tenantdb.registry.secrets import generate_key as new_key


@click.command()
@click.option(
    "--derive",
    type=click.Choice([RUNTIME, AUDIT]),
    help="Print, instead of a new key, those that the given secret keys hold for one purpose: a web process needs no more than runtime.",
)
@json_option
@pass_invocation
def generate_key(invocation: Invocation, derive: str | None) -> None:
    """Print a new secret key.

    It goes into TENANTDB_SECRET_KEYS; several may be given there, the newest first.
    """
    keys = [new_key()] if derive is None else _derived(invocation, derive)
    if invocation.json:
        output.document({"keys": keys})
    else:
        for key in keys:
            click.echo(key)


def _derived(invocation: Invocation, purpose: str) -> list[str]:
    settings = invocation.settings()
    given = [key.get_secret_value() for key in settings.secret_keys]
    if not given:
        raise SecretKeyError("there is no secret key to derive from")
    return Keyring(given, settings.kms).derive(purpose)


@click.command("rotate-keys")
@click.option("--check", is_flag=True, help="Only say which keys are in use. Exit code 1 while an older one is.")
@json_option
@pass_invocation
def rotate_keys(invocation: Invocation, check: bool) -> None:
    """Seal every secret anew with the newest key.

    Every process must have both keys before, and goes on meanwhile. It may be interrupted, and run again. A secret that does not open is
    left as it is, and the exit code is 3.
    """
    if check:
        _keys_in_use(invocation)
        return
    with progress("sealing anew", quiet=invocation.json) as tell:
        report = invocation.database().rotate_keys(progress=tell)
    failed = [{"tenant": each.tenant, "column": each.column, "error": output.problem(each.error)} for each in report.failed]
    if invocation.json:
        output.document(
            {
                "resealed": report.resealed,
                "already": report.already,
                "failed": failed,
                "keys": dict(report.keys),
                "replaced": list(report.replaced),
            }
        )
    else:
        for each in report.failed:
            output.say(f"{each.tenant}: {each.column}: {each.error.explain()}")
        click.echo(f"sealed anew: {report.resealed}; already: {report.already}; failed: {len(report.failed)}")
    if failed:
        click.get_current_context().exit(output.SOME_FAILED)


def _keys_in_use(invocation: Invocation) -> None:
    uses = invocation.database().keys_in_use()
    old = sum(use.secrets for use in uses if use.needs_rotation)
    if invocation.json:
        output.document({"ok": not old, "keys": [asdict(use) for use in uses]})
    else:
        rows = [[use.purpose, use.key_id, use.name, str(use.secrets), "newest" if use.newest else "older"] for use in uses]
        output.table(("purpose", "key id", "given as", "secrets", ""), rows)
        if old:
            output.say(f"{old} secrets need an older key; `tenantdb rotate-keys` seals them anew.")
        else:
            output.say("No secret needs an older key.")
        if any(use.purpose == AUDIT and not use.newest for use in uses):
            output.say("Entries of the audit log do: keep what `tenantdb generate-key --derive audit` prints, or they cannot be verified.")
    if old:
        click.get_current_context().exit(output.FAILED)


@click.command()
@click.option("--user", metavar="USER", help="Tokens of this user: an e-mail or an id.")
@click.option("--tenant", metavar="SLUG", help="Tokens for this tenant.")
@json_option
@pass_invocation
def revoke(invocation: Invocation, user: str | None, tenant: str | None) -> None:
    """Refuse every token that was issued before now.

    To a user, or for a tenant: access tokens and refresh tokens. Whoever is meant signs in again.
    """
    if (user is None) == (tenant is None):
        raise click.UsageError("give --user or --tenant")
    db = invocation.database()
    if user is not None:
        found = db.users.get(user)
        db.revocations.revoke_user(found)
        document, whose = {"user": str(found.id)}, found.email
    else:
        chosen = db.tenants.get(tenant or "", suggest=True)
        db.revocations.revoke_tenant(chosen)
        document, whose = {"tenant": str(chosen.id)}, chosen.slug
    if invocation.json:
        output.document(document)
    else:
        click.echo(output.shown(f"tokens of {whose} from before now are refused"))
