"""Many at once: every session sees its own tenant's marker, connections stay bounded, eviction breaks nobody, nothing is left open."""

from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Engine

from tenantdb import Budget, Settings, Tenant, TenantDB, errors
from tests.conformance.app import MARKER, NOTES, note
from tests.conformance.colours import Face, MakeFace, MakeProcess
from tests.conformance.conftest import Estate
from tests.world import eventually


async def test_two_hundred_concurrent_sessions_over_ten_tenants_see_each_its_own_marker(async_face: MakeFace, estate: Estate) -> None:
    face = async_face()
    tenants = [estate.ten[number % 10] for number in range(200)]

    async def work(tenant: Tenant, *, bind: bool) -> bool:
        async def read(*key: Tenant) -> bool:
            async with face.session(*key) as session:
                first = await session.scalar(MARKER)
                await asyncio.sleep(0)
                return bool(first == await session.scalar(MARKER) == tenant.slug)

        if not bind:
            return await read(tenant)
        async with face.bound(tenant):
            await asyncio.sleep(0)
            return await read()

    seen = await asyncio.gather(*(work(tenant, bind=number % 2 == 0) for number, tenant in enumerate(tenants)))
    assert seen == [True] * 200


@pytest.mark.parametrize("connections", [100, 24])
def test_sixteen_threads_over_ten_tenants_see_each_their_own_marker(process: MakeProcess, estate: Estate, connections: int) -> None:
    def work(seed: int) -> int:
        chance = random.Random(seed)
        for _ in range(10):
            tenant = chance.choice(estate.ten)
            with db.tenant_context(tenant), db.session() as session:
                assert session.scalar(MARKER) == tenant.slug
                with db.connect() as connection:
                    assert connection.scalar(MARKER) == tenant.slug
        return 10

    db = process(budget=Budget(connections=connections, processes=1, per_tenant=2 * 16))
    with ThreadPoolExecutor(16) as executor:
        assert sum(executor.map(work, range(16))) == 160


def test_a_hundred_threads_that_come_first_get_one_engine(db: TenantDB, acme: Tenant) -> None:
    together = threading.Barrier(100)

    def work(_: int) -> Engine:
        together.wait(30)
        return db.engine("acme")

    with ThreadPoolExecutor(100) as executor:
        engines = list(executor.map(work, range(100)))
    assert all(engine is engines[0] for engine in engines)


def small_budget(estate: Estate, connections: int, **options: Any) -> Budget:
    """A process that may hold so many connections to tenants, all of them interactive."""
    registry = Settings.model_fields["registry_pool_size"].default + 1 if estate.backend == "postgresql" else 0
    return Budget(connections=connections + registry, processes=1, background=0, administration=0, **options)


# -- eviction --------------------------------------------------------------------------------------------------------------------------


async def test_eviction_never_breaks_a_leased_session_and_the_budget_is_never_exceeded(
    make_face: MakeFace, estate: Estate, fresh: Tenant
) -> None:
    face = make_face(budget=small_budget(estate, 2))
    async with face.session(fresh) as held:
        await held.execute(note(1))
        for tenant in estate.ten:
            assert await face.marker(tenant) == tenant.slug
            assert await held.scalar(MARKER) == fresh.slug
            assert estate.world.open_connections(estate.db, [*estate.ten, fresh]) <= 2
        await held.commit()
        assert await held.scalar(MARKER) == fresh.slug
    assert await face.rows(NOTES, fresh) == [1]
    assert face.db.stats()[0].evictions >= 9


async def test_more_tenants_than_the_budget_has_connections_cannot_be_in_use(make_face: MakeFace, estate: Estate) -> None:
    face = make_face(budget=small_budget(estate, 3, acquire_timeout=0.1))
    sessions = [face.session(tenant) for tenant in estate.ten[:3]]
    for session, tenant in zip(sessions, estate.ten, strict=False):
        assert await session.scalar(MARKER) == tenant.slug
    with pytest.raises(errors.BudgetExhausted) as caught:
        await face.marker(estate.ten[3])
    assert (caught.value.budget.in_use, caught.value.budget.limit) == (3, 3)
    assert caught.value.held == tuple(tenant.slug for tenant in estate.ten[:3])
    for session in sessions:
        await session.close()
    assert await face.marker(estate.ten[3]) == estate.ten[3].slug


async def test_after_close_nothing_is_open_and_what_was_leased_closes_when_it_comes_back(
    make_face: MakeFace, estate: Estate, acme: Tenant, beta: Tenant
) -> None:
    face = make_face()
    assert await face.marker("beta") == "beta"
    held = face.session("acme")
    await held.scalar(MARKER)
    assert estate.world.open_connections(estate.db, [acme, beta]) == 2

    await face.close()
    eventually(lambda: estate.world.open_connections(estate.db, [beta]) == 0)
    assert await held.scalar(MARKER) == "acme"
    await held.close()
    eventually(estate.nothing_is_open)


# -- a tenant's pool -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [0, 0.2])
async def test_a_tenant_whose_connections_are_all_in_use_is_refused_in_time(
    make_face: MakeFace, acme: Tenant, beta: Tenant, patience: float
) -> None:
    face = make_face(budget=Budget(per_tenant=1, acquire_timeout=patience))
    async with face.session("acme") as held:
        await held.scalar(MARKER)
        with pytest.raises(errors.BudgetExhausted) as caught:
            await face.marker("acme")
        assert (caught.value.tenant, caught.value.budget.per_tenant) == ("acme", 1)
        assert patience <= caught.value.waited < patience + 5
        assert await face.marker("beta") == "beta"  # another tenant's crowd is none of its business
    assert await face.marker("acme") == "acme"


@pytest.mark.parametrize("capped", [True, False], ids=["with a cap", "without"])
async def test_a_tenant_that_takes_all_it_may_have_keeps_no_other_waiting(
    make_face: MakeFace, estate: Estate, acme: Tenant, beta: Tenant, capped: bool
) -> None:
    """N1, by counts: beta is served at once while acme's own crowd waits for acme. Without the cap acme has all there is."""
    face = make_face(budget=small_budget(estate, 4, per_tenant=2 if capped else 4, acquire_timeout=20.0))
    held = [face.session("acme") for _ in range(2 if capped else 4)]
    for session in held:
        await session.scalar(MARKER)

    def wait_in_line(_: int) -> object:
        with face.db.session("acme") as session:
            return session.scalar(MARKER)

    with ThreadPoolExecutor(10) as crowd:
        waiting = [crowd.submit(wait_in_line, number) for number in range(10)]
        try:
            eventually(lambda: face.db.stats()[0].waiting == 10)
            before = face.db.stats()[0]
            if capped:
                for _ in range(20):
                    async with face.session("beta") as one, face.session("beta") as two:
                        assert await one.scalar(MARKER) == await two.scalar(MARKER) == "beta"
                after = face.db.stats()[0]
                assert (after.waits, after.timeouts, after.waiting) == (before.waits, before.timeouts, 10)
                assert after.opens - before.opens == 2 and after.reuses - before.reuses == 38
                assert estate.world.open_connections(estate.db, [acme]) <= 2 and after.held <= 4
            else:
                assert (before.in_use, before.idle) == (4, 0)  # nothing is left for beta
        finally:
            for session in held:
                await session.close()
            assert {future.result(30) for future in waiting} == {"acme"}


async def test_who_waits_for_a_connection_gets_the_one_that_comes_back(async_face: MakeFace, acme: Tenant) -> None:
    face = async_face(budget=Budget(per_tenant=1))
    async with face.session("acme") as held:
        await held.scalar(MARKER)
        waiting = asyncio.create_task(face.marker("acme"))
        await asyncio.sleep(0)
        assert not waiting.done()
    assert await waiting == "acme"


@pytest.mark.parametrize("steps", range(0, 60, 4))
async def test_a_session_cancelled_at_any_point_gives_its_connection_back(async_face: MakeFace, acme: Tenant, steps: int) -> None:
    """C8, C22: cancelled after any number of turns of the loop, with one connection to lose."""
    face = async_face(budget=Budget(per_tenant=1, acquire_timeout=5))
    task = asyncio.create_task(face.marker("acme"))
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    assert (await asyncio.gather(task, return_exceptions=True))[0] == "acme" or task.cancelled()
    assert await face.marker("acme") == "acme"


def test_a_thread_and_event_loops_share_no_connection(db: TenantDB, acme: Tenant) -> None:
    async def in_a_loop() -> object:
        face = Face(db, "async")
        try:
            return await face.marker("acme")
        finally:
            db._engines.close_loop()

    with db.session("acme") as session:
        assert session.scalar(MARKER) == "acme"
        assert asyncio.run(in_a_loop()) == "acme"
        assert asyncio.run(in_a_loop()) == "acme"
        assert session.scalar(MARKER) == "acme"


def test_a_loop_that_ended_without_closing_leaves_nothing_open_once_the_database_is_closed(
    db: TenantDB, estate: Estate, acme: Tenant
) -> None:
    async def in_a_loop() -> object:
        return await Face(db, "async").marker("acme")

    assert asyncio.run(in_a_loop()) == "acme"
    assert asyncio.run(in_a_loop()) == "acme"
    db.close()
    eventually(estate.nothing_is_open)


def test_the_engine_of_a_changed_tenant_is_let_go(db: TenantDB, fresh: Tenant) -> None:
    before = db.engine(fresh)
    db.suspend(fresh)
    db.activate(fresh)
    assert db.engine(fresh) is not before
    assert db.engine(fresh) is db.engine(fresh)


async def test_close_may_be_called_twice(face: Face, acme: Tenant) -> None:
    assert await face.marker("acme") == "acme"
    await face.close()
    await face.close()
