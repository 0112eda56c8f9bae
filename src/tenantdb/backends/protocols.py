"""What differs per database product, as the rest of the library asks for it.

A `Backend` knows how to open connections; its `Workshop` is a provisioner's session on one server and makes databases; a `Wire` is a
connection between two users. Nobody else calls a driver. For type checkers alone: nothing imports this when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from pydantic import SecretStr
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.engine.interfaces import Dialect

from tenantdb.backends.base import FenceLevel, FoundDatabase, Location, SchemaLine, ServerReport, Surroundings, Survey, TableShape
from tenantdb.backends.weakness import Diagnosis, Patient, ServerExamination
from tenantdb.model import Server, Template, Tenant
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


class Ear(Protocol):
    """A connection that listens to a channel. Its descriptor is readable when there is something to hear."""

    def fileno(self) -> int: ...
    def heard(self) -> Sequence[str]:
        """What has been told since, without waiting. Raises: `RegistryUnavailable` where the connection is lost."""

    def close(self) -> None: ...


class Workshop(Protocol):
    """A provisioner's session on one server. Every method looks before it acts, so it may run twice."""

    def find_database(self, name: str) -> FoundDatabase | None: ...
    def find_roles(self, names: Sequence[str]) -> list[str]: ...
    def are_taken(self, database: str, roles: Sequence[str]) -> bool:
        """Whether the server has a database or a role of one of these names. Where not, the database's name is held, as by `hold`."""

    def sizes(self) -> dict[str, int]:
        """The databases of the server and their sizes in bytes."""

    def ours(self) -> tuple[set[str], set[str]]:
        """The databases and the roles on the server whose names look as if we had drawn them."""

    def hold(self, name: str) -> FoundDatabase | None:
        """Keep other workers, the dead ones included whose statement still runs, from making or dropping this database for as long as this
        session lasts, and look whether it is there. Raises: `OperationInProgress`.
        """

    def create_database(self, tenant: Tenant, template: Template | None) -> None:
        """Make the tenant's database, closed to everyone until `open_database`: a clone of ``template``, or empty.

        Raises: `TemplateMissing`.
        """

    def create_roles(self, tenant: Tenant, owner_password: SecretStr, runtime_password: SecretStr) -> None:
        """Make both roles, or give them these passwords where they exist."""

    def open_database(self, tenant: Tenant) -> None:
        """Shut PUBLIC out and let the tenant's roles in."""

    def fit(self, tenant: Tenant, template: Template | None = None) -> None:
        """Inside: the identity stamp, grants; what was cloned is given over to the owner role; what was not is furnished.

        ``template`` where it was cloned from that a moment ago.
        """

    def verify(self, tenant: Tenant, *, cloned: bool = False) -> list[str]:
        """Everything that is more open than it must be, in words; empty when all is well. Of a fresh clone, what cloning can have left."""

    def create_template(self, template: Template) -> None:
        """An empty golden database with a role that owns what migrations make in it."""

    def template_engine(self, template: Template) -> AbstractContextManager[Engine]:
        """For migrating it, as that role."""

    def close_template(self, template: Template) -> None:
        """Nobody connects to it from now on: a session in it would keep it from being cloned."""

    def drop_template(self, template: Template) -> None: ...

    def fence(self, tenant: Tenant, level: FenceLevel) -> None:
        """Decide whom the server lets in, and end the sessions of whom it does not. Does nothing where there is no database."""

    def set_passwords(self, tenant: Tenant, owner_password: SecretStr, runtime_password: SecretStr) -> None: ...
    def now(self) -> Any:
        """The server's time; it tells which sessions are older than a change."""

    def sessions(self, tenant: Tenant, *, before: Any) -> int:
        """How many of the tenant's sessions began before a moment."""

    def end_sessions(self, tenant: Tenant, *, roles: Sequence[str] | None = None, before: Any = None, idle_for: float | None = None) -> int:
        """End a tenant's sessions, and return how many: of some roles, that began before a moment, that have rested so many seconds."""

    def drop_database(self, tenant: Tenant) -> None: ...
    def drop_roles(self, tenant: Tenant) -> None: ...

    def survey(self, slug: str, database: str, owner_url: ConnectionURL | None) -> Survey:
        """Look at a database that somebody else made, with its owner's eyes. Raises: `AdoptRefused`, with everything that speaks against
        its adoption; `ServerUnavailable`."""

    def hand_over(self, tenant: Tenant, owner_url: ConnectionURL | None) -> None:
        """The database and all that is in it become the provisioner's and the owner role's, in one transaction; done already, nothing
        happens. Its old owner is shut out. Raises: `AdoptRefused`, with nothing changed."""

    def may_hand_back(self, tenant: Tenant, owner_url: ConnectionURL | None) -> None:
        """Raises: `AdoptRefused` where `hand_back` could not work."""

    def hand_back(self, tenant: Tenant, owner_url: ConnectionURL | None) -> None:
        """The other way, also for what was made since; nothing of the tenant's data is dropped. Done already, or never handed over, nothing
        happens. Raises: `AdoptRefused`, with nothing changed."""


class Doctor(Protocol):
    """Looks at one server and the tenants on it for what is weaker than it must be, and mends what is harmless where ``repair`` says so.

    Each method opens one connection at a time, and closes it. Raises: `ServerUnavailable`.
    """

    def examine_server(self, patients: Sequence[Patient], templates: Sequence[Template], *, whole: bool, repair: bool) -> ServerExamination:
        """Everything that can be seen without entering a tenant's database; ``whole``: the server's own weaknesses too."""

    def examine_inside(self, patient: Patient, *, repair: bool) -> list[Diagnosis]:
        """One tenant's database, which must be enterable."""


class Rows(Protocol):
    """Reads every value of a tenant's tables so that nothing is lost in JSON."""

    def tables(self) -> list[TableShape]:
        """The application's own, by schema and name. None is a part of another."""

    def read(self, table: TableShape) -> Iterator[Sequence[Any]]:
        """All rows, in constant memory."""


class Carrier(Protocol):
    """Carries a tenant's whole database out and in, as its owner. Each of `dump` and `load` opens one connection. Raises: `CarryFailed`."""

    member: str  # what the data is called in an export

    def look(self, connection: Connection) -> Surroundings: ...

    def dump(self, target: BinaryIO, scratch: Path, there: Surroundings) -> str:
        """Write all of it but what is tenantdb's own, and return with what it was made. ``scratch`` is a folder for what is in between.

        Raises: `ToolNotFound`; `OSError` where it cannot be written.
        """

    def load(self, source: Callable[[], BinaryIO], made_with: str, there: Surroundings) -> None:
        """Fill a new database. ``source`` begins anew with each call. Raises: `ImportRefused`, `ToolNotFound`; what ``source`` raises."""

    def settle(self, connection: Connection) -> None:
        """After a load, in the caller's transaction: sequences behind the largest value are moved there."""


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

    def refuses_writing(self, error: BaseException) -> bool:
        """Whether a driver's error says that a connection that only reads was told to write."""

    def registry_engine(self, url: ConnectionURL, settings: Settings) -> Engine:
        """An engine on the registry. A SQLite file must exist; `prepare_registry` makes it."""

    def listen(self, url: ConnectionURL, settings: Settings, channel: str) -> Ear | None:
        """A connection to the registry that listens to a channel; None where the product has none. Raises: `RegistryUnavailable`."""

    def prepare_registry(self, url: ConnectionURL) -> None: ...

    def workshop(self, server: Server, url: ConnectionURL, settings: Settings) -> AbstractContextManager[Workshop]:
        """Log in as the provisioner. Raises: `ServerUnavailable`."""

    def scratch_engine(self, server: Server, url: ConnectionURL, settings: Settings) -> AbstractContextManager[Engine]:
        """A new, empty database with the server's extensions and schemas, as its owner; dropped at the end."""

    def check_server(self, server: Server, url: ConnectionURL, settings: Settings) -> ServerReport:
        """Look with the provisioner's eyes, and change nothing. Raises: `ServerUnavailable`."""

    def doctor(self, server: Server, url: ConnectionURL, settings: Settings) -> Doctor:
        """Who looks harder than `check_server`, with the provisioner's login. Opens nothing yet."""

    def carrier(self, location: Location, settings: Settings) -> Carrier:
        """Who takes the database at ``location``, which is the owner role's, out and in. Opens nothing yet."""

    def keep_copy(self, location: Location) -> None:
        """Before a migration: keep the file as it is now, where a database is one. The copy before it goes, and all go with the tenant."""

    async def send_script(self, location: Location, settings: Settings, script: str) -> list[tuple[Any, ...]]:
        """Send statements to a tenant's database as one message, on a connection of its own that the caller holds a place for. Returns the
        rows of the last one. Raises: `ConnectFailed`, `WrongDatabase`; what the driver raises."""

    def rows(self, connection: Connection, schemas: Sequence[str]) -> Rows:
        """Who reads the rows of a tenant's tables, in the transaction that begins with the first read."""

    def schema_lines(self, connection: Connection, tenant: Tenant | None = None) -> list[SchemaLine]:
        """The schema, sorted, without what is tenantdb's own, what an extension brought, and Alembic's version table. Changes nothing.

        ``tenant`` whose database it is; None for a scratch database, of which nobody's rights are told.
        """
