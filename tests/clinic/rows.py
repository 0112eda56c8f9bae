"""For each resource: a row that can be created, given what it refers to, and a change to it."""

from __future__ import annotations

from typing import Any

from tests.clinic.people import Person

RESOURCES = (
    "patients",
    "practitioners",
    "appointments",
    "medical-records",
    "documents",
    "consents",
    "consent-templates",
    "products",
    "services",
    "categories",
)

CHANGES: dict[str, dict[str, Any]] = {
    "patients": {"city": "Lyon"},
    "practitioners": {"specialty": "Surgery"},
    "appointments": {"status": "confirmed"},
    "medical-records": {"content": "Healed."},
    "documents": {"notes": "Urgent"},
    "consents": {"signed_at": "2026-03-02T09:00:00Z"},
    "consent-templates": {"body": "I agree."},
    "products": {"price": "4.50"},
    "services": {"duration_minutes": 45},
    "categories": {"description": "Everything else"},
}


async def referred_to(person: Person) -> dict[str, str]:
    """Rows that others refer to, in the person's clinic."""
    return {
        "patient_id": (await person.create("patients", first_name="Maya", last_name="Bauer"))["id"],
        "practitioner_id": (await person.create("practitioners", first_name="Jon", last_name="Reyes"))["id"],
        "category_id": (await person.create("categories", name="Orthodontics"))["id"],
        "service_id": (await person.create("services", name="Check-up", price="60.00", tax_rate="20"))["id"],
        "template_id": (await person.create("consent-templates", title="Sedation", body="I agree to sedation."))["id"],
    }


def sample(resource: str, ids: dict[str, str], mark: str = "one") -> dict[str, Any]:
    """The body of a new row; `mark` keeps names apart."""
    patient_id, practitioner_id, service_id = ids["patient_id"], ids["practitioner_id"], ids["service_id"]
    samples: dict[str, dict[str, Any]] = {
        "patients": {"first_name": mark, "last_name": "Novak", "birth_date": "1984-02-29", "email": "novak@mail.example"},
        "practitioners": {"first_name": mark, "last_name": "Silva", "specialty": "Dentistry", "license_number": "D-77"},
        "appointments": {
            "patient_id": patient_id,
            "practitioner_id": practitioner_id,
            "starts_at": "2026-05-04T09:00:00+02:00",
            "ends_at": "2026-05-04T09:30:00+02:00",
            "reason": mark,
            "items": [{"service_id": service_id, "quantity": "1"}],
        },
        "medical-records": {"patient_id": patient_id, "practitioner_id": practitioner_id, "title": mark, "content": "Caries, 36."},
        "documents": {
            "kind": "quote",
            "patient_id": patient_id,
            "notes": mark,
            "items": [{"description": "Crown", "quantity": "2", "unit_price": "349.90", "tax_rate": "5.5"}],
        },
        "consents": {"patient_id": patient_id, "template_id": ids["template_id"], "title": mark},
        "consent-templates": {"title": mark, "body": "I have understood."},
        "products": {"name": mark, "sku": mark, "price": "3.99", "tax_rate": "20", "category_id": ids["category_id"]},
        "services": {"name": mark, "price": "80", "duration_minutes": 30, "category_id": ids["category_id"]},
        "categories": {"name": mark},
    }
    return samples[resource]
