"""Which tenant a request runs for: a WSGI middleware, with the verdicts of the one for ASGI.

The tenant is bound in a context of the request's own (`contextvars.Context`) from before the application is called until the server closes
what it returned: also while a generator makes the body, and whatever thread or greenlet the server pulls it in. Nothing of it is ever
visible outside, so there is nothing to put back. Like the other it is a convenience and not the control, and opens no connection.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from tenantdb.aio import AsyncTenantDB
from tenantdb.auth import ANONYMOUS, Authenticate, RegistryAuth, Visit
from tenantdb.context import acting, bind, unbound
from tenantdb.database import TenantDB
from tenantdb.errors import TenantDBError
from tenantdb.model import Facts, Identity, Tenant
from tenantdb.requests import Gate, Problem, host_name
from tenantdb.resolvers import Resolver

__all__ = ["RegistryAuth", "TenantMiddleware"]

Environ: TypeAlias = dict[str, Any]
StartResponse: TypeAlias = Callable[..., Callable[[bytes], object]]
WSGIApp: TypeAlias = Callable[[Environ, StartResponse], Iterable[bytes]]


class TenantMiddleware:
    """Binds the tenant that a request's identity names, from the call of the application until its response is closed.

    Arguments, verdicts and answers are those of `tenantdb.asgi.TenantMiddleware`; ``authenticate`` is an ordinary function here. The
    application finds the tenant by ``current_tenant()`` and in ``environ["tenantdb.tenant"]``, and who asks in
    ``environ["tenantdb.identity"]``; both are None where there is none. An error of tenantdb that the application raises before the first
    piece of its body becomes a problem document.
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

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        self.db.watch()
        visit = Visit(self.db, None, self.gate, self._authenticate, facts_of(environ), environ.get("REMOTE_ADDR"))
        return _Response(self, visit, environ, start_response)


class _Response:
    """The application's response in the request's context: the application is called when the server asks for the first piece, or now.

    It is called now, because a server may look at what it returned; the body is made piece by piece as the server pulls it.
    """

    def __init__(self, middleware: TenantMiddleware, visit: Visit, environ: Environ, start_response: StartResponse) -> None:
        self._visit = visit
        self._start_response = start_response
        self._context = contextvars.copy_context()
        self._bound = contextlib.ExitStack()
        self._body: Any = ()
        self._pieces: Iterator[bytes]
        self._sent = False
        try:
            self._body = self._context.run(self._begin, middleware, environ)
            self._pieces = iter(self._body)
        except TenantDBError as error:
            self._end()
            self._pieces = iter(self._refuse(error))
        except BaseException:
            self._end()
            raise

    def _begin(self, middleware: TenantMiddleware, environ: Environ) -> Iterable[bytes]:
        visit, gate, enter = self._visit, middleware.gate, self._bound.enter_context
        environ["tenantdb"], environ["tenantdb.tenant"], environ["tenantdb.identity"] = visit, None, None
        enter(unbound())
        visit.exempt = gate.exempts(visit.facts, _path(environ.get("SCRIPT_NAME", "")) + visit.facts.path, _raw_path(environ))
        identity: Identity | None = None
        tenant: Tenant | None = None
        if not visit.exempt:
            identity = environ["tenantdb.identity"] = visit.identify()
            if names := gate.names(visit.facts, identity):
                tenant = environ["tenantdb.tenant"] = visit.tenant(names)
        enter(acting(ANONYMOUS if identity is None else identity.user, visit.request_id, visit.source))
        if tenant is not None:
            enter(bind(tenant))
        return middleware.app(environ, self._start_response)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            piece = self._context.run(next, self._pieces)
        except TenantDBError as error:
            if self._sent:
                raise
            self._pieces = iter(self._refuse(error))
            piece = next(self._pieces)
        self._sent = self._sent or bool(piece)
        return piece

    def close(self) -> None:
        """Called by the server when the body was sent, or its client is gone. May be called twice."""
        body, self._body = self._body, ()
        try:
            if hasattr(body, "close"):
                self._context.run(body.close)
        finally:
            self._end()

    def _end(self) -> None:
        self._context.run(self._bound.close)

    def _refuse(self, error: TenantDBError) -> list[bytes]:
        # With exc_info: where the application has begun a response, none of which was sent yet, this one takes its place (PEP 3333).
        return answer(self._visit.answer(error), self._start_response, (type(error), error, error.__traceback__))


def answer(problem: Problem, start_response: StartResponse, exc_info: Any = None) -> list[bytes]:
    """A problem document as a WSGI response."""
    body = json.dumps(problem.body).encode()
    headers = [*problem.headers.items(), ("content-length", str(len(body)))]
    start_response(f"{problem.status} {problem.body['title']}", headers, exc_info)
    return [body]


def facts_of(environ: Mapping[str, Any]) -> Facts:
    """The facts of a request. The path is the one that the application's router matches, below the script name."""
    headers = {
        name[5:].replace("_", "-").lower(): value for name, value in environ.items() if name.startswith("HTTP_") and isinstance(value, str)
    }
    for name in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        if environ.get(name):
            headers[name.replace("_", "-").lower()] = environ[name]
    host = headers.get("host") or environ.get("SERVER_NAME", "")
    return Facts(
        environ.get("wsgi.url_scheme", "http"), host_name(host), _path(environ.get("PATH_INFO", "")), environ["REQUEST_METHOD"], headers
    )


def _path(text: str) -> str:
    """PEP 3333 has bytes in its strings."""
    return text.encode("latin-1").decode("utf-8", "replace")


def _raw_path(environ: Mapping[str, Any]) -> str | None:
    """The path as it was sent, where the server tells (gunicorn and Werkzeug: RAW_URI, uWSGI: REQUEST_URI)."""
    sent = environ.get("RAW_URI") or environ.get("REQUEST_URI")
    return None if not isinstance(sent, str) else sent.partition("?")[0]
