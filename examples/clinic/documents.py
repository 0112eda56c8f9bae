"""Quotes and invoices: numbers without gaps, sums that are exact, and how a quote becomes an invoice.

The number is drawn before anything is read. Its counter's row stays locked until the transaction ends, so those who write documents of one
kind and year go one after the other, each sees what the one before has written, and a number that is not used is rolled back with the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from examples.clinic.models import Appointment, Document, DocumentCounter, DocumentItem, Patient, Practitioner, Product, Service
from examples.clinic.problems import Conflict, Invalid
from examples.clinic.schemas import DocumentCreate, to_cents
from examples.clinic.store import Store, given, load

LARGEST_TOTAL = Decimal("9999999999.99")

NEXT: Mapping[str, Mapping[str, frozenset[str]]] = {
    "quote": {"draft": frozenset({"issued"}), "issued": frozenset({"accepted", "declined"})},
    "invoice": {"draft": frozenset({"issued"}), "issued": frozenset({"paid", "cancelled"})},
}
"""Which status may follow which. What is not here is an end."""

ALWAYS_OPEN = frozenset({"status", "notes"})
"""What may change when the document is no longer a draft."""


def draw_number(session: Session, kind: str, year: int) -> str:
    """The next number of a kind and year, e.g. Q-2026-0001."""
    insert: Any = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}[session.get_bind().dialect.name]
    first = insert(DocumentCounter).values(kind=kind, year=year, last=1)
    drawn = first.on_conflict_do_update(
        index_elements=[DocumentCounter.kind, DocumentCounter.year], set_={"last": DocumentCounter.last + 1}
    ).returning(DocumentCounter.last)
    return f"{kind[0].upper()}-{year}-{session.execute(drawn).scalar_one():04d}"


def line(position: int, item: Mapping[str, Any], listed: Product | Service | None) -> DocumentItem:
    """One line with its sums; what it does not say itself comes from the catalogue. Rounded per line, so the lines add up to the total."""
    description = item["description"] or (listed.name if listed else "")
    unit_price = item["unit_price"] if item["unit_price"] is not None or listed is None else listed.price
    tax_rate = item["tax_rate"] if item["tax_rate"] is not None else listed.tax_rate if listed else Decimal("0.00")
    net = to_cents(item["quantity"] * unit_price)
    return DocumentItem(
        position=position,
        product_id=item["product_id"],
        service_id=item["service_id"],
        description=description,
        quantity=item["quantity"],
        unit_price=unit_price,
        tax_rate=tax_rate,
        net=net,
        tax=to_cents(net * tax_rate / 100),
    )


class DocumentStore(Store[Document]):
    def create(self, session: Session, data: BaseModel) -> Document:
        assert isinstance(data, DocumentCreate)
        document = Document(kind=data.kind, status="draft", number=draw_number(session, data.kind, data.document_date.year))
        self.assign(session, document, data.model_dump(exclude={"kind"}))
        session.add(document)
        self.flush(session)
        return document

    def update(self, session: Session, row_id: UUID, data: BaseModel) -> Document:
        """Raises: `Conflict` for what is no draft any more, for a status that cannot follow, and for a date outside the number's year."""
        document = self.find(session, row_id, lock=True)
        values = given(data)
        if document.status != "draft" and not set(values) <= ALWAYS_OPEN:
            raise Conflict(f"the {document.kind} {document.number} is {document.status}; only a draft can be rewritten")
        status = values.get("status", document.status)
        if status != document.status and status not in NEXT[document.kind].get(document.status, ()):
            raise Conflict(f"the {document.kind} {document.number} is {document.status} and cannot become {status}")
        if "document_date" in values and values["document_date"].year != document.document_date.year:
            raise Conflict(f"the {document.kind} {document.number} was numbered in {document.document_date.year} and must be dated then")
        self.assign(session, document, values)
        self.flush(session)
        return document

    def delete(self, session: Session, row_id: UUID) -> None:
        """Raises: `Conflict` for what is no draft any more: it was handed out and is cancelled or declined instead."""
        document = self.find(session, row_id, lock=True)
        if document.status != "draft":
            raise Conflict(f"the {document.kind} {document.number} is {document.status}; only a draft can be deleted")
        super().delete(session, row_id)

    def convert(self, session: Session, quote_id: UUID) -> Document:
        """The invoice of a quote, made once; the quote counts as accepted. Raises: `NotFound`, `Conflict`."""
        today = datetime.now(timezone.utc).date()
        number = draw_number(session, "invoice", today.year)
        quote = self.find(session, quote_id, lock=True)
        if quote.kind != "quote":
            raise Conflict(f"{quote.number} is an invoice already")
        if quote.status == "declined":
            raise Conflict(f"the quote {quote.number} was declined")
        invoice = Document(
            kind="invoice",
            status="draft",
            number=number,
            quote_id=quote.id,
            patient_id=quote.patient_id,
            practitioner_id=quote.practitioner_id,
            appointment_id=quote.appointment_id,
            document_date=today,
            notes=quote.notes,
            net_total=quote.net_total,
            tax_total=quote.tax_total,
            total=quote.total,
            items=[_copy(item) for item in quote.items],
        )
        quote.status = "accepted"
        session.add(invoice)
        self.flush(session)  # a second invoice of the same quote breaks the unique quote_id
        return invoice

    def assign(self, session: Session, row: Document, values: Mapping[str, Any]) -> None:
        """Items, where given, replace those that are there, and the sums are drawn anew."""
        values = dict(values)
        items: Sequence[Mapping[str, Any]] | None = values.pop("items", None)
        super().assign(session, row, values)
        if row.due_date is not None and row.due_date < row.document_date:
            raise Invalid("due_date must not be before document_date")
        if items is None:
            return
        products = load(session, Product, "items.product_id", {item["product_id"] for item in items if item["product_id"]})
        services = load(session, Service, "items.service_id", {item["service_id"] for item in items if item["service_id"]})
        lines = []
        for position, item in enumerate(items):
            listed = products.get(item["product_id"]) or services.get(item["service_id"])
            lines.append(line(position, item, listed))
        row.items = lines
        row.net_total = sum((item.net for item in row.items), Decimal("0.00"))
        row.tax_total = sum((item.tax for item in row.items), Decimal("0.00"))
        row.total = row.net_total + row.tax_total
        if row.total > LARGEST_TOTAL:
            raise Invalid(f"the total is larger than {LARGEST_TOTAL}")


def _copy(item: DocumentItem) -> DocumentItem:
    copied = ("position", "product_id", "service_id", "description", "quantity", "unit_price", "tax_rate", "net", "tax")
    return DocumentItem(**{name: getattr(item, name) for name in copied})


documents = DocumentStore(
    Document,
    order=(Document.document_date, Document.number),
    references={"patient_id": Patient, "practitioner_id": Practitioner, "appointment_id": Appointment},
)
