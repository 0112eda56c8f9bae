"""Each resource: created, read, listed, changed, deleted, restored; pages and filters."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from tests.clinic.people import Person
from tests.clinic.rows import CHANGES, RESOURCES, referred_to, sample


async def test_a_row_is_created_read_changed_deleted_and_restored(acme: Person) -> None:
    ids = await referred_to(acme)
    for resource in RESOURCES:
        await one_life(acme, resource, sample(resource, ids))


async def one_life(acme: Person, resource: str, body: dict[str, Any]) -> None:
    row = await acme.create(resource, **body)
    path = f"{resource}/{row['id']}"

    read = (await acme.get(path)).json()
    assert read == row
    assert row["id"] in await acme.ids(resource)

    changed = (await acme.patch(path, CHANGES[resource])).json()
    unchanged = set(row) - set(CHANGES[resource]) - {"updated_at"}
    assert {name: changed[name] for name in unchanged} == {name: row[name] for name in unchanged}
    assert {name: changed[name] for name in CHANGES[resource]} == CHANGES[resource]
    assert changed["updated_at"] > row["updated_at"]
    assert (await acme.get(path)).json() == changed

    total = (await acme.get(resource)).json()["total"]
    assert (await acme.delete(path)).status_code == 204
    assert (await acme.get(path)).status_code == 404
    assert (await acme.patch(path, CHANGES[resource])).status_code == 404
    assert (await acme.delete(path)).status_code == 404
    assert row["id"] not in await acme.ids(resource)
    assert (await acme.get(resource)).json()["total"] == total - 1

    restored = await acme.post(f"{path}/restore")
    assert restored.status_code == 200
    assert {**restored.json(), "updated_at": None} == {**changed, "updated_at": None}
    assert (await acme.get(path)).json() == restored.json()
    assert row["id"] in await acme.ids(resource)
    assert (await acme.post(f"{path}/restore")).status_code == 200  # a living row stays as it is


async def test_what_was_never_there_is_not_found(acme: Person) -> None:
    for resource in RESOURCES:
        path = f"{resource}/{uuid4()}"
        answers = [
            await acme.get(path),
            await acme.patch(path, CHANGES[resource]),
            await acme.delete(path),
            await acme.post(f"{path}/restore"),
        ]
        assert [answer.status_code for answer in answers] == [404] * 4, resource
        assert answers[0].headers["content-type"] == "application/problem+json"
        assert answers[0].json()["code"] == "not-found"


async def test_pages_follow_each_other_without_overlap_or_gap(acme: Person) -> None:
    created = {(await acme.create("patients", first_name="Twin", last_name="Same"))["id"] for _ in range(7)}

    pages = [await acme.ids("patients", limit=3, offset=offset) for offset in (0, 3, 6, 9)]

    assert [len(page) for page in pages] == [3, 3, 1, 0]
    assert {row_id for page in pages for row_id in page} == created
    body = (await acme.get("patients", limit=3, offset=3)).json()
    assert (body["total"], body["limit"], body["offset"]) == (7, 3, 3)


async def test_patients_are_found_by_what_they_are_called(acme: Person) -> None:
    maya = (await acme.create("patients", first_name="Maya", last_name="Bauer", city="Graz"))["id"]
    ben = (await acme.create("patients", first_name="Ben", last_name="O'Brien", email="ben_100%@mail.example", birth_date="1990-01-02"))[
        "id"
    ]

    assert await acme.ids("patients") == [maya, ben]  # by last name
    assert await acme.ids("patients", q="aYa") == [maya]
    assert await acme.ids("patients", q="o'brien") == [ben]
    assert await acme.ids("patients", q="n_1") == [ben]
    assert await acme.ids("patients", q="_") == [ben]  # a character like any other, no wildcard
    assert await acme.ids("patients", q="%") == [ben]
    assert await acme.ids("patients", last_name="Bauer", city="Graz") == [maya]
    assert await acme.ids("patients", last_name="Bauer", city="Linz") == []
    assert await acme.ids("patients", birth_date="1990-01-02") == [ben]


async def test_appointments_are_found_by_day_person_and_status(acme: Person) -> None:
    ids = await referred_to(acme)
    other = await acme.create("practitioners", first_name="Ines", last_name="Costa")
    monday = await acme.create("appointments", **sample("appointments", ids))
    tuesday = await acme.create(
        "appointments",
        **{
            **sample("appointments", ids),
            "practitioner_id": other["id"],
            "starts_at": "2026-05-05T00:00:00+02:00",
            "ends_at": "2026-05-05T01:00:00+02:00",
            "status": "confirmed",
        },
    )

    assert monday["starts_at"] == "2026-05-04T07:00:00Z"
    assert await acme.ids("appointments", starts_at_from="2026-05-04T22:00:00Z") == [tuesday["id"]]
    assert await acme.ids("appointments", starts_at_before="2026-05-04T22:00:00Z") == [monday["id"]]
    assert await acme.ids("appointments", practitioner_id=other["id"]) == [tuesday["id"]]
    assert await acme.ids("appointments", status="planned") == [monday["id"]]
    assert await acme.ids("appointments", patient_id=ids["patient_id"]) == [monday["id"], tuesday["id"]]


async def test_the_items_of_an_appointment_are_replaced_as_a_whole(acme: Person) -> None:
    ids = await referred_to(acme)
    paste = await acme.create("products", name="Paste", price="4.20")
    appointment = await acme.create("appointments", **sample("appointments", ids))
    path = f"appointments/{appointment['id']}"

    items = [{"product_id": paste["id"], "quantity": "2.5"}, {"service_id": ids["service_id"], "notes": "after the first"}]
    changed = (await acme.patch(path, {"items": items})).json()["items"]

    assert [(item["product_id"], item["service_id"], item["quantity"], item["notes"]) for item in changed] == [
        (paste["id"], None, "2.50", None),
        (None, ids["service_id"], "1.00", "after the first"),
    ]
    assert (await acme.get(path)).json()["items"] == changed
    assert (await acme.patch(path, {"reason": "pain"})).json()["items"] == changed
    assert (await acme.patch(path, {"items": []})).json()["items"] == []


async def test_a_name_is_taken_only_by_the_living(acme: Person) -> None:
    first = await acme.create("categories", name="Implants")
    assert (await acme.post("categories", {"name": "Implants"})).status_code == 409

    await acme.delete(f"categories/{first['id']}")
    second = await acme.create("categories", name="Implants")

    refused = await acme.post(f"categories/{first['id']}/restore")
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert (await acme.get(f"categories/{first['id']}")).status_code == 404
    assert (await acme.patch(f"categories/{second['id']}", {"name": "Consultation"})).status_code == 409  # of the first rows
    assert (await acme.get(f"categories/{second['id']}")).json()["name"] == "Implants"


async def test_a_deleted_patient_cannot_be_written_about(acme: Person) -> None:
    ids = await referred_to(acme)
    about = ("appointments", "medical-records", "documents", "consents")
    kept = {resource: (await acme.create(resource, **sample(resource, ids)))["id"] for resource in about}
    await acme.delete(f"patients/{ids['patient_id']}")

    for resource in about:
        refused = await acme.post(resource, sample(resource, ids, "two"))

        assert (refused.status_code, refused.json()["missing"]) == (422, [ids["patient_id"]])
        assert await acme.ids(resource) == [kept[resource]]  # what was written before remains


async def test_a_clinic_begins_with_categories_and_consent_templates(acme: Person) -> None:
    categories = (await acme.get("categories")).json()["items"]
    templates = (await acme.get("consent-templates")).json()["items"]

    assert [row["name"] for row in categories] == ["Consultation", "Supplies", "Treatment"]
    assert [row["title"] for row in templates] == ["Personal data", "Treatment"]


async def test_a_consent_keeps_the_words_that_were_agreed_to(acme: Person) -> None:
    ids = await referred_to(acme)
    consent = await acme.create("consents", patient_id=ids["patient_id"], template_id=ids["template_id"])
    assert (consent["title"], consent["body"]) == ("Sedation", "I agree to sedation.")

    await acme.patch(f"consent-templates/{ids['template_id']}", {"body": "Something else."})

    path = f"consents/{consent['id']}"
    assert (await acme.get(path)).json()["body"] == "I agree to sedation."
    assert (await acme.patch(path, {"body": "Anything"})).status_code == 422
    signed = await acme.patch(path, {"signed_at": "2026-03-01T10:00:00+01:00", "withdrawn_at": "2026-04-01T10:00:00Z"})
    assert (signed.json()["signed_at"], signed.json()["withdrawn_at"]) == ("2026-03-01T09:00:00Z", "2026-04-01T10:00:00Z")


async def test_a_patient_s_address_is_verified_by_the_code_that_was_sent_there(acme: Person, mails: Any) -> None:
    patient = await acme.create("patients", first_name="Maya", last_name="Bauer", email="maya@mail.example")
    path = f"patients/{patient['id']}"

    sent = await acme.post(f"{path}/email-verification")
    assert (sent.status_code, sent.json()) == (202, {"sent_to": "maya@mail.example"})
    code = mails.last_word("maya@mail.example")
    assert (await acme.post(f"{path}/email-verification/confirm", {"code": "no"})).status_code == 422
    verified = await acme.post(f"{path}/email-verification/confirm", {"code": code})
    assert verified.json()["email_verified_at"] is not None
    assert (await acme.post(f"{path}/email-verification/confirm", {"code": code})).status_code == 422  # it serves once

    same = await acme.patch(path, {"email": "maya@mail.example"})
    assert same.json()["email_verified_at"] is not None
    moved = await acme.patch(path, {"email": "maya@other.example"})
    assert moved.json()["email_verified_at"] is None


async def test_a_code_proves_nothing_for_an_address_that_changed_meanwhile(acme: Person, mails: Any) -> None:
    patient = await acme.create("patients", first_name="Maya", last_name="Bauer", email="maya@mail.example")
    path = f"patients/{patient['id']}"
    await acme.post(f"{path}/email-verification")
    await acme.patch(path, {"email": "somebody.else@mail.example"})

    refused = await acme.post(f"{path}/email-verification/confirm", {"code": mails.last_word("maya@mail.example")})

    assert refused.status_code == 422
    nobody = await acme.create("patients", first_name="No", last_name="Mail")
    assert (await acme.post(f"patients/{nobody['id']}/email-verification")).status_code == 409
