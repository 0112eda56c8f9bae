"""The steps by which a tenant is let go, taken back, or erased. Each may run twice.

The registry has said already that the tenant is not served; these make the database server say it too, or lift that again. What is done
depends on the state that is found, not on the one that was wanted when the operation was written down.
"""

from __future__ import annotations

import hashlib
import json
from datetime import timedelta
from typing import Any

from sqlalchemy.engine import Connection

from tenantdb.backends import FenceLevel
from tenantdb.context import current_actor
from tenantdb.errors import PurgeRefused
from tenantdb.model import Tenant, TenantState
from tenantdb.provisioning.work import Also, Work
from tenantdb.registry.tables import utcnow
from tenantdb.settings import SQLITE

_LEVELS = {
    TenantState.SUSPENDED: FenceLevel.SUSPENDED,
    TenantState.DELETED: FenceLevel.CLOSED,
    TenantState.PURGING: FenceLevel.CLOSED,
}


def fence(work: Work) -> Also | None:
    """Make the server refuse whom the registry refuses, and end the sessions that are left."""
    level = _LEVELS.get(work.tenant.state)
    if level is None:  # served again, or gone, by now
        return None
    if work.record.server is not None:
        work.workshop().fence(work.tenant, level)
    return lambda connection: work.registry.tenants.fenced(connection, work.tenant)


def lift(work: Work) -> Also | None:
    """Let the tenant's roles in again, right before the registry says that it is served: no request is refused in between."""
    work.reload()
    if work.record.server is not None and not _is_overtaken(work, work.tenant):
        work.workshop().fence(work.tenant, FenceLevel.OPEN)
    return None


def serve_again(work: Work) -> Also | None:
    def serve(connection: Connection) -> Tenant | None:
        tenants = work.registry.tenants
        tenants.lock(connection, work.tenant)
        found = tenants.find_in(connection, work.tenant.id)
        if _is_overtaken(work, found):
            return found
        return tenants.transition_in(connection, found, TenantState.ACTIVE, action=f"tenant.{work.operation.kind}", bump_generation=True)

    return serve


def _is_overtaken(work: Work, found: Tenant) -> bool:
    """Whether somebody has suspended, deleted or purged it since it was asked for, or an earlier attempt has got to the end: each of these
    raises the generation. An old wish must not undo a newer one."""
    return found.generation != work.operation.payload.get("generation")


def drop_database(work: Work) -> Also | None:
    """DROP DATABASE cannot be undone, nor be interrupted without leaving the database unusable; so it comes when all is decided."""
    work.reload()  # ending its sessions may have taken a while, and somebody may have put a hold on it
    ensure_purging(work)
    if work.record.server is None:
        return None
    workshop = work.workshop()
    workshop.hold(work.tenant.database or "")
    workshop.drop_database(work.tenant)
    if workshop.find_database(work.tenant.database or ""):
        raise PurgeRefused(work.tenant.slug, "its database is still there after it was dropped")
    return None


def ensure_purging(work: Work) -> None:
    """Raises: `PurgeRefused`."""
    if work.tenant.state is not TenantState.PURGING:
        raise PurgeRefused(work.tenant.slug, f"it is {work.tenant.state} by now")
    if work.tenant.legal_hold is not None:  # the serving login may write a state, and no hold
        raise PurgeRefused(work.tenant.slug, "there is a legal hold on it")


def drop_roles(work: Work) -> Also | None:
    if work.record.server is not None:
        work.workshop().drop_roles(work.tenant)
    return None


def erase(work: Work) -> Also | None:
    """Leave a tombstone and the certificate."""
    proof = certificate(work)
    return lambda connection: work.registry.tenants.erase(connection, work.tenant, proof, besides=work.operation.id)


def certificate(work: Work, *, given_back: bool = False) -> dict[str, Any]:
    """What was erased, by whom, and what else may hold data until when. No word of it names the customer, unless the name of a database
    does that was adopted: of one that was given back, it says to whom."""
    tenant, server, now = work.tenant, work.record.server, utcnow()
    until = (now + timedelta(days=work.settings.backup_retention)).isoformat()
    erased: dict[str, Any] = {"registry": ["name", "slug", "contact", "metadata", "memberships", "refresh tokens", "domains", "secrets"]}
    if server is not None:
        erased |= {"server": server.name} if given_back else {"server": server.name, "database": tenant.database}
        erased |= {} if server.backend == SQLITE else {"roles": [tenant.owner_role, tenant.runtime_role]}
    may_remain = [
        {"what": "backups of the database server and of the registry", "until": until},
        {"what": "the audit log, which names the tenant by its id alone", "until": "the end of audit_retention"},
        {"what": "logs of the application and of the database server", "until": "as these are kept"},
    ]
    if server is not None and server.backend != SQLITE:
        may_remain.insert(0, {"what": "the write-ahead log and its archive, and replicas that follow late", "until": until})
    told = {
        "tenant": str(tenant.id),
        "purged_at": now.isoformat(),
        "deleted_at": None if tenant.deleted_at is None else tenant.deleted_at.isoformat(),
        "asked_for_by": work.operation.payload.get("actor"),
        "carried_out_by": current_actor().actor,
        "operation": str(work.operation.id),
        "erased": erased,
        "may_remain": may_remain,
    }
    if given_back:
        told |= {"given_back": {"database": tenant.database, "to": tenant.adopted_from}}
    return {**told, "sha256": hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()}
