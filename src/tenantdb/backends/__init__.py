"""What differs per database product: PostgreSQL and SQLite behind one small protocol."""

from __future__ import annotations

from tenantdb.backends.base import Backend, FoundDatabase, Location, Workshop
from tenantdb.errors import ConfigError
from tenantdb.settings import POSTGRESQL, SQLITE

__all__ = ["Backend", "FoundDatabase", "Location", "Workshop", "backend"]


def backend(name: str) -> Backend:
    """The backend of a server or URL by its name. The driver is imported on first use."""
    if name == POSTGRESQL:
        from tenantdb.backends.postgresql import PostgreSQL

        return PostgreSQL()
    if name == SQLITE:
        from tenantdb.backends.sqlite import SQLite

        return SQLite()
    raise ConfigError(f"there is no backend {name!r}; known are {POSTGRESQL} and {SQLITE}")
