"""A process says which revisions of the tenants' schema its code can serve, and refuses a tenant at any other."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, MetaData, String, Table, select, update
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from tenantdb import Identity, Tenant, TenantDB, errors
from tenantdb.asgi import TenantMiddleware
from tenantdb.backends.weakness import Severity
from tenantdb.registry import tables
from tests.adapters.world import App, request
from tests.conformance.app import MARKER, MIGRATIONS, NOTES, note
from tests.conformance.colours import WAYS, Clock, Face, MakeFace, MakeProcess
from tests.conformance.conftest import Estate
from tests.world import World

every_way = pytest.mark.parametrize("way", WAYS)

COLOURS = select(Table("colours", MetaData(), Column("name", String)).c.name)
SECOND = """
import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table("colours", sa.Column("name", sa.String, primary_key=True))


def downgrade() -> None:
    op.drop_table("colours")
"""


@pytest.fixture(scope="module")
def estate(world: World) -> Estate:
    """Of this module's own, for its tenants come to a revision that the other modules' code does not know."""
    return Estate(world)


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The migrations of the next release: one revision more."""
    folder = tmp_path_factory.mktemp("newer") / "schema"
    shutil.copytree(MIGRATIONS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "versions" / "0002_colours.py").write_text(SECOND)
    return str(folder)


@pytest.fixture
def old(estate: Estate) -> Tenant:
    """A tenant at the revision before."""
    return estate.tenant()


@pytest.fixture
def migrate(process: MakeProcess, newer: str) -> Callable[[Tenant], Tenant]:
    """Brings a tenant to the head of the next release, from a process that serves nobody."""
    db = process(migrations=newer)
    return lambda tenant: db.migrations.upgrade(tenant.slug)


async def refused(face: Face, *tenant: Any, way: str = "session") -> errors.TenantNotReady:
    with pytest.raises(errors.TenantNotReady) as caught:
        await face.read(way, *tenant)
    return caught.value


@every_way
async def test_a_tenant_at_another_revision_is_refused_by_every_way_until_it_is_migrated(
    make_face: MakeFace, newer: str, old: Tenant, way: str
) -> None:
    face = make_face(migrations=newer, compatible_revisions=["0002"])
    for key in (old.slug, old.slug, old.id):  # unknown to this process, and known
        await refused(face, key, way=way)

    face.db.migrations.upgrade(old.slug)

    assert await face.read(way, old.slug) == old.slug


@every_way
async def test_a_process_that_declares_nothing_serves_it(make_face: MakeFace, newer: str, old: Tenant, way: str) -> None:
    assert await make_face(migrations=newer).read(way, old.slug) == old.slug


async def test_a_process_that_can_serve_both_serves_it_before_and_after(
    make_face: MakeFace, newer: str, old: Tenant, migrate: Callable[[Tenant], Tenant]
) -> None:
    face = make_face(migrations=newer, compatible_revisions=["0001", "0002"])

    assert await face.marker(old.slug) == old.slug
    migrate(old)
    assert await face.marker(old.slug) == old.slug


async def test_it_can_neither_be_bound_nor_resolved(make_face: MakeFace, old: Tenant) -> None:
    face = make_face(compatible_revisions=["0002"])

    with pytest.raises(errors.TenantNotReady):
        await face.do.resolve(old.slug)
    with pytest.raises(errors.TenantNotReady):
        async with face.bound(old.slug):
            pass
    with pytest.raises(errors.TenantNotReady):  # its record is in memory now: at the call
        face.session(old.slug)


async def test_a_state_that_is_not_served_is_told_first(make_face: MakeFace, old: Tenant) -> None:
    face = make_face(compatible_revisions=["0002"])
    await face.do.suspend(old)

    with pytest.raises(errors.TenantSuspended):
        await face.marker(old.slug)


async def test_the_error_names_both_sides_and_may_be_tried_again(make_face: MakeFace, old: Tenant) -> None:
    error = await refused(make_face(compatible_revisions=["0002", "0003"]), old.slug)

    assert (error.tenant, error.state, error.http_status, error.retry_after) == (old.slug, "active", 503, 5)
    assert "at revision '0001'" in str(error) and "'0002', '0003'" in str(error) and f"tenantdb migrate --tenant {old.slug}" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


async def test_a_tenant_without_a_revision_is_outside_of_every_window(make_face: MakeFace, estate: Estate, old: Tenant) -> None:
    with estate.world.registry(estate.db) as registry:
        registry.execute(update(tables.tenants).where(tables.tenants.c.id == old.id).values(revision=None))

    assert "its schema has no revision" in str(await refused(make_face(compatible_revisions=["0001"]), old.slug))
    assert await make_face().marker(old.slug) == old.slug


# -- while it is being migrated --------------------------------------------------------------------------------------------------------


async def test_a_migrated_tenant_is_served_when_its_cached_record_has_ended(
    make_face: MakeFace, old: Tenant, migrate: Callable[[Tenant], Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    face = make_face(compatible_revisions=["0002"])
    clock = Clock(face.db, monkeypatch)
    await refused(face, old.slug)

    migrate(old)
    await refused(face, old.slug)
    clock.now += face.db.settings.cache_ttl + 0.01

    assert await face.marker(old.slug) == old.slug


async def test_a_tenant_that_went_ahead_is_refused_when_its_cached_record_has_ended(
    make_face: MakeFace, old: Tenant, migrate: Callable[[Tenant], Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    face = make_face(compatible_revisions=["0001"])
    clock = Clock(face.db, monkeypatch)
    assert await face.marker(old.slug) == old.slug

    migrate(old)
    assert await face.marker(old.slug) == old.slug
    clock.now += face.db.settings.cache_ttl + 0.01

    assert "at revision '0002'" in str(await refused(face, old.slug))


async def test_a_transaction_under_way_goes_on_and_the_sessions_next_is_refused(
    make_face: MakeFace, old: Tenant, migrate: Callable[[Tenant], Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    face = make_face(compatible_revisions=["0001"])
    clock = Clock(face.db, monkeypatch)
    async with face.session(old.slug) as session:
        assert await session.scalar(MARKER) == old.slug

        migrate(old)
        clock.now += face.db.settings.cache_ttl + 0.01
        await refused(face, old.slug)

        assert await session.scalar(MARKER) == old.slug
        await session.commit()
        with pytest.raises(errors.TenantNotReady):
            await session.scalar(MARKER)


async def test_a_request_gets_503_and_comes_again(
    async_face: MakeFace, newer: str, old: Tenant, migrate: Callable[[Tenant], Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    face = async_face(migrations=newer, compatible_revisions=["0002"])
    clock = Clock(face.db, monkeypatch)
    app = asgi_app(face, old)

    answer = await request(app, "/")

    assert (answer.status, answer.headers["retry-after"], answer.json["code"]) == (503, "5", "tenant-not-ready")
    assert b"0001" not in answer.body and b"0002" not in answer.body  # what is deployed is nobody's business
    migrate(old)
    clock.now += int(answer.headers["retry-after"])
    again = await request(app, "/")
    assert (again.status, again.body) == (200, old.slug.encode())


def asgi_app(face: Face, tenant: Tenant) -> App:
    assert face.adb is not None
    adb = face.adb

    async def marker(request: Request) -> PlainTextResponse:
        async with adb.session() as session:
            return PlainTextResponse(str(await session.scalar(MARKER)))

    app = Starlette(routes=[Route("/", marker)])
    return TenantMiddleware(app, db=adb, authenticate=lambda facts: Identity("ann", tenant=tenant.slug))


# -- what is not serving ---------------------------------------------------------------------------------------------------------------


async def test_what_administers_a_tenant_works_on_it_all_the_same(
    make_face: MakeFace, newer: str, old: Tenant, estate: Estate, tmp_path: Path
) -> None:
    face = make_face(migrations=newer, compatible_revisions=["0002"])
    await refused(face, old.slug)

    assert (await face.do.update(old, name="Renamed")).name == "Renamed"
    await face.do.export(old, tmp_path / "whole.tar")
    await face.do.export_rows(old, tmp_path / "rows")
    assert [finding for finding in await face.do.doctor(tenant=old) if finding.severity is Severity.PROBLEM] == []
    if estate.backend == "postgresql":  # SQLite has no passwords
        await face.do.rotate_credentials(old)
    await face.do.suspend(old)
    await face.do.activate(old)
    await face.do.delete(old)
    await face.do.restore(old)
    assert old.slug in {tenant.slug for tenant in face.db.migrations.pending()}
    await refused(face, old.slug)

    face.db.migrations.upgrade(old.slug)
    assert await face.rows(COLOURS, old.slug) == []


async def test_a_tenant_is_made_at_the_head_and_served_where_that_is_in_the_window(make_face: MakeFace, newer: str, estate: Estate) -> None:
    slug = f"{estate.tenant().slug}-new"  # made at a revision before, for a name nobody has
    made = await make_face(migrations=newer, compatible_revisions=["0002"]).do.provision(slug)
    estate.tenants.append(made)

    assert await make_face(compatible_revisions=["0002"]).marker(slug) == slug
    await refused(make_face(compatible_revisions=["0001"]), slug)


async def test_a_process_makes_a_tenant_that_it_cannot_serve_itself(make_face: MakeFace, newer: str, estate: Estate) -> None:
    slug = f"{estate.tenant().slug}-new"
    face = make_face(migrations=newer, compatible_revisions=["0001"])

    made = await face.do.provision(slug)  # with its seed

    estate.tenants.append(made)
    await refused(face, slug)
    assert await make_face().marker(slug) == slug


def test_for_each_reports_it_and_goes_on(process: MakeProcess, new_estate: Estate, newer: str) -> None:
    old, new = new_estate.tenant(), new_estate.tenant()
    db = new_estate.world.twin(new_estate.db, migrations=newer, compatible_revisions=["0002"])
    db.migrations.upgrade(new.slug)

    def add_note(tenant: Tenant) -> None:
        with db.begin() as session:
            session.execute(note(1))

    report = db.for_each(add_note)

    assert set(report.succeeded) == {new.slug}
    assert {slug: type(error) for slug, error in report.failed.items()} == {old.slug: errors.TenantNotReady}
    with new_estate.db.session(old.slug) as session:
        assert session.scalars(NOTES).all() == []


# -- what check says -------------------------------------------------------------------------------------------------------------------


def about_migrations(db: TenantDB) -> list[tuple[Severity, str]]:
    return [(finding.severity, finding.text) for finding in db.check() if finding.subject == "migrations"]


@pytest.mark.parametrize("window", [[], ["0002"], ["0001", "0002"]])
def test_check_is_content_with_a_window_around_the_head(process: MakeProcess, newer: str, window: list[str]) -> None:
    assert about_migrations(process(migrations=newer, compatible_revisions=window)) == []


def test_check_finds_a_window_without_the_head(process: MakeProcess, newer: str) -> None:
    ((severity, text),) = about_migrations(process(migrations=newer, compatible_revisions=["0001"]))

    assert severity is Severity.PROBLEM
    assert text.startswith("the head of the migrations is '0002' and not among compatible_revisions")


def test_check_finds_a_revision_that_the_migrations_do_not_know(process: MakeProcess, newer: str) -> None:
    findings = about_migrations(process(migrations=newer, compatible_revisions=["0002", "0020", "00"]))

    assert findings == [
        (Severity.WARNING, f"compatible_revisions names {unknown!r}, which the migrations do not know") for unknown in ("0020", "00")
    ]


def test_check_says_when_there_are_no_migrations_to_compare_with(process: MakeProcess, tmp_path: Path) -> None:
    ((severity, text),) = about_migrations(process(migrations=str(tmp_path / "nowhere"), compatible_revisions=["0001"]))

    assert severity is Severity.PROBLEM
    assert "nowhere" in text
