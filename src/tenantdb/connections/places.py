"""A place in a server's budget for a connection that no pool knows: the provisioner's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tenantdb.connections.budget import ServerBudget
from tenantdb.connections.ledger import Work
from tenantdb.connections.waiting import ThreadWaiter
from tenantdb.errors import BudgetExhausted


@contextmanager
def hold_place(budget: ServerBudget, label: str, timeout: float) -> Iterator[None]:
    """Wait for a place, and free it at the end. Raises: `BudgetExhausted`."""
    began = budget.clock()
    shelf = budget.shelf(-1, label)  # no tenant has this number
    claim = budget.claim(shelf, Work.ADMINISTRATION, began + timeout, ThreadWaiter)
    if claim.unit is None:
        raise BudgetExhausted(label, budget.clock() - began, budget.stats(), [])
    if claim.victim is not None:
        budget.take_over(claim.unit, claim.victim)
    budget.opened(claim.unit, float("inf"))
    try:
        yield
    finally:
        budget.drop(claim.unit, "owner")
