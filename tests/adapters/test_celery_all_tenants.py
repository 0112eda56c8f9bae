"""Tasks for every tenant, and schedules."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from celery.beat import Scheduler, SchedulingError

from tenantdb.celery import EVERY_TENANT, AllTenantsTask, TenantTask
from tenantdb.connections.ledger import Work
from tenantdb.connections.pools import WORK
from tenantdb.context import acting, bound_or_none, current_actor, current_tenant, unbound
from tenantdb.database import TenantDB
from tenantdb.errors import NoTenantBound, RegistryUnavailable, SomeTenantsFailed, TaskRefused, TenantNotFound
from tenantdb.model import Tenant
from tests.adapters.little_worker import Shop, Tasks, header_of, new_shop, new_town


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TenantDB]:
    """Six tenants, of which five are active. Nothing here changes them."""
    with new_town(tmp_path_factory.mktemp("town")) as db:
        for slug in ("cato", "dion", "eris", "silent"):
            db.provision(slug, plan="pro" if slug in ("cato", "dion") else None)
        db.suspend("silent")
        yield db


@pytest.fixture
def shop(town: TenantDB) -> Iterator[Shop]:
    with new_shop(town) as made:
        yield made


ACTIVE = ["acme", "beta", "cato", "dion", "eris"]


def seen_by(shop: Shop) -> list[str | None]:
    return sorted(bound or "none" for _, bound in shop.seen)  # type: ignore[arg-type]


def test_the_body_runs_once_for_every_active_tenant_with_it_bound(shop: Shop) -> None:
    @shop.task(base=AllTenantsTask, jitter=0)
    def every(greeting: str) -> None:
        with shop.db.session() as session:
            shop.see(session.connection().engine.url.database is not None and greeting)

    with acting("ann"):
        result = every.delay("hello")
    shop.work()

    assert seen_by(shop) == ACTIVE
    assert {label for label, _ in shop.seen} == {"hello"}
    assert set(shop.actors) == {"ann"}
    assert result.get() == {"succeeded": 5}
    assert bound_or_none() is None


def test_one_tenant_that_fails_does_not_stop_the_others_and_is_named(shop: Shop) -> None:
    @shop.task(base=AllTenantsTask, jitter=0)
    def every() -> None:
        shop.see()
        if current_tenant().slug in ("beta", "dion"):
            raise ValueError(f"no {current_tenant().slug} today")

    result = every.delay()
    shop.work()

    assert seen_by(shop) == ACTIVE
    assert result.state == "FAILURE"
    error = result.result
    assert isinstance(error, SomeTenantsFailed)
    assert (error.succeeded, error.failures) == (3, {"beta": "ValueError: no beta today", "dion": "ValueError: no dion today"})
    assert json.dumps(error.args)


def test_it_chooses_among_the_tenants_with_a_function(shop: Shop) -> None:
    @shop.task(base=AllTenantsTask, jitter=0, select=lambda tenant: tenant.plan == "pro")
    def every() -> None:
        shop.see()

    result = every.delay()
    shop.work()

    assert seen_by(shop) == ["cato", "dion"]
    assert result.get() == {"succeeded": 2}


def test_so_many_run_at_once_and_no_more_on_connections_of_the_background_class(shop: Shop) -> None:
    lock, running, most, classes = threading.Lock(), 0, 0, set()
    two = threading.Semaphore(0)

    @shop.task(base=AllTenantsTask, jitter=0, concurrency=2)
    def every() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            classes.add(WORK.get())
            if running == 2:
                two.release()
        first = most < 2
        assert not first or two.acquire(timeout=60)  # until there are two
        shop.see()
        with lock:
            running -= 1

    every.delay()
    shop.work()

    assert seen_by(shop) == ACTIVE
    assert most == 2
    assert classes == {Work.BACKGROUND}


def test_each_waits_a_little_of_its_own(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("tenantdb.celery.tasks.time.sleep", slept.append)
    monkeypatch.setattr("tenantdb.celery.tasks.random.uniform", lambda low, high: high)

    @shop.task(base=AllTenantsTask, jitter=3.5)
    def every() -> None: ...

    every.delay()
    shop.work()

    assert slept == [3.5] * 5


def test_what_one_run_does_to_its_arguments_the_others_do_not_see(shop: Shop) -> None:
    @shop.task(base=AllTenantsTask, jitter=0, concurrency=1)
    def every(names: list[str], *, more: dict[str, str]) -> None:
        shop.see((len(names), len(more)))
        names.append(current_tenant().slug)
        more["slug"] = current_tenant().slug

    every.delay([], more={})
    shop.work()

    assert {label for label, _ in shop.seen} == {(0, 0)}


def test_a_body_may_publish_a_task_for_each_tenant(shop: Shop) -> None:
    tasks = Tasks(shop)

    @shop.task(base=AllTenantsTask, jitter=0)
    def every() -> None:
        tasks.see.delay()

    every.delay()
    shop.work()

    assert seen_by(shop) == ACTIVE
    assert {label for label, _ in shop.seen} == {"see"}


def test_it_tries_nothing_again_for_all_because_one_has_failed(shop: Shop) -> None:
    @shop.task(base=AllTenantsTask, jitter=0, bind=True, autoretry_for=(ValueError,))
    def every(self: Any) -> None:
        shop.see()
        if current_tenant().slug == "acme":
            raise ValueError("no")
        if current_tenant().slug == "beta":
            raise self.retry(exc=KeyError("as it should"))

    result = every.delay()
    shop.work()

    assert len(shop.seen) == 5
    assert result.result.failures == {"acme": "ValueError: no", "beta": "KeyError: 'as it should'"}


def test_where_the_tenants_cannot_be_listed_it_fails(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> list[Tenant]:
        raise RegistryUnavailable("nothing listens there")

    result = Tasks(shop).every.delay()
    monkeypatch.setattr(shop.db._registry.tenants, "list", unreachable)
    shop.work()

    assert isinstance(result.result, RegistryUnavailable)


def test_it_is_meant_where_a_tenant_is_bound_only_if_that_is_said(shop: Shop) -> None:
    every = Tasks(shop).every
    with shop.db.tenant_context("acme"):
        with pytest.raises(TaskRefused, match="EVERY_TENANT"):
            every.delay()
        with pytest.raises(TaskRefused, match="EVERY_TENANT"):
            every.apply_async(tenant="acme")
        with pytest.raises(TaskRefused, match="EVERY_TENANT"):
            every()
        with unbound():
            every.delay()
        every.apply_async(tenant=EVERY_TENANT)
    shop.work()

    assert seen_by(shop) == sorted(ACTIVE * 2)


def test_called_as_a_function_or_eager_it_does_the_same(shop: Shop) -> None:
    every = Tasks(shop).every

    assert every() == {"succeeded": 5}
    assert every.apply().get() == {"succeeded": 5}
    shop.app.conf.task_always_eager = True
    assert every.delay().get() == {"succeeded": 5}


def test_neither_kind_takes_the_message_of_the_other(shop: Shop) -> None:
    tasks = Tasks(shop)
    with pytest.raises(TaskRefused, match="one tenant"):
        (tasks.every.s() | tasks.see.s()).delay()
    with pytest.raises(TaskRefused, match="one tenant"):
        tasks.see.apply_async(tenant=EVERY_TENANT, link=tasks.every.s())
    one, every = tasks.see.apply_async(tenant="acme"), tasks.every.delay()
    messages = shop.waiting()
    for message in messages:
        # As if whoever holds the key had signed it so: the name is the task's own, the scope is not.
        office = shop.app._tenantdb_office
        scope = EVERY_TENANT if message.headers["id"] == one.id else shop.acme.id
        message.headers["tenantdb"] = office.stamp(scope, message.headers["task"], message.headers["id"])
        shop.execute(message)

    assert shop.seen == []
    assert {type(shop.state(result.id)[1]) for result in (one, every)} == {TaskRefused}


def test_a_plain_task_of_a_worker_says_that_it_means_every_tenant(shop: Shop) -> None:
    tasks = Tasks(shop)

    @shop.task()
    def careless() -> None:
        tasks.every.delay()

    @shop.task()
    def careful() -> None:
        tasks.every.apply_async(tenant=EVERY_TENANT, link=tasks.plain.s())

    refused = careless.delay()
    careful.delay()
    shop.work()

    assert isinstance(refused.result, TaskRefused)
    assert [bound for label, bound in shop.seen if label == "plain"] == [None]
    assert len(shop.seen) == 6


# -- schedules -------------------------------------------------------------------------------------------------------------------------


def tick(shop: Shop, schedule: dict[str, Any]) -> list[Exception]:
    """What a beat process does when everything is due; returns what could not be published."""
    shop.app.conf.beat_schedule = schedule
    scheduler = Scheduler(app=shop.app)
    errors: list[Exception] = []
    for entry in [entry for entry in scheduler.schedule.values() if not entry.name.startswith("celery.")]:
        try:
            scheduler.apply_async(entry, advance=False)
        except SchedulingError as error:
            errors.append(error)
    return errors


def test_a_schedule_names_its_tenant_and_one_that_names_none_raises(shop: Shop) -> None:
    see = Tasks(shop).see
    hourly = {"task": see.name, "schedule": timedelta(hours=1)}

    errors = tick(
        shop,
        {
            "lost": hourly,
            "acme": {**hourly, "options": {"tenant": "acme"}},
            "beta": {**hourly, "options": {"tenant": str(shop.beta.id)}},
            "gone": {**hourly, "options": {"tenant": "gone"}},
        },
    )
    shop.work()

    assert seen_by(shop) == ["acme", "beta"]
    assert {type(error.__cause__ or error.__context__) for error in errors} == {NoTenantBound, TenantNotFound}
    assert any("lost: no tenant is bound" in str(error) for error in errors)


def test_a_schedule_for_every_tenant_names_none(shop: Shop) -> None:
    every = Tasks(shop).every

    assert tick(shop, {"all": {"task": every.name, "schedule": timedelta(hours=1)}}) == []
    shop.work()

    assert seen_by(shop) == ACTIVE


def test_a_schedule_is_made_for_each_tenant_that_there_is(shop: Shop) -> None:
    see = Tasks(shop).see
    entries = {
        f"see-{tenant.slug}": {"task": see.name, "schedule": timedelta(hours=1), "options": {"tenant": str(tenant.id)}}
        for tenant in shop.db.tenants.list("active")
    }

    assert tick(shop, entries) == []
    shop.work()

    assert seen_by(shop) == ACTIVE


def test_a_beat_process_that_does_not_know_the_task_sends_it_for_the_tenant_all_the_same(shop: Shop) -> None:
    schedule = {"away": {"task": "elsewhere.task", "schedule": timedelta(hours=1), "options": {"tenant": "acme"}}}

    assert tick(shop, schedule) == []
    [message] = shop.waiting()

    assert header_of(message)["tenant"] == str(shop.acme.id)
    assert "tenant" not in message.properties


def test_the_bases_can_be_derived_from(shop: Shop) -> None:
    class Sometimes(AllTenantsTask):
        jitter = 0

        @staticmethod
        def select(tenant: Tenant) -> bool:
            return tenant.slug == "eris"

    class Named(TenantTask):
        tenant_waits = 3

    @shop.task(base=Sometimes)
    def sometimes() -> None:
        shop.see(current_actor().actor)

    @shop.task(base=Named, bind=True)
    def named(self: Any) -> None:
        shop.see(self.tenant_waits)

    sometimes.delay()
    named.apply_async(tenant="acme")
    shop.work()

    assert shop.seen == [("system", "eris"), (3, "acme")]
