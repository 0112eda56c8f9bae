"""Adopting on SQLite: a file is copied in and out. PostgreSQL has tests of its own in tests/integration/test_adopt.py."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text

from tenantdb import AsyncTenantDB, TenantDB
from tenantdb.errors import AdoptRefused
from tenantdb.model import TenantState


@pytest.fixture
def files(tmp_path: Path) -> Iterator[TenantDB]:
    with TenantDB(f"sqlite:///{tmp_path / 'central.sqlite3'}") as db:
        db.init()
        yield db


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file that somebody made, with rows in its write-ahead log still."""
    path = tmp_path / "elsewhere" / "clinic.db"
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE notes (line TEXT)")
        connection.execute("INSERT INTO notes VALUES ('by hand')")
        connection.commit()
    return path


def rows(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [line for (line,) in connection.execute("SELECT line FROM notes")]


def test_a_file_becomes_a_tenant_and_stays_as_it_is(files: TenantDB, old: Path) -> None:
    digest = hashlib.sha256(old.read_bytes()).digest()

    tenant = files.adopt("old", database=str(old), name="Old")

    assert tenant.state is TenantState.ACTIVE and tenant.adopted_from == str(old) and tenant.database != old.stem
    with files.begin("old") as session:
        session.execute(text("INSERT INTO notes VALUES ('here')"))
    with files.session("old") as session:
        assert session.scalars(text("SELECT line FROM notes")).all() == ["by hand", "here"]
    assert hashlib.sha256(old.read_bytes()).digest() == digest
    assert files.doctor(tenant="old") == []


async def test_in_asyncio_too(files: TenantDB, old: Path) -> None:
    adb = AsyncTenantDB(files)
    assert (await adb.adopt("old", database=str(old))).state is TenantState.ACTIVE
    await adb.delete("old")
    assert (await adb.give_back("old", confirm="old")).state is TenantState.PURGED
    await adb.close()


def test_it_goes_back_beside_the_original_without_what_is_ours(files: TenantDB, old: Path) -> None:
    files.adopt("old", database=str(old))
    with files.begin("old") as session:
        session.execute(text("INSERT INTO notes VALUES ('here')"))
    files.delete("old")

    files.give_back("old", confirm="old")

    back = old.with_name("clinic.given-back.db")
    assert rows(back) == ["by hand", "here"] and rows(old) == ["by hand"]
    with closing(sqlite3.connect(back)) as connection:
        assert [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE name LIKE 'tenantdb%'")] == []


@pytest.mark.parametrize("what", ["nothing", "text", "tenant", "registry"])
def test_what_is_no_such_file_is_refused_and_leaves_nothing(files: TenantDB, tmp_path: Path, what: str) -> None:
    tenant = files.provision("acme")
    (tmp_path / "text").write_text("no database at all, but long enough to be read as one " * 20)
    paths = {
        "nothing": tmp_path / "nothing",
        "text": tmp_path / "text",
        "tenant": tmp_path / "tenants" / f"{tenant.database}.sqlite3",
        "registry": tmp_path / "central.sqlite3",
    }
    with pytest.raises(AdoptRefused):
        files.adopt("old", database=str(paths[what]))
    assert [each.slug for each in files.tenants.list()] == ["acme"]
