"""A connection that is not the tenant's own runs no statement, however it was led astray. Each guard with its negative twin."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import select, text, update

from tenantdb import Budget, Tenant, errors
from tenantdb.registry.tables import tenants
from tests.conformance.app import NOTES, note
from tests.conformance.colours import WAYS, Face, MakeFace
from tests.conformance.conftest import Estate

STAMPS = {"postgresql": "tenantdb.identity", "sqlite": "tenantdb_identity"}


@contextmanager
def stamped(estate: Estate, tenant: Tenant, as_whom: uuid.UUID) -> Iterator[None]:
    """The tenant's database with another identity stamp."""
    change = text(f"UPDATE {STAMPS[estate.backend]} SET tenant_id = :id")
    with estate.world.inside(tenant, estate.db) as connection:
        connection.execute(change, {"id": str(as_whom)})
    try:
        yield
    finally:
        with estate.world.inside(tenant, estate.db) as connection:
            connection.execute(change, {"id": str(tenant.id)})


@contextmanager
def registered(estate: Estate, tenant: Tenant, **values: object) -> Iterator[None]:
    """The tenant's row edited behind tenantdb's back, the version left as it is."""
    row = tenants.c.id == tenant.id
    with estate.world.registry(estate.db) as registry:
        before = registry.execute(select(*(tenants.c[name] for name in values)).where(row)).one()._asdict()
        registry.execute(update(tenants).where(row).values(**values))
    try:
        yield
    finally:
        with estate.world.registry(estate.db) as registry:
            registry.execute(update(tenants).where(row).values(**before))


async def test_a_database_stamped_for_another_tenant_runs_no_statement(face: Face, estate: Estate, acme: Tenant, fresh: Tenant) -> None:
    for stranger in (acme.id, uuid.uuid4()):
        with stamped(estate, fresh, as_whom=stranger):
            with pytest.raises(errors.WrongDatabase) as caught:
                await face.write(note(1), fresh)
            assert caught.value.tenant == fresh.slug

    assert await face.rows(NOTES, fresh) == []
    await face.write(note(1), fresh)  # with its own stamp it does
    assert await face.rows(NOTES, fresh) == [1]


@pytest.mark.parametrize("way", WAYS)
async def test_no_way_leads_into_a_database_stamped_for_another(face: Face, estate: Estate, acme: Tenant, fresh: Tenant, way: str) -> None:
    with stamped(estate, fresh, as_whom=acme.id), pytest.raises(errors.WrongDatabase):
        await face.read(way, fresh)
    assert await face.read(way, fresh) == fresh.slug


async def test_a_database_without_a_stamp_runs_no_statement(face: Face, estate: Estate, fresh: Tenant) -> None:
    table = STAMPS[estate.backend]
    schema, _, name = table.rpartition(".")
    aside = f"{schema}.aside" if schema else "aside"
    with estate.world.inside(fresh, estate.db) as connection:
        connection.execute(text(f"ALTER TABLE {table} RENAME TO aside"))
    try:
        with pytest.raises(errors.WrongDatabase):
            await face.marker(fresh)
    finally:
        with estate.world.inside(fresh, estate.db) as connection:
            connection.execute(text(f"ALTER TABLE {aside} RENAME TO {name}"))
    assert await face.marker(fresh) == fresh.slug


async def test_a_row_edited_to_lead_to_another_tenants_database_leads_nowhere(face: Face, estate: Estate, fresh: Tenant) -> None:
    with estate.borrowed() as victim:
        # Two rows cannot name one database, so the victim's name is edited away first, as an intruder would.
        with registered(estate, victim, database="t_0000000000000000"), registered(estate, fresh, database=victim.database):
            error = errors.WrongDatabase if estate.backend == "sqlite" else errors.CredentialTampered
            with pytest.raises(error):
                await face.write(note(1), fresh)
        assert await face.rows(NOTES, victim) == []


async def test_a_refused_connection_is_not_kept(make_face: MakeFace, estate: Estate, fresh: Tenant) -> None:
    face = make_face(budget=Budget(per_tenant=1, acquire_timeout=1))
    for _ in range(3):  # with a pool of one, so that a connection that stayed would use it up
        with stamped(estate, fresh, as_whom=uuid.uuid4()), pytest.raises(errors.WrongDatabase):
            await face.marker(fresh)
    assert await face.marker(fresh) == fresh.slug
