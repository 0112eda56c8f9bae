"""What only WSGI has: a start that can be taken back, bodies that are pulled, write(), file wrappers, threads and greenlets.

The verdicts are in test_verdicts.py.
"""

from __future__ import annotations

import contextvars
import gc
import threading
import wsgiref.util
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from io import BytesIO
from pathlib import Path
from typing import Any

import greenlet
import pytest
from sqlalchemy import event
from sqlalchemy.pool import Pool

from tenantdb.context import _bound, acting, bind, bound_or_none, current_actor, current_tenant
from tenantdb.errors import ConfigError, NoTenantBound, TenantContextClosed, TenantSuspended
from tenantdb.model import Facts, Identity
from tenantdb.wsgi import RegistryAuth, TenantMiddleware
from tests.adapters.faces import NAME, Server, environ_of
from tests.adapters.world import World, add_tenant


def protect(world: World, app: Any, **options: Any) -> TenantMiddleware:
    return TenantMiddleware(app, **{"db": world.db, "authenticate": RegistryAuth(world.tokens, world.db), **options})


def ok(start_response: Any, *more: tuple[str, str]) -> Any:
    return start_response("200 OK", [("content-type", "text/plain"), *more])


def slug() -> bytes:
    bound = bound_or_none()
    return b"-" if bound is None else bound.slug.encode()


class Body:
    """A body that notes what is bound while it is asked for an iterator, for its pieces, and closed."""

    def __init__(self, pieces: Iterable[bytes] = (b"a", b"b")) -> None:
        self._pieces = iter(pieces)
        self.bound: list[tuple[str, bytes]] = []

    def __iter__(self) -> Iterator[bytes]:
        self.bound.append(("iter", slug()))
        return self

    def __next__(self) -> bytes:
        self.bound.append(("next", slug()))
        return next(self._pieces)

    def close(self) -> None:
        self.bound.append(("close", slug()))


def answering(make: Callable[[], Any]) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        ok(start_response)
        return make()

    return app


# -- the body --------------------------------------------------------------------------------------------------------------------------


def test_a_body_is_bound_piece_by_piece_and_while_it_is_closed(world: World) -> None:
    body, between = Body(), []
    app = protect(world, answering(lambda: body))

    made = app(environ_of("/", world.as_ann), Server().start_response)
    for _ in made:
        between.append(slug())
    made.close()

    assert body.bound == [("iter", b"acme"), ("next", b"acme"), ("next", b"acme"), ("next", b"acme"), ("close", b"acme")]
    assert between == [b"-", b"-"]


def test_a_server_may_close_early_and_twice(world: World) -> None:
    inherited: list[contextvars.Context] = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        ok(start_response)
        inherited.append(contextvars.copy_context())
        try:
            with world.db.session() as session:
                while True:
                    yield str(session.scalar(NAME)).encode()
        finally:
            inherited.append(contextvars.copy_context())

    made = protect(world, app)(environ_of("/", world.as_ann), Server().start_response)
    assert next(made) == b"acme"
    assert sum(server.in_use for server in world.db.stats()) == 1
    made.close()
    made.close()

    assert len(inherited) == 2 and sum(server.in_use for server in world.db.stats()) == 0
    with pytest.raises(TenantContextClosed):
        inherited[0].run(current_tenant)


def test_a_body_is_closed_where_its_request_is_refused_after_all(world: World) -> None:
    def pieces() -> Iterator[bytes]:
        raise TenantSuspended("acme")
        yield b""

    class NoIterator(Body):
        def __iter__(self) -> Iterator[bytes]:
            raise TenantSuspended("acme")

    for body in (Body(pieces()), NoIterator()):
        reply = Server().run(protect(world, answering(lambda body=body: body)), environ_of("/", world.as_ann))
        assert (reply.status, reply.code) == (403, "tenant-suspended")
        assert body.bound[-1] == ("close", b"acme")


def test_a_body_that_is_made_already_goes_to_the_server_as_it_is(world: World, tmp_path: Path) -> None:
    """A server sends a file faster than anybody who hands it the pieces, but only its own wrapper's."""
    (tmp_path / "file").write_bytes(b"content")
    bodies: list[Any] = [[b"a", b"b"], (b"a",), wsgiref.util.FileWrapper((tmp_path / "file").open("rb"))]
    for body in bodies:
        app = protect(world, answering(lambda body=body: body))
        made = app({**environ_of("/", world.as_ann), "wsgi.file_wrapper": wsgiref.util.FileWrapper}, Server().start_response)
        assert made is body

    assert b"".join(made) == b"content"
    made.close()


@pytest.mark.parametrize("wrapper", [None, wsgiref.util.FileWrapper, wsgiref.util.guess_scheme])
def test_another_wrapper_than_the_servers_is_a_body_like_others(world: World, wrapper: Any) -> None:
    class OwnWrapper(Body):
        pass

    body = OwnWrapper()
    environ = environ_of("/", world.as_ann)
    if wrapper is not None:
        environ["wsgi.file_wrapper"] = wrapper

    assert Server().run(protect(world, answering(lambda: body)), environ).body == b"ab"
    assert ("next", b"acme") in body.bound


# -- the start of a response -----------------------------------------------------------------------------------------------------------


def test_a_response_that_has_not_begun_is_taken_back_whole(world: World) -> None:
    """A server that replaces a start by another may add to it instead, as gunicorn does: so it is told of one only."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        ok(start_response, ("content-length", "1000"), ("x-secret", "1"))
        raise TenantSuspended("acme")
        yield b""

    server = Server()
    reply = server.run(protect(world, app), environ_of("/", world.as_ann))

    assert len(server.heads) == 1 and reply.code == "tenant-suspended"
    assert "x-secret" not in reply.headers and int(reply.headers["content-length"]) == len(reply.body)


@pytest.mark.parametrize("how", ["piece", "empty piece", "write"])
def test_an_error_after_a_response_has_begun_is_the_servers_to_deal_with(world: World, how: str) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        write = ok(start_response)
        if how == "write":
            write(b"begun")
            raise TenantSuspended("acme")
        return pieces()

    def pieces() -> Iterator[bytes]:
        yield b"" if how == "empty piece" else b"begun"
        raise TenantSuspended("acme")

    server = Server()
    with pytest.raises(TenantSuspended):
        server.run(protect(world, app), environ_of("/", world.as_ann))

    assert (server.reply.status, server.sent) == (200, b"" if how == "empty piece" else b"begun")


def test_what_an_application_writes_is_sent_at_once_and_in_order(world: World) -> None:
    server, seen = Server(), []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        write = ok(start_response)
        seen.append(len(server.heads))
        write(b"first " + slug())
        seen.append(server.sent)
        return [b" second"]

    assert server.run(protect(world, app), environ_of("/", world.as_ann)).body == b"first acme second"
    assert seen == [0, b"first acme"]


def test_an_application_may_start_again_with_the_error_that_made_it(world: World) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        ok(start_response)
        try:
            raise ValueError
        except ValueError as error:
            start_response("500 Oops", [("content-type", "text/plain")], (type(error), error, error.__traceback__))
        yield b"oops"
        try:
            raise KeyError("too late")
        except KeyError as error:
            start_response("500 Oops", [], (type(error), error, error.__traceback__))

    server = Server()
    with pytest.raises(KeyError, match="too late"):
        server.run(protect(world, app), environ_of("/", world.as_ann))

    assert (server.reply.status, server.sent, len(server.heads)) == (500, b"oops", 1)


def test_an_application_that_starts_twice_is_told_so(world: World) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        ok(start_response)
        ok(start_response)
        return []

    with pytest.raises(AssertionError, match="twice"):
        Server().run(protect(world, app), environ_of("/", world.as_ann))


@pytest.mark.parametrize("body", [[], iter(()), iter([b""])])
def test_a_response_without_a_body_has_a_start(world: World, body: Any) -> None:
    reply = Server().run(protect(world, answering(lambda: body)), environ_of("/", world.as_ann))

    assert (reply.status, reply.body) == (200, b"")


def test_an_exception_of_the_application_passes_unchanged_and_lets_the_tenant_go(world: World) -> None:
    raised, inherited = ZeroDivisionError(), []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        inherited.append(contextvars.copy_context())
        raise raised

    with pytest.raises(ZeroDivisionError) as caught:
        Server().run(protect(world, app), environ_of("/", world.as_ann))

    assert caught.value is raised and bound_or_none() is None
    with pytest.raises(TenantContextClosed):
        inherited[0].run(current_tenant)


# -- a context of its own ----------------------------------------------------------------------------------------------------------------


def test_what_the_application_sets_stays_in_its_request_and_what_surrounds_it_is_seen(world: World) -> None:
    variable: ContextVar[str] = ContextVar("variable")
    seen: list[str] = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        ok(start_response)
        seen.append(variable.get())
        variable.set("inside")
        yield b""
        seen.append(variable.get())

    variable.set("outside")
    with acting("somebody"):
        Server().run(protect(world, app), environ_of("/", world.as_ann))
        assert current_actor().actor == "somebody"

    assert seen == ["outside", "inside"] and variable.get() == "outside"


class LeftByManagers:
    """A request whose context would be made by context managers, and that is never left."""

    def __init__(self) -> None:
        self.entered = put_back()
        contextvars.copy_context().run(self.entered.__enter__)
        self.cycle = self


@contextmanager
def put_back() -> Iterator[None]:
    """What was bound is bound again at the end: of the block, or of the generator, which the garbage collector closes."""
    previous = _bound.get()
    try:
        yield
    finally:
        _bound.set(previous)


def test_a_response_that_nobody_closes_disturbs_nobody(world: World) -> None:
    """Its context is thrown away. Whoever puts things back does it when the garbage is collected, wherever that is."""
    app = protect(world, answering(Body))

    def left_by_middleware() -> None:
        cycle: list[Any] = [app(environ_of("/", world.as_bob), Server().start_response)]
        cycle.append(cycle)

    gc.disable()
    try:
        for leave, afterwards in ((left_by_middleware, b"acme"), (LeftByManagers, b"-")):
            leave()
            with bind(world.acme):
                gc.collect()
                assert slug() == afterwards
    finally:
        gc.enable()


def test_nothing_that_is_bound_around_the_call_is_bound_in_a_request(world: World) -> None:
    def authenticate(facts: Facts) -> None:
        seen.append(slug())

    seen: list[bytes] = []
    app = protect(world, answering(lambda: iter([slug(), current_actor().actor.encode()])), authenticate=authenticate, required=False)
    with bind(world.acme), acting("ann"):
        reply = Server().run(app, environ_of("/"))
        assert slug() == b"acme" and current_actor().actor == "ann"

    assert seen == [b"-"] and reply.body == b"-anonymous"


def test_a_body_may_be_pulled_in_other_threads_than_the_call(world: World) -> None:
    body = Body()
    app = protect(world, answering(lambda: body))
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        made = one.submit(app, environ_of("/", world.as_ann), Server().start_response).result()
        assert other.submit(list, made).result() == [b"a", b"b"]
        one.submit(made.close).result()
        assert {threads.submit(slug).result() for threads in (one, other)} == {b"-"}

    assert {bound for _, bound in body.bound} == {b"acme"}


def test_concurrent_requests_in_threads_never_mix(world: World) -> None:
    """C6."""
    tenants = [world.acme, world.globex, *(add_tenant(world.db, f"clinic-{number}") for number in range(18))]
    for tenant in tenants:
        world.db.memberships.add(world.ann, tenant, role="admin")
    together = threading.Barrier(20)

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        ok(start_response)
        together.wait(30)  # twenty are inside
        for _ in range(5):
            with world.db.session() as session:
                yield str(session.scalar(NAME)).encode() + b" " + slug() + b"\n"

    protected = protect(world, app)
    with ThreadPoolExecutor(20) as threads:
        wanted = [tenants[number % 20] for number in range(60)]
        who = [world.bearer(world.ann, tenant) for tenant in wanted]
        replies = list(threads.map(lambda headers: Server().run(protected, environ_of("/", headers)), who))

    assert [reply.body.decode() for reply in replies] == [f"{tenant.slug} {tenant.slug}\n" * 5 for tenant in wanted]


def test_concurrent_requests_in_greenlets_never_mix(world: World) -> None:
    """As under gevent: two requests of one thread take turns, in the middle of a call and of a piece."""
    hub = greenlet.getcurrent()

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        ok(start_response)
        for _ in range(3):
            before = slug()
            hub.switch()
            yield before + b" " + slug() + b"\n"

    protected, replies = protect(world, app), {}

    def serve(name: str, headers: dict[str, str]) -> None:
        replies[name] = Server().run(protected, environ_of("/", headers)).body

    requests = [greenlet.greenlet(serve) for _ in range(2)]
    for each, name, headers in zip(requests, ("acme", "globex"), (world.as_ann, world.as_bob), strict=True):
        each.switch(name, headers)
    while not all(each.dead for each in requests):
        for each in requests:
            if not each.dead:
                each.switch()
            assert slug() == b"-"

    assert replies == {"acme": b"acme acme\n" * 3, "globex": b"globex globex\n" * 3}


def test_a_middleware_within_another_has_the_last_word_inside(world: World) -> None:
    def inner(environ: Any, start_response: Any) -> Iterator[bytes]:
        ok(start_response)
        yield slug()

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        yield from protect(world, inner)({**environ, "HTTP_AUTHORIZATION": world.as_bob["authorization"]}, start_response)
        yield slug()

    assert Server().run(protect(world, app), environ_of("/", world.as_ann)).body == b"globexacme"


# -- the environment, authenticate -----------------------------------------------------------------------------------------------------


def test_the_environment_tells_the_tenant_and_who_asks(world: World) -> None:
    seen: list[Any] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        ok(start_response)
        seen.append((environ["tenantdb.tenant"], environ["tenantdb.identity"]))
        return []

    protected = protect(world, app, exempt=["/healthz"])
    for path in ("/", "/healthz"):
        Server().run(protected, environ_of(path, world.as_ann))

    assert seen[0][0] == world.acme and seen[0][1].role == "admin" and seen[1] == (None, None)


def test_authenticate_reads_what_the_request_says_of_itself(world: World) -> None:
    seen: list[Facts] = []

    def authenticate(facts: Facts) -> Identity | None:
        seen.append(facts)
        return Identity("carol", tenant=facts.cookies["clinic"])

    environ = environ_of("/a/ü", {"host": "Clinic.Example:8000", "cookie": "clinic=globex"}, method="POST", mount="/api")
    environ |= {"CONTENT_TYPE": "text/plain", "CONTENT_LENGTH": "0", "wsgi.url_scheme": "https"}
    reply = Server().run(protect(world, answering(lambda: iter([slug()])), authenticate=authenticate), environ)

    (facts,) = seen
    assert reply.body == b"globex"
    assert (facts.scheme, facts.host, facts.path, facts.method) == ("https", "clinic.example", "/a/ü", "POST")
    assert facts.headers["content-type"] == "text/plain" and facts.headers["cookie"] == "clinic=globex"


def test_a_request_without_a_host_has_none_as_in_asgi(world: World) -> None:
    """SERVER_NAME is the server's own idea, and no client said it."""
    environ = environ_of("/")
    del environ["HTTP_HOST"]
    environ["SERVER_NAME"] = "acme.clinic.example"
    seen: list[str] = []

    Server().run(protect(world, answering(list), authenticate=lambda facts: seen.append(facts.host)), environ)

    assert seen == [""]


def test_a_coroutine_function_cannot_authenticate_here(world: World) -> None:
    async def authenticate(facts: Facts) -> Identity | None:
        raise AssertionError

    reply = Server().run(protect(world, answering(list), authenticate=authenticate), environ_of("/"))

    assert (reply.status, reply.code) == (500, ConfigError.code)


def test_what_authenticate_has_to_fetch_is_fetched_once_and_before_any_request_is_looked_at(world: World) -> None:
    """WSGI does not tell that the application starts, and a process that is forked from another starts when it is asked something."""
    started, looked_at, others = [], [], []

    class Auth:
        def start(self) -> None:
            started.append(len(looked_at))
            others.append(threading.Thread(target=serve))
            if len(others) == 1:
                others[0].start()
                others[0].join(0.2)  # it cannot end: it waits for this

        def __call__(self, facts: Facts) -> Identity | None:
            looked_at.append(facts)
            return Identity("carol", tenant="acme")

    def serve() -> bytes:
        return Server().run(app, environ_of("/")).body

    app = protect(world, answering(lambda: iter([slug()])), authenticate=Auth())
    assert started == []

    assert serve() == b"acme"
    others[0].join(30)

    assert started == [0] and len(looked_at) == 2


def test_a_thread_of_the_application_is_not_bound_by_itself_and_one_that_is_left_behind_is_refused(world: World) -> None:
    inherited: list[contextvars.Context] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        ok(start_response)
        inherited.append(contextvars.copy_context())
        with ThreadPoolExecutor(1) as thread:
            with pytest.raises(NoTenantBound):
                thread.submit(world.db.session).result()
            return [thread.submit(contextvars.copy_context().run, slug).result()]

    assert Server().run(protect(world, app), environ_of("/", world.as_ann)).body == b"acme"
    with pytest.raises(TenantContextClosed):
        inherited[0].run(world.db.session)


def test_a_request_without_a_session_takes_no_connection_once_its_tenant_is_known(world: World) -> None:
    taken: list[object] = []

    def note(connection: object, *_: object) -> None:
        taken.append(connection)

    app = protect(world, answering(lambda: iter([slug()])))
    Server().run(app, environ_of("/", world.as_ann))
    event.listen(Pool, "checkout", note)
    try:
        assert Server().run(app, environ_of("/", world.as_ann)).body == b"acme"
        assert taken == []
        world.patients("acme")
        assert taken != []
    finally:
        event.remove(Pool, "checkout", note)


def test_a_body_of_bytes_in_memory_is_sent_through_any_wrapper(world: World) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        ok(start_response)
        return environ["wsgi.file_wrapper"](BytesIO(b"x" * 20_000), 8192)

    environ = {**environ_of("/", world.as_ann), "wsgi.file_wrapper": wsgiref.util.FileWrapper}

    assert Server().run(protect(world, app), environ).body == b"x" * 20_000
