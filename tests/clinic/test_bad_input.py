"""Input that cannot be: refused with 422 and a reason, never a 500, and never echoed."""

from __future__ import annotations

import json
from typing import Any

from tests.clinic.people import Person
from tests.clinic.rows import RESOURCES, referred_to, sample

CANARY = "canary-7f3a"

BAD_PATIENTS: list[dict[str, Any]] = [
    {"first_name": ""},
    {"first_name": "   "},
    {"first_name": None},
    {"first_name": "x" * 101},
    {"first_name": 7},
    {"first_name": "a\0b"},
    {"birth_date": "1984-02-30"},
    {"birth_date": "2984-02-01"},
    {"birth_date": "0001-01-01"},
    {"email": "no address"},
    {"email": "a@b"},
    {"phone": "call me"},
    {"country": "France"},
    {"gender": "?"},
    {"notes": "x" * 20_001},
    {"id": "00000000-0000-4000-8000-000000000000"},
    {"deleted_at": "2026-01-01T00:00:00Z"},
    {"email_verified_at": "2026-01-01T00:00:00Z"},
]


async def test_a_bad_patient_is_neither_created_nor_changed(acme: Person) -> None:
    good = {"first_name": "Maya", "last_name": "Bauer"}
    patient = await acme.create("patients", **good)

    for bad in BAD_PATIENTS:
        answers = [await acme.post("patients", {**good, **bad}), await acme.patch(f"patients/{patient['id']}", bad)]
        assert [answer.status_code for answer in answers] == [422, 422], bad
        assert answers[0].headers["content-type"] == "application/problem+json"
        assert next(iter(bad)) in answers[0].json()["errors"][0]["where"]
    assert (await acme.get(f"patients/{patient['id']}")).json() == patient
    assert (await acme.get("patients")).json()["total"] == 1


async def test_a_price_that_is_none_is_refused(acme: Person) -> None:
    prices: list[Any] = ["12.345", "-0.01", "NaN", "Infinity", "1e30", "10000000.00", "twelve", "", None, True, [], {}]
    for price in prices:
        assert (await acme.post("products", {"name": "Paste", "price": price})).status_code == 422, price


async def test_a_price_is_kept_with_two_decimals(acme: Person) -> None:
    for price, kept in [("12.5", "12.50"), (3, "3.00"), (0.1, "0.10"), ("1e3", "1000.00"), ("0", "0.00"), ("9999999.99", "9999999.99")]:
        product = await acme.create("products", name="Paste", price=price)
        assert product["price"] == kept
        assert (await acme.get(f"products/{product['id']}")).json()["price"] == kept


BAD_APPOINTMENTS: list[dict[str, Any]] = [
    {"ends_at": "2026-05-04T09:00:00+02:00"},
    {"starts_at": "2026-05-04T09:00:00"},  # no time zone
    {"starts_at": "0001-01-01T00:00:00+14:00"},
    {"starts_at": "9999-12-31T23:00:00-12:00"},
    {"status": "perhaps"},
    {"patient_id": "1"},
    {"items": [{"quantity": "1"}]},
    {"items": [{"service_id": "00000000-0000-4000-8000-000000000000"}]},
    {"items": [{"service_id": "00000000-0000-4000-8000-000000000000", "product_id": "00000000-0000-4000-8000-000000000000"}]},
    {"items": None},
]


async def test_a_bad_appointment_is_refused(acme: Person) -> None:
    ids = await referred_to(acme)
    appointment = await acme.create("appointments", **sample("appointments", ids))

    for bad in BAD_APPOINTMENTS:
        assert (await acme.post("appointments", {**sample("appointments", ids), **bad})).status_code == 422, bad
        assert (await acme.patch(f"appointments/{appointment['id']}", bad)).status_code == 422, bad
    assert (await acme.get(f"appointments/{appointment['id']}")).json() == appointment


BAD_DOCUMENTS: list[dict[str, Any]] = [
    {"kind": "receipt"},
    {"items": []},
    {"items": [{"description": "Crown"}]},
    {"items": [{"unit_price": "3.00"}]},
    {"items": [{"description": "Crown", "unit_price": "3.00", "quantity": "0"}]},
    {"items": [{"description": "Crown", "unit_price": "3.00", "quantity": "10000"}]},
    {"items": [{"description": "Crown", "unit_price": "3.00", "tax_rate": "100.01"}]},
    {"items": [{"description": "Crown", "unit_price": "3.00"}] * 201},
    {"due_date": "2020-01-01"},
    {"document_date": "1066-10-14"},
    {"number": "Q-2026-0001"},
    {"total": "1.00"},
    {"status": "paid"},
]


async def test_a_bad_document_is_refused_and_takes_no_number(acme: Person) -> None:
    body = sample("documents", await referred_to(acme))

    for bad in BAD_DOCUMENTS:
        assert (await acme.post("documents", {**body, **bad})).status_code == 422, bad
    assert (await acme.create("documents", **body))["number"].endswith("-0001")


BAD_QUESTIONS: list[dict[str, Any]] = [
    {"limit": 0},
    {"limit": 201},
    {"limit": "all"},
    {"offset": -1},
    {"offset": 10**30},
    {"colour": "red"},
    {"last_name": "a\0b"},
    {"q": "x" * 101},
]


async def test_a_bad_question_is_refused(acme: Person) -> None:
    for params in BAD_QUESTIONS:
        assert (await acme.get("patients", **params)).status_code == 422, params


async def test_what_is_no_json_object_is_refused(acme: Person) -> None:
    for resource in RESOURCES:
        for content in (b"", b"{", b"[]", b"null", b'{"first_name": "\\ud800"}', b"\xff\xfe"):
            assert (await acme.request("POST", resource, content=content)).status_code in (400, 422), (resource, content)


async def test_what_was_sent_is_not_repeated(acme: Person) -> None:
    bad = {"first_name": CANARY * 50, "last_name": {"nested": CANARY}, "birth_date": CANARY, "email": CANARY, "phone": CANARY}
    answers = [
        await acme.post("patients", bad),
        await acme.client.post("/auth/login", json={"email": CANARY, "password": [CANARY]}),
        await acme.client.post("/auth/register", json={"user": {"email": CANARY, "password": {"x": CANARY}}}),
    ]

    assert [answer.status_code for answer in answers] == [422] * 3
    assert not any(CANARY in json.dumps(answer.json()) for answer in answers)


async def test_an_id_that_is_none_is_refused(acme: Person) -> None:
    for row_id in ("1", "x", "00000000", "' OR 1=1"):
        assert (await acme.get(f"patients/{row_id}")).status_code == 422, row_id
