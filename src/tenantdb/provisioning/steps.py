"""The steps from a registry row to a tenant that can be served, each of which may run twice.

Every step looks before it acts. A name is looked for on the server before the journal says that it is used: found then, it is a
stranger's, and another is drawn. Found afterwards, it is what an earlier attempt of this very operation left. The database comes before
the roles, so that nothing has to be undone where a server has no room.
"""

from __future__ import annotations

from pydantic import SecretStr
from sqlalchemy.engine import Connection

from tenantdb.backends import TemplateMissing
from tenantdb.errors import HardeningFailed
from tenantdb.migrations import Scripts
from tenantdb.model import DatabaseRole, Template, Tenant, TenantState
from tenantdb.provisioning.golden import draw_name
from tenantdb.provisioning.hooks import StaticSeed
from tenantdb.provisioning.work import Also, Work
from tenantdb.registry.operations import TAKE
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


def make_database(work: Work) -> Also | None:
    """A clone of the golden database, closed to everybody until it is fitted to its tenant.

    CREATE DATABASE cannot run in a transaction, so a crash may leave the database behind. What is found is ours, and complete unless it
    is marked invalid (PostgreSQL manual, CREATE DATABASE and DROP DATABASE).
    """
    workshop = work.workshop()
    template = work.shop.golden.template(work.server, workshop)
    found = workshop.hold(work.tenant.database or "")
    if found and found.invalid:
        workshop.drop_database(work.tenant)
        found = None
    cloned = template if not found else None
    if not found:
        try:
            workshop.create_database(work.tenant, template)
        except TemplateMissing:
            template = work.shop.golden.template(work.server, workshop, instead_of=template)
            workshop.hold(work.tenant.database or "")
            workshop.create_database(work.tenant, template)
            cloned = template
    _open(work, cloned=cloned)
    if cloned is None:
        return None
    work.revision = cloned.revision
    return _record_revision(work, cloned.revision) if lacks_rows(work) or wants_to_be_asked(work) else None  # or else at the end


def open_database(work: Work) -> Also | None:
    """The same for a database that was made some other way."""
    _open(work, cloned=None)
    return None


def _open(work: Work, *, cloned: Template | None) -> None:
    """Roles with the passwords that the registry holds, grants, identity stamp; from here on the tenant's roles may enter, and nobody
    else ever could. Then the catalogue is asked what is open."""
    workshop = work.workshop()
    if work.server.backend != SQLITE:
        owner, runtime = (SecretStr(work.registry.passwords(work.record, role)[0]) for role in (DatabaseRole.OWNER, DatabaseRole.RUNTIME))
        workshop.create_roles(work.tenant, owner, runtime)
    workshop.open_database(work.tenant)
    workshop.fit(work.tenant, cloned)
    _verify(work, cloned=cloned is not None)


def is_behind(work: Work) -> bool:
    """Whether the golden database was not at the head revision, or the database was not cloned from it in this attempt."""
    return work.shop.golden.is_behind(work.revision or work.tenant.revision)


def migrate(work: Work) -> Also | None:
    """Bring the schema to head as the owner role."""
    with work.passing(DatabaseRole.OWNER) as engine:
        revision = Scripts(work.settings.migrations or "").upgrade(engine)
    work.revision = revision
    _verify(work)
    return _record_revision(work, revision)


def lacks_rows(work: Work) -> bool:
    """Whether there are seeds for this tenant: the static ones came with the golden database, where there is one."""
    return bool(_seeds(work))


def seed(work: Work) -> Also | None:
    """The application's first rows, as the runtime role, all seeds in one transaction."""
    with work.passing(DatabaseRole.RUNTIME) as engine:
        with work.shop.session_class(engine.execution_options(tenantdb_begin="IMMEDIATE")) as session, session.begin():
            for fn in _seeds(work):
                fn(session)
    return None


def _seeds(work: Work) -> list[StaticSeed]:
    seeds = [] if work.settings.migrations is not None or work.operation.kind == TAKE else list(work.hooks.static_seeds)
    if work.tenant.state is not TenantState.SPARE:
        seeds += [lambda session, fn=fn: fn(session, work.tenant) for fn in work.hooks.seeds]  # type: ignore[misc]
    return seeds


def wants_to_be_asked_first(work: Work) -> bool:
    return work.hooks.has_before("provision")


def ask_first(work: Work) -> Also | None:
    work.hooks.before("provision", work.tenant)
    return None


def wants_to_be_asked(work: Work) -> bool:
    """Whether there is a hook before a tenant is served: a step of its own, so that a refusal does not have the seeds run again."""
    return work.hooks.has_before("activate")


def ask(work: Work) -> Also | None:
    work.hooks.before("activate", work.tenant)
    return None


def serve(work: Work) -> Also | None:
    """Compare-and-set to active, the moment from which the tenant is served."""
    values = {} if work.revision is None else {"revision": work.revision}

    def write(connection: Connection) -> Tenant:
        tenants = work.registry.tenants
        return tenants.transition_in(connection, work.tenant, TenantState.ACTIVE, action="tenant.provision", values=values)

    return write


def offer(work: Work) -> Also | None:
    """A spare is complete: whoever signs up may have it."""
    revision = work.revision or work.tenant.revision

    def write(connection: Connection) -> None:
        work.registry.tenants.set_revision_in(connection, work.tenant, revision)
        work.registry.tenants.set_ready(connection, work.tenant, ready=True)

    return write


def _verify(work: Work, *, cloned: bool = False) -> None:
    if findings := work.workshop().verify(work.tenant, cloned=cloned):
        raise HardeningFailed(findings)


def _record_revision(work: Work, revision: str | None) -> Also:
    return lambda connection: work.registry.tenants.set_revision_in(connection, work.tenant, revision)
