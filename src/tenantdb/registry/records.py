"""What the data path needs to know of a tenant, in one frozen piece."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from tenantdb.model import Server, Tenant

Stamp = tuple[int, datetime | None]
"""By what two copies of a record are told to be the same: the tenant's version, and when its server's row was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRecord:
    """A tenant, where it is, and the sealed password of its runtime role, two while that is being changed. Sealed: the plain one is made
    per connection only."""

    tenant: Tenant
    server: Server | None = None
    runtime_secret: bytes | None = field(default=None, repr=False)
    runtime_secret_pending: bytes | None = field(default=None, repr=False)
    owner_secret: bytes | None = field(default=None, repr=False)
    """In the hands of who has just made it; never read with the rest."""
    server_written: datetime | None = None

    @property
    def stamp(self) -> Stamp:
        return self.tenant.version, self.server_written
