"""Backends are killed, the server restarts, the network falls silent or refuses: each costs at most the statements that were under way.

What is idle is found dead and replaced before a statement is sent. What is told is told by typed errors, and in time. A server that is down
costs the tenants of another nothing."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from psycopg import sql
from sqlalchemy.exc import DBAPIError, OperationalError

from tenantdb import Tenant, errors
from tenantdb.backends import postgresql
from tenantdb.backends.postgresql import PostgreSQL, wire
from tenantdb.connections import pools
from tenantdb.connections.sqla import wire_of
from tenantdb.events import ServerDown, ServerUp
from tests.chaos.proxy import Proxy
from tests.chaos.town import Town, budget, budget_on, know, rested, stats_of, whose
from tests.conformance.colours import Face, MakeFace
from tests.world import eventually, pg_world

TYPED = (errors.ServerUnavailable, errors.BudgetExhausted)


@pytest.fixture
def far(town: Town) -> list[Tenant]:
    return town.far


@pytest.fixture
def proxy(town: Town) -> Iterator[Proxy]:
    yield town.proxy
    town.proxy.heal()


def kill(town: Town, tenants: list[Tenant]) -> int:
    """End all sessions in these tenants' databases, and wait until they are gone."""
    return sum(town.world.terminate(tenant) for tenant in tenants)


async def warm(face: Face, tenants: list[Tenant]) -> None:
    for tenant in tenants:
        assert await whose(face, tenant)


class Load:
    """Sessions without end on random tenants, in one colour; ``outcomes`` by the exception's type, or "served"."""

    def __init__(self, face: Face, tenants: list[Tenant], workers: int) -> None:
        self._face, self._tenants, self._workers = face, tenants, workers
        self.outcomes: Counter[Any] = Counter()
        self.slowest = 0.0
        self._over = False

    async def __aenter__(self) -> Load:
        self._executor = ThreadPoolExecutor(self._workers)
        loop = asyncio.get_running_loop()
        if self._face.adb:
            self._running = [asyncio.ensure_future(self._work(seed)) for seed in range(self._workers)]
        else:
            self._running = [
                asyncio.ensure_future(loop.run_in_executor(self._executor, asyncio.run, self._work(seed))) for seed in range(self._workers)
            ]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._over = True
        await asyncio.gather(*self._running)
        self._executor.shutdown()

    async def _work(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self._over:
            tenant, began = chance.choice(self._tenants), time.monotonic()
            try:
                outcome: Any = "served" if await whose(self._face, tenant) else "wrong"
            except (DBAPIError, errors.TenantDBError) as error:
                outcome = type(error)
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.outcomes[outcome] += 1
            if outcome != "served":
                await asyncio.sleep(0.002)

    async def goes_on(self, more: int = 60) -> None:
        """Until so many more are served."""
        target = self.outcomes["served"] + more
        deadline = time.monotonic() + 30
        while self.outcomes["served"] < target:
            assert time.monotonic() < deadline, f"it does not go on: {self.outcomes}, {self._face.db.stats()}"
            await asyncio.sleep(0.002)

    @property
    def failures(self) -> int:
        return sum(self.outcomes.values()) - self.outcomes["served"]

    async def until_failed(self, *kinds: type[Exception]) -> None:
        deadline = time.monotonic() + 30
        while not any(self.outcomes[kind] for kind in kinds):
            assert time.monotonic() < deadline, f"nobody sees {kinds}: {self.outcomes}, {self._face.db.stats()}"
            await asyncio.sleep(0.002)


# -- killed --------------------------------------------------------------------------------------------------------------------------


async def test_idle_connections_that_were_killed_are_replaced_before_a_statement_is_sent(
    make_face: MakeFace, town: Town, tenants: list[Tenant]
) -> None:
    face = make_face(8)
    for _ in range(2):
        await warm(face, tenants[:6])
        assert kill(town, tenants[:6]) == 6
    await warm(face, tenants[:6])
    assert stats_of(face.db).closes["dead"] == 12


async def test_one_that_was_killed_casts_suspicion_on_all_that_are_idle_on_its_server(
    make_face: MakeFace, town: Town, tenants: list[Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    pings = 0
    face = make_face(8)
    kind = wire.AsyncWire if face.adb else wire.Wire
    ping = kind.ping

    def counted(self: Any, timeout: float) -> Any:
        nonlocal pings
        pings += 1
        return ping(self, timeout)

    monkeypatch.setattr(kind, "ping", counted)
    await warm(face, tenants[:6])
    await warm(face, tenants[:6])
    assert pings == 0
    kill(town, tenants[:1])
    await warm(face, tenants[:6])
    assert pings >= 5
    before = pings
    await warm(face, tenants[:6])
    assert pings == before


async def test_random_kills_under_load_cost_one_error_each_at_most(make_face: MakeFace, town: Town, tenants: list[Tenant]) -> None:
    face = make_face(8, acquire_timeout=30.0)
    mine, chance, kills = tenants[:12], random.Random(3), 0
    rounds = 10
    async with Load(face, mine, 12) as load:
        await load.goes_on()
        while kills < rounds:
            row = town.world.superuser.execute(
                "SELECT pid FROM pg_stat_activity WHERE datname = ANY(%s)", [[tenant.database for tenant in mine]]
            ).fetchall()
            if row:
                town.world.superuser.execute("SELECT pg_terminate_backend(%s)", [chance.choice(row)[0]])
                kills += 1
            await load.goes_on(20)
    assert load.outcomes["wrong"] == 0
    assert load.failures <= kills, load.outcomes
    assert set(load.outcomes) <= {"served", OperationalError}
    assert await whose(face, mine[0])


@pytest.mark.long
async def test_forty_random_kills_under_load_cost_one_error_each_at_most(make_face: MakeFace, town: Town, tenants: list[Tenant]) -> None:
    for _ in range(4):
        await test_random_kills_under_load_cost_one_error_each_at_most(make_face, town, tenants)


# -- restarted -----------------------------------------------------------------------------------------------------------------------


async def test_a_network_that_drops_everything_costs_those_who_are_in_use_one_error_each(
    slow_face: MakeFace, proxy: Proxy, far: list[Tenant]
) -> None:
    """To us it is a server that restarts in no time."""
    face = slow_face(6, server="far", acquire_timeout=30.0)
    async with Load(face, far, 8) as load:
        for _ in range(3):
            await load.goes_on()
            proxy.drop()
        await load.goes_on()
    assert load.outcomes["wrong"] == 0
    assert load.outcomes[OperationalError] <= 3 * 6, load.outcomes
    assert set(load.outcomes) <= {"served", OperationalError, errors.ServerUnavailable}  # the latter from those who were connecting


async def test_a_server_that_restarts_under_load_is_found_again(make_face: MakeFace, proxy: Proxy, far: list[Tenant]) -> None:
    """It refuses for as long as it takes until somebody is told so."""
    seen: list[Any] = []
    face = make_face(6, server="far", acquire_timeout=5.0)
    face.db.observe(lambda event: seen.append(event) if isinstance(event, (ServerDown, ServerUp)) else None)
    async with Load(face, far, 8) as load:
        await load.goes_on()
        proxy.refuse()
        await load.until_failed(errors.ServerUnavailable)
        told = load.outcomes[errors.ServerUnavailable]
        while load.outcomes[errors.ServerUnavailable] < told + 50:  # at once, and many
            await asyncio.sleep(0.002)
        assert not stats_of(face.db, "far").available  # not earlier: a connect that was nearly through may close the breaker once more
        proxy.heal()
        await load.goes_on()
    assert set(load.outcomes) <= {"served", OperationalError, errors.ServerUnavailable}
    assert load.outcomes[OperationalError] <= 6
    assert [type(event) for event in seen[:2]] == [ServerDown, ServerUp]
    assert stats_of(face.db, "far").available


async def test_a_real_server_that_restarts_under_load_is_found_again(own_world: Any, request: pytest.FixtureRequest, colour: str) -> None:
    world, db, mine = own_world
    face = Face(db, colour)
    loop = asyncio.get_running_loop()
    async with Load(face, mine, 6) as load:
        await load.goes_on(40)
        await loop.run_in_executor(None, world.server.restart)
        await load.goes_on(40)
    assert set(load.outcomes) <= {"served", OperationalError, errors.ServerUnavailable}
    assert load.outcomes["served"] >= 80
    assert load.outcomes[OperationalError] <= 4
    await rested(db)
    await face.close()


@pytest.fixture(params=["sync", "async"])
def colour(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def own_world() -> Iterator[Any]:
    """A server that may be restarted, with a process on it. The registry's pool has its own way to find a server again."""
    with pg_world() as world:
        maker = world.make_db()
        mine = [maker.provision(f"own-{number}") for number in range(3)]
        maker.close()
        db = world.twin(maker, budget=budget(4, acquire_timeout=20.0))
        know(db, mine)
        yield world, db, mine
        world.superuser.close()


# -- silent --------------------------------------------------------------------------------------------------------------------------


async def test_a_network_that_falls_silent_and_then_drops_costs_those_in_use_one_error_each(
    slow_face: MakeFace, proxy: Proxy, far: list[Tenant]
) -> None:
    face = slow_face(6, server="far", acquire_timeout=2.0, connect_timeout=2.0)
    async with Load(face, far, 8) as load:
        await load.goes_on()
        proxy.stall()
        await load.until_failed(*TYPED)
        proxy.drop()
        proxy.flow()
        await load.goes_on()
    assert set(load.outcomes) <= {"served", OperationalError, *TYPED}
    assert load.outcomes[OperationalError] <= 6
    assert load.slowest < 10


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no such option")
async def test_the_kernel_is_told_to_give_up_a_silent_network(make_face: MakeFace, tenants: list[Tenant]) -> None:
    face = make_face(1)
    asked = ("SO_KEEPALIVE", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
    async with face.connect(tenants[0]) as connection:
        raw = wire_of(connection.sync_connection if face.adb else connection._target)
        with socket.socket(fileno=os.dup(raw.fileno())) as copy:
            given = [copy.getsockopt(socket.SOL_SOCKET if name[0] == "S" else socket.IPPROTO_TCP, getattr(socket, name)) for name in asked]
    assert given == [1, 30, 10, 3, 30_000]


async def test_a_network_that_falls_silent_for_a_while_loses_nothing(slow_face: MakeFace, proxy: Proxy, far: list[Tenant]) -> None:
    face = slow_face(6, server="far", acquire_timeout=20.0)
    async with Load(face, far, 16) as load:
        await load.goes_on()
        proxy.stall()
        while stats_of(face.db, "far").waiting == 0:
            await asyncio.sleep(0.002)
        proxy.flow()
        await load.goes_on()
    assert set(load.outcomes) == {"served"}, [getattr(e, "problem", e) for e in load.errors] if hasattr(load, "errors") else load.outcomes


async def test_an_idle_connection_into_silence_is_given_up_within_the_deadline(
    make_face: MakeFace, proxy: Proxy, far: list[Tenant]
) -> None:
    face = make_face(2, server="far", acquire_timeout=1.0, connect_timeout=2.0, check_after=0.0)
    await warm(face, far[:1])
    proxy.stall()
    began = time.monotonic()
    with pytest.raises(TYPED):
        await whose(face, far[0])
    assert time.monotonic() - began < 6
    proxy.heal()
    eventually_serves = time.monotonic() + 20
    while True:
        try:
            assert await whose(face, far[0])
            break
        except TYPED:
            assert time.monotonic() < eventually_serves
            await asyncio.sleep(0.05)


async def test_a_connect_into_silence_ends_in_time_wherever_it_falls_silent(
    make_face: MakeFace, proxy: Proxy, far: list[Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the log-in, when the database is asked whose it is."""
    face = make_face(2, server="far", acquire_timeout=1.0, connect_timeout=2.0)
    check = postgresql._check_identity

    def silent(*args: Any, **kwargs: Any) -> None:
        proxy.stall()
        check(*args, **kwargs)

    monkeypatch.setattr(postgresql, "_check_identity", silent)
    began = time.monotonic()
    task = asyncio.ensure_future(whose(face, far[0]) if face.adb else asyncio.to_thread(asyncio.run, whose(face, far[0])))
    done, _ = await asyncio.wait([task], timeout=8)
    proxy.drop()
    proxy.heal()
    with pytest.raises(TYPED):
        await asyncio.wait_for(task, 20)
    assert done, "it hung for as long as the network was silent"
    assert time.monotonic() - began < 8


# -- one server down, the other not ----------------------------------------------------------------------------------------------------


async def test_a_server_that_refuses_is_told_of_at_once(make_face: MakeFace, proxy: Proxy, far: list[Tenant]) -> None:
    face = make_face(6, server="far")
    proxy.refuse()
    with pytest.raises(errors.ServerUnavailable):
        await whose(face, far[0])  # three tries, and the breaker is open
    for tenant in far:
        began = time.monotonic()
        with pytest.raises(errors.ServerUnavailable, match="nothing listens there"):
            await whose(face, tenant)
        assert time.monotonic() - began < 0.1


@pytest.mark.parametrize("fault", ["refuse", "stall"])
async def test_while_one_server_is_down_the_tenants_of_another_notice_nothing(
    slow_face: MakeFace, town: Town, proxy: Proxy, tenants: list[Tenant], far: list[Tenant], fault: str
) -> None:
    face = slow_face(6, acquire_timeout=4.0, connect_timeout=2.0)
    know(face.db, far)
    near = tenants[:4]
    await warm(face, near)
    before = stats_of(face.db)
    getattr(proxy, fault)()
    async with Load(face, far, 24) as down:
        await down.until_failed(errors.ServerUnavailable)
        slow: list[float] = []
        for _ in range(20):
            for tenant in near:
                began = time.monotonic()
                assert await whose(face, tenant)
                slow.append(time.monotonic() - began)
        after = stats_of(face.db)
        told = down.outcomes[errors.ServerUnavailable]
        deadline = time.monotonic() + 10
        while down.outcomes[errors.ServerUnavailable] < told + 100:
            assert time.monotonic() < deadline, down.outcomes
            await asyncio.sleep(0.002)
        proxy.heal() if fault == "refuse" else (proxy.drop(), proxy.heal())
    assert (after.opens, after.waits, after.timeouts) == (before.opens, before.waits, before.timeouts)
    assert sorted(slow)[len(slow) // 2] < 0.1
    assert "wrong" not in down.outcomes


async def test_while_a_server_is_silent_only_the_probe_waits_for_it(async_face: MakeFace, proxy: Proxy, far: list[Tenant]) -> None:
    face = async_face(6, server="far", acquire_timeout=20.0, connect_timeout=2.0)
    proxy.stall()
    told = await asyncio.gather(*(whose(face, tenant) for tenant in far[:3]), return_exceptions=True)
    assert all(isinstance(error, errors.ServerUnavailable) for error in told)
    assert not stats_of(face.db, "far").available

    async def one(tenant: Tenant) -> float:
        began = time.monotonic()
        with pytest.raises(errors.ServerUnavailable):
            await whose(face, tenant)
        return time.monotonic() - began

    budget = budget_on(face.db, "far")
    eventually(lambda: budget.clock() > budget.breaker._open_until)
    times = sorted(await asyncio.gather(*(one(tenant) for tenant in far for _ in range(5))))
    assert times[-1] < 10
    assert sum(took > 0.5 for took in times) == 1, times  # of one tenant as well: nobody waits behind the probe


async def test_a_tenants_own_failure_is_remembered_for_that_tenant_only(make_face: MakeFace, town: Town, tenants: list[Tenant]) -> None:
    face = make_face(4)
    broken, well = tenants[22], tenants[23]
    database = sql.Identifier(broken.database or "")
    town.run("ALTER DATABASE {} ALLOW_CONNECTIONS false", database)
    try:
        for _ in range(8):
            with pytest.raises(errors.ServerUnavailable, match="does not accept connections"):
                await whose(face, broken)
        assert await whose(face, well)
        assert stats_of(face.db).available
    finally:
        town.run("ALTER DATABASE {} ALLOW_CONNECTIONS true", database)
    deadline = time.monotonic() + 10
    while True:  # and soon forgotten
        try:
            assert await whose(face, broken)
            break
        except errors.ServerUnavailable:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(("memory", "attempts"), [(3600.0, range(1, 4)), (0.0, range(20, 61))], ids=["remembered", "forgotten"])
async def test_a_password_that_is_wrong_for_good_causes_no_storm_of_logins(
    make_face: MakeFace, town: Town, tenants: list[Tenant], monkeypatch: pytest.MonkeyPatch, memory: float, attempts: range
) -> None:
    """C20; and its twin, which asks the server each time. The server counts."""
    monkeypatch.setattr(pools, "_TENANT_MEMORY", memory)
    face, broken = make_face(4), tenants[24]
    role = sql.Identifier(broken.runtime_role or "")
    password = town.db._registry.runtime_password(town.db.tenants.record(broken.id))

    def refused() -> int:
        failed = f'password authentication failed for user "{broken.runtime_role}"'
        return town.world.server.log.read_text(errors="replace").count(failed)

    before = refused()
    town.run("ALTER ROLE {} PASSWORD 'another'", role)
    try:
        for _ in range(20):
            with pytest.raises(errors.ServerUnavailable, match="wrong password"):
                await whose(face, broken)
    finally:
        town.run("ALTER ROLE {} PASSWORD {}", role, sql.Literal(password))
    assert refused() - before in attempts
    assert await whose(face, tenants[23])


async def test_a_server_that_comes_back_is_not_stormed(make_face: MakeFace, far: list[Tenant], monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant opens one connection at a time: a crowd behind it is served by the one that comes back first."""
    face = make_face(20, server="far", acquire_timeout=30.0)
    opening, most = Counter[str](), Counter[str]()
    really = PostgreSQL.open

    def counted(self: Any, dialect: Any, location: Any, *args: Any, **kwargs: Any) -> Any:
        slug = location.tenant.slug
        opening[slug] += 1
        most[slug] = max(most[slug], opening[slug])
        try:
            return really(self, dialect, location, *args, **kwargs)
        finally:
            opening[slug] -= 1

    monkeypatch.setattr(PostgreSQL, "open", counted)
    async with Load(face, far[:4], 60) as load:
        await load.goes_on(200)
    assert set(load.outcomes) == {"served"}, [getattr(e, "problem", e) for e in load.errors] if hasattr(load, "errors") else load.outcomes
    assert dict(most) == {tenant.slug: 1 for tenant in far[:4]}
