"""What one transaction of the registry has to tell the audit log, written as its last act.

Each entry takes the lock of its chain's head until the commit, and whatever a transaction locks behind that could be locked the other way
round elsewhere. So the heads come last, in one order for everybody: no two transactions can wait for each other there.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, Connection, LargeBinary, Uuid, bindparam, insert, text, update

from tenantdb.model import AuditLog
from tenantdb.registry import tables
from tenantdb.registry.chain import INSTALLATION, Chain
from tenantdb.registry.secrets import Keyring

_OPTION = "tenantdb_entries"
_heads = tables.audit_heads

# Core has no upsert without loading a dialect. The row is locked by it, and where it is new, by the unique index.
_ADVANCE = (
    text(
        f"INSERT INTO {_heads.name} (chain, seq) VALUES (:chain, :step)"
        f" ON CONFLICT (chain) DO UPDATE SET seq = {_heads.name}.seq + :step RETURNING seq, mac"
    )
    .bindparams(bindparam("chain", type_=Uuid()), bindparam("step", type_=BigInteger()))
    .columns(seq=BigInteger(), mac=LargeBinary())
)
_INSERT = insert(tables.audit).inline()
_SIGN = update(_heads).where(_heads.c.chain == bindparam("its_chain")).values(mac=bindparam("its_mac"))


class Entries:
    """The entries of one transaction, which its connection carries along."""

    def __init__(self, connection: Connection, keyring: Keyring) -> None:
        self._connection = connection
        self._keyring = keyring
        self._waiting: dict[UUID, list[dict[str, Any]]] = {}

    @classmethod
    def begin(cls, connection: Connection, keyring: Keyring) -> Entries:
        """None yet, for a transaction that begins."""
        entries = cls(connection, keyring)
        connection.execution_options(**{_OPTION: entries})
        return entries

    @classmethod
    def of(cls, connection: Connection) -> Entries:
        """Those of the transaction under way. Raises: `RuntimeError` where it is no writing transaction of the registry's."""
        found = connection.get_execution_options().get(_OPTION)
        if not isinstance(found, cls):
            raise RuntimeError("the audit log is written in a writing transaction of the registry alone: registry.write()")
        return found

    def add(self, tenant_id: UUID | None, values: dict[str, Any]) -> None:
        self._waiting.setdefault(tenant_id or INSTALLATION, []).append({"tenant_id": tenant_id, **values})

    def write(self) -> None:
        """Number, sign and insert them: three statements for each chain. Raises: `SecretKeyError`; what the database raises."""
        for chain_id, waiting in sorted(self._waiting.items()):
            head = self._connection.execute(_ADVANCE, {"chain": chain_id, "step": len(waiting)}).one()
            chain = Chain(AuditLog.REGISTRY, None if chain_id == INSTALLATION else chain_id, self._keyring)
            mac = head.mac
            for seq, values in enumerate(waiting, start=head.seq - len(waiting) + 1):
                mac = chain.sign(mac, seq, values)
                values |= {"seq": seq, "mac": mac}
            self._connection.execute(_INSERT, waiting)
            if mac is not None:
                self._connection.execute(_SIGN, {"its_chain": chain_id, "its_mac": mac})
        self._waiting = {}
