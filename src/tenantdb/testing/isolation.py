"""A self-test of isolation, for an application's own set-up: does what is bound to one tenant ever reach another's database?

    report = check_isolation(db, seconds=20)
    assert report.ok, report

It makes a few tenants to be thrown away, and puts a row into each that says whose database this is. Then threads and coroutines work for
all of them at once, read that row through sessions, nested blocks, Core connections and executors, and write rows with their own tenant's
id, while connections are killed, evicted, and left dirty, passwords are changed, and tenants suspended. A *crossing* is a row that says
another tenant than the one that was bound, whether it was read at the time or found in the end. Errors are expected in such weather, if
they are tenantdb's own or a lost connection; anything else is reported.

A test that cannot fail proves nothing: with ``leak=True`` now and then a session gets another tenant's engine, and the report must not be
ok.

It changes nothing about the tenants that are there, but it shares their servers and the budget: run it where load does no harm. Hooks
(`TenantDB.on`) are not called for its tenants; seeds are.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import Column, MetaData, Table, Text, insert, select, text
from sqlalchemy.exc import DBAPIError

from tenantdb.aio import AsyncTenantDB
from tenantdb.context import bound_or_none
from tenantdb.database import TenantDB
from tenantdb.errors import ConfigError, TenantDBError, describe
from tenantdb.model import Tenant, TenantState
from tenantdb.settings import SQLITE

log = logging.getLogger("tenantdb.isolation")

CHAOS = ("evict", "kill", "dirty", "suspend", "rotate")
_PAUSE = 0.02  # seconds between two acts of chaos

_metadata = MetaData()
_marker = Table("tenantdb_isolation_marker", _metadata, Column("tenant", Text, nullable=False))
_written = Table("tenantdb_isolation_written", _metadata, Column("tenant", Text, nullable=False), Column("by", Text, nullable=False))


@dataclass(frozen=True, slots=True)
class Crossing:
    """A row of tenant ``found`` where ``bound`` was bound, by id; ``way`` is how it was reached."""

    way: str
    bound: str
    found: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IsolationReport:
    """What `check_isolation` saw. ``checks`` by way, expected ``errors`` by kind, acts of ``chaos`` by kind; ``unexpected`` are errors that
    neither tenantdb nor a lost connection explains."""

    checks: Mapping[str, int]
    chaos: Mapping[str, int]
    errors: Mapping[str, int]
    unexpected: tuple[str, ...] = ()
    crossings: tuple[Crossing, ...] = ()

    @property
    def ok(self) -> bool:
        """No crossing, nothing unexpected, and something was looked at in every way."""
        return not self.crossings and not self.unexpected and all(self.checks.values())

    def __str__(self) -> str:
        def listed(counts: Mapping[str, int]) -> str:
            return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"

        lines = [
            f"{len(self.crossings)} crossings in {sum(self.checks.values())} checks ({listed(self.checks)})",
            f"chaos: {listed(self.chaos)}",
            f"errors, as expected: {listed(self.errors)}",
        ]
        lines += [f"unexpected: {problem}" for problem in self.unexpected[:10]]
        lines += [f"CROSSING {one.way}: tenant {one.bound} was bound, found a row of {one.found}" for one in self.crossings[:10]]
        return "\n".join(lines)


Way = Callable[[Tenant], str]
"""Does something for a tenant, which is bound or not, and returns what the marker said: the id of the tenant that was reached."""


def read_marker(session: Any) -> str:
    """What the database behind a session, or a Core connection, says whose it is: for ways of one's own."""
    found = session.execute(select(_marker.c.tenant)).scalar_one()
    return str(found)


def check_isolation(
    db: TenantDB,
    *,
    tenants: int = 6,
    seconds: float = 10.0,
    threads: int = 6,
    tasks: int = 24,
    chaos: Sequence[str] = CHAOS,
    ways: Mapping[str, Way] | None = None,
    leak: bool = False,
) -> IsolationReport:
    """Work for throw-away tenants in ``threads`` threads and ``tasks`` coroutines at once, for so many seconds, and look for crossings.

    ``db`` needs a provisioner and the owners' secrets, as a worker has them. ``ways`` are further ways to reach a tenant's database, called
    in threads: a request to the application's own routes, a Celery task that is published and waited for. ``chaos`` is chosen from
    `CHAOS`. ``leak`` switches a deliberate leak on. The tenants are purged at the end, also after Ctrl-C.

    Raises: `ConfigError` where it cannot work; what provisioning raises.
    """
    if odd := set(chaos) - set(CHAOS):
        raise ConfigError(f"chaos has no {', '.join(sorted(odd))}; there are {', '.join(CHAOS)}")
    if tenants < 2 or threads < 1 or tasks < 0 or seconds <= 0:
        raise ConfigError("isolation is between two tenants or more, in a thread or more, for more than no time")
    with _throw_away_tenants(db, tenants) as made:
        check = _Check(db, made, chaos, leak)
        check.run(seconds, threads, tasks, ways or {})
        return check.report()


@dataclass
class _Check:
    db: TenantDB
    tenants: Sequence[Tenant]
    chaos: Sequence[str]
    leak: bool
    checks: Counter[str] = field(default_factory=Counter)
    acts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    crossings: list[Crossing] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, seconds: float, threads: int, tasks: int, more: Mapping[str, Way]) -> None:
        ways: dict[str, Way] = {
            "bound": self._bound,
            "named": self._named,
            "switched": self._switched,
            "connection": self._connection,
            "transaction": self._transaction,
            **more,
        }
        self.checks.update(dict.fromkeys([*ways, "executor", *(["task"] if tasks else [])], 0))
        timer = threading.Timer(seconds, self.over.set)
        timer.daemon = True
        leaking = _leaking(self.db, self.tenants) if self.leak else contextlib.nullcontext()
        with leaking, ThreadPoolExecutor(threads + 3, thread_name_prefix="tenantdb-isolation") as executor:
            timer.start()
            try:
                jobs = [executor.submit(self._work, ways, executor if number == 0 else None) for number in range(threads)]
                jobs.append(executor.submit(self._disturb))
                if tasks:
                    jobs.append(executor.submit(lambda: asyncio.run(self._coroutines(tasks))))
                for job in jobs:
                    job.result()
            finally:
                self.over.set()
                timer.cancel()
        self._look_at_what_was_written()

    def report(self) -> IsolationReport:
        return IsolationReport(
            checks=dict(self.checks),
            chaos=dict(self.acts),
            errors=dict(self.errors),
            unexpected=tuple(self.unexpected),
            crossings=tuple(self.crossings),
        )

    # -- work ----------------------------------------------------------------------------------------------------------------------------

    def _work(self, ways: Mapping[str, Way], executor: ThreadPoolExecutor | None) -> None:
        while not self.over.is_set():
            tenant = random.choice(self.tenants)
            name, way = random.choice(list(ways.items()))
            with self._judging(name, tenant) as found:
                found.append(way(tenant))
            if executor is not None:  # one worker hands work on, with its own context, as an application does
                with self._judging("executor", tenant) as found, self.db.tenant_context(tenant):
                    found.append(executor.submit(contextvars.copy_context().run, self._read_bound).result())
            if (left := bound_or_none()) is not None:
                self._cross(Crossing("left bound", "-", str(left.id)))

    async def _coroutines(self, number: int) -> None:
        adb = AsyncTenantDB(self.db)

        async def one() -> None:
            while not self.over.is_set():
                tenant = random.choice(self.tenants)
                with self._judging("task", tenant) as found:
                    async with adb.tenant_context(tenant), adb.begin() as session:
                        found.append(str(await session.scalar(select(_marker.c.tenant))))
                        await asyncio.sleep(random.random() * 0.005)
                        await session.execute(insert(_written), {"tenant": str(tenant.id), "by": "task"})
                        if random.random() < 0.5:
                            await session.rollback()
                await asyncio.sleep(0)

        try:
            await asyncio.gather(*(one() for _ in range(number)))
        finally:
            self.db._engines.close_loop()

    def _bound(self, tenant: Tenant) -> str:
        with self.db.tenant_context(tenant):
            return self._read_bound()

    def _read_bound(self) -> str:
        with self.db.session() as session:
            return read_marker(session)

    def _named(self, tenant: Tenant) -> str:
        with self.db.session(tenant) as session:
            return read_marker(session)

    def _switched(self, tenant: Tenant) -> str:
        with self.db.tenant_context(random.choice(self.tenants)):
            with self.db.tenant_context(tenant, switch=True):
                return self._read_bound()

    def _connection(self, tenant: Tenant) -> str:
        with self.db.connect(tenant) as connection:
            return read_marker(connection)

    def _transaction(self, tenant: Tenant) -> str:
        with self.db.begin(tenant) as session:
            session.execute(insert(_written), {"tenant": str(tenant.id), "by": "transaction"})
            time.sleep(random.random() * 0.005)
            return read_marker(session)

    @contextlib.contextmanager
    def _judging(self, way: str, tenant: Tenant) -> Iterator[list[str]]:
        found: list[str] = []
        try:
            yield found
        except TenantDBError as error:
            with self.lock:
                self.errors[error.code] += 1
        except DBAPIError as error:
            with self.lock:
                if (expected := _weather(error)) is not None:
                    self.errors[expected] += 1
                else:
                    self.unexpected.append(f"{way}: {describe(error)}")
        except Exception as error:
            with self.lock:
                self.unexpected.append(f"{way}: {type(error).__name__}: {error}")
        if found:
            with self.lock:
                self.checks[way] += len(found)
        for each in found:
            if each != str(tenant.id):
                self._cross(Crossing(way, str(tenant.id), each))

    def _cross(self, crossing: Crossing) -> None:
        with self.lock:
            self.crossings.append(crossing)

    def _look_at_what_was_written(self) -> None:
        for tenant in self.tenants:
            with self.db._registry.read():  # an outage at this point is no crossing, and no clean bill of health either
                pass
            with self.db.migrations.owner_connection(str(tenant.id)) as connection:
                for foreign, by in connection.execute(select(_written.c.tenant, _written.c.by).where(_written.c.tenant != str(tenant.id))):
                    self._cross(Crossing(f"written by {by}", foreign, str(tenant.id)))

    # -- chaos ---------------------------------------------------------------------------------------------------------------------------

    def _disturb(self) -> None:
        server = self.db.servers.get(self.tenants[0].server or "default")
        acts: dict[str, Callable[[Tenant], None]] = {
            "evict": lambda tenant: self.db._engines.forget(tenant.id),
            "dirty": self._leave_dirty,
            "suspend": self._suspend,
        }
        if server.backend != SQLITE:
            acts |= {"kill": self._kill, "rotate": self._rotate}
        chosen = [name for name in self.chaos if name in acts]
        while chosen and not self.over.wait(_PAUSE):
            act = random.choice(chosen)
            with self._judging("chaos", random.choice(self.tenants)):
                acts[act](random.choice(self.tenants))
                self.acts[act] += 1

    def _kill(self, tenant: Tenant) -> None:
        """End whatever the tenant's runtime role is doing; a role may end its own sessions."""
        with self.db.connect(tenant) as connection:
            connection.execute(
                text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = current_user AND pid <> pg_backend_pid()")
            )

    def _leave_dirty(self, tenant: Tenant) -> None:
        """Leave a transaction open that has done something, and on PostgreSQL settings that outlive it."""
        session = self.db.session(tenant)
        session.execute(insert(_written), {"tenant": str(tenant.id), "by": "dirty"})
        if session.connection().dialect.name == "postgresql":
            session.execute(text("SELECT set_config('search_path', 'pg_catalog', false)"))
        session.close()

    def _suspend(self, tenant: Tenant) -> None:
        self.db.suspend(tenant)
        self.over.wait(_PAUSE)
        self.db.activate(tenant)

    def _rotate(self, tenant: Tenant) -> None:
        self.db.rotate_credentials(tenant)


def _weather(error: DBAPIError) -> str | None:
    """What an error of the driver is called that such weather explains."""
    sqlstate = getattr(error.orig, "sqlstate", None)
    if str(error.orig) == "database is locked":  # SQLite has one writer at a time
        return "database busy"
    if error.connection_invalidated or sqlstate is None or sqlstate.startswith(("57P", "08")):  # None: it went before it could say why
        return "connection lost"
    return None


@contextlib.contextmanager
def _leaking(db: TenantDB, tenants: Sequence[Tenant]) -> Iterator[None]:
    """Now and then a session is given the engine of another tenant: what a mistake in the look-up would do."""
    engines = db._engines
    right: dict[str, Callable[..., Any]] = {name: getattr(engines, name) for name in ("engine_of", "loop_engine_of")}

    def wrong(name: str) -> Callable[..., Any]:
        def look_up(record: Any, key: Any) -> Any:
            if random.random() < 0.05:
                other = random.choice([tenant for tenant in tenants if tenant.id != record.tenant.id])
                record = db._registry.peek(other.id) or record
            return right[name](record, key)

        return look_up

    for name in right:
        setattr(engines, name, wrong(name))
    try:
        yield
    finally:
        for name in right:
            delattr(engines, name)


@contextlib.contextmanager
def _throw_away_tenants(db: TenantDB, number: int) -> Iterator[Sequence[Tenant]]:
    made: list[Tenant] = []
    with db._hooks.silenced():
        try:
            for _ in range(number):
                made.append(tenant := db.provision(f"isolation-{secrets.token_hex(6)}", name="Isolation self-test"))
                with db.migrations.owner_connection(str(tenant.id)) as connection:
                    _metadata.create_all(connection)
                    connection.execute(insert(_marker), {"tenant": str(tenant.id)})
                    connection.commit()
            yield [db.tenants.get(tenant.id) for tenant in made]
        finally:
            for tenant in made:
                _purge(db, tenant.id)


def _purge(db: TenantDB, tenant_id: UUID) -> None:
    try:
        if db.tenants.get(tenant_id).state is not TenantState.DELETED:
            db.delete(tenant_id)
        db.purge(tenant_id, confirm=str(tenant_id), immediately=True)
    except TenantDBError as error:
        log.warning("tenant %s of the isolation self-test is still there; purge it by hand: %s", tenant_id, error)
