"""What only Flask has: its routing, its contexts, the session, error handlers, the command line. The verdicts are in test_verdicts.py."""

from __future__ import annotations

import contextvars
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flask
import pytest
from flask import Blueprint, Flask, Response, abort, g, stream_with_context
from flask.testing import FlaskClient
from flask.views import MethodView
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import inspect, select
from sqlalchemy.exc import IntegrityError, UnboundExecutionError
from sqlalchemy.orm import Mapped, Session, mapped_column
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix

from tenantdb.context import bound_or_none
from tenantdb.errors import ConfigError, NoTenantBound, TenantContextClosed, TenantDBError, TenantNotFound, TenantSuspended
from tenantdb.flask import FlaskTenantDB, RegistryAuth, current_identity, require_role
from tenantdb.model import MemberRole
from tenantdb.resolvers import subdomain
from tests.adapters.world import Base, Patient, World, new_world

NAMES = select(Patient.name).order_by(Patient.id)


def extension(world: World, **options: Any) -> FlaskTenantDB:
    return FlaskTenantDB(world.db, **{"authenticate": RegistryAuth(world.tokens, world.db), "exempt": ["/healthz"], **options})


def clinic(world: World, tenants: FlaskTenantDB | None = None, **options: Any) -> Flask:
    app = Flask("clinic", static_folder=None)
    tenants = tenants or extension(world, **options)
    tenants.init_app(app)

    @app.get("/patients")
    def patients() -> list[str]:
        return list(tenants.session.scalars(NAMES))

    @app.post("/patients")
    def add() -> tuple[dict[str, Any], int]:
        tenants.session.add(Patient(**flask.request.get_json()))
        tenants.session.commit()
        return {"added": flask.request.get_json()["name"]}, 201

    @app.post("/forgetful")
    def forgetful() -> str:
        tenants.session.add(Patient(name="Eve"))
        tenants.session.flush()
        return "flushed"

    @app.post("/transaction")
    def transaction() -> str:
        with tenants.db.begin() as session:
            session.add(Patient(name="Eve"))
        return "committed"

    @app.get("/me")
    def me() -> dict[str, Any]:
        return {"tenant": g.tenant.slug, "user": g.identity.user, "same": g.identity == current_identity()}

    @app.delete("/patients")
    @require_role("owner", MemberRole.ADMIN)
    def clear() -> str:
        return "cleared"

    @app.get("/suspended")
    def suspended() -> None:
        raise TenantSuspended("acme")

    return app


def in_use(world: World) -> int:
    return sum(server.in_use for server in world.db.stats())


# -- the session -----------------------------------------------------------------------------------------------------------------------


def test_a_view_reads_and_writes_its_own_tenant(world: World) -> None:
    client = clinic(world).test_client()

    added = client.post("/patients", headers=world.as_ann, json={"name": "Eve"})

    assert (added.status_code, added.json) == (201, {"added": "Eve"})
    assert client.get("/patients", headers=world.as_ann).json == ["acme", "Eve"]
    assert client.get("/patients", headers=world.as_bob).json == ["globex"]


def test_a_session_does_not_commit_by_itself_and_a_transaction_does(world: World) -> None:
    client = clinic(world).test_client()

    assert client.post("/forgetful", headers=world.as_ann).status_code == 200
    assert world.patients("acme") == ["acme"]
    assert client.post("/transaction", headers=world.as_ann).status_code == 200
    assert world.patients("acme") == ["acme", "Eve"]


def test_a_commit_that_fails_is_a_5xx_and_nothing_else(world: World) -> None:
    client = clinic(world).test_client()

    answer = client.post("/patients", headers=world.as_ann, json={"name": "Eve", "doctor": 99})

    assert answer.status_code == 500 and world.patients("acme") == ["acme"] and in_use(world) == 0


def test_a_users_own_exception_is_not_wrapped(world: World) -> None:
    app = clinic(world)
    app.testing = True

    with pytest.raises(IntegrityError):
        app.test_client().post("/patients", headers=world.as_ann, json={"name": "Eve", "doctor": 99})


def test_the_session_is_made_when_it_is_first_asked_for_and_is_the_same_throughout_a_request(world: World) -> None:
    app, tenants = Flask("clinic"), extension(world)
    tenants.init_app(app)
    seen: list[Session] = []

    @app.get("/")
    def view() -> str:
        assert g.get("_tenantdb_sessions", {}) == {}
        seen.extend((tenants.session, tenants.session))
        return str(tenants.session.scalar(NAMES))

    client = app.test_client()
    assert client.get("/", headers=world.as_ann).text == "acme"
    assert client.get("/", headers=world.as_ann).text == "acme"

    assert seen[0] is seen[1] and seen[1] is not seen[2]
    assert not any(session.in_transaction() for session in seen) and in_use(world) == 0


def test_the_session_is_of_the_applications_own_class(world: World) -> None:
    class Own(Session):
        pass

    world.db.close()
    db = type(world.db)(str(world.db.settings.url), session_class=Own)
    tenants, app = FlaskTenantDB(db, authenticate=RegistryAuth(world.tokens, db)), Flask("clinic")
    tenants.init_app(app)
    app.add_url_rule("/", view_func=lambda: str(isinstance(tenants.session, Own)))

    with db:
        assert app.test_client().get("/", headers=world.as_ann).text == "True"


def test_a_request_of_another_tenant_in_a_context_that_is_pushed_already_gets_its_own_session(world: World) -> None:
    """As tests of applications do, which push one application context for all of their requests."""
    app = clinic(world)
    client = app.test_client()

    with app.app_context():
        assert client.get("/patients", headers=world.as_ann).json == ["acme"]
        assert client.get("/patients", headers=world.as_bob).json == ["globex"]
        assert client.get("/me", headers=world.as_bob).json["tenant"] == "globex"
        assert in_use(world) == 0


def test_outside_of_requests_the_session_is_that_of_the_tenant_bound_there(world: World) -> None:
    tenants = extension(world)
    app = clinic(world, tenants)

    with app.app_context():
        for slug in ("acme", "globex", "acme"):
            with world.db.tenant_context(slug):
                assert list(tenants.session.scalars(NAMES)) == [slug]
        with pytest.raises(NoTenantBound):
            tenants.session  # noqa: B018
    assert in_use(world) == 0


def test_a_view_that_binds_another_tenant_gets_that_ones_session_and_its_own_again(world: World) -> None:
    tenants = extension(world)
    app = clinic(world, tenants)

    @app.get("/both")
    def both() -> list[str]:
        seen = [str(tenants.session.scalar(NAMES))]
        with world.db.tenant_context("globex", switch=True):
            seen.append(str(tenants.session.scalar(NAMES)))
        return [*seen, str(tenants.session.scalar(NAMES))]

    assert app.test_client().get("/both", headers=world.as_ann).json == ["acme", "globex", "acme"]
    assert in_use(world) == 0


def test_a_view_of_a_request_without_a_tenant_may_bind_one(world: World) -> None:
    tenants = extension(world, required=False)
    app = clinic(world, tenants)

    @app.get("/teaser/<slug>")
    def teaser(slug: str) -> str:
        with world.db.tenant_context(slug):
            return str(tenants.session.scalar(NAMES))

    assert app.test_client().get("/teaser/globex").text == "globex"
    assert app.test_client().get("/patients").status_code == 401


def test_a_streamed_body_uses_the_session_and_gives_it_back_at_its_end(world: World) -> None:
    tenants = extension(world)
    app = clinic(world, tenants)

    @app.get("/stream")
    @stream_with_context
    def stream() -> Iterator[str]:
        for _ in range(3):
            yield f"{tenants.session.scalar(NAMES)} {g.tenant.slug} {in_use(world)};"

    with app.test_client().get("/stream", headers=world.as_bob, buffered=False) as answer:
        pieces = [next(answer.iter_encoded())]
        assert in_use(world) == 1
        pieces.extend(answer.iter_encoded())
    assert b"".join(pieces) == b"globex globex 1;" * 3 and in_use(world) == 0


@pytest.mark.parametrize("pieces", [0, 1])
def test_a_session_that_a_generator_took_along_is_given_back_when_the_body_is_closed(world: World, pieces: int) -> None:
    """Without stream_with_context: Flask tears the request down before the body begins, and the session begins again after that."""
    tenants = extension(world)
    app = clinic(world, tenants)

    @app.get("/stream")
    def stream() -> Response:
        session = tenants.session
        return Response(str(session.scalar(NAMES)) for _ in range(3))

    with app.test_client().get("/stream", headers=world.as_ann, buffered=False) as answer:
        body = answer.iter_encoded()
        assert [next(body) for _ in range(pieces)] == [b"acme"] * pieces
        assert in_use(world) == 1
    assert in_use(world) == 0


def test_without_the_close_at_the_bodys_end_such_a_session_would_keep_its_connection(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenantdb.flask._close_after_the_body", lambda response: response)
    tenants = extension(world)
    app, kept = clinic(world, tenants), []

    @app.get("/stream")
    def stream() -> Response:
        kept.append(tenants.session)
        return Response(str(kept[0].scalar(NAMES)) for _ in range(3))

    assert app.test_client().get("/stream", headers=world.as_ann).text == "acme" * 3
    assert in_use(world) == 1
    kept[0].close()


def test_a_client_that_keeps_the_context_may_look_at_what_was_there(world: World) -> None:
    with clinic(world).test_client() as client:
        client.get("/me", headers=world.as_ann)
        assert g.tenant.slug == "acme" and flask.request.path == "/me"
        client.get("/me", headers=world.as_bob)
        assert g.tenant.slug == "globex"
    assert bound_or_none() is None and in_use(world) == 0


def test_a_session_in_a_request_that_is_over_is_refused(world: World) -> None:
    tenants = extension(world)
    app, run = clinic(world, tenants), []

    @app.get("/")
    def view() -> str:
        run.append(flask.copy_current_request_context(lambda: str(tenants.session)))
        run.append(contextvars.copy_context())
        return ""

    app.test_client().get("/", headers=world.as_ann).close()

    with pytest.raises(TenantContextClosed):
        run[1].run(run[0])


def test_a_file_is_sent(world: World, tmp_path: Path) -> None:
    app = clinic(world)
    (tmp_path / "scan.txt").write_text("scan")
    app.add_url_rule("/scan", view_func=lambda: flask.send_file(tmp_path / "scan.txt"))

    with app.test_client().get("/scan", headers=world.as_ann) as answer:
        assert answer.text == "scan"


# -- exempt views ----------------------------------------------------------------------------------------------------------------------


def auth_views(world: World) -> tuple[Flask, FlaskTenantDB, list[str]]:
    app, tenants, ran = Flask("clinic", static_folder=None), extension(world), []
    tenants.init_app(app)

    @app.get("/auth/<name>")
    @tenants.exempt
    def auth(name: str) -> dict[str, Any]:
        ran.append(name)
        return {"name": name, "tenant": g.tenant, "identity": g.identity, "bound": bound_or_none()}

    @app.route("/auth/admin")
    def admin() -> str:
        ran.append("admin")
        return "admin"

    return app, tenants, ran


def test_a_marked_view_runs_unasked_and_unbound_for_what_flask_routes_to_it(world: World) -> None:
    app, _, ran = auth_views(world)
    client = app.test_client()

    for headers in ({}, world.as_ann, {"authorization": "Bearer a.b.c"}):
        answer = client.get("/auth/login", headers=headers)
        assert answer.json == {"name": "login", "tenant": None, "identity": None, "bound": None}
    assert client.head("/auth/login").status_code == client.options("/auth/login").status_code == 200
    assert ran == ["login"] * 4


@pytest.mark.parametrize("path", ["/auth/admin", "/auth", "/auth/", "/auth/a/b", "/AUTH/login", "/auth/login/", "/authors", "/nothing"])
def test_what_flask_routes_elsewhere_or_nowhere_is_not_exempt(world: World, path: str) -> None:
    app, _, ran = auth_views(world)

    assert app.test_client().get(path).status_code == 401 and ran == []


def test_a_method_that_the_marked_view_does_not_take_is_not_exempt(world: World) -> None:
    app, _, _ = auth_views(world)

    assert app.test_client().post("/auth/login").status_code == 401
    assert app.test_client().post("/auth/login", headers=world.as_ann).status_code == 405


@pytest.mark.parametrize("path", ["/auth/../admin", "//auth/login", "/auth//login", "/auth/..%2fadmin"])
def test_an_ambiguous_path_is_refused_before_any_routing(world: World, path: str) -> None:
    app, _, ran = auth_views(world)

    # As the environment has it: the client that builds one would tidy the path up.
    environ = {"PATH_INFO": path.replace("%2f", "/"), "RAW_URI": path}
    assert app.test_client().get("/", environ_overrides=environ).status_code == 400 and ran == []


def test_a_mark_passes_through_other_decorators_and_either_side_of_the_route(world: World) -> None:
    app, tenants = Flask("clinic"), extension(world)
    tenants.init_app(app)

    def inside() -> str:
        return "in"

    def outside() -> str:
        return "out"

    app.get("/inside")(require_role("admin")(tenants.exempt(inside)))
    tenants.exempt(app.get("/outside")(outside))
    client = app.test_client()

    assert client.get("/outside").text == "out"
    assert client.get("/inside").json["code"] == "authentication-required"  # exempt, and its own decorator asks
    assert client.get("/inside", headers=world.as_ann).text == "in"


def test_class_based_views_say_it_in_their_decorators(world: World) -> None:
    app, tenants = Flask("clinic"), extension(world)
    tenants.init_app(app)

    class Open(MethodView):
        decorators = (tenants.exempt,)

        def get(self) -> str:
            return "open"

    class Closed(Open):
        decorators = ()

    app.add_url_rule("/open", view_func=Open.as_view("open"))
    app.add_url_rule("/closed", view_func=Closed.as_view("closed"))

    assert app.test_client().get("/open").text == "open"
    assert app.test_client().get("/closed").status_code == 401
    with pytest.raises(ConfigError, match="decorators"):
        tenants.exempt(Open)


def test_a_blueprint_is_exempt_with_its_views_and_not_with_the_blueprints_inside(world: World) -> None:
    app, tenants = Flask("clinic"), extension(world)
    auth, admin, shop = Blueprint("auth", "auth"), Blueprint("admin", "admin"), Blueprint("shop", "shop")
    tenants.exempt(auth)
    auth.add_url_rule("/login", view_func=lambda: "login", endpoint="login")
    admin.add_url_rule("/users", view_func=lambda: "users", endpoint="users")
    shop.add_url_rule("/public", view_func=tenants.exempt(lambda: "public"), endpoint="public")
    shop.add_url_rule("/orders", view_func=lambda: "orders", endpoint="orders")
    auth.register_blueprint(admin, url_prefix="/admin")
    app.register_blueprint(auth, url_prefix="/auth", name="renamed")
    app.register_blueprint(shop, url_prefix="/shop")
    tenants.init_app(app)
    client = app.test_client()

    assert {path: client.get(path).status_code for path in ("/auth/login", "/auth/admin/users", "/shop/public", "/shop/orders")} == {
        "/auth/login": 200,
        "/auth/admin/users": 401,
        "/shop/public": 200,
        "/shop/orders": 401,
    }
    assert client.get("/auth/admin/users", headers=world.as_ann).text == "users"


def test_a_session_in_a_marked_view_is_a_bug_and_is_logged_as_one(world: World, caplog: pytest.LogCaptureFixture) -> None:
    app, tenants, _ = auth_views(world)
    app.add_url_rule("/forgot", view_func=tenants.exempt(lambda: str(tenants.session)))

    answer = app.test_client().get("/forgot", headers=world.as_ann)

    assert (answer.status_code, answer.json["code"]) == (500, "no-tenant-bound")
    assert caplog.records[-1].levelno == logging.ERROR and caplog.records[-1].exc_info is not None
    assert caplog.records[-1].exc_info[0] is NoTenantBound


def test_routing_is_asked_only_where_some_view_is_marked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    adapter = Flask.create_url_adapter

    def counting(self: Flask, request: Any) -> Any:
        asked.append(self.name)
        return adapter(self, request)

    monkeypatch.setattr(Flask, "create_url_adapter", counting)
    tenants = extension(world)
    client = clinic(world, tenants).test_client()

    client.get("/patients", headers=world.as_ann)
    unmarked = len(asked)
    tenants.exempt(lambda: None)
    client.get("/patients", headers=world.as_ann)

    assert len(asked) - unmarked == unmarked + 1


@pytest.mark.parametrize("how", ["path", "method"])
def test_who_changes_an_exempt_request_behind_the_middlewares_back_is_found_out(world: World, how: str) -> None:
    app, ran = Flask("clinic"), []

    def rewriting(environ: Any, start_response: Any) -> Any:
        if how == "path":
            environ["PATH_INFO"] = environ["PATH_INFO"].replace("/healthz", "/admin")
        else:
            environ["REQUEST_METHOD"] = "POST"
        return flask_itself(environ, start_response)

    flask_itself, app.wsgi_app = app.wsgi_app, rewriting  # type: ignore[method-assign]
    extension(world, exempt=["GET /healthz"]).init_app(app)

    @app.route("/admin", methods=["GET", "POST"])
    @app.route("/healthz", methods=["GET", "POST"])
    def admin() -> str:
        ran.append(flask.request.path)
        return "admin"

    answer = app.test_client().get("/healthz")

    assert (answer.status_code, answer.json["code"]) == (500, "config") and ran == []


def test_what_wraps_the_application_later_stands_outside(world: World) -> None:
    app = clinic(world, authenticate=None, resolver=subdomain("clinic.example"))
    forwarded = {"host": "10.0.0.1", "x-forwarded-host": "acme.clinic.example"}

    assert app.test_client().get("/patients", headers=forwarded).status_code == 404
    app.wsgi_app = ProxyFix(app.wsgi_app, x_host=1)  # type: ignore[method-assign]
    assert app.test_client().get("/patients", headers=forwarded).json == ["acme"]


def test_a_mounted_application_is_routed_below_its_mount(world: World) -> None:
    app, _, ran = auth_views(world)
    outer = Flask("outer")
    outer.wsgi_app = DispatcherMiddleware(outer.wsgi_app, {"/auth": app.wsgi_app})  # type: ignore[method-assign]
    client = outer.test_client()

    assert client.get("/auth/auth/login").status_code == 200
    assert client.get("/auth/patients").status_code == client.get("/auth/auth/admin").status_code == 401
    assert ran == ["login"]


# -- who asks --------------------------------------------------------------------------------------------------------------------------


def test_a_view_is_told_its_tenant_and_who_asks(world: World) -> None:
    answer = clinic(world).test_client().get("/me", headers=world.bearer(world.ann, world.acme, role="owner"))

    assert answer.json == {"tenant": "acme", "user": str(world.ann.id), "same": True}


def test_the_applications_own_functions_for_all_requests_are_told_too(world: World) -> None:
    """Also those that were registered before."""
    app, seen = Flask("clinic"), []

    @app.before_request
    def before() -> None:
        seen.append(g.tenant.slug)

    @app.url_value_preprocessor
    def preprocess(*_: Any) -> None:
        seen.append(g.identity.role)

    clinic_app = extension(world)
    clinic_app.init_app(app)
    app.add_url_rule("/", view_func=lambda: "")

    app.test_client().get("/", headers=world.as_ann)

    assert seen == ["admin", "acme"]


def test_only_the_listed_roles_pass(world: World) -> None:
    client = clinic(world).test_client()

    allowed = client.delete("/patients", headers=world.as_ann)
    denied = client.delete("/patients", headers=world.bearer(world.bob, world.globex, role="owner"))

    assert (allowed.status_code, allowed.text) == (200, "cleared")
    assert (denied.status_code, denied.json["code"]) == (403, "role-required")
    assert client.delete("/patients", headers=world.bearer(world.ann)).json["code"] == "role-required"
    with pytest.raises(ConfigError, match="role"):
        require_role()


def test_an_exempt_view_may_ask_who_it_is(world: World) -> None:
    app = clinic(world)
    app.add_url_rule("/healthz", view_func=lambda: str(current_identity().role))
    client = app.test_client()

    assert client.get("/healthz", headers=world.as_ann).text == "admin"
    assert client.get("/healthz").json["code"] == "authentication-required"
    assert client.get("/healthz", headers={"authorization": "Bearer a.b.c"}).json["code"] == "invalid-token"


async def asynchronous() -> str:
    return str(g.tenant.slug) + " " + str(bound_or_none() == g.tenant)


def test_an_async_view_runs_for_the_tenant(world: World) -> None:
    app = clinic(world)
    app.add_url_rule("/async", view_func=require_role("admin")(asynchronous))

    assert app.test_client().get("/async", headers=world.as_ann).text == "acme True"


# -- errors ----------------------------------------------------------------------------------------------------------------------------


def test_an_error_of_ours_in_a_view_becomes_a_problem(world: World) -> None:
    answer = clinic(world).test_client().get("/suspended", headers=world.as_ann)

    assert (answer.status_code, answer.json["code"], answer.mimetype) == (403, "tenant-suspended", "application/problem+json")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", [TenantSuspended, TenantDBError])
def test_the_applications_own_handler_stays(world: World, when: str, kind: type[TenantDBError]) -> None:
    app, tenants = Flask("clinic"), extension(world)
    if when == "after":
        tenants.init_app(app)
    app.register_error_handler(kind, lambda error: (f"mine: {error.code}", 418))
    if when == "before":
        tenants.init_app(app)

    @app.get("/")
    def view() -> None:
        raise TenantSuspended("acme")

    answer = app.test_client().get("/", headers=world.as_ann)

    assert (answer.status_code, answer.text) == (418, "mine: tenant-suspended")


def test_a_blueprints_own_handler_stays_and_so_do_those_for_other_errors(world: World) -> None:
    app, shop = clinic(world), Blueprint("shop", "shop")
    shop.register_error_handler(TenantDBError, lambda error: ("of the shop", 418))
    app.register_error_handler(404, lambda error: ("mine", 404))
    app.register_error_handler(ZeroDivisionError, lambda error: ("mine", 500))

    @shop.get("/shop")
    def view() -> None:
        raise TenantNotFound("initech")

    app.register_blueprint(shop)
    app.add_url_rule("/zero", view_func=lambda: str(1 // 0))
    app.add_url_rule("/gone", "gone", lambda: abort(410))
    client = app.test_client()

    answers = [client.get(path, headers=world.as_ann) for path in ("/shop", "/nothing", "/zero", "/gone")]
    assert [answer.status_code for answer in answers] == [418, 404, 500, 410]
    assert [answer.text for answer in answers[:3]] == ["of the shop", "mine", "mine"]


def test_an_error_of_ours_outside_of_any_request_of_the_middleware_is_the_applications(world: World) -> None:
    app = clinic(world)
    app.testing = True

    with app.test_request_context("/suspended"), pytest.raises(TenantSuspended):
        app.full_dispatch_request()


# -- applications ----------------------------------------------------------------------------------------------------------------------


def test_one_extension_serves_several_applications_each_with_its_own_database(world: World, tmp_path: Path) -> None:
    tenants = FlaskTenantDB()
    (tmp_path / "other").mkdir()
    with new_world(tmp_path / "other") as other:
        clients: list[FlaskClient] = []
        for each in (world, other):
            app = Flask("clinic")
            tenants.init_app(app, each.adb, authenticate=RegistryAuth(each.tokens, each.adb))
            app.add_url_rule("/", view_func=lambda: json.dumps(list(tenants.session.scalars(NAMES))))
            clients.append(app.test_client())
        with other.db.begin("acme") as session:
            session.add(Patient(name="Other"))

        assert clients[0].get("/", headers=world.as_ann).text == '["acme"]'
        assert clients[1].get("/", headers=other.as_ann).text == '["acme", "Other"]'
        assert clients[1].get("/", headers=world.as_ann).json["code"] == "no-access"


def test_mistakes_are_told_when_they_are_made(world: World) -> None:
    app, tenants = Flask("clinic"), extension(world)
    with pytest.raises(ConfigError, match="init_app"):
        FlaskTenantDB().init_app(app)
    tenants.init_app(app)
    with pytest.raises(ConfigError, match="already"):
        tenants.init_app(app)
    with pytest.raises(ConfigError, match="list of routes"):
        FlaskTenantDB(world.db, authenticate=RegistryAuth(world.tokens, world.db), exempt="/healthz").init_app(Flask("other"))
    with pytest.raises(ConfigError, match="names the tenant"):
        FlaskTenantDB(world.db).init_app(Flask("other"))
    with Flask("other").app_context(), pytest.raises(ConfigError, match="init_app"):
        tenants.db  # noqa: B018
    with Flask("other").test_request_context(), pytest.raises(ConfigError, match="init_app"):
        current_identity()


# -- beside Flask-SQLAlchemy -------------------------------------------------------------------------------------------------------------


def test_shared_tables_are_flask_sqlalchemys_and_the_tenants_are_beside_them(world: World, tmp_path: Path) -> None:
    """With models of one kind: a tenant's are marked by a bind key that no engine is configured for."""
    app, shared, tenants = Flask("clinic"), SQLAlchemy(), extension(world)

    class Country(shared.Model):  # type: ignore[name-defined,misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    class Room(shared.Model):  # type: ignore[name-defined,misc]
        __bind_key__ = "tenant"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path}/shared.sqlite3"
    shared.init_app(app)
    tenants.init_app(app)
    for slug in ("acme", "globex"):
        with world.db.begin(slug) as session:
            shared.metadatas["tenant"].create_all(session.connection())
            session.add(Room(name=f"room of {slug}"))

    @app.get("/")
    def view() -> dict[str, Any]:
        return {
            "countries": list(shared.session.scalars(select(Country.name))),
            "rooms": list(tenants.session.scalars(select(Room.name))),
            "patients": list(tenants.session.scalars(NAMES)),
        }

    @app.get("/wrong")
    def wrong() -> str:
        return str(shared.session.scalar(select(Room.name)))

    with app.app_context():
        shared.create_all(bind_key=None)
        shared.session.add(Country(name="France"))
        shared.session.commit()
        assert inspect(shared.engine).get_table_names() == ["country"]

    client = app.test_client()
    assert client.get("/", headers=world.as_ann).json == {"countries": ["France"], "rooms": ["room of acme"], "patients": ["acme"]}
    assert client.get("/", headers=world.as_bob).json["rooms"] == ["room of globex"]
    app.testing = True
    with pytest.raises(UnboundExecutionError):
        client.get("/wrong", headers=world.as_ann)
    assert "rooms" not in Base.metadata.tables
    with app.app_context():
        shared.engine.dispose()


# -- flask tenantdb --------------------------------------------------------------------------------------------------------------------


def test_flask_tenantdb_is_the_command_with_the_applications_database(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENANTDB_APP", "nowhere:db")  # of another application
    run = clinic(world).test_cli_runner().invoke

    listed = run(args=["tenantdb", "list", "--json"])
    assert [tenant["slug"] for tenant in json.loads(listed.stdout)] == ["acme", "globex"]
    suspended = run(args=["tenantdb", "suspend", "acme"])
    assert suspended.exit_code == 0 and world.db.tenants.get("acme").state == "suspended"
    assert run(args=["tenantdb", "show", "initech"]).exit_code == 1
    assert run(args=["tenantdb", "--no-such-option"]).exit_code == 2
    helped = run(args=["tenantdb", "provision", "--help"])
    assert "Usage: flask tenantdb provision" in helped.stdout
    assert world.patients("globex") == ["globex"]  # the database is the application's to close
