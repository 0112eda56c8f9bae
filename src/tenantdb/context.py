"""The tenant that is bound to the running code, and who acts.

A binding belongs to a block of code. Context variables alone do not keep that promise: a task started in a request inherits the variable
and keeps it when the request is over, and a generator leaks what it sets into its caller. So a binding carries a flag that is set when its
block ends, after which every use raises `TenantContextClosed`; and generators are bound step by step, only while their own body runs.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar, cast
from uuid import UUID

from tenantdb.errors import NoTenantBound, TenantAlreadyBound, TenantContextClosed
from tenantdb.model import Tenant

P = ParamSpec("P")
R = TypeVar("R")


class Binding:
    """One tenant bound to one block. ``closed`` once the block has ended, for whoever inherited it.

    A context manager of its own that can be entered step by step (`active`): a generator's body, with the caller's code in between.
    """

    __slots__ = ("_previous", "closed", "tenant")

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant
        self.closed = False
        self._previous: Binding | None = None

    def __enter__(self) -> Binding:
        self.activate()
        return self

    def __exit__(self, *exc: object) -> None:
        self.deactivate()
        self.closed = True

    def activate(self) -> None:
        self._previous = _bound.get()
        _bound.set(self)

    def deactivate(self) -> None:
        # No token: the exit may run in another context (an async generator closed by another task), where a reset would raise, and
        # where the variable is somebody else's.
        if _bound.get() is self:
            _bound.set(self._previous)
        self._previous = None

    @contextmanager
    def active(self) -> Iterator[None]:
        self.activate()
        try:
            yield
        finally:
            self.deactivate()


_bound: ContextVar[Binding | None] = ContextVar("tenantdb_bound", default=None)


def current_tenant() -> Tenant:
    """The tenant bound here. Raises: `NoTenantBound`; `TenantContextClosed` in a task or thread that outlived the block that bound it."""
    binding = _bound.get()
    if binding is None:
        raise NoTenantBound
    if binding.closed:
        raise TenantContextClosed(binding.tenant.slug)
    return binding.tenant


def bound_or_none() -> Tenant | None:
    """The tenant bound here, or None: for logs and other readers that must not fail."""
    binding = _bound.get()
    return None if binding is None or binding.closed else binding.tenant


def pinned_key(key: str | UUID | None) -> str | UUID:
    """Which tenant is meant by ``key`` here: the bound one where None is given, and no other than the bound one where any is bound.

    Raises: `NoTenantBound`, `TenantAlreadyBound`, `TenantContextClosed` (only where no key is given: who names a tenant knows which).
    """
    if key is None:
        return current_tenant().id
    bound = bound_or_none()
    if bound is not None:
        _refuse_other(bound, key)
        return bound.id
    return key


def _refuse_other(bound: Tenant, key: str | UUID) -> None:
    if key != bound.id and key != bound.slug:
        raise TenantAlreadyBound(bound.slug, str(key))


def bind(tenant: Tenant, *, switch: bool = False) -> Binding:
    """Bind ``tenant`` for a block: ``with bind(tenant): ...``. Adapters use it with a tenant they have looked up; applications use
    ``db.tenant_context``. Raises: `TenantAlreadyBound` where another tenant is bound, unless ``switch``.
    """
    if not switch and (bound := bound_or_none()) is not None:
        _refuse_other(bound, tenant.id)
    return Binding(tenant)


@contextmanager
def unbound() -> Iterator[None]:
    """No tenant is bound in this block, whatever is bound around it: where a request begins."""
    previous = _bound.get()
    _bound.set(None)
    try:
        yield
    finally:
        _bound.set(previous)


def unbind() -> None:
    """Nothing is bound from here on. For a context (`contextvars.Context`) of one's own that is thrown away: `unbound` puts things back,
    and where it is never left the garbage collector has it do so, in whatever context that happens to be.
    """
    _bound.set(None)


class ServableTenants(Protocol):
    """Where a `TenantContext` finds its tenant; both raise the typed error that says why it cannot be served."""

    def servable(self, key: str | UUID) -> Tenant: ...
    async def aservable(self, key: str | UUID) -> Tenant: ...


class TenantContext:
    """What ``db.tenant_context(...)`` returns: a context manager, sync and async, and a decorator.

    As a decorator it works by kind: on ``def``, on ``async def``, and on generators and async generators, whose tenant is bound only while
    their body runs. The tenant is looked up on each call, so a decorated function that is called later is refused when the tenant has been
    suspended meanwhile.
    """

    def __init__(self, key: str | UUID, tenants: ServableTenants, *, switch: bool = False) -> None:
        self._key = key
        self._tenants = tenants
        self._switch = switch
        self._open: Binding | None = None

    def __enter__(self) -> Tenant:
        return self._bind(self._tenants.servable(self._key))

    async def __aenter__(self) -> Tenant:
        return self._bind(await self._tenants.aservable(self._key))

    def __exit__(self, *exc: object) -> None:
        binding, self._open = self._open, None
        if binding is not None:
            binding.__exit__()

    async def __aexit__(self, *exc: object) -> None:
        self.__exit__(*exc)

    def _bind(self, tenant: Tenant) -> Tenant:
        if self._open is not None:
            raise RuntimeError("this tenant_context is open already; make another for a nested block")
        self._open = bind(tenant, switch=self._switch).__enter__()
        return tenant

    def __call__(self, fn: Callable[P, R]) -> Callable[P, R]:
        if inspect.isasyncgenfunction(fn):
            wrapped: Any = self._wrap_async_generator(fn)
        elif inspect.iscoroutinefunction(fn):
            wrapped = self._wrap_coroutine(fn)
        elif inspect.isgeneratorfunction(fn):
            wrapped = self._wrap_generator(fn)
        else:
            wrapped = self._wrap_function(fn)
        return cast("Callable[P, R]", functools.wraps(fn)(wrapped))

    def _wrap_function(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with bind(self._tenants.servable(self._key), switch=self._switch):
                return fn(*args, **kwargs)

        return call

    def _wrap_coroutine(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            with bind(await self._tenants.aservable(self._key), switch=self._switch):
                return await fn(*args, **kwargs)

        return call

    def _wrap_generator(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            binding = bind(self._tenants.servable(self._key), switch=self._switch)
            generator = fn(*args, **kwargs)
            step: Callable[[], Any] = functools.partial(next, generator)
            try:
                while True:
                    with binding.active():
                        try:
                            item = step()
                        except StopIteration as stop:
                            return stop.value
                    try:
                        sent = yield item
                    except GeneratorExit:
                        with binding.active():
                            generator.close()
                        raise
                    except BaseException as error:
                        step = functools.partial(generator.throw, error)
                    else:
                        step = functools.partial(generator.send, sent)
            finally:
                binding.closed = True

        return call

    def _wrap_async_generator(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        async def call(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
            binding = bind(await self._tenants.aservable(self._key), switch=self._switch)
            generator = fn(*args, **kwargs)
            step: Callable[[], Awaitable[Any]] = generator.__anext__
            try:
                while True:
                    with binding.active():
                        try:
                            item = await step()
                        except StopAsyncIteration:
                            return
                    try:
                        sent = yield item
                    except GeneratorExit:
                        with binding.active():
                            await generator.aclose()
                        raise
                    except BaseException as error:
                        step = functools.partial(generator.athrow, error)
                    else:
                        step = functools.partial(generator.asend, sent)
            finally:
                binding.closed = True

        return call


# -- who acts --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Actor:
    """Who does what is written to the audit log: a user's id, ``cli:<login>``, or ``system``. ``source``: an address where one is known."""

    actor: str = "system"
    request_id: str | None = None
    source: str | None = None


_actor: ContextVar[Actor] = ContextVar("tenantdb_actor", default=Actor())


def current_actor() -> Actor:
    """Who acts here; ``system`` where nobody said."""
    return _actor.get()


@contextmanager
def acting(actor: str, request_id: str | None = None, source: str | None = None) -> Iterator[None]:
    """Say who acts in a block, for the audit log. The adapters do it for each request."""
    previous = _actor.get()
    mine = Actor(actor, request_id, source)
    _actor.set(mine)
    try:
        yield
    finally:
        if _actor.get() is mine:
            _actor.set(previous)


def act(actor: str, request_id: str | None = None, source: str | None = None) -> None:
    """Say who acts from here on, in a context of one's own; see `unbind`."""
    _actor.set(Actor(actor, request_id, source))


class TenantLogFilter(logging.Filter):
    """Gives every log record ``tenant`` and ``tenant_id``, the slug and id of the bound tenant, or ``-``.

    Add it to a handler, so that records of every logger pass it: ``handler.addFilter(TenantLogFilter())``.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        tenant = bound_or_none()
        record.tenant = tenant.slug if tenant else "-"
        record.tenant_id = str(tenant.id) if tenant else "-"
        return True
