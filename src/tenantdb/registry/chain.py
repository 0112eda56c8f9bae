"""The chain of an audit log: each entry carries a MAC over itself and over the MAC before it.

So an entry cannot be edited, taken out, moved or slipped in by anybody who has not the key, and the key is in no database. What a chain
cannot tell by itself is that its end was cut off, together with the head that says how far it goes: that takes an anchor, a copy of the
head somewhere else. Pure: no I/O, no clock.

A tenant has two chains, one in the registry and one beside its records; what belongs to no tenant is in a chain of the installation's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any, Protocol
from uuid import UUID

from tenantdb.model import AuditHead, AuditLog, Break, ChainReport
from tenantdb.registry.secrets import Keyring

INSTALLATION = UUID(int=0)
"""The chain of what belongs to no tenant."""

_VERSION = b"tenantdb/audit/v1"


class Entry(Protocol):
    """A row of an audit log."""

    seq: int
    mac: bytes | None
    at: datetime
    actor: str
    action: str
    object: str | None
    outcome: str
    request_id: str | None
    reason: str | None
    source: str | None
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Chain:
    """One chain, and the keys that vouch for it."""

    log: AuditLog
    tenant_id: UUID | None
    keyring: Keyring

    def sign(self, previous: bytes | None, seq: int, entry: Mapping[str, Any]) -> bytes | None:
        """The MAC of an entry that is about to be written. None without a key. Raises: `SecretKeyError`, as `Keyring.sign`."""
        return self.keyring.sign(_message(previous, seq, entry), *self._label)

    def vouches(self, mac: bytes, previous: bytes | None, seq: int, entry: Mapping[str, Any]) -> bool | None:
        return self.keyring.vouches(mac, _message(previous, seq, entry), *self._label)

    def seal(self, kept_from: int, kept_mac: bytes | None) -> bytes | None:
        """What vouches for a checkpoint: the entries before ``kept_from`` were taken out by us, and the last of them had this MAC."""
        return self.keyring.sign(_parts(str(kept_from), kept_mac), *self._label, "kept")

    def sealed(self, seal: bytes, kept_from: int, kept_mac: bytes | None) -> bool | None:
        return self.keyring.vouches(seal, _parts(str(kept_from), kept_mac), *self._label, "kept")

    @property
    def _label(self) -> tuple[str, str]:
        return str(self.log), str(self.tenant_id or INSTALLATION)


@dataclass(frozen=True, slots=True)
class Head:
    """The row that says how far a chain goes, and from where on it was kept."""

    seq: int
    mac: bytes | None
    kept_from: int | None = None
    kept_mac: bytes | None = None
    kept_seal: bytes | None = None


class Verifier:
    """Walks along one chain, entry by entry in the order of their numbers, and keeps the first thing that does not hold.

    Invariant: ``seq`` and ``mac`` are those of the last entry that holds. Memory does not grow with the chain.
    """

    def __init__(self, chain: Chain, head: Head | None, anchor: AuditHead | None = None) -> None:
        self._chain = chain
        self._head = head
        self._anchor = anchor
        self._entries = self._unauthenticated = 0
        self._signed = False  # since an entry with a MAC stands before, one without is forged
        self._broken_at: int | None = None
        self._why: Break | None = None
        self.seq, self.mac = 0, None if head is None else head.kept_mac
        if head is not None and head.kept_from is not None:
            self.seq = head.kept_from - 1
            self._look_at_checkpoint(head, head.kept_from)

    @property
    def holds(self) -> bool:
        """Whether nothing was wrong so far."""
        return self._why is None

    def feed(self, entry: Entry | Any) -> None:
        """The next entry."""
        self._entries += 1
        expected = self.seq + 1
        if not self.holds:
            if self._why is Break.EDITED and self._broken_at == expected and self._belongs(entry, expected):
                self._why = Break.REORDERED  # the entry that should stand there stands here
            return
        if entry.seq != expected:
            self._break(*((expected, Break.MISSING) if entry.seq > expected else (entry.seq, Break.FORGED)))
        elif entry.mac is None:
            self._unauthenticated += 1
            if self._signed:
                self._break(expected, Break.FORGED)
        elif self._chain.keyring.signs:
            found = self._chain.vouches(entry.mac, self.mac, expected, fields(entry))
            if not found:
                self._break(expected, Break.UNKNOWN_KEY if found is None else Break.EDITED)
            self._signed = True
        else:
            self._unauthenticated += 1
        if self.holds:
            self.seq, self.mac = expected, entry.mac
            self._compare_with_anchor()

    def finish(self, *, highest: int = 0, stray: bool = False) -> ChainReport:
        """The chain has ended. ``highest`` is the highest number that was seen, also behind the head; ``stray``: an entry has none."""
        if self.holds and self._head is None:
            self._break(*((1, Break.ANCHOR) if self._anchor is not None and not self._entries else (self.seq, Break.HEAD)))
        if self.holds and self._head is not None:
            if self.seq < self._head.seq:
                self._break(self.seq + 1, Break.MISSING)
            elif self.mac != self._head.mac:
                self._break(self.seq, Break.HEAD)
            elif highest > self._head.seq or stray:
                self._break(self._head.seq + 1, Break.FORGED)
        if self.holds and self._anchor is not None and self._anchor.seq > self.seq:
            self._break(self.seq + 1, Break.ANCHOR)
        if self.holds and self._chain.keyring.signs and self._unauthenticated:
            # Written before there was a key, or emptied by whoever owns the tables: nobody can tell which.
            self._break(self.seq - self._entries + 1, Break.NOT_AUTHENTICATED)
        return ChainReport(
            log=self._chain.log,
            tenant_id=self._chain.tenant_id,
            entries=self._entries,
            unauthenticated=self._unauthenticated,
            broken_at=self._broken_at,
            why=self._why,
        )

    def _look_at_checkpoint(self, head: Head, kept_from: int) -> None:
        if self._chain.keyring.signs:
            sealed = None if head.kept_seal is None else self._chain.sealed(head.kept_seal, kept_from, head.kept_mac)
            if not sealed:
                self._break(kept_from, Break.UNKNOWN_KEY if sealed is None and head.kept_seal is not None else Break.FORGED)
        self._signed = head.kept_mac is not None
        if self.holds:
            self._compare_with_anchor()

    def _compare_with_anchor(self) -> None:
        if self._anchor is not None and self._anchor.seq == self.seq and self._anchor.mac != self.mac:
            self._break(self.seq, Break.ANCHOR)

    def _belongs(self, entry: Entry | Any, seq: int) -> bool:
        return entry.mac is not None and bool(self._chain.vouches(entry.mac, self.mac, seq, fields(entry)))

    def _break(self, at: int, why: Break) -> None:
        self._broken_at, self._why = at, why


FIELDS = ("at", "actor", "action", "object", "outcome", "request_id", "reason", "source", "details")
"""What an entry says, in the order in which it is signed. Number and tenant are signed with it."""


def fields(entry: Entry | Any) -> dict[str, Any]:
    """What an entry says, of a row."""
    return {name: getattr(entry, name) for name in FIELDS}


def plain(text: str | None) -> str | None:
    """Text as every database keeps it: PostgreSQL takes neither NUL nor half a surrogate pair. Other control characters stay."""
    if text is None:
        return None
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()


def plain_details(details: Mapping[str, Any] | None) -> dict[str, Any]:
    """Details as they come back from every database, so that a MAC over them holds: jsonb writes 1e16 as a whole number, for instance.

    Raises: `TypeError` or `ValueError` for what JSON cannot hold.
    """
    written = json.dumps(dict(details or {}), allow_nan=False)
    result: dict[str, Any] = _plain(json.loads(written))
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, float) and value.is_integer():
        return int(Decimal(repr(value)))
    if isinstance(value, dict):
        return {plain(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _message(previous: bytes | None, seq: int, entry: Mapping[str, Any]) -> bytes:
    texts = [entry[name] for name in FIELDS[1:-1]]
    moment = entry["at"].astimezone(timezone.utc).isoformat(timespec="microseconds")
    details = json.dumps(dict(entry["details"]), sort_keys=True, separators=(",", ":"))
    return _parts(previous, str(seq), moment, *texts, details)


def _parts(*parts: str | bytes | None) -> bytes:
    """Each with its length, and nothing unlike an empty text: otherwise ("ab", "c") and ("a", "bc") would be one message."""
    message = [_VERSION]
    for part in parts:
        if part is None:
            message.append(b"-")
        else:
            encoded = part.encode() if isinstance(part, str) else part
            message.append(b"+" + len(encoded).to_bytes(4, "big") + encoded)
    return b"".join(message)
