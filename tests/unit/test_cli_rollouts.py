"""`tenantdb migrate` with its options, `tenantdb rollouts` and `tenantdb status`: what they print, and with which exit code they end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tenantdb import TenantDB
from tenantdb.cli.group import cli

URL = "sqlite:///data/central.sqlite3"
SLUGS = ("acme", "beta", "gamma")
REVISION = """
from alembic import op

revision, down_revision = {revision!r}, {down!r}


def upgrade():
    op.execute("CREATE TABLE t{revision} (x int)")


def downgrade():
    op.execute("DROP TABLE t{revision}")
"""


@pytest.fixture
def db(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TenantDB]:
    """Three tenants at revision 001 of an application whose head is 002."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENANTDB_URL", URL)
    monkeypatch.setenv("TENANTDB_MIGRATIONS", "scripts")
    write_revision(tmp_path, "001", None)
    (tmp_path / "scripts" / "env.py").write_text(
        "from types import SimpleNamespace\nfrom tenantdb.migrations import run_env\n"
        "run_env(SimpleNamespace(migrations=None), target_metadata=None)\n"
    )
    with TenantDB(URL, migrations="scripts") as db:
        db.init()
        for slug in SLUGS:
            db.provision(slug)
        write_revision(tmp_path, "002", "001")
        yield db


def write_revision(folder: Path, revision: str, down: str | None) -> None:
    versions = folder / "scripts" / "versions"
    versions.mkdir(parents=True, exist_ok=True)
    (versions / f"{revision}.py").write_text(REVISION.format(revision=revision, down=down))


def stand_in_the_way(db: TenantDB, slug: str, *, gone: bool = False) -> None:
    with db.begin(slug) as session:
        session.connection().exec_driver_sql("DROP TABLE t002" if gone else "CREATE TABLE t002 (x int)")


def run(*words: str, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(cli, words, prog_name="tenantdb")
    assert result.exit_code == exit_code, f"{result.output}\n{result.exception!r}"
    return result


def document(*words: str, exit_code: int = 0) -> Any:
    return json.loads(run(*words, "--json", exit_code=exit_code).stdout)


def error(*words: str, exit_code: int = 1) -> Any:
    return json.loads(run(*words, "--json", exit_code=exit_code).stderr)["error"]


def at(db: TenantDB) -> dict[str, str | None]:
    return {tenant.slug: tenant.revision for tenant in db.tenants.list()}


# -- migrate ---------------------------------------------------------------------------------------------------------------------------


def test_a_plan_tells_who_goes_from_where_to_where_and_how_and_does_nothing(db: TenantDB) -> None:
    result = run("migrate", "--plan", "--canary", "beta", "--wave", "1")

    assert result.stdout == "default: 3 from 001 to 002 (002), engine python\nwaves: 1, 1, 1; at 002 already: 0; spares: 0\n"
    told = document("migrate", "--plan", "--canary", "beta", "--wave", "1")
    assert [(each["tenant"], each["wave"]) for each in told["tenants"]] == [("beta", 0), ("acme", 1), ("gamma", 2)]
    assert [(way["from"], way["to"], way["revisions"], way["engine"], way["tenants"]) for way in told["ways"]] == [
        ("001", "002", ["002"], "python", 3)
    ]
    assert (told["target"], told["waves"], told["refused"], told["unreachable"]) == ("002", [1, 1, 1], {}, {})
    assert set(at(db).values()) == {"001"}
    assert document("rollouts", "list") == []


def test_a_plan_with_a_tenant_that_cannot_go_ends_with_3(db: TenantDB) -> None:
    db._registry.tenants.set_revision(db._registry.tenants.get("beta"), "nowhere")

    result = run("migrate", "--plan", exit_code=3)

    assert "beta: " in result.stderr and "nowhere" in result.stderr
    assert list(document("migrate", "--plan", exit_code=3)["refused"]) == ["beta"]


def test_migrate_reports_whoever_cannot_go_and_takes_the_others(db: TenantDB) -> None:
    db._registry.tenants.set_revision(db._registry.tenants.get("beta"), "nowhere")

    result = run("migrate", exit_code=3)

    assert result.stdout == "002: done; migrated: 2; failed: 1\n"
    assert "beta: " in result.stderr
    assert at(db) == {"acme": "002", "beta": "nowhere", "gamma": "002"}


def test_verify_finds_out_where_a_tenant_is_and_records_it(db: TenantDB) -> None:
    db._registry.tenants.set_revision(db._registry.tenants.get("beta"), "002")

    assert document("migrate", "--plan")["waves"] == [2]
    told = document("migrate", "--plan", "--verify")
    assert (told["waves"], told["mistaken"]) == ([3], {"beta": "001"})
    assert "beta: its database is at 001, not where the registry had it\n" in run("migrate", "--plan", "--verify").stderr
    assert document("migrate", "--verify")["done"] == 3
    assert set(at(db).values()) == {"002"}


def test_sql_that_cannot_be_known_before_is_refused(db: TenantDB) -> None:
    told = error("migrate", "--sql")

    assert told["code"] == "migration" and "SQLite" in told["message"]


def test_a_canary_that_fails_halts_the_rest_and_a_retry_goes_on(db: TenantDB) -> None:
    stand_in_the_way(db, "beta")

    halted = run("migrate", "--canary", "beta", exit_code=3)

    assert halted.stdout == "002: halted; migrated: 0; failed: 1; waiting: 2\n"
    assert "beta: failed: " in halted.stderr and "halted: a canary failed" in halted.stderr
    assert halted.stderr.count("a canary failed") == 1
    assert "When the cause is mended: tenantdb rollouts retry " in halted.stderr
    assert "Go on with the rest, without those that failed: tenantdb rollouts resume " in halted.stderr
    assert set(at(db).values()) == {"001"}

    stand_in_the_way(db, "beta", gone=True)
    told = document("rollouts", "retry")
    assert (told["state"], told["done"], told["failures"], told["waiting"]) == ("done", 3, 0, 0)
    assert set(at(db).values()) == {"002"}


def test_more_failures_than_are_allowed_halt_it_and_resume_takes_the_rest(db: TenantDB) -> None:
    stand_in_the_way(db, "acme")

    told = document("migrate", "--max-failures", "0", "--concurrency", "1", "--wave", "1", exit_code=3)

    assert (told["state"], told["done"], told["failures"], told["waiting"]) == ("halted", 0, 1, 2)
    assert list(told["failed"]) == ["acme"] and "t002" in told["failed"]["acme"]
    result = run("rollouts", "resume", told["rollout"], exit_code=3)
    assert result.stdout == "002: done; migrated: 2; failed: 1\n"
    assert f"When the cause is mended: tenantdb rollouts retry {told['rollout']}\n" in result.stderr
    assert at(db) == {"acme": "001", "beta": "002", "gamma": "002"}


def test_events_are_lines_of_json_and_the_end_is_a_document(db: TenantDB) -> None:
    stand_in_the_way(db, "beta")

    result = run("migrate", "--events", "--wave", "1", exit_code=3)

    events = [json.loads(line) for line in result.stderr.splitlines()]
    assert [event["wave"] for event in events if event["event"] == "wave"] == [0, 1]
    assert {(event["tenant"], event["error"] is None) for event in events if event["event"] == "tenant"} == {
        ("acme", True),
        ("beta", False),
        ("gamma", True),
    }
    assert {event["rollout"] for event in events} == {json.loads(result.stdout)["rollout"]}


def test_another_target_and_the_way_back(db: TenantDB) -> None:
    assert document("migrate")["done"] == 3

    refused = run("migrate", "--to", "001", exit_code=3)
    assert "a downgrade must be allowed" in refused.stderr
    assert document("migrate", "--to", "001", "--allow-downgrade")["target"] == "001"
    assert set(at(db).values()) == {"001"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max-failures", "some"], "'some' is neither a number of tenants nor a percentage"),
        (["--max-failures", "101%"], "'101%' is neither"),
        (["--canary", "-1"], "'-1' is neither a number of tenants nor a list of slugs"),
        (["--canary", "acme,"], "'acme,' is neither"),
        (["--wave", "0"], "'--wave'"),
        (["--concurrency", "0"], "'--concurrency'"),
        (["--lock-timeout", "-1"], "'--lock-timeout'"),
        (["--engine", "magic"], "'--engine'"),
        (["--plan", "--sql"], "--sql stands alone"),
        (["--tenant", "No Slug"], "No Slug"),
    ],
)
def test_options_that_mean_nothing_end_with_2_and_one_line(db: TenantDB, words: list[str], says: str) -> None:
    told = error("migrate", *words, exit_code=2)

    assert says in told["message"] and "\n" not in told["message"]
    assert document("rollouts", "list") == []


def test_a_revision_or_a_canary_that_is_not_there_is_told(db: TenantDB) -> None:
    assert "nowhere" in error("migrate", "--to", "nowhere")["message"]
    assert error("migrate", "--canary", "nobody")["code"] == "tenant-not-found"


# -- rollouts --------------------------------------------------------------------------------------------------------------------------


def halt(db: TenantDB) -> str:
    """A rollout whose first tenant failed."""
    stand_in_the_way(db, "acme")
    return str(document("migrate", "--canary", "1", exit_code=3)["rollout"])


def test_rollouts_are_listed_and_shown(db: TenantDB) -> None:
    rollout = halt(db)

    (row,) = run("rollouts", "list").stdout.splitlines()
    assert row.split("\t")[:4] == [rollout, "002", "halted", "3"] and "a canary failed" in row
    assert [each["id"] for each in document("rollouts", "list")] == [rollout]
    rows = [row.split("\t") for row in run("rollouts", "show").stdout.splitlines()]
    assert [row[:4] for row in rows] == [
        ["acme", "0", "failed", "001"],
        ["beta", "1", "waiting", "001"],
        ["gamma", "1", "waiting", "001"],
    ]
    assert "t002" in rows[0][-1]
    assert [each["slug"] for each in document("rollouts", "show", rollout, "--slowest")] == ["acme"]


def test_another_rollout_is_refused_until_the_first_is_cancelled(db: TenantDB) -> None:
    rollout = halt(db)

    told = error("migrate")
    assert told["code"] == "rollout-conflict" and rollout in told["message"]

    assert run("rollouts", "cancel").stdout == f"rollout {rollout}: cancelled\n"
    assert document("rollouts", "show", rollout)[0]["state"] == "failed"
    gone_on = run("rollouts", "resume", rollout, exit_code=3)
    assert gone_on.stdout == "002: cancelled; migrated: 0; failed: 1; waiting: 2\n" and "Go on" not in gone_on.stderr
    assert document("migrate", "--max-consecutive", "0", exit_code=3)["done"] == 2


def test_a_rollout_that_has_halted_need_not_be_paused_and_goes_on_when_asked(db: TenantDB) -> None:
    rollout = halt(db)

    assert document("rollouts", "pause", rollout)["state"] == "halted"
    assert run("rollouts", "resume", exit_code=3).stdout == "002: done; migrated: 2; failed: 1\n"


@pytest.mark.parametrize("verb", ["show", "resume", "retry", "pause", "cancel"])
def test_a_rollout_that_is_not_there_is_told(db: TenantDB, verb: str) -> None:
    nobody = "00000000-0000-0000-0000-000000000000"

    assert error("rollouts", verb)["message"].startswith("there is no rollout yet")
    assert error("rollouts", verb, nobody)["message"].startswith(f"no rollout {nobody}")
    assert "'newest' is not a valid UUID" in error("rollouts", verb, "newest", exit_code=2)["message"]


# -- status ----------------------------------------------------------------------------------------------------------------------------


def test_status_says_where_everyone_is_and_how_the_last_rollout_went(db: TenantDB) -> None:
    assert run("status").stdout == "default\tactive\t001\t3\nhead 002; behind it: 3\n"
    rollout = halt(db)
    db.suspend("gamma")

    result = run("status")

    assert result.stdout.splitlines()[:3] == ["default\tactive\t001\t2", "default\tsuspended\t001\t1", "head 002; behind it: 3"]
    assert f"last rollout {rollout} to 002: halted; " in result.stdout
    assert result.stderr.startswith("acme: ") and "t002" in result.stderr
    told = document("status")
    assert (told["head"], told["behind"], told["rollout"]["id"], list(told["failed"])) == ("002", 3, rollout, ["acme"])
    assert told["counts"][0] == {"server": "default", "state": "active", "revision": "001", "tenants": 2}
    assert (told["attempts"]["failed"], told["attempts"]["waiting"]) == (1, 2)


def test_status_with_drift_ends_with_3_where_somebody_differs(db: TenantDB) -> None:
    assert run("status", "--drift").stdout == "compared: 3; drifted: 0; not looked at: 0\n"
    stand_in_the_way(db, "beta")

    result = run("status", "--drift", exit_code=3)

    assert result.stdout.startswith("beta: ") and result.stdout.endswith("compared: 3; drifted: 1; not looked at: 0\n")
    assert list(document("status", "--drift", exit_code=3)["drifted"]) == ["beta"]
    assert document("status", "--drift", "--tenant", "acme")["checked"] == 1


def test_status_of_one_tenant_alone_is_elsewhere(db: TenantDB) -> None:
    assert "tenantdb show" in error("status", "--tenant", "acme", exit_code=2)["message"]
