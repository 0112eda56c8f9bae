"""Fences, spares, golden templates, retention and purge, pending secrets, and the chain of the audit log."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"

moment = sa.DateTime(timezone=True)
document = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    for column in (
        sa.Column("fence", sa.String(20)),
        sa.Column("ready_at", moment),
        sa.Column("purge_after", moment),
        sa.Column("purged_at", moment),
        sa.Column("legal_hold", sa.Text),
        sa.Column("adopted_from", sa.Text),
        sa.Column("owner_secret_pending", sa.LargeBinary),
        sa.Column("runtime_secret_pending", sa.LargeBinary),
        sa.Column("certificate", document),
    ):
        op.add_column("tenantdb_tenants", column)
    op.create_index("tenantdb_tenants_ready_at_idx", "tenantdb_tenants", ["ready_at"])
    op.add_column("tenantdb_operations", sa.Column("sanctioned", sa.Boolean))
    op.add_column("tenantdb_audit", sa.Column("seq", sa.BigInteger))
    op.add_column("tenantdb_audit", sa.Column("mac", sa.LargeBinary))
    op.add_column("tenantdb_audit", sa.Column("reason", sa.Text))
    op.add_column("tenantdb_audit", sa.Column("source", sa.Text))
    op.create_index("tenantdb_audit_tenant_id_seq_idx", "tenantdb_audit", ["tenant_id", "seq"])
    op.create_table(
        "tenantdb_audit_heads",
        sa.Column("chain", sa.Uuid, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("mac", sa.LargeBinary),
        sa.Column("kept_from", sa.BigInteger),
        sa.Column("kept_mac", sa.LargeBinary),
        sa.Column("kept_seal", sa.LargeBinary),
        sa.PrimaryKeyConstraint("chain", name="tenantdb_audit_heads_pkey"),
    )
    op.create_table(
        "tenantdb_templates",
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("server_id", sa.Uuid, nullable=False),
        sa.Column("revision", sa.Text),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("database", sa.String(63), nullable=False),
        sa.Column("owner_role", sa.String(63)),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("worker", sa.Text),
        sa.Column("lease_until", moment),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("updated_at", moment, nullable=False),
        sa.PrimaryKeyConstraint("id", name="tenantdb_templates_pkey"),
        sa.ForeignKeyConstraint(["server_id"], ["tenantdb_servers.id"], name="tenantdb_templates_server_id_fkey"),
        sa.UniqueConstraint("server_id", "database", name="tenantdb_templates_server_id_database_key"),
    )
