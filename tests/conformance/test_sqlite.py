"""What SQLite alone has to keep: transactions that hold DDL, writers that wait, files that are never made by accident."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError, OperationalError

from tenantdb import Tenant, TenantDB, errors
from tenantdb.provisioning import steps
from tests.conformance.app import NOTES, note
from tests.conformance.colours import Face, MakeFace, MakeProcess
from tests.conformance.conftest import Estate
from tests.world import SQLiteWorld, eventually

pytestmark = pytest.mark.parametrize("world", ["sqlite"], indirect=True, scope="session")


async def test_a_connection_has_write_ahead_log_foreign_keys_and_patience(face: Face, acme: Tenant) -> None:
    async with face.connect("acme") as connection:
        pragmas = {name: await connection.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "foreign_keys", "busy_timeout")}
    assert pragmas == {"journal_mode": "wal", "foreign_keys": 1, "busy_timeout": 5000}


async def test_a_row_that_refers_to_nothing_is_refused(face: Face, fresh: Tenant) -> None:
    await face.write(note(1, fresh.slug), fresh)
    with pytest.raises(IntegrityError):
        await face.write(note(2, "nobody"), fresh)
    assert await face.rows(NOTES, fresh) == [1]


async def test_ddl_of_a_transaction_that_is_rolled_back_is_gone(face: Face, fresh: Tenant) -> None:
    with pytest.raises(ZeroDivisionError):
        async with face.begin(fresh) as session:
            await session.execute(text("CREATE TABLE rooms (id INTEGER PRIMARY KEY)"))
            raise ZeroDivisionError
    with face.db.connect(fresh) as connection:
        assert "rooms" not in inspect(connection).get_table_names()


async def test_a_transaction_whose_commit_failed_reaches_nobody_else(face: Face, fresh: Tenant) -> None:
    """A deferred constraint fails COMMIT, and SQLite keeps the transaction open, which SQLAlchemy takes for ended."""
    ddl = "CREATE TABLE suites (id INTEGER PRIMARY KEY, part_of INTEGER REFERENCES suites DEFERRABLE INITIALLY DEFERRED)"
    async with face.begin(fresh) as session:
        await session.execute(text(ddl))

    async with face.session(fresh) as session:
        await session.execute(text("INSERT INTO suites VALUES (1, 99)"))
        with pytest.raises(IntegrityError):
            await session.commit()

    async with face.session(fresh) as session:
        assert (await session.execute(text("SELECT count(*) FROM suites"))).scalar() == 0
        await session.execute(text("DROP TABLE suites"))
        await session.commit()


def test_writers_that_read_first_wait_for_each_other_in_threads(db: TenantDB, fresh: Tenant) -> None:
    def count_up(_: int) -> None:
        with db.begin(fresh) as session:
            session.execute(note(max(session.scalars(NOTES), default=0) + 1))

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(count_up, range(40)))
    with db.session(fresh) as session:
        assert session.scalars(NOTES).all() == list(range(1, 41))


async def test_writers_that_read_first_wait_for_each_other_in_asyncio(async_face: MakeFace, fresh: Tenant) -> None:
    face = async_face()

    async def count_up() -> None:
        async with face.begin(fresh) as session:
            await session.execute(note(max(await session.scalars(NOTES), default=0) + 1))

    await asyncio.gather(*(count_up() for _ in range(20)))
    assert await face.rows(NOTES, fresh) == list(range(1, 21))


async def test_a_session_that_read_before_another_wrote_cannot_write(face: Face, fresh: Tenant) -> None:
    """The twin of the two above: why begin() takes the lock at once."""
    async with face.session(fresh) as session:
        assert (await session.scalars(NOTES)).all() == []
        await face.write(note(1), fresh)
        with pytest.raises(OperationalError, match="locked"):
            await session.execute(note(2))


async def test_who_waits_longer_than_the_patience_for_the_write_lock_is_told(make_face: MakeFace, fresh: Tenant) -> None:
    face = make_face(lock_timeout=0.05)
    async with face.begin(fresh) as session:
        await session.execute(note(1))
        with pytest.raises(OperationalError, match="locked"):
            await face.write(note(2), fresh)
    assert await face.rows(NOTES, fresh) == [1]


async def test_a_missing_file_is_an_error_and_is_not_made(face: Face, world: SQLiteWorld, estate: Estate, fresh: Tenant) -> None:
    path = world.path(fresh, estate.db)
    aside = path.with_suffix(".aside")
    path.rename(aside)
    try:
        with pytest.raises(errors.ServerUnavailable, match="missing"):
            await face.marker(fresh)
        assert not path.exists()
    finally:
        aside.rename(path)
    assert await face.marker(fresh) == fresh.slug


def test_a_missing_registry_is_not_made_by_looking(world: SQLiteWorld) -> None:
    with world.make_db(init=False) as db:
        with pytest.raises(errors.RegistryNotInitialized):
            db.tenants.list()
        assert db.settings.url.path is not None
        assert not Path(db.settings.url.path).exists()


def test_a_file_in_the_place_of_the_registry_that_is_none_is_an_outage(world: SQLiteWorld) -> None:
    with world.make_db(init=False) as db:
        path = Path(db.settings.url.path or "")
        path.parent.mkdir(parents=True)
        path.write_bytes(b"not a database, but long enough to have a header" * 10)
        with pytest.raises(errors.RegistryUnavailable):
            db.tenants.list()


def test_a_tenants_file_is_its_owners_alone(world: SQLiteWorld, estate: Estate, acme: Tenant) -> None:
    assert stat.S_IMODE(world.path(acme, estate.db).stat().st_mode) == 0o600


def test_a_file_under_a_reserved_name_that_is_not_ours_is_never_touched(world: SQLiteWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    with world.make_db() as db:
        folder = Path(db.servers.get("default").path or "")
        folder.mkdir(parents=True)
        stranger = folder / "t_00000000000000aa.sqlite3"
        stranger.write_bytes(b"a stranger's")
        names = iter(["t_00000000000000aa"] * 3 + ["t_00000000000000bb"] * 3)  # for a database and two roles
        monkeypatch.setattr(steps, "draw_name", lambda: next(names))

        assert db.provision("acme").database == "t_00000000000000bb"
        assert stranger.read_bytes() == b"a stranger's"


def test_eight_threads_may_write_the_registry_at_once(process: MakeProcess, fresh: Tenant) -> None:
    db = process()
    before = db.tenants.get(fresh).version
    with ThreadPoolExecutor(8) as executor:
        list(executor.map(lambda number: db.update(fresh, plan=f"plan-{number}"), range(32)))
    assert db.tenants.get(fresh).version == before + 32


async def test_a_file_that_opens_after_its_coroutine_was_cancelled_is_closed_again(
    monkeypatch: pytest.MonkeyPatch, async_face: MakeFace, acme: Tenant
) -> None:
    """The driver's thread cannot be stopped: it opens the file whoever has gone meanwhile."""
    begun, may_open, done = threading.Event(), threading.Event(), threading.Event()
    opened: list[sqlite3.Connection] = []

    def connect(*args: Any, **parameters: Any) -> sqlite3.Connection:
        begun.set()
        may_open.wait(30)
        opened.append(real_connect(*args, **parameters))
        done.set()
        return opened[0]

    face = async_face()
    real_connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", connect)
    task = asyncio.create_task(face.marker("acme"))
    while not (begun.is_set() or task.done()):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    may_open.set()
    assert await asyncio.to_thread(done.wait, 30)

    def is_closed() -> bool:
        try:
            opened[0].execute("SELECT 1")
        except sqlite3.ProgrammingError:
            return True
        return False

    eventually(is_closed)
