"""What happens to connections, as frozen records for logs and metrics; see `TenantDB.observe`. Tenants are named by slug."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ConnectionOpened:
    """A connection stands, checked and ready. ``seconds`` is what opening took."""

    server: str
    tenant: str
    seconds: float


@dataclass(frozen=True, slots=True)
class ConnectionClosed:
    """``reason``: evicted, idle, lifetime, limit, retired, closed, dead, unclean, invalidated, detached, collected, owner, failed,
    withdrawn."""

    server: str
    tenant: str
    reason: str


@dataclass(frozen=True, slots=True)
class Waited:
    """Somebody stood in the queue. ``served`` is False where the deadline came first or the queue was full."""

    server: str
    tenant: str
    seconds: float
    served: bool


@dataclass(frozen=True, slots=True)
class ServerDown:
    """So many connects failed in a row that new ones are refused at once, but for a probe now and then."""

    server: str
    problem: str


@dataclass(frozen=True, slots=True)
class ServerUp:
    """A probe came through."""

    server: str


@dataclass(frozen=True, slots=True)
class TenantQuarantined:
    """A connection reached a database that is not the tenant's."""

    server: str
    tenant: str
    problem: str


@dataclass(frozen=True, slots=True)
class LeaseOverdue:
    """A connection has been leased for longer than ``Budget(leak_after=...)``. ``place`` is the stack where it was taken."""

    server: str
    tenant: str
    seconds: float
    place: str


@dataclass(frozen=True, slots=True)
class LeaseLeft:
    """A connection was not given back when the block that bound the tenant ended. ``seconds``: how long it had been leased. ``place``: the
    stack where it was taken, empty for those that ``leak_sample`` passed over."""

    server: str
    tenant: str
    seconds: float
    place: str


Event = ConnectionOpened | ConnectionClosed | Waited | ServerDown | ServerUp | TenantQuarantined | LeaseOverdue | LeaseLeft
