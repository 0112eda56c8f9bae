"""Which tenant a request runs for: an ASGI middleware.

The middleware is a convenience, not the control: what lies behind it and asks for a session without a tenant gets `NoTenantBound`, however
it came there. What it promises is the binding's life: from before the application is called until it has returned, which for ASGI means
that the body has been sent, background tasks have run, or the client is gone. It opens no connection.

A websocket outlives whatever was true when it was opened, so it is looked at again: every ``cache_ttl`` seconds, and at once when the
registry tells that its tenant or its user has changed.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, TypeAlias

from tenantdb.aio import AsyncTenantDB
from tenantdb.auth import Authenticate, RegistryAuth, Visit
from tenantdb.context import ANONYMOUS, acting, bind, unbound
from tenantdb.database import TenantDB
from tenantdb.errors import TenantDBError
from tenantdb.model import Facts, Identity, Tenant
from tenantdb.registry.changes import Change
from tenantdb.requests import Gate, Problem, host_name
from tenantdb.resolvers import Resolver, TenantName

__all__ = ["RegistryAuth", "TenantMiddleware"]

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("tenantdb.requests")


class TenantMiddleware:
    """Binds the tenant that a request's identity names, for as long as the application works on the request.

    ``db``: the `TenantDB` or its async view. ``authenticate(facts) -> Identity | None``, a function or a coroutine function that does not
    block, such as `RegistryAuth`; None means that the request has no credentials. ``resolver``: what else names a tenant, such as
    ``subdomain("clinic.example")``: it must agree with the identity's tenant. Without ``authenticate`` nobody is asked who he is, and the
    resolver alone decides. ``exempt``: routes that run without asking, and without a tenant: see `ExemptRoutes`. ``required=False`` lets a
    request without credentials through, unbound.

    In Starlette it goes in by ``app.add_middleware(TenantMiddleware, db=...)``: wrapped around the application from outside it does the
    same, but Starlette's own 500 then comes first where a route raises an error of tenantdb.

    A tenant that is unknown, suspended or not ready is refused whatever ``authenticate`` says. An error of tenantdb, raised here or by the
    application before its response has begun, becomes a problem document of its status; every other exception passes unchanged. A websocket
    is refused before it is accepted, and closed (1008) when it would not be let in any more. The application finds the tenant by
    ``current_tenant()`` and in ``request.state.tenant``, who asks in ``request.state.identity``; both are None where there is none.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        db: AsyncTenantDB | TenantDB,
        authenticate: Authenticate | None = None,
        resolver: Resolver | None = None,
        exempt: Iterable[str] = (),
        required: bool = True,
    ) -> None:
        self.app = app
        self.adb = db if isinstance(db, AsyncTenantDB) else AsyncTenantDB(db)
        self.db = self.adb.sync_db
        self.gate = Gate(exempt=exempt, resolver=resolver, required=required, authenticates=authenticate is not None)
        self._start = getattr(authenticate, "start", None)
        self._authenticate = getattr(authenticate, "acall", authenticate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind not in ("http", "websocket"):
            if kind == "lifespan":
                await self._prepare(scope, receive, send)
            await self.app(scope, receive, send)
            return
        self.db.watch()
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        visit = Visit(self.db, self.adb, self.gate, self._authenticate, facts_of(scope), _source(scope))
        try:
            await self._serve(visit, scope, receive, watched)
        except TenantDBError as error:
            if begun:
                raise
            await refuse(scope, send, visit.answer(error))

    async def _prepare(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application starts: fetch what its first requests need, and look whether middleware stands in a useful order."""
        if self._start is not None:
            try:
                await asyncio.to_thread(self._start)
            except Exception:  # raised alone, it has uvicorn believe that there is no lifespan, and serve without the application's own
                await receive()
                await send({"type": "lifespan.startup.failed", "message": traceback.format_exc()})
                raise
        order = [getattr(each, "cls", None) for each in getattr(scope.get("app"), "user_middleware", ())]
        if type(self) in order and any(getattr(cls, "__name__", "") == "CORSMiddleware" for cls in order[order.index(type(self)) :]):
            log.warning(
                "CORSMiddleware stands behind TenantMiddleware: browsers are shown no refusal, and preflights are refused."
                " Add CORSMiddleware after it, so that it stands before it"
            )

    async def _serve(self, visit: Visit, scope: Scope, receive: Receive, send: Send) -> None:
        facts = visit.facts
        # A dict of our own: a server may share the state's dict between requests.
        state = scope["state"] = {**scope.get("state", {}), "tenant": None, "identity": None}
        scope["tenantdb"] = visit
        with unbound():  # even where the application is called from a block that has bound a tenant
            raw = scope.get("raw_path")
            visit.exempt = self.gate.exempts(facts, scope["path"], None if raw is None else raw.decode("latin-1"))
            identity: Identity | None = None
            names: tuple[TenantName, ...] = ()
            if not visit.exempt:
                identity = state["identity"] = await visit.aidentify()
                names = self.gate.names(facts, identity)
            with acting(ANONYMOUS if identity is None else identity.user, visit.request_id, visit.source):
                if not names:
                    await self._enter(visit, None, scope, receive, send)
                    return
                tenant = state["tenant"] = await visit.atenant(names)
                with bind(tenant):
                    await self._enter(visit, tenant, scope, receive, send)

    async def _enter(self, visit: Visit, tenant: Tenant | None, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" or visit.exempt:
            await self.app(scope, receive, send)
            return
        socket = _Socket(visit, self._authenticate, tenant, receive, send)
        try:
            await self.app(scope, socket.receive, socket.send)
        finally:
            socket.close()


class _Socket:
    """A websocket's two ends, through which nothing passes any more when who opened it would not be let in again."""

    def __init__(self, visit: Visit, authenticate: Any, tenant: Tenant | None, receive: Receive, send: Send) -> None:
        self._visit = visit
        self._authenticate = authenticate
        self._tenant = tenant
        self._receive = receive
        self._send = send
        self._every = visit.db.settings.cache_ttl
        loop = asyncio.get_running_loop()
        self._clock = loop.time
        self._due = self._clock() + self._every
        self._changed = asyncio.Event()
        self._looking = asyncio.Lock()
        self._incoming: asyncio.Future[Message] | None = None
        self._refused = False
        identity = visit._identity
        mine, me = tenant and tenant.id, identity and identity.user

        def changed(change: Change) -> None:  # in the thread that heard of it
            whose = change.tenant_id, change.user_id and str(change.user_id)
            if whose == (None, None) or mine == whose[0] is not None or me == whose[1] is not None:
                loop.call_soon_threadsafe(self._changed.set)

        self._unsubscribe = visit.db._registry.changes.subscribe(changed)

    async def receive(self) -> Message:
        """The next message; while waiting for it the socket is looked at again whenever that is due."""
        incoming = self._incoming = self._incoming or asyncio.ensure_future(self._receive())
        while True:
            # Who is gone already is not told to go: a server takes no message after its client's end.
            gone = incoming.done() and incoming.result()["type"] == "websocket.disconnect"
            if not gone and not await self._still_welcome():
                return {"type": "websocket.disconnect", "code": 1008}
            if incoming.done():
                self._incoming = None
                return incoming.result()
            woken = asyncio.ensure_future(self._changed.wait())
            either: set[asyncio.Future[Any]] = {incoming, woken}
            try:
                await asyncio.wait(either, timeout=max(0.0, self._due - self._clock()), return_when=asyncio.FIRST_COMPLETED)
            finally:
                woken.cancel()

    async def send(self, message: Message) -> None:
        """Raises: `OSError` where the socket was closed, as ASGI asks of a server for whoever sends after a disconnect."""
        if not await self._still_welcome():
            raise OSError("the websocket was closed: who opened it would not be let in any more")
        await self._send(message)

    async def _still_welcome(self) -> bool:
        # An application may read and write in two tasks: while one looks, the other waits for what it finds.
        if self._looking.locked() or self._changed.is_set() or self._clock() >= self._due:
            async with self._looking:
                if not self._refused and (self._changed.is_set() or self._clock() >= self._due):
                    await self._look()
        return not self._refused

    async def _look(self) -> None:
        self._changed.clear()  # before the question, so that what changes meanwhile is asked about again
        try:
            await self._visit.again(self._authenticate, self._tenant)
        except TenantDBError as error:
            self._refused = True
            await _close(self._send, self._visit.answer(error))
            return
        except BaseException:  # a receive with a deadline, say: nobody has learnt anything
            self._changed.set()
            raise
        self._due = self._clock() + self._every

    def close(self) -> None:
        self._unsubscribe()
        if self._incoming is not None:
            self._incoming.cancel()


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
        scope.get("scheme", "http"),
        host_name(headers.get("host", "")),
        path,
        scope.get("method", "GET"),  # a websocket begins as a GET
        headers,
    )


def _source(scope: Scope) -> str | None:
    """The address of who connected, as the server tells it: a proxy's, unless the server is told to believe what the proxy says."""
    client = scope.get("client")
    return None if client is None else str(client[0])


async def refuse(scope: Scope, send: Send, problem: Problem) -> None:
    """Answer a request whose response has not begun."""
    if scope["type"] == "websocket":  # before it is accepted, so the server answers the handshake with 403
        await _close(send, problem)
        return
    body = problem.content
    headers = {**problem.headers, "content-length": str(len(body))}
    start = {"type": "http.response.start", "status": problem.status, "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}
    await send(start)
    await send({"type": "http.response.body", "body": body})


async def _close(send: Send, problem: Problem) -> None:
    """Close a websocket. Codes: policy violation, internal error, try again later (RFC 6455, 7.4.1, and its registry at IANA)."""
    await send({"type": "websocket.close", "code": {500: 1011, 503: 1013}.get(problem.status, 1008), "reason": problem.body["code"]})
