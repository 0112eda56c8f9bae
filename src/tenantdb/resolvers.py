"""One canonical form for what names a tenant, applied before cache, registry and audit. Pure.

Two spellings of one tenant would be two cache entries, two audit subjects and one way around a check, so anything that is not already
canonical is refused, never folded: no Unicode normalisation, no odd UUIDs (``urn:``, braces, full-width digits). The one courtesy is
letter case of a UUID, which RFC 9562 says to ignore on input.
"""

from __future__ import annotations

import re
from uuid import UUID

from tenantdb.errors import InvalidSlug, InvalidTenantKey
from tenantdb.model import Tenant

SLUG_RULE = "3 to 40 characters, lower-case letters a-z, digits and hyphens, beginning with a letter, not ending with a hyphen"
_SLUG = re.compile(r"[a-z][a-z0-9-]{1,38}[a-z0-9]", re.ASCII)
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.ASCII)
_UUID_SHAPED = re.compile(r"-*(?:[0-9a-f]-*){32}", re.ASCII)  # what uuid.UUID would read: hyphens anywhere, or none

RESERVED_SLUGS = frozenset(
    "www api app admin administrator auth login logout register signup status health healthz docs help support mail smtp ftp ssh"
    " static assets cdn blog shop root system tenant tenants tenantdb central registry internal public private test staging dev"
    " postgres template0 template1 all replication localhost billing account accounts security abuse webmaster hostmaster"
    " postmaster noreply no-reply".split()
)
"""Names that an application, a DNS zone or PostgreSQL uses itself; a sign-up must not squat them."""


def canonical_slug(value: str) -> str:
    """Check that ``value`` may be a new tenant's slug and return it. Raises: `InvalidSlug`, which says the rule that is broken."""
    if not _SLUG.fullmatch(value):
        raise InvalidSlug(_shown(value), f"a slug has {SLUG_RULE}")
    if _UUID_SHAPED.fullmatch(value):
        raise InvalidSlug(_shown(value), "it has the shape of a UUID, which names a tenant by its id")
    if value in RESERVED_SLUGS:
        raise InvalidSlug(_shown(value), "the name is reserved")
    return value


def tenant_key(value: str | UUID | Tenant) -> str | UUID:
    """The key to look a tenant up by: its slug or its id. Raises: `InvalidTenantKey`; nothing else names a tenant."""
    if isinstance(value, Tenant):
        return value.id
    if isinstance(value, UUID):
        return value
    if isinstance(value, str):
        if _SLUG.fullmatch(value) and not _UUID_SHAPED.fullmatch(value):
            return value
        if len(value) == 36 and _UUID.fullmatch(value.lower()):
            return UUID(value)
    raise InvalidTenantKey(_shown(value), f"a slug has {SLUG_RULE}; an id is written as 8-4-4-4-12 hex digits")


def _shown(value: object) -> str:
    """Bad input in an error message: printable, on one line, and short."""
    text = ascii(value)[1:-1] if isinstance(value, str) else type(value).__name__
    return text if len(text) <= 48 else text[:45] + "..."
