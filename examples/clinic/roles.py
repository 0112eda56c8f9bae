"""Who may do what: one table. Roles come from the registry with each request, so that a change counts at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from tenantdb import MemberRole

Action = Literal["read", "create", "update", "delete", "restore", "export", "erase"]

READ: frozenset[Action] = frozenset({"read"})
WRITE: frozenset[Action] = READ | {"create", "update"}
ALL: frozenset[Action] = WRITE | {"delete", "restore"}
PRIVACY: frozenset[Action] = frozenset({"export", "erase"})  # what a person may ask for, of whom the rows are

_ROLES = (MemberRole.OWNER, MemberRole.ADMIN, MemberRole.USER, MemberRole.READONLY)
_TABLE: Mapping[str, tuple[frozenset[Action], ...]] = {
    # resource          owner, admin, user, readonly
    "patients": (ALL | PRIVACY, ALL | PRIVACY, WRITE, READ),
    "practitioners": (ALL, ALL, READ, READ),
    "appointments": (ALL, ALL, ALL, READ),
    "medical-records": (ALL, ALL, WRITE, READ),
    "documents": (ALL, ALL, WRITE, READ),
    "consents": (ALL, ALL, WRITE, READ),
    "consent-templates": (ALL, ALL, READ, READ),
    "products": (ALL, ALL, READ, READ),
    "services": (ALL, ALL, READ, READ),
    "categories": (ALL, ALL, READ, READ),
}


def allowed(resource: str, action: Action) -> list[MemberRole]:
    """The roles that may take `action` on `resource`."""
    return [role for role, actions in zip(_ROLES, _TABLE[resource], strict=True) if action in actions]
