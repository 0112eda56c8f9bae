"""The audit log: who did what to which tenant, written in the transaction of the change it tells of.

Nobody is asked who acts: it is whoever the context says (`tenantdb.context.acting`). Details name fields and states, never values that
belong to a person. On PostgreSQL the serving login can add lines and read them, no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, insert, select

from tenantdb.context import current_actor
from tenantdb.model import AuditEntry, Tenant
from tenantdb.registry import tables
from tenantdb.registry.ids import tenant_id_of
from tenantdb.registry.transactions import Transactions


def record(
    connection: Connection,
    action: str,
    *,
    tenant_id: UUID | None = None,
    object: object | None = None,
    outcome: str = "done",
    details: Mapping[str, Any] | None = None,
) -> None:
    """Add a line in the caller's transaction."""
    actor = current_actor()
    connection.execute(
        insert(tables.audit).values(
            at=tables.utcnow(),
            actor=actor.actor,
            tenant_id=tenant_id,
            action=action,
            object=None if object is None else str(object),
            outcome=outcome,
            request_id=actor.request_id,
            details=dict(details or {}),
        )
    )


class AuditStore:
    """Reads the audit log."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    def list(self, tenant: Tenant | UUID | str | None = None, *, limit: int = 100) -> list[AuditEntry]:
        """The newest entries first, of one tenant or of all. Raises: `TenantNotFound`."""
        query = select(tables.audit).order_by(tables.audit.c.id.desc()).limit(limit)
        with self._transactions.read() as connection:
            if tenant is not None:
                query = query.where(tables.audit.c.tenant_id == tenant_id_of(connection, tenant))
            return [AuditEntry(**row) for row in connection.execute(query).mappings()]
