"""Quotes and invoices: exact money, numbers without gaps, the way from one to the other."""

from __future__ import annotations

import asyncio
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

import pytest

from examples.clinic.documents import line
from tests.clinic.people import Person
from tests.clinic.rows import referred_to

YEAR = datetime.now(timezone.utc).year


def item(quantity: str, unit_price: str, tax_rate: str = "20") -> dict[str, str]:
    return {"description": "Something", "quantity": quantity, "unit_price": unit_price, "tax_rate": tax_rate}


async def written(person: Person, kind: str = "quote", *items: dict[str, str], **values: Any) -> dict[str, Any]:
    patient = await person.create("patients", first_name="Maya", last_name="Bauer")
    return await person.create("documents", kind=kind, patient_id=patient["id"], items=items or [item("1", "10.00")], **values)


@pytest.mark.parametrize(
    ("quantity", "unit_price", "tax_rate", "net", "tax"),
    [
        ("3", "19.99", "20", "59.97", "11.99"),
        ("1", "0.05", "10", "0.05", "0.01"),  # half a cent goes up, also where a float would lie below it
        ("1", "1.45", "10", "1.45", "0.15"),
        ("1.50", "0.33", "0", "0.50", "0.00"),
        ("9999.99", "99999.99", "5.5", "999998900.00", "54999939.50"),
    ],
)
def test_a_line_is_rounded_half_up(quantity: str, unit_price: str, tax_rate: str, net: str, tax: str) -> None:
    values = dict.fromkeys(("product_id", "service_id")) | {"description": "x"}
    numbers = {"quantity": Decimal(quantity), "unit_price": Decimal(unit_price), "tax_rate": Decimal(tax_rate)}

    made = line(0, values | numbers, None)

    assert (str(made.net), str(made.tax)) == (net, tax)


async def test_money_is_exact_and_written_as_text(acme: Person) -> None:
    document = await written(acme, "quote", item("3", "19.99"), item("1", "0.10", "5.5"), item("7", "0.10", "5.5"))

    sums = {name: document[name] for name in ("net_total", "tax_total", "total")}
    assert sums == {"net_total": "60.77", "tax_total": "12.04", "total": "72.81"}
    assert [(row["net"], row["tax"]) for row in document["items"]] == [("59.97", "11.99"), ("0.10", "0.01"), ("0.70", "0.04")]
    assert (await acme.get(f"documents/{document['id']}")).json() == document


async def test_the_largest_amount_survives_the_database(acme: Person) -> None:
    rows = [item("9999.99", "9999999.99", "0")] * 10
    patient = await acme.create("patients", first_name="Maya", last_name="Bauer")
    assert (await acme.post("documents", {"kind": "quote", "patient_id": patient["id"], "items": rows})).status_code == 422

    document = await written(acme, "quote", item("1000", "9999999.99", "0"))

    assert document["total"] == "9999999990.00"
    assert (await acme.get(f"documents/{document['id']}")).json()["total"] == "9999999990.00"


async def test_a_line_takes_from_the_catalogue_what_it_does_not_say(acme: Person) -> None:
    ids = await referred_to(acme)
    document = await acme.create(
        "documents",
        kind="invoice",
        patient_id=ids["patient_id"],
        items=[{"service_id": ids["service_id"], "quantity": "2"}, {"service_id": ids["service_id"], "unit_price": "0", "tax_rate": "0"}],
    )
    first, second = document["items"]
    assert (first["description"], first["unit_price"], first["tax_rate"], first["net"], first["tax"]) == (
        "Check-up",
        "60.00",
        "20.00",
        "120.00",
        "24.00",
    )
    assert (second["unit_price"], second["tax_rate"]) == ("0.00", "0.00")

    await acme.patch(f"services/{ids['service_id']}", {"price": "99.00", "name": "Examination"})

    assert (await acme.get(f"documents/{document['id']}")).json() == document


async def test_each_kind_and_year_is_numbered_on_its_own(acme: Person) -> None:
    numbers = [
        (await written(acme, kind, document_date=day))["number"]
        for kind, day in [
            ("quote", "2025-12-31"),
            ("quote", "2025-01-01"),
            ("invoice", "2025-06-01"),
            ("quote", "2026-01-01"),
            ("invoice", "2025-06-02"),
        ]
    ]
    assert numbers == ["Q-2025-0001", "Q-2025-0002", "I-2025-0001", "Q-2026-0001", "I-2025-0002"]
    assert len(await acme.ids("documents", kind="quote")) == 3
    assert len(await acme.ids("documents", document_date_from="2025-06-01", document_date_before="2026-01-01")) == 3
    assert len(await acme.ids("documents", number="I-2025-0002")) == 1


async def test_a_document_that_is_refused_leaves_no_gap(acme: Person) -> None:
    await written(acme)
    nobody = {"kind": "quote", "patient_id": "00000000-0000-4000-8000-000000000000", "items": [item("1", "1")]}
    assert (await acme.post("documents", nobody)).status_code == 422

    assert (await written(acme))["number"] == f"Q-{YEAR}-0002"


async def test_documents_written_at_once_are_numbered_without_gap_or_duplicate(acme: Person) -> None:
    patient = await acme.create("patients", first_name="Maya", last_name="Bauer")
    body = {"kind": "invoice", "patient_id": patient["id"], "items": [item("1", "10.00")]}
    wrong = {**body, "patient_id": "00000000-0000-4000-8000-000000000000"}

    answers = await asyncio.gather(*(acme.post("documents", wrong if number % 4 == 3 else body) for number in range(16)))

    assert sorted(answer.status_code for answer in answers) == [201] * 12 + [422] * 4
    numbers = sorted(answer.json()["number"] for answer in answers if answer.status_code == 201)
    assert numbers == [f"I-{YEAR}-{number:04d}" for number in range(1, 13)]


async def test_a_quote_becomes_one_invoice(acme: Person) -> None:
    quote = await written(acme, "quote", item("3", "19.99"), notes="As discussed", document_date=f"{YEAR}-01-01")

    made = await acme.post(f"documents/{quote['id']}/invoice")

    assert made.status_code == 201
    invoice = made.json()
    same = ("patient_id", "net_total", "tax_total", "total", "notes")
    assert {name: invoice[name] for name in same} == {name: quote[name] for name in same}
    assert (invoice["kind"], invoice["number"], invoice["status"], invoice["quote_id"]) == (
        "invoice",
        f"I-{YEAR}-0001",
        "draft",
        quote["id"],
    )
    assert [{**row, "id": None} for row in invoice["items"]] == [{**row, "id": None} for row in quote["items"]]
    assert not {row["id"] for row in invoice["items"]} & {row["id"] for row in quote["items"]}
    assert (await acme.get(f"documents/{quote['id']}")).json()["status"] == "accepted"

    again = await acme.post(f"documents/{quote['id']}/invoice")
    assert again.status_code == 409
    assert (await acme.post(f"documents/{invoice['id']}/invoice")).status_code == 409
    assert (await written(acme, "invoice"))["number"] == f"I-{YEAR}-0002"


async def test_a_quote_converted_twice_at_once_becomes_one_invoice(acme: Person) -> None:
    quote = await written(acme)

    answers = await asyncio.gather(*(acme.post(f"documents/{quote['id']}/invoice") for _ in range(5)))

    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409, 409]
    assert (await acme.get("documents", kind="invoice")).json()["total"] == 1


async def test_a_declined_quote_becomes_no_invoice(acme: Person) -> None:
    quote = await written(acme)
    for status in ("issued", "declined"):
        assert (await acme.patch(f"documents/{quote['id']}", {"status": status})).status_code == 200

    assert (await acme.post(f"documents/{quote['id']}/invoice")).status_code == 409


async def test_a_draft_can_be_rewritten_and_what_was_issued_cannot(acme: Person) -> None:
    invoice = await written(acme, "invoice", document_date="2026-02-01")
    path = f"documents/{invoice['id']}"

    rewritten = (await acme.patch(path, {"items": [item("2", "7.50", "0")], "due_date": "2026-03-01"})).json()
    assert (rewritten["total"], rewritten["number"], len(rewritten["items"])) == ("15.00", invoice["number"], 1)
    assert (await acme.patch(path, {"document_date": "2027-01-01"})).status_code == 409  # numbered in 2026
    assert (await acme.patch(path, {"due_date": "2026-01-01"})).status_code == 422
    assert (await acme.patch(path, {"kind": "quote"})).status_code == 422
    assert (await acme.patch(path, {"status": "paid"})).status_code == 409

    assert (await acme.patch(path, {"status": "issued"})).status_code == 200
    assert (await acme.patch(path, {"items": [item("1", "1.00")]})).status_code == 409
    assert (await acme.delete(path)).status_code == 409
    assert (await acme.patch(path, {"notes": "Reminded"})).status_code == 200
    assert (await acme.patch(path, {"status": "paid"})).json()["status"] == "paid"
    assert (await acme.patch(path, {"status": "cancelled"})).status_code == 409


async def test_a_deleted_draft_keeps_its_number(acme: Person) -> None:
    first = await written(acme)
    await acme.delete(f"documents/{first['id']}")

    assert (await written(acme))["number"] == f"Q-{YEAR}-0002"
    assert (await acme.post(f"documents/{first['id']}/restore")).json()["number"] == f"Q-{YEAR}-0001"
