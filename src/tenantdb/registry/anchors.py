"""Anchors in a file: how far each chain of the audit log had come, one line of JSON for each head, only ever appended.

The file is worth what its place is worth: whoever can write to it and to a database can cut both. Ship it off the machine, or register a
hook that does (`AuditStore.on_anchor`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from uuid import UUID

from tenantdb.errors import ConfigError
from tenantdb.model import AuditHead, AuditLog

Key = tuple[AuditLog, UUID | None]
"""A log, and whose."""


def append(path: str, heads: Sequence[AuditHead]) -> None:
    """Write the heads behind what is there, and have the disk keep them. Raises: `ConfigError` where the file cannot be written."""
    lines = "".join(json.dumps(_document(head)) + "\n" for head in heads)
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            if os.fstat(file).st_size and not _ends_a_line(path):  # a crash left half a line
                lines = "\n" + lines
            os.write(file, lines.encode())
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        raise ConfigError(f"audit_anchor: the file cannot be written ({error.strerror})") from error


def read(path: str) -> Iterator[AuditHead]:
    """The heads in the file, if there is one; a line that is damaged is none. Raises: `ConfigError` where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    yield _head(json.loads(line))
                except (ValueError, KeyError, TypeError):
                    continue
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"audit_anchor: the file cannot be read ({error.strerror})") from error


def newest(heads: Iterable[AuditHead]) -> dict[Key, AuditHead]:
    """Of each chain the head that is furthest on. It stands for the others, because each entry vouches for all before it."""
    found: dict[Key, AuditHead] = {}
    for head in heads:
        known = found.get((head.log, head.tenant_id))
        if known is None or known.seq < head.seq:
            found[head.log, head.tenant_id] = head
    return found


def _document(head: AuditHead) -> dict[str, object]:
    return {
        "log": str(head.log),
        "tenant_id": None if head.tenant_id is None else str(head.tenant_id),
        "seq": head.seq,
        "mac": None if head.mac is None else head.mac.hex(),
        "at": head.at.isoformat(),
    }


def _head(document: dict[str, str | None]) -> AuditHead:
    tenant_id, mac = document["tenant_id"], document["mac"]
    return AuditHead(
        log=AuditLog(str(document["log"])),
        tenant_id=None if tenant_id is None else UUID(tenant_id),
        seq=int(str(document["seq"])),
        mac=None if mac is None else bytes.fromhex(mac),
        at=datetime.fromisoformat(str(document["at"])),
    )


def _ends_a_line(path: str) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"
