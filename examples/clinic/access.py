"""The clinic's access tokens: signed with CLINIC_TOKEN_KEY, good for 15 minutes."""

from __future__ import annotations

import os
from datetime import timedelta

from tenantdb import errors
from tenantdb.tokens import Tokens

LIFETIME = timedelta(minutes=15)


def access_tokens(key: str | None = None) -> Tokens:
    """Issues and verifies the tokens. Every process of the application is given the same key. Raises: `ConfigError`."""
    key = key or os.environ.get("CLINIC_TOKEN_KEY")
    if not key:
        raise errors.ConfigError(
            "CLINIC_TOKEN_KEY is not set; make a key with: python -c 'import secrets; print(secrets.token_urlsafe(48))'"
        )
    return Tokens(key, issuer="clinic", audience="clinic-api", tenant_required=False, lifetime=LIFETIME)
