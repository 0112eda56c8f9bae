"""Carrying out what waits in the journal, and comparing what should be with what is on each server."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tenantdb.errors import (
    BudgetExhausted,
    ConfigError,
    OperationFailed,
    OperationInProgress,
    ProvisioningError,
    RegistryError,
    ServerUnavailable,
    TenantDBError,
    describe_with_frames,
)
from tenantdb.model import Server, TenantState
from tenantdb.provisioning.lease import LEASE, worker
from tenantdb.provisioning.procedures import PROCEDURES, Runner
from tenantdb.provisioning.spares import Spares
from tenantdb.registry.operations import Operation, OperationState

logger = logging.getLogger("tenantdb.provisioning")

_LONGEST_WAIT = 300  # seconds

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
    another worker is at, and what `Orphan` tells; servers that could not be compared, as (name, problem)."""

    finished: Sequence[tuple[str, str]]
    failed: Sequence[tuple[str, str, str]]
    in_progress: Sequence[tuple[str, str]]
    orphans: Sequence[Orphan]
    unreachable: Sequence[tuple[str, str]] = ()


class Worker:
    """Takes operations from the journal."""

    def __init__(self, runner: Runner, spares: Spares) -> None:
        self._runner = runner
        self._spares = spares
        self._registry = runner.shop.registry
        self._settings = runner.shop.settings
        self._failures: dict[str, tuple[int, float]] = {}  # how often nothing could be prepared on a server, and when to try again

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
        claimed = self._runner.claim_next(dead=self._runner.dead_workers())
        if claimed is None:
            return None
        with self._runner.turn(claimed):
            try:
                self._runner.carry_out(claimed, patient=True)
            except (ProvisioningError, OperationFailed) as error:
                told = describe_with_frames(error.__cause__ or error)
                logger.error("%s of %s failed at step %s, and the journal says why. %s", claimed.kind, error.tenant, error.step, told)
                return False
            return True

    def _prepare(self) -> None:
        """With nothing else to do: golden databases at the head, and spares. On a server where that fails it is tried again after a while,
        each time a longer one."""
        for server in self._runner.known_servers():
            failures, not_before = self._failures.get(server.name, (0, 0.0))
            if time.monotonic() < not_before:
                continue
            try:
                self._runner.shop.golden.prepare(server, self._runner.shop.workshop)
                if self._settings.spares:
                    self._spares.fill(server=server.name)
            except RegistryError:
                raise
            except Exception as error:  # of a migration or a seed, too
                self._failures[server.name] = failures + 1, time.monotonic() + min(2 ** min(failures, 9), _LONGEST_WAIT)
                told = error.explain() if isinstance(error, TenantDBError) else describe_with_frames(error)
                logger.error("no golden database or spare could be made on server %s: %s", server.name, told)
            else:
                self._failures.pop(server.name, None)

    def resume(self) -> Resumed:
        finished: list[tuple[str, str]] = []
        failed: list[tuple[str, str, str]] = []
        in_progress: list[tuple[str, str]] = []
        unreachable: list[tuple[str, str]] = []
        dead, servers = self._runner.dead_workers(), self._runner.known_servers()
        for operation in self._registry.operations.unfinished(kinds=tuple(PROCEDURES)):
            if operation.state is OperationState.FAILED:  # that runs again only when it is asked for by name
                continue
            name = str(operation.tenant_id)
            try:
                tenant = self._registry.tenants.row(operation.tenant_id).tenant
                if not self._runner.suits(operation, tenant, servers):
                    continue
                name = tenant.slug
                carried_out = self._resume(operation, dead)
            except OperationInProgress:
                in_progress.append((name, operation.kind))
            except RegistryError:
                raise
            except TenantDBError as error:
                failed.append((name, operation.kind, getattr(error, "problem", None) or error.explain()))
            else:
                (finished if carried_out else in_progress).append((name, operation.kind))
        orphans: list[Orphan] = []
        for server in servers:
            try:
                orphans += self._orphans_on(server)
            except (ServerUnavailable, BudgetExhausted) as error:
                unreachable.append((server.name, error.explain()))
        return Resumed(tuple(finished), tuple(failed), tuple(in_progress), tuple(orphans), tuple(unreachable))

    def _resume(self, operation: Operation, dead: Sequence[str]) -> bool:
        with self._runner.turn(operation):
            claimed = self._registry.operations.claim(operation.id, worker(), LEASE, dead=dead)
            if claimed is None:
                return False
            self._runner.carry_out(claimed)
            return True

    # -- reconciling -------------------------------------------------------------------------------------------------------------------

    def _orphans_on(self, server: Server) -> list[Orphan]:
        """Compare a server with the registry, which is read before and after: what is made has a row first, and what is dropped, last."""
        tenants, templates = self._registry.tenants, self._registry.templates
        before, golden = tenants.on_server(server), templates.list(server)
        with self._runner.shop.workshop(server) as workshop:
            self._runner.shop.golden.drop_retired(server, workshop)
            databases, roles = workshop.ours()
            missing = [tenant for tenant in before if tenant.database and not workshop.find_database(tenant.database)]
        after = tenants.on_server(server)
        golden += templates.list(server)
        known = {tenant.database for tenant in before + after} | {template.database for template in golden}
        known_roles = {role for tenant in before + after for role in (tenant.owner_role, tenant.runtime_role)}
        known_roles |= {template.owner_role for template in golden}
        found = [Orphan(server.name, "database", name) for name in sorted(databases - known)]
        found += [Orphan(server.name, "role", name) for name in sorted(roles - known_roles)]
        still = {tenant.id: tenant for tenant in after}
        for tenant in missing:
            now = still.get(tenant.id)
            unready = now is not None and now.state is TenantState.SPARE and now.ready_at is None
            if now is not None and now.state not in _PLACELESS and not unready and now.database is not None:
                found.append(Orphan(server.name, "row", now.database, now.slug))
        return found
