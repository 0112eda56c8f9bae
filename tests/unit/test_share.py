"""One process's share of a server's budget: what is left of it for tenants, and what is refused."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from tenantdb import Budget, Server, Settings
from tenantdb.connections.share import limits_of, registry_is_on
from tenantdb.errors import ConfigError
from tenantdb.registry.secrets import generate_key

KEY = generate_key()


@pytest.fixture(autouse=True)
def _no_web_concurrency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)


def settings(url: str = "postgresql://app@registry.example/central", **values: Any) -> Settings:
    return Settings(url=url, secret_keys=[KEY], **values)


def server(host: str | None = "db1.example", port: int | None = None, **values: Any) -> Server:
    values = {"backend": "postgresql", "direct_host": host, "direct_port": port, **values}
    return Server(id=UUID(int=1), name="default", host=host, port=port, **values)


# -- shares ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("connections", "processes", "share"), [(90, 4, 22), (90, 1, 90), (90, 90, 1), (7, 4, 1), (8, 4, 2), (1, 1, 1)])
def test_each_process_gets_an_equal_share_and_all_together_never_more_than_there_is(connections: int, processes: int, share: int) -> None:
    limits = limits_of(settings(budget=Budget(connections=connections, processes=processes)), server())

    assert limits.connections == share
    assert limits.connections * processes <= connections


def test_the_number_of_processes_is_what_web_servers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings()
    assert limits_of(given, server()).connections == 90 // 4

    monkeypatch.setenv("WEB_CONCURRENCY", "9")
    assert limits_of(given, server()).connections == 10
    assert limits_of(settings(budget=Budget(processes=2)), server()).connections == 45  # who says it himself is believed


def test_a_tenant_may_have_no_more_than_the_process_has() -> None:
    assert limits_of(settings(budget=Budget(per_tenant=10)), server()).per_tenant == 10
    assert limits_of(settings(budget=Budget(connections=24, per_tenant=10)), server()).per_tenant == 6


def test_what_else_the_ledger_keeps_to_is_what_the_budget_says() -> None:
    budget = Budget(processes=1, background=3, administration=2, max_waiting=70, idle_timeout=8.0)

    limits = limits_of(settings(budget=budget), server())

    assert (limits.background, limits.administration, limits.max_waiting, limits.idle_timeout) == (3, 2, 70, 8.0)
    assert limits.headroom == 90 // 20


def test_a_process_that_started_when_there_were_fewer_of_them_finds_out_that_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(budget=Budget(connections=5))
    monkeypatch.setenv("WEB_CONCURRENCY", "6")

    with pytest.raises(ConfigError, match=r"budget\.connections=5 between budget\.processes=6 is 0 for each: nothing is left .* 'default'"):
        limits_of(given, server())


# -- a registry on the same server -----------------------------------------------------------------------------------------------------


def test_a_registry_on_the_same_server_takes_its_connections_from_the_share_and_one_elsewhere_none() -> None:
    given = settings(budget=Budget(connections=40, processes=4), registry_pool_size=4)

    assert limits_of(given, server("registry.example")).connections == 10 - 4 - 1  # one that listens
    assert limits_of(given, server("db1.example")).connections == 10


def test_a_registry_that_leaves_nothing_for_tenants_is_refused_by_all_names() -> None:
    given = settings(budget=Budget(connections=16, processes=4), registry_pool_size=3)

    with pytest.raises(ConfigError) as caught:
        limits_of(given, server("registry.example"))
    for said in ("budget.connections=16", "budget.processes=4", "registry_pool_size=3", "one that listens", "is 4 for each", "'default'"):
        assert said in str(caught.value)

    one_more = settings(budget=Budget(connections=20, processes=4), registry_pool_size=3)
    assert limits_of(one_more, server("registry.example")).connections == 1
    assert limits_of(given, server("db1.example")).connections == 4  # where the registry is not


@pytest.mark.parametrize(
    ("url", "host", "port", "same"),
    [
        ("postgresql://app@db1.example/central", "db1.example", None, True),
        ("postgresql://app@db1.example:5432/central", "db1.example", None, True),
        ("postgresql://app@db1.example/central", "db1.example", 5432, True),
        ("postgresql://app@DB1.example/central", "db1.Example", None, True),
        ("postgresql://app@db1.example:5433/central", "db1.example", None, False),
        ("postgresql://app@db1.example/central", "db1.example", 5433, False),
        ("postgresql://app@db1.example/central", "db2.example", None, False),
        ("postgresql://app@db1.example/central", None, None, False),
        ("postgresql://app@localhost/central", "127.0.0.1", 5432, True),
        ("postgresql://app@[::1]/central", "localhost", None, True),
        ("postgresql://app@/central?host=/run/postgresql", "localhost", None, True),
        ("postgresql://app@/central", None, None, True),
        ("postgresql://app@localhost:5433/central", "127.0.0.1", 5434, False),
        ("sqlite:///central.sqlite3", "localhost", None, False),
    ],
)
def test_the_registry_is_on_a_server_that_has_its_address(url: str, host: str | None, port: int | None, same: bool) -> None:
    assert registry_is_on(settings(url), server(host, port)) is same


def test_the_direct_address_counts_as_well_as_the_runtime_address() -> None:
    given = settings("postgresql://app@db1.example:5432/central")

    assert registry_is_on(given, server("pooler.example", 6432, direct_host="db1.example", direct_port=5432))
    assert registry_is_on(given, server("db1.example", 5432, direct_host="db1-direct.example", direct_port=5432))
    assert not registry_is_on(given, server("pooler.example", 6432, direct_host="db2.example", direct_port=5432))


def test_a_folder_of_files_has_no_registry_on_it() -> None:
    folder = Server(id=UUID(int=1), name="default", backend="sqlite", path="tenants")

    assert not registry_is_on(settings("postgresql://app@localhost/central"), folder)
    assert not registry_is_on(settings("sqlite:///central.sqlite3"), folder)
    assert limits_of(settings("sqlite:///central.sqlite3"), folder).connections == 22
