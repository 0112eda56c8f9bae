"""The doctor finds nothing where nothing is wrong, and each weakness that is planted; it mends the harmless ones and touches nothing else.

All of it on a bootstrapped server under both hardening profiles, and on the distribution's older PostgreSQL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from click.testing import CliRunner
from sqlalchemy import insert, text, update

from tenantdb import AsyncTenantDB, Budget, Tenant, TenantDB, TenantState
from tenantdb.backends.postgresql import doctor
from tenantdb.backends.postgresql.catalogue import NAME_PATTERN, Catalogue
from tenantdb.backends.postgresql.inspect import MANAGED_GAPS
from tenantdb.backends.weakness import Severity
from tenantdb.cli.group import cli
from tenantdb.errors import ConfigError, NoServerAvailable
from tenantdb.model import DatabaseRole
from tenantdb.provisioning.doctor import DoctorFinding
from tenantdb.registry import tables
from tenantdb.testing import EmbeddedServer
from tests.docs.reader import DOCS, ROOT
from tests.integration.cluster import APP, PROVISIONER, Cluster, Scripts, ask, login
from tests.servers import debian_bindir
from tests.world import sqlite_world

OWNER, RUNTIME = DatabaseRole.OWNER, DatabaseRole.RUNTIME
ELSEWHERE, INSIDE = "postgres", "{db}"

_STATE = {
    "postgres": [
        "SELECT d.datname, pg_get_userbyid(d.datdba), d.datallowconn, d.datconnlimit, d.datistemplate, array(SELECT a::text FROM"
        " aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a ORDER BY 1) FROM pg_database d ORDER BY 1",
        "SELECT rolname, rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolcanlogin, rolreplication, rolbypassrls, rolconnlimit"
        " FROM pg_roles ORDER BY 1",
        "SELECT roleid::regrole::text, member::regrole::text, grantor::regrole::text, (to_jsonb(m) - 'oid')::text FROM pg_auth_members m"
        " ORDER BY 1, 2, 3",
        "SELECT setdatabase, setrole, setconfig FROM pg_db_role_setting ORDER BY 1, 2",
    ],
    "inside": [
        "SELECT nspname, nspowner::regrole::text, array(SELECT a::text FROM aclexplode(coalesce(nspacl, acldefault('n', nspowner))) a"
        " ORDER BY 1) FROM pg_namespace WHERE nspname !~ '^pg_' ORDER BY 1",
        "SELECT c.oid::regclass::text, relkind, relowner::regrole::text, array(SELECT a::text FROM aclexplode(relacl) a ORDER BY 1)"
        " FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname IN ('public', 'tenantdb') ORDER BY 1",
        "SELECT p.oid::regprocedure::text, proowner::regrole::text, array(SELECT a::text FROM aclexplode(coalesce(proacl,"
        " acldefault('f', proowner))) a ORDER BY 1) FROM pg_proc p WHERE pronamespace = 'public'::regnamespace ORDER BY 1",
        "SELECT defaclrole::regrole::text, defaclnamespace::regnamespace::text, defaclobjtype, array(SELECT a::text FROM"
        " aclexplode(defaclacl) a ORDER BY 1) FROM pg_default_acl ORDER BY 1, 2, 3",
        "SELECT extname FROM pg_extension ORDER BY 1",
    ],
}


@dataclass(frozen=True)
class World:
    """Two tenants on a server of their own, because to a doctor another application's tenants are strangers."""

    cluster: Cluster
    db: TenantDB
    registry: str
    acme: Tenant
    globex: Tenant

    @property
    def full(self) -> bool:
        return self.db.settings.hardening == "full"

    @property
    def names(self) -> dict[str, str]:
        names = {"db": self.acme.database, "owner": self.acme.owner_role, "runtime": self.acme.runtime_role, "id": self.acme.id}
        names |= {"as_before": "WITH INHERIT TRUE, SET FALSE" if self.cluster.version >= 160000 else ""}
        names |= {"their_runtime": self.globex.runtime_role, "provisioner": PROVISIONER, "registry": self.registry}
        return {name: str(value) for name, value in names.items()}

    def sql(self, statement: str, database: str = ELSEWHERE) -> None:
        self.cluster.sql(statement.format(**self.names), database=database.format(**self.names))

    def doctor(self, *, repair: bool = False, **chosen: Any) -> list[DoctorFinding]:
        """Without what is always to be said here."""
        expected = {"provisioner-createrole"} if self.cluster.version < 160000 else set()
        expected |= set() if self.full else {"managed-gap"}
        return [finding for finding in self.db.doctor(repair=repair, **chosen) if finding.code not in expected]

    def state(self) -> list[Any]:
        """All that a repair could change, read from the catalogues; passwords apart, whose verifiers have a new salt each time."""
        found: list[Any] = [self.cluster.sql(query) for query in _STATE["postgres"]]
        for tenant in (self.acme, self.globex):
            enterable = "SELECT 1 FROM pg_database WHERE datname = %s AND datallowconn AND datconnlimit <> -2"
            if self.cluster.sql(enterable, [tenant.database]):
                found += [self.cluster.sql(query, database=str(tenant.database)) for query in _STATE["inside"]]
        return found

    def may_log_in(self, tenant: Tenant, role: DatabaseRole) -> bool:
        try:
            return login(self.cluster, self.db, tenant, role).ask("SELECT 1") == [(1,)]
        except psycopg.OperationalError:
            return False

    @contextmanager
    def changed(self, fault: str, undo: str, database: str = ELSEWHERE) -> Iterator[None]:
        self.sql(fault, database)
        try:
            yield
        finally:
            self.sql(undo, database)


@contextmanager
def a_world(folder: Path, *, bindir: Path | None = None, hardening: str = "full") -> Iterator[World]:
    scripts = Scripts(folder / "migrations")
    scripts.add(
        "001", "CREATE TABLE notes (line text)", "CREATE FUNCTION loud(line text) RETURNS text LANGUAGE sql AS 'SELECT upper(line)'"
    )
    with EmbeddedServer(bindir=bindir, fsync=False) as server:
        cluster = Cluster(server)
        cluster.prepare()
        registry = cluster.new_registry()
        with cluster.tenantdb(registry, migrations=str(scripts), hardening=hardening) as db:
            yield World(cluster, db, registry, db.provision("acme"), db.provision("globex"))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("wheel", "full"), id="full"),
        pytest.param(("wheel", "managed"), id="managed"),
        pytest.param(("distribution", "full"), id="full-distribution", marks=pytest.mark.services),
    ],
)
def installation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    which, hardening = request.param
    bindir = debian_bindir() if which == "distribution" else None
    with a_world(tmp_path_factory.mktemp("doctor"), bindir=bindir, hardening=hardening) as made:
        yield made


@pytest.fixture
def world(installation: World) -> Iterator[World]:
    """A test that leaves something behind fails itself, not the next one."""
    yield installation
    assert installation.doctor() == []


# -- nothing is wrong ------------------------------------------------------------------------------------------------------------------


def test_a_healthy_installation_has_no_findings_beyond_what_the_docs_say_of_its_profile(world: World) -> None:
    before = world.state()

    found = world.db.doctor(repair=True)

    assert all(finding.severity is Severity.WARNING and not finding.repaired for finding in found)
    assert {finding.text for finding in found if finding.code == "managed-gap"} == (set() if world.full else set(MANAGED_GAPS))
    assert world.doctor() == []
    assert world.state() == before


def test_it_may_be_sent_to_one_server_or_one_tenant(world: World) -> None:
    with world.changed("GRANT CONNECT ON DATABASE {db} TO PUBLIC", "REVOKE CONNECT ON DATABASE {db} FROM PUBLIC"):
        assert [finding.tenant for finding in world.doctor(server="default")] == ["acme"]
        assert [finding.code for finding in world.doctor(tenant="acme")] == ["public-connect"]
        assert world.doctor(tenant="globex") == []
    with pytest.raises(NoServerAvailable):
        world.db.doctor(server="elsewhere")


def test_a_suspended_tenant_is_whole_although_its_runtime_role_may_not_log_in(world: World) -> None:
    world.db.suspend("globex")
    try:
        assert world.doctor() == []
    finally:
        world.db.activate("globex")


def test_a_small_budget_is_enough_for_it(world: World) -> None:
    with world.cluster.tenantdb(
        world.registry, hardening=world.db.settings.hardening, budget=Budget(connections=5, processes=1, per_tenant=2, acquire_timeout=5)
    ) as db:
        assert {finding.code for finding in db.doctor()} <= {"connection-limit", "managed-gap", "provisioner-createrole", "connections"}


# -- each weakness is found, and the harmless ones are mended ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """A weakness: the code that it must be reported by, how it comes to be, and how it goes where the doctor may not mend it."""

    code: str
    fault: str
    where: str = ELSEWHERE
    undo: str | None = None
    name: str | None = None
    profile: str | None = None
    tenant: str | None = "acme"

    @property
    def id(self) -> str:
        return self.code if self.name is None else f"{self.code}-{self.name}"


HARMLESS = [
    Planted("public-connect", "GRANT CONNECT ON DATABASE {db} TO PUBLIC"),
    Planted("public-temporary", "GRANT TEMPORARY ON DATABASE {db} TO PUBLIC"),
    Planted("public-create", "GRANT CREATE ON DATABASE {db} TO PUBLIC"),
    Planted("connect-missing", "REVOKE CONNECT ON DATABASE {db} FROM {runtime}", name="runtime"),
    Planted("connect-missing", "REVOKE CONNECT ON DATABASE {db} FROM {owner}", name="owner"),
    Planted("role-attributes", "ALTER ROLE {owner} CREATEDB", name="createdb"),
    Planted("role-attributes", "ALTER ROLE {runtime} CREATEROLE CREATEDB", name="createrole"),
    Planted("public-schema", "GRANT USAGE ON SCHEMA public TO PUBLIC", INSIDE, name="public"),
    Planted("public-schema", "GRANT CREATE ON SCHEMA tenantdb TO PUBLIC", INSIDE, name="tenantdb"),
    Planted("record-log-missing", "DROP TABLE tenantdb.audit, tenantdb.audit_head", INSIDE),
    Planted("public-functions", "GRANT EXECUTE ON FUNCTION loud TO PUBLIC", INSIDE),
    Planted("default-public", "ALTER DEFAULT PRIVILEGES FOR ROLE {owner} GRANT EXECUTE ON FUNCTIONS TO PUBLIC", INSIDE, name="functions"),
    Planted("default-public", "ALTER DEFAULT PRIVILEGES FOR ROLE {owner} GRANT USAGE ON TYPES TO PUBLIC", INSIDE, name="types"),
    Planted(
        "default-public",
        "ALTER DEFAULT PRIVILEGES FOR ROLE {owner} IN SCHEMA public GRANT EXECUTE ON FUNCTIONS TO PUBLIC",
        INSIDE,
        name="in-a-schema",
    ),
    Planted("role-settings", "ALTER ROLE {runtime} SET statement_timeout = 0", name="timeout"),
    Planted("role-settings", "ALTER ROLE {owner} SET default_transaction_read_only = on", name="owner"),
    Planted("role-settings", "ALTER ROLE {runtime} IN DATABASE {db} SET search_path = evil", name="in-the-database"),
    Planted("login-lost", "ALTER ROLE {runtime} NOLOGIN", name="runtime"),
    Planted("login-lost", "ALTER ROLE {owner} NOLOGIN", name="owner"),
    Planted("password-lost", "ALTER ROLE {runtime} PASSWORD NULL", name="gone"),
    Planted("password-lost", "ALTER ROLE {owner} PASSWORD 'another'", name="another"),
    Planted("password-lost", "ALTER ROLE {runtime} VALID UNTIL '2001-01-01'", name="expired"),
    Planted("connection-limit", "ALTER ROLE {runtime} CONNECTION LIMIT 1", name="low"),
    Planted("connection-limit", "ALTER ROLE {owner} CONNECTION LIMIT -1", name="none"),
    Planted("connection-limit", "ALTER DATABASE {db} CONNECTION LIMIT -1", name="database"),
]
REPORTED = [
    Planted(
        "database-owner",
        "ALTER DATABASE {db} OWNER TO postgres; GRANT CONNECT ON DATABASE {db} TO {provisioner}",
        undo="REVOKE CONNECT ON DATABASE {db} FROM {provisioner}; ALTER DATABASE {db} OWNER TO {provisioner}",
    ),
    Planted(
        "foreign-grant", "GRANT CONNECT ON DATABASE {db} TO {their_runtime}", undo="REVOKE CONNECT ON DATABASE {db} FROM {their_runtime}"
    ),
    Planted("schema-creation", "GRANT CREATE ON DATABASE {db} TO {owner}", undo="REVOKE CREATE ON DATABASE {db} FROM {owner}"),
    Planted("temporary-granted", "GRANT TEMPORARY ON DATABASE {db} TO {runtime}", undo="REVOKE TEMPORARY ON DATABASE {db} FROM {runtime}"),
    Planted("role-attributes", "ALTER ROLE {runtime} SUPERUSER", undo="ALTER ROLE {runtime} NOSUPERUSER", name="superuser"),
    Planted("role-attributes", "ALTER ROLE {owner} REPLICATION", undo="ALTER ROLE {owner} NOREPLICATION", name="replication"),
    Planted("role-attributes", "ALTER ROLE {owner} BYPASSRLS", undo="ALTER ROLE {owner} NOBYPASSRLS", name="bypassrls"),
    Planted("role-in-group", "GRANT pg_read_all_data TO {runtime}", undo="REVOKE pg_read_all_data FROM {runtime}"),
    Planted("role-has-members", "GRANT {owner} TO {their_runtime}", undo="REVOKE {owner} FROM {their_runtime}"),
    Planted("role-missing", "ALTER ROLE {runtime} RENAME TO renamed", undo="ALTER ROLE renamed RENAME TO {runtime}"),
    Planted(
        "owner-group-missing",
        "SET ROLE {provisioner}; REVOKE tenantdb_owner FROM {owner}; RESET ROLE",
        undo="SET ROLE {provisioner}; GRANT tenantdb_owner TO {owner} {as_before}; RESET ROLE",
        profile="full",
    ),
    Planted("temp-file-limit", "ALTER ROLE {runtime} RESET ALL", undo="ALTER ROLE {runtime} SET temp_file_limit = '1GB'", profile="full"),
    Planted("role-settings", "ALTER ROLE {runtime} SET custom.x = 'y'", undo="ALTER ROLE {runtime} RESET custom.x", name="a-superusers"),
    Planted("database-settings", "ALTER DATABASE {db} SET work_mem = '1GB'", undo="ALTER DATABASE {db} RESET work_mem"),
    Planted("database-closed", "ALTER DATABASE {db} ALLOW_CONNECTIONS false", undo="ALTER DATABASE {db} ALLOW_CONNECTIONS true"),
    Planted("database-missing", "ALTER DATABASE {db} RENAME TO away", undo="ALTER DATABASE away RENAME TO {db}"),
    Planted(
        "database-invalid",
        "UPDATE pg_database SET datconnlimit = -2 WHERE datname = '{db}'",
        undo="UPDATE pg_database SET datconnlimit = 48 WHERE datname = '{db}'",
    ),
    Planted("schema-owner", "ALTER SCHEMA public OWNER TO postgres", INSIDE, undo="ALTER SCHEMA public OWNER TO {owner}"),
    Planted(
        "runtime-owns",
        "ALTER TABLE notes OWNER TO {runtime}",
        INSIDE,
        undo="ALTER TABLE notes OWNER TO {owner}; GRANT SELECT, INSERT, UPDATE, DELETE ON notes TO {runtime}",
        name="table",
    ),
    Planted(
        "runtime-owns",
        "ALTER FUNCTION loud OWNER TO {runtime}",
        INSIDE,
        undo="ALTER FUNCTION loud OWNER TO {owner}; GRANT EXECUTE ON FUNCTION loud TO {runtime}",
        name="function",
    ),
    Planted(
        "default-privileges",
        "ALTER DEFAULT PRIVILEGES FOR ROLE {owner} IN SCHEMA public REVOKE SELECT ON TABLES FROM {runtime}",
        INSIDE,
        undo="ALTER DEFAULT PRIVILEGES FOR ROLE {owner} IN SCHEMA public GRANT SELECT ON TABLES TO {runtime}",
    ),
    Planted(
        "security-definer",
        "CREATE FUNCTION asowner() RETURNS int LANGUAGE sql SECURITY DEFINER AS 'SELECT 1'; REVOKE ALL ON FUNCTION asowner FROM PUBLIC",
        INSIDE,
        undo="DROP FUNCTION asowner",
    ),
    Planted("extension", "CREATE EXTENSION dblink", INSIDE, undo="DROP EXTENSION dblink"),
    Planted(
        "doors-open",
        "GRANT EXECUTE ON FUNCTION pg_advisory_lock(bigint) TO PUBLIC",
        INSIDE,
        undo="REVOKE EXECUTE ON FUNCTION pg_advisory_lock(bigint) FROM PUBLIC",
        profile="full",
        name="advisory-lock",
    ),
    Planted(
        "doors-open",
        "GRANT EXECUTE ON FUNCTION lo_create(oid) TO PUBLIC",
        INSIDE,
        undo="REVOKE EXECUTE ON FUNCTION lo_create(oid) FROM PUBLIC",
        profile="full",
        name="large-object",
    ),
    Planted(
        "plpgsql-public",
        "GRANT USAGE ON LANGUAGE plpgsql TO PUBLIC",
        INSIDE,
        undo="REVOKE USAGE ON LANGUAGE plpgsql FROM PUBLIC",
        profile="full",
    ),
    Planted(
        "identity",
        "UPDATE tenantdb.identity SET tenant_id = gen_random_uuid()",
        INSIDE,
        undo="UPDATE tenantdb.identity SET tenant_id = '{id}'",
        name="foreign",
    ),
    Planted("identity", "ALTER TABLE tenantdb.identity RENAME TO i", INSIDE, undo="ALTER TABLE tenantdb.i RENAME TO identity", name="gone"),
    Planted(
        "provisioner-overprivileged",
        "GRANT pg_execute_server_program TO {provisioner}",
        undo="REVOKE pg_execute_server_program FROM {provisioner}",
        tenant=None,
        name="programs",
    ),
    Planted("provisioner-rights", "ALTER ROLE {provisioner} NOCREATEDB", undo="ALTER ROLE {provisioner} CREATEDB", tenant=None),
    Planted(
        "provisioner-signal",
        "REVOKE pg_signal_backend FROM {provisioner}",
        undo="GRANT pg_signal_backend TO {provisioner}",
        tenant=None,
    ),
    Planted(
        "template-missing",
        "ALTER DATABASE tenantdb_tpl RENAME TO elsewhere; REVOKE CONNECT ON DATABASE elsewhere FROM PUBLIC",
        undo="ALTER DATABASE elsewhere RENAME TO tenantdb_tpl",
        profile="full",
        tenant=None,
    ),
    Planted(
        "template-open",
        "ALTER DATABASE tenantdb_tpl ALLOW_CONNECTIONS true",
        undo="ALTER DATABASE tenantdb_tpl ALLOW_CONNECTIONS false",
        profile="full",
        tenant=None,
    ),
    *(
        Planted(
            "public-connect",
            f"GRANT CONNECT ON DATABASE {name} TO PUBLIC",
            undo=f"REVOKE CONNECT ON DATABASE {name} FROM PUBLIC",
            tenant=None,
            name=name,
        )
        for name in ("postgres", "template1")
    ),
    Planted("foreign-database-open", "CREATE DATABASE crm", undo="DROP DATABASE crm", tenant=None),
    Planted(
        "orphan-database",
        "CREATE DATABASE t_0123456789abcdef ALLOW_CONNECTIONS false",
        undo="DROP DATABASE t_0123456789abcdef",
        tenant=None,
    ),
    Planted("orphan-role", "CREATE ROLE t_0123456789abcdef", undo="DROP ROLE t_0123456789abcdef", tenant=None),
    Planted(
        "password-encryption",
        "ALTER ROLE {provisioner} SET password_encryption = 'md5'",
        undo="ALTER ROLE {provisioner} RESET password_encryption",
        tenant=None,
    ),
    Planted(
        "registry-public",
        "GRANT CONNECT ON DATABASE {registry} TO PUBLIC",
        undo="REVOKE CONNECT ON DATABASE {registry} FROM PUBLIC",
        tenant=None,
    ),
    Planted(
        "registry-door",
        f"GRANT UPDATE ON tenantdb_audit TO {APP}",
        "{registry}",
        undo=f"REVOKE UPDATE ON tenantdb_audit FROM {APP}",
        tenant=None,
    ),
]


@pytest.mark.parametrize("planted", [pytest.param(planted, id=planted.id) for planted in HARMLESS])
def test_a_harmless_weakness_is_reported_and_then_mended(world: World, planted: Planted) -> None:
    healthy = world.state()
    world.sql(planted.fault, planted.where)
    ill = world.state()

    reported = world.doctor()
    assert {(finding.code, finding.tenant, finding.repaired) for finding in reported} == {(planted.code, planted.tenant, False)}
    assert world.state() == ill

    mended = world.doctor(repair=True)
    assert {(finding.code, finding.tenant, finding.repaired) for finding in mended} == {(planted.code, planted.tenant, True)}
    assert world.state() == healthy
    assert world.may_log_in(world.acme, OWNER) and world.may_log_in(world.acme, RUNTIME)


@pytest.mark.parametrize("planted", [pytest.param(planted, id=planted.id) for planted in REPORTED])
def test_what_a_person_must_decide_is_reported_and_left_alone(world: World, planted: Planted) -> None:
    if planted.profile not in (None, world.db.settings.hardening):
        pytest.skip(f"a matter of {planted.profile}")
    healthy = world.state()
    with world.changed(planted.fault, planted.undo or "", planted.where):
        ill = world.state()
        for repair in (False, True):
            found = [finding for finding in world.doctor(repair=repair) if finding.code == planted.code]
            assert {(finding.tenant, finding.repaired) for finding in found} == {(planted.tenant, False)}
            assert all(finding.repair and finding.text for finding in found)
            assert world.state() == ill

    assert world.state() == healthy


def test_every_repair_that_is_sql_does_what_it_says(world: World) -> None:
    """A person copies it; so what is shown must be what helps."""
    for planted in (
        planted for planted in REPORTED if planted.code in ("foreign-grant", "schema-creation", "temporary-granted", "role-in-group")
    ):
        world.sql(planted.fault, planted.where)
        for finding in world.doctor():
            if finding.code == planted.code:
                world.cluster.sql(finding.repair)
        assert world.doctor() == []


# -- strangers, templates, the end of a tenant -----------------------------------------------------------------------------------------


def test_a_purged_tenants_leftovers_are_reported_and_only_an_invalid_database_is_dropped(world: World) -> None:
    names = world.names | {"stranger": "t_fedcba9876543210"}
    with world.cluster.server_session() as superuser:
        for name in ("t_00000000000000aa", names["stranger"]):
            superuser.execute(f"CREATE DATABASE {name} OWNER {PROVISIONER} ALLOW_CONNECTIONS false".encode())
            superuser.execute(b"UPDATE pg_database SET datconnlimit = -2 WHERE datname = %s", [name])
    purging, now = uuid4(), tables.utcnow()
    values = {"id": purging, "slug": "initech", "name": "Initech", "subscription": "trial", "metadata": {}, "version": 1, "generation": 1}
    values |= {"database": "t_00000000000000aa", "server_id": world.db.servers.get("default").id, "created_at": now, "updated_at": now}
    try:
        with world.db._registry.admin_write() as connection:
            connection.execute(insert(tables.tenants).values(**values, state=TenantState.DELETED.value))
        assert {finding.code for finding in world.doctor(repair=True)} == {"orphan-database"}  # deleted, and not yet to be purged
        assert "t_00000000000000aa" in world.cluster.databases()

        with world.db._registry.admin_write() as connection:
            connection.execute(update(tables.tenants).where(tables.tenants.c.id == purging).values(state=TenantState.PURGING.value))
        found = {(finding.code, finding.subject, finding.repaired) for finding in world.doctor(repair=True)}

        stranger = ("orphan-database", f"database {names['stranger']}", False)
        assert found == {("database-invalid", "database t_00000000000000aa", True), stranger}
        assert world.cluster.databases() & {"t_00000000000000aa", names["stranger"]} == {names["stranger"]}
    finally:
        world.cluster.sql(f"DROP DATABASE IF EXISTS {names['stranger']}")
        world.cluster.sql("DROP DATABASE IF EXISTS t_00000000000000aa")
        with world.db._registry.admin_write() as connection:
            connection.execute(tables.tenants.delete().where(tables.tenants.c.id == purging))


def test_a_golden_database_is_no_stranger_and_is_closed_again(world: World) -> None:
    template, owner, now = "t_00000000000000bb", "t_00000000000000cc", tables.utcnow()
    ask(world.cluster.provisioner_url(), f"CREATE ROLE {owner} NOLOGIN")
    ask(world.cluster.provisioner_url(), f"CREATE DATABASE {template} TEMPLATE template0 ALLOW_CONNECTIONS false")
    ask(world.cluster.provisioner_url(), f"REVOKE ALL ON DATABASE {template} FROM PUBLIC")
    values = {"id": uuid4(), "digest": "x", "database": template, "owner_role": owner, "state": "current", "created_at": now}
    try:
        with world.db._registry.admin_write() as connection:
            values |= {"server_id": world.db.servers.get("default").id, "updated_at": now}
            connection.execute(insert(tables.templates).values(values))
        assert world.doctor() == []

        world.cluster.sql(f"ALTER DATABASE {template} ALLOW_CONNECTIONS true")
        found = world.doctor(repair=True)

        assert [(finding.code, finding.repaired) for finding in found] == [("template-open", True)]
        assert world.cluster.sql(f"SELECT datallowconn FROM pg_database WHERE datname = '{template}'") == [(False,)]
    finally:
        with world.db._registry.admin_write() as connection:
            connection.execute(tables.templates.delete().where(tables.templates.c.database == template))
        world.cluster.sql(f"DROP DATABASE {template}")
        world.cluster.sql(f"DROP ROLE {owner}")


def test_a_password_that_is_being_changed_is_nobodys_to_judge(world: World) -> None:
    world.cluster.sql(f"ALTER ROLE {world.acme.runtime_role} PASSWORD 'the next one'")
    pending = tables.tenants.c.runtime_secret_pending.name

    def write(value: bytes | None) -> None:
        with world.db._registry.admin_write() as connection:
            connection.execute(update(tables.tenants).where(tables.tenants.c.id == world.acme.id).values({pending: value}))

    server = world.db.servers.get("default")
    sealed = world.db._registry.seal_password(
        "the next one",
        role=RUNTIME,
        tenant=world.acme,
        server=server,
        database=str(world.acme.database),
        role_name=str(world.acme.runtime_role),
    )
    write(sealed)
    try:
        assert world.doctor(repair=True) == []
        assert not world.may_log_in(world.acme, RUNTIME)
    finally:
        write(None)

    assert [(finding.code, finding.repaired) for finding in world.doctor(repair=True)] == [("password-lost", True)]


def test_a_tenant_that_is_being_suspended_is_not_let_in_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks like a lost login may be the fence of a suspension that began after the doctor had read the registry."""

    def write(**values: Any) -> None:
        with world.db._registry.admin_write() as connection:
            connection.execute(update(tables.tenants).where(tables.tenants.c.id == world.acme.id).values(values))

    read = Catalogue.read

    def read_and_be_overtaken(*args: Any, **options: Any) -> Catalogue:
        catalogue = read(*args, **options)
        write(state=TenantState.SUSPENDED.value, fence="pending")
        return catalogue

    world.sql("ALTER ROLE {runtime} NOLOGIN")
    try:
        with monkeypatch.context() as patched:
            patched.setattr(Catalogue, "read", read_and_be_overtaken)
            found = world.doctor(repair=True)
        assert [(finding.code, finding.repaired) for finding in found] == [("login-lost", False)]
        assert not world.may_log_in(world.acme, RUNTIME)
    finally:
        write(state=TenantState.ACTIVE.value, fence=None)
        world.sql("ALTER ROLE {runtime} LOGIN")


def test_a_fence_that_has_been_opened_is_reported(world: World) -> None:
    world.db.suspend("globex")
    try:
        world.cluster.sql(f"ALTER ROLE {world.globex.runtime_role} LOGIN")
        assert [(finding.code, finding.tenant, finding.repaired) for finding in world.doctor(repair=True)] == [
            ("fence-open", "globex", False)
        ]
    finally:
        world.db.activate("globex")


# -- D15, D20, D21 ---------------------------------------------------------------------------------------------------------------------


def test_a_runtime_role_that_locked_itself_out_is_let_in_again(world: World) -> None:
    attacker = login(world.cluster, world.db, world.acme, RUNTIME)
    attacker.ask("ALTER ROLE CURRENT_USER SET default_transaction_read_only = on")
    with world.db.begin("acme") as session:  # start-up options win over what the role has set
        session.execute(text("INSERT INTO notes VALUES ('still writable')"))
    attacker.ask("BEGIN READ WRITE; ALTER ROLE CURRENT_USER PASSWORD NULL; COMMIT")
    world.db._engines.forget(world.acme.id)
    assert not world.may_log_in(world.acme, RUNTIME)

    found = world.doctor(repair=True)

    assert {(finding.code, finding.repaired) for finding in found} == {("role-settings", True), ("password-lost", True)}
    with world.cluster.tenantdb(world.registry) as fresh, fresh.session("acme") as session:
        assert session.scalar(text("SELECT count(*) FROM notes WHERE line = 'still writable'")) == 1


TRAPS = [
    "CREATE SEQUENCE sprung",
    "GRANT USAGE ON SCHEMA public TO {provisioner}; GRANT USAGE ON SEQUENCE sprung TO {provisioner}",
    *(
        f"CREATE FUNCTION public.{signature} RETURNS {result} LANGUAGE plpgsql AS $$ BEGIN PERFORM nextval('public.sprung');"
        f" BEGIN EXECUTE 'ALTER ROLE {{owner}} SUPERUSER'; EXCEPTION WHEN OTHERS THEN NULL; END;"
        f" BEGIN EXECUTE 'ALTER ROLE {{owner}} CREATEDB'; EXCEPTION WHEN OTHERS THEN NULL; END; RETURN {value}; END $$;"
        f" GRANT EXECUTE ON FUNCTION public.{signature} TO {{provisioner}}"
        for signature, result, value in (
            ("pg_get_userbyid(oid)", "name", "'x'"),
            ("current_setting(text, boolean)", "text", "'x'"),
            ("has_language_privilege(text, text, text)", "boolean", "false"),
            ("pg_get_function_identity_arguments(oid)", "text", "''"),
            ("lower(text)", "text", "'x'"),
        )
    ),
    "CREATE VIEW public.pg_roles AS SELECT public.pg_get_userbyid(1) AS rolname, 1::oid AS oid, public.lower('X') AS x",
    "GRANT SELECT ON public.pg_roles TO {provisioner}",
    "CREATE FUNCTION on_write() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM public.lower('X'); RETURN NEW; END $$",
    "CREATE TRIGGER trap BEFORE INSERT OR UPDATE OR DELETE ON notes FOR EACH ROW EXECUTE FUNCTION on_write()",
]
DISARM = (
    "DROP TRIGGER trap ON notes; DROP VIEW public.pg_roles; DROP SEQUENCE sprung; DROP FUNCTION on_write, public.pg_get_userbyid(oid),"
    " public.lower(text), public.current_setting(text, boolean), public.has_language_privilege(text, text, text),"
    " public.pg_get_function_identity_arguments(oid); REVOKE USAGE ON SCHEMA public FROM {provisioner}"
)


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "without-the-guard"])
def test_a_trap_that_a_tenants_owner_set_is_not_sprung(world: World, monkeypatch: pytest.MonkeyPatch, guarded: bool) -> None:
    """D20: what the owner role planted would run with the rights of the doctor who calls it."""
    owner = login(world.cluster, world.db, world.acme, OWNER)
    for trap in TRAPS:
        owner.ask(trap.format(**world.names))
    planted = (
        ("GRANT USAGE ON SCHEMA public TO PUBLIC", INSIDE),
        ("GRANT EXECUTE ON FUNCTION loud TO PUBLIC", INSIDE),
        ("ALTER ROLE {runtime} SET search_path = evil", ELSEWHERE),
        ("ALTER DEFAULT PRIVILEGES FOR ROLE {owner} GRANT EXECUTE ON FUNCTIONS TO PUBLIC", INSIDE),
    )
    try:
        if guarded:
            for fault, where in planted:
                world.sql(fault, where)
            found = world.doctor(repair=True)
            assert {finding.code for finding in found if finding.repaired} == {
                "public-schema",
                "public-functions",
                "role-settings",
                "default-public",
            }
        else:
            with monkeypatch.context() as patched:
                patched.setattr(doctor, "_SESSION", "-c search_path=public,pg_catalog")
                world.doctor()

        [(is_sprung,)] = world.cluster.sql("SELECT is_called FROM sprung", database=str(world.acme.database))
        assert is_sprung is not guarded
        if guarded:
            rights = f"SELECT rolsuper, rolcreatedb FROM pg_roles WHERE rolname = '{world.acme.owner_role}'"
            assert world.cluster.sql(rights) == [(False, False)]
    finally:
        world.sql("ALTER ROLE {owner} NOCREATEDB")
        world.sql(DISARM, INSIDE)


def test_an_identity_stamp_that_became_a_view_is_not_read(world: World) -> None:
    owner = login(world.cluster, world.db, world.acme, OWNER)
    for trap in TRAPS[:3]:
        owner.ask(trap.format(**world.names))
    try:
        with world.changed(
            "ALTER TABLE tenantdb.identity RENAME TO i; CREATE VIEW tenantdb.identity AS SELECT tenant_id, public.pg_get_userbyid(1) FROM"
            " tenantdb.i; GRANT SELECT ON tenantdb.identity TO {provisioner}",
            "DROP VIEW tenantdb.identity; ALTER TABLE tenantdb.i RENAME TO identity",
            INSIDE,
        ):
            assert {finding.code for finding in world.doctor(repair=True)} == {"identity"}
        assert world.cluster.sql("SELECT is_called FROM sprung", database=str(world.acme.database)) == [(False,)]
    finally:
        world.sql(
            "DROP FUNCTION public.pg_get_userbyid(oid); DROP SEQUENCE sprung; REVOKE USAGE ON SCHEMA public FROM {provisioner}", INSIDE
        )


def test_the_provisioner_cannot_reach_beyond_what_it_made_or_the_doctor_says_so(world: World) -> None:
    """D21."""
    world.cluster.sql("CREATE ROLE stranger LOGIN")
    try:
        for statement in ("ALTER ROLE stranger PASSWORD 'mine'", f"GRANT pg_execute_server_program TO {PROVISIONER}"):
            if world.cluster.version >= 160000:
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    ask(world.cluster.provisioner_url(), statement)
        warned = {finding.code for finding in world.db.doctor()}
        assert ("provisioner-createrole" in warned) is (world.cluster.version < 160000)
    finally:
        world.cluster.sql("DROP ROLE stranger")


# -- the server ------------------------------------------------------------------------------------------------------------------------


def test_slow_recovery_with_many_databases_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(doctor, "MANY_DATABASES", 3)
        found = world.doctor()

    assert [(finding.code, finding.severity) for finding in found] == [("slow-recovery", Severity.WARNING)]


def test_a_server_elsewhere_without_encryption_is_a_problem(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(doctor, "is_local", lambda host: False)
        found = world.doctor()

    assert [(finding.code, finding.severity) for finding in found] == [("tls-off", Severity.PROBLEM)]


def test_a_provisioner_that_is_a_superuser_is_a_problem(world: World) -> None:
    with world.changed("ALTER ROLE {provisioner} SUPERUSER", "ALTER ROLE {provisioner} NOSUPERUSER"):
        found = world.doctor()

    assert ("provisioner-overprivileged", Severity.PROBLEM) in {(finding.code, finding.severity) for finding in found}


def test_more_connections_than_the_server_has_are_named(world: World) -> None:
    budget = Budget(connections=500, processes=4)
    with world.cluster.tenantdb(world.registry, hardening=world.db.settings.hardening, budget=budget) as db:
        assert "connections" in {finding.code for finding in db.doctor()}


def test_who_lacks_the_owner_keys_says_that_it_did_not_try_them(world: World) -> None:
    keys = world.db._registry.keyring.derive("runtime")
    with world.cluster.tenantdb(world.registry, hardening=world.db.settings.hardening, secret_keys=keys) as db:
        assert "logins-not-tried" in {finding.code for finding in db.doctor()}


def test_a_server_that_does_not_answer_is_a_finding_and_others_are_looked_at(world: World) -> None:
    url = world.cluster.server.url(PROVISIONER, "wrong")
    with world.cluster.tenantdb(world.registry, server=url) as db:
        assert [finding.code for finding in db.doctor() if finding.severity is Severity.PROBLEM] == ["not-examined"]
    with world.cluster.tenantdb(world.registry, server=None, servers={"another": world.cluster.provisioner_url()}) as db:
        assert [finding.code for finding in db.doctor(server="default")] == ["not-examined"]
    with world.cluster.tenantdb(world.registry, provisioner=False) as db, pytest.raises(ConfigError, match="no provisioner"):
        db.doctor()


# -- who runs it -----------------------------------------------------------------------------------------------------------------------


def test_each_run_is_in_the_audit_log_with_its_counts_and_no_names(world: World) -> None:
    world.sql("GRANT CONNECT ON DATABASE {db} TO PUBLIC")
    world.doctor()
    world.doctor(repair=True, tenant="acme")

    second, first = world.db.audit.list(limit=2)
    assert (first.action, second.action) == ("doctor.run", "doctor.run")
    assert (first.details["problems"], first.details["repaired"], first.details["repair"]) == (1, 0, False)
    assert (second.details["problems"], second.details["repaired"], second.details["repair"]) == (0, 1, True)
    assert (first.tenant_id, second.tenant_id) == (None, world.acme.id)


def test_no_name_of_a_customer_and_no_password_is_in_what_the_server_sees(world: World) -> None:
    world.sql("ALTER ROLE {runtime} PASSWORD NULL")
    world.doctor(repair=True)

    password = login(world.cluster, world.db, world.acme, RUNTIME).password
    log = world.cluster.server.log.read_text(errors="replace")
    assert password not in log
    for finding in world.db.doctor():
        assert finding.subject.split()[-1] not in ("acme", "globex")


async def test_asyncio_has_it_too(world: World) -> None:
    world.sql("ALTER ROLE {runtime} NOLOGIN")
    adb = AsyncTenantDB(world.db)
    try:
        found = await adb.doctor(repair=True)
    finally:
        adb._manage.close()
        adb._work.close()

    assert ("login-lost", True) in {(finding.code, finding.repaired) for finding in found}


def test_the_command_tells_mends_and_exits_by_what_remains(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = world.cluster.tenantdb_arguments(world.registry)
    for name in given:
        monkeypatch.setenv(f"TENANTDB_{name.upper()}", given[name])
    monkeypatch.setenv("TENANTDB_SECRET_KEYS", world.db.settings.secret_keys[0].get_secret_value())
    monkeypatch.setenv("TENANTDB_HARDENING", world.db.settings.hardening)
    monkeypatch.chdir(tmp_path)
    world.sql("GRANT CONNECT ON DATABASE {db} TO PUBLIC; GRANT {owner} TO {their_runtime}")
    try:
        run = CliRunner().invoke(cli, ["doctor", "--tenant", "acme"])
        assert run.exit_code == 1
        assert (
            f"problem: default: acme: database {world.acme.database}: the database grants CONNECT for PUBLIC [public-connect]" in run.output
        )
        assert f'REVOKE CONNECT ON DATABASE "{world.acme.database}" FROM PUBLIC' in run.output
        assert "problems: 2; warnings: 0" in run.output

        run = CliRunner().invoke(cli, ["doctor", "--repair", "--json"])
        told = json.loads(run.stdout)
        assert run.exit_code == 1 and told["ok"] is False
        repaired = {finding["code"]: finding["repaired"] for finding in told["findings"] if finding["severity"] == "problem"}
        assert repaired == {"public-connect": True, "role-has-members": False, "role-in-group": False}
    finally:
        world.sql("REVOKE {owner} FROM {their_runtime}")

    assert CliRunner().invoke(cli, ["doctor"]).exit_code == 0


# -- SQLite ----------------------------------------------------------------------------------------------------------------------------


def test_a_folder_of_files_is_looked_at_too(tmp_path: Path) -> None:
    with sqlite_world(tmp_path) as folder:
        db = folder.make_db()
        acme, globex = db.provision("acme"), db.provision("globex")
        assert db.doctor() == []

        path = folder.path(acme, db)
        path.chmod(0o644)
        (path.parent / "t_0123456789abcdef.sqlite3").touch()
        (path.parent / "mine.sqlite3").touch()
        folder.path(globex, db).rename(path.parent / "away")
        found = {(finding.code, finding.tenant, finding.repaired) for finding in db.doctor(repair=True)}

        assert found == {("file-mode", "acme", True), ("orphan-file", None, False), ("database-missing", "globex", False)}
        assert path.stat().st_mode & 0o777 == 0o600
        assert (path.parent / "t_0123456789abcdef.sqlite3").exists()


def test_a_file_that_is_another_tenants_or_damaged_is_found(tmp_path: Path) -> None:
    with sqlite_world(tmp_path) as folder:
        db = folder.make_db()
        acme, globex = db.provision("acme"), db.provision("globex")
        ours, theirs = folder.path(acme, db).read_bytes(), folder.path(globex, db)

        theirs.write_bytes(ours)
        assert [(finding.code, finding.tenant) for finding in db.doctor(repair=True)] == [("identity", "globex")]
        theirs.write_bytes(ours[:100] + b"\xff" * (len(ours) - 100))
        assert "file-damaged" in {finding.code for finding in db.doctor(repair=True)}


def test_names_of_ours_are_recognised_by_their_pattern() -> None:
    from tenantdb.backends.postgresql.workshop import OPAQUE_NAME

    assert re.compile(NAME_PATTERN).pattern == f"^{OPAQUE_NAME.pattern}$"


def test_every_code_is_on_the_page() -> None:
    page = (DOCS / "howto" / "doctor.md").read_text(encoding="utf-8")
    documented = {code for row in re.findall(r"^\| (`[^|]+) \|", page, re.MULTILINE) for code in re.findall(r"`([a-z-]+)`", row)}

    assert {planted.code for planted in HARMLESS + REPORTED} <= documented
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src" / "tenantdb").rglob("*.py"))
    made_up = {code for code in documented if f'"{code}"' not in sources and not code.startswith(("public-", "orphan-"))}
    assert made_up == set()
