"""The command itself: what holds for every verb, and which verbs there are."""

from __future__ import annotations

import getpass
import os
from typing import Any

import click

from tenantdb.cli import (
    adopt,
    audit,
    doctor,
    domains,
    endings,
    fleet,
    journal,
    migrations,
    next_step,
    operate,
    output,
    security,
    start,
    tenants,
    transfer,
    users,
)
from tenantdb.cli.app import Invocation, global_options, pass_invocation
from tenantdb.context import acting
from tenantdb.errors import TenantDBError

SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "start": (start.dev, start.bootstrap_server, start.init, migrations.migrations),
    "tenants": (
        tenants.provision,
        tenants.list_tenants,
        tenants.show,
        tenants.update,
        tenants.suspend,
        tenants.activate,
        endings.maintenance,
        endings.delete,
        endings.restore,
        endings.purge,
        endings.certificate,
        endings.hold,
        endings.release,
        adopt.adopt,
        adopt.give_back,
        users.users,
        users.memberships,
        domains.domains,
    ),
    "fleet": (fleet.status, fleet.migrate, fleet.rollouts, journal.spares),
    "security": (doctor.doctor, security.generate_key, security.rotate_keys, journal.rotate_credentials, security.revoke, audit.audit),
    "operate": (
        operate.check,
        operate.worker,
        journal.resume,
        transfer.export,
        transfer.import_file,
        transfer.clone,
        transfer.export_rows,
        operate.shell,
    ),
}


class Verbs(click.Group):
    """Help in sections, and library errors told in one line."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(len(command.name or "") for commands in SECTIONS.values() for command in commands)
        for title, commands in SECTIONS.items():
            with formatter.section(title.capitalize()):
                limit = formatter.width - width - 6
                formatter.write_dl([((command.name or "").ljust(width), command.get_short_help_str(limit)) for command in commands])

    def invoke(self, ctx: click.Context) -> Any:
        invocation = ctx.ensure_object(Invocation)  # here, so that every verb has this one
        try:
            return super().invoke(ctx)
        except TenantDBError as error:
            if invocation.traceback:
                output.trace(error)
            output.fail(error.code, error.explain() if invocation.json else str(error), as_json=invocation.json)
            ctx.exit(output.exit_code(error))
        except click.ClickException as error:
            if not invocation.json:
                raise
            output.fail("usage", error.format_message(), as_json=True)
            ctx.exit(error.exit_code)


@click.group(
    cls=Verbs,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 some tenants failed, 75 try again later.",
)
@global_options
@click.version_option(package_name="tenantdb", message="%(package)s %(version)s")
@pass_invocation
@click.pass_context
def cli(ctx: click.Context, invocation: Invocation) -> None:
    """A database for every tenant. Without a command: what the next useful step is.

    The application's TenantDB is found by --app, by TENANTDB_APP, by [tool.tenantdb] app = "module:name" in pyproject.toml, or made from
    the TENANTDB_* variables.
    """
    ctx.with_resource(acting(f"cli:{_login()}"))
    if ctx.invoked_subcommand is None:
        next_step.tell(invocation)


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"uid-{os.getuid()}"


for _commands in SECTIONS.values():
    for _command in _commands:
        cli.add_command(_command)
