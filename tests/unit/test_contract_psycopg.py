"""What `tenantdb.backends.postgresql.wire` takes for granted about the inside of psycopg and SQLAlchemy.

A failure here means that a new version of one of them has to be read before it can be used. No server is needed.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psycopg
import psycopg.connection
import psycopg.connection_async
import pytest
from psycopg import pq, waiting
from psycopg._cursor_base import BaseCursor
from psycopg._preparing import Prepare, PrepareManager
from psycopg._server_cursor_base import ServerCursorMixin
from sqlalchemy.pool import NullPool
from sqlalchemy.util import greenlet_spawn

from tenantdb.backends.postgresql import wire


def silent_pgconn() -> Any:
    """A libpq connection that records what it is told to send; closed, or psycopg would warn that nobody has closed it."""
    return Mock(status=pq.ConnStatus.BAD, transaction_status=pq.TransactionStatus.IDLE, socket=0)


def parameters(function: Any) -> dict[str, Any]:
    return {name: each.kind.name for name, each in inspect.signature(function).parameters.items()}


# psycopg


def test_a_statement_is_sent_by_execute_send_which_can_be_made_to_use_the_extended_protocol() -> None:
    assert parameters(BaseCursor._execute_send) == {
        "self": "POSITIONAL_OR_KEYWORD",
        "query": "POSITIONAL_OR_KEYWORD",
        "force_extended": "KEYWORD_ONLY",
        "binary": "KEYWORD_ONLY",
    }
    query: Any = SimpleNamespace(query=b"SELECT 1", params=None, formats=None, types=())
    cursors: list[tuple[Any, Any, str]] = [
        (psycopg.Cursor, psycopg.Connection, "send_query"),
        (psycopg.AsyncCursor, psycopg.AsyncConnection, "send_query"),
        (wire.Cursor, psycopg.Connection, "send_query_params"),
        (wire.AsyncCursor, psycopg.AsyncConnection, "send_query_params"),
    ]
    for cursor, connection, sends in cursors:
        pgconn = silent_pgconn()
        cursor(connection(pgconn))._execute_send(query)
        assert [name for name, *_ in pgconn.method_calls] == [sends]


def test_execute_and_copy_send_by_it_and_server_side_cursors_use_the_extended_protocol_themselves() -> None:
    senders: dict[str, list[Any]] = {
        "self._execute_send(": [BaseCursor._maybe_prepare_gen, BaseCursor._start_copy_gen],
        "force_extended=True)": [ServerCursorMixin._declare_gen, BaseCursor._stream_send_gen],
    }
    for text, functions in senders.items():
        for function in functions:
            assert text in inspect.getsource(function)


def test_every_result_of_execute_goes_through_set_results() -> None:
    assert parameters(BaseCursor._set_results) == dict.fromkeys(("self", "results"), "POSITIONAL_OR_KEYWORD")
    assert "self._set_results(results)" in inspect.getsource(BaseCursor._maybe_prepare_gen)


def waiting_calls(module: Any) -> Iterator[tuple[str, str]]:
    """(method, what it calls) for each call of a function of ``psycopg.waiting`` in a module."""
    for function in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "waiting":
                    yield function.name, node.attr


def test_whatever_a_connection_does_it_waits_for_in_wait() -> None:
    """Connecting and cancelling apart, which use sockets of their own."""
    for module, suffix in ((psycopg.connection, ""), (psycopg.connection_async, "_async")):
        assert set(waiting_calls(module)) == {
            ("wait", f"wait{suffix}"),
            ("connect", f"wait_conn{suffix}"),
            ("cancel_safe", f"wait_conn{suffix}"),
        }
    for connection in (psycopg.Connection, psycopg.AsyncConnection):
        assert list(parameters(connection.wait))[:2] == ["self", "gen"]
        for operation in ("commit", "rollback", "set_autocommit", "set_isolation_level", "set_read_only", "set_deferrable", "tpc_begin"):
            assert "self.wait(self._" in inspect.getsource(getattr(connection, operation)), operation


def test_a_generator_says_what_it_waits_for() -> None:
    assert waiting.Wait.R == waiting.WAIT_R


def test_a_connection_keeps_its_modes_and_entanglements_where_we_look() -> None:
    connection: Any = psycopg.Connection(silent_pgconn())
    assert connection._autocommit is False
    assert (connection._isolation_level, connection._read_only, connection._deferrable, connection._begin_statement) == (
        None,
        None,
        None,
        b"",
    )
    assert (connection._pipeline, connection._tpc, connection._num_transactions) == (None, None, 0)
    assert list(connection._notify_handlers) == [] and not connection._notifies_backlog
    connection.set_autocommit(True)
    connection.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
    connection.set_read_only(True)
    connection.set_deferrable(True)
    assert connection._get_tx_start_command() == b"BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE" == connection._begin_statement

    wire._Wire._forget_modes(connection)

    assert connection.autocommit is False and connection._get_tx_start_command() == b"BEGIN"


def test_the_cache_of_prepared_statements_can_be_emptied_without_a_command_of_its_own() -> None:
    manager = PrepareManager()
    query: Any = SimpleNamespace(query=b"SELECT 1", types=())
    manager.maybe_add_to_cache(query, Prepare.SHOULD, b"_pg3_0")
    assert manager.get(query)[0] is Prepare.YES

    manager.clear()

    assert manager.get(query)[0] is Prepare.NO
    assert list(manager._to_flush) == [None]  # DEALLOCATE ALL
    assert isinstance(psycopg.Connection(silent_pgconn())._prepared, PrepareManager)


def test_psycopg_empties_it_at_each_rollback_which_is_why_ours_does_not_go_there() -> None:
    assert "_prepared.clear()" in inspect.getsource(psycopg.BaseConnection._rollback_gen)


def test_a_fatal_message_is_told_whatever_the_language_of_the_server() -> None:
    assert isinstance(psycopg.errors.Diagnostic.severity_nonlocalized, property)


# SQLAlchemy


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Opens nothing; the arguments of each connection."""
    seen: list[dict[str, Any]] = []

    def connect(**arguments: Any) -> Any:
        seen.append(arguments)
        return wire.Wire(silent_pgconn())

    async def connect_async(**arguments: Any) -> Any:
        seen.append(arguments)
        return wire.AsyncWire(silent_pgconn())

    monkeypatch.setattr(wire.Wire, "connect", connect)
    monkeypatch.setattr(wire.AsyncWire, "connect", connect_async)
    monkeypatch.setattr("select.poll", Mock())
    return seen


@pytest.mark.parametrize("is_async", [False, True])
def test_a_dialect_opens_ours_and_a_rollback_of_sqlalchemy_comes_to_it(
    monkeypatch: pytest.MonkeyPatch, opened: list[dict[str, Any]], is_async: bool
) -> None:
    dialect = wire.template_engine(Mock(), is_async=is_async).dialect
    kind = wire.AsyncWire if is_async else wire.Wire

    def scenario() -> None:
        connection: Any = wire.connect(dialect, discard_temp=True, dbname="acme")
        driver: Any = dialect.get_driver_connection(connection)
        assert type(driver) is kind and driver.discard_temp is True
        assert driver.cursor_factory is (wire.AsyncCursor if is_async else wire.Cursor)
        later = Mock(return_value=True)
        monkeypatch.setattr(driver, "_rolls_back_later", later)
        dialect.do_rollback(connection)
        later.assert_called_once_with()

    if is_async:
        asyncio.run(greenlet_spawn(scenario))
    else:
        scenario()
    assert opened == [{"dbname": "acme", "context": dialect._psycopg_adapters_map}]  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_template_is_of_its_colour_keeps_no_connection_and_asks_the_server_for_no_extension(is_async: bool) -> None:
    template = wire.template_engine(Mock(), is_async=is_async)
    assert template.dialect.is_async is is_async and template.dialect.driver.startswith("psycopg")
    assert isinstance(template.pool, NullPool) and template.hide_parameters
    assert template.dialect.use_native_hstore is False  # type: ignore[attr-defined]


# The message


def test_the_reset_rolls_back_first_and_throws_away_only_what_it_is_told() -> None:
    least = b"SET SESSION AUTHORIZATION DEFAULT; RESET ALL; CLOSE ALL; UNLISTEN *; SELECT pg_advisory_unlock_all()"
    assert wire.reset_message(rollback=False, temporary=False, prepared=False) == least
    assert wire.reset_message(rollback=True, temporary=True, prepared=True) == b"ROLLBACK; " + least + b"; DISCARD TEMP; DEALLOCATE ALL"


def test_an_error_can_be_made_from_a_result() -> None:
    assert next(iter(inspect.signature(psycopg.errors.error_from_result).parameters)) == "result"
