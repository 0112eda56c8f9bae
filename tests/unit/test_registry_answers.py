"""Standings, domains and revocations: told from memory, asked for once, and never believed for too long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import insert, select

from tenantdb.errors import (
    DomainTaken,
    InvalidDomain,
    InvalidTenantKey,
    InvalidToken,
    RegistryUnavailable,
    TenantNotFound,
    UserNotFound,
)
from tenantdb.model import Facts, Tenant, TenantState, User
from tenantdb.registry import Registry, SignUp, Standing, tables
from tenantdb.registry.answers import MOST_LOOKS, Answers
from tenantdb.registry.revocations import OVERLAP, WHOLE
from tenantdb.resolvers import DomainName, custom_domain, names_of
from tests.unit.registry_fixtures import PASSWORD, Clock
from tests.unit.test_registry_notices import counted


@pytest.fixture
def ada(registry: Registry) -> User:
    return registry.users.create("ada@clinic.example", PASSWORD)


@pytest.fixture
def beta(registry: Registry) -> Tenant:
    return registry.sign_up(SignUp(slug="beta", name="Beta"))[0]


# -- answers ---------------------------------------------------------------------------------------------------------------------------


def answers(clock: Clock, *, size: int = 10) -> Answers[str, int]:
    return Answers(size=size, ttl=5.0, clock=clock, is_absent=lambda value: value < 0, subjects=lambda key: (key, key[0]))


@pytest.mark.parametrize("forget", [lambda known: known.forget("ab"), lambda known: known.forget_where("a", lambda key: key[0] == "a")])
@pytest.mark.parametrize("forgotten", [True, False])
def test_a_late_answer_is_neither_stored_nor_returned(clock: Clock, forget: Callable[[Any], None], forgotten: bool) -> None:
    known = answers(clock)
    read, go, looks = threading.Event(), threading.Event(), []

    def load(key: str) -> int:
        looks.append(key)
        if len(looks) == 1:
            read.set()
            assert go.wait(10)
            return 1
        return 2

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(known.get, "ab", load)
        assert read.wait(10)
        if forgotten:
            forget(known)
        go.set()
        assert asked.result(10) == known.peek("ab") == (2 if forgotten else 1)


def test_what_another_key_is_forgotten_for_costs_no_second_look(clock: Clock) -> None:
    known, looks = answers(clock), []

    def load(key: str) -> int:
        looks.append(key)
        known.forget("zz")
        known.forget_where("y", lambda key: key[0] == "y")
        return 1

    assert known.get("ab", load) == 1
    assert looks == ["ab"]


def test_an_answer_that_changes_without_end_is_returned_and_not_stored(clock: Clock) -> None:
    known, looks = answers(clock), []

    def load(key: str) -> int:
        looks.append(key)
        known.forget(key)
        return len(looks)

    assert known.get("ab", load) == MOST_LOOKS
    assert known.peek("ab") is None


def test_a_flood_of_what_is_not_there_is_bounded_and_pushes_out_nothing(clock: Clock) -> None:
    known = answers(clock, size=10)
    known.get("ab", lambda key: 1)
    for number in range(1_000):
        known.get(f"x{number}", lambda key: -1)
    assert known.peek("ab") == 1
    assert known.peek("x999") == -1 and known.peek("x0") is None
    assert len(known._known) + len(known._absent) <= 11
    assert not known._meanwhile._changed and not known._flights._flights


def test_an_error_is_not_remembered(clock: Clock) -> None:
    known = answers(clock)

    def down(key: str) -> int:
        raise RegistryUnavailable("down")

    with pytest.raises(RegistryUnavailable):
        known.get("ab", down)
    assert known.peek("ab") is None
    assert not known._meanwhile._under_way


# -- standings -------------------------------------------------------------------------------------------------------------------------


def test_a_standing_costs_one_question_and_then_none(registry: Registry, acme: Tenant, ada: User) -> None:
    registry.memberships.add(ada, acme, role="admin")
    with counted(registry) as sent:
        assert registry.standings.peek(ada.id, acme.id) is None
        assert registry.standings.get(ada.id, acme.id) == Standing(True, "admin", None)
        assert registry.standings.get(ada.id, None) == Standing(True, None, None)
        assert registry.standings.get(uuid4(), acme.id) == Standing(False)
        assert len([statement for statement in sent if statement.startswith("SELECT")]) == 3
        sent.clear()
        assert registry.standings.get(ada.id, acme.id) == registry.standings.peek(ada.id, acme.id) == Standing(True, "admin")
        assert sent == []


def test_a_standing_is_believed_for_its_time_and_no_longer(registry: Registry, acme: Tenant, ada: User, clock: Clock) -> None:
    registry.standings.get(ada.id, acme.id)
    clock.now += 4.999
    assert registry.standings.peek(ada.id, acme.id) == Standing(True)
    clock.now += 0.001
    assert registry.standings.peek(ada.id, acme.id) is None


@pytest.mark.parametrize(
    ("write", "standing"),
    [
        (lambda r, user, tenant: r.memberships.add(user, tenant, role="owner"), ("owner", False)),
        (lambda r, user, tenant: r.memberships.remove(user, tenant), (None, False)),
        (lambda r, user, tenant: r.users.delete(user), None),
        (lambda r, user, tenant: r.users.reset_password(r.users.password_reset_token(user.email), "another long password"), ("user", True)),
        (lambda r, user, tenant: r.revocations.revoke_user(user), ("user", True)),
    ],
    ids=["role", "remove", "delete", "reset password", "revoke"],
)
def test_what_this_process_writes_it_sees_at_once(
    registry: Registry, acme: Tenant, ada: User, write: Callable[..., object], standing: tuple[str | None, bool] | None
) -> None:
    registry.memberships.add(ada, acme)
    assert registry.standings.get(ada.id, acme.id) == Standing(True, "user")
    before = time.time()

    write(registry, ada, acme)

    found = registry.standings.get(ada.id, acme.id)
    if standing is None:
        assert found == Standing(False)
        return
    role, revoked = standing
    assert (found.exists, found.role) == (True, role)
    assert found.tokens_valid_from is None if not revoked else before <= (found.tokens_valid_from or 0) <= time.time()


def test_a_flood_of_unknown_users_is_bounded(registry: Registry, ada: User) -> None:
    registry.standings.get(ada.id, None)
    known = registry.standings._answers
    size = known._known._size
    assert size == 10_000
    for number in range(size + 100):
        known.get((number, None), lambda key: Standing(False))
    assert len(known._absent) == size
    assert registry.standings.peek(ada.id, None) == Standing(True)


# -- domains ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "domain", ["clinic.example", "a.b", "xn--bcher-kva.example", "www.a-1.co.uk", "1.example", "1e3.a1", f"{'a' * 63}.b"]
)
def test_a_host_name_is_a_domain_that_a_tenant_may_have_and_a_request_may_name(registry: Registry, acme: Tenant, domain: str) -> None:
    registry.domains.add(domain, acme)

    assert names_of(custom_domain("ours.example"), Facts("https", domain, "/", "GET", {})) == (DomainName(domain),)
    assert registry.domains.tenant_of(domain) == acme.id


NOT_DOMAINS = [
    "",
    "localhost",
    "Clinic.example",
    "clinic.example.",
    ".clinic.example",
    "clinic..example",
    "clinic.example:443",
    "https://clinic.example",
    "clinic.example/path",
    "b\N{LATIN SMALL LETTER U WITH DIAERESIS}cher.example",
    "clinic\N{IDEOGRAPHIC FULL STOP}example",
    "\N{KELVIN SIGN}linic.example",
    "clinic.example\n",
    "clinic.example\0",
    "clinic example.org",
    "clinic_1.example",
    "*.clinic.example",
    "-clinic.example",
    "clinic-.example",
    "127.0.0.1",
    "1.2.3.4.5",
    "127.1",
    "0x7f.1",
    "1.0x7f",
    "127.0.0.0x1",
    "[::1]",
    "::1",
    "user@clinic.example",
    f"{'a' * 64}.example",
    ".".join(["a" * 60] * 5),
]


@pytest.mark.parametrize("domain", NOT_DOMAINS)
def test_what_is_no_host_name_in_its_one_form_is_refused(registry: Registry, acme: Tenant, domain: str) -> None:
    with pytest.raises(InvalidDomain, match="lower-case ASCII"):
        registry.domains.add(domain, acme)
    for look in (registry.domains.peek, registry.domains.tenant_of):
        with counted(registry) as sent, pytest.raises(InvalidTenantKey):
            look(domain)
        assert sent == []


def test_a_domain_leads_to_one_tenant(registry: Registry, acme: Tenant, beta: Tenant) -> None:
    with pytest.raises(TenantNotFound):
        registry.domains.tenant_of("clinic.example")
    with pytest.raises(TenantNotFound):
        registry.domains.peek("clinic.example")  # remembered

    made = registry.domains.add("clinic.example", acme)

    assert registry.domains.peek("clinic.example") is None  # forgotten at once
    assert registry.domains.tenant_of("clinic.example") == registry.domains.peek("clinic.example") == acme.id == made.tenant_id
    assert registry.domains.add("clinic.example", "acme") == made  # may run again
    with pytest.raises(DomainTaken) as taken:
        registry.domains.add("clinic.example", beta)
    assert "acme" not in str(taken.value)
    registry.domains.add("beta.example", beta)
    assert [each.domain for each in registry.domains.list()] == ["beta.example", "clinic.example"]
    assert registry.domains.list("acme") == [made]

    registry.domains.remove("clinic.example")

    with pytest.raises(TenantNotFound):
        registry.domains.tenant_of("clinic.example")
    with pytest.raises(TenantNotFound):
        registry.domains.remove("clinic.example")
    assert registry.domains.add("clinic.example", beta).tenant_id == beta.id
    with pytest.raises(TenantNotFound):
        registry.domains.add("other.example", "nobody")


def test_the_audit_log_tells_of_domains_and_does_not_name_them(registry: Registry, acme: Tenant) -> None:
    registry.domains.add("clinic.example", acme)
    registry.domains.remove("clinic.example")
    removed, added = registry.audit.list(acme, limit=2)
    assert (added.action, removed.action) == ("domain.add", "domain.remove")
    assert added.object == removed.object and str(added.object).startswith("sha256:")


def test_a_purged_tenant_has_no_domain(registry: Registry, acme: Tenant, beta: Tenant) -> None:
    registry.domains.add("clinic.example", acme)
    for state in ("failed", "deleted", "purging"):
        acme = registry.tenants.transition(acme, TenantState(state), action="test")
    with registry.admin_write() as connection:
        registry.tenants.erase(connection, acme, {}, besides=uuid4())
    assert registry.domains.list() == []
    assert registry.domains.add("clinic.example", beta).tenant_id == beta.id


# -- revocations -----------------------------------------------------------------------------------------------------------------------


def claims(jti: str = "one", *, exp: float | None = None) -> dict[str, Any]:
    return {"jti": jti, "exp": int(time.time()) + 600 if exp is None else exp}


def write_row(registry: Registry, jti: str, *, created: timedelta = timedelta(0), expires: timedelta = timedelta(minutes=10)) -> None:
    """As another process does."""
    now = datetime.now(timezone.utc)
    with registry.write() as connection:
        connection.execute(insert(tables.revocations).values(jti=jti, expires_at=now + expires, created_at=now + created))


def test_a_revoked_token_is_known_at_once_and_only_the_list_tells_of_others(registry: Registry, clock: Clock) -> None:
    assert registry.revocations.peek("one") is None
    registry.revocations.revoke_token(claims("one"))
    registry.revocations.revoke_token(claims("one"))
    assert registry.revocations.peek("one") is True
    assert registry.revocations.peek("two") is None
    registry.revocations.load()
    assert registry.revocations.peek("two") is False
    clock.now += 5
    assert registry.revocations.peek("one") is True  # nothing takes it back
    assert registry.revocations.peek("two") is None
    assert [entry.action for entry in registry.audit.list()].count("token.revoke") == 1


@pytest.mark.parametrize("bad", [{}, {"jti": "a"}, {"exp": 1}, {"jti": 1, "exp": 1}, {"jti": "", "exp": 1}, {"jti": "a" * 513, "exp": 1}])
@pytest.mark.parametrize("exp", [None, True, float("inf"), float("nan"), 1e300])
def test_a_token_is_revoked_by_its_id_and_its_end(registry: Registry, bad: dict[str, Any], exp: Any) -> None:
    for each in (bad, {"jti": "a", "exp": exp}):
        with pytest.raises(InvalidToken):
            registry.revocations.revoke_token(each)


def test_of_an_expired_token_nothing_is_kept(registry: Registry) -> None:
    registry.revocations.revoke_token(claims("old", exp=time.time() - 3_600))
    write_row(registry, "gone", expires=timedelta(seconds=-1))
    registry.revocations.revoke_token(claims("new"))
    with registry.read() as connection:
        assert connection.scalars(select(tables.revocations.c.jti)).all() == ["new"]


@pytest.mark.parametrize(("late", "found"), [(OVERLAP / 2, True), (OVERLAP * 2, False)])
def test_the_list_is_read_on_and_finds_what_was_committed_late(registry: Registry, clock: Clock, late: timedelta, found: bool) -> None:
    write_row(registry, "first")
    registry.revocations.load()
    write_row(registry, "late", created=-late)  # its transaction began before the list was read, and ended after
    clock.now += 1
    registry.revocations.load()
    assert registry.revocations.peek("first") is True
    assert registry.revocations.peek("late") is found  # the twin: what is later than anything can be is not found by reading on
    clock.now += WHOLE
    registry.revocations.load()
    assert registry.revocations.peek("late") is True


@pytest.mark.parametrize("landed", [True, False])
def test_a_list_that_lands_while_somebody_looks_is_not_believed_with_what_was_in_the_one_before(
    registry: Registry, clock: Clock, landed: bool
) -> None:
    store = registry.revocations
    store.load()
    clock.now += 5
    write_row(registry, "one")

    def lands() -> float:  # between two steps of whoever looks
        store._clock = clock
        if landed:
            store.load()
        return clock.now

    store._clock = lands
    assert store.peek("one") is None
    assert store.peek("one") is (True if landed else None)


def test_what_has_expired_leaves_memory(registry: Registry) -> None:
    store = registry.revocations
    for number in range(100):
        write_row(registry, f"short {number}", expires=timedelta(minutes=1))
    write_row(registry, "long")
    store.load()
    assert len(store._list[0]) == 101
    later = datetime.now(timezone.utc) + timedelta(minutes=2)
    store._now = lambda: later
    store.load()
    assert set(store._list[0]) == {"long"}


def test_an_outage_makes_the_list_no_younger(registry: Registry, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.revocations.load()

    def down() -> Any:
        raise RegistryUnavailable("down")

    monkeypatch.setattr(registry._transactions, "read", down)
    clock.now += 4
    with pytest.raises(RegistryUnavailable):
        registry.revocations.load()
    assert registry.revocations.peek("a") is False
    clock.now += 1
    assert registry.revocations.peek("a") is None


def test_revoking_a_user_or_a_tenant_ends_refresh_tokens_and_tells_since_when(
    registry: Registry, acme: Tenant, beta: Tenant, ada: User
) -> None:
    for tenant in (acme, beta):
        registry.memberships.add(ada, tenant)
    in_acme, in_beta, nowhere = (registry.refresh_tokens.create(ada, tenant) for tenant in (acme, beta, None))
    version = registry.lookup(acme.id).tenant.version
    before = datetime.now(timezone.utc)

    registry.revocations.revoke_tenant("acme")

    found = registry.lookup(acme.id).tenant
    assert found.version == version + 1
    assert found.tokens_valid_from is not None and before <= found.tokens_valid_from <= datetime.now(timezone.utc)
    assert registry.lookup(beta.id).tenant.tokens_valid_from is None
    with pytest.raises(InvalidToken):
        registry.refresh_tokens.rotate(in_acme)
    in_beta, _ = registry.refresh_tokens.rotate(in_beta)

    registry.revocations.revoke_user(ada.email)

    for token in (in_beta, nowhere):
        with pytest.raises(InvalidToken):
            registry.refresh_tokens.rotate(token)
    assert registry.standings.get(ada.id, beta.id).tokens_valid_from is not None
    actions = [entry.action for entry in registry.audit.list()]
    assert "tenant.revoke_tokens" in actions and "user.revoke_tokens" in actions
    with pytest.raises(UserNotFound):
        registry.revocations.revoke_user("bob@clinic.example")
    with pytest.raises(TenantNotFound):
        registry.revocations.revoke_tenant("nobody")
