"""How often tenants may be signed up: each limit refuses before anything is written, and lets everybody else through."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, event, func, insert, select

from tenantdb.context import Actor, acting
from tenantdb.errors import InvalidUser, RateLimited, TenantExists
from tenantdb.model import NewUser, TenantState
from tenantdb.registry import Keyring, Registry, SignUp, rates, signup, tables
from tenantdb.registry.rates import HOUR, asker, is_limited, network_of, paid_until
from tenantdb.requests import problem_for
from tenantdb.settings import ConnectionURL, Settings
from tests.unit.registry_fixtures import KEY, PASSWORD

NOON = datetime(2030, 1, 1, 12, tzinfo=timezone.utc)
WRITTEN = (tables.users, tables.tenants, tables.memberships, tables.operations)


class Now:
    """The clock of the limits, moved by hand."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        return self.now

    def pass_(self, **time: float) -> None:
        self.now += timedelta(**time)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    clock = Now()
    monkeypatch.setattr(rates, "utcnow", clock)
    return clock


MakeRegistry = Callable[..., Registry]


@pytest.fixture
def limited(registry_engines: tuple[Engine, Engine], registry_url: ConnectionURL, cheap_hashing: None, now: Now) -> Iterator[MakeRegistry]:
    """Makes registries with limits, all on one database."""
    opened: list[Registry] = []

    def make(**limits: int) -> Registry:
        given = {"signups_per_actor": 0, "signups": 0, "unfinished_signups": 0, **limits}
        made = Registry(*registry_engines, Settings(url=registry_url, **given), Keyring([KEY]))
        made.init()
        opened.append(made)
        return made

    yield make
    for made in opened:
        made.close()


@contextmanager
def visitor(source: str | None = "203.0.113.7", actor: str = "anonymous") -> Iterator[None]:
    """A request of somebody, as the adapters tell of it."""
    with acting(actor, "request-1", source):
        yield


def sign_up(registry: Registry, slug: str, **request: Any) -> None:
    registry.sign_up(SignUp(slug=slug, **request))


def counts(registry: Registry, *what: Any) -> list[int]:
    with registry.read() as connection:
        return [connection.scalars(select(func.count()).select_from(table)).one() for table in what or WRITTEN]


# -- what is decided -------------------------------------------------------------------------------------------------------------------


@given(
    most=st.integers(1, 50),
    waits=st.lists(st.floats(0, 5000), min_size=1, max_size=120),
)
def test_whoever_comes_when_he_is_told_to_is_admitted_and_nobody_gets_more_than_his_share(most: int, waits: list[float]) -> None:
    until, now, admitted = NOON - timedelta(days=1), NOON, list[datetime]()
    for wait in waits:
        now += timedelta(seconds=wait)
        verdict = paid_until(until, now, most)
        if isinstance(verdict, int):
            assert 1 <= verdict <= HOUR.total_seconds() / most + 1
            assert not isinstance(paid_until(until, now + timedelta(seconds=verdict), most), int)
        else:
            until = verdict
            admitted.append(now)
    for first in admitted:  # in any stretch of time: those at once, and those that its length pays for
        for last in (moment for moment in admitted if moment >= first):
            between = sum(first <= moment <= last for moment in admitted)
            assert between <= most + (last - first) / (HOUR / most) + 1e-3


@pytest.mark.parametrize(
    ("actor", "limited"),
    [
        (Actor(), False),
        (Actor("cli:ada"), False),
        (Actor("anonymous", None, "203.0.113.7"), True),
        (Actor("anonymous"), True),
        (Actor("5f0f", "request-1", "203.0.113.7"), True),
        (Actor("5f0f", "request-1"), True),
        (Actor("billing-import"), False),
        (Actor("system", None, "203.0.113.7"), True),  # a user of another identity provider may be called anything
        (Actor("cli:eve", "request-1"), True),
    ],
)
def test_requests_are_limited_and_operators_are_not(actor: Actor, limited: bool) -> None:
    assert is_limited(actor) is limited


@pytest.mark.parametrize(
    ("source", "network"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("testclient", "testclient"),
    ],
)
def test_an_address_stands_for_all_that_one_customer_has(source: str, network: str) -> None:
    assert network_of(source) == network


def test_a_user_is_counted_wherever_he_comes_from_and_a_stranger_by_his_address() -> None:
    assert asker(Actor("5f0f", None, "203.0.113.7")) == asker(Actor("5f0f", None, "203.0.113.8"))
    assert asker(Actor("anonymous", None, "203.0.113.7")) != asker(Actor("anonymous", None, "203.0.113.8"))
    assert asker(Actor("source 203.0.113.7")) != asker(Actor("anonymous", None, "203.0.113.7"))
    assert asker(Actor("anonymous")) is None


# -- the three limits ------------------------------------------------------------------------------------------------------------------


def test_one_address_gets_its_number_and_is_told_when_to_come_again(limited: MakeRegistry, now: Now) -> None:
    registry = limited(signups_per_actor=4)
    with visitor():
        for number in range(4):
            sign_up(registry, f"acme-{number}")
        before = counts(registry)
        with pytest.raises(RateLimited) as refused:
            sign_up(registry, "acme-4", owner=NewUser(email="ada@example.org", password=PASSWORD))
        assert counts(registry) == before
        assert refused.value.retry_after == 900
        now.pass_(seconds=899)
        with pytest.raises(RateLimited) as refused:
            sign_up(registry, "acme-4")
        assert refused.value.retry_after == 1
        now.pass_(seconds=1)
        sign_up(registry, "acme-4")
    with visitor("203.0.113.8"):
        sign_up(registry, "beta")


def test_a_refusal_is_a_429_that_says_when(limited: MakeRegistry) -> None:
    registry = limited(signups_per_actor=1)
    with visitor(), pytest.raises(RateLimited) as refused:
        sign_up(registry, "acme")
        sign_up(registry, "beta")
    for error in (refused.value, pickle.loads(pickle.dumps(refused.value))):
        problem = problem_for(error, identity_asked=False)
        assert (problem.status, problem.headers["retry-after"], problem.body["code"]) == (429, "3600", "rate-limited")
        assert "detail" not in problem.body  # what the limits are is nobody's business


def test_strangers_of_one_ipv6_network_are_one_and_users_are_each_their_own(limited: MakeRegistry) -> None:
    registry = limited(signups_per_actor=1)
    with visitor("2001:db8::1"):
        sign_up(registry, "acme")
    with visitor("2001:db8::ffff"), pytest.raises(RateLimited):
        sign_up(registry, "beta")
    for user in ("user-1", "user-2"):
        with visitor("2001:db8::1", actor=user):
            sign_up(registry, f"of-{user}")


def test_all_together_have_a_limit_that_no_single_one_can_use_up_by_knocking(limited: MakeRegistry) -> None:
    registry = limited(signups_per_actor=1, signups=3)
    with visitor():
        sign_up(registry, "acme")
        for _ in range(10):
            with pytest.raises(RateLimited, match="signups_per_actor"):
                sign_up(registry, "beta")
    for number in range(2):
        with visitor(f"203.0.113.{number + 100}"):
            sign_up(registry, f"gamma-{number}")
    with visitor("203.0.113.200"), pytest.raises(RateLimited, match=r"3 an hour by all together \(signups\)"):
        sign_up(registry, "delta")


def test_where_nobody_knows_the_address_only_the_limit_of_all_holds(limited: MakeRegistry) -> None:
    registry = limited(signups_per_actor=1, signups=2)
    with visitor(None):
        sign_up(registry, "acme")
        sign_up(registry, "beta")
        with pytest.raises(RateLimited, match="all together"):
            sign_up(registry, "gamma")


def test_an_attempt_that_fails_counts_and_one_beyond_the_limit_hashes_no_password(
    limited: MakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = limited(signups_per_actor=3)
    sign_up(registry, "taken")
    hashed: list[str] = []
    real = signup.hash_password
    monkeypatch.setattr(signup, "hash_password", lambda password: hashed.append(password) or real(password))
    with visitor():
        for slug, owner, error in (
            ("taken", None, TenantExists),
            ("acme", NewUser(email="ada@example.org", password="short"), InvalidUser),
            ("taken", NewUser(email="ada@example.org", password=PASSWORD), TenantExists),
        ):
            with pytest.raises(error):
                sign_up(registry, slug, owner=owner)
        del hashed[:]
        with pytest.raises(RateLimited):
            sign_up(registry, "acme", owner=NewUser(email="ada@example.org", password=PASSWORD))
    assert hashed == []


def test_a_request_that_is_repeated_is_answered_beyond_the_limit_and_whoever_guesses_at_one_is_counted(limited: MakeRegistry) -> None:
    registry = limited(signups_per_actor=2)
    ada = NewUser(email="ada@example.org", password=PASSWORD)
    with visitor():
        first, _ = registry.sign_up(SignUp(slug="acme", owner=ada, idempotency_key="key-1"))
        with pytest.raises(TenantExists):
            sign_up(registry, "acme", owner=NewUser(email="ada@example.org", password=PASSWORD + "!"), idempotency_key="key-1")
        with pytest.raises(RateLimited):
            sign_up(registry, "acme", owner=NewUser(email="ada@example.org", password=PASSWORD + "?"), idempotency_key="key-1")
        for _ in range(5):
            again, _ = registry.sign_up(SignUp(slug="acme", owner=ada, idempotency_key="key-1"))
            assert again.id == first.id


@pytest.mark.parametrize("state", [TenantState.PROVISIONING, TenantState.FAILED])
def test_nobody_signs_up_while_too_many_are_unfinished(limited: MakeRegistry, state: TenantState) -> None:
    registry = limited(unfinished_signups=2)
    with visitor():
        for slug in ("acme", "beta"):
            sign_up(registry, slug)
        acme = registry.tenants.get("acme")
        if state is TenantState.FAILED:
            registry.tenants.transition(acme, state, action="tenant.fail")
        before = counts(registry)
        with pytest.raises(RateLimited, match=r"2 tenants are not finished yet \(unfinished_signups\)") as refused:
            sign_up(registry, "gamma", owner=NewUser(email="ada@example.org", password=PASSWORD))
        assert (counts(registry), refused.value.retry_after) == (before, 60)
    sign_up(registry, "by-an-operator")
    with visitor():
        for slug in ("acme", "by-an-operator"):
            left = registry.tenants.get(slug)
            failed = (
                left if left.state is TenantState.FAILED else registry.tenants.transition(left, TenantState.FAILED, action="tenant.fail")
            )
            registry.tenants.transition(failed, TenantState.DELETED, action="tenant.delete")
        sign_up(registry, "gamma")


def test_zero_means_no_limit_and_costs_no_question(limited: MakeRegistry, registry_engines: tuple[Engine, Engine]) -> None:
    registry, statements = limited(), list[str]()
    event.listen(registry_engines[0], "before_cursor_execute", lambda *call: statements.append(call[2]))
    with visitor():
        for number in range(30):
            sign_up(registry, f"acme-{number}")
    assert not [statement for statement in statements if "tenantdb_rates" in statement or "count(" in statement]


def test_operators_are_not_limited(limited: MakeRegistry) -> None:
    registry = limited(signups_per_actor=1, signups=1, unfinished_signups=1)
    for actor in ("system", "cli:ada"):
        with acting(actor):
            for number in range(3):
                sign_up(registry, f"{actor.partition(':')[0]}-{number}")
    assert counts(registry, tables.rates) == [0]


def test_who_is_refused_is_in_the_audit_log_once_however_often_he_asks(limited: MakeRegistry) -> None:
    registry = limited(signups_per_actor=1)
    with visitor():
        sign_up(registry, "acme")
        for _ in range(5):
            with pytest.raises(RateLimited):
                sign_up(registry, "beta")
    registry.audit.close()
    (entry,) = [entry for entry in registry.audit.list() if entry.action == "refused.rate-limited"]
    assert (entry.actor, entry.details["count"]) == ("anonymous", 5)


# -- many at once ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [{"signups_per_actor": 5}, {"signups": 5}, {"signups_per_actor": 5, "signups": 5}])
def test_a_crowd_is_admitted_up_to_the_limit_and_not_one_further(limited: MakeRegistry, limits: dict[str, int]) -> None:
    registries = [limited(**limits) for _ in range(2)]  # two processes
    ready = threading.Barrier(12)

    def come(number: int) -> bool:
        ready.wait()
        try:
            with visitor():
                sign_up(registries[number % 2], f"acme-{number}")
        except RateLimited:
            return False
        return True

    with ThreadPoolExecutor(12) as crowd:
        admitted = list(crowd.map(come, range(12)))
    assert sum(admitted) == 5
    assert counts(registries[0], tables.tenants) == [5]


def test_rows_that_say_nothing_any_more_are_cleared_away_a_few_at_a_time(limited: MakeRegistry, now: Now) -> None:
    registry = limited(signups_per_actor=10)
    with registry.write() as connection:
        old = [{"key": f"old-{number}", "until": NOON - timedelta(minutes=number + 1)} for number in range(14)]
        connection.execute(insert(tables.rates), [*old, {"key": "new", "until": NOON + timedelta(minutes=1)}])
    with visitor():
        sign_up(registry, "acme")
        assert counts(registry, tables.rates) == [1 + 1 + 4]
        sign_up(registry, "beta")
        assert counts(registry, tables.rates) == [1 + 1]
    now.pass_(hours=2)
    with visitor("203.0.113.8"):
        sign_up(registry, "gamma")
    assert counts(registry, tables.rates) == [1]


def test_a_key_tells_nobody_who_signed_up_and_is_short_whoever_it_is(limited: MakeRegistry) -> None:
    registry = limited(signups_per_actor=10)
    for actor in ("ada@example.org", "x" * 10_000):
        with visitor(actor=actor):
            sign_up(registry, f"of-{len(actor)}")
    with registry.read() as connection:
        keys = connection.scalars(select(tables.rates.c.key)).all()
    assert [len(key) for key in keys] == [64, 64]
    assert "ada" not in "".join(keys)
