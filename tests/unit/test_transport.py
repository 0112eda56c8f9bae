"""Whoever is not on this machine gets no byte without verified TLS and SCRAM; which address counts is the one that is connected to."""

from __future__ import annotations

import uuid
from typing import Any, cast

import pytest

from tenantdb.backends import Location
from tenantdb.backends.postgresql import PostgreSQL
from tenantdb.backends.postgresql.connect import transport
from tenantdb.connections.locate import Locator
from tenantdb.errors import ConfigError
from tenantdb.model import DatabaseRole, Server, Tenant, TenantState
from tenantdb.registry import Registry, TenantRecord
from tenantdb.registry.secrets import generate_key
from tenantdb.settings import Settings

KEY = generate_key()
SAFE = {"sslmode": "verify-full", "sslrootcert": "system", "require_auth": "scram-sha-256"}


def settings(**more: Any) -> Settings:
    return Settings(url="postgresql://app@localhost/central", secret_keys=[KEY], **more)


@pytest.mark.parametrize(
    "host", ["db.example.org", "10.0.0.7", "2001:db8::1", "::ffff:127.0.0.1", "127.0.0.1.nip.io", "localhost.example.org", "0.0.0.0"]
)
def test_a_host_off_this_machine_gets_verified_tls_and_scram(host: str) -> None:
    assert SAFE.items() <= transport(host, settings()).items()


@pytest.mark.parametrize("host", [None, "localhost", "127.0.0.1", "127.0.0.53", "::1", "/run/postgresql"])
def test_this_machine_needs_none(host: str | None) -> None:
    assert SAFE.keys().isdisjoint(transport(host, settings()))


def test_a_url_adds_to_it_and_cannot_weaken_it() -> None:
    given = transport("db.example.org", settings(ssl_root_cert="ours.pem"), {"sslcert": "client.pem"})

    assert given.items() >= {**SAFE, "sslrootcert": "ours.pem", "sslcert": "client.pem"}.items()
    assert SAFE.keys().isdisjoint(transport("db.example.org", settings(insecure_transport=True)))


def test_an_old_libpq_that_cannot_insist_on_scram_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psycopg.pq.version", lambda: 150018)

    with pytest.raises(ConfigError, match="libpq is older than 16"):
        transport("db.example.org", settings())
    transport("localhost", settings())


@pytest.mark.parametrize("host", ["db.example.org", "localhost"])
def test_a_network_that_goes_silent_is_given_up_in_less_than_a_minute(host: str) -> None:
    given = transport(host, settings(), {"sslcert": "client.pem"})

    assert given.items() >= {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 30_000}.items()


class Looked(Exception):
    """The arguments have been seen; nothing needs to be opened."""


def location(role: DatabaseRole, **address: Any) -> Location:
    tenant = Tenant(
        id=uuid.uuid4(), slug="acme", name="Acme", state=TenantState.ACTIVE, database="t_0", owner_role="t_1", runtime_role="t_2"
    )
    server = Server(id=uuid.uuid4(), name="default", backend="postgresql", **address)
    return Location(tenant, server, role, lambda: "secret", lambda: None)


@pytest.mark.parametrize("remote", list(DatabaseRole), ids=str)
def test_a_pooler_on_this_machine_does_not_take_tls_from_the_way_to_the_server(
    monkeypatch: pytest.MonkeyPatch, remote: DatabaseRole
) -> None:
    near, far = ("localhost", 6432), ("db.example.org", 5432)
    runtime, direct = (far, near) if remote is DatabaseRole.RUNTIME else (near, far)
    address = {"host": runtime[0], "port": runtime[1], "direct_host": direct[0], "direct_port": direct[1]}
    asked: list[dict[str, Any]] = []

    def look(*_: Any, **arguments: Any) -> None:
        asked.append(arguments)
        raise Looked

    monkeypatch.setattr("tenantdb.backends.postgresql.wire.connect", look)
    dialect = PostgreSQL().template(settings(), is_async=False).dialect
    for role in DatabaseRole:
        with pytest.raises(Looked):
            PostgreSQL().open(dialect, location(role, **address), settings(), timeout=5)
        assert (asked[-1]["host"], asked[-1]["port"]) == (far if role is remote else near)
        assert (SAFE.items() <= asked[-1].items()) == (role is remote)


@pytest.mark.parametrize("role", list(DatabaseRole), ids=str)
def test_allowed_hosts_are_asked_about_the_address_that_is_connected_to(role: DatabaseRole) -> None:
    given = settings(allowed_hosts=["localhost"])
    for which in ("host", "direct_host"):
        address = {"host": "localhost", "direct_host": "localhost"} | {which: "169.254.169.254"}
        there = location(role, **address)
        record = TenantRecord(tenant=there.tenant, server=there.server)
        locator = Locator(cast(Registry, None), given)
        if (which == "direct_host") == (role is DatabaseRole.OWNER):
            with pytest.raises(ConfigError, match="not among allowed_hosts"):
                locator.locate(record, role)
        else:
            locator.locate(record, role)
