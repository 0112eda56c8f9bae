"""What commands print: for people, for pipes, and as JSON. Data goes to stdout, everything said about it to stderr."""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import click

from tenantdb.errors import InvalidSlug, InvalidTenantKey, TenantDBError, describe
from tenantdb.model import Tenant

FAILED, USAGE, SOME_FAILED, TRY_LATER = 1, 2, 3, 75


def say(text: str) -> None:
    """A remark to whoever is watching."""
    click.echo(shown(text), err=True)


def document(value: Any) -> None:
    """One JSON document, in ASCII, so that no terminal and no encoding of a pipe matters."""
    click.echo(json.dumps(value, default=_plain, indent=2))


def tenant(value: Tenant) -> dict[str, Any]:
    """A tenant as JSON holds it. A tenant's record has no secrets."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def table(columns: Sequence[str], rows: Sequence[Sequence[str | None]]) -> None:
    """A table on a terminal; tab-separated lines without a head in a pipe, where a table would be cut at 80 columns."""
    cells = [[shown(cell or "-") for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in cells:
            click.echo("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in cells:
        drawn.add_row(*(Text(cell) for cell in row))
    Console(highlight=False).print(drawn)


def record(values: Mapping[str, Any]) -> None:
    """Names and values below each other, without what is not set."""
    for name, value in values.items():
        if value is not None and value != {}:
            text = json.dumps(value, default=_plain) if isinstance(value, (Mapping, list)) else str(_plain(value))
            click.echo(f"{name + ':':<24}{shown(text)}")


def shown(text: str) -> str:
    """Text that a terminal shows and does not obey: a name or an error may hold an escape sequence."""
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)


def problem(error: BaseException) -> dict[str, str]:
    """An error as JSON holds it."""
    code = error.code if isinstance(error, TenantDBError) else "unexpected"
    return {"code": code, "message": describe(error)}


def fail(code: str, message: str, *, as_json: bool) -> None:
    """Tell why nothing came of it: one line, on stderr."""
    if as_json:
        click.echo(json.dumps({"error": {"code": code, "message": message}}), err=True)
    else:
        say(f"Error: {message}")


def trace(error: BaseException) -> None:
    """The way to an error, for those who asked for it."""
    click.echo("".join(traceback.format_exception(error)), err=True, nl=False)


def exit_code(error: TenantDBError) -> int:
    if isinstance(error, (InvalidSlug, InvalidTenantKey)):
        return USAGE
    return TRY_LATER if error.retryable else FAILED


def _plain(value: Any) -> Any:
    """What `json` has no word for, and the rest as it is."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, (UUID, enum.Enum)):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    return value
