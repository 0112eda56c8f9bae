"""Mails about appointments: that one was booked, and that one is near.

A reminder is marked and sent in one transaction, and the mark comes first: of two workers with the same appointment the second waits for
the first, and then has nothing to do. A worker that dies between the mail and the commit leaves no mark, so the mail is sent again, with
the same key; it is the key that keeps the patient from getting two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import Session

from examples.clinic.models import Appointment, Patient

AHEAD = timedelta(days=1)
_REACHABLE = Patient.deleted_at.is_(None), Patient.email.is_not(None)


@dataclass(frozen=True, slots=True)
class Letter:
    """What is to be sent to a patient, see `Mailer.send`."""

    patient_id: UUID
    to: str
    subject: str
    text: str
    key: str


def _due(at: datetime) -> tuple[ColumnElement[bool], ...]:
    return (
        Appointment.deleted_at.is_(None),
        Appointment.reminded_at.is_(None),
        Appointment.status.in_(("planned", "confirmed")),
        Appointment.starts_at > at,
        Appointment.starts_at <= at + AHEAD,
        Appointment.patient_id.in_(select(Patient.id).where(*_REACHABLE)),
    )


def due(session: Session, at: datetime) -> Sequence[UUID]:
    """The appointments of the day after ``at`` of which nobody was reminded yet."""
    return session.scalars(select(Appointment.id).where(*_due(at)).order_by(Appointment.starts_at)).all()


def claim(session: Session, appointment_id: UUID, at: datetime, *, clinic: str) -> Letter | None:
    """Mark an appointment as reminded of. None where somebody did that, or there is nothing to remind of any more."""
    mark = update(Appointment).where(Appointment.id == appointment_id, *_due(at)).values(reminded_at=at).returning(Appointment.id)
    if session.scalar(mark.execution_options(synchronize_session=False)) is None:
        return None
    return _letter(session, appointment_id, clinic, "reminder", "You are expected at {clinic} on {day} at {time} UTC.")


def confirmation(session: Session, appointment_id: UUID, *, clinic: str) -> Letter | None:
    """That an appointment was booked. None where it is gone, or there is nobody to write to."""
    return _letter(session, appointment_id, clinic, "confirmation", "Your appointment at {clinic} is booked: {day} at {time} UTC.")


def _letter(session: Session, appointment_id: UUID, clinic: str, kind: str, text: str) -> Letter | None:
    booked = select(Patient.id, Patient.email, Appointment.starts_at).join(Appointment, Appointment.patient_id == Patient.id)
    row = session.execute(booked.where(Appointment.id == appointment_id, Appointment.deleted_at.is_(None), *_REACHABLE)).one_or_none()
    if row is None:
        return None
    patient_id, email, at = row
    key = f"{kind}-{appointment_id}-{at:%Y%m%dT%H%MZ}"  # an appointment at another time is worth another mail
    return Letter(patient_id, email, f"{clinic}: your appointment", text.format(clinic=clinic, day=at.date(), time=f"{at:%H:%M}"), key)
