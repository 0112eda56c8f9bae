"""Tasks run for the tenant that they were published for, however they are published; without one nothing is published."""

from __future__ import annotations

import contextvars
import copy
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from celery import chain, chord, group, shared_task, signals

import tenantdb.celery
from tenantdb.celery import EVERY_TENANT, TenantTask, all_tenants_task, publishing, setup, tenant_task
from tenantdb.celery.stamps import Stamp
from tenantdb.context import acting, bound_or_none, current_tenant, unbound
from tenantdb.database import TenantDB
from tenantdb.errors import (
    ConfigError,
    NoTenantBound,
    SecretKeyError,
    TaskRefused,
    TenantAlreadyBound,
    TenantContextClosed,
    TenantNotFound,
)
from tenantdb.registry.secrets import Keyring, generate_key
from tests.adapters.little_worker import KEY, Shop, Tasks, header_of, new_app, new_shop, new_town, what_was_seen


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TenantDB]:
    """Nothing here changes a tenant."""
    with new_town(tmp_path_factory.mktemp("town")) as db:
        yield db


@pytest.fixture
def shop(town: TenantDB) -> Iterator[Shop]:
    with new_shop(town) as made:
        yield made


@pytest.fixture
def tasks(shop: Shop) -> Tasks:
    return Tasks(shop)


def later() -> datetime:
    return datetime.now(timezone.utc) + timedelta(days=30)


Publish = Callable[[Tasks], Any]
IN_A_BLOCK: dict[str, tuple[Publish, list[str]]] = {
    "delay": (lambda t: t.see.delay(1), ["see"]),
    "apply_async": (lambda t: t.see.apply_async((1,)), ["see"]),
    "a signature": (lambda t: t.see.s(1).delay(), ["see"]),
    "an immutable signature": (lambda t: t.see.si(1).apply_async(), ["see"]),
    "by name": (lambda t: t.see.app.send_task(t.see.name), ["see"]),
    "countdown": (lambda t: t.see.apply_async(countdown=10**6), ["see"]),
    "eta": (lambda t: t.see.apply_async(eta=later()), ["see"]),
    "a chain": (lambda t: chain(t.see.s(), t.plain.s(), t.see.s(), t.see.si()).delay(), ["see", "plain", "see", "see"]),
    "a chain that begins plainly": (lambda t: (t.plain.s() | t.see.s()).delay(), ["plain", "see"]),
    "a group": (lambda t: group(t.see.s(1), t.see.s(2), t.plain.s()).delay(), ["see", "see", "plain"]),
    "a chord": (lambda t: chord([t.see.s(1), t.plain.s(2)])(t.see.s()), ["see", "plain", "see"]),
    "a chain with a group": (lambda t: chain(t.see.s(), group(t.see.s(), t.see.s()), t.see.s()).delay(), ["see"] * 4),
    "a callback": (lambda t: t.see.apply_async(link=t.see.s()), ["see", "see"]),
    "callbacks of a plain task": (lambda t: t.plain.apply_async(link=[t.see.s(), group(t.see.s())]), ["plain", "see", "see"]),
    "an errback of the old kind": (lambda t: t.fail.apply_async(link_error=t.see.s()), ["fail", "see"]),
    "an errback of the new kind": (lambda t: t.fail.apply_async(link_error=t.told.s()), ["fail", "told"]),
    "an errback of a chord": (lambda t: chord([t.fail.s()])(t.see.s().on_error(t.told.s())), ["fail", "told"]),
    "a retry": (lambda t: t.again.delay(), ["attempt 0", "attempt 1", "attempt 2"]),
    "a chain with a retry": (lambda t: (t.again.si() | t.see.s()).delay(), ["attempt 0", "attempt 1", "attempt 2", "see"]),
    "a replacement": (lambda t: (t.replaced.s() | t.see.s()).delay(), ["replaced", "see", "see"]),
    "map": (lambda t: t.see.map([1, 2]).delay(), ["see", "see"]),
    "starmap": (lambda t: t.see.starmap([(1,), (2,)]).delay(), ["see", "see"]),
    "chunks": (lambda t: t.see.chunks([(1,), (2,), (3,)], 2).apply_async(), ["see"] * 3),
}
NAMED: dict[str, tuple[Callable[[Tasks, Any], Any], list[str]]] = {
    "apply_async": (lambda t, acme: t.see.apply_async((1,), tenant=acme), ["see"]),
    "set": (lambda t, acme: t.see.s(1).set(tenant=acme).delay(), ["see"]),
    "set, and immutable": (lambda t, acme: t.see.si(1).set(tenant=acme).apply_async(countdown=5), ["see"]),
    "a retry": (lambda t, acme: t.again.apply_async(tenant=acme), ["attempt 0", "attempt 1", "attempt 2"]),
    "a whole chain": (lambda t, acme: chain(t.see.s(), t.see.s()).apply_async(tenant=acme), ["see", "see"]),
    "the first of a chain": (lambda t, acme: chain(t.see.s().set(tenant=acme), t.see.s()).delay(), ["see", "see"]),
    "each of a chain": (lambda t, acme: chain(t.see.s().set(tenant=acme), t.see.s().set(tenant=acme)).delay(), ["see", "see"]),
    "the last of a plain chain": (
        lambda t, acme: chain(t.plain.s(), t.plain.s(), t.see.s().set(tenant=acme)).delay(),
        ["plain"] * 2 + ["see"],
    ),
    "a whole group": (lambda t, acme: group(t.see.s(), t.see.s()).apply_async(tenant=acme), ["see", "see"]),
    "a chord": (lambda t, acme: chord([t.see.s(), t.see.s()], t.see.s()).apply_async(tenant=acme), ["see"] * 3),
    "a callback of a plain task": (lambda t, acme: t.plain.apply_async(link=t.see.s().set(tenant=acme)), ["plain", "see"]),
    "by name": (lambda t, acme: t.see.app.send_task(t.see.name, tenant=acme), ["see"]),
}


# -- the publisher's tenant ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", ["acme", "beta"])
@pytest.mark.parametrize("how", IN_A_BLOCK)
def test_whatever_a_block_publishes_runs_for_its_tenant(shop: Shop, tasks: Tasks, how: str, slug: str) -> None:
    publish, expected = IN_A_BLOCK[how]
    with shop.db.tenant_context(slug):
        publish(tasks)

    shop.work()

    assert sorted(what_was_seen(shop, slug)) == sorted(expected)
    assert bound_or_none() is None


@pytest.mark.parametrize("kind", ["slug", "id", "text of the id", "Tenant"])
@pytest.mark.parametrize("how", NAMED)
def test_a_tenant_is_named_where_none_is_bound(shop: Shop, tasks: Tasks, how: str, kind: str) -> None:
    publish, expected = NAMED[how]
    acme = {"slug": "acme", "id": shop.acme.id, "text of the id": str(shop.acme.id), "Tenant": shop.acme}[kind]
    publish(tasks, acme)

    shop.work()

    assert sorted(what_was_seen(shop, "acme")) == sorted(expected)


@pytest.mark.parametrize("always", [True, False], ids=["task_always_eager", "apply"])
@pytest.mark.parametrize("how", ["delay", "a signature", "a chain", "a group", "a callback", "a retry", "an errback of the new kind"])
def test_eager_tasks_see_the_publishers_tenant_too_and_leave_its_binding_as_it_was(
    shop: Shop, tasks: Tasks, how: str, always: bool
) -> None:
    publish, expected = IN_A_BLOCK[how]
    shop.app.conf.task_always_eager = True
    with shop.db.tenant_context("acme"), shop.db.tenant_context("beta", switch=True):
        publish(tasks) if always else tasks.see.apply()
        assert current_tenant().slug == "beta"

    assert sorted(label for label, _ in shop.seen) == (sorted(expected) if always else ["see"])
    assert {bound for _, bound in shop.seen} == {"beta"}  # plain tasks too, which run in the publisher's own context
    assert shop.waiting() == []
    assert bound_or_none() is None


def test_an_eager_task_takes_the_named_tenant_and_so_does_what_follows(shop: Shop, tasks: Tasks) -> None:
    shop.app.conf.task_always_eager = True

    tasks.see.apply(tenant="acme", link=tasks.see.s())
    tasks.again.apply_async(tenant=shop.acme.id)
    chain(tasks.plain.s(), tasks.see.s().set(tenant="acme")).delay()

    assert what_was_seen(shop, "acme") == ["see", "see", "attempt 0", "attempt 1", "attempt 2", "plain", "see"]


def test_a_task_called_as_a_function_runs_for_whom_its_caller_runs(shop: Shop, tasks: Tasks) -> None:
    with shop.db.tenant_context("acme"):
        assert tasks.see(1) == "seen"
    with pytest.raises(NoTenantBound):
        tasks.see(1)

    assert shop.seen == [("see", "acme")]


def test_a_body_that_calls_its_own_task_as_a_function_calls_it_for_the_tenant_that_it_has_bound(shop: Shop) -> None:
    @shop.task(base=TenantTask)
    def twice(times: int) -> None:
        shop.see(times)
        if times:
            with shop.db.tenant_context("beta", switch=True):
                twice(times - 1)

    twice.apply_async((1,), tenant="acme")
    shop.work()

    assert shop.seen == [(1, "acme"), (0, "beta")]


def test_who_wanted_it_is_who_acts_in_the_worker(shop: Shop, tasks: Tasks) -> None:
    with acting("ann", "request-7"):
        (tasks.plain.s() | tasks.again.si().set(tenant="acme") | tasks.see.s()).delay()
    shop.work()
    tasks.see.apply_async(tenant="acme")
    shop.work()

    assert shop.actors == ["system", "ann", "ann", "ann", "ann", "system"]  # a plain task runs as it always did


def test_the_message_holds_the_tenants_id_and_not_its_name(shop: Shop, tasks: Tasks) -> None:
    tasks.see.apply_async(tenant="acme")
    [message] = shop.waiting()

    assert header_of(message)["tenant"] == str(shop.acme.id)
    assert "acme" not in str(message.headers)


# -- no tenant, or another one ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "publish",
    [
        lambda t: t.see.delay(),
        lambda t: t.see.s().apply_async(countdown=5),
        lambda t: t.plain.apply_async(link=t.see.s()),
        lambda t: t.plain.apply_async(link_error=t.told.s()),
        lambda t: chain(t.plain.s(), t.plain.s(), t.see.s()).delay(),
        lambda t: chord([t.plain.s()])(t.see.s()),
        lambda t: t.see.app.send_task(t.see.name),
        lambda t: t.see.apply(),
    ],
)
def test_without_a_tenant_nothing_is_published(shop: Shop, tasks: Tasks, publish: Publish) -> None:
    with pytest.raises(NoTenantBound):
        publish(tasks)

    assert shop.waiting() == [] and shop.seen == []


def test_an_exempt_block_and_one_that_has_ended_bind_nobody(shop: Shop, tasks: Tasks) -> None:
    with shop.db.tenant_context("acme"), unbound(), pytest.raises(NoTenantBound):
        tasks.see.delay()
    with shop.db.tenant_context("acme"):
        copied = contextvars.copy_context()
    with pytest.raises(TenantContextClosed):
        copied.run(tasks.see.delay)
    assert shop.waiting() == []


@pytest.mark.parametrize(
    "publish",
    [
        lambda t, beta: t.see.apply_async(tenant=beta),
        lambda t, beta: t.plain.apply_async(tenant=beta),
        lambda t, beta: t.see.apply(tenant=beta),
        lambda t, beta: t.see.s().set(tenant=beta).delay(),
        lambda t, beta: chain(t.see.s(), t.see.s().set(tenant=beta)).delay(),
        lambda t, beta: t.see.apply_async(link=group(t.plain.s(), chain(t.plain.s(), t.see.s().set(tenant=beta)))),
        lambda t, beta: t.see.apply_async(link_error=t.told.s().set(tenant=beta)),
        lambda t, beta: chord([t.see.s()])(t.see.s().set(tenant=beta)),
        lambda t, beta: t.every.delay(),
    ],
)
def test_in_a_block_of_one_tenant_nothing_is_published_for_another(shop: Shop, tasks: Tasks, publish: Callable[[Tasks, Any], Any]) -> None:
    for beta in ("beta", shop.beta.id, shop.beta):
        with shop.db.tenant_context("acme"), pytest.raises((TenantAlreadyBound, TaskRefused)):
            publish(tasks, beta)

    assert shop.waiting() == [] and shop.seen == []


def test_to_name_the_bound_tenant_is_no_other_and_a_switch_says_that_another_is_meant(shop: Shop, tasks: Tasks) -> None:
    with shop.db.tenant_context("acme"):
        tasks.see.apply_async(tenant="acme")
        with shop.db.tenant_context("beta", switch=True):
            tasks.see.delay()
            tasks.see.apply_async(tenant=shop.beta)

    shop.work()

    assert [bound for _, bound in shop.seen] == ["acme", "beta", "beta"]


def test_the_members_of_a_group_may_be_of_different_tenants_and_those_of_a_chord_may_not(shop: Shop, tasks: Tasks) -> None:
    group(tasks.see.s().set(tenant="acme"), tasks.see.s().set(tenant="beta")).delay()
    with pytest.raises(TenantAlreadyBound):
        chord([tasks.see.s().set(tenant="acme"), tasks.see.s().set(tenant="beta")])(tasks.see.s().set(tenant="acme"))

    shop.work()

    assert [bound for _, bound in shop.seen][:2] == ["acme", "beta"]


def test_a_name_that_is_nobodys_is_refused_when_it_is_published(shop: Shop, tasks: Tasks) -> None:
    for wrong in ("nobody", "No Slug", "9" * 32):
        with pytest.raises(TenantNotFound):
            tasks.see.apply_async(tenant=wrong)

    assert shop.waiting() == []


def test_a_signature_that_was_published_can_be_used_again(shop: Shop, tasks: Tasks) -> None:
    linked = tasks.see.s().set(tenant=shop.acme)
    for _ in range(2):
        tasks.plain.apply_async(link=linked)

    shop.work()

    assert what_was_seen(shop, "acme").count("see") == 2
    assert linked.options["tenant"] is shop.acme


# -- setting up ------------------------------------------------------------------------------------------------------------------------


def test_an_application_that_was_not_set_up_publishes_nothing(tmp_path: Path) -> None:
    @new_app().task(base=TenantTask, shared=False)
    def lost() -> None: ...

    with pytest.raises(ConfigError, match=r"tenantdb\.celery\.setup"):
        lost.apply_async(tenant="acme")


@pytest.mark.parametrize(
    "conf",
    [
        {"task_serializer": "pickle"},
        {"accept_content": ["json", "pickle"]},
        {"result_accept_content": ["application/x-python-serialize"]},
        {"task_protocol": 1},
    ],
)
def test_anything_but_json_is_refused(shop: Shop, conf: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(conf)).removeprefix("result_")):
        setup(new_app(**conf), shop.db, signing_key=KEY)


def test_a_worker_whose_configuration_has_changed_since_exits(shop: Shop) -> None:
    class Worker:
        app = shop.app

    signals.worker_init.send(sender=Worker)  # the twin
    shop.app.conf.accept_content = ["json", "pickle"]

    with pytest.raises(SystemExit, match="accept_content"):
        signals.worker_init.send(sender=Worker)


def test_one_task_is_not_sent_as_anything_but_json_either(shop: Shop, tasks: Tasks) -> None:
    with pytest.raises(ConfigError, match="'pickle'"):
        tasks.see.apply_async(tenant="acme", serializer="pickle")


def test_a_second_set_up_and_one_that_comes_too_late_are_refused(shop: Shop) -> None:
    with pytest.raises(ConfigError, match="before"):
        setup(shop.app, shop.db, signing_key=KEY)
    late = new_app()
    assert late.amqp
    with pytest.raises(ConfigError, match="before the first message"):
        setup(late, shop.db, signing_key=KEY)


def test_without_any_key_the_way_out_is_named(shop: Shop) -> None:
    with pytest.raises(ConfigError, match="signing_key="):
        setup(new_app(), shop.db)
    for short in ("short", b"short", [KEY, "short"], []):
        with pytest.raises(ConfigError, match="32 bytes"):
            setup(new_app(), shop.db, signing_key=short)


def test_a_max_age_that_redelivery_exceeds_is_refused_by_both_names(shop: Shop) -> None:
    with pytest.raises(ConfigError, match=r"max_age=60 .* visibility_timeout of 60 s"):
        setup(new_app(), shop.db, signing_key=KEY, max_age=60)
    setup(new_app(), shop.db, signing_key=KEY, max_age=61)


def test_the_key_comes_from_the_secret_keys_and_a_web_process_has_it_too(tmp_path: Path) -> None:
    root = generate_key()
    derived = Keyring([root]).derive("runtime")
    dbs = {
        name: TenantDB(f"sqlite:///{tmp_path}/central.sqlite3", secret_keys=keys)
        for name, keys in {"worker": [root], "web": derived, "old web": [key for key in derived if not key.startswith("tasks:")]}.items()
    }
    stamps = {}
    for name in ("worker", "web"):
        setup(app := new_app(), dbs[name])
        stamps[name] = publishing.office_of(app).stamps

    header = stamps["web"].make(Stamp(UUID(int=1), 1), "t", "1")
    assert stamps["worker"].verify(header, "t", "1", now=1).scope == UUID(int=1)
    with pytest.raises(SecretKeyError, match="generate-key --derive runtime"):
        setup(new_app(), dbs["old web"])
    for db in dbs.values():
        db.close()


def test_the_decorators_are_shared_tasks_of_the_application_that_is_current(shop: Shop) -> None:
    @tenant_task
    def bare() -> None:
        shop.see("bare")

    @tenant_task(bind=True, max_retries=7)
    def with_options(self: Any) -> None:
        shop.see(self.max_retries)

    @shared_task(base=TenantTask)
    def shared() -> None:
        shop.see("shared")

    @all_tenants_task(jitter=0, select=lambda tenant: tenant.slug == "beta")
    def everywhere() -> None:
        shop.see("everywhere")

    for task in (bare, with_options, shared):
        task.apply_async(tenant="acme")
    everywhere.delay()
    shop.work()

    assert shop.seen == [("bare", "acme"), (7, "acme"), ("shared", "acme"), ("everywhere", "beta")]


def test_every_tenant_is_the_same_object_wherever_signatures_are_copied() -> None:
    assert copy.deepcopy(EVERY_TENANT) is EVERY_TENANT


def test_the_public_names_are_these() -> None:
    assert sorted(tenantdb.celery.__all__) == [
        "AllTenantsTask",
        "EVERY_TENANT",
        "TenantTask",
        "all_tenants_task",
        "delay_on_commit",
        "setup",
        "tenant_task",
    ]
