"""A key service as a cloud has one, in memory: it binds what it wraps to the context, counts what it is asked, and can be down."""

from __future__ import annotations

import json
import secrets
import threading
from collections import Counter
from collections.abc import Mapping

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tenantdb.errors import CredentialTampered


class LocalKms:
    """``key_id`` is the key that wraps now; all of ``keys`` unwrap."""

    def __init__(self) -> None:
        self.key_id = "one"
        self.keys = {name: AESGCM(secrets.token_bytes(32)) for name in ("one", "two")}
        self.asked: Counter[tuple[str, str, str]] = Counter()  # by method, purpose, column
        self.contexts: list[Mapping[str, str]] = []
        self.down = False
        self.threads: set[int] = set()  # that had to wait for an answer

    def wrap(self, data_key: bytes, context: Mapping[str, str]) -> bytes:
        self._answer("wrap", context)
        nonce = secrets.token_bytes(12)
        return self.key_id.encode() + nonce + self.keys[self.key_id].encrypt(nonce, data_key, _bytes(context))

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        self._answer("unwrap", context)
        try:
            key = self.keys[wrapped[:3].decode()]
            return key.decrypt(wrapped[3:15], wrapped[15:], _bytes(context))
        except (InvalidTag, KeyError, UnicodeDecodeError, ValueError):
            raise CredentialTampered(context["tenant"], context["column"]) from None

    def calls(self, method: str, purpose: str | None = None) -> int:
        return sum(count for (name, its, _), count in self.asked.items() if name == method and purpose in (None, its))

    def _answer(self, method: str, context: Mapping[str, str]) -> None:
        self.asked[method, context["purpose"], context["column"]] += 1
        self.contexts.append(context)
        self.threads.add(threading.get_ident())
        if self.down:
            raise TimeoutError("canary: arn:aws:kms:eu-central-1:1234:key/5678")

    def __repr__(self) -> str:
        return "<LocalKms canary>"


def _bytes(context: Mapping[str, str]) -> bytes:
    return json.dumps(dict(context), sort_keys=True).encode()
