"""The database servers that hold tenants' databases.

A server's address is sealed with a runtime key when it is written and checked whenever it is read: whoever edits the row to lead
connections to a machine of his own is found out before a password is sent there. No credentials of a provisioner are stored.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import URL, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from tenantdb.errors import ConfigError, CredentialTampered, NoServerAvailable
from tenantdb.model import Server, TenantState
from tenantdb.registry import audit, tables
from tenantdb.registry.secrets import RUNTIME, Keyring
from tenantdb.registry.transactions import Transactions, violates
from tenantdb.settings import POSTGRESQL, ConnectionURL

_GONE = (TenantState.PURGED.value,)
_ADDRESS = ("backend", "host", "port", "direct_host", "direct_port", "path")


class ServerStore:
    """Reads and writes servers. Writing takes the login that owns the registry."""

    def __init__(self, transactions: Transactions, keyring: Keyring, forget_all: Callable[[], None], *, ttl: float) -> None:
        self._transactions = transactions
        self._keyring = keyring
        self._forget_all = forget_all
        self._ttl = ttl
        self._only: dict[tuple[str | None, str | None, tuple[str, ...] | None], tuple[Server, float]] = {}

    def get(self, name: str | UUID) -> Server:
        """A server by name or id. Raises: `NoServerAvailable`; `CredentialTampered` where its address was edited."""
        column = tables.servers.c.id if isinstance(name, UUID) else tables.servers.c.name
        with self._transactions.read() as connection:
            row = connection.execute(select(tables.servers).where(column == name)).mappings().first()
        if row is None:
            raise NoServerAvailable(str(name))
        return self.read({**row})

    def list(self) -> list[Server]:
        """All servers, by name."""
        with self._transactions.read() as connection:
            rows = connection.execute(select(tables.servers).order_by(tables.servers.c.name)).mappings().all()
        return [self.read({**row}) for row in rows]

    def pick(self, name: str | None = None, *, region: str | None = None, among: Iterable[str] | None = None) -> Server:
        """The open server with room that holds the fewest tenants; of that name, in that region or ``among`` names, where that is wanted.

        Where there is but one to choose, and nothing to count, the choice is believed as long as a tenant's record. Raises:
        `NoServerAvailable`.
        """
        wish = name, region, None if among is None else tuple(among)
        only, until = self._only.get(wish, (None, 0.0))
        if only is not None and time.monotonic() < until:
            return only
        servers, tenants = tables.servers, tables.tenants
        held = (
            select(func.count())
            .select_from(tenants)
            .where((tenants.c.server_id == servers.c.id) & tenants.c.state.not_in(_GONE))
            .scalar_subquery()
        )
        query = select(servers).where(~servers.c.draining, servers.c.capacity.is_(None) | (held < servers.c.capacity))
        if name is not None:
            query = query.where(servers.c.name == name)
        if among is not None:
            query = query.where(servers.c.name.in_(list(among)))
        if region is not None:
            query = query.where(servers.c.region == region)
        with self._transactions.read() as connection:
            rows = connection.execute(query.order_by(held, servers.c.name).limit(2)).mappings().all()
        if not rows:
            raise NoServerAvailable(name if name is not None else region)
        chosen = self.read({**rows[0]})
        if len(rows) == 1 and chosen.capacity is None:
            self._only[wish] = chosen, time.monotonic() + self._ttl
        return chosen

    def add(
        self,
        name: str,
        *,
        backend: str,
        host: str | None = None,
        port: int | None = None,
        direct_host: str | None = None,
        direct_port: int | None = None,
        path: str | None = None,
        region: str | None = None,
        capacity: int | None = None,
        extensions: Sequence[str] = (),
        schemas: Sequence[str] = (),
    ) -> Server:
        """Register a server, or write the one of this name anew. May run any number of times.

        At a new address its tenants stay readable; other processes follow when their copies of the records are too old.

        The direct address is the runtime address where none is given. Raises: `ConfigError` where the name belongs to another backend, or
        where an address is not one host and a port: libpq would try each of several, and `allowed_hosts` look at the last.
        """
        for each, number in ((host, port), (direct_host, direct_port)):
            folder = {"host": each} if each is not None and each.startswith("/") else {}
            ConnectionURL.parse(URL.create(POSTGRESQL, host=None if folder else each, port=number, query=folder))
        values: dict[str, Any] = {
            "backend": backend,
            "host": host,
            "port": port,
            "direct_host": direct_host or host,
            "direct_port": direct_port or port,
            "path": path,
            "region": region,
            "capacity": capacity,
            "extensions": list(extensions),
            "schemas": list(schemas),
        }
        try:
            return self._put(name, values)
        except IntegrityError as error:
            if not violates(error, "tenantdb_servers", "name"):
                raise
            return self._put(name, values)  # another process registered it meanwhile

    def set_draining(self, name: str, *, draining: bool) -> Server:
        """Stop, or allow again, that new tenants are placed there. Raises: `NoServerAvailable`."""
        with self._transactions.admin_write() as connection:
            changed = connection.execute(
                update(tables.servers).where(tables.servers.c.name == name).values(draining=draining, updated_at=tables.utcnow())
            )
            if changed.rowcount == 0:
                raise NoServerAvailable(name)
            audit.record(connection, "server.drain" if draining else "server.open", object=name)
        self._only.clear()
        return self.get(name)

    def _put(self, name: str, values: dict[str, Any]) -> Server:
        now = tables.utcnow()
        with self._transactions.admin_write() as connection:
            row = connection.execute(select(tables.servers).where(tables.servers.c.name == name)).mappings().first()
            if row is not None and row["backend"] != values["backend"]:
                raise ConfigError(f"server {name!r} is a {row['backend']} server and cannot be {values['backend']}; choose another name")
            server_id = uuid.uuid4() if row is None else row["id"]
            values = {**values, "address_seal": self._seal(server_id, values)}
            if row is None:
                connection.execute(
                    insert(tables.servers).values(id=server_id, name=name, draining=False, created_at=now, updated_at=now, **values)
                )
                audit.record(connection, "server.add", object=name)
            elif changed := [key for key in values if key != "address_seal" and row[key] != values[key]]:
                connection.execute(update(tables.servers).where(tables.servers.c.id == server_id).values(updated_at=now, **values))
                if set(changed) & set(_ADDRESS):  # its tenants are elsewhere now, and engines are kept by generation
                    connection.execute(
                        update(tables.tenants)
                        .where(tables.tenants.c.server_id == server_id)
                        .values(version=tables.tenants.c.version + 1, generation=tables.tenants.c.generation + 1, updated_at=now)
                    )
                audit.record(connection, "server.change", object=name, details={"fields": changed})
            stored = connection.execute(select(tables.servers).where(tables.servers.c.id == server_id)).mappings().one()
        self._only.clear()
        self._forget_all()
        return self.read({**stored})

    def _seal(self, server_id: UUID, values: dict[str, Any]) -> bytes | None:
        if not _sealed(values["backend"]):
            return None
        return self._keyring.seal(RUNTIME, b"", *address_place({**values, "id": server_id}))

    def read(self, row: Mapping[str, Any]) -> Server:
        """A server from its row. Raises: `CredentialTampered` where its address was edited."""
        if _sealed(row["backend"]):
            if row["address_seal"] is None:
                raise CredentialTampered(f"server {row['name']}", "address")
            self._keyring.open(RUNTIME, row["address_seal"], *address_place(row))
        fields = {name: row[name] for name in Server.__dataclass_fields__}
        return Server(**{**fields, "extensions": tuple(row["extensions"]), "schemas": tuple(row["schemas"])})


def _sealed(backend: str) -> bool:
    """A folder of SQLite files has no address that a password is sent to, and often no key to seal one with."""
    return backend != "sqlite"


def address_place(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What the seal is bound to. None and "" stay two things."""
    return str(row["id"]), "address", *(repr(row[name]) for name in _ADDRESS)
