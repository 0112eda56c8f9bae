"""Which tenant a request runs for: a WSGI middleware, with the verdicts of the one for ASGI.

The tenant is bound in a context of the request's own (`contextvars.Context`) from before the application is called until the server closes
what it returned: also while a generator makes the body, and whatever thread or greenlet the server pulls it in. Nothing of it is ever
visible outside, so there is nothing to put back. Like the other it is a convenience and not the control, and opens no connection.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from tenantdb.aio import AsyncTenantDB
from tenantdb.auth import Authenticate, RegistryAuth, Visit
from tenantdb.context import ANONYMOUS, Actor, Binding, unbound
from tenantdb.database import TenantDB
from tenantdb.errors import TenantDBError
from tenantdb.model import Facts, Identity, Tenant
from tenantdb.requests import Gate, Problem, host_name
from tenantdb.resolvers import Resolver

__all__ = ["RegistryAuth", "TenantMiddleware"]

Environ: TypeAlias = dict[str, Any]
Write: TypeAlias = Callable[[bytes], object]
StartResponse: TypeAlias = Callable[..., Write]
WSGIApp: TypeAlias = Callable[[Environ, StartResponse], Iterable[bytes]]


class TenantMiddleware:
    """Binds the tenant that a request's identity names, from the call of the application until its response is closed.

    Arguments, verdicts and answers are those of `tenantdb.asgi.TenantMiddleware`; ``authenticate`` is an ordinary function here. The
    application finds the tenant by ``current_tenant()`` and in ``environ["tenantdb.tenant"]``, and who asks in
    ``environ["tenantdb.identity"]``; both are None where there is none. An error of tenantdb that the application raises before the first
    piece of its body becomes a problem document.

    A body that is made already, a list or a file in the server's ``wsgi.file_wrapper``, goes to the server as it is, so that files are sent
    as fast as without this; nothing is bound any more while they are.
    """

    def __init__(
        self,
        app: WSGIApp,
        *,
        db: TenantDB | AsyncTenantDB,
        authenticate: Authenticate | None = None,
        resolver: Resolver | None = None,
        exempt: Iterable[str] = (),
        required: bool = True,
    ) -> None:
        self.app = app
        self.db = db.sync_db if isinstance(db, AsyncTenantDB) else db
        self.gate = Gate(exempt=exempt, resolver=resolver, required=required, authenticates=authenticate is not None)
        self._authenticate = authenticate
        self._start: Callable[[], object] | None = getattr(authenticate, "start", None)
        self._starting = threading.Lock()

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        self.db.watch()
        if self._start is not None:
            self._prepare()
        return _Response(self, environ, start_response).body()

    def _prepare(self) -> None:
        """Fetch what the first requests of a process need, as the lifespan does in ASGI: WSGI does not tell that the application starts."""
        with self._starting:
            if self._start is not None:
                self._start()
                self._start = None

    def exempts(self, visit: Visit, environ: Environ) -> bool:
        """Whether a request runs unasked and unbound. Raises: `InvalidPath`."""
        return self.gate.exempts(visit.facts, _path(environ.get("SCRIPT_NAME", "")) + visit.facts.path, _raw_path(environ))


class _Response:
    """One request in its context, and the body that comes of it, made piece by piece as the server pulls it.

    The head that the application begins its response with is held until the first piece is there: as long as it is, an error can still be
    answered. PEP 3333 would have the server replace what it has by ``exc_info``, but not all do: gunicorn sends the headers of both.
    """

    def __init__(self, middleware: TenantMiddleware, environ: Environ, start_response: StartResponse) -> None:
        self._middleware = middleware
        self._environ = environ
        self._server = start_response
        self._visit = Visit(middleware.db, None, middleware.gate, middleware._authenticate, facts_of(environ), environ.get("REMOTE_ADDR"))
        self._context = contextvars.copy_context()
        self._binding: Binding | None = None
        self._body: Any = ()
        self._pieces: Iterator[bytes] = iter(())
        self._head: tuple[str, list[tuple[str, str]]] | None = None
        self._write: Write | None = None
        self._begun = False  # what the server was told cannot be taken back

    def body(self) -> Iterable[bytes]:
        """Call the application. What the server is to send, this or what the application made, where nothing is left to be made."""
        try:
            made = self._context.run(self._call)
        except TenantDBError as error:
            self.close()
            if self._begun:
                raise
            return self._refuse(error)
        except BaseException:
            self.close()
            raise
        if not made:
            return self
        body, self._body = self._body, ()
        self.close()
        self._begin()
        return body  # type: ignore[no-any-return]

    def _call(self) -> bool:
        """Whether the whole body is there, and running code has no part in it."""
        visit, gate, environ = self._visit, self._middleware.gate, self._environ
        environ["tenantdb"], environ["tenantdb.tenant"], environ["tenantdb.identity"] = visit, None, None
        unbound().__enter__()  # even where the application is called from a block that has bound a tenant; gone with the context
        visit.exempt = self._middleware.exempts(visit, environ)
        identity: Identity | None = None
        tenant: Tenant | None = None
        if not visit.exempt:
            identity = environ["tenantdb.identity"] = visit.identify()
            if names := gate.names(visit.facts, identity):
                tenant = environ["tenantdb.tenant"] = visit.tenant(names)
        actor = Actor(ANONYMOUS if identity is None else identity.user, visit.request_id, visit.source)
        self._binding = Binding(tenant, actor).__enter__()
        self._body = body = self._middleware.app(environ, self._start_response)
        files = environ.get("wsgi.file_wrapper")
        if type(body) in (list, tuple) or (isinstance(files, type) and isinstance(body, files)):
            return True
        self._pieces = iter(body)
        return False

    def _start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Write:
        """What the application calls. Raises: what was raised, where it is too late to answer that, as PEP 3333 has it."""
        if self._begun:
            return self._server(status, headers, exc_info)
        if self._head is not None and exc_info is None:
            raise AssertionError("start_response was called twice")
        self._head = status, headers
        return self._write_now

    def _write_now(self, data: bytes) -> None:
        self._begin()
        assert self._write is not None  # the application has called start_response, or it would not have this
        self._write(data)

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            if self._head is not None:
                self._write = self._server(*self._head)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            piece = self._context.run(next, self._pieces)
        except StopIteration:
            self._begin()
            raise
        except TenantDBError as error:
            if self._begun:
                raise
            self._pieces = iter(self._refuse(error))
            return next(self._pieces)
        self._begin()
        return piece

    def close(self) -> None:
        """Called by the server when the body was sent, or its client is gone. May be called twice."""
        body, self._body = self._body, ()
        try:
            if hasattr(body, "close"):
                self._context.run(body.close)
        finally:
            binding, self._binding = self._binding, None
            if binding is not None:
                self._context.run(binding.__exit__)

    def _refuse(self, error: TenantDBError) -> list[bytes]:
        self._begun = True
        return answer(self._visit.answer(error), self._environ["REQUEST_METHOD"], self._server)


def answer(problem: Problem, method: str, start_response: StartResponse) -> list[bytes]:
    """A problem document as a WSGI response."""
    body = problem.content
    start_response(f"{problem.status} {problem.body['title']}", [*problem.headers.items(), ("content-length", str(len(body)))])
    return [] if method == "HEAD" else [body]


def facts_of(environ: Mapping[str, Any]) -> Facts:
    """The facts of a request. The path is the one that the application's router matches, below the script name."""
    headers = {
        name[5:].replace("_", "-").lower(): value for name, value in environ.items() if name.startswith("HTTP_") and isinstance(value, str)
    }
    for name in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        if environ.get(name):
            headers[name.replace("_", "-").lower()] = environ[name]
    return Facts(
        environ.get("wsgi.url_scheme", "http"),
        host_name(headers.get("host", "")),
        _path(environ.get("PATH_INFO", "")),
        environ["REQUEST_METHOD"],
        headers,
    )


def _path(text: str) -> str:
    """PEP 3333 has bytes in its strings."""
    return text.encode("latin-1").decode("utf-8", "replace")


def _raw_path(environ: Mapping[str, Any]) -> str | None:
    """The path as it was sent, where the server tells (gunicorn and Werkzeug: RAW_URI, uWSGI: REQUEST_URI)."""
    sent = environ.get("RAW_URI") or environ.get("REQUEST_URI")
    return None if not isinstance(sent, str) else sent.partition("?")[0]
