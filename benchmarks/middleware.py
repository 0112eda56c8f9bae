"""What a request pays for its tenant: the middleware alone, a whole request under uvicorn, and a task.

The unit of the middleware is the check of the same tokens by PyJWT alone, which every application with tokens pays. Everything is warm but
the tokens: each round has new ones, and neither of our sides shows them to the other, so that remembering tokens would gain nothing. The
process watches the registry, as it does in operation. What the bare application costs is taken off.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from sqlalchemy import event, select

from benchmarks import queueing
from benchmarks.measure import Result, ratio
from benchmarks.peers import fastapi_tenancy, single_tenant
from benchmarks.serving import AUDIENCE, EXEMPT, Client, Served, request, server, tokens
from benchmarks.world import Marker, World, clone_tenants, embedded_world, login_of, provision_with_marker
from tenantdb import AsyncTenantDB, Tenant, TenantDB, User, asgi, wsgi
from tenantdb.asgi import ASGIApp, Message, RegistryAuth, Scope
from tenantdb.registry.secrets import generate_key
from tenantdb.wsgi import Environ, StartResponse, WSGIApp
from tests.adapters.redis_server import redis_server

TENANTS = 8
USERS = 8  # each a member of every tenant
BLOCK = 50  # requests of one side before the next has its turn: few, because a busy machine is fast and slow by turns of its own
TASKS = 100  # likewise
SLUG_CLAIM = "tenant"  # fastapi-tenancy finds tenants by their names
_PATH = "/markers/1"
_NAME = select(Marker.name).where(Marker.id == 1)


def run(*, quick: bool) -> Result:
    result = Result()
    result.environment |= {name: metadata.version(name) for name in ("pyjwt", "fastapi", "uvicorn", "celery", "fastapi-tenancy")}
    with embedded_world() as world, world.open() as db:
        who = _Who.sign_up(world, db)
        _middleware(result, db, who, rounds=300 if quick else 2000)
        result.add(
            "registry_queries_per_request",
            _registry_queries(result, db, who, seconds=2.5 * db.settings.cache_ttl),
            bar="0",
            note="issued by requests, ASGI and WSGI in turn, with a query each, for 2.5 times cache_ttl; the watching thread apart",
        )
        result.add(
            "e2e_ratio",
            _e2e_ratio(world, db, who, rounds=40 if quick else 200, repeats=BLOCK),
            bar="<= 1.12",
            note="request with a token and one query under uvicorn / the same in an application with one database, which checks it too",
        )
        result.add(
            "celery_overhead_ratio",
            _celery_ratio(world, db, who, rounds=40 if quick else 200),
            bar="<= 1.15",
            note="tasks for tenants that do nothing, published and awaited / the same without tenants, one worker and Redis for both",
        )
    return result


@dataclass(frozen=True)
class _Who:
    """Users, each of whom is a member of every tenant, and the key of their tokens."""

    key: str
    pairs: Sequence[tuple[User, Tenant]]

    @classmethod
    def sign_up(cls, world: World, db: TenantDB) -> _Who:
        slugs = [f"tenant-{number}" for number in range(TENANTS)]
        clone_tenants(world, db, provision_with_marker(db, "model"), slugs)
        tenants = [db.tenants.get(slug) for slug in slugs]
        users = [db.users.create(f"user-{number}@clinic.example", "correct horse battery") for number in range(USERS)]
        for user in users:
            for tenant in tenants:
                db.memberships.add(user, tenant, role="user")
        return cls(generate_key(), [(user, tenant) for user in users for tenant in tenants])

    def tokens(self, count: int) -> Sequence[str]:
        """New ones, for the pairs in turn: `slugs` are their tenants'."""
        issue = tokens(self.key).issue
        pairs = itertools.islice(itertools.cycle(self.pairs), count)
        return [issue(user.id, tenant.id, role="user", claims={SLUG_CLAIM: tenant.slug}) for user, tenant in pairs]

    def slugs(self, count: int) -> Sequence[str]:
        return [tenant.slug for _, tenant in itertools.islice(itertools.cycle(self.pairs), count)]


# -- the middleware alone ----------------------------------------------------------------------------------------------------------------


def _middleware(result: Result, db: TenantDB, who: _Who, *, rounds: int) -> None:
    with asyncio.Runner() as runner:
        peer = runner.run(
            fastapi_tenancy.middleware(
                _asgi_app, set(who.slugs(len(who.pairs))), key=who.key, claim=SLUG_CLAIM, audience=AUDIENCE, exempt=["/auth", "/healthz"]
            )
        )
        ours = asgi.TenantMiddleware(_asgi_app, db=db, authenticate=RegistryAuth(tokens(who.key), db), exempt=EXEMPT)
        ours_too = wsgi.TenantMiddleware(_wsgi_app, db=db, authenticate=RegistryAuth(tokens(who.key), db), exempt=EXEMPT)
        sides: dict[str, Callable[[Sequence[str]], float]] = {
            "check": lambda block: _check(block, who.key),
            "asgi_bare": lambda block: runner.run(_asgi(_asgi_app, block)),
            "asgi": lambda block: runner.run(_asgi(ours, block)),
            "fastapi_tenancy": lambda block: runner.run(_asgi(peer, block)),
            "wsgi_bare": lambda block: _wsgi(_wsgi_app, block),
            "wsgi": lambda block: _wsgi(ours_too, block),
        }
        runner.run(_asgi(ours, who.tokens(len(who.pairs))))
        times = []
        for number in range(rounds):
            block = who.tokens(BLOCK)
            times.append({side: sides[side](block) for side in _turned(list(sides), number)})

    def over(ours: str, bare: str, theirs: str, their_bare: str | None = None) -> float:
        return statistics.median((each[ours] - each[bare]) / (each[theirs] - (each[their_bare] if their_bare else 0)) for each in times)

    note = "middleware with RegistryAuth minus the bare application / jwt.decode of the same tokens, all distinct"
    result.add("asgi_overhead_vs_check", over("asgi", "asgi_bare", "check"), bar="<= 2.5", note=note)
    result.add("wsgi_overhead_vs_check", over("wsgi", "wsgi_bare", "check"), bar="<= 2.5", note="the same for WSGI")
    result.add(
        "asgi_vs_fastapi_tenancy",
        over("asgi", "asgi_bare", "fastapi_tenancy", "asgi_bare"),
        bar="<= 1.8",
        note="/ the middleware of fastapi-tenancy, tenants in its cache, minus the bare application",
    )
    result.environment["microseconds"] = {side: round(statistics.median(each[side] for each in times) / BLOCK * 1e6, 1) for side in sides}


def _turned(sides: list[str], number: int) -> list[str]:
    """Every side comes first, last and after every other now and then, so that none profits from its place."""
    turned = sides[number % len(sides) :] + sides[: number % len(sides)]
    return turned if number // len(sides) % 2 == 0 else turned[::-1]


def _check(block: Sequence[str], key: str) -> float:
    began = time.perf_counter()
    for token in block:
        single_tenant.check(token, key)
    return time.perf_counter() - began


async def _asgi(app: ASGIApp, block: Sequence[str]) -> float:
    """Seconds for a request with each of the tokens."""
    scopes = [_scope(token) for token in block]
    served = 0

    async def receive() -> Message:
        raise AssertionError("nobody reads a body here")

    async def send(message: Message) -> None:
        nonlocal served
        if message.get("status") == 200:
            served += 1

    began = time.perf_counter()
    for scope in scopes:
        await app(scope, receive, send)
    took = time.perf_counter() - began
    if served != len(scopes):
        raise AssertionError("a request was refused")
    return took


def _scope(token: str) -> Scope:
    headers = [
        (b"host", b"clinic.example"),
        (b"user-agent", b"benchmarks"),
        (b"accept", b"application/json"),
        (b"authorization", b"Bearer " + token.encode()),
    ]
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": _PATH,
        "raw_path": _PATH.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 40000),
        "server": ("127.0.0.1", 80),
    }


async def _asgi_app(scope: Scope, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


def _wsgi(app: WSGIApp, block: Sequence[str]) -> float:
    environs = [_environ(token) for token in block]
    served = 0

    def start_response(status: str, headers: object, exc_info: object = None) -> Any:
        nonlocal served
        if status == "200 OK":
            served += 1

    began = time.perf_counter()
    for environ in environs:
        body = app(environ, start_response)
        for _ in body:
            pass
        if hasattr(body, "close"):
            body.close()
    took = time.perf_counter() - began
    if served != len(environs):
        raise AssertionError("a request was refused")
    return took


def _environ(token: str) -> Environ:
    return {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": _PATH,
        "RAW_URI": _PATH,
        "QUERY_STRING": "",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "127.0.0.1",
        "HTTP_HOST": "clinic.example",
        "HTTP_USER_AGENT": "benchmarks",
        "HTTP_ACCEPT": "application/json",
        "HTTP_AUTHORIZATION": f"Bearer {token}",
        "wsgi.url_scheme": "http",
    }


def _wsgi_app(environ: Environ, start_response: StartResponse) -> list[bytes]:
    start_response("200 OK", [])
    return [b"ok"]


# -- what the registry is asked ------------------------------------------------------------------------------------------------------------


def _registry_queries(result: Result, db: TenantDB, who: _Who, *, seconds: float) -> float:
    """Per request, after every tenant and user was seen once. Longer than ``cache_ttl``, because what was seen has expired by then.

    What is asked for less often than every ``cache_ttl / 2`` seconds may be looked up again. Where the machine is too slow for these
    requests to come that often, the environment's ``longest_turn`` says so: the seconds until everybody has had a turn.
    """
    adb = AsyncTenantDB(db)
    auth = RegistryAuth(tokens(who.key), db)

    async def asking(scope: Scope, receive: Any, send: Any) -> None:
        async with adb.session() as session:
            _must(await session.scalar(_NAME), scope["state"]["tenant"].slug)
        await _asgi_app(scope, receive, send)

    def asking_too(environ: Environ, start_response: StartResponse) -> list[bytes]:
        with db.session() as session:
            _must(session.scalar(_NAME), environ["tenantdb.tenant"].slug)
        return _wsgi_app(environ, start_response)

    in_turn = who.tokens(len(who.pairs))
    served, turns = 0, [0.0]
    with asyncio.Runner() as runner:

        def requests() -> None:
            nonlocal served
            began = time.monotonic()
            runner.run(_asgi(asgi.TenantMiddleware(asking, db=db, authenticate=auth), in_turn))
            _wsgi(wsgi.TenantMiddleware(asking_too, db=db, authenticate=auth), in_turn)
            served += 2 * len(in_turn)
            turns.append(time.monotonic() - began)

        requests()
        served, until = 0, time.monotonic() + seconds
        with _counted(db) as queries:
            while time.monotonic() < until:
                requests()
                time.sleep(0.05)  # a request now and then is what a cache is for; and the machine is wanted for others
        runner.run(_closed(db))
    result.environment["longest_turn"] = round(max(turns), 2)
    return len(queries) / served


async def _closed(db: TenantDB) -> None:
    db._engines.close_loop()


@contextmanager
def _counted(db: TenantDB) -> Iterator[list[str]]:
    """What is sent to the registry meanwhile, by whatever thread but the one that watches it."""
    queries: list[str] = []

    def count(connection: object, cursor: object, statement: str, *rest: object) -> None:
        if not threading.current_thread().name.startswith("tenantdb-watch"):
            queries.append(statement)

    engine = db._registry._transactions.engine
    event.listen(engine, "before_cursor_execute", count)
    try:
        yield queries
    finally:
        event.remove(engine, "before_cursor_execute", count)


# -- whole requests ------------------------------------------------------------------------------------------------------------------------


def _e2e_ratio(world: World, db: TenantDB, who: _Who, *, rounds: int, repeats: int) -> float:
    """One request at a time on one connection, so what is compared is how long a client waits."""
    home = who.slugs(1)[0]  # the only database of the other side
    login = login_of(db, home)
    served = Served(
        key=who.key,
        arguments=_web(world),
        url=login.url.render_as_string(hide_password=False),
        connect_args=login.connect_args,
        pool_size=db.settings.budget.per_tenant,
    )
    requests = [(request(_PATH, token), slug) for token, slug in zip(who.tokens(repeats), who.slugs(repeats), strict=True)]
    with server("benchmarks.serving", served) as ours, server("benchmarks.peers.single_tenant", served) as theirs:
        return ratio(
            lambda: _get(ours, requests),
            lambda: _get(theirs, [(each, home) for each, _ in requests]),
            rounds=rounds,
        )


def _web(world: World) -> Mapping[str, Any]:
    """What a web process is given: no provisioner."""
    return {name: value for name, value in world.arguments.items() if name != "server"}


def _get(client: Client, requests: Sequence[tuple[bytes, str]]) -> None:
    for each, slug in requests:
        _must(json.loads(client.get(each))["name"], slug)


def _must(found: object, slug: str) -> None:
    if found != slug:
        raise AssertionError(f"{slug} got the row of {found}")


# -- tasks ---------------------------------------------------------------------------------------------------------------------------------


def _celery_ratio(world: World, db: TenantDB, who: _Who, *, rounds: int) -> float:
    def ours() -> None:
        results = []
        for slug in who.slugs(TASKS):
            with db.tenant_context(slug):
                results.append(tasks.tenants.delay())
        for each in results:
            each.get(timeout=60)

    def theirs() -> None:
        for each in [tasks.plain.delay() for _ in range(TASKS)]:
            each.get(timeout=60)

    with redis_server() as broker, queueing.working(broker, _web(world)):
        tasks = queueing.tasks(broker, db)
        return ratio(ours, theirs, rounds=rounds)
