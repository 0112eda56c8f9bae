"""The journal: procedures that outlive the process that began them.

Whoever works on an operation holds it by a lease, which ends by itself when the worker dies; then another takes over, and ``attempt``
grows. Every write compares worker, attempt and lease, so that a worker that slept past its lease writes nothing more. Leases are measured
by the database's clock, because workers run on several machines. Between claim and end nothing is audited: the journal is its own record.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, RowMapping, func, insert, select, update

from tenantdb.errors import OperationInProgress
from tenantdb.model import StrEnum
from tenantdb.registry import audit, fields, tables
from tenantdb.registry.transactions import Transactions

PROVISION = "provision"

_operations = tables.operations

Also = Callable[[Connection], object]


class OperationState(StrEnum):
    """Waiting for a worker, in the hands of one, or ended. A failed one runs again only when it is asked for by name."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One entry of the journal. ``step`` is where it is, ``started`` whether that step may have had effects already."""

    id: UUID
    kind: str
    tenant_id: UUID
    state: OperationState
    request_hash: bytes = field(repr=False)
    idempotency_key: str | None = None
    step: str | None = None
    started: bool = False
    attempt: int = 0
    worker: str | None = None
    lease_until: datetime | None = None
    error: str | None = None
    payload: Mapping[str, Any] = field(default_factory=dict, repr=False)
    created_at: datetime | None = None
    updated_at: datetime | None = None


class OperationStore:
    """Reads and writes the journal. `create` is the serving login's; all else is for the login that owns the registry."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    def create(
        self,
        connection: Connection,
        kind: str,
        tenant_id: UUID,
        *,
        payload: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        request_hash: bytes = b"",
    ) -> Operation:
        """A pending operation, in the caller's transaction. Raises: `IntegrityError` where the idempotency key is taken."""
        operation_id, now = uuid.uuid4(), tables.utcnow()
        connection.execute(
            insert(_operations).values(
                id=operation_id,
                kind=kind,
                tenant_id=tenant_id,
                idempotency_key=idempotency_key,
                request_hash=request_hash,
                state=OperationState.PENDING.value,
                started=False,
                attempt=0,
                payload=fields.document("payload", payload),
                created_at=now,
                updated_at=now,
            )
        )
        return _one(connection, operation_id)

    def get(self, operation_id: UUID) -> Operation | None:
        with self._transactions.read() as connection:
            return _first(connection, _operations.c.id == operation_id)

    def by_key(self, idempotency_key: str) -> Operation | None:
        """The operation that was asked for under this key."""
        with self._transactions.read() as connection:
            return self.by_key_in(connection, idempotency_key)

    def by_key_in(self, connection: Connection, idempotency_key: str) -> Operation | None:
        return _first(connection, _operations.c.idempotency_key == idempotency_key)

    def for_tenant(self, tenant_id: UUID) -> Operation | None:
        """The tenant's newest operation."""
        with self._transactions.read() as connection:
            return _first(connection, _operations.c.tenant_id == tenant_id)

    def claim(self, operation_id: UUID, worker: str, lease: timedelta) -> Operation | None:
        """Take a pending or failed operation, or one whose worker's lease has ended; None where another holds it or it is done."""
        with self._transactions.admin_write() as connection:
            now = _now(connection)
            takeable = _operations.c.state.in_([OperationState.PENDING.value, OperationState.FAILED.value]) | _abandoned(now)
            return _take(connection, operation_id, takeable, worker, now + lease)

    def claim_next(self, worker: str, lease: timedelta, *, kinds: Collection[str] = (PROVISION,)) -> Operation | None:
        """Take the oldest operation that waits or was abandoned; None where there is none. Two workers never get the same.

        Only of ``kinds``: newer code may write down what this one cannot carry out.
        """
        with self._transactions.admin_write() as connection:
            now = _now(connection)
            waiting = ((_operations.c.state == OperationState.PENDING.value) | _abandoned(now)) & _operations.c.kind.in_(kinds)
            operation_id = connection.scalar(
                select(_operations.c.id)
                .where(waiting)
                .order_by(_operations.c.created_at, _operations.c.id)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            return None if operation_id is None else _take(connection, operation_id, waiting, worker, now + lease)

    def queue_again(self, connection: Connection, operation: Operation) -> bool:
        """Let a worker take up a failed operation, in the caller's transaction, also as the serving login. False where it is not failed."""
        again = update(_operations).where((_operations.c.id == operation.id) & (_operations.c.state == OperationState.FAILED.value))
        return bool(connection.execute(again.values(state=OperationState.PENDING.value)).rowcount)

    def renew(self, operation: Operation, lease: timedelta) -> Operation:
        """Hold on. Raises: `OperationInProgress` where the lease has ended."""
        with self._transactions.admin_write() as connection:
            now = _now(connection)
            return _write(connection, operation, now, lease_until=now + lease)

    def record(self, operation: Operation, step: str, *, started: bool) -> Operation:
        """Write down where the operation is. Raises: `OperationInProgress` where the lease has ended."""
        with self._transactions.admin_write() as connection:
            return _write(connection, operation, _now(connection), step=step, started=started)

    def finish(self, operation: Operation, *, also: Also | None = None) -> Operation:
        """It is done; ``also`` writes in the same transaction. Raises: `OperationInProgress` where the lease has ended."""
        return self._end(operation, OperationState.DONE, None, also)

    def fail(self, operation: Operation, error: str, *, also: Also | None = None) -> Operation:
        """End it with a reason, which holds no secret; ``also`` writes in the same transaction. `claim` may take it up again.

        Raises: `OperationInProgress`; then nothing was written.
        """
        return self._end(operation, OperationState.FAILED, error, also)

    def _end(self, operation: Operation, state: OperationState, error: str | None, also: Also | None) -> Operation:
        with self._transactions.admin_write() as connection:
            ended = _write(connection, operation, _now(connection), state=state.value, error=error, worker=None, lease_until=None)
            details = {"attempt": operation.attempt, "step": operation.step}
            audit.record(
                connection,
                f"operation.{operation.kind}",
                tenant_id=operation.tenant_id,
                object=operation.id,
                outcome=str(state),
                details=details,
            )
            if also is not None:
                also(connection)
            return ended


def _now(connection: Connection) -> datetime:
    if connection.dialect.name == "sqlite":  # one machine, one clock
        return tables.utcnow()
    now: datetime = connection.execute(select(func.clock_timestamp(type_=tables.Moment()))).scalar_one()
    return now


def _abandoned(now: datetime) -> ColumnElement[bool]:
    return (_operations.c.state == OperationState.RUNNING.value) & (_operations.c.lease_until <= now)


def _take(
    connection: Connection, operation_id: UUID, takeable: ColumnElement[bool], worker: str, lease_until: datetime
) -> Operation | None:
    taken = connection.execute(
        update(_operations)
        .where((_operations.c.id == operation_id) & takeable)
        .values(
            state=OperationState.RUNNING.value,
            attempt=_operations.c.attempt + 1,
            worker=worker,
            lease_until=lease_until,
            error=None,
            updated_at=tables.utcnow(),
        )
    )
    return _one(connection, operation_id) if taken.rowcount else None


def _write(connection: Connection, operation: Operation, now: datetime, **values: Any) -> Operation:
    held = (
        (_operations.c.id == operation.id)
        & (_operations.c.state == OperationState.RUNNING.value)
        & (_operations.c.worker == operation.worker)
        & (_operations.c.attempt == operation.attempt)
        & (_operations.c.lease_until > now)
    )
    if connection.execute(update(_operations).where(held).values(**values, updated_at=tables.utcnow())).rowcount == 0:
        raise OperationInProgress(str(operation.tenant_id))
    return _one(connection, operation.id)


def _one(connection: Connection, operation_id: UUID) -> Operation:
    return _operation(connection.execute(select(_operations).where(_operations.c.id == operation_id)).mappings().one())


def _first(connection: Connection, where: ColumnElement[bool]) -> Operation | None:
    newest = select(_operations).where(where).order_by(_operations.c.created_at.desc(), _operations.c.id).limit(1)
    row = connection.execute(newest).mappings().first()
    return None if row is None else _operation(row)


def _operation(row: RowMapping) -> Operation:
    return Operation(**{**row, "state": OperationState(row["state"])})
