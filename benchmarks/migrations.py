"""A fleet brought from one revision to the next, against the ways in which teams do it: Alembic in a loop, processes, and SQL by hand.

The revision adds a column and an index. The same databases serve every run: a superuser looks at each of them after the run, and takes
them back. None is made or dropped in between, which would slow some filesystems down; they lie in memory, with fsync on. Rates are
compared, tenants per second, so what is slow does fewer tenants.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from sqlalchemy import URL

from benchmarks.delay import delayed
from benchmarks.measure import Result
from benchmarks.peers import migrate_by_hand as by_hand
from benchmarks.peers.migrate_by_hand import AlembicLoop, Target
from benchmarks.world import World, embedded_world, temporary_files_in_memory
from tenantdb import Tenant, TenantDB
from tenantdb.backends.postgresql import scram
from tenantdb.model import DatabaseRole
from tenantdb.registry import tables

TENANTS = 200
AT_ONCE = 8
FAR_AT_ONCE = 16  # who waits for a network can have more of them under way
FAR_SECONDS = 0.005
OLD, NEW = "before", "after"
STATEMENTS = (
    "ALTER TABLE patients ADD COLUMN recall_on DATE",
    "CREATE INDEX patients_recall_on_idx ON patients (recall_on)",
)
LOCKED, CLOSED, ASTRAY, AHEAD = 5, 2, 1, 1  # by an open transaction; to connections; at another revision; with the column already

_ENV = """
from types import SimpleNamespace

from tenantdb.migrations import run_env

run_env(SimpleNamespace(migrations=None), target_metadata=None)
"""
_REVISION = """
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = {revision!r}, {down!r}, None, None


def upgrade() -> None:
{upgrade}


def downgrade() -> None:
    raise NotImplementedError
"""
_TABLES = """
    for name in "patients practitioners products services categories appointments documents consents records invoices rooms".split():
        op.create_table(
            name,
            sa.Column("id", sa.Uuid, primary_key=True),
            sa.Column("name", sa.String(200), nullable=False, index=True),
            sa.Column("note", sa.Text),
            sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        )"""
_LITTLE = """
    op.execute("COMMENT ON TABLE patients IS 'as of {number}'")"""
_CHANGE = """
    op.add_column("patients", sa.Column("recall_on", sa.Date))
    op.create_index("patients_recall_on_idx", "patients", ["recall_on"])"""

_LOOK = """
SELECT (SELECT string_agg(version_num, ' ') FROM alembic_version),
    EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'patients'::regclass AND attname = 'recall_on' AND NOT attisdropped),
    EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass('patients_recall_on_idx') AND indisvalid AND indisready)
"""
_BACK = f"""
BEGIN;
DROP INDEX IF EXISTS patients_recall_on_idx;
ALTER TABLE patients DROP COLUMN IF EXISTS recall_on;
UPDATE alembic_version SET version_num = '{OLD}';
COMMIT
"""
_LOOKERS = 4
_Way = Callable[[Sequence[Target]], float]
"""Migrates these tenants, and tells how many seconds it took."""
_State = tuple[str, bool, bool]
"""What `_LOOK` finds: the revision, and whether column and index are there."""
_NEW: _State = (NEW, True, True)
_OLD: _State = (OLD, False, False)


def run(*, quick: bool) -> Result:
    result = Result()
    rounds, few, fewer = (3, 40, 20) if quick else (7, TENANTS, 40)
    with temporary_files_in_memory(), _fleet() as fleet:
        _near(fleet, result, rounds, few)
        _long_history(fleet, result, rounds, fewer)
        _far(fleet, result, rounds, fewer)
        _processes(fleet, result, max(2, rounds // 2), fewer)
        _verified(fleet, result, rounds, few)
        _faulty(fleet, result, rounds)
        _nothing_to_do(fleet, result, 20 if quick else 100)
        result.add("correct", float(not fleet.wrong), bar="1", note=f"version, column and index of every database after {fleet.runs} runs")
        plans = {name: round(statistics.median(seconds), 3) for name, seconds in fleet.plans.items()}
        result.environment |= {"per_second": fleet.rates, "plan_seconds": plans, "wrong": fleet.wrong[:10]}
    return result


class _Fleet:
    """The tenants, how to reach them, and the way back to the old revision."""

    def __init__(self, world: World, folders: Mapping[int, Path], targets: Sequence[Target]) -> None:
        self._world = world
        self._folders = folders
        self._superuser = world.server.url()
        self.registry = psycopg.connect(world.server.url(database="central"), autocommit=True)
        self.port = world.server.port
        self.targets = targets
        self.runs = 0
        self.wrong: list[str] = []
        self.rates: dict[str, float] = {}
        self.plans: dict[str, list[float]] = {}

    def open(self, files: int = 10, *, port: int | None = None) -> TenantDB:
        """What a deploy starts with: nothing is loaded, rendered or known yet. ``files``: of which folder of revisions."""
        arguments = {"migrations": str(self._folders[files])}
        if port is not None:
            arguments |= {name: str(self._world.arguments[name]).replace(f":{self.port}/", f":{port}/") for name in ("url", "server")}
        return self._world.open(**arguments)

    def alembic(self, files: int = 10) -> AlembicLoop:
        return AlembicLoop(Path(tempfile.mkdtemp(dir=self._folders[files])) / "alembic", self._folders[files] / "versions")

    def compare(self, rounds: int, **ways: tuple[_Way, Sequence[Target]]) -> dict[str, list[float]]:
        """Tenants per second of each way in each round, whose order turns. After each run its databases are looked at, and taken back."""
        names = list(ways)
        found: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds):
            for shift in range(len(names)):
                name = names[(number + shift) % len(names)]
                way, targets = ways[name]
                found[name].append(len(targets) / way(targets))
                self.settle(name, targets, dict.fromkeys(targets, _NEW))
        self.rates |= {name: round(statistics.median(rates), 1) for name, rates in found.items()}
        return found

    def settle(self, run: str, targets: Sequence[Target], expected: Mapping[Target, _State]) -> None:
        """Write down in ``wrong`` whose database is not as expected after a run, and take all of them back to the old revision."""
        self.runs += 1

        async def one(target: Target) -> None:
            database = target.url.database
            async with await psycopg.AsyncConnection.connect(self._superuser, dbname=database, autocommit=True) as connection:
                found = await (await connection.execute(_LOOK)).fetchone()
                if found != expected[target]:
                    self.wrong.append(f"{run}: {target.slug} is {found}")
                await connection.execute(_BACK)

        asyncio.run(by_hand.each(targets, one, concurrency=_LOOKERS))
        self.registry.execute("UPDATE tenantdb_tenants SET revision = %s", [OLD])

    def look_at_records(self, run: str, expected: Mapping[str, int]) -> None:
        """The same for how many tenants are at which revision by the registry."""
        rows = self.registry.execute("SELECT revision, count(*) FROM tenantdb_tenants GROUP BY revision")
        if (found := {str(revision): int(count) for revision, count in rows}) != expected:
            self.wrong.append(f"{run}: the registry says {found}")

    def connect(self, target: Target | None) -> psycopg.Connection:
        """As the superuser, to a tenant's database, or to the one that every server has."""
        return psycopg.connect(self._superuser, dbname="postgres" if target is None else target.url.database, autocommit=True)

    def sql(self, target: Target | None, statement: str) -> None:
        with self.connect(target) as connection:
            connection.execute(statement.encode())

    def ours(self, name: str, files: int = 10, *, port: int | None = None, **options: Any) -> _Way:
        """A rollout in a process that knows the plan, as one that prints it first does: what plan and proof take is in ``plans``,
        and does not depend on how many the tenants are. Everything else is in the clock: registry, attempts, report."""

        def way(targets: Sequence[Target]) -> float:
            with self.open(files, port=port) as db:
                began = time.perf_counter()
                db.migrations.plan(**options)
                planned = time.perf_counter()
                report = db.migrations.run(**options)
                ended = time.perf_counter()
            self.plans.setdefault(name, []).append(planned - began)
            if (report.done, report.failed) != (TENANTS, {}):
                self.wrong.append(f"{name}: {report.done} done, {len(report.failed)} failed by its report")
            self.look_at_records(name, {NEW: TENANTS})
            return ended - planned

        return way


@contextlib.contextmanager
def _fleet() -> Iterator[_Fleet]:
    with tempfile.TemporaryDirectory() as scratch, embedded_world({"autovacuum": "off", "shared_buffers": "512MB"}) as world:
        folders = {files: Path(scratch, f"of_{files}") for files in (10, 200)}
        for files, folder in folders.items():
            _write_revisions(folder, files - 1)
        with world.open(migrations=str(folders[10])) as db, ThreadPoolExecutor(2) as threads:
            tenants = list(threads.map(db.provision, [f"tenant-{number:03d}" for number in range(TENANTS)]))
            targets = [_target(db, tenant) for tenant in tenants]
        for files, folder in folders.items():
            _write_revision(folder, files, OLD, NEW, _CHANGE)
        with psycopg.connect(world.server.url(), autocommit=True) as superuser:  # who logs in after every run, to every database
            verifier = scram.verifier(world.server.password, iterations=1)
            superuser.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(world.server.superuser), sql.Literal(verifier)))
        yield _Fleet(world, folders, targets)


def _write_revisions(folder: Path, count: int) -> None:
    """So many files, from the tables to the old revision; the rest is the little that makes a history long."""
    (folder / "versions").mkdir(parents=True)
    (folder / "env.py").write_text(_ENV)
    names = ["first", *(f"little{number}" for number in range(2, count)), OLD]
    for number, name in enumerate(names, 1):
        upgrade = _TABLES if number == 1 else _LITTLE.format(number=number)
        _write_revision(folder, number, None if number == 1 else names[number - 2], name, upgrade)


def _write_revision(folder: Path, number: int, down: str | None, name: str, upgrade: str) -> None:
    text = _REVISION.format(revision=name, down=down, upgrade=upgrade.strip("\n"))
    (folder / "versions" / f"{number:03d}_{name}.py").write_text(text)


def _target(db: TenantDB, tenant: Tenant) -> Target:
    location = db._locator.locate(db._registry.tenants.record(tenant.id), DatabaseRole.OWNER)
    url = URL.create("postgresql+psycopg", tenant.owner_role, location.password(), location.host, location.port, tenant.database)
    return Target(tenant.id, tenant.slug, url)


def _ratio(rates: Mapping[str, Sequence[float]], ours: str, theirs: str) -> float:
    return statistics.median(one / two for one, two in zip(rates[ours], rates[theirs], strict=True))


def _timed(way: Callable[[Sequence[Target]], object]) -> _Way:
    def timed(targets: Sequence[Target]) -> float:
        began = time.perf_counter()
        way(targets)
        return time.perf_counter() - began

    return timed


def _raw(targets: Sequence[Target]) -> None:
    asyncio.run(by_hand.migrate(targets, STATEMENTS, old=OLD, new=NEW, concurrency=AT_ONCE))


def _near(fleet: _Fleet, result: Result, rounds: int, few: int) -> None:
    rates = fleet.compare(
        rounds,
        sql=(fleet.ours("sql", engine="sql", concurrency=AT_ONCE), fleet.targets),
        raw=(_timed(_raw), fleet.targets),
        python=(fleet.ours("python", engine="python", concurrency=AT_ONCE), fleet.targets),
        naive=(_timed(fleet.alembic().upgrade), fleet.targets[:few]),
    )
    result.add("vs_naive_loop", _ratio(rates, "sql", "naive"), bar=">= 3.5", note="SQL plan / alembic upgrade in a loop, 10 revision files")
    result.add(
        "sql_plan_vs_raw", _ratio(rates, "sql", "raw"), bar=">= 0.85", note="SQL plan, registry and report too / the same SQL by hand"
    )
    result.add("python_vs_raw", _ratio(rates, "python", "raw"), bar=">= 0.55", note="Python revisions in threads / the same SQL by hand")


def _long_history(fleet: _Fleet, result: Result, rounds: int, few: int) -> None:
    rates = fleet.compare(
        rounds,
        sql_200_files=(fleet.ours("sql_200_files", 200, engine="sql", concurrency=AT_ONCE), fleet.targets),
        naive_200_files=(_timed(fleet.alembic(200).upgrade), fleet.targets[:few]),
    )
    note = "the same with 200 revision files"
    result.add("vs_naive_loop_200_files", _ratio(rates, "sql_200_files", "naive_200_files"), bar=">= 8", note=note)


def _far(fleet: _Fleet, result: Result, rounds: int, few: int) -> None:
    """The registry is as far away as the tenants: in one network it would be."""
    with delayed(fleet.port, FAR_SECONDS) as port, _moved(fleet, port):
        far = [replace(target, url=target.url.set(port=port)) for target in fleet.targets]
        rates = fleet.compare(
            rounds,
            sql_5ms=(fleet.ours("sql_5ms", port=port, engine="sql", concurrency=FAR_AT_ONCE), far),
            naive_5ms=(_timed(fleet.alembic().upgrade), far[:few]),
        )
    note = f"the same, each reply 5 ms late, the registry's too; {FAR_AT_ONCE} at once"
    result.add("vs_naive_loop_5ms", _ratio(rates, "sql_5ms", "naive_5ms"), bar=">= 15", note=note)


@contextlib.contextmanager
def _moved(fleet: _Fleet, port: int) -> Iterator[None]:
    """The server is at another port, for whoever asks the registry."""
    with fleet.open() as db:
        db.servers.add("default", backend="postgresql", host="127.0.0.1", port=port)
        yield
        db.servers.add("default", backend="postgresql", host="127.0.0.1", port=fleet.port)


def _processes(fleet: _Fleet, result: Result, rounds: int, few: int) -> None:
    rates = fleet.compare(
        rounds,
        sql_again=(fleet.ours("sql_again", engine="sql", concurrency=AT_ONCE), fleet.targets),
        subprocess=(_timed(fleet.alembic().by_subprocess), fleet.targets[:few]),
    )
    note = "SQL plan / `alembic upgrade head`, a process for each tenant"
    result.add("vs_subprocess", _ratio(rates, "sql_again", "subprocess"), bar=">= 60", note=note)


def _verified(fleet: _Fleet, result: Result, rounds: int, few: int) -> None:
    """With nothing to do anywhere, which is asked of every database."""
    alembic = fleet.alembic()

    def ours() -> float:
        with fleet.open() as db:
            db.migrations.plan()
            began = time.perf_counter()
            plan = db.migrations.plan(verify=True)
            seconds = time.perf_counter() - began
        if plan.tenants or plan.at_target != TENANTS or plan.mistaken or plan.unreachable:
            fleet.wrong.append(f"verified plan: {len(plan.tenants)} to do, {plan.at_target} at head")
        return TENANTS / seconds

    def theirs() -> float:
        began = time.perf_counter()
        found = alembic.current(fleet.targets[:few])
        seconds = time.perf_counter() - began
        if found != [NEW] * few:
            fleet.wrong.append("alembic current")
        return few / seconds

    def raw() -> float:
        began = time.perf_counter()
        found = asyncio.run(by_hand.revisions(fleet.targets, concurrency=AT_ONCE))
        seconds = time.perf_counter() - began
        if found != [NEW] * TENANTS:
            fleet.wrong.append("a SELECT by hand")
        return TENANTS / seconds

    _raw(fleet.targets)
    fleet.registry.execute("UPDATE tenantdb_tenants SET revision = %s", [NEW])
    rates: dict[str, list[float]] = {"verify": [], "current": [], "select": []}
    for number in range(rounds):
        ways = [("verify", ours), ("current", theirs), ("select", raw)]
        for name, way in ways[number % 3 :] + ways[: number % 3]:
            rates[name].append(way())
    fleet.settle("verified plan", fleet.targets, dict.fromkeys(fleet.targets, _NEW))
    fleet.rates |= {name: round(statistics.median(each), 1) for name, each in rates.items()}
    note = "plan(verify=True) with nothing to do / alembic current in a loop"
    result.add("noop_verify_vs_naive", _ratio(rates, "verify", "current"), bar=">= 6", note=note)


def _faulty(fleet: _Fleet, result: Result, rounds: int) -> None:
    """Nine of the tenants cannot be migrated, each for its own reason; the others are, and the nine are named."""
    ratios = []
    for number in range(rounds):
        if number % 2:
            faulty, clean = _faulty_run(fleet), _clean_run(fleet)
        else:
            clean, faulty = _clean_run(fleet), _faulty_run(fleet)
        ratios.append(faulty / clean)
    note = f"wall of a run with {LOCKED + CLOSED + ASTRAY + AHEAD} of {TENANTS} that fail / of a clean run, defaults"
    result.add("faulty_wall_ratio", statistics.median(ratios), bar="<= 2", note=note)


def _clean_run(fleet: _Fleet) -> float:
    seconds = fleet.ours("defaults")(fleet.targets)
    fleet.settle("defaults", fleet.targets, dict.fromkeys(fleet.targets, _NEW))
    return seconds


def _faulty_run(fleet: _Fleet) -> float:
    left: dict[Target, _State] = {}
    with _faults(fleet, left), fleet.open() as db:
        db.migrations.plan()
        began = time.perf_counter()
        report = db.migrations.run()
        seconds = time.perf_counter() - began
        if report.done != TENANTS - len(left) or set(report.failed) != {target.slug for target in left}:
            fleet.wrong.append(f"faulty: {report.done} done, and failed are {sorted(report.failed)}")
    fleet.look_at_records("faulty", {NEW: TENANTS - len(left), OLD: len(left)})
    fleet.settle("faulty", fleet.targets, dict.fromkeys(fleet.targets, _NEW) | left)
    return seconds


@contextlib.contextmanager
def _faults(fleet: _Fleet, left: dict[Target, _State]) -> Iterator[None]:
    """``left`` becomes what a run must leave behind of those that it cannot migrate, who are spread over the fleet."""
    count = LOCKED + CLOSED + ASTRAY + AHEAD
    chosen = iter(fleet.targets[TENANTS // count // 2 :: TENANTS // count][:count])
    with contextlib.ExitStack() as undo:
        for target in itertools.islice(chosen, LOCKED):
            user = undo.enter_context(fleet.connect(target))
            user.execute("BEGIN")
            user.execute("SELECT count(*) FROM patients")
            left[target] = _OLD
        for target in itertools.islice(chosen, CLOSED):
            fleet.sql(None, f"ALTER DATABASE {target.url.database} ALLOW_CONNECTIONS false")
            undo.callback(fleet.sql, None, f"ALTER DATABASE {target.url.database} ALLOW_CONNECTIONS true")
            left[target] = _OLD
        for target in itertools.islice(chosen, ASTRAY):
            fleet.sql(target, "UPDATE alembic_version SET version_num = 'astray'")
            left[target] = ("astray", False, False)
        for target in itertools.islice(chosen, AHEAD):
            fleet.sql(target, STATEMENTS[0])
            left[target] = (OLD, True, False)
        yield


def _nothing_to_do(fleet: _Fleet, result: Result, times: int) -> None:
    """The records of a thousand tenants at head; most have no database, which nobody asks for."""
    columns = ", ".join(column.name for column in tables.tenants.columns if column.name not in ("id", "slug", "database"))
    fleet.registry.execute("UPDATE tenantdb_tenants SET revision = %s", [NEW])
    fleet.registry.execute(
        f"INSERT INTO tenantdb_tenants (id, slug, database, {columns}) SELECT gen_random_uuid(), 'more-' || n, 't_more_' || n, {columns}"
        f" FROM generate_series(1, {1000 - TENANTS}) AS n, (SELECT * FROM tenantdb_tenants WHERE slug = 'tenant-000') AS model"
    )
    took = []
    for _ in range(times):
        with fleet.open() as db:
            db.ping()  # connects
            began = time.perf_counter()
            plan = db.migrations.plan()
            took.append((time.perf_counter() - began) * 1e3)
        if plan.tenants or plan.at_target != 1000:
            fleet.wrong.append(f"plan: {len(plan.tenants)} to do, {plan.at_target} at head")
    note = "plan() of 1,000 tenants at head, in ms"
    result.add("noop_plan_ms_per_1000", statistics.median(took), bar="<= 50", note=note)
