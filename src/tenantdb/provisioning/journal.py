"""Carries an operation through its steps, writing where it is before each, and after it what the step found out.

A worker holds an operation by a lease that a heartbeat renews; one that dies loses it, and whoever takes the operation up continues at the
step that was written last, which is why every step may run twice. An error ends the attempt. What it leaves depends on the procedure: a
tenant that was to be made is failed, with the reason, and running it again continues there; what must come true in any case, such as a
fence, is tried again by a worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

from sqlalchemy.engine import Connection

from tenantdb.errors import IllegalTransition, OperationFailed, ProvisioningError, TenantDBError, describe
from tenantdb.model import Tenant, TenantState
from tenantdb.provisioning.lease import LEASE, heartbeat
from tenantdb.provisioning.work import Also, Work
from tenantdb.registry.records import TenantRecord

logger = logging.getLogger("tenantdb.provisioning")

_LONGEST_WAIT = 300  # seconds between two attempts
_MOST_ATTEMPTS = 10  # of what a worker tries again because a server did not answer
_BEING_MADE = (TenantState.PROVISIONING, TenantState.FAILED)


@dataclass(frozen=True)
class Step:
    """One step: ``run`` looks and acts, and may return what the journal is to write down with the step's end. It is passed over where it
    is not ``needed``."""

    name: str
    run: Callable[[Work], Also | None]
    needed: Callable[[Work], bool] | None = None


@dataclass(frozen=True)
class Procedure:
    """A kind of operation; ``end`` is written in the transaction in which it is done.

    ``makes``: a tenant is served at its end, and one that fails leaves the tenant failed; ``insists``: a worker tries again by itself.
    """

    steps: tuple[Step, ...]
    end: Callable[[Work], Also | None] | None = None
    makes: bool = False
    insists: bool = False


def carry_out(work: Work, procedure: Procedure, *, patient: bool = False) -> Tenant:
    """Run the remaining steps of a claimed operation, and return the tenant as it is then.

    ``patient``: nobody waits for it, so an outage does not fail the tenant; it is tried again.

    Raises: `ProvisioningError` or `OperationFailed`, ``from`` what went wrong.
    """
    operations = work.registry.operations
    with heartbeat(lambda: operations.renew(work.operation, LEASE), f"operation {work.operation.id}"):
        try:
            if procedure.makes and work.tenant.state not in _BEING_MADE:  # deleted before its turn came, or made by another
                raise IllegalTransition(work.tenant.slug, str(work.tenant.state), str(TenantState.ACTIVE))
            if procedure.makes and work.tenant.state is TenantState.FAILED:
                work.registry.tenants.transition(work.tenant, TenantState.PROVISIONING, action="tenant.retry")
                work.reload()
            writes = _Writes(work)
            for step in _remaining(procedure, work.operation.step):
                if step.needed is None or step.needed(work):
                    if work.operation.step != step.name and step is not procedure.steps[0]:  # the first needs no telling
                        work.operation = operations.record(work.operation, step.name, also=writes.flush)
                        writes.done()
                    writes.add(step.run(work))
            writes.add(None if procedure.end is None else procedure.end(work))
            work.operation = operations.finish(work.operation, also=writes.flush)
            writes.done()
            work.registry.forget(work.tenant.id, work.tenant.slug)
        except BaseException as error:
            _give_up(work, procedure, error, patient=patient)
            if not isinstance(error, Exception):
                raise
            step_name, problem = work.operation.step or procedure.steps[0].name, describe(error)
            if procedure.makes:
                raise ProvisioningError(work.tenant.slug, step_name, problem) from error
            raise OperationFailed(work.tenant.slug, work.operation.kind, step_name, problem) from error
        finally:
            work.release()
    return work.tenant


def _remaining(procedure: Procedure, step: str | None) -> tuple[Step, ...]:
    names = [each.name for each in procedure.steps]
    return procedure.steps[names.index(step) if step in names else 0 :]


class _Writes:
    """What steps have found out and is not written down yet."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._pending: list[Also] = []
        self._written: list[object] = []

    def add(self, also: Also | None) -> None:
        if also is not None:
            self._pending.append(also)

    @property
    def flush(self) -> Also | None:
        """Writes all of it in one transaction; None where there is nothing."""
        return self._flush if self._pending else None

    def _flush(self, connection: Connection) -> None:
        self._written = [also(connection) for also in self._pending]

    def done(self) -> None:
        """The transaction is committed: from here on the work goes by what was written."""
        for written in self._written:
            if isinstance(written, TenantRecord):
                self._work.record = written
            elif isinstance(written, Tenant):
                self._work.record = replace(self._work.record, tenant=written)
        if self._pending:
            self._work.registry.forget(self._work.tenant.id, self._work.tenant.slug)
        self._pending, self._written = [], []


def _give_up(work: Work, procedure: Procedure, error: BaseException, *, patient: bool) -> None:
    """Write down why. When even that fails, the lease runs out and the journal still says where to continue."""
    problem = describe(error) if isinstance(error, Exception) else f"interrupted by {type(error).__name__}"
    tenants, operations = work.registry.tenants, work.registry.operations

    def fail_tenant(connection: Connection) -> None:
        """With the operation, or whoever claims the failed operation could have a tenant that fails under his hands."""
        tenant = tenants.find_in(connection, work.tenant.id)
        if procedure.makes and tenant.state is TenantState.PROVISIONING:
            reason = f"{work.operation.step or procedure.steps[0].name}: {problem}"
            tenants.transition_in(connection, tenant, TenantState.FAILED, action="tenant.fail", reason=reason)

    try:
        outage = isinstance(error, TenantDBError) and error.retryable and work.operation.attempt < _MOST_ATTEMPTS
        if procedure.insists or (patient and outage):
            wait = min(2 ** min(work.operation.attempt, 9), _LONGEST_WAIT)
            operations.postpone(work.operation, problem, timedelta(seconds=wait))
        else:
            operations.fail(work.operation, problem, also=fail_tenant)
        work.registry.forget(work.tenant.id, work.tenant.slug)
    except TenantDBError as unwritten:
        logger.error(
            "could not record that operation %s failed (%s); it can be taken up when its lease has ended: %s",
            work.operation.id,
            problem,
            describe(unwritten),
        )
