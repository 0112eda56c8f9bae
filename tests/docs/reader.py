"""Somebody who follows a page of the documentation: writes its files, runs its commands, and compares what they print with what it shows.

A block with a title is a file. A block of `sh`, and one of `python` without a title, is run; a block of `text` behind it is what it prints,
with `...` for what differs each time. A comment `<!-- not run: reason -->` before a block is the only way past this.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.world import eventually

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

_BLOCK = re.compile(
    r'(?:^<!-- not run: (?P<reason>[^\n]+) -->\n+)?^```(?P<language>[a-z]+)(?: title="(?P<title>[^"\n]+)")?[ ]*\n(?P<text>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)
_HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
_SHOWN = frozenset({"text", "mermaid", "json"})  # never run and never written

# What goes on in a terminal of its own, and what it says when it is ready.
_SERVICES = {
    "uvicorn": "Application startup complete",
    "gunicorn --bind": "Booting worker",
    "tenantdb dev": "Ctrl-C stops",
    "tenantdb worker": "Waiting for work",
}
_PORT_OF_THE_PAGES = "127.0.0.1:8000"


@dataclass(frozen=True)
class Block:
    """A fenced block, and where it stands."""

    where: str
    section: str
    language: str
    text: str
    title: str | None = None
    reason: str | None = None


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    source = (DOCS / page).read_text(encoding="utf-8")
    headings = [(0, ""), *((match.start(), match[1]) for match in _HEADING.finditer(source))]
    found = []
    for match in _BLOCK.finditer(source):
        line = source.count("\n", 0, match.start("language")) + 1
        section = next(title for start, title in reversed(headings) if start <= match.start())
        found.append(Block(f"{page}:{line}", section, match["language"], match["text"], match["title"], match["reason"]))
    fences = re.findall(r"^ *```", source, re.MULTILINE)
    assert 2 * len(found) == len(fences), f"{page}: a fence is written in a way that the tests cannot read"
    return found


@dataclass
class Reader:
    """Works in ``folder``, with ``environment`` beside that of the tests. ``sql`` runs what a page gives to a superuser."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    replace: dict[str, str] = field(default_factory=dict)
    sql: Callable[[str], object] | None = None

    def __post_init__(self) -> None:
        # Programs write to a file or a pipe here, so what they print has the form that it has there.
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("TENANTDB_", "PYTEST_"))},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONWARNINGS": "error",
            **self.environment,
        }
        port = self.environment.setdefault("UVICORN_PORT", str(_free_port()))
        self.replace = {_PORT_OF_THE_PAGES: f"127.0.0.1:{port}", **self.replace}
        self._services: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        for name in list(self._services)[::-1]:
            self._stop(name)

    def follow(self, page: str, *, sections: Callable[[str], bool] = lambda title: True) -> None:
        """From the first block to the last, in the sections whose titles are chosen."""
        printed: str | None = None
        for block in blocks(page):
            if not sections(block.section):
                continue
            if block.reason is not None:
                printed = None
            elif block.title is not None:
                self.write(block.title, block.text)
                printed = None
            elif block.language == "text":
                if printed is not None:
                    self._compare(block, printed)
                printed = None
            elif block.language not in _SHOWN:
                printed = self._do(block)

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self._here(text), encoding="utf-8")

    def run(self, script: str, *, where: str = "") -> str:
        """Run a shell script and return what it printed, on both outputs. What it exports holds for the next."""
        exported = self.folder / ".environment.json"
        remember = f"{shlex.quote(sys.executable)} -c 'import json, os; print(json.dumps(dict(os.environ)))' > {exported.name}"
        done = self._call(["sh", "-e", "-c", f"{script}\n{remember}"])
        assert done.returncode == 0, f"{where}: exit code {done.returncode}\n{script}\n{done.stdout}"
        self.environment = json.loads(exported.read_text())
        exported.unlink()
        return done.stdout

    def _do(self, block: Block) -> str:
        text = self._here(block.text)
        if block.language == "sql":
            assert self.sql is not None, f"{block.where}: nobody runs SQL here"
            for statement in text.split(";"):
                if statement.strip():
                    self.sql(statement)
            return ""
        if block.language == "python":
            done = self._call([sys.executable, "-c", text])
            assert done.returncode == 0, f"{block.where}: exit code {done.returncode}\n{done.stdout}"
            return done.stdout
        assert block.language == "sh", f"{block.where}: a block of {block.language!r} needs a title or a reason not to be run"
        for name, ready in _SERVICES.items():
            if text.startswith(name) and text.count("\n") == 1 and "--once" not in text:
                return self._serve(name, text.strip(), ready)
        return self.run(text, where=block.where)

    def _here(self, text: str) -> str:
        for theirs, ours in self.replace.items():
            text = text.replace(theirs, ours)
        return text

    def _call(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=60,
        )

    def _serve(self, name: str, command: str, ready: str) -> str:
        """Start it, or start it again, and wait until it is ready. The exports that it prints are pasted, as the page says."""
        self._stop(name)
        log = self.folder / f".{name.replace(' ', '-')}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                shlex.split(command),
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                text=True,
            )
        self._services[name] = process

        def up_or_gone() -> bool:
            return ready in log.read_text() or process.poll() is not None

        eventually(up_or_gone, within=60)
        printed = log.read_text()
        assert process.poll() is None, f"{command} ended\n{printed}"
        exports = "\n".join(line for line in printed.splitlines() if line.startswith("export "))
        if exports:
            self.run(exports)
        return printed

    def _stop(self, name: str) -> None:
        process = self._services.pop(name, None)
        if process is not None:
            process.terminate()
            process.wait(timeout=60)

    def _compare(self, block: Block, printed: str) -> None:
        wanted = ".*".join(re.escape(part) for part in self._here(block.text).strip().split("..."))
        assert re.fullmatch(wanted, printed.strip(), re.DOTALL), f"{block.where}: the page shows\n{block.text}\nprinted was\n{printed}"


def pages() -> Iterator[str]:
    for path in sorted(DOCS.rglob("*.md")):
        yield path.relative_to(DOCS).as_posix()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
