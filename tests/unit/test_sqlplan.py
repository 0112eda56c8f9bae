"""What becomes one script for everybody, and what does not. Nothing here has a server; tests/integration sends the scripts."""

from __future__ import annotations

import pickle
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from sqlalchemy import create_engine, event, inspect
from sqlalchemy.engine import Connection

from tenantdb.errors import MigrationError
from tenantdb.migrations import local as local_module
from tenantdb.migrations.local import LocalScripts
from tenantdb.migrations.scripts import Scripts
from tenantdb.migrations.sqlplan import SQLPlan, render, script

ENV = """
from types import SimpleNamespace
from tenantdb.migrations import run_env
run_env(SimpleNamespace(migrations=None), target_metadata=None{options})
"""
HEAD = """
import datetime, random, uuid
import sqlalchemy as sa
from alembic import context, op
revision, down_revision = {revision!r}, {down!r}
"""
Write = Callable[..., LocalScripts]


def location(folder: Path, *bodies: str, env: str = "", **options: str) -> Scripts:
    """A script location with a revision per body: 001, 002 ..."""
    (folder / "versions").mkdir(parents=True, exist_ok=True)
    given = "".join(f", {name}={value}" for name, value in options.items())
    (folder / "env.py").write_text(env or ENV.format(options=given))
    for number, body in enumerate(bodies, start=1):
        head = HEAD.format(revision=f"{number:03}", down=f"{number - 1:03}" if number > 1 else None)
        (folder / "versions" / f"{number:03}.py").write_text(head + textwrap.dedent(body))
    return Scripts(str(folder))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(*bodies: str, **options: str) -> LocalScripts:
        return LocalScripts(location(tmp_path / "migrations", *bodies, **options))

    return written


def upgrade(*lines: str) -> str:
    return "def upgrade():\n" + textwrap.indent("\n".join(lines), "    ") + "\ndef downgrade():\n    pass\n"


def plan(local: LocalScripts, current: str | None = None, target: str | None = "head") -> SQLPlan:
    return render(local, current, target, "postgresql")


def test_ddl_becomes_statements_and_the_version_is_the_last_of_them(write: Write) -> None:
    local = write(
        upgrade("op.create_table('patients', sa.Column('id', sa.Integer, primary_key=True))"),
        upgrade("op.add_column('patients', sa.Column('born', sa.Date))", "op.create_index('by_birth', 'patients', ['born'])"),
    )

    found = plan(local, "001")

    assert (found.problem, found.from_revision, found.to_revision) == (None, "001", "002")
    assert found.statements == (
        "ALTER TABLE patients ADD COLUMN born DATE",
        "CREATE INDEX by_birth ON patients (born)",
        "UPDATE alembic_version SET version_num='002' WHERE alembic_version.version_num = '001'",
    )


def test_from_base_the_version_table_is_made_where_it_is_missing(write: Write) -> None:
    found = plan(write(upgrade("op.execute('SELECT 1')")))

    assert found.statements[0].startswith("CREATE TABLE IF NOT EXISTS alembic_version")
    assert found.statements[1:] == (
        "SELECT 1",
        "INSERT INTO alembic_version (version_num) VALUES ('001') RETURNING alembic_version.version_num",
    )


def test_down_to_base_the_row_goes(write: Write) -> None:
    found = plan(write(upgrade("pass")), "001", "base")

    assert (found.to_revision, found.statements) == (None, ("DELETE FROM alembic_version WHERE alembic_version.version_num = '001'",))


def test_at_the_target_there_is_nothing_to_send(write: Write) -> None:
    assert plan(write(upgrade("pass")), "001").statements == ()


@pytest.mark.parametrize(
    "text",
    [
        "UPDATE t SET a = '100 %' WHERE b LIKE '%(x)s%%'",
        "CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $f$ BEGIN RETURN 1; END $f$",
        "CREATE TABLE a (i int); INSERT INTO a VALUES (1); ",
        "UPDATE t SET a = 'one\ttwo'",
        "UPDATE t SET a = 'back\\\\slash'",
        "SELECT 1 -- the last word",
        "UPDATE t SET a = 'COMMIT; ROLLBACK'",
        "-- COMMIT; it\nSELECT 1",
    ],
)
def test_text_is_sent_as_it_is(write: Write, text: str) -> None:
    found = plan(write(upgrade("pass"), upgrade(f"op.execute({text!r})")), "001")

    assert found.problem is None
    assert found.statements[0] == text.strip()


def test_values_are_written_out(write: Write) -> None:
    local = write(
        upgrade("pass"),
        upgrade(
            "t = sa.table('t', sa.column('a', sa.String), sa.column('b', sa.Integer))",
            "op.bulk_insert(t, [{'a': 'it\\'s 5 % \\\\ \\t', 'b': 1}])",
            "op.execute(sa.text('DELETE FROM t WHERE a = :gone').bindparams(gone='x'))",
        ),
    )

    assert plan(local, "001").statements[:2] == (
        "INSERT INTO t (a, b) VALUES ('it''s 5 % \\ \t', 1)",
        "DELETE FROM t WHERE a = 'x'",
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("op.execute(f\"SELECT '{uuid.uuid4()}'\")", "rendered twice, it differs"),
        ("op.execute(f'SELECT {random.random()}')", "rendered twice, it differs"),
        ("op.execute(f\"SELECT '{datetime.date.today()}'\")", "reads the clock"),
        ("op.execute('a' if context.is_offline_mode() else 'b')", "is_offline_mode"),
        ("op.get_bind().execute(sa.text('SELECT 1')).scalar()", "get_bind"),
        ("op.get_context().connection.execute(sa.text('SELECT 1')).scalar()", "cannot be rendered: AttributeError"),
        ("op.execute('SELECT :nothing')", "no value for :nothing"),
        ("sa.inspect(op.get_context().connection)", "inspect"),
        ("with op.get_context().autocommit_block(): op.execute('CREATE INDEX CONCURRENTLY i ON t (a)')", "autocommit block"),
        ("op.execute('COMMIT')", "not one transaction"),
        ("op.execute('SELECT 1; COMMIT; BEGIN')", "controls the transaction itself (commit)"),
        ("op.execute('savepoint a')", "controls the transaction itself (savepoint)"),
        ("raise ValueError('not today')", "cannot be rendered: ValueError: not today"),
    ],
)
def test_what_is_not_the_same_sql_for_everybody_is_refused_with_its_reason(write: Write, line: str, problem: str) -> None:
    found = plan(write(upgrade("pass"), upgrade(line)), "001")

    assert found.problem is not None and problem in found.problem
    assert found.statements == ()
    with pytest.raises(MigrationError, match="there is no SQL"):
        script(found, database="d", tenant_id="t")


def test_the_databases_own_clock_is_no_objection(write: Write) -> None:
    found = plan(write(upgrade("op.add_column('t', sa.Column('at', sa.DateTime, server_default=sa.func.now()))")))

    assert found.problem is None


def test_the_options_of_env_py_are_honoured(write: Write) -> None:
    found = plan(write(upgrade("pass"), version_table="'our_version'", version_table_schema="'Ops'"))

    assert found.statements[-1].startswith("INSERT INTO \"Ops\".our_version (version_num) VALUES ('001')")
    assert 'LOCK TABLE "Ops".our_version IN SHARE UPDATE' in script(found, database="d", tenant_id="t")


def test_two_migrations_are_one_script_unless_each_wants_its_own_transaction(write: Write) -> None:
    bodies = upgrade("op.execute('SELECT 1')"), upgrade("op.execute('SELECT 2')")

    assert plan(write(*bodies)).problem is None
    assert plan(write(*bodies, transaction_per_migration="True")).problem == "it is not one transaction"


def test_a_callback_per_version_is_refused(write: Write) -> None:
    assert "on_version_apply" in str(plan(write(upgrade("pass"), on_version_apply="print")).problem)


def test_sqlite_gets_no_script(write: Write) -> None:
    assert "PostgreSQL only" in str(render(write(upgrade("pass")), None, "head", "sqlite").problem)


def test_a_plan_survives_pickling(write: Write) -> None:
    found = plan(write(upgrade("op.execute('SELECT 1')")))

    assert pickle.loads(pickle.dumps(found)) == found
    assert hash(found) == hash(pickle.loads(pickle.dumps(found)))


def test_a_script_is_one_transaction_with_its_guard_first(write: Write) -> None:
    found = plan(write(upgrade("pass"), upgrade("op.execute('SELECT 1 -- a remark')")), "001")

    lines = script(found, database="t_1", tenant_id="an id", lock_timeout=0.1, statement_timeout=None).splitlines()

    assert lines[:3] == ["BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE", ";", "DO $guard$"]
    assert lines[-2:] == [";", "COMMIT"]
    assert "PERFORM pg_catalog.set_config('lock_timeout', '100', true);" in lines
    assert "statement_timeout" not in "\n".join(lines)
    assert "SELECT 1 -- a remark" in lines  # and the semicolon on the next


def test_a_guard_cannot_be_closed_from_within(write: Write) -> None:
    text = script(plan(write(upgrade("pass"))), database="$guard$; DROP TABLE x; '", tenant_id="t")

    assert "DO $guard_$" in text and "END $guard_$" in text
    assert "'$guard$; DROP TABLE x; '' t'" in text


# -- the way -------------------------------------------------------------------------------------------------------------------------


def test_a_path_goes_up_and_down(write: Write) -> None:
    local = write(upgrade("pass"), upgrade("pass"), upgrade("with op.get_context().autocommit_block(): pass"))

    assert [(step.before, step.after, step.autocommit) for step in local.path("001", "head")] == [
        ("001", "002", False),
        ("002", "003", True),
    ]
    assert [(step.before, step.after, step.down) for step in local.path("002", None)] == [("002", "001", True), ("001", None, True)]
    assert local.path("003", "head") == ()
    assert (local.head, local.resolve("002"), local.resolve("base")) == ("003", "002", None)


@pytest.mark.parametrize(("current", "target"), [("999", "head"), (None, "999"), (None, "+x")])
def test_an_unknown_revision_is_refused(write: Write, current: str | None, target: str) -> None:
    with pytest.raises(MigrationError, match=r"999|\+x"):
        write(upgrade("pass")).path(current, target)


def test_several_heads_are_refused(write: Write, tmp_path: Path) -> None:
    write(upgrade("pass"), upgrade("pass"))
    other = HEAD.format(revision="002b", down="001") + upgrade("pass")
    (tmp_path / "migrations" / "versions" / "002b.py").write_text(other)
    local = LocalScripts(Scripts(str(tmp_path / "migrations")))

    for target in ("head", "002"):
        with pytest.raises(MigrationError, match="several heads"):
            local.path(None, target)


def test_a_merge_is_refused_where_the_path_goes_through_it_and_only_there(write: Write, tmp_path: Path) -> None:
    write(upgrade("pass"), upgrade("pass"))
    versions = tmp_path / "migrations" / "versions"
    (versions / "002b.py").write_text(HEAD.format(revision="002b", down="001") + upgrade("pass"))
    (versions / "003.py").write_text(HEAD.format(revision="003", down=("002", "002b")) + upgrade("pass"))
    (versions / "004.py").write_text(HEAD.format(revision="004", down="003") + upgrade("pass"))
    local = LocalScripts(Scripts(str(tmp_path / "migrations")))

    assert [step.revision for step in local.path("003", "004")] == ["004"]
    assert [step.revision for step in local.path("004", "003")] == ["004"]
    with pytest.raises(MigrationError, match="merges branches"):
        local.path("001", "head")


def test_a_downgrade_that_is_not_there_is_refused(write: Write) -> None:
    with pytest.raises(MigrationError, match="'001' has no downgrade"):
        write("def upgrade():\n    pass\n").path("001", None)


# -- what cannot be run in threads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "problem"),
    [
        ("import logging\n", "does not call run_env"),
        (ENV.format(options="") + "print('migrated')\n", "does more than to call run_env (line 5)"),
        ("from alembic import context\n" + ENV.format(options=", compare_type=context.get_bind"), "context.get_bind"),
        ("import alembic.context\n" + ENV.format(options=", compare_type=alembic.context.get_bind"), "alembic itself"),
        ("run_env = print" + ENV.format(options=", no='such option'").replace("from tenantdb", "#"), "cannot be run: TypeError"),
        ("run_env = lambda *a, **k: None" + ENV.format(options="").replace("from tenantdb", "#"), "does not call tenantdb's run_env"),
        ("raise ImportError('no such thing')" + ENV.format(options=""), "does more than to call run_env (line 1)"),
        ("import nothing_of_that_name" + ENV.format(options=""), "cannot be run: ModuleNotFoundError"),
    ],
)
def test_an_env_py_that_does_something_else_is_a_problem(write: Write, env: str, problem: str) -> None:
    assert problem in str(write(upgrade("pass"), env=env).problem)


def test_an_env_py_may_import_and_define(write: Write) -> None:
    env = "'''Ours.'''\nfrom alembic import context\nconfig = context.config\n\n\ndef chosen(*_):\n    return True\n" + ENV.format(
        options=", include_object=chosen, compare_type=False"
    )

    local = write(upgrade("pass"), env=env)

    assert local.problem is None
    assert set(local.options) == {"include_object", "compare_type"}


@pytest.mark.parametrize(
    "body",
    [
        "def upgrade():\n    from alembic import op as o\n    o.execute('x')\n",
        "import alembic\ndef upgrade():\n    alembic.op.execute('x')\n",
        "import alembic.op\ndef upgrade():\n    alembic.op.execute('x')\n",
    ],
)
def test_an_op_that_cannot_be_rebound_is_a_problem(write: Write, body: str) -> None:
    assert "revision 001" in str(write(body).problem)


def test_a_loaded_helper_with_alembics_op_is_a_problem(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = ModuleType("a_helper")
    vars(helper)["execute"] = sys.modules["alembic.op"].execute  # an import of it here would make this file such a module
    monkeypatch.setitem(sys.modules, "a_helper", helper)

    local = write(upgrade("pass"))

    assert "the module a_helper uses alembic's op" in str(local.problem)
    assert plan(local).problem == local.problem


def test_a_helper_that_is_imported_later_is_a_problem(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "late_helper.py").write_text("def add():\n    from alembic import op\n    op.execute('x')\n")
    monkeypatch.syspath_prepend(tmp_path)

    local = write(upgrade("from late_helper import add", "add()"))

    assert "the module late_helper uses alembic's op" in str(local.problem)
    assert "late_helper" not in sys.modules


def test_a_helper_that_is_given_op_is_none(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good_helper.py").write_text(
        "from alembic.operations import Operations\ndef add(op: Operations):\n    op.execute('SELECT 7')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "good_helper", raising=False)

    local = write("from good_helper import add\n" + upgrade("add(op)"))

    assert local.problem is None
    assert "SELECT 7" in plan(local).statements


class _Shared:
    """What Alembic itself has: one for all threads."""

    def __init__(self) -> None:
        self._value: object = None

    def get(self, default: object) -> object:
        return self._value

    def set(self, value: object) -> object:
        before, self._value = self._value, value
        return before

    def reset(self, before: object) -> None:
        self._value = before


def test_the_self_test_sees_an_op_that_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_module._self_test.__wrapped__() is None

    monkeypatch.setattr(local_module, "_mine", _Shared())

    assert "at once" in str(local_module._self_test.__wrapped__())


def test_a_failed_self_test_is_a_problem(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_module, "_self_test", lambda: "it did not work")

    assert write(upgrade("pass")).problem == "it did not work"


# -- on SQLite -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Connection]:
    engine = create_engine(f"sqlite:///{tmp_path / 'tenant.db'}")
    event.listen(engine, "connect", lambda connection, record: setattr(connection, "isolation_level", None))
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def tables(connection: Connection) -> set[str]:
    found = set(inspect(connection).get_table_names())
    connection.rollback()
    return found


def test_every_name_of_op_is_rebound_and_globals_are_not_shared(write: Write, connection: Connection) -> None:
    local = write(
        """
        import alembic.op as by_module
        from alembic.op import execute
        from alembic.context import get_context
        column, seen = sa.Column("id", sa.Integer), []
        def upgrade():
            assert not seen
            seen.append(1)
            op.create_table("one", column)
            by_module.execute("CREATE TABLE two (i int)")
            execute("CREATE TABLE three (i int)")
            get_context().execute("CREATE TABLE four (i int)")
            context.execute("CREATE TABLE five (i int)")
            assert not context.is_offline_mode() and context.config.attributes["connection"] is op.get_bind()
            assert context.get_revision_argument() == "001"
        def downgrade():
            for table in ("one", "two", "three", "four", "five"):
                op.drop_table(table)
        """
    )

    for _ in range(2):
        assert local.run(connection, "head") == (None, "001")
        assert tables(connection) == {"alembic_version", "one", "two", "three", "four", "five"}
        assert local.run(connection, None) == ("001", None)
        assert tables(connection) == {"alembic_version"}


def test_batches_are_rendered_as_env_py_says_and_dangling_rows_undo_the_migration(write: Write, connection: Connection) -> None:
    local = write(
        upgrade(
            "op.create_table('a', sa.Column('id', sa.Integer, primary_key=True), sa.Column('gone', sa.Integer))",
            "op.create_table('b', sa.Column('a', sa.Integer, sa.ForeignKey('a.id')))",
        ),
        upgrade("with op.batch_alter_table('a') as batch: batch.drop_column('gone')"),
        upgrade("op.execute('INSERT INTO b VALUES (7)')"),
    )

    with pytest.raises(MigrationError, match="refer to rows that are not there"):
        local.run(connection, "head")

    assert local.run(connection, "002") == ("002", "002")
    assert connection.exec_driver_sql("SELECT count(*) FROM b").scalar() == 0


def test_a_migration_that_fails_leaves_nothing_and_those_before_it_stay(write: Write, connection: Connection) -> None:
    local = write(
        upgrade("op.execute('CREATE TABLE a (i int)')"), upgrade("op.execute('CREATE TABLE b (i int)')", "raise ValueError('half-way')")
    )

    with pytest.raises(ValueError, match="half-way"):
        local.run(connection, "head")

    assert tables(connection) == {"a", "alembic_version"}
    assert local.run(connection, "001") == ("001", "001")


def test_all_or_nothing_is_for_env_py_to_ask(write: Write, connection: Connection) -> None:
    local = write(
        upgrade("op.execute('CREATE TABLE a (i int)')"), upgrade("raise ValueError('half-way')"), transaction_per_migration="False"
    )

    with pytest.raises(ValueError, match="half-way"):
        local.run(connection, "head")

    assert tables(connection) == set()


def test_it_runs_from_where_it_is_told_or_not_at_all(write: Write, connection: Connection) -> None:
    local = write(upgrade("pass"), upgrade("pass"))

    with pytest.raises(MigrationError, match="is at base, not at 001"):
        local.run(connection, "head", current="001")
    assert local.run(connection, "001", current=None) == (None, "001")


def test_a_connection_inside_a_transaction_is_refused(write: Write, connection: Connection) -> None:
    connection.begin()

    with pytest.raises(MigrationError, match="inside a transaction"):
        write(upgrade("pass")).run(connection, "head")


def test_a_thread_of_a_migrations_own_is_told_where_op_ends(write: Write, connection: Connection) -> None:
    local = write(
        """
        import concurrent.futures
        def upgrade():
            with concurrent.futures.ThreadPoolExecutor() as threads:
                threads.submit(lambda: op.execute("SELECT 1")).result()
        """
    )

    with pytest.raises(MigrationError, match=r"op\.execute was used outside of a migration"):
        local.run(connection, "head")
