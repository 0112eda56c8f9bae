"""Carries an operation through its steps, writing before and after each where it is.

A worker holds an operation by a lease that a heartbeat renews; one that dies loses it, and whoever takes the operation up continues at the
step that was written last. An error ends the attempt: the tenant is failed, with the reason, and running it again continues there.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.engine import Connection

from tenantdb.errors import ProvisioningError, TenantDBError, describe
from tenantdb.model import Tenant, TenantState
from tenantdb.provisioning.steps import LEASE, STEPS, Work
from tenantdb.registry import Registry
from tenantdb.registry.operations import Operation

logger = logging.getLogger("tenantdb.provisioning")

WORKER = f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}"
"""Names this process in the journal; the random part tells it from an earlier process with the same number."""


def carry_out(work: Work) -> Tenant:
    """Run the remaining steps of a claimed operation. Raises: `ProvisioningError`, ``from`` what went wrong."""
    names = [name for name, _ in STEPS]
    position = names.index(work.operation.step) if work.operation.step in names else 0
    operations = work.registry.operations
    with _heartbeat(work.registry, work.operation):
        try:
            if work.tenant.state is TenantState.FAILED:
                work.registry.tenants.transition(work.tenant, TenantState.PROVISIONING, action="tenant.retry")
                work.reload()
            for name, step in STEPS[position:]:
                if name != work.operation.step:
                    work.operation = operations.record(work.operation, name, started=False)
                step(work)
        except BaseException as error:
            _give_up(work, error)
            if not isinstance(error, Exception):
                raise
            raise ProvisioningError(work.tenant.slug, work.operation.step or "start", describe(error)) from error
    return work.tenant


def _give_up(work: Work, error: BaseException) -> None:
    """Write down why. When even that fails, the lease runs out and the journal still says where to continue."""
    problem = describe(error) if isinstance(error, Exception) else f"interrupted by {type(error).__name__}"
    tenants = work.registry.tenants

    def fail_tenant(connection: Connection) -> None:
        """With the operation, or whoever claims the failed operation could have a tenant that fails under his hands."""
        tenant = tenants.find_in(connection, work.tenant.id)
        if tenant.state is TenantState.PROVISIONING:
            reason = f"{work.operation.step}: {problem}"
            tenants.transition_in(connection, tenant, TenantState.FAILED, action="tenant.fail", reason=reason)

    try:
        work.registry.operations.fail(work.operation, problem, also=fail_tenant)
        work.registry.forget(work.tenant.id, work.tenant.slug)
    except TenantDBError as unwritten:
        logger.error(
            "could not record that operation %s failed (%s); it can be taken up when its lease has ended: %s",
            work.operation.id,
            problem,
            describe(unwritten),
        )


@contextmanager
def _heartbeat(registry: Registry, operation: Operation) -> Iterator[None]:
    done = threading.Event()

    def beat() -> None:
        while not done.wait(LEASE.total_seconds() / 3):
            try:
                registry.operations.renew(operation, LEASE)
            except TenantDBError:
                logger.warning("the lease of operation %s could not be renewed; its next write will tell", operation.id)

    thread = threading.Thread(target=beat, name="tenantdb-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
