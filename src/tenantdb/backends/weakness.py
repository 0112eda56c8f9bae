"""What a doctor finds in a server or a tenant's database, and how it is treated: look, mend what is harmless, and look again.

Whether something was mended is read back, never believed: on PostgreSQL a REVOKE by somebody who is not the grantor "succeeds" and changes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from pydantic import SecretStr

from tenantdb.model import DatabaseRole, StrEnum, Tenant, TenantState

_WHOLE = frozenset({TenantState.ACTIVE, TenantState.SUSPENDED, TenantState.MAINTENANCE, TenantState.SPARE})


class Severity(StrEnum):
    """A problem keeps something from working, or opens what must be closed; a warning leaves something more open than it could be."""

    PROBLEM = "problem"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Weakness:
    """One thing that is weaker than it must be. ``code`` is what scripts may rely on; ``subject`` and ``text`` name no customer.

    ``repair`` tells a person how to mend it. ``mend`` does, with a doctor's instrument, where that can harm nobody; whether it was done is
    looked up afterwards.
    """

    code: str
    severity: Severity
    subject: str
    text: str
    repair: str = field(compare=False)
    tenant: UUID | None = None
    mend: Callable[[Any], object] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A weakness, and whether it is gone by now."""

    weakness: Weakness
    repaired: bool = False


@dataclass(frozen=True, slots=True)
class Patient:
    """A tenant to look at. ``now`` is its row at the moment of asking, None where it is gone; ``password`` gives what the registry holds
    for a role at that moment, None where nobody can judge it."""

    tenant: Tenant
    now: Callable[[], Tenant | None] = field(repr=False)
    password: Callable[[DatabaseRole], SecretStr | None] = field(repr=False)

    def unchanged(self) -> bool:
        """Whether what was seen still holds. Somebody may be suspending, moving or purging the tenant at this very moment."""
        now = self.now()
        return now is not None and (now.state, now.fence, now.generation) == (self.tenant.state, self.tenant.fence, self.tenant.generation)

    @property
    def must_be_whole(self) -> bool:
        """Whether its database must be there and closed to others. Otherwise it is being made, or on its way out."""
        return self.tenant.state in _WHOLE and (self.tenant.state is not TenantState.SPARE or self.tenant.ready_at is not None)


@dataclass(frozen=True, slots=True)
class ServerExamination:
    """What a look at a whole server found. ``enterable`` databases exist and let the provisioner in; ``ours_by_name`` are all databases
    and roles, or files, whose name looks like one that tenantdb drew, with a word for their kind."""

    found: Sequence[Diagnosis]
    enterable: frozenset[str]
    ours_by_name: Mapping[str, str]


def treat(look: Callable[[], list[Weakness]], instrument: object, *, repair: bool) -> list[Diagnosis]:
    """What ``look`` finds, mended where that is wanted and harmless. What appears only in the second look is told too."""
    found = list(dict.fromkeys(look()))
    if not repair or all(weakness.mend is None for weakness in found):
        return [Diagnosis(weakness) for weakness in found]
    for weakness in found:
        if weakness.mend is not None:
            weakness.mend(instrument)
    left = list(dict.fromkeys(look()))
    told = [Diagnosis(weakness, repaired=weakness not in left) for weakness in found]
    return told + [Diagnosis(weakness) for weakness in left if weakness not in found]
