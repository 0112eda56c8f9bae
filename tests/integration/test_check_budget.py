"""`check`, and the start of a process that makes databases, compare the budget with what the server has, and show both numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from psycopg import sql

from tenantdb import Budget, TenantDB
from tenantdb.errors import ConfigError
from tenantdb.provisioning import check
from tenantdb.provisioning.check import Finding, Severity, compare_at_start
from tests.world import PostgreSQLWorld, pg_world

MAX, RESERVED = 40, 5  # PostgreSQL keeps 3 for superusers; the other two are reserved_connections, from 16 on
THERE = MAX - RESERVED


@pytest.fixture(scope="module")
def small_world() -> Iterator[PostgreSQLWorld]:
    with pg_world(max_connections=str(MAX), reserved_connections=str(RESERVED - 3)) as world:
        yield world


@pytest.fixture
def make(small_world: PostgreSQLWorld) -> Iterator[Callable[..., TenantDB]]:
    """A process whose one login does both, so that there is one pool."""
    made: list[TenantDB] = []

    def make(**overrides: Any) -> TenantDB:
        given = small_world._new_registry()
        made.append(small_world.make_db(url=given["registry_admin"], registry_admin=None, **overrides))
        return made[-1]

    yield make
    for db in made:
        db.close()


def about(db: TenantDB, word: str) -> list[Finding]:
    return [finding for finding in db.check() if word in finding.text and finding.subject == "server default"]


def test_a_budget_that_the_server_has_is_nothing_to_speak_of_and_one_more_is(make: Callable[..., TenantDB]) -> None:
    assert about(make(budget=Budget(connections=THERE, processes=2)), "max_connections") == []

    (found,) = about(make(budget=Budget(connections=THERE + 1, processes=2)), "max_connections")

    assert found.severity is Severity.WARNING
    assert f"budget.connections={THERE + 1}, and the server has {THERE}: max_connections={MAX} less {RESERVED} reserved" in found.text


def test_a_strict_budget_that_the_server_does_not_have_is_a_problem(make: Callable[..., TenantDB]) -> None:
    assert about(make(budget=Budget(connections=THERE, processes=2, strict=True)), "max_connections") == []

    (found,) = about(make(budget=Budget(connections=THERE + 1, processes=2, strict=True)), "max_connections")

    assert found.severity is Severity.PROBLEM


def test_a_registry_on_the_server_under_another_name_is_counted_on_top(
    make: Callable[..., TenantDB], monkeypatch: pytest.MonkeyPatch
) -> None:
    tight = {"budget": Budget(connections=THERE - 7, processes=2), "registry_pool_size": 3}
    assert about(make(**tight), "max_connections") == []  # the same address: inside the budget

    monkeypatch.setattr(check, "registry_is_on", lambda *_: False)  # what the addresses say; the server itself is asked as well
    (found,) = about(make(**tight), "max_connections")

    assert f"are {THERE + 1} connections, and the server has {THERE}" in found.text
    assert "registry_pool_size=3 and one that listens in budget.processes=2" in found.text and "another name" in found.text


def test_the_second_login_of_the_registry_is_counted_once(small_world: PostgreSQLWorld) -> None:
    db = small_world.make_db(budget=Budget(connections=THERE - 1, processes=2), registry_pool_size=2)

    (found,) = about(db, "max_connections")

    assert "2 of registry_admin in this process" in found.text
    assert f"are {THERE + 1} connections, and the server has {THERE}" in found.text


def test_limits_of_roles_that_are_narrower_than_the_budget_are_counted(make: Callable[..., TenantDB], small_world: PostgreSQLWorld) -> None:
    small = make(budget=Budget(connections=30, processes=1, per_tenant=1))
    tenants = [small.provision("acme"), small.provision("globex")]
    assert about(small, "CONNECTION LIMIT") == []  # 1 for 1 process, and 4 that linger

    wide = small_world.twin(small, budget=Budget(connections=30, processes=2, per_tenant=5))
    (found,) = about(wide, "CONNECTION LIMIT")

    assert found.severity is Severity.WARNING
    assert "2 of the tenants' roles have a CONNECTION LIMIT below 10, the lowest is 5" in found.text
    assert "budget.per_tenant=5 in budget.processes=2" in found.text
    for tenant in tenants:
        small_world.superuser.execute(sql.SQL("ALTER ROLE {} CONNECTION LIMIT 10").format(sql.Identifier(str(tenant.runtime_role))))
    assert about(wide, "CONNECTION LIMIT") == []


# -- at the start ----------------------------------------------------------------------------------------------------------------------


def test_a_start_logs_what_is_missing(make: Callable[..., TenantDB], caplog: pytest.LogCaptureFixture) -> None:
    for connections, said in ((THERE, 0), (THERE + 1, 1)):
        db = make(budget=Budget(connections=connections, processes=2))
        caplog.clear()
        compare_at_start(db._registry, db.settings)
        assert len([record for record in caplog.records if "max_connections" in record.getMessage()]) == said


def test_a_start_with_a_strict_budget_is_refused(make: Callable[..., TenantDB]) -> None:
    enough = make(budget=Budget(connections=THERE, processes=2, strict=True))
    compare_at_start(enough._registry, enough.settings)

    db = make(budget=Budget(connections=THERE + 1, processes=2, strict=True))
    with pytest.raises(ConfigError, match=f"budget.connections={THERE + 1}, and the server has {THERE}"):
        compare_at_start(db._registry, db.settings)


def test_a_start_without_a_provisioner_asks_nobody(small_world: PostgreSQLWorld, make: Callable[..., TenantDB]) -> None:
    given = {**small_world._new_registry(), "server": None}
    with TenantDB(**given, budget=Budget(connections=1000, processes=1, strict=True)) as web:
        compare_at_start(web._registry, web.settings)  # not even the registry, which has no tables yet


def test_a_server_that_does_not_answer_keeps_nobody_from_starting(
    make: Callable[..., TenantDB], small_world: PostgreSQLWorld, caplog: pytest.LogCaptureFixture
) -> None:
    db = small_world.twin(make(), server="postgresql://prov:wrong@127.0.0.1:1/postgres", budget=Budget(strict=True))

    compare_at_start(db._registry, db.settings)

    assert "the budget could not be compared with server default" in caplog.text
    assert "wrong" not in caplog.text
