"""Access tokens: short-lived, signed, and read more strictly than JWT libraries do.

PyJWT checks the signature. What a payload means is decided here, because a library that serves everybody accepts too much: numbers
as strings, no expiry, several audiences, a key given twice, a refresh token in place of an access token. A token says who its holder
claims to be; whether that user may enter the tenant is asked of the registry on each request, never believed of a token.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

import jwt

from tenantdb.errors import ConfigError, InvalidToken
from tenantdb.jwks import ALGORITHMS, JWKS, SYMMETRIC, PreparedKey, prepared

MAX_SIZE = 8192  # characters of a token; more is refused before anything is parsed
MAX_LIFETIME = timedelta(hours=24)
MAX_LEEWAY = timedelta(seconds=60)
TYPE = "at+jwt"  # RFC 9068: an access token, so that no other token signed with the same key passes for one

_LAST_SECOND = 2**53  # beyond it, integers and floats of JSON no longer mean the same number
_SHAPE = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+", re.ASCII)  # no padding: one token has one spelling
# Each would let a token say how it wants to be read: with which key, from where, with which rules.
_REFUSED_HEADERS = frozenset({"jku", "jwk", "x5u", "x5c", "x5t", "x5t#S256", "crit", "b64", "zip"})
_RESERVED = frozenset({"iss", "aud", "sub", "iat", "exp", "nbf", "jti", "role"})
_CANONICAL_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Key:
    """One key and the one algorithm it is used with.

    ``value``: random bytes or text for HS256, HS384 and HS512; a PEM for the others, private to issue and verify, public to verify only.
    ``kid`` names it in the tokens' headers; left out, it is a fingerprint of the key.
    """

    value: str | bytes = field(repr=False)
    algorithm: str = "HS256"
    kid: str | None = None


class Tokens:
    """Issues and verifies access tokens.

    ``key``: one key for ``algorithm``, or a `Key`, or several, newest first, of which the newest issues; or the `JWKS` of another issuer,
    whose tokens are verified and not issued. A key is used with its own algorithm and no other, whatever a token says. ``issuer`` and
    ``audience`` are compared as a whole. ``claim`` names the claim that holds the tenant's id; without ``tenant_required`` a token may lack
    it. ``typ`` is what a token's header has to say of its kind: other issuers write ``JWT``. ``clock`` gives seconds since 1970.

    Raises: `ConfigError` for a key, an algorithm or a time that cannot be, and for symmetric and asymmetric keys together, because a public
    key is no secret. May be used from any thread and any event loop.
    """

    def __init__(
        self,
        key: str | bytes | Key | Sequence[Key] | JWKS,
        *,
        issuer: str,
        audience: str,
        algorithm: str = "HS256",
        lifetime: timedelta = timedelta(minutes=15),
        leeway: timedelta = timedelta(seconds=30),
        claim: str = "tenant_id",
        tenant_required: bool = True,
        typ: str = TYPE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not issuer or not audience:
            raise ConfigError("issuer= and audience= of access tokens must not be empty")
        if not timedelta(seconds=1) <= lifetime <= MAX_LIFETIME:
            raise ConfigError(f"lifetime= of access tokens is from one second to {MAX_LIFETIME}, not {lifetime}")
        if not timedelta(0) <= leeway <= MAX_LEEWAY:
            raise ConfigError(f"leeway= of access tokens is from zero to {MAX_LEEWAY}, not {leeway}")
        if not claim or claim in _RESERVED:
            raise ConfigError(f"claim={claim!r} cannot hold the tenant; it has a meaning of its own")
        self._jwks = key if isinstance(key, JWKS) else None
        self._keys = {} if isinstance(key, JWKS) else _keys(key, algorithm)
        self._only = next(iter(self._keys.values())) if len(self._keys) == 1 else None
        self._jws = jwt.PyJWS(algorithms=list(ALGORITHMS))
        self._issuer, self._audience = issuer, audience
        self._lifetime = int(lifetime.total_seconds())
        self._longest = MAX_LIFETIME.total_seconds()
        self._leeway = leeway.total_seconds()
        self._tenant_required = tenant_required
        self._typ = typ
        self._clock = clock
        self.claim = claim

    def issue(
        self, user: str | UUID, tenant: UUID | None = None, *, role: str | None = None, claims: Mapping[str, Any] | None = None
    ) -> str:
        """A new token for ``user`` (its ``sub``), for one tenant or, where it is not required, for none.

        ``role`` is a hint for the client; `RegistryAuth` asks the registry. ``claims`` are added. Raises: `ValueError` where they would
        take the place of a claim that this class sets, or make the token too large to be accepted, and where `verify` would miss a tenant;
        `ConfigError` where the newest key is a public one.
        """
        payload = dict(claims or {})
        if taken := sorted(set(payload) & (_RESERVED | {self.claim})):
            raise ValueError(f"claims cannot hold {', '.join(taken)}: Tokens sets them")
        if not str(user):
            raise ValueError("a token needs a user")
        if tenant is None and self._tenant_required:
            raise ValueError("a token needs a tenant; Tokens(..., tenant_required=False) does without")
        newest = next(iter(self._keys.values()), None)
        if newest is None or newest.signing is None:
            raise ConfigError("these access tokens are another's to issue: there is no private key here")
        now = self._clock()
        payload |= {
            "iss": self._issuer,
            "aud": self._audience,
            "sub": str(user),
            "iat": round(now, 3),  # so that a token of this very second can be told from those that were revoked in it
            "exp": int(now) + self._lifetime,
            "jti": secrets.token_urlsafe(16),
        }
        if tenant is not None:
            payload[self.claim] = str(UUID(str(tenant)))
        if role is not None:
            payload["role"] = str(role)
        encoded = json.dumps(payload, separators=(",", ":"), allow_nan=False).encode()
        token = self._jws.encode(encoded, newest.signing, newest.algorithm, {"typ": self._typ, "kid": newest.kid})
        if len(token) > MAX_SIZE:
            raise ValueError(f"the token has {len(token)} characters, {MAX_SIZE} are accepted; put less into claims")
        return token

    def verify(self, token: str) -> dict[str, Any]:
        """The claims of a token that holds in every respect.

        The tenant's claim is then the text of a UUID in its canonical form. Raises: `InvalidToken`, whatever the token is, with a text that
        does not quote it; `TokenKeysUnavailable` where the keys of another issuer were never fetched.
        """
        try:
            if len(token) > MAX_SIZE or not _SHAPE.fullmatch(token):
                raise InvalidToken(f"this is not a signed token of at most {MAX_SIZE} characters")
            key = self._only or self._key_of(token)
            decoded = self._jws.decode_complete(token, key.verifying, [key.algorithm])
            payload = json.loads(decoded["payload"], object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        except (jwt.PyJWTError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise InvalidToken(f"the token cannot be read or its signature is wrong ({type(error).__name__})") from None
        header = decoded["header"]
        if header.get("typ") != self._typ:
            raise InvalidToken(f"the token is no access token: its typ is not {self._typ}")
        if not _REFUSED_HEADERS.isdisjoint(header):
            raise InvalidToken("the token's header says how it wants to be read")
        if not isinstance(payload, dict):
            raise InvalidToken("the token holds no claims")
        self._check_times(payload)
        if payload.get("iss") != self._issuer:
            raise InvalidToken("the token is not of our issuer")
        if payload.get("aud") != self._audience:
            raise InvalidToken("the token is not for our audience, or not for it alone")
        if not isinstance(payload.get("sub"), str) or not payload["sub"]:
            raise InvalidToken("the token names no user")
        if not isinstance(payload.get("jti", ""), str):
            raise InvalidToken("the token's jti is not a string")
        if self.claim in payload:
            named = payload[self.claim]
            if not isinstance(named, str) or not _CANONICAL_UUID.fullmatch(named):
                raise InvalidToken(f"the token's {self.claim} is not a UUID in its canonical form")
        elif self._tenant_required:
            raise InvalidToken(f"the token names no tenant: it has no {self.claim}")
        return payload

    def start(self) -> None:
        """Fetch another issuer's keys now, so that the first request finds them. Blocks; what fails is logged and tried again later."""
        if self._jwks is not None:
            self._jwks.refresh()

    def _key_of(self, token: str) -> PreparedKey:
        """The key that a token's header names, and never more than a name: an entry of what is loaded, or none."""
        kid = self._jws.get_unverified_header(token).get("kid")
        if self._jwks is not None:
            return self._jwks.key(kid)
        found = self._keys.get(kid) if isinstance(kid, str) else None
        if found is None:
            raise InvalidToken("the token is signed with a key that is not known here, or does not say which")
        return found

    def _check_times(self, payload: Mapping[str, Any]) -> None:
        for name in ("exp", "iat", "nbf"):
            if name in payload or name != "nbf":
                value = payload.get(name)
                if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < _LAST_SECOND:
                    raise InvalidToken(f"the token's {name} is missing or not a number of seconds")
        now = self._clock()
        if payload["exp"] <= now - self._leeway:
            raise InvalidToken("the token has expired")
        if max(payload["iat"], payload.get("nbf", 0)) > now + self._leeway:
            raise InvalidToken("the token is from the future")
        if not 0 < payload["exp"] - payload["iat"] <= self._longest:
            raise InvalidToken(f"the token lives longer than {MAX_LIFETIME}, or ends before it begins")


def _keys(given: str | bytes | Key | Sequence[Key], algorithm: str) -> dict[str, PreparedKey]:
    """The keys by their names, newest first. Raises: `ConfigError`."""
    if isinstance(given, str | bytes):
        given = Key(given, algorithm)
    keys = [given] if isinstance(given, Key) else list(given)
    if not keys:
        raise ConfigError("access tokens need a key")
    if len({key.algorithm in SYMMETRIC for key in keys}) > 1:
        raise ConfigError(
            "access tokens take symmetric keys (HS256 ...) or asymmetric ones (RS256, ES256, EdDSA ...), not both:"
            " whoever knows a public key could sign with it"
        )
    found = [prepared(key.value, key.algorithm, key.kid) for key in keys]
    named = {key.kid: key for key in found}
    if len(named) < len(found):
        raise ConfigError("two keys of access tokens have one name (kid)")
    return named


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON leaves the meaning of a name given twice open; a proxy that takes the first and we the last would see two tenants.
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
