"""New passwords for a tenant's roles, under traffic.

PostgreSQL keeps one password per role, so for a moment the registry and the server may know different ones. The registry therefore keeps
both until the server is known to have the new one; a connect that is refused tries the other. What is connected stays connected until it
comes back; what is still there after `drain_timeout` is ended.
"""

from __future__ import annotations

import threading
import time
from datetime import datetime

from pydantic import SecretStr

from tenantdb.model import DatabaseRole
from tenantdb.provisioning.work import Also, Work
from tenantdb.registry.secrets import password

_POLL = 0.5
_MARGIN = 1.0  # seconds


def draw_passwords(work: Work) -> Also | None:
    tenant, server = work.tenant, work.server

    def sealed(role: DatabaseRole, name: str | None) -> bytes:
        return work.registry.seal_password(
            password(), role=role, tenant=tenant, server=server, database=tenant.database or "", role_name=name or ""
        )

    owner, runtime = sealed(DatabaseRole.OWNER, tenant.owner_role), sealed(DatabaseRole.RUNTIME, tenant.runtime_role)
    return lambda connection: work.registry.tenants.pend_secrets(connection, tenant, owner=owner, runtime=runtime)


def change_passwords(work: Work) -> Also | None:
    """The server's turn, then at once the registry's. Run again, it sets the same passwords once more."""
    work.reload()  # with the pending ones
    roles = (DatabaseRole.OWNER, DatabaseRole.RUNTIME)
    owner, runtime = (SecretStr(work.registry.passwords(work.record, role)[-1]) for role in roles)
    work.workshop().set_passwords(work.tenant, owner, runtime)
    return lambda connection: work.registry.tenants.promote_secrets(connection, work.tenant)


def drain(work: Work) -> Also | None:
    """Let sessions that began with the old passwords finish, for a while, and end the rest."""
    work.shop.engines.forget(work.tenant.id)
    changed_at: datetime = work.workshop().now()
    roles = [work.tenant.owner_role or "", work.tenant.runtime_role or ""]
    # Other processes believe their copy of the record that long, and hand out no connection of an older generation afterwards: what rests
    # longer is nobody's.
    rested = work.settings.cache_ttl + _MARGIN
    deadline = time.monotonic() + work.settings.drain_timeout
    while work.workshop().sessions(work.tenant, before=changed_at) and time.monotonic() < deadline:
        work.workshop().end_sessions(work.tenant, roles=roles, before=changed_at, idle_for=rested)
        work.release()  # the drained sessions may be those that our place in the budget waits behind
        threading.Event().wait(_POLL)
    work.workshop().end_sessions(work.tenant, roles=roles, before=changed_at)
    return None
