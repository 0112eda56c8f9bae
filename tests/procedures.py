"""Making a step of a procedure fail, die or wait, for tests of what is left then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from tenantdb.provisioning import procedures
from tenantdb.provisioning.work import Also, Work
from tenantdb.registry.operations import PROVISION

Run = Callable[[Work], Also | None]
Happens = Callable[[Work], Any]
END = "end"
"""What is written in the transaction in which an operation is done, named as if it were its last step."""


def steps_of(kind: str) -> list[str]:
    """The names of a procedure's steps."""
    return [step.name for step in procedures.PROCEDURES[kind].steps]


@contextmanager
def changed(kind: str, step: str, change: Callable[[Run], Run]) -> Iterator[None]:
    """For the length of the block, a step of a kind of operation is what ``change`` makes of it, and is needed in any case."""
    procedure = procedures.PROCEDURES[kind]
    if step == END:
        assert procedure.end is not None
        other = replace(procedure, end=change(procedure.end))
    else:
        assert step in steps_of(kind), f"{kind} has no step {step!r}"
        steps = (replace(each, run=change(each.run), needed=None) if each.name == step else each for each in procedure.steps)
        other = replace(procedure, steps=tuple(steps))
    with patch.object(procedures, "PROCEDURES", {**procedures.PROCEDURES, kind: other}):
        yield


def meanwhile(owner: type, method: str, happens: Callable[..., Any]) -> Any:
    """Something happens inside a step: right before a method is called, with what it is called with."""
    called = getattr(owner, method)

    def first(*arguments: Any, **named: Any) -> Any:
        happens(*arguments)
        return called(*arguments, **named)

    return patch.object(owner, method, first)


def before(step: str, happens: Happens, *, kind: str = PROVISION) -> Any:
    """Something happens right before a step."""

    def change(run: Run) -> Run:
        def first(work: Work) -> Also | None:
            happens(work)
            return run(work)

        return first

    return changed(kind, step, change)


def after(step: str, happens: Happens, *, kind: str = PROVISION) -> Any:
    """Something happens when a step has done all it does, and the journal does not know yet."""

    def change(run: Run) -> Run:
        def then(work: Work) -> Also | None:
            found = run(work)
            happens(work)
            return found

        return then

    return changed(kind, step, change)
