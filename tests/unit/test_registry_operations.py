"""The journal gives an operation to one worker at a time, and lets nobody write who has lost it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy import Connection, update

from tenantdb.errors import OperationInProgress
from tenantdb.model import Template, TemplateState, Tenant
from tenantdb.registry import Operation, OperationState, Registry, SignUp, tables

MINUTE = timedelta(minutes=1)
ENDED = timedelta(0)  # a lease that is over as soon as it is given


def operation_of(registry: Registry, tenant: Tenant) -> Operation:
    found = registry.operations.for_tenant(tenant.id)
    assert found is not None
    return found


def claimed(registry: Registry, tenant: Tenant, worker: str = "w1", lease: timedelta = MINUTE) -> Operation:
    operation = registry.operations.claim(operation_of(registry, tenant).id, worker, lease)
    assert operation is not None
    return operation


def test_a_sign_up_leaves_a_pending_operation(registry: Registry, acme: Tenant) -> None:
    operation = operation_of(registry, acme)
    assert (operation.kind, operation.state, operation.attempt, operation.step, operation.started) == (
        "provision",
        OperationState.PENDING,
        0,
        None,
        False,
    )
    assert registry.operations.get(operation.id) == operation
    assert registry.operations.get(uuid4()) is None
    assert registry.operations.for_tenant(uuid4()) is None


def test_a_claimed_operation_is_nobody_elses_until_its_lease_ends(registry: Registry, acme: Tenant) -> None:
    first = claimed(registry, acme)
    assert (first.state, first.worker, first.attempt) == (OperationState.RUNNING, "w1", 1)
    assert registry.operations.claim(first.id, "w2", MINUTE) is None
    assert registry.operations.claim_next("w2", MINUTE) is None
    registry.operations.renew(first, ENDED)
    taken = registry.operations.claim_next("w2", MINUTE)
    assert taken is not None
    assert (taken.id, taken.worker, taken.attempt) == (first.id, "w2", 2)


def test_the_step_survives_the_worker(registry: Registry, acme: Tenant) -> None:
    operation = claimed(registry, acme)
    operation = registry.operations.record(operation, "database")
    registry.operations.renew(operation, ENDED)
    taken = claimed(registry, acme, "w2")
    assert (taken.step, taken.started) == ("database", True)


@pytest.mark.parametrize("lost", ["expired", "taken", "ended", "same name"])
def test_a_worker_that_lost_its_lease_writes_nothing_more(registry: Registry, acme: Tenant, lost: str) -> None:
    operation = claimed(registry, acme)
    if lost == "ended":
        registry.operations.finish(operation)
    else:
        registry.operations.renew(operation, ENDED)
    if lost == "taken":
        claimed(registry, acme, "w2")
    if lost == "same name":  # a restarted worker with the name of the one that hangs
        claimed(registry, acme, "w1")
    before = operation_of(registry, acme)
    for write in (
        lambda: registry.operations.record(operation, "open"),
        lambda: registry.operations.renew(operation, MINUTE),
        lambda: registry.operations.finish(operation),
        lambda: registry.operations.fail(operation, "boom"),
    ):
        with pytest.raises(OperationInProgress):
            write()
    assert operation_of(registry, acme) == before


def test_a_worker_that_holds_its_lease_writes(registry: Registry, acme: Tenant) -> None:
    operation = claimed(registry, acme)
    operation = registry.operations.renew(operation, MINUTE)
    operation = registry.operations.record(operation, "database")
    operation = registry.operations.record(operation, "open")
    done = registry.operations.finish(operation)
    assert (done.state, done.step, done.worker, done.lease_until) == (OperationState.DONE, "open", None, None)
    assert registry.operations.claim(done.id, "w2", MINUTE) is None
    assert registry.operations.claim_next("w2", MINUTE) is None


def test_a_failed_operation_says_why_and_runs_again_only_when_asked_for(registry: Registry, acme: Tenant) -> None:
    failed = registry.operations.fail(claimed(registry, acme), "migration 0003 raised")
    assert (failed.state, failed.error) == (OperationState.FAILED, "migration 0003 raised")
    assert registry.operations.claim_next("w2", MINUTE) is None
    again = claimed(registry, acme, "w2")
    assert (again.state, again.attempt, again.error) == (OperationState.RUNNING, 2, None)


def test_the_end_of_an_operation_is_audited(registry: Registry, acme: Tenant) -> None:
    operation = claimed(registry, acme)
    registry.operations.fail(operation, "boom")
    entry = registry.audit.list(acme)[0]
    assert (entry.action, entry.outcome, entry.object, entry.details["attempt"]) == ("operation.provision", "failed", str(operation.id), 1)


def test_the_oldest_comes_first(registry: Registry) -> None:
    slugs = ["acme", "beta", "gamma"]
    tenants = {registry.sign_up(SignUp(slug=slug))[0].id: slug for slug in slugs}
    order = []
    while (operation := registry.operations.claim_next("w1", MINUTE)) is not None:
        order.append(tenants[operation.tenant_id])
    assert order == slugs


def test_workers_that_ask_at_once_get_different_operations(registry: Registry) -> None:
    for number in range(6):
        registry.sign_up(SignUp(slug=f"tenant-{number}"))
    barrier = threading.Barrier(4)

    def work(worker: str) -> list[Operation]:
        barrier.wait(10)
        taken = []
        while (operation := registry.operations.claim_next(worker, MINUTE)) is not None:
            taken.append(operation)
        return taken

    with ThreadPoolExecutor(4) as pool:
        taken = [operation for done in [pool.submit(work, f"w{n}") for n in range(4)] for operation in done.result(60)]
    assert len({operation.id for operation in taken}) == len(taken) == 6


def test_of_many_who_claim_one_operation_one_gets_it(registry: Registry, acme: Tenant) -> None:
    operation = operation_of(registry, acme)
    barrier = threading.Barrier(4)

    def claim(worker: str) -> Operation | None:
        barrier.wait(10)
        return registry.operations.claim(operation.id, worker, MINUTE)

    with ThreadPoolExecutor(4) as pool:
        claims = [done.result(60) for done in [pool.submit(claim, f"w{n}") for n in range(4)]]
    assert len([claim for claim in claims if claim is not None]) == 1


def test_an_operation_of_a_dead_worker_is_taken_before_its_lease_ends(registry: Registry, acme: Tenant) -> None:
    first = claimed(registry, acme, "w1")
    assert registry.operations.workers() == ["w1"]
    assert registry.operations.claim(first.id, "w2", MINUTE, dead=["w3"]) is None
    assert registry.operations.claim_next("w2", MINUTE, dead=["w3"]) is None
    taken = registry.operations.claim(first.id, "w2", MINUTE, dead=["w1"])
    assert taken is not None and (taken.worker, taken.attempt) == ("w2", 2)
    with pytest.raises(OperationInProgress):
        registry.operations.finish(first)


def another(registry: Registry, tenant: Tenant, kind: str = "fence") -> Operation:
    with registry.admin_write() as connection:
        return registry.operations.create(connection, kind, tenant.id)


def test_a_tenant_is_worked_on_by_one_at_a_time(registry: Registry, acme: Tenant) -> None:
    first = claimed(registry, acme)
    fence = another(registry, acme)
    assert registry.operations.claim(fence.id, "w2", MINUTE) is None
    assert registry.operations.claim_next("w2", MINUTE, kinds=("fence",)) is None
    beta, _ = registry.sign_up(SignUp(slug="beta"))
    other = registry.operations.claim_next("w2", MINUTE, kinds=("provision", "fence"))
    assert other is not None and other.tenant_id == beta.id

    registry.operations.finish(first)
    taken = registry.operations.claim_next("w2", MINUTE, kinds=("fence",))
    assert taken is not None and taken.id == fence.id


def test_only_kinds_that_this_code_knows_are_taken(registry: Registry, acme: Tenant) -> None:
    another(registry, acme, "of the future")
    registry.operations.finish(claimed_first(registry, acme))
    assert registry.operations.claim_next("w1", MINUTE, kinds=("provision", "fence")) is None


def claimed_first(registry: Registry, tenant: Tenant) -> Operation:
    operation = registry.operations.for_tenant(tenant.id, kinds=["provision"])
    assert operation is not None
    taken = registry.operations.claim(operation.id, "w1", MINUTE)
    assert taken is not None
    return taken


def test_what_is_to_be_tried_again_waits_and_may_be_asked_for_sooner(registry: Registry, acme: Tenant) -> None:
    later = registry.operations.postpone(claimed(registry, acme), "the server is away", MINUTE)
    assert (later.state, later.error) == (OperationState.PENDING, "the server is away")
    assert registry.operations.claim_next("w2", MINUTE) is None
    assert registry.operations.unfinished() == [operation_of(registry, acme)]
    again = claimed(registry, acme, "w2")
    assert again.attempt == 2
    registry.operations.postpone(again, "still away", ENDED)
    due = registry.operations.claim_next("w3", MINUTE)  # the twin: its time has come
    assert due is not None and due.attempt == 3


@pytest.mark.parametrize("write", ["record", "finish", "fail"])
def test_what_a_step_found_out_is_written_with_the_journal_or_not_at_all(registry: Registry, acme: Tenant, write: str) -> None:
    operation = claimed(registry, acme)
    ways = {
        "record": lambda held, also: registry.operations.record(held, "open", also=also),
        "finish": lambda held, also: registry.operations.finish(held, also=also),
        "fail": lambda held, also: registry.operations.fail(held, "boom", also=also),
    }

    def name(connection: Connection) -> None:
        connection.execute(update(tables.tenants).values(plan="gold"))

    def breaks(connection: Connection) -> None:
        name(connection)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ways[write](operation, breaks)
    assert operation_of(registry, acme) == operation and registry.tenants.get("acme").plan is None
    registry.operations.renew(operation, ENDED)
    with pytest.raises(OperationInProgress):
        ways[write](operation, name)
    assert registry.tenants.get("acme").plan is None
    ways[write](claimed(registry, acme, "w2"), name)
    registry.forget(acme.id, "acme")
    assert registry.tenants.get("acme").plan == "gold"


# -- golden databases ------------------------------------------------------------------------------------------------------------------


def begin(registry: Registry, revision: str, worker: str = "w1", lease: timedelta = MINUTE) -> Template | None:
    server = registry.servers.add("default", backend="postgresql", host="db1", port=5432)
    name = f"t_{revision}_{worker}"
    return registry.templates.begin(server, revision, "digest", database=name, owner_role=name, worker=worker, lease=lease)


def test_one_builds_a_golden_database_and_the_others_find_it(registry: Registry) -> None:
    mine = begin(registry, "1")
    assert mine is not None and begin(registry, "1", "w2") is None and begin(registry, "2", "w2") is None
    server = registry.servers.get("default")
    assert registry.templates.find(server, "1", "digest") is None  # not before it is whole
    registry.templates.switch(mine)
    assert registry.templates.find(server, "1", "digest") is not None
    assert registry.templates.find(server, "1", "another digest") is None
    assert begin(registry, "1", "w2") is None


def test_a_builder_without_a_sign_of_life_is_replaced_and_switches_nothing(registry: Registry) -> None:
    lost = begin(registry, "1", "w1", ENDED)
    assert lost is not None
    mine = begin(registry, "1", "w2")
    assert mine is not None
    with pytest.raises(OperationInProgress):
        registry.templates.switch(lost)
    registry.templates.switch(mine)
    assert {template.worker or str(template.state) for template in registry.templates.list()} == {"w1", "current"}


def test_the_newest_two_golden_databases_are_kept(registry: Registry) -> None:
    for revision in ("1", "2", "3"):
        made = begin(registry, revision)
        assert made is not None
        registry.templates.switch(made)
    states = {template.revision: template.state for template in registry.templates.list()}
    assert states == {"1": TemplateState.RETIRED, "2": TemplateState.CURRENT, "3": TemplateState.CURRENT}
    [retired] = [template for template in registry.templates.list() if template.revision == "1"]
    registry.templates.forget(retired)
    assert len(registry.templates.list()) == 2
