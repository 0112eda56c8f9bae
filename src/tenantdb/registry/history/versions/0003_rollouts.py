"""Rollouts: migrations of the whole fleet, and each tenant's part in them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"

moment = sa.DateTime(timezone=True)
document = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "tenantdb_rollouts",
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("options", document, nullable=False),
        sa.Column("worker", sa.Text),
        sa.Column("lease_until", moment),
        sa.Column("error", sa.Text),
        sa.Column("total", sa.Integer, nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("updated_at", moment, nullable=False),
        sa.Column("finished_at", moment),
        sa.PrimaryKeyConstraint("id", name="tenantdb_rollouts_pkey"),
    )
    op.create_table(
        "tenantdb_rollout_attempts",
        sa.Column("rollout_id", sa.Uuid, nullable=False),
        sa.Column("tenant_id", sa.Uuid, nullable=False),
        sa.Column("wave", sa.Integer, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("from_revision", sa.Text),
        sa.Column("to_revision", sa.Text),
        sa.Column("engine", sa.String(20)),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("started_at", moment),
        sa.Column("finished_at", moment),
        sa.Column("seconds", sa.Float),
        sa.Column("error", sa.Text),
        sa.Column("sqlstate", sa.String(5)),
        sa.Column("worker", sa.Text),
        sa.PrimaryKeyConstraint("rollout_id", "tenant_id", name="tenantdb_rollout_attempts_pkey"),
        sa.ForeignKeyConstraint(["rollout_id"], ["tenantdb_rollouts.id"], name="tenantdb_rollout_attempts_rollout_id_fkey"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenantdb_tenants.id"], name="tenantdb_rollout_attempts_tenant_id_fkey"),
    )
    op.create_index(
        "tenantdb_rollout_attempts_rollout_id_state_position_idx", "tenantdb_rollout_attempts", ["rollout_id", "state", "position"]
    )
