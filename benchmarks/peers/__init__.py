"""What a user would write instead of tenantdb, in earnest: each peer gets the same logins, and as much care as its idea allows.

What all have in common: psycopg 3 through SQLAlchemy, the tenant's own runtime role and password, the connection arguments that tenantdb
uses, hstore off, and one engine object per tenant and colour that is made once and kept. Making an engine and letting SQLAlchemy look at a
new server costs more than a connect, and a careful user would notice; so what a peer evicts is connections, never the engine object.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session


@dataclass(frozen=True)
class Login:
    """Where one tenant's database is and how to log in, as an application would keep it."""

    url: URL
    connect_args: Mapping[str, Any] = field(repr=False)


Logins = Mapping[str, Login]
"""By the tenant's slug."""


class AsyncSessions(Protocol):
    """A session on a tenant's database, for tasks of the running event loop. Ends without commit."""

    def async_session(self, slug: str) -> AbstractAsyncContextManager[AsyncSession]: ...

    async def close(self) -> None:
        """Close every connection. The next session opens one again."""
        ...


class Sessions(AsyncSessions, Protocol):
    """The same for threads as well."""

    def session(self, slug: str) -> AbstractContextManager[Session]: ...
