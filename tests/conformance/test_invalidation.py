"""What one process writes, the others follow: by notices, or by looking; and without both they do not, which is each test's twin."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import update

from tenantdb import AsyncTenantDB, Tenant, TenantDB, TenantState, errors
from tenantdb.registry import Change, tables
from tests.conformance import watching
from tests.conformance.colours import MakeProcess
from tests.conformance.conftest import Estate
from tests.conformance.watching import restrict, settled
from tests.world import World, eventually


def ways(estate: Estate) -> tuple[str, ...]:
    return ("looking",) if estate.backend == "sqlite" else ("notices", "looking")


def suspend(estate: Estate, tenant: Tenant) -> None:
    """In the registry alone, as a process without a provisioner does: the server is told nothing."""
    now = estate.db.tenants.get(tenant.id)
    estate.db.tenants.transition(now, TenantState.SUSPENDED, action="tenant.suspend", bump_generation=True)


def state(db: TenantDB, tenant: Tenant) -> str:
    try:
        return str(db.resolve(tenant.id).state)
    except errors.TenantDBError as error:
        return error.code


@pytest.fixture
def watcher(process: MakeProcess) -> Callable[[str], TenantDB]:
    """Makes processes that learn of changes in one way."""

    def make(way: str) -> TenantDB:
        db = process()
        restrict(db, way)
        settled(db, way)
        return db

    return make


# -- two processes ---------------------------------------------------------------------------------------------------------------------


class Other:
    """A process that is really another."""

    def __init__(self, running: subprocess.Popen[str]) -> None:
        self._running = running

    def say(self, word: str) -> str:
        assert self._running.stdin is not None and self._running.stdout is not None
        self._running.stdin.write(f"{word}\n")
        self._running.stdin.flush()
        return self._running.stdout.readline().strip()


@contextmanager
def other_process(estate: Estate, tenant: Tenant, way: str) -> Iterator[Other]:
    order = {"given": estate.world.given(estate.db), "tenant": tenant.slug, "way": way}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-m", watching.__name__]
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdin is not None and running.stderr is not None
    try:
        running.stdin.write(json.dumps(order) + "\n")
        yield Other(running)
        running.stdin.close()
        assert running.wait(30) == 0
        assert running.stderr.read() == ""
    finally:
        running.kill()
        running.wait(30)
        for stream in (running.stdin, running.stdout, running.stderr):
            assert stream is not None
            stream.close()


def test_a_suspension_ends_the_sessions_of_another_process_by_notice_and_by_looking(estate: Estate, fresh: Tenant) -> None:
    for way in ways(estate):
        with other_process(estate, fresh, way) as other:
            assert other.say("held") == other.say("new") == fresh.slug

            suspend(estate, fresh)

            eventually(lambda other=other: other.say("held") == "tenant-suspended")  # type: ignore[misc]
            assert other.say("new") == "tenant-suspended"
        estate.mend(fresh)


def test_without_notices_and_without_looking_another_process_goes_on(estate: Estate, fresh: Tenant, watcher: Any) -> None:
    """The twin: it is what believes for too long that the others must not be."""
    with other_process(estate, fresh, "nothing") as other:
        assert other.say("held") == fresh.slug
        witness = watcher(ways(estate)[0])
        assert state(witness, fresh) == "active"

        suspend(estate, fresh)

        eventually(lambda: state(witness, fresh) == "tenant-suspended")
        assert other.say("held") == other.say("new") == fresh.slug


def test_a_forked_child_watches_by_itself_and_leaves_its_parents_ears_alone(estate: Estate, fresh: Tenant) -> None:
    way = ways(estate)[0]
    with other_process(estate, fresh, way) as other:
        assert other.say("held") == fresh.slug

        assert other.say("fork") == "False True"

        assert other.say("held") == fresh.slug
        suspend(estate, fresh)
        eventually(lambda: other.say("held") == "tenant-suspended")


# -- every kind of change --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Cast:
    """Who takes part. ``here`` writes, ``there`` has cached what was before."""

    here: TenantDB
    there: TenantDB
    tenant: Tenant
    user: Any

    @property
    def standing(self) -> Any:
        return self.there._registry.standings.get(self.user.id, self.tenant.id)


def touch_server(cast: Cast) -> None:
    with cast.here._registry.admin_write() as connection:
        connection.execute(update(tables.servers).values(updated_at=tables.utcnow()))


JTI = "a-token"
CHANGES: dict[str, tuple[Callable[[Cast], object], Callable[[Cast], Any]]] = {
    "plan": (lambda c: c.here.update(c.tenant.id, plan="pro"), lambda c: c.there.resolve(c.tenant.id).plan),
    "revision": (lambda c: c.here.tenants.set_revision(c.tenant, "0000"), lambda c: c.there.resolve(c.tenant.id).revision),
    "server": (touch_server, lambda c: c.there._registry.lookup(c.tenant.id).server_written),
    "role": (lambda c: c.here.memberships.add(c.user, c.tenant.id, role="admin"), lambda c: c.standing.role),
    "no member": (lambda c: c.here.memberships.remove(c.user, c.tenant.id), lambda c: c.standing.role),
    "no user": (lambda c: c.here.users.delete(c.user), lambda c: c.standing.exists),
    "user's tokens": (lambda c: c.here.revocations.revoke_user(c.user), lambda c: c.standing.tokens_valid_from),
    "tenant's tokens": (lambda c: c.here.revocations.revoke_tenant(c.tenant.id), lambda c: c.there.resolve(c.tenant.id).tokens_valid_from),
    "token": (lambda c: c.here.revocations.revoke_token({"jti": JTI, "exp": time.time() + 600}), lambda c: is_revoked(c.there)),
    "domain": (lambda c: c.here.domains.remove(domain_of(c)), lambda c: leads_to(c.there, domain_of(c))),
}


def is_revoked(db: TenantDB) -> bool:
    if (known := db.revocations.peek(JTI)) is None:
        db.revocations.load()
        known = db.revocations.peek(JTI)
    return bool(known)


def domain_of(cast: Cast) -> str:
    return f"{cast.tenant.slug}.example"


def leads_to(db: TenantDB, domain: str) -> str:
    try:
        return str(db.domains.tenant_of(domain))
    except errors.TenantNotFound:
        return "nowhere"


@pytest.fixture(scope="module")
def changed(world: World) -> Estate:
    """An estate for changes that nobody takes back."""
    return Estate(world)


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_reaches_whoever_watches_and_nobody_else(changed: Estate, change: str) -> None:
    make, see = CHANGES[change]
    here, tenant = changed.db, changed.tenant()
    user = here.users.create(f"{uuid.uuid4().hex}@clinic.example", "correct horse battery")
    here.memberships.add(user, tenant, role="user")
    here.domains.add(f"{tenant.slug}.example", tenant)
    casts = {}
    for way in (*ways(changed), "nothing"):
        there = changed.world.twin(here)
        restrict(there, way)
        settled(there, way)
        casts[way] = Cast(here, there, tenant, user)
    before = {way: see(cast) for way, cast in casts.items()}
    assert len({str(seen) for seen in before.values()}) == 1

    make(casts["nothing"])

    for way in ways(changed):
        eventually(lambda way=way: see(casts[way]) != before[way])  # type: ignore[misc]
    assert see(casts["nothing"]) == before["nothing"]
    for cast in casts.values():
        cast.there.close()


def test_whoever_subscribed_is_told_of_another_process_and_of_this_one(estate: Estate, fresh: Tenant, watcher: Any) -> None:
    user = estate.db.users.create(f"{uuid.uuid4().hex}@clinic.example", "correct horse battery")
    for way in ways(estate):
        there = watcher(way)
        heard: set[tuple[str, Any]] = set()

        def use(there: TenantDB = there) -> bool:
            return there.resolve(fresh.id).servable and there._registry.standings.get(user.id, fresh.id).exists

        def hear(change: Change, heard: set[tuple[str, Any]] = heard) -> None:
            heard.add((change.kind, change.user_id or change.tenant_id))

        assert use()
        end = there._registry.changes.subscribe(hear)

        estate.db.update(fresh.id, plan=way)
        estate.db.revocations.revoke_user(user)

        # What nobody uses is not compared, where nothing is told.
        eventually(lambda use=use, heard=heard: use() and ("tenant", fresh.id) in heard)  # type: ignore[misc]
        eventually(lambda use=use, heard=heard: use() and heard & {("user", user.id), ("membership", user.id)} != set())  # type: ignore[misc]
        heard.clear()
        there.update(fresh.id, plan="mine")
        assert ("tenant", fresh.id) in heard
        end()
        heard.clear()
        there.update(fresh.id, plan="again")
        assert not heard


def test_idle_connections_of_an_older_generation_are_closed_in_other_processes(estate: Estate, fresh: Tenant, watcher: Any) -> None:
    for way in ways(estate):
        there = watcher(way)
        with there.session(fresh.id) as session:
            assert watching.marker(session) == fresh.slug
        assert [stats.idle for stats in there.stats()] == [1]

        estate.db.update(fresh.id, plan=way)  # of the same generation: nothing is to be closed
        eventually(lambda there=there, way=way: there.resolve(fresh.id).plan == way)  # type: ignore[misc]
        assert [stats.idle for stats in there.stats()] == [1]

        suspend(estate, fresh)
        eventually(lambda there=there: state(there, fresh) == "tenant-suspended")  # type: ignore[misc]
        eventually(lambda there=there: [stats.held for stats in there.stats()] == [0])  # type: ignore[misc]
        estate.mend(fresh)


def test_a_closed_process_watches_no_more_and_may_begin_again(estate: Estate, fresh: Tenant, watcher: Any) -> None:
    there = watcher(ways(estate)[0])
    thread = there._registry._watcher._watch._thread
    there.watch()
    assert there._registry._watcher._watch._thread is thread

    there.close()
    there.close()

    assert not thread.is_alive() and not there._registry._watcher.listening
    there.watch()
    assert state(there, fresh) == "active"


async def test_the_lifespan_watches_from_beginning_to_end(process: MakeProcess) -> None:
    db = process()
    async with AsyncTenantDB(db).lifespan():
        thread = db._registry._watcher._watch._thread  # type: ignore[union-attr]
        assert thread.is_alive()
    assert not thread.is_alive() and db._registry._watcher._watch is None
