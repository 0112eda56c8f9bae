"""The registry's own schema: making it, and telling whether this code can work with what is there.

It has an Alembic history and a version table of its own, so that it can live inside an application's existing database. Revisions only
add; the registry stores the revision it is at and the oldest code revision that may still work with it. So in a rolling deploy old
processes go on until something is really out of their reach.
"""

from __future__ import annotations

import threading
from pathlib import Path

from sqlalchemy import Connection, Engine, bindparam, func, insert, select, text, update
from sqlalchemy.exc import IntegrityError, ProgrammingError

from tenantdb.errors import HardeningFailed, RegistryNotInitialized, RegistryOutOfRange
from tenantdb.registry import tables
from tenantdb.registry.secrets import RUNTIME, Keyring
from tenantdb.registry.transactions import begin, mapped_errors

OLDEST = "0004"
"""The oldest stored revision that this code can work with."""
NEWEST = "0004"
"""The revision that `upgrade` brings a registry to."""
OLDEST_READER = "0001"
"""The oldest code that can work with a registry at NEWEST: the highest NEWEST of a code that cannot, plus one."""

alembic_lock = threading.RLock()
"""Held around every Alembic command in this process: its ``op`` and ``context`` are process-global."""

_KEY_CHECK = b"tenantdb"
_OWNER_SECRETS = ("owner_secret", "owner_secret_pending")
_RUNTIME_SECRETS = ("runtime_secret", "runtime_secret_pending")
KEY_CHECK_PLACE = ("registry", "key_check")
_OWNS = text("SELECT pg_has_role(:role, relowner, 'USAGE') FROM pg_class WHERE oid = to_regclass(:table)")
_LOCK = text(f"LOCK TABLE {tables.VERSION_TABLE} IN EXCLUSIVE MODE")
_VERSIONS = text(f"SELECT version_num FROM {tables.VERSION_TABLE}")


def upgrade(engine: Engine, keyring: Keyring) -> bool:
    """Create the registry's tables, or bring them to `NEWEST`. May run any number of times, also in several processes at once.

    A registry that is newer than this code is left as it is, its grants too, and False is returned. Raises: `RegistryOutOfRange` where it
    is too new; `SecretKeyError` where the keys are not the ones it was made with; `RegistryUnavailable`.
    """
    try:
        _make_version_table(engine)
    except (IntegrityError, ProgrammingError):  # another process made it at the same moment: CREATE ... IF NOT EXISTS races with itself
        _make_version_table(engine)
    with alembic_lock, mapped_errors(), begin(engine, immediate=True) as connection:
        if connection.dialect.name == "postgresql":  # not an advisory lock: hardened databases refuse those
            connection.execute(_LOCK)
        if (connection.scalar(_VERSIONS) or "") > NEWEST:
            check_range(connection)
            return False
        _run_history(connection)
        _write_meta(connection, keyring)
        return True


def check_range(connection: Connection) -> None:
    """Raises: `RegistryNotInitialized`, `RegistryOutOfRange`."""
    with mapped_errors():
        found = connection.execute(select(tables.meta.c.revision, tables.meta.c.oldest_reader)).first()
    if found is None:
        raise RegistryNotInitialized
    if found.revision < OLDEST or found.oldest_reader > NEWEST:
        raise RegistryOutOfRange(found.revision, OLDEST, NEWEST)


def check_keys(connection: Connection, keyring: Keyring) -> None:
    """Whether the keys are the ones that this registry's secrets were encrypted with. Raises: `SecretKeyError`, `CredentialTampered`."""
    with mapped_errors():
        blob = connection.scalar(select(tables.meta.c.key_check))
    if blob is not None and keyring.holds(RUNTIME):
        keyring.open(RUNTIME, blob, *KEY_CHECK_PLACE)


def grant_app(connection: Connection, role: str) -> None:
    """Give the serving login what it needs and nothing else, column by column (PostgreSQL). May run any number of times.

    Raises: `HardeningFailed` where that had no effect: the tables belong to somebody else, or the role is a superuser.
    """
    quote = connection.dialect.identifier_preparer.quote_identifier
    app = quote(role)
    statements = []
    for table, rights in tables.APP_COLUMNS.items():
        name = quote(table.name)
        statements.append(f"REVOKE ALL ON TABLE {name} FROM PUBLIC, {app}")
        for right, columns in rights.items():
            listed = f" ({', '.join(quote(column) for column in columns)})" if columns else ""
            statements.append(f"GRANT {right}{listed} ON TABLE {name} TO {app}")
    statements.append(f"REVOKE ALL ON TABLE {tables.VERSION_TABLE} FROM PUBLIC, {app}")
    statements.append(f"GRANT SELECT ON TABLE {tables.VERSION_TABLE} TO {app}")
    schema = str(connection.scalar(select(func.current_schema())))
    if not connection.scalar(select(func.has_schema_privilege(role, schema, "USAGE"))):
        statements.append(f"GRANT USAGE ON SCHEMA {quote(schema)} TO {app}")
    connection.execute(_LOCK)  # GRANTs of two processes on one table at once end in "tuple concurrently updated"
    for statement in statements:
        connection.exec_driver_sql(statement)
    if findings := open_doors(connection, role):
        raise HardeningFailed(findings)


def open_doors(connection: Connection, role: str) -> list[str]:
    """What the serving login may do although it should not, in words; empty where it is walled in (PostgreSQL)."""
    allowed = text("SELECT has_table_privilege(:role, :table, :right)").bindparams(bindparam("role", role))
    column = text("SELECT has_column_privilege(:role, :table, :column, :right)").bindparams(bindparam("role", role))
    audit, tenants = tables.audit.name, tables.tenants.name
    if connection.scalar(_OWNS, {"role": role, "table": audit}):
        return ["one login serves and owns the registry, so it owns the audit log too; give registry_admin= a login of its own"]
    findings = [
        f"the registry login {role!r} may {right} the audit log"
        for right in ("UPDATE", "DELETE", "TRUNCATE")
        if connection.scalar(allowed, {"table": audit, "right": right})
    ]
    if any(connection.scalar(column, {"table": tenants, "column": name, "right": "SELECT"}) for name in _OWNER_SECRETS):
        findings.append(f"the registry login {role!r} may read the tenants' owner secrets")
    findings.extend(
        f"the registry login {role!r} may write {name} of tenants"
        for name in ("server_id", "database", "owner_role", "runtime_role", *_OWNER_SECRETS, *_RUNTIME_SECRETS, "legal_hold")
        if connection.scalar(column, {"table": tenants, "column": name, "right": "UPDATE"})
    )
    return findings


def public_doors(connection: Connection) -> list[str]:
    """Whether any login of the cluster, a tenant's too, may enter the registry's database (PostgreSQL)."""
    name = connection.scalar(select(func.current_database()))
    if not connection.scalar(text("SELECT has_database_privilege('public', current_database(), 'CONNECT')")):
        return []
    return [f"PUBLIC may connect to the registry's database; as its owner: REVOKE ALL ON DATABASE {name} FROM PUBLIC"]


def _make_version_table(engine: Engine) -> None:
    """Alembic's version table, made before Alembic comes, because it is also what two upgrades at once wait for each other at."""
    statement = (
        f"CREATE TABLE IF NOT EXISTS {tables.VERSION_TABLE}"
        f" (version_num VARCHAR(32) NOT NULL, CONSTRAINT {tables.VERSION_TABLE}_pkc PRIMARY KEY (version_num))"
    )
    with mapped_errors(), begin(engine, immediate=True) as connection:
        connection.execute(text(statement))


def _run_history(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "history").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _write_meta(connection: Connection, keyring: Keyring) -> None:
    values = {"revision": NEWEST, "oldest_reader": OLDEST_READER}
    found = connection.execute(select(tables.meta)).first()
    if found is None:
        connection.execute(insert(tables.meta).values(id=1, **values))
    else:
        connection.execute(update(tables.meta).values(**values))
        check_keys(connection, keyring)
    if keyring.holds(RUNTIME) and (found is None or found.key_check is None):
        blob = keyring.seal(RUNTIME, _KEY_CHECK, *KEY_CHECK_PLACE)
        connection.execute(update(tables.meta).values(key_check=blob))
