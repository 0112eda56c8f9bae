"""The policy keeps who will be back, learns what "back" looks like, and never decides outside what it is offered."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from pathlib import Path
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from benchmarks import eviction as benchmark
from benchmarks.traces import Fleet, Trace, make
from tenantdb.connections.eviction import DuelPolicy


class Cache:
    """One connection per tenant, given back before the next request."""

    def __init__(self, slots: int) -> None:
        self.policy, self.slots, self.opens = DuelPolicy(slots), slots, 0
        self.idle: dict[Hashable, int] = {}

    def ask(self, *tenants: Hashable, scan: bool = False) -> int:
        """How many connections this opened."""
        before = self.opens
        for tenant in tenants:
            self.policy.used(tenant, scan=scan)
            if tenant in self.idle:
                continue
            self.opens += 1
            if len(self.idle) == self.slots:
                del self.idle[self.policy.victim(self.idle)]
            self.idle[tenant] = 1
        return self.opens - before


def lru(tenants: Iterable[str], slots: int) -> int:
    return benchmark.lru(Trace("", slots, tenants=list(tenants)))


def test_a_fresh_policy_gives_up_the_tenant_that_was_used_longest_ago() -> None:
    policy = DuelPolicy(3)
    for tenant in ("acme", "globex", "initech", "acme"):
        policy.used(tenant)

    assert policy.victim({"initech": 1, "acme": 1, "globex": 1}) == "globex"


def test_a_tenant_of_which_nothing_is_known_goes_first() -> None:
    policy = DuelPolicy(2)
    policy.used("acme")

    assert policy.victim({"acme": 1, "stranger": 1}) == "stranger"


def test_tenants_at_steady_rates_are_kept_by_how_often_they_come() -> None:
    trace = make(Fleet(name="steady", about="", tenants=500, zipf=1.0, slots=40), requests=12_000, seed=3)

    assert sum(benchmark.ours(trace)) < 0.8 * benchmark.lru(trace)  # measured: 0.73


def test_tenants_in_sessions_are_kept_by_how_lately_they_came() -> None:
    trace = make(Fleet(name="sessions", about="", tenants=5_000, zipf=1.0, slots=60, sessions=40), requests=12_000, seed=3)

    assert sum(benchmark.ours(trace)) < 1.03 * benchmark.lru(trace)  # counting alone opens six times as many


def test_a_change_from_steady_rates_to_sessions_is_noticed() -> None:
    steady = make(Fleet(name="steady", about="", tenants=500, zipf=1.0, slots=40), requests=12_000, seed=3).tenants
    sessions = make(Fleet(name="sessions", about="", tenants=5_000, zipf=1.0, slots=40, sessions=25), requests=12_000, seed=3).tenants
    cache = Cache(40)
    cache.ask(*steady)
    cache.ask(*sessions[:4_000])

    assert cache.ask(*sessions[4_000:]) < 1.15 * (lru(sessions, 40) - lru(sessions[:4_000], 40))  # counting alone: five times


def test_tenants_that_come_round_in_a_circle_larger_than_the_budget_do_not_push_out_one_another() -> None:
    circle = [f"t{n}" for n in range(60)]
    cache = Cache(50)
    cache.ask(*circle * 30)

    assert lru(circle * 40, 50) == 60 * 40  # recency gives up each tenant just before its turn
    assert cache.ask(*circle * 10) < 0.25 * 60 * 10  # foresight: 0.17


def test_a_scan_takes_the_place_of_one_connection_only() -> None:
    cache = Cache(10)
    hot = [f"hot{n}" for n in range(9)]
    cache.ask(*hot * 3)

    assert cache.ask(*(f"t{n}" for n in range(500)), scan=True) == 500
    assert cache.ask(*hot) == 0


def test_the_same_job_without_its_tag_does_push_them_out() -> None:
    """The negative twin."""
    cache = Cache(10)
    hot = [f"hot{n}" for n in range(9)]
    cache.ask(*hot * 3)
    cache.ask(*(f"t{n}" for n in range(500)))

    assert cache.ask(*hot) > 0


def test_the_connections_that_a_scan_opened_go_first_and_the_oldest_before_the_others() -> None:
    policy = DuelPolicy(4)
    policy.used("hot")
    for tenant in ("first", "second", "third"):
        policy.used(tenant, scan=True)
    idle: dict[Hashable, int] = {"third": 1, "hot": 1, "second": 1, "first": 1}

    gone: list[Hashable] = []
    while idle:
        gone.append(policy.victim(idle))
        del idle[gone[-1]]

    assert gone == ["first", "second", "third", "hot"]


def test_a_scanned_tenant_that_a_user_asks_for_stands_among_the_others() -> None:
    policy = DuelPolicy(2)
    policy.used("scanned", scan=True)
    policy.used("hot")
    policy.used("scanned")

    assert policy.victim({"scanned": 1, "hot": 1}) == "hot"


def test_a_scan_over_a_connection_that_users_wanted_leaves_it_where_it_was() -> None:
    policy = DuelPolicy(2)
    policy.used("cold")
    policy.used("hot")
    policy.used("hot", scan=True)
    assert policy.victim({"hot": 1, "cold": 1}) == "cold"


def test_a_scan_that_opens_anew_what_was_closed_leaves_it_at_the_cold_end() -> None:
    policy = DuelPolicy(2)
    policy.used("acme")
    policy.used("globex")
    assert policy.victim({"globex": 1}) == "globex"
    policy.used("globex", scan=True)

    assert policy.victim({"acme": 1, "globex": 1}) == "globex"  # though used after acme


def test_a_scan_is_no_use() -> None:
    policy = DuelPolicy(2)
    for tenant in ("acme", "globex"):
        policy.used(tenant)
    policy.used("acme", scan=True)

    assert policy.victim({"acme": 1, "globex": 1}) == "acme"


@pytest.mark.parametrize("traffic", ["counted", "fresh"])
def test_a_second_idle_connection_goes_before_the_only_one_of_a_tenant_used_about_as_much(traffic: str) -> None:
    policy = DuelPolicy(20)
    rng = Random(4)
    if traffic == "counted":
        for tenant in make(Fleet(name="steady", about="", tenants=200, zipf=1.0, slots=20), requests=3_000, seed=4).tenants:
            policy.used(tenant)
        assert policy._credit > 0
    for _ in range(1_000):
        policy.used(rng.choice(["acme", "globex"]))

    assert policy.victim({"acme": 1, "globex": 2}) == "globex"
    assert policy.victim({"acme": 2, "globex": 1}) == "acme"


def test_forgetting_a_tenant_leaves_nothing_of_it_behind() -> None:
    policy = DuelPolicy(5)
    tenants = [f"t{n}" for n in range(20)]
    for tenant in tenants * 3:
        policy.used(tenant)
        policy.used(f"{tenant}-scanned", scan=True)
    for tenant in tenants:
        policy.forget(tenant)
        policy.forget(f"{tenant}-scanned")
    policy.forget("never seen")

    assert not policy._known and not policy._cold and not policy._counts.kept and not policy._returns.kept


def test_after_a_resize_the_pretended_caches_have_the_new_size_at_once() -> None:
    policy = DuelPolicy(80)
    for n in range(200):
        policy.used(f"t{n}")
    policy.resize(8)
    assert len(policy._counts.kept) == len(policy._returns.kept) == 6  # an eighth below, less the one who comes next

    policy.resize(80)
    for n in range(200):
        policy.used(f"t{n}")
    assert len(policy._counts.kept) > 60


def test_a_budget_that_shrank_still_keeps_the_best() -> None:
    steady = make(Fleet(name="steady", about="", tenants=500, zipf=1.0, slots=40), requests=20_000, seed=3).tenants
    cache = Cache(80)
    cache.ask(*steady[:10_000])
    cache.policy.resize(40)
    cache.slots = 40
    while len(cache.idle) > 40:
        del cache.idle[cache.policy.victim(cache.idle)]

    assert cache.ask(*steady[10_000:]) < 0.8 * (lru(steady, 40) - lru(steady[:10_000], 40))


def test_one_slot_and_absences_beyond_all_measure_are_no_trouble() -> None:
    cache = Cache(1)
    cache.ask("acme", "globex", "acme")
    cache.policy._now += 1 << 40
    assert cache.ask("acme", "globex", "globex") == 1
    assert list(cache.idle) == ["globex"]


class Histories(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.slots = 4
        self.policy = DuelPolicy(self.slots)
        self.idle: dict[Hashable, int] = {}
        self.seen: set[Hashable] = set()

    tenants = st.sampled_from([f"t{n}" for n in range(12)])

    @rule(tenant=tenants, scan=st.booleans())
    def use(self, tenant: str, scan: bool) -> None:
        self.policy.used(tenant, scan=scan)
        self.seen.add(tenant)
        self.idle[tenant] = self.idle.get(tenant, 0) + 1

    @precondition(lambda self: self.idle)
    @rule()
    def evict(self) -> None:
        before = dict(self.idle)
        victim = self.policy.victim(self.idle)
        assert victim in before and self.idle == before  # it only says
        self.close(victim)

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        self.close(data.draw(st.sampled_from(sorted(self.idle, key=str))))  # for its age: the policy is not told

    def close(self, tenant: Hashable) -> None:
        self.idle[tenant] -= 1
        if not self.idle[tenant]:
            del self.idle[tenant]

    @rule(slots=st.integers(1, 40))
    def resize(self, slots: int) -> None:
        self.slots = slots
        self.policy.resize(slots)

    @rule(tenant=tenants)
    def forget(self, tenant: str) -> None:
        self.policy.forget(tenant)
        self.seen.discard(tenant)

    @invariant()
    def keeps_only_what_it_was_told_of(self) -> None:
        policy = self.policy
        assert policy._known.keys() | policy._cold.keys() <= self.seen
        for pretended, flag in ((policy._counts, "in_counts"), (policy._returns, "in_returns")):
            assert len(pretended.kept) <= self.slots + self.slots // 8
            assert {id(known) for known in pretended.kept} == {id(known) for known in policy._known.values() if getattr(known, flag)}
            assert len({id(known) for known in pretended.kept}) == len(pretended.kept)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


# The benchmark's own trace files


def trace_file(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text)
    return path


def test_a_trace_file_is_scored_beside_opt_and_lru(tmp_path: Path) -> None:
    path = trace_file(tmp_path, "time,tenant,tag\n0,a,fg\n0.5,b,fg\n1,c,scan\n1,a,fg\n2,b,fg\n")

    figures = benchmark.run(quick=True, trace=path, slots=2).figures

    assert figures == {"opens_per_1000": 800.0, "opt_per_1000": 800.0, "lru_per_1000": 1000.0}


@pytest.mark.parametrize(
    ("text", "slots", "complaint"),
    [
        ("", 2, "is empty"),
        ("time,tenant,tag\n", 2, "no requests"),
        ("tenant,time,tag\n0,a,fg\n", 2, "the header must be time,tenant,tag"),
        ("time,tenant,tag\n1,a,fg\n0,b,fg\n", 2, "trace.csv:3: the time 0 lies before"),
        ("time,tenant,tag\nsoon,a,fg\n", 2, "trace.csv:2: the time 'soon' is not a number"),
        ("time,tenant,tag\nnan,a,fg\n", 2, "trace.csv:2: the time 'nan' is not a number"),
        ("time,tenant,tag\n0,a,job\n", 2, "trace.csv:2: the tag 'job' is neither fg nor scan"),
        ("time,tenant,tag\n0,,fg\n", 2, "trace.csv:2: no tenant"),
        ("time,tenant,tag\n0,a\n", 2, "trace.csv:2: 2 fields, not 3"),
        ("time,tenant,tag\n0,a,fg\n", 0, "--slots 0: at least 1"),
    ],
)
def test_a_trace_file_that_is_wrong_is_refused_by_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, slots: int, complaint: str
) -> None:
    with pytest.raises(SystemExit) as refused:
        benchmark.run(quick=True, trace=trace_file(tmp_path, text), slots=slots)

    assert refused.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_trace_file_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.run(quick=True, trace=tmp_path / "none.csv", slots=2)
    assert "none.csv" in capsys.readouterr().err
