"""Every secret of a registry moves to the newest key: whatever interrupts it, whoever writes meanwhile, and past those that do not open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Engine, event, select, update

from tenantdb.context import acting
from tenantdb.errors import CredentialTampered, KeyServiceUnavailable, OperationInProgress, SecretKeyError
from tenantdb.model import DatabaseRole, Server, Tenant, TenantState
from tenantdb.registry import Keyring, Registry, SignUp, rotation, tables
from tenantdb.registry.rotation import KeyRotation, KeyUse
from tenantdb.registry.secrets import AUDIT, OWNER, RUNTIME, generate_key
from tenantdb.settings import KeyService, Settings
from tests.kms import LocalKms
from tests.unit.registry_fixtures import KEY

Engines = tuple[Engine, Engine]
NEW = generate_key()
MakeProcess = Callable[..., Registry]
SECRETS = ("owner_secret", "owner_secret_pending", "runtime_secret", "runtime_secret_pending")
HOW_MANY = 3
ALL = HOW_MANY * 4 + 2  # and the server's address, and the check of the keys


@pytest.fixture
def process(registry_engines: Engines, registry_settings: Settings) -> MakeProcess:
    """Another process of the same installation."""

    def make(*keys: str, kms: KeyService | None = None) -> Registry:
        return Registry(*registry_engines, registry_settings, Keyring(keys, kms))

    return make


def force(registry: Registry, tenant: Tenant, **values: Any) -> None:
    """Change a row behind everybody's back."""
    with registry.admin_write() as connection:
        connection.execute(update(tables.tenants).where(tables.tenants.c.id == tenant.id).values(**values))


def sealed(registry: Registry, tenant: Tenant, server: Server, role: DatabaseRole, password: str) -> bytes:
    database = f"t_{tenant.id.hex[:16]}"
    return registry.seal_password(password, role=role, tenant=tenant, server=server, database=database, role_name=f"{database}_{role}")


def pend(registry: Registry, tenant: Tenant, server: Server) -> None:
    """Passwords that are about to replace the tenant's, as a rotation of passwords leaves them when it is interrupted."""
    force(registry, tenant, **{f"{role}_secret_pending": sealed(registry, tenant, server, role, f"{role}-next") for role in DatabaseRole})


@pytest.fixture
def fleet(registry: Registry) -> list[Tenant]:
    """Three tenants in two pages, with four secrets each. The first is the first that a rotation comes to."""
    server = registry.servers.add("default", backend="postgresql", host="db1", port=5432)
    made = [registry.sign_up(SignUp(slug=slug))[0] for slug in ("acme", "beta", "gamma")]
    for tenant in made:
        database = f"t_{tenant.id.hex[:16]}"
        secrets = {f"{role}_secret": sealed(registry, tenant, server, role, f"{role}-pw") for role in DatabaseRole}
        roles = {f"{role}_role": f"{database}_{role}" for role in DatabaseRole}
        force(registry, tenant, server_id=server.id, database=database, **roles, **secrets)
        pend(registry, tenant, server)
        registry.forget(tenant.id)
    return sorted((registry.tenants.get(tenant.id) for tenant in made), key=lambda tenant: tenant.id.hex)


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "BATCH", 2)


def opens(registry: Registry, slug: str) -> list[str]:
    """All of a tenant's passwords, as a process opens them."""
    record = registry.tenants.record(slug)
    with registry.admin_write() as connection:
        row = connection.execute(select(*(tables.tenants.c[name] for name in SECRETS)).where(tables.tenants.c.id == record.tenant.id)).one()
    found = []
    for name in SECRETS:
        role = DatabaseRole(name.split("_")[0])
        found.append(registry._open(record, role, row._mapping[name], getattr(record.tenant, f"{role}_role")))
    return found


PLAIN = ["owner-pw", "owner-next", "runtime-pw", "runtime-next"]


def stored(registry: Registry) -> dict[str, dict[str, bytes]]:
    with registry.admin_write() as connection:
        rows = connection.execute(select(tables.tenants.c.slug, *(tables.tenants.c[name] for name in SECRETS))).mappings().all()
    return {row["slug"]: {name: row[name] for name in SECRETS} for row in rows}


def sealed_uses(registry: Registry) -> list[KeyUse]:
    return [use for use in registry.keys.in_use() if use.purpose != AUDIT]


# -- all of them -----------------------------------------------------------------------------------------------------------------------


def test_every_secret_moves_and_the_old_key_may_go(process: MakeProcess, fleet: list[Tenant]) -> None:
    both = process(NEW, KEY)
    told: list[tuple[int, int]] = []

    report = both.keys.rotate(lambda done, total: told.append((done, total)))

    assert (report.resealed, report.already, report.failed, report.ok) == (ALL, 0, (), True)
    assert report.keys == {purpose: Keyring([NEW]).newest(purpose).hex() for purpose in (OWNER, RUNTIME)}
    assert report.replaced == tuple(sorted(Keyring([KEY]).newest(purpose).hex() for purpose in (OWNER, RUNTIME)))
    assert told == [(2, 4), (3, 4), (4, 4)]
    alone = process(NEW)
    assert {tenant.slug: opens(alone, tenant.slug) for tenant in fleet} == {tenant.slug: PLAIN for tenant in fleet}
    assert alone.servers.get("default").host == "db1"
    with pytest.raises(SecretKeyError):  # the twin: the old key alone opens nothing any more
        process(KEY).lookup("acme")


def test_once_more_finds_nothing_to_do_and_writes_nothing(process: MakeProcess, fleet: list[Tenant]) -> None:
    both = process(NEW, KEY)
    both.keys.rotate()
    before, versions = stored(both), [both.tenants.get(tenant.id).version for tenant in fleet]

    report = both.keys.rotate()

    assert (report.resealed, report.already, report.replaced) == (0, ALL, ())
    assert (stored(both), [both.tenants.get(tenant.id).version for tenant in fleet]) == (before, versions)


def test_a_secret_sealed_anew_is_a_new_version_of_the_same_generation(process: MakeProcess, fleet: list[Tenant]) -> None:
    both = process(NEW, KEY)
    before = both.lookup("acme")

    both.keys.rotate()

    after = both.lookup("acme")  # at once: this process forgets what it has changed
    assert after.runtime_secret != before.runtime_secret
    assert (after.tenant.version, after.tenant.generation) == (before.tenant.version + 1, before.tenant.generation)
    assert both.runtime_password(before) == both.runtime_password(after) == "runtime-pw"


def test_a_registry_without_any_secret_has_nothing_to_rotate(empty_registry: Registry, process: MakeProcess) -> None:
    without = process()
    without.init()

    assert without.keys.in_use() == ()
    with pytest.raises(SecretKeyError):
        without.keys.rotate()


def test_it_takes_the_root_keys_and_is_refused_before_anything_is_written(process: MakeProcess, fleet: list[Tenant]) -> None:
    runtime_alone = process(*Keyring([NEW, KEY]).derive(RUNTIME))
    before = stored(runtime_alone)

    with pytest.raises(SecretKeyError, match="owner"):
        runtime_alone.keys.rotate()

    assert stored(runtime_alone) == before


def test_keys_that_open_nothing_are_refused_at_once(process: MakeProcess, fleet: list[Tenant]) -> None:
    before = stored(process(KEY))
    with pytest.raises(SecretKeyError) as caught:
        process(NEW).keys.rotate()
    assert NEW not in str(caught.value) and KEY not in str(caught.value)
    assert stored(process(KEY)) == before


# -- the keys in use -------------------------------------------------------------------------------------------------------------------


def test_the_keys_in_use_are_told_before_during_and_after(process: MakeProcess, fleet: list[Tenant]) -> None:
    both = process(NEW, KEY)
    counts = {OWNER: 2 * HOW_MANY, RUNTIME: 2 * HOW_MANY + 2}

    assert [(use.purpose, use.name, use.secrets, use.newest) for use in sealed_uses(both)] == [
        (purpose, "key 2", count, False) for purpose, count in counts.items()
    ]
    assert all(use.needs_rotation for use in sealed_uses(both))
    with interrupted_at(both, commits=6):
        both.keys.rotate()
    assert {(use.name, use.newest) for use in sealed_uses(both)} == {("key 1", True), ("key 2", False)}
    both.keys.rotate()
    assert [(use.purpose, use.name, use.secrets, use.newest) for use in sealed_uses(both)] == [
        (purpose, "key 1", count, True) for purpose, count in counts.items()
    ]
    assert not any(use.needs_rotation for use in both.keys.in_use())


def test_a_key_that_was_not_given_has_no_name(process: MakeProcess, fleet: list[Tenant]) -> None:
    stranger = Keyring([generate_key()])
    both = process(NEW, KEY)
    force(both, fleet[0], runtime_secret=stranger.seal(RUNTIME, b"pw", str(fleet[0].id), "runtime_secret"))

    (use,) = [use for use in both.keys.in_use() if use.key_id == stranger.newest(RUNTIME).hex()]

    assert (use.name, use.secrets, use.newest, use.needs_rotation) == (None, 1, False, True)


def test_a_damaged_secret_needs_no_key(process: MakeProcess, fleet: list[Tenant]) -> None:
    force(process(KEY), fleet[0], runtime_secret=b"\x01damaged")

    (use,) = [use for use in process(KEY).keys.in_use() if use.key_id is None]

    assert (use.purpose, use.secrets, use.needs_rotation) == (RUNTIME, 1, False)


def test_entries_of_the_audit_log_are_counted_and_never_in_the_way(process: MakeProcess, fleet: list[Tenant]) -> None:
    both = process(NEW, KEY)
    mac = Keyring([KEY]).newest(AUDIT) + bytes(32)
    with both.admin_write() as connection:
        connection.execute(update(tables.audit).values(mac=mac))
    both.keys.rotate()

    older = [use for use in both.keys.in_use() if use.purpose == AUDIT and not use.newest]

    assert [(use.name, use.needs_rotation) for use in older] == [("key 2", False)]
    assert older[0].secrets >= HOW_MANY


# -- interrupted -----------------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As by a signal: nobody catches it."""


@contextmanager
def interrupted_at(registry: Registry, *, statements: int | None = None, commits: int | None = None) -> Iterator[None]:
    """The process dies before its n-th statement or commit."""
    engine = registry._transactions.admin_engine
    left = {"statement": statements, "commit": commits}

    def count(kind: str) -> None:
        rest = left[kind]
        if rest is not None:
            left[kind] = rest - 1
            if rest <= 1:
                raise Killed

    def before(*args: Any) -> None:
        count("statement")

    def commit(connection: Any) -> None:
        count("commit")

    event.listen(engine, "before_cursor_execute", before)
    event.listen(engine, "commit", commit)
    try:
        with pytest.raises(Killed):
            yield
    finally:
        event.remove(engine, "before_cursor_execute", before)
        event.remove(engine, "commit", commit)


@pytest.mark.parametrize("kind", ["statements", "commits"])
@pytest.mark.parametrize("at", range(2, 40, 2))
def test_killed_anywhere_all_goes_on_working_and_the_next_run_completes_it(
    process: MakeProcess, fleet: list[Tenant], kind: str, at: int
) -> None:
    dying = process(NEW, KEY)
    dying.ping()
    complete = False
    try:
        with interrupted_at(dying, **{kind: at}):
            dying.keys.rotate()
            complete = True
    except pytest.fail.Exception:
        assert complete  # it has fewer statements than that

    both = process(NEW, KEY)
    assert {tenant.slug: opens(both, tenant.slug) for tenant in fleet} == {tenant.slug: PLAIN for tenant in fleet}
    if not complete and any(use.needs_rotation for use in both.keys.in_use()):
        with pytest.raises(SecretKeyError):  # nobody takes the old key away too early without being told
            process(NEW).ping()
    assert both.keys.rotate().ok
    alone = process(NEW)
    assert {tenant.slug: opens(alone, tenant.slug) for tenant in fleet} == {tenant.slug: PLAIN for tenant in fleet}


# -- others write meanwhile ------------------------------------------------------------------------------------------------------------


def meddle(registry: Registry, monkeypatch: pytest.MonkeyPatch, write: Callable[[], None], *, times: int = 1) -> None:
    """Have somebody write between the rotation's look and its own writing."""
    seal, left = Keyring.seal, [times]

    def sealing(ring: Keyring, purpose: str, plaintext: bytes, *place: str) -> bytes:
        sealed = seal(ring, purpose, plaintext, *place)
        if ring is registry.keyring and left[0] and plaintext == b"runtime-pw":
            left[0] -= 1
            write()
        return sealed

    monkeypatch.setattr(Keyring, "seal", sealing)


def test_who_writes_a_secret_meanwhile_wins_and_theirs_is_sealed_anew(
    process: MakeProcess, fleet: list[Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    old_process, both = process(KEY), process(NEW, KEY)
    first, server = fleet[0], old_process.servers.get("default")
    newer = sealed(old_process, first, server, DatabaseRole.RUNTIME, "runtime-newer")
    meddle(both, monkeypatch, lambda: force(old_process, first, runtime_secret=newer))

    report = both.keys.rotate()

    assert report.ok and report.resealed == ALL
    assert opens(process(NEW), first.slug) == ["owner-pw", "owner-next", "runtime-newer", "runtime-next"]


def test_a_tenant_that_is_purged_meanwhile_is_left_alone(
    process: MakeProcess, fleet: list[Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = process(NEW, KEY)
    gone = fleet[0]
    erased: dict[str, Any] = dict.fromkeys(SECRETS)
    meddle(both, monkeypatch, lambda: force(process(KEY), gone, state=str(TenantState.PURGED), slug=None, **erased))

    report = both.keys.rotate()

    assert report.ok
    with both.admin_write() as connection:
        row = connection.execute(select(*(tables.tenants.c[name] for name in SECRETS)).where(tables.tenants.c.id == gone.id)).one()
    assert set(row) == {None}


def test_what_somebody_writes_again_and_again_is_left_to_the_next_run_and_keeps_the_old_key(
    process: MakeProcess, fleet: list[Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    old_process, both = process(KEY), process(NEW, KEY)
    busy, server = fleet[0], old_process.servers.get("default")
    meddle(both, monkeypatch, lambda: pend(old_process, busy, server), times=100)

    report = both.keys.rotate()
    monkeypatch.undo()

    assert [(failure.tenant, type(failure.error)) for failure in report.failed] == [(busy.slug, OperationInProgress)]
    with pytest.raises(SecretKeyError):
        process(NEW).ping()
    assert process(NEW, KEY).keys.rotate().ok
    process(NEW).ping()


# -- what does not open ----------------------------------------------------------------------------------------------------------------


def swap(registry: Registry, one: Tenant, other: Tenant) -> None:
    found = stored(registry)
    for tenant, theirs in ((one, other), (other, one)):
        force(registry, tenant, runtime_secret=found[theirs.slug]["runtime_secret"])


def failures(report: KeyRotation) -> set[tuple[str, str, type[Exception]]]:
    return {(failure.tenant, failure.column, type(failure.error)) for failure in report.failed}


def test_swapped_secrets_are_reported_left_as_they_are_and_stop_nobody(process: MakeProcess, fleet: list[Tenant]) -> None:
    both = process(NEW, KEY)
    swap(both, fleet[0], fleet[1])
    before = stored(both)

    report = both.keys.rotate()

    assert failures(report) == {(tenant.slug, "runtime_secret", CredentialTampered) for tenant in fleet[:2]}
    assert (report.resealed, report.ok) == (ALL - 2, False)
    after = stored(both)
    for tenant in fleet[:2]:
        assert after[tenant.slug]["runtime_secret"] == before[tenant.slug]["runtime_secret"]
        assert after[tenant.slug]["owner_secret"] != before[tenant.slug]["owner_secret"]
    assert opens(process(NEW), fleet[2].slug) == PLAIN
    assert [use.secrets for use in both.keys.in_use() if use.needs_rotation] == [2]  # the row may come back from a backup: keep the key


def flipped(blob: bytes, position: int) -> bytes:
    return blob[:position] + bytes([blob[position] ^ 1]) + blob[position + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda blob: flipped(blob, -1 % len(blob)),
        lambda blob: flipped(blob, 0),
        lambda blob: blob[:-1],
        lambda blob: b"",
        lambda blob: blob[:1] + Keyring([NEW]).newest(RUNTIME) + blob[9:],  # says that it is sealed with the newest key already
    ],
    ids=["bit", "version", "truncated", "empty", "key id"],
)
def test_a_damaged_secret_is_reported_whatever_it_says_of_itself(
    process: MakeProcess, fleet: list[Tenant], damage: Callable[[bytes], bytes]
) -> None:
    both = process(NEW, KEY)
    blob = stored(both)[fleet[0].slug]["runtime_secret"]
    force(both, fleet[0], runtime_secret=damage(blob))

    report = both.keys.rotate()

    assert failures(report) == {(fleet[0].slug, "runtime_secret", CredentialTampered)}


@pytest.mark.parametrize("values", [{"database": "t_ffffffffffffffff"}, {"runtime_role": "postgres"}])
def test_a_place_that_was_edited_is_not_sealed_as_if_it_were_true(
    process: MakeProcess, fleet: list[Tenant], values: dict[str, str]
) -> None:
    both = process(NEW, KEY)
    force(both, fleet[0], **values)

    report = both.keys.rotate()

    assert (fleet[0].slug, "runtime_secret", CredentialTampered) in failures(report)


def test_an_address_that_was_edited_is_not_sealed_as_if_it_were_true(process: MakeProcess, fleet: list[Tenant]) -> None:
    both = process(NEW, KEY)
    with both.admin_write() as connection:
        connection.execute(update(tables.servers).values(host="evil"))

    report = both.keys.rotate()

    assert failures(report) == {("server default", "address_seal", CredentialTampered)}
    with pytest.raises(CredentialTampered):
        both.servers.get("default")


# -- the audit log ---------------------------------------------------------------------------------------------------------------------


def entries(registry: Registry) -> list[tuple[str, str, Any]]:
    return [(entry.actor, entry.outcome, entry.details) for entry in registry.audit.list() if entry.action == "keys.rotate"]


def test_a_run_leaves_one_entry_with_counts_and_key_ids_and_no_key(process: MakeProcess, fleet: list[Tenant]) -> None:
    both = process(NEW, KEY)
    swap(both, fleet[0], fleet[1])
    with acting("operator"):
        report = both.keys.rotate()

    ((actor, outcome, details),) = entries(both)

    assert (actor, outcome) == ("operator", "failed")
    assert details == {
        "resealed": ALL - 2,
        "already": 0,
        "failed": 2,
        "keys": dict(report.keys),
        "replaced": list(report.replaced),
    }
    swap(both, fleet[0], fleet[1])
    both.keys.rotate()
    assert [outcome for _, outcome, _ in entries(both)] == ["done", "failed"]


def test_a_run_that_is_interrupted_says_so(process: MakeProcess, fleet: list[Tenant]) -> None:
    both = process(NEW, KEY)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        both.keys.rotate(stop)

    ((_, outcome, details),) = entries(both)
    assert (outcome, details["resealed"]) == ("interrupted", 8)


# -- to a key service and back ---------------------------------------------------------------------------------------------------------


def test_secrets_move_to_a_key_service_and_back(process: MakeProcess, fleet: list[Tenant]) -> None:
    kms = LocalKms()

    there = process(KEY, kms=kms).keys.rotate()
    assert (there.resealed, there.ok) == (ALL, True)
    alone = process(kms=kms)
    assert {tenant.slug: opens(alone, tenant.slug) for tenant in fleet} == {tenant.slug: PLAIN for tenant in fleet}
    assert {use.name for use in sealed_uses(alone)} == {"kms"}
    with pytest.raises(SecretKeyError):
        process(KEY).ping()

    back = process(NEW, "kms", kms=kms).keys.rotate()
    assert (back.resealed, back.ok) == (ALL, True)
    assert opens(process(NEW), "acme") == PLAIN


def test_a_new_key_of_the_service_wraps_anew(process: MakeProcess, fleet: list[Tenant]) -> None:
    kms = LocalKms()
    registry = process(KEY, kms=kms)
    registry.keys.rotate()
    kms.key_id = "two"
    assert all(use.needs_rotation for use in sealed_uses(registry))

    assert registry.keys.rotate().resealed == ALL

    del kms.keys["one"]
    assert opens(process(kms=kms), "acme") == PLAIN


def test_an_outage_of_the_service_stops_the_run_and_the_next_completes_it(
    process: MakeProcess, fleet: list[Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    kms = LocalKms()
    registry = process(KEY, kms=kms)
    before = stored(registry)
    kms.down = True
    with pytest.raises(KeyServiceUnavailable):
        registry.keys.rotate()
    assert stored(registry) == before
    assert kms.calls("wrap") <= 5

    kms.down = False
    assert registry.keys.rotate().ok


def test_a_service_that_is_at_odds_with_one_secret_does_not_keep_the_others(process: MakeProcess, fleet: list[Tenant]) -> None:
    class Moody(LocalKms):
        def wrap(self, data_key: bytes, context: Any) -> bytes:
            if context["tenant"] == str(fleet[0].id) and context["purpose"] == RUNTIME:
                raise TimeoutError
            return super().wrap(data_key, context)

    report = process(KEY, kms=Moody()).keys.rotate()

    assert {(tenant, kind) for tenant, _, kind in failures(report)} == {(fleet[0].slug, KeyServiceUnavailable)}
    assert report.resealed == ALL - 2


def test_a_look_up_asks_the_service_so_that_a_connect_need_not(process: MakeProcess, fleet: list[Tenant]) -> None:
    kms = LocalKms()
    process(KEY, kms=kms).keys.rotate()
    registry = process(kms=kms)
    record = registry.lookup("acme")
    before = kms.calls("unwrap")
    kms.down = True

    assert registry.runtime_password(record) == "runtime-pw"
    assert kms.calls("unwrap") == before


def test_an_outage_of_the_service_at_start_up_is_no_wrong_key(process: MakeProcess, fleet: list[Tenant]) -> None:
    kms = LocalKms()
    process(KEY, kms=kms).keys.rotate()
    kms.down = True
    registry = process(kms=kms)
    with pytest.raises(KeyServiceUnavailable) as caught:
        registry.lookup("acme")
    assert "canary" not in str(caught.value)
    kms.down = False
    assert registry.lookup("acme").tenant.slug == "acme"
