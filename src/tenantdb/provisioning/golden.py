"""The golden database of a server: migrated once, then cloned for every new tenant.

Cloning costs a fraction of migrating, and is as exact as a copy of files. The first who needs a database at a new head revision builds the
golden one, in a database of its own, under a lease; the others wait. It is switched to when it is whole; nobody ever connects to it then,
because a session in it would keep it from being cloned. Static seeds are part of it: their rows are copied, not written again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy.orm import Session

from tenantdb.errors import MigrationError, describe
from tenantdb.model import Server, Template, TemplateState
from tenantdb.provisioning.hooks import Hooks, StaticSeed
from tenantdb.provisioning.lease import LEASE, dead, heartbeat, worker
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

    def __init__(self, registry: Registry, settings: Settings, hooks: Hooks, session_class: type[Session]) -> None:
        self._registry = registry
        self._settings = settings
        self._hooks = hooks
        self._session_class = session_class
        self._known: dict[tuple[UUID, str | None, str], tuple[Template, float]] = {}  # and until when that is believed
        self._building = threading.Lock()  # one build at a time in this process; Alembic allows no more anyway

    def head(self) -> str | None:
        """The head revision of the application's migrations. Raises: `MigrationError`."""
        return None if self._settings.migrations is None else self._scripts().identity()[0]

    def is_behind(self, revision: str | None) -> bool:
        """Whether a database at a revision is to be migrated by this process: it is not at the head, nor of newer code than this."""
        if self._settings.migrations is None or revision == self.head():
            return False
        return revision is None or self._scripts().knows(revision)

    def template(self, server: Server, workshop: Workshop, *, instead_of: Template | None = None) -> Template | None:
        """The golden database at the head revision; None where there are no migrations. May take as long as migrating from nothing does.

        ``instead_of`` one that turned out to be gone. Raises: `MigrationError`; what a migration or a static seed raises;
        `ServerUnavailable`.
        """
        if self._settings.migrations is None:
            return None
        revision, contents = self._scripts().identity()
        key = server.id, revision, self._digest(server, contents)
        if instead_of is not None:
            self._known.pop(key, None)
            self._registry.templates.retire(instead_of)
        found, until = self._known.get(key, (None, 0.0))
        if found is None or time.monotonic() > until:
            found = self._find(server, revision, key[2], workshop)
            self._known[key] = found, time.monotonic() + self._settings.cache_ttl
        return found

    def prepare(self, server: Server, workshop: Callable[[Server], AbstractContextManager[Workshop]]) -> None:
        """Build it ahead, so that the first sign-up of a release does not wait for it. Asks once per head and server. Raises: as
        `template`."""
        if self._settings.migrations is None:
            return
        revision, contents = self._scripts().identity()
        key = server.id, revision, self._digest(server, contents)
        if key not in self._known:
            with workshop(server) as opened:
                self.template(server, opened)

    def _find(self, server: Server, revision: str | None, digest: str, workshop: Workshop) -> Template:
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
                    dead=self._dead_builders(server),
                )
                if mine is not None:
                    self._build(mine, workshop)
            if mine is None:
                if time.monotonic() > waited_until:
                    raise MigrationError(f"another process has been building the golden database of {server.name!r} for too long")
                threading.Event().wait(_POLL)

    def _dead_builders(self, server: Server) -> list[str]:
        """A rollout begins with a build, so whoever resumes one that was killed there need not wait for the lease."""
        listed = self._registry.templates.list(server)
        return dead(each.worker for each in listed if each.worker is not None and each.state is TemplateState.BUILDING)

    def drop_retired(self, server: Server, workshop: Workshop) -> None:
        """Drop what is used no more. One that cannot be dropped now stays until next time."""
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
                    if self._hooks.static_seeds:
                        with self._session_class(engine) as session, session.begin():
                            for seed in self._hooks.static_seeds:
                                seed(session)
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
        seeds = [_code_of(seed) for seed in self._hooks.static_seeds]
        told = [_LAYOUT, contents, seeds, sorted(server.extensions), sorted(server.schemas), self._settings.hardening]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _code_of(seed: StaticSeed) -> str:
    """Tells a static seed from the same one before it was edited. What it reads from elsewhere is not seen: then it is not static."""
    code = getattr(seed, "__code__", None)
    name = f"{getattr(seed, '__module__', '')}.{getattr(seed, '__qualname__', type(seed).__qualname__)}"
    if code is None:
        return name
    constants = [constant for constant in code.co_consts if isinstance(constant, (str, bytes, int, float, tuple, frozenset, type(None)))]
    told = [name, code.co_code.hex(), code.co_names, sorted(map(repr, constants))]
    return hashlib.sha256(repr(told).encode()).hexdigest()
