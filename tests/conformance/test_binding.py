"""A bound tenant belongs to one block of code: what happens inside it, beside it and after it."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tenantdb import Tenant, TenantDB, current_tenant, errors
from tests.conformance.app import MARKER
from tests.conformance.colours import WAYS, Face, MakeFace

every_way = pytest.mark.parametrize("way", WAYS)


@every_way
async def test_inside_a_block_the_bound_tenant_is_meant(face: Face, acme: Tenant, beta: Tenant, way: str) -> None:
    async with face.bound("acme") as tenant:
        assert tenant.id == current_tenant().id == acme.id
        assert await face.read(way) == "acme"
    async with face.bound(beta.id):
        assert await face.read(way) == "beta"
    with pytest.raises(errors.NoTenantBound):
        await face.read(way)


@every_way
async def test_inside_a_block_no_other_tenant_is_reached(face: Face, acme: Tenant, beta: Tenant, way: str) -> None:
    async with face.bound("acme"):
        for key in ("beta", beta, beta.id, str(beta.id)):
            with pytest.raises(errors.TenantAlreadyBound):
                await face.read(way, key)
        for key in ("acme", acme, acme.id, str(acme.id)):
            assert await face.read(way, key) == "acme"
    assert await face.read(way, "beta") == "beta"


async def test_a_block_inside_a_block_says_that_it_is_meant_and_gives_back_the_outer_one(face: Face, acme: Tenant, beta: Tenant) -> None:
    async with face.bound("acme"):
        with pytest.raises(errors.TenantAlreadyBound):
            async with face.bound("beta"):
                pass
        assert await face.marker() == "acme"

        with pytest.raises(ZeroDivisionError):
            async with face.bound("beta", switch=True):
                assert await face.marker() == "beta"
                raise ZeroDivisionError
        assert await face.marker() == "acme"

        async with face.bound("acme"):
            assert await face.marker() == "acme"
        assert await face.marker() == "acme"


async def test_a_tenant_that_is_not_served_is_not_bound(face: Face, fresh: Tenant) -> None:
    await face.do.suspend(fresh)
    with pytest.raises(errors.TenantSuspended):
        async with face.bound(fresh):
            raise AssertionError("the block was entered")
    with pytest.raises(errors.TenantNotFound):
        async with face.bound("nobody"):
            raise AssertionError("the block was entered")
    with pytest.raises(errors.NoTenantBound):
        current_tenant()


async def test_a_tenant_suspended_inside_the_block_is_refused_to_its_next_session(face: Face, fresh: Tenant) -> None:
    async with face.bound(fresh):
        assert await face.marker() == fresh.slug
        await face.do.suspend(fresh)
        with pytest.raises(errors.TenantSuspended):
            await face.marker()


# -- as a decorator --------------------------------------------------------------------------------------------------------------------


def test_a_decorated_function_has_the_tenant_while_it_runs(db: TenantDB, acme: Tenant) -> None:
    @db.tenant_context("acme")
    def marker() -> object:
        with db.session() as session:
            return session.scalar(MARKER)

    assert marker() == "acme"
    with pytest.raises(errors.NoTenantBound):
        db.session()


def test_a_decorated_generator_has_the_tenant_while_its_body_runs_and_its_caller_does_not(db: TenantDB, acme: Tenant, beta: Tenant) -> None:
    @db.tenant_context("acme")
    def read_markers() -> Iterator[object]:
        for _ in range(2):
            with db.session() as session:
                yield session.scalar(MARKER)

    seen = []
    for marker in read_markers():
        seen.append(marker)
        with pytest.raises(errors.NoTenantBound):
            db.session()
        with db.session("beta") as session:
            assert session.scalar(MARKER) == "beta"
    assert seen == ["acme", "acme"]


async def test_a_decorated_coroutine_has_the_tenant_while_it_runs(async_face: MakeFace, acme: Tenant) -> None:
    face = async_face()
    assert face.adb is not None

    @face.adb.tenant_context("acme")
    async def marker() -> object:
        return await face.marker()

    assert await marker() == "acme"
    with pytest.raises(errors.NoTenantBound):
        await face.marker()


async def test_a_decorated_async_generator_has_the_tenant_while_its_body_runs_and_its_caller_does_not(
    async_face: MakeFace, acme: Tenant, beta: Tenant
) -> None:
    face = async_face()
    assert face.adb is not None

    @face.adb.tenant_context("acme")
    async def read_markers() -> AsyncIterator[object]:
        for _ in range(2):
            async with face.session() as session:
                yield await session.scalar(MARKER)

    seen = []
    async for marker in read_markers():
        seen.append(marker)
        with pytest.raises(errors.NoTenantBound):
            await face.marker()
        assert await face.marker("beta") == "beta"
    assert seen == ["acme", "acme"]


def test_a_decorated_function_is_refused_when_its_tenant_was_suspended_after_it_was_decorated(db: TenantDB, fresh: Tenant) -> None:
    @db.tenant_context(fresh)
    def work() -> str:
        return current_tenant().slug

    assert work() == fresh.slug
    db.suspend(fresh)
    with pytest.raises(errors.TenantSuspended):
        work()


# -- threads and tasks -----------------------------------------------------------------------------------------------------------------


def test_a_thread_does_not_inherit_the_tenant_unless_it_is_handed_the_context(db: TenantDB, acme: Tenant) -> None:
    def marker() -> object:
        with db.session() as session:
            return session.scalar(MARKER)

    with ThreadPoolExecutor(1) as executor, db.tenant_context("acme"):
        with pytest.raises(errors.NoTenantBound):
            executor.submit(marker).result()
        assert executor.submit(contextvars.copy_context().run, marker).result() == "acme"


def test_a_thread_that_outlives_the_block_is_refused(db: TenantDB, acme: Tenant) -> None:
    with db.tenant_context("acme"):
        inherited = contextvars.copy_context()
    outcome: list[object] = []

    def late() -> None:
        try:
            outcome.append(db.session())
        except errors.TenantContextClosed as error:
            outcome.append(error.tenant)
        with db.session("acme") as session:  # who names a tenant knows which
            outcome.append(session.scalar(MARKER))

    thread = threading.Thread(target=inherited.run, args=[late])
    thread.start()
    thread.join()
    assert outcome == ["acme", "acme"]


async def test_a_task_inherits_the_tenant_and_is_refused_when_the_block_has_ended(face: Face, acme: Tenant) -> None:
    block_ended = asyncio.Event()

    async def outliving() -> str:
        assert await face.marker() == "acme"
        await block_ended.wait()
        with pytest.raises(errors.TenantContextClosed):
            await face.marker()
        with pytest.raises(errors.TenantContextClosed):
            current_tenant()
        async with face.bound("acme"):
            return str(await face.marker())

    async with face.bound("acme"):
        task = asyncio.create_task(outliving())
        assert await asyncio.to_thread(lambda: current_tenant().slug) == "acme"
    block_ended.set()
    assert await task == "acme"


async def test_tasks_side_by_side_have_each_their_own_tenant(face: Face, acme: Tenant, beta: Tenant) -> None:
    async def work(slug: str) -> list[object]:
        seen = []
        async with face.bound(slug):
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(await face.marker())
        return seen

    assert list(await asyncio.gather(work("acme"), work("beta"))) == [["acme"] * 3, ["beta"] * 3]


@pytest.mark.parametrize("exit_by", ["return", "error", "cancel", "timeout"])
async def test_however_a_block_ends_nothing_stays_bound(face: Face, acme: Tenant, exit_by: str) -> None:
    entered = asyncio.Event()

    async def work() -> None:
        try:
            async with face.bound("acme"), face.session() as session:
                await session.scalar(MARKER)
                entered.set()
                if exit_by == "error":
                    raise ZeroDivisionError
                if exit_by != "return":
                    await asyncio.Event().wait()
        finally:
            with pytest.raises(errors.NoTenantBound):
                current_tenant()

    if exit_by == "return":
        await work()
    elif exit_by == "error":
        with pytest.raises(ZeroDivisionError):
            await work()
    elif exit_by == "cancel":
        task = asyncio.create_task(work())
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(work(), 0.2)
    with pytest.raises(errors.NoTenantBound):
        current_tenant()
    assert await face.marker("acme") == "acme"
