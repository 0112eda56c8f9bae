"""Migrations that are the same SQL for everybody: rendered once by Alembic's offline mode, sent to each database as one message.

Rendering has no database to look into, so it is believed only where nothing asks for one, and where it gives the same twice: a random
value or the time of day would be one for all tenants. Whether the SQL does what the migrations do is for the caller to prove.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from alembic.runtime.migration import MigrationContext

from tenantdb.errors import MigrationError, describe
from tenantdb.migrations.guard import VersionTable, guard
from tenantdb.migrations.local import LocalScripts, Step, running


@dataclass(frozen=True, slots=True)
class SQLPlan:
    """From one revision to another in plain SQL, without the transaction around it. ``problem``: why there is none.

    A path from base begins by making the version table where it is missing.
    """

    from_revision: str | None
    to_revision: str | None
    statements: tuple[str, ...] = ()
    problem: str | None = None
    version_table: VersionTable | None = None


def render(local: LocalScripts, current: str | None, target: str | None, dialect: str) -> SQLPlan:
    """What the migrations from one revision to another send; ``dialect`` is PostgreSQL's name, or there is a problem.

    Why they cannot be rendered is in the plan's ``problem``. Raises: `MigrationError` for a path that is none.
    """
    steps = local.path(current, target)
    aim = local.resolve(target)
    problem = local.problem or _problem(local, steps, dialect)
    if problem is not None:
        return SQLPlan(current, aim, problem=problem)
    try:
        first, again = (_Rendering(local, steps, current, dialect).run() for _ in range(2))
    except Exception as error:  # what a migration raises that wants a database
        return SQLPlan(current, aim, problem=f"it cannot be rendered: {describe(error)}")
    if first.statements != again.statements:
        return SQLPlan(current, aim, problem="rendered twice, it differs: something in it is random or reads the clock")
    problem = first.problem
    return SQLPlan(current, aim, () if problem else tuple(first.statements), problem, first.table)


def script(
    plan: SQLPlan, *, database: str, tenant_id: str, lock_timeout: float | None = None, statement_timeout: float | None = None
) -> str:
    """One message of the simple query protocol that migrates one database, or leaves it as it was. Timeouts in seconds.

    The server raises TD001 where the database is at another revision, TD002 where another migration of it is under way, TD003 where its
    identity stamp names somebody else. The caller closes the connection after an error: the transaction is open still, and aborted.
    Raises: `MigrationError` for a plan with a problem.
    """
    if plan.problem is not None or plan.version_table is None:
        raise MigrationError(f"from {plan.from_revision or 'base'} to {plan.to_revision or 'base'} there is no SQL: {plan.problem}")
    before = guard(
        plan.version_table,
        expected=plan.from_revision,
        identity=(database, tenant_id),
        lock_timeout=lock_timeout,
        statement_timeout=statement_timeout,
    )
    # Each semicolon on a line of its own: a statement may end in a comment.
    return "\n;\n".join(("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE", before, *plan.statements, "COMMIT"))


def _problem(local: LocalScripts, steps: tuple[Step, ...], dialect: str) -> str | None:
    if dialect != "postgresql":
        return f"SQL is sent to PostgreSQL only, not to {dialect}"
    if local.options.get("on_version_apply"):
        return "env.py has on_version_apply, which would not be called for each database"
    for step in steps:
        facts = local.facts(step)
        if step.autocommit:
            return f"revision {step.revision} has an autocommit block, so it is more than one transaction"
        if asking := sorted(facts.names & _ASKS_A_DATABASE):
            return f"revision {step.revision} behaves differently with a database to ask: it uses {', '.join(asking)}"
        if facts.reads_clock:
            return f"revision {step.revision} reads the clock in Python, which would be one time for all databases"
    return None


_ASKS_A_DATABASE = frozenset(
    {"is_offline_mode", "as_sql", "get_bind", "bind", "inspect", "Inspector", "Session", "sessionmaker", "run_async"}
)


class _Rendering:
    """What Alembic's offline mode says, statement by statement."""

    def __init__(self, local: LocalScripts, steps: tuple[Step, ...], current: str | None, dialect: str) -> None:
        self.statements: list[str] = []
        self.problem: str | None = None
        self._local, self._steps = local, steps
        self._written: list[str] = []
        given = {"fn": self._alembic_steps, "as_sql": True, "starting_rev": current}
        self._environment = local.environment(
            dialect,
            given=given,
            url=f"{dialect}+psycopg://",
            dialect_opts={"paramstyle": "named"},  # with the driver's own, percent signs would be doubled
            literal_binds=True,
            output_buffer=self,
        )
        self._context = self._environment.get_context()
        # SQLAlchemy 2.0 doubles backslashes until it has asked a server; the guard insists on the setting without which that is wrong.
        setattr(self._context.dialect, "_backslash_escapes", False)  # noqa: B010
        self.table = VersionTable.of(self._context)
        rendering = self._context.dialect
        rendering.statement_compiler = _strict(rendering.statement_compiler)
        rendering.ddl_compiler = _strict(rendering.ddl_compiler)

    def run(self) -> _Rendering:
        with running(self._environment), self._context.begin_transaction():
            self._context.run_migrations()
        end = self._context.impl.command_terminator
        written = [text.strip().removesuffix(end) for text in self._written]
        if not self._steps:
            return self
        if written[:1] != ["BEGIN"] or written[-1:] != ["COMMIT"] or "COMMIT" in written[:-1]:
            self.problem = "it is not one transaction"
            return self
        self.statements = [text.strip() for text in written[1:-1] if not _HEADING.fullmatch(text)]
        if self._steps[0].before is None:
            if self.statements[:1] != [self.table.plain_ddl]:
                self.problem = "it does not begin with the version table"
                return self
            self.statements[0] = self.table.ddl
        controlling = next((word for text in self.statements for word in _first_words(text) if word in _TRANSACTION), None)
        if controlling is not None:
            self.problem = f"it controls the transaction itself ({controlling})"
        return self

    def _alembic_steps(self, heads: tuple[str, ...], context: MigrationContext) -> Any:
        return [self._local.alembic_step(step, _plainly) for step in self._steps]

    def write(self, text: str) -> None:
        """Alembic writes one statement at a time."""
        self._written.append(text.replace(_TAB, "\t"))

    def flush(self) -> None:
        """There is no file."""


def _plainly(migration: Callable[[], None]) -> None:
    migration()


_HEADING = re.compile("-- Running .*")  # Alembic's line above each migration
_TAB = "\ufdd0"  # never a character of a text, says Unicode


def _strict(compiler: type[Any]) -> type[Any]:
    """Two things that rendering would change without a word are kept or refused."""

    class Strict(compiler):  # type: ignore[misc]
        def __str__(self) -> str:
            """Alembic makes four blanks of a tab, in a literal as well; so it gets to see none."""
            return str(super().__str__()).replace("\t", _TAB)

        def render_literal_bindparam(self, bindparam: Any, *args: Any, **kwargs: Any) -> Any:
            """A parameter without a value, such as a colon in a text makes, would become NULL. A database's driver refuses it."""
            if bindparam.required:
                raise MigrationError(f"there is no value for :{bindparam.key}")
            return super().render_literal_bindparam(bindparam, *args, **kwargs)

    return Strict


_TRANSACTION = frozenset({"begin", "start", "commit", "end", "rollback", "abort", "savepoint", "release", "prepare"})
_NOT_CODE = re.compile(r"""--[^\n]*|/\*.*?\*/|\be'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'|"(?:[^"]|"")*"|\$(\w*)\$.*?\$\1\$""", re.S | re.I)


def _first_words(text: str) -> list[str]:
    """Of each statement in a text. A function body in SQL's own syntax has semicolons of its own, so what it says may be too much."""
    words = (re.match(r"\s*(\w+)", part) for part in _NOT_CODE.sub(" ", text).split(";"))
    return [word.group(1).lower() for word in words if word]
