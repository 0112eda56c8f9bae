"""New passwords under traffic: nobody is refused who may come in, and the old password is."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from tenantdb import Tenant, TenantDB, errors
from tenantdb.backends.postgresql.workshop import PostgreSQLWorkshop
from tenantdb.model import DatabaseRole
from tenantdb.registry.operations import ROTATE
from tests.conformance.app import MARKER
from tests.conformance.colours import Face, MakeFace, MakeProcess
from tests.conformance.conftest import Estate
from tests.procedures import after, before, meanwhile
from tests.world import PostgreSQLWorld, eventually

ON_POSTGRESQL = pytest.mark.parametrize("world", ["postgresql"], indirect=True, scope="session")
ROLES = tuple(DatabaseRole)


def passwords(db: TenantDB, tenant: Tenant) -> dict[DatabaseRole, list[str]]:
    record = db._registry.tenants.row(tenant.id)
    return {role: db._registry.passwords(record, role) for role in ROLES}


def opens(estate: Estate, tenant: Tenant, role: DatabaseRole, password: str) -> bool:
    """Whether the server lets a role in with a password."""
    assert isinstance(estate.world, PostgreSQLWorld)
    name = tenant.owner_role if role is DatabaseRole.OWNER else tenant.runtime_role
    try:
        psycopg.connect(estate.world.server.url(name or "", password, tenant.database or "")).close()
    except psycopg.OperationalError as error:
        assert "password authentication failed" in str(error)
        return False
    return True


@ON_POSTGRESQL
def test_after_a_rotation_the_new_passwords_open_and_the_old_are_refused(estate: Estate, db: TenantDB, fresh: Tenant) -> None:
    old = {role: found[0] for role, found in passwords(db, fresh).items()}

    rotated = db.rotate_credentials(fresh)

    new = passwords(db, fresh)
    assert [len(found) for found in new.values()] == [1, 1]
    for role in ROLES:
        assert opens(estate, fresh, role, new[role][0]) and not opens(estate, fresh, role, old[role])
    assert rotated.generation == fresh.generation + 1 and rotated.state is fresh.state
    with db.session(fresh) as session:
        assert session.scalar(MARKER) == fresh.slug
    db.migrations.upgrade(fresh)  # as the owner


@pytest.mark.parametrize("world", ["sqlite"], indirect=True, scope="session")
async def test_sqlite_has_no_passwords_and_says_so(face: Face, fresh: Tenant) -> None:
    with pytest.raises((errors.ConfigError, errors.OperationFailed), match="SQLite has no roles"):
        await face.do.rotate_credentials(fresh)
    assert await face.marker(fresh) == fresh.slug


@ON_POSTGRESQL
async def test_under_traffic_of_threads_and_tasks_no_request_fails(
    make_face: MakeFace, process: MakeProcess, estate: Estate, fresh: Tenant
) -> None:
    """Readers in a process that rotates and in one that knows of nothing, each opening connections all the time."""
    here, elsewhere = process(drain_timeout=3.0), process(cache_ttl=0.5)
    stop, failures, reads = threading.Event(), [], [0]

    def read(db: TenantDB, number: int) -> None:
        while not stop.is_set():
            try:
                with db.session(fresh) as session:
                    assert session.scalar(MARKER) == fresh.slug
                reads[0] += 1
            except Exception as error:
                failures.append(error)
                return

    face = Face(process(cache_ttl=0.5), "async")

    async def read_too() -> None:
        while not stop.is_set():
            try:
                assert await face.marker(fresh) == fresh.slug
            except Exception as error:
                failures.append(error)
                return
            await asyncio.sleep(0)

    def rotate() -> None:
        try:
            for _ in range(2):
                so_far = reads[0]
                here.rotate_credentials(fresh)
                eventually(lambda so_far=so_far: reads[0] > so_far + 20 or bool(failures))  # type: ignore[misc]
        finally:
            stop.set()

    with ThreadPoolExecutor(9) as threads:
        readers = [threads.submit(read, (here, elsewhere)[number % 2], number) for number in range(8)]
        rotating = threads.submit(rotate)
        await asyncio.gather(*(read_too() for _ in range(50)))
        await asyncio.to_thread(rotating.result, 90)
        for reader in readers:
            await asyncio.to_thread(reader.result, 30)
    await face.close()
    assert failures == []
    assert reads[0] > 60


@ON_POSTGRESQL
def test_a_process_with_an_old_record_comes_in_with_the_new_password(process: MakeProcess, estate: Estate, fresh: Tenant) -> None:
    stale, here = process(cache_ttl=5.0), process(drain_timeout=0.1)
    with stale.session(fresh) as session:
        session.scalar(MARKER)
    stale.close()  # its connections, not its records
    seen = stale._registry.peek(fresh.id) or stale._registry.lookup(fresh.id)

    here.rotate_credentials(fresh)
    stale._registry._cache.clear()
    stale._registry._cache.get(fresh.id, lambda key: seen)
    assert stale._registry.peek(fresh.id) == seen
    with stale.session(fresh) as session:
        assert session.scalar(MARKER) == fresh.slug


@ON_POSTGRESQL
@pytest.mark.parametrize("point", ["drawn, not changed", "changed, not known to be", "known, not drained"])
async def test_wherever_a_rotation_stopped_everybody_comes_in_and_a_worker_ends_it(
    make_face: MakeFace, process: MakeProcess, estate: Estate, fresh: Tenant, point: str
) -> None:
    rotating = process(drain_timeout=0.1)
    old = {role: found[0] for role, found in passwords(rotating, fresh).items()}

    def dies(*_: Any) -> None:
        raise OSError("the cable was pulled")

    broken = {
        "drawn, not changed": before("change", dies, kind=ROTATE),
        "changed, not known to be": after("change", dies, kind=ROTATE),
        "known, not drained": before("drain", dies, kind=ROTATE),
    }[point]
    with broken, pytest.raises(errors.OperationFailed, match="the cable was pulled"):
        rotating.rotate_credentials(fresh)

    pending = passwords(rotating, fresh)
    assert len(pending[DatabaseRole.RUNTIME]) == (1 if point == "known, not drained" else 2)
    assert await make_face().marker(fresh) == fresh.slug
    rotating.migrations.upgrade(fresh)  # the owner role has the same trouble
    assert opens(estate, fresh, DatabaseRole.RUNTIME, old[DatabaseRole.RUNTIME]) is (point == "drawn, not changed")

    assert (fresh.slug, ROTATE) in process(drain_timeout=0.1).resume().finished
    new = passwords(rotating, fresh)
    assert [len(found) for found in new.values()] == [1, 1]
    for role in ROLES:
        assert new[role][0] == pending[role][-1]  # what was drawn once is what it ends with
        assert opens(estate, fresh, role, new[role][0]) and not opens(estate, fresh, role, old[role])
    assert await make_face().marker(fresh) == fresh.slug


@ON_POSTGRESQL
def test_a_session_that_is_open_finishes_its_work_and_one_that_never_ends_is_ended(
    process: MakeProcess, estate: Estate, fresh: Tenant
) -> None:
    rotating, other = process(drain_timeout=30.0), process()
    opened, may_end = threading.Event(), threading.Event()

    def long_work() -> object:
        with other.begin(fresh) as session:
            session.scalar(MARKER)
            opened.set()
            may_end.wait(30)
            return session.scalar(MARKER)

    with ThreadPoolExecutor(2) as threads:
        working = threads.submit(long_work)
        opened.wait(30)
        rotation = threads.submit(rotating.rotate_credentials, fresh)
        eventually(
            lambda: len(passwords(rotating, fresh)[DatabaseRole.RUNTIME]) == 1 and rotating.tenants.get(fresh).generation > fresh.generation
        )
        assert not rotation.done()
        may_end.set()
        assert working.result(30) == fresh.slug
        other.close()
        rotation.result(30)

    impatient = process(drain_timeout=0.2)
    with process().connect(fresh) as connection:
        connection.scalar(MARKER)
        connection.rollback()
        impatient.rotate_credentials(fresh)
        with pytest.raises(Exception, match=r"terminat|closed|lost"):
            connection.scalar(MARKER)
        connection.invalidate()


@ON_POSTGRESQL
def test_the_twin_without_the_second_password_refuses_who_comes_in_between(process: MakeProcess, estate: Estate, fresh: Tenant) -> None:
    rotating = process(drain_timeout=0.1)
    with after("change", lambda work: 1 / 0, kind=ROTATE), pytest.raises(errors.OperationFailed):
        rotating.rotate_credentials(fresh)
    other = process()
    record = other._registry.tenants.row(fresh.id)
    assert not opens(estate, fresh, DatabaseRole.RUNTIME, other._registry.passwords(record, DatabaseRole.RUNTIME)[0])
    with other.session(fresh) as session:
        assert session.scalar(MARKER) == fresh.slug
    rotating.resume()


@ON_POSTGRESQL
def test_two_rotations_at_once_do_not_undo_each_other(process: MakeProcess, estate: Estate, fresh: Tenant) -> None:
    one, two = process(drain_timeout=0.1), process(drain_timeout=0.1)
    with ThreadPoolExecutor(2) as threads:
        done = list(threads.map(lambda db: db.rotate_credentials(fresh), (one, two)))
    assert len(done) == 2
    found = passwords(one, fresh)
    for role in ROLES:
        assert len(found[role]) == 1 and opens(estate, fresh, role, found[role][0])


@ON_POSTGRESQL
def test_a_suspended_tenant_gets_new_passwords_and_stays_refused(process: MakeProcess, estate: Estate, fresh: Tenant) -> None:
    db = process()
    db.suspend(fresh)
    db.rotate_credentials(fresh)
    assert isinstance(estate.world, PostgreSQLWorld)
    login = "SELECT rolcanlogin FROM pg_roles WHERE rolname = %s"
    assert estate.world.superuser.execute(login, [fresh.runtime_role]).fetchone() == (False,)
    db.activate(fresh)
    with db.session(fresh) as session:
        assert session.scalar(MARKER) == fresh.slug


@ON_POSTGRESQL
def test_a_server_that_is_away_leaves_a_rotation_that_goes_on_by_itself(process: MakeProcess, estate: Estate, fresh: Tenant) -> None:
    db = process(drain_timeout=0.1)
    with meanwhile(PostgreSQLWorkshop, "set_passwords", lambda *_: 1 / 0), pytest.raises(errors.OperationFailed):
        db.rotate_credentials(fresh)
    with db.session(fresh) as session:
        assert session.scalar(MARKER) == fresh.slug
    assert db.work() == 0  # it waits a little
    assert (fresh.slug, ROTATE) in db.resume().finished
