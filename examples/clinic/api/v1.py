"""Everything under /api/v1: one clinic's data, the clinic that the token names."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from fastapi import APIRouter, BackgroundTasks

from examples.clinic import schemas
from examples.clinic.api.crud import crud_router
from examples.clinic.api.depends import CurrentMailer, Registry, may
from examples.clinic.documents import documents
from examples.clinic.patients import patients
from examples.clinic.resources import RESOURCES
from tenantdb.fastapi import AsyncTenantTransaction, CurrentTenant

router = APIRouter(prefix="/api/v1")

# -- patients, and the verification of their addresses ---------------------------------------------------------------------------------

routes = {name: crud_router(name, resource) for name, resource in RESOURCES.items()}
patient_routes, document_routes = routes["patients"], routes["documents"]


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


@document_routes.post("/{row_id}/invoice", dependencies=[may("documents", "create")], response_model=schemas.DocumentOut, status_code=201)
async def invoice_quote(session: AsyncTenantTransaction, row_id: UUID) -> Any:
    """Make the invoice of a quote."""
    return await session.run_sync(documents.convert, row_id)


# -- everything -------------------------------------------------------------------------------------------------------------------------

for made in routes.values():
    router.include_router(made)
