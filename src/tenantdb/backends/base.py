"""What passes between the backends and the rest of the library."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tenantdb.model import DatabaseRole, Server, StrEnum, Tenant


@dataclass(frozen=True, slots=True)
class Location:
    """Where a tenant's database is and as whom to enter: the one answer that sessions, migrations and seeds are built from.

    ``password`` decrypts on call, so that the plain text lives only as long as a connect takes; it is not part of the repr. While it is
    being changed a role has two, of which the server knows one: ``other_password`` tells what to try once where ``password`` was refused,
    if anything. It reads the registry.
    """

    tenant: Tenant
    server: Server
    role: DatabaseRole
    password: Callable[[], str] = field(repr=False)
    other_password: Callable[[], Callable[[], str] | None] = field(default=lambda: None, repr=False)
    recheck: Callable[[], object] = field(default=lambda: None, repr=False)
    """Asks the registry whether the tenant is to be served still, for one that its server refuses. Raises where it is not."""
    read_only: bool = False
    """Whether connections opened there refuse to write, from the first statement to the last and whoever uses them."""

    @property
    def host(self) -> str | None:
        """The owner role goes to the server itself, the runtime role perhaps to a pooler."""
        return self.server.direct_host if self.role is DatabaseRole.OWNER else self.server.host

    @property
    def port(self) -> int | None:
        return self.server.direct_port if self.role is DatabaseRole.OWNER else self.server.port


class FailureClass(StrEnum):
    """Whose fault a failed connect is."""

    SERVER = "server"
    CAPACITY = "capacity"
    TENANT = "tenant"


class ConnectFailed(Exception):
    """A connect failed; ``__cause__`` is the driver's error. Never reaches an application: the pool decides what to make of it."""

    def __init__(self, kind: FailureClass, problem: str) -> None:
        super().__init__(kind, problem)
        self.kind, self.problem = kind, problem


class FenceLevel(StrEnum):
    """Whom a database server lets into a tenant's database: both roles, the owner role alone (so that it can be migrated), nobody."""

    OPEN = "open"
    SUSPENDED = "suspended"
    CLOSED = "closed"


class TemplateMissing(Exception):
    """A golden database is not on its server any more. Never reaches an application: another is built."""


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


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a database says before it is carried out or in: the product's version, its size in bytes, and what a new one holds already, as
    (kind, name)."""

    version: str
    size: int
    present: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True, slots=True)
class Survey:
    """A database that may be adopted: who owns it (on SQLite, its path), and what its ``alembic_version`` says: None where there is no
    such table, empty where that can only be told later."""

    owner: str
    revisions: Sequence[str] | None


class CarryFailed(Exception):
    """A database could not be carried out or in. Never reaches an application; ``problem`` holds no row."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


@dataclass(frozen=True, slots=True)
class ColumnShape:
    """A column as an export of rows describes it. ``type`` is the database's own word; ``kind`` says how its values stand in JSON."""

    name: str
    type: str
    kind: str
    nullable: bool


@dataclass(frozen=True, slots=True)
class TableShape:
    """A table as an export of rows describes it. ``schema`` is None where the product has none; ``foreign_keys`` are (columns, table,
    columns)."""

    schema: str | None
    name: str
    columns: Sequence[ColumnShape]
    primary_key: Sequence[str] = ()
    unique: Sequence[Sequence[str]] = ()
    foreign_keys: Sequence[tuple[Sequence[str], str, Sequence[str]]] = ()


def milliseconds(seconds: float) -> int:
    """As PostgreSQL counts its limits: 0 lifts one, which a very short one must not do."""
    return max(1, round(seconds * 1000)) if seconds else 0


RIGHTS = "rights"
"""The kind of line that says who owns an object and who may do what with it."""


@dataclass(frozen=True, slots=True, order=True)
class SchemaLine:
    """One object of a schema, so that two databases can be compared line by line: no two lines have the same kind and name, nothing in it
    depends on when the object was made, and the tenant's roles stand as OWNER and RUNTIME. ``part_of`` names the table or other object
    without which this one would not be."""

    kind: str
    name: str
    definition: str
    part_of: str = ""


def fingerprint(lines: Iterable[SchemaLine]) -> str:
    """A digest that is the same for the same sorted lines: 64 hex digits."""
    digest = hashlib.sha256()
    for line in lines:
        for text in (line.kind, line.name, line.definition):
            digest.update(f"{len(text)}:{text}".encode())
    return digest.hexdigest()
