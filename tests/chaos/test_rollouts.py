"""Rollouts in which everything goes wrong: runners and workers are killed, the server restarts, tenants are broken each in its own way, two
run at once, and the application goes on meanwhile. In the end everybody is at head, once; until then the report tells who is not."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import secrets
import signal
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import text, update
from sqlalchemy.exc import DBAPIError

from tenantdb import Tenant, TenantDB, errors
from tenantdb.fleet.migrations import Report
from tenantdb.fleet.rollouts import Progress
from tenantdb.registry import tables
from tenantdb.registry.rollouts import AttemptState, RolloutState
from tests.cli_process import Shell
from tests.world import PostgreSQLWorld, eventually, pg_world

pytestmark = pytest.mark.usefixtures("_quick_garbage")

ROOT = Path(__file__).parents[2]
TENANTS = 30
ENV = """
from tenantdb.migrations import run_env
from tests.conformance.app import db

run_env(db, target_metadata=None)
"""
FIRST = """
    op.create_table("things", sa.Column("id", sa.Integer, sa.Identity(), primary_key=True), sa.Column("amount", sa.Integer, nullable=False))
    op.create_table("log", sa.Column("revision", sa.String, nullable=False))
    op.execute("INSERT INTO things (amount) VALUES (1), (2), (3)")
"""
LOGGED = """    op.execute("INSERT INTO log VALUES ('{revision}')")"""


class Fleet:
    """An application with thirty tenants, whose migrations grow: `revise` adds one, which writes a line into each tenant's log."""

    def __init__(self, world: PostgreSQLWorld, folder: Path) -> None:
        self.world, self.folder, self.head = world, folder, ""
        (folder / "versions").mkdir(parents=True)
        (folder / "env.py").write_text(ENV)
        self._numbers = itertools.count(1)
        self.revise(FIRST)
        self.db = world.make_db(migrations=str(folder))
        with ThreadPoolExecutor(2) as threads:
            self.tenants = list(threads.map(self.db.provision, [f"t-{number:02}" for number in range(TENANTS)]))

    def revise(self, upgrade: str = "", head: str | None = None) -> str:
        """Write the next revision, or ``head`` anew."""
        before = self.head if head is None else self._before
        revision = f"r{next(self._numbers):03}" if head is None else head
        steps = "\n".join(filter(None, (upgrade.strip("\n"), LOGGED.format(revision=revision))))
        (self.folder / "versions" / f"{revision}.py").write_text(
            f"import sqlalchemy as sa\nfrom alembic import op\n\nrevision = {revision!r}\ndown_revision = {before or None!r}\n\n\n"
            f"def upgrade():\n{steps}\n"
        )
        self._before, self.head = before, revision
        return revision

    def process(self, **settings: Any) -> TenantDB:
        return self.world.twin(self.db, **settings)

    def ask(self, tenant: Tenant, query: str) -> list[Any]:
        """As the superuser in a tenant's database."""
        with psycopg.connect(self.world.server.url(database=tenant.database or ""), autocommit=True) as connection:
            cursor = connection.execute(query.encode())
            return cursor.fetchall() if cursor.description else []

    def times(self, tenant: Tenant) -> int:
        """How often the newest migration was carried out."""
        return int(self.ask(tenant, f"SELECT count(*) FROM log WHERE revision = '{self.head}'")[0][0])

    def revision(self, tenant: Tenant) -> str:
        return str(self.ask(tenant, "SELECT version_num FROM alembic_version")[0][0])

    def at_head(self) -> list[str]:
        """Slugs, by the databases' own word. What the registry says must agree, and what was done was done once."""
        found = []
        for tenant in self.tenants:
            if (times := self.times(tenant)) == 1:
                found.append(tenant.slug)
            assert times in (0, 1), f"{tenant.slug} was migrated {times} times"
        return found

    def mend(self) -> None:
        """After a test that failed, for the next one's sake."""
        for rollout in self.db.migrations.rollouts():
            if rollout.state not in (RolloutState.DONE, RolloutState.CANCELLED):
                self.db.migrations.cancel(rollout.id)
        with self.world.registry(self.db) as registry:
            registry.execute(update(tables.rollouts).values(lease_until=None))
        self.db.migrations.run(engine="python", verify=True, retries=20, max_consecutive=0)

    def all_at_head(self) -> None:
        assert self.at_head() == [tenant.slug for tenant in self.tenants]
        assert {self.revision(tenant) for tenant in self.tenants} == {self.head}
        assert {self.db._registry.tenants.row(tenant.id).tenant.revision for tenant in self.tenants} == {self.head}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    # What was committed must survive a crash of the server here; without fsync, because the machine does not crash.
    with pg_world(max_connections="150", autovacuum="off", synchronous_commit="on") as world:
        made = Fleet(world, tmp_path_factory.mktemp("fleet") / "schema")
        yield made
        made.db.close()


@pytest.fixture(autouse=True)
def _whole(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test leaves everybody at head, and nobody connected."""
    yield
    if "fleet" in request.fixturenames:
        fleet: Fleet = request.getfixturevalue("fleet")
        try:
            fleet.all_at_head()
        except AssertionError:
            fleet.mend()
            raise


@pytest.fixture
def process(fleet: Fleet) -> Iterator[Callable[..., TenantDB]]:
    made: list[TenantDB] = []

    def make(**settings: Any) -> TenantDB:
        made.append(fleet.process(**settings))
        return made[-1]

    yield make
    for db in made:
        db.close()


# -- killed ------------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def runner(fleet: Fleet, engine: str) -> Iterator[tuple[int, Callable[[], None]]]:
    """A process that runs a rollout to head: its id, and a wait for its first tenant. It is reaped at the end."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child makes nothing of the parent's threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            db = TenantDB(fleet.db.settings)

            def tell(told: Progress) -> None:
                if told.event == "tenant":
                    os.write(writer, b".")

            code = 0 if db.migrations.run(engine=engine, concurrency=2, progress=tell).ok else 2
        finally:
            os._exit(code)
    os.close(writer)
    try:
        yield child, lambda: (os.read(reader, 1), None)[1]
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def finish(db: TenantDB, engine: str) -> Report:
    """What an operator does who finds a rollout that somebody has left, or none."""
    newest = next(iter(db.migrations.rollouts(limit=1)), None)
    if newest is not None and newest.target == db.migrations.head:
        return db.migrations.resume()
    return db.migrations.run(engine=engine)


ROUNDS = [pytest.param(3, id="3"), pytest.param(50, id="50", marks=pytest.mark.long)]


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("engine", ["sql", "python"])
def test_a_runner_that_is_killed_at_any_moment_leaves_what_another_finishes(
    fleet: Fleet, process: Callable[..., TenantDB], engine: str, rounds: int
) -> None:
    chance = random.Random(rounds)
    for number in range(rounds):
        fleet.revise(f'    op.add_column("things", sa.Column("c_{secrets.token_hex(4)}", sa.Integer))')
        with runner(fleet, engine) as (child, first_tenant):
            if number % 3 < 2:  # in the middle of the tenants; every third time anywhere, from the plan on
                first_tenant()
                time.sleep(chance.uniform(0, 0.25))
            else:
                time.sleep(chance.uniform(0, 2.5))
            os.kill(child, signal.SIGKILL)
        report = finish(process(), engine)
        assert report.ok, report
        assert (report.done, report.failed) == (TENANTS, {}) or report.rollout is None
        fleet.all_at_head()


def workers_of(pid: int) -> list[int]:
    """The spawned workers of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("rounds", [pytest.param(1, id="1"), pytest.param(50, id="50", marks=pytest.mark.long)])
@pytest.mark.parametrize("whom", ["worker", "runner"])
def test_a_worker_process_that_is_killed_costs_nothing_and_none_outlives_its_runner(
    fleet: Fleet, process: Callable[..., TenantDB], whom: str, rounds: int
) -> None:
    chance = random.Random(rounds)
    for _ in range(rounds):
        fleet.revise()
        with runner(fleet, "processes") as (child, first_tenant):
            first_tenant()
            time.sleep(chance.uniform(0, 0.2))
            workers = workers_of(child)
            assert workers
            if whom == "worker":
                os.kill(chance.choice(workers), signal.SIGKILL)
                while is_alive(child):
                    time.sleep(0.01)
                assert os.waitstatus_to_exitcode(os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT).si_status << 8) == 0  # type: ignore[union-attr]
            else:
                os.kill(child, signal.SIGKILL)
                eventually(lambda workers=workers: not any(map(is_alive, workers)))  # type: ignore[misc]
        assert finish(process(), "python").ok
        fleet.all_at_head()


# -- broken, each in its own way -----------------------------------------------------------------------------------------------------------

UNLIKE = """
    op.add_column("things", sa.Column("{column}", sa.Integer))
    op.create_check_constraint("{column}_positive", "things", "amount > 0")
    op.execute(
        "DO $$ BEGIN IF EXISTS (SELECT 1 FROM things WHERE amount = 1000) THEN"
        " PERFORM count(*) FROM generate_series(1, 2000000000); END IF; END $$"
    )
"""


@contextlib.contextmanager
def broken(fleet: Fleet, column: str) -> Iterator[dict[str, tuple[str | None, str]]]:
    """Seven tenants: what each fails with, by slug, as an SQLSTATE and a word of the error. Mended at the end."""
    constraint, slow, locked, closed, astray, ahead, stranger = chosen = fleet.tenants[2::4][:7]
    fleet.ask(constraint, "INSERT INTO things (amount) VALUES (-1)")
    fleet.ask(slow, "INSERT INTO things (amount) VALUES (1000)")
    fleet.ask(astray, "UPDATE alembic_version SET version_num = 'astray'")
    fleet.ask(ahead, f"ALTER TABLE things ADD {column} integer")
    fleet.ask(stranger, f"UPDATE tenantdb.identity SET tenant_id = '{constraint.id}'")
    name = sql.Identifier(closed.database or "")
    with psycopg.connect(fleet.world.superuser_url, autocommit=True) as superuser:
        superuser.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(name))
        with psycopg.connect(fleet.world.server.url(database=locked.database or "")) as user:
            user.execute("SELECT count(*) FROM things")
            yield dict(
                zip(
                    [tenant.slug for tenant in chosen],
                    [
                        ("23514", "check constraint"),
                        ("57014", "statement timeout"),
                        ("55P03", "lock timeout"),
                        (None, "not currently accepting connections"),
                        (None, "astray"),
                        ("42701", "already exists"),
                        ("TD003", "another tenant"),
                    ],
                    strict=True,
                )
            )
        superuser.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(name))
    fleet.ask(constraint, "DELETE FROM things WHERE amount = -1")
    fleet.ask(slow, "DELETE FROM things WHERE amount = 1000")
    fleet.ask(astray, f"UPDATE alembic_version SET version_num = '{fleet._before}'")
    fleet.ask(ahead, f"ALTER TABLE things DROP {column}")
    fleet.ask(stranger, f"UPDATE tenantdb.identity SET tenant_id = '{stranger.id}'")


@pytest.mark.parametrize("engine", ["sql", "python"])
def test_seven_that_are_broken_fail_by_name_and_the_others_go_on(fleet: Fleet, process: Callable[..., TenantDB], engine: str) -> None:
    column = f"c_{secrets.token_hex(4)}"
    fleet.revise(UNLIKE.format(column=column))
    db = process()
    with broken(fleet, column) as expected:
        report = db.migrations.run(engine=engine, statement_timeout=0.5)
        assert (report.state, report.ok, report.done, report.waiting) == (RolloutState.DONE, False, TENANTS - 7, 0)
        assert sorted(report.failed) == sorted(expected)
        attempts = {attempt.slug: attempt for attempt in db.migrations.attempts() if attempt.state is AttemptState.FAILED}
        for slug, (sqlstate, word) in expected.items():
            assert word in report.failed[slug]
            assert attempts[slug].sqlstate == sqlstate or (sqlstate == "TD003" and engine == "python")
            assert attempts[slug].to_revision is None
    assert fleet.at_head() == [tenant.slug for tenant in fleet.tenants if tenant.slug not in expected]
    touched: list[str | None] = []
    again = db.migrations.retry(progress=lambda told: touched.append(told.tenant) if told.event == "tenant" else None)
    assert (again.ok, again.done, sorted(filter(None, touched))) == (True, TENANTS, sorted(expected))


# -- restarted -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("immediate", [False, True], ids=["restart", "crash"])
@pytest.mark.parametrize("engine", ["sql", "python"])
def test_a_server_that_restarts_in_the_middle_is_waited_for(
    fleet: Fleet, process: Callable[..., TenantDB], engine: str, immediate: bool
) -> None:
    """The registry's as well, here. Whoever waits for neither says so, and another process goes on."""
    fleet.revise()
    db = process()
    restarting: list[threading.Thread] = []

    def restart(told: Progress) -> None:
        if told.done >= 8 and not restarting:
            restarting.append(threading.Thread(target=fleet.world.server.restart, kwargs={"immediate": immediate}))
            restarting[0].start()

    try:
        report = db.migrations.run(engine=engine, concurrency=2, waves=[6] * 4, retries=8, progress=restart)
    except errors.RegistryUnavailable:
        report = None
    restarting[0].join()
    if report is not None:
        reached = set(fleet.at_head())
        assert set(report.failed).isdisjoint(reached), "it was told that somebody failed who has not"
        assert report.done == len(reached)
    if report is None or not report.ok:
        report = db.migrations.retry()
    assert (report.ok, report.done) == (True, TENANTS)


# -- two at once ---------------------------------------------------------------------------------------------------------------------------


def test_of_two_runners_at_once_one_is_refused(fleet: Fleet, process: Callable[..., TenantDB]) -> None:
    fleet.revise()
    barrier = threading.Barrier(2)

    def run(db: TenantDB) -> Report | errors.RolloutConflict:
        db.migrations.plan(engine="sql")  # what takes time is done before
        barrier.wait()
        try:
            return db.migrations.run(engine="sql", concurrency=2)
        except errors.RolloutConflict as refused:
            return refused

    with ThreadPoolExecutor(2) as threads:
        ended = list(threads.map(run, [process(), process()]))
    refused = [each for each in ended if isinstance(each, errors.RolloutConflict)]
    reports = [each for each in ended if isinstance(each, Report)]
    assert len(reports) == 1
    assert len(refused) == 1
    assert reports[0].ok
    assert reports[0].done == TENANTS


# -- under traffic -------------------------------------------------------------------------------------------------------------------------


class Traffic:
    """Threads that read and write all tenants, by statements that are prepared after a few times; every error that reaches a user."""

    def __init__(self, db: TenantDB, tenants: Sequence[Tenant], threads: int = 4) -> None:
        self.db, self.tenants = db, tenants
        self.served = 0
        self.problems: Counter[str] = Counter()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(seed,)) for seed in range(threads)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _work(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self._over.is_set():
            try:
                with self.db.begin(chance.choice(self.tenants)) as session:
                    if chance.random() < 0.5:
                        session.execute(text("SELECT id, amount FROM things ORDER BY id LIMIT 3")).all()
                    else:
                        session.scalar(text("SELECT current_database()"))
                    session.execute(text("SELECT * FROM things ORDER BY id LIMIT 3")).all()
                    session.execute(text("SELECT * FROM things WHERE id = :id"), {"id": 1}).all()
                    session.execute(
                        text("UPDATE things SET amount = amount WHERE id = :id RETURNING *"), {"id": chance.randint(1, 3)}
                    ).all()
                self.served += 1
            except (DBAPIError, errors.TenantDBError) as error:
                self.problems[f"{type(error).__name__}: {error}"[:300]] += 1

    def goes_on(self, more: int) -> None:
        target = self.served + more
        eventually(lambda: self.served >= target, within=30)


@pytest.mark.parametrize("change", ["column", "type"])
@pytest.mark.parametrize("engine", ["sql", "python"])
def test_the_application_notices_nothing(fleet: Fleet, process: Callable[..., TenantDB], engine: str, change: str) -> None:
    busy = fleet.tenants[:6]  # or nobody's statements are ever prepared
    wanted = "sa.BigInteger" if fleet.ask(busy[0], "SELECT pg_typeof(amount)::text FROM things") == [("integer",)] * 3 else "sa.Integer"
    fleet.revise(
        f'    op.add_column("things", sa.Column("c_{secrets.token_hex(4)}", sa.Integer))'
        if change == "column"
        else f'    op.alter_column("things", "amount", type_={wanted}())'
    )
    serving, deploying = process(), process()
    with Traffic(serving, busy) as traffic:
        traffic.goes_on(60 * len(busy))
        report = deploying.migrations.run(engine=engine, retries=30)
        traffic.goes_on(20 * len(busy))
    assert (report.ok, report.done) == (True, TENANTS)
    assert traffic.problems == {}


# -- Ctrl-C --------------------------------------------------------------------------------------------------------------------------------


def test_ctrl_c_finishes_what_is_under_way_and_resume_the_rest(fleet: Fleet) -> None:
    fleet.revise('    op.execute("SELECT count(*) FROM generate_series(1, 300000)")')
    given = fleet.world.given(fleet.db)
    with tempfile.TemporaryDirectory() as folder:
        shell = Shell(
            Path(folder),
            {
                "TENANTDB_URL": given["url"],
                "TENANTDB_REGISTRY_ADMIN": given["registry_admin"],
                "TENANTDB_SERVER": given["server"],
                "TENANTDB_SECRET_KEYS": given["secret_keys"][0],
                "TENANTDB_MIGRATIONS": str(fleet.folder),
            },
        )
        shell.exports["PYTHONPATH"] = os.pathsep.join((shell.environment()["PYTHONPATH"], str(ROOT)))
        with shell.popen("migrate", "--engine", "python", "--concurrency", "1", "--events") as running:
            assert running.stderr is not None
            for line in running.stderr:
                if line.startswith("{") and json.loads(line).get("event") == "tenant":
                    break
            running.send_signal(signal.SIGINT)
            printed, said = running.communicate(timeout=30)
        assert running.returncode == 3, said
        reached = fleet.at_head()
        assert 0 < len(reached) < TENANTS
        assert f"paused; migrated: {len(reached)}; failed: 0; waiting: {TENANTS - len(reached)}" in printed
        assert "tenantdb rollouts resume" in printed + said
        assert f"migrated: {TENANTS}; failed: 0" in shell.tenantdb("rollouts", "resume").stdout
        shell.assert_no_secret_printed()
