"""Whether the models and the migrations say the same, for a test of the application."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import MetaData

from tenantdb.database import TenantDB
from tenantdb.errors import MigrationError

if TYPE_CHECKING:
    from tenantdb.migrations import Scripts


def assert_migrations_match_models(db: TenantDB, metadata: MetaData) -> None:
    """Fail where ``alembic revision --autogenerate`` would still have something to write.

    The migrations are run on an empty database of the first server of ``db``, which is dropped afterwards, and what is in it then is
    compared with ``metadata``, under the options that the application's ``env.py`` gives to `run_env`: its ``include_object``,
    ``compare_type``, ``process_revision_directives`` and the rest. No tenant is needed. Alembic does not see everything; its manual says
    what ("What does Autogenerate Detect").

    Raises: `AssertionError` with the operations that are missing; `MigrationError` where there are no migrations, ``env.py`` does not call
    `run_env`, or this process may not make databases; what a migration raises.
    """
    __tracebackhide__ = True
    missing = _missing_operations(db, metadata)
    if missing:
        raise AssertionError(
            f"the models are ahead of the migrations, or beside them; `alembic revision --autogenerate` would write:\n\n{missing}\n"
        )


def _missing_operations(db: TenantDB, metadata: MetaData) -> str:
    from alembic.autogenerate import produce_migrations, render_python_code
    from alembic.runtime.migration import MigrationContext

    from tenantdb.migrations.env import configure_options

    scripts = db.migrations.scripts
    asked = _options_of_env(scripts)
    with db.migrations.scratch_connection() as connection:
        scripts.upgrade(connection.engine)
        options = configure_options(metadata, asked, connection.dialect.name)
        context = MigrationContext.configure(connection, opts=options)
        script = produce_migrations(context, metadata)
        directives = [script]
        if (edit := options.get("process_revision_directives")) is not None:
            edit(context, context.get_current_heads(), directives)
        return "\n".join(
            render_python_code(
                each.upgrade_ops,
                sqlalchemy_module_prefix=options.get("sqlalchemy_module_prefix", "sa."),
                render_as_batch=options.get("render_as_batch", False),
                render_item=options.get("render_item"),
                migration_context=context,
            )
            for each in directives
            if each.upgrade_ops is not None and not each.upgrade_ops.is_empty()
        )


def _options_of_env(scripts: Scripts) -> dict[str, Any]:
    """What the application's ``env.py`` gives to `run_env`, whatever else it does."""
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    from tenantdb.migrations.scripts import OPTIONS, as_migration_error
    from tenantdb.registry.schema import alembic_lock

    config, found = scripts.config(), list[dict[str, Any]]()
    config.attributes[OPTIONS] = found
    with alembic_lock, as_migration_error():
        directory = ScriptDirectory.from_config(config)
        with EnvironmentContext(config, directory, fn=lambda heads, context: []):
            directory.run_env()
    if len(found) != 1:
        raise MigrationError(f"env.py of {scripts} does not call tenantdb's run_env")
    return {name: value for name, value in found[0].items() if name != "target_metadata"}
