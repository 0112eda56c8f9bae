"""Runs the registry's history on a connection that the caller opened, and leaves logging alone: that is the application's."""

from __future__ import annotations

from alembic import context

from tenantdb.registry.tables import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
