"""No password and no key shows where people and machines look: logs at DEBUG level, errors, reprs, pickles, the audit log, the server.

Each secret is a canary: it is recorded, everything is provoked, and whatever came out is searched for it.
"""

from __future__ import annotations

import logging
import pickle
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import text

from tenantdb import AsyncTenantDB, Tenant, TenantDB
from tenantdb.backends import backend
from tenantdb.errors import TenantDBError
from tenantdb.model import DatabaseRole, NewUser
from tenantdb.provisioning.work import Work
from tenantdb.registry.operations import PURGE, ROTATE
from tenantdb.registry.secrets import Keyring, generate_key
from tests.integration.cluster import ADMIN_PASSWORD, APP_PASSWORD, KEY, PROVISIONER_PASSWORD, Cluster, Scripts, login
from tests.procedures import before

USER_PASSWORD = "canary-of-a-user-4711"
WRONG_PASSWORD = "canary-that-is-wrong-0815"
A_ROW = {"line": "a diagnosis"}
WRONG_KEY = generate_key()
pytestmark = pytest.mark.usefixtures("cheap_hashing")


@dataclass(frozen=True)
class World:
    cluster: Cluster
    db: TenantDB
    registry: str
    scripts: Scripts
    acme: Tenant
    canaries: set[str]

    def found_in(self, text: str) -> list[str]:
        return [canary for canary in self.canaries if canary in text]


@pytest.fixture(scope="module")
def world(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    scripts = Scripts(tmp_path_factory.mktemp("secrets") / "migrations")
    scripts.add("001", "CREATE TABLE notes (line text UNIQUE)")
    registry = cluster.new_registry()
    with cluster.tenantdb(registry, migrations=str(scripts)) as db:
        acme = db.provision("acme", owner=NewUser(email="ann@example.org", password=USER_PASSWORD))
        roles = [login(cluster, db, acme, role).password for role in DatabaseRole]
        derived = [part.split(":")[1] for purpose in ("owner", "runtime") for part in Keyring([KEY]).derive(purpose)]
        given = [KEY, WRONG_KEY, APP_PASSWORD, ADMIN_PASSWORD, PROVISIONER_PASSWORD, USER_PASSWORD, WRONG_PASSWORD]
        yield World(cluster, db, registry, scripts, acme, {*given, *roles, *derived})


@pytest.fixture
def everything_logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Every logger at DEBUG: with SQLAlchemy's, what ``echo="debug"`` shows."""
    names = ("", "sqlalchemy", "sqlalchemy.engine", "sqlalchemy.pool", "psycopg", "alembic", "tenantdb", "asyncio")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.DEBUG)
    caplog.handler.setLevel(logging.DEBUG)
    yield caplog
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


# -- what goes wrong -------------------------------------------------------------------------------------------------------------------


def read(db: TenantDB) -> None:
    with db.session("acme") as session:
        session.execute(text("SELECT 1"))


def wrong_provisioner_password(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with world.cluster.tenantdb(world.registry, server=world.cluster.provisioner_url(WRONG_PASSWORD)) as db:
        db.provision("wrong-provisioner")


def wrong_registry_password(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    url = world.cluster.server.url("registry_app", WRONG_PASSWORD, world.registry)
    with world.cluster.tenantdb(world.registry, url=url) as db:
        db.tenants.get("acme")


def wrong_admin_password(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    url = world.cluster.server.url("registry_admin", WRONG_PASSWORD, world.registry)
    with world.cluster.tenantdb(world.registry, registry_admin=url) as db:
        db.provision("wrong-admin")


def wrong_key(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with world.cluster.tenantdb(world.registry, secret_keys=[WRONG_KEY]) as db:
        read(db)


def malformed_key(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.cluster.tenantdb(world.registry, secret_keys=[f"{KEY}{KEY}"])


def malformed_url(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.cluster.tenantdb(world.registry, server=f"postgresql://prov:{WRONG_PASSWORD}@[host:port/db")


def wrong_scheme(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.cluster.tenantdb(world.registry, server=f"mysql://prov:{WRONG_PASSWORD}@localhost/db")


def password_in_the_query(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.cluster.tenantdb(world.registry, server=f"postgresql://prov@localhost/db?password={WRONG_PASSWORD}")


def unknown_setting(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.cluster.tenantdb(world.registry, server_password=WRONG_PASSWORD)


def changed_runtime_password(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ((kept,),) = world.cluster.sql("SELECT rolpassword FROM pg_authid WHERE rolname = %s", [world.acme.runtime_role])
    world.cluster.sql(f"ALTER ROLE {world.acme.runtime_role} PASSWORD 'another'")
    try:
        with world.cluster.tenantdb(world.registry) as db:
            read(db)
    finally:
        world.cluster.sql(f"ALTER ROLE {world.acme.runtime_role} PASSWORD '{kept}'")


def superuser_login(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.cluster.sql(f"ALTER ROLE {world.acme.runtime_role} SUPERUSER")
    try:
        with world.cluster.tenantdb(world.registry) as db:
            read(db)
    finally:
        world.cluster.sql(f"ALTER ROLE {world.acme.runtime_role} NOSUPERUSER")


def role_that_cannot_be_made(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_the_right(work: Work) -> None:
        world.cluster.sql("ALTER ROLE tenantdb_prov NOCREATEROLE")

    try:
        with before("database", lose_the_right):
            world.db.provision("no-role")
    finally:
        world.cluster.sql("ALTER ROLE tenantdb_prov CREATEROLE")


def login_that_is_refused_in_the_middle(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_the_login(work: Work) -> None:
        world.cluster.sql(f"ALTER ROLE {work.tenant.owner_role} NOLOGIN")

    with before("migrate", lose_the_login):
        world.db.provision("no-login")


def seed_that_raises(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(session: Any, tenant: Tenant) -> None:
        session.execute(text("INSERT INTO notes VALUES (:line), (:line)"), A_ROW)

    monkeypatch.setattr(world.db._hooks, "seeds", [broken])
    world.db.provision("no-seed")


def tampered_row(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    name = world.cluster.copy_registry(world.registry)
    world.cluster.sql("UPDATE tenantdb_tenants SET runtime_role = owner_role", database=name)
    with world.cluster.tenantdb(name) as db:
        read(db)


def taken_slug(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.db.provision("acme", owner=NewUser(email="eve@example.org", password=WRONG_PASSWORD))


def wrong_user_password(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.db.users.authenticate("ann@example.org", WRONG_PASSWORD)


def rotation_that_stops_in_the_middle(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passwords of both roles are in the registry then, and the server has refused the new ones."""

    def lose_the_right(work: Work) -> None:
        record = work.registry.tenants.row(world.acme.id)
        both = [password for role in DatabaseRole for password in work.registry.passwords(record, role)]
        assert len(both) == 4
        world.canaries.update(both)
        world.cluster.sql("ALTER ROLE tenantdb_prov NOCREATEROLE")

    try:
        with before("change", lose_the_right, kind=ROTATE):
            world.db.rotate_credentials("acme")
    finally:
        world.cluster.sql("ALTER ROLE tenantdb_prov CREATEROLE")


def export_by_a_program_that_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.cluster.sql("ALTER TABLE notes OWNER TO postgres", database=str(world.acme.database))
    try:
        world.db.export("acme", world.scripts.folder / "acme.tar")
    finally:
        world.cluster.sql(f"ALTER TABLE notes OWNER TO {world.acme.owner_role}", database=str(world.acme.database))


def adoption_with_a_wrong_password(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.db.adopt("adopted", database="postgres", owner_url=world.cluster.server.url("registry_app", WRONG_PASSWORD, "postgres"))


def purge_that_stops_in_the_middle(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def pull_the_cable(work: Work) -> None:
        assert work.registry.passwords(work.record, DatabaseRole.OWNER)
        raise OSError("the cable was pulled")

    world.db.provision("doomed", exist_ok=True)
    world.db.delete("doomed")
    with before("roles", pull_the_cable, kind=PURGE):
        world.db.purge("doomed", confirm="doomed", immediately=True)


# What the caller gives stands in the arguments of the call that he made.
GIVEN_BY_THE_CALLER = {
    malformed_key,
    malformed_url,
    wrong_scheme,
    password_in_the_query,
    unknown_setting,
    taken_slug,
    wrong_user_password,
    adoption_with_a_wrong_password,
}
FAULTS = [
    wrong_provisioner_password,
    wrong_registry_password,
    wrong_admin_password,
    wrong_key,
    malformed_key,
    malformed_url,
    wrong_scheme,
    password_in_the_query,
    unknown_setting,
    changed_runtime_password,
    superuser_login,
    role_that_cannot_be_made,
    login_that_is_refused_in_the_middle,
    seed_that_raises,
    tampered_row,
    taken_slug,
    wrong_user_password,
    rotation_that_stops_in_the_middle,
    export_by_a_program_that_fails,
    adoption_with_a_wrong_password,
    purge_that_stops_in_the_middle,
]


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def with_locals(error: BaseException) -> str:
    """As tools that report errors show it: the variables of every frame, but for the tests' own frames."""
    lines: list[str] = []
    for each in chain(error):
        told = traceback.TracebackException.from_exception(each, capture_locals=True)
        lines += told.format_exception_only()
        for frame in told.stack:
            if frame.filename != __file__ and not frame.filename.endswith("cluster.py"):
                lines += [f"{frame.filename}:{frame.lineno}", *(f"{name} = {value}" for name, value in (frame.locals or {}).items())]
    return "\n".join(lines)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_an_error_shows_no_secret_however_it_is_told(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    everything_logged: pytest.LogCaptureFixture,
    fault: Callable[[World, pytest.MonkeyPatch], None],
) -> None:
    with pytest.raises((TenantDBError, TypeError)) as failure:
        fault(world, monkeypatch)
    error = failure.value

    assert world.found_in("".join(traceback.format_exception(error))) == []
    assert world.found_in(" ".join(f"{each} {each!r} {each.args}" for each in chain(error))) == []
    assert world.found_in(pickle.dumps(error).decode("latin-1")) == []
    assert world.found_in(everything_logged.text + repr([record.args for record in everything_logged.records])) == []
    if fault not in GIVEN_BY_THE_CALLER:
        assert world.found_in(with_locals(error)) == []


def test_frames_are_looked_at_with_what_they_hold(world: World) -> None:
    def leaky(password: str) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError) as failure:
        leaky(PROVISIONER_PASSWORD)

    told = traceback.TracebackException.from_exception(failure.value, capture_locals=True)
    assert world.found_in(str(told.stack[-1].locals)) == [PROVISIONER_PASSWORD]


def test_our_log_lines_show_no_row_that_a_database_refused(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(session: Any, tenant: Tenant) -> None:
        session.execute(text("INSERT INTO notes VALUES (:line), (:line)"), A_ROW)

    def refused_later(tenant: Tenant) -> None:
        with world.db.begin(tenant) as session:
            refused(session, tenant)

    world.db.work()  # what other tests left
    with world.cluster.tenantdb(world.registry, admin=False, provisioner=False) as web:
        web.provision("no-seed-by-worker")
    with monkeypatch.context() as patched:
        patched.setattr(world.db._hooks, "seeds", [refused])
        assert world.db.work() == 0
    monkeypatch.setitem(world.db._hooks._hooks, "after_activate", [refused_later])
    world.db.provision("no-seed-by-worker")

    told = [record.getMessage() for record in caplog.records if record.name.startswith("tenantdb")]
    assert len(told) == 2 and all("UniqueViolation (23505)" in line and "in refused\n" in line for line in told)
    assert A_ROW["line"] not in caplog.text


# -- what goes well --------------------------------------------------------------------------------------------------------------------


async def test_logs_of_a_tenants_whole_life_show_no_secret(world: World, everything_logged: pytest.LogCaptureFixture) -> None:
    with world.cluster.tenantdb(world.registry, migrations=str(world.scripts)) as db:
        db.init()
        db.provision("whole-life", owner=NewUser(email="bob@example.org", password=USER_PASSWORD))
        read(db)
        adb = AsyncTenantDB(db)
        async with adb.session("whole-life") as session:
            await session.execute(text("INSERT INTO notes VALUES ('x')"))
        db.users.authenticate("bob@example.org", USER_PASSWORD)
        db.suspend("whole-life")
        db.activate("whole-life")
        tenant = db.rotate_credentials("whole-life")
        replaced = {login(world.cluster, db, tenant, role).password for role in DatabaseRole}
        findings = db.check()
        await adb.close()
        db.delete("whole-life")
        db.purge("whole-life", confirm="whole-life", immediately=True)
        told = repr(db.tenants.certificate(tenant.id)) + repr(findings)

    assert any(record.name.startswith("sqlalchemy.engine") for record in everything_logged.records)
    shown = everything_logged.text + repr([record.args for record in everything_logged.records]) + told
    assert world.found_in(shown) == [] and not [password for password in replaced if password in shown]


def test_reprs_and_pickles_of_what_an_application_holds_show_no_secret(world: World) -> None:
    db, registry = world.db, world.db._registry
    record = registry.lookup(world.acme.id)
    operation = registry.operations.for_tenant(world.acme.id)
    with db.session("acme") as session:
        engine = session.get_bind()
        connection = session.connection()
        shown = [
            *(db, AsyncTenantDB(db), db.settings, registry, registry.keyring, record, db._locator.locate(record, DatabaseRole.OWNER)),
            *(session, engine, getattr(engine, "url", None), connection, connection.connection.driver_connection, operation),
            *(world.acme, db.servers.get("default"), db.users.get("ann@example.org"), *db.memberships.list()),
            *(backend("postgresql"), *db.audit.list(), NewUser(email="x@example.org", password=USER_PASSWORD)),
        ]
        told = " ".join(f"{thing} {thing!r} {getattr(thing, '__dict__', '')!r}" for thing in shown)
    told += db.settings.model_dump_json() + repr(db.settings.model_dump())

    assert world.found_in(told) == []
    travelling = [
        world.acme,
        db.servers.get("default"),
        operation,
        db.users.get("ann@example.org"),
        *db.memberships.list(),
        *db.audit.list(),
    ]
    assert world.found_in(pickle.dumps(travelling).decode("latin-1")) == []
    for stays in (db, registry.keyring):
        with pytest.raises(TypeError):
            pickle.dumps(stays)


def test_the_registry_stores_no_secret_that_can_be_read(world: World) -> None:
    tables = [
        name
        for (name,) in world.cluster.sql(
            "SELECT relname FROM pg_class WHERE relname ~ '^tenantdb_' AND relkind = 'r'", database=world.registry
        )
    ]
    rows = [str(row) for table in tables for row in world.cluster.sql(f"SELECT t::text FROM {table} t", database=world.registry)]

    assert len(tables) >= 9 and any("acme" in row for row in rows)
    assert world.found_in(" ".join(rows)) == []


def test_the_server_never_hears_a_password_in_sql(world: World) -> None:
    with world.db.session("acme") as session:
        session.execute(text("SELECT 1"))
        activity = str(world.cluster.sql("SELECT * FROM pg_stat_activity"))
    log = world.cluster.server.log.read_text(errors="replace")

    assert str(world.acme.runtime_role) in activity
    assert world.found_in(activity) == []
    assert "INSERT INTO tenantdb_audit" in log and "CREATE ROLE" in log  # every statement is there, with its parameters
    assert world.found_in(log) == []
