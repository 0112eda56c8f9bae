"""What a coroutine waits for when the registry swallows what it is sent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

from tenantdb.connections.lookup import Lookups
from tenantdb.errors import RegistryUnavailable


@pytest.fixture
def silent() -> Iterator[threading.Event]:
    """Set, it lets everybody go who asks a registry that does not answer."""
    answered = threading.Event()
    yield answered
    answered.set()


def lookups(patience: float) -> Lookups:
    return Lookups(cast(Any, None), cast(Any, None), patience=patience)


async def test_whoever_waits_behind_questions_that_are_not_answered_is_told_so_in_time(silent: threading.Event) -> None:
    asked: list[int] = []

    def ask(number: int) -> None:
        asked.append(number)
        silent.wait()

    run = lookups(0.01).run
    told = await asyncio.gather(*(run(ask, number) for number in range(40)), return_exceptions=True)

    assert [type(each) for each in told] == [RegistryUnavailable] * 40
    silent.set()
    assert len(asked) <= 4  # and nobody asks for those who have left


async def test_whoever_is_patient_waits_for_the_answer(silent: threading.Event) -> None:
    waiting = asyncio.ensure_future(lookups(3600.0).run(silent.wait))
    await asyncio.wait([waiting], timeout=0.05)
    assert not waiting.done()

    silent.set()
    assert await waiting is True
