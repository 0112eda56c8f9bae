"""Signing a tenant up, and carrying out what is in the journal."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session

from tenantdb.connections.engines import Engines
from tenantdb.errors import (
    ConfigError,
    CredentialTampered,
    ProvisioningError,
    RegistryError,
    TenantExists,
    TenantNotFound,
    UserExists,
    describe_with_frames,
)
from tenantdb.model import NewUser, Tenant, TenantState, User
from tenantdb.provisioning.hooks import Hooks
from tenantdb.provisioning.journal import WORKER, carry_out
from tenantdb.provisioning.steps import LEASE, Work
from tenantdb.registry import Registry, SignUp
from tenantdb.registry.operations import Operation, OperationState
from tenantdb.registry.tables import utcnow
from tenantdb.resolvers import canonical_slug
from tenantdb.settings import Settings

logger = logging.getLogger("tenantdb.provisioning")

Owner = User | UUID | NewUser | None

_turns = threading.BoundedSemaphore(2)
"""Operations that this process carries out at a time. Each holds up to two of the provisioner's few connections, and the server makes one
database after another anyway, so a crowd of sign-ups waits here instead of failing there."""


class Provisioner:
    """Makes tenants. With no provisioner's URL in the settings it only writes down what is wanted."""

    def __init__(self, registry: Registry, engines: Engines, settings: Settings, hooks: Hooks, session_class: type[Session]) -> None:
        self._registry = registry
        self._engines = engines
        self._settings = settings
        self._hooks = hooks
        self._session_class = session_class

    def provision(
        self,
        slug: str,
        *,
        owner: Owner,
        idempotency_key: str | None,
        exist_ok: bool,
        server: str | None,
        region: str | None,
        **details: Any,
    ) -> Tenant:
        canonical_slug(slug)
        request = SignUp(slug=slug, owner=owner, idempotency_key=idempotency_key, payload={"server": server, "region": region}, **details)
        repeated = False
        try:
            tenant, operation = self._registry.sign_up(request)
        except (TenantExists, UserExists) as error:
            tenant, operation = self._existing(request, error, exist_ok=exist_ok)
            repeated = not exist_ok
        if tenant.state is TenantState.FAILED and not self._settings.provisioners:
            return self._queue_again(tenant, operation)
        if tenant.state not in {TenantState.PROVISIONING, TenantState.FAILED} or not self._settings.provisioners:
            if repeated:
                raise TenantExists(slug)
            return tenant
        with _turns:
            claimed = self._registry.operations.claim(operation.id, WORKER, LEASE)
            made = None if claimed is None else self._carry_out(claimed, request.payload)
        if made is not None:
            return self._announce(made)
        if repeated:  # somebody else is at work on it, or was
            raise TenantExists(slug)
        return self._registry.tenants.get(tenant.id)

    def _existing(self, request: SignUp, error: TenantExists | UserExists, *, exist_ok: bool) -> tuple[Tenant, Operation]:
        """The tenant that is there already, for whoever may have it: a script that says ``exist_ok``, or the repetition of a call that
        failed.

        A repetition is the same request, by the same owner, of a tenant that never became active. Everybody else is told that it exists.
        """
        try:
            tenant = self._registry.tenants.get(request.slug)
        except TenantNotFound:
            raise error from None
        operation = self._registry.operations.for_tenant(tenant.id)
        if operation is None:
            raise error
        if exist_ok:
            return tenant, operation
        abandoned = tenant.state is TenantState.PROVISIONING and (
            operation.state is OperationState.RUNNING or _forgotten(operation)  # `claim` tells whether its worker is alive
        )
        same = operation.request_hash == request.fingerprint()
        if not same or not (abandoned or tenant.state is TenantState.FAILED):
            raise error
        owner = request.owner
        if isinstance(owner, NewUser) and not self._registry.users.verifies(owner.email, owner.password):
            raise error
        return tenant, operation

    def _queue_again(self, tenant: Tenant, operation: Operation) -> Tenant:
        """Leave a failed operation to a worker once more: this process has no provisioner."""
        with self._registry.write() as connection:
            if self._registry.operations.queue_again(connection, operation):
                self._registry.tenants.transition_in(connection, tenant, TenantState.PROVISIONING, action="tenant.retry")
        self._registry.forget(tenant.id, tenant.slug)
        return self._registry.tenants.get(tenant.id)

    def work(self, *, stop: threading.Event | None, poll: float) -> int:
        if not self._settings.provisioners:
            raise ConfigError("a worker creates databases; give server=... or TENANTDB_SERVER")
        done = 0
        while stop is None or not stop.is_set():
            try:
                with _turns:
                    claimed = self._registry.operations.claim_next(WORKER, LEASE)
                    made = None if claimed is None else self._carry_out(claimed)
            except ProvisioningError as error:
                told = describe_with_frames(error.__cause__ or error)
                logger.error("provisioning of %s failed at step %s, and its row says why. %s", error.tenant, error.step, told)
                continue
            except RegistryError as error:
                if stop is None:
                    raise
                logger.warning("the registry cannot be asked for work: %s", error.explain())
                stop.wait(poll)
                continue
            if made is not None:
                self._announce(made)
                done += 1
            elif stop is None:
                break
            else:
                stop.wait(poll)
        return done

    def _carry_out(self, operation: Operation, wanted: Mapping[str, Any] | None = None) -> Tenant:
        """``wanted`` is what a repeated call asks for now; where it leaves open, the operation's own wishes hold."""
        wanted = {**operation.payload, **{name: value for name, value in (wanted or {}).items() if value is not None}}
        try:
            record = self._registry.tenants.record(operation.tenant_id)
        except CredentialTampered as error:  # nothing can be done with its server; a worker must not stumble over it again and again
            self._registry.operations.fail(operation, error.explain())
            raise ProvisioningError(str(operation.tenant_id), operation.step or "start", error.explain()) from error
        work = Work(self._registry, self._settings, self._engines, self._hooks, self._session_class, operation, record, wanted)
        return carry_out(work)

    def _announce(self, tenant: Tenant) -> Tenant:
        self._hooks.after("provision", tenant)
        self._hooks.after("activate", tenant)
        return tenant


def _forgotten(operation: Operation) -> bool:
    """Whether nobody has taken it up for so long that whoever wrote it down must have died right after."""
    return operation.state is OperationState.PENDING and operation.created_at is not None and operation.created_at < utcnow() - LEASE
