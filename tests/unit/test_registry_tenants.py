"""Tenants move only as the table of transitions says, change only in what may change, and every write is told to cache and audit log."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from itertools import product
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select, update

from tenantdb.context import acting
from tenantdb.errors import (
    ConfigError,
    CredentialTampered,
    IllegalTransition,
    InvalidTenantKey,
    NoServerAvailable,
    OperationInProgress,
    TenantExists,
    TenantNotFound,
)
from tenantdb.model import TRANSITIONS, DatabaseRole, Fence, Server, Subscription, Tenant, TenantState
from tenantdb.registry import Registry, SignUp, TenantRecord, tables
from tenantdb.registry.tenants import SpareWish, sign_up_values
from tests.unit.registry_fixtures import Clock


def force(registry: Registry, tenant: Tenant, **values: object) -> None:
    """Change a row behind everybody's back."""
    with registry.admin_write() as connection:
        connection.execute(update(tables.tenants).where(tables.tenants.c.id == tenant.id).values(**values))


def place(registry: Registry, tenant: Tenant, *, database: str = "t_0123456789abcdef") -> Tenant:
    """Reserve a place on a server with two sealed passwords, as provisioning does."""
    server = registry.servers.add("default", backend="postgresql", host="db1", port=5432)
    owner, runtime = f"{database}_own", f"{database}_rt"
    sealed = {
        role: registry.seal_password(f"{role}-pw", role=role, tenant=tenant, server=server, database=database, role_name=name)
        for role, name in ((DatabaseRole.OWNER, owner), (DatabaseRole.RUNTIME, runtime))
    }
    reserve = registry.tenants.reserve(
        tenant,
        server,
        database=database,
        owner_role=owner,
        runtime_role=runtime,
        owner_secret=sealed[DatabaseRole.OWNER],
        runtime_secret=sealed[DatabaseRole.RUNTIME],
    )
    with registry.admin_write() as connection:
        placed = reserve(connection)
    registry.forget(tenant.id, tenant.slug)
    return placed.tenant


def actions(registry: Registry, tenant: Tenant) -> list[str]:
    return [entry.action for entry in registry.audit.list(tenant)]


def test_a_tenant_is_found_by_slug_id_and_record(registry: Registry, acme: Tenant) -> None:
    for key in ("acme", acme.id, str(acme.id), str(acme.id).upper(), acme):
        assert registry.tenants.get(key) == acme
    assert (acme.name, acme.state, acme.version, acme.generation) == ("Acme Clinic", TenantState.PROVISIONING, 1, 1)


def test_an_unknown_tenant_is_not_found_and_operators_get_a_suggestion(registry: Registry, acme: Tenant) -> None:
    with pytest.raises(TenantNotFound) as caught:
        registry.tenants.get("acmee", suggest=True)
    assert caught.value.suggestion == "acme"
    with pytest.raises(TenantNotFound) as caught:
        registry.tenants.get("acmee")
    assert caught.value.suggestion is None
    with pytest.raises(TenantNotFound) as caught:
        registry.tenants.get("globex-corporation", suggest=True)
    assert caught.value.suggestion is None
    with pytest.raises(TenantNotFound):
        registry.tenants.get(uuid4(), suggest=True)
    with pytest.raises(InvalidTenantKey):
        registry.tenants.get("'; DROP TABLE tenantdb_tenants; --")


def test_a_record_carries_server_and_sealed_password_and_does_not_show_it(registry: Registry, acme: Tenant) -> None:
    placed = place(registry, acme)
    record = registry.lookup("acme")
    assert record.tenant == placed
    assert placed.server == "default"
    assert record.server == registry.servers.get("default")
    assert record.runtime_secret is not None
    assert repr(record.runtime_secret) not in repr(record)


def test_a_purged_tenant_is_never_found(registry: Registry, acme: Tenant) -> None:
    force(registry, acme, state="purged")
    for key in ("acme", acme.id):
        with pytest.raises(TenantNotFound):
            registry.tenants.record(key)
    assert registry.tenants.list() == []


def test_a_spare_of_newer_code_has_no_slug_and_is_no_tenant_yet(registry: Registry, acme: Tenant) -> None:
    force(registry, acme, state="spare", slug=None, name=None)
    with pytest.raises(TenantNotFound):
        registry.tenants.record(acme.id)
    assert registry.tenants.list() == []


def test_tenants_are_listed_in_pages_by_slug(registry: Registry) -> None:
    for slug in ("beta", "acme", "delta", "gamma"):
        registry.sign_up(SignUp(slug=slug))
    registry.tenants.transition(registry.tenants.get("delta"), TenantState.ACTIVE, action="tenant.activate")

    first = registry.tenants.list(limit=2)
    assert [tenant.slug for tenant in first] == ["acme", "beta"]
    assert [tenant.slug for tenant in registry.tenants.list(limit=9, after=first[-1].slug)] == ["delta", "gamma"]
    assert [tenant.slug for tenant in registry.tenants.list("active")] == ["delta"]
    assert [tenant.slug for tenant in registry.tenants.list(TenantState.PROVISIONING, after="acme")] == ["beta", "gamma"]
    with pytest.raises(ValueError, match="asleep"):
        registry.tenants.list("asleep")


REAL = [state for state in TenantState if state not in (TenantState.SPARE, TenantState.PURGED)]


@pytest.mark.parametrize(("state", "to"), list(product(REAL, [state for state in TenantState if state is not TenantState.PURGED])))
def test_the_store_allows_exactly_what_the_table_allows(registry: Registry, acme: Tenant, state: TenantState, to: TenantState) -> None:
    force(registry, acme, state=str(state))
    tenant = registry.tenants.get("acme")
    if to in TRANSITIONS[state]:
        moved = registry.tenants.transition(tenant, to, action="tenant.move", reason="because")
        assert (moved.state, moved.version, moved.generation, moved.reason) == (to, tenant.version + 1, tenant.generation, "because")
        assert actions(registry, tenant)[0] == "tenant.move"
    else:
        with pytest.raises(IllegalTransition) as caught:
            registry.tenants.transition(tenant, to, action="tenant.move")
        assert caught.value.args == ("acme", str(state), str(to))
        assert registry.tenants.get("acme") == tenant
        assert "tenant.move" not in actions(registry, tenant)


def test_a_fence_raises_the_generation(registry: Registry, acme: Tenant) -> None:
    active = registry.tenants.transition(acme, TenantState.ACTIVE, action="tenant.activate")
    suspended = registry.tenants.transition(active, TenantState.SUSPENDED, action="tenant.suspend", bump_generation=True)
    assert (active.generation, suspended.generation) == (1, 2)


def test_deleting_says_when_and_restoring_takes_it_back(registry: Registry, acme: Tenant) -> None:
    active = registry.tenants.transition(acme, TenantState.ACTIVE, action="tenant.activate")
    deleted = registry.tenants.transition(active, TenantState.DELETED, action="tenant.delete")
    assert deleted.deleted_at is not None
    assert registry.tenants.transition(deleted, TenantState.ACTIVE, action="tenant.restore").deleted_at is None


def test_who_read_an_old_state_is_told_what_it_is_now(registry: Registry, acme: Tenant) -> None:
    registry.tenants.transition(acme, TenantState.FAILED, action="tenant.fail", reason="no room")
    with pytest.raises(IllegalTransition) as caught:
        registry.tenants.transition(acme, TenantState.ACTIVE, action="tenant.activate")
    assert caught.value.args == ("acme", "failed", "active")


def test_of_many_who_move_a_tenant_at_once_one_wins(registry: Registry, acme: Tenant) -> None:
    barrier = threading.Barrier(4)

    def move(to: TenantState) -> bool:
        barrier.wait(10)
        try:
            registry.tenants.transition(acme, to, action="tenant.move")
        except IllegalTransition:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        won = [pool.submit(move, to) for to in (TenantState.ACTIVE, TenantState.FAILED) * 2]
        assert sorted(each.result(30) for each in won) == [False, False, False, True]
    assert registry.tenants.get("acme").version == 2
    assert actions(registry, acme).count("tenant.move") == 1


def test_a_change_is_seen_at_once_here_and_within_the_ttl_elsewhere(
    registry: Registry, acme: Tenant, clock: Clock, registry_engines: tuple[object, object]
) -> None:
    registry.lookup("acme")
    force(registry, acme, state="suspended")  # as another process would
    assert registry.lookup("acme").tenant.state is TenantState.PROVISIONING
    clock.now += 5
    assert registry.lookup("acme").tenant.state is TenantState.SUSPENDED
    registry.tenants.transition(registry.tenants.get("acme"), TenantState.ACTIVE, action="tenant.activate")
    assert registry.peek("acme") is None
    assert registry.lookup(acme.id).tenant.state is TenantState.ACTIVE


def test_update_changes_what_it_names(registry: Registry, acme: Tenant) -> None:
    registry.lookup("acme")
    expires = datetime(2031, 5, 1, tzinfo=timezone.utc)
    changed = registry.tenants.update(
        "acme",
        name="Acme & Söhne",
        email="office@acme.example",
        phone="+49 30 1234",
        country="DE",
        plan="pro",
        subscription="past_due",
        subscription_expires_at=expires,
        metadata={"beds": 12, "tags": ["a"]},
    )
    assert (changed.name, changed.plan, changed.subscription) == ("Acme & Söhne", "pro", Subscription.PAST_DUE)
    assert (changed.metadata, changed.subscription_expires_at) == ({"beds": 12, "tags": ["a"]}, expires)
    assert (changed.version, changed.generation, changed.state) == (acme.version + 1, acme.generation, acme.state)
    assert registry.lookup("acme").tenant == changed
    assert registry.tenants.update(acme, email=None).email is None
    assert registry.tenants.update(acme) == registry.tenants.get("acme")


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"slug": "other"}, TypeError, "cannot change slug"),
        ({"state": "active", "database": "x", "name": "n"}, TypeError, "cannot change database, state"),
        ({"subscription": "gold"}, ValueError, "trial, active, past_due, cancelled"),
        ({"name": None}, TypeError, "name"),
        ({"name": ""}, ValueError, "name"),
        ({"plan": "x" * 201}, ValueError, "plan"),
        ({"phone": "1\x002"}, ValueError, "phone"),
        ({"email": "\ud800"}, ValueError, "email"),
        ({"country": 49}, TypeError, "country"),
        ({"metadata": {"when": datetime.now(timezone.utc)}}, TypeError, "metadata"),
        ({"metadata": {"x": float("nan")}}, TypeError, "metadata"),
        ({"metadata": {"x": "\0"}}, ValueError, "metadata"),
        ({"metadata": {"x": "\ud800"}}, ValueError, "metadata"),
        ({"metadata": {"x": "y" * 70_000}}, ValueError, "metadata"),
    ],
)
def test_update_refuses_anything_else_and_writes_nothing(
    registry: Registry, acme: Tenant, changes: dict[str, object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        registry.tenants.update(acme, **changes)
    assert registry.tenants.get("acme") == acme


def test_updating_nobody_is_not_found(registry: Registry) -> None:
    with pytest.raises(TenantNotFound):
        registry.tenants.update("acme", plan="pro")


def test_a_place_is_given_once(registry: Registry, acme: Tenant) -> None:
    placed = place(registry, acme)
    assert (placed.database, placed.owner_role) == ("t_0123456789abcdef", "t_0123456789abcdef_own")
    assert (placed.version, placed.generation) == (acme.version + 1, acme.generation + 1)
    with pytest.raises(OperationInProgress):
        place(registry, acme, database="t_other")
    assert registry.tenants.get("acme") == placed


def test_an_active_tenant_is_not_moved(registry: Registry, acme: Tenant) -> None:
    registry.tenants.transition(acme, TenantState.ACTIVE, action="tenant.activate")
    with pytest.raises(OperationInProgress):
        place(registry, acme)


def test_passwords_come_back_to_who_may_have_them(registry: Registry, acme: Tenant) -> None:
    place(registry, acme)
    record = registry.lookup("acme")
    assert registry.runtime_password(record) == "runtime-pw"
    assert registry.owner_password(record) == "owner-pw"


@pytest.mark.parametrize("column", ["database", "owner_role", "runtime_role"])
def test_an_edited_row_gives_no_password(registry: Registry, acme: Tenant, column: str) -> None:
    place(registry, acme)
    force(registry, acme, **{column: "t_elsewhere"})
    record = registry.tenants.record("acme")
    password = registry.owner_password if column == "owner_role" else registry.runtime_password
    with pytest.raises(CredentialTampered) as caught:
        password(record)
    assert caught.value.tenant == str(acme.id)


def test_a_tenant_moved_to_another_server_by_hand_gives_no_password(registry: Registry, acme: Tenant) -> None:
    place(registry, acme)
    other = registry.servers.add("other", backend="postgresql", host="evil")
    force(registry, acme, server_id=other.id)
    with pytest.raises(CredentialTampered):
        registry.runtime_password(registry.tenants.record("acme"))


def test_swapped_secrets_open_for_neither_and_leave_others_alone(registry: Registry) -> None:
    records: dict[str, TenantRecord] = {}
    for slug in ("acme", "beta", "gamma"):
        tenant, _ = registry.sign_up(SignUp(slug=slug))
        place(registry, tenant, database=f"t_{slug}")
        records[slug] = registry.lookup(slug)
    force(registry, records["acme"].tenant, runtime_secret=records["beta"].runtime_secret)
    force(registry, records["beta"].tenant, runtime_secret=records["acme"].runtime_secret)
    for slug in ("acme", "beta"):
        with pytest.raises(CredentialTampered):
            registry.runtime_password(registry.tenants.record(slug))
    assert registry.runtime_password(registry.tenants.record("gamma")) == "runtime-pw"


def test_a_removed_secret_is_tampered_with(registry: Registry, acme: Tenant) -> None:
    place(registry, acme)
    force(registry, acme, owner_secret=None, runtime_secret=None)
    for password in (registry.owner_password, registry.runtime_password):
        with pytest.raises(CredentialTampered):
            password(registry.tenants.record("acme"))


def test_the_revision_is_recorded(registry: Registry, acme: Tenant) -> None:
    active = registry.tenants.transition(acme, TenantState.ACTIVE, action="tenant.activate")
    assert registry.tenants.set_revision(active, "0009").revision == "0009"
    assert registry.tenants.get("acme").version == active.version + 1
    assert actions(registry, acme)[0] == "tenant.revision"


# -- new passwords --


def test_new_passwords_stand_beside_the_old_ones_until_they_hold(registry: Registry, acme: Tenant) -> None:
    placed = place(registry, acme)
    server = registry.servers.get("default")

    def sealed(role: DatabaseRole, password: str) -> bytes:
        name = placed.owner_role if role is DatabaseRole.OWNER else placed.runtime_role
        return registry.seal_password(
            password, role=role, tenant=placed, server=server, database=placed.database or "", role_name=name or ""
        )

    def pend(word: str) -> bool:
        with registry.admin_write() as connection:
            return registry.tenants.pend_secrets(
                connection,
                placed,
                owner=sealed(DatabaseRole.OWNER, f"owner-{word}"),
                runtime=sealed(DatabaseRole.RUNTIME, f"runtime-{word}"),
            )

    def found() -> list[list[str]]:
        record = registry.tenants.record("acme")
        return [registry.passwords(record, role) for role in (DatabaseRole.OWNER, DatabaseRole.RUNTIME)]

    assert pend("new")
    assert found() == [["owner-pw", "owner-new"], ["runtime-pw", "runtime-new"]]
    assert not pend("newer")  # those that were drawn first may be at the server already
    assert found() == [["owner-pw", "owner-new"], ["runtime-pw", "runtime-new"]]
    for _ in range(2):
        with registry.admin_write() as connection:
            registry.tenants.promote_secrets(connection, placed)
    assert found() == [["owner-new"], ["runtime-new"]]
    assert registry.tenants.get("acme").generation == placed.generation  # nobody has an engine of a tenant that is not served

    active = registry.tenants.transition(placed, TenantState.ACTIVE, action="test")
    assert pend("newest")
    with registry.admin_write() as connection:
        registry.tenants.promote_secrets(connection, active)
    assert registry.tenants.get("acme").generation == active.generation + 1


# -- spares --


def spare(registry: Registry, revision: str | None = "0001") -> Tenant:
    with registry.admin_write() as connection:
        made = registry.tenants.create_spare(connection)
    place(registry, made, database=f"t_{made.id.hex[:16]}")
    with registry.admin_write() as connection:
        registry.tenants.set_revision_in(connection, made, revision)
        assert registry.tenants.set_ready(connection, made, ready=True)
    return registry.tenants.row(made.id).tenant


def take(registry: Registry, slug: str, wish: SpareWish) -> Tenant | None:
    with registry.write() as connection:
        return registry.tenants.take_spare(connection, sign_up_values(slug=slug), wish, TenantState.ACTIVE)


def test_a_spare_has_an_id_and_no_name_and_is_in_no_list(registry: Registry) -> None:
    made = spare(registry)
    assert (made.slug, made.name, made.state) == (str(made.id), "", TenantState.SPARE)
    assert registry.tenants.list() == [] and registry.tenants.spares() == [made]
    with pytest.raises(TenantNotFound):
        registry.tenants.get(str(made.id)[:8])


def test_the_oldest_spare_that_will_do_is_taken(registry: Registry) -> None:
    first, second, behind = spare(registry), spare(registry), spare(registry, "0000")
    for wish in (SpareWish("0002"), SpareWish("0001", server="mars"), SpareWish("0001", region="mars"), SpareWish(None)):
        assert take(registry, "nobody", wish) is None
    taken = take(registry, "acme", SpareWish("0001", server="default"))
    assert taken is not None
    assert (taken.id, taken.slug, taken.state, taken.ready_at, taken.database) == (
        first.id,
        "acme",
        TenantState.ACTIVE,
        None,
        first.database,
    )
    assert taken.version == first.version + 1 and taken.server == "default"
    with pytest.raises(TenantExists):
        take(registry, "acme", SpareWish("0001"))
    with registry.admin_write() as connection:
        registry.tenants.set_ready(connection, second, ready=False)
    assert take(registry, "beta", SpareWish("0001")) is None
    other = take(registry, "beta", SpareWish(known=False))
    assert other is not None and other.id == behind.id
    with registry.admin_write() as connection:
        assert not registry.tenants.set_ready(connection, behind, ready=False)  # it is somebody's


# -- the end --


def test_only_what_nothing_holds_moves_on_to_be_purged(registry: Registry, acme: Tenant) -> None:
    active = registry.tenants.transition(acme, TenantState.ACTIVE, action="tenant.activate")
    deleted = registry.tenants.transition(active, TenantState.DELETED, action="tenant.delete")
    registry.tenants.hold(deleted, "case 17")

    def purge() -> Tenant:
        with registry.write() as connection:
            return registry.tenants.transition_in(connection, deleted, TenantState.PURGING, action="tenant.purging", held=False)

    with pytest.raises(IllegalTransition):
        purge()
    assert registry.tenants.get("acme").state is TenantState.DELETED
    registry.tenants.hold(deleted, None)
    assert purge().state is TenantState.PURGING
    assert [action for action in actions(registry, acme) if "hold" in action or "release" in action] == ["tenant.release", "tenant.hold"]


def test_the_fence_follows_the_state(registry: Registry, acme: Tenant) -> None:
    active = registry.tenants.transition(acme, TenantState.ACTIVE, action="tenant.activate")
    assert active.fence is None
    suspended = registry.tenants.transition(active, TenantState.SUSPENDED, action="tenant.suspend")
    assert suspended.fence is Fence.PENDING
    with registry.admin_write() as connection:
        assert registry.tenants.fenced(connection, suspended)
    deleted = registry.tenants.transition(registry.tenants.get("acme"), TenantState.DELETED, action="tenant.delete")
    assert deleted.fence is Fence.PENDING
    with registry.admin_write() as connection:
        assert not registry.tenants.fenced(connection, suspended)  # what was done is not what is wanted now
    assert registry.tenants.get("acme").fence is Fence.PENDING
    assert registry.tenants.transition(deleted, TenantState.ACTIVE, action="tenant.restore").fence is None


def test_the_audit_log_says_who_did_what_and_holds_nothing_personal(registry: Registry, acme: Tenant) -> None:
    with acting("user-7", request_id="req-1"):
        registry.tenants.update(acme, email="office@acme.example", name="Dr. Ada")
    entry = registry.audit.list("acme")[0]
    assert (entry.actor, entry.request_id, entry.action, entry.outcome) == ("user-7", "req-1", "tenant.update", "done")
    assert entry.tenant_id == acme.id
    assert entry.details == {"fields": ["email", "name"]}
    assert entry.at.tzinfo is timezone.utc
    assert "Ada" not in repr(registry.audit.list())
    assert "office@" not in repr(registry.audit.list())


def test_the_audit_log_lists_the_newest_first_and_no_more_than_asked(registry: Registry, acme: Tenant) -> None:
    for number in range(5):
        registry.tenants.update(acme, plan=f"plan-{number}")
    numbers = [entry.id for entry in registry.audit.list(limit=3)]
    assert numbers == sorted(numbers, reverse=True)
    assert len(numbers) == 3
    with pytest.raises(TenantNotFound):
        registry.audit.list("nobody")


@pytest.mark.parametrize("breaks", [True, False])
def test_a_change_without_its_audit_entry_is_no_change(
    registry: Registry, acme: Tenant, monkeypatch: pytest.MonkeyPatch, breaks: bool
) -> None:
    if breaks:
        monkeypatch.setattr("tenantdb.registry.audit.current_actor", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            registry.tenants.transition(acme, TenantState.ACTIVE, action="tenant.activate")
    else:
        registry.tenants.transition(acme, TenantState.ACTIVE, action="tenant.activate")
    assert (registry.tenants.get("acme").state is TenantState.PROVISIONING) is breaks


# -- servers --


def test_a_server_is_registered_once_and_found_by_name_and_id(registry: Registry) -> None:
    made = registry.servers.add("db1", backend="postgresql", host="db1.internal", port=5432, extensions=["pgcrypto"], region="eu")
    assert (made.direct_host, made.direct_port, made.extensions, made.draining) == ("db1.internal", 5432, ("pgcrypto",), False)
    assert registry.servers.add("db1", backend="postgresql", host="db1.internal", port=5432, extensions=["pgcrypto"], region="eu") == made
    assert registry.servers.get("db1") == registry.servers.get(made.id) == made
    assert registry.servers.list() == [made]
    assert [entry.action for entry in registry.audit.list()] == ["server.add"]
    with pytest.raises(NoServerAvailable):
        registry.servers.get("db2")


@pytest.mark.parametrize(
    "address",
    [
        {"host": "evil.example,db1.internal"},  # a rule for .internal would look at the end of it, and libpq go to its beginning
        {"host": "db1.internal", "direct_host": "evil.example,db1.internal"},
        {"host": "db1 hostaddr=192.0.2.1"},
        {"host": "db1?host=evil"},
        {"host": "user@db1"},
        {"host": "db1", "port": 0},
        {"host": "db1", "port": 99999},
        {"host": "db1", "direct_port": -1},
    ],
)
def test_an_address_is_one_host_and_one_port(registry: Registry, address: dict[str, str | int]) -> None:
    with pytest.raises(ConfigError):
        registry.servers.add("db1", backend="postgresql", **address)  # type: ignore[arg-type]

    assert registry.servers.list() == [] and registry.audit.list() == []


@pytest.mark.parametrize("host", [None, "db1.internal", "192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1", "/run/postgresql"])
def test_whatever_is_one_host_is_taken(registry: Registry, host: str | None) -> None:
    assert registry.servers.add("db1", backend="postgresql", host=host, port=65535).host == host


def test_a_new_address_keeps_tenants_readable(registry: Registry, acme: Tenant) -> None:
    place(registry, acme)
    moved = registry.servers.add("default", backend="postgresql", host="pooler", port=6432, direct_host="db1", direct_port=5432)
    assert (moved.host, moved.port, moved.direct_host, moved.direct_port) == ("pooler", 6432, "db1", 5432)
    assert registry.runtime_password(registry.tenants.record("acme")) == "runtime-pw"


def test_a_server_does_not_change_its_kind(registry: Registry) -> None:
    registry.servers.add("default", backend="sqlite", path="data/tenants")
    with pytest.raises(ConfigError, match="choose another name"):
        registry.servers.add("default", backend="postgresql", host="db1")


@pytest.mark.parametrize("values", [{"host": "evil"}, {"port": 1}, {"direct_host": "evil"}, {"address_seal": None}, {"region": "us"}])
def test_an_edited_address_is_found_out_before_a_password_goes_there(registry: Registry, values: dict[str, object]) -> None:
    server = registry.servers.add("db1", backend="postgresql", host="db1", port=5432)
    with registry.admin_write() as connection:
        connection.execute(update(tables.servers).values(**values))
    if "region" in values:  # the twin: what is no address is not sealed
        assert registry.servers.get("db1").region == "us"
        return
    for look in (
        lambda: registry.servers.get("db1"),
        lambda: registry.servers.get(server.id),
        registry.servers.list,
        registry.servers.pick,
    ):
        with pytest.raises(CredentialTampered):
            look()


def test_the_emptiest_open_server_with_room_is_picked(registry: Registry, acme: Tenant) -> None:
    assert_none = pytest.raises(NoServerAvailable)
    with assert_none:
        registry.servers.pick()
    for name, region in (("default", "eu"), ("second", "eu"), ("third", "us")):
        registry.servers.add(name, backend="postgresql", host=name, region=region, capacity=1)
    place_on_default: Tenant = place(registry, acme)  # registers default anew, without region and limit
    assert place_on_default.server == "default"

    def picked(name: str | None = None, region: str | None = None) -> str:
        server: Server = registry.servers.pick(name, region=region)
        return server.name

    assert picked() == "second"
    assert picked(region="us") == "third"
    assert picked("default") == "default"
    registry.servers.set_draining("second", draining=True)
    assert picked() == "third"
    with pytest.raises(NoServerAvailable):
        picked("second")
    registry.servers.set_draining("second", draining=False)
    assert picked("second") == "second"
    with pytest.raises(NoServerAvailable):
        picked(region="mars")
    registry.servers.add("default", backend="postgresql", host="db1", port=5432, capacity=1)
    with pytest.raises(NoServerAvailable):
        picked("default")  # full
    with pytest.raises(NoServerAvailable):
        registry.servers.set_draining("nowhere", draining=True)


def test_no_two_tenants_share_a_database(registry: Registry, acme: Tenant) -> None:
    from sqlalchemy.exc import IntegrityError

    place(registry, acme)
    beta, _ = registry.sign_up(SignUp(slug="beta"))
    with pytest.raises(IntegrityError):
        place(registry, beta)
    assert registry.tenants.get("beta").database is None


def test_ids_are_uuids_on_both_databases(registry: Registry, acme: Tenant) -> None:
    with registry.read() as connection:
        assert isinstance(connection.scalar(select(tables.tenants.c.id)), UUID)
