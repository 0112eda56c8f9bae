"""One PostgreSQL with many tenants, made cheaply, on two servers of the registry: ``near`` is the server itself, ``far`` is the same behind
a network that a test can break. Every tenant's database says whose it is; every process on it leaves nothing behind."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import psycopg
from psycopg import sql
from sqlalchemy import make_url, text

from benchmarks.world import MARKERS, clone_tenants
from tenantdb import Budget, BudgetStats, Settings, Tenant, TenantDB
from tenantdb.connections.budget import ServerBudget
from tests.chaos.proxy import Proxy
from tests.conformance.colours import Face
from tests.world import PostgreSQLWorld, eventually

HERE = text("SELECT current_database()")
REGISTRY_POOL = int(Settings.model_fields["registry_pool_size"].default) + 1  # one that listens
MAX_CONNECTIONS = 200
PATIENCE = 10.0  # seconds until what has not come to rest never will


class Town:
    """``db`` makes tenants and opens nothing else."""

    def __init__(self, world: PostgreSQLWorld, proxy: Proxy) -> None:
        self.world = world
        self.proxy = proxy
        near = world.url(world.provisioner)
        self.db = world.make_db(server=None, servers={"near": near, "far": make_url(near).set(port=proxy.port)})
        self.tenants: list[Tenant] = []

    def provisioned(self, slug: str = "", *, server: str = "near") -> Tenant:
        """One that was made as every tenant is made."""
        made = self.db.provision(slug or f"own-{secrets.token_hex(4)}", server=server)
        with self.db.migrations.owner_connection(made) as connection:
            connection.exec_driver_sql(MARKERS)
            connection.exec_driver_sql("INSERT INTO markers VALUES (1, %s)", (made.slug,))
            connection.commit()
        self.tenants.append(made)
        self.db.close()  # its background thread: what tests find running is a test's
        return self.db.tenants.get(made.id)

    @cached_property
    def models(self) -> dict[str, Tenant]:
        """Whose databases the others are copies of, by server; nobody connects to them."""
        return {name: self.provisioned(f"model-{name}", server=name) for name in ("near", "far")}

    def make(self, count: int, *, server: str = "near") -> list[Tenant]:
        """New tenants."""
        slugs = [f"{server}-{secrets.token_hex(4)}" for _ in range(count)]
        clone_tenants(self.world, self.db, self.models[server], slugs)
        made = [self.db.tenants.get(slug) for slug in slugs]
        self.tenants += made
        self.db.close()
        return made

    @cached_property
    def near(self) -> list[Tenant]:
        """Thirty."""
        return self.make(30)

    @cached_property
    def far(self) -> list[Tenant]:
        """Ten, behind the network."""
        return self.make(10, server="far")

    @cached_property
    def fifty(self) -> list[Tenant]:
        return [*self.near, *self.make(20)]

    @cached_property
    def three_hundred(self) -> list[Tenant]:
        return [*self.near, *self.make(270)]

    def backends(self, tenants: Sequence[Tenant] | None = None) -> int:
        """How many sessions PostgreSQL has in these tenants' databases."""
        return self.world.open_connections(self.db, self.tenants if tenants is None else tenants)

    def backends_of_roles(self) -> int:
        """How many sessions of tenants PostgreSQL counts, those that are not yet in a database included."""
        row = self.world.superuser.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE usename = ANY(%s)", [[tenant.runtime_role for tenant in self.tenants]]
        ).fetchone()
        return int(row[0]) if row else 0

    def run(self, statement: str, *parts: sql.Composable) -> None:
        """As the superuser."""
        self.world._run(statement, *parts)


def budget(connections: int, **options: Any) -> Budget:
    """So many connections for tenants of ``near``, all of them interactive."""
    return Budget(**{"connections": connections + REGISTRY_POOL, "processes": 1, "background": 0, "administration": 0, **options})


def budget_on(db: TenantDB, server: str = "near") -> ServerBudget:
    return db._engines.budget_of(db.servers.get(server))


def stats_of(db: TenantDB, server: str = "near") -> BudgetStats:
    return next(stats for stats in db.stats() if stats.server == server)


def is_at_rest(stats: BudgetStats) -> bool:
    """Nobody uses, opens, closes or waits for anything: what is open is idle."""
    return stats.in_use == stats.opening == stats.closing == stats.detached == stats.waiting == 0


def at_rest(db: TenantDB) -> bool:
    return all(is_at_rest(stats) for stats in db.stats())


async def rested(db: TenantDB) -> None:
    """Until `at_rest`; the event loop runs meanwhile."""
    deadline = time.monotonic() + PATIENCE
    while not at_rest(db):
        assert time.monotonic() < deadline, f"it did not come to rest: {db.stats()}"
        await asyncio.sleep(0.005)


def know(db: TenantDB, tenants: Sequence[Tenant]) -> None:
    """Have a process look tenants up, so that nothing but their connections is waited for later."""
    for tenant in tenants:
        db.resolve(tenant.id)


async def whose(face: Face, tenant: Tenant) -> bool:
    """Whether a session of a tenant is in its database."""
    async with face.session(tenant) as session:
        return bool(await session.scalar(HERE) == tenant.database)


class Watch:
    """Samples in a thread how many sessions PostgreSQL has of the town's tenants; the server's word, not our own counters.

    The server reads its list of sessions one by one, so one that ends and one that begins meanwhile may both be on it. Those that
    are on two lists in a row were there together.
    """

    def __init__(self, town: Town) -> None:
        self._town = town
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch")
        self.peak = 0
        self.samples = 0

    def _look(self) -> None:
        names = [tenant.database for tenant in self._town.tenants]
        with psycopg.connect(self._town.world.superuser_url, autocommit=True) as eye:

            def there() -> set[int]:
                return {
                    pid
                    for (pid,) in eye.execute(
                        "SELECT pid FROM pg_stat_activity WHERE datname = ANY(%s) AND backend_type = 'client backend'", [names]
                    )
                }

            while not self._over.is_set():
                self.peak = max(self.peak, len(there() & there()))
                self.samples += 1
                self._over.wait(0.002)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()


def nothing_left(town: Town, made: Sequence[TenantDB], others: Sequence[threading.Thread]) -> None:
    """The end of every test: the accounts are straight, nothing is open, no thread runs but the ``others`` that were there before."""
    for db in made:
        eventually_rests(db)
    for db in made:
        db.close()
    for db in made:
        eventually(lambda db=db: all(stats.held == 0 for stats in db.stats()))  # type: ignore[misc]
    eventually(lambda: town.backends() == 0)
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("tenantdb-") and thread not in others])


def eventually_rests(db: TenantDB) -> None:
    try:
        eventually(lambda: at_rest(db))
    except AssertionError:
        raise AssertionError(f"it did not come to rest: {db.stats()}") from None
