"""From what a caller may name a tenant or a user by, to its id, inside a transaction that is already open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import BindParameter, ColumnElement, Connection, select

from tenantdb.errors import TenantNotFound, UserNotFound
from tenantdb.model import Tenant, TenantState, User
from tenantdb.registry import tables
from tenantdb.registry.fields import email_key
from tenantdb.resolvers import tenant_key

T = TypeVar("T")


def tenant_clause(key: str | UUID | BindParameter[Any], kind: type[str] | type[UUID] | None = None) -> ColumnElement[bool]:
    """Which row a key means; ``kind`` of key where it is a parameter. A purged tenant is no tenant any more, and a spare is none yet."""
    column = tables.tenants.c.id if kind is UUID or isinstance(key, UUID) else tables.tenants.c.slug
    return (column == key) & tables.tenants.c.slug.is_not(None) & (tables.tenants.c.state != TenantState.PURGED.value)


def tenant_id_of(connection: Connection, tenant: Tenant | UUID | str) -> UUID:
    """Raises: `TenantNotFound`, `InvalidTenantKey`."""
    key = tenant_key(tenant)
    found: UUID | None = connection.scalar(select(tables.tenants.c.id).where(tenant_clause(key)))
    if found is None:
        raise TenantNotFound(str(key))
    return found


def user_clause(user: User | UUID | str) -> ColumnElement[bool]:
    """Which row is meant by a user, an id, an id as text, or an e-mail. Deleted users are not meant by anything."""
    living = tables.users.c.deleted_at.is_(None)
    if isinstance(user, str) and "@" in user:
        return (tables.users.c.email_key == (email_key(user) or "")) & living
    try:
        user_id = user.id if isinstance(user, User) else user if isinstance(user, UUID) else UUID(user)
    except ValueError:
        raise UserNotFound(str(user)[:64]) from None
    return (tables.users.c.id == user_id) & living


def user_id_of(connection: Connection, user: User | UUID | str) -> UUID:
    """Raises: `UserNotFound`."""
    found: UUID | None = connection.scalar(select(tables.users.c.id).where(user_clause(user)))
    if found is None:
        raise UserNotFound(user_name(user))
    return found


def user_name(user: User | UUID | str) -> str:
    """How an error names a user: by id where there is one."""
    return str(user.id) if isinstance(user, User) else str(user)


def chunks(items: Sequence[T], size: int = 1000) -> Iterator[Sequence[T]]:
    """For ``IN (...)``: a database takes so many parameters in one statement and no more."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
