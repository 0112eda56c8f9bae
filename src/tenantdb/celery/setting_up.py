"""What makes a Celery application know the tenants, and keeps its workers clean."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import celery
from celery import signals

from tenantdb.aio import AsyncTenantDB
from tenantdb.context import _bound, bound_or_none
from tenantdb.database import TenantDB
from tenantdb.errors import ConfigError

from .publishing import JSON, Office, install, installed, office_of
from .stamps import Stamps

log = logging.getLogger("tenantdb.tasks")

_WEEK = 7 * 86400.0
_LEAST_KEY = 32  # bytes, as RFC 2104 advises for SHA-256
_VISIBILITY_TIMEOUT = 3600.0  # of the brokers that have one, where the configuration does not say


def setup(
    app: celery.Celery,
    db: TenantDB | AsyncTenantDB,
    *,
    signing_key: str | bytes | Sequence[str | bytes] | None = None,
    max_age: float = _WEEK,
) -> None:
    """Have the tasks of ``app`` run for the tenants of ``db``; once, where the application is made and configured.

    Messages are signed with a key that is derived from the secret keys. ``signing_key`` takes its place where there are none, on SQLite:
    32 bytes or more, or several, the newest first, the same in every process. ``max_age``: seconds after which a message is not executed
    any more, counted from when it was published or from its eta, whichever is later.

    Raises: `ConfigError` for a serializer other than JSON, for a ``max_age`` that redelivery can exceed, and without any key;
    `SecretKeyError` where this process has secret keys and none is for tasks.
    """
    if getattr(app, "_tenantdb_office", None) is not None:
        raise ConfigError("tenantdb.celery.setup() was called for this application before")
    if "amqp" in vars(app):
        raise ConfigError("tenantdb.celery.setup() is called before the first message is sent: where the application is made")
    db = db.sync_db if isinstance(db, AsyncTenantDB) else db
    stamps = Stamps(_keys(db, signing_key), max_age=max_age)
    _check(app, max_age)
    install(app, Office(app, db, stamps))


def _keys(db: TenantDB, given: str | bytes | Sequence[str | bytes] | None) -> list[bytes]:
    if given is None:
        keys = db._registry.keyring.task_keys()
        if not keys:
            raise ConfigError(
                "there is no key to sign the tenants of tasks with. Give secret_keys, or a key of its own: setup(app, db, signing_key=...),"
                " 32 random bytes or more, the same in every process; `tenantdb generate-key` prints one"
            )
        return keys
    listed = [given] if isinstance(given, str | bytes) else list(given)
    keys = [key.encode() if isinstance(key, str) else key for key in listed]
    if not keys or any(len(key) < _LEAST_KEY for key in keys):
        raise ConfigError(f"signing_key is shorter than {_LEAST_KEY} bytes; `tenantdb generate-key` prints one that is long enough")
    return keys


def _check(app: celery.Celery, max_age: float) -> None:
    """Raises: `ConfigError`."""
    conf = app.conf
    accepted = [conf.task_serializer, *conf.accept_content, *(conf.result_accept_content or ())]
    if not JSON.issuperset(accepted):
        raise ConfigError(
            f"task_serializer={conf.task_serializer!r} and accept_content={list(conf.accept_content)!r}: tenants' tasks are JSON alone,"
            " because whoever can write to the broker could have a pickle executed"
        )
    if conf.task_protocol != 2:
        raise ConfigError("task_protocol=1 has no headers, and the tenant travels in one: use 2")
    redelivered = (conf.broker_transport_options or {}).get("visibility_timeout", _VISIBILITY_TIMEOUT)
    if max_age <= redelivered:
        raise ConfigError(
            f"max_age={max_age:.0f} s is no longer than the broker's visibility_timeout of {redelivered:.0f} s, after which it delivers a"
            " message again: that would be refused"
        )


# -- workers ---------------------------------------------------------------------------------------------------------------------------
# What a forked child inherits it neither uses nor closes: tenantdb.forking. What is left is the end.


def _look_again(sender: Any = None, **_: Any) -> None:
    """The configuration may have changed after `setup`, and a signal's exceptions are only logged: so the worker exits."""
    app = getattr(sender, "app", None)
    if app in installed:
        try:
            _check(app, office_of(app).stamps.max_age)
        except ConfigError as error:
            raise SystemExit(str(error)) from error


def _remember(sender: Any = None, task: Any = None, **_: Any) -> None:
    if task.app in installed:
        task.request.tenantdb_found = _bound.get()


def _let_go(sender: Any = None, task: Any = None, **_: Any) -> None:
    """A plain task may bind a tenant and forget to let it go; what comes next in this thread must not find it, but what was there before:
    nothing in a worker, and around an eager task whatever its caller has bound."""
    if task.app not in installed or _bound.get() is (found := task.request.tenantdb_found):
        return
    left = bound_or_none()
    _bound.set(found)
    if left is not None:
        log.error("%s[%s] left tenant %s bound: use `with db.tenant_context(...)`", task.name, task.request.id, left.slug)


def _close_child(**_: Any) -> None:
    """The counts of what was refused are written, and connections closed."""
    for app in list(installed):
        office_of(app).db.close()


def _close(sender: Any = None, **_: Any) -> None:
    app = getattr(sender, "app", None)
    if app in installed:
        office_of(app).db.close()


signals.worker_init.connect(_look_again, weak=False)
signals.task_prerun.connect(_remember, weak=False)
signals.task_postrun.connect(_let_go, weak=False)
signals.worker_process_shutdown.connect(_close_child, weak=False)
signals.worker_shutdown.connect(_close, weak=False)
