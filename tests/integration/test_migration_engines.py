"""Twenty databases migrated by eight threads at once: each must get its own tables, where stock Alembic mixes them up."""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.pool import NullPool

from tenantdb.errors import MigrationError
from tenantdb.migrations.local import LocalScripts
from tenantdb.migrations.scripts import Scripts
from tenantdb.migrations.sqlplan import render, script
from tests.integration.cluster import ENV, Cluster

MANY, THREADS = 20, 8
HEAD = """
import uuid
import sqlalchemy as sa
from alembic import op
revision, down_revision = {revision!r}, {down!r}
"""
LANDING = """
def upgrade():
    op.create_table("landed", sa.Column("marker", sa.Text), sa.Column("meant", sa.Text))
    op.execute("INSERT INTO landed (marker) SELECT name FROM marker")
def downgrade():
    op.drop_table("landed")
"""
AGAIN = """
def upgrade():
    op.add_column("landed", sa.Column("size", sa.Numeric(10, 2)))
    op.create_index("landed_by_size", "landed", ["size"])
    op.execute("INSERT INTO landed (marker) SELECT name || '!' FROM marker")
def downgrade():
    op.drop_index("landed_by_size")
    op.drop_column("landed", "size")
    op.execute("DELETE FROM landed WHERE marker LIKE '%!'")
"""
Write = Callable[..., LocalScripts]


def location(folder: Path, *bodies: str, env: str = ENV) -> Path:
    """A script location with a revision per body: 001, 002 ..."""
    (folder / "versions").mkdir(parents=True)
    (folder / "env.py").write_text(env)
    for number, body in enumerate(bodies, start=1):
        head = HEAD.format(revision=f"{number:03}", down=f"{number - 1:03}" if number > 1 else None)
        (folder / "versions" / f"{number:03}.py").write_text(head + textwrap.dedent(body))
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(*bodies: str, env: str = ENV) -> LocalScripts:
        local = LocalScripts(Scripts(str(location(tmp_path / secrets.token_hex(4), *bodies, env=env))))
        assert local.problem is None
        return local

    return written


class Town:
    """Databases with a marker and an identity stamp each."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.tenants: dict[str, str] = {}

    def build(self) -> None:
        first = self.add()
        self.sql(first, "CREATE SCHEMA tenantdb; CREATE TABLE tenantdb.identity (tenant_id uuid NOT NULL, stamped_at timestamptz)")
        for _ in range(MANY - 1):
            self.add(template=first)
        for name, tenant in self.tenants.items():
            self.sql(name, f"INSERT INTO tenantdb.identity VALUES ('{tenant}', now())")

    def add(self, template: str = "template0") -> str:
        name = f"m_{secrets.token_hex(4)}"
        self.cluster.sql(f"CREATE DATABASE {name} TEMPLATE {template}")
        self.tenants[name] = str(uuid.uuid4())
        return name

    def empty(self, names: Iterable[str]) -> None:
        """As they were made, but for the marker."""
        for name in names:
            self.sql(name, f"DROP SCHEMA public CASCADE; CREATE SCHEMA public; CREATE TABLE marker AS SELECT '{name}' AS name")

    def drop(self) -> None:
        for name in self.tenants:
            self.cluster.sql(f"DROP DATABASE {name} WITH (FORCE)")

    def url(self, name: str) -> str:
        return self.cluster.server.url(database=name)

    def sql(self, name: str, statement: str) -> list[tuple[Any, ...]]:
        return self.cluster.sql(statement, database=name)

    @contextmanager
    def connection(self, name: str) -> Iterator[Connection]:
        engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(self.url(name)), poolclass=NullPool)
        with engine.connect() as connection:
            yield connection

    def landed(self, name: str) -> list[str]:
        if not self.sql(name, "SELECT 1 FROM pg_class WHERE relname = 'landed'"):
            return []
        return [marker for (marker,) in self.sql(name, "SELECT marker FROM landed ORDER BY marker")]

    def revision(self, name: str) -> str | None:
        if not self.sql(name, "SELECT 1 FROM pg_class WHERE relname = 'alembic_version'"):
            return None
        return next((revision for (revision,) in self.sql(name, "SELECT version_num FROM alembic_version")), None)

    def is_at_head(self, name: str) -> bool:
        return (self.revision(name), self.landed(name)) == ("002", [name, f"{name}!"])

    def relations(self, name: str) -> set[str]:
        return {found for (found,) in self.sql(name, "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace")}


@pytest.fixture(scope="module")
def built(cluster: Cluster) -> Iterator[Town]:
    town = Town(cluster)
    town.build()
    yield town
    town.drop()


@pytest.fixture
def town(built: Town) -> Town:
    """The first two are empty."""
    built.empty(list(built.tenants)[:2])
    return built


@pytest.fixture
def all_empty(built: Town) -> None:
    built.empty(built.tenants)


@pytest.fixture
def one(town: Town) -> str:
    return next(iter(town.tenants))


def at_once(town: Town, work: Callable[[str], Any]) -> list[Any]:
    """Eight threads that begin together."""
    together = threading.Barrier(THREADS)

    def begin(number: int) -> list[Any]:
        together.wait(30)
        return [work(name) for name in list(town.tenants)[number::THREADS]]

    with ThreadPoolExecutor(THREADS) as threads:
        return [result for results in threads.map(begin, range(THREADS)) for result in results]


def send(town: Town, name: str, text: str) -> None:
    with psycopg.connect(town.url(name), autocommit=True) as connection:
        connection.execute(text.encode())


def sqlstate(error: BaseException) -> str | None:
    return getattr(getattr(error, "orig", error), "sqlstate", None)


# -- at once ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("all_empty")
def test_threads_bring_every_database_up_and_back_each_by_its_own_migrations(town: Town, write: Write) -> None:
    local = write(LANDING, AGAIN)

    def migrate(name: str, target: str) -> tuple[str | None, str | None]:
        with town.connection(name) as connection:
            return local.run(connection, target)

    assert at_once(town, lambda name: migrate(name, "head")) == [(None, "002")] * MANY
    assert [name for name in town.tenants if not town.is_at_head(name)] == []

    assert at_once(town, lambda name: migrate(name, "001")) == [("002", "001")] * MANY
    assert [name for name in town.tenants if town.landed(name) != [name] or town.revision(name) != "001"] == []


@pytest.mark.usefixtures("all_empty")
def test_each_threads_op_is_on_the_connection_that_it_was_given(town: Town, write: Write) -> None:
    local = write(
        """
        def upgrade():
            meant = op.get_bind().info["meant"]
            op.execute(f"CREATE TABLE landed AS SELECT name AS marker, '{meant}' AS meant FROM marker")
        """
    )

    def migrate(name: str) -> None:
        with town.connection(name) as connection:
            connection.info["meant"] = name
            local.run(connection, "head")

    at_once(town, migrate)

    assert [name for name in town.tenants if town.sql(name, "SELECT marker, meant FROM landed") != [(name, name)]] == []


@pytest.mark.usefixtures("all_empty")
def test_tasks_of_one_event_loop_keep_apart_as_well(town: Town, write: Write) -> None:
    from sqlalchemy.ext.asyncio import create_async_engine

    local = write(LANDING, AGAIN)

    async def migrate(name: str) -> None:
        engine = create_async_engine(
            "postgresql+psycopg://", async_creator=lambda: psycopg.AsyncConnection.connect(town.url(name)), poolclass=NullPool
        )
        async with engine.connect() as connection:
            await connection.run_sync(local.run, "head")

    async def everybody() -> None:
        await asyncio.gather(*map(migrate, town.tenants))

    asyncio.run(everybody())

    assert [name for name in town.tenants if not town.is_at_head(name)] == []


@pytest.mark.usefixtures("all_empty")
def test_one_script_brings_every_database_up_and_back(town: Town, write: Write) -> None:
    local = write(LANDING, AGAIN)

    def go(current: str | None, target: str) -> None:
        plan = render(local, current, target, "postgresql")
        assert plan.problem is None
        at_once(town, lambda name: send(town, name, script(plan, database=name, tenant_id=town.tenants[name], lock_timeout=1.0)))

    go(None, "head")
    assert [name for name in town.tenants if not town.is_at_head(name)] == []

    go("002", "001")
    assert [name for name in town.tenants if town.landed(name) != [name] or town.revision(name) != "001"] == []


STOCK_ENV = """
from alembic import context
context.configure(connection=context.config.attributes["connection"])
with context.begin_transaction():
    context.run_migrations()
"""
STOCK = """
import json, logging, sys, threading
from concurrent.futures import ThreadPoolExecutor
import psycopg
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

location, threads, urls = json.load(sys.stdin)
together = threading.Barrier(threads)

def migrate(url):
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(url), poolclass=NullPool)
    config = Config()
    config.set_main_option("script_location", location)
    try:
        with engine.connect() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def begin(number):
    together.wait(30)
    return [migrate(url) for url in urls[number::threads]]

with ThreadPoolExecutor(threads) as pool:
    json.dump([result for results in pool.map(begin, range(threads)) for result in results], sys.stdout)
"""


@pytest.mark.usefixtures("all_empty")
def test_control_stock_alembic_in_threads_goes_wrong(town: Town, tmp_path: Path) -> None:
    """In a process of its own, which may be in any state afterwards."""
    folder = location(tmp_path / "stock", LANDING, AGAIN, env=STOCK_ENV)
    for _ in range(5):
        asked = json.dumps([str(folder), THREADS, [town.url(name) for name in town.tenants]])
        child = subprocess.run([sys.executable, "-c", STOCK], input=asked, capture_output=True, text=True, timeout=100, check=False)
        assert child.returncode == 0, child.stderr
        right = [name for name in town.tenants if town.is_at_head(name)]
        told_so = json.loads(child.stdout).count(None)
        if len(right) < MANY:
            assert told_so != MANY or len(right) != MANY
            return
        town.empty(town.tenants)
    pytest.fail("stock Alembic migrated all databases by threads, five times")


# -- one database ----------------------------------------------------------------------------------------------------------------------


def test_a_migration_that_raises_half_way_leaves_nothing_of_itself(town: Town, one: str, write: Write) -> None:
    local = write(LANDING, AGAIN.replace("def downgrade", "    raise ValueError('half-way')\ndef downgrade"))

    with town.connection(one) as connection:
        with pytest.raises(ValueError, match="half-way"):
            local.run(connection, "head")
        assert not connection.in_transaction()

    assert (town.revision(one), town.landed(one)) == ("001", [one])
    assert "landed_by_size" not in town.relations(one)


def test_a_first_migration_that_raises_leaves_no_version_table(town: Town, one: str, write: Write) -> None:
    local = write(LANDING.replace("def downgrade", "    op.execute('SELECT 1 / 0')\ndef downgrade"))

    with town.connection(one) as connection, pytest.raises(DBAPIError) as caught:
        local.run(connection, "head")

    assert sqlstate(caught.value) == "22012"
    assert town.relations(one) == {"marker"}


def test_a_script_that_fails_leaves_nothing(town: Town, one: str, write: Write) -> None:
    plan = render(write(LANDING.replace("def downgrade", "    op.execute('SELECT 1 / 0')\ndef downgrade")), None, "head", "postgresql")

    with pytest.raises(psycopg.errors.DivisionByZero):
        send(town, one, script(plan, database=one, tenant_id=town.tenants[one]))

    assert town.relations(one) == {"marker"}


def test_get_bind_answers(town: Town, one: str, write: Write) -> None:
    local = write(
        """
        def upgrade():
            name = op.get_bind().execute(sa.text("SELECT name FROM marker")).scalar_one()
            op.execute(sa.text("CREATE TABLE landed AS SELECT cast(:name AS text) AS marker").bindparams(name=f"found {name}"))
        """
    )

    with town.connection(one) as connection:
        local.run(connection, "head")

    assert town.landed(one) == [f"found {one}"]
    assert "get_bind" in str(render(local, None, "head", "postgresql").problem)


def test_what_is_random_is_no_script(write: Write) -> None:
    local = write("def upgrade():\n    op.execute(f\"CREATE TABLE a AS SELECT '{uuid.uuid4()}' AS id\")\n")

    assert "rendered twice, it differs" in str(render(local, None, "head", "postgresql").problem)


@pytest.mark.parametrize(
    "value",
    [
        "100 %",
        "%(x)s %% %s",
        "it's",
        "back\\slash",
        "a\ttab",
        "two\nlines",
        "semi;colon",
        "$guard$ $$ $1",
        "-- no remark",
        "ü \u2603",
        'a "name"',
    ],
)
def test_a_value_arrives_the_same_by_both_ways(town: Town, write: Write, value: str) -> None:
    by_threads, by_script = list(town.tenants)[:2]
    local = write(
        f"""
        def upgrade():
            op.create_table("texts", sa.Column("value", sa.Text, comment={value!r}, server_default={value!r}))
            op.bulk_insert(sa.table("texts", sa.column("value", sa.Text)), [{{"value": {value!r}}}])
            op.execute("INSERT INTO texts VALUES ({quoted(value)})".replace(":", "\\\\:"))
            op.execute('''
                CREATE FUNCTION told() RETURNS text LANGUAGE plpgsql AS $body$
                BEGIN
                    RETURN 'it;' || $$'s$$;  -- 50 %
                END $body$
            '''); op.execute("INSERT INTO texts DEFAULT VALUES; INSERT INTO texts VALUES (told()) -- the end")
        """
    )
    plan = render(local, None, "head", "postgresql")
    assert plan.problem is None

    with town.connection(by_threads) as connection:
        local.run(connection, "head")
    send(town, by_script, script(plan, database=by_script, tenant_id=town.tenants[by_script]))

    for name in (by_threads, by_script):
        assert [found for (found,) in town.sql(name, "SELECT value FROM texts")] == [value, value, value, "it;'s"]
        assert town.sql(name, "SELECT col_description('texts'::regclass, 1)") == [(value,)]
    assert town.sql(by_threads, "SELECT prosrc FROM pg_proc WHERE proname = 'told'") == town.sql(
        by_script, "SELECT prosrc FROM pg_proc WHERE proname = 'told'"
    )


def quoted(value: str) -> str:
    """As SQL, inside a Python string inside a Python file."""
    return repr("'" + value.replace("'", "''") + "'")[1:-1].replace('"', '\\"').replace("\\'", "'")


# -- the guard -------------------------------------------------------------------------------------------------------------------------


def test_a_script_is_refused_by_a_database_at_another_revision(town: Town, one: str, write: Write) -> None:
    plan = render(write(LANDING, AGAIN), "001", "head", "postgresql")
    text = script(plan, database=one, tenant_id=town.tenants[one])

    with pytest.raises(psycopg.DatabaseError, match="no version table") as missing:
        send(town, one, text)
    town.sql(one, "CREATE TABLE alembic_version (version_num text)")
    with pytest.raises(psycopg.DatabaseError, match="is at base, not at 001") as empty:
        send(town, one, text)
    town.sql(one, "INSERT INTO alembic_version VALUES ('001'), ('000')")
    with pytest.raises(psycopg.DatabaseError, match="is at 000, 001, not at 001") as two:
        send(town, one, text)

    assert {sqlstate(each.value) for each in (missing, empty, two)} == {"TD001"}
    assert "landed" not in town.relations(one)


def test_a_script_is_refused_by_a_database_that_is_not_the_tenants(town: Town, write: Write) -> None:
    one, other = list(town.tenants)[:2]
    plan = render(write(LANDING), None, "head", "postgresql")

    for database, tenant in ((other, town.tenants[one]), (one, town.tenants[other])):
        with pytest.raises(psycopg.DatabaseError, match="names another tenant") as caught:
            send(town, one, script(plan, database=database, tenant_id=tenant))
        assert sqlstate(caught.value) == "TD003"
    with pytest.raises(psycopg.DatabaseError, match="no identity stamp") as caught:
        send(town, "postgres", script(plan, database="postgres", tenant_id=town.tenants[one]))
    assert sqlstate(caught.value) == "TD003"
    assert town.relations(one) == {"marker"}


def test_a_script_is_refused_where_its_literals_would_be_read_another_way(town: Town, one: str, write: Write) -> None:
    plan = render(write(LANDING), None, "head", "postgresql")

    with psycopg.connect(town.url(one), autocommit=True, options="-c standard_conforming_strings=off") as connection:
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="standard_conforming_strings"):
            connection.execute(script(plan, database=one, tenant_id=town.tenants[one]).encode())


@pytest.mark.parametrize("way", ["threads", "script"])
def test_a_second_migration_of_a_database_is_told_to_come_back(town: Town, one: str, write: Write, way: str) -> None:
    local = write(LANDING, AGAIN)
    with town.connection(one) as connection:
        local.run(connection, "001")
    plan = render(local, "001", "head", "postgresql")

    with psycopg.connect(town.url(one)) as busy, town.connection(one) as connection:
        busy.execute("LOCK TABLE alembic_version IN SHARE UPDATE EXCLUSIVE MODE")
        with pytest.raises((psycopg.DatabaseError, DBAPIError), match="another migration of this database") as caught:
            if way == "script":
                send(town, one, script(plan, database=one, tenant_id=town.tenants[one]))
            else:
                local.run(connection, "head")
        busy.rollback()
        local.run(connection, "head")

    assert sqlstate(caught.value) == "TD002"
    assert town.is_at_head(one)


def test_of_many_who_migrate_one_database_at_once_one_does_it(town: Town, one: str, write: Write) -> None:
    local = write(LANDING, AGAIN)
    plan = render(local, None, "head", "postgresql")

    def migrate(number: int) -> str | None:
        try:
            if number % 2:
                send(town, one, script(plan, database=one, tenant_id=town.tenants[one], lock_timeout=5.0))
            else:
                with town.connection(one) as connection:
                    local.run(connection, "head", current=None, lock_timeout=5.0)
        except (psycopg.DatabaseError, DBAPIError) as error:
            return sqlstate(error)
        return "done"

    with ThreadPoolExecutor(THREADS) as threads:
        ended = list(threads.map(migrate, range(THREADS)))

    assert set(ended) <= {"done", "TD001", "TD002"}
    assert town.revision(one) in ("001", "002")
    with town.connection(one) as connection:
        local.run(connection, "head")
    assert town.is_at_head(one)


@pytest.mark.parametrize("way", ["threads", "script"])
def test_limits_hold_for_a_migration_and_for_nothing_after_it(town: Town, one: str, write: Write, way: str) -> None:
    show = "current_setting('{0}_timeout')"
    local = write(
        f"""
        def upgrade():
            op.execute("CREATE TABLE landed AS SELECT {show.format("lock")} || ' ' || {show.format("statement")} AS marker")
        """
    )
    limits = {"lock_timeout": 0.25, "statement_timeout": 7}
    if way == "script":
        plan = render(local, None, "head", "postgresql")
        with psycopg.connect(town.url(one), autocommit=True) as session:
            session.execute(script(plan, database=one, tenant_id=town.tenants[one], **limits).encode())
            left = session.execute("SELECT current_setting('lock_timeout')").fetchall()
    else:
        with town.connection(one) as connection:
            local.run(connection, "head", **limits)
            left = connection.exec_driver_sql("SELECT current_setting('lock_timeout')").fetchall()

    assert town.landed(one) == ["250ms 7s"]
    assert [tuple(row) for row in left] == [("0",)]


def test_a_lock_that_somebody_holds_ends_a_migration_in_time(town: Town, one: str, write: Write) -> None:
    local = write("def upgrade():\n    op.add_column('marker', sa.Column('more', sa.Text))\n")

    with psycopg.connect(town.url(one)) as busy, town.connection(one) as connection:
        busy.execute("SELECT * FROM marker")
        with pytest.raises(DBAPIError) as caught:
            local.run(connection, "head", lock_timeout=0.05)

    assert sqlstate(caught.value) == "55P03"
    assert town.relations(one) == {"marker"}


# -- what the database says ------------------------------------------------------------------------------------------------------------


def test_a_database_at_an_unknown_revision_or_at_two_is_refused(town: Town, one: str, write: Write) -> None:
    local = write(LANDING, AGAIN)
    town.sql(one, "CREATE TABLE alembic_version (version_num varchar(32)); INSERT INTO alembic_version VALUES ('abc')")

    with town.connection(one) as connection:
        with pytest.raises(MigrationError, match="'abc' is no revision"):
            local.run(connection, "head")
        town.sql(one, "INSERT INTO alembic_version VALUES ('001')")
        with pytest.raises(MigrationError, match=r"several revisions at once \(001, abc\)"):
            local.run(connection, "head")

    assert town.relations(one) == {"marker", "alembic_version"}


@pytest.mark.parametrize("how", ["commit", "rollback"])
def test_a_revision_that_ends_its_transaction_by_itself_is_not_believed(town: Town, one: str, write: Write, how: str) -> None:
    local = write(LANDING, f"def upgrade():\n    op.create_table('a')\n    op.get_bind().{how}()\n")

    with town.connection(one) as connection:
        with pytest.raises((InvalidRequestError, MigrationError)):
            local.run(connection, "head")
        assert not connection.in_transaction()

    assert town.revision(one) == "001"


# -- autocommit ------------------------------------------------------------------------------------------------------------------------

CONCURRENTLY = """
def upgrade():
    op.execute("INSERT INTO landed VALUES ('before')")
    with op.get_context().autocommit_block():
        op.execute("DROP INDEX IF EXISTS landed_once")
        op.create_index("landed_once", "landed", ["marker"], unique=True, postgresql_concurrently=True{exists})
    op.execute("INSERT INTO landed VALUES ('after')")
"""


@pytest.fixture
def concurrently(town: Town, one: str, write: Write) -> LocalScripts:
    local = write(LANDING, CONCURRENTLY.format(exists=""))
    with town.connection(one) as connection:
        local.run(connection, "001")
    return local


def test_an_index_is_built_concurrently(town: Town, one: str, concurrently: LocalScripts) -> None:
    with town.connection(one) as connection:
        assert concurrently.run(connection, "head", lock_timeout=0.1, statement_timeout=30) == ("001", "002")

    assert town.landed(one) == sorted(["after", "before", one])
    assert town.sql(one, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'landed_once'::regclass") == [(True,)]


def test_what_is_built_concurrently_waits_for_others_however_long_that_takes(town: Town, one: str, write: Write) -> None:
    note = "INSERT INTO landed SELECT current_setting('lock_timeout')"
    local = write(
        LANDING,
        f"""
        def upgrade():
            op.execute("{note}")
            with op.get_context().autocommit_block():
                op.execute("{note}")
            op.execute("{note}")
        """,
    )

    with town.connection(one) as connection:
        connection.exec_driver_sql("SET lock_timeout = '7s'")
        connection.commit()
        local.run(connection, "head", lock_timeout=0.25)

    assert town.landed(one) == sorted(["250ms", "0", "250ms", one])


def test_an_invalid_index_is_named_and_the_next_attempt_ends_well(town: Town, one: str, concurrently: LocalScripts) -> None:
    town.sql(one, "INSERT INTO landed VALUES ('twice'), ('twice')")

    with town.connection(one) as connection:
        with pytest.raises(
            MigrationError, match=r"revision 002 failed \(UniqueViolation \(23505\).*\) and left an invalid index: landed_once"
        ):
            concurrently.run(connection, "head")
        assert town.revision(one) == "001"
        town.sql(one, "DELETE FROM landed WHERE marker IN ('twice', 'before')")
        assert concurrently.run(connection, "head") == ("001", "002")


def test_an_invalid_index_of_an_earlier_attempt_does_not_pass_for_a_good_one(town: Town, one: str, write: Write) -> None:
    source = CONCURRENTLY.format(exists=", if_not_exists=True").replace('        op.execute("DROP INDEX IF EXISTS landed_once")\n', "")
    local = write(LANDING, source)

    with town.connection(one) as connection:
        local.run(connection, "001")
        town.sql(one, "INSERT INTO landed VALUES ('twice'), ('twice')")
        with pytest.raises(MigrationError, match="left an invalid index: landed_once"):
            local.run(connection, "head")
        town.sql(one, "DELETE FROM landed WHERE marker IN ('twice', 'before')")
        with pytest.raises(MigrationError, match="an earlier attempt left an invalid index: landed_once"):
            local.run(connection, "head")

    assert town.revision(one) == "001"


def test_after_an_autocommit_block_the_lock_is_held_again(town: Town, one: str, write: Write) -> None:
    locks = "SELECT count(*)::text FROM pg_locks WHERE relation = 'alembic_version'::regclass AND mode = 'ShareUpdateExclusiveLock'"
    local = write(
        LANDING,
        f"""
        def upgrade():
            count = lambda: op.execute("INSERT INTO landed {locks}")
            count()
            with op.get_context().autocommit_block():
                count()
            count()
        """,
        f'def upgrade():\n    op.execute("INSERT INTO landed {locks}")\n',
    )

    with town.connection(one) as connection:
        local.run(connection, "head")

    assert town.sql(one, "SELECT marker FROM landed OFFSET 1") == [("1",), ("0",), ("1",), ("1",)]


# -- env.py ----------------------------------------------------------------------------------------------------------------------------


def test_what_env_py_says_holds_for_both_ways(town: Town, write: Write) -> None:
    by_threads, by_script = list(town.tenants)[:2]
    local = write(
        LANDING, env=ENV.replace("target_metadata=None", 'target_metadata=None, version_table="ours", version_table_schema="Ops"')
    )

    for name in (by_threads, by_script):
        town.sql(name, 'DROP SCHEMA IF EXISTS "Ops" CASCADE; CREATE SCHEMA "Ops"')
    with town.connection(by_threads) as connection:
        local.run(connection, "head")
    plan = render(local, None, "head", "postgresql")
    send(town, by_script, script(plan, database=by_script, tenant_id=town.tenants[by_script]))

    for name in (by_threads, by_script):
        assert town.sql(name, 'SELECT version_num FROM "Ops".ours') == [("001",)]
        assert town.landed(name) == [name]
        town.sql(name, 'DROP SCHEMA "Ops" CASCADE')


def test_a_callback_of_env_py_is_called_for_each_database(town: Town, one: str, write: Write) -> None:
    env = ENV.replace("target_metadata=None", "target_metadata=None, on_version_apply=told").replace(
        "\nrun_env",
        "\ndef told(ctx, step, heads, run_args, **more):\n"
        "    ctx.connection.exec_driver_sql(f\"INSERT INTO landed VALUES ('at {step.up_revision_id}')\")\n\nrun_env",
    )
    local = write(LANDING, AGAIN, env=env)

    with town.connection(one) as connection:
        local.run(connection, "head")

    assert town.landed(one) == sorted([one, f"{one}!", "at 001", "at 002"])
