"""How often tenants may be signed up: a limit for each who asks, one for all together, and one on what was begun and not finished.

A sign-up makes a database, so whoever signs up in a loop fills a server. What an hour allows is kept in one row for each who asks: a single
moment, up to which all that he asked for is paid. Each attempt moves it on by its share of the hour, and one that would move it further
than an hour ahead is refused (a leaky bucket, kept as a time: GCRA). So ``n`` an hour means ``n`` at once, and then one in each ``n``-th of
an hour.

What it keeps true:
1. An attempt counts in a transaction of its own, before anything slow or large is done for it: so those that fail count as well.
2. One that is refused counts nowhere. Whoever knocks on goes in as soon as another who waits; and who is over his own limit takes nothing
   of what all have together.
3. The row is locked from reading to writing, so two processes never admit one too many. Rows are locked in one order, nobody waits for
   those that are swept out, and so nobody waits in a circle.
4. There are as many rows as different people signed up within the last hour, and a few that wait for the next sweep. No key says who.

The clock is the process's own, as it is for the leases of operations: it is the difference between two machines' that a limit is wrong by.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, delete, func, select, update

from tenantdb.context import ANONYMOUS, Actor, current_actor
from tenantdb.errors import RateLimited
from tenantdb.model import TenantState
from tenantdb.registry.tables import rates, tenants, utcnow
from tenantdb.registry.transactions import Transactions
from tenantdb.settings import Settings

logger = logging.getLogger("tenantdb.registry")

HOUR = timedelta(hours=1)
_NETWORK = 64  # bits of an IPv6 address: the least that one customer of a provider has, and he uses any of them
_SWEPT = 10  # rows at most that one attempt clears away, so that none has to pay for a flood
_UNFINISHED = (TenantState.PROVISIONING, TenantState.FAILED)
_SOON = 60  # seconds: unfinished tenants are finished by a worker, or by people


@dataclass(frozen=True, slots=True)
class Limit:
    """``most`` an hour under one ``key``; ``words`` are for the log."""

    key: str
    most: int
    words: str


def paid_until(until: datetime, now: datetime, most: int) -> datetime | int:
    """The moment up to which one attempt more is paid, or after how many seconds it is worth another try."""
    new = max(until, now) + HOUR / most
    ahead = new - now - HOUR
    return new if ahead <= timedelta(0) else max(1, math.ceil(ahead.total_seconds()))


def is_limited(actor: Actor) -> bool:
    """Whether somebody acts by a request: the adapters say from where it came, or under which id. Operators, scripts and workers come from
    nowhere, whatever they call themselves."""
    return actor.actor == ANONYMOUS or actor.source is not None or actor.request_id is not None


def asker(actor: Actor) -> str | None:
    """Whose sign-ups are counted together: a user's, or those from one address of nobody known. None where not even that is known."""
    if actor.actor != ANONYMOUS:
        return f"actor {actor.actor}"
    return None if actor.source is None else f"source {network_of(actor.source)}"


def network_of(source: str) -> str:
    """An address as one customer has it: of IPv6 a whole /64, of an IPv4 address in IPv6's clothes that address."""
    try:
        address = ipaddress.ip_address(source.partition("%")[0])
    except ValueError:
        return source
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.ip_network((address, _NETWORK), strict=False))
        address = address.ipv4_mapped
    return str(address)


class SignUpLimits:
    """The limits of one installation, as its settings say. 0 means no limit. Safe to share between threads."""

    def __init__(self, transactions: Transactions, settings: Settings) -> None:
        self._transactions = transactions
        self._settings = settings

    def count(self) -> None:
        """Count one attempt of who acts here. Raises: `RateLimited`, and then nothing was counted; as `Transactions.write`."""
        limits = list(self._limits(current_actor()))
        if not limits:
            return
        now = utcnow()
        with self._transactions.write() as connection:
            for limit in limits:
                _take(connection, limit, now)
            _sweep(connection, now)

    def check_unfinished(self, connection: Connection) -> None:
        """In the transaction of a sign-up that has written its tenant: refuse it where too many are not finished, itself among them.

        Two that are signed up at the same moment do not see each other: there may be more by as many as have a connection to the registry
        then. Raises: `RateLimited`.
        """
        most = self._settings.unfinished_signups
        if not most or not is_limited(current_actor()):
            return
        some = select(tenants.c.id).where(tenants.c.state.in_([str(state) for state in _UNFINISHED])).limit(most + 1).subquery()
        if connection.scalars(select(func.count()).select_from(some)).one() > most:
            logger.warning(
                "a sign-up was refused: %d tenants are not finished (unfinished_signups). See `tenantdb list --state failed`", most
            )
            raise RateLimited(f"{most} tenants are not finished yet (unfinished_signups)", _SOON)

    def _limits(self, actor: Actor) -> Iterator[Limit]:
        if not is_limited(actor):
            return
        who, settings = asker(actor), self._settings
        if who is not None and (most := settings.signups_per_actor):
            yield Limit(hashlib.sha256(who.encode()).hexdigest(), most, f"{most} an hour by one actor or address (signups_per_actor)")
        if most := settings.signups:
            yield Limit("all", most, f"{most} an hour by all together (signups)")


def _take(connection: Connection, limit: Limit, now: datetime) -> None:
    row = _insert(connection).values(key=limit.key, until=now)
    locked = row.on_conflict_do_update(index_elements=[rates.c.key], set_={"until": rates.c.until}).returning(rates.c.until)
    verdict = paid_until(connection.scalars(locked).one(), now, limit.most)
    if isinstance(verdict, int):
        raise RateLimited(limit.words, verdict)
    connection.execute(update(rates).where(rates.c.key == limit.key).values(until=verdict))


def _sweep(connection: Connection, now: datetime) -> None:
    """Clear away rows that say nothing any more, other than those that somebody has in hand: he would wait for us, and we for him."""
    old = select(rates.c.key).where(rates.c.until < now).order_by(rates.c.until).limit(_SWEPT).with_for_update(skip_locked=True)
    connection.execute(delete(rates).where(rates.c.key.in_(old)))


def _insert(connection: Connection) -> Any:
    """The dialects write ON CONFLICT alike, and each has an `insert` of its own; importing both would load a driver nobody uses."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert as postgresql_insert

        return postgresql_insert(rates)
    from sqlalchemy.dialects.sqlite import insert as sqlite_insert

    return sqlite_insert(rates)
