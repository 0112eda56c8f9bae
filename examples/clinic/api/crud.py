"""The six routes that every table has, made from its store and its schemas.

Without `from __future__ import annotations`: FastAPI must see the classes that the annotations name, and they are arguments here.
"""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Response

from examples.clinic.roles import may
from examples.clinic.schemas import Page, Shapes
from examples.clinic.store import Store
from tenantdb.fastapi import AsyncTenantSession, AsyncTenantTransaction


def crud_router(name: str, store: Store[Any], shapes: Shapes) -> APIRouter:
    """Routes under /`name`. Reads open a session, writes a transaction that is committed before the response leaves."""
    create, update, out, listing = shapes.create, shapes.update, shapes.out, shapes.listing
    router = APIRouter(prefix=f"/{name}", tags=[name])

    @router.get("", dependencies=[may(name, "read")], response_model=Page[out])  # type: ignore[valid-type]
    async def list_rows(session: AsyncTenantSession, query: Annotated[listing, Query()]) -> Any:  # type: ignore[valid-type]
        rows, total = await session.run_sync(store.page, query)
        return {"items": rows, "total": total, "limit": query.limit, "offset": query.offset}  # type: ignore[attr-defined]

    @router.post("", dependencies=[may(name, "create")], response_model=out, status_code=201)
    async def create_row(session: AsyncTenantTransaction, data: create) -> Any:  # type: ignore[valid-type]
        return await session.run_sync(store.create, data)

    @router.get("/{row_id}", dependencies=[may(name, "read")], response_model=out)
    async def read_row(session: AsyncTenantSession, row_id: UUID) -> Any:
        return await session.run_sync(store.find, row_id)

    @router.patch("/{row_id}", dependencies=[may(name, "update")], response_model=out)
    async def update_row(session: AsyncTenantTransaction, row_id: UUID, data: update) -> Any:  # type: ignore[valid-type]
        return await session.run_sync(store.update, row_id, data)

    @router.delete("/{row_id}", dependencies=[may(name, "delete")], status_code=204)
    async def delete_row(session: AsyncTenantTransaction, row_id: UUID) -> Response:
        await session.run_sync(store.delete, row_id)
        return Response(status_code=204)

    @router.post("/{row_id}/restore", dependencies=[may(name, "restore")], response_model=out)
    async def restore_row(session: AsyncTenantTransaction, row_id: UUID) -> Any:
        return await session.run_sync(store.restore, row_id)

    return router
