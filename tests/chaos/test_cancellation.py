"""Cancelled at every await, once and twice: the connection, the place in the budget and the next user are none the worse for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.testing.cancellation import await_points, sweep

from tenantdb import Tenant
from tenantdb.backends.postgresql import wire
from tenantdb.connections.budget import ServerBudget
from tenantdb.connections.ledger import Claim, Ledger
from tests.chaos.town import HERE, Town, Watch, budget_on, rested, stats_of
from tests.conformance.colours import Face, MakeFace

Scenario = Callable[[Face, Tenant], Awaitable[None]]

pytestmark = pytest.mark.timeout(600)


async def read(face: Face, tenant: Tenant) -> None:
    async with face.session(tenant) as session:
        assert await session.scalar(HERE) == tenant.database


async def rollback(face: Face, tenant: Tenant) -> None:
    async with face.session(tenant) as session:
        assert await session.scalar(HERE) == tenant.database
        await session.rollback()
        assert await session.scalar(HERE) == tenant.database


async def commit(face: Face, tenant: Tenant) -> None:
    async with face.session(tenant) as session:
        await session.execute(text("UPDATE markers SET name = name"))
        await session.commit()


async def begin(face: Face, tenant: Tenant) -> None:
    async with face.begin(tenant) as session:
        await session.execute(text("UPDATE markers SET name = name"))


async def core(face: Face, tenant: Tenant) -> None:
    async with face.connect(tenant) as connection:
        assert await connection.scalar(HERE) == tenant.database


SCENARIOS = (read, rollback, commit, begin, core)


async def sweep_over(face: Face, scenario: Callable[[], Awaitable[None]], before: Callable[[], Awaitable[None]], cancels: int) -> int:
    """Run a scenario once for each of its awaits, and cancel it there; with ``cancels=2`` once for each pair. After each run everything is
    given back, and the same works uncancelled. Returns how many runs there were."""
    runs = 0

    async def run(cancel_at: tuple[int, ...]) -> int:
        nonlocal runs
        runs += 1
        await before()
        with await_points(cancel_at) as points:
            task = points.create_task(scenario())
            done, _ = await asyncio.wait([task], timeout=20)
        where = f"cancelled at {cancel_at}: {points.cancelled_at}"
        assert done, f"{where}: it hangs; {face.db.stats()}"
        if points.cancelled_at:
            assert task.cancelled(), f"{where}: {task.exception()!r}"
        else:
            await task
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=5)
        try:
            await rested(face.db)
            await before()
            await asyncio.wait_for(scenario(), 20)
            await rested(face.db)
        except BaseException as error:
            raise AssertionError(f"{where}: {error!r}; {face.db.stats()}") from error
        return int(points.count)

    async def sweep_from(cancel_at: tuple[int, ...]) -> None:
        total = await run(cancel_at)
        if len(cancel_at) < cancels:
            for number in range(cancel_at[-1] + 1 if cancel_at else 1, total + 1):
                await sweep_from((*cancel_at, number))

    await sweep_from(())
    return runs


LONG = (rollback, commit, core)


def cases(*scenarios: Any) -> list[Any]:
    """Those that show the most always, the rest in the long run."""
    return [pytest.param(each, id=each.__name__, marks=pytest.mark.long if each in LONG else ()) for each in scenarios]


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("scenario", cases(*SCENARIOS))
async def test_sqlalchemys_own_sweep_finds_nothing_lost(async_face: MakeFace, tenants: list[Tenant], scenario: Any, warm: bool) -> None:
    tenant = tenants[0]
    face = async_face(4)

    async def body(engine: Any) -> None:
        await scenario(face, tenant)

    def fresh_engine() -> Any:
        face.db._engines.forget(tenant.id)
        return face.db._engines.async_engine_of(face.db._registry.lookup(tenant.id), tenant.id)

    assert await sweep(fresh_engine, body, warm=warm) == []


@pytest.mark.parametrize("cancels", [1, 2], ids=["once", "twice"])
@pytest.mark.parametrize("scenario", cases(*SCENARIOS))
async def test_who_is_cancelled_with_an_idle_connection_gives_it_back(
    async_face: MakeFace, tenants: list[Tenant], scenario: Any, cancels: int
) -> None:
    face = async_face(1)

    async def warm() -> None:
        await read(face, tenants[0])

    assert await sweep_over(face, lambda: scenario(face, tenants[0]), warm, cancels) > cancels


@pytest.mark.parametrize("cancels", [1, pytest.param(2, marks=pytest.mark.long)], ids=["once", "twice"])
@pytest.mark.parametrize("scenario", cases(*SCENARIOS))
async def test_who_is_cancelled_while_a_strangers_connection_makes_room_gives_the_place_back(
    async_face: MakeFace, town: Town, tenants: list[Tenant], scenario: Any, cancels: int
) -> None:
    face = async_face(1)

    async def fill() -> None:
        await read(face, tenants[1])

    with Watch(town) as watch:
        assert await sweep_over(face, lambda: scenario(face, tenants[0]), fill, cancels) > cancels
    assert watch.peak <= 1
    assert stats_of(face.db).evictions > 10


@pytest.mark.parametrize("cancels", [1, 2], ids=["once", "twice"])
async def test_who_is_cancelled_before_the_answer_to_the_reset_has_come_leaves_it_to_the_next(
    async_face: MakeFace, monkeypatch: pytest.MonkeyPatch, tenants: list[Tenant], cancels: int
) -> None:
    face = async_face(1)
    settled = wire.AsyncWire.settled
    looks = 0

    def late(self: wire.AsyncWire) -> bool | None:
        """The answer comes when it has been waited for."""
        nonlocal looks
        if not self._pending:
            return settled(self)
        looks += 1
        return None if looks % 4 else settled(self)

    async def warm() -> None:
        await read(face, tenants[0])

    monkeypatch.setattr(wire.AsyncWire, "settled", late)
    assert await sweep_over(face, lambda: read(face, tenants[0]), warm, cancels) > 4
    assert looks > 10


AT_ONCE, LATER = 0, 5  # in turns of the event loop: before a waiter that is cancelled finds out, and after


async def queue(face: Face, holder: Tenant, waiter: Tenant, after: int) -> None:
    """Somebody waits behind the holder of the only connection, who lets go of it when he does."""
    held = face.session(holder)

    async def let_go() -> None:
        while not stats_of(face.db).waiting:
            await asyncio.sleep(0)
        for _ in range(after):
            await asyncio.sleep(0)
        await held.close()

    try:
        await held.scalar(HERE)
        release = asyncio.create_task(let_go())
        try:
            await read(face, waiter)
        finally:
            release.cancel()
            await asyncio.wait([release])
    finally:
        await asyncio.shield(asyncio.ensure_future(held.close()))


async def nothing() -> None:
    pass


@pytest.mark.parametrize("after", [AT_ONCE, LATER], ids=["granted", "in line"])
@pytest.mark.parametrize("same", [True, False], ids=["behind its own tenant", "behind another"])
@pytest.mark.parametrize("cancels", [1, pytest.param(2, marks=pytest.mark.long)], ids=["once", "twice"])
async def test_who_is_cancelled_in_the_queue_leaves_it_and_what_was_just_granted_goes_to_the_next(
    async_face: MakeFace, tenants: list[Tenant], same: bool, cancels: int, after: int
) -> None:
    face = async_face(1)
    waiter = tenants[0 if same else 1]
    assert await sweep_over(face, lambda: queue(face, tenants[0], waiter, after), nothing, cancels) > 4
    assert stats_of(face.db).waits > 4


@pytest.mark.parametrize(("guard", "after"), [("withdraw", LATER), ("hand_back", AT_ONCE)])
async def test_the_sweep_finds_a_place_that_is_lost_with_a_cancelled_waiter(
    async_face: MakeFace, monkeypatch: pytest.MonkeyPatch, tenants: list[Tenant], guard: str, after: int
) -> None:
    face = async_face(1)
    left: list[Claim] = []
    owner = Ledger if guard == "withdraw" else ServerBudget
    monkeypatch.setattr(owner, guard, lambda _, claim, **__: left.append(claim))
    monkeypatch.setattr("tests.chaos.town.PATIENCE", 1.0)
    with pytest.raises(AssertionError, match=r"LoopWaiter\._wait.*did not come to rest.*opening=1"):
        await sweep_over(face, lambda: queue(face, tenants[0], tenants[1], after), nothing, 1)
    monkeypatch.undo()
    for claim in left:
        budget_on(face.db).hand_back(claim)


@pytest.mark.parametrize("same", [True, False], ids=["of its own tenant", "of another"])
@pytest.mark.parametrize("first", ["cancel", "grant"])
async def test_a_grant_and_a_cancellation_may_meet_in_either_order(
    async_face: MakeFace, tenants: list[Tenant], same: bool, first: str
) -> None:
    face = async_face(1)
    held = face.session(tenants[0])
    await held.scalar(HERE)
    waiter = asyncio.create_task(read(face, tenants[0 if same else 1]))
    after = asyncio.create_task(read(face, tenants[2]))
    while stats_of(face.db).waiting < 2:
        await asyncio.sleep(0)
    if first == "cancel":
        waiter.cancel()
        while stats_of(face.db).waiting == 2:
            await asyncio.sleep(0)
        await held.close()
    else:  # the verdict is there, and the waiter has not run since
        closing = asyncio.ensure_future(held.close())
        while stats_of(face.db).waiting == 2:
            await asyncio.sleep(0)
        waiter.cancel()
        await closing
    assert await asyncio.gather(waiter, after, return_exceptions=True) != [None, None]
    assert after.exception() is None
    await rested(face.db)
