"""Help for tests and for development: real PostgreSQL without installing it."""

from __future__ import annotations

from .postgres import EmbeddedServer

__all__ = ["EmbeddedServer"]
