"""The steps that are an import's or a clone's own; the rest are those of provisioning. Each may run twice.

The data is loaded by the owner role, which may do nothing outside the tenant's own schemas. What a file makes it do inside is the tenant's
own affair; what must hold for every tenant is verified afterwards, before anybody is served.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy.engine import Connection

from tenantdb.backends import CarryFailed, backend
from tenantdb.errors import ConfigError, HardeningFailed, ImportRefused, TenantNotFound
from tenantdb.migrations import Scripts
from tenantdb.migrations.scripts import current_revision
from tenantdb.model import DatabaseRole, TenantState
from tenantdb.provisioning import steps
from tenantdb.provisioning.archive import Export, Opened, opened
from tenantdb.provisioning.work import Also, Work
from tenantdb.registry import Registry, audit
from tenantdb.registry.operations import CLONE
from tenantdb.settings import Settings

TEMPORARY = "tenantdb-clone-"
"""How the name of a file begins that is a clone's own, and goes with it."""

_GONE = frozenset({TenantState.PURGING, TenantState.PURGED})


def check(export: Export, registry: Registry, settings: Settings) -> None:
    """What can be told from the manifest. Raises: `ImportRefused`."""
    with contextlib.suppress(TenantNotFound):
        if registry.tenants.row(export.tenant).tenant.state in _GONE:
            raise ImportRefused(f"it holds the data of tenant {export.tenant}, which was purged here, and purged is for ever")
    check_revision(export.revision, settings)


def check_revision(revision: str | None, settings: Settings) -> None:
    """Raises: `ImportRefused`."""
    if revision is not None and (settings.migrations is None or not Scripts(settings.migrations).knows(revision)):
        raise ImportRefused(f"its schema is at revision {revision!r}, which the application's migrations do not know")


def create_database(work: Work) -> Also | None:
    """An empty one: a clone of the golden database would hold what the file holds too. As in `steps.create_database`, what is found is
    ours."""
    workshop = work.workshop()
    found = workshop.hold(work.tenant.database or "")
    if found and not found.invalid:
        return None
    if found:
        workshop.drop_database(work.tenant)
    workshop.create_database(work.tenant, None)
    return None


def load(work: Work) -> Also | None:
    """Fill the database from the file. What an earlier attempt left of it is dropped first, with the database: its loading may have been
    interrupted anywhere, and its program may be at work still, which ends with that."""
    location = work.shop.engines.locate(work.record, DatabaseRole.OWNER)
    carrier = backend(work.server.backend).carrier(location, work.settings)
    with _source(work) as source:
        if work.operation.attempt > 1:
            _start_over(work)
        export = source.export
        check(export, work.registry, work.settings)
        if (export.backend, carrier.member) != (work.server.backend, export.members[0].name):
            raise ImportRefused(f"it was made on {export.backend}, and server {work.server.name!r} is {work.server.backend}")
        source.verify()
        with work.passing(DatabaseRole.OWNER) as engine, engine.connect() as connection:
            there = carrier.look(connection)
        try:
            with work.shop.engines.place(work.server, "an import"):
                carrier.load(source.data, export.made_with, there)
        except CarryFailed as error:
            raise ImportRefused(f"the server did not take it: {error.problem}") from error
    work.workshop().fit(work.tenant)
    with work.passing(DatabaseRole.OWNER) as engine:
        with engine.begin() as connection:
            carrier.settle(connection)
        with engine.connect() as connection:
            revision = current_revision(connection)
    if revision != export.revision:
        raise ImportRefused(f"its data is at revision {revision!r}, and its manifest says {export.revision!r}")
    _verify(work)
    work.revision = revision

    def tell(connection: Connection) -> object:
        details = {"sha256": export.sha256, "revision": revision}
        audit.record(connection, f"tenant.{work.operation.kind}", tenant_id=work.tenant.id, object=export.tenant, details=details)
        return work.registry.tenants.set_revision_in(connection, work.tenant, revision)

    return tell


def neutralise(work: Work) -> Also | None:
    """A copy must not act for the original: the application's own functions take from it what mails, calls and signs, all in one
    transaction of the runtime role."""
    path = Path(str(work.wanted.get("path")))
    if work.operation.kind == CLONE and path.name.startswith(TEMPORARY):
        with contextlib.suppress(OSError):
            path.unlink()
            path.parent.rmdir()
    if not work.wanted.get("neutralise"):
        return None
    if not work.hooks.neutralisers:
        raise ConfigError("this process has no function registered with @db.neutralise, and the clone was asked for with them")
    with work.passing(DatabaseRole.RUNTIME) as engine:
        with work.shop.session_class(engine.execution_options(tenantdb_begin="IMMEDIATE")) as session, session.begin():
            for fn in work.hooks.neutralisers:
                fn(session, work.tenant)
    return None


def _verify(work: Work) -> None:
    if findings := work.workshop().verify(work.tenant):
        raise HardeningFailed(findings)


def _start_over(work: Work) -> None:
    """Raises: `ImportRefused` where the tenant is not being made any more: then what is there is not an earlier attempt's."""
    work.reload()
    if work.tenant.state is not TenantState.PROVISIONING or work.tenant.legal_hold is not None:
        raise ImportRefused(f"the tenant is {work.tenant.state} by now")
    workshop = work.workshop()
    workshop.hold(work.tenant.database or "")
    workshop.drop_database(work.tenant)
    workshop.create_database(work.tenant, None)
    steps.open_database(work)


@contextlib.contextmanager
def _source(work: Work) -> Iterator[Opened]:
    """The very file that was asked for. Raises: `ImportRefused` where it is not on this machine, or another by now."""
    path = Path(str(work.wanted.get("path")))
    if not os.path.isfile(path):
        raise ImportRefused(f"{path.name!r} is not on this machine; go on where it is, or import it anew")
    with opened(path) as source:
        if source.export.sha256 != work.wanted.get("sha256"):
            raise ImportRefused(f"{path.name!r} is another file than the one that was asked for")
        yield source
