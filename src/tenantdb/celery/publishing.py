"""For whom a task is published: decided and stamped at the one place that every message of an application passes.

A workflow runs for one tenant. What follows a task (the rest of a chain, callbacks, errbacks, the body of a chord) is published by the
worker that ran it, when its body is over and nothing is bound any more. It gets the tenant of the task that it follows, whose stamp has
been verified; so plain tasks carry a stamp as well, for those behind them. What the message itself says about its followers is not
believed: their options came through the broker, and a stamp on them would vouch for whatever somebody wrote there. For the same reason a
worker takes a tenant's *name* only where it is the tenant of the task at hand anyway. A `Tenant` cannot come out of a message.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import celery
from celery._state import get_current_worker_task
from celery.app.amqp import AMQP
from celery.utils.imports import symbol_by_name

from tenantdb.context import Actor, bound_or_none, current_actor, current_tenant
from tenantdb.database import TenantDB
from tenantdb.errors import ConfigError, TaskRefused, TenantAlreadyBound
from tenantdb.model import Tenant
from tenantdb.resolvers import tenant_key

from .stamps import EVERY_TENANT, HEADER, EveryTenant, Scope, Stamp, Stamps

JSON = frozenset({"json", "application/json"})
_OFFICE = "_tenantdb_office"
installed: weakref.WeakSet[celery.Celery] = weakref.WeakSet()
"""The applications of this process that `install` was called for."""
_UNLOCK_CHORD = "celery.chord_unlock"  # how result backends without counters wait for a chord; the body is its second argument


@dataclass(frozen=True, slots=True)
class Decided:
    """A ``tenant=`` that was decided on already. No message can hold one."""

    scope: Scope | None


Named = str | UUID | Tenant | EveryTenant | Decided | None
"""What may stand as ``tenant=``."""


@dataclass(frozen=True, slots=True)
class Follower:
    """A task that a message says is to follow: its name, and the ``tenant=`` of its options."""

    task: str
    tenant: Named


class Office:
    """What `setup` has given one Celery application."""

    def __init__(self, app: celery.Celery, db: TenantDB, stamps: Stamps) -> None:
        self.app = app
        self.db = db
        self.stamps = stamps

    # -- reading -----------------------------------------------------------------------------------------------------------------------

    def stamp_of(self, task: Any) -> Stamp:
        """The stamp of the message that ``task`` is executing. Raises: `TaskRefused`."""
        return self.stamps.verify(_header_of(task.request.headers), task.name, task.request.id, now=time.time())

    def running(self) -> Stamp | None:
        """The stamp of the task that this worker is at, body or not; None outside a worker, and where it has none that holds."""
        task = get_current_worker_task()
        if task is None:
            return None
        try:
            return self.stamp_of(task)
        except TaskRefused:
            return None

    # -- deciding ----------------------------------------------------------------------------------------------------------------------

    def decide(self, task: str, named: Named, *, task_id: str | None = None, headers: Any = None) -> Scope | None:
        """For whom ``task`` is published here, ``named`` being its ``tenant=``.

        ``headers`` are those that it is published with: where nothing else tells, they may hold the stamp of the very same task and id,
        which a worker's main process publishes again when a child has died.

        Raises: `NoTenantBound`, `TenantContextClosed`, `TenantAlreadyBound`, `TaskRefused`, and for a name `TenantNotFound` and
        `RegistryUnavailable`.
        """
        scope = self._scope(named)
        if scope is None and task_id is not None and (header := _header_of(headers)) is not None:
            with contextlib.suppress(TaskRefused):
                scope = self.stamps.verify(header, task, task_id, now=time.time()).scope
        return self._fitting(task, scope)

    def decide_message(
        self, task: str, named: Named, followers: list[Follower], *, task_id: str | None = None, headers: Any = None
    ) -> Scope | None:
        """The same for a whole message: a plain task may take its tenant from those that follow it, and none may have another.

        Raises: as `decide`.
        """
        scope = self.decide(task, named, task_id=task_id, headers=headers)
        for follower in followers:
            if follower.tenant is not None:
                theirs = self._scope(follower.tenant)
                if scope is None:
                    scope = theirs
                elif theirs != scope:
                    raise TenantAlreadyBound(_shown(scope), _shown(theirs))
        if scope is None and any(self._runs_for(follower.task) is EVERY_TENANT for follower in followers):
            scope = self._fitting(next(f.task for f in followers if self._runs_for(f.task) is EVERY_TENANT), None)
        for name in (task, *(follower.task for follower in followers)):
            self._fitting(name, scope)
        return scope

    def _scope(self, named: Named) -> Scope | None:
        """What ``tenant=`` means here; without it the bound tenant, or that of the task at hand."""
        if isinstance(named, Decided):
            return named.scope
        if isinstance(named, EveryTenant):
            return named
        bound = bound_or_none()
        here: Scope | None = None
        if bound is not None:
            here = bound.id
        elif (running := self.running()) is not None:
            here = running.scope
        if named is None:
            return here
        wanted = self.id_of(named)
        if isinstance(here, UUID) and wanted != here:
            raise TenantAlreadyBound(str(here) if bound is None else bound.slug, str(named.slug if isinstance(named, Tenant) else named))
        if wanted != here and not isinstance(named, Tenant) and _in_worker():
            raise TaskRefused(
                f"tenant={named!r} is a name, and in a worker a name may have come with anybody's message."
                " Give the Tenant, or publish in a block that binds it: with db.tenant_context(...)"
            )
        return wanted

    def id_of(self, named: str | UUID | Tenant) -> UUID:
        """Whether the tenant may be served is asked when the task runs; here only who it is."""
        key = tenant_key(named)
        if isinstance(key, UUID):
            return key
        return self.db._lookups.record(key).tenant.id

    def _fitting(self, task: str, scope: Scope | None) -> Scope | None:
        """Refuse what ``task`` cannot run for."""
        runs_for = self._runs_for(task)
        if runs_for is Tenant and not isinstance(scope, UUID):
            if scope is None:
                current_tenant()  # says why there is none
            raise TaskRefused(f"{task} runs for one tenant, and was published for {_shown(scope)}")
        if runs_for is EVERY_TENANT and scope is not EVERY_TENANT:
            if scope is None and not _in_worker():
                return EVERY_TENANT
            raise TaskRefused(
                f"{task} runs for every tenant, and was published {'in a worker' if scope is None else f'where {_shown(scope)} is bound'}."
                " If that is meant: apply_async(tenant=EVERY_TENANT)"
            )
        return scope

    def _runs_for(self, task: str) -> object:
        """`Tenant`, `EVERY_TENANT`, or None for plain tasks and those that are not known here."""
        return getattr(self.app.tasks.get(task), "runs_for", None)

    # -- stamping ----------------------------------------------------------------------------------------------------------------------

    def stamp(self, scope: Scope, task: str, task_id: str, *, eta: object = None, waits: int = 0) -> dict[str, Any]:
        """The header for a message that is published here and now, by who acts here; where nobody said, by who wanted the task at hand."""
        actor, now = current_actor(), time.time()
        if actor == Actor() and (running := self.running()) is not None:
            actor = Actor(running.actor, running.request_id)
        stamp = Stamp(scope, int(max(now, self._moment(eta, now))), actor.actor, actor.request_id, waits)
        return self.stamps.make(stamp, task, task_id)

    def _moment(self, eta: object, now: float) -> float:
        try:
            moment = datetime.fromisoformat(eta) if isinstance(eta, str) else eta
            if not isinstance(moment, datetime):
                return now
            return (moment if moment.tzinfo else moment.replace(tzinfo=self.app.timezone)).timestamp()
        except ValueError:
            return now


def install(app: celery.Celery, office: Office) -> None:
    """Have every message of ``app`` pass ``office``."""
    base: type[AMQP] = symbol_by_name(app.amqp_cls)
    setattr(app, _OFFICE, office)
    installed.add(app)
    app.amqp_cls = type(f"Stamping{base.__name__}", (_Stamping, base), {})


def office_of(app: celery.Celery) -> Office:
    """What `setup` has left. Raises: `ConfigError`."""
    office: Office | None = getattr(app, _OFFICE, None)
    if office is None:
        raise ConfigError("this Celery application does not know the tenants yet: call tenantdb.celery.setup(app, db) where it is made")
    return office


class _Stamping:
    """Mixed into an application's `AMQP`. Signals cannot do this: what a receiver raises is logged, and the message goes out."""

    app: celery.Celery

    def _create_task_sender(self) -> Callable[..., Any]:
        send = super()._create_task_sender()  # type: ignore[misc]
        office = office_of(self.app)

        def send_task_message(
            producer: Any, name: str, message: Any, *, tenant: Any = None, tenant_waited: int = 0, headers: Any = None, **options: Any
        ) -> Any:
            args, kwargs, embedded = message.body
            followers: list[Follower] = []
            if any(embedded.values()):
                embedded = {key: _without_tenants(value, followers) for key, value in embedded.items()}
            if name == _UNLOCK_CHORD:
                args = _without_tenants(args, followers)
            task_id, headers = message.headers["id"], dict(headers or {})
            scope = office.decide_message(name, tenant, followers, task_id=task_id, headers=headers)
            headers.pop(HEADER, None)
            if scope is not None:
                if options.get("serializer") not in (None, *JSON):
                    raise ConfigError(f"{name} would be sent as {options['serializer']!r}; what runs for a tenant is sent as JSON")
                headers[HEADER] = office.stamp(scope, name, task_id, eta=message.headers["eta"], waits=tenant_waited)
            return send(producer, name, message._replace(body=(args, kwargs, embedded)), headers=headers, **options)

        return send_task_message


def _without_tenants(value: Any, found: list[Follower]) -> Any:
    """A copy of signatures, however nested, whose options name no tenants; what they named is added to ``found``.

    A copy, because the application may use its signatures again.
    """
    if isinstance(value, list | tuple):
        return [_without_tenants(item, found) for item in value]
    if not (isinstance(value, Mapping) and isinstance(value.get("task"), str) and isinstance(value.get("options"), Mapping)):
        return value
    copy = dict(value)
    options = dict(value["options"])
    tenant = options.pop("tenant", None)
    found.append(Follower(value["task"], tenant))
    copy["options"] = {key: _without_tenants(option, found) for key, option in options.items()}
    if value.get("subtask_type") and isinstance(value.get("kwargs"), Mapping):  # chain, group, chord: what they are made of
        copy["kwargs"] = {key: _without_tenants(part, found) for key, part in value["kwargs"].items()}
    return copy


def _header_of(headers: Any) -> Any:
    return headers.get(HEADER) if isinstance(headers, Mapping) else None


def _in_worker() -> bool:
    """Whether this code runs in a task. Eager ones are not told apart: that a task is eager its message can claim."""
    return get_current_worker_task() is not None


def _shown(scope: Scope | None) -> str:
    return "every tenant" if scope is EVERY_TENANT else "no tenant" if scope is None else f"tenant {scope}"
