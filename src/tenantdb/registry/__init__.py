"""Who the tenants are: the central registry, its records cache, its secrets, its users and its audit log."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import Connection, Engine, func, select

from tenantdb.backends import backend
from tenantdb.errors import CredentialTampered, RateLimited, TenantNotFound, WrongDatabase
from tenantdb.model import DatabaseRole, Server, Tenant
from tenantdb.registry import schema
from tenantdb.registry.audit import AuditStore
from tenantdb.registry.audit import record as audit_record
from tenantdb.registry.cache import RecordCache
from tenantdb.registry.changes import Change, Changes
from tenantdb.registry.domains import DomainStore
from tenantdb.registry.memberships import MembershipStore
from tenantdb.registry.names import KnownNames, read_names
from tenantdb.registry.notices import CHANNEL, Notices
from tenantdb.registry.operations import Operation, OperationState, OperationStore
from tenantdb.registry.rates import SignUpLimits
from tenantdb.registry.records import TenantRecord
from tenantdb.registry.refresh_tokens import RefreshGrant, RefreshTokenStore
from tenantdb.registry.revocations import RevocationStore
from tenantdb.registry.secrets import OWNER, RUNTIME, Keyring, password_place
from tenantdb.registry.servers import ServerStore
from tenantdb.registry.signup import Hands, SignUp, Taking, sign_up
from tenantdb.registry.standings import Standing, Standings
from tenantdb.registry.templates import TemplateStore
from tenantdb.registry.tenants import TenantStore
from tenantdb.registry.transactions import Transactions, begin, mapped_errors
from tenantdb.registry.users import UserStore
from tenantdb.registry.watching import Watcher
from tenantdb.settings import Settings

if TYPE_CHECKING:
    from tenantdb.registry.rollouts import RolloutStore
    from tenantdb.registry.rotation import KeyKeeper

__all__ = [
    "Change",
    "Hands",
    "Keyring",
    "Operation",
    "OperationState",
    "RefreshGrant",
    "Registry",
    "SignUp",
    "Standing",
    "Taking",
    "TenantRecord",
]


class Registry:
    """The registry as the rest of the library sees it: its collections, the cached look-up, and the passwords it keeps sealed.

    ``engine`` is the login that serves; ``admin_engine`` the one that owns the tables, which may be the same. Opens nothing by itself; the
    first use checks once that this code can work with the tables and the keys with its secrets. Safe to share between threads.
    """

    def __init__(
        self,
        engine: Engine,
        admin_engine: Engine,
        settings: Settings,
        keyring: Keyring,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.keyring = keyring
        self._transactions = Transactions(engine, admin_engine, self._check, keyring)
        self.changes = Changes()
        self._cache = RecordCache(size=settings.cache_size, ttl=settings.cache_ttl, clock=clock)
        self._names = KnownNames(lambda: read_names(self._transactions), ttl=settings.cache_ttl, clock=clock)
        self.audit = AuditStore(self._transactions, keyring, settings)
        self.servers = ServerStore(self._transactions, keyring, self._cache.clear, ttl=settings.cache_ttl)
        self.tenants = TenantStore(self._transactions, self.servers.read, self.forget)
        believed: dict[str, Any] = {"size": settings.cache_size, "ttl": settings.cache_ttl, "clock": clock}
        self.standings = Standings(self._transactions, **believed)
        self.domains = DomainStore(self._transactions, **believed)
        self.users = UserStore(self._transactions, self.forget_user)
        self.memberships = MembershipStore(self._transactions, self.forget_membership)
        self.revocations = RevocationStore(self._transactions, self.forget_user, self.forget, ttl=settings.cache_ttl, clock=clock)
        self.refresh_tokens = RefreshTokenStore(self._transactions)
        self.operations = OperationStore(self._transactions)
        self.sign_up_limits = SignUpLimits(self._transactions, settings)
        self.templates = TemplateStore(self._transactions)
        notices = Notices(
            records=self._cache,
            tenants=self.tenants,
            standings=self.standings,
            domains=self.domains,
            revocations=self.revocations,
            changes=self.changes,
        )
        product = backend(settings.url.backend)
        self._watcher = Watcher(
            lambda: product.listen(settings.url, settings, CHANNEL), notices.heard, notices.check, every=settings.cache_ttl / 3
        )

    # -- what a process that serves requests does not import --

    @functools.cached_property
    def rollouts(self) -> RolloutStore:
        from tenantdb.registry.rollouts import RolloutStore

        return RolloutStore(self._transactions, self.forget)

    @functools.cached_property
    def keys(self) -> KeyKeeper:
        from tenantdb.registry.rotation import KeyKeeper

        return KeyKeeper(self._transactions, self.keyring, self.forget)

    # -- the data path --

    def lookup(self, key: str | UUID) -> TenantRecord:
        """A tenant's record, at most ``cache_ttl`` seconds old. ``key`` is canonical (`tenantdb.resolvers.tenant_key`).

        Raises: `TenantNotFound`; `RegistryUnavailable` and the like, which say nothing about the tenant and are not remembered.
        """
        found = self._cache.peek(key)
        if found is not None:
            return found
        if self._names.rule_out(key):  # and not remembered: what the list rules out is as old as the list
            raise TenantNotFound(str(key))
        return self._cache.get(key, self._load)

    def _load(self, key: str | UUID) -> TenantRecord:
        try:
            record = self.tenants.record(key)
        except TenantNotFound:
            self._names.missed()
            raise
        except CredentialTampered as error:  # of its server's address
            self.audit.refused(error.code)
            raise
        for blob in (record.runtime_secret, record.runtime_secret_pending):  # a connect may be made by an event loop, which cannot wait
            self.keyring.warm(RUNTIME, blob, str(record.tenant.id), f"{DatabaseRole.RUNTIME}_secret")
        return record

    def peek(self, key: str | UUID) -> TenantRecord | None:
        """The same without I/O: None where only `lookup` can tell. Raises: `TenantNotFound` where that is remembered."""
        return self._cache.peek(key)

    def forget(self, tenant_id: UUID, slug: str | None = None) -> None:
        """The tenant changed: the next look-up asks the database."""
        self._cache.forget(tenant_id, slug)
        self._names.add(tenant_id, slug)
        self.changes.tell(Change(kind="tenant", tenant_id=tenant_id))

    def forget_user(self, user_id: UUID) -> None:
        """The user changed, or which of his tokens count."""
        self.standings.forget(user_id)
        self.changes.tell(Change(kind="user", user_id=user_id))

    def forget_membership(self, user_id: UUID, tenant_id: UUID) -> None:
        """The user's membership in the tenant changed."""
        self.standings.forget(user_id, tenant_id)
        self.changes.tell(Change(kind="membership", user_id=user_id, tenant_id=tenant_id))

    def watch(self) -> None:
        """Follow what other processes do; see `TenantDB.watch`."""
        self._watcher.start()

    def quarantine(self, tenant: Tenant, error: WrongDatabase) -> None:
        """Write down that a connection reached a database that is not the tenant's. Raises: as `write`."""
        with self.write() as connection:
            audit_record(connection, "tenant.quarantine", tenant_id=tenant.id, outcome="refused", details={"problem": error.problem})

    # -- life --

    def init(self) -> None:
        """Make or upgrade the tables; on PostgreSQL with two logins, also wall the serving one in. May run any number of times.

        Raises: `RegistryOutOfRange`, `RegistryUnavailable`, `SecretKeyError`, `HardeningFailed`.
        """
        engine, admin_engine = self._transactions.engine, self._transactions.admin_engine
        newest = schema.upgrade(admin_engine, self.keyring)
        if newest and engine is not admin_engine and engine.dialect.name == "postgresql":
            with mapped_errors():
                with begin(engine, immediate=False) as connection:
                    app = connection.scalar(select(func.current_user()))
                with begin(admin_engine, immediate=True) as connection:
                    if app != connection.scalar(select(func.current_user())):
                        schema.grant_app(connection, str(app))
        for cached in (self._cache, self.standings, self.domains, self.revocations):
            cached.clear()

    def ping(self) -> None:
        """Ask one question. Raises as `read`; `SecretKeyError` where the keys are not the registry's."""
        with self.read() as connection:
            connection.execute(select(1))

    def open_doors(self) -> list[str]:
        """What stands open at the registry, in words: its database to PUBLIC, the walls of the serving login. None on SQLite."""
        with self.read() as connection:
            if connection.dialect.name != "postgresql":
                return []
            return [*schema.public_doors(connection), *schema.open_doors(connection, str(connection.scalar(select(func.current_user()))))]

    def close(self) -> None:
        """Watch no more, close idle connections and forget what is cached. May be called twice."""
        self._watcher.stop()
        for cached in (self._cache, self.standings, self.domains, self.revocations):
            cached.clear()
        self.audit.close()
        self._transactions.close()

    # -- transactions --

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A reading transaction of the serving login. Raises: `RegistryUnavailable`, `RegistryNotInitialized`, `RegistryOutOfRange`."""
        with self._transactions.read() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction of the serving login, committed at the end of the block. Raises as `read`."""
        with self._transactions.write() as connection:
            yield connection

    @contextmanager
    def admin_write(self) -> Iterator[Connection]:
        """A transaction of the login that owns the tables, committed at the end of the block. Raises as `read`."""
        with self._transactions.admin_write() as connection:
            yield connection

    # -- sign-up --

    def sign_up(self, request: SignUp, *, taking: Taking | None = None, hands: Hands | None = None) -> tuple[Tenant, Operation]:
        """Make user, tenant, membership and operation in one transaction; see `tenantdb.registry.signup.sign_up`.

        Raises: `TenantExists`, `UserExists`, `InvalidSlug`, `InvalidUser`, `UserNotFound`, `RateLimited`. Nothing was written then.
        """
        try:
            return sign_up(self, request, taking=taking, hands=hands)
        except RateLimited as error:
            self.audit.refused(error.code)
            raise

    # -- passwords of database roles --

    def seal_password(self, password: str, *, role: DatabaseRole, tenant: Tenant, server: Server, database: str, role_name: str) -> bytes:
        """Encrypt a role's password for its place. Raises: `SecretKeyError`."""
        return self.keyring.seal(_purpose(role), password.encode(), *password_place(tenant.id, role, server.id, database, role_name))

    def passwords(self, record: TenantRecord, role: DatabaseRole) -> list[str]:
        """A role's password, and behind it the one that is about to replace it, if any. The owner's are read with the login that owns the
        registry. Raises: `CredentialTampered`, `SecretKeyError`, `TenantNotFound`."""
        if role is DatabaseRole.OWNER:
            sealed, pending = (record.owner_secret, None) if record.owner_secret else self.tenants.owner_secrets(record.tenant.id)
        else:
            sealed, pending = record.runtime_secret, record.runtime_secret_pending
        name = record.tenant.owner_role if role is DatabaseRole.OWNER else record.tenant.runtime_role
        try:
            return [self._open(record, role, blob, name) for blob in ((sealed,) if pending is None else (sealed, pending))]
        except CredentialTampered as error:  # whoever can write to the registry tried something
            self.audit.refused(error.code, record.tenant.id)
            raise

    def runtime_password(self, record: TenantRecord) -> str:
        """The one that holds. Raises: as `passwords`."""
        return self.passwords(record, DatabaseRole.RUNTIME)[0]

    def owner_password(self, record: TenantRecord) -> str:
        """The one that holds. Raises: as `passwords`."""
        return self.passwords(record, DatabaseRole.OWNER)[0]

    def _open(self, record: TenantRecord, role: DatabaseRole, blob: bytes | None, role_name: str | None) -> str:
        server_id = None if record.server is None else record.server.id
        place = password_place(record.tenant.id, role, server_id, record.tenant.database, role_name)
        if blob is None:
            raise CredentialTampered(place[0], place[1])
        return self.keyring.open(_purpose(role), blob, *place).decode()

    def _check(self, connection: Connection) -> None:
        schema.check_range(connection)
        schema.check_keys(connection, self.keyring)


def _purpose(role: DatabaseRole) -> str:
    return OWNER if role is DatabaseRole.OWNER else RUNTIME
