"""Carrying out what waits in the journal, and comparing what should be with what is on each server."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from tenantdb.errors import (
    ConfigError,
    OperationFailed,
    OperationInProgress,
    ProvisioningError,
    RegistryError,
    TenantDBError,
    describe_with_frames,
)
from tenantdb.model import TenantState
from tenantdb.provisioning.lease import LEASE, worker
from tenantdb.provisioning.procedures import PROCEDURES, Runner
from tenantdb.provisioning.spares import Spares
from tenantdb.registry.operations import Operation, OperationState

logger = logging.getLogger("tenantdb.provisioning")

_PLACELESS = frozenset({TenantState.PROVISIONING, TenantState.FAILED, TenantState.PURGING, TenantState.PURGED})
"""Whose database may be missing: it is being made or dropped."""


@dataclass(frozen=True, slots=True)
class Orphan:
    """Something without its other half. ``kind``: a ``database`` or ``role`` on the server that no row of the registry knows, or a
    ``row`` whose database is not there. Nothing is done about it: it may be all that is left of somebody's data."""

    server: str
    kind: str
    name: str
    tenant: str | None = None


@dataclass(frozen=True, slots=True)
class Resumed:
    """What `TenantDB.resume` did: operations finished, as (tenant, kind), those that failed again, as (tenant, kind, problem), those that
    another worker is at, and what `Orphan` tells."""

    finished: Sequence[tuple[str, str]]
    failed: Sequence[tuple[str, str, str]]
    in_progress: Sequence[tuple[str, str]]
    orphans: Sequence[Orphan]


class Worker:
    """Takes operations from the journal."""

    def __init__(self, runner: Runner, spares: Spares) -> None:
        self._runner = runner
        self._spares = spares
        self._registry = runner.shop.registry
        self._settings = runner.shop.settings

    def work(self, *, stop: threading.Event | None, poll: float) -> int:
        if not self._settings.provisioners:
            raise ConfigError("a worker creates databases; give server=... or TENANTDB_SERVER")
        done = 0
        while stop is None or not stop.is_set():
            try:
                worked = self._next()
                if worked is None:
                    self._prepare()
            except RegistryError as error:
                if stop is None:
                    raise
                logger.warning("the registry cannot be asked for work: %s", error.explain())
                stop.wait(poll)
                continue
            if worked:
                done += 1
            elif worked is None and stop is None:
                break
            elif worked is None and stop is not None:
                stop.wait(poll)
        return done

    def _next(self) -> bool | None:
        """Whether an operation was done; None where none waits."""
        with self._runner.turns:
            claimed = self._runner.claim_next(dead=self._runner.dead_workers())
            if claimed is None:
                return None
            try:
                self._runner.carry_out(claimed)
            except (ProvisioningError, OperationFailed) as error:
                told = describe_with_frames(error.__cause__ or error)
                logger.error("%s of %s failed at step %s, and the journal says why. %s", claimed.kind, error.tenant, error.step, told)
                return False
            return True

    def _prepare(self) -> None:
        """With nothing else to do: golden databases at the head, and spares. What cannot be made now is tried again."""
        try:
            for server in self._registry.servers.list():
                if server.name in self._settings.provisioners:
                    self._runner.shop.golden.prepare(server, self._runner.shop.workshop)
            if self._settings.spares:
                self._spares.fill()
        except RegistryError:
            raise
        except TenantDBError as error:
            logger.warning("golden databases or spares could not be made: %s", error.explain())
        except Exception as error:  # of a migration or a seed
            logger.error("golden databases or spares could not be made: %s", describe_with_frames(error))

    def resume(self) -> Resumed:
        finished: list[tuple[str, str]] = []
        failed: list[tuple[str, str, str]] = []
        in_progress: list[tuple[str, str]] = []
        dead = self._runner.dead_workers()
        for operation in self._registry.operations.unfinished(kinds=tuple(PROCEDURES)):
            if operation.state is OperationState.FAILED:  # that runs again only when it is asked for by name
                continue
            tenant = self._registry.tenants.row(operation.tenant_id).tenant
            if not self._runner.can_work_on(tenant.server):
                continue
            try:
                carried_out = self._resume(operation, dead)
            except (ProvisioningError, OperationFailed) as error:
                failed.append((tenant.slug, operation.kind, error.problem))
            except OperationInProgress:
                in_progress.append((tenant.slug, operation.kind))
            else:
                (finished if carried_out else in_progress).append((tenant.slug, operation.kind))
        return Resumed(tuple(finished), tuple(failed), tuple(in_progress), tuple(self.orphans()))

    def _resume(self, operation: Operation, dead: Sequence[str]) -> bool:
        with self._runner.turns:
            claimed = self._registry.operations.claim(operation.id, worker(), LEASE, dead=dead)
            if claimed is None:
                return False
            self._runner.carry_out(claimed)
            return True

    # -- reconciling -------------------------------------------------------------------------------------------------------------------

    def orphans(self) -> list[Orphan]:
        """Compare every server that this process has a provisioner for with the registry."""
        found: list[Orphan] = []
        for server in self._registry.servers.list():
            if server.name not in self._settings.provisioners:
                continue
            before = self._registry.tenants.on_server(server)
            with self._runner.shop.workshop(server) as workshop:
                self._runner.shop.golden.drop_retired(server, workshop)
                databases, roles = workshop.ours()
                missing = [tenant for tenant in before if tenant.database and not workshop.find_database(tenant.database)]
            rows = self._registry.tenants.on_server(server)  # read after the server: whatever is made has a row first
            templates = self._registry.templates.list(server)
            known = {tenant.database for tenant in rows} | {template.database for template in templates}
            known_roles = {role for tenant in rows for role in (tenant.owner_role, tenant.runtime_role)}
            known_roles |= {template.owner_role for template in templates}
            found += [Orphan(server.name, "database", name) for name in sorted(databases - known)]
            found += [Orphan(server.name, "role", name) for name in sorted(roles - known_roles)]
            still = {tenant.id: tenant for tenant in rows}
            for tenant in missing:
                now = still.get(tenant.id)
                unready = now is not None and now.state is TenantState.SPARE and now.ready_at is None
                if now is not None and now.state not in _PLACELESS and not unready and now.database is not None:
                    found.append(Orphan(server.name, "row", now.database, now.slug))
        return found
