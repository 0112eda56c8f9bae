"""An outage is not an absence: what happens when the registry is away, empty, too old, too new, or changed by another process."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import update

from tenantdb import Tenant, TenantDB, errors
from tenantdb.registry import schema
from tenantdb.registry.tables import meta
from tests.conformance.app import MARKER, MIGRATIONS
from tests.conformance.colours import COLOURS, WAYS, Clock, Face, MakeFace
from tests.conformance.conftest import Estate
from tests.world import World


@pytest.fixture(scope="module")
def empty(world: World) -> Iterator[TenantDB]:
    """An application whose registry has tables and nothing in them, for tests that leave it so."""
    with world.make_db() as db:
        yield db


# -- away ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", COLOURS)
async def test_a_registry_out_of_reach_is_never_an_unknown_tenant_and_is_not_remembered(world: World, empty: TenantDB, colour: str) -> None:
    empty.close()
    face = Face(world.twin(empty), colour)
    with world.outage(empty):
        for way in WAYS:
            for key in ("nobody", uuid.uuid4()):
                with pytest.raises(errors.RegistryUnavailable):
                    await face.read(way, key)
        with pytest.raises(errors.RegistryUnavailable):
            await face.do.tenants.get("nobody")
        with pytest.raises(errors.RegistryUnavailable):
            async with face.bound("nobody"):
                pass
    with pytest.raises(errors.TenantNotFound):
        await face.marker("nobody")
    await face.close()


def test_nothing_is_provisioned_while_the_registry_is_away(world: World, empty: TenantDB) -> None:
    empty.close()
    with world.outage(empty):
        for _ in range(2):
            with pytest.raises(errors.RegistryUnavailable):
                empty.provision("acme")
    assert empty.tenants.list() == []


# -- not initialized, out of range -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", COLOURS)
async def test_a_registry_without_tables_says_so_and_serves_as_soon_as_it_has_them(world: World, colour: str) -> None:
    face = Face(world.make_db(init=False, migrations=MIGRATIONS), colour)
    for way in WAYS:
        with pytest.raises(errors.RegistryNotInitialized):
            await face.read(way, "acme")
    with pytest.raises(errors.RegistryNotInitialized):
        await face.do.provision("acme")
    with pytest.raises(errors.RegistryNotInitialized):
        face.db.ping()

    await face.do.init()
    await face.do.init()
    face.db.ping()
    with pytest.raises(errors.TenantNotFound):
        await face.marker("acme")
    await face.close()


@contextmanager
def marked(world: World, db: TenantDB, **values: str) -> Iterator[None]:
    with world.registry(db) as registry:
        registry.execute(update(meta).values(**values))
    try:
        yield
    finally:
        with world.registry(db) as registry:
            registry.execute(update(meta).values(revision=schema.NEWEST, oldest_reader=schema.OLDEST_READER))


@pytest.mark.parametrize(
    "values", [{"revision": "0000"}, {"revision": "0009", "oldest_reader": "0009"}], ids=["too old for this code", "this code is too old"]
)
def test_a_registry_outside_the_range_of_this_code_is_refused(world: World, empty: TenantDB, values: dict[str, str]) -> None:
    process = world.twin(empty)
    with marked(world, empty, **values):
        for call in (process.ping, lambda: process.engine("acme"), lambda: process.provision("acme")):
            with pytest.raises(errors.RegistryOutOfRange) as caught:
                call()
            assert caught.value.found == values["revision"]
    process.ping()
    process.close()


def test_a_newer_registry_that_this_code_may_still_read_is_served(world: World, empty: TenantDB) -> None:
    process = world.twin(empty)
    with marked(world, empty, revision="0009", oldest_reader="0001"):
        process.ping()
        with pytest.raises(errors.TenantNotFound):
            process.engine("acme")
    process.close()


# -- changed by another process --------------------------------------------------------------------------------------------------------


async def test_a_suspension_by_another_process_is_seen_when_the_record_is_too_old(
    make_face: MakeFace, estate: Estate, fresh: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    face = make_face(cache_ttl=5.0)
    clock = Clock(face.db, monkeypatch)
    session = face.session(fresh)
    assert await face.marker(fresh) == await session.scalar(MARKER) == fresh.slug
    await session.rollback()

    estate.db.suspend(fresh)
    clock.now += 4.99
    if estate.world.backend == "sqlite":  # where nobody but the registry can refuse it
        assert await face.marker(fresh) == fresh.slug  # still believed, as stated
        clock.now += 0.01
    for refused in (session.scalar(MARKER), face.marker(fresh)):
        with pytest.raises(errors.TenantSuspended):
            await refused
    await session.close()

    estate.db.activate(fresh)
    clock.now += 5
    assert await face.marker(fresh) == fresh.slug


async def test_a_tenant_provisioned_by_another_process_is_found_when_the_miss_is_too_old(
    make_face: MakeFace, estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    face = make_face(cache_ttl=5.0)
    clock = Clock(face.db, monkeypatch)
    slug = f"late-{face.colour}"
    with pytest.raises(errors.TenantNotFound):
        await face.marker(slug)

    estate.tenant(slug)
    with pytest.raises(errors.TenantNotFound):
        await face.marker(slug)
    clock.now += 5
    assert await face.marker(slug) == slug


def test_this_process_sees_its_own_changes_at_once(db: TenantDB, fresh: Tenant) -> None:
    for _ in range(2):
        with db.session(fresh) as session:
            assert session.scalar(MARKER) == fresh.slug
        db.suspend(fresh)
        with pytest.raises(errors.TenantSuspended):
            db.engine(fresh)
        db.activate(fresh)
