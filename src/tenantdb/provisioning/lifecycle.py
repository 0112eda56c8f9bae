"""Suspending, serving again, deleting, restoring, purging, and changing what is known about a tenant.

The registry's compare-and-set comes first: from then on no process looks the tenant up as servable. Then this process lets go of its
connections, and the server is made to refuse the tenant too: at once where this process has a provisioner, else by a worker. Other
processes follow when their copy of the record is too old, and are refused by the server meanwhile.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

from tenantdb.context import current_actor
from tenantdb.errors import ConfigError, IllegalTransition, OperationFailed, OperationInProgress, PurgeRefused, RegistryError
from tenantdb.model import Tenant, TenantState
from tenantdb.provisioning.hooks import Hooks
from tenantdb.provisioning.procedures import Runner
from tenantdb.registry.operations import ACTIVATE, ADOPT, CLONE, FENCE, IMPORT, PROVISION, PURGE, RESTORE, ROTATE, TAKE, OperationState
from tenantdb.registry.tables import utcnow
from tenantdb.settings import SQLITE

logger = logging.getLogger("tenantdb.provisioning")


_WITH_PASSWORDS = frozenset({TenantState.ACTIVE, TenantState.SUSPENDED, TenantState.MAINTENANCE, TenantState.DELETED, TenantState.SPARE})


class Lifecycle:
    """The verbs that change a tenant that exists."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._registry = runner.shop.registry
        self._engines = runner.shop.engines
        self._settings = runner.shop.settings
        self._hooks: Hooks = runner.shop.hooks

    def suspend(self, tenant: Tenant) -> Tenant:
        return self._shut(tenant, "suspend", TenantState.SUSPENDED)

    def maintenance(self, tenant: Tenant) -> Tenant:
        self._hooks.before("maintenance", tenant)
        changed = self._registry.tenants.transition(tenant, TenantState.MAINTENANCE, action="tenant.maintenance", bump_generation=True)
        self._engines.forget(tenant.id)
        self._hooks.after("maintenance", changed)
        return changed

    def activate(self, tenant: Tenant) -> Tenant:
        """What is being provisioned becomes active by itself, and a deleted tenant is restored."""
        if tenant.state not in {TenantState.SUSPENDED, TenantState.MAINTENANCE}:
            raise IllegalTransition(tenant.slug, str(tenant.state), str(TenantState.ACTIVE))
        return self._open(tenant, "activate", ACTIVATE)

    def delete(self, tenant: Tenant) -> Tenant:
        return self._shut(
            tenant, "delete", TenantState.DELETED, purge_after=utcnow() + timedelta(days=self._settings.retention), reason=tenant.reason
        )

    def restore(self, tenant: Tenant) -> Tenant:
        if tenant.state is not TenantState.DELETED:
            raise IllegalTransition(tenant.slug, str(tenant.state), str(TenantState.ACTIVE))
        if tenant.purge_after is not None and tenant.purge_after <= utcnow():
            raise IllegalTransition(tenant.slug, "deleted, and its retention has ended", str(TenantState.ACTIVE))
        made = self._registry.operations.for_tenant(tenant.id, kinds=[PROVISION, TAKE, IMPORT, CLONE, ADOPT])
        if tenant.database is None or (made is not None and made.state is not OperationState.DONE):
            raise IllegalTransition(tenant.slug, "deleted before it was ever complete", str(TenantState.ACTIVE))
        return self._open(tenant, "restore", RESTORE)

    def purge(self, tenant: Tenant, *, confirm: str, immediately: bool) -> Tenant:
        if confirm not in (tenant.slug, str(tenant.id)):
            raise PurgeRefused(tenant.slug, "it is erased for ever, so its slug is asked for once more: confirm=...")
        if tenant.legal_hold is not None:
            raise PurgeRefused(tenant.slug, "there is a legal hold on it; `tenantdb release` ends that")
        adopted = None if tenant.adopted_from is None else self._registry.operations.for_tenant(tenant.id, kinds=[ADOPT])
        if adopted is not None and adopted.state is not OperationState.DONE:
            raise PurgeRefused(tenant.slug, "it was never wholly adopted, so its database may be another's still; give it back instead")
        if tenant.state is TenantState.PURGING:
            operation = self._registry.operations.for_tenant(tenant.id, kinds=[PURGE])
            if operation is not None:
                return self._runner.run_now(operation)
        if tenant.state is not TenantState.DELETED:
            raise IllegalTransition(tenant.slug, str(tenant.state), str(TenantState.PURGING))
        if not immediately and (tenant.purge_after is None or tenant.purge_after > utcnow()):
            until = "its retention ends" if tenant.purge_after is None else f"{tenant.purge_after:%Y-%m-%d %H:%M} UTC"
            raise PurgeRefused(tenant.slug, f"it can be restored until {until}; immediately=True does not wait for that")
        self._hooks.before("purge", tenant)
        with self._registry.write() as connection:
            changed = self._registry.tenants.transition_in(
                connection, tenant, TenantState.PURGING, action="tenant.purging", bump_generation=True, held=False
            )
            operation = self._registry.operations.create(connection, PURGE, tenant.id, payload={"actor": current_actor().actor})
        self._let_go(changed)
        return self._runner.run_now(operation)

    def update(self, tenant: Tenant, changes: dict[str, Any]) -> Tenant:
        self._hooks.before("update", tenant)
        changed = self._registry.tenants.update(tenant, **changes)
        self._hooks.after("update", changed)
        return changed

    def rotate_credentials(self, tenant: Tenant) -> Tenant:
        if tenant.database is None or tenant.state not in _WITH_PASSWORDS:
            raise IllegalTransition(tenant.slug, str(tenant.state), "given new passwords")
        server = self._registry.tenants.row(tenant.id).server
        if server is not None and server.backend == SQLITE:
            raise ConfigError("SQLite has no roles and so no passwords to rotate")
        self._hooks.before("rotate_credentials", tenant)
        with self._registry.admin_write() as connection:
            operation = self._registry.operations.create(connection, ROTATE, tenant.id)
        return self._runner.run_now(operation)

    # -- how -----------------------------------------------------------------------------------------------------------------------------

    def _shut(self, tenant: Tenant, verb: str, to: TenantState, *, reason: str | None = None, **values: Any) -> Tenant:
        """Stop serving at once; the server's refusal may follow, as ``fence`` of the returned tenant tells."""
        self._hooks.before(verb, tenant)
        with self._registry.write() as connection:
            changed = self._registry.tenants.transition_in(
                connection, tenant, to, action=f"tenant.{verb}", reason=reason, bump_generation=True, values=values
            )
            operation = self._registry.operations.create(connection, FENCE, tenant.id)
        self._let_go(changed)
        try:
            changed = self._runner.run_now(operation)
        except (OperationFailed, OperationInProgress, RegistryError) as error:  # it is not served any more in any case
            logger.warning("tenant %s is %s, and its server does not know yet: %s", tenant.id, to, error.explain())
        self._hooks.after(verb, changed)
        return changed

    def _open(self, tenant: Tenant, verb: str, kind: str) -> Tenant:
        """The server first, then the registry. Without a provisioner a worker does both, and the tenant stays as it is until then."""
        self._hooks.before(verb, tenant)
        if tenant.fence is None:  # nothing to lift: only the registry refuses it
            changed = self._registry.tenants.transition(tenant, TenantState.ACTIVE, action=f"tenant.{verb}", bump_generation=True)
            self._let_go(changed)
            self._hooks.after(verb, changed)
            return changed
        with self._registry.write() as connection:
            generation = self._registry.tenants.still(connection, tenant)
            operation = self._registry.operations.create(connection, kind, tenant.id, payload={"generation": generation})
        changed = self._runner.run_now(operation)
        if changed.state is not TenantState.ACTIVE and self._runner.can_work_on(tenant.server):
            raise IllegalTransition(tenant.slug, str(changed.state), str(TenantState.ACTIVE))  # somebody decided otherwise meanwhile
        return changed

    def _let_go(self, tenant: Tenant) -> None:
        self._registry.forget(tenant.id, tenant.slug)
        self._engines.forget(tenant.id)
