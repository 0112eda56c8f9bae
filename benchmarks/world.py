"""A real PostgreSQL with a bootstrapped provisioner, for as long as a benchmark runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from tenantdb import TenantDB
from tenantdb.backends.postgresql.bootstrap import bootstrap
from tenantdb.registry.secrets import generate_key
from tenantdb.settings import ConnectionURL
from tenantdb.testing.postgres import EmbeddedServer


@contextmanager
def embedded_db() -> Iterator[TenantDB]:
    """An initialised `TenantDB` on a cluster of its own, with one login for the registry."""
    with EmbeddedServer() as server:
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("CREATE ROLE central LOGIN PASSWORD 'central'")
            connection.execute("CREATE DATABASE central OWNER central")
        db = TenantDB(
            server.url("central", "central", "central"), server=server.url("provisioner", "provisioner"), secret_keys=[generate_key()]
        )
        bootstrap(ConnectionURL.parse(server.url()), "provisioner", "provisioner", db.settings)
        db.init()
        with db:
            yield db
