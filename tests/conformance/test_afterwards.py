"""What holds after something has moved, failed, or been closed, on SQLite, where a server is a folder that a test can move."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import threading
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from tenantdb import AsyncTenantDB, NewUser, Tenant, TenantDB, TenantState
from tenantdb.errors import ConfigError, MigrationError, NoServerAvailable, ProvisioningError, RegistryUnavailable
from tenantdb.settings import ConnectionURL, Settings
from tests.world import SQLiteWorld


@pytest.fixture
def db(sqlite_world: SQLiteWorld) -> TenantDB:
    return sqlite_world.make_db()


def without_provisioner(world: SQLiteWorld, db: TenantDB, monkeypatch: pytest.MonkeyPatch) -> TenantDB:
    """A web process of the same application: what on PostgreSQL is a process without ``server=``."""
    web = world.twin(db)
    provisioners = Settings.provisioners.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(Settings, "provisioners", property(lambda self: {} if self is web.settings else provisioners(self)))
    return web


def test_a_session_follows_its_tenant_to_the_servers_new_address(db: TenantDB, tmp_path: Path) -> None:
    tenant = db.provision("acme")
    with db.begin("acme") as session:
        session.execute(text("CREATE TABLE notes (body TEXT)"))
    folder = db.servers.get("default").path
    assert folder is not None
    shutil.copytree(folder, tmp_path / "new")

    db.servers.add("default", backend="sqlite", path=str(tmp_path / "new"))

    with db.begin("acme") as session:
        session.execute(text("INSERT INTO notes VALUES ('there')"))
    with sqlite3.connect(tmp_path / "new" / f"{tenant.database}.sqlite3") as there:
        assert there.execute("SELECT body FROM notes").fetchall() == [("there",)]
    there.close()
    assert db.tenants.get("acme").generation == tenant.generation + 1


def test_a_server_that_was_named_wrongly_can_be_named_anew(db: TenantDB) -> None:
    with pytest.raises(ProvisioningError) as failed:
        db.provision("acme", server="typo")
    assert isinstance(failed.value.__cause__, NoServerAvailable)

    assert db.provision("acme", server="default").state is TenantState.ACTIVE


def test_a_script_may_repeat_itself_with_a_new_owner(db: TenantDB) -> None:
    owner = NewUser(email="ada@clinic.test", password="correct horse")

    first, second = (db.provision("acme", owner=owner, exist_ok=True) for _ in range(2))

    assert first.id == second.id and len(db.memberships.list(tenant="acme")) == 1


def test_a_web_process_queues_its_failed_sign_up_again_for_the_worker(
    db: TenantDB, sqlite_world: SQLiteWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = True

    @db.seed
    def first_rows(session: Session, tenant: Tenant) -> None:
        if broken:
            raise ValueError("not yet")

    web = without_provisioner(sqlite_world, db, monkeypatch)
    assert web.provision("acme", idempotency_key="k").state is TenantState.PROVISIONING
    assert db.work() == 0 and db.tenants.get("acme").state is TenantState.FAILED

    broken = False
    assert web.provision("acme", idempotency_key="k").state is TenantState.PROVISIONING
    assert db.work() == 1

    assert db.tenants.get("acme").state is TenantState.ACTIVE


def test_a_worker_outlives_an_outage_of_the_registry(db: TenantDB, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, asked = threading.Event(), []
    claim_next = type(db._registry.operations).claim_next

    def failing(self: object, *args: object, **options: object) -> object:
        asked.append(len(asked))
        if len(asked) == 1:
            raise RegistryUnavailable("nothing listens there")
        stop.set()
        return claim_next(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(db._registry.operations), "claim_next", failing)

    assert db.work(stop=stop, poll=0.001) == 0 and asked == [0, 1]
    asked.clear()
    with pytest.raises(RegistryUnavailable):  # one that is not to go on says so
        db.work()


async def test_an_application_may_be_started_twice(db: TenantDB) -> None:
    await asyncio.to_thread(db.provision, "acme")
    adb = AsyncTenantDB(db)
    for _ in range(2):
        async with adb.lifespan(None), adb.session("acme") as session:
            assert (await session.scalar(text("SELECT 1"))) == 1
            assert [tenant.slug for tenant in await adb.tenants.list()] == ["acme"]


async def test_suspending_closes_what_the_event_loop_kept(db: TenantDB) -> None:
    await asyncio.to_thread(db.provision, "acme")
    adb = AsyncTenantDB(db)
    async with adb.session("acme") as session:
        await session.execute(text("SELECT 1"))
    pool = (await adb.engine("acme")).sync_engine.pool
    assert pool.checkedin() == 1  # type: ignore[attr-defined]

    async def emptied() -> None:
        while pool.checkedin():  # type: ignore[attr-defined]
            await asyncio.sleep(0)

    await adb.suspend("acme")
    await asyncio.wait_for(emptied(), 10)

    await adb.close()


def test_a_crowd_of_sign_ups_does_not_keep_anybody_from_signing_in(db: TenantDB) -> None:
    db.users.create("ada@clinic.test", "correct horse")
    signed_in = threading.Event()

    @db.seed
    def slow(session: Session, tenant: Tenant) -> None:
        assert signed_in.wait(20), "the sign-in waited behind the sign-ups"

    async def main() -> None:
        adb = AsyncTenantDB(db)
        crowd = [asyncio.ensure_future(adb.provision(f"clinic-{n}")) for n in range(9)]
        user = await adb.users.authenticate("ada@clinic.test", "correct horse")
        signed_in.set()
        assert user.email == "ada@clinic.test"
        await asyncio.gather(*crowd)
        await adb.close()

    asyncio.run(main())


def test_an_unescaped_at_sign_in_a_password_shows_nothing_of_it() -> None:
    with pytest.raises(ConfigError) as refused:
        ConnectionURL.parse("postgresql://app:hunter2@secretTail@db1/central")

    assert "secretTail" not in str(refused.value) and "hunter2" not in str(refused.value)


ENV = """
from types import SimpleNamespace
from tenantdb.migrations import run_env
run_env(SimpleNamespace(migrations=None), target_metadata=None)
"""
REVISION = """
from alembic import op
revision, down_revision = {revision!r}, {down!r}
def upgrade():
    for statement in {statements!r}:
        op.execute(statement)
"""


def test_a_migration_that_leaves_rows_without_what_they_refer_to_is_undone(sqlite_world: SQLiteWorld, tmp_path: Path) -> None:
    """Migrations run with foreign keys off, so nothing else would notice."""
    (tmp_path / "versions").mkdir()
    (tmp_path / "env.py").write_text(ENV)
    tables = ["CREATE TABLE p (id INTEGER PRIMARY KEY)", "CREATE TABLE c (p INTEGER REFERENCES p ON DELETE CASCADE)"]
    rows = ["INSERT INTO p VALUES (1)", "INSERT INTO c VALUES (1)"]
    (tmp_path / "versions" / "a.py").write_text(REVISION.format(revision="a", down=None, statements=[*tables, *rows]))
    db = sqlite_world.make_db(migrations=str(tmp_path))
    db.provision("acme")
    (tmp_path / "versions" / "b.py").write_text(REVISION.format(revision="b", down="a", statements=["DELETE FROM p"]))

    with pytest.raises(MigrationError, match="1 rows that refer to rows that are not there"):
        db.migrations.upgrade("acme")

    with db.session("acme") as session:
        assert session.scalar(text("SELECT count(*) FROM p")) == 1
    assert db.tenants.get("acme").revision == "a"
