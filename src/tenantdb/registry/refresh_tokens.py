"""Refresh tokens: what a browser keeps to get its next access token. Stored as a hash, used once, gone at sign-out."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from sqlalchemy import Connection, delete, insert, select

from tenantdb.errors import InvalidToken
from tenantdb.model import Tenant, User
from tenantdb.registry import audit, tables
from tenantdb.registry.ids import tenant_id_of, user_id_of
from tenantdb.registry.transactions import Transactions
from tenantdb.registry.users import token_hash

LIFETIME = timedelta(days=30)

_tokens = tables.refresh_tokens


@dataclass(frozen=True, slots=True)
class RefreshGrant:
    """Whom a refresh token signs in, and to which tenant."""

    user_id: UUID
    tenant_id: UUID | None = None


class RefreshTokenStore:
    """Issues and takes back refresh tokens. Whether the user is still a member is the caller's to ask when he issues an access token."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    def create(self, user: User | UUID | str, tenant: Tenant | UUID | str | None = None) -> str:
        """A new token, at sign-in. The user's expired ones are swept away. Raises: `UserNotFound`, `TenantNotFound`."""
        with self._transactions.write() as connection:
            user_id = user_id_of(connection, user)
            tenant_id = None if tenant is None else tenant_id_of(connection, tenant)
            connection.execute(delete(_tokens).where((_tokens.c.user_id == user_id) & (_tokens.c.expires_at <= tables.utcnow())))
            token = _issue(connection, RefreshGrant(user_id, tenant_id))
            audit.record(connection, "refresh_token.create", tenant_id=tenant_id, object=user_id)
        return token

    def rotate(self, token: str) -> tuple[str, RefreshGrant]:
        """Use up a token and get the next. Not audited: it gives nobody anything new, and happens every few minutes.

        Raises: `InvalidToken` where it is unknown, used or expired, or its user deleted.
        """
        digest = token_hash(token)
        with self._transactions.write() as connection:
            row = connection.execute(
                select(_tokens.c.user_id, _tokens.c.tenant_id)
                .join(tables.users, tables.users.c.id == _tokens.c.user_id)
                .where((_tokens.c.hash == digest) & (_tokens.c.expires_at > tables.utcnow()) & tables.users.c.deleted_at.is_(None))
            ).first()
            # Of two who bring the same token at once, one deletes it.
            if row is None or connection.execute(delete(_tokens).where(_tokens.c.hash == digest)).rowcount == 0:
                raise InvalidToken("the refresh token is unknown, used or expired")
            grant = RefreshGrant(row.user_id, row.tenant_id)
            return _issue(connection, grant), grant

    def revoke(self, token: str) -> None:
        """Sign out. An unknown token is no error: it opens nothing already."""
        digest = token_hash(token)
        with self._transactions.write() as connection:
            row = connection.execute(select(_tokens.c.user_id, _tokens.c.tenant_id).where(_tokens.c.hash == digest)).first()
            if row is not None:
                connection.execute(delete(_tokens).where(_tokens.c.hash == digest))
                audit.record(connection, "refresh_token.revoke", tenant_id=row.tenant_id, object=row.user_id)


def _issue(connection: Connection, grant: RefreshGrant) -> str:
    token, now = secrets.token_urlsafe(32), tables.utcnow()
    connection.execute(
        insert(_tokens).values(
            hash=token_hash(token), user_id=grant.user_id, tenant_id=grant.tenant_id, expires_at=now + LIFETIME, created_at=now
        )
    )
    return token
