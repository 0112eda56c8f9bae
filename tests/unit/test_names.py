"""A flood of unknown names: bounded memory, bounded questions to the registry, and nothing taken from tenants that exist."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, event

from tenantdb.errors import RegistryUnavailable, TenantNotFound
from tenantdb.registry import Keyring, Registry, SignUp
from tenantdb.registry.names import ALLOWANCE, KnownNames
from tenantdb.settings import Settings
from tests.unit.registry_fixtures import KEY, Clock

FLOOD = 10_000
PERIOD = 5.0  # seconds, as cache_ttl


@pytest.fixture
def small(registry: Registry, registry_engines: tuple[Engine, Engine], registry_settings: Settings, clock: Clock) -> Registry:
    """A process with room for 1,000 records in memory."""
    settings = Settings(**{**dict(registry_settings), "cache_size": 1000})
    return Registry(*registry_engines, settings, Keyring([KEY]), clock=clock)


@contextmanager
def statements(engine: Engine) -> Iterator[list[str]]:
    seen: list[str] = []

    def note(*call: object) -> None:
        seen.append(str(call[2]))

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(engine, "before_cursor_execute", note)


def queries(seen: list[str]) -> int:
    return sum("SELECT" in statement for statement in seen)


def flood(registry: Registry, kind: str, number: int = FLOOD) -> None:
    for each in range(number):
        with pytest.raises(TenantNotFound):
            registry.lookup(f"nobody-{each}" if kind == "slug" else uuid4())


@pytest.mark.parametrize("kind", ["slug", "uuid"])
def test_ten_thousand_unknown_names_cost_a_hundred_questions_and_a_list(
    small: Registry, registry_engines: tuple[Engine, Engine], kind: str
) -> None:
    small.ping()
    with statements(registry_engines[0]) as seen:
        flood(small, kind)
    assert queries(seen) == ALLOWANCE + 1
    assert len(small._cache._missing) == ALLOWANCE
    assert len(small._cache._flights._flights) == len(small._cache._records._kept) == 0


def test_without_the_list_each_costs_a_question_and_memory_is_bounded_all_the_same(
    small: Registry, registry_engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KnownNames, "rule_out", lambda self, key: False)
    small.ping()
    with statements(registry_engines[0]) as seen:
        flood(small, "slug", 2000)
    assert queries(seen) == 2000
    assert len(small._cache._missing) == 1000


def test_a_flood_takes_nothing_from_a_tenant_that_is_not_in_memory(small: Registry, registry: Registry) -> None:
    tenants = [registry.sign_up(SignUp(slug=f"t-{number}"))[0] for number in range(20)]
    flood(small, "slug", ALLOWANCE + 1)
    for tenant in tenants:
        assert small.lookup(tenant.slug).tenant.id == small.lookup(tenant.id).tenant.id == tenant.id


def test_the_questions_of_a_flood_are_bounded_in_every_period(
    small: Registry, registry_engines: tuple[Engine, Engine], clock: Clock
) -> None:
    small.ping()
    with statements(registry_engines[0]) as seen:
        for _ in range(4):
            flood(small, "uuid", 500)
            clock.now += PERIOD
    assert queries(seen) == 4 * (ALLOWANCE + 1)


def test_a_few_mistakes_are_looked_up_one_by_one_so_that_a_tenant_made_elsewhere_is_found_at_once(
    small: Registry, registry: Registry
) -> None:
    flood(small, "slug", ALLOWANCE - 1)
    made, _ = registry.sign_up(SignUp(slug="acme"))
    assert small.lookup("acme").tenant.id == made.id


def test_in_a_flood_a_tenant_made_elsewhere_is_found_when_the_period_ends_and_one_made_here_at_once(
    small: Registry, registry: Registry, clock: Clock
) -> None:
    flood(small, "slug", ALLOWANCE + 1)
    elsewhere, _ = registry.sign_up(SignUp(slug="elsewhere"))
    here, _ = small.sign_up(SignUp(slug="here"))
    assert small.lookup("here").tenant.id == here.id
    with pytest.raises(TenantNotFound):
        small.lookup("elsewhere")
    clock.now += PERIOD  # not one period for the list and another for the answer
    assert small.lookup("elsewhere").tenant.id == elsewhere.id


# -- domains ---------------------------------------------------------------------------------------------------------------------------


def flood_of_domains(registry: Registry, number: int = FLOOD) -> None:
    for each in range(number):
        with pytest.raises(TenantNotFound):
            registry.domains.tenant_of(f"nobody-{each}.example")


@pytest.mark.parametrize("ruled_out", [True, False])
def test_ten_thousand_unknown_domains_cost_a_hundred_questions_and_a_list_and_without_the_list_as_many_as_they_are(
    small: Registry, registry_engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch, ruled_out: bool
) -> None:
    if not ruled_out:
        monkeypatch.setattr(KnownNames, "rule_out", lambda self, key: False)
    small.ping()
    number = FLOOD if ruled_out else 2000
    with statements(registry_engines[0]) as seen:
        flood_of_domains(small, number)
    assert queries(seen) == (ALLOWANCE + 1 if ruled_out else number)
    assert len(small.domains._answers._absent) == (ALLOWANCE if ruled_out else 1000)


def test_in_a_flood_domains_lead_where_they_led_and_one_added_here_or_told_of_is_found_at_once(
    small: Registry, registry: Registry, clock: Clock
) -> None:
    tenant, _ = registry.sign_up(SignUp(slug="acme"))
    registry.domains.add("acme.example", tenant)
    flood_of_domains(small, ALLOWANCE + 1)
    assert small.domains.tenant_of("acme.example") == tenant.id

    small.domains.add("here.example", tenant)
    for elsewhere in ("told.example", "elsewhere.example"):
        registry.domains.add(elsewhere, tenant)
    small.domains.forget("told.example")
    for known in ("here.example", "told.example"):
        assert small.domains.tenant_of(known) == tenant.id
    with pytest.raises(TenantNotFound):
        small.domains.tenant_of("elsewhere.example")
    clock.now += PERIOD
    assert small.domains.tenant_of("elsewhere.example") == tenant.id


# -- by itself -------------------------------------------------------------------------------------------------------------------------


class Names:
    """`KnownNames` by itself, over a list that the test holds up."""

    def __init__(self, clock: Clock, **options: int) -> None:
        self.names: set[str | UUID | None] = {"acme"}
        self.reads = 0
        self.hold: threading.Event | None = None
        self.reading = threading.Event()
        self.known = KnownNames(self._read, ttl=PERIOD, clock=clock, **options)

    def _read(self) -> set[str | UUID | None]:
        self.reads += 1
        found = set(self.names)
        self.reading.set()
        if self.hold is not None:
            assert self.hold.wait(30)
        return found


def test_what_is_made_while_the_list_is_read_is_not_ruled_out_by_it(clock: Clock) -> None:
    names = Names(clock, allowance=1)
    names.hold = threading.Event()
    names.known.missed()
    with ThreadPoolExecutor(1) as other:
        verdict = other.submit(names.known.rule_out, "beta")
        assert names.reading.wait(30)
        names.known.add(uuid4(), "beta")  # committed after the list was read, and told before it arrived
        names.hold.set()
        assert verdict.result(30) is False


def test_a_list_that_arrives_after_its_period_rules_nothing_out(clock: Clock) -> None:
    names = Names(clock, allowance=1)
    names.hold = threading.Event()
    names.known.missed()
    with ThreadPoolExecutor(1) as other:
        verdict = other.submit(names.known.rule_out, "beta")
        assert names.reading.wait(30)
        clock.now += PERIOD
        names.known.missed()
        names.hold.set()
        assert verdict.result(30) is False


def test_many_who_ask_wait_for_one_list(clock: Clock) -> None:
    names = Names(clock, allowance=1)
    names.known.missed()
    with ThreadPoolExecutor(8) as crowd:
        verdicts = list(crowd.map(names.known.rule_out, ["acme", *(f"nobody-{number}" for number in range(40))]))
    assert (verdicts, names.reads) == ([False, *[True] * 40], 1)


def test_a_list_that_cannot_be_read_is_an_outage_and_not_an_absence(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(clock, allowance=1)
    names.known.missed()

    def fail() -> set[str | UUID | None]:
        raise RegistryUnavailable("it is away")

    monkeypatch.setattr(names.known, "_read", fail)
    with pytest.raises(RegistryUnavailable):
        names.known.rule_out("beta")
    monkeypatch.undo()
    assert names.known.rule_out("beta") is True


def test_the_list_leaves_memory_when_the_flood_is_over(clock: Clock) -> None:
    names = Names(clock, allowance=1)
    names.known.missed()
    assert names.known.rule_out("beta")
    clock.now += PERIOD
    assert not names.known.rule_out("beta")
    names.known.add("acme")
    assert names.known._names is None
