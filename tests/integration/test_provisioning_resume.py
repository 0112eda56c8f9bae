"""Provisioning that fails or dies anywhere is mended by running it again: one active tenant, one database, two roles, no orphan."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from tenantdb import Tenant, TenantDB
from tenantdb.backends.postgresql import scram
from tenantdb.backends.postgresql.workshop import PostgreSQLWorkshop
from tenantdb.errors import ProvisioningError, TenantExists, TenantNotReady
from tenantdb.model import TenantState
from tenantdb.provisioning import journal, steps
from tenantdb.provisioning.steps import STEPS, Work
from tenantdb.registry.operations import OperationState, OperationStore
from tenantdb.registry.tenants import TenantStore
from tests.integration.cluster import KEY, Cluster, Scripts, ask, end_lease

OpenDB = Callable[..., TenantDB]
NAMES = [name for name, _ in STEPS]


class Boom(Exception):
    """What nobody expects."""


@pytest.fixture(scope="module")
def registry(cluster: Cluster) -> str:
    """One for all tests of this file, because making a database takes its time; so each test has a slug of its own."""
    return cluster.new_registry()


@pytest.fixture
def slug() -> str:
    return f"acme-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def census(cluster: Cluster) -> Callable[[], tuple[set[str], set[str]]]:
    """Databases and roles that were not there when the test began."""
    databases, roles = cluster.databases(), cluster.roles()
    return lambda: (cluster.databases() - databases, cluster.roles() - roles)


@pytest.fixture
def whole(census: Callable[[], tuple[set[str], set[str]]], db: TenantDB) -> Callable[[Tenant], None]:
    """Asserts that a tenant is whole and alone."""

    def check(tenant: Tenant) -> None:
        assert tenant.state is TenantState.ACTIVE
        assert census() == ({tenant.database}, {tenant.owner_role, tenant.runtime_role})
        operation = db._registry.operations.for_tenant(tenant.id)
        assert operation is not None and operation.state is OperationState.DONE
        with db.session(tenant) as session:
            assert session.execute(text("SELECT line FROM notes")).scalars().all() == ["seeded"]

    return check


def sow(session: Session, tenant: Tenant) -> None:
    """A seed as the docs want it: it may run again."""
    session.execute(text("INSERT INTO notes (line) VALUES ('seeded') ON CONFLICT (line) DO NOTHING"))


def sow_and_raise(session: Session, tenant: Tenant) -> None:
    session.execute(text("INSERT INTO notes (line) VALUES ('seeded'), ('half')"))
    raise Boom


def calls_then_raises(function: Callable[..., Any]) -> Callable[..., Any]:
    def patched(*args: Any, **named: Any) -> Any:
        function(*args, **named)
        raise Boom

    return patched


def break_step(monkeypatch: pytest.MonkeyPatch, db: TenantDB, step: str, point: str) -> None:
    """Make one step raise: before it does anything, in its middle, or when all is done and the journal does not know yet."""
    if point == "inside":
        if step == "reserve":  # written, but the answer is lost
            monkeypatch.setattr(TenantStore, "reserve", calls_then_raises(TenantStore.reserve))
        elif step == "database":  # announced, not made
            monkeypatch.setattr(PostgreSQLWorkshop, "create_database", calls_then_raises(lambda *_: None))
        elif step == "roles":  # the first of two is made
            verifiers = itertools.chain([scram.verifier("a password")], iter(calls_then_raises(lambda: None), None))
            monkeypatch.setattr(scram, "verifier", lambda password: next(verifiers))
        elif step == "open":  # the roles may enter, and own nothing
            monkeypatch.setattr(PostgreSQLWorkshop, "_hand_over", calls_then_raises(lambda *_: None))
        elif step == "migrate":  # migrated, not recorded
            monkeypatch.setattr(TenantStore, "set_revision", calls_then_raises(lambda *_: None))
        elif step == "seed":
            monkeypatch.setattr(db._hooks, "seeds", [sow_and_raise])
        elif step == "verify":
            monkeypatch.setattr(PostgreSQLWorkshop, "verify", calls_then_raises(lambda *_: None))
        else:  # activated and done, but the answer is lost
            monkeypatch.setattr(OperationStore, "finish", calls_then_raises(OperationStore.finish))
        return

    def broken(work: Work) -> None:
        if point == "after":
            dict(STEPS)[step](work)
        raise Boom

    monkeypatch.setattr(journal, "STEPS", tuple((name, broken if name == step else fn) for name, fn in STEPS))


REQUESTS = ("same-call", "key", "exist-ok")
FAULTS = list(itertools.product(NAMES, ["before", "inside", "after"]))
EACH_ONCE = {(step, point, how) for (step, point), how in zip(FAULTS, itertools.cycle(REQUESTS), strict=False)} | {
    ("activate", point, "same-call") for point in ("inside", "after")
}
SWEEP = [
    case if case in EACH_ONCE else pytest.param(*case, marks=pytest.mark.long)
    for case in ((step, point, how) for (step, point), how in itertools.product(FAULTS, REQUESTS))
]


@pytest.mark.parametrize(("step", "point", "how"), SWEEP)
def test_after_an_error_anywhere_the_same_call_finishes(
    slug: str, monkeypatch: pytest.MonkeyPatch, db: TenantDB, whole: Callable[[Tenant], None], step: str, point: str, how: str
) -> None:
    requests: dict[str, dict[str, Any]] = {
        "same-call": {},
        "key": {"idempotency_key": f"sign-up of {slug}"},
        "exist-ok": {"exist_ok": True},
    }
    request = requests[how]
    db.seed(sow)
    with monkeypatch.context() as patched:
        break_step(patched, db, step, point)
        with pytest.raises(ProvisioningError) as failure:
            db.provision(slug, **request)
    failed = db.tenants.get(slug)
    assert failure.value.step == step and "Boom" in failure.value.problem
    answer_was_lost = step == "activate" and point != "before"
    if not answer_was_lost:
        assert failed.state is TenantState.FAILED
        assert str(failed.reason).startswith(f"{step}: Boom")

    if answer_was_lost and how == "same-call":  # it is served already, and a call without a key is anybody's
        with pytest.raises(TenantExists):
            db.provision(slug, **request)
    else:
        assert db.provision(slug, **request).id == failed.id

    whole(db.tenants.get(slug))


@pytest.mark.parametrize("step", ["database", "roles"])
def test_it_may_fail_at_one_step_many_times(
    slug: str, monkeypatch: pytest.MonkeyPatch, db: TenantDB, whole: Callable[[Tenant], None], step: str
) -> None:
    db.seed(sow)
    for point in ("before", "inside", "inside", "after", "before", "after"):
        with monkeypatch.context() as patched:
            break_step(patched, db, step, point)
            with pytest.raises(ProvisioningError):
                db.provision(slug)

    whole(db.provision(slug))


def test_a_seed_that_raises_leaves_nothing_and_runs_again_in_one_transaction(slug: str, db: TenantDB, census: Callable[[], Any]) -> None:
    broken = [True]

    @db.seed
    def first(session: Session, tenant: Tenant) -> None:
        session.execute(text("INSERT INTO notes (line) VALUES ('first')"))

    @db.seed
    def second(session: Session, tenant: Tenant) -> None:
        if broken:
            raise LookupError("no price list")
        session.execute(text("INSERT INTO notes (line) VALUES ('second')"))

    with pytest.raises(ProvisioningError, match="'seed': LookupError: no price list") as failure:
        db.provision(slug)
    assert isinstance(failure.value.__cause__, LookupError)
    assert db.tenants.get(slug).reason == "seed: LookupError: no price list"
    broken.clear()
    db.provision(slug)

    with db.session(slug) as session:
        assert session.execute(text("SELECT line FROM notes ORDER BY id")).scalars().all() == ["first", "second"]
    assert db.tenants.get(slug).reason is None


def test_a_migration_that_raises_leaves_the_tenant_failed_until_it_is_mended(slug: str, db: TenantDB, scripts: Scripts) -> None:
    scripts.add("002", "CREATE TABLE kept (id int)", "INSERT INTO missing VALUES (1)")
    with pytest.raises(ProvisioningError, match="'migrate': UndefinedTable"):
        db.provision(slug)
    failed = db.tenants.get(slug)
    assert (failed.state, failed.revision) == (TenantState.FAILED, None)

    scripts.write("002", "001", "CREATE TABLE kept (id int)")
    tenant = db.provision(slug)

    assert (tenant.id, tenant.state, tenant.revision) == (failed.id, TenantState.ACTIVE, "002")
    with db.session(slug) as session:
        assert session.execute(text("SELECT count(*) FROM kept")).scalar() == 0


def test_an_interrupted_drop_leaves_an_invalid_database_that_is_replaced(
    slug: str, monkeypatch: pytest.MonkeyPatch, cluster: Cluster, db: TenantDB, whole: Callable[[Tenant], None]
) -> None:
    db.seed(sow)
    with monkeypatch.context() as patched:
        break_step(patched, db, "database", "after")
        with pytest.raises(ProvisioningError):
            db.provision(slug)
    name = db.tenants.get(slug).database
    cluster.sql("UPDATE pg_database SET datconnlimit = -2 WHERE datname = %s", [name])

    tenant = db.provision(slug)

    assert tenant.database == name
    whole(tenant)


def test_what_was_done_is_in_the_audit_log(slug: str, monkeypatch: pytest.MonkeyPatch, db: TenantDB) -> None:
    with monkeypatch.context() as patched:
        break_step(patched, db, "open", "before")
        with pytest.raises(ProvisioningError):
            db.provision(slug)
    db.provision(slug)

    actions = [entry.action for entry in reversed(db.audit.list(slug))]
    assert [action for action in actions if action.startswith("tenant.")] == [
        "tenant.sign_up",
        "tenant.reserve",
        "tenant.fail",
        "tenant.retry",
        "tenant.revision",
        "tenant.provision",
    ]
    assert [(entry.action, entry.outcome) for entry in reversed(db.audit.list(slug)) if entry.action.startswith("operation.")] == [
        ("operation.provision", "failed"),
        ("operation.provision", "done"),
    ]


# -- death -----------------------------------------------------------------------------------------------------------------------------


def die(cluster: Cluster, registry: str, scripts: Scripts, slug: str, step: str, point: str) -> None:
    """Provision a tenant in a process of its own that is killed, as by the kernel, at a step."""
    settings = cluster.tenantdb_arguments(registry) | {"secret_keys": [KEY], "migrations": str(scripts)}
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("dying.py"))],
        input=json.dumps({"settings": settings, "slug": slug, "step": step, "point": point}),
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr


@pytest.mark.parametrize(
    ("step", "point", "finisher"),
    [
        ("database", "inside", "worker"),
        ("roles", "after", "same-call"),
        ("open", "after", "worker"),
        ("seed", "inside", "same-call"),
        ("activate", "before", "worker"),
    ],
)
def test_a_process_killed_at_a_step_is_replaced_by_whoever_comes_next(
    slug: str,
    cluster: Cluster,
    registry: str,
    scripts: Scripts,
    db: TenantDB,
    whole: Callable[[Tenant], None],
    step: str,
    point: str,
    finisher: str,
) -> None:
    db.seed(sow)
    die(cluster, registry, scripts, slug, step, point)
    dead = db.tenants.get(slug)
    assert dead.state is TenantState.PROVISIONING
    assert dead.database is not None
    with pytest.raises(TenantNotReady):
        with db.session(slug) as session:
            session.execute(text("SELECT 1"))

    assert db.work() == 0  # the dead worker's lease still runs
    with pytest.raises(TenantExists):
        db.provision(slug)
    end_lease(cluster, registry)
    if finisher == "worker":
        assert db.work() == 1
    else:
        assert db.provision(slug).id == dead.id

    whole(db.tenants.get(slug))


def test_a_process_killed_right_after_sign_up_leaves_a_slug_that_is_not_lost(
    slug: str, cluster: Cluster, registry: str, scripts: Scripts, db: TenantDB, whole: Callable[[Tenant], None]
) -> None:
    db.seed(sow)
    die(cluster, registry, scripts, slug, "sign-up", "after")
    with pytest.raises(TenantExists):  # a worker may be about to take it up
        db.provision(slug)

    cluster.sql("UPDATE tenantdb_operations SET created_at = created_at - interval '6 minutes'", database=registry)

    whole(db.provision(slug))


def test_a_worker_that_slept_past_its_lease_changes_nothing_any_more(
    slug: str,
    monkeypatch: pytest.MonkeyPatch,
    cluster: Cluster,
    registry: str,
    open_db: OpenDB,
    whole: Callable[[Tenant], None],
    db: TenantDB,
) -> None:
    db.seed(sow)
    other = open_db()
    other.seed(sow)

    def overtaken(work: Work) -> None:
        end_lease(cluster, registry)
        assert other.work() == 1
        dict(STEPS)["seed"](work)

    with monkeypatch.context() as patched:
        first = tuple((name, overtaken if name == "seed" else fn) for name, fn in STEPS)
        patched.setattr(journal, "STEPS", OnlyOnce(first))
        with pytest.raises(ProvisioningError, match="another process is at work"):
            db.provision(slug)

    whole(db.tenants.get(slug))


class OnlyOnce(tuple[Any, ...]):
    """Steps whose slice, which is what is run, is the broken one for the first worker only."""

    taken = False

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice) or OnlyOnce.taken:
            return tuple(steps.STEPS)[index]
        OnlyOnce.taken = True
        return super().__getitem__(index)


def test_the_provisioners_sessions_are_gone_afterwards(slug: str, cluster: Cluster, db: TenantDB) -> None:
    db.provision(slug)

    assert ask(cluster.server.url(), "SELECT count(*) FROM pg_stat_activity WHERE usename = 'tenantdb_prov'") == [(0,)]
