"""A new tenant, all included, against the bare copy of a database, and against the ways in which teams make one by hand.

The schema is the clinic's: 13 tables in ten revisions. The cluster lies on the disk, with fsync on, as it does in production. What is made
is dropped only with the server: dropping databases between creating them slows ext4 down, and would be measured.
"""

from __future__ import annotations

import itertools
import secrets
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg
from psycopg import sql
from sqlalchemy import text
from sqlalchemy.orm import Session

from benchmarks.measure import Result
from benchmarks.peers.alembic_by_hand import AlembicByHand
from benchmarks.world import World, embedded_world, login_of
from tenantdb import TenantDB, TenantState
from tenantdb.backends.postgresql import scram

MIGRATIONS = "examples.clinic:migrations"
AT_ONCE = 4
COPIES, SPARES = "copies", "spares"  # one server under two names: whoever asks for the first gets no spare
_CATEGORIES = ("consultation", "vaccination", "laboratory", "surgery")


def run(*, quick: bool) -> Result:
    result = Result()
    rounds = 12 if quick else 40
    with embedded_world({"autovacuum": "off"}, migrations=MIGRATIONS) as world:
        servers = dict.fromkeys((COPIES, SPARES), world.arguments["server"])
        with world.open(server=None, servers=servers) as db, ThreadPoolExecutor(AT_ONCE) as threads:
            db.init()
            db.seed(static=True)(_first_rows)
            bench = _Bench(world, db, threads)
            bench.provision()  # builds the golden database, as the first tenant of a release does
            db.spares.fill(rounds + 2, server=SPARES)
            pairs = bench.alternate(rounds, bench.raw_clone, bench.provision, bench.take)
            raw, ours, spare = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
            result.add(
                "provision_vs_raw_clone", _ratio(pairs, 1, 0), bar="<= 2.2", note="a tenant, all included / CREATE DATABASE TEMPLATE"
            )
            result.add("spare_vs_raw_clone", _ratio(pairs, 2, 0), bar="<= 0.15", note="a tenant from a spare, all included / the same")
            result.environment["ms"] = {"raw_clone": round(raw, 1), "provision": round(ours, 1), "spare": round(spare, 2)}

            pairs = bench.alternate(max(4, rounds // 3), bench.by_hand, bench.provision)
            result.add("vs_naive_alembic", _ratio(pairs, 1, 0), bar="<= 0.7", note="/ role, database, alembic upgrade in this process")
            pairs = bench.alternate(3 if quick else 8, bench.by_subprocess, bench.provision)
            result.add("vs_alembic_subprocess", _ratio(pairs, 1, 0), bar="<= 0.16", note="/ role, database, `alembic upgrade head`")

            at_once = bench.alternate(max(4, rounds // 3), bench.raw_at_once, bench.provision_at_once)
            result.add("concurrent_vs_raw", _ratio(at_once, 1, 0), bar="<= 2.2", note=f"{AT_ONCE} at once / {AT_ONCE} raw clones at once")
            result.add("errors", bench.errors, bar="0", note="of those at once")

            pairs = bench.alternate(150 if quick else 600, bench.connect_4096, bench.connect_ours)
            result.add("connect_ratio", _ratio(pairs, 1, 0), bar="<= 0.6", note="psycopg.connect, our verifier / one of 4,096 rounds")
    return result


def _first_rows(session: Session) -> None:
    for name in _CATEGORIES:
        session.execute(text("INSERT INTO categories VALUES (gen_random_uuid(), :name, NULL, now(), now())"), {"name": name})


def _ratio(rounds: list[tuple[float, ...]], ours: int, theirs: int) -> float:
    return statistics.median(times[ours] / times[theirs] for times in rounds)


class _Bench:
    def __init__(self, world: World, db: TenantDB, threads: ThreadPoolExecutor) -> None:
        self._db = db
        self._threads = threads
        self._numbers = itertools.count()
        self.errors = 0
        self._owner = db.users.create("owner@clinic.test", secrets.token_urlsafe(12))
        url = world.arguments["server"]
        self._connections = [psycopg.connect(url, dbname="postgres", autocommit=True) for _ in range(AT_ONCE)]
        self._superuser = psycopg.connect(world.server.url(), autocommit=True)
        self._by_hand = AlembicByHand(world.server.url(), MIGRATIONS)
        self._logins: list[dict[str, object]] = []

    def alternate(self, rounds: int, *ways: Callable[[], object]) -> list[tuple[float, ...]]:
        """The time of each way in each round, whose order turns; a first round is thrown away."""
        found = []
        for number in range(rounds + 1):
            times = [0.0] * len(ways)
            for shift in range(len(ways)):
                which = (number + shift) % len(ways)
                began = time.perf_counter()
                ways[which]()
                times[which] = time.perf_counter() - began
            found.append(tuple(times))
        return found[1:]

    # -- ours --

    def provision(self) -> None:
        self._sign_up(COPIES)

    def take(self) -> None:
        self._sign_up(SPARES)

    def _sign_up(self, server: str) -> None:
        slug = f"clinic-{next(self._numbers)}"
        tenant = self._db.provision(slug, name="A clinic", owner=self._owner, plan="trial", server=server)
        if tenant.state is not TenantState.ACTIVE:
            raise AssertionError(f"{slug} is {tenant.state}")

    def provision_at_once(self) -> None:
        futures = [self._threads.submit(self.provision) for _ in range(AT_ONCE)]
        self.errors += sum(future.exception() is not None for future in futures)

    # -- by hand --

    def raw_clone(self) -> None:
        self._clone(self._connections[0])

    def raw_at_once(self) -> None:
        list(self._threads.map(self._clone, self._connections))

    def _clone(self, connection: psycopg.Connection) -> None:
        golden = next(each for each in self._db._registry.templates.list(self._db.servers.get(COPIES))).database
        name = f"raw_{next(self._numbers)}"
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(golden)))

    def by_hand(self) -> None:
        self._by_hand.in_process(f"hand_{next(self._numbers)}")

    def by_subprocess(self) -> None:
        self._by_hand.by_subprocess(f"hand_{next(self._numbers)}")

    # -- connecting --

    def connect_ours(self) -> None:
        psycopg.connect(**self._login(0)).close()

    def connect_4096(self) -> None:
        psycopg.connect(**self._login(1)).close()

    def _login(self, which: int) -> dict[str, object]:
        """Of one tenant's runtime role, and of a role beside it with the verifier that PostgreSQL would make."""
        if not self._logins:
            slug = self._db.tenants.list("active")[0].slug
            login = login_of(self._db, slug)
            ours = {"host": login.url.host, "port": login.url.port, "dbname": login.url.database, **login.connect_args}
            self._superuser.execute(
                sql.SQL("CREATE ROLE usual LOGIN PASSWORD {}").format(
                    sql.Literal(scram.verifier(login.connect_args["password"], iterations=4096))
                )
            )
            self._superuser.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO usual").format(sql.Identifier(login.url.database or "")))
            self._logins = [{**ours, "user": login.url.username}, {**ours, "user": "usual"}]
        return self._logins[which]
