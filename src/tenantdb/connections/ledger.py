"""Who may hold a connection next: the budget ledger of one database server.

PostgreSQL admits a fixed number of backends, so every connection that a process holds, to whichever tenant, is one unit of one budget. The
ledger counts units and says who gets the next one. It does no I/O and knows no lock, clock, thread or event loop: a shell calls it under a
lock of its own, does as it is told, and says what came of it. Every method decides from the state it finds, never from a difference.

A unit is opening, in use, idle, closing or detached, and counts in each of these. A unit that is opened in the place of an idle one is
counted once, as opening, from the moment the victim is chosen: whoever got the claim closes `Claim.victim` first, then opens.

Checked after every step of random histories (tests/unit/test_ledger_machine.py):

1. opening + in use + idle + closing + detached <= limit, unless the limit was lowered, and then nothing is opened.
2. While somebody waits who could be served, no unit is free or idle.
3. On one shelf and in one class claims are served in order of arrival. Tenants stand in line, once each however many wait; whose turn it is
   goes to the end. A connection that comes back is handed on to its own tenant, out of turn, at most ``quantum`` times in a row, because to
   open one for another tenant takes as long as to serve several. A tenant that cannot be served just now is passed over and keeps its
   place: one that lost it while it opens would fall behind, and the more so the more of its requests wait. So is one that uses an equal
   share already, while another that uses less can be served.
4. A tenant has at most ``per_tenant`` units, unless that was lowered, and opens one at a time: the connection that comes back first serves
   the next in line, and a server that has just restarted is not stormed. A lease that opens anew (`Ledger.reopen`) waits for nobody.
5. Interactive work leaves alone what is reserved for background work and administration; background work beyond its reservation leaves
   a headroom.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from tenantdb.model import StrEnum

if TYPE_CHECKING:
    from typing import Protocol

    class EvictionPolicy(Protocol):
        """Whose idle connection goes when a place is needed."""

        def used(self, tenant: Hashable, *, scan: bool = False) -> None:
            """A connection of the tenant is checked out, now or as soon as there is one."""

        def victim(self, idle: Mapping[Hashable, int]) -> Hashable:
            """The tenant, of those with idle connections, that loses one."""

        def resize(self, slots: int) -> None: ...


_NEVER = float("inf")


class Work(IntEnum):
    """Why a connection is wanted; the first is served first. Background work is tagged for eviction as well: it says nothing about what is
    popular. Numbers, because they index lists on the way that every request takes."""

    ADMINISTRATION = 0
    INTERACTIVE = 1
    BACKGROUND = 2


class UnitState(StrEnum):
    OPENING = "opening"
    IN_USE = "in_use"
    IDLE = "idle"
    CLOSING = "closing"
    DETACHED = "detached"
    GONE = "gone"


class Verdict(StrEnum):
    """What became of a claim. ``open``: close ``claim.victim`` if there is one, then open ``claim.unit``."""

    REUSE = "reuse"
    OPEN = "open"
    REFUSED = "refused"  # the queue is full
    EXPIRED = "expired"  # its deadline passed while it waited
    RETIRED = "retired"  # its shelf serves nobody any more


# Names of this module, because looking up a member of an enum takes 40 ns on Python 3.11 and each request would do it often.
_BACKGROUND = Work.BACKGROUND
_IN_USE, _IDLE = UnitState.IN_USE, UnitState.IDLE
_WORK = tuple(Work)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a ledger keeps to; see `tenantdb.Budget`, from which a process's share is made. Seconds by a clock that never steps back."""

    connections: int
    per_tenant: int
    background: int = 0
    administration: int = 0
    headroom: int = 0
    max_waiting: int = 10_000
    quantum: int = 16
    idle_timeout: float = _NEVER

    @property
    def reserved(self) -> Sequence[int]:
        """What each class has to itself, by `Work`. Leaves interactive work at least half of a small budget."""
        room = self.connections // 2
        administration = min(self.administration, room)
        return (administration, 0, min(self.background, room - administration))

    @property
    def spared(self) -> int:
        """What background work beyond its reservation leaves alone: the headroom, but never so much that it could not run at all."""
        return min(self.headroom, max(0, self.connections - sum(self.reserved) - 1))


class Account:
    """One tenant's part of the books. Lives as long as somebody holds one of its shelves."""

    __slots__ = ("__weakref__", "closing", "held", "idle", "key", "label", "opening", "shelves", "waiting")

    def __init__(self, key: Hashable, label: str) -> None:
        self.key = key
        self.label = label  # for people: what statistics and errors call the tenant
        self.held = 0
        self.idle = 0
        self.opening = 0
        self.closing = 0
        self.waiting = 0
        self.shelves: dict[Shelf, None] = {}  # those with units or waiters


class Shelf:
    """Where the connections of one (tenant, generation, role, lane) are put down: they are interchangeable, and no others are."""

    __slots__ = ("account", "idle", "retired", "units", "waiting")

    def __init__(self, account: Account) -> None:
        self.account = account
        self.retired = False
        self.units = 0
        self.idle: list[Unit] = []  # last in, first out: what was used last is most likely alive, and the rest may expire
        self.waiting: dict[Work, OrderedDict[Claim, None]] = {}


class Unit:
    """One connection's place in the budget. What is about the connection and its lease is the shell's."""

    __slots__ = (
        "binding", "eof", "expires_at", "handed", "idle_since", "owner", "place", "reason", "record", "shelf", "since", "state", "wire",
        "work",
    )  # fmt: skip

    def __init__(self, shelf: Shelf, work: Work) -> None:
        self.shelf = shelf
        self.state = UnitState.OPENING
        self.work = work
        self.handed = 0
        self.expires_at = _NEVER
        self.idle_since = 0.0
        self.reason = ""  # why it closes
        self.record: Any = None
        self.wire: Any = None  # the driver's connection
        self.eof: int | None = None  # a descriptor that tells when the server has let go
        self.since = 0.0  # when its lease began
        self.owner: object = None  # whose it is: a number of a thread or task, which it does not keep alive
        self.place: Any = None  # the stack where it was taken
        self.binding: Any = None  # the block that bound the tenant for whoever took it


class Claim:
    """Somebody's wish for a connection. ``verdict`` is None while it waits. ``waiter`` is the shell's."""

    __slots__ = ("deadline", "number", "shelf", "unit", "verdict", "victim", "waiter", "work")

    def __init__(self, shelf: Shelf, work: Work, deadline: float, number: int) -> None:
        self.shelf = shelf
        self.work = work
        self.deadline = deadline
        self.number = number
        self.verdict: Verdict | None = None
        self.unit: Unit | None = None
        self.victim: Unit | None = None
        self.waiter: Any = None


class Counts:
    """What has happened so far."""

    __slots__ = ("closes", "opens", "refusals", "reuses", "timeouts", "waits")

    def __init__(self) -> None:
        self.opens = self.reuses = self.waits = self.refusals = self.timeouts = 0
        self.closes: dict[str, int] = {}  # by reason


class Ledger:
    """See the module. The shell empties ``granted`` and ``to_close`` after each call."""

    def __init__(self, limits: Limits, policy: EvictionPolicy) -> None:
        self.counts = Counts()
        self.granted: list[Claim] = []  # claims that waited and have a verdict now
        self.to_close: list[Unit] = []  # idle until now; the shell closes them and says `closed`
        self.held = 0  # opening, in use, idle, closing or detached
        self.idle = self.opening = self.closing = self.detached = 0
        self.waiting = 0
        self._policy = policy
        self._busy = [0] * len(Work)  # what is held and not idle, by the class it was asked for
        self._accounts: weakref.WeakValueDictionary[Hashable, Account] = weakref.WeakValueDictionary()
        self._idle: dict[Hashable, int] = {}  # by tenant, for the policy
        self._resting: OrderedDict[Unit, None] = OrderedDict()  # idle units, longest idle first
        self._turns: list[OrderedDict[Account, None]] = [OrderedDict() for _ in Work]  # who waits, by class, in line
        self._number = 0
        self._keep_to(limits)

    def _keep_to(self, limits: Limits) -> None:
        self.limits = limits
        self._connections = limits.connections
        self._per_tenant = limits.per_tenant
        self._reserved = limits.reserved
        self._spared = limits.spared
        self._plenty = limits.connections - sum(self._reserved) - self._spared  # with fewer busy than that every class is admitted

    # -- looking -----------------------------------------------------------------------------------------------------------------------

    @property
    def in_use(self) -> int:
        return self.held - self.idle - self.opening - self.closing - self.detached

    def shelf(self, tenant: Hashable, label: str = "") -> Shelf:
        """A new shelf of a tenant."""
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = Account(tenant, label or str(tenant))
        return Shelf(account)

    def accounts(self) -> Iterator[Account]:
        """Tenants with a shelf that somebody holds."""
        return iter(list(self._accounts.values()))

    # -- asking ------------------------------------------------------------------------------------------------------------------------

    def reuse(self, shelf: Shelf, work: Work, now: float) -> Unit | None:
        """An idle connection, now, or None: the way that is taken most. After None, `claim`."""
        if not shelf.idle or (self.held - self.idle >= self._plenty and not self._admits(work)):
            return None
        unit = shelf.idle[-1]
        if unit.expires_at <= now:
            return None
        self._policy.used(shelf.account.key, scan=work is _BACKGROUND)
        self._pick_up(unit, work)
        return unit

    def claim(self, shelf: Shelf, work: Work, now: float, deadline: float) -> Claim:
        """A claim with its verdict, or one that waits for it."""
        claim = Claim(shelf, work, deadline, self._number)
        self._number += 1
        account = shelf.account
        if shelf.retired:
            claim.verdict = Verdict.RETIRED
        elif self._admits(work) and (self._may_open_now(account) or _fit_for_use(shelf, now)):
            self._policy.used(account.key, scan=work is _BACKGROUND)
            self._grant(claim, now)
        elif deadline <= now:
            self.counts.timeouts += 1
            claim.verdict = Verdict.EXPIRED
        elif self.waiting >= self.limits.max_waiting or account.waiting >= max(1, self.limits.max_waiting // 2):
            self.counts.refusals += 1
            claim.verdict = Verdict.REFUSED  # half of the queue at most is one tenant's, so that its crowd does not shut out the rest
        else:
            self._policy.used(account.key, scan=work is _BACKGROUND)
            self.counts.waits += 1
            self._enqueue(claim)
        return claim

    def withdraw(self, claim: Claim, *, timed_out: bool = False) -> bool:
        """Stop waiting. False where the verdict came first: then what was granted is the caller's to give back."""
        if claim.verdict is not None:
            return False
        self._dequeue(claim)
        claim.verdict = Verdict.EXPIRED
        self.counts.timeouts += timed_out
        return True

    # -- telling -----------------------------------------------------------------------------------------------------------------------

    def opened(self, unit: Unit, expires_at: float = _NEVER, now: float = 0.0) -> None:
        """The connection stands; its lease begins, and its tenant may open the next."""
        self._expect(unit, UnitState.OPENING)
        self._leave(unit)
        self._enter(unit, _IN_USE)
        unit.expires_at = expires_at
        self.counts.opens += 1
        self._serve(now)

    def returned(self, unit: Unit, now: float, reason: str = "") -> bool:
        """The lease has ended. False where the connection must be closed now, by the caller, who then says `closed`; with a ``reason``
        it always must."""
        if unit.state is not _IN_USE:
            self._expect(unit, _IN_USE)
        shelf = unit.shelf
        if not reason:
            if shelf.retired:
                reason = "retired"
            elif unit.expires_at <= now:
                reason = "lifetime"
            elif (self.held > self._connections or shelf.account.held > self._per_tenant) and self._too_many(shelf.account):
                reason = "limit"
        if reason:
            self._close(unit, reason)
            return False
        handed = unit.handed
        self._put_down(unit, now)
        if self.waiting:
            if handed < self.limits.quantum:
                self._hand_on(unit, handed, now)
            self._serve(now)
        return True

    def reopen(self, unit: Unit) -> None:
        """The connection of a lease turned out to be dead before it was used: its place stays with the lease, which opens anew."""
        self._expect(unit, _IN_USE)
        self._leave(unit)
        self._enter(unit, UnitState.OPENING)

    def closes(self, unit: Unit, reason: str, now: float = 0.0) -> None:
        """A connection that is opening, in use, idle or detached is being closed; `closed` follows."""
        self._close(unit, reason)
        self._serve(now)  # one that was opening made the next of its tenant wait

    def closed(self, unit: Unit, now: float) -> None:
        """The server has let go of the connection, or it never came to be: the place is free."""
        if unit.state is not UnitState.CLOSING:
            self._close(unit, unit.reason or "failed")
        self._leave(unit)
        self._strike(unit)
        self._serve(now)

    def detach(self, unit: Unit) -> None:
        """The application took the connection out of the pool; it counts until it is closed."""
        self._expect(unit, _IN_USE)
        self._leave(unit)
        self._enter(unit, UnitState.DETACHED)

    def retire(self, shelf: Shelf) -> None:
        """Serve nobody from this shelf again: idle connections close, leased ones when they come back, waiters are told."""
        shelf.retired = True
        self.clear(shelf, "retired")
        for queue in list(shelf.waiting.values()):
            for claim in list(queue):
                self._dequeue(claim)
                claim.verdict = Verdict.RETIRED
                self.granted.append(claim)

    def clear(self, shelf: Shelf, reason: str) -> None:
        """Close what is idle on a shelf."""
        while shelf.idle:
            self._clear(shelf.idle[-1], reason)

    def expire(self, now: float) -> None:
        """Close what has been idle for too long. Takes time in proportion to what it closes."""
        while self._resting:
            oldest = next(iter(self._resting))
            if oldest.idle_since + self.limits.idle_timeout > now:
                return
            self._clear(oldest, "idle")

    def next_expiry(self) -> float:
        """When `expire` next has something to do, as far as is known now."""
        return next(iter(self._resting)).idle_since + self.limits.idle_timeout if self._resting else _NEVER

    def set_limits(self, limits: Limits, now: float) -> None:
        """Other limits from now on. What is idle beyond them closes at once, what is in use when it comes back."""
        self._keep_to(limits)
        self._policy.resize(max(1, limits.connections))
        for tenant in list(self._idle):
            account = self._accounts[tenant]
            while account.idle and account.held - account.closing > limits.per_tenant:
                self._clear(self._victim(account), "limit")
        while self.idle and self.held - self.closing > limits.connections:
            self._clear(self._victim(None), "limit")
        self._serve(now)

    # -- who may ------------------------------------------------------------------------------------------------------------------------

    def _admits(self, work: Work) -> bool:
        """Whether the class may have one more unit that is not idle."""
        busy = self.held - self.idle
        if busy < self._plenty:
            return True
        free = self._connections - busy
        for other, promised in enumerate(self._reserved):
            if other != work and promised > self._busy[other]:
                free -= promised - self._busy[other]
        if work is _BACKGROUND and self._busy[work] >= self._reserved[work]:
            free -= self._spared
        return free > 0

    def _may_open(self, account: Account) -> bool:
        """Whether the tenant may open one more: it is not opening one, and has room, or can make it by giving up an idle one."""
        return not account.opening and (account.held < self._per_tenant or (account.held == self._per_tenant and account.idle > 0))

    def _may_open_now(self, account: Account) -> bool:
        """The same for a class that is admitted. Nothing opens before a lowered limit is reached, although something may be idle:
        what is closing is still there."""
        return self.held <= self._connections and self._may_open(account)

    def _too_many(self, account: Account) -> bool:
        """Whether the limits were lowered and one more must go, besides those that are going."""
        return self.held - self.closing > self._connections or account.held - account.closing > self._per_tenant

    def _victim(self, account: Account | None) -> Unit:
        """The idle unit that goes: the longest idle one of the tenant that the policy names, or of ``account``."""
        if account is None:
            account = self._accounts[self._policy.victim(self._idle)]
        return min((shelf.idle[0] for shelf in account.shelves if shelf.idle), key=lambda unit: unit.idle_since)

    # -- granting ----------------------------------------------------------------------------------------------------------------------

    def _grant(self, claim: Claim, now: float) -> None:
        """Serve a claim that can be served."""
        shelf = claim.shelf
        unit = _fit_for_use(shelf, now)
        if unit is not None:
            while shelf.idle[-1] is not unit:
                self._clear(shelf.idle[-1], "lifetime")
            self._pick_up(unit, claim.work)
            claim.verdict, claim.unit = Verdict.REUSE, unit
            return
        claim.victim = self._make_room(shelf)
        account = shelf.account
        claim.verdict = Verdict.OPEN
        claim.unit = unit = Unit(shelf, claim.work)
        shelf.units += 1
        account.held += 1
        account.shelves[shelf] = None
        self.held += 1
        self._busy[unit.work] += 1
        self.opening += 1
        account.opening += 1

    def _make_room(self, shelf: Shelf) -> Unit | None:
        """The idle unit whose place goes to one that opens on a shelf, if it needs one."""
        account = shelf.account
        reason = "evicted"
        if shelf.idle:  # too old for use, or there would be no need to open
            victim, reason = shelf.idle[-1], "lifetime"
        elif account.held >= self._per_tenant:
            victim = self._victim(account)
        elif self.held >= self._connections:
            victim = self._victim(None)
        else:
            return None
        self._lift(victim)
        victim.reason = reason
        self._strike(victim)
        return victim

    def _hand_on(self, unit: Unit, handed: int, now: float) -> None:
        """Give a connection that has come back to the next in line on its own shelf, unless somebody elsewhere goes before."""
        shelf = unit.shelf
        for work, turns in zip(_WORK, self._turns, strict=True):
            if not turns or not self._admits(work):
                continue
            queue = shelf.waiting.get(work)
            while queue and (claim := next(iter(queue))).deadline <= now:
                self._expire(claim)
            if queue:
                self._dequeue(claim)
                self._grant(claim, now)
                unit.handed = handed + 1
                self.granted.append(claim)
                return
            if self._first(turns, work, now) is not None:
                return

    def _serve(self, now: float) -> None:
        """Serve those who wait, in turn, for as long as anyone can be."""
        while self.waiting and self._serve_one(now):
            pass

    def _serve_one(self, now: float) -> bool:
        for work, turns in zip(_WORK, self._turns, strict=True):
            if not turns or not self._admits(work):
                continue
            claim = self._first(turns, work, now)
            if claim is None:
                continue
            if claim.deadline <= now:
                self._expire(claim)
                return True
            turns.move_to_end(claim.shelf.account)
            self._dequeue(claim)
            self._grant(claim, now)
            self.granted.append(claim)
            return True
        return False

    def _first(self, turns: OrderedDict[Account, None], work: Work, now: float) -> Claim | None:
        """The claim of a class whose turn it is: of the tenants that use less than an equal share, or else of all, the first in line.

        A tenant that is passed over keeps its place. It has a connection or opens one, so there are never more of them to pass over than
        the budget has connections.
        """
        sharers, otherwise = len(turns), None
        for account in turns:
            has_its_share = (account.held - account.idle - account.closing) * sharers >= self._connections
            if has_its_share and otherwise is not None:
                continue
            claim = self._next(account, work, now)
            if claim is not None:
                if not has_its_share:
                    return claim
                otherwise = claim
        return otherwise

    def _next(self, account: Account, work: Work, now: float) -> Claim | None:
        """Of a tenant's claims that can be served, the one that has waited longest."""
        may_open = self._may_open_now(account)
        first = None
        for shelf in account.shelves:
            queue = shelf.waiting.get(work)
            if queue and (may_open or _fit_for_use(shelf, now)):
                claim = next(iter(queue))
                if first is None or claim.number < first.number:
                    first = claim
        return first

    def _expire(self, claim: Claim) -> None:
        self._dequeue(claim)
        claim.verdict = Verdict.EXPIRED
        self.counts.timeouts += 1
        self.granted.append(claim)

    # -- the queue ---------------------------------------------------------------------------------------------------------------------

    def _enqueue(self, claim: Claim) -> None:
        shelf = claim.shelf
        shelf.waiting.setdefault(claim.work, OrderedDict())[claim] = None
        shelf.account.shelves[shelf] = None
        shelf.account.waiting += 1
        self.waiting += 1
        self._turns[claim.work].setdefault(shelf.account, None)

    def _dequeue(self, claim: Claim) -> None:
        shelf = claim.shelf
        account = shelf.account
        queue = shelf.waiting[claim.work]
        del queue[claim]
        if not queue:
            del shelf.waiting[claim.work]
            if not any(claim.work in other.waiting for other in account.shelves):
                del self._turns[claim.work][account]
        account.waiting -= 1
        self.waiting -= 1
        self._forget_if_empty(shelf)

    def _forget_if_empty(self, shelf: Shelf) -> None:
        if not shelf.units and not shelf.waiting:
            shelf.account.shelves.pop(shelf, None)

    # -- the books ---------------------------------------------------------------------------------------------------------------------

    def _pick_up(self, unit: Unit, work: Work) -> None:
        """Lease an idle unit."""
        self._lift(unit)
        unit.state, unit.work = _IN_USE, work
        self._busy[work] += 1
        self.counts.reuses += 1

    def _put_down(self, unit: Unit, now: float) -> None:
        """End a lease: the unit is idle now."""
        self._busy[unit.work] -= 1
        unit.state, unit.handed, unit.idle_since = _IDLE, 0, now
        shelf = unit.shelf
        shelf.idle.append(unit)
        account = shelf.account
        account.idle = self._idle[account.key] = account.idle + 1
        self._resting[unit] = None
        self.idle += 1

    def _lift(self, unit: Unit) -> None:
        """Take an idle unit off its shelf."""
        shelf = unit.shelf
        if shelf.idle[-1] is unit:
            shelf.idle.pop()
        else:
            shelf.idle.remove(unit)  # per_tenant long at most
        account = shelf.account
        account.idle = left = account.idle - 1
        if left:
            self._idle[account.key] = left
        else:
            del self._idle[account.key]
        del self._resting[unit]
        self.idle -= 1

    def _clear(self, unit: Unit, reason: str) -> None:
        """Close an idle unit; the shell will do it."""
        self._close(unit, reason)
        self.to_close.append(unit)

    def _close(self, unit: Unit, reason: str) -> None:
        if unit.state in (UnitState.CLOSING, UnitState.GONE):
            raise AssertionError(f"a unit that is {unit.state} cannot be closed again")
        if unit.state is _IDLE:
            self._lift(unit)
        else:
            self._leave(unit)
        unit.reason = reason
        self._enter(unit, UnitState.CLOSING)

    def _strike(self, unit: Unit) -> None:
        """Take a unit off the books, where it is in no state any more."""
        unit.state = UnitState.GONE
        shelf = unit.shelf
        shelf.units -= 1
        shelf.account.held -= 1
        self.held -= 1
        self.counts.closes[unit.reason] = self.counts.closes.get(unit.reason, 0) + 1
        self._forget_if_empty(shelf)

    def _enter(self, unit: Unit, state: UnitState) -> None:
        """Into a state that is neither idle nor gone."""
        unit.state = state
        self._busy[unit.work] += 1
        self._count(unit, +1)

    def _leave(self, unit: Unit) -> None:
        self._busy[unit.work] -= 1
        self._count(unit, -1)

    def _count(self, unit: Unit, one: int) -> None:
        state = unit.state
        if state is UnitState.OPENING:
            self.opening += one
            unit.shelf.account.opening += one
        elif state is UnitState.CLOSING:
            self.closing += one
            unit.shelf.account.closing += one
        elif state is UnitState.DETACHED:
            self.detached += one

    @staticmethod
    def _expect(unit: Unit, state: UnitState) -> None:
        if unit.state is not state:
            raise AssertionError(f"a unit that is {unit.state} cannot do what needs one that is {state}")


def _fit_for_use(shelf: Shelf, now: float) -> Unit | None:
    """Of what is idle on a shelf and not too old, what was used last."""
    for unit in reversed(shelf.idle):
        if unit.expires_at > now:
            return unit
    return None
