"""The registry's transactions, and the one place where a database driver's errors become ours.

An outage must never look like an absence: whatever keeps the registry from answering is `RegistryUnavailable`, a registry without tables is
`RegistryNotInitialized`, and only an answer that holds no row is "not found". Violated constraints are left to the stores, which know
what they mean.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, InternalError, OperationalError, SQLAlchemyError, TimeoutError

from tenantdb.errors import RegistryError, RegistryNotInitialized, RegistryUnavailable, TenantDBError, describe
from tenantdb.forking import follow
from tenantdb.registry.entries import Entries
from tenantdb.registry.flights import SingleFlight
from tenantdb.registry.secrets import Keyring

UNDEFINED_TABLE = "42P01"
INSUFFICIENT_PRIVILEGE = "42501"


class Transactions:
    """Opens transactions on the registry: on the serving login, or on the one that owns the tables (they may be the same engine).

    ``check`` looks once, before the first transaction, whether this code can work with what is there; when it failed it is asked again by
    the next. What a writing transaction has to tell the audit log is written as its last act, with the keys of ``keyring``; where that
    fails, nothing of the transaction happened. Safe to share between threads.
    """

    def __init__(self, engine: Engine, admin_engine: Engine, check: Callable[[Connection], None], keyring: Keyring) -> None:
        self.engine = engine
        self.admin_engine = admin_engine
        self._check = check
        self._keyring = keyring
        self._checked = False
        self._flights: SingleFlight[str, None] = SingleFlight()
        follow(self)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads. Raises: `RegistryUnavailable`, `RegistryNotInitialized`, `RegistryOutOfRange`."""
        self._check_once()
        with self._begin(self.engine) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction of the serving login, committed at the end of the block."""
        self._check_once()
        with self._begin(self.engine, immediate=True) as connection:
            yield connection

    @contextmanager
    def admin_read(self) -> Iterator[Connection]:
        """A reading transaction of the login that owns the tables, the only one that sees owner secrets."""
        self._check_once()
        with self._begin(self.admin_engine) as connection:
            yield connection

    @contextmanager
    def admin_write(self) -> Iterator[Connection]:
        """A transaction of the login that owns the tables, committed at the end of the block."""
        self._check_once()
        with self._begin(self.admin_engine, immediate=True) as connection:
            yield connection

    def close(self) -> None:
        """Close both engines' idle connections. May be called twice."""
        self.engine.dispose()
        self.admin_engine.dispose()

    def start_empty(self) -> object:
        """In the child after a fork: the connections are the parent's."""
        inherited = [self.engine.pool, self.admin_engine.pool]
        self.engine.dispose(close=False)
        self.admin_engine.dispose(close=False)
        return inherited

    def _check_once(self) -> None:
        if not self._checked:
            self._flights.run("check", self._look)

    def _look(self) -> None:
        with self._begin(self.engine) as connection:
            self._check(connection)
        self._checked = True

    @contextmanager
    def _begin(self, engine: Engine, *, immediate: bool = False) -> Iterator[Connection]:
        with mapped_errors(), begin(engine, immediate=immediate) as connection:
            if not immediate:
                yield connection
                return
            entries = Entries.begin(connection, self._keyring)
            yield connection
            entries.write()


@contextmanager
def begin(engine: Engine, *, immediate: bool) -> Iterator[Connection]:
    """A transaction; on SQLite one that takes the write lock at once, because a reader cannot wait to become a writer."""
    if immediate and engine.dialect.name == "sqlite":
        engine = engine.execution_options(tenantdb_begin="IMMEDIATE")
    with engine.begin() as connection:
        yield connection


@contextmanager
def mapped_errors() -> Iterator[None]:
    """Turn a driver's errors into the registry's, ``from`` the original, and say neither URL nor row nor password."""
    try:
        yield
    except SQLAlchemyError as error:
        ours = _translate(error)
        if ours is None:
            raise
        raise ours from error


def _translate(error: SQLAlchemyError) -> TenantDBError | None:
    if isinstance(error, TimeoutError):
        return RegistryUnavailable("no connection to it came free in time")
    if not isinstance(error, DBAPIError) or isinstance(error, IntegrityError):
        return None
    sqlstate = getattr(error.orig, "sqlstate", None)
    if sqlstate == UNDEFINED_TABLE or (isinstance(error.orig, sqlite3.Error) and str(error.orig).startswith("no such table: tenantdb_")):
        return RegistryNotInitialized()
    if sqlstate == INSUFFICIENT_PRIVILEGE:
        return RegistryError("the registry's login may not do this; give registry_admin=..., or run `tenantdb init` if it should")
    if error.connection_invalidated or isinstance(error, (OperationalError, InterfaceError, InternalError)):
        return RegistryUnavailable(describe(error))
    if isinstance(error.orig, sqlite3.DatabaseError) and type(error.orig) is sqlite3.DatabaseError:
        return RegistryUnavailable("its file is damaged or no SQLite database")
    return None


def violates(error: IntegrityError, table: str, *columns: str) -> bool:
    """Whether a unique constraint on these columns refused a row. PostgreSQL tells its name, SQLite its columns."""
    diagnostics = getattr(error.orig, "diag", None)
    if diagnostics is not None:
        return bool(diagnostics.constraint_name == f"{table}_{'_'.join(columns)}_key")
    return str(error.orig) == "UNIQUE constraint failed: " + ", ".join(f"{table}.{column}" for column in columns)
