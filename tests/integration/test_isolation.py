"""What a tenant's own passwords open, and what they do not.

The attacker holds the database password of one tenant, the runtime role's or the owner role's, and talks to the server without the library.
Every wall is tried on a bootstrapped server under both hardening profiles, and on the distribution's older PostgreSQL.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import psycopg
import pytest
from sqlalchemy import text

from tenantdb import Budget, Tenant, TenantDB
from tenantdb.model import DatabaseRole
from tests.integration.cluster import PROVISIONER, PROVISIONER_PASSWORD, Cluster, Login, Scripts, ask, login

OWNER, RUNTIME = DatabaseRole.OWNER, DatabaseRole.RUNTIME
both_roles = pytest.mark.parametrize("role", [RUNTIME, OWNER], ids=str)


@dataclass(frozen=True)
class World:
    """Two tenants, each with notes; the attacker has the passwords of ``ours``."""

    cluster: Cluster
    db: TenantDB
    registry: str
    scripts: Scripts
    ours: Tenant
    theirs: Tenant

    @property
    def full(self) -> bool:
        return self.db.settings.hardening == "full"

    def attacker(self, role: DatabaseRole) -> Login:
        return login(self.cluster, self.db, self.ours, role)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("cluster", "full"), id="full"),
        pytest.param(("cluster", "managed"), id="managed"),
        pytest.param(("debian_cluster", "full"), id="full-distribution", marks=pytest.mark.services),
    ],
)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    kind, hardening = request.param
    cluster: Cluster = request.getfixturevalue(kind)
    scripts = Scripts(tmp_path_factory.mktemp("isolation") / "migrations")
    scripts.add(
        "001",
        "CREATE TABLE notes (id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY, line text NOT NULL UNIQUE)",
        "CREATE FUNCTION loud(line text) RETURNS text LANGUAGE sql AS 'SELECT upper(line)'",
    )
    registry = cluster.new_registry()
    with cluster.tenantdb(registry, migrations=str(scripts), hardening=hardening) as db:
        server = db.servers.get("default")
        db.servers.add("default", backend="postgresql", host=server.host, port=server.port, schemas=["billing"])
        ours, theirs = (db.provision(slug, name=f"The {slug} clinic", email=f"{slug}@example.org") for slug in ("acme", "globex"))
        for tenant in (ours, theirs):
            with db.begin(tenant) as session:
                session.execute(text("INSERT INTO notes (line) VALUES (:line)"), {"line": tenant.slug})
        yield World(cluster, db, registry, scripts, ours, theirs)


# -- other databases -------------------------------------------------------------------------------------------------------------------


@both_roles
@pytest.mark.parametrize("target", ["another tenant's", "postgres", "template1", "template0", "tenantdb_tpl", "the registry's"])
def test_a_tenants_password_enters_no_database_but_its_own(world: World, role: DatabaseRole, target: str) -> None:
    database = {"another tenant's": world.theirs.database, "the registry's": world.registry}.get(target, target)
    attacker = world.attacker(role)

    with pytest.raises(psycopg.OperationalError, match=r"permission denied for database|not currently accepting connections"):
        attacker.ask("SELECT 1", database=database)

    assert attacker.ask("SELECT line FROM notes") == [("acme",)]


def test_without_the_wall_that_password_would_enter(world: World) -> None:
    world.cluster.sql(f"GRANT CONNECT ON DATABASE {world.theirs.database} TO PUBLIC")
    try:
        assert world.attacker(RUNTIME).ask("SELECT current_database()", database=world.theirs.database) == [(world.theirs.database,)]
    finally:
        world.cluster.sql(f"REVOKE CONNECT ON DATABASE {world.theirs.database} FROM PUBLIC")


def test_the_databases_have_an_access_list_in_which_public_is_not(world: World) -> None:
    lists = world.cluster.sql(
        "SELECT datacl::text[] FROM pg_database WHERE datname = ANY(%s)", [[world.ours.database, world.theirs.database]]
    )

    assert len(lists) == 2
    for (entries,) in lists:
        assert entries is not None
        assert {entry.split("=")[0] for entry in entries}.isdisjoint({""})
        assert len(entries) == 3  # provisioner, owner role, runtime role


# -- inside its own database -----------------------------------------------------------------------------------------------------------

REFUSED_TO_THE_RUNTIME_ROLE = [
    "CREATE TABLE mine (id int)",
    "CREATE TABLE billing.mine (id int)",
    "CREATE TEMPORARY TABLE mine (id int)",
    "CREATE VIEW mine AS SELECT 1",
    "CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE FUNCTION tenantdb.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE SCHEMA mine",
    "CREATE EXTENSION hstore",
    "TRUNCATE notes",
    "ALTER TABLE notes ADD COLUMN mine int",
    "DROP TABLE notes",
    "CREATE INDEX ON notes (line)",
    "DROP SCHEMA public CASCADE",
    "CREATE TRIGGER mine BEFORE INSERT ON notes EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    "ALTER TABLE notes DISABLE TRIGGER ALL",
    "SET ROLE {owner}",
    "SET temp_file_limit = -1",
    "COMMENT ON TABLE notes IS 'mine'",
]
REFUSED_TO_THE_OWNER_ROLE = [
    "CREATE SCHEMA mine",
    "CREATE TABLE tenantdb.mine (id int)",
    "CREATE EXTENSION hstore",
    "CREATE TEMPORARY TABLE mine (id int)",
    "SET ROLE {runtime}",
]
REFUSED_TO_BOTH = [
    "SET ROLE {provisioner}",
    "SET ROLE {their_owner}",
    "SET SESSION AUTHORIZATION {their_owner}",
    "ALTER ROLE {their_owner} PASSWORD 'x'",
    "ALTER ROLE CURRENT_USER CREATEDB",
    "ALTER ROLE CURRENT_USER CONNECTION LIMIT 1000",
    "GRANT {their_owner} TO {runtime}",
    "GRANT pg_read_all_data TO {runtime}",
    "CREATE ROLE mine",
    "CREATE DATABASE mine",
    "ALTER DATABASE {database} RENAME TO mine",
    "ALTER DATABASE {database} CONNECTION LIMIT -1",
    "ALTER DATABASE {database} SET search_path = 'mine'",
    "COMMENT ON DATABASE {database} IS 'mine'",
    "DROP DATABASE {database}",
    "DROP DATABASE {their_database}",
    "ALTER SCHEMA tenantdb RENAME TO mine",
    "UPDATE tenantdb.identity SET tenant_id = gen_random_uuid()",
    "DELETE FROM tenantdb.identity",
    "CREATE EVENT TRIGGER mine ON ddl_command_start EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    "CREATE SUBSCRIPTION mine CONNECTION 'host=127.0.0.1' PUBLICATION mine WITH (connect = false)",
    "CREATE EXTENSION dblink",
    "CREATE EXTENSION postgres_fdw",
    "CREATE EXTENSION file_fdw",
    "CREATE FOREIGN DATA WRAPPER mine",
    "COPY (SELECT 1) TO PROGRAM 'true'",
    "COPY notes (line) FROM PROGRAM 'hostname'",
    "COPY notes (line) FROM '/etc/hostname'",
    "SELECT pg_read_file('/etc/hostname')",
    "SELECT pg_ls_dir('.')",
    "SELECT lo_import('/etc/hostname')",
    "SELECT lo_export(1, '/etc/hostname')",
    "SELECT rolpassword FROM pg_authid",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'postgres'",
    "SELECT pg_database_size('{their_database}')",
    "ALTER SYSTEM SET log_statement = 'none'",
]


def attack(world: World, role: DatabaseRole, statement: str) -> list[tuple[object, ...]]:
    names = {
        "owner": world.ours.owner_role,
        "runtime": world.ours.runtime_role,
        "their_owner": world.theirs.owner_role,
        "provisioner": PROVISIONER,
        "database": world.ours.database,
        "their_database": world.theirs.database,
    }
    return world.attacker(role).ask(statement.format(**names))


@pytest.mark.parametrize("role", [RUNTIME, OWNER], ids=str)
def test_neither_password_changes_roles_databases_or_the_stamp_or_reaches_files_and_servers(world: World, role: DatabaseRole) -> None:
    more = REFUSED_TO_THE_RUNTIME_ROLE if role is RUNTIME else REFUSED_TO_THE_OWNER_ROLE
    with world.cluster.server_session():  # somebody whose session the attacker would end
        for statement in [*REFUSED_TO_BOTH, *more]:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                attack(world, role, statement)
                pytest.fail(f"the {role} role may: {statement}")


@both_roles
@pytest.mark.parametrize(
    "statement",
    [
        "GRANT CONNECT ON DATABASE {database} TO PUBLIC",
        "GRANT USAGE ON SCHEMA tenantdb TO PUBLIC",
        "GRANT SELECT ON tenantdb.identity TO PUBLIC",
    ],
)
def test_a_grant_of_what_is_not_theirs_changes_nothing(world: World, role: DatabaseRole, statement: str) -> None:
    access = "SELECT datacl::text, nspacl::text, relacl::text FROM pg_database, pg_namespace, pg_class"
    access += " WHERE datname = current_database() AND nspname = 'tenantdb' AND relname = 'identity'"
    before = world.cluster.sql(access, database=str(world.ours.database))

    attack(world, role, statement)  # the server only warns

    assert world.cluster.sql(access, database=str(world.ours.database)) == before


def test_the_roles_may_do_their_own_work(world: World) -> None:
    owner, runtime = world.attacker(OWNER), world.attacker(RUNTIME)

    assert runtime.ask("INSERT INTO notes (line) VALUES ('second') RETURNING loud(line)") == [("SECOND",)]
    assert runtime.ask("UPDATE notes SET line = 'third' WHERE line = 'second' RETURNING 1") == [(1,)]
    assert runtime.ask("DELETE FROM notes WHERE line = 'third' RETURNING 1") == [(1,)]
    owner.ask("CREATE TABLE made (id int); DROP TABLE made")
    owner.ask("CREATE TABLE billing.made (id int); DROP TABLE billing.made")
    owner.ask("DO $$ BEGIN PERFORM 1; END $$")


DOORS = {  # what a superuser must close; the word by which the findings of `managed` name it
    "SELECT pg_advisory_lock(1)": "D11",
    "SELECT pg_try_advisory_xact_lock(1)": "D11",
    "SELECT lo_from_bytea(0, 'x')": "D10",
    "SELECT lo_create(0)": "D10",
    "DO $$ BEGIN RAISE LOG 'forged'; END $$": "PL/pgSQL",
}


def test_what_only_a_superuser_can_close_is_closed_or_named(world: World) -> None:
    runtime, named = world.attacker(RUNTIME), " ".join(finding.text for finding in world.db.check())
    for statement, name in DOORS.items():
        if world.full:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                runtime.ask(statement)
            assert name not in named
        else:
            runtime.ask(statement)
            assert name in named

    with_limit = world.cluster.sql(
        "SELECT count(*) FROM pg_db_role_setting s JOIN pg_roles r ON r.oid = s.setrole"
        " WHERE rolname = %s AND 'temp_file_limit=1GB' = ANY(setconfig)",
        [world.ours.runtime_role],
    )
    assert (with_limit == [(1,)]) == world.full == ("D13" not in named)


def test_a_later_migration_is_readable_and_executable_by_the_runtime_role_only(world: World) -> None:
    revision = f"later{world.db.settings.hardening}"
    world.scripts.add(
        revision,
        "CREATE TABLE later (id serial PRIMARY KEY, at timestamptz)",
        "CREATE TABLE billing.later (id serial PRIMARY KEY)",
        "CREATE TYPE mood AS ENUM ('good', 'bad')",
        "CREATE FUNCTION later_count() RETURNS bigint LANGUAGE sql AS 'SELECT count(*) FROM later'",
        "CREATE FUNCTION billing.answer() RETURNS int LANGUAGE sql AS 'SELECT 42'",
        "CREATE PROCEDURE later_nothing() LANGUAGE sql AS 'SELECT 1'",
    )
    world.db.migrations.upgrade(world.ours)
    runtime = world.attacker(RUNTIME)

    assert runtime.ask("INSERT INTO later DEFAULT VALUES RETURNING id, later_count()")[0][0] == 1
    assert runtime.ask("INSERT INTO billing.later DEFAULT VALUES RETURNING id, billing.answer()") == [(1, 42)]
    assert runtime.ask("SELECT 'good'::mood::text") == [("good",)]
    functions = world.cluster.sql(
        "SELECT proname, has_function_privilege('public', oid, 'EXECUTE') FROM pg_proc"
        " WHERE pronamespace IN ('public'::regnamespace, 'billing'::regnamespace)",
        database=str(world.ours.database),
    )
    assert {name for name, _ in functions} == {"loud", "later_count", "answer", "later_nothing"}
    assert not any(public for _, public in functions)


# -- limits and leaks ------------------------------------------------------------------------------------------------------------------


def test_a_tenant_that_changes_its_own_settings_does_not_change_the_applications_sessions(world: World) -> None:
    runtime = world.attacker(RUNTIME)
    shown = "SELECT current_setting('statement_timeout'), current_setting('default_transaction_read_only'), current_setting('search_path')"
    for setting in ("statement_timeout = 0", "search_path = pg_catalog", "lock_timeout = 0", "default_transaction_read_only = on"):
        runtime.ask(f"ALTER ROLE CURRENT_USER SET {setting}")
    try:
        assert runtime.ask(shown) == [("0", "on", "pg_catalog")]  # what everybody else would get
        with world.cluster.tenantdb(world.registry) as fresh, fresh.session("acme") as session:
            assert session.execute(text(shown)).all() == [("30s", "off", "public")]
            assert session.execute(text("SELECT current_setting('lock_timeout')")).scalar() == "5s"
    finally:
        for setting in ("statement_timeout", "search_path", "lock_timeout", "default_transaction_read_only"):
            world.cluster.sql(f"ALTER ROLE {world.ours.runtime_role} RESET {setting}")


def test_a_tenant_that_takes_all_its_connections_takes_none_of_the_others(world: World) -> None:
    narrow = {"hardening": world.db.settings.hardening, "migrations": str(world.scripts)}
    with world.cluster.tenantdb(world.registry, budget=Budget(per_tenant=1, processes=1), **narrow) as db, ExitStack() as held:
        flood = login(world.cluster, db, db.provision("floods"), RUNTIME)
        url = world.cluster.server.url(flood.name, flood.password, flood.database)
        with pytest.raises(psycopg.OperationalError, match="too many connections for role"):
            for _ in range(20):
                held.enter_context(psycopg.connect(url))

        assert world.attacker(RUNTIME).ask("SELECT 1") == [(1,)]
        assert db.migrations.upgrade("floods").slug == "floods"  # the owner role's limit is its own
        world.cluster.sql(f"ALTER ROLE {flood.name} CONNECTION LIMIT 44")  # `check` warns of a limit that is narrower than the budget


def test_nothing_that_every_role_can_see_names_a_tenant(world: World) -> None:
    with world.db.session("acme") as session, world.db.session("globex") as other:
        other.execute(text("SELECT 1"))
        seen = [
            str(row)
            for query in (
                "SELECT usename, datname, application_name FROM pg_stat_activity",
                "SELECT datname FROM pg_database",
                "SELECT rolname, rolconfig FROM pg_roles",
                "SELECT description FROM pg_shdescription",
                "SELECT setconfig FROM pg_db_role_setting",
            )
            for row in session.execute(text(query))
        ]

    assert any(str(world.theirs.runtime_role) in line and "tenantdb/" in line for line in seen)
    assert [line for line in seen if re.search("acme|globex|example.org|clinic", line)] == []


def test_passwords_reach_the_server_as_verifiers_only(world: World) -> None:
    log = world.cluster.server.log.read_text(errors="replace")
    passwords = [
        login(world.cluster, world.db, tenant, role).password for tenant in (world.ours, world.theirs) for role in (RUNTIME, OWNER)
    ]

    assert f'CREATE ROLE "{world.ours.owner_role}"' in log and "PASSWORD 'SCRAM-SHA-256$4096:" in log
    assert [password for password in [*passwords, PROVISIONER_PASSWORD] if password in log] == []


def test_what_somebody_leaves_in_template1_neither_stops_nor_reaches_new_tenants(world: World) -> None:
    ((planted,),) = world.cluster.sql("SELECT lo_create(0)", database="template1")
    try:
        with psycopg.connect(world.cluster.server.url(database="template1")) as idle:
            assert idle.execute("SELECT 1").fetchall() == [(1,)]
            tenant = world.db.provision("initech")
    finally:
        world.cluster.sql("SELECT lo_unlink(%s)", [planted], database="template1")

    assert world.cluster.sql("SELECT count(*) FROM pg_largeobject_metadata", database=str(tenant.database)) == [(0,)]


# -- the provisioner -------------------------------------------------------------------------------------------------------------------


def test_the_provisioner_is_no_superuser_and_owns_what_it_made(world: World) -> None:
    ((attributes, owned),) = world.cluster.sql(
        "SELECT ARRAY[rolsuper, rolreplication, rolbypassrls],"
        " (SELECT count(*) FROM pg_database WHERE datdba = r.oid AND datname = ANY(%s)) FROM pg_roles r WHERE rolname = %s",
        [[world.ours.database, world.theirs.database], PROVISIONER],
    )

    assert attributes == [False, False, False]
    assert owned == 2


def test_the_provisioner_cannot_make_itself_more(world: World) -> None:
    url = world.cluster.provisioner_url()
    statements = [
        "ALTER ROLE CURRENT_USER SUPERUSER",
        "CREATE ROLE mine SUPERUSER",
        "ALTER ROLE postgres PASSWORD 'x'",
        "COPY (SELECT 1) TO PROGRAM 'true'",
        "SELECT rolpassword FROM pg_authid",
    ]
    if world.cluster.version >= 160000:
        statements += [
            "GRANT pg_execute_server_program TO CURRENT_USER",
            "ALTER ROLE registry_admin PASSWORD 'x'",
            "DROP ROLE registry_app",
        ]
    else:  # what an older server allows a CREATEROLE role, `check` says
        assert any("guard the provisioner like a superuser" in finding.text for finding in world.db.check())

    for statement in statements:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            ask(url, statement)


def test_check_has_nothing_to_say_about_a_bootstrapped_server_under_full(world: World) -> None:
    texts = [finding.text for finding in world.db.check()]
    expected = [] if world.cluster.version >= 160000 else ["guard the provisioner"]

    if world.full:
        assert len(texts) == len(expected) and all(word in found for word, found in zip(expected, texts, strict=True))
    else:
        assert len(texts) == 3 and all(found.startswith("hardening='managed'") for found in texts)
