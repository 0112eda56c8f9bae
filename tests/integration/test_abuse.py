"""The abuse cases that need a server of their own: one that counts statements, writes down DDL, and belongs to nobody else.

What is looked for here is looked for in everything that the server keeps, after everything that tenantdb does with it. Each search finds
something when it is planted: a search that never finds anything proves nothing.
"""

from __future__ import annotations

import logging
import re
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql
from sqlalchemy import URL, text
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from tenantdb import Budget, Tenant, TenantDB, TenantState, errors
from tenantdb.backends import FenceLevel
from tenantdb.backends.postgresql import workshop as workshops
from tenantdb.cli.group import cli
from tenantdb.model import DatabaseRole, NewUser
from tenantdb.provisioning import steps
from tenantdb.provisioning.work import Work
from tenantdb.settings import ConnectionURL
from tenantdb.testing import EmbeddedServer
from tests.integration.cluster import (
    ADMIN_PASSWORD,
    APP_PASSWORD,
    KEY,
    PROVISIONER,
    PROVISIONER_PASSWORD,
    Cluster,
    Login,
    Scripts,
    login,
)
from tests.integration.test_doctor import TRAPS
from tests.procedures import before
from tests.servers import debian_bindir
from tests.world import eventually

pytestmark = pytest.mark.usefixtures("cheap_hashing")
OWNER, RUNTIME = DatabaseRole.OWNER, DatabaseRole.RUNTIME
CUSTOMER = "zebrafish"  # in every slug, name, e-mail and row of these tests; nothing else on a server is called so
USER_PASSWORD = "canary-of-a-user-2718"
SETTINGS = {"log_statement": "ddl", "shared_preload_libraries": "pg_stat_statements", "pg_stat_statements.track": "all"}


@dataclass(frozen=True)
class World:
    cluster: Cluster
    scripts: Scripts

    @contextmanager
    def registry(self, **options: Any) -> Iterator[TenantDB]:
        """An application with a registry of its own."""
        with self.tenantdb(self.cluster.new_registry(), **options) as db:
            yield db

    def tenantdb(self, registry: str, **options: Any) -> TenantDB:
        return self.cluster.tenantdb(registry, **{"migrations": str(self.scripts), **options})

    def log(self) -> str:
        return self.cluster.server.log.read_text(errors="replace")

    def heard(self) -> str:
        """What the server keeps of the statements that it was given."""
        return self.log() + str(self.cluster.sql("SELECT query FROM pg_stat_statements"))


@pytest.fixture(scope="module", params=["wheel", pytest.param("distribution", marks=pytest.mark.services)])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    bindir = debian_bindir() if request.param == "distribution" else None
    scripts = Scripts(tmp_path_factory.mktemp("abuse") / "migrations")
    scripts.add("001", "CREATE TABLE notes (line text)")
    with EmbeddedServer(bindir=bindir, fsync=False, settings=SETTINGS) as server:
        cluster = Cluster(server)
        cluster.prepare()
        cluster.sql("CREATE EXTENSION pg_stat_statements")
        yield World(cluster, scripts)


def slug() -> str:
    return f"{CUSTOMER}-{uuid.uuid4().hex[:8]}"


def owner_of(name: str) -> NewUser:
    return NewUser(email=f"{name}@{CUSTOMER}.example", password=USER_PASSWORD)


def lines(db: TenantDB, tenant: Tenant | str) -> list[str]:
    with db.session(tenant) as session:
        return list(session.scalars(text("SELECT line FROM notes ORDER BY line")))


def write(db: TenantDB, tenant: Tenant | str, line: str) -> None:
    with db.begin(tenant) as session:
        session.execute(text("INSERT INTO notes VALUES (:line)"), {"line": line})


def passwords(cluster: Cluster, db: TenantDB, tenant: Tenant) -> list[str]:
    record = db._registry.tenants.row(tenant.id)
    return [password for role in DatabaseRole for password in db._registry.passwords(record, role)]


# -- D19: what every role can see ------------------------------------------------------------------------------------------------------

VISIBLE = [
    f"SELECT x::text FROM {view} x"
    for view in (
        "pg_stat_activity",
        "pg_database",
        "pg_roles",
        "pg_auth_members",
        "pg_shdescription",
        "pg_shseclabel",
        "pg_db_role_setting",
        "pg_stat_database",
        "pg_prepared_xacts",
        "pg_tablespace",
        "pg_locks",
    )
]


@contextmanager
def watched(spy: Login) -> Iterator[list[str]]:
    """What somebody with a tenant's password reads meanwhile, again and again, and once more at the end."""
    seen: set[str] = set()
    stop = threading.Event()

    def look() -> None:
        with psycopg.connect(spy.cluster.server.url(spy.name, spy.password, spy.database), autocommit=True) as eye:
            while not stop.wait(0.01):
                seen.update(row for query in VISIBLE for (row,) in eye.execute(query.encode()))

    told: list[str] = []
    with ThreadPoolExecutor(1) as threads:
        looking = threads.submit(look)
        try:
            yield told
        finally:
            time.sleep(0.1)
            stop.set()
            looking.result(30)
    told += seen


def naming(seen: list[str]) -> list[str]:
    return [line for line in seen if re.search(CUSTOMER, line, re.IGNORECASE)]


def test_nothing_that_every_role_can_see_names_a_customer_whatever_is_done_with_him(world: World, tmp_path: Path) -> None:
    with world.registry() as db:
        spy = login(world.cluster, db, db.provision("somebody"), RUNTIME)
        name = slug()
        about = {"name": f"The {CUSTOMER} clinic", "email": f"info@{CUSTOMER}.example", "metadata": {"who": CUSTOMER}}
        with watched(spy) as seen:
            made = db.provision(name, owner=owner_of(name), idempotency_key=name, **about)
            db.spares.fill(2)
            taken = db.provision(f"{name}-s", owner=owner_of(f"{name}-s"), **about)
            write(db, name, CUSTOMER)
            db.rotate_credentials(name)
            db.suspend(name)
            db.activate(name)
            db.export(name, tmp_path / f"{CUSTOMER}.tar")
            db.import_(f"{name}-i", tmp_path / f"{CUSTOMER}.tar", **about)
            db.clone(name, f"{name}-c", neutralised=False, **about)
            db.export_rows(name, tmp_path / CUSTOMER)
            db.doctor(repair=True)
            db.delete(f"{name}-s")
            db.purge(f"{name}-s", confirm=f"{name}-s", immediately=True)
            with db.session(name) as session, db.migrations.owner_connection(name) as connection:
                session.scalars(text("SELECT line FROM notes")).all()
                connection.execute(text("SELECT 1"))
                time.sleep(0.1)
        golden = db._registry.templates.list()
        spares = db.spares.list()

    everything = "\n".join(seen)
    for name_ in (made.database, made.runtime_role, taken.database, *(g.database for g in golden), *(s.owner_role for s in spares)):
        assert str(name_) in everything  # it was looked at
    assert "tenantdb/" in everything and golden and spares
    assert naming(seen) == []


def test_a_name_that_somebody_put_into_the_catalogue_would_be_seen(world: World) -> None:
    with world.registry() as db:
        tenant = db.provision("somebody")
        spy = login(world.cluster, db, tenant, RUNTIME)
        with watched(spy) as seen:
            world.cluster.sql(f"COMMENT ON DATABASE {tenant.database} IS 'The {CUSTOMER} clinic'")
            url = world.cluster.server.url() + f"?application_name={CUSTOMER}"
            with psycopg.connect(url):
                time.sleep(0.2)
        world.cluster.sql(f"COMMENT ON DATABASE {tenant.database} IS NULL")

    assert len(naming(seen)) >= 2


# -- D22, K5: passwords ----------------------------------------------------------------------------------------------------------------


def test_neither_log_nor_statistics_of_the_server_hold_a_password_even_where_a_statement_failed(world: World) -> None:
    known: list[str] = [KEY, USER_PASSWORD, APP_PASSWORD, ADMIN_PASSWORD, PROVISIONER_PASSWORD]

    with world.registry() as db:

        def lose_the_right(work: Work) -> None:
            world.cluster.sql(f"ALTER ROLE {PROVISIONER} NOCREATEROLE")

        failing, name = slug(), slug()
        try:
            with before("database", lose_the_right), pytest.raises(errors.ProvisioningError):
                db.provision(failing)
        finally:
            world.cluster.sql(f"ALTER ROLE {PROVISIONER} CREATEROLE")
        known += passwords(world.cluster, db, db.tenants.get(failing))
        tenant = db.provision(name, owner=owner_of(name))
        spares = db.spares.fill(1)
        for each in (tenant, *spares):
            known += passwords(world.cluster, db, each)
        db.rotate_credentials(name)
        known += passwords(world.cluster, db, tenant)
        login(world.cluster, db, tenant, RUNTIME).ask("ALTER ROLE CURRENT_USER PASSWORD NULL")
        assert "password-lost" in {finding.code for finding in db.doctor(repair=True) if finding.repaired}
        db.users.authenticate(f"{name}@{CUSTOMER}.example", USER_PASSWORD)

    heard = world.heard()
    assert f'CREATE ROLE "{tenant.runtime_role}"' in world.log() and heard.count("SCRAM-SHA-256$") > 8
    assert re.search(r'STATEMENT: .*CREATE ROLE "t_[0-9a-f]{16}"', world.log())  # the one that failed is there with its text
    assert len(set(known)) >= 13
    assert [password for password in known if password in heard] == []


def test_a_password_in_plain_sql_would_be_found_in_both(world: World) -> None:
    world.cluster.sql("CREATE ROLE careless PASSWORD 'canary-in-plain-sql'")
    world.cluster.sql("DROP ROLE careless")

    assert "canary-in-plain-sql" in world.log()
    assert "canary-in-plain-sql" in str(world.cluster.sql("SELECT query FROM pg_stat_statements"))


def test_no_command_prints_or_logs_a_password(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """K5 over the command line, at DEBUG, in words and in JSON, when it goes well and when it does not."""
    registry = world.cluster.new_registry()
    given_ = {**world.cluster.tenantdb_arguments(registry), "secret_keys": KEY, "migrations": str(world.scripts)}
    for name, value in given_.items():
        monkeypatch.setenv(f"TENANTDB_{name.upper()}", value)
    monkeypatch.chdir(tmp_path)
    for logger in ("", "sqlalchemy.engine", "sqlalchemy.pool", "psycopg", "alembic", "tenantdb"):
        caplog.set_level(logging.DEBUG, logger)
    known = {KEY, APP_PASSWORD, ADMIN_PASSWORD, PROVISIONER_PASSWORD, USER_PASSWORD}
    shown: list[str] = []
    codes: list[int] = []

    def learn() -> None:
        with world.tenantdb(registry) as db:
            for each in [*db.tenants.list(), *db.spares.list()]:
                known.update(passwords(world.cluster, db, each))

    def run(*words: str, **env: str) -> int:
        result = CliRunner().invoke(cli, words, prog_name="tenantdb", env=env)
        shown.append(result.output)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            shown.append("".join(traceback.format_exception(result.exception)))
        codes.append(result.exit_code)
        return result.exit_code

    def both(*words: str) -> None:
        run(*words)
        run("--json", *words)

    assert run("init") == 0
    assert run("users", "create", f"ann@{CUSTOMER}.example", TENANTDB_USER_PASSWORD=USER_PASSWORD) == 0
    assert run("provision", "acme") == 0
    learn()
    assert run("rotate-credentials", "acme") == 0
    assert run("spares", "fill", "1") == 0
    assert run("export", "acme", "acme.tar") == 0
    assert run("import", "acme.tar", "beta") == 0
    assert run("clone", "acme", "copy", "--not-neutralised", "--yes") == 0
    assert run("export-rows", "acme", "rows") == 0
    learn()
    for words in (
        ["list"],
        ["show", "acme"],
        ["doctor", "--repair"],
        ["check"],
        ["resume"],
        ["worker", "--once"],
        ["migrate"],
        ["spares", "list"],
        ["suspend", "acme"],
        ["activate", "acme"],
        ["audit", "search"],
        ["audit", "verify"],
        ["rotate-keys", "--check"],
        ["rotate-credentials", "--all"],
    ):
        both(*words)
    learn()
    assert run("delete", "beta", "--yes") == 0
    assert run("purge", "beta", "--confirm", "beta", "--immediately") == 0
    went_well = len(codes)
    wrong = world.cluster.provisioner_url("canary-that-is-wrong")
    known.add("canary-that-is-wrong")
    for words in (["spares", "fill", "5"], ["doctor"], ["rotate-credentials", "acme"], ["purge", "copy", "--confirm", "copy"]):
        run("--traceback", *words, TENANTDB_SERVER=wrong)
    url = world.cluster.server.url("nobody", "canary-that-is-wrong", "postgres")
    run("--traceback", "adopt", "old", "--database", "postgres", TENANTDB_OWNER_URL=url)
    run("--traceback", "import", "acme.tar", "acme")
    run("--traceback", "export", "acme", "acme.tar", "--overwrite")

    assert all(code != 0 for code in codes[went_well:]), codes[went_well:]
    everything = "\n".join(shown) + caplog.text + repr([record.args for record in caplog.records])
    assert "sqlalchemy.engine" in {record.name.split(".Engine")[0] for record in caplog.records} and "acme is active" in everything
    assert len(known) >= 14
    assert [password for password in known if password in everything] == []


# -- D13, D20, D24: what a tenant can do to the server and to us -----------------------------------------------------------------------

SPILLS = "SELECT count(*) FROM (SELECT g FROM generate_series(1, 300000) g ORDER BY md5(g::text)) s"


def test_a_tenant_at_its_limit_of_temporary_files_is_refused_and_no_other(world: World) -> None:
    with world.registry() as db:
        greedy, modest = db.provision("greedy"), db.provision("modest")
        world.cluster.sql(f"ALTER ROLE {greedy.runtime_role} SET temp_file_limit = '1MB'")  # as 1 GB, but sooner

        with db.session(greedy) as session, pytest.raises(OperationalError) as caught:
            session.execute(text(SPILLS))
        with db.session(modest) as session:
            assert session.scalar(text(SPILLS)) == 300_000
            with pytest.raises(SQLAlchemyError, match="permission denied"):
                session.execute(text("SET temp_file_limit = -1"))

    assert isinstance(caught.value.orig, psycopg.errors.ConfigurationLimitExceeded)


@pytest.mark.parametrize("role", DatabaseRole, ids=str)
def test_a_flood_of_locks_does_not_begin(world: World, role: DatabaseRole) -> None:
    """D11: it would fill the lock table of the whole server. The twin, under "managed", is named by `check`: see test_isolation.py."""
    with world.registry() as db:
        attacker = login(world.cluster, db, db.provision("flooder"), role)
        neighbour = login(world.cluster, db, db.provision("neighbour"), RUNTIME)
        with psycopg.connect(world.cluster.server.url(attacker.name, attacker.password, attacker.database), autocommit=True) as held:
            for function in ("pg_advisory_lock", "pg_try_advisory_lock", "pg_advisory_lock_shared", "pg_try_advisory_lock_shared"):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    held.execute(f"SELECT {function}(g) FROM generate_series(1, 200000) g".encode())

            assert held.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()").fetchall() == [(0,)]
            assert neighbour.ask("SELECT 1") == world.cluster.sql("SELECT 1") == [(1,)]


def test_a_trap_in_a_tenants_database_makes_nobody_a_superuser_whatever_is_done_with_it(world: World, tmp_path: Path) -> None:
    """D20 for every verb; the doctor alone is in test_doctor.py."""
    with world.registry() as db:
        tenant = db.provision("trapper")
        owner = login(world.cluster, db, tenant, OWNER)
        names = {"owner": tenant.owner_role, "runtime": tenant.runtime_role, "provisioner": PROVISIONER}
        for trap in TRAPS:
            owner.ask(trap.format(**names))
        owner.ask(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {PROVISIONER}")

        def rights() -> list[tuple[Any, ...]]:
            query = "SELECT DISTINCT rolsuper, rolcreaterole, rolcreatedb FROM pg_roles WHERE rolname LIKE 't\\_%'"
            return world.cluster.sql(query)

        with world.tenantdb(db.settings.url.database or "", migrations=str(_later(tmp_path))) as newer:
            newer.migrations.upgrade("trapper")
            write(newer, "trapper", "a note")
            newer.export("trapper", tmp_path / "trapper.tar")
            newer.export_rows("trapper", tmp_path / "rows")
            newer.rotate_credentials("trapper")
            newer.suspend("trapper")
            newer.activate("trapper")
            for act in (
                lambda: newer.clone("trapper", "trapped", neutralised=False),
                lambda: newer.import_("imported", tmp_path / "trapper.tar"),
            ):
                with suppress(errors.ProvisioningError):  # PUBLIC or others may have rights in it
                    act()
            newer.check()
            newer.doctor(repair=True)
            newer.resume()
            newer.stats()
            assert rights() == [(False, False, False)]

            # The twin: that is what would have happened to a superuser.
            world.cluster.sql("SET search_path = public, pg_catalog; SELECT lower('X')", database=str(tenant.database))
            assert rights() != [(False, False, False)]
            world.cluster.sql(f"ALTER ROLE {tenant.owner_role} NOSUPERUSER NOCREATEDB")

            newer.delete("trapper")
            newer.purge("trapper", confirm="trapper", immediately=True)
            assert rights() == [(False, False, False)]
            assert str(tenant.database) not in world.cluster.databases()


def _later(folder: Path) -> Scripts:
    scripts = Scripts(folder / "later")
    scripts.add("001", "CREATE TABLE notes (line text)")
    scripts.add("002", "ALTER TABLE notes ADD COLUMN more text", "UPDATE notes SET more = lower(line)", "SELECT * FROM pg_roles LIMIT 1")
    return scripts


def test_a_database_is_dropped_though_sessions_are_in_it_and_its_roles_come_again_and_again(world: World) -> None:
    """D24."""
    with world.registry() as db:
        tenant = db.provision("stubborn")
        logins = [login(world.cluster, db, tenant, role) for role in (RUNTIME, OWNER)]
        stop, got_in = threading.Event(), 0

        def come_in(who: Login) -> None:
            nonlocal got_in
            while not stop.is_set():
                try:
                    with psycopg.connect(world.cluster.server.url(who.name, who.password, who.database)) as connection:
                        connection.execute("SELECT 1")
                        got_in += 1
                except psycopg.Error:
                    continue

        held = [psycopg.connect(world.cluster.server.url(who.name, who.password, who.database)) for who in logins]
        with ThreadPoolExecutor(4) as threads:
            try:
                for connection in held:
                    connection.execute("SELECT * FROM notes")  # idle in a transaction, with a lock
                loops = [threads.submit(come_in, who) for who in logins * 2]
                eventually(lambda: got_in > 8)
                db.delete("stubborn")
                assert db.purge("stubborn", confirm="stubborn", immediately=True).state is TenantState.PURGED
            finally:
                stop.set()
                for connection in held:
                    connection.close()
            for loop in loops:
                loop.result(30)

        assert str(tenant.database) not in world.cluster.databases()
        assert not world.cluster.roles() & {tenant.owner_role, tenant.runtime_role}


# -- A10, A16: what is gone, and what comes back ---------------------------------------------------------------------------------------


def test_of_a_purged_tenant_nothing_is_left_in_other_processes_or_in_what_waits(world: World) -> None:
    registry = world.cluster.new_registry()
    with (
        world.tenantdb(registry) as db,
        world.tenantdb(registry, admin=False, provisioner=False) as web,
        world.tenantdb(registry, cache_ttl=0.2, budget=Budget(idle_timeout=0.5)) as other,
    ):
        name = slug()
        tenant = db.provision(name, owner=owner_of(name))
        user = db.users.authenticate(f"{name}@{CUSTOMER}.example", USER_PASSWORD)
        token = web.refresh_tokens.create(user, name)
        db.provision("neighbour")
        for process in (web, other):
            assert lines(process, name) == [] and lines(process, "neighbour") == []
        leased = web.session(name)
        leased.execute(text("SELECT 1"))
        before_secrets = passwords(world.cluster, db, tenant)
        web.suspend(name)  # waits in the journal for a worker
        web.delete(name)

        db.purge(name, confirm=name, immediately=True)

        with pytest.raises(SQLAlchemyError):
            leased.execute(text("SELECT 1"))
        leased.close()
        for process in (web, other):
            with pytest.raises((errors.TenantNotFound, errors.ServerUnavailable)):
                lines(process, tenant)
        eventually(lambda: _is_unknown(other, tenant), within=5)
        with pytest.raises(errors.TenantNotFound):
            web.tenants.get(name)
        with pytest.raises(errors.TenantDBError):
            web.refresh_tokens.rotate(token)
        with pytest.raises(errors.TenantDBError):
            db.memberships.get(user, tenant)
        assert db.work() == 0 and not [each for each in db._registry.operations.unfinished() if each.tenant_id == tenant.id]
        eventually(lambda: name not in {use.tenant for process in (web, other) for stats in process.stats() for use in stats.tenants})
        assert lines(web, "neighbour") == lines(other, "neighbour") == []
        assert world.cluster.sql("SELECT FROM pg_stat_activity WHERE usename = ANY(%s)", [[tenant.owner_role, tenant.runtime_role]]) == []
        assert str(tenant.database) not in world.cluster.databases()
        assert not world.cluster.roles() & {tenant.owner_role, tenant.runtime_role}
        row = world.cluster.sql("SELECT t::text FROM tenantdb_tenants t WHERE id = %s", [tenant.id], database=registry)
        kept = str(row) + str(
            world.cluster.sql("SELECT o::text FROM tenantdb_operations o WHERE tenant_id = %s", [tenant.id], database=registry)
        )
        assert [word for word in (CUSTOMER, *before_secrets) if word in kept] == []


def _is_unknown(db: TenantDB, tenant: Tenant) -> bool:
    try:
        lines(db, tenant)
    except errors.TenantNotFound:
        return True
    except errors.ServerUnavailable:
        return False
    return False


def test_a_registry_restored_from_an_older_backup_tells_what_does_not_fit_and_drops_nothing(world: World) -> None:
    registry = world.cluster.new_registry()
    with world.tenantdb(registry) as db:
        for name in ("kept", "rotated", "doomed", "shut"):
            db.provision(name)
            write(db, name, name)
    backup = world.cluster.copy_registry(registry)
    with world.tenantdb(registry) as db:
        newcomer = db.provision("newcomer")
        write(db, "newcomer", "not in the backup")
        db.rotate_credentials("rotated")
        db.suspend("shut")
        doomed = db.delete("doomed")
        db.purge("doomed", confirm="doomed", immediately=True)
        inside = login(world.cluster, db, newcomer, RUNTIME)

    there = world.cluster.databases(), world.cluster.roles()
    with world.tenantdb(backup) as db:
        for _ in range(2):
            orphans = {(orphan.kind, orphan.name) for orphan in db.resume().orphans}
            expected = {("database", newcomer.database), ("row", doomed.database)}
            expected |= {("role", newcomer.owner_role), ("role", newcomer.runtime_role)}
            assert {orphan for orphan in orphans if orphan in expected or orphan[0] == "row"} == expected
            assert db.work() == 0
        found = {(finding.subject.split()[-1], finding.code) for finding in db.doctor()}
        codes = {code for _, code in found}
        assert {"password-lost", "login-lost"} <= codes
        db.doctor(repair=True)
        assert (world.cluster.databases(), world.cluster.roles()) == there
        assert inside.ask("SELECT line FROM notes") == [("not in the backup",)]
        assert lines(db, "kept") == ["kept"] and lines(db, "rotated") == ["rotated"]
        with pytest.raises(errors.TenantDBError):
            lines(db, "doomed")
        with pytest.raises(errors.TenantNotFound):
            lines(db, "newcomer")
        again = db.provision("newcomer")  # the name is free in the backup: another database, and nothing of the one before in it
        assert again.database != newcomer.database and lines(db, "newcomer") == []


# -- identifiers -----------------------------------------------------------------------------------------------------------------------


def test_names_that_differ_only_at_their_end_are_two_databases(world: World) -> None:
    """I1: no name of ours is cut at 63 bytes, because none is made of a slug."""
    with world.registry() as db:
        one, two = (db.provision(f"{'a' * 39}{end}") for end in "bc")
        write(db, one, "of one")

        assert len({one.database, two.database, one.owner_role, two.owner_role, one.runtime_role, two.runtime_role}) == 6
        assert all(re.fullmatch("t_[0-9a-f]{16}", str(name)) for name in (one.database, one.owner_role, one.runtime_role))
        assert lines(db, two) == []
        with pytest.raises(errors.InvalidSlug):
            db.provision("a" * 200)


def test_a_name_that_another_has_reserved_and_not_used_yet_is_not_shared(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    """I4: on the server it is free, in the registry it is not."""
    with world.registry() as db:

        def pull_the_cable(work: Work) -> None:
            raise OSError("the cable was pulled")

        with before("database", pull_the_cable), pytest.raises(errors.ProvisioningError):
            db.provision("first")
        reserved, draw = [str(db.tenants.get("first").database)], steps.draw_name
        taken = reserved[0]
        monkeypatch.setattr(steps, "draw_name", lambda: reserved.pop() if reserved else draw())
        try:
            second = db.provision("second")
        except errors.ProvisioningError:
            second = db.provision("second")

        assert reserved == [] and second.database != taken
        first = db.provision("first")
        assert first.database == taken
        write(db, first, "of the first")
        assert lines(db, second) == []


BAD_NAMES = [
    "",
    "postgres",
    "template1",
    "tenantdb_tpl",
    "t_0123456789abcde",
    "t_0123456789abcdef0",
    "T_0123456789ABCDEF",
    "t_0123456789abcdef\n",
    "t_0123456789abcdef\0",
    "t_0123456789abcdef\0evil",
    't_0123456789abcdef"; DROP ROLE x; --',
    "t_\N{FULLWIDTH DIGIT ZERO}123456789abcdef",
    "t_\N{ARABIC-INDIC DIGIT ZERO}123456789abcdef",
    f"t_{'a' * 70}",
    None,
]


@pytest.mark.parametrize("bad", BAD_NAMES, ids=repr)
def test_a_name_that_we_did_not_draw_reaches_no_ddl_at_all(world: World, monkeypatch: pytest.MonkeyPatch, bad: str | None) -> None:
    """I6, I8: psycopg cuts an identifier at NUL without a word; so each name is looked at once more, right before each statement."""
    sent: list[str] = []
    monkeypatch.setattr(workshops, "_run", lambda connection, *statements: sent.extend(s.as_string(connection) for s in statements))
    good = {"database": "t_0123456789abcdef", "owner_role": "t_1123456789abcdef", "runtime_role": "t_2123456789abcdef"}
    password = ConnectionURL.parse(world.cluster.provisioner_url()).password
    assert password is not None

    with world.registry() as db, db._runner.shop.workshop(db.servers.get("default")) as workshop:

        def tenant(**names: str | None) -> Tenant:
            return Tenant(id=uuid.uuid4(), slug="x", name="", state=TenantState.ACTIVE, **{**good, **names})  # type: ignore[arg-type]

        database, owner, runtime = (tenant(**{which: bad}) for which in good)
        both = tenant(owner_role=bad, runtime_role=bad)
        monkeypatch.setattr(workshop, "find_roles", list)
        monkeypatch.setattr(workshop, "find_database", lambda name: True)
        verbs: list[tuple[Callable[[Tenant], object], tuple[Tenant, ...]]] = [
            (lambda t: workshop.create_database(t, None), (database,)),
            (lambda t: workshop.create_roles(t, password, password), (owner, runtime)),
            (lambda t: workshop.set_passwords(t, password, password), (owner, runtime)),
            (workshop.open_database, (database, owner, runtime)),
            (lambda t: workshop.fence(t, FenceLevel.CLOSED), (database, owner, runtime)),
            (workshop.drop_database, (database,)),
            (workshop.drop_roles, (both,)),
        ]
        for verb, tenants in verbs:
            for each in tenants:
                with pytest.raises(errors.HardeningFailed, match="not drawn by tenantdb"):
                    verb(each)
        assert sent == []
        for verb, _ in verbs:
            verb(tenant())
        assert len(sent) >= len(verbs)  # with names that we drew, all of them speak


HOSTILE = st.one_of(
    st.text(max_size=60),
    st.sampled_from(
        [
            f"{CUSTOMER}'; DROP ROLE {PROVISIONER}; --",
            f'{CUSTOMER}"; DROP DATABASE postgres; --',
            f"{CUSTOMER}$$; ALTER ROLE x SUPERUSER; $$",
            f"{CUSTOMER}\\'; SELECT pg_sleep(10); --",
            f"{CUSTOMER}%s %(x)s {{}} %%",
            f"{CUSTOMER}\r\nERROR:  forged line\x1b[31m",
            "\N{RIGHT-TO-LEFT OVERRIDE}emca",
            "all",
            "a" * 500,
            "host=evil dbname=postgres",
            "x?host=evil",
        ]
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(slug_=st.one_of(HOSTILE, st.from_regex("[a-z][a-z0-9-]{1,38}[a-z0-9]", fullmatch=True)), name=HOSTILE, email=HOSTILE, plan=HOSTILE)
def test_whatever_is_typed_in_is_kept_as_it_is_or_refused_by_name(fuzzed: TenantDB, slug_: str, name: str, email: str, plan: str) -> None:
    """I5 through Python: a sign-up that a worker would carry out."""
    try:
        made = fuzzed.provision(slug_, name=name, email=email, plan=plan, metadata={"who": name})
    except (errors.TenantDBError, ValueError) as error:  # of the slug; of another field, by its name
        assert str(error).isprintable() and len(str(error)) < 400
        return
    found = fuzzed.tenants.get(made.id)
    assert (found.slug, found.name, found.email, found.plan, dict(found.metadata)) == (slug_, name or slug_, email, plan, {"who": name})


@pytest.fixture(scope="module")
def fuzzed(world: World) -> Iterator[TenantDB]:
    """A web process. At the end a worker makes tenants of some of what was typed in, and the server's log is read."""
    registry = world.cluster.new_registry()
    with world.tenantdb(registry, admin=False, provisioner=False) as web:
        yield web


def test_what_is_typed_in_is_in_no_ddl(world: World) -> None:
    """I5: to the end, with a worker; and through the command line."""
    names = [f"{CUSTOMER}'; DROP ROLE {PROVISIONER}; --", f'{CUSTOMER}" OWNER postgres', f"{CUSTOMER}$$ $a$ \\", f"{CUSTOMER} %s {{}}"]
    registry = world.cluster.new_registry()
    before_log = len(world.log())
    with world.tenantdb(registry, admin=False, provisioner=False) as web:
        web_made = [
            web.provision(f"{CUSTOMER}-{n}", name=each, plan=each, metadata={each: each}, idempotency_key=each, owner=owner_of(f"o{n}"))
            for n, each in enumerate(names)
        ]
    env = {f"TENANTDB_{name.upper()}": value for name, value in world.cluster.tenantdb_arguments(registry).items()}
    env |= {"TENANTDB_SECRET_KEYS": KEY, "TENANTDB_MIGRATIONS": str(world.scripts)}
    with pytest.MonkeyPatch.context() as patched:
        for key, value in env.items():
            patched.setenv(key, value)
        typed = CliRunner().invoke(cli, ["provision", f"{CUSTOMER}-cli", "--name", names[0], "--plan", names[1]], prog_name="tenantdb")
    assert typed.exit_code == 0, typed.output
    with world.tenantdb(registry) as db:
        assert db.work() == len(names)
        for made, name in zip(web_made, names, strict=True):
            write(db, made, name)
            db.rotate_credentials(made)
            assert (db.tenants.get(made.id).name, lines(db, made)) == (name, [name])

    ddl = [line for line in world.log()[before_log:].splitlines() if re.search(r"LOG:  statement: ", line)]
    assert len([line for line in ddl if "CREATE DATABASE" in line]) >= len(names) + 1
    assert [line for line in ddl if CUSTOMER in line] == []


# -- K14 -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "database", ["x?host=evil.example", "host=evil.example dbname=postgres", "postgresql://evil.example/x", "q\"uo'te %2f"]
)
def test_a_database_with_a_name_that_reads_like_an_address_is_that_database(world: World, database: str) -> None:
    role, password = f"odd_{uuid.uuid4().hex[:6]}", "p@ss:w/o?r#d %&=' \\"
    with world.cluster.server_session() as superuser:
        superuser.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(role), sql.Literal(password)))
        superuser.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(database), sql.Identifier(role)))
    url = URL.create("postgresql", role, password, "127.0.0.1", world.cluster.server.port, database)

    with TenantDB(url, secret_keys=[KEY], allowed_hosts=["127.0.0.1"]) as db:
        db.init()
        assert db.tenants.list() == []
        with db._registry.admin_write() as connection:
            assert connection.scalar(text("SELECT current_database()")) == database
            assert connection.scalar(text("SELECT current_user")) == role
        assert password not in repr(db) + repr(db.settings)


# -- N: many -----------------------------------------------------------------------------------------------------------------------------


def test_a_flood_of_unknown_tenants_takes_no_more_of_the_registry_than_its_pool_and_no_memory(world: World) -> None:
    """N3."""
    registry = world.cluster.new_registry()
    with world.tenantdb(registry, admin=False, provisioner=False, cache_size=50, registry_pool_size=3) as web:
        with world.tenantdb(registry) as db:
            db.provision("known")
        assert lines(web, "known") == []
        peak = 0

        def ask(number: int) -> None:
            with pytest.raises(errors.TenantNotFound):
                lines(web, uuid.uuid4() if number % 2 else f"unknown-{number}")

        def watch(stop: threading.Event) -> None:
            nonlocal peak
            count = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND usename = 'registry_app'"
            with world.cluster.server_session() as eye:
                while not stop.wait(0.005):
                    row = eye.execute(count, [registry]).fetchone()
                    peak = max(peak, row[0] if row else 0)

        stop = threading.Event()
        with ThreadPoolExecutor(17) as threads:
            watching = threads.submit(watch, stop)
            list(threads.map(ask, range(2_000)))
            stop.set()
            watching.result(30)

        cache = web._registry._cache
        assert 1 <= peak <= 3
        assert len(cache._missing) <= 50 and len(cache._records) == 1 and not cache._flights._flights
        assert [stats.held for stats in web.stats()] == [1]
        assert lines(web, "known") == []


def test_a_budget_that_the_server_does_not_have_is_told_at_the_start_or_refused(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """N7; its sums are in test_check_budget.py."""
    too_much = Budget(connections=5_000, processes=1)
    with world.registry(budget=too_much) as db:
        db.provision("one")
        assert any("max_connections" in finding.text for finding in db.check())
