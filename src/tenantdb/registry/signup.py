"""Sign-up: a user, a tenant, the membership between them and the operation that will make the database, all or nothing.

One transaction of the serving login, so that a web process without a provisioner can do it; a worker carries the operation out. How often
it may be tried is counted before (`tenantdb.registry.rates`), and before a password is hashed, which is slow on purpose.

An idempotency key makes repeating harmless. It is no password: whoever repeats a request with a new user must know that user's password,
because what he gets back is somebody's tenant.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from tenantdb.errors import TenantExists, UserExists
from tenantdb.model import MemberRole, NewUser, Subscription, Tenant, TenantState, User
from tenantdb.registry import audit, fields
from tenantdb.registry.operations import PROVISION, SANCTIONED, TAKE, Operation
from tenantdb.registry.passwords import hash_password
from tenantdb.registry.tenants import SIGNED_UP, SpareWish, sign_up_values
from tenantdb.registry.transactions import violates
from tenantdb.resolvers import canonical_slug

if TYPE_CHECKING:
    from tenantdb.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class SignUp:
    """One request for a new tenant. ``payload`` is what the operation needs to know beside the tenant: the wanted server, the region.
    ``kind`` is the procedure that makes its database, where no spare will do."""

    slug: str
    name: str | None = None
    owner: User | UUID | NewUser | None = None
    email: str | None = None
    phone: str | None = None
    country: str | None = None
    plan: str | None = None
    subscription: Subscription | str = Subscription.TRIAL
    metadata: Mapping[str, Any] | None = None
    payload: Mapping[str, Any] = field(default_factory=dict)
    idempotency_key: str | None = None
    kind: str = PROVISION

    def fingerprint(self) -> bytes:
        """The same for the same request, wherever its database is wanted: a server that was named wrongly can be named anew.

        Without the password: a fast hash of it would be a gift to whoever reads the table.
        """
        owner = self.owner
        who = fields.required_email_key(owner.email) if isinstance(owner, NewUser) else str(getattr(owner, "id", owner))
        request = {name: getattr(self, name) for name in ("slug", "name", "email", "phone", "country", "plan")}
        request |= {"subscription": fields.subscription(self.subscription).value, "owner": who}
        request["metadata"] = fields.document("metadata", self.metadata)
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Taking:
    """Whoever signs up may have a spare: which will do, and what is left to do with it. ``at_once``: nothing, it is active then."""

    wish: SpareWish
    at_once: bool


@dataclass(frozen=True, slots=True)
class Hands:
    """Who carries an operation out from here on, and for how long without a sign of life; whether they can make a database too."""

    worker: str
    lease: timedelta
    makes: bool


def sign_up(registry: Registry, request: SignUp, *, taking: Taking | None = None, hands: Hands | None = None) -> tuple[Tenant, Operation]:
    """Carry a sign-up out, or find the one that was carried out under the same idempotency key.

    ``taking``: a spare will do. Without ``hands`` the operation is left to whoever claims it.

    Raises: `InvalidSlug`, `InvalidUser`, `UserNotFound`, `UserExists`; `TenantExists` where the slug is taken, or the key was used for
    something else; `RateLimited`. Nothing was written then.
    """
    canonical_slug(request.slug)
    key = fields.text("idempotency_key", request.idempotency_key)
    digest = request.fingerprint()
    try:
        earlier = _earlier(registry, request, key, digest)
    except TenantExists:  # no repetition, so one attempt more
        registry.sign_up_limits.count()
        raise
    if earlier is not None:
        return earlier
    registry.sign_up_limits.count()
    try:
        return _write(registry, request, key, digest, taking, hands)
    except (TenantExists, UserExists, IntegrityError) as error:
        # The same request may have been quicker in another thread; then it holds the slug, the e-mail and the key.
        if (earlier := _earlier(registry, request, key, digest)) is not None:
            return earlier
        if isinstance(error, IntegrityError) and violates(error, "tenantdb_operations", "idempotency_key"):
            raise TenantExists(request.slug) from error
        raise


def _earlier(registry: Registry, request: SignUp, key: str | None, digest: bytes) -> tuple[Tenant, Operation] | None:
    operation = None if key is None else registry.operations.by_key(key)
    if operation is None:
        return None
    owner = request.owner
    same = operation.request_hash == digest
    if not same or (isinstance(owner, NewUser) and not registry.users.verifies(owner.email, owner.password)):
        raise TenantExists(request.slug)
    return registry.tenants.get(operation.tenant_id), operation


def _write(
    registry: Registry, request: SignUp, key: str | None, digest: bytes, taking: Taking | None, hands: Hands | None
) -> tuple[Tenant, Operation]:
    owner = request.owner
    password_hash = hash_password(owner.password) if isinstance(owner, NewUser) else ""  # slow, so before the transaction
    with registry.admin_write() if request.kind in SANCTIONED else registry.write() as connection:
        user_id: UUID | None = None
        if isinstance(owner, NewUser):
            made = registry.users.create_in(connection, owner.email, password_hash, first_name=owner.first_name, last_name=owner.last_name)
            user_id = made.id
        elif owner is not None:
            user_id = owner.id if isinstance(owner, User) else owner
        tenant, kind, done = _tenant(registry, connection, request, taking)
        if not done:
            registry.sign_up_limits.check_unfinished(connection)
        if user_id is not None:
            registry.memberships.add_in(connection, user_id, tenant.id, MemberRole.OWNER)
        mine = hands is not None and (hands.makes or kind == TAKE)
        operation = registry.operations.create(
            connection,
            kind,
            tenant.id,
            payload=request.payload,
            idempotency_key=key,
            request_hash=digest,
            worker=hands.worker if hands is not None and mine else None,
            lease=hands.lease if hands is not None and mine else None,
            done=done,
        )
        details = {"spare": True} if kind == TAKE else {}
        audit.record(connection, "tenant.sign_up", tenant_id=tenant.id, object=operation.id, details=details)
    registry.forget(tenant.id, tenant.slug)
    return tenant, operation


def _tenant(registry: Registry, connection: Connection, request: SignUp, taking: Taking | None) -> tuple[Tenant, str, bool]:
    """A spare that was made ahead, or else a row without a place; by which procedure it goes on, and whether that is over."""
    values = sign_up_values(**{name: getattr(request, name) for name in SIGNED_UP})
    if taking is not None:
        to = TenantState.ACTIVE if taking.at_once else TenantState.PROVISIONING
        if (taken := registry.tenants.take_spare(connection, values, taking.wish, to)) is not None:
            return taken, TAKE, taking.at_once
    return registry.tenants.create(connection, values), request.kind, False
