"""What the clinic refuses. The domain raises these without knowing of a web framework; api/answers.py turns them into responses."""

from __future__ import annotations

from typing import Any, ClassVar


class ClinicProblem(Exception):
    """Base of what the clinic refuses. `facts` are added to the answer's body."""

    status: ClassVar[int] = 400
    code: ClassVar[str] = "refused"

    def __init__(self, title: str, **facts: Any) -> None:
        super().__init__(title)
        self.title, self.facts = title, facts


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
