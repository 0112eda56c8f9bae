"""What differs per database product, as the rest of the library asks for it.

A `Backend` knows how to open connections; its `Workshop` is a provisioner's session on one server and makes databases; a `Wire` is a
connection between two users. Nobody else calls a driver. For type checkers alone: nothing imports this when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from pydantic import SecretStr
from sqlalchemy.engine import URL, Engine
from sqlalchemy.engine.interfaces import Dialect

from tenantdb.backends.base import FoundDatabase, Location, ServerReport
from tenantdb.model import Server, Tenant
from tenantdb.settings import ConnectionURL, Settings


class Wire(Protocol):
    """A connection between two users, and how it is handed over clean. ``settle`` and ``ping`` are awaited for asyncio."""

    def defer(self) -> None:
        """A session's transaction begins: its rollback is the end, and may travel with the reset."""

    def send_reset(self) -> bool:
        """At the return, without waiting: undo what the user left behind. False: it cannot be undone, close the connection."""

    def settled(self) -> bool | None:
        """At checkout, without waiting: True where it is clean and alive, False where not, None where `settle` must find out."""

    def settle(self, timeout: float) -> Any: ...
    def ping(self, timeout: float) -> Any:
        """The same with a question to the server, after a long rest."""

    def disown(self) -> object:
        """In a forked child: never touch the connection again. Returns what must not be collected, because that would close it."""

    def finish(self) -> int | None:
        """Close at once, from any thread; what is returned tells when the server has hung up (`tenantdb.backends.hangup`)."""


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

    def template(self, settings: Settings, *, is_async: bool) -> Engine:
        """An engine to take dialect, listeners and compiled cache from, for all tenants of one server. It connects nowhere."""

    def url(self, location: Location) -> URL:
        """What an engine shows: never with a password."""

    def open(self, dialect: Dialect, location: Location, settings: Settings, *, timeout: float) -> Any:
        """A DBAPI connection, checked against the identity stamp before anything else runs; for asyncio inside SQLAlchemy's greenlet.

        Raises: `ConnectFailed`; `WrongDatabase`, after which the connection is closed.
        """

    def wire(self, dialect: Dialect, connection: Any) -> Wire:
        """What the pool does with a connection that was opened here."""

    def registry_engine(self, url: ConnectionURL, settings: Settings) -> Engine:
        """An engine on the registry. A SQLite file must exist; `prepare_registry` makes it."""

    def prepare_registry(self, url: ConnectionURL) -> None: ...

    def workshop(self, server: Server, url: ConnectionURL, settings: Settings) -> AbstractContextManager[Workshop]:
        """Log in as the provisioner. Raises: `ServerUnavailable`."""

    def scratch_engine(self, server: Server, url: ConnectionURL, settings: Settings) -> AbstractContextManager[Engine]:
        """A new, empty database with the server's extensions and schemas, as its owner; dropped at the end."""

    def check_server(self, server: Server, url: ConnectionURL, settings: Settings) -> ServerReport:
        """Look with the provisioner's eyes, and change nothing. Raises: `ServerUnavailable`."""
