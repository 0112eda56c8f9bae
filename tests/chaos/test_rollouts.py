"""Rollouts in which everything goes wrong: runners and workers are killed, the server restarts, tenants are broken each in its own way, two
run at once, and the application goes on meanwhile. In the end everybody is at head, once; until then the report tells who is not.

Nothing is hit by good luck: a runner that is to be killed goes on only as far as it is let, and a server stays away until it was missed.
The tests called ``control`` take a guard away and see what it was for.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import insert, text, update
from sqlalchemy.exc import DBAPIError

from tenantdb import Tenant, TenantDB, errors
from tenantdb.fleet.migrations import Report
from tenantdb.fleet.plan import Runner
from tenantdb.fleet.rollouts import Progress
from tenantdb.fleet.upgrade import Ended
from tenantdb.migrations import sqlplan
from tenantdb.migrations.guard import guard
from tenantdb.model import TemplateState, TenantState
from tenantdb.registry import tables
from tenantdb.registry.rollouts import AttemptState, RolloutState
from tenantdb.testing import postgres
from tests.cli_process import Shell
from tests.conformance.app import MIGRATIONS
from tests.world import PostgreSQLWorld, eventually, pg_world, sqlite_world

pytestmark = pytest.mark.usefixtures("_quick_garbage")

PATIENCE = 60.0  # seconds for what takes a fraction of one, on a machine that has other things to do
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
COLUMN = '    op.add_column("things", sa.Column("c_{name}", sa.Integer))'
LOGGED = """    op.execute("INSERT INTO log VALUES ('{revision}')")"""


class Fleet:
    """An application with thirty tenants, whose migrations grow: `revise` adds one, which writes a line into each tenant's log."""

    def __init__(self, world: PostgreSQLWorld, folder: Path) -> None:
        self.world, self.folder, self.before, self.head = world, folder, "", ""
        (folder / "versions").mkdir(parents=True)
        (folder / "env.py").write_text(ENV)
        self._numbers = itertools.count(1)
        self._open: dict[str, psycopg.Connection[Any]] = {}
        self.revise(FIRST)
        self.db = world.make_db(migrations=str(folder))
        with ThreadPoolExecutor(2) as threads:
            self.tenants = list(threads.map(self.db.provision, [f"t-{number:02}" for number in range(TENANTS)]))

    def revise(self, upgrade: str = "") -> str:
        """Write the next revision."""
        self.before, self.head = self.head, f"r{next(self._numbers):03}"
        steps = "\n".join(filter(None, (upgrade.strip("\n"), LOGGED.format(revision=self.head))))
        (self.folder / "versions" / f"{self.head}.py").write_text(
            f"import os\nimport time\n\nimport sqlalchemy as sa\nfrom alembic import op\n\n"
            f"revision = {self.head!r}\ndown_revision = {self.before or None!r}\n\n\ndef upgrade():\n{steps}\n"
        )
        return self.head

    def process(self, **settings: Any) -> TenantDB:
        return self.world.twin(self.db, **settings)

    def ask(self, tenant: Tenant | None, query: str) -> list[Any]:
        """As the superuser in a tenant's database, or where no tenant is."""
        database = "postgres" if tenant is None else tenant.database or ""
        for _ in range(2):
            if database not in self._open:
                self._open[database] = psycopg.connect(self.world.server.url(database=database), autocommit=True, prepare_threshold=None)
            try:
                cursor = self._open[database].execute(query.encode())
            except psycopg.OperationalError:  # the server was restarted since
                self._open.pop(database).close()
            else:
                return cursor.fetchall() if cursor.description else []
        raise AssertionError("the server ends every connection")

    def leave(self, tenant: Tenant) -> None:
        """Whoever is to be purged must be alone."""
        if tenant.database in self._open:
            self._open.pop(tenant.database).close()

    def close(self) -> None:
        for connection in self._open.values():
            connection.close()
        self.db.close()

    def look(self, tenant: Tenant) -> tuple[str, int]:
        """The revision of a tenant's database by its own word, and how often the newest migration was carried out."""
        logged = f"SELECT count(*) FROM log WHERE revision = '{self.head}'"
        [(revision, times)] = self.ask(tenant, f"SELECT version_num, ({logged}) FROM alembic_version")
        return revision, times

    def at_head(self) -> list[str]:
        """Slugs, by the databases' own word; what was done was done once, and as a whole."""
        found = []
        for tenant in self.tenants:
            revision, times = self.look(tenant)
            assert times == (revision == self.head), f"{tenant.slug} was migrated {times} times, and is at {revision}"
            if times:
                found.append(tenant.slug)
        return found

    def recorded(self) -> list[str]:
        """The same by the registry's word."""
        return [tenant.slug for tenant in self.tenants if self.db._registry.tenants.row(tenant.id).tenant.revision == self.head]

    def all_at_head(self) -> None:
        assert self.at_head() == [tenant.slug for tenant in self.tenants]
        assert self.recorded() == [tenant.slug for tenant in self.tenants]

    def mend(self) -> None:
        """After a test that failed, for the next one's sake."""
        with self.world.registry(self.db) as registry:
            registry.execute(update(tables.rollouts).values(lease_until=None))
        for rollout in self.db.migrations.rollouts():
            if rollout.state not in (RolloutState.DONE, RolloutState.CANCELLED):
                self.db.migrations.cancel(rollout.id)
        self.db.migrations.run(engine="python", verify=True, retries=6, max_consecutive=0)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    # What was committed must survive a crash of the server here; without fsync, because the machine does not crash.
    with pg_world(max_connections="150", autovacuum="off", synchronous_commit="on") as world:
        made = Fleet(world, tmp_path_factory.mktemp("fleet") / "schema")
        yield made
        made.close()


@pytest.fixture(autouse=True)
def _whole(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test leaves everybody at head, and nobody connected."""
    yield
    if "fleet" in request.fixturenames:
        fleet: Fleet = request.getfixturevalue("fleet")
        try:
            fleet.all_at_head()
        except Exception:
            fleet.mend()
            raise


MakeProcess = Callable[..., TenantDB]


@pytest.fixture
def process(fleet: Fleet) -> Iterator[MakeProcess]:
    made: list[TenantDB] = []

    def make(**settings: Any) -> TenantDB:
        made.append(fleet.process(**settings))
        return made[-1]

    yield make
    for db in made:
        db.close()


def without(monkeypatch: pytest.MonkeyPatch, check: str) -> None:
    """Take one of its checks from what stands before every script: ``expected``, the revision, or ``identity``, the stamp."""

    def weaker(table: Any, **given: Any) -> str:
        del given[check]
        return guard(table, **given)

    monkeypatch.setattr(sqlplan, "guard", weaker)


# -- killed ------------------------------------------------------------------------------------------------------------------------------

RUNNER = """
import json
import sys

from tenantdb import TenantDB

settings, engine, before = json.loads(sys.stdin.readline())
exec(before)
db = TenantDB(**settings)


def tell(told):
    if told.event == "tenant":
        print(told.tenant, flush=True)
        sys.stdin.readline()  # at once, as far as it is let


print("begins", flush=True)
sys.exit(0 if db.migrations.run(engine=engine, concurrency=2, progress=tell).ok else 2)
"""
LEASH = TENANTS - 6  # two more may be under way


class Process:
    """One that runs a rollout to head. It stops after so many tenants, until it is let go. Killed and reaped at the end, if it is there."""

    def __init__(self, fleet: Fleet, engine: str, *, leash: int = LEASH, before: str = "") -> None:
        environment = Shell(fleet.folder).environment()
        environment["PYTHONPATH"] = os.pathsep.join((environment["PYTHONPATH"], str(ROOT)))
        command = [sys.executable, "-c", RUNNER]
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._say(json.dumps([fleet.world.given(fleet.db), engine, before]) + "\n" * (1 + leash))
        self.hears(1)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _say(self, words: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(words)
        self._process.stdin.flush()

    def hears(self, lines: int) -> None:
        """Wait until it has begun, or for so many tenants."""
        assert self._process.stdout is not None
        for _ in range(lines):
            assert self._process.stdout.readline(), "it ended too soon"

    def kill(self) -> None:
        """Wait for no more than the process itself: its workers have its output open as well."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def ends(self) -> int:
        """Let it go to the end."""
        self._process.communicate(timeout=PATIENCE)
        return self._process.returncode


def finish(db: TenantDB, engine: str) -> Report:
    """What an operator does who finds a rollout that somebody has left, or none."""
    newest = next(iter(db.migrations.rollouts(limit=1)), None)
    if newest is not None and newest.target == db.migrations.head:
        return db.migrations.resume()
    return db.migrations.run(engine=engine)


@pytest.mark.parametrize(
    "rounds", [pytest.param(3, id="3"), pytest.param(50, id="50", marks=[pytest.mark.long, pytest.mark.timeout(1800)])]
)
@pytest.mark.parametrize("engine", ["sql", "python"])
def test_a_runner_that_is_killed_at_any_moment_leaves_what_another_finishes(fleet: Fleet, engine: str, rounds: int) -> None:
    chance = random.Random(rounds)
    for number in range(rounds):
        fleet.revise(COLUMN.format(name=secrets.token_hex(4)))
        among_tenants = number % 3 < 2  # every third time anywhere, from the plan on
        with Process(fleet, engine) as runner:
            if among_tenants:
                runner.hears(chance.randint(1, LEASH))
            time.sleep(chance.uniform(0, 0.05 if among_tenants else 1.5))
            runner.kill()
        if among_tenants:
            assert 0 < len(fleet.at_head()) < TENANTS
        with fleet.process() as db:
            report = finish(db, engine)
        assert (report.ok, report.done, report.failed) == (True, TENANTS, {})
        fleet.all_at_head()


def test_control_without_the_check_of_the_revision_who_was_migrated_and_not_written_down_is_migrated_twice(
    fleet: Fleet, process: MakeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.revise()
    with Process(fleet, "sql", leash=3) as runner:
        runner.hears(4)  # the last of whom is written down no more
        runner.kill()
    unknown = set(fleet.at_head()) - set(fleet.recorded())
    assert unknown
    without(monkeypatch, "expected")
    finish(process(), "sql")
    twice = {tenant.slug for tenant in fleet.tenants if fleet.look(tenant) == (fleet.head, 2)}
    assert twice == unknown
    for tenant in fleet.tenants:
        if tenant.slug in twice:
            fleet.ask(tenant, f"DELETE FROM log WHERE revision = '{fleet.head}'; INSERT INTO log VALUES ('{fleet.head}')")


def test_a_runner_that_is_killed_while_it_builds_the_golden_database_is_waited_for_by_nobody(
    fleet: Fleet, process: MakeProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the first thing that a rollout does."""
    gate = tmp_path / "gate"
    gate.touch()
    fleet.revise(f"    while os.path.exists({str(gate)!r}):\n        time.sleep(0.01)")
    with Process(fleet, "python"):
        eventually(lambda: any(each.state is TemplateState.BUILDING for each in fleet.db._registry.templates.list()), within=PATIENCE)
    gate.unlink()
    db = process()
    with monkeypatch.context() as patched:  # control: where nobody asks whether the builder lives, its lease must end
        patched.setattr("tenantdb.provisioning.golden.dead", lambda _: [])
        patched.setattr("tenantdb.provisioning.golden._PATIENCE", 0.0)
        waited = finish(db, "python")
        assert (waited.state, waited.waiting) == (RolloutState.HALTED, TENANTS)
        assert "another process has been building" in str(waited.error)
    assert finish(db, "python").ok


def workers_of(pid: int) -> list[int]:
    """The spawned workers of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
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


@pytest.mark.parametrize(
    "rounds", [pytest.param(1, id="1"), pytest.param(50, id="50", marks=[pytest.mark.long, pytest.mark.timeout(1800)])]
)
@pytest.mark.parametrize("whom", ["worker", "runner"])
def test_a_worker_process_that_is_killed_costs_nothing_and_none_outlives_its_runner(fleet: Fleet, whom: str, rounds: int) -> None:
    chance = random.Random(rounds)
    for _ in range(rounds):
        fleet.revise()
        with Process(fleet, "processes") as runner:
            runner.hears(chance.randint(1, LEASH))
            workers = workers_of(runner.pid)
            assert workers
            if whom == "worker":
                os.kill(chance.choice(workers), signal.SIGKILL)
                assert runner.ends() == 0
            else:
                runner.kill()
                eventually(lambda workers=workers: not any(map(is_alive, workers)), within=PATIENCE)  # type: ignore[misc]
        with fleet.process() as db:
            assert finish(db, "python").ok
        fleet.all_at_head()


def test_control_a_worker_that_does_not_watch_its_runner_outlives_it(fleet: Fleet, process: MakeProcess) -> None:
    fleet.revise()
    with Process(fleet, "processes", leash=0, before="import gc, tenantdb.fleet.upgrade as it; it.end_with_parent = gc.collect") as runner:
        runner.hears(1)
        workers = workers_of(runner.pid)
        runner.kill()
    try:
        time.sleep(0.5)  # there is nothing to wait for: it stays for ever
        assert any(map(is_alive, workers))
    finally:
        for worker in filter(is_alive, workers):
            os.kill(worker, signal.SIGKILL)
    assert finish(process(), "python").ok


# -- broken, each in its own way -----------------------------------------------------------------------------------------------------------

UNLIKE = """
    op.create_table("extra_{name}", sa.Column("id", sa.Integer))
    op.create_check_constraint("amount_{name}", "things", "amount <> {number}")
    op.execute(
        "DO $$ BEGIN IF EXISTS (SELECT 1 FROM things WHERE amount = 1000) THEN"
        " PERFORM count(*) FROM generate_series(1, 2000000000); END IF; END $$"
    )
"""


@contextlib.contextmanager
def broken(fleet: Fleet, name: str, number: int) -> Iterator[dict[str, tuple[str | None, str]]]:
    """Seven tenants: what each fails with, by slug, as an SQLSTATE and words of the error. Mended at the end."""
    constraint, slow, locked, closed, astray, ahead, stranger = fleet.tenants[2::4][:7]
    fleet.ask(constraint, f"INSERT INTO things (amount) VALUES ({number})")
    fleet.ask(slow, "INSERT INTO things (amount) VALUES (1000)")
    fleet.ask(astray, "UPDATE alembic_version SET version_num = 'astray'")
    fleet.ask(ahead, f"CREATE TABLE extra_{name} ()")
    fleet.ask(stranger, f"UPDATE tenantdb.identity SET tenant_id = '{constraint.id}'")
    fleet.ask(None, f"ALTER DATABASE {closed.database} ALLOW_CONNECTIONS false")
    try:
        with psycopg.connect(fleet.world.server.url(database=locked.database or "")) as user:
            user.execute("SELECT count(*) FROM things")
            yield {
                constraint.slug: ("23514", f'constraint "amount_{name}" of table "things"'),
                slow.slug: ("57014", "QueryCanceled"),
                locked.slug: ("55P03", "LockNotAvailable"),
                closed.slug: (None, "does not accept connections"),
                astray.slug: (None, "astray"),
                ahead.slug: ("42P07", f'relation "extra_{name}" already exists'),
                stranger.slug: ("TD003", "another tenant"),
            }
    finally:
        fleet.ask(None, f"ALTER DATABASE {closed.database} ALLOW_CONNECTIONS true")
        fleet.ask(constraint, f"DELETE FROM things WHERE amount = {number}")
        fleet.ask(slow, "DELETE FROM things WHERE amount = 1000")
        fleet.ask(astray, f"UPDATE alembic_version SET version_num = '{fleet.before}'")
        fleet.ask(ahead, f"DROP TABLE extra_{name}")
        fleet.ask(stranger, f"UPDATE tenantdb.identity SET tenant_id = '{stranger.id}'")


@pytest.mark.parametrize("engine", ["sql", "python"])
def test_seven_that_are_broken_fail_by_name_and_the_others_go_on(fleet: Fleet, process: MakeProcess, engine: str) -> None:
    name, number = secrets.token_hex(4), -secrets.randbelow(2**31) - 1
    fleet.revise(UNLIKE.format(name=name, number=number))
    db = process()
    with broken(fleet, name, number) as expected:
        report = db.migrations.run(engine=engine, statement_timeout=2)
        assert (report.state, report.ok, report.done, report.waiting) == (RolloutState.DONE, False, TENANTS - 7, 0)
        assert sorted(report.failed) == sorted(expected)
        attempts = {attempt.slug: attempt for attempt in db.migrations.attempts() if attempt.state is AttemptState.FAILED}
        for slug, (sqlstate, words) in expected.items():
            assert words in report.failed[slug]
            assert attempts[slug].sqlstate == sqlstate or (sqlstate == "TD003" and engine == "python")
            assert attempts[slug].to_revision is None
            assert str(number) not in report.failed[slug]
    well = [tenant.slug for tenant in fleet.tenants if tenant.slug not in expected]
    assert fleet.at_head() == fleet.recorded() == well
    touched: list[str | None] = []
    again = process().migrations.retry(progress=lambda told: touched.append(told.tenant) if told.event == "tenant" else None)
    assert (again.ok, again.done, sorted(filter(None, touched))) == (True, TENANTS, sorted(expected))


def test_control_without_the_check_of_its_stamp_a_strangers_database_is_migrated(
    fleet: Fleet, process: MakeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.revise()
    db, stranger, other = process(), *fleet.tenants[:2]
    fleet.ask(stranger, f"UPDATE tenantdb.identity SET tenant_id = '{other.id}'")
    try:
        assert list(db.migrations.run(tenants=[stranger.slug], engine="sql").failed) == [stranger.slug]
        assert fleet.at_head() == []
        without(monkeypatch, "identity")
        assert db.migrations.retry().ok
        assert fleet.at_head() == [stranger.slug]
    finally:
        fleet.ask(stranger, f"UPDATE tenantdb.identity SET tenant_id = '{stranger.id}'")
    assert db.migrations.run(engine="sql").ok


# -- restarted -----------------------------------------------------------------------------------------------------------------------------


class Outage:
    """The server restarts after eight tenants, the registry's as well here, and comes back when somebody has missed it."""

    def __init__(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch, *, crash: bool) -> None:
        self._server, self._crash, self._missed = fleet.world.server, crash, threading.Event()
        self._thread = threading.Thread(target=lambda: self._server.restart(immediate=self._crash))
        self._begun = False
        again = postgres._Launch.on

        def later(launch: Any, port: int) -> Any:
            self._missed.wait(PATIENCE)
            return again(launch, port)

        monkeypatch.setattr(postgres._Launch, "on", later)

    def watch(self, told: Progress) -> None:
        if not self._begun and told.done >= 8:
            self._begun, before = True, self._server.pid
            self._thread.start()
            eventually(lambda: not is_alive(before), within=PATIENCE)
        elif self._begun and told.error is not None:
            self._missed.set()

    def is_over(self) -> bool:
        """Wait for its end; whether anybody has missed it."""
        missed = self._missed.is_set()
        self._missed.set()
        self._thread.join()
        return missed


@pytest.mark.parametrize("crash", [False, True], ids=["restart", "crash"])
@pytest.mark.parametrize("engine", ["sql", "python"])
def test_a_server_that_restarts_in_the_middle_is_waited_for(
    fleet: Fleet, process: MakeProcess, monkeypatch: pytest.MonkeyPatch, engine: str, crash: bool
) -> None:
    fleet.revise()
    outage = Outage(fleet, monkeypatch, crash=crash)
    report = process().migrations.run(engine=engine, concurrency=2, waves=[6] * 4, retries=8, progress=outage.watch)
    assert outage.is_over()
    assert (report.ok, report.done, report.failed) == (True, TENANTS, {})


@pytest.mark.parametrize("engine", ["sql", "python"])
def test_control_who_does_not_wait_for_a_server_says_whom_it_has_not_reached(
    fleet: Fleet, process: MakeProcess, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    fleet.revise()
    outage = Outage(fleet, monkeypatch, crash=True)
    report = process().migrations.run(engine=engine, concurrency=2, retries=0, progress=outage.watch)
    assert outage.is_over()
    reached = fleet.at_head()
    assert 8 <= len(reached) < TENANTS
    # Of one whose connection broke nobody knows whether its last message has arrived; it is told as failed, and then found at head.
    assert len(reached) - 2 <= report.done <= len(reached)
    assert report.done + len(report.failed) == TENANTS
    again = process().migrations.retry()  # one that takes no server for lost
    assert (again.ok, again.done) == (True, TENANTS)


# -- two at once ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarded", [True, False], ids=["", "control"])
def test_of_two_runners_at_once_one_is_refused(fleet: Fleet, process: MakeProcess, monkeypatch: pytest.MonkeyPatch, guarded: bool) -> None:
    """Without the guard both are at it, and each tenant is still migrated once: the guard in its database is another one."""
    fleet.revise()
    if not guarded:
        monkeypatch.setattr("tenantdb.registry.rollouts._refuse_conflict", lambda *_: None)
    start, met = threading.Barrier(2), threading.Barrier(2)  # whoever runs waits at his first tenant until the other runs or is refused

    def run(db: TenantDB) -> Report | errors.RolloutConflict:
        has_met = False

        def meet(told: Progress) -> None:
            nonlocal has_met
            if not has_met:
                has_met = True
                met.wait(PATIENCE)

        db.migrations.plan(engine="sql")  # what takes time is done before
        start.wait(PATIENCE)
        try:
            return db.migrations.run(engine="sql", concurrency=2, retries=8, progress=meet)
        except errors.RolloutConflict as refused:
            met.wait(PATIENCE)
            return refused

    with ThreadPoolExecutor(2) as threads:
        ended = list(threads.map(run, [process(), process()]))
    assert not met.broken
    refused = [each for each in ended if isinstance(each, errors.RolloutConflict)]
    reports = [each for each in ended if isinstance(each, Report)]
    assert (len(reports), len(refused)) == ((1, 1) if guarded else (2, 0))
    assert {(report.ok, report.done) for report in reports} == {(True, TENANTS)}


@pytest.mark.parametrize("how", ["run", "resume", "retry"])
def test_what_somebody_runs_nobody_else_begins_resumes_or_retries(fleet: Fleet, process: MakeProcess, how: str) -> None:
    fleet.revise()
    mine, other = process(), process()
    refused: list[Exception] = []

    def meddle(told: Progress) -> None:
        if told.event == "tenant" and not refused:
            try:
                getattr(other.migrations, how)()
            except errors.TenantDBError as error:
                refused.append(error)

    assert mine.migrations.run(engine="python", progress=meddle).done == TENANTS
    assert [type(error) for error in refused] == [errors.MigrationError if how == "retry" else errors.RolloutConflict]


# -- latecomers ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def before_release(fleet: Fleet, tmp_path: Path) -> Iterator[TenantDB]:
    """A process of the application as it is now."""
    old = shutil.copytree(fleet.folder, tmp_path / "old", ignore=shutil.ignore_patterns("__pycache__"))
    with fleet.process(migrations=str(old)) as db:
        yield db


@pytest.mark.parametrize(("engine", "guarded"), [("sql", True), ("python", True), ("sql", False)], ids=["sql", "python", "control"])
def test_a_tenant_that_is_made_meanwhile_ends_at_head(
    fleet: Fleet, process: MakeProcess, before_release: TenantDB, monkeypatch: pytest.MonkeyPatch, engine: str, guarded: bool
) -> None:
    if not guarded:
        monkeypatch.setattr("tenantdb.fleet.migrations._LATECOMERS", 0)
    fleet.revise()
    db = process()
    late: list[Tenant] = []

    def sign_up(told: Progress) -> None:
        if told.event == "tenant" and not late:
            late.extend([before_release.provision("from-the-old"), fleet.db.provision("from-the-new")])

    try:
        report = db.migrations.run(engine=engine, progress=sign_up)
        old, new = (fleet.look(tenant) for tenant in late)
        assert (report.ok, report.done) == (True, TENANTS + guarded)
        assert new == (fleet.head, 1)
        assert old == ((fleet.head, 1) if guarded else (fleet.before, 0))
        assert db.migrations.status().behind == (0 if guarded else 1)
    finally:
        for tenant in late:
            fleet.leave(tenant)
            fleet.db.delete(tenant.slug)
            fleet.db.purge(tenant.slug, confirm=tenant.slug, immediately=True)


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
        eventually(lambda: self.served >= target or bool(self.problems), within=PATIENCE)


@pytest.mark.parametrize("change", ["column", "type"])
@pytest.mark.parametrize(("engine", "guarded"), [("sql", True), ("python", True), ("sql", False)], ids=["sql", "python", "control"])
def test_the_application_notices_nothing(
    fleet: Fleet, process: MakeProcess, monkeypatch: pytest.MonkeyPatch, engine: str, guarded: bool, change: str
) -> None:
    if not guarded:
        monkeypatch.setattr("tenantdb.backends.postgresql.wire._has_star", lambda _: False)
        monkeypatch.setattr("tenantdb.backends.postgresql.wire._OUTDATED", "nobody")
    busy = fleet.tenants[:3]  # or nobody's statements are ever prepared
    wanted = "sa.BigInteger" if fleet.ask(busy[0], "SELECT pg_typeof(amount)::text FROM things") == [("integer",)] * 3 else "sa.Integer"
    fleet.revise(
        COLUMN.format(name=secrets.token_hex(4)) if change == "column" else f'    op.alter_column("things", "amount", type_={wanted}())'
    )
    serving, deploying = process(), process()
    with Traffic(serving, busy) as traffic:
        traffic.goes_on(60 * len(busy))
        report = deploying.migrations.run(engine=engine, retries=12)
        traffic.goes_on(20 * len(busy))
    assert (report.ok, report.done) == (True, TENANTS)
    if guarded:
        assert traffic.problems == {}
    else:
        assert any("cached plan must not change result type" in problem for problem in traffic.problems)


# -- Ctrl-C --------------------------------------------------------------------------------------------------------------------------------


def test_ctrl_c_finishes_what_is_under_way_and_resume_the_rest(fleet: Fleet, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    slow = fleet.tenants[10]
    fleet.revise(
        f'    while op.get_bind().scalar(sa.text("SELECT current_database()")) == {slow.database!r} and os.path.exists({str(gate)!r}):\n'
        "        time.sleep(0.01)"
    )
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
            try:
                assert running.stderr is not None
                ended = (line for line in running.stderr if line.startswith("{") and json.loads(line).get("event") == "tenant")
                assert len(list(itertools.islice(ended, 10))) == 10  # now the slow one is under way, or will be
                under_way = f"SELECT 1 FROM pg_stat_activity WHERE datname = '{slow.database}' AND xact_start IS NOT NULL"
                eventually(lambda: bool(fleet.ask(None, under_way)), within=PATIENCE)
                running.send_signal(signal.SIGINT)
                gate.unlink()
                printed, said = running.communicate(timeout=PATIENCE)
            finally:
                gate.unlink(missing_ok=True)
                running.kill()
        shell.printed += [printed, said]
        assert running.returncode == 3, said
        report = json.loads(printed)
        assert (report["state"], report["done"], report["failed"], report["waiting"]) == ("paused", 11, {}, TENANTS - 11)
        assert fleet.at_head() == fleet.recorded() == [tenant.slug for tenant in fleet.tenants[:11]]
        assert f"migrated: {TENANTS}; failed: 0" in shell.tenantdb("rollouts", "resume").stdout
        shell.assert_no_secret_printed()


# -- a thousand ----------------------------------------------------------------------------------------------------------------------------


class Instant:
    """An upgrader that has every tenant at the target at once."""

    def __init__(self, *_: object) -> None: ...

    async def one(self, record: Any, from_revision: str | None) -> Ended:
        await asyncio.sleep(0)
        return Ended(from_revision, "0001", 0.0, Runner.PYTHON)

    def rest(self) -> None: ...

    def close(self) -> None: ...


def memory_of_a_rollout(folder: Path, tenants: int) -> int:
    """Bytes at the most from its first wave on, in which so many are migrated."""
    now = tables.utcnow()
    common = {"state": TenantState.ACTIVE.value, "subscription": "trial", "metadata": {}, "version": 1, "generation": 1}
    with sqlite_world(folder) as world:
        db = world.make_db(migrations=MIGRATIONS)
        common |= {"server_id": db.servers.get("default").id, "created_at": now, "updated_at": now}
        rows = [{"id": uuid.uuid4(), "slug": f"t-{number:05}", "name": f"{number}", **common} for number in range(tenants)]
        with world.registry(db) as registry:
            registry.execute(insert(tables.tenants), rows)
        del rows

        def watch(told: Progress) -> None:
            if told.event == "wave":
                tracemalloc.start()

        try:
            report = db.migrations.run(engine="python", progress=watch)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert (report.ok, report.done) == (True, tenants)
        assert db.migrations.status().behind == 0
    return peak


@pytest.mark.parametrize("paged", [True, False], ids=["", "control"])
def test_a_rollout_holds_a_few_hundred_tenants_however_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paged: bool) -> None:
    monkeypatch.setattr("tenantdb.fleet.migrations.Upgrader", Instant)
    if not paged:
        monkeypatch.setattr("tenantdb.fleet.rollouts._PAGE", 1_000_000)
    one, three = (memory_of_a_rollout(tmp_path / str(tenants), tenants) for tenants in (1000, 3000))
    assert (three < 1.5 * one) is paged
