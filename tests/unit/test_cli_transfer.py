"""The verbs that carry tenants' data in and out, on SQLite."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from tenantdb import Tenant, TenantDB
from tests.conformance.app import MIGRATIONS, write_marker
from tests.unit.test_cli import document, run

APP = """
from tenantdb import TenantDB
from tests.unit.test_cli_transfer import hush

db = TenantDB.from_env()
db.neutralise(hush)
"""


def hush(session: Session, tenant: Tenant) -> None:
    session.execute(text("UPDATE markers SET slug = 'hushed'"))


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENANTDB_URL", f"sqlite:///{tmp_path}/data/central.sqlite3")
    monkeypatch.setenv("TENANTDB_MIGRATIONS", MIGRATIONS)


@pytest.fixture
def db() -> Iterator[TenantDB]:
    with TenantDB.from_env() as db:
        db.init()
        db.seed(write_marker)
        db.provision("acme")
        yield db


def test_a_tenant_goes_into_a_file_and_comes_out_as_another(db: TenantDB) -> None:
    told = run("export", "acme", "acme.tar").stdout
    assert "acme is in acme.tar:" in told and "revision 0001" in told
    assert document("export", "acme", "again.tar")["tenant"] == str(db.tenants.get("acme").id)

    assert run("import", "acme.tar", "beta", "--name", "Beta", "--plan", "pro").stdout == "beta is active\n"

    beta = document("show", "beta")
    assert (beta["name"], beta["plan"], beta["revision"]) == ("Beta", "pro", "0001")
    with db.session("beta") as session:
        assert session.scalar(text("SELECT slug FROM markers")) == "acme"
    assert document("audit", "search", "--tenant", "acme", "--action", "tenant.export")[0]["actor"].startswith("cli:")


def test_what_is_there_is_replaced_only_after_a_yes(db: TenantDB) -> None:
    run("export", "acme", "acme.tar")
    run("export-rows", "acme", "rows")
    assert "overwrite" in run("export", "acme", "acme.tar", exit_code=1).stderr
    assert "overwrite" in run("export-rows", "acme", "rows", exit_code=1).stderr

    for verb, where in (("export", "acme.tar"), ("export-rows", "rows")):
        assert "--yes" in run(verb, "acme", where, "--overwrite", exit_code=2).stderr
        run(verb, "acme", where, "--overwrite", "--yes")


def test_a_clone_is_neutralised_or_made_after_a_yes(db: TenantDB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "transfer_app.py").write_text(APP)
    assert "neutralise" in run("clone", "acme", "gamma", exit_code=1).stderr
    assert "--yes" in run("clone", "acme", "gamma", "--not-neutralised", exit_code=2).stderr

    assert document("clone", "acme", "gamma", "--not-neutralised", "--yes")["state"] == "active"
    assert run("--app", "transfer_app:db", "clone", "acme", "delta").stdout == "delta is active\n"

    found = {}
    for slug in ("gamma", "delta"):
        with db.session(slug) as session:
            found[slug] = session.scalar(text("SELECT slug FROM markers"))
    assert found == {"gamma": "acme", "delta": "hushed"}


def test_rows_are_exported_whole_or_table_by_table(db: TenantDB) -> None:
    assert run("export-rows", "acme", "rows").stdout == "acme is in rows: 2 tables, 1 rows\n"
    assert json.loads(Path("rows/markers.jsonl").read_text()) == {"slug": "acme"}

    told = document("export-rows", "acme", "some", "--table", "markers", "--format", "csv")

    assert told["tables"] == {"markers": 1}
    assert sorted(os.listdir("some")) == ["manifest.json", "markers.csv", "schema.json"]


def test_a_file_that_is_none_is_refused_in_a_line(db: TenantDB) -> None:
    Path("file").write_bytes(b"no export")

    assert json.loads(run("import", "file", "beta", "--json", exit_code=1).stderr)["error"]["code"] == "import-refused"
    assert "cannot be opened" in run("import", "nothing", "beta", exit_code=1).stderr
