"""What an application adds to a tenant's life: seeds, and functions called before and after an event.

A ``before_`` hook that raises stops the operation with nothing done; ``before_provision`` comes when the sign-up is written down and
before anything is made on a server, so the tenant is failed then, with the reason. An ``after_`` hook comes when the change is
committed, so one that raises is logged and undoes nothing. None receives a secret. Around a migration there are ``before_migrate`` and
``after_migrate`` with the tenant, ``before_rollout`` with the `Rollout` and ``after_rollout`` with its `Report`; those never stop it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from tenantdb.errors import ConfigError, describe_with_frames
from tenantdb.model import Tenant

Seed = Callable[[Session, Tenant], None]
StaticSeed = Callable[[Session], None]
Hook = Callable[[Tenant], None]
S = TypeVar("S", bound=Callable[..., Any])

VERBS = (
    "provision",
    "activate",
    "suspend",
    "maintenance",
    "update",
    "delete",
    "restore",
    "purge",
    "rotate_credentials",
    "adopt",
    "give_back",
    "migrate",
    "rollout",
)
EVENTS = tuple(f"{when}_{verb}" for verb in VERBS for when in ("before", "after"))

logger = logging.getLogger("tenantdb.hooks")


class Hooks:
    """The seeds, neutralisers and hooks of one `TenantDB`, in the order of their registration."""

    def __init__(self) -> None:
        self.seeds: list[Seed] = []
        self.static_seeds: list[StaticSeed] = []
        self.neutralisers: list[Seed] = []
        self._hooks: dict[str, list[Hook]] = {event: [] for event in EVENTS}

    def seed(self, fn: S, *, static: bool) -> S:
        (self.static_seeds if static else self.seeds).append(fn)
        return fn

    def neutralise(self, fn: S) -> S:
        self.neutralisers.append(fn)
        return fn

    def has_before(self, *verbs: str) -> bool:
        """Whether anybody wants to be asked first."""
        return self.wants(*(f"before_{verb}" for verb in verbs))

    def on(self, event: str) -> Callable[[S], S]:
        """Register a function for an event. Raises: `ConfigError` for an event that does not exist."""
        if event not in self._hooks:
            raise ConfigError(f"there is no event {event!r}; there are {', '.join(EVENTS)}")

        def register(fn: S) -> S:
            self._hooks[event].append(fn)
            return fn

        return register

    def extend(self, other: Hooks) -> None:
        """Take over another's seeds and hooks, behind one's own."""
        self.seeds += other.seeds
        self.static_seeds += other.static_seeds
        self.neutralisers += other.neutralisers
        for event, hooks in other._hooks.items():
            self._hooks[event] += hooks

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Nobody is asked or told in the block; seeds stay. For tenants that are made to be thrown away."""
        kept, self._hooks = self._hooks, {event: [] for event in self._hooks}
        try:
            yield
        finally:
            self._hooks = kept

    def before(self, verb: str, tenant: Tenant) -> None:
        for hook in self._hooks[f"before_{verb}"]:
            hook(tenant)

    def after(self, verb: str, tenant: Tenant) -> None:
        self.tell(f"after_{verb}", tenant, f" for tenant {tenant.id}; the change stands")

    def wants(self, *events: str) -> bool:
        """Whether anybody listens to one of these."""
        return any(self._hooks[event] for event in events)

    def tell(self, event: str, subject: Any, aftermath: str = "; what it was told of goes on") -> None:
        """Call everybody who listens; whoever raises is logged, with the ``aftermath``, and nothing comes of it."""
        for hook in self._hooks[event]:
            try:
                hook(subject)
            except Exception as error:
                logger.error("the %s hook %r failed%s. %s", event, _name_of(hook), aftermath, describe_with_frames(error))


def _name_of(hook: Hook) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)
