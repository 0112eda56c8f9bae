"""Making a step of a procedure fail, die or wait, for tests of what is left then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from tenantdb.provisioning import procedures
from tenantdb.provisioning.journal import Step
from tenantdb.provisioning.work import Also, Work

Happens = Callable[[Work], Any]


@contextmanager
def changed(kind: str, step: str, change: Callable[[Step], Step]) -> Iterator[None]:
    """For the length of the block, a step of a kind of operation is what ``change`` makes of it."""
    procedure = procedures.PROCEDURES[kind]
    assert step in dict(procedure.steps), f"{kind} has no step {step!r}"
    steps = tuple((name, change(fn) if name == step else fn) for name, fn in procedure.steps)
    with patch.object(procedures, "PROCEDURES", {**procedures.PROCEDURES, kind: replace(procedure, steps=steps)}):
        yield


def before(kind: str, step: str, happens: Happens) -> Any:
    """Something happens right before a step."""

    def change(fn: Step) -> Step:
        def first(work: Work) -> Also | None:
            happens(work)
            return fn(work)

        return first

    return changed(kind, step, change)


def after(kind: str, step: str, happens: Happens) -> Any:
    """Something happens when a step has done all it does, and the journal does not know yet."""

    def change(fn: Step) -> Step:
        def then(work: Work) -> Also | None:
            found = fn(work)
            happens(work)
            return found

        return then

    return changed(kind, step, change)
