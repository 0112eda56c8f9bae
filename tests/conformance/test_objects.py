"""An object belongs to its tenant: however it left that tenant's session, no session of another takes it, and nothing is sent."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete as sql_delete
from sqlalchemy import inspect, select
from sqlalchemy.exc import IntegrityError, InvalidRequestError, SAWarning, SQLAlchemyError
from sqlalchemy.orm import (
    DeclarativeBase,
    Session,
    make_transient,
    make_transient_to_detached,
    relationship,
    selectinload,
)
from sqlalchemy.orm.attributes import flag_modified
from sqlalchemy.orm.loading import merge_frozen_result

from tenantdb import Tenant, TenantDB
from tenantdb.connections import session as guard
from tenantdb.errors import CrossTenantError
from tests.conformance.app import markers, metadata, note, notes
from tests.conformance.colours import Face, MakeFace, MakeProcess
from tests.conformance.conftest import Estate
from tests.world import SQLiteWorld


class Base(DeclarativeBase):
    metadata = metadata


class Marker(Base):
    __table__ = markers
    notes = relationship("Note", back_populates="marker")


class Note(Base):
    __table__ = notes
    marker = relationship("Marker", back_populates="notes")
    only_named = relationship("Marker", cascade="", overlaps="marker,notes")


@dataclass
class Pair:
    """Two tenants, each with note 1 about its own marker."""

    db: TenantDB
    ours: Tenant
    theirs: Tenant


WayOut = Callable[[Session], Note]
WayIn = Callable[[Session, Note], None]


@contextmanager
def borrowed(estate: Estate) -> Iterator[Tenant]:
    """A tenant with note 1 about its own marker."""
    with estate.borrowed() as tenant:
        with estate.world.inside(tenant, estate.db) as connection:
            connection.execute(note(1, tenant.slug))
        yield tenant


@pytest.fixture
def ours(estate: Estate) -> Iterator[Tenant]:
    with borrowed(estate) as tenant:
        yield tenant


@pytest.fixture
def theirs(estate: Estate) -> Iterator[Tenant]:
    with borrowed(estate) as tenant:
        yield tenant


@pytest.fixture(scope="module")
def small_estate(sqlite_world: SQLiteWorld) -> Estate:
    """For what is the same on every backend, and tried in every combination."""
    return Estate(sqlite_world)


@pytest.fixture
def pair(small_estate: Estate) -> Iterator[Pair]:
    with borrowed(small_estate) as ours, borrowed(small_estate) as theirs:
        yield Pair(small_estate.db, ours, theirs)


async def within(face: Face, tenant: Any, work: Callable[[Session], Any]) -> Any:
    """``work(session)``, in plain code in both colours, in a session that is not committed."""
    async with face.session(tenant) as session:
        return await session.run_sync(work) if face.adb else work(session._target)


def what_they_have(db: TenantDB, theirs: Tenant) -> list[Any]:
    with db.connect(theirs) as connection:
        return [tuple(row) for row in connection.execute(select(notes).order_by(notes.c.id))]


# -- ways out of our session, each of which gives our note ------------------------------------------------------------------------------


def closed(session: Session) -> Note:
    return session.scalars(select(Note)).one()


def with_its_marker(session: Session) -> Note:
    return session.scalars(select(Note).options(selectinload(Note.marker))).one()


def expunged(session: Session) -> Note:
    session.expunge(found := closed(session))
    return found


def all_expunged(session: Session) -> Note:
    found = closed(session)
    session.expunge_all()
    return found


def committed_and_expired(session: Session) -> Note:
    found = closed(session)
    session.commit()
    return found


def rolled_back(session: Session) -> Note:
    found = closed(session)
    session.rollback()
    return found


def pickled_in_the_session(session: Session) -> Note:
    return pickle.loads(pickle.dumps(closed(session)))  # type: ignore[no-any-return]


def pickled_afterwards(session: Session) -> Note:
    session.expunge(found := closed(session))
    return pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(found))))  # type: ignore[no-any-return]


def copied(session: Session) -> Note:
    return copy.deepcopy(closed(session))


def made_transient(session: Session) -> Note:
    make_transient(found := closed(session))
    return found


def made_transient_and_detached(session: Session) -> Note:
    make_transient(found := closed(session))
    make_transient_to_detached(found)
    return found


def flushed_and_rolled_back(session: Session) -> Note:
    session.add(made := Note(id=7))
    session.flush()
    session.rollback()
    return made


def deleted_and_made_transient(session: Session) -> Note:
    session.delete(found := closed(session))
    session.commit()
    make_transient(found)
    return found


def merged_into_the_session(session: Session) -> Note:
    return session.merge(Note(id=1))


WAYS_OUT: list[WayOut] = [
    closed,
    with_its_marker,
    expunged,
    all_expunged,
    committed_and_expired,
    rolled_back,
    pickled_in_the_session,
    pickled_afterwards,
    copied,
    made_transient,
    made_transient_and_detached,
    flushed_and_rolled_back,
    deleted_and_made_transient,
    merged_into_the_session,
]
"""Functions whose note has left the session when that has been closed."""


# -- ways into theirs ---------------------------------------------------------------------------------------------------------------------


def add(session: Session, found: Note) -> None:
    session.add(found)


def add_all(session: Session, found: Note) -> None:
    session.add_all([Note(id=8), found])


def merge(session: Session, found: Note) -> None:
    session.merge(found)


def merge_unseen(session: Session, found: Note) -> None:
    session.merge(found, load=False)


def delete(session: Session, found: Note) -> None:
    session.delete(found)


def add_by_its_marker(session: Session, found: Note) -> None:
    session.add(Marker(slug="new", notes=[found]))


def add_to_a_marker_inside(session: Session, found: Note) -> None:
    session.add(marker := Marker(slug="new"))
    marker.notes.append(found)


def merge_by_its_marker(session: Session, found: Note) -> None:
    with session.no_autoflush:
        session.merge(Marker(slug="new", notes=[found]))


def refresh(session: Session, found: Note) -> None:
    session.refresh(found)


def bulk_save(session: Session, found: Note) -> None:
    session.bulk_save_objects([found])


def load_relationships(session: Session, found: Note) -> None:
    session.enable_relationship_loading(found)


WAYS_IN: list[WayIn] = [
    add, add_all, merge, merge_unseen, delete, add_by_its_marker, add_to_a_marker_inside, merge_by_its_marker, refresh, bulk_save,
    load_relationships,
]  # fmt: skip


@contextmanager
def silence(db: TenantDB) -> Iterator[list[str]]:
    """The statements that are sent in the block, to any tenant."""
    heard: list[str] = []
    listening = True

    def hear(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if listening:
            heard.append(statement)

    db.listen("before_cursor_execute", hear)
    yield heard
    listening = False


def refused(db: TenantDB, ours: Tenant, theirs: Tenant, found: Note, way_in: WayIn) -> None:
    with silence(db) as heard, db.session(theirs) as session, pytest.raises(CrossTenantError) as caught:
        way_in(session, found)
    assert heard == []
    assert (caught.value.kind, caught.value.owner, caught.value.tenant) == ("Note", str(ours.id), str(theirs.id))


@pytest.mark.parametrize("way_out", WAYS_OUT)
@pytest.mark.parametrize("way_in", WAYS_IN)
def test_however_an_object_left_its_session_and_however_it_is_to_enter_anothers_it_is_refused_before_anything_is_sent(
    pair: Pair, way_out: WayOut, way_in: WayIn
) -> None:
    with pair.db.session(pair.ours) as session:
        found = way_out(session)
    if way_in is delete and inspect(found).transient:
        return  # there is no row to delete, which SQLAlchemy says itself

    refused(pair.db, pair.ours, pair.theirs, found, way_in)

    assert what_they_have(pair.db, pair.theirs) == [(1, pair.theirs.slug)]


@pytest.mark.parametrize("way_out", WAYS_OUT)
def test_its_own_tenant_takes_it_back(pair: Pair, way_out: WayOut) -> None:
    with pair.db.session(pair.ours) as session:
        found = way_out(session)
    if inspect(found).transient:
        found.id = 2  # another row is made of it
    with pair.db.begin(pair.ours) as session:
        session.add(found)
        found.about = None
    assert (inspect(found).identity[0], None) in what_they_have(pair.db, pair.ours)


@pytest.mark.parametrize("way_in", WAYS_IN)
async def test_so_it_is_in_both_colours(face: Face, ours: Tenant, theirs: Tenant, way_in: WayIn) -> None:
    found = await within(face, ours, closed)

    with silence(face.db) as heard, pytest.raises(CrossTenantError):
        await within(face, theirs, lambda session: way_in(session, found))

    assert heard == []


async def test_its_own_tenant_takes_it_back_in_both_colours(face: Face, ours: Tenant) -> None:
    found = await within(face, ours, closed)
    found.about = None
    async with face.begin(ours) as session:
        merged = await session.merge(found)
        assert merged is not found
    assert what_they_have(face.db, ours) == [(1, None)]


# -- the guard's twin -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way_in", [add, merge, bulk_save])
def test_without_the_guard_the_row_of_one_tenant_is_written_into_anothers(
    db: TenantDB, ours: Tenant, theirs: Tenant, way_in: WayIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "refuse_foreign", lambda state, tenant_id: None)
    with db.session(ours) as session:
        found = closed(session)
    found.about = None

    with db.begin(theirs) as session:
        way_in(session, found)

    assert what_they_have(db, theirs) == [(1, None)]


# -- what is not in the table -----------------------------------------------------------------------------------------------------------


def test_a_session_that_was_collected_and_never_closed_has_told_whose_its_objects_are(db: TenantDB, ours: Tenant, theirs: Tenant) -> None:
    found = closed(db.session(ours))
    gc.collect()
    assert inspect(found).detached

    refused(db, ours, theirs, found, add)
    with db.begin(ours) as session:
        session.add(found)
        found.about = None
    assert what_they_have(db, ours) == [(1, None)]


@pytest.mark.parametrize("way_in", [merge, bulk_save, refresh])
def test_an_object_that_is_in_anothers_session_is_refused(db: TenantDB, ours: Tenant, theirs: Tenant, way_in: WayIn) -> None:
    with db.session(ours) as session:
        refused(db, ours, theirs, closed(session), way_in)
        session.add(pending := Note(id=9))
        refused(db, ours, theirs, pending, way_in)


@pytest.mark.parametrize("way_in", [add, delete, add_by_its_marker, load_relationships])
def test_an_object_that_is_in_anothers_session_is_not_attached(db: TenantDB, ours: Tenant, theirs: Tenant, way_in: WayIn) -> None:
    """SQLAlchemy says so itself."""
    with db.session(ours) as session, db.session(theirs) as other:
        found = closed(session)
        with silence(db) as heard, pytest.raises(InvalidRequestError, match="already attached"):
            way_in(other, found)
        assert heard == []


@pytest.mark.parametrize("way_in", [add, delete, merge, merge_unseen, bulk_save, add_by_its_marker])
@pytest.mark.parametrize("way_out", ["another database's", "made up"])
def test_an_object_with_a_row_of_which_nobody_knows_whose_it_is_is_refused(db: TenantDB, ours: Tenant, way_out: str, way_in: WayIn) -> None:
    if way_out == "made up":
        make_transient_to_detached(found := Note(id=1))
    else:
        with Session(db.engine(ours)) as plain:  # the same database, and not a tenant's session
            found = closed(plain)
    with db.session(ours) as session, silence(db) as heard, pytest.raises(CrossTenantError) as caught:
        way_in(session, found)
    assert heard == []
    assert caught.value.owner is None


def test_a_new_object_of_the_same_values_is_nobodys(db: TenantDB, ours: Tenant, theirs: Tenant) -> None:
    with db.session(ours) as session:
        found = closed(session)
    with db.begin(theirs) as session:
        session.add(Note(id=found.id + 1))
        session.merge(Note(id=found.id, about=None))
    assert what_they_have(db, theirs) == [(1, None), (2, None)]


def test_an_object_that_was_never_sent_anywhere_may_go_elsewhere(db: TenantDB, ours: Tenant, theirs: Tenant) -> None:
    made = Note(id=5)
    with db.session(ours) as session:
        session.add(made)
        session.rollback()
    with db.begin(theirs) as session:
        session.add(made)
    assert what_they_have(db, theirs) == [(1, theirs.slug), (5, None)]


def test_an_object_of_another_tenant_to_which_nothing_cascades_is_not_written(db: TenantDB, ours: Tenant, theirs: Tenant) -> None:
    with db.session(ours) as session:
        marker = with_its_marker(session).marker
    with pytest.warns(SAWarning, match="won't proceed"), db.begin(theirs) as session:
        session.add(Note(id=5, only_named=marker))
    assert what_they_have(db, theirs) == [(1, theirs.slug), (5, None)]


def test_a_cached_result_of_one_tenant_is_refused_by_another(db: TenantDB, ours: Tenant, theirs: Tenant) -> None:
    """By a cache whose key lacks the tenant."""
    query = select(Note)
    with db.session(ours) as session:
        cache = {str(query): session.execute(query).freeze()}
    with db.session(ours) as session:
        assert merge_frozen_result(session, query, cache[str(query)], load=False)().scalars().one().about == ours.slug
    with db.session(theirs) as session, silence(db) as heard, pytest.raises(CrossTenantError):
        merge_frozen_result(session, query, cache[str(query)], load=False)
    assert heard == []


async def test_the_same_key_in_two_tenants_is_two_objects(face: Face, ours: Tenant, theirs: Tenant) -> None:
    def get(session: Session) -> tuple[Note | None, str]:
        found = session.get(Note, 1)
        assert found is not None
        return found, found.about

    async with face.bound(ours):
        mine, about = await within(face, None, get)
        async with face.bound(theirs, switch=True):
            other, about_theirs = await within(face, None, get)
    assert mine is not other
    assert (about, about_theirs) == (ours.slug, theirs.slug)


async def test_a_session_goes_on_with_its_own_tenant_whatever_is_bound_later(face: Face, ours: Tenant, theirs: Tenant) -> None:
    about = select(notes.c.about)
    async with face.bound(ours):
        session = face.session()
    async with face.bound(theirs), session as opened:
        assert await opened.scalar(about) == ours.slug
        assert (await opened.get(Note, 1)).about == ours.slug
        await opened.rollback()
        assert await opened.scalar(about) == ours.slug


# -- a session that does not know its tenant yet ----------------------------------------------------------------------------------------


def test_where_the_tenant_is_not_known_by_its_id_yet_it_is_looked_up(process: MakeProcess, ours: Tenant, theirs: Tenant) -> None:
    with process().session(ours) as session:
        found = closed(session)
    for way_in in (add, merge, merge_unseen, delete, refresh, bulk_save):
        stranger = process()  # has not heard of the slug
        with silence(stranger) as heard, stranger.session(theirs.slug) as session, pytest.raises(CrossTenantError):
            way_in(session, found)
        assert heard == []


async def ask(session: Any) -> Any:
    return await session.execute(select(Note))


async def write(session: Any) -> Any:
    return await session.flush()


@pytest.mark.parametrize("first", [ask, write])
async def test_in_asyncio_it_is_looked_up_before_the_first_sql_is_sent(
    async_face: MakeFace, ours: Tenant, theirs: Tenant, first: Callable[[Any], Any]
) -> None:
    found = await within(async_face(), ours, closed)
    stranger = async_face()
    with silence(stranger.db) as heard:
        async with stranger.session(theirs.slug) as session:
            session.add(found)  # in no coroutine
            found.about = None
            for asked in (first, ask, ask):
                with pytest.raises(CrossTenantError):
                    await asked(session)
            with pytest.raises(CrossTenantError):
                await session.merge(found)
    assert heard == []
    refused(stranger.db, ours, theirs, found, add)  # it is still ours
    assert what_they_have(stranger.db, theirs) == [(1, theirs.slug)]


async def test_where_the_tenant_is_not_known_by_its_id_yet_its_own_objects_are_taken(make_face: MakeFace, ours: Tenant) -> None:
    found = await within(make_face(), ours, closed)
    found.about = None
    async with make_face().begin(ours.slug) as session:
        taken = session.add(found)
        assert taken is None or await taken is None
    assert what_they_have(make_face().db, ours) == [(1, None)]


# -- any history ------------------------------------------------------------------------------------------------------------------------

LEAVE = [Session.expunge, lambda session, found: make_transient(found), lambda session, found: session.expunge_all()]
ENTER = [add, merge, merge_unseen, delete, add_by_its_marker, merge_by_its_marker, bulk_save]
STEPS = ["load", "make", "leave", "copy", "enter", "commit", "roll back", "close", "lose"]
histories = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 1), st.integers(0, 50)), max_size=20)


def crosses(pair: Pair, history: list[tuple[str, int, int]]) -> bool:
    """Whether a row that is about one tenant came to be, or would have come to be but for the foreign key, in the other's database."""
    tenants = (pair.ours, pair.theirs)
    for tenant in tenants:
        with pair.db.begin(tenant) as session:
            session.execute(sql_delete(notes))
            session.execute(sql_delete(markers).where(markers.c.slug == "new"))
            session.execute(note(1, tenant.slug))
    sessions = [pair.db.session(tenant) for tenant in tenants]
    known: list[Any] = []

    def do(step: str, side: int, number: int) -> None:
        session = sessions[side]
        found = known[number % len(known)] if known else Note()
        if step == "load":
            known.extend(session.scalars(select(Note)))
        elif step == "make":
            session.add(made := Note(id=100 + 2 * number + side, about=tenants[side].slug))
            session.flush()
            known.append(made)
        elif step == "leave":
            LEAVE[number % len(LEAVE)](session, found)
        elif step == "copy":
            known.append(pickle.loads(pickle.dumps(found)))
        elif step == "enter":
            flag_modified(found, "about")
            ENTER[number % len(ENTER)](session, found)
        elif step == "commit":
            session.commit()
        elif step == "roll back":
            session.rollback()
        elif step == "close":
            session.close()
        else:  # it is lost, without a transaction that would keep others from writing
            session.commit()
            sessions[side] = pair.db.session(tenants[side])

    try:
        for step in [*history, ("commit", 0, 0), ("commit", 1, 0)]:
            try:
                do(*step)
            except IntegrityError as error:
                if "FOREIGN KEY" in str(error.orig):
                    return True
                sessions[step[1]].rollback()
            except (SQLAlchemyError, CrossTenantError, AssertionError):  # the last is how a flush of nonsense ends in SQLAlchemy
                sessions[step[1]].rollback()
        return any(
            about == tenants[1 - side].slug or (number >= 100 and number % 2 != side)
            for side in (0, 1)
            for number, about in what_they_have(pair.db, tenants[side])
        )
    finally:
        for session in sessions:
            session.close()


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")  # what is done makes little sense
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(histories)
def test_whatever_is_done_with_objects_no_row_of_one_tenant_comes_to_another(pair: Pair, history: list[tuple[str, int, int]]) -> None:
    assert not crosses(pair, history)


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
def test_without_the_guard_there_is_a_history_in_which_one_does(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "refuse_foreign", lambda state, tenant_id: None)

    searched = settings(max_examples=3000, deadline=None, phases=[Phase.generate], derandomize=True, database=None)
    assert find(histories, lambda history: crosses(pair, history), settings=searched)
