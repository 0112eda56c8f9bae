"""Flask: the request's session, routes that nobody has to sign in for, and errors as problem documents.

    tenants = FlaskTenantDB(db, authenticate=RegistryAuth(tokens, db))
    tenants.init_app(app)

    @app.get("/patients")
    def patients() -> list[str]:
        return list(tenants.session.scalars(select(Patient.name)))

Which tenant that is, the middleware of `tenantdb.wsgi` decides before Flask is called. What Flask adds is its own routing: a view that is
marked exempt is exempt for the requests that Flask would have it answer, and for no other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar, cast
from uuid import UUID

import click
from flask import Blueprint, Flask, Response, current_app, g, has_request_context, request, request_started
from sqlalchemy.orm import Session
from werkzeug.exceptions import HTTPException

from tenantdb.aio import AsyncTenantDB
from tenantdb.auth import Authenticate, RegistryAuth, Visit
from tenantdb.context import bound_or_none, current_tenant
from tenantdb.database import TenantDB
from tenantdb.errors import AuthenticationRequired, ConfigError, RoleRequired, TenantDBError
from tenantdb.model import Identity, MemberRole, Tenant
from tenantdb.resolvers import Resolver
from tenantdb.wsgi import TenantMiddleware, facts_of

__all__ = ["FlaskTenantDB", "RegistryAuth", "current_identity", "require_role"]

V = TypeVar("V", bound="Callable[..., Any] | Blueprint")

_NAME = "tenantdb"  # of the extension, and of its commands
_MARK = "_tenantdb_exempt"
_SESSIONS = "_tenantdb_sessions"


class FlaskTenantDB:
    """Routes the requests of Flask applications to their tenants. One object for the module; `init_app` for each application.

    The arguments are those of `tenantdb.wsgi.TenantMiddleware`. In a request ``flask.g.tenant`` and ``flask.g.identity`` say whose it is
    and who asks; both are None where there is none. ``flask tenantdb`` is the ``tenantdb`` command with the application's database.
    """

    def __init__(
        self,
        db: TenantDB | AsyncTenantDB | None = None,
        *,
        authenticate: Authenticate | None = None,
        resolver: Resolver | None = None,
        exempt: Iterable[str] = (),
        required: bool = True,
    ) -> None:
        self._db = db
        self._authenticate = authenticate
        self._options: dict[str, Any] = {
            "resolver": resolver,
            "exempt": exempt if isinstance(exempt, str) else [*exempt],
            "required": required,
        }
        self._marks = False

    def init_app(self, app: Flask, db: TenantDB | AsyncTenantDB | None = None, *, authenticate: Authenticate | None = None) -> None:
        """Wrap ``app``, once; ``db`` and ``authenticate`` where they are made with the application and not with this object.

        What wraps ``app.wsgi_app`` later stands outside: so does ``ProxyFix``, which must. An error of tenantdb that a view raises becomes
        a problem document unless the application has an error handler of its own for it. Raises: `ConfigError`.
        """
        db = db or self._db
        if db is None:
            raise ConfigError("which database? FlaskTenantDB(db) or init_app(app, db)")
        if _NAME in app.extensions:
            raise ConfigError("this application has a FlaskTenantDB already")
        db = app.extensions[_NAME] = db.sync_db if isinstance(db, AsyncTenantDB) else db
        app.wsgi_app = _Middleware(self, app, db=db, authenticate=authenticate or self._authenticate, **self._options)  # type: ignore[method-assign]
        request_started.connect(_begin, app)
        app.after_request(_close_after_the_body)
        app.teardown_request(_close_sessions)
        app.teardown_appcontext(_close_sessions)
        app.error_handler_spec[None][None].setdefault(TenantDBError, _answer)  # the application's own may be there already
        app.cli.add_command(_command(db))

    @property
    def db(self) -> TenantDB:
        """The database of the current application."""
        return _db()

    @property
    def session(self) -> Session:
        """The session of this request and the bound tenant, made on first use and closed when the request is torn down. Does not commit.

        It is Flask's to tear down, so in a streamed body use it below ``stream_with_context``. Where a tenant is bound in a block, here or
        in a command of ``flask``, it is that tenant's. Raises: `AuthenticationRequired` and `NotAMember` where a request was let through
        without a tenant; `NoTenantBound` on an exempt route.
        """
        sessions: dict[UUID, Session] = g.setdefault(_SESSIONS, {})
        tenant = _tenant()
        if (found := sessions.get(tenant.id)) is None:
            found = sessions[tenant.id] = self.db.session()
        return found

    def exempt(self, view: V) -> V:
        """Mark a view, or all views of a blueprint, as one that runs without credentials and without a tenant. A decorator.

        Flask's routing decides: ``/auth/<name>`` being exempt says nothing of ``/auth/admin``, if that is another view. The blueprints
        inside a blueprint are marked by themselves, and a class-based view by ``decorators = [tenants.exempt]``.
        """
        if isinstance(view, type):
            raise ConfigError(
                f"{view.__name__} is a class: write `decorators = [tenants.exempt]` into it, and what inherits it says so too"
            )
        setattr(view, _MARK, True)
        self._marks = True
        return view


class _Middleware(TenantMiddleware):
    def __init__(self, tenants: FlaskTenantDB, app: Flask, **options: Any) -> None:
        super().__init__(app.wsgi_app, **options)
        self._tenants = tenants
        self._flask = app

    def exempts(self, visit: Visit, environ: dict[str, Any]) -> bool:
        return super().exempts(visit, environ) or (self._tenants._marks and _leads_to_marked(self._flask, environ))


def _leads_to_marked(app: Flask, environ: dict[str, Any]) -> bool:
    """Ask the application's routing, as it will ask itself once it is called."""
    try:
        adapter = app.create_url_adapter(app.request_class(environ, populate_request=False))
        if adapter is None:
            return False
        endpoint, _ = adapter.match()
    except HTTPException:  # there is no such route, or only one for other methods, or under another spelling
        return False
    view = app.view_functions.get(endpoint)
    blueprint = app.blueprints.get(endpoint.rpartition(".")[0])
    return getattr(view, _MARK, False) is True or getattr(blueprint, _MARK, False) is True


# -- a request -------------------------------------------------------------------------------------------------------------------------


def _db() -> TenantDB:
    db = current_app.extensions.get(_NAME)
    if not isinstance(db, TenantDB):
        raise ConfigError("this application has no FlaskTenantDB; call init_app(app)")
    return db


def _visit() -> Visit | None:
    visit = request.environ.get("tenantdb") if has_request_context() else None
    return visit if isinstance(visit, Visit) else None


def _begin(_: Flask, **__: Any) -> None:
    """Before any of the application's own functions is called, those for all requests included."""
    environ, visit = request.environ, _visit()
    if visit is None:
        return
    g.tenant, g.identity = environ["tenantdb.tenant"], environ["tenantdb.identity"]
    facts = facts_of(environ)
    if visit.exempt and (facts.method, facts.path) != (visit.facts.method, visit.facts.path):
        raise ConfigError(
            "something between FlaskTenantDB and Flask changes paths or methods; wrap app.wsgi_app with it after init_app(app)"
        )


def _tenant() -> Tenant:
    visit = _visit()
    if visit is not None and not visit.exempt and request.environ["tenantdb.tenant"] is None and bound_or_none() is None:
        raise visit.without_tenant(visit.identify())
    return current_tenant()


def _close(sessions: Mapping[UUID, Session]) -> None:
    with ExitStack() as stack:  # all of them, whatever one raises
        for session in sessions.values():
            stack.callback(session.close)


def _close_sessions(_: BaseException | None = None) -> None:
    # They stay where they are: a streamed body is torn down once before it begins, when its request's context is left, and once at its end.
    _close(g.get(_SESSIONS, {}))


def _close_after_the_body(response: Response) -> Response:
    """Also what a generator took along from its view and used without ``stream_with_context``, behind the teardown's back."""
    response.call_on_close(functools.partial(_close, g.setdefault(_SESSIONS, {})))
    return response


def _answer(error: TenantDBError) -> Response:
    visit = _visit()
    if visit is None:
        raise error
    problem = visit.answer(error)
    return Response(problem.content, problem.status, dict(problem.headers))


# -- who asks --------------------------------------------------------------------------------------------------------------------------


def current_identity() -> Identity:
    """Who makes this request. On an exempt route, where nobody has been asked yet, credentials are asked for here; no tenant is bound.

    Raises: `AuthenticationRequired` where there are none, and what ``authenticate`` raises.
    """
    visit = _visit()
    if visit is None:
        raise ConfigError("this request has come past the middleware; call FlaskTenantDB(...).init_app(app)")
    identity = visit.identify()
    if identity is None:
        raise AuthenticationRequired
    return identity


def require_role(*roles: MemberRole | str) -> Callable[[V], V]:
    """A decorator that lets only these roles into a view: ``@require_role("owner", "admin")``, below the route.

    The role is the identity's, which `RegistryAuth` reads from the registry. Others get 403. Raises: `ConfigError` without a role.
    """
    if not roles:
        raise ConfigError("require_role needs at least one role")
    allowed = tuple(str(role) for role in roles)

    def decorate(view: V) -> V:
        @functools.wraps(cast("Callable[..., Any]", view))
        def checked(*args: Any, **options: Any) -> Any:
            identity = current_identity()
            if identity.role not in allowed:
                raise RoleRequired(identity.role, allowed)
            return current_app.ensure_sync(cast("Callable[..., Any]", view))(*args, **options)

        return cast("V", checked)

    return decorate


# -- flask tenantdb --------------------------------------------------------------------------------------------------------------------


def _command(db: TenantDB) -> click.Command:
    """The whole of the ``tenantdb`` command as one of Flask's, loaded when it is called: it needs more than Flask does."""

    @click.command(
        _NAME,
        help="A database for every tenant: the tenantdb command.",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def tenantdb(arguments: tuple[str, ...]) -> None:
        try:
            from tenantdb.cli.app import Invocation
            from tenantdb.cli.group import cli
        except ModuleNotFoundError as error:
            raise click.ClickException(f"there is no {error.name}: pip install 'tenantdb[cli]'") from None
        cli.main(list(arguments), prog_name=f"flask {_NAME}", obj=Invocation(given=db))

    return tenantdb
