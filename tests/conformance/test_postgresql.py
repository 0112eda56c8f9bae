"""What PostgreSQL alone has to keep: sealed secrets, limits that a role cannot lift, sessions that the server ends."""

from __future__ import annotations

import dataclasses
import logging
import re
import socket
import threading
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import Table, select, text, update
from sqlalchemy.exc import OperationalError

from tenantdb import Tenant, TenantDB, TenantState, errors
from tenantdb.registry.secrets import generate_key
from tenantdb.registry.tables import servers, tenants
from tests.conformance.app import NOTES, note
from tests.conformance.colours import Clock, Face, MakeFace, MakeProcess
from tests.conformance.conftest import Estate
from tests.conformance.watching import restrict, settled
from tests.world import PostgreSQLWorld, eventually

pytestmark = pytest.mark.parametrize("world", ["postgresql"], indirect=True, scope="session")


@contextmanager
def edited(estate: Estate, table: Table, rows: dict[Any, dict[str, Any]]) -> Iterator[None]:
    """Rows of the registry, by id, edited behind tenantdb's back and put back at the end."""

    def write(values: dict[Any, dict[str, Any]]) -> None:
        with estate.world.registry(estate.db) as registry:
            for row_id, columns in values.items():
                registry.execute(update(table).where(table.c.id == row_id).values(**columns))

    with estate.world.registry(estate.db) as registry:
        before = {
            row_id: dict(registry.execute(select(*(table.c[name] for name in columns)).where(table.c.id == row_id)).one()._mapping)
            for row_id, columns in rows.items()
        }
    write(rows)
    try:
        yield
    finally:
        write(before)


def secrets_of(estate: Estate, tenant: Tenant) -> dict[str, Any]:
    columns = [tenants.c.owner_secret, tenants.c.runtime_secret]
    with estate.world.registry(estate.db) as registry:
        return dict(registry.execute(select(*columns).where(tenants.c.id == tenant.id)).one()._mapping)


# -- secrets in their rows -------------------------------------------------------------------------------------------------------------


async def test_secrets_swapped_between_two_tenants_open_for_neither_and_hurt_no_third(
    face: Face, estate: Estate, acme: Tenant, fresh: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(face.db, monkeypatch)
    with estate.borrowed() as other:
        swapped = {fresh.id: secrets_of(estate, other), other.id: secrets_of(estate, fresh)}
        with edited(estate, tenants, swapped):
            for tenant in (fresh, other):
                with pytest.raises(errors.CredentialTampered) as caught:
                    await face.write(note(1), tenant)
                assert (caught.value.tenant, caught.value.column) == (str(tenant.id), "runtime_secret")
                with pytest.raises(errors.CredentialTampered):
                    face.db.migrations.upgrade(tenant)
            assert await face.marker("acme") == "acme"
        face.db._registry.audit._refusals.flush()
        for tenant in (fresh, other):
            newest = face.db.audit.list(tenant, limit=1)[0]
            assert (newest.action, newest.outcome) == ("refused.credential-tampered", "refused") and newest.details["count"] >= 2
        clock.now += 5
        for tenant in (fresh, other):
            assert await face.rows(NOTES, tenant) == []
            assert await face.marker(tenant) == tenant.slug


def test_owner_and_runtime_secret_of_one_tenant_cannot_be_swapped(db: TenantDB, estate: Estate, fresh: Tenant) -> None:
    found = secrets_of(estate, fresh)
    swapped = {"owner_secret": found["runtime_secret"], "runtime_secret": found["owner_secret"]}
    with edited(estate, tenants, {fresh.id: swapped}):
        with pytest.raises((errors.CredentialTampered, errors.SecretKeyError)):
            with db.connect(fresh):
                pass


@pytest.mark.parametrize("damage", ["bit", "truncated", "version", "empty", "missing"])
def test_a_damaged_secret_is_never_used_and_one_that_is_mended_serves_again(
    db: TenantDB, estate: Estate, fresh: Tenant, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(db, monkeypatch)
    blob: bytes = secrets_of(estate, fresh)["runtime_secret"]
    damaged = {
        "bit": blob[:-1] + bytes([blob[-1] ^ 1]),
        "truncated": blob[:-1],
        "version": b"\x00" + blob[1:],
        "empty": b"",
        "missing": None,
    }[damage]
    with edited(estate, tenants, {fresh.id: {"runtime_secret": damaged}}), pytest.raises(errors.CredentialTampered):
        with db.connect(fresh):
            pass
    clock.now += 5
    with db.connect(fresh) as connection:
        assert connection.scalar(text("SELECT 1")) == 1


@pytest.mark.parametrize("column", ["host", "port", "direct_host"])
def test_a_server_edited_to_lead_elsewhere_is_refused_before_a_socket_opens(
    process: MakeProcess, estate: Estate, acme: Tenant, column: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0)
        server = estate.db.servers.get("default")
        value = {"host": "localhost", "port": trap.getsockname()[1], "direct_host": "localhost"}[column]
        with edited(estate, servers, {server.id: {column: value}}):
            refused = process()
            with pytest.raises(errors.CredentialTampered), refused.connect("acme"):
                pass
            refused._registry.audit._refusals.flush()
            assert refused.audit.list(limit=1)[0].action == "refused.credential-tampered"
        with pytest.raises(BlockingIOError):
            trap.accept()
    with process().connect("acme") as connection:
        assert connection.scalar(text("SELECT 1")) == 1


def test_a_role_or_database_edited_in_the_row_opens_nothing(db: TenantDB, estate: Estate, fresh: Tenant, beta: Tenant) -> None:
    for columns in ({"runtime_role": beta.runtime_role}, {"runtime_role": estate.world.provisioner}):  # type: ignore[attr-defined]
        with edited(estate, tenants, {fresh.id: columns}), pytest.raises(errors.CredentialTampered):
            with db.connect(fresh):
                pass


def test_another_secret_key_is_told_from_tampering_and_the_right_one_beside_it_serves(
    process: MakeProcess, estate: Estate, acme: Tenant
) -> None:
    right = [key.get_secret_value() for key in estate.db.settings.secret_keys]
    for call in (lambda: process(secret_keys=[generate_key()]).ping(), lambda: process(secret_keys=[generate_key()]).engine("acme")):
        with pytest.raises(errors.SecretKeyError):
            call()
    with process(secret_keys=[generate_key(), *right]).connect("acme") as connection:
        assert connection.scalar(text("SELECT 1")) == 1


# -- limits ----------------------------------------------------------------------------------------------------------------------------


async def test_the_limits_of_the_settings_hold_whatever_the_role_has_set_for_itself(make_face: MakeFace, fresh: Tenant) -> None:
    ours = {"statement_timeout": "7s", "lock_timeout": "3s", "idle_in_transaction_session_timeout": "11s"}
    face = make_face(statement_timeout=7, lock_timeout=3, idle_in_transaction_timeout=11)
    async with face.begin(fresh) as session:
        for name in ours:
            await session.execute(text(f"ALTER ROLE CURRENT_USER SET {name} = 0"))
        await session.execute(text("ALTER ROLE CURRENT_USER SET default_transaction_read_only = on"))
        await session.execute(text("ALTER ROLE CURRENT_USER SET search_path = pg_catalog"))

    again = make_face(statement_timeout=7, lock_timeout=3, idle_in_transaction_timeout=11)
    async with again.session(fresh) as session:
        assert {name: await session.scalar(text(f"SHOW {name}")) for name in ours} == ours
        await session.execute(note(1))
        await session.rollback()
        await session.execute(text("ALTER ROLE CURRENT_USER RESET ALL"))
        await session.commit()


async def test_a_statement_that_runs_too_long_is_cancelled_and_the_session_goes_on(make_face: MakeFace, fresh: Tenant) -> None:
    face = make_face(statement_timeout=0.1)
    async with face.session(fresh) as session:
        with pytest.raises(OperationalError) as caught:
            await session.execute(text("SELECT pg_sleep(30)"))
        assert isinstance(caught.value.orig, psycopg.errors.QueryCanceled)
        await session.rollback()
        assert (await session.scalars(NOTES)).all() == []


# -- sessions that the server ends -----------------------------------------------------------------------------------------------------


async def test_a_connection_ended_while_idle_is_noticed_before_the_users_statement(
    face: Face, world: PostgreSQLWorld, fresh: Tenant
) -> None:
    async with face.session(fresh) as one, face.session(fresh) as two:
        await one.execute(NOTES)
        await two.execute(NOTES)
    assert world.terminate(fresh) == 2

    for number in (1, 2):
        await face.write(note(number), fresh)
    assert await face.rows(NOTES, fresh) == [1, 2]


async def test_a_connection_ended_while_leased_fails_that_transaction_alone(face: Face, world: PostgreSQLWorld, fresh: Tenant) -> None:
    async with face.session(fresh) as session:
        await session.execute(note(1))
        assert world.terminate(fresh) == 1
        with pytest.raises(OperationalError):
            await session.execute(note(2))
        await session.rollback()
        assert (await session.scalars(NOTES)).all() == []


async def test_a_refused_login_says_so_without_a_secret_and_is_worth_another_try(
    face: Face, world: PostgreSQLWorld, estate: Estate, fresh: Tenant
) -> None:
    password = estate.db._registry.runtime_password(estate.db.tenants.record(fresh.id))
    role = sql.Identifier(fresh.runtime_role or "")
    world.superuser.execute(sql.SQL("ALTER ROLE {} PASSWORD 'another'").format(role))
    try:
        with pytest.raises(errors.ServerUnavailable) as caught:
            await face.marker(fresh)
    finally:
        world.superuser.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(role, sql.Literal(password)))
    assert caught.value.problem == "the login was refused: wrong password"
    assert caught.value.server == "default"
    assert caught.value.retryable
    assert password not in str(caught.value)
    assert await face.marker(fresh) == fresh.slug


def test_a_server_that_is_down_is_no_missing_tenant(new_estate: Estate) -> None:
    with new_estate.world.twin(new_estate.db) as db, socket.create_server(("127.0.0.1", 0)) as placeholder:
        tenant = new_estate.tenant()
        port = placeholder.getsockname()[1]
        placeholder.close()
        new_estate.db.servers.add("default", backend="postgresql", host="127.0.0.1", port=port)
        with pytest.raises(errors.ServerUnavailable, match="nothing listens there"), db.connect(tenant):
            pass


# -- who may do what, and what shows ---------------------------------------------------------------------------------------------------


def test_a_process_without_a_provisioner_leaves_the_work_to_a_worker(process: MakeProcess, estate: Estate) -> None:
    web = process(server=None, registry_admin=None)
    with pytest.raises(errors.ConfigError):
        web.work()
    asked = web.provision("by-a-worker", idempotency_key="web-1")
    assert asked.state is TenantState.PROVISIONING
    assert asked.database is None
    with pytest.raises(errors.TenantNotReady):
        web.engine("by-a-worker")

    assert estate.db.work() == 1
    assert estate.db.work() == 0
    done = web.provision("by-a-worker", idempotency_key="web-1")
    estate.tenants.append(done)
    assert (done.id, done.state) == (asked.id, TenantState.ACTIVE)
    with process(server=None, registry_admin=None).session("by-a-worker") as session:
        assert session.scalars(NOTES).all() == []


def test_names_on_the_server_say_nothing_about_customers(world: PostgreSQLWorld, db: TenantDB, acme: Tenant, beta: Tenant) -> None:
    def shown() -> Sequence[tuple[Any, ...]]:
        return world.superuser.execute(
            "SELECT datname, usename, application_name FROM pg_stat_activity"
            " UNION ALL SELECT datname, NULL, shobj_description(oid, 'pg_database') FROM pg_database"
            " UNION ALL SELECT rolname, NULL, shobj_description(oid, 'pg_authid') FROM pg_roles"
        ).fetchall()

    with db.connect("acme"), db.connect("beta"):
        words = {word for row in shown() for word in row if word}
    assert acme.database in words and acme.runtime_role in words
    assert not [word for word in words if re.search("acme|beta", word)]


def test_no_secret_shows_in_any_log_line_repr_or_error(
    world: PostgreSQLWorld, new_estate: Estate, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("sqlalchemy.engine", "sqlalchemy.pool", "alembic", "tenantdb"):
        caplog.set_level(logging.DEBUG, logger=name)
    made = new_estate.tenant()
    shown: list[str] = []
    with world.twin(new_estate.db) as db:
        with db.session(made) as session:
            session.execute(NOTES)
            shown += [repr(session.connection().engine.url), str(session.connection().engine.url), repr(session.connection().engine)]
        db.suspend(made)
        unreachable = world.twin(db, server=f"postgresql://prov:{world.passwords['prov']}@127.0.0.1:1/postgres")
        for call in (lambda: db.engine(made), lambda: db.provision(made.slug), lambda: unreachable.provision("never")):
            with pytest.raises(errors.TenantDBError) as caught:
                call()
            shown += [str(caught.value), repr(caught.value), *traceback.format_exception(caught.value)]
        record = db.tenants.record(made.id)
        canaries = [*world.passwords.values(), world.key, db._registry.runtime_password(record), db._registry.owner_password(record)]
        shown += [repr(each) for each in (db, db.settings, record, made, db.servers.get("default"), db.__dict__, dataclasses.asdict(made))]
        shown += [str(db.settings), str(db.settings.model_dump())]
    everything = "\n".join([caplog.text, *shown])
    assert "CREATE" in caplog.text or "INSERT" in caplog.text
    assert [canary for canary in canaries if canary in everything] == []
    assert world.provisioner in everything  # and the search sees what is there


# -- notices ---------------------------------------------------------------------------------------------------------------------------


def listeners(estate: Estate) -> list[int]:
    """The backends that listen to the shared registry."""
    assert isinstance(estate.world, PostgreSQLWorld)
    query = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND query LIKE 'LISTEN%%' AND application_name LIKE 'tenantdb/%%'"
    return [pid for (pid,) in estate.world.superuser.execute(query, [estate.db.settings.url.database]).fetchall()]


def test_a_lost_ear_is_opened_again_and_what_was_missed_meanwhile_is_found(
    estate: Estate, fresh: Tenant, process: MakeProcess, caplog: pytest.LogCaptureFixture
) -> None:
    there = process()
    restrict(there, "notices")
    really, let, tries = there._registry._watcher._listen, threading.Event(), []

    def listen() -> Any:
        if tries and not let.is_set():
            tries.append("refused")
            raise errors.RegistryUnavailable("nothing listens there")
        tries.append("let in")
        return really()

    there._registry._watcher._listen = listen
    settled(there, "notices")
    assert there.resolve(fresh.id).servable
    [pid] = listeners(estate)

    with caplog.at_level(logging.INFO, "tenantdb.registry"):
        estate.world.superuser.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])  # type: ignore[attr-defined]
        eventually(lambda: tries.count("refused") >= 3)
        estate.db.suspend(fresh.id)
        assert there.resolve(fresh.id).servable  # the twin: nobody has told it
        let.set()
        with_error = pytest.raises(errors.TenantSuspended)
        eventually(lambda: is_refused(there, fresh))
        with with_error:
            there.resolve(fresh.id)
    said = [record for record in caplog.records if "cannot be listened to" in record.getMessage()]
    assert [record.levelname for record in said] == ["WARNING", "INFO"]  # once, however often it was tried
    assert len(listeners(estate)) == 1
    there.close()
    eventually(lambda: listeners(estate) == [])


def is_refused(db: TenantDB, tenant: Tenant) -> bool:
    try:
        return not db.resolve(tenant.id).servable
    except errors.TenantSuspended:
        return True


@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
def test_a_look_up_that_was_overtaken_by_a_notice_looks_again(estate: Estate, fresh: Tenant, process: MakeProcess, told: bool) -> None:
    there = process()
    restrict(there, "notices" if told else "nothing")
    settled(there, "notices" if told else "nothing")
    registry, really = there._registry, there._registry.tenants.record
    read, go, heard = threading.Event(), threading.Event(), threading.Event()

    def slowly(key: Any) -> Any:
        record = really(key)
        if not read.is_set():
            read.set()
            assert go.wait(20)
        return record

    registry.tenants.record = slowly  # type: ignore[method-assign]
    registry.changes.subscribe(lambda change: heard.set() if change.tenant_id == fresh.id else None)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(is_refused, there, fresh)
        assert read.wait(20)  # the old record is on its way
        estate.db.suspend(fresh.id)
        if told:
            assert heard.wait(20)
        go.set()
        assert answer.result(20) is told  # the twin: not told, it returns what it has read, and remembers it
    assert is_refused(there, fresh) is told


def test_a_record_that_landed_before_the_notice_is_forgotten_by_it(estate: Estate, fresh: Tenant, process: MakeProcess) -> None:
    there = process()
    restrict(there, "notices")
    settled(there, "notices")
    assert not is_refused(there, fresh)

    estate.db.suspend(fresh.id)

    eventually(lambda: is_refused(there, fresh))


def test_a_registry_that_is_out_of_reach_ends_nothing_but_what_is_believed(estate: Estate, fresh: Tenant, process: MakeProcess) -> None:
    there = process(cache_ttl=0.3)
    settled(there, "notices")
    assert there.resolve(fresh.id).servable
    there._registry._transactions.close()
    really = there._registry._transactions.engine.raw_connection

    def down(*args: Any, **kwargs: Any) -> Any:
        raise errors.RegistryUnavailable("nothing listens there")

    there._registry._transactions.engine.raw_connection = down  # type: ignore[method-assign]
    eventually(lambda: isinstance(_outcome(there, fresh), errors.RegistryUnavailable), within=60)
    there._registry._transactions.engine.raw_connection = really  # type: ignore[method-assign]
    eventually(lambda: _outcome(there, fresh) is None)


def _outcome(db: TenantDB, tenant: Tenant) -> Exception | None:
    try:
        db.resolve(tenant.id)
    except errors.TenantDBError as error:
        return error
    return None
