"""Real PostgreSQL, and everything that goes wrong with it. Each test is a process of its own in a `Town`; see there what it may not leave
behind."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tenantdb import Tenant, TenantDB
from tests.chaos.proxy import Proxy
from tests.chaos.town import MAX_CONNECTIONS, Town, budget, know, nothing_left, rested
from tests.conformance.colours import COLOURS, Face, MakeFace, MakeProcess
from tests.world import pg_world


@pytest.fixture(scope="session")
def town() -> Iterator[Town]:
    with pg_world(max_connections=str(MAX_CONNECTIONS), autovacuum="off") as world, Proxy(world.server.port) as proxy:
        yield Town(world, proxy)


@pytest.fixture(autouse=True)
def _quick_garbage() -> Iterator[None]:
    """Collections are many here; they need not look at what was there before the test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def tenants(town: Town) -> list[Tenant]:
    return town.near


@pytest.fixture
def process(town: Town) -> Iterator[MakeProcess]:
    """Makes processes of the town's application, which know all tenants there are. ``connections`` is for tenants of ``near``."""
    made: list[TenantDB] = []
    others = threading.enumerate()

    def make(connections: int = 10, *, server: str = "near", **options: Any) -> TenantDB:
        known = town.near if server == "near" else town.far
        settings = {name: options.pop(name) for name in list(options) if name not in budget(1).__dataclass_fields__}
        db = town.world.twin(town.db, budget=budget(connections, **options), **settings)
        made.append(db)
        know(db, known)
        return db

    yield make
    gc.collect()
    town.proxy.heal()
    nothing_left(town, made, others)


@pytest.fixture
def db(process: MakeProcess) -> TenantDB:
    return process()


@pytest.fixture
async def async_face(process: MakeProcess) -> AsyncIterator[MakeFace]:
    """Makes processes in asyncio, closed in the test's own event loop. No task is left."""
    made: list[Face] = []

    def make(*args: Any, **options: Any) -> Face:
        made.append(Face(process(*args, **options), "async"))
        return made[-1]

    yield make
    gc.collect()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=5)
    for face in made:
        await rested(face.db)
        await face.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.fixture(params=COLOURS)
def make_face(request: pytest.FixtureRequest, process: MakeProcess) -> MakeFace:
    """Makes processes in both colours."""
    return _face_maker(request, process)


@pytest.fixture(params=[pytest.param("sync", marks=pytest.mark.long), "async"])
def slow_face(request: pytest.FixtureRequest, process: MakeProcess) -> MakeFace:
    """The same for what takes seconds in each colour: both in the long run only."""
    return _face_maker(request, process)


def _face_maker(request: pytest.FixtureRequest, process: MakeProcess) -> MakeFace:
    if request.param == "async":
        made: MakeFace = request.getfixturevalue("async_face")
        return made
    return lambda *args, **options: Face(process(*args, **options), "sync")
