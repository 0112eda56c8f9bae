"""From a tenant's record to an engine, and the budgets that all engines draw on.

An engine is a small object over a template's dialect, listeners and compiled cache; the template exists once per server and driver. An
engine is kept for as long as somebody holds it or its tenant has connections: making one takes microseconds, so nothing is kept for a
tenant without any. There is one per (tenant, generation, role, lane); a lane is "threads", or one event loop, and no connection ever
changes lane. An engine either writes or only reads, by its tenant's subscription: when that changes another takes its place, and its
connections are closed as those of an older generation are.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine

from tenantdb.backends import Location, backend
from tenantdb.connections.budget import ServerBudget
from tenantdb.connections.ledger import Work
from tenantdb.connections.locate import Locator, subscription_expired
from tenantdb.connections.places import hold_place, take_place
from tenantdb.connections.pools import WORK, Source, TenantPool
from tenantdb.connections.reaper import Reaper
from tenantdb.connections.share import limits_of
from tenantdb.connections.sqla import TenantEngine
from tenantdb.errors import WrongDatabase
from tenantdb.forking import follow
from tenantdb.model import BudgetStats, DatabaseRole, Server, Tenant
from tenantdb.registry.records import TenantRecord
from tenantdb.settings import Settings

if TYPE_CHECKING:
    from tenantdb.backends import Backend
    from tenantdb.events import Event

logger = logging.getLogger("tenantdb.connections")

Lane = asyncio.AbstractEventLoop | None
"""An event loop, or None for the threads."""


_Engines = weakref.WeakValueDictionary[int, TenantEngine]
"""One lane's, by the number of the tenant's id."""


class _OnServer:
    """What the engines on one server share."""

    def __init__(self, server: Server, budget: ServerBudget) -> None:
        self.server = server
        self.budget = budget
        self.templates: dict[bool, Engine] = {}  # by whether they are for asyncio


class Engines:
    """Engines on tenants' databases; here an unservable tenant is refused. Safe to share between threads."""

    def __init__(
        self, locator: Locator, settings: Settings, on_wrong_database: Callable[[Tenant, WrongDatabase], object] = lambda *_: None
    ) -> None:
        self._locator = locator
        self._settings = settings
        self._on_wrong_database = on_wrong_database
        self._servers: dict[UUID, _OnServer] = {}
        self._lanes: dict[Lane, _Engines] = {None: weakref.WeakValueDictionary()}
        self._lock = threading.RLock()  # RLock: a listener that makes an engine may look one up
        self._listeners: list[tuple[str, Callable[..., Any]]] = []
        self._observers: list[Callable[[Event], object]] = []
        self._reaper = Reaper(self._maintain)
        follow(self)

    # -- engines -----------------------------------------------------------------------------------------------------------------------

    def engine_of(self, record: TenantRecord, key: Hashable, *, unpaid: bool = False) -> TenantEngine:
        """The threads' engine of a tenant; ``key`` is how the caller named it. ``unpaid``: to read what is ours, whatever its subscription
        is. Raises: what `Locator.ensure_servable` raises."""
        tenant = self._locator.ensure_servable(record.tenant, key, unpaid=unpaid)
        read_only = self._locator.reads_only(tenant)
        return _current(self._lanes[None], tenant, read_only) or self._make(record, None, read_only)

    def async_engine_of(self, record: TenantRecord, key: Hashable) -> AsyncEngine:
        """The running event loop's engine of a tenant."""
        return AsyncEngine(self.loop_engine_of(record, key))

    def loop_engine_of(self, record: TenantRecord, key: Hashable) -> TenantEngine:
        """What the running event loop's `AsyncEngine` stands on."""
        tenant = self._locator.ensure_servable(record.tenant, key)
        loop = asyncio.get_running_loop()
        lane = self._lanes.get(loop)
        read_only = self._locator.reads_only(tenant)
        return (None if lane is None else _current(lane, tenant, read_only)) or self._make(record, loop, read_only)

    @contextlib.contextmanager
    def passing(self, record: TenantRecord, role: DatabaseRole, work: Work = Work.ADMINISTRATION) -> Iterator[Engine]:
        """An engine whose connections are closed when they come back, whatever the tenant's state: for steps of provisioning and for
        migrations. It draws on the budget as everything does."""
        location = self._locator.locate(record, role)
        pool = TenantPool(self._source(location, is_async=False, parks=False))
        engine = TenantEngine(pool, backend(location.server.backend).url(location), pool.source.template)
        try:
            with working(work):
                yield engine
        finally:
            pool.retire()

    def locate(self, record: TenantRecord, role: DatabaseRole) -> Location:
        """Where a program other than ours finds the tenant's database. What it opens needs a `place`. Raises: as `Locator.locate`."""
        return self._locator.locate(record, role)

    def _make(self, record: TenantRecord, loop: Lane, read_only: bool) -> TenantEngine:
        location = replace(self._locator.locate(record, DatabaseRole.RUNTIME), read_only=read_only)
        tenant = location.tenant
        source = self._source(location, is_async=loop is not None, parks=True)  # opens nothing
        with self._lock:
            lane = self._lanes.get(loop)
            if lane is None:
                self._drop_closed_loops()
                lane = self._lanes.setdefault(loop, weakref.WeakValueDictionary())
            if (made := _current(lane, tenant, read_only)) is not None:  # by somebody else, meanwhile
                return made
            old = lane.get(tenant.id.int)
            pool = TenantPool(source)
            engine = TenantEngine(pool, backend(location.server.backend).url(location), source.template)
            if read_only:
                engine.update_execution_options(tenantdb_read_only=True)
            pool.belongs_to(engine)
            lane[tenant.id.int] = engine
        if old is not None:
            _retire([old], outdated=True)
        return engine

    def _source(self, location: Location, *, is_async: bool, parks: bool) -> Source:
        on_server = self._on(location.server)
        template = on_server.templates.get(is_async)
        product = backend(location.server.backend)
        if template is None:
            with self._lock:
                template = on_server.templates.get(is_async)
                if template is None:
                    template = product.template(self._settings, is_async=is_async)
                    template.dialect.has_terminate = True  # our pools close at once, so a collected lease of asyncio need not be dropped
                    event.listen(template, "handle_error", functools.partial(_say_why, product), retval=True)
                    for identifier, listener in self._listeners:
                        event.listen(template, identifier, listener)
                    on_server.templates[is_async] = template
        wrong = self._report_wrong_database
        return Source(location, product, template, on_server.budget, self._settings, wrong, is_async=is_async, parks=parks)

    # -- servers -----------------------------------------------------------------------------------------------------------------------

    def budget_of(self, server: Server) -> ServerBudget:
        return self._on(server).budget

    def _on(self, server: Server) -> _OnServer:
        on_server = self._servers.get(server.id)
        if on_server is None:
            with self._lock:
                on_server = self._servers.get(server.id)
                if on_server is None:
                    budget = self._settings.budget
                    made = ServerBudget(
                        server.name,
                        limits_of(self._settings, server),
                        self._reaper,
                        self._emit,
                        total=budget.connections,
                        processes=budget.share_of,
                    )
                    on_server = self._servers[server.id] = _OnServer(server, made)
        return on_server

    @contextlib.contextmanager
    def place(self, server: Server, label: str) -> Iterator[None]:
        """A place in a server's budget for a connection that is no tenant's, such as the provisioner's, while the block lasts."""
        with hold_place(self.budget_of(server), label, self._settings.budget.acquire_timeout):
            yield

    @contextlib.contextmanager
    def scratch(self, server: Server) -> Iterator[Engine]:
        """An engine on an empty database of a server that this process has a provisioner for; it is dropped at the end. In the budget."""
        url = self._settings.provisioners[server.name]
        with self.place(server, "a scratch database"), backend(server.backend).scratch_engine(server, url, self._settings) as engine:
            yield engine

    def take_place(self, server: Server, label: str, work: Work, number: int) -> Callable[[], None]:
        """A place without a block: what is returned frees it. ``number``: as in `places.take_place`. Raises: `BudgetExhausted`."""
        return take_place(self.budget_of(server), label, work, self._settings.budget.acquire_timeout, number)

    # -- letting go --------------------------------------------------------------------------------------------------------------------

    def forget(self, tenant_id: UUID, before: int | None = None) -> None:
        """A tenant has changed: close what is idle, what is leased when it comes back, and refuse its old engines. From any thread.

        ``before``: only engines of a generation before this one.
        """
        with self._lock:
            lanes = list(self._lanes.values())
        for lane in lanes:
            engine = lane.get(tenant_id.int)
            if engine is None or (before is not None and _pool(engine).generation >= before):
                continue
            with self._lock:  # a newer one may have taken its place
                if lane.get(tenant_id.int) is engine:
                    del lane[tenant_id.int]
            _retire([engine], outdated=True)

    def close(self) -> None:
        """Close idle connections; leased ones close when they come back. Waits until the servers have let go. May be called twice."""
        with self._lock:
            engines = [engine for lane in self._lanes.values() for engine in list(lane.values())]
            for lane in self._lanes.values():
                lane.clear()
        _retire(engines)
        for on_server in list(self._servers.values()):
            on_server.budget.close_idle("closed")
        self._drop_closed_loops()
        self._reaper.stop()

    def close_loop(self) -> None:
        """Close the idle connections of the running event loop."""
        with self._lock:
            lane = self._lanes.pop(asyncio.get_running_loop(), None)
        if lane is not None:
            _retire(list(lane.values()))

    def _drop_closed_loops(self) -> None:
        """Connections of a loop that is closed can never be used again. They are closed by hand, for nothing can be awaited there."""
        with self._lock:
            closed = [self._lanes.pop(loop) for loop in list(self._lanes) if loop is not None and loop.is_closed()]
        for lane in closed:
            _retire(list(lane.values()))

    def _maintain(self, now: float) -> float:
        if any(loop is not None and loop.is_closed() for loop in list(self._lanes)):
            self._drop_closed_loops()
        due = float("inf")
        for on_server in list(self._servers.values()):
            due = min(due, on_server.budget.maintain(now))
            if self._settings.budget.leak_after:
                due = min(due, on_server.budget.overdue(now, self._settings.budget.leak_after))
        return due

    # -- seeing ------------------------------------------------------------------------------------------------------------------------

    def stats(self) -> tuple[BudgetStats, ...]:
        """One record per server that this process has used, by name."""
        return tuple(sorted((on.budget.stats() for on in list(self._servers.values())), key=lambda stats: stats.server))

    def listen(self, identifier: str, listener: Callable[..., Any]) -> None:
        """A SQLAlchemy event on every tenant's engine, now and later."""
        with self._lock:
            self._listeners.append((identifier, listener))
            templates = [template for on_server in self._servers.values() for template in on_server.templates.values()]
        for template in templates:
            event.listen(template, identifier, listener)

    def observe(self, observer: Callable[[Event], object]) -> None:
        """Call with every `Event`, from whichever thread or loop it happens in."""
        self._observers.append(observer)

    def _emit(self, event: str, *facts: object) -> None:
        if not self._observers:
            return
        from tenantdb import events

        happened: Event = getattr(events, event)(*facts)
        for observer in self._observers:
            try:
                observer(happened)
            except Exception:
                logger.exception("an observer of connections failed")

    def _report_wrong_database(self, tenant: Tenant, error: WrongDatabase) -> None:
        logger.error("tenant %s is quarantined: %s", tenant.slug, error.problem)
        self._reaper.do(lambda: self._on_wrong_database(tenant, error))

    # -- processes ---------------------------------------------------------------------------------------------------------------------

    def start_empty(self) -> object:
        """In the child after a fork: see `tenantdb.forking`."""
        inherited: list[object] = [self._lanes, self._servers, self._reaper.start_empty()]
        inherited += [on_server.budget.start_empty() for on_server in self._servers.values()]
        self._lock = threading.RLock()
        self._lanes = {None: weakref.WeakValueDictionary()}
        self._servers = {}
        return inherited


def _current(lane: _Engines, tenant: Tenant, read_only: bool) -> TenantEngine | None:
    """The tenant's engine, unless it is of an older generation than the record, or of the same and may do other things. One that is newer
    knows better than the record."""
    engine = lane.get(tenant.id.int)
    if engine is None:
        return None
    pool = _pool(engine)
    newer = pool.generation - tenant.generation
    return engine if newer > 0 or (newer == 0 and pool.read_only == read_only) else None


def _say_why(product: Backend, context: ExceptionContext) -> BaseException | None:
    """A connection that only reads was told to write: not the application's mistake, and not for it to find out from the driver's words."""
    pool = None if context.engine is None else context.engine.pool
    if isinstance(pool, TenantPool) and pool.read_only and product.refuses_writing(context.original_exception):
        return subscription_expired(pool.source.location.tenant)
    return None


def _retire(engines: Sequence[TenantEngine], *, outdated: bool = False) -> None:
    for engine in engines:
        _pool(engine).retire(outdated=outdated)


def _pool(engine: TenantEngine) -> TenantPool:
    return cast("TenantPool", engine.pool)


@contextlib.contextmanager
def working(work: Work) -> Iterator[None]:
    """Connections that the block asks for are of this class."""
    token = WORK.set(work)
    try:
        yield
    finally:
        WORK.reset(token)
