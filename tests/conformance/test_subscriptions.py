"""What becomes of a tenant whose subscription is past due: served as ever, served to readers, or refused; and served again once it pays."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import func, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from tenantdb import Identity, Tenant, errors
from tenantdb.asgi import TenantMiddleware
from tenantdb.connections import engines
from tenantdb.model import Subscription
from tests.adapters.world import App, request
from tests.conformance.app import MARKER, NOTES, note, notes
from tests.conformance.colours import WAYS, Clock, Face, MakeFace
from tests.conformance.conftest import Estate

every_way = pytest.mark.parametrize("way", WAYS)

SOON = datetime.now(timezone.utc) + timedelta(days=30)
GONE = datetime.now(timezone.utc) - timedelta(days=1)
UNPAID = [("past_due", None), ("past_due", SOON), ("cancelled", None), ("cancelled", GONE), ("trial", GONE), ("active", GONE)]
PAID = [("active", None), ("active", SOON), ("trial", None), ("trial", SOON), ("cancelled", SOON)]


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def payer(fresh: Tenant, estate: Estate) -> Iterator[Tenant]:
    """A tenant whose subscription a test may change."""
    yield fresh
    pay(estate, fresh)


def pay(estate: Estate, tenant: Tenant, subscription: str = "trial", expires: datetime | None = None) -> None:
    """What the billing system does, in a process of its own."""
    estate.db.update(tenant, subscription=subscription, subscription_expires_at=expires)


def stop_paying(estate: Estate, tenant: Tenant) -> None:
    pay(estate, tenant, "past_due")


async def write(face: Face, tenant: Tenant, number: int, way: str = "begin") -> None:
    if way == "engine":
        engine = await face.adb.engine(tenant) if face.adb else face.db.engine(tenant)
        connecting: Any = engine.begin()
        if face.adb:
            async with connecting as connection:
                await connection.execute(note(number))
        else:
            with connecting as connection:
                connection.execute(note(number))
        return
    async with getattr(face, way)(tenant) as open_source:
        await open_source.execute(note(number))
        if way != "begin":
            await open_source.commit()


# -- when it is --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("subscription", "expires"), UNPAID)
async def test_what_is_past_due_is_refused_and_says_why(
    make_face: MakeFace, estate: Estate, payer: Tenant, subscription: str, expires: datetime | None
) -> None:
    pay(estate, payer, subscription, expires)
    with pytest.raises(errors.SubscriptionExpired) as refused:
        await make_face(past_due="refuse").marker(payer)
    gone = expires if expires == GONE else None
    assert (refused.value.tenant, refused.value.subscription, refused.value.expired_at) == (payer.slug, subscription, gone)
    assert (("ran out" in str(refused.value)), refused.value.http_status) == (gone is not None, 402)


@pytest.mark.parametrize(("subscription", "expires"), PAID)
@pytest.mark.parametrize("policy", ["readonly", "refuse"])
async def test_what_is_paid_for_is_served(
    make_face: MakeFace, estate: Estate, payer: Tenant, subscription: str, expires: datetime | None, policy: str
) -> None:
    pay(estate, payer, subscription, expires)
    face = make_face(past_due=policy)
    await write(face, payer, 1)
    assert await face.rows(NOTES, payer) == [1]


@pytest.mark.parametrize(("subscription", "expires"), UNPAID)
async def test_by_default_everybody_is_served(
    make_face: MakeFace, estate: Estate, payer: Tenant, subscription: str, expires: datetime | None
) -> None:
    pay(estate, payer, subscription, expires)
    face = make_face()
    await write(face, payer, 1)
    assert await face.rows(NOTES, payer) == [1]


async def test_a_subscription_runs_out_without_anybody_telling(
    make_face: MakeFace, estate: Estate, payer: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    pay(estate, payer, "trial", SOON)
    refusing, reading = make_face(past_due="refuse"), make_face(past_due="readonly")
    for face in (refusing, reading):
        assert await face.marker(payer) == payer.slug
    monkeypatch.setattr("tenantdb.connections.locate.utcnow", lambda: SOON)
    with pytest.raises(errors.SubscriptionExpired, match="ran out"):
        await refusing.marker(payer)
    with pytest.raises(errors.SubscriptionExpired, match="ran out"):
        await write(reading, payer, 1)


# -- refuse ------------------------------------------------------------------------------------------------------------------------------


@every_way
async def test_refused_means_by_every_way_and_a_payment_opens_all(
    make_face: MakeFace, estate: Estate, payer: Tenant, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    face = make_face(past_due="refuse")
    clock = Clock(face.db, monkeypatch)
    stop_paying(estate, payer)
    for key in (payer.slug, payer.slug, payer.id):
        with pytest.raises(errors.SubscriptionExpired):
            await face.read(way, key)
    with pytest.raises(errors.SubscriptionExpired):
        async with face.bound(payer.slug):
            pass
    with pytest.raises(errors.SubscriptionExpired):
        await face.do.resolve(payer.slug)
    pay(estate, payer)
    clock.now += face.db.settings.cache_ttl
    assert await face.read(way, payer) == payer.slug


async def test_a_state_that_is_not_served_is_told_before_the_subscription(make_face: MakeFace, estate: Estate, payer: Tenant) -> None:
    stop_paying(estate, payer)
    estate.db.suspend(payer)
    with pytest.raises(errors.TenantSuspended):
        await make_face(past_due="refuse").marker(payer)


async def test_what_administers_does_not_ask_who_pays(make_face: MakeFace, estate: Estate, payer: Tenant) -> None:
    face = make_face(past_due="refuse")
    async with face.begin(payer) as session:
        await face.do.audit.record(session._target if face.adb is None else session, "patient.read", 7)
    stop_paying(estate, payer)
    await face.do.update(payer, plan="pro")  # so that this process knows, too
    newest, *_ = await face.do.audit.search(payer, records=True)
    assert newest.action == "patient.read"
    assert (await face.do.audit.verify(payer, records=True)).ok
    await face.do.suspend(payer)
    await face.do.activate(payer)


# -- readonly ----------------------------------------------------------------------------------------------------------------------------


@every_way
async def test_readers_are_served_and_writers_are_told(make_face: MakeFace, estate: Estate, payer: Tenant, way: str) -> None:
    stop_paying(estate, payer)
    face = make_face(past_due="readonly")
    assert await face.read(way, payer) == payer.slug
    with pytest.raises(errors.SubscriptionExpired) as refused:
        await write(face, payer, 1, way)
    assert isinstance(refused.value.__cause__, Exception)  # the driver's
    assert await face.rows(NOTES, payer) == []


async def test_an_object_that_is_flushed_is_refused_and_the_session_goes_on(make_face: MakeFace, estate: Estate, payer: Tenant) -> None:
    stop_paying(estate, payer)
    face = make_face(past_due="readonly")
    async with face.session(payer) as session:
        session.add(Note(id=1)) if face.adb else await session.add(Note(id=1))
        with pytest.raises(errors.SubscriptionExpired):
            await session.flush()
        await session.rollback()
        assert await session.scalar(MARKER) == payer.slug


STATEMENTS = ["UPDATE notes SET about = NULL", "DELETE FROM notes", "CREATE TABLE more (id int)", "DROP TABLE notes"]


@pytest.mark.parametrize("statement", STATEMENTS)
@pytest.mark.parametrize("autocommit", [False, True])
async def test_nothing_writes_not_even_without_a_transaction(
    make_face: MakeFace, estate: Estate, payer: Tenant, statement: str, autocommit: bool
) -> None:
    stop_paying(estate, payer)
    face = make_face(past_due="readonly")
    async with face.connect(payer) as connection:
        if autocommit:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
        with pytest.raises(errors.SubscriptionExpired):
            await connection.execute(text(statement))
    assert await face.rows(NOTES, payer) == []


async def test_other_errors_pass_unchanged(make_face: MakeFace, estate: Estate, payer: Tenant) -> None:
    stop_paying(estate, payer)
    face = make_face(past_due="readonly")
    async with face.session(payer) as session:
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT nonsense"))


async def test_who_pays_again_writes_with_the_next_transaction_and_who_stops_does_not(
    make_face: MakeFace, estate: Estate, payer: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    face = make_face(past_due="readonly")
    clock = Clock(face.db, monkeypatch)
    async with face.session(payer) as session:  # one session through it all
        for number in range(3):
            await session.execute(note(number))
            await session.commit()
            stop_paying(estate, payer)
            clock.now += face.db.settings.cache_ttl
            with pytest.raises(errors.SubscriptionExpired):
                await session.execute(note(number + 10))
            await session.rollback()
            assert (await session.scalars(NOTES)).all() == list(range(number + 1))
            await session.commit()
            pay(estate, payer)
            clock.now += face.db.settings.cache_ttl
    assert await face.rows(NOTES, payer) == [0, 1, 2]


@pytest.mark.parametrize("first", ["paid", "unpaid"])
async def test_a_transaction_under_way_keeps_its_word_and_its_connection_serves_no_other(
    make_face: MakeFace, estate: Estate, payer: Tenant, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    face = make_face(past_due="readonly")
    clock = Clock(face.db, monkeypatch)
    change = [stop_paying, pay] if first == "paid" else [pay, stop_paying]
    change[1](estate, payer)
    async with face.session(payer) as session:
        assert await session.scalar(MARKER) == payer.slug
        change[0](estate, payer)
        clock.now += face.db.settings.cache_ttl
        assert await face.marker(payer) == payer.slug  # on a connection of the other kind
        if first == "paid":
            await session.execute(note(1))
            await session.commit()
        else:
            with pytest.raises(errors.SubscriptionExpired):
                await session.execute(note(1))
            await session.rollback()
    if first == "paid":  # whatever lies in the pool now
        with pytest.raises(errors.SubscriptionExpired):
            await write(face, payer, 2)
        assert await face.rows(NOTES, payer) == [1]
    else:
        await write(face, payer, 2)
        assert await face.rows(NOTES, payer) == [2]


async def test_without_engines_of_their_own_a_pooled_connection_would_write_on(
    make_face: MakeFace, estate: Estate, payer: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engines._current
    monkeypatch.setattr(engines, "_current", lambda lane, tenant, read_only: real(lane, tenant, False) or real(lane, tenant, True))
    face = make_face(past_due="readonly")
    clock = Clock(face.db, monkeypatch)
    await write(face, payer, 1)
    stop_paying(estate, payer)
    clock.now += face.db.settings.cache_ttl
    await write(face, payer, 2)
    assert await face.rows(NOTES, payer) == [1, 2]


async def test_a_crowd_through_changes_of_mind_never_writes_unpaid(make_face: MakeFace, estate: Estate, payer: Tenant) -> None:
    """Each look-up decides; whoever was looked up as paying may end what he began, and no one else."""
    face = make_face(past_due="readonly", cache_ttl=0.001)
    verdicts: list[bool] = []

    async def work(first: int) -> None:
        for number in range(first, first + 8):
            try:
                await write(face, payer, number)
            except errors.SubscriptionExpired:
                verdicts.append(False)
            else:
                verdicts.append(True)
            await asyncio.sleep(0)

    crowd = asyncio.gather(*(work(100 * each) for each in range(1, 6)))
    for change in (stop_paying, pay, stop_paying, pay):
        await asyncio.sleep(0)
        change(estate, payer)
    await crowd
    stop_paying(estate, payer)
    await asyncio.sleep(0.01)
    with pytest.raises(errors.SubscriptionExpired):
        await write(face, payer, 1)
    count = await face.rows(select(func.count()).select_from(notes), payer)
    assert (count, len(verdicts)) == ([sum(verdicts)], 40)


async def test_what_a_session_set_for_itself_ends_with_it(make_face: MakeFace, estate: Estate, payer: Tenant) -> None:
    stop_paying(estate, payer)
    face = make_face(past_due="readonly", budget={"connections": 8, "processes": 1, "per_tenant": 1})
    if estate.backend == "postgresql":
        async with face.session(payer) as session:
            await session.execute(text("SET default_transaction_read_only = off"))
            await session.commit()
    with pytest.raises(errors.SubscriptionExpired):
        await write(face, payer, 1)


# -- a request -------------------------------------------------------------------------------------------------------------------------


def asgi_app(face: Face, tenant: Tenant) -> App:
    async def handler(received: Request) -> PlainTextResponse:
        assert face.adb is not None
        async with face.adb.begin() as session:
            if received.method == "POST":
                await session.execute(insert(notes).values(id=1))
            return PlainTextResponse(str(await session.scalar(MARKER)))

    routes = [Route("/notes", handler, methods=["GET", "POST"])]
    middleware = Middleware(TenantMiddleware, db=face.adb, authenticate=lambda facts: Identity("ada", tenant.id))
    return Starlette(routes=routes, middleware=[middleware])


@pytest.mark.parametrize(
    ("policy", "statuses"),
    [("allow", {"GET": 200, "POST": 200}), ("readonly", {"GET": 200, "POST": 402}), ("refuse", {"GET": 402, "POST": 402})],
)
async def test_a_request_is_answered_as_the_policy_says(
    async_face: MakeFace, estate: Estate, payer: Tenant, policy: str, statuses: dict[str, int]
) -> None:
    stop_paying(estate, payer)
    app = asgi_app(async_face(past_due=policy), payer)
    for method, status in statuses.items():
        answer = await request(app, "/notes", method=method)
        assert answer.status == status
        if status == 402:
            assert answer.json["code"] == "subscription-expired"


def test_every_kind_of_subscription_was_decided_about() -> None:
    assert {subscription for subscription, _ in UNPAID + PAID} == set(map(str, Subscription))
