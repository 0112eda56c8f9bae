"""Secrets at rest: who may read which, and how a secret is tied to its place.

Each purpose has a key of its own, derived from the secret keys by HKDF (RFC 5869): ``owner`` for the passwords that migrate a tenant's
schema, ``runtime`` for those that read and write its rows. A process that is given only the derived ``runtime:...`` keys can open no owner
secret. Every ciphertext is bound to its context (tenant, column, server, database, role): moved to another row or column, or beside an
edited name, it no longer opens.

A sealed secret is ``version (1) | key id (8) | nonce (12) | ciphertext and tag``, AES-256-GCM with a random nonce.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Sequence
from typing import NoReturn

from tenantdb.errors import CredentialTampered, SecretKeyError

OWNER = "owner"
RUNTIME = "runtime"
PURPOSES = (OWNER, RUNTIME)

_KEY = re.compile(r"(?:([a-z]+):)?([A-Za-z0-9_-]{43}=?)", re.ASCII)
_VERSION = b"\x01"
_ID, _NONCE, _TAG = 8, 12, 16


def generate_key() -> str:
    """A new secret key: 32 random bytes, url-safe base64."""
    return _encode(secrets.token_bytes(32))


def password() -> str:
    """A new password for a database role: 32 random bytes, url-safe base64."""
    return secrets.token_urlsafe(32)


class Keyring:
    """The secret keys of one process, newest first: the newest seals, any opens.

    A key is 32 bytes in url-safe base64; ``runtime:<base64>`` is a derived key, which serves that purpose alone. Without keys a ring can
    be made, for set-ups on SQLite that store no secret, and refuses to seal and to open. Immutable, so it may be shared between threads.

    Raises: `SecretKeyError` for a malformed key, without showing it.
    """

    __slots__ = ("_keys",)

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._keys: dict[str, dict[bytes, bytes]] = {purpose: {} for purpose in PURPOSES}  # purpose -> key id -> key, newest first
        for position, text in enumerate(keys, start=1):
            purpose, key = _parse(text, position)
            for each in PURPOSES if purpose is None else (purpose,):
                derived = _derive(key, each) if purpose is None else key
                self._keys[each].setdefault(_key_id(derived), derived)

    def holds(self, purpose: str) -> bool:
        """Whether any key for this purpose is here."""
        return bool(self._keys[purpose])

    def derive(self, purpose: str) -> list[str]:
        """The keys of one purpose, in the form that another process takes as its secret keys."""
        return [f"{purpose}:{_encode(key)}" for key in self._keys[purpose].values()]

    def seal(self, purpose: str, plaintext: bytes, tenant: str, column: str, *context: str) -> bytes:
        """Encrypt with the newest key of ``purpose``. Raises: `SecretKeyError` where there is none."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        if not self._keys[purpose]:
            raise SecretKeyError(f"no {purpose} key is given, so nothing can be encrypted")
        key_id, key = next(iter(self._keys[purpose].items()))
        nonce = secrets.token_bytes(_NONCE)
        sealed = AESGCM(key).encrypt(nonce, plaintext, _authenticated(key_id, purpose, (tenant, column, *context)))
        return _VERSION + key_id + nonce + sealed

    def open(self, purpose: str, blob: bytes, tenant: str, column: str, *context: str) -> bytes:
        """Decrypt what `seal` made for the same purpose and context.

        Raises: `SecretKeyError` where no given key is the one it was sealed with; `CredentialTampered` where it is and the blob or its
        place was changed.
        """
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        if blob[:1] != _VERSION or len(blob) < 1 + _ID + _NONCE + _TAG:
            raise CredentialTampered(tenant, column)
        key_id, nonce, sealed = blob[1 : 1 + _ID], blob[1 + _ID : 1 + _ID + _NONCE], blob[1 + _ID + _NONCE :]
        key = self._keys[purpose].get(key_id)
        if key is None:
            if any(key_id in keys for keys in self._keys.values()):  # a secret of another purpose, moved here
                raise CredentialTampered(tenant, column)
            raise SecretKeyError(f"no given key opens the {column} of {tenant}: it was encrypted with {purpose} key {key_id.hex()}")
        try:
            return AESGCM(key).decrypt(nonce, sealed, _authenticated(key_id, purpose, (tenant, column, *context)))
        except InvalidTag:
            raise CredentialTampered(tenant, column) from None

    def __repr__(self) -> str:
        ids = {purpose: [key_id.hex() for key_id in keys] for purpose, keys in self._keys.items()}
        return f"<Keyring {ids}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Keyring is not pickled: keys do not travel in messages")


def _parse(text: str, position: int) -> tuple[str | None, bytes]:
    match = _KEY.fullmatch(text)
    if match is None or match[1] not in (None, *PURPOSES):
        raise SecretKeyError(f"secret key {position} is not 32 bytes of url-safe base64, with or without runtime: or owner: before it")
    return match[1], base64.urlsafe_b64decode(match[2].rstrip("=") + "=")


def _derive(key: bytes, purpose: str) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(algorithm=SHA256(), length=32, salt=None, info=f"tenantdb/{purpose}/v1".encode()).derive(key)


def _key_id(key: bytes) -> bytes:
    return hashlib.sha256(b"tenantdb/key-id/v1" + key).digest()[:_ID]


def _authenticated(key_id: bytes, purpose: str, context: Sequence[str]) -> bytes:
    """What the tag covers. Every part carries its length: otherwise ("ab", "c") and ("a", "bc") would be one context."""
    parts = [_VERSION, key_id, purpose.encode(), *(part.encode() for part in context)]
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _encode(key: bytes) -> str:
    return base64.urlsafe_b64encode(key).decode()
