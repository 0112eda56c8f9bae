"""What the source of migrations tells before any of it runs: whether every database can have an ``op`` of its own, and what is not SQL.

Alembic's ``op`` and ``context`` are modules with one process-wide state. A revision file's names for them can be given another meaning;
those of a helper module, or of an import inside a function, cannot.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from alembic import context, op

_PROXIES = ("op", "context")
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_WITHOUT_MIGRATIONS = frozenset({"alembic", "sqlalchemy", "tenantdb", *sys.stdlib_module_names})


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one revision file. ``names``: every name and attribute in it. ``problem``: why its ``op`` cannot be rebound.

    ``reads_clock``: Python's, not the database's.
    """

    names: frozenset[str]
    reads_clock: bool
    imports: frozenset[str]
    problem: str | None


def facts(source: bytes) -> Facts:
    """Raises: `SyntaxError`."""
    tree = ast.parse(source)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    problem = None
    if any(_binds_proxy(node) for scope in ast.walk(tree) if isinstance(scope, _SCOPES) for node in ast.walk(scope)):
        problem = "imports alembic's op or context inside a function; import it at the top"
    elif _goes_through_package(tree):
        problem = "says alembic.op or alembic.context; write `from alembic import op`"
    return Facts(
        names=frozenset(names | {node.attr for node in attributes}),
        reads_clock=any(node.attr in ("today", "utcnow") or (node.attr == "now" and not _is_func(node.value)) for node in attributes),
        imports=frozenset(_imports(tree)),
        problem=problem,
    )


def beyond_run_env(source: bytes) -> str | None:
    """What an ``env.py`` does besides one plain call of `run_env`, and so would do for every database; None where that is all.

    Raises: `SyntaxError`.
    """
    tree = ast.parse(source)
    calls = 0
    for statement in tree.body:
        match statement:
            case ast.Expr(value=ast.Call(func=ast.Name(id="run_env") | ast.Attribute(attr="run_env"))):
                calls += 1
            case ast.Expr(value=ast.Constant()) | ast.Import() | ast.ImportFrom() | ast.Assign() | ast.AnnAssign():
                pass
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                pass
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                pass
            case _:
                return f"does more than to call run_env (line {statement.lineno})"
    if calls != 1:
        return "does not call run_env once, at its top level"
    proxies = {bound for node in ast.walk(tree) for bound in _bound_to_proxies(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in proxies and node.attr != "config":
            return f"does more than to call run_env: it uses alembic's {node.value.id}.{node.attr} (line {node.lineno})"
    return "does more than to call run_env: it uses alembic itself" if _goes_through_package(tree) else None


def helpers_problem(imported: Iterable[str]) -> str | None:
    """A module outside the revision files that uses the process-wide ``op``: among those loaded, or that revisions import later."""
    loaded: dict[str, Any] = {name: module for name, module in list(sys.modules.items()) if hasattr(module, "__dict__")}
    for name in [*loaded, *sorted(set(imported) - loaded.keys())]:
        if name.partition(".")[0] in _WITHOUT_MIGRATIONS:
            continue
        module = loaded.get(name)
        if _uses_proxy(_file_of(name)) if module is None else _holds_proxy(module) or _uses_proxy(vars(module).get("__file__")):
            return f"the module {name} uses alembic's op or context, which all threads share"
    return None


def is_proxy_function(value: Any) -> bool:
    """Such as ``execute`` in ``from alembic.op import execute``."""
    return isinstance(value, FunctionType) and (value.__globals__ is vars(op) or value.__globals__ is vars(context))


def _holds_proxy(module: ModuleType) -> bool:
    return any(value is op or value is context or is_proxy_function(value) for value in list(vars(module).values()))


def _uses_proxy(file: str | None) -> bool:
    if file is None or not file.endswith(".py"):
        return False
    try:
        source = Path(file).read_bytes()
        if b"alembic" not in source:
            return False
        tree = ast.parse(source)
    except (OSError, SyntaxError):  # in an archive, say; or no Python of this version, and who imports it will hear of it
        return False
    return _goes_through_package(tree) or any(_binds_proxy(node) for node in ast.walk(tree))


def _file_of(module: str) -> str | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):  # a name in a module, or none at all: the revision itself will say so
        return None
    return spec.origin if spec is not None else None


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _binds_proxy(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name in ("alembic.op", "alembic.context") for alias in node.names)
    if isinstance(node, ast.ImportFrom) and not node.level:
        whole = node.module == "alembic" and any(alias.name in (*_PROXIES, "*") for alias in node.names)
        return whole or node.module in ("alembic.op", "alembic.context")
    return False


def _bound_to_proxies(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom) and node.module == "alembic" and not node.level:
        yield from (alias.asname or alias.name for alias in node.names if alias.name in _PROXIES)
    elif isinstance(node, ast.Import):
        yield from (alias.asname for alias in node.names if alias.asname and alias.name in ("alembic.op", "alembic.context"))


def _goes_through_package(tree: ast.AST) -> bool:
    packages = {
        alias.asname or "alembic"
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "alembic" or (alias.name.startswith("alembic.") and not alias.asname)
    }
    return any(
        isinstance(node, ast.Attribute) and node.attr in _PROXIES and isinstance(node.value, ast.Name) and node.value.id in packages
        for node in ast.walk(tree)
    )


def _is_func(node: ast.expr) -> bool:
    return (isinstance(node, ast.Name) and node.id == "func") or (isinstance(node, ast.Attribute) and node.attr == "func")
