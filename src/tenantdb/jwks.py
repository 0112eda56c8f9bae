"""Keys of access tokens, and the key set (JWKS, RFC 7517) of another issuer.

A key set is fetched in the background: no request waits for it, a slow or failing issuer delays nobody whose key is known, and a flood of
tokens with unknown key ids causes one fetch per cooldown. What a token says is only ever looked up among keys that are loaded.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import jwt
from cryptography.hazmat.primitives import serialization

from tenantdb.errors import ConfigError, InvalidToken, TokenKeysUnavailable
from tenantdb.forking import follow

log = logging.getLogger("tenantdb.tokens")

SYMMETRIC = {"HS256": 32, "HS384": 48, "HS512": 64}  # RFC 7518, 3.2: at least as many bytes as the hash has
ALGORITHMS = (*SYMMETRIC, "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
MAX_BYTES = 1 << 20  # of a key set
LONGEST_STALE = 24 * 3600.0  # seconds for which keys are believed that could not be fetched again


@dataclass(frozen=True, slots=True)
class PreparedKey:
    """A key as PyJWT wants it, with the only algorithm it is used with. ``signing`` is None for a public key."""

    kid: str
    algorithm: str
    verifying: Any = field(repr=False)
    signing: Any = field(repr=False, default=None)


def prepared(value: str | bytes, algorithm: str, kid: str | None) -> PreparedKey:
    """Check a key against its algorithm. Raises: `ConfigError`, which never shows it."""
    if algorithm not in ALGORITHMS:
        raise ConfigError(f"algorithm={algorithm!r} is not among {', '.join(ALGORITHMS)}")
    if kid == "":
        raise ConfigError("the name (kid) of a key must not be empty")
    raw = value.encode() if isinstance(value, str) else value
    if algorithm in SYMMETRIC and len(raw) < SYMMETRIC[algorithm]:
        raise ConfigError(
            f"the key of access tokens has {len(raw)} bytes, {algorithm} needs {SYMMETRIC[algorithm]};"
            " make one with: python -c 'import secrets; print(secrets.token_urlsafe(48))'"
        )
    method = jwt.PyJWS(algorithms=[algorithm]).get_algorithm_by_name(algorithm)
    try:
        key = method.prepare_key(raw)
        weakness = method.check_key_length(key)
    except (jwt.InvalidKeyError, ValueError, TypeError) as error:
        wanted = "random bytes, and this is a public key, a certificate or a JWK"
        if algorithm not in SYMMETRIC:
            wanted = "a PEM of its own kind of key"
        raise ConfigError(f"the key of access tokens cannot be used: {algorithm} takes {wanted} ({type(error).__name__})") from None
    if weakness:
        raise ConfigError(f"the key of access tokens is too weak for {algorithm}: {weakness}")
    if algorithm in SYMMETRIC:
        return PreparedKey(kid or hashlib.sha256(b"kid" + raw).hexdigest()[:8], algorithm, key, key)
    public = key.public_key() if hasattr(key, "private_bytes") else key
    encoded = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return PreparedKey(kid or hashlib.sha256(encoded).hexdigest()[:8], algorithm, public, None if public is key else key)


class JWKS:
    """The keys that another issuer publishes: ``Tokens(JWKS("https://issuer.example/.well-known/jwks.json"), issuer=..., audience=...)``.

    ``algorithms``: those that its keys may be for. Keys are fetched again every ``refresh`` seconds, and earlier for an unknown key id, but
    never within ``cooldown`` seconds of the last attempt, whether it failed or not; an attempt takes ``timeout`` seconds at most for each
    step. Meanwhile those that are known serve, for a day at most. Raises: `ConfigError` for a URL without TLS, other than on loopback.
    """

    def __init__(
        self,
        url: str,
        *,
        algorithms: Sequence[str] = ("RS256",),
        refresh: float = 300.0,
        timeout: float = 3.0,
        cooldown: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost")):
            raise ConfigError("the key set's URL must begin with https://, because whoever could change it on its way could sign tokens")
        if odd := [name for name in algorithms if name not in ALGORITHMS or name in SYMMETRIC]:
            raise ConfigError(f"a published key set holds public keys; it has none for {', '.join(map(repr, odd))}")
        if not algorithms or refresh <= 0 or timeout <= 0 or cooldown <= 0:
            raise ConfigError("JWKS needs algorithms=, and more than 0 seconds for refresh=, timeout= and cooldown=")
        self._url = url
        self._algorithms = tuple(algorithms)
        self._refresh_after, self._timeout, self._cooldown = refresh, timeout, cooldown
        self._clock = clock
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._keys: dict[str, PreparedKey] = {}
        self._fetched_at: float | None = None
        self._tried_at: float | None = None
        self._problem = "it has not been tried"
        self._lock = threading.Lock()  # around who fetches, never around a fetch
        self._fetching = False
        follow(self)

    def key(self, kid: object) -> PreparedKey:
        """The key of this id, without waiting. Raises: `InvalidToken` where it is unknown; `TokenKeysUnavailable`."""
        now = self._clock()
        fetched_at, keys = self._fetched_at, self._keys
        if fetched_at is None or now - fetched_at > LONGEST_STALE:
            self._fetch_soon(now)
            raise TokenKeysUnavailable(self._problem)
        found = keys.get(kid) if isinstance(kid, str) else None
        if found is None or now - fetched_at >= self._refresh_after:
            self._fetch_soon(now)
        if found is None:
            raise InvalidToken("the token is signed with a key that its issuer does not publish, or does not say which")
        return found

    def refresh(self) -> bool:
        """Fetch the key set now, and wait for it; whether it was fetched. What fails is logged, and known keys are kept."""
        with self._lock:
            self._fetching, self._tried_at = True, self._clock()
        return self._fetch()

    def _fetch_soon(self, now: float) -> None:
        with self._lock:
            if self._fetching or (self._tried_at is not None and now - self._tried_at < self._cooldown):
                return
            self._fetching, self._tried_at = True, now
        threading.Thread(target=self._fetch, name="tenantdb-jwks", daemon=True).start()

    def _fetch(self) -> bool:
        try:
            with self._opener.open(self._url, timeout=self._timeout) as answer:
                keys = self._read(answer.read(MAX_BYTES + 1))
        except (OSError, ValueError, TypeError, RecursionError, http.client.HTTPException, jwt.PyJWTError) as error:
            self._problem = f"{type(error).__name__}" + (f" {error.code}" if isinstance(error, urllib.error.HTTPError) else "")
            log.warning("the key set at %s could not be fetched: %s", self._url, self._problem)
            return False
        else:
            self._keys, self._fetched_at = keys, self._clock()
            return True
        finally:
            with self._lock:
                self._fetching = False

    def _read(self, body: bytes) -> dict[str, PreparedKey]:
        if len(body) > MAX_BYTES:
            raise ValueError("the key set is too large")
        found: dict[str, PreparedKey] = {}
        for data in json.loads(body)["keys"]:
            kid = data.get("kid")
            if not isinstance(kid, str) or not kid or data.get("use", "sig") != "sig" or data.get("kty") == "oct":
                continue
            algorithm = data.get("alg") or next((name for name in self._algorithms if _KINDS[name[:2]] == data.get("kty")), None)
            if algorithm not in self._algorithms or _KINDS[algorithm[:2]] != data.get("kty"):
                continue
            method = jwt.PyJWS(algorithms=[algorithm]).get_algorithm_by_name(algorithm)
            key = method.prepare_key(jwt.PyJWK(data, algorithm).key)
            if method.check_key_length(key) or hasattr(key, "private_bytes"):
                log.warning("a key of the key set at %s is too weak or private, and is not used", self._url)
                continue
            found[kid] = PreparedKey(kid, algorithm, key)
        if not found:
            raise ValueError("the key set holds no key that can be used")
        return found

    def start_empty(self) -> object:
        """In the child after a fork, where no thread came along; known keys are believed on."""
        inherited, self._lock, self._fetching = self._lock, threading.Lock(), False
        return inherited


_KINDS = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An issuer's keys are where its URL says: a redirect could lead anywhere, to plain HTTP too."""

    def redirect_request(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str) -> None:
        raise urllib.error.HTTPError(req.full_url, code, "the key set's URL redirects", headers, fp)
