"""Where the databases of a run of tests are, and that nothing of them is left there.

SQLite files, and a PostgreSQL that is started for the run, lie in memory where there is room: what takes long about a new tenant is the
disk, for a clone is some hundred files and a commit waits for the platter. They are thrown away whole.

On a server that is somebody else's a run has a registry of its own, whose name says when it began; at the end every database and role in
that registry is dropped, in whatever state the tests left it. A run that was killed cannot do that, so a later one does it, once nobody
is connected to that registry any more.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pytest import TempPathFactory, UsageError
from sqlalchemy.engine import URL, make_url

from tenantdb.errors import ConfigError, TenantDBError
from tenantdb.registry.secrets import generate_key
from tenantdb.settings import ConnectionURL, Settings

if TYPE_CHECKING:
    from psycopg import Connection

_ABANDONED_AFTER = 3600.0  # seconds; a run that is paused in a debugger keeps its connections, so nobody being there is the better sign
_MEMORY = "/dev/shm"
_ROOM_FOR_FILES = 256 * 1024**2  # bytes
_ROOM_FOR_A_SERVER = 2 * 1024**3  # a cluster, its write-ahead log, and some hundred tenants at a time


@contextmanager
def place(where: str, tmp_path_factory: TempPathFactory) -> Iterator[dict[str, Any]]:
    """The settings that say where the databases are, for as long as they are there. Raises: `pytest.UsageError`."""
    if where == "sqlite":
        with TemporaryDirectory(prefix="tenantdb-tests-", dir=_memory(_ROOM_FOR_FILES) or tmp_path_factory.getbasetemp()) as folder:
            yield {"url": f"sqlite:///{folder}/central.sqlite3"}
    elif where == "postgresql":
        from tenantdb.testing.postgres import EmbeddedServer

        with EmbeddedServer(fsync=False, temporary=_memory(_ROOM_FOR_A_SERVER, programs=True)) as server:
            yield _prepared(server.url())
    elif where.startswith(("postgresql:", "postgresql+psycopg:")):
        with _borrowed(where) as borrowed:
            yield borrowed
    else:
        raise UsageError(f"--tenantdb takes sqlite, postgresql or a postgresql:// URL, not {where.partition('://')[0]!r}")


def _memory(room: int, *, programs: bool = False) -> str | None:
    """A folder in memory, where the system has one with room to spare. A container's is small by default, and may not hold ``programs``."""
    try:
        flags, free = os.statvfs(_MEMORY).f_flag, shutil.disk_usage(_MEMORY).free
    except OSError:
        return None
    fits = free >= room and os.access(_MEMORY, os.W_OK) and not (programs and flags & getattr(os, "ST_NOEXEC", 0))
    return _MEMORY if fits else None


def _prepared(superuser: str) -> dict[str, Any]:
    """A server of our own as production should be: two registry logins, and a provisioner that is no superuser."""
    from psycopg import sql

    from tenantdb.backends.postgresql.bootstrap import bootstrap

    passwords = {name: secrets.token_urlsafe(24) for name in ("app", "admin", "provisioner")}
    key, database = generate_key(), "central"
    settings = Settings(url=superuser, secret_keys=[key])
    bootstrap(settings.url, "provisioner", passwords["provisioner"], settings, iterations=settings.scram_iterations)
    with _login(settings.url, settings) as connection:
        for name in ("app", "admin"):
            connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), sql.Literal(passwords[name])))
        connection.execute(f"CREATE DATABASE {database} OWNER admin")
        connection.execute(f"REVOKE ALL ON DATABASE {database} FROM PUBLIC")
        connection.execute(f"GRANT CONNECT ON DATABASE {database} TO app")
    server = make_url(superuser)

    def url(name: str, database: str) -> URL:
        return URL.create("postgresql", name, passwords[name], server.host, server.port, database)

    return {
        "url": url("app", database),
        "registry_admin": url("admin", database),
        "server": url("provisioner", "postgres"),
        "secret_keys": [key],
    }


# -- somebody else's server ------------------------------------------------------------------------------------------------------------

_PREFIX = "tenantdb_test_"
_RUNS = rf"^{_PREFIX}[0-9a-f]{{8}}_[0-9a-f]{{8}}$"
_DRAWN = "^t_[0-9a-f]{16}$"  # an adopted database has a name that we did not draw
_THEIRS = """
SELECT database, ARRAY[owner_role, runtime_role] FROM tenantdb_tenants WHERE database ~ %(drawn)s
UNION ALL SELECT database, ARRAY[owner_role] FROM tenantdb_templates WHERE database ~ %(drawn)s
"""
_ABANDONED = """
SELECT datname FROM pg_database WHERE datname ~ %s AND pg_get_userbyid(datdba) = current_user
AND NOT EXISTS (SELECT FROM pg_stat_activity WHERE pg_stat_activity.datname = pg_database.datname)
"""


@contextmanager
def _borrowed(login: str) -> Iterator[dict[str, Any]]:
    """A registry of our own on somebody's server, which is left as it was: so nothing of the cluster is hardened."""
    from psycopg import sql

    database, key = f"{_PREFIX}{int(time.time()):08x}_{secrets.token_hex(4)}", generate_key()
    settings = Settings(url=login, secret_keys=[key])
    with _login(settings.url, settings) as connection:
        _require_rights(connection)
        _drop_abandoned_runs(connection, settings)
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
    try:
        with _login(settings.url, settings) as connection:
            connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(sql.Identifier(database)))
        yield {"url": make_url(login).set(database=database), "server": login, "secret_keys": [key], "hardening": "managed"}
    finally:
        with _login(settings.url, settings) as connection:
            _drop_run(connection, settings, database)


def _require_rights(connection: Connection[Any]) -> None:
    row = connection.execute("SELECT rolsuper, rolcreatedb, rolcreaterole FROM pg_roles WHERE rolname = current_user").fetchone()
    if row is None or not (row[0] or (row[1] and row[2])):
        raise ConfigError("the login of --tenantdb makes databases and roles: ALTER ROLE ... CREATEDB CREATEROLE")


def _drop_abandoned_runs(connection: Connection[Any], settings: Settings) -> None:
    import psycopg

    latest = time.time() - _ABANDONED_AFTER
    for (database,) in connection.execute(_ABANDONED, [_RUNS]).fetchall():
        if int(database.removeprefix(_PREFIX)[:8], 16) <= latest:
            with suppress(psycopg.Error, TenantDBError):  # another process is at it, or it stays until next time
                _drop_run(connection, settings, database)


def _drop_run(connection: Connection[Any], settings: Settings, database: str) -> None:
    """Drop what a run's registry names, and then the registry. May run again, and beside another that does the same."""
    from psycopg import errors, sql

    roles: list[str] = []
    try:
        with _login(settings.url, settings, database=database) as inside:
            found = inside.execute(_THEIRS, {"drawn": _DRAWN}).fetchall()
    except errors.UndefinedTable:  # it ended before there was a registry
        found = []
    known = {name for (name,) in connection.execute("SELECT rolname FROM pg_roles WHERE rolname ~ %s", [_DRAWN])}
    for name, theirs in found:
        # Whoever drops a database ends its sessions, for which one must be a member of their role.
        mine = [role for role in theirs if role in known]
        for role in mine:
            connection.execute(sql.SQL("GRANT {} TO CURRENT_USER").format(sql.Identifier(role)))
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
        roles += mine
    for role in roles:
        connection.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(role)))
    connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(database)))


def _login(url: ConnectionURL, settings: Settings, *, database: str | None = None) -> Connection[Any]:
    from tenantdb.backends.postgresql.connect import provisioner_connection

    return provisioner_connection(url, settings, "tests", database=database)
