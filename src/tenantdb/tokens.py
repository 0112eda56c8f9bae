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
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID

import jwt

from tenantdb.errors import ConfigError, InvalidToken

MAX_SIZE = 8192  # characters of a token; more is refused before anything is parsed
MAX_LIFETIME = timedelta(hours=24)
MAX_LEEWAY = timedelta(seconds=60)
TYPE = "at+jwt"  # RFC 9068: an access token, so that no other token signed with the same key passes for one

_LAST_SECOND = 2**53  # beyond it, integers and floats of JSON no longer mean the same number
_KEY_BYTES = {"HS256": 32, "HS384": 48, "HS512": 64}  # RFC 7518, 3.2: at least as long as the hash
_SHAPE = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+", re.ASCII)  # no padding: one token has one spelling
# Each would let a token say how it wants to be read: with which key, from where, with which rules.
_REFUSED_HEADERS = frozenset({"jku", "jwk", "x5u", "x5c", "x5t", "x5t#S256", "crit", "b64", "zip"})
_RESERVED = frozenset({"iss", "aud", "sub", "iat", "exp", "nbf", "jti", "role"})


class Tokens:
    """Issues and verifies access tokens with one key and one algorithm.

    ``key``: at least as many bytes as the hash has, 32 for HS256; text is taken as UTF-8. ``issuer`` and ``audience`` are compared as a
    whole. ``claim`` names the claim that holds the tenant's id. ``clock`` gives seconds since 1970.

    Raises: `ConfigError` for a key, an algorithm or a time that cannot be. May be used from any thread and any event loop.
    """

    def __init__(
        self,
        key: str | bytes,
        *,
        issuer: str,
        audience: str,
        algorithm: str = "HS256",
        lifetime: timedelta = timedelta(minutes=15),
        leeway: timedelta = timedelta(seconds=30),
        claim: str = "tenant_id",
        clock: Callable[[], float] = time.time,
    ) -> None:
        if algorithm not in _KEY_BYTES:
            raise ConfigError(f"algorithm={algorithm!r} is not among {', '.join(_KEY_BYTES)}")
        self._key = key.encode() if isinstance(key, str) else key
        if len(self._key) < _KEY_BYTES[algorithm]:
            raise ConfigError(
                f"the key of access tokens has {len(self._key)} bytes, {algorithm} needs {_KEY_BYTES[algorithm]};"
                " make one with: python -c 'import secrets; print(secrets.token_urlsafe(48))'"
            )
        if not issuer or not audience:
            raise ConfigError("issuer= and audience= of access tokens must not be empty")
        if not timedelta(seconds=1) <= lifetime <= MAX_LIFETIME:
            raise ConfigError(f"lifetime= of access tokens is from one second to {MAX_LIFETIME}, not {lifetime}")
        if not timedelta(0) <= leeway <= MAX_LEEWAY:
            raise ConfigError(f"leeway= of access tokens is from zero to {MAX_LEEWAY}, not {leeway}")
        if not claim or claim in _RESERVED:
            raise ConfigError(f"claim={claim!r} cannot hold the tenant; it has a meaning of its own")
        self._jws = jwt.PyJWS(algorithms=[algorithm])
        try:
            self._jws.get_algorithm_by_name(algorithm).prepare_key(self._key)
        except jwt.InvalidKeyError:
            raise ConfigError(f"the key of access tokens is a public key, a certificate or a JWK; {algorithm} takes random bytes") from None
        self._algorithm = algorithm
        self._issuer, self._audience = issuer, audience
        self._lifetime = int(lifetime.total_seconds())
        self._leeway = leeway.total_seconds()
        self._clock = clock
        self.claim = claim

    def issue(
        self, user: str | UUID, tenant: UUID | None = None, *, role: str | None = None, claims: Mapping[str, Any] | None = None
    ) -> str:
        """A new token for ``user`` (its ``sub``), for one tenant or for none.

        ``role`` is a hint for the client; `RegistryAuth` asks the registry. ``claims`` are added. Raises: `ValueError` where they would
        take the place of a claim that this class sets, or make the token too large to be accepted.
        """
        payload = dict(claims or {})
        if taken := sorted(set(payload) & (_RESERVED | {self.claim})):
            raise ValueError(f"claims cannot hold {', '.join(taken)}: Tokens sets them")
        if not str(user):
            raise ValueError("a token needs a user")
        now = int(self._clock())
        payload |= {
            "iss": self._issuer,
            "aud": self._audience,
            "sub": str(user),
            "iat": now,
            "exp": now + self._lifetime,
            "jti": secrets.token_urlsafe(16),
        }
        if tenant is not None:
            payload[self.claim] = str(UUID(str(tenant)))
        if role is not None:
            payload["role"] = str(role)
        encoded = json.dumps(payload, separators=(",", ":"), allow_nan=False).encode()
        token = self._jws.encode(encoded, self._key, self._algorithm, {"typ": TYPE})
        if len(token) > MAX_SIZE:
            raise ValueError(f"the token has {len(token)} characters, {MAX_SIZE} are accepted; put less into claims")
        return token

    def verify(self, token: str) -> dict[str, Any]:
        """The claims of a token that holds in every respect.

        The tenant's claim, where there is one, is then the text of a UUID in its canonical form. Raises: `InvalidToken`, and nothing else,
        whatever the token is; its text does not quote the token.
        """
        try:
            if len(token) > MAX_SIZE or not _SHAPE.fullmatch(token):
                raise InvalidToken(f"this is not a signed token of at most {MAX_SIZE} characters")
            decoded = self._jws.decode_complete(token, self._key, [self._algorithm])
            payload = json.loads(decoded["payload"], object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        except (jwt.PyJWTError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise InvalidToken(f"the token cannot be read or its signature is wrong ({type(error).__name__})") from None
        header = decoded["header"]
        if header.get("typ") != TYPE:
            raise InvalidToken(f"the token is no access token: its typ is not {TYPE}")
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
        if self.claim in payload and not _is_canonical_uuid(payload[self.claim]):
            raise InvalidToken(f"the token's {self.claim} is not a UUID in its canonical form")
        return payload

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
        if not 0 < payload["exp"] - payload["iat"] <= MAX_LIFETIME.total_seconds():
            raise InvalidToken(f"the token lives longer than {MAX_LIFETIME}, or ends before it begins")


def _is_canonical_uuid(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        return str(UUID(value)) == value
    except ValueError:
        return False


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON leaves the meaning of a name given twice open; a proxy that takes the first and we the last would see two tenants.
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
