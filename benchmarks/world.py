"""A real PostgreSQL with a bootstrapped provisioner, for as long as a benchmark runs; and tenants by the hundred, cheaply."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
from psycopg import sql
from sqlalchemy import URL, Text, insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks.peers import Login
from tenantdb import Tenant, TenantDB
from tenantdb.backends.postgresql import scram
from tenantdb.backends.postgresql.bootstrap import bootstrap
from tenantdb.backends.postgresql.connect import session_options, transport
from tenantdb.model import DatabaseRole
from tenantdb.registry import tables
from tenantdb.registry.secrets import generate_key, password
from tenantdb.settings import ConnectionURL
from tenantdb.testing.postgres import EmbeddedServer

MEMORY = Path("/dev/shm")
ROOM = 8 << 30  # bytes; a database takes 8 MB


@dataclass(frozen=True)
class World:
    """A server, and what makes a `TenantDB` on it: call `open` for one more process's view of the same registry."""

    server: EmbeddedServer
    arguments: Mapping[str, Any]

    def open(self, **overrides: Any) -> TenantDB:
        return TenantDB(**{**self.arguments, **overrides})


@contextmanager
def embedded_world(server_settings: Mapping[str, str] | None = None, *, fsync: bool = True, **overrides: Any) -> Iterator[World]:
    """An initialised registry on a cluster of its own, with one login for it. ``overrides`` are arguments of every `TenantDB` on it."""
    with EmbeddedServer(settings=server_settings, fsync=fsync) as server:
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("CREATE ROLE central LOGIN PASSWORD 'central'")
            connection.execute("CREATE DATABASE central OWNER central")
        drawn = password()
        arguments = {
            "url": server.url("central", "central", "central"),
            "server": server.url("provisioner", drawn),
            "secret_keys": [generate_key()],
        }
        world = World(server, {**arguments, **overrides})
        with world.open() as db:
            bootstrap(ConnectionURL.parse(server.url()), "provisioner", drawn, db.settings, iterations=db.settings.scram_iterations)
            db.init()
        yield world


@contextmanager
def embedded_db(server_settings: Mapping[str, str] | None = None, *, fsync: bool = True, **overrides: Any) -> Iterator[TenantDB]:
    """One `TenantDB` on an `embedded_world`."""
    with embedded_world(server_settings, fsync=fsync, **overrides) as world, world.open() as db:
        yield db


@contextmanager
def temporary_files_in_memory() -> Iterator[None]:
    """Hundreds of databases go to memory where there is room: a disk would be measured otherwise, and 2 GB written to it."""
    before = tempfile.tempdir
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM:
        tempfile.tempdir = str(MEMORY)
    try:
        yield
    finally:
        tempfile.tempdir = before


def login_of(db: TenantDB, slug: str) -> Login:
    """What a user without tenantdb would keep of a tenant: its runtime role's login, with the options that ours connects with."""
    location = db._locator.locate(db._registry.lookup(slug), DatabaseRole.RUNTIME)
    tenant = location.tenant
    url = URL.create("postgresql+psycopg", tenant.runtime_role, None, location.host, location.port, tenant.database)
    options = transport(location.host, db.settings) | session_options(DatabaseRole.RUNTIME, db.settings)
    return Login(url, options | {"password": location.password()})


MARKERS = "CREATE TABLE markers (id integer PRIMARY KEY, name text NOT NULL)"


class Base(DeclarativeBase):
    pass


class Marker(Base):
    """The row that says whose database this is, as the application maps it."""

    __tablename__ = "markers"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(Text)


def provision_with_marker(db: TenantDB, slug: str) -> Tenant:
    """A tenant made as every tenant is made, with one row that says whose database this is: ``markers(id=1, name=slug)``."""
    db.provision(slug)
    with db.migrations.owner_connection(slug) as connection:
        connection.exec_driver_sql(MARKERS)
        connection.exec_driver_sql("INSERT INTO markers VALUES (1, %s)", (slug,))
        connection.commit()
    return db.tenants.get(slug)


def clone_tenants(world: World, db: TenantDB, model: Tenant, slugs: Sequence[str]) -> None:
    """Tenants whose databases are copies of ``model``'s, in a third of the time that provisioning takes.

    Each has a database, a runtime role and a password of its own, with the verifier that provisioning makes; the role gets its rights by
    membership in the model's runtime role. They can be served, not migrated: the owner's secret is missing.
    """
    with psycopg.connect(world.server.url(), autocommit=True) as superuser:
        superuser.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s", [model.database])
    with ThreadPoolExecutor(2) as threads:  # two: the server makes one database after another, and this machine may have two cores
        list(threads.map(lambda slug: _clone(world, db, model, slug), slugs))


def _clone(world: World, db: TenantDB, model: Tenant, slug: str) -> None:
    tenant_id, database, role, secret = uuid4(), f"t_{secrets.token_hex(8)}", f"t_{secrets.token_hex(8)}", password()
    server = db.servers.get(model.server or "default")
    with psycopg.connect(world.server.url(), autocommit=True) as superuser:
        for statement in (
            "CREATE ROLE {role} LOGIN INHERIT NOCREATEDB NOCREATEROLE IN ROLE {granted} PASSWORD {verifier}",
            "CREATE DATABASE {database} TEMPLATE {model}",
            "REVOKE ALL ON DATABASE {database} FROM PUBLIC",
            "GRANT CONNECT ON DATABASE {database} TO {role}",
            "ALTER DATABASE {database} OWNER TO {provisioner}",
            "GRANT {role} TO {provisioner} WITH ADMIN OPTION",  # as whoever creates a role has it since 16
        ):
            superuser.execute(
                sql.SQL(statement).format(
                    role=sql.Identifier(role),
                    provisioner=sql.Identifier(db.settings.provisioners[server.name].username or ""),
                    granted=sql.Identifier(model.runtime_role or ""),
                    database=sql.Identifier(database),
                    model=sql.Identifier(model.database or ""),
                    verifier=sql.Literal(scram.verifier(secret, iterations=db.settings.scram_iterations)),
                )
            )
    with psycopg.connect(world.server.url(database=database)) as inside:
        inside.execute("UPDATE tenantdb.identity SET tenant_id = %s", [tenant_id])
        inside.execute("UPDATE markers SET name = %s", [slug])
    with db._registry.admin_write() as connection:
        row = dict(connection.execute(select(tables.tenants).where(tables.tenants.c.id == model.id)).mappings().one())
        sealed = db._registry.seal_password(
            secret, role=DatabaseRole.RUNTIME, tenant=replace(model, id=tenant_id), server=server, database=database, role_name=role
        )
        row |= {"id": tenant_id, "slug": slug, "database": database, "runtime_role": role, "runtime_secret": sealed, "owner_secret": None}
        connection.execute(insert(tables.tenants).values(row))
