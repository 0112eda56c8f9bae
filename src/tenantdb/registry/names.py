"""Which tenants and domains there are, by name: what bounds the questions to the registry when many are asked for that there are not.

Who calls us by host names or paths of his own invention never uses the same twice, so remembering the unknown ones does not help: each
would cost a query. A few are answered that way, because it is the freshest. When there are more within one period, all names are read at
once, and for as long as that list is believed an unknown name costs nothing. A name that is on the list is looked up as ever, so a flood
takes nothing from tenants that are not in memory.

What it keeps true: within one period (``ttl`` seconds) at most ``allowance`` unknown names reach the registry, beside those that were under
way at that moment, and the list is read once. No name is ruled out by a list older than a period, and none that `add` has told of since.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from uuid import UUID

from sqlalchemy import select

from tenantdb.forking import follow
from tenantdb.registry.flights import SingleFlight
from tenantdb.registry.tables import tenants
from tenantdb.registry.transactions import Transactions

ALLOWANCE = 100  # unknown names in one period that are looked up one by one
Key = str | UUID


class KnownNames:
    """All names of one kind, the ids and slugs of tenants or the domains, read when they are needed.

    ``ttl`` is in seconds of ``clock``. Safe to share between threads.
    """

    def __init__(
        self, read: Callable[[], Iterable[Key | None]], *, ttl: float, clock: Callable[[], float], allowance: int = ALLOWANCE
    ) -> None:
        self._read = read
        self._ttl = ttl
        self._clock = clock
        self._allowance = allowance
        self._lock = threading.Lock()
        self._flights: SingleFlight[str, None] = SingleFlight()
        self._missed = 0
        self._period_ends = 0.0
        self._names: set[Key | None] | None = None  # of this period
        self._added: list[Key | None] | None = None  # while the list is being read
        follow(self)

    def missed(self) -> None:
        """The registry was asked for a name that nobody has."""
        with self._lock:
            now = self._clock()
            if now >= self._period_ends:
                self._missed, self._period_ends, self._names = 0, now + self._ttl, None
            self._missed += 1

    def rule_out(self, key: Key) -> bool:
        """Whether nobody has this name, without asking for it. Raises: `RegistryUnavailable` and the like where the list cannot be read."""
        with self._lock:
            if self._missed < self._allowance or self._clock() >= self._period_ends:
                return False
            if self._names is not None:
                return key not in self._names
        self._flights.run("names", self._refresh)
        with self._lock:
            return self._names is not None and key not in self._names

    def add(self, *names: Key | None) -> None:
        """What has these names has changed, or is new: look it up."""
        with self._lock:
            if self._added is not None:
                self._added.extend(names)
            if self._clock() >= self._period_ends:
                self._names = None  # a long list does not stay in memory when the flood is over
            elif self._names is not None:
                self._names.update(names)

    def start_empty(self) -> object:
        """In the child after a fork, where somebody may have held the lock."""
        inherited, self._lock = self._lock, threading.Lock()
        self._names = self._added = None
        return inherited

    def _refresh(self) -> None:
        with self._lock:
            if self._names is not None:  # it landed between our look and our take-off
                return
            self._added, period = [], self._period_ends
        try:
            names = set(self._read())
        except BaseException:
            with self._lock:
                self._added = None
            raise
        with self._lock:
            names.update(self._added)
            self._added = None
            if period == self._period_ends:  # else it is older than that
                self._names = names


def read_names(transactions: Transactions) -> list[Key | None]:
    """The id and the slug of every tenant."""
    with transactions.read() as connection:
        rows = connection.execute(select(tenants.c.id, tenants.c.slug)).all()
    return [name for row in rows for name in row]
