"""Which `TenantDB` a command works on.

The first that is there of ``--app module:name``, ``TENANTDB_APP``, ``[tool.tenantdb] app = "module:name"`` in the working folder's
pyproject.toml, and the ``TENANTDB_*`` variables.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from tenantdb.database import TenantDB
    from tenantdb.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])


class UsageProblem(click.ClickException):
    """The command line cannot mean anything, whatever the database holds. One line, without the synopsis."""

    exit_code = 2


class NoSettings(UsageProblem):
    """Nothing says which registry is meant."""

    def __init__(self) -> None:
        super().__init__(
            "no settings were found. Set TENANTDB_URL (for example sqlite:///data/central.sqlite3), or name the application's"
            " TenantDB with --app module:name; `tenantdb dev` starts a PostgreSQL to try"
        )


@dataclass
class Invocation:
    """One run of the command: the options that hold for every verb, and the `TenantDB` that they lead to."""

    app: str | None = None
    json: bool = False
    traceback: bool = False
    given: TenantDB | None = None  # by a framework's own command line, which has found the application already; closed by who gave it

    def reference(self) -> str | None:
        """Where the application's `TenantDB` is, as ``module:name``; None where nobody says."""
        return self.app or _from_pyproject()

    def database(self) -> TenantDB:
        """The application's `TenantDB`, closed when the command ends. Raises: `UsageProblem`, `NoSettings`, `ConfigError`."""
        from tenantdb.database import TenantDB

        if self.given is not None:
            return self.given
        if reference := self.reference():
            db = load(reference)
        elif _has_url():
            db = TenantDB.from_env()
        else:
            raise NoSettings
        click.get_current_context().call_on_close(db.close)
        return db

    def settings(self) -> Settings:
        """The settings alone, for what needs no registry: without any, the defaults and the other ``TENANTDB_*`` variables."""
        from tenantdb.settings import Settings

        if self.given is not None or self.reference() or _has_url():
            return self.database().settings
        return Settings.from_env(url="sqlite:///unused")


def load(reference: str) -> TenantDB:
    """Import what ``module:name`` names, with the working folder importable. Raises: `UsageProblem`; what the module itself raises."""
    from tenantdb.aio import AsyncTenantDB
    from tenantdb.database import TenantDB

    module_name, colon, path = reference.partition(":")
    if not (module_name and colon and path):
        raise UsageProblem(f"{reference!r} is not of the form module:name, for example clinic.db:db")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise UsageProblem(
            f"there is no module {error.name!r}; {reference!r} is looked for in the working folder and on sys.path"
        ) from None
    for name in path.split("."):
        if not hasattr(found, name):
            raise UsageProblem(f"{module_name!r} has no {path!r}")
        found = getattr(found, name)
    if isinstance(found, AsyncTenantDB):
        found = found.sync_db
    if not isinstance(found, TenantDB):
        raise UsageProblem(f"{reference!r} is a {type(found).__name__}, not a TenantDB")
    return found


def _has_url() -> bool:
    return any(name.upper() == "TENANTDB_URL" for name in os.environ)


def _from_pyproject() -> str | None:
    path = Path("pyproject.toml")
    if not path.is_file():
        return None
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        app = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {}).get("tenantdb", {}).get("app")
    except tomllib.TOMLDecodeError as error:
        raise UsageProblem(f"pyproject.toml cannot be read: {error}") from None
    if app is not None and not isinstance(app, str):
        raise UsageProblem('[tool.tenantdb] app in pyproject.toml is a string, for example "clinic.db:db"')
    return app


pass_invocation = click.make_pass_decorator(Invocation, ensure=True)


def _set(field: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def remember(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value:
            setattr(ctx.ensure_object(Invocation), field, value)

    return remember


def json_option(command: F) -> F:
    """``--json``, before or behind the verb."""
    return click.option("--json", is_flag=True, expose_value=False, is_eager=True, callback=_set("json"), help="Print one JSON document.")(
        command
    )


def global_options(command: F) -> F:
    for option in (
        click.option(
            "--traceback",
            is_flag=True,
            envvar="TENANTDB_TRACEBACK",
            expose_value=False,
            callback=_set("traceback"),
            help="Show where an error arose.",
        ),
        json_option,
        click.option(
            "--app",
            metavar="MODULE:NAME",
            envvar="TENANTDB_APP",
            expose_value=False,
            is_eager=True,
            callback=_set("app"),
            help="Where the application's TenantDB is.",
        ),
    ):
        command = option(command)
    return command
