"""The rows of a tenant's tables as JSON can hold them: PostgreSQL writes each value as text, in fixed styles, and here it is only dressed.

What a type writes of itself it can read again, so nothing is lost, whichever types the application uses. Numbers that every reader of JSON
keeps become numbers; decimals, and what has no counterpart, stay text.
"""

from __future__ import annotations

import base64
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from psycopg import sql
from sqlalchemy.engine import Connection

from tenantdb.backends.base import ColumnShape, TableShape

_AT_ONCE = 100  # rows in memory
_SAFE = 2**53  # above, a number of JSON is not what was written to every reader
_SNAPSHOT = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"
_STYLES = {"DateStyle": "ISO, YMD", "TimeZone": "UTC", "IntervalStyle": "iso_8601", "extra_float_digits": "1", "bytea_output": "hex"}
_COLUMNS = """
SELECT n.nspname::text, c.relname::text, c.relkind::text, a.attname::text, format_type(a.atttypid, a.atttypmod), b.typname::text,
       e.typname::text, NOT a.attnotnull
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
JOIN pg_type t ON t.oid = a.atttypid JOIN pg_type b ON b.oid = CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE t.oid END
LEFT JOIN pg_type e ON e.oid = b.typelem AND b.typcategory = 'A'
WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND NOT a.attisdropped AND n.nspname = ANY(%s) AND c.relname <> 'alembic_version'
ORDER BY n.nspname, c.relname, a.attnum
"""
_KEYS = """
SELECT n.nspname::text, c.relname::text, k.contype::text, f.oid::regclass::text, names.own, names.other
FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_class f ON f.oid = k.confrelid, LATERAL (
    SELECT array_agg(a.attname::text ORDER BY u.i) AS own, array_agg(o.attname::text ORDER BY u.i) AS other
    FROM unnest(k.conkey) WITH ORDINALITY AS u(number, i) JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.number
    LEFT JOIN pg_attribute o ON o.attrelid = k.confrelid AND o.attnum = k.confkey[u.i]) AS names
WHERE k.contype IN ('p', 'u', 'f') AND n.nspname = ANY(%s) ORDER BY k.conname
"""
_KINDS = {
    **dict.fromkeys(("int2", "int4", "int8", "oid"), "integer"),
    **dict.fromkeys(("float4", "float8"), "float"),
    **dict.fromkeys(("timestamp", "timestamptz"), "timestamp"),
    **dict.fromkeys(("time", "timetz"), "time"),
    **dict.fromkeys(("json", "jsonb"), "json"),
    "bool": "boolean",
    "numeric": "decimal",
    "bytea": "bytes",
    "date": "date",
    "interval": "interval",
}
_LIST = "list of "


class PostgreSQLRows:
    """See `tenantdb.backends.protocols.Rows`. Everything is of one moment."""

    def __init__(self, connection: Connection, schemas: Sequence[str]) -> None:
        self._connection = connection
        self._schemas = ["public", *schemas]
        self._plain: set[tuple[str | None, str]] = set()  # neither divided nor a part
        connection.exec_driver_sql(_SNAPSHOT)
        connection.exec_driver_sql(
            "SELECT " + ", ".join(["set_config(%s, %s, true)"] * len(_STYLES)), tuple(itertools.chain(*_STYLES.items()))
        )

    def tables(self) -> list[TableShape]:
        keys = self._connection.exec_driver_sql(_KEYS, (self._schemas,)).all()
        found = []
        rows = self._connection.exec_driver_sql(_COLUMNS, (self._schemas,)).all()
        for (schema, name, kind), columns in itertools.groupby(rows, lambda row: (row[0], row[1], row[2])):
            if kind == "r":
                self._plain.add((schema, name))
            its_keys = [tuple(key) for key in keys if (key[0], key[1]) == (schema, name)]
            found.append(_shape(schema, name, [tuple(column) for column in columns], its_keys))
        return found

    def read(self, table: TableShape) -> Iterator[Sequence[Any]]:
        columns = sql.SQL(", ").join(_as_text(column) for column in table.columns)
        # What inherits from a table is a table of its own here; what a table is divided into is not.
        only = sql.SQL("ONLY ") if (table.schema, table.name) in self._plain else sql.SQL("")
        query = sql.SQL("SELECT {} FROM {}{}").format(columns, only, sql.Identifier(table.schema or "public", table.name))
        dress = [_dress(column.kind) for column in table.columns]
        with self._connection.exec_driver_sql(
            query.as_string(None).replace("%", "%%"), execution_options={"stream_results": True, "yield_per": _AT_ONCE}
        ) as rows:
            for row in rows:
                yield [None if value is None else put_on(value) for value, put_on in zip(row, dress, strict=True)]


def _shape(schema: str, name: str, columns: Sequence[Sequence[Any]], keys: Sequence[Sequence[Any]]) -> TableShape:
    by_kind = {kind: [key for key in keys if key[2] == kind] for kind in "puf"}
    return TableShape(
        schema,
        name,
        [ColumnShape(row[3], row[4], _kind(row[5], row[6]), row[7]) for row in columns],
        by_kind["p"][0][4] if by_kind["p"] else (),
        [key[4] for key in by_kind["u"]],
        [(key[4], key[3], key[5]) for key in by_kind["f"]],
    )


def _kind(base: str, element: str | None) -> str:
    return _KINDS.get(base, "text") if element is None else _LIST + _KINDS.get(element, "text")


def _as_text(column: ColumnShape) -> sql.Composed:
    text = "pg_catalog.array_to_json({}::pg_catalog.text[])::pg_catalog.text" if column.kind.startswith(_LIST) else "{}::pg_catalog.text"
    return sql.SQL(text).format(sql.Identifier(column.name))


def _dress(kind: str) -> Callable[[str], Any]:
    if kind.startswith(_LIST):
        return functools.partial(_list, _dress(kind.removeprefix(_LIST)))
    return _DRESSES.get(kind, str)


def _list(dress: Callable[[str], Any], text: str) -> Any:
    def each(value: Any) -> Any:
        if isinstance(value, list):
            return [each(inner) for inner in value]
        return None if value is None else dress(value)

    return each(json.loads(text))


def _integer(text: str) -> int | str:
    value = int(text)
    return value if -_SAFE < value < _SAFE else text


def _float(text: str) -> float | str:
    return text if text.endswith(("N", "y")) else float(text)  # NaN, Infinity


def _timestamp(text: str) -> str:
    """ISO 8601. What it cannot write, such as ``infinity`` and years before Christ, stays as PostgreSQL writes it."""
    if text.endswith(("y", "C")):
        return text
    text = text.replace(" ", "T", 1)
    return f"{text}:00" if text.endswith("+00") else text


def _bytes(text: str) -> str:
    return base64.b64encode(bytes.fromhex(text.removeprefix("\\x"))).decode()


def _boolean(text: str) -> bool:
    return text in ("true", "t")


_DRESSES: dict[str, Callable[[str], Any]] = {
    "integer": _integer,
    "float": _float,
    "boolean": _boolean,
    "bytes": _bytes,
    "timestamp": _timestamp,
}
