"""The nouns every other file speaks: tenants, servers, users, identities, and the one table of lifecycle transitions.

Pure: no I/O, no clock, no SQLAlchemy. Records are frozen, so that a cached one can be handed to any thread. No record holds a secret.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any
from uuid import UUID


class StrEnum(str, enum.Enum):
    """As `enum.StrEnum`, which Python 3.10 does not have: ``str()`` gives the value."""

    def __str__(self) -> str:
        return str(self.value)


class TenantState(StrEnum):
    """Where a tenant is in its life. Only ``active`` is served."""

    SPARE = "spare"
    PROVISIONING = "provisioning"
    ACTIVE = "active"
    FAILED = "failed"
    SUSPENDED = "suspended"
    MAINTENANCE = "maintenance"
    DELETED = "deleted"
    PURGING = "purging"
    PURGED = "purged"


_S = TenantState
TRANSITIONS: Mapping[TenantState, frozenset[TenantState]] = MappingProxyType(
    {
        _S.SPARE: frozenset({_S.PROVISIONING, _S.ACTIVE, _S.PURGING}),
        _S.PROVISIONING: frozenset({_S.ACTIVE, _S.FAILED}),
        _S.FAILED: frozenset({_S.PROVISIONING, _S.DELETED}),
        _S.ACTIVE: frozenset({_S.SUSPENDED, _S.MAINTENANCE, _S.DELETED}),
        _S.SUSPENDED: frozenset({_S.ACTIVE, _S.DELETED}),
        _S.MAINTENANCE: frozenset({_S.ACTIVE, _S.DELETED}),
        _S.DELETED: frozenset({_S.ACTIVE, _S.PURGING}),
        _S.PURGING: frozenset({_S.PURGED}),
        _S.PURGED: frozenset(),
    }
)
"""Every legal change of state. The registry refuses any other, and writes each as a compare-and-set."""


class Fence(StrEnum):
    """Whether the database server itself refuses a tenant that is not served: about to, or does. Without a fence it lets the tenant in."""

    PENDING = "pending"
    DONE = "done"


class Subscription(StrEnum):
    """What the tenant pays for, as the billing system last told us."""

    TRIAL = "trial"
    ACTIVE = "active"
    PAST_DUE = "past_due"
    CANCELLED = "cancelled"


class MemberRole(StrEnum):
    """What a user may do inside one tenant. What each role means is the application's to say."""

    OWNER = "owner"
    ADMIN = "admin"
    USER = "user"
    READONLY = "readonly"


class DatabaseRole(StrEnum):
    """Which of a tenant's two credentials a connection uses: ``owner`` migrates the schema, ``runtime`` reads and writes rows."""

    OWNER = "owner"
    RUNTIME = "runtime"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One customer: an immutable ``id``, a public ``slug``, exactly one database.

    ``version`` grows with every write and orders cached copies; ``generation`` grows when location, credentials or fence change and is
    part of every engine's key. ``database`` and the role names are opaque (``t_`` and 16 hex digits), drawn once and never derived again;
    they are None until provisioning has reserved them. ``revision`` is the Alembic revision last recorded for its schema. ``reason``
    says why a failed tenant failed. ``fence`` tells whether the server refuses a tenant that is suspended or deleted already, or is about
    to. A deleted tenant can be restored until ``purge_after``, and under a ``legal_hold`` (its reason) it cannot be purged.
    ``adopted_from`` is the role that owned the database before `TenantDB.adopt`. A spare, and what is left of a purged tenant, have
    neither slug nor name; their ``slug`` reads as the id. ``ready_at`` says since when a spare may be taken. Access tokens issued before
    ``tokens_valid_from`` are refused. Times are aware, in UTC.
    """

    id: UUID
    slug: str
    name: str
    state: TenantState
    email: str | None = None
    phone: str | None = None
    country: str | None = None
    server: str | None = None
    database: str | None = None
    owner_role: str | None = None
    runtime_role: str | None = None
    version: int = 1
    generation: int = 1
    revision: str | None = None
    plan: str | None = None
    subscription: Subscription = Subscription.TRIAL
    subscription_expires_at: datetime | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None
    deleted_at: datetime | None = None
    fence: Fence | None = None
    ready_at: datetime | None = None
    purge_after: datetime | None = None
    purged_at: datetime | None = None
    legal_hold: str | None = None
    adopted_from: str | None = None
    tokens_valid_from: datetime | None = None

    @property
    def servable(self) -> bool:
        """Whether sessions may be opened for this tenant."""
        return self.state is TenantState.ACTIVE

    def is_past_due(self, now: datetime) -> bool:
        """Whether the subscription is not paid for: past due, or run out (``subscription_expires_at``), whatever else it is. One that was
        cancelled is paid for until it runs out, where a time for that is known."""
        if self.subscription_expires_at is not None and self.subscription_expires_at <= now:
            return True
        return self.subscription == Subscription.PAST_DUE or (
            self.subscription == Subscription.CANCELLED and self.subscription_expires_at is None
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A PostgreSQL server, or a folder of SQLite files, that holds tenant databases.

    ``host`` and ``port`` are the runtime address, which may be a pooler; ``direct_host`` and ``direct_port`` lead to the server itself, for
    migrations and provisioning. ``path`` is the folder of a SQLite server. ``capacity`` is the number of tenants it may hold (None: no
    limit). ``extensions`` and ``schemas`` are made in every new database by the provisioner, because a tenant's owner role cannot.
    """

    id: UUID
    name: str
    backend: str
    host: str | None = None
    port: int | None = None
    direct_host: str | None = None
    direct_port: int | None = None
    path: str | None = None
    region: str | None = None
    capacity: int | None = None
    extensions: tuple[str, ...] = ()
    schemas: tuple[str, ...] = ()
    draining: bool = False


class TemplateState(StrEnum):
    """Being made, in use, or to be dropped."""

    BUILDING = "building"
    CURRENT = "current"
    RETIRED = "retired"


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """One golden database. ``digest`` stands for everything beside the revision that makes databases differ."""

    id: UUID
    server_id: UUID
    revision: str | None
    digest: str
    database: str
    owner_role: str | None
    state: TemplateState
    worker: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """A person who may sign in; membership says to which tenants. Holds no password and no token."""

    id: UUID
    email: str
    first_name: str | None = None
    last_name: str | None = None
    email_verified_at: datetime | None = None
    platform_admin: bool = False
    created_at: datetime | None = None
    updated_at: datetime | None = None
    deleted_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewUser:
    """A user to be made together with a tenant: ``db.provision("acme", owner=NewUser(...))``. The password never appears in its repr."""

    email: str
    password: str = field(repr=False)
    first_name: str | None = None
    last_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """One user's role in one tenant."""

    user_id: UUID
    tenant_id: UUID
    role: MemberRole
    version: int = 1
    created_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """A host name by which a tenant is reached, beside the application's own."""

    domain: str
    tenant_id: UUID
    created_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One line of the audit log. ``details`` never holds personal data.

    ``seq`` is its number in the chain of its tenant (or of the installation, where it tells of none), ``mac`` what vouches for it and for
    all before it: ``key id (8) | HMAC-SHA256``, None where there is no key. ``source`` is where the actor came from, an address.
    """

    id: int
    at: datetime
    actor: str
    action: str
    outcome: str
    tenant_id: UUID | None = None
    object: str | None = None
    request_id: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    seq: int | None = None
    mac: bytes | None = field(default=None, repr=False)
    reason: str | None = None
    source: str | None = None


class AuditLog(StrEnum):
    """Where an entry of the audit log stands: in the registry, or beside a tenant's records in its own database."""

    REGISTRY = "registry"
    RECORDS = "records"


class Break(StrEnum):
    """Why a chain of the audit log does not hold."""

    EDITED = "edited"
    MISSING = "missing"
    REORDERED = "reordered"
    FORGED = "forged"
    UNKNOWN_KEY = "unknown-key"
    NOT_AUTHENTICATED = "not-authenticated"
    HEAD = "head-mismatch"
    ANCHOR = "anchor-mismatch"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditHead:
    """How far a chain had come at a moment: what is written outside (`anchor`), so that a tail that was cut off is missed."""

    log: AuditLog
    tenant_id: UUID | None
    seq: int
    mac: bytes | None = field(repr=False)
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainReport:
    """What `verify` found in one chain: a tenant's, or the installation's (``tenant_id`` None).

    ``entries`` stand in it, ``unauthenticated`` of them without a MAC, because no key was given when they were written. ``broken_at`` is
    the first number that does not hold, and ``why`` says what is wrong there.
    """

    log: AuditLog
    tenant_id: UUID | None
    entries: int
    unauthenticated: int = 0
    broken_at: int | None = None
    why: Break | None = None

    @property
    def ok(self) -> bool:
        return self.why is None


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What `verify` found, chain by chain; ``anchors`` is how many of them were compared with one."""

    chains: tuple[ChainReport, ...] = ()
    anchors: int = 0

    @property
    def ok(self) -> bool:
        return not self.broken

    @property
    def broken(self) -> tuple[ChainReport, ...]:
        return tuple(chain for chain in self.chains if not chain.ok)

    @property
    def entries(self) -> int:
        return sum(chain.entries for chain in self.chains)

    @property
    def unauthenticated(self) -> int:
        return sum(chain.unauthenticated for chain in self.chains)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What `retain` did: entries older than ``before`` that it deleted; tenants under a legal hold and chains that do not hold, which it
    left as they are."""

    before: datetime
    deleted: int
    held: tuple[UUID, ...] = ()
    broken: tuple[ChainReport, ...] = ()


@dataclass(frozen=True, slots=True)
class TenantUse:
    """One tenant's connections in this process: held in all, of these idle, and claims that wait."""

    tenant: str
    held: int
    idle: int
    waiting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetStats:
    """The budget of one database server in this process, at one moment.

    ``limit`` is this process's share of ``total`` between ``processes``. ``in_use + idle + opening + closing + detached`` never exceeds it.
    ``opens`` to ``refusals`` count since the start, ``closes`` by reason. ``available`` is False while connects to the server are refused
    at once. ``tenants`` are the ten that hold the most.
    """

    server: str
    total: int
    processes: int
    limit: int
    per_tenant: int
    in_use: int
    idle: int
    opening: int
    closing: int
    detached: int
    waiting: int
    opens: int
    reuses: int
    waits: int
    timeouts: int
    refusals: int
    closes: Mapping[str, int] = field(default_factory=dict)
    available: bool = True
    tenants: tuple[TenantUse, ...] = ()

    @property
    def held(self) -> int:
        return self.in_use + self.idle + self.opening + self.closing + self.detached

    @property
    def evictions(self) -> int:
        """Idle connections closed because another tenant needed the place."""
        return self.closes.get("evicted", 0)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a request says about itself: all that ``authenticate`` functions and resolvers may decide by.

    ``scheme`` is http, https, ws or wss; ``host`` lower case, without port; ``path`` what the router sees, decoded and without the root
    path; ``headers`` have lower-case names, and a header that was sent twice holds both values, joined as RFC 9110 says. ``claims`` are
    those of verified credentials: empty for an ``authenticate`` function, which is still about to verify them.
    """

    scheme: str
    host: str
    path: str
    method: str
    headers: Mapping[str, str]
    claims: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cookies(self) -> Mapping[str, str]:
        """The cookies by name; of two with one name the first, which is the one with the more specific path (RFC 6265, 5.4)."""
        found: dict[str, str] = {}
        for pair in self.headers.get("cookie", "").split(";"):
            name, separator, value = pair.partition("=")
            if separator:
                found.setdefault(name.strip(), value.strip())
        return found


@dataclass(frozen=True, slots=True)
class Identity:
    """Who makes a request, as the application's ``authenticate`` found out.

    ``user`` is an opaque id; ``tenant`` a slug, a UUID or None (the identity works unbound); ``role`` the role in that tenant; ``claims``
    whatever else the token said.
    """

    user: str
    tenant: str | UUID | None = None
    role: str | None = None
    claims: Mapping[str, Any] = field(default_factory=dict)
