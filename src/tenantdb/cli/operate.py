"""Verbs for who runs an installation."""

from __future__ import annotations

import code
import logging
import sys
import traceback
from dataclasses import asdict
from types import CodeType
from typing import Any

import click

from tenantdb.cli import output
from tenantdb.cli.app import Invocation, json_option, pass_invocation
from tenantdb.cli.signals import stop_event
from tenantdb.model import TenantState


@click.command()
@json_option
@pass_invocation
def check(invocation: Invocation) -> None:
    """Look for problems, and change nothing.

    Settings, keys, registry, servers, rights. Exit code 1 when something does not work, 0 with warnings alone.
    """
    from tenantdb.backends.weakness import Severity

    findings = invocation.database().check()
    problems = [finding for finding in findings if finding.severity is Severity.PROBLEM]
    if invocation.json:
        output.document({"ok": not problems, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            click.echo(output.shown(f"{finding.severity}: {finding.subject}: {finding.text}"))
        click.echo(f"problems: {len(problems)}; warnings: {len(findings) - len(problems)}")
    if problems:
        click.get_current_context().exit(output.FAILED)


@click.command()
@click.option("--once", is_flag=True, help="End when nothing waits. Exit code 3 when a tenant failed.")
@json_option
@pass_invocation
def worker(invocation: Invocation, once: bool) -> None:
    """Make the tenants that others signed up.

    Carries out what processes without a provisioner left in the journal, until Ctrl-C or SIGTERM; what is under way is finished first.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("tenantdb").setLevel(logging.INFO)
    db = invocation.database()
    db._compare_at_start()
    failed_before = {tenant.id for tenant in db.tenants.list(TenantState.FAILED)}
    if once:
        done = db.work()
    else:
        with stop_event() as stop:
            output.say("Waiting for work. Ctrl-C stops.")
            done = db.work(stop=stop)
    failed = [tenant.slug for tenant in db.tenants.list(TenantState.FAILED) if tenant.id not in failed_before]
    if invocation.json:
        output.document({"done": done, "failed": failed})
    else:
        click.echo(f"carried out: {done}; failed: {len(failed)}")
    if failed:
        click.get_current_context().exit(output.SOME_FAILED)


@click.command()
@click.argument("slug")
@pass_invocation
def shell(invocation: Invocation, slug: str) -> None:
    """A Python console on one tenant.

    It has `session`, `tenant` and `db`, with the tenant bound. A script on standard input is executed instead. Nothing is committed unless
    you call session.commit().
    """
    db = invocation.database()
    with db.tenant_context(db.tenants.get(slug, suggest=True)) as tenant, db.session() as session:
        names: dict[str, Any] = {"__name__": "__console__", "__doc__": None, "session": session, "tenant": tenant, "db": db}
        if sys.stdin.isatty():
            _console(names, f"session, tenant and db are those of {tenant.slug}. Nothing is committed unless you call session.commit().")
        else:
            _script(names)


def _console(names: dict[str, Any], banner: str) -> None:
    try:
        import readline  # noqa: F401  # line editing, by being imported
    except ImportError:  # a Python without it: the console works all the same
        output.say("This Python has no readline, so lines cannot be edited.")
    code.interact(banner=output.shown(banner), local=names, exitmsg="")


def _script(names: dict[str, Any]) -> None:
    """Run standard input as Python does a file: what it raises is shown with its own lines, and ends it."""
    try:
        script: CodeType = compile(sys.stdin.read(), "<stdin>", "exec")
        exec(script, names)  # noqa: S102  # what this verb is for
    except Exception:
        traceback.print_exc()
        click.get_current_context().exit(output.FAILED)
