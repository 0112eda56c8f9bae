"""From the facts of a request to a verdict: which paths are exempt, which are refused, and what an error looks like to a client.

Pure, and the one brain of every adapter, so that two web frameworks cannot answer the same request differently.

1. A path that two programs may read differently (``//``, dot segments, encoded separators) is refused before anything is decided by it.
2. Exempt means: exactly this path, or below this path at a segment boundary, as the *router* sees it, and in its letter case.
3. What a client reads says nothing about tenants it has no access to: an unknown, a foreign and a deleted one give the same bytes.
4. Where somebody signs in, the credentials decide which tenant is bound. Host, path and header can agree, or the request is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any
from uuid import UUID

from tenantdb import errors
from tenantdb.errors import (
    AuthenticationRequired,
    ConfigError,
    InvalidPath,
    InvalidTenantKey,
    InvalidToken,
    TenantDBError,
    TenantMismatch,
    TenantNotFound,
)
from tenantdb.model import Facts, Identity, Tenant
from tenantdb.resolvers import DomainName, Resolver, TenantName, names_of, tenant_key

_RETRY_AFTER = 30  # seconds, where an error that a client may try again after does not know better


_HOST = re.compile(r"([^\s:,\[\]]*|\[[^\s,\[\]]*\])(?::[0-9]*)?", re.ASCII)


def host_name(header: str) -> str:
    """The host of a Host header: lower case, without port and without the dot that ends a full name.

    What is not one host stays as it is (two headers that were joined, a port that is none, letters of other alphabets), so that it is the
    name of nobody and not, cut or folded, of somebody.
    """
    match = _HOST.fullmatch(header.strip(" \t"))
    return match[1].lower().removesuffix(".") if match is not None and header.isascii() else header


def bearer_token(facts: Facts) -> str | None:
    """The token of ``Authorization: Bearer ...``; None without the header or with another scheme. Raises: `InvalidToken` if malformed."""
    scheme, _, token = facts.headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() != "bearer":
        return None
    token = token.strip()
    if not token or " " in token or "," in token:  # a header sent twice is joined by a comma
        raise InvalidToken("the Authorization header holds no token, or more than one")
    return token


# -- paths -----------------------------------------------------------------------------------------------------------------------------

# The lookahead also ends a dot segment at ";", because some servers drop what follows it.
_AMBIGUOUS = re.compile(r"//|\\|[\x00-\x1f\x7f]|%(?:2f|5c|[01][0-9a-f]|7f)|/(?:\.|%2e){1,2}(?=/|;|%3b|\Z)", re.ASCII | re.IGNORECASE)


def check_path(path: str, raw_path: str | None) -> None:
    """Refuse a path that programs read differently. ``path`` is decoded, ``raw_path`` as it was sent, where the server tells.

    Both are searched for encoded characters, so that what a second decoding would reveal is refused too. Raises: `InvalidPath`.
    """
    if not path.startswith("/") or _AMBIGUOUS.search(path):
        raise InvalidPath
    if raw_path is not None and raw_path != path and (not raw_path.startswith("/") or _AMBIGUOUS.search(raw_path)):
        raise InvalidPath


_PATTERN = re.compile(r"(?:(?P<method>[A-Z]+) )?(?P<segments>(?:/[^/*\s;%]+)*)(?P<tail>/\*|/)?", re.ASCII)


class ExemptRoutes:
    """The routes that run without a tenant and without credentials.

    An entry is a path, ``"/healthz"``, or all below a path, ``"/auth/*"`` (not ``/auth`` itself, not ``/authors``), with a method before
    it where only that one is meant: ``"GET /docs"``. Letter case and a slash at the end count. Raises: `ConfigError` for anything else.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        if isinstance(patterns, str):
            raise ConfigError(f"exempt is a list of routes: exempt=[{patterns!r}]")
        self._exact: set[tuple[str | None, str]] = set()
        self._below: list[tuple[str | None, str]] = []
        for pattern in patterns:
            match = _PATTERN.fullmatch(pattern)
            if match is None or not (match["segments"] or match["tail"]) or _AMBIGUOUS.search(match["segments"]):
                raise ConfigError(f"{pattern!r} is no exempt route; write '/healthz', '/auth/*' or 'GET /docs'")
            if match["tail"] == "/*":
                self._below.append((match["method"], match["segments"] + "/"))
            else:
                self._exact.add((match["method"], match["segments"] + (match["tail"] or "")))

    def matches(self, method: str, path: str) -> bool:
        """Whether a request for ``path``, as the router sees it, is exempt. A path with parameters or left-over encoding never is."""
        if ";" in path or "%" in path:
            return False
        if method == "HEAD":
            method = "GET"
        if (None, path) in self._exact or (method, path) in self._exact:
            return True
        return any(
            (wanted is None or wanted == method) and path.startswith(prefix) and len(path) > len(prefix) for wanted, prefix in self._below
        )


# -- which tenant ------------------------------------------------------------------------------------------------------------------------


class Gate:
    """What every adapter decides a request by, step by step: `exempts`, then who asks, then `names`, then `agreed` on what was looked up.

    ``authenticates``: whether requests say who makes them. Where they do not, ``resolver`` alone names the tenant, for pages that are
    anybody's. Raises: `ConfigError` where nothing could ever name a tenant.
    """

    def __init__(self, *, exempt: Iterable[str], resolver: Resolver | None, required: bool, authenticates: bool) -> None:
        if not authenticates and resolver is None:
            raise ConfigError("nothing names the tenant of a request: give authenticate=, or resolver= where nobody signs in")
        self._exempt = ExemptRoutes(exempt)
        self._resolver = resolver
        self._required = required
        self._authenticates = authenticates

    def exempts(self, facts: Facts, path: str, raw_path: str | None) -> bool:
        """Whether the request runs unasked and unbound; ``path`` and ``raw_path`` as in `check_path`. Raises: `InvalidPath`."""
        check_path(path, raw_path)
        return self._exempt.matches(facts.method, facts.path)

    def names(self, facts: Facts, identity: Identity | None) -> tuple[TenantName, ...]:
        """Every name that the request, which is not exempt, has for its tenant, the deciding one first; none: it runs unbound.

        An identity without a tenant gets none, whatever else the request names: nobody has said that it may enter. Raises:
        `AuthenticationRequired`, `TenantNotFound`, and `TenantMismatch` where what stands beside credentials is no name at all.
        """
        if identity is None and self._authenticates:
            if self._required:
                raise AuthenticationRequired
            return ()
        if self._resolver is None:
            return () if identity is None or identity.tenant is None else (tenant_key(identity.tenant),)
        if identity is None:
            found = names_of(self._resolver, facts)
            if not found and self._required:
                raise TenantNotFound(facts.host)
            return found
        if identity.tenant is None:
            return ()
        deciding = tenant_key(identity.tenant)
        try:
            return (deciding, *names_of(self._resolver, replace(facts, claims=identity.claims)))
        except InvalidTenantKey:
            raise TenantMismatch from None

    @staticmethod
    def agreed(tenant: Tenant, names: Iterable[TenantName], owners: Mapping[DomainName, UUID | None]) -> Tenant:
        """The tenant, where all names are its; ``owners`` says whose the domains are. Raises: `TenantMismatch`."""
        for name in names:
            if tenant.id != (owners.get(name) if isinstance(name, DomainName) else name) and name != tenant.slug:
                raise TenantMismatch
        return tenant


# -- errors ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """An answer to a client, after RFC 9457: send ``content``, which is ``body`` as JSON, with these headers."""

    status: int
    headers: Mapping[str, str]
    body: Mapping[str, Any]

    @property
    def content(self) -> bytes:
        """The same bytes whoever sends them: a middleware or, for what a route raises, a framework's error handler."""
        return json.dumps(self.body).encode()


@dataclass(frozen=True, slots=True)
class _Face:
    """How a class of errors looks from outside. ``detail``: its text speaks to the client, about what the client itself sent."""

    title: str
    detail: bool = False


_NO_ACCESS = "no-access"

_FACES: Mapping[type[TenantDBError], _Face] = {
    errors.AuthenticationRequired: _Face("Authentication is required"),
    errors.InvalidToken: _Face("The access token is invalid or has expired"),
    errors.InvalidCredentials: _Face("E-mail or password is wrong"),
    errors.RoleRequired: _Face("Your role does not allow this", detail=True),
    errors.AccessError: _Face("You may not do this"),
    errors.InvalidPath: _Face("The path is ambiguous", detail=True),
    errors.InvalidSlug: _Face("The name cannot be used", detail=True),
    errors.InvalidUser: _Face("The user's data cannot be used", detail=True),
    errors.UserExists: _Face("A user with this e-mail exists"),
    errors.UserNotFound: _Face("No such user"),
    errors.TenantNotFound: _Face("No such tenant"),
    errors.TenantExists: _Face("The name is taken"),
    errors.TenantSuspended: _Face("The tenant is suspended"),
    errors.SubscriptionExpired: _Face("The tenant's subscription has expired"),
    errors.RateLimited: _Face("Too many sign-ups"),
    errors.TenantNotReady: _Face("The tenant is not ready"),
    errors.IllegalTransition: _Face("The tenant's state does not allow this"),
    errors.OperationInProgress: _Face("Another operation on this tenant is in progress"),
    errors.BudgetExhausted: _Face("All connections are in use"),
}


def problem_for(error: TenantDBError, *, identity_asked: bool) -> Problem:
    """What a client is told of ``error``.

    ``identity_asked``: the request had to say who makes it. Then a tenant that does not exist, was deleted, or is somebody else's gives one
    and the same 403. Where anyone may ask, an unknown tenant is a 404. An error of ours, 5xx, shows its title and code and no text.
    """
    status, code = error.http_status, error.code
    if isinstance(error, errors.NotAMember) or (identity_asked and isinstance(error, errors.TenantNotFound)):
        return _problem(403, _NO_ACCESS, "You have no access to this tenant", {})
    face = next((_FACES[kind] for kind in type(error).__mro__ if kind in _FACES), _Face(HTTPStatus(status).phrase))
    headers: dict[str, str] = {}
    if status == 401:
        headers["www-authenticate"] = 'Bearer error="invalid_token"' if isinstance(error, errors.InvalidToken) else "Bearer"
    if status == 503 or error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after or _RETRY_AFTER)
    return _problem(status, code, face.title, headers, error.explain() if face.detail else None)


def _problem(status: int, code: str, title: str, headers: Mapping[str, str], detail: str | None = None) -> Problem:
    body: dict[str, Any] = {"type": f"urn:tenantdb:errors#{code}", "title": title, "status": status, "code": code}
    if detail is not None:
        body["detail"] = detail
    return Problem(status, {"content-type": "application/problem+json", "cache-control": "no-store", **headers}, body)
