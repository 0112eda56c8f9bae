"""How a tenant is let go: fenced at its server, taken back within its retention, erased for ever; and what is left of it then."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any

import psycopg
import pytest
from sqlalchemy import select, update

from tenantdb import NewUser, Tenant, TenantDB, TenantState, errors
from tenantdb.model import DatabaseRole, Fence, MemberRole
from tenantdb.registry import tables
from tenantdb.registry.operations import FENCE, PURGE, OperationState
from tests.conformance.app import note
from tests.conformance.colours import Face, MakeFace, MakeProcess
from tests.conformance.conftest import Estate
from tests.procedures import before
from tests.world import PostgreSQLWorld, SQLiteWorld, World, eventually

PASSWORD = "correct horse battery"
ON_POSTGRESQL = pytest.mark.parametrize("world", ["postgresql"], indirect=True, scope="session")


def written(estate: Estate, tenant: Tenant, **values: Any) -> None:
    """A tenant's row, changed behind everybody's back: mostly what time would do to it."""
    with estate.world.registry(estate.db) as registry:
        registry.execute(update(tables.tenants).where(tables.tenants.c.id == tenant.id).values(values))


def retention_ends(estate: Estate, tenant: Tenant) -> None:
    written(estate, tenant, purge_after=datetime.now(timezone.utc) - timedelta(seconds=1))


def without_provisioner(process: MakeProcess, estate: Estate) -> TenantDB:
    """What a web process is: it knows the registry alone. On SQLite every process is a provisioner, if nothing forbids it."""
    if estate.backend == "postgresql":
        return process(server=None, registry_admin=None)
    web = process()
    web._runner.can_work_on = lambda server: False  # type: ignore[method-assign]
    return web


class Doors:
    """A tenant's own logins on a PostgreSQL server, tried as an attacker would: with the passwords, and without this library."""

    def __init__(self, world: World, db: TenantDB, tenant: Tenant) -> None:
        assert isinstance(world, PostgreSQLWorld)
        record = db._registry.tenants.row(tenant.id)
        self._server = world.server
        self._database = tenant.database or ""
        self._logins = {
            str(role): (name or "", db._registry.passwords(record, role)[0])
            for role, name in ((DatabaseRole.OWNER, tenant.owner_role), (DatabaseRole.RUNTIME, tenant.runtime_role))
        }

    def connect(self, role: str) -> psycopg.Connection[Any]:
        name, password = self._logins[role]
        return psycopg.connect(self._server.url(name, password, self._database), autocommit=True)

    def open(self) -> set[str]:
        """The roles that get in."""
        found = set()
        for role in self._logins:
            try:
                self.connect(role).close()
            except psycopg.OperationalError:
                continue
            found.add(role)
        return found

    @contextmanager
    def session(self, role: str) -> Iterator[psycopg.Connection[Any]]:
        connection = self.connect(role)
        try:
            yield connection
        finally:
            connection.close()


def is_ended(connection: psycopg.Connection[Any]) -> bool:
    try:
        connection.execute("SELECT 1")
    except psycopg.OperationalError:
        return True
    return False


# -- deleting and restoring ------------------------------------------------------------------------------------------------------------


async def test_a_deleted_tenant_is_nobodys_until_it_is_restored_with_all_its_rows(face: Face, fresh: Tenant) -> None:
    await face.write(note(1), fresh)
    deleted = await face.do.delete(fresh)
    assert (deleted.state, deleted.fence) == (TenantState.DELETED, Fence.DONE)
    assert deleted.generation == fresh.generation + 1
    assert deleted.deleted_at is not None and deleted.purge_after is not None
    assert deleted.purge_after - deleted.deleted_at == pytest.approx(timedelta(days=face.db.settings.retention), abs=timedelta(seconds=5))
    for refused in (face.marker(fresh), face.marker(fresh.slug)):
        with pytest.raises(errors.TenantNotFound):
            await refused
    with pytest.raises(errors.IllegalTransition):
        await face.do.activate(fresh)
    with pytest.raises(errors.IllegalTransition):
        await face.do.delete(fresh)
    with pytest.raises(errors.TenantExists):  # the slug stays taken, whoever asks
        await face.do.provision(fresh.slug)

    restored = await face.do.restore(fresh)
    assert (restored.state, restored.fence, restored.deleted_at, restored.purge_after) == (TenantState.ACTIVE, None, None, None)
    assert restored.generation == fresh.generation + 2
    assert await face.marker(fresh) == fresh.slug
    with pytest.raises(errors.IllegalTransition):
        await face.do.restore(fresh)


@pytest.mark.parametrize("verb", ["suspend", "maintenance"])
async def test_what_is_not_served_can_be_deleted_too_and_comes_back_active(face: Face, fresh: Tenant, verb: str) -> None:
    await getattr(face.do, verb)(fresh)
    assert (await face.do.delete(fresh)).state is TenantState.DELETED
    assert (await face.do.restore(fresh)).state is TenantState.ACTIVE
    assert await face.marker(fresh) == fresh.slug


async def test_after_its_retention_a_tenant_is_not_restored_any_more(face: Face, estate: Estate, fresh: Tenant) -> None:
    await face.do.delete(fresh)
    retention_ends(estate, fresh)
    with pytest.raises(errors.IllegalTransition, match="retention has ended"):
        await face.do.restore(fresh)
    assert [tenant.id for tenant in face.db.tenants.expired()] == [fresh.id]
    assert (await face.do.tenants.get(fresh)).state is TenantState.DELETED


def test_what_was_never_complete_is_not_restored_but_can_be_deleted_and_purged(estate: Estate, process: MakeProcess) -> None:
    db = process()

    def broken(*_: Any) -> None:
        raise LookupError("no price list")

    db._hooks.seeds[:] = [broken]
    with pytest.raises(errors.ProvisioningError):
        db.provision("half-made")
    db.delete("half-made")
    with pytest.raises(errors.IllegalTransition, match="before it was ever complete"):
        db.restore("half-made")
    tenant = db.tenants.get("half-made")
    assert db.purge("half-made", confirm="half-made", immediately=True).state is TenantState.PURGED
    assert not exists(estate, tenant)


# -- purging ---------------------------------------------------------------------------------------------------------------------------


def exists(estate: Estate, tenant: Tenant) -> bool:
    """Whether anything of a tenant is on its server."""
    world = estate.world
    if isinstance(world, SQLiteWorld):
        path = world.path(tenant, estate.db)
        return any(path.parent.glob(f"{path.name}*"))
    assert isinstance(world, PostgreSQLWorld)
    names = [tenant.database, tenant.owner_role, tenant.runtime_role]
    query = "SELECT datname FROM pg_database WHERE datname = ANY(%s) UNION ALL SELECT rolname FROM pg_roles WHERE rolname = ANY(%s)"
    return bool(world.superuser.execute(query, [names, names]).fetchall())


@pytest.fixture
def doomed(estate: Estate) -> Iterator[Tenant]:
    """A tenant with a member and a refresh token, deleted."""
    slug = f"doomed-{secrets.token_hex(4)}"
    owner = NewUser(email=f"{slug}@example.org", password=PASSWORD)
    tenant = estate.db.provision(slug, owner=owner, email=owner.email, idempotency_key=f"sign-up of {slug}")
    estate.tenants.append(tenant)
    estate.db.refresh_tokens.create(estate.db.users.authenticate(owner.email, PASSWORD), tenant)
    assert exists(estate, tenant)
    yield estate.db.delete(tenant)
    estate.tenants.remove(tenant)


@pytest.mark.parametrize("confirm", ["", "DOOMED", "acme"])
async def test_a_purge_that_is_not_confirmed_erases_nothing(face: Face, estate: Estate, doomed: Tenant, confirm: str) -> None:
    with pytest.raises(errors.PurgeRefused, match="its slug is asked for once more"):
        await face.do.purge(doomed, confirm=confirm, immediately=True)
    assert (await face.do.restore(doomed)).state is TenantState.ACTIVE
    assert await face.marker(doomed) == doomed.slug


async def test_before_its_retention_ends_a_tenant_is_purged_only_immediately(face: Face, estate: Estate, doomed: Tenant) -> None:
    with pytest.raises(errors.PurgeRefused, match=f"it can be restored until {doomed.purge_after:%Y-%m-%d %H:%M} UTC"):
        await face.do.purge(doomed, confirm=doomed.slug)
    assert exists(estate, doomed)

    retention_ends(estate, doomed)
    assert (await face.do.purge(doomed, confirm=doomed.slug)).state is TenantState.PURGED


async def test_a_tenant_that_is_not_deleted_is_not_purged(face: Face, estate: Estate, fresh: Tenant) -> None:
    with pytest.raises(errors.IllegalTransition):
        await face.do.purge(fresh, confirm=fresh.slug, immediately=True)
    await face.do.suspend(fresh)
    with pytest.raises(errors.IllegalTransition):
        await face.do.purge(fresh, confirm=fresh.slug, immediately=True)
    assert exists(estate, fresh)


async def test_under_a_legal_hold_nothing_is_erased_until_it_is_released(face: Face, estate: Estate, doomed: Tenant) -> None:
    held = await face.do.hold(doomed, "case 17/2026")
    assert held.legal_hold == "case 17/2026"
    retention_ends(estate, doomed)
    assert face.db.tenants.expired() == []
    with pytest.raises(errors.PurgeRefused, match="legal hold"):
        await face.do.purge(doomed, confirm=doomed.slug, immediately=True)
    assert exists(estate, doomed)

    assert (await face.do.release(doomed)).legal_hold is None
    assert (await face.do.purge(doomed, confirm=doomed.slug)).state is TenantState.PURGED
    assert not exists(estate, doomed)


def test_a_hold_that_comes_while_the_purge_is_on_its_way_keeps_the_database(estate: Estate, db: TenantDB, doomed: Tenant) -> None:
    """Also where somebody with the serving login wrote the state himself: he cannot write the hold away."""
    with before("database", lambda work: db.hold(doomed, "case 17/2026") and work.reload(), kind=PURGE):
        with pytest.raises(errors.OperationFailed, match="legal hold"):
            db.purge(doomed, confirm=doomed.slug, immediately=True)
    assert exists(estate, doomed)

    db.release(doomed)
    assert db.purge(doomed, confirm=doomed.slug, immediately=True).state is TenantState.PURGED


async def test_what_is_left_of_a_purged_tenant_is_a_tombstone_with_a_certificate(
    face: Face, estate: Estate, doomed: Tenant, acme: Tenant
) -> None:
    neighbours = {tenant.id: tenant for tenant in face.db.tenants.list() if tenant.id != doomed.id}
    golden = face.db._registry.templates.list()

    purged = await face.do.purge(doomed.slug, confirm=doomed.slug, immediately=True)

    assert (purged.state, purged.id, purged.slug, purged.name) == (TenantState.PURGED, doomed.id, str(doomed.id), "")
    assert purged.purged_at is not None
    assert not exists(estate, doomed)
    told = (purged.email, purged.database, purged.owner_role, purged.runtime_role, purged.server, purged.fence, dict(purged.metadata))
    assert told == (None, None, None, None, None, None, {})
    with estate.world.registry(estate.db) as registry:
        row = registry.execute(select(tables.tenants).where(tables.tenants.c.id == doomed.id)).mappings().one()
        assert {name for name, value in row.items() if value is not None} == set(
            "id state version generation subscription metadata created_at updated_at deleted_at purged_at certificate".split()
        )
        for table in (tables.memberships, tables.refresh_tokens):
            assert registry.execute(select(table).where(table.c.tenant_id == doomed.id)).all() == []
        operations = registry.execute(select(tables.operations).where(tables.operations.c.tenant_id == doomed.id)).mappings().all()
    assert {operation["state"] for operation in operations} == {"done"}
    assert all(operation["payload"] == {} and operation["idempotency_key"] is None for operation in operations)

    certificate = dict(await face.do.tenants.certificate(doomed.id))
    digest = certificate.pop("sha256")
    assert digest == hashlib.sha256(json.dumps(certificate, sort_keys=True).encode()).hexdigest()
    assert certificate["tenant"] == str(doomed.id) and certificate["erased"]["database"] == doomed.database
    assert doomed.slug not in json.dumps(certificate) and "example.org" not in json.dumps(certificate)
    whats = [each["what"] for each in certificate["may_remain"]]
    assert any("backups" in what for what in whats) and any("write-ahead" in what for what in whats) is (estate.backend == "postgresql")

    for key in (doomed.slug, doomed.id):
        with pytest.raises(errors.TenantNotFound):
            await face.marker(key)
        with pytest.raises(errors.TenantNotFound):
            await face.do.tenants.get(key)
    assert await face.marker("acme") == "acme"
    assert {tenant.id: tenant for tenant in face.db.tenants.list()} == neighbours
    assert face.db._registry.templates.list() == golden


async def test_the_slug_of_a_purged_tenant_is_free_again_and_its_id_never(face: Face, estate: Estate, doomed: Tenant) -> None:
    await face.do.purge(doomed, confirm=str(doomed.id), immediately=True)

    again = await face.do.provision(doomed.slug)
    estate.tenants.append(again)

    assert again.id != doomed.id and again.database != doomed.database
    for verb in (face.do.restore, face.do.activate, face.do.suspend, face.do.delete):
        with pytest.raises(errors.TenantNotFound):
            await verb(doomed.id)
    with pytest.raises(errors.TenantNotFound):
        await face.do.purge(doomed.id, confirm=str(doomed.id), immediately=True)
    assert await face.marker(doomed.slug) == doomed.slug
    with pytest.raises(errors.TenantNotFound):
        face.db.memberships.add(face.db.users.create(f"late-{again.id}@example.org", PASSWORD), doomed.id, role=MemberRole.USER)


async def test_a_purge_that_stopped_is_taken_up_by_asking_again(face: Face, estate: Estate, doomed: Tenant) -> None:
    def pull_the_cable(work: object) -> None:
        raise OSError("the cable was pulled")

    with before("roles", pull_the_cable, kind=PURGE), pytest.raises(errors.OperationFailed, match="the cable was pulled"):
        await face.do.purge(doomed, confirm=doomed.slug, immediately=True)
    assert (await face.do.tenants.get(doomed)).state is TenantState.PURGING
    with pytest.raises(errors.PurgeRefused):  # confirmed it must be, each time
        await face.do.purge(doomed, confirm="", immediately=True)
    with pytest.raises(errors.IllegalTransition):
        await face.do.restore(doomed)

    assert (await face.do.purge(doomed, confirm=doomed.slug)).state is TenantState.PURGED
    assert not exists(estate, doomed)


def test_of_two_who_purge_at_once_one_does_and_both_end_well(process: MakeProcess, estate: Estate, doomed: Tenant) -> None:
    one, two = process(), process()
    inside: list[object] = []

    def other_comes(work: object) -> None:
        if not inside:
            inside.append(work)
            with pytest.raises(errors.TenantDBError):
                two._lifecycle.delete(two.tenants.get(doomed))

    with before("database", other_comes, kind=PURGE):
        assert one.purge(doomed, confirm=doomed.slug, immediately=True).state is TenantState.PURGED
    with pytest.raises(errors.TenantNotFound):
        two.purge(doomed, confirm=doomed.slug, immediately=True)
    assert len(inside) == 1


# -- a process without a provisioner ---------------------------------------------------------------------------------------------------


def test_without_a_provisioner_the_registry_says_it_at_once_and_a_worker_makes_it_true(
    process: MakeProcess, estate: Estate, fresh: Tenant
) -> None:
    web, worker = without_provisioner(process, estate), process()

    suspended = web.suspend(fresh)
    assert (suspended.state, suspended.fence) == (TenantState.SUSPENDED, Fence.PENDING)
    with pytest.raises(errors.TenantSuspended):
        web.engine(fresh)
    assert worker.work() == 1
    assert web.tenants.get(fresh).fence is Fence.DONE

    waiting = web.activate(fresh)  # the server would refuse it: so it stays suspended until that is lifted
    assert waiting.state is TenantState.SUSPENDED
    assert worker.work() == 1
    active = web.tenants.get(fresh)
    assert (active.state, active.fence) == (TenantState.ACTIVE, None)

    web.delete(fresh)
    assert worker.work() == 1
    assert web.restore(fresh).state is TenantState.DELETED
    assert worker.work() == 1
    assert web.tenants.get(fresh).state is TenantState.ACTIVE


def test_a_purge_without_a_provisioner_is_finished_by_a_worker(process: MakeProcess, estate: Estate, doomed: Tenant) -> None:
    web, worker = without_provisioner(process, estate), process()

    assert web.purge(doomed, confirm=doomed.slug, immediately=True).state is TenantState.PURGING
    assert exists(estate, doomed)
    with pytest.raises(errors.TenantNotFound):
        web.engine(doomed)
    operation = web._registry.operations.for_tenant(doomed.id)
    assert operation is not None and (operation.kind, operation.state) == (PURGE, OperationState.PENDING)

    assert worker.work() == 1
    assert not exists(estate, doomed)
    assert web.tenants.certificate(doomed.id)["tenant"] == str(doomed.id)
    assert worker.work() == 0


def test_a_fence_that_fails_is_told_by_the_tenant_and_comes_true_later(
    db: TenantDB, estate: Estate, fresh: Tenant, caplog: pytest.LogCaptureFixture
) -> None:
    def pull_the_cable(work: object) -> None:
        raise OSError("the cable was pulled")

    with before("fence", pull_the_cable, kind=FENCE):
        suspended = db.suspend(fresh)
    assert (suspended.state, suspended.fence) == (TenantState.SUSPENDED, Fence.PENDING)
    assert "its server does not know yet" in caplog.text
    with pytest.raises(errors.TenantSuspended):
        db.engine(fresh)
    assert db.work() == 0  # not before it has waited a little

    assert (fresh.slug, FENCE) in db.resume().finished
    assert db.tenants.get(fresh).fence is Fence.DONE


# -- what the server refuses -----------------------------------------------------------------------------------------------------------


@ON_POSTGRESQL
def test_a_tenants_own_logins_are_refused_as_its_state_says_and_sessions_end(estate: Estate, db: TenantDB, fresh: Tenant) -> None:
    doors = Doors(estate.world, db, fresh)
    assert doors.open() == {"owner", "runtime"}

    with doors.session("runtime") as runtime, doors.session("owner") as owner:
        with runtime.transaction():
            runtime.execute("SELECT 1")
            db.suspend(fresh)
            assert is_ended(runtime)
            with pytest.raises(psycopg.OperationalError):
                runtime.commit()
        assert not is_ended(owner)  # so that it can be migrated
        assert doors.open() == {"owner"}

        db.delete(fresh)
        assert is_ended(owner)
    assert doors.open() == set()
    db.restore(fresh)
    assert doors.open() == {"owner", "runtime"}

    db.maintenance(fresh)
    assert doors.open() == {"owner", "runtime"}


@ON_POSTGRESQL
def test_the_twin_without_the_fence_lets_a_suspended_tenant_in(estate: Estate, db: TenantDB, fresh: Tenant) -> None:
    doors = Doors(estate.world, db, fresh)

    with before("fence", lambda work: 1 / 0, kind=FENCE):
        db.suspend(fresh)

    assert doors.open() == {"owner", "runtime"}


@ON_POSTGRESQL
async def test_a_process_with_an_old_record_is_refused_by_the_server(make_face: MakeFace, estate: Estate, fresh: Tenant) -> None:
    stale = make_face(cache_ttl=5.0)
    assert await stale.marker(fresh) == fresh.slug

    estate.db.suspend(fresh)

    with pytest.raises((errors.ServerUnavailable, errors.TenantSuspended)):
        await stale.marker(fresh)
    estate.db.activate(fresh)
    assert await stale.marker(fresh) == fresh.slug


@ON_POSTGRESQL
def test_a_purge_gets_along_with_somebody_who_logs_in_again_and_again(estate: Estate, db: TenantDB, doomed: Tenant) -> None:
    """D24: the database is dropped while its own roles, whose passwords somebody has, try to come in."""
    doors = Doors(estate.world, db, db.restore(doomed))
    stop, got_in = threading.Event(), 0

    def come_in() -> None:
        nonlocal got_in
        while not stop.is_set():
            got_in += len(doors.open())

    with ThreadPoolExecutor(2) as threads:
        loops = [threads.submit(come_in) for _ in range(2)]
        eventually(lambda: got_in > 2)
        db.delete(doomed)
        purged = db.purge(doomed, confirm=doomed.slug, immediately=True)
        stop.set()
        for loop in loops:
            loop.result(30)
    assert purged.state is TenantState.PURGED
    assert not exists(estate, doomed)


@ON_POSTGRESQL
def test_a_superusers_session_is_not_ended_and_the_purge_goes_on_when_it_has_gone(estate: Estate, db: TenantDB, doomed: Tenant) -> None:
    assert isinstance(estate.world, PostgreSQLWorld)
    tenant = db.restore(doomed)
    with psycopg.connect(estate.world.server.url(database=tenant.database), autocommit=True) as foreign:
        assert db.delete(tenant).fence is Fence.DONE
        assert not is_ended(foreign)
        with pytest.raises(errors.OperationFailed, match="'database'"):
            db.purge(doomed, confirm=doomed.slug, immediately=True)
        assert exists(estate, doomed)

    assert (doomed.slug, PURGE) in db.resume().finished
    assert not exists(estate, doomed)


# -- maintenance -----------------------------------------------------------------------------------------------------------------------


async def test_under_maintenance_requests_are_to_come_again(face: Face, fresh: Tenant) -> None:
    under = await face.do.maintenance(fresh)
    assert (under.state, under.fence, under.generation) == (TenantState.MAINTENANCE, None, fresh.generation + 1)
    with pytest.raises(errors.TenantNotReady) as caught:
        await face.marker(fresh)
    assert caught.value.http_status == 503 and caught.value.retry_after is not None
    with pytest.raises(errors.IllegalTransition):
        await face.do.maintenance(fresh)

    assert (await face.do.activate(fresh)).state is TenantState.ACTIVE
    assert await face.marker(fresh) == fresh.slug


# -- hooks -----------------------------------------------------------------------------------------------------------------------------

VERBS = {
    "suspend": ("active", "suspended"),
    "maintenance": ("active", "maintenance"),
    "activate": ("suspended", "active"),
    "delete": ("active", "deleted"),
    "restore": ("deleted", "active"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_hook_before_a_verb_that_raises_stops_it_with_nothing_done(db: TenantDB, fresh: Tenant, verb: str) -> None:
    state, _ = VERBS[verb]
    if state != "active":
        {"suspended": db.suspend, "deleted": db.delete}[state](fresh)
    refusal = PermissionError("not on a Friday")

    @db.on(f"before_{verb}")
    def refuse(tenant: Tenant) -> None:
        assert str(tenant.state) == state
        raise refusal

    earlier = db.tenants.get(fresh)
    with pytest.raises(PermissionError) as caught:
        getattr(db, verb)(fresh)
    assert caught.value is refusal
    assert db.tenants.get(fresh) == earlier
    assert db.work() == 0


@pytest.mark.parametrize("verb", VERBS)
def test_a_hook_after_a_verb_that_raises_is_logged_and_undoes_nothing(
    db: TenantDB, fresh: Tenant, verb: str, caplog: pytest.LogCaptureFixture
) -> None:
    state, then = VERBS[verb]
    if state != "active":
        {"suspended": db.suspend, "deleted": db.delete}[state](fresh)
    told: list[Tenant] = []

    @db.on(f"after_{verb}")
    def fail(tenant: Tenant) -> None:
        told.append(tenant)
        raise ConnectionError("the mail server is down")

    changed = getattr(db, verb)(fresh)

    assert told == [changed] and str(changed.state) == then
    logged = [record for record in caplog.records if record.name == "tenantdb.hooks"]
    assert [record.levelno for record in logged] == [logging.ERROR]
    assert "the mail server is down" in logged[0].getMessage() and fresh.slug not in logged[0].getMessage()


def test_hooks_of_a_purge_and_none_receives_a_secret(estate: Estate, db: TenantDB, doomed: Tenant) -> None:
    told: list[tuple[str, Tenant]] = []
    refuse = [True]

    @db.on("before_purge")
    def earlier(tenant: Tenant) -> None:
        told.append(("before", tenant))
        if refuse:
            raise PermissionError("the invoice is open")

    @db.on("after_purge")
    def later(tenant: Tenant) -> None:
        told.append(("after", tenant))

    with pytest.raises(PermissionError):
        db.purge(doomed, confirm=doomed.slug, immediately=True)
    assert db.tenants.get(doomed).state is TenantState.DELETED and exists(estate, doomed)

    refuse.clear()
    record = db._registry.tenants.row(doomed.id)
    passwords = [] if estate.backend == "sqlite" else [db._registry.passwords(record, role)[0] for role in DatabaseRole]
    db.purge(doomed, confirm=doomed.slug, immediately=True)
    assert [(when, str(tenant.state)) for when, tenant in told] == [("before", "deleted"), ("before", "deleted"), ("after", "purged")]
    assert all(tenant.id == doomed.id for _, tenant in told)
    assert not [password for password in passwords if password in repr(told)]


def test_the_hooks_of_what_a_worker_does_run_in_the_worker(process: MakeProcess, estate: Estate, fresh: Tenant) -> None:
    web, worker, told = without_provisioner(process, estate), process(), []
    web.on("after_activate")(lambda tenant: told.append("web"))
    worker.on("after_activate")(lambda tenant: told.append("worker"))
    web.suspend(fresh)
    worker.work()
    web.activate(fresh)
    assert told == []
    worker.work()
    assert told == ["worker"]
