"""A file imports only from its left in the line of the architecture, and a new file must be given its place in it.

Every import counts: at the top, inside a function, under TYPE_CHECKING. A name that is only needed for a type couples two files as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "tenantdb"

# From left to right. Within one place the order is free, as long as there is no circle.
LINE: tuple[tuple[str, ...], ...] = (
    ("model",),
    ("errors", "events", "forking"),
    ("settings", "context", "requests", "jwks", "tokens", "resolvers"),
    ("backends",),
    ("registry",),
    ("connections",),
    ("migrations",),
    ("provisioning",),
    ("fleet",),
    ("database", "aio"),
    ("auth",),
    ("asgi", "wsgi", "fastapi", "flask", "celery", "cli", "testing"),
)
PLACE = {component: place for place, components in enumerate(LINE) for component in components}
ROOT = "__init__"  # the public names: imports from anywhere, and nothing inside imports it


def component(path: Path) -> str:
    """The part of the house a file belongs to; the path is relative to the package."""
    return path.parts[0].removesuffix(".py")


def imported_modules(source: str, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything imported; ``from a import b`` gives ``a.b``, be it a module or a name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".") if is_package else module.split(".")[:-1]
            base = above[: len(above) - node.level + 1] if node.level else []
            yield from ((node.lineno, ".".join([*base, *filter(None, [node.module]), alias.name])) for alias in node.names)


def edges(package: Path) -> Iterator[tuple[str, str, str]]:
    """(importing component, imported component, where) for each import of the package by itself, other than within one component."""
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package)
        is_package = path.name == "__init__.py"
        dotted = ".".join(("tenantdb", *(path.parent if is_package else path.with_suffix("")).parts))
        for line, name in imported_modules(file.read_text(encoding="utf-8"), dotted, is_package=is_package):
            top, *rest = name.split(".")
            if top == "tenantdb":
                here = component(path)
                there = rest[0] if rest and (rest[0] in PLACE or _is_module(package, rest[0])) else ROOT
                if here != there:
                    yield here, there, f"{path.as_posix()}:{line}"


def _is_module(package: Path, name: str) -> bool:
    return (package / f"{name}.py").exists() or (package / name).is_dir()


def violations(package: Path) -> list[str]:
    found = []
    beside: dict[str, set[str]] = {}
    homeless = {component(file.relative_to(package)) for file in package.rglob("*.py")} - {ROOT, *PLACE}
    found += [f"{name}: has no place in the line" for name in sorted(homeless)]
    for here, there, where in edges(package):
        if here == ROOT or here in homeless or there in homeless:
            continue
        if there == ROOT:
            found.append(f"{where}: {here} imports the package itself")
        elif PLACE[there] > PLACE[here]:
            found.append(f"{where}: {here} imports {there}, which stands to its right")
        elif PLACE[there] == PLACE[here]:
            beside.setdefault(here, set()).add(there)
    try:
        TopologicalSorter(beside).prepare()
    except CycleError as error:
        found.append("a circle: " + " <- ".join(error.args[1]))
    return found


def package_of(folder: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        file = folder / "tenantdb" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    return folder / "tenantdb"


def test_every_file_imports_only_from_its_left() -> None:
    assert violations(PACKAGE) == []


def test_the_walk_sees_the_real_imports() -> None:
    assert ("database", "registry") in {(here, there) for here, there, _ in edges(PACKAGE)}


def test_imports_to_the_left_and_beside_are_allowed(tmp_path: Path) -> None:
    package = package_of(
        tmp_path,
        {
            "__init__.py": "from tenantdb.database import TenantDB\n",
            "model.py": "import uuid\n",
            "database.py": "from .model import Tenant\nfrom tenantdb import errors\n",
            "errors.py": "",
            "registry/__init__.py": "from .records import x\n",
            "registry/records.py": "from ..model import Tenant\nfrom . import other\n",
            "registry/other.py": "",
            "cli/main.py": "import tenantdb.testing.postgres\n",
            "testing/postgres.py": "",
        },
    )

    assert violations(package) == []


def test_an_import_to_the_right_is_reported_wherever_it_hides(tmp_path: Path) -> None:
    package = package_of(
        tmp_path,
        {
            "model.py": "from tenantdb import errors\n",
            "errors.py": "import tenantdb.cli\n",
            "context.py": "def late():\n    from tenantdb.database import TenantDB\n",
            "registry/records.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..connections.engines import Engines\n",
            "connections/engines.py": "from .. import aio\n",
            "database.py": "",
            "aio.py": "",
            "cli/__init__.py": "",
        },
    )

    assert violations(package) == [
        "connections/engines.py:1: connections imports aio, which stands to its right",
        "context.py:2: context imports database, which stands to its right",
        "errors.py:1: errors imports cli, which stands to its right",
        "model.py:1: model imports errors, which stands to its right",
        "registry/records.py:3: registry imports connections, which stands to its right",
    ]


def test_a_circle_within_one_place_is_reported(tmp_path: Path) -> None:
    package = package_of(tmp_path, {"database.py": "from . import aio\n", "aio.py": "from . import database\n"})

    assert len(found := violations(package)) == 1
    assert found[0].startswith("a circle: ")


def test_importing_the_package_itself_and_a_file_without_a_place_are_reported(tmp_path: Path) -> None:
    package = package_of(
        tmp_path, {"__init__.py": "", "cli/main.py": "from tenantdb import TenantDB\n", "helpers.py": "", "utils/__init__.py": ""}
    )

    assert violations(package) == [
        "helpers: has no place in the line",
        "utils: has no place in the line",
        "cli/main.py:1: cli imports the package itself",
    ]
