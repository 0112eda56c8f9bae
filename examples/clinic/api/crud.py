"""The six routes that every table has, made from its store and its schemas.

Without `from __future__ import annotations`: FastAPI must see the classes that the annotations name, and they are arguments here.
"""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Response

from examples.clinic.api.depends import Registry, Worker, may
from examples.clinic.resources import Resource
from examples.clinic.roles import allowed
from examples.clinic.schemas import Page
from tenantdb.fastapi import AsyncTenantSession, AsyncTenantTransaction, CurrentIdentity, require_role


def crud_router(name: str, resource: Resource) -> APIRouter:
    """Routes under /`name`. Reads open a session, writes a transaction that is committed before the response leaves."""
    store, audited, erase = resource.store, resource.audited, resource.erase
    create, update, out, listing = resource.shapes.create, resource.shapes.update, resource.shapes.out, resource.shapes.listing
    router = APIRouter(prefix=f"/{name}", tags=[name])
    Reading = AsyncTenantSession if audited is None else AsyncTenantTransaction

    async def note(adb: Any, session: Any, action: str, row_id: UUID | None = None, **details: Any) -> None:
        if audited is not None:
            await adb.audit.record(session, f"{audited}.{action}", row_id, details=details)

    @router.get("", dependencies=[may(name, "read")], response_model=Page[out])  # type: ignore[valid-type]
    async def list_rows(session: Reading, adb: Registry, query: Annotated[listing, Query()]) -> Any:  # type: ignore[valid-type]
        rows, total = await session.run_sync(store.page, query)  # type: ignore[attr-defined]
        await note(adb, session, "list", shown=[str(row.id) for row in rows])
        return {"items": rows, "total": total, "limit": query.limit, "offset": query.offset}  # type: ignore[attr-defined]

    @router.post("", dependencies=[may(name, "create")], response_model=out, status_code=201)
    async def create_row(session: AsyncTenantTransaction, adb: Registry, worker: Worker, data: create) -> Any:  # type: ignore[valid-type]
        row = await session.run_sync(store.create, data)
        await note(adb, session, "create", row.id)
        resource.announce(session, row.id, worker)
        return row

    @router.get("/{row_id}", dependencies=[may(name, "read")], response_model=out)
    async def read_row(session: Reading, adb: Registry, row_id: UUID) -> Any:  # type: ignore[valid-type]
        row = await session.run_sync(store.find, row_id)  # type: ignore[attr-defined]
        await note(adb, session, "read", row_id)
        return row

    @router.patch("/{row_id}", dependencies=[may(name, "update")], response_model=out)
    async def update_row(session: AsyncTenantTransaction, adb: Registry, row_id: UUID, data: update) -> Any:  # type: ignore[valid-type]
        row = await session.run_sync(store.update, row_id, data)
        await note(adb, session, "update", row_id, fields=sorted(data.model_fields_set))  # type: ignore[attr-defined]
        return row

    if erase is None:

        @router.delete("/{row_id}", dependencies=[may(name, "delete")], status_code=204)
        async def delete_row(session: AsyncTenantTransaction, adb: Registry, row_id: UUID) -> Response:
            await session.run_sync(store.delete, row_id)
            await note(adb, session, "delete", row_id)
            return Response(status_code=204)

    else:
        may_erase = require_role(*allowed(name, "erase"))

        @router.delete("/{row_id}", dependencies=[may(name, "delete")], status_code=204)
        async def delete_or_erase_row(
            session: AsyncTenantTransaction, adb: Registry, identity: CurrentIdentity, row_id: UUID, permanent: bool = False
        ) -> Response:
            if permanent:
                await may_erase(identity)
            await session.run_sync(erase if permanent else store.delete, row_id)
            await note(adb, session, "erase" if permanent else "delete", row_id)
            return Response(status_code=204)

    @router.post("/{row_id}/restore", dependencies=[may(name, "restore")], response_model=out)
    async def restore_row(session: AsyncTenantTransaction, adb: Registry, row_id: UUID) -> Any:
        row = await session.run_sync(store.restore, row_id)
        await note(adb, session, "restore", row_id)
        return row

    return router
