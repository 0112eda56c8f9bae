"""Keys of access tokens, and the key set (JWKS, RFC 7517) of another issuer.

A key is checked once, when it is given or fetched, and goes with one algorithm: what a token says chooses among keys and never a method.

A key set is fetched in the background. No request waits for it: a slow or failing issuer delays nobody whose key is known, and a flood of
tokens with unknown key ids causes one fetch per cooldown, and one at a time. What a token says is only ever looked up among what is loaded.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import logging
import math
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from jwt.algorithms import Algorithm, get_default_algorithms

from tenantdb.errors import ConfigError, InvalidToken, TokenKeysUnavailable
from tenantdb.forking import follow

log = logging.getLogger("tenantdb.tokens")

SYMMETRIC = {"HS256": 32, "HS384": 48, "HS512": 64}  # RFC 7518, 3.2: at least as many bytes as the hash has
ALGORITHMS = (*SYMMETRIC, "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
MAX_BYTES = 1 << 20  # of a key set
LONGEST_STALE = 24 * 3600.0  # seconds for which keys are believed that could not be fetched again

_METHODS: Mapping[str, Algorithm] = {name: method for name, method in get_default_algorithms().items() if name in ALGORITHMS}
_KINDS = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}  # of algorithms, by their first letters: RFC 7518, 6.1
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True)
class PreparedKey:
    """A key that was checked, with the only algorithm it is used with. ``signing`` is None for a public key."""

    kid: str
    algorithm: str
    verifying: Any = field(repr=False)
    signing: Any = field(repr=False, default=None)


def prepared(value: str | bytes, algorithm: str, kid: str | None) -> PreparedKey:
    """Check a key against its algorithm. Raises: `ConfigError`, which never shows it."""
    if algorithm not in ALGORITHMS:
        raise ConfigError(f"algorithm={algorithm!r} is not among {', '.join(ALGORITHMS)}")
    if not isinstance(value, str | bytes):
        raise ConfigError(f"a key of access tokens is text or bytes, not {type(value).__name__}")
    if kid == "":
        raise ConfigError("the name (kid) of a key must not be empty")
    raw = value.encode() if isinstance(value, str) else value
    if algorithm in SYMMETRIC and len(raw) < SYMMETRIC[algorithm]:
        raise ConfigError(
            f"the key of access tokens has {len(raw)} bytes, {algorithm} needs {SYMMETRIC[algorithm]};"
            " make one with: python -c 'import secrets; print(secrets.token_urlsafe(48))'"
        )
    method = _METHODS[algorithm]
    try:
        key = method.prepare_key(raw)
        if algorithm in SYMMETRIC:
            _refuse_unarmoured(method, raw)
        weakness = method.check_key_length(key)
    except (jwt.InvalidKeyError, UnsupportedAlgorithm, ValueError, TypeError) as error:
        wanted = "random bytes, and this is a public key, a certificate or a JWK"
        if algorithm not in SYMMETRIC:
            wanted = "a PEM of its own kind of key, without a password"
        raise ConfigError(f"the key of access tokens cannot be used: {algorithm} takes {wanted} ({type(error).__name__})") from None
    if weakness:
        raise ConfigError(f"the key of access tokens is too weak for {algorithm}: {weakness}")
    if algorithm in SYMMETRIC:
        return PreparedKey(kid or hashlib.sha256(b"kid" + raw).hexdigest()[:8], algorithm, key, key)
    public = key.public_key() if hasattr(key, "private_bytes") else key
    encoded = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    kid = kid or hashlib.sha256(encoded).hexdigest()[:8]
    return PreparedKey(kid, algorithm, public, None if public is key else key)


def _refuse_unarmoured(method: Algorithm, raw: bytes) -> None:
    """Consoles of identity providers show a public key as a PEM without its first and last line. Raises: `jwt.InvalidKeyError`."""
    try:
        bare = base64.b64decode(b"".join(raw.split()), validate=True)
    except ValueError:
        return
    method.prepare_key(bare or raw)


@dataclass(frozen=True, slots=True)
class _KeySet:
    keys: Mapping[str, PreparedKey]
    fetched_at: float


class JWKS:
    """The keys that another issuer publishes: ``Tokens(JWKS("https://issuer.example/.well-known/jwks.json"), issuer=..., audience=...)``.

    ``algorithms``: those that its keys may be for; a key that does not say takes the first that fits. Keys are fetched again every
    ``refresh`` seconds, and earlier for an unknown key id, but never within ``cooldown`` seconds of the last attempt, whether it failed or
    not. An attempt has ``timeout`` seconds to connect, and as many for the whole answer. Meanwhile those that are known serve, for a day at
    most. Certificates are verified with the system's authorities (``SSL_CERT_FILE`` names others), ``HTTPS_PROXY`` is used, redirects are
    not followed. Raises: `ConfigError` for a URL without TLS, other than on loopback, or with a password.

    May be used from any thread and any event loop, and on in a child after a fork.
    """

    def __init__(
        self,
        url: str,
        *,
        algorithms: Sequence[str] = ("RS256",),
        refresh: float = 300.0,
        timeout: float = 3.0,
        cooldown: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = _checked(url)
        if isinstance(algorithms, str) or not algorithms:
            raise ConfigError(f"algorithms= of a key set is a list such as ['RS256'], not {algorithms!r}")
        if odd := [name for name in algorithms if name not in ALGORITHMS or name in SYMMETRIC]:
            raise ConfigError(f"a published key set holds public keys; it has none for algorithms={odd!r}")
        if not all(0 < seconds < math.inf for seconds in (refresh, timeout, cooldown)):
            raise ConfigError("refresh=, timeout= and cooldown= of a key set are more than 0 seconds")
        self._algorithms = tuple(algorithms)
        self._refresh_after, self._timeout, self._cooldown = refresh, timeout, cooldown
        self._clock = clock
        self._loaded: _KeySet | None = None
        self._not_before = -math.inf  # when the next attempt may begin
        self._turn = threading.Lock()  # whoever fetches holds it; no request waits for it
        self._problem = "nobody has tried before"
        follow(self)

    def key(self, kid: object) -> PreparedKey:
        """The key of this id, without waiting. Raises: `InvalidToken` where it is unknown; `TokenKeysUnavailable`."""
        now, loaded = self._clock(), self._loaded
        if loaded is None or now - loaded.fetched_at > LONGEST_STALE:
            self._fetch_soon(now)
            raise TokenKeysUnavailable(self._problem)
        found = loaded.keys.get(kid) if isinstance(kid, str) else None
        if found is None or now - loaded.fetched_at >= self._refresh_after:
            self._fetch_soon(now)
        if found is None:
            raise InvalidToken("the token is signed with a key that its issuer does not publish, or does not say which")
        return found

    def refresh(self) -> bool:
        """Fetch the key set now, and wait for it; whether it was fetched. What fails is logged, and known keys are kept."""
        with self._turn:
            self._not_before = self._clock() + self._cooldown
            return self._fetch()

    def _fetch_soon(self, now: float) -> None:
        if now < self._not_before or not self._turn.acquire(blocking=False):
            return
        if now < self._not_before:  # somebody's attempt ended between the two looks
            self._turn.release()
            return
        self._not_before = now + self._cooldown
        try:
            threading.Thread(target=self._fetch_and_release, name="tenantdb-jwks", daemon=True).start()
        except RuntimeError as error:  # no more threads: the request is still answered by what is known
            self._turn.release()
            self._failed(error)

    def _fetch_and_release(self) -> None:
        turn = self._turn
        try:
            self._fetch()
        finally:
            turn.release()

    def _fetch(self) -> bool:
        try:
            keys = self._read(_get(self._url, self._timeout))
        except Exception as error:  # whatever a foreign server sends
            self._failed(error)
            return False
        self._loaded = _KeySet(keys, self._clock())
        return True

    def _failed(self, error: Exception) -> None:
        cause = error.reason if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception) else error
        self._problem = type(cause).__name__ + (f" {cause.code}" if isinstance(cause, urllib.error.HTTPError) else "")
        log.warning("the key set at %s could not be fetched: %s", self._url, self._problem)

    def _read(self, body: bytes) -> dict[str, PreparedKey]:
        """The keys that can be used. One that cannot spoils none of the others: issuers add kinds that their clients do not know."""
        found: dict[str, PreparedKey] = {}
        for data in json.loads(body)["keys"]:
            try:
                key = self._usable(data)
            except Exception as error:  # a key is foreign data, and PyJWT fails on it in its own ways
                log.warning("a key of the key set at %s cannot be used: %s", self._url, type(error).__name__)
                continue
            if key is not None:
                found.setdefault(key.kid, key)
        if not found:
            raise LookupError("the key set holds no key that can be used")
        return found

    def _usable(self, data: Any) -> PreparedKey | None:
        """A public key that signs, for one of our algorithms; None for one that is meant for something else."""
        kid = data.get("kid")
        if not isinstance(kid, str) or data.get("use", "sig") != "sig" or "verify" not in data.get("key_ops", ["verify"]):
            return None
        for algorithm in self._algorithms:
            if data.get("alg", algorithm) != algorithm or data.get("kty") != _KINDS[algorithm[:2]]:
                continue
            method = _METHODS[algorithm]
            key = jwt.PyJWK(data, algorithm).key
            if hasattr(key, "private_bytes"):
                raise ValueError("a private key was published")
            try:
                method.prepare_key(key)
            except jwt.InvalidKeyError:
                continue  # a curve of another algorithm
            if weakness := method.check_key_length(key):
                raise ValueError(weakness)
            return PreparedKey(kid, algorithm, key)
        return None

    def start_empty(self) -> object:
        """In the child after a fork, where no thread came along; known keys are believed on."""
        inherited, self._turn = self._turn, threading.Lock()
        self._not_before = -math.inf
        return inherited


# -- fetching ----------------------------------------------------------------------------------------------------------------------------


def _checked(url: str) -> str:
    """Raises: `ConfigError` for a URL that anybody on the way could answer, and for one that does not belong into a log."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ConfigError("the key set's URL is malformed") from None
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and host in _LOOPBACK)):
        raise ConfigError("the key set's URL must begin with https://, because whoever could change it on its way could sign tokens")
    if "@" in parts.netloc:
        raise ConfigError("the key set's URL holds a user or a password; what is public needs none")
    return url


def _get(url: str, timeout: float) -> bytes:
    """The body of a 200 of this URL, or an error: without redirects, which could lead anywhere, and of a bounded size and duration."""
    opener = urllib.request.OpenerDirector()
    opener.add_handler(_HTTPSHandler())
    opener.add_handler(_HTTPHandler())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    opener.add_handler(urllib.request.HTTPDefaultErrorHandler())
    if url.startswith("https:"):  # what goes to loopback in the clear goes to no proxy
        opener.add_handler(urllib.request.ProxyHandler())
    try:
        with opener.open(url, timeout=timeout) as answer:
            body: bytes = answer.read(MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        error.close()
        raise
    if len(body) > MAX_BYTES:
        raise ValueError("the key set is too large")
    return body


class _Until(io.RawIOBase):
    """What a socket receives within its timeout as a whole: by itself it would wait as long again for each byte, for ever."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._file = sock.makefile("rb", buffering=0)
        self._deadline = time.monotonic() + (sock.gettimeout() or 0.0)

    def makefile(self, mode: str) -> io.BufferedReader:
        """What `http.client.HTTPResponse` asks a socket for."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(_Until(sock), *args, **kwargs)  # type: ignore[arg-type]


class _HTTPConnection(http.client.HTTPConnection):
    response_class = _Answer


class _HTTPSConnection(http.client.HTTPSConnection):
    response_class = _Answer


class _HTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HTTPConnection, req)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HTTPSConnection, req, context=ssl.create_default_context())
