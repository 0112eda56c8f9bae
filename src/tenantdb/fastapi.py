"""FastAPI: sessions as dependencies, errors as problem documents, and documentation that can sign in.

    install(app, adb, authenticate=RegistryAuth(tokens, adb), exempt=["/auth/*", "/healthz"])

    @app.post("/patients", status_code=201)
    async def create(new: NewPatient, session: AsyncTenantTransaction) -> PatientOut: ...

A *transaction* is committed before the response leaves (function scope): a COMMIT that fails is a 5xx and never a 200 for a write that was
lost. A *session* commits nothing by itself and stays open until the body has been sent, so that a streamed response can read from it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastapi.encoders import jsonable_encoder
from fastapi.openapi.models import HTTPBearer
from fastapi.responses import Response
from fastapi.security.base import SecurityBase
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette.requests import HTTPConnection, Request

from tenantdb.aio import AsyncTenantDB
from tenantdb.asgi import TenantMiddleware
from tenantdb.auth import Authenticate, Visit
from tenantdb.context import current_tenant
from tenantdb.errors import AuthenticationRequired, ConfigError, RoleRequired, TenantDBError
from tenantdb.model import Identity, MemberRole, Tenant
from tenantdb.requests import ExemptRoutes
from tenantdb.resolvers import Resolver

_BEARER = "bearer"  # the security scheme's name in the OpenAPI document


def install(
    app: FastAPI,
    adb: AsyncTenantDB,
    *,
    authenticate: Authenticate | None = None,
    resolver: Resolver | None = None,
    exempt: Iterable[str] = (),
    required: bool = True,
) -> None:
    """Route the requests of ``app`` to their tenants. Call it once, before the application starts.

    Adds `TenantMiddleware` with these arguments, answers errors of tenantdb with problem documents, puts ``adb`` into
    ``app.state.tenantdb``, exempts the documentation's own routes, and describes the bearer token and the problem documents in the OpenAPI
    document, so that the Authorize button of ``/docs`` works. Middleware added later stands outside: add ``CORSMiddleware`` after this
    call, so that refusals carry its headers and preflights never get here.
    """
    documentation = [app.docs_url, app.redoc_url, app.openapi_url, app.swagger_ui_oauth2_redirect_url if app.docs_url else None]
    routes = [*exempt, *(f"GET {path}" for path in documentation if path)]
    app.state.tenantdb = adb
    app.add_middleware(TenantMiddleware, db=adb, authenticate=authenticate, resolver=resolver, exempt=routes, required=required)
    app.add_exception_handler(TenantDBError, problem_response)
    _describe(app, ExemptRoutes(routes), authenticates=authenticate is not None, required=required)


async def problem_response(request: Request, error: Exception) -> Response:
    """The exception handler that `install` sets. An application mounted below answers its own errors, so it needs the handler too:
    ``FastAPI(exception_handlers={TenantDBError: problem_response})``."""
    if not isinstance(error, TenantDBError) or request.scope["type"] != "http":
        raise error  # a websocket: the middleware closes it
    problem = _visit(request).answer(error)
    return Response(problem.content, problem.status, dict(problem.headers))


_PROBLEM = {
    "title": "Problem",
    "description": "What went wrong, after RFC 9457.",
    "type": "object",
    "required": ["type", "title", "status", "code"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "code": {"type": "string"},
        "detail": {"type": "string"},
    },
}
_REFUSALS = {
    "401": "No credentials, or none that hold",
    "402": "The tenant's subscription has expired",
    "403": "No access to this tenant",
    "404": "No such tenant",
    "503": "The tenant cannot be served now; try again after `Retry-After` seconds",
}


def _describe(app: FastAPI, exempt: ExemptRoutes, *, authenticates: bool, required: bool) -> None:
    """Have the OpenAPI document tell what the middleware does to every route that is not exempt, where a route tells nothing else."""
    describe = app.openapi
    scheme = jsonable_encoder(_identity.model, exclude_none=True)
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/TenantProblem"}}}
    never = "404" if authenticates else "401"  # whoever signs in is told 403, whether there is such a tenant or not
    refusals = {code: {"description": said, "content": content} for code, said in _REFUSALS.items() if code != never}

    def openapi() -> dict[str, Any]:
        schema = describe()
        components = schema.setdefault("components", {})
        components.setdefault("schemas", {})["TenantProblem"] = _PROBLEM
        if authenticates:
            components.setdefault("securitySchemes", {})[_BEARER] = scheme
        for path, operations in schema.get("paths", {}).items():
            for method, operation in operations.items():
                if isinstance(operation, dict) and not exempt.matches(method.upper(), path):
                    operation["responses"] = {**refusals, **operation.get("responses", {})}
                    if authenticates:
                        operation.setdefault("security", [{_BEARER: []}] if required else [{_BEARER: []}, {}])
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # the way that FastAPI's manual shows


# -- dependencies ----------------------------------------------------------------------------------------------------------------------


def _visit(connection: HTTPConnection) -> Visit:
    visit = connection.scope.get("tenantdb")
    if not isinstance(visit, Visit):
        raise ConfigError("no TenantMiddleware stands before this route; call tenantdb.fastapi.install(app, adb, authenticate=...)")
    return visit


def _adb(connection: HTTPConnection) -> AsyncTenantDB:
    adb = _visit(connection).adb
    assert adb is not None  # of an ASGI middleware
    return adb


async def _tenant(connection: HTTPConnection) -> Tenant:
    visit = _visit(connection)
    if not visit.exempt and connection.scope["state"]["tenant"] is None:
        raise visit.without_tenant(await visit.aidentify())
    return current_tenant()


class _Bearer(SecurityBase):
    """The identity as a security scheme, so that the OpenAPI document shows it on every route that asks for it."""

    def __init__(self) -> None:
        self.model = HTTPBearer(bearerFormat="JWT")
        self.scheme_name = _BEARER

    async def __call__(self, connection: HTTPConnection) -> Identity:
        identity = await _visit(connection).aidentify()
        if identity is None:
            raise AuthenticationRequired
        return identity


_identity = _Bearer()

CurrentTenant = Annotated[Tenant, Depends(_tenant)]
"""The tenant of this request. 401 without credentials (``required=False``), 403 where they name no tenant."""

CurrentIdentity = Annotated[Identity, Depends(_identity)]
"""Who makes this request. On an exempt route, where nobody has been asked yet, credentials are asked for here; no tenant is bound."""


# Each takes CurrentTenant, which answers a request without credentials with 401 before the session would be refused as a bug.


async def _async_session(connection: HTTPConnection, _tenant: CurrentTenant) -> AsyncIterator[AsyncSession]:
    async with _adb(connection).session() as session:
        yield session


async def _async_transaction(connection: HTTPConnection, _tenant: CurrentTenant) -> AsyncIterator[AsyncSession]:
    async with _adb(connection).begin() as session:
        yield session


def _session(connection: HTTPConnection, _tenant: CurrentTenant) -> Iterator[Session]:
    with _visit(connection).db.session() as session:
        yield session


def _transaction(connection: HTTPConnection, _tenant: CurrentTenant) -> Iterator[Session]:
    with _visit(connection).db.begin() as session:
        yield session


AsyncTenantSession = Annotated[AsyncSession, Depends(_async_session)]
"""An `AsyncSession` on the tenant's database, open until the body has been sent. It does not commit."""

AsyncTenantTransaction = Annotated[AsyncSession, Depends(_async_transaction, scope="function")]
"""An `AsyncSession` in a transaction that is committed before the response leaves, and rolled back where the route raises."""

TenantSession = Annotated[Session, Depends(_session)]
"""As `AsyncTenantSession`, blocking: for routes declared with ``def``."""

TenantTransaction = Annotated[Session, Depends(_transaction, scope="function")]
"""As `AsyncTenantTransaction`, blocking: for routes declared with ``def``."""


def require_role(*roles: MemberRole | str) -> Callable[[Identity], Coroutine[Any, Any, Identity]]:
    """A dependency that lets only these roles pass: ``dependencies=[Depends(require_role("owner", "admin"))]``. Gives the identity.

    The role is the identity's, which `RegistryAuth` reads from the registry. Others get 403. Raises: `ConfigError` without a role.
    """
    if not roles:
        raise ConfigError("require_role needs at least one role")
    allowed = tuple(str(role) for role in roles)

    async def required_role(identity: CurrentIdentity) -> Identity:
        if identity.role not in allowed:
            raise RoleRequired(identity.role, allowed)
        return identity

    return required_role
