"""`bootstrap-server`: the superuser's part, once per cluster. It may run again, and as a script it does the same."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tenantdb.backends.postgresql.bootstrap import bootstrap, script
from tenantdb.errors import ConfigError, ServerUnavailable
from tenantdb.model import TenantState
from tenantdb.settings import ConnectionURL, Settings
from tenantdb.testing import EmbeddedServer
from tests.integration.cluster import KEY, Cluster, ask
from tests.servers import debian_bindir

PASSWORD = "a provisioner's password: '%s' /?#"


@pytest.fixture(scope="module", params=["wheel", pytest.param("distribution", marks=pytest.mark.services)])
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    """A server that nobody has prepared."""
    with EmbeddedServer(bindir=None if request.param == "wheel" else debian_bindir(), fsync=False) as server:
        yield server


def prepare(server: EmbeddedServer, provisioner: str, password: str = PASSWORD, url: str | None = None) -> None:
    bootstrap(ConnectionURL.parse(url or server.url()), provisioner, password, Settings(url=server.url(), secret_keys=[KEY]))


def psql(server: EmbeddedServer, text: str, url: str | None = None) -> subprocess.CompletedProcess[str]:
    # The distribution's or the system's psql: root may not be able to run the wheel's.
    command = ["psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", url or server.url(), "-f", "-"]
    return subprocess.run(command, input=text, text=True, capture_output=True, timeout=60, check=False)


def state(server: EmbeddedServer, provisioner: str) -> list[Any]:
    """All that bootstrapping decides, read from the catalogue, with the provisioner's name taken out and its password's salt left out."""
    queries = {
        "postgres": [
            "SELECT datname, datacl::text, datistemplate, datallowconn, datconnlimit FROM pg_database"
            " WHERE datname IN ('postgres', 'template1', 'tenantdb_tpl') ORDER BY 1",
            "SELECT rolname, rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolcanlogin, rolreplication, rolbypassrls, rolconnlimit"
            f" FROM pg_roles WHERE rolname IN ('{provisioner}', 'tenantdb_owner') ORDER BY 1 DESC",
            "SELECT m.roleid::regrole::text, to_jsonb(m) - 'oid' - 'roleid' - 'member' - 'grantor' FROM pg_auth_members m"
            f" WHERE member = '{provisioner}'::regrole AND roleid::regrole::text NOT LIKE 't\\_%' ORDER BY 1",
            "SELECT parname, paracl::text FROM pg_parameter_acl ORDER BY 1",
        ],
        "tenantdb_tpl": [
            "SELECT nspname, nspacl::text FROM pg_namespace WHERE nspname = 'public'",
            "SELECT lanname, lanacl::text FROM pg_language ORDER BY 1",
            "SELECT oid::regprocedure::text, proacl::text FROM pg_proc WHERE proacl IS NOT NULL ORDER BY 1",
            "SELECT defaclobjtype, defaclacl::text FROM pg_default_acl ORDER BY 1",
        ],
    }
    found = [ask(server.url(), query) for query in queries["postgres"]]
    ask(server.url(), "ALTER DATABASE tenantdb_tpl ALLOW_CONNECTIONS true")
    found += [ask(server.url(database="tenantdb_tpl"), query) for query in queries["tenantdb_tpl"]]
    ask(server.url(), "ALTER DATABASE tenantdb_tpl ALLOW_CONNECTIONS false")
    return [tuple(_without(provisioner, value) for value in row) for rows in found for row in rows]


def _without(provisioner: str, value: Any) -> Any:
    return value.replace(provisioner, "PROVISIONER") if isinstance(value, str) else value


def test_it_prepares_a_server_for_provisioning_and_may_run_again(server: EmbeddedServer) -> None:
    prepare(server, "prov")
    once = state(server, "prov")
    prepare(server, "prov")
    assert state(server, "prov") == once

    login = server.url("prov", PASSWORD)
    assert ask(login, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user") == [(False,)]
    cluster = Cluster(server)
    cluster.prepare(bootstrapped=True)
    with cluster.tenantdb(cluster.new_registry(), server=login) as db:
        assert db.provision("acme").state is TenantState.ACTIVE
    prepare(server, "prov", "another password")  # and brings a login in order
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        ask(login, "SELECT 1")
    ask(server.url("prov", "another password"), "SELECT 1")


def test_the_script_does_the_same_and_holds_no_password(server: EmbeddedServer) -> None:
    with EmbeddedServer(bindir=server._bindir, fsync=False) as other:
        prepare(server, "prov")
        text = script("prov", PASSWORD)
        for _ in range(2):
            done = psql(other, text)
            assert done.returncode == 0, done.stderr

        assert state(other, "prov") == state(server, "prov")
        assert ask(other.url("prov", PASSWORD), "SELECT current_user") == [("prov",)]
    assert PASSWORD not in text and "SCRAM-SHA-256$4096:" in text


def test_a_superuser_is_refused_as_provisioner_and_stays_one(server: EmbeddedServer) -> None:
    ask(server.url(), "CREATE ROLE boss SUPERUSER")
    for name in ("postgres", "boss"):
        with pytest.raises(ConfigError, match="is a superuser"):
            prepare(server, name)
        done = psql(server, script(name, PASSWORD))
        assert done.returncode != 0 and "must not be a superuser" in done.stderr

    assert ask(server.url(), "SELECT count(*) FROM pg_roles WHERE rolname IN ('postgres', 'boss') AND rolsuper") == [(2,)]
    ask(server.url(), "DROP ROLE boss")


def test_it_takes_a_superuser(server: EmbeddedServer) -> None:
    ask(server.url(), "CREATE ROLE clerk LOGIN CREATEROLE CREATEDB PASSWORD 'clerk'; GRANT CONNECT ON DATABASE postgres TO clerk")
    before = ask(server.url(), "SELECT datname, datacl::text FROM pg_database ORDER BY 1")
    login = server.url("clerk", "clerk")

    with pytest.raises(ConfigError, match="needs a superuser"):
        prepare(server, "fresh", url=login)
    done = psql(server, script("fresh", PASSWORD), url=login)

    assert done.returncode != 0 and "needs a superuser" in done.stderr
    assert ask(server.url(), "SELECT datname, datacl::text FROM pg_database ORDER BY 1") == before
    assert ask(server.url(), "SELECT count(*) FROM pg_roles WHERE rolname = 'fresh'") == [(0,)]
    ask(server.url(), "DROP OWNED BY clerk; DROP ROLE clerk")


@pytest.mark.parametrize("password", ["", "pässword"])
def test_a_password_that_scram_would_read_in_two_ways_is_refused_without_being_shown(server: EmbeddedServer, password: str) -> None:
    for make in (lambda: prepare(server, "fresh", password), lambda: script("fresh", password)):
        with pytest.raises(ConfigError, match="empty or holds characters outside ASCII") as refused:
            make()
        assert "pässword" not in str(refused.value)


def test_a_wrong_superuser_password_is_told(server: EmbeddedServer) -> None:
    with pytest.raises(ServerUnavailable, match="wrong password"):
        prepare(server, "fresh", url=server.url(password="wrong"))


def test_a_provisioners_name_is_quoted(server: EmbeddedServer) -> None:
    name = "Pro\"v'; x"
    prepare(server, name)
    done = psql(server, script(name, PASSWORD))

    assert done.returncode == 0, done.stderr
    assert ask(server.url(name, PASSWORD), "SELECT current_user") == [(name,)]
