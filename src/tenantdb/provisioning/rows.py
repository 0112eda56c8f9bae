"""A tenant's rows as files that need no database to be read: JSON Lines, one file for each table, and what the tables are.

For whoever the data belongs to (GDPR, articles 15 and 20), and for every program that is not PostgreSQL. JSON Lines lose nothing; the
``kind`` of a column in ``schema.json`` says how its values stand there. CSV is for people with a spreadsheet, which executes what begins
like a formula, so that is made harmless.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from uuid import UUID

from tenantdb.errors import ConfigError
from tenantdb.model import Tenant
from tenantdb.registry.tables import utcnow

if TYPE_CHECKING:
    from tenantdb.backends import Rows, TableShape

FORMAT, VERSION = "tenantdb-rows", 1
FORMATS = ("jsonl", "csv")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?", re.ASCII)
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedRows:
    """What `TenantDB.export_rows` wrote: the number of rows of each table. ``sha256`` is that of the manifest, which has those of all
    files."""

    path: str
    sha256: str
    tenant: UUID
    made_at: datetime
    tables: Mapping[str, int]


@contextmanager
def new_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder under another name, for nobody else to read, that gets its own when the block ends well, and is gone otherwise.

    ``overwrite`` replaces only what an earlier export wrote. Raises: `FileExistsError`, `OSError`.
    """
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or (overwrite and _is_ours(path)))):
        raise FileExistsError(path.name)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(0o700)
        yield partial
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_ours(path: Path) -> bool:
    try:
        told = json.loads((path / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and told.get("format") == FORMAT


class Writer:
    """Writes the tables that a reader reads into a folder."""

    def __init__(self, folder: Path, reader: Rows, *, format: str, progress: Callable[[int, int], object]) -> None:
        if format not in FORMATS:
            raise ConfigError(f"rows are exported as {' or '.join(FORMATS)}, not as {format!r}")
        self._folder = folder
        self._reader = reader
        self._format = format
        self._progress = progress
        self._files: dict[str, dict[str, Any]] = {}

    def write(self, target: Path, tenant: Tenant, tenantdb_version: str, *, wanted: Iterable[str] | None) -> ExportedRows:
        """All tables, or the ``wanted`` ones, and the manifest. Raises: `ConfigError` for a table that is not there; `OSError`."""
        tables = self._chosen(wanted)
        counts = {}
        for number, table in enumerate(tables, 1):
            counts[_name(table)] = self._table(table)
            self._progress(number, len(tables))
        schema = {"tables": {_name(table): _described(table) for table in tables}}
        self._put("schema.json", [json.dumps(schema, indent=2).encode() + b"\n"])
        made_at = utcnow()
        told = {
            "format": FORMAT,
            "version": VERSION,
            "tenant": str(tenant.id),
            "made_at": made_at.isoformat(),
            "tenantdb_version": tenantdb_version,
            "revision": tenant.revision,
            "rows": counts,
            "members": self._files,
        }
        manifest = json.dumps(told, indent=2).encode() + b"\n"
        self._put("manifest.json", [manifest])
        sha256 = hashlib.sha256(manifest).hexdigest()
        return ExportedRows(path=str(target), sha256=sha256, tenant=tenant.id, made_at=made_at, tables=counts)

    def _chosen(self, wanted: Iterable[str] | None) -> list[TableShape]:
        tables = self._reader.tables()
        if wanted is None:
            return tables
        names = list(wanted)
        if unknown := sorted(set(names) - {_name(table) for table in tables}):
            raise ConfigError(f"there is no table {', '.join(unknown)}")
        return [table for table in tables if _name(table) in names]

    def _table(self, table: TableShape) -> int:
        count = 0

        def counted() -> Iterator[Sequence[Any]]:
            nonlocal count
            for row in self._reader.read(table):
                count += 1
                yield row

        lines = _json_lines if self._format == "jsonl" else _csv_lines
        self._put(f"{_file_name(table)}.{self._format}", lines([column.name for column in table.columns], counted()))
        return count

    def _put(self, name: str, chunks: Iterable[bytes]) -> None:
        digest, size = hashlib.sha256(), 0
        with open(os.open(self._folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
        self._files[name] = {"size": size, "sha256": digest.hexdigest()}


def _name(table: TableShape) -> str:
    return table.name if table.schema in (None, "public") else f"{table.schema}.{table.name}"


def _file_name(table: TableShape) -> str:
    """A name that every file system has, and no two tables share: the dot between schema and table is the only one."""
    parts = (table.name,) if table.schema in (None, "public") else (table.schema or "", table.name)
    return ".".join(quote(part, safe="").replace(".", "%2E") for part in parts)


def _described(table: TableShape) -> dict[str, Any]:
    return {
        "file": _file_name(table),
        "columns": [{"name": each.name, "type": each.type, "kind": each.kind, "nullable": each.nullable} for each in table.columns],
        "primary_key": list(table.primary_key),
        "unique": [list(key) for key in table.unique],
        "foreign_keys": [{"columns": list(own), "table": other, "refers_to": list(names)} for own, other, names in table.foreign_keys],
    }


def _json_lines(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[bytes]:
    for row in rows:
        yield json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _csv_lines(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[bytes]:
    yield _csv_line(names)
    for row in rows:
        yield _csv_line([_cell(value) for value in row])


def _csv_line(cells: Sequence[Any]) -> bytes:
    line = io.StringIO()
    csv.writer(line).writerow([_harmless(str(cell)) for cell in cells])
    return line.getvalue().encode()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _harmless(text: str) -> str:
    """What a spreadsheet would take for a formula begins with an apostrophe (OWASP, CSV injection)."""
    return f"'{text}" if text.startswith(_FORMULA) and not _NUMBER.fullmatch(text) else text
