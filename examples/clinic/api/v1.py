"""Everything under /api/v1: one clinic's data, the clinic that the token names."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from fastapi import APIRouter, BackgroundTasks

from examples.clinic import schemas
from examples.clinic.api.crud import crud_router
from examples.clinic.api.depends import CurrentMailer, Registry
from examples.clinic.appointments import appointments
from examples.clinic.consents import consents
from examples.clinic.documents import documents
from examples.clinic.models import Appointment, Category, ConsentTemplate, MedicalRecord, Patient, Practitioner, Product, Service
from examples.clinic.patients import patients
from examples.clinic.roles import may
from examples.clinic.store import Store
from tenantdb.fastapi import AsyncTenantTransaction, CurrentTenant

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

router = APIRouter(prefix="/api/v1")

# -- patients, and the verification of their addresses ---------------------------------------------------------------------------------

patient_routes = crud_router("patients", patients, schemas.PATIENT, audited="patient", erase=patients.erase)


@patient_routes.get("/{row_id}/export", dependencies=[may("patients", "export")], response_model=schemas.PatientFile)
async def export_patient(session: AsyncTenantTransaction, adb: Registry, row_id: UUID) -> Any:
    """All that the clinic keeps about a patient, deleted or not, for the patient to take along (GDPR, articles 15 and 20)."""
    found = await session.run_sync(patients.everything, row_id)
    await adb.audit.record(session, "patient.export", row_id)
    return found


@patient_routes.post("/{row_id}/email-verification", dependencies=[may("patients", "update")], status_code=202)
async def send_code(
    session: AsyncTenantTransaction, adb: Registry, clinic: CurrentTenant, row_id: UUID, mailer: CurrentMailer, tasks: BackgroundTasks
) -> dict[str, str]:
    """Mail a code to the patient, who gives it back to the clinic."""
    email, code = await session.run_sync(patients.begin_verification, row_id)
    await adb.audit.record(session, "patient.send_code", row_id)
    tasks.add_task(mailer.send, email, f"{clinic.name}: your e-mail address", f"Please give this code to {clinic.name}: {code}")
    return {"sent_to": email}


@patient_routes.post("/{row_id}/email-verification/confirm", dependencies=[may("patients", "update")], response_model=schemas.PatientOut)
async def confirm_code(session: AsyncTenantTransaction, adb: Registry, row_id: UUID, data: schemas.Code) -> Any:
    """The patient gave the code back."""
    patient = await session.run_sync(patients.verify_email, row_id, data.code)
    await adb.audit.record(session, "patient.verify_email", row_id)
    return patient


# -- quotes and invoices ---------------------------------------------------------------------------------------------------------------

document_routes = crud_router("documents", documents, schemas.DOCUMENT)


@document_routes.post("/{row_id}/invoice", dependencies=[may("documents", "create")], response_model=schemas.DocumentOut, status_code=201)
async def invoice_quote(session: AsyncTenantTransaction, row_id: UUID) -> Any:
    """Make the invoice of a quote."""
    return await session.run_sync(documents.convert, row_id)


# -- everything -------------------------------------------------------------------------------------------------------------------------

router.include_router(patient_routes)
router.include_router(crud_router("practitioners", practitioners, schemas.PRACTITIONER))
router.include_router(crud_router("appointments", appointments, schemas.APPOINTMENT))
router.include_router(crud_router("medical-records", medical_records, schemas.MEDICAL_RECORD, audited="medical_record"))
router.include_router(document_routes)
router.include_router(crud_router("consents", consents, schemas.CONSENT))
router.include_router(crud_router("consent-templates", consent_templates, schemas.CONSENT_TEMPLATE))
router.include_router(crud_router("products", products, schemas.PRODUCT))
router.include_router(crud_router("services", services, schemas.SERVICE))
router.include_router(crud_router("categories", categories, schemas.CATEGORY))
