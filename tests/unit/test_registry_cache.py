"""The records cache keeps its six promises, whoever asks in whatever order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from uuid import UUID, uuid4

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tenantdb.errors import RegistryUnavailable, TenantNotFound
from tenantdb.model import Tenant, TenantState
from tenantdb.registry.answers import MOST_LOOKS
from tenantdb.registry.cache import Key, RecordCache
from tenantdb.registry.flights import SingleFlight
from tenantdb.registry.records import Stamp, TenantRecord
from tests.unit.registry_fixtures import Clock

ID = uuid4()


def record(slug: str = "acme", *, id: UUID = ID, version: int = 1) -> TenantRecord:
    return TenantRecord(tenant=Tenant(id=id, slug=slug, name=slug, state=TenantState.ACTIVE, version=version))


def cache(clock: Callable[[], float] | None = None, *, size: int = 10) -> RecordCache:
    return RecordCache(size=size, ttl=5.0, clock=clock or Clock())


def never(key: Key) -> TenantRecord:
    raise AssertionError(f"{key} was looked up")


def missing(key: Key) -> TenantRecord:
    raise TenantNotFound(str(key))


class Loader:
    """A look-up that waits until it is let go, and counts. What it brings the first time, and what from then on."""

    def __init__(self, result: TenantRecord | Exception, then: TenantRecord | None = None) -> None:
        self.result, self.then, self.calls = result, then, 0
        self.began, self.go = threading.Event(), threading.Event()

    def __call__(self, key: Key) -> TenantRecord:
        self.calls += 1
        self.began.set()
        assert self.go.wait(10)
        if self.calls > 1 and self.then is not None:
            return self.then
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@contextmanager
def in_flight(records: RecordCache, key: Key, loader: Loader) -> Iterator[list[object]]:
    """A look-up in another thread that has begun and not come back; its outcome is in the list once the block has ended."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(records.get(key, loader))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert loader.began.wait(10)
    try:
        yield outcome
    finally:
        loader.go.set()
        thread.join(10)


def test_slug_and_id_lead_to_one_entry() -> None:
    records = cache()
    first = records.get("acme", lambda key: record())
    assert records.get(ID, never) is first
    assert records.peek("acme") is first


def test_peek_does_no_look_up() -> None:
    assert cache().peek("acme") is None


def test_a_record_is_believed_for_its_time_and_no_longer() -> None:
    clock = Clock()
    records = cache(clock)
    records.get("acme", lambda key: record())
    clock.now += 4.999
    assert records.peek("acme") is not None
    clock.now += 0.001
    assert records.peek("acme") is None
    assert records.peek(ID) is None


def test_the_time_counts_from_the_beginning_of_the_look_up() -> None:
    clock = Clock()
    records = cache(clock)

    def slow(key: Key) -> TenantRecord:
        clock.now += 4
        return record()

    records.get("acme", slow)
    clock.now += 1
    assert records.peek("acme") is None


def test_an_unknown_name_is_remembered_for_the_same_time() -> None:
    clock = Clock()
    records = cache(clock)
    with pytest.raises(TenantNotFound):
        records.get("nobody", missing)
    with pytest.raises(TenantNotFound):
        records.peek("nobody")
    with pytest.raises(TenantNotFound):
        records.get("nobody", never)
    clock.now += 5
    assert records.peek("nobody") is None


def test_an_outage_is_not_remembered() -> None:
    records = cache()

    def down(key: Key) -> TenantRecord:
        raise RegistryUnavailable("down")

    with pytest.raises(RegistryUnavailable):
        records.get("acme", down)
    assert records.peek("acme") is None
    assert records.get("acme", lambda key: record()).tenant.slug == "acme"


def test_a_flood_of_unknown_names_pushes_out_no_record_and_is_bounded() -> None:
    records = cache(size=10)
    records.get("acme", lambda key: record())
    for number in range(100):
        with pytest.raises(TenantNotFound):
            records.get(f"x{number}", missing)
    assert records.peek("acme") is not None
    assert records.peek("x0") is None  # forgotten again
    with pytest.raises(TenantNotFound):
        records.peek("x99")


def test_records_are_bounded() -> None:
    records = cache(size=10)
    for number in range(11):
        records.get(f"t{number}", lambda key: record(str(key), id=uuid4()))
    assert records.peek("t0") is None
    assert records.peek("t10") is not None


def test_names_are_bounded_and_those_of_what_is_kept_stay() -> None:
    records = cache(size=10)
    for number in range(100):
        records.get(f"t{number}", lambda key: record(str(key), id=uuid4()))
    assert len(records._ids) <= 20
    assert [number for number in range(100) if records.peek(f"t{number}") is not None] == list(range(90, 100))


def test_who_was_used_since_the_last_comparison_outlives_who_was_not() -> None:
    there = {made.tenant.slug: made for made in (record(f"t{number}", id=uuid4()) for number in range(4))}
    records = cache(size=3)
    for slug in ("t0", "t1", "t2"):
        records.get(slug, lambda key: there[str(key)])
    records.check(lambda ids: {each.tenant.id: each.stamp for each in there.values()}, everything=False)

    assert records.peek("t0") is not None
    records.get("t3", lambda key: there[str(key)])

    assert [slug for slug in there if records.peek(slug) is None] == ["t1"]


def test_a_tenant_that_was_looked_for_too_early_is_found_once_it_is_known() -> None:
    records = cache()
    with pytest.raises(TenantNotFound):
        records.get("acme", missing)
    records.get(ID, lambda key: record())
    assert records.peek("acme") is not None


def test_a_renamed_tenant_is_not_found_under_its_old_slug() -> None:
    records = cache()
    records.get("acme", lambda key: record())
    records.forget(ID)
    records.get(ID, lambda key: record("acme-clinic", version=2))
    assert records.peek("acme") is None
    assert records.peek("acme-clinic") is not None


def test_forget_drops_the_record_under_both_keys() -> None:
    records = cache()
    records.get("acme", lambda key: record())
    records.forget(ID)
    assert records.peek("acme") is None
    assert records.peek(ID) is None


def test_forget_drops_what_was_remembered_as_missing() -> None:
    records = cache()
    for key in ("acme", "other", ID):
        with pytest.raises(TenantNotFound):
            records.get(key, missing)
    records.forget(ID, "acme")
    assert records.peek("acme") is None
    assert records.peek(ID) is None
    with pytest.raises(TenantNotFound):
        records.peek("other")


@pytest.mark.parametrize("forgotten", [True, False])
@pytest.mark.parametrize("key", ["acme", ID])
def test_what_a_look_up_brings_that_began_before_a_forget_is_neither_stored_nor_returned(key: Key, forgotten: bool) -> None:
    records = cache()
    loader = Loader(record(version=1), then=record(version=2))
    with in_flight(records, key, loader) as outcome:
        if forgotten:
            records.forget(ID)
    found = 2 if forgotten else 1  # the twin: without forget it is stored
    cached = records.peek(key)
    assert cached is not None and cached.tenant.version == found
    assert outcome == [cached]
    assert loader.calls == found


def test_a_forget_of_another_tenant_costs_no_second_look() -> None:
    records = cache()
    loader = Loader(record())
    with in_flight(records, "acme", loader):
        records.forget(uuid4())
    assert loader.calls == 1
    assert records.peek("acme") is not None


def test_more_changes_than_are_remembered_count_as_a_change_of_everything() -> None:
    records = cache(size=10)
    loader = Loader(record())
    with in_flight(records, "acme", loader):
        for _ in range(11):
            records.forget(uuid4())
    assert loader.calls == 2
    assert not records._meanwhile._changed  # nobody is under way


def test_a_tenant_that_changes_without_end_is_returned_and_not_stored() -> None:
    records = cache()
    looks = 0

    def changing(key: Key) -> TenantRecord:
        nonlocal looks
        looks += 1
        records.forget(ID)
        return record(version=looks)

    assert records.get("acme", changing).tenant.version == looks == MOST_LOOKS
    assert records.peek("acme") is None


@pytest.mark.parametrize("forgotten", [True, False])
def test_a_miss_that_began_before_a_forget_is_not_remembered(forgotten: bool) -> None:
    records = cache()
    with in_flight(records, "acme", Loader(TenantNotFound("acme"))):
        if forgotten:
            records.forget(ID, "acme")
    if forgotten:
        assert records.peek("acme") is None
    else:
        with pytest.raises(TenantNotFound):
            records.peek("acme")


def test_nobody_joins_a_look_up_that_began_before_a_forget() -> None:
    records = cache()
    with in_flight(records, "acme", Loader(record(version=1))) as outcome:
        records.forget(ID)
        assert records.get("acme", lambda key: record(version=2)).tenant.version == 2
    assert [found.tenant.version for found in outcome if isinstance(found, TenantRecord)] == [2]
    cached = records.peek("acme")
    assert cached is not None
    assert cached.tenant.version == 2


@pytest.mark.parametrize("late", [1, 3])
def test_an_older_version_never_replaces_a_newer_one(late: int) -> None:
    records = cache()
    with in_flight(records, "acme", Loader(record(version=late))) as outcome:
        records.get(ID, lambda key: record(version=2))
    cached = records.peek("acme")
    assert cached is not None
    assert cached.tenant.version == max(2, late)
    assert outcome == [cached]


def test_an_expired_newer_version_does_not_block_what_the_database_says_now() -> None:
    clock = Clock()
    records = cache(clock)
    records.get("acme", lambda key: record(version=7))
    clock.now += 5
    assert records.get("acme", lambda key: record(version=3)).tenant.version == 3  # a registry restored from a backup


def stamps(*records: TenantRecord) -> Callable[[Sequence[UUID]], dict[UUID, Stamp]]:
    """What the registry says when it is compared with."""
    return lambda ids: {each.tenant.id: each.stamp for each in records if each.tenant.id in ids}


def never_compared(ids: Sequence[UUID]) -> dict[UUID, Stamp]:
    raise AssertionError(f"{ids} were compared")


def test_what_is_in_use_and_unchanged_is_believed_without_another_look_up() -> None:
    clock = Clock()
    records = cache(clock)
    records.get("acme", lambda key: record())
    for _ in range(10):
        clock.now += 2.5
        assert records.check(stamps(record()), everything=False) == []
        assert records.peek("acme") is not None


def test_what_nobody_uses_is_not_compared_and_expires() -> None:
    clock = Clock()
    records = cache(clock)
    records.get("acme", lambda key: record())
    assert records.check(stamps(record()), everything=False) == []
    clock.now += 2.5
    assert records.check(never_compared, everything=False) == []
    clock.now += 2.5
    assert records.peek("acme") is None


@pytest.mark.parametrize("now", [record(version=2), record(version=0), None], ids=["newer", "restored", "vanished"])
def test_what_is_not_as_it_was_is_forgotten(now: TenantRecord | None) -> None:
    records = cache()
    records.get("acme", lambda key: record(version=1))
    assert records.check(stamps(*[now] if now else []), everything=False) == [ID]
    assert records.peek("acme") is None


def test_a_server_that_was_written_changes_its_tenants_records() -> None:
    records = cache()
    records.get("acme", lambda key: record())
    written = replace(record(), server_written=datetime.now(timezone.utc))
    assert records.check(stamps(written), everything=False) == [ID]


def test_a_comparison_that_fails_has_nothing_believed_for_longer() -> None:
    clock = Clock()
    records = cache(clock)
    records.get("acme", lambda key: record())

    def down(ids: Sequence[UUID]) -> dict[UUID, Stamp]:
        raise RegistryUnavailable("down")

    for _ in range(2):
        clock.now += 2.5
        with pytest.raises(RegistryUnavailable):
            records.check(down, everything=True)
    assert records.peek("acme") is None


def test_a_comparison_counts_from_its_beginning() -> None:
    clock = Clock()
    records = cache(clock)
    records.get("acme", lambda key: record())

    def slow(ids: Sequence[UUID]) -> dict[UUID, Stamp]:
        clock.now += 4
        return stamps(record())(ids)

    records.check(slow, everything=False)
    clock.now += 1
    assert records.peek("acme") is None


@pytest.mark.parametrize("forgotten", [True, False])
def test_a_comparison_that_began_before_a_forget_revives_nothing(forgotten: bool) -> None:
    clock = Clock()
    records = cache(clock)
    records.get("acme", lambda key: record())
    clock.now += 4

    def meanwhile(ids: Sequence[UUID]) -> dict[UUID, Stamp]:
        if forgotten:
            records.forget(ID)
        return stamps(record())(ids)

    records.check(meanwhile, everything=False)
    clock.now += 4
    assert (records.peek("acme") is None) is forgotten


def test_after_notices_were_missed_what_nobody_uses_is_compared_too() -> None:
    records = cache()
    records.get("acme", lambda key: record())
    with pytest.raises(TenantNotFound):
        records.get("nobody", missing)
    records.check(stamps(record()), everything=False)
    assert records.check(stamps(record(version=2)), everything=True) == [ID]
    assert records.peek("nobody") is None


def test_what_is_noted_as_used_is_bounded_where_nobody_compares() -> None:
    records = cache(size=10)
    for number in range(100):
        records.get(f"t{number}", lambda key: record(str(key), id=uuid4()))
    assert len(records._records._used) <= 10
    assert len(records._records) <= 10


@pytest.mark.parametrize("result", [record(), RegistryUnavailable("down"), TenantNotFound("acme")])
def test_all_who_ask_at_once_share_one_look_up_and_its_outcome(result: TenantRecord | Exception) -> None:
    records = cache()
    loader = Loader(result)
    arrived = threading.Barrier(9)

    def ask() -> object:
        arrived.wait(10)
        try:
            return records.get("acme", loader)
        except Exception as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask) for _ in range(8)]
        arrived.wait(10)
        assert loader.began.wait(10)
        loader.go.set()
        outcomes = [answer.result(10) for answer in answers]

    if isinstance(result, RegistryUnavailable):  # not remembered, so whoever came after the landing looked again
        assert all(outcome is result for outcome in outcomes)
    else:
        assert loader.calls == 1
        assert {repr(outcome) for outcome in outcomes} == {repr(result)}


def test_an_interrupted_leader_leaves_the_look_up_to_the_next() -> None:
    flights: SingleFlight[str, str] = SingleFlight()
    flying, interrupt = threading.Event(), threading.Event()
    caught: list[BaseException] = []

    def interrupted() -> str:
        flying.set()
        assert interrupt.wait(10)
        raise KeyboardInterrupt

    def lead() -> None:
        try:
            flights.run("key", interrupted)
        except KeyboardInterrupt as error:
            caught.append(error)

    with ThreadPoolExecutor(2) as pool:
        leader = pool.submit(lead)
        assert flying.wait(10)
        waiter = pool.submit(flights.run, "key", lambda: "mine")
        interrupt.set()
        leader.result(10)
        assert waiter.result(10) == "mine"
    assert len(caught) == 1


class CacheHistory(RuleBasedStateMachine):
    """Random histories against a database of two tenants whose versions grow and whose slugs change hands."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.records = cache(self.clock, size=3)
        self.ids = [uuid4(), uuid4()]
        self.database: dict[UUID, TenantRecord] = {}
        self.changed: dict[UUID, float] = {}  # when a change was last not announced

    def load(self, key: Key) -> TenantRecord:
        for found in self.database.values():
            if key in (found.tenant.id, found.tenant.slug):
                return found
        raise TenantNotFound(str(key))

    @rule(which=st.integers(0, 1), slug=st.sampled_from(["a", "b", "c"]), told=st.booleans())
    def write(self, which: int, slug: str, told: bool) -> None:
        mine = self.ids[which]
        if any(found.tenant.slug == slug for found in self.database.values() if found.tenant.id != mine):
            return
        version = self.database[mine].tenant.version + 1 if mine in self.database else 1
        self.database[mine] = record(slug, id=mine, version=version)
        if told:
            self.records.forget(mine, slug)
            self.changed.pop(mine, None)
        else:
            self.changed[mine] = self.clock.now

    @rule(key=st.sampled_from(["a", "b", "c", 0, 1]))
    def look(self, key: str | int) -> None:
        wanted: Key = self.ids[key] if isinstance(key, int) else key
        try:
            found = self.records.get(wanted, self.load)
        except TenantNotFound:
            return
        assert wanted in (found.tenant.id, found.tenant.slug)

    @rule(everything=st.booleans())
    def compare(self, everything: bool) -> None:
        self.records.check(stamps(*self.database.values()), everything=everything)

    @rule(seconds=st.sampled_from([0.5, 2.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def what_is_served_is_true_or_within_its_time(self) -> None:
        for tenant_id in self.ids:
            try:
                cached = self.records.peek(tenant_id)
            except TenantNotFound:
                assert tenant_id not in self.database or self.clock.now < self.changed.get(tenant_id, float("-inf")) + 5
                continue
            if cached is not None and cached != self.database[tenant_id]:
                assert self.clock.now < self.changed[tenant_id] + 5


CacheHistory.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_random_histories = CacheHistory.TestCase
