"""The Celery application of worker processes that are really others. What they and the test are made of stands in WORKER_APP, as JSON."""

from __future__ import annotations

import json
import os
from functools import partial
from typing import Any

from celery import Celery, signals
from sqlalchemy import text

from tenantdb import TenantDB
from tenantdb.celery import AllTenantsTask, TenantTask, setup
from tenantdb.context import bound_or_none, current_actor, current_tenant
from tenantdb.testing.isolation import read_marker

GIVEN = json.loads(os.environ["WORKER_APP"])

db = TenantDB(**GIVEN["db"])
app = Celery("worker_app", broker=GIVEN["redis"], backend=GIVEN["redis"])
app.conf.update(broker_connection_retry_on_startup=True, result_expires=3600, worker_prefetch_multiplier=1)
setup(app, db, signing_key=GIVEN["signing_key"])

task = partial(app.task, shared=False)  # the tests make this application several times in one process
of_the_parent: dict[str, Any] = {}


def where() -> dict[str, Any]:
    """Which tenant is bound here, which database its session reaches, and by which connection."""
    with db.session() as session:
        if GIVEN["backend"] == "postgresql":
            database, backend = session.execute(text("SELECT current_database(), pg_backend_pid()")).one()
        else:
            database, backend = session.execute(text("PRAGMA database_list")).one()[2], None
    return {"slug": current_tenant().slug, "database": database, "backend": backend, "pid": os.getpid(), "actor": current_actor().actor}


@signals.worker_init.connect
def use_the_database_before_the_fork(**_: Any) -> None:
    with db.tenant_context(db.tenants.get("acme")):
        of_the_parent.update(where())


@task(base=TenantTask)
def look(*args: Any) -> list[dict[str, Any]]:
    """What was seen before, and here."""
    before = [seen for seen in args if isinstance(seen, list)]
    return [*(place for seen in before for place in seen), where()]


@task(base=TenantTask)
def join(results: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [*(place for seen in results for place in seen), where()]


@task(base=TenantTask, bind=True, max_retries=1)
def look_twice(self: Any, first: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    if first is None:
        raise self.retry(kwargs={"first": where()}, countdown=0)
    return [first, where()]


@task(base=TenantTask)
def blame(task_id: str) -> list[dict[str, Any]]:
    """An errback of the kind that gets a result of its own."""
    return [where()]


@task(base=TenantTask)
def fail(*args: Any) -> None:
    raise ValueError(current_tenant().slug)


@task(base=AllTenantsTask, jitter=0, concurrency=2)
def look_everywhere() -> None:
    look.delay()
    if current_tenant().slug == "beta":
        raise ValueError("not beta")


@task(base=TenantTask)
def whose() -> str:
    with db.session() as session:
        return read_marker(session)


@task()
def plain(*args: Any) -> dict[str, Any]:
    bound = bound_or_none()
    return {"slug": bound and bound.slug, "parent": of_the_parent, "pid": os.getpid()}


__all__ = ["app", "blame", "db", "fail", "join", "look", "look_everywhere", "look_twice", "plain", "whose"]
