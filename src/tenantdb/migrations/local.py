"""Many databases migrated at once in one process: every run has an ``op`` and a ``context`` of its own.

Alembic's are modules with one state per process. Here the revision files' names for them are bound to stand-ins, which ask a context
variable which run the caller is in; so threads, and tasks inside SQLAlchemy's greenlets, keep apart. Nothing of Alembic is patched, and its
own commands go on working beside this. As under Alembic's commands each run executes the revision files anew, so not even their globals
are shared. What cannot be rebound is looked for beforehand, and a self-test runs two migrations at once before anything is trusted.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.abc import InspectLoader
from pathlib import Path
from types import CodeType, EllipsisType, ModuleType
from typing import Any, Literal

import alembic.context
import alembic.op
from alembic.operations import Operations
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext, MigrationStep, RevisionStep
from alembic.script import Script, ScriptDirectory
from sqlalchemy import Table, create_engine, inspect
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from tenantdb.errors import MigrationError, describe
from tenantdb.migrations.env import check_references, configure_options
from tenantdb.migrations.guard import VersionTable, guard
from tenantdb.migrations.scripts import CONNECTION, OPTIONS, Scripts, as_migration_error
from tenantdb.migrations.sources import Facts, beyond_run_env, facts, helpers_problem, is_proxy_function
from tenantdb.registry.schema import alembic_lock

AnyRevision = str | None | EllipsisType


@dataclass(frozen=True, slots=True)
class Step:
    """One migration of a path. ``down``: it is undone. ``autocommit``: its file has an autocommit block, so it is no single transaction.

    ``before`` and ``after`` are the database's revisions, None for base.
    """

    revision: str
    down: bool
    doc: str
    autocommit: bool
    before: str | None
    after: str | None


class LocalScripts:
    """A script location, loaded once, by which any number of threads migrate a database each.

    ``options``: what the application's ``env.py`` gives to `run_env`, ``target_metadata`` among it; left out, it is asked. ``problem`` says
    why these scripts cannot be run this way. Revision files that change later are not seen. Raises: `MigrationError` where the location is
    none; what a revision file raises when it is imported.
    """

    def __init__(self, scripts: Scripts, *, options: Mapping[str, Any] | None = None) -> None:
        self._scripts = scripts
        with alembic_lock, as_migration_error():
            self._config = scripts.config()
            self._directory = ScriptDirectory.from_config(self._config)
            self._revisions = {script.revision: _Revision.of(script) for script in self._directory.walk_revisions()}
            self._heads = self._directory.get_heads()
        self._given = options
        self._version_tables: dict[str, tuple[VersionTable, Table]] = {}

    @functools.cached_property
    def _env(self) -> tuple[Mapping[str, Any], str | None]:
        """Asked when it is needed: to know who is where takes no ``env.py``."""
        if self._given is not None:
            return self._given, None
        with alembic_lock, as_migration_error():
            return self._ask_env()

    @property
    def options(self) -> dict[str, Any]:
        """For Alembic's ``configure``."""
        return {name: value for name, value in self._env[0].items() if name != "target_metadata"}

    @functools.cached_property
    def problem(self) -> str | None:
        """Why these scripts cannot be run this way."""
        return self._env[1] or self._doubts()

    @property
    def head(self) -> str | None:
        """The newest revision, None where there is none. Raises: `MigrationError` for several heads."""
        if len(self._heads) > 1:
            raise MigrationError(
                f"the migrations have several heads ({', '.join(sorted(self._heads))}); merge or re-order them, tenants go along one line"
            )
        return self._heads[0] if self._heads else None

    def resolve(self, target: str | None) -> str | None:
        """The full id of ``head``, of ``base`` (None), of a revision or of its first letters. Raises: `MigrationError`."""
        if target is None or target == "base":
            return None
        if target == "head":
            return self.head
        with as_migration_error():
            found = self._directory.get_revision(target)
        if found.revision not in self._revisions:
            raise MigrationError(f"{target!r} is no revision of the migrations in {self._scripts}")
        return str(found.revision)

    @property
    def version_table_name(self) -> str:
        """The quoted name of the table in which a PostgreSQL database says at which revision it is."""
        given = {"fn": lambda heads, context: [], "as_sql": True}
        environment = self.environment("postgresql", given=given, url="postgresql+psycopg://", literal_binds=True)
        return self.version_table(environment.get_context()).name

    def facts(self, step: Step) -> Facts:
        """What its source says."""
        return self._revisions[step.revision].facts

    def path(self, current: str | None, target: str | None) -> tuple[Step, ...]:
        """The migrations from one revision to another, upwards or, where the target is older, downwards.

        Raises: `MigrationError` for an unknown revision, several heads, a merge on the way, two revisions that are not on one line, and a
        revision on the way down without ``downgrade``.
        """
        start, end = current, self.resolve(target)
        _ = self.head
        if start is not None and start not in self._revisions:
            raise MigrationError(f"{start!r} is no revision of the migrations in {self._scripts}")
        crossings: list[str] = []
        if (upwards := self._between(end, start, crossings)) is not None:
            return tuple(self._step(revision, down=False) for revision in reversed(upwards))
        if (downwards := self._between(start, end, crossings)) is not None:
            return tuple(self._step(revision, down=True) for revision in downwards)
        why = f"{crossings[0]!r} merges branches or depends on another" if crossings else "they are on different branches"
        raise MigrationError(f"no single line of revisions leads from {start or 'base'} to {end or 'base'}: {why}")

    def _between(self, upper: str | None, lower: str | None, crossings: list[str]) -> list[_Revision] | None:
        """From upper down, without lower; None where lower is no ancestor on a single line."""
        found = []
        while upper != lower:
            if upper is None:
                return None
            revision = self._revisions[upper]
            below = revision.script.down_revision
            if revision.script.dependencies or (below is not None and not isinstance(below, str)):
                crossings.append(upper)
                return None
            found.append(revision)
            upper = below
        return found

    def _step(self, revision: _Revision, *, down: bool) -> Step:
        script = revision.script
        if not callable(getattr(script.module, "downgrade" if down else "upgrade", None)):
            raise MigrationError(f"revision {script.revision!r} has no {'downgrade' if down else 'upgrade'}()")
        below: Any = script.down_revision  # a single one, as `_between` has seen
        before, after = (script.revision, below) if down else (below, script.revision)
        return Step(script.revision, down, script.doc, "autocommit_block" in revision.facts.names, before, after)

    def run(
        self,
        connection: Connection,
        target: str | None,
        *,
        current: AnyRevision = ...,
        lock_timeout: float | None = None,
        statement_timeout: float | None = None,
    ) -> tuple[str | None, str | None]:
        """Bring a database to a revision and return where it was and where it is, read anew after the last commit.

        Each migration is a transaction, unless ``env.py`` says ``transaction_per_migration=False``; on PostgreSQL each begins with `guard`,
        so two runs of one database never mix: the second fails. ``current``: where the database must be; left out, it is asked. The
        timeouts, in seconds, hold inside the transactions only, not in an autocommit block: an index that is built concurrently has to wait
        for others.
        May run again, and from any number of threads on connections of their own. Raises: `MigrationError` as `path`, where the database is
        at another revision, and where an invalid index is left; what a migration raises passes through, and that migration is undone as
        far as it was in its transaction.
        """
        if self.problem is not None:
            raise MigrationError(self.problem)
        if connection.in_transaction():
            raise MigrationError("the connection to migrate is inside a transaction already, which would swallow the migration's own")
        limited = functools.partial(guard, lock_timeout=lock_timeout, statement_timeout=statement_timeout)
        with as_migration_error():
            return _Run(self, connection, target, current, limited).run()

    def environment(self, dialect: str, *, given: Mapping[str, Any], **target: Any) -> EnvironmentContext:
        """What an ``env.py`` makes, without the process-wide state: ``given`` as to Alembic's commands, ``target`` as to ``configure``."""
        config = copy.copy(self._config)  # to parse it anew takes longer than a small migration does
        setattr(config, "attributes", {CONNECTION: target.get("connection")})  # noqa: B010
        environment = EnvironmentContext(config, self._directory, **given)
        environment.configure(**{**configure_options(self._env[0].get("target_metadata"), self.options, dialect), **target})
        return environment

    def version_table(self, context: MigrationContext) -> VersionTable:
        """The same for all databases of one kind."""
        found = self._version_tables.get(context.dialect.name)
        if found is None:
            found = self._version_tables[context.dialect.name] = VersionTable.of(context), context._version
        setattr(context, "_version", found[1])  # noqa: B010  # so that the statements of all are compiled once
        return found[0]

    def alembic_step(self, step: Step, around: Callable[[Callable[..., None]], None]) -> RevisionStep:
        """For Alembic's own run of migrations; ``around`` is called with the migration, in its transaction."""
        revision = self._revisions[step.revision]
        make = MigrationStep.downgrade_from_script if step.down else MigrationStep.upgrade_from_script
        made = make(self._directory.revision_map, revision.script)
        migration = getattr(revision.fresh(), "downgrade" if step.down else "upgrade")
        made.migration_fn = functools.wraps(migration)(lambda **arguments: around(functools.partial(migration, **arguments)))
        return made

    def _ask_env(self) -> tuple[Mapping[str, Any], str | None]:
        name = f"env.py of {self._scripts}"
        try:
            beyond = beyond_run_env(Path(self._directory.env_py_location).read_bytes())
            if beyond is not None:
                return {}, f"{name} {beyond}"
            config, found = self._scripts.config(), list[Mapping[str, Any]]()
            config.attributes[OPTIONS] = found
            with EnvironmentContext(config, self._directory, fn=lambda heads, context: []):
                self._directory.run_env()
        except Exception as error:  # whatever an application's file raises
            return {}, f"{name} cannot be run: {describe(error)}"
        if len(found) != 1:
            return {}, f"{name} does not call tenantdb's run_env"
        return found[0], None

    def _doubts(self) -> str | None:
        for name, revision in self._revisions.items():
            if revision.facts.problem is not None:
                return f"revision {name} {revision.facts.problem}"
        imported = {name for revision in self._revisions.values() for name in revision.facts.imports}
        return helpers_problem(imported) or _self_test()


class _Run:
    """One database on its way."""

    def __init__(
        self, local: LocalScripts, connection: Connection, target: str | None, current: AnyRevision, limited: Callable[..., str]
    ) -> None:
        self._local, self._connection, self._target, self._current, self._guard = local, connection, target, current, limited
        self._on_postgresql = connection.dialect.name == "postgresql"
        self._before: str | None = None
        self._aim: str | None = None
        self._guarded = False  # this transaction
        self._left_transaction: str | None = None  # the revision that had an autocommit block
        if connection.dialect.name == "sqlite":
            connection.execution_options(tenantdb_begin="IMMEDIATE")  # a second one waits at the start instead of failing half-way
        per_migration = {"transaction_per_migration": local.options.get("transaction_per_migration", True)}
        given = {"fn": self._steps, "destination_rev": target}
        self._environment = local.environment(connection.dialect.name, given=given, connection=connection, **per_migration)
        self._context = self._environment.get_context()
        self._autocommit_block = self._context.autocommit_block
        setattr(self._context, "autocommit_block", self._block)  # noqa: B010  # as an attribute of this one object
        if self._on_postgresql:  # the guard has made it, and a look is a round trip
            setattr(self._context, "_has_version_table", lambda: True)  # noqa: B010
        self._table = local.version_table(self._context)

    def run(self) -> tuple[str | None, str | None]:
        try:
            with running(self._environment), self._context.begin_transaction():
                self._enter(self._current)
                self._context.run_migrations()
        except BaseException as error:
            self._connection.rollback()
            if isinstance(error, Exception) and not isinstance(error, MigrationError) and (remains := self._remains()):
                raise MigrationError(
                    f"revision {self._left_transaction} failed ({describe(error)}) and left an invalid index: {remains}."
                    f" Drop it (DROP INDEX CONCURRENTLY) before the next attempt"
                ) from error
            raise
        self._connection.rollback()
        found = self._before if self._aim == self._before else self._read()
        if found != self._aim:
            raise MigrationError(f"the migrations ended, and the database is at {found or 'base'} instead of {self._aim or 'base'}")
        return self._before, found

    def _steps(self, heads: tuple[str, ...], context: MigrationContext) -> Iterator[RevisionStep]:
        found = _only(heads)
        if not isinstance(self._current, EllipsisType) and found != self._current:
            raise MigrationError(f"the database is at {found or 'base'}, not at {self._current or 'base'}")
        self._before, self._aim = found, self._local.resolve(self._target)
        for step in self._local.path(found, self._target):
            yield self._local.alembic_step(step, functools.partial(self._migrate, step))

    def _migrate(self, step: Step, migration: Callable[[], None]) -> None:
        if not self._guarded:
            self._enter(step.before)
        self._guarded = False
        earlier = self._invalid_indexes() if step.autocommit and self._on_postgresql else []
        self._block_belongs_to = step
        migration()
        if self._left_transaction == step.revision and self._on_postgresql and (invalid := self._invalid_indexes()):
            when = "an earlier attempt" if set(invalid) <= set(earlier) else "this attempt"
            raise MigrationError(
                f"revision {step.revision} is not recorded, because {when} left an invalid index: {', '.join(invalid)}."
                f" Drop it (DROP INDEX CONCURRENTLY) before the next attempt"
            )
        check_references(self._connection)

    @contextmanager
    def _block(self) -> Iterator[None]:
        step = self._block_belongs_to
        self._left_transaction = step.revision
        with self._autocommit_block():
            if self._on_postgresql:  # an index that is built concurrently waits for every transaction that is older
                self._connection.exec_driver_sql("SET lock_timeout = 0")
            yield
            if self._on_postgresql:
                self._connection.exec_driver_sql("RESET lock_timeout")
        self._enter(step.before)  # another transaction has begun, in which the revision is recorded
        self._guarded = False

    def _enter(self, expected: AnyRevision) -> None:
        if self._on_postgresql:
            text = self._guard(self._table, expected=expected)
            self._connection.exec_driver_sql(text, execution_options={"no_parameters": True})
        self._guarded = True

    def _read(self) -> str | None:
        """What was committed, in a transaction of its own."""
        heads = self._connection.exec_driver_sql(f"SELECT version_num FROM {self._table.name}").scalars().all()
        self._connection.rollback()
        return _only(tuple(heads))

    def _remains(self) -> str:
        """Of a migration that failed after it had left its transaction. Empty where the connection is lost: nobody can be asked then."""
        if self._left_transaction is None or not self._on_postgresql:
            return ""
        try:
            found = ", ".join(self._invalid_indexes())
            self._connection.rollback()
        except DBAPIError:
            return ""
        return found

    def _invalid_indexes(self) -> list[str]:
        return [name for (name,) in self._connection.exec_driver_sql(_INVALID)]


_INVALID = """
SELECT indexrelid::pg_catalog.regclass::text FROM pg_catalog.pg_index JOIN pg_catalog.pg_class ON pg_class.oid = indexrelid
WHERE NOT indisvalid AND relkind = 'i' ORDER BY 1
"""  # an index of a partitioned table (I) is invalid until each partition has one, and may stay so


def _only(heads: tuple[str, ...]) -> str | None:
    if len(heads) > 1:
        raise MigrationError(f"the database is at several revisions at once ({', '.join(sorted(heads))}); tenants go along one line")
    return heads[0] if heads else None


# -- op and context of one's own -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Mine:
    op: Operations
    context: EnvironmentContext


_mine: ContextVar[_Mine] = ContextVar("tenantdb_migration")


@contextmanager
def running(environment: EnvironmentContext) -> Iterator[None]:
    """Within the block, what revisions call ``op`` and ``context`` is this environment."""
    token = _mine.set(_Mine(Operations(environment.get_context()), environment))
    try:
        yield
    finally:
        _mine.reset(token)


class _StandIn:
    """In a revision file in the place of Alembic's module."""

    def __init__(self, kind: Literal["op", "context"]) -> None:
        self._kind = kind

    def __repr__(self) -> str:
        return f"<alembic.{self._kind} of the migration that runs here>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        mine = _mine.get(None)
        if mine is None:
            raise MigrationError(f"{self._kind}.{name} was used outside of a migration, or in a thread that a migration started")
        return getattr(getattr(mine, self._kind), name)


_OP, _CONTEXT = _StandIn("op"), _StandIn("context")


def _call(stand_in: _StandIn, name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(stand_in, name)(*args, **kwargs)


@dataclass(frozen=True)
class _Revision:
    script: Script
    facts: Facts
    code: CodeType

    @classmethod
    def of(cls, script: Script) -> _Revision:
        spec = script.module.__spec__
        loader = spec.loader if spec is not None else None
        code = loader.get_code(script.module.__name__) if isinstance(loader, InspectLoader) else None
        if code is None:
            raise MigrationError(f"the code of revision {script.revision!r} cannot be read")
        return cls(script, facts(Path(script.path).read_bytes()), code)

    def fresh(self) -> ModuleType:
        """The revision's module, executed anew, with stand-ins for Alembic's."""
        module = importlib.util.module_from_spec(
            importlib.util.spec_from_loader(self.script.module.__name__, _Loaded(self.code), origin=self.script.path)  # type: ignore[arg-type]
        )
        module.__file__ = self.script.path
        module.__spec__.loader.exec_module(module)  # type: ignore[union-attr]
        for name, value in list(vars(module).items()):
            if value is alembic.op:
                setattr(module, name, _OP)
            elif value is alembic.context:
                setattr(module, name, _CONTEXT)
            elif is_proxy_function(value):
                stand_in = _OP if value.__globals__ is vars(alembic.op) else _CONTEXT
                setattr(module, name, functools.partial(_call, stand_in, value.__name__))
        return module


class _Loaded(InspectLoader):
    """Executes code that was compiled before."""

    def __init__(self, code: CodeType) -> None:
        self._code = code

    def get_code(self, fullname: str) -> CodeType:
        return self._code

    def get_source(self, fullname: str) -> None:
        return None


# -- the self-test ---------------------------------------------------------------------------------------------------------------------


class _OfTheSelfTest(LocalScripts):
    problem = None


@functools.cache
def _self_test() -> str | None:
    """Two databases migrated at once, in steps that alternate; once per process. Returns what went wrong."""
    local = _OfTheSelfTest(Scripts("tenantdb.migrations:selftest"), options={})
    barrier = threading.Barrier(2, timeout=10)

    def migrate(name: str) -> str | None:
        engine = create_engine("sqlite://")
        try:
            with engine.connect() as connection:
                connection.info["tenantdb_self_test"] = name, barrier.wait
                moved = local.run(connection, "head")
                tables = set(inspect(connection).get_table_names())
        except BaseException:
            barrier.abort()
            raise
        finally:
            engine.dispose()
        if moved == (None, "0001") and tables == {"alembic_version", f"{name}_by_op", f"{name}_by_context"}:
            return None
        return f"two migrations at once did not keep apart: {name} has {', '.join(sorted(tables))}"

    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(migrate, name) for name in ("one", "other")]
    try:
        return next(filter(None, [future.result() for future in running]), None)
    except Exception as error:  # an Alembic that this was not written for
        return f"the self-test of two migrations at once failed: {describe(error)}"
