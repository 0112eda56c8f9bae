"""How many of a server's connections this process may hold."""

from __future__ import annotations

from tenantdb.connections.ledger import Limits
from tenantdb.errors import ConfigError
from tenantdb.model import Server
from tenantdb.settings import SQLITE, Settings

_HEADROOM = 20  # one in so many connections stays free of background work


def limits_of(settings: Settings, server: Server) -> Limits:
    """This process's share of the budget of one server, less what its registry takes of the same server. Raises: `ConfigError`."""
    budget = settings.budget
    share = budget.connections // budget.share_of
    registry = registry_connections(settings) if registry_is_on(settings, server) else 0
    own = share - registry
    if own < 1:
        pool = f"registry_pool_size={settings.registry_pool_size} and one that listens"
        taken = f", of which the registry on the same server takes {pool}" if registry else ""
        raise ConfigError(
            f"budget.connections={budget.connections} between budget.processes={budget.share_of} is {share} for each{taken}:"
            f" nothing is left for the tenants of server {server.name!r}"
        )
    return Limits(
        connections=own,
        per_tenant=min(budget.per_tenant, own),
        background=budget.background,
        administration=budget.administration,
        headroom=own // _HEADROOM,
        max_waiting=budget.max_waiting,
        idle_timeout=budget.idle_timeout,
    )


def registry_connections(settings: Settings) -> int:
    """How many connections one process holds to its registry at most: those of the pool, and one that listens (`TenantDB.watch`)."""
    return settings.registry_pool_size + 1


def registry_is_on(settings: Settings, server: Server) -> bool:
    """Whether the registry's own connections are connections of this server, as far as addresses tell."""
    if server.backend == SQLITE:
        return False
    return any(settings.url.leads_to(host, port) for host, port in ((server.host, server.port), (server.direct_host, server.direct_port)))
