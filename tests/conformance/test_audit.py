"""What is done to a tenant's records is written down in its own database, in the same transaction, and nobody changes it unnoticed."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from tenantdb import Tenant, TenantDB, acting
from tenantdb.errors import AuditNotReady, NotATenantsSession, TenantDBError
from tenantdb.model import Break
from tests.conformance.app import NOTES
from tests.conformance.app import note as added
from tests.conformance.colours import Face, MakeProcess
from tests.conformance.conftest import Estate

INJECTION = "p\r\n2030-01-01 admin deleted everything\x1b[2J\x00\u2028"


def log_in(estate: Estate) -> tuple[str, str]:
    """The names of the log and of its head."""
    if estate.backend == "postgresql":
        return "tenantdb.audit", "tenantdb.audit_head"
    return "tenantdb_audit_records", "tenantdb_audit_records_head"


def tamper(estate: Estate, tenant: Tenant, *statements: str) -> None:
    """As whoever owns the tables; on SQLite triggers keep nobody who can drop them."""
    log, head = log_in(estate)
    with estate.world.inside(tenant, estate.db) as connection:
        if estate.backend == "sqlite":
            connection.execute(text("DROP TRIGGER tenantdb_audit_records_unchanged"))
            connection.execute(text("DROP TRIGGER tenantdb_audit_records_kept"))
        for statement in statements:
            connection.execute(text(statement.format(log=log, head=head)))


async def note(face: Face, tenant: Tenant, *objects: Any) -> None:
    for each in objects:
        async with face.begin(tenant) as session:
            await record(face, session, "note.read", each)


async def record(face: Face, session: Any, action: str, *args: Any, **said: Any) -> None:
    session = session if face.adb else session._target
    await face.do.audit.record(session, action, *args, **said)


@pytest.fixture
def mine(new_estate: Estate) -> Tenant:
    """A tenant whose log the test may spoil."""
    return new_estate.tenant()


async def test_an_entry_is_committed_with_what_it_tells_of_and_gone_with_it(face: Face, fresh: Tenant) -> None:
    before = len(await face.do.audit.search(fresh, records=True, action="note.", limit=1000))
    with acting("ada", "r-7", "10.0.0.9"):
        async with face.begin(fresh) as session:
            await session.execute(added(1))
            await record(face, session, "note.create", 1, reason="treatment", details={"fields": ["text"]})
        with pytest.raises(ZeroDivisionError):
            async with face.begin(fresh) as session:
                await record(face, session, "note.create", 2)
                raise ZeroDivisionError

    entries = await face.do.audit.search(fresh, records=True, action="note.", limit=1000)

    assert len(entries) == before + 1
    entry = entries[0]
    assert (entry.actor, entry.request_id, entry.source, entry.reason) == ("ada", "r-7", "10.0.0.9", "treatment")
    assert (entry.action, entry.object, entry.tenant_id, entry.details) == ("note.create", "1", fresh.id, {"fields": ["text"]})
    assert (await face.do.audit.verify(fresh, records=True)).ok


async def test_a_session_that_is_no_tenants_is_refused(face: Face, acme: Tenant) -> None:
    with pytest.raises(NotATenantsSession, match="Session"):
        await face.do.audit.record(Session(), "note.read", 1)


def test_what_cannot_be_written_down_does_not_happen(new_estate: Estate, mine: Tenant) -> None:
    _, head = log_in(new_estate)
    with new_estate.world.inside(mine, new_estate.db) as connection:
        connection.execute(text(f"DROP TABLE {head}"))
    db = new_estate.world.twin(new_estate.db)
    with pytest.raises(AuditNotReady, match="doctor --repair"), db.begin(mine) as session:
        session.execute(added(1))
        db.audit.record(session, "note.create", 1)

    with db.session(mine) as session:
        assert session.scalars(NOTES).all() == []
    db.close()


def test_a_privileged_operation_that_cannot_be_written_down_does_not_happen(new_estate: Estate, mine: Tenant) -> None:
    world, db = new_estate.world, new_estate.db

    def close_the_log(connection: Connection) -> None:
        if new_estate.backend == "postgresql":
            connection.execute(text("REVOKE INSERT ON tenantdb_audit FROM app, admin"))
            connection.execute(text("ALTER TABLE tenantdb_audit OWNER TO postgres"))
        else:
            connection.execute(
                text("CREATE TRIGGER full BEFORE INSERT ON tenantdb_audit BEGIN SELECT RAISE(ABORT, 'the disk is full'); END")
            )

    generation = db.tenants.get(mine.id).generation
    with world.registry(db) as connection:
        close_the_log(connection)
    for refused in (
        lambda: db.suspend(mine.id),
        lambda: db.update(mine.id, plan="pro"),
        lambda: db.users.create("a@b.example", "long enough"),
    ):
        with pytest.raises((TenantDBError, DBAPIError)):
            refused()

    now = db.tenants.get(mine.id)
    assert (now.servable, now.plan, now.generation) == (True, None, generation)
    with pytest.raises(TenantDBError):
        db.users.get("a@b.example")


def test_many_who_record_at_once_leave_one_unbroken_chain(process: MakeProcess, fresh: Tenant) -> None:
    db = process()

    def write(number: int) -> None:
        with db.begin(fresh) as session:
            db.audit.record(session, "crowd", number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(100)))

    assert db.audit.verify(fresh, records=True).ok
    assert len({entry.object for entry in db.audit.search(fresh, records=True, action="crowd", limit=1000)}) == 100


async def test_many_coroutines_who_record_at_once_too(face: Face, fresh: Tenant) -> None:
    if face.adb is None:
        pytest.skip("threads are the test before")
    before = (await face.do.audit.verify(fresh, records=True)).entries
    await asyncio.gather(*(note(face, fresh, number) for number in range(50)))
    report = await face.do.audit.verify(fresh, records=True)

    assert (report.ok, report.entries) == (True, before + 50)


TAMPERINGS = {
    "edited": (["UPDATE {log} SET actor = 'nobody' WHERE seq = 3"], 3, Break.EDITED),
    "missing": (["DELETE FROM {log} WHERE seq = 3"], 3, Break.MISSING),
    "reordered": (
        ["UPDATE {log} SET seq = -1 WHERE seq = 3", "UPDATE {log} SET seq = 3 WHERE seq = 4", "UPDATE {log} SET seq = 4 WHERE seq = -1"],
        3,
        Break.REORDERED,
    ),
    "forged": (
        ["INSERT INTO {log} (at, actor, action, outcome, details, seq, mac) SELECT at, actor, 'x', outcome, details, 3, mac FROM {log}"
         " WHERE seq = 5"],
        3,
        Break.FORGED,
    ),
    "tail": (["DELETE FROM {log} WHERE seq > 3"], 4, Break.MISSING),
    "head": (["UPDATE {head} SET seq = 4"], 5, Break.HEAD),
}  # fmt: skip


@pytest.fixture
def keyed(world: Any) -> Estate:
    """An estate with a key, on SQLite too."""
    from tenantdb.registry.secrets import generate_key

    return Estate(world) if world.backend == "postgresql" else Estate(world, secret_keys=[generate_key()])


@pytest.mark.parametrize("case", TAMPERINGS)
def test_whoever_owns_the_tables_is_found_out(keyed: Estate, case: str) -> None:
    statements, at, why = TAMPERINGS[case]
    db, mine = keyed.db, keyed.tenant()
    for number in range(5):
        with db.begin(mine) as session:
            db.audit.record(session, "note.read", number)
    assert db.audit.verify(mine, records=True).ok

    tamper(keyed, mine, *statements)

    (chain,) = db.audit.verify(mine, records=True).chains
    if case == "head":
        assert chain.why in (Break.HEAD, Break.FORGED)
    else:
        assert (chain.broken_at, chain.why) == (at, why)
    assert not chain.ok


def test_an_end_that_was_cut_off_is_missed_where_there_is_an_anchor(keyed: Estate, tmp_path: Any) -> None:
    db, mine = keyed.world.twin(keyed.db, audit_anchor=str(tmp_path / "anchor")), keyed.tenant()
    for number in range(5):
        with db.begin(mine) as session:
            db.audit.record(session, "note.read", number)
    db.audit.anchor(records=True)
    tamper(
        keyed,
        mine,
        "DELETE FROM {log} WHERE seq > 2",
        "UPDATE {head} SET seq = 2, mac = (SELECT mac FROM {log} WHERE seq = 2)",
    )

    assert keyed.db.audit.verify(mine, records=True).ok  # the twin: who has no anchor is none the wiser
    (chain,) = db.audit.verify(mine, records=True).chains
    assert (chain.broken_at, chain.why) == (3, Break.ANCHOR)
    assert db.audit.verify().ok
    db.close()


def test_what_a_user_wrote_stays_one_entry_and_verifies(process: MakeProcess, fresh: Tenant) -> None:
    db = process()
    with db.begin(fresh) as session:
        db.audit.record(session, "note.read", INJECTION, reason=INJECTION, details={INJECTION: [INJECTION, 1e16, 0.1, -0.0]})
    (entry,) = db.audit.search(fresh, records=True, object=INJECTION.replace("\x00", "\ufffd"))

    assert entry.reason == INJECTION.replace("\x00", "\ufffd")
    assert db.audit.verify(fresh, records=True).ok


def test_the_registrys_chains_hold_on_this_backend(process: MakeProcess, fresh: Tenant) -> None:
    db = process()
    db.update(fresh, plan="pro")
    db.suspend(fresh)
    db.activate(fresh)
    report = db.audit.verify(fresh)

    assert report.ok
    assert report.entries == len(db.audit.list(fresh, limit=1000))


def test_tenants_move_while_others_write_to_their_chains(process: MakeProcess, fresh: Tenant) -> None:
    """Whoever holds a tenant's row writes to its chain last, so no two wait for each other."""
    db = process()

    def move(number: int) -> None:
        if number % 2:
            db.update(fresh, plan=f"plan-{number}")
        else:
            db.tenants.update(fresh, metadata={"n": number})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(move, range(60)))

    assert db.audit.verify(fresh).ok


def test_migrations_do_not_see_the_log(db: TenantDB, acme: Tenant) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext
    from sqlalchemy import MetaData

    with db.connect(acme) as connection:
        options = {"include_name": lambda name, kind, parents: not (kind == "table" and (name or "").startswith("tenantdb_"))}
        differences = compare_metadata(MigrationContext.configure(connection, opts=options), MetaData())

    assert not any("audit" in repr(difference) for difference in differences)
