"""Real workers: processes, threads and a loop of their own, over a real Redis. Each tells which database its sessions reached."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from celery import chain, chord, group
from celery._state import _set_current_app

from tenantdb import Tenant, TenantDB
from tenantdb.celery.stamps import HEADER
from tenantdb.errors import SomeTenantsFailed, TaskRefused, TenantDBError, TenantSuspended
from tenantdb.testing.isolation import check_isolation
from tests.adapters.redis_server import redis_server
from tests.world import PostgreSQLWorld, SQLiteWorld, World

pytestmark = pytest.mark.services
ROOT = Path(__file__).parents[2]
PATIENCE = 60  # seconds for a result


@pytest.fixture(scope="module")
def redis() -> Iterator[str]:
    with redis_server() as url:
        yield url


class Installation(SimpleNamespace):
    """``app`` is the module of the application, as it is in this process; ``pool`` the worker's."""

    pool: str
    world: World
    db: TenantDB
    app: ModuleType
    tenants: dict[str, Tenant]
    worker: subprocess.Popen[str]
    log: list[str]

    def places(self, result: Any, slug: str) -> list[dict[str, Any]]:
        """What the tasks behind a result saw, after looking that all were at this tenant's database."""
        seen: list[dict[str, Any]] = result.get(timeout=PATIENCE)
        database = self.tenants[slug].database
        assert database is not None
        assert [(place["slug"], database in place["database"]) for place in seen] == [(slug, True)] * len(seen)
        return seen

    def stop(self) -> None:
        self.worker.send_signal(signal.SIGTERM)
        assert self.worker.wait(timeout=PATIENCE) == 0, "".join(self.log)


@pytest.fixture(scope="module", params=["prefork", "threads", "solo"])
def there(request: pytest.FixtureRequest, redis: str) -> Iterator[Installation]:
    """An installation with a worker: on PostgreSQL for processes, which a connection must not pass between, else on SQLite."""
    world: World = request.getfixturevalue("postgresql_world" if request.param == "prefork" else "sqlite_world")
    assert isinstance(world, PostgreSQLWorld | SQLiteWorld)
    db = world.make_db()
    tenants = {slug: db.provision(slug) for slug in ("acme", "beta", "late")}
    db.suspend("late")
    given = {"db": world.given(db), "redis": redis.replace("/0", f"/{db_number(request.param)}"), "backend": world.backend}
    given["signing_key"] = None if world.backend == "postgresql" else "a key for these tests of 32 bytes"
    with application(json.dumps(given, default=str)) as app, worker(request.param) as (process, log):
        made = Installation(pool=request.param, world=world, db=db, app=app, tenants=tenants, worker=process, log=log)
        yield made


def db_number(pool: str) -> int:
    """Each worker has a Redis database of its own."""
    return ["prefork", "threads", "solo"].index(pool)


@contextmanager
def application(given: str) -> Iterator[ModuleType]:
    """The publisher's side of it, in this process."""
    os.environ["WORKER_APP"] = given
    sys.modules.pop("tests.adapters.worker_app", None)
    module = importlib.import_module("tests.adapters.worker_app")
    try:
        yield module
    finally:
        del os.environ["WORKER_APP"]
        module.app.backend.result_consumer.stop()
        module.app.backend.remove_pending_result = lambda result: result  # one that is collected later must not look for Redis
        module.app.close()
        module.db.close()
        _set_current_app(None)


@contextmanager
def worker(pool: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "tests.adapters.worker_app",
        "worker",
        f"--pool={pool}",
        "--concurrency=2",
        "-l",
        "INFO",
    ]
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    process = subprocess.Popen([*command, *quiet], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line)
            if " ready." in line:
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(PATIENCE) and process.poll() is None, "".join(log)
        yield process, log
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
        reader.join()
        assert process.stdout is not None
        process.stdout.close()


def test_a_crowd_of_tasks_of_two_tenants_reaches_each_its_own_database(there: Installation) -> None:
    look = there.app.look
    results = [(slug, look.apply_async(tenant=slug)) for _ in range(20) for slug in ("acme", "beta")]

    for slug, result in results:
        assert len(there.places(result, slug)) == 1
    assert there.app.plain.delay().get(timeout=PATIENCE)["slug"] is None


def test_whatever_follows_a_task_stays_at_its_tenant(there: Installation) -> None:
    app = there.app
    results = []
    for slug in ("acme", "beta"):
        with there.db.tenant_context(slug):
            results += [
                (slug, 1, app.look.apply_async(countdown=0.1)),
                (slug, 2, app.look_twice.delay()),
                (slug, 3, chain(app.look.s(), app.look.s(), app.look.s()).delay()),
                (slug, 3, chord([app.look.s(), app.look.s()])(app.join.s())),
                (slug, 4, chain(app.look.s(), group(app.look.s(), app.look.si()), app.join.s()).delay()),
                (slug, 2, (app.look.s() | app.look.s().set(countdown=0.1)).delay()),
            ]

    for slug, count, result in results:
        assert len(there.places(result, slug)) == count


def test_callbacks_and_errbacks_run_for_the_tenant_too(there: Installation) -> None:
    linked, blamed = there.app.look.s().set(task_id=str(uuid4())), there.app.blame.s().set(task_id=str(uuid4()))
    there.app.look.apply_async(tenant="beta", link=linked)
    failed = there.app.fail.apply_async(tenant="acme", link_error=blamed)

    with pytest.raises(ValueError, match="acme"):
        failed.get(timeout=PATIENCE)
    assert len(there.places(there.app.app.AsyncResult(linked.options["task_id"]), "beta")) == 2
    assert len(there.places(there.app.app.AsyncResult(blamed.options["task_id"]), "acme")) == 1


def forged(there: Installation, **header: Any) -> Any:
    """A message of acme's in which somebody changed the header on its way."""
    app, result = there.app.app, there.app.app.AsyncResult(str(uuid4()))
    there.app.look.apply_async(tenant="acme", task_id=result.id, queue="intercepted")
    with app.connection_for_write() as connection, connection.channel() as channel:
        message = app.amqp.queues["intercepted"](channel).get(no_ack=True)
        message.headers[HEADER].update(header)
        app.amqp.Producer(channel).publish(
            message.payload, exchange="", routing_key="celery", serializer="json", headers=message.headers, correlation_id=result.id
        )
    return result


def test_a_forged_message_is_refused_and_an_intercepted_one_that_nobody_changed_is_not(there: Installation) -> None:
    with pytest.raises(TaskRefused, match="forged"):
        forged(there, tenant=str(there.tenants["beta"].id)).get(timeout=PATIENCE)
    with pytest.raises(TaskRefused, match="forged"):
        forged(there, at=1).get(timeout=PATIENCE)

    assert len(there.places(forged(there), "acme")) == 1


def test_a_suspended_tenants_task_fails_at_once(there: Installation) -> None:
    with pytest.raises(TenantSuspended):
        there.app.look.apply_async(tenant=there.tenants["late"]).get(timeout=PATIENCE)


def test_a_task_for_every_tenant_reports_who_failed(there: Installation) -> None:
    with pytest.raises(SomeTenantsFailed) as raised:
        there.app.look_everywhere.delay().get(timeout=PATIENCE)

    assert (raised.value.succeeded, raised.value.failures) == (1, {"beta": "ValueError: not beta"})


def test_a_child_has_connections_of_its_own_and_its_parents_live_on(there: Installation) -> None:
    seen = there.app.plain.delay().get(timeout=PATIENCE)
    places = [place for _ in range(4) for place in there.places(there.app.look.apply_async(tenant="acme"), "acme")]
    if there.pool != "prefork":
        assert {place["pid"] for place in places} == {there.worker.pid} == {seen["pid"]}
        return

    assert there.worker.pid not in {place["pid"] for place in places}
    assert seen["parent"]["pid"] == there.worker.pid
    assert seen["parent"]["backend"] not in {place["backend"] for place in places}
    assert isinstance(there.world, PostgreSQLWorld)
    with psycopg.connect(there.world.superuser_url) as superuser:
        alive = superuser.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", [seen["parent"]["backend"]]).fetchone()
    assert alive == (1,)


@pytest.mark.parametrize("leak", [False, True])
def test_threads_coroutines_and_tasks_keep_to_their_tenants_under_chaos(there: Installation, leak: bool) -> None:
    """The self-test that users can run, with tasks of a real worker among its ways."""

    def task(tenant: Tenant) -> str:
        result = there.app.whose.apply_async(tenant=tenant)
        found = result.get(timeout=PATIENCE, propagate=False)
        if not result.successful():  # its tenant was suspended, or its connection killed
            raise TenantDBError("the task failed", type(found).__name__)
        return str(found)

    def astray(tenant: Tenant) -> str:
        """A task whose publisher has another tenant in mind."""
        others = [other for other in there.db.tenants.list("active") if other.id != tenant.id and other.slug.startswith("isolation-")]
        return task(others[0]) if others else str(tenant.id)

    ways = {"celery": task, **({"a task astray": astray} if leak else {})}
    report = check_isolation(there.db, tenants=3, seconds=4, threads=3, tasks=8, ways=ways)

    assert report.ok is not leak and {crossing.way for crossing in report.crossings} == ({"a task astray"} if leak else set()), report
    assert report.checks["celery"] > 0 and report.checks["task"] > 0


def test_a_worker_that_is_stopped_has_written_down_what_it_refused(there: Installation) -> None:
    with pytest.raises(TaskRefused):
        forged(there, tenant=str(there.tenants["beta"].id)).get(timeout=PATIENCE)

    there.stop()

    entries = there.db.audit.search(action="refused.task-refused")
    assert sum(entry.details["count"] for entry in entries) == 3
    assert {entry.actor for entry in entries} == {"task:tests.adapters.worker_app.look"}
