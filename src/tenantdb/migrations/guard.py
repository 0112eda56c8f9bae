"""What stands before a migration of a PostgreSQL database, inside its transaction: limits, identity, lock, revision.

The lock is one on Alembic's own table: advisory locks may be forbidden to tenants' roles, and a table's lock ends with its transaction,
whoever dies. Reading and writing the table is not blocked by it, only another guard, VACUUM and DDL are.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import EllipsisType
from typing import Any

from alembic.runtime.migration import MigrationContext
from sqlalchemy.schema import CreateTable

from tenantdb.backends.base import milliseconds

WRONG_REVISION, BUSY, WRONG_IDENTITY = "TD001", "TD002", "TD003"


@dataclass(frozen=True, slots=True)
class VersionTable:
    """Where a database says which revision it is at: the table's quoted name, and the statement that makes it where it is missing."""

    name: str
    ddl: str
    plain_ddl: str  # as Alembic renders it itself

    @classmethod
    def of(cls, context: MigrationContext) -> VersionTable:
        table = context.impl.version_table_impl(
            version_table=context.version_table,
            version_table_schema=context.version_table_schema,
            version_table_pk=context.opts.get("version_table_pk", True),
        )

        def compiled(statement: CreateTable) -> str:
            return str(statement.compile(dialect=context.dialect)).strip()

        return cls(
            context.dialect.identifier_preparer.format_table(table),
            compiled(CreateTable(table, if_not_exists=True)),
            compiled(CreateTable(table)),
        )


def guard(
    table: VersionTable,
    *,
    expected: str | EllipsisType | None = ...,
    identity: tuple[str, str] | None = None,
    lock_timeout: float | None = None,
    statement_timeout: float | None = None,
) -> str:
    """One statement for the beginning of a transaction, which the owner role can run; it ends with its lock held, or raises.

    ``expected``: the revision that the database must be at, None for none yet; left out, any will do. ``identity``: the database and the
    tenant's id that its stamp must name; given for text that is sent as SQL, whose string literals are then relied upon as well.
    Timeouts are in seconds and for this transaction; 0 is without limit, None leaves the session's.
    Raises in the database: TD001 at another revision, TD002 locked by another migration, TD003 not the tenant's database.
    """
    body = [
        f"PERFORM pg_catalog.set_config('{name}', '{milliseconds(seconds)}', true);"
        for name, seconds in (("lock_timeout", lock_timeout), ("statement_timeout", statement_timeout))
        if seconds is not None
    ]
    if identity is not None:
        body.append(_IDENTITY.format(stamp=_quoted(" ".join(identity))))
    make = _MAKE.format(name=_quoted(table.name), ddl=table.ddl) if expected is None or expected is ... else ""
    body.append(_LOCK.format(make=make, table=table.name))
    if not isinstance(expected, EllipsisType):
        body.append(_REVISION.format(table=table.name, expected="NULL" if expected is None else _quoted(expected)))
    text = "\n".join(body)
    tag = "$guard$"
    while tag in text:
        tag = f"{tag[:-1]}_$"
    return f"DO {tag}\nDECLARE seen text;\nBEGIN\n{text}\nEND {tag}"


def _quoted(value: Any) -> str:
    from psycopg import sql  # only PostgreSQL needs it

    return sql.quote(value)


_IDENTITY = f"""\
IF pg_catalog.current_setting('standard_conforming_strings') <> 'on' THEN
    RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = 'the session has standard_conforming_strings off';
END IF;
BEGIN
    SELECT pg_catalog.current_database() || ' ' || tenant_id::text INTO STRICT seen FROM ONLY tenantdb.identity;
EXCEPTION WHEN no_data_found OR too_many_rows OR undefined_table OR undefined_column OR invalid_schema_name OR insufficient_privilege THEN
    RAISE EXCEPTION USING ERRCODE = '{WRONG_IDENTITY}', MESSAGE = 'the database carries no identity stamp that this role can read';
END;
IF seen IS DISTINCT FROM {{stamp}} THEN
    RAISE EXCEPTION USING ERRCODE = '{WRONG_IDENTITY}', MESSAGE = 'the identity stamp names another tenant';
END IF;"""
_MAKE = """\
    IF pg_catalog.to_regclass({name}) IS NULL THEN
        {ddl};
    END IF;"""
_LOCK = f"""\
BEGIN
{{make}}
    LOCK TABLE {{table}} IN SHARE UPDATE EXCLUSIVE MODE NOWAIT;
EXCEPTION
    WHEN lock_not_available OR unique_violation OR duplicate_table THEN
        RAISE EXCEPTION USING ERRCODE = '{BUSY}', MESSAGE = 'another migration of this database is under way';
    WHEN undefined_table THEN
        RAISE EXCEPTION USING ERRCODE = '{WRONG_REVISION}', MESSAGE = 'the database has no version table';
END;"""
_REVISION = f"""\
SELECT pg_catalog.string_agg(version_num, ', ' ORDER BY version_num) INTO seen FROM {{table}};
IF seen IS DISTINCT FROM {{expected}} THEN
    RAISE EXCEPTION USING ERRCODE = '{WRONG_REVISION}',
        MESSAGE = 'the database is at ' || COALESCE(seen, 'base') || ', not at ' || COALESCE({{expected}}, 'base');
END IF;"""
