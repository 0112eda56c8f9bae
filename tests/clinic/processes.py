"""The clinic's processes as its README starts them, on free ports of this machine and with the settings of a test's database."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tenantdb import TenantDB
from tests.clinic.people import TOKEN_KEY
from tests.world import World

ROOT = Path(__file__).parents[2]
PATIENCE = 60  # seconds for a process to start or to end, and for what it is to do


@dataclass
class Process:
    """A running process, what it has printed, and what the pattern found that it was waited for with."""

    popen: subprocess.Popen[str]
    printed: list[str] = field(default_factory=list)
    found: str = ""

    @property
    def output(self) -> str:
        return "".join(self.printed)


def environment(world: World, db: TenantDB, **more: str) -> dict[str, str]:
    """What a process of the clinic is given to work on ``db``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TENANTDB_", "CLINIC_", "PG"))}
    given = {f"TENANTDB_{name.upper()}": value for name, value in world.given(db).items() if name != "migrations"}
    settings = {name: ",".join(value) if isinstance(value, list) else str(value) for name, value in given.items()}
    return {**kept, **settings, "CLINIC_TOKEN_KEY": TOKEN_KEY, "PYTHONDONTWRITEBYTECODE": "1", **more}


@contextmanager
def started(*words: str, env: dict[str, str], until: str) -> Iterator[Process]:
    """``python -m ...``, from when its output matches ``until``. Stopped at the end, as an operator stops it."""
    popen = subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    process, ready = Process(popen), threading.Event()

    def read() -> None:
        assert popen.stdout is not None
        for line in popen.stdout:
            process.printed.append(line)
            if not ready.is_set() and (found := re.search(until, line)):
                process.found = found[1] if found.lastindex else found[0]
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(PATIENCE) and process.found, process.output
        yield process
    finally:
        if popen.poll() is None:
            popen.terminate()
            try:
                popen.wait(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                popen.kill()
                popen.wait()
        reader.join(PATIENCE)
        assert popen.stdout is not None
        popen.stdout.close()


@contextmanager
def fastapi_served(env: dict[str, str]) -> Iterator[str]:
    """Its address."""
    words = ("uvicorn", "examples.clinic.app:app", "--port", "0")
    with started(*words, env=env, until=r"running on (http://[\d.:]+)") as process:
        yield process.found


@contextmanager
def flask_served(env: dict[str, str], app: str = "examples.clinic.flask_app:create_app()", *options: str) -> Iterator[str]:
    words = ("gunicorn", app, "--workers", "2", "--bind", "127.0.0.1:0", *options)
    with started(*words, env=env, until=r"Listening at: (http://[\d.:]+)") as process:
        yield process.found
