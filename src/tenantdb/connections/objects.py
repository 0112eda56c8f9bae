"""Whose a mapped object is, so that a row of one tenant is never written into another's database.

An object that has come from a tenant's database, or went there, belongs to that tenant. While it is in a session it belongs to the
session's tenant; when it leaves, it is stamped. A stamp is a value on SQLAlchemy's state of the object: it goes wherever the object goes,
through `pickle` and ``make_transient`` too. It is no part of identity keys, which two sessions must be able to share, and it is not set
when rows are loaded, which would cost a third of the time that loading takes.

Nothing here has to hear of every way out of a session. An object that has a row and neither stamp nor session belongs to nobody that we
know of, and no tenant's session takes it: what is overlooked is refused, not let through.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import UUID

from sqlalchemy import event
from sqlalchemy.orm import Mapper

from tenantdb.errors import CrossTenantError

_STAMP = "_tenantdb_owner"


class SessionKey(int):
    """What SQLAlchemy numbers a session by, and what each object in it keeps of it; here it also says whose the session is.

    So it is still known of the objects of a session that was collected and never closed, of which nothing is told to them.
    """

    tenant_id: UUID | None = None  # until the session has found its tenant


def owner_of(state: Any) -> UUID | None:
    """The tenant that an object belongs to: by its stamp, or else by its session."""
    owner: UUID | None = state.__dict__.get(_STAMP)
    return getattr(state.session_id, "tenant_id", None) if owner is None else owner


def stamp(states: Iterable[Any], owner: UUID) -> None:
    """These objects leave a session of a tenant's. Those without a row are nobody's yet."""
    for state in states:
        if state.key is not None:
            state._tenantdb_owner = owner


def refuse_foreign(state: Any, tenant_id: UUID) -> None:
    """Raises: `CrossTenantError` for an object of another tenant, and for one with a row of which nobody knows whose it is."""
    owner = owner_of(state)
    if owner != tenant_id and (owner is not None or state.key is not None):
        raise CrossTenantError(state.class_.__name__, None if owner is None else str(owner), str(tenant_id))


@event.listens_for(Mapper, "pickle", raw=True)
def _take_along(state: Any, pickled: dict[str, Any]) -> None:
    """Also where the object is pickled in its session, and so has no stamp yet."""
    owner = owner_of(state)
    if owner is not None and (state.key is not None or _STAMP in state.__dict__):
        pickled[_STAMP] = owner


@event.listens_for(Mapper, "unpickle", raw=True)
def _bring_back(state: Any, pickled: dict[str, Any]) -> None:
    if _STAMP in pickled:
        state._tenantdb_owner = pickled[_STAMP]
