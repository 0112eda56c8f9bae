"""The clinic by Flask, over the same stores, schemas and tokens as app.py: `flask --app examples.clinic.flask_app run`.

Its sessions block, so reads use the request's own, `tenants.session`, and writes `db.begin()`, which has committed before the response
leaves. Signing up, and what only app.py has beside the resources, stays there: a token from either serves at both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar
from uuid import UUID

from flask import Blueprint, Flask, Response, request
from pydantic import BaseModel, ValidationError
from sqlalchemy.orm import Session

from examples.clinic import accounts
from examples.clinic.access import access_tokens
from examples.clinic.problems import ClinicProblem, malformed
from examples.clinic.resources import RESOURCES, Resource
from examples.clinic.roles import allowed
from examples.clinic.schemas import Deletion, Login, Page
from tenantdb import TenantDB
from tenantdb.flask import FlaskTenantDB, RegistryAuth, current_identity, require_role
from tenantdb.tokens import Tokens

ModelT = TypeVar("ModelT", bound=BaseModel)


def create_app(db: TenantDB | None = None, *, token_key: str | None = None, worker: Any = None) -> Flask:
    """The application over `db`, by default the one of db.py; `token_key` and `worker` as in app.py. Opens nothing yet."""
    if db is None:
        from examples.clinic.db import db
    if worker is None and os.environ.get("CLINIC_BROKER_URL"):
        from examples.clinic.worker import create_worker

        worker = create_worker(db)
    tokens = access_tokens(token_key)
    app = Flask(__name__, static_folder=None)
    tenants = FlaskTenantDB(db, authenticate=RegistryAuth(tokens, db), exempt=["/auth/*", "/healthz"])
    tenants.init_app(app)
    app.register_error_handler(ClinicProblem, refused)
    app.register_blueprint(auth(db, tokens))
    for name, resource in RESOURCES.items():
        app.register_blueprint(crud(name, resource, tenants, worker))

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    return app


def auth(db: TenantDB, tokens: Tokens) -> Blueprint:
    routes = Blueprint("auth", __name__, url_prefix="/auth")

    @routes.post("/login")
    def login() -> Response:
        return _answer(accounts.log_in(db, tokens, _body(Login)))

    @routes.get("/me")
    def me() -> Response:
        return _answer(accounts.me(db, current_identity()))

    return routes


def crud(name: str, resource: Resource, tenants: FlaskTenantDB, worker: Any) -> Blueprint:
    """The six routes of api/crud.py."""
    store, shapes = resource.store, resource.shapes
    routes = Blueprint(name, __name__, url_prefix=f"/api/v1/{name}")

    def writing() -> AbstractContextManager[Session]:
        return tenants.db.begin()

    def reading() -> AbstractContextManager[Session]:
        return nullcontext(tenants.session) if resource.audited is None else writing()

    def note(session: Session, action: str, row_id: UUID | None = None, **details: Any) -> None:
        if resource.audited is not None:
            tenants.db.audit.record(session, f"{resource.audited}.{action}", row_id, details=details)

    @routes.get("")
    @require_role(*allowed(name, "read"))
    def list_rows() -> Response:
        query = _query(shapes.listing)
        with reading() as session:
            rows, total = store.page(session, query)
            note(session, "list", shown=[str(row.id) for row in rows])
            page = Page[shapes.out]  # type: ignore[name-defined]
            return _answer(page(items=rows, total=total, limit=query.limit, offset=query.offset))

    @routes.post("")
    @require_role(*allowed(name, "create"))
    def create_row() -> Response:
        data = _body(shapes.create)
        with writing() as session:
            row = store.create(session, data)
            note(session, "create", row.id)
            resource.announce(session, row.id, worker)
            return _answer(shapes.out.model_validate(row), 201)

    @routes.get("/<uuid:row_id>")
    @require_role(*allowed(name, "read"))
    def read_row(row_id: UUID) -> Response:
        with reading() as session:
            row = store.find(session, row_id)
            note(session, "read", row_id)
            return _answer(shapes.out.model_validate(row))

    @routes.patch("/<uuid:row_id>")
    @require_role(*allowed(name, "update"))
    def update_row(row_id: UUID) -> Response:
        data = _body(shapes.update)
        with writing() as session:
            row = store.update(session, row_id, data)
            note(session, "update", row_id, fields=sorted(data.model_fields_set))
            return _answer(shapes.out.model_validate(row))

    @routes.delete("/<uuid:row_id>")
    @require_role(*allowed(name, "delete"))
    def delete_row(row_id: UUID) -> Response:
        if _query(Deletion).permanent and resource.erase is not None:
            action, remove = "erase", require_role(*allowed(name, "erase"))(resource.erase)
        else:
            action, remove = "delete", store.delete
        with writing() as session:
            remove(session, row_id)
            note(session, action, row_id)
        return Response(status=204)

    @routes.post("/<uuid:row_id>/restore")
    @require_role(*allowed(name, "restore"))
    def restore_row(row_id: UUID) -> Response:
        with writing() as session:
            row = store.restore(session, row_id)
            note(session, "restore", row_id)
            return _answer(shapes.out.model_validate(row))

    return routes


def refused(problem: ClinicProblem) -> Response:
    return Response(json.dumps(problem.body), problem.status, content_type="application/problem+json")


def _answer(found: BaseModel, status: int = 200) -> Response:
    return Response(found.model_dump_json(), status, content_type="application/json")


def _query(shape: type[ModelT]) -> ModelT:
    with _wellformed():
        return shape.model_validate(request.args.to_dict())


def _body(shape: type[ModelT]) -> ModelT:
    with _wellformed():
        return shape.model_validate_json(request.get_data())


@contextmanager
def _wellformed() -> Iterator[None]:
    """Around what was sent, and not around a whole view: what this application itself gets wrong is no fault of the client's."""
    try:
        yield
    except ValidationError as error:
        raise malformed(error.errors()) from None
