"""SIGKILL before and after every step of every operation: after `resume` a tenant is whole or absent, and no door stood open meanwhile."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from tenantdb import Tenant, TenantDB, TenantState, errors
from tenantdb.model import DatabaseRole, Fence
from tests.chaos.kills import Killer
from tests.world import PostgreSQLWorld, World, pg_world, sqlite_world

SCHEMA = str(Path(__file__).parent.parent / "conformance" / "schema")


@dataclass
class Ground:
    """One installation, and a stranger in it who tries every door."""

    world: World
    db: TenantDB
    stranger: Tenant
    numbers: Iterator[int]

    @property
    def has_roles(self) -> bool:
        return isinstance(self.world, PostgreSQLWorld)

    def killer(self) -> Killer:
        return Killer(self.db.settings, prepare)

    def make(self, state: TenantState = TenantState.ACTIVE) -> Tenant:
        slug = f"victim-{next(self.numbers)}"
        tenant = self.db.provision(slug)
        if state is TenantState.SUSPENDED:
            tenant = self.db.suspend(slug)
        elif state is TenantState.DELETED:
            tenant = self.db.delete(slug)
        return tenant

    def may_enter(self, tenant: Tenant, who: Tenant) -> bool:
        """Whether one tenant's runtime role is let into another's database, or its own."""
        if not isinstance(self.world, PostgreSQLWorld) or tenant.database is None:
            return False
        record = self.db._registry.tenants.row(who.id)
        for password in self.db._registry.passwords(record, DatabaseRole.RUNTIME):
            try:
                psycopg.connect(self.world.server.url(who.runtime_role, password, tenant.database)).close()
            except psycopg.OperationalError:
                continue
            return True
        return False

    def check_doors(self, tenant: Tenant) -> None:
        """At any instant, so also right after the kill."""
        now = self.db._registry.tenants.row(tenant.id).tenant
        assert not self.may_enter(now, self.stranger)
        if now.state is not TenantState.ACTIVE and now.state is not TenantState.PROVISIONING and now.fence is Fence.DONE:
            assert now.database is None or not self.may_enter(now, now) or self._is_being_opened(now)

    def _is_being_opened(self, tenant: Tenant) -> bool:
        """It was decided to serve it again; that is written in the journal."""
        operation = self.db._registry.operations.for_tenant(tenant.id)
        return operation is not None and operation.kind in ("activate", "restore")

    def resume(self) -> None:
        report = self.db.resume()
        assert report.failed == () and report.in_progress == (), report
        assert report.orphans == ()
        unfinished = [each for each in self.db._registry.operations.unfinished() if each.state != "failed"]
        assert unfinished == []

    def check_works(self, tenant: Tenant) -> None:
        with self.db.begin(tenant) as session:
            assert session.scalar(text("SELECT count(*) FROM notes")) == 1  # static seed

    def check_gone(self, tenant: Tenant) -> None:
        assert self.db._registry.tenants.row(tenant.id).tenant.state is TenantState.PURGED
        with pytest.raises(errors.TenantNotFound):
            self.db.tenants.get(tenant.id)
        if isinstance(self.world, PostgreSQLWorld):
            names = [tenant.database, tenant.owner_role, tenant.runtime_role]
            found = self.world.superuser.execute(
                "SELECT datname FROM pg_database WHERE datname = ANY(%(n)s) UNION SELECT rolname FROM pg_roles WHERE rolname = ANY(%(n)s)",
                {"n": names},
            ).fetchall()
            assert found == []


def prepare(db: TenantDB) -> None:
    @db.seed(static=True)
    def first_note(session: Session) -> None:
        if session.scalar(text("SELECT count(*) FROM notes")) == 0:
            session.execute(text("INSERT INTO notes (about) VALUES (NULL)"))


@pytest.fixture(scope="module", params=["postgresql", "sqlite"])
def ground(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    made = pg_world(autovacuum="off") if request.param == "postgresql" else sqlite_world(tmp_path_factory.mktemp("kills"))
    with made as world:
        db = world.make_db(migrations=SCHEMA, drain_timeout=0.0)
        prepare(db)
        yield Ground(world, db, db.provision("stranger"), itertools.count())


Operation = Callable[[Ground], tuple[Tenant | None, str, Callable[[TenantDB], Any], Callable[[Ground, str], None]]]


def provision(ground: Ground) -> Any:
    slug = f"new-{next(ground.numbers)}"

    def whole_or_absent(ground: Ground, slug: str) -> None:
        try:
            tenant = ground.db.tenants.get(slug)
        except errors.TenantNotFound:
            tenant = ground.db.provision(slug)
        if tenant.state is TenantState.FAILED:  # with a reason: whoever asked for it asks again
            assert tenant.reason
            tenant = ground.db.provision(slug, exist_ok=True)
        assert tenant.state is TenantState.ACTIVE
        ground.check_works(tenant)

    return None, slug, lambda db: db.provision(slug), whole_or_absent


def take(ground: Ground) -> Any:
    ground.db.spares.fill(1)
    return provision(ground)


def take_and_seed(ground: Ground) -> Any:
    """A spare that is not all that is needed: whoever takes it is at work for a while."""
    tenant, slug, _, check = take(ground)

    def act(db: TenantDB) -> Tenant:
        db.on("before_activate")(lambda tenant: None)
        return db.provision(slug)

    return tenant, slug, act, check


def fill(ground: Ground) -> Any:
    ground.db.spares.drain()

    def whole_or_absent(ground: Ground, slug: str) -> None:
        assert all(spare.ready_at is not None for spare in ground.db.spares.list())
        ground.check_works(ground.db.provision(f"taker-{next(ground.numbers)}"))

    return None, "", lambda db: db.spares.fill(1), whole_or_absent


def suspend(ground: Ground) -> Any:
    tenant = ground.make()

    def so_or_not(ground: Ground, slug: str) -> None:
        now = ground.db.tenants.get(slug)
        if now.state is TenantState.SUSPENDED:
            assert now.fence is Fence.DONE and not ground.may_enter(now, now)
        else:
            ground.check_works(now)

    return tenant, tenant.slug, lambda db: db.suspend(tenant.slug), so_or_not


def activate(ground: Ground) -> Any:
    tenant = ground.make(TenantState.SUSPENDED)

    def so_or_not(ground: Ground, slug: str) -> None:
        now = ground.db.tenants.get(slug)
        if now.state is TenantState.ACTIVE:
            ground.check_works(now)
        else:
            assert now.state is TenantState.SUSPENDED and not ground.may_enter(now, now)

    return tenant, tenant.slug, lambda db: db.activate(tenant.slug), so_or_not


def delete(ground: Ground) -> Any:
    tenant = ground.make()

    def so_or_not(ground: Ground, slug: str) -> None:
        now = ground.db.tenants.get(slug)
        if now.state is TenantState.DELETED:
            assert now.fence is Fence.DONE and not ground.may_enter(now, now)
        else:
            ground.check_works(now)

    return tenant, tenant.slug, lambda db: db.delete(tenant.slug), so_or_not


def restore(ground: Ground) -> Any:
    tenant = ground.make(TenantState.DELETED)

    def so_or_not(ground: Ground, slug: str) -> None:
        now = ground.db.tenants.get(slug)
        if now.state is TenantState.ACTIVE:
            ground.check_works(now)
        else:
            assert now.state is TenantState.DELETED and not ground.may_enter(now, now)

    return tenant, tenant.slug, lambda db: db.restore(tenant.slug), so_or_not


def purge(ground: Ground) -> Any:
    tenant = ground.make(TenantState.DELETED)

    def so_or_not(ground: Ground, slug: str) -> None:
        if ground.db._registry.tenants.row(tenant.id).tenant.state is TenantState.DELETED:
            ground.check_works(ground.db.restore(slug))
        else:
            ground.check_gone(tenant)

    return tenant, tenant.slug, lambda db: db.purge(tenant.slug, confirm=tenant.slug, immediately=True), so_or_not


def rotate(ground: Ground) -> Any:
    tenant = ground.make()

    def whole(ground: Ground, slug: str) -> None:
        now = ground.db.tenants.get(slug)
        ground.check_works(now)
        assert ground.db._registry.tenants.row(now.id).runtime_secret_pending is None
        with ground.db.migrations.owner_connection(slug) as connection:
            assert connection.scalar(text("SELECT count(*) FROM notes")) == 1

    return tenant, tenant.slug, lambda db: db.rotate_credentials(tenant.slug), whole


OPERATIONS = (provision, take, take_and_seed, fill, suspend, activate, delete, restore, purge, rotate)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_a_kill_at_any_point_leaves_whole_or_absent(ground: Ground, operation: Operation) -> None:
    if operation is rotate and not ground.has_roles:
        with pytest.raises(errors.ConfigError, match="no passwords"):
            ground.db.rotate_credentials(ground.make())
        return
    killer = ground.killer()
    points = killer.points(operation(ground)[2])
    assert len(points) >= 2
    for number, name in enumerate(points):
        tenant, slug, act, check = operation(ground)
        if killer.kill(act, number):  # or else it took a shorter way this time: what was made before is there already
            _survey(ground, tenant, slug, check, f"killed at point {number}, {name}")


def _survey(ground: Ground, tenant: Tenant | None, slug: str, check: Callable[[Ground, str], None], what: str) -> None:
    try:
        for each in [*ground.db.spares.list(), *ground.db.tenants.list("provisioning"), *([tenant] if tenant else [])]:
            ground.check_doors(each)
        ground.resume()
        check(ground, slug)
    except BaseException as error:
        error.args = (f"{what}: {error}",)
        raise


def cut(ground: Ground) -> Callable[[], object]:
    """Every connection of the application is ended by the server, as in a restart."""
    if not isinstance(ground.world, PostgreSQLWorld):
        return lambda: None
    url = ground.world.superuser_url

    def end_all() -> None:
        with psycopg.connect(url, autocommit=True) as superuser:
            superuser.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE backend_type = 'client backend' AND usename IN ('app', 'admin', 'prov') AND application_name = %s",
                [f"tenantdb/{os.getpid()}"],
            )

    return end_all


def full(ground: Ground) -> Callable[[], object]:
    """The disk of the database server is full."""

    def refuse() -> None:
        if ground.has_roles:
            raise psycopg.errors.DiskFull("could not extend file: No space left on device")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return refuse


def denied(ground: Ground) -> Callable[[], object]:
    """Somebody has taken a right from the provisioner."""

    def refuse() -> None:
        if ground.has_roles:
            raise psycopg.errors.InsufficientPrivilege("permission denied to create database")
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    return refuse


@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", [cut, full, denied], ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_a_fault_at_any_point_leaves_whole_or_absent(
    ground: Ground, operation: Operation, fault: Callable[[Ground], Callable[[], object]]
) -> None:
    """As a kill, but that the process lives on, tells its caller, and writes down why."""
    if not ground.has_roles and (fault is cut or operation is rotate):
        return  # a file is cut off from nobody, and has no passwords
    killer = ground.killer()
    points = killer.points(operation(ground)[2])
    chosen = (
        range(len(points)) if fault is cut else [n for n, name in enumerate(points) if name.startswith("before ") and "commit" not in name]
    )
    for number in chosen:
        tenant, slug, act, check = operation(ground)
        killer.strike(act, number, fault(ground))
        _survey(ground, tenant, slug, check, f"{fault.__name__} at point {number}, {points[number]}")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("delay", [0.0005, 0.002, 0.005, 0.01, 0.02])
@pytest.mark.parametrize(("operation", "statement"), [(provision, "before create_database"), (purge, "before drop_database")])
def test_a_kill_in_the_middle_of_a_long_statement_too(ground: Ground, operation: Operation, statement: str, delay: float) -> None:
    """The server goes on with CREATE DATABASE when its client is gone; DROP DATABASE may leave the database unusable."""
    killer = ground.killer()
    ground.db.provision(f"warm-{next(ground.numbers)}")  # the golden database is there
    number = killer.points(operation(ground)[2]).index(statement)
    tenant, slug, act, check = operation(ground)

    killer.kill(act, number, delay=delay)

    _survey(ground, tenant, slug, check, f"killed {delay} s after {statement}")


@pytest.mark.parametrize(("operation", "at"), [(purge, "after drop_database"), (suspend, "before fence"), (provision, "after fit")])
def test_without_resume_the_sweep_finds_what_was_left(ground: Ground, operation: Operation, at: str) -> None:
    killer = ground.killer()
    number = killer.points(operation(ground)[2]).index(at)
    _, slug, act, check = operation(ground)
    assert killer.kill(act, number)

    with pytest.raises((AssertionError, errors.TenantDBError)):
        unfinished = [each for each in ground.db._registry.operations.unfinished() if each.state != "failed"]
        assert unfinished == []

    ground.resume()
    check(ground, slug)
