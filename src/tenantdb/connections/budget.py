"""One database server's ledger behind a lock, and everybody who waits for it.

The lock is plain and never held across I/O, a callback or a user's code. A connection that is given back by the garbage collector may come
in the middle of any operation, also on the thread that holds the lock: so what is given back goes into an inbox, which whoever holds the
lock empties before and after. Grants are delivered, and victims closed, once the lock is free.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, TypeVar

from cachetools import LRUCache

from tenantdb.connections.breaker import Breaker
from tenantdb.connections.eviction import DuelPolicy
from tenantdb.connections.ledger import Claim, Ledger, Limits, Shelf, Unit, UnitState, Verdict, Work
from tenantdb.connections.waiting import LoopWaiter, ThreadWaiter
from tenantdb.model import BudgetStats, TenantUse

if TYPE_CHECKING:
    from tenantdb.connections.pools import TenantPool
    from tenantdb.connections.reaper import Reaper

logger = logging.getLogger("tenantdb.connections")

R = TypeVar("R")

_NEVER = float("inf")
PRESSURE_TIME = 10.0  # seconds for which a refusal by the server ("too many clients") makes the budget one smaller
_SHORTEST_SLEEP = 0.05  # seconds
_REMEMBERED = 1000  # tenants
_TOP = 10  # tenants that statistics name


class ServerBudget:
    """The budget of one server in this process. ``total`` and ``processes`` are for people: where the limit comes from."""

    def __init__(
        self,
        server: str,
        limits: Limits,
        reaper: Reaper,
        emit: Callable[..., None],  # what happened, by the name of its record in `tenantdb.events`, and the facts
        *,
        total: int,
        processes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.server = server
        self.total, self.processes = total, processes
        self.breaker = Breaker()
        self.suspect_at = 0.0  # when the server was last seen to drop a connection: what has been idle since before is asked first
        self.pools: weakref.WeakSet[TenantPool] = weakref.WeakSet()
        self.clock = clock
        self.emit = emit
        self._limits = limits
        self._reaper = reaper
        self._ledger = Ledger(limits, DuelPolicy(max(1, limits.connections)))
        self._lock = threading.Lock()
        self._inbox: deque[Callable[[Ledger], None]] = deque()
        self._pressure: deque[float] = deque()  # when each refusal is forgotten
        self._failures: LRUCache[Hashable, tuple[Exception, float]] = LRUCache(_REMEMBERED)  # of tenants, with the end of each

    # -- asking ------------------------------------------------------------------------------------------------------------------------

    def shelf(self, tenant: int, label: str) -> Shelf:
        return self._under_lock(lambda ledger: ledger.shelf(tenant, label))

    def reuse(self, shelf: Shelf, work: Work, now: float) -> Unit | None:
        """An idle connection, if there is one for the taking."""
        with self._lock:
            unit = self._ledger.reuse(shelf, work, now)
        if self._inbox:
            self._drain()
        return unit

    def claim(self, shelf: Shelf, work: Work, deadline: float, waiter: type[ThreadWaiter] | type[LoopWaiter]) -> Claim:
        """A connection, or a place to open one in; waits for it until the deadline. `Claim.verdict` says what it is."""
        claim = self._under_lock(lambda ledger: self._ask(ledger, shelf, work, deadline, waiter))
        if claim.waiter is None:
            return claim
        try:
            claim.waiter.wait(deadline - self.clock())
        except BaseException:  # cancelled, interrupted: what was granted meanwhile must not be lost
            self._under_lock(lambda ledger: ledger.withdraw(claim))
            self.hand_back(claim)
            raise
        if claim.verdict is None:
            self._under_lock(lambda ledger: ledger.withdraw(claim, timed_out=True))
        return claim

    def _ask(self, ledger: Ledger, shelf: Shelf, work: Work, deadline: float, waiter: type[ThreadWaiter] | type[LoopWaiter]) -> Claim:
        claim = ledger.claim(shelf, work, self.clock(), deadline)
        if claim.verdict is None:
            claim.waiter = waiter()
        return claim

    def hand_back(self, claim: Claim) -> None:
        """Nobody will use what a claim was granted."""
        unit, claim.unit = claim.unit, None  # whoever waited in a loop that is closed may still be collected, and come here again
        if unit is None:
            return
        if claim.verdict is Verdict.REUSE:
            self.give_back(unit)
        else:
            self.drop(unit, "withdrawn", after=claim.victim)

    # -- telling -----------------------------------------------------------------------------------------------------------------------

    def opened(self, unit: Unit, expires_at: float) -> None:
        self._under_lock(lambda ledger: ledger.opened(unit, expires_at))
        self._reaper.due(self.clock() + self._limits.idle_timeout)

    def reopen(self, unit: Unit) -> None:
        """A lease has lost its connection and opens anew, in the same place."""
        reason, unit.reason = unit.reason or "invalidated", ""

        def tell(ledger: Ledger) -> None:
            ledger.reopen(unit)
            ledger.counts.closes[reason] = ledger.counts.closes.get(reason, 0) + 1

        self._under_lock(tell)
        self.emit("ConnectionClosed", self.server, _label(unit), reason)

    def give_back(self, unit: Unit, reason: str = "") -> None:
        """The lease has ended, from any thread and at any moment. With a ``reason`` the connection is closed."""
        lock, ledger = self._lock, self._ledger
        if not lock.acquire(False):
            self._tell(lambda ledger: self._returned(ledger, unit, reason))
            return
        try:  # as `_tell`, without the detour
            if not ledger.returned(unit, self.clock(), reason):
                ledger.to_close.append(unit)
            effects = self._effects() if ledger.granted or ledger.to_close else None
        finally:
            lock.release()
        if effects is not None:
            self._act(*effects)
        if self._inbox:
            self._drain()

    def _returned(self, ledger: Ledger, unit: Unit, reason: str) -> None:
        if not ledger.returned(unit, self.clock(), reason):
            ledger.to_close.append(unit)

    def detach(self, unit: Unit) -> None:
        self._tell(lambda ledger: ledger.detach(unit))

    def drop(self, unit: Unit, reason: str, *, after: Unit | None = None) -> None:
        """The connection of a unit has been closed, or never came to be. Its place is free once the server has let go of it, and of the
        victim that it was to take the place of."""
        if after is not None:
            self.take_over(unit, after)
        self._tell(lambda ledger: self._dropped(ledger, unit, reason))

    def _dropped(self, ledger: Ledger, unit: Unit, reason: str) -> None:
        if unit.state is not UnitState.GONE and unit.state is not UnitState.CLOSING:
            ledger.closes(unit, reason, self.clock())
            ledger.to_close.append(unit)

    def take_over(self, unit: Unit, victim: Unit) -> None:
        """Close the connection in whose place a unit will be opened; the unit's ``eof`` tells when the server has let go of it."""
        self.close_victim(victim)
        unit.eof, victim.eof = victim.eof, None

    def close_victim(self, victim: Unit) -> None:
        """Close the connection of an idle unit whose place was given away; its ``eof`` is what to wait for."""
        record, victim.record = victim.record, None
        if record is not None:
            try:
                record.close()
            except Exception:
                logger.exception("a listener failed while an idle connection was closed")
        self.emit("ConnectionClosed", self.server, victim.shelf.account.label, victim.reason)

    # -- changing ----------------------------------------------------------------------------------------------------------------------

    def retire(self, shelf: Shelf) -> None:
        self._tell(lambda ledger: ledger.retire(shelf))

    def clear(self, shelf: Shelf, reason: str) -> None:
        self._tell(lambda ledger: ledger.clear(shelf, reason))

    def close_idle(self, reason: str) -> None:
        """Close everything that is idle."""
        for account in self._under_lock(lambda ledger: list(ledger.accounts())):
            for shelf in list(account.shelves):
                self.clear(shelf, reason)

    def set_limits(self, limits: Limits, *, total: int | None = None) -> None:
        """Other limits from now on, while everything runs."""
        self._limits = limits
        self.total = total or self.total
        self._apply_limits()

    @property
    def limits(self) -> Limits:
        return self._limits

    def under_pressure(self) -> None:
        """The server refused a connection because it has too many: take less of it for a while."""
        self._pressure.append(self.clock() + PRESSURE_TIME)
        self._apply_limits()
        self._reaper.due(self._pressure[0])

    def maintain(self, now: float) -> float:
        """Close what has been idle for too long, and undo old pressure. Returns when there is something to do next."""
        if self._pressure and self._pressure[0] <= now:
            while self._pressure and self._pressure[0] <= now:
                self._pressure.popleft()
            self._apply_limits()
        self._under_lock(lambda ledger: ledger.expire(now))
        due = self._under_lock(lambda ledger: min(ledger.next_expiry(), now + ledger.limits.idle_timeout if ledger.held else _NEVER))
        due = max(due, now + _SHORTEST_SLEEP)
        return min(due, self._pressure[0]) if self._pressure else due

    def overdue(self, now: float, after: float) -> float:
        """Tell of leases that are older than ``after`` seconds, once each. Returns when to look again."""
        due = now + after
        for unit in self._leases():
            if unit.place is None:
                continue
            if unit.since + after <= now:
                place, unit.place = "".join(unit.place.format()), None
                logger.warning("a connection of tenant %s has been leased for %.1f s; taken at:\n%s", _label(unit), now - unit.since, place)
                self.emit("LeaseOverdue", self.server, _label(unit), now - unit.since, place)
            else:
                due = min(due, unit.since + after)
        return due

    def _apply_limits(self) -> None:
        connections = max(1, self._limits.connections - len(self._pressure))
        limits = self._limits if connections == self._limits.connections else dataclasses.replace(self._limits, connections=connections)
        self._tell(lambda ledger: ledger.set_limits(limits, self.clock()))

    # -- seeing ------------------------------------------------------------------------------------------------------------------------

    def stats(self) -> BudgetStats:
        return self._under_lock(self._look)

    def _look(self, ledger: Ledger) -> BudgetStats:
        accounts = sorted(ledger.accounts(), key=lambda account: (-account.held, -account.waiting, account.label))
        counts = ledger.counts
        return BudgetStats(
            server=self.server,
            total=self.total,
            processes=self.processes,
            limit=ledger.limits.connections,
            per_tenant=ledger.limits.per_tenant,
            in_use=ledger.in_use,
            idle=ledger.idle,
            opening=ledger.opening,
            closing=ledger.closing,
            detached=ledger.detached,
            waiting=ledger.waiting,
            opens=counts.opens,
            reuses=counts.reuses,
            waits=counts.waits,
            timeouts=counts.timeouts,
            refusals=counts.refusals,
            closes=dict(counts.closes),
            available=not self.breaker.is_open,
            tenants=tuple(
                TenantUse(account.label, account.held, account.idle, account.waiting)
                for account in accounts[:_TOP]
                if account.held or account.waiting
            ),
        )

    def leased_by(self, owner: object) -> list[str]:
        """The tenants whose connections a thread or task holds right now."""
        return sorted(_label(unit) for unit in self._leases() if unit.owner == owner)

    def _leases(self) -> list[Unit]:
        return [unit for pool in list(self.pools) for unit in pool.leases()]

    # -- remembering -------------------------------------------------------------------------------------------------------------------

    def failure_of(self, key: Hashable, now: float) -> Exception | None:
        """What has lately gone wrong with one tenant, and is not to be tried again yet."""
        known = self._under_lock(lambda _: self._failures.get(key))
        return known[0] if known is not None and now < known[1] else None

    def remember_failure(self, key: Hashable, error: Exception, until: float) -> None:
        forgettable = (type(error)(*error.args), until)  # without the traceback, which would keep sessions alive
        forgettable[0].__cause__ = error.__cause__
        self._under_lock(lambda _: self._failures.__setitem__(key, forgettable))

    # -- the lock ----------------------------------------------------------------------------------------------------------------------

    def _under_lock(self, ask: Callable[[Ledger], R]) -> R:
        with self._lock:
            self._empty_inbox()
            result = ask(self._ledger)
            granted, to_close = self._effects()
        if granted or to_close:
            self._act(granted, to_close)
        if self._inbox:
            self._drain()
        return result

    def _tell(self, tell: Callable[[Ledger], None]) -> None:
        self._inbox.append(tell)
        self._drain()

    def _drain(self) -> None:
        """Empty the inbox, unless somebody else holds the lock: who lets go of it looks into the inbox afterwards."""
        while self._inbox and self._lock.acquire(blocking=False):
            try:
                self._empty_inbox()
                granted, to_close = self._effects()
            finally:
                self._lock.release()
            if granted or to_close:
                self._act(granted, to_close)

    def _empty_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()(self._ledger)

    def _effects(self) -> tuple[list[Claim], list[Unit]]:
        ledger = self._ledger
        if not ledger.granted and not ledger.to_close:
            return _NOTHING
        effects = ledger.granted, ledger.to_close
        ledger.granted, ledger.to_close = [], []
        return effects

    def _act(self, granted: list[Claim], to_close: list[Unit]) -> None:
        for claim in granted:
            if claim.waiter is not None and not claim.waiter.deliver():
                self.hand_back(claim)
        for unit in to_close:
            self.close_victim(unit)
            self.free_later(unit)

    def free_later(self, unit: Unit) -> None:
        """Free the place of a closed connection when the server has let go of it."""
        eof, unit.eof = unit.eof, None
        if eof is None:
            self.free(unit)
        else:
            self._reaper.watch(eof, self, unit)

    def free(self, unit: Unit) -> None:
        self._tell(lambda ledger: ledger.closed(unit, self.clock()))

    # -- processes ---------------------------------------------------------------------------------------------------------------------

    def start_empty(self) -> list[Any]:
        """In the child after a fork: everything is the parent's. Returns what must be kept alive, because collecting it would close it."""
        inherited = [self._ledger, self._inbox, [pool.disown() for pool in list(self.pools)]]
        self._lock = threading.Lock()
        self._inbox = deque()
        self.pools = weakref.WeakSet()
        self._pressure = deque()
        self.breaker = Breaker()
        self._ledger = Ledger(self._limits, DuelPolicy(max(1, self._limits.connections)))
        return inherited


_NOTHING: tuple[list[Claim], list[Unit]] = ([], [])


def _label(unit: Unit) -> str:
    return unit.shelf.account.label
