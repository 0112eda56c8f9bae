"""The tenant that is bound to the running code, and who acts.

A binding belongs to a block of code. Context variables alone do not keep that promise: a task started in a request inherits the variable
and keeps it when the request is over, and a generator leaks what it sets into its caller. So a binding carries a flag that is set when its
block ends, after which every use raises `TenantContextClosed`; and generators are bound step by step, only while their own body runs.

A block also knows which connections were leased in it, so that what has not been given back at its end is found out: see `Binding.end`.
"""

from __future__ import annotations

import functools
import inspect
import logging
import traceback
from asyncio import current_task
from asyncio.events import _get_running_loop
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import get_ident
from typing import Any, ParamSpec, Protocol, TypeVar, cast
from uuid import UUID

from tenantdb.errors import LeftBehind, NoTenantBound, TenantAlreadyBound, TenantContextClosed
from tenantdb.model import Tenant

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger("tenantdb.context")

ANONYMOUS = "anonymous"  # who acts, for the audit log, where a request did not have to say


@dataclass(frozen=True, slots=True)
class Actor:
    """Who does what is written to the audit log: a user's id, ``cli:<login>``, or ``system``. ``source``: an address where one is known."""

    actor: str = "system"
    request_id: str | None = None
    source: str | None = None


class Binding:
    """One tenant, or none, bound to one block. ``closed`` once the block has ended, for whoever inherited it.

    A context manager of its own that can be entered step by step (`active`, and `end_steps` at last): a generator's body, with the
    caller's code in between. With an ``actor`` that one acts in it. ``leased``: what was leased in it and has not been given back.
    """

    __slots__ = ("_actor", "_place", "_previous", "_previous_actor", "_runner", "_top", "closed", "leased", "tenant")

    def __init__(self, tenant: Tenant | None, actor: Actor | None = None) -> None:
        self.tenant = tenant
        self.closed = False
        self.leased: dict[Lease, Lessor] = {}
        self._actor = actor
        self._previous: Binding | None = None
        self._runner: _Runner = (0, None)  # who entered it last
        self._previous_actor: Actor | None = None
        self._top: Binding | None = None  # the innermost block in a body that is suspended, if that is not this one
        self._place = traceback.extract_stack(limit=12)[:-1] if _watch.on else None

    def __enter__(self) -> Binding:
        self._previous, self._runner = _bound.get(), _runner()
        _bound.set(self._top or self)
        if self._actor is not None:
            self._previous_actor = _actor.get()
            _actor.set(self._actor)
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *exc: object) -> None:
        outer = self._previous
        self.end(outer, self._leave() or (), failing=kind is not None)

    @contextmanager
    def active(self) -> Iterator[None]:
        """One step. Blocks that the body has entered and not left are its own: nobody else sees them until its next step."""
        self.__enter__()
        try:
            yield
        finally:
            inside = self._leave()
            if inside is not None:
                self._top = inside[0] if inside else None

    def _leave(self) -> list[Binding] | None:
        """Bind what was bound before. Returns the blocks inside this one that have not been left, the innermost first; None where this one
        is not bound here at all."""
        # No token: the exit may run in another context (an async generator closed by another task), where a reset would raise, and
        # where the variable is somebody else's.
        top, entered_here = _bound.get(), self._runner == _runner()
        inside: list[Binding] | None = []
        if top is not self:  # a task that inherited this block has it below blocks of its own, which are none of ours
            inside = self._inside(top) if entered_here else None
        if inside is not None:
            _bound.set(self._previous)
        if entered_here:  # elsewhere it stays, for the context that this was bound in: see `_here`
            self._previous = None
        if self._actor is not None and self._previous_actor is not None and _actor.get() is self._actor:
            _actor.set(self._previous_actor)
        return inside

    def _inside(self, top: Binding | None) -> list[Binding] | None:
        found: list[Binding] = []
        while top is not None:
            if top is self:
                return found
            found.append(top)
            top = top._previous
        return None

    def end_steps(self, *, failing: bool) -> None:
        """After the last of its steps: see `end`."""
        self.end(_bound.get(), self._inside(self._top) or (), failing=failing)

    def end(self, outer: Binding | None, inside: Sequence[Binding] = (), *, failing: bool = False) -> None:
        """The block has ended, with an exception where ``failing``, and with it those inside that have not been left; they are reported.
        Connections that were leased in it and are still out go over to the block around it, if that is the same tenant's; or else they
        are reported too.

        Raises: `LeftBehind`, where `watch_for_leftovers` asks for that and nothing else is raised.
        """
        self.closed = True
        if not (inside or self.leased):
            return
        blocks = [block for block in inside if not block.closed and block.tenant is not None]
        for block in inside:
            block.closed = True
            block._hand_over(self)
        if self.leased and outer is not None and not outer.closed and _same(self, outer):
            self._hand_over(outer)
        if blocks or self.leased:
            _report(self, blocks, failing=failing)

    def _hand_over(self, outer: Binding) -> None:
        for lease, lessor in list(self.leased.items()):
            if lease.binding is self:  # or else it has been given back meanwhile, by another thread
                lease.binding = outer
                outer.leased[lease] = lessor
        self.leased.clear()


_bound: ContextVar[Binding | None] = ContextVar("tenantdb_bound", default=None)
_actor: ContextVar[Actor] = ContextVar("tenantdb_actor", default=Actor())


_Runner = tuple[int, int | None]


def _runner() -> _Runner:
    """Which thread and which task this is."""
    loop = _get_running_loop()
    return get_ident(), None if loop is None else id(current_task(loop))


def _here() -> Binding | None:
    """What is bound here. A block that was left in another context is still in the variable of the one that it was entered in, where the
    block around it holds again; not in those that only inherited it, unless it is of the same tenant."""
    binding = _bound.get()
    while binding is not None and binding.closed and (outer := binding._previous) is not None:
        task = binding._runner[1]
        if not (_same(binding, outer) or (task is not None and binding._runner == _runner())):
            break
        binding = outer
    return binding


def _same(one: Binding, other: Binding) -> bool:
    return one.tenant is not None and other.tenant is not None and one.tenant.id == other.tenant.id


def current_tenant() -> Tenant:
    """The tenant bound here. Raises: `NoTenantBound`; `TenantContextClosed` in a task or thread that outlived the block that bound it."""
    binding = _here()
    if binding is None or binding.tenant is None:
        raise NoTenantBound
    if binding.closed:
        raise TenantContextClosed(binding.tenant.slug)
    return binding.tenant


def bound_or_none() -> Tenant | None:
    """The tenant bound here, or None: for logs and other readers that must not fail."""
    binding = _here()
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


def unbound() -> Binding:
    """``with unbound(): ...``: no tenant is bound in this block, whatever is bound around it. Where a request begins."""
    return Binding(None)


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

    def __exit__(self, *exc: Any) -> None:
        binding, self._open = self._open, None
        if binding is not None:
            binding.__exit__(*exc)

    async def __aexit__(self, *exc: Any) -> None:
        self.__exit__(*exc)

    def _bind(self, tenant: Tenant) -> Tenant:
        if self._open is not None:
            raise RuntimeError("this tenant_context is open already; make another for a nested block")
        self._open = bind(tenant, switch=self._switch).__enter__()
        return tenant

    def __call__(self, fn: Callable[P, R]) -> Callable[P, R]:
        return cast("Callable[P, R]", functools.wraps(fn)(_wrapped(self, fn)))

    def _begin(self) -> Binding:
        return bind(self._tenants.servable(self._key), switch=self._switch)

    async def _abegin(self) -> Binding:
        return bind(await self._tenants.aservable(self._key), switch=self._switch)


# -- functions of every kind -----------------------------------------------------------------------------------------------------------


class Bindings(Protocol):
    """Makes a binding for each call of a function."""

    def _begin(self) -> Binding: ...
    async def _abegin(self) -> Binding: ...


def _call(bindings: Bindings, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    with bindings._begin():
        return fn(*args, **kwargs)


async def _call_coroutine(bindings: Bindings, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    with await bindings._abegin():
        return await fn(*args, **kwargs)


def _stepping(begin: Callable[..., tuple[Binding, Any]]) -> Callable[..., Generator[Any, Any, Any]]:
    """A generator function that binds while the body of another runs."""

    def call(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        binding, generator = begin(*args, **kwargs)
        step: Callable[[], Any] = functools.partial(next, generator)
        failing = True
        try:
            while True:
                with binding.active():
                    try:
                        item = step()
                    except StopIteration as stop:
                        failing = False
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
            binding.end_steps(failing=failing)

    return call


def _stepping_async(begin: Callable[..., Awaitable[tuple[Binding, Any]]]) -> Callable[..., AsyncGenerator[Any, Any]]:
    """The same for async generators."""

    async def call(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        binding, generator = await begin(*args, **kwargs)
        step: Callable[[], Awaitable[Any]] = generator.__anext__
        failing = True
        try:
            while True:
                with binding.active():
                    try:
                        item = await step()
                    except StopAsyncIteration:
                        failing = False
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
            binding.end_steps(failing=failing)

    return call


def _begin(bindings: Bindings, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> tuple[Binding, Any]:
    return bindings._begin(), fn(*args, **kwargs)


async def _abegin(bindings: Bindings, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> tuple[Binding, Any]:
    return await bindings._abegin(), fn(*args, **kwargs)


_generate = _stepping(_begin)
_agenerate = _stepping_async(_abegin)
_generate.__qualname__, _agenerate.__qualname__ = "_generate", "_agenerate"  # by which they are found when they are unpickled


def _kind(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Which of the four calls a function of this kind; also where it is an object that is called like one."""
    for given in (fn,) if inspect.isclass(fn) else (fn, getattr(fn, "__call__", None)):  # noqa: B004
        if inspect.isasyncgenfunction(given):
            return _agenerate
        if inspect.iscoroutinefunction(given):
            return _call_coroutine
        if inspect.isgeneratorfunction(given):
            return _generate
    return _call


def _wrapped(bindings: Bindings, fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function, which becomes a method in a class and is known by its kind to every framework."""
    kind = _kind(fn)
    if kind is _agenerate:
        return _stepping_async(functools.partial(_abegin, bindings, fn))
    if kind is _generate:
        return _stepping(functools.partial(_begin, bindings, fn))
    if kind is _call_coroutine:

        async def call_coroutine(*args: Any, **kwargs: Any) -> Any:
            return await _call_coroutine(bindings, fn, *args, **kwargs)

        return call_coroutine

    def call(*args: Any, **kwargs: Any) -> Any:
        return _call(bindings, fn, *args, **kwargs)

    return call


@dataclass(frozen=True, slots=True)
class _Captured:
    tenant: Tenant
    actor: Actor

    def _begin(self) -> Binding:
        return Binding(self.tenant, self.actor)

    async def _abegin(self) -> Binding:
        return self._begin()


def bind_tenant(fn: Callable[P, R]) -> Callable[P, R]:
    """``fn`` with the tenant and the actor of now: for a thread, an executor, another process, or a task that outlives the request.

        executor.submit(bind_tenant(send_reminders), patient.id)

    Each call binds them anew, whatever is bound where it is called, for as long as it runs; a session in it is refused as ever when the
    tenant is suspended meanwhile. It is of the kind that ``fn`` is: a function, a coroutine function, a generator function of either
    colour. It can be pickled where ``fn`` can. Raises: `NoTenantBound`, `TenantContextClosed`, here and not when it is called.
    """
    made = functools.partial(_kind(fn), _Captured(current_tenant(), current_actor()), fn)
    # Not the annotations: what they hold need not be picklable, and the signature is found by way of __wrapped__.
    return cast("Callable[P, R]", functools.update_wrapper(made, fn, ("__module__", "__name__", "__qualname__", "__doc__"), ()))


# -- what is left behind ---------------------------------------------------------------------------------------------------------------


class Lease(Protocol):
    """A connection in somebody's hands, and the block that it was taken in."""

    binding: Binding | None

    def __hash__(self) -> int: ...


class Lessor(Protocol):
    def left_behind(self, lease: Any, binding: Binding) -> str | None:
        """Tell of a lease that is still out when its block has ended. Returns where it was taken, ``""`` where that was not remembered, and
        None where it has been given back after all."""


@dataclass
class _Watch:
    on: bool = False
    strict: bool = False


_watch = _Watch()


def is_watched() -> bool:
    """Whether to remember where every connection is leased and every tenant bound."""
    return _watch.on


def leasing_block() -> Binding | None:
    """The block that a lease which begins now belongs to."""
    binding = _bound.get()
    return None if binding is None or binding.closed or binding.tenant is None else binding


@contextmanager
def watch_for_leftovers(*, strict: bool = True) -> Iterator[None]:
    """For tests: in this block, in all threads, it is remembered where every connection was leased and every tenant bound. With ``strict``
    what is left behind when a block ends is an error, `LeftBehind`, rather than a warning in the log; and a block that was entered in this
    one and is not left is found at its end.
    """
    before, kept = _bound.get(), (_watch.on, _watch.strict)
    _watch.on, _watch.strict = True, strict
    try:
        yield
        inside, top = [], _bound.get()
        while top is not None and top is not before:
            inside.append(top)
            top = top._previous
        if top is before:
            _bound.set(before)
            Binding(None).end(before, inside)
    finally:
        _watch.on, _watch.strict = kept


def _report(binding: Binding, blocks: list[Binding], *, failing: bool) -> None:
    leases = [(lease, lessor.left_behind(lease, binding)) for lease, lessor in list(binding.leased.items())]
    binding.leased.clear()
    places = [place for _, place in leases if place is not None]
    tenant = binding.tenant or (blocks[0].tenant if blocks else None)
    if tenant is None or not (places or blocks):
        return
    error = LeftBehind(tenant.slug, len(places), len(blocks), "".join([*places, *(_shown(block._place) for block in blocks)]))
    if _watch.strict and not failing:
        raise error
    log.warning("tenant %s: %s", tenant.id, error.explain())


def _shown(place: list[traceback.FrameSummary] | None) -> str:
    return "" if place is None else "".join(traceback.format_list(place))


# -- who acts --------------------------------------------------------------------------------------------------------------------------


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


class TenantLogFilter(logging.Filter):
    """Gives every log record ``tenant`` and ``tenant_id``, the slug and id of the bound tenant, or ``-``.

    Add it to a handler, so that records of every logger pass it: ``handler.addFilter(TenantLogFilter())``.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        tenant = bound_or_none()
        record.tenant = tenant.slug if tenant else "-"
        record.tenant_id = str(tenant.id) if tenant else "-"
        return True
