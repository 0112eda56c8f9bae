"""SCRAM verifiers made on the client, so that a plain password never stands in SQL text, a server log or pg_stat_statements.

Format and derivation: RFC 5802 section 3, RFC 7677, and PostgreSQL's ``rolpassword``. libpq's own function follows the server's setting for
the iteration count; this one does not ask. Passwords are machine-made ASCII, so SASLprep changes nothing and is left out.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets

from tenantdb.errors import ConfigError

ITERATIONS = 4096  # PostgreSQL's default


def verifier(password: str, *, iterations: int = ITERATIONS, salt: bytes | None = None) -> str:
    """The SCRAM-SHA-256 verifier of an ASCII password, as CREATE ROLE ... PASSWORD takes it. Raises: `ConfigError` for another one."""
    if not password or not password.isascii():
        raise ConfigError("the password of a database role is empty or holds characters outside ASCII")
    salt = secrets.token_bytes(16) if salt is None else salt
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, iterations)
    stored_key = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server_key = hmac.digest(salted, b"Server Key", "sha256")

    def text(raw: bytes) -> str:
        return base64.b64encode(raw).decode("ascii")

    return f"SCRAM-SHA-256${iterations}:{text(salt)}${text(stored_key)}:{text(server_key)}"
