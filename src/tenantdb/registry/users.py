"""Users: who may sign in. One e-mail, one user, whatever the case; a deleted user's e-mail is free again.

Tokens that are mailed out (verification, password reset) are 32 random bytes, stored as a hash, expire, and work once.
"""

from __future__ import annotations

import hashlib
import secrets
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from tenantdb.errors import InvalidCredentials, InvalidToken, UserExists, UserNotFound
from tenantdb.model import User
from tenantdb.registry import audit, fields, tables
from tenantdb.registry.ids import user_clause, user_id_of, user_name
from tenantdb.registry.passwords import hash_password, needs_rehash, verify_password
from tenantdb.registry.transactions import Transactions, violates

VERIFICATION_LIFETIME = timedelta(days=3)
RESET_LIFETIME = timedelta(hours=1)

_users = tables.users
_USER_COLUMNS = [_users.c[name] for name in User.__dataclass_fields__]


class UserStore:
    """Reads and writes users. A user is named by a `User`, an id, or an e-mail address. ``forget`` is told of each whose tokens ended."""

    def __init__(self, transactions: Transactions, forget: Callable[[UUID], None]) -> None:
        self._transactions = transactions
        self._forget = forget

    def create(
        self, email: str, password: str, *, first_name: str | None = None, last_name: str | None = None, platform_admin: bool = False
    ) -> User:
        """Raises: `InvalidUser`, `UserExists`."""
        password_hash = hash_password(password)
        with self._transactions.write() as connection:
            return self.create_in(
                connection, email, password_hash, first_name=first_name, last_name=last_name, platform_admin=platform_admin
            )

    def create_in(
        self,
        connection: Connection,
        email: str,
        password_hash: str,
        *,
        first_name: str | None = None,
        last_name: str | None = None,
        platform_admin: bool = False,
    ) -> User:
        """The same in the caller's transaction, which can only be rolled back after `UserExists`."""
        now = tables.utcnow()
        user_id = uuid.uuid4()
        key = fields.required_email_key(email)
        values = {"first_name": fields.text("first_name", first_name), "last_name": fields.text("last_name", last_name)}
        try:
            connection.execute(
                insert(_users).values(
                    id=user_id,
                    email=email,
                    email_key=key,
                    password_hash=password_hash,
                    platform_admin=platform_admin,
                    version=1,
                    created_at=now,
                    updated_at=now,
                    **values,
                )
            )
        except IntegrityError as error:
            if violates(error, "tenantdb_users", "email_key"):
                raise UserExists from error
            raise
        audit.record(connection, "user.create", object=user_id, details={"platform_admin": True} if platform_admin else None)
        return self._find(connection, _users.c.id == user_id) or _gone(user_id)

    def get(self, user: User | UUID | str) -> User:
        """Raises: `UserNotFound`, also for a deleted user."""
        with self._transactions.read() as connection:
            return self._find(connection, user_clause(user)) or _gone(user)

    def list(self, *, limit: int | None = None, after: str | None = None) -> list[User]:
        """Users by e-mail, without those that were deleted; ``after`` continues behind the last e-mail of the page before."""
        query = select(*_USER_COLUMNS).where(_users.c.deleted_at.is_(None)).order_by(_users.c.email_key).limit(limit)
        if after is not None:
            query = query.where(_users.c.email_key > (fields.email_key(after) or after.lower()))
        with self._transactions.read() as connection:
            return [User(**row) for row in connection.execute(query).mappings()]

    def authenticate(self, email: str, password: str) -> User:
        """The user with this e-mail and password. Takes as long for an unknown e-mail as for a wrong password.

        Raises: `InvalidCredentials`.
        """
        key = fields.email_key(email)
        with self._transactions.read() as connection:
            row = connection.execute(
                select(_users.c.id, _users.c.password_hash).where((_users.c.email_key == (key or "")) & _users.c.deleted_at.is_(None))
            ).first()
        if not verify_password(None if row is None else row.password_hash, password) or row is None:
            raise InvalidCredentials
        if needs_rehash(row.password_hash):
            self._rehash(row.id, row.password_hash, hash_password(password))
        try:
            return self.get(row.id)
        except UserNotFound:
            raise InvalidCredentials from None  # deleted while the password was checked

    def verifies(self, email: str, password: str) -> bool:
        """Whether these are somebody's credentials."""
        try:
            self.authenticate(email, password)
        except InvalidCredentials:
            return False
        return True

    def verification_token(self, user: User | UUID | str) -> str:
        """A token to mail to the user; the one before it no longer works. Raises: `UserNotFound`."""
        with self._transactions.write() as connection:
            user_id = user_id_of(connection, user)
            token = _new_token(connection, user_id, "verification", VERIFICATION_LIFETIME)
            audit.record(connection, "user.verification_token", object=user_id)
        return token

    def verify_email(self, token: str) -> User:
        """The e-mail is its user's: the token came back. Raises: `InvalidToken` where it is unknown, used or expired."""
        with self._transactions.write() as connection:
            user_id = _redeem(connection, token, "verification", email_verified_at=tables.utcnow())
            audit.record(connection, "user.verify_email", object=user_id)
            return self._find(connection, _users.c.id == user_id) or _gone(user_id)

    def password_reset_token(self, email: str) -> str | None:
        """A token to mail to the user's stored address, or None where nobody has this e-mail: do not let the difference show."""
        key = fields.email_key(email)
        with self._transactions.write() as connection:
            user = self._find(connection, (_users.c.email_key == (key or "")) & _users.c.deleted_at.is_(None))
            if user is None:
                return None
            token = _new_token(connection, user.id, "reset", RESET_LIFETIME)
            audit.record(connection, "user.password_reset_token", object=user.id)
        return token

    def reset_password(self, token: str, new_password: str) -> User:
        """Set a new password; refresh tokens end with the old one, and access tokens issued till then are refused.

        Raises: `InvalidToken`, `InvalidUser`.
        """
        with self._transactions.read() as connection:
            _owner_of(connection, token, "reset")  # before the expensive hash
        password_hash = hash_password(new_password)
        with self._transactions.write() as connection:
            user_id = _redeem(connection, token, "reset", password_hash=password_hash, tokens_valid_from=tables.utcnow())
            connection.execute(delete(tables.refresh_tokens).where(tables.refresh_tokens.c.user_id == user_id))
            audit.record(connection, "user.reset_password", object=user_id)
            found = self._find(connection, _users.c.id == user_id) or _gone(user_id)
        self._forget(user_id)
        return found

    def delete(self, user: User | UUID | str) -> None:
        """Soft: the row stays, signing in ends, refresh tokens and memberships count no more. Raises: `UserNotFound`."""
        with self._transactions.write() as connection:
            user_id = user_id_of(connection, user)
            now = tables.utcnow()
            connection.execute(
                update(_users)
                .where(_users.c.id == user_id)
                .values(
                    deleted_at=now,
                    updated_at=now,
                    tokens_valid_from=now,
                    version=_users.c.version + 1,
                    verification_hash=None,
                    reset_hash=None,
                )
            )
            connection.execute(delete(tables.refresh_tokens).where(tables.refresh_tokens.c.user_id == user_id))
            audit.record(connection, "user.delete", object=user_id)
        self._forget(user_id)

    def _find(self, connection: Connection, where: ColumnElement[bool]) -> User | None:
        row = connection.execute(select(*_USER_COLUMNS).where(where)).mappings().first()
        return None if row is None else User(**row)

    def _rehash(self, user_id: UUID, old: str, new: str) -> None:
        with self._transactions.write() as connection:
            connection.execute(
                update(_users)
                .where((_users.c.id == user_id) & (_users.c.password_hash == old))  # not over a password that changed meanwhile
                .values(password_hash=new, version=_users.c.version + 1, updated_at=tables.utcnow())
            )
            audit.record(connection, "user.rehash", object=user_id)


def _gone(user: User | UUID | str) -> User:
    raise UserNotFound(user_name(user))


def token_hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _new_token(connection: Connection, user_id: UUID, kind: str, lifetime: timedelta) -> str:
    token = secrets.token_urlsafe(32)
    now = tables.utcnow()
    values = {f"{kind}_hash": token_hash(token), f"{kind}_expires_at": now + lifetime}
    connection.execute(update(_users).where(_users.c.id == user_id).values(**values, version=_users.c.version + 1, updated_at=now))
    return token


def _owner_of(connection: Connection, token: str, kind: str) -> UUID:
    matches = (_users.c[f"{kind}_hash"] == token_hash(token)) & (_users.c[f"{kind}_expires_at"] > tables.utcnow())
    user_id: UUID | None = connection.scalar(select(_users.c.id).where(matches & _users.c.deleted_at.is_(None)))
    if user_id is None:
        raise InvalidToken("the token is unknown, used or expired")
    return user_id


def _redeem(connection: Connection, token: str, kind: str, **values: Any) -> UUID:
    """Use up a token. Of two who bring it at once, one finds the hash gone."""
    user_id = _owner_of(connection, token, kind)
    column = _users.c[f"{kind}_hash"]
    changed = connection.execute(
        update(_users)
        .where((_users.c.id == user_id) & (column == token_hash(token)))
        .values({**values, column.name: None, f"{kind}_expires_at": None, "version": _users.c.version + 1, "updated_at": tables.utcnow()})
    )
    if changed.rowcount == 0:
        raise InvalidToken("the token is unknown, used or expired")
    return user_id
