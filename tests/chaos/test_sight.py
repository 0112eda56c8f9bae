"""What happens is seen: leaks with their place, events, a wrong database.

And what time does to connections, on a clock that is moved by hand.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import text

from tenantdb import Tenant, TenantDB, errors
from tenantdb.backends import postgresql
from tenantdb.connections import pools
from tenantdb.events import ConnectionClosed, ConnectionOpened, LeaseOverdue, TenantQuarantined, Waited
from tests.chaos.town import Town, budget_on, stats_of, whose
from tests.conformance.colours import MakeFace
from tests.world import eventually


def observed(db: TenantDB, *kinds: type) -> list[Any]:
    seen: list[Any] = []
    db.observe(lambda event: seen.append(event) if not kinds or isinstance(event, kinds) else None)
    return seen


# -- leaks and events ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True], ids=["opened for it", "reused"])
async def test_a_lease_that_lasts_too_long_is_reported_once_with_its_place(make_face: MakeFace, tenants: list[Tenant], warm: bool) -> None:
    face = make_face(2, leak_after=0.1)
    seen = observed(face.db, LeaseOverdue)
    if warm:
        assert await whose(face, tenants[0])
    session = face.session(tenants[0])

    async def where_it_leaks() -> None:
        await session.scalar(text("SELECT 1"))

    await where_it_leaks()
    eventually(lambda: bool(seen), within=5)
    assert (seen[0].server, seen[0].tenant) == ("near", tenants[0].slug)
    assert seen[0].seconds >= 0.1
    assert "where_it_leaks" in seen[0].place
    face.db._engines._reaper.nudge()
    assert await whose(face, tenants[1])
    await session.close()
    assert len(seen) == 1


async def test_without_a_leak_detector_nothing_is_recorded(make_face: MakeFace, tenants: list[Tenant]) -> None:
    face = make_face(2)
    async with face.session(tenants[0]) as session:
        await session.scalar(text("SELECT 1"))
        [unit] = budget_on(face.db)._leases()
        assert unit.place is None


async def test_observers_are_told_what_happens_and_one_that_fails_harms_nobody(make_face: MakeFace, tenants: list[Tenant]) -> None:
    face = make_face(1)

    def broken(event: object) -> None:
        raise RuntimeError("an observer")

    face.db.observe(broken)
    seen = observed(face.db)
    for tenant in tenants[:3]:
        assert await whose(face, tenant)
    told = [(type(event), event.tenant) for event in seen if isinstance(event, (ConnectionOpened, ConnectionClosed))]
    slugs = [tenant.slug for tenant in tenants[:3]]
    assert told == [
        (ConnectionOpened, slugs[0]),
        (ConnectionClosed, slugs[0]),
        (ConnectionOpened, slugs[1]),
        (ConnectionClosed, slugs[1]),
        (ConnectionOpened, slugs[2]),
    ]
    assert {event.reason for event in seen if isinstance(event, ConnectionClosed)} == {"evicted"}
    assert not [event for event in seen if isinstance(event, Waited)]


# -- the wrong database --------------------------------------------------------------------------------------------------------------


@contextmanager
def stamped(town: Town, tenant: Tenant, as_whom: uuid.UUID) -> Iterator[None]:
    def stamp(whom: uuid.UUID) -> None:
        with town.world.connect(tenant.database or "") as inside:
            inside.execute(text("UPDATE tenantdb.identity SET tenant_id = :id"), {"id": str(whom)})

    stamp(as_whom)
    try:
        yield
    finally:
        stamp(tenant.id)


async def test_a_wrong_database_is_quarantined_with_no_statement_run_and_the_account_stays_straight(
    make_face: MakeFace, town: Town, tenants: list[Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    face = make_face(1)
    wrong, right = tenants[26], tenants[27]
    before = len(quarantines(town, wrong))
    seen = observed(face.db, TenantQuarantined)
    with stamped(town, wrong, as_whom=right.id):
        for _ in range(3):
            with pytest.raises(errors.WrongDatabase, match="names another tenant"):
                async with face.session(wrong) as session:
                    await session.execute(text("UPDATE markers SET name = 'harm'"))
                    await session.commit()
        assert len(seen) == 1  # the rest were told from memory, without a connection
        assert stats_of(face.db).opens == 0
        assert town.backends([wrong]) == 0
        assert await whose(face, right)
        eventually(lambda: len(quarantines(town, wrong)) == before + 1)
        with town.world.connect(wrong.database or "") as inside:
            assert inside.scalar(text("SELECT name FROM markers")) == wrong.slug
    Clock(face.db, monkeypatch).step(pools._QUARANTINE)
    assert await whose(face, wrong)


def quarantines(town: Town, tenant: Tenant) -> list[Any]:
    return [entry for entry in town.db.audit.list(tenant=tenant, limit=50) if entry.action == "tenant.quarantine"]


async def test_without_the_check_the_statement_would_have_run(
    make_face: MakeFace, town: Town, tenants: list[Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    face = make_face(1)
    monkeypatch.setattr(postgresql, "_check_identity", lambda *_: None)
    with stamped(town, tenants[26], as_whom=tenants[27].id):
        assert await whose(face, tenants[26])


# -- time ----------------------------------------------------------------------------------------------------------------------------


class Clock:
    """A process's clock, moved by hand: of its budget and of its background thread."""

    def __init__(self, db: TenantDB, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        self._reaper = db._engines._reaper
        monkeypatch.setattr(budget_on(db), "clock", self.now)
        monkeypatch.setattr(self._reaper, "_clock", self.now)

    def now(self) -> float:
        return time.monotonic() + self.ahead

    def step(self, seconds: float) -> None:
        self.ahead += seconds
        self._reaper.nudge()


async def test_an_hour_that_passes_at_once_fails_nobody(
    make_face: MakeFace, town: Town, tenants: list[Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suspended machine, or a debugger: what is idle is too old, what is leased goes on."""
    face = make_face(6)
    clock = Clock(face.db, monkeypatch)
    for tenant in tenants[:5]:
        assert await whose(face, tenant)
    held = face.session(tenants[5])
    assert await held.scalar(text("SELECT 1")) == 1
    clock.step(3600)
    for tenant in tenants[:5]:
        assert await whose(face, tenant)
    assert await held.scalar(text("SELECT 2")) == 2
    await held.close()
    assert await whose(face, tenants[5])
    eventually(lambda: town.backends() <= 6)


async def test_an_hour_that_passes_at_once_ends_the_wait_of_those_whose_deadline_it_was_and_no_other(
    async_face: MakeFace, tenants: list[Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    face = async_face(1)
    clock = Clock(face.db, monkeypatch)
    held = face.session(tenants[0])
    await held.scalar(text("SELECT 1"))
    before = asyncio.create_task(whose(face, tenants[1]))
    while stats_of(face.db).waiting < 1:
        await asyncio.sleep(0)
    clock.step(3600)
    after = asyncio.create_task(whose(face, tenants[2]))
    while stats_of(face.db).waiting < 2:
        await asyncio.sleep(0)
    await held.close()
    assert await asyncio.wait_for(after, 10)
    with pytest.raises(errors.BudgetExhausted):
        await asyncio.wait_for(before, 10)


async def test_what_has_been_idle_for_too_long_is_closed_and_the_rest_is_not(
    make_face: MakeFace, town: Town, tenants: list[Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    face = make_face(4, idle_timeout=100.0)
    clock = Clock(face.db, monkeypatch)
    assert await whose(face, tenants[0])
    clock.step(60)
    assert await whose(face, tenants[1])
    clock.step(60)
    eventually(lambda: stats_of(face.db).idle == 1)
    eventually(lambda: (town.backends([tenants[0]]), town.backends([tenants[1]])) == (0, 1))
    clock.step(60)
    eventually(lambda: stats_of(face.db).held == 0)
    assert stats_of(face.db).closes == {"idle": 2}


async def test_idle_connections_close_in_time_though_nobody_asks_for_anything(
    make_face: MakeFace, town: Town, tenants: list[Tenant]
) -> None:
    """On the real clock, and with no other reason for the background thread to run."""
    face = make_face(4, idle_timeout=0.2)
    assert await whose(face, tenants[0])
    eventually(lambda: town.backends() == 0, within=5)


async def test_a_connection_that_is_too_old_closes_when_it_comes_back_and_an_idle_one_is_not_used(
    make_face: MakeFace, tenants: list[Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    face = make_face(2, max_lifetime=100.0, idle_timeout=1000.0)
    clock = Clock(face.db, monkeypatch)
    async with face.session(tenants[0]) as session:
        await session.scalar(text("SELECT 1"))
        clock.step(101)
        assert await session.scalar(text("SELECT 1")) == 1
    eventually(lambda: stats_of(face.db).held == 0)
    assert await whose(face, tenants[0])
    clock.step(101)
    assert await whose(face, tenants[0])
    assert stats_of(face.db).opens == 3
    eventually(lambda: stats_of(face.db).closes == {"lifetime": 2})
