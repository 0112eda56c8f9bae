from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Iterator, MutableMapping
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, WebSocket
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette.requests import HTTPConnection

from tenantdb.asgi import RegistryAuth
from tenantdb.context import current_actor
from tenantdb.errors import ConfigError, NoTenantBound, TenantDBError, TenantNotFound, TenantSuspended
from tenantdb.fastapi import (
    AsyncTenantSession,
    AsyncTenantTransaction,
    CurrentIdentity,
    CurrentTenant,
    TenantSession,
    TenantTransaction,
    install,
    problem_response,
    require_role,
)
from tenantdb.model import MemberRole
from tenantdb.resolvers import subdomain
from tests.adapters.world import Answer, Patient, WebSocketPeer, World, http_scope, request
from tests.world import eventually


class NewPatient(BaseModel):
    name: str
    doctor: int | None = None


async def request_scoped(connection: HTTPConnection, _: CurrentTenant) -> AsyncIterator[AsyncSession]:
    """What a FastAPI dependency does by default: it ends after the response was sent."""
    async with connection.app.state.tenantdb.begin() as session:
        yield session


def clinic(world: World, **options: Any) -> FastAPI:
    app = FastAPI()
    given: dict[str, Any] = {"authenticate": RegistryAuth(world.tokens, world.adb), "exempt": ["/auth/*", "/public"], **options}
    install(app, world.adb, **given)

    @app.get("/patients")
    async def patients(session: AsyncTenantSession) -> list[str]:
        return list(await session.scalars(select(Patient.name).order_by(Patient.id)))

    @app.get("/blocking/patients")
    def blocking_patients(session: TenantSession) -> list[str]:
        return list(session.scalars(select(Patient.name).order_by(Patient.id)))

    @app.post("/patients", status_code=201)
    async def add(new: NewPatient, session: AsyncTenantTransaction) -> dict[str, str]:
        session.add(Patient(**new.model_dump()))
        return {"added": new.name}

    @app.post("/blocking/patients", status_code=201)
    def blocking_add(new: NewPatient, session: TenantTransaction) -> dict[str, str]:
        session.add(Patient(**new.model_dump()))
        return {"added": new.name}

    @app.post("/late/patients", status_code=201)
    async def late_add(new: NewPatient, session: Annotated[AsyncSession, Depends(request_scoped)]) -> dict[str, str]:
        session.add(Patient(**new.model_dump()))
        return {"added": new.name}

    @app.post("/failing/patients")
    async def failing_add(new: NewPatient, session: AsyncTenantTransaction) -> None:
        session.add(Patient(**new.model_dump()))
        await session.flush()
        raise HTTPException(418)

    @app.post("/forgetful/patients")
    async def forgetful_add(new: NewPatient, session: AsyncTenantSession) -> None:
        session.add(Patient(**new.model_dump()))
        await session.flush()

    @app.get("/me")
    async def me(tenant: CurrentTenant, identity: CurrentIdentity) -> dict[str, Any]:
        return {"tenant": tenant.slug, "user": identity.user, "role": identity.role}

    @app.get("/auth/me")
    async def auth_me(identity: CurrentIdentity) -> dict[str, Any]:
        return {"user": identity.user, "role": identity.role}

    @app.get("/auth/session")
    async def auth_session(session: AsyncTenantSession) -> None:
        raise AssertionError("it has a session")

    @app.get("/auth/tenant/{slug}")
    @app.get("/tenant/{slug}")
    async def tenant(slug: str) -> None:
        raise TenantNotFound(slug)

    @app.get("/public")
    async def public() -> str:
        return current_actor().actor

    @app.delete("/patients", dependencies=[Depends(require_role("owner", MemberRole.ADMIN))])
    async def clear() -> str:
        return "cleared"

    @app.get("/stream")
    async def stream(session: AsyncTenantSession) -> StreamingResponse:
        async def names() -> AsyncIterator[str]:
            for _ in range(3):
                yield str(await session.scalar(select(Patient.name)))

        return StreamingResponse(names())

    @app.get("/blocking/stream")
    def blocking_stream(session: TenantSession) -> StreamingResponse:
        def names() -> Iterator[str]:
            for _ in range(3):
                yield str(session.scalar(select(Patient.name)))

        return StreamingResponse(names())

    @app.websocket("/ws")
    async def ws(websocket: WebSocket, session: AsyncTenantSession, tenant: CurrentTenant) -> None:
        await websocket.accept()
        await websocket.send_text(f"{tenant.slug} {await session.scalar(select(Patient.name))}")

    return app


async def post(app: FastAPI, path: str, headers: dict[str, str], **patient: Any) -> Answer:
    return await request(app, path, headers, json_body=patient)


# -- sessions --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/blocking"])
async def test_a_route_reads_and_writes_its_own_tenant(world: World, prefix: str) -> None:
    app = clinic(world)

    answer = await post(app, f"{prefix}/patients", world.as_ann, name="Eve")

    assert (answer.status, answer.json) == (201, {"added": "Eve"})
    assert (await request(app, f"{prefix}/patients", world.as_ann)).json == ["acme", "Eve"]
    assert (await request(app, f"{prefix}/patients", world.as_bob)).json == ["globex"]


@pytest.mark.parametrize("prefix", ["", "/blocking"])
async def test_a_commit_that_fails_is_a_5xx_and_nothing_else(world: World, prefix: str) -> None:
    """The server's own 500, made by Starlette for an exception that is the application's, and passed on unchanged."""
    app, answers = clinic(world), []

    async def noted(scope: Any, receive: Any, send: Any) -> None:
        async def note(message: Any) -> None:
            answers.append(message)
            await send(message)

        await app(scope, receive, note)

    with pytest.raises(IntegrityError):
        await request(noted, f"{prefix}/patients", world.as_ann, json_body={"name": "Eve", "doctor": 99})

    assert [message["status"] for message in answers if message["type"] == "http.response.start"] == [500]
    assert world.patients("acme") == ["acme"]


async def test_a_transaction_that_ends_after_the_response_would_have_said_201(world: World) -> None:
    """Why the transactions have function scope: the same route with FastAPI's default."""
    app, statuses = clinic(world), []

    async def noted(scope: Any, receive: Any, send: Any) -> None:
        async def note(message: Any) -> None:
            statuses.append(message.get("status"))
            await send(message)

        await app(scope, receive, note)

    with pytest.raises(IntegrityError):
        await request(noted, "/late/patients", world.as_ann, json_body={"name": "Eve", "doctor": 99})

    assert statuses[0] == 201 and world.patients("acme") == ["acme"]


async def test_a_route_that_raises_rolls_back_and_its_answer_stands(world: World) -> None:
    answer = await post(clinic(world), "/failing/patients", world.as_ann, name="Eve")

    assert answer.status == 418 and world.patients("acme") == ["acme"]


async def test_a_session_does_not_commit_by_itself(world: World) -> None:
    assert (await post(clinic(world), "/forgetful/patients", world.as_ann, name="Eve")).status == 200
    assert world.patients("acme") == ["acme"]


@pytest.mark.parametrize("path", ["/stream", "/blocking/stream"])
async def test_a_streamed_body_reads_through_the_routes_session(world: World, path: str) -> None:
    assert (await request(clinic(world), path, world.as_bob)).body == b"globex" * 3


@pytest.mark.parametrize("path", ["/stream", "/blocking/stream"])
async def test_a_client_that_leaves_in_the_middle_of_a_body_gives_its_connection_back(world: World, path: str) -> None:
    """P11: whether a coroutine makes the body or, in a worker's thread, an ordinary generator."""
    pieces: list[bytes] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.body":
            assert in_use(world) == 1
            pieces.append(message["body"])
            raise OSError("the client is gone")

    await asyncio.gather(clinic(world)(http_scope(path, world.as_ann), receive, send), return_exceptions=True)

    def given_back() -> bool:
        gc.collect()  # to which Starlette leaves generators
        return in_use(world) == 0

    eventually(given_back)
    assert pieces == [b"acme"]


def in_use(world: World) -> int:
    return sum(server.in_use for server in world.db.stats())


async def test_concurrent_requests_of_two_tenants_never_mix(world: World) -> None:
    app = clinic(world)
    paths = ["/patients", "/blocking/patients", "/stream", "/me"] * 6

    answers = await asyncio.gather(*(request(app, path, headers) for path in paths for headers in (world.as_ann, world.as_bob)))

    for index, answer in enumerate(answers):
        own, other = (b"acme", b"globex") if index % 2 == 0 else (b"globex", b"acme")
        assert answer.status == 200 and own in answer.body and other not in answer.body


async def test_a_background_task_runs_for_the_tenant(world: World) -> None:
    app, seen = clinic(world), []

    @app.post("/later")
    async def later(tasks: BackgroundTasks) -> None:
        async def task() -> None:
            async with world.adb.session() as session:
                seen.append(await session.scalar(select(Patient.name)))

        tasks.add_task(task)

    assert (await request(app, "/later", world.as_bob, method="POST")).status == 200
    assert seen == ["globex"]


async def test_a_websocket_gets_the_tenants_session_and_a_stranger_gets_none(world: World) -> None:
    app = clinic(world)

    peer = WebSocketPeer(app, "/ws", world.as_ann)
    answer = await peer.ask("websocket.connect")
    assert answer is not None and answer["type"] == "websocket.accept"
    answer = await peer.ask("websocket.receive", text="")
    assert answer is not None and answer["text"] == "acme acme"
    await peer.served

    refused = await WebSocketPeer(app, "/ws", {}).ask("websocket.connect")
    assert refused is not None and (refused["type"], refused["code"]) == ("websocket.close", 1008)


async def test_a_websocket_that_may_come_without_credentials_is_refused_where_it_asks_for_a_tenant(world: World) -> None:
    refused = await WebSocketPeer(clinic(world, required=False), "/ws", {}).ask("websocket.connect")

    assert refused is not None and (refused["type"], refused["code"]) == ("websocket.close", 1008)


# -- who asks --------------------------------------------------------------------------------------------------------------------------


async def test_a_route_is_told_its_tenant_and_who_asks(world: World) -> None:
    answer = await request(clinic(world), "/me", world.bearer(world.ann, world.acme, role="owner"))

    assert answer.json == {"tenant": "acme", "user": str(world.ann.id), "role": "admin"}


async def test_only_the_listed_roles_pass(world: World) -> None:
    app = clinic(world)

    allowed = await request(app, "/patients", world.as_ann, method="DELETE")
    denied = await request(app, "/patients", world.bearer(world.bob, world.globex, role="owner"), method="DELETE")

    assert (allowed.status, allowed.json) == (200, "cleared")
    assert (denied.status, denied.json["code"]) == (403, "role-required")
    assert (await request(app, "/patients", world.bearer(world.ann), method="DELETE")).json["code"] == "role-required"


def test_a_list_of_no_roles_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="role"):
        require_role()


@pytest.mark.parametrize("path", ["/patients", "/blocking/patients", "/me", "/stream"])
async def test_without_credentials_a_tenants_route_is_401_where_they_are_optional_too(world: World, path: str) -> None:
    for required in (True, False):
        assert (await request(clinic(world, required=required), path)).status == 401
    assert (await request(clinic(world, required=False), "/public")).status == 200


async def test_a_token_without_a_tenant_opens_no_tenants_route(world: World) -> None:
    answer = await request(clinic(world), "/patients", world.bearer(world.ann))

    assert (answer.status, answer.json["code"]) == (403, "no-access")


async def test_a_session_on_an_exempt_route_is_a_bug_and_is_logged_as_one(world: World, caplog: pytest.LogCaptureFixture) -> None:
    answer = await request(clinic(world), "/auth/session", world.as_ann)

    assert (answer.status, answer.json["code"]) == (500, "no-tenant-bound")
    assert caplog.records[-1].levelno == logging.ERROR
    assert caplog.records[-1].exc_info is not None and caplog.records[-1].exc_info[0] is NoTenantBound


async def test_an_exempt_route_may_ask_who_it_is(world: World) -> None:
    app = clinic(world)

    assert (await request(app, "/auth/me", world.as_ann)).json == {"user": str(world.ann.id), "role": "admin"}
    assert (await request(app, "/auth/me")).json["code"] == "authentication-required"
    assert (await request(app, "/auth/me", {"authorization": "Bearer a.b.c"})).json["code"] == "invalid-token"


async def test_who_acts_on_an_exempt_route_is_nobody_in_particular(world: World) -> None:
    assert (await request(clinic(world), "/public", world.as_ann)).json == "anonymous"


# -- errors ----------------------------------------------------------------------------------------------------------------------------


async def test_an_error_of_ours_in_a_route_becomes_a_problem(world: World) -> None:
    app = clinic(world)

    open_route, closed_route = await request(app, "/auth/tenant/initech"), await request(app, "/tenant/initech", world.as_ann)

    assert (open_route.status, open_route.json["code"]) == (404, "tenant-not-found")
    assert (closed_route.status, closed_route.json["code"]) == (403, "no-access")
    assert open_route.headers["content-type"] == "application/problem+json" and b"initech" not in open_route.body
    assert closed_route.json == (await request(app, "/patients", world.bearer(world.ann, world.globex))).json


async def test_an_error_of_ours_in_a_mounted_application_becomes_a_problem_too(world: World) -> None:
    app, inner = clinic(world), FastAPI(exception_handlers={TenantDBError: problem_response})
    app.mount("/inner", inner)

    @inner.get("/patients")
    async def patients(session: AsyncTenantSession) -> list[str]:
        return list(await session.scalars(select(Patient.name)))

    @inner.get("/suspended")
    async def suspended() -> None:
        raise TenantSuspended("acme")

    assert (await request(app, "/inner/patients", world.as_bob)).json == ["globex"]
    assert (await request(app, "/inner/suspended", world.as_bob)).json["code"] == "tenant-suspended"
    assert (await request(app, "/inner/patients")).status == 401


async def test_a_suspended_tenant_and_a_session_that_is_open_already(world: World) -> None:
    app = clinic(world)
    world.db.suspend("acme")

    answer = await request(app, "/patients", world.as_ann)

    assert (answer.status, answer.json["code"]) == (403, "tenant-suspended")
    assert (await request(app, "/patients", world.as_bob)).status == 200


async def test_a_dependency_without_the_middleware_says_what_is_missing(world: World) -> None:
    app = FastAPI()

    @app.get("/")
    async def root(tenant: CurrentTenant) -> None:
        raise AssertionError

    with pytest.raises(ConfigError, match="install"):
        await request(app, "/")


# -- documentation, CORS ---------------------------------------------------------------------------------------------------------------


async def test_the_documentation_works_in_the_first_minute_and_can_sign_in(world: World) -> None:
    app = clinic(world)

    for path in ("/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"):
        assert (await request(app, path)).status == 200
    schema = (await request(app, "/openapi.json")).json
    assert schema["components"]["securitySchemes"]["bearer"] == {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
    asks = {path: "security" in operations["get"] for path, operations in schema["paths"].items() if "get" in operations}
    assert asks["/patients"] and asks["/me"] and asks["/tenant/{slug}"] and asks["/auth/me"]
    assert not asks["/public"] and not asks["/auth/tenant/{slug}"]
    assert (await request(app, "/openapi.json")).json == schema
    assert (await request(app, "/docs", method="POST")).status == 401


async def test_the_documentation_tells_what_is_refused_unless_a_route_tells_it_itself(world: World) -> None:
    app = clinic(world)

    @app.get("/own", responses={403: {"description": "mine"}})
    async def own() -> None: ...

    operations = (await request(app, "/openapi.json")).json["paths"]
    assert set(operations["/patients"]["get"]["responses"]) == {"200", "401", "402", "403", "503"}
    assert operations["/patients"]["get"]["responses"]["401"]["content"] == {
        "application/problem+json": {"schema": {"$ref": "#/components/schemas/TenantProblem"}}
    }
    assert operations["/own"]["get"]["responses"]["403"] == {"description": "mine"}
    assert set(operations["/public"]["get"]["responses"]) == {"200"}


async def test_pages_that_are_anybodys_are_found_by_their_host_alone(world: World) -> None:
    app = clinic(world, authenticate=None, resolver=subdomain("clinic.example"), exempt=[])

    found = await request(app, "/patients", {"host": "acme.clinic.example"})
    assert (found.status, found.json) == (200, ["acme"])
    assert (await request(app, "/patients", {"host": "initech.clinic.example"})).json["code"] == "tenant-not-found"
    assert (await request(app, "/patients", {"host": "clinic.example"})).status == 404
    assert (await request(app, "/me", {"host": "acme.clinic.example"})).status == 401
    schema = (await request(app, "/openapi.json")).json
    assert "404" in schema["paths"]["/patients"]["get"]["responses"] and "security" not in schema["paths"]["/patients"]["get"]


async def test_documentation_that_is_switched_off_is_not_exempt(world: World) -> None:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    install(app, world.adb, authenticate=RegistryAuth(world.tokens, world.adb))

    for path in ("/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"):
        assert (await request(app, path)).status == 401


async def test_cors_added_afterwards_answers_preflights_and_marks_refusals(world: World) -> None:
    app = clinic(world)
    app.add_middleware(CORSMiddleware, allow_origins=["https://clinic.example"], allow_headers=["authorization"])
    origin = {"origin": "https://clinic.example"}

    preflight = await request(app, "/patients", {**origin, "access-control-request-method": "GET"}, method="OPTIONS")
    refusal = await request(app, "/patients", origin)

    assert preflight.status == 200 and refusal.status == 401
    assert {answer.headers["access-control-allow-origin"] for answer in (preflight, refusal)} == {"https://clinic.example"}


def test_the_application_finds_the_database_in_its_state(world: World) -> None:
    assert clinic(world).state.tenantdb is world.adb


def test_the_dependencies_are_sqlalchemys_own_types() -> None:
    assert AsyncTenantTransaction.__origin__ is AsyncSession  # type: ignore[attr-defined]
    assert TenantTransaction.__origin__ is Session  # type: ignore[attr-defined]
