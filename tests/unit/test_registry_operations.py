"""The journal gives an operation to one worker at a time, and lets nobody write who has lost it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from uuid import uuid4

import pytest

from tenantdb.errors import OperationInProgress
from tenantdb.model import Tenant
from tenantdb.registry import Operation, OperationState, Registry, SignUp

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
