"""One attempt at one operation: what its steps read and move forward, and the connections that they share.

A step gets a provisioner's session from `Work.workshop`, which lasts until something else needs its place in the server's budget: an
operation holds one connection at a time, so it also gets along with a budget of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session

from tenantdb.backends import backend
from tenantdb.connections.engines import Engines
from tenantdb.errors import ConfigError, OperationInProgress
from tenantdb.model import DatabaseRole, Server, Tenant
from tenantdb.provisioning.golden import Golden
from tenantdb.provisioning.hooks import Hooks
from tenantdb.registry import Registry
from tenantdb.registry.operations import Operation
from tenantdb.registry.records import TenantRecord
from tenantdb.settings import Settings

if TYPE_CHECKING:
    from tenantdb.backends import Workshop

Also = Callable[[Connection], object]
"""What a step has found out and the journal writes down together with the step's end."""


@dataclass(frozen=True)
class Shop:
    """What all operations of one `TenantDB` share."""

    registry: Registry
    settings: Settings
    engines: Engines
    hooks: Hooks
    golden: Golden
    session_class: type[Session]

    @contextmanager
    def workshop(self, server: Server) -> Iterator[Workshop]:
        """A provisioner's session. Raises: `ConfigError` where this process has no login for it; `ServerUnavailable`."""
        url = self.settings.provisioners.get(server.name)
        if url is None:
            raise ConfigError(f"this process has no provisioner for server {server.name!r}; give it in servers={{...}}")
        with self.engines.place(server, "the provisioner"), backend(server.backend).workshop(server, url, self.settings) as workshop:
            yield workshop


@dataclass
class Work:
    """One attempt at one operation."""

    shop: Shop
    operation: Operation
    record: TenantRecord
    wanted: Mapping[str, Any]  # the server or region that was asked for, and the like
    revision: str | None = None  # of what this attempt has cloned or loaded
    _open: ExitStack = field(default_factory=ExitStack)
    _workshop: Workshop | None = None
    _at: Server | None = None

    @property
    def registry(self) -> Registry:
        return self.shop.registry

    @property
    def settings(self) -> Settings:
        return self.shop.settings

    @property
    def hooks(self) -> Hooks:
        return self.shop.hooks

    @property
    def tenant(self) -> Tenant:
        return self.record.tenant

    @property
    def server(self) -> Server:
        if self.record.server is None:
            raise OperationInProgress(self.tenant.slug)
        return self.record.server

    def reload(self) -> None:
        self.record = self.registry.tenants.row(self.tenant.id)

    def workshop(self, server: Server | None = None) -> Workshop:
        """The provisioner's session on a server, the same for as long as nothing else is asked for."""
        server = server or self.server
        if self._workshop is None or self._at != server:
            self.release()
            self._workshop, self._at = self._open.enter_context(self.shop.workshop(server)), server
        return self._workshop

    def release(self) -> None:
        """Let go of the provisioner's session, if there is one."""
        self._workshop = self._at = None
        self._open.close()

    @contextmanager
    def passing(self, role: DatabaseRole) -> Iterator[Engine]:
        """An engine on the tenant's database as one of its roles."""
        self.release()
        with self.shop.engines.passing(self.record, role) as engine:
            yield engine
