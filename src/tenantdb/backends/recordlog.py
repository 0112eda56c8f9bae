"""The audit log of a tenant's records in a SQLite file. There are no roles, so triggers keep honest code from changing an entry, and the
chain finds out the other."""

from __future__ import annotations

import sqlite3

_REFUSE = "BEGIN SELECT RAISE(ABORT, 'entries of the audit log are neither changed nor deleted'); END"
_MAKE = (
    "CREATE TABLE IF NOT EXISTS tenantdb_audit_records (id INTEGER PRIMARY KEY AUTOINCREMENT, at DATETIME NOT NULL, actor TEXT NOT NULL,"
    " action TEXT NOT NULL, object TEXT, outcome TEXT NOT NULL, request_id TEXT, reason TEXT, source TEXT, details JSON NOT NULL,"
    " seq BIGINT NOT NULL, mac BLOB)",
    "CREATE INDEX IF NOT EXISTS tenantdb_audit_records_seq_idx ON tenantdb_audit_records (seq)",
    "CREATE INDEX IF NOT EXISTS tenantdb_audit_records_object_idx ON tenantdb_audit_records (object)",
    f"CREATE TRIGGER IF NOT EXISTS tenantdb_audit_records_unchanged BEFORE UPDATE ON tenantdb_audit_records {_REFUSE}",
    f"CREATE TRIGGER IF NOT EXISTS tenantdb_audit_records_kept BEFORE DELETE ON tenantdb_audit_records {_REFUSE}",
    "CREATE TABLE IF NOT EXISTS tenantdb_audit_records_head (id INTEGER PRIMARY KEY CHECK (id = 1), seq BIGINT NOT NULL, mac BLOB)",
    "INSERT OR IGNORE INTO tenantdb_audit_records_head (id, seq) VALUES (1, 0)",
)

TABLES = ("tenantdb_audit_records", "tenantdb_audit_records_head")


def make(connection: sqlite3.Connection) -> None:
    """Make the tables where they are missing, in the caller's transaction. May run any number of times."""
    for statement in _MAKE:
        connection.execute(statement)
