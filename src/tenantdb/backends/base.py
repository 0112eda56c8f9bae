"""What differs per database product, as the rest of the library asks for it.

A `Backend` knows how to open engines; its `Workshop` is a provisioner's session on one server and makes databases. Steps of provisioning
call these and nothing of a driver.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import SecretStr
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import Pool

from tenantdb.model import DatabaseRole, Server, Tenant
from tenantdb.settings import ConnectionURL, Settings


@dataclass(frozen=True, slots=True)
class Location:
    """Where a tenant's database is and as whom to enter: the one answer that sessions, migrations and seeds are built from.

    ``password`` decrypts on call, so that the plain text lives only as long as a connect takes; it is not part of the repr.
    """

    tenant: Tenant
    server: Server
    role: DatabaseRole
    password: Callable[[], str] = field(repr=False)

    @property
    def host(self) -> str | None:
        """The owner role goes to the server itself, the runtime role perhaps to a pooler."""
        return self.server.direct_host if self.role is DatabaseRole.OWNER else self.server.host

    @property
    def port(self) -> int | None:
        return self.server.direct_port if self.role is DatabaseRole.OWNER else self.server.port


@dataclass(frozen=True, slots=True)
class FoundDatabase:
    """A database that exists on the server. ``invalid`` where an interrupted DROP left it unusable."""

    name: str
    invalid: bool = False


@dataclass(frozen=True, slots=True)
class ServerReport:
    """What a look at a server found, in words: what keeps the provisioner from working, and what stays open."""

    problems: Sequence[str] = ()
    warnings: Sequence[str] = ()


class Workshop(Protocol):
    """A provisioner's session on one server. Every method looks before it acts, so it may run twice."""

    def find_database(self, name: str) -> FoundDatabase | None: ...
    def find_roles(self, names: Sequence[str]) -> list[str]: ...
    def create_database(self, tenant: Tenant) -> None:
        """Make the tenant's database, closed to everyone until `open_database`."""

    def drop_invalid_database(self, name: str) -> None: ...
    def create_roles(self, tenant: Tenant, owner_password: SecretStr, runtime_password: SecretStr) -> None:
        """Make both roles, or give them these passwords where they exist."""

    def open_database(self, tenant: Tenant) -> None:
        """Shut PUBLIC out, set grants, schemas, extensions and the identity stamp; then let the tenant's roles in."""

    def verify(self, tenant: Tenant) -> list[str]:
        """Everything that is more open than it must be, in words; empty when all is well."""


class Backend(Protocol):
    """One database product."""

    name: str

    def engine(self, location: Location, settings: Settings, *, poolclass: type[Pool], **pool_options: Any) -> Engine:
        """An engine on a tenant's database. Its connections are checked against the identity stamp before anything else runs."""

    def async_engine(self, location: Location, settings: Settings, *, poolclass: type[Pool], **pool_options: Any) -> AsyncEngine: ...

    def registry_engine(self, url: ConnectionURL, settings: Settings) -> Engine:
        """An engine on the registry. A SQLite file must exist; `prepare_registry` makes it."""

    def prepare_registry(self, url: ConnectionURL) -> None: ...

    def workshop(self, server: Server, url: ConnectionURL, settings: Settings) -> AbstractContextManager[Workshop]:
        """Log in as the provisioner. Raises: `ServerUnavailable`."""

    def scratch_engine(self, server: Server, url: ConnectionURL, settings: Settings) -> AbstractContextManager[Engine]:
        """A new, empty database with the server's extensions and schemas, as its owner; dropped at the end."""

    def check_server(self, server: Server, url: ConnectionURL, settings: Settings) -> ServerReport:
        """Look with the provisioner's eyes, and change nothing. Raises: `ServerUnavailable`."""
