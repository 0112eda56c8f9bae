"""What a worker does with a message: whether it is what was published, whether its tenant is served, and what stays behind."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from celery.app.task import Context
from celery.exceptions import Ignore, Reject

from tenantdb.celery import TenantTask, publishing
from tenantdb.celery.stamps import HEADER, Stamps
from tenantdb.context import bound_or_none, unbound
from tenantdb.database import TenantDB
from tenantdb.errors import (
    NoTenantBound,
    RegistryUnavailable,
    TaskRefused,
    TenantDBError,
    TenantNotFound,
    TenantNotReady,
    TenantSuspended,
)
from tenantdb.model import Tenant
from tests.adapters.little_worker import (
    KEY,
    Message,
    Shop,
    Tasks,
    for_another,
    header_of,
    new_shop,
    new_town,
    what_was_seen,
    without_header,
)


@pytest.fixture
def town(tmp_path: Path) -> Iterator[TenantDB]:
    with new_town(tmp_path) as db:
        yield db


@pytest.fixture
def shop(town: TenantDB) -> Iterator[Shop]:
    with new_shop(town) as made:
        yield made


@pytest.fixture
def tasks(shop: Shop) -> Tasks:
    return Tasks(shop)


# -- what whoever can write to the broker may try --------------------------------------------------------------------------------------


def refused(shop: Shop, task_id: str) -> bool:
    state, result = shop.state(task_id)
    return state == "FAILURE" and isinstance(result, TaskRefused)


def audited(shop: Shop) -> int:
    shop.db._registry.audit._refusals.flush()
    return sum(entry.details["count"] for entry in shop.db.audit.search(action="refused.task-refused"))


def another_header(shop: Shop, tasks: Tasks) -> Callable[[Message], None]:
    """The header of a message of acme's, whose task has another name."""
    tasks.fail.apply_async(tenant="acme")
    [other] = shop.waiting()
    return lambda message: message.headers.update({HEADER: header_of(other)})


def another_id(message: Message) -> None:
    message.headers["id"] = str(uuid4())


FORGERIES: dict[str, Callable[[Shop, Tasks], Callable[[Message], Any]]] = {
    "another tenant": lambda shop, tasks: for_another(shop.beta),
    "no header": lambda shop, tasks: without_header,
    "the header of another task": another_header,
    "another id": lambda shop, tasks: another_id,
    "every tenant": lambda shop, tasks: lambda message: header_of(message).update(tenant="*"),
    "another actor": lambda shop, tasks: lambda message: header_of(message).update(actor="root"),
    "an unknown key": lambda shop, tasks: lambda message: header_of(message).update(key="0" * 16),
    "no dictionary": lambda shop, tasks: lambda message: message.headers.update({HEADER: "acme"}),
}


@pytest.mark.parametrize("how", FORGERIES)
def test_a_message_whose_tenant_does_not_hold_is_not_executed_and_nothing_follows(shop: Shop, tasks: Tasks, how: str) -> None:
    forge = FORGERIES[how](shop, tasks)
    tasks.see.apply_async(tenant="acme", link=tasks.see.s(), link_error=[tasks.told.s(), tasks.plain.s()], chain=[tasks.plain.s()])
    [message] = shop.waiting()
    forge(message)

    shop.execute(message)

    assert shop.seen == [] and shop.waiting() == []
    assert refused(shop, message.headers["id"])
    assert audited(shop) == 1


def test_it_is_executed_where_nobody_looks_at_the_signature(shop: Shop, tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenantdb.celery.stamps.hmac.compare_digest", lambda *_: True)
    tasks.see.apply_async(tenant="acme")

    shop.work(for_another(shop.beta))

    assert shop.seen == [("see", "beta")]


def test_a_message_of_a_process_with_another_key_is_refused(shop: Shop, tasks: Tasks) -> None:
    tasks.see.apply_async(tenant="acme")
    publishing.office_of(shop.app).stamps = Stamps([b"another key of this application 32"], max_age=100)

    shop.work()

    assert shop.seen == []
    assert audited(shop) == 1


def test_keys_are_changed_while_messages_wait(shop: Shop, tasks: Tasks) -> None:
    tasks.see.apply_async(tenant="acme")
    publishing.office_of(shop.app).stamps = Stamps([b"the key of tomorrow is 32 bytes.", KEY.encode()], max_age=100)

    shop.work()

    assert shop.seen == [("see", "acme")]


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_800_000_000.0
        clock = SimpleNamespace(time=lambda: self.now)
        monkeypatch.setattr(publishing, "time", clock)
        monkeypatch.setattr("tenantdb.celery.tasks.time", SimpleNamespace(time=clock.time, sleep=lambda seconds: None))


@pytest.mark.parametrize(("eta", "age", "runs"), [(0, 99, True), (0, 101, False), (10**6, 10**6 + 99, True), (10**6, 10**6 + 101, False)])
def test_a_message_grows_old_from_its_eta_on(town: TenantDB, monkeypatch: pytest.MonkeyPatch, eta: int, age: int, runs: bool) -> None:
    clock = Clock(monkeypatch)
    with new_shop(town, max_age=100) as shop:
        tasks = Tasks(shop)
        tasks.see.apply_async(tenant="acme", eta=datetime.fromtimestamp(clock.now + eta, timezone.utc) if eta else None)
        [message] = shop.waiting()
        clock.now += age

        shop.execute(message)

        assert [bound for _, bound in shop.seen] == (["acme"] if runs else [])
        assert refused(shop, message.headers["id"]) is not runs


def test_the_same_message_may_be_delivered_again(shop: Shop, tasks: Tasks) -> None:
    """By a broker that has waited for visibility_timeout, or whose worker died: Celery delivers at least once."""
    tasks.see.apply_async(tenant="acme")
    [message] = shop.waiting()

    shop.execute(message)
    shop.execute(message)

    assert shop.seen == [("see", "acme")] * 2


def test_a_retry_keeps_its_id_and_gets_a_fresh_age(town: TenantDB, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with new_shop(town, max_age=100) as shop:
        tasks = Tasks(shop)
        result = tasks.again.apply_async(tenant="acme")
        for message in shop.messages():
            assert message.headers["id"] == result.id
            clock.now += 90
            shop.execute(message)

        assert what_was_seen(shop, "acme") == ["attempt 0", "attempt 1", "attempt 2"]
        assert result.get() == "at last"


def follow_with(shop: Shop, task: str, **options: Any) -> dict[str, Any]:
    """A signature as somebody would write it into a message."""
    return {"task": task, "args": [], "kwargs": {}, "options": options, "subtask_type": None, "immutable": True}


def write(message: Message, body: tuple[Any, dict[str, Any], dict[str, Any]]) -> None:
    message._decoded_cache = None
    message.body = json.dumps(body)


LAUNDRIES: dict[str, Callable[[Shop, Tasks], tuple[str, list[Any], dict[str, Any]]]] = {
    "a callback": lambda shop, tasks: (tasks.plain.name, [], {"callbacks": [follow_with(shop, tasks.see.name, tenant="beta")]}),
    "a chain": lambda shop, tasks: (tasks.plain.name, [], {"chain": [follow_with(shop, tasks.see.name, tenant=str(shop.beta.id))]}),
    "that says it is eager": lambda shop, tasks: (
        tasks.plain.name,
        [],
        {"chain": [follow_with(shop, tasks.see.name, tenant="beta")], "is_eager": True, "called_directly": True},
    ),
    "a group of Celery's": lambda shop, tasks: (
        "celery.group",
        [[follow_with(shop, tasks.see.name, tenant="beta")], [[str(uuid4()), None], []], str(uuid4()), []],
        {},
    ),
    "map": lambda shop, tasks: ("celery.map", [follow_with(shop, tasks.see.name, tenant="beta"), [1]], {}),
    "map over every tenant": lambda shop, tasks: ("celery.map", [follow_with(shop, tasks.every.name), [1]], {}),
    "every tenant": lambda shop, tasks: (tasks.plain.name, [], {"callbacks": [follow_with(shop, tasks.every.name)]}),
}


@pytest.mark.parametrize("how", LAUNDRIES)
def test_no_message_has_a_worker_vouch_for_what_is_written_in_it(shop: Shop, tasks: Tasks, how: str) -> None:
    """Plain tasks need no stamp, so anybody can send one; what follows them needs one, which the worker that publishes it would make."""
    name, args, embedded = LAUNDRIES[how](shop, tasks)
    tasks.plain.delay()
    [message] = shop.waiting()
    message.headers["task"] = name
    write(message, (args, {}, embedded))

    with contextlib.suppress(TenantDBError):  # Celery does not expect that a follower cannot be published
        shop.execute(message)
    shop.work()

    assert [label for label, _ in shop.seen if label != "plain"] == []


@pytest.mark.parametrize("how", ["a callback", "a chain", "that says it is eager", "a group of Celery's", "every tenant"])
def test_it_would_if_a_name_were_believed_in_a_worker(shop: Shop, tasks: Tasks, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(publishing, "_in_worker", lambda: False)
    name, args, embedded = LAUNDRIES[how](shop, tasks)
    tasks.plain.delay()
    [message] = shop.waiting()
    message.headers["task"] = name
    write(message, (args, {}, embedded))

    shop.execute(message)
    shop.work()

    assert ("every" if how == "every tenant" else "see", "beta") in shop.seen


def test_what_follows_a_tenants_task_cannot_be_turned_to_another_tenant(shop: Shop, tasks: Tasks) -> None:
    tasks.see.apply_async(tenant="acme")
    [message] = shop.waiting()
    write(message, ([], {}, {"callbacks": [follow_with(shop, tasks.see.name, tenant="beta"), follow_with(shop, tasks.every.name)]}))

    with contextlib.suppress(TenantDBError):
        shop.execute(message)
    shop.work()

    assert {bound for _, bound in shop.seen} == {"acme"}


def test_a_plain_task_of_a_worker_publishes_for_tenants_that_it_looked_up(shop: Shop, tasks: Tasks) -> None:
    failed: list[type] = []

    @shop.task()
    def dispatch() -> None:
        for tenant in shop.db.tenants.list("active"):
            tasks.see.apply_async(tenant=tenant)
        with shop.db.tenant_context("acme"):
            tasks.see.delay()
        try:
            tasks.see.apply_async(tenant="acme")
        except TaskRefused as error:
            failed.append(type(error))

    dispatch.delay()
    shop.work()

    assert [bound for _, bound in shop.seen] == ["acme", "beta", "acme"]
    assert failed == [TaskRefused]


def test_a_message_that_a_workers_main_process_sends_again_keeps_its_tenant(shop: Shop, tasks: Tasks) -> None:
    """When a child has died: outside any task, with the headers that the message had."""
    tasks.see.apply_async(tenant="acme")
    [message] = shop.waiting()
    lost = Context(dict(message.headers), args=[], kwargs={}, delivery_info={"exchange": "", "routing_key": "celery"})

    tasks.see.signature_from_request(lost, countdown=1, retries=1).apply_async()
    shop.work()

    assert shop.seen == [("see", "acme")]


def test_headers_that_somebody_hands_to_apply_async_are_no_tenant(shop: Shop, tasks: Tasks) -> None:
    tasks.see.apply_async(tenant="acme")
    [message] = shop.waiting()

    with pytest.raises(NoTenantBound):
        tasks.see.apply_async(headers={HEADER: header_of(message)})
    tasks.plain.apply_async(headers={HEADER: header_of(message), "mine": 1})
    [plain] = shop.waiting()

    assert HEADER not in plain.headers
    assert plain.headers["mine"] == 1


# -- the tenant when the task runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (lambda db: db.suspend("acme"), TenantSuspended),
        (lambda db: db.delete("acme"), TenantNotFound),
        (lambda db: (db.delete("acme"), db.purge("acme", confirm="acme", immediately=True)), TenantNotFound),
    ],
    ids=["suspended", "deleted", "purged"],
)
def test_a_tenant_that_is_not_served_any_more_gets_no_task_and_nothing_tries_again(
    shop: Shop, tasks: Tasks, end: Callable[[TenantDB], Any], error: type[Exception]
) -> None:
    result = tasks.see.apply_async(tenant="acme", link=tasks.see.s())
    retry = tasks.again.apply_async(tenant="acme")
    [first, second] = shop.waiting()
    shop.execute(second)  # an attempt, and a retry that waits
    end(shop.db)

    shop.execute(first)
    shop.work()

    assert shop.seen == [("attempt 0", "acme")]
    for task_id in (result.id, retry.id):
        state, found = shop.state(task_id)
        assert (state, type(found)) == ("FAILURE", error)
    assert shop.waiting() == []


def test_it_would_run_where_nobody_looks_the_tenant_up(shop: Shop, tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks.see.apply_async(tenant="acme")
    shop.db.suspend("acme")
    monkeypatch.setattr(shop.db, "resolve", lambda key: shop.acme)

    shop.work()

    assert shop.seen == [("see", "acme")]


def unreachable(key: object) -> Tenant:
    raise RegistryUnavailable("nothing listens there")


@pytest.mark.parametrize("why", ["maintenance", "registry"])
def test_a_tenant_that_is_not_ready_puts_its_tasks_off_beside_their_own_retries(
    shop: Shop, tasks: Tasks, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    result = tasks.again.apply_async(tenant="acme", link=tasks.see.si())
    if why == "maintenance":
        shop.db.maintenance("acme")
    else:
        monkeypatch.setattr(shop.db, "resolve", unreachable)
    waits = []
    for message in shop.messages():
        waits.append((header_of(message)["waits"], message.headers["retries"], message.headers["eta"] is not None))
        shop.execute(message)
        if len(waits) == 3:
            assert shop.state(result.id)[0] == "RETRY"
            shop.db.activate("acme") if why == "maintenance" else monkeypatch.undo()

    assert waits[:4] == [(0, 0, False), (1, 0, True), (2, 0, True), (3, 0, True)]
    assert what_was_seen(shop, "acme") == ["attempt 0", "attempt 1", "attempt 2", "see"]
    assert result.get() == "at last"


def test_it_is_put_off_so_often_and_no_more_and_longer_each_time(shop: Shop, tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenantdb.celery.tasks.random.uniform", lambda low, high: high)
    result = tasks.see.apply_async(tenant="acme")
    shop.db.maintenance("acme")
    delays = []
    for message in shop.messages():
        if message.headers["eta"]:
            eta = datetime.fromisoformat(message.headers["eta"])
            delays.append(round((eta - datetime.now(timezone.utc)).total_seconds() / 5) * 5)
        shop.execute(message)

    assert delays == [5, 10, 20, 40, 80, 160, 300, 300, 300, 300]
    assert shop.seen == []
    state, found = shop.state(result.id)
    assert (state, type(found)) == ("FAILURE", TenantNotReady)


def test_an_eager_task_does_not_wait_for_its_tenant(shop: Shop, tasks: Tasks) -> None:
    shop.db.maintenance("acme")

    with pytest.raises(TenantNotReady):
        tasks.see.apply(tenant=shop.acme.id).get()
    assert shop.waiting() == []


# -- what a task leaves behind ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [ValueError("no"), Ignore(), Reject("no", requeue=False), KeyboardInterrupt()])
def test_however_a_body_ends_nothing_stays_bound(shop: Shop, ending: BaseException) -> None:
    @shop.task(base=TenantTask)
    def end() -> None:
        shop.db.tenant_context("beta", switch=True).__enter__()  # and never left
        shop.see()
        raise ending

    end.apply_async(tenant="acme")
    try:
        shop.work()
    except KeyboardInterrupt:
        shop.work()

    assert shop.seen == [(None, "beta")]
    assert bound_or_none() is None


def test_what_a_plain_task_forgot_to_let_go_is_not_there_for_the_next(shop: Shop, tasks: Tasks, caplog: pytest.LogCaptureFixture) -> None:
    @shop.task()
    def forgetful() -> None:
        shop.db.tenant_context("beta").__enter__()

    forgetful.delay()
    tasks.plain.delay()
    shop.work()

    assert shop.seen == [("plain", None)]
    assert "left tenant beta bound" in caplog.text


def test_what_an_eager_task_forgot_to_let_go_is_not_there_for_its_caller(shop: Shop) -> None:
    @shop.task()
    def forgetful() -> None:
        shop.db.tenant_context("beta", switch=True).__enter__()

    with shop.db.tenant_context("acme"):
        forgetful.apply()
        assert bound_or_none() == shop.db.tenants.get("acme")
    forgetful.apply()
    assert bound_or_none() is None


def test_it_would_be_there_if_nobody_looked(shop: Shop, tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenantdb.celery.setting_up.installed", set())

    @shop.task()
    def forgetful() -> None:
        shop.db.tenant_context("beta").__enter__()

    forgetful.delay()
    tasks.plain.delay()
    with unbound():
        shop.work()

    assert shop.seen == [("plain", "beta")]


def test_eager_tasks_within_a_body_leave_its_tenant_bound(shop: Shop, tasks: Tasks) -> None:
    @shop.task(base=TenantTask)
    def outer() -> None:
        shop.see("before")
        with shop.db.tenant_context("beta", switch=True):
            tasks.see.apply()
        with pytest.raises(ValueError, match="as it should"):
            tasks.fail.apply(throw=True)
        shop.see("after")

    outer.apply_async(tenant="acme")
    shop.work()

    assert shop.seen == [("before", "acme"), ("see", "beta"), ("fail", "acme"), ("after", "acme")]


def test_two_threads_at_one_task_object_see_a_tenant_each(shop: Shop) -> None:
    both = threading.Barrier(2, timeout=60)

    @shop.task(base=TenantTask)
    def meet() -> None:
        shop.see("before")
        both.wait()
        shop.see("after")
        both.wait()

    meet.apply_async(tenant="acme")
    meet.apply_async(tenant="beta")
    messages, held = shop.waiting(), dict(vars(meet))
    threads = [threading.Thread(target=shop.execute, args=[message]) for message in messages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(shop.seen) == [("after", "acme"), ("after", "beta"), ("before", "acme"), ("before", "beta")]
    assert {key: value for key, value in vars(meet).items() if key != "__trace__"} == {k: v for k, v in held.items() if k != "__trace__"}
