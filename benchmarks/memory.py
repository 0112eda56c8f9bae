"""What ten thousand tenants cost that were seen once and are idle now, and how often a statement is compiled for two hundred.

On SQLite, because what is kept per tenant does not depend on the database and ten thousand files are made in a second: copies of one
provisioned file with the id inside it exchanged. tracemalloc counts what Python has allocated, wherever it is held.
"""

from __future__ import annotations

import gc
import itertools
import tempfile
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import UUID, uuid4

from sqlalchemy import Select, Text, insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.sql.compiler import SQLCompiler

from benchmarks.measure import Result
from benchmarks.world import temporary_files_in_memory
from tenantdb import TenantDB
from tenantdb.backends.sqlite import database_path
from tenantdb.registry import tables

TENANTS = 10_000
STATEMENTS, COMPILING_TENANTS = 50, 200
_WARM = 200  # tenants seen before the count begins: they fill every pool and cache that has a bound


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(Text)
    a: Mapped[int]
    b: Mapped[int]
    c: Mapped[int]
    d: Mapped[int]


def run(*, quick: bool) -> Result:
    """With ten thousand tenants always. ``quick`` traces the second half: the large tables grow in it, so it pays for both halves."""
    result = Result()
    with temporary_files_in_memory(), _many_tenants(TENANTS + _WARM) as (db, tenants):
        per_statement = _compiles(db, dict(itertools.islice(tenants.items(), COMPILING_TENANTS)))
        kib = _kib_per_tenant(db, list(tenants.items()), TENANTS // 2 if quick else _WARM)
        result.add("tenant_kib", kib, bar="<= 6", note=f"Python memory per known idle tenant, {TENANTS} of them, in KiB")
        result.add(
            "compiles_per_statement",
            per_statement,
            bar="1.0",
            note=f"{STATEMENTS} ORM statements on {COMPILING_TENANTS} tenants: compilations / statements",
        )
    return result


@contextmanager
def _many_tenants(count: int) -> Iterator[tuple[TenantDB, dict[str, UUID]]]:
    with tempfile.TemporaryDirectory(prefix="tenantdb-bench-") as folder:
        with TenantDB(f"sqlite:///{folder}/central.sqlite3", cache_size=2 * count) as db:
            db.init()
            yield db, _copy_tenants(db, count)


def _copy_tenants(db: TenantDB, count: int) -> dict[str, UUID]:
    """Rows in the registry, and files, made from one provisioned tenant's."""
    model = db.provision("model")
    with db.migrations.owner_connection("model") as connection:
        Base.metadata.create_all(connection)
        connection.commit()
    with db.begin("model") as session:
        session.add(Item(id=1, owner=str(model.id), a=1, b=2, c=3, d=4))
    server = db.servers.get(model.server or "default")
    db.close()  # so that the whole file is in the file
    content = database_path(server, model).read_bytes()
    ids = {f"tenant-{number:05d}": uuid4() for number in range(count)}
    with db._registry.admin_write() as connection:
        row = dict(connection.execute(select(tables.tenants).where(tables.tenants.c.id == model.id)).mappings().one())
        rows = [row | {"id": id, "slug": slug, "database": f"t_{id.hex[:16]}"} for slug, id in ids.items()]
        connection.execute(insert(tables.tenants), rows)
    for each in rows:
        _write(database_path(server, replace(model, database=each["database"])), content, model.id, each["id"])
    return ids


def _write(path: Path, content: bytes, old: UUID, new: UUID) -> None:
    """Both ids are 36 characters, so the file stays well-formed."""
    path.touch(mode=0o600)
    path.write_bytes(content.replace(str(old).encode(), str(new).encode()))


def _see(db: TenantDB, slug: str, tenant_id: UUID) -> None:
    """A session, down to a row; without the ORM's own work, which tracing makes slow and which keeps nothing."""
    with db.session(slug) as session:
        if session.connection().exec_driver_sql("SELECT owner FROM items").scalar() != str(tenant_id):
            raise AssertionError(f"{slug} got the row of another tenant")


def _kib_per_tenant(db: TenantDB, tenants: Sequence[tuple[str, UUID]], untraced: int) -> float:
    """Growth per tenant after the first ``untraced``: those are known too, but seen four times as fast."""
    for slug, tenant_id in tenants[:untraced]:
        _see(db, slug, tenant_id)
    gc.collect()
    tracemalloc.start()
    try:
        _see(db, *tenants[0])  # what the trace itself sets off
        before, _ = tracemalloc.get_traced_memory()
        for slug, tenant_id in tenants[untraced:]:
            _see(db, slug, tenant_id)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return (after - before) / (len(tenants) - untraced) / 1024


def _compiles(db: TenantDB, tenants: dict[str, UUID]) -> float:
    for slug, tenant_id in tenants.items():
        _see(db, slug, tenant_id)  # the registry's own statements are compiled by now
    compiled = 0
    original = SQLCompiler.__init__

    def counting(self: SQLCompiler, *args: Any, **options: Any) -> None:
        nonlocal compiled
        compiled += 1
        original(self, *args, **options)

    with mock.patch.object(SQLCompiler, "__init__", counting):
        for slug in tenants:
            for statement in _statements():
                with db.tenant_context(slug), db.session() as session:
                    if len(session.execute(statement).all()) != 1:
                        raise AssertionError("the row is missing: what was compiled was not what was asked")
    return compiled / STATEMENTS


def _statements() -> list[Select[Any]]:
    """Different ones, built anew each time as an application builds them."""
    columns: tuple[Any, ...] = (Item.id, Item.owner, Item.a, Item.b, Item.c, Item.d)
    subsets = itertools.chain.from_iterable(itertools.combinations(columns, size) for size in range(1, len(columns) + 1))
    return [select(*subset).where(Item.id == 1) for subset in itertools.islice(subsets, STATEMENTS)]
