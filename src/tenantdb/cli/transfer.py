"""A tenant's data out into files, in from a file, and copied."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import click

from tenantdb.cli import output
from tenantdb.cli.app import Invocation, json_option, pass_invocation
from tenantdb.cli.ask import confirm, yes_option
from tenantdb.cli.progress import Tell, progress
from tenantdb.cli.tenants import _text
from tenantdb.model import Tenant

F = TypeVar("F", bound=Callable[..., Any])

_MEGABYTE = 1 << 20


class _Megabytes:
    """Progress in bytes, told in megabytes."""

    def __init__(self, what: str, *, quiet: bool) -> None:
        self._progress: AbstractContextManager[Tell] = progress(f"{what}, MB", quiet=quiet)

    def __enter__(self) -> Callable[[int, int], object]:
        tell = self._progress.__enter__()
        return lambda done, total: tell(done // _MEGABYTE, total // _MEGABYTE)

    def __exit__(self, *exc: Any) -> None:
        self._progress.__exit__(*exc)


def _of_a_new_tenant(command: F) -> F:
    for option in (
        click.option("--region", help="Any server in this region."),
        click.option("--server", help="The database server to use."),
        click.option("--owner-email", metavar="EMAIL", help="A user of the registry who becomes the owner."),
        click.option("--plan", callback=_text),
        click.option("--name", callback=_text, help="Shown to people; the slug where it is left out."),
    ):
        command = option(command)
    return command


_overwrite = click.option("--overwrite", is_flag=True, help="Replace what an earlier export wrote there. Asks first.")


@click.command()
@click.argument("slug")
@click.argument("file", type=click.Path(dir_okay=False))
@_overwrite
@yes_option
@json_option
@pass_invocation
def export(invocation: Invocation, slug: str, file: str, overwrite: bool, yes: bool) -> None:
    """Write a tenant's database into a file.

    As the owner role, while the tenant is served. It holds no secret of tenantdb's, and all of the tenant's data: keep it accordingly.
    """
    db = invocation.database()
    tenant = db.tenants.get(slug, suggest=True)
    if overwrite:
        confirm(f"Replace {file}, if it is there?", yes=yes)
    with _Megabytes("exporting", quiet=invocation.json) as tell:
        made = db.export(tenant, file, overwrite=overwrite, progress=tell)
    if invocation.json:
        output.document(
            {
                "path": made.path,
                "tenant": made.tenant,
                "revision": made.revision,
                "made_at": made.made_at,
                "made_with": made.made_with,
                "sha256": made.sha256,
                "members": {member.name: {"size": member.size, "sha256": member.sha256} for member in made.members},
            }
        )
    else:
        size = sum(member.size for member in made.members)
        click.echo(output.shown(f"{tenant.slug} is in {made.path}: {size} bytes, revision {made.revision or 'none'}, {made.made_with}"))


@click.command("import")
@click.argument("file", type=click.Path())
@click.argument("slug")
@_of_a_new_tenant
@json_option
@pass_invocation
def import_file(invocation: Invocation, /, file: str, slug: str, owner_email: str | None, **details: Any) -> None:
    """Make a tenant of an exported file.

    The file is verified first. An import that failed is continued by the same command, where the file is.
    """
    db = invocation.database()
    owner = None if owner_email is None else db.users.get(owner_email)
    with _Megabytes("verifying", quiet=invocation.json) as tell:
        made = db.import_(slug, file, owner=owner, progress=tell, **details)
    _print(invocation, made)


@click.command()
@click.argument("slug")
@click.argument("new")
@_of_a_new_tenant
@click.option("--not-neutralised", is_flag=True, help="Leave addresses, webhooks and tokens in the copy as they are. Asks first.")
@yes_option
@json_option
@pass_invocation
def clone(
    invocation: Invocation, /, slug: str, new: str, owner_email: str | None, not_neutralised: bool, yes: bool, **details: Any
) -> None:
    """Make a tenant of another's data.

    Before it is served, what the application registered with @db.neutralise takes from it what must not act for the original.
    """
    db = invocation.database()
    tenant = db.tenants.get(slug, suggest=True)
    if not_neutralised:
        confirm(f"The copy {new} may send mail and call other systems as {tenant.slug} does. Make it all the same?", yes=yes)
    owner = None if owner_email is None else db.users.get(owner_email)
    with _Megabytes("copying", quiet=invocation.json) as tell:
        made = db.clone(tenant, new, neutralised=not not_neutralised, owner=owner, progress=tell, **details)
    _print(invocation, made)


@click.command("export-rows")
@click.argument("slug")
@click.argument("folder", type=click.Path(file_okay=False))
@click.option("--table", "tables", multiple=True, metavar="NAME", help="This table; may be given several times. Without it all.")
@click.option("--format", "kind", type=click.Choice(["jsonl", "csv"]), default="jsonl", show_default=True)
@_overwrite
@yes_option
@json_option
@pass_invocation
def export_rows(invocation: Invocation, slug: str, folder: str, tables: tuple[str, ...], kind: str, overwrite: bool, yes: bool) -> None:
    """Write a tenant's rows as JSON Lines.

    A file for each table, for whom the data belongs to: no database is needed to read it. CSV is for spreadsheets, and loses types.
    """
    db = invocation.database()
    tenant = db.tenants.get(slug, suggest=True)
    if overwrite:
        confirm(f"Replace the export in {folder}, if there is one?", yes=yes)
    with progress("tables", quiet=invocation.json) as tell:
        made = db.export_rows(tenant, folder, tables=list(tables) or None, format=kind, overwrite=overwrite, progress=tell)
    if invocation.json:
        output.document(
            {
                "path": made.path,
                "tenant": made.tenant,
                "made_at": made.made_at,
                "sha256": made.sha256,
                "tables": dict(made.tables),
            }
        )
    else:
        click.echo(output.shown(f"{tenant.slug} is in {made.path}: {len(made.tables)} tables, {sum(made.tables.values())} rows"))


def _print(invocation: Invocation, tenant: Tenant) -> None:
    if invocation.json:
        output.document(output.tenant(tenant))
    else:
        click.echo(f"{tenant.slug} is {tenant.state}")
