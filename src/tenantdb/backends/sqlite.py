"""SQLite: a server is a folder, a tenant one file in it.

The driver's own transaction control leaves the DDL of a rolled-back migration in place and cannot start a write transaction before the
first write, so it is switched off and BEGIN is sent here: ``BEGIN IMMEDIATE`` where the engine's execution option ``tenantdb_begin`` says
so (registry writes and `TenantDB.begin`), because a read that later wants to write fails at once in WAL mode, whatever the busy timeout.
Files are opened with ``mode=rw``: a missing tenant is an error, never a new empty database.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from uuid import UUID

from pydantic import SecretStr
from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.pool import NullPool, QueuePool

from tenantdb.backends import recordlog
from tenantdb.backends.base import (
    ConnectFailed,
    FailureClass,
    FenceLevel,
    FoundDatabase,
    Location,
    SchemaLine,
    ServerReport,
    Survey,
    TemplateMissing,
)
from tenantdb.errors import AdoptRefused, ConfigError, RegistryNotInitialized, WrongDatabase
from tenantdb.model import DatabaseRole, Server, Template, Tenant
from tenantdb.settings import SQLITE, ConnectionURL, Settings

if TYPE_CHECKING:
    from tenantdb.backends.protocols import Carrier, Doctor, Rows

IDENTITY_TABLE = "tenantdb_identity"
_SCRATCH = ".tenantdb-"  # folders in which a file is copied before it gets its name
_LONG_AGO = 3600.0  # seconds
_FOR_EVER = 2**31 - 1  # milliseconds; to SQLite 0 means not to wait at all


class SQLite:
    """The embedded default: no server, no roles, no keys; one process or a few on one machine."""

    name = SQLITE

    def template(self, settings: Settings, *, is_async: bool) -> Engine:
        driver = "sqlite+aiosqlite" if is_async else "sqlite"
        try:
            engine = create_engine(f"{driver}://", poolclass=NullPool, hide_parameters=True)
        except ModuleNotFoundError:
            raise ConfigError("asyncio on SQLite needs aiosqlite: pip install 'tenantdb[sqlite]'") from None
        _send_begin(engine)
        return engine

    def url(self, location: Location) -> URL:
        return URL.create("sqlite", database=str(database_path(location.server, location.tenant)))

    def open(self, dialect: Dialect, location: Location, settings: Settings, *, timeout: float) -> Any:
        path = database_path(location.server, location.tenant)
        if not path.exists():
            raise ConnectFailed(FailureClass.TENANT, "the tenant's database file is missing")
        arguments: dict[str, Any] = {"uri": True, "check_same_thread": False}
        if dialect.is_async:
            arguments["async_creator_fn"] = _open_in_thread
        try:
            connection = dialect.connect(_existing(path), **arguments)
        except sqlite3.OperationalError as error:
            raise ConnectFailed(FailureClass.TENANT, "the tenant's database file cannot be opened") from error
        _configure(connection, settings, location.tenant, migrating=location.role is DatabaseRole.OWNER, read_only=location.read_only)
        return connection

    def wire(self, dialect: Dialect, connection: Any) -> FileWire:
        return FileWire(connection, dialect.get_driver_connection(connection), is_async=dialect.is_async)

    def refuses_writing(self, error: BaseException) -> bool:
        return isinstance(error, sqlite3.OperationalError) and str(error) == "attempt to write a readonly database"

    def registry_engine(self, url: ConnectionURL, settings: Settings) -> Engine:
        path = Path(url.path or "").absolute()
        engine = create_engine(URL.create("sqlite", database=str(path)), poolclass=QueuePool, hide_parameters=True)
        _prepare(engine, path, settings)
        return engine

    def listen(self, url: ConnectionURL, settings: Settings, channel: str) -> None:
        """A file tells nobody that it has changed."""

    def prepare_registry(self, url: ConnectionURL) -> None:
        path = Path(url.path or "").absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))  # it holds password hashes
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")

    @contextmanager
    def workshop(self, server: Server, url: ConnectionURL, settings: Settings) -> Iterator[SQLiteWorkshop]:
        yield SQLiteWorkshop(server, settings)

    @contextmanager
    def scratch_engine(self, server: Server, url: ConnectionURL, settings: Settings) -> Iterator[Engine]:
        with tempfile.TemporaryDirectory(prefix="tenantdb-") as folder:
            path = Path(folder) / "scratch.sqlite3"
            path.touch()
            with engine_on(path, settings) as engine:
                yield engine

    def check_server(self, server: Server, url: ConnectionURL, settings: Settings) -> ServerReport:
        folder = Path(server.path or "")
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        return ServerReport() if os.access(existing, os.W_OK) else ServerReport([f"the folder {str(folder)!r} cannot be written"])

    def doctor(self, server: Server, url: ConnectionURL, settings: Settings) -> Doctor:
        from tenantdb.backends.sqlite_doctor import SQLiteDoctor

        return SQLiteDoctor(server)

    def carrier(self, location: Location, settings: Settings) -> Carrier:
        from tenantdb.backends.sqlite_transfer import SQLiteCarrier

        return SQLiteCarrier(location)

    def keep_copy(self, location: Location) -> None:
        path = database_path(location.server, location.tenant)
        _kept_copy(path).unlink(missing_ok=True)
        _copy(path, _kept_copy(path))

    async def send_script(self, location: Location, settings: Settings, script: str) -> list[tuple[Any, ...]]:
        raise NotImplementedError("SQLite's migrations are never sent as a script")

    def rows(self, connection: Connection, schemas: Sequence[str]) -> Rows:
        from tenantdb.backends.sqlite_transfer import SQLiteRows

        return SQLiteRows(connection)

    def schema_lines(self, connection: Connection, tenant: Tenant | None = None) -> list[SchemaLine]:
        from tenantdb.backends.sqlite_fingerprint import schema_lines

        return schema_lines(connection)


@contextmanager
def engine_on(path: Path, settings: Settings) -> Iterator[Engine]:
    """An engine on a file of ours that is no tenant's, for as long as the block lasts."""
    engine = create_engine(URL.create("sqlite", database=str(path)), poolclass=NullPool)
    _prepare(engine, path, settings, migrating=True)
    try:
        yield engine
    finally:
        engine.dispose()


def _prepare(engine: Engine, path: Path, settings: Settings, *, migrating: bool = False) -> None:
    """An engine on a file that is no tenant's."""

    @event.listens_for(engine, "do_connect")
    def open_existing(dialect: Any, record: Any, cargs: list[Any], cparams: dict[str, Any]) -> None:
        if not path.exists():
            raise RegistryNotInitialized
        cargs[:] = [_existing(path)]
        cparams["uri"] = True

    @event.listens_for(engine, "connect")
    def configure(dbapi_connection: Any, record: Any) -> None:
        _configure(dbapi_connection, settings, None, migrating=migrating)

    _send_begin(engine)


_closing = threading.Lock()
"""One file is closed at a time: when the last two connections to one close together, each leaves the write-ahead log to the other."""


class FileWire:
    """A file that is handed over from one user to the next: SQLAlchemy's rollback is all there is to undo."""

    __slots__ = ("_connection", "_driver", "_is_async")

    def __init__(self, connection: Any, driver: Any, *, is_async: bool) -> None:
        self._connection = connection
        self._driver = driver
        self._is_async = is_async

    def defer(self) -> None:
        """The rollback costs no round trip, so it happens at once."""

    def send_reset(self) -> bool:
        """False after a COMMIT that failed (a deferred constraint): SQLite keeps the transaction, which SQLAlchemy takes for ended."""
        return not self._driver.in_transaction

    def settled(self) -> bool | None:
        return True

    def settle(self, timeout: float) -> Any:
        return self.ping(timeout)

    def ping(self, timeout: float) -> Any:
        return _true() if self._is_async else True

    def finish(self) -> int | None:
        if not self._is_async:
            with _closing:
                self._connection.close()
            return None
        closed, still_open = os.pipe()
        os.set_blocking(closed, False)
        threading.Thread(target=self._stop, args=(still_open,), daemon=True).start()
        return closed

    def _stop(self, still_open: int) -> None:
        """In a thread of its own, because the driver's thread closes the file, and reports to the loop in which it is told to, if any."""
        try:
            with _closing:
                self._driver.stop()
                self._driver._thread.join()
        finally:
            os.close(still_open)

    def disown(self) -> object:
        inherited = (self._connection, self._driver)
        self._connection, self._is_async = _Nothing, False
        return inherited


class _Nothing:
    """In the place of what belongs to the parent process."""

    @staticmethod
    def close() -> None: ...


async def _true() -> bool:
    return True


def _existing(path: Path) -> str:
    return f"file:{quote(str(path))}?mode=rw"


def _configure(connection: Any, settings: Settings, tenant: Tenant | None, *, migrating: bool, read_only: bool = False) -> None:
    """Once per connection, before any statement of the application. Raises: `WrongDatabase`, and closes the connection then."""
    connection.isolation_level = None  # we send BEGIN ourselves
    try:
        cursor = connection.cursor()
        try:
            cursor.execute(f"PRAGMA busy_timeout={_milliseconds(settings.lock_timeout)}")
            # A batch migration rebuilds tables, and with enforcement on dropping the old one would delete or refuse what refers to it. The
            # switch does nothing inside a transaction, so it is set here, and `verify` looks for what broke.
            cursor.execute(f"PRAGMA foreign_keys={'OFF' if migrating else 'ON'}")
            cursor.execute("PRAGMA synchronous=NORMAL")  # in WAL mode safe against a crash of the process
            if tenant is not None:
                _check_identity(cursor, tenant)
            if read_only:  # a file opened with mode=ro would leave its write-ahead log behind
                cursor.execute("PRAGMA query_only=ON")
        finally:
            cursor.close()
    except BaseException:
        connection.close()
        raise


def _send_begin(engine: Engine) -> None:
    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        if options.get("isolation_level") != "AUTOCOMMIT":
            reads = options.get("tenantdb_read_only")  # then the write lock is refused as a write is
            connection.exec_driver_sql(f"BEGIN {'DEFERRED' if reads else options.get('tenantdb_begin', 'DEFERRED')}")


async def _open_in_thread(*args: Any, **parameters: Any) -> Any:
    """Open a file through aiosqlite, whose thread finishes opening also when the coroutine that waits for it is cancelled.

    What it opens then would be nobody's, and stay open until it is collected; so whoever comes second, the thread or the cancellation,
    closes it.
    """
    import aiosqlite

    lock = threading.Lock()
    opened: list[sqlite3.Connection] = []
    abandoned = False

    def connect() -> sqlite3.Connection:
        connection: sqlite3.Connection = sqlite3.connect(
            *args, **{**parameters, "check_same_thread": False}
        )  # closed perhaps by the event loop's thread
        with lock:
            opened.append(connection)
            if abandoned:
                connection.close()
        return connection

    connection = aiosqlite.Connection(connect, iter_chunk_size=64)
    connection._thread.daemon = True  # as SQLAlchemy does: a connection that was left open must not keep the process from ending
    try:
        return await connection
    except BaseException:
        with lock:
            abandoned = True
            for left in opened:
                left.close()
        raise


def _milliseconds(seconds: float) -> int:
    return min(max(1, round(seconds * 1000)), _FOR_EVER) if seconds else _FOR_EVER


def database_path(server: Server, tenant: Tenant) -> Path:
    """The file of a tenant: the stored opaque name in the server's folder."""
    return Path(server.path or "").absolute() / f"{tenant.database}.sqlite3"


def _check_identity(cursor: Any, tenant: Tenant) -> None:
    try:
        cursor.execute(f"SELECT tenant_id FROM {IDENTITY_TABLE}")
        found = cursor.fetchone()
    except sqlite3.Error as error:
        raise WrongDatabase(tenant.slug, "the file carries no identity stamp") from error
    if found is None or UUID(found[0]) != tenant.id:
        raise WrongDatabase(tenant.slug, "its identity stamp names another tenant")


class SQLiteWorkshop:
    """Makes files. There are no roles: whoever can read the folder can read every tenant in it, and there is nothing to fence."""

    def __init__(self, server: Server, settings: Settings) -> None:
        self._server = server
        self._folder = Path(server.path or "").absolute()
        self._settings = settings

    def find_database(self, name: str) -> FoundDatabase | None:
        return FoundDatabase(name) if self._path(name).exists() else None

    def find_roles(self, names: Sequence[str]) -> list[str]:
        return []

    def are_taken(self, database: str, roles: Sequence[str]) -> bool:
        return self._path(database).exists()

    def ours(self) -> tuple[set[str], set[str]]:
        return {path.stem for path in self._folder.glob("t_*.sqlite3") if _OPAQUE.fullmatch(path.stem)}, set()

    def hold(self, name: str) -> FoundDatabase | None:
        """Making a file under its name and removing it are single steps, so there is nothing to hold."""
        return self.find_database(name)

    def create_database(self, tenant: Tenant, template: Template | None) -> None:
        """The file gets its name when it is whole, and never that of another."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(tenant.database)
        if template is None:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            return
        self._sweep()
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=self._folder) as scratch:
            copy = Path(scratch) / path.name
            if not self._path(template.database).exists():
                raise TemplateMissing(template.database)
            shutil.copyfile(self._path(template.database), copy)  # closed and checkpointed, so the file is all there is
            copy.chmod(0o600)
            os.link(copy, path)

    def _sweep(self) -> None:
        """Remove what processes that were killed had begun to copy, long ago."""
        for left in self._folder.glob(f"{_SCRATCH}*"):
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _LONG_AGO:
                    shutil.rmtree(left, ignore_errors=True)

    def sizes(self) -> dict[str, int]:
        return {path.stem: path.stat().st_size for path in self._folder.glob("t_*.sqlite3")}

    def create_roles(self, tenant: Tenant, owner_password: SecretStr, runtime_password: SecretStr) -> None:
        raise ConfigError("SQLite has no roles")

    def open_database(self, tenant: Tenant) -> None:
        """Whoever may read the folder is in."""

    def fit(self, tenant: Tenant, template: Template | None = None) -> None:
        with closing(sqlite3.connect(_existing(self._path(tenant.database)), uri=True)) as connection, connection:
            connection.execute("PRAGMA journal_mode=WAL")
            self._furnish(connection)
            connection.execute(
                f"INSERT INTO {IDENTITY_TABLE} SELECT ?, datetime('now') WHERE NOT EXISTS (SELECT 1 FROM {IDENTITY_TABLE})",
                (str(tenant.id),),
            )

    def _furnish(self, connection: sqlite3.Connection) -> None:
        connection.execute(f"CREATE TABLE IF NOT EXISTS {IDENTITY_TABLE} (tenant_id TEXT NOT NULL, stamped_at TEXT NOT NULL)")
        recordlog.make(connection)

    def verify(self, tenant: Tenant, *, cloned: bool = False) -> list[str]:
        from tenantdb.backends.sqlite_doctor import look_at_file

        return [weakness.text for weakness in look_at_file(self._path(tenant.database), tenant)]

    # -- golden databases --------------------------------------------------------------------------------------------------------------

    def create_template(self, template: Template) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._remove(template.database)  # what a dead worker left of this very template
        os.close(os.open(self._path(template.database), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    @contextmanager
    def template_engine(self, template: Template) -> Iterator[Engine]:
        with engine_on(self._path(template.database), self._settings) as engine:
            yield engine

    def close_template(self, template: Template) -> None:
        with closing(sqlite3.connect(_existing(self._path(template.database)), uri=True)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.execute("PRAGMA journal_mode=DELETE")

    def drop_template(self, template: Template) -> None:
        self._remove(template.database)

    # -- the end -----------------------------------------------------------------------------------------------------------------------

    def fence(self, tenant: Tenant, level: FenceLevel) -> None:
        """A file has no doors; the registry alone keeps a tenant from being served."""

    def set_passwords(self, tenant: Tenant, owner_password: SecretStr, runtime_password: SecretStr) -> None:
        raise ConfigError("SQLite has no passwords")

    def now(self) -> Any:
        return None

    def sessions(self, tenant: Tenant, *, before: Any) -> int:
        return 0

    def end_sessions(self, tenant: Tenant, *, roles: Sequence[str] | None = None, before: Any = None, idle_for: float | None = None) -> int:
        return 0

    def drop_database(self, tenant: Tenant) -> None:
        self._remove(tenant.database)

    def drop_roles(self, tenant: Tenant) -> None:
        """There are none."""

    # -- what somebody else made -------------------------------------------------------------------------------------------------------

    def survey(self, slug: str, database: str, owner_url: ConnectionURL | None) -> Survey:
        path = Path(database).absolute()
        if owner_url is not None:
            raise AdoptRefused(slug, ["a file has no owner's login; leave owner_url out"])
        if not path.is_file() or path.parent == self._folder:
            raise AdoptRefused(slug, [f"{path.name!r} is no file, or stands in the tenants' own folder"])
        try:
            with closing(_read_only(path)) as connection:
                tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
                if ours := sorted(tables & {IDENTITY_TABLE, "tenantdb_tenants"}):
                    raise AdoptRefused(slug, [f"it has a table {ours[0]}, so it is a tenant's or a registry"])
                if "alembic_version" not in tables:
                    return Survey(str(path), None)
                return Survey(str(path), [version for (version,) in connection.execute("SELECT version_num FROM alembic_version")])
        except sqlite3.Error as error:
            raise AdoptRefused(slug, [f"{path.name!r} cannot be read as a SQLite database"]) from error

    def hand_over(self, tenant: Tenant, owner_url: ConnectionURL | None) -> None:
        """Copied under the tenant's name; the original stays as it is."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(tenant.database)
        if not path.exists():
            _copy(Path(tenant.adopted_from or ""), path)

    def may_hand_back(self, tenant: Tenant, owner_url: ConnectionURL | None) -> None:
        target = _given_back(tenant)
        if target.exists():
            raise AdoptRefused(tenant.slug, [f"{str(target)!r} is there already"], "given back")

    def hand_back(self, tenant: Tenant, owner_url: ConnectionURL | None) -> None:
        path, target = self._path(tenant.database), _given_back(tenant)
        if not path.exists():
            return
        if not target.exists():
            _copy(path, target, without_ours=True)
        self._remove(tenant.database)

    def _path(self, name: str | None) -> Path:
        return self._folder / f"{name}.sqlite3"

    def _remove(self, name: str | None) -> None:
        """The file last: a write-ahead log without it is read by nobody, and the file without its log would look whole."""
        path = self._path(name)
        for each in (_kept_copy(path), path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm"), path):
            each.unlink(missing_ok=True)


def _kept_copy(path: Path) -> Path:
    """What a tenant's file was before its last migration."""
    return path.with_name(f"{path.name}.bak")


def _read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)


def _given_back(tenant: Tenant) -> Path:
    """Beside the file that was adopted, which is still there."""
    original = Path(tenant.adopted_from or "")
    return original.with_name(f"{original.stem}.given-back{original.suffix}")


def _copy(source: Path, target: Path, *, without_ours: bool = False) -> None:
    """With what the write-ahead log holds. The file gets its name when it is whole, and never that of another."""
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=target.parent) as scratch:
        copy = Path(scratch) / target.name
        os.close(os.open(copy, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with closing(_read_only(source)) as reading, closing(sqlite3.connect(copy)) as writing:
            reading.backup(writing)
            if without_ours:
                for name in (IDENTITY_TABLE, *recordlog.TABLES):
                    writing.execute(f"DROP TABLE IF EXISTS {name}")
                writing.commit()
            writing.execute("PRAGMA journal_mode=DELETE")
        os.link(copy, target)


_OPAQUE = re.compile(r"t_[0-9a-f]{16}", re.ASCII)
