"""The budget ledger over random histories. After each step the books are recomputed from the list of all units and claims, and the promises
of the module are checked without asking the ledger's own reasoning."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tenantdb.connections.ledger import Account, Claim, Ledger, Limits, Shelf, Unit, UnitState, Verdict, Work

TENANTS = ("acme", "globex", "initech")
LANES = ("threads", "loop")
BUSY = (UnitState.OPENING, UnitState.IN_USE, UnitState.CLOSING, UnitState.DETACHED)
GRANTED = (Verdict.REUSE, Verdict.OPEN)

picks = st.integers(0, 63)
patience = st.sampled_from([1000.0, 1000.0, 5.0, 1.0, 0.0])
limits = st.builds(
    Limits,
    connections=st.integers(1, 6),
    per_tenant=st.integers(1, 4),
    background=st.integers(0, 2),
    administration=st.integers(0, 1),
    headroom=st.integers(0, 2),
    max_waiting=st.integers(0, 12),
    quantum=st.integers(0, 3),
    idle_timeout=st.sampled_from([2.0, 8.0, float("inf")]),
)


class LeastRecentlyUsed:
    def __init__(self) -> None:
        self.order: dict[Hashable, None] = {}

    def used(self, tenant: Hashable, *, scan: bool = False) -> None:
        self.order.pop(tenant, None)
        self.order[tenant] = None

    def victim(self, idle: Mapping[Hashable, int]) -> Hashable:
        assert all(count > 0 for count in idle.values())
        return next(tenant for tenant in self.order if tenant in idle)

    def resize(self, slots: int) -> None:
        assert slots > 0


class LedgerMachine(RuleBasedStateMachine):
    """Each rule is one call of a shell, which then does as it is told: it keeps its own view of each unit in ``seen``."""

    @initialize(limits=limits)
    def begin(self, limits: Limits) -> None:
        self.now = 100.0
        self.ledger = Ledger(limits, LeastRecentlyUsed())
        self.shelves = {(tenant, lane): self.ledger.shelf(tenant) for tenant in TENANTS for lane in LANES}
        self.units: list[Unit] = []
        self.seen: dict[Unit, UnitState] = {}  # what the shell knows of each unit that is not gone
        self.reopening: set[Unit] = set()
        self.waiting: list[Claim] = []
        self.line: dict[Work, list[Account]] = {work: [] for work in Work}  # tenants in the order of their turns
        self.refused = self.reused = self.opened = 0
        self.before()

    # -- the shell -----------------------------------------------------------------------------------------------------------------

    def before(self) -> None:
        """What is compared with the state after the step."""
        self.sound = False
        self.fresh: list[Claim] = []  # claims with a verdict of this step
        self.handed_on: Unit | None = None
        self.held_before = self.ledger.held
        self.tenant_held_before = {account.key: account.held for account in self.ledger.accounts()}

    def sated(self, line: list[Account]) -> list[Account]:
        """Tenants in line that use an equal share or more, and let those who use less go before."""
        using = (UnitState.OPENING, UnitState.IN_USE, UnitState.DETACHED)
        active = Counter(unit.shelf.account for unit, state in self.seen.items() if state in using)
        return [account for account in line if active[account] * len(line) >= self.ledger.limits.connections]

    def obey(self) -> None:
        """Do what the ledger said, as a shell does after each call."""
        for unit in self.ledger.to_close:
            assert self.seen[unit] is UnitState.IDLE
            self.seen[unit] = UnitState.CLOSING
        self.ledger.to_close.clear()
        passed_over: list[tuple[Work, list[Account]]] = []
        for claim in self.ledger.granted:
            assert claim in self.waiting, "a verdict for somebody who does not wait"
            assert claim.verdict is not None
            assert (claim.verdict is Verdict.EXPIRED) == (claim.deadline <= self.now) or claim.verdict is Verdict.RETIRED
            sated = self.sated(self.line[claim.work])
            self.waiting.remove(claim)
            self.settle(claim)
            if claim.verdict in GRANTED and claim.unit is not self.handed_on:  # by its tenant's turn
                line, account = self.line[claim.work], claim.shelf.account
                if claim.verdict is Verdict.OPEN:  # which any claim of the tenant could have been served by
                    mine = [c for c in self.waiting if (c.shelf.account, c.work) == (account, claim.work) and c.deadline > self.now]
                    assert all(c.number > claim.number for c in mine)
                ahead = line[: line.index(account)]
                passed_over.append((claim.work, [other for other in ahead if account in sated or other not in sated]))
                line.remove(account)
                line.append(account)
        self.ledger.granted.clear()
        self.units = [unit for unit in self.units if unit in self.seen]
        for work, accounts in passed_over:
            for claim in self.waiting:
                if claim.work is work and claim.shelf.account in accounts and claim.deadline > self.now:
                    assert not self.fit(claim.shelf) and not self.may_open(claim.shelf.account), "it was another tenant's turn"
        for work, line in self.line.items():
            line[:] = [account for account in line if any((c.shelf.account, c.work) == (account, work) for c in self.waiting)]

    def settle(self, claim: Claim) -> None:
        self.fresh.append(claim)
        unit, victim = claim.unit, claim.victim
        if claim.verdict not in GRANTED:
            assert unit is None and victim is None
            return
        assert unit is not None
        assert not claim.shelf.retired
        if claim.verdict is Verdict.REUSE:
            assert victim is None
            self.lease(unit, claim.shelf)
            return
        assert unit not in self.seen
        self.units.append(unit)
        self.seen[unit] = UnitState.OPENING
        if victim is not None:
            assert self.seen.pop(victim) is UnitState.IDLE, "only what is idle is evicted"
            assert victim.state is UnitState.GONE and victim.reason in ("evicted", "lifetime")

    def lease(self, unit: Unit, shelf: Shelf) -> None:
        assert self.seen[unit] is UnitState.IDLE and unit.shelf is shelf
        assert unit.expires_at > self.now, "too old for use"
        self.seen[unit] = UnitState.IN_USE
        self.reused += 1

    def those(self, *states: UnitState) -> list[Unit]:
        return [unit for unit in self.units if self.seen.get(unit) in states]

    # -- what can happen -----------------------------------------------------------------------------------------------------------

    @rule(tenant=st.sampled_from(TENANTS), lane=st.sampled_from(LANES), patience=patience)
    def somebody_asks(self, tenant: str, lane: str, patience: float) -> None:
        self.asks(self.shelves[tenant, lane], Work.INTERACTIVE, patience)

    @rule(tenant=st.sampled_from(TENANTS), lane=st.sampled_from(LANES), work=st.sampled_from(Work), patience=patience)
    def a_job_asks(self, tenant: str, lane: str, work: Work, patience: float) -> None:
        self.asks(self.shelves[tenant, lane], work, patience)

    @precondition(lambda self: self.those(UnitState.IDLE))
    @rule(pick=picks, work=st.sampled_from(Work), patience=patience)
    def one_with_something_idle_asks(self, pick: int, work: Work, patience: float) -> None:
        self.asks(self.pick(pick, UnitState.IDLE).shelf, work, patience)

    @rule(lane=st.sampled_from(LANES), crowd=st.integers(2, 6))
    def a_crowd_asks(self, lane: str, crowd: int) -> None:
        for _ in range(crowd):
            self.asks(self.shelves[TENANTS[0], lane], Work.INTERACTIVE, 1000.0)
            self.all_promises_are_kept()

    def asks(self, shelf: Shelf, work: Work, patience: float) -> None:
        self.before()
        ahead = [claim for claim in self.waiting if (claim.shelf, claim.work) == (shelf, work) and claim.deadline > self.now]
        waiting, of_tenant = len(self.waiting), sum(claim.shelf.account is shelf.account for claim in self.waiting)
        unit = self.ledger.reuse(shelf, work, self.now)
        if unit is not None:
            claim = Claim(shelf, work, self.now, -1)
            claim.verdict, claim.unit = Verdict.REUSE, unit
        else:
            claim = self.ledger.claim(shelf, work, self.now, self.now + patience)
        if claim.verdict is None:
            assert patience > 0, "deadline 0 never waits"
            limit = self.ledger.limits.max_waiting
            assert waiting < limit and of_tenant < max(1, limit // 2)
            self.waiting.append(claim)
            if shelf.account not in self.line[work]:
                self.line[work].append(shelf.account)
        else:
            assert claim.verdict not in GRANTED or not ahead, "served before those who came first"
            assert claim.verdict is not Verdict.EXPIRED or patience == 0
            self.refused += claim.verdict is Verdict.REFUSED
            self.settle(claim)
        self.obey()

    @precondition(lambda self: self.those(UnitState.OPENING))
    @rule(pick=picks, life=st.sampled_from([1.0, 4.0, float("inf")]))
    def opens(self, pick: int, life: float) -> None:
        self.before()
        unit = self.pick(pick, UnitState.OPENING)
        self.seen[unit] = UnitState.IN_USE
        self.reopening.discard(unit)
        self.opened += 1
        self.ledger.opened(unit, self.now + life, self.now)
        self.obey()

    @precondition(lambda self: self.those(UnitState.OPENING))
    @rule(pick=picks)
    def fails_to_open(self, pick: int) -> None:
        self.before()
        unit = self.pick(pick, UnitState.OPENING)
        del self.seen[unit]
        self.reopening.discard(unit)
        self.ledger.closed(unit, self.now)
        self.obey()

    @precondition(lambda self: self.those(UnitState.IN_USE))
    @rule(pick=picks)
    def comes_back(self, pick: int) -> None:
        self.returns(pick, "")

    @precondition(lambda self: self.those(UnitState.IN_USE))
    @rule(pick=picks)
    def comes_back_broken(self, pick: int) -> None:
        self.returns(pick, "broken")

    @precondition(lambda self: self.those(UnitState.IN_USE))
    @rule()
    def all_come_back(self) -> None:
        for _ in self.those(UnitState.IN_USE):
            if self.those(UnitState.IN_USE):
                self.returns(0, "")
                self.all_promises_are_kept()

    def returns(self, pick: int, reason: str) -> None:
        self.before()
        unit = self.pick(pick, UnitState.IN_USE)
        handed = unit.handed
        within = self.within_limits(unit)
        kept = self.ledger.returned(unit, self.now, reason=reason)
        self.seen[unit] = UnitState.IDLE if kept else UnitState.CLOSING
        if not kept:
            assert not self.ledger.granted
            assert unit.reason != "limit" or not within, "closed for a limit that is not exceeded"
        if unit.state is UnitState.IN_USE and unit.handed:  # without its tenant's having to wait for its turn
            self.handed_on = unit
            assert unit.handed == handed + 1 <= self.ledger.limits.quantum
        self.obey()

    def within_limits(self, unit: Unit) -> bool:
        """Without those that are going anyway."""
        staying = [other for other in self.units if self.seen.get(other) not in (None, UnitState.CLOSING)]
        of_tenant = sum(other.shelf.account is unit.shelf.account for other in staying)
        return len(staying) <= self.ledger.limits.connections and of_tenant <= self.ledger.limits.per_tenant

    @precondition(lambda self: self.those(UnitState.IN_USE))
    @rule(pick=picks)
    def is_found_dead(self, pick: int) -> None:
        self.before()
        unit = self.pick(pick, UnitState.IN_USE)
        self.seen[unit] = UnitState.OPENING
        self.reopening.add(unit)
        self.ledger.reopen(unit)
        self.obey()

    @precondition(lambda self: self.those(UnitState.IN_USE))
    @rule(pick=picks)
    def is_detached(self, pick: int) -> None:
        self.before()
        unit = self.pick(pick, UnitState.IN_USE)
        self.seen[unit] = UnitState.DETACHED
        self.ledger.detach(unit)
        self.obey()

    @precondition(lambda self: self.those(UnitState.IN_USE, UnitState.DETACHED, UnitState.OPENING, UnitState.IDLE))
    @rule(pick=picks)
    def begins_to_close(self, pick: int) -> None:
        self.before()
        unit = self.pick(pick, UnitState.IN_USE, UnitState.DETACHED, UnitState.OPENING, UnitState.IDLE)
        self.seen[unit] = UnitState.CLOSING
        self.reopening.discard(unit)
        self.ledger.closes(unit, "asked", self.now)
        self.obey()

    @precondition(lambda self: self.those(UnitState.CLOSING, UnitState.DETACHED))
    @rule(pick=picks)
    def has_closed(self, pick: int) -> None:
        self.before()
        unit = self.pick(pick, UnitState.CLOSING, UnitState.DETACHED)
        del self.seen[unit]
        self.ledger.closed(unit, self.now)
        self.obey()

    @precondition(lambda self: self.waiting)
    @rule(pick=picks, timed_out=st.booleans())
    def gives_up(self, pick: int, timed_out: bool) -> None:
        self.before()
        claim = self.waiting.pop(pick % len(self.waiting))
        assert self.ledger.withdraw(claim, timed_out=timed_out)
        assert not self.ledger.withdraw(claim)
        self.obey()

    @rule(tenant=st.sampled_from(TENANTS), lane=st.sampled_from(LANES), for_good=st.sampled_from([False, False, True]))
    def is_cleared(self, tenant: str, lane: str, for_good: bool) -> None:
        self.before()
        shelf = self.shelves[tenant, lane]
        if for_good:
            self.shelves[tenant, lane] = self.ledger.shelf(tenant)
            self.ledger.retire(shelf)
        else:
            self.ledger.clear(shelf, "cleared")
        self.obey()
        assert not shelf.idle
        if for_good:
            assert all(claim.shelf is not shelf for claim in self.waiting)
            assert self.ledger.claim(shelf, Work.INTERACTIVE, self.now, self.now + 9).verdict is Verdict.RETIRED

    @rule(change=limits | st.sampled_from([("connections", 1), ("connections", -1), ("per_tenant", 1), ("per_tenant", -1)]))
    def limits_change(self, change: Limits | tuple[str, int]) -> None:
        self.before()
        if isinstance(change, tuple):
            name, by = change
            change = dataclasses.replace(self.ledger.limits, **{name: max(1, getattr(self.ledger.limits, name) + by)})
        self.ledger.set_limits(change, self.now)
        self.obey()

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]), maintained=st.booleans())
    def time_passes(self, seconds: float, maintained: bool) -> None:
        self.before()
        self.now += seconds
        if not maintained:
            return
        due = self.ledger.next_expiry() <= self.now
        self.ledger.expire(self.now)
        assert bool(self.ledger.to_close) == due
        self.obey()
        assert all(unit.idle_since + self.ledger.limits.idle_timeout > self.now for unit in self.those(UnitState.IDLE))

    def pick(self, number: int, *states: UnitState) -> Unit:
        found = self.those(*states)
        return found[number % len(found)]

    # -- what always holds ---------------------------------------------------------------------------------------------------------

    @invariant()
    def all_promises_are_kept(self) -> None:
        self.the_books_are_right()
        self.the_limits_are_kept()
        self.what_is_idle_is_not_beyond_the_limits()
        self.each_class_leaves_the_others_what_is_theirs()
        self.nobody_waits_who_could_be_served()
        self.who_came_first_is_served_first()
        self.sound = True

    def the_books_are_right(self) -> None:
        ledger = self.ledger
        assert {unit: unit.state for unit in self.units} == self.seen
        by_state = Counter(self.seen.values())
        assert (ledger.opening, ledger.in_use, ledger.idle, ledger.closing, ledger.detached) == tuple(
            by_state[state] for state in (UnitState.OPENING, UnitState.IN_USE, UnitState.IDLE, UnitState.CLOSING, UnitState.DETACHED)
        )
        assert ledger.held == len(self.units)
        assert ledger._busy == [sum(unit.work is work for unit in self.those(*BUSY)) for work in Work]
        assert ledger.waiting == len(self.waiting)
        assert not ledger.granted and not ledger.to_close
        assert all(claim.verdict is None for claim in self.waiting)
        resting = list(ledger._resting)
        assert set(resting) == set(self.those(UnitState.IDLE))
        assert resting == sorted(resting, key=lambda unit: unit.idle_since)
        for account in ledger.accounts():
            self.one_account_is_right(account)
        assert ledger._idle == {account.key: account.idle for account in ledger.accounts() if account.idle}
        counts = ledger.counts
        assert (counts.opens, counts.reuses, counts.refusals) == (self.opened, self.reused, self.refused)

    def one_account_is_right(self, account: Account) -> None:
        mine = Counter(self.seen[unit] for unit in self.units if unit.shelf.account is account)
        waiting = [claim for claim in self.waiting if claim.shelf.account is account]
        assert (account.held, account.idle, account.opening, account.closing, account.waiting) == (
            sum(mine.values()),
            mine[UnitState.IDLE],
            mine[UnitState.OPENING],
            mine[UnitState.CLOSING],
            len(waiting),
        )
        occupied = {unit.shelf for unit in self.units if unit.shelf.account is account} | {claim.shelf for claim in waiting}
        assert set(account.shelves) == occupied
        for shelf in occupied:
            on_shelf = [unit for unit in self.units if unit.shelf is shelf]
            assert shelf.units == len(on_shelf)
            assert set(shelf.idle) == {unit for unit in on_shelf if unit.state is UnitState.IDLE}
            assert len(set(shelf.idle)) == len(shelf.idle)
            queues = {work: [claim for claim in waiting if (claim.shelf, claim.work) == (shelf, work)] for work in Work}
            assert {work: list(queue) for work, queue in shelf.waiting.items()} == {work: queue for work, queue in queues.items() if queue}

    def the_limits_are_kept(self) -> None:
        ledger = self.ledger
        assert len(self.seen) <= max(ledger.limits.connections, self.held_before)
        for account in ledger.accounts():
            assert account.held <= max(ledger.limits.per_tenant, self.tenant_held_before.get(account.key, 0))
            assert sum(unit.shelf.account is account for unit in self.those(UnitState.OPENING) if unit not in self.reopening) <= 1
        for claim in self.fresh:
            if claim.verdict is Verdict.OPEN:
                account = claim.shelf.account
                assert len(self.seen) <= ledger.limits.connections
                assert account.held <= ledger.limits.per_tenant
                assert account.opening == 1, "one at a time"

    def what_is_idle_is_not_beyond_the_limits(self) -> None:
        assert all(self.within_limits(unit) for unit in self.those(UnitState.IDLE))

    def each_class_leaves_the_others_what_is_theirs(self) -> None:
        """Background is granted last, so that a step in which several are served ends in a state that each of the grants allowed."""
        for claim in self.fresh:
            if claim.verdict in GRANTED:
                assert self.allowed(claim.work, self.busy())

    def nobody_waits_who_could_be_served(self) -> None:
        for claim in self.waiting:
            if claim.deadline > self.now and self.allowed(claim.work, self.busy() + Counter([claim.work])):
                assert not self.fit(claim.shelf)
                assert not self.may_open(claim.shelf.account)

    def busy(self) -> Counter[Work]:
        return Counter(unit.work for unit in self.those(*BUSY))

    def allowed(self, work: Work, busy: Counter[Work]) -> bool:
        """Whether a class may have as many as it has when this many are busy."""
        limits = self.ledger.limits
        reserved = dict(zip(Work, limits.reserved, strict=True))
        owed = sum(max(0, reserved[other] - busy[other]) for other in Work if other is not work)
        if work is Work.BACKGROUND and busy[work] > reserved[work]:
            owed += min(limits.headroom, max(0, limits.connections - sum(limits.reserved) - 1))
        return limits.connections - sum(busy.values()) >= owed

    def fit(self, shelf: Shelf) -> bool:
        return any(unit.shelf is shelf and unit.expires_at > self.now for unit in self.those(UnitState.IDLE))

    def may_open(self, account: Account) -> bool:
        mine = [self.seen[unit] for unit in self.units if unit.shelf.account is account]
        cap = self.ledger.limits.per_tenant
        return (
            len(self.seen) <= self.ledger.limits.connections
            and UnitState.OPENING not in mine
            and (len(mine) < cap or (len(mine) == cap and UnitState.IDLE in mine))
        )

    def who_came_first_is_served_first(self) -> None:
        for served in self.fresh:
            if served.verdict in GRANTED and served.number >= 0:
                ahead = [c for c in self.waiting if (c.shelf, c.work) == (served.shelf, served.work) and c.number < served.number]
                assert not ahead

    # -- the end -------------------------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not getattr(self, "sound", False):
            return  # what has failed already is told better by that
        for _ in range(10 * (len(self.waiting) + len(self.units)) + 10):  # everybody is served while the clock stands
            if not self.waiting:
                break
            self.finish_what_is_under_way()
        assert not self.waiting
        self.finish_what_is_under_way()
        for shelf in self.shelves.values():
            self.ledger.retire(shelf)
        self.obey()
        self.finish_what_is_under_way()
        self.before()
        self.all_promises_are_kept()
        ledger = self.ledger
        assert ledger.held == ledger.waiting == ledger.idle == ledger.in_use == ledger.opening == ledger.closing == ledger.detached == 0
        assert not ledger._idle and not ledger._resting and not any(ledger._turns) and not any(ledger._busy)
        assert not any(account.shelves for account in ledger.accounts())
        self.fresh.clear()
        self.handed_on = None
        self.line.clear()
        del shelf
        self.shelves.clear()
        assert not list(ledger.accounts()), "an account outlived its shelves"

    def finish_what_is_under_way(self) -> None:
        steps: dict[UnitState, Any] = {
            UnitState.OPENING: lambda unit: self.ledger.opened(unit, now=self.now),
            UnitState.IN_USE: lambda unit: self.ledger.returned(unit, self.now),
            UnitState.CLOSING: lambda unit: self.ledger.closed(unit, self.now),
            UnitState.DETACHED: lambda unit: self.ledger.closed(unit, self.now),
        }
        for state, step in steps.items():
            for unit in self.those(state):
                self.before()
                answer = step(unit)
                self.handed_on = unit if unit.state is UnitState.IN_USE and unit.handed else None
                if state is UnitState.OPENING:
                    self.seen[unit] = UnitState.IN_USE
                    self.reopening.discard(unit)
                    self.opened += 1
                elif state is UnitState.IN_USE:
                    self.seen[unit] = UnitState.IDLE if answer else UnitState.CLOSING
                else:
                    del self.seen[unit]
                self.obey()


LedgerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestTheLedger = LedgerMachine.TestCase
