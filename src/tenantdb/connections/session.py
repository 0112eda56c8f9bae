"""Sessions of the application's own class, pinned to one tenant.

The tenant is fixed when the session is made; the engine is looked up when SQL is first sent in each transaction. So a session that
outlives a suspension is refused at its next transaction, one that outlives a move of the tenant goes to the new place, and none holds an
engine that the cache has let go. There is no context-dependent routing: a session made for one tenant never reaches another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from uuid import UUID

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import SessionTransaction

from tenantdb.connections.sqla import wire_of
from tenantdb.errors import ConfigError, EngineRetired

EngineLookup = Callable[[str | UUID], tuple[UUID, Engine]]
"""From a key to the tenant's id and its engine, refusing what may not be served."""

_RESERVED = ("bind", "binds", "sync_session_class", "twophase")


class Pin:
    """Which tenant a session belongs to. Once the tenant is known it is known by id: a slug may pass to another tenant."""

    __slots__ = ("_key", "_lookup", "_options", "leased")

    def __init__(self, key: str | UUID, lookup: EngineLookup, options: dict[str, Any] | None = None) -> None:
        self._key = key
        self._lookup = lookup
        self._options = options
        self.leased: Any = None  # the engine of the transaction under way

    @property
    def tenant_id(self) -> UUID:
        """Known since the session sent SQL for the first time."""
        assert isinstance(self._key, UUID)
        return self._key

    def engine(self) -> Any:
        if self.leased is not None:
            return self.leased
        self._key, engine = self._lookup(self._key)
        return engine.execution_options(**self._options) if self._options else engine


class PinnedSession:
    """Mixed into the application's session class by `pinned`."""

    def __init__(self, *args: Any, pin: Pin, **options: Any) -> None:
        self._tenantdb_pin = pin
        super().__init__(*args, **options)

    def get_bind(self, mapper: Any = None, *, bind: Any = None, **context: Any) -> Any:
        """The tenant's engine, whatever is executed. Raises: the typed error that says why the tenant cannot be served."""
        self._refuse_other(bind)
        pin = self._tenantdb_pin
        engine = pin.engine()
        if self._flushing and pin.leased is None:  # type: ignore[attr-defined]
            return self._connection_for_bind(engine).engine  # which the unit of work goes past
        return engine

    def connection(self, bind_arguments: dict[str, Any] | None = None, **options: Any) -> Any:
        """The session's connection. SQLAlchemy would take another bind given here without asking `get_bind`."""
        self._refuse_other((bind_arguments or {}).get("bind"))
        return super().connection(bind_arguments, **options)  # type: ignore[misc]

    def _connection_for_bind(self, engine: Any, execution_options: Any = None, **options: Any) -> Any:
        """A connection of the engine, or of the next one where the tenant changed after the look-up. Raises: as `get_bind`."""
        try:
            return super()._connection_for_bind(engine, execution_options, **options)  # type: ignore[misc]
        except EngineRetired:
            if not engine.pool.outdated:  # all is closed, and nobody opens it again by waiting in line
                raise
        return super()._connection_for_bind(self._tenantdb_pin.engine(), execution_options, **options)  # type: ignore[misc]

    def _refuse_other(self, bind: Any) -> None:
        if bind is not None and bind is not self._tenantdb_pin.leased:
            raise ConfigError("a tenant's session does not take another bind; open a plain Session for databases that are no tenant's")


@functools.cache
def pinned(session_class: Any) -> Any:
    """A subclass of the application's session class whose instances take ``pin=``."""
    made = type(f"Tenant{session_class.__name__}", (PinnedSession, session_class), {})

    @event.listens_for(made, "after_begin")
    def hold(session: Any, transaction: SessionTransaction, connection: Connection) -> None:
        session._tenantdb_pin.leased = connection.engine
        wire_of(connection).defer()

    @event.listens_for(made, "after_transaction_end")
    def let_go(session: Any, transaction: SessionTransaction) -> None:
        if transaction.parent is None:
            session._tenantdb_pin.leased = None

    return made


def check_session_options(options: dict[str, Any]) -> dict[str, Any]:
    """Refuse options that would lead a session elsewhere. Raises: `ConfigError`."""
    if wrong := [name for name in _RESERVED if name in options]:
        raise ConfigError(f"session_options cannot contain {', '.join(wrong)}: the tenant decides where a session goes")
    return options
