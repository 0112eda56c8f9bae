"""The first registry. Later revisions only add, so that processes of both sides of a rolling deploy can work on it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None

moment = sa.DateTime(timezone=True)
document = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "tenantdb_servers",
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("backend", sa.String(20), nullable=False),
        sa.Column("host", sa.Text),
        sa.Column("port", sa.Integer),
        sa.Column("direct_host", sa.Text),
        sa.Column("direct_port", sa.Integer),
        sa.Column("path", sa.Text),
        sa.Column("address_seal", sa.LargeBinary),
        sa.Column("region", sa.String(200)),
        sa.Column("capacity", sa.Integer),
        sa.Column("extensions", document, nullable=False),
        sa.Column("schemas", document, nullable=False),
        sa.Column("draining", sa.Boolean, nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("updated_at", moment, nullable=False),
        sa.PrimaryKeyConstraint("id", name="tenantdb_servers_pkey"),
        sa.UniqueConstraint("name", name="tenantdb_servers_name_key"),
    )
    op.create_table(
        "tenantdb_tenants",
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("slug", sa.String(40)),
        sa.Column("name", sa.Text),
        sa.Column("email", sa.Text),
        sa.Column("phone", sa.Text),
        sa.Column("country", sa.Text),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("server_id", sa.Uuid),
        sa.Column("database", sa.String(63)),
        sa.Column("owner_role", sa.String(63)),
        sa.Column("runtime_role", sa.String(63)),
        sa.Column("owner_secret", sa.LargeBinary),
        sa.Column("runtime_secret", sa.LargeBinary),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("revision", sa.Text),
        sa.Column("plan", sa.Text),
        sa.Column("subscription", sa.String(20), nullable=False),
        sa.Column("subscription_expires_at", moment),
        sa.Column("metadata", document, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("updated_at", moment, nullable=False),
        sa.Column("deleted_at", moment),
        sa.PrimaryKeyConstraint("id", name="tenantdb_tenants_pkey"),
        sa.UniqueConstraint("slug", name="tenantdb_tenants_slug_key"),
        sa.UniqueConstraint("server_id", "database", name="tenantdb_tenants_server_id_database_key"),
        sa.ForeignKeyConstraint(["server_id"], ["tenantdb_servers.id"], name="tenantdb_tenants_server_id_fkey"),
    )
    op.create_index("tenantdb_tenants_state_idx", "tenantdb_tenants", ["state"])
    op.create_table(
        "tenantdb_users",
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("email", sa.String(254), nullable=False),
        sa.Column("email_key", sa.Text, nullable=False),
        sa.Column("password_hash", sa.Text, nullable=False),
        sa.Column("first_name", sa.Text),
        sa.Column("last_name", sa.Text),
        sa.Column("verification_hash", sa.LargeBinary),
        sa.Column("verification_expires_at", moment),
        sa.Column("reset_hash", sa.LargeBinary),
        sa.Column("reset_expires_at", moment),
        sa.Column("email_verified_at", moment),
        sa.Column("platform_admin", sa.Boolean, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("updated_at", moment, nullable=False),
        sa.Column("deleted_at", moment),
        sa.PrimaryKeyConstraint("id", name="tenantdb_users_pkey"),
        sa.UniqueConstraint("verification_hash", name="tenantdb_users_verification_hash_key"),
        sa.UniqueConstraint("reset_hash", name="tenantdb_users_reset_hash_key"),
    )
    living = sa.text("deleted_at IS NULL")
    op.create_index(
        "tenantdb_users_email_key_key", "tenantdb_users", ["email_key"], unique=True, sqlite_where=living, postgresql_where=living
    )
    op.create_table(
        "tenantdb_memberships",
        sa.Column("user_id", sa.Uuid, nullable=False),
        sa.Column("tenant_id", sa.Uuid, nullable=False),
        sa.Column("role", sa.String(20), nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.PrimaryKeyConstraint("user_id", "tenant_id", name="tenantdb_memberships_pkey"),
        sa.ForeignKeyConstraint(["user_id"], ["tenantdb_users.id"], name="tenantdb_memberships_user_id_fkey"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenantdb_tenants.id"], name="tenantdb_memberships_tenant_id_fkey"),
    )
    op.create_index("tenantdb_memberships_tenant_id_idx", "tenantdb_memberships", ["tenant_id"])
    op.create_table(
        "tenantdb_refresh_tokens",
        sa.Column("hash", sa.LargeBinary, nullable=False),
        sa.Column("user_id", sa.Uuid, nullable=False),
        sa.Column("tenant_id", sa.Uuid),
        sa.Column("expires_at", moment, nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.PrimaryKeyConstraint("hash", name="tenantdb_refresh_tokens_pkey"),
        sa.ForeignKeyConstraint(["user_id"], ["tenantdb_users.id"], name="tenantdb_refresh_tokens_user_id_fkey"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenantdb_tenants.id"], name="tenantdb_refresh_tokens_tenant_id_fkey"),
    )
    op.create_index("tenantdb_refresh_tokens_user_id_idx", "tenantdb_refresh_tokens", ["user_id"])
    op.create_table(
        "tenantdb_audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), sa.Identity(always=True), nullable=False),
        sa.Column("at", moment, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("tenant_id", sa.Uuid),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("object", sa.Text),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("request_id", sa.Text),
        sa.Column("details", document, nullable=False),
        sa.PrimaryKeyConstraint("id", name="tenantdb_audit_pkey"),
        sqlite_autoincrement=True,  # a number is never given twice, also not after rows at the end are gone
    )
    op.create_index("tenantdb_audit_tenant_id_idx", "tenantdb_audit", ["tenant_id"])
    op.create_table(
        "tenantdb_operations",
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("kind", sa.String(40), nullable=False),
        sa.Column("tenant_id", sa.Uuid, nullable=False),
        sa.Column("idempotency_key", sa.String(200)),
        sa.Column("request_hash", sa.LargeBinary, nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("step", sa.String(40)),
        sa.Column("started", sa.Boolean, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("worker", sa.Text),
        sa.Column("lease_until", moment),
        sa.Column("error", sa.Text),
        sa.Column("payload", document, nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("updated_at", moment, nullable=False),
        sa.PrimaryKeyConstraint("id", name="tenantdb_operations_pkey"),
        sa.UniqueConstraint("idempotency_key", name="tenantdb_operations_idempotency_key_key"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenantdb_tenants.id"], name="tenantdb_operations_tenant_id_fkey"),
    )
    op.create_index("tenantdb_operations_tenant_id_idx", "tenantdb_operations", ["tenant_id"])
    op.create_index("tenantdb_operations_state_idx", "tenantdb_operations", ["state"])
    op.create_table(
        "tenantdb_meta",
        sa.Column("id", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("revision", sa.String(32), nullable=False),
        sa.Column("oldest_reader", sa.String(32), nullable=False),
        sa.Column("key_check", sa.LargeBinary),
        sa.PrimaryKeyConstraint("id", name="tenantdb_meta_pkey"),
    )
