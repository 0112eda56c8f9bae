"""How a tenant comes to be, changes and is let go; and one function for all of them."""

from __future__ import annotations

import logging
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import insert, inspect, update
from sqlalchemy.orm import Session

from tenantdb import Subscription, Tenant, TenantDB, TenantState, acting, current_tenant, errors
from tenantdb.connections import each
from tenantdb.model import TRANSITIONS, Fence
from tenantdb.registry import tables
from tests.conformance.app import MARKER, MIGRATIONS, NOTES, markers
from tests.conformance.colours import Face, MakeProcess
from tests.conformance.conftest import Estate
from tests.world import World

BAD_SLUGS = [
    "",
    "Acme",
    "a",
    "1acme",
    "acme-",
    "ac'me",
    'ac"me',
    "ac.me",
    "ac/me",
    "ac\0me",
    "acme\n",
    "ac me",
    "\N{HOSPITAL}acme",
    "a" * 200,
]
BAD_SLUGS += ["postgres", "template1", "pg_x", "www", "0f5a61f2-6c53-4f1b-9d2e-9f1df1a0c001", "af5a61f26c534f1b9d2e9f1df1a0c001"]


def test_a_provisioned_tenant_is_active_migrated_and_seeded_and_its_names_say_nothing(estate: Estate, db: TenantDB, acme: Tenant) -> None:
    assert acme.state is TenantState.ACTIVE
    assert acme.server == "default"
    assert acme.revision == "0001"
    names = {acme.database, acme.owner_role, acme.runtime_role}
    assert all(name is not None and re.fullmatch("t_[0-9a-f]{16}", name) for name in names)
    assert len(names) == (1 if estate.backend == "sqlite" else 3)  # SQLite has no roles
    with db.session("acme") as session:
        assert session.scalars(MARKER).all() == ["acme"]


@pytest.fixture(scope="module")
def untouched(world: World) -> Iterator[TenantDB]:
    """An application whose registry has no tables: a first statement would find that out."""
    with world.make_db(init=False) as db:
        yield db


@pytest.mark.parametrize("slug", BAD_SLUGS)
def test_a_bad_slug_is_refused_before_any_sql_with_the_rule(untouched: TenantDB, slug: str) -> None:
    with pytest.raises(errors.InvalidSlug) as caught:
        untouched.provision(slug)
    assert caught.value.rule in str(caught.value)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()
    with pytest.raises(errors.RegistryNotInitialized):
        untouched.provision("acme")


async def test_a_slug_that_is_taken_is_never_handed_to_a_stranger(face: Face, acme: Tenant) -> None:
    with pytest.raises(errors.TenantExists):
        await face.do.provision("acme")
    with pytest.raises(errors.TenantExists):
        await face.do.provision("acme", idempotency_key="another request")
    assert (await face.do.provision("acme", exist_ok=True)).id == acme.id


async def test_the_same_idempotency_key_gives_the_same_tenant_and_serves_one_request_only(face: Face, estate: Estate) -> None:
    slug, key = f"key-{face.colour}", f"request-{face.colour}"
    made = await face.do.provision(slug, name="Key", idempotency_key=key)
    estate.tenants.append(made)
    assert (await face.do.provision(slug, name="Key", idempotency_key=key)).id == made.id
    with pytest.raises(errors.TenantExists):
        await face.do.provision(slug, name="Another", idempotency_key=key)
    with pytest.raises(errors.TenantExists):
        await face.do.provision("another", idempotency_key=key)


def test_a_seed_that_raises_leaves_a_failed_tenant_that_running_again_completes(estate: Estate, db: TenantDB) -> None:
    broken = True

    @db.seed
    def seed(session: Session, tenant: Tenant) -> None:
        if broken:
            session.execute(insert(markers).values(slug=tenant.slug))

    with pytest.raises(errors.ProvisioningError) as caught:
        db.provision("seedling")
    assert (caught.value.tenant, caught.value.step) == ("seedling", "seed")
    failed = db.tenants.get("seedling")
    assert failed.state is TenantState.FAILED
    assert "seed" in (failed.reason or "")
    with pytest.raises(errors.TenantNotReady):
        db.engine("seedling")

    broken = False
    done = db.provision("seedling")
    estate.tenants.append(done)
    assert (done.id, done.database, done.state, done.reason) == (failed.id, failed.database, TenantState.ACTIVE, None)
    with db.session("seedling") as session:
        assert session.scalars(MARKER).all() == ["seedling"]


def test_a_migration_that_raises_leaves_nothing_of_itself_and_its_error_unchanged(
    process: MakeProcess, fresh: Tenant, tmp_path: Path
) -> None:
    location = tmp_path / "schema"
    shutil.copytree(MIGRATIONS, location, ignore=shutil.ignore_patterns("__pycache__"))
    (location / "versions" / "0002_breaks.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\nrevision, down_revision = '0002', '0001'\n"
        "def upgrade():\n"
        "    op.create_table('rooms', sa.Column('id', sa.Integer, primary_key=True))\n"
        '    op.execute("INSERT INTO notes (id) VALUES (1)")\n'
        "    raise ZeroDivisionError('here')\n"
    )
    db = process(migrations=str(location))
    assert [tenant.slug for tenant in db.migrations.pending()] == [tenant.slug for tenant in db.tenants.list("active")]
    with pytest.raises(ZeroDivisionError, match="here"):
        db.migrations.upgrade(fresh)
    assert db.tenants.get(fresh).revision == "0001"
    with db.connect(fresh) as connection:
        assert "rooms" not in inspect(connection).get_table_names()
        assert connection.scalars(NOTES).all() == []


async def test_suspending_and_activating_change_state_fence_version_and_generation(face: Face, fresh: Tenant) -> None:
    suspended = await face.do.suspend(fresh)
    assert (suspended.state, suspended.fence) == (TenantState.SUSPENDED, Fence.DONE)
    assert (suspended.version, suspended.generation) == (fresh.version + 2, fresh.generation + 1)  # the registry's refusal, the server's
    with pytest.raises(errors.IllegalTransition):
        await face.do.suspend(fresh)

    active = await face.do.activate(fresh)
    assert (active.state, active.fence) == (TenantState.ACTIVE, None)
    assert (active.version, active.generation) == (fresh.version + 3, fresh.generation + 2)
    with pytest.raises(errors.IllegalTransition):
        await face.do.activate(fresh)


@pytest.mark.parametrize("state", TenantState)
def test_every_legal_change_of_state_and_no_other_is_written(estate: Estate, db: TenantDB, fresh: Tenant, state: TenantState) -> None:
    for to in TenantState:
        with estate.world.registry(db) as registry:
            registry.execute(update(tables.tenants).where(tables.tenants.c.id == fresh.id).values(state=state.value))
        if state is TenantState.PURGED:  # is found by nobody, so it cannot be changed either
            with pytest.raises(errors.TenantNotFound):
                db.tenants.get(fresh)
            continue
        tenant = db.tenants.get(fresh)
        if to in TRANSITIONS[state] and to is not TenantState.PURGED:
            assert db.tenants.transition(tenant, to, action="test").state is to
        elif to not in TRANSITIONS[state]:
            with pytest.raises(errors.IllegalTransition) as caught:
                db.tenants.transition(tenant, to, action="test")
            assert (caught.value.state, caught.value.wanted) == (str(state), str(to))
            assert db.tenants.get(fresh) == tenant


def test_of_two_processes_one_wins_and_the_other_is_told(process: MakeProcess, fresh: Tenant) -> None:
    one, two = process(), process()
    seen = two.tenants.get(fresh)
    one.suspend(fresh)
    with pytest.raises(errors.IllegalTransition) as caught:
        two.tenants.transition(seen, TenantState.MAINTENANCE, action="test")
    assert caught.value.state == "suspended"
    assert two.tenants.get(fresh).state is TenantState.SUSPENDED


async def test_what_may_be_updated_is_and_nothing_else(face: Face, fresh: Tenant) -> None:
    changed = await face.do.update(fresh, name="New name", plan="pro", subscription="active", metadata={"beds": 4})
    assert (changed.name, changed.plan, changed.subscription, changed.metadata) == ("New name", "pro", Subscription.ACTIVE, {"beds": 4})
    assert (changed.version, changed.generation) == (fresh.version + 1, fresh.generation)
    assert await face.do.tenants.get(fresh) == changed
    for field in ("slug", "state", "database", "generation"):
        with pytest.raises(TypeError, match=field):
            await face.do.update(fresh, **{field: "t_0000000000000000"})


async def test_the_audit_log_says_who_did_what(face: Face, fresh: Tenant) -> None:
    with acting("user:7", "request-1"):
        await face.do.suspend(fresh)
    await face.do.activate(fresh)
    lines = [(entry.action, entry.actor, entry.request_id) for entry in await face.do.audit.list(tenant=fresh, limit=2)]
    assert lines == [("tenant.activate", "system", None), ("tenant.suspend", "user:7", "request-1")]


def test_a_hook_before_a_change_may_stop_it_and_one_after_it_may_not(db: TenantDB, fresh: Tenant, caplog: pytest.LogCaptureFixture) -> None:
    told: list[tuple[str, str]] = []

    @db.on("after_suspend")
    def after(tenant: Tenant) -> None:
        told.append(("after", str(tenant.state)))
        raise ZeroDivisionError

    assert db.suspend(fresh).state is TenantState.SUSPENDED
    assert told == [("after", "suspended")]
    assert [record.levelno for record in caplog.records if record.name == "tenantdb.hooks"] == [logging.ERROR]

    @db.on("before_activate")
    def before(tenant: Tenant) -> None:
        raise PermissionError("not paid")

    with pytest.raises(PermissionError, match="not paid"):
        db.activate(fresh)
    assert db.tenants.get(fresh).state is TenantState.SUSPENDED
    with pytest.raises(errors.ConfigError, match="before_lunch"):
        db.on("before_lunch")


# -- one function for all --------------------------------------------------------------------------------------------------------------


async def test_for_each_reports_every_tenants_result_or_error_by_name(
    face: Face, acme: Tenant, beta: Tenant, fresh: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(each, "_PAGE", 2)
    await face.do.suspend(fresh)
    mine = ZeroDivisionError("acme's")

    def read(tenant: Tenant) -> object:
        assert current_tenant().id == tenant.id
        if tenant.slug == "acme":
            raise mine
        with face.db.session() as session:
            return session.scalar(MARKER)

    report = await face.do.for_each(read)
    others = {tenant.slug for tenant in await face.do.tenants.list(state="active")} - {"acme"}
    assert "beta" in others and fresh.slug not in others
    assert report.succeeded == {slug: slug for slug in others}
    assert report.failed == {"acme": mine}
    assert not report.ok
    with pytest.raises(errors.NoTenantBound):
        current_tenant()

    suspended = await face.do.for_each(lambda tenant: tenant.slug, state="suspended")
    assert suspended.ok
    assert fresh.slug in suspended.succeeded


def test_for_each_works_on_no_more_tenants_at_once_than_it_is_told(db: TenantDB, estate: Estate) -> None:
    assert len(estate.ten) == 10
    lock, at_work, most = threading.Lock(), 0, 0
    two_are_here = threading.Barrier(2)

    def work(tenant: Tenant) -> None:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        if tenant.slug in ("ten-0", "ten-1"):
            two_are_here.wait(30)  # and it does work on two
        with lock:
            at_work -= 1

    assert db.for_each(work, concurrency=2).ok
    assert most == 2


def test_for_each_in_a_block_works_on_the_others_too(db: TenantDB, acme: Tenant, beta: Tenant) -> None:
    with db.tenant_context("acme"):
        report = db.for_each(lambda tenant: current_tenant().slug)
        assert report.succeeded["beta"] == "beta"
        assert current_tenant().slug == "acme"
