"""One face of the application in a process of its own, under the server that its kind is served by: uvicorn or gunicorn.

As a module that a server imports, it makes ``app`` of what `serve` put into the environment.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tenantdb.aio import AsyncTenantDB
from tenantdb.database import TenantDB
from tests.adapters.faces import FACES, OverASGI
from tests.adapters.world import World, new_tokens
from tests.world import eventually

ROOT = Path(__file__).parents[2]
_FACE, _URL = "TESTS_SERVED_FACE", "TESTS_SERVED_URL"
_LISTENING = re.compile(r"http://127\.0\.0\.1:(\d+)")


@dataclass
class Answer:
    status: int
    head: str
    body: bytes


@dataclass
class Served:
    """A server on a port of loopback, and raw requests to it: what is in the request line no client library has tidied up."""

    port: int

    def ask(self, target: str | bytes, headers: dict[str, str] | None = None, *, method: str = "GET") -> Answer:
        line = (
            method.encode() + b" " + (target.encode() if isinstance(target, str) else target) + b" HTTP/1.0"
        )  # whose bodies come without chunks
        more = [f"{name}: {value}".encode() for name, value in {"host": "clinic.example", "connection": "close", **(headers or {})}.items()]
        answer = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(b"\r\n".join([line, *more, b"", b""]))
            while chunk := connection.recv(65536):
                answer += chunk
        head, _, body = answer.partition(b"\r\n\r\n")
        return Answer(int(head.split()[1]), head.decode("latin-1"), body)


@contextmanager
def serve(face: str, world: World, log: Path) -> Iterator[Served]:
    """Serve the world's database behind a face until the block ends."""
    command = "uvicorn --port 0 --no-access-log" if issubclass(FACES[face], OverASGI) else "gunicorn --bind 127.0.0.1:0 --threads 4"
    with running(f"{command} {__name__}:app", {_FACE: face, _URL: str(world.db.settings.url)}, log) as served:
        yield served


@contextmanager
def running(command: str, variables: dict[str, str], log: Path) -> Iterator[Served]:
    """Run a server until the block ends; ``command`` is what ``python -m`` is told, ``variables`` go into its environment."""
    environment = {**os.environ, **variables}
    arguments = [sys.executable, "-m", *command.split()]
    with log.open("w") as output, subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=output, stderr=output) as process:
        try:
            eventually(lambda: _LISTENING.search(log.read_text()) is not None or process.poll() is not None, within=60)
            found = _LISTENING.search(log.read_text())
            assert found is not None, log.read_text()
            yield Served(int(found[1]))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


if _FACE in os.environ:
    _db = TenantDB(os.environ[_URL])
    _world: Any = SimpleNamespace(db=_db, adb=AsyncTenantDB(_db), tokens=new_tokens())  # what a face needs of one
    app = FACES[os.environ[_FACE]](_world).app
