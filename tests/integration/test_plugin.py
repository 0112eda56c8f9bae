"""The fixtures for users' tests, in runs of pytest of their own: what a user writes, and what comes of it."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from tenantdb.testing.postgres import EmbeddedServer

pytest_plugins = ["pytester"]

APPLICATION = """
import pytest
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from tenantdb import TenantDB

class Base(DeclarativeBase): ...

class Patient(Base):
    __tablename__ = "patients"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]

class Ours(Session): ...

db = TenantDB("sqlite:///nobody/opens/this.sqlite3", migrations="schema", session_class=Ours, session_options={"autoflush": False})

@db.seed
def first(session, tenant):
    session.add(Patient(id=1, name=tenant.slug))
"""
CONFTEST = """
import pytest
pytest_plugins = ["tenantdb.testing.plugin"]

@pytest.fixture(scope="session")
def tenant_db_app():
    from application import db
    return db

@pytest.fixture(scope="session")
def tenant_db_settings():
    return {"registry_pool_size": 2}
"""
ENVIRONMENT = """
from application import Base, db
from tenantdb.migrations import run_env
run_env(db, target_metadata=Base.metadata)
"""
REVISION = """
import sqlalchemy as sa
from alembic import op
revision, down_revision = "1", None
def upgrade():
    op.create_table("patients", sa.Column("id", sa.Integer, primary_key=True), sa.Column("name", sa.String, nullable=False))
"""
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
    """A user's project with an application, migrations and tests."""
    pytester.makepyfile(application=APPLICATION, test_application=TESTS, test_shared=SHARED)
    pytester.makeconftest(CONFTEST)
    versions = pytester.mkdir("schema") / "versions"
    versions.mkdir()
    (versions / "1_patients.py").write_text(REVISION)
    (versions.parent / "env.py").write_text(ENVIRONMENT)
    pytester.makeini("[pytest]\nfilterwarnings = error\npythonpath = .\n")
    return pytester


def run(project: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return project.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:asyncio", *arguments, timeout=100)


def test_the_fixtures_work_on_sqlite_where_nothing_is_said(project: pytest.Pytester) -> None:
    run(project).assert_outcomes(passed=6)
    assert not Path(project.path / "nobody").exists()


def test_the_fixtures_work_on_a_postgresql_that_is_started_for_the_run(project: pytest.Pytester) -> None:
    run(project, "--tenantdb=postgresql").assert_outcomes(passed=6)


def test_the_fixtures_work_on_a_server_that_is_there_and_leave_it_as_it_was(
    project: pytest.Pytester,
) -> None:
    catalogue = "SELECT datname, datacl::text FROM pg_database UNION ALL SELECT rolname, NULL FROM pg_roles ORDER BY 1, 2"
    with EmbeddedServer(fsync=False) as server, psycopg.connect(server.url()) as connection:
        connection.execute("CREATE ROLE ci LOGIN CREATEDB CREATEROLE PASSWORD 'ci'")
        connection.execute("GRANT CONNECT ON DATABASE postgres TO ci")
        connection.commit()
        before = connection.execute(catalogue).fetchall()
        run(project, f"--tenantdb={server.url('ci', 'ci')}").assert_outcomes(passed=6)
        assert connection.execute(catalogue).fetchall() == before


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
