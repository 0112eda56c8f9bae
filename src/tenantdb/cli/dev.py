"""A PostgreSQL for development, set up as production should be: two registry logins, a provisioner that is no superuser, a key.

The folder keeps the cluster, the key and the passwords for the next start. Only the port changes, so the registry is told the new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tenantdb.database import TenantDB
from tenantdb.errors import ConfigError
from tenantdb.registry.secrets import generate_key, password
from tenantdb.settings import ConnectionURL
from tenantdb.testing.postgres import EmbeddedServer

_SECRETS = "secrets.json"
_DATABASE = "central"
_APP, _ADMIN, _PROVISIONER = "tenantdb_app", "tenantdb_admin", "tenantdb_provisioner"
_SERVER = "default"  # as Settings name the one of ``server``


@dataclass(frozen=True)
class _Secrets:
    key: str = field(default_factory=generate_key, repr=False)
    app: str = field(default_factory=password, repr=False)
    admin: str = field(default_factory=password, repr=False)
    provisioner: str = field(default_factory=password, repr=False)


@contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """The server while the block runs; gives the environment that an application needs.

    Raises: `ConfigError` for a folder that cannot be used or a missing wheel; `ServerStartFailed`, also where it runs already.
    """
    secrets = _secrets(folder)
    with EmbeddedServer(data=folder) as server:
        environment = {
            "TENANTDB_URL": server.url(_APP, secrets.app, _DATABASE),
            "TENANTDB_REGISTRY_ADMIN": server.url(_ADMIN, secrets.admin, _DATABASE),
            "TENANTDB_SERVER": server.url(_PROVISIONER, secrets.provisioner),
            "TENANTDB_SECRET_KEYS": secrets.key,
        }
        db = TenantDB(
            environment["TENANTDB_URL"],
            registry_admin=environment["TENANTDB_REGISTRY_ADMIN"],
            server=environment["TENANTDB_SERVER"],
            secret_keys=[secrets.key],
        )
        with closing(db):
            _prepare(ConnectionURL.parse(server.url()), db, secrets)
        yield environment


def _prepare(superuser: ConnectionURL, db: TenantDB, secrets: _Secrets) -> None:
    """Bring cluster and registry to where an application can start. Nothing here minds to be done again."""
    from tenantdb.backends.postgresql.bootstrap import bootstrap

    bootstrap(superuser, _PROVISIONER, secrets.provisioner, db.settings, iterations=db.settings.scram_iterations)
    _make_registry_database(superuser, db, secrets)
    db.init()
    server = db.servers.get(_SERVER)
    if server.port != superuser.port:
        db.servers.add(
            _SERVER,
            backend=server.backend,
            host=superuser.host,
            port=superuser.port,
            region=server.region,
            capacity=server.capacity,
            extensions=server.extensions,
            schemas=server.schemas,
        )


def _make_registry_database(superuser: ConnectionURL, db: TenantDB, secrets: _Secrets) -> None:
    from psycopg import sql

    from tenantdb.backends.postgresql import scram
    from tenantdb.backends.postgresql.connect import provisioner_connection

    with provisioner_connection(superuser, db.settings, "dev") as connection:
        for login, secret in ((_APP, secrets.app), (_ADMIN, secrets.admin)):
            role = sql.Identifier(login)
            if not connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [login]).fetchone():
                connection.execute(sql.SQL("CREATE ROLE {}").format(role))
            connection.execute(sql.SQL("ALTER ROLE {} LOGIN PASSWORD {}").format(role, sql.Literal(scram.verifier(secret))))
        database = sql.Identifier(_DATABASE)
        if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [_DATABASE]).fetchone():
            connection.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(database, sql.Identifier(_ADMIN)))
        connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(database))
        connection.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO {}").format(database, sql.Identifier(_APP)))


def _secrets(folder: Path) -> _Secrets:
    """Those of an earlier start, or new ones. The file is whole or absent, and only ours to read."""
    path = folder / _SECRETS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n")
        if path.exists():
            return _Secrets(**json.loads(path.read_text()))
        made = _Secrets()
        new = path.with_suffix(".new")
        new.unlink(missing_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(asdict(made), file)
        new.replace(path)
    except OSError as error:
        raise ConfigError(f"the folder {str(folder)!r} cannot be used: {error.strerror}") from error
    except (ValueError, TypeError):
        raise ConfigError(f"{str(path)!r} is damaged. Remove the folder to begin anew; what is in it is lost then") from None
    return made
