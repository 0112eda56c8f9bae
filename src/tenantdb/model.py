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
    says why a failed tenant failed. Times are aware, in UTC.
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

    @property
    def servable(self) -> bool:
        """Whether sessions may be opened for this tenant."""
        return self.state is TenantState.ACTIVE


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
class AuditEntry:
    """One line of the audit log. ``details`` never holds personal data."""

    id: int
    at: datetime
    actor: str
    action: str
    outcome: str
    tenant_id: UUID | None = None
    object: str | None = None
    request_id: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


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
class Identity:
    """Who makes a request, as the application's ``authenticate`` found out.

    ``user`` is an opaque id; ``tenant`` a slug, a UUID or None (the identity works unbound); ``role`` the role in that tenant; ``claims``
    whatever else the token said.
    """

    user: str
    tenant: str | UUID | None = None
    role: str | None = None
    claims: Mapping[str, Any] = field(default_factory=dict)
