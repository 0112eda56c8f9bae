"""A connection that goes back to its pool clean, and costs nobody a round trip for it.

What a request leaves on a connection (settings, a role, LISTEN, advisory locks, cursors, an open transaction) is undone by one message,
the *reset*. It is sent when the connection is returned and nobody waits for the answer; the next user reads it before he starts, and by
then it has long arrived. For a session that ends without commit even the ROLLBACK travels in it.

What the module keeps true:

1. Between sending and reading, psycopg would refuse everything with "another command is already in progress". So `wait`, through which
   every operation of psycopg goes, reads the answer first. Nothing but the pool has to know that one is outstanding.
2. A connection whose reset did not work in every part, or whose server said anything beyond it, is never used again.
3. What cannot be reset (a query or COPY under way, a pipeline, a two-phase transaction) is refused, and the pool closes it.
4. Statements go by the extended protocol, where the server refuses a second statement behind a semicolon.

Not undone, because it is worth more than it costs: the statements that psycopg has prepared. They go where they could be wrong: after an
error, with temporary tables, and with a PREPARE of the application's own.

A migration that changes what a prepared statement returns makes the server refuse it ("cached plan must not change result type"), until
this process has heard of the migration. So what selects a star, which any new column changes, is not prepared; and what is refused at the
beginning of a transaction, where nothing can be lost, is sent again.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.errors import Diagnostic
from psycopg.pq import ConnStatus, ExecStatus, TransactionStatus
from psycopg.waiting import Wait
from sqlalchemy import create_engine
from sqlalchemy.engine import URL, Engine
from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect
from sqlalchemy.pool import NullPool

from tenantdb.backends.hangup import becomes_readable, is_readable

if TYPE_CHECKING:
    from psycopg._cursor_base import BaseCursor
    from psycopg.abc import PQGen

    _Mixin = BaseCursor[Any, Any]
else:
    _Mixin = object

PING = b"SELECT 1"
_NO_CONNECTION = b"sslmode=none"  # refused when it is parsed: no socket is made
_NOWHERE = URL.create("postgresql")
_GOOD = (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK)
_OPEN = (TransactionStatus.INTRANS, TransactionStatus.INERROR)


_OUTDATED = "RevalidateCachedQuery"  # the server's function that says "cached plan must not change result type", in whatever language
_STAR = re.compile(rb"(?<![(\s])\s*\*\s*(?:[,;)]|$|(?i:from|into)\b)")  # neither count(*) nor a product
_SILENCE = "timeout: the server did not answer a question about the session"

Rows = list[tuple[str | None, ...]]


def _rows(results: list[Any]) -> Rows:
    for result in results:
        if result.status not in _GOOD:
            raise psycopg.errors.error_from_result(result)
    *_, last = results
    values = [[last.get_value(row, column) for column in range(last.nfields)] for row in range(last.ntuples)]
    return [tuple(None if value is None else value.decode() for value in row) for row in values]


@functools.cache
def reset_message(*, rollback: bool, temporary: bool, prepared: bool) -> bytes:
    """The reset. DISCARD ALL would do more (it throws away psycopg's prepared statements and cached plans) and cannot follow ROLLBACK."""
    statements = [
        "ROLLBACK" if rollback else "",
        "SET SESSION AUTHORIZATION DEFAULT",  # the role as well
        "RESET ALL",  # to what the start-up options say
        "CLOSE ALL",
        "UNLISTEN *",
        "SELECT pg_advisory_unlock_all()",  # not among the functions that bootstrapping takes from PUBLIC: it only ever lets go
        "DISCARD TEMP" if temporary else "",
        "DEALLOCATE ALL" if prepared else "",
    ]
    return "; ".join(filter(None, statements)).encode()


@functools.lru_cache(1024)
def _has_star(query: bytes) -> bool:
    """Whether a new column of a table is one of the result's too, as far as a glance can tell."""
    return _STAR.search(query) is not None


class _Statement(_Mixin):
    """What every cursor of the application does differently. Server-side cursors of psycopg use the extended protocol by themselves."""

    __slots__ = ()

    def _reset(self, reset_query: bool = True) -> None:
        super()._reset(reset_query)
        self._conn._has_begun = False

    def _get_prepared(self, pgq: Any, prepare: bool | None = None) -> Any:
        return super()._get_prepared(pgq, False if _has_star(pgq.query) else prepare)

    def _maybe_prepare_gen(self, pgq: Any, *, prepare: bool | None = None, binary: bool | None = None) -> PQGen[None]:
        try:
            yield from super()._maybe_prepare_gen(pgq, prepare=prepare, binary=binary)
        except psycopg.errors.FeatureNotSupported as error:
            if error.diag.source_function != _OUTDATED or not self._conn._is_untouched:
                raise
            yield from self._conn._begin_anew()
            yield from super()._maybe_prepare_gen(pgq, prepare=prepare, binary=binary)

    def _execute_send(self, query: Any, *, force_extended: bool = False, binary: bool | None = None) -> None:
        super()._execute_send(query, force_extended=True, binary=binary)

    def _set_results(self, results: list[Any]) -> None:
        super()._set_results(results)
        self._conn._has_begun = False
        if results and results[0].command_status == b"PREPARE":
            self._conn._has_prepared = True


class Cursor(_Statement, psycopg.Cursor[Any]):
    __slots__ = ()


class AsyncCursor(_Statement, psycopg.AsyncCursor[Any]):
    __slots__ = ()


class _Wire(psycopg.BaseConnection[Any]):
    """What both colours share; nothing here waits."""

    discard_temp = False  # whether this server's tenants may make temporary tables
    _deferring = False  # ROLLBACK may travel in the reset
    _pending = False  # something of ours was sent and its answer not read to the end
    _failed = False  # a part of the answer was an error, which is the end
    _has_prepared = False  # the application has used PREPARE
    _has_begun = False  # a transaction, for the very statement that is under way

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._poll = select.poll()
        self._poll.register(self.pgconn.socket, select.POLLIN)
        self._last_words: list[Diagnostic] = []
        self.add_notice_handler(functools.partial(_keep_fatal, self._last_words))

    def defer(self) -> None:
        """From now on until the return, a rollback is the end: let ROLLBACK travel in the reset."""
        self._deferring = True

    def send_reset(self) -> bool:
        """At the return to the pool: send the reset unless a rollback has. Never waits. False: it cannot be reset, close it."""
        self._deferring = False
        if not self._pending:
            status = self.pgconn.transaction_status
            if self._is_entangled or (status not in _OPEN and status != TransactionStatus.IDLE):
                return False
            try:
                self._send_reset(status)
            except psycopg.OperationalError:
                return False
        self._forget_modes()
        return True

    def settled(self) -> bool | None:
        """At checkout: True when the connection is clean and silent, False when it must be closed, None when the answer is on its way."""
        if self.pgconn.status != ConnStatus.OK:
            return False
        if self._pending and (clean := self._take_in()) is not True:
            return clean
        return not self._poll.poll(0)  # everything has been read, so whatever is there now is the server's goodbye

    def disown(self) -> object:
        """In a forked child, whose copy of the connection is the parent's: whatever is called finds it closed. Returns what must not be
        collected, because that would close the parent's too."""
        inherited, self.pgconn = self.pgconn, type(self.pgconn).connect_start(_NO_CONNECTION)
        return inherited

    def finish(self) -> int | None:
        """Close without waiting, from any thread, whatever the colour. None: it was closed already.

        Otherwise a copy of the socket, on which to wait until the server has hung up (`tenantdb.backends.hangup`).
        """
        copy: int | None = None
        with contextlib.suppress(psycopg.OperationalError, OSError):  # it is lost, or the process has run out of descriptors
            copy = os.dup(self.pgconn.socket)
        self.pgconn.finish()
        return copy

    @property
    def _is_entangled(self) -> bool:
        return bool(self._pipeline or self._tpc or self._num_transactions)

    def _get_tx_start_command(self) -> bytes:
        self._has_begun = True
        return super()._get_tx_start_command()

    @property
    def _is_untouched(self) -> bool:
        """After an error of the server: nothing came before it that would be lost if the transaction began anew."""
        status = self.pgconn.transaction_status
        first = status == TransactionStatus.IDLE or (status == TransactionStatus.INERROR and self._has_begun)
        return first and not self._has_prepared and not self._is_entangled

    def _begin_anew(self) -> PQGen[None]:
        """Without the statements that psycopg has prepared: one that a migration has outdated is seldom alone."""
        if self.pgconn.transaction_status != TransactionStatus.IDLE:
            yield from self._exec_command(b"ROLLBACK")
        self._prepared.clear()
        yield from self._prepared.maintain_gen(self)
        yield from self._start_query()

    def _gather(self, results: list[Any]) -> bool:
        """Read what has arrived of an answer. True when it is complete."""
        self.pgconn.consume_input()
        while not self.pgconn.is_busy():
            result = self.pgconn.get_result()
            if result is None:
                return True
            results.append(result)
        return False

    def _rolls_back_later(self) -> bool:
        """Instead of a rollback, where that is allowed."""
        if self._pending:
            return True
        status = self.pgconn.transaction_status
        if not self._deferring or status not in _OPEN or self._is_entangled:
            return False
        self._send_reset(status)
        return True

    def _send_reset(self, status: TransactionStatus | int) -> None:
        # An error may be the fault of a plan that a migration has outdated, and without its table so may any plan.
        prepared = self._has_prepared or self.discard_temp or status == TransactionStatus.INERROR
        self._send(reset_message(rollback=status in _OPEN, temporary=self.discard_temp, prepared=prepared))
        if prepared:
            self._has_prepared = False
            self._prepared.clear()
            self._prepared._to_flush.clear()  # psycopg's own DEALLOCATE ALL

    def _send(self, message: bytes) -> None:
        self.pgconn.send_query(message)  # what does not fit into the socket follows with `consume_input`
        self._pending = True

    def _asks(self) -> bool:
        try:
            self._send(PING)
        except psycopg.OperationalError:
            return False
        return True

    def _take_in(self) -> bool | None:
        """Read what has arrived. True: the answer is complete and good. False: the connection is lost. None: more is to come."""
        pgconn = self.pgconn
        try:
            pgconn.consume_input()
            while not pgconn.is_busy():
                result = pgconn.get_result()
                if result is None:
                    break
                if result.status not in _GOOD:
                    self._failed = True
            else:
                return None
            while pgconn.notifies():
                pass  # for the previous user
        except psycopg.OperationalError:
            return False
        # A server that ends the session says so and hangs up later. What it said may have come along with the answer: then it is not in
        # the socket any more, where a poll would show it, but libpq has handed it to our notice handler.
        if self._failed or self._last_words:
            return False
        self._pending = False
        return True

    def _drain(self) -> PQGen[None]:
        """Before an operation that found an answer outstanding."""
        while (clean := self._take_in()) is None:
            yield Wait.R
        if not clean:
            self.pgconn.finish()
            raise psycopg.OperationalError("the connection was closed: what an earlier transaction left on it could not be undone")

    def _forget_modes(self) -> None:
        """What is set on psycopg's object and not on the server; SQLAlchemy undoes what was set through SQLAlchemy."""
        self._autocommit = False
        if self._isolation_level is not None or self._read_only is not None or self._deferrable is not None:
            self._isolation_level = self._read_only = self._deferrable = None
            self._begin_statement = b""
        self._notify_handlers.clear()
        if self._notifies_backlog:
            self._notifies_backlog.clear()


class Wire(_Wire, psycopg.Connection[Any]):
    """For threads. Between two uses a connection belongs to its pool, which alone calls what is not psycopg's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cursor_factory = Cursor

    def wait(self, gen: PQGen[Any], *args: Any, **kwargs: Any) -> Any:
        if self._pending:
            super().wait(self._drain())
        return super().wait(gen, *args, **kwargs)

    def ask(self, question: bytes, timeout: float) -> Rows:
        """The rows of a question of our own as text, in one round trip and no transaction. Raises: what psycopg raises."""
        deadline, results = time.monotonic() + timeout, list[Any]()
        self.pgconn.send_query(question)
        while not self._gather(results):
            if not is_readable(self.pgconn.socket, deadline - time.monotonic()):
                raise psycopg.OperationalError(_SILENCE)
        return _rows(results)

    def rollback(self) -> None:
        if not self._rolls_back_later():
            super().rollback()

    def settle(self, timeout: float) -> bool:
        """`settled`, waiting up to ``timeout`` seconds. False: close it."""
        deadline = time.monotonic() + timeout
        while (clean := self.settled()) is None:
            if not is_readable(self.pgconn.socket, deadline - time.monotonic()):
                return False
        return clean

    def ping(self, timeout: float) -> bool:
        """After a long rest: one round trip, up to ``timeout`` seconds. False: close it."""
        deadline = time.monotonic() + timeout
        return self.settle(timeout) and self._asks() and self.settle(deadline - time.monotonic())


class AsyncWire(_Wire, psycopg.AsyncConnection[Any]):
    """For one event loop. Only `finish` may be called from elsewhere."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cursor_factory = AsyncCursor

    async def wait(self, gen: PQGen[Any], *args: Any, **kwargs: Any) -> Any:
        if self._pending:
            await super().wait(self._drain())
        return await super().wait(gen, *args, **kwargs)

    async def ask(self, question: bytes, timeout: float) -> Rows:
        """The rows of a question of our own as text, in one round trip and no transaction. Raises: what psycopg raises."""
        deadline, results = time.monotonic() + timeout, list[Any]()
        self.pgconn.send_query(question)
        while not self._gather(results):
            if not await becomes_readable(self.pgconn.socket, deadline - time.monotonic()):
                raise psycopg.OperationalError(_SILENCE)
        return _rows(results)

    async def rollback(self) -> None:
        if not self._rolls_back_later():
            await super().rollback()

    async def settle(self, timeout: float) -> bool:
        """`settled`, waiting up to ``timeout`` seconds; does not suspend when the answer is there. False: close it.

        When it is cancelled the answer is still outstanding, and the connection may be settled again.
        """
        deadline = time.monotonic() + timeout
        while (clean := self.settled()) is None:
            if not await becomes_readable(self.pgconn.socket, deadline - time.monotonic()):
                return False
        return clean

    async def ping(self, timeout: float) -> bool:
        """After a long rest: one round trip, up to ``timeout`` seconds. False: close it."""
        deadline = time.monotonic() + timeout
        return await self.settle(timeout) and self._asks() and await self.settle(deadline - time.monotonic())


def connect(dialect: Dialect, *, discard_temp: bool = False, **arguments: Any) -> DBAPIConnection:
    """Open a connection, as the dialect's own `connect` does; for asyncio inside SQLAlchemy's greenlet. ``arguments`` are psycopg's.

    The `Wire` or `AsyncWire` is the ``driver_connection`` of what a pool holds. ``cursor_factory=psycopg.Cursor`` takes several statements
    at once again, as migrations have them. Raises: what psycopg raises.
    """
    arguments = {**dialect.create_connect_args(_NOWHERE)[1], **arguments}  # how the dialect wants values to be adapted
    opened: Any
    if dialect.is_async:
        opened = dialect.connect(async_creator_fn=AsyncWire.connect, **arguments)
    else:
        opened = Wire.connect(**arguments)
    dialect.get_driver_connection(opened).discard_temp = discard_temp
    return opened  # type: ignore[no-any-return]


def template_engine(creator: Callable[[], DBAPIConnection], *, is_async: bool, **options: Any) -> Engine:
    """An engine to take the dialect from: connect once, and ``template.dialect`` serves any number of ``Engine(pool, dialect, url)``.

    ``creator`` opens any connection to the server; for asyncio it runs inside SQLAlchemy's greenlet.
    """
    driver = "psycopg_async" if is_async else "psycopg"
    return create_engine(
        f"postgresql+{driver}://", creator=creator, poolclass=NullPool, use_native_hstore=False, hide_parameters=True, **options
    )


def _keep_fatal(last_words: list[Diagnostic], said: Diagnostic) -> None:
    if said.severity_nonlocalized in ("FATAL", "PANIC"):
        last_words.append(said)
