"""What a clinic keeps, by the name that it has in addresses: one table, from which every front end makes its routes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session

from examples.clinic import schemas
from examples.clinic.appointments import appointments
from examples.clinic.consents import consents
from examples.clinic.documents import documents
from examples.clinic.models import Appointment, Category, ConsentTemplate, MedicalRecord, Patient, Practitioner, Product, Service
from examples.clinic.patients import patients
from examples.clinic.schemas import Shapes
from examples.clinic.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Resource:
    """One table, as it is seen from outside.

    ``audited`` is what a row is called in the clinic's audit log. Then a read is a transaction too, and no row leaves the clinic's database
    before it is written down there who asked for it. ``erase`` removes a row for ever, with all that belongs to it. ``announced_by`` is the
    task of worker.py that is told of a new row once it is committed.
    """

    store: Store[Any]
    shapes: Shapes
    audited: str | None = None
    erase: Callable[[Session, UUID], object] | None = None
    announced_by: str | None = None

    def announce(self, session: Any, row_id: UUID, worker: Any) -> None:
        """Have the worker's task run for a new row once it is committed. Without a worker, a Celery application, nobody is told."""
        if worker is not None and self.announced_by is not None:
            worker.tasks[self.announced_by].delay_on_commit(session, str(row_id))


practitioners = Store(
    Practitioner,
    order=(Practitioner.last_name, Practitioner.first_name),
    search=(Practitioner.first_name, Practitioner.last_name, Practitioner.specialty),
)
categories = Store(Category, order=(Category.name,), search=(Category.name, Category.description))
products = Store(Product, order=(Product.name,), search=(Product.name, Product.sku), references={"category_id": Category})
services = Store(Service, order=(Service.name,), search=(Service.name,), references={"category_id": Category})
consent_templates = Store(ConsentTemplate, order=(ConsentTemplate.title,), search=(ConsentTemplate.title,))
medical_records = Store(
    MedicalRecord,
    order=(MedicalRecord.recorded_at,),
    search=(MedicalRecord.title, MedicalRecord.content),
    references={"patient_id": Patient, "practitioner_id": Practitioner, "appointment_id": Appointment},
)

RESOURCES: Mapping[str, Resource] = {
    "patients": Resource(store=patients, shapes=schemas.PATIENT, audited="patient", erase=patients.erase),
    "practitioners": Resource(store=practitioners, shapes=schemas.PRACTITIONER),
    "appointments": Resource(store=appointments, shapes=schemas.APPOINTMENT, announced_by="clinic.confirm_appointment"),
    "medical-records": Resource(store=medical_records, shapes=schemas.MEDICAL_RECORD, audited="medical_record"),
    "documents": Resource(store=documents, shapes=schemas.DOCUMENT),
    "consents": Resource(store=consents, shapes=schemas.CONSENT),
    "consent-templates": Resource(store=consent_templates, shapes=schemas.CONSENT_TEMPLATE),
    "products": Resource(store=products, shapes=schemas.PRODUCT),
    "services": Resource(store=services, shapes=schemas.SERVICE),
    "categories": Resource(store=categories, shapes=schemas.CATEGORY),
}
