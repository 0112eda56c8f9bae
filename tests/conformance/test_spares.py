"""Tenants that were made ahead: who gets which, what a taken one still lacks, and what happens to those that nobody may have."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from sqlalchemy import event, text, update
from sqlalchemy.orm import Session

from tenantdb import NewUser, Tenant, TenantDB, TenantState, errors
from tenantdb.provisioning.work import Shop, Work
from tenantdb.registry import tables
from tenantdb.registry.operations import PROVISION, SPARE, TAKE, OperationState
from tests.conformance.colours import COLOURS, Face
from tests.integration.cluster import Scripts
from tests.procedures import before
from tests.world import PostgreSQLWorld, World, eventually

LINES = text("SELECT line FROM notes ORDER BY id")


class Shelf:
    """An application whose registry this module has for itself, and the processes that a test makes of it."""

    def __init__(self, world: World, scripts: Scripts) -> None:
        self.world = world
        self.scripts = scripts
        self.db = world.make_db(migrations=str(scripts))
        self.made: list[TenantDB] = []

    def process(self, **overrides: Any) -> TenantDB:
        self.made.append(self.world.twin(self.db, **overrides))
        return self.made[-1]

    def web(self) -> TenantDB:
        """Without a provisioner; on SQLite every process is one, if nothing forbids it."""
        if isinstance(self.world, PostgreSQLWorld):
            return self.process(server=None, registry_admin=None)
        web = self.process()
        web._runner.can_work_on = lambda server: False  # type: ignore[method-assign]
        return web

    def exists(self, tenant: Tenant) -> bool:
        with self.db._runner.shop.workshop(self.db.servers.get("default")) as workshop:
            names = [tenant.database or "", tenant.owner_role or "", tenant.runtime_role or ""]
            return workshop.find_database(names[0]) is not None or bool(workshop.find_roles(names[1:]))


@pytest.fixture
def shelf(world: World, tmp_path: Path) -> Iterator[Shelf]:
    scripts = Scripts(tmp_path / "migrations")
    key = "id INTEGER PRIMARY KEY" + (" GENERATED ALWAYS AS IDENTITY" if world.backend == "postgresql" else "")
    scripts.add("001", f"CREATE TABLE notes ({key}, line TEXT NOT NULL)")
    shelf = Shelf(world, scripts)
    yield shelf
    tenants = shelf.db.tenants.list()
    for db in shelf.made:
        db.close()
    eventually(lambda: world.open_connections(shelf.db, tenants) == 0)
    shelf.db.close()


def lines(db: TenantDB, tenant: Tenant) -> list[str]:
    with db.session(tenant) as session:
        return list(session.scalars(LINES))


@contextmanager
def no_server() -> Iterator[list[str]]:
    """Nobody opens a provisioner's session, a tenant's connection or a golden database inside; whoever tries is listed."""
    tried: list[str] = []

    def refuse(*_: Any, **__: Any) -> Any:
        tried.append("workshop")
        raise AssertionError("a server was connected to")

    with patch.object(Shop, "workshop", refuse), patch.object(Work, "passing", refuse):
        yield tried


def statements(db: TenantDB) -> list[str]:
    """What the registry is asked from now on."""
    seen: list[str] = []
    for engine in {db._registry._transactions.engine, db._registry._transactions.admin_engine}:
        event.listen(engine, "commit", lambda connection: seen.append("COMMIT"))
        event.listen(engine, "before_cursor_execute", lambda *told: seen.append(told[2]))
    return seen


# -- making --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", COLOURS)
async def test_filling_makes_what_is_missing_and_draining_drops_it(shelf: Shelf, colour: str) -> None:
    face = Face(shelf.process(), colour)
    filled = await face.do.spares.fill(2)
    assert [(spare.state, spare.revision, spare.ready_at is not None) for spare in filled] == [(TenantState.SPARE, "001", True)] * 2
    assert [spare.slug for spare in filled] == [str(spare.id) for spare in filled]
    assert {spare.id for spare in await face.do.spares.fill(2)} == {spare.id for spare in filled}
    assert len(await face.do.spares.fill(3)) == 3
    assert [spare.id for spare in filled] == [spare.id for spare in face.db.spares.list()[:2]]
    assert face.db.tenants.list() == []
    names = {name for spare in filled for name in (spare.database, spare.owner_role, spare.runtime_role)}
    assert not [orphan for orphan in face.db.resume().orphans if orphan.name in names]  # other tests' are on this server too

    assert await face.do.spares.drain() == 3
    assert face.db.spares.list() == [] and not any(shelf.exists(spare) for spare in filled)
    assert await face.do.spares.drain() == 0
    await face.close()


def test_a_process_without_a_provisioner_makes_none_and_an_unknown_server_has_none(shelf: Shelf) -> None:
    for call in (lambda: shelf.web().spares.fill(1), lambda: shelf.db.spares.fill(1, server="mars")):
        with pytest.raises(errors.ConfigError, match="spares are made by a process with a provisioner"):
            call()


def test_a_worker_with_nothing_to_do_keeps_as_many_as_the_setting_says(shelf: Shelf) -> None:
    worker = shelf.process(spares=2)
    assert worker.work() == 0
    assert len(shelf.db.spares.list()) == 2

    shelf.db.provision("acme")
    stop = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        working = threads.submit(lambda: worker.work(stop=stop, poll=0.01))
        eventually(lambda: len([spare for spare in shelf.db.spares.list() if spare.ready_at]) == 2, within=30)
        stop.set()
        working.result(30)


def test_what_an_attempt_left_unfinished_is_finished_or_dropped_by_the_next(shelf: Shelf) -> None:
    def pull_the_cable(work: Work) -> None:
        raise OSError("the cable was pulled")

    db = shelf.process()
    with before("database", pull_the_cable, kind=SPARE), pytest.raises(errors.OperationFailed, match="the cable was pulled"):
        db.spares.fill(1)
    [left] = db.spares.list()
    assert left.ready_at is None
    assert db.provision("nobody-gets-it").id != left.id

    [spare] = db.spares.fill(1)
    assert spare.id == left.id

    with before("database", pull_the_cable, kind=SPARE):
        with pytest.raises(errors.OperationFailed):
            db.spares.fill(2)
        [broken] = [each for each in db.spares.list() if each.ready_at is None]
        with pytest.raises(errors.OperationFailed):  # it fails again, so it goes; and the next one fails too
            db.spares.fill(2)
        assert not shelf.exists(broken)
    assert len(db.spares.fill(2)) == 2


# -- taking --------------------------------------------------------------------------------------------------------------------------


def test_taking_is_one_transaction_on_the_registry_and_needs_no_server(shelf: Shelf) -> None:
    [spare] = shelf.db.spares.fill(1)
    web = shelf.web()
    told: list[Tenant] = []
    web.on("after_activate")(told.append)
    web.ping()
    seen = statements(web)

    with no_server() as tried:
        acme = web.provision("acme", name="Acme Clinic", email="office@acme.example")

    assert tried == []
    assert (acme.id, acme.database, acme.state, acme.slug, acme.name) == (
        spare.id,
        spare.database,
        TenantState.ACTIVE,
        "acme",
        "Acme Clinic",
    )
    assert acme.ready_at is None and acme.email == "office@acme.example" and acme.version > spare.version
    writing = [statement for statement in seen if statement.startswith(("UPDATE", "INSERT"))]
    assert len([s for s in writing if "UPDATE tenantdb_tenants" in s]) == 1 and not [
        s for s in writing if "INSERT INTO tenantdb_tenants" in s
    ]
    assert seen[seen.index(writing[0]) :].count("COMMIT") == 1
    assert told == [acme]
    assert lines(web, acme) == []
    operation = web._registry.operations.for_tenant(acme.id, kinds=[TAKE])
    assert operation is not None and operation.state is OperationState.DONE
    assert web.provision("acme", exist_ok=True).id == acme.id
    with pytest.raises(errors.TenantExists):
        web.provision("acme")


def test_the_owner_of_a_taken_spare_and_an_idempotency_key_work_as_ever(shelf: Shelf) -> None:
    shelf.db.spares.fill(1)
    web = shelf.web()
    owner = NewUser(email="ada@example.org", password="correct horse battery")
    acme = web.provision("acme", owner=owner, idempotency_key="one")
    assert web.provision("acme", owner=owner, idempotency_key="one") == acme
    with pytest.raises(errors.TenantExists):
        web.provision("acme", owner=owner, name="Another", idempotency_key="one")
    user = web.users.authenticate("ada@example.org", "correct horse battery")
    assert [membership.tenant_id for membership in web.memberships.list(user=user)] == [acme.id]


def test_of_twenty_takers_each_gets_a_tenant_of_its_own_eight_of_them_a_spare(shelf: Shelf) -> None:
    spares = {spare.id: spare.database for spare in shelf.db.spares.fill(8)}
    processes = [shelf.process(), shelf.process()]
    together = threading.Barrier(20)

    def take(number: int) -> Tenant:
        together.wait(30)
        return processes[number % 2].provision(f"taker-{number}")

    with ThreadPoolExecutor(20) as threads:
        taken = list(threads.map(take, range(20)))

    assert all(tenant.state is TenantState.ACTIVE for tenant in taken)
    assert len({tenant.database for tenant in taken}) == len({tenant.id for tenant in taken}) == 20
    assert {tenant.id: tenant.database for tenant in taken if tenant.id in spares} == spares
    assert shelf.db.spares.list() == []
    for tenant in taken:
        assert lines(processes[0], tenant) == []


def test_of_many_who_want_one_slug_one_gets_one_spare_and_the_others_stay(shelf: Shelf) -> None:
    shelf.db.spares.fill(2)
    db = shelf.process()

    def take(_: int) -> Tenant | None:
        try:
            return db.provision("acme")
        except errors.TenantExists:
            return None

    with ThreadPoolExecutor(8) as threads:
        assert len([tenant for tenant in threads.map(take, range(8)) if tenant]) == 1
    assert len([spare for spare in db.spares.list() if spare.ready_at]) == 1


def test_a_spare_on_another_server_region_or_revision_is_not_taken(shelf: Shelf) -> None:
    [spare] = shelf.db.spares.fill(1)
    db = shelf.process()
    for wish in ({"server": "mars"}, {"region": "mars"}):
        with pytest.raises(errors.ProvisioningError) as caught:
            db.provision(f"to-{next(iter(wish))}", **wish)
        assert isinstance(caught.value.__cause__, errors.NoServerAvailable)
    db.servers.set_draining("default", draining=True)
    with pytest.raises(errors.ProvisioningError):
        db.provision("nobody")
    db.servers.set_draining("default", draining=False)
    assert [each.id for each in db.spares.list()] == [spare.id]
    assert db.provision("acme", server="default").id == spare.id  # the twin


def test_a_spare_behind_the_head_is_not_taken_until_it_is_refreshed(shelf: Shelf) -> None:
    [stale] = shelf.db.spares.fill(1)
    shelf.scripts.add("002", "CREATE TABLE rooms (id INTEGER PRIMARY KEY)")
    db = shelf.process()

    assert db.provision("acme").id != stale.id
    assert db.tenants.get("acme").revision == "002"
    assert db.spares.refresh() == 1
    [fresh] = db.spares.list()
    assert (fresh.id, fresh.revision, fresh.ready_at is not None) == (stale.id, "002", True)
    assert db.spares.refresh() == 0
    beta = db.provision("beta")
    assert beta.id == stale.id
    with db.session(beta) as session:
        assert session.scalars(text("SELECT count(*) FROM rooms")).one() == 0


def test_while_a_spare_is_migrated_nobody_can_take_it(shelf: Shelf) -> None:
    [stale] = shelf.db.spares.fill(1)
    shelf.scripts.add("002", "CREATE TABLE rooms (id INTEGER PRIMARY KEY)")
    db, taken = shelf.process(), []

    with before("migrate", lambda work: taken.append(shelf.db.provision("acme").id), kind="refresh"):
        db.spares.refresh()

    assert taken and stale.id not in taken


def test_draining_leaves_a_spare_that_is_taken_meanwhile(shelf: Shelf) -> None:
    [spare] = shelf.db.spares.fill(1)
    db = shelf.process()
    db.provision("acme")
    assert db.spares.retire(spare) is False
    assert shelf.exists(spare) and db.tenants.get("acme").id == spare.id


# -- seeds and hooks -------------------------------------------------------------------------------------------------------------------


def static(session: Session) -> None:
    session.execute(text("INSERT INTO notes (line) VALUES ('for all')"))


def own(session: Session, tenant: Tenant) -> None:
    session.execute(text("INSERT INTO notes (line) VALUES (:line)"), {"line": tenant.slug})


def test_a_spare_has_the_rows_that_are_everybodys_and_gets_its_own_when_it_is_taken(shelf: Shelf) -> None:
    db = shelf.process()
    db.seed(static=True)(static)
    db.seed(own)
    [spare] = db.spares.fill(1)
    with shelf.world.inside(spare, db) as inside:
        assert inside.scalars(LINES).all() == ["for all"]

    web = shelf.web()
    web.seed(static=True)(static)
    web.seed(own)
    acme = web.provision("acme")
    assert (acme.id, acme.state) == (spare.id, TenantState.ACTIVE)
    assert lines(web, acme) == ["for all", "acme"]
    beta = db.provision("beta")  # no spare: the same rows
    assert lines(db, beta) == ["for all", "beta"]


def test_a_seed_that_fails_when_a_spare_is_taken_leaves_a_failed_tenant_that_asking_again_completes(shelf: Shelf) -> None:
    [spare] = shelf.db.spares.fill(1)
    web, broken = shelf.web(), [True]

    @web.seed
    def seed(session: Session, tenant: Tenant) -> None:
        own(session, tenant)
        if broken:
            raise LookupError("no price list")

    with pytest.raises(errors.ProvisioningError, match="'seed': LookupError: no price list"):
        web.provision("acme")
    failed = web.tenants.get("acme")
    assert (failed.id, failed.state, failed.reason) == (spare.id, TenantState.FAILED, "seed: LookupError: no price list")
    with pytest.raises(errors.TenantNotReady):
        web.engine("acme")
    with pytest.raises(errors.TenantExists):
        web.provision("acme", name="a stranger's")

    broken.clear()
    acme = web.provision("acme")
    assert (acme.id, acme.state, acme.reason) == (spare.id, TenantState.ACTIVE, None)
    assert lines(web, acme) == ["acme"]


@pytest.mark.parametrize("event", ["before_provision", "before_activate"])
def test_a_hook_before_that_raises_keeps_a_taken_spare_from_being_served(shelf: Shelf, event: str) -> None:
    [spare] = shelf.db.spares.fill(1)
    web, refuse = shelf.web(), [True]
    told: list[str] = []

    @web.on(event)
    def ask(tenant: Tenant) -> None:
        told.append(tenant.slug)
        if refuse:
            raise PermissionError("not on a Friday")

    with pytest.raises(errors.ProvisioningError, match="not on a Friday"):
        web.provision("acme")
    assert web.tenants.get("acme").state is TenantState.FAILED

    refuse.clear()
    assert web.provision("acme").id == spare.id
    assert told == ["acme", "acme"]


def test_a_taken_spare_is_suspended_deleted_and_purged_like_any_tenant(shelf: Shelf) -> None:
    [spare] = shelf.db.spares.fill(1)
    db = shelf.process()
    acme = db.provision("acme")
    db.suspend(acme)
    db.activate(acme)
    db.delete(acme)
    db.purge(acme, confirm="acme", immediately=True)
    assert not shelf.exists(spare)


def test_a_spare_is_nobody_for_whoever_asks_by_its_id(shelf: Shelf) -> None:
    [spare] = shelf.db.spares.fill(1)
    db = shelf.process()
    with pytest.raises((errors.TenantNotFound, errors.TenantNotReady)):
        db.engine(spare.id)
    for verb in (db.suspend, db.activate, db.delete, db.restore, db.maintenance):
        with pytest.raises((errors.TenantNotFound, errors.IllegalTransition)):
            verb(spare.id)
    assert [each.id for each in db.spares.list()] == [spare.id]


def test_taking_a_spare_takes_milliseconds_where_cloning_takes_its_time(shelf: Shelf) -> None:
    """No figure of a benchmark: only that no database is made, which on any machine takes longer than a row."""
    shelf.db.spares.fill(2)
    db = shelf.process()
    db.provision("warm-up")
    begun = time.perf_counter()
    db.provision("acme")
    taken = time.perf_counter() - begun
    begun = time.perf_counter()
    assert db._registry.operations.for_tenant(db.provision("beta").id, kinds=[PROVISION]) is not None
    assert taken < time.perf_counter() - begun


def test_after_a_restore_of_the_registry_spares_are_offered_to_nobody_and_kept(shelf: Shelf) -> None:
    db = shelf.process()
    spare = db.spares.fill(1)[0]
    assert db.provision("earlier").id == spare.id
    with shelf.world.registry(db) as registry:  # as in a backup from before the sign-up
        free = {"slug": None, "name": None, "state": "spare", "ready_at": spare.ready_at}
        registry.execute(update(tables.tenants).where(tables.tenants.c.id == spare.id).values(free))
    db._registry.forget(spare.id, "earlier")

    assert db.spares.distrust() == 1

    assert db.provision("newcomer").id != spare.id
    assert db.spares.drain() == 0
    db.spares.fill(1)
    kept = next(each for each in db.spares.list() if each.id == spare.id)
    assert kept.ready_at is None and kept.legal_hold and shelf.exists(kept)
