"""Access tokens: short-lived, signed, and read more strictly than JWT libraries do.

PyJWT makes and checks signatures. What a token means is read here: a library that serves everybody accepts too much (numbers as strings,
no expiry, several audiences, a key given twice, a refresh token in place of an access token), and the header chooses a key before PyJWT
is asked whether that key, with its own algorithm, has signed this. A token says who its holder claims to be; whether that user may enter
the tenant is asked of the registry on each request, never believed of a token.
"""

from __future__ import annotations

import base64
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

_LONGEST_NAME = 255  # of a user or a token (OpenID Connect Core, 2: sub)
_LAST_SECOND = 2**53  # beyond it, integers and floats of JSON no longer mean the same number
_SHAPE = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+", re.ASCII)  # no padding: one token has one spelling
# Each would let a token say how it wants to be read: with which key, from where, with which rules.
_REFUSED_HEADERS = frozenset({"jku", "jwk", "x5u", "x5c", "crit", "b64", "zip"})
_RESERVED = frozenset({"iss", "aud", "sub", "iat", "exp", "nbf", "jti", "role"})
_CANONICAL_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Key:
    """One key and the one algorithm it is used with.

    ``value``: random bytes or text for HS256, HS384 and HS512; a PEM for RS256, PS256, ES256 (and their like with 384 and 512) and EdDSA,
    private to issue and verify, public to verify only. ``kid`` names it in the tokens' headers; left out, it is a fingerprint of the key.
    """

    value: str | bytes = field(repr=False)
    algorithm: str = "HS256"
    kid: str | None = None


class Tokens:
    """Issues and verifies access tokens.

    ``key``: one key for ``algorithm`` (HS256 unless said), or a `Key`, or several, newest first, of which the newest issues; or the `JWKS`
    of another issuer, whose tokens are verified and not issued. A key is used with its own algorithm and no other, whatever a token says.
    A token names its key; one that names none is accepted where there is one key. ``issuer`` and ``audience`` are compared as a whole.
    ``claim`` names the claim that holds the tenant's id; without ``tenant_required`` a token may lack it. ``typ`` is what a token's header
    has to say of its kind: other issuers write ``JWT``. ``clock`` gives seconds since 1970.

    Raises: `ConfigError` for a key, an algorithm or a time that cannot be, and for symmetric and asymmetric keys together, because a public
    key is no secret. May be used from any thread and any event loop.
    """

    def __init__(
        self,
        key: str | bytes | Key | Sequence[Key] | JWKS,
        *,
        issuer: str,
        audience: str,
        algorithm: str | None = None,
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
        if not typ:
            raise ConfigError("typ= of access tokens must not be empty, or any token that the key signed would pass for one")
        if algorithm is not None and not isinstance(key, str | bytes):
            raise ConfigError("algorithm= goes with a key that is given as it is; a Key and a JWKS say theirs themselves")
        self._jwks = key if isinstance(key, JWKS) else None
        self._keys = {} if isinstance(key, JWKS) else _keys(key, algorithm or "HS256")
        self._newest = next(iter(self._keys.values()), None)
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
        if not _is_name(str(user)):
            raise ValueError(f"a token needs a user, of {_LONGEST_NAME} printable characters at most")
        if tenant is None and self._tenant_required:
            raise ValueError("a token needs a tenant; Tokens(..., tenant_required=False) does without")
        key = self._newest
        if key is None or key.signing is None:
            raise ConfigError("these access tokens are another's to issue: there is no private key here, or it is not the first")
        now = self._clock()
        payload |= {
            "iss": self._issuer,
            "aud": self._audience,
            "sub": str(user),
            # So fine that a token of this very second can be told from those that were revoked in it, and never ahead of the clock.
            "iat": int(now * 1000) / 1000,
            "exp": int(now) + self._lifetime,
            "jti": secrets.token_urlsafe(16),
        }
        if tenant is not None:
            payload[self.claim] = str(UUID(str(tenant)))
        if role is not None:
            payload["role"] = str(role)
        encoded = json.dumps(payload, separators=(",", ":"), allow_nan=False).encode()
        token = _JWS.encode(encoded, key.signing, key.algorithm, {"typ": self._typ, "kid": key.kid})
        if len(token) > MAX_SIZE:
            raise ValueError(f"the token has {len(token)} characters, {MAX_SIZE} are accepted; put less into claims")
        return token

    def verify(self, token: str) -> dict[str, Any]:
        """The claims of a token that holds in every respect.

        The tenant's claim is then the text of a UUID in its canonical form. Raises: `InvalidToken`, whatever the token is, with a text that
        does not quote it; `TokenKeysUnavailable` where the keys of another issuer were not fetched yet, or not for a day.
        """
        try:
            if len(token) > MAX_SIZE or not _SHAPE.fullmatch(token):
                raise InvalidToken(f"this is not a signed token of at most {MAX_SIZE} characters")
            head, _, signature = token.split(".")
            key = self._key_of(_decoded(_bytes(head)))
            found = _JWS.decode_complete(token, key.verifying, [key.algorithm])
            if _base64(found["signature"]) != signature:  # the bits that the last character has to spare would give it more spellings
                raise InvalidToken("the token's signature is not in its canonical form")
            payload = _decoded(found["payload"])
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
            raise InvalidToken(f"the token cannot be read or its signature is wrong ({type(error).__name__})") from None
        self._check_times(payload)
        if payload.get("iss") != self._issuer:
            raise InvalidToken("the token is not of our issuer")
        if payload.get("aud") != self._audience:
            raise InvalidToken("the token is not for our audience, or not for it alone")
        if not _is_name(payload.get("sub")):
            raise InvalidToken("the token names no user")
        if "jti" in payload and not _is_name(payload["jti"]):
            raise InvalidToken("the token's jti is no name")
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

    def _key_of(self, header: Mapping[str, Any]) -> PreparedKey:
        """The key that a header names, and never more than a name: an entry of what is loaded, or none. Raises: `InvalidToken`."""
        if header.get("typ") != self._typ:
            raise InvalidToken(f"the token is no access token: its typ is not {self._typ}")
        if not _REFUSED_HEADERS.isdisjoint(header):
            raise InvalidToken("the token's header says how it wants to be read")
        kid = header.get("kid")
        found: PreparedKey | None
        if self._jwks is not None:
            found = self._jwks.key(kid)
        elif "kid" not in header and len(self._keys) == 1:
            found = self._newest
        else:
            found = self._keys.get(kid) if isinstance(kid, str) else None
        if found is None:
            raise InvalidToken("the token is signed with a key that is not known here, or does not say which")
        if header.get("alg") != found.algorithm:
            raise InvalidToken("the token's algorithm is not its key's")
        return found

    def _check_times(self, payload: Mapping[str, Any]) -> None:
        now = self._clock()
        expires, issued = _seconds(payload, "exp"), _seconds(payload, "iat")
        begins = _seconds(payload, "nbf") if "nbf" in payload else issued
        if expires <= now - self._leeway:
            raise InvalidToken("the token has expired")
        if max(issued, begins) > now + self._leeway:
            raise InvalidToken("the token is from the future")
        if not 0 < expires - issued <= self._longest:
            raise InvalidToken(f"the token lives longer than {MAX_LIFETIME}, or ends before it begins")


def _keys(given: str | bytes | Key | Sequence[Key], algorithm: str) -> dict[str, PreparedKey]:
    """The keys by their names, newest first. Raises: `ConfigError`."""
    if isinstance(given, str | bytes):
        given = Key(given, algorithm)
    keys = [given] if isinstance(given, Key) else list(given or ())
    if not keys or not all(isinstance(key, Key) for key in keys):
        raise ConfigError("access tokens need a key: a secret, a Key, a list of Key, or a JWKS")
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


def _is_name(value: object) -> bool:
    """Whether this may go into logs, the registry and an answer as it is."""
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME and value.isprintable()


def _seconds(payload: Mapping[str, Any], name: str) -> float:
    value = payload.get(name)
    if (type(value) is not int and type(value) is not float) or not 0 <= value < _LAST_SECOND:  # bool is an int, too
        raise InvalidToken(f"the token's {name} is missing or not a number of seconds")
    return value


# -- segments ----------------------------------------------------------------------------------------------------------------------------


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _bytes(segment: str) -> bytes:
    return base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))


def _decoded(data: bytes) -> dict[str, Any]:
    found = _JSON.decode(data.decode())
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return found


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON leaves the meaning of a name given twice open; a proxy that takes the first and we the last would see two tenants.
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_JSON = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
_JWS = jwt.PyJWS(algorithms=list(ALGORITHMS))
