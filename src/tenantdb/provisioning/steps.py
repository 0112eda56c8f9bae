"""The steps from a registry row to a tenant that can be served, each of which may run twice.

Every step looks before it acts. A name is looked for on the server before the journal says that it is used: found then, it is a
stranger's, and another is drawn. Found afterwards, it is what an earlier attempt of this very operation left. The database comes before
the roles, so that nothing has to be undone where a server has no room.
"""

from __future__ import annotations

from pydantic import SecretStr

from tenantdb.errors import HardeningFailed
from tenantdb.migrations import Scripts
from tenantdb.model import DatabaseRole, TenantState
from tenantdb.provisioning.golden import draw_name
from tenantdb.provisioning.work import Also, Work
from tenantdb.registry.secrets import password
from tenantdb.settings import SQLITE


def reserve(work: Work) -> Also | None:
    """Choose a server and names that are free there, seal two passwords, and have it all written down before anything is made."""
    if work.tenant.database is not None:
        return None
    if work.tenant.state is TenantState.PROVISIONING:
        work.hooks.before("provision", work.tenant)
    server = work.registry.servers.pick(work.wanted.get("server"), region=work.wanted.get("region"), among=work.settings.provisioners)
    workshop = work.workshop(server)
    database, owner, runtime = draw_name(), draw_name(), draw_name()
    while workshop.are_taken(database, [owner, runtime]):
        database, owner, runtime = draw_name(), draw_name(), draw_name()
    if server.backend == SQLITE:
        return work.registry.tenants.reserve(
            work.tenant, server, database=database, owner_role=database, runtime_role=database, owner_secret=None, runtime_secret=None
        )

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
    )


def create_database(work: Work) -> Also | None:
    """A clone of the golden database, closed to everybody.

    CREATE DATABASE cannot run in a transaction, so a crash may leave the database behind. What is found is ours, and complete unless it
    is marked invalid (PostgreSQL manual, CREATE DATABASE and DROP DATABASE).
    """
    workshop = work.workshop()
    template = work.shop.golden.template(work.server, workshop)
    found = workshop.hold(work.tenant.database or "")
    if found and not found.invalid:
        return None
    if found:
        workshop.drop_database(work.tenant)
    workshop.create_database(work.tenant, template)
    work.cloned = template is not None
    return None if template is None else _record_revision(work, template.revision)


def open_database(work: Work) -> Also | None:
    """Roles with the passwords that the registry holds, grants, identity stamp; from here on the tenant's roles may enter, and nobody
    else ever could. Then the catalogue is asked what is open."""
    workshop = work.workshop()
    if work.server.backend != SQLITE:
        owner, runtime = (SecretStr(work.registry.passwords(work.record, role)[0]) for role in (DatabaseRole.OWNER, DatabaseRole.RUNTIME))
        workshop.create_roles(work.tenant, owner, runtime)
    workshop.open_database(work.tenant)
    workshop.fit(work.tenant)
    _verify(work, cloned=work.cloned)
    return None


def is_behind(work: Work) -> bool:
    """Whether the golden database was not at the head revision, or the database was not cloned from it in this attempt."""
    return work.settings.migrations is not None and (work.tenant.revision is None or work.tenant.revision != work.shop.golden.head())


def migrate(work: Work) -> Also | None:
    """Bring the schema to head as the owner role."""
    with work.passing(DatabaseRole.OWNER) as engine:
        revision = Scripts(work.settings.migrations or "").upgrade(engine)
    _verify(work)
    return _record_revision(work, revision)


def seed(work: Work) -> Also | None:
    """Enter as the application will, which checks role and identity stamp, and write the application's first rows, all in one
    transaction."""
    with work.passing(DatabaseRole.RUNTIME) as engine:
        with work.shop.session_class(engine.execution_options(tenantdb_begin="IMMEDIATE")) as session, session.begin():
            session.connection()
            for static in work.hooks.static_seeds:
                static(session)
            if work.tenant.state is not TenantState.SPARE:
                for fn in work.hooks.seeds:
                    fn(session, work.tenant)
    return None


def seed_taken(work: Work) -> Also | None:
    """What a spare that was taken still lacks: rows that depend on whose it is now."""
    work.hooks.before("provision", work.tenant)
    if work.hooks.seeds:
        with work.passing(DatabaseRole.RUNTIME) as engine:
            with work.shop.session_class(engine.execution_options(tenantdb_begin="IMMEDIATE")) as session, session.begin():
                for fn in work.hooks.seeds:
                    fn(session, work.tenant)
    return None


def wants_to_be_asked(work: Work) -> bool:
    """Whether there is a hook before a tenant is served: a step of its own, so that a refusal does not have the seeds run again."""
    return work.hooks.has_before("activate")


def ask(work: Work) -> Also | None:
    work.hooks.before("activate", work.tenant)
    return None


def serve(work: Work) -> Also | None:
    """Compare-and-set to active, the moment from which the tenant is served."""
    return lambda connection: work.registry.tenants.transition_in(connection, work.tenant, TenantState.ACTIVE, action="tenant.provision")


def offer(work: Work) -> Also | None:
    """A spare is complete: whoever signs up may have it."""
    return lambda connection: work.registry.tenants.set_ready(connection, work.tenant, ready=True)


def _verify(work: Work, *, cloned: bool = False) -> None:
    if findings := work.workshop().verify(work.tenant, cloned=cloned):
        raise HardeningFailed(findings)


def _record_revision(work: Work, revision: str | None) -> Also:
    return lambda connection: work.registry.tenants.set_revision_in(connection, work.tenant, revision)
