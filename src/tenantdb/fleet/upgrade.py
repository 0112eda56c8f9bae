"""One tenant brought to the target: the three runners behind one call, and what an error means for that tenant."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr

from tenantdb.backends import ConnectFailed, FailureClass, backend
from tenantdb.connections.engines import Engines
from tenantdb.connections.ledger import Work
from tenantdb.errors import BudgetExhausted, TenantDBError, describe
from tenantdb.fleet.plan import Options, Runner, Way
from tenantdb.migrations.child import Errand, end_with_parent, upgrade
from tenantdb.migrations.guard import BUSY, WRONG_IDENTITY, WRONG_REVISION
from tenantdb.migrations.local import LocalScripts
from tenantdb.migrations.sqlplan import SQLPlan, script
from tenantdb.migrations.tenants import found_revision
from tenantdb.model import DatabaseRole, Server
from tenantdb.registry import Registry
from tenantdb.registry.records import TenantRecord
from tenantdb.settings import SQLITE, Settings

LOCKED = frozenset({"55P03", "40P01", "40001", BUSY})
_AWAY = frozenset({"53300", "57P01", "57P02", "57P03"})
_USES = 16  # tenants that one place in the budget serves before others get their turn


@dataclass(frozen=True, slots=True)
class Ended:
    """What came of one try. ``error`` is safe to store; ``kind`` groups failures: an SQLSTATE or the name of an error. ``again``: what was
    the matter may pass; ``crowded``: there was no connection to try with."""

    from_revision: str | None
    to_revision: str | None
    seconds: float
    runner: Runner
    error: str | None = None
    sqlstate: str | None = None
    kind: str | None = None
    again: bool = False
    crowded: bool = False


class Upgrader:
    """Runs in one event loop; everything that blocks runs in its threads or child processes."""

    def __init__(
        self,
        registry: Registry,
        engines: Engines,
        settings: Settings,
        local: LocalScripts,
        options: Options,
        target: str | None,
        ways: Mapping[str | None, Way],
    ) -> None:
        self._registry, self._engines, self._settings = registry, engines, settings
        self._local, self._options, self._target, self._ways = local, options, target, ways
        self._threads = ThreadPoolExecutor(_threads(options), thread_name_prefix="tenantdb-rollout")
        self._places: dict[Server, _Places] = {}
        self._children: ProcessPoolExecutor | None = None

    async def one(self, record: TenantRecord, from_revision: str | None) -> Ended:
        """Bring a tenant to the target. An error is in what is returned; only what ends the whole rollout is raised."""
        began = time.monotonic()
        way = self._ways.get(from_revision)
        runner = Runner.PYTHON if way is None else way.runner
        try:
            before, after = await self._run(way, record)
        except Exception as error:
            return _ended(error, from_revision, runner, time.monotonic() - began)
        return Ended(before, after, time.monotonic() - began, runner)

    async def _run(self, way: Way | None, record: TenantRecord) -> tuple[str | None, str | None]:
        if way is None or way.runner is Runner.PYTHON:
            return await self._by_python(record)
        if way.sql is not None:
            try:
                await self._send(record, way.sql)
            except Exception as error:
                if _sqlstate(error) != WRONG_REVISION:
                    raise
                # A runner that died after the commit, or somebody's hand: the database knows better than the registry.
                return await self._by_python(record)
            return way.from_revision, self._target
        return await self._in_child(record, way.down)

    async def _send(self, record: TenantRecord, plan: SQLPlan) -> None:
        location = self._engines.locate(record, DatabaseRole.OWNER)
        text = script(
            plan,
            database=record.tenant.database or "",
            tenant_id=str(record.tenant.id),
            lock_timeout=self._options.lock_timeout,
            statement_timeout=self._options.statement_timeout,
        )
        places = self._places_on(location.server)
        place = await places.take()
        try:
            await backend(location.server.backend).send_script(location, self._settings, text)
        finally:
            places.give(place)

    async def _by_python(self, record: TenantRecord) -> tuple[str | None, str | None]:
        ended: tuple[str | None, str | None] = await self._in_thread(self._python, record)
        return ended

    def _python(self, record: TenantRecord) -> tuple[str | None, str | None]:
        self._keep_copy(record)
        with self._engines.passing(record, DatabaseRole.OWNER, Work.BACKGROUND) as engine, engine.connect() as connection:
            return self._local.run(
                connection,
                self._target,
                lock_timeout=self._options.lock_timeout,
                statement_timeout=self._options.statement_timeout,
            )

    def _keep_copy(self, record: TenantRecord) -> None:
        location = self._engines.locate(record, DatabaseRole.OWNER)
        if location.server.backend != SQLITE:
            return
        if (
            found_revision(self._engines, record) != self._target
        ):  # a copy of what was migrated already would take the place of the useful one
            backend(SQLITE).keep_copy(location)

    async def _in_child(self, record: TenantRecord, down: bool) -> tuple[str | None, str | None]:
        location = self._engines.locate(record, DatabaseRole.OWNER)
        limits = {"kms": None, "lock_timeout": self._options.lock_timeout}
        password = "" if location.server.backend == SQLITE else location.password()
        errand = Errand(
            tenant=record.tenant,
            server=location.server,
            password=SecretStr(password),
            settings=self._settings.model_copy(update=limits),
            location=self._settings.migrations or "",
            target=self._target or "base",
            down=down,
            statement_timeout=self._options.statement_timeout,
        )
        if self._children is None:
            most = min(self._options.concurrency, multiprocessing.cpu_count())
            self._children = ProcessPoolExecutor(most, multiprocessing.get_context("spawn"), end_with_parent)
        places = self._places_on(location.server)
        place = await places.take()
        try:
            await self._in_thread(self._keep_copy, record)
            return await asyncio.get_running_loop().run_in_executor(self._children, upgrade, errand)
        except BrokenProcessPool:
            self._children = None
            raise
        finally:
            places.give(place)

    async def _in_thread(self, fn: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, contextvars.copy_context().run, fn, *args)

    def _places_on(self, server: Server) -> _Places:
        if server not in self._places:
            self._places[server] = _Places(self._engines, server, self._in_thread)
        return self._places[server]

    def rest(self) -> None:
        """Nothing is under way: let the application have the places."""
        for places in self._places.values():
            places.free()

    def close(self) -> None:
        self.rest()
        self._threads.shutdown()
        if self._children is not None:
            self._children.shutdown()


def _threads(options: Options) -> int:
    return options.total_concurrency or 4 * options.concurrency


@dataclass(slots=True)
class _Place:
    number: int
    free: Callable[[], None]
    uses: int = 0


class _Places:
    """Places in one server's budget, of its background class. Each serves a few tenants, because waiting for one takes a thread; and each
    has a number of its own there, because what one tenant may have is no limit of a rollout's."""

    def __init__(self, engines: Engines, server: Server, in_thread: Callable[..., Any]) -> None:
        self._engines, self._server, self._in_thread = engines, server, in_thread
        self._idle: list[_Place] = []
        self._numbers: set[int] = set()
        self._waiting = 0

    async def take(self) -> _Place:
        if self._idle:
            return self._idle.pop()
        number = next(each for each in itertools.count(-2, -1) if each not in self._numbers)
        self._numbers.add(number)
        self._waiting += 1
        taking = asyncio.ensure_future(self._in_thread(self._engines.take_place, self._server, "a rollout", Work.BACKGROUND, number))
        try:
            return _Place(number, await asyncio.shield(taking))
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                taking.add_done_callback(_free_unless_failed)
            self._numbers.discard(number)
            raise
        finally:
            self._waiting -= 1

    def give(self, place: _Place) -> None:
        place.uses += 1
        if place.uses < _USES and not self._waiting:
            self._idle.append(place)
        else:
            self._let_go(place)

    def free(self) -> None:
        while self._idle:
            self._let_go(self._idle.pop())

    def _let_go(self, place: _Place) -> None:
        self._numbers.discard(place.number)
        place.free()


def _free_unless_failed(taking: asyncio.Future[Callable[[], None]]) -> None:
    if not taking.cancelled() and taking.exception() is None:
        taking.result()()


def _sqlstate(error: BaseException) -> str | None:
    origin = getattr(error, "orig", None) or error
    found = getattr(origin, "sqlstate", None)
    return None if found is None else str(found)


def _ended(error: Exception, from_revision: str | None, runner: Runner, seconds: float) -> Ended:
    sqlstate = _sqlstate(error)
    kind = sqlstate or type(getattr(error, "orig", None) or error).__name__
    if isinstance(error, ConnectFailed):
        text, again = error.problem, error.kind is not FailureClass.TENANT
    else:
        text, again = describe(error), _is_worth_another_try(error, sqlstate)
    if sqlstate == BUSY:
        text = "another migration of this tenant is under way"
    elif sqlstate == WRONG_IDENTITY:
        text = "the identity stamp in its database names another tenant"
    return Ended(from_revision, None, seconds, runner, text, sqlstate, kind, again, isinstance(error, BudgetExhausted))


def _is_worth_another_try(error: Exception, sqlstate: str | None) -> bool:
    if sqlstate is not None:
        return sqlstate in LOCKED or sqlstate in _AWAY or sqlstate.startswith("08")
    if isinstance(error, TenantDBError):
        return error.retryable
    lost = getattr(error, "connection_invalidated", False) or type(error).__name__ == "OperationalError"
    return bool(lost) or isinstance(error, BrokenProcessPool)
