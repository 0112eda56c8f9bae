"""Rollouts: the whole fleet brought to a revision, and always knowing where everyone is."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tenantdb import Budget, Tenant, TenantDB, errors
from tenantdb.backends.postgresql import PostgreSQL
from tenantdb.fleet.plan import Runner
from tenantdb.fleet.rollouts import Progress
from tenantdb.registry.rollouts import AttemptState, RolloutState
from tests.conformance.app import MIGRATIONS
from tests.conformance.colours import MakeProcess
from tests.conformance.conftest import Estate
from tests.world import World

SECOND = """
import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table("colours", sa.Column("name", sa.String, primary_key=True))
    op.execute("INSERT INTO colours SELECT slug FROM markers")


def downgrade() -> None:
    op.drop_table("colours")
"""
FRAGILE = SECOND.replace(
    "\n\ndef downgrade",
    "    op.execute(\"INSERT INTO colours SELECT slug FROM markers WHERE slug IN ('t-03', 't-07')\")\n\n\ndef downgrade",
)
"""Violates a constraint in two databases only."""


@pytest.fixture(scope="module")
def estate(world: World) -> Estate:
    return Estate(world)


@pytest.fixture(scope="module")
def fleet(estate: Estate) -> list[Tenant]:
    return [estate.tenant(f"t-{number:02}") for number in range(12)]


def schema(folder: Path, revision: str) -> str:
    shutil.copytree(MIGRATIONS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "versions" / "0002_colours.py").write_text(revision)
    return str(folder)


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return schema(tmp_path_factory.mktemp("newer") / "schema", SECOND)


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> str:
    return schema(tmp_path_factory.mktemp("fragile") / "schema", FRAGILE)


@pytest.fixture
def release(process: MakeProcess, fleet: list[Tenant], newer: str) -> Iterator[TenantDB]:
    """A process of the next release; whatever its test has done is taken back."""
    made = process(migrations=newer)
    yield made
    for rollout in made.migrations.rollouts():
        if rollout.state not in (RolloutState.DONE, RolloutState.CANCELLED):
            made.migrations.cancel(rollout.id)
    back = made.migrations.run(target="0001", allow_downgrade=True, engine="python", verify=True, retries=20, max_consecutive=0)
    assert back.ok, back


def colours(estate: Estate, tenant: Tenant) -> list[str] | None:
    """What the migration copied: the tenant's own marker; None where it was not run."""
    with estate.world.inside(tenant, estate.db) as connection:
        try:
            return list(connection.scalars(text("SELECT name FROM colours")))
        except Exception:
            return None


def markers(estate: Estate, fleet: list[Tenant]) -> list[list[str] | None]:
    return [colours(estate, tenant) for tenant in fleet]


ENGINES = ["auto", "sql", "python", "processes"]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_tenants_migration_lands_in_its_own_database(release: TenantDB, estate: Estate, fleet: list[Tenant], engine: str) -> None:
    if engine == "sql" and estate.backend == "sqlite":
        with pytest.raises(errors.MigrationError, match="cannot be sent as SQL"):
            release.migrations.run(engine=engine)
        return
    meant = fleet[:3] if engine == "processes" else fleet  # each child imports the application
    report = release.migrations.run(tenants=[tenant.slug for tenant in meant], engine=engine, concurrency=4)
    assert (report.ok, report.done, report.failed) == (True, len(meant), {})
    assert markers(estate, meant) == [[tenant.slug] for tenant in meant]
    assert {release.tenants.get(tenant).revision for tenant in meant} == {"0002"}
    chosen = {attempt.engine for attempt in release.migrations.attempts(report.rollout)}
    assert chosen == {{"sqlite": "python", "postgresql": "sql"}[estate.backend] if engine == "auto" else engine}
    again = release.migrations.run(tenants=[tenant.slug for tenant in meant], engine=engine)
    assert (again.rollout, again.done, again.ok) == (None, 0, True)


@pytest.mark.parametrize("concurrency", [4, 12])
def test_what_a_tenant_may_have_is_no_limit_of_a_rollout_and_what_the_server_has_is(
    release: TenantDB,
    process: MakeProcess,
    estate: Estate,
    fleet: list[Tenant],
    newer: str,
    monkeypatch: pytest.MonkeyPatch,
    concurrency: int,
) -> None:
    """Four at once where a tenant may have one connection; twelve who want eight places wait for each other and not for a timeout."""
    if estate.backend == "sqlite":
        pytest.skip("no SQL is sent to a file")
    tight = process(migrations=newer, budget=Budget(connections=14, processes=1, per_tenant=1, acquire_timeout=300))
    send, under_way, several = PostgreSQL.send_script, 0, asyncio.Event()

    async def watched(*arguments: Any) -> Any:
        nonlocal under_way
        under_way += 1
        if under_way >= 4:
            several.set()
        await asyncio.wait_for(several.wait(), 60)
        return await send(*arguments)

    monkeypatch.setattr(PostgreSQL, "send_script", watched)
    report = tight.migrations.run(engine="sql", concurrency=concurrency, retries=0)
    assert (report.ok, report.done) == (True, len(fleet))


@pytest.fixture
def fragile_release(release: TenantDB, process: MakeProcess, fragile: str) -> TenantDB:
    """The same with a revision that fails in two databases."""
    return process(migrations=fragile)


SICK = ["t-03", "t-07"]


def at_head(estate: Estate, fleet: list[Tenant]) -> list[str]:
    return [tenant.slug for tenant in fleet if colours(estate, tenant) is not None]


@pytest.mark.parametrize("engine", ["auto", "python"])
def test_one_that_fails_stays_whole_and_the_others_go_on(
    fragile_release: TenantDB, estate: Estate, fleet: list[Tenant], engine: str
) -> None:
    migrations = fragile_release.migrations
    report = migrations.run(engine=engine)
    assert (report.state, report.ok, report.done, sorted(report.failed)) == (RolloutState.DONE, False, 10, SICK)
    assert all("IntegrityError" in why or "23505" in why for why in report.failed.values())
    assert at_head(estate, fleet) == [tenant.slug for tenant in fleet if tenant.slug not in SICK]
    assert {slug: fragile_release.tenants.get(slug).revision for slug in SICK} == dict.fromkeys(SICK, "0001")
    status = migrations.status()
    assert (status.behind, sorted(status.failed), status.attempts) == (2, SICK, {"done": 10, "failed": 2})
    for slug in SICK:  # the cause is mended
        with estate.world.inside(fragile_release.tenants.get(slug), estate.db) as connection:
            connection.execute(text("DELETE FROM markers"))
    touched: list[str | None] = []
    again = migrations.retry(progress=lambda told: touched.append(told.tenant) if told.event == "tenant" else None)
    assert (again.ok, again.done, sorted(filter(None, touched))) == (True, 12, SICK)
    for slug in SICK:
        with estate.world.inside(fragile_release.tenants.get(slug), estate.db) as connection:
            connection.execute(text("INSERT INTO markers VALUES (:slug)"), {"slug": slug})


def test_a_canary_that_fails_stops_everything_else(fragile_release: TenantDB, estate: Estate, fleet: list[Tenant]) -> None:
    report = fragile_release.migrations.run(canary=["t-03"])
    assert (report.state, report.done, report.waiting, list(report.failed)) == (RolloutState.HALTED, 0, 11, ["t-03"])
    assert report.error is not None
    assert report.error.startswith("a canary failed")
    assert at_head(estate, fleet) == []


def test_a_failure_limit_halts_after_the_wave_has_gone_too_far(fragile_release: TenantDB, estate: Estate, fleet: list[Tenant]) -> None:
    report = fragile_release.migrations.run(waves=[4, 2], max_failures=0, concurrency=1)
    assert (report.state, report.waiting, list(report.failed)) == (RolloutState.HALTED, 8, ["t-03"])
    assert at_head(estate, fleet) == ["t-00", "t-01", "t-02"]
    gone_on = fragile_release.migrations.resume()
    assert (gone_on.state, sorted(gone_on.failed)) == (RolloutState.HALTED, SICK)
    last = fragile_release.migrations.resume()
    assert (last.state, last.done, last.waiting) == (RolloutState.DONE, 10, 0)


def test_waves_are_one_after_the_other(release: TenantDB) -> None:
    seen: list[tuple[int, str]] = []

    def watch(told: Progress) -> None:
        if told.event == "tenant":
            seen.append((told.wave, str(told.tenant)))

    plan = release.migrations.plan(canary=["t-09", "t-05"], waves=[3])
    assert plan.waves == [2, 3, 7]
    assert release.migrations.run(canary=["t-09", "t-05"], waves=[3], progress=watch).ok
    assert [wave for wave, _ in seen] == [0] * 2 + [1] * 3 + [2] * 7
    assert {slug for wave, slug in seen if wave == 0} == {"t-09", "t-05"}


def test_asked_to_stop_it_finishes_what_is_under_way_and_goes_on_later(release: TenantDB, estate: Estate, fleet: list[Tenant]) -> None:
    stop = threading.Event()
    stopped = release.migrations.run(concurrency=1, stop=stop, progress=lambda told: stop.set() if told.done == 3 else None)
    assert (stopped.state, stopped.ok) == (RolloutState.PAUSED, False)
    assert (stopped.done, stopped.waiting) == (3, 9)
    assert len(at_head(estate, fleet)) == 3
    assert release.migrations.resume().ok
    assert markers(estate, fleet) == [[tenant.slug] for tenant in fleet]


def test_somebody_else_may_pause_and_cancel_it(
    release: TenantDB, process: MakeProcess, newer: str, estate: Estate, fleet: list[Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenantdb.provisioning.lease.LEASE", timedelta(seconds=0.3))
    other = process(migrations=newer)
    asked: list[Any] = []

    def watch(told: Progress) -> None:
        if told.event == "tenant" and not asked:
            asked.append(other.migrations.pause())
            with pytest.raises(errors.RolloutConflict):
                other.migrations.run()
            with pytest.raises(errors.RolloutConflict):
                other.migrations.resume()

    paused = release.migrations.run(concurrency=1, waves=[1, 11], pause=0.5, progress=watch)
    assert (paused.state, paused.waiting > 0) == (RolloutState.PAUSED, True)
    assert other.migrations.cancel().state is RolloutState.CANCELLED
    ended = other.migrations.resume()
    assert (ended.state, ended.done) == (RolloutState.CANCELLED, paused.done)
    assert other.migrations.run().ok
    assert len(at_head(estate, fleet)) == 12


def test_a_rollout_of_a_process_that_died_is_taken_up_where_its_databases_are(
    release: TenantDB, process: MakeProcess, newer: str, estate: Estate, fleet: list[Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException):
        """As SIGKILL: nothing is written any more."""

    store = release._registry.rollouts
    with monkeypatch.context() as dying, pytest.raises(Died):
        dying.setattr(store, "settle", lambda *_: (_ for _ in ()).throw(Died))
        dying.setattr(store, "finish", lambda *_: None)
        release.migrations.run()
    migrated = at_head(estate, fleet)
    assert migrated
    monkeypatch.setattr("tenantdb.fleet.migrations.dead", list)  # this process stands for one that died
    other = process(migrations=newer)
    assert other.migrations.status().attempts.get("done") is None
    report = other.migrations.resume()
    assert (report.ok, report.done) == (True, 12)
    assert markers(estate, fleet) == [[tenant.slug] for tenant in fleet]


def test_who_is_meant(release: TenantDB, estate: Estate, fleet: list[Tenant]) -> None:
    gone, shut = fleet[0], fleet[1]
    estate.db.delete(gone)
    estate.db.suspend(shut)
    try:
        assert {tenant.slug for tenant in release.migrations.plan().tenants} == {tenant.slug for tenant in fleet[1:]}
        assert release.migrations.plan(tenants=[]).tenants == ()
        assert release.migrations.run(tenants=[]).ok
        with pytest.raises(errors.TenantNotFound):
            release.migrations.plan(tenants=["nobody"])
        with pytest.raises(errors.TenantNotFound):
            release.migrations.plan(canary=["nobody"])
        report = release.migrations.run(tenants=["t-01", "t-02"])
        assert (report.done, report.ok) == (2, True)
        assert at_head(estate, fleet[1:]) == ["t-01", "t-02"]
    finally:
        estate.mend(gone)
        estate.mend(shut)


def test_a_downgrade_must_be_allowed(release: TenantDB, estate: Estate, fleet: list[Tenant]) -> None:
    assert release.migrations.run().ok
    refused = release.migrations.run(target="0001")
    assert (refused.ok, len(refused.refused)) == (False, 12)
    assert "a downgrade must be allowed" in refused.refused["t-00"]
    assert release.migrations.run(target="0001", allow_downgrade=True).done == 12
    assert at_head(estate, fleet) == []


def test_what_the_registry_has_wrong_is_found_by_asking(release: TenantDB, fleet: list[Tenant]) -> None:
    release.tenants.set_revision(release.tenants.get("t-04"), "0002")
    assert "t-04" not in {tenant.slug for tenant in release.migrations.plan().tenants}
    plan = release.migrations.plan(verify=True)
    assert (plan.mistaken, len(plan.tenants)) == ({"t-04": "0001"}, 12)
    report = release.migrations.run(verify=True)
    assert (report.ok, report.done) == (True, 12)
    assert release.migrations.plan(verify=True).tenants == ()


def test_a_revision_that_nobody_knows_is_refused_for_its_tenant_alone(release: TenantDB, fleet: list[Tenant]) -> None:
    release.tenants.set_revision(release.tenants.get("t-04"), "from-the-future")
    try:
        report = release.migrations.run()
        assert (report.ok, report.done, list(report.refused)) == (False, 11, ["t-04"])
    finally:
        release.tenants.set_revision(release.tenants.get("t-04"), "0001")


def test_hooks_and_progress_that_raise_break_nothing(release: TenantDB, caplog: pytest.LogCaptureFixture, fleet: list[Tenant]) -> None:
    told: list[str] = []
    revisions: set[tuple[str, str | None]] = set()

    def remember(event: str) -> Callable[[Any], None]:
        def hook(subject: Any) -> None:
            told.append(event)
            if isinstance(subject, Tenant):
                revisions.add((event, subject.revision))
            raise RuntimeError("mine")

        return hook

    for event in ("before_migrate", "after_migrate", "before_rollout", "after_rollout"):
        release.on(event)(remember(event))

    def watch(told: Progress) -> None:
        raise RuntimeError("mine")

    assert release.migrations.run(progress=watch).ok
    assert told[0] == "before_rollout"
    assert told[-1] == "after_rollout"
    assert (told.count("before_migrate"), told.count("after_migrate")) == (12, 12)
    assert revisions == {("before_migrate", "0001"), ("after_migrate", "0002")}
    assert "mine" in caplog.text


@pytest.mark.parametrize("engine", ["python", "processes"])
def test_a_statement_that_takes_too_long_is_ended(
    release: TenantDB, process: MakeProcess, estate: Estate, fleet: list[Tenant], tmp_path: Path, engine: str
) -> None:
    if estate.backend == "sqlite":
        pytest.skip("a file has no such limit")
    slow = SECOND.replace('    op.execute("INSERT', '    op.execute("SELECT pg_sleep(20)")\n    op.execute("INSERT', 1)
    report = process(migrations=schema(tmp_path / "schema", slow)).migrations.run(
        tenants=[fleet[0].slug], engine=engine, statement_timeout=0.2, retries=0
    )
    assert report.failed == {fleet[0].slug: "QueryCanceled (57014)"}
    assert release.tenants.get(fleet[0]).revision == "0001"


@pytest.mark.parametrize("engine", ["python", "processes"])
def test_a_statement_timeout_of_zero_is_none(release: TenantDB, fleet: list[Tenant], engine: str) -> None:
    assert release.migrations.run(tenants=[fleet[0].slug], engine=engine, statement_timeout=0).ok


def test_a_proof_waits_for_a_place_in_the_budget(release: TenantDB, estate: Estate, monkeypatch: pytest.MonkeyPatch) -> None:
    if estate.backend == "sqlite":
        pytest.skip("no SQL is sent to a file")
    asked: list[str] = []
    place = release._engines.place
    monkeypatch.setattr(release._engines, "place", lambda server, label: (asked.append(label), place(server, label))[1])
    assert release.migrations.plan(engine="sql").ways["0001"].runner is Runner.SQL
    assert asked == ["a scratch database"] * 2


def test_to_an_older_revision_nothing_is_prepared_and_no_spare_taken_along(
    release: TenantDB, process: MakeProcess, estate: Estate, tmp_path: Path
) -> None:
    """The way back must be open where the head cannot be reached, on an empty database either."""
    assert release.migrations.run().ok
    estate.db.spares.fill(1)
    broken = process(migrations=schema(tmp_path / "schema", SECOND))
    (tmp_path / "schema" / "versions" / "0003.py").write_text(
        "revision, down_revision = '0003', '0002'\n\n\ndef upgrade() -> None:\n    raise RuntimeError('half-way')\n"
    )
    assert broken.migrations.run().state is RolloutState.HALTED
    broken.migrations.cancel()
    assert broken.migrations.plan(target="0001", allow_downgrade=True).spares == 0
    report = broken.migrations.run(target="0001", allow_downgrade=True)
    assert (report.ok, report.spares, report.error) == (True, 0, None)
    estate.db.spares.drain()


def test_spares_come_along_and_a_tenant_made_meanwhile_ends_at_head(release: TenantDB, estate: Estate) -> None:
    estate.db.spares.fill(2)  # one of them for who signs up
    old = estate.db.settings.migrations
    assert old is not None
    late: list[Tenant] = []

    def sign_up(told: Progress) -> None:
        if told.event == "tenant" and not late:
            late.append(estate.db.provision("late"))  # by a process of the release before

    report = release.migrations.run(progress=sign_up)
    try:
        assert (report.ok, report.done) == (True, 13)
        assert release.tenants.get("late").revision == "0002"
        assert [spare.revision for spare in release.spares.list()] == ["0002"]
    finally:
        release.spares.drain()
        release.delete("late")
        release.purge("late", confirm="late", immediately=True)


@pytest.mark.parametrize(
    "options",
    [{"concurrency": 0}, {"engine": "magic"}, {"max_failures": "many"}, {"waves": [0]}, {"order": "age"}, {"canary": -1}],
    ids=str,
)
def test_options_that_cannot_be_are_refused_before_anything_happens(release: TenantDB, options: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError):
        release.migrations.run(**options)
    assert release.migrations.status().behind == 12


def test_the_plan_says_how_and_why(release: TenantDB, estate: Estate) -> None:
    plan = release.migrations.plan(order="size")
    way = plan.ways["0001"]
    assert [step.revision for step in way.steps] == ["0002"]
    assert way.runner is (Runner.SQL if estate.backend == "postgresql" else Runner.PYTHON)
    assert bool(way.why) is (estate.backend == "sqlite")
    assert release.migrations.plan(tenants=["t-01"]).ways["0001"].runner is Runner.PYTHON
    if estate.backend == "postgresql":
        (sql,) = release.migrations.sql().values()
        assert "CREATE TABLE colours" in sql
        assert "UPDATE alembic_version" in sql


def test_a_locked_tenant_is_tried_again(release: TenantDB, estate: Estate, fleet: list[Tenant]) -> None:
    """Somebody's migration of one tenant is under way; it ends after the first try."""
    held = estate.world.inside(fleet[5], estate.db)
    retries: list[str | None] = []
    connection = held.__enter__()
    if estate.backend == "postgresql":
        connection.execute(text("LOCK TABLE alembic_version IN SHARE UPDATE EXCLUSIVE MODE"))
    else:
        connection.execute(text("INSERT INTO notes (id) VALUES (-1)"))
    ended = False

    def watch(told: Progress) -> None:
        nonlocal ended
        if told.event == "retry":
            retries.append(told.tenant)
            if not ended:
                ended = True
                connection.rollback()
                held.__exit__(None, None, None)

    try:
        report = release.migrations.run(engine="python", progress=watch, retries=10)
    finally:
        if not ended:
            connection.rollback()
            held.__exit__(None, None, None)
    assert (report.ok, report.done) == (True, 12)
    if estate.backend == "postgresql":
        assert set(retries) == {"t-05"}


def test_attempts_tell_times_and_who_was_slowest(release: TenantDB) -> None:
    report = release.migrations.run()
    seconds = [attempt.seconds for attempt in release.migrations.attempts(slowest=True)]
    assert len(seconds) == 12
    assert seconds == sorted(seconds, key=lambda value: -(value or 0.0))
    assert report.slowest[0][1] == seconds[0]
    assert {attempt.state for attempt in release.migrations.attempts()} == {AttemptState.DONE}


def test_a_file_is_kept_as_it_was_before_its_migration(release: TenantDB, estate: Estate, fleet: list[Tenant]) -> None:
    if estate.backend != "sqlite":
        assert release.migrations.run(tenants=["t-01"]).ok  # a server has backups of its own
        return
    assert release.migrations.run(tenants=["t-01"]).ok
    path = Path(str(release.servers.list()[0].path)) / f"{fleet[1].database}.sqlite3.bak"
    with sqlite3.connect(path) as copy:
        assert copy.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
        assert copy.execute("SELECT slug FROM markers").fetchall() == [("t-01",)]
    copy.close()
    before = path.stat().st_mtime_ns
    release.tenants.set_revision(release.tenants.get("t-01"), "0001")  # as after a crash before the registry was told
    assert release.migrations.run(tenants=["t-01"]).ok
    assert path.stat().st_mtime_ns == before
