"""What the clinic refuses. The domain raises these without knowing of a web framework; each front end turns them into responses:
problem+json (RFC 9457), the shape in which tenantdb's own refusals are answered too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar


class ClinicProblem(Exception):
    """Base of what the clinic refuses. `facts` are added to the answer's body."""

    status: ClassVar[int] = 400
    code: ClassVar[str] = "refused"

    def __init__(self, title: str, **facts: Any) -> None:
        super().__init__(title)
        self.title, self.facts = title, facts

    @property
    def body(self) -> dict[str, Any]:
        return {
            "type": f"urn:clinic:problem:{self.code}",
            "title": self.title,
            "status": self.status,
            "code": self.code,
            **self.facts,
        }


class NotFound(ClinicProblem):
    """No such row in this clinic, or it was deleted."""

    status = 404
    code = "not-found"


class Conflict(ClinicProblem):
    """What is there does not allow it."""

    status = 409
    code = "conflict"


class ClinicRequired(Conflict):
    """The user works for several clinics and must say for which one. Fact: `clinics`, the user's own."""

    code = "clinic-required"


class Invalid(ClinicProblem):
    """The input has the right shape and makes no sense, e.g. it names a patient who is not there."""

    status = 422
    code = "invalid"


def malformed(errors: Iterable[Mapping[str, Any]]) -> Invalid:
    """Where the input is wrong and why, as pydantic says it, without the input: it may hold a password, or a patient's data, and would end
    in somebody's log."""
    told = [{"where": ".".join(str(part) for part in error["loc"]), "problem": error["msg"]} for error in errors]
    return Invalid("the input is not valid", errors=told)
