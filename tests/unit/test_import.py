"""``import tenantdb`` is cheap and loads nobody's framework; its public names are a promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import tenantdb

HEAVY = (
    "alembic",
    "argon2",
    "celery",
    "click",
    "cryptography",
    "fastapi",
    "flask",
    "jwt",
    "psycopg",
    "pydantic_settings",
    "rich",
    "starlette",
    "tenantdb.fleet",
    "tenantdb.registry.rollouts",
    "tenantdb.registry.rotation",
)


def heavy_modules_after(statement: str) -> list[str]:
    """Which of the heavy modules a fresh interpreter has loaded after a statement."""
    report = f"import json, sys; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"{statement}\n{report}"], capture_output=True, text=True, check=True, timeout=60)
    loaded: list[str] = json.loads(done.stdout)
    return loaded


def test_importing_tenantdb_loads_no_framework_and_no_driver() -> None:
    assert heavy_modules_after("import tenantdb") == []


def test_making_the_object_loads_none_either(tmp_path: Path) -> None:
    assert heavy_modules_after(f"from tenantdb import TenantDB\nTenantDB('sqlite:///{tmp_path}/central.sqlite3')") == []


def test_the_look_at_loaded_modules_sees_what_an_adapter_loads() -> None:
    assert {"fastapi", "starlette"} <= set(heavy_modules_after("import tenantdb.fastapi"))


def test_the_public_names_are_these() -> None:
    assert sorted(tenantdb.__all__) == [
        "AsyncTenantDB",
        "Budget",
        "BudgetStats",
        "Identity",
        "MemberRole",
        "Membership",
        "NewUser",
        "Server",
        "Settings",
        "Subscription",
        "Tenant",
        "TenantDB",
        "TenantLogFilter",
        "TenantState",
        "User",
        "acting",
        "bind_tenant",
        "current_tenant",
        "errors",
    ]
    assert all(hasattr(tenantdb, name) for name in tenantdb.__all__)


def test_the_public_names_for_tests_are_these_and_need_no_pytest() -> None:
    script = "import sys, tenantdb.testing; print(*sorted(tenantdb.testing.__all__), 'pytest' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)

    assert done.stdout.split() == ["EmbeddedServer", "assert_migrations_match_models", "False"]
