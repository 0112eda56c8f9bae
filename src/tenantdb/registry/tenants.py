"""Tenants: their records, their one way through the table of transitions, and what may be changed about them.

Every write raises ``version``; a write that moves a tenant or changes who may enter raises ``generation`` too. Every change of state is a
compare-and-set on the state that was read, so that of two processes one wins and the other is told.
"""

from __future__ import annotations

import difflib
import functools
import uuid
from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, RowMapping, Select, bindparam, insert, select, update
from sqlalchemy.exc import IntegrityError

from tenantdb.errors import IllegalTransition, OperationInProgress, TenantExists, TenantNotFound
from tenantdb.model import TRANSITIONS, Server, Subscription, Tenant, TenantState
from tenantdb.registry import audit, fields, tables
from tenantdb.registry.ids import tenant_clause
from tenantdb.registry.records import TenantRecord
from tenantdb.registry.transactions import Transactions, violates
from tenantdb.resolvers import tenant_key

SUGGESTIONS_FROM = 20_000  # slugs that "did you mean" compares with; more would take a noticeable fraction of a second

_tenants, _servers = tables.tenants, tables.servers
_TENANT_FIELDS = [name for name in Tenant.__dataclass_fields__ if name != "server"]
UPDATABLE = ("name", "email", "phone", "country", "plan", "subscription", "subscription_expires_at", "metadata")


@functools.cache
def _one(kind: type[str] | type[UUID]) -> Select[Any]:
    """One tenant, by ``key``. Made once: putting so many columns together takes longer than the query."""
    return _query(tenant_clause(bindparam("key", type_=(_tenants.c.id if kind is UUID else _tenants.c.slug).type), kind))


def _query(where: ColumnElement[bool]) -> Select[Any]:
    columns: list[ColumnElement[Any]] = [_tenants.c[name] for name in _TENANT_FIELDS]
    columns += [_tenants.c.runtime_secret, *(column.label(f"server_{column.name}") for column in _servers.c)]
    joined = _tenants.outerjoin(_servers, _tenants.c.server_id == _servers.c.id)
    return select(*columns).select_from(joined).where(where)


def _tenant(row: RowMapping) -> Tenant:
    values = {name: row[name] for name in _TENANT_FIELDS}
    values["state"], values["subscription"] = TenantState(row["state"]), Subscription(row["subscription"])
    return Tenant(server=row["server_name"], **values)


class TenantStore:
    """Reads and writes tenants. ``forget`` is told of every committed change, so that this process serves no old record."""

    def __init__(
        self, transactions: Transactions, read_server: Callable[[Mapping[str, Any]], Server], forget: Callable[[UUID, str | None], None]
    ) -> None:
        self._transactions = transactions
        self._read_server = read_server
        self._forget = forget

    def record(self, key: str | UUID) -> TenantRecord:
        """Everything the data path needs, in one query.

        Raises: `TenantNotFound`, also for a purged tenant; `CredentialTampered` where its server's address was edited.
        """
        with self._transactions.read() as connection:
            row = connection.execute(_one(UUID if isinstance(key, UUID) else str), {"key": key}).mappings().first()
        if row is None:
            raise TenantNotFound(str(key))
        server = (
            None if row["server_id"] is None else self._read_server({column.name: row[f"server_{column.name}"] for column in _servers.c})
        )
        return TenantRecord(tenant=_tenant(row), server=server, runtime_secret=row["runtime_secret"])

    def get(self, tenant: str | UUID | Tenant, *, suggest: bool = False) -> Tenant:
        """The tenant as it is now, whatever its state. ``suggest`` looks for a slug alike when there is none: for operators only.

        Raises: `TenantNotFound`, `InvalidTenantKey`.
        """
        key = tenant_key(tenant)
        try:
            return self.record(key).tenant
        except TenantNotFound:
            if suggest and isinstance(key, str) and (alike := self._alike(key)):
                raise TenantNotFound(key, alike) from None
            raise

    def list(self, state: TenantState | str | None = None, *, limit: int | None = None, after: str | None = None) -> list[Tenant]:
        """Tenants by slug, of one state or of all but purged; ``after`` continues behind the last slug of the page before."""
        where = _tenants.c.slug.is_not(None) & (_tenants.c.state != TenantState.PURGED.value)
        if state is not None:
            where &= _tenants.c.state == TenantState(state).value
        if after is not None:
            where &= _tenants.c.slug > after
        with self._transactions.read() as connection:
            rows = connection.execute(_query(where).order_by(_tenants.c.slug).limit(limit)).mappings().all()
        return [_tenant(row) for row in rows]

    def create(
        self,
        connection: Connection,
        *,
        slug: str,
        name: str | None = None,
        email: str | None = None,
        phone: str | None = None,
        country: str | None = None,
        plan: str | None = None,
        subscription: Subscription | str = Subscription.TRIAL,
        metadata: Mapping[str, Any] | None = None,
    ) -> Tenant:
        """A new tenant in state provisioning, without a place yet, in the caller's transaction. The slug is canonical already.

        Raises: `TenantExists`, after which the transaction can only be rolled back.
        """
        tenant_id, now = uuid.uuid4(), tables.utcnow()
        values = {
            "slug": slug,
            "name": fields.text("name", slug if name is None else name, required=True),
            "email": fields.text("email", email),
            "phone": fields.text("phone", phone),
            "country": fields.text("country", country),
            "plan": fields.text("plan", plan),
            "subscription": fields.subscription(subscription).value,
            "metadata": fields.document("metadata", metadata),
        }
        try:
            connection.execute(
                insert(_tenants).values(
                    id=tenant_id, **values, state=TenantState.PROVISIONING.value, version=1, generation=1, created_at=now, updated_at=now
                )
            )
        except IntegrityError as error:
            if violates(error, "tenantdb_tenants", "slug"):
                raise TenantExists(slug) from error
            raise
        return self.find_in(connection, tenant_id)

    def find_in(self, connection: Connection, tenant_id: UUID) -> Tenant:
        """A tenant in the caller's transaction. Raises: `TenantNotFound`."""
        row = connection.execute(_query(tenant_clause(tenant_id))).mappings().first()
        if row is None:
            raise TenantNotFound(str(tenant_id))
        return _tenant(row)

    def reserve(
        self,
        tenant: Tenant,
        server: Server,
        *,
        database: str,
        owner_role: str | None,
        runtime_role: str | None,
        owner_secret: bytes | None,
        runtime_secret: bytes | None,
        replacing: str | None = None,
    ) -> Tenant:
        """Give the tenant its place, once: only where it has none, or has the database name ``replacing``, which turned out to be taken.

        Raises: `OperationInProgress` where another process was quicker; `TenantNotFound`.
        """
        free = _tenants.c.database.is_(None) if replacing is None else _tenants.c.database == replacing
        with self._transactions.admin_write() as connection:
            changed = connection.execute(
                update(_tenants)
                .where((_tenants.c.id == tenant.id) & free & (_tenants.c.state == TenantState.PROVISIONING.value))
                .values(
                    server_id=server.id,
                    database=database,
                    owner_role=owner_role,
                    runtime_role=runtime_role,
                    owner_secret=owner_secret,
                    runtime_secret=runtime_secret,
                    version=_tenants.c.version + 1,
                    generation=_tenants.c.generation + 1,
                    updated_at=tables.utcnow(),
                )
            )
            found = self.find_in(connection, tenant.id)
            if changed.rowcount == 0:
                raise OperationInProgress(tenant.slug)
            audit.record(connection, "tenant.reserve", tenant_id=tenant.id, object=database, details={"server": server.name})
        self._forget(tenant.id, tenant.slug)
        return found

    def transition(
        self, tenant: Tenant, to: TenantState, *, action: str, reason: str | None = None, bump_generation: bool = False
    ) -> Tenant:
        """Move a tenant from the state it was read in to another. ``reason`` says why, and is cleared where none is given.

        Raises: `IllegalTransition` where the table does not allow it or the state is another by now, with the state that was found;
        `TenantNotFound`. Nothing was written then.
        """
        with self._transactions.write() as connection:
            found = self.transition_in(connection, tenant, to, action=action, reason=reason, bump_generation=bump_generation)
        self._forget(tenant.id, tenant.slug)
        return found

    def transition_in(
        self,
        connection: Connection,
        tenant: Tenant,
        to: TenantState,
        *,
        action: str,
        reason: str | None = None,
        bump_generation: bool = False,
    ) -> Tenant:
        """The same in the caller's transaction, who forgets the cached record when it is committed."""
        if to not in TRANSITIONS[tenant.state]:
            raise IllegalTransition(tenant.slug, str(tenant.state), str(to))
        now = tables.utcnow()
        values: dict[str, Any] = {"state": to.value, "reason": reason, "version": _tenants.c.version + 1, "updated_at": now}
        if bump_generation:
            values["generation"] = _tenants.c.generation + 1
        if to is TenantState.DELETED:
            values["deleted_at"] = now
        elif tenant.state is TenantState.DELETED and to is TenantState.ACTIVE:
            values["deleted_at"] = None
        changed = connection.execute(
            update(_tenants).where((_tenants.c.id == tenant.id) & (_tenants.c.state == tenant.state.value)).values(values)
        )
        found = self.find_in(connection, tenant.id)
        if changed.rowcount == 0:
            raise IllegalTransition(tenant.slug, str(found.state), str(to))
        audit.record(connection, action, tenant_id=tenant.id, details={"from": str(tenant.state), "to": str(to)})
        return found

    def update(self, tenant: Tenant | UUID | str, **changes: Any) -> Tenant:
        """Change what `UPDATABLE` names and nothing else. None clears a field that may be empty.

        Raises: `TypeError` for a field that cannot be changed so; `ValueError`; `TenantNotFound`.
        """
        if unknown := sorted(set(changes) - set(UPDATABLE)):
            raise TypeError(f"update() cannot change {', '.join(unknown)}; it can change {', '.join(UPDATABLE)}")
        values = {name: _clean(name, value) for name, value in changes.items()}
        if not values:
            return self.get(tenant)
        key = tenant_key(tenant)
        with self._transactions.write() as connection:
            tenant_id = connection.scalar(select(_tenants.c.id).where(tenant_clause(key)))
            if tenant_id is None:
                raise TenantNotFound(str(key))
            connection.execute(
                update(_tenants)
                .where(_tenants.c.id == tenant_id)
                .values({**values, "version": _tenants.c.version + 1, "updated_at": tables.utcnow()})
            )
            audit.record(connection, "tenant.update", tenant_id=tenant_id, details={"fields": sorted(values)})
            found = self.find_in(connection, tenant_id)
        self._forget(found.id, found.slug)
        return found

    def set_revision(self, tenant: Tenant, revision: str | None) -> Tenant:
        """Record the Alembic revision that the tenant's schema was brought to. Raises: `TenantNotFound`."""
        with self._transactions.admin_write() as connection:
            connection.execute(
                update(_tenants)
                .where(_tenants.c.id == tenant.id)
                .values(revision=revision, version=_tenants.c.version + 1, updated_at=tables.utcnow())
            )
            found = self.find_in(connection, tenant.id)
            audit.record(connection, "tenant.revision", tenant_id=tenant.id, details={"from": tenant.revision, "to": revision})
        self._forget(tenant.id, tenant.slug)
        return found

    def owner_secret(self, tenant_id: UUID) -> bytes | None:
        """The sealed password of the owner role, read with the login that owns the registry. Raises: `TenantNotFound`."""
        with self._transactions.admin_read() as connection:
            row = connection.execute(select(_tenants.c.owner_secret).where(tenant_clause(tenant_id))).first()
        if row is None:
            raise TenantNotFound(str(tenant_id))
        secret: bytes | None = row.owner_secret
        return secret

    def _alike(self, slug: str) -> str | None:
        query = select(_tenants.c.slug).where(_tenants.c.slug.is_not(None)).limit(SUGGESTIONS_FROM)
        with self._transactions.read() as connection:
            slugs = [str(each) for each in connection.scalars(query)]
        return next(iter(difflib.get_close_matches(slug, slugs, n=1)), None)


def _clean(name: str, value: Any) -> Any:
    if name == "subscription":
        return fields.subscription(value).value
    if name == "subscription_expires_at":
        return fields.moment(name, value)
    if name == "metadata":
        return fields.document(name, value)
    return fields.text(name, value, required=name == "name")
