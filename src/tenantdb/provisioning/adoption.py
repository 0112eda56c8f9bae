"""The two verbs: adopt a database that somebody else made, and give it back.

What can be refused is refused before anything is written down, with everything that is in the way at once.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy.engine import URL

from tenantdb.context import current_actor
from tenantdb.errors import (
    AdoptRefused,
    ConfigError,
    IllegalTransition,
    OperationFailed,
    OperationInProgress,
    ProvisioningError,
    TenantExists,
    TenantNotFound,
    UserExists,
)
from tenantdb.model import NewUser, Server, Tenant, TenantState, User
from tenantdb.provisioning import adopting
from tenantdb.provisioning.lease import LEASE, worker
from tenantdb.provisioning.procedures import Runner
from tenantdb.registry import Hands, SignUp
from tenantdb.registry.operations import ADOPT, GIVE_BACK, Operation
from tenantdb.resolvers import canonical_slug
from tenantdb.settings import SQLITE, ConnectionURL

Owner = User | UUID | NewUser | None


class Adoption:
    """The verbs behind `TenantDB.adopt` and `TenantDB.give_back`."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._registry = runner.shop.registry
        self._settings = runner.shop.settings
        self._hooks = runner.shop.hooks

    def adopt(
        self,
        slug: str,
        *,
        database: str,
        owner_url: str | URL | ConnectionURL | None,
        server: str | None,
        revision: str | None,
        owner: Owner,
        **details: Any,
    ) -> Tenant:
        canonical_slug(slug)
        url, there = _parsed(owner_url), self._server(server)
        with self._runner.turns:
            operation = self._unfinished(slug, database, there, owner)
            if operation is None:
                operation = self._begin(slug, database, url, there, revision, owner, details)
            return self._carry_out(operation, {adopting.OWNER_URL: url, "revision": revision})

    def give_back(self, tenant: Tenant, *, confirm: str, owner_url: str | URL | ConnectionURL | None) -> Tenant:
        url = _parsed(owner_url)
        if confirm not in (tenant.slug, str(tenant.id)):
            raise AdoptRefused(tenant.slug, ["its slug is asked for once more: confirm=..."], "given back")
        if tenant.adopted_from is None and tenant.state is not TenantState.PURGING and tenant.database is not None:
            raise AdoptRefused(tenant.slug, ["it was not adopted, so there is nobody to give it back to; export it"], "given back")
        if tenant.legal_hold is not None:
            raise AdoptRefused(tenant.slug, ["there is a legal hold on it; `tenantdb release` ends that"], "given back")
        operation = self._registry.operations.for_tenant(tenant.id, kinds=[GIVE_BACK])
        if tenant.state is not TenantState.PURGING or operation is None:
            if tenant.state is not TenantState.DELETED:
                raise IllegalTransition(tenant.slug, str(tenant.state), "given back before it is deleted")
            self._ensure_possible(tenant, url)
            self._hooks.before("give_back", tenant)
            with self._registry.admin_write() as connection:
                self._registry.tenants.transition_in(
                    connection, tenant, TenantState.PURGING, action="tenant.giving_back", bump_generation=True, held=False
                )
                operation = self._registry.operations.create(connection, GIVE_BACK, tenant.id, payload={"actor": current_actor().actor})
            self._registry.forget(tenant.id, tenant.slug)
            self._runner.shop.engines.forget(tenant.id)
        with self._runner.turns:
            claimed = self._runner.claim(operation)
            if claimed is None:
                return self._registry.tenants.row(tenant.id).tenant
            return self._carry_out(claimed, {adopting.OWNER_URL: url})

    def _carry_out(self, operation: Operation, wanted: dict[str, Any]) -> Tenant:
        try:
            return self._runner.carry_out(operation, wanted)
        except (ProvisioningError, OperationFailed) as error:
            if isinstance(error.__cause__, AdoptRefused):
                raise error.__cause__ from error
            raise

    def _server(self, name: str | None) -> Server:
        known = self._settings.provisioners
        if not known:
            raise ConfigError("a database is adopted by a process with a provisioner; give server=... or TENANTDB_SERVER")
        if name is None and len(known) > 1:
            raise ConfigError(f"say on which server it is: server=... one of {', '.join(sorted(known))}")
        return self._registry.servers.get(name or next(iter(known)))

    def _begin(
        self,
        slug: str,
        database: str,
        url: ConnectionURL | None,
        server: Server,
        revision: str | None,
        owner: Owner,
        details: dict[str, Any],
    ) -> Operation:
        name = database if server.backend != SQLITE else None
        if any(name == each.database for each in self._registry.tenants.on_server(server)):
            raise AdoptRefused(slug, [f"{database!r} is a tenant's already"])
        if any(name == each.database for each in self._registry.templates.list(server)):
            raise AdoptRefused(slug, [f"{database!r} is a golden database of tenantdb's"])
        with self._runner.shop.workshop(server) as workshop:
            found = workshop.survey(slug, database, url)
        adopting.check_revisions(slug, found.revisions, revision, self._settings)
        payload = {"server": server.name, "database": database, "owner": found.owner, "revision": revision}
        request = SignUp(slug=slug, owner=owner, payload=payload, kind=ADOPT, **details)
        _, operation = self._registry.sign_up(request, hands=Hands(worker(), LEASE, makes=True))
        return operation

    def _unfinished(self, slug: str, database: str, server: Server, owner: Owner) -> Operation | None:
        """The same adoption, which failed or was interrupted. Raises: `OperationInProgress`, `TenantExists`, `UserExists`."""
        try:
            tenant = self._registry.tenants.get(slug)
        except TenantNotFound:
            return None
        known = self._registry.operations.for_tenant(tenant.id, kinds=[ADOPT])
        unfinished = tenant.state in (TenantState.FAILED, TenantState.PROVISIONING)
        same = known is not None and (known.payload.get("database"), known.payload.get("server")) == (database, server.name)
        if known is None or not same or not unfinished:
            raise TenantExists(slug)
        if isinstance(owner, NewUser) and not self._registry.users.verifies(owner.email, owner.password):
            raise UserExists
        claimed = self._registry.operations.claim(known.id, worker(), LEASE, dead=self._runner.dead_workers())
        if claimed is None:
            raise OperationInProgress(slug)
        return claimed

    def _ensure_possible(self, tenant: Tenant, url: ConnectionURL | None) -> None:
        record = self._registry.tenants.row(tenant.id)
        if record.server is not None:
            with self._runner.shop.workshop(record.server) as workshop:
                workshop.may_hand_back(tenant, url)


def _parsed(url: str | URL | ConnectionURL | None) -> ConnectionURL | None:
    return None if url is None else ConnectionURL.parse(url)
