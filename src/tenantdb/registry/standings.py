"""Where a user stands in a tenant, for every request that a token brings: does he still exist, is he a member, in which role, and which of
his tokens still count. In memory for seconds, by one query otherwise."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, bindparam, select, tuple_

from tenantdb.registry import tables
from tenantdb.registry.answers import Answers
from tenantdb.registry.ids import chunks
from tenantdb.registry.transactions import Transactions

_users, _memberships = tables.users, tables.memberships
_living = (_users.c.id == bindparam("user", type_=_users.c.id.type)) & _users.c.deleted_at.is_(None)
_mine = (_memberships.c.user_id == _users.c.id) & (_memberships.c.tenant_id == bindparam("tenant", type_=_memberships.c.tenant_id.type))
_ALONE = select(_users.c.tokens_valid_from).where(_living)
_MEMBER = select(_users.c.tokens_valid_from, _memberships.c.role).select_from(_users.outerjoin(_memberships, _mine)).where(_living)

_Key = tuple[int, int | None]
"""The numbers of two ids: a UUID hashes and compares as slowly as Python code does."""


@dataclass(frozen=True, slots=True)
class Standing:
    """``exists`` is False of a user who was deleted or never was. ``role`` is None of one who is no member, or where no tenant was asked
    for. Tokens issued before ``tokens_valid_from``, in seconds since 1970, are refused."""

    exists: bool
    role: str | None = None
    tokens_valid_from: float | None = None


class Standings:
    """Standings by user and tenant, at most ``size`` of them and as many of users who do not exist. Safe to share between threads."""

    def __init__(self, transactions: Transactions, *, size: int, ttl: float, clock: Callable[[], float]) -> None:
        self._transactions = transactions
        self._answers: Answers[_Key, Standing] = Answers(
            size=size, ttl=ttl, clock=clock, is_absent=lambda standing: not standing.exists, subjects=_subjects
        )
        self.clear = self._answers.clear

    def peek(self, user: UUID, tenant: UUID | None) -> Standing | None:
        """Without I/O: None where only `get` can tell."""
        return self._answers.peek((user.int, None if tenant is None else tenant.int))

    def get(self, user: UUID, tenant: UUID | None) -> Standing:
        """From memory, or by one query. ``tenant`` None: does the user exist. Raises: `RegistryUnavailable` and its kin."""
        return self._answers.get((user.int, None if tenant is None else tenant.int), self._load)

    def forget(self, user: UUID, tenant: UUID | None = None) -> None:
        """A membership has changed, or, without a tenant, the user."""
        if tenant is not None:
            self._answers.forget((user.int, tenant.int))
        else:
            number = user.int
            self._answers.forget_where(number, lambda key: key[0] == number)

    def check(self, *, everything: bool) -> list[tuple[UUID, UUID | None]]:
        """Compare what is in use with the registry; see `Answers.check`. Returns whose standing was another."""
        changed = self._answers.check(self._ask, everything=everything)
        return [(UUID(int=user), None if tenant is None else UUID(int=tenant)) for user, tenant in changed]

    def _load(self, key: _Key) -> Standing:
        user, tenant = key
        values = {"user": UUID(int=user)} if tenant is None else {"user": UUID(int=user), "tenant": UUID(int=tenant)}
        with self._transactions.read() as connection:
            row = connection.execute(_ALONE if tenant is None else _MEMBER, values).first()
        if row is None:
            return Standing(False)
        return Standing(True, None if tenant is None else row.role, _seconds(row.tokens_valid_from))

    def _ask(self, keys: Sequence[_Key]) -> Mapping[_Key, Standing]:
        found: dict[_Key, Standing] = {}
        with self._transactions.read() as connection:
            for some in chunks(keys):
                found |= _read(connection, some)
        return found


def _read(connection: Connection, keys: Sequence[_Key]) -> dict[_Key, Standing]:
    """Two statements: one that joined users with the pairs that are asked for would need them as a table."""
    ids = [UUID(int=user) for user in {user for user, _ in keys}]
    living = select(_users.c.id, _users.c.tokens_valid_from).where(_users.c.id.in_(ids) & _users.c.deleted_at.is_(None))
    users = {row.id.int: row.tokens_valid_from for row in connection.execute(living)}
    pairs = [(UUID(int=user), UUID(int=tenant)) for user, tenant in keys if tenant is not None]
    roles: dict[_Key, str] = {}
    if pairs:
        members = select(_memberships.c.user_id, _memberships.c.tenant_id, _memberships.c.role)
        members = members.where(tuple_(_memberships.c.user_id, _memberships.c.tenant_id).in_(pairs))
        roles = {(row.user_id.int, row.tenant_id.int): row.role for row in connection.execute(members)}
    return {key: Standing(True, roles.get(key), _seconds(users[key[0]])) for key in keys if key[0] in users}


def _seconds(moment: datetime | None) -> float | None:
    return None if moment is None else moment.timestamp()


def _subjects(key: _Key) -> tuple[Hashable, ...]:
    return key, key[0]
