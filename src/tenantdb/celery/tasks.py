"""Tasks that run for one tenant, and tasks that run for all.

Celery calls a task whose class has a `__call__` through it, inside everything that reports failures and retries; so this is where the
tenant is bound, and whatever the body raises (`Retry`, `Ignore`, `Reject`, an error of its own) passes the end of the binding. Nothing is
kept on the task object, which all threads of a worker share.

A task is checked each time a worker takes it up, so also on each retry: its stamp, and then its tenant, which may have been suspended or
deleted since. Neither is an error of the body, so neither counts against its ``max_retries`` nor falls under its ``autoretry_for``.
"""

from __future__ import annotations

import copy
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn
from uuid import UUID

from celery import Task, shared_task
from celery.exceptions import Reject, Retry
from kombu.utils.uuid import uuid

from tenantdb.context import acting, bind, bound_or_none, current_tenant, unbound
from tenantdb.errors import (
    SomeTenantsFailed,
    SubscriptionExpired,
    TaskRefused,
    TenantDBError,
    TenantNotFound,
    TenantSuspended,
    describe,
)
from tenantdb.model import Tenant

from .publishing import Decided, office_of
from .stamps import EVERY_TENANT, HEADER, Stamp

log = logging.getLogger("tenantdb.tasks")

_LONGEST_WAIT = 300.0  # seconds between two attempts to serve a tenant that is not ready
_body: ContextVar[Any] = ContextVar("tenantdb_task_body", default=None)  # the request whose body is running here


class _Scoped(Task):  # type: ignore[misc]
    """What both kinds have in common: they are published with a stamp, and not executed without."""

    runs_for: object
    throws = (TaskRefused, TenantNotFound, TenantSuspended, SubscriptionExpired)  # logged, without a traceback

    def apply_async(
        self,
        args: Any = None,
        kwargs: Any = None,
        task_id: str | None = None,
        producer: Any = None,
        link: Any = None,
        link_error: Any = None,
        shadow: str | None = None,
        *,
        tenant: Any = None,
        **options: Any,
    ) -> Any:
        decided = Decided(office_of(self.app).decide(self.name, tenant, task_id=task_id, headers=options.get("headers")))
        return super().apply_async(args, kwargs, task_id, producer, link, link_error, shadow, tenant=decided, **options)

    def apply(
        self,
        args: Any = None,
        kwargs: Any = None,
        link: Any = None,
        link_error: Any = None,
        task_id: str | None = None,
        retries: int | None = None,
        throw: bool | None = None,
        logfile: Any = None,
        loglevel: Any = None,
        headers: Any = None,
        *,
        tenant: Any = None,
        **options: Any,
    ) -> Any:
        office, task_id = office_of(self.app), task_id or uuid()
        scope = office.decide(self.name, tenant, task_id=task_id, headers=headers)
        assert scope is not None
        headers = {**(headers or {}), HEADER: office.stamp(scope, self.name, task_id)}
        return super().apply(args, kwargs, link, link_error, task_id, retries, throw, logfile, loglevel, headers, **options)

    def delay_on_commit(self, session: Any, *args: Any, **kwargs: Any) -> None:
        """See `tenantdb.celery.delay_on_commit`."""
        from .commits import delay_on_commit

        delay_on_commit(session, self, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request = self.request
        if request.called_directly or _body.get() is request:  # a function call, maybe in the body of this very task
            return self._called(args, kwargs)
        token = _body.set(request)
        try:
            with unbound():
                try:
                    stamp = office_of(self.app).stamp_of(self)
                except TaskRefused as error:
                    self._refuse(error)
                return self._execute(stamp, args, kwargs)
        finally:
            _body.reset(token)

    def _refuse(self, error: TaskRefused) -> NoReturn:
        """Fail, so that whoever waits for the result learns why; and publish nothing of what the message says is to follow."""
        self.request.update(callbacks=None, errbacks=None, chain=None, chord=None)
        log.warning("refused %s[%s]: %s", self.name, self.request.id, error.explain())
        office_of(self.app).db.audit.refused(error.code, actor=f"task:{self.name}")
        raise error

    def _called(self, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError

    def _execute(self, stamp: Stamp, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError


class TenantTask(_Scoped):
    """A task that runs for one tenant, bound while its body runs: ``@app.task(base=TenantTask)``.

    ``apply_async(..., tenant="acme")`` names the tenant, by slug, id or `Tenant`, as do ``.s(...).set(tenant=...)`` and the options of a
    beat schedule; left out, it is the bound one. What follows the task in a chain, a chord or as a callback runs for the same tenant.
    Raises, when published: `NoTenantBound`, `TenantAlreadyBound`, and for a slug `TenantNotFound` and `RegistryUnavailable`.

    Before each execution the message's stamp is verified and the tenant is looked up. A stamp that does not hold (`TaskRefused`) and a
    tenant that is suspended or gone (`TenantSuspended`, `TenantNotFound`) fail the task, body unseen, and nothing tries again. A tenant
    that is not ready, and a registry out of reach, put it off: up to ``tenant_waits`` times, after 5 seconds, 10, 20 and so on up to five
    minutes, beside the task's own retries. Errors of the body are the task's own.
    """

    runs_for = Tenant
    tenant_waits = 10  # times that a task is put off because its tenant cannot be served now; about 25 minutes in all

    def _execute(self, stamp: Stamp, args: Any, kwargs: Any) -> Any:
        with self._serving(stamp):
            return self.run(*args, **kwargs)

    def _called(self, args: Any, kwargs: Any) -> Any:
        """For whom the code around it runs. Celery itself calls so, when a body is over: errbacks, and the tasks of map and chunks."""
        stamp = None if bound_or_none() is not None else office_of(self.app).running()
        if stamp is None or not isinstance(stamp.scope, UUID):
            current_tenant()
            return super(_Scoped, self).__call__(*args, **kwargs)
        with unbound(), self._bound(stamp, office_of(self.app).db.resolve(stamp.scope)):
            return super(_Scoped, self).__call__(*args, **kwargs)

    @contextmanager
    def _serving(self, stamp: Stamp) -> Iterator[None]:
        if not isinstance(stamp.scope, UUID):
            self._refuse(TaskRefused(f"{self.name} runs for one tenant, and its message is for every tenant"))
        db = office_of(self.app).db
        db.watch()  # here, because a forked child has to begin anew
        try:
            tenant = db.resolve(stamp.scope)
        except TenantDBError as error:
            if not error.retryable or self.request.is_eager:
                raise
            self._put_off(stamp, error)
        with self._bound(stamp, tenant):
            yield

    @contextmanager
    def _bound(self, stamp: Stamp, tenant: Tenant) -> Iterator[None]:
        with bind(tenant), acting(stamp.actor, stamp.request_id):
            yield

    def _put_off(self, stamp: Stamp, error: TenantDBError) -> NoReturn:
        waits = stamp.waits + 1
        if waits > self.tenant_waits:
            raise error
        longest = min(_LONGEST_WAIT, (error.retry_after or 5) * 2.0**stamp.waits)
        delay = random.uniform(longest / 2, longest)  # those that wait for one tenant must not all come back at once
        again = self.signature_from_request(countdown=delay, tenant_waited=waits)
        try:
            again.apply_async()
        except Exception as lost:
            raise Reject(lost, requeue=False) from lost  # as Celery's own retry
        raise Retry(exc=error, when=delay, sig=again)


class AllTenantsTask(_Scoped):
    """A task whose body runs once for each active tenant, bound: ``@app.task(base=AllTenantsTask, concurrency=4)``.

    In ``concurrency`` threads of one worker, on connections of the budget's background class; before each tenant it waits up to ``jitter``
    seconds, so that they do not all meet the same other service at once. ``select(tenant) -> bool`` chooses among them. Tenants are listed
    when the task runs, so one that was made after the schedule was written takes part. Each run has a copy of the arguments of its own;
    what it returns is dropped, and there is no ``self.request`` in it.

    One that raises does not stop the others. The result is ``{"succeeded": 98}``, or the failure `SomeTenantsFailed`, which names those
    that failed and why. Nothing tries again: have the body publish a `TenantTask` where each tenant is to have retries of its own.

    It is published where no tenant is bound; elsewhere ``apply_async(tenant=EVERY_TENANT)`` says that it is meant.
    """

    runs_for = EVERY_TENANT
    concurrency = 4
    jitter = 0.1
    select: Callable[[Tenant], bool] | None = None

    def _execute(self, stamp: Stamp, args: Any, kwargs: Any) -> dict[str, int]:
        if stamp.scope is not EVERY_TENANT:
            self._refuse(TaskRefused(f"{self.name} runs for every tenant, and its message is for one"))
        with acting(stamp.actor, stamp.request_id):
            return self._for_each(args, kwargs)

    def _called(self, args: Any, kwargs: Any) -> dict[str, int]:
        office_of(self.app).decide(self.name, None)
        with unbound():
            return self._for_each(args, kwargs)

    def _for_each(self, args: Any, kwargs: Any) -> dict[str, int]:
        select = type(self).select  # from the class, where a function that was given as an option is not a method

        def run(tenant: Tenant) -> bool:
            if select is not None and not select(tenant):
                return False
            time.sleep(random.uniform(0, self.jitter))
            self.run(*copy.deepcopy(args), **copy.deepcopy(kwargs))
            return True

        report = office_of(self.app).db.for_each(run, concurrency=self.concurrency)
        succeeded = sum(report.succeeded.values())
        if not report.ok:
            raise SomeTenantsFailed(succeeded, {slug: describe(error) for slug, error in report.failed.items()})
        return {"succeeded": succeeded}


def tenant_task(*args: Any, **options: Any) -> Any:
    """``@tenant_task``, with or without options: `celery.shared_task` with ``base=TenantTask``, for code that does not import the app."""
    return shared_task(*args, **{"base": TenantTask, **options})


def all_tenants_task(*args: Any, **options: Any) -> Any:
    """``@all_tenants_task``: `celery.shared_task` with ``base=AllTenantsTask``."""
    return shared_task(*args, **{"base": AllTenantsTask, **options})
