"""What vouches for the tenant of a queued task: a stamp in its message's headers.

Whoever can write to the broker can queue any task; without a stamp he could have it run for any tenant. A stamp is an HMAC over the task's
name, its id and the tenant, so that one taken from a message serves no other task, no other id and no other tenant. It is not over the
arguments: a broker that others can write to can have a task run again, or with other arguments, for the tenant that it was queued for.

Pure: the time is an argument.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from tenantdb.errors import TaskRefused

HEADER: Final = "tenantdb"
_VERSION = 1
_EVERY = "*"


class EveryTenant(enum.Enum):
    """``apply_async(tenant=EVERY_TENANT)``: not one tenant but all, each in its turn."""

    EVERY_TENANT = enum.auto()


EVERY_TENANT: Final = EveryTenant.EVERY_TENANT
Scope = UUID | EveryTenant
"""For whom a task runs: one tenant, by id, or all."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """For whom a task runs, and who wanted it. ``at``: the moment, in seconds since 1970, that its age counts from: when it was published,
    or its eta where that is later. ``waits``: how often it has been put off since, because its tenant could not be served."""

    scope: Scope
    at: int
    actor: str = "system"
    request_id: str | None = None
    waits: int = 0


class Stamps:
    """Makes and verifies stamps. ``keys``: the newest first, which signs; any verifies. ``max_age`` is in seconds."""

    def __init__(self, keys: Sequence[bytes], *, max_age: float) -> None:
        self._keys = {hashlib.sha256(b"tenantdb/task-key-id/v1" + key).hexdigest()[:16]: key for key in reversed(keys)}
        self._newest = list(self._keys)[-1]
        self.max_age = max_age

    def make(self, stamp: Stamp, task: str, task_id: str) -> dict[str, Any]:
        """What goes into the headers of the message of this task with this id."""
        header = {
            "v": _VERSION,
            "key": self._newest,
            "tenant": _EVERY if stamp.scope is EVERY_TENANT else str(stamp.scope),
            "at": stamp.at,
            "waits": stamp.waits,
            "actor": stamp.actor,
            "request": stamp.request_id,
        }
        return {**header, "mac": _mac(self._keys[self._newest], header, task, task_id)}

    def verify(self, header: Any, task: str, task_id: str, *, now: float) -> Stamp:
        """What a message's header says. Raises: `TaskRefused`."""
        if header is None:
            raise TaskRefused(
                f"the message of {task} names no tenant. It was not published by a process that has called tenantdb.celery.setup()"
            )
        match header:
            case {
                "v": 1,
                "key": str(key_id),
                "mac": str(mac),
                "tenant": str(tenant),
                "at": int(at),
                "waits": int(waits),
                "actor": str(actor),
            }:
                request_id = header.get("request")
            case _:
                raise TaskRefused(f"the tenant header of {task} is malformed")
        key = self._keys.get(key_id)
        if key is None:
            raise TaskRefused(f"the tenant header of {task} was signed with a key that is not here")
        if not hmac.compare_digest(mac.encode(errors="replace"), _mac(key, header, task, task_id).encode()):
            raise TaskRefused(f"the tenant header of {task} is forged, or of another task")
        if now > at + self.max_age:
            raise TaskRefused(f"the tenant header of {task} has expired: it is {now - at:.0f} s old, and max_age is {self.max_age:.0f} s")
        return Stamp(EVERY_TENANT if tenant == _EVERY else UUID(tenant), at, actor, request_id, waits)


def _mac(key: bytes, header: dict[str, Any], task: str, task_id: str) -> str:
    """Over a JSON list, in which no two different headers read alike."""
    signed = ["tenantdb/task", task, task_id, *(header.get(name) for name in ("v", "key", "tenant", "at", "waits", "actor", "request"))]
    return hmac.digest(key, json.dumps(signed).encode(), "sha256").hex()
