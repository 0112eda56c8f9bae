"""The journal: procedures that outlive the process that began them.

Whoever works on an operation holds it by a lease, which ends by itself when the worker dies; then another takes over, and ``attempt``
grows. Every write compares worker, attempt and lease, so that a worker that slept past its lease writes nothing more. Leases are measured
by the database's clock, because workers run on several machines. Between claim and end nothing is audited: the journal is its own record.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Interval, RowMapping, bindparam, func, insert, select, update

from tenantdb.errors import OperationInProgress
from tenantdb.model import Server, StrEnum
from tenantdb.registry import audit, fields, tables
from tenantdb.registry.transactions import Transactions

PROVISION = "provision"
SPARE = "spare"
REFRESH = "refresh"
TAKE = "take"
FENCE = "fence"
ACTIVATE = "activate"
RESTORE = "restore"
PURGE = "purge"
ROTATE = "rotate"
IMPORT = "import"
CLONE = "clone"
ADOPT = "adopt"
GIVE_BACK = "give_back"

SANCTIONED = frozenset({SPARE, REFRESH, ROTATE, ADOPT, GIVE_BACK, IMPORT, CLONE})
"""Kinds that only the login that owns the registry may write down, and that nobody carries out otherwise: a worker does with databases what
they say, and whoever has taken over a serving process could say anything. What is done is sanctioned no more."""

_operations = tables.operations

Also = Callable[[Connection], object]

_BEGIN = insert(_operations).values(
    lease_until=func.clock_timestamp(type_=tables.Moment()) + bindparam("lease", type_=Interval()),
    **{
        column.name: bindparam(column.name, type_=column.type)
        for column in _operations.c
        if column.name not in ("lease_until", "sanctioned")
    },
)
"""One that is in somebody's hands from the start, by the database's clock."""


class OperationState(StrEnum):
    """Waiting for a worker, in the hands of one, or ended. A failed one runs again only when it is asked for by name; one that is to be
    tried again by itself is pending, with the error of its last attempt, and ``lease_until`` says not before when."""

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
    """Reads and writes the journal."""

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
        worker: str | None = None,
        lease: timedelta | None = None,
        done: bool = False,
    ) -> Operation:
        """An operation, in the caller's transaction: pending, in the hands of ``worker`` from the start, or ``done`` with it.

        ``worker`` is for a tenant that is new: of others only `claim` knows whether somebody else is at work.

        Raises: `IntegrityError` where the idempotency key is taken.
        """
        now = tables.utcnow()
        values: dict[str, Any] = {
            "id": uuid.uuid4(),
            "kind": kind,
            "tenant_id": tenant_id,
            "idempotency_key": idempotency_key,
            "request_hash": request_hash,
            "state": OperationState.PENDING,
            "step": None,
            "started": False,
            "attempt": 0,
            "worker": None,
            "lease_until": None,
            "error": None,
            "payload": fields.document("payload", payload),
            "created_at": now,
            "updated_at": now,
        }
        if done:
            values |= {"state": OperationState.DONE, "worker": worker}
        elif worker is not None and lease is not None:
            values |= {"state": OperationState.RUNNING, "attempt": 1, "worker": worker, "lease_until": None}
        written = {**values, "state": values["state"].value}
        if kind in SANCTIONED:
            written["sanctioned"] = True
        if values["state"] is not OperationState.RUNNING or lease is None:
            connection.execute(insert(_operations), written)
        elif connection.dialect.name == "sqlite" or kind in SANCTIONED:
            connection.execute(insert(_operations), {**written, "lease_until": now_at(connection) + lease})
        else:
            connection.execute(_BEGIN, {**written, "lease": lease})
        return Operation(**values)

    def get(self, operation_id: UUID) -> Operation | None:
        with self._transactions.read() as connection:
            return _first(connection, _operations.c.id == operation_id)

    def by_key(self, idempotency_key: str) -> Operation | None:
        """The operation that was asked for under this key."""
        with self._transactions.read() as connection:
            return self.by_key_in(connection, idempotency_key)

    def by_key_in(self, connection: Connection, idempotency_key: str) -> Operation | None:
        return _first(connection, _operations.c.idempotency_key == idempotency_key)

    def for_tenant(self, tenant_id: UUID, *, kinds: Collection[str] | None = None) -> Operation | None:
        """The tenant's newest operation, of all or of some kinds."""
        with self._transactions.read() as connection:
            return self.for_tenant_in(connection, tenant_id, kinds=kinds)

    def for_tenant_in(self, connection: Connection, tenant_id: UUID, *, kinds: Collection[str] | None = None) -> Operation | None:
        where = _operations.c.tenant_id == tenant_id
        return _first(connection, where if kinds is None else where & _operations.c.kind.in_(kinds))

    def unfinished(self, *, kinds: Collection[str] | None = None) -> list[Operation]:
        """What is pending, running or failed, the oldest first."""
        where = _operations.c.state != OperationState.DONE.value
        if kinds is not None:
            where &= _operations.c.kind.in_(kinds)
        with self._transactions.read() as connection:
            rows = connection.execute(select(_operations).where(where).order_by(_operations.c.created_at, _operations.c.id)).mappings()
            return [_operation(row) for row in rows]

    def claim(self, operation_id: UUID, worker: str, lease: timedelta, *, dead: Collection[str] = ()) -> Operation | None:
        """Take a pending or failed operation, or one whose worker's lease has ended, or is ``dead``; None where another holds it or it is
        done."""
        with self._transactions.admin_write() as connection:
            now = now_at(connection)
            takeable = _operations.c.state.in_([OperationState.PENDING.value, OperationState.FAILED.value]) | _abandoned(now, dead)
            takeable &= _allowed()
            return _take(connection, operation_id, takeable, worker, now + lease, dead)

    def claim_next(
        self,
        worker: str,
        lease: timedelta,
        *,
        kinds: Collection[str] = (PROVISION,),
        servers: Collection[Server] | None = None,
        dead: Collection[str] = (),
    ) -> Operation | None:
        """Take the oldest operation that waits or was abandoned; None where there is none. Two workers never get the same.

        Only of ``kinds``: newer code may write down what this one cannot carry out. Only of tenants on ``servers``, or that have no place
        yet and may get one there.
        """
        with self._transactions.admin_write() as connection:
            now = now_at(connection)
            due = _operations.c.lease_until.is_(None) | (_operations.c.lease_until <= now)
            waiting = ((_operations.c.state == OperationState.PENDING.value) & due) | _abandoned(now, dead)
            waiting &= _operations.c.kind.in_(kinds) & _allowed()
            other = _operations.alias()
            busy = select(other.c.id).where(
                (other.c.tenant_id == _operations.c.tenant_id)
                & (other.c.id != _operations.c.id)
                & (other.c.state == OperationState.RUNNING.value)
                & (other.c.lease_until > now)
                & ~other.c.worker.in_(dead)
            )
            tenants = tables.tenants
            query = select(_operations.c.id).join(tenants, tenants.c.id == _operations.c.tenant_id).where(waiting & ~busy.exists())
            if servers is not None:
                query = query.where(tenants.c.server_id.in_([server.id for server in servers]) | _may_get_a_place_on(servers))
            # The tenant's row first, as everybody does, and of those that nobody else is busy with.
            oldest = query.order_by(_operations.c.created_at, _operations.c.id).limit(1).with_for_update(skip_locked=True, of=tenants)
            operation_id = connection.scalar(oldest)
            return None if operation_id is None else _take(connection, operation_id, waiting, worker, now + lease, dead)

    def queue_again(self, connection: Connection, operation: Operation) -> bool:
        """Let a worker take up a failed operation, in the caller's transaction, also as the serving login. False where it is not failed."""
        again = update(_operations).where((_operations.c.id == operation.id) & (_operations.c.state == OperationState.FAILED.value))
        return bool(connection.execute(again.values(state=OperationState.PENDING.value)).rowcount)

    def workers(self) -> list[str]:
        """Who has something in hands."""
        running = _operations.c.state == OperationState.RUNNING.value
        with self._transactions.read() as connection:
            return [worker for worker in connection.scalars(select(_operations.c.worker).where(running).distinct()) if worker]

    def renew(self, operation: Operation, lease: timedelta) -> Operation:
        """Hold on. Raises: `OperationInProgress` where the lease has ended."""
        with self._transactions.admin_write() as connection:
            now = now_at(connection)
            return _write(connection, operation, now, lease_until=now + lease)

    def record(self, operation: Operation, step: str, *, also: Also | None = None) -> Operation:
        """Write down which step begins; ``also`` writes what the last one found, in the same transaction.

        Without ``also`` the write need not survive a crash of the registry's server: a step that is not written down is done again.
        Raises: `OperationInProgress` where the lease has ended.
        """
        with self._transactions.admin_write() as connection:
            if also is not None:
                also(connection)
            return _write(connection, operation, _clock(connection), lightly=also is None, step=step, started=True)

    def finish(self, operation: Operation, *, also: Also | None = None) -> Operation:
        """It is done; ``also`` writes in the same transaction. Raises: `OperationInProgress` where the lease has ended."""
        return self._end(operation, OperationState.DONE, None, also)

    def fail(self, operation: Operation, error: str, *, also: Also | None = None) -> Operation:
        """End it with a reason, which holds no secret; ``also`` writes in the same transaction. `claim` may take it up again.

        Raises: `OperationInProgress`; then nothing was written.
        """
        return self._end(operation, OperationState.FAILED, error, also)

    def postpone(self, operation: Operation, error: str, wait: timedelta) -> Operation:
        """This attempt failed; a worker tries again, not before ``wait`` has passed. Raises: as `fail`."""
        return self._end(operation, OperationState.PENDING, error, None, wait)

    def _end(
        self, operation: Operation, state: OperationState, error: str | None, also: Also | None, wait: timedelta | None = None
    ) -> Operation:
        with self._transactions.admin_write() as connection:
            if also is not None:
                also(connection)
            until = None if wait is None else now_at(connection) + wait
            values: dict[str, Any] = {"state": state.value, "error": error, "worker": None, "lease_until": until}
            if state is OperationState.DONE and operation.kind in SANCTIONED:
                values["sanctioned"] = None
            ended = _write(connection, operation, _clock(connection), **values)
            if state is not OperationState.DONE or also is None:  # what was done tells of itself, where it changes anything here
                audit.record(
                    connection,
                    f"operation.{operation.kind}",
                    tenant_id=operation.tenant_id,
                    object=operation.id,
                    outcome=str(state),
                    details={"attempt": operation.attempt, "step": operation.step},
                )
            return ended


def now_at(connection: Connection) -> datetime:
    """What time it is at the registry, by which leases are measured."""
    if connection.dialect.name == "sqlite":  # one machine, one clock
        return tables.utcnow()
    now: datetime = connection.execute(select(func.clock_timestamp(type_=tables.Moment()))).scalar_one()
    return now


def _clock(connection: Connection) -> Any:
    """The same for a condition, without asking first."""
    return tables.utcnow() if connection.dialect.name == "sqlite" else func.clock_timestamp(type_=tables.Moment())


def _abandoned(now: datetime, dead: Collection[str] = ()) -> ColumnElement[bool]:
    gone = _operations.c.lease_until <= now
    if dead:
        gone |= _operations.c.worker.in_(dead)
    return (_operations.c.state == OperationState.RUNNING.value) & gone


def _may_get_a_place_on(servers: Collection[Server]) -> ColumnElement[bool]:
    """A tenant without a place, for which nobody has asked for a server or a region that is none of these."""
    named, region = _operations.c.payload["server"].as_string(), _operations.c.payload["region"].as_string()
    fits = (named.is_(None) | named.in_([server.name for server in servers])) & (
        region.is_(None) | region.in_([server.region for server in servers if server.region is not None])
    )
    placeless: ColumnElement[bool] = tables.tenants.c.server_id.is_(None) & fits
    return placeless


def _allowed() -> ColumnElement[bool]:
    return _operations.c.kind.not_in(SANCTIONED) | _operations.c.sanctioned.is_(True)


def _busy(connection: Connection, tenant_id: UUID, *, besides: UUID | None = None, dead: Collection[str] = ()) -> bool:
    """Whether a living worker has another operation of the tenant in hands: they would undo each other's work."""
    running = (_operations.c.tenant_id == tenant_id) & (_operations.c.state == OperationState.RUNNING.value)
    query = select(_operations.c.id).where(running & ~_abandoned(now_at(connection), dead))
    return connection.execute(query if besides is None else query.where(_operations.c.id != besides)).first() is not None


def _take(
    connection: Connection,
    operation_id: UUID,
    takeable: ColumnElement[bool],
    worker: str,
    lease_until: datetime,
    dead: Collection[str] = (),
) -> Operation | None:
    """One operation of a tenant at a time."""
    tenant_id = connection.scalar(select(_operations.c.tenant_id).where(_operations.c.id == operation_id))
    connection.execute(select(tables.tenants.c.id).where(tables.tenants.c.id == tenant_id).with_for_update())
    if tenant_id is None or _busy(connection, tenant_id, besides=operation_id, dead=dead):
        return None
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


def _write(connection: Connection, operation: Operation, now: Any, *, lightly: bool = False, **values: Any) -> Operation:
    """``lightly``: it need not survive a crash of the database server."""
    held = (
        (_operations.c.id == operation.id)
        & (_operations.c.state == OperationState.RUNNING.value)
        & (_operations.c.worker == operation.worker)
        & (_operations.c.attempt == operation.attempt)
        & (_operations.c.lease_until > now)
    )
    if lightly and connection.dialect.name == "postgresql":
        held &= func.set_config("synchronous_commit", "off", True) == "off"  # for this transaction, and without asking apart
    values["updated_at"] = tables.utcnow()
    if connection.execute(update(_operations).where(held).values(**values)).rowcount == 0:
        raise OperationInProgress(str(operation.tenant_id))
    if "state" in values:
        values["state"] = OperationState(values["state"])
    values.pop("sanctioned", None)
    return replace(operation, **values)


def _one(connection: Connection, operation_id: UUID) -> Operation:
    return _operation(connection.execute(select(_operations).where(_operations.c.id == operation_id)).mappings().one())


def _first(connection: Connection, where: ColumnElement[bool]) -> Operation | None:
    newest = select(_operations).where(where).order_by(_operations.c.created_at.desc(), _operations.c.id).limit(1)
    row = connection.execute(newest).mappings().first()
    return None if row is None else _operation(row)


def _operation(row: RowMapping) -> Operation:
    values = {name: row[name] for name in Operation.__dataclass_fields__}
    return Operation(**{**values, "state": OperationState(row["state"])})
