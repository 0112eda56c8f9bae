"""The audit log: who did what to which tenant, written in the transaction of the change it tells of.

Nobody is asked who acts: it is whoever the context says (`tenantdb.context.acting`). Details name fields and states, never values that
belong to a person. On PostgreSQL the serving login can add lines and read them, no more; and whoever can do more is found out by the chain
(`tenantdb.registry.chain`).
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Row, Select, Table, delete, func, or_, select, update

from tenantdb.context import acting, current_actor
from tenantdb.errors import ConfigError
from tenantdb.model import AuditEntry, AuditHead, AuditLog, AuditReport, ChainReport, Retention, Tenant
from tenantdb.registry import anchors, tables
from tenantdb.registry.chain import INSTALLATION, Chain, Head, Verifier, plain, plain_details
from tenantdb.registry.entries import Entries
from tenantdb.registry.ids import tenant_id_of
from tenantdb.registry.refusals import Refusal, RefusalLog
from tenantdb.registry.secrets import Keyring
from tenantdb.registry.transactions import Transactions
from tenantdb.resolvers import tenant_key
from tenantdb.settings import Settings

_ROWS = 500  # of a chain in memory at once, while it is verified
_log, _heads, _tenants = tables.audit, tables.audit_heads, tables.tenants


def record(
    connection: Connection,
    action: str,
    *,
    tenant_id: UUID | None = None,
    object: object | None = None,
    outcome: str = "done",
    reason: str | None = None,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Add a line in the caller's transaction, at whose end it is written: without it, nothing of the transaction happened.

    Raises: `TypeError` or `ValueError` for details that JSON cannot hold; `RuntimeError` outside a writing transaction of the registry.
    """
    Entries.of(connection).add(tenant_id, statement(action, object, outcome=outcome, reason=reason, details=details))


def statement(action: str, object: object | None, *, outcome: str, reason: str | None, details: Mapping[str, Any] | None) -> dict[str, Any]:
    """What an entry says, of this moment and of who acts in this context."""
    actor = current_actor()
    return {
        "at": tables.utcnow(),
        "actor": plain(actor.actor),
        "action": plain(action),
        "object": None if object is None else plain(str(object)),
        "outcome": plain(outcome),
        "request_id": plain(actor.request_id),
        "reason": plain(reason),
        "source": plain(actor.source),
        "details": plain_details(details),
    }


def matching(
    table: Table,
    *,
    actor: str | None = None,
    action: str | None = None,
    object: object | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    outcome: str | None = None,
    limit: int = 100,
) -> Select[Any]:
    """The entries of a log that pass every filter that is given, the newest first.

    ``action`` is a whole one, or the beginning of many that ends with a dot: ``patient.``. ``since`` is inclusive, ``until`` is not.
    """
    query = select(table).order_by(table.c.id.desc()).limit(limit)
    for name, value in (("actor", actor), ("object", None if object is None else str(object)), ("outcome", outcome)):
        if value is not None:
            query = query.where(table.c[name] == value)
    if action is not None:
        query = query.where(table.c.action.startswith(action, autoescape=True) if action.endswith(".") else table.c.action == action)
    if since is not None:
        query = query.where(table.c.at >= since)
    if until is not None:
        query = query.where(table.c.at < until)
    return query


def walk(
    connection: Connection,
    table: Table,
    chain: Chain,
    read_head: Callable[[], Head | None],
    anchor: AuditHead | None,
    mine: ColumnElement[bool],
    *,
    strays: ColumnElement[bool] | None = None,
) -> ChainReport:
    """Verify one chain, in bounded memory and while others write to it. ``strays`` are entries that stand outside its numbers."""
    # In this order: whoever commits in between moves the head, so an entry that was there before and is behind the head is nobody's.
    highest = connection.scalar(select(func.max(table.c.seq)).where(mine)) or 0
    stray = strays is not None and connection.scalar(select(table.c.id).where(mine & strays).limit(1)) is not None
    head = read_head()
    verifier = Verifier(chain, head, anchor)
    ours = mine & table.c.seq.is_not(None) if head is None else mine & (table.c.seq <= head.seq)
    query = select(table).where(ours).order_by(table.c.seq, table.c.id)
    with connection.execute(query, execution_options={"yield_per": _ROWS}) as rows:
        for row in rows:
            verifier.feed(row)
    return verifier.finish(highest=highest, stray=stray)


class AuditStore:
    """Reads, verifies and keeps the registry's audit log. Entries are added by `record`."""

    def __init__(self, transactions: Transactions, keyring: Keyring, settings: Settings) -> None:
        self._transactions = transactions
        self._keyring = keyring
        self._anchor = settings.audit_anchor
        self._years = settings.audit_retention
        self._hooks: builtins.list[Callable[[builtins.list[AuditHead]], object]] = []
        self._refusals = RefusalLog(self._write_refusals)
        self.close = self._refusals.close

    # -- reading -----------------------------------------------------------------------------------------------------------------------

    def list(self, tenant: Tenant | UUID | str | None = None, *, limit: int = 100) -> list[AuditEntry]:
        """The newest entries first, of one tenant or of all. Raises: `TenantNotFound`."""
        return self.search(tenant, limit=limit)

    def search(self, tenant: Tenant | UUID | str | None = None, **filters: Any) -> builtins.list[AuditEntry]:
        """The newest entries first that pass every filter; see `matching`. A tenant that was purged is found by its id.

        Raises: `TenantNotFound` for a slug that is nobody's.
        """
        query = matching(_log, **filters)
        with self._transactions.read() as connection:
            if tenant is not None:
                query = query.where(_log.c.tenant_id == _id_of(connection, tenant))
            return [AuditEntry(**row) for row in connection.execute(query).mappings()]

    # -- verifying ---------------------------------------------------------------------------------------------------------------------

    def verify(self, tenant: Tenant | UUID | str | None = None, *, anchored: Iterable[AuditHead] = ()) -> AuditReport:
        """Look whether the chain of a tenant, or every chain, is whole: nothing edited, taken out, moved or slipped in.

        Compares with the anchors in the file of ``audit_anchor``, and with ``anchored``, where heads are kept elsewhere; without any, an
        end that was cut off together with its head goes unnoticed. Raises: `TenantNotFound`, `ConfigError` for a file that cannot be read.
        """
        newest = {key[1]: head for key, head in self.anchors(anchored).items() if key[0] is AuditLog.REGISTRY}
        with self._transactions.read() as connection:
            if tenant is not None:
                chains = [_id_of(connection, tenant)]
            else:
                known = set(connection.scalars(select(_heads.c.chain)))
                known |= {found or INSTALLATION for found in connection.scalars(select(_log.c.tenant_id).distinct())}
                chains = sorted(known | {found or INSTALLATION for found in newest})
        reports = []
        for chain_id in chains:
            with self._transactions.read() as connection:
                reports.append(self._walk(connection, chain_id, newest.get(_tenant_of(chain_id))))
        return AuditReport(tuple(reports), anchors=sum(_tenant_of(chain_id) in newest for chain_id in chains))

    def _walk(self, connection: Connection, chain_id: UUID, anchor: AuditHead | None) -> ChainReport:
        mine = _of(chain_id)
        first = select(func.min(_log.c.id)).where(mine & _log.c.seq.is_not(None)).scalar_subquery()
        chain = Chain(AuditLog.REGISTRY, _tenant_of(chain_id), self._keyring)
        strays = _log.c.seq.is_(None) & (_log.c.id > first)  # older ones were written before there were chains
        return walk(connection, _log, chain, lambda: _head(connection, chain_id), anchor, mine, strays=strays)

    # -- anchors -----------------------------------------------------------------------------------------------------------------------

    def on_anchor(self, fn: Callable[[builtins.list[AuditHead]], object]) -> Callable[[builtins.list[AuditHead]], object]:
        """Register ``fn(heads)``, which keeps them where nobody who can write to a database can write: object storage with a lock."""
        self._hooks.append(fn)
        return fn

    def anchor(self, heads: Iterable[AuditHead] = ()) -> builtins.list[AuditHead]:
        """Hand the heads of all chains out: to the file of ``audit_anchor``, where those that moved are appended, and to every hook.

        ``heads`` are those of logs that are not the registry's. Returns what was handed out. Raises: `ConfigError` where nothing takes
        them or the file cannot be written; what a hook raises.
        """
        if self._anchor is None and not self._hooks:
            raise ConfigError("there is nowhere to put the heads of the audit log: set audit_anchor=, or register @db.audit.on_anchor")
        with self._transactions.write() as connection:
            record(connection, "audit.anchor")
        now = tables.utcnow()
        with self._transactions.read() as connection:
            rows = connection.execute(select(_heads.c.chain, _heads.c.seq, _heads.c.mac).order_by(_heads.c.chain)).all()
        current = [AuditHead(log=AuditLog.REGISTRY, tenant_id=_tenant_of(row.chain), seq=row.seq, mac=row.mac, at=now) for row in rows]
        current += heads
        if self._anchor is not None:
            known = self.anchors()
            anchors.append(self._anchor, [head for head in current if not _same(known.get((head.log, head.tenant_id)), head)])
        for hook in self._hooks:
            hook(current)
        return current

    def anchors(self, anchored: Iterable[AuditHead] = ()) -> dict[anchors.Key, AuditHead]:
        """The newest anchor of each chain. Raises: `ConfigError` where the file cannot be read."""
        return anchors.newest([*(() if self._anchor is None else anchors.read(self._anchor)), *anchored])

    # -- retention ---------------------------------------------------------------------------------------------------------------------

    def retain(self, years: int | None = None) -> Retention:
        """Delete entries older than ``years`` (by default ``audit_retention``, and never less), as the login that owns the tables.

        Each chain keeps a sealed checkpoint and an entry that tells of it, so that it can be verified from there on. Tenants under a legal
        hold, and chains that do not hold, are left as they are. May run again. Raises: `ConfigError` for fewer years than the setting's.
        """
        years = self._years if years is None else years
        if years < self._years:
            raise ConfigError(f"audit entries are kept for audit_retention={self._years} years; {years} would be less")
        before = _years_ago(tables.utcnow(), years)
        with self._transactions.read() as connection:
            chains = list_of(connection.scalars(select(_heads.c.chain).order_by(_heads.c.chain)))
        deleted, held, broken = 0, [], []
        for chain_id in chains:
            with self._transactions.admin_write() as connection:
                if connection.scalar(select(_tenants.c.legal_hold).where(_tenants.c.id == chain_id)) is not None:
                    held.append(chain_id)
                    continue
                found = self._retain(connection, chain_id, before)
            if isinstance(found, ChainReport):
                broken.append(found)
            else:
                deleted += found
        return Retention(before=before, deleted=deleted, held=tuple(held), broken=tuple(broken))

    def _retain(self, connection: Connection, chain_id: UUID, before: datetime) -> int | ChainReport:
        head, mine = _head(connection, chain_id), _of(chain_id)
        if head is None:
            return 0
        kept = connection.scalar(select(func.min(_log.c.seq)).where(mine & (_log.c.at >= before)))
        kept_from = head.seq + 1 if kept is None else kept
        gone = mine & ((_log.c.seq < kept_from) | (_log.c.seq.is_(None) & (_log.c.at < before)))
        if connection.scalar(select(_log.c.id).where(gone).limit(1)) is None:
            return 0
        # What does not hold is evidence, and a checkpoint on it would vouch for a forgery.
        if not (report := self._walk(connection, chain_id, None)).ok:
            return report
        last = connection.scalar(select(_log.c.mac).where(mine & (_log.c.seq == kept_from - 1)))
        kept_mac = head.kept_mac if kept_from == (head.kept_from or 1) else last
        deleted = connection.execute(delete(_log).where(gone)).rowcount
        seal = Chain(AuditLog.REGISTRY, _tenant_of(chain_id), self._keyring).seal(kept_from, kept_mac)
        further = (_heads.c.chain == chain_id) & or_(_heads.c.kept_from.is_(None), _heads.c.kept_from < kept_from)
        connection.execute(update(_heads).where(further).values(kept_from=kept_from, kept_mac=kept_mac, kept_seal=seal))
        details = {"before": before.isoformat(), "deleted": deleted, "kept_from": kept_from}
        record(connection, "audit.retain", tenant_id=_tenant_of(chain_id), details=details)
        return deleted

    # -- refusals ----------------------------------------------------------------------------------------------------------------------

    def refused(self, kind: str, tenant_id: UUID | None = None, *, actor: str | None = None) -> None:
        """Somebody was refused something. Counted in memory, from any thread or loop, and written once in a while: see `RefusalLog`.

        ``kind`` is an error's code, never what a client sent. ``actor`` is who asked, if he is not the one who acts in this context.
        """
        self._refusals.add(kind, tenant_id, actor or current_actor().actor)

    def _write_refusals(self, refusals: builtins.list[Refusal]) -> None:
        with self._transactions.write() as connection:
            for refusal in refusals:
                details = {"count": refusal.count, "since": refusal.since.isoformat(timespec="seconds")}
                with acting(refusal.actor):
                    record(connection, f"refused.{refusal.kind}", tenant_id=refusal.tenant_id, outcome="refused", details=details)


list_of = list  # the builtin, which the method of that name hides inside the class


def _id_of(connection: Connection, tenant: Tenant | UUID | str) -> UUID:
    """An id is believed, because the log outlives what it tells of."""
    key = tenant_key(tenant)
    return key if isinstance(key, UUID) else tenant_id_of(connection, key)


def _tenant_of(chain_id: UUID) -> UUID | None:
    return None if chain_id == INSTALLATION else chain_id


def _of(chain_id: UUID) -> ColumnElement[bool]:
    return _log.c.tenant_id.is_(None) if chain_id == INSTALLATION else _log.c.tenant_id == chain_id


def _head(connection: Connection, chain_id: UUID) -> Head | None:
    row: Row[Any] | None = connection.execute(select(_heads).where(_heads.c.chain == chain_id)).first()
    return None if row is None else Head(row.seq, row.mac, row.kept_from, row.kept_mac, row.kept_seal)


def _same(known: AuditHead | None, head: AuditHead) -> bool:
    return known is not None and (known.seq, known.mac) == (head.seq, head.mac)


def _years_ago(moment: datetime, years: int) -> datetime:
    try:
        return moment.replace(year=moment.year - years)
    except ValueError:  # the 29th of February; a day more is kept
        return moment.replace(year=moment.year - years, day=28)
