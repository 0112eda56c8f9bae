"""Sessions of the application's own class, pinned to one tenant.

The tenant is fixed when the session is made; the engine is looked up when SQL is first sent in each transaction. So a session that
outlives a suspension is refused at its next transaction, one that outlives a move of the tenant goes to the new place, and none holds an
engine that the cache has let go. There is no context-dependent routing: a session made for one tenant never reaches another.

Nor does an object: each way in asks whose it is, and each way out says so. See `tenantdb.connections.objects`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any
from uuid import UUID

from sqlalchemy import event, inspect
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import InstanceState, SessionTransaction
from sqlalchemy.orm.attributes import instance_state

from tenantdb.connections.objects import SessionKey, owner_of, refuse_foreign, stamp
from tenantdb.connections.sqla import wire_of
from tenantdb.errors import ConfigError, EngineRetired

EngineLookup = Callable[[str | UUID], tuple[UUID, Engine]]
"""From a key to the tenant's id and its engine, refusing what may not be served."""

_RESERVED = ("bind", "binds", "sync_session_class", "twophase")


class Pin:
    """Which tenant a session belongs to. Once the tenant is known it is known by id: a slug may pass to another tenant."""

    __slots__ = ("_key", "_lookup", "_options", "is_async", "leased")

    def __init__(self, key: str | UUID, lookup: EngineLookup, options: dict[str, Any] | None = None, *, is_async: bool = False) -> None:
        self._key = key
        self.is_async = is_async
        self._lookup = lookup
        self._options = options
        self.leased: Any = None  # the engine of the transaction under way

    @property
    def tenant_id(self) -> UUID:
        """Known since the session sent SQL for the first time."""
        assert isinstance(self._key, UUID)
        return self._key

    @property
    def known(self) -> UUID | None:
        """The tenant's id, if it is known already."""
        return self._key if isinstance(self._key, UUID) else None

    def look_up(self) -> tuple[UUID, Any]:
        """The tenant's id and its engine."""
        tenant_id, engine = self._lookup(self._key)
        return tenant_id, engine.execution_options(**self._options) if self._options else engine

    def learn(self, tenant_id: UUID) -> None:
        self._key = tenant_id


class PinnedSession:
    """Mixed into the application's session class by `pinned`."""

    def __init__(self, *args: Any, pin: Pin, **options: Any) -> None:
        self._tenantdb_pin = pin
        self._tenantdb_copying = False  # while objects are merged, whose copies have a key and have been in no session
        super().__init__(*args, **options)
        self.hash_key = SessionKey(self.hash_key)  # type: ignore[has-type]
        self.hash_key.tenant_id = pin.known

    # -- where SQL goes ----------------------------------------------------------------------------------------------------------------

    def get_bind(self, mapper: Any = None, *, bind: Any = None, **context: Any) -> Any:
        """The tenant's engine, whatever is executed. Raises: the typed error that says why the tenant cannot be served."""
        self._refuse_other(bind)
        engine = self._tenants_engine()
        if self._flushing and self._tenantdb_pin.leased is None:  # type: ignore[attr-defined]
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
        return super()._connection_for_bind(self._tenants_engine(), execution_options, **options)  # type: ignore[misc]

    def _tenants_engine(self) -> Any:
        pin = self._tenantdb_pin
        if pin.leased is not None:
            return pin.leased
        tenant_id, engine = pin.look_up()
        if pin.known is None:
            for mapped in self:  # type: ignore[attr-defined]  # what was added while there was nothing to compare it with
                refuse_foreign(instance_state(mapped), tenant_id)
            pin.learn(tenant_id)
            self.hash_key.tenant_id = tenant_id
        return engine

    def _refuse_other(self, bind: Any) -> None:
        if bind is not None and bind is not self._tenantdb_pin.leased:
            raise ConfigError("a tenant's session does not take another bind; open a plain Session for databases that are no tenant's")

    # -- whose objects it takes --------------------------------------------------------------------------------------------------------

    def refresh(self, instance: Any, *args: Any, **options: Any) -> None:
        self._refuse_foreign(instance)
        super().refresh(instance, *args, **options)  # type: ignore[misc]

    def bulk_save_objects(self, objects: Iterable[Any], *args: Any, **options: Any) -> None:
        """These are in no session, before and after: objects with a row are updated by their primary key."""
        objects = list(objects)
        for mapped in objects:
            self._refuse_foreign(mapped)
        super().bulk_save_objects(objects, *args, **options)  # type: ignore[misc]

    def _merge(self, state: Any, *args: Any, **options: Any) -> Any:
        """Merge one object, with all that it is related to; also for recipes for caches, which do not call `merge`."""
        if self._tenantdb_copying:
            return super()._merge(state, *args, **options)  # type: ignore[misc]
        tenant_id = self._tenants_id()
        refuse_foreign(state, tenant_id)
        for _, _, related, _ in state.mapper.cascade_iterator("merge", state):  # all, before the first of them is looked for
            refuse_foreign(related, tenant_id)
        self._tenantdb_copying = True
        try:
            return super()._merge(state, *args, **options)  # type: ignore[misc]
        finally:
            self._tenantdb_copying = False

    def _refuse_foreign(self, mapped: Any) -> None:
        state = inspect(mapped, raiseerr=False)
        if isinstance(state, InstanceState):  # SQLAlchemy says what is wrong with anything else
            refuse_foreign(state, self._tenants_id())

    def _tenants_id(self) -> UUID:
        if self._tenantdb_pin.known is None:
            self._tenants_engine()
        return self._tenantdb_pin.tenant_id

    def expunge_all(self) -> None:
        self._stamp(self.identity_map.all_states())  # type: ignore[attr-defined]
        super().expunge_all()  # type: ignore[misc]

    def _expunge_states(self, states: Any, *args: Any, **options: Any) -> None:
        """Every other way out: `expunge`, ``make_transient``, a rollback of what was flushed."""
        self._stamp(states)
        super()._expunge_states(states, *args, **options)  # type: ignore[misc]

    def _stamp(self, states: Any) -> None:
        """Where the tenant is not known yet, nothing in here has been seen by a database; what has a stamp keeps it."""
        owner = self._tenantdb_pin.known
        if owner is not None:
            stamp(states, owner)


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

    @event.listens_for(made, "before_attach")
    def take(session: Any, mapped: Any) -> None:
        """Whatever is added or deleted, and what it is related to. In asyncio nothing can be looked up here: where the tenant is not known
        by its id yet, that is made up for before SQL is sent."""
        state, pin = instance_state(mapped), session._tenantdb_pin
        owner = owner_of(state)
        if owner is None and (state.key is None or session._tenantdb_copying):
            return
        if pin.known is not None or not pin.is_async:
            refuse_foreign(state, session._tenants_id())

    @event.listens_for(made, "deleted_to_detached")
    def part(session: Any, mapped: Any) -> None:
        stamp([instance_state(mapped)], session._tenantdb_pin.tenant_id)

    return made


def check_session_options(options: dict[str, Any]) -> dict[str, Any]:
    """Refuse options that would lead a session elsewhere. Raises: `ConfigError`."""
    if options and (wrong := [name for name in _RESERVED if name in options]):
        raise ConfigError(f"session_options cannot contain {', '.join(wrong)}: the tenant decides where a session goes")
    return options
