"""Suspending, serving again, and changing what is known about a tenant.

The registry's compare-and-set comes first: from then on no process looks the tenant up as servable. Then this process lets go of its
connections; others follow when their copy of the record is too old.
"""

from __future__ import annotations

from typing import Any

from tenantdb.connections.engines import Engines
from tenantdb.errors import IllegalTransition
from tenantdb.model import Tenant, TenantState
from tenantdb.provisioning.hooks import Hooks
from tenantdb.registry import Registry


class Lifecycle:
    """The verbs that change a tenant that exists."""

    def __init__(self, registry: Registry, engines: Engines, hooks: Hooks) -> None:
        self._registry = registry
        self._engines = engines
        self._hooks = hooks

    def suspend(self, tenant: Tenant) -> Tenant:
        """Stop serving; nothing is lost. Raises: `IllegalTransition` where it is not active."""
        return self._change(tenant, "suspend", TenantState.SUSPENDED)

    def activate(self, tenant: Tenant) -> Tenant:
        """Serve again. Raises: `IllegalTransition` where it is not suspended: what is being provisioned becomes active by itself."""
        if tenant.state is not TenantState.SUSPENDED:
            raise IllegalTransition(tenant.slug, str(tenant.state), str(TenantState.ACTIVE))
        return self._change(tenant, "activate", TenantState.ACTIVE)

    def update(self, tenant: Tenant, changes: dict[str, Any]) -> Tenant:
        self._hooks.before("update", tenant)
        changed = self._registry.tenants.update(tenant, **changes)
        self._hooks.after("update", changed)
        return changed

    def _change(self, tenant: Tenant, verb: str, to: TenantState) -> Tenant:
        self._hooks.before(verb, tenant)
        changed = self._registry.tenants.transition(tenant, to, action=f"tenant.{verb}", bump_generation=True)
        self._engines.forget(tenant.id)
        self._hooks.after(verb, changed)
        return changed
