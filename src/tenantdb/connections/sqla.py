"""Everything that leans on SQLAlchemy's internals, in one place.

tests/unit/test_contract_sqlalchemy.py holds each of them to what is assumed here, on 2.0 and on 2.1:

- `Engine` is what `create_engine` makes, and may be made from a pool, a dialect and a URL; its compiled cache and its listeners are
  attributes, and thousands of engines may share one of each.
- A pool may take over another's listeners (``_dispatch``, as its own `recreate` does), among them the one that initialises the dialect at
  the first connect of any of them. The others are not kept from connecting meanwhile, so they wait here.
- A record of a pool can be made unconnected. SQLAlchemy connects it when it is checked out, and returns it to the pool when that fails.
- A pool closes connections through `_close_connection`, and returns records through `_do_return_conn`: without a connection when it was
  closed, or detached.
- A record that is given back calls listeners first and ``_return_conn`` last. One that is closed calls listeners first as well.
- A session connects through its `_connection_for_bind`. Only its unit of work goes past it, by way of `get_bind`, while ``_flushing``.
- An object in a session holds the session's ``hash_key``, the very object, also when the session has been collected; and it leaves by
  `expunge_all`, by `_expunge_states`, or by ``deleted_to_detached``. Whatever is merged passes through `_merge`.
"""

from __future__ import annotations

import asyncio
import time
from operator import attrgetter
from typing import Any, cast

from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.pool import Pool
from sqlalchemy.pool.base import _ConnectionRecord
from sqlalchemy.util import await_only

_PATIENCE = 10.0  # seconds for a few queries
_GLANCE = 0.005  # seconds between looks at whether a dialect is initialised, which happens once


class Record(_ConnectionRecord):
    """A pool's record of one connection, with its place in the budget."""

    unit: Any
    deadline: float

    def __init__(self, pool: BudgetedPool, unit: Any, deadline: float) -> None:
        super().__init__(pool, connect=False)
        self._pool = pool
        self.unit = unit
        self.deadline = deadline

    def get_connection(self) -> Any:
        """Connect if need be; not before the dialect knows what it has to know of the server."""
        connection = super().get_connection()
        if self.fresh and not self._pool.initialisation.done:
            self._wait_for_the_dialect()
        return connection

    def _wait_for_the_dialect(self) -> None:
        initialisation, until = self._pool.initialisation, time.monotonic() + _PATIENCE
        while not initialisation.done and not initialisation.failed and time.monotonic() < until:
            if self._pool._is_asyncio:
                await_only(asyncio.sleep(_GLANCE))
            else:
                time.sleep(_GLANCE)

    def checkin(self, _fairy_was_created: bool = True) -> None:
        """Give the record back, whatever a listener does. Where one raises, the connection is closed, for SQLAlchemy leaves it in the hands
        of the `Connection` whose close failed."""
        leased = self.fairy_ref is not None or not _fairy_was_created
        try:
            super().checkin(_fairy_was_created)
        except BaseException:
            if leased:
                self.close()
            raise
        finally:
            if leased:
                self._pool._do_return_conn(self)

    def _checkin_failed(self, err: BaseException, _fairy_was_created: bool = True) -> None:
        try:
            self.invalidate(err)
        finally:  # SQLAlchemy 2.0.44 has none
            self.checkin(_fairy_was_created)

    def close(self) -> None:
        """Close the connection, also where a listener raises before SQLAlchemy has come to that."""
        try:
            super().close()
        finally:
            connection, self.dbapi_connection = self.dbapi_connection, None
            if connection is not None:
                self._pool._close_connection(connection)


class TenantEngine(Engine):
    """An engine of one tenant that has everything but its pool and URL from a template."""

    def __init__(self, pool: Pool, url: URL, template: Engine) -> None:
        self._template = template
        super().__init__(pool, template.dialect, url, query_cache_size=0, hide_parameters=template.hide_parameters)
        self._compiled_cache = template._compiled_cache
        self.dispatch = template.dispatch

    def _tell_template(self, value: bool) -> None:
        self._template._has_events = value

    _has_events = property(attrgetter("_template._has_events"), _tell_template)  # asked six times for each transaction


class Initialisation:
    """Whether the dialect that a template's engines share has been initialised, by the first connection of any of them."""

    __slots__ = ("done", "failed")

    def __init__(self) -> None:
        self.done = self.failed = False

    @classmethod
    def of(cls, template: Engine) -> Initialisation:
        """The template's one."""
        dialect: Any = template.dialect
        new = cls()
        found: Initialisation = dialect.__dict__.setdefault("_tenantdb_initialisation", new)
        if found is new:
            initialize = dialect.initialize

            def noted(connection: Connection) -> None:
                new.failed = False
                try:
                    initialize(connection)
                except BaseException:
                    new.failed = True
                    raise
                new.done = True

            dialect.initialize = noted
        return found


class BudgetedPool(Pool):
    """What a pool needs of SQLAlchemy's to take its connections from somewhere else. ``_open`` and ``_finish`` are the subclass's."""

    def __init__(self, template: Engine) -> None:
        self.template = template
        self.initialisation = Initialisation.of(template)
        super().__init__(
            cast("Any", _never_called),
            dialect=template.dialect,
            reset_on_return=template.pool._reset_on_return,
            _dispatch=template.pool.dispatch,
        )
        del self._invoke_creator  # an attribute of each pool, which would keep a cycle of references; the method takes its place

    def _invoke_creator(self, record: Any) -> Any:  # type: ignore[override]
        return self._open(record)

    def _should_wrap_creator(self, creator: Any) -> Any:
        return creator  # nothing to find out by its signature, which takes longer than all the rest

    def _open(self, record: Record) -> Any:
        raise NotImplementedError

    def _finish(self, connection: Any) -> None:
        raise NotImplementedError

    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        self.logger.debug("Closing connection %r", connection)
        self._finish(connection)

    def _return_conn(self, record: Any) -> None:
        """Nothing: `Record.checkin` returns it, which a listener could keep SQLAlchemy from."""


def wire_of(connection: Connection) -> Any:
    """The wire under a connection of a tenant's engine, whose lease has begun."""
    return connection.connection._connection_record.unit.wire


def _never_called(record: Any) -> Any:
    raise NotImplementedError
