"""A tenant's pool, as SQLAlchemy sees it; its connections are units of the server's budget.

One class for threads and for asyncio: SQLAlchemy runs both in plain code, and the few places that wait know which kind of waiting is meant.
A lease begins with `_do_get` and ends with `_do_return_conn`, to which every way out of SQLAlchemy leads: close, invalidation, a failed or
cancelled connect, the garbage collector.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
import traceback
import weakref
from asyncio import current_task
from collections.abc import Iterator
from contextvars import ContextVar
from sys import is_finalizing
from threading import get_ident
from types import FrameType
from typing import TYPE_CHECKING, Any

from greenlet import getcurrent  # type: ignore[import-untyped]
from sqlalchemy.engine import Engine

from tenantdb.backends import ConnectFailed, FailureClass, Location
from tenantdb.backends.hangup import await_hangup, wait_for_hangup
from tenantdb.connections.budget import ServerBudget
from tenantdb.connections.ledger import Shelf, Unit, UnitState, Verdict, Work
from tenantdb.connections.reaper import LONGEST_GOODBYE
from tenantdb.connections.sqla import BudgetedPool, Record
from tenantdb.connections.waiting import LoopWaiter, ThreadWaiter, await_in_greenlet
from tenantdb.context import Binding, is_watched, leasing_block
from tenantdb.errors import BudgetExhausted, EngineRetired, RegistryError, ServerUnavailable, WrongDatabase
from tenantdb.settings import Settings

if TYPE_CHECKING:
    from tenantdb.backends import Backend

WORK: ContextVar[Work] = ContextVar("tenantdb_work", default=Work.INTERACTIVE)
"""Why the running code wants connections."""

_QUARANTINE = 30.0  # seconds until a tenant whose database turned out to be another's is tried again
_TENANT_MEMORY = 1.0  # seconds for which a failure of one tenant is repeated to whoever asks, without asking its server again
_RETRY_FIRST = 0.05  # seconds
_RETRY_LONGEST = 1.0
_SHORTEST_CHECK = 1.0  # seconds that an idle connection has to answer, however little time there is to wait for one
_FRAMES = 12  # of the application, that tell where a lease began
_NOT_THE_APPLICATION = ("sqlalchemy", "tenantdb", "contextlib")
_LIFETIME_SPREAD = 0.1  # connections born together do not die together


class Source:
    """Where a pool's connections come from. Shared by a pool and those that take its place."""

    def __init__(
        self,
        location: Location,
        product: Backend,
        template: Engine,
        budget: ServerBudget,
        settings: Settings,
        on_wrong_database: Any,
        *,
        is_async: bool,
        parks: bool,
    ) -> None:
        self.location = location
        self.product = product
        self.template = template
        self.budget = budget
        self.settings = settings
        self.on_wrong_database = on_wrong_database
        self.is_async = is_async
        self.parks = parks  # whether a connection that comes back waits for the next user
        tenant = location.tenant
        self.key = (tenant.id.int, tenant.generation, location.role)

    @property
    def label(self) -> str:
        return self.location.tenant.slug

    def new_shelf(self) -> Shelf:
        return self.budget.shelf(self.location.tenant.id.int, self.label)


class TenantPool(BudgetedPool):
    """The pool under the engine of one (tenant, generation, role, lane)."""

    def __init__(self, source: Source) -> None:
        super().__init__(source.template)
        self._is_asyncio = source.is_async
        self.source = source
        self.shelf = source.new_shelf()
        self.retired = False
        self.outdated = False  # retired because the tenant has changed: whoever looks it up again gets another pool
        self.generation = source.location.tenant.generation
        self.read_only = source.location.read_only
        self._engine: Any = None  # for as long as there are connections; an engine that nobody holds may go with its last one
        self._engine_ref: Any = None
        self._units: dict[int, Unit] = {}  # by the id of the open connection
        self._opening: set[Unit] = set()
        self._waiter: type[ThreadWaiter] | type[LoopWaiter] = LoopWaiter if source.is_async else ThreadWaiter
        self._loop = asyncio.get_running_loop() if source.is_async else None
        budget = source.settings.budget
        self._budget, self._parks = source.budget, source.parks
        self._leak_sample = source.settings.leak_sample
        self._timeout, self._check_after, self._leak_after = budget.acquire_timeout, budget.check_after, budget.leak_after
        source.budget.pools.add(self)

    def belongs_to(self, engine: Engine) -> None:
        self._engine_ref = weakref.ref(engine)

    # -- a lease begins ----------------------------------------------------------------------------------------------------------------

    def _do_get(self) -> Any:
        if self.retired:
            raise EngineRetired(self.source.label)
        budget = self._budget
        now = budget.clock()
        unit = budget.reuse(self.shelf, WORK.get(), now)
        if unit is None:
            problem = budget.breaker.would_refuse(now)
            if problem is not None:  # rather than stand in line behind the probe
                raise ServerUnavailable(budget.server, problem)
            deadline = now + self._timeout
            unit = self._obtain(now, deadline)
            if unit.record is None:
                unit.record = Record(self, unit, deadline)
        unit.since, unit.owner = now, id(current_task(self._loop)) if self._is_asyncio else get_ident()
        if unit.state is UnitState.IN_USE:
            try:
                rested = now - unit.idle_since
                if rested >= self._check_after or unit.idle_since < budget.suspect_at or not unit.wire.settled():
                    self._check(unit, now)
            except BaseException:  # cancelled: the answer to its reset is still outstanding, and the next user reads it
                self._give_back(unit, unit.reason)  # there is a reason where it was found dead and a listener failed
                raise
        binding = leasing_block()
        if binding is not None:
            unit.binding = binding
            binding.leased[unit] = self
        if self._leak_after or (binding is not None and (random.random() < self._leak_sample or is_watched())):
            unit.place = _application_frames()
        return unit.record

    def _owner(self) -> object:
        return id(current_task(self._loop)) if self._is_asyncio else get_ident()

    def _obtain(self, began: float, deadline: float) -> Unit:
        """Wait in the queue. Raises: `BudgetExhausted`."""
        budget = self.source.budget
        while True:
            shelf = self.shelf
            claim = budget.claim(shelf, WORK.get(), deadline, self._waiter)
            if claim.waiter is not None or claim.unit is None:
                budget.emit("Waited", budget.server, self.source.label, budget.clock() - began, claim.unit is not None)
            if claim.unit is not None:
                if claim.victim is not None:
                    budget.take_over(claim.unit, claim.victim)
                return claim.unit
            if claim.verdict is Verdict.RETIRED and not self.retired and shelf is not self.shelf:
                continue  # `Engine.dispose` while we waited
            if self.retired or claim.verdict is Verdict.RETIRED:
                raise EngineRetired(self.source.label)
            held = budget.leased_by(self._owner())
            raise BudgetExhausted(
                self.source.label, budget.clock() - began, budget.stats(), held, queue_full=claim.verdict is Verdict.REFUSED
            )

    def _check(self, unit: Unit, now: float) -> None:
        """Make sure of an idle connection before a statement is sent: read the answer to its reset, look at its socket, and ask the server
        only where it has been idle for long. One that is dead is closed; SQLAlchemy then connects its record anew, in the same place."""
        wire, record = unit.wire, unit.record
        record.deadline = now + self._timeout
        if now - unit.idle_since < self._check_after and unit.idle_since >= self._budget.suspect_at:
            clean = self._settle(wire.settle, max(self._timeout, _SHORTEST_CHECK))
        else:
            clean = self._settle(wire.ping, max(_SHORTEST_CHECK, min(self._timeout, self.source.settings.connect_timeout)))
        if not clean:
            unit.reason = "dead"
            self._budget.suspect_at = now
            record.close()

    def _settle(self, ask: Any, timeout: float) -> Any:
        return await_in_greenlet(ask(timeout)) if self._is_asyncio else ask(timeout)

    # -- connecting --------------------------------------------------------------------------------------------------------------------

    def _open(self, record: Record) -> Any:
        """Called by SQLAlchemy when a record without a connection is checked out."""
        source, budget, unit = self.source, self.source.budget, record.unit
        if unit.state is UnitState.IN_USE:
            budget.reopen(unit)
        began = budget.clock()
        self._opening.add(unit)
        try:
            self._await_place(unit, record.deadline)
            connection = self._connect(record.deadline)
        finally:
            self._opening.discard(unit)
        unit.wire = source.product.wire(source.template.dialect, connection)
        self._units[id(connection)] = unit
        self._engine = None if self._engine_ref is None else self._engine_ref()
        now = budget.clock()
        lifetime = source.settings.budget.max_lifetime * (1 - _LIFETIME_SPREAD * random.random())
        unit.idle_since, unit.reason = now, ""
        budget.opened(unit, now + lifetime)
        budget.emit("ConnectionOpened", budget.server, source.label, now - began)
        return connection

    def _await_place(self, unit: Unit, deadline: float) -> None:
        """Until the server has let go of what was in this place before. Raises: `ServerUnavailable` where there is no time for that."""
        if unit.eof is None:
            return
        copy = os.dup(unit.eof)  # the original stays for the case that we are cancelled: somebody else then waits on it
        patience = min(LONGEST_GOODBYE, max(_SHORTEST_CHECK, deadline - self._budget.clock()))
        if self._is_asyncio:
            gone = await_in_greenlet(await_hangup(copy, patience))
        else:
            gone = wait_for_hangup(copy, patience)
        if not gone and patience < LONGEST_GOODBYE:
            raise ServerUnavailable(self._budget.server, "it did not answer in time")
        descriptor, unit.eof = unit.eof, None
        os.close(descriptor)

    def _connect(self, deadline: float) -> Any:
        """Open a connection that is this tenant's beyond doubt, within the deadline.

        A server that is starting or has no room is asked again until then, or until its breaker opens. Raises: `ServerUnavailable`,
        `WrongDatabase`.
        """
        source, budget = self.source, self.source.budget
        pause = _RETRY_FIRST
        while True:
            now = budget.clock()
            known = budget.failure_of(source.key, now)
            if known is not None:
                raise type(known)(*known.args) from known.__cause__
            refusal = budget.breaker.refusal(now)
            if refusal is not None:
                raise ServerUnavailable(budget.server, refusal)
            try:
                connection = source.product.open(source.template.dialect, source.location, source.settings, timeout=deadline - now)
            except WrongDatabase as error:
                budget.breaker.gave_up()
                budget.remember_failure(source.key, error, now + _QUARANTINE)
                budget.emit("TenantQuarantined", budget.server, source.label, error.problem)
                source.on_wrong_database(source.location.tenant, error)
                raise
            except ConnectFailed as error:
                self._failed(error, deadline, pause)
            except BaseException:
                budget.breaker.gave_up()
                raise
            else:
                if budget.breaker.succeeded():
                    budget.emit("ServerUp", budget.server)
                return connection
            self._sleep(pause * (0.5 + random.random()))
            pause = min(2 * pause, _RETRY_LONGEST)

    def _failed(self, error: ConnectFailed, deadline: float, pause: float) -> None:
        """Returns where it is worth another try. Raises: `ServerUnavailable`; what `ensure_servable` raises, where the tenant is refused
        because another process has decided that it is served no more."""
        budget = self.source.budget
        now = budget.clock()
        unavailable = ServerUnavailable(budget.server, error.problem)
        cause = error.__cause__
        if error.kind is FailureClass.TENANT:
            budget.breaker.gave_up()
            unavailable.__cause__ = cause
            budget.remember_failure(self.source.key, unavailable, now + _TENANT_MEMORY)
            if self._parks:
                self._recheck()
            raise unavailable from cause
        if error.kind is FailureClass.CAPACITY:
            budget.breaker.gave_up()
            budget.under_pressure()
        elif budget.breaker.failed(now, error.problem, random.random()):
            budget.suspect_at = now
            budget.emit("ServerDown", budget.server, error.problem)
        if budget.breaker.is_open or now + 2 * pause >= deadline:
            raise unavailable from cause

    def _recheck(self) -> None:
        try:
            if self._is_asyncio:
                await_in_greenlet(asyncio.to_thread(self.source.location.recheck))
            else:
                self.source.location.recheck()
        except RegistryError:
            return  # then what the server said is all that is known

    def _sleep(self, seconds: float) -> None:
        if self._is_asyncio:
            await_in_greenlet(asyncio.sleep(seconds))
        else:
            time.sleep(seconds)

    # -- a lease ends ------------------------------------------------------------------------------------------------------------------

    def _do_return_conn(self, record: Any) -> None:
        unit = record.unit
        unit.owner = unit.place = None
        if unit.binding is not None:
            binding, unit.binding = unit.binding, None
            binding.leased.pop(unit, None)
        if unit.state is UnitState.GONE:  # it is the parent's, before a fork
            return
        if record.dbapi_connection is None:
            self._without_connection(unit)
        elif not self._parks:
            self._give_back(unit, "owner")
        elif record._soft_invalidate_time > record.starttime or self._invalidate_time > record.starttime:
            self._give_back(unit, "invalidated")
        elif unit.wire.send_reset():
            self._budget.give_back(unit)
        else:
            self._give_back(unit, "unclean")

    def _give_back(self, unit: Unit, reason: str = "") -> None:
        unit.owner = unit.place = None
        self._budget.give_back(unit, reason)

    def _without_connection(self, unit: Unit) -> None:
        """The connection was closed, never came to be, or was detached and lives on."""
        budget = self.source.budget
        unit.record = None
        detached = next((key for key, open_unit in self._units.items() if open_unit is unit), None)
        if detached is None:
            budget.drop(unit, unit.reason or ("failed" if unit.state is UnitState.OPENING else "invalidated"))
        else:
            budget.detach(unit)
            wire, unit.wire = unit.wire, None  # the finalizer holds the unit, which must not keep the connection alive
            if not is_finalizing():  # the end of the interpreter collects leases too, and then nothing can be registered any more
                weakref.finalize(wire, self._lost, detached, unit).atexit = False

    def _lost(self, key: int, unit: Unit) -> None:
        """A detached connection was collected; the driver has closed it."""
        if self._units.pop(key, None) is not None:
            self.source.budget.drop(unit, "collected")

    def _finish(self, connection: Any) -> None:
        """SQLAlchemy closes a connection: at once and without waiting, whatever the thread or loop."""
        unit = self._units.pop(id(connection), None)
        if unit is None:  # closed already, or it failed its identity check
            return
        wire = unit.wire or self.source.product.wire(self.source.template.dialect, connection)  # one that is detached has none
        unit.eof = wire.finish()
        if not self._units:
            self._engine = None
        if unit.state is UnitState.DETACHED:
            self.source.budget.drop(unit, "detached")

    def _invalidate(self, connection: Any, exception: BaseException | None = None, _checkin: bool = True) -> None:
        """A statement found the server gone. What else is idle on it is asked before it is used."""
        self.source.budget.suspect_at = self.source.budget.clock()
        super()._invalidate(connection, exception, _checkin)

    # -- SQLAlchemy's management -------------------------------------------------------------------------------------------------------

    def recreate(self) -> TenantPool:
        made = TenantPool(self.source)
        made._engine_ref = self._engine_ref
        return made

    def dispose(self) -> None:
        """Close what is idle, and what is leased when it comes back. The pool goes on with new connections."""
        old, self.shelf = self.shelf, self.source.new_shelf()
        self.source.budget.retire(old)

    def retire(self, *, outdated: bool = False) -> None:
        """The same, and serve nobody any more: the tenant has moved or may not be served (``outdated``), or all is closed. From any
        thread."""
        self.outdated = outdated  # first, because who is refused looks at it
        self.retired = True
        self.source.budget.retire(self.shelf)

    def disown(self) -> object:
        """In a forked child: the open connections are the parent's. See `tenantdb.forking`."""
        self.retired = True
        units, self._units = self._units, {}
        for unit in units.values():
            unit.state = UnitState.GONE
        return [units, [unit.wire.disown() for unit in units.values()]]

    def leases(self) -> Iterator[Unit]:
        """Connections in somebody's hands."""
        return (unit for unit in list(self._units.values()) if unit.state is UnitState.IN_USE and unit.owner is not None)

    def left_behind(self, unit: Unit, binding: Binding) -> str | None:
        """See `tenantdb.context.Lessor`."""
        if unit.binding is not binding or unit.state is not UnitState.IN_USE or unit.owner is None:
            return None
        unit.binding = None
        place = "" if unit.place is None else "".join(unit.place.format())
        budget = self._budget
        budget.emit("LeaseLeft", budget.server, self.source.label, budget.clock() - unit.since, place)
        return place

    def status(self) -> str:
        return f"tenant pool: {self.shelf.units} connections, {len(self.shelf.idle)} idle"

    def checkedin(self) -> int:
        """Connections that are idle."""
        return len(self.shelf.idle)

    def checkedout(self) -> int:
        """Connections that are leased or being opened."""
        return len(list(self.leases())) + len(self._opening)


def _application_frames() -> traceback.StackSummary:
    """Where the running code was called from, without SQLAlchemy's frames and ours. In asyncio the coroutine stands on another stack, that
    of the greenlet which waits for this one."""

    def frames(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
        stack: Any = getcurrent()
        while stack is not None:
            while frame is not None:
                if frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_THE_APPLICATION:
                    yield frame, frame.f_lineno
                frame = frame.f_back
            stack = stack.parent
            frame = None if stack is None else stack.gr_frame

    place = traceback.StackSummary.extract(frames(sys._getframe(1)), limit=_FRAMES, lookup_lines=False)
    place.reverse()
    return place
