"""Tenants' databases for Alembic: one as its owner role, a scratch one, and bringing one tenant to head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.engine import Connection

from tenantdb.connections.engines import Engines
from tenantdb.connections.ledger import Work
from tenantdb.errors import MigrationError
from tenantdb.migrations.scripts import Scripts, current_revision
from tenantdb.model import DatabaseRole, Tenant, TenantState
from tenantdb.registry import Registry
from tenantdb.registry.records import TenantRecord
from tenantdb.resolvers import tenant_key
from tenantdb.settings import Settings

MIGRATED = (TenantState.ACTIVE, TenantState.SUSPENDED, TenantState.MAINTENANCE)


class TenantMigrations:
    """What `TenantDB.migrations` is."""

    def __init__(self, registry: Registry, engines: Engines, settings: Settings) -> None:
        self._registry = registry
        self._engines = engines
        self._settings = settings

    @property
    def scripts(self) -> Scripts:
        """The script location of the settings. Raises: `MigrationError` where there is none."""
        if self._settings.migrations is None:
            raise MigrationError("no migrations are configured; give migrations='package:folder' or TENANTDB_MIGRATIONS")
        return Scripts(self._settings.migrations)

    @property
    def head(self) -> str | None:
        return self.scripts.head

    @property
    def dialect_name(self) -> str:
        provisioners = [*self._settings.provisioners.values(), self._settings.url]
        return provisioners[0].backend

    def pending(self) -> list[Tenant]:
        """The tenants whose recorded revision is not the head, by slug: active, suspended and under maintenance."""
        head = self.head
        tenants = [tenant for state in MIGRATED for tenant in self._registry.tenants.list(state)]
        return sorted((tenant for tenant in tenants if tenant.revision != head), key=lambda tenant: tenant.slug)

    def upgrade(self, tenant: Tenant | str, revision: str = "head") -> Tenant:
        """Bring one tenant to a revision as its owner role, and record it. May run again. One at a time in a process.

        Raises: `MigrationError`, `ServerUnavailable`; what a migration raises passes through, with nothing of that migration left behind.
        """
        record = self._registry.tenants.record(tenant_key(tenant))
        with self._engines.passing(record, DatabaseRole.OWNER) as engine:
            found = self.scripts.upgrade(engine, revision)
        return self._registry.tenants.set_revision(record.tenant, found)

    @contextmanager
    def owner_connection(self, tenant: str) -> Iterator[Connection]:
        """See `tenantdb.migrations.env.Databases`."""
        record = self._registry.tenants.record(tenant_key(tenant))
        with self._engines.passing(record, DatabaseRole.OWNER) as engine:
            with engine.connect() as connection:
                yield connection
                connection.rollback()
                found = current_revision(connection)
        if found != record.tenant.revision:
            self._registry.tenants.set_revision(record.tenant, found)

    @contextmanager
    def scratch_connection(self) -> Iterator[Connection]:
        """See `tenantdb.migrations.env.Databases`. Raises: `MigrationError` where this process may not create databases."""
        name = next(iter(self._settings.provisioners), None)
        if name is None:
            raise MigrationError("autogenerate compares with a scratch database, and this process has no provisioner; give server=...")
        with self._engines.scratch(self._registry.servers.get(name)) as engine, engine.connect() as connection:
            yield connection


def found_revision(engines: Engines, record: TenantRecord) -> str | None:
    """At which revision a tenant is, by its database's own word. In the background class of the budget."""
    with engines.passing(record, DatabaseRole.OWNER, Work.BACKGROUND) as engine, engine.connect() as connection:
        return current_revision(connection)
