"""From the facts of a request to a verdict: which paths are exempt, which are refused, and what an error looks like to a client.

Pure, and the one brain of every adapter, so that two web frameworks cannot answer the same request differently.

1. A path that two programs may read differently (``//``, dot segments, encoded separators) is refused before anything is decided by it.
2. Exempt means: exactly this path, or below this path at a segment boundary, as the *router* sees it, and in its letter case.
3. What a client reads says nothing about tenants it has no access to: an unknown, a foreign and a deleted one give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from tenantdb import errors
from tenantdb.errors import ConfigError, InvalidPath, InvalidToken, TenantDBError

_RETRY_AFTER = 30  # seconds, where an error that a client may try again after does not know better


@dataclass(frozen=True, slots=True)
class Facts:
    """What an ``authenticate`` function may decide by.

    ``scheme`` is http, https, ws or wss; ``host`` lower case, without port; ``path`` what the router sees, decoded and without the root
    path; ``headers`` have lower-case names, and a header that was sent twice holds both values, joined as RFC 9110 says.
    """

    scheme: str
    host: str
    path: str
    method: str
    headers: Mapping[str, str]

    @property
    def cookies(self) -> Mapping[str, str]:
        """The cookies by name; of two with one name the first, which is the one with the more specific path (RFC 6265, 5.4)."""
        found: dict[str, str] = {}
        for pair in self.headers.get("cookie", "").split(";"):
            name, separator, value = pair.partition("=")
            if separator:
                found.setdefault(name.strip(), value.strip())
        return found


def host_name(header: str) -> str:
    """The host of a Host header: lower case, without port and without the dot that ends a full name."""
    host = header.strip().lower()
    if not host.endswith("]"):  # an IPv6 address without a port
        name, colon, _ = host.rpartition(":")
        host = name if colon else host
    return host.removesuffix(".")


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


def check_path(path: str, raw_path: bytes | None) -> None:
    """Refuse a path that programs read differently. ``path`` is decoded, ``raw_path`` as it was sent, where the server tells.

    Both are searched for encoded characters, so that what a second decoding would reveal is refused too. Raises: `InvalidPath`.
    """
    if not path.startswith("/") or _AMBIGUOUS.search(path):
        raise InvalidPath
    if raw_path is not None:
        sent = raw_path.decode("latin-1")
        if sent != path and (not sent.startswith("/") or _AMBIGUOUS.search(sent)):
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
        if (None, path) in self._exact or (method, path) in self._exact:
            return True
        return any(
            (wanted is None or wanted == method) and path.startswith(prefix) and len(path) > len(prefix) for wanted, prefix in self._below
        )


# -- errors ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """An answer to a client, after RFC 9457: send ``body`` as JSON with these headers."""

    status: int
    headers: Mapping[str, str]
    body: Mapping[str, Any]


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
