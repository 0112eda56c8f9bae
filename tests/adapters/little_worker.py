"""A Celery application with its broker in memory, and a worker that is a loop in the test's own thread: messages are real, and are executed
as a worker executes them, but nothing waits and nothing runs at the same time. What an eta or a countdown asks for is not waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import UUID, uuid4

from celery import Celery
from celery.app.task import Task
from celery.worker.request import Request
from kombu.message import Message

from tenantdb.celery import setup
from tenantdb.celery.stamps import HEADER
from tenantdb.context import bound_or_none, current_actor
from tenantdb.database import TenantDB
from tenantdb.model import Tenant

KEY = "a key for these tests of 32 bytes"
TAMPER = Callable[[Message], object]


class Shop:
    """Two tenants, a Celery application, and what its tasks saw: ``(label, slug of the bound tenant or None)`` in order."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.db = TenantDB(f"sqlite:///{folder}/central.sqlite3")
        self.db.init()
        self.acme, self.beta = self.db.provision("acme"), self.db.provision("beta")
        self.app = new_app()
        setup(self.app, self.db, **{"signing_key": KEY, **options})
        self.seen: list[tuple[Any, str | None]] = []
        self.actors: list[str] = []

    def see(self, label: Any = None) -> None:
        bound = bound_or_none()
        self.seen.append((label, bound and bound.slug))
        self.actors.append(current_actor().actor)

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
        return Request(message, app=self.app, task=task).execute()

    def state(self, task_id: str) -> tuple[str, Any]:
        result = self.app.AsyncResult(task_id)
        return result.state, result.result


def new_app(**conf: Any) -> Celery:
    app = Celery(f"shop-{uuid4().hex[:8]}", broker="memory://", backend="cache+memory://", set_as_current=False)
    # The broker in memory is one for all applications of the process.
    app.conf.update(
        task_default_queue="celery", broker_transport_options={"visibility_timeout": 60}, worker_hijack_root_logger=False, **conf
    )
    return app


@contextmanager
def new_shop(folder: Path, **options: Any) -> Iterator[Shop]:
    shop = Shop(folder, **options)
    shop.waiting()  # what another test left
    try:
        yield shop
    finally:
        shop.db.close()
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


__all__ = ["HEADER", "KEY", "Message", "Shop", "Task", "for_another", "header_of", "new_app", "new_shop", "patch", "without_header"]
