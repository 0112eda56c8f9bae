"""The budget ledger by example. The clock is a number, and a connection is opened, used and closed by saying so."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Hashable, Mapping

import pytest

from tenantdb.connections.ledger import Claim, Ledger, Limits, Shelf, Unit, UnitState, Verdict, Work

LATER = 1_000.0


class LeastRecentlyUsed:
    def __init__(self) -> None:
        self.order: dict[Hashable, None] = {}
        self.scans = 0

    def used(self, tenant: Hashable, *, scan: bool = False) -> None:
        self.scans += scan
        self.order.pop(tenant, None)
        self.order[tenant] = None

    def victim(self, idle: Mapping[Hashable, int]) -> Hashable:
        return next(tenant for tenant in self.order if tenant in idle)

    def resize(self, slots: int) -> None: ...


def make(connections: int = 2, per_tenant: int = 10, **others: float) -> Ledger:
    return Ledger(Limits(connections=connections, per_tenant=per_tenant, **others), LeastRecentlyUsed())  # type: ignore[arg-type]


def ask(ledger: Ledger, shelf: Shelf, work: Work = Work.INTERACTIVE, *, now: float = 0.0, deadline: float = LATER) -> Claim:
    return ledger.claim(shelf, work, now, deadline)


def lease(ledger: Ledger, shelf: Shelf, work: Work = Work.INTERACTIVE, *, expires_at: float = LATER) -> Unit:
    """A connection in use, opened for it."""
    claim = ask(ledger, shelf, work)
    assert claim.verdict is Verdict.OPEN and claim.unit is not None
    ledger.opened(claim.unit, expires_at)
    return claim.unit


def park(ledger: Ledger, *shelves: Shelf, expires_at: float = LATER, now: float = 0.0) -> list[Unit]:
    """An idle connection on each."""
    units = [lease(ledger, shelf, expires_at=expires_at) for shelf in shelves]
    for unit in units:
        assert ledger.returned(unit, now)
    return units


def granted(ledger: Ledger) -> list[Claim]:
    """As a shell does after each call."""
    claims, ledger.granted = ledger.granted, []
    return claims


def to_close(ledger: Ledger) -> list[Unit]:
    units, ledger.to_close = ledger.to_close, []
    return units


# -- reuse, open, evict --------------------------------------------------------------------------------------------------------------


def test_an_idle_connection_is_used_before_another_is_opened() -> None:
    ledger = make()
    acme = ledger.shelf("acme")
    (unit,) = park(ledger, acme)

    claim = ask(ledger, acme)

    assert (claim.verdict, claim.unit, claim.victim) == (Verdict.REUSE, unit, None)
    assert ledger.reuse(acme, Work.INTERACTIVE, 0.0) is None  # it is in use now


def test_what_was_used_last_is_used_first() -> None:
    ledger = make()
    acme = ledger.shelf("acme")
    first, second = lease(ledger, acme), lease(ledger, acme)
    ledger.returned(second, 1.0)
    ledger.returned(first, 2.0)

    assert ledger.reuse(acme, Work.INTERACTIVE, 3.0) is first
    assert ledger.reuse(acme, Work.INTERACTIVE, 3.0) is second


def test_a_connection_is_opened_while_there_is_room() -> None:
    ledger = make(connections=2)
    park(ledger, ledger.shelf("acme"))

    claim = ask(ledger, ledger.shelf("globex"))

    assert (claim.verdict, claim.victim) == (Verdict.OPEN, None)
    assert (ledger.held, ledger.idle, ledger.opening) == (2, 1, 1)


def test_when_the_server_is_full_somebody_elses_idle_connection_gives_its_place_and_the_place_counts_once() -> None:
    ledger = make(connections=2)
    acme, globex = ledger.shelf("acme"), ledger.shelf("globex")
    (idle,) = park(ledger, acme)
    used = lease(ledger, globex)

    claim = ask(ledger, ledger.shelf("initech"))

    assert (claim.verdict, claim.victim) == (Verdict.OPEN, idle)
    assert (idle.state, idle.reason, used.state) == (UnitState.GONE, "evicted", UnitState.IN_USE)
    assert (ledger.held, ledger.in_use, ledger.idle, ledger.opening, ledger.closing) == (2, 1, 0, 1, 0)
    assert not to_close(ledger)  # whoever opens closes its victim first
    assert not acme.account.shelves


def test_the_longest_idle_connection_of_the_tenant_that_the_policy_names_goes() -> None:
    ledger = make(connections=3)
    threads, loop = ledger.shelf("acme"), ledger.shelf("acme")
    one, two = lease(ledger, threads), lease(ledger, loop)
    ledger.returned(two, 1.0)
    ledger.returned(one, 2.0)
    lease(ledger, ledger.shelf("globex"))

    assert ask(ledger, ledger.shelf("initech")).victim is two


def test_a_connection_in_use_is_never_evicted() -> None:
    ledger = make(connections=2)
    acme, globex = ledger.shelf("acme"), ledger.shelf("globex")
    lease(ledger, acme)
    lease(ledger, acme)

    claim = ask(ledger, globex)

    assert claim.verdict is None
    assert ledger.in_use == 2


def test_a_tenant_at_its_cap_gives_up_its_own_idle_connection_on_another_shelf_though_the_server_has_room() -> None:
    ledger = make(connections=10, per_tenant=1)
    threads, loop = ledger.shelf("acme"), ledger.shelf("acme")
    (idle,) = park(ledger, threads)

    claim = ask(ledger, loop)

    assert (claim.verdict, claim.victim) == (Verdict.OPEN, idle)
    assert ledger.held == 1


def test_a_connection_past_its_lifetime_gives_its_place_to_its_successor_without_waiting() -> None:
    ledger = make(connections=1)
    acme = ledger.shelf("acme")
    (old,) = park(ledger, acme, expires_at=5.0)

    assert ledger.reuse(acme, Work.INTERACTIVE, 5.0) is None
    claim = ask(ledger, acme, now=5.0, deadline=5.0)

    assert (claim.verdict, claim.victim, old.reason) == (Verdict.OPEN, old, "lifetime")


def test_a_younger_connection_below_one_past_its_lifetime_is_used_and_the_old_one_closes() -> None:
    ledger = make()
    acme = ledger.shelf("acme")
    young, old = lease(ledger, acme, expires_at=9.0), lease(ledger, acme, expires_at=5.0)
    ledger.returned(young, 1.0)
    ledger.returned(old, 2.0)

    claim = ask(ledger, acme, now=6.0)

    assert (claim.verdict, claim.unit) == (Verdict.REUSE, young)
    assert to_close(ledger) == [old]


def test_a_connection_past_its_lifetime_closes_when_it_comes_back() -> None:
    ledger = make()
    unit = lease(ledger, ledger.shelf("acme"), expires_at=5.0)

    assert ledger.returned(unit, 5.0) is False
    assert (unit.state, unit.reason, ledger.held) == (UnitState.CLOSING, "lifetime", 1)
    ledger.closed(unit, 5.0)
    assert ledger.held == 0 and ledger.counts.closes == {"lifetime": 1}


def test_the_policy_hears_of_each_request_once_and_whether_it_is_a_scan() -> None:
    heard: list[tuple[Hashable, bool]] = []

    class Listening(LeastRecentlyUsed):
        def used(self, tenant: Hashable, *, scan: bool = False) -> None:
            heard.append((tenant, scan))
            super().used(tenant, scan=scan)

    ledger = Ledger(Limits(connections=1, per_tenant=1), Listening())
    acme, globex = ledger.shelf("acme"), ledger.shelf("globex")
    unit = lease(ledger, acme)
    ledger.returned(unit, 0.0)
    ledger.reuse(acme, Work.BACKGROUND, 0.0)
    ask(ledger, globex)
    ledger.returned(unit, 0.0)

    assert heard == [("acme", False), ("acme", True), ("globex", False)]


# -- waiting -------------------------------------------------------------------------------------------------------------------------


def test_what_comes_back_goes_to_whoever_waits_for_it() -> None:
    ledger = make(connections=1)
    acme = ledger.shelf("acme")
    unit = lease(ledger, acme)
    first, second = ask(ledger, acme), ask(ledger, acme)

    assert ledger.returned(unit, 1.0)

    assert granted(ledger) == [first]
    assert (first.verdict, first.unit, second.verdict) == (Verdict.REUSE, unit, None)
    assert ledger.waiting == 1


def test_a_returned_connection_is_closed_at_once_for_another_tenant_that_waits() -> None:
    """The lost wake-up: A's connection is idle, nobody of A wants it, and B sleeps until the idle timeout."""
    ledger = make(connections=1)
    acme, globex = ledger.shelf("acme"), ledger.shelf("globex")
    unit = lease(ledger, acme)
    theirs = ask(ledger, globex)

    assert ledger.returned(unit, 1.0)  # it was put down, and then chosen

    assert granted(ledger) == [theirs]
    assert (theirs.verdict, theirs.victim, unit.state) == (Verdict.OPEN, unit, UnitState.GONE)
    assert (ledger.held, ledger.opening) == (1, 1)


@pytest.mark.parametrize("says", ["closed", "closes"])
def test_a_failed_connect_wakes_the_next_in_line_also_of_another_tenant(says: str) -> None:
    ledger = make(connections=1)
    acme, globex = ledger.shelf("acme"), ledger.shelf("globex")
    failing = ask(ledger, acme)
    theirs = ask(ledger, globex)
    assert failing.unit is not None and theirs.verdict is None

    if says == "closes":  # the socket is there, and must be seen to close
        ledger.closes(failing.unit, "failed", 1.0)
        assert not granted(ledger)
    ledger.closed(failing.unit, 1.0)

    assert granted(ledger) == [theirs] and theirs.verdict is Verdict.OPEN
    assert ledger.counts.closes == {"failed": 1}


def test_a_failed_connect_lets_its_own_tenant_try_again_before_the_socket_has_closed() -> None:
    ledger = make(connections=2)
    acme = ledger.shelf("acme")
    failing, ours = ask(ledger, acme), ask(ledger, acme)
    assert failing.unit is not None and ours.verdict is None  # one at a time

    ledger.closes(failing.unit, "failed", 1.0)

    assert granted(ledger) == [ours] and ours.verdict is Verdict.OPEN
    assert (ledger.opening, ledger.closing) == (1, 1)


def test_a_tenant_at_its_cap_waits_with_room_on_the_server_until_the_cap_is_raised() -> None:
    ledger = make(connections=10, per_tenant=1)
    acme = ledger.shelf("acme")
    lease(ledger, acme)
    claim = ask(ledger, acme)
    assert claim.verdict is None and ledger.held == 1

    ledger.set_limits(Limits(connections=10, per_tenant=2), 1.0)

    assert granted(ledger) == [claim] and claim.verdict is Verdict.OPEN


def test_a_tenant_at_its_cap_does_not_hold_up_the_others() -> None:
    ledger = make(connections=2, per_tenant=1)
    acme, globex = ledger.shelf("acme"), ledger.shelf("globex")
    lease(ledger, acme)
    assert ask(ledger, acme).verdict is None

    assert ask(ledger, globex).verdict is Verdict.OPEN


def test_of_two_lanes_the_one_that_can_be_served_is_while_the_tenant_opens_for_the_other() -> None:
    """Choosing the longest waiting of a tenant without asking whether it can be served would open two at a time."""
    ledger = make(connections=3, headroom=1)
    threads, loop = ledger.shelf("acme"), ledger.shelf("acme")
    (idle,) = park(ledger, loop)
    first, second = lease(ledger, ledger.shelf("globex")), lease(ledger, ledger.shelf("globex"))
    on_threads, on_loop = ask(ledger, threads, Work.BACKGROUND), ask(ledger, loop, Work.BACKGROUND)
    assert on_threads.verdict is None and on_loop.verdict is None  # headroom
    ledger.reopen(first)
    ledger.closed(first, 1.0)
    assert granted(ledger) == [on_threads]  # opens, so that the loop cannot
    assert on_threads.verdict is Verdict.OPEN and on_threads.unit is not None

    ledger.returned(second, 1.0)

    assert granted(ledger) == [on_loop]
    assert (on_loop.verdict, on_loop.unit, ledger.opening) == (Verdict.REUSE, idle, 1)


def test_deadline_0_never_waits() -> None:
    ledger = make(connections=1)
    acme = ledger.shelf("acme")
    assert ask(ledger, acme, now=7.0, deadline=7.0).verdict is Verdict.OPEN

    claim = ask(ledger, acme, now=7.0, deadline=7.0)

    assert claim.verdict is Verdict.EXPIRED
    assert (ledger.waiting, ledger.counts.waits, ledger.counts.timeouts) == (0, 0, 1)


def test_who_has_waited_beyond_the_deadline_is_told_so_and_never_granted() -> None:
    ledger = make(connections=1)
    acme, globex = ledger.shelf("acme"), ledger.shelf("globex")
    unit = lease(ledger, acme)
    late, elsewhere = ask(ledger, acme, deadline=5.0), ask(ledger, globex, deadline=5.0)
    in_time = ask(ledger, globex)

    ledger.returned(unit, 5.0)

    assert granted(ledger) == [late, elsewhere, in_time]
    assert [claim.verdict for claim in (late, elsewhere, in_time)] == [Verdict.EXPIRED, Verdict.EXPIRED, Verdict.OPEN]
    assert late.unit is None and ledger.counts.timeouts == 2 and not ledger.withdraw(late)


def test_who_opened_does_not_wake_those_of_its_tenant_whose_deadline_has_passed() -> None:
    ledger = make(connections=2)
    acme = ledger.shelf("acme")
    first, late = ask(ledger, acme), ask(ledger, acme, deadline=5.0)
    assert first.unit is not None

    ledger.opened(first.unit, LATER, 6.0)

    assert granted(ledger) == [late] and late.verdict is Verdict.EXPIRED


def test_a_full_queue_refuses() -> None:
    ledger = make(connections=1, max_waiting=2)
    lease(ledger, ledger.shelf("acme"))
    assert [ask(ledger, ledger.shelf(name)).verdict for name in ("globex", "initech", "umbrella")] == [None, None, Verdict.REFUSED]
    assert (ledger.counts.refusals, ledger.waiting) == (1, 2)


def test_a_tenant_may_fill_only_half_of_the_queue() -> None:
    ledger = make(connections=1, max_waiting=4)
    acme, globex = ledger.shelf("acme"), ledger.shelf("globex")
    lease(ledger, acme)

    assert [ask(ledger, acme).verdict for _ in range(3)] == [None, None, Verdict.REFUSED]
    assert ask(ledger, globex).verdict is None


@pytest.mark.parametrize("withdrawn_first", [True, False])
def test_a_claim_is_either_withdrawn_or_granted(withdrawn_first: bool) -> None:
    ledger = make(connections=1)
    acme = ledger.shelf("acme")
    unit = lease(ledger, acme)
    claim = ask(ledger, acme)

    if withdrawn_first:
        assert ledger.withdraw(claim, timed_out=True)
        ledger.returned(unit, 1.0)
        assert not granted(ledger) and ledger.idle == 1 and ledger.counts.timeouts == 1
    else:
        ledger.returned(unit, 1.0)
        assert not ledger.withdraw(claim, timed_out=True)
        assert claim.unit is unit and ledger.in_use == 1 and ledger.counts.timeouts == 0
    assert ledger.waiting == 0


# -- taking turns --------------------------------------------------------------------------------------------------------------------


def test_a_connection_serves_its_own_tenant_up_to_the_quantum_and_then_rotates() -> None:
    ledger = make(connections=1, quantum=2)
    acme, globex = ledger.shelf("acme"), ledger.shelf("globex")
    unit = lease(ledger, acme)
    theirs = ask(ledger, globex)
    ours = [ask(ledger, acme) for _ in range(4)]

    for claim in ours[:2]:
        ledger.returned(unit, 1.0)
        assert granted(ledger) == [claim] and claim.unit is unit
    ledger.returned(unit, 1.0)

    assert granted(ledger) == [theirs] and theirs.victim is unit
    assert ours[2].verdict is None


def test_a_tenant_whose_turn_it_is_anyway_keeps_its_connection() -> None:
    """To close it for another, and then another's for it, would cost two connects for nothing."""
    ledger = make(connections=1, quantum=1)
    acme, globex = ledger.shelf("acme"), ledger.shelf("globex")
    unit = lease(ledger, acme)
    ours = [ask(ledger, acme) for _ in range(4)]  # in line before the other
    theirs = ask(ledger, globex)

    for claim in ours[:3]:  # the quantum, the turn, and the quantum that comes with it
        ledger.returned(unit, 1.0)
        assert granted(ledger) == [claim] and claim.unit is unit
    ledger.returned(unit, 1.0)

    assert granted(ledger) == [theirs]


def test_a_tenant_keeps_its_place_in_line_while_it_opens() -> None:
    ledger = make(connections=6, quantum=0)
    acme, globex, initech = ledger.shelf("acme"), ledger.shelf("globex"), ledger.shelf("initech")
    used = [lease(ledger, initech) for _ in range(5)]
    opening = ask(ledger, acme)
    ours, theirs = ask(ledger, acme), ask(ledger, globex)
    ledger.returned(used[0], 1.0)
    assert granted(ledger) == [theirs]  # acme opens one at a time, and is passed over
    assert opening.unit is not None and theirs.unit is not None
    ledger.opened(opening.unit)
    ledger.opened(theirs.unit)
    again = ask(ledger, globex)

    ledger.returned(used[1], 2.0)

    assert granted(ledger) == [ours] and again.verdict is None


def test_who_uses_less_than_an_equal_share_goes_before_who_was_first_in_line() -> None:
    ledger = make(connections=4, quantum=0)
    acme, globex, initech = ledger.shelf("acme"), ledger.shelf("globex"), ledger.shelf("initech")
    used = [lease(ledger, acme), lease(ledger, acme), lease(ledger, initech), lease(ledger, initech)]
    more, theirs = ask(ledger, acme), ask(ledger, globex)

    ledger.returned(used[2], 1.0)

    assert granted(ledger) == [theirs]  # acme has two of four, and two wait
    ledger.returned(used[3], 2.0)
    assert granted(ledger) == [more]  # nobody who has less waits any more


def test_without_others_the_quantum_is_no_limit() -> None:
    ledger = make(connections=1, quantum=1)
    acme = ledger.shelf("acme")
    unit = lease(ledger, acme)
    claims = [ask(ledger, acme) for _ in range(5)]

    for claim in claims:
        ledger.returned(unit, 1.0)
        assert granted(ledger) == [claim] and claim.unit is unit


def test_another_lane_of_the_same_tenant_has_its_turn_as_well() -> None:
    ledger = make(connections=10, per_tenant=1, quantum=1)
    threads, loop = ledger.shelf("acme"), ledger.shelf("acme")
    unit = lease(ledger, threads)
    first, elsewhere, last = ask(ledger, threads), ask(ledger, loop), ask(ledger, threads)

    ledger.returned(unit, 1.0)
    assert granted(ledger) == [first]
    ledger.returned(unit, 1.0)

    assert granted(ledger) == [elsewhere] and elsewhere.victim is unit
    assert last.verdict is None


def test_administration_goes_before_users_and_users_before_jobs() -> None:
    ledger = make(connections=1)
    acme, globex = ledger.shelf("acme"), ledger.shelf("globex")
    unit = lease(ledger, acme)
    job, user, admin = ask(ledger, acme, Work.BACKGROUND), ask(ledger, acme), ask(ledger, globex, Work.ADMINISTRATION)

    ledger.returned(unit, 1.0)

    assert granted(ledger) == [admin]  # at once, though acme has not used up its quantum
    assert admin.unit is not None and admin.victim is unit
    ledger.opened(admin.unit)
    ledger.returned(admin.unit, 1.0)
    assert granted(ledger) == [user] and user.verdict is Verdict.OPEN and job.verdict is None


@pytest.mark.parametrize("slots", [1, 4, 10])
def test_three_tenants_that_want_all_there_is_get_the_same_within_a_tenth(slots: int) -> None:
    """Whatever the crowds: one asks for much more than the others. Service and opening take 10 ms each."""
    ledger = make(connections=slots)
    shelves = {name: ledger.shelf(name) for name in ("acme", "globex", "initech")}
    served: Counter[str] = Counter()
    agenda: list[tuple[float, int, Unit, bool]] = []
    now = 0.0

    def begin(claim: Claim) -> None:
        assert claim.unit is not None
        heapq.heappush(agenda, (now + 0.01, claim.number, claim.unit, claim.verdict is Verdict.OPEN))

    for name, crowd in {"acme": 500, "globex": 40, "initech": 40}.items():
        for _ in range(crowd):
            claim = ask(ledger, shelves[name])
            if claim.verdict is not None:
                begin(claim)
    while now < 20:
        now, number, unit, opens = heapq.heappop(agenda)
        name = str(unit.shelf.account.key)
        if opens:
            ledger.opened(unit)
            heapq.heappush(agenda, (now + 0.01, number, unit, False))
        else:
            served[name] += 1
            another = ask(ledger, unit.shelf)
            assert another.verdict is None
            ledger.returned(unit, now)
        for claim in granted(ledger):
            begin(claim)

    mean = sum(served.values()) / 3
    assert all(abs(count - mean) < 0.1 * mean for count in served.values()), served


# -- growing -------------------------------------------------------------------------------------------------------------------------


def test_a_tenant_opens_one_at_a_time_and_others_meanwhile() -> None:
    ledger = make(connections=10)
    acme, globex = ledger.shelf("acme"), ledger.shelf("globex")
    first, second, third = (ask(ledger, acme) for _ in range(3))
    assert [first.verdict, second.verdict, third.verdict] == [Verdict.OPEN, None, None]
    assert ask(ledger, globex).verdict is Verdict.OPEN
    assert first.unit is not None

    ledger.opened(first.unit)

    assert granted(ledger) == [second] and second.verdict is Verdict.OPEN


def test_a_connection_that_comes_back_serves_before_the_slow_connect_does() -> None:
    ledger = make(connections=10)
    acme = ledger.shelf("acme")
    unit = lease(ledger, acme)
    slow, waiting = ask(ledger, acme), ask(ledger, acme)
    assert slow.verdict is Verdict.OPEN

    ledger.returned(unit, 1.0)

    assert granted(ledger) == [waiting] and waiting.unit is unit


def test_fifty_requests_on_five_warm_connections_with_slow_connects_open_two_more_at_most() -> None:
    """150 ms to connect, 2 ms of work: by the time that a connection is open the spike is over."""
    ledger = make(connections=50, per_tenant=50)
    acme = ledger.shelf("acme")
    park(ledger, *[acme] * 5)
    agenda: list[tuple[float, int, Unit, bool]] = []
    served, now, last = 0, 0.0, 0.0

    def begin(claim: Claim) -> None:
        assert claim.unit is not None
        opens = claim.verdict is Verdict.OPEN
        heapq.heappush(agenda, (now + (0.150 if opens else 0.002), claim.number, claim.unit, opens))

    for _ in range(50):
        claim = ask(ledger, acme)
        if claim.verdict is not None:
            begin(claim)
    while agenda:
        now, number, unit, opens = heapq.heappop(agenda)
        if opens:
            ledger.opened(unit)
            heapq.heappush(agenda, (now + 0.002, number, unit, False))
        else:
            served += 1
            ledger.returned(unit, now)
            last = now if served == 49 else last
        for claim in granted(ledger):
            begin(claim)

    assert served == 50 and ledger.held <= 7
    assert last <= 0.1  # all but the one that opened for itself


def test_after_a_restart_each_lease_opens_anew_in_its_own_place_and_newcomers_wait_for_that() -> None:
    ledger = make(connections=3)
    acme = ledger.shelf("acme")
    park(ledger, acme, acme)
    first, second = ledger.reuse(acme, Work.INTERACTIVE, 1.0), ledger.reuse(acme, Work.INTERACTIVE, 1.0)
    assert first is not None and second is not None

    ledger.reopen(first)
    ledger.reopen(second)
    newcomer = ask(ledger, acme)

    assert (ledger.held, ledger.opening, ledger.in_use, newcomer.verdict) == (2, 2, 0, None)
    ledger.opened(first)
    assert not granted(ledger)  # the second still opens
    ledger.opened(second)
    assert granted(ledger) == [newcomer] and newcomer.verdict is Verdict.OPEN


# -- limits that change --------------------------------------------------------------------------------------------------------------


def test_a_limit_below_what_is_used_is_reached_as_connections_come_back_and_no_further() -> None:
    ledger = make(connections=4)
    shelves = [ledger.shelf(name) for name in ("acme", "globex", "initech", "umbrella")]
    units = [lease(ledger, shelf) for shelf in shelves]
    waiting = ask(ledger, shelves[0])
    ledger.set_limits(Limits(connections=2, per_tenant=10), 1.0)
    assert ledger.held == 4 and not granted(ledger)

    assert [ledger.returned(unit, 2.0) for unit in units[:2]] == [False, False]
    assert [unit.reason for unit in units[:2]] == ["limit", "limit"]
    assert not granted(ledger)
    assert ledger.returned(units[2], 2.0)  # two are closing: enough
    assert not granted(ledger) and ledger.idle == 1  # but they are still there, and nothing opens before they are gone
    ledger.closed(units[0], 3.0)
    assert not granted(ledger)
    ledger.closed(units[1], 3.0)

    assert granted(ledger) == [waiting] and waiting.victim is units[2]
    assert ledger.held == 2


def test_what_is_idle_beyond_a_lowered_limit_closes_at_once() -> None:
    ledger = make(connections=4)
    acme = ledger.shelf("acme")
    first, second, third = park(ledger, acme, ledger.shelf("globex"), ledger.shelf("initech"))
    used = lease(ledger, ledger.shelf("umbrella"))

    ledger.set_limits(Limits(connections=2, per_tenant=10), 1.0)

    assert to_close(ledger) == [first, second]
    assert (third.state, used.state, ledger.held, ledger.closing) == (UnitState.IDLE, UnitState.IN_USE, 4, 2)
    assert ledger.returned(used, 2.0)  # it is within the limit once the others are gone


def test_a_lowered_cap_closes_what_the_tenant_has_beyond_it() -> None:
    ledger = make(connections=10, per_tenant=3)
    acme = ledger.shelf("acme")
    (idle, *_), used, back = park(ledger, acme), lease(ledger, ledger.shelf("acme")), lease(ledger, ledger.shelf("acme"))

    ledger.set_limits(Limits(connections=10, per_tenant=1), 1.0)

    assert to_close(ledger) == [idle]
    assert ledger.returned(back, 2.0) is False and back.reason == "limit"
    assert ledger.returned(used, 2.0) is True


def test_a_raised_limit_serves_as_many_as_it_has_room_for() -> None:
    ledger = make(connections=1)
    lease(ledger, ledger.shelf("acme"))
    claims = [ask(ledger, ledger.shelf(name)) for name in ("globex", "initech", "umbrella")]

    ledger.set_limits(Limits(connections=3, per_tenant=10), 1.0)

    assert granted(ledger) == claims[:2]
    assert ledger.held == 3


# -- retiring, clearing, detaching, expiring -----------------------------------------------------------------------------------------


def test_a_retired_shelf_serves_nobody_and_is_empty_once_its_leases_are_back() -> None:
    ledger = make(connections=2)
    acme = ledger.shelf("acme")
    used, idle = lease(ledger, acme), lease(ledger, acme)
    waiting = ask(ledger, acme)
    ledger.withdraw(waiting)
    ledger.returned(idle, 0.0)
    lone = ask(ledger, ledger.shelf("acme"))  # another generation takes the idle place
    assert lone.victim is idle

    waiting = ask(ledger, acme)
    ledger.retire(acme)

    assert granted(ledger) == [waiting] and waiting.verdict is Verdict.RETIRED
    assert ask(ledger, acme).verdict is Verdict.RETIRED
    assert ledger.returned(used, 1.0) is False and used.reason == "retired"
    ledger.closed(used, 1.0)
    assert acme.units == 0 and acme not in acme.account.shelves


def test_retiring_closes_what_is_idle() -> None:
    ledger = make()
    acme = ledger.shelf("acme")
    (idle,) = park(ledger, acme)

    ledger.retire(acme)

    assert to_close(ledger) == [idle]
    assert (idle.state, idle.reason, ledger.closing) == (UnitState.CLOSING, "retired", 1)


def test_a_connection_that_opens_for_a_shelf_retired_meanwhile_is_used_and_then_closed() -> None:
    ledger = make()
    acme = ledger.shelf("acme")
    claim = ask(ledger, acme)
    assert claim.unit is not None
    ledger.retire(acme)

    ledger.opened(claim.unit)

    assert ledger.in_use == 1
    assert ledger.returned(claim.unit, 1.0) is False


def test_a_closing_connection_holds_its_place_until_it_is_closed() -> None:
    ledger = make(connections=1)
    acme, globex = ledger.shelf("acme"), ledger.shelf("globex")
    (idle,) = park(ledger, acme)
    ledger.clear(acme, "suspect")
    claim = ask(ledger, globex)
    assert to_close(ledger) == [idle] and claim.verdict is None

    ledger.closed(idle, 1.0)

    assert granted(ledger) == [claim] and claim.verdict is Verdict.OPEN


def test_a_detached_connection_counts_until_it_is_closed() -> None:
    ledger = make(connections=1)
    acme, globex = ledger.shelf("acme"), ledger.shelf("globex")
    unit = lease(ledger, acme)
    ledger.detach(unit)
    claim = ask(ledger, globex)
    assert (ledger.detached, ledger.in_use, claim.verdict) == (1, 0, None)

    ledger.closed(unit, 1.0)

    assert granted(ledger) == [claim] and ledger.detached == 0


def test_a_connection_that_is_gone_cannot_be_given_back_or_closed_again() -> None:
    ledger = make()
    acme = ledger.shelf("acme")
    unit = lease(ledger, acme)
    ledger.returned(unit, 1.0, reason="broken")
    for again in (lambda: ledger.returned(unit, 1.0), lambda: ledger.closes(unit, "twice"), lambda: ledger.detach(unit)):
        with pytest.raises(AssertionError):
            again()
    ledger.closed(unit, 1.0)
    with pytest.raises(AssertionError):
        ledger.closed(unit, 1.0)

    assert (ledger.held, ledger.closing, ledger.detached, ledger.in_use) == (0, 0, 0, 0)


def test_what_has_been_idle_for_too_long_closes_longest_idle_first() -> None:
    ledger = make(connections=3, idle_timeout=10.0)
    acme = ledger.shelf("acme")
    units = [lease(ledger, acme) for _ in range(3)]
    for now, unit in enumerate(units):
        ledger.returned(unit, float(now))
    assert ledger.next_expiry() == 10.0

    ledger.expire(11.0)

    assert to_close(ledger) == units[:2]
    assert ledger.next_expiry() == 12.0


# -- classes -------------------------------------------------------------------------------------------------------------------------


def test_background_work_is_admitted_only_with_headroom_left() -> None:
    ledger = make(connections=4, headroom=2)
    shelves = [ledger.shelf(name) for name in ("acme", "globex", "initech", "umbrella")]
    lease(ledger, shelves[0], Work.BACKGROUND)
    lease(ledger, shelves[1], Work.BACKGROUND)

    waiting = ask(ledger, shelves[2], Work.BACKGROUND)

    assert waiting.verdict is None
    users = [lease(ledger, shelves[2]), lease(ledger, shelves[3])]  # the headroom is theirs
    ledger.returned(users[0], 1.0)
    assert not granted(ledger)
    ledger.returned(users[1], 1.0)
    assert not granted(ledger)  # two free, and two must stay so


def test_background_work_does_not_even_reuse_without_headroom() -> None:
    ledger = make(connections=3, headroom=2)
    acme = ledger.shelf("acme")
    (idle,) = park(ledger, acme)
    lease(ledger, ledger.shelf("globex"))

    assert ledger.reuse(acme, Work.BACKGROUND, 1.0) is None
    assert ledger.reuse(acme, Work.INTERACTIVE, 1.0) is idle


def test_background_work_has_its_reservation_whatever_users_do() -> None:
    ledger = make(connections=4, background=1, headroom=1)
    shelves = [ledger.shelf(name) for name in ("acme", "globex", "initech", "umbrella")]
    users = [lease(ledger, shelf) for shelf in shelves[:3]]
    refused = ask(ledger, shelves[3])
    assert refused.verdict is None and ledger.held == 3

    job = ask(ledger, shelves[3], Work.BACKGROUND)

    assert job.verdict is Verdict.OPEN and job.unit is not None
    ledger.opened(job.unit)
    ledger.returned(users[0], 1.0)
    assert granted(ledger) == [refused]  # in the place of the user's, not of the job's
    ledger.returned(job.unit, 1.0)
    assert not granted(ledger)


def test_administration_gets_in_when_users_and_jobs_have_all_that_is_theirs() -> None:
    ledger = make(connections=4, administration=1, background=1)
    shelves = [ledger.shelf(name) for name in ("acme", "globex", "initech", "umbrella")]
    lease(ledger, shelves[0])
    lease(ledger, shelves[1])
    lease(ledger, shelves[2], Work.BACKGROUND)
    assert ask(ledger, shelves[3]).verdict is None
    assert ask(ledger, shelves[3], Work.BACKGROUND).verdict is None

    assert ask(ledger, shelves[3], Work.ADMINISTRATION).verdict is Verdict.OPEN


def test_a_connection_handed_to_a_class_with_a_place_of_its_own_leaves_the_users_place_to_the_next_user() -> None:
    """A tenant at its cap: what it gives back serves its administration, which has a reservation; so one more user may come."""
    ledger = make(connections=2, per_tenant=1, administration=1)
    acme, globex = ledger.shelf("acme"), ledger.shelf("globex")
    unit = lease(ledger, acme)
    user, admin = ask(ledger, globex), ask(ledger, acme, Work.ADMINISTRATION)
    assert user.verdict is None and admin.verdict is None

    ledger.returned(unit, 1.0)

    assert granted(ledger) == [admin, user]
    assert (admin.verdict, user.verdict) == (Verdict.REUSE, Verdict.OPEN)


@pytest.mark.parametrize("connections", [1, 2, 3])
def test_a_small_budget_serves_every_class_when_nobody_else_is_there(connections: int) -> None:
    for work in Work:
        ledger = make(connections=connections, administration=1, background=2, headroom=2)
        assert ask(ledger, ledger.shelf("acme"), work).verdict is Verdict.OPEN
        ledger = make(connections=connections, headroom=2)
        assert ask(ledger, ledger.shelf("acme"), work).verdict is Verdict.OPEN
