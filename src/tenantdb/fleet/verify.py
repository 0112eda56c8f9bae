"""At which revision every tenant really is: one cheap read of each database, many at once, in the background class of the budget."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from uuid import UUID

from tenantdb.backends import ConnectFailed, backend
from tenantdb.connections.engines import Engines
from tenantdb.connections.ledger import Work
from tenantdb.errors import describe
from tenantdb.fleet.rollouts import run_loop
from tenantdb.migrations.tenants import found_revision
from tenantdb.model import DatabaseRole
from tenantdb.registry import Registry
from tenantdb.registry.records import TenantRecord
from tenantdb.registry.rollouts import Candidate
from tenantdb.settings import POSTGRESQL, Settings

_PAGE = 500
_UNDEFINED_TABLE = "42P01"


def revisions(
    registry: Registry,
    engines: Engines,
    settings: Settings,
    candidates: Sequence[Candidate],
    version_table: str,
    concurrency: int,
) -> tuple[Mapping[str, str | None], Mapping[str, str]]:
    """Revisions by slug, and problems by slug of those that could not be asked. ``concurrency`` databases of each server at once.

    Raises: `RegistryUnavailable`, `BudgetExhausted`.
    """
    found: dict[str, str | None] = {}
    problems: dict[str, str] = {}
    for first in range(0, len(candidates), _PAGE):
        page = candidates[first : first + _PAGE]
        run_loop(_ask(registry, engines, settings, page, version_table, concurrency, found, problems))
    return found, problems


async def _ask(
    registry: Registry,
    engines: Engines,
    settings: Settings,
    page: Sequence[Candidate],
    version_table: str,
    concurrency: int,
    found: dict[str, str | None],
    problems: dict[str, str],
) -> None:
    records: dict[UUID, TenantRecord] = {record.tenant.id: record for record in registry.tenants.owners([each.id for each in page])}
    waiting = {server: [each for each in page if each.server == server] for server in dict.fromkeys(each.server for each in page)}

    async def one(record: TenantRecord) -> str | None:
        location = engines.locate(record, DatabaseRole.OWNER)
        if location.server.backend != POSTGRESQL:
            return await asyncio.to_thread(found_revision, engines, record)
        query = f"SELECT version_num FROM {version_table}"
        rows = await backend(location.server.backend).send_script(location, settings, query)
        return str(rows[0][0]) if rows else None

    async def work(queue: list[Candidate], number: int) -> None:
        free = None
        try:
            while queue:
                each = queue.pop()
                record = records.get(each.id)
                if record is None or record.server is None:
                    problems[each.slug] = "it is gone"
                    continue
                if free is None and record.server.backend == POSTGRESQL:
                    free = await asyncio.to_thread(engines.take_place, record.server, "revisions", Work.BACKGROUND, number)
                try:
                    found[each.slug] = await one(record)
                except ConnectFailed as error:
                    problems[each.slug] = error.problem
                except Exception as error:
                    if getattr(error, "sqlstate", None) == _UNDEFINED_TABLE:
                        found[each.slug] = None
                    else:
                        problems[each.slug] = describe(error)
        finally:
            if free is not None:
                free()

    await asyncio.gather(*(work(queue, -2 - index) for queue in waiting.values() for index in range(min(concurrency, len(queue)))))
