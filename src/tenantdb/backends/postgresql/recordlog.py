"""The audit log of a tenant's records, in its own database: tables of the provisioner's, to which the runtime role may add, and no more.

They stand in the schema ``tenantdb``, which no migration owns and no autogenerate sees. Rights go by column: a plain INSERT would let
``OVERRIDING SYSTEM VALUE`` choose an entry's id.
"""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import sql

_TABLES = """
CREATE TABLE IF NOT EXISTS tenantdb.audit (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL,
    actor text NOT NULL,
    action text NOT NULL,
    object text,
    outcome text NOT NULL,
    request_id text,
    reason text,
    source text,
    details jsonb NOT NULL,
    seq bigint NOT NULL,
    mac bytea
);
CREATE INDEX IF NOT EXISTS audit_seq_idx ON tenantdb.audit (seq);
CREATE INDEX IF NOT EXISTS audit_object_idx ON tenantdb.audit (object);
CREATE TABLE IF NOT EXISTS tenantdb.audit_head (
    id smallint PRIMARY KEY CHECK (id = 1),
    seq bigint NOT NULL,
    mac bytea
);
INSERT INTO tenantdb.audit_head (id, seq) VALUES (1, 0) ON CONFLICT DO NOTHING
"""
_GRANTS = """
REVOKE ALL ON tenantdb.audit, tenantdb.audit_head FROM PUBLIC, {owner}, {runtime};
GRANT SELECT ON tenantdb.audit, tenantdb.audit_head TO {owner}, {runtime};
GRANT INSERT (at, actor, action, object, outcome, request_id, reason, source, details, seq, mac) ON tenantdb.audit TO {runtime};
GRANT UPDATE (seq, mac) ON tenantdb.audit_head TO {runtime}
"""


def tables() -> sql.SQL:
    """The statements that make the tables where they are missing; a golden database has them, and grants nobody anything."""
    return sql.SQL(_TABLES)


def grants(owner: sql.Identifier, runtime: sql.Identifier) -> sql.Composed:
    """The statements that grant what these two roles may do."""
    return sql.SQL(_GRANTS).format(owner=owner, runtime=runtime)


def make(connection: psycopg.Connection[Any], owner: sql.Identifier, runtime: sql.Identifier) -> None:
    """Both, as the provisioner, in the tenant's database, which has the schema ``tenantdb`` already. May run any number of times: so a
    database from before there was this log gets it."""
    connection.execute(sql.SQL("{}; {}").format(tables(), grants(owner, runtime)))
