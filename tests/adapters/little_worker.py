"""A Celery application with its broker in memory, and a worker that is a loop in the test's own thread: messages are real, and are executed
as a worker executes them, but nothing waits and nothing runs at the same time. What an eta or a countdown asks for is not waited for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from celery import Celery
from celery._state import _set_current_app
from celery.app.task import Context
from celery.worker.request import Request
from kombu.message import Message

from tenantdb.celery import AllTenantsTask, TenantTask, setup
from tenantdb.celery.stamps import HEADER
from tenantdb.context import bound_or_none, current_actor
from tenantdb.database import TenantDB
from tenantdb.model import Tenant

KEY = "a key for these tests of 32 bytes"
TAMPER = Callable[[Message], object]


class Shop:
    """A Celery application on two tenants, and what its tasks saw: ``(label, slug of the bound tenant or None)`` in order."""

    def __init__(self, db: TenantDB, **options: Any) -> None:
        self.db = db
        self.acme, self.beta = db.tenants.get("acme"), db.tenants.get("beta")
        self.app = new_app()
        setup(self.app, db, **{"signing_key": KEY, **options})
        self.seen: list[tuple[Any, str | None]] = []
        self.actors: list[str] = []

    def see(self, label: Any = None) -> None:
        bound = bound_or_none()
        self.seen.append((label, bound and bound.slug))
        self.actors.append(current_actor().actor)

    def task(self, **options: Any) -> Any:
        """A task of this application alone: those of an ordinary one are registered with every other of the process as well."""
        return self.app.task(shared=False, **options)

    # -- the broker --

    def messages(self) -> Iterator[Message]:
        """Take what waits in the queue, one by one, also what is published meanwhile."""
        with self.app.connection_for_read() as connection, connection.channel() as channel:
            queue = self.app.amqp.queues["celery"](channel)
            queue.declare()
            while (message := queue.get(no_ack=True, accept=["json"])) is not None:
                yield message

    def waiting(self) -> list[Message]:
        return list(self.messages())

    # -- the worker --

    def work(self, tamper: TAMPER = lambda message: None) -> None:
        """Execute what waits, and what follows from it."""
        for message in self.messages():
            tamper(message)
            self.execute(message)

    def execute(self, message: Message) -> Any:
        task = self.app.tasks[message.headers["task"]]
        task.__trace__ = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of Celery's: what follows could not be published
            return Request(message, app=self.app, task=task).execute()

    def state(self, task_id: str) -> tuple[str, Any]:
        result = self.app.AsyncResult(task_id)
        return result.state, result.result


def new_app(**conf: Any) -> Celery:
    app = Celery(f"shop-{uuid4().hex[:8]}", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(broker_transport_options={"visibility_timeout": 60}, **conf)
    return app


def new_town(folder: Path) -> TenantDB:
    db = TenantDB(f"sqlite:///{folder}/central.sqlite3")
    db.init()
    db.provision("acme")
    db.provision("beta")
    return db


@contextmanager
def new_shop(db: TenantDB, **options: Any) -> Iterator[Shop]:
    shop = Shop(db, **options)
    shop.app.set_current()  # as an application is that is made in the usual way; Celery asks for it when it publishes what is in a group
    shop.waiting()  # the broker in memory is one for all applications of the process: what another test left
    try:
        yield shop
    finally:
        _set_current_app(None)
        shop.app.close()


def header_of(message: Message) -> dict[str, Any]:
    header: dict[str, Any] = message.headers[HEADER]
    return header


def without_header(message: Message) -> None:
    message.headers.pop(HEADER, None)


def for_another(tenant: Tenant | UUID) -> TAMPER:
    """Whoever can write to the broker puts another tenant in the header."""

    def forge(message: Message) -> None:
        header_of(message)["tenant"] = str(tenant.id if isinstance(tenant, Tenant) else tenant)

    return forge


class Tasks:
    """What the application of these tests has: ``see`` runs for a tenant, ``plain`` for none, and each tells the shop what it found."""

    def __init__(self, shop: Shop) -> None:
        @shop.task(base=TenantTask)
        def see(*args: Any) -> str:
            shop.see("see")
            return "seen"

        @shop.task()
        def plain(*args: Any) -> str:
            shop.see("plain")
            return "plainly seen"

        @shop.task(base=TenantTask)
        def fail(*args: Any) -> None:
            shop.see("fail")
            raise ValueError("as it should")

        @shop.task(base=TenantTask)
        def told(request: Context, error: Exception, traceback: object) -> None:
            shop.see("told")

        @shop.task(base=TenantTask, bind=True, max_retries=2)
        def again(self: Any) -> str:
            shop.see(f"attempt {self.request.retries}")
            if self.request.retries < 2:
                raise self.retry(countdown=60)
            return "at last"

        @shop.task(base=TenantTask, bind=True)
        def replaced(self: Any, *args: Any) -> Any:
            shop.see("replaced")
            return self.replace(see.s())

        @shop.task(base=AllTenantsTask, jitter=0)
        def every(*args: Any) -> None:
            shop.see("every")

        self.see, self.plain, self.fail, self.told, self.again, self.replaced, self.every = see, plain, fail, told, again, replaced, every


def what_was_seen(shop: Shop, slug: str) -> list[str]:
    """In which order, after looking that every tenant's task saw this tenant and every other task none."""
    assert {bound for label, bound in shop.seen if label != "plain"} == {slug}
    assert {bound for label, bound in shop.seen if label == "plain"} <= {None}
    return [label for label, _ in shop.seen]
