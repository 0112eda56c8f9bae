"""`TenantDB`: one object for web, worker, command line, Alembic and tests. It wires the parts together and decides nothing itself."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload
from uuid import UUID

from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.orm import Session

from tenantdb.backends import backend
from tenantdb.connections.each import ForEachReport, for_each
from tenantdb.connections.engines import Engines
from tenantdb.connections.locate import Locator
from tenantdb.connections.lookup import Lookups
from tenantdb.connections.records import AuditTrail
from tenantdb.connections.session import Pin, check_session_options, pinned
from tenantdb.context import TenantContext, pinned_key
from tenantdb.model import BudgetStats, NewUser, Subscription, Tenant, TenantState, User
from tenantdb.provisioning.hooks import Hooks
from tenantdb.registry import Change, Registry
from tenantdb.registry.secrets import Keyring
from tenantdb.resolvers import tenant_key
from tenantdb.settings import Settings

if TYPE_CHECKING:
    from tenantdb.events import Event
    from tenantdb.fleet.migrations import FleetMigrations
    from tenantdb.provisioning.adoption import Adoption
    from tenantdb.provisioning.archive import Export
    from tenantdb.provisioning.check import Finding
    from tenantdb.provisioning.doctor import DoctorFinding
    from tenantdb.provisioning.lifecycle import Lifecycle
    from tenantdb.provisioning.procedures import Runner
    from tenantdb.provisioning.provisioner import Provisioner
    from tenantdb.provisioning.rows import ExportedRows
    from tenantdb.provisioning.spares import Spares
    from tenantdb.provisioning.transfer import Transfer
    from tenantdb.provisioning.worker import Resumed, Worker
    from tenantdb.registry.operations import Operation
    from tenantdb.registry.rotation import KeyRotation, KeyUse

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
TenantKey = str | UUID | Tenant


class TenantDB:
    """A database for every tenant, behind SQLAlchemy's own sessions.

    ``url`` is the registry; ``sqlite:///data/central.sqlite3`` needs nothing else. ``server`` is the provisioner's URL, only where
    databases are made. ``settings`` are further fields of `Settings`; a ready `Settings` may stand in place of the URL. Constructing
    opens nothing.

    A tenant is named by its slug, its id or a `Tenant`; left out, the bound one is meant (`tenant_context`). One instance serves all
    threads and event loops of a process. Raises: `ConfigError` and its kin for settings that cannot be.
    """

    def __init__(
        self,
        url: str | URL | Settings,
        *,
        server: str | URL | None = None,
        servers: Mapping[str, str | URL] | None = None,
        registry_admin: str | URL | None = None,
        secret_keys: Sequence[str] | None = None,
        migrations: str | None = None,
        session_class: type[Session] = Session,
        session_options: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        given = {
            "server": server,
            "servers": servers,
            "registry_admin": registry_admin,
            "secret_keys": secret_keys,
            "migrations": migrations,
            **settings,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if isinstance(url, Settings):
            self.settings = Settings(**{**dict(url), **given}) if given else url
        else:
            self.settings = Settings(url=url, **given)
        self.session_class = session_class
        self.session_options = check_session_options(dict(session_options or {}))
        keyring = Keyring([key.get_secret_value() for key in self.settings.secret_keys], self.settings.kms)
        product = backend(self.settings.url.backend)
        engine = product.registry_engine(self.settings.url, self.settings)
        own = self.settings.registry_admin
        self._registry = Registry(engine, engine if own is None else product.registry_engine(own, self.settings), self.settings, keyring)
        self._locator = Locator(self._registry, self.settings)
        self._lookups = Lookups(
            self._registry, self._locator, patience=self.settings.budget.acquire_timeout + self.settings.connect_timeout
        )
        self._engines = Engines(self._locator, self.settings, self._registry.quarantine)
        self._registry.changes.subscribe(self._retire_outdated)
        self._hooks = Hooks()
        self._pinned: Any = pinned(cast("Any", session_class))
        self.tenants = self._registry.tenants
        self.servers = self._registry.servers
        self.users = self._registry.users
        self.memberships = self._registry.memberships
        self.domains = self._registry.domains
        self.revocations = self._registry.revocations
        self.refresh_tokens = self._registry.refresh_tokens
        self.audit = AuditTrail(self._registry, self._lookup_unpaid)

    @classmethod
    def from_env(
        cls, *, session_class: type[Session] = Session, session_options: Mapping[str, Any] | None = None, **overrides: Any
    ) -> TenantDB:
        """Made from ``TENANTDB_*`` variables; see `Settings.from_env`."""
        return cls(Settings.from_env(**overrides), session_class=session_class, session_options=session_options)

    def __repr__(self) -> str:
        return f"TenantDB({str(self.settings.url)!r})"

    # -- data --------------------------------------------------------------------------------------------------------------------------

    def session(self, tenant: TenantKey | None = None, **options: Any) -> Session:
        """A session of the application's class on the tenant's database. It does not commit by itself.

        The tenant is fixed now; it is refused now where its record is in memory, and at the latest when SQL is first sent.
        Raises: `NoTenantBound`, `TenantAlreadyBound`, `InvalidTenantKey`, `TenantNotFound`, `TenantSuspended`, `TenantNotReady`,
        `SubscriptionExpired`.
        """
        return self._session(tenant, None, options)

    def _session(self, tenant: TenantKey | None, execution_options: dict[str, Any] | None, options: dict[str, Any]) -> Session:
        key = self._pin_key(tenant)
        pin = Pin(key, self._lookup_engine, execution_options)
        made: Session = self._pinned(pin=pin, **{**self.session_options, **check_session_options(options)})
        return made

    @contextmanager
    def begin(self, tenant: TenantKey | None = None, **options: Any) -> Iterator[Session]:
        """A session in a transaction that commits when the block ends well, as SQLAlchemy's ``sessionmaker.begin()``."""
        with self._session(tenant, {"tenantdb_begin": "IMMEDIATE"}, options) as session, session.begin():
            yield session

    @contextmanager
    def connect(self, tenant: TenantKey | None = None) -> Iterator[Connection]:
        """A Core connection on the tenant's database. It does not commit by itself."""
        with self.engine(tenant).connect() as connection:
            yield connection

    def engine(self, tenant: TenantKey | None = None) -> Engine:
        """The engine of the tenant as it is now. Ask again for each piece of work: one kept for long outlives its place in the cache."""
        return self._lookup_engine(self._pin_key(tenant))[1]

    def tenant_context(self, tenant: TenantKey, *, switch: bool = False) -> TenantContext:
        """Bind the tenant for a block or, as a decorator, for a function of any kind; ``with ... as tenant`` gives the `Tenant`.

        Raises on entering: what `session` raises; `TenantAlreadyBound` where another tenant is bound, unless ``switch``.
        """
        return TenantContext(tenant_key(tenant), self._lookups, switch=switch)

    def stats(self) -> tuple[BudgetStats, ...]:
        """The connection budget of each database server that this process has used. From any thread; waits for nobody."""
        return self._engines.stats()

    def observe(self, observer: Callable[[Event], R]) -> Callable[[Event], R]:
        """Call ``observer(event)`` with every record of `tenantdb.events`, in the thread or loop where it happens; it must be quick."""
        self._engines.observe(observer)
        return observer

    def listen(self, identifier: str, listener: F) -> F:
        """A SQLAlchemy engine or connection event on every tenant's engine, now and later: ``db.listen("before_cursor_execute", fn)``.

        Tenants' engines share their listeners and come and go, so a listener given to one of them would be everybody's.
        """
        self._engines.listen(identifier, listener)
        return listener

    def resolve(self, tenant: TenantKey) -> Tenant:
        """The tenant, if it may be served. Raises: what `session` raises of a tenant, and `RegistryUnavailable`."""
        return self._lookups.servable(tenant_key(tenant))

    def for_each(
        self, fn: Callable[[Tenant], R], *, state: TenantState | str = TenantState.ACTIVE, concurrency: int = 8
    ) -> ForEachReport[R]:
        """Call ``fn(tenant)`` for every tenant of a state, with the tenant bound, in ``concurrency`` threads.

        One that raises an `Exception` is reported under its slug and does not stop the others.
        """
        return for_each(self._registry, fn, state=state, concurrency=concurrency)

    def _pin_key(self, tenant: TenantKey | None) -> str | UUID:
        if tenant is None:
            return pinned_key(None)  # checked when it was bound, and again when SQL is sent
        key = pinned_key(tenant_key(tenant))
        record = self._registry.peek(key)
        return key if record is None else self._locator.ensure_servable(record.tenant, key).id

    def _lookup_engine(self, key: str | UUID) -> tuple[UUID, Engine]:
        record = self._lookups.record(key)
        return record.tenant.id, self._engines.engine_of(record, key)

    def _lookup_unpaid(self, key: str | UUID) -> tuple[UUID, Engine]:
        """For reading the audit log, which is owed to people that the tenant's subscription is not about."""
        record = self._lookups.record(key)
        return record.tenant.id, self._engines.engine_of(record, key, unpaid=True)

    # -- one tenant's life -------------------------------------------------------------------------------------------------------------

    def provision(
        self,
        slug: str,
        *,
        name: str | None = None,
        owner: User | UUID | NewUser | None = None,
        email: str | None = None,
        phone: str | None = None,
        country: str | None = None,
        plan: str | None = None,
        subscription: Subscription | str = Subscription.TRIAL,
        metadata: Mapping[str, Any] | None = None,
        server: str | None = None,
        region: str | None = None,
        idempotency_key: str | None = None,
        exist_ok: bool = False,
    ) -> Tenant:
        """Make a tenant: registry row, roles, database, grants, migrations, seeds, verification.

        ``owner`` becomes a member with that role; a `NewUser` is made in the same transaction. The same ``idempotency_key`` with the same
        request returns the same tenant; ``exist_ok`` returns whatever has the slug, for scripts. After an error the same call continues
        where it stopped. In a process without a provisioner the tenant comes back in state ``provisioning`` and `work` makes it elsewhere.

        Raises: `InvalidSlug` before any SQL; `TenantExists`, `UserExists`, `InvalidUser`; `RateLimited`, in requests alone;
        `ProvisioningError`, after which the tenant is ``failed`` with its reason.
        """
        return self._provisioner.provision(
            slug,
            owner=owner,
            idempotency_key=idempotency_key,
            exist_ok=exist_ok,
            server=server,
            region=region,
            name=name,
            email=email,
            phone=phone,
            country=country,
            plan=plan,
            subscription=subscription,
            metadata=metadata,
        )

    def suspend(self, tenant: TenantKey) -> Tenant:
        """Stop serving a tenant; its data stays. Its server refuses the runtime role then and ends its sessions: at once, or by a worker
        where this process has no provisioner; ``fence`` of the returned tenant tells. Raises: `IllegalTransition`, `TenantNotFound`.
        """
        return self._lifecycle.suspend(self.tenants.get(tenant))

    def activate(self, tenant: TenantKey) -> Tenant:
        """Serve a tenant again that is suspended or under maintenance. One that its server refuses stays so until a worker has lifted
        that, where this process has no provisioner. Raises: `IllegalTransition`, `TenantNotFound`, `OperationFailed`.
        """
        return self._lifecycle.activate(self.tenants.get(tenant))

    def maintenance(self, tenant: TenantKey) -> Tenant:
        """Stop serving a tenant for a while: requests get 503 and may come again. Raises: `IllegalTransition`, `TenantNotFound`."""
        return self._lifecycle.maintenance(self.tenants.get(tenant))

    def delete(self, tenant: TenantKey) -> Tenant:
        """Stop serving a tenant and keep its data for the setting ``retention``, until ``purge_after``; `restore` takes that back.

        Its server lets nobody in then, as `suspend` says. Raises: `IllegalTransition`, `TenantNotFound`.
        """
        return self._lifecycle.delete(self.tenants.get(tenant))

    def restore(self, tenant: TenantKey) -> Tenant:
        """Serve a deleted tenant again, as long as its retention lasts.

        Raises: `IllegalTransition`, `TenantNotFound`, `OperationFailed`.
        """
        return self._lifecycle.restore(self.tenants.get(tenant))

    def purge(self, tenant: TenantKey, *, confirm: str, immediately: bool = False) -> Tenant:
        """Erase a deleted tenant for ever: database, roles, secrets, memberships, and what the registry knows of it. ``confirm`` is its
        slug once more. Before its retention has ended only ``immediately``.

        What is left is a tombstone with a certificate (``db.tenants.certificate(id)``); the slug is free again and the id never. Without a
        provisioner a worker does it. Raises: `PurgeRefused`, also under a legal hold; `IllegalTransition`, `TenantNotFound`,
        `OperationFailed`, after which it goes on by itself.
        """
        return self._lifecycle.purge(self.tenants.get(tenant), confirm=confirm, immediately=immediately)

    def adopt(
        self,
        slug: str,
        *,
        database: str,
        owner_url: str | URL | None = None,
        server: str | None = None,
        revision: str | None = None,
        name: str | None = None,
        owner: User | UUID | NewUser | None = None,
        email: str | None = None,
        phone: str | None = None,
        country: str | None = None,
        plan: str | None = None,
        subscription: Subscription | str = Subscription.TRIAL,
        metadata: Mapping[str, Any] | None = None,
    ) -> Tenant:
        """Make a tenant of a database that somebody else made, with all that is in it. It keeps its name; what is in it gets the tenant's
        own roles, and whoever used it till now is shut out and his sessions end, so stop serving it first. It is not migrated: `migrations`
        does that. On SQLite ``database`` is a file, which is copied.

        ``owner_url``: a login that owns the database, or a superuser's, which does more by itself; used in this call, kept nowhere. Without
        an ``alembic_version`` in it ``revision`` says where its schema is, and is stamped. The rest is as in `provision`.

        Everything that speaks against it is told before anything is changed, and it changes hands in one transaction. After an error or a
        crash the same call continues, and once it has changed hands `resume` too. `give_back` is the way back. Raises: `AdoptRefused`,
        `TenantExists`, `InvalidSlug`; `ConfigError` in a process without a provisioner, and where ``server`` must be named;
        `ServerUnavailable`; `ProvisioningError`, after which the tenant is ``failed``.
        """
        return self._adoption.adopt(
            slug,
            database=database,
            owner_url=owner_url,
            server=server,
            revision=revision,
            owner=owner,
            name=name,
            email=email,
            phone=phone,
            country=country,
            plan=plan,
            subscription=subscription,
            metadata=metadata,
        )

    def give_back(self, tenant: TenantKey, *, confirm: str, owner_url: str | URL | None = None) -> Tenant:
        """Give the database of an adopted tenant, which is deleted, back to the role that owned it, with all rows and tables of today, and
        forget the tenant. ``confirm`` is its slug once more. On SQLite the file is copied to NAME.given-back beside the one that was
        adopted.

        What is tenantdb's own in it goes: its roles, and the schema ``tenantdb`` with the audit log of the tenant's records, so export that
        first. PUBLIC has again what it had. ``owner_url`` is a superuser's login where a superuser's was given to `adopt`. What is left is
        a tombstone with a certificate. After a crash the same call continues.

        Raises: `AdoptRefused`, also under a legal hold; `IllegalTransition` where it is not deleted; `TenantNotFound`, `OperationFailed`.
        """
        return self._adoption.give_back(self.tenants.get(tenant), confirm=confirm, owner_url=owner_url)

    def hold(self, tenant: TenantKey, reason: str) -> Tenant:
        """Put a legal hold on a tenant: it cannot be purged until `release`. For the login that owns the registry."""
        return self.tenants.hold(self.tenants.get(tenant), reason)

    def release(self, tenant: TenantKey) -> Tenant:
        """End a legal hold."""
        return self.tenants.hold(self.tenants.get(tenant), None)

    def rotate_credentials(self, tenant: TenantKey) -> Tenant:
        """Give a tenant's database roles new passwords, under traffic: no request fails, and the old passwords are refused.

        Sessions that are open finish their work; what is still there after the setting ``drain_timeout`` is ended. Raises:
        `IllegalTransition`, `TenantNotFound`, `ConfigError` on SQLite, `OperationFailed`, after which it goes on by itself.
        """
        return self._lifecycle.rotate_credentials(self.tenants.get(tenant))

    def export(
        self,
        tenant: TenantKey,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> Export:
        """Write a tenant's whole database into one file: a tar of a ``pg_dump`` archive, or of the SQLite file, and a manifest of hashes.

        As the owner role, of one moment, while the tenant is served. Nothing of tenantdb's own and no secret is in it; it gets its name,
        with mode 0600, when it is whole. ``progress(done, total)`` counts bytes, of about so many.

        Raises: `ExportError`: no file was left; `ToolNotFound`; `TenantNotFound`, `ServerUnavailable`, `RegistryUnavailable`.
        """
        return self._transfer.export(self.tenants.get(tenant), path, overwrite=overwrite, progress=progress)

    def import_(
        self,
        slug: str,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        owner: User | UUID | NewUser | None = None,
        email: str | None = None,
        phone: str | None = None,
        country: str | None = None,
        plan: str | None = None,
        subscription: Subscription | str = Subscription.TRIAL,
        metadata: Mapping[str, Any] | None = None,
        server: str | None = None,
        region: str | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> Tenant:
        """Make a new tenant whose database is filled from a file of `export`, and migrated to head. Seeds do not run.

        The file is verified first, and loaded by the new owner role, so that whatever is in it can do nothing outside the new database.
        After an error the same call goes on where it stopped; what was interrupted `resume` finishes, where the file still is.

        Raises: `ImportRefused` before anything is made: damaged, unknown revision, of a tenant that was purged here; `ConfigError` in a
        process without a provisioner; what `provision` raises; `ProvisioningError`, after which the tenant is ``failed``.
        """
        return self._transfer.import_(
            slug,
            path,
            owner=owner,
            server=server,
            region=region,
            progress=progress,
            name=name,
            email=email,
            phone=phone,
            country=country,
            plan=plan,
            subscription=subscription,
            metadata=metadata,
        )

    def clone(
        self,
        tenant: TenantKey,
        slug: str,
        *,
        neutralised: bool = True,
        name: str | None = None,
        owner: User | UUID | NewUser | None = None,
        email: str | None = None,
        phone: str | None = None,
        country: str | None = None,
        plan: str | None = None,
        subscription: Subscription | str = Subscription.TRIAL,
        metadata: Mapping[str, Any] | None = None,
        server: str | None = None,
        region: str | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> Tenant:
        """Make a new tenant with a copy of another's data, for staging or a trial of an upgrade. Nothing of its record is copied.

        Before it is served, every function of `neutralise` runs on the copy; ``neutralised=False`` leaves the data as it is.

        Raises: `ConfigError` where no function is registered; what `export` and `import_` raise.
        """
        return self._transfer.clone(
            self.tenants.get(tenant),
            slug,
            neutralised=neutralised,
            owner=owner,
            server=server,
            region=region,
            progress=progress,
            name=name,
            email=email,
            phone=phone,
            country=country,
            plan=plan,
            subscription=subscription,
            metadata=metadata,
        )

    def export_rows(
        self,
        tenant: TenantKey,
        folder: str | os.PathLike[str],
        *,
        tables: Sequence[str] | None = None,
        format: str = "jsonl",
        overwrite: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> ExportedRows:
        """Write a tenant's rows into a new folder as JSON Lines, a file for each table, with ``schema.json`` and a manifest of hashes.

        In one transaction that only reads, as the runtime role, in constant memory. Without loss: decimals are strings, bytes base64,
        times ISO 8601. ``format="csv"`` is for spreadsheets, loses types, and makes formulas harmless. ``progress`` counts tables.

        Raises: `ExportError`: no folder was left; `ConfigError` for a table that is not there; `TenantNotFound`, `ServerUnavailable`.
        """
        return self._transfer.export_rows(
            self.tenants.get(tenant), folder, tables=tables, format=format, overwrite=overwrite, progress=progress
        )

    def update(self, tenant: TenantKey, **changes: Any) -> Tenant:
        """Change name, email, phone, country, plan, subscription, subscription_expires_at or metadata; None clears what may be empty.

        Raises: `TypeError` for another field, `TenantNotFound`.
        """
        return self._lifecycle.update(self.tenants.get(tenant), changes)

    def work(self, *, stop: threading.Event | None = None, poll: float = 1.0) -> int:
        """Carry out what other processes left in the journal, and return how many operations were done.

        Without ``stop`` it ends when nothing is left; with it, it looks every ``poll`` seconds until the event is set. An operation that
        fails is recorded and logged, and the next one is taken. Raises: `ConfigError` where this process has no provisioner.
        """
        return self._worker.work(stop=stop, poll=poll)

    def operation(self, tenant: TenantKey) -> Operation | None:
        """What is being done to a tenant, or was done last: kind, state, step, and why its last attempt failed.

        Raises: `TenantNotFound`.
        """
        return self._registry.operations.for_tenant(self.tenants.get(tenant).id)

    def resume(self) -> Resumed:
        """Finish what was interrupted: operations whose worker died, that wait, or that are to be tried again. Then compare the registry
        with what is on each server of this process and report what has lost its other half; nothing of that is dropped.

        Provisioning that failed with an error is left for whoever asks for it again. May run any number of times, also beside workers.
        """
        return self._worker.resume()

    @overload
    def seed(self, fn: F) -> F: ...
    @overload
    def seed(self, *, static: bool) -> Callable[[F], F]: ...
    def seed(self, fn: F | None = None, *, static: bool = False) -> F | Callable[[F], F]:
        """Register ``fn(session, tenant)``, which writes first rows as the runtime role; all seeds share one transaction.

        ``@db.seed(static=True)``: ``fn(session)``, for rows that are the same for every tenant. With migrations it writes them into the
        golden database, as the role that owns the schema there, and every tenant is made with a copy; it must depend on nothing but its
        own code, by whose change another golden database is built.

        A seed may run again, also after it was committed: when the process dies before the journal says so.
        """
        if fn is None:
            return functools.partial(self._hooks.seed, static=static)
        return self._hooks.seed(fn, static=static)

    def neutralise(self, fn: F) -> F:
        """Register ``fn(session, tenant)``, which takes from a clone's data what must not act for the original: addresses that get mail,
        webhooks, tokens. As the runtime role, all in one transaction, before the clone is served; it may run again."""
        return self._hooks.neutralise(fn)

    def on(self, event: str) -> Callable[[F], F]:
        """Register ``fn(tenant)`` for an event such as ``after_activate``. Raises: `ConfigError` for an event that does not exist."""
        return self._hooks.on(event)

    # -- the installation --------------------------------------------------------------------------------------------------------------

    def init(self) -> None:
        """Make or upgrade the registry's tables, and register the servers of the settings that it does not know. May run any number of
        times. Raises: `RegistryUnavailable`, `RegistryOutOfRange`, `SecretKeyError`, `HardeningFailed`.
        """
        backend(self.settings.url.backend).prepare_registry(self.settings.admin_url)
        self._registry.init()
        known = {server.name for server in self.servers.list()}
        for name, url in self.settings.provisioners.items():
            if name not in known:
                self.servers.add(name, backend=url.backend, host=url.host, port=url.port, path=url.path and os.path.abspath(url.path))

    def watch(self) -> None:
        """Follow what other processes do to the registry: by notices on PostgreSQL, within milliseconds, and everywhere by comparing what
        is in use every ``cache_ttl / 3`` seconds, after which no request looks up what it knows.

        Starts one thread, and on PostgreSQL one connection to the registry, until `close`; while they run a call costs nothing. After a
        fork the next call starts them in the child. Never waits for the registry, and raises nothing when it is out of reach.
        """
        self._registry.watch()

    def _retire_outdated(self, change: Change) -> None:
        if change.tenant_id is not None and change.generation is not None:
            self._engines.forget(change.tenant_id, before=change.generation)

    def ping(self) -> None:
        """Ask the registry one question. Raises: `RegistryError` and its kin, `SecretKeyError` where the keys are not the registry's."""
        self._registry.ping()

    def _compare_at_start(self) -> None:
        """Where this process has a provisioner: compare the budget with what the servers have. Raises: `ConfigError` if it is strict."""
        from tenantdb.provisioning.check import compare_at_start

        compare_at_start(self._registry, self.settings)

    def check(self) -> list[Finding]:
        """Look at settings, keys, registry, servers and rights, and change nothing. Problems come first; an empty list: all is well."""
        from tenantdb.provisioning.check import check

        return check(self._registry, self.settings)

    def doctor(self, *, repair: bool = False, server: str | None = None, tenant: TenantKey | None = None) -> list[DoctorFinding]:
        """Look at what was built: every server, every tenant's database and its passwords, or one ``server`` or ``tenant`` alone.

        Problems come first; an empty list: all is well. ``repair`` mends what can harm nobody and says which, never drops data, roles,
        extensions or functions, and may run any number of times; the rest is told with how to mend it. Each run is in the audit log.
        What could not be looked at is a finding too. Raises: `ConfigError` where this process has no provisioner; `RegistryUnavailable`,
        `TenantNotFound`, `NoServerAvailable`.
        """
        from tenantdb.provisioning.doctor import doctor

        chosen = None if tenant is None else self.tenants.get(tenant)
        return doctor(self._registry, self._engines, self.settings, repair=repair, server=server, tenant=chosen)

    @functools.cached_property
    def migrations(self) -> FleetMigrations:
        """The tenants' schema: rollouts over all of them, where everyone is, and upgrading one tenant."""
        from tenantdb.fleet.migrations import FleetMigrations

        return FleetMigrations(
            self._registry,
            self._engines,
            self.settings,
            hooks=self._hooks,
            spares=lambda: self.spares,
            prepare=self._prepare_templates,
        )

    def _prepare_templates(self) -> None:
        self._runner.prepare_templates()

    @functools.cached_property
    def spares(self) -> Spares:
        """Databases that are ready for whoever signs up next: list, fill, refresh, drain."""
        from tenantdb.provisioning.spares import Spares

        return Spares(self._runner)

    @functools.cached_property
    def _runner(self) -> Runner:
        from tenantdb.provisioning.golden import Golden
        from tenantdb.provisioning.procedures import Runner
        from tenantdb.provisioning.work import Shop

        golden = Golden(self._registry, self.settings, self._hooks, self.session_class)
        return Runner(Shop(self._registry, self.settings, self._engines, self._hooks, golden, self.session_class))

    @functools.cached_property
    def _lifecycle(self) -> Lifecycle:
        from tenantdb.provisioning.lifecycle import Lifecycle

        return Lifecycle(self._runner)

    @functools.cached_property
    def _provisioner(self) -> Provisioner:
        from tenantdb.provisioning.provisioner import Provisioner

        return Provisioner(self._runner, self.spares)

    @functools.cached_property
    def _transfer(self) -> Transfer:
        from tenantdb.provisioning.transfer import Transfer

        return Transfer(self._runner)

    @functools.cached_property
    def _adoption(self) -> Adoption:
        from tenantdb.provisioning.adoption import Adoption

        return Adoption(self._runner)

    @functools.cached_property
    def _worker(self) -> Worker:
        from tenantdb.provisioning.worker import Worker

        return Worker(self._runner, self.spares)

    def rotate_keys(self, *, progress: Callable[[int, int], object] | None = None) -> KeyRotation:
        """Seal every secret of the registry anew with the newest of the secret keys, while all processes go on; each of them has both keys.

        It may be killed at any point and run again, also twice at once. A secret that does not open is reported under its tenant and left
        as it is; the others go on. ``progress(done, total)`` counts the registry's rows. Then `keys_in_use` tells whether a key may go.

        Raises: `SecretKeyError` where a root key is missing; `KeyServiceUnavailable`, `RegistryUnavailable`, `RegistryError`: what was done
        till then stays.
        """
        return self._registry.keys.rotate(progress)

    def keys_in_use(self) -> tuple[KeyUse, ...]:
        """Which keys the registry's secrets are sealed with. One that is not here, and not in a backup that you mean to restore, may go.

        Raises: `RegistryUnavailable`; `RegistryError` where this process lacks the login that owns the registry.
        """
        return self._registry.keys.in_use()

    def close(self) -> None:
        """Close idle connections and threads; leased connections close when they come back. May be called twice."""
        self._engines.close()
        self._lookups.close()
        self._registry.close()

    def __enter__(self) -> TenantDB:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
