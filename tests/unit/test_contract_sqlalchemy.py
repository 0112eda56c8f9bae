"""What tenantdb assumes of SQLAlchemy's internals, held to it on every version that is supported. See tenantdb.connections.sqla."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import create_engine, event, select
from sqlalchemy import inspect as inspect_mapper
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, make_transient, mapped_column, object_session
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.pool import NullPool, Pool, StaticPool
from sqlalchemy.pool.base import _ConnectionRecord
from sqlalchemy.util import await_only

from tenantdb.connections.sqla import BudgetedPool, Record, TenantEngine


class OnePool(BudgetedPool):
    """A pool that always connects, and tells what SQLAlchemy asked of it."""

    def __init__(self, template: Engine) -> None:
        super().__init__(template)
        self.returned: list[Any] = []
        self.finished: list[Any] = []
        self.failure: Exception | None = None

    def _do_get(self) -> Any:
        return Record(self, unit="a place", deadline=0.0)

    def _open(self, record: Record) -> Any:
        assert record.unit == "a place"
        if self.failure is not None:
            raise self.failure
        return sqlite3.connect(":memory:")

    def _do_return_conn(self, record: Any) -> None:
        self.returned.append(record.dbapi_connection)
        record.close()

    def _finish(self, connection: Any) -> None:
        self.finished.append(connection)
        connection.close()

    def recreate(self) -> OnePool:
        return OnePool(self.template)

    def dispose(self) -> None: ...


@pytest.fixture
def template() -> Iterator[Engine]:
    engine = create_engine("sqlite://", poolclass=NullPool)
    yield engine
    engine.dispose()


@pytest.fixture
def pool(template: Engine) -> OnePool:
    return OnePool(template)


@pytest.fixture
def engine(pool: OnePool, template: Engine) -> TenantEngine:
    return TenantEngine(pool, template.url, template)


def test_an_engine_may_be_made_from_a_pool_a_dialect_and_a_url() -> None:
    parameters = list(inspect.signature(Engine.__init__).parameters)
    assert parameters[1:4] == ["pool", "dialect", "url"]
    assert {"query_cache_size", "hide_parameters"} <= set(parameters)


def test_engines_share_one_compiled_cache_and_compile_a_statement_once(pool: OnePool, template: Engine) -> None:
    first, second = (TenantEngine(OnePool(template), template.url, template) for _ in range(2))
    for engine in (first, second, first):
        with engine.connect() as connection:
            assert connection.scalar(select(1)) == 1
    assert first._compiled_cache is second._compiled_cache is template._compiled_cache
    assert template._compiled_cache is not None
    assert len(template._compiled_cache) == 1


def test_the_dialect_is_initialised_by_the_first_connect_of_any_engine_and_never_again(
    template: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    initialised: list[Any] = []
    initialize = type(template.dialect).initialize
    monkeypatch.setattr(type(template.dialect), "initialize", lambda self, c: (initialised.append(c), initialize(self, c)))
    for _ in range(3):
        with TenantEngine(OnePool(template), template.url, template).connect() as connection:
            assert connection.dialect.default_schema_name == "main"
    assert len(initialised) == 1


@pytest.mark.parametrize("waits", [True, False], ids=["", "control"])
def test_who_connects_while_the_dialect_is_initialised_waits_for_that(
    template: Engine, monkeypatch: pytest.MonkeyPatch, *, waits: bool
) -> None:
    under_way, go_on = threading.Event(), threading.Event()
    initialize = template.dialect.initialize

    def slow(connection: Connection) -> None:
        under_way.set()
        assert go_on.wait(30)
        initialize(connection)

    monkeypatch.setattr(template.dialect, "initialize", slow)
    one, other = (TenantEngine(pool, template.url, template) for pool in (OnePool(template), OnePool(template)))
    if not waits:
        other.pool.initialisation = SimpleNamespace(done=True)  # type: ignore[attr-defined]

    def connect(engine: Engine) -> bool:
        with engine.connect():
            return hasattr(template.dialect, "default_isolation_level")

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(connect, one)
        assert under_way.wait(30)
        second = threads.submit(connect, other)
        assert not wait([second], timeout=0.2).done or not waits
        if not waits:
            second.result(30)
        go_on.set()
        assert first.result(30)
    assert second.result() is waits


@pytest.mark.parametrize("waits", [True, False], ids=["", "control"])
def test_and_so_does_a_task(monkeypatch: pytest.MonkeyPatch, *, waits: bool) -> None:
    template = create_async_engine("sqlite+aiosqlite://").sync_engine
    initialize = template.dialect.initialize

    under_way, go_on = asyncio.Event(), asyncio.Event()

    def slow(connection: Connection) -> None:
        under_way.set()
        await_only(go_on.wait())
        initialize(connection)

    monkeypatch.setattr(template.dialect, "initialize", slow)

    class AsyncPool(OnePool):
        def _open(self, record: Record) -> Any:
            return template.dialect.connect(":memory:")

    async def connect() -> bool:
        pool = AsyncPool(template)
        if not waits:
            pool.initialisation = SimpleNamespace(done=True)  # type: ignore[assignment]
        async with AsyncEngine(TenantEngine(pool, template.url, template)).connect():
            return hasattr(template.dialect, "default_isolation_level")

    async def both() -> list[bool]:
        first = asyncio.create_task(connect())
        await asyncio.wait_for(under_way.wait(), 30)
        second = asyncio.create_task(connect())
        done, _ = await asyncio.wait([second], timeout=0.2 if waits else 30)
        assert bool(done) is not waits
        go_on.set()
        return [await first, await second]

    assert asyncio.run(both()) == [True, waits]


def test_after_an_initialisation_that_failed_the_next_connection_does_it(template: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    initialize, failures = template.dialect.initialize, [RuntimeError("the server went away")]

    def unlucky(connection: Connection) -> None:
        if failures:
            raise failures.pop()
        initialize(connection)

    monkeypatch.setattr(template.dialect, "initialize", unlucky)
    engine = TenantEngine(OnePool(template), template.url, template)
    with pytest.raises(RuntimeError, match="went away"):
        engine.connect()
    with engine.connect():
        assert hasattr(template.dialect, "default_isolation_level")


def test_listeners_of_the_template_hear_every_engine_also_those_that_came_later(template: Engine) -> None:
    heard: list[str] = []
    early = TenantEngine(OnePool(template), template.url, template)
    event.listen(template, "before_cursor_execute", lambda *arguments: heard.append(arguments[2]))
    late = TenantEngine(OnePool(template), template.url, template)
    for engine in (early, late):
        with engine.connect() as connection:
            connection.exec_driver_sql("SELECT 7")
    assert heard == ["SELECT 7", "SELECT 7"]


def test_a_record_can_be_made_unconnected_and_is_connected_at_checkout(engine: TenantEngine, pool: OnePool) -> None:
    assert Record(pool, unit=None, deadline=0.0).dbapi_connection is None
    with engine.connect() as connection:
        assert connection.scalar(select(1)) == 1
    assert len(pool.returned) == len(pool.finished) == 1


def test_a_connect_that_fails_returns_its_record_without_a_connection(engine: TenantEngine, pool: OnePool) -> None:
    pool.failure = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        engine.connect()
    assert pool.returned == [None]


def test_an_invalidated_connection_is_closed_by_the_pool_and_its_record_returned_empty(engine: TenantEngine, pool: OnePool) -> None:
    with engine.connect() as connection:
        connection.invalidate()
        assert (len(pool.finished), pool.returned) == (1, [None])
        assert connection.scalar(select(1)) == 1  # a new lease
    assert len(pool.finished) == 2


def test_a_detached_connection_returns_its_record_empty_and_is_closed_by_the_pool_later(engine: TenantEngine, pool: OnePool) -> None:
    with engine.connect() as connection:
        connection.detach()
        assert (pool.finished, pool.returned) == ([], [None])
    assert len(pool.finished) == 1


class Wanted(Exception):
    pass


def refuse(*_: Any) -> None:
    raise Wanted


def test_a_record_goes_back_closed_when_a_listener_of_the_return_raises(engine: TenantEngine, pool: OnePool) -> None:
    event.listen(pool, "checkin", refuse)
    connection = engine.connect()
    with pytest.raises(Wanted):
        connection.close()
    assert (len(pool.finished), pool.returned) == (1, [None])


def test_a_record_is_closed_also_when_a_listener_of_that_raises(engine: TenantEngine, pool: OnePool) -> None:
    event.listen(pool, "close", refuse)
    connection = engine.connect()
    with pytest.raises(Wanted):
        connection.close()
    assert len(pool.finished) == len(pool.returned) == 1


def test_a_record_goes_back_when_a_listener_of_its_invalidation_raises(engine: TenantEngine, pool: OnePool) -> None:
    event.listen(pool, "checkout", refuse)
    event.listen(pool, "invalidate", refuse)
    with pytest.raises(Wanted):
        engine.connect()
    assert len(pool.finished) == len(pool.returned) == 1


class Row(DeclarativeBase):
    __abstract__ = True


class Note(Row):
    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)


class Followed(Session):
    """Tells by which way it asks for a connection."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: list[str] = []

    def get_bind(self, *args: Any, **options: Any) -> Any:
        self.asked.append("bind in a flush" if self._flushing else "bind")
        return super().get_bind(*args, **options)

    def _connection_for_bind(self, *args: Any, **options: Any) -> Any:
        self.asked.append("connection")
        return super()._connection_for_bind(*args, **options)


def test_a_session_connects_by_one_method_and_its_unit_of_work_past_it(engine: TenantEngine) -> None:
    def flush(session: Session) -> None:
        session.add(Note(id=1))
        session.flush()

    def bulk(session: Session) -> None:
        session.bulk_insert_mappings(inspect_mapper(Note), [{"id": 1}])

    def ways(*steps: Callable[[Any], object]) -> list[str]:
        with Followed(engine) as session:
            for step in steps:
                with contextlib.suppress(OperationalError):  # there is no such table
                    step(session)
            return session.asked

    ask = select(1)
    ordinary = ["bind", "connection"]
    assert ways(lambda session: session.execute(ask)) == ways(lambda session: session.scalar(ask)) == ordinary
    assert ways(lambda session: session.connection()) == ways(lambda session: session.get(Note, 1)) == ordinary
    assert ways(flush) == ways(bulk) == ["bind in a flush"]


@pytest.fixture
def memory() -> Iterator[Engine]:
    """With a table of notes."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    Note.metadata.create_all(engine)
    yield engine
    engine.dispose()


class Leaving(Session):
    """Notes how objects leave, and which are merged."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.left: list[str] = []
        super().__init__(*args, **options)

    def expunge_all(self) -> None:
        self.left.append("all")
        super().expunge_all()

    def _expunge_states(self, states: Any, *args: Any, **options: Any) -> None:
        self.left.append(f"{len(list(states))} of them")
        super()._expunge_states(states, *args, **options)

    def _merge(self, *args: Any, **options: Any) -> Any:
        self.left.append("merged")
        return super()._merge(*args, **options)


def test_objects_leave_a_session_by_two_methods_and_are_merged_by_one(memory: Engine) -> None:
    kept = []

    def note_in(session: Session) -> Note:
        session.add(made := Note(id=1))
        session.flush()
        kept.append(made)
        return made

    def ways(step: Callable[[Any], object]) -> list[str]:
        with Leaving(memory) as session:
            step(session)
            return session.left.copy()

    assert ways(lambda session: session.expunge(note_in(session))) == ["1 of them"]
    assert ways(lambda session: make_transient(note_in(session))) == ["1 of them"]
    assert ways(lambda session: note_in(session) and session.rollback()) == ["1 of them"]
    assert ways(lambda session: note_in(session) and session.close()) == ["all"]
    assert ways(lambda session: session.merge(Note(id=1))) == ["merged"]


def test_objects_hold_the_key_of_their_session_also_when_it_has_been_collected(memory: Engine) -> None:
    class Key(int):
        pass

    session = Session(memory)
    session.hash_key = key = Key(session.hash_key)
    session.add_all([Note(id=1), Note(id=2)])
    session.commit()
    session.expunge_all()
    loaded, added = session.get(Note, 1), Note(id=3)
    session.add(added)
    held = [instance_state(note) for note in (loaded, added)]
    assert [object_session(note) for note in (loaded, added)] == [session, session]
    session.rollback()
    del session
    gc.collect()

    assert held[0].session is None
    assert held[0].session_id is key
    assert held[1].session_id is None  # rolled back


def test_disposing_of_an_engine_gives_it_another_pool(engine: TenantEngine, pool: OnePool) -> None:
    engine.dispose()
    assert engine.pool is not pool
    assert isinstance(engine.pool, OnePool)


def test_the_hooks_have_the_signatures_that_are_overridden() -> None:
    assert list(inspect.signature(Pool._close_connection).parameters) == ["self", "connection", "terminate"]
    assert list(inspect.signature(Pool._invalidate).parameters) == ["self", "connection", "exception", "_checkin"]
    assert list(inspect.signature(_ConnectionRecord.__init__).parameters) == ["self", "pool", "connect"]
    assert list(inspect.signature(_ConnectionRecord.checkin).parameters) == ["self", "_fairy_was_created"]
    assert list(inspect.signature(_ConnectionRecord._checkin_failed).parameters) == ["self", "err", "_fairy_was_created"]
    assert list(inspect.signature(_ConnectionRecord.close).parameters) == ["self"]
    assert list(inspect.signature(Pool._return_conn).parameters) == ["self", "record"]
    assert list(inspect.signature(Session._connection_for_bind).parameters) == ["self", "engine", "execution_options", "kw"]
    assert list(inspect.signature(Pool._should_wrap_creator).parameters) == ["self", "creator"]
    assert list(inspect.signature(Session._merge).parameters)[:2] == ["self", "state"]
    assert list(inspect.signature(Session._expunge_states).parameters) == ["self", "states", "to_transient"]
    for name in ("_do_get", "_do_return_conn", "recreate", "dispose"):
        with pytest.raises(NotImplementedError):
            getattr(Pool, name)(*([None] * len(inspect.signature(getattr(Pool, name)).parameters)))


def test_the_connection_of_a_pool_has_its_record(engine: TenantEngine) -> None:
    with engine.connect() as connection:
        assert connection.connection._connection_record.unit == "a place"
