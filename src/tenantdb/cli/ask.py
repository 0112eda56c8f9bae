"""Questions to whoever runs the command. Without a terminal nobody can answer, and nothing is taken for a yes."""

from __future__ import annotations

import os
import sys

import click

from tenantdb.cli import output
from tenantdb.cli.app import UsageProblem

yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


def confirm(question: str, *, yes: bool) -> None:
    """Go on only after a yes. Raises: `UsageProblem` where there is no terminal to ask; `click.Abort` after a no."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageProblem(f"{output.shown(question)} There is no terminal to ask; say --yes")
    click.confirm(output.shown(question), abort=True, err=True)


def password(prompt: str, *, variable: str, from_stdin: bool) -> str:
    """A password that stands on no command line, where other users of the machine would see it: the first line of standard input, or an
    environment variable, or asked for twice. Raises: `UsageProblem`."""
    if from_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    if given := os.environ.get(variable):
        return given
    if not sys.stdin.isatty():
        raise UsageProblem(f"give the password in {variable}, or on standard input with --password-stdin; there is no terminal to ask")
    answer: str = click.prompt(output.shown(prompt), hide_input=True, confirmation_prompt=True, err=True)
    return answer
