"""One script sent to a tenant's database as its owner role, on a connection of its own: the way of a fleet migration.

A script is one message of the simple protocol, transaction and guard included, so a tenant costs a login and one round trip.
"""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg

from tenantdb.backends.base import ConnectFailed, Location
from tenantdb.backends.postgresql.connect import (
    check_login,
    connect_failure,
    connect_problem,
    is_refused_password,
    session_options,
    transport,
    without_frames,
)
from tenantdb.settings import Settings


async def send_script(location: Location, settings: Settings, script: str) -> list[tuple[Any, ...]]:
    """Returns the rows of the last statement.

    Raises: what psycopg raises, by which the server has undone the script or, where the connection was lost, perhaps not; `ConnectFailed`
    before anything was sent; `WrongDatabase`.
    """
    arguments = transport(location.host, settings) | session_options(location.role, settings)
    connection = await _connect(location, arguments)
    try:
        check_login(connection.info, location.tenant, location.tenant.owner_role)
        cursor = await connection.execute(script.encode(), prepare=False)
        while cursor.nextset():
            pass
        return await cursor.fetchall() if cursor.description else []
    finally:
        await connection.close()


async def _connect(location: Location, arguments: dict[str, Any]) -> psycopg.AsyncConnection[Any]:
    password = location.password  # called in the call itself: tools that report errors show the variables of every frame
    while True:
        try:
            return await psycopg.AsyncConnection.connect(
                host=location.host,
                port=location.port,
                user=location.tenant.owner_role,
                dbname=location.tenant.database,
                password=password(),
                autocommit=True,
                **arguments,
            )
        except psycopg.OperationalError as error:
            refused = password is location.password and is_refused_password(error)
            other = await asyncio.to_thread(location.other_password) if refused else None  # reads the registry
            if other is None:
                raise ConnectFailed(connect_failure(error), connect_problem(error)) from without_frames(error)
            password = other
