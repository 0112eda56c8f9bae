"""One suite for every backend and both colours.

The tenants live in an estate that the session shares; each test is a process of its own on it (`World.twin`), at whose end nothing may be
left open.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import pytest
from sqlalchemy import delete, update

from tenantdb import Tenant, TenantDB
from tenantdb.connections import pools
from tenantdb.registry import tables
from tests.conformance.app import MIGRATIONS, notes, write_marker
from tests.conformance.colours import COLOURS, Face, MakeFace, MakeProcess
from tests.world import World, eventually

BACKENDS = ("sqlite", "postgresql")


class Estate:
    """An application with tenants. ``db`` provisions them and opens nothing else."""

    def __init__(self, world: World, **overrides: Any) -> None:
        self.world = world
        self.backend = world.backend
        self.db = world.make_db(migrations=MIGRATIONS, **overrides)
        self.db.seed(write_marker)
        self.tenants: list[Tenant] = []
        self._unused: list[Tenant] = []

    def tenant(self, slug: str | None = None) -> Tenant:
        """A new one."""
        made = self.db.provision(slug or f"t-{secrets.token_hex(6)}")
        self.tenants.append(made)
        return made

    @contextmanager
    def borrowed(self) -> Iterator[Tenant]:
        """A tenant as if new, for making one takes half a second. What is spoilt beyond notes and state is the borrower's to mend."""
        tenant = self._unused.pop() if self._unused else self.tenant()
        yield self.db.tenants.get(tenant.id)
        self.mend(tenant)
        with self.world.inside(tenant, self.db) as connection:
            connection.execute(delete(notes))
        self._unused.append(tenant)

    def mend(self, tenant: Tenant) -> None:
        """Have a tenant served again, whatever a test has made of its state."""
        shut = {"state": "suspended", "fence": "pending", "deleted_at": None, "purge_after": None, "legal_hold": None}
        with self.world.registry(self.db) as registry:
            registry.execute(update(tables.tenants).where(tables.tenants.c.id == tenant.id).values(shut))
        self.db.activate(tenant.id)

    @cached_property
    def acme(self) -> Tenant:
        return self.tenant("acme")

    @cached_property
    def beta(self) -> Tenant:
        return self.tenant("beta")

    @cached_property
    def ten(self) -> list[Tenant]:
        return [self.tenant(f"ten-{number}") for number in range(10)]

    def nothing_is_open(self) -> bool:
        return self.world.open_connections(self.db, self.tenants) == 0


@pytest.fixture(scope="session", params=BACKENDS)
def world(request: pytest.FixtureRequest) -> World:
    made: World = request.getfixturevalue(f"{request.param}_world")
    return made


@pytest.fixture(scope="session")
def estate(world: World) -> Estate:
    return Estate(world)


@pytest.fixture
def new_estate(world: World) -> Estate:
    """An estate of the test's own, for what would spoil the shared registry."""
    return Estate(world)


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test repairs is to be seen at once, not when the failure before it is forgotten; tests/chaos has the memory's own tests."""
    monkeypatch.setattr(pools, "_TENANT_MEMORY", 0.0)
    monkeypatch.setattr(pools, "_QUARANTINE", 0.0)


@pytest.fixture
def acme(estate: Estate) -> Tenant:
    return estate.acme


@pytest.fixture
def beta(estate: Estate) -> Tenant:
    return estate.beta


@pytest.fixture
def fresh(estate: Estate) -> Iterator[Tenant]:
    """A tenant that nobody else uses: active, with its marker, without notes."""
    with estate.borrowed() as tenant:
        yield tenant


@pytest.fixture
def process(estate: Estate) -> Iterator[MakeProcess]:
    """Makes processes of the shared application, with settings of their own. Nothing is open when the test is over."""
    made: list[TenantDB] = []

    def make(**overrides: Any) -> TenantDB:
        made.append(estate.world.twin(estate.db, **overrides))
        made[-1].seed(write_marker)
        return made[-1]

    yield make
    for db in made:
        db.close()
    eventually(estate.nothing_is_open)


@pytest.fixture
def db(process: MakeProcess) -> TenantDB:
    """A process of the test's own, in the blocking colour."""
    return process()


@pytest.fixture
async def async_face(process: MakeProcess) -> AsyncIterator[MakeFace]:
    """Makes processes in asyncio, closed in the test's own event loop."""
    made: list[Face] = []

    def make(**overrides: Any) -> Face:
        made.append(Face(process(**overrides), "async"))
        return made[-1]

    yield make
    for face in made:
        await face.close()


@pytest.fixture(params=COLOURS)
def make_face(request: pytest.FixtureRequest, process: MakeProcess, async_face: MakeFace) -> MakeFace:
    """Makes processes in both colours."""
    if request.param == "async":
        return async_face
    return lambda **overrides: Face(process(**overrides), "sync")


@pytest.fixture
def face(make_face: MakeFace) -> Face:
    """A process of the test's own, in both colours."""
    return make_face()
