"""Users' passwords: Argon2id, and the same work for a user who does not exist.

argon2-cffi is loaded with the first password, not with the library.
"""

from __future__ import annotations

import functools
import secrets
from typing import TYPE_CHECKING

from tenantdb.errors import InvalidUser

if TYPE_CHECKING:
    from argon2 import PasswordHasher

MIN_LENGTH = 8  # NIST SP 800-63B
MAX_LENGTH = 1024  # so that nobody makes us hash megabytes


@functools.cache
def _hasher() -> PasswordHasher:
    from argon2 import PasswordHasher

    return PasswordHasher()


@functools.cache
def _dummy() -> str:
    return _hasher().hash(secrets.token_urlsafe(32))


def hash_password(password: str) -> str:
    """Raises: `InvalidUser` where it is too short, too long, or not text."""
    if not MIN_LENGTH <= len(password) <= MAX_LENGTH:
        raise InvalidUser(f"a password has {MIN_LENGTH} to {MAX_LENGTH} characters")
    if not _encodable(password):
        raise InvalidUser("the password is not valid text")
    return _hasher().hash(password)


def verify_password(stored: str | None, password: str) -> bool:
    """Whether the password fits. ``stored=None`` (no such user) takes as long as a wrong password."""
    from argon2.exceptions import InvalidHashError, VerificationError

    dummy = _dummy()  # also for a user who exists, or the first sign-in in a process would tell
    if len(password) > MAX_LENGTH or not _encodable(password):
        return False
    try:
        _hasher().verify(dummy if stored is None else stored, password)
    except (VerificationError, InvalidHashError):
        return False
    return stored is not None


def needs_rehash(stored: str) -> bool:
    """Whether the hash was made with other parameters than today's."""
    return _hasher().check_needs_rehash(stored)


def _encodable(password: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in password)  # lone surrogates, which JSON can carry
