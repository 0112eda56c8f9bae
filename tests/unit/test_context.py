"""The bound tenant belongs to one block: of a function, of a coroutine, of a generator's own steps; and to nobody when it has ended."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import functools
import inspect
import logging
import threading
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tenantdb import TenantLogFilter, acting, current_tenant
from tenantdb.context import Actor, Binding, TenantContext, bind, bound_or_none, current_actor, pinned_key, unbound, watch_for_leftovers
from tenantdb.errors import LeftBehind, NoTenantBound, TenantAlreadyBound, TenantContextClosed, TenantSuspended
from tenantdb.model import Tenant, TenantState

ACME = Tenant(id=uuid.UUID(int=1), slug="acme", name="Acme", state=TenantState.ACTIVE)
BETA = Tenant(id=uuid.UUID(int=2), slug="beta", name="Beta", state=TenantState.ACTIVE)


class Known:
    """Knows both tenants, or refuses to tell."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.asked = 0

    def servable(self, key: str | uuid.UUID) -> Tenant:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return {ACME.id: ACME, BETA.id: BETA}[uuid.UUID(str(key))]

    async def aservable(self, key: str | uuid.UUID) -> Tenant:
        return self.servable(key)


def context(tenant: Tenant, *, switch: bool = False) -> TenantContext:
    return TenantContext(tenant.id, Known(), switch=switch)


def slug() -> str | None:
    tenant = bound_or_none()
    return None if tenant is None else tenant.slug


@pytest.fixture(autouse=True)
def nothing_is_bound_before_or_after() -> Iterator[None]:
    assert slug() is None
    yield
    assert slug() is None  # also where a closed block is left


# -- blocks ----------------------------------------------------------------------------------------------------------------------------


def test_a_block_binds_and_gives_back() -> None:
    with pytest.raises(NoTenantBound):
        current_tenant()
    with context(ACME) as tenant:
        assert tenant is current_tenant() is ACME
        with context(BETA, switch=True):
            assert current_tenant() is BETA
        assert current_tenant() is ACME
    with pytest.raises(NoTenantBound):
        current_tenant()


async def test_an_async_block_binds_and_gives_back() -> None:
    async with context(ACME) as tenant:
        assert tenant is current_tenant() is ACME
    assert slug() is None


def test_another_tenant_in_a_bound_block_is_refused_unless_it_is_meant() -> None:
    with context(ACME):
        with pytest.raises(TenantAlreadyBound) as caught:
            with context(BETA):
                pass
        assert (caught.value.bound, caught.value.wanted) == ("acme", str(BETA.id))
        assert current_tenant() is ACME
        with context(ACME):
            assert current_tenant() is ACME


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit])
def test_whatever_ends_a_block_it_is_given_back(error: type[BaseException]) -> None:
    with context(ACME):
        with pytest.raises(error):
            with context(BETA, switch=True):
                raise error
        assert current_tenant() is ACME


async def test_a_tenant_that_may_not_be_served_is_not_bound() -> None:
    refused = TenantContext(ACME.id, Known(TenantSuspended("acme")), switch=True)
    with context(BETA):
        with pytest.raises(TenantSuspended):
            with refused:
                raise AssertionError("the block was entered")
        with pytest.raises(TenantSuspended):
            async with refused:
                raise AssertionError("the block was entered")
        with pytest.raises(TenantSuspended):
            refused(slug)()
        assert slug() == "beta"


def test_one_object_may_be_entered_again_and_not_twice_at_once() -> None:
    manager = context(ACME)
    for _ in range(2):
        with manager:
            with pytest.raises(RuntimeError, match="open already"):
                manager.__enter__()
            assert slug() == "acme"
        assert slug() is None


@pytest.mark.parametrize(("key", "meant"), [(None, True), ("acme", True), (ACME.id, True), ("beta", False), (BETA.id, False)])
def test_inside_a_block_only_the_bound_tenant_is_meant(key: Any, meant: bool) -> None:
    with context(ACME):
        if meant:
            assert pinned_key(key) == ACME.id
        else:
            with pytest.raises(TenantAlreadyBound):
                pinned_key(key)


def test_outside_a_block_a_tenant_must_be_named() -> None:
    assert pinned_key("acme") == "acme"
    assert pinned_key(ACME.id) == ACME.id
    with pytest.raises(NoTenantBound):
        pinned_key(None)


def test_in_an_unbound_block_no_tenant_is_meant_and_the_outer_one_is_given_back() -> None:
    with context(ACME):
        with unbound():
            with pytest.raises(NoTenantBound):
                pinned_key(None)
            assert pinned_key("beta") == "beta"
        assert current_tenant() is ACME


# -- what outlives a block -------------------------------------------------------------------------------------------------------------


def test_what_inherited_a_block_is_refused_when_the_block_has_ended() -> None:
    with context(ACME):
        inherited = contextvars.copy_context()
        assert inherited.run(slug) == "acme"
    with pytest.raises(TenantContextClosed) as caught:
        inherited.run(current_tenant)
    assert caught.value.tenant == "acme"
    with pytest.raises(TenantContextClosed):
        inherited.run(pinned_key, None)
    assert inherited.run(pinned_key, "beta") == "beta"  # who names a tenant knows which
    assert inherited.run(slug) is None


def test_what_inherited_a_block_binds_for_itself() -> None:
    with context(ACME):
        inherited = contextvars.copy_context()

    def work() -> str | None:
        with context(BETA):  # a closed block is in nobody's way
            return slug()

    assert inherited.run(work) == "beta"
    with pytest.raises(TenantContextClosed):
        inherited.run(current_tenant)


async def test_a_task_started_in_a_block_is_refused_after_it() -> None:
    ended = asyncio.Event()

    async def outliving() -> str:
        assert slug() == "acme"
        await ended.wait()
        with pytest.raises(TenantContextClosed):
            current_tenant()
        return "refused"

    async with context(ACME):
        task = asyncio.create_task(outliving())
        await asyncio.sleep(0)
    ended.set()
    assert await task == "refused"


def test_a_new_thread_inherits_nothing() -> None:
    seen: list[str | None] = []
    with context(ACME):
        thread = threading.Thread(target=lambda: seen.append(slug()))
        thread.start()
        thread.join()
    assert seen == [None]


async def test_a_block_ended_in_another_context_leaves_that_context_alone() -> None:
    """A framework may leave a block in another task than the one that entered it."""
    manager = bind(ACME)
    manager.__enter__()

    async def leave_elsewhere() -> str | None:
        with context(BETA, switch=True):
            manager.__exit__(None, None, None)
            return slug()

    assert await asyncio.create_task(leave_elsewhere()) == "beta"
    with pytest.raises(TenantContextClosed):  # and here it is over too
        current_tenant()


# -- decorators, by kind ---------------------------------------------------------------------------------------------------------------


def test_a_decorated_function_stays_what_it_was() -> None:
    @context(ACME)
    def plain(a: int, *, b: int = 2) -> tuple[Any, ...]:
        """What it does."""
        return a, b, slug()

    assert plain(1, b=3) == (1, 3, "acme")
    assert (plain.__name__, plain.__doc__) == ("plain", "What it does.")
    assert list(inspect.signature(plain).parameters) == ["a", "b"]


def test_each_kind_stays_its_kind() -> None:
    def plain() -> None: ...
    async def coroutine() -> None: ...
    def generator() -> Iterator[None]:
        yield

    async def async_generator() -> AsyncIterator[None]:
        yield

    decorated: list[Callable[..., Any]] = [context(ACME)(fn) for fn in (plain, coroutine, generator, async_generator)]
    with_kinds = [inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction]
    kinds = [[kind(fn) for kind in with_kinds] for fn in decorated]
    assert kinds == [[False, False, False], [True, False, False], [False, True, False], [False, False, True]]


def test_a_decorated_function_may_call_itself_and_raise() -> None:
    @context(ACME)
    def count_down(n: int) -> int:
        assert slug() == "acme"
        return 1 // n if n == 0 else count_down(n - 1)

    with pytest.raises(ZeroDivisionError):
        count_down(3)


async def test_decorated_coroutines_side_by_side_have_each_their_own() -> None:
    async def work() -> list[str | None]:
        seen = []
        for _ in range(3):
            seen.append(slug())
            await asyncio.sleep(0)
        return seen

    got = await asyncio.gather(*(context(tenant)(work)() for tenant in (ACME, BETA, ACME)))
    assert list(got) == [["acme"] * 3, ["beta"] * 3, ["acme"] * 3]


async def test_a_decorated_method_and_a_partial_are_taken_by_their_kind() -> None:
    class Service:
        @context(ACME)
        async def work(self) -> str | None:
            await asyncio.sleep(0)
            return slug()

    async def add(a: str, b: str) -> tuple[str, str | None]:
        return a + b, slug()

    assert await Service().work() == "acme"
    assert await context(ACME)(_as_function(functools.partial(add, "x")))("y") == ("xy", "acme")


def _as_function(call: Callable[..., Any]) -> Callable[..., Any]:
    async def made(*args: Any) -> Any:
        return await call(*args)

    return made


def test_a_generator_is_bound_while_its_body_runs_and_its_caller_is_not() -> None:
    @context(ACME)
    def steps() -> Generator[str | None, str, str]:
        got = yield slug()
        assert got == "sent"
        yield slug()
        return "returned"

    generator = steps()
    assert next(generator) == "acme"
    assert slug() is None
    with context(BETA):
        assert generator.send("sent") == "acme"
        assert slug() == "beta"
    with pytest.raises(StopIteration) as stopped:
        next(generator)
    assert stopped.value.value == "returned"


def test_an_error_thrown_into_a_generator_reaches_its_body_where_the_tenant_is_bound() -> None:
    seen: list[str | None] = []

    @context(ACME)
    def steps() -> Iterator[str]:
        try:
            yield "first"
        except ZeroDivisionError:
            seen.append(slug())
            yield "handled"

    generator: Any = steps()
    next(generator)
    assert generator.throw(ZeroDivisionError()) == "handled"
    with pytest.raises(KeyError):
        generator.throw(KeyError("not handled"))
    assert seen == ["acme"]


@pytest.mark.parametrize("how", ["close", "drop", "exhaust"])
def test_however_a_generator_ends_its_cleanup_is_bound_and_what_it_started_is_closed(how: str) -> None:
    seen: list[str | None] = []
    inherited: list[contextvars.Context] = []

    @context(ACME)
    def steps() -> Iterator[int]:
        try:
            inherited.append(contextvars.copy_context())
            yield 1
        finally:
            seen.append(slug())

    generator: Any = steps()
    next(generator)
    assert inherited[0].run(slug) == "acme"
    if how == "close":
        generator.close()
    elif how == "exhaust":
        assert list(generator) == []
    del generator
    assert seen == ["acme"]
    with pytest.raises(TenantContextClosed):
        inherited[0].run(current_tenant)


def test_a_generator_of_another_tenant_is_refused_in_a_bound_block_at_its_first_step() -> None:
    @context(BETA)
    def steps() -> Iterator[str | None]:
        yield slug()

    with context(ACME):
        generator = steps()
        with pytest.raises(TenantAlreadyBound):
            next(iter(generator))


def test_generators_of_two_tenants_can_be_stepped_in_turns() -> None:
    def steps() -> Iterator[str | None]:
        for _ in range(3):
            yield slug()

    pairs = list(zip(context(ACME)(steps)(), context(BETA)(steps)(), strict=True))
    assert pairs == [("acme", "beta")] * 3


async def test_an_async_generator_is_bound_while_its_body_runs_and_its_caller_is_not() -> None:
    @context(ACME)
    async def steps() -> AsyncGenerator[str | None, str]:
        got = yield slug()
        assert got == "sent"
        await asyncio.sleep(0)
        yield slug()

    generator = steps()
    assert await anext(generator) == "acme"
    assert slug() is None
    async with context(BETA):
        assert await generator.asend("sent") == "acme"
        assert slug() == "beta"
    with pytest.raises(StopAsyncIteration):
        await anext(generator)


async def test_an_async_generator_closed_in_another_task_leaks_nothing_and_raises_nothing() -> None:
    seen: list[str | None] = []

    @context(ACME)
    async def steps() -> AsyncGenerator[str | None, None]:
        try:
            yield slug()
        finally:
            await asyncio.sleep(0)
            seen.append(slug())

    generator = steps()
    assert await anext(generator) == "acme"

    async def close() -> str | None:
        with context(BETA):
            await generator.aclose()
            return slug()

    assert await asyncio.create_task(close()) == "beta"
    assert seen == ["acme"]
    assert slug() is None


async def test_each_step_of_an_async_generator_may_be_taken_by_another_task() -> None:
    @context(ACME)
    async def steps() -> AsyncGenerator[str | None, None]:
        for _ in range(3):
            await asyncio.sleep(0)
            yield slug()

    generator = steps()
    assert [await asyncio.create_task(_next(generator)) for _ in range(3)] == ["acme"] * 3
    await generator.aclose()


async def _next(generator: AsyncGenerator[str | None, None]) -> str | None:
    return await generator.__anext__()


async def test_an_error_thrown_into_an_async_generator_reaches_its_body() -> None:
    @context(ACME)
    async def steps() -> AsyncGenerator[str | None, None]:
        try:
            yield "first"
        except ZeroDivisionError:
            yield slug()

    generator = steps()
    await anext(generator)
    assert await generator.athrow(ZeroDivisionError()) == "acme"
    with pytest.raises(KeyError):
        await generator.athrow(KeyError("not handled"))


async def test_a_cancelled_step_of_an_async_generator_gives_the_tenant_back() -> None:
    never = asyncio.Event()

    @context(ACME)
    async def steps() -> AsyncGenerator[None, None]:
        await never.wait()
        yield

    async def consume() -> None:
        try:
            async for _ in steps():
                pass
        finally:
            assert slug() is None

    task = asyncio.create_task(consume())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_the_tenant_is_looked_up_at_each_call_and_not_before() -> None:
    known = Known()
    work = TenantContext(ACME.id, known)(slug)
    assert known.asked == 0
    assert [work(), work()] == ["acme", "acme"]
    assert known.asked == 2
    known.error = TenantSuspended("acme")
    with pytest.raises(TenantSuspended):
        work()


# -- blocks in generators, and blocks that are not left -----------------------------------------------------------------------------------


def test_a_block_in_the_body_of_a_generator_is_the_bodys_own_between_its_steps() -> None:
    @context(ACME)
    def steps() -> Iterator[str | None]:
        with context(BETA, switch=True):
            yield slug()
            yield slug()
        yield slug()

    generator = steps()
    seen = []
    for step in range(3):
        seen.append(next(generator))
        assert slug() is None, step
    with context(BETA):
        generator.close()
        assert slug() == "beta"
    assert seen == ["beta", "beta", "acme"]


async def test_and_so_it_is_in_an_async_generator_whose_steps_are_taken_by_other_tasks() -> None:
    @context(ACME)
    async def steps() -> AsyncGenerator[str | None, None]:
        async with context(BETA, switch=True):
            for _ in range(2):
                await asyncio.sleep(0)
                yield slug()
        yield slug()

    generator = steps()
    assert [await asyncio.create_task(_next(generator)) for _ in range(3)] == ["beta", "beta", "acme"]
    await asyncio.create_task(generator.aclose())
    assert slug() is None


async def test_a_block_of_another_tenant_that_another_task_leaves_gives_back_the_outer_one_where_it_was_entered() -> None:
    """An async generator that is no decorated one leaks its block into whoever takes its first step."""

    async def steps() -> AsyncGenerator[None, None]:
        async with context(BETA, switch=True):
            yield

    with context(ACME):
        generator = steps()
        await anext(generator)
        assert slug() == "beta"
        inherits = contextvars.copy_context()
        await asyncio.create_task(generator.aclose())
        assert current_tenant() is ACME

        async def inherited() -> None:
            with pytest.raises(TenantContextClosed):  # and is not given the outer one in its place
                current_tenant()

        await inherits.run(asyncio.create_task, inherited())
    assert slug() is None


def test_a_block_inside_that_is_not_left_ends_with_the_one_around_it(caplog: pytest.LogCaptureFixture) -> None:
    with context(ACME):
        inherited = []
        with context(ACME):
            context(BETA, switch=True).__enter__()
            inherited.append(contextvars.copy_context())
        assert current_tenant() is ACME
        with pytest.raises(TenantContextClosed):
            inherited[0].run(current_tenant)
    assert slug() is None
    assert [(record.name, record.levelname) for record in caplog.records] == [("tenantdb.context", "WARNING")]
    assert str(ACME.id) in caplog.text
    assert "1 blocks" in caplog.text


def test_what_was_bound_in_an_unbound_block_ends_with_it(caplog: pytest.LogCaptureFixture) -> None:
    """As at the end of a request."""
    with context(BETA):
        with unbound():
            context(ACME).__enter__()
        assert current_tenant() is BETA
    assert str(ACME.id) in caplog.text


def test_a_block_of_whoever_inherited_the_outer_one_is_not_taken_for_one_that_was_not_left(caplog: pytest.LogCaptureFixture) -> None:
    def elsewhere(outer: Binding) -> str | None:
        with context(BETA, switch=True):
            outer.__exit__()
            return slug()

    def here() -> None:
        (outer := bind(ACME)).__enter__()
        with ThreadPoolExecutor(1) as executor:
            assert executor.submit(contextvars.copy_context().run, elsewhere, outer).result() == "beta"
        with pytest.raises(TenantContextClosed):
            current_tenant()

    contextvars.copy_context().run(here)
    assert caplog.records == []


def test_under_watch_a_block_that_is_not_left_is_an_error_that_says_where_it_was_entered() -> None:
    with watch_for_leftovers():
        with pytest.raises(LeftBehind) as caught:
            with context(ACME):
                context(ACME).__enter__()
        assert (caught.value.tenant, caught.value.leases, caught.value.blocks) == ("acme", 0, 1)
        assert "test_under_watch_a_block" in caught.value.place
    with pytest.raises(LeftBehind, match="acme"), watch_for_leftovers():
        context(ACME).__enter__()
    with watch_for_leftovers():
        with pytest.raises(ZeroDivisionError):  # nothing covers up the user's own
            with context(ACME):
                context(ACME).__enter__()
                raise ZeroDivisionError
    assert slug() is None


def test_under_a_watch_that_is_not_strict_it_is_logged_with_its_place(caplog: pytest.LogCaptureFixture) -> None:
    with watch_for_leftovers(strict=False), context(ACME):
        context(ACME).__enter__()
    assert "test_under_a_watch_that_is_not_strict" in caplog.text


# -- who acts, and logs ----------------------------------------------------------------------------------------------------------------


def test_who_acts_is_said_for_a_block() -> None:
    assert current_actor() == Actor("system", None)
    with acting("user:7", "request-1"):
        assert current_actor() == Actor("user:7", "request-1")
        with acting("cli:root"):
            assert current_actor() == Actor("cli:root", None)
        assert current_actor().actor == "user:7"
    assert current_actor() == Actor()
    with pytest.raises(dataclasses.FrozenInstanceError):
        current_actor().actor = "me"  # type: ignore[misc]


def test_the_log_filter_names_the_bound_tenant_and_a_dash_where_none_is() -> None:
    def filtered() -> tuple[Any, Any]:
        record = logging.LogRecord("clinic", logging.INFO, __file__, 1, "hello", None, None)
        assert TenantLogFilter().filter(record)
        return record.tenant, record.tenant_id  # type: ignore[attr-defined]

    assert filtered() == ("-", "-")
    with context(ACME):
        assert filtered() == ("acme", str(ACME.id))
        inherited = contextvars.copy_context()
    assert inherited.run(filtered) == ("-", "-")


def test_records_of_every_logger_pass_a_filter_on_the_handler(caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.addFilter(log_filter := TenantLogFilter())
    try:
        with context(ACME):
            logging.getLogger("somebody.elses").warning("hello")
    finally:
        caplog.handler.removeFilter(log_filter)
    assert [record.tenant for record in caplog.records] == ["acme"]  # type: ignore[attr-defined]
