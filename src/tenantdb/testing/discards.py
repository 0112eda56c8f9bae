"""How the tenants of a test go: at once, whatever state the test has left them in, and without a word to the application's hooks.

In production a tenant goes in steps that can be taken back, with fences, waiting and a certificate. Here nobody wants it back, so the
database and the roles are dropped, by a session of the provisioner that stays open, and then the registry forgets it as after a purge.
That costs a fraction. Where the server refuses because somebody is still connected, the fence comes first after all.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from sqlalchemy import update

from tenantdb.backends import FenceLevel, backend
from tenantdb.database import TenantDB
from tenantdb.model import Server, Tenant, TenantState
from tenantdb.registry import tables

if TYPE_CHECKING:
    from tenantdb.backends import Workshop


class Discards:
    """Discards tenants of one `TenantDB`. One thread at a time."""

    def __init__(self, db: TenantDB) -> None:
        self._db = db
        self._open = ExitStack()
        self._workshops: dict[uuid.UUID, Workshop] = {}

    def discard(self, tenants: Iterable[Tenant]) -> None:
        """Drop tenants; one that is gone already is left alone. May run again. All are tried before an error is raised."""
        problem: Exception | None = None
        for tenant in tenants:
            try:
                self._discard(tenant.id)
            except Exception as error:
                problem = problem or error
        if problem is not None:
            raise problem

    def _discard(self, tenant_id: uuid.UUID) -> None:
        record = self._db._registry.tenants.row(tenant_id)
        if record.tenant.state is TenantState.PURGED:
            return
        self._db._engines.forget(tenant_id)
        if record.server is not None and record.tenant.database is not None:
            self._drop(record.server, record.tenant)
        self._erase(record.tenant)

    def _drop(self, server: Server, tenant: Tenant) -> None:
        try:
            workshop = self._workshop(server)
            workshop.drop_database(tenant)
        except Exception:  # somebody is connected, or a test has ended our session
            self.close()
            workshop = self._workshop(server)
            workshop.fence(tenant, FenceLevel.CLOSED)
            workshop.drop_database(tenant)
        workshop.drop_roles(tenant)

    def _erase(self, tenant: Tenant) -> None:
        registry, tenants = self._db._registry, tables.tenants
        with registry.admin_write() as connection:
            connection.execute(
                update(tenants).where(tenants.c.id == tenant.id).values(state=TenantState.PURGING.value, legal_hold=None)
            )  # from any state, under a hold too: no step of a purge was asked for
            registry.tenants.erase(connection, registry.tenants.find_in(connection, tenant.id), {}, besides=uuid.uuid4(), action="test.end")
        registry.forget(tenant.id, tenant.slug)

    def _workshop(self, server: Server) -> Workshop:
        """Not in the budget: a test that has used it up must not keep its tenants from going."""
        if server.id not in self._workshops:
            settings = self._db.settings
            workshop = backend(server.backend).workshop(server, settings.provisioners[server.name], settings)
            self._workshops[server.id] = self._open.enter_context(workshop)
        return self._workshops[server.id]

    def close(self) -> None:
        """Close the provisioner's sessions; `discard` opens others."""
        self._workshops.clear()
        self._open.close()
