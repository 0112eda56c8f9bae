"""What one user leaves on a connection the next one does not find, whatever it was and however he went.

With the guard switched off he does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from psycopg import sql
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tenantdb import Tenant
from tenantdb.backends.postgresql import wire
from tests.chaos.town import Town, stats_of
from tests.conformance.colours import Face, MakeFace

LOOK = text("""
SELECT current_user AS who, session_user AS login, current_setting('work_mem') AS memory, current_setting('search_path') AS path,
    current_setting('transaction_isolation') AS isolation, current_setting('transaction_read_only') AS read_only,
    current_setting('statement_timeout') AS patience, current_setting('application_name') AS application,
    (SELECT count(*) FROM pg_listening_channels()) AS listens, to_regclass('pg_temp.leftover')::text AS temporary,
    (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()) AS advisory,
    (SELECT count(*) FROM pg_cursors WHERE name = 'leftover') AS cursors,
    (SELECT count(*) FROM pg_prepared_statements WHERE name = 'leftover') AS prepared,
    (SELECT name FROM public.markers) AS row
""")
PID = text("SELECT pg_backend_pid()")
BOOM = text("SELECT 1 / 0")


@dataclass(frozen=True)
class Left:
    """``seen``: which of the things that `LOOK` looks at shows it where nobody cleans up."""

    name: str
    statements: tuple[str, ...]
    seen: str | None = None
    options: dict[str, Any] | None = None


THINGS = (
    Left("a setting", ("SET work_mem = '8MB'",), "memory"),
    Left("a search path", ("SET search_path = nowhere",), "path"),
    Left("a limit lifted", ("SET statement_timeout = 0",), "patience"),
    Left("another name", ("SET application_name = 'somebody else'",), "application"),
    Left("a default of read only", ("SET default_transaction_read_only = on",), "read_only"),
    Left("a default isolation", ("SET default_transaction_isolation = 'serializable'",), "isolation"),
    Left("a setting by function", ("SELECT set_config('work_mem', '8MB', false)",), "memory"),
    Left("another role", ("SET ROLE {granted}",), "who"),
    Left("an ear", ("LISTEN gossip",), "listens"),
    Left("a temporary table", ("CREATE TEMPORARY TABLE leftover (id integer)",), "temporary"),
    Left("an advisory lock", ("SELECT pg_advisory_lock(1)", "SELECT pg_advisory_lock(1)"), "advisory"),
    Left("a cursor", ("DECLARE leftover CURSOR WITH HOLD FOR SELECT generate_series(1, 9)",), "cursors"),
    Left("a prepared statement", ("PREPARE leftover AS SELECT 1",), "prepared"),
    Left("autocommit", ("SELECT 1",), None, {"isolation_level": "AUTOCOMMIT"}),
    Left("serializable", ("SELECT 1",), None, {"isolation_level": "SERIALIZABLE"}),
    Left("read only", ("SELECT 1",), None, {"postgresql_readonly": True}),
    Left(
        "deferrable", ("SELECT 1",), None, {"isolation_level": "SERIALIZABLE", "postgresql_readonly": True, "postgresql_deferrable": True}
    ),
)


async def commit(session: Any) -> None:
    await session.commit()


async def commit_and_go_on(session: Any) -> None:
    await session.commit()
    await session.execute(text("UPDATE markers SET name = 'never'"))


async def fail(session: Any) -> None:
    await session.commit()
    await session.execute(text("UPDATE markers SET name = 'never'"))
    with pytest.raises(DBAPIError):
        await session.execute(BOOM)


ENDS = (commit, commit_and_go_on, fail)


@pytest.fixture
def tenant(town: Town, tenants: list[Tenant]) -> Iterator[Tenant]:
    """Who may do more than a tenant usually may."""
    mine = tenants[24]
    role, database = sql.Identifier(mine.runtime_role or ""), sql.Identifier(mine.database or "")
    town.run("GRANT TEMPORARY ON DATABASE {} TO {}", database, role)
    with town.world.connect(mine.database or "") as inside:
        inside.execute(text("GRANT EXECUTE ON FUNCTION pg_advisory_lock(bigint), pg_listening_channels() TO PUBLIC"))
    yield mine
    town.run("REVOKE TEMPORARY ON DATABASE {} FROM {}", database, role)


async def leave(face: Face, tenant: Tenant, town: Town, thing: Left, end: Callable[[Any], Awaitable[None]]) -> int:
    """Returns the backend on which it was left."""
    async with face.session(tenant) as session:
        if thing.options:
            await session.connection(execution_options=thing.options)
        pid = await session.scalar(PID)
        for statement in thing.statements:
            await session.execute(text(statement.format(granted=town.models["near"].runtime_role)))
        if thing.options and thing.options.get("postgresql_readonly"):
            await session.rollback()
        else:
            await end(session)
    return int(pid)


async def look(face: Face, tenant: Tenant) -> tuple[int, dict[str, Any]]:
    async with face.session(tenant) as session:
        return int(await session.scalar(PID)), dict((await session.execute(LOOK)).one()._mapping)


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
async def test_the_next_user_sees_nothing_of_the_one_before(make_face: MakeFace, town: Town, tenant: Tenant, end: Any) -> None:
    face = make_face(1, temporary_tables=True)
    pid, clean = await look(face, tenant)
    for thing in THINGS:
        if thing.options == {"isolation_level": "AUTOCOMMIT"} and end is not commit:
            continue  # what is written then is meant to stay
        left_on = await leave(face, tenant, town, thing, end)
        found_on, found = await look(face, tenant)
        assert left_on == found_on == pid, thing.name  # it was reset, not replaced
        assert found == clean, thing.name
    assert stats_of(face.db).opens == 1


async def test_without_the_reset_he_would_see_it(make_face: MakeFace, town: Town, tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    face = make_face(1, temporary_tables=True)
    _, clean = await look(face, tenant)
    monkeypatch.setattr(wire._Wire, "send_reset", lambda self: True)
    monkeypatch.setattr(wire._Wire, "_rolls_back_later", lambda self: False)
    for thing in THINGS:
        if thing.seen is None:
            continue
        await leave(face, tenant, town, thing, commit)
        _, found = await look(face, tenant)
        assert found[thing.seen] != clean[thing.seen], thing.name
        face.db._engines.forget(tenant.id)


async def test_after_autocommit_a_transaction_is_one_again(make_face: MakeFace, tenant: Tenant) -> None:
    face = make_face(1)
    async with face.session(tenant) as session:
        await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        await session.execute(text("UPDATE markers SET name = name"))
    async with face.session(tenant) as session:
        await session.execute(text("UPDATE markers SET name = 'never'"))
    _, found = await look(face, tenant)
    assert found["row"] == tenant.slug


@pytest.mark.parametrize("way", ["session", "connect"])
async def test_a_transaction_that_was_left_aborted_is_none_of_the_next_users_business(
    make_face: MakeFace, tenant: Tenant, way: str
) -> None:
    face = make_face(1)
    for _ in range(3):
        async with getattr(face, way)(tenant) as lease:
            with pytest.raises(DBAPIError):
                await lease.execute(BOOM)
    _, found = await look(face, tenant)
    assert found["row"] == tenant.slug
    assert stats_of(face.db).opens == 1


async def test_a_query_that_was_left_under_way_costs_the_connection_and_nothing_else(make_face: MakeFace, tenant: Tenant) -> None:
    face = make_face(1)
    async with face.connect(tenant) as lease:
        raw = (lease.sync_connection if face.adb else lease._target).connection.driver_connection
        raw.pgconn.send_query(b"SELECT pg_sleep(0)")
    _, found = await look(face, tenant)
    assert found["row"] == tenant.slug
    assert stats_of(face.db).opens == 2
