"""A bootstrapped PostgreSQL server and what tests need of it: registries with two logins, and SQL as anybody."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from tenantdb import TenantDB
from tenantdb.backends.postgresql import scram
from tenantdb.backends.postgresql.bootstrap import TEMPLATE, bootstrap
from tenantdb.model import DatabaseRole, Tenant
from tenantdb.registry.secrets import generate_key
from tenantdb.settings import ConnectionURL, Settings
from tenantdb.testing import EmbeddedServer

KEY = generate_key()
PROVISIONER, PROVISIONER_PASSWORD = "tenantdb_prov", secrets.token_urlsafe(24)
APP, APP_PASSWORD = "registry_app", secrets.token_urlsafe(24)
ADMIN, ADMIN_PASSWORD = "registry_admin", secrets.token_urlsafe(24)
_MADE = "registry_made"  # initialised once; each test's registry is a clone of it


@dataclass(frozen=True)
class Cluster:
    """One server of the session, bootstrapped, with the logins of registry and provisioner."""

    server: EmbeddedServer

    def prepare(self, *, bootstrapped: bool = False) -> None:
        if not bootstrapped:
            bootstrap(ConnectionURL.parse(self.server.url()), PROVISIONER, PROVISIONER_PASSWORD, self.settings())
        for name, password in ((APP, APP_PASSWORD), (ADMIN, ADMIN_PASSWORD)):
            self.sql(f"CREATE ROLE {name} LOGIN PASSWORD '{scram.verifier(password)}'")
        self._make_registry(_MADE, "template0")
        with self.tenantdb(_MADE) as db:
            db.init()

    def settings(self, **options: Any) -> Settings:
        return Settings(url=self.server.url(), secret_keys=[KEY], **options)

    def new_registry(self) -> str:
        """A fresh, initialised registry: the name of its database."""
        name = f"registry_{secrets.token_hex(4)}"
        self._make_registry(name, _MADE)
        return name

    def copy_registry(self, registry: str) -> str:
        """A copy of a registry as it is now, to do damage to. Nobody may be connected to it."""
        name = f"registry_{secrets.token_hex(4)}"
        self.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [registry])
        self._make_registry(name, registry)
        return name

    def _make_registry(self, name: str, template: str) -> None:
        self.sql(f"CREATE DATABASE {name} TEMPLATE {template} OWNER {ADMIN}")
        self.sql(f"REVOKE ALL ON DATABASE {name} FROM PUBLIC")
        self.sql(f"GRANT CONNECT ON DATABASE {name} TO {APP}")

    def tenantdb(self, registry: str, *, admin: bool = True, provisioner: bool = True, **options: Any) -> TenantDB:
        """Two logins and a provisioner; without them it is what a web process has."""
        given = self.tenantdb_arguments(registry)
        left_out = {name for name, wanted in (("registry_admin", admin), ("server", provisioner)) if not wanted}
        return TenantDB(**{name: value for name, value in given.items() if name not in left_out} | {"secret_keys": [KEY]} | options)

    def tenantdb_arguments(self, registry: str) -> dict[str, Any]:
        return {
            "url": self.server.url(APP, APP_PASSWORD, registry),
            "registry_admin": self.server.url(ADMIN, ADMIN_PASSWORD, registry),
            "server": self.provisioner_url(),
        }

    def provisioner_url(self, password: str = PROVISIONER_PASSWORD) -> str:
        return self.server.url(PROVISIONER, password)

    def sql(self, statement: str, parameters: Sequence[Any] | None = None, *, database: str = "postgres") -> list[tuple[Any, ...]]:
        """As the superuser."""
        return ask(self.server.url(database=database), statement, parameters)

    @contextmanager
    def server_session(self) -> Iterator[psycopg.Connection[Any]]:
        """A session of the superuser, open for a while."""
        with psycopg.connect(self.server.url(), autocommit=True) as connection:
            yield connection

    @contextmanager
    def template(self) -> Iterator[psycopg.Connection[Any]]:
        """The tenants' template, opened for its superuser as the operator's handbook says."""
        self.sql(f"ALTER DATABASE {TEMPLATE} ALLOW_CONNECTIONS true")
        try:
            with psycopg.connect(self.server.url(database=TEMPLATE), autocommit=True) as connection:
                yield connection
        finally:
            self.sql(f"ALTER DATABASE {TEMPLATE} ALLOW_CONNECTIONS false")

    def databases(self) -> set[str]:
        return {name for (name,) in self.sql("SELECT datname FROM pg_database WHERE datname LIKE 't\\_%'")}

    def roles(self) -> set[str]:
        return {name for (name,) in self.sql("SELECT rolname FROM pg_roles WHERE rolname LIKE 't\\_%'")}

    @property
    def version(self) -> int:
        return int(self.sql("SHOW server_version_num")[0][0])


@dataclass(frozen=True)
class Login:
    """A tenant's database password as an attacker has it: no library between him and the server."""

    cluster: Cluster
    name: str
    password: str
    database: str

    def ask(self, statement: str, parameters: Sequence[Any] | None = None, *, database: str | None = None) -> list[tuple[Any, ...]]:
        url = self.cluster.server.url(self.name, self.password, database or self.database)
        return ask(url, statement, parameters)


def login(cluster: Cluster, db: TenantDB, tenant: Tenant, role: DatabaseRole) -> Login:
    record = db._registry.lookup(tenant.id)
    if role is DatabaseRole.OWNER:
        return Login(cluster, str(tenant.owner_role), db._registry.owner_password(record), str(tenant.database))
    return Login(cluster, str(tenant.runtime_role), db._registry.runtime_password(record), str(tenant.database))


def ask(url: str, statement: str, parameters: Sequence[Any] | None = None) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        cursor = connection.execute(statement.encode(), parameters)
        return cursor.fetchall() if cursor.description else []


def end_lease(cluster: Cluster, registry: str) -> None:
    """What time does to the lease of a worker that is dead."""
    cluster.sql("UPDATE tenantdb_operations SET lease_until = now() - interval '1 second' WHERE state = 'running'", database=registry)


ENV = """
from types import SimpleNamespace

from tenantdb.migrations import run_env

run_env(SimpleNamespace(migrations=None), target_metadata=None)
"""
REVISION = """
from alembic import op

revision, down_revision, branch_labels, depends_on = {revision!r}, {down!r}, None, None


def upgrade() -> None:
    for statement in {statements!r}:
        op.execute(statement)
"""


class Scripts:
    """A script location that grows, breaks and is mended under a test's hands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "versions").mkdir(parents=True)
        (folder / "env.py").write_text(ENV)
        self._head: str | None = None

    def __str__(self) -> str:
        return str(self.folder)

    def add(self, revision: str, *statements: str) -> None:
        self.write(revision, self._head, *statements)
        self._head = revision

    def write(self, revision: str, down: str | None, *statements: str) -> None:
        text = REVISION.format(revision=revision, down=down, statements=list(statements))
        (self.folder / "versions" / f"{revision}.py").write_text(text)
