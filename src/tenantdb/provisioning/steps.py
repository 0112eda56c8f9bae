"""The steps from a registry row to a tenant that can be served, each of which may run twice.

Every step looks before it acts. The ones that make something with a name distinguish "found before the journal says started", which is a
stranger's and never touched, from "found after", which is what an earlier attempt of this very operation left. The database comes before
the roles, so that a name that turns out to be taken costs nothing that would have to be undone.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from tenantdb.backends import backend
from tenantdb.connections.engines import Engines
from tenantdb.errors import ConfigError, HardeningFailed, OperationInProgress
from tenantdb.migrations import Scripts
from tenantdb.model import DatabaseRole, Server, Tenant, TenantState
from tenantdb.provisioning.hooks import Hooks
from tenantdb.registry import Registry
from tenantdb.registry.operations import Operation
from tenantdb.registry.records import TenantRecord
from tenantdb.registry.secrets import password
from tenantdb.settings import SQLITE, Settings

if TYPE_CHECKING:
    from tenantdb.backends import Workshop

LEASE = timedelta(minutes=5)


@dataclass
class Work:
    """One attempt at one operation: what the steps read and move forward."""

    registry: Registry
    settings: Settings
    engines: Engines
    hooks: Hooks
    session_class: type[Session]
    operation: Operation
    record: TenantRecord
    wanted: Mapping[str, Any]  # the server or region that was asked for

    @property
    def tenant(self) -> Tenant:
        return self.record.tenant

    def reload(self) -> None:
        self.record = self.registry.tenants.record(self.tenant.id)

    def start(self) -> None:
        """Write down that the step under way may have effects from here on."""
        self.operation = self.registry.operations.record(self.operation, self.operation.step or "", started=True)

    @property
    def server(self) -> Server:
        if self.record.server is None:
            raise OperationInProgress(self.tenant.slug)
        return self.record.server

    @contextmanager
    def workshop(self, server: Server | None = None) -> Iterator[Workshop]:
        server = server or self.server
        url = self.settings.provisioners.get(server.name)
        if url is None:
            raise ConfigError(f"this process has no provisioner for server {server.name!r}; give it in servers={{...}}")
        with self.engines.place(server, "the provisioner"), backend(server.backend).workshop(server, url, self.settings) as workshop:
            yield workshop


def draw_name() -> str:
    """A name for a database or role that says nothing and that nobody can guess: 64 random bits."""
    return f"t_{secrets.token_hex(8)}"


def reserve(work: Work) -> None:
    """Choose a server and names that are free there, seal two passwords, and write it all down before anything is made."""
    if work.tenant.database is not None:
        return
    work.hooks.before("provision", work.tenant)
    server = work.registry.servers.pick(work.wanted.get("server"), region=work.wanted.get("region"), among=work.settings.provisioners)
    with work.workshop(server) as workshop:
        database = draw_name()
        while workshop.find_database(database):
            database = draw_name()
    _reserve(work, server, database, replacing=None)


def _reserve(work: Work, server: Server, database: str, *, replacing: str | None) -> None:
    if server.backend == SQLITE:
        work.registry.tenants.reserve(
            work.tenant,
            server,
            database=database,
            owner_role=database,
            runtime_role=database,
            owner_secret=None,
            runtime_secret=None,
            replacing=replacing,
        )
    else:
        owner, runtime = draw_name(), draw_name()

        def sealed(role: DatabaseRole, name: str) -> bytes:
            return work.registry.seal_password(password(), role=role, tenant=work.tenant, server=server, database=database, role_name=name)

        work.registry.tenants.reserve(
            work.tenant,
            server,
            database=database,
            owner_role=owner,
            runtime_role=runtime,
            owner_secret=sealed(DatabaseRole.OWNER, owner),
            runtime_secret=sealed(DatabaseRole.RUNTIME, runtime),
            replacing=replacing,
        )
    work.reload()


def create_database(work: Work) -> None:
    """CREATE DATABASE cannot run in a transaction, so a crash may leave the database behind while the journal still says "started".

    Then it is ours, and complete unless it is marked invalid (PostgreSQL manual, CREATE DATABASE and DROP DATABASE).
    """
    with work.workshop() as workshop:
        while (found := workshop.find_database(work.tenant.database or "")) and not work.operation.started:
            _reserve(work, work.server, draw_name(), replacing=work.tenant.database)
        work.start()
        if found and found.invalid:
            workshop.drop_invalid_database(found.name)
            found = None
        if not found:
            workshop.create_database(work.tenant)


def create_roles(work: Work) -> None:
    """The two roles, with the passwords that the registry holds; again, if they are there from an earlier attempt."""
    with work.workshop() as workshop:
        while not work.operation.started and workshop.find_roles([work.tenant.owner_role or "", work.tenant.runtime_role or ""]):
            _reserve(work, work.server, work.tenant.database or "", replacing=work.tenant.database)
        work.start()
        if work.server.backend != SQLITE:
            owner = SecretStr(work.registry.owner_password(work.record))
            workshop.create_roles(work.tenant, owner, SecretStr(work.registry.runtime_password(work.record)))


def open_database(work: Work) -> None:
    """Grants, schemas, extensions, identity stamp; from here on the tenant's roles may enter, and nobody else ever could."""
    with work.workshop() as workshop:
        workshop.open_database(work.tenant)


def migrate(work: Work) -> None:
    """Bring the schema to head as the owner role, and record where it is."""
    if work.settings.migrations is None:
        return
    with work.engines.passing(work.record, DatabaseRole.OWNER) as engine:
        revision = Scripts(work.settings.migrations).upgrade(engine)
    work.registry.tenants.set_revision(work.tenant, revision)
    work.reload()


def seed(work: Work) -> None:
    """The application's first rows, as the runtime role, all seeds in one transaction."""
    if not work.hooks.seeds:
        return
    with work.engines.passing(work.record, DatabaseRole.RUNTIME) as engine:
        with work.session_class(engine.execution_options(tenantdb_begin="IMMEDIATE")) as session, session.begin():
            for fn in work.hooks.seeds:
                fn(session, work.tenant)


def verify(work: Work) -> None:
    """Enter as the application will, and look with the catalogue's eyes at what is open."""
    with work.engines.passing(work.record, DatabaseRole.RUNTIME) as engine, engine.connect():
        pass  # connecting checks role and identity stamp
    with work.workshop() as workshop:
        if findings := workshop.verify(work.tenant):
            raise HardeningFailed(findings)


def activate(work: Work) -> None:
    """Compare-and-set to active, the moment from which the tenant is served, and the end of the operation, in one transaction."""
    work.hooks.before("activate", work.tenant)
    tenants = work.registry.tenants

    def serve(connection: Connection) -> None:
        tenants.transition_in(connection, work.tenant, TenantState.ACTIVE, action="tenant.provision")

    work.operation = work.registry.operations.finish(work.operation, also=serve)
    work.registry.forget(work.tenant.id, work.tenant.slug)
    work.reload()


STEPS: tuple[tuple[str, Callable[[Work], None]], ...] = (
    ("reserve", reserve),
    ("database", create_database),
    ("roles", create_roles),
    ("open", open_database),
    ("migrate", migrate),
    ("seed", seed),
    ("verify", verify),
    ("activate", activate),
)
