"""``tenantdb migrations``: the application's script location."""

from __future__ import annotations

from pathlib import Path

import click

from tenantdb.cli import output
from tenantdb.cli.app import Invocation, UsageProblem, json_option, pass_invocation


@click.group()
def migrations() -> None:
    """The scripts that make the tenants' schema."""


@migrations.command("init")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--app", metavar="MODULE:NAME", help="Where the TenantDB is; the one of the whole command where it is left out.")
@click.option("--metadata", metavar="MODULE:NAME", required=True, help="Where the tables are, for example clinic.models:Base.metadata.")
@json_option
@pass_invocation
def init(invocation: Invocation, directory: Path, app: str | None, metadata: str) -> None:
    """Write an Alembic script location. Nothing is overwritten."""
    from tenantdb.migrations import init as write

    reference = app or invocation.reference()
    if reference is None:
        raise UsageProblem("env.py needs the application's TenantDB; give --app module:name")
    written = [path.as_posix() for path in write(directory, app=reference, metadata=metadata)]
    if invocation.json:
        output.document({"written": written})
        return
    for path in written:
        click.echo(path)
    output.say(
        f'Give the folder to the TenantDB, migrations="{directory.as_posix()}", or as TENANTDB_MIGRATIONS;'
        ' then: alembic revision --autogenerate -m "initial"'
    )
