"""Two databases are migrated by this at once; `tenantdb.migrations.local` looks afterwards whether each got its own."""

from __future__ import annotations

from alembic import context, op

revision, down_revision = "0001", None


def upgrade() -> None:
    name, meet = op.get_bind().info["tenantdb_self_test"]
    meet()
    op.execute(f"CREATE TABLE {name}_by_op (id INTEGER)")
    meet()
    context.execute(f"CREATE TABLE {name}_by_context (id INTEGER)")
    meet()
