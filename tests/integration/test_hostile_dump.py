"""What a file can do to the server that it is imported into: nothing that its tenant's owner role may not do.

Each abuse stands in an archive whose hashes fit, in the place of a comment. That it is refused shows little unless it would have worked, so
each has its twin: the same archive, loaded by a superuser.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from tenantdb import Tenant, TenantDB, TenantState, errors
from tenantdb.backends.postgresql import tools
from tenantdb.registry.secrets import Keyring
from tenantdb.settings import Settings
from tests.integration.cluster import KEY, PROVISIONER, Cluster, Scripts, ask
from tests.world import eventually

ROOM = 700
PLACEHOLDER = "P" * ROOM
COMMENT = f"COMMENT ON TABLE public.notes IS '{PLACEHOLDER}';\n"


@dataclass(frozen=True)
class Town:
    """An application, a tenant with three notes and a comment, and its export."""

    cluster: Cluster
    registry: str
    scripts: Scripts
    db: TenantDB
    acme: Tenant
    export: Path

    @property
    def arguments(self) -> dict[str, Any]:
        """For another process."""
        mine = {"migrations": str(self.scripts), "hardening": self.db.settings.hardening, "secret_keys": [KEY]}
        return {**self.cluster.tenantdb_arguments(self.registry), **mine}

    def hostile(self, statement: str) -> Path:
        """The export with a statement where the comment was, and hashes that fit."""
        assert len(statement) + 4 < ROOM
        with tarfile.open(self.export) as tar:
            content = {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]
        data, told = content["data.dump"], json.loads(content["manifest.json"])
        assert data.count(COMMENT.encode()) == 1
        planted = f"{statement}; --".ljust(len(COMMENT) - 1, "-") + "\n"
        data = data.replace(COMMENT.encode(), planted.encode())
        told["members"]["data.dump"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        path = self.export.with_name(f"{secrets.token_hex(4)}.tar")
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for name, each in (("data.dump", data), ("manifest.json", json.dumps(told).encode())):
                header = tarfile.TarInfo(name)
                header.size = len(each)
                tar.addfile(header, io.BytesIO(each))
        return path

    def load_as_superuser(self, path: Path) -> subprocess.CompletedProcess[str]:
        """What an administrator does with a dump: `pg_restore` as ``postgres`` into a new database, which is dropped again."""
        database = f"t_{secrets.token_hex(8)}"
        self.cluster.sql(f"CREATE DATABASE {database} TEMPLATE template0")
        try:
            self.cluster.sql("CREATE SCHEMA tenantdb", database=database)
            self.cluster.sql("CREATE TABLE tenantdb.identity (tenant_id uuid, stamped_at timestamptz)", database=database)
            with tarfile.open(path) as tar:
                data = tar.extractfile("data.dump").read()  # type: ignore[union-attr]
            tool = tools.find(tools.RESTORE, Settings(url="sqlite:///unused"), least=self.cluster.version // 10000)
            command = [
                str(tool.path),
                "--exit-on-error",
                "--no-owner",
                "--no-acl",
                f"--dbname={self.cluster.server.url(database=database)}",
            ]
            done = subprocess.run(command, input=data, capture_output=True, check=False)
            return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())
        finally:
            self.cluster.sql(f"DROP DATABASE {database} WITH (FORCE)")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("cluster", "full"), id="full"),
        pytest.param(("cluster", "managed"), id="managed", marks=pytest.mark.long),
        pytest.param(("debian_cluster", "full"), id="full-distribution", marks=pytest.mark.services),
    ],
)
def town(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    kind, hardening = request.param
    cluster: Cluster = request.getfixturevalue(kind)
    folder = tmp_path_factory.mktemp("town")
    scripts = Scripts(folder / "migrations")
    scripts.add(
        "001",
        "CREATE TABLE notes (id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY, line text NOT NULL UNIQUE)",
        f"COMMENT ON TABLE notes IS '{PLACEHOLDER}'",
    )
    registry = cluster.new_registry()
    with cluster.tenantdb(registry, migrations=str(scripts), hardening=hardening) as db:
        acme = db.provision("acme")
        with db.begin(acme) as session:
            session.execute(text("INSERT INTO notes (line) VALUES ('one'), ('two'), ('three')"))
        db.export(acme, folder / "acme.tar")
        yield Town(cluster, registry, scripts, db, acme, folder / "acme.tar")


@pytest.fixture
def slug() -> str:
    return f"in-{secrets.token_hex(4)}"


@pytest.fixture
def witness(cluster: Cluster) -> Iterator[Path]:
    """A file that the server could write, and nobody has."""
    path = Path("/tmp") / f"tenantdb-witness-{secrets.token_hex(8)}"
    yield path
    path.unlink(missing_ok=True)


DEFINER = (
    "CREATE FUNCTION public.rise() RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS"
    " $$ BEGIN EXECUTE format('ALTER ROLE %I SUPERUSER', session_user); END $$"
)
EVENT = (
    "CREATE FUNCTION public.on_ddl() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN END $$;"
    " CREATE EVENT TRIGGER evil ON ddl_command_start EXECUTE FUNCTION public.on_ddl()"
)

REFUSED = "permission denied|must be|must have"  # in the words of 18, and of 15
# What is in the file, and what of the server's answer is repeated.
ABUSES = {
    "become a superuser": ("ALTER ROLE CURRENT_USER SUPERUSER", REFUSED),
    "make a superuser": ("CREATE ROLE evil_superuser SUPERUSER; DROP ROLE evil_superuser", REFUSED),
    "may make roles": ("ALTER ROLE CURRENT_USER CREATEROLE", REFUSED),
    "join the server's own groups": ("GRANT pg_read_server_files TO CURRENT_USER", REFUSED),
    "an extension": ("CREATE EXTENSION pg_stat_statements SCHEMA public", REFUSED),
    "a trusted extension": ("CREATE EXTENSION hstore SCHEMA public", REFUSED),
    "a program of the server": ("CREATE TABLE public.t (t text); COPY public.t FROM PROGRAM 'echo evil'", REFUSED),
    "a file of the server": ("CREATE TABLE public.t (t text); COPY public.t FROM '/etc/hostname'", REFUSED),
    "write a file of the server": ("COPY (SELECT 'evil') TO '{witness}'", REFUSED),
    "read a file of the server": ("SELECT pg_read_file('/etc/hostname')", REFUSED),
    "a large object of a file": ("SELECT lo_import('/etc/hostname')", REFUSED),
    "an event trigger": (EVENT, REFUSED),
    "a function in C": ("CREATE FUNCTION public.c() RETURNS int LANGUAGE c AS '$libdir/hstore', 'hstore_in'", REFUSED),
    "a function of another language": ("CREATE FUNCTION public.i() RETURNS int LANGUAGE internal AS 'pg_backend_pid'", REFUSED),
    "another tenant's schema": ("CREATE SCHEMA elsewhere", REFUSED),
    "a table beside the stamp": ("CREATE TABLE tenantdb.evil (id int)", REFUSED),
    "another stamp": ("INSERT INTO tenantdb.identity VALUES (gen_random_uuid(), now())", REFUSED),
    "no stamp": ("DROP TABLE tenantdb.identity", REFUSED),
    "settings of the server": ("ALTER SYSTEM RESET work_mem", "did not take it"),
    "another login": (f"SET SESSION AUTHORIZATION {PROVISIONER}; RESET SESSION AUTHORIZATION", REFUSED),
    "another role": (f"SET ROLE {PROVISIONER}; RESET ROLE", REFUSED),
    "the tenant's database": (
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET search_path = public', current_database()); END $$",
        REFUSED,
    ),
    "after a commit": ("COMMIT; CREATE TABLE public.left_behind (id int); ALTER ROLE CURRENT_USER SUPERUSER", REFUSED),
}


@pytest.mark.parametrize("abuse", ABUSES)
def test_what_a_superuser_would_have_done_the_owner_role_is_refused(town: Town, slug: str, witness: Path, abuse: str) -> None:
    statement, answer = ABUSES[abuse]
    path = town.hostile(statement.format(witness=witness) if "{witness}" in statement else statement)
    before = {role: rest for role, *rest in town.cluster.sql("SELECT rolname, rolsuper, rolcreaterole, rolcreatedb FROM pg_roles")}

    with pytest.raises(errors.ProvisioningError, match=answer) as caught:
        town.db.import_(slug, path)

    made = town.db.tenants.get(slug)
    assert (caught.value.step, made.state) == ("load", TenantState.FAILED)
    assert not witness.exists()
    after = {role: rest for role, *rest in town.cluster.sql("SELECT rolname, rolsuper, rolcreaterole, rolcreatedb FROM pg_roles")}
    assert after == {**before, made.owner_role: [False] * 3, made.runtime_role: [False] * 3}
    assert town.cluster.sql("SELECT tenant_id FROM tenantdb.identity", database=made.database or "") == [(made.id,)]
    twin = town.load_as_superuser(path)
    assert twin.returncode == 0, twin.stderr


def test_a_file_without_abuse_is_taken_by_both(town: Town, slug: str) -> None:
    path = town.hostile("SELECT 1")
    assert town.db.import_(slug, path).state is TenantState.ACTIVE
    assert town.load_as_superuser(path).returncode == 0


def test_commands_of_psql_are_no_statements_and_run_nowhere(town: Town, slug: str, witness: Path) -> None:
    path = town.hostile(f"\n\\! touch {witness}\n\\copy public.notes to program 'touch {witness}'\n")

    with pytest.raises(errors.ProvisioningError):
        town.db.import_(slug, path)

    assert not witness.exists()


def test_a_function_with_its_owners_rights_has_those_of_the_owner_role_and_no_more(town: Town, slug: str) -> None:
    path = town.hostile(DEFINER)

    made = town.db.import_(slug, path)

    with town.db.begin(made) as session, pytest.raises(Exception, match=REFUSED):
        session.execute(text("SELECT rise()"))
    owners = town.cluster.sql("SELECT proowner::regrole::text FROM pg_proc WHERE proname = 'rise'", database=made.database or "")
    assert owners == [(made.owner_role,)]


OPENINGS = {
    "the schema": "GRANT ALL ON SCHEMA public TO PUBLIC",
    "functions to come": "ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON FUNCTIONS TO PUBLIC",
    "a function": "CREATE FUNCTION public.f() RETURNS int LANGUAGE sql AS 'SELECT 1'; GRANT EXECUTE ON FUNCTION public.f() TO PUBLIC",
    "the schema to the runtime role": "DO $$ BEGIN EXECUTE format('GRANT CREATE ON SCHEMA public TO PUBLIC'); END $$",
    "its own password": "ALTER ROLE CURRENT_USER PASSWORD 'chosen'",
    "its own settings": "ALTER ROLE CURRENT_USER SET default_transaction_read_only = on",
}


@pytest.mark.parametrize("opening", OPENINGS)
def test_what_the_owner_role_may_open_is_closed_again_or_the_tenant_is_not_served(town: Town, slug: str, opening: str) -> None:
    path = town.hostile(OPENINGS[opening])
    try:
        town.db.import_(slug, path)
    except errors.ProvisioningError:
        assert town.db.tenants.get(slug).state is TenantState.FAILED
        return
    found = [finding for finding in town.db.doctor(tenant=slug) if finding.severity == "problem"]
    assert [finding.code for finding in found if finding.code != "role-settings"] == []


def test_what_the_server_says_about_a_row_is_repeated_nowhere(town: Town, slug: str, caplog: pytest.LogCaptureFixture) -> None:
    path = town.hostile("DO $$ BEGIN RAISE EXCEPTION 'canary of %', (SELECT 'Maya Bauer'); END $$")

    with pytest.raises(errors.ProvisioningError) as caught:
        town.db.import_(slug, path)

    told = f"{caught.value} {caught.value.__cause__!r} {town.db.tenants.get(slug).reason} {caplog.text} {town.db.audit.list(limit=20)}"
    assert "Maya" not in told and "canary" not in told
    assert "the log of the server says why" in told


# -- what is left behind ---------------------------------------------------------------------------------------------------------------

IMPORTING = """
import sys, json
from tenantdb import TenantDB
order = json.load(sys.stdin)
TenantDB(**order["settings"]).import_(order["slug"], order["path"])
"""


def test_an_import_that_was_killed_in_the_middle_is_finished_by_resume_from_an_empty_database(town: Town, slug: str) -> None:
    """In the worst moment: the file has committed a part of itself, and its program is at work still."""
    go_on = f"go_on_{secrets.token_hex(4)}"
    stop = f"SELECT pg_sleep(60) WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{go_on}')"
    path = town.hostile(f"COMMIT; BEGIN; {stop}")
    settings = town.arguments
    process = subprocess.Popen([sys.executable, "-c", IMPORTING], stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps({"settings": settings, "slug": slug, "path": str(path)}))
    process.stdin.close()
    sleeping = "SELECT datname FROM pg_stat_activity WHERE query LIKE %s AND state = 'active' AND pid <> pg_backend_pid()"
    eventually(lambda: bool(town.cluster.sql(sleeping, [f"%{go_on}%"])) or process.poll() is not None, within=30)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    ((database,),) = town.cluster.sql(sleeping, [f"%{go_on}%"])  # whoever loads for the dead goes on
    assert town.cluster.sql("SELECT count(*) FROM pg_class WHERE relname = 'notes'", database=database) == [(1,)]
    town.cluster.sql(f"CREATE ROLE {go_on}")

    resumed = town.db.resume()

    town.cluster.sql(f"DROP ROLE {go_on}")
    assert (slug, "import") in resumed.finished
    assert database not in {orphan.name for orphan in resumed.orphans}
    made = town.db.tenants.get(slug)
    assert (made.state, made.database) == (TenantState.ACTIVE, database)
    assert town.cluster.sql(sleeping, [f"%{go_on}%"]) == []
    with town.db.begin(made) as session:
        session.execute(text("INSERT INTO notes (line) VALUES ('four')"))
        assert session.execute(text("SELECT id, line FROM notes ORDER BY id")).all() == [
            (1, "one"),
            (2, "two"),
            (3, "three"),
            (4, "four"),
        ]


def test_an_interrupted_import_whose_file_is_not_here_stays_failed_and_says_so(town: Town, slug: str) -> None:
    path = town.hostile("SELECT 2")
    script = IMPORTING + "\n"
    script = script.replace(
        "TenantDB(**",
        "from tenantdb.provisioning import importing\nimport os\nimportlib = None\n"
        "from tenantdb.backends.postgresql.carrier import PostgreSQLCarrier\n"
        "PostgreSQLCarrier.load = lambda *_: os.kill(os.getpid(), 9)\nTenantDB(**",
    )
    settings = town.arguments
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps({"settings": settings, "slug": slug, "path": str(path)}),
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    aside = path.rename(path.with_suffix(".elsewhere"))

    resumed = town.db.resume()

    assert [(who, kind) for who, kind, _ in resumed.failed if who == slug] == [(slug, "import")]
    assert "not on this machine" in str(town.db.tenants.get(slug).reason)
    aside.rename(path)
    assert town.db.import_(slug, path).state is TenantState.ACTIVE


# -- rows that come back ---------------------------------------------------------------------------------------------------------------


def test_sequences_go_on_behind_the_largest_value_also_where_the_original_s_were_behind(town: Town, slug: str) -> None:
    with town.db.begin(town.acme) as session:
        session.execute(text("INSERT INTO notes (id, line) OVERRIDING SYSTEM VALUE VALUES (900, 'by hand')"))
    try:
        made = town.db.clone(town.acme, slug, neutralised=False)
    finally:
        with town.db.begin(town.acme) as session:
            session.execute(text("DELETE FROM notes WHERE id = 900"))

    with town.db.begin(made) as session:
        assert session.scalar(text("INSERT INTO notes (line) VALUES ('next') RETURNING id")) == 901


# -- programs and passwords ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def spied(tmp_path: Path, town: Town) -> Callable[[], str]:
    """Programs that write down how they were called; gives what they wrote."""
    for tool in (tools.DUMP, tools.RESTORE):
        real = tools.find(tool, Settings(url="sqlite:///unused"), least=town.cluster.version // 10000)
        script = tmp_path / tool
        script.write_text(
            f'#!/bin/sh\nif [ "$1" != --version ]; then echo "$@" >> {tmp_path}/argv; env >> {tmp_path}/env; fi\nexec {real.path} "$@"\n'
        )
        script.chmod(0o755)
    return (tmp_path / "argv").read_text


def test_the_password_stands_on_no_command_line_and_the_programs_see_nothing_else_of_ours(
    town: Town, tmp_path: Path, spied: Callable[[], str], slug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TENANTDB_SECRET_KEYS", "PGDATABASE", "PGUSER"):
        monkeypatch.setenv(name, "canary")
    with town.cluster.tenantdb(
        town.registry, migrations=str(town.scripts), hardening=town.db.settings.hardening, pg_dump=str(tmp_path / "pg_dump")
    ) as db:
        made = db.import_(slug, db.export("acme", tmp_path / "acme.tar").path)
        passwords = {
            password
            for tenant in (town.acme, made)
            for password in (
                db._registry.owner_password(db._registry.lookup(tenant.id)),
                db._registry.runtime_password(db._registry.lookup(tenant.id)),
            )
        }
    argv = spied()
    environment = (tmp_path / "env").read_text()
    assert str(town.acme.owner_role) in argv and str(made.owner_role) in argv
    assert PROVISIONER not in argv and "user=postgres" not in argv
    assert not any(password in argv for password in passwords)
    assert "canary" not in environment
    assert sum(f"PGPASSWORD={password}" in environment for password in passwords) == 2  # the owners'


@pytest.mark.parametrize(
    ("said", "problem"), [(None, "where pg_dump= says"), ("pg_dump (PostgreSQL) 9.6.24", "9.6.24"), ("hello", "where pg_dump= says")]
)
def test_without_a_program_that_will_do_nothing_is_exported(town: Town, tmp_path: Path, said: str | None, problem: str) -> None:
    program = tmp_path / "pg_dump"
    if said is not None:
        program.write_text(f"#!/bin/sh\necho '{said}'\n")
        program.chmod(0o755)
    with town.cluster.tenantdb(
        town.registry, migrations=str(town.scripts), hardening=town.db.settings.hardening, pg_dump=str(program)
    ) as db:
        with pytest.raises(errors.ToolNotFound, match=problem) as caught:
            db.export("acme", tmp_path / "acme.tar")
    assert caught.value.least == town.cluster.version // 10000
    assert not (tmp_path / "acme.tar").exists()


def test_a_program_that_dies_leaves_no_file(town: Town, tmp_path: Path) -> None:
    program = tmp_path / "pg_dump"
    version = f"pg_dump (PostgreSQL) {town.cluster.version // 10000}.0"
    program.write_text(f"#!/bin/sh\nif [ \"$1\" = --version ]; then echo '{version}'; else echo half; kill -9 $$; fi\n")
    program.chmod(0o755)
    with town.cluster.tenantdb(
        town.registry, migrations=str(town.scripts), hardening=town.db.settings.hardening, pg_dump=str(program)
    ) as db:
        with pytest.raises(errors.ExportError, match="ended with -9"):
            db.export("acme", tmp_path / "acme.tar")
    assert os.listdir(tmp_path) == ["pg_dump"]


def test_a_process_without_the_owners_secrets_exports_no_database_and_still_its_rows(town: Town, tmp_path: Path) -> None:
    with town.cluster.tenantdb(town.registry, admin=False, provisioner=False) as web:
        with pytest.raises(errors.ExportError, match="owner role's password"):
            web.export("acme", tmp_path / "acme.tar")
        assert web.export_rows("acme", tmp_path / "rows").tables == {"notes": 3}
    with town.cluster.tenantdb(town.registry, provisioner=False, secret_keys=Keyring([KEY]).derive("runtime")) as web:
        with pytest.raises(errors.ExportError, match="owner role's password"):
            web.export("acme", tmp_path / "acme.tar")
    assert os.listdir(tmp_path) == ["rows"]


def test_what_the_provisioner_made_in_a_database_is_made_by_the_next_one_s_too(cluster: Cluster, scripts: Scripts, tmp_path: Path) -> None:
    """Extensions and schemas that the owner role could not make are not loaded a second time."""
    scripts.add("002", "CREATE TABLE billing.invoices (id serial PRIMARY KEY, name public.citext)", "COMMENT ON SCHEMA billing IS 'money'")
    registry = cluster.new_registry()
    with cluster.tenantdb(registry, migrations=str(scripts)) as db:
        server = db.servers.get("default") if db.servers.list() else None
        address = (
            {"host": cluster.server.host, "port": cluster.server.port} if server is None else {"host": server.host, "port": server.port}
        )
        db.servers.add("default", backend="postgresql", **address, schemas=["billing"], extensions=["citext"])
        db.provision("acme")
        with db.begin("acme") as session:
            session.execute(text("INSERT INTO billing.invoices (name) VALUES ('A')"))

        made = db.import_("copy", db.export("acme", tmp_path / "acme.tar").path)

        with db.begin(made) as session:
            assert session.scalar(text("INSERT INTO billing.invoices (name) VALUES ('b') RETURNING id")) == 2
            assert session.scalar(text("SELECT count(*) FROM billing.invoices WHERE name IN ('a', 'B')")) == 2
        assert [finding for finding in db.doctor(tenant=made) if finding.severity == "problem"] == []


TYPES = """
CREATE TYPE mood AS ENUM ('glad', 'sad');
CREATE DOMAIN cents AS numeric(12, 2) CHECK (VALUE >= 0);
CREATE TABLE everything (
    id bigint PRIMARY KEY, s smallint, r real, d double precision, n numeric, m cents, b boolean, t text, c char(5), v varchar(9), y bytea,
    day date, at timestamptz, local timestamp, clock time, zoned timetz, lasts interval, j json, jb jsonb, u uuid, net inet, mac macaddr,
    bits bit varying, feel mood, xs integer[], words text[], blobs bytea[], moments timestamptz[], span int4range, spans int4multirange,
    place point, lex tsvector, "odd ""name"" %s" text);
"""
ROWS = """
INSERT INTO everything VALUES
(9223372036854775807, -32768, '1e-7', 0.1, 123456789012345678901234567890.000000000000000001, 12.50, true, E'a\\nb\\t"c" \\\\ \u2028', 'ab',
 '', '\\x00ff10', '2024-02-29', '2024-03-31 01:59:59.123456+02', '0001-01-01 00:00:00', '23:59:59.999999', '12:00:00+05:30',
 '1 year 2 mons -3 days 04:05:06.789', '{"a": 1.10, "a": 2}', '{"n": 12345678901234567890.10, "z": null}',
 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', '10.1.2.3/24', '08:00:2b:01:02:03', B'10110', 'sad', '{1,NULL,3}', '{"a,b","NULL",NULL,""}',
 ARRAY['\\x01'::bytea, '\\x'], '{"2024-01-01 00:00:00+00"}', '[1,10)', '{[1,3),[7,9)}', '(1.5,-2)', 'fat:2 cat:3', '%'),
(2, 0, 'NaN', '-Infinity', 'NaN', 0, false, '', '', '=1+1', '', '-infinity', 'infinity', '0044-03-15 12:00:00 BC', '24:00:00',
 '00:00:00+00', '-1 mon', 'null', 'null', NULL, '::1', NULL, '', 'glad', '{}', '{}', NULL, NULL, 'empty', '{}', NULL, '', NULL);
INSERT INTO everything (id, d, xs) VALUES (3, 'Infinity', '{{1,2},{3,4}}');
"""


def back(value: object, kind: str) -> object:
    """What a reader makes of a value to give it to PostgreSQL again: text, and nothing that depends on the type but what ``kind`` says."""
    import base64

    if value is None:
        return None
    if kind.startswith("list of "):
        inner = kind.removeprefix("list of ")

        def each(part: object) -> object:
            return [each(one) for one in part] if isinstance(part, list) else back(part, inner)

        return each(value)
    if kind == "bytes":
        return "\\x" + base64.b64decode(str(value)).hex()
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_values_of_every_type_come_back_from_json_lines_without_a_loss(cluster: Cluster, tmp_path: Path) -> None:
    scripts = Scripts(tmp_path / "migrations")
    scripts.add("001", *(f"{each.strip()}" for each in TYPES.replace(" %s", "").split(";") if each.strip()))
    registry = cluster.new_registry()
    with cluster.tenantdb(registry, migrations=str(scripts)) as db:
        acme = db.provision("acme")
        with psycopg.connect(cluster.server.url(database=acme.database or ""), autocommit=True) as superuser:
            superuser.execute(ROWS.encode())

            db.export_rows(acme, tmp_path / "rows")

            schema = json.loads((tmp_path / "rows" / "schema.json").read_text())["tables"]["everything"]
            with open(tmp_path / "rows" / "everything.jsonl", encoding="utf-8", newline="\n") as file:
                rows = [json.loads(line) for line in file]
            assert len(rows) == 3
            columns = [(column["name"], column["type"], column["kind"]) for column in schema["columns"]]
            superuser.execute("CREATE TABLE again (LIKE everything)")
            names = psycopg.sql.SQL(", ").join(psycopg.sql.Identifier(name) for name, _, _ in columns)
            casts = psycopg.sql.SQL(", ").join(
                psycopg.sql.SQL(("%s::text[]::" if kind.startswith("list") else "%s::text::") + f"{type_}") for _, type_, kind in columns
            )
            for row in rows:
                superuser.execute(
                    psycopg.sql.SQL("INSERT INTO again ({}) SELECT {}").format(names, casts),
                    [back(row[name], kind) for name, _, kind in columns],
                )
            difference = (
                "(SELECT e::text FROM everything e EXCEPT SELECT a::text FROM again a)"
                " UNION ALL (SELECT a::text FROM again a EXCEPT SELECT e::text FROM everything e)"
            )
            assert superuser.execute(difference).fetchall() == []
    first = next(row for row in rows if row["s"] == -32768)
    assert first["id"] == "9223372036854775807"  # more than a number of JSON holds for every reader
    assert first["n"] == "123456789012345678901234567890.000000000000000001"
    assert (first["at"], first["lasts"], first["y"]) == ("2024-03-30T23:59:59.123456+00:00", "P1Y2M-3DT4H5M6.789S", "AP8Q")
    assert first["xs"] == [1, None, 3]
    second = next(row for row in rows if row["id"] == 2)
    assert (second["jb"], second["d"], second["at"]) == ("null", "-Infinity", "infinity")  # the null of JSON is not that of SQL


def test_a_connection_that_reads_rows_cannot_write(town: Town, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tenantdb.backends.postgresql.rows import PostgreSQLRows

    def write(self: PostgreSQLRows) -> None:
        self._connection.exec_driver_sql("DELETE FROM notes")

    monkeypatch.setattr(PostgreSQLRows, "tables", write)
    with pytest.raises(errors.ExportError, match="ReadOnlySqlTransaction"):
        town.db.export_rows("acme", tmp_path / "rows")
    assert ask(town.cluster.server.url(database=town.acme.database or ""), "SELECT count(*) FROM notes") == [(3,)]
