"""fastapi-tenancy from PyPI: its database-per-tenant provider with its own cache of engines, and its middleware. asyncio only.

The provider renders one URL template with one login for all tenants. Here each tenant has a login of its own, so the one method that makes
the URL is overridden, and takes it from the tenant's ``database_url`` field. Engines, their cache and the session are the provider's own.

Its cache evicts engines that are in use: their leases go on, and whoever still waits for such an engine opens a connection in a pool that
the cache has forgotten. Nothing bounds the connections of all tenants together, so the application has to, with a semaphore of
``concurrency`` around each session: ``engines`` cached connections and as many leases of evicted engines make the limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext

from fastapi_tenancy.core.config import TenancyConfig
from fastapi_tenancy.core.types import IsolationStrategy, ResolutionStrategy, Tenant
from fastapi_tenancy.isolation.database import DatabaseIsolationProvider
from fastapi_tenancy.manager import TenancyManager
from fastapi_tenancy.middleware.tenancy import TenancyMiddleware
from fastapi_tenancy.storage.memory import InMemoryTenantStore
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.types import ASGIApp

from benchmarks.peers import Logins


class OwnLogins(DatabaseIsolationProvider):
    """The provider, with each tenant's own URL."""

    def _tenant_url(self, tenant: Tenant) -> str:
        return tenant.database_url or super()._tenant_url(tenant)


class FastAPITenancy:
    """``engines`` cached engines of one connection each; ``concurrency`` sessions at a time, None for as many as come."""

    def __init__(self, logins: Logins, *, engines: int, concurrency: int | None) -> None:
        self._tenants = _tenants(logins)
        any_url = next(iter(self._tenants.values())).database_url or ""
        config = TenancyConfig(
            database_url=any_url,  # the provider's engine for making databases, which is never connected here
            database_url_template=any_url + "#{database_name}",  # asked for by the configuration; `OwnLogins` goes before it
            isolation_strategy=IsolationStrategy.DATABASE,
            max_cached_engines=engines,
            database_pool_size=1,
            database_max_overflow=0,
            database_pool_pre_ping=False,  # a round trip per request more, which no other side pays
        )
        self._provider = OwnLogins(config)
        self._semaphore = nullcontext() if concurrency is None else asyncio.Semaphore(concurrency)

    @asynccontextmanager
    async def async_session(self, slug: str) -> AsyncIterator[AsyncSession]:
        async with self._semaphore, self._provider.get_session(self._tenants[slug]) as session:
            yield session

    async def close(self) -> None:
        await self._provider.close()


def _tenants(logins: Logins) -> Mapping[str, Tenant]:
    return {
        slug: Tenant(
            id=slug,
            identifier=slug,
            name=slug,
            database_url=login.url.set(password=str(login.connect_args["password"]))
            .update_query_dict({name: str(value) for name, value in login.connect_args.items() if name != "password"})
            .render_as_string(hide_password=False),
        )
        for slug, login in logins.items()
    }


async def middleware(app: ASGIApp, slugs: Iterable[str], *, key: str, claim: str, audience: str, exempt: Sequence[str]) -> ASGIApp:
    """Its middleware in front of ``app``, at its fastest: tokens name the tenant's slug in ``claim``, tenants are in its cache in memory.

    Behind the cache is its store in memory, so that an entry which expires costs nothing either. Membership it does not know.
    """
    store = InMemoryTenantStore()
    for slug in slugs:
        await store.create(Tenant(id=slug, identifier=slug, name=slug))
    url = "postgresql+psycopg://nobody@localhost/nothing"  # never connected
    config = TenancyConfig(
        database_url=url,
        database_url_template=url + "#{database_name}",
        isolation_strategy=IsolationStrategy.DATABASE,
        resolution_strategy=ResolutionStrategy.JWT,
        jwt_secret=key,
        jwt_tenant_claim=claim,
        jwt_audience=audience,
        l1_cache_enabled=True,
    )
    return TenancyMiddleware(app, TenancyManager(config, store), excluded_paths=list(exempt))
