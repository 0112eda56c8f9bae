"""The fixtures for users' tests, in runs of pytest of their own: what a user writes, and what comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import psycopg
import pytest

from tenantdb.errors import ConfigError
from tenantdb.testing import places
from tests.integration.project import Borrowed, borrowed, make, run
from tests.world import eventually

__all__ = ["borrowed"]

pytest_plugins = ["pytester"]

TESTS = """
import pytest
from sqlalchemy import select
from tenantdb import TenantState
from application import Ours, Patient

def names(db, tenant):
    with db.session(tenant) as session:
        return session.scalars(select(Patient.name).order_by(Patient.id)).all()

def test_a_tenant_is_migrated_and_seeded_and_of_this_test_alone(tenant_db, tenant):
    assert tenant.state is TenantState.ACTIVE
    assert names(tenant_db, tenant) == [tenant.slug]
    with tenant_db.begin(tenant) as session:
        session.add(Patient(id=2, name="Ann"))

def test_and_so_is_the_next(tenant_db, tenant):
    assert names(tenant_db, tenant) == [tenant.slug]

def test_settings_and_session_are_the_applications(tenant_db, tenant_session):
    assert tenant_db.settings.registry_pool_size == 2
    assert isinstance(tenant_session, Ours)
    assert tenant_session.autoflush is False
"""
SHARED = """
import pytest
from sqlalchemy import select
from application import Patient
from test_application import names

@pytest.fixture(scope="module")
def tenant(tenant_db):
    return tenant_db.provision("shared")

@pytest.mark.parametrize("run", [1, 2])
def test_what_is_committed_in_the_session_is_rolled_back(tenant_db, tenant, tenant_session, run):
    assert tenant_session.scalars(select(Patient.name)).all() == ["shared"]
    tenant_session.add(Patient(id=2, name="Ann"))
    tenant_session.commit()
    tenant_session.add(Patient(id=3, name="Bob"))
    tenant_session.flush()
    tenant_session.rollback()
    assert tenant_session.scalars(select(Patient.name).order_by(Patient.id)).all() == ["shared", "Ann"]
    assert names(tenant_db, tenant) == ["shared"]

def test_and_nothing_of_it_is_left(tenant_db, tenant):
    assert names(tenant_db, tenant) == ["shared"]
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    return make(pytester, test_application=TESTS, test_shared=SHARED)


def test_the_fixtures_work_on_sqlite_where_nothing_is_said(project: pytest.Pytester) -> None:
    run(project).assert_outcomes(passed=6)
    assert not Path(project.path / "nobody").exists()


def test_the_fixtures_work_on_a_postgresql_that_is_started_for_the_run(project: pytest.Pytester) -> None:
    run(project, "--tenantdb=postgresql").assert_outcomes(passed=6)


def test_the_fixtures_work_on_a_server_that_is_there_and_leave_it_as_it_was(project: pytest.Pytester, borrowed: Borrowed) -> None:
    before = borrowed.catalogue()
    run(project, f"--tenantdb={borrowed.url}").assert_outcomes(passed=6)
    assert borrowed.catalogue() == before


def test_two_processes_of_xdist_share_a_server_and_leave_it_as_it_was(project: pytest.Pytester, borrowed: Borrowed) -> None:
    before = borrowed.catalogue()
    result = run(project, f"--tenantdb={borrowed.url}", "-n2", "--dist=loadfile")
    result.assert_outcomes(passed=6)
    assert "2 workers" in result.stdout.str()
    assert borrowed.catalogue() == before


ENDS = """
import os, pytest
from sqlalchemy import text

@pytest.fixture(scope="session")
def session_left_open(tenant_db):
    yield tenant_db.session(tenant_db.provision("kept"))

def leave(tenant_db, tenant, session_left_open):
    # what nobody discards: a tenant of the test's own, suspended and held, a spare, and a transaction in which there is somebody
    tenant_db.hold(tenant_db.suspend(tenant_db.provision("another").id).id, reason="a court asks for it")
    tenant_db.spares.fill(1)
    session_left_open.execute(text("SELECT 1"))

def test_fails(tenant_db, tenant, session_left_open):
    leave(tenant_db, tenant, session_left_open)
    assert False

def test_is_interrupted(tenant_db, tenant, session_left_open):
    leave(tenant_db, tenant, session_left_open)
    raise KeyboardInterrupt

def test_is_killed(tenant_db, tenant, session_left_open):
    leave(tenant_db, tenant, session_left_open)
    os._exit(9)
"""


@pytest.mark.parametrize(
    ("test", "ends"), [("test_fails", pytest.ExitCode.TESTS_FAILED), ("test_is_interrupted", pytest.ExitCode.INTERRUPTED)]
)
def test_a_run_that_ends_badly_leaves_the_server_as_it_was(pytester: pytest.Pytester, borrowed: Borrowed, test: str, ends: int) -> None:
    before = borrowed.catalogue()
    result = run(make(pytester, test_ends=ENDS), f"--tenantdb={borrowed.url}", "-k", test)
    assert result.ret == ends
    assert "error" not in result.parseoutcomes()
    assert borrowed.catalogue() == before


def test_what_a_killed_run_has_left_goes_with_a_later_one(
    pytester: pytest.Pytester, borrowed: Borrowed, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = borrowed.catalogue()
    killed = run(make(pytester, test_ends=ENDS), f"--tenantdb={borrowed.url}", "-k", "test_is_killed")
    assert killed.ret == 9
    left = borrowed.catalogue()
    assert sum(name.startswith("tenantdb_test_") for _, name, _ in left) == 1

    def another_run() -> None:
        with places.place(borrowed.url, cast("Any", None)):
            pass

    another_run()
    assert borrowed.catalogue() == left  # it may be going on: it began a moment ago
    monkeypatch.setattr(places, "_ABANDONED_AFTER", 0.0)
    (database,) = (name for _, name, _ in left if name.startswith("tenantdb_test_"))
    eventually(lambda: not borrowed.connection.execute("SELECT FROM pg_stat_activity WHERE datname = %s", [database]).fetchall())
    with psycopg.connect(borrowed.url, dbname=database):
        another_run()
        assert borrowed.catalogue() == left  # somebody is there
    eventually(lambda: not borrowed.connection.execute("SELECT FROM pg_stat_activity WHERE datname = %s", [database]).fetchall())
    another_run()
    assert borrowed.catalogue() == before


@pytest.mark.parametrize("rights", ["NOCREATEDB CREATEROLE", "CREATEDB NOCREATEROLE"])
def test_a_login_that_may_not_make_what_it_must_is_told_so(borrowed: Borrowed, rights: str) -> None:
    borrowed.connection.execute(f"CREATE ROLE poor LOGIN {rights} PASSWORD 'poor'; GRANT CONNECT ON DATABASE postgres TO poor")
    try:
        with (
            pytest.raises(ConfigError, match="CREATEDB CREATEROLE"),
            places.place(borrowed.url.replace("ci:ci@", "poor:poor@"), cast("Any", None)),
        ):
            pass
    finally:
        borrowed.connection.execute("DROP OWNED BY poor; DROP ROLE poor")


def test_without_an_application_the_settings_fixture_is_enough(pytester: pytest.Pytester) -> None:
    pytester.makeconftest('pytest_plugins = ["tenantdb.testing.plugin"]')
    pytester.makepyfile(
        "def test_it(tenant_db, tenant, tenant_session):\n    assert tenant_session.connection().exec_driver_sql('SELECT 1').scalar() == 1"
    )
    run(pytester).assert_outcomes(passed=1)


def test_a_failing_test_leaves_no_noise_behind(project: pytest.Pytester) -> None:
    project.makepyfile(test_shared="", test_application="def test_it(tenant_session):\n    tenant_session.begin_nested()\n    assert False")
    run(project).assert_outcomes(failed=1)


def test_another_place_is_refused_without_being_shown(pytester: pytest.Pytester) -> None:
    pytester.makeconftest('pytest_plugins = ["tenantdb.testing.plugin"]')
    pytester.makepyfile("def test_it(tenant_db): ...")
    result = run(pytester, "--tenantdb=mysql://root:canary@db/")
    assert "--tenantdb takes sqlite, postgresql or a postgresql:// URL, not 'mysql'" in result.stdout.str()
    assert result.ret != 0


def test_without_the_plugin_there_is_no_such_option(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(tenant_db): ...")
    assert run(pytester, "--tenantdb=sqlite").ret == pytest.ExitCode.USAGE_ERROR
