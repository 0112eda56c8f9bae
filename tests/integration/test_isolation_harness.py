"""The self-test of isolation that users can run: it finds nothing where all is well, and a leak where there is one."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tenantdb import Tenant, TenantDB
from tenantdb.errors import ConfigError
from tenantdb.testing.isolation import CHAOS, IsolationReport, check_isolation, read_marker
from tests.world import World

SHORT = 1.5  # seconds


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def db(request: pytest.FixtureRequest) -> Iterator[TenantDB]:
    world: World = request.getfixturevalue(f"{request.param}_world")
    made = world.make_db(budget={"connections": 8, "processes": 1, "per_tenant": 3}, drain_timeout=0.2)  # fewer than it is asked for
    yield made
    made.close()


def acts_of(db: TenantDB) -> set[str]:
    return set(CHAOS) if db.settings.url.backend == "postgresql" else {"evict", "dirty", "suspend"}


def test_nothing_crosses_under_load_and_chaos(db: TenantDB) -> None:
    report = check_isolation(db, tenants=4, seconds=SHORT)

    assert report.ok, report
    assert min(report.checks.values()) > 0 and set(report.checks) == {
        "bound", "named", "switched", "connection", "transaction", "executor", "task"
    }  # fmt: skip
    assert report.chaos and set(report.chaos) <= acts_of(db)
    assert db.tenants.list() == []


def test_a_deliberate_leak_is_found(db: TenantDB) -> None:
    report = check_isolation(db, tenants=4, seconds=SHORT, leak=True)

    assert report.crossings and not report.ok
    assert "CROSSING" in str(report) and str(report).startswith(f"{len(report.crossings)} crossings")
    assert check_isolation(db, tenants=2, seconds=0.3, chaos=()).crossings == ()  # it is switched off again


def test_a_leak_that_only_writes_is_found_in_the_end(db: TenantDB, monkeypatch: pytest.MonkeyPatch) -> None:
    strayed: list[Tenant] = []

    def astray(tenant: Tenant) -> str:
        from tenantdb.testing.isolation import _written

        with db.begin(random.choice(strayed) if strayed else tenant) as session:
            session.execute(_written.insert(), {"tenant": str(tenant.id), "by": "a mistake"})
        strayed.append(tenant)
        return str(tenant.id)

    report = check_isolation(db, tenants=3, seconds=SHORT, chaos=(), ways={"astray": astray})

    assert report.crossings and {crossing.way for crossing in report.crossings} == {"written by a mistake"}


def test_a_way_of_ones_own_is_looked_at_and_what_it_raises_is_told(db: TenantDB) -> None:
    def mine(tenant: Tenant) -> str:
        with db.session(tenant) as session:
            return read_marker(session)

    def broken(tenant: Tenant) -> str:
        raise KeyError("mine")

    report = check_isolation(db, tenants=2, seconds=0.7, chaos=(), ways={"mine": mine, "broken": broken})

    assert report.checks["mine"] > 0 and report.crossings == ()
    assert not report.ok and report.unexpected[0] == "broken: KeyError: 'mine'"


def test_a_way_that_was_never_looked_at_is_not_ok() -> None:
    assert not IsolationReport(checks={"bound": 5, "task": 0}, chaos={}, errors={}).ok
    assert IsolationReport(checks={"bound": 5}, chaos={}, errors={}).ok


def test_the_applications_hooks_are_not_called(db: TenantDB) -> None:
    told: list[Tenant] = []
    for event in ("before_provision", "after_activate", "after_purge"):
        db.on(event)(told.append)

    check_isolation(db, tenants=2, seconds=0.2, chaos=())

    assert told == []


@pytest.mark.parametrize("wrong", [{"tenants": 1}, {"threads": 0}, {"seconds": 0}, {"chaos": ("earthquake",)}])
def test_what_cannot_be_asked_is_told(db: TenantDB, wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        check_isolation(db, **wrong)  # type: ignore[arg-type]


@pytest.mark.long
def test_nothing_crosses_for_long(db: TenantDB) -> None:
    report = check_isolation(db, tenants=12, seconds=90, threads=12, tasks=64)

    assert report.ok, report
