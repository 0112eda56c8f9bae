"""`tenantdb audit`: what it prints, and when it fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import text

from tenantdb import TenantDB
from tenantdb.cli.group import cli
from tenantdb.registry import audit
from tenantdb.registry.secrets import generate_key


@pytest.fixture
def db(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TenantDB]:
    for name, value in {
        "URL": f"sqlite:///{tmp_path / 'central.sqlite3'}",
        "SECRET_KEYS": generate_key(),
        "AUDIT_ANCHOR": str(tmp_path / "anchor.jsonl"),
    }.items():
        monkeypatch.setenv(f"TENANTDB_{name}", value)
    monkeypatch.chdir(tmp_path)
    with TenantDB.from_env() as db:
        db.init()
        for number in range(3):
            with db._registry.write() as connection:
                audit.record(connection, "test.entry", object=f"line\r\n\x1b[2J\t{number}")
        yield db


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["audit", *arguments])


def test_an_entry_is_one_line_whatever_is_written_in_it(db: TenantDB) -> None:
    lines = run("search", "--action", "test.").stdout.splitlines()

    assert len(lines) == 3
    assert "\x1b" not in "".join(lines)
    assert lines[0].split("\t")[4] == "line ?[2J?2"


def test_entries_as_json_have_all_that_was_written(db: TenantDB) -> None:
    entries = json.loads(run("list", "--limit", "1", "--json").stdout)

    assert [entry["object"] for entry in entries] == ["line\r\n\x1b[2J\t2"]
    assert len(bytes.fromhex(entries[0]["mac"])) == 40


def test_verify_fails_where_a_chain_does_not_hold(db: TenantDB) -> None:
    assert run("anchor").exit_code == 0
    good = run("verify")
    assert (good.exit_code, "broken: 0" in good.stdout) == (0, True)
    with db._registry.admin_write() as connection:
        connection.execute(text("UPDATE tenantdb_audit SET actor = 'nobody' WHERE seq = 2"))

    bad = run("verify")

    assert (bad.exit_code, bad.stdout.splitlines()[0]) == (1, "the installation: edited at entry 2")
    report = json.loads(run("verify", "--json").stdout)
    assert (report["ok"], report["chains"][0]["broken_at"], report["chains"][0]["why"]) == (False, 2, "edited")


def test_retain_says_what_it_left(db: TenantDB) -> None:
    assert "deleted: 0" in run("retain").stdout
    assert json.loads(run("retain", "--json").stdout)["deleted"] == 0
    assert run("retain", "--years", "1").exit_code == 1


def test_records_are_somebodys(db: TenantDB) -> None:
    refused = run("search", "--records")

    assert (refused.exit_code, "--tenant" in refused.output) == (2, True)


@pytest.mark.parametrize("moment", ["yesterday", "2026-13-01"])
def test_a_moment_that_is_none_is_refused(db: TenantDB, moment: str) -> None:
    assert run("search", "--since", moment).exit_code == 2
