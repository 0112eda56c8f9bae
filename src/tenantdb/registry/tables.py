"""The registry's tables, as SQLAlchemy Core sees them. What made them is the history beside this file; a test holds the two together.

States and roles are plain strings: a database enum could not grow while old processes still run. Times are aware and in UTC on both
databases. Columns that the ``app`` login may write are listed here too, beside the columns themselves.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
)
from sqlalchemy.types import TypeDecorator, TypeEngine

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    }
)


class Document(TypeDecorator[Any]):
    """A JSON document, JSONB on PostgreSQL. The dialect's type is imported when it is needed, not with this module."""

    impl = JSON(none_as_null=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name != "postgresql":
            return super().load_dialect_impl(dialect)
        from sqlalchemy.dialects.postgresql import JSONB

        return dialect.type_descriptor(JSONB(none_as_null=True))


BigSerial = BigInteger().with_variant(Integer(), "sqlite")  # SQLite numbers rows only in a column declared INTEGER


class Moment(TypeDecorator[datetime]):
    """An aware time in UTC. SQLite keeps no time zone, so it goes in as UTC and comes back as UTC; a naive time is refused."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a time zone cannot be stored; use datetime.now(timezone.utc)")
        return value.astimezone(timezone.utc)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=timezone.utc) if value.tzinfo is None else value.astimezone(timezone.utc)


def utcnow() -> datetime:
    return datetime.now(timezone.utc)


servers = Table(
    "tenantdb_servers",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", String(200), nullable=False, unique=True),
    Column("backend", String(20), nullable=False),
    Column("host", Text),
    Column("port", Integer),
    Column("direct_host", Text),
    Column("direct_port", Integer),
    Column("path", Text),
    Column("address_seal", LargeBinary),
    Column("region", String(200)),
    Column("capacity", Integer),
    Column("extensions", Document, nullable=False),
    Column("schemas", Document, nullable=False),
    Column("draining", Boolean, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("updated_at", Moment, nullable=False),
)

tenants = Table(
    "tenantdb_tenants",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("slug", String(40), unique=True),
    Column("name", Text),
    Column("email", Text),
    Column("phone", Text),
    Column("country", Text),
    Column("state", String(20), nullable=False, index=True),
    Column("server_id", Uuid, ForeignKey("tenantdb_servers.id")),
    Column("database", String(63)),
    Column("owner_role", String(63)),
    Column("runtime_role", String(63)),
    Column("owner_secret", LargeBinary),
    Column("runtime_secret", LargeBinary),
    Column("version", BigInteger, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("revision", Text),
    Column("plan", Text),
    Column("subscription", String(20), nullable=False),
    Column("subscription_expires_at", Moment),
    Column("metadata", Document, nullable=False),
    Column("reason", Text),
    Column("created_at", Moment, nullable=False),
    Column("updated_at", Moment, nullable=False),
    Column("deleted_at", Moment),
    Column("fence", String(20)),
    Column("ready_at", Moment, index=True),
    Column("purge_after", Moment),
    Column("purged_at", Moment),
    Column("legal_hold", Text),
    Column("adopted_from", Text),
    Column("owner_secret_pending", LargeBinary),
    Column("runtime_secret_pending", LargeBinary),
    Column("certificate", Document),
    Column("tokens_valid_from", Moment),
    UniqueConstraint("server_id", "database"),
)

users = Table(
    "tenantdb_users",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("email", String(254), nullable=False),
    Column("email_key", Text, nullable=False),
    Column("password_hash", Text, nullable=False),
    Column("first_name", Text),
    Column("last_name", Text),
    Column("verification_hash", LargeBinary, unique=True),
    Column("verification_expires_at", Moment),
    Column("reset_hash", LargeBinary, unique=True),
    Column("reset_expires_at", Moment),
    Column("email_verified_at", Moment),
    Column("platform_admin", Boolean, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("updated_at", Moment, nullable=False),
    Column("deleted_at", Moment),
    Column("tokens_valid_from", Moment),
)
# In the database only among the living: the e-mail of a deleted user is free again. The condition stands in the history alone, because an
# option of a dialect loads the dialect, and importing tenantdb would cost a quarter more.
Index("tenantdb_users_email_key_key", users.c.email_key, unique=True)

memberships = Table(
    "tenantdb_memberships",
    metadata,
    Column("user_id", Uuid, ForeignKey("tenantdb_users.id"), primary_key=True),
    Column("tenant_id", Uuid, ForeignKey("tenantdb_tenants.id"), primary_key=True, index=True),
    Column("role", String(20), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("created_at", Moment, nullable=False),
)

refresh_tokens = Table(
    "tenantdb_refresh_tokens",
    metadata,
    Column("hash", LargeBinary, primary_key=True),
    Column("user_id", Uuid, ForeignKey("tenantdb_users.id"), nullable=False, index=True),
    Column("tenant_id", Uuid, ForeignKey("tenantdb_tenants.id")),
    Column("expires_at", Moment, nullable=False),
    Column("created_at", Moment, nullable=False),
)

domains = Table(
    "tenantdb_domains",
    metadata,
    Column("domain", String(253), primary_key=True),
    Column("tenant_id", Uuid, ForeignKey("tenantdb_tenants.id"), nullable=False, index=True),
    Column("created_at", Moment, nullable=False),
)

revocations = Table(
    "tenantdb_revocations",
    metadata,
    Column("jti", Text, primary_key=True),
    Column("expires_at", Moment, nullable=False, index=True),  # of the token: afterwards there is nothing left to revoke
    Column("created_at", Moment, nullable=False, index=True),
)

rates = Table(
    "tenantdb_rates",
    metadata,
    Column("key", Text, primary_key=True),
    Column("until", Moment, nullable=False, index=True),  # the moment up to which what was asked for is paid: see tenantdb.registry.rates
)

audit = Table(
    "tenantdb_audit",
    metadata,
    Column("id", BigSerial, Identity(always=True), primary_key=True),
    Column("at", Moment, nullable=False),
    Column("actor", Text, nullable=False),
    Column("tenant_id", Uuid, index=True),  # no foreign key: the log outlives what it tells of
    Column("action", Text, nullable=False),
    Column("object", Text),
    Column("outcome", Text, nullable=False),
    Column("request_id", Text),
    Column("details", Document, nullable=False),
    Column("seq", BigInteger),  # in the chain of the tenant, or of the installation; None before there were chains
    Column("mac", LargeBinary),
    Column("reason", Text),
    Column("source", Text),
)

Index("tenantdb_audit_tenant_id_seq_idx", audit.c.tenant_id, audit.c.seq)

audit_heads = Table(
    "tenantdb_audit_heads",
    metadata,
    Column("chain", Uuid, primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("mac", LargeBinary),
    Column("kept_from", BigInteger),
    Column("kept_mac", LargeBinary),
    Column("kept_seal", LargeBinary),
)

operations = Table(
    "tenantdb_operations",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("kind", String(40), nullable=False),
    Column("tenant_id", Uuid, ForeignKey("tenantdb_tenants.id"), nullable=False, index=True),
    Column("idempotency_key", String(200), unique=True),
    Column("request_hash", LargeBinary, nullable=False),
    Column("state", String(20), nullable=False, index=True),
    Column("step", String(40)),
    Column("started", Boolean, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("worker", Text),
    Column("lease_until", Moment),
    Column("error", Text),
    Column("payload", Document, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("updated_at", Moment, nullable=False),
    Column("sanctioned", Boolean),  # by the login that owns the registry: what the serving login must not have a worker do
)

templates = Table(
    "tenantdb_templates",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("server_id", Uuid, ForeignKey("tenantdb_servers.id"), nullable=False),
    Column("revision", Text),
    Column("digest", String(64), nullable=False),
    Column("database", String(63), nullable=False),
    Column("owner_role", String(63)),
    Column("state", String(20), nullable=False),
    Column("worker", Text),
    Column("lease_until", Moment),
    Column("created_at", Moment, nullable=False),
    Column("updated_at", Moment, nullable=False),
    UniqueConstraint("server_id", "database"),
)

rollouts = Table(
    "tenantdb_rollouts",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("target", Text, nullable=False),  # empty: before the first revision
    Column("state", String(20), nullable=False),
    Column("options", Document, nullable=False),
    Column("worker", Text),
    Column("lease_until", Moment),
    Column("error", Text),
    Column("total", Integer, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("updated_at", Moment, nullable=False),
    Column("finished_at", Moment),
)

rollout_attempts = Table(
    "tenantdb_rollout_attempts",
    metadata,
    Column("rollout_id", Uuid, ForeignKey("tenantdb_rollouts.id"), primary_key=True),
    Column("tenant_id", Uuid, ForeignKey("tenantdb_tenants.id"), primary_key=True),
    Column("wave", Integer, nullable=False),
    Column("position", Integer, nullable=False),
    Column("state", String(20), nullable=False),
    Column("from_revision", Text),
    Column("to_revision", Text),
    Column("engine", String(20)),
    Column("tries", Integer, nullable=False),
    Column("started_at", Moment),
    Column("finished_at", Moment),
    Column("seconds", Float),
    Column("error", Text),
    Column("sqlstate", String(5)),
    Column("worker", Text),
)

Index(
    "tenantdb_rollout_attempts_rollout_id_state_position_idx",
    rollout_attempts.c.rollout_id,
    rollout_attempts.c.state,
    rollout_attempts.c.position,  # so that a page of those that wait costs the same however many wait
)

meta = Table(
    "tenantdb_meta",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),  # always 1
    Column("revision", String(32), nullable=False),
    Column("oldest_reader", String(32), nullable=False),
    Column("key_check", LargeBinary),
)

VERSION_TABLE = "tenantdb_alembic_version"

_TENANT_LIFE = (
    "slug name email phone country state plan subscription subscription_expires_at metadata version generation reason updated_at deleted_at"
    " fence ready_at purge_after created_at tokens_valid_from"
).split()
_JOURNAL = "state step started attempt worker lease_until error updated_at".split()

APP_COLUMNS: dict[Table, dict[str, list[str]]] = {
    tenants: {
        "SELECT": [column.name for column in tenants.columns if column.name not in ("owner_secret", "owner_secret_pending")],
        "INSERT": ["id", *_TENANT_LIFE],
        "UPDATE": _TENANT_LIFE,
    },
    audit: {"SELECT": [], "INSERT": [column.name for column in audit.columns if column.name != "id"]},
    users: {"SELECT": [], "INSERT": [], "UPDATE": [], "DELETE": []},
    memberships: {"SELECT": [], "INSERT": [], "UPDATE": [], "DELETE": []},
    refresh_tokens: {"SELECT": [], "INSERT": [], "UPDATE": [], "DELETE": []},
    domains: {"SELECT": [], "INSERT": [], "DELETE": []},
    revocations: {"SELECT": [], "INSERT": [], "DELETE": []},
    rates: {"SELECT": [], "INSERT": [], "UPDATE": [], "DELETE": []},
    audit_heads: {"SELECT": [], "INSERT": ["chain", "seq", "mac"], "UPDATE": ["seq", "mac"]},
    operations: {"SELECT": [], "INSERT": [column.name for column in operations.columns if column.name != "sanctioned"], "UPDATE": _JOURNAL},
    servers: {"SELECT": []},
    templates: {"SELECT": []},
    meta: {"SELECT": []},
}
"""What the ``app`` login may do on PostgreSQL, by column; an empty list means all columns. It can give no tenant a place, a role or a
secret, reads no owner's secret, and neither changes nor numbers what the audit log says. Of an operation it may write where it is: taking
a spare and seeding it is a procedure that a serving process carries out itself."""
