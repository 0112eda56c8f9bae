"""A function that takes its tenant along: into threads, executors, processes, and tasks that outlive the block."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import multiprocessing
import pickle
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest

from tenantdb import acting, bind_tenant, current_tenant
from tenantdb.context import TenantContext, bind, bound_or_none, current_actor
from tenantdb.errors import NoTenantBound, TenantContextClosed
from tests.unit.test_context import ACME, BETA, Known, nothing_is_bound_before_or_after

__all__ = ["nothing_is_bound_before_or_after"]

Seen = tuple[str | None, str]


def seen() -> Seen:
    """The tenant and the actor, where it runs."""
    tenant = bound_or_none()
    return tenant.slug if tenant else None, current_actor().actor


def plain(a: int, *, b: int = 2) -> Seen:
    """What it does."""
    return seen()


async def coroutine(a: int) -> Seen:
    await asyncio.sleep(0)
    return seen()


def generator(a: int) -> Generator[Seen, Any, str]:
    got = yield seen()
    assert got == "sent"
    yield seen()
    return "returned"


async def async_generator(a: int) -> AsyncGenerator[Seen, Any]:
    got = yield seen()
    assert got == "sent"
    await asyncio.sleep(0)
    yield seen()


KINDS: list[Callable[..., Any]] = [plain, coroutine, generator, async_generator]


def captured(fn: Callable[..., Any]) -> Callable[..., Any]:
    """As in a request of Ann's, which is over when the function is called."""
    with bind(ACME), acting("user:ann"):
        return bind_tenant(fn)


NOW = ("acme", "user:ann")
OUTSIDE = (None, "system")


def test_a_thread_and_an_executor_have_the_tenant_and_who_acts() -> None:
    with bind(ACME), acting("user:ann"), ThreadPoolExecutor(1) as executor:
        assert executor.submit(bind_tenant(plain), 1, b=3).result() == NOW
        assert executor.submit(plain, 1).result() == OUTSIDE  # without it
        assert list(executor.map(bind_tenant(plain), [1, 2])) == [NOW, NOW]
        told: list[Seen] = []
        thread = threading.Thread(target=bind_tenant(lambda: told.append(seen())))
        thread.start()
        thread.join()
    assert told == [NOW]


def test_a_thread_without_it_has_no_tenant() -> None:
    with bind(ACME), ThreadPoolExecutor(1) as executor, pytest.raises(NoTenantBound):
        executor.submit(current_tenant).result()


async def test_the_executor_of_an_event_loop_has_it() -> None:
    loop = asyncio.get_running_loop()
    with bind(ACME), acting("user:ann"):
        assert await loop.run_in_executor(None, bind_tenant(plain), 1) == NOW
        assert await loop.run_in_executor(None, plain, 1) == OUTSIDE


async def test_a_task_that_outlives_the_block_has_it_and_one_without_is_refused() -> None:
    ended = asyncio.Event()

    async def late() -> str:
        await ended.wait()
        return current_tenant().slug

    with bind(ACME):
        bound, without = asyncio.create_task(bind_tenant(late)()), asyncio.create_task(late())
        await asyncio.sleep(0)
    with bind(BETA):
        ended.set()
        assert await bound == "acme"
        with pytest.raises(TenantContextClosed):
            await without


def test_another_process_has_it() -> None:
    bound = captured(current_tenant)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        assert executor.submit(bound).result() == ACME


@pytest.mark.parametrize("fn", KINDS)
def test_it_is_pickled_where_the_function_can_be(fn: Callable[..., Any]) -> None:
    bound = captured(fn)
    again = pickle.loads(pickle.dumps(bound))
    assert (again.func, again.args) == (bound.func, bound.args)  # type: ignore[attr-defined]
    assert again.__wrapped__ is fn


def test_each_kind_stays_its_kind_and_has_its_name_and_signature() -> None:
    kinds = [inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction]
    bound = [captured(fn) for fn in KINDS]
    assert [[kind(fn) for kind in kinds] for fn in bound] == [[kind(fn) for kind in kinds] for fn in KINDS]
    assert [fn.__name__ for fn in bound] == ["plain", "coroutine", "generator", "async_generator"]
    assert bound[0].__doc__ == "What it does."
    assert inspect.signature(bound[0]) == inspect.signature(plain)


async def test_every_kind_is_bound_while_it_runs_and_its_caller_is_not() -> None:
    assert captured(plain)(1) == NOW
    assert await captured(coroutine)(1) == NOW

    steps = captured(generator)(1)
    assert (next(steps), seen()) == (NOW, OUTSIDE)
    with bind(BETA), acting("user:bob"):
        assert (steps.send("sent"), seen()) == (NOW, ("beta", "user:bob"))
    with pytest.raises(StopIteration, match="returned"):
        next(steps)

    async_steps = captured(async_generator)(1)
    assert (await anext(async_steps), seen()) == (NOW, OUTSIDE)
    with bind(BETA), acting("user:bob"):
        assert (await async_steps.asend("sent"), seen()) == (NOW, ("beta", "user:bob"))
    with pytest.raises(StopAsyncIteration):
        await anext(async_steps)
    assert seen() == OUTSIDE


def test_where_another_tenant_is_bound_its_own_is_meant_and_the_other_comes_back() -> None:
    bound = captured(plain)
    with bind(BETA):
        assert bound(1) == NOW
        assert current_tenant() is BETA


def test_each_call_has_a_block_of_its_own_which_is_closed_at_its_end() -> None:
    bound = captured(contextvars.copy_context)
    first, second = bound(), bound()
    for inherited in (first, second):
        with pytest.raises(TenantContextClosed):
            inherited.run(current_tenant)


def test_without_a_tenant_nothing_is_captured() -> None:
    with pytest.raises(NoTenantBound):
        bind_tenant(plain)
    with bind(ACME):
        inherited = contextvars.copy_context()
    with pytest.raises(TenantContextClosed):
        inherited.run(bind_tenant, plain)


async def test_methods_partials_and_objects_that_are_called_are_taken_by_their_kind() -> None:
    class Service:
        async def method(self, a: int) -> Seen:
            return await coroutine(a)

        async def __call__(self, a: int) -> Seen:
            return await coroutine(a)

    class Lines:
        def __call__(self) -> Iterator[Seen]:
            yield seen()

    class Feed:
        async def __call__(self) -> AsyncIterator[Seen]:
            yield seen()

    context = TenantContext(ACME.id, Known())
    for fn in (Service().method, functools.partial(coroutine, 1), Service()):
        arguments = () if isinstance(fn, functools.partial) else (1,)
        assert await captured(fn)(*arguments) == NOW
        assert (await context(fn)(*arguments))[0] == "acme"
    assert list(captured(Lines())()) == [NOW]
    assert [item async for item in captured(Feed())()] == [NOW]
    assert [item[0] for item in context(Lines())()] == ["acme"]
    assert captured(Made)().seen == NOW  # a class is called like a function, whatever its objects are


class Made:
    def __init__(self) -> None:
        self.seen = seen()

    async def __call__(self) -> None: ...
