"""A Redis of the tests' own, which pip cannot install: on a free port of this machine, gone when the block ends. ``nox -s tests-services``
installs it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import redis


def program() -> str:
    """TEST_REDIS_SERVER, which nox sets, goes first."""
    found = os.environ.get("TEST_REDIS_SERVER") or shutil.which("redis-server")
    if found is None:
        raise FileNotFoundError("no redis-server: run `nox -s tests-services`, or name the program in TEST_REDIS_SERVER")
    return found


@contextmanager
def redis_server() -> Iterator[str]:
    """Its URL. It keeps nothing on disk."""
    with tempfile.TemporaryDirectory(prefix="tenantdb-redis-") as folder:
        port = _free_port()
        options = {"port": str(port), "bind": "127.0.0.1", "save": "", "appendonly": "no", "dir": folder, "logfile": f"{folder}/log"}
        process = subprocess.Popen([program(), *(part for name, value in options.items() for part in (f"--{name}", value))])
        try:
            _wait_for(port, process)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()
            process.wait(timeout=30)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    with redis.Redis(port=port) as client:
        while True:
            try:
                client.ping()
                return
            except redis.ConnectionError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
            time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
