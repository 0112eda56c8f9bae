"""What ``tenantdb`` alone says: the next useful step, from what it finds. It changes nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from tenantdb.cli import output
from tenantdb.cli.app import Invocation, NoSettings
from tenantdb.errors import RegistryNotInitialized, SecretKeyError
from tenantdb.model import TenantState

if TYPE_CHECKING:
    from tenantdb.database import TenantDB


@dataclass(frozen=True)
class Step:
    """A command to run, and why."""

    next: str
    why: str


def tell(invocation: Invocation) -> None:
    """Print the step. Raises what keeps it from being known, such as a registry that is out of reach."""
    step = _find(invocation)
    if invocation.json:
        output.document(asdict(step))
    else:
        click.echo(f"{step.why}\n\n    {step.next}\n\nAll commands: tenantdb --help")


def _find(invocation: Invocation) -> Step:
    try:
        db = invocation.database()
        db.ping()
    except NoSettings:
        return Step(
            "tenantdb dev",
            "No settings were found. Set TENANTDB_URL (for example sqlite:///data/central.sqlite3), or name the application's TenantDB with"
            " --app module:name. To try it on a PostgreSQL that needs no installation:",
        )
    except SecretKeyError as error:
        return Step(
            "tenantdb generate-key", f"There is no usable secret key: {error.problem}. Make one and give it as TENANTDB_SECRET_KEYS:"
        )
    except RegistryNotInitialized:
        return Step("tenantdb init", "The settings are found, and the registry has no tables yet:")
    return _with_registry(db)


def _with_registry(db: TenantDB) -> Step:
    if not db.tenants.list(limit=1):
        return Step("tenantdb provision SLUG", "The registry is ready and knows no tenant yet. Make the first, for example acme:")
    if failed := db.tenants.list(TenantState.FAILED, limit=1):
        slug = failed[0].slug
        return Step(
            f"tenantdb provision {slug}",
            f"The tenant {slug} failed ({output.shown(failed[0].reason or '')}). When the cause is mended, continue:",
        )
    if db.settings.migrations is not None and (pending := db.migrations.pending()):
        return Step("tenantdb migrate", f"{len(pending)} of the tenants are not at the newest revision of the schema:")
    return Step("tenantdb check", "All is set up. `tenantdb list` shows the tenants; look at settings, servers and rights with:")
