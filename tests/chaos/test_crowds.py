"""More who want a connection than there are connections: all are served or refused in time, each by its own database, and nothing is lost.

Threads and coroutines draw on one budget and wake each other."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg import sql
from sqlalchemy.exc import SAWarning

from tenantdb import Tenant, TenantDB
from tenantdb.connections import budget as budgets
from tenantdb.errors import BudgetExhausted
from tests.chaos.town import HERE, Town, Watch, budget_on, know, rested, stats_of, whose
from tests.conformance.colours import Face, MakeFace, MakeProcess
from tests.world import eventually


def zipf(count: int, seed: int) -> Any:
    """Draws of a tenant's number, the first most often."""
    chance, weights = random.Random(seed), [1 / (number + 1) for number in range(count)]
    return lambda: chance.choices(range(count), weights)[0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("tasks", "threads", "size", "limit"),
    [(1_500, 16, 30, 12), pytest.param(10_000, 64, 300, 60, marks=pytest.mark.long)],
)
async def test_a_crowd_of_tasks_and_threads_is_served_by_the_right_databases_within_the_budget(
    async_face: MakeFace, town: Town, tasks: int, threads: int, size: int, limit: int
) -> None:
    tenants = town.near if size == 30 else town.three_hundred
    face = async_face(limit, acquire_timeout=60.0)
    know(face.db, tenants)
    draw = zipf(size, 1)
    slow = 0.0

    async def one(tenant: Tenant) -> str:
        nonlocal slow
        began = time.monotonic()
        try:
            async with face.session(tenant) as session:
                database = await session.scalar(HERE)
                slow = max(slow, time.monotonic() - began)
                if database != tenant.database or await session.scalar(HERE) != tenant.database:
                    return "wrong"
        except BudgetExhausted:
            return "refused"
        return "served"

    def thread(seed: int) -> Counter[str]:
        mine, seen = zipf(size, seed), Counter[str]()
        for _ in range(10):
            tenant = tenants[mine()]
            with face.db.session(tenant) as session:
                seen["served" if session.scalar(HERE) == tenant.database else "wrong"] += 1
        return seen

    with Watch(town) as watch, ThreadPoolExecutor(threads) as executor:
        blocking = [asyncio.wrap_future(executor.submit(thread, seed)) for seed in range(threads)]
        seen = Counter(await asyncio.gather(*(one(tenants[draw()]) for _ in range(tasks))))
        for counted in await asyncio.gather(*blocking):
            seen += counted
    assert seen == {"served": tasks + 10 * threads}
    assert watch.samples > 10
    assert limit // 2 < watch.peak <= limit
    assert slow < 60
    stats = stats_of(face.db)
    assert stats.opens + stats.reuses >= tasks + 10 * threads
    await rested(face.db)


async def test_those_for_whom_there_is_no_time_are_refused_in_time(async_face: MakeFace, tenants: list[Tenant]) -> None:
    face = async_face(2, acquire_timeout=0.3)
    held = [face.session(tenant) for tenant in tenants[:2]]
    for session in held:
        await session.scalar(HERE)
    began = time.monotonic()
    results = await asyncio.gather(*(whose(face, tenants[number % 30]) for number in range(200)), return_exceptions=True)
    took = time.monotonic() - began
    assert Counter(type(result) for result in results) == {BudgetExhausted: 200}
    assert took < 5
    assert stats_of(face.db).timeouts == 200
    for session in held:
        await session.close()
    assert await whose(face, tenants[5])


async def test_a_full_queue_refuses_at_once_and_says_so(async_face: MakeFace, tenants: list[Tenant]) -> None:
    face = async_face(1, max_waiting=4)
    async with face.session(tenants[0]) as held:
        await held.scalar(HERE)
        waiting = [asyncio.create_task(whose(face, tenant)) for tenant in tenants[1:5]]
        while stats_of(face.db).waiting < 4:
            await asyncio.sleep(0)
        with pytest.raises(BudgetExhausted, match="the queue is full") as caught:
            await whose(face, tenants[6])
        assert caught.value.waited < 1
    assert await asyncio.gather(*waiting) == [True] * 4


# -- one budget for threads and loops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [True, False], ids=["the same tenant", "another tenant"])
async def test_a_coroutine_that_waits_gets_the_place_that_a_thread_gives_back(
    async_face: MakeFace, tenants: list[Tenant], same: bool
) -> None:
    face = async_face(1)
    held = face.db.session(tenants[0])
    assert held.scalar(HERE) == tenants[0].database
    waiting = asyncio.create_task(whose(face, tenants[0 if same else 1]))
    while not stats_of(face.db).waiting:
        await asyncio.sleep(0)
    with ThreadPoolExecutor(1) as executor:
        executor.submit(held.close).result(10)
        assert await asyncio.wait_for(waiting, 10)


@pytest.mark.parametrize("same", [True, False], ids=["the same tenant", "another tenant"])
async def test_a_thread_that_waits_gets_the_place_that_a_coroutine_gives_back(
    async_face: MakeFace, tenants: list[Tenant], same: bool
) -> None:
    face = async_face(1)

    def blocking() -> object:
        with face.db.session(tenants[0 if same else 1]) as session:
            return session.scalar(HERE)

    async with face.session(tenants[0]) as held:
        await held.scalar(HERE)
        waiting = asyncio.get_running_loop().run_in_executor(None, blocking)
        while not stats_of(face.db).waiting:
            await asyncio.sleep(0.001)
    assert await asyncio.wait_for(waiting, 10) == tenants[0 if same else 1].database


def test_two_loops_in_two_threads_share_the_budget_and_no_connection(town: Town, process: MakeProcess, tenants: list[Tenant]) -> None:
    db = process(3)

    async def work(seed: int) -> list[bool]:
        face, chance = Face(db, "async"), random.Random(seed)
        try:
            return list(await asyncio.gather(*(whose(face, chance.choice(tenants[:6])) for _ in range(60))))
        finally:
            db._engines.close_loop()

    with Watch(town) as watch, ThreadPoolExecutor(2) as executor:
        seen = list(executor.map(lambda seed: asyncio.run(work(seed)), range(2)))
    assert seen == [[True] * 60] * 2
    assert watch.peak <= 3


def test_what_a_loop_left_idle_when_it_ended_makes_room_for_others(process: MakeProcess, tenants: list[Tenant], town: Town) -> None:
    db = process(2)
    face = Face(db, "async")
    for _ in range(3):  # the same tenant each time: the connection of the loop before can serve nobody
        assert asyncio.run(whose(face, tenants[0]))
    assert asyncio.run(whose(face, tenants[1]))
    with db.session(tenants[2]) as session, db.session(tenants[3]) as other:
        assert session.scalar(HERE) == tenants[2].database
        assert other.scalar(HERE) == tenants[3].database
        assert town.backends() == 2


def test_a_lease_that_a_loop_took_with_it_comes_back_when_it_is_collected(process: MakeProcess, tenants: list[Tenant]) -> None:
    db = process(1)

    async def forget() -> None:
        session = Face(db, "async").session(tenants[0])
        await session.scalar(HERE)
        kept.append(session)

    kept: list[Any] = []
    asyncio.run(forget())
    assert stats_of(db).in_use == 1
    with pytest.warns(SAWarning, match="garbage collector"):
        kept.clear()
        gc.collect()
    eventually(lambda: stats_of(db).in_use == 0)
    with db.session(tenants[1]) as session:
        assert session.scalar(HERE) == tenants[1].database


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("cancelled", [True, False], ids=["cancelled", "abandoned"])
def test_what_a_waiter_of_a_dead_loop_is_granted_goes_to_the_next(process: MakeProcess, tenants: list[Tenant], cancelled: bool) -> None:
    db = process(1)
    held = db.session(tenants[0])
    held.scalar(HERE)
    loop = asyncio.new_event_loop()
    waiting = loop.create_task(whose(Face(db, "async"), tenants[1]))

    async def until_it_waits() -> None:
        while not stats_of(db).waiting:
            await asyncio.sleep(0)

    loop.run_until_complete(until_it_waits())
    if cancelled:
        waiting.cancel()
        loop.run_until_complete(asyncio.wait([waiting]))
        assert waiting.cancelled()
    loop.close()
    seen: list[object] = []

    def blocking() -> None:
        with db.session(tenants[2]) as session:
            seen.append(session.scalar(HERE))

    thread = threading.Thread(target=blocking)
    thread.start()
    eventually(lambda: stats_of(db).waiting == (1 if cancelled else 2))
    held.close()
    thread.join(10)
    assert seen == [tenants[2].database]
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]
    del waiting


# -- limits change -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", ["sync", "async"])
async def test_a_budget_that_falls_and_rises_under_load_fails_nobody_and_is_kept(
    async_face: MakeFace, town: Town, tenants: list[Tenant], colour: str
) -> None:
    face = async_face(12, acquire_timeout=60.0)
    budget, over = budget_on(face.db), asyncio.Event()
    limits = budget.limits
    served = 0

    async def load(seed: int) -> None:
        nonlocal served
        chance = random.Random(seed)
        while not over.is_set():
            assert await whose(face, chance.choice(tenants[:20]))
            served += 1

    stop = threading.Event()

    def blocking(seed: int) -> None:
        nonlocal served
        chance = random.Random(seed)
        while not stop.is_set():
            tenant = chance.choice(tenants[:20])
            with face.db.session(tenant) as session:
                assert session.scalar(HERE) == tenant.database
            served += 1

    async def some_more() -> None:
        target = served + 60
        while served < target:
            await asyncio.sleep(0.002)

    with ThreadPoolExecutor(16) as executor:
        if colour == "async":
            workers = [asyncio.ensure_future(load(seed)) for seed in range(16)]
        else:
            workers = [asyncio.ensure_future(asyncio.wrap_future(executor.submit(blocking, seed))) for seed in range(16)]
        for connections, per_tenant in ((12, 4), (3, 2), (9, 1), (1, 1), (12, 4), (2, 1)):
            budget.set_limits(dataclasses.replace(limits, connections=connections, per_tenant=per_tenant))
            while stats_of(face.db).held > connections:  # what is leased closes when it comes back
                await asyncio.sleep(0.002)
            with Watch(town) as watch:
                await some_more()
            assert watch.peak <= connections, (connections, watch.peak, face.db.stats())
        over.set()
        stop.set()
        await asyncio.gather(*workers)


# -- the server has limits of its own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", ["sync", "async"])
async def test_a_budget_equal_to_the_roles_connection_limit_never_meets_it(
    async_face: MakeFace, town: Town, tenants: list[Tenant], colour: str
) -> None:
    """Every close waits for the server before its place is taken again, or the role would have one too many."""
    n = 3
    mine = tenants[25:28]
    face = async_face(2 * n, per_tenant=n, acquire_timeout=60.0)
    refusals: list[object] = []
    monitored = budget_on(face.db)
    pressure = monitored.under_pressure
    monitored.under_pressure = lambda: (refusals.append(1), pressure())[1]  # type: ignore[method-assign]
    for tenant in mine:
        town.run(f"ALTER ROLE {{}} CONNECTION LIMIT {n}", sql.Identifier(tenant.runtime_role or ""))

    async def load(seed: int) -> None:
        chance = random.Random(seed)
        for turn in range(25):
            tenant = chance.choice(mine)
            assert await whose(face, tenant)
            if turn % 8 == 7:
                await (await face.do.engine(tenant)).dispose()

    def blocking(seed: int) -> None:
        chance = random.Random(seed)
        for turn in range(25):
            tenant = chance.choice(mine)
            with face.db.session(tenant) as session:
                assert session.scalar(HERE) == tenant.database
            if turn % 8 == 7:
                face.db.engine(tenant).dispose()

    try:
        with ThreadPoolExecutor(12) as executor:
            if colour == "async":
                await asyncio.gather(*(load(seed) for seed in range(12)))
            else:
                await asyncio.gather(*(asyncio.wrap_future(executor.submit(blocking, seed)) for seed in range(12)))
    finally:
        for tenant in mine:
            town.run("ALTER ROLE {} CONNECTION LIMIT -1", sql.Identifier(tenant.runtime_role or ""))
    assert refusals == []
    assert stats_of(face.db).opens > 10


@pytest.mark.parametrize("colour", ["sync", "async"])
async def test_a_server_that_is_full_is_waited_for_within_the_deadline_and_asked_for_less(
    async_face: MakeFace, town: Town, tenants: list[Tenant], colour: str
) -> None:
    face = async_face(6, acquire_timeout=20.0)
    others = []
    with pytest.raises(psycopg.OperationalError):
        while True:
            others.append(psycopg.connect(town.world.url("app", face.db.settings.url.database or "")))
    assert len(others) > 50
    limit = stats_of(face.db).limit if face.db.stats() else 6

    def blocking(tenant: Tenant) -> bool:
        with face.db.session(tenant) as session:
            return bool(session.scalar(HERE) == tenant.database)

    with ThreadPoolExecutor(4) as executor:
        if colour == "async":
            asking = [asyncio.ensure_future(whose(face, tenant)) for tenant in tenants[:4]]
        else:
            asking = [asyncio.ensure_future(asyncio.wrap_future(executor.submit(blocking, tenant))) for tenant in tenants[:4]]
        try:
            while not (face.db.stats() and stats_of(face.db).limit < limit):
                await asyncio.sleep(0.005)
            assert not any(task.done() for task in asking)
            assert stats_of(face.db).available  # that it is full is no failure of the server
        finally:
            for other in others:
                other.close()
        assert await asyncio.gather(*asking) == [True] * 4


def test_what_the_server_refused_is_allowed_again_after_a_while(
    process: MakeProcess, monkeypatch: pytest.MonkeyPatch, tenants: list[Tenant]
) -> None:
    monkeypatch.setattr(budgets, "PRESSURE_TIME", 0.2)
    db = process(4)
    with db.session(tenants[0]) as session:
        session.scalar(HERE)
    budget_on(db).under_pressure()
    assert stats_of(db).limit == 3
    eventually(lambda: stats_of(db).limit == 4)


def test_a_deadline_of_zero_still_reuses_what_is_idle(process: MakeProcess, tenants: list[Tenant]) -> None:
    """What was just given back is not taken for dead because the answer to its reset is still under way."""
    db: TenantDB = process(2, acquire_timeout=0.0)
    for _ in range(200):
        with db.session(tenants[0]) as session:
            assert session.scalar(HERE) == tenants[0].database
    assert stats_of(db).opens == 1
