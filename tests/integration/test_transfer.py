"""Exports of a size that memory must not grow with, and of the distribution's PostgreSQL."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tenantdb import TenantDB
from tests.integration.cluster import Cluster, Scripts

ROWS, WIDTH = 60_000, 300
_MEMORY = 8 << 20


def test_memory_does_not_grow_with_the_tenant(db: TenantDB, tmp_path: Path) -> None:
    db.init()
    db.provision("acme")
    with db.begin("acme") as session:
        noise = f"(SELECT string_agg(md5(n::text || i::text), '') FROM generate_series(1, {WIDTH // 32}) AS i)"
        session.execute(text(f"INSERT INTO notes (line) SELECT {noise} FROM generate_series(1, {ROWS}) AS n"))
    calls: dict[str, Callable[[], Any]] = {
        "acme.tar": lambda: db.export("acme", tmp_path / "acme.tar"),
        "rows": lambda: db.export_rows("acme", tmp_path / "rows"),
        "copy": lambda: db.import_("copy", tmp_path / "acme.tar"),
    }
    peaks = {}
    for name, call in calls.items():
        tracemalloc.start()
        call()
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    assert (tmp_path / "acme.tar").stat().st_size > _MEMORY
    assert (tmp_path / "rows" / "notes.jsonl").stat().st_size > _MEMORY
    assert max(peaks.values()) < _MEMORY, peaks
    with db.session("copy") as session:
        assert session.scalar(text("SELECT count(*) FROM notes")) == ROWS


@pytest.mark.services
def test_the_programs_of_the_servers_own_version_are_taken_for_the_distributions(
    debian_cluster: Cluster, scripts: Scripts, tmp_path: Path
) -> None:
    registry = debian_cluster.new_registry()
    with debian_cluster.tenantdb(registry, migrations=str(scripts)) as db:
        db.init()
        db.provision("acme")
        with db.begin("acme") as session:
            session.execute(text("INSERT INTO notes (line) VALUES ('one')"))

        made = db.export("acme", tmp_path / "acme.tar")
        copy = db.import_("copy", made.path)

        assert made.made_with.startswith(f"pg_dump {debian_cluster.version // 10000}.")
        with db.begin(copy) as session:
            session.execute(text("INSERT INTO notes (line) VALUES ('two')"))
            assert session.execute(text("SELECT id, line FROM notes ORDER BY id")).all() == [(1, "one"), (2, "two")]
        assert db.export_rows("copy", tmp_path / "rows").tables == {"notes": 2}
