"""The chain of the audit log: what was edited, taken out, moved or slipped in is found at its number."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, delete, event, func, insert, select, text, update
from sqlalchemy.exc import IntegrityError

from tenantdb import Tenant, acting
from tenantdb.errors import ConfigError, SecretKeyError, TenantNotFound
from tenantdb.model import AuditHead, AuditLog, AuditReport, Break, TenantState
from tenantdb.registry import Keyring, Registry, SignUp, anchors, audit, tables
from tenantdb.registry.chain import Chain, Head, Verifier, plain_details
from tenantdb.registry.refusals import MANY, Refusal, RefusalLog
from tenantdb.registry.secrets import AUDIT, RUNTIME, generate_key
from tenantdb.settings import Settings
from tests.unit.registry_fixtures import KEY

LATER = datetime(2030, 1, 1, 12, 0, 0, 123456, tzinfo=timezone.utc)
_log, _heads = tables.audit, tables.audit_heads


@dataclass(frozen=True)
class Line:
    """An entry as the verifier sees it."""

    seq: int
    object: str | None
    mac: bytes | None = None
    at: datetime = LATER
    actor: str = "ada"
    action: str = "patient.read"
    outcome: str = "done"
    request_id: str | None = None
    reason: str | None = None
    source: str | None = None
    details: Any = None

    def said(self) -> dict[str, Any]:
        return {**vars(self), "details": self.details or {}}


def written(chain: Chain, count: int, *, mac: bytes | None = None, start: int = 1) -> list[Line]:
    lines = []
    for seq in range(start, start + count):
        line = Line(seq, f"p{seq}", details={"n": seq})
        mac = chain.sign(mac, seq, line.said())
        lines.append(replace(line, mac=mac))
    return lines


def verdict(chain: Chain, lines: list[Line], head: Head | None = None, anchor: AuditHead | None = None) -> tuple[int | None, Break | None]:
    head = head or Head(lines[-1].seq, lines[-1].mac)
    verifier = Verifier(chain, head, anchor)
    for line in lines:
        verifier.feed(line)
    report = verifier.finish()
    return report.broken_at, report.why


RING = Keyring([generate_key()])
ACME = Chain(AuditLog.REGISTRY, UUID(int=7), RING)
WHOLE = written(ACME, 6)
HEAD = Head(6, WHOLE[-1].mac)


def test_a_chain_as_it_was_written_holds() -> None:
    assert verdict(ACME, WHOLE) == (None, None)


@pytest.mark.parametrize("field", ["object", "actor", "action", "outcome", "request_id", "reason", "source", "at", "details"])
def test_an_edited_entry_is_found_at_its_number_whatever_was_edited(field: str) -> None:
    other: Any = {"at": LATER + timedelta(microseconds=1), "details": {"n": 4}}.get(field, "else")
    lines = [replace(line, **{field: other}) if line.seq == 3 else line for line in WHOLE]

    assert verdict(ACME, lines) == (3, Break.EDITED)


def test_an_entry_taken_out_of_the_middle_is_missed() -> None:
    assert verdict(ACME, [line for line in WHOLE if line.seq != 3]) == (3, Break.MISSING)


def test_a_gap_that_was_closed_by_numbering_anew_is_found_too() -> None:
    lines = [line if line.seq < 3 else replace(line, seq=line.seq - 1) for line in WHOLE if line.seq != 3]

    assert verdict(ACME, lines) == (3, Break.EDITED)


def test_swapped_entries_are_found_to_be_reordered() -> None:
    swapped = [*WHOLE[:2], replace(WHOLE[4], seq=3), WHOLE[3], replace(WHOLE[2], seq=5), WHOLE[5]]

    assert verdict(ACME, swapped) == (3, Break.REORDERED)


def test_a_second_entry_of_the_same_number_is_forged() -> None:
    assert verdict(ACME, [*WHOLE[:4], replace(WHOLE[3], object="p9"), *WHOLE[4:]]) == (4, Break.FORGED)


def test_an_entry_without_a_mac_behind_those_that_have_one_is_forged() -> None:
    forged = Line(7, "p7")

    assert verdict(ACME, [*WHOLE, forged], Head(7, None)) == (7, Break.FORGED)


def test_a_mac_of_a_key_that_is_not_given_is_no_edit() -> None:
    assert verdict(replace(ACME, keyring=Keyring([generate_key()])), WHOLE) == (1, Break.UNKNOWN_KEY)


def test_an_entry_of_another_tenant_or_another_log_does_not_belong() -> None:
    assert verdict(replace(ACME, tenant_id=UUID(int=8)), WHOLE) == (1, Break.EDITED)
    assert verdict(replace(ACME, log=AuditLog.RECORDS), WHOLE) == (1, Break.EDITED)


def test_a_tail_that_was_cut_off_is_missed_by_the_head() -> None:
    assert verdict(ACME, WHOLE[:4], HEAD) == (5, Break.MISSING)
    assert verdict(ACME, WHOLE, Head(6, WHOLE[4].mac)) == (6, Break.HEAD)


def test_a_tail_that_was_cut_off_with_its_head_is_missed_by_the_anchor_alone() -> None:
    anchor = AuditHead(log=AuditLog.REGISTRY, tenant_id=ACME.tenant_id, seq=6, mac=WHOLE[5].mac, at=LATER)

    assert verdict(ACME, WHOLE[:4]) == (None, None)
    assert verdict(ACME, WHOLE[:4], None, anchor) == (5, Break.ANCHOR)
    assert verdict(ACME, WHOLE, None, anchor) == (None, None)
    assert verdict(ACME, WHOLE, None, replace(anchor, seq=4)) == (4, Break.ANCHOR)


def test_a_checkpoint_that_we_did_not_seal_does_not_hold() -> None:
    kept = WHOLE[3:]
    sealed = Head(6, WHOLE[5].mac, 4, WHOLE[2].mac, ACME.seal(4, WHOLE[2].mac))

    assert verdict(ACME, kept, sealed) == (None, None)
    assert verdict(ACME, kept, HEAD) == (1, Break.MISSING)
    assert verdict(ACME, kept, replace(sealed, kept_seal=None)) == (4, Break.FORGED)
    assert verdict(ACME, kept[1:], replace(sealed, kept_from=5, kept_mac=WHOLE[3].mac)) == (5, Break.FORGED)


def test_without_a_key_nothing_is_authenticated_and_gaps_are_still_found() -> None:
    keyless = replace(ACME, keyring=Keyring())
    lines = written(keyless, 3)
    verifier = Verifier(keyless, Head(3, None))
    for line in lines:
        verifier.feed(line)
    report = verifier.finish()

    assert (report.ok, report.entries, report.unauthenticated) == (True, 3, 3)
    assert verdict(keyless, [lines[0], lines[2]]) == (2, Break.MISSING)
    assert verdict(ACME, lines) == (1, Break.NOT_AUTHENTICATED)  # whoever has a key is not told that all is well


def test_entries_from_before_and_after_a_rotation_hold_while_the_old_key_is_given() -> None:
    old, new = generate_key(), generate_key()
    before = written(replace(ACME, keyring=Keyring([old])), 3)
    after = written(replace(ACME, keyring=Keyring([new, old])), 3, mac=before[-1].mac, start=4)

    assert verdict(replace(ACME, keyring=Keyring([new, old])), before + after) == (None, None)
    kept = Keyring([new, *Keyring([old]).derive(AUDIT)])
    assert verdict(replace(ACME, keyring=kept), before + after) == (None, None)
    assert verdict(replace(ACME, keyring=Keyring([new])), before + after) == (1, Break.UNKNOWN_KEY)


def test_what_a_web_process_is_given_writes_the_audit_log_and_opens_no_owner_secret() -> None:
    root = Keyring([generate_key()])
    web = Keyring(root.derive(RUNTIME))

    assert web.sign(b"m", "c") == root.sign(b"m", "c")
    assert web.signs
    with pytest.raises(SecretKeyError, match="audit key"):  # rather than an entry that would look forged ever after
        Keyring([key for key in root.derive(RUNTIME) if key.startswith("runtime:")]).sign(b"m", "c")


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
documents = st.dictionaries(st.text(max_size=5), scalars | st.lists(scalars, max_size=3), max_size=4)


@given(documents)
def test_details_are_the_same_after_a_database_has_kept_them(details: dict[str, Any]) -> None:
    once = plain_details(details)

    assert "\x00" not in json.dumps(once, ensure_ascii=False)
    assert plain_details(once) == once == json.loads(json.dumps(once))


# -- in the registry -------------------------------------------------------------------------------------------------------------------


def broken(report: AuditReport) -> list[tuple[UUID | None, int | None, Break | None]]:
    return [(chain.tenant_id, chain.broken_at, chain.why) for chain in report.broken]


def fill(registry: Registry, tenant: Tenant, count: int) -> None:
    for number in range(count):
        with registry.write() as connection:
            audit.record(connection, "test.entry", tenant_id=tenant.id, object=number, details={"n": number, "ratio": 1e16, "small": 1e-7})


def test_entries_of_one_transaction_are_numbered_in_the_order_of_their_making(registry: Registry, acme: Tenant) -> None:
    with acting("ada", "r-1", "10.0.0.9"), registry.write() as connection:
        audit.record(connection, "one", tenant_id=acme.id, reason="because")
        audit.record(connection, "elsewhere")
        audit.record(connection, "two", tenant_id=acme.id)
    two, one, *_ = registry.audit.list(acme)

    assert (one.action, two.action, two.seq) == ("one", "two", (one.seq or 0) + 1)
    assert (one.actor, one.request_id, one.source, one.reason) == ("ada", "r-1", "10.0.0.9", "because")
    assert registry.audit.verify().ok


def test_an_entry_costs_three_statements_however_many_there_are_of_its_chain(
    registry: Registry, registry_engines: tuple[Engine, Engine], acme: Tenant
) -> None:
    sent: list[str] = []
    event.listen(registry_engines[0], "before_cursor_execute", lambda _c, _k, statement, *_: sent.append(statement))
    with registry.write() as connection:
        audit.record(connection, "one", tenant_id=acme.id)
        audit.record(connection, "two", tenant_id=acme.id)

    assert len([statement for statement in sent if "tenantdb_audit" in statement]) == 3


def test_an_entry_outside_a_writing_transaction_of_the_registry_is_refused(registry: Registry) -> None:
    with registry.read() as connection, pytest.raises(RuntimeError, match="writing transaction"):
        audit.record(connection, "x")


def test_what_cannot_be_written_down_does_not_happen(registry: Registry, acme: Tenant) -> None:
    with registry.write() as connection:
        connection.execute(text("CREATE TRIGGER full BEFORE INSERT ON tenantdb_audit BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"))
    with pytest.raises(IntegrityError, match="the disk is full"):
        registry.tenants.transition(acme, TenantState.FAILED, action="tenant.fail")
    assert registry.tenants.get(acme.id).state is TenantState.PROVISIONING

    with registry.write() as connection:  # the twin
        connection.execute(text("DROP TRIGGER full"))
    registry.tenants.transition(acme, TenantState.FAILED, action="tenant.fail")
    assert registry.tenants.get(acme.id).state is TenantState.FAILED


def test_a_hundred_writers_at_once_leave_one_unbroken_chain(registry: Registry, acme: Tenant) -> None:
    barrier = threading.Barrier(10)

    def write(number: int) -> None:
        if number < 10:
            barrier.wait(10)
        with registry.write() as connection:
            audit.record(connection, "crowd", tenant_id=acme.id, object=number)

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(write, range(100)))
    report = registry.audit.verify(acme)

    assert report.ok
    numbers = [entry.seq for entry in registry.audit.list(acme, limit=200)]
    assert sorted(number or 0 for number in numbers) == list(range(1, len(numbers) + 1))
    assert len(registry.audit.search(acme, action="crowd", limit=200)) == 100


TAMPERINGS = {
    "edited": (["UPDATE tenantdb_audit SET actor = 'nobody' WHERE {acme} AND seq = 5"], 5, Break.EDITED),
    "missing": (["DELETE FROM tenantdb_audit WHERE {acme} AND seq = 5"], 5, Break.MISSING),
    "reordered": (
        [
            "UPDATE tenantdb_audit SET seq = -1 WHERE {acme} AND seq = 5",
            "UPDATE tenantdb_audit SET seq = 5 WHERE {acme} AND seq = 7",
            "UPDATE tenantdb_audit SET seq = 7 WHERE {acme} AND seq = -1",
        ],
        5,
        Break.REORDERED,
    ),
    "forged": (
        [
            "INSERT INTO tenantdb_audit (at, actor, tenant_id, action, outcome, details, seq, mac)"
            " SELECT at, actor, tenant_id, 'forged', outcome, details, seq, mac FROM tenantdb_audit WHERE {acme} AND seq = 5"
        ],
        5,
        Break.FORGED,
    ),
    "behind the head": (
        [
            "INSERT INTO tenantdb_audit (at, actor, tenant_id, action, outcome, details, seq, mac)"
            " SELECT at, actor, tenant_id, 'forged', outcome, details, 99, mac FROM tenantdb_audit WHERE {acme} AND seq = 5"
        ],
        12,
        Break.FORGED,
    ),
    "without a number": (
        [
            "INSERT INTO tenantdb_audit (at, actor, tenant_id, action, outcome, details)"
            " SELECT at, actor, tenant_id, 'forged', outcome, details FROM tenantdb_audit WHERE {acme} AND seq = 5"
        ],
        12,
        Break.FORGED,
    ),
    "tail": (["DELETE FROM tenantdb_audit WHERE {acme} AND seq > 8"], 9, Break.MISSING),
    "head": (["UPDATE tenantdb_audit_heads SET mac = x'00' WHERE chain = '{id}'"], 11, Break.HEAD),
    "no macs": (
        ["UPDATE tenantdb_audit SET mac = NULL WHERE {acme}", "UPDATE tenantdb_audit_heads SET mac = NULL"],
        1,
        Break.NOT_AUTHENTICATED,
    ),
}


@pytest.mark.parametrize("case", TAMPERINGS)
def test_whoever_owns_the_tables_is_found_out(case: str, registry: Registry, acme: Tenant) -> None:
    statements, at, why = TAMPERINGS[case]
    fill(registry, acme, 11 - len(registry.audit.list(acme)))
    assert broken(registry.audit.verify()) == []

    with registry.admin_write() as connection:
        for statement in statements:
            connection.execute(text(statement.format(acme=f"tenant_id = '{acme.id.hex}'", id=acme.id.hex)))

    assert broken(registry.audit.verify(acme)) == [(acme.id, at, why)]
    assert (acme.id, at, why) in broken(registry.audit.verify())


@pytest.fixture
def anchored(
    registry: Registry, registry_engines: tuple[Engine, Engine], registry_settings: Settings, tmp_path: Path, acme: Tenant
) -> Registry:
    """The same registry, in a process with an anchor."""
    settings = Settings(url=registry_settings.url, audit_anchor=str(tmp_path / "anchor.jsonl"))
    return Registry(*registry_engines, settings, Keyring([KEY]))


def cut(registry: Registry, tenant: Tenant, behind: int) -> None:
    """Take the end off, and set the head to what is left."""
    mine = _log.c.tenant_id == tenant.id
    with registry.admin_write() as connection:
        connection.execute(delete(_log).where(mine & (_log.c.seq > behind)))
        mac = connection.scalar(select(_log.c.mac).where(mine & (_log.c.seq == behind)))
        connection.execute(update(_heads).where(_heads.c.chain == tenant.id).values(seq=behind, mac=mac))


def test_an_end_that_was_cut_off_with_its_head_is_missed_where_there_is_an_anchor(
    anchored: Registry, registry: Registry, acme: Tenant
) -> None:
    fill(anchored, acme, 2)
    anchored.audit.anchor()
    assert anchored.audit.verify().ok
    cut(anchored, acme, 1)

    assert registry.audit.verify(acme).ok  # the twin: who has no anchor is none the wiser
    assert broken(anchored.audit.verify()) == [(acme.id, 2, Break.ANCHOR)]
    assert anchored.audit.verify(acme).anchors == 1


def test_a_whole_chain_that_is_gone_is_missed_too(anchored: Registry, acme: Tenant) -> None:
    anchored.audit.anchor()
    with anchored.admin_write() as connection:
        connection.execute(delete(_log).where(_log.c.tenant_id == acme.id))
        connection.execute(delete(_heads).where(_heads.c.chain == acme.id))

    assert broken(anchored.audit.verify()) == [(acme.id, 1, Break.ANCHOR)]


def test_an_anchor_is_only_appended_to_and_names_what_has_moved(anchored: Registry, acme: Tenant, tmp_path: Path) -> None:
    path = tmp_path / "anchor.jsonl"
    anchored.audit.anchor()
    first = path.read_text()
    fill(anchored, acme, 1)
    anchored.audit.anchor()
    added = [json.loads(line) for line in path.read_text().removeprefix(first).splitlines()]

    assert path.read_text().startswith(first)
    assert {line["tenant_id"] for line in added} == {None, str(acme.id)}  # the installation's has the entry of the anchor itself
    assert path.stat().st_mode & 0o077 == 0


def test_half_a_line_that_a_crash_left_hides_no_other(tmp_path: Path) -> None:
    path = str(tmp_path / "anchor.jsonl")
    head = AuditHead(log=AuditLog.REGISTRY, tenant_id=uuid4(), seq=3, mac=b"m", at=LATER)
    anchors.append(path, [head])
    with open(path, "a") as file:
        file.write('{"log": "regis')
    anchors.append(path, [replace(head, seq=4)])

    assert [found.seq for found in anchors.read(path)] == [3, 4]


def test_heads_go_to_a_hook_too_and_can_be_given_back(registry: Registry, acme: Tenant) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        registry.audit.anchor()
    kept: list[AuditHead] = []
    registry.audit.on_anchor(kept.extend)
    fill(registry, acme, 2)
    registry.audit.anchor()
    cut(registry, acme, 1)

    assert broken(registry.audit.verify(acme, anchored=kept)) == [(acme.id, 2, Break.ANCHOR)]


# -- retention -------------------------------------------------------------------------------------------------------------------------


def age(registry: Registry, monkeypatch: pytest.MonkeyPatch, tenant: Tenant, count: int) -> None:
    """Entries of seven years ago, written then."""
    then = datetime.now(timezone.utc) - timedelta(days=7 * 366)
    with monkeypatch.context() as clock:
        clock.setattr(tables, "utcnow", lambda: then)
        fill(registry, tenant, count)


@pytest.fixture
def old(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Tenant:
    """A tenant whose first five entries are older than the retention."""
    tenant_id = uuid4()
    tenant = Tenant(id=tenant_id, slug="old", name="Old", state=TenantState.ACTIVE)
    age(registry, monkeypatch, tenant, 5)
    fill(registry, tenant, 3)
    return tenant


def test_what_is_older_than_the_retention_goes_and_the_rest_still_verifies(registry: Registry, old: Tenant) -> None:
    done = registry.audit.retain()

    assert (done.deleted, done.held, done.broken) == (5, (), ())
    entries = registry.audit.search(old.id)
    assert [entry.action for entry in entries] == ["audit.retain", *["test.entry"] * 3]
    assert entries[0].details["deleted"] == 5
    assert registry.audit.verify().ok
    assert registry.audit.retain().deleted == 0
    with registry.admin_write() as connection:  # the twin: the same without the checkpoint
        connection.execute(update(_heads).values(kept_from=None, kept_mac=None, kept_seal=None))
    assert broken(registry.audit.verify(old.id)) == [(old.id, 1, Break.MISSING)]


def test_a_chain_goes_on_where_all_of_it_was_old(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    tenant = Tenant(id=uuid4(), slug="gone", name="Gone", state=TenantState.ACTIVE)
    age(registry, monkeypatch, tenant, 4)
    registry.audit.retain()
    fill(registry, tenant, 2)

    assert [entry.seq for entry in registry.audit.search(tenant.id)] == [7, 6, 5]
    assert registry.audit.verify().ok


def test_a_legal_hold_keeps_what_retention_would_delete(registry: Registry, acme: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    with registry.admin_write() as connection:
        connection.execute(update(tables.tenants).where(tables.tenants.c.id == acme.id).values(legal_hold="case 7"))
        connection.execute(delete(_log).where(_log.c.tenant_id == acme.id))
        connection.execute(delete(_heads).where(_heads.c.chain == acme.id))
    age(registry, monkeypatch, acme, 3)

    assert registry.audit.retain().held == (acme.id,)
    assert len(registry.audit.list(acme)) == 3
    with registry.admin_write() as connection:
        connection.execute(update(tables.tenants).values(legal_hold=None))
    assert registry.audit.retain().deleted == 3


def test_retention_vouches_for_nothing_that_does_not_hold(registry: Registry, old: Tenant) -> None:
    with registry.admin_write() as connection:
        connection.execute(update(_log).where((_log.c.tenant_id == old.id) & (_log.c.seq == 2)).values(actor="nobody"))

    done = registry.audit.retain()

    assert (done.deleted, [(chain.broken_at, chain.why) for chain in done.broken]) == (0, [(2, Break.EDITED)])
    assert len(registry.audit.search(old.id)) == 8


def test_no_less_than_the_setting_is_kept(registry: Registry) -> None:
    with pytest.raises(ConfigError, match="audit_retention=6"):
        registry.audit.retain(5)


# -- searching -------------------------------------------------------------------------------------------------------------------------


def test_entries_are_found_by_what_they_say(registry: Registry, acme: Tenant) -> None:
    fill(registry, acme, 3)
    with acting("eve"), registry.write() as connection:
        audit.record(connection, "test.other", tenant_id=acme.id, object="x", outcome="refused")
    search = registry.audit.search
    now = datetime.now(timezone.utc)

    assert len(search(acme, action="test.")) == 4
    assert [entry.object for entry in search(acme, action="test.entry", limit=2)] == ["2", "1"]
    assert search(action="test") == search(acme, action="te%.") == []
    assert [entry.action for entry in search(actor="eve")] == [entry.action for entry in search(outcome="refused")] == ["test.other"]
    assert [entry.object for entry in search(object="x")] == ["x"]
    assert search(since=now + timedelta(minutes=1)) == search(until=now - timedelta(minutes=1)) == []
    assert search(uuid4()) == []
    with pytest.raises(TenantNotFound):
        search("nobody")


# -- refusals --------------------------------------------------------------------------------------------------------------------------


class Timers:
    """Timers that fire when they are told to."""

    def __init__(self) -> None:
        self.planned: list[Any] = []

    def __call__(self, seconds: float, call: Any) -> Timers:
        self.planned.append(call)
        return self

    daemon = False

    def start(self) -> None: ...

    def cancel(self) -> None:
        self.planned.clear()

    def fire(self) -> None:
        self.planned.pop()()


def test_a_flood_of_refusals_is_one_entry_for_each_kind_tenant_and_actor(registry: Registry, acme: Tenant) -> None:
    timers = Timers()
    refusals = RefusalLog(registry.audit._write_refusals, timer=timers)
    for _ in range(1000):
        refusals.add("invalid-token", None, "anonymous")
        refusals.add("role-required", acme.id, "eve")
    assert registry.audit.search(outcome="refused") == []
    assert len(timers.planned) == 1

    timers.fire()

    found = {entry.action: entry for entry in registry.audit.search(outcome="refused")}
    assert set(found) == {"refused.invalid-token", "refused.role-required"}
    assert found["refused.role-required"].details["count"] == 1000
    assert (found["refused.role-required"].actor, found["refused.role-required"].tenant_id) == ("eve", acme.id)
    assert timers.planned == []


def test_refusals_of_ever_new_actors_are_bounded() -> None:
    got: list[Refusal] = []
    refusals = RefusalLog(got.extend, most=3, timer=Timers())
    for number in range(10):
        refusals.add("not-a-member", uuid4(), f"user-{number}")
    refusals.flush()

    assert [refusal.count for refusal in got] == [1, 1, 1, 7]
    assert (got[-1].actor, got[-1].tenant_id) == (MANY, None)


def test_refusals_that_cannot_be_written_are_kept() -> None:
    got: list[Refusal] = []
    broken = [True]

    def write(refusals: list[Refusal]) -> None:
        if broken:
            raise OSError("the registry is down")
        got.extend(refusals)

    timers = Timers()
    refusals = RefusalLog(write, timer=timers)
    refusals.add("invalid-token", None, "anonymous")
    timers.fire()
    refusals.add("invalid-token", None, "anonymous")
    broken.clear()
    timers.fire()

    assert [refusal.count for refusal in got] == [2]


def test_what_was_counted_is_written_when_the_process_ends(registry: Registry, registry_engines: tuple[Engine, Engine]) -> None:
    registry.audit.refused("invalid-token")
    registry.close()

    assert [entry.action for entry in registry.audit.search(outcome="refused")] == ["refused.invalid-token"]


def test_an_installation_without_keys_counts_and_says_that_it_vouches_for_nothing(
    registry_engines: tuple[Engine, Engine], registry_settings: Settings, cheap_hashing: None
) -> None:
    registry = Registry(*registry_engines, registry_settings, Keyring())
    registry.init()
    registry.sign_up(SignUp(slug="acme"))
    report = registry.audit.verify()

    assert report.ok
    assert report.unauthenticated == report.entries > 0


def test_old_entries_without_a_number_are_left_alone(registry: Registry, acme: Tenant) -> None:
    with registry.admin_write() as connection:
        first = connection.scalar(select(func.min(_log.c.id)))
        connection.execute(
            insert(_log).values(id=(first or 1) - 1, at=LATER, actor="a", tenant_id=acme.id, action="b", outcome="c", details={})
        )

    assert registry.audit.verify().ok
