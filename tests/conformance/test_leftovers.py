"""What a block leaves behind: connections that were leased in it and are still out when it has ended are found, told, and not disturbed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tenantdb import Tenant, bind_tenant
from tenantdb.context import watch_for_leftovers
from tenantdb.errors import LeftBehind
from tenantdb.events import LeaseLeft
from tests.conformance.app import MARKER
from tests.conformance.colours import Face, MakeFace


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "tenantdb.context" and record.levelno == logging.WARNING]


def observed(face: Face) -> list[LeaseLeft]:
    found: list[LeaseLeft] = []
    face.db.observe(lambda event: found.append(event) if isinstance(event, LeaseLeft) else None)
    return found


async def ask_and_keep(face: Face, *tenant: Any) -> Any:
    """A session that has asked something and is still open."""
    session = face.session(*tenant)
    await session.scalar(MARKER)
    return session


async def test_a_session_that_is_open_when_its_block_ends_is_told_of_and_goes_on(
    make_face: MakeFace, acme: Tenant, caplog: pytest.LogCaptureFixture
) -> None:
    face = make_face(leak_sample=1.0)
    seen = observed(face)
    async with face.bound("acme"):
        session = await ask_and_keep(face)

    (message,) = told(caplog)
    assert str(acme.id) in message and "1 leased connections" in message and "ask_and_keep" in message
    assert [(event.tenant, event.seconds >= 0) for event in seen] == [("acme", True)]
    assert "ask_and_keep" in seen[0].place and "/sqlalchemy/" not in seen[0].place
    assert await session.scalar(MARKER) == "acme"
    await session.close()
    assert len(told(caplog)) == len(seen) == 1


async def test_without_a_sample_it_is_told_without_the_place(make_face: MakeFace, acme: Tenant, caplog: pytest.LogCaptureFixture) -> None:
    face = make_face(leak_sample=0.0)
    seen = observed(face)
    async with face.bound("acme"):
        session = await ask_and_keep(face)
    await session.close()
    assert [event.place for event in seen] == [""]
    assert "ask_and_keep" not in told(caplog)[0]


async def closed(session: Any) -> None:
    await session.close()


async def committed(session: Any) -> None:
    await session.commit()


async def failed(session: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        async with session:
            raise ZeroDivisionError


@pytest.mark.parametrize("end", [closed, committed, failed])
async def test_what_was_given_back_in_the_block_is_not_told(
    face: Face, acme: Tenant, end: Callable[[Any], Awaitable[None]], caplog: pytest.LogCaptureFixture
) -> None:
    with watch_for_leftovers():
        async with face.bound("acme"):
            session = await ask_and_keep(face)
            await end(session)
        async with face.bound("acme"), face.session() as session:
            await session.scalar(MARKER)
    assert told(caplog) == []


async def test_under_watch_it_is_an_error_that_says_where(face: Face, acme: Tenant) -> None:
    with watch_for_leftovers():
        with pytest.raises(LeftBehind) as caught:
            async with face.bound("acme"):
                session = await ask_and_keep(face)
        assert (caught.value.tenant, caught.value.leases, caught.value.blocks) == ("acme", 1, 0)
        assert "ask_and_keep" in caught.value.place
        await session.close()
        with pytest.raises(ZeroDivisionError):  # which is not covered up
            async with face.bound("acme"):
                session = await ask_and_keep(face)
                raise ZeroDivisionError
        await session.close()
    async with face.bound("acme"):
        session = await ask_and_keep(face)
    await session.close()


async def test_a_block_inside_passes_on_what_is_open_to_the_one_around_it(
    face: Face, acme: Tenant, caplog: pytest.LogCaptureFixture
) -> None:
    async with face.bound("acme"):
        async with face.bound("acme"):
            session = await ask_and_keep(face)
        await session.close()
    assert told(caplog) == []

    async with face.bound("acme"):
        async with face.bound("acme"):
            session = await ask_and_keep(face)
        assert told(caplog) == []
    assert len(told(caplog)) == 1
    await session.close()


async def test_a_block_of_another_tenant_inside_passes_on_nothing(
    face: Face, acme: Tenant, beta: Tenant, caplog: pytest.LogCaptureFixture
) -> None:
    async with face.bound("acme"):
        async with face.bound("beta", switch=True):
            session = await ask_and_keep(face)
        assert str(beta.id) in told(caplog)[0]
        await session.close()
    assert len(told(caplog)) == 1


async def test_a_task_that_outlives_the_block_with_a_session_open_is_told_of_and_one_that_took_the_tenant_along_is_not(
    face: Face, acme: Tenant, caplog: pytest.LogCaptureFixture
) -> None:
    for takes_it_along in (True, False):
        opened, ended = asyncio.Event(), asyncio.Event()

        async def late(opened: asyncio.Event = opened, ended: asyncio.Event = ended) -> str:
            session = await ask_and_keep(face)
            opened.set()
            await ended.wait()
            await session.close()
            return "done"

        async with face.bound("acme"):
            task = asyncio.create_task((bind_tenant(late) if takes_it_along else late)())
            await opened.wait()
        ended.set()
        assert await task == "done"
        assert len(told(caplog)) == (0 if takes_it_along else 1)


async def test_a_generator_that_ends_with_a_session_open_is_told_of(face: Face, acme: Tenant, caplog: pytest.LogCaptureFixture) -> None:
    kept = []

    @face.db.tenant_context("acme")
    async def rows() -> Any:
        kept.append(await ask_and_keep(face))
        yield 1
        yield 2

    assert [row async for row in rows()] == [1, 2]
    assert len(told(caplog)) == 1
    await kept[0].close()


async def test_what_is_leased_without_a_block_or_after_it_is_nobodys_leftover(
    face: Face, acme: Tenant, caplog: pytest.LogCaptureFixture
) -> None:
    session = await ask_and_keep(face, "acme")
    async with face.bound("acme"):
        opened = face.session()  # which has asked for nothing yet
    assert await opened.scalar(MARKER) == "acme"
    await opened.close()
    await session.close()
    assert told(caplog) == []
