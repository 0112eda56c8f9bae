"""A process that is killed at one chosen point of an operation: SIGKILL, no `finally`, no goodbye to any server.

The points are before and after everything that leaves a trace: each write of the registry (before its commit, and after) and each act of a
workshop. `Killer.count` runs an operation to its end and says how many there are; `Killer.kill` runs it again and dies at one of them.
"""

from __future__ import annotations

import functools
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tenantdb import Settings, TenantDB
from tenantdb.backends.postgresql.workshop import PostgreSQLWorkshop
from tenantdb.backends.sqlite import SQLiteWorkshop
from tenantdb.registry import transactions

ACTS = (
    "create_database create_roles open_database fit verify create_template close_template drop_template fence set_passwords end_sessions"
    " drop_database drop_roles"
).split()

Act = Callable[[TenantDB], object]
Found = tuple[list[str], str | None]  # the points that were passed, and what was raised


class Killer:
    """Runs an act in a child with a `TenantDB` of its own, made from ``settings`` and prepared by ``prepare``."""

    def __init__(self, settings: Settings, prepare: Callable[[TenantDB], object]) -> None:
        self._settings = settings
        self._prepare = prepare

    def points(self, act: Act) -> list[str]:
        """Run it to its end: the points that it passes, by name."""
        points, problem = self._fork(act, None)
        assert problem is None, problem
        return points

    def kill(self, act: Act, point: int, *, delay: float = 0.0) -> bool:
        """Run it, and kill it at a point, counted from 0, or so many seconds later, in the middle of what begins there. False: it ended
        before that."""
        return self._fork(act, point, delay) == ([], "killed")

    def strike(self, act: Act, point: int, fault: Callable[[], object]) -> str | None:
        """Run it, and let a fault happen at a point, such as a lost connection or a full disk: what came of it, None where it succeeded."""
        return self._fork(act, point, fault=fault)[1]

    def _fork(self, act: Act, point: int | None, delay: float = 0.0, fault: Callable[[], object] | None = None) -> Found:
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the child makes nothing of the parent's threads
            child = os.fork()
        if child == 0:
            os.close(reader)
            self._run(act, point, fault or functools.partial(_die, delay), writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as told:
            said = told.read()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return [], "killed"
        found: Found = pickle.loads(said)
        return found

    def _run(self, act: Act, point: int | None, fault: Callable[[], object], writer: int) -> None:
        passed: list[str] = []
        problem: str | None = None

        def come_to(name: str) -> None:
            passed.append(name)
            if len(passed) - 1 == point:
                fault()

        try:
            with _watched(come_to):
                db = TenantDB(self._settings)
                self._prepare(db)
                act(db)
        except BaseException:
            problem = traceback.format_exc()
        with os.fdopen(writer, "wb") as told:
            told.write(pickle.dumps((passed, problem)))
        sys.stdout.flush()
        os._exit(0)


def _die(delay: float) -> None:
    if delay:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    else:
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _watched(come_to: Callable[[str], None]) -> Iterator[None]:
    """In a child that ends after this, so nothing is put back."""
    for kind in (PostgreSQLWorkshop, SQLiteWorkshop):
        for name in ACTS:
            setattr(kind, name, _wrapped(getattr(kind, name), name, come_to))
    begin = transactions.begin

    @contextmanager
    def watched_begin(engine: Any, *, immediate: bool) -> Iterator[Any]:
        with begin(engine, immediate=immediate) as connection:
            yield connection
            if immediate:
                come_to("before a commit")
        if immediate:
            come_to("after a commit")

    transactions.begin = watched_begin
    yield


def _wrapped(act: Callable[..., Any], name: str, come_to: Callable[[str], None]) -> Callable[..., Any]:
    def watched(*args: Any, **options: Any) -> Any:
        come_to(f"before {name}")
        result = act(*args, **options)
        come_to(f"after {name}")
        return result

    return watched
