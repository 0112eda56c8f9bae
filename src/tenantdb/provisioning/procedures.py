"""Every procedure by its kind, and the one place that carries them out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import Any

from tenantdb.errors import CredentialTampered, NoServerAvailable, OperationInProgress, ProvisioningError
from tenantdb.model import Server, Tenant
from tenantdb.provisioning import adopting, ending, importing, rotation, steps
from tenantdb.provisioning.journal import Procedure, Step, carry_out
from tenantdb.provisioning.lease import LEASE, dead, worker
from tenantdb.provisioning.work import Shop, Work
from tenantdb.registry import operations as kinds
from tenantdb.registry.operations import Operation, OperationState
from tenantdb.registry.records import TenantRecord

logger = logging.getLogger("tenantdb.provisioning")

_SEED = Step("seed", steps.seed, steps.lacks_rows)
_MAKE = (
    Step("reserve", steps.reserve),
    Step("database", steps.make_database),
    Step("migrate", steps.migrate, steps.is_behind),
    _SEED,
)
_ASK_FIRST = Step("ask first", steps.ask_first, steps.wants_to_be_asked_first)
_ASK = Step("ask", steps.ask, steps.wants_to_be_asked)
_DRAW = Step("draw", rotation.draw_passwords)
_CHANGE = Step("change", rotation.change_passwords)
_FILL = (
    Step("reserve", steps.reserve),
    Step("database", importing.create_database),
    Step("open", steps.open_database),
    Step("load", importing.load),
    Step("migrate", steps.migrate, steps.is_behind),
)
_FENCE = Step("fence", ending.fence)
_LIFT = Step("lift", ending.lift)

PROCEDURES: Mapping[str, Procedure] = {
    kinds.PROVISION: Procedure((*_MAKE, _ASK), end=steps.serve, makes=True),
    kinds.TAKE: Procedure((_ASK_FIRST, _SEED, _ASK), end=steps.serve, makes=True),
    kinds.SPARE: Procedure(_MAKE, end=steps.offer, insists=True),
    kinds.REFRESH: Procedure((Step("migrate", steps.migrate, steps.is_behind),), end=steps.offer, insists=True),
    kinds.IMPORT: Procedure((*_FILL, _ASK), end=steps.serve, makes=True),
    kinds.CLONE: Procedure((*_FILL, Step("neutralise", importing.neutralise), _ASK), end=steps.serve, makes=True),
    kinds.ADOPT: Procedure(
        (
            Step("reserve", adopting.reserve),
            Step("roles", adopting.create_roles),
            Step("convert", adopting.convert),
            Step("check", adopting.check),
            _ASK,
        ),
        end=adopting.serve,
        makes=True,
    ),
    kinds.FENCE: Procedure((_FENCE,), insists=True),
    kinds.ACTIVATE: Procedure((_LIFT,), end=ending.serve_again, insists=True),
    kinds.RESTORE: Procedure((_LIFT,), end=ending.serve_again, insists=True),
    kinds.ROTATE: Procedure((_DRAW, _CHANGE, Step("drain", rotation.drain)), insists=True),
    kinds.PURGE: Procedure(
        (_FENCE, Step("database", ending.drop_database), Step("roles", ending.drop_roles)), end=ending.erase, insists=True
    ),
    kinds.GIVE_BACK: Procedure((_FENCE, Step("hand_back", adopting.hand_back), Step("roles", ending.drop_roles)), end=adopting.let_go),
}

_ANNOUNCED = {
    kinds.PROVISION: ("provision", "activate"),
    kinds.TAKE: ("provision", "activate"),
    kinds.IMPORT: ("provision", "activate"),
    kinds.CLONE: ("provision", "activate"),
    kinds.ADOPT: ("adopt", "activate"),
    kinds.GIVE_BACK: ("give_back",),
    kinds.ACTIVATE: ("activate",),
    kinds.RESTORE: ("restore",),
    kinds.PURGE: ("purge",),
    kinds.ROTATE: ("rotate_credentials",),
}
"""A tenant is suspended or deleted by the call, so those are announced there."""

_LONG = frozenset({kinds.ROTATE, kinds.IMPORT, kinds.CLONE})

_PATIENCE = 5.0  # seconds that a call waits for another operation on the same tenant
_POLL = 0.02


class Runner:
    """Claims operations and carries them out."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        # Each operation holds one of the provisioner's few connections, and a server copies one database after another anyway, so a crowd
        # of sign-ups waits here instead of failing there.
        self.turns = threading.BoundedSemaphore(2)
        self._long_turns = threading.BoundedSemaphore(2)  # what waits for people's sessions or files must not keep sign-ups waiting

    def can_work_on(self, server: str | None) -> bool:
        """Whether this process has a provisioner for a server; for what has no place yet, any."""
        return bool(self.shop.settings.provisioners) if server is None else server in self.shop.settings.provisioners

    def known_servers(self) -> list[Server]:
        """The servers of the registry that this process has a provisioner for. One whose row was edited is left out, and logged."""
        found = []
        for name in self.shop.settings.provisioners:
            try:
                found.append(self.shop.registry.servers.get(name))
            except NoServerAvailable:
                continue  # `tenantdb init` registers it
            except CredentialTampered as error:
                logger.error("nothing is done on server %s: %s", name, error.explain())
        return found

    def prepare_templates(self) -> None:
        """Golden databases at the head revision on every server of this process. Raises: as `Golden.template`."""
        for server in self.known_servers():
            self.shop.golden.prepare(server, self.shop.workshop)

    def suits(self, operation: Operation, tenant: Tenant, servers: Collection[Server]) -> bool:
        """Whether this process can carry an operation out: it has a provisioner for the tenant's server, or for one where it may get a
        place."""
        if tenant.server is not None:
            return any(server.name == tenant.server for server in servers)
        named, region = operation.payload.get("server"), operation.payload.get("region")
        return any(named in (None, server.name) and region in (None, server.region) for server in servers)

    def turn(self, operation: Operation) -> threading.BoundedSemaphore:
        """What to hold while it is carried out."""
        return self._long_turns if operation.kind in _LONG else self.turns

    def dead_workers(self) -> list[str]:
        """Workers of this machine that hold operations and are there no more."""
        return dead(self.shop.registry.operations.workers())

    def claim(self, operation: Operation) -> Operation | None:
        """Take one operation; None where it is done, or another is at work on the tenant and stays so for some seconds."""
        operations = self.shop.registry.operations
        deadline = time.monotonic() + _PATIENCE
        while (claimed := operations.claim(operation.id, worker(), LEASE, dead=self.dead_workers())) is None:
            now = operations.get(operation.id)
            if now is None or now.state is OperationState.DONE or time.monotonic() > deadline:
                return None
            threading.Event().wait(_POLL)
        return claimed

    def claim_next(self, *, dead: Collection[str]) -> Operation | None:
        """Take the oldest operation that waits and that this process can carry out."""
        servers = self.known_servers()
        return self.shop.registry.operations.claim_next(worker(), LEASE, kinds=tuple(PROCEDURES), servers=servers, dead=dead)

    def carry_out(
        self,
        operation: Operation,
        wanted: Mapping[str, Any] | None = None,
        *,
        record: TenantRecord | None = None,
        patient: bool = False,
    ) -> Tenant:
        """Run one that this process has claimed; ``record`` where it was just written, ``patient`` where nobody waits for it.

        Raises: `ProvisioningError`, `OperationFailed`.
        """
        # ``wanted`` is what a repeated call asks for now; where it leaves open, the operation's own wishes hold.
        wanted = {**operation.payload, **{name: value for name, value in (wanted or {}).items() if value is not None}}
        registry = self.shop.registry
        try:
            record = record or registry.tenants.row(operation.tenant_id)
        except CredentialTampered as error:  # nothing can be done with its server; a worker must not stumble over it again and again
            if PROCEDURES[operation.kind].insists:
                registry.operations.postpone(operation, error.explain(), timedelta(minutes=5))
            else:
                registry.operations.fail(operation, error.explain())
            raise ProvisioningError(str(operation.tenant_id), operation.step or "start", error.explain()) from error
        tenant = carry_out(Work(self.shop, operation, record, wanted), PROCEDURES[operation.kind], patient=patient)
        self.shop.engines.forget(tenant.id)
        self.announce(operation, tenant)
        return tenant

    def announce(self, operation: Operation, tenant: Tenant) -> None:
        """Call the hooks of what an operation has brought about."""
        if "spare" not in operation.payload:
            for verb in _ANNOUNCED.get(operation.kind, ()):
                self.shop.hooks.after(verb, tenant)

    def run_now(self, operation: Operation) -> Tenant:
        """Carry out one that was just written down, where this process can; else leave it to a worker.

        Raises: `OperationInProgress` where another worker is at it; `OperationFailed`.
        """
        registry = self.shop.registry
        tenant = registry.tenants.row(operation.tenant_id).tenant
        if not self.can_work_on(tenant.server):
            return tenant
        with self.turn(operation):
            if (claimed := self.claim(operation)) is not None:
                return self.carry_out(claimed)
        found = registry.operations.get(operation.id)
        if found is None or found.state is not OperationState.DONE:
            raise OperationInProgress(tenant.slug)
        return registry.tenants.row(operation.tenant_id).tenant
