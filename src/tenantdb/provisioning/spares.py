"""Spares: tenant databases made ahead, with roles and secrets of their own, that wait for whoever signs up.

Taking one is a single transaction on the registry: no provisioner, no connection to a server, a few milliseconds. A spare is complete in
everything that does not depend on the customer; what does is added by the seeds that take the tenant.
"""

from __future__ import annotations

import builtins
import logging
import time
from collections.abc import Callable

from tenantdb.errors import ConfigError, IllegalTransition, OperationFailed, OperationInProgress
from tenantdb.model import Tenant, TenantState
from tenantdb.provisioning.procedures import Runner
from tenantdb.registry import Taking
from tenantdb.registry.operations import PURGE, REFRESH, SPARE, Operation
from tenantdb.registry.tenants import SpareWish

logger = logging.getLogger("tenantdb.provisioning")


class Spares:
    """What `TenantDB.spares` is."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._registry = runner.shop.registry
        self._settings = runner.shop.settings
        self._hooks = runner.shop.hooks
        self._none_until: dict[tuple[str | None, str | None], float] = {}

    def list(self) -> list[Tenant]:
        """All spares, the oldest first; those without ``ready_at`` are being made or migrated, or failed to be."""
        return self._registry.tenants.spares()

    def fill(
        self, count: int | None = None, *, server: str | None = None, progress: Callable[[int, int], object] | None = None
    ) -> builtins.list[Tenant]:
        """Make spares until ``count`` are ready on each server of this process, or on one; None: as many as the setting ``spares`` says.

        What an earlier attempt left unfinished is finished first, and spares behind the head revision are migrated. Returns the spares
        that are ready. ``progress(done, total)`` counts those of one server. May be called by several processes at once, which then make
        more than one of them would, and may run again.

        Raises: `ConfigError` where this process has no provisioner; `OperationFailed`.
        """
        wanted = self._settings.spares if count is None else count
        names = [server] if server is not None else list(self._settings.provisioners)
        if not names or any(not self._runner.can_work_on(name) for name in names):
            raise ConfigError("spares are made by a process with a provisioner; give server=... or TENANTDB_SERVER")
        failures = [self._run(operation) for operation in self._unfinished(names)]
        self.refresh()
        for name in names:
            while (ready := self._count(name)) + len(self._unfinished([name])) < wanted:
                if progress is not None:
                    progress(ready, wanted)
                self._make(name)
            if self._count(name) < wanted and (failed := next(filter(None, failures), None)) is not None:
                raise failed
        return [spare for spare in self.list() if spare.ready_at is not None]

    def _count(self, server: str) -> int:
        return sum(1 for spare in self.list() if spare.server == server and spare.ready_at is not None)

    def _unfinished(self, names: builtins.list[str]) -> builtins.list[Operation]:
        """What is being made or migrated on some servers, or failed to be and is tried again."""
        servers = [server for server in self._runner.known_servers() if server.name in names]
        found = self._registry.operations.unfinished(kinds=[SPARE, REFRESH])
        return [each for each in found if self._runner.suits(each, self._registry.tenants.row(each.tenant_id).tenant, servers)]

    def refresh(self) -> int:
        """Migrate spares that are behind the head revision, and return how many were. Nobody can take one meanwhile.

        A spare at a revision that this process does not know is of newer code, and left to that.
        """
        golden, behind = self._runner.shop.golden, 0
        for spare in self.list():
            if spare.ready_at is not None and golden.is_behind(spare.revision) and self._runner.can_work_on(spare.server):
                with self._registry.admin_write() as connection:
                    mine = self._registry.tenants.set_ready(connection, spare, ready=False)
                    operation = self._registry.operations.create(connection, REFRESH, spare.id) if mine else None
                if operation is not None:
                    self._run(operation)
                    behind += 1
        return behind

    def drain(self) -> int:
        """Drop all spares that nobody is taking, and return how many. Raises: `OperationFailed`."""
        dropped = 0
        for spare in self.list():
            if self.retire(spare):
                dropped += 1
        return dropped

    def distrust(self) -> int:
        """After the registry was restored from an older backup: offer no spare of it to anybody, and drop none.

        Some may have been taken since and hold somebody's data. Returns how many there are. They keep a legal hold that says why; look into
        each before you `TenantDB.release` it, after which `drain` drops it.
        """
        spares = self.list()
        for spare in spares:
            with self._registry.admin_write() as connection:
                self._registry.tenants.set_ready(connection, spare, ready=False)
            self._registry.tenants.hold(spare, "the registry was restored from a backup; this spare may have been taken since")
        return len(spares)

    def retire(self, spare: Tenant) -> bool:
        """Drop one spare; False where somebody has taken it, or there is a legal hold on it. Raises: `OperationFailed`."""
        try:
            with self._registry.admin_write() as connection:
                self._registry.tenants.transition_in(
                    connection, spare, TenantState.PURGING, action="spare.retire", values={"ready_at": None}, held=False
                )
                operation = self._registry.operations.create(connection, PURGE, spare.id, payload={"spare": True})
        except IllegalTransition:
            return False
        self._runner.run_now(operation)
        return True

    def taking(self, server: str | None, region: str | None) -> Taking | None:
        """For a sign-up: which spares will do, and whether one is all that is needed. None where this process can make a database itself
        and has found no spare a moment ago."""
        if self._settings.provisioners and time.monotonic() < self._none_until.get((server, region), 0.0):
            return None
        known = self._settings.migrations is not None
        wish = SpareWish(self._runner.shop.golden.head() if known else None, server, region, known)
        return Taking(wish=wish, at_once=not self._hooks.seeds and not self._hooks.has_before("provision", "activate"))

    def none_found(self, server: str | None, region: str | None) -> None:
        """A sign-up came too late."""
        self._none_until[server, region] = time.monotonic() + self._settings.cache_ttl

    def _make(self, server: str) -> Tenant:
        self._none_until.clear()
        with self._registry.admin_write() as connection:
            spare = self._registry.tenants.create_spare(connection)
            operation = self._registry.operations.create(connection, SPARE, spare.id, payload={"server": server})
        return self._runner.run_now(operation)

    def _run(self, operation: Operation) -> OperationFailed | None:
        """Why it could not be finished, this time."""
        self._none_until.clear()
        try:
            self._runner.run_now(operation)
        except OperationInProgress:
            return None  # another process is at it
        except OperationFailed as error:
            logger.warning("a spare could not be finished: %s", error.explain())
            return error
        return None
