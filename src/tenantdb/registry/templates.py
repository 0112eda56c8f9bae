"""The golden databases: migrated once per server and head revision, and cloned for every new tenant.

One is built at a time per server: who builds holds its row by a lease, and the others wait for it. A new one stands beside the old before
it is used, so that nothing is ever cloned half-made. The newest two of a server are kept, because in a rolling deploy old and new code
want different ones.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, insert, select, update

from tenantdb.errors import OperationInProgress
from tenantdb.model import Server, Template, TemplateState
from tenantdb.registry import tables
from tenantdb.registry.operations import now_at
from tenantdb.registry.transactions import Transactions

KEPT = 2

_templates = tables.templates


class TemplateStore:
    """Reads and writes templates, with the login that owns the registry."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    def find(self, server: Server, revision: str | None, digest: str) -> Template | None:
        """The one in use."""
        with self._transactions.read() as connection:
            return _find(connection, server, revision, digest, TemplateState.CURRENT)

    def list(self, server: Server | None = None) -> list[Template]:
        """All of them, or a server's, the newest first."""
        query = select(_templates).order_by(_templates.c.created_at.desc(), _templates.c.id)
        if server is not None:
            query = query.where(_templates.c.server_id == server.id)
        with self._transactions.read() as connection:
            return [_template(row) for row in connection.execute(query).mappings()]

    def begin(
        self,
        server: Server,
        revision: str | None,
        digest: str,
        *,
        database: str,
        owner_role: str | None,
        worker: str,
        lease: timedelta,
        dead: Collection[str] = (),
    ) -> Template | None:
        """Take it upon oneself to build one; None where another worker is at it on this server, or has just finished.

        A worker that died leaves a row whose lease ends, or whose worker is ``dead``: it is retired, and what it made is dropped with the
        other retired ones.
        """
        with self._transactions.admin_write() as connection:
            connection.execute(select(tables.servers.c.id).where(tables.servers.c.id == server.id).with_for_update())  # one at a time
            now = now_at(connection)
            building = (_templates.c.server_id == server.id) & (_templates.c.state == TemplateState.BUILDING.value)
            left = (_templates.c.lease_until <= now) | _templates.c.worker.in_(dead)
            connection.execute(update(_templates).where(building & left).values(state=TemplateState.RETIRED.value))
            if connection.execute(select(_templates.c.id).where(building)).first() is not None:
                return None
            # In this order: one that is switched to in between is seen by the second look.
            if _find(connection, server, revision, digest, TemplateState.CURRENT) is not None:
                return None
            values: dict[str, Any] = {
                "id": uuid.uuid4(),
                "server_id": server.id,
                "revision": revision,
                "digest": digest,
                "database": database,
                "owner_role": owner_role,
                "state": TemplateState.BUILDING,
                "worker": worker,
            }
            written = {**values, "state": TemplateState.BUILDING.value, "lease_until": now + lease, "created_at": now, "updated_at": now}
            connection.execute(insert(_templates).values(written))
            return Template(**values)

    def renew(self, template: Template, lease: timedelta) -> None:
        """Hold on to what is being built."""
        with self._transactions.admin_write() as connection:
            mine = (_templates.c.id == template.id) & (_templates.c.state == TemplateState.BUILDING.value)
            connection.execute(update(_templates).where(mine).values(lease_until=now_at(connection) + lease))

    def switch(self, template: Template) -> None:
        """It is whole: use it from now on, and retire what is older than the newest `KEPT`. Raises: `OperationInProgress` where the
        lease has ended and another has taken over."""
        with self._transactions.admin_write() as connection:
            mine = (_templates.c.id == template.id) & (_templates.c.state == TemplateState.BUILDING.value)
            values = {"state": TemplateState.CURRENT.value, "worker": None, "lease_until": None, "updated_at": tables.utcnow()}
            if connection.execute(update(_templates).where(mine).values(values)).rowcount == 0:
                raise OperationInProgress(template.database)
            current = (_templates.c.server_id == template.server_id) & (_templates.c.state == TemplateState.CURRENT.value)
            newest = connection.scalars(select(_templates.c.id).where(current).order_by(_templates.c.created_at.desc())).all()
            connection.execute(update(_templates).where(_templates.c.id.in_(newest[KEPT:])).values(state=TemplateState.RETIRED.value))

    def retire(self, template: Template) -> None:
        """Use it no more."""
        with self._transactions.admin_write() as connection:
            connection.execute(update(_templates).where(_templates.c.id == template.id).values(state=TemplateState.RETIRED.value))

    def forget(self, template: Template) -> None:
        """A retired one was dropped."""
        with self._transactions.admin_write() as connection:
            gone = (_templates.c.id == template.id) & (_templates.c.state == TemplateState.RETIRED.value)
            connection.execute(delete(_templates).where(gone))


def _find(connection: Connection, server: Server, revision: str | None, digest: str, state: TemplateState) -> Template | None:
    where = (_templates.c.server_id == server.id) & (_templates.c.digest == digest) & (_templates.c.state == state.value)
    where &= _templates.c.revision.is_not_distinct_from(revision)
    row = connection.execute(select(_templates).where(where).order_by(_templates.c.created_at.desc()).limit(1)).mappings().first()
    return None if row is None else _template(row)


def _template(row: RowMapping) -> Template:
    values = {name: row[name] for name in Template.__dataclass_fields__}
    return Template(**{**values, "state": TemplateState(row["state"])})
