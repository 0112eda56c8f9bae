"""What names a tenant: one canonical form, applied before cache, registry and audit, and the functions that find a name in a request. Pure.

Two spellings of one tenant would be two cache entries, two audit subjects and one way around a check, so anything that is not already
canonical is refused, never folded: no Unicode normalisation, no odd UUIDs (``urn:``, braces, full-width digits). The one courtesy is
letter case of a UUID, which RFC 9562 says to ignore on input.

A resolver finds what a request *says*, and proves nothing. Where somebody signs in, the credentials alone decide which tenant it is, and
whatever else names one must agree with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from tenantdb.errors import ConfigError, InvalidSlug, InvalidTenantKey
from tenantdb.model import Facts, Tenant

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
        if _SLUG.fullmatch(value) and (len(value) < 32 or not _UUID_SHAPED.fullmatch(value)):
            return value
        if len(value) == 36 and _UUID.fullmatch(value.lower()):
            return UUID(value)
    raise InvalidTenantKey(_shown(value), f"a slug has {SLUG_RULE}; an id is written as 8-4-4-4-12 hex digits")


def _shown(value: object) -> str:
    """Bad input in an error message: printable, on one line, and short."""
    text = ascii(value)[1:-1] if isinstance(value, str) else type(value).__name__
    return text if len(text) <= 48 else text[:45] + "..."


# -- from a request to a tenant ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DomainName:
    """A tenant named by a domain of its own; which tenant that is, the registry knows (``db.domains``)."""

    name: str

    def __str__(self) -> str:
        return self.name


TenantName = str | UUID | DomainName
Resolver = Callable[[Facts], "TenantName | tuple[TenantName, ...] | None"]
"""From the facts of a request to the tenant it names: a slug, an id, a `DomainName`, or None. Pure: it asks neither registry nor clock.

A tuple holds several names that must all be the same tenant's, which only who has looked it up can tell; see `all_agree`.
"""


def names_of(resolver: Resolver, facts: Facts) -> tuple[TenantName, ...]:
    """Every name that a resolver finds, in canonical form. Raises: `InvalidTenantKey`."""
    found = resolver(facts)
    if found is None:
        return ()
    return tuple(name if isinstance(name, DomainName) else tenant_key(name) for name in (found if isinstance(found, tuple) else (found,)))


def claim(name: str = "tenant_id") -> Resolver:
    """The tenant that a claim of the verified token names."""

    def by_claim(facts: Facts) -> TenantName | None:
        value = facts.claims.get(name)
        return None if value is None else tenant_key(value)

    return by_claim


def header(name: str = "X-Tenant-ID") -> Resolver:
    """The tenant that a header names. Anybody can send it, so it proves nothing: beside a token it can only agree."""
    wanted = name.lower()

    def by_header(facts: Facts) -> TenantName | None:
        return facts.headers.get(wanted)

    return by_header


def subdomain(*base_domains: str) -> Resolver:
    """``acme`` of the host ``acme.clinic.example``, below one of ``base_domains`` and at no other host.

    The base domains themselves and names that are reserved (``www``, ``api``) name no tenant. ``X-Forwarded-Host`` is not read: have the
    server believe its proxy, if it should. Raises: `ConfigError` without a base domain, or for one that is no host name.
    """
    bases = _base_domains(base_domains, "subdomain")

    def by_subdomain(facts: Facts) -> TenantName | None:
        if "." + facts.host in bases:  # below another one, perhaps
            return None
        for base in bases:
            if facts.host.endswith(base):
                label = facts.host[: -len(base)]
                return None if label in RESERVED_SLUGS else label
        return None

    return by_subdomain


_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
# RFC 1123. The last label has a letter, as every top-level domain does (RFC 3696, 2), so that no spelling of an IP address is one.
_DOMAIN = re.compile(rf"(?=.{{1,253}}\Z)(?:{_LABEL}\.)+(?=[a-z0-9-]*[a-z])(?!0x[0-9a-f]*\Z){_LABEL}", re.ASCII)


def is_domain(value: object) -> bool:
    """Whether this is a host name in its one canonical form: what `custom_domain` names, and what a tenant may have."""
    return isinstance(value, str) and _DOMAIN.fullmatch(value) is not None


def custom_domain(*own: str) -> Resolver:
    """The tenant whose own domain the host is; ``own`` are the application's base domains, at and below which it is nobody's.

    Which tenant a domain belongs to is written with ``db.domains.add("praxis.example", "acme")``.
    """
    bases = _base_domains(own, "custom_domain") if own else ()

    def by_domain(facts: Facts) -> TenantName | None:
        host = facts.host
        if not is_domain(host) or any(host.endswith(base) or host == base[1:] for base in bases):
            return None
        return DomainName(host)

    return by_domain


def path_prefix(prefix: str = "/t") -> Resolver:
    """``acme`` of the path ``/t/acme/patients``. The router sees the whole path: give its routes the prefix ``/t/{tenant}``.

    Raises: `ConfigError` for a prefix that is no path.
    """
    if not re.fullmatch(r"(?:/[A-Za-z0-9._~-]+)*", prefix, re.ASCII):
        raise ConfigError(f"path_prefix takes the path before the tenant, such as '/t', not {prefix!r}")
    start = prefix + "/"

    def by_path(facts: Facts) -> TenantName | None:
        if not facts.path.startswith(start):
            return None
        return facts.path[len(start) :].partition("/")[0] or None

    return by_path


def first_of(*resolvers: Resolver) -> Resolver:
    """What the first resolver says that names a tenant at all."""

    def first(facts: Facts) -> tuple[TenantName, ...]:
        return next((names for each in resolvers if (names := names_of(each, facts))), ())

    return first


def all_agree(*resolvers: Resolver) -> Resolver:
    """All that the resolvers name, which must be one tenant: a request that names two is refused with `TenantMismatch`. One that names none
    does not count."""

    def together(facts: Facts) -> tuple[TenantName, ...]:
        return tuple(name for each in resolvers for name in names_of(each, facts))

    return together


def _base_domains(given: tuple[str, ...], who: str) -> tuple[str, ...]:
    bases = tuple(base.lower().removesuffix(".") for base in given)
    for base in bases:
        if not is_domain(base) and base != "localhost":
            raise ConfigError(f"{who} takes base domains such as 'clinic.example', not {base!r}")
    if not bases:
        raise ConfigError(f"{who} needs the base domains below which tenants are, such as 'clinic.example'")
    return tuple("." + base for base in sorted(bases, key=len, reverse=True))  # the longest first, where one is below another
