"""Who makes a request, and which tenant it gets: what the adapters for ASGI and WSGI share beside the pure `tenantdb.requests`.

A `Visit` is one request, or one websocket, from its facts to its answer. Each step exists in both colours; what is in memory costs neither
a thread nor a query, and while the process watches the registry (`TenantDB.watch`) a request that is not the first of its kind asks it
nothing.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

from tenantdb.aio import AsyncTenantDB
from tenantdb.context import ANONYMOUS
from tenantdb.database import TenantDB
from tenantdb.errors import (
    AccessError,
    AuthenticationRequired,
    ConfigError,
    InvalidToken,
    NotAMember,
    RegistryUnavailable,
    TenantDBError,
    TenantNotFound,
)
from tenantdb.model import Facts, Identity, Tenant
from tenantdb.requests import Gate, Problem, bearer_token, problem_for
from tenantdb.resolvers import DomainName, TenantName
from tenantdb.tokens import Tokens

log = logging.getLogger("tenantdb.requests")

Authenticate = Callable[[Facts], "Identity | Awaitable[Identity | None] | None"]
"""Finds out who makes a request; None: it carries no credentials. A function, or in asyncio also a coroutine function.

An object may have more: ``acall``, what asyncio is to call instead, and ``start``, called without arguments, in a thread, when the
application starts.
"""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}", re.ASCII)  # what may go into logs and the audit log as it is


class Visit:
    """What the middleware knows of one request; adapters that stand on it find it in ``scope["tenantdb"]`` or ``environ["tenantdb"]``."""

    __slots__ = ("_answered", "_asked", "_authenticate", "_identity", "adb", "db", "exempt", "facts", "gate", "source")

    def __init__(self, db: TenantDB, adb: AsyncTenantDB | None, gate: Gate, authenticate: Any, facts: Facts, source: str | None) -> None:
        self.db = db
        self.adb = adb
        self.gate = gate
        self.facts = facts
        self.source = source
        self.exempt = False
        self._authenticate = authenticate
        self._asked = False
        self._answered = False
        self._identity: Identity | None = None

    @property
    def request_id(self) -> str | None:
        """The client's or proxy's ``X-Request-ID``, if it is fit for a log."""
        given = self.facts.headers.get("x-request-id")
        return given if given is not None and _REQUEST_ID.fullmatch(given) else None

    # -- who ---------------------------------------------------------------------------------------------------------------------------

    def identify(self) -> Identity | None:
        """Who makes the request; asked until there is an answer. On an exempt route nobody has asked before somebody calls this."""
        if not self._answered:
            self._asked = True
            if self._authenticate is not None:
                found = self._authenticate(self.facts)
                if inspect.isawaitable(found):
                    if inspect.iscoroutine(found):
                        found.close()  # or Python warns that nobody awaited it
                    raise ConfigError("authenticate= is a coroutine function, and WSGI cannot await it; give it an ordinary function")
                self._identity = found
            self._answered = True
        return self._identity

    async def aidentify(self) -> Identity | None:
        """The same for asyncio."""
        if not self._answered:
            self._asked = True
            if self._authenticate is not None:
                found = self._authenticate(self.facts)
                self._identity = await found if inspect.isawaitable(found) else found
            self._answered = True
        return self._identity

    # -- which tenant ------------------------------------------------------------------------------------------------------------------

    def tenant(self, names: Sequence[TenantName]) -> Tenant:
        """The one tenant that all names are of, if it may be served. Raises: `TenantMismatch`, and what `TenantDB.resolve` raises."""
        domains = self.db.domains
        owners: dict[DomainName, UUID | None] = {}
        for name in names:
            if isinstance(name, DomainName):
                owners[name] = _owner(domains.tenant_of, name, decides=name is names[0])
        return self.gate.agreed(self.db._lookups.servable(_key(names[0], owners)), names, owners)

    async def atenant(self, names: Sequence[TenantName]) -> Tenant:
        """The same for asyncio."""
        lookups = self.db._lookups
        owners: dict[DomainName, UUID | None] = {}
        for name in names:
            if isinstance(name, DomainName):
                owners[name] = await self._aowner(name, decides=name is names[0])
        return self.gate.agreed(await lookups.aservable(_key(names[0], owners)), names, owners)

    async def _aowner(self, name: DomainName, *, decides: bool) -> UUID | None:
        domains = self.db.domains
        known = _owner(domains.peek, name, decides=decides)
        return known or await self.db._lookups.run(_owner, domains.tenant_of, name, decides=decides)

    async def again(self, authenticate: Any, bound: Tenant | None) -> None:
        """Whether a websocket that was let in before would be let in now, to the same tenant and in the same role, which its application
        has looked at once. Raises: what says why not."""
        now = Visit(self.db, self.adb, self.gate, authenticate, self.facts, self.source)
        identity = await now.aidentify()
        names = self.gate.names(self.facts, identity)
        tenant = await now.atenant(names) if names else None
        before = self._identity
        if (identity and identity.user) != (before and before.user) or (tenant and tenant.id) != (bound and bound.id):
            raise InvalidToken("the credentials are somebody else's by now")
        if (identity and identity.role) != (before and before.role):
            raise AccessError("the role is another by now")

    def without_tenant(self, identity: Identity | None) -> TenantDBError:
        """What to raise where an application wants the tenant of a request that is not exempt, and was let through without one."""
        if identity is not None:
            return NotAMember("the token names no tenant")
        return AuthenticationRequired() if self._authenticate is not None else TenantNotFound(self.facts.host)

    # -- what is answered --------------------------------------------------------------------------------------------------------------

    def answer(self, error: TenantDBError) -> Problem:
        """What the client is told of an error, after the log has been told more, and the audit log that somebody was refused."""
        problem = problem_for(error, identity_asked=self._asked and self._authenticate is not None)
        if problem.status in (401, 403):
            identity = self._identity
            who, tenant = (ANONYMOUS, None) if identity is None else (identity.user, identity.tenant)
            self.db.audit.refused(error.code, tenant, actor=who)
        method, path = self.facts.method, self.facts.path
        if problem.status == 500:  # a bug in the application, which the client is not told of
            log.error("%s %r: %s", method, path, error, exc_info=error)
        elif problem.status > 500:
            log.warning("%s %r: %s", method, path, error)
        else:  # what the client sent may be personal, so only why it may not is told
            log.info("%s %r: %d %s", method, path, problem.status, error if isinstance(error, AccessError) else error.code)
        return problem


def _owner(ask: Callable[[str], UUID | None], name: DomainName, *, decides: bool) -> UUID | None:
    try:
        return ask(name.name)
    except TenantNotFound:
        if decides:
            raise
        return None  # nobody's, so not that tenant's either


def _key(name: TenantName, owners: Mapping[DomainName, UUID | None]) -> str | UUID:
    if not isinstance(name, DomainName):
        return name
    owner = owners[name]
    if owner is None:
        raise TenantNotFound(name.name)
    return owner


# -- who is asking ---------------------------------------------------------------------------------------------------------------------


class RegistryAuth:
    """An ``authenticate`` function for applications whose users are in the registry: a bearer token says who, the registry says whether.

    A good signature is not enough: the user must exist, and be a member of the token's tenant; the role is the membership's, whatever the
    token says; neither the token nor all of its user's or its tenant's may have been revoked (`TenantDB.revocations`). What the registry
    said is believed for ``settings.cache_ttl`` seconds from the moment of asking, and kept fresh in the background while the process
    watches. A token without a tenant, where `Tokens` accepts one, gives an identity without one.

    Raises, when called: `InvalidToken` for a bad or revoked token or a deleted user; `NotAMember`, `TenantNotFound`, `RegistryUnavailable`.
    """

    def __init__(self, tokens: Tokens, db: AsyncTenantDB | TenantDB) -> None:
        self._tokens = tokens
        self._db = db.sync_db if isinstance(db, AsyncTenantDB) else db
        self._registry = self._db._registry

    def start(self) -> None:
        """Fetch what the first requests will need. Blocks."""
        self._tokens.start()

    def __call__(self, facts: Facts) -> Identity | None:
        token = bearer_token(facts)
        if token is None:
            return None
        claims, registry = self._tokens.verify(token), self._registry
        user, tenant = _user_id(claims), _tenant_id(claims, self._tokens.claim)
        standing = registry.standings.peek(user, tenant) or registry.standings.get(user, tenant)
        record = None if tenant is None else registry.peek(tenant) or registry.lookup(tenant)
        revoked = self._revoked(claims)
        if revoked is None:
            registry.revocations.load()
            revoked = self._revoked(claims)
        return _judged(claims, user, tenant, standing, None if record is None else record.tenant, revoked)

    async def acall(self, facts: Facts) -> Identity | None:
        """The same without blocking the event loop."""
        token = bearer_token(facts)
        if token is None:
            return None
        claims, registry, run = self._tokens.verify(token), self._registry, self._db._lookups.run
        user, tenant = _user_id(claims), _tenant_id(claims, self._tokens.claim)
        standing = registry.standings.peek(user, tenant) or await run(registry.standings.get, user, tenant)
        record = None if tenant is None else registry.peek(tenant) or await run(registry.lookup, tenant)
        revoked = self._revoked(claims)
        if revoked is None:
            await run(registry.revocations.load)
            revoked = self._revoked(claims)
        return _judged(claims, user, tenant, standing, None if record is None else record.tenant, revoked)

    def _revoked(self, claims: Mapping[str, Any]) -> bool | None:
        """None: the list of revoked tokens is not fresh enough to tell."""
        jti = claims.get("jti")
        return False if jti is None else self._registry.revocations.peek(jti)


def _judged(
    claims: dict[str, Any], user: UUID, tenant_id: UUID | None, standing: Any, tenant: Tenant | None, revoked: bool | None
) -> Identity:
    if not standing.exists:
        raise InvalidToken("the token's user does not exist any more")
    if revoked is None:  # not even after the list was read: that says nothing of the token
        raise RegistryUnavailable("it took too long to tell which tokens were revoked")
    if revoked:
        raise InvalidToken("the token was revoked")
    issued = claims["iat"]
    if standing.tokens_valid_from is not None and issued < standing.tokens_valid_from:
        raise InvalidToken("the user's tokens were revoked")
    if tenant_id is not None:
        if standing.role is None:
            raise NotAMember
        if tenant is not None and tenant.tokens_valid_from is not None and issued < tenant.tokens_valid_from.timestamp():
            raise InvalidToken("the tenant's tokens were revoked")
    return Identity(claims["sub"], tenant_id, standing.role, claims)


def _user_id(claims: Mapping[str, Any]) -> UUID:
    try:
        user = UUID(claims["sub"])
        if str(user) == claims["sub"]:  # another spelling would be another user to whoever keys by the text
            return user
    except ValueError:
        pass
    raise InvalidToken("the token's user is not one of the registry's")


def _tenant_id(claims: Mapping[str, Any], claim: str) -> UUID | None:
    return UUID(claims[claim]) if claim in claims else None
