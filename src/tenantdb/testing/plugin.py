"""Fixtures for the tests of an application: real tenants, each in a database of its own, in a few lines.

    pytest_plugins = ["tenantdb.testing.plugin"]         # in the top conftest.py

    @pytest.fixture(scope="session")
    def tenant_db_app():
        from clinic.db import db                         # its settings, seeds and hooks hold for the tests too
        return db

    def test_a_patient_is_found(tenant_session):
        tenant_session.add(Patient(name="Ann"))
        ...

``pytest`` runs it on SQLite; ``pytest --tenantdb=postgresql`` on a PostgreSQL that is started for the run (``tenantdb[embedded]``);
``--tenantdb=postgresql://user:password@host/postgres`` on a server that is there. That login must be allowed to create databases and roles;
what the fixtures made on the server is dropped at the end.

It is named by whoever wants it, and no entry point loads it. An entry point would import SQLAlchemy and this library into every run of
pytest of everybody who has installed it, before coverage has begun to measure, and give `tenant` to projects that mean something else.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterator
from typing import Any, Protocol
from uuid import UUID

import pytest
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from tenantdb import context
from tenantdb.aio import AsyncTenantDB
from tenantdb.database import TenantDB
from tenantdb.errors import TenantExists, TenantNotFound
from tenantdb.model import MemberRole, Tenant, User
from tenantdb.testing.discards import Discards
from tenantdb.testing.places import place
from tenantdb.tokens import Tokens

_PLACE = frozenset({"url", "registry_admin", "server", "servers", "secret_keys", "kms", "hardening"})
"""What says where an application's databases are: never taken over from the application, whose own databases tests must not touch."""


class TenantFactory(Protocol):
    """What `tenant_factory` gives: ``details`` are those of `TenantDB.provision`."""

    def __call__(self, slug: str | None = None, **details: Any) -> Tenant: ...


class TokenFactory(Protocol):
    """What `tenant_token` gives."""

    def __call__(
        self, tenant: Tenant, *, role: MemberRole | str = MemberRole.USER, user: User | UUID | str | None = None, **claims: Any
    ) -> str: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("tenantdb").addoption(
        "--tenantdb",
        default="sqlite",
        metavar="sqlite|postgresql|URL",
        help="where test tenants live: SQLite files, a PostgreSQL started for the run, or the server at a postgresql:// URL",
    )


@pytest.fixture(autouse=True)
def _nothing_stays_bound() -> Iterator[None]:
    """Fail a test that has ended inside a tenant's block, so that not the next one is blamed, and the block that leaves a connection
    behind; the message tells where that was leased."""
    with context.watch_for_leftovers():
        yield
        left = context.bound_or_none()
        if left is not None:
            context._bound.set(None)
            pytest.fail(
                f"tenant {left.slug!r} is still bound at the end of the test: its tenant_context was entered and not left", pytrace=False
            )


# -- the database layer ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tenant_db_app() -> TenantDB | None:
    """Override it to return the application's `TenantDB`: its session class, settings, seeds and hooks are used, its databases are not."""
    return None


@pytest.fixture(scope="session")
def tenant_db_settings() -> dict[str, Any]:
    """Override it to give further settings, such as ``{"migrations": "clinic:migrations"}``. They win over those of `tenant_db_app`."""
    return {}


@pytest.fixture(scope="session")
def tenant_db(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tenant_db_app: TenantDB | None,
    tenant_db_settings: dict[str, Any],
) -> Iterator[TenantDB]:
    """A `TenantDB` for the whole run, with an initialised registry of its own. Each process of pytest-xdist has its own."""
    with place(request.config.getoption("--tenantdb"), tmp_path_factory) as where, _make(where, tenant_db_app, tenant_db_settings) as db:
        db.init()
        yield db


_UNLIMITED = {"signups": 0, "signups_per_actor": 0, "unfinished_signups": 0}
"""A suite that tests signing up does so more often in an hour than anybody; `tenant_db_settings` can set limits that are to be tested."""


def _make(where: dict[str, Any], app: TenantDB | None, settings: dict[str, Any]) -> TenantDB:
    settings = {**_UNLIMITED, **settings}
    if app is None:
        return TenantDB(**{**settings, **where})
    taken = {name: getattr(app.settings, name) for name in app.settings.model_fields_set - _PLACE}
    db = TenantDB(**{**taken, **settings, **where}, session_class=app.session_class, session_options=app.session_options)
    db._hooks.extend(app._hooks)
    return db


@pytest.fixture(scope="session")
def async_tenant_db(tenant_db: TenantDB) -> AsyncTenantDB:
    """An `AsyncTenantDB` on `tenant_db`, for any number of event loops. Override it to give it a ``session_class``."""
    return AsyncTenantDB(tenant_db)


# -- tenants ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _discards(tenant_db: TenantDB) -> Iterator[Discards]:
    discards = Discards(tenant_db)
    yield discards
    discards.close()


@pytest.fixture
def tenant_factory(tenant_db: TenantDB, _discards: Discards) -> Iterator[TenantFactory]:
    """Call it for further tenants, migrated and seeded: ``tenant_factory("acme", plan="gold")``. Their databases are dropped at the end."""
    made: list[Tenant] = []

    def make(slug: str | None = None, **details: Any) -> Tenant:
        slug = slug or f"test-{secrets.token_hex(6)}"
        try:
            made.append(tenant_db.provision(slug, **details))
        except TenantExists:  # somebody else's
            raise
        except BaseException:  # a seed or a hook that fails leaves a tenant in state failed
            with contextlib.suppress(TenantNotFound):
                made.append(tenant_db.tenants.get(slug))
            raise
        return made[-1]

    yield make
    _discards.discard(made)


@pytest.fixture
def tenant(tenant_factory: TenantFactory) -> Tenant:
    """A new tenant, migrated and seeded; its database is dropped at the end.

    Override it with a wider scope where making one for each test takes too long: `tenant_session` still leaves nothing behind in it.
    """
    return tenant_factory()


# -- sessions --------------------------------------------------------------------------------------------------------------------------

_SAVEPOINTS = {"join_transaction_mode": "create_savepoint"}


@pytest.fixture
def tenant_session(tenant_db: TenantDB, tenant: Tenant) -> Iterator[Session]:
    """A session of the application's class on the tenant's database. Whatever the code under test commits in it is rolled back at the end.

    ``commit()`` ends a savepoint inside an outer transaction. Sessions that the code opens itself are others, and theirs is committed.
    """
    with tenant_db.connect(tenant) as connection:
        connection.begin()  # never committed: closing the connection rolls it back
        with tenant_db.session_class(bind=connection, **{**tenant_db.session_options, **_SAVEPOINTS}) as session:
            yield session


@pytest.fixture
def async_tenant_session(async_tenant_db: AsyncTenantDB, tenant: Tenant) -> Iterator[AsyncSession]:
    """The same for asyncio, in whichever event loop first uses it: under pytest-asyncio, anyio's plugin or ``asyncio.run``.

    The fixture itself is no coroutine, so no plugin has to run it, and it has no loop of its own that could be another than the test's.
    """
    outer = _OuterTransaction(async_tenant_db, tenant)
    db = async_tenant_db.sync_db
    joined = type(f"Test{db.session_class.__name__}", (db.session_class,), {"get_bind": lambda session, *_, **__: outer.connection()})
    session = async_tenant_db.session_class(sync_session_class=joined, **{**db.session_options, **_SAVEPOINTS})
    yield session
    outer.close(session)


class _OuterTransaction:
    """A connection that begins where it is first used, inside SQLAlchemy's greenlet, and is cut off at the end: the event loop may be
    closed by then, and what is not committed when somebody hangs up is rolled back."""

    def __init__(self, db: AsyncTenantDB, tenant: Tenant) -> None:
        self._db = db
        self._tenant = tenant
        self._connection: Connection | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def connection(self) -> Connection:
        loop = asyncio.get_running_loop()
        if self._connection is None:
            _, engine = self._db._lookup_engine(self._tenant.id)
            self._connection, self._loop = engine.connect(), loop
            self._connection.begin()
        elif loop is not self._loop:
            raise RuntimeError(
                "async_tenant_session was used in another event loop before. With pytest-asyncio give the test and the fixtures that use"
                ' it one loop, such as @pytest_asyncio.fixture(loop_scope="module") beside @pytest.mark.asyncio(loop_scope="module")'
            )
        return self._connection

    def close(self, session: AsyncSession) -> None:
        if self._connection is not None:
            self._connection.invalidate()
            session.sync_session.close()
            self._connection.close()


# -- users -----------------------------------------------------------------------------------------------------------------------------

_NO_PASSWORD = "!"  # no hash, so no password fits it: hashing one for each token would take longer than the rest of the test


@pytest.fixture(scope="session")
def tenant_tokens() -> Tokens:
    """Override it to return the application's `Tokens`, which sign what `tenant_token` gives. These have a key of this run alone."""
    return Tokens(secrets.token_urlsafe(48), issuer="tests", audience="tests")


@pytest.fixture
def tenant_token(tenant_db: TenantDB, tenant_tokens: Tokens) -> Iterator[TokenFactory]:
    """Call it for the bearer token of a member: ``tenant_token(tenant, role="admin")``.

    Without ``user`` one is made, whom no password lets in, and who is deleted at the end; a given one becomes a member or gets the role.
    ``claims`` are added to the token.
    """
    made: list[User] = []

    def issue(tenant: Tenant, *, role: MemberRole | str = MemberRole.USER, user: User | UUID | str | None = None, **claims: Any) -> str:
        if user is None:
            with tenant_db._registry.write() as connection:
                user = tenant_db.users.create_in(connection, f"{secrets.token_hex(6)}@test.example", _NO_PASSWORD)
            made.append(user)
        member = tenant_db.memberships.add(user, tenant, role=role)
        return tenant_tokens.issue(member.user_id, member.tenant_id, role=str(member.role), claims=claims)

    yield issue
    for user in made:
        tenant_db.users.delete(user)
