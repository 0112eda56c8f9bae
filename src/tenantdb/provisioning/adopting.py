"""The steps by which a database that somebody else made becomes a tenant's, and goes back. Each may run twice.

The old owner's login is in no row and no log: it is an argument of the call, and only the call's own attempt has it. Another worker that
takes the operation up before the database has changed hands may need it, and says so; behind that point the provisioner is enough.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import SecretStr

from tenantdb.errors import AdoptRefused, HardeningFailed
from tenantdb.migrations import Scripts
from tenantdb.migrations.scripts import current_revision
from tenantdb.model import DatabaseRole, TenantState
from tenantdb.provisioning import ending
from tenantdb.provisioning.golden import draw_name
from tenantdb.provisioning.work import Also, Work
from tenantdb.registry.secrets import password
from tenantdb.settings import SQLITE, ConnectionURL, Settings

OWNER_URL = "owner_url"
"""Under this name the call's attempt finds the login, in memory alone."""


def reserve(work: Work) -> Also | None:
    """New roles for the database that is there; on SQLite a new file for what is in it."""
    if work.tenant.database is not None:
        return None
    work.hooks.before("adopt", work.tenant)
    server, database = work.registry.servers.get(str(work.wanted["server"])), str(work.wanted["database"])
    workshop, owner, runtime = work.workshop(server), draw_name(), draw_name()
    if server.backend == SQLITE:
        while workshop.are_taken(owner, []):
            owner = draw_name()
        return work.registry.tenants.reserve(
            work.tenant,
            server,
            database=owner,
            owner_role=owner,
            runtime_role=owner,
            owner_secret=None,
            runtime_secret=None,
            adopted_from=str(work.wanted["owner"]),
        )
    while workshop.find_roles([owner, runtime]):
        owner, runtime = draw_name(), draw_name()

    def sealed(role: DatabaseRole, name: str) -> bytes:
        return work.registry.seal_password(password(), role=role, tenant=work.tenant, server=server, database=database, role_name=name)

    return work.registry.tenants.reserve(
        work.tenant,
        server,
        database=database,
        owner_role=owner,
        runtime_role=runtime,
        owner_secret=sealed(DatabaseRole.OWNER, owner),
        runtime_secret=sealed(DatabaseRole.RUNTIME, runtime),
        adopted_from=str(work.wanted["owner"]),
    )


def create_roles(work: Work) -> Also | None:
    if work.server.backend != SQLITE:
        owner, runtime = (SecretStr(work.registry.passwords(work.record, role)[0]) for role in (DatabaseRole.OWNER, DatabaseRole.RUNTIME))
        work.workshop().create_roles(work.tenant, owner, runtime)
    return None


def convert(work: Work) -> Also | None:
    """All of it changes hands, its old owner is shut out, and then it is fitted as every new database is."""
    workshop = work.workshop()
    workshop.hand_over(work.tenant, _owner_url(work))
    workshop.open_database(work.tenant)
    workshop.fit(work.tenant)
    return None


def check(work: Work) -> Also | None:
    """Enter as the owner role, which checks the identity stamp, and read, or stamp, the revision; then ask the catalogue what is open."""
    asked_for = work.wanted.get("revision")
    with work.passing(DatabaseRole.OWNER) as engine:
        with engine.connect() as connection:
            found = current_revision(connection)
        if found is None and asked_for is not None:
            found = Scripts(work.settings.migrations or "").stamp(engine, str(asked_for))
    check_revisions(work.tenant.slug, None if found is None else [found], asked_for, work.settings)
    if findings := work.workshop().verify(work.tenant):
        raise HardeningFailed(findings)
    return lambda connection: work.registry.tenants.set_revision_in(connection, work.tenant, found)


def check_revisions(slug: str, found: Sequence[str] | None, asked_for: object, settings: Settings) -> None:
    """Raises: `AdoptRefused` where the application's migrations do not know what the database is at."""
    if settings.migrations is None:
        if asked_for is not None:
            raise AdoptRefused(slug, [f"there are no migrations that could know revision {asked_for!r}"])
        return
    if found is not None and len(found) > 1:
        raise AdoptRefused(slug, [f"its alembic_version names {len(found)} revisions, and a tenant is at one"])
    if found is not None and asked_for is not None and list(found) not in ([], [asked_for]):
        raise AdoptRefused(slug, [f"its alembic_version says {found[0]!r}, and revision={asked_for!r} was given"])
    revision = found[0] if found else asked_for
    if revision is None:
        if found is None:
            raise AdoptRefused(slug, ["it has no alembic_version; revision='...' says at which revision of the migrations its schema is"])
        return
    if not Scripts(settings.migrations).knows(str(revision)):
        raise AdoptRefused(slug, [f"its schema is at revision {revision!r}, which the application's migrations do not know"])


def serve(work: Work) -> Also | None:
    return lambda connection: work.registry.tenants.transition_in(connection, work.tenant, TenantState.ACTIVE, action="tenant.adopt")


def hand_back(work: Work) -> Also | None:
    ending.ensure_purging(work)
    if work.record.server is not None:
        work.workshop().hand_back(work.tenant, _owner_url(work))
    return None


def let_go(work: Work) -> Also | None:
    """Leave a tombstone, and a certificate that says where the data is now."""
    certificate = ending.certificate(work, given_back=True)
    return lambda connection: work.registry.tenants.erase(
        connection, work.tenant, certificate, besides=work.operation.id, action="tenant.give_back"
    )


def _owner_url(work: Work) -> ConnectionURL | None:
    url = work.wanted.get(OWNER_URL)
    return url if isinstance(url, ConnectionURL) else None
