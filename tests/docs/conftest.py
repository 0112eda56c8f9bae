"""Folders to follow pages in, and the shop that the tutorial leaves behind."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.reader import Reader

ON_POSTGRESQL = "9. The same on PostgreSQL"


@pytest.fixture(scope="session")
def finished_shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, dict[str, str]]]:
    """The tutorial done on SQLite: its folder, an untouched copy, and what it exported.

    The folder is open to the system user that runs PostgreSQL when we are root; pytest's own folders are not.
    """
    with tempfile.TemporaryDirectory(prefix="tenantdb-docs-") as made:
        folder = Path(made).resolve() / "work"
        folder.mkdir()
        for path in (folder.parent, folder):
            path.chmod(0o755)
        with Reader(folder) as reader:
            reader.follow("tutorial.md", sections=lambda title: title != ON_POSTGRESQL)
        untouched = tmp_path_factory.mktemp("shop") / "untouched"
        shutil.copytree(folder, untouched)
        yield folder, untouched, {name: reader.environment[name] for name in ("TENANTDB_URL", "TOKEN_KEY", "UVICORN_PORT")}


@pytest.fixture
def shop(finished_shop: tuple[Path, Path, dict[str, str]]) -> Iterator[Reader]:
    """A reader in the shop as the tutorial left it. Always in one place, because the registry keeps where tenants' files are."""
    folder, untouched, exported = finished_shop
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(untouched, folder, dirs_exist_ok=True)
    with Reader(folder, exported) as reader:
        yield reader
