"""Signing a tenant up."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from tenantdb.errors import TenantExists, TenantNotFound, UserExists
from tenantdb.model import NewUser, Tenant, TenantState, User
from tenantdb.provisioning.lease import LEASE, worker
from tenantdb.provisioning.procedures import Runner
from tenantdb.provisioning.spares import Spares
from tenantdb.registry import Hands, SignUp
from tenantdb.registry.operations import CLONE, IMPORT, PROVISION, TAKE, Operation, OperationState
from tenantdb.registry.records import TenantRecord
from tenantdb.registry.tables import utcnow
from tenantdb.resolvers import canonical_slug

Owner = User | UUID | NewUser | None

_MAKING = (PROVISION, TAKE)
_FILLING = (IMPORT, CLONE)  # whoever says ``exist_ok`` has or continues those too; nobody signs up for one


class Provisioner:
    """Makes tenants: from a spare where there is one, else from the golden database. With no provisioner's URL in the settings and no
    spare it only writes down what is wanted."""

    def __init__(self, runner: Runner, spares: Spares) -> None:
        self._runner = runner
        self._spares = spares
        self._registry = runner.shop.registry
        self._settings = runner.shop.settings
        self._hooks = runner.shop.hooks

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
        # Only with a turn in hand: whoever waits for one shows no sign of life, and would lose what he holds.
        if self._runner.turns.acquire(blocking=False):
            try:
                return self._provision(request, exist_ok=exist_ok, in_turn=True)
            finally:
                self._runner.turns.release()
        return self._provision(request, exist_ok=exist_ok, in_turn=False)

    def _provision(self, request: SignUp, *, exist_ok: bool, in_turn: bool) -> Tenant:
        wish = request.payload["server"], request.payload["region"]
        taking = self._spares.taking(*wish)
        hands = Hands(worker(), LEASE, makes=in_turn and bool(self._settings.provisioners))
        repeated = False
        try:
            tenant, operation = self._registry.sign_up(request, taking=taking, hands=hands)
        except (TenantExists, UserExists) as error:
            tenant, operation = self._existing(request, error, exist_ok=exist_ok)
            repeated = not exist_ok
        if taking is not None and operation.kind == PROVISION:
            self._spares.none_found(*wish)
        if operation.worker == hands.worker:
            if operation.state is OperationState.RUNNING:
                record = TenantRecord(tenant=tenant) if operation.kind == PROVISION else None  # one that was taken has a server
                return self._runner.carry_out(operation, record=record)
            self._runner.announce(operation, tenant)
            return tenant
        able = operation.kind == TAKE or self._runner.can_work_on(tenant.server)
        if tenant.state not in {TenantState.PROVISIONING, TenantState.FAILED} or not able:
            if tenant.state is TenantState.FAILED:
                return self._queue_again(tenant, operation)
            if repeated:
                raise TenantExists(request.slug)
            return tenant
        made = self._make(operation, request, in_turn=in_turn)
        if made is not None:
            return made
        if repeated:  # somebody else is at work on it, or was
            raise TenantExists(request.slug)
        return self._registry.tenants.get(tenant.id)

    def _make(self, operation: Operation, request: SignUp, *, in_turn: bool) -> Tenant | None:
        if in_turn:
            claimed = self._registry.operations.claim(operation.id, worker(), LEASE, dead=self._runner.dead_workers())
            return None if claimed is None else self._runner.carry_out(claimed, request.payload)
        with self._runner.turns:
            return self._make(operation, request, in_turn=True)

    def _existing(self, request: SignUp, error: TenantExists | UserExists, *, exist_ok: bool) -> tuple[Tenant, Operation]:
        """The tenant that is there already, for whoever may have it: a script that says ``exist_ok``, or the repetition of a call that
        failed.

        A repetition is the same request, by the same owner, of a tenant that never became active. Everybody else is told that it exists.
        """
        try:
            tenant = self._registry.tenants.get(request.slug)
        except TenantNotFound:
            raise error from None
        operation = self._registry.operations.for_tenant(tenant.id, kinds=(*_MAKING, *_FILLING) if exist_ok else _MAKING)
        if operation is None:
            raise error
        if exist_ok and tenant.state not in {TenantState.DELETED, TenantState.PURGING}:
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


def _forgotten(operation: Operation) -> bool:
    """Whether nobody has taken it up for so long that whoever wrote it down must have died right after."""
    return operation.state is OperationState.PENDING and operation.created_at is not None and operation.created_at < utcnow() - LEASE
