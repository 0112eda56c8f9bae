"""Every door that `verify` and `check` look at is opened by hand once and must be reported, and not any more when it is closed again.

And a wall that could not be built, because the server only warned, is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import text

from tenantdb import Tenant, TenantDB
from tenantdb.backends import backend
from tenantdb.backends.postgresql.workshop import PostgreSQLWorkshop, _run
from tenantdb.errors import CredentialTampered, HardeningFailed, ProvisioningError, WrongDatabase
from tenantdb.model import TenantState
from tests.integration.cluster import ADMIN, ADMIN_PASSWORD, APP, PROVISIONER, Cluster, Scripts
from tests.procedures import meanwhile


@dataclass(frozen=True)
class World:
    cluster: Cluster
    db: TenantDB
    registry: str
    acme: Tenant
    globex: Tenant

    def verify(self) -> list[str]:
        server = self.db.servers.get("default")
        with backend("postgresql").workshop(server, self.db.settings.provisioners["default"], self.db.settings) as workshop:
            return workshop.verify(self.acme)

    def check(self) -> list[str]:
        return [finding.text for finding in self.db.check()]

    @contextmanager
    def changed(self, fault: str, repair: str, database: str) -> Iterator[None]:
        """The fault, for the length of the block."""
        names = {"db": self.acme.database, "owner": self.acme.owner_role, "runtime": self.acme.runtime_role}
        names |= {"their_runtime": self.globex.runtime_role, "provisioner": PROVISIONER, "id": str(self.acme.id), "registry": self.registry}
        database = database.format(**names)
        self.cluster.sql(fault.format(**names), database=database)
        try:
            yield
        finally:
            self.cluster.sql(repair.format(**names), database=database)


@pytest.fixture(scope="module")
def world(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    scripts = Scripts(tmp_path_factory.mktemp("findings") / "migrations")
    scripts.add(
        "001", "CREATE TABLE notes (line text)", "CREATE FUNCTION loud(line text) RETURNS text LANGUAGE sql AS 'SELECT upper(line)'"
    )
    registry = cluster.new_registry()
    with cluster.tenantdb(registry, migrations=str(scripts)) as db:
        yield World(cluster, db, registry, db.provision("acme"), db.provision("globex"))


# -- a tenant's database ---------------------------------------------------------------------------------------------------------------

IN_THE_DATABASE, ELSEWHERE = "{db}", "postgres"


@pytest.mark.parametrize(
    ("finding", "fault", "repair", "database"),
    [
        (
            "the database does not belong to the provisioner",
            "ALTER DATABASE {db} OWNER TO postgres; GRANT CONNECT ON DATABASE {db} TO {provisioner}",
            "REVOKE CONNECT ON DATABASE {db} FROM {provisioner}; ALTER DATABASE {db} OWNER TO {provisioner}",
            ELSEWHERE,
        ),
        (
            "the database grants CONNECT for PUBLIC",
            "GRANT CONNECT ON DATABASE {db} TO PUBLIC",
            "REVOKE CONNECT ON DATABASE {db} FROM PUBLIC",
            ELSEWHERE,
        ),
        (
            "the database grants TEMPORARY for PUBLIC",
            "GRANT TEMPORARY ON DATABASE {db} TO PUBLIC",
            "REVOKE TEMPORARY ON DATABASE {db} FROM PUBLIC",
            ELSEWHERE,
        ),
        (
            "the database grants CONNECT for a foreign role",
            "GRANT CONNECT ON DATABASE {db} TO {their_runtime}",
            "REVOKE CONNECT ON DATABASE {db} FROM {their_runtime}",
            ELSEWHERE,
        ),
        (
            "PUBLIC may use schema public",
            "GRANT USAGE ON SCHEMA public TO PUBLIC",
            "REVOKE USAGE ON SCHEMA public FROM PUBLIC",
            IN_THE_DATABASE,
        ),
        (
            "PUBLIC may use schema tenantdb",
            "GRANT CREATE ON SCHEMA tenantdb TO PUBLIC",
            "REVOKE CREATE ON SCHEMA tenantdb FROM PUBLIC",
            IN_THE_DATABASE,
        ),
        ("a role of the tenant is missing", "ALTER ROLE {runtime} RENAME TO renamed", "ALTER ROLE renamed RENAME TO {runtime}", ELSEWHERE),
        *(
            (f"the {role} role has more rights than LOGIN", f"ALTER ROLE {{{role}}} {right}", f"ALTER ROLE {{{role}}} NO{right}", ELSEWHERE)
            for role in ("owner", "runtime")
            for right in ("SUPERUSER", "CREATEROLE", "CREATEDB", "REPLICATION", "BYPASSRLS")
        ),
        ("the runtime role is a member of another role", "GRANT {owner} TO {runtime}", "REVOKE {owner} FROM {runtime}", ELSEWHERE),
        (
            "the owner role is a member of another role",
            "GRANT pg_read_all_data TO {owner}",
            "REVOKE pg_read_all_data FROM {owner}",
            ELSEWHERE,
        ),
        (
            "another role is a member of the owner role",
            "GRANT {owner} TO {their_runtime}",
            "REVOKE {owner} FROM {their_runtime}",
            ELSEWHERE,
        ),
        (
            "another role is a member of the runtime role",
            "GRANT {runtime} TO {their_runtime}",
            "REVOKE {runtime} FROM {their_runtime}",
            ELSEWHERE,
        ),
        ("the runtime role owns relations", "ALTER TABLE notes OWNER TO {runtime}", "ALTER TABLE notes OWNER TO {owner}", IN_THE_DATABASE),
        (
            "PUBLIC may execute functions of the tenant",
            "GRANT EXECUTE ON FUNCTION loud TO PUBLIC",
            "REVOKE EXECUTE ON FUNCTION loud FROM PUBLIC",
            IN_THE_DATABASE,
        ),
        (
            "the extension dblink is there, and the server's extensions= do not name it",
            "CREATE EXTENSION dblink",
            "DROP EXTENSION dblink",
            IN_THE_DATABASE,
        ),
        (
            "PUBLIC may take advisory locks or write large objects; run `tenantdb bootstrap-server`",
            "GRANT EXECUTE ON FUNCTION pg_advisory_lock(bigint) TO PUBLIC",
            "REVOKE EXECUTE ON FUNCTION pg_advisory_lock(bigint) FROM PUBLIC",
            IN_THE_DATABASE,
        ),
        (
            "PUBLIC may use PL/pgSQL; run `tenantdb bootstrap-server`",
            "GRANT USAGE ON LANGUAGE plpgsql TO PUBLIC",
            "REVOKE USAGE ON LANGUAGE plpgsql FROM PUBLIC",
            IN_THE_DATABASE,
        ),
        (
            "the identity stamp is not the tenant's",
            "UPDATE tenantdb.identity SET tenant_id = gen_random_uuid()",
            "UPDATE tenantdb.identity SET tenant_id = '{id}'",
            IN_THE_DATABASE,
        ),
    ],
    ids=lambda value: value.replace(" ", "-") if value.startswith(("the ", "PUBLIC ", "a ", "another ")) else "",
)
def test_a_door_of_a_tenants_database_is_reported_while_it_is_open(
    world: World, finding: str, fault: str, repair: str, database: str
) -> None:
    with world.changed(fault, repair, database):
        assert finding in world.verify()

    assert world.verify() == []


def test_provisioning_ends_failed_where_verify_finds_an_open_door_and_goes_on_when_it_is_closed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = PostgreSQLWorkshop.verify

    def open_a_door(workshop: PostgreSQLWorkshop, tenant: Tenant, **how: Any) -> list[str]:
        world.cluster.sql(f"GRANT CONNECT ON DATABASE {tenant.database} TO PUBLIC")
        return verify(workshop, tenant, **how)

    with monkeypatch.context() as patched:
        patched.setattr(PostgreSQLWorkshop, "verify", open_a_door)
        with pytest.raises(ProvisioningError, match="CONNECT for PUBLIC") as failure:
            world.db.provision("hooli")
    assert isinstance(failure.value.__cause__, HardeningFailed)
    tenant = world.db.tenants.get("hooli")
    assert tenant.state is TenantState.FAILED
    assert "the database grants CONNECT for PUBLIC" in str(tenant.reason)

    world.cluster.sql(f"REVOKE CONNECT ON DATABASE {tenant.database} FROM PUBLIC")
    assert world.db.provision("hooli").state is TenantState.ACTIVE


# -- the server and the registry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("finding", "fault", "repair", "database"),
    [
        ("the provisioner is a superuser", "ALTER ROLE {provisioner} SUPERUSER", "ALTER ROLE {provisioner} NOSUPERUSER", ELSEWHERE),
        ("lacks CREATEDB or CREATEROLE", "ALTER ROLE {provisioner} NOCREATEDB", "ALTER ROLE {provisioner} CREATEDB", ELSEWHERE),
        ("lacks CREATEDB or CREATEROLE", "ALTER ROLE {provisioner} NOCREATEROLE", "ALTER ROLE {provisioner} CREATEROLE", ELSEWHERE),
        ("lacks pg_signal_backend", "REVOKE pg_signal_backend FROM {provisioner}", "GRANT pg_signal_backend TO {provisioner}", ELSEWHERE),
        (
            "the template tenantdb_tpl is missing",
            "ALTER DATABASE tenantdb_tpl RENAME TO elsewhere",
            "ALTER DATABASE elsewhere RENAME TO tenantdb_tpl",
            ELSEWHERE,
        ),
        (
            "accepts connections or is no template",
            "ALTER DATABASE tenantdb_tpl ALLOW_CONNECTIONS true",
            "ALTER DATABASE tenantdb_tpl ALLOW_CONNECTIONS false",
            ELSEWHERE,
        ),
        (
            "accepts connections or is no template",
            "ALTER DATABASE tenantdb_tpl IS_TEMPLATE false",
            "ALTER DATABASE tenantdb_tpl IS_TEMPLATE true",
            ELSEWHERE,
        ),
        *(
            (
                f"PUBLIC may connect to database {name}",
                f"GRANT CONNECT ON DATABASE {name} TO PUBLIC",
                f"REVOKE CONNECT ON DATABASE {name} FROM PUBLIC",
                ELSEWHERE,
            )
            for name in ("postgres", "template1")
        ),
        (
            "PUBLIC may connect to the registry's database",
            "GRANT CONNECT ON DATABASE {registry} TO PUBLIC",
            "REVOKE CONNECT ON DATABASE {registry} FROM PUBLIC",
            ELSEWHERE,
        ),
        (
            "may UPDATE the audit log",
            f"GRANT UPDATE ON tenantdb_audit TO {APP}",
            f"REVOKE UPDATE ON tenantdb_audit FROM {APP}",
            "{registry}",
        ),
        (
            "may read the tenants' owner secrets",
            f"GRANT SELECT ON tenantdb_tenants TO {APP}",
            f"REVOKE SELECT ON tenantdb_tenants FROM {APP}",
            "{registry}",
        ),
        (
            "may write database of tenants",
            f"GRANT UPDATE (database) ON tenantdb_tenants TO {APP}",
            f"REVOKE UPDATE (database) ON tenantdb_tenants FROM {APP}",
            "{registry}",
        ),
    ],
)
def test_check_reports_what_stands_open_on_server_and_registry(world: World, finding: str, fault: str, repair: str, database: str) -> None:
    with world.changed(fault, repair, database):
        assert [text for text in world.check() if finding in text] != []

    if database == "{registry}":
        world.db.init()  # a REVOKE of a table's right takes the columns' rights with it
    assert world.check() == []


def test_a_registry_with_one_login_is_named(world: World) -> None:
    with world.cluster.tenantdb(world.registry, admin=False, url=world.cluster.server.url(ADMIN, ADMIN_PASSWORD, world.registry)) as db:
        assert any("one login serves and owns the registry" in finding.text for finding in db.check())


# -- walls that only seem to be built --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "sqlstate"),
    [("REVOKE ALL ON DATABASE postgres FROM PUBLIC", "01006"), ("GRANT CONNECT ON DATABASE postgres TO PUBLIC", "01007")],
)
def test_a_revoke_or_grant_that_the_server_only_warns_about_is_an_error(world: World, statement: str, sqlstate: str) -> None:
    warned: list[str | None] = []
    with psycopg.connect(world.cluster.provisioner_url(), autocommit=True) as connection:
        connection.add_notice_handler(lambda diagnostic: warned.append(diagnostic.sqlstate))
        with pytest.raises(HardeningFailed, match="no privileges"):
            _run(connection, sql.Composed([sql.SQL(statement)]))
        connection.execute(statement.encode())  # psycopg by itself is content

    assert warned == [sqlstate, sqlstate]


def test_provisioning_stops_where_public_could_not_be_shut_out(world: World) -> None:
    def owned_by_another(workshop: PostgreSQLWorkshop, tenant: Tenant) -> None:
        world.cluster.sql(f"ALTER DATABASE {tenant.database} OWNER TO postgres")

    with meanwhile(PostgreSQLWorkshop, "open_database", owned_by_another):
        with pytest.raises(ProvisioningError, match="InsufficientPrivilege"):
            world.db.provision("stark")
    tenant = world.db.tenants.get("stark")
    with pytest.raises(psycopg.OperationalError, match="not currently accepting connections"):
        world.cluster.sql("SELECT 1", database=str(tenant.database))  # nobody could enter meanwhile

    world.cluster.sql(f"ALTER DATABASE {tenant.database} OWNER TO {PROVISIONER}")
    assert world.db.provision("stark").state is TenantState.ACTIVE


# -- the way in ------------------------------------------------------------------------------------------------------------------------


def opened(world: World, slug: str) -> str:
    """What a process that has just started reads from the tenant's stamp."""
    with world.cluster.tenantdb(world.registry) as fresh, fresh.session(slug) as session:
        return str(session.execute(text("SELECT tenant_id FROM tenantdb.identity")).scalar())


def test_a_login_that_became_a_superuser_is_refused(world: World) -> None:
    with world.changed("ALTER ROLE {runtime} SUPERUSER", "ALTER ROLE {runtime} NOSUPERUSER", ELSEWHERE):
        with pytest.raises(WrongDatabase, match="superuser"):
            opened(world, "acme")

    assert opened(world, "acme") == str(world.acme.id)


def test_a_database_that_took_anothers_name_is_refused(world: World) -> None:
    ours, theirs = world.acme.database, world.globex.database
    rename = [
        f"ALTER DATABASE {ours} RENAME TO held",
        f"ALTER DATABASE {theirs} RENAME TO {ours}",
        f"ALTER DATABASE held RENAME TO {theirs}",
    ]
    grant = f"GRANT CONNECT ON DATABASE {ours} TO {world.acme.runtime_role}"  # or the server would refuse before we could
    revoke = f"REVOKE CONNECT ON DATABASE {ours} FROM {world.acme.runtime_role}"
    world.db._engines.forget(world.acme.id)
    world.db._engines.forget(world.globex.id)
    for statement in [*rename, grant]:
        world.cluster.sql(statement)
    try:
        with pytest.raises(WrongDatabase):
            opened(world, "acme")
    finally:
        for statement in [revoke, *rename]:
            world.cluster.sql(statement)

    assert opened(world, "acme") == str(world.acme.id)


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE tenantdb_tenants SET runtime_secret = (SELECT runtime_secret FROM tenantdb_tenants WHERE slug = 'globex')",
        "UPDATE tenantdb_tenants SET runtime_secret = owner_secret WHERE slug = 'acme'",
        "UPDATE tenantdb_tenants SET database = 't_0123456789abcdef' WHERE slug = 'acme'",
        "UPDATE tenantdb_tenants SET runtime_role = 't_0123456789abcdef' WHERE slug = 'acme'",
        "UPDATE tenantdb_tenants SET runtime_secret = NULL WHERE slug = 'acme'",
        "UPDATE tenantdb_tenants SET runtime_secret = set_byte(runtime_secret, 40, 255 - get_byte(runtime_secret, 40)) WHERE slug = 'acme'",
        "UPDATE tenantdb_servers SET host = 'localhost' WHERE name = 'default'",
        "UPDATE tenantdb_servers SET port = 5432 WHERE name = 'default'",
    ],
)
def test_an_edited_registry_row_leads_to_no_connection(world: World, edit: str) -> None:
    name = world.cluster.copy_registry(world.registry)
    world.cluster.sql(edit, database=name)

    with world.cluster.tenantdb(name) as db, db.session("acme") as session, pytest.raises(CredentialTampered):
        session.execute(text("SELECT 1"))
