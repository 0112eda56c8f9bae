"""What one user leaves on a connection never reaches the next, nobody waits for that, and a connection that cannot be cleaned is closed.

Scenarios are written once, blocking; in the other colour they run inside SQLAlchemy's greenlet over an event loop.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus
from sqlalchemy import event, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, DisconnectionError, OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool
from sqlalchemy.util import await_only, greenlet_spawn

from tenantdb.backends.hangup import await_hangup, wait_for_hangup
from tenantdb.backends.postgresql import wire
from tenantdb.backends.postgresql.connect import session_options
from tenantdb.model import DatabaseRole
from tests.integration.cluster import Cluster, Login, Scripts, login
from tests.world import eventually

OPTIONS = {"statement_timeout": "6s", "search_path": "public"}
"""What a session starts with, by its start-up options."""


class DeferringSession(Session):
    """As the library's own session class does it."""


@event.listens_for(DeferringSession, "after_begin")
def defer(session: Session, transaction: Any, connection: Connection) -> None:
    connection.connection.driver_connection.defer()  # type: ignore[union-attr]


class Place:
    """A tenant's database, and the smallest pool that uses the wire: one connection."""

    def __init__(self, cluster: Cluster, runtime: Login, colour: str) -> None:
        self.cluster, self.runtime, self.colour = cluster, runtime, colour
        self.is_async = colour == "async"
        settings = cluster.settings(statement_timeout=6)
        self.arguments: dict[str, Any] = conninfo_to_dict(cluster.server.url(runtime.name, runtime.password, runtime.database))
        self.arguments |= session_options(DatabaseRole.RUNTIME, settings)

    def run(self, scenario: Callable[..., Any], **options: Any) -> Any:
        """The scenario gets an engine; ``options`` are those of `make_engine`."""
        if not self.is_async:
            return self._run(scenario, **options)

        async def main() -> Any:
            return await greenlet_spawn(self._run, scenario, **options)

        return asyncio.run(main())

    def _run(self, scenario: Callable[..., Any], **options: Any) -> Any:
        engine = self.make_engine(**options)
        try:
            return scenario(engine)
        finally:
            engine.dispose()

    def make_engine(self, *, reset: bool = True, **arguments: Any) -> Engine:
        arguments = {**self.arguments, **arguments}
        template = wire.template_engine(lambda: wire.connect(template.dialect, **arguments), is_async=self.is_async)
        template.connect().close()
        poolclass = AsyncAdaptedQueuePool if self.is_async else QueuePool

        def connect() -> Any:
            return wire.connect(template.dialect, **arguments)

        pool = poolclass(
            connect, pool_size=1, max_overflow=0, timeout=1, reset_on_return=None if reset else "rollback", dialect=template.dialect
        )
        if reset:

            @event.listens_for(pool, "checkin")
            def returned(connection: Any, record: Any) -> None:
                if connection is not None and not record.driver_connection.send_reset():
                    record.invalidate()

            @event.listens_for(pool, "checkout")
            def taken(connection: Any, record: Any, proxy: Any) -> None:
                if not self.settle(record.driver_connection):
                    raise DisconnectionError("not clean")

        return Engine(pool, template.dialect, template.url)

    def settle(self, connection: Any, timeout: float = 10) -> bool:
        settled = connection.settle(timeout)
        return bool(await_only(settled) if self.is_async else settled)

    def finish(self, descriptor: int | None, timeout: float = 10) -> bool:
        assert descriptor is not None
        return bool(await_only(await_hangup(descriptor, timeout)) if self.is_async else wait_for_hangup(descriptor, timeout))

    def do(self, statement: str, *parts: sql.Composable) -> list[Any]:
        """As the superuser in the tenant's database."""
        with psycopg.connect(self.cluster.server.url(database=self.runtime.database), autocommit=True) as connection:
            cursor = connection.execute(sql.SQL(statement).format(*parts))
            return cursor.fetchall() if cursor.description else []

    def kill(self, pid: int) -> None:
        assert self.do("SELECT pg_terminate_backend({}, 5000)", sql.Literal(pid)) == [(True,)]

    def is_open(self, pid: int) -> bool:
        return bool(self.do("SELECT 1 FROM pg_stat_activity WHERE pid = {}", sql.Literal(pid)))


@pytest.fixture(scope="module")
def tenants(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Login]]:
    """The runtime login of a tenant under each hardening profile."""
    scripts = Scripts(tmp_path_factory.mktemp("wire"))
    scripts.add("001", "CREATE TABLE notes (id int PRIMARY KEY, line text NOT NULL)", "INSERT INTO notes VALUES (1, 'one'), (2, 'two')")
    found = {}
    for hardening in ("full", "managed"):
        with cluster.tenantdb(cluster.new_registry(), migrations=str(scripts), hardening=hardening) as db:
            found[hardening] = login(cluster, db, db.provision("acme"), DatabaseRole.RUNTIME)
            cluster.sql("CREATE ROLE " + found[hardening].name.replace("t_", "u_"))
            cluster.sql(f"GRANT {found[hardening].name.replace('t_', 'u_')} TO {found[hardening].name}")
    yield found


@pytest.fixture(params=["sync", "async"])
def colour(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(cluster: Cluster, tenants: dict[str, Login], colour: str) -> Place:
    """Under ``full``, where nothing depends on the profile."""
    return Place(cluster, tenants["full"], colour)


@pytest.fixture
def managed(cluster: Cluster, tenants: dict[str, Login], colour: str) -> Place:
    return Place(cluster, tenants["managed"], colour)


def ask(connection: Any, statement: str) -> Any:
    return connection.execute(text(statement)).scalar()


def pid(connection: Any) -> int:
    return int(ask(connection, "SELECT pg_backend_pid()"))


def driver(connection: Connection) -> Any:
    return connection.connection.driver_connection


# What is left, the question that would show it, and the answer of a connection on which nothing was left.
LEFT: dict[str, tuple[str, str, Any]] = {
    "a limit": ("SET statement_timeout = '77s'", "SHOW statement_timeout", OPTIONS["statement_timeout"]),
    "a lifted limit": ("SET statement_timeout = 0", "SHOW statement_timeout", OPTIONS["statement_timeout"]),
    "a path": ("SET search_path = pg_catalog", "SHOW search_path", OPTIONS["search_path"]),
    "a zone": ("SET TIME ZONE 'Asia/Tokyo'", "SELECT current_setting('timezone') = 'Asia/Tokyo'", False),
    "a setting of the application": ("SET app.patient = '17'", "SELECT coalesce(current_setting('app.patient', true), '')", ""),
    "a mode": ("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", "SHOW transaction_read_only", "off"),
    "a role": ("SET ROLE {other}", "SELECT current_user = session_user", True),
    "a subscription": ("LISTEN news", "SELECT count(*) FROM pg_listening_channels()", 0),
    "a cursor": ("DECLARE c CURSOR WITH HOLD FOR SELECT * FROM notes", "SELECT count(*) FROM pg_cursors WHERE name = 'c'", 0),
    "a statement": ("PREPARE theirs AS SELECT 1", "SELECT count(*) FROM pg_prepared_statements WHERE name = 'theirs'", 0),
}
ADVISORY = ("SELECT pg_advisory_lock(1)", "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()", 0)
TEMPORARY = ("CREATE TEMPORARY TABLE scratch AS SELECT 1", "SELECT to_regclass('pg_temp.scratch') IS NULL", True)


def leave_and_look(place: Place, left: tuple[str, str, Any], **options: Any) -> tuple[Any, Any]:
    """One user leaves something and commits, the next on the same backend looks: (what is found, what should be)."""
    statement, question, clean = left
    statement = statement.format(other=place.runtime.name.replace("t_", "u_"))

    def scenario(engine: Engine) -> Any:
        with DeferringSession(engine) as session:
            mine = pid(session)
            session.execute(text(statement))
            session.commit()
        with DeferringSession(engine) as session:
            found = ask(session, question)
            assert pid(session) == mine
        return found

    return place.run(scenario, **options), clean


@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT)
def test_what_a_user_leaves_does_not_reach_the_next(place: Place, left: tuple[str, str, Any]) -> None:
    found, clean = leave_and_look(place, left)
    assert found == clean


@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT)
def test_without_the_reset_it_would(place: Place, left: tuple[str, str, Any]) -> None:
    found, clean = leave_and_look(place, left, reset=False)
    assert found != clean


@pytest.mark.parametrize("reset", [True, False])
def test_an_advisory_lock_is_let_go_where_it_can_be_taken(managed: Place, reset: bool) -> None:
    found, clean = leave_and_look(managed, ADVISORY, reset=reset)
    assert (found == clean) is reset


def test_where_no_advisory_lock_can_be_taken_the_reset_may_let_go_all_the_same(place: Place) -> None:
    def scenario(engine: Engine) -> None:
        with DeferringSession(engine) as session:
            mine = pid(session)
            with pytest.raises(DBAPIError, match="permission denied for function pg_advisory_lock"):
                session.execute(text("SELECT pg_advisory_lock(1)"))
        with DeferringSession(engine) as session:
            assert pid(session) == mine  # the reset worked in every part

    place.run(scenario)


@pytest.mark.parametrize("discard_temp", [True, False])
def test_a_temporary_table_goes_where_it_may_be_made(managed: Place, discard_temp: bool) -> None:
    managed.do("GRANT TEMPORARY ON DATABASE {} TO {}", sql.Identifier(managed.runtime.database), sql.Identifier(managed.runtime.name))
    found, clean = leave_and_look(managed, TEMPORARY, discard_temp=discard_temp)
    assert (found == clean) is discard_temp


def test_a_plan_for_a_temporary_table_goes_with_it(managed: Place) -> None:
    managed.do("GRANT TEMPORARY ON DATABASE {} TO {}", sql.Identifier(managed.runtime.database), sql.Identifier(managed.runtime.name))

    def scenario(engine: Engine) -> None:
        for kind in ("int", "text"):
            with DeferringSession(engine) as session:
                session.execute(text(f"CREATE TEMPORARY TABLE scratch (value {kind})"))
                session.commit()
                session.execute(text(f"CREATE TEMPORARY TABLE scratch (value {kind})"))
                for _ in range(10):
                    session.execute(text("SELECT * FROM scratch"))

    managed.run(scenario, discard_temp=True)


@pytest.mark.parametrize("ending", ["close", "rollback", "aborted", "forgotten"])
def test_a_transaction_that_does_not_commit_leaves_neither_rows_nor_settings(place: Place, ending: str) -> None:
    def scenario(engine: Engine) -> None:
        session = DeferringSession(engine)
        mine = pid(session)
        session.execute(text("SET LOCAL statement_timeout = '77s'"))
        session.execute(text("SET search_path = pg_catalog"))
        session.execute(text("INSERT INTO public.notes VALUES (3, 'lost')"))
        if ending == "aborted":
            with pytest.raises(DBAPIError, match="division by zero"):
                session.execute(text("SELECT 1/0"))
        if ending == "forgotten":  # the driver's own connection, on which SQLAlchemy knows of no transaction
            session.rollback()
            with engine.connect() as connection:
                cursor = connection.connection.cursor()
                cursor.execute("INSERT INTO notes VALUES (3, 'lost')")
                cursor.close()
        session.rollback() if ending == "rollback" else session.close()
        with DeferringSession(engine) as session:
            assert ask(session, "SELECT count(*) FROM notes") == 2
            assert [ask(session, f"SHOW {name}") for name in OPTIONS] == list(OPTIONS.values())
            assert pid(session) == mine

    place.run(scenario)


@pytest.mark.parametrize("mode", ["autocommit", "read only"])
def test_a_mode_set_on_the_drivers_connection_does_not_reach_the_next(place: Place, mode: str) -> None:
    def scenario(engine: Engine) -> None:
        dialect: Any = engine.dialect
        with engine.connect() as connection:
            mine = pid(connection)
            connection.rollback()
            below = connection.connection.dbapi_connection
            if mode == "autocommit":
                dialect._do_isolation_level(below, autocommit=True, isolation_level=None)
            else:
                dialect.set_readonly(below, True)
            assert pid(connection) == mine
        with DeferringSession(engine) as session:
            session.execute(text("INSERT INTO notes VALUES (3, 'lost')"))
            session.rollback()
            assert ask(session, "SELECT count(*) FROM notes") == 2
            assert pid(session) == mine

    place.run(scenario)


@pytest.mark.parametrize("when", ["heard", "stored", "under way"])
def test_notifications_of_the_previous_user_do_not_reach_the_next(place: Place, when: str) -> None:
    heard: list[str] = []

    def scenario(engine: Engine) -> None:
        with engine.connect() as connection:
            wired, mine = driver(connection), pid(connection)
            connection.execute(text("LISTEN news"))
            connection.commit()
            if when == "heard":
                wired.add_notify_handler(lambda notify: heard.append("the previous user's"))
            place.do("NOTIFY news")
            if when != "under way":
                assert pid(connection) == mine  # it came with the answer
        with engine.connect() as connection:
            assert driver(connection) is wired and not wired._notifies_backlog
            if when != "heard":
                wired.add_notify_handler(lambda notify: heard.append("the next user's"))
            connection.execute(text("LISTEN news"))
            connection.commit()
            if when == "heard":
                place.do("NOTIFY news")
            assert pid(connection) == mine

    place.run(scenario)
    assert heard == (["the previous user's"] if when == "heard" else [])


def test_a_session_that_ends_without_commit_waits_for_nothing(place: Place) -> None:
    def scenario(engine: Engine) -> None:
        with DeferringSession(engine) as session:
            mine = pid(session)
            wired = driver(session.connection())
            below: Any = session.connection().connection.dbapi_connection
            with waits(wired) as waited:
                session.close()
                engine.dialect.do_rollback(below)  # as a pool of SQLAlchemy's would, once more
            assert waited == [] and wired._pending
        with engine.connect() as connection:  # a Core connection keeps its rollback, for it may go on
            wired = driver(connection)
            assert pid(connection) == mine
            with waits(wired) as waited:
                connection.rollback()
            assert waited and not wired._pending
            with waits(wired) as waited:
                connection.close()
            assert waited == [] and wired._pending

    place.run(scenario)


@contextmanager
def waits(wired: Any) -> Iterator[list[Any]]:
    """Records what is waited for."""
    seen: list[Any] = []
    original = wired.wait

    def wait(gen: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(gen)
        return original(gen, *args, **kwargs)

    wired.wait = wait
    try:
        yield seen
    finally:
        del wired.wait


def test_a_lease_may_go_on_after_its_rollback(place: Place) -> None:
    def scenario(engine: Engine) -> None:
        with engine.connect() as connection:
            driver(connection).defer()
            mine = pid(connection)
            for _ in range(3):
                connection.rollback()
                assert driver(connection)._pending
                assert pid(connection) == mine
            connection.execute(text("SET statement_timeout = '77s'"))
            connection.commit()
        with engine.connect() as connection:
            assert (ask(connection, "SHOW statement_timeout"), pid(connection)) == (OPTIONS["statement_timeout"], mine)

    place.run(scenario)


def prepared(connection: Any) -> int:
    return int(ask(connection, "SELECT count(*) FROM pg_prepared_statements WHERE name LIKE '\\_pg3%'"))


@pytest.mark.parametrize("reset", [True, False])
def test_the_statements_that_psycopg_has_prepared_survive(place: Place, reset: bool) -> None:
    def scenario(engine: Engine) -> int:
        for _ in range(10):
            with DeferringSession(engine) if reset else Session(engine) as session:
                session.execute(text("SELECT line FROM notes WHERE id = 1"))
        with engine.connect() as connection:
            return prepared(connection)

    assert (place.run(scenario, reset=reset) > 0) is reset


def test_statements_that_are_prepared_at_once_survive_the_error_before_them(place: Place) -> None:
    def scenario(engine: Engine) -> None:
        with DeferringSession(engine) as session:
            mine = pid(session)
            with pytest.raises(DBAPIError, match="division by zero"):
                session.execute(text("SELECT 1/0"))
        with DeferringSession(engine) as session:
            assert [pid(session) for _ in range(3)] == [mine] * 3

    place.run(scenario, prepare_threshold=0)


@pytest.fixture
def changing(place: Place) -> Iterator[Callable[[], object]]:
    """A table with one column, ``value``; called, it gets another type and another column beside it."""
    place.do("CREATE TABLE changing AS SELECT 1 AS value; GRANT SELECT, INSERT ON changing TO {}", sql.Identifier(place.runtime.name))
    yield lambda: place.do("ALTER TABLE changing ALTER value TYPE text, ADD more int")
    place.do("DROP TABLE changing")


def outdated(engine: Engine, change: Callable[[], object], *statements: str) -> None:
    """Prepared before, and wrong afterwards; the connection rests in its pool."""
    for _ in range(10):
        with DeferringSession(engine) as session:
            for statement in statements:
                session.execute(text(statement))
    change()


@pytest.mark.parametrize("mode", ["ordinary", "serializable", "autocommit"])
def test_a_plan_that_a_migration_has_outdated_is_made_anew(place: Place, changing: Callable[[], object], mode: str) -> None:
    options = {} if mode == "ordinary" else {"isolation_level": mode.upper()}

    def scenario(engine: Engine) -> None:
        outdated(engine, changing, "SELECT value FROM changing", "INSERT INTO changing VALUES (1) RETURNING value")
        with engine.connect() as connection:
            assert prepared(connection) >= 2
        with engine.connect().execution_options(**options) as connection:
            assert {value for (value,) in connection.execute(text("SELECT value FROM changing"))} == {"1"}
            assert connection.scalar(text("INSERT INTO changing VALUES (2) RETURNING value")) == "2"
            assert connection.scalar(text("SHOW transaction_isolation")) == ("serializable" if mode == "serializable" else "read committed")
            connection.rollback()
        with engine.connect() as connection:
            kept = connection.scalar(text("SELECT count(*) FROM changing WHERE value = '2'"))
            assert kept == (1 if mode == "autocommit" else 0)

    place.run(scenario)


def test_a_star_is_never_outdated(place: Place, changing: Callable[[], object]) -> None:
    """In the middle of a transaction there would be no way back."""
    statements = ["SELECT * FROM changing", "SELECT c.* FROM changing c", "INSERT INTO changing VALUES (1) RETURNING *"]

    def scenario(engine: Engine) -> None:
        outdated(engine, changing, *statements)
        with DeferringSession(engine) as session:
            assert session.scalar(text("SELECT 1")) == 1
            assert [list(session.execute(text(statement)).keys()) for statement in statements] == [["value", "more"]] * 3

    place.run(scenario)


@pytest.mark.parametrize("before", ["SELECT 1", "SAVEPOINT here", "DECLARE c CURSOR FOR SELECT 1"])
def test_in_the_middle_of_a_transaction_an_outdated_plan_fails_once_and_not_for_ever(
    place: Place, changing: Callable[[], object], before: str
) -> None:
    def scenario(engine: Engine) -> None:
        outdated(engine, changing, "SELECT value FROM changing")
        with DeferringSession(engine) as session:
            session.execute(text(before))
            with pytest.raises(DBAPIError, match="cached plan must not change result type"):
                session.execute(text("SELECT value FROM changing"))
        for _ in range(10):
            with DeferringSession(engine) as session:
                session.execute(text(before))
                session.execute(text("SELECT value FROM changing"))

    place.run(scenario)


def test_what_the_application_has_prepared_itself_is_not_thrown_away_under_it(place: Place, changing: Callable[[], object]) -> None:
    def scenario(engine: Engine) -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("PREPARE mine AS SELECT 7"))
            for _ in range(10):
                connection.execute(text("SELECT value FROM changing"))
            changing()
            with pytest.raises(DBAPIError, match="cached plan must not change result type"):
                connection.execute(text("SELECT value FROM changing"))
            assert connection.scalar(text("EXECUTE mine")) == 7

    place.run(scenario)


# SQLAlchemy's own behaviour


MODES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "autocommit": ({"isolation_level": "AUTOCOMMIT"}, {}),
    "serializable": ({"isolation_level": "SERIALIZABLE"}, {"transaction_isolation": "serializable"}),
    "repeatable read": ({"isolation_level": "REPEATABLE READ"}, {"transaction_isolation": "repeatable read"}),
    "read only": ({"postgresql_readonly": True}, {"transaction_read_only": "on"}),
    "deferrable": (
        {"isolation_level": "SERIALIZABLE", "postgresql_readonly": True, "postgresql_deferrable": True},
        {"transaction_isolation": "serializable", "transaction_read_only": "on", "transaction_deferrable": "on"},
    ),
}
ORDINARY = {"transaction_isolation": "read committed", "transaction_read_only": "off", "transaction_deferrable": "off"}


@pytest.mark.parametrize("of", ["engine", "session", "core"])
@pytest.mark.parametrize("ending", ["close", "rollback", "commit"])
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_holds_for_its_transaction_and_no_longer(place: Place, mode: str, ending: str, of: str) -> None:
    options, expected = MODES[mode]

    def modes(connection: Any) -> dict[str, str]:
        return {name: ask(connection, f"SHOW {name}") for name in ORDINARY}

    def scenario(engine: Engine) -> None:
        for _ in range(2):
            if of == "core":
                user: Any = engine.connect().execution_options(**options)
            elif of == "session":
                user = DeferringSession(engine)
                user.connection(execution_options=options)
            else:
                user = DeferringSession(engine.execution_options(**options))
            mine = pid(user)
            assert modes(user) == ORDINARY | expected
            connection = user if of == "core" else user.connection()
            status = driver(connection).pgconn.transaction_status
            assert status == (TransactionStatus.IDLE if mode == "autocommit" else TransactionStatus.INTRANS)
            getattr(user, ending)()
            user.close()
            with DeferringSession(engine) as session:
                assert modes(session) == ORDINARY and pid(session) == mine

    place.run(scenario)


def test_autocommit_keeps_what_was_done_and_savepoints_undo_in_part(place: Place) -> None:
    def scenario(engine: Engine) -> None:
        with DeferringSession(engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
            session.execute(text("INSERT INTO notes VALUES (10, 'kept')"))
            session.rollback()
        with DeferringSession(engine) as session:
            session.execute(text("INSERT INTO notes VALUES (11, 'kept')"))
            with pytest.raises(DBAPIError, match="duplicate key"), session.begin_nested():
                session.execute(text("INSERT INTO notes VALUES (11, 'twice')"))
            undone = session.begin_nested()
            session.execute(text("DELETE FROM notes"))
            undone.rollback()
            session.commit()
        with engine.connect() as connection:
            outer = connection.begin()
            inner = connection.begin_nested()
            connection.execute(text("DELETE FROM notes"))
            inner.rollback()
            assert ask(connection, "SELECT count(*) FROM notes") == 4
            outer.rollback()
            assert connection.execute(text("DELETE FROM notes WHERE id >= 10")).rowcount == 2
            connection.commit()

    place.run(scenario)


def test_rows_may_be_streamed_and_many_statements_sent_at_once(place: Place) -> None:
    def scenario(engine: Engine) -> None:
        with DeferringSession(engine) as session:
            session.execute(text("INSERT INTO notes VALUES (:id, 'many')"), [{"id": id} for id in range(20, 50)])
            streamed = session.execute(text("SELECT id FROM notes ORDER BY id"), execution_options={"yield_per": 7})
            assert [next(streamed)[0] for _ in range(3)] == [1, 2, 20]
            mine = pid(session)
            streamed.close()
        with DeferringSession(engine) as session:
            assert ask(session, "SELECT count(*) FROM notes") == 2
            assert ask(session, "SELECT count(*) FROM pg_cursors WHERE name <> ''") == 0 and pid(session) == mine

    place.run(scenario)


@pytest.mark.parametrize("way", ["session", "core", "driver", "stream", "copy"])
def test_a_second_statement_behind_a_semicolon_is_refused(place: Place, way: str) -> None:
    stacked = "SELECT id FROM notes WHERE id = 1; DELETE FROM notes"

    def scenario(engine: Engine) -> None:
        with pytest.raises((DBAPIError, psycopg.Error), match=r"cannot insert multiple commands|syntax error"):
            if way == "session":
                with DeferringSession(engine) as session:
                    session.execute(text(stacked))
            with engine.connect() as connection:
                if way == "driver":
                    done = driver(connection).execute(stacked)
                    await_only(done) if place.is_async else done
                elif way == "copy":
                    cursor = driver(connection).cursor()
                    copied = cursor.copy("COPY notes TO STDOUT; DELETE FROM notes")
                    await_only(copied.__aenter__()) if place.is_async else copied.__enter__()
                else:
                    connection.execution_options(stream_results=way == "stream").exec_driver_sql(stacked)
        with DeferringSession(engine) as session:
            assert ask(session, "SELECT count(*) FROM notes") == 2

    place.run(scenario)


def test_psycopgs_own_cursor_would_take_it(place: Place) -> None:
    with psycopg.connect(**place.arguments) as connection:
        connection.execute("SELECT 1; SELECT 2")


def test_a_migrations_connection_may_take_several_statements_at_once(place: Place) -> None:
    def scenario(engine: Engine) -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql("SELECT 1; SELECT 2")

    place.run(scenario, cursor_factory=psycopg.AsyncCursor if place.is_async else psycopg.Cursor)


def test_copy_works(place: Place) -> None:
    async def copied(cursor: Any) -> list[Any]:
        async with cursor.copy("COPY notes TO STDOUT") as copy:
            return [row async for row in copy.rows()]

    def scenario(engine: Engine) -> None:
        with engine.connect() as connection:
            mine = pid(connection)
            cursor = driver(connection).cursor()
            if place.is_async:
                rows = await_only(copied(cursor))
            else:
                with cursor.copy("COPY notes TO STDOUT") as copy:
                    rows = list(copy.rows())
            assert rows == [("1", "one"), ("2", "two")]
        with engine.connect() as connection:
            assert pid(connection) == mine

    place.run(scenario)


# What cannot be reset


def begin_copy(wired: Any) -> Any:
    return wired.cursor().copy("COPY notes FROM STDIN")


ENTANGLED: dict[str, Callable[[Any], Any]] = {
    "a copy": begin_copy,
    "a pipeline": lambda wired: wired.pipeline(),
    "a block of psycopg's": lambda wired: wired.transaction(),
    "a query": lambda wired: wired.pgconn.send_query(b"SELECT pg_sleep(0.2)"),
    "two phases": lambda wired: wired.tpc_begin("acme"),
}


@pytest.mark.parametrize("what", ENTANGLED)
def test_a_connection_that_is_returned_in_the_middle_of_something_is_refused(place: Place, what: str) -> None:
    def scenario(engine: Engine) -> None:
        with engine.connect() as connection:
            mine = pid(connection)
            connection.rollback()
            wired = driver(connection)
            wired.defer()
            begun = ENTANGLED[what](wired)
            if begun is not None and place.is_async:
                await_only(begun.__aenter__() if hasattr(begun, "__aenter__") else begun)
            elif begun is not None:
                begun.__enter__()
            if what in ("a block of psycopg's", "two phases"):
                with pytest.raises(psycopg.ProgrammingError, match="rollback"):  # as psycopg has it: the end is not ours to decide
                    engine.dialect.do_rollback(connection.connection.dbapi_connection)  # type: ignore[arg-type]
            assert wired.send_reset() is False and not wired._pending
            assert place.finish(wired.finish())
            assert not place.is_open(mine)
            with suppress(psycopg.Error, AttributeError):  # the block ends as it may
                left = (begun.__aexit__ if place.is_async else begun.__exit__)(None, None, None)
                await_only(left) if place.is_async else left

    place.run(scenario)


def test_when_the_reset_fails_in_one_part_the_connection_is_not_used_again(place: Place) -> None:
    def scenario(engine: Engine) -> None:
        with engine.connect() as connection:
            wired, mine = driver(connection), pid(connection)
            wired.defer()
            connection.rollback()
            with pytest.raises(OperationalError, match="could not be undone"):
                connection.execute(text("SELECT 1"))
            assert wired.closed
        with engine.connect() as connection:
            wired, mine = driver(connection), pid(connection)
        assert wired._pending
        assert place.settle(wired) is False
        with engine.connect() as connection:
            assert pid(connection) != mine

    place.do("REVOKE EXECUTE ON FUNCTION pg_advisory_unlock_all() FROM PUBLIC")
    try:
        place.run(scenario)
    finally:
        place.do("GRANT EXECUTE ON FUNCTION pg_advisory_unlock_all() TO PUBLIC")


@pytest.mark.parametrize("answer", ["pending", "read"])
def test_a_backend_that_was_killed_while_idle_is_found_at_checkout(place: Place, answer: str) -> None:
    def scenario(engine: Engine) -> None:
        with DeferringSession(engine) as session:
            mine = pid(session)
            wired = driver(session.connection())
        if answer == "read":
            assert place.settle(wired)
        place.kill(mine)
        assert wired._pending is (answer == "pending")
        with DeferringSession(engine) as session:
            assert pid(session) != mine

    place.run(scenario)


# A network that holds things back


class Line:
    """A proxy before the server. While it holds, what the server says waits, and a hang-up of the server is never passed on."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._flows = threading.Event()
        self._flows.set()
        self.server_hung_up = threading.Event()  # while holding, with its last words here
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [client, server]
                threading.Thread(target=self._pump, args=(client, server, None), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, self._flows), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, flows: threading.Event | None) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                while flows and not flows.wait(0.01):
                    if not self.server_hung_up.is_set() and select.select([source], [], [], 0)[0]:
                        data += (more := source.recv(65536))
                        if not more:
                            self.server_hung_up.set()
                target.sendall(data)
            if not self.server_hung_up.is_set():
                target.shutdown(socket.SHUT_WR)

    def hold(self) -> None:
        self._flows.clear()

    def release(self) -> None:
        self._flows.set()

    def close(self) -> None:
        self.release()
        for each in (self._listener, *self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.fixture
def line(cluster: Cluster) -> Iterator[Line]:
    line = Line(int(str(conninfo_to_dict(cluster.server.url())["port"])))
    yield line
    line.close()


def test_an_answer_under_way_is_waited_for_and_no_longer_than_said(place: Place, line: Line) -> None:
    def scenario(engine: Engine) -> None:
        with DeferringSession(engine) as session:
            mine = pid(session)
            wired = driver(session.connection())
            line.hold()
        assert wired.settled() is None
        started = time.monotonic()
        assert place.settle(wired, 0.05) is False
        assert 0.05 <= time.monotonic() - started < 5
        threading.Timer(0.05, line.release).start()
        assert place.settle(wired, 10) is True
        with DeferringSession(engine) as session:
            assert pid(session) == mine

    place.run(scenario, port=line.port)


def test_a_goodbye_that_came_with_the_answer_is_heard_though_nobody_hung_up(place: Place, line: Line) -> None:
    def scenario(engine: Engine) -> None:
        with DeferringSession(engine) as session:
            mine = pid(session)
            wired = driver(session.connection())
            line.hold()
        asked = sql.Literal(mine)
        eventually(
            lambda: place.do("SELECT state FROM pg_stat_activity WHERE pid = {} AND query LIKE 'ROLLBACK; SET%'", asked) == [("idle",)]
        )
        place.kill(mine)
        assert line.server_hung_up.wait(10)
        line.release()
        select.select([wired.pgconn.socket], [], [], 10)
        assert place.settle(wired) is False
        assert not wired._poll.poll(0)  # the socket alone would not have told
        os.close(wired.finish())

    place.run(scenario, port=line.port)


def test_a_ping_asks_the_server(place: Place, line: Line) -> None:
    def ping(wired: Any, timeout: float) -> bool:
        answer = wired.ping(timeout)
        return bool(await_only(answer) if place.is_async else answer)

    def scenario(engine: Engine) -> None:
        with DeferringSession(engine) as session:
            mine = pid(session)
            wired = driver(session.connection())
        assert place.settle(wired)
        assert ping(wired, 10) is True
        line.hold()
        assert wired.send_reset() and wired.settled() is None
        threading.Timer(0.05, line.release).start()
        assert ping(wired, 10) is True  # with an answer still under way
        with DeferringSession(engine) as session:
            assert pid(session) == mine
        assert place.settle(wired)
        line.hold()
        assert wired.settled() is True  # a line that is silent looks like a connection at rest
        assert ping(wired, 0.05) is False
        line.release()
        os.close(wired.finish())
        assert ping(wired, 10) is False

    place.run(scenario, port=line.port)


def test_a_line_that_is_dead_is_told_at_the_return_or_at_the_checkout(place: Place, line: Line) -> None:
    def scenario(engine: Engine) -> None:
        with DeferringSession(engine) as session:
            pid(session)
            wired = driver(session.connection())
            line.close()
        assert place.settle(wired) is False
        assert wired.send_reset() is True  # pending still: nothing is sent twice
        assert wired.finish() is None or wired.closed

    place.run(scenario, port=line.port)


# Closing


def test_after_finish_and_the_end_of_the_line_the_backend_is_gone(place: Place) -> None:
    def scenario(engine: Engine) -> None:
        for _ in range(20):
            with DeferringSession(engine) as session:
                mine = pid(session)
                wired = driver(session.connection())
            closing: list[Any] = []
            thread = threading.Thread(target=lambda: closing.append(wired.finish()))  # noqa: B023
            thread.start()
            thread.join()
            assert wired.closed and place.finish(closing[0])
            assert not place.is_open(mine)
            assert wired.finish() is None and wired.settled() is False

    place.run(scenario)


def test_a_closed_connection_is_not_taken_for_the_owner_of_its_old_descriptor(place: Place) -> None:
    def scenario(engine: Engine) -> None:
        with DeferringSession(engine) as session:
            wired = driver(session.connection())
        assert place.settle(wired)
        old = wired.pgconn.socket
        assert place.finish(wired.finish())
        reading, writing = os.pipe()
        os.dup2(reading, old)  # silent, as a connection at rest is
        assert wired.settled() is False and wired.finish() is None
        for descriptor in {reading, writing, old}:
            os.close(descriptor)

    place.run(scenario)


def test_closing_waits_no_longer_than_said_and_keeps_no_descriptor(place: Place) -> None:
    def scenario(engine: Engine) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.sendall(b"the rest of a result")
        for end in ("silence", "hang-up"):
            descriptor = os.dup(ours.fileno())
            if end == "hang-up":
                theirs.close()
            assert place.finish(descriptor, 0.02) is (end == "hang-up")
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(descriptor)
        ours.close()

    place.run(scenario)


# asyncio alone


def async_place(cluster: Cluster, tenants: dict[str, Login]) -> Place:
    return Place(cluster, tenants["full"], "async")


async def test_settling_does_not_suspend_when_the_answer_is_there(cluster: Cluster, tenants: dict[str, Login]) -> None:
    wired = await wire.AsyncWire.connect(**async_place(cluster, tenants).arguments)
    await wired.execute("SELECT 1")
    wired.defer()
    await wired.rollback()
    assert wired._pending
    eventually(lambda: wired.settled() is not None)
    await wired.execute("SELECT 1")
    assert wired.send_reset()
    assert select.select([wired.pgconn.socket], [], [], 10)[0]
    time.sleep(0.05)  # noqa: ASYNC251 all of the answer; were it in parts, the coroutine would rightly suspend
    settling = wired.settle(10)
    with pytest.raises(StopIteration) as ended:
        settling.send(None)
    assert ended.value.value is True
    await wired.close()


async def test_a_cancelled_settling_may_be_taken_up_again(cluster: Cluster, tenants: dict[str, Login], line: Line) -> None:
    wired = await wire.AsyncWire.connect(**{**async_place(cluster, tenants).arguments, "port": line.port})
    line.hold()
    assert wired.send_reset()
    settling = asyncio.ensure_future(wired.settle(30))
    await asyncio.sleep(0)
    settling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await settling
    assert wired._pending and wired.settled() is None
    line.release()
    assert await wired.settle(10)
    await wired.close()


@pytest.mark.parametrize("at", ["query", "drain"])
async def test_a_cancelled_operation_leaves_a_connection_clean_or_closed(
    cluster: Cluster, tenants: dict[str, Login], line: Line, at: str
) -> None:
    wired = await wire.AsyncWire.connect(**{**async_place(cluster, tenants).arguments, "port": line.port})
    wired.defer()
    if at == "drain":
        await wired.execute("SELECT 1")
        line.hold()
        await wired.rollback()
    asked = asyncio.ensure_future(wired.execute("SELECT pg_sleep(5)"))
    await asyncio.sleep(0.05)
    asked.cancel()
    line.release()
    with pytest.raises(asyncio.CancelledError):
        await asked
    if not wired.closed:
        assert wired.send_reset() and await wired.settle(10)
        assert await (await wired.execute("SELECT 1")).fetchall() == [(1,)]
    await wired.close()
