"""Tenants: their records, their one way through the table of transitions, and what may be changed about them.

Every write raises ``version``; a write that moves a tenant or changes who may enter raises ``generation`` too. Every change of state is a
compare-and-set on the state that was read, so that of two processes one wins and the other is told.
"""

from __future__ import annotations

import builtins
import functools
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, RowMapping, Select, bindparam, case, delete, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.sql.dml import ReturningUpdate

from tenantdb.errors import IllegalTransition, OperationInProgress, TenantExists, TenantNotFound
from tenantdb.model import TRANSITIONS, Fence, Server, Subscription, Tenant, TenantState
from tenantdb.registry import audit, fields, tables
from tenantdb.registry.ids import chunks, tenant_clause
from tenantdb.registry.records import Stamp, TenantRecord
from tenantdb.registry.transactions import Transactions, violates
from tenantdb.resolvers import tenant_key

SUGGESTIONS_FROM = 20_000  # slugs that "did you mean" compares with; more would take a noticeable fraction of a second

_tenants, _servers = tables.tenants, tables.servers
_TENANT_FIELDS = [name for name in Tenant.__dataclass_fields__ if name != "server"]
_BEING_MADE = (TenantState.PROVISIONING.value, TenantState.SPARE.value)
_written = (_tenants.c.version, _tenants.c.generation, _tenants.c.updated_at)
_returned = (*(_tenants.c[name] for name in _TENANT_FIELDS), _tenants.c.server_id)
_FENCED = frozenset({TenantState.SUSPENDED, TenantState.DELETED, TenantState.PURGING})
SIGNED_UP = ("slug", "name", "email", "phone", "country", "plan", "subscription", "metadata")
_ERASED = (
    "slug name email phone country plan subscription_expires_at server_id database owner_role runtime_role owner_secret runtime_secret"
    " owner_secret_pending runtime_secret_pending revision adopted_from purge_after legal_hold fence"
).split()
UPDATABLE = ("name", "email", "phone", "country", "plan", "subscription", "subscription_expires_at", "metadata")


@functools.cache
def _one(kind: type[str] | type[UUID]) -> Select[Any]:
    """One tenant, by ``key``. Made once: putting so many columns together takes longer than the query."""
    return _query(tenant_clause(bindparam("key", type_=(_tenants.c.id if kind is UUID else _tenants.c.slug).type), kind))


@functools.cache
def _any() -> Select[Any]:
    """One row, by id, also that of a spare or of a purged tenant."""
    return _query(_tenants.c.id == bindparam("key", type_=_tenants.c.id.type))


def _query(where: ColumnElement[bool]) -> Select[Any]:
    columns: list[ColumnElement[Any]] = [_tenants.c[name] for name in _TENANT_FIELDS]
    columns += [_tenants.c.runtime_secret, _tenants.c.runtime_secret_pending]
    columns += [column.label(f"server_{column.name}") for column in _servers.c]
    joined = _tenants.outerjoin(_servers, _tenants.c.server_id == _servers.c.id)
    return select(*columns).select_from(joined).where(where)


def _tenant(row: RowMapping | Mapping[str, Any]) -> Tenant:
    values = {name: row[name] for name in _TENANT_FIELDS}
    values["state"], values["subscription"] = TenantState(row["state"]), Subscription(row["subscription"])
    if values["fence"] is not None:
        values["fence"] = Fence(values["fence"])
    if values["slug"] is None:
        values["slug"], values["name"] = str(row["id"]), ""
    return Tenant(server=row["server_name"], **values)


@dataclass(frozen=True, slots=True)
class SpareWish:
    """Which spares will do: at this revision (any, where the process knows no migrations), on this server, in this region."""

    revision: str | None = None
    server: str | None = None
    region: str | None = None
    known: bool = True  # whether ``revision`` is known; None may be the head of a schema without revisions


@functools.cache
def _take(known: bool, by_server: bool, by_region: bool) -> ReturningUpdate[Any]:
    """Takes the oldest ready spare; what another taker has locked is passed over. One statement: a sign-up is to take milliseconds."""
    spare = (_tenants.c.state == TenantState.SPARE.value) & _tenants.c.ready_at.is_not(None) & ~_servers.c.draining
    if known:
        spare &= _tenants.c.revision.is_not_distinct_from(bindparam("revision_now", type_=_tenants.c.revision.type))
    if by_server:
        spare &= _servers.c.name == bindparam("server_now", type_=_servers.c.name.type)
    if by_region:
        spare &= _servers.c.region == bindparam("region_now", type_=_servers.c.region.type)
    joined = _tenants.join(_servers, _tenants.c.server_id == _servers.c.id)
    oldest = select(_tenants.c.id).select_from(joined).where(spare).order_by(_tenants.c.ready_at, _tenants.c.id).limit(1)
    taken = {name: bindparam(name, type_=_tenants.c[name].type) for name in (*SIGNED_UP, "state", "created_at", "updated_at")}
    server = select(_servers.c.name).where(_servers.c.id == _tenants.c.server_id).scalar_subquery().label("server_name")
    return (
        update(_tenants)
        .where(_tenants.c.id == oldest.with_for_update(skip_locked=True, of=_tenants).correlate(None).scalar_subquery())
        .values({**taken, "ready_at": None, "version": _tenants.c.version + 1})
        .returning(*_returned, server)
    )


def sign_up_values(
    *,
    slug: str,
    name: str | None = None,
    email: str | None = None,
    phone: str | None = None,
    country: str | None = None,
    plan: str | None = None,
    subscription: Subscription | str = Subscription.TRIAL,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The columns of a tenant that signs up; the slug is canonical already. Raises: `ValueError`, `TypeError`."""
    return {
        "slug": slug,
        "name": fields.text("name", slug if name is None else name, required=True),
        "email": fields.text("email", email),
        "phone": fields.text("phone", phone),
        "country": fields.text("country", country),
        "plan": fields.text("plan", plan),
        "subscription": fields.subscription(subscription).value,
        "metadata": fields.document("metadata", metadata),
    }


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
        return self._record(_one(UUID if isinstance(key, UUID) else str), key)

    def row(self, tenant_id: UUID) -> TenantRecord:
        """The same whatever its state, also of a spare or of a purged tenant. Raises: as `record`."""
        return self._record(_any(), tenant_id)

    def owners(self, tenant_ids: Sequence[UUID]) -> builtins.list[TenantRecord]:
        """The records of many, with the sealed passwords of their owner roles, in one query of the login that owns the registry. Whoever is
        not there is left out. Raises: `CredentialTampered` where a server's address was edited."""
        query = _query(_tenants.c.id.in_(tenant_ids)).add_columns(_tenants.c.owner_secret)
        with self._transactions.admin_read() as connection:
            rows = connection.execute(query).mappings().all()
        servers: dict[UUID, Server] = {}
        return [self._assemble(row, servers, owner_secret=row["owner_secret"]) for row in rows]

    def _record(self, query: Select[Any], key: str | UUID) -> TenantRecord:
        with self._transactions.read() as connection:
            row = connection.execute(query, {"key": key}).mappings().first()
        if row is None:
            raise TenantNotFound(str(key))
        return self._assemble(row, {})

    def _assemble(self, row: RowMapping, servers: dict[UUID, Server], *, owner_secret: bytes | None = None) -> TenantRecord:
        server_id = row["server_id"]
        if server_id is not None and server_id not in servers:
            servers[server_id] = self._read_server({column.name: row[f"server_{column.name}"] for column in _servers.c})
        return TenantRecord(
            tenant=_tenant(row),
            server=None if server_id is None else servers[server_id],
            runtime_secret=row["runtime_secret"],
            runtime_secret_pending=row["runtime_secret_pending"],
            owner_secret=owner_secret,
            server_written=row["server_updated_at"],
        )

    def stamps(self, tenant_ids: Sequence[UUID]) -> Mapping[UUID, tuple[Stamp, int]]:
        """The stamps of the records of many, and their generations, in one query a thousand. Whoever is not there is left out."""
        columns = (_tenants.c.id, _tenants.c.version, _servers.c.updated_at, _tenants.c.generation)
        joined = _tenants.outerjoin(_servers, _tenants.c.server_id == _servers.c.id)
        query = select(*columns).select_from(joined)
        found: dict[UUID, tuple[Stamp, int]] = {}
        with self._transactions.read() as connection:
            for some in chunks(tenant_ids):
                for row in connection.execute(query.where(_tenants.c.id.in_(some))):
                    found[row.id] = (row.version, row.updated_at), row.generation
        return found

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

    def create(self, connection: Connection, values: Mapping[str, Any]) -> Tenant:
        """A new tenant in state provisioning, without a place yet, in the caller's transaction. ``values`` come from `sign_up_values`.

        Raises: `TenantExists`, after which the transaction can only be rolled back.
        """
        now = tables.utcnow()
        written = {
            **values,
            "id": uuid.uuid4(),
            "state": TenantState.PROVISIONING.value,
            "version": 1,
            "generation": 1,
            "created_at": now,
            "updated_at": now,
        }
        try:
            connection.execute(insert(_tenants), written)
        except IntegrityError as error:
            if violates(error, "tenantdb_tenants", "slug"):
                raise TenantExists(values["slug"]) from error
            raise
        subscription = Subscription(written["subscription"])
        return Tenant(**{**written, "state": TenantState.PROVISIONING, "subscription": subscription})

    def find_in(self, connection: Connection, tenant_id: UUID) -> Tenant:
        """A tenant in the caller's transaction, whatever its state. Raises: `TenantNotFound`."""
        row = connection.execute(_any(), {"key": tenant_id}).mappings().first()
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
        adopted_from: str | None = None,
    ) -> Callable[[Connection], TenantRecord]:
        """What gives the tenant its place, once, in the caller's transaction, who forgets the cached record when it is committed.

        The transaction is that of the login that owns the tables. Raises then: `OperationInProgress` where it has a place already.
        """

        def write(connection: Connection) -> TenantRecord:
            place = (_tenants.c.id == tenant.id) & _tenants.c.database.is_(None) & _tenants.c.state.in_(_BEING_MADE)
            values: dict[str, Any] = {"database": database, "owner_role": owner_role, "runtime_role": runtime_role}
            values["adopted_from"] = adopted_from
            written = {
                **values,
                "server_id": server.id,
                "owner_secret": owner_secret,
                "runtime_secret": runtime_secret,
                "version": _tenants.c.version + 1,
                "generation": _tenants.c.generation + 1,
                "updated_at": tables.utcnow(),
            }
            returned = connection.execute(update(_tenants).where(place).values(written).returning(*_written)).first()
            if returned is None:
                raise OperationInProgress(tenant.slug)
            found = replace(tenant, **values, **returned._mapping, server=server.name)
            return TenantRecord(tenant=found, server=server, runtime_secret=runtime_secret, owner_secret=owner_secret)

        return write

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
        values: Mapping[str, Any] | None = None,
        held: bool = True,
    ) -> Tenant:
        """The same in the caller's transaction, who forgets the cached record when it is committed. ``values`` are further columns.

        ``held=False``: not where there is a legal hold.
        """
        if to not in TRANSITIONS[tenant.state]:
            raise IllegalTransition(tenant.slug, str(tenant.state), str(to))
        now = tables.utcnow()
        written: dict[str, Any] = {"state": to.value, "reason": reason, "version": _tenants.c.version + 1, "updated_at": now}
        if bump_generation:
            written["generation"] = _tenants.c.generation + 1
        if to in _FENCED:
            written["fence"] = Fence.PENDING.value
        elif tenant.fence is not None:
            written["fence"] = None
        if to is TenantState.DELETED:
            written["deleted_at"] = now
        elif tenant.state is TenantState.DELETED and to is TenantState.ACTIVE:
            written |= {"deleted_at": None, "purge_after": None}
        unchanged = (_tenants.c.id == tenant.id) & (_tenants.c.state == tenant.state.value)
        if not held:
            unchanged &= _tenants.c.legal_hold.is_(None)
        statement = update(_tenants).where(unchanged).values({**written, **(values or {})}).returning(*_returned)
        row = connection.execute(statement).mappings().first()
        if row is None:
            raise IllegalTransition(tenant.slug, str(self.find_in(connection, tenant.id).state), str(to))
        audit.record(connection, action, tenant_id=tenant.id, details={"from": str(tenant.state), "to": str(to)})
        return _tenant({**row, "server_name": None if row["server_id"] is None else tenant.server})

    def still(self, connection: Connection, tenant: Tenant) -> int:
        """Hold the tenant's row in the caller's transaction, and return its generation. Raises: `IllegalTransition` where its state has
        changed."""
        columns = (_tenants.c.state, _tenants.c.generation)
        row = connection.execute(select(*columns).where(_tenants.c.id == tenant.id).with_for_update()).one()
        if row.state != tenant.state.value:
            raise IllegalTransition(tenant.slug, str(row.state), str(TenantState.ACTIVE))
        return int(row.generation)

    def lock(self, connection: Connection, tenant: Tenant) -> None:
        """Hold the tenant's row in the caller's transaction, whatever its state."""
        connection.execute(select(_tenants.c.id).where(_tenants.c.id == tenant.id).with_for_update())

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
            found = self.set_revision_in(connection, tenant, revision)
        self._forget(tenant.id, tenant.slug)
        return found

    def set_revision_in(self, connection: Connection, tenant: Tenant, revision: str | None) -> Tenant:
        """The same in the caller's transaction, who forgets the cached record when it is committed."""
        written = {"revision": revision, "version": _tenants.c.version + 1, "updated_at": tables.utcnow()}
        if revision != tenant.revision:  # connections that have prepared statements for the tables as they were close
            written["generation"] = _tenants.c.generation + 1
        returned = connection.execute(update(_tenants).where(_tenants.c.id == tenant.id).values(written).returning(*_written)).first()
        if returned is None:
            raise TenantNotFound(str(tenant.id))
        if tenant.state not in _BEING_MADE:  # the journal tells of what is being made
            audit.record(connection, "tenant.revision", tenant_id=tenant.id, details={"from": tenant.revision, "to": revision})
        return replace(tenant, revision=revision, **returned._mapping)

    def owner_secrets(self, tenant_id: UUID) -> tuple[bytes | None, bytes | None]:
        """The owner role's sealed password and the one that is to replace it, read with the login that owns the registry.

        Raises: `TenantNotFound`.
        """
        with self._transactions.admin_read() as connection:
            columns = (_tenants.c.owner_secret, _tenants.c.owner_secret_pending)
            row = connection.execute(select(*columns).where(_tenants.c.id == tenant_id)).first()
        if row is None:
            raise TenantNotFound(str(tenant_id))
        return row.owner_secret, row.owner_secret_pending

    # -- spares ------------------------------------------------------------------------------------------------------------------------

    def create_spare(self, connection: Connection) -> Tenant:
        """The row of a spare that is to be made, in the caller's transaction of the login that owns the tables."""
        tenant_id, now = uuid.uuid4(), tables.utcnow()
        connection.execute(
            insert(_tenants).values(
                id=tenant_id,
                state=TenantState.SPARE.value,
                subscription=Subscription.TRIAL.value,
                metadata={},
                version=1,
                generation=1,
                created_at=now,
                updated_at=now,
            )
        )
        return self.find_in(connection, tenant_id)

    def set_ready(self, connection: Connection, tenant: Tenant, *, ready: bool) -> bool:
        """Offer a spare to whoever signs up, or withhold it, in the caller's transaction. False where it was taken meanwhile."""
        now = tables.utcnow()
        changed = connection.execute(
            update(_tenants)
            .where((_tenants.c.id == tenant.id) & (_tenants.c.state == TenantState.SPARE.value))
            .values(ready_at=now if ready else None, version=_tenants.c.version + 1, updated_at=now)
        )
        return bool(changed.rowcount)

    def take_spare(self, connection: Connection, values: Mapping[str, Any], wish: SpareWish, to: TenantState) -> Tenant | None:
        """Turn one spare into a tenant, in the caller's transaction; None where there is none. Two takers never get the same.

        ``values`` are the columns of a sign-up. Raises: `TenantExists`, after which the transaction can only be rolled back.
        """
        parameters = {"revision_now": wish.revision, "server_now": wish.server, "region_now": wish.region}
        now = tables.utcnow()
        written = {**values, **parameters, "state": to.value, "created_at": now, "updated_at": now}
        statement = _take(wish.known, wish.server is not None, wish.region is not None)
        try:
            row = connection.execute(statement, written).mappings().first()
        except IntegrityError as error:
            if violates(error, "tenantdb_tenants", "slug"):
                raise TenantExists(values["slug"]) from error
            raise
        return None if row is None else _tenant(row)

    def spares(self) -> builtins.list[Tenant]:
        """All spares, ready or not, the oldest first."""
        query = _query(_tenants.c.state == TenantState.SPARE.value).order_by(_tenants.c.created_at, _tenants.c.id)
        with self._transactions.read() as connection:
            return [_tenant(row) for row in connection.execute(query).mappings()]

    def on_server(self, server: Server) -> builtins.list[Tenant]:
        """Every row with a place on a server, whatever its state."""
        with self._transactions.read() as connection:
            return [_tenant(row) for row in connection.execute(_query(_tenants.c.server_id == server.id)).mappings()]

    # -- the end -----------------------------------------------------------------------------------------------------------------------

    def hold(self, tenant: Tenant, reason: str | None) -> Tenant:
        """Write down that the tenant may not be purged, and why; None lets go. For the login that owns the registry.

        Raises: `ValueError`; `TenantNotFound`.
        """
        reason = fields.text("reason", reason)
        with self._transactions.admin_write() as connection:
            connection.execute(
                update(_tenants)
                .where(_tenants.c.id == tenant.id)
                .values(legal_hold=reason, version=_tenants.c.version + 1, updated_at=tables.utcnow())
            )
            audit.record(connection, "tenant.hold" if reason else "tenant.release", tenant_id=tenant.id, reason=reason or tenant.legal_hold)
            found = self.find_in(connection, tenant.id)
        self._forget(tenant.id, tenant.slug)
        return found

    def fenced(self, connection: Connection, tenant: Tenant) -> Tenant | None:
        """Write down that the server refuses the tenant now, in the caller's transaction. None where its state has changed meanwhile."""
        still = (_tenants.c.id == tenant.id) & (_tenants.c.state == tenant.state.value) & _tenants.c.fence.is_not(None)
        written = {"fence": Fence.DONE.value, "version": _tenants.c.version + 1, "updated_at": tables.utcnow()}
        returned = connection.execute(update(_tenants).where(still).values(written).returning(*_written)).first()
        return None if returned is None else replace(tenant, fence=Fence.DONE, **returned._mapping)

    def erase(
        self, connection: Connection, tenant: Tenant, certificate: Mapping[str, Any], *, besides: UUID, action: str = "tenant.purge"
    ) -> Tenant:
        """Leave a tombstone of a tenant that is being purged: its id, when, and the certificate. The slug is free again, and nothing is
        left to do for the tenant, ``besides`` the operation that does this.

        In the caller's transaction of the login that owns the tables. Raises: `IllegalTransition`.
        """
        now = tables.utcnow()
        for table in (tables.memberships, tables.refresh_tokens, tables.domains):
            connection.execute(delete(table).where(table.c.tenant_id == tenant.id))
        theirs = tables.operations.c.tenant_id == tenant.id
        connection.execute(update(tables.operations).where(theirs).values(idempotency_key=None, payload={}))
        connection.execute(update(tables.operations).where(theirs & (tables.operations.c.id != besides)).values(state="done"))
        erased = dict.fromkeys(_ERASED)
        return self.transition_in(
            connection,
            tenant,
            TenantState.PURGED,
            action=action,
            bump_generation=True,
            values={**erased, "metadata": {}, "purged_at": now, "certificate": dict(certificate), "ready_at": None},
        )

    def certificate(self, tenant_id: UUID) -> Mapping[str, Any]:
        """What was erased when a tenant was purged, by whom, and what else may still hold its data. Raises: `TenantNotFound`."""
        with self._transactions.read() as connection:
            found = connection.execute(select(_tenants.c.certificate).where(_tenants.c.id == tenant_id)).first()
        if found is None or found.certificate is None:
            raise TenantNotFound(str(tenant_id))
        certificate: Mapping[str, Any] = found.certificate
        return certificate

    def expired(self) -> builtins.list[Tenant]:
        """Deleted tenants whose retention has ended and that nothing holds, the longest deleted first."""
        over = (_tenants.c.state == TenantState.DELETED.value) & (_tenants.c.purge_after <= tables.utcnow())
        query = _query(over & _tenants.c.legal_hold.is_(None)).order_by(_tenants.c.deleted_at)
        with self._transactions.read() as connection:
            return [_tenant(row) for row in connection.execute(query).mappings()]

    # -- passwords ---------------------------------------------------------------------------------------------------------------------

    def pend_secrets(self, connection: Connection, tenant: Tenant, *, owner: bytes, runtime: bytes) -> bool:
        """Keep the passwords that are to replace the present ones beside them. False where there are some already."""
        none = _tenants.c.owner_secret_pending.is_(None) & _tenants.c.runtime_secret_pending.is_(None)
        changed = connection.execute(
            update(_tenants)
            .where((_tenants.c.id == tenant.id) & none)
            .values(
                owner_secret_pending=owner,
                runtime_secret_pending=runtime,
                version=_tenants.c.version + 1,
                updated_at=tables.utcnow(),
            )
        )
        return bool(changed.rowcount)

    def promote_secrets(self, connection: Connection, tenant: Tenant) -> Tenant | None:
        """What was pending is what holds. None where it was so already."""
        written = {
            "owner_secret": _tenants.c.owner_secret_pending,
            "runtime_secret": _tenants.c.runtime_secret_pending,
            "owner_secret_pending": None,
            "runtime_secret_pending": None,
            "version": _tenants.c.version + 1,
            # Of a tenant that is not served nobody has an engine; and whoever waits to serve it again goes by the generation.
            "generation": _tenants.c.generation + case((_tenants.c.state == TenantState.ACTIVE.value, 1), else_=0),
            "updated_at": tables.utcnow(),
        }
        pending = (_tenants.c.id == tenant.id) & _tenants.c.runtime_secret_pending.is_not(None)
        returned = connection.execute(update(_tenants).where(pending).values(written).returning(*_written)).first()
        return None if returned is None else replace(tenant, **returned._mapping)

    def _alike(self, slug: str) -> str | None:
        query = select(_tenants.c.slug).where(_tenants.c.slug.is_not(None)).limit(SUGGESTIONS_FROM)
        with self._transactions.read() as connection:
            slugs = [str(each) for each in connection.scalars(query)]
        import difflib  # by who has mistyped a name alone

        return next(iter(difflib.get_close_matches(slug, slugs, n=1)), None)


def _clean(name: str, value: Any) -> Any:
    if name == "subscription":
        return fields.subscription(value).value
    if name == "subscription_expires_at":
        return fields.moment(name, value)
    if name == "metadata":
        return fields.document(name, value)
    return fields.text(name, value, required=name == "name")
