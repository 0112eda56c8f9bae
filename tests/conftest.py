"""What holds for every test: no setting of the person who runs them leaks in; and the installations that tests share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import world

MEMORY = Path("/dev/shm")
ROOM = 8 << 30  # bytes; a database of PostgreSQL takes 8 MB, and the tests make hundreds


def pytest_configure() -> None:
    """A TENANTDB_* variable of the developer's shell must not decide a test, nor what a fixture of the whole session opens.

    Temporary files go to memory where there is room: a disk with ext4 makes a database up to 15 times slower after many were dropped.
    """
    for name in [name for name in os.environ if name.startswith("TENANTDB_") or name == "WEB_CONCURRENCY"]:
        del os.environ[name]
    if "TMPDIR" not in os.environ and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM:
        os.environ["TMPDIR"] = str(MEMORY)
        tempfile.tempdir = None  # look again


@pytest.fixture(autouse=True)
def _applications_of_the_test() -> Iterator[None]:
    """Set up after what is made for more than a test, and before what is made for one."""
    with world.closed_with_the_test():
        yield


@pytest.fixture(scope="session")
def postgresql_world() -> Iterator[world.PostgreSQLWorld]:
    """One PostgreSQL from the wheel for all tests that need no server of their own. Each application in it has its own registry, and keeps
    its connections to that until its test ends."""
    with world.pg_world(max_connections="300") as made:
        yield made


@pytest.fixture(scope="session")
def sqlite_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[world.SQLiteWorld]:
    """The same on SQLite."""
    with world.sqlite_world(tmp_path_factory.mktemp("sqlite")) as made:
        yield made
