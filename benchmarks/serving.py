"""Applications in processes of their own, one uvicorn worker each, for whoever measures what their clients see.

A child reads what it serves from its standard input, says its port on its standard output, and ends when its input does. Run as a program,
this is the application on tenantdb; `benchmarks.peers.single_tenant` is the other.
"""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy import select

from benchmarks.world import Marker
from tenantdb import AsyncTenantDB, TenantDB
from tenantdb.asgi import RegistryAuth
from tenantdb.fastapi import AsyncTenantSession, install
from tenantdb.tokens import Tokens

ISSUER, AUDIENCE = "https://clinic.example", "clinic"
EXEMPT = ["/auth/*", "/healthz"]


@dataclass(frozen=True, kw_only=True)
class Served:
    """What both sides are told: the key of the tokens; the arguments of a `TenantDB`; and one database's URL, login included, with the
    arguments and the number of its connections."""

    key: str = field(repr=False)
    arguments: Mapping[str, Any] = field(repr=False)
    url: str = field(repr=False)
    connect_args: Mapping[str, Any] = field(repr=False)
    pool_size: int


class Named(BaseModel):
    name: str | None


def application(served: Served) -> FastAPI:
    db = TenantDB(**served.arguments)
    adb = AsyncTenantDB(db)
    app = FastAPI(lifespan=adb.lifespan)
    install(app, adb, authenticate=RegistryAuth(tokens(served.key), adb), exempt=EXEMPT)

    @app.get("/markers/{number}")
    async def marker(number: int, session: AsyncTenantSession) -> Named:
        return Named(name=await session.scalar(select(Marker.name).where(Marker.id == number)))

    return app


def tokens(key: str) -> Tokens:
    return Tokens(key, issuer=ISSUER, audience=AUDIENCE)


def serve(make: Callable[[Served], FastAPI]) -> None:
    """In the child."""
    served = Served(**json.loads(sys.stdin.readline()))
    # With its protocol said: asyncio leaves Nagle's algorithm on otherwise, and an answer in two pieces waits for the client's ACK.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    print(listening.getsockname()[1], flush=True)
    server = uvicorn.Server(uvicorn.Config(make(served), log_level="warning", access_log=False, timeout_keep_alive=120))
    threading.Thread(target=_stop_with_parent, args=(server,), daemon=True).start()
    server.run(sockets=[listening])


def _stop_with_parent(server: uvicorn.Server) -> None:
    sys.stdin.read()
    server.should_exit = True


@contextmanager
def started(module: str, told: str) -> Iterator[Any]:
    """A child that runs ``module``, told one line; stopped at the end of the block. Gives the line that it answers with."""
    child = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(told + "\n")
        child.stdin.flush()
        answer = child.stdout.readline()
        if not answer:
            raise RuntimeError(f"{module} did not start")
        yield answer.strip()
    finally:
        child.stdin.close()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()


@contextmanager
def server(module: str, served: Served) -> Iterator["Client"]:
    """A worker process, and a client of it."""
    with started(module, json.dumps(asdict(served))) as port, Client(int(port)) as client:
        yield client


class Client:
    """One keep-alive connection, and no more HTTP than these servers speak, so that little of what is measured is the client."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = self._socket.makefile("rb")

    def get(self, request: bytes) -> bytes:
        """The body of the answer. Raises: `AssertionError` where its status is not 200."""
        self._socket.sendall(request)
        status, length = self._received.readline(), 0
        while (line := self._received.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        body = self._received.read(length)
        if not status.startswith(b"HTTP/1.1 200 "):
            raise AssertionError(f"the server answered {status!r} {body!r}")
        return body

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc: object) -> None:
        self._received.close()
        self._socket.close()


def request(path: str, token: str) -> bytes:
    lines = (
        f"GET {path} HTTP/1.1",
        "host: clinic.example",
        "user-agent: benchmarks",
        "accept: application/json",
        f"authorization: Bearer {token}",
        "",
        "",
    )
    return "\r\n".join(lines).encode()


if __name__ == "__main__":
    serve(application)
