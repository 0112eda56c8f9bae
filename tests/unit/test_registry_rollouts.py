"""A rollout is in one worker's hands at a time, no tenant is in two, and what became of each is written down by whoever holds it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, event, insert, select, text, update
from sqlalchemy.exc import IntegrityError

from tenantdb.backends.postgresql import PostgreSQL
from tenantdb.backends.sqlite import SQLite
from tenantdb.context import acting
from tenantdb.errors import MigrationError, RegistryError, RolloutConflict, RolloutNotFound
from tenantdb.model import Tenant, TenantState
from tenantdb.registry import Keyring, Registry, SignUp, tables
from tenantdb.registry.rollouts import Attempt, AttemptState, NewAttempt, Result, Rollout, RolloutState
from tenantdb.settings import ConnectionURL, Settings
from tests.unit.registry_fixtures import KEY
from tests.world import PostgreSQLWorld

MINUTE = timedelta(minutes=1)
ENDED = timedelta(0)  # a lease that is over as soon as it is given
W, D, F = AttemptState.WAITING, AttemptState.DONE, AttemptState.FAILED


@pytest.fixture(params=["sqlite", "postgresql"])
def registry_engines(
    request: pytest.FixtureRequest, registry_url: ConnectionURL, registry_settings: Settings
) -> Iterator[tuple[Engine, Engine]]:
    """On PostgreSQL with the two logins that a registry there has."""
    if request.param == "sqlite":
        backend = SQLite()
        backend.prepare_registry(registry_url)
        engine = backend.registry_engine(registry_url, registry_settings)
        engines = (engine, engine)
    else:
        world: PostgreSQLWorld = request.getfixturevalue("postgresql_world")
        given = world.given(world.make_db(init=False))
        urls = [ConnectionURL.parse(given[name]) for name in ("url", "registry_admin")]
        app, admin = (PostgreSQL().registry_engine(url, registry_settings) for url in urls)
        engines = (app, admin)
    yield engines
    for each in engines:
        each.dispose()


@pytest.fixture
def ids(registry: Registry) -> list[UUID]:
    """Three active tenants at revision 0001: acme, beta, gamma."""
    return tenants(registry, "acme", "beta", "gamma")


def tenants(registry: Registry, *slugs: str | None, state: str = "active", revision: str | None = "0001", **values: object) -> list[UUID]:
    now = tables.utcnow()
    common = {"state": state, "subscription": "trial", "metadata": {}, "version": 1, "generation": 1, "created_at": now, "updated_at": now}
    rows = [{"id": uuid4(), "slug": slug, "name": slug, "revision": revision, **common, **values} for slug in slugs]
    with registry.admin_write() as connection:
        connection.execute(insert(tables.tenants), rows)
    return [row["id"] for row in rows]  # type: ignore[misc]


def entries(ids: Sequence[UUID], *, size: int = 100) -> list[NewAttempt]:
    """Places in waves of ``size``."""
    return [
        NewAttempt(tenant_id=tenant_id, wave=position // size, position=position, from_revision="0001", engine="sql")
        for position, tenant_id in enumerate(ids)
    ]


def planned(registry: Registry, ids: Sequence[UUID], *, target: str | None = "0002", size: int = 100) -> Rollout:
    return registry.rollouts.create(target=target, options={"canary": 1}, entries=entries(ids, size=size))


def claimed(registry: Registry, rollout: Rollout, worker: str = "w1", lease: timedelta = MINUTE) -> Rollout:
    found = registry.rollouts.claim(rollout, worker, lease)
    assert found is not None
    return found


def done(tenant_id: UUID, to: str | None = "0002") -> Result:
    return Result(tenant_id=tenant_id, state=D, from_revision="0001", to_revision=to, seconds=0.5, engine="python")


def attempt(registry: Registry, rollout: Rollout, tenant_id: UUID) -> Attempt:
    return next(each for each in registry.rollouts.attempts(rollout) if each.tenant_id == tenant_id)


def tenant(registry: Registry, tenant_id: UUID) -> Tenant:
    return registry.tenants.row(tenant_id).tenant


# -- planning ------------------------------------------------------------------------------------------------------------------------------


def test_a_rollout_is_written_down_with_all_its_attempts_and_one_entry_in_the_log(registry: Registry, ids: list[UUID]) -> None:
    with acting("ops"):
        rollout = planned(registry, ids, size=2)

    assert registry.rollouts.get(rollout.id) == rollout
    assert (rollout.state, rollout.target, rollout.options, rollout.total) == (RolloutState.PLANNED, "0002", {"canary": 1}, 3)
    found = registry.rollouts.attempts(rollout)
    assert [(each.slug, each.wave, each.position, each.tenant_id) for each in found] == [
        ("acme", 0, 0, ids[0]),
        ("beta", 0, 1, ids[1]),
        ("gamma", 1, 2, ids[2]),
    ]
    assert {(each.state, each.from_revision, each.to_revision, each.engine, each.tries) for each in found} == {(W, "0001", None, "sql", 0)}
    entry = registry.audit.list()[0]
    assert (entry.action, entry.object, entry.actor) == ("rollout.begin", str(rollout.id), "ops")
    assert entry.details == {"target": "0002", "tenants": 3}


def test_a_rollout_to_before_the_first_revision_has_no_target(registry: Registry, ids: list[UUID]) -> None:
    rollout = planned(registry, ids, target=None)

    assert rollout.target is None
    assert registry.rollouts.get(rollout.id).target is None


def test_more_tenants_than_one_statement_takes_are_written_down_at_once(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenantdb.registry.rollouts._PAGE", 40)
    rollout = planned(registry, tenants(registry, *(f"t-{number:03}" for number in range(100))))

    assert registry.rollouts.counts(rollout) == {W: 100}
    assert [each.position for each in registry.rollouts.attempts(rollout, after=96)] == [97, 98, 99]


def test_a_rollout_of_a_tenant_that_is_not_there_is_not_written_down(registry: Registry, ids: list[UUID]) -> None:
    with pytest.raises(IntegrityError):
        planned(registry, [*ids, uuid4()])
    assert registry.rollouts.list() == []


def test_the_newest_rollout_is_found_without_an_id(registry: Registry, ids: list[UUID]) -> None:
    with pytest.raises(RolloutNotFound):
        registry.rollouts.get()
    with pytest.raises(RolloutNotFound):
        registry.rollouts.get(uuid4())
    made = [planned(registry, [each]) for each in ids]

    assert registry.rollouts.get() == made[-1]
    assert registry.rollouts.list(limit=2) == made[:0:-1]


@pytest.mark.parametrize("state", [RolloutState.PLANNED, RolloutState.RUNNING, RolloutState.PAUSED, RolloutState.HALTED])
def test_a_tenant_is_in_one_rollout_at_a_time(registry: Registry, ids: list[UUID], state: RolloutState) -> None:
    first = planned(registry, ids[:2])
    if state is not RolloutState.PLANNED:
        claimed(registry, first)
    if state in (RolloutState.PAUSED, RolloutState.HALTED):
        registry.rollouts.finish(first, "w1", state)

    with pytest.raises(RolloutConflict) as caught:
        planned(registry, ids)

    assert caught.value.args == (str(first.id), ("acme", "beta"))
    assert registry.rollouts.list() == [registry.rollouts.get(first.id)]
    assert planned(registry, ids[2:]).total == 1  # who is in none may be in one


def test_a_conflict_names_three_tenants_at_most(registry: Registry) -> None:
    many = tenants(registry, "e", "d", "c", "b", "a")
    planned(registry, many)
    with pytest.raises(RolloutConflict) as caught:
        planned(registry, many[::-1])
    assert caught.value.tenants == ("e", "d", "c")


@pytest.mark.parametrize("state", [AttemptState.DONE, AttemptState.FAILED, AttemptState.SKIPPED])
def test_what_a_rollout_has_finished_with_is_free_for_another(registry: Registry, ids: list[UUID], state: AttemptState) -> None:
    rollout = claimed(registry, planned(registry, ids[:2]))
    registry.rollouts.settle(rollout, "w1", [Result(tenant_id=ids[0], state=state)])

    assert planned(registry, [ids[0]]).total == 1
    with pytest.raises(RolloutConflict):
        planned(registry, [ids[1]])
    registry.rollouts.finish(rollout, "w1", RolloutState.DONE)
    assert planned(registry, [ids[1]]).total == 1


def test_of_two_who_plan_at_once_one_is_refused(registry: Registry, ids: list[UUID]) -> None:
    barrier = threading.Barrier(4)

    def plan() -> bool:
        barrier.wait(10)
        try:
            planned(registry, ids)
        except RolloutConflict:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        outcomes = [each.result(60) for each in [pool.submit(plan) for _ in range(4)]]
    assert sorted(outcomes) == [False, False, False, True]


# -- who is at it --------------------------------------------------------------------------------------------------------------------------


def test_a_rollout_is_one_workers_until_its_lease_ends(registry: Registry, ids: list[UUID]) -> None:
    rollout = planned(registry, ids)
    first = claimed(registry, rollout)
    assert (first.state, first.worker) == (RolloutState.RUNNING, "w1")
    assert registry.rollouts.claim(rollout, "w2", MINUTE) is None
    assert registry.rollouts.renew(rollout, "w1", ENDED)
    assert claimed(registry, rollout, "w2").worker == "w2"
    assert not registry.rollouts.renew(rollout, "w1", MINUTE)
    assert registry.rollouts.claim(rollout, "w3", MINUTE, dead=["w1"]) is None
    taken = registry.rollouts.claim(rollout, "w3", MINUTE, dead=["w1", "w2"])
    assert taken is not None
    assert taken.worker == "w3"


def test_of_many_who_claim_at_once_one_gets_it(registry: Registry, ids: list[UUID]) -> None:
    rollout = planned(registry, ids)
    barrier = threading.Barrier(4)

    def claim(number: int) -> Rollout | None:
        barrier.wait(10)
        return registry.rollouts.claim(rollout, f"w{number}", MINUTE)

    with ThreadPoolExecutor(4) as pool:
        found = [each.result(60) for each in [pool.submit(claim, number) for number in range(4)]]
    assert len([each for each in found if each is not None]) == 1


def test_one_that_is_written_down_by_who_runs_it_is_claimed_already(registry: Registry, ids: list[UUID]) -> None:
    entries = [NewAttempt(tenant_id=ids[0], wave=0, position=0)]

    rollout = registry.rollouts.create(target="2", options={}, entries=entries, worker="w1", lease=MINUTE)

    assert rollout == registry.rollouts.get(rollout.id)
    assert (rollout.state, rollout.worker) == (RolloutState.RUNNING, "w1")
    assert registry.rollouts.claim(rollout, "w2", MINUTE) is None
    assert registry.rollouts.renew(rollout, "w1", MINUTE)


def test_whoever_takes_over_finds_what_was_under_way_waiting(registry: Registry, ids: list[UUID]) -> None:
    rollout = planned(registry, ids)
    claimed(registry, rollout)
    assert set(registry.rollouts.begin(rollout, "w1", ids[:2])) == set(ids[:2])
    registry.rollouts.settle(rollout, "w1", [done(ids[0])])
    registry.rollouts.renew(rollout, "w1", ENDED)

    claimed(registry, rollout, "w2")

    assert [each.slug for each in registry.rollouts.waiting(rollout, limit=10)] == ["beta", "gamma"]
    beta = attempt(registry, rollout, ids[1])
    assert (beta.worker, beta.started_at, beta.tries) == (None, None, 1)


def test_a_worker_that_was_taken_over_writes_nothing_more(registry: Registry, ids: list[UUID]) -> None:
    rollout = planned(registry, ids)
    claimed(registry, rollout)
    registry.rollouts.begin(rollout, "w1", ids[:1])
    registry.rollouts.renew(rollout, "w1", ENDED)
    claimed(registry, rollout, "w2")
    before = registry.rollouts.attempts(rollout)

    assert registry.rollouts.begin(rollout, "w1", ids) == []
    assert registry.rollouts.settle(rollout, "w1", [done(each) for each in ids]) == []
    assert registry.rollouts.finish(rollout, "w1", RolloutState.DONE).worker == "w2"

    assert registry.rollouts.attempts(rollout) == before
    assert tenant(registry, ids[0]).revision == "0001"
    assert registry.rollouts.get(rollout.id).state is RolloutState.RUNNING
    assert len(registry.rollouts.settle(rollout, "w2", [done(each) for each in ids])) == 3  # the twin


@pytest.mark.parametrize("write", ["begin", "settle"])
@pytest.mark.parametrize("registry_engines", ["postgresql"], indirect=True)
def test_a_write_that_meets_the_taking_over_waits_and_comes_to_nothing(registry: Registry, ids: list[UUID], write: str) -> None:
    rollout = claimed(registry, planned(registry, ids))
    with ThreadPoolExecutor(1) as pool:
        with registry.admin_write() as connection:
            connection.execute(update(tables.rollouts).values(worker="w2"))
            if write == "begin":
                late = pool.submit(registry.rollouts.begin, rollout, "w1", ids)
            else:
                late = pool.submit(registry.rollouts.settle, rollout, "w1", [done(each) for each in ids])
            blocked = text("SELECT count(*) FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))")
            give_up = time.monotonic() + 30
            while not connection.scalar(blocked):
                assert time.monotonic() < give_up
        assert late.result(30) == []
    assert registry.rollouts.counts(rollout) == {W: 3}


def test_a_rollout_ends_with_an_entry_of_what_it_came_to(registry: Registry, ids: list[UUID]) -> None:
    rollout = claimed(registry, planned(registry, ids))
    registry.rollouts.settle(rollout, "w1", [done(ids[0]), done(ids[1]), Result(tenant_id=ids[2], state=F, error="boom")])

    ended = registry.rollouts.finish(rollout, "w1", RolloutState.DONE)

    assert (ended.state, ended.worker, ended.lease_until) == (RolloutState.DONE, None, None)
    assert ended.finished_at is not None
    assert registry.rollouts.claim(rollout, "w2", MINUTE) is None
    entries = registry.audit.list()
    assert [entry.action for entry in entries] == ["rollout.end", "rollout.begin"]
    assert (entries[0].outcome, entries[0].details) == ("done", {"target": "0002", "done": 2, "failed": 1})
    assert registry.audit.verify().ok


def test_a_halted_rollout_says_why_until_it_goes_on(registry: Registry, ids: list[UUID]) -> None:
    rollout = claimed(registry, planned(registry, ids))
    registry.rollouts.begin(rollout, "w1", ids[:1])
    halted = registry.rollouts.finish(rollout, "w1", RolloutState.HALTED, "5 of 3 \x00 failed")
    assert (halted.state, halted.error, halted.finished_at) == (RolloutState.HALTED, "5 of 3 \ufffd failed", None)
    assert registry.rollouts.counts(rollout) == {W: 3}
    assert claimed(registry, rollout, "w2").error is None


@pytest.mark.parametrize("state", [RolloutState.PAUSED, RolloutState.CANCELLED])
def test_what_is_asked_of_a_rollout_that_nobody_runs_is_so_at_once(registry: Registry, ids: list[UUID], state: RolloutState) -> None:
    rollout = planned(registry, ids)

    found = registry.rollouts.ask(rollout, state)

    assert found.state is state
    assert (found.finished_at is None) == (state is RolloutState.PAUSED)
    assert (registry.rollouts.claim(rollout, "w1", MINUTE) is None) == (state is RolloutState.CANCELLED)
    assert registry.audit.list()[0].action == f"rollout.{'pause' if state is RolloutState.PAUSED else 'cancel'}"


@pytest.mark.parametrize("state", [RolloutState.PAUSED, RolloutState.CANCELLED])
def test_whoever_runs_what_is_to_stop_begins_nothing_more_and_settles_what_is_under_way(
    registry: Registry, ids: list[UUID], state: RolloutState
) -> None:
    rollout = claimed(registry, planned(registry, ids))
    registry.rollouts.begin(rollout, "w1", ids[:1])

    asked = registry.rollouts.ask(rollout, state)

    assert (asked.state, asked.worker, asked.finished_at) == (state, "w1", None)
    assert not registry.rollouts.renew(rollout, "w1", MINUTE)
    assert registry.rollouts.begin(rollout, "w1", ids[1:]) == []
    assert registry.rollouts.claim(rollout, "w2", MINUTE) is None  # while the first one is finishing
    with pytest.raises(RolloutConflict):
        planned(registry, ids)
    assert registry.rollouts.settle(rollout, "w1", [done(ids[0])]) == ids[:1]
    ended = registry.rollouts.finish(rollout, "w1", RolloutState.PAUSED)
    assert ended.state is state
    assert (registry.rollouts.claim(rollout, "w2", MINUTE) is None) == (state is RolloutState.CANCELLED)
    assert registry.rollouts.counts(rollout) == {D: 1, W: 2}


def test_a_cancelled_rollout_is_in_nobodys_way_when_its_worker_has_died(registry: Registry, ids: list[UUID]) -> None:
    rollout = claimed(registry, planned(registry, ids))
    registry.rollouts.begin(rollout, "w1", ids)
    registry.rollouts.ask(rollout, RolloutState.CANCELLED)
    assert not registry.rollouts.renew(rollout, "w1", ENDED)
    assert planned(registry, ids).total == 3


def test_what_a_dead_worker_held_can_be_cancelled_at_once(registry: Registry, ids: list[UUID]) -> None:
    rollout = claimed(registry, planned(registry, ids))
    registry.rollouts.begin(rollout, "w1", ids)

    found = registry.rollouts.ask(rollout, RolloutState.CANCELLED, dead=["w1"])

    assert (found.state, found.worker) == (RolloutState.CANCELLED, None)
    assert registry.rollouts.counts(rollout) == {W: 3}


def test_a_rollout_that_has_ended_is_neither_paused_nor_cancelled(registry: Registry, ids: list[UUID]) -> None:
    rollout = claimed(registry, planned(registry, ids))
    registry.rollouts.finish(rollout, "w1", RolloutState.DONE)
    with pytest.raises(MigrationError, match="it is done"):
        registry.rollouts.ask(rollout, RolloutState.CANCELLED)
    with pytest.raises(RolloutNotFound):
        registry.rollouts.ask(planned_nowhere(rollout), RolloutState.PAUSED)


def planned_nowhere(rollout: Rollout) -> Rollout:
    return Rollout(
        id=uuid4(), target="0002", state=RolloutState.PLANNED, total=0, created_at=rollout.created_at, updated_at=rollout.updated_at
    )


def test_a_halted_rollout_stays_halted_where_it_is_to_pause(registry: Registry, ids: list[UUID]) -> None:
    rollout = claimed(registry, planned(registry, ids))
    registry.rollouts.finish(rollout, "w1", RolloutState.HALTED, "too many failed")
    found = registry.rollouts.ask(rollout, RolloutState.PAUSED)
    assert (found.state, found.error) == (RolloutState.HALTED, "too many failed")


def test_what_was_asked_stands_unless_everything_is_done(registry: Registry, ids: list[UUID]) -> None:
    rollout = claimed(registry, planned(registry, ids))
    registry.rollouts.ask(rollout, RolloutState.CANCELLED)
    assert registry.rollouts.finish(rollout, "w1", RolloutState.HALTED, "boom").state is RolloutState.CANCELLED
    another = claimed(registry, planned(registry, ids))
    registry.rollouts.ask(another, RolloutState.CANCELLED)
    assert registry.rollouts.finish(another, "w1", RolloutState.DONE).state is RolloutState.DONE


# -- failed ones again ---------------------------------------------------------------------------------------------------------------------


def test_only_the_failed_are_tried_again(registry: Registry, ids: list[UUID]) -> None:
    rollout = claimed(registry, planned(registry, ids))
    skipped = Result(tenant_id=ids[2], state=AttemptState.SKIPPED)
    failed = Result(tenant_id=ids[1], state=F, error="boom", sqlstate="42P07")
    registry.rollouts.settle(rollout, "w1", [done(ids[0]), failed, skipped])
    with pytest.raises(MigrationError, match="somebody runs"):
        registry.rollouts.retry_failed(rollout)
    registry.rollouts.finish(rollout, "w1", RolloutState.DONE)

    assert registry.rollouts.retry_failed(rollout) == 1

    found = registry.rollouts.get(rollout.id)
    assert (found.state, found.finished_at) == (RolloutState.PLANNED, None)
    assert [each.tenant_id for each in registry.rollouts.waiting(rollout, limit=10)] == [ids[1]]
    assert registry.rollouts.retry_failed(rollout) == 0
    assert claimed(registry, rollout, "w2").state is RolloutState.RUNNING
    registry.rollouts.settle(rollout, "w2", [done(ids[1])])
    beta = attempt(registry, rollout, ids[1])
    assert (beta.state, beta.tries, beta.error, beta.sqlstate, beta.worker) == (D, 2, None, None, "w2")


def test_nothing_failed_leaves_a_rollout_as_it_is(registry: Registry, ids: list[UUID]) -> None:
    rollout = claimed(registry, planned(registry, ids))
    ended = registry.rollouts.finish(rollout, "w1", RolloutState.DONE)
    assert registry.rollouts.retry_failed(rollout) == 0
    assert registry.rollouts.get(rollout.id) == ended


def test_a_failed_tenant_that_another_rollout_has_is_not_tried_again(registry: Registry, ids: list[UUID]) -> None:
    rollout = claimed(registry, planned(registry, ids))
    registry.rollouts.settle(rollout, "w1", [Result(tenant_id=each, state=F) for each in ids])
    registry.rollouts.finish(rollout, "w1", RolloutState.DONE)
    another = planned(registry, ids[1:2], target="0003")

    with pytest.raises(RolloutConflict) as caught:
        registry.rollouts.retry_failed(rollout)

    assert caught.value.args == (str(another.id), ("beta",))
    assert registry.rollouts.counts(rollout) == {F: 3}
    assert registry.rollouts.get(rollout.id).state is RolloutState.DONE


def test_a_cancelled_rollout_is_not_tried_again(registry: Registry, ids: list[UUID]) -> None:
    rollout = planned(registry, ids)
    registry.rollouts.ask(rollout, RolloutState.CANCELLED)
    with pytest.raises(MigrationError, match="cancelled"):
        registry.rollouts.retry_failed(rollout)


def test_the_failures_of_a_rollout_whose_worker_died_can_be_tried_again_at_once(registry: Registry, ids: list[UUID]) -> None:
    rollout = claimed(registry, planned(registry, ids))
    registry.rollouts.settle(rollout, "w1", [Result(tenant_id=ids[0], state=F)])
    registry.rollouts.begin(rollout, "w1", ids[1:])
    assert registry.rollouts.retry_failed(rollout, dead=["w1"]) == 1
    assert registry.rollouts.counts(rollout) == {W: 3}
    assert registry.rollouts.settle(rollout, "w1", [done(ids[0])]) == []


# -- one tenant after the other ------------------------------------------------------------------------------------------------------------


def test_those_that_wait_come_in_order_by_wave_and_in_pages(registry: Registry) -> None:
    ids = tenants(registry, *"fedcba")
    rollout = claimed(registry, planned(registry, ids, size=4))
    store = registry.rollouts

    def slugs(**given: int | None) -> list[str]:
        return [each.slug for each in store.waiting(rollout, **{"limit": 10, **given})]  # type: ignore[arg-type]

    assert slugs(wave=None) == [*"fedcba"]
    assert slugs(wave=0) == [*"fedc"]
    assert slugs(wave=1) == [*"ba"]
    assert slugs(wave=0, limit=2) == [*"fe"]
    assert slugs(wave=0, limit=2, after=1) == [*"dc"]
    store.begin(rollout, "w1", ids[1:3])
    assert slugs(wave=0) == [*"fc"]
    assert store.wave_counts(rollout) == {0: {W: 2, AttemptState.RUNNING: 2}, 1: {W: 2}}
    assert list(store.wave_counts(rollout)) == [0, 1]
    assert store.counts(rollout) == {W: 4, AttemptState.RUNNING: 2}


def test_nobody_is_begun_twice(registry: Registry, ids: list[UUID]) -> None:
    rollout = claimed(registry, planned(registry, ids[:2]))
    assert set(registry.rollouts.begin(rollout, "w1", ids[:2])) == set(ids[:2])
    assert registry.rollouts.begin(rollout, "w1", ids) == []
    assert registry.rollouts.begin(rollout, "w1", []) == []
    found = attempt(registry, rollout, ids[0])
    assert (found.state, found.tries, found.worker) == (AttemptState.RUNNING, 1, "w1")
    assert found.started_at is not None


def test_what_became_of_tenants_is_written_down_with_their_revisions_and_without_entries(registry: Registry, ids: list[UUID]) -> None:
    rollout = claimed(registry, planned(registry, ids))
    registry.rollouts.begin(rollout, "w1", ids[:2])
    before = [tenant(registry, each) for each in ids]
    now = datetime(2031, 1, 1, tzinfo=timezone.utc)
    failed = Result(tenant_id=ids[1], state=F, error="lock \x00 \ud800", sqlstate="55P03", seconds=2.25, engine="sql")

    settled = registry.rollouts.settle(rollout, "w1", [done(ids[0]), failed], lambda: now)

    assert set(settled) == set(ids[:2])
    first, second, third = registry.rollouts.attempts(rollout)
    assert (first.state, first.from_revision, first.to_revision, first.engine, first.seconds, first.tries) == (
        D,
        "0001",
        "0002",
        "python",
        0.5,
        1,
    )
    assert (first.finished_at, first.error, first.sqlstate, first.worker) == (now, None, None, "w1")
    assert (second.state, second.error, second.sqlstate, second.seconds) == (F, "lock \ufffd ?", "55P03", 2.25)
    assert (second.from_revision, second.to_revision, second.engine) == ("0001", None, "sql")
    assert third.state is W
    moved, failed_one, _ = [tenant(registry, each) for each in ids]
    assert (moved.revision, moved.version, moved.updated_at) == ("0002", before[0].version + 1, now)
    assert moved.generation == before[0].generation + 1
    assert failed_one == before[1]
    assert [entry.action for entry in registry.audit.list()] == ["rollout.begin"]


def test_a_tenant_that_was_never_begun_can_be_settled(registry: Registry, ids: list[UUID]) -> None:
    rollout = claimed(registry, planned(registry, ids))
    registry.rollouts.settle(rollout, "w1", [done(ids[0]), Result(tenant_id=ids[1], state=AttemptState.SKIPPED, error="purged")])
    first, second, _ = registry.rollouts.attempts(rollout)
    assert (first.state, first.tries, first.started_at is None) == (D, 1, False)
    assert (second.state, second.tries, second.error) == (AttemptState.SKIPPED, 0, "purged")


def test_settling_again_changes_nothing(registry: Registry, ids: list[UUID]) -> None:
    rollout = claimed(registry, planned(registry, ids))
    registry.rollouts.settle(rollout, "w1", [done(ids[0])])
    before = registry.rollouts.attempts(rollout), tenant(registry, ids[0])
    assert registry.rollouts.settle(rollout, "w1", [done(ids[0], "0003")]) == []
    assert registry.rollouts.settle(rollout, "w1", []) == []
    assert (registry.rollouts.attempts(rollout), tenant(registry, ids[0])) == before


def test_what_is_put_back_waits_with_what_it_stopped_at(registry: Registry, ids: list[UUID]) -> None:
    rollout = claimed(registry, planned(registry, ids))
    registry.rollouts.begin(rollout, "w1", ids[:1])
    registry.rollouts.settle(rollout, "w1", [Result(tenant_id=ids[0], state=F, error="locked", sqlstate="55P03", requeue=True)])
    found = registry.rollouts.waiting(rollout, limit=1)[0]
    assert (found.tenant_id, found.tries, found.error, found.finished_at) == (ids[0], 1, "locked", None)
    registry.rollouts.begin(rollout, "w1", ids[:1])
    registry.rollouts.settle(rollout, "w1", [done(ids[0])])
    found = attempt(registry, rollout, ids[0])
    assert (found.state, found.tries, found.error) == (D, 2, None)


@pytest.mark.parametrize(
    ("result", "recorded"),
    [
        ({"state": D, "to_revision": None}, None),  # brought to before the first
        ({"state": F, "to_revision": None}, "0001"),  # nobody knows where it is
        ({"state": F, "to_revision": "0002"}, "0002"),  # the second of two migrations failed
        ({"state": F, "to_revision": "0002", "requeue": True}, "0002"),
        ({"state": D, "to_revision": "0001"}, "0001"),
    ],
)
def test_the_recorded_revision_follows_what_is_known(
    registry: Registry, ids: list[UUID], result: dict[str, object], recorded: str | None
) -> None:
    rollout = claimed(registry, planned(registry, ids))
    registry.rollouts.settle(rollout, "w1", [Result(tenant_id=ids[0], **result)])  # type: ignore[arg-type]
    found = tenant(registry, ids[0])
    assert found.revision == recorded
    assert found.version == (1 if recorded == "0001" else 2)
    assert attempt(registry, rollout, ids[0]).to_revision == result["to_revision"]


def test_this_process_serves_no_old_record_of_a_tenant_that_was_migrated(registry: Registry, ids: list[UUID]) -> None:
    rollout = claimed(registry, planned(registry, ids))
    assert [registry.lookup(slug).tenant.revision for slug in ("acme", "beta")] == ["0001", "0001"]
    registry.rollouts.settle(rollout, "w1", [done(ids[0])])
    assert registry.lookup("acme").tenant.revision == "0002"
    assert registry.peek("beta") is not None


def test_two_batches_and_a_rotation_in_the_other_order_do_not_wait_for_each_other(registry: Registry) -> None:
    ids = sorted(tenants(registry, *(f"t-{number:02}" for number in range(60))))
    first = claimed(registry, planned(registry, ids[::2]))
    second = claimed(registry, planned(registry, ids[1::2]), "w2")
    locked = select(tables.tenants.c.id).order_by(tables.tenants.c.id).with_for_update()

    def lock_all() -> None:
        with registry.admin_write() as connection:
            connection.execute(locked).all()

    def settle(rollout: Rollout, worker: str, mine: list[UUID]) -> None:
        for start in range(0, len(mine), 10):
            registry.rollouts.settle(rollout, worker, [done(each) for each in reversed(mine[start : start + 10])])

    with ThreadPoolExecutor(6) as pool:
        work = [pool.submit(settle, first, "w1", ids[::2]), pool.submit(settle, second, "w2", ids[1::2])]
        work += [pool.submit(lock_all) for _ in range(8)]
        for each in work:
            each.result(60)
    assert registry.rollouts.fleet() == [(None, TenantState.ACTIVE, "0002", 60)]


def test_attempts_are_listed_by_state_and_by_their_time(registry: Registry, ids: list[UUID]) -> None:
    rollout = claimed(registry, planned(registry, ids))
    results = [
        Result(tenant_id=each, state=state, seconds=took) for each, state, took in zip(ids, (D, F, D), (0.5, 1.5, None), strict=True)
    ]
    registry.rollouts.settle(rollout, "w1", results)
    store = registry.rollouts
    assert [each.slug for each in store.attempts(rollout, state=D)] == ["acme", "gamma"]
    assert [each.slug for each in store.attempts(rollout, state=D, after=0)] == ["gamma"]
    assert [each.slug for each in store.attempts(rollout, limit=2)] == ["acme", "beta"]
    assert [(each.slug, each.seconds) for each in store.attempts(rollout, slowest=True)] == [("beta", 1.5), ("acme", 0.5)]
    assert [each.slug for each in store.attempts(rollout, slowest=True, limit=1)] == ["beta"]


def test_a_spare_and_a_purged_tenant_go_by_their_ids(registry: Registry) -> None:
    (spare,) = tenants(registry, None, state="spare", ready_at=tables.utcnow())
    rollout = planned(registry, [spare])
    assert registry.rollouts.attempts(rollout)[0].slug == str(spare)
    with pytest.raises(RolloutConflict) as caught:
        planned(registry, [spare])
    assert caught.value.tenants == (str(spare),)


def test_tenants_that_came_while_it_ran_make_one_more_wave(registry: Registry, ids: list[UUID]) -> None:
    rollout = claimed(registry, planned(registry, ids, size=2))
    late = tenants(registry, "late", "later", revision=None)
    added: list[tuple[UUID, str | None]] = [(ids[0], "0001"), (late[0], None), (late[1], "0001")]

    assert registry.rollouts.add(rollout, added) == 2

    assert [(each.slug, each.wave, each.position, each.from_revision) for each in registry.rollouts.attempts(rollout, after=2)] == [
        ("late", 2, 3, None),
        ("later", 2, 4, "0001"),
    ]
    assert registry.rollouts.get(rollout.id).total == 5
    assert registry.rollouts.add(rollout, added) == 0
    assert registry.rollouts.add(rollout, []) == 0


def test_a_tenant_that_another_rollout_has_is_not_added(registry: Registry, ids: list[UUID]) -> None:
    other, rollout = planned(registry, ids[:1]), planned(registry, ids[1:2])
    with pytest.raises(RolloutConflict) as caught:
        registry.rollouts.add(rollout, [(ids[0], "0001"), (ids[2], "0001")])
    assert caught.value.args == (str(other.id), ("acme",))
    assert registry.rollouts.counts(rollout) == {W: 1}
    assert registry.rollouts.get(rollout.id).total == 1


def test_what_is_left_is_counted_by_where_it_starts(registry: Registry, ids: list[UUID]) -> None:
    rollout = claimed(registry, planned(registry, ids))
    registry.rollouts.add(rollout, [(each, None) for each in tenants(registry, "late", revision=None)])
    registry.rollouts.begin(rollout, "w1", ids[:1])
    registry.rollouts.settle(rollout, "w1", [done(ids[1])])
    assert registry.rollouts.starts(rollout) == {"0001": 2, None: 1}


@pytest.mark.parametrize("registry_engines", ["sqlite"], indirect=True)
def test_a_batch_costs_sqlite_the_same_in_a_large_rollout(
    registry: Registry, registry_engines: tuple[Engine, Engine], ids: list[UUID]
) -> None:
    """Or each row of the rollout is compared with each of the batch, and 20,000 tenants take minutes."""
    rollout = claimed(registry, planned(registry, ids))
    sent: list[tuple[str, object]] = []
    event.listen(registry_engines[1], "before_cursor_execute", lambda _c, _u, statement, given, *_: sent.append((statement, given)))
    registry.rollouts.begin(rollout, "w1", ids)
    registry.rollouts.settle(rollout, "w1", [done(each) for each in ids])
    updates = [each for each in sent if each[0].startswith(f"UPDATE {tables.rollout_attempts.name}")]
    assert len(updates) == 2
    with registry.admin_write() as connection:
        for statement, given in updates:
            steps = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", given)]
            assert [step for step in steps if "tenantdb_rollout_attempts" in step and "(rollout_id=? AND tenant_id=?)" in step], steps


# -- the fleet -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def town(registry: Registry) -> Callable[..., list[str]]:
    """A tenant of each state at 0001, named after it, two at other revisions, and a way to ask for candidates by slug."""
    server = registry.servers.add("main", backend="postgresql", host="db1", port=5432)
    for state in TenantState:
        if state not in (TenantState.SPARE, TenantState.PURGED):
            tenants(registry, str(state), state=str(state), server_id=server.id)
    tenants(registry, None, state="purged", revision=None)
    tenants(registry, None, state="spare")
    tenants(registry, None, state="spare", ready_at=tables.utcnow())
    tenants(registry, "ahead", revision="0002", server_id=server.id)
    tenants(registry, "base", revision=None)

    def candidates(target: str | None = "0002", **given: object) -> list[str]:
        found = registry.rollouts.candidates(target=target, **{"limit": 100, **given})  # type: ignore[arg-type]
        assert found == sorted(found, key=lambda each: each.id)
        return sorted("spare" if each.state is TenantState.SPARE else each.slug for each in found)

    return candidates


def test_the_living_who_are_not_at_the_target_are_candidates(town: Callable[..., list[str]]) -> None:
    everybody = ["active", "ahead", "base", "maintenance", "spare", "suspended"]
    assert town() == [each for each in everybody if each != "ahead"]
    assert town(None) == [each for each in everybody if each != "base"]
    assert town(including_at_target=True) == everybody


def test_a_selection_is_what_it_names_and_an_empty_one_is_nobody(town: Callable[..., list[str]]) -> None:
    assert town(slugs=["active", "base", "ahead", "deleted", "nobody"]) == ["active", "base"]
    assert town(slugs=["ahead"], including_at_target=True) == ["ahead"]
    assert town(slugs=[]) == []
    assert town(slugs=["active", *(f"t-{number}" for number in range(70_000))]) == ["active"]  # more than a statement has parameters


def test_candidates_come_in_pages_with_what_is_recorded(registry: Registry, town: Callable[..., list[str]]) -> None:
    pages, after = [], None
    while page := registry.rollouts.candidates(target="0002", limit=2, after=after):
        pages.append(page)
        after = page[-1].id
    assert [len(page) for page in pages] == [2, 2, 1]
    found = {each.slug: (each.server, each.state, each.revision) for page in pages for each in page}
    assert found["active"] == ("main", TenantState.ACTIVE, "0001")
    assert found["base"] == (None, TenantState.ACTIVE, None)


def test_the_fleet_is_counted_by_server_state_and_revision(registry: Registry, town: Callable[..., list[str]]) -> None:
    counted = {(server, state, revision): count for server, state, revision, count in registry.rollouts.fleet()}
    assert counted[None, TenantState.SPARE, "0001"] == 2
    assert counted["main", TenantState.ACTIVE, "0001"] == 1
    assert counted["main", TenantState.ACTIVE, "0002"] == 1
    assert counted[None, TenantState.ACTIVE, None] == 1
    assert counted["main", TenantState.DELETED, "0001"] == 1
    assert sum(counted.values()) == len(TenantState) + 2
    assert TenantState.PURGED not in {state for _, state, _ in counted}


@pytest.mark.parametrize("registry_engines", ["postgresql"], indirect=True)
def test_the_serving_login_sees_where_the_fleet_is_and_nothing_of_rollouts(
    registry: Registry, registry_engines: tuple[Engine, Engine], registry_settings: Settings, ids: list[UUID]
) -> None:
    rollout = planned(registry, ids)
    app = registry_engines[0]
    web = Registry(app, app, registry_settings, Keyring([KEY]))
    assert web.rollouts.fleet() == [(None, TenantState.ACTIVE, "0001", 3)]
    assert len(web.rollouts.candidates(target="0002", limit=10)) == 3
    for forbidden in (
        lambda: web.rollouts.get(rollout.id),
        lambda: web.rollouts.attempts(rollout),
        lambda: web.rollouts.claim(rollout, "w1", MINUTE),
        lambda: web.rollouts.ask(rollout, RolloutState.CANCELLED),
        lambda: planned(web, ids),
    ):
        with pytest.raises(RegistryError, match="registry_admin"):
            forbidden()


def test_a_tenant_that_has_signed_up_is_a_candidate_when_it_is_made(registry: Registry) -> None:
    signed_up, _ = registry.sign_up(SignUp(slug="acme"))
    assert registry.rollouts.candidates(target="0002", limit=10) == []
    registry.tenants.transition(signed_up, TenantState.ACTIVE, action="tenant.activate")
    assert [each.slug for each in registry.rollouts.candidates(target="0002", limit=10)] == ["acme"]
