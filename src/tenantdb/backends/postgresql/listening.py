"""A connection to the registry that listens, beside the pool: what is told to a channel comes to whoever is connected at that moment."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import sql

from tenantdb.backends.postgresql.connect import connect_problem, password_argument, session_options, transport, without_frames
from tenantdb.errors import RegistryUnavailable
from tenantdb.settings import ConnectionURL, Settings


class PostgreSQLEar:
    """Listens to a channel. Of one thread."""

    def __init__(self, url: ConnectionURL, settings: Settings, channel: str) -> None:
        """Raises: `RegistryUnavailable`."""
        self._early: list[str] = []
        arguments: dict[str, Any] = transport(url.host, settings, url.tls) | session_options(None, settings)
        try:
            self._connection: psycopg.Connection[Any] = psycopg.connect(
                host=url.host,
                port=url.port,
                user=url.username,
                dbname=url.database,
                autocommit=True,
                **arguments,
                **password_argument(url),
            )
        except psycopg.OperationalError as error:
            raise RegistryUnavailable(connect_problem(error)) from without_frames(error)
        self._connection.add_notify_handler(lambda notify: self._early.append(notify.payload))  # what comes with the answer to LISTEN
        try:
            self._connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
        except psycopg.Error as error:
            self._connection.close()
            raise RegistryUnavailable("it does not let this login listen") from error

    def fileno(self) -> int:
        return self._connection.pgconn.socket

    def heard(self) -> list[str]:
        """What has been told since. Raises: `RegistryUnavailable` where the connection is lost."""
        found, self._early = self._early, []
        try:
            pgconn = self._connection.pgconn
            pgconn.consume_input()
            while (notify := pgconn.notifies()) is not None:
                found.append(notify.extra.decode(errors="replace"))
        except psycopg.OperationalError as error:
            raise RegistryUnavailable("the connection that listens was lost") from error
        return found

    def close(self) -> None:
        self._connection.close()
