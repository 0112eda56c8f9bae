"""A task that waits for a commit is published after it, and not at all where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kombu.exceptions import OperationalError
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from tenantdb import AsyncTenantDB
from tenantdb.celery import TenantTask, delay_on_commit
from tenantdb.database import TenantDB
from tenantdb.errors import NotATenantsSession, TaskRefused, TenantNotFound
from tests.adapters.little_worker import Shop, Tasks, new_shop, new_town, what_was_seen


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TenantDB]:
    with new_town(tmp_path_factory.mktemp("town")) as db:
        for slug in ("acme", "beta"):
            with db.begin(slug) as session:
                session.execute(text("CREATE TABLE parents (id INTEGER PRIMARY KEY)"))
                session.execute(
                    text("CREATE TABLE rows (id INTEGER PRIMARY KEY, parent INTEGER REFERENCES parents DEFERRABLE INITIALLY DEFERRED)")
                )
        yield db


@pytest.fixture
def shop(town: TenantDB) -> Iterator[Shop]:
    with new_shop(town) as made:
        yield made


@pytest.fixture
def tasks(shop: Shop) -> Tasks:
    return Tasks(shop)


def waiting(shop: Shop) -> list[Any]:
    """The first argument of each message in the queue."""
    return [message.payload[0][0] for message in shop.waiting()]


def test_nothing_is_published_before_the_commit_and_then_for_the_sessions_tenant(shop: Shop, tasks: Tasks) -> None:
    with shop.db.begin("beta") as session:
        delay_on_commit(session, tasks.see, 1)
        tasks.see.delay_on_commit(session, 2)
        assert shop.waiting() == []

    shop.work()

    assert what_was_seen(shop, "beta") == ["see", "see"]


def test_a_task_that_runs_at_once_finds_what_was_committed(shop: Shop) -> None:
    found: list[int] = []

    @shop.task(base=TenantTask)
    def count() -> None:
        with shop.db.session() as session:
            found.append(session.scalar(text("SELECT count(*) FROM parents")) or 0)

    shop.app.conf.task_always_eager = True
    with shop.db.begin("acme") as session:
        session.execute(text("INSERT INTO parents DEFAULT VALUES"))
        count.delay_on_commit(session)
        session.flush()

    assert found == [1]


@pytest.mark.parametrize("end", [lambda s: s.rollback(), lambda s: s.close(), lambda s: s.reset(), lambda s: s.invalidate()])
@pytest.mark.parametrize("sql", [True, False])
def test_what_is_rolled_back_publishes_nothing_also_not_with_the_next_commit(
    shop: Shop, tasks: Tasks, end: Callable[[Session], Any], sql: bool
) -> None:
    with shop.db.session("acme") as session:
        if sql:
            session.execute(text("SELECT 1"))
        delay_on_commit(session, tasks.see, "lost")
        end(session)
        session.execute(text("SELECT 1"))
        session.commit()
        assert shop.waiting() == []
        delay_on_commit(session, tasks.see, "the twin")
        session.commit()

    assert waiting(shop) == ["the twin"]


def test_a_session_that_never_commits_publishes_nothing(shop: Shop, tasks: Tasks) -> None:
    with shop.db.session("acme") as session:
        delay_on_commit(session, tasks.see)
    with pytest.raises(ZeroDivisionError), shop.db.begin("acme") as session:
        delay_on_commit(session, tasks.see)
        raise ZeroDivisionError

    assert shop.waiting() == []


def test_a_commit_that_fails_publishes_nothing(shop: Shop, tasks: Tasks) -> None:
    with shop.db.session("acme") as session:
        session.execute(text("PRAGMA foreign_keys = ON"))
        session.commit()
        delay_on_commit(session, tasks.see)

        @event.listens_for(session, "before_commit")
        def refuse(session: Session) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            session.commit()
        session.rollback()

    assert shop.waiting() == []


def test_savepoints_count_each_for_itself(shop: Shop, tasks: Tasks) -> None:
    with shop.db.begin("acme") as session:
        delay_on_commit(session, tasks.see, 1)
        with session.begin_nested():
            delay_on_commit(session, tasks.see, 2)
            inner = session.begin_nested()
            delay_on_commit(session, tasks.see, "rolled back")
            inner.rollback()
            with session.begin_nested():
                delay_on_commit(session, tasks.see, 3)
        assert shop.waiting() == []
        outer = session.begin_nested()
        with session.begin_nested():
            delay_on_commit(session, tasks.see, "released, and rolled back with what is around it")
        outer.rollback()
        delay_on_commit(session, tasks.see, 4)

    assert waiting(shop) == [1, 2, 3, 4]


def test_a_savepoint_that_is_committed_together_with_its_session_counts(shop: Shop, tasks: Tasks) -> None:
    with shop.db.session("acme") as session:
        session.begin_nested()
        delay_on_commit(session, tasks.see, 1)
        session.commit()

    assert waiting(shop) == [1]


def test_the_rollback_of_a_session_takes_its_savepoints_with_it(shop: Shop, tasks: Tasks) -> None:
    with shop.db.session("acme") as session:
        transaction = session.begin()
        session.begin_nested()
        delay_on_commit(session, tasks.see, 1)
        transaction.rollback()
        session.commit()

    assert shop.waiting() == []


def test_the_tenant_is_the_sessions_whatever_is_bound_when_it_commits(shop: Shop, tasks: Tasks) -> None:
    session = shop.db.session("beta")
    delay_on_commit(session, tasks.see)
    with shop.db.tenant_context("acme"):
        session.commit()
    session.close()

    shop.work()

    assert what_was_seen(shop, "beta") == ["see"]


def test_signatures_bring_their_options_and_what_follows(shop: Shop, tasks: Tasks) -> None:
    with shop.db.begin("acme") as session:
        delay_on_commit(session, tasks.see.s(1).set(countdown=60) | tasks.plain.s() | tasks.see.s())
        delay_on_commit(session, tasks.plain.s())

    shop.work()

    assert sorted(what_was_seen(shop, "acme")) == ["plain", "plain", "see", "see"]


async def test_an_async_session_does_the_same(shop: Shop, tasks: Tasks) -> None:
    adb = AsyncTenantDB(shop.db)
    async with adb.begin("beta") as session:
        await session.execute(text("SELECT 1"))
        delay_on_commit(session, tasks.see, 1)
        async with session.begin_nested():
            delay_on_commit(session, tasks.see, 2)
        nested = await session.begin_nested()
        delay_on_commit(session, tasks.see, "rolled back")
        await nested.rollback()
        assert shop.waiting() == []
    async with adb.session("acme") as session:
        delay_on_commit(session, tasks.see, "closed")
    shop.db._engines.close_loop()

    assert waiting(shop) == [1, 2]


def test_a_broker_out_of_reach_is_told_by_the_commit_that_stands_and_stops_no_other_task(
    shop: Shop, tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise OperationalError("nothing listens there")

    monkeypatch.setattr(tasks.fail, "apply_async", unreachable)
    with pytest.raises(OperationalError), shop.db.begin("acme") as session:
        before = session.scalar(text("SELECT count(*) FROM parents"))
        session.execute(text("INSERT INTO parents DEFAULT VALUES"))
        delay_on_commit(session, tasks.fail)
        delay_on_commit(session, tasks.see, "the other")

    assert waiting(shop) == ["the other"]
    with shop.db.session("acme") as session:
        assert session.scalar(text("SELECT count(*) FROM parents")) == before + 1


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_of_several_tasks_that_could_not_be_published_one_is_raised_and_the_others_are_logged(
    shop: Shop, tasks: Tasks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: int
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise OperationalError("nothing listens there")

    monkeypatch.setattr(tasks.fail, "apply_async", unreachable)
    with pytest.raises(OperationalError), shop.db.begin("acme") as session:
        for _ in range(failing):
            delay_on_commit(session, tasks.fail)

    assert caplog.text.count("one more task was not published") == failing - 1


def test_the_connection_was_given_back_before_anything_is_published(shop: Shop, tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    in_use: list[int] = []
    monkeypatch.setattr(tasks.see, "apply_async", lambda *args, **kwargs: in_use.append(shop.db.stats()[0].in_use))
    with shop.db.begin("acme") as session:
        session.execute(text("SELECT 1"))
        delay_on_commit(session, tasks.see)
        assert shop.db.stats()[0].in_use == 1

    assert in_use == [0]


async def test_what_is_no_tenants_session_and_a_task_for_every_tenant_are_refused_at_the_call(shop: Shop, tasks: Tasks) -> None:
    with Session() as session, pytest.raises(NotATenantsSession, match="Session"):
        delay_on_commit(session, tasks.see)
    async with AsyncSession() as plain:
        with pytest.raises(NotATenantsSession, match="AsyncSession"):
            delay_on_commit(plain, tasks.see)
    with shop.db.session("acme") as session, pytest.raises(TaskRefused):
        delay_on_commit(session, tasks.every)
    with shop.db.session("nobody") as session, pytest.raises(TenantNotFound):
        delay_on_commit(session, tasks.see)
