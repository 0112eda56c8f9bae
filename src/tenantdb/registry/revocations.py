"""Access tokens that count no more, although their signatures are good and their time is not over.

One token is refused by its ``jti``: the list of those is short, because a token leaves it when it would have expired, so each process has
all of it in memory. All tokens of a user or a tenant up to now are refused by a moment on the user's or the tenant's row; that reaches the
processes with the standing (`Standings`) and the tenant's record.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID

from sqlalchemy import Column, Connection, Table, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from tenantdb.errors import InvalidToken
from tenantdb.forking import follow
from tenantdb.model import Tenant, User
from tenantdb.registry import audit, tables
from tenantdb.registry.flights import SingleFlight
from tenantdb.registry.ids import tenant_id_of, user_id_of
from tenantdb.registry.transactions import Transactions

OVERLAP = timedelta(minutes=5)
"""How far each reading of the list reaches back behind the one before. A row becomes visible when its transaction commits, with a time from
before and by the clock of whoever wrote it; five minutes are more than a transaction may sit idle, and than clocks differ."""
WHOLE = 600.0  # seconds after which all of the list is read again, whatever clocks say
_LEEWAY = timedelta(minutes=10)  # a token is accepted for a while after it has expired, and clocks differ
_MOST_JTI = 512

_revocations, _refresh = tables.revocations, tables.refresh_tokens
_users, _tenants = tables.users, tables.tenants


class RevocationStore:
    """Revokes, and knows the revoked. ``forget_user`` and ``forget_tenant`` are told of what is committed. Safe between threads."""

    def __init__(
        self,
        transactions: Transactions,
        forget_user: Callable[[UUID], None],
        forget_tenant: Callable[[UUID, str | None], None],
        *,
        ttl: float,
        clock: Callable[[], float],
        now: Callable[[], datetime] = tables.utcnow,
    ) -> None:
        self._transactions = transactions
        self._forget_user = forget_user
        self._forget_tenant = forget_tenant
        self._ttl = ttl
        self._clock = clock
        self._now = now
        self._lock = threading.Lock()
        self._flights: SingleFlight[str, None] = SingleFlight()
        # The revoked, and when the list ends to be believed: one object, because `peek` reads it without the lock.
        self._list: tuple[Mapping[str, datetime], float] = {}, 0.0
        self._read_at: datetime | None = None
        self._read_whole = 0.0
        self._used = False
        self._rounds = 0  # of clear
        follow(self)

    # -- the data path --

    def peek(self, jti: str) -> bool | None:
        """Whether a token is revoked, without I/O; None where the list is too old to tell: `load` it, and ask again."""
        self._used = True
        revoked, expires = self._list
        if jti in revoked:
            return True
        return False if self._clock() < expires else None

    def load(self) -> None:
        """Read what was added to the list. However many ask, one reads. Raises: `RegistryUnavailable` and its kin; the list is no younger
        then."""
        self._used = True
        self._flights.run("list", self._load)

    def refresh(self) -> bool:
        """Told that something was added: read that now, where anybody uses the list. Whoever reads already may have begun before."""
        if not self._used and self._clock() >= self._list[1]:
            return False
        self._flights.detach()
        self._flights.run("list", self._load)
        return True

    def check(self, *, everything: bool) -> bool:
        """Read on, if the list was used since the last time, and tell whether there was anything new. ``everything``: read all of it."""
        if everything:
            self._read_at = None
        if not self._used:
            return False
        self._used = False
        before, _ = self._list
        self._flights.run("list", self._load)
        return not self._list[0].keys() <= before.keys()

    def clear(self) -> None:
        """Forget the list."""
        with self._lock:
            self._rounds += 1
            self._list, self._read_at = ({}, 0.0), None
        self._flights.detach()

    def start_empty(self) -> object:
        """In the child after a fork, where somebody may have held the lock; what is remembered is believed on."""
        inherited, self._lock = self._lock, threading.Lock()
        return inherited

    def _load(self) -> None:
        with self._lock:
            began, now, rounds = self._clock(), self._now(), self._rounds
            since = None if self._read_at is None or began - self._read_whole >= WHOLE else self._read_at - OVERLAP
        query = select(_revocations.c.jti, _revocations.c.expires_at).where(_revocations.c.expires_at > now)
        if since is not None:
            query = query.where(_revocations.c.created_at > since)
        with self._transactions.read() as connection:
            found = {row.jti: row.expires_at for row in connection.execute(query)}
        with self._lock:
            if rounds != self._rounds:
                return
            if since is None:
                self._read_whole = began
            revoked, expires = self._list  # what was revoked stays so: nothing takes a revocation back
            living = {jti: until for jti, until in {**revoked, **found}.items() if until > now}
            self._list = living, max(expires, began + self._ttl)
            self._read_at = now

    # -- revoking --

    def revoke_token(self, claims: Mapping[str, Any]) -> None:
        """Refuse one token from now on. ``claims`` are those of a verified token. May run again.

        Raises: `InvalidToken` where they have no ``jti`` and ``exp`` to go by.
        """
        jti, exp = claims.get("jti"), claims.get("exp")
        if not isinstance(jti, str) or not 0 < len(jti) <= _MOST_JTI or isinstance(exp, bool) or not isinstance(exp, (int, float)):
            raise InvalidToken(f"a token is revoked by its jti, of up to {_MOST_JTI} characters, and its exp")
        now = self._now()
        try:
            until = datetime.fromtimestamp(exp, timezone.utc) + _LEEWAY
        except (ValueError, OverflowError, OSError):
            raise InvalidToken("the token's exp is no time") from None
        if until <= now:
            return
        try:
            with self._transactions.write() as connection:
                connection.execute(delete(_revocations).where(_revocations.c.expires_at <= now))
                if connection.scalar(select(_revocations.c.jti).where(_revocations.c.jti == jti)) is None:
                    connection.execute(insert(_revocations).values(jti=jti, expires_at=until, created_at=now))
                    audit.record(connection, "token.revoke", object=jti)
        except IntegrityError:  # another process revoked it at once
            pass
        with self._lock:
            revoked, expires = self._list
            self._list = {**revoked, jti: until}, expires

    def revoke_user(self, user: User | UUID | str) -> None:
        """Refuse every access token that was issued to a user before now; the refresh tokens end too. Raises: `UserNotFound`."""
        with self._transactions.write() as connection:
            user_id = user_id_of(connection, user)
            self._end_all(connection, _users, _refresh.c.user_id, user_id)
            audit.record(connection, "user.revoke_tokens", object=user_id)
        self._forget_user(user_id)

    def revoke_tenant(self, tenant: Tenant | UUID | str) -> None:
        """The same for a tenant: whoever works there signs in again. Raises: `TenantNotFound`."""
        with self._transactions.write() as connection:
            tenant_id = tenant_id_of(connection, tenant)
            self._end_all(connection, _tenants, _refresh.c.tenant_id, tenant_id)
            audit.record(connection, "tenant.revoke_tokens", tenant_id=tenant_id)
        self._forget_tenant(tenant_id, None)

    def _end_all(self, connection: Connection, holders: Table, held_by: Column[Any], holder: UUID) -> None:
        """The access tokens of a user or a tenant from before now, and the refresh tokens."""
        ended = {"tokens_valid_from": self._now(), "version": holders.c.version + 1, "updated_at": tables.utcnow()}
        connection.execute(update(holders).where(holders.c.id == holder).values(ended))
        connection.execute(delete(_refresh).where(held_by == holder))
