"""How every connection to PostgreSQL is opened: its arguments, its password, its errors.

The arguments are fixed here and nowhere else. Start-up options win over what a role has set for itself (``ALTER ROLE self SET ...``), so a
tenant cannot switch its own limits off for the next session.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tenantdb.backends.base import FailureClass, milliseconds
from tenantdb.errors import ConfigError, ServerUnavailable, WrongDatabase
from tenantdb.model import DatabaseRole, Tenant
from tenantdb.settings import ConnectionURL, Settings, is_local

try:
    import psycopg
except ImportError as error:
    raise ConfigError("PostgreSQL needs psycopg: pip install 'tenantdb[postgresql]'") from error

_LIBPQ_16 = 160000
# A network that goes silent, such as a firewall that has forgotten a connection, holds for two hours whoever waits for an answer, and for
# a quarter of one whoever sends: so Linux has it. No timeout of PostgreSQL ends that. libpq passes these over on a Unix socket.
_SILENCE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 30_000}  # the last in ms


def transport(host: str | None, settings: Settings, tls: Mapping[str, str] | None = None) -> dict[str, Any]:
    """libpq's arguments about how the connection is protected, how long connecting may take, and how long the network may be silent.

    Off this machine: ``verify-full`` and SCRAM, so that neither a false server nor a listener gets a password or a row.
    """
    arguments: dict[str, Any] = {"connect_timeout": settings.connect_timeout, "application_name": f"tenantdb/{os.getpid()}", **_SILENCE}
    if not is_local(host) and not settings.insecure_transport:
        if psycopg.pq.version() < _LIBPQ_16:
            raise ConfigError("libpq is older than 16 and cannot insist on SCRAM (require_auth): pip install 'psycopg[binary]'")
        arguments |= {"sslmode": "verify-full", "sslrootcert": settings.ssl_root_cert, "require_auth": "scram-sha-256"}
    return arguments | dict(tls or {})


def session_options(role: DatabaseRole | None, settings: Settings, *, read_only: bool = False) -> dict[str, str]:
    """The ``options`` argument: limits of a session, in milliseconds as PostgreSQL counts them."""
    limits = {"lock_timeout": settings.lock_timeout, "idle_in_transaction_session_timeout": settings.idle_in_transaction_timeout}
    if role is not DatabaseRole.OWNER:  # a migration may take long; what it must not do is wait long for a lock
        limits["statement_timeout"] = settings.statement_timeout
    words = [f"-c {name}={milliseconds(seconds)}" for name, seconds in limits.items()]
    if role is not None:
        words += ["-c search_path=public", f"-c default_transaction_read_only={'on' if read_only else 'off'}"]
    return {"options": " ".join(words)}


def check_login(info: psycopg.ConnectionInfo, tenant: Tenant, role: str | None) -> None:
    """By what the server has said while it let us in: the session is the role's, and no superuser's. Raises: `WrongDatabase`."""
    if info.parameter_status("is_superuser") != "off":
        raise WrongDatabase(tenant.slug, "the login is a superuser")
    if info.parameter_status("session_authorization") != role:
        raise WrongDatabase(tenant.slug, "the session runs as another role")


def provisioner_connection(
    url: ConnectionURL,
    settings: Settings,
    server: str,
    *,
    database: str | None = None,
    autocommit: bool = True,
    options: str | None = None,
) -> psycopg.Connection[Any]:
    """A connection as the provisioner, or as a superuser for bootstrapping. Raises: `ServerUnavailable`."""
    try:
        return psycopg.connect(
            host=url.host,
            port=url.port,
            user=url.username,
            dbname=database or url.database or "postgres",
            autocommit=autocommit,
            options=options,
            **transport(url.host, settings, url.tls),
            **password_argument(url),
        )
    except psycopg.OperationalError as error:
        raise ServerUnavailable(server, connect_problem(error)) from without_frames(error)


def password_argument(url: ConnectionURL) -> dict[str, Any]:
    """For the call itself, never for a variable: tools that report errors show the variables of every frame."""
    return {} if url.password is None else {"password": url.password.get_secret_value()}


def without_frames(error: Exception) -> Exception:
    """The driver's error without its frames, in which the password stands as an argument."""
    return error.with_traceback(None)


def is_refused_password(error: Exception) -> bool:
    """Whether the server was reached and the password was the wrong one."""
    return _PASSWORD_REFUSED in str(error)


_PASSWORD_REFUSED = "password authentication failed"
_SERVER, _CAPACITY, _TENANT = FailureClass.SERVER, FailureClass.CAPACITY, FailureClass.TENANT
_PROBLEMS = (
    (_PASSWORD_REFUSED, "the login was refused: wrong password", _TENANT),
    ("no password supplied", "the login was refused: no password was given", _TENANT),
    ("authentication method requirement", "it does not ask for a SCRAM password, as require_auth demands", _SERVER),
    ("is not permitted to log in", "the role may not log in", _TENANT),
    ("too many connections for role", "the role has reached its connection limit", _CAPACITY),
    ("too many connections for database", "the database has reached its connection limit", _CAPACITY),
    ("too many clients", "it has reached max_connections", _CAPACITY),
    ("remaining connection slots are reserved", "it has reached max_connections", _CAPACITY),
    ("is not currently accepting connections", "the database does not accept connections", _TENANT),
    ("does not exist", "the database or role does not exist", _TENANT),
    ("permission denied for database", "the role may not enter the database", _TENANT),
    ("no pg_hba.conf entry", "pg_hba.conf does not admit this login", _TENANT),
    ("certificate verify failed", "its certificate is not signed by a trusted authority", _SERVER),
    ("does not match host name", "its certificate is for another host", _SERVER),
    ("root certificate file", "the file of trusted authorities (ssl_root_cert) cannot be read", _SERVER),
    ("does not support SSL", "it does not offer TLS", _SERVER),
    ("starting up", "it is starting up", _SERVER),
    ("shutting down", "it is shutting down", _SERVER),
    ("Connection refused", "nothing listens there", _SERVER),
    ("timeout", "it did not answer in time", _SERVER),
    ("could not translate host name", "its host name is unknown", _SERVER),
    ("failed to resolve host", "its host name is unknown", _SERVER),
)
_UNKNOWN = ("", "the connection failed for a reason named in the log of the server", _SERVER)


def connect_problem(error: Exception) -> str:
    """Why a connect failed, in words of ours. psycopg gives no SQLSTATE for errors at connect, so libpq's text is all there is."""
    return _known(error)[1]


def connect_failure(error: Exception) -> FailureClass:
    """Whose fault it is. A text that is not known, perhaps of a server that speaks another language, is the server's."""
    return _known(error)[2]


def _known(error: Exception) -> tuple[str, str, FailureClass]:
    text = str(error)
    return next((problem for problem in _PROBLEMS if problem[0] in text), _UNKNOWN)
