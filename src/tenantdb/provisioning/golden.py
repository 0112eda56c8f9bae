"""The golden database of a server: migrated once, then cloned for every new tenant.

Cloning costs a fraction of migrating, and is as exact as a copy of files. The first who needs a database at a new head revision builds the
golden one, in a database of its own, under a lease; the others wait. It is switched to when it is whole; nobody ever connects to it then,
because a session in it would keep it from being cloned.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import threading
import time
from typing import TYPE_CHECKING

from tenantdb.errors import MigrationError, describe
from tenantdb.model import Server, Template, TemplateState
from tenantdb.provisioning.lease import LEASE, heartbeat, worker
from tenantdb.registry import Registry
from tenantdb.settings import SQLITE, Settings

if TYPE_CHECKING:
    from tenantdb.backends import Workshop
    from tenantdb.migrations import Scripts

logger = logging.getLogger("tenantdb.provisioning")

_LAYOUT = "1"  # grows when what the library puts into every new database changes
_POLL = 0.05
_PATIENCE = 600.0  # seconds to wait for another worker's build before giving up


def draw_name() -> str:
    """A name for a database or role that says nothing and that nobody can guess: 64 random bits."""
    return f"t_{secrets.token_hex(8)}"


class Golden:
    """Finds the golden database for a server, or builds it. Safe to share between threads."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self._registry = registry
        self._settings = settings
        self._building = threading.Lock()  # one build at a time in this process; Alembic allows no more anyway

    def head(self) -> str | None:
        """The head revision of the application's migrations. Raises: `MigrationError`."""
        return None if self._settings.migrations is None else self._scripts().identity()[0]

    def template(self, server: Server, workshop: Workshop) -> Template | None:
        """The golden database at the head revision; None where there are no migrations. May take as long as migrating from nothing does.

        Raises: `MigrationError`; what a migration raises; `ServerUnavailable`.
        """
        if self._settings.migrations is None:
            return None
        revision, contents = self._scripts().identity()
        digest = self._digest(server, contents)
        waited_until = time.monotonic() + _PATIENCE
        while True:
            if (found := self._registry.templates.find(server, revision, digest)) is not None:
                return found
            with self._building:
                mine = self._registry.templates.begin(
                    server,
                    revision,
                    digest,
                    database=draw_name(),
                    owner_role=None if server.backend == SQLITE else draw_name(),
                    worker=worker(),
                    lease=LEASE,
                )
                if mine is not None:
                    self._build(mine, workshop)
            if mine is None:
                if time.monotonic() > waited_until:
                    raise MigrationError(f"another process has been building the golden database of {server.name!r} for too long")
                threading.Event().wait(_POLL)

    def is_stale(self, server: Server) -> bool:
        """Whether the next database on this server would need a golden database that is not there yet."""
        if self._settings.migrations is None:
            return False
        revision, contents = self._scripts().identity()
        return self._registry.templates.find(server, revision, self._digest(server, contents)) is None

    def drop_retired(self, server: Server, workshop: Workshop) -> None:
        """Drop what is used no more. One that is just being cloned stays until next time."""
        for template in self._registry.templates.list(server):
            if template.state is TemplateState.RETIRED:
                try:
                    workshop.drop_template(template)
                except Exception as error:
                    logger.warning("the retired golden database %s could not be dropped yet: %s", template.database, describe(error))
                else:
                    self._registry.templates.forget(template)

    def _build(self, template: Template, workshop: Workshop) -> None:
        try:
            with heartbeat(lambda: self._registry.templates.renew(template, LEASE), f"golden database {template.database}"):
                workshop.create_template(template)
                with workshop.template_engine(template) as engine:
                    found = self._scripts().upgrade(engine)
                if found != template.revision:
                    raise MigrationError(f"the migrations changed while they ran: {found!r} instead of {template.revision!r}")
                workshop.close_template(template)
            self._registry.templates.switch(template)
        except BaseException:
            self._abandon(template, workshop)
            raise
        self.drop_retired(self._registry.servers.get(template.server_id), workshop)

    def _abandon(self, template: Template, workshop: Workshop) -> None:
        try:
            self._registry.templates.retire(template)
            workshop.drop_template(template)
            self._registry.templates.forget(template)
        except Exception as error:
            logger.warning("an unfinished golden database %s is left, and dropped later: %s", template.database, describe(error))

    def _scripts(self) -> Scripts:
        from tenantdb.migrations import Scripts

        if self._settings.migrations is None:
            raise MigrationError("no migrations are configured")
        return Scripts(self._settings.migrations)

    def _digest(self, server: Server, contents: str) -> str:
        """Of everything that makes two databases at one revision differ."""
        told = [_LAYOUT, contents, sorted(server.extensions), sorted(server.schemas), self._settings.hardening]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()
