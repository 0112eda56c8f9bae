"""Secrets at rest: who may read which, and how a secret is tied to its place.

Each purpose has a key of its own, derived from the secret keys by HKDF (RFC 5869): ``owner`` for the passwords that migrate a tenant's
schema, ``runtime`` for those that read and write its rows, ``audit`` for what vouches for the audit log, ``tasks`` for what vouches for the
tenant of a queued task. A process that is given only the derived ``runtime:...``, ``audit:...`` and ``tasks:...`` keys can open no owner
secret. Every ciphertext is bound to its context (tenant, column, server, database, role): moved to another row or column, or beside an
edited name, it no longer opens.

A sealed secret is AES-256-GCM with a random nonce, in one of two forms:
``1 | key id (8) | nonce (12) | ciphertext and tag``, with a key from the list;
``2 | key id (8) | length (2) | wrapped data key | nonce (12) | ciphertext and tag``, with a key of its own that a key service has wrapped.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from typing import NoReturn
from uuid import UUID

from tenantdb.errors import CredentialTampered, SecretKeyError
from tenantdb.registry.data_keys import DataKeys
from tenantdb.settings import KMS, KeyService

OWNER = "owner"
RUNTIME = "runtime"
AUDIT = "audit"
TASKS = "tasks"
PURPOSES = (OWNER, RUNTIME, AUDIT, TASKS)

_KEY = re.compile(r"(?:([a-z]+):)?([A-Za-z0-9_-]{43}=?)", re.ASCII)
_LISTED, _WRAPPED = b"\x01", b"\x02"
KEY_ID_LENGTH = _ID = 8
_LENGTH, _NONCE, _TAG = 2, 12, 16


def generate_key() -> str:
    """A new secret key: 32 random bytes, url-safe base64."""
    return _encode(secrets.token_bytes(32))


def password() -> str:
    """A new password for a database role: 32 random bytes, url-safe base64."""
    return secrets.token_urlsafe(32)


class Keyring:
    """The secret keys of one process, newest first: the newest seals, any opens.

    A key is 32 bytes in url-safe base64; ``runtime:<base64>`` is a derived key, which serves that purpose alone; ``kms`` stands for the
    key service, which is the newest where the list does not name it. Without keys a ring can be made, for set-ups on SQLite that store no
    secret, and refuses to seal and to open. Its keys never change, and it may be shared between threads.

    Raises: `SecretKeyError` for a malformed key, without showing it.
    """

    __slots__ = ("_data_keys", "_keys", "_names", "_service_seals")

    def __init__(self, keys: Sequence[str] = (), kms: KeyService | DataKeys | None = None) -> None:
        self._keys: dict[str, dict[bytes, bytes]] = {purpose: {} for purpose in PURPOSES}  # purpose -> key id -> key, newest first
        self._data_keys = kms if kms is None or isinstance(kms, DataKeys) else DataKeys(kms)
        self._service_seals = dict.fromkeys((OWNER, RUNTIME), kms is not None and KMS not in keys)  # it wraps keys, and makes no MACs
        self._names: dict[bytes, str] = {}
        for position, text in enumerate(keys, start=1):
            if text == KMS:
                self._service_seals |= {purpose: kms is not None for purpose in self._service_seals if not self._keys[purpose]}
                continue
            purpose, key = _parse(text, position)
            for each in PURPOSES if purpose is None else (purpose,):
                derived = _derive(key, each) if purpose is None else key
                self._keys[each].setdefault(_key_id(derived), derived)
                self._names.setdefault(_key_id(derived), f"key {position}")

    def holds(self, purpose: str) -> bool:
        """Whether any key for this purpose is here."""
        return bool(self._keys[purpose]) or (self._data_keys is not None and purpose in self._service_seals)

    def newest(self, purpose: str) -> bytes:
        """The id of the key that seals, or signs. Raises: `SecretKeyError` where there is none."""
        if self._data_keys is not None and self._service_seals.get(purpose):
            return self._data_keys.key_id
        if not self._keys[purpose]:
            raise SecretKeyError(f"no {purpose} key is given, so nothing can be encrypted")
        return next(iter(self._keys[purpose]))

    def name(self, key_id: bytes) -> str | None:
        """How a person knows a key: ``key 2`` is the second that was given. None for one that was not."""
        if self._data_keys is not None and key_id == self._data_keys.key_id:
            return KMS
        return self._names.get(key_id)

    def derive(self, purpose: str) -> list[str]:
        """The keys of one purpose, in the form that another process takes as its secret keys.

        With the runtime keys come those of the audit log and of tasks: who serves writes down what it did, and queues work.
        """
        purposes = (RUNTIME, AUDIT, TASKS) if purpose == RUNTIME else (purpose,)
        return [f"{each}:{_encode(key)}" for each in purposes for key in self._keys[each].values()]

    def seal(self, purpose: str, plaintext: bytes, tenant: str, column: str, *context: str) -> bytes:
        """Encrypt with the newest key of ``purpose``. Raises: `SecretKeyError` where there is none; `KeyServiceUnavailable`."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        key_id = self.newest(purpose)
        if self._data_keys is not None and self._service_seals.get(purpose):
            wrapped, key = self._data_keys.new(purpose, tenant, column)
            head: tuple[bytes, ...] = (_WRAPPED, key_id, len(wrapped).to_bytes(_LENGTH, "big"), wrapped)
        else:
            key = self._keys[purpose][key_id]
            head = (_LISTED, key_id)
        nonce = secrets.token_bytes(_NONCE)
        return b"".join(head) + nonce + AESGCM(key).encrypt(nonce, plaintext, _authenticated(head, purpose, (tenant, column, *context)))

    def open(self, purpose: str, blob: bytes, tenant: str, column: str, *context: str) -> bytes:
        """Decrypt what `seal` made for the same purpose and context.

        Raises: `SecretKeyError` where no given key is the one it was sealed with; `CredentialTampered` where it is and the blob or its
        place was changed; `KeyServiceUnavailable`.
        """
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        split = _split(blob)
        if split is None:
            raise CredentialTampered(tenant, column)
        head, sealed = split
        key = self._unwrap(purpose, head, tenant, column) if head[0] == _WRAPPED else self._find(purpose, head[1], tenant, column)
        try:
            return AESGCM(key).decrypt(sealed[:_NONCE], sealed[_NONCE:], _authenticated(head, purpose, (tenant, column, *context)))
        except InvalidTag:
            raise CredentialTampered(tenant, column) from None

    def warm(self, purpose: str, blob: bytes | None, tenant: str, column: str) -> None:
        """Ask the key service now, in this thread, for what `open` would ask it for. Without a service there is nothing to do."""
        split = None if blob is None or self._data_keys is None else _split(blob)
        if split is not None and split[0][0] == _WRAPPED and self._data_keys is not None:
            self._data_keys.warm(purpose, split[0][3], tenant, column)

    def sign(self, message: bytes, *chain: str) -> bytes | None:
        """What vouches for an entry of the audit log: ``key id (8) | HMAC-SHA256``, of the newest audit key and for one chain alone.

        None for a ring without listed keys. Raises: `SecretKeyError` where there are keys and none is for the audit log: an entry without
        a MAC, in the middle of those that have one, would look forged ever after.
        """
        if not self._keys[AUDIT]:
            if any(self._keys.values()):
                raise SecretKeyError("no audit key is among the given keys; `tenantdb generate-key --derive runtime` prints it too")
            return None
        key_id, key = next(iter(self._keys[AUDIT].items()))
        return key_id + _mac(key, message, chain)

    def vouches(self, mac: bytes, message: bytes, *chain: str) -> bool | None:
        """Whether `sign` made this for the message; None where no given key is the one it was made with."""
        key = self._keys[AUDIT].get(mac[:_ID])
        return None if key is None else hmac.compare_digest(mac[_ID:], _mac(key, message, chain))

    def task_keys(self) -> list[bytes]:
        """The keys that sign the tenants of tasks, the newest first; none for a ring without listed keys.

        Raises: `SecretKeyError` where there are keys and none is for tasks.
        """
        if not self._keys[TASKS] and any(self._keys.values()):
            raise SecretKeyError("no tasks key is among the given keys; `tenantdb generate-key --derive runtime` prints it too")
        return list(self._keys[TASKS].values())

    @property
    def signs(self) -> bool:
        """Whether entries of the audit log get a MAC."""
        return bool(self._keys[AUDIT])

    def _unwrap(self, purpose: str, head: Sequence[bytes], tenant: str, column: str) -> bytes:
        if self._data_keys is None:
            raise SecretKeyError(f"the {column} of {tenant} was encrypted with a key service, and kms= gives none")
        return self._data_keys.unwrap(purpose, head[3], tenant, column, keep=purpose == RUNTIME)

    def _find(self, purpose: str, key_id: bytes, tenant: str, column: str) -> bytes:
        key = self._keys[purpose].get(key_id)
        if key is None:
            if any(key_id in keys for keys in self._keys.values()):  # a secret of another purpose, moved here
                raise CredentialTampered(tenant, column)
            raise SecretKeyError(f"no given key opens the {column} of {tenant}: it was encrypted with {purpose} key {key_id.hex()}")
        return key

    def __repr__(self) -> str:
        ids = {purpose: [key_id.hex() for key_id in keys] for purpose, keys in self._keys.items()}
        return f"<Keyring {ids}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Keyring is not pickled: keys do not travel in messages")


def _parse(text: str, position: int) -> tuple[str | None, bytes]:
    match = _KEY.fullmatch(text)
    if match is None or match[1] not in (None, *PURPOSES):
        purposes = ", ".join(f"{purpose}:" for purpose in PURPOSES)
        raise SecretKeyError(f"secret key {position} is not 32 bytes of url-safe base64, with or without one of {purposes} before it")
    return match[1], base64.urlsafe_b64decode(match[2].rstrip("=") + "=")


def _derive(key: bytes, purpose: str) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(algorithm=SHA256(), length=32, salt=None, info=f"tenantdb/{purpose}/v1".encode()).derive(key)


def _mac(key: bytes, message: bytes, chain: Sequence[str]) -> bytes:
    """With a key of the chain's own: HKDF-Expand of RFC 5869, of which 32 bytes are one block. The standard library's, because it is
    called for each entry and for each that is verified."""
    info = b"tenantdb/audit-chain/v1" + b"".join(len(part).to_bytes(4, "big") + part for part in (each.encode() for each in chain))
    return hmac.digest(hmac.digest(key, info + b"\x01", "sha256"), message, "sha256")


def _key_id(key: bytes) -> bytes:
    return hashlib.sha256(b"tenantdb/key-id/v1" + key).digest()[:_ID]


def password_place(tenant_id: UUID, role: str, server_id: UUID | None, database: str | None, role_name: str | None) -> tuple[str, ...]:
    """What a role's password is bound to: tenant and column, then server, database and role."""
    return str(tenant_id), f"{role}_secret", str(server_id), str(database), str(role_name)


def key_id_of(blob: bytes) -> bytes | None:
    """Which key a secret says that it was sealed with; None where it is damaged. Only `Keyring.open` tells whether that is true."""
    split = _split(blob)
    return None if split is None else split[0][1]


def _split(blob: bytes) -> tuple[tuple[bytes, ...], bytes] | None:
    """The parts of a secret's head, and what follows it; None where it is none that we made."""
    version, key_id, rest = blob[:1], blob[1 : 1 + _ID], blob[1 + _ID :]
    head: tuple[bytes, ...] = (version, key_id)
    if version == _WRAPPED:
        length, rest = rest[:_LENGTH], rest[_LENGTH:]
        end = int.from_bytes(length, "big")
        head, rest = (*head, length, rest[:end]), rest[end:]
    elif version != _LISTED:
        return None
    return None if len(rest) < _NONCE + _TAG else (head, rest)


def _authenticated(head: Sequence[bytes], purpose: str, context: Sequence[str]) -> bytes:
    """What the tag covers. Every part carries its length: otherwise ("ab", "c") and ("a", "bc") would be one context."""
    parts = [*head, purpose.encode(), *(part.encode() for part in context)]
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _encode(key: bytes) -> str:
    return base64.urlsafe_b64encode(key).decode()
