"""Every way in which a lease can end, and every moment at which a pool can be taken away: the account stays straight."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from psycopg import sql
from sqlalchemy.exc import OperationalError, SAWarning
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.world import Marker
from tenantdb import Tenant, TenantDB, errors
from tests.chaos.town import HERE, Town, Watch, at_rest, rested, stats_of, whose
from tests.conformance.colours import Face, MakeFace, MakeProcess
from tests.world import eventually

# -- collected -----------------------------------------------------------------------------------------------------------------------


def in_a_cycle(lease: object) -> None:
    """Only the garbage collector finds it."""
    cycle: list[object] = [lease]
    cycle.append(cycle)


@pytest.mark.parametrize("cycle", [False, True], ids=["dropped", "in a cycle"])
@pytest.mark.parametrize("way", ["session", "connection"])
def test_a_lease_that_is_collected_comes_back(process: MakeProcess, tenants: list[Tenant], way: str, cycle: bool) -> None:
    db = process(1, acquire_timeout=5.0)
    for turn in range(5):
        tenant = tenants[turn % 2]
        lease: Any = db.session(tenant) if way == "session" else db.engine(tenant).connect()
        assert lease.scalar(HERE) == tenant.database
        if cycle:
            in_a_cycle(lease)
        del lease
        gc.collect()
        eventually(lambda: at_rest(db))
    with db.session(tenants[3]) as session:
        assert session.scalar(HERE) == tenants[3].database


@pytest.mark.parametrize("cycle", [False, True], ids=["dropped", "in a cycle"])
async def test_a_lease_of_asyncio_that_is_collected_is_closed_and_its_place_is_free(
    async_face: MakeFace, tenants: list[Tenant], town: Town, cycle: bool
) -> None:
    face = async_face(1, acquire_timeout=5.0)
    for turn in range(5):
        session = face.session(tenants[turn % 2])
        assert await session.scalar(HERE) == tenants[turn % 2].database
        with pytest.warns(SAWarning, match="garbage collector"):
            if cycle:
                in_a_cycle(session)
            del session
            gc.collect()
        await rested(face.db)
        assert town.backends() == 0
    assert await whose(face, tenants[3])


def test_what_the_collector_gives_back_in_the_middle_of_anything_blocks_nothing(process: MakeProcess, tenants: list[Tenant]) -> None:
    """The collector may run on the thread that holds the ledger's lock, or the background thread's."""
    db = process(4, acquire_timeout=30.0)
    before = gc.get_threshold()

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for turn in range(40):
            tenant = chance.choice(tenants[:8])
            session = db.session(tenant)
            assert session.scalar(HERE) == tenant.database
            if turn % 3:
                in_a_cycle(session)
            else:
                session.close()

    over = threading.Event()

    def collect() -> None:
        while not over.wait(0.01):  # somebody must, where all who could wait for what is garbage
            gc.collect()

    gc.set_threshold(20, 2, 2)
    collecting = threading.Thread(target=collect)
    collecting.start()
    try:
        with ThreadPoolExecutor(4) as executor:
            list(executor.map(work, range(4), timeout=60))
    finally:
        gc.set_threshold(*before)
        over.set()
        collecting.join()
    gc.collect()
    eventually(lambda: at_rest(db))


def test_a_return_by_the_collector_under_the_background_threads_own_lock_does_not_hang(
    process: MakeProcess, monkeypatch: pytest.MonkeyPatch, tenants: list[Tenant]
) -> None:
    db = process(2)
    lease: Any = db.session(tenants[0])
    lease.scalar(HERE)
    lease.connection().connection._connection_record.unit.expires_at = 0.0  # so that its return closes it, which needs the thread
    in_a_cycle(lease)
    reaper = db._engines._reaper
    reaper.stop()
    pair = socket.socketpair

    def collect() -> Any:
        nonlocal lease
        lease = None
        gc.collect()
        return pair()

    monkeypatch.setattr("socket.socketpair", collect)
    done = threading.Event()
    threading.Thread(target=lambda: (reaper.nudge(), done.set()), daemon=True).start()
    assert done.wait(10)
    eventually(lambda: stats_of(db).held == 0)


# -- detached, invalidated ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["closed", "collected"])
def test_a_detached_connection_counts_until_it_is_closed(process: MakeProcess, tenants: list[Tenant], town: Town, how: str) -> None:
    db = process(1, acquire_timeout=0.2)
    connection: Any = db.engine(tenants[0]).connect()
    assert connection.scalar(HERE) == tenants[0].database
    connection.detach()
    assert stats_of(db).detached == 1
    assert connection.scalar(HERE) == tenants[0].database
    with pytest.raises(errors.BudgetExhausted), db.session(tenants[1]) as session:
        session.scalar(HERE)
    if how == "closed":
        connection.close()
    else:
        connection.commit()
        with pytest.warns(ResourceWarning, match="was deleted while still open"):
            del connection
            gc.collect()
    eventually(lambda: at_rest(db))
    with db.session(tenants[1]) as session:
        assert session.scalar(HERE) == tenants[1].database
    assert town.backends() == 1


async def test_a_detached_connection_of_asyncio_counts_until_it_is_closed(async_face: MakeFace, tenants: list[Tenant]) -> None:
    face = async_face(1, acquire_timeout=0.2)
    async with face.connect(tenants[0]) as connection:
        assert await connection.scalar(HERE) == tenants[0].database
        await connection.run_sync(lambda blocking: blocking.detach())
        assert stats_of(face.db).detached == 1
        with pytest.raises(errors.BudgetExhausted):
            await whose(face, tenants[1])
    await rested(face.db)
    assert await whose(face, tenants[1])


async def test_invalidation_in_a_loop_loses_no_place(make_face: MakeFace, tenants: list[Tenant], town: Town) -> None:
    face = make_face(1, acquire_timeout=5.0)
    with Watch(town) as watch:
        for turn in range(12):
            tenant = tenants[turn % 2]
            async with face.connect(tenant) as connection:
                assert await connection.scalar(HERE) == tenant.database
                await connection.invalidate()
                if turn % 3 == 0:  # the same lease goes on with a new connection
                    await connection.rollback()
                    assert await connection.scalar(HERE) == tenant.database
    assert watch.peak <= 1
    eventually(lambda: at_rest(face.db))


async def test_a_soft_invalidated_connection_is_not_used_again(make_face: MakeFace, tenants: list[Tenant]) -> None:
    face = make_face(2)
    async with face.connect(tenants[0]) as connection:
        await connection.scalar(HERE)
        raw = (connection.sync_connection if face.adb else connection._target).connection
        raw.invalidate(soft=True)
    assert await whose(face, tenants[0])
    assert stats_of(face.db).opens == 2


class Wanted(Exception):
    pass


class Moody:
    """A listener that raises when it is told to."""

    def __init__(self) -> None:
        self.raising = False
        self.raised = 0

    def __call__(self, *_: object) -> None:
        if self.raising:
            self.raised += 1
            raise Wanted

    @contextlib.contextmanager
    def mood(self) -> Iterator[None]:
        self.raising = True
        try:
            with contextlib.suppress(Wanted):
                yield
        finally:
            self.raising = False


@pytest.mark.parametrize("event", ["checkout", "reset", "connect", "close", "checkin"])
def test_a_listener_that_raises_loses_no_place(process: MakeProcess, tenants: list[Tenant], town: Town, event: str) -> None:
    db = process(1, acquire_timeout=5.0)
    listener = Moody()
    db.listen(event, listener)
    with Watch(town) as watch:
        for turn in range(4):
            tenant = tenants[turn % 2]
            with db.session(tenant) as session:
                assert session.scalar(HERE) == tenant.database
            with listener.mood(), db.session(tenants[2 + turn % 2]) as session:
                session.scalar(HERE)
            gc.collect()
            eventually(lambda: at_rest(db))
        with db.session(tenants[5]) as session:
            assert session.scalar(HERE) == tenants[5].database
    assert listener.raised >= 4
    assert watch.peak <= 1
    eventually(lambda: town.backends() == stats_of(db).idle == 1)


@pytest.mark.parametrize("event", ["close", "checkin"])
@pytest.mark.parametrize("way", ["dead", "invalidated", "outdated", "disposed"])
async def test_a_listener_that_raises_while_a_connection_is_closed_leaves_none_open(
    make_face: MakeFace, tenants: list[Tenant], town: Town, way: str, event: str
) -> None:
    face = make_face(1, acquire_timeout=5.0, check_after=0.0)
    listener = Moody()
    face.db.listen(event, listener)
    engine: Any = await face.do.engine(tenants[0])
    pool = (engine.sync_engine if face.adb else engine).pool
    assert await whose(face, tenants[0])
    if way == "dead":
        kill = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = {}"
        town.run(kill, sql.Literal(tenants[0].database))
    elif way == "outdated":
        pool._invalidate_time = time.time()  # as when SQLAlchemy has found another one of the pool dead
    with listener.mood():
        if way == "disposed":
            await engine.dispose() if face.adb else engine.dispose()
        async with face.connect(tenants[0]) as connection:
            await connection.scalar(HERE)
            if way == "invalidated":
                await connection.invalidate()
    gc.collect()
    await rested(face.db)
    assert listener.raised
    eventually(lambda: town.backends() == stats_of(face.db).idle)
    assert await whose(face, tenants[1])
    eventually(lambda: town.backends() == stats_of(face.db).idle == 1)


# -- taken away ------------------------------------------------------------------------------------------------------------------------


async def test_dispose_with_leases_out_leaves_them_alone_and_closes_them_when_they_come_back(
    make_face: MakeFace, tenants: list[Tenant], town: Town
) -> None:
    face = make_face(3)
    held = [face.session(tenants[0]) for _ in range(2)]
    for session in held:
        await session.scalar(HERE)
    assert await whose(face, tenants[0])
    engine = await face.do.engine(tenants[0])
    assert town.backends() == 3
    if face.adb:
        await engine.dispose()
    else:
        engine.dispose()
    eventually(lambda: town.backends() == 2)
    for session in held:
        assert await session.scalar(HERE) == tenants[0].database
        await session.close()
    eventually(lambda: town.backends() == 0)
    assert await whose(face, tenants[0])
    assert stats_of(face.db).idle == 1


Harm = Callable[[TenantDB, Tenant], Any]


def dispose(db: TenantDB, tenant: Tenant) -> None:
    db.engine(tenant).dispose()


def forget(db: TenantDB, tenant: Tenant) -> None:
    db._engines.forget(tenant.id)


@pytest.mark.parametrize("harm", [dispose, forget], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("colour", ["sync", "async"])
async def test_eviction_checkout_return_and_the_end_of_a_pool_may_meet_in_any_order(
    async_face: MakeFace, town: Town, tenants: list[Tenant], harm: Harm, colour: str
) -> None:
    """Three tenants on two connections, so that every other checkout evicts, and pools that come to an end meanwhile."""
    face = async_face(2, acquire_timeout=30.0)
    over = threading.Event()
    retired = served = 0

    def blocking(seed: int) -> None:
        nonlocal retired, served
        chance = random.Random(seed)
        for _ in range(40):
            tenant = chance.choice(tenants[:3])
            try:
                with face.db.session(tenant) as session:
                    assert session.scalar(HERE) == tenant.database
                served += 1
            except errors.EngineRetired:
                retired += 1

    async def loop(seed: int) -> None:
        nonlocal retired, served
        chance = random.Random(seed)
        for _ in range(40):
            tenant = chance.choice(tenants[:3])
            try:
                assert await whose(face, tenant)
                served += 1
            except errors.EngineRetired:
                retired += 1
            if harm is dispose and chance.random() < 0.2:
                await (await face.do.engine(tenant)).dispose()

    def harming() -> None:
        chance = random.Random(7)
        while not over.wait(0.01):
            harm(face.db, chance.choice(tenants[:3]))

    with Watch(town) as watch, ThreadPoolExecutor(9) as executor:
        ending = executor.submit(harming)
        try:
            if colour == "async":
                await asyncio.gather(*(loop(seed) for seed in range(8)))
            else:
                await asyncio.gather(*(asyncio.wrap_future(executor.submit(blocking, seed)) for seed in range(8)))
        finally:
            over.set()
        ending.result(10)
    assert served + retired == 320
    assert served > 50
    assert retired == 0 or harm is forget
    assert watch.peak <= 2
    await rested(face.db)


def test_a_waiter_of_an_engine_that_is_disposed_of_is_served_by_the_next_pool(process: MakeProcess, tenants: list[Tenant]) -> None:
    db = process(1)
    held = db.session(tenants[0])
    held.scalar(HERE)
    with ThreadPoolExecutor(1) as executor:

        def wait() -> object:
            with db.session(tenants[0]) as session:
                return session.scalar(HERE)

        waiting = executor.submit(wait)
        eventually(lambda: stats_of(db).waiting == 1)
        db.engine(tenants[0]).dispose()
        held.close()
        assert waiting.result(10) == tenants[0].database


@pytest.mark.parametrize("moment", ["idle", "leased", "waiting"])
async def test_a_tenant_that_is_suspended_is_refused_with_its_own_error_at_any_moment(
    make_face: MakeFace, town: Town, tenants: list[Tenant], moment: str
) -> None:
    face = make_face(2, per_tenant=1)  # a place for the provisioner, who tells the server
    tenant = tenants[20]
    assert await whose(face, tenant)
    waiting: Any = None
    try:
        if moment == "idle":
            await face.do.suspend(tenant)
        else:
            held = face.session(tenant)
            await held.scalar(HERE)
            if moment == "waiting":
                waiting = asyncio.ensure_future(
                    whose(face, tenant) if face.adb else asyncio.to_thread(asyncio.run, whose(Face(face.db, "sync"), tenant))
                )
                while not stats_of(face.db).waiting:
                    await asyncio.sleep(0.001)
            await face.do.suspend(tenant)
            if waiting is not None:
                with pytest.raises(errors.TenantSuspended):
                    await asyncio.wait_for(waiting, 10)
            with pytest.raises(OperationalError, match="AdminShutdown"):  # the server has ended its session
                await held.scalar(HERE)
            await held.close()
        with pytest.raises(errors.TenantSuspended):
            await whose(face, tenant)
        eventually(lambda: town.backends([tenant]) == 0)
    finally:
        town.db.activate(tenant)
        town.db.close()


def between_look_up_and_checkout(monkeypatch: pytest.MonkeyPatch, db: TenantDB, happen: Callable[[], object], times: int = 1) -> None:
    """Something happens after an engine was looked up and before anybody connects through it."""
    left = times

    def followed(look_up: Callable[..., Any]) -> Callable[..., Any]:
        def engine_of(*args: Any) -> Any:
            nonlocal left
            engine = look_up(*args)
            if left:
                left -= 1
                happen()
            return engine

        return engine_of

    for name in ("engine_of", "loop_engine_of"):
        monkeypatch.setattr(db._engines, name, followed(getattr(db._engines, name)))


async def execute(session: Any) -> object:
    return await session.scalar(HERE)


async def flush(session: Any) -> object:
    session.add(Marker(id=2, name="another")) if isinstance(session, AsyncSession) else await session.add(Marker(id=2, name="another"))
    await session.flush()
    return await session.scalar(HERE)


async def flush_in_a_savepoint(session: Any) -> object:
    await session.begin_nested()
    return await flush(session)


async def bulk(session: Any) -> object:
    rows = [{"id": 2, "name": "another"}]
    if isinstance(session, AsyncSession):
        await session.run_sync(lambda blocking: blocking.bulk_insert_mappings(Marker, rows))
    else:
        await session.bulk_insert_mappings(Marker, rows)
    return await session.scalar(HERE)


FIRST_SQL = [execute, flush, flush_in_a_savepoint, bulk]


@pytest.mark.parametrize("first", FIRST_SQL, ids=lambda first: first.__name__)
async def test_a_session_whose_tenant_changes_before_it_connects_goes_to_the_new_engine(
    make_face: MakeFace, monkeypatch: pytest.MonkeyPatch, tenants: list[Tenant], first: Any
) -> None:
    face = make_face(1)
    between_look_up_and_checkout(monkeypatch, face.db, lambda: face.db._engines.forget(tenants[0].id))
    async with face.session(tenants[0]) as session:
        assert await first(session) == tenants[0].database
    assert stats_of(face.db).opens == 1


async def test_a_session_looks_up_again_once_and_no_more(
    make_face: MakeFace, monkeypatch: pytest.MonkeyPatch, tenants: list[Tenant]
) -> None:
    face = make_face(1)
    between_look_up_and_checkout(monkeypatch, face.db, lambda: face.db._engines.forget(tenants[0].id), times=2)
    async with face.session(tenants[0]) as session:
        with pytest.raises(errors.EngineRetired):
            await session.scalar(HERE)
        assert await session.scalar(HERE) == tenants[0].database


@pytest.mark.parametrize("first", FIRST_SQL, ids=lambda first: first.__name__)
async def test_a_session_whose_tenant_is_suspended_before_it_connects_says_so(
    make_face: MakeFace, monkeypatch: pytest.MonkeyPatch, town: Town, tenants: list[Tenant], first: Any
) -> None:
    face = make_face(1)
    tenant = tenants[21]
    between_look_up_and_checkout(monkeypatch, face.db, lambda: face.db.suspend(tenant))
    try:
        async with face.session(tenant) as session:
            with pytest.raises(errors.TenantSuspended):
                await first(session)
        assert town.backends([tenant]) == 0
    finally:
        town.db.activate(tenant)
        town.db.close()


async def test_a_session_does_not_open_again_what_was_closed_before_it_connected(
    make_face: MakeFace, monkeypatch: pytest.MonkeyPatch, tenants: list[Tenant]
) -> None:
    face = make_face(1)
    between_look_up_and_checkout(monkeypatch, face.db, face.db.close)
    async with face.session(tenants[0]) as session:
        with pytest.raises(errors.EngineRetired):
            await session.scalar(HERE)
    assert stats_of(face.db).opens == 0


async def test_an_engine_that_was_kept_is_of_the_past_all_the_same(make_face: MakeFace, tenants: list[Tenant]) -> None:
    face = make_face(1)
    engine = await face.do.engine(tenants[0])
    face.db._engines.forget(tenants[0].id)
    with pytest.raises(errors.EngineRetired):
        await engine.connect() if face.adb else engine.connect()


def test_a_session_that_waits_in_line_when_its_tenant_changes_is_served_by_the_new_engine(
    process: MakeProcess, tenants: list[Tenant]
) -> None:
    db = process(1)
    held = db.session(tenants[0])
    held.scalar(HERE)

    def wait() -> object:
        with db.session(tenants[0]) as session:
            return session.scalar(HERE)

    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(wait)
        eventually(lambda: stats_of(db).waiting == 1)
        db._engines.forget(tenants[0].id)
        eventually(lambda: stats_of(db).waits == 2)
        held.close()
        assert waiting.result(10) == tenants[0].database


# -- other states of mind ------------------------------------------------------------------------------------------------------------


async def test_a_nested_checkout_ends_at_its_deadline_with_an_error_that_names_the_lease_held(
    make_face: MakeFace, tenants: list[Tenant]
) -> None:
    face = make_face(1, acquire_timeout=0.2)
    async with face.session(tenants[0]) as outer:
        await outer.scalar(HERE)
        with pytest.raises(errors.BudgetExhausted) as caught:
            await whose(face, tenants[1])
        assert caught.value.held == (tenants[0].slug,)
        assert f"already holds a connection of '{tenants[0].slug}'" in str(caught.value)
        assert 0.2 <= caught.value.waited < 5
        with pytest.raises(errors.BudgetExhausted) as again:
            await asyncio.create_task(whose(face, tenants[2])) if face.adb else await in_a_thread(face.db, tenants[2])
        assert again.value.held == ()  # another task or thread holds nothing
    assert await whose(face, tenants[1])


async def in_a_thread(db: TenantDB, tenant: Tenant) -> bool:
    return await asyncio.to_thread(asyncio.run, whose(Face(db, "sync"), tenant))


async def test_two_who_each_hold_what_the_other_wants_both_end_in_time(async_face: MakeFace, tenants: list[Tenant]) -> None:
    face = async_face(2, acquire_timeout=0.5)
    both = asyncio.Event()
    there = 0

    async def one(mine: Tenant, other: Tenant) -> object:
        nonlocal there
        async with face.session(mine) as session:
            await session.scalar(HERE)
            there += 1
            if there == 2:
                both.set()
            await both.wait()
            return await whose(face, other)

    results = await asyncio.gather(one(tenants[0], tenants[1]), one(tenants[1], tenants[0]), return_exceptions=True)
    assert any(isinstance(result, errors.BudgetExhausted) for result in results)
    assert all(result is True or isinstance(result, errors.BudgetExhausted) for result in results)
    assert await whose(face, tenants[2])


def test_a_user_who_is_interrupted_in_the_queue_leaves_it(process: MakeProcess, tenants: list[Tenant]) -> None:
    """Ctrl-C, delivered to the main thread while it waits."""
    db = process(1)
    held = db.session(tenants[0])
    held.scalar(HERE)

    def interrupt() -> None:
        eventually(lambda: stats_of(db).waiting == 1)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            db.engine(tenants[1]).connect()
    finally:
        signal.signal(signal.SIGINT, before)
        thread.join()
    assert stats_of(db).waiting == 0
    held.close()
    with db.session(tenants[1]) as session:
        assert session.scalar(HERE) == tenants[1].database
