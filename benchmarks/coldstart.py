"""The first query of a tenant that has no connection open, against psycopg alone: connect, ask, with the same role and verifier.

Both are timed from nothing to the row. The tenant's record is in memory, as psycopg knows its arguments; what is closed for the next round
is closed outside the clock, and its backend is waited for.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from typing import Any

import psycopg
from sqlalchemy import select

from benchmarks.measure import Result
from benchmarks.peers import Login
from benchmarks.world import Marker, clone_tenants, embedded_world, login_of, provision_with_marker, temporary_files_in_memory
from tenantdb import AsyncTenantDB, TenantDB

TENANTS = 30
_QUERY = "SELECT markers.name FROM markers WHERE markers.id = %s"
_GONE_SECONDS = 5.0


_STATEMENT = select(Marker.name).where(Marker.id == 1)


def run(*, quick: bool) -> Result:
    result = Result()
    rounds = 4 if quick else 20
    slugs = [f"tenant-{number:03d}" for number in range(TENANTS)]
    with temporary_files_in_memory(), embedded_world({"autovacuum": "off"}, fsync=False) as world, world.open() as db:
        clone_tenants(world, db, provision_with_marker(db, "model"), slugs)
        with psycopg.connect(world.server.url(), autocommit=True) as superuser:
            bench = _Bench(db, superuser, slugs)
            note = "cold tenant: first row through a bound session / psycopg connect and the same query"
            result.add("cold_ratio", _median(bench.rounds(rounds)), bar="<= 1.5", note=note)
            result.add("async_cold_ratio", _median(asyncio.run(bench.async_rounds(rounds))), bar="<= 1.5", note="the same in asyncio")
            for key, pairs in bench.pairs.items():
                ours, theirs = (statistics.median(each) * 1e3 for each in zip(*pairs, strict=True))
                result.environment[key] = {"ours_ms": round(ours, 2), "psycopg_ms": round(theirs, 2), "pairs": len(pairs)}
    return result


def _median(pairs: Sequence[tuple[float, float]]) -> float:
    return statistics.median(ours / theirs for ours, theirs in pairs)


class _Bench:
    """Each tenant once per round; who goes first alternates, and a first round is thrown away."""

    def __init__(self, db: TenantDB, superuser: psycopg.Connection, slugs: Sequence[str]) -> None:
        self._db = db
        self._superuser = superuser
        self._logins = {slug: login_of(db, slug) for slug in slugs}
        self.pairs: dict[str, list[tuple[float, float]]] = {}

    def rounds(self, rounds: int) -> list[tuple[float, float]]:
        pairs: list[tuple[float, float]] = []
        for number in range(rounds + 1):
            for position, (slug, login) in enumerate(self._logins.items()):
                self._make_cold(slug)
                if (number + position) % 2:
                    ours, theirs = self._ours(slug), self._theirs(slug, login)
                else:
                    theirs, ours = self._theirs(slug, login), self._ours(slug)
                if number:
                    pairs.append((ours, theirs))
        self.pairs["threads"] = pairs
        return pairs

    async def async_rounds(self, rounds: int) -> list[tuple[float, float]]:
        adb = AsyncTenantDB(self._db)
        pairs: list[tuple[float, float]] = []
        for number in range(rounds + 1):
            for position, (slug, login) in enumerate(self._logins.items()):
                self._make_cold(slug)
                if (number + position) % 2:
                    ours, theirs = await self._ours_async(adb, slug), await self._theirs_async(slug, login)
                else:
                    theirs, ours = await self._theirs_async(slug, login), await self._ours_async(adb, slug)
                if number:
                    pairs.append((ours, theirs))
        self.pairs["asyncio"] = pairs
        await adb.close()
        return pairs

    def _make_cold(self, slug: str) -> None:
        """Close what is open to the tenant, and have its record in memory."""
        self._db._engines.forget(self._db.resolve(slug).id)

    def _wait_until_gone(self, login: Login) -> None:
        deadline = time.monotonic() + _GONE_SECONDS
        query = "SELECT 1 FROM pg_stat_activity WHERE datname = %s"
        while self._superuser.execute(query, [login.url.database]).fetchone():
            if time.monotonic() > deadline:
                raise AssertionError("a connection stayed open, so the tenant is not cold")

    def _ours(self, slug: str) -> float:
        self._wait_until_gone(self._logins[slug])
        began = time.perf_counter()
        with self._db.tenant_context(slug), self._db.session() as session:
            found = session.scalar(_STATEMENT)
            took = time.perf_counter() - began
        _must(found, slug)
        self._make_cold(slug)
        return took

    def _theirs(self, slug: str, login: Login) -> float:
        self._wait_until_gone(login)
        began = time.perf_counter()
        with psycopg.connect(**_arguments(login)) as connection:
            row = connection.execute(_QUERY, [1]).fetchone()
            took = time.perf_counter() - began
        _must(row and row[0], slug)
        return took

    async def _ours_async(self, adb: AsyncTenantDB, slug: str) -> float:
        await self._wait_until_gone_async(self._logins[slug])
        began = time.perf_counter()
        async with adb.tenant_context(slug), adb.session() as session:
            found = await session.scalar(_STATEMENT)
            took = time.perf_counter() - began
        _must(found, slug)
        self._make_cold(slug)
        return took

    async def _theirs_async(self, slug: str, login: Login) -> float:
        await self._wait_until_gone_async(login)
        began = time.perf_counter()
        async with await psycopg.AsyncConnection.connect(**_arguments(login)) as connection:
            row = await (await connection.execute(_QUERY, [1])).fetchone()
            took = time.perf_counter() - began
        _must(row and row[0], slug)
        return took

    async def _wait_until_gone_async(self, login: Login) -> None:
        for _ in range(3):
            await asyncio.sleep(0)  # an event loop closes its connections itself
        self._wait_until_gone(login)


def _arguments(login: Login) -> dict[str, Any]:
    url = login.url
    return {"host": url.host, "port": url.port, "user": url.username, "dbname": url.database, **login.connect_args}


def _must(found: object, slug: str) -> None:
    if found != slug:
        raise AssertionError(f"{slug} got the row of {found}")
