"""The command as a real process: exit codes, signals, a terminal, and PostgreSQL from the wheel from `dev` to a checked installation."""

from __future__ import annotations

import json
import os
import pty
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tenantdb import TenantDB
from tenantdb.registry import SignUp
from tenantdb.registry.secrets import Keyring, generate_key
from tenantdb.testing import EmbeddedServer
from tests.cli_process import Shell
from tests.world import PostgreSQLWorld, eventually, pg_world

SQLITE = {"TENANTDB_URL": "sqlite:///central.sqlite3"}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that PostgreSQL's system user may enter; pytest's own lie where only root may."""
    with tempfile.TemporaryDirectory(prefix="tenantdb-test-") as name:
        os.chmod(name, 0o711)
        yield Path(name)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path, SQLITE)


@pytest.fixture(scope="module")
def world() -> Iterator[PostgreSQLWorld]:
    with pg_world() as world:
        yield world


# -- exit codes ------------------------------------------------------------------------------------------------------------------------


def test_exit_codes_of_the_real_process(shell: Shell) -> None:
    shell.tenantdb("init")
    shell.tenantdb("provision", "acme")
    shell.tenantdb("show", "acm", exit_code=1)
    shell.tenantdb("show", "Acme", exit_code=2)
    shell.tenantdb("bogus", exit_code=2)
    shell.tenantdb("--app", "nowhere:db", "list", exit_code=2)
    unreachable = {"TENANTDB_URL": "postgresql://app:canary-pw@127.0.0.1:1/central", "TENANTDB_SECRET_KEYS": generate_key()}
    shell.tenantdb("list", exit_code=75, **unreachable)

    assert "canary-pw" not in "".join(shell.printed)


def test_the_console_script_is_the_same_command(shell: Shell) -> None:
    script = shutil.which("tenantdb", path=str(Path(sys.executable).parent))
    assert script, "the package is installed without its console script"

    done = subprocess.run(
        [script, "list"], cwd=shell.folder, env=shell.environment(), capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 1 and "tenantdb init" in done.stderr


def test_a_bug_in_the_application_keeps_its_traceback(shell: Shell) -> None:
    (shell.folder / "broken.py").write_text("1 / 0\n")

    assert "ZeroDivisionError" in shell.tenantdb("--app", "broken:db", "list", exit_code=1).stderr


def test_a_reader_who_leaves_early_is_no_error(shell: Shell) -> None:
    shell.tenantdb("init")
    reader, writer = os.pipe()
    os.close(reader)

    done = subprocess.run(
        [sys.executable, "-m", "tenantdb.cli", "list", "--json"],
        cwd=shell.folder,
        env=shell.environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writer)

    assert "Traceback" not in done.stderr and "Error" not in done.stderr


# -- worker ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_makes_what_waits_and_stops_when_told(shell: Shell, signum: signal.Signals) -> None:
    url = f"sqlite:///{shell.folder}/central.sqlite3"
    with TenantDB(url) as db:
        db.init()
        worker = shell.popen("worker", "--json")
        try:
            db._registry.sign_up(SignUp(slug="acme"))
            eventually(lambda: db.tenants.get("acme").state == "active", within=60)
            worker.send_signal(signum)
            printed, said = worker.communicate(timeout=60)
        finally:
            worker.kill()

    assert worker.returncode == 0, said
    assert json.loads(printed) == {"done": 1, "failed": []}
    assert "Ctrl-C" in said


# -- a terminal ------------------------------------------------------------------------------------------------------------------------


def typed(shell: Shell, *words: str, lines: str = "", until: str = "") -> str:
    """What a person sees who types lines into a command on a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tenantdb.cli", *words],
        cwd=shell.folder,
        env=shell.environment({"TERM": "dumb", "COLUMNS": "120"}),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    seen = ""
    try:
        for line in lines.splitlines(keepends=True):
            seen += read_until(ours, until)
            os.write(ours, line.encode())
        seen += read_until(ours, None)
        assert process.wait(60) == 0, seen
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return seen


def read_until(terminal: int, text: str | None) -> str:
    seen = ""
    while text is None or text not in seen:
        assert select.select([terminal], [], [], 60)[0], f"nothing more came after {seen!r}"
        try:
            more = os.read(terminal, 4096)
        except OSError:  # on Linux the end of a terminal
            more = b""
        if not more:
            break
        seen += more.decode(errors="replace")
    return seen


def test_shell_on_a_terminal_is_a_console_on_the_tenant(shell: Shell) -> None:
    shell.tenantdb("init")
    shell.tenantdb("provision", "acme")

    seen = typed(shell, "shell", "acme", lines="print('bound to', db.tenants.get('acme') == tenant)\nexit()\n", until=">>> ")

    assert "Nothing is committed unless you call session.commit()" in seen and "bound to True" in seen


def test_list_on_a_terminal_is_a_table_with_a_head(shell: Shell) -> None:
    shell.tenantdb("init")
    shell.tenantdb("provision", "acme", "--name", "[red]Acme[/red]")

    seen = typed(shell, "list")

    assert re.search(r"slug +state +name", seen) and "[red]Acme[/red]" in seen


def test_a_password_is_asked_for_on_the_terminal_and_never_echoed(shell: Shell) -> None:
    seen = typed(shell, "bootstrap-server", "--print", "--provisioner", "prov", lines="canary-pw\ncanary-pw\n", until=": ")

    assert "The password for prov" in seen and "SCRAM-SHA-256$" in seen and "canary-pw" not in seen


# -- bootstrap-server ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(folder: Path) -> Iterator[tuple[EmbeddedServer, Shell]]:
    """A server as initdb leaves it, and a shell whose settings name a provisioner that does not exist yet."""
    with EmbeddedServer(fsync=False) as server:
        logins = {name: secrets.token_urlsafe(16) for name in ("app", "admin", "prov")}
        with psycopg.connect(server.url(), autocommit=True) as connection:
            for name in ("app", "admin"):
                connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{logins[name]}'".encode())
            connection.execute("CREATE DATABASE central OWNER admin")
            connection.execute("REVOKE ALL ON DATABASE central FROM PUBLIC")
            connection.execute("GRANT CONNECT ON DATABASE central TO app")
        exports = {
            "TENANTDB_URL": server.url("app", logins["app"], "central"),
            "TENANTDB_REGISTRY_ADMIN": server.url("admin", logins["admin"], "central"),
            "TENANTDB_SERVER": server.url("prov", logins["prov"]),
            "TENANTDB_SECRET_KEYS": generate_key(),
        }
        yield server, Shell(folder, exports)


def test_bootstrap_init_provision_check(bare: tuple[EmbeddedServer, Shell]) -> None:
    server, shell = bare

    shell.tenantdb("check", exit_code=1)
    assert "prov may create databases" in shell.tenantdb("bootstrap-server", TENANTDB_SUPERUSER_URL=server.url()).stdout
    assert json.loads(shell.tenantdb("bootstrap-server", "--json", TENANTDB_SUPERUSER_URL=server.url()).stdout) == {
        "provisioner": "prov"
    }  # it may run again
    assert shell.json()["next"] == "tenantdb init"
    assert shell.json("init") == {"servers": ["default"]} == shell.json("init")
    made = shell.json("provision", "acme")
    assert made["state"] == "active" and re.fullmatch(r"t_[0-9a-f]{16}", made["database"])
    findings = shell.json("check")
    assert findings["ok"] and [finding["subject"] for finding in findings["findings"]] == ["settings"]  # no migrations: a warning
    script = "from sqlalchemy import text\nprint(session.scalar(text('SELECT current_user')) == tenant.runtime_role)\n"
    assert shell.tenantdb("shell", "acme", stdin=script).stdout == "True\n"
    shell.assert_no_secret_printed(server.password)


def test_the_printed_script_does_the_same_in_psql(bare: tuple[EmbeddedServer, Shell]) -> None:
    server, shell = bare

    script = shell.tenantdb("bootstrap-server", "--print").stdout
    psql(server, script)
    psql(server, script)

    shell.tenantdb("init")
    assert shell.json("provision", "acme")["state"] == "active"
    shell.assert_no_secret_printed(server.password)


def test_only_a_superuser_may_bootstrap_and_none_may_be_the_provisioner(bare: tuple[EmbeddedServer, Shell]) -> None:
    server, shell = bare

    told = shell.tenantdb("bootstrap-server", "--json", exit_code=1, TENANTDB_SUPERUSER_URL=shell.exports["TENANTDB_URL"])
    assert json.loads(told.stderr)["error"]["code"] == "config"
    told = shell.tenantdb(
        "bootstrap-server",
        *("--provisioner", "postgres"),
        exit_code=1,
        TENANTDB_SUPERUSER_URL=server.url(),
        TENANTDB_PROVISIONER_PASSWORD="canary-pw",
    )
    assert "is a superuser" in told.stderr
    wrong = server.url("postgres", "canary-pw")
    shell.tenantdb("--traceback", "bootstrap-server", exit_code=75, TENANTDB_SUPERUSER_URL=wrong)
    shell.tenantdb("--traceback", "check", exit_code=1, TENANTDB_SERVER=server.url("prov", "canary-pw"))
    shell.assert_no_secret_printed(server.password, "canary-pw")


def test_the_superusers_password_can_be_asked_for(bare: tuple[EmbeddedServer, Shell]) -> None:
    server, shell = bare
    shell.exports["TENANTDB_SUPERUSER_URL"] = server.url("postgres")

    seen = typed(shell, "bootstrap-server", "-W", lines=f"{server.password}\n", until=": ")

    assert "prov may create databases" in seen and server.password not in seen
    assert "no password was given" in shell.tenantdb("bootstrap-server", exit_code=75).stderr
    shell.tenantdb("bootstrap-server", PGPASSWORD=server.password)  # libpq's own ways work too


def psql(server: EmbeddedServer, script: str) -> None:
    """What psql makes of a script: statements, ``\\gexec`` and ``\\c``."""
    connection = psycopg.connect(server.url(), autocommit=True)
    statements = ""
    for line in script.splitlines(keepends=True):
        if line.startswith("\\c "):
            connection.execute(statements.encode())
            connection.close()
            connection, statements = psycopg.connect(server.url(database=line.split()[1]), autocommit=True), ""
        elif line.rstrip().endswith("\\gexec"):
            connection.execute(statements.encode())
            for (statement,) in connection.execute(line.rstrip().removesuffix("\\gexec").encode()).fetchall():
                connection.execute(statement.encode())
            statements = ""
        elif line.startswith("ALTER DATABASE"):
            connection.execute(statements.encode())
            connection.execute(line.encode())
            statements = ""
        else:
            statements += line
    connection.execute(statements.encode())
    connection.close()


# -- a process without a provisioner ---------------------------------------------------------------------------------------------------


def test_without_a_provisioner_a_tenant_waits_for_the_worker(world: PostgreSQLWorld, tmp_path: Path) -> None:
    exports = exports_of(world)
    shell = Shell(tmp_path, exports)
    shell.tenantdb("init")
    server = exports.pop("TENANTDB_SERVER")

    waiting = shell.tenantdb("provision", "acme")
    assert waiting.stdout == "acme is provisioning\n" and "tenantdb worker" in waiting.stderr
    assert shell.tenantdb("worker", "--once", exit_code=1).stderr.startswith("Error: ")
    exports["TENANTDB_SERVER"] = server
    assert shell.json("worker", "--once") == {"done": 1, "failed": []}
    assert shell.json("show", "acme")["state"] == "active"


def test_runtime_keys_alone_serve_and_cannot_migrate(world: PostgreSQLWorld, tmp_path: Path) -> None:
    exports = exports_of(world)
    shell = Shell(tmp_path, exports)
    shell.tenantdb("init")
    shell.tenantdb("provision", "acme")
    exports["TENANTDB_SECRET_KEYS"] = shell.tenantdb("generate-key", "--derive", "runtime").stdout

    assert shell.tenantdb("shell", "acme", stdin="print(session.connection() is not None)").stdout == "True\n"
    versions = tmp_path / "scripts" / "versions"
    versions.mkdir(parents=True)
    (versions.parent / "env.py").write_text(
        "from clinic import db\nfrom tenantdb.migrations import run_env\nrun_env(db, target_metadata=None)\n"
    )
    (tmp_path / "clinic.py").write_text("from tenantdb import TenantDB\ndb = TenantDB()\n")
    (versions / "1.py").write_text("revision, down_revision = '1', None\ndef upgrade(): ...\n")
    told = shell.tenantdb("--json", "migrate", "--tenant", "acme", exit_code=3, TENANTDB_MIGRATIONS="scripts")
    assert "secret" in json.loads(told.stdout)["failed"]["acme"]


def exports_of(world: PostgreSQLWorld) -> dict[str, str]:
    """The variables of an application with a registry of its own."""
    given = world._new_registry()
    return {f"TENANTDB_{name.upper()}": ",".join(value) if isinstance(value, list) else value for name, value in given.items()}


# -- dev -------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def dev(shell: Shell, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command while it runs, and what it printed until the server was ready."""
    process = shell.popen("dev", *words)
    assert process.stdout is not None
    try:
        printed = "".join(iter_until(process.stdout.readline, lambda line: line == "}\n" or line.startswith("export TENANTDB_SECRET_KEYS")))
        yield process, printed
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def iter_until(readline: Callable[[], str], last: Callable[[str], bool]) -> Iterator[str]:
    while line := readline():
        yield line
        if last(line):
            return


def cluster_pid(folder: Path) -> int:
    return int((folder / ".tenantdb" / "cluster" / "data" / "postmaster.pid").read_text().splitlines()[0])


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_dev_runs_postgresql_and_keeps_data_and_keys_for_the_next_start(folder: Path) -> None:
    shell = Shell(folder)
    with dev(shell, "--json") as (process, printed):
        environment: dict[str, Any] = json.loads(printed)["environment"]
        assert sorted(environment) == ["TENANTDB_REGISTRY_ADMIN", "TENANTDB_SECRET_KEYS", "TENANTDB_SERVER", "TENANTDB_URL"]
        user = Shell(folder, environment)
        assert user.json()["next"] == "tenantdb provision SLUG"
        user.tenantdb("provision", "acme")
        assert [finding["subject"] for finding in user.json("check")["findings"]] == ["settings"]  # no migrations are configured
        first = user.json("show", "acme")
        pid = cluster_pid(folder)
        user.assert_no_secret_printed()
        with pytest.raises(AssertionError):  # the negative twin: what dev prints holds them all
            Shell(folder, environment, printed=[printed]).assert_no_secret_printed()

        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=60)
        assert (process.returncode, printed) == (0, ""), said
    assert "stopped" in said
    assert not is_running(pid)

    with dev(shell) as (process, printed):
        lines = printed.splitlines()
        assert all(line.startswith("export TENANTDB_") for line in lines) and len(lines) == 4
        again = dict(line.removeprefix("export ").split("=", 1) for line in lines)
        assert again["TENANTDB_SECRET_KEYS"].strip("'") == environment["TENANTDB_SECRET_KEYS"]
        user = Shell(folder, {name: value.strip("'") for name, value in again.items()})
        moved = {"version", "generation", "updated_at"}  # the server has another port now
        assert {name: value for name, value in user.json("show", "acme").items() if name not in moved} == {
            name: value for name, value in first.items() if name not in moved
        }
        assert user.tenantdb("shell", "acme", stdin="print(session.connection() is not None)").stdout == "True\n"  # at the new port
        assert user.json("check")["ok"]
        running = shell.tenantdb("dev", exit_code=1)
        assert "PostgreSQL did not start" in running.stderr

        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 0


def test_dev_shows_its_secrets_to_nobody_else(folder: Path) -> None:
    shell = Shell(folder)
    with dev(shell) as (_, _):
        pass
    kept = folder / ".tenantdb"

    assert (kept / "secrets.json").stat().st_mode & 0o777 == 0o600
    assert (kept / ".gitignore").read_text() == "*\n"
    key = json.loads((kept / "secrets.json").read_text())["key"]
    assert Keyring([key]).holds("owner")
    (kept / "secrets.json").write_text('{"key": "canary-pw"')
    told = shell.tenantdb("dev", exit_code=1)
    assert "damaged" in told.stderr and "canary-pw" not in told.stderr


def test_dev_in_a_folder_that_cannot_be_used_is_told(shell: Shell) -> None:
    (shell.folder / "file").touch()

    assert shell.tenantdb("dev", "--data", "file/below", exit_code=1).stderr.startswith("Error: the folder ")
    shell.tenantdb("dev", "--data", "file", exit_code=2)
