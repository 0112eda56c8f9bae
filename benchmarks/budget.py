"""Three hundred tenants, sixty connections, threads and tasks together: does the limit hold, and what is it worth.

Every side does the same: 64 threads and 500 tasks in one process ask for one tenant after another, in proportions of Zipf's law; each
request opens a session, reads a row by primary key that says whose database this is, and ends without commit. The sides take turns, and
each closes its connections before the next begins. What is open is asked of PostgreSQL, by a process of its own: no side counts itself.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import itertools
import multiprocessing
import random
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any

import psycopg
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from benchmarks.measure import Result
from benchmarks.peers import AsyncSessions, Login, Logins, Sessions
from benchmarks.peers.lru_engines import LRUEngines
from benchmarks.peers.nullpool import ConnectPerRequest
from benchmarks.world import Marker, World, clone_tenants, embedded_world, login_of, provision_with_marker, temporary_files_in_memory
from tenantdb import AsyncTenantDB, Budget, Settings, TenantDB

LIMIT = 60
TENANTS, THREADS, TASKS = 300, 64, 500
THREADS_SHARE = 0.3  # of the requests; when one colour is done, the other still keeps all connections busy
NULLPOOL_PART = 4  # it does a quarter of the work, because it remembers nothing: its pace is the same whatever the length
LRU_SHAPES = ((60, 1), (30, 2), (12, 5))  # engines and the size of each one's pool
_SERVER = {"max_connections": "100", "autovacuum": "off"}
_SAMPLE_SECONDS = 0.004
QUICK_SECONDS, FULL_SECONDS = 80, 900  # on a machine so slow that they pass, there are fewer rounds
_DRAIN_SECONDS = 2.0  # for backends of connections that were closed


def make_db(world: World) -> TenantDB:
    """Sixty for tenants, as every side has; the registry's own come on top, and nothing is kept back for work that is not done here.

    One connection per tenant, as the best of the engine caches: where one process is busy with Python, a second one gains nothing.
    """
    own = Settings.model_fields["registry_pool_size"].default + 1  # one that listens
    return world.open(budget=Budget(connections=LIMIT + own, processes=1, per_tenant=1, background=0, administration=0))


class Ours:
    """A bound tenant and its session, in both colours, on one `TenantDB`."""

    def __init__(self, world: World, slugs: Sequence[str]) -> None:
        self._db = make_db(world)
        self._adb = AsyncTenantDB(self._db)
        for slug in slugs:
            self._db.resolve(slug)  # the peers know where their tenants are, too

    @contextmanager
    def session(self, slug: str) -> Iterator[Session]:
        with self._db.tenant_context(slug), self._db.session() as session:
            yield session

    @asynccontextmanager
    async def async_session(self, slug: str) -> AsyncIterator[AsyncSession]:
        async with self._adb.tenant_context(slug), self._adb.session() as session:
            yield session

    async def close(self) -> None:
        await self._adb.close()


def run(*, quick: bool) -> Result:
    result = Result()
    until = time.monotonic() + (QUICK_SECONDS if quick else FULL_SECONDS)
    with temporary_files_in_memory(), embedded_world(_SERVER, fsync=False) as world:
        logins = _make_tenants(world)
        with _Watcher(world, logins) as watcher:
            bench = _Bench(world, logins, watcher, until=until)
            _mixed(result, bench, rounds=3 if quick else 9, requests=1500 if quick else 6000)
            _async_only(result, bench, rounds=2 if quick else 7, requests=600 if quick else 3000, quick=quick)
    return result


def _mixed(result: Result, bench: _Bench, *, rounds: int, requests: int) -> None:
    """Both colours at once: ours, connect per request, and the engine cache in each shape."""
    null = ConnectPerRequest(bench.logins, limit=LIMIT)
    shapes = {f"{engines}x{size}": LRUEngines(bench.logins, engines=engines, pool_size=size) for engines, size in LRU_SHAPES}
    sides: dict[str, tuple[Callable[[], Sessions], int]] = {
        "nullpool": (lambda: null, requests // NULLPOOL_PART),
        "ours": (bench.ours, requests),
        **{shape: (lambda peer=peer: peer, requests) for shape, peer in shapes.items()},  # type: ignore[misc]
    }
    for name in ("nullpool", *shapes):  # what peers keep for ever, their engine objects, is made before the clock runs
        bench.turn(sides[name][0], requests // NULLPOOL_PART)
    turns = bench.rounds(rounds, {name: lambda side=side: bench.turn(*side) for name, side in sides.items()})  # type: ignore[misc]
    ours = turns["ours"]
    against = {shape: _ratio(ours, turns[shape]) for shape in shapes}
    best = min(against, key=lambda shape: against[shape])
    peak = max(turn.peak for turn in ours)
    result.add("errors", sum(len(turn.errors) for turn in ours), bar="0", note="requests of ours that failed")
    result.add("peak_over_limit", max(0, peak - LIMIT), bar="0", note=f"our backends in tenants' databases, as sampled, beyond {LIMIT}")
    result.add("throughput_vs_nullpool", _ratio(ours, turns["nullpool"]), bar=">= 1.4", note="ours / connect per request, one semaphore")
    result.add("throughput_vs_lru_engines", against[best], bar=">= 1.0", note=f"ours / the best LRU of engines, {best}")
    result.add("opens_per_1000", _opens_per_1000(ours), bar="<= 450", note="new connections of ours, from pg_stat_database")
    result.environment |= {name: _summary(each) for name, each in turns.items()}


def _async_only(result: Result, bench: _Bench, *, rounds: int, requests: int, quick: bool) -> None:
    """Tasks alone, against fastapi-tenancy: behind a semaphore of the application's, and left to itself."""
    if importlib.util.find_spec("fastapi_tenancy") is None:
        result.environment["fastapi_tenancy"] = "not installed: pip install fastapi-tenancy==0.5.0"
        return
    from benchmarks.peers.fastapi_tenancy import FastAPITenancy

    def bounded() -> AsyncSessions:
        return FastAPITenancy(bench.logins, engines=LIMIT, concurrency=LIMIT)

    def alone() -> AsyncSessions:
        return FastAPITenancy(bench.logins, engines=LIMIT, concurrency=None)

    sides: dict[str, Callable[[], AsyncSessions]] = {"fastapi_tenancy": bounded, "async_ours": bench.ours}
    turns = bench.rounds(rounds, {name: lambda make=make: bench.async_turn(make, requests) for name, make in sides.items()})  # type: ignore[misc]
    theirs = turns["fastapi_tenancy"]
    ratio = _ratio(turns["async_ours"], theirs)
    result.add("throughput_vs_fastapi_tenancy", ratio, note=f"tasks alone: ours / its {LIMIT} engines behind a semaphore of {LIMIT}")
    result.add("fastapi_tenancy_peak", max(turn.peak for turn in theirs), note="its backends")
    result.add("fastapi_tenancy_errors", sum(len(turn.errors) for turn in theirs), note="its requests that failed")
    result.environment |= {name: _summary(each) for name, each in turns.items()}
    if quick:  # the rest takes half a minute, in which it mostly waits for its own time-outs
        return
    free = bench.async_turn(alone, requests // NULLPOOL_PART)
    result.add("fastapi_tenancy_alone_peak", free.peak, note="its backends without the semaphore")
    result.add("fastapi_tenancy_alone_errors", len(free.errors), note=f"of {free.requests} requests without the semaphore")
    result.environment["fastapi_tenancy_alone"] = _summary([free])


# -- tenants ---------------------------------------------------------------------------------------------------------------------------


def _make_tenants(world: World) -> Mapping[str, Login]:
    slugs = [f"tenant-{number:03d}" for number in range(1, TENANTS + 1)]
    with world.open() as db:
        model = provision_with_marker(db, "model")
        clone_tenants(world, db, model, slugs)
        return {slug: login_of(db, slug) for slug in slugs}


# -- one side's turn -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """What one side did. ``opens`` are new backends, ``peak`` the most there were at once, ``left`` those that its closing left behind."""

    requests: int
    seconds: float
    cpu: float  # seconds of this process
    opens: int
    peak: int
    samples: int
    left: int
    errors: Sequence[str]
    waits: Sequence[float]  # seconds from wish to row, in order

    @property
    def per_second(self) -> float:
        return self.requests / self.seconds


def _ratio(ours: Sequence[Turn], theirs: Sequence[Turn]) -> float:
    return statistics.median(one.per_second / two.per_second for one, two in zip(ours, theirs, strict=True))


def _opens_per_1000(turns: Sequence[Turn]) -> float:
    return 1000 * sum(turn.opens for turn in turns) / sum(turn.requests for turn in turns)


def _summary(turns: Sequence[Turn]) -> dict[str, object]:
    return {
        "per_second": [round(turn.per_second) for turn in turns],
        "cpu_ms": [round(1000 * turn.cpu / turn.requests, 1) for turn in turns],
        "opens_per_1000": round(_opens_per_1000(turns)),
        "p50_s": round(statistics.median(turn.waits[len(turn.waits) // 2] for turn in turns), 2),
        "p99_s": round(statistics.median(turn.waits[len(turn.waits) * 99 // 100] for turn in turns), 2),
        "peak": max(turn.peak for turn in turns),
        "samples": sum(turn.samples for turn in turns),
        "left": sum(turn.left for turn in turns),
        "errors": sum(len(turn.errors) for turn in turns),
        "first_error": next((error for turn in turns for error in turn.errors), ""),
    }


class _Bench:
    """The load. Every turn of one size has the same requests, drawn once; so many for threads, the rest for tasks."""

    def __init__(self, world: World, logins: Logins, watcher: _Watcher, *, until: float) -> None:
        self.logins = logins
        self._until = until  # on the monotonic clock: after it, no further round begins
        self._world = world
        self._watcher = watcher
        weights = list(itertools.accumulate(1 / rank for rank in range(1, len(logins) + 1)))
        self._wishes = random.Random(60).choices(list(logins), cum_weights=weights, k=100_000)

    def ours(self) -> Ours:
        return Ours(self._world, list(self.logins))

    def rounds(self, rounds: int, sides: Mapping[str, Callable[[], Turn]]) -> dict[str, list[Turn]]:
        """Everybody's turns; who goes first alternates."""
        turns: dict[str, list[Turn]] = {name: [] for name in sides}
        for number in range(rounds):
            if number and time.monotonic() > self._until:
                break
            for name in reversed(list(sides)) if number % 2 else sides:
                turns[name].append(sides[name]())
        return turns

    def turn(self, make: Callable[[], Sessions], requests: int) -> Turn:
        """Threads and tasks."""
        side = make()
        split = round(requests * THREADS_SHARE)
        return self._turn(_Load(side, self._wishes[:split], side, self._wishes[split:requests]))

    def async_turn(self, make: Callable[[], AsyncSessions], requests: int) -> Turn:
        """Tasks alone."""
        return self._turn(_Load(None, (), make(), self._wishes[:requests]))

    def _turn(self, load: _Load) -> Turn:
        opened = self._watcher.opened()
        self._watcher.report()
        cpu = time.process_time()
        seconds = asyncio.run(load.run())
        cpu = time.process_time() - cpu
        peak, samples = self._watcher.report()
        left = self._watcher.end_all()
        if load.wrong:
            raise AssertionError(f"a row of another tenant: {load.wrong[0]}")
        return Turn(load.done, seconds, cpu, self._watcher.opened() - opened, peak, samples, left, load.errors, sorted(load.waits))


class _Load:
    """The workers of one turn: each takes the next wish of its colour until none is left. All that was asked for is waited for, so a side
    cannot win by leaving the unpopular waiting."""

    def __init__(self, threads: Sessions | None, thread_wishes: Sequence[str], tasks: AsyncSessions, task_wishes: Sequence[str]) -> None:
        self._threads, self._tasks = threads, tasks
        self._thread_wishes, self._task_wishes = iter(thread_wishes), iter(task_wishes)  # next() on a list's iterator is atomic
        self.done = len(thread_wishes) + len(task_wishes)
        self.errors: list[str] = []
        self.wrong: list[str] = []
        self.waits: list[float] = []

    async def run(self) -> float:
        """Seconds from the first request to the end of the last."""
        workers = [] if self._threads is None else [threading.Thread(target=self._thread, args=(self._threads,)) for _ in range(THREADS)]
        began = time.perf_counter()
        running = [asyncio.create_task(self._task(self._tasks)) for _ in range(TASKS)]
        for worker in workers:
            worker.start()
        await asyncio.gather(*running)
        for worker in workers:
            await asyncio.to_thread(worker.join)
        took = time.perf_counter() - began
        await self._tasks.close()
        return took

    def _thread(self, side: Sessions) -> None:
        for slug in self._thread_wishes:
            began = time.perf_counter()
            try:
                with side.session(slug) as session:
                    self._check(session.get(Marker, 1), slug)
            except Exception as error:
                self._failed(error)
            self.waits.append(time.perf_counter() - began)

    async def _task(self, side: AsyncSessions) -> None:
        for slug in self._task_wishes:
            began = time.perf_counter()
            try:
                async with side.async_session(slug) as session:
                    self._check(await session.get(Marker, 1), slug)
            except Exception as error:
                self._failed(error)
            self.waits.append(time.perf_counter() - began)

    def _check(self, marker: Marker | None, slug: str) -> None:
        if marker is None or marker.name != slug:
            self.wrong.append(f"{slug} got {None if marker is None else marker.name}")

    def _failed(self, error: Exception) -> None:
        self.errors.append(f"{type(error).__name__}: {str(error).strip()[:200]}")


# -- what PostgreSQL sees --------------------------------------------------------------------------------------------------------------

_COUNT = "SELECT count(*) FROM pg_stat_activity WHERE datid = ANY(%s) AND backend_type = 'client backend'"
_END = "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity WHERE datid = ANY(%s) AND backend_type = 'client backend'"


class _Watcher:
    """Counts backends in tenants' databases, in a process of its own, so that a busy interpreter does not look away at the wrong time."""

    def __init__(self, world: World, logins: Logins) -> None:
        self._url = world.server.url()
        self._connection = psycopg.connect(self._url, autocommit=True)
        names = [login.url.database for login in logins.values()]
        rows = self._connection.execute("SELECT oid::int8 FROM pg_database WHERE datname = ANY(%s)", [names]).fetchall()
        self._databases = [row[0] for row in rows]
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_watch, args=(self._url, self._databases, theirs), daemon=True)

    def __enter__(self) -> _Watcher:
        self._process.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._pipe.send(None)
        self._process.join(5)
        self._connection.close()

    def report(self) -> tuple[int, int]:
        """The highest count since the last call, and how often was counted."""
        self._pipe.send("report")
        peak, samples = self._pipe.recv()
        return int(peak), int(samples)

    def end_all(self) -> int:
        """Wait for backends to end, which also report their sessions to the statistics then; how many had to be ended by force."""
        deadline = time.monotonic() + _DRAIN_SECONDS
        while (left := self._ask(_COUNT, [self._databases])) > 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        if left:
            gc.collect()  # what nobody refers to any more is closed by its finalizer, if by anything
            self._ask(_END, [self._databases])
        return left

    def opened(self) -> int:
        """Sessions that were ever opened in the tenants' databases."""
        return self._ask("SELECT sum(sessions)::int8 FROM pg_stat_database WHERE datid = ANY(%s)", [self._databases])

    def _ask(self, query: Any, parameters: Sequence[object]) -> int:
        row = self._connection.execute(query, parameters).fetchone()
        return 0 if row is None else int(row[0])


def _watch(url: str, databases: list[int], pipe: Pipe) -> None:
    peak = samples = 0
    with psycopg.connect(url, autocommit=True, prepare_threshold=1) as connection:
        while True:
            if pipe.poll(_SAMPLE_SECONDS):
                if pipe.recv() is None:
                    return
                pipe.send((peak, samples))
                peak = samples = 0
            row = connection.execute(_COUNT, [databases]).fetchone()
            peak, samples = max(peak, 0 if row is None else int(row[0])), samples + 1
