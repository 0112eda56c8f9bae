from __future__ import annotations

import asyncio
import contextvars
import gc
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from uuid import uuid4

import pytest
import uvicorn
from sqlalchemy import event, select, text
from sqlalchemy.pool import Pool
from starlette._utils import get_route_path
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from tenantdb import asgi, requests
from tenantdb.asgi import RegistryAuth, TenantMiddleware, facts_of
from tenantdb.auth import Visit
from tenantdb.context import bound_or_none, current_actor, current_tenant
from tenantdb.errors import (
    ConfigError,
    NoTenantBound,
    RegistryUnavailable,
    ServerUnavailable,
    TenantContextClosed,
    TenantDBError,
    TenantNotFound,
    TenantNotReady,
    TenantSuspended,
)
from tenantdb.model import Identity
from tenantdb.requests import Facts
from tests.adapters.world import App, Patient, WebSocketPeer, World, add_tenant, http_scope, queries, request, send_scope

Handler = Callable[[Request], Awaitable[Any]]


def protect(world: World, app: Any, **options: Any) -> TenantMiddleware:
    given: dict[str, Any] = {"db": world.adb, "authenticate": RegistryAuth(world.tokens, world.adb), **options}
    return TenantMiddleware(app, **given)


def catch_all(world: World, handler: Handler, **options: Any) -> Starlette:
    """An application that serves every path, as the worst of all routers would."""
    app = Starlette(routes=[Route("/{path:path}", handler, methods=["GET", "POST", "OPTIONS"])])
    app.add_middleware(TenantMiddleware, **{"db": world.adb, "authenticate": RegistryAuth(world.tokens, world.adb), **options})
    return app


async def whoami(request: Request) -> JSONResponse:
    tenant = bound_or_none()
    identity = request.state.identity
    actor = current_actor()
    return JSONResponse(
        {
            "tenant": tenant.slug if tenant else None,
            "state": request.state.tenant.slug if request.state.tenant else None,
            "user": identity.user if identity else None,
            "role": identity.role if identity else None,
            "actor": actor.actor,
            "request_id": actor.request_id,
        }
    )


UNBOUND = {"tenant": None, "state": None, "user": None, "role": None, "actor": "anonymous", "request_id": None}


# -- binding ---------------------------------------------------------------------------------------------------------------------------


async def test_a_request_runs_for_the_tenant_of_its_token(world: World) -> None:
    app = catch_all(world, whoami)

    ann = await request(app, "/patients", world.as_ann)
    bob = await request(app, "/patients", {**world.as_bob, "x-request-id": "req-7"})

    user = str(world.ann.id)
    assert ann.json == {**UNBOUND, "tenant": "acme", "state": "acme", "user": user, "role": "admin", "actor": user}
    assert (bob.json["tenant"], bob.json["role"], bob.json["request_id"]) == ("globex", "user", "req-7")
    assert bound_or_none() is None


async def test_a_session_reads_the_tenants_own_database(world: World) -> None:
    async def read(_: Request) -> PlainTextResponse:
        async with world.adb.session() as session:
            return PlainTextResponse(await session.scalar(select(Patient.name)))

    app = catch_all(world, read)

    assert (await request(app, "/", world.as_ann)).body == b"acme"
    assert (await request(app, "/", world.as_bob)).body == b"globex"


async def test_a_request_without_a_session_takes_no_connection_once_its_tenant_is_known(world: World) -> None:
    taken: list[object] = []

    def note(connection: object, *_: object) -> None:
        taken.append(connection)

    app = catch_all(world, whoami)
    await request(app, "/", world.as_ann)
    event.listen(Pool, "checkout", note)
    try:
        assert (await request(app, "/", world.as_ann)).json["tenant"] == "acme"
        assert taken == []
        world.patients("acme")
        assert taken != []
    finally:
        event.remove(Pool, "checkout", note)


async def test_the_middleware_takes_the_blocking_database_too(world: World) -> None:
    app = catch_all(world, whoami, db=world.db, authenticate=RegistryAuth(world.tokens, world.db))

    assert (await request(app, "/", world.as_ann)).json["tenant"] == "acme"


async def test_a_request_id_that_is_not_fit_for_a_log_is_dropped(world: World) -> None:
    app = catch_all(world, whoami)

    for given in ("x" * 129, "a b", "a\tb", "ü", ""):
        answer = await request(app, "/", world.as_ann, more=[(b"x-request-id", given.encode())])
        assert answer.json["request_id"] is None


async def test_authenticate_may_be_a_plain_function_with_users_of_its_own(world: World) -> None:
    seen: list[Facts] = []

    def authenticate(facts: Facts) -> Identity | None:
        seen.append(facts)
        return Identity("carol", tenant=facts.cookies["clinic"], role="visitor")

    app = catch_all(world, whoami, authenticate=authenticate)
    answer = await request(app, "/a", {"cookie": "clinic=globex", "host": "Clinic.Example:8000"}, method="POST")

    assert (answer.json["tenant"], answer.json["user"], answer.json["role"]) == ("globex", "carol", "visitor")
    assert (seen[0].scheme, seen[0].host, seen[0].path, seen[0].method) == ("http", "clinic.example", "/a", "POST")


# -- refusals --------------------------------------------------------------------------------------------------------------------------


async def handler_must_not_run(_: Request) -> None:
    raise AssertionError("the handler ran")


async def test_a_request_without_a_good_token_is_401_and_reaches_nothing(world: World) -> None:
    app = catch_all(world, handler_must_not_run)
    good = world.as_ann["authorization"].removeprefix("Bearer ")
    long = "Bearer " + "a" * 9000

    for header in ("", "Bearer", "Bearer ", "Bearer x", "Bearer a.b.c", "Basic YTpi", "bearer  a b", "Bearer ü", long, good):
        answer = await request(app, "/patients", {"authorization": header} if header else None)
        assert answer.status == 401 and answer.headers["www-authenticate"].startswith("Bearer")
        assert answer.headers["content-type"] == "application/problem+json" and answer.json["status"] == 401


async def test_two_authorization_headers_are_no_credentials(world: World) -> None:
    app = catch_all(world, handler_must_not_run)
    (name, value) = next(iter(world.as_ann.items()))

    answer = await request(app, "/", world.as_bob, more=[(name.encode(), value.encode())])

    assert answer.status == 401


async def test_an_unknown_a_foreign_and_a_deleted_tenant_give_the_same_bytes(world: World) -> None:
    app = catch_all(world, handler_must_not_run)
    unknown = {"authorization": "Bearer " + world.tokens.issue(world.ann.id, uuid4())}

    answers = [await request(app, "/", unknown), await request(app, "/", world.bearer(world.ann, world.globex))]

    world.db.delete(world.acme)  # its members are still listed
    answers.append(await request(app, "/", world.as_ann))

    assert [answer.status for answer in answers] == [403, 403, 403]
    assert len({(answer.body, tuple(answer.headers.items())) for answer in answers}) == 1


async def test_a_suspended_tenant_is_refused_with_a_good_token(world: World) -> None:
    world.db.suspend(world.acme)
    app = catch_all(world, handler_must_not_run)

    answer = await request(app, "/", world.as_ann)

    assert (answer.status, answer.json["code"]) == (403, "tenant-suspended")
    assert (await request(catch_all(world, whoami), "/", world.as_bob)).status == 200


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (TenantNotReady("acme", "provisioning"), 503, "5"),
        (RegistryUnavailable("host db1 does not answer"), 503, "5"),
        (RuntimeError("a bug"), None, None),
    ],
)
async def test_a_record_that_cannot_be_looked_up_is_no_missing_tenant(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int | None, retry: str | None
) -> None:
    async def resolve(_: object) -> None:
        raise error

    monkeypatch.setattr(world.db._lookups, "aservable", resolve)
    app = catch_all(world, handler_must_not_run)

    if status is None:
        with pytest.raises(RuntimeError) as caught:
            await request(app, "/", world.as_ann)
        assert caught.value is error
    else:
        answer = await request(app, "/", world.as_ann)
        assert (answer.status, answer.headers["retry-after"]) == (status, retry) and b"db1" not in answer.body


async def test_a_tenants_name_from_a_foreign_authenticate_is_checked_like_any_other(world: World) -> None:
    def authenticate(facts: Facts) -> Identity:
        return Identity("carol", tenant=facts.headers["x-tenant-id"])

    app = catch_all(world, handler_must_not_run, authenticate=authenticate)
    for name in ("ACME", "acme'--", "", "x" * 300, "no-such-clinic", str(uuid4())):
        answer = await request(app, "/", {"x-tenant-id": name})
        assert (answer.status, answer.json["code"]) == (403, "no-access")


# -- not required, exempt --------------------------------------------------------------------------------------------------------------


async def test_where_credentials_are_not_required_a_request_without_runs_unbound(world: World) -> None:
    app = catch_all(world, whoami, required=False)

    assert (await request(app, "/")).json == UNBOUND
    assert (await request(app, "/", world.as_ann)).json["tenant"] == "acme"
    assert (await request(app, "/", {"authorization": "Bearer bad"})).status == 401


async def test_an_identity_without_a_tenant_runs_unbound(world: World) -> None:
    answer = await request(catch_all(world, whoami), "/", world.bearer(world.ann))

    assert answer.json == {**UNBOUND, "user": str(world.ann.id), "actor": str(world.ann.id)}


async def test_an_exempt_route_runs_unbound_whatever_the_request_carries(world: World) -> None:
    app = catch_all(world, whoami, exempt=["/auth/*", "/healthz"])

    for path in ("/auth/login", "/healthz"):
        assert (await request(app, path)).json == UNBOUND
        assert (await request(app, path, world.as_ann)).json == UNBOUND


async def test_a_tenant_that_the_caller_has_bound_does_not_reach_a_request(world: World) -> None:
    app = catch_all(world, whoami, exempt=["/healthz"])

    with world.db.tenant_context("globex"):
        assert (await request(app, "/healthz")).json == UNBOUND
        assert (await request(app, "/", world.as_ann)).json["tenant"] == "acme"
        assert current_tenant().slug == "globex"


@pytest.mark.parametrize("blocking", [True, False])
async def test_a_session_on_an_exempt_route_is_refused_never_a_default_database(
    world: World, blocking: bool, caplog: pytest.LogCaptureFixture
) -> None:
    errors: list[TenantDBError] = []

    async def handler(_: Request) -> None:
        try:
            if blocking:
                with world.db.session() as session:
                    session.execute(text("SELECT 1"))
            else:
                async with world.adb.session() as asession:
                    await asession.execute(text("SELECT 1"))
        except TenantDBError as error:
            errors.append(error)
            raise

    answer = await request(catch_all(world, handler, exempt=["/healthz"]), "/healthz", world.as_ann)

    assert isinstance(errors[0], NoTenantBound) and (answer.status, answer.json["code"]) == (500, "no-tenant-bound")
    assert caplog.records[-1].levelno == logging.ERROR and caplog.records[-1].exc_info


PATHS = [
    ("/auth/../patients", None, 400),
    ("/auth/../patients", b"/auth/%2e%2e/patients", 400),
    ("/auth/../patients", b"/auth/..%2fpatients", 400),
    ("/auth/login/../../patients", b"/auth/login%2f..%2f..%2fpatients", 400),
    ("//auth/login", None, 400),
    ("/auth//login", None, 400),
    ("/authors", None, 401),
    ("/auth-admin", None, 401),
    ("/authx", None, 401),
    ("/auth", None, 401),
    ("/AUTH/login", None, 401),
    ("/healthz/", None, 401),
    ("/auth;x=1/login", None, 401),
    ("/auth/login;x=1", None, 401),
    ("/auth/login\0", b"/auth/login%00", 400),
    ("/auth\\..\\patients", None, 400),
    ("http://evil/auth/login", None, 400),
]


async def test_no_spelling_of_a_path_gets_past_the_exempt_list(world: World) -> None:
    app = catch_all(world, handler_must_not_run, exempt=["/auth/*", "/healthz"])

    for path, raw, status in PATHS:
        assert ((await request(app, path, raw_path=raw)).status, path) == (status, path)


async def test_with_the_path_check_off_a_dot_segment_gets_past_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "check_path", lambda path, raw_path: None)
    app = catch_all(world, whoami, exempt=["/auth/*"])

    assert (await request(app, "/auth/../patients")).status == 200


async def test_a_path_in_another_spelling_that_means_the_same_is_exempt(world: World) -> None:
    app = catch_all(world, whoami, exempt=["/auth/*"])

    assert (await request(app, "/auth/login", raw_path=b"/%61uth/login")).json == UNBOUND


async def test_routes_are_exempt_as_the_router_sees_them_under_a_root_path_and_a_mount(world: World) -> None:
    inner = catch_all(world, whoami, exempt=["/auth/*"])
    mounted = Starlette(routes=[Mount("/api", app=inner)])

    for app, root in ((inner, "/api"), (mounted, "")):
        assert (await request(app, "/api/auth/login", root_path=root)).status == 200
        assert (await request(app, "/api/patients", root_path=root)).status == 401
        assert (await request(app, "/api/api/auth/login", root_path=root)).status == 401
        assert (await request(app, "/api/patients", world.as_ann, root_path=root)).json["tenant"] == "acme"
    assert (await request(inner, "/apiauth/login", root_path="/api")).status == 401


def test_the_facts_hold_the_path_below_the_root_path_as_the_router_cuts_it() -> None:
    cut = {"/api/x": "/x", "/api": "", "/api/": "/", "/apix": "/apix", "/x": "/x"}

    for path, seen in cut.items():
        scope = http_scope(path, root_path="/api")
        assert facts_of(scope).path == seen == get_route_path(scope)


async def test_a_preflight_passes_only_where_it_is_listed_and_is_never_bound(world: World) -> None:
    assert (await request(catch_all(world, handler_must_not_run), "/patients", method="OPTIONS")).status == 401
    listed = catch_all(world, whoami, exempt=["OPTIONS /*"])
    assert (await request(listed, "/patients", world.as_ann, method="OPTIONS")).json == UNBOUND
    assert (await request(listed, "/patients")).status == 401


# -- errors ----------------------------------------------------------------------------------------------------------------------------


async def test_an_error_of_ours_from_the_application_becomes_a_problem_of_its_status(world: World) -> None:
    async def handler(_: Request) -> None:
        raise ServerUnavailable("db1", "connection refused at 10.0.0.7")

    answer = await request(catch_all(world, handler), "/", world.as_ann)

    assert (answer.status, answer.headers["retry-after"]) == (503, "5") and b"10.0.0.7" not in answer.body and b"db1" not in answer.body


async def test_an_unknown_tenant_is_a_404_only_where_nobody_had_to_say_who_he_is(world: World) -> None:
    async def handler(_: Request) -> None:
        raise TenantNotFound("initech")

    app = catch_all(world, handler, exempt=["/public"])

    assert (await request(app, "/public")).status == 404
    assert (await request(app, "/private", world.as_ann)).status == 403


async def test_an_exception_of_the_application_passes_unchanged(world: World) -> None:
    mine = KeyError("mine")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise mine

    with pytest.raises(KeyError) as caught:
        await request(protect(world, app), "/", world.as_ann)

    assert caught.value is mine and bound_or_none() is None


async def test_after_the_response_has_begun_an_error_is_not_hidden_in_it(world: World) -> None:
    error = ServerUnavailable("db1", "gone")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise error

    with pytest.raises(ServerUnavailable) as caught:
        await request(protect(world, app), "/", world.as_ann)

    assert caught.value is error


async def test_what_a_client_sent_is_not_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    token = world.as_ann["authorization"][:-3]

    assert (await request(catch_all(world, handler_must_not_run), "/patients", {"authorization": token})).status == 401

    assert token[10:60] not in caplog.text and "/patients" in caplog.text


# -- the life of a binding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocking", [True, False])
async def test_a_streamed_body_reads_from_the_right_tenant_until_its_end(world: World, blocking: bool) -> None:
    async def chunks() -> AsyncIterator[str]:
        for _ in range(3):
            async with world.adb.session() as session:
                yield str(await session.scalar(select(Patient.name)))

    def blocking_chunks() -> Iterator[str]:
        for _ in range(3):
            with world.db.session() as session:
                yield str(session.scalar(select(Patient.name)))

    async def handler(_: Request) -> StreamingResponse:
        return StreamingResponse(blocking_chunks() if blocking else chunks())

    answer = await request(catch_all(world, handler), "/", world.as_bob)

    assert answer.body == b"globex" * 3


async def test_a_background_task_still_runs_for_the_tenant(world: World) -> None:
    seen: list[str] = []

    async def task() -> None:
        async with world.adb.session() as session:
            seen.append(str(await session.scalar(select(Patient.name))))

    async def handler(_: Request) -> PlainTextResponse:
        return PlainTextResponse("ok", background=BackgroundTask(task))

    await request(catch_all(world, handler), "/", world.as_ann)

    assert seen == ["acme"]


async def test_a_task_that_outlives_its_request_is_refused(world: World) -> None:
    over = asyncio.Event()
    tasks: list[asyncio.Task[str]] = []

    async def late() -> str:
        during = current_tenant().slug
        await over.wait()
        with pytest.raises(TenantContextClosed):
            world.db.session()
        return during

    async def handler(_: Request) -> PlainTextResponse:
        tasks.append(asyncio.create_task(late()))
        await asyncio.sleep(0)
        return PlainTextResponse("ok")

    await request(catch_all(world, handler), "/", world.as_ann)
    over.set()

    assert await tasks[0] == "acme"


@pytest.mark.parametrize("how", ["disconnect", "cancel"])
async def test_a_client_that_leaves_in_the_middle_of_a_body_releases_the_tenant(world: World, how: str) -> None:
    begun, closed = asyncio.Event(), asyncio.Event()
    inherited: list[contextvars.Context] = []

    async def chunks() -> AsyncIterator[bytes]:
        try:
            async with world.adb.session() as session:
                while True:
                    yield str(await session.scalar(select(Patient.name))).encode()
        finally:
            closed.set()

    async def handler(_: Request) -> StreamingResponse:
        inherited.append(contextvars.copy_context())
        return StreamingResponse(chunks())

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.body":
            begun.set()
            if how == "disconnect":
                raise OSError("the client is gone")
            await asyncio.Event().wait()

    task = asyncio.create_task(catch_all(world, handler)(http_scope("/", world.as_ann), receive, send))
    await begun.wait()
    if how == "cancel":
        task.cancel()
    await asyncio.wait({task})
    assert task.cancelled() if how == "cancel" else task.exception() is not None

    del task  # Starlette leaves closing the generator to the garbage collector, and the exception's frames hold it
    gc.collect()
    await asyncio.wait_for(closed.wait(), 5)
    with pytest.raises(TenantContextClosed):
        inherited[0].run(current_tenant)


async def test_concurrent_requests_of_several_tenants_never_mix(world: World) -> None:
    """C5."""
    tenants = [world.acme, world.globex, *(add_tenant(world.db, f"clinic-{number}") for number in range(18))]
    for tenant in tenants:
        world.db.memberships.add(world.ann, tenant, role="admin")
    together, inside = asyncio.Event(), 0

    async def handler(request: Request) -> JSONResponse:
        nonlocal inside
        seen = [current_tenant().slug, request.state.tenant.slug]
        inside += 1
        if inside == 200:
            together.set()
        await together.wait()  # all are inside their handlers now
        for _ in range(3):
            async with world.adb.session() as session:
                seen.append(str(await session.scalar(select(Patient.name))))
            seen.append(await asyncio.to_thread(lambda: current_tenant().slug))
        return JSONResponse(seen)

    app = catch_all(world, handler)
    wanted = [tenants[number % len(tenants)] for number in range(200)]
    answers = await asyncio.gather(*(request(app, "/", world.bearer(world.ann, tenant)) for tenant in wanted))

    for tenant, answer in zip(wanted, answers, strict=True):
        assert set(answer.json) == {tenant.slug}


async def test_a_state_that_a_server_shares_between_requests_is_not_written_to(world: World) -> None:
    shared: dict[str, Any] = {"from_lifespan": 1}
    app = catch_all(world, whoami)

    answer = await send_scope(app, {**http_scope("/", world.as_ann), "state": shared})

    assert answer.json["state"] == "acme" and shared == {"from_lifespan": 1}


# -- websockets, lifespan --------------------------------------------------------------------------------------------------------------


def websockets(world: World, **options: Any) -> TenantMiddleware:
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        async for question in websocket.iter_text():  # until it is closed
            async with world.adb.session() as session:
                await websocket.send_text(f"{question} {current_tenant().slug} {await session.scalar(select(Patient.name))}")

    return protect(world, Starlette(routes=[WebSocketRoute("/{path:path}", endpoint)]), **options)


@pytest.mark.parametrize("who", ["nobody", "forger", "foreigner"])
async def test_a_websocket_is_refused_before_it_is_accepted(world: World, who: str) -> None:
    headers = {"nobody": {}, "forger": {"authorization": "Bearer a.b.c"}, "foreigner": world.bearer(world.ann, world.globex)}[who]
    peer = WebSocketPeer(websockets(world), "/ws", headers)

    answer = await peer.ask("websocket.connect")

    assert answer is not None and (answer["type"], answer["code"]) == ("websocket.close", 1008)
    await peer.served


async def test_a_websocket_is_told_when_it_may_try_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(_: object) -> None:
        raise TenantNotReady("acme", "maintenance")

    monkeypatch.setattr(world.db._lookups, "aservable", resolve)
    answer = await WebSocketPeer(websockets(world), "/ws", world.as_ann).ask("websocket.connect")

    assert answer is not None and (answer["type"], answer["code"]) == ("websocket.close", 1013)


async def test_a_websocket_runs_for_its_tenant_until_the_tenant_is_suspended(world: World) -> None:
    peer = await accepted(world, websockets(world))

    answer = await peer.ask("websocket.receive", text="who?")
    assert answer is not None and answer["text"] == "who? globex globex"
    world.db.suspend(world.globex)

    answer = await peer.ask("websocket.receive", text="still?")
    assert answer is not None and (answer["type"], answer["code"], answer["reason"]) == ("websocket.close", 1008, "tenant-suspended")
    await peer.served


async def accepted(world: World, app: App, headers: dict[str, str] | None = None) -> WebSocketPeer:
    peer = WebSocketPeer(app, "/ws", headers or world.as_bob)
    assert await peer.ask("websocket.connect") == {"type": "websocket.accept", "subprotocol": None, "headers": []}
    return peer


async def test_an_idle_websocket_is_closed_at_once_when_its_user_is_no_member_any_more(world: World) -> None:
    peer = await accepted(world, websockets(world))

    world.db.memberships.remove(world.bob, world.globex)

    answer = await peer.next()
    assert answer is not None and (answer["type"], answer["code"], answer["reason"]) == ("websocket.close", 1008, "no-access")
    await peer.served


@pytest.mark.parametrize("looked_at", [True, False])
async def test_a_websocket_is_closed_when_its_user_has_another_role(world: World, monkeypatch: pytest.MonkeyPatch, looked_at: bool) -> None:
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        async for _ in websocket.iter_text():
            await websocket.send_text(websocket.state.identity.role)

    peer = await accepted(world, protect(world, Starlette(routes=[WebSocketRoute("/ws", endpoint)])), world.as_ann)
    if not looked_at:
        monkeypatch.setattr(asgi._Socket, "_still_welcome", welcome)

    world.db.memberships.add(world.ann, world.acme, role="user")

    answer = await peer.ask("websocket.receive", text="as whom?")
    assert answer is not None and answer.get("code") == (1008 if looked_at else None)
    assert answer.get("text") == (None if looked_at else "admin")


async def test_a_websocket_that_nobody_tells_of_a_change_is_looked_at_on_a_schedule(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(world.db._registry.changes), "subscribe", lambda self, callback: lambda: None)
    monkeypatch.setattr(world.db, "settings", world.db.settings.model_copy(update={"cache_ttl": 0.05}))
    peer = await accepted(world, websockets(world))

    world.db.suspend(world.globex)

    answer = await peer.next()
    assert answer is not None and (answer["type"], answer["reason"]) == ("websocket.close", "tenant-suspended")


async def test_a_websocket_that_is_looked_at_neither_way_stays_open(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi._Socket, "_still_welcome", welcome)
    peer = await accepted(world, websockets(world))

    world.db.suspend(world.globex)

    assert await peer.ask("websocket.receive", text="still?") is None  # the application was given it, and its session was refused
    with pytest.raises(TenantSuspended):
        await peer.served


async def welcome(_: Any) -> bool:
    return True


async def test_what_an_application_pushes_is_looked_at_too(world: World) -> None:
    pushed, failed = asyncio.Event(), []

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await pushed.wait()
        try:
            await websocket.send_text("of a tenant that is suspended")
        except Exception as error:
            failed.append(error)

    peer = await accepted(world, protect(world, Starlette(routes=[WebSocketRoute("/ws", endpoint)])))
    world.db.suspend(world.globex)
    pushed.set()

    answer = await peer.next()
    assert answer is not None and (answer["type"], answer["code"]) == ("websocket.close", 1008)
    await peer.served
    assert failed and not [message for message in peer.sent() if message["type"] == "websocket.send"]


@pytest.mark.parametrize("cancelled", [True, False])
async def test_nothing_is_pushed_while_a_websocket_is_looked_at_nor_when_looking_was_cancelled(
    world: World, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    looks, asking, go, failed = [], asyncio.Event(), asyncio.Event(), []
    again = Visit.again

    async def slow(visit: Visit, *rest: Any) -> None:
        looks.append(visit)
        asking.set()
        await go.wait()
        await again(visit, *rest)

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        reading = asyncio.ensure_future(websocket.receive())
        await asking.wait()
        if cancelled:
            reading.cancel()
            await asyncio.wait([reading])
        pushing = asyncio.ensure_future(websocket.send_text("of a tenant that is suspended"))
        asyncio.get_running_loop().call_soon(go.set)
        try:
            await pushing
        except WebSocketDisconnect as error:
            failed.append(error)
        await asyncio.wait([reading])

    peer = await accepted(world, protect(world, Starlette(routes=[WebSocketRoute("/ws", endpoint)])))
    monkeypatch.setattr(Visit, "again", slow)
    world.db.suspend(world.globex)
    await peer.served

    assert [message["type"] for message in peer.sent()] == ["websocket.close"]
    assert failed and len(looks) == (2 if cancelled else 1)


async def test_a_client_that_has_left_is_not_told_to_go(world: World) -> None:
    heard: list[Any] = []

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        heard.append(await websocket.receive())

    peer = await accepted(world, protect(world, Starlette(routes=[WebSocketRoute("/ws", endpoint)])))
    while not peer.listened_to:
        await asyncio.sleep(0)
    peer.say("websocket.disconnect", code=1001)
    world.db.suspend(world.globex)
    await peer.served

    assert heard == [{"type": "websocket.disconnect", "code": 1001}] and peer.sent() == []


async def test_a_websocket_ends_with_its_token(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.db, "settings", world.db.settings.model_copy(update={"cache_ttl": 0.05}))
    peer = await accepted(world, websockets(world))

    monkeypatch.setattr(world.tokens, "_clock", lambda: time.time() + 3600)

    answer = await peer.next()
    assert answer is not None and (answer["type"], answer["reason"]) == ("websocket.close", "invalid-token")


async def test_a_websocket_whose_client_leaves_lets_the_tenant_go(world: World) -> None:
    inherited: list[contextvars.Context] = []

    async def endpoint(websocket: WebSocket) -> None:
        inherited.append(contextvars.copy_context())
        await websocket.accept()
        await websocket.receive()

    peer = WebSocketPeer(protect(world, Starlette(routes=[WebSocketRoute("/ws", endpoint)])), "/ws", world.as_ann)
    await peer.ask("websocket.connect")
    await peer.ask("websocket.disconnect", code=1001)
    await peer.served

    with pytest.raises(TenantContextClosed):
        inherited[0].run(current_tenant)


@pytest.mark.parametrize("fails", [True, False])
async def test_an_application_whose_credentials_cannot_be_prepared_does_not_start(world: World, fails: bool) -> None:
    began: list[str] = []

    class Auth(RegistryAuth):
        def start(self) -> None:
            if fails:
                raise ConfigError("no key set")

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        began.append("application")
        yield

    app = Starlette(lifespan=lifespan)
    app.add_middleware(TenantMiddleware, db=world.adb, authenticate=Auth(world.tokens, world.adb))
    config = uvicorn.Config(app, log_config=None)
    config.load()
    started = config.lifespan_class(config)
    await started.startup()
    await started.shutdown()

    assert (started.should_exit, began) == ((True, []) if fails else (False, ["application"]))


async def test_the_lifespan_passes_untouched(world: World) -> None:
    seen: list[Any] = []
    scope = {"type": "lifespan", "state": {"a": 1}}

    async def app(*given: Any) -> None:
        seen.extend(given)

    async def receive() -> dict[str, Any]:
        raise AssertionError

    async def send(_: Any) -> None:
        raise AssertionError

    await protect(world, app)(scope, receive, send)

    assert seen == [scope, receive, send] and scope == {"type": "lifespan", "state": {"a": 1}}


@pytest.mark.parametrize(("inside", "warned"), [(True, True), (False, False)])
async def test_an_order_of_middleware_that_loses_cors_headers_is_warned_of(
    world: World, caplog: pytest.LogCaptureFixture, inside: bool, warned: bool
) -> None:
    app = Starlette()
    steps = [(CORSMiddleware, {}), (TenantMiddleware, {"db": world.adb, "authenticate": RegistryAuth(world.tokens, world.adb)})]
    for middleware, options in steps if inside else reversed(steps):
        app.add_middleware(middleware, **options)  # what is added later stands outside
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(_: Any) -> None:
        pass

    await app({"type": "lifespan", "state": {}}, receive, send)

    assert ("Add CORSMiddleware after it" in caplog.text) is warned


# -- RegistryAuth ----------------------------------------------------------------------------------------------------------------------


async def test_only_the_first_request_of_its_kind_asks_the_registry(world: World) -> None:
    app = catch_all(world, whoami)

    with queries(world.db) as first:
        assert (await request(app, "/", world.as_ann)).status == 200
    with queries(world.db) as later:
        for _ in range(5):
            assert (await request(app, "/", world.as_ann)).status == 200

    assert first and not later


async def test_the_role_is_the_registrys_whatever_the_token_says(world: World) -> None:
    app = catch_all(world, whoami)

    answer = await request(app, "/", world.bearer(world.bob, world.globex, role="owner"))

    assert answer.json["role"] == "user"


async def test_the_token_of_a_deleted_user_is_worth_nothing(world: World) -> None:
    app = catch_all(world, handler_must_not_run)
    world.db.users.delete(world.ann)

    for headers in (world.as_ann, world.bearer(world.ann)):
        assert (await request(app, "/", headers)).json["code"] == "invalid-token"


async def test_a_user_that_the_registry_does_not_know_is_refused(world: World) -> None:
    app = catch_all(world, handler_must_not_run)

    for user in ("carol", "ann@acme.example", str(uuid4()), str(world.ann.id).upper(), "'; DROP TABLE tenantdb_users; --"):
        answer = await request(app, "/", {"authorization": "Bearer " + world.tokens.issue(user, world.acme.id)})
        assert (answer.status, answer.json["code"]) == (401, "invalid-token")


async def test_an_outage_of_the_registry_is_a_503_and_is_not_remembered(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(user: Any, tenant: Any) -> None:
        raise RegistryUnavailable("no answer")

    app = catch_all(world, whoami)
    with monkeypatch.context() as outage:
        outage.setattr(world.db._registry.standings, "get", down)
        assert (await request(app, "/", world.as_ann)).status == 503

    assert (await request(app, "/", world.as_ann)).status == 200


@pytest.mark.parametrize(("told", "status"), [(None, 503), (True, 401), (False, 200)])
async def test_a_list_of_revoked_tokens_that_comes_too_late_says_nothing_of_the_token(
    world: World, monkeypatch: pytest.MonkeyPatch, told: bool | None, status: int
) -> None:
    app = catch_all(world, whoami)
    monkeypatch.setattr(world.db._registry.revocations, "peek", lambda jti: told)  # also once it was read

    assert (await request(app, "/", world.as_ann)).status == status


# -- over a socket ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def served(app: App) -> Iterator[int]:
    """``app`` under uvicorn on a free port of loopback."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def raw_request(port: int, target: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    lines = [f"GET {target} HTTP/1.1", "Host: clinic.example", "Connection: close", *(f"{k}: {v}" for k, v in (headers or {}).items())]
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_no_request_line_gets_past_the_exempt_list_of_a_real_server(world: World) -> None:
    app = catch_all(world, whoami, exempt=["/auth/*"])

    with served(app) as port:
        assert raw_request(port, "/auth/login")[0] == 200
        for target in ("/auth/../patients", "/auth/%2e%2e/patients", "/auth/..%2fpatients", "/auth/login%2f..%2f..%2fpatients"):
            assert raw_request(port, target)[0] == 400
        for target in ("//auth/login", "/auth//login", "/auth/login%00", "/auth\\..\\patients", "http://evil/auth/login"):
            assert raw_request(port, target)[0] == 400
        for target in ("/auth;x=1/login", "/AUTH/login", "/auth"):
            assert raw_request(port, target)[0] == 401
        assert raw_request(port, "/authors")[0] == 401
        status, body = raw_request(port, "/patients", world.as_ann)
        assert status == 200 and json.loads(body)["tenant"] == "acme"
