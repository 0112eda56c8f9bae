"""What requests need: custom domains, revoked tokens, rates, and notices of every change that a process may have cached."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

moment = sa.DateTime(timezone=True)

# A trigger, not a statement in the code that writes: then code of the past and an operator's own UPDATE tell the processes too.
_FUNCTION = """
CREATE FUNCTION tenantdb_notify() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog AS $$
DECLARE changed record;
BEGIN
    IF TG_OP = 'DELETE' THEN changed := OLD; ELSE changed := NEW; END IF;
    IF TG_TABLE_NAME = 'tenantdb_tenants' THEN
        PERFORM pg_notify('tenantdb', format('tenant %s %s %s', changed.id, changed.version, changed.generation));
    ELSIF TG_TABLE_NAME = 'tenantdb_memberships' THEN
        PERFORM pg_notify('tenantdb', format('membership %s %s', changed.user_id, changed.tenant_id));
    ELSIF TG_TABLE_NAME = 'tenantdb_users' THEN
        PERFORM pg_notify('tenantdb', format('user %s', changed.id));
    ELSIF TG_TABLE_NAME = 'tenantdb_domains' THEN
        PERFORM pg_notify('tenantdb', format('domain %s', changed.domain));
    ELSIF TG_TABLE_NAME = 'tenantdb_revocations' THEN
        PERFORM pg_notify('tenantdb', 'revocation');
    ELSE
        PERFORM pg_notify('tenantdb', 'server');
    END IF;
    RETURN NULL;
END $$
"""
_WATCHED = {
    "tenantdb_tenants": "INSERT OR UPDATE OR DELETE",
    "tenantdb_memberships": "INSERT OR UPDATE OR DELETE",
    "tenantdb_users": "UPDATE OR DELETE",
    "tenantdb_domains": "INSERT OR UPDATE OR DELETE",
    "tenantdb_revocations": "INSERT",
    "tenantdb_servers": "UPDATE OR DELETE",
}


def upgrade() -> None:
    op.add_column("tenantdb_tenants", sa.Column("tokens_valid_from", moment))
    op.add_column("tenantdb_users", sa.Column("tokens_valid_from", moment))
    op.create_table(
        "tenantdb_domains",
        sa.Column("domain", sa.String(253), nullable=False),
        sa.Column("tenant_id", sa.Uuid, nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.PrimaryKeyConstraint("domain", name="tenantdb_domains_pkey"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenantdb_tenants.id"], name="tenantdb_domains_tenant_id_fkey"),
    )
    op.create_index("tenantdb_domains_tenant_id_idx", "tenantdb_domains", ["tenant_id"])
    op.create_table(
        "tenantdb_revocations",
        sa.Column("jti", sa.Text, nullable=False),
        sa.Column("expires_at", moment, nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.PrimaryKeyConstraint("jti", name="tenantdb_revocations_pkey"),
    )
    op.create_index("tenantdb_revocations_expires_at_idx", "tenantdb_revocations", ["expires_at"])
    op.create_index("tenantdb_revocations_created_at_idx", "tenantdb_revocations", ["created_at"])
    op.create_table(
        "tenantdb_rates",
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("until", moment, nullable=False),
        sa.PrimaryKeyConstraint("key", name="tenantdb_rates_pkey"),
    )
    op.create_index("tenantdb_rates_until_idx", "tenantdb_rates", ["until"])
    if op.get_bind().dialect.name == "postgresql":
        op.execute(_FUNCTION)
        for table, events in _WATCHED.items():
            op.execute(f"CREATE TRIGGER tenantdb_notify AFTER {events} ON {table} FOR EACH ROW EXECUTE FUNCTION tenantdb_notify()")
