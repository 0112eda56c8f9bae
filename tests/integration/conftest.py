"""The bootstrapped servers that the integration tests share, and a registry of each test's own in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tenantdb import TenantDB
from tenantdb.testing import EmbeddedServer
from tests.integration.cluster import Cluster, Scripts
from tests.servers import debian_bindir
from tests.unit.registry_fixtures import cheap_hashing

__all__ = ["cheap_hashing"]


@pytest.fixture(autouse=True)
def no_credentials_of_the_developer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PGPASSFILE", os.devnull)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """PostgreSQL of the wheel."""
    with EmbeddedServer(fsync=False, settings={"log_statement": "all"}) as server:
        cluster = Cluster(server)
        cluster.prepare()
        yield cluster


@pytest.fixture(scope="session")
def debian_cluster() -> Iterator[Cluster]:
    """PostgreSQL of the distribution."""
    with EmbeddedServer(bindir=debian_bindir(), fsync=False, settings={"log_statement": "all"}) as server:
        cluster = Cluster(server)
        cluster.prepare()
        yield cluster


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    """Migrations of one revision, which makes the table ``notes``."""
    scripts = Scripts(tmp_path / "migrations")
    scripts.add("001", "CREATE TABLE notes (id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY, line text NOT NULL UNIQUE)")
    return scripts


@pytest.fixture
def registry(cluster: Cluster) -> str:
    """The database of an initialised registry."""
    return cluster.new_registry()


@pytest.fixture
def open_db(cluster: Cluster, registry: str, scripts: Scripts) -> Iterator[Callable[..., TenantDB]]:
    """Makes a `TenantDB` on the test's registry, as another process would have it."""
    opened: list[TenantDB] = []

    def make(**options: Any) -> TenantDB:
        opened.append(cluster.tenantdb(registry, **{"migrations": str(scripts), **options}))
        return opened[-1]

    yield make
    for db in opened:
        db.close()


@pytest.fixture
def db(open_db: Callable[..., TenantDB]) -> TenantDB:
    return open_db()
