"""What a superuser does once per cluster, so that nobody needs to be one afterwards.

It shuts PUBLIC out of ``postgres`` and ``template1``, makes a provisioner that may create databases and roles and nothing else, and a
template in which the doors that a tenant could use against its neighbours are closed: advisory locks (one session can fill the cluster's
shared lock table), large objects, PL/pgSQL for PUBLIC. All of it may run again. The same SQL is executed or printed.
"""

from __future__ import annotations

from psycopg import sql

from tenantdb.backends.postgresql import scram
from tenantdb.backends.postgresql.connect import provisioner_connection
from tenantdb.errors import ConfigError
from tenantdb.settings import ConnectionURL, Settings

TEMPLATE = "tenantdb_tpl"
OWNER_CONNECTIONS = 4  # of a tenant's owner role: a migrator, a seed, a rotation, one lingering
OWNER_GROUP = "tenantdb_owner"

DOORS = """(proname ~ '^pg_(try_)?advisory_(xact_)?lock'
               OR proname IN ('lo_create', 'lo_creat', 'lo_from_bytea', 'lo_put', 'lowrite', 'lo_open', 'lo_import'))"""
"""The functions of ``pg_catalog`` that PUBLIC loses: a condition on ``pg_proc``."""

_CLUSTER = """
DO $bootstrap$
BEGIN
    IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
        RAISE EXCEPTION 'bootstrap-server needs a superuser';
    END IF;
    IF EXISTS (SELECT 1 FROM pg_roles WHERE rolname = {provisioner_text} AND rolsuper) THEN
        RAISE EXCEPTION 'the provisioner must not be a superuser; name another login';
    END IF;
    IF NOT EXISTS (SELECT 1 FROM pg_roles WHERE rolname = {provisioner_text}) THEN
        CREATE ROLE {provisioner};
    END IF;
    IF NOT EXISTS (SELECT 1 FROM pg_roles WHERE rolname = {group_text}) THEN
        CREATE ROLE {group} NOLOGIN;
    END IF;
    IF current_setting('server_version_num')::int >= 160000 THEN
        EXECUTE {grant_16};
    ELSE
        GRANT {group} TO {provisioner} WITH ADMIN OPTION;
    END IF;
END
$bootstrap$;
REVOKE CONNECT, TEMPORARY ON DATABASE postgres, template1 FROM PUBLIC;
ALTER ROLE {provisioner} LOGIN NOSUPERUSER CREATEDB CREATEROLE NOREPLICATION NOBYPASSRLS INHERIT CONNECTION LIMIT 10 PASSWORD {verifier};
GRANT CONNECT ON DATABASE postgres TO {provisioner};
GRANT pg_signal_backend TO {provisioner};
GRANT SET ON PARAMETER temp_file_limit TO {provisioner};
"""

_TEMPLATE = f"""
REVOKE ALL ON DATABASE {{template}} FROM PUBLIC;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
REVOKE USAGE ON LANGUAGE plpgsql FROM PUBLIC;
GRANT USAGE ON LANGUAGE plpgsql TO {{group}};
DO $template$
DECLARE
    door regprocedure;
BEGIN
    FOR door IN
        SELECT oid FROM pg_proc
        WHERE pronamespace = 'pg_catalog'::regnamespace
          AND {DOORS}
    LOOP
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', door);
    END LOOP;
END
$template$;
"""


def bootstrap(superuser: ConnectionURL, provisioner: str, password: str, settings: Settings, *, iterations: int = scram.ITERATIONS) -> None:
    """Prepare a cluster. ``provisioner`` is the name of the login to make or to bring in order. May run any number of times.

    ``iterations`` of its SCRAM verifier: few will do where the password was drawn by a machine (`tenantdb.registry.secrets.password`).

    Raises: `ServerUnavailable`; `ConfigError` where the given login is no superuser, or the provisioner is one.
    """
    with provisioner_connection(superuser, settings, "bootstrap") as connection:
        if connection.info.parameter_status("is_superuser") != "on":
            raise ConfigError("bootstrap-server needs a superuser's URL; on a managed server use hardening='managed' instead")
        if connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s AND rolsuper", [provisioner]).fetchone():
            raise ConfigError(f"the provisioner {provisioner!r} is a superuser; give server= another login, which bootstrap-server makes")
        connection.execute(_fill(_CLUSTER, provisioner, password, iterations))
        template = sql.Identifier(TEMPLATE)
        if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [TEMPLATE]).fetchone():
            connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0 IS_TEMPLATE true").format(template))
        connection.execute(sql.SQL("ALTER DATABASE {} IS_TEMPLATE true ALLOW_CONNECTIONS true").format(template))
        try:
            with provisioner_connection(superuser, settings, "bootstrap", database=TEMPLATE) as inside:
                inside.execute(_fill(_TEMPLATE, provisioner, password, iterations))
        finally:
            connection.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(template))


def script(provisioner: str, password: str, *, iterations: int = scram.ITERATIONS) -> str:
    """The same as a script for psql, for those who let nobody else near a superuser. It holds a verifier, no password."""
    create = f"SELECT 'CREATE DATABASE {TEMPLATE} TEMPLATE template0 IS_TEMPLATE true'"
    return "\n".join(
        [
            "-- As a superuser: psql -v ON_ERROR_STOP=1 -d postgres -f FILE. It may run again.",
            _fill(_CLUSTER, provisioner, password, iterations).as_string(None),
            f"{create} WHERE NOT EXISTS (SELECT 1 FROM pg_database WHERE datname = '{TEMPLATE}') \\gexec",
            f"ALTER DATABASE {TEMPLATE} IS_TEMPLATE true ALLOW_CONNECTIONS true;",
            f"\\c {TEMPLATE}",
            _fill(_TEMPLATE, provisioner, password, iterations).as_string(None),
            "\\c postgres",
            f"ALTER DATABASE {TEMPLATE} ALLOW_CONNECTIONS false;",
            "",
        ]
    )


def _fill(text: str, provisioner: str, password: str, iterations: int) -> sql.Composed:
    role, group = sql.Identifier(provisioner), sql.Identifier(OWNER_GROUP)
    grant_16 = sql.SQL("GRANT {} TO {} WITH ADMIN TRUE, INHERIT FALSE, SET FALSE").format(group, role).as_string(None)
    return sql.SQL(text).format(
        provisioner=role,
        provisioner_text=sql.Literal(provisioner),
        group=group,
        group_text=sql.Literal(OWNER_GROUP),
        grant_16=sql.Literal(grant_16),
        template=sql.Identifier(TEMPLATE),
        verifier=sql.Literal(scram.verifier(password, iterations=iterations)),
    )
