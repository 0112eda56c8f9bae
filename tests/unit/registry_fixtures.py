"""A registry for the store tests: real tables, made by the real history, in a SQLite file of the test's own.

The stores' tests take `registry`; a run on another database overrides `registry_engines`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from tenantdb.backends.sqlite import SQLite
from tenantdb.model import Tenant
from tenantdb.registry import Keyring, Registry, SignUp, passwords
from tenantdb.registry.secrets import generate_key
from tenantdb.settings import ConnectionURL, Settings

KEY = generate_key()
PASSWORD = "correct horse battery"


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def cheap_hashing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Argon2id with its smallest parameters: the tests hash hundreds of times."""
    from argon2 import PasswordHasher

    hasher = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    monkeypatch.setattr(passwords, "_hasher", lambda: hasher)
    monkeypatch.setattr(passwords, "_dummy", functools.cache(lambda: hasher.hash("nobody's password")))


@pytest.fixture
def registry_url(tmp_path: Path) -> ConnectionURL:
    return ConnectionURL.parse(f"sqlite:///{tmp_path / 'central.sqlite3'}")


@pytest.fixture
def registry_settings(registry_url: ConnectionURL) -> Settings:
    return Settings(url=registry_url)


@pytest.fixture
def registry_engines(registry_url: ConnectionURL, registry_settings: Settings) -> Iterator[tuple[Engine, Engine]]:
    """The engines of the login that serves and of the one that owns the tables: on SQLite the same."""
    backend = SQLite()
    backend.prepare_registry(registry_url)
    engine = backend.registry_engine(registry_url, registry_settings)
    yield engine, engine
    engine.dispose()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def empty_registry(registry_engines: tuple[Engine, Engine], registry_settings: Settings, clock: Clock, cheap_hashing: None) -> Registry:
    """A registry whose tables are not made yet."""
    return Registry(*registry_engines, registry_settings, Keyring([KEY]), clock=clock)


@pytest.fixture
def registry(empty_registry: Registry) -> Registry:
    empty_registry.init()
    return empty_registry


@pytest.fixture
def acme(registry: Registry) -> Tenant:
    """A tenant as sign-up leaves it: provisioning, without a place."""
    tenant, _ = registry.sign_up(SignUp(slug="acme", name="Acme Clinic"))
    return tenant
