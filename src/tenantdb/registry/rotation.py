"""Sealing every secret of the registry anew with the newest key, while the application runs on.

Every process has both keys meanwhile, so it opens what is sealed with either. Passwords do not change, so neither do generations, and no
connection is closed. Each secret is compared and set: who wrote it meanwhile wins, and is looked at again. A batch is one short transaction
that waits for nobody's lock and asks no key service; it is complete or did not happen, so that after a kill the next run carries on.

What shows at start-up whether the keys are the right ones is sealed anew last: until all else is, a process without the old key refuses to
start.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Table, and_, func, select, update

from tenantdb.errors import KeyServiceUnavailable, OperationInProgress, TenantDBError
from tenantdb.model import DatabaseRole
from tenantdb.registry import audit, schema, tables
from tenantdb.registry.secrets import AUDIT, KEY_ID_LENGTH, OWNER, PURPOSES, RUNTIME, Keyring, key_id_of, password_place
from tenantdb.registry.servers import address_place
from tenantdb.registry.transactions import Transactions

BATCH = 100
_ATTEMPTS = 3
_OUTAGES = 5  # failures of the key service in a row, after which it is down rather than at odds with some secrets

_tenants, _servers, _meta = tables.tenants, tables.servers, tables.meta
_TENANT_COLUMNS = (
    *(_tenants.c.id, _tenants.c.slug, _tenants.c.server_id, _tenants.c.database, _tenants.c.owner_role, _tenants.c.runtime_role),
    *(_tenants.c.owner_secret, _tenants.c.owner_secret_pending, _tenants.c.runtime_secret, _tenants.c.runtime_secret_pending),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFailure:
    """A secret that was left as it is. ``tenant`` is a slug, an id where there is none, or ``server NAME``."""

    tenant: str
    column: str
    error: TenantDBError


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRotation:
    """What `TenantDB.rotate_keys` did: how many secrets it sealed anew, how many were sealed with the newest key already, which failed.

    ``keys`` are the ids of the newest keys by purpose, ``replaced`` those of the keys that were found instead.
    """

    resealed: int = 0
    already: int = 0
    failed: tuple[KeyFailure, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.failed


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyUse:
    """How many secrets say that they are sealed with one key; for the purpose ``audit``, how many entries of the audit log it vouches for.

    ``key_id`` is 16 hex digits, None for damaged secrets; ``name`` is ``key 2`` for the second of the given keys, ``kms`` for the key
    service, None for a key that was not given. A root key has one id for each purpose.
    """

    purpose: str
    key_id: str | None
    name: str | None
    secrets: int
    newest: bool

    @property
    def needs_rotation(self) -> bool:
        """Whether `TenantDB.rotate_keys` would move secrets away from this key. What an audit key vouches for is never written anew."""
        return not self.newest and self.key_id is not None and self.purpose != AUDIT


@dataclass(frozen=True, slots=True)
class _Secret:
    column: str
    purpose: str
    blob: bytes
    place: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Row:
    table: Table
    id: Any
    name: str
    secrets: tuple[_Secret, ...]


@dataclass(slots=True)
class _Sealed:
    """What became of one row's secrets; it counts once the row is written."""

    row: _Row
    new: dict[str, bytes] = field(default_factory=dict)
    already: int = 0
    failed: list[KeyFailure] = field(default_factory=list)


class KeyKeeper:
    """Says which keys the registry's secrets need, and moves them to the newest. For the login that owns the registry."""

    def __init__(
        self,
        transactions: Transactions,
        keyring: Keyring,
        forget: Callable[[UUID, str | None], None],
    ) -> None:
        self._transactions = transactions
        self._keyring = keyring
        self._forget = forget

    def in_use(self) -> tuple[KeyUse, ...]:
        """Which keys the stored secrets say that they are sealed with, by purpose, the newest first. Opens none of them."""
        found: Counter[tuple[str, bytes | None]] = Counter()
        for page in self._pages():
            found.update((secret.purpose, key_id_of(secret.blob)) for row in page for secret in row.secrets)
        for column in (tables.audit.c.mac, tables.audit_heads.c.kept_seal):
            key_id = func.substr(column, 1, KEY_ID_LENGTH, type_=column.type)
            with self._transactions.admin_read() as connection:
                for each, count in connection.execute(select(key_id, func.count()).where(column.is_not(None)).group_by(key_id)):
                    found[AUDIT, bytes(each)] += count
        newest = {purpose: self._keyring.newest(purpose) for purpose in PURPOSES if self._keyring.holds(purpose)}
        uses = [
            KeyUse(
                purpose=purpose,
                key_id=None if key_id is None else key_id.hex(),
                name=None if key_id is None else self._keyring.name(key_id),
                secrets=count,
                newest=key_id is not None and key_id == newest.get(purpose),
            )
            for (purpose, key_id), count in found.items()
        ]
        return tuple(sorted(uses, key=lambda use: (use.purpose, not use.newest, use.name or "~", use.key_id or "")))

    def rotate(self, progress: Callable[[int, int], object] | None = None) -> KeyRotation:
        """Seal every secret anew that is not sealed with the newest key of its purpose; see `TenantDB.rotate_keys`."""
        run = _Run(self._transactions, self._keyring, self._forget)
        with self._transactions.admin_read() as connection:
            total = sum(connection.scalar(select(func.count()).select_from(table)) or 0 for table in (_tenants, _servers))
        done = 0
        try:
            for page in self._pages(key_check=False):
                run.batch(page)
                done += len(page)
                if progress is not None:
                    progress(min(done, total), total)
            if run.finish():
                run.batch(self._key_check())
                run.finish()
        except BaseException:
            with contextlib.suppress(TenantDBError):  # of the two, what interrupted us is the one to tell
                run.record("interrupted")
            raise
        run.record("done" if run.report.ok else "failed")
        return run.report

    def _pages(self, *, key_check: bool = True) -> Iterator[list[_Row]]:
        last: UUID | None = None
        while page := self._tenants(None if last is None else _tenants.c.id > last, BATCH):
            yield page
            last = page[-1].id
        yield self._read_servers()
        if key_check:
            yield self._key_check()

    def _tenants(self, where: ColumnElement[bool] | None, limit: int) -> list[_Row]:
        query = select(*_TENANT_COLUMNS).order_by(_tenants.c.id).limit(limit)
        with self._transactions.admin_read() as connection:
            return [_tenant_row(row) for row in connection.execute(query if where is None else query.where(where)).mappings()]

    def _read_servers(self) -> list[_Row]:
        with self._transactions.admin_read() as connection:
            return [_server_row(row) for row in connection.execute(select(_servers)).mappings()]

    def _key_check(self) -> list[_Row]:
        with self._transactions.admin_read() as connection:
            return [_meta_row(row) for row in connection.execute(select(_meta)).mappings()]


class _Run:
    """One rotation."""

    def __init__(self, transactions: Transactions, keyring: Keyring, forget: Callable[[UUID, str | None], None]) -> None:
        self._transactions = transactions
        self._keyring = keyring
        self._forget = forget
        self._newest = {purpose: keyring.newest(purpose) for purpose in (OWNER, RUNTIME)}  # SecretKeyError before anything is read
        self._replaced: set[str] = set()
        self._outages = 0
        self._late: list[_Row] = []
        self._resealed = self._already = 0
        self._failed: list[KeyFailure] = []

    @property
    def report(self) -> KeyRotation:
        return KeyRotation(
            resealed=self._resealed,
            already=self._already,
            failed=tuple(self._failed),
            keys={purpose: key_id.hex() for purpose, key_id in self._newest.items()},
            replaced=tuple(sorted(self._replaced)),
        )

    def batch(self, rows: Sequence[_Row]) -> None:
        """Seal in memory, then write in one transaction what nobody else is writing. The rest is for `finish`."""
        sealed = [self._seal(row) for row in rows]
        written = self._write([each for each in sealed if each.new], wait=False)
        for each in sealed:
            if each.new and each.row.id not in written:
                self._late.append(each.row)
            else:
                self._count(each)

    def finish(self) -> bool:
        """What others were writing, one at a time and waiting for their locks. False where a secret is still to be sealed anew."""
        complete = True
        waiting, self._late = self._late, []
        for late in waiting:
            for _ in range(_ATTEMPTS):
                row = self._again(late)
                if row is None:  # it is gone, and its secrets with it
                    break
                sealed = self._seal(row)
                if not sealed.new or self._write([sealed], wait=True):
                    self._count(sealed)
                    break
            else:
                complete = False
                self._failed.append(KeyFailure(tenant=late.name, column="", error=OperationInProgress(late.name)))
        return complete

    def record(self, outcome: str) -> None:
        report = self.report
        details = {
            "resealed": report.resealed,
            "already": report.already,
            "failed": len(report.failed),
            "keys": dict(report.keys),
            "replaced": list(report.replaced),
        }
        with self._transactions.admin_write() as connection:
            audit.record(connection, "keys.rotate", outcome=outcome, details=details)

    def _seal(self, row: _Row) -> _Sealed:
        sealed = _Sealed(row)
        for secret in row.secrets:
            try:
                plain = self._keyring.open(secret.purpose, secret.blob, *secret.place)  # also where it looks new: its key id may be a lie
                key_id = key_id_of(secret.blob)
                if key_id == self._newest[secret.purpose]:
                    sealed.already += 1
                else:
                    sealed.new[secret.column] = self._keyring.seal(secret.purpose, plain, *secret.place)
                    self._replaced.add("" if key_id is None else key_id.hex())
            except TenantDBError as error:
                self._outages = self._outages + 1 if isinstance(error, KeyServiceUnavailable) else 0
                if self._outages >= _OUTAGES:
                    raise
                sealed.failed.append(KeyFailure(tenant=row.name, column=secret.column, error=error))
            else:
                self._outages = 0
        return sealed

    def _write(self, batch: Sequence[_Sealed], *, wait: bool) -> set[Any]:
        """The ids of the rows that still held what was read."""
        if not batch:
            return set()
        table = batch[0].row.table
        (key,) = table.primary_key.columns
        ids = [each.row.id for each in batch]
        written = set()
        with self._transactions.admin_write() as connection:
            locking = select(key).where(key.in_(ids)).order_by(key).with_for_update(skip_locked=not wait)
            free = set(connection.scalars(locking))  # rows are locked in whatever order by others: who waits here may wait for ever
            for each in batch:
                if each.row.id not in free:
                    continue
                old = {secret.column: secret.blob for secret in each.row.secrets}
                unchanged = and_(key == each.row.id, *(table.c[column] == old[column] for column in each.new))
                values: dict[str, Any] = dict(each.new)
                if "version" in table.c:
                    values["version"] = table.c.version + 1
                if "updated_at" in table.c:
                    values["updated_at"] = tables.utcnow()
                if connection.execute(update(table).where(unchanged).values(values)).rowcount:
                    written.add(each.row.id)
        if table is _tenants:
            for each in batch:
                if each.row.id in written:
                    self._forget(each.row.id, None)
        return written

    def _count(self, sealed: _Sealed) -> None:
        self._resealed += len(sealed.new)
        self._already += sealed.already
        self._failed.extend(sealed.failed)

    def _again(self, row: _Row) -> _Row | None:
        read, columns = _READERS[row.table]
        (key,) = row.table.primary_key.columns
        with self._transactions.admin_read() as connection:
            found = connection.execute(select(*columns).where(key == row.id)).mappings().first()
        return None if found is None else read(found)


def _tenant_row(row: Mapping[Any, Any]) -> _Row:
    found = []
    for role, purpose in ((DatabaseRole.OWNER, OWNER), (DatabaseRole.RUNTIME, RUNTIME)):
        place = password_place(row["id"], role, row["server_id"], row["database"], row[f"{role}_role"])
        # A pending secret has the place of the one that it is to replace: it moves there as it is.
        found += [
            _Secret(name, purpose, row[name], place) for name in (f"{role}_secret", f"{role}_secret_pending") if row[name] is not None
        ]
    return _Row(_tenants, row["id"], row["slug"] or str(row["id"]), tuple(found))


def _server_row(row: Mapping[Any, Any]) -> _Row:
    seal = row["address_seal"]
    secrets = () if seal is None else (_Secret("address_seal", RUNTIME, seal, address_place(row)),)
    return _Row(_servers, row["id"], f"server {row['name']}", secrets)


def _meta_row(row: Mapping[Any, Any]) -> _Row:
    secrets = () if row["key_check"] is None else (_Secret("key_check", RUNTIME, row["key_check"], schema.KEY_CHECK_PLACE),)
    return _Row(_meta, row["id"], "registry", secrets)


_READERS: dict[Table, tuple[Callable[[Mapping[Any, Any]], _Row], Sequence[Any]]] = {
    _tenants: (_tenant_row, _TENANT_COLUMNS),
    _servers: (_server_row, tuple(_servers.c)),
    _meta: (_meta_row, tuple(_meta.c)),
}
