"""One database brought to one revision by the application's Alembic scripts.

Alembic's ``op`` and ``context`` are globals of the process: two upgrades at once run one tenant's DDL in another's database and report
success. So everything that runs Alembic's commands here, the registry's own history included, holds one lock of the process. What
migrates many at once is in `tenantdb.migrations.local`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.engine import Connection, Engine

from tenantdb.errors import MigrationError
from tenantdb.registry.schema import alembic_lock

CONNECTION = "connection"  # key in Config.attributes, as in Alembic's cookbook
OPTIONS = "tenantdb_options"  # likewise: a list, to which `run_env` adds what it was given, and migrates nothing


class Scripts:
    """An Alembic script location: ``package:folder`` or a path. Raises `MigrationError` where it is none or has several heads."""

    def __init__(self, location: str) -> None:
        self._location = location

    def __str__(self) -> str:
        return self._location

    @property
    def head(self) -> str | None:
        """The newest revision, None for a location without revisions."""
        with alembic_lock, as_migration_error():
            return ScriptDirectory.from_config(self.config()).get_current_head()

    def identity(self) -> tuple[str | None, str]:
        """The head, and a digest of all revision files: who edits one without a new number has other migrations all the same.

        Read anew only when a file has changed. Raises: as the constructor says.
        """
        place = self._place
        known = _identities.get(place)
        if known is not None and known[0] == _stamps(known[1]):
            return known[2]
        with alembic_lock, as_migration_error():
            scripts = ScriptDirectory.from_config(self.config())
            folders = tuple(dict.fromkeys(str(folder) for folder in (scripts.dir, *scripts._version_locations)))
            stamps = _stamps(folders)
            digest = hashlib.sha256()
            for path, *_ in stamps:
                digest.update(Path(path).name.encode() + b"\0" + Path(path).read_bytes() + b"\0")
            found = scripts.get_current_head(), digest.hexdigest()
        _identities[place] = stamps, folders, found
        return found

    def knows(self, revision: str) -> bool:
        """Whether a revision is one of these scripts'. Raises: as the constructor says."""
        return revision in self.revisions()

    def revisions(self) -> frozenset[str]:
        """The ids of all of them. Raises: as the constructor says."""
        with alembic_lock, as_migration_error():
            scripts = ScriptDirectory.from_config(self.config())
            return frozenset(script.revision for script in scripts.walk_revisions())

    def upgrade(self, engine: Engine, revision: str = "head") -> str | None:
        """Bring a database to a revision, through the application's ``env.py``, and return what it is at then.

        On PostgreSQL and SQLite a migration that raises leaves nothing of itself behind. May run again. Raises: `MigrationError` where the
        script location is unusable or its ``env.py`` migrated something else; what a migration raises passes through unchanged.
        """
        found = self._run(command.upgrade, engine, revision)
        if revision == "head" and found != self.head:
            raise MigrationError(
                f"the script location {self._location!r} left the database at {found!r} instead of {self.head!r}:"
                " its env.py must call tenantdb.migrations.run_env(db, target_metadata=...)"
            )
        return found

    def downgrade(self, engine: Engine, revision: str) -> str | None:
        """Bring a database back to an earlier revision, ``base`` for an empty one, and return what it is at then. Raises: as `upgrade`."""
        return self._run(command.downgrade, engine, revision)

    def stamp(self, engine: Engine, revision: str) -> str | None:
        """Write down in a database that it is at a revision, without migrating it, and return what it says then. Raises: as `upgrade`."""
        return self._run(command.stamp, engine, revision)

    def _run(self, what: Callable[[Config, str], None], engine: Engine, revision: str) -> str | None:
        """One of Alembic's commands on a database; returns the revision that it is at then."""
        config = self.config()
        with alembic_lock, engine.connect() as connection:
            config.attributes[CONNECTION] = connection
            with as_migration_error():
                what(config, revision)
            connection.rollback()
            return current_revision(connection)

    def config(self) -> Config:
        """A new Alembic configuration of this location."""
        config = Config()
        config.set_main_option("script_location", self._place.replace("%", "%%"))
        return config

    @property
    def _place(self) -> str:
        return self._location if ":" in self._location else str(Path(self._location).absolute())


_Stamps = list[tuple[str, int, int]]
_identities: dict[str, tuple[_Stamps, tuple[str, ...], tuple[str | None, str]]] = {}
"""By location, as long as its files stay as they are. An application has one location, a run of tests a few."""


def _stamps(folders: tuple[str, ...]) -> _Stamps:
    """Path, size and time of every file of Python in these folders."""
    found = []
    for folder in folders:
        try:
            with os.scandir(folder) as entries:
                files = [(entry.path, entry.stat()) for entry in entries if entry.name.endswith(".py")]
        except FileNotFoundError:
            continue
        found += [(path, status.st_size, status.st_mtime_ns) for path, status in files]
    return sorted(found)


def current_revision(connection: Connection) -> str | None:
    """The revision a database is at, from its own version table."""
    return MigrationContext.configure(connection).get_current_revision()


def upgrade_in_place(connection: Connection, scripts: ScriptDirectory, options: dict[str, Any]) -> None:
    """Bring a scratch database to head without an environment, from inside one: the ``context`` in use stays as it is."""

    def path(revision: Any, context: Any) -> Any:
        return scripts._upgrade_revs("head", revision)

    context = MigrationContext.configure(connection, opts={**options, "fn": path, "script": scripts})
    with context.begin_transaction(), Operations.context(context):
        context.run_migrations()


_ALEMBICS_ADVICE = "Please use the 'init' command to create a new scripts folder."


@contextmanager
def as_migration_error() -> Iterator[None]:
    """Alembic's own complaints become ours."""
    try:
        yield
    except CommandError as error:
        raise MigrationError(str(error).replace(_ALEMBICS_ADVICE, "Make it with: tenantdb migrations init")) from error
