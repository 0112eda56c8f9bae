"""On PostgreSQL the registry's serving login can do its work and nothing beyond it, and the history makes there what the code expects."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from psycopg import sql
from psycopg.errors import InsufficientPrivilege
from sqlalchemy import Engine

from tenantdb.backends.postgresql import PostgreSQL
from tenantdb.errors import HardeningFailed, RegistryError, TenantNotFound
from tenantdb.model import NewUser, TenantState
from tenantdb.registry import Keyring, Registry, SignUp, schema, tables
from tenantdb.registry.operations import SANCTIONED
from tenantdb.registry.secrets import generate_key
from tenantdb.settings import ConnectionURL, Settings
from tenantdb.testing.postgres import EmbeddedServer

KEY = generate_key()
APP, ADMIN = 'wall "app" %s', "wall_admin"  # names that must be quoted
PASSWORD = secrets.token_urlsafe(16)


@dataclass(frozen=True)
class Central:
    """One registry database with its two logins."""

    server: EmbeddedServer
    database: str

    def settings(self, **overrides: str) -> Settings:
        url, admin = (self.server.url(login, PASSWORD, self.database) for login in (APP, ADMIN))
        return Settings(**{"url": url, "registry_admin": admin, "secret_keys": [KEY], **overrides})

    @contextmanager
    def engine(self, login: str) -> Iterator[Engine]:
        settings = self.settings()
        engine = PostgreSQL().registry_engine(ConnectionURL.parse(self.server.url(login, PASSWORD, self.database)), settings)
        try:
            yield engine
        finally:
            engine.dispose()

    @contextmanager
    def registry(self) -> Iterator[Registry]:
        with self.engine(APP) as app, self.engine(ADMIN) as admin:
            yield Registry(app, admin, self.settings(), Keyring([KEY]))

    @contextmanager
    def sql(self, login: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
        """Raw SQL as a login, rolled back at the end."""
        with psycopg.connect(self.server.url(login, PASSWORD, self.database)) as connection:
            try:
                yield connection
            finally:
                connection.rollback()


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(fsync=False) as server:
        with psycopg.connect(server.url(), autocommit=True) as superuser:
            for name in (APP, ADMIN):
                role = sql.Identifier(name)
                superuser.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(role, PASSWORD))
        yield server


@pytest.fixture
def central(server: EmbeddedServer) -> Iterator[Central]:
    name = f"central_{secrets.token_hex(4)}"
    with psycopg.connect(server.url(), autocommit=True) as superuser:
        superuser.execute(f"CREATE DATABASE {name} OWNER {ADMIN}")
        superuser.execute(f"REVOKE ALL ON DATABASE {name} FROM PUBLIC")
        superuser.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO {}").format(sql.Identifier(name), sql.Identifier(APP)))
        yield Central(server, name)
        superuser.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def walled(central: Central) -> Central:
    with central.registry() as registry:
        registry.init()
    return central


def test_the_history_makes_the_tables_that_the_code_knows(walled: Central) -> None:
    with walled.engine(ADMIN) as engine, engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": tables.VERSION_TABLE, "compare_type": True})
        assert compare_metadata(context, tables.metadata) == []


def test_the_serving_login_signs_up_signs_in_suspends_and_logs(walled: Central) -> None:
    with walled.engine(APP) as app:
        web = Registry(app, app, walled.settings(), Keyring(Keyring([KEY]).derive("runtime")))
        owner = NewUser(email="ada@example.org", password="correct horse")
        tenant, operation = web.sign_up(SignUp(slug="acme", owner=owner, idempotency_key="key"))
        user = web.users.authenticate("ada@example.org", "correct horse")
        assert web.memberships.get(user, tenant).tenant_id == tenant.id
        token, _ = web.refresh_tokens.rotate(web.refresh_tokens.create(user, tenant))
        web.refresh_tokens.revoke(token)
        active = web.tenants.transition(tenant, TenantState.ACTIVE, action="tenant.activate")
        web.tenants.transition(active, TenantState.SUSPENDED, action="tenant.suspend", bump_generation=True)
        web.tenants.update(tenant, plan="pro")
        web.users.delete(user)
        assert web.lookup("acme").tenant.state is TenantState.SUSPENDED
        assert len(web.audit.list(tenant)) >= 6
        assert web.open_doors() == []
        claimed = web.operations.claim(operation.id, "w", timedelta(minutes=1))  # it takes spares, and seeds them itself
        assert claimed is not None
        web.operations.finish(web.operations.record(claimed, "seed"))
        for forbidden in (
            lambda: web.tenants.owner_secrets(tenant.id),
            lambda: web.tenants.set_revision(tenant, "0001"),
            lambda: web.servers.add("evil", backend="postgresql", host="evil"),
        ):
            with pytest.raises(RegistryError, match="registry_admin"):
                forbidden()


FORBIDDEN = [
    "INSERT INTO tenantdb_operations (id, sanctioned) VALUES (gen_random_uuid(), true)",
    "UPDATE tenantdb_operations SET sanctioned = true",
    "UPDATE tenantdb_operations SET kind = 'import'",
    "UPDATE tenantdb_operations SET payload = '{}'",
    "SELECT owner_secret FROM tenantdb_tenants",
    "SELECT owner_secret_pending FROM tenantdb_tenants",
    "SELECT * FROM tenantdb_tenants",
    *(
        f"UPDATE tenantdb_tenants SET {column} = NULL"
        for column in (
            "id",
            "server_id",
            "database",
            "owner_role",
            "runtime_role",
            "owner_secret",
            "runtime_secret",
            "owner_secret_pending",
            "runtime_secret_pending",
            "legal_hold",
            "purged_at",
            "certificate",
            "revision",
            "adopted_from",
        )
    ),
    "INSERT INTO tenantdb_tenants (id, database) VALUES (gen_random_uuid(), 'x')",
    "DELETE FROM tenantdb_tenants",
    "UPDATE tenantdb_audit SET actor = 'somebody else'",
    "DELETE FROM tenantdb_audit",
    "TRUNCATE tenantdb_audit",
    "INSERT INTO tenantdb_audit (id, at, actor, action, outcome, details) OVERRIDING SYSTEM VALUE VALUES (1, now(), 'a', 'b', 'c', '{}')",
    *(
        f"UPDATE tenantdb_operations SET {column} = NULL"
        for column in ("id", "kind", "tenant_id", "idempotency_key", "request_hash", "payload", "created_at")
    ),
    "DELETE FROM tenantdb_operations",
    "UPDATE tenantdb_servers SET host = 'evil'",
    "INSERT INTO tenantdb_servers (id) VALUES (gen_random_uuid())",
    "UPDATE tenantdb_templates SET database = 'x'",
    "INSERT INTO tenantdb_templates (id) VALUES (gen_random_uuid())",
    "SELECT 1 FROM tenantdb_rollouts",
    "UPDATE tenantdb_rollouts SET target = ''",
    "INSERT INTO tenantdb_rollouts (id) VALUES (gen_random_uuid())",
    "SELECT 1 FROM tenantdb_rollout_attempts",
    "UPDATE tenantdb_rollout_attempts SET state = 'waiting'",
    "INSERT INTO tenantdb_rollout_attempts (rollout_id) VALUES (gen_random_uuid())",
    "DELETE FROM tenantdb_rollout_attempts",
    "UPDATE tenantdb_meta SET oldest_reader = '9999'",
    "DELETE FROM tenantdb_alembic_version",
    "DROP TABLE tenantdb_audit",
    "ALTER TABLE tenantdb_audit DISABLE TRIGGER ALL",
    "GRANT SELECT ON tenantdb_tenants TO PUBLIC",
]


@pytest.mark.parametrize("statement", FORBIDDEN)
def test_the_serving_login_may_not(walled: Central, statement: str) -> None:
    with walled.sql(APP) as app:
        with pytest.raises(InsufficientPrivilege):
            app.execute(statement)


def test_a_door_left_open_is_found_and_closed_by_the_next_init(walled: Central) -> None:
    role = sql.Identifier(APP)
    with psycopg.connect(walled.server.url(ADMIN, PASSWORD, walled.database), autocommit=True) as admin:
        for grant in (
            "ALL ON tenantdb_audit",
            "SELECT (owner_secret), SELECT (owner_secret_pending), UPDATE (database), UPDATE (legal_hold) ON tenantdb_tenants",
            "UPDATE ON tenantdb_tenants",
        ):
            admin.execute(sql.SQL("GRANT " + grant + " TO {}").format(role))
    with walled.registry() as registry:
        found = registry.open_doors()
        assert any("UPDATE the audit log" in text for text in found)
        assert len([text for text in found if "owner secrets" in text]) == 1
        assert any("write database" in text for text in found)
        assert any("write legal_hold" in text for text in found)
        registry.init()
        assert registry.open_doors() == []


def test_the_login_that_owns_the_tables_is_seen_to_have_no_walls(walled: Central) -> None:
    with walled.engine(ADMIN) as engine, engine.connect() as connection:
        assert [text for text in schema.open_doors(connection, ADMIN) if "it owns the audit log too" in text]
        assert schema.open_doors(connection, APP) == []


def test_a_login_that_cannot_be_walled_in_is_refused(central: Central) -> None:
    settings = central.settings()
    app = PostgreSQL().registry_engine(ConnectionURL.parse(central.server.url(database=central.database)), settings)
    with central.engine(ADMIN) as admin, pytest.raises(HardeningFailed, match="it owns the audit log too"):
        Registry(app, admin, settings, Keyring([KEY])).init()
    app.dispose()


def test_many_processes_may_init_at_once(central: Central) -> None:
    barrier = threading.Barrier(3)

    def init() -> None:
        with central.registry() as registry:
            barrier.wait(10)
            registry.init()

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(init) for _ in range(3)]:
            done.result(60)
    with central.registry() as registry, pytest.raises(TenantNotFound):
        registry.lookup(uuid4())


def test_workers_step_over_an_operation_that_another_is_taking(walled: Central) -> None:
    with walled.registry() as registry:
        first, _ = registry.sign_up(SignUp(slug="acme"))
        second, _ = registry.sign_up(SignUp(slug="beta"))
        with walled.sql(ADMIN) as admin:
            admin.execute("SELECT 1 FROM tenantdb_tenants WHERE id = %s FOR UPDATE", [first.id])
            taken = registry.operations.claim_next("w1", timedelta(minutes=1))
            assert taken is not None
            assert taken.tenant_id == second.id
            assert registry.operations.claim_next("w1", timedelta(minutes=1)) is None
        free = registry.operations.claim_next("w1", timedelta(minutes=1))
        assert free is not None
        assert free.tenant_id == first.id


@pytest.mark.parametrize("kind", sorted(SANCTIONED))
def test_no_worker_does_what_the_serving_login_alone_wrote_down(walled: Central, kind: str) -> None:
    """Or whoever took over a web process could have databases dropped, loaded and taken over."""
    minute = timedelta(minutes=1)
    with walled.registry() as registry:
        tenant, _ = registry.sign_up(SignUp(slug="acme"))
        with registry.admin_write() as connection:
            own = registry.operations.create(connection, kind, tenant.id)
        with walled.sql(APP) as app:
            forged = app.execute(
                "INSERT INTO tenantdb_operations"
                " (id, kind, tenant_id, request_hash, state, started, attempt, payload, created_at, updated_at)"
                " SELECT gen_random_uuid(), kind, tenant_id, request_hash, 'pending', true, 1, payload, created_at, updated_at"
                " FROM tenantdb_operations WHERE id = %s RETURNING id",
                [own.id],
            ).fetchone()
            app.commit()
        assert forged is not None
        assert registry.operations.claim(forged[0], "w", minute) is None
        claimed = registry.operations.claim_next("w", minute, kinds=[kind])
        assert claimed is not None and claimed.id == own.id
        registry.operations.finish(claimed)
        with walled.sql(APP) as app:  # what is done is not done again
            app.execute("UPDATE tenantdb_operations SET state = 'pending'")
            app.commit()
        assert registry.operations.claim(own.id, "w", minute) is None
        assert registry.operations.claim_next("w", minute, kinds=[kind]) is None
