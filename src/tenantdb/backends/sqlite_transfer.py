"""A tenant's file out and in, whole or row by row.

A copy is made by SQLite's own backup, so that it is of one moment and without a write-ahead log. A file that comes from elsewhere gets the
tenant's name only when it was looked at: what bears the names of tenantdb's own tables in it would pass for the identity stamp.
"""

from __future__ import annotations

import base64
import math
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy.engine import Connection

from tenantdb.backends.base import CarryFailed, ColumnShape, Location, Surroundings, TableShape
from tenantdb.backends.sqlite import database_path
from tenantdb.errors import ImportRefused

_OURS = "tenantdb_"
_AT_ONCE = 100
_SAFE = 2**53
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d")
# The first that fits, in the order of SQLite's own rules of affinity, after the words that SQLAlchemy adds.
_KINDS = (
    ("JSON", "json"),
    ("BOOL", "boolean"),
    ("DATETIME", "timestamp"),
    ("TIMESTAMP", "timestamp"),
    ("DATE", "date"),
    ("TIME", "time"),
    ("INT", "integer"),
    ("CHAR", "text"),
    ("CLOB", "text"),
    ("TEXT", "text"),
    ("BLOB", "bytes"),
    ("REAL", "float"),
    ("FLOA", "float"),
    ("DOUB", "float"),
    ("NUMERIC", "decimal"),
    ("DECIMAL", "decimal"),
    ("UUID", "text"),
)


class SQLiteCarrier:
    """See `tenantdb.backends.protocols.Carrier`."""

    member = "data.sqlite3"

    def __init__(self, location: Location) -> None:
        self._path = database_path(location.server, location.tenant)

    def look(self, connection: Connection) -> Surroundings:
        pages, size = (connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in ("page_count", "page_size"))
        return Surroundings(sqlite3.sqlite_version, pages * size)

    def dump(self, target: BinaryIO, scratch: Path, there: Surroundings) -> str:
        descriptor, name = tempfile.mkstemp(prefix=".tenantdb-", dir=scratch)  # mode 0600
        os.close(descriptor)
        try:
            with closing(sqlite3.connect(f"{self._path.as_uri()}?mode=rw", uri=True)) as source, closing(sqlite3.connect(name)) as copy:
                source.backup(copy)  # in one step: of one moment, and beside writers
                copy.execute("PRAGMA journal_mode=DELETE")
                for kind, ours in _ours(copy):
                    copy.execute(f"DROP {kind} IF EXISTS {_quoted(ours)}")
                copy.commit()
                copy.execute("VACUUM")  # what was dropped would still be readable in free pages
            with open(name, "rb") as made:
                shutil.copyfileobj(made, target, 1 << 20)
        except sqlite3.DatabaseError as error:
            raise _failure(error) from error
        finally:
            os.unlink(name)
        return f"SQLite {sqlite3.sqlite_version}"

    def load(self, source: Callable[[], BinaryIO], made_with: str, there: Surroundings) -> None:
        with tempfile.TemporaryDirectory(prefix=".tenantdb-", dir=self._path.parent) as scratch:
            copy = Path(scratch) / self._path.name
            with open(os.open(copy, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as target:
                shutil.copyfileobj(source(), target, 1 << 20)
            _look_at(copy)
            for beside in ("-wal", "-shm"):  # of the empty file that is there; nobody has it open
                self._path.with_name(self._path.name + beside).unlink(missing_ok=True)
            copy.replace(self._path)

    def settle(self, connection: Connection) -> None:
        """SQLite never draws a number that is there already."""


def _failure(error: sqlite3.DatabaseError) -> Exception:
    """A disk that is full, or a file that cannot be written, is the system's error to whoever writes the export."""
    name = getattr(error, "sqlite_errorname", "") or str(error)
    if "FULL" in name.upper():
        return OSError("the disk is full")
    return CarryFailed(f"SQLite refused it ({name})")


def _ours(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    """Triggers first: those of a table go with it."""
    query = "SELECT upper(type), name FROM sqlite_master WHERE lower(substr(name, 1, ?)) = ? AND type <> 'index' ORDER BY type DESC"
    return connection.execute(query, (len(_OURS), _OURS)).fetchall()


def _look_at(path: Path) -> None:
    """Raises: `ImportRefused` for a file that is damaged, or holds what only tenantdb may make."""
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True)) as connection:
            connection.execute("PRAGMA trusted_schema=OFF")
            whole = connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"
            ours = _ours(connection)
            connection.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.DatabaseError as error:
        raise ImportRefused("the database in it is no SQLite database, or damaged") from error
    if not whole:
        raise ImportRefused("the database in it is damaged")
    if ours:
        raise ImportRefused(f"the database in it has tables of tenantdb's own ({ours[0][1]})")


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


class SQLiteRows:
    """See `tenantdb.backends.protocols.Rows`. In SQLite a value has the type, and not the column; one that is not of its column's kind says
    so."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def tables(self) -> list[TableShape]:
        names = self._connection.exec_driver_sql(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND sql NOT LIKE 'CREATE VIRTUAL %' ORDER BY name"
        ).scalars()
        return [self._shape(name) for name in names.all() if not name.lower().startswith((_OURS, "sqlite_")) and name != "alembic_version"]

    def read(self, table: TableShape) -> Iterator[Sequence[Any]]:
        columns = ", ".join(_quoted(column.name) for column in table.columns)
        query = f"SELECT {columns} FROM {_quoted(table.name)}"
        with self._connection.exec_driver_sql(query, execution_options={"yield_per": _AT_ONCE}) as rows:
            for row in rows:
                yield [_dressed(value, column.kind) for value, column in zip(row, table.columns, strict=True)]

    def _shape(self, name: str) -> TableShape:
        quoted = _quoted(name)
        columns = [row for row in self._ask(f"PRAGMA table_xinfo({quoted})") if row[6] != 1]
        keys: dict[int, list[Any]] = {}
        for row in self._ask(f"PRAGMA foreign_key_list({quoted})"):
            keys.setdefault(row[0], []).append(row)
        unique = [row[1] for row in self._ask(f"PRAGMA index_list({quoted})") if row[3] == "u"]
        return TableShape(
            None,
            name,
            [ColumnShape(row[1], row[2], _kind(row[2]), not row[3]) for row in columns],
            [row[1] for row in sorted(columns, key=lambda row: int(row[5])) if row[5]],
            [[row[2] for row in self._ask(f"PRAGMA index_info({_quoted(index)})")] for index in unique],
            [([row[3] for row in key], key[0][2], [row[4] for row in key]) for key in keys.values()],
        )

    def _ask(self, query: str) -> Sequence[Any]:
        return self._connection.exec_driver_sql(query).all()


def _kind(declared: str) -> str:
    return next((kind for word, kind in _KINDS if word in declared.upper()), "bytes" if not declared else "decimal")


def _dressed(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if isinstance(value, bytes):
        text = base64.b64encode(value).decode()
        return text if kind == "bytes" else {"base64": text}
    if isinstance(value, str):
        if kind == "timestamp" and _MOMENT.match(value):
            return value.replace(" ", "T", 1)
        return {"text": value} if kind in ("integer", "float", "boolean", "bytes") else value
    if kind == "boolean" and value in (0, 1):
        return bool(value)
    if kind == "decimal":
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else ("-Infinity" if value < 0 else "Infinity")
    return value if -_SAFE < value < _SAFE else str(value)
