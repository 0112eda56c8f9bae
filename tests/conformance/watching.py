"""A process that watches the registry, does what it is told line by line, and answers each line. Run by test_invalidation.py.

The first line is JSON: what its `TenantDB` is made of, the tenant, and by what it may learn of changes: ``notices``, ``looking``, or
``nothing``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from tenantdb import TenantDB, errors
from tests.conformance.app import MARKER
from tests.world import eventually

EVER = 3600.0


def restrict(db: TenantDB, way: str) -> None:
    """Leave a process one way to learn of changes, or none; before it watches. What it knows it believes for ever, so that time tells it
    nothing."""
    registry = db._registry
    registry._cache._ttl = EVER
    for answers in (registry.standings._answers, registry.domains._answers):
        answers._ttl = EVER
    registry.revocations._ttl = EVER
    registry._watcher._every = 0.05 if way == "looking" else EVER
    if way != "notices":
        registry._watcher._listen = lambda: None


def settled(db: TenantDB, way: str) -> None:
    """Watch, and wait until whatever is told from now on is heard, and what was told before has been looked for."""
    watched = threading.Event()
    end = db._registry.changes.subscribe(lambda change: watched.set() if change.kind == "everything" else None)
    db.watch()
    if way == "notices":
        assert watched.wait(20)
    end()


def marker(session: Any) -> str:
    try:
        found = session.scalar(MARKER)
        session.commit()
        return str(found)
    except errors.TenantDBError as error:
        return error.code


def fresh_marker(db: TenantDB, tenant: str) -> str:
    try:
        with db.session(tenant) as session:
            return marker(session)
    except errors.TenantDBError as error:  # it is refused when the session is made, where the record is in memory
        return error.code


def in_a_child(db: TenantDB) -> str:
    """Fork, and tell whether the child watches by itself and only when it is asked to."""
    mine, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            before = db._registry._watcher._watch is not None
            db.watch()
            eventually(lambda: db._registry._watcher.listening or db._registry._watcher._watch._deaf)  # type: ignore[union-attr]
            os.write(theirs, f"{before} {db._registry._watcher._watch is not None}".encode())
            db.close()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(theirs)
    said = os.read(mine, 100).decode()
    os.close(mine)
    return said


def main() -> None:
    order = json.loads(sys.stdin.readline())
    db = TenantDB(**order["given"])
    restrict(db, order["way"])
    settled(db, order["way"])
    held = db.session(order["tenant"])
    for line in sys.stdin:
        word = line.strip()
        if word == "held":
            answer = marker(held)
        elif word == "new":
            answer = fresh_marker(db, order["tenant"])
        else:
            answer = in_a_child(db)
        print(answer, flush=True)
    held.close()
    db.close()


if __name__ == "__main__":
    main()
