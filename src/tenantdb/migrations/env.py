"""What an application's ``env.py`` calls: decides which database this run of Alembic is about.

1. tenantdb migrates a tenant: the connection is given.
2. ``alembic -x tenant=acme upgrade head`` (or current, downgrade, stamp): that tenant, as its owner role.
3. ``alembic revision --autogenerate`` and ``alembic check``: a scratch database that is made, brought to head, and dropped.
4. Anything else would migrate a database that is no tenant's, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from alembic import context
from alembic.util import CommandError
from sqlalchemy import MetaData
from sqlalchemy.engine import Connection

from tenantdb.errors import MigrationError, TenantDBError
from tenantdb.migrations.scripts import CONNECTION, OPTIONS, upgrade_in_place

_COMPARING = frozenset({"revision", "check"})


class Databases(Protocol):
    """What `run_env` needs of a `TenantDB`."""

    @property
    def dialect_name(self) -> str: ...

    def owner_connection(self, tenant: str) -> AbstractContextManager[Connection]:
        """A connection to a tenant's database as its owner role; its revision is recorded when the block ends well."""

    def scratch_connection(self) -> AbstractContextManager[Connection]:
        """A connection to a new, empty database that is dropped when the block ends."""


class HasDatabases(Protocol):
    @property
    def migrations(self) -> Databases: ...


def run_env(db: HasDatabases, *, target_metadata: MetaData | None, **options: Any) -> None:
    """Run the migrations that Alembic was asked for, on the right database.

    ``options`` go to Alembic's ``context.configure`` (``compare_type``, ``include_object`` ...). Logging is left alone: Alembic's
    ``fileConfig`` would switch the application's loggers off. Raises: `MigrationError`, as Alembic's `CommandError` under its command line.
    """
    config = context.config
    if (asked := config.attributes.get(OPTIONS)) is not None:
        asked.append({"target_metadata": target_metadata, **options})
        return
    try:
        if context.is_offline_mode():
            _configure(target_metadata, options, dialect_name=db.migrations.dialect_name, literal_binds=True)
            with context.begin_transaction():
                context.run_migrations()
            return
        with _connection(db.migrations, config, target_metadata, options) as connection:
            _configure(target_metadata, options, connection=connection)
            with context.begin_transaction():
                context.run_migrations()
                check_references(connection)
    except TenantDBError as error:
        if config.cmd_opts is not None:
            raise CommandError(str(error)) from error
        raise


@contextmanager
def _connection(databases: Databases, config: Any, metadata: MetaData | None, options: dict[str, Any]) -> Iterator[Connection]:
    if (given := config.attributes.get(CONNECTION)) is not None:
        yield given
        return
    if tenant := context.get_x_argument(as_dictionary=True).get("tenant"):
        with databases.owner_connection(str(tenant)) as connection:
            yield connection
        return
    if _command_name(config) not in _COMPARING:
        raise MigrationError(
            "this would migrate a database that is no tenant's. `tenantdb migrate` brings every tenant to head;"
            " `alembic -x tenant=SLUG ...` works on one"
        )
    with databases.scratch_connection() as connection:
        upgrade_in_place(connection, context.script, configure_options(metadata, options, connection.dialect.name))
        yield connection


def check_references(connection: Connection) -> None:
    """SQLite migrates with foreign keys off, or rebuilding a table would delete what refers to it; so look before the commit.

    Raises: `MigrationError`.
    """
    if connection.dialect.name == "sqlite" and (dangling := connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()):
        tables = ", ".join(sorted({f"{row[0]} to {row[2]}" for row in dangling}))
        raise MigrationError(f"the migration leaves {len(dangling)} rows that refer to rows that are not there ({tables}); it was undone")


def _command_name(config: Any) -> str | None:
    command: tuple[Callable[..., Any], ...] | None = getattr(config.cmd_opts, "cmd", None)
    return command[0].__name__ if command else None


def _configure(metadata: MetaData | None, options: dict[str, Any], **target: Any) -> None:
    connection: Connection | None = target.get("connection")
    dialect = connection.dialect.name if connection is not None else target["dialect_name"]
    context.configure(**target, **configure_options(metadata, options, dialect))


def configure_options(metadata: MetaData | None, options: Mapping[str, Any], dialect: str) -> dict[str, Any]:
    """What ``context.configure`` gets: our defaults, under what the application's ``env.py`` says."""
    given: Callable[..., bool] | None = options.get("include_object")

    def include_object(item: Any, name: str | None, kind: str, reflected: bool, compare_to: Any) -> bool:
        if kind == "table" and (name or "").startswith("tenantdb_"):
            return False  # the identity stamp and what else is ours, not the application's to drop
        return given is None or given(item, name, kind, reflected, compare_to)

    sqlite = {"render_as_batch": True, "transactional_ddl": True} if dialect == "sqlite" else {}
    return {"target_metadata": metadata, **sqlite, **options, "include_object": include_object}
