"""Carries an operation through its steps, writing where it is before each, and after it what the step found out.

A worker holds an operation by a lease that a heartbeat renews; one that dies loses it, and whoever takes the operation up continues at the
step that was written last, which is why every step may run twice. An error ends the attempt. What it leaves depends on the procedure: a
tenant that was to be made is failed, with the reason, and running it again continues there; what must come true in any case, such as a
fence, is tried again by a worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy.engine import Connection

from tenantdb.errors import OperationFailed, ProvisioningError, TenantDBError, describe
from tenantdb.model import Tenant, TenantState
from tenantdb.provisioning.lease import LEASE, heartbeat
from tenantdb.provisioning.work import Also, Work

logger = logging.getLogger("tenantdb.provisioning")

Step = Callable[[Work], Also | None]

_LONGEST_WAIT = 300  # seconds between two attempts


@dataclass(frozen=True)
class Procedure:
    """A kind of operation. ``makes``: it ends with a tenant that is served, and one that fails leaves the tenant failed; ``insists``: a
    worker tries again by itself."""

    steps: tuple[tuple[str, Step], ...]
    makes: bool = False
    insists: bool = False


def carry_out(work: Work, procedure: Procedure) -> Tenant:
    """Run the remaining steps of a claimed operation, and return the tenant as it is then.

    Raises: `ProvisioningError` or `OperationFailed`, ``from`` what went wrong.
    """
    names = [name for name, _ in procedure.steps]
    position = names.index(work.operation.step) if work.operation.step in names else 0
    operations = work.registry.operations
    with heartbeat(lambda: operations.renew(work.operation, LEASE), f"operation {work.operation.id}"):
        try:
            if procedure.makes and work.tenant.state is TenantState.FAILED:
                work.registry.tenants.transition(work.tenant, TenantState.PROVISIONING, action="tenant.retry")
                work.reload()
            found: Also | None = None
            for name, step in procedure.steps[position:]:
                if name != work.operation.step:
                    work.operation = operations.record(work.operation, name, also=found)
                    if found is not None:
                        _reload(work)
                found = step(work)
            work.operation = operations.finish(work.operation, also=found)
            _reload(work)
        except BaseException as error:
            _give_up(work, procedure, error)
            if not isinstance(error, Exception):
                raise
            step_name, problem = work.operation.step or "start", describe(error)
            if procedure.makes:
                raise ProvisioningError(work.tenant.slug, step_name, problem) from error
            raise OperationFailed(work.tenant.slug, work.operation.kind, step_name, problem) from error
        finally:
            work.release()
    return work.tenant


def _reload(work: Work) -> None:
    work.registry.forget(work.tenant.id, work.tenant.slug)
    work.reload()


def _give_up(work: Work, procedure: Procedure, error: BaseException) -> None:
    """Write down why. When even that fails, the lease runs out and the journal still says where to continue."""
    problem = describe(error) if isinstance(error, Exception) else f"interrupted by {type(error).__name__}"
    tenants, operations = work.registry.tenants, work.registry.operations

    def fail_tenant(connection: Connection) -> None:
        """With the operation, or whoever claims the failed operation could have a tenant that fails under his hands."""
        tenant = tenants.find_in(connection, work.tenant.id)
        if procedure.makes and tenant.state is TenantState.PROVISIONING:
            reason = f"{work.operation.step}: {problem}"
            tenants.transition_in(connection, tenant, TenantState.FAILED, action="tenant.fail", reason=reason)

    try:
        if procedure.insists:
            operations.postpone(work.operation, problem, timedelta(seconds=min(2**work.operation.attempt, _LONGEST_WAIT)))
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
