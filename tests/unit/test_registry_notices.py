"""Notices, looking, and the thread that does both: what is pure of it, with a clock that is moved and an ear that is held."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from uuid import UUID, uuid4

import pytest
from sqlalchemy import event, update

from tenantdb.errors import RegistryUnavailable
from tenantdb.model import MemberRole, Tenant
from tenantdb.registry import Change, Registry, tables, watching
from tenantdb.registry.changes import Changes
from tenantdb.registry.notices import Notice, read
from tenantdb.registry.watching import Watcher
from tests.unit.registry_fixtures import PASSWORD, Clock
from tests.world import eventually

A, B = UUID(int=1), UUID(int=2)


@pytest.mark.parametrize(
    ("payload", "notice"),
    [
        (f"tenant {A} 7 3", Notice("tenant", A, generation=3)),
        (f"membership {A} {B}", Notice("membership", B, A)),
        (f"user {A}", Notice("user", user_id=A)),
        ("domain clinic.example", Notice("domain", domain="clinic.example")),
        ("revocation", Notice("revocation")),
        ("server", Notice("server")),
        ("", None),
        ("tenant", None),
        ("tenant x 7 3", None),
        (f"tenant {A} seven 3", None),
        (f"user {A} {B}", None),
        ("membership", None),
        ("what a later version tells", None),
        ("domain", None),
    ],
)
def test_a_notice_is_read_or_says_nothing(payload: str, notice: Notice | None) -> None:
    assert read(payload) == notice


@contextlib.contextmanager
def counted(registry: Registry) -> Iterator[list[str]]:
    """The statements that are sent meanwhile."""
    sent: list[str] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        sent.append(statement)

    event.listen(registry._transactions.engine, "before_cursor_execute", note)
    yield sent
    event.remove(registry._transactions.engine, "before_cursor_execute", note)


def look(registry: Registry, *, everything: bool = False) -> None:
    registry._watcher._check(everything=everything)


@pytest.mark.parametrize("watched", [True, False])
def test_after_a_warm_up_no_request_asks_the_registry_while_the_process_watches(
    registry: Registry, acme: Tenant, clock: Clock, watched: bool
) -> None:
    user = registry.users.create("ada@clinic.example", PASSWORD)
    registry.memberships.add(user, acme)
    registry.domains.add("acme.example", acme)

    def request() -> None:
        tenant_id = registry.domains.tenant_of("acme.example")
        assert registry.lookup(tenant_id).tenant.slug == registry.lookup("acme").tenant.slug == "acme"
        assert registry.standings.get(user.id, tenant_id).role == "user"
        if registry.revocations.peek("a") is None:
            registry.revocations.load()

    request()
    with counted(registry) as sent:
        for _ in range(10):
            if watched:
                look(registry)
                sent.clear()  # what the thread asks
            clock.now += 2.5
            request()
            assert not sent or not watched
    assert bool(sent) is not watched  # the twin: what expires is asked for


def test_what_is_compared_costs_one_question_for_each_kind_however_much_it_is(registry: Registry, acme: Tenant) -> None:
    users = [registry.users.create(f"user-{number}@clinic.example", PASSWORD) for number in range(5)]
    for user in users:
        registry.standings.get(user.id, acme.id)
        registry.standings.get(user.id, None)
    registry.lookup("acme")
    with counted(registry) as sent:
        look(registry)
        assert len([statement for statement in sent if statement.startswith("SELECT")]) == 3  # tenants; users and memberships
        sent.clear()
        look(registry)
        assert sent == []  # nothing was used since


def test_a_thousand_standings_and_more_are_compared(registry: Registry, acme: Tenant, clock: Clock) -> None:
    user = registry.users.create("ada@clinic.example", PASSWORD)
    tenants = [uuid4() for _ in range(2_100)]
    for tenant in tenants:
        registry.standings.get(user.id, tenant)
    clock.now += 4
    look(registry)
    clock.now += 4
    assert all(registry.standings.peek(user.id, tenant) is not None for tenant in tenants)


def test_a_membership_that_was_ended_and_made_anew_with_another_role_is_another(registry: Registry, acme: Tenant) -> None:
    user = registry.users.create("ada@clinic.example", PASSWORD)
    registry.memberships.add(user, acme, role="owner")
    assert registry.standings.get(user.id, acme.id).role == "owner"
    with registry.write() as connection:  # as another process does; its version begins with 1 again
        connection.execute(tables.memberships.delete())
        registry.memberships.add_in(connection, user.id, acme.id, MemberRole.READONLY)
    told: list[Change] = []
    registry.changes.subscribe(told.append)

    look(registry)

    assert registry.standings.peek(user.id, acme.id) is None
    assert told == [Change(kind="membership", tenant_id=acme.id, user_id=user.id)]


def test_notices_forget_what_they_tell_of_and_nothing_else(registry: Registry, acme: Tenant) -> None:
    user, other = (registry.users.create(f"{name}@clinic.example", PASSWORD) for name in ("ada", "bob"))
    registry.domains.add("acme.example", acme)
    told: list[Change] = []

    def warm() -> None:
        registry.lookup("acme")
        registry.domains.tenant_of("acme.example")
        for each in (user, other):
            registry.standings.get(each.id, acme.id)
            registry.standings.get(each.id, None)
        registry.revocations.load()

    def cold() -> set[str]:
        known = {
            "record": registry.peek("acme"),
            "domain": registry.domains.peek("acme.example"),
            "ada in acme": registry.standings.peek(user.id, acme.id),
            "ada": registry.standings.peek(user.id, None),
            "bob in acme": registry.standings.peek(other.id, acme.id),
            "bob": registry.standings.peek(other.id, None),
        }
        return {name for name, value in known.items() if value is None}

    registry.changes.subscribe(told.append)
    for payload, forgotten, change in (
        (f"tenant {acme.id} 2 1", {"record"}, Change(kind="tenant", tenant_id=acme.id, generation=1)),
        (f"membership {user.id} {acme.id}", {"ada in acme"}, Change(kind="membership", tenant_id=acme.id, user_id=user.id)),
        (f"user {user.id}", {"ada in acme", "ada"}, Change(kind="user", user_id=user.id)),
        ("domain acme.example", {"domain"}, None),
        ("server", {"record"}, Change(kind="everything")),
        ("revocation", set(), Change(kind="revocation")),
        (f"tenant {A} 2 1", set(), Change(kind="tenant", tenant_id=A, generation=1)),
        ("nonsense", set(), None),
    ):
        warm()
        told.clear()
        registry._watcher._heard([payload])
        assert cold() == forgotten, payload
        assert told == ([] if change is None else [change])


def test_many_revocations_that_are_told_at_once_are_read_once(registry: Registry) -> None:
    registry.revocations.load()
    with counted(registry) as sent:
        registry._watcher._heard(["revocation"] * 100)
    assert len([statement for statement in sent if "tenantdb_revocations" in statement]) == 1


def test_a_subscriber_that_fails_keeps_nobody_from_hearing(caplog: pytest.LogCaptureFixture) -> None:
    changes, heard = Changes(), []
    changes.subscribe(lambda change: 1 / 0)
    end = changes.subscribe(heard.append)

    with caplog.at_level(logging.ERROR):
        changes.tell(Change(kind="everything"))
    end()
    end()
    changes.tell(Change(kind="everything"))

    assert heard == [Change(kind="everything")]
    assert "a subscriber to changes failed" in caplog.text


def test_whoever_subscribes_twice_is_told_twice_and_ends_one_at_a_time() -> None:
    changes, heard = Changes(), []
    first, second = changes.subscribe(heard.append), changes.subscribe(heard.append)

    for end, told in ((None, 2), (first, 1), (first, 1), (second, 0)):
        if end is not None:
            end()
        heard.clear()
        changes.tell(Change(kind="everything"))
        assert len(heard) == told


def test_a_subscription_may_end_while_another_begins() -> None:
    changes, heard = Changes(), []
    end = changes.subscribe(heard.append)

    with changes._lock:  # as the garbage collector does, which ends a coroutine wherever a thread happens to be
        end()

    changes.tell(Change(kind="everything"))
    assert heard == []


def test_a_registry_restored_from_a_backup_is_believed(registry: Registry, acme: Tenant) -> None:
    registry.tenants.update(acme, plan="pro")
    assert registry.lookup("acme").tenant.plan == "pro"
    with registry.write() as connection:
        connection.execute(update(tables.tenants).values(version=1, plan=None))
    look(registry)
    assert registry.lookup("acme").tenant.plan is None


# -- the thread ------------------------------------------------------------------------------------------------------------------------


class HeldEar:
    """An ear that hears what it is told."""

    def __init__(self) -> None:
        self._mine, self._theirs = socket.socketpair()
        self._told: list[str] = []
        self.lost = False
        self.closed = False

    def tell(self, payload: str) -> None:
        self._told.append(payload)
        self._theirs.send(b"\0")

    def lose(self) -> None:
        self.lost = True
        self._theirs.send(b"\0")

    def fileno(self) -> int:
        return self._mine.fileno()

    def heard(self) -> Sequence[str]:
        self._mine.recv(4096)
        if self.lost:
            raise RegistryUnavailable("the connection was lost")
        told, self._told = self._told, []
        return told

    def close(self) -> None:
        self.closed = True
        self._mine.close()
        self._theirs.close()


class Room:
    """A watcher and what happens to it."""

    def __init__(self, *, every: float = 3600.0, listens: bool = True) -> None:
        self.ears: list[HeldEar] = []
        self.heard: list[str] = []
        self.looked: list[bool] = []
        self.listens = listens
        self.deny: Exception | None = None
        self.fail: Exception | None = None  # looking
        self.mumble: Exception | None = None  # hearing
        self.watcher = Watcher(self.listen, self.hear, self.look, every=every)

    def listen(self) -> HeldEar | None:
        if self.deny is not None:
            raise self.deny
        if not self.listens:
            return None
        self.ears.append(HeldEar())
        return self.ears[-1]

    def hear(self, payloads: Sequence[str]) -> None:
        if self.mumble is not None:
            raise self.mumble
        self.heard += payloads

    def look(self, *, everything: bool) -> None:
        if self.fail is not None:
            raise self.fail
        self.looked.append(everything)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Room]]:
    monkeypatch.setattr(watching, "_FIRST_DELAY", 0.001)
    monkeypatch.setattr(watching, "_LAST_DELAY", 0.002)
    made: list[Room] = []

    def make(**options: float | bool) -> Room:
        made.append(Room(**options))  # type: ignore[arg-type]
        made[-1].watcher.start()
        return made[-1]

    yield make
    for each in made:
        each.watcher.stop()
        assert all(ear.closed for ear in each.ears)


def test_what_is_told_is_heard_and_what_was_told_before_is_looked_for(room: Callable[..., Room]) -> None:
    here = room()
    eventually(lambda: here.looked == [True])
    here.ears[0].tell("one")
    here.ears[0].tell("two")
    eventually(lambda: here.heard == ["one", "two"])
    assert here.looked == [True]


def test_where_nothing_is_told_it_looks_from_time_to_time(room: Callable[..., Room]) -> None:
    here = room(every=0.001, listens=False)
    eventually(lambda: len(here.looked) > 3)
    assert not any(here.looked)


@pytest.mark.parametrize("outage", [RegistryUnavailable("down"), ValueError("a driver's own")])
def test_a_lost_ear_is_replaced_and_everything_is_looked_at_again_and_that_is_logged_once(
    room: Callable[..., Room], caplog: pytest.LogCaptureFixture, outage: Exception
) -> None:
    here = room()
    eventually(lambda: here.looked == [True])
    with caplog.at_level(logging.INFO, "tenantdb.registry"):
        here.deny = outage
        here.ears[0].lose()
        eventually(lambda: here.ears[0].closed)
        assert not here.watcher.listening
        eventually(lambda: here.watcher._watch is not None and here.watcher._watch._delay == 0.002)  # tried more than once
        here.deny = None
        eventually(lambda: here.looked == [True, True])
    assert here.watcher.listening
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_looking_that_fails_is_logged_once_and_tried_again(room: Callable[..., Room], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tenantdb.registry"):
        here = room(every=0.001, listens=False)
        eventually(lambda: len(here.looked) > 1)
        tried = []
        here.fail = RegistryUnavailable("down")
        here.watcher._watch._check = lambda **kwargs: (tried.append(1), here.look(**kwargs))  # type: ignore[union-attr]
        eventually(lambda: len(tried) > 3)
        here.fail, before = None, len(here.looked)
        eventually(lambda: len(here.looked) > before)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_what_was_told_and_could_not_be_read_is_looked_for(room: Callable[..., Room], caplog: pytest.LogCaptureFixture) -> None:
    here = room()
    eventually(lambda: here.looked == [True])
    with caplog.at_level(logging.WARNING, "tenantdb.registry"):
        here.mumble = RegistryUnavailable("down")
        here.ears[0].tell("one")
        eventually(lambda: "could not be read" in caplog.text)
        here.mumble = None
        here.ears[0].tell("two")
        eventually(lambda: here.heard == ["two"])
    eventually(lambda: len(here.looked) > 1)


def test_it_starts_once_however_many_ask_and_stops_and_starts_again(room: Callable[..., Room]) -> None:
    here = room()
    together = threading.Barrier(8)

    def ask() -> None:
        together.wait(10)
        here.watcher.start()

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    eventually(lambda: here.watcher.listening)
    assert len(here.ears) == 1

    here.watcher.stop()
    here.watcher.stop()
    assert here.ears[0].closed and not here.watcher.listening
    here.watcher.start()
    eventually(lambda: len(here.ears) == 2)


def test_a_subscriber_may_stop_the_thread_that_calls_it(room: Callable[..., Room]) -> None:
    here = room()
    eventually(lambda: here.looked == [True])
    here.watcher._watch._heard = lambda payloads: here.watcher.stop()  # type: ignore[union-attr]
    here.ears[0].tell("close")
    eventually(lambda: here.ears[0].closed)


def test_in_a_forked_child_it_starts_anew_and_keeps_its_parents_ear(room: Callable[..., Room]) -> None:
    here = room()
    eventually(lambda: here.watcher.listening)
    parents = here.watcher._watch
    inherited = here.watcher.start_empty()
    assert not here.watcher.listening and not here.ears[0].closed
    here.watcher.start()
    eventually(lambda: len(here.ears) == 2)
    assert parents is not None
    parents.stop()
    assert inherited
