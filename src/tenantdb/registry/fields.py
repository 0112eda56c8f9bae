"""What may stand in a registry row: checked before any SQL, so that both databases refuse the same."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from tenantdb.errors import InvalidUser
from tenantdb.model import Subscription

MAX_TEXT = 200
MAX_METADATA = 65_536
MAX_EMAIL = 254  # RFC 5321, 4.5.3.1.3: a path of 256 with its angle brackets


def text(name: str, value: Any, *, required: bool = False) -> str | None:
    """A line of text, or None. Raises: `ValueError`, `TypeError`, by the field's name and without its value."""
    if value is None and not required:
        return None
    if not isinstance(value, str):
        raise TypeError(f"{name} is a string, not {type(value).__name__}")
    if len(value) > MAX_TEXT or not value.strip() or any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise ValueError(f"{name} has 1 to {MAX_TEXT} characters and no control characters")
    return value


def document(name: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    """A JSON object. Raises: `TypeError` where JSON cannot hold it, `ValueError` where it is too large."""
    try:
        written = json.dumps(dict(value or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is a mapping that JSON can hold: {error}") from None
    result: dict[str, Any] = json.loads(written)
    plain = json.dumps(result, ensure_ascii=False)
    if len(written) > MAX_METADATA or "\\u0000" in plain or any(unicodedata.category(character) == "Cs" for character in plain):
        raise ValueError(f"{name} has at most {MAX_METADATA} characters as JSON, no NUL and no broken text")
    return result


def subscription(value: Subscription | str) -> Subscription:
    """Raises: `ValueError` that names the four."""
    try:
        return Subscription(value)
    except ValueError:
        raise ValueError(f"subscription is one of {', '.join(Subscription)}") from None


def moment(name: str, value: datetime | None) -> datetime | None:
    """An aware time, or None. Raises: `ValueError` for a naive one."""
    if value is not None and value.tzinfo is None:
        raise ValueError(f"{name} needs a time zone, for example datetime.now(timezone.utc)")
    return value


def email_key(email: str) -> str | None:
    """The form in which two spellings of one address are equal, or None where it is no address.

    Case does not count. Characters that only look like others (a Kelvin sign, a ligature) are refused rather than folded, and nothing is
    folded beyond lower case: a password reset for an address that merely folds to somebody's would go to a stranger.
    """
    local, at, domain = email.partition("@")
    if not (local and at and domain) or "@" in domain or len(email) > MAX_EMAIL:
        return None
    if not email.isprintable() or any(character.isspace() for character in email) or unicodedata.normalize("NFKC", email) != email:
        return None
    return email.lower()


def required_email_key(email: str) -> str:
    """Raises: `InvalidUser` where it is no address."""
    key = email_key(email)
    if key is None:
        raise InvalidUser("an e-mail address has one @ between two parts, no spaces, and at most 254 characters")
    return key
