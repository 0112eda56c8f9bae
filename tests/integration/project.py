"""A user's project with an application, migrations and tests of its own, in which pytest runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from tenantdb.testing import EmbeddedServer

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


def make(pytester: pytest.Pytester, **modules: str) -> pytest.Pytester:
    """The application, and what else is given: modules by name."""
    pytester.makepyfile(application=APPLICATION, **modules)
    pytester.makeconftest(CONFTEST)
    versions = pytester.mkdir("schema") / "versions"
    versions.mkdir()
    (versions / "1_patients.py").write_text(REVISION)
    (versions.parent / "env.py").write_text(ENVIRONMENT)
    pytester.makeini("[pytest]\nfilterwarnings = error\npythonpath = .\n")
    return pytester


def run(project: pytest.Pytester, *arguments: str, asyncio: bool = False) -> pytest.RunResult:
    """A run of pytest of its own. pytest-asyncio takes part only where it is asked to: it warns where it finds no configuration."""
    given = ("-o", "asyncio_default_fixture_loop_scope=function") if asyncio else ("-p", "no:asyncio")
    return project.runpytest_subprocess("-p", "no:cacheprovider", *given, *arguments, timeout=100)


@dataclass(frozen=True)
class Borrowed:
    """A server that is somebody else's. ``url`` is a login with the rights that the page asks for and no more."""

    url: str
    connection: psycopg.Connection[Any]

    def catalogue(self) -> list[Any]:
        """Every database with who may enter it, every role, and who is a member of which."""
        return self.connection.execute(_CATALOGUE).fetchall()


_CATALOGUE = """
SELECT 'database', datname, datacl::text FROM pg_database UNION ALL SELECT 'role', rolname, NULL FROM pg_roles
UNION ALL SELECT 'member', roleid::regrole::text, member::regrole::text FROM pg_auth_members ORDER BY 1, 2, 3
"""


@pytest.fixture(scope="module")
def borrowed() -> Iterator[Borrowed]:
    with EmbeddedServer(fsync=False) as server, psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute("CREATE ROLE ci LOGIN CREATEDB CREATEROLE PASSWORD 'ci'")
        connection.execute("GRANT CONNECT ON DATABASE postgres TO ci")
        yield Borrowed(server.url("ci", "ci"), connection)
