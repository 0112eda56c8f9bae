"""Memberships: which user has which role in which tenant. A deleted user is a member of nothing."""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

from sqlalchemy import Connection, RowMapping, bindparam, delete, insert, literal, select, update
from sqlalchemy.exc import IntegrityError

from tenantdb.errors import NotAMember, UserNotFound
from tenantdb.model import MemberRole, Membership, Tenant, User
from tenantdb.registry import audit, tables
from tenantdb.registry.ids import tenant_clause, tenant_id_of, user_clause, user_id_of
from tenantdb.registry.transactions import Transactions
from tenantdb.resolvers import tenant_key

_memberships = tables.memberships


# Of a living user only, and that without asking first.
_ADD = insert(_memberships).from_select(
    ["user_id", "tenant_id", "role", "version", "created_at"],
    select(
        tables.users.c.id,
        bindparam("tenant", type_=_memberships.c.tenant_id.type),
        bindparam("their_role", type_=_memberships.c.role.type),
        literal(1),
        bindparam("since", type_=_memberships.c.created_at.type),
    ).where((tables.users.c.id == bindparam("their_id")) & tables.users.c.deleted_at.is_(None)),
)


class MembershipStore:
    """Reads and writes memberships. Users and tenants are named by record, id, e-mail or slug. ``forget`` is told of every
    committed change but those of `add_in`, before which nobody can have asked."""

    def __init__(self, transactions: Transactions, forget: Callable[[UUID, UUID], None]) -> None:
        self._transactions = transactions
        self._forget = forget

    def add(self, user: User | UUID | str, tenant: Tenant | UUID | str, *, role: MemberRole | str = MemberRole.USER) -> Membership:
        """Make a user a member, or give a member another role. May run again. Raises: `UserNotFound`, `TenantNotFound`, `ValueError`."""
        role = MemberRole(role)
        try:
            made = self._put(user, tenant, role)
        except IntegrityError:  # two processes added the same membership at once; the second look finds it
            made = self._put(user, tenant, role)
        self._forget(made.user_id, made.tenant_id)
        return made

    def add_in(self, connection: Connection, user_id: UUID, tenant_id: UUID, role: MemberRole) -> None:
        """A new membership in the caller's transaction. Raises: `UserNotFound` where the user is deleted, or was never there."""
        values = {"their_id": user_id, "tenant": tenant_id, "their_role": role.value, "since": tables.utcnow()}
        if connection.execute(_ADD, values).rowcount == 0:
            raise UserNotFound(str(user_id))
        audit.record(connection, "membership.add", tenant_id=tenant_id, object=user_id, details={"role": str(role)})

    def remove(self, user: User | UUID | str, tenant: Tenant | UUID | str) -> None:
        """End a membership and the refresh tokens that came with it. Raises: `NotAMember`, `UserNotFound`, `TenantNotFound`."""
        tokens = tables.refresh_tokens
        with self._transactions.write() as connection:
            user_id, tenant_id = user_id_of(connection, user), tenant_id_of(connection, tenant)
            gone = connection.execute(
                delete(_memberships).where((_memberships.c.user_id == user_id) & (_memberships.c.tenant_id == tenant_id))
            )
            if gone.rowcount == 0:
                raise NotAMember
            connection.execute(delete(tokens).where((tokens.c.user_id == user_id) & (tokens.c.tenant_id == tenant_id)))
            audit.record(connection, "membership.remove", tenant_id=tenant_id, object=user_id)
        self._forget(user_id, tenant_id)

    def get(self, user: User | UUID | str, tenant: Tenant | UUID | str) -> Membership:
        """A user's membership in a tenant, in one query. Raises: `NotAMember`, whichever of the two does not exist."""
        try:
            where = user_clause(user) & tenant_clause(tenant_key(tenant))
        except UserNotFound:
            raise NotAMember from None
        query = (
            select(_memberships)
            .join(tables.users, tables.users.c.id == _memberships.c.user_id)
            .join(tables.tenants, tables.tenants.c.id == _memberships.c.tenant_id)
            .where(where)
        )
        with self._transactions.read() as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            raise NotAMember
        return _membership(row)

    def list(self, user: User | UUID | str | None = None, tenant: Tenant | UUID | str | None = None) -> list[Membership]:
        """A user's memberships, a tenant's, or all; oldest first. Raises: `UserNotFound`, `TenantNotFound`."""
        query = (
            select(_memberships)
            .join(tables.users, tables.users.c.id == _memberships.c.user_id)
            .where(tables.users.c.deleted_at.is_(None))
            .order_by(_memberships.c.created_at, _memberships.c.tenant_id, _memberships.c.user_id)
        )
        with self._transactions.read() as connection:
            if user is not None:
                query = query.where(_memberships.c.user_id == user_id_of(connection, user))
            if tenant is not None:
                query = query.where(_memberships.c.tenant_id == tenant_id_of(connection, tenant))
            return [_membership(row) for row in connection.execute(query).mappings()]

    def _put(self, user: User | UUID | str, tenant: Tenant | UUID | str, role: MemberRole) -> Membership:
        with self._transactions.write() as connection:
            user_id, tenant_id = user_id_of(connection, user), tenant_id_of(connection, tenant)
            mine = (_memberships.c.user_id == user_id) & (_memberships.c.tenant_id == tenant_id)
            known = connection.execute(select(_memberships.c.role).where(mine)).first()
            if known is None:
                self.add_in(connection, user_id, tenant_id, role)
            elif known.role != role.value:
                connection.execute(update(_memberships).where(mine).values(role=role.value, version=_memberships.c.version + 1))
                details = {"from": known.role, "to": str(role)}
                audit.record(connection, "membership.change", tenant_id=tenant_id, object=user_id, details=details)
            return _membership(connection.execute(select(_memberships).where(mine)).mappings().one())


def _membership(row: RowMapping) -> Membership:
    return Membership(**{**row, "role": MemberRole(row["role"])})
