"""Keys."""

from __future__ import annotations

import click

from tenantdb.cli import output
from tenantdb.cli.app import Invocation, json_option, pass_invocation
from tenantdb.errors import SecretKeyError
from tenantdb.registry.secrets import RUNTIME, Keyring
from tenantdb.registry.secrets import generate_key as new_key


@click.command()
@click.option(
    "--derive",
    type=click.Choice([RUNTIME]),
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
    given = [key.get_secret_value() for key in invocation.settings().secret_keys]
    if not given:
        raise SecretKeyError("there is no secret key to derive from")
    return Keyring(given).derive(purpose)
