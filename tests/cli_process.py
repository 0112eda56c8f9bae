"""The ``tenantdb`` and ``alembic`` commands as a shell runs them: real processes in a working folder, with an environment of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tenantdb

_SOURCE = str(Path(tenantdb.__file__).parents[1])

DB = """
from tenantdb import TenantDB

db = TenantDB.from_env(migrations="shop/migrations")
"""
MODELS = """
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Product(Base):
    __tablename__ = "products"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
"""
PRICE = "    price: Mapped[int | None]\n"  # a column more, as a developer adds it


@dataclass
class Shell:
    """A working folder and the variables that are exported there. Remembers everything that was printed."""

    folder: Path
    exports: dict[str, str] = field(default_factory=dict)
    printed: list[str] = field(default_factory=list)

    def python(self, source: str) -> subprocess.CompletedProcess[str]:
        return self._run(["-c", source], 0, "", {})

    def tenantdb(self, *words: str, exit_code: int = 0, stdin: str = "", **exports: str) -> subprocess.CompletedProcess[str]:
        return self._run(["-m", "tenantdb.cli", *words], exit_code, stdin, exports)

    def alembic(self, *words: str, exit_code: int = 0, **exports: str) -> subprocess.CompletedProcess[str]:
        return self._run(["-m", "alembic", *words], exit_code, "", exports)

    def json(self, *words: str, exit_code: int = 0) -> Any:
        """The one document that a command prints."""
        return json.loads(self.tenantdb("--json", *words, exit_code=exit_code).stdout)

    def environment(self, exports: Mapping[str, str] | None = None) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("TENANTDB_", "PG"))}
        return {**kept, "PYTHONPATH": _SOURCE, "PYTHONDONTWRITEBYTECODE": "1", **self.exports, **(exports or {})}

    def _run(self, words: list[str], exit_code: int, stdin: str, exports: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=self.folder,
            env=self.environment(exports),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        self.printed += [done.stdout, done.stderr]
        assert done.returncode == exit_code, f"{words[1:]} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done

    def assert_no_secret_printed(self, *more: str) -> None:
        """Nothing that was printed here holds a password or a key of the environment, nor ``more``."""
        passwords = [found[1] for value in self.exports.values() if (found := re.search(r"://[^:@/]+:([^:@/]+)@", value))]
        keys = self.exports.get("TENANTDB_SECRET_KEYS", "").split(",")
        printed = "".join(self.printed)
        assert not [secret for secret in (*passwords, *keys, *more) if secret and secret in printed]

    def popen(self, *words: str) -> subprocess.Popen[str]:
        """A command that goes on running; whoever starts it ends it."""
        return subprocess.Popen(
            [sys.executable, "-m", "tenantdb.cli", *words],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def write_shop(folder: Path) -> None:
    """A small application: ``shop.db:db`` and ``shop.models:Base``. Its script location is made by ``tenantdb migrations init``."""
    package = folder / "shop"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "db.py").write_text(DB)
    (package / "models.py").write_text(MODELS)
