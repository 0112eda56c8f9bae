"""Forked in the middle of everything, a child starts empty and touches nothing of its parent's.

And a process that ends with leases out ends in silence.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from tenantdb import Tenant
from tests.adapters.served import running
from tests.chaos import forking
from tests.chaos.town import REGISTRY_POOL, Town
from tests.conformance.colours import MakeProcess
from tests.world import eventually

SQLALCHEMY_20 = sqlalchemy.__version__.startswith("2.0.")


def run(town: Town, tenants: list[Tenant], what: str, how: str, connections: int) -> subprocess.CompletedProcess[str]:
    order: dict[str, Any] = {
        "what": what,
        "how": how,
        "url": town.world.url("app", town.db.settings.url.database or ""),
        "secret_keys": [town.world.key],
        "budget": {"connections": connections + REGISTRY_POOL},
        "databases": {tenant.slug: tenant.database for tenant in tenants},
    }
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-m", forking.__name__]
    return subprocess.run(command, input=json.dumps(order), capture_output=True, text=True, timeout=90, check=False)


@pytest.mark.parametrize("how", ["fork", "multiprocessing"])
def test_a_child_forked_in_the_middle_of_everything_starts_empty_and_leaves_the_parent_alone(
    town: Town, tenants: list[Tenant], how: str
) -> None:
    done = run(town, tenants[10:14], "fork", how, connections=8)
    assert not done.stderr, done.stderr
    assert done.returncode == 0
    found = json.loads(done.stdout)
    for child in found["children"]:
        assert child["exit"] == 0, child
        assert child["held"] == 0
        assert child["rest"] == [0, 0, 0, 0, 0]
        assert not set(child["pids"]) & set(found["parent"])
        assert child["engine"] not in found["parent"]
    eventually(lambda: town.backends() == 0)


def test_workers_of_a_server_that_loaded_the_application_first_have_connections_of_their_own(
    town: Town, tenants: list[Tenant], tmp_path: Path
) -> None:
    """gunicorn --preload, with an application that used its database before the fork."""
    databases = {tenant.slug: tenant.database for tenant in tenants[10:12]}
    url, keys = town.world.url("app", town.db.settings.url.database or ""), [town.world.key]
    order = json.dumps({"url": url, "secret_keys": keys, "databases": databases, "connections": 30})
    command = "gunicorn --preload --workers 2 --threads 2 --bind 127.0.0.1:0 tests.chaos.preloaded:app"
    seen: list[dict[str, Any]] = []
    with running(command, {"PRELOADED": order}, tmp_path / "server.log") as server:

        def both_have_served() -> bool:
            for slug in databases:
                answer = server.ask("/", {"x-tenant-id": slug})
                assert answer.status == 200, answer.body
                seen.append({"slug": slug, **json.loads(answer.body)})
            return len({each["process"] for each in seen}) == 2

        eventually(both_have_served, within=60)
        before = seen[0]["before"]
        alive = town.world.superuser.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(%s)", [[backend for _, backend in before.values()]]
        ).fetchone()
    assert {slug: database for slug, (database, _) in before.items()} == databases
    assert all(each["here"][0] == databases[each["slug"]] for each in seen)
    backends = {process: {each["here"][1] for each in seen if each["process"] == process} for process in {each["process"] for each in seen}}
    first, second = backends.values()
    assert not first & second and not (first | second) & {backend for _, backend in before.values()}
    assert alive == (2,)  # the parent's own
    eventually(lambda: town.backends() == 0)


@pytest.mark.parametrize("how", ["threads", "asyncio"])
def test_a_process_that_ends_with_leases_out_ends_in_silence(town: Town, tenants: list[Tenant], process: MakeProcess, how: str) -> None:
    done = run(town, tenants[10:14], "end", how, connections=8)
    if how == "asyncio" and SQLALCHEMY_20:  # which warns of leases that are collected at the end, those of its own pools as well
        assert "Traceback" not in done.stderr, done.stderr
    else:
        assert not done.stderr, done.stderr
    assert done.returncode == 0
    eventually(lambda: town.backends() == 0)
