"""Whoever signs up in a loop, on PostgreSQL: beyond a limit no database, no role and no row is made, whatever he tries at once."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, insert, select

from tenantdb import Tenant, TenantDB, errors
from tenantdb.context import Actor, acting
from tenantdb.model import NewUser, TenantState
from tenantdb.registry import rates, tables
from tests.integration.cluster import Cluster

pytestmark = pytest.mark.usefixtures("cheap_hashing")
OpenDB = Callable[..., TenantDB]
DDL = re.compile(r"\b(?:CREATE|ALTER|DROP|GRANT|REVOKE)\b")
WRITTEN = (tables.tenants, tables.users, tables.memberships, tables.operations)


@contextmanager
def stranger(source: str = "203.0.113.7") -> Iterator[None]:
    with acting("anonymous", None, source):
        yield


def counts(db: TenantDB) -> list[int]:
    with db._registry.read() as connection:
        return [connection.scalars(select(func.count()).select_from(table)).one() for table in WRITTEN]


def sign_up(db: TenantDB, number: int, source: str = "203.0.113.7") -> Tenant | None:
    """A stranger's sign-up; None where he is refused."""
    with stranger(source):
        try:
            return db.provision(f"t-{number}", owner=NewUser(email=f"u{number}@example.org", password="correct horse battery"))
        except errors.RateLimited:
            return None


def crowd(size: int, work: Callable[[int], Any]) -> list[Any]:
    """``work`` for each number, all at once."""
    ready = threading.Barrier(size)

    def come(number: int) -> Any:
        ready.wait()
        return work(number)

    with ThreadPoolExecutor(size) as executor:
        return list(executor.map(come, range(size)))


def test_a_flood_of_sign_ups_makes_no_database_beyond_the_limit_and_sends_no_ddl(cluster: Cluster, open_db: OpenDB) -> None:
    db = open_db(signups_per_actor=2)
    assert [sign_up(db, number) is not None for number in range(2)] == [True, True]
    before = cluster.databases(), cluster.roles(), counts(db)
    log = cluster.server.log.stat().st_size

    refused = crowd(12, lambda number: sign_up(db, 100 + number))

    assert refused == [None] * 12
    assert (cluster.databases(), cluster.roles(), counts(db)) == before
    said = cluster.server.log.read_text(errors="replace")[log:]
    assert "tenantdb_rates" in said  # it is this log
    assert not DDL.search(said)


def test_without_the_limit_the_same_flood_makes_databases(cluster: Cluster, open_db: OpenDB, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "is_limited", lambda actor: False)
    db = open_db(signups_per_actor=2)
    before = cluster.databases()
    log = cluster.server.log.stat().st_size
    assert all(sign_up(db, number) for number in range(4))
    assert len(cluster.databases() - before) >= 4
    assert DDL.search(cluster.server.log.read_text(errors="replace")[log:])


@pytest.fixture
def web(cluster: Cluster, registry: str) -> Iterator[Callable[..., TenantDB]]:
    """Makes serving processes without a provisioner: what they sign up waits for a worker."""
    made: list[TenantDB] = []

    def make(**limits: int) -> TenantDB:
        made.append(cluster.tenantdb(registry, admin=False, provisioner=False, **limits))
        return made[-1]

    yield make
    for db in made:
        db.close()


def test_sign_ups_that_no_worker_finishes_are_bounded_and_go_on_when_one_does(web: OpenDB, open_db: OpenDB) -> None:
    db = web(signups_per_actor=0, unfinished_signups=3)
    assert [sign_up(db, number) is not None for number in range(6)] == [True, True, True, False, False, False]
    assert [tenant.state for tenant in db.tenants.list()] == [TenantState.PROVISIONING] * 3
    assert open_db().work() == 3
    assert sign_up(db, 6) is not None


def test_a_crowd_over_two_processes_is_admitted_up_to_the_limit_and_not_one_further(web: OpenDB) -> None:
    processes = [web(signups_per_actor=5, signups=8) for _ in range(2)]
    assert sum(made is not None for made in crowd(16, lambda number: sign_up(processes[number % 2], number))) == 5
    elsewhere = crowd(16, lambda number: sign_up(processes[number % 2], 100 + number, f"2001:db8:0:{number}::1"))
    assert sum(made is not None for made in elsewhere) == 3
    assert counts(processes[0])[0] == 8


def test_without_the_lock_on_the_row_a_crowd_gets_past_the_limit(web: OpenDB, monkeypatch: pytest.MonkeyPatch) -> None:
    read = threading.Barrier(2)

    def take(connection: Any, limit: rates.Limit, now: Any) -> None:
        until = connection.scalars(select(tables.rates.c.until).where(tables.rates.c.key == limit.key)).one_or_none()
        read.wait(30)
        if isinstance(rates.paid_until(until or now, now, limit.most), int):
            raise errors.RateLimited(limit.words, 1)

    monkeypatch.setattr(rates, "_take", take)
    db = web(signups_per_actor=1, signups=0)
    assert all(crowd(2, lambda number: sign_up(db, number)))


def test_a_crowd_whose_old_rows_are_swept_meanwhile_neither_waits_in_a_circle_nor_gets_more(web: OpenDB, open_db: OpenDB) -> None:
    """Each takes a row of its own that another wants to clear away."""
    processes = [web(signups_per_actor=1, signups=0) for _ in range(2)]
    limits = processes[0]._registry.sign_up_limits
    sources = [f"203.0.113.{number}" for number in range(12)]
    keys = [limit.key for source in sources for limit in limits._limits(Actor("anonymous", None, source))]
    with open_db()._registry.write() as connection:
        old = tables.utcnow() - timedelta(days=1)
        connection.execute(insert(tables.rates), [{"key": key, "until": old} for key in keys])
    for expected in (12, 0):
        made = crowd(12, lambda number: sign_up(processes[number % 2], number + expected, sources[number]))  # noqa: B023
        assert sum(each is not None for each in made) == expected


def test_twenty_who_want_the_same_slug_at_once_make_one_tenant(cluster: Cluster, open_db: OpenDB) -> None:
    processes = [open_db(signups_per_actor=0) for _ in range(2)]
    before = cluster.databases()

    def want(number: int) -> str:
        with stranger():
            try:
                return str(
                    processes[number % 2]
                    .provision("acme", owner=NewUser(email=f"u{number}@example.org", password="correct horse battery"))
                    .state
                )
            except errors.TenantExists:
                return "taken"

    told = crowd(20, want)

    assert sorted(told) == ["active", *["taken"] * 19]
    assert [tenant.slug for tenant in processes[0].tenants.list(TenantState.ACTIVE)] == ["acme"]
    assert counts(processes[0]) == [1, 1, 1, 1]
    with processes[0]._registry.read() as connection:
        golden = set(connection.scalars(select(tables.templates.c.database)))
    assert cluster.databases() - before - golden == {processes[0].tenants.get("acme").database}
