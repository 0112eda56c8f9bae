"""How fleets are migrated without tenantdb: Alembic in a loop, a process for each tenant, and SQL by hand as fast as it goes.

All of them log in as the tenants' owner roles, to the same databases. Alembic runs one upgrade at a time, because that is all it can do in
a process. What is by hand is one message for each tenant over psycopg's own asyncio, with the guard that a careful author would write: a
lock, whose database this is, and the revision that it must be at.
"""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import psycopg
from alembic import command
from alembic.config import Config
from sqlalchemy import URL

from benchmarks.peers.alembic_by_hand import ENV

_GUARDED = """\
BEGIN;
SET LOCAL lock_timeout = '100ms';
SET LOCAL statement_timeout = '10min';
DO $guard$ BEGIN
    LOCK TABLE alembic_version IN SHARE UPDATE EXCLUSIVE MODE NOWAIT;
    IF (SELECT tenant_id FROM tenantdb.identity) IS DISTINCT FROM '{tenant_id}'::uuid THEN
        RAISE EXCEPTION 'the database of another tenant' USING ERRCODE = 'HND01';
    END IF;
    IF (SELECT array_agg(version_num::text) FROM alembic_version) IS DISTINCT FROM ARRAY['{old}'] THEN
        RAISE EXCEPTION 'not at revision {old}' USING ERRCODE = 'HND02';
    END IF;
END $guard$;
{statements};
UPDATE alembic_version SET version_num = '{new}' WHERE alembic_version.version_num = '{old}';
COMMIT
"""


@dataclass(frozen=True)
class Target:
    """A tenant's database, and its owner's login."""

    tenant_id: UUID
    slug: str
    url: URL

    @property
    def conninfo(self) -> str:
        url = self.url.set(drivername="postgresql")
        return url.render_as_string(hide_password=False)


class AlembicLoop:
    """Alembic's commands for one tenant after the other, with an ``env.py`` that reads the URL; ``script`` becomes its folder."""

    def __init__(self, script: Path, versions: Path) -> None:
        script.mkdir()
        (script / "env.py").write_text(ENV)
        self._script = script
        self._versions = versions

    def upgrade(self, targets: Iterable[Target]) -> None:
        for target in targets:
            command.upgrade(self._config(target, io.StringIO()), "head")

    def current(self, targets: Iterable[Target]) -> list[str]:
        """What each of them says it is at."""
        found = []
        for target in targets:
            said = io.StringIO()
            command.current(self._config(target, said))
            found.append(said.getvalue().split()[0])
        return found

    def by_subprocess(self, targets: Iterable[Target]) -> None:
        """``alembic upgrade head`` in a process of its own."""
        ini = self._script / "alembic.ini"
        for target in targets:
            options = "\n".join(f"{name} = {value}" for name, value in self._options(target).items())
            ini.write_text(f"[alembic]\n{options}\n")
            subprocess.run([sys.executable, "-m", "alembic", "-c", str(ini), "upgrade", "head"], check=True, capture_output=True)

    def _config(self, target: Target, stdout: io.StringIO) -> Config:
        config = Config(stdout=stdout)
        for name, value in self._options(target).items():
            config.set_main_option(name, value)
        return config

    def _options(self, target: Target) -> dict[str, str]:
        return {
            "script_location": str(self._script),
            "version_locations": str(self._versions),
            "path_separator": "os",
            "sqlalchemy.url": target.url.render_as_string(hide_password=False).replace("%", "%%"),
        }


async def migrate(targets: Sequence[Target], statements: Sequence[str], *, old: str, new: str, concurrency: int) -> None:
    """The statements, the guard and the new revision in one message and one transaction for each tenant."""

    async def one(target: Target) -> None:
        text = _GUARDED.format(tenant_id=target.tenant_id, old=old, new=new, statements=";\n".join(statements))
        async with await psycopg.AsyncConnection.connect(target.conninfo, autocommit=True) as connection:
            await connection.execute(text.encode())  # without parameters it goes by the simple protocol, which takes several statements

    await each(targets, one, concurrency=concurrency)


async def revisions(targets: Sequence[Target], *, concurrency: int) -> list[str]:
    """What each of them says it is at, by one SELECT."""
    found = []

    async def one(target: Target) -> None:
        async with await psycopg.AsyncConnection.connect(target.conninfo, autocommit=True) as connection:
            row = await (await connection.execute("SELECT version_num FROM alembic_version")).fetchone()
            assert row is not None
            found.append(str(row[0]))

    await each(targets, one, concurrency=concurrency)
    return found


async def each(targets: Iterable[Target], work: Callable[[Target], Awaitable[None]], *, concurrency: int) -> None:
    """``work`` for every target, so many at once."""
    left = iter(targets)

    async def worker() -> None:
        for target in left:
            await work(target)

    await asyncio.gather(*(worker() for _ in range(concurrency)))
