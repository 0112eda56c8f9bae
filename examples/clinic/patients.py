"""Patients, and whether the e-mail address we have really reaches them."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session

from examples.clinic.models import Patient, now
from examples.clinic.problems import Conflict, Invalid
from examples.clinic.store import Store

CODE_LIFETIME = timedelta(hours=24)


def _hash(code: str) -> str:
    return hashlib.sha256(code.encode()).hexdigest()


class PatientStore(Store[Patient]):
    def assign(self, session: Session, row: Patient, values: Mapping[str, Any]) -> None:
        """A new address is not a verified one, and a code sent to the old one proves nothing."""
        if "email" in values and values["email"] != row.email:
            row.email_verified_at = row.email_code_hash = row.email_code_expires_at = None
        super().assign(session, row, values)

    def begin_verification(self, session: Session, patient_id: UUID) -> tuple[str, str]:
        """The address and the code to send there; a code sent before is void. Only its hash is kept. Raises: `NotFound`, `Conflict`."""
        patient = self.find(session, patient_id, lock=True)
        if patient.email is None:
            raise Conflict("this patient has no e-mail address")
        code = secrets.token_urlsafe(16)
        patient.email_code_hash, patient.email_code_expires_at = _hash(code), now() + CODE_LIFETIME
        self.flush(session)
        return patient.email, code

    def verify_email(self, session: Session, patient_id: UUID, code: str) -> Patient:
        """The code came back, so the address is the patient's. A code serves once. Raises: `NotFound`, `Invalid`."""
        patient = self.find(session, patient_id, lock=True)
        if patient.email_code_hash is None or patient.email_code_expires_at is None or patient.email_code_expires_at < now():
            raise Invalid("no code is waiting for this patient; send a new one")
        if not hmac.compare_digest(patient.email_code_hash, _hash(code)):
            raise Invalid("this is not the code that was sent")
        patient.email_verified_at = now()
        patient.email_code_hash = patient.email_code_expires_at = None
        self.flush(session)
        return patient


patients = PatientStore(
    Patient,
    order=(Patient.last_name, Patient.first_name),
    search=(Patient.first_name, Patient.last_name, Patient.email, Patient.city),
)
