"""The ten revisions and the models say the same: on a plain SQLite database, and in a clinic's on both backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy.orm import Session

from examples.clinic.db import first_rows
from examples.clinic.models import Base, Category, ConsentTemplate, Patient, Row, now
from tenantdb import TenantDB
from tests.world import World

REVISIONS = [f"{number:03}" for number in range(1, 11)]


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sa.Connection]:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/clinic.sqlite3")

    @sa.event.listens_for(engine, "connect")
    def foreign_keys(dbapi_connection: Any, record: Any) -> None:
        dbapi_connection.execute("PRAGMA foreign_keys=ON")

    with engine.connect() as connection:
        yield connection
    engine.dispose()


def scripts() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", "examples.clinic:migrations")
    return ScriptDirectory.from_config(config)


def run(connection: sa.Connection, steps: Callable[[Any, Any], Any]) -> None:
    context = MigrationContext.configure(connection, opts={"fn": steps, "target_metadata": Base.metadata})
    with Operations.context(context):
        context.run_migrations()


def upgrade(connection: sa.Connection, to: str = "head") -> None:
    run(connection, lambda revision, context: scripts()._upgrade_revs(to, revision))


def downgrade(connection: sa.Connection, to: str = "base") -> None:
    run(connection, lambda revision, context: scripts()._downgrade_revs(to, revision))


def differences(connection: sa.Connection) -> list[Any]:
    options = {"compare_type": True, "compare_server_default": True}
    found: list[Any] = compare_metadata(MigrationContext.configure(connection, opts=options), Base.metadata)
    return found


def shape(connection: sa.Connection) -> dict[str, set[str]]:
    """Tables with their columns, checks and indexes."""
    inspector = sa.inspect(connection)
    return {
        table: {column["name"] for column in inspector.get_columns(table)}
        | {str(check["name"]) for check in inspector.get_check_constraints(table)}
        | {str(index["name"]) for index in inspector.get_indexes(table)}
        for table in inspector.get_table_names()
        if table != "alembic_version"
    }


def test_there_are_ten_revisions_in_one_line() -> None:
    assert [script.revision for script in reversed(list(scripts().walk_revisions()))] == REVISIONS


def test_the_revisions_make_what_the_models_say(connection: sa.Connection) -> None:
    upgrade(connection)

    assert differences(connection) == []
    revised = shape(connection)
    downgrade(connection)
    Base.metadata.create_all(connection)
    assert shape(connection) == revised  # checks and indexes too, which autogenerate does not compare on SQLite


def test_a_clinic_s_database_is_what_the_models_say(db: TenantDB, world: World) -> None:
    with world.inside(db.provision("acme-dental"), db) as connection:
        assert [found for found in differences(connection) if not str(getattr(found[1], "name", "")).startswith("tenantdb_")] == []


def test_a_column_that_the_models_do_not_know_is_found(connection: sa.Connection) -> None:
    upgrade(connection)
    connection.execute(sa.text("ALTER TABLE patients ADD COLUMN shoe_size INTEGER"))

    assert [difference[0] for difference in differences(connection)] == ["remove_column"]


def test_every_revision_goes_down_and_up_again_and_keeps_the_rows_of_others(connection: sa.Connection) -> None:
    seen = [shape(connection)]
    for revision in REVISIONS:
        upgrade(connection, revision)
        seen.append(shape(connection))
    with Session(connection) as session:
        session.add(Patient(first_name="Maya", last_name="Bauer"))
        session.commit()

    for revision, before in zip([*reversed(REVISIONS[:-1]), "base"], reversed(seen[:-1]), strict=True):
        downgrade(connection, revision)
        assert shape(connection) == before
        if revision != "base":
            assert connection.scalar(sa.text("SELECT count(*) FROM patients")) == 1
    upgrade(connection)
    assert shape(connection) == seen[-1]


def test_every_table_of_its_own_can_be_soft_deleted() -> None:
    parts = {"appointment_items", "document_items", "document_counters"}
    rows = {mapper.class_.__tablename__ for mapper in Base.registry.mappers if issubclass(mapper.class_, Row)}
    assert rows | parts == set(Base.metadata.tables)
    assert all("deleted_at" in Base.metadata.tables[name].columns for name in rows)


def test_seeding_twice_writes_once_and_does_not_bring_back_what_was_deleted(connection: sa.Connection) -> None:
    upgrade(connection)
    with Session(connection) as session:
        first_rows(session, tenant=None)  # type: ignore[arg-type]  # the same rows for every clinic
        session.flush()
        session.scalars(sa.select(Category).limit(1)).one().deleted_at = now()
        counts = [session.scalar(sa.select(sa.func.count()).select_from(model)) for model in (Category, ConsentTemplate)]
        first_rows(session, tenant=None)  # type: ignore[arg-type]
        session.flush()

        assert [session.scalar(sa.select(sa.func.count()).select_from(model)) for model in (Category, ConsentTemplate)] == counts == [3, 2]
