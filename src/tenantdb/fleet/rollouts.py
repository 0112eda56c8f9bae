"""A rollout while it runs: waves of tenants, each brought to the target by `tenantdb.fleet.upgrade`, written down as it happens.

Whoever runs a rollout holds it by a lease; a process that dies leaves attempts that are marked as running, which the next one takes up.
The truth about a tenant is the version table in its own database, changed in the same transaction as the schema; the registry is told in
batches, a fraction of a second later. So whatever was not told when a process died is found out by looking.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID

from tenantdb.errors import RegistryUnavailable, describe
from tenantdb.fleet.plan import Options, Verdict
from tenantdb.fleet.upgrade import LOCKED, Ended, Upgrader
from tenantdb.migrations.tenants import MIGRATED
from tenantdb.provisioning.lease import LEASE, heartbeat
from tenantdb.registry import Registry
from tenantdb.registry.records import TenantRecord
from tenantdb.registry.rollouts import Attempt, AttemptState, Result, Rollout, RolloutState

logger = logging.getLogger("tenantdb.fleet")

R = TypeVar("R")

_PAGE = 500  # attempts in memory
_FIRST_PAGE = 32  # who is first need not wait until so many have been read
_BATCH = 100  # results written down at once
_FLUSH = 1.0  # seconds until they are written down however few they are
_GLANCE = 0.2  # seconds between looks at whether to stop
_BACKOFF = 0.05  # seconds before a locked tenant is tried again; doubles
_LONGER_BACKOFF = 0.5  # the same for one whose server does not answer
_LONGEST_BACKOFF = 30.0  # seconds
_OUTAGE = 60.0  # seconds for which the registry may be away


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What ``progress`` is called with. ``event``: wave, tenant, retry, halt. ``rate``: tenants per second; ``remaining``: seconds."""

    event: str
    rollout: UUID
    wave: int
    done: int
    failed: int
    total: int
    rate: float
    remaining: float | None
    tenant: str | None = None
    error: str | None = None
    seconds: float | None = None


@dataclass(slots=True)
class _Job:
    attempt: Attempt
    record: TenantRecord
    server: str
    tries: int = 0
    begun: bool = False


@dataclass(slots=True)
class _Page:
    """Some of a wave, in order. ``last``: the position of the last; ``more``: there may be others behind it."""

    last: int
    more: bool
    jobs: list[_Job] = field(default_factory=list)
    skipped: list[Result] = field(default_factory=list)


def _pause_before(tries: int, ended: Ended) -> float:
    first = _BACKOFF if ended.sqlstate in LOCKED else _LONGER_BACKOFF
    return min(first * float(2 ** (tries - 1)), _LONGEST_BACKOFF) * (0.5 + random.random())


def run_loop(work: Coroutine[Any, Any, R]) -> R:
    """``asyncio.run``, also where this thread has a loop that is running, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1, thread_name_prefix="tenantdb-rollout") as thread:
        return thread.submit(contextvars.copy_context().run, asyncio.run, work).result()


class _Queue:
    """Who is next, under the limits of each server and of all together."""

    def __init__(self, options: Options) -> None:
        self._each, self._all = options.concurrency, options.total_concurrency
        self._waiting: dict[str, deque[_Job]] = {}
        self._later: list[tuple[float, int, _Job]] = []
        self._busy: dict[str, int] = {}
        self._count = itertools.count()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values())) + len(self._later)

    def add(self, job: _Job) -> None:
        self._waiting.setdefault(job.server, deque()).append(job)

    def again(self, job: _Job, not_before: float) -> None:
        heapq.heappush(self._later, (not_before, next(self._count), job))

    def due(self) -> float:
        """When the next one may be tried again."""
        return self._later[0][0] if self._later else float("inf")

    def next(self, now: float) -> _Job | None:
        while self._later and self._later[0][0] <= now:
            self.add(heapq.heappop(self._later)[2])
        if self._all is not None and sum(self._busy.values()) >= self._all:
            return None
        for server, jobs in self._waiting.items():
            if jobs and self._busy.get(server, 0) < self._each:
                self._busy[server] = self._busy.get(server, 0) + 1
                job = jobs.popleft()
                job.tries += 1
                return job
        return None

    def release(self, job: _Job) -> None:
        self._busy[job.server] -= 1


@dataclass(slots=True)
class _Ledger:
    """What has not been written down yet."""

    begun: dict[UUID, None] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)


class Execution:
    """One process at one rollout. ``before`` and ``after`` are called around each tenant, in the runner's threads."""

    def __init__(
        self,
        registry: Registry,
        rollout: Rollout,
        options: Options,
        upgrader: Upgrader,
        *,
        stop: threading.Event | None,
        progress: Callable[[Progress], object] | None,
        before: Callable[[TenantRecord], object] | None,
        after: Callable[[TenantRecord, Ended], object] | None,
        forget: Callable[[UUID], object],
    ) -> None:
        self._registry, self._store = registry, registry.rollouts
        self._rollout, self._options, self._upgrader, self._worker = rollout, options, upgrader, rollout.worker or ""
        self._stop, self._progress = stop, progress
        self._before, self._after, self._forget = before, after, forget
        self._lost = threading.Event()  # paused or cancelled by somebody, or taken over
        self._unwritten = _Ledger()
        self._writing: asyncio.Task[None] | None = None
        self._began = time.monotonic()
        self._done = self._failed = self._done_here = 0

    def run(self, waves: Mapping[int, Mapping[AttemptState, int]]) -> tuple[RolloutState | None, str | None]:
        """``waves``: how many of each are where. Returns how it ended, and why it was halted; None where somebody else decides now."""
        self._done = sum(counts.get(AttemptState.DONE, 0) for counts in waves.values())
        self._failed = sum(counts.get(AttemptState.FAILED, 0) for counts in waves.values())
        try:
            with heartbeat(self._renew, f"rollout {self._rollout.id}"):
                return run_loop(self._waves(waves))
        finally:
            self._upgrader.close()

    def _renew(self) -> None:
        if not self._store.renew(self._rollout, self._worker, LEASE):
            self._lost.set()

    @property
    def _stopping(self) -> bool:
        return self._lost.is_set() or (self._stop is not None and self._stop.is_set())

    async def _waves(self, waves: Mapping[int, Mapping[AttemptState, int]]) -> tuple[RolloutState | None, str | None]:
        canaries, first = self._rollout.options["canaries"], True
        for wave, counts in sorted(waves.items()):
            if not counts.get(AttemptState.WAITING, 0):
                continue
            if not first and self._options.pause and not self._stopping:
                await self._sleep(self._options.pause)
            if self._stopping:
                break
            first = False
            self._tell("wave", wave)
            why = await self._wave(wave, Verdict(self._options, canary=wave == 0 and canaries > 0, size=sum(counts.values())))
            if why is not None:
                self._tell("halt", wave, error=why)
                return RolloutState.HALTED, why
        if self._lost.is_set():
            return None, None
        return (RolloutState.PAUSED if self._stopping else RolloutState.DONE), None

    async def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stopping and (left := until - time.monotonic()) > 0:  # noqa: ASYNC110  # told by threads, which set no asyncio event
            await asyncio.sleep(min(left, _GLANCE))

    # -- one wave ----------------------------------------------------------------------------------------------------------------------

    async def _wave(self, wave: int, verdict: Verdict) -> str | None:
        """Returns why to halt, if so. What is under way is always finished."""
        queue = _Queue(self._options)
        running: dict[asyncio.Task[Ended], _Job] = {}
        last, more, why = -1, True, None
        reading: asyncio.Task[_Page] | None = None
        while True:
            if reading is None and more and why is None and not self._stopping and len(queue) < _PAGE // 2:
                reading = asyncio.create_task(self._off(self._page, wave, last))
            if reading is not None and (reading.done() or not queue):
                page, reading = await reading, None
                last, more = page.last, page.more
                self._unwritten.results.extend(page.skipped)
                for each in page.jobs:
                    queue.add(each)
            while why is None and not self._stopping and (job := queue.next(time.monotonic())) is not None:
                if not job.begun:
                    job.begun = True
                    self._unwritten.begun[job.attempt.tenant_id] = None
                running[asyncio.create_task(self._one(job))] = job
            if not running and reading is None and (why is not None or self._stopping or (not queue and not more)):
                break
            for task, job in await self._ended(queue, running):
                queue.release(job)
                ended = task.result()
                if ended.crowded and not self._stopping and why is None:  # the application has the connections now
                    job.tries -= 1
                    queue.again(job, time.monotonic() + _BACKOFF)
                elif ended.again and job.tries <= self._options.retries and not self._stopping and why is None:
                    queue.again(job, time.monotonic() + _pause_before(job.tries, ended))
                    self._tell("retry", wave, job.attempt.slug, ended.error)
                else:
                    why = self._settle(wave, job, ended, verdict) or why
            self._write()
            if not running:
                self._upgrader.rest()
        await self._write_all()
        self._upgrader.rest()
        return why

    def _page(self, wave: int, last: int) -> _Page:
        limit = _FIRST_PAGE if last < 0 else _PAGE
        attempts = self._store.waiting(self._rollout, wave=wave, limit=limit, after=last)
        records = {record.tenant.id: record for record in self._registry.tenants.owners([each.tenant_id for each in attempts])}
        page = _Page(attempts[-1].position if attempts else last, len(attempts) == limit)
        for attempt in attempts:
            record = records.get(attempt.tenant_id)
            if record is None or record.server is None or record.tenant.state not in MIGRATED:
                page.skipped.append(_result(attempt, AttemptState.SKIPPED, error="it is served no more"))
            else:
                page.jobs.append(_Job(attempt, record, record.server.name))
        return page

    async def _one(self, job: _Job) -> Ended:
        if self._before is not None:
            await self._off(self._before, job.record)
        ended = await self._upgrader.one(job.record, job.attempt.from_revision)
        if self._after is not None and not ended.again:
            await self._off(self._after, job.record, ended)
        return ended

    async def _ended(self, queue: _Queue, running: dict[asyncio.Task[Ended], _Job]) -> Sequence[tuple[asyncio.Task[Ended], _Job]]:
        """Those that have ended, after waiting for one, or for somebody's next try."""
        patience = min(_GLANCE, max(0.001, queue.due() - time.monotonic()))
        if not running:
            await asyncio.sleep(patience)
            return ()
        ended, _ = await asyncio.wait(running, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        return [(task, running.pop(task)) for task in ended]

    def _settle(self, wave: int, job: _Job, ended: Ended, verdict: Verdict) -> str | None:
        attempt, failed = job.attempt, ended.error is not None
        state = AttemptState.FAILED if failed else AttemptState.DONE
        self._unwritten.begun.pop(attempt.tenant_id, None)
        self._unwritten.results.append(_result(attempt, state, ended))
        self._failed += failed
        self._done += not failed
        self._done_here += 1
        self._tell("tenant", wave, attempt.slug, ended.error, ended.seconds)
        return verdict.settle(ended.kind if failed else None, passing=ended.again)

    # -- writing down ------------------------------------------------------------------------------------------------------------------

    def _write(self, *, everything: bool = False) -> None:
        """In the background, one after the other: who is migrated next does not wait for it. Raises what the last one raised."""
        if self._writing is not None:
            if not self._writing.done():
                return
            self._writing.result()
            self._writing = None
        held, now = self._unwritten, time.monotonic()
        if not held.begun and not held.results:
            return
        if not everything and len(held.results) < _BATCH and now - held.since < _FLUSH:
            return
        self._unwritten = _Ledger()
        self._writing = asyncio.create_task(self._off(self._write_down, list(held.begun), held.results))

    async def _write_all(self) -> None:
        while self._writing is not None or self._unwritten.begun or self._unwritten.results:
            self._write(everything=True)
            if self._writing is not None:
                await asyncio.wait([self._writing])

    def _write_down(self, begun: Sequence[UUID], results: Sequence[Result]) -> None:
        """A registry that is away for a moment is waited for: nothing is lost, and nothing is done twice. Raises: `RegistryUnavailable`."""
        until, pause = time.monotonic() + _OUTAGE, 0.1
        while True:
            try:
                if begun and not self._store.begin(self._rollout, self._worker, begun):
                    self._lost.set()  # somebody has paused or cancelled it, or taken it over
                if results:
                    self._store.settle(self._rollout, self._worker, results)
                break
            except RegistryUnavailable as error:
                if time.monotonic() > until:
                    raise
                logger.warning("the registry cannot be told how a rollout goes: %s", error.explain())
                time.sleep(pause)
                pause = min(2 * pause, 5.0)
        for result in results:
            self._forget(result.tenant_id)

    async def _off(self, fn: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, fn, *args)

    def _tell(self, event: str, wave: int, tenant: str | None = None, error: str | None = None, seconds: float | None = None) -> None:
        if self._progress is None:
            return
        elapsed = max(time.monotonic() - self._began, 1e-6)
        rate = self._done_here / elapsed
        left = self._rollout.total - self._done - self._failed
        told = Progress(
            event=event,
            rollout=self._rollout.id,
            wave=wave,
            done=self._done,
            failed=self._failed,
            total=self._rollout.total,
            rate=rate,
            remaining=left / rate if rate else None,
            tenant=tenant,
            error=error,
            seconds=seconds,
        )
        try:
            self._progress(told)
        except Exception as problem:
            logger.error("the progress callback of a rollout failed; the rollout goes on. %s", describe(problem))


def _result(attempt: Attempt, state: AttemptState, ended: Ended | None = None, error: str | None = None) -> Result:
    return Result(
        tenant_id=attempt.tenant_id,
        state=state,
        from_revision=attempt.from_revision if ended is None else ended.from_revision,
        to_revision=None if ended is None else ended.to_revision,
        error=error if ended is None else ended.error,
        sqlstate=None if ended is None else ended.sqlstate,
        seconds=None if ended is None else ended.seconds,
        engine=None if ended is None else str(ended.runner),
    )
