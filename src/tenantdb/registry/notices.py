"""What other processes have done to the registry: heard at once where the database tells it, and found out by looking where it does not.

On PostgreSQL every change of a row that somebody may have cached is told to the channel ``tenantdb`` by a trigger. That is quick, and
nothing to rely on: a notice is lost with the connection that listens, and behind a transaction pooler none arrives at all. So every
``cache_ttl / 3`` seconds (a half would leave what is used between two comparisons no time to spare for the second) what is in use is
compared with the registry as well. What is unchanged is believed for another ``cache_ttl`` seconds from the beginning of the comparison,
so that no request has to look it up; what cannot be compared ends as it would have without, so that an outage never has anything believed
for longer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from tenantdb.registry.changes import Change, Changes
from tenantdb.registry.records import Stamp

if TYPE_CHECKING:
    from tenantdb.registry.cache import RecordCache
    from tenantdb.registry.domains import DomainStore
    from tenantdb.registry.revocations import RevocationStore
    from tenantdb.registry.standings import Standings
    from tenantdb.registry.tenants import TenantStore

CHANNEL = "tenantdb"


@dataclass(frozen=True, slots=True)
class Notice:
    """One notice, read: which kind of row was written, and which."""

    kind: str
    tenant_id: UUID | None = None
    user_id: UUID | None = None
    generation: int | None = None
    domain: str | None = None


def read(payload: str) -> Notice | None:
    """A notice from its text; None where it says nothing to this version. Anybody who may connect to the registry can send one."""
    try:
        match payload.split(" "):
            case ["tenant", tenant, version, generation]:
                int(version)
                return Notice("tenant", UUID(tenant), generation=int(generation))
            case ["membership", user, tenant]:
                return Notice("membership", UUID(tenant), UUID(user))
            case ["user", user]:
                return Notice("user", user_id=UUID(user))
            case ["domain", domain]:
                return Notice("domain", domain=domain)
            case ["revocation" | "server" as kind]:
                return Notice(kind)
    except ValueError:
        pass
    return None


class Notices:
    """Has what is cached follow the registry. Its callers are one thread, the watching one."""

    def __init__(
        self,
        *,
        records: RecordCache,
        tenants: TenantStore,
        standings: Standings,
        domains: DomainStore,
        revocations: RevocationStore,
        changes: Changes,
    ) -> None:
        self._records = records
        self._tenants = tenants
        self._standings = standings
        self._domains = domains
        self._revocations = revocations
        self._changes = changes

    def heard(self, payloads: Iterable[str]) -> None:
        """Forget what notices tell of. Raises: `RegistryUnavailable` and its kin, where the list of the revoked could not be read; all else
        is forgotten then."""
        notices = [notice for notice in map(read, dict.fromkeys(payloads)) if notice is not None]
        for notice in notices:
            self._forget(notice)
        if any(notice.kind == "revocation" for notice in notices) and self._revocations.refresh():
            self._changes.tell(Change(kind="revocation"))

    def _forget(self, notice: Notice) -> None:
        if notice.kind == "tenant" and notice.tenant_id is not None:
            self._records.forget(notice.tenant_id)
            self._changes.tell(Change(kind="tenant", tenant_id=notice.tenant_id, generation=notice.generation))
        elif notice.kind == "membership" and notice.user_id is not None:
            self._standings.forget(notice.user_id, notice.tenant_id)
            self._changes.tell(Change(kind="membership", tenant_id=notice.tenant_id, user_id=notice.user_id))
        elif notice.kind == "user" and notice.user_id is not None:
            self._standings.forget(notice.user_id)
            self._changes.tell(Change(kind="user", user_id=notice.user_id))
        elif notice.kind == "domain" and notice.domain is not None:
            self._domains.forget(notice.domain)
        elif notice.kind == "server":
            self._records.clear()
            self._changes.tell(Change(kind="everything"))

    def check(self, *, everything: bool) -> None:
        """Compare what was used since the last time with the registry. ``everything``, after notices may have been missed: what was not
        used as well. Raises: `RegistryUnavailable` and its kin, and nothing is believed for longer then."""
        generations: dict[UUID, int] = {}

        def stamps(tenant_ids: Sequence[UUID]) -> Mapping[UUID, Stamp]:
            found = self._tenants.stamps(tenant_ids)
            generations.update({tenant_id: generation for tenant_id, (_, generation) in found.items()})
            return {tenant_id: stamp for tenant_id, (stamp, _) in found.items()}

        for tenant_id in self._records.check(stamps, everything=everything):
            self._changes.tell(Change(kind="tenant", tenant_id=tenant_id, generation=generations.get(tenant_id)))
        for user_id, of_tenant in self._standings.check(everything=everything):
            self._changes.tell(Change(kind="membership", tenant_id=of_tenant, user_id=user_id))
        self._domains.check(everything=everything)
        if self._revocations.check(everything=everything):
            self._changes.tell(Change(kind="revocation"))
        if everything:
            self._changes.tell(Change(kind="everything"))
