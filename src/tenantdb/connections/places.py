"""A place in a server's budget for a connection that no pool knows: the provisioner's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tenantdb.connections.budget import ServerBudget
from tenantdb.connections.ledger import Work
from tenantdb.connections.waiting import ThreadWaiter
from tenantdb.errors import BudgetExhausted


def take_place(budget: ServerBudget, label: str, work: Work, timeout: float, number: int = -1) -> Callable[[], None]:
    """Wait for a place; what is returned frees it, from any thread. ``number``: a negative one, which no tenant has; those of one number
    share what a tenant may have. Raises: `BudgetExhausted`."""
    began = budget.clock()
    shelf = budget.shelf(number, label)
    claim = budget.claim(shelf, work, began + timeout, ThreadWaiter)
    if claim.unit is None:
        raise BudgetExhausted(label, budget.clock() - began, budget.stats(), [])
    if claim.victim is not None:
        budget.take_over(claim.unit, claim.victim)
    budget.opened(claim.unit, float("inf"))
    return functools.partial(budget.drop, claim.unit, "owner")


@contextmanager
def hold_place(budget: ServerBudget, label: str, timeout: float) -> Iterator[None]:
    """Wait for a place, and free it at the end. Raises: `BudgetExhausted`."""
    free = take_place(budget, label, Work.ADMINISTRATION, timeout)
    try:
        yield
    finally:
        free()
