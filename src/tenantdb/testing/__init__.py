"""Help for tests and for development: real PostgreSQL without installing it, and what pytest's fixtures do not do.

The fixtures are in `tenantdb.testing.plugin`, which needs pytest; nothing here does.
"""

from __future__ import annotations

from tenantdb.testing.models import assert_migrations_match_models
from tenantdb.testing.postgres import EmbeddedServer

__all__ = ["EmbeddedServer", "assert_migrations_match_models"]
