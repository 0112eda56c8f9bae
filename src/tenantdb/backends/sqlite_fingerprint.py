"""The schema of a SQLite file, line by line, so that two files can be compared.

SQLite keeps the text of each CREATE statement, and edits it when a table is altered. It is taken apart at its commas, for so each column
and constraint has a line of its own, with all that no PRAGMA tells: checks, collations, deferred keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from sqlalchemy.engine import Connection

from tenantdb.backends.base import SchemaLine

_OBJECTS = "SELECT type, name, tbl_name, sql FROM sqlite_master WHERE sql IS NOT NULL"
_OURS = ("tenantdb_", "sqlite_")
_VERSION_TABLE = "alembic_version"
_TOKEN = re.compile(
    r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | `(?:[^`]|``)*` | \[[^\]]*\] | --[^\n]*(?:\n|$) | /\*.*?(?:\*/|$) | \w+ | [^\w\s]""",
    re.VERBOSE | re.DOTALL,
)
_PLAIN = re.compile(r"[a-z_]\w*", re.ASCII)
_CONSTRAINTS = frozenset({"constraint", "primary", "unique", "check", "foreign"})


def schema_lines(connection: Connection) -> list[SchemaLine]:
    """See `tenantdb.backends.protocols.Backend`."""
    found: list[SchemaLine] = []
    for kind, name, table, sql in connection.exec_driver_sql(_OBJECTS):
        if table == _VERSION_TABLE or table.startswith(_OURS) or name.startswith(_OURS):
            continue
        words = _words(sql)
        if kind == "table" and words[1] == "table":
            found += _table(name, words)
        else:
            found.append(SchemaLine(kind, name, " ".join(words), "" if kind in ("table", "view") else table))
    return sorted(found)


def _table(name: str, words: Sequence[str]) -> Iterator[SchemaLine]:
    """``CREATE TABLE name (item, ...) options``."""
    items, options = _items(words[words.index("(") + 1 :])
    yield SchemaLine("table", name, " ".join(["table", *options]))
    for item in items:
        if item[0] not in _CONSTRAINTS:
            yield SchemaLine("column", f"{name}.{item[0]}", " ".join(item[1:]), name)
        elif item[0] == "constraint":
            yield SchemaLine("constraint", f"{name}.{item[1]}", " ".join(item[2:]), name)
        else:  # without a name it is what it says
            yield SchemaLine("constraint", f"{name}.{' '.join(item)}", " ".join(item), name)


def _items(words: Sequence[str]) -> tuple[list[list[str]], Sequence[str]]:
    """What stands between the commas, up to the parenthesis that closes; and what follows it."""
    items: list[list[str]] = [[]]
    depth = 0
    for position, word in enumerate(words):
        if word == ")" and not depth:
            return items, words[position + 1 :]
        depth += (word == "(") - (word == ")")
        if word == "," and not depth:
            items.append([])
        else:
            items[-1].append(word)
    raise ValueError("a CREATE TABLE statement without its end")


def _words(sql: str) -> list[str]:
    """A statement's words, without comments: keywords and names in lower case, and names without quotes that need none."""
    found = []
    for token in _TOKEN.findall(sql):
        if token.startswith(("--", "/*")):
            continue
        if token[0] in '"`[' and _PLAIN.fullmatch(token[1:-1]) and token[1:-1] not in _CONSTRAINTS:
            found.append(token[1:-1])
        else:
            found.append(token if token[0] in "'\"`[" else token.lower())
    return found
