"""Where a request's sessions end: before the request's block does, whatever the response is; a session that is kept beyond is found."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from fastapi import BackgroundTasks, FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy import select

from tenantdb import bind_tenant, current_tenant
from tenantdb.asgi import RegistryAuth
from tenantdb.context import watch_for_leftovers
from tenantdb.errors import LeftBehind, TenantContextClosed
from tenantdb.fastapi import AsyncTenantSession, AsyncTenantTransaction, TenantSession, install
from tests.adapters.world import Patient, World, request

NAMES = select(Patient.name).order_by(Patient.id)


@pytest.fixture
def kept() -> list[Any]:
    return []


@pytest.fixture
def app(world: World, kept: list[Any]) -> FastAPI:
    app = FastAPI()
    install(app, world.adb, authenticate=RegistryAuth(world.tokens, world.adb))

    @app.get("/patients")
    async def patients(session: AsyncTenantSession) -> list[str]:
        return list(await session.scalars(NAMES))

    @app.get("/blocking")
    def blocking(session: TenantSession) -> list[str]:
        return list(session.scalars(NAMES))

    @app.get("/streamed")
    async def streamed(session: AsyncTenantTransaction) -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            async with world.adb.session() as own:
                for name in await own.scalars(NAMES):
                    yield name

        await session.scalars(NAMES)
        return StreamingResponse(lines())

    @app.get("/streamed-blocking")
    def streamed_blocking() -> StreamingResponse:
        def lines() -> Iterator[str]:
            with world.db.session() as own:
                yield from own.scalars(NAMES)

        return StreamingResponse(lines())

    @app.get("/background")
    async def background(tasks: BackgroundTasks) -> str:
        async def later() -> None:
            async with world.adb.session() as own:
                kept.append(list(await own.scalars(NAMES)))

        tasks.add_task(later)
        return "later"

    @app.get("/kept")
    async def keep() -> list[str]:
        session = world.adb.session()
        kept.append(session)
        return list(await session.scalars(NAMES))

    @app.get("/outliving")
    async def outliving() -> str:
        async def late() -> str:
            await release.wait()
            async with world.adb.session() as own:
                return f"{current_tenant().slug} {list(await own.scalars(NAMES))}"

        release = asyncio.Event()
        kept.extend([release, asyncio.create_task(bind_tenant(late)()), asyncio.create_task(late())])
        return "started"

    return app


@pytest.mark.parametrize("path", ["/patients", "/blocking", "/streamed", "/streamed-blocking", "/background"])
async def test_a_requests_own_sessions_are_no_leftovers(world: World, app: FastAPI, path: str, caplog: pytest.LogCaptureFixture) -> None:
    with watch_for_leftovers():
        answer = await request(app, path, world.as_ann)
    assert answer.status == 200
    assert [record for record in caplog.records if record.name == "tenantdb.context"] == []
    await world.adb.close()


async def test_a_session_that_is_kept_beyond_its_request_is_found(
    world: World, app: FastAPI, kept: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    answer = await request(app, "/kept", world.as_ann)
    assert answer.json == ["acme"]
    (record,) = [record for record in caplog.records if record.name == "tenantdb.context"]
    assert record.levelno == logging.WARNING
    assert str(world.acme.id) in record.getMessage()
    await kept[0].close()

    with watch_for_leftovers(), pytest.raises(LeftBehind, match="test_leftovers"):
        await request(app, "/kept", world.as_ann)
    await kept[1].close()
    await world.adb.close()


async def test_a_task_that_outlives_its_request_needs_to_take_the_tenant_along(world: World, app: FastAPI, kept: list[Any]) -> None:
    await request(app, "/outliving", world.as_ann)
    release, bound, without = kept
    release.set()
    assert await bound == "acme ['acme']"
    with pytest.raises(TenantContextClosed):
        await without
    await world.adb.close()
