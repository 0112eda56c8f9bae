"""The audit trail as an application sees it: the registry's log, and beside it the one in each tenant's own database.

What happens to a tenant's records (`AuditTrail.record`) is written where they are, in the same transaction: neither is there without the
other. PostgreSQL lets the runtime role add entries and nothing else; see `tenantdb.backends.postgresql.recordlog`.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, Column, Insert, Integer, LargeBinary, MetaData, Table, Text, Update, insert, select, true, update
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from tenantdb.connections.session import PinnedSession
from tenantdb.errors import AuditNotReady, NotATenantsSession, TenantNotFound
from tenantdb.model import AuditEntry, AuditHead, AuditLog, AuditReport, ChainReport, Tenant, TenantState
from tenantdb.registry import Registry
from tenantdb.registry.audit import matching, statement, walk
from tenantdb.registry.chain import Chain, Head
from tenantdb.registry.tables import BigSerial, Document, Moment, utcnow
from tenantdb.resolvers import tenant_key

_UNDEFINED = frozenset({"42P01", "3F000"})  # undefined_table, invalid_schema_name
_PAGE = 500
Key = str | UUID | Tenant


class _RecordLog:
    """The tables of one backend, and the three statements of an entry."""

    def __init__(self, log: str, head: str, schema: str | None) -> None:
        metadata = MetaData(schema=schema)
        self.log = Table(
            log,
            metadata,
            Column("id", BigSerial, primary_key=True),
            Column("at", Moment, nullable=False),
            Column("actor", Text, nullable=False),
            Column("action", Text, nullable=False),
            Column("object", Text),
            Column("outcome", Text, nullable=False),
            Column("request_id", Text),
            Column("reason", Text),
            Column("source", Text),
            Column("details", Document, nullable=False),
            Column("seq", BigInteger, nullable=False),
            Column("mac", LargeBinary),
        )
        self.head = Table(
            head, metadata, Column("id", Integer, primary_key=True), Column("seq", BigInteger, nullable=False), Column("mac", LargeBinary)
        )
        self.advance = update(self.head).values(seq=self.head.c.seq + 1).returning(self.head.c.seq, self.head.c.mac)
        self.insert: Insert = insert(self.log).inline()
        self.sign: Update = update(self.head)


@functools.cache
def _log_of(dialect: str) -> _RecordLog:
    if dialect == "postgresql":
        return _RecordLog("audit", "audit_head", "tenantdb")
    return _RecordLog("tenantdb_audit_records", "tenantdb_audit_records_head", None)


class AuditTrail:
    """Writes down who does what, and answers who did: ``db.audit``.

    Entries about tenants, users and operations are in the registry, and tenantdb writes them itself, in the transaction of the change.
    Entries about a tenant's records are in its own database, and the application writes them, with `record`.
    """

    def __init__(self, registry: Registry, engine: Callable[[str | UUID], tuple[UUID, Engine]]) -> None:
        self._registry = registry
        self._engine = engine
        self._store = registry.audit
        self.list = self._store.list
        self.on_anchor = self._store.on_anchor
        self.retain = self._store.retain

    def record(
        self,
        session: Any,
        action: str,
        object: object | None = None,
        *,
        outcome: str = "done",
        reason: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Write down what was done to a record of the session's tenant: ``db.audit.record(session, "patient.read", patient.id)``.

        In the session's transaction: committed with it, or gone with it. Who acts is taken from the context. Others who record for the
        same tenant wait until the commit, so record last. ``details`` name fields, and hold no values that belong to a person. On SQLite
        use `TenantDB.begin`: a session that has read cannot always go on to write.

        Raises: `NotATenantsSession`; `AuditNotReady` for a tenant made before there was this log; `SecretKeyError` where keys are given
        and none is for the audit log; what the database raises. Nothing of the transaction should be committed then.
        """
        if not isinstance(session, PinnedSession):
            raise NotATenantsSession(type(session).__name__)
        values = statement(action, object, outcome=outcome, reason=reason, details=details)
        connection = session.connection()
        tenant_id = session._tenantdb_pin.tenant_id
        tables = _log_of(connection.dialect.name)
        with self._ready(tenant_id):
            seq, previous = connection.execute(tables.advance).one()
        mac = self._chain(tenant_id).sign(previous, seq, values)
        connection.execute(tables.insert, {**values, "seq": seq, "mac": mac})
        if mac is not None:
            connection.execute(tables.sign, {"mac": mac})

    def search(
        self,
        tenant: Key | None = None,
        *,
        records: bool = False,
        actor: str | None = None,
        action: str | None = None,
        object: object | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        outcome: str | None = None,
        limit: int = 100,
    ) -> list[AuditEntry]:
        """The newest entries first that pass every filter: the registry's, or with ``records`` those in the tenant's own database.

        ``action`` is a whole one, or the beginning of many, with a dot at its end: ``patient.``. ``since`` is inclusive, ``until`` is not.
        A tenant that was purged is found by its id. Raises: `TenantNotFound`; with ``records`` also what `TenantDB.session` raises,
        `AuditNotReady`, and `ValueError` without a tenant.
        """
        filters: dict[str, Any] = {
            "actor": actor,
            "action": action,
            "object": object,
            "since": since,
            "until": until,
            "outcome": outcome,
            "limit": limit,
        }
        if not records:
            return self._store.search(tenant, **filters)
        if tenant is None:
            raise ValueError("records are in the tenants' own databases: name the tenant")
        with self._inside(tenant) as (tenant_id, connection, tables):
            rows = connection.execute(matching(tables.log, **filters)).mappings().all()
        return [AuditEntry(tenant_id=tenant_id, **row) for row in rows]

    def verify(self, tenant: Key | None = None, *, records: bool = False, anchored: Iterable[AuditHead] = ()) -> AuditReport:
        """Look whether chains are whole: nothing edited, taken out, moved or slipped in; of one tenant, or of all and the installation.

        The registry's, or with ``records`` those in the tenants' own databases: of one tenant, or of all that are active. They are
        compared with the anchors in the file of ``audit_anchor``, and with ``anchored``, where heads are kept elsewhere; without any, an
        end that was cut off together with its head goes unnoticed.

        Raises: `TenantNotFound`, `ConfigError`; with ``records`` what `search` raises.
        """
        if not records:
            return self._store.verify(tenant, anchored=anchored)
        newest = self._store.anchors(anchored)
        reports, compared = [], 0
        for key in self._active() if tenant is None else [tenant]:
            with self._inside(key) as (tenant_id, connection, tables):
                anchor = newest.get((AuditLog.RECORDS, tenant_id))
                reports.append(self._verify(connection, tables, tenant_id, anchor))
                compared += anchor is not None
        return AuditReport(tuple(reports), anchors=compared)

    def anchor(self, *, records: bool = False) -> list[AuditHead]:
        """Hand out how far every chain has come: to the file of ``audit_anchor``, and to every function of `on_anchor`.

        With ``records`` also the chains in the databases of all active tenants. What is written down outside is missed when it is cut
        off inside. Raises: `ConfigError` where nothing takes the heads; what a function of `on_anchor` raises.
        """
        return self._store.anchor(self._heads() if records else ())

    def refused(self, kind: str, tenant: Key | None = None, *, actor: str | None = None) -> None:
        """Count that somebody was refused something, for an entry ``refused.<kind>`` a minute later: from any thread or loop, without I/O.

        However many there are, one entry a minute is written for each kind, tenant and actor. ``kind`` is an error's code, never what a
        client sent. A tenant that is not in memory is left out.
        """
        self._store.refused(kind, None if tenant is None else self._known(tenant), actor=actor)

    def _known(self, tenant: Key) -> UUID | None:
        """Only a tenant that exists has a chain: otherwise whoever is refused could begin as many as he can think of ids."""
        try:
            found = self._registry.peek(tenant_key(tenant))
        except TenantNotFound:
            return None
        return None if found is None else found.tenant.id

    def _chain(self, tenant_id: UUID) -> Chain:
        return Chain(AuditLog.RECORDS, tenant_id, self._registry.keyring)

    def _active(self) -> Iterator[Tenant]:
        page = self._registry.tenants.list(TenantState.ACTIVE, limit=_PAGE)
        while page:
            yield from page
            page = self._registry.tenants.list(TenantState.ACTIVE, limit=_PAGE, after=page[-1].slug)

    def _heads(self) -> Iterator[AuditHead]:
        for tenant in self._active():
            with self._inside(tenant) as (tenant_id, connection, tables):
                head = _head(connection, tables)
            if head is not None:
                yield AuditHead(log=AuditLog.RECORDS, tenant_id=tenant_id, seq=head.seq, mac=head.mac, at=utcnow())

    def _verify(self, connection: Connection, tables: _RecordLog, tenant_id: UUID, anchor: AuditHead | None) -> ChainReport:
        return walk(connection, tables.log, self._chain(tenant_id), lambda: _head(connection, tables), anchor, true())

    @contextmanager
    def _inside(self, tenant: Key) -> Iterator[tuple[UUID, Connection, _RecordLog]]:
        tenant_id, engine = self._engine(tenant_key(tenant))
        with self._ready(tenant_id), engine.connect() as connection:
            yield tenant_id, connection, _log_of(connection.dialect.name)

    @contextmanager
    def _ready(self, tenant_id: UUID) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            missing = getattr(error.orig, "sqlstate", None) in _UNDEFINED
            if missing or (isinstance(error.orig, sqlite3.Error) and str(error.orig).startswith("no such table: tenantdb_audit_")):
                raise AuditNotReady(str(tenant_id)) from error
            raise


def _head(connection: Connection, tables: _RecordLog) -> Head | None:
    row = connection.execute(select(tables.head.c.seq, tables.head.c.mac)).first()
    return None if row is None else Head(row.seq, row.mac)
