"""Keys that a key service (a KMS, an HSM) wraps: each secret has a data key of its own, and only its wrapped form is stored.

The service is asked for each secret that is sealed, and for each that is opened unless its data key is still in memory. What is kept is
bounded in number and in time, so that a service that withdraws a right is obeyed within ``ttl`` seconds; what is kept for the runtime
purpose also spares every connect a call, and an event loop the wait for it (`DataKeys.warm`).
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable

from cachetools import LRUCache

from tenantdb.errors import KeyServiceUnavailable, TenantDBError
from tenantdb.forking import follow
from tenantdb.settings import KeyService

_SIZE = 10_000
_TTL = 300.0
_PAUSE = 5.0  # seconds after a failure in which nothing is fetched ahead: a service that hangs must not hold up every look-up
LENGTH = 32
_Place = tuple[str, str, str, bytes]


class DataKeys:
    """Makes and opens data keys. Safe to share between threads. ``ttl`` is in seconds of ``clock``."""

    def __init__(self, service: KeyService, *, size: int = _SIZE, ttl: float = _TTL, clock: Callable[[], float] = time.monotonic) -> None:
        self._service = service
        self._ttl = ttl
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: LRUCache[_Place, tuple[bytes, float]] = LRUCache(size)  # with the time until which it may be used
        self._paused_until = clock()
        follow(self)

    @property
    def key_id(self) -> bytes:
        """Which key of the service wraps now; a service with a single one need not name it."""
        return hashlib.sha256(b"tenantdb/key-service/v1" + str(getattr(self._service, "key_id", "")).encode()).digest()[:8]

    def new(self, purpose: str, tenant: str, column: str) -> tuple[bytes, bytes]:
        """A data key, wrapped and plain. Raises: `KeyServiceUnavailable`."""
        key = secrets.token_bytes(LENGTH)
        wrapped = _answer(lambda: self._service.wrap(key, _context(purpose, tenant, column)))
        if not 0 < len(wrapped) < 1 << 16:
            raise KeyServiceUnavailable(f"it wrapped a key in {len(wrapped)} bytes")
        return wrapped, key

    def unwrap(self, purpose: str, wrapped: bytes, tenant: str, column: str, *, keep: bool) -> bytes:
        """The plain data key, from memory where ``keep`` allows that. Raises: `KeyServiceUnavailable`, `CredentialTampered`."""
        place = (purpose, tenant, column, wrapped)
        return (self._remembered(place) if keep else None) or self._fetch(place, keep=keep)

    def warm(self, purpose: str, wrapped: bytes, tenant: str, column: str) -> None:
        """Have the key in memory for at least half of its time, if the service lets us. Raises nothing: whoever opens is told."""
        place = (purpose, tenant, column, wrapped)
        if self._remembered(place, for_another=self._ttl / 2) is not None or self._clock() < self._paused_until:
            return
        try:
            self._fetch(place, keep=True)
        except TenantDBError:
            self._paused_until = self._clock() + _PAUSE

    def start_empty(self) -> object:
        """In the child after a fork, where somebody may have held the lock."""
        inherited, self._lock = self._lock, threading.Lock()
        return inherited

    def _remembered(self, place: _Place, *, for_another: float = 0.0) -> bytes | None:
        with self._lock:
            key, until = self._kept.get(place, (None, 0.0))
        return key if self._clock() + for_another < until else None

    def _fetch(self, place: _Place, *, keep: bool) -> bytes:
        purpose, tenant, column, wrapped = place
        until = self._clock() + self._ttl
        key = _answer(lambda: self._service.unwrap(wrapped, _context(purpose, tenant, column)))
        if len(key) != LENGTH:
            raise KeyServiceUnavailable(f"it unwrapped a key of {len(key)} bytes instead of {LENGTH}")
        if keep:
            with self._lock:
                self._kept[place] = key, until
        return key


def _context(purpose: str, tenant: str, column: str) -> dict[str, str]:
    """What the service binds the key to, and may write in a log of its own: ids and names of columns. The rest of a secret's place is
    bound by the data key itself."""
    return {"purpose": purpose, "tenant": tenant, "column": column}


def _answer(ask: Callable[[], bytes]) -> bytes:
    """Only the type of what a service raises is told: its text may hold addresses and names of keys."""
    try:
        answer = ask()
    except TenantDBError:
        raise
    except Exception as error:
        raise KeyServiceUnavailable(f"it raised {type(error).__name__}") from error
    if not isinstance(answer, (bytes, bytearray)):
        raise KeyServiceUnavailable(f"it answered with {type(answer).__name__} instead of bytes")
    return bytes(answer)
