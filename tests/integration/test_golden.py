"""Golden databases: built once per server and head, cloned for everybody, and never a way from one tenant to another."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from tenantdb import Tenant, TenantDB
from tenantdb.backends.postgresql.workshop import PostgreSQLWorkshop
from tenantdb.errors import ProvisioningError
from tenantdb.migrations.scripts import Scripts as Migrations
from tenantdb.model import DatabaseRole, Template, TemplateState
from tests.integration.cluster import Cluster, Scripts, login
from tests.procedures import meanwhile

OpenDB = Callable[..., TenantDB]
_FUNCTION = "CREATE FUNCTION {}() RETURNS int LANGUAGE sql AS 'SELECT 42'"


def templates(db: TenantDB) -> list[Template]:
    return db._registry.templates.list()


def on_the_server(cluster: Cluster, made: list[Template]) -> set[str]:
    """Databases and roles of golden ones that are there."""
    names = {str(name) for template in made for name in (template.database, template.owner_role)}
    return names & (cluster.databases() | cluster.roles())


def count_upgrades(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    upgrades: list[object] = []
    upgrade = Migrations.upgrade

    def counted(self: Migrations, engine: Any, *arguments: Any, **named: Any) -> Any:
        upgrades.append("".join(traceback.format_stack(limit=8)))
        return upgrade(self, engine, *arguments, **named)

    monkeypatch.setattr(Migrations, "upgrade", counted)
    return upgrades


def test_of_eight_who_provision_at_once_in_two_processes_one_builds_it(
    open_db: OpenDB, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrades = count_upgrades(monkeypatch)
    processes = [open_db(), open_db()]
    together = threading.Barrier(8)

    def provision(number: int) -> Tenant:
        together.wait(30)
        return processes[number % 2].provision(f"acme-{number}")

    with ThreadPoolExecutor(8) as threads:
        tenants = list(threads.map(provision, range(8)))

    assert {tenant.revision for tenant in tenants} == {"001"}
    assert len({tenant.database for tenant in tenants}) == 8
    [golden] = templates(processes[0])
    assert len(upgrades) == 1
    assert (golden.revision, golden.state) == ("001", TemplateState.CURRENT)
    assert on_the_server(cluster, [golden]) == {golden.database, golden.owner_role}
    assert processes[0].provision("one-more").revision == "001" and len(upgrades) == 1


def test_a_new_head_builds_a_new_one_and_keeps_the_one_before_it(open_db: OpenDB, cluster: Cluster, scripts: Scripts) -> None:
    db, all_made = open_db(), []
    for revision in ("001", "002", "003"):
        if revision != "001":
            scripts.add(revision, f"CREATE TABLE of_{revision} (id int)")
        assert db.provision(f"at-{revision}").revision == revision
        all_made += [template for template in templates(db) if template.database not in {each.database for each in all_made}]

    assert [template.revision for template in all_made] == ["001", "002", "003"]
    assert [template.revision for template in templates(db)] == ["003", "002"]
    assert on_the_server(cluster, all_made[:1]) == set()
    assert len(on_the_server(cluster, all_made[1:])) == 4


def test_old_and_new_code_in_a_rolling_deploy_each_clone_their_own(
    open_db: OpenDB, scripts: Scripts, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = Scripts(tmp_path_factory.mktemp("newer") / "migrations")
    newer.add("001", "CREATE TABLE notes (id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY, line text NOT NULL UNIQUE)")
    newer.add("002", "CREATE TABLE rooms (id int)")
    old, new = open_db(), open_db(migrations=str(newer))
    upgrades = count_upgrades(monkeypatch)
    for number in range(3):
        assert old.provision(f"old-{number}").revision == "001"
        assert new.provision(f"new-{number}").revision == "002"
    assert len(upgrades) == 2


def test_a_migration_that_is_edited_without_a_new_revision_is_built_anew(open_db: OpenDB, scripts: Scripts, cluster: Cluster) -> None:
    db = open_db()
    db.provision("before")
    [first] = templates(db)

    scripts.write("001", None, "CREATE TABLE notes (id int)", "CREATE TABLE forgotten (id int)")
    after = db.provision("after")

    second, kept = templates(db)
    assert kept.database == first.database and second.digest != first.digest and second.revision == first.revision
    assert cluster.sql("SELECT count(*) FROM forgotten", database=str(after.database)) == [(0,)]


def test_one_that_cannot_be_built_leaves_nothing_and_the_next_who_comes_builds_it(
    open_db: OpenDB, scripts: Scripts, cluster: Cluster
) -> None:
    db = open_db()
    before_us = (cluster.databases(), cluster.roles())
    scripts.write("001", None, "CREATE TABLE notes (id int)", "INSERT INTO missing VALUES (1)")
    with pytest.raises(ProvisioningError, match="UndefinedTable"):
        db.provision("acme")
    assert (templates(db), cluster.databases(), cluster.roles()) == ([], *before_us)

    scripts.write("001", None, "CREATE TABLE notes (id int)")
    assert db.provision("acme").servable


def test_a_builder_that_died_is_replaced_when_its_lease_has_ended_and_its_ruin_is_dropped(
    open_db: OpenDB, cluster: Cluster, registry: str
) -> None:
    class Died(BaseException):
        """As a kill would: nothing is tidied up."""

    def die(*_: Any) -> None:
        raise Died

    dying, db = open_db(), open_db()
    golden = dying._runner.shop.golden
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Died):
        patched.setattr(type(golden), "_abandon", lambda *_: None)
        with meanwhile(PostgreSQLWorkshop, "close_template", die):
            dying.provision("acme")
    [ruin] = templates(db)
    assert ruin.state is TemplateState.BUILDING

    cluster.sql("UPDATE tenantdb_templates SET lease_until = now() - interval '1 second'", database=registry)
    assert db.provision("beta").servable

    assert [template.state for template in templates(db)] == [TemplateState.CURRENT]
    assert on_the_server(cluster, [ruin]) == set()


# -- what a clone is ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cloned(open_db: OpenDB, scripts: Scripts) -> tuple[TenantDB, Tenant]:
    scripts.add(
        "002",
        "CREATE TYPE mood AS ENUM ('good', 'bad')",
        "CREATE TABLE visits (id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY, mood mood)",
        "CREATE VIEW good_visits AS SELECT * FROM visits WHERE mood = 'good'",
        "CREATE SEQUENCE numbers",
        _FUNCTION.format("answer"),
    )
    db = open_db()
    return db, db.provision("acme")


def test_what_the_golden_database_brings_the_runtime_role_may_use_and_not_change(cloned: tuple[TenantDB, Tenant], cluster: Cluster) -> None:
    db, acme = cloned
    runtime, owner = (login(cluster, db, acme, role) for role in (DatabaseRole.RUNTIME, DatabaseRole.OWNER))
    assert runtime.ask("INSERT INTO notes (line) VALUES ('x') RETURNING id") == [(1,)]
    assert runtime.ask("INSERT INTO visits (mood) VALUES ('good') RETURNING id") == [(1,)]
    assert runtime.ask("SELECT id FROM good_visits") == [(1,)]
    assert runtime.ask("SELECT nextval('numbers'), answer()") == [(1, 42)]
    for statement in (
        "ALTER TABLE notes ADD x int",
        "DROP TABLE visits",
        "CREATE TABLE mine (id int)",
        "DROP FUNCTION answer()",
        "TRUNCATE notes",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            runtime.ask(statement)
    owner.ask("ALTER TABLE notes ADD x int")  # the twin
    owner.ask("DROP FUNCTION answer()")


def test_what_a_later_migration_makes_in_a_clone_the_runtime_role_may_use_and_public_not(
    cloned: tuple[TenantDB, Tenant], cluster: Cluster, scripts: Scripts
) -> None:
    db, acme = cloned
    scripts.add("003", "CREATE TABLE rooms (id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY)", _FUNCTION.format("later"))
    assert db.migrations.upgrade(acme).revision == "003"

    runtime = login(cluster, db, acme, DatabaseRole.RUNTIME)
    assert runtime.ask("INSERT INTO rooms DEFAULT VALUES RETURNING id") == [(1,)]
    assert runtime.ask("SELECT later()") == [(42,)]
    public = "SELECT proname FROM pg_proc WHERE proname IN ('answer', 'later') AND has_function_privilege('public', oid, 'EXECUTE')"
    assert cluster.sql(public, database=str(acme.database)) == []
    for table in ("notes", "visits", "rooms"):
        assert cluster.sql(f"SELECT has_table_privilege('public', '{table}', 'SELECT')", database=str(acme.database)) == [(False,)]


def test_nothing_in_a_clone_refers_to_the_role_that_made_its_golden_database(cloned: tuple[TenantDB, Tenant], cluster: Cluster) -> None:
    db, acme = cloned
    [golden] = templates(db)
    depends = """
        SELECT count(*) FROM pg_shdepend d JOIN pg_database b ON b.oid = d.dbid JOIN pg_roles r ON r.oid = d.refobjid
        WHERE d.refclassid = 'pg_authid'::regclass AND b.datname = %s AND r.rolname = %s
    """
    assert cluster.sql(depends, [acme.database, golden.owner_role]) == [(0,)]
    assert cluster.sql(depends, [golden.database, golden.owner_role])[0][0] > 0  # the twin: there it shows
    assert cluster.sql(depends, [acme.database, acme.owner_role])[0][0] > 0
    owners = "SELECT DISTINCT pg_get_userbyid(relowner) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    assert cluster.sql(owners, database=str(acme.database)) == [(acme.owner_role,)]
    defaults = "SELECT DISTINCT pg_get_userbyid(defaclrole) FROM pg_default_acl"
    assert cluster.sql(defaults, database=str(acme.database)) == [(acme.owner_role,)]


def test_nobody_enters_a_golden_database_and_its_role_never_logs_in(cloned: tuple[TenantDB, Tenant], cluster: Cluster) -> None:
    db, acme = cloned
    [golden] = templates(db)
    assert cluster.sql("SELECT rolcanlogin, rolpassword FROM pg_authid WHERE rolname = %s", [golden.owner_role]) == [(False, None)]
    assert cluster.sql("SELECT datallowconn FROM pg_database WHERE datname = %s", [golden.database]) == [(False,)]
    for role in DatabaseRole:
        with pytest.raises(psycopg.OperationalError):
            login(cluster, db, acme, role).ask("SELECT 1", database=golden.database)
    with pytest.raises(psycopg.OperationalError, match="not currently accepting connections"):
        cluster.sql("SELECT 1", database=golden.database)


def test_a_clone_carries_the_stamp_of_its_own_tenant_alone(cloned: tuple[TenantDB, Tenant], cluster: Cluster) -> None:
    db, acme = cloned
    beta = db.provision("beta")
    for tenant in (acme, beta):
        assert cluster.sql("SELECT tenant_id FROM tenantdb.identity", database=str(tenant.database)) == [(tenant.id,)]
    login(cluster, db, acme, DatabaseRole.RUNTIME).ask("INSERT INTO notes (line) VALUES ('of acme')")
    assert login(cluster, db, beta, DatabaseRole.RUNTIME).ask("SELECT count(*) FROM notes") == [(0,)]
