"""One application behind four faces: as a raw ASGI application, in FastAPI, as a raw WSGI application and in Flask.

Each has the same routes, and whatever is not one of them is answered by a route that takes every path, as the worst of routers would:

    /read, /auth/read     the name of patient 1, through a session of the request's tenant
    /stream               the same three times, one piece at a time, each through a session
    /stream/fails         a tenant is found suspended when the first piece is made
    /raises               a tenant is found suspended by the handler
    anything else         who the request is for: `Who` as JSON
"""

from __future__ import annotations

import asyncio
import io
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import flask
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from sqlalchemy import select

from tenantdb import asgi, wsgi
from tenantdb.context import bound_or_none, current_actor
from tenantdb.errors import TenantSuspended
from tenantdb.fastapi import AsyncTenantSession, install
from tenantdb.flask import FlaskTenantDB
from tests.adapters.world import Patient, World, http_scope

METHODS = ["GET", "POST", "PUT", "OPTIONS", "HEAD"]
NAME = select(Patient.name)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """Of a problem document."""
        return self.json.get("code") if self.headers["content-type"] == "application/problem+json" else None


def who(tenant: Any, identity: Any) -> dict[str, Any]:
    bound, actor = bound_or_none(), current_actor()
    return {
        "bound": bound.slug if bound else None,
        "tenant": tenant.slug if tenant else None,
        "user": identity.user if identity else None,
        "role": identity.role if identity else None,
        "actor": actor.actor,
        "request_id": actor.request_id,
        "source": actor.source,
    }


@dataclass
class Face(ABC):
    """``options`` are the middleware's. ``ran``: the paths of the requests that came as far as a handler."""

    world: World
    options: dict[str, Any] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        given = {"authenticate": asgi.RegistryAuth(self.world.tokens, self.world.db), "exempt": ["/auth/*", "/healthz"]}
        self.options = {**given, **self.options}
        self.app = self.make()

    @abstractmethod
    def make(self) -> Any: ...

    @abstractmethod
    async def ask(
        self, path: str, headers: dict[str, str] | None = None, *, method: str = "GET", raw: str | None = None, mount: str = ""
    ) -> Reply:
        """A request for exactly this path, below ``mount``; ``raw`` is what stood in the request line, if it was something else."""

    @abstractmethod
    async def leave(self, path: str, headers: dict[str, str]) -> bytes:
        """A request whose client is gone after the first piece of the body, which is returned."""

    @abstractmethod
    async def halfway(self, path: str, headers: dict[str, str], meanwhile: Callable[[], object]) -> tuple[bytes, BaseException | None]:
        """A request in whose body something happens after the first piece: what was sent of it in all, and what broke it off."""


# -- ASGI --------------------------------------------------------------------------------------------------------------------------------


class OverASGI(Face):
    async def ask(
        self, path: str, headers: dict[str, str] | None = None, *, method: str = "GET", raw: str | None = None, mount: str = ""
    ) -> Reply:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        raw_path = None if raw is None else raw.encode()
        await self.app(http_scope(mount + path, headers, method=method, raw_path=raw_path, root_path=mount), receive, send)
        given = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
        # A server sends no body that a HEAD asked for.
        body = b"" if method == "HEAD" else b"".join(message.get("body", b"") for message in sent[1:])
        return Reply(sent[0]["status"], given, body)

    async def leave(self, path: str, headers: dict[str, str]) -> bytes:
        first = b""

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            nonlocal first
            if message["type"] == "http.response.body":
                first = message["body"]
                raise OSError("the client is gone")

        # Starlette makes another exception of it, or a group of them.
        await asyncio.gather(self.app(http_scope(path, headers), receive, send), return_exceptions=True)
        return first

    async def halfway(self, path: str, headers: dict[str, str], meanwhile: Callable[[], object]) -> tuple[bytes, BaseException | None]:
        pieces: list[bytes] = []

        async def receive() -> Any:
            if pieces:
                await asyncio.Event().wait()  # the client is there to the end
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            if piece := message.get("body"):
                pieces.append(piece)
                if len(pieces) == 1:
                    await asyncio.to_thread(meanwhile)

        [error] = await asyncio.gather(self.app(http_scope(path, headers), receive, send), return_exceptions=True)
        return b"".join(pieces), error


class RawASGI(OverASGI):
    def make(self) -> Any:
        db = self.world.adb

        async def app(scope: Any, receive: Any, send: Any) -> None:
            path = asgi.facts_of(scope).path
            self.ran.append(path)
            if path == "/raises":
                raise TenantSuspended("acme")

            async def pieces() -> AsyncIterator[bytes]:
                if path == "/stream/fails":
                    raise TenantSuspended("acme")
                if path in ("/read", "/auth/read", "/stream"):
                    for _ in range(3 if path == "/stream" else 1):
                        async with db.session() as session:
                            yield str(await session.scalar(NAME)).encode()
                else:
                    yield json.dumps(who(scope["state"]["tenant"], scope["state"]["identity"])).encode()

            async with aclosing(pieces()) as body:
                begun = False
                async for piece in body:
                    if not begun:
                        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
                        begun = True
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        return asgi.TenantMiddleware(app, db=db, **self.options)


class InFastAPI(OverASGI):
    def make(self) -> Any:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        install(app, self.world.adb, **self.options)

        @app.get("/read")
        @app.get("/auth/read")
        async def read(request: Request, session: AsyncTenantSession) -> StreamingResponse:
            self.ran.append(request.url.path)
            return StreamingResponse(iter([await session.scalar(NAME)]))

        @app.get("/stream")
        async def stream(session: AsyncTenantSession) -> StreamingResponse:
            async def names() -> AsyncIterator[str]:
                for _ in range(3):
                    yield str(await session.scalar(NAME))

            return StreamingResponse(names())

        @app.get("/stream/fails")
        @app.get("/raises")
        async def raises() -> None:
            raise TenantSuspended("acme")

        @app.api_route("/{path:path}", methods=METHODS)
        async def anything(request: Request) -> dict[str, Any]:
            self.ran.append(request.scope["path"])
            return who(request.state.tenant, request.state.identity)

        return app


# -- WSGI --------------------------------------------------------------------------------------------------------------------------------


def environ_of(path: str, headers: dict[str, str] | None = None, *, method: str = "GET", raw: str | None = None, mount: str = "") -> Any:
    """A request's environment with exactly these paths; Werkzeug's builder would have normalised them."""
    given = {"host": "clinic.example", **(headers or {})}
    return {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": mount,
        "PATH_INFO": path.encode().decode("latin-1"),
        "RAW_URI": quote(mount + path, safe="/;:@!$&'()*+,=%\\?") if raw is None else raw,
        "QUERY_STRING": "",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "192.0.2.1",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        **{f"HTTP_{name.upper().replace('-', '_')}": value for name, value in given.items()},
    }


class Server:
    """What a WSGI server does with one response, strictly after PEP 3333."""

    def __init__(self, after_first_piece: Callable[[], object] | None = None) -> None:
        self.heads: list[tuple[str, dict[str, str]]] = []
        self.sent = b""
        self._after_first_piece = after_first_piece

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        assert exc_info is not None or not self.heads
        if exc_info is not None and self.sent:
            raise exc_info[1].with_traceback(exc_info[2])
        self.heads.append((status, {name.lower(): value for name, value in headers}))
        return self.write

    def write(self, data: bytes) -> None:
        assert self.heads and type(data) is bytes
        self.sent += data

    def run(self, app: Any, environ: Any, *, pieces: int | None = None) -> Reply:
        """Send the whole body, or so many pieces of it and no more."""
        body: Iterable[bytes] = app(environ, self.start_response)
        try:
            for number, piece in enumerate(body, 1):
                self.write(piece)
                if number == 1 and self._after_first_piece is not None:
                    self._after_first_piece()
                if number == pieces:
                    break
        finally:
            if hasattr(body, "close"):
                body.close()
        return self.reply

    @property
    def reply(self) -> Reply:
        status, headers = self.heads[-1]
        return Reply(int(status.split()[0]), headers, self.sent)


class OverWSGI(Face):
    async def ask(
        self, path: str, headers: dict[str, str] | None = None, *, method: str = "GET", raw: str | None = None, mount: str = ""
    ) -> Reply:
        return Server().run(self.app, environ_of(path, headers, method=method, raw=raw, mount=mount))

    async def leave(self, path: str, headers: dict[str, str]) -> bytes:
        return Server().run(self.app, environ_of(path, headers), pieces=1).body

    async def halfway(self, path: str, headers: dict[str, str], meanwhile: Callable[[], object]) -> tuple[bytes, BaseException | None]:
        server = Server(after_first_piece=meanwhile)
        try:
            server.run(self.app, environ_of(path, headers))
        except Exception as error:
            return server.sent, error
        return server.sent, None


class RawWSGI(OverWSGI):
    def make(self) -> Any:
        db = self.world.db

        def app(environ: Any, start_response: Any) -> Iterator[bytes]:
            path = wsgi.facts_of(environ).path
            self.ran.append(path)
            if path in ("/raises", "/stream/fails"):
                raise TenantSuspended("acme")
            start_response("200 OK", [("content-type", "application/json")])
            if path in ("/read", "/auth/read", "/stream"):
                for _ in range(3 if path == "/stream" else 1):
                    with db.session() as session:
                        yield str(session.scalar(NAME)).encode()
            elif environ["REQUEST_METHOD"] != "HEAD":
                yield json.dumps(who(environ["tenantdb.tenant"], environ["tenantdb.identity"])).encode()

        return wsgi.TenantMiddleware(app, db=db, **self.options)


class InFlask(OverWSGI):
    def make(self) -> Any:
        app = flask.Flask("clinic", static_folder=None)
        app.url_map.merge_slashes = False
        tenants = FlaskTenantDB(self.world.db, **self.options)
        tenants.init_app(app)

        @app.get("/read")
        @app.get("/auth/read")
        def read() -> str:
            self.ran.append(flask.request.path)
            return str(tenants.session.scalar(NAME))

        @app.get("/stream")
        @flask.stream_with_context
        def stream() -> Iterator[str]:
            for _ in range(3):
                yield str(tenants.session.scalar(NAME))

        @app.get("/stream/fails")
        @flask.stream_with_context
        def stream_fails() -> Iterator[str]:
            if flask.request.path:
                raise TenantSuspended("acme")
            yield ""

        @app.get("/raises")
        def raises() -> None:
            raise TenantSuspended("acme")

        @app.route("/", defaults={"path": ""}, methods=METHODS)
        @app.route("/<path:path>", methods=METHODS)
        def anything(path: str) -> dict[str, Any]:
            self.ran.append(flask.request.path)
            return who(flask.g.tenant, flask.g.identity)

        return app


FACES: dict[str, type[Face]] = {"asgi": RawASGI, "fastapi": InFastAPI, "wsgi": RawWSGI, "flask": InFlask}

__all__ = ["FACES", "Face", "InFlask", "RawWSGI", "Reply", "Server", "environ_of"]
