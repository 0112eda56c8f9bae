"""Fixtures for the tests of an application: real tenants, each in a database of its own, in a few lines.

    pytest_plugins = ["tenantdb.testing.plugin"]         # in the top conftest.py

    @pytest.fixture(scope="session")
    def tenant_db_app():
        from clinic.db import db                         # its settings, seeds and hooks hold for the tests too
        return db

    def test_a_patient_is_found(tenant_session):
        tenant_session.add(Patient(name="Ann"))
        ...

``pytest`` runs it on SQLite; ``pytest --tenantdb=postgresql`` on a PostgreSQL that is started for the run (``tenantdb[embedded]``);
``--tenantdb=postgresql://user:password@host/postgres`` on a server that is there. That login must be allowed to create databases and roles;
what the fixtures made on the server is dropped at the end.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy.engine import URL, make_url
from sqlalchemy.orm import Session

from tenantdb.database import TenantDB
from tenantdb.model import Tenant, TenantState
from tenantdb.registry.secrets import generate_key
from tenantdb.settings import ConnectionURL, Settings

_PLACE = frozenset({"url", "registry_admin", "server", "servers", "secret_keys", "hardening"})
"""What says where an application's databases are: never taken over from the application, whose own databases tests must not touch."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("tenantdb").addoption(
        "--tenantdb",
        default="sqlite",
        metavar="sqlite|postgresql|URL",
        help="where test tenants live: SQLite files, a PostgreSQL started for the run, or the server at a postgresql:// URL",
    )


@pytest.fixture(scope="session")
def tenant_db_app() -> TenantDB | None:
    """Override it to return the application's `TenantDB`: its session class, settings, seeds and hooks are used, its databases are not."""
    return None


@pytest.fixture(scope="session")
def tenant_db_settings() -> dict[str, Any]:
    """Override it to give further settings, such as ``{"migrations": "clinic:migrations"}``. They win over those of `tenant_db_app`."""
    return {}


@pytest.fixture(scope="session")
def tenant_db(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tenant_db_app: TenantDB | None,
    tenant_db_settings: dict[str, Any],
) -> Iterator[TenantDB]:
    """A `TenantDB` for the whole run, with an initialised registry of its own."""
    where: str = request.config.getoption("--tenantdb")
    with _place(where, tmp_path_factory) as place, _make(place, tenant_db_app, tenant_db_settings) as db:
        db.init()
        try:
            yield db
        finally:
            _discard(db, db.tenants.list())
            _discard_what_was_made_ahead(db)


@pytest.fixture
def tenant(tenant_db: TenantDB) -> Iterator[Tenant]:
    """A new tenant, migrated and seeded; its database is dropped at the end.

    Override it with a wider scope where making one for each test takes too long: `tenant_session` still leaves nothing behind in it.
    """
    tenant = tenant_db.provision(f"test-{secrets.token_hex(6)}")
    yield tenant
    _discard(tenant_db, [tenant_db.tenants.get(tenant)])


@pytest.fixture
def tenant_session(tenant_db: TenantDB, tenant: Tenant) -> Iterator[Session]:
    """A session of the application's class on the tenant's database. Whatever the code under test commits in it is rolled back at the end.

    ``commit()`` ends a savepoint inside an outer transaction. Sessions that the code opens itself are others, and theirs is committed.
    """
    options = {**tenant_db.session_options, "join_transaction_mode": "create_savepoint"}
    with tenant_db.connect(tenant) as connection:
        connection.begin()  # never committed: closing the connection rolls it back
        with tenant_db.session_class(bind=connection, **options) as session:
            yield session


def _make(place: dict[str, Any], app: TenantDB | None, settings: dict[str, Any]) -> TenantDB:
    if app is None:
        return TenantDB(**{**settings, **place})
    taken = {name: getattr(app.settings, name) for name in app.settings.model_fields_set - _PLACE}
    db = TenantDB(**{**taken, **settings, **place}, session_class=app.session_class, session_options=app.session_options)
    db._hooks.extend(app._hooks)
    return db


@contextmanager
def _place(where: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The settings that say where the databases are, for as long as they are there."""
    if where == "sqlite":
        yield {"url": f"sqlite:///{tmp_path_factory.mktemp('tenantdb') / 'central.sqlite3'}"}
    elif where == "postgresql":
        from tenantdb.testing.postgres import EmbeddedServer

        with EmbeddedServer(fsync=False) as server:
            yield _prepared(server.url())
    elif where.startswith("postgres"):
        with _borrowed(where) as place:
            yield place
    else:
        raise pytest.UsageError(f"--tenantdb takes sqlite, postgresql or a postgresql:// URL, not {where.partition('://')[0]!r}")


def _prepared(superuser: str) -> dict[str, Any]:
    """A server of our own as production should be: two registry logins, and a provisioner that is no superuser."""
    from psycopg import sql

    from tenantdb.backends.postgresql.bootstrap import bootstrap

    passwords = {name: secrets.token_urlsafe(24) for name in ("app", "admin", "provisioner")}
    key, database = generate_key(), "central"
    settings = Settings(url=superuser, secret_keys=[key])
    bootstrap(settings.url, "provisioner", passwords["provisioner"], settings, iterations=settings.scram_iterations)
    with _login(settings.url, settings) as connection:
        for name in ("app", "admin"):
            connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), sql.Literal(passwords[name])))
        connection.execute(f"CREATE DATABASE {database} OWNER admin")
        connection.execute(f"REVOKE ALL ON DATABASE {database} FROM PUBLIC")
        connection.execute(f"GRANT CONNECT ON DATABASE {database} TO app")
    server = make_url(superuser)

    def url(name: str, database: str) -> URL:
        return URL.create("postgresql", name, passwords[name], server.host, server.port, database)

    return {
        "url": url("app", database),
        "registry_admin": url("admin", database),
        "server": url("provisioner", "postgres"),
        "secret_keys": [key],
    }


@contextmanager
def _borrowed(login: str) -> Iterator[dict[str, Any]]:
    """A registry of our own on somebody's server, which is left as it was: so nothing of the cluster is hardened."""
    from psycopg import sql

    database, key = f"tenantdb_test_{secrets.token_hex(4)}", generate_key()
    settings = Settings(url=login, secret_keys=[key])
    name = sql.Identifier(database)
    with _login(settings.url, settings) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(name))
        connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(name))
    try:
        yield {"url": make_url(login).set(database=database), "server": login, "secret_keys": [key], "hardening": "managed"}
    finally:
        with _login(settings.url, settings) as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


def _login(url: ConnectionURL, settings: Settings) -> Any:
    from tenantdb.backends.postgresql.connect import provisioner_connection

    return provisioner_connection(url, settings, "tests")


def _discard(db: TenantDB, tenants: list[Tenant]) -> None:
    """Purge tenants in whatever state a test has left them, without the application's hooks: what they forbid must go too."""
    with _without_hooks(db):
        for tenant in tenants:
            if tenant.state is TenantState.PROVISIONING:
                db.work()
                tenant = db.tenants.get(tenant.id)
            if tenant.legal_hold is not None:
                db.release(tenant.id)
            if tenant.state not in {TenantState.DELETED, TenantState.PURGING, TenantState.PURGED}:
                tenant = db.delete(tenant.id)
            if tenant.state is not TenantState.PURGED:
                db.purge(tenant.id, confirm=str(tenant.id), immediately=True)


def _discard_what_was_made_ahead(db: TenantDB) -> None:
    """Spares and golden databases."""
    with _without_hooks(db):
        db.spares.drain()
        golden, shop = db._runner.shop.golden, db._runner.shop
        for server in db.servers.list():
            for template in db._registry.templates.list(server):
                db._registry.templates.retire(template)
            with shop.workshop(server) as workshop:
                golden.drop_retired(server, workshop)


@contextmanager
def _without_hooks(db: TenantDB) -> Iterator[None]:
    hooks = db._hooks
    kept, hooks._hooks = hooks._hooks, {event: [] for event in hooks._hooks}
    try:
        yield
    finally:
        hooks._hooks = kept
