"""A tenant's database out into an archive of ``pg_dump`` and in again, always as its owner role.

Whoever wrote an archive decides which statements are sent when it is loaded, so they are sent by the role that may do least: it owns the
tenant's schemas and nothing else, and the server refuses the rest. Neither a superuser nor the provisioner ever loads or dumps. Privileges
and owners in the archive are left out; the tables are the owner role's, and its default privileges open them to the runtime role.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, BinaryIO

from psycopg import sql
from psycopg.conninfo import make_conninfo
from sqlalchemy.engine import Connection

from tenantdb.backends.base import CarryFailed, Location, Surroundings
from tenantdb.backends.postgresql import tools
from tenantdb.backends.postgresql.connect import session_options, transport
from tenantdb.errors import ImportRefused
from tenantdb.model import DatabaseRole
from tenantdb.settings import Settings

_CHUNK = 1 << 20
_REQUIRES_AUTH = 16  # the first libpq that can insist on SCRAM
_OURS = "tenantdb"  # the schema with the identity stamp and the audit log: the provisioner's
_REFUSED = "password authentication failed"
_LEFT_OUT = (
    "--no-password",  # never ask for one
    *(f"--no-{what}" for what in ("owner", "acl", "publications", "subscriptions", "security-labels", "tablespaces")),
)
_SERVER_SAID, _PROGRAM_SAID = re.compile(r"(?:ERROR|FATAL):\s+(.+)"), re.compile(r"pg_(?:dump|restore): error: (.+)")
# What the server says may quote a row, so only what names objects alone is repeated.
_REPEATED = re.compile(
    r"(permission denied|must be|must have|only roles with|(?:role|schema|relation|type|extension|language|database) \"|function "
    r"|could not (?:open|read|write)|unrecognized configuration parameter|unsupported version|connection to server|no schema has been"
    r"|cannot run inside|duplicate key value|insert or update on table|null value in column|query would be affected by row-level security"
    r"|canceling statement due to|no space left|terminating connection)",
    re.IGNORECASE,
)
_ABOUT = "SELECT split_part(current_setting('server_version'), ' ', 1), pg_database_size(current_database())"
_PRESENT = "SELECT 'EXTENSION', extname FROM pg_extension UNION ALL SELECT 'SCHEMA', nspname FROM pg_namespace WHERE nspname <> %s"
# A sequence that belongs to a column (serial, identity), and counts upwards.
_SEQUENCES = """
SELECT s.oid::regclass::text, c.oid::regclass::text, a.attname
FROM pg_depend d JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S' JOIN pg_sequence q ON q.seqrelid = s.oid
JOIN pg_class c ON c.oid = d.refobjid JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = d.refobjsubid
WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')
  AND pg_get_userbyid(s.relowner) = current_user AND q.seqincrement > 0
"""
_ADVANCE = (
    "SELECT pg_catalog.setval({}::pg_catalog.regclass, m.v) FROM (SELECT pg_catalog.max({}) AS v FROM {}) AS m"
    " WHERE m.v > (SELECT last_value FROM {})"
)


class PostgreSQLCarrier:
    """See `tenantdb.backends.protocols.Carrier`."""

    member = "data.dump"

    def __init__(self, location: Location, settings: Settings) -> None:
        self._location = location
        self._settings = settings

    def look(self, connection: Connection) -> Surroundings:
        version, size = connection.exec_driver_sql(_ABOUT).one()
        present = connection.exec_driver_sql(_PRESENT, (_OURS,)).all()
        return Surroundings(version, size, frozenset((kind, name) for kind, name in present))

    def dump(self, target: BinaryIO, scratch: Path, there: Surroundings) -> str:
        tool = tools.find(tools.DUMP, self._settings, least=self._least(_major(there.version)))
        wait = round(self._settings.lock_timeout * 1000)
        arguments = ["--format=custom", *_LEFT_OUT, f"--exclude-schema={_OURS}", *([f"--lock-wait-timeout={wait}"] if wait else [])]

        def receive(process: subprocess.Popen[bytes]) -> None:
            assert process.stdout is not None
            while chunk := process.stdout.read(_CHUNK):
                target.write(chunk)

        self._run([str(tool.path), *arguments], receive, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        return f"{tools.DUMP} {tool.version}"

    def load(self, source: Callable[[], BinaryIO], made_with: str, there: Surroundings) -> None:
        made = _major(made_with.removeprefix(f"{tools.DUMP} "))
        tool = tools.find(tools.RESTORE, self._settings, least=self._least(max(_major(there.version), made)))
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix="tenantdb-", suffix=".list") as wanted:
            wanted.writelines(_wanted(_contents(tool, source()), there.present))
            wanted.flush()
            arguments = ["--format=custom", *_LEFT_OUT, "--exit-on-error", "--single-transaction", f"--use-list={wanted.name}"]

            def send(process: subprocess.Popen[bytes]) -> None:
                _feed(process, source())

            self._run([str(tool.path), *arguments], send, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)

    def settle(self, connection: Connection) -> None:
        for sequence, table, column in connection.exec_driver_sql(_SEQUENCES).all():
            parts = sql.Literal(sequence), sql.Identifier(column), sql.SQL(table), sql.SQL(sequence)
            connection.exec_driver_sql(sql.SQL(_ADVANCE).format(*parts).as_string(None).replace("%", "%%"))

    # -- running a program -------------------------------------------------------------------------------------------------------------

    def _least(self, major: int) -> int:
        insists = "require_auth" in transport(self._location.host, self._settings)
        return max(major, _REQUIRES_AUTH) if insists else major

    def _conninfo(self) -> str:
        """Where and as whom, without the password: it stands on the command line."""
        location = self._location
        return make_conninfo(
            host=location.host,
            port=location.port,
            user=location.tenant.owner_role,
            dbname=location.tenant.database,
            **transport(location.host, self._settings),
            **session_options(DatabaseRole.OWNER, self._settings),
        )

    def _run(self, command: Sequence[str], talk: Callable[[subprocess.Popen[bytes]], None], *, stdin: int, stdout: int) -> None:
        """Run a program to its end; where its password is refused, once more with the other one, if it is being changed.

        Raises: `CarryFailed`, or what ``talk`` raises, after which the program is dead.
        """
        password: Callable[[], str] | None = self._location.password
        while password is not None:
            with tempfile.TemporaryFile() as said:
                with _process([*command, f"--dbname={self._conninfo()}"], password, stdin, stdout, said) as process:
                    talk(process)
                    code = process.wait()
                if code == 0:
                    return
                said.seek(0)
                problem = said.read(1 << 16).decode(errors="replace")
            password = self._location.other_password() if _REFUSED in problem and password is self._location.password else None
        raise CarryFailed(_reason(problem, code))


@contextlib.contextmanager
def _process(
    command: Sequence[str], password: Callable[[], str], stdin: int, stdout: int, said: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """A program that does not outlive the block."""
    process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=said, env=tools.environment(password()))
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        process.wait()


def _feed(process: subprocess.Popen[bytes], source: BinaryIO) -> None:
    """Send all of it; a program that has read enough is no error, and what it does not want is read all the same, for its hash."""
    assert process.stdin is not None
    wants = True
    while chunk := source.read(_CHUNK):
        if wants:
            try:
                process.stdin.write(chunk)
            except BrokenPipeError:
                wants = False
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def _contents(tool: tools.Tool, source: BinaryIO) -> list[str]:
    """The archive's table of contents. Raises: `ImportRefused` where it is none."""
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as found:
        command = [str(tool.path), "--format=custom", "--list"]
        with _process(command, lambda: "", subprocess.PIPE, found.fileno(), said) as process:
            _feed(process, source)
            code = process.wait()
        if code != 0:
            raise ImportRefused("pg_restore cannot read the archive in it")
        found.seek(0)
        return found.read().decode(errors="replace").splitlines(keepends=True)


_LINE = re.compile(r"\d+; \d+ \d+ (?:COMMENT - )?(EXTENSION|SCHEMA) (?:- )?(\S+)")


def _wanted(contents: Sequence[str], present: frozenset[tuple[str, str]]) -> Iterator[str]:
    """Without the extensions and schemas that are there already: the provisioner made them, and the owner role may not."""
    for line in contents:
        found = _LINE.match(line)
        if found is None or (found[1], found[2]) not in present or (found[1] == "SCHEMA" and "COMMENT" in line):
            yield line


def _reason(said: str, code: int) -> str:
    """What went wrong, in a line without a row in it."""
    messages = _SERVER_SAID.findall(said) or _PROGRAM_SAID.findall(said)
    known = next((message for message in messages if _REPEATED.match(message)), None)
    if known is None:
        known = f"the program ended with {code}" if not messages else "a statement failed, and the log of the server says why"
    return "".join(each if each.isprintable() else " " for each in known[:200])


def _major(version: str) -> int:
    return int(version.split(".", 1)[0].split("beta", 1)[0].split("rc", 1)[0].split("devel", 1)[0] or 0)
