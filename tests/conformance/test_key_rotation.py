"""On real servers, under load: the registry's secrets move to another key and no request notices."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import text

from tenantdb import AsyncTenantDB, Budget, TenantDB, errors
from tenantdb.registry import rotation
from tenantdb.registry.rotation import KeyRotation
from tenantdb.registry.secrets import generate_key
from tests.conformance.conftest import Estate
from tests.kms import LocalKms
from tests.unit.test_rotation import interrupted_at
from tests.world import eventually

pytestmark = pytest.mark.parametrize("world", ["postgresql"], indirect=True, scope="session")

SLUGS = ("acme", "beta", "gamma")
CONNECT_ALWAYS = Budget(connections=40, processes=4, max_lifetime=0)  # each session opens its secret
MakeTwin = Callable[..., TenantDB]


@pytest.fixture(scope="module")
def town(world: Any) -> Estate:
    """Three tenants under a registry of their own, which the tests below hand on with whatever key is its newest."""
    estate = Estate(world)
    for slug in SLUGS:
        estate.tenant(slug)
    return estate


@pytest.fixture
def keys(town: Estate) -> Iterator[list[str]]:
    """A new key, and the one that is in use; the new one is in use afterwards."""
    old = getattr(town, "key", None) or town.db.settings.secret_keys[0].get_secret_value()
    new = generate_key()
    yield [new, old]
    with town.world.twin(town.db, secret_keys=[new, old, "kms"], kms=getattr(town, "kms", LocalKms())) as db:
        assert db.rotate_keys().ok
    town.key = new  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "BATCH", 1)


@pytest.fixture
def twin(town: Estate) -> Iterator[MakeTwin]:
    made: list[TenantDB] = []

    def make(*secret_keys: str, **overrides: Any) -> TenantDB:
        made.append(town.world.twin(town.db, secret_keys=list(secret_keys), **overrides))
        return made[-1]

    yield make
    for db in made:
        db.close()


def serves(db: TenantDB) -> bool:
    for slug in SLUGS:
        with db.session(slug) as session:
            assert session.scalar(text("SELECT current_user")) == db.tenants.get(slug).runtime_role
    return True


def test_no_request_fails_while_the_keys_are_rotated_and_the_old_key_is_retired(town: Estate, twin: MakeTwin, keys: list[str]) -> None:
    stop = threading.Event()
    served = [0] * 5

    def in_a_thread(number: int) -> None:
        db = twin(*keys, budget=CONNECT_ALWAYS, cache_ttl=0.01)
        while not stop.is_set():
            assert serves(db)
            served[number] += 1

    async def in_a_loop() -> None:
        adb = AsyncTenantDB(twin(*keys, budget=CONNECT_ALWAYS, cache_ttl=0.01))
        while not stop.is_set():
            for slug in SLUGS:
                async with adb.session(slug) as session:
                    assert await session.scalar(text("SELECT 1")) == 1
            served[4] += 1
        await adb.close()

    before = {slug: town.db.tenants.get(slug) for slug in SLUGS}
    with ThreadPoolExecutor(5) as pool:
        load = [pool.submit(in_a_thread, number) for number in range(4)] + [pool.submit(asyncio.run, in_a_loop())]
        try:
            eventually(lambda: all(served) or any(each.done() for each in load))
            report = twin(*keys).rotate_keys()
            at_the_end = list(served)
            eventually(lambda: all(now > then for now, then in zip(served, at_the_end, strict=True)) or any(each.done() for each in load))
        finally:
            stop.set()
        for each in load:
            each.result(60)

    assert report.ok and report.resealed == 2 * len(SLUGS) + 2
    new, old = keys
    assert serves(twin(new))
    with pytest.raises(errors.SecretKeyError):
        twin(old).ping()
    with twin(new) as db:
        after = {slug: db.tenants.get(slug) for slug in SLUGS}
        assert {slug: (after[slug].version - before[slug].version, after[slug].generation) for slug in SLUGS} == {
            slug: (1, before[slug].generation) for slug in SLUGS
        }
        assert [use for use in db.keys_in_use() if use.needs_rotation] == []


def test_connections_that_are_open_stay_open(twin: MakeTwin, keys: list[str]) -> None:
    db = twin(*keys)
    serves(db)
    opens = sum(each.opens for each in db.stats())

    db.rotate_keys()
    serves(db)

    assert sum(each.opens for each in db.stats()) == opens


def test_a_rotation_that_dies_anywhere_is_completed_by_the_next(twin: MakeTwin, keys: list[str]) -> None:
    at, complete = 1, False
    while not complete:
        dying = twin(*keys)
        dying.ping()
        try:
            with interrupted_at(dying._registry, statements=at):
                assert dying.rotate_keys().ok
                complete = True
        except pytest.fail.Exception:
            assert complete
        assert serves(twin(*keys))
        at += 4
    assert at > 12
    assert serves(twin(keys[0]))


def test_who_holds_a_row_is_waited_for_last(town: Estate, twin: MakeTwin, keys: list[str]) -> None:
    db = twin(*keys)
    first = min((db.tenants.get(slug) for slug in SLUGS), key=lambda tenant: tenant.id.hex)

    def moved() -> int:
        return sum(use.secrets for use in db.keys_in_use() if use.newest and use.purpose != "audit")

    with ThreadPoolExecutor(1) as pool:
        with town.world.registry(db) as elsewhere:
            elsewhere.execute(text("SELECT 1 FROM tenantdb_tenants WHERE id = :id FOR UPDATE"), {"id": first.id})
            running = pool.submit(db.rotate_keys)
            eventually(lambda: moved() == 2 * (len(SLUGS) - 1) + 1)
            assert not running.done()
        assert running.result(30).ok
    assert serves(twin(keys[0]))


def test_two_rotations_at_once_share_the_work(twin: MakeTwin, keys: list[str]) -> None:
    barrier = threading.Barrier(2)

    def rotate() -> KeyRotation:
        db = twin(*keys)
        db.ping()
        barrier.wait(10)
        return db.rotate_keys()

    with ThreadPoolExecutor(2) as pool:
        reports = [each.result(60) for each in [pool.submit(rotate) for _ in range(2)]]

    assert all(report.ok for report in reports)
    assert sum(report.resealed for report in reports) == 2 * len(SLUGS) + 2
    assert serves(twin(keys[0]))


def test_the_check_of_the_keys_is_sealed_anew_though_somebody_holds_its_row(town: Estate, twin: MakeTwin, keys: list[str]) -> None:
    db = twin(*keys)
    with ThreadPoolExecutor(1) as pool:
        with town.world.registry(db) as elsewhere:
            elsewhere.execute(text("SELECT 1 FROM tenantdb_meta FOR UPDATE"))
            running = pool.submit(db.rotate_keys)
            eventually(lambda: sum(use.secrets for use in db.keys_in_use() if use.needs_rotation) == 1)
        assert running.result(30).ok
    assert serves(twin(keys[0]))


def test_secrets_under_a_key_service_serve_without_asking_it_each_time_nor_from_an_event_loop(
    town: Estate, twin: MakeTwin, keys: list[str]
) -> None:
    town.kms = kms = LocalKms()  # type: ignore[attr-defined]
    assert twin(keys[1], kms=kms).rotate_keys().ok

    async def main() -> None:
        adb = AsyncTenantDB(twin(kms=kms, budget=CONNECT_ALWAYS, cache_ttl=0.01))
        kms.threads.clear()
        for _ in range(5):
            for slug in SLUGS:
                async with adb.session(slug) as session:
                    assert await session.scalar(text("SELECT 1")) == 1
        assert kms.threads and threading.get_ident() not in kms.threads
        asked = kms.calls("unwrap")
        kms.down = True
        async with adb.session("acme") as session:
            assert await session.scalar(text("SELECT 1")) == 1
        assert kms.calls("unwrap") == asked
        await adb.close()

    asyncio.run(main())
    with pytest.raises(errors.KeyServiceUnavailable):
        twin(kms=kms).ping()
    kms.down = False
    assert serves(twin(kms=kms))
