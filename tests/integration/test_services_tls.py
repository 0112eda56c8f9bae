"""Connections over TLS: to the right server with the right certificate, and to no other. Needs a PostgreSQL that was built with TLS."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tenantdb import TenantDB
from tenantdb.backends.postgresql.bootstrap import bootstrap
from tenantdb.errors import InsecureTransport, ProvisioningError, RegistryUnavailable, ServerUnavailable
from tenantdb.model import TenantState
from tenantdb.settings import ConnectionURL
from tenantdb.testing import EmbeddedServer
from tests.integration.cluster import ADMIN, ADMIN_PASSWORD, APP, APP_PASSWORD, PROVISIONER, PROVISIONER_PASSWORD, Cluster
from tests.servers import debian_bindir, make_certificates, tls_server

pytestmark = pytest.mark.services
ABROAD = "elsewhere.example"  # a name that is not this machine's; `abroad` leads it to the server


@pytest.fixture(scope="module")
def tls() -> Iterator[tuple[Cluster, Path]]:
    with tls_server() as (server, authority):
        cluster = Cluster(server)
        cluster.prepare()
        yield cluster, authority


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """Another authority, which signed nothing here."""
    return make_certificates(tmp_path)[0]


@pytest.fixture
def its_name_is_ours_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """libpq takes the address from here and goes on calling the server by the name in the URL, as with a DNS of our own."""
    monkeypatch.setenv("PGHOSTADDR", "127.0.0.1")


def url(cluster: Cluster, user: str, password: str, database: str, *, host: str = "localhost", **query: Any) -> str:
    plain = cluster.server.url(user, password, database).replace("127.0.0.1", host)
    return plain + ("?" + "&".join(f"{name}={value}" for name, value in query.items()) if query else "")


def open_db(cluster: Cluster, registry: str, *, host: str = "localhost", settings: dict[str, Any] | None = None, **query: Any) -> TenantDB:
    """All three logins by the same way."""
    return cluster.tenantdb(
        registry,
        url=url(cluster, APP, APP_PASSWORD, registry, host=host, **query),
        registry_admin=url(cluster, ADMIN, ADMIN_PASSWORD, registry, host=host, **query),
        server=url(cluster, PROVISIONER, PROVISIONER_PASSWORD, "postgres", host=host, **query),
        **(settings or {}),
    )


def encrypted(cluster: Cluster, user: str) -> set[bool]:
    rows = cluster.sql("SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = %s", [user])
    return {row[0] for row in rows}


def test_the_right_authority_lets_registry_and_provisioner_in(tls: tuple[Cluster, Path]) -> None:
    cluster, authority = tls
    with open_db(cluster, cluster.new_registry(), sslmode="verify-full", sslrootcert=authority) as db:
        assert db.provision("acme").state is TenantState.ACTIVE
        assert encrypted(cluster, APP) == encrypted(cluster, ADMIN) == {True}


def test_another_authority_is_refused(tls: tuple[Cluster, Path], stranger: Path) -> None:
    cluster, authority = tls
    registry = cluster.new_registry()
    untrusted: dict[str, Any] = {"sslmode": "verify-full", "sslrootcert": stranger}
    with open_db(cluster, registry, **untrusted) as db, pytest.raises(RegistryUnavailable, match="not signed by a trusted authority"):
        db.tenants.list()
    with cluster.tenantdb(registry, server=url(cluster, PROVISIONER, PROVISIONER_PASSWORD, "postgres", **untrusted)) as db:
        with pytest.raises(ProvisioningError, match="not signed by a trusted authority") as failure:
            db.provision("acme")
        assert isinstance(failure.value.__cause__, ServerUnavailable)
    with pytest.raises(ServerUnavailable, match="not signed by a trusted authority"):
        superuser = ConnectionURL.parse(url(cluster, "postgres", cluster.server.password, "postgres", **untrusted))
        bootstrap(superuser, PROVISIONER, PROVISIONER_PASSWORD, cluster.settings())
    with open_db(cluster, registry, sslmode="verify-full", sslrootcert=authority) as db:
        assert db.provision("acme").state is TenantState.ACTIVE


@pytest.mark.usefixtures("its_name_is_ours_to_give")
@pytest.mark.parametrize("given_in", ["settings", "url"])
def test_a_host_off_this_machine_must_prove_its_name_without_being_asked(tls: tuple[Cluster, Path], given_in: str) -> None:
    cluster, authority = tls
    given: dict[str, Any] = {"settings": {"ssl_root_cert": str(authority)}} if given_in == "settings" else {"sslrootcert": authority}
    with open_db(cluster, cluster.new_registry(), host=ABROAD, **given) as db:
        with pytest.raises(RegistryUnavailable, match="its certificate is for another host"):
            db.tenants.list()
    for mode in ("disable", "allow", "prefer", "require", "verify-ca"):
        with pytest.raises(InsecureTransport):
            open_db(cluster, "registry", host=ABROAD, sslmode=mode, **given)


@pytest.mark.usefixtures("its_name_is_ours_to_give")
def test_tenants_of_a_server_off_this_machine_are_reached_by_tls(tls: tuple[Cluster, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate is for localhost; so that name is taken for one of another machine."""
    cluster, authority = tls
    monkeypatch.setattr("tenantdb.backends.postgresql.connect.is_local", lambda host: False)
    with open_db(cluster, cluster.new_registry(), settings={"ssl_root_cert": str(authority)}) as db:
        server = db.servers.get("default")
        db.servers.add("default", backend="postgresql", host="localhost", port=server.port)
        acme = db.provision("acme")
        with db.session("acme") as session:
            assert session.execute(text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")).scalar() is True
        with db.migrations.owner_connection("acme") as connection:
            assert connection.execute(text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")).scalar() is True
    assert acme.state is TenantState.ACTIVE


def test_a_server_without_tls_is_refused_and_not_spoken_to_in_the_clear(tmp_path: Path) -> None:
    authority, _, _ = make_certificates(tmp_path)
    with EmbeddedServer(bindir=debian_bindir(), fsync=False) as server:
        cluster = Cluster(server)
        cluster.prepare()
        with open_db(cluster, cluster.new_registry(), sslmode="verify-full", sslrootcert=authority) as db:
            with pytest.raises(RegistryUnavailable, match="does not offer TLS"):
                db.tenants.list()


def reload(cluster: Cluster) -> None:
    """Until a connection that comes now is judged by the new rules."""
    loaded = "SELECT pg_conf_load_time()"
    before = cluster.sql(loaded)
    cluster.sql("SELECT pg_reload_conf()")
    deadline = time.monotonic() + 30
    while cluster.sql(loaded) == before:
        assert time.monotonic() < deadline


@pytest.mark.parametrize("method", ["trust", "password", "md5"])
def test_a_server_that_asks_for_no_scram_is_sent_no_password(
    tls: tuple[Cluster, Path], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    cluster, authority = tls
    monkeypatch.setattr("tenantdb.backends.postgresql.connect.is_local", lambda host: False)
    hba = Path(cluster.sql("SHOW hba_file")[0][0])
    kept, registry = hba.read_text(), cluster.new_registry()
    ((verifier,),) = cluster.sql("SELECT rolpassword FROM pg_authid WHERE rolname = %s", [APP])
    if method == "md5":  # asked for by the server where the role has such a hash, and as good as the password to who listens
        hashed = hashlib.md5(f"{APP_PASSWORD}{APP}".encode()).hexdigest()
        cluster.sql(f"ALTER ROLE {APP} PASSWORD 'md5{hashed}'")
    try:
        hba.write_text(f"hostssl all {APP} all {method}\n{kept}")
        reload(cluster)
        with open_db(cluster, registry, settings={"ssl_root_cert": str(authority)}) as db:
            with pytest.raises(RegistryUnavailable, match="does not ask for a SCRAM password"):
                db.tenants.list()
        with open_db(cluster, registry, settings={"insecure_transport": True}) as careless:
            assert careless.tenants.list() == []
    finally:
        cluster.sql(f"ALTER ROLE {APP} PASSWORD '{verifier}'")
        hba.write_text(kept)
        reload(cluster)
