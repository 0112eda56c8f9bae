"""Whether rendered SQL does what the migrations do: both are tried on an empty database each, and the schemas compared.

Rendering is silent where a revision behaves differently without a connection, so nothing is believed that was not compared.
"""

from __future__ import annotations

import threading

from tenantdb.backends import backend
from tenantdb.connections.engines import Engines
from tenantdb.errors import TenantDBError, describe
from tenantdb.migrations.local import LocalScripts
from tenantdb.migrations.sqlplan import SQLPlan
from tenantdb.model import Server
from tenantdb.registry import Registry
from tenantdb.settings import SQLITE, Settings


class Proofs:
    """Remembers what was proved, for as long as the revision files stay as they are."""

    def __init__(self, registry: Registry, engines: Engines, settings: Settings) -> None:
        self._registry, self._engines, self._settings = registry, engines, settings
        self._known: dict[tuple[LocalScripts, SQLPlan], str | None] = {}
        self._lock = threading.Lock()

    def problem(self, local: LocalScripts, plan: SQLPlan) -> str | None:
        """Why the SQL must not be sent; None where it was proved."""
        with self._lock:
            key = local, plan
            if key not in self._known:
                self._known[key] = self._try(local, plan)
            return self._known[key]

    def _try(self, local: LocalScripts, plan: SQLPlan) -> str | None:
        server = self._somewhere()
        if server is None:
            return "it is proved on empty databases, and this process has no provisioner to make them"
        try:
            migrated = self._schema(server, local, plan, as_sql=False)
            sent = self._schema(server, local, plan, as_sql=True)
        except Exception as error:  # whatever a migration raises on an empty database
            return f"it could not be proved on an empty database: {describe(error)}"
        if migrated != sent:
            differing = sorted(set(migrated) ^ set(sent))
            return f"on an empty database it makes another schema than the migrations do ({differing[0][0]} {differing[0][1]})"
        return None

    def _schema(self, server: Server, local: LocalScripts, plan: SQLPlan, *, as_sql: bool) -> list[tuple[str, ...]]:
        with self._engines.scratch(server) as engine, engine.connect() as connection:
            if plan.from_revision is not None:
                local.run(connection, plan.from_revision)
            if as_sql:
                with connection.begin():
                    for statement in plan.statements:
                        connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
            else:
                local.run(connection, plan.to_revision)
            return [(line.kind, line.name, line.definition) for line in backend(server.backend).schema_lines(connection)]

    def _somewhere(self) -> Server | None:
        for name in self._settings.provisioners:
            try:
                server = self._registry.servers.get(name)
            except TenantDBError:
                continue  # `check` tells what is the matter with it
            if server.backend != SQLITE:
                return server
        return None
