"""The tenant schema: what one clinic keeps in its own database. No table names the clinic; the database does.

Portable between PostgreSQL and SQLite. Rows are never removed: `deleted_at` hides them, and unique indexes count only the living. Items are
parts of their appointment or document: they come and go with it. Defaults are computed here and not by the database, so that a flushed row
is complete and nothing has to be read again.
"""

from __future__ import annotations

from datetime import date, datetime, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import CheckConstraint, Date, DateTime, ForeignKey, Index, MetaData, Numeric, String, Text, UniqueConstraint, text
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import TypeDecorator, TypeEngine


class UTCDateTime(TypeDecorator[datetime]):
    """An aware time, kept in UTC. SQLite has no time zones, so there it is stored naive and comes back aware."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a time zone has no meaning here")
        return value.astimezone(timezone.utc)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=timezone.utc) if value.tzinfo is None else value.astimezone(timezone.utc)


class Decimal2(TypeDecorator[Decimal]):
    """An exact number with two decimals. SQLite keeps it as a float, whose 15 digits hold any NUMERIC(12, 2) without loss."""

    impl = Numeric
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        precision: int | None = getattr(self.impl, "precision", None)
        return dialect.type_descriptor(Numeric(precision, 2, asdecimal=False) if dialect.name == "sqlite" else Numeric(precision, 2))

    def process_result_value(self, value: Any, dialect: Dialect) -> Decimal | None:
        return None if value is None else Decimal(f"{value:.2f}")


MONEY = Decimal2(12, 2)
QUANTITY = Decimal2(10, 2)
PERCENT = Decimal2(5, 2)


def now() -> datetime:
    return datetime.now(timezone.utc)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Row(Base):
    """What every table of its own has: an id that says nothing, and when the row was made, changed and deleted."""

    __abstract__ = True

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4, sort_order=-1)
    created_at: Mapped[datetime] = mapped_column(UTCDateTime, default=now, sort_order=90)
    updated_at: Mapped[datetime] = mapped_column(UTCDateTime, default=now, onupdate=now, sort_order=91)
    deleted_at: Mapped[datetime | None] = mapped_column(UTCDateTime, sort_order=92)


def _unique_among_living(table: str, column: str) -> Index:
    """A deleted row gives its name free."""
    living = text("deleted_at IS NULL")
    return Index(f"uq_{table}_{column}", column, unique=True, postgresql_where=living, sqlite_where=living)


# -- people ----------------------------------------------------------------------------------------------------------------------------


class Patient(Row):
    __tablename__ = "patients"
    __table_args__ = (Index("ix_patients_last_name", "last_name", "first_name"), Index("ix_patients_email", "email"))

    first_name: Mapped[str] = mapped_column(String(100))
    last_name: Mapped[str] = mapped_column(String(100))
    birth_date: Mapped[date | None] = mapped_column(Date)

    gender: Mapped[str | None] = mapped_column(String(20))
    email: Mapped[str | None] = mapped_column(String(254))
    phone: Mapped[str | None] = mapped_column(String(30))
    address: Mapped[str | None] = mapped_column(String(200))
    postal_code: Mapped[str | None] = mapped_column(String(20))
    city: Mapped[str | None] = mapped_column(String(100))
    country: Mapped[str | None] = mapped_column(String(2))
    insurance_number: Mapped[str | None] = mapped_column(String(50))
    notes: Mapped[str | None] = mapped_column(Text)

    email_verified_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    email_code_hash: Mapped[str | None] = mapped_column(String(64))
    email_code_expires_at: Mapped[datetime | None] = mapped_column(UTCDateTime)


class Practitioner(Row):
    __tablename__ = "practitioners"
    __table_args__ = (Index("ix_practitioners_last_name", "last_name", "first_name"),)

    first_name: Mapped[str] = mapped_column(String(100))
    last_name: Mapped[str] = mapped_column(String(100))

    title: Mapped[str | None] = mapped_column(String(50))
    specialty: Mapped[str | None] = mapped_column(String(100))
    email: Mapped[str | None] = mapped_column(String(254))
    phone: Mapped[str | None] = mapped_column(String(30))
    license_number: Mapped[str | None] = mapped_column(String(50))


# -- the catalogue ---------------------------------------------------------------------------------------------------------------------


class Category(Row):
    __tablename__ = "categories"
    __table_args__ = (_unique_among_living("categories", "name"),)

    name: Mapped[str] = mapped_column(String(100))
    description: Mapped[str | None] = mapped_column(Text)


class Product(Row):
    """Something the clinic sells."""

    __tablename__ = "products"
    __table_args__ = (_unique_among_living("products", "sku"),)

    name: Mapped[str] = mapped_column(String(200))
    description: Mapped[str | None] = mapped_column(Text)
    sku: Mapped[str | None] = mapped_column(String(50))
    price: Mapped[Decimal] = mapped_column(MONEY)
    tax_rate: Mapped[Decimal] = mapped_column(PERCENT)
    category_id: Mapped[UUID | None] = mapped_column(ForeignKey("categories.id"), index=True)


class Service(Row):
    """Something the clinic does."""

    __tablename__ = "services"

    name: Mapped[str] = mapped_column(String(200))
    description: Mapped[str | None] = mapped_column(Text)
    duration_minutes: Mapped[int | None]
    price: Mapped[Decimal] = mapped_column(MONEY)
    tax_rate: Mapped[Decimal] = mapped_column(PERCENT)
    category_id: Mapped[UUID | None] = mapped_column(ForeignKey("categories.id"), index=True)


# -- appointments ----------------------------------------------------------------------------------------------------------------------

APPOINTMENT_STATUSES = ("planned", "confirmed", "done", "cancelled", "missed")


class Appointment(Row):
    __tablename__ = "appointments"
    __table_args__ = (
        CheckConstraint("ends_at > starts_at", name="ends_after_start"),
        CheckConstraint(f"status IN {APPOINTMENT_STATUSES}", name="status"),
    )

    patient_id: Mapped[UUID] = mapped_column(ForeignKey("patients.id"), index=True)
    practitioner_id: Mapped[UUID] = mapped_column(ForeignKey("practitioners.id"), index=True)
    starts_at: Mapped[datetime] = mapped_column(UTCDateTime, index=True)
    ends_at: Mapped[datetime] = mapped_column(UTCDateTime)
    status: Mapped[str] = mapped_column(String(20), default="planned")
    reason: Mapped[str | None] = mapped_column(String(200))
    notes: Mapped[str | None] = mapped_column(Text)
    reminded_at: Mapped[datetime | None] = mapped_column(UTCDateTime)

    items: Mapped[list[AppointmentItem]] = relationship(order_by="AppointmentItem.position", cascade="all, delete-orphan", lazy="selectin")


class AppointmentItem(Base):
    """A service to be done, or a product to be handed out, at an appointment."""

    __tablename__ = "appointment_items"
    __table_args__ = (CheckConstraint("(product_id IS NULL) <> (service_id IS NULL)", name="product_or_service"),)

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    appointment_id: Mapped[UUID] = mapped_column(ForeignKey("appointments.id", ondelete="CASCADE"), index=True)
    position: Mapped[int]
    product_id: Mapped[UUID | None] = mapped_column(ForeignKey("products.id"))
    service_id: Mapped[UUID | None] = mapped_column(ForeignKey("services.id"))
    quantity: Mapped[Decimal] = mapped_column(QUANTITY)
    notes: Mapped[str | None] = mapped_column(String(200))


# -- quotes and invoices ---------------------------------------------------------------------------------------------------------------

DOCUMENT_KINDS = ("quote", "invoice")
DOCUMENT_STATUSES = ("draft", "issued", "accepted", "declined", "paid", "cancelled")


class Document(Row):
    """A quote or an invoice. `number` is drawn once, without gaps per kind and year; `quote_id` is the quote that an invoice came from."""

    __tablename__ = "documents"
    __table_args__ = (
        CheckConstraint(f"kind IN {DOCUMENT_KINDS}", name="kind"),
        CheckConstraint(f"status IN {DOCUMENT_STATUSES}", name="status"),
        UniqueConstraint("number"),
        UniqueConstraint("quote_id"),
    )

    kind: Mapped[str] = mapped_column(String(10))
    number: Mapped[str] = mapped_column(String(20))
    status: Mapped[str] = mapped_column(String(20), default="draft")
    patient_id: Mapped[UUID] = mapped_column(ForeignKey("patients.id"), index=True)
    practitioner_id: Mapped[UUID | None] = mapped_column(ForeignKey("practitioners.id"))
    appointment_id: Mapped[UUID | None] = mapped_column(ForeignKey("appointments.id"))
    quote_id: Mapped[UUID | None] = mapped_column(ForeignKey("documents.id"))
    document_date: Mapped[date] = mapped_column(Date)
    due_date: Mapped[date | None] = mapped_column(Date)
    notes: Mapped[str | None] = mapped_column(Text)
    net_total: Mapped[Decimal] = mapped_column(MONEY)
    tax_total: Mapped[Decimal] = mapped_column(MONEY)
    total: Mapped[Decimal] = mapped_column(MONEY)

    items: Mapped[list[DocumentItem]] = relationship(order_by="DocumentItem.position", cascade="all, delete-orphan", lazy="selectin")


class DocumentItem(Base):
    """One line. Text, price and tax are copies: what was written to a patient stays when the catalogue changes."""

    __tablename__ = "document_items"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    document_id: Mapped[UUID] = mapped_column(ForeignKey("documents.id", ondelete="CASCADE"), index=True)
    position: Mapped[int]
    product_id: Mapped[UUID | None] = mapped_column(ForeignKey("products.id"))
    service_id: Mapped[UUID | None] = mapped_column(ForeignKey("services.id"))
    description: Mapped[str] = mapped_column(String(200))
    quantity: Mapped[Decimal] = mapped_column(QUANTITY)
    unit_price: Mapped[Decimal] = mapped_column(MONEY)
    tax_rate: Mapped[Decimal] = mapped_column(PERCENT)
    net: Mapped[Decimal] = mapped_column(MONEY)
    tax: Mapped[Decimal] = mapped_column(MONEY)


class DocumentCounter(Base):
    """The last number given to a kind of document in a year. A row and no sequence: what is rolled back leaves no gap."""

    __tablename__ = "document_counters"

    kind: Mapped[str] = mapped_column(String(10), primary_key=True)
    year: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    last: Mapped[int]


# -- consents and records --------------------------------------------------------------------------------------------------------------


class ConsentTemplate(Row):
    __tablename__ = "consent_templates"
    __table_args__ = (_unique_among_living("consent_templates", "title"),)

    title: Mapped[str] = mapped_column(String(200))
    body: Mapped[str] = mapped_column(Text)


class Consent(Row):
    """What a patient agreed to, in the words of that day: title and body are copied from the template."""

    __tablename__ = "consents"

    patient_id: Mapped[UUID] = mapped_column(ForeignKey("patients.id"), index=True)
    template_id: Mapped[UUID | None] = mapped_column(ForeignKey("consent_templates.id"))
    title: Mapped[str] = mapped_column(String(200))
    body: Mapped[str] = mapped_column(Text)
    signed_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    withdrawn_at: Mapped[datetime | None] = mapped_column(UTCDateTime)


class MedicalRecord(Row):
    __tablename__ = "medical_records"

    patient_id: Mapped[UUID] = mapped_column(ForeignKey("patients.id"), index=True)
    practitioner_id: Mapped[UUID | None] = mapped_column(ForeignKey("practitioners.id"))
    appointment_id: Mapped[UUID | None] = mapped_column(ForeignKey("appointments.id"))
    recorded_at: Mapped[datetime] = mapped_column(UTCDateTime, default=now)
    title: Mapped[str] = mapped_column(String(200))
    content: Mapped[str] = mapped_column(Text)
