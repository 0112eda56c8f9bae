"""A Celery application with two tasks that do nothing, one for a tenant and one for nobody, and a worker for both of them.

Run as a program, this is the worker.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from celery import Celery

from benchmarks.serving import started
from tenantdb import TenantDB
from tenantdb.celery import TenantTask, setup


class Tasks(NamedTuple):
    app: Celery
    plain: Any
    tenants: Any


def tasks(broker: str, db: TenantDB) -> Tasks:
    app = Celery("benchmarks", broker=broker, backend=broker)
    app.conf.broker_connection_retry_on_startup = True
    setup(app, db)

    @app.task(name="plain")
    def plain() -> None: ...

    @app.task(name="tenants", base=TenantTask)
    def tenants() -> None: ...

    return Tasks(app, plain, tenants)


@contextmanager
def working(broker: str, arguments: Mapping[str, Any]) -> Iterator[None]:
    """A worker process for `tasks`, with a `TenantDB` of its own."""
    with started("benchmarks.queueing", json.dumps({"broker": broker, "arguments": dict(arguments)})):
        yield


def _work() -> None:
    told = json.loads(sys.stdin.readline())
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    print("starting", flush=True)
    with TenantDB(**told["arguments"]) as db:
        app = tasks(told["broker"], db).app
        # One task at a time in the worker's own thread: with a pool of processes the pipes to them would hide what is measured.
        app.worker_main(["worker", "--pool=solo", "--loglevel=ERROR", "--without-gossip", "--without-mingle", "--without-heartbeat"])


def _stop_with_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    _work()
