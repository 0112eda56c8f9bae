"""One tenant's upgrade in a process of its own, by stock Alembic and the application's whole ``env.py``: for revisions whose helpers use
Alembic's process-global ``op``. What the parent sends is pickled through a pipe; the password is on no command line."""

from __future__ import annotations

import multiprocessing
import os
import threading
from dataclasses import dataclass, field

from pydantic import SecretStr
from sqlalchemy import event
from sqlalchemy.engine import Connection

from tenantdb.backends import Location
from tenantdb.backends.base import milliseconds
from tenantdb.connections.engines import Engines
from tenantdb.connections.locate import Locator
from tenantdb.migrations.scripts import Scripts, current_revision
from tenantdb.model import DatabaseRole, Server, Tenant
from tenantdb.registry.records import TenantRecord
from tenantdb.settings import Settings


@dataclass(frozen=True)
class Errand:
    """What a child needs to know. ``settings`` without a key service, which may not be picklable and is not needed there."""

    tenant: Tenant
    server: Server
    password: SecretStr = field(repr=False)
    settings: Settings
    location: str
    target: str
    down: bool
    statement_timeout: float | None = None


class _Here(Locator):
    """Knows one tenant's place, without a registry."""

    def __init__(self, errand: Errand) -> None:
        self._errand = errand

    def locate(self, record: TenantRecord, role: DatabaseRole) -> Location:
        return Location(record.tenant, self._errand.server, role, self._errand.password.get_secret_value)


def end_with_parent() -> None:
    """Begin to watch the parent, without which a worker would wait for its next errand for ever; the server undoes what was under way."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, name="tenantdb-parent", daemon=True).start()


def upgrade(errand: Errand) -> tuple[str | None, str | None]:
    """Bring the tenant to the target; returns the revision before and after. Raises: as `Scripts.upgrade`."""
    engines, scripts = Engines(_Here(errand), errand.settings), Scripts(errand.location)
    record = TenantRecord(tenant=errand.tenant, server=errand.server)
    try:
        with engines.passing(record, DatabaseRole.OWNER) as engine:
            if errand.statement_timeout is not None and engine.dialect.name == "postgresql":
                most = milliseconds(errand.statement_timeout)

                @event.listens_for(engine, "begin")
                def limit(connection: Connection) -> None:
                    connection.exec_driver_sql(f"SET LOCAL statement_timeout = {most}")

            with engine.connect() as connection:
                before = current_revision(connection)
            after = scripts.downgrade(engine, errand.target) if errand.down else scripts.upgrade(engine, errand.target)
    finally:
        engines.close()
    return before, after
