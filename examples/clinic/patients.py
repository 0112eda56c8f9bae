"""Patients, and whether the e-mail address we have really reaches them."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from examples.clinic.models import Appointment, Consent, Document, MedicalRecord, Patient, now
from examples.clinic.problems import Conflict, Invalid
from examples.clinic.store import Store

CODE_LIFETIME = timedelta(hours=24)


def _hash(code: str) -> str:
    return hashlib.sha256(code.encode()).hexdigest()


# What belongs to a patient, in the order in which it can be removed. Items go with their appointment or document.
OF_A_PATIENT = {"medical_records": MedicalRecord, "consents": Consent, "documents": Document, "appointments": Appointment}


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

    def everything(self, session: Session, patient_id: UUID) -> dict[str, Any]:
        """The patient and all rows about them, deleted ones too. Raises: `NotFound`."""
        patient = self._one(session, select(Patient), patient_id, lock=False)
        rows = {
            name: session.scalars(select(model).where(model.patient_id == patient_id).order_by(model.created_at, model.id)).all()
            for name, model in OF_A_PATIENT.items()
        }
        return {"patient": patient, **rows}

    def erase(self, session: Session, patient_id: UUID) -> None:
        """Remove the patient and all rows about them, deleted before or not. Invoices must be kept for years, and keep the patient.

        Raises: `NotFound`, `Conflict`.
        """
        self._one(session, select(Patient), patient_id, lock=True)
        invoices = select(Document.id).where(Document.patient_id == patient_id, Document.kind == "invoice").limit(1)
        if session.scalar(invoices) is not None:
            raise Conflict("this patient has invoices, which the law wants kept; delete the patient instead")
        for model in OF_A_PATIENT.values():
            session.execute(delete(model).where(model.patient_id == patient_id))
        session.execute(delete(Patient).where(Patient.id == patient_id))


patients = PatientStore(
    Patient,
    order=(Patient.last_name, Patient.first_name),
    search=(Patient.first_name, Patient.last_name, Patient.email, Patient.city),
)
