"""Who reads or changes what is written down about a patient leaves an entry in the clinic's own log."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from tenantdb import TenantDB
from tests.clinic.people import Person, Reception
from tests.world import World


def told(db: TenantDB, clinic: str, action: str = "patient.") -> list[tuple[str, str | None, str]]:
    """Action, object and actor, the oldest first."""
    return [(entry.action, entry.object, entry.actor) for entry in reversed(db.audit.search(clinic, records=True, action=action))]


async def test_every_read_and_write_of_a_patient_is_told_with_who_did_it(acme: Person, reception: Reception, db: TenantDB) -> None:
    maya = (await acme.create("patients", first_name="Maya", last_name="Bauer"))["id"]
    nurse = await reception.hire("acme-dental", "readonly")
    await nurse.get(f"patients/{maya}")
    await nurse.get("patients")
    await acme.patch(f"patients/{maya}", {"city": "Bern"})
    await acme.delete(f"patients/{maya}")
    await acme.post(f"patients/{maya}/restore")
    owner, reader = (str(db.users.get(person.email).id) for person in (acme, nurse))

    assert told(db, "acme-dental") == [
        ("patient.create", maya, owner),
        ("patient.read", maya, reader),
        ("patient.list", None, reader),
        ("patient.update", maya, owner),
        ("patient.delete", maya, owner),
        ("patient.restore", maya, owner),
    ]
    listed, updated = (db.audit.search("acme-dental", records=True, action=f"patient.{verb}")[0] for verb in ("list", "update"))
    assert (listed.details, updated.details) == ({"shown": [maya]}, {"fields": ["city"]})
    assert "Maya" not in repr(db.audit.search("acme-dental", records=True))
    assert db.audit.verify("acme-dental", records=True).ok


async def test_what_was_refused_or_not_found_leaves_no_entry_beside_the_records(acme: Person, reception: Reception, db: TenantDB) -> None:
    nurse = await reception.hire("acme-dental", "readonly")
    assert (await nurse.post("patients", {"first_name": "Maya", "last_name": "Bauer"})).status_code == 403
    assert (await acme.get("patients/00000000-0000-4000-8000-000000000000")).status_code == 404

    assert told(db, "acme-dental") == []
    db._registry.audit._refusals.flush()
    (refused,) = db.audit.search("acme-dental", action="refused.role-required")
    assert (refused.actor, refused.details["count"]) == (str(db.users.get(nurse.email).id), 1)


async def test_no_patient_is_shown_where_it_cannot_be_written_down(acme: Person, db: TenantDB, world: World) -> None:
    maya = (await acme.create("patients", first_name="Maya", last_name="Bauer"))["id"]
    assert (await acme.get(f"patients/{maya}")).status_code == 200
    log = "tenantdb.audit_head" if world.backend == "postgresql" else "tenantdb_audit_records_head"
    with world.inside(db.tenants.get("acme-dental"), db) as connection:
        connection.execute(text(f"DROP TABLE {log}"))

    answer = await acme.get(f"patients/{maya}")

    assert (answer.status_code, answer.json()["code"]) == (503, "audit-not-ready")
    assert "Maya" not in answer.text


@pytest.mark.parametrize("resource", ["patients", "medical-records"])
async def test_both_kinds_of_health_data_are_audited(acme: Person, db: TenantDB, resource: str) -> None:
    await acme.get(resource)

    assert told(db, "acme-dental", {"patients": "patient.list", "medical-records": "medical_record.list"}[resource])
