"""Where a tenant is: the one function that sessions, migrations and seeds ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tenantdb.backends import Location
from tenantdb.errors import SubscriptionExpired, TenantNotFound, TenantNotReady, TenantSuspended
from tenantdb.model import DatabaseRole, Tenant, TenantState
from tenantdb.registry import Registry
from tenantdb.registry.records import TenantRecord
from tenantdb.registry.tables import utcnow
from tenantdb.settings import ConnectionURL, Settings, check_host


class Locator:
    """Answers from a record, without I/O, so that an event loop may ask too.

    ``ensure_servable`` stands before the data path only: what administers a tenant locates it whatever its state and revision are.
    """

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self._registry = registry
        self._settings = settings
        self._compatible = frozenset(settings.compatible_revisions)
        self._past_due = settings.past_due

    def locate(self, record: TenantRecord, role: DatabaseRole) -> Location:
        """The location for one role. Raises: `TenantNotReady` where no names are reserved yet; `ConfigError` for a host that is refused."""
        tenant, server = record.tenant, record.server
        if server is None or tenant.database is None:
            raise TenantNotReady(tenant.slug, str(tenant.state))
        registry = self._registry

        def password() -> str:
            # An engine lives longer than the record it was made from: a secret that was mended meanwhile is taken from the newer one.
            newer = None if record.owner_secret else registry.peek(tenant.id)
            current = newer if newer is not None and newer.tenant.generation == tenant.generation else record
            return registry.passwords(current, role)[0]

        def other_password() -> Callable[[], str] | None:
            fresh = registry.tenants.row(tenant.id)
            known = registry.passwords(fresh, role)
            others = [index for index, each in enumerate(known) if each != password()]
            return (lambda: registry.passwords(fresh, role)[others[0]]) if others else None

        def recheck() -> None:
            registry.forget(tenant.id, tenant.slug)
            self.ensure_servable(registry.tenants.record(tenant.id).tenant, tenant.slug)

        location = Location(tenant, server, role, password, other_password, recheck)
        check_host(ConnectionURL(server.backend, location.host), self._settings, f"server {server.name!r}")
        return location

    def ensure_servable(self, tenant: Tenant, key: object, *, unpaid: bool = False) -> Tenant:
        """Refuse a tenant that may not be served. ``unpaid``: whatever its subscription is, for our own reading.

        Raises: `TenantSuspended`, `TenantNotReady`, `SubscriptionExpired`, `TenantNotFound` for deleted and purged ones.
        """
        if tenant.servable:
            if not self._compatible or tenant.revision in self._compatible:
                if self._past_due == "refuse" and not unpaid and tenant.is_past_due(utcnow()):
                    raise subscription_expired(tenant)
                return tenant
            raise TenantNotReady(tenant.slug, str(tenant.state), _incompatible(tenant, self._settings.compatible_revisions))
        if tenant.state is TenantState.SUSPENDED:
            raise TenantSuspended(tenant.slug)
        if tenant.state in {TenantState.PROVISIONING, TenantState.FAILED, TenantState.MAINTENANCE}:
            raise TenantNotReady(tenant.slug, str(tenant.state))
        raise TenantNotFound(str(key))

    def reads_only(self, tenant: Tenant) -> bool:
        """Whether the tenant's sessions may not write, because its subscription is past due."""
        return self._past_due != "allow" and tenant.is_past_due(utcnow())


def subscription_expired(tenant: Tenant) -> SubscriptionExpired:
    """What whoever is refused because of a tenant's subscription is told."""
    expires = tenant.subscription_expires_at
    return SubscriptionExpired(tenant.slug, str(tenant.subscription), expires if expires is not None and expires <= utcnow() else None)


def _incompatible(tenant: Tenant, compatible: Sequence[str]) -> str:
    at = "has no revision" if tenant.revision is None else f"is at revision {tenant.revision!r}"
    return f"its schema {at}, and compatible_revisions of this process are {', '.join(map(repr, compatible))}"
