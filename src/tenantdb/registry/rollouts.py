"""Rollouts: what was planned for the whole fleet, who is at it, and what has become of each tenant.

Whoever runs a rollout holds it by a lease, measured by the registry's clock; every write compares the worker, so that one who was taken
over writes nothing more. Whatever tells of many tenants is one statement that takes its rows as one JSON document: a runner ends hundreds
of tenants in a second. Only the login that owns the registry reads and writes rollouts.
"""

from __future__ import annotations

import builtins
import functools
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    Float,
    FromClause,
    Integer,
    RowMapping,
    Select,
    Text,
    Uuid,
    bindparam,
    case,
    column,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.sql.dml import Insert, ReturningUpdate
from sqlalchemy.types import TypeEngine

from tenantdb.errors import MigrationError, RolloutConflict, RolloutNotFound
from tenantdb.model import StrEnum, TenantState
from tenantdb.registry import audit, fields, tables
from tenantdb.registry.chain import plain
from tenantdb.registry.operations import now_at
from tenantdb.registry.transactions import Transactions

_PAGE = 5000  # tenants that one statement writes
_NAMED = 3  # tenants that a conflict names
_FEW = 500  # attempts that are read as a whole no slower than one by one

_rollouts, _attempts, _tenants, _servers = tables.rollouts, tables.rollout_attempts, tables.tenants, tables.servers

_LOCK = text(f"LOCK TABLE {_rollouts.name} IN SHARE ROW EXCLUSIVE MODE")
_ANALYZE = text(f"ANALYZE (SKIP_LOCKED) {_attempts.name}")


class RolloutState(StrEnum):
    """Waiting for somebody to run it, in the hands of one, stopped by an operator, stopped by its failures, or ended."""

    PLANNED = "planned"
    RUNNING = "running"
    PAUSED = "paused"
    HALTED = "halted"
    DONE = "done"
    CANCELLED = "cancelled"


class AttemptState(StrEnum):
    """Where one tenant is in a rollout. A skipped one was served no more when its turn came."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"


_UNFINISHED = [state.value for state in (RolloutState.PLANNED, RolloutState.RUNNING, RolloutState.PAUSED, RolloutState.HALTED)]
_OPEN = [AttemptState.WAITING.value, AttemptState.RUNNING.value]
_MIGRATED = [state.value for state in (TenantState.ACTIVE, TenantState.SUSPENDED, TenantState.MAINTENANCE)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One rollout. ``target`` is a revision, None before the first; ``error`` says why it was halted.

    One that was asked to pause or to end while somebody runs it has that state at once, and a ``worker`` until that one has let go.
    """

    id: UUID
    target: str | None
    state: RolloutState
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    worker: str | None = None
    lease_until: datetime | None = None
    error: str | None = None
    total: int
    created_at: datetime
    updated_at: datetime
    finished_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One tenant's part in a rollout. Of a spare and of a purged tenant, ``slug`` is the id. ``to_revision`` is where it was left."""

    rollout_id: UUID
    tenant_id: UUID
    slug: str
    wave: int
    position: int
    state: AttemptState
    from_revision: str | None = None
    to_revision: str | None = None
    engine: str | None = None
    tries: int = 0
    started_at: datetime | None = None
    finished_at: datetime | None = None
    seconds: float | None = None
    error: str | None = None
    sqlstate: str | None = None
    worker: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewAttempt:
    """A tenant's place in a rollout that is to be written down. Positions are given once in a rollout."""

    tenant_id: UUID
    wave: int
    position: int
    from_revision: str | None = None
    engine: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What has become of a tenant. Of a done one the revisions are what was found and what was left, None before the first; of any other
    one None says that it is not known. ``requeue``: it waits again, whatever ``state`` says."""

    tenant_id: UUID
    state: AttemptState
    from_revision: str | None = None
    to_revision: str | None = None
    error: str | None = None
    sqlstate: str | None = None
    seconds: float | None = None
    requeue: bool = False
    engine: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A tenant that a rollout may be about, and the revision that the registry has recorded for it."""

    id: UUID
    slug: str
    server: str | None
    state: TenantState
    revision: str | None
    database: str | None = None

    def at(self, revision: str | None) -> Candidate:
        """The same, where its database says something else than the registry."""
        return replace(self, revision=revision)


class RolloutStore:
    """Reads and writes rollouts. ``forget`` is told of every tenant whose recorded revision has changed.

    Raises, besides what is said: as `Transactions.admin_write`; `RegistryError` where the login does not own the registry.
    """

    def __init__(self, transactions: Transactions, forget: Callable[[UUID, str | None], None]) -> None:
        self._transactions = transactions
        self._forget = forget

    # -- planning ----------------------------------------------------------------------------------------------------------------------

    def candidates(
        self,
        *,
        target: str | None,
        including_at_target: bool = False,
        slugs: Sequence[str] | None = None,
        limit: int,
        after: UUID | None = None,
    ) -> list[Candidate]:
        """Tenants that are not at ``target``, by id: active, suspended, under maintenance, and spares that are ready.

        ``slugs``: only these; an empty one gives nobody. ``after`` continues behind the last id of the page before.
        """
        if slugs is not None and not slugs:
            return []
        ready = (_tenants.c.state == TenantState.SPARE.value) & _tenants.c.ready_at.is_not(None)
        where = _tenants.c.state.in_(_MIGRATED) | ready
        if not including_at_target:
            where &= _tenants.c.revision.is_distinct_from(target)
        if after is not None:
            where &= _tenants.c.id > after
        columns = (
            *(_tenants.c[name] for name in ("id", "slug", "state", "revision", "database")),
            _servers.c.name.label("server"),
        )
        joined = _tenants.outerjoin(_servers, _servers.c.id == _tenants.c.server_id)
        query = select(*columns).select_from(joined).where(where).order_by(_tenants.c.id).limit(limit)
        with self._transactions.read() as connection:
            if slugs is None:
                rows = connection.execute(query).all()
            else:  # as a document: there may be more of them than a statement has parameters
                named = select(_rows(connection.dialect.name, slug=Text()).c.slug)
                rows = connection.execute(query.where(_tenants.c.slug.in_(named)), {"rows": [{"slug": slug} for slug in slugs]}).all()
        return [
            Candidate(
                id=row.id,
                slug=row.slug or str(row.id),
                server=row.server,
                state=TenantState(row.state),
                revision=row.revision,
                database=row.database,
            )
            for row in rows
        ]

    def fleet(self) -> list[tuple[str | None, TenantState, str | None, int]]:
        """How many tenants there are by server, state and recorded revision; the purged are left out."""
        columns = (_servers.c.name, _tenants.c.state, _tenants.c.revision)
        joined = _tenants.outerjoin(_servers, _servers.c.id == _tenants.c.server_id)
        living = _tenants.c.state != TenantState.PURGED.value
        query = select(*columns, func.count()).select_from(joined).where(living).group_by(*columns).order_by(*columns)
        with self._transactions.read() as connection:
            return [(server, TenantState(state), revision, count) for server, state, revision, count in connection.execute(query)]

    def create(
        self,
        *,
        target: str | None,
        options: Mapping[str, Any],
        entries: Sequence[NewAttempt],
        worker: str | None = None,
        lease: timedelta = timedelta(),
    ) -> Rollout:
        """Write down a rollout with all its attempts, in one transaction: a planned one, or one that ``worker`` has claimed already.

        Raises: `RolloutConflict` where one that has not ended has work left on one of the tenants; `IntegrityError` for a tenant that is
        not there; `TypeError` or `ValueError` for options that JSON cannot hold. Nothing was written then.
        """
        now = tables.utcnow()
        rollout = Rollout(
            id=uuid.uuid4(),
            target=target,
            state=RolloutState.PLANNED if worker is None else RolloutState.RUNNING,
            options=fields.document("options", options),
            worker=worker,
            total=len(entries),
            created_at=now,
            updated_at=now,
        )
        with self._transactions.admin_write() as connection:
            _one_at_a_time(connection)
            clock = now_at(connection)
            if worker is not None:
                rollout = replace(rollout, lease_until=clock + lease)
            connection.execute(insert(_rollouts), asdict(rollout) | {"target": target or "", "state": rollout.state.value})
            for start in range(0, len(entries), _PAGE):
                page = [_entry(entry) for entry in entries[start : start + _PAGE]]
                connection.execute(_plan(connection.dialect.name), {"rows": page, "rollout": rollout.id})
            if connection.dialect.name == "postgresql" and len(entries) > _FEW:  # or it is taken for an empty table, and read as a whole
                connection.execute(_ANALYZE)  # for each batch of results
            _refuse_conflict(connection, rollout.id, clock)
            audit.record(connection, "rollout.begin", object=rollout.id, details={"target": target, "tenants": rollout.total})
        return rollout

    def add(self, rollout: Rollout, tenants: Sequence[tuple[UUID, str | None]]) -> int:
        """Tenants that came while it ran, with the revisions that they are at, as one more wave; who is part of it already is left out.

        Returns how many were added. Raises: as `create`.
        """
        with self._transactions.admin_write() as connection:
            _one_at_a_time(connection)
            mine = _attempts.c.rollout_id == rollout.id
            last = connection.execute(select(func.max(_attempts.c.wave), func.max(_attempts.c.position)).where(mine)).one()
            known = set(connection.scalars(select(_attempts.c.tenant_id).where(mine))) if tenants else set()
            new = [each for each in tenants if each[0] not in known]
            wave, position = (-1 if value is None else value for value in last)
            rows = [
                _entry(NewAttempt(tenant_id=tenant_id, wave=wave + 1, position=position + 1 + index, from_revision=revision))
                for index, (tenant_id, revision) in enumerate(new)
            ]
            for start in range(0, len(rows), _PAGE):
                connection.execute(_plan(connection.dialect.name), {"rows": rows[start : start + _PAGE], "rollout": rollout.id})
            if rows:
                connection.execute(update(_rollouts).where(_rollouts.c.id == rollout.id).values(total=_rollouts.c.total + len(rows)))
                _refuse_conflict(connection, rollout.id, now_at(connection))
        return len(rows)

    # -- reading -----------------------------------------------------------------------------------------------------------------------

    def get(self, rollout_id: UUID | None = None) -> Rollout:
        """One rollout, or the newest. Raises: `RolloutNotFound`."""
        if rollout_id is None:
            found = self.list(limit=1)
            if not found:
                raise RolloutNotFound
            return found[0]
        with self._transactions.admin_read() as connection:
            return _one(connection, rollout_id)

    def list(self, limit: int = 20) -> builtins.list[Rollout]:
        """The newest first."""
        query = select(_rollouts).order_by(_rollouts.c.created_at.desc(), _rollouts.c.id).limit(limit)
        with self._transactions.admin_read() as connection:
            return [_rollout(row) for row in connection.execute(query).mappings()]

    def counts(self, rollout: Rollout) -> dict[AttemptState, int]:
        """How many tenants are where; states without any are left out."""
        with self._transactions.admin_read() as connection:
            return _counts(connection, rollout.id)

    def starts(self, rollout: Rollout) -> dict[str | None, int]:
        """How many of those that wait are at which revision."""
        waiting = (_attempts.c.rollout_id == rollout.id) & _attempts.c.state.in_(_OPEN)
        query = select(_attempts.c.from_revision, func.count()).where(waiting).group_by(_attempts.c.from_revision)
        with self._transactions.admin_read() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def wave_counts(self, rollout: Rollout) -> dict[int, dict[AttemptState, int]]:
        """The same for each wave, in order."""
        columns = (_attempts.c.wave, _attempts.c.state)
        query = select(*columns, func.count()).where(_attempts.c.rollout_id == rollout.id).group_by(*columns).order_by(*columns)
        found: dict[int, dict[AttemptState, int]] = {}
        with self._transactions.admin_read() as connection:
            for wave, state, count in connection.execute(query):
                found.setdefault(wave, {})[AttemptState(state)] = count
        return found

    def attempts(
        self, rollout: Rollout, *, state: AttemptState | None = None, slowest: bool = False, limit: int = 100, after: int = -1
    ) -> builtins.list[Attempt]:
        """Attempts in their order, of one state or of all; ``after`` continues behind the last position of the page before.

        ``slowest``: those whose time is known, the slowest first.
        """
        query = _whole(rollout.id).where(_attempts.c.position > after).limit(limit)
        if state is not None:
            query = query.where(_attempts.c.state == state.value)
        if slowest:
            query = query.where(_attempts.c.seconds.is_not(None)).order_by(_attempts.c.seconds.desc())
        with self._transactions.admin_read() as connection:
            return [_attempt(row) for row in connection.execute(query.order_by(_attempts.c.position)).mappings()]

    def waiting(self, rollout: Rollout, *, wave: int | None = None, limit: int, after: int = -1) -> builtins.list[Attempt]:
        """Those whose turn is yet to come, of one wave or of all, in their order. One that was put back has the place that it had."""
        where = (_attempts.c.state == AttemptState.WAITING.value) & (_attempts.c.position > after)
        if wave is not None:
            where &= _attempts.c.wave == wave
        query = _whole(rollout.id).where(where).order_by(_attempts.c.position).limit(limit)
        with self._transactions.admin_read() as connection:
            return [_attempt(row) for row in connection.execute(query).mappings()]

    # -- who is at it ------------------------------------------------------------------------------------------------------------------

    def claim(self, rollout: Rollout, worker: str, lease: timedelta, dead: Collection[str] = ()) -> Rollout | None:
        """Take a rollout that has not ended and that nobody holds, or whose worker's lease has ended, or is ``dead``; None otherwise.

        What the last worker had in hands waits again: where it got to is for the tenant's own database to say.
        """
        with self._transactions.admin_write() as connection:
            now = now_at(connection)
            free = _rollouts.c.lease_until.is_(None) | (_rollouts.c.lease_until <= now) | _rollouts.c.worker.in_(dead)
            takeable = (_rollouts.c.id == rollout.id) & _rollouts.c.state.in_(_UNFINISHED) & free
            values = {"state": RolloutState.RUNNING.value, "worker": worker, "lease_until": now + lease, "error": None}
            if connection.execute(update(_rollouts).where(takeable).values(**values, updated_at=tables.utcnow())).rowcount == 0:
                return None
            _put_back(connection, rollout.id)
            return _one(connection, rollout.id)

    def renew(self, rollout: Rollout, worker: str, lease: timedelta) -> bool:
        """Hold on, also while what is under way is only being finished. False where it was paused, cancelled or taken over: begin nothing
        more, and `finish` it in the end."""
        with self._transactions.admin_write() as connection:
            mine = (_rollouts.c.id == rollout.id) & (_rollouts.c.worker == worker)
            held = update(_rollouts).where(mine).values(lease_until=now_at(connection) + lease).returning(_rollouts.c.state)
            return bool(connection.scalar(held) == RolloutState.RUNNING.value)

    def finish(self, rollout: Rollout, worker: str, state: RolloutState, error: str | None = None) -> Rollout:
        """Let go of it: paused, halted for a reason, done or cancelled. Whatever it still had in hands waits again.

        Where somebody has asked to cancel it meanwhile, it is cancelled, unless it is done. Returns it as it is now; where ``worker`` does
        not hold it any more, nothing was written. Raises: `RolloutNotFound`.
        """
        with self._transactions.admin_write() as connection:
            found = _one(connection, rollout.id, lock=True)
            if found.worker != worker:
                return found
            if found.state is RolloutState.CANCELLED and state is not RolloutState.DONE:
                state = found.state
            return _end(connection, found, state, plain(error), "rollout.end")

    def ask(self, rollout: Rollout, state: RolloutState, dead: Collection[str] = ()) -> Rollout:
        """Have a rollout paused or cancelled. Whoever runs it begins nothing more, finishes what is under way and lets go; where nobody
        does, or one of the ``dead``, it is so at once. One that is halted need not be paused. Returns it as it is now.

        Raises: `MigrationError` where it has ended; `RolloutNotFound`.
        """
        with self._transactions.admin_write() as connection:
            found = _one(connection, rollout.id, lock=True)
            if found.state.value not in _UNFINISHED:
                raise MigrationError(f"rollout {found.id} has ended: it is {found.state}")
            if state is RolloutState.PAUSED and found.state in (RolloutState.PAUSED, RolloutState.HALTED):
                return found
            action = "rollout.cancel" if state is RolloutState.CANCELLED else "rollout.pause"
            if not _held(connection, found, dead):
                return _end(connection, found, state, found.error, action)
            values = {"state": state.value, "updated_at": tables.utcnow()}
            connection.execute(update(_rollouts).where(_rollouts.c.id == found.id).values(values))
            audit.record(connection, action, object=found.id, outcome="asked")
            return _one(connection, found.id)

    def retry_failed(self, rollout: Rollout, dead: Collection[str] = ()) -> int:
        """Have the failed tenants wait again, and the rollout for somebody to run it. Returns how many there were; without any, nothing is
        written. Raises: `RolloutConflict`; `MigrationError` where somebody runs it or it was cancelled; `RolloutNotFound`."""
        with self._transactions.admin_write() as connection:
            _one_at_a_time(connection)
            found = _one(connection, rollout.id, lock=True)
            if found.state is RolloutState.CANCELLED:
                raise MigrationError(f"rollout {found.id} was cancelled; plan another one")
            if _held(connection, found, dead):
                raise MigrationError(f"somebody runs rollout {found.id}; pause it first, or wait until it has ended")
            failed = (_attempts.c.rollout_id == found.id) & (_attempts.c.state == AttemptState.FAILED.value)
            again = {"state": AttemptState.WAITING.value, "started_at": None, "finished_at": None, "seconds": None}
            count = connection.execute(update(_attempts).where(failed).values(again)).rowcount
            if count:
                _put_back(connection, found.id)
                _refuse_conflict(connection, found.id, now_at(connection))
                values = {"state": RolloutState.PLANNED.value, "worker": None, "lease_until": None, "error": None, "finished_at": None}
                connection.execute(
                    update(_rollouts).where(_rollouts.c.id == found.id).values(**values, updated_at=tables.utcnow()),
                )
                audit.record(connection, "rollout.retry", object=found.id, details={"tenants": count})
            return count

    # -- one tenant after the other ----------------------------------------------------------------------------------------------------

    def begin(self, rollout: Rollout, worker: str, tenant_ids: Sequence[UUID]) -> builtins.list[UUID]:
        """Write down that these are under way, and return those that are: nobody, where the rollout is not this worker's or runs no more.

        Need not survive a crash of the registry's server: what is not written down waits, and is found out about when its turn comes.
        """
        if not tenant_ids:
            return []
        with self._transactions.admin_write() as connection:
            given = {
                "rollout": rollout.id,
                "worker": worker,
                "now": tables.utcnow(),
                "rows": [{"tenant_id": each.hex} for each in tenant_ids],
            }
            return builtins.list(connection.scalars(_begin(connection.dialect.name), given))

    def settle(
        self, rollout: Rollout, worker: str, results: Sequence[Result], clock: Callable[[], datetime] = tables.utcnow
    ) -> builtins.list[UUID]:
        """Write down what has become of tenants, begun or not, and the revisions that they are at, in one transaction of two statements.

        May run again with the same results. Returns those of which it was written: nobody, where the rollout is not this worker's any more.
        No audit entries: the attempts are the record. One result for each tenant.
        """
        if not results:
            return []
        now = clock()
        with self._transactions.admin_write() as connection:
            dialect = connection.dialect.name
            given = {"rollout": rollout.id, "worker": worker, "now": now, "rows": [_settled(result) for result in results]}
            settled = builtins.list(connection.scalars(_settle(dialect), given))
            written = set(settled)
            known = [
                {"tenant_id": result.tenant_id.hex, "revision": result.to_revision}
                for result in results
                if result.tenant_id in written and (result.to_revision is not None or result.state is AttemptState.DONE)
            ]
            moved = connection.execute(_record(dialect), {"now": now, "rows": known}).all() if known else []
        for row in moved:
            self._forget(row.id, row.slug)
        return settled


# -- statements that take their rows as a document ---------------------------------------------------------------------------------------


def _rows(dialect: str, **columns: TypeEngine[Any]) -> FromClause:
    """The parameter ``rows``, a list of JSON objects, as a table."""
    given = bindparam("rows", type_=tables.Document())
    if dialect == "postgresql":
        typed = [column(name, type_) for name, type_ in columns.items()]
        return func.jsonb_to_recordset(given).table_valued(*typed, name="given").render_derived(with_types=True)
    each = func.json_each(given).table_valued("value", name="each")
    read = (func.json_extract(each.c.value, f"$.{name}", type_=type_).label(name) for name, type_ in columns.items())
    return select(*read).limit(-1).subquery("given")  # with a limit, or SQLite reads the document anew for each row of the other table


def _entry(entry: NewAttempt) -> dict[str, Any]:
    return {
        "tenant_id": entry.tenant_id.hex,
        "wave": entry.wave,
        "position": entry.position,
        "from_revision": entry.from_revision,
        "engine": entry.engine,
    }


def _settled(result: Result) -> dict[str, Any]:
    return {
        "tenant_id": result.tenant_id.hex,
        "state": (AttemptState.WAITING if result.requeue else result.state).value,
        "known": int(result.state is AttemptState.DONE),
        "tried": int(result.state is not AttemptState.SKIPPED),
        "from_revision": result.from_revision,
        "to_revision": result.to_revision,
        "engine": result.engine,
        "seconds": result.seconds,
        "error": plain(result.error),
        "sqlstate": result.sqlstate,
    }


@functools.cache
def _plan(dialect: str) -> Insert:
    given = _rows(dialect, tenant_id=Uuid(), wave=Integer(), position=Integer(), from_revision=Text(), engine=Text())
    same = ("tenant_id", "wave", "position", "from_revision", "engine")
    rollout_id = bindparam("rollout", type_=Uuid()).label("rollout_id")
    state, tries = bindparam("state", AttemptState.WAITING.value, type_=Text()), bindparam("tries", 0, type_=Integer())
    rows = select(rollout_id, state.label("state"), tries.label("tries"), *(given.c[name] for name in same))
    return insert(_attempts).from_select(["rollout_id", "state", "tries", *same], rows, include_defaults=False)


@functools.cache
def _begin(dialect: str) -> ReturningUpdate[Any]:
    given = _rows(dialect, tenant_id=Uuid())
    # Shared with the other writes of this worker; whoever takes the rollout over waits until it is written, or comes first.
    held = _mine() & (_rollouts.c.state == RolloutState.RUNNING.value)
    if dialect == "postgresql":
        held &= func.set_config("synchronous_commit", "off", True) == "off"
    mine = select(_rollouts.c.id).where(held).with_for_update(read=True).scalar_subquery()
    return (
        update(_attempts)
        .where((_attempts.c.rollout_id == mine) & (_attempts.c.tenant_id == given.c.tenant_id))
        .where(_attempts.c.state == AttemptState.WAITING.value)
        .values(
            state=AttemptState.RUNNING.value,
            started_at=bindparam("now", type_=tables.Moment()),
            finished_at=None,
            tries=_attempts.c.tries + 1,
            worker=bindparam("worker", type_=Text()),
        )
        .returning(_attempts.c.tenant_id)
    )


@functools.cache
def _settle(dialect: str) -> ReturningUpdate[Any]:
    texts = dict.fromkeys(("state", "from_revision", "to_revision", "engine", "error", "sqlstate"), Text())
    given = _rows(dialect, tenant_id=Uuid(), known=Integer(), tried=Integer(), seconds=Float(), **texts)
    now = bindparam("now", type_=tables.Moment())
    waits = given.c.state == AttemptState.WAITING.value

    def revision(name: str) -> ColumnElement[Any]:
        return case((given.c.known == 1, given.c[name]), else_=func.coalesce(given.c[name], _attempts.c[name]))

    mine = select(_rollouts.c.id).where(_mine()).with_for_update(read=True).scalar_subquery()
    return (
        update(_attempts)
        .where((_attempts.c.rollout_id == mine) & (_attempts.c.tenant_id == given.c.tenant_id))
        .where(_attempts.c.state.in_(_OPEN))
        .values(
            state=given.c.state,
            from_revision=revision("from_revision"),
            to_revision=revision("to_revision"),
            engine=func.coalesce(given.c.engine, _attempts.c.engine),
            tries=case((_attempts.c.state == AttemptState.WAITING.value, _attempts.c.tries + given.c.tried), else_=_attempts.c.tries),
            started_at=func.coalesce(_attempts.c.started_at, now),
            finished_at=case((waits, None), else_=now),
            seconds=given.c.seconds,
            error=given.c.error,
            sqlstate=given.c.sqlstate,
            worker=bindparam("worker", type_=Text()),
        )
        .returning(_attempts.c.tenant_id)
    )


@functools.cache
def _record(dialect: str) -> ReturningUpdate[Any]:
    """The rows are locked in the order of their ids, as a rotation of keys does."""
    given = _rows(dialect, tenant_id=Uuid(), revision=Text())
    old = _tenants.alias("old")
    differs = (old.c.id == given.c.tenant_id) & old.c.revision.is_distinct_from(given.c.revision)
    locked = select(old.c.id, given.c.revision.label("revision")).where(differs).order_by(old.c.id)
    new = locked.with_for_update(key_share=True, of=old).subquery("new")
    return (
        update(_tenants)
        .where(_tenants.c.id == new.c.id)
        .values(
            revision=new.c.revision,
            version=_tenants.c.version + 1,
            generation=_tenants.c.generation + 1,  # connections that have prepared statements for the tables as they were close
            updated_at=bindparam("now", type_=tables.Moment()),
        )
        .returning(_tenants.c.id, _tenants.c.slug)
    )


def _mine() -> ColumnElement[bool]:
    return (_rollouts.c.id == bindparam("rollout", type_=Uuid())) & (_rollouts.c.worker == bindparam("worker", type_=Text()))


# -- inside a transaction ----------------------------------------------------------------------------------------------------------------


def _one_at_a_time(connection: Connection) -> None:
    """Of two who plan at once, the second sees what the first has written. SQLite has one writer anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(_LOCK)


def _refuse_conflict(connection: Connection, rollout_id: UUID, now: datetime) -> None:
    """Raises: `RolloutConflict` where another rollout has work left on what this one is about to do."""
    mine, theirs = _attempts.alias("mine"), _attempts.alias("theirs")
    finishing = (_rollouts.c.state == RolloutState.CANCELLED.value) & (_rollouts.c.lease_until > now)
    query = (
        select(theirs.c.rollout_id, _tenants.c.slug, _tenants.c.id)
        .join_from(mine, theirs, (theirs.c.tenant_id == mine.c.tenant_id) & (theirs.c.rollout_id != mine.c.rollout_id))
        .join(_rollouts, _rollouts.c.id == theirs.c.rollout_id)
        .join(_tenants, _tenants.c.id == theirs.c.tenant_id)
        .where((mine.c.rollout_id == rollout_id) & mine.c.state.in_(_OPEN) & theirs.c.state.in_(_OPEN))
        .where(_rollouts.c.state.in_(_UNFINISHED) | finishing)
        .order_by(_rollouts.c.created_at, theirs.c.rollout_id, theirs.c.position)
        .limit(_NAMED)
    )
    rows = connection.execute(query).all()
    if rows:
        other = rows[0].rollout_id
        raise RolloutConflict(str(other), [row.slug or str(row.id) for row in rows if row.rollout_id == other])


def _held(connection: Connection, rollout: Rollout, dead: Collection[str]) -> bool:
    living = rollout.lease_until is not None and rollout.lease_until > now_at(connection)
    return living and rollout.worker not in dead


def _put_back(connection: Connection, rollout_id: UUID) -> None:
    running = (_attempts.c.rollout_id == rollout_id) & (_attempts.c.state == AttemptState.RUNNING.value)
    connection.execute(update(_attempts).where(running).values(state=AttemptState.WAITING.value, started_at=None, worker=None))


def _end(connection: Connection, rollout: Rollout, state: RolloutState, error: str | None, action: str) -> Rollout:
    now = tables.utcnow()
    values = {
        "state": state.value,
        "error": error,
        "worker": None,
        "lease_until": None,
        "updated_at": now,
        "finished_at": None if state.value in _UNFINISHED else now,
    }
    ended = connection.execute(update(_rollouts).where(_rollouts.c.id == rollout.id).values(values).returning(_rollouts)).mappings().one()
    _put_back(connection, rollout.id)
    counts = {str(found): count for found, count in _counts(connection, rollout.id).items()}
    audit.record(connection, action, object=rollout.id, outcome=str(state), details={"target": rollout.target, **counts})
    return _rollout(ended)


def _counts(connection: Connection, rollout_id: UUID) -> dict[AttemptState, int]:
    query = select(_attempts.c.state, func.count()).where(_attempts.c.rollout_id == rollout_id).group_by(_attempts.c.state)
    return {AttemptState(state): count for state, count in connection.execute(query.order_by(_attempts.c.state))}


def _one(connection: Connection, rollout_id: UUID, *, lock: bool = False) -> Rollout:
    query = select(_rollouts).where(_rollouts.c.id == rollout_id)
    row = connection.execute(query.with_for_update() if lock else query).mappings().first()
    if row is None:
        raise RolloutNotFound(str(rollout_id))
    return _rollout(row)


def _rollout(row: RowMapping) -> Rollout:
    return Rollout(**{**row, "target": row["target"] or None, "state": RolloutState(row["state"])})


def _whole(rollout_id: UUID) -> Select[Any]:
    joined = _attempts.join(_tenants, _tenants.c.id == _attempts.c.tenant_id)
    return select(_attempts, _tenants.c.slug).select_from(joined).where(_attempts.c.rollout_id == rollout_id)


def _attempt(row: RowMapping) -> Attempt:
    return Attempt(**{**row, "slug": row["slug"] or str(row["tenant_id"]), "state": AttemptState(row["state"])})
