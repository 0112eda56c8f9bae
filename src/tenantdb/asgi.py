"""Which tenant a request runs for: an ASGI middleware, and the shipped answer to "who is asking".

The middleware is a convenience, not the control: what lies behind it and asks for a session without a tenant gets `NoTenantBound`, however
it came there. What it promises is the binding's life: from before the application is called until it has returned, which for ASGI means
that the body has been sent, background tasks have run, or the client is gone. It opens no connection.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from uuid import UUID

from cachetools import LRUCache

from tenantdb.aio import AsyncTenantDB
from tenantdb.context import acting, bind, unbound
from tenantdb.database import TenantDB
from tenantdb.errors import AccessError, AuthenticationRequired, InvalidToken, NotAMember, TenantDBError, UserNotFound
from tenantdb.model import Identity
from tenantdb.requests import ExemptRoutes, Facts, Problem, bearer_token, check_path, host_name, problem_for
from tenantdb.tokens import Tokens

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Authenticate: TypeAlias = Callable[[Facts], "Identity | Awaitable[Identity | None] | None"]

log = logging.getLogger("tenantdb.requests")

ANONYMOUS = "anonymous"  # who acts, for the audit log, where a request did not have to say
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}", re.ASCII)  # what may go into logs and the audit log as it is


class TenantMiddleware:
    """Binds the tenant that a request's identity names, for as long as the application works on the request.

    ``db``: the `TenantDB` or its async view. ``authenticate(facts) -> Identity | None``, a function or a coroutine function that does not
    block, such as `RegistryAuth`; None means that the request has no credentials. ``exempt``: routes that run without asking, and without a
    tenant: see `ExemptRoutes`. ``required=False`` lets a request without credentials through, unbound.

    In Starlette it goes in by ``app.add_middleware(TenantMiddleware, db=...)``: wrapped around the application from outside it does the
    same, but Starlette's own 500 then comes first where a route raises an error of tenantdb.

    A tenant that is unknown, suspended or not ready is refused whatever ``authenticate`` says. An error of tenantdb, raised here or by the
    application before its response has begun, becomes a problem document of its status; every other exception passes unchanged. A websocket
    is refused before it is accepted. The application finds the tenant by ``current_tenant()`` and in ``request.state.tenant``, who asks in
    ``request.state.identity``; both are None where there is none.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        db: AsyncTenantDB | TenantDB,
        authenticate: Authenticate,
        exempt: Iterable[str] = (),
        required: bool = True,
    ) -> None:
        self.app = app
        self.db = db if isinstance(db, AsyncTenantDB) else AsyncTenantDB(db)
        self.authenticate = authenticate
        self.exempt = ExemptRoutes(exempt)
        self.required = required

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        entry = Entry(self.db, facts_of(scope), self.authenticate, _source(scope))
        try:
            await self._serve(entry, scope, receive, watched)
        except TenantDBError as error:
            if begun:
                raise
            await refuse(scope, send, entry.answer(error))

    async def _serve(self, entry: Entry, scope: Scope, receive: Receive, send: Send) -> None:
        facts = entry.facts
        # A dict of our own: a server may share the state's dict between requests.
        state = scope["state"] = {**scope.get("state", {}), "tenant": None, "identity": None}
        scope["tenantdb"] = entry
        with unbound():  # even where the application is called from a block that has bound a tenant
            check_path(scope["path"], scope.get("raw_path"))
            entry.exempt = self.exempt.matches(facts.method, facts.path)
            identity = None if entry.exempt else await entry.identify()
            if identity is None:
                if self.required and not entry.exempt:
                    raise AuthenticationRequired
                with acting(ANONYMOUS, entry.request_id, entry.source):
                    await self.app(scope, receive, send)
                return
            state["identity"] = identity
            with acting(identity.user, entry.request_id, entry.source):
                if identity.tenant is None:
                    await self.app(scope, receive, send)
                    return
                tenant = await self.db.resolve(identity.tenant)
                state["tenant"] = tenant
                with bind(tenant):
                    await self.app(scope, receive, send)


@dataclass(eq=False)
class Entry:
    """What the middleware knows of one request, in ``scope["tenantdb"]``: for adapters that stand on this one."""

    db: AsyncTenantDB
    facts: Facts
    authenticate: Authenticate
    source: str | None = None
    exempt: bool = False
    _asked: bool = False
    _identity: Identity | None = field(default=None, repr=False)

    async def identify(self) -> Identity | None:
        """Who makes the request; asked once. On an exempt route nobody has asked before somebody calls this."""
        if not self._asked:
            self._asked = True
            found = self.authenticate(self.facts)
            self._identity = await found if inspect.isawaitable(found) else found
        return self._identity

    @property
    def request_id(self) -> str | None:
        """The client's or proxy's ``X-Request-ID``, if it is fit for a log."""
        given = self.facts.headers.get("x-request-id", "")
        return given if _REQUEST_ID.fullmatch(given) else None

    def answer(self, error: TenantDBError) -> Problem:
        """What the client is told of an error, after the log has been told more, and the audit log that somebody was refused."""
        problem = problem_for(error, identity_asked=self._asked)
        if problem.status in (401, 403):
            identity = self._identity
            who, tenant = (ANONYMOUS, None) if identity is None else (identity.user, identity.tenant)
            self.db.sync_db.audit.refused(error.code, tenant, actor=who)
        method, path = self.facts.method, self.facts.path
        if problem.status == 500:  # a bug in the application, which the client is not told of
            log.error("%s %r: %s", method, path, error, exc_info=error)
        elif problem.status > 500:
            log.warning("%s %r: %s", method, path, error)
        else:  # what the client sent may be personal, so only why it may not is told
            log.info("%s %r: %d %s", method, path, problem.status, error if isinstance(error, AccessError) else error.code)
        return problem


def facts_of(scope: Scope) -> Facts:
    """The facts of an http or websocket scope. The path is the one that Starlette's router matches, below the root path."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        if name in headers:
            value = headers[name] + ("; " if name == "cookie" else ", ") + value
        headers[name] = value
    path, root = scope["path"], scope.get("root_path", "")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        path = path[len(root) :]
    return Facts(
        scheme=scope.get("scheme", "http"),
        host=host_name(headers.get("host", "")),
        path=path,
        method=scope.get("method", "GET"),  # a websocket begins as a GET
        headers=headers,
    )


def _source(scope: Scope) -> str | None:
    """The address of who connected, as the server tells it: a proxy's, unless the server is told to believe what the proxy says."""
    client = scope.get("client")
    return None if client is None else str(client[0])


async def refuse(scope: Scope, send: Send, problem: Problem) -> None:
    """Answer a request whose response has not begun."""
    if scope["type"] == "websocket":
        # Closed before it is accepted, so the server answers the handshake with 403. Codes: policy violation, internal error, try later.
        await send({"type": "websocket.close", "code": {500: 1011, 503: 1013}.get(problem.status, 1008), "reason": problem.body["code"]})
        return
    body = json.dumps(problem.body).encode()
    headers = {**problem.headers, "content-length": str(len(body))}
    start = {"type": "http.response.start", "status": problem.status, "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}
    await send(start)
    await send({"type": "http.response.body", "body": body})


# -- who is asking ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Standing:
    """What the registry said of a user in a tenant, and when it was asked."""

    asked_at: float
    user_exists: bool
    role: str | None


class RegistryAuth:
    """An ``authenticate`` function for applications whose users are in the registry: a bearer token says who, the registry says whether.

    A good signature is not enough: the user must exist, and be a member of the token's tenant; the role is the membership's, whatever the
    token says. Answers are believed for ``settings.cache_ttl`` seconds from the moment of asking, at most ``settings.cache_size`` of them.
    A token without a tenant gives an identity without one.

    Raises, when called: `InvalidToken` for a bad token or a deleted user, `NotAMember`, `RegistryUnavailable`.
    """

    def __init__(self, tokens: Tokens, db: AsyncTenantDB | TenantDB, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._tokens = tokens
        self._db = db if isinstance(db, AsyncTenantDB) else AsyncTenantDB(db)
        self._clock = clock
        settings = self._db.sync_db.settings
        self._ttl = settings.cache_ttl
        self._lock = threading.Lock()  # event loops of several threads may share one application
        self._known: LRUCache[tuple[UUID, UUID | None], _Standing] = LRUCache(settings.cache_size)

    async def __call__(self, facts: Facts) -> Identity | None:
        token = bearer_token(facts)
        if token is None:
            return None
        claims = self._tokens.verify(token)
        user, tenant = _user_id(claims), _tenant_id(claims, self._tokens.claim)
        standing = await self._standing(user, tenant)
        if not standing.user_exists:
            raise InvalidToken("the token's user does not exist any more")
        if tenant is not None and standing.role is None:
            raise NotAMember
        return Identity(str(user), tenant, standing.role, claims)

    async def _standing(self, user: UUID, tenant: UUID | None) -> _Standing:
        now = self._clock()
        with self._lock:
            known = self._known.get((user, tenant))
        if known is not None and now - known.asked_at < self._ttl:
            return known
        found = await self._ask(user, tenant, now)
        with self._lock:
            self._known[user, tenant] = found
        return found

    async def _ask(self, user: UUID, tenant: UUID | None, now: float) -> _Standing:
        db = self._db.sync_db
        ask = db._lookups.run  # not the threads for management, behind whose migrations a request would wait
        if tenant is not None:
            try:
                membership = await ask(db.memberships.get, user, tenant)
                return _Standing(now, True, str(membership.role))
            except NotAMember:
                pass  # of this tenant, or of any: a deleted user is a member of nothing
        try:
            await ask(db.users.get, user)
        except UserNotFound:
            return _Standing(now, False, None)
        return _Standing(now, True, None)


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
