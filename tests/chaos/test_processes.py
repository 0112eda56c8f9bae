"""Forked in the middle of everything, a child starts empty and touches nothing of its parent's.

And a process that ends with leases out ends in silence.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import sqlalchemy

from tenantdb import Tenant
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


@pytest.mark.parametrize("how", ["threads", "asyncio"])
def test_a_process_that_ends_with_leases_out_ends_in_silence(town: Town, tenants: list[Tenant], process: MakeProcess, how: str) -> None:
    done = run(town, tenants[10:14], "end", how, connections=8)
    if how == "asyncio" and SQLALCHEMY_20:  # which warns of leases that are collected at the end, those of its own pools as well
        assert "Traceback" not in done.stderr, done.stderr
    else:
        assert not done.stderr, done.stderr
    assert done.returncode == 0
    eventually(lambda: town.backends() == 0)
