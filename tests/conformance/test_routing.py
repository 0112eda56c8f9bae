"""From a tenant's name to its own rows, by every way in, and never to anything else."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable

import pytest
from sqlalchemy import insert, text, update
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError, StatementError
from sqlalchemy.orm import DeclarativeBase, Session

from tenantdb import AsyncTenantDB, Budget, Tenant, TenantDB, current_tenant, errors
from tenantdb.registry.tables import tenants
from tests.conformance.app import MARKER, NOTES, markers, note, notes
from tests.conformance.colours import WAYS, Face, MakeFace
from tests.conformance.conftest import Estate

every_way = pytest.mark.parametrize("way", WAYS)


@every_way
async def test_a_named_tenant_is_reached_and_no_other(face: Face, acme: Tenant, beta: Tenant, way: str) -> None:
    assert await face.read(way, "acme") == "acme"
    assert await face.read(way, "beta") == "beta"
    assert await face.read(way, "acme") == "acme"


@every_way
async def test_a_tenant_goes_by_slug_id_record_and_the_ids_text_in_either_case(face: Face, acme: Tenant, way: str) -> None:
    for key in ("acme", acme.id, acme, str(acme.id), str(acme.id).upper()):
        assert await face.read(way, key) == "acme"


@every_way
async def test_an_odd_spelling_of_an_id_or_slug_names_no_tenant(face: Face, acme: Tenant, way: str) -> None:
    odd = ["ACME", " acme", "acme\n", "", "\u00e4cme", f"{{{acme.id}}}", f"urn:uuid:{acme.id}", acme.id.hex, 7, b"acme"]
    for key in odd:
        with pytest.raises(errors.InvalidTenantKey):
            await face.read(way, key)


@every_way
async def test_an_unknown_tenant_is_not_found_by_slug_or_by_id_and_not_when_remembered_either(face: Face, way: str) -> None:
    for key in ("nobody", uuid.uuid4()):
        for _ in range(2):
            with pytest.raises(errors.TenantNotFound) as caught:
                await face.read(way, key)
            assert type(caught.value) is errors.TenantNotFound


@every_way
async def test_without_a_tenant_there_is_no_way_in(face: Face, acme: Tenant, way: str) -> None:
    with pytest.raises(errors.NoTenantBound):
        await face.read(way)


def test_only_the_ways_in_can_be_asked_without_a_tenant(db: TenantDB) -> None:
    """C1: a method that is new here and may do without one has to be among the ways that the test above tries."""
    for database in (db, AsyncTenantDB(db)):
        tenants = {
            name: inspect.signature(getattr(database, name)).parameters.get("tenant")
            for name in dir(database)
            if not name.startswith("_") and inspect.isroutine(getattr(database, name))
        }
        optional = {name for name, tenant in tenants.items() if tenant and tenant.default is not tenant.empty}
        assert optional == {*WAYS, "doctor"}  # which looks at all of them, and shows nobody's rows


def test_what_is_done_for_the_bound_tenant_is_refused_where_none_is(db: TenantDB) -> None:
    """C1: nothing falls back to the registry, which the process could write to."""

    class Row(DeclarativeBase):
        pass

    class Note(Row):
        __table__ = notes.to_metadata(Row.metadata)

    ways: list[Callable[[], object]] = [
        current_tenant,
        db.session,
        lambda: db.begin().__enter__(),
        lambda: db.connect().__enter__(),
        db.engine,
        lambda: db.session().execute(insert(Note), [{"id": 1}, {"id": 2}]),
        lambda: db.session().bulk_insert_mappings(Note, [{"id": 1}]),  # type: ignore[arg-type]
        lambda: db.audit.record(db.session(), "note.read"),
    ]
    for way in ways:
        with pytest.raises(errors.NoTenantBound):
            way()


async def test_a_session_does_not_commit_by_itself(face: Face, fresh: Tenant) -> None:
    async with face.session(fresh) as session:
        await session.execute(note(1))
    assert await face.rows(NOTES, fresh) == []

    async with face.session(fresh) as session:
        await session.execute(note(1))
        await session.commit()
    assert await face.rows(NOTES, fresh) == [1]


async def test_a_connection_does_not_commit_by_itself(face: Face, fresh: Tenant) -> None:
    async with face.connect(fresh) as connection:
        await connection.execute(note(1))
    assert await face.rows(NOTES, fresh) == []


async def test_begin_commits_when_the_block_ends_well_and_rolls_back_when_it_raises(face: Face, fresh: Tenant) -> None:
    class Mine(Exception):
        pass

    mine = Mine()
    with pytest.raises(Mine) as caught:
        async with face.begin(fresh) as session:
            await session.execute(note(1))
            raise mine
    assert caught.value is mine
    assert await face.rows(NOTES, fresh) == []

    async with face.begin(fresh) as session:
        await session.execute(note(1))
    assert await face.rows(NOTES, fresh) == [1]


async def test_an_integrity_error_of_the_user_passes_unchanged(face: Face, acme: Tenant) -> None:
    with pytest.raises(IntegrityError) as caught:
        async with face.begin("acme") as session:
            await session.execute(insert(markers).values(slug="acme"))
    assert type(caught.value) is IntegrityError
    assert caught.value.orig is not None


async def test_an_error_in_a_statement_of_the_user_passes_unchanged(face: Face, acme: Tenant) -> None:
    async with face.session("acme") as session:
        with pytest.raises((ProgrammingError, StatementError)) as caught:
            await session.execute(text("SELECT * FROM no_such_table"))
    assert not isinstance(caught.value, errors.TenantDBError)
    assert "no_such_table" in str(caught.value)


async def test_a_failed_statement_does_not_stay_with_the_connection(make_face: MakeFace, acme: Tenant) -> None:
    face = make_face(budget=Budget(per_tenant=1))  # one connection, so that the next session gets the same
    async with face.session("acme") as session:
        with pytest.raises((ProgrammingError, StatementError)):
            await session.execute(text("SELECT * FROM no_such_table"))
    assert await face.marker("acme") == "acme"


async def test_a_transaction_left_open_is_rolled_back_before_the_connection_serves_again(make_face: MakeFace, fresh: Tenant) -> None:
    face = make_face(budget=Budget(per_tenant=1))
    if face.adb is None:
        left_open = face.db.engine(fresh).connect()
        left_open.execute(note(1))
        left_open.close()
    else:
        also = await (await face.adb.engine(fresh)).connect()
        await also.execute(note(1))
        await also.close()
    assert await face.rows(NOTES, fresh) == []


async def test_a_session_keeps_its_tenant_when_another_is_bound_later(face: Face, acme: Tenant, beta: Tenant) -> None:
    early = face.session("acme")
    async with face.bound("beta"):
        async with early as session:
            assert await session.scalar(MARKER) == "acme"
        assert await face.marker() == "beta"


async def test_a_session_of_the_bound_tenant_keeps_it_when_the_block_has_ended(face: Face, acme: Tenant) -> None:
    async with face.bound("acme"):
        session = face.session()
    async with session:
        assert await session.scalar(MARKER) == "acme"


async def test_a_closed_session_can_be_used_again_and_is_its_tenants_still(face: Face, acme: Tenant, beta: Tenant) -> None:
    session = face.session("acme")
    assert await session.scalar(MARKER) == "acme"
    await session.close()
    assert await face.marker("beta") == "beta"
    assert await session.scalar(MARKER) == "acme"
    await session.close()


async def test_two_sessions_of_one_tenant_are_two_transactions(face: Face, fresh: Tenant) -> None:
    async with face.session(fresh) as one, face.session(fresh) as two:
        await one.execute(note(1))
        assert (await two.scalars(NOTES)).all() == []
        await one.rollback()


async def test_a_savepoint_works_as_always(face: Face, fresh: Tenant) -> None:
    async with face.begin(fresh) as session:
        await session.execute(note(1))
        savepoint = session.begin_nested() if face.adb else await session.begin_nested()
        if face.adb:
            savepoint = await savepoint
        await session.execute(note(2))
        (await savepoint.rollback()) if face.adb else savepoint.rollback()
        await session.execute(note(3))
    assert await face.rows(NOTES, fresh) == [1, 3]


# -- what may not be served ------------------------------------------------------------------------------------------------------------


async def test_a_session_made_before_a_suspension_is_refused_at_its_next_transaction(face: Face, fresh: Tenant) -> None:
    session = face.session(fresh)
    assert await session.scalar(MARKER) == fresh.slug
    await session.rollback()

    await face.do.suspend(fresh)
    with pytest.raises(errors.TenantSuspended):
        await session.scalar(MARKER)
    await session.close()

    await face.do.activate(fresh)
    assert await session.scalar(MARKER) == fresh.slug
    await session.close()


async def test_a_transaction_under_way_when_its_tenant_is_suspended_is_ended_by_the_server(
    face: Face, fresh: Tenant, estate: Estate
) -> None:
    async with face.session(fresh) as session:
        await session.execute(note(1))
        await face.do.suspend(fresh)
        if estate.world.backend == "sqlite":  # there is no server that could
            assert await session.scalar(MARKER) == fresh.slug
            await session.commit()
        else:
            with pytest.raises(OperationalError, match="AdminShutdown"):
                await session.scalar(MARKER)
            await session.rollback()
        with pytest.raises(errors.TenantSuspended):
            await session.scalar(MARKER)


async def test_an_unservable_tenant_is_refused_at_the_call_where_its_record_is_in_memory(face: Face, fresh: Tenant) -> None:
    await face.do.suspend(fresh)
    with pytest.raises(errors.TenantSuspended):
        await face.do.resolve(fresh)

    with pytest.raises(errors.TenantSuspended):
        face.session(fresh)


async def test_an_unservable_tenant_is_refused_at_the_first_statement_at_the_latest(face: Face, fresh: Tenant) -> None:
    await face.do.suspend(fresh)
    async with face.session(fresh) as session:
        with pytest.raises(errors.TenantSuspended):
            await session.scalar(MARKER)


@every_way
@pytest.mark.parametrize(
    ("state", "error"),
    [
        ("suspended", errors.TenantSuspended),
        ("maintenance", errors.TenantNotReady),
        ("provisioning", errors.TenantNotReady),
        ("failed", errors.TenantNotReady),
        ("deleted", errors.TenantNotFound),
        ("purging", errors.TenantNotFound),
        ("purged", errors.TenantNotFound),
    ],
)
async def test_only_an_active_tenant_is_served(
    face: Face, estate: Estate, acme: Tenant, way: str, state: str, error: type[errors.TenantDBError]
) -> None:
    change = update(tenants).where(tenants.c.id == acme.id)
    with estate.world.registry(estate.db) as registry:
        registry.execute(change.values(state=state))
    try:
        for _ in range(2):  # unknown to this process, and known
            with pytest.raises(error):
                await face.read(way, "acme")
    finally:
        with estate.world.registry(estate.db) as registry:
            registry.execute(change.values(state="active"))


# -- nothing leads a session elsewhere -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["bind", "binds", "twophase", "sync_session_class"])
async def test_an_option_that_would_lead_a_session_elsewhere_is_refused(face: Face, acme: Tenant, option: str) -> None:
    with pytest.raises(errors.ConfigError, match=option):
        face.session("acme", **{option: True})


def test_a_bind_given_with_a_statement_is_refused(db: TenantDB, acme: Tenant, beta: Tenant) -> None:
    with db.session("acme") as session:
        with pytest.raises(errors.ConfigError):
            session.execute(MARKER, bind_arguments={"bind": db.engine("beta")})
        assert session.scalar(MARKER) == "acme"


def test_a_bind_given_for_the_connection_is_refused(db: TenantDB, acme: Tenant, beta: Tenant) -> None:
    with db.session("acme") as session:
        with pytest.raises(errors.ConfigError):
            session.connection(bind_arguments={"bind": db.engine("beta")})
        assert session.connection(execution_options={"stream_results": False}).scalar(MARKER) == "acme"


def test_a_session_is_of_the_applications_class_with_its_options(db: TenantDB, acme: Tenant) -> None:
    class Ours(Session):
        pass

    with TenantDB(db.settings, session_class=Ours, session_options={"info": {"app": "clinic"}}) as ours:
        with ours.session("acme", autoflush=False) as session:
            assert isinstance(session, Ours)
            assert session.info["app"] == "clinic"
            assert session.autoflush is False
            assert session.scalar(MARKER) == "acme"
