"""What differs per database product: PostgreSQL and SQLite behind one small protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tenantdb.backends.base import (
    CarryFailed,
    ColumnShape,
    ConnectFailed,
    FailureClass,
    FenceLevel,
    FoundDatabase,
    Location,
    SchemaLine,
    Surroundings,
    Survey,
    TableShape,
    TemplateMissing,
)
from tenantdb.errors import ConfigError
from tenantdb.settings import POSTGRESQL, SQLITE

if TYPE_CHECKING:
    from tenantdb.backends.protocols import Backend, Carrier, Ear, Rows, Wire, Workshop

__all__ = [
    "Backend",
    "Carrier",
    "CarryFailed",
    "ColumnShape",
    "ConnectFailed",
    "Ear",
    "FailureClass",
    "FenceLevel",
    "FoundDatabase",
    "Location",
    "Rows",
    "SchemaLine",
    "Surroundings",
    "Survey",
    "TableShape",
    "TemplateMissing",
    "Wire",
    "Workshop",
    "backend",
]


def backend(name: str) -> Backend:
    """The backend of a server or URL by its name. The driver is imported on first use."""
    if name == POSTGRESQL:
        from tenantdb.backends.postgresql import PostgreSQL

        return PostgreSQL()
    if name == SQLITE:
        from tenantdb.backends.sqlite import SQLite

        return SQLite()
    raise ConfigError(f"there is no backend {name!r}; known are {POSTGRESQL} and {SQLITE}")
