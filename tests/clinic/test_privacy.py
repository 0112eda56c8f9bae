"""What a patient may ask for: all that is kept about them, and that it be erased; and a copy of a clinic that reaches nobody."""

from __future__ import annotations

from uuid import uuid4

import pytest
from sqlalchemy import inspect, select, text

from examples.clinic.db import reach_nobody
from examples.clinic.models import Base, Patient, Practitioner
from tenantdb import TenantDB, errors
from tests.clinic.people import Person, Reception
from tests.clinic.rows import referred_to, sample
from tests.world import World

OURS = ("appointments", "medical-records", "documents", "consents")


async def patient_with_everything(acme: Person) -> tuple[str, dict[str, str]]:
    """A patient with a row of each kind, and one of another patient beside."""
    ids = await referred_to(acme)
    rows = {resource: (await acme.create(resource, **sample(resource, ids)))["id"] for resource in OURS}
    other = {**ids, "patient_id": (await acme.create("patients", first_name="Ben", last_name="Novak"))["id"]}
    for resource in OURS:
        await acme.create(resource, **sample(resource, other, "other"))
    return ids["patient_id"], rows


async def test_a_patient_gets_all_that_is_kept_about_them_and_of_nobody_else(acme: Person, db: TenantDB) -> None:
    patient, rows = await patient_with_everything(acme)
    await acme.delete(f"consents/{rows['consents']}")  # which hides it, and keeps it

    answer = await acme.get(f"patients/{patient}/export")

    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told["patient"]["id"] == patient
    assert {name: [row["id"] for row in told[name.replace("-", "_")]] for name in OURS} == {name: [row] for name, row in rows.items()}
    assert told["documents"][0]["items"][0]["description"] == "Crown"
    (entry,) = db.audit.search("acme-dental", records=True, action="patient.export")
    assert (entry.object, entry.actor) == (patient, str(db.users.get(acme.email).id))


async def test_erasing_leaves_nothing_of_a_patient_and_all_of_the_others(acme: Person, db: TenantDB) -> None:
    patient, _ = await patient_with_everything(acme)

    assert (await acme.request("DELETE", f"patients/{patient}", params={"permanent": True})).status_code == 204

    assert (await acme.get(f"patients/{patient}")).status_code == 404
    assert (await acme.post(f"patients/{patient}/restore")).status_code == 404
    with db.session("acme-dental") as session:
        for table in Base.metadata.sorted_tables:
            if table.name in inspect(session.connection()).get_table_names():
                left = [dict(row) for row in session.execute(select(table)).mappings()]
                assert not any(patient in map(str, row.values()) for row in left), table.name
    for resource in OURS:
        assert len(await acme.ids(resource)) == 1
    (entry,) = db.audit.search("acme-dental", records=True, action="patient.erase")
    assert entry.object == patient
    assert db.audit.verify("acme-dental", records=True).ok


async def test_a_patient_with_invoices_is_not_erased(acme: Person) -> None:
    patient, rows = await patient_with_everything(acme)
    assert (await acme.post(f"documents/{rows['documents']}/invoice")).status_code == 201

    answer = await acme.request("DELETE", f"patients/{patient}", params={"permanent": True})

    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    assert (await acme.get(f"patients/{patient}")).status_code == 200


@pytest.mark.parametrize("role", ["owner", "admin", "user", "readonly"])
async def test_who_may_export_and_erase_is_in_the_table_of_roles(acme: Person, reception: Reception, role: str) -> None:
    person = await reception.hire("acme-dental", role)
    maya = (await acme.create("patients", first_name="Maya", last_name="Bauer"))["id"]

    answers = [
        await person.get(f"patients/{maya}/export"),
        await person.request("DELETE", f"patients/{maya}", params={"permanent": True}),
    ]

    assert [answer.status_code for answer in answers] == ([200, 204] if role in ("owner", "admin") else [403, 403])


async def test_what_is_not_there_or_another_clinic_s_is_not_found(acme: Person, reception: Reception) -> None:
    other = await reception.sign_up("globex-dental")
    maya = (await acme.create("patients", first_name="Maya", last_name="Bauer"))["id"]

    for patient in (maya, str(uuid4())):
        assert (await other.get(f"patients/{patient}/export")).status_code == 404
        assert (await other.request("DELETE", f"patients/{patient}", params={"permanent": True})).status_code == 404
    assert (await acme.get(f"patients/{maya}")).status_code == 200


async def test_a_copy_of_a_clinic_reaches_nobody(acme: Person, db: TenantDB, world: World) -> None:
    await acme.create("patients", first_name="Maya", last_name="Bauer", email="maya@mail.example", phone="+41 31 555 01 01")
    await acme.create("practitioners", first_name="Jon", last_name="Reyes", email="jon@mail.example")
    with pytest.raises(errors.ConfigError):
        db.clone("acme-dental", "acme-staging")
    db.neutralise(reach_nobody)

    db.clone("acme-dental", "acme-staging")

    with db.session("acme-staging") as session:
        (patient,) = session.scalars(select(Patient)).all()
        assert (patient.first_name, patient.email, patient.phone) == ("Maya", None, None)
        assert session.scalars(select(Practitioner.email)).all() == [None]
    with world.inside(db.tenants.get("acme-dental"), db) as connection:
        assert connection.scalar(text("SELECT email FROM patients")) == "maya@mail.example"
