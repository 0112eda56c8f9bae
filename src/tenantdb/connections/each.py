"""One function for many tenants, with a named result for each."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tenantdb.connections.engines import working
from tenantdb.connections.ledger import Work
from tenantdb.context import bind
from tenantdb.model import Tenant, TenantState
from tenantdb.registry import Registry

R = TypeVar("R")
_PAGE = 500


@dataclass(frozen=True)
class ForEachReport(Generic[R]):
    """What `TenantDB.for_each` did, by slug. ``failed`` holds the exceptions."""

    succeeded: Mapping[str, R] = field(default_factory=dict)
    failed: Mapping[str, Exception] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.failed


def for_each(registry: Registry, fn: Callable[[Tenant], R], *, state: TenantState | str, concurrency: int) -> ForEachReport[R]:
    """Call ``fn(tenant)`` with each tenant bound, ``concurrency`` at a time; one that raises does not stop the others."""
    succeeded: dict[str, R] = {}
    failed: dict[str, Exception] = {}

    def run(tenant: Tenant) -> R:
        with working(Work.BACKGROUND), bind(tenant, switch=True):
            return fn(tenant)

    def settle(done: set[Future[R]]) -> None:
        for future in done:
            tenant = running.pop(future)
            error = future.exception()
            if error is None:
                succeeded[tenant.slug] = future.result()
            elif isinstance(error, Exception):
                failed[tenant.slug] = error
            else:
                raise error  # KeyboardInterrupt, SystemExit

    running: dict[Future[R], Tenant] = {}
    with ThreadPoolExecutor(concurrency, thread_name_prefix="tenantdb-each") as executor:
        for tenant in _all(registry, state):
            if len(running) >= concurrency:  # so that memory does not grow with the fleet
                settle(wait(running, return_when=FIRST_COMPLETED).done)
            running[executor.submit(contextvars.copy_context().run, run, tenant)] = tenant
        settle(wait(running).done)
    return ForEachReport(succeeded, failed)


def _all(registry: Registry, state: TenantState | str) -> Iterator[Tenant]:
    last: str | None = None
    while page := registry.tenants.list(state, limit=_PAGE, after=last):
        yield from page
        last = page[-1].slug
