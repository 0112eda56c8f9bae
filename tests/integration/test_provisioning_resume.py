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
from unittest.mock import patch

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from tenantdb import Tenant, TenantDB
from tenantdb.backends.postgresql.workshop import PostgreSQLWorkshop
from tenantdb.errors import ProvisioningError, TenantExists, TenantNotFound, TenantNotReady
from tenantdb.model import TenantState
from tenantdb.provisioning.work import Work
from tenantdb.registry.operations import PROVISION, PURGE, OperationState, OperationStore
from tests import procedures
from tests.integration.cluster import KEY, Cluster, Scripts, ask, end_lease
from tests.world import eventually

OpenDB = Callable[..., TenantDB]
NAMES = [*procedures.steps_of(PROVISION), procedures.END]
ANSWER_LOST = "served and done, the answer is lost"


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
def census(cluster: Cluster, db: TenantDB) -> Callable[[], tuple[set[str], set[str]]]:
    """Databases and roles that were not there when the test began, beside golden ones."""
    databases, roles = cluster.databases(), cluster.roles()

    def look() -> tuple[set[str], set[str]]:
        golden = db._registry.templates.list()
        return (
            cluster.databases() - databases - {template.database for template in golden},
            cluster.roles() - roles - {str(template.owner_role) for template in golden},
        )

    return look


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


def boom(*_: Any) -> None:
    raise Boom


INSIDE: dict[str, Callable[[TenantDB], Any]] = {
    "names are written, the answer is lost": lambda db: patch.object(OperationStore, "record", calls_then_raises(OperationStore.record)),
    "nothing is made yet": lambda db: procedures.meanwhile(PostgreSQLWorkshop, "create_database", boom),
    "a database without roles": lambda db: procedures.meanwhile(PostgreSQLWorkshop, "create_roles", boom),
    "roles that may not enter": lambda db: procedures.meanwhile(PostgreSQLWorkshop, "open_database", boom),
    "roles that may enter, and own nothing": lambda db: procedures.meanwhile(PostgreSQLWorkshop, "fit", boom),
    "all is in order, and nobody looked": lambda db: procedures.meanwhile(PostgreSQLWorkshop, "verify", boom),
    "half a seed": lambda db: patch.object(db._hooks, "seeds", [sow_and_raise]),
    "refused": lambda db: patch.dict(db._hooks._hooks, before_activate=[boom]),
    ANSWER_LOST: lambda db: patch.object(OperationStore, "finish", calls_then_raises(OperationStore.finish)),
}
"""What can go wrong in the middle of a step."""


def break_step(db: TenantDB, where: str) -> Any:
    """Make provisioning raise: before a step does anything, in the middle of one, or when it has done all and the journal does not know."""
    if where in INSIDE:
        return INSIDE[where](db)
    point, _, step = where.partition(" ")
    return (procedures.before if point == "before" else procedures.after)(step, boom)


REQUESTS: dict[str, dict[str, Any]] = {"same-call": {}, "key": {"idempotency_key": "sign-up of {}"}, "exist-ok": {"exist_ok": True}}
FAULTS = [*(f"{point} {name}" for name in NAMES for point in ("before", "after")), *INSIDE]
EACH_ONCE = {*zip(FAULTS, itertools.cycle(REQUESTS), strict=False), (ANSWER_LOST, "same-call")}
SWEEP = [case if case in EACH_ONCE else pytest.param(*case, marks=pytest.mark.long) for case in itertools.product(FAULTS, REQUESTS)]


@pytest.mark.parametrize(("where", "how"), SWEEP)
def test_after_an_error_anywhere_the_same_call_finishes(
    slug: str, db: TenantDB, whole: Callable[[Tenant], None], where: str, how: str
) -> None:
    request = {name: value.format(slug) if isinstance(value, str) else value for name, value in REQUESTS[how].items()}
    db.seed(sow)
    with break_step(db, where):
        with pytest.raises(ProvisioningError, match="Boom") as failure:
            db.provision(slug, **request)
    failed = db.tenants.get(slug)
    if where != ANSWER_LOST:
        assert failed.state is TenantState.FAILED
        assert str(failed.reason).startswith(f"{failure.value.step}: Boom")

    if where == ANSWER_LOST and how == "same-call":  # it is served already, and a call without a key is anybody's
        with pytest.raises(TenantExists):
            db.provision(slug, **request)
    else:
        assert db.provision(slug, **request).id == failed.id

    whole(db.tenants.get(slug))


def test_it_may_fail_many_times_and_anywhere(slug: str, db: TenantDB, whole: Callable[[Tenant], None]) -> None:
    db.seed(sow)
    for where in ("before reserve", *INSIDE):
        if where not in ("refused", ANSWER_LOST):
            with break_step(db, where), pytest.raises(ProvisioningError):
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
    with pytest.raises(ProvisioningError, match="'database': UndefinedTable"):  # of the golden database, of which nothing is left
        db.provision(slug)
    assert [str(template.state) for template in db._registry.templates.list() if template.revision == "002"] == []
    failed = db.tenants.get(slug)
    assert (failed.state, failed.revision) == (TenantState.FAILED, None)

    scripts.write("002", "001", "CREATE TABLE kept (id int)")
    tenant = db.provision(slug)

    assert (tenant.id, tenant.state, tenant.revision) == (failed.id, TenantState.ACTIVE, "002")
    with db.session(slug) as session:
        assert session.execute(text("SELECT count(*) FROM kept")).scalar() == 0


def test_an_interrupted_drop_leaves_an_invalid_database_that_is_replaced(
    slug: str, cluster: Cluster, db: TenantDB, whole: Callable[[Tenant], None]
) -> None:
    db.seed(sow)
    with break_step(db, "after database"), pytest.raises(ProvisioningError):
        db.provision(slug)
    name = db.tenants.get(slug).database
    cluster.sql("UPDATE pg_database SET datconnlimit = -2 WHERE datname = %s", [name])

    tenant = db.provision(slug)

    assert tenant.database == name
    whole(tenant)


def test_what_was_done_is_in_the_audit_log(slug: str, db: TenantDB) -> None:
    with break_step(db, "before seed"), pytest.raises(ProvisioningError):
        db.provision(slug)
    db.provision(slug)

    actions = [entry.action for entry in reversed(db.audit.list(slug))]
    assert [action for action in actions if action.startswith("tenant.")] == [
        "tenant.sign_up",
        "tenant.fail",
        "tenant.retry",
        "tenant.provision",
    ]
    assert [(entry.action, entry.outcome) for entry in reversed(db.audit.list(slug)) if entry.action.startswith("operation.")] == [
        ("operation.provision", "failed"),
    ]


# -- death -----------------------------------------------------------------------------------------------------------------------------


def die(
    cluster: Cluster,
    registry: str,
    scripts: Scripts,
    slug: str,
    step: str,
    point: str,
    *,
    verb: str = "provision",
    kind: str = PROVISION,
    **arguments: Any,
) -> None:
    """Work on a tenant in a process of its own that is killed, as by the kernel, at a step."""
    settings = cluster.tenantdb_arguments(registry) | {"secret_keys": [KEY], "migrations": str(scripts)}
    order = {"settings": settings, "slug": slug, "step": step, "point": point, "verb": verb, "kind": kind, "arguments": arguments}
    child = subprocess.run(
        [sys.executable, "-m", "tests.integration.dying"],
        cwd=Path(__file__).parents[2],
        input=json.dumps(order),
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr


def moved_away(cluster: Cluster, registry: str) -> None:
    """As if the worker had been on another machine, of which nobody here can tell whether it lives."""
    cluster.sql("UPDATE tenantdb_operations SET worker = 'elsewhere/1/1/abcd/1' WHERE state = 'running'", database=registry)


@pytest.mark.parametrize(
    ("step", "point", "finisher", "where"),
    [
        ("database", "inside", "worker", "here"),
        ("database", "after", "same-call", "elsewhere"),
        ("seed", "before", "resume", "here"),
        ("seed", "inside", "same-call", "here"),
        (procedures.END, "before", "worker", "elsewhere"),
        (procedures.END, "after", "resume", "elsewhere"),
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
    where: str,
) -> None:
    db.seed(sow)
    die(cluster, registry, scripts, slug, step, point)
    dead = db.tenants.get(slug)
    assert dead.state is TenantState.PROVISIONING
    assert dead.database is not None
    with pytest.raises(TenantNotReady):
        with db.session(slug) as session:
            session.execute(text("SELECT 1"))

    if where == "elsewhere":  # the dead worker's lease still runs
        moved_away(cluster, registry)
        assert db.work() == 0
        assert (slug, PROVISION) in db.resume().in_progress
        with pytest.raises(TenantExists):
            db.provision(slug)
        end_lease(cluster, registry)
    if finisher == "worker":
        assert db.work() == 1
    elif finisher == "resume":
        assert db.resume().finished == ((slug, PROVISION),)
    else:
        assert db.provision(slug).id == dead.id

    whole(db.tenants.get(slug))


@pytest.mark.parametrize("step", ["fence", "database", "roles"])
@pytest.mark.parametrize("point", ["before", "after"])
def test_a_process_killed_while_it_purges_is_finished_by_resume(
    slug: str, cluster: Cluster, registry: str, scripts: Scripts, db: TenantDB, census: Callable[[], Any], step: str, point: str
) -> None:
    neighbour = db.provision(f"{slug}-b")
    tenant = db.provision(slug)
    db.delete(slug)
    die(cluster, registry, scripts, slug, step, point, verb="purge", kind=PURGE, confirm=slug, immediately=True)
    assert db.tenants.get(slug).state is TenantState.PURGING
    with pytest.raises(TenantNotFound):
        db.engine(slug)

    assert db.resume().finished == ((slug, PURGE),)

    assert census() == ({neighbour.database}, {neighbour.owner_role, neighbour.runtime_role})
    assert db.tenants.certificate(tenant.id)["tenant"] == str(tenant.id)
    assert db.resume().finished == ()


def test_a_process_killed_right_after_sign_up_leaves_a_slug_that_is_not_lost(
    slug: str, cluster: Cluster, registry: str, scripts: Scripts, db: TenantDB, whole: Callable[[Tenant], None]
) -> None:
    db.seed(sow)
    die(cluster, registry, scripts, slug, "sign-up", "after")
    moved_away(cluster, registry)
    with pytest.raises(TenantExists):  # it may be at work
        db.provision(slug)

    end_lease(cluster, registry)

    whole(db.provision(slug))


def test_what_nobody_took_up_for_long_may_be_asked_for_again(
    slug: str, cluster: Cluster, registry: str, open_db: OpenDB, db: TenantDB, whole: Callable[[Tenant], None]
) -> None:
    db.seed(sow)
    open_db(admin=False, provisioner=False).provision(slug)
    with pytest.raises(TenantExists):  # a worker may be about to take it up
        db.provision(slug)

    cluster.sql("UPDATE tenantdb_operations SET created_at = created_at - interval '2 minutes'", database=registry)

    whole(db.provision(slug))


def test_a_worker_that_slept_past_its_lease_changes_nothing_any_more(
    slug: str, cluster: Cluster, registry: str, open_db: OpenDB, whole: Callable[[Tenant], None], db: TenantDB
) -> None:
    db.seed(sow)
    other = open_db()
    other.seed(sow)
    slept: list[str] = []

    def overtaken(work: Work) -> None:
        if not slept:
            slept.append(slug)
            end_lease(cluster, registry)
            assert other.work() == 1

    with procedures.before("seed", overtaken), pytest.raises(ProvisioningError, match="is active and cannot become active"):
        db.provision(slug)

    whole(db.tenants.get(slug))


def test_the_provisioners_sessions_are_gone_afterwards(slug: str, cluster: Cluster, db: TenantDB) -> None:
    db.provision(slug)

    count = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'tenantdb_prov'"
    eventually(lambda: ask(cluster.server.url(), count) == [(0,)])
