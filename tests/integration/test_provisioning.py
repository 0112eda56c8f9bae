"""Signing up: who gets a tenant and who is told that it exists, where it is placed, and what the world may put in the way."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from tenantdb import Tenant, TenantDB
from tenantdb.backends.postgresql.workshop import PostgreSQLWorkshop
from tenantdb.errors import (
    ConfigError,
    NoServerAvailable,
    OperationFailed,
    ProvisioningError,
    ServerUnavailable,
    TenantExists,
    TenantNotFound,
    TenantNotReady,
    UserExists,
)
from tenantdb.model import DatabaseRole, MemberRole, NewUser, TenantState, User
from tenantdb.provisioning import steps
from tenantdb.provisioning.work import Work
from tests.integration.cluster import Cluster, login
from tests.procedures import before, meanwhile

pytestmark = pytest.mark.usefixtures("cheap_hashing")
OpenDB = Callable[..., TenantDB]
PASSWORD = "correct horse battery"


@pytest.fixture(scope="module")
def registry(cluster: Cluster) -> str:
    """One for all tests of this file, because making a database takes its time; so each test has a slug of its own."""
    return cluster.new_registry()


@pytest.fixture
def slug() -> str:
    return f"acme-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def email(slug: str) -> str:
    return f"{slug}@example.org"


def fail(work: Work) -> None:
    raise OSError("the cable was pulled")


def fail_to_provision(db: TenantDB, slug: str, **request: Any) -> None:
    with before("migrate", fail), pytest.raises(ProvisioningError):
        db.provision(slug, **request)


def databases_of(cluster: Cluster, *tenants: Tenant) -> list[str | None]:
    names = [tenant.database for tenant in tenants]
    return [name for (name,) in cluster.sql("SELECT datname FROM pg_database WHERE datname = ANY(%s) ORDER BY 1", [names])]


# -- whose it is -----------------------------------------------------------------------------------------------------------------------


def test_an_owner_may_be_given_in_three_ways(db: TenantDB, slug: str, email: str) -> None:
    new = db.provision(slug, owner=NewUser(email=email, password=PASSWORD, first_name="Ann"))
    ann = db.users.authenticate(email, PASSWORD)
    by_user = db.provision(f"{slug}-b", owner=ann)
    by_id = db.provision(f"{slug}-c", owner=ann.id)

    assert ann.first_name == "Ann"
    assert {m.tenant_id: m.role for m in db.memberships.list(user=ann)} == {t.id: MemberRole.OWNER for t in (new, by_user, by_id)}


@pytest.mark.parametrize("request_of_another", [{}, {"name": "Theirs"}, {"idempotency_key": "theirs"}])
def test_a_stranger_is_told_that_an_active_tenant_exists(db: TenantDB, slug: str, email: str, request_of_another: dict[str, Any]) -> None:
    tenant = db.provision(slug, owner=NewUser(email=email, password=PASSWORD))
    if key := request_of_another.get("idempotency_key"):
        request_of_another = {"idempotency_key": f"{key} {slug}"}
    stranger = NewUser(email=f"other-{email}", password=PASSWORD)

    for owner in (None, stranger, NewUser(email=email, password=PASSWORD)):
        with pytest.raises((TenantExists, UserExists)):
            db.provision(slug, owner=owner, **request_of_another)

    assert db.tenants.get(slug) == tenant
    with pytest.raises(Exception, match="e-mail or password is wrong"):
        db.users.authenticate(stranger.email, PASSWORD)  # nothing of his request was kept


def test_a_stranger_does_not_get_a_failed_tenant(db: TenantDB, slug: str, email: str) -> None:
    ann = NewUser(email=email, password=PASSWORD)
    fail_to_provision(db, slug, owner=ann)
    mallory: list[NewUser | User | None] = [
        NewUser(email=email, password="another password"),
        NewUser(email=f"mallory-{email}", password=PASSWORD),
        db.users.create(f"mallory2-{email}", PASSWORD),
        None,
    ]
    for owner in mallory:
        with pytest.raises((TenantExists, UserExists)):
            db.provision(slug, owner=owner)
    with pytest.raises((TenantExists, UserExists)):
        db.provision(slug, owner=ann, name="another request")
    assert db.tenants.get(slug).state is TenantState.FAILED

    assert db.provision(slug, owner=ann).state is TenantState.ACTIVE


def test_the_same_idempotency_key_gives_the_same_tenant_to_the_same_caller_only(db: TenantDB, slug: str, email: str) -> None:
    ann, key = NewUser(email=email, password=PASSWORD), f"sign-up of {slug}"
    tenant = db.provision(slug, owner=ann, idempotency_key=key)

    assert db.provision(slug, owner=ann, idempotency_key=key) == tenant
    for other in (
        {"owner": NewUser(email=email, password="another password")},
        {"owner": ann, "plan": "gold"},
        {"owner": None},
    ):
        with pytest.raises(TenantExists):
            db.provision(slug, idempotency_key=key, **other)
    with pytest.raises(TenantExists):
        db.provision(f"{slug}-b", owner=ann, idempotency_key=key)
    with pytest.raises(TenantNotFound):
        db.tenants.get(f"{slug}-b")


def test_exist_ok_gives_a_script_whatever_is_there(db: TenantDB, slug: str) -> None:
    tenant = db.provision(slug, exist_ok=True)

    assert db.provision(slug, exist_ok=True) == tenant
    db.suspend(slug)
    assert db.provision(slug, exist_ok=True).state is TenantState.SUSPENDED


# -- many at once ----------------------------------------------------------------------------------------------------------------------


def at_once(count: int, work: Callable[[int], Tenant]) -> tuple[list[Tenant], list[Exception]]:
    def attempt(number: int) -> Tenant | Exception:
        try:
            return work(number)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as threads:
        results = list(threads.map(attempt, range(count)))
    return [r for r in results if isinstance(r, Tenant)], [r for r in results if isinstance(r, Exception)]


def test_ten_at_once_with_one_key_make_one_tenant(cluster: Cluster, db: TenantDB, slug: str, email: str) -> None:
    ann, before_us = NewUser(email=email, password=PASSWORD), cluster.databases()

    tenants, errors = at_once(10, lambda _: db.provision(slug, owner=ann, idempotency_key=f"sign-up of {slug}"))

    assert errors == []
    assert len({tenant.id for tenant in tenants}) == 1
    assert cluster.databases() - before_us == {db.tenants.get(slug).database}
    assert db.tenants.get(slug).state is TenantState.ACTIVE


def test_of_ten_at_once_without_a_key_one_wins(cluster: Cluster, db: TenantDB, slug: str) -> None:
    before_us = cluster.databases()

    tenants, errors = at_once(10, lambda _: db.provision(slug))

    assert [type(error) for error in errors] == [TenantExists] * 9
    assert [tenant.state for tenant in tenants] == [TenantState.ACTIVE]
    assert cluster.databases() - before_us == {tenants[0].database}


def test_a_crowd_of_sign_ups_does_not_run_into_the_provisioners_connection_limit(db: TenantDB, slug: str) -> None:
    tenants, errors = at_once(12, lambda number: db.provision(f"{slug}-{number}"))

    assert errors == []
    assert len({tenant.database for tenant in tenants}) == 12


# -- names that are taken --------------------------------------------------------------------------------------------------------------


def strangers_database(cluster: Cluster, name: str) -> None:
    cluster.sql(f"CREATE DATABASE {name} TEMPLATE template0")
    cluster.sql("CREATE TABLE precious AS SELECT 42 AS answer", database=name)


def drop_strangers_database(cluster: Cluster, name: str) -> None:
    """After looking that it is as it was."""
    assert cluster.sql("SELECT answer FROM precious", database=name) == [(42,)]
    assert cluster.sql("SELECT pg_get_userbyid(datdba), datacl FROM pg_database WHERE datname = %s", [name]) == [("postgres", None)]
    cluster.sql(f"DROP DATABASE {name}")


def test_a_name_that_is_taken_when_it_is_drawn_is_drawn_again(
    monkeypatch: pytest.MonkeyPatch, cluster: Cluster, db: TenantDB, slug: str
) -> None:
    taken, draw = steps.draw_name(), steps.draw_name
    names = [taken, taken]  # as a database's name and as a role's
    strangers_database(cluster, taken)
    monkeypatch.setattr(steps, "draw_name", lambda: names.pop() if names else draw())

    tenant = db.provision(slug)

    assert tenant.database != taken and names == []
    drop_strangers_database(cluster, taken)


def test_a_database_that_appears_under_the_reserved_name_is_neither_adopted_nor_dropped(cluster: Cluster, db: TenantDB, slug: str) -> None:
    taken: list[str] = []

    def appears(work: Work) -> None:
        taken.append(str(work.tenant.database))
        strangers_database(cluster, taken[0])

    with before("database", appears), pytest.raises(ProvisioningError, match=r"InsufficientPrivilege|DuplicateDatabase"):
        db.provision(slug)
    with pytest.raises(ProvisioningError, match=r"InsufficientPrivilege|DuplicateDatabase"):
        db.provision(slug)
    assert db.tenants.get(slug).state is TenantState.FAILED
    db.delete(slug)
    with pytest.raises(OperationFailed, match="'fence': InsufficientPrivilege"):
        db.purge(slug, confirm=slug, immediately=True)

    drop_strangers_database(cluster, taken[0])
    assert db.purge(slug, confirm=slug, immediately=True).state is TenantState.PURGED


@pytest.mark.parametrize("which", ["owner_role", "runtime_role"])
def test_a_role_that_appears_under_the_reserved_name_is_left_alone(cluster: Cluster, db: TenantDB, slug: str, which: str) -> None:
    reserved: list[Tenant] = []

    def appears(work: Work) -> None:
        reserved.append(work.tenant)
        cluster.sql(f"CREATE ROLE {getattr(work.tenant, which)} PASSWORD NULL")

    with before("database", appears), pytest.raises(ProvisioningError, match="InsufficientPrivilege"):
        db.provision(slug)

    taken = getattr(reserved[0], which)
    assert cluster.sql("SELECT rolpassword, rolcanlogin FROM pg_authid WHERE rolname = %s", [taken]) == [(None, False)]
    cluster.sql(f"DROP ROLE {taken}")
    assert db.provision(slug).state is TenantState.ACTIVE


def test_a_name_that_was_not_drawn_by_us_never_reaches_ddl(monkeypatch: pytest.MonkeyPatch, db: TenantDB, slug: str) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(steps, "draw_name", lambda: 'x"; DROP DATABASE postgres; --')
        with pytest.raises(ProvisioningError, match="not drawn by tenantdb; nothing was done"):
            db.provision(slug)


# -- servers ---------------------------------------------------------------------------------------------------------------------------


def test_a_wrong_provisioner_password_is_told_without_it_and_mended_by_the_right_one(
    cluster: Cluster, open_db: OpenDB, db: TenantDB, slug: str
) -> None:
    wrong = open_db(server=cluster.provisioner_url("wrong-password"))
    with pytest.raises(ProvisioningError, match="the login was refused: wrong password") as failure:
        wrong.provision(slug)
    assert isinstance(failure.value.__cause__, ServerUnavailable)
    assert "wrong-password" not in str(failure.value) + str(db.tenants.get(slug).reason)
    assert [str(finding.severity) for finding in wrong.check() if "wrong password" in finding.text] == ["problem"]

    assert db.provision(slug).state is TenantState.ACTIVE


def test_a_server_that_is_down_is_told_and_the_call_continues_when_it_is_up(
    cluster: Cluster, open_db: OpenDB, db: TenantDB, slug: str
) -> None:
    down = open_db(server=cluster.provisioner_url().replace(str(cluster.server.port), "1"))
    with pytest.raises(ProvisioningError, match=r"'reserve': .*nothing listens there"):
        down.provision(slug)

    assert db.provision(slug).state is TenantState.ACTIVE


def test_full_draining_and_unknown_servers_take_no_tenant(cluster: Cluster, db: TenantDB, slug: str) -> None:
    server = db.servers.get("default")

    def change(**values: Any) -> None:
        db.servers.add("default", backend="postgresql", host=server.host, port=server.port, **values)

    def refused(**wanted: Any) -> None:
        with pytest.raises(ProvisioningError, match="no open database server") as failure:
            db.provision(slug, **wanted)
        assert isinstance(failure.value.__cause__, NoServerAvailable)

    held = len([tenant for tenant in db.tenants.list() if tenant.server == "default"])
    change(capacity=held)
    refused()
    change(capacity=held + 1)
    db.servers.set_draining("default", draining=True)
    refused()
    db.servers.set_draining("default", draining=False)

    assert db.provision(slug).state is TenantState.ACTIVE
    slug = f"{slug}-b"
    refused()
    change()
    slug = f"{slug}-c"
    refused(region="mars")
    change(region="mars")
    assert db.provision(slug, region="mars").server == "default"
    change()


def test_extensions_and_schemas_of_the_server_are_there_for_migrations_and_application(
    cluster: Cluster, db: TenantDB, open_db: OpenDB, scripts: Any, slug: str
) -> None:
    server = db.servers.get("default")
    db.servers.add("default", backend="postgresql", host=server.host, port=server.port, extensions=["hstore"], schemas=["billing"])
    scripts.add("002", "CREATE TABLE billing.bills (id int PRIMARY KEY, lines hstore)")
    tenant = db.provision(slug)

    runtime = login(cluster, db, tenant, DatabaseRole.RUNTIME)
    assert runtime.ask("INSERT INTO billing.bills VALUES (1, 'a=>1') RETURNING lines -> 'a'") == [("1",)]
    db.servers.add("default", backend="postgresql", host=server.host, port=server.port)


def test_an_extension_that_only_a_superuser_can_make_comes_with_the_template(cluster: Cluster, db: TenantDB, slug: str) -> None:
    server = db.servers.get("default")
    db.servers.add("default", backend="postgresql", host=server.host, port=server.port, extensions=["vector", "earthdistance"])
    with pytest.raises(ProvisioningError, match="'database': InsufficientPrivilege"):
        db.provision(slug)

    with cluster.template() as template:
        template.execute("CREATE EXTENSION vector")
        template.execute("CREATE EXTENSION earthdistance CASCADE")  # with cube, which nobody names
    try:
        tenant = db.provision(f"{slug}-b")
        runtime = login(cluster, db, tenant, DatabaseRole.RUNTIME)
        assert runtime.ask("SELECT '[1,2]'::vector <-> '[1,4]'::vector") == [(2.0,)]

        db.servers.add("default", backend="postgresql", host=server.host, port=server.port)
        with pytest.raises(ProvisioningError, match="extension vector is there, and the server's extensions= do not name it") as failure:
            db.provision(f"{slug}-c")
    finally:
        with cluster.template() as template:
            template.execute("DROP EXTENSION vector, earthdistance, cube")
    assert [word for word in ("cube", "earthdistance", "vector") if f"extension {word} is there" in failure.value.problem] == [
        "cube",
        "earthdistance",
        "vector",
    ]


# -- a process without a provisioner ---------------------------------------------------------------------------------------------------


def test_a_web_process_writes_down_what_a_worker_carries_out(cluster: Cluster, open_db: OpenDB, slug: str, email: str) -> None:
    web, worker = open_db(admin=False, provisioner=False), open_db()
    ann, key, before_us = NewUser(email=email, password=PASSWORD), f"sign-up of {slug}", cluster.databases()

    waiting = web.provision(slug, owner=ann, idempotency_key=key)

    assert (waiting.state, waiting.database) == (TenantState.PROVISIONING, None)
    assert cluster.databases() == before_us
    assert web.provision(slug, owner=ann, idempotency_key=key).id == waiting.id
    with pytest.raises(TenantExists):
        web.provision(slug, owner=NewUser(email=f"other-{email}", password=PASSWORD))
    with pytest.raises(TenantNotReady), web.session(slug) as session:
        session.execute(text("SELECT 1"))
    with pytest.raises(ConfigError, match="a worker creates databases"):
        web.work()

    assert worker.work() == 1

    assert web.provision(slug, owner=ann, idempotency_key=key).state is TenantState.ACTIVE
    fresh = open_db(admin=False, provisioner=False)
    with fresh.session(slug) as session:
        assert session.execute(text("SELECT current_user")).scalar() == fresh.tenants.get(slug).runtime_role


def test_a_worker_goes_on_after_an_operation_that_fails(
    monkeypatch: pytest.MonkeyPatch, open_db: OpenDB, db: TenantDB, slug: str, caplog: pytest.LogCaptureFixture
) -> None:
    web = open_db(admin=False, provisioner=False)
    web.provision(slug)
    web.provision(f"{slug}-b")

    def fails_for_the_first(work: Work) -> None:
        if work.tenant.slug == slug:
            raise OSError("the cable was pulled")

    with before("seed", fails_for_the_first):
        assert db.work() == 1

    assert [db.tenants.get(name).state for name in (slug, f"{slug}-b")] == [TenantState.FAILED, TenantState.ACTIVE]
    assert "the cable was pulled" in caplog.text
    assert db.work() == 0  # a failed one runs again when it is asked for
    assert db.provision(slug).state is TenantState.ACTIVE


# -- hooks -----------------------------------------------------------------------------------------------------------------------------


def test_a_hook_before_provisioning_that_raises_stops_it_with_nothing_made(cluster: Cluster, db: TenantDB, slug: str) -> None:
    before_us, refuse = (cluster.databases(), cluster.roles()), [True]

    @db.on("before_provision")
    def no_room_on_fridays(tenant: Tenant) -> None:
        if refuse:
            raise PermissionError("not on a Friday")

    with pytest.raises(ProvisioningError, match="'reserve': PermissionError: not on a Friday"):
        db.provision(slug)
    assert (cluster.databases(), cluster.roles()) == before_us
    assert db.tenants.get(slug).database is None

    refuse.clear()
    assert db.provision(slug).state is TenantState.ACTIVE


def test_a_hook_after_activation_that_raises_is_logged_and_undoes_nothing(
    db: TenantDB, slug: str, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Tenant] = []

    @db.on("after_activate")
    def welcome(tenant: Tenant) -> None:
        seen.append(tenant)
        raise ConnectionError("the mail server is down")

    tenant = db.provision(slug)

    assert tenant.state is TenantState.ACTIVE and seen == [tenant]
    logged = [record for record in caplog.records if record.name == "tenantdb.hooks"]
    assert [record.levelno for record in logged] == [logging.ERROR]
    assert "welcome" in logged[0].getMessage() and "the mail server is down" in caplog.text


# -- nothing is lost when the registry is ----------------------------------------------------------------------------------------------


def test_a_registry_that_goes_away_in_the_middle_leaves_an_operation_that_continues(
    monkeypatch: pytest.MonkeyPatch, cluster: Cluster, registry: str, db: TenantDB, slug: str
) -> None:
    def goes_away(*_: object) -> None:
        cluster.sql(f"ALTER DATABASE {registry} ALLOW_CONNECTIONS false")
        cluster.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [registry])

    try:
        with (
            meanwhile(PostgreSQLWorkshop, "open_database", goes_away),
            pytest.raises(ProvisioningError, match="the registry is out of reach"),
        ):
            db.provision(slug)
    finally:
        cluster.sql(f"ALTER DATABASE {registry} ALLOW_CONNECTIONS true")
    assert db.tenants.get(slug).state is TenantState.PROVISIONING  # nobody could write that it failed
    cluster.sql("UPDATE tenantdb_operations SET lease_until = now() WHERE state = 'running'", database=registry)

    tenant = db.provision(slug)

    assert tenant.state is TenantState.ACTIVE
    assert databases_of(cluster, tenant) == [tenant.database]


def test_the_owner_password_opens_what_the_runtime_password_opens_and_no_other_does(cluster: Cluster, db: TenantDB, slug: str) -> None:
    tenant = db.provision(slug)
    runtime, owner = (login(cluster, db, tenant, role) for role in (DatabaseRole.RUNTIME, DatabaseRole.OWNER))

    assert runtime.ask("SELECT current_user") == [(tenant.runtime_role,)]
    assert owner.ask("SELECT current_user") == [(tenant.owner_role,)]
    assert runtime.password != owner.password
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        type(runtime)(cluster, runtime.name, owner.password, runtime.database).ask("SELECT 1")
