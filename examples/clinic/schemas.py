"""What comes in and goes out. Input says exactly what a column can hold, so that bad input is refused here and never by the database.

Money is decimal: strings in JSON, two places, never a float.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, timezone
from decimal import ROUND_HALF_UP, Decimal
from typing import Annotated, Any, Generic, Literal, TypeVar
from uuid import UUID

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, create_model, model_validator

CENT = Decimal("0.01")


def to_cents(value: Decimal) -> Decimal:
    """Two decimals, half up: the way invoices are rounded."""
    return value.quantize(CENT, ROUND_HALF_UP)


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("a text cannot hold a NUL character")
    return value


def _in_utc(value: datetime) -> datetime:
    return value.astimezone(timezone.utc)


def _not_in_future(value: date) -> date:
    if value > datetime.now(timezone.utc).date():
        raise ValueError("the date lies in the future")
    return value


_NO_NUL = AfterValidator(_no_nul)  # PostgreSQL cannot store it
Name = Annotated[str, Field(min_length=1, max_length=100), _NO_NUL]
Title = Annotated[str, Field(min_length=1, max_length=200), _NO_NUL]
Line = Annotated[str, Field(max_length=200), _NO_NUL]
Body = Annotated[str, Field(min_length=1, max_length=20_000), _NO_NUL]
Notes = Annotated[str, Field(max_length=20_000), _NO_NUL]
Short = Annotated[str, Field(max_length=50), _NO_NUL]
Email = Annotated[str, Field(max_length=254, pattern=r"^[^@\s]+@[^@\s]+\.[^@\s.]+$"), _NO_NUL]
Phone = Annotated[str, Field(pattern=r"^\+?[0-9][0-9 ()./-]{3,28}$"), _NO_NUL]
Country = Annotated[str, Field(pattern=r"^[A-Z]{2}$", description="ISO 3166, two letters"), _NO_NUL]
BirthDate = Annotated[date, Field(ge=date(1850, 1, 1)), AfterValidator(_not_in_future)]
Day = Annotated[date, Field(ge=date(1900, 1, 1), le=date(2199, 12, 31))]
Moment = Annotated[
    AwareDatetime,
    Field(ge=datetime(1900, 1, 1, tzinfo=timezone.utc), le=datetime(2199, 12, 31, tzinfo=timezone.utc)),
    AfterValidator(_in_utc),
]
Price = Annotated[Decimal, Field(ge=0, max_digits=9, decimal_places=2), AfterValidator(to_cents)]
Quantity = Annotated[Decimal, Field(gt=0, max_digits=6, decimal_places=2), AfterValidator(to_cents)]
Percent = Annotated[Decimal, Field(ge=0, le=100, decimal_places=2), AfterValidator(to_cents)]


class Input(BaseModel):
    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True, hide_input_in_errors=True)


class Output(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class Stored(Output):
    """What every answered row has."""

    id: UUID
    created_at: datetime
    updated_at: datetime


InputT = TypeVar("InputT", bound=Input)
OutputT = TypeVar("OutputT", bound=Output)


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)


def changes(model: type[InputT]) -> type[InputT]:
    """The body of a PATCH: every field of `model` may be left out; what is given obeys the same rules, so only the nullable may be null."""
    fields: Any = {
        name: (Annotated[field.rebuild_annotation(), Field(json_schema_extra=_without_default)], None)
        for name, field in model.model_fields.items()
    }
    return create_model(model.__name__.removesuffix("Create") + "Update", __base__=model, **fields)


class Listing(Input):
    """Which rows of a list are wanted."""

    limit: int = Field(50, ge=1, le=200)
    offset: int = Field(0, ge=0, le=10_000_000)

    def filters(self) -> dict[str, Any]:
        """The filters that were given."""
        return self.model_dump(exclude={"limit", "offset"}, exclude_none=True)


class Deletion(Input):
    """How a row is to be deleted. ``permanent``: not hidden but erased, where that can be asked for."""

    permanent: bool = False


class Search(Listing):
    q: Annotated[str, Field(max_length=100), _NO_NUL] | None = Field(None, description="text to look for")


class Page(Output, Generic[OutputT]):
    items: list[OutputT]
    total: int
    limit: int
    offset: int


@dataclass(frozen=True, slots=True)
class Shapes:
    """How the rows of one table come in and go out."""

    create: type[Input]
    update: type[Input]
    out: type[Stored]
    listing: type[Listing]


# -- people ----------------------------------------------------------------------------------------------------------------------------


class PatientCreate(Input):
    first_name: Name
    last_name: Name
    birth_date: BirthDate | None = None
    gender: Literal["female", "male", "other"] | None = None
    email: Email | None = None
    phone: Phone | None = None
    address: Line | None = None
    postal_code: Annotated[str, Field(max_length=20), _NO_NUL] | None = None
    city: Annotated[str, Field(max_length=100), _NO_NUL] | None = None
    country: Country | None = None
    insurance_number: Short | None = None
    notes: Notes | None = None


class PatientOut(Stored):
    first_name: str
    last_name: str
    birth_date: date | None
    gender: str | None
    email: str | None
    email_verified_at: datetime | None
    phone: str | None
    address: str | None
    postal_code: str | None
    city: str | None
    country: str | None
    insurance_number: str | None
    notes: str | None


class PatientListing(Search):
    last_name: Name | None = None
    email: Email | None = None
    birth_date: date | None = None
    city: Name | None = None


class Code(Input):
    code: str = Field(min_length=1, max_length=50)


class PractitionerCreate(Input):
    first_name: Name
    last_name: Name
    title: Short | None = None
    specialty: Annotated[str, Field(max_length=100), _NO_NUL] | None = None
    email: Email | None = None
    phone: Phone | None = None
    license_number: Short | None = None


class PractitionerOut(Stored):
    first_name: str
    last_name: str
    title: str | None
    specialty: str | None
    email: str | None
    phone: str | None
    license_number: str | None


class PractitionerListing(Search):
    last_name: Name | None = None
    specialty: Name | None = None


PATIENT = Shapes(PatientCreate, changes(PatientCreate), PatientOut, PatientListing)
PRACTITIONER = Shapes(PractitionerCreate, changes(PractitionerCreate), PractitionerOut, PractitionerListing)


# -- the catalogue ---------------------------------------------------------------------------------------------------------------------


class CategoryCreate(Input):
    name: Name
    description: Notes | None = None


class CategoryOut(Stored):
    name: str
    description: str | None


class CategoryListing(Search):
    name: Name | None = None


class ProductCreate(Input):
    name: Title
    description: Notes | None = None
    sku: Short | None = None
    price: Price
    tax_rate: Percent = Decimal("0.00")
    category_id: UUID | None = None


class ProductOut(Stored):
    name: str
    description: str | None
    sku: str | None
    price: Decimal
    tax_rate: Decimal
    category_id: UUID | None


class ProductListing(Search):
    category_id: UUID | None = None
    sku: Short | None = None


class ServiceCreate(Input):
    name: Title
    description: Notes | None = None
    duration_minutes: int | None = Field(None, ge=1, le=24 * 60)
    price: Price
    tax_rate: Percent = Decimal("0.00")
    category_id: UUID | None = None


class ServiceOut(Stored):
    name: str
    description: str | None
    duration_minutes: int | None
    price: Decimal
    tax_rate: Decimal
    category_id: UUID | None


class ServiceListing(Search):
    category_id: UUID | None = None


CATEGORY = Shapes(CategoryCreate, changes(CategoryCreate), CategoryOut, CategoryListing)
PRODUCT = Shapes(ProductCreate, changes(ProductCreate), ProductOut, ProductListing)
SERVICE = Shapes(ServiceCreate, changes(ServiceCreate), ServiceOut, ServiceListing)


# -- appointments ----------------------------------------------------------------------------------------------------------------------

AppointmentStatus = Literal["planned", "confirmed", "done", "cancelled", "missed"]


class AppointmentItemIn(Input):
    product_id: UUID | None = None
    service_id: UUID | None = None
    quantity: Quantity = Decimal("1.00")
    notes: Line | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> AppointmentItemIn:
        if (self.product_id is None) == (self.service_id is None):
            raise ValueError("an item names a product or a service")
        return self


class AppointmentItemOut(Output):
    id: UUID
    product_id: UUID | None
    service_id: UUID | None
    quantity: Decimal
    notes: str | None


class AppointmentCreate(Input):
    patient_id: UUID
    practitioner_id: UUID
    starts_at: Moment
    ends_at: Moment
    status: AppointmentStatus = "planned"
    reason: Line | None = None
    notes: Notes | None = None
    items: list[AppointmentItemIn] = Field(default=[], max_length=100)


class AppointmentOut(Stored):
    patient_id: UUID
    practitioner_id: UUID
    starts_at: datetime
    ends_at: datetime
    status: str
    reason: str | None
    notes: str | None
    reminded_at: datetime | None
    items: list[AppointmentItemOut]


class AppointmentListing(Listing):
    patient_id: UUID | None = None
    practitioner_id: UUID | None = None
    status: AppointmentStatus | None = None
    starts_at_from: Moment | None = None
    starts_at_before: Moment | None = None


APPOINTMENT = Shapes(AppointmentCreate, changes(AppointmentCreate), AppointmentOut, AppointmentListing)


# -- quotes and invoices ---------------------------------------------------------------------------------------------------------------

DocumentKind = Literal["quote", "invoice"]
DocumentStatus = Literal["draft", "issued", "accepted", "declined", "paid", "cancelled"]


class DocumentItemIn(Input):
    """What names a product or a service takes its text, price and tax from there, unless it says them itself."""

    product_id: UUID | None = None
    service_id: UUID | None = None
    description: Title | None = None
    quantity: Quantity = Decimal("1.00")
    unit_price: Price | None = None
    tax_rate: Percent | None = None

    @model_validator(mode="after")
    def _complete(self) -> DocumentItemIn:
        if self.product_id is not None and self.service_id is not None:
            raise ValueError("an item names a product or a service, not both")
        if self.product_id is None and self.service_id is None and (self.description is None or self.unit_price is None):
            raise ValueError("an item without product and service needs description and unit_price")
        return self


class DocumentItemOut(Output):
    id: UUID
    product_id: UUID | None
    service_id: UUID | None
    description: str
    quantity: Decimal
    unit_price: Decimal
    tax_rate: Decimal
    net: Decimal
    tax: Decimal


class _DocumentContent(Input):
    patient_id: UUID
    practitioner_id: UUID | None = None
    appointment_id: UUID | None = None
    document_date: Day = Field(default_factory=lambda: datetime.now(timezone.utc).date())
    due_date: Day | None = None
    notes: Notes | None = None
    items: list[DocumentItemIn] = Field(min_length=1, max_length=200)


class DocumentCreate(_DocumentContent):
    kind: DocumentKind


class _DocumentChange(_DocumentContent):
    status: DocumentStatus


class DocumentOut(Stored):
    kind: str
    number: str
    status: str
    patient_id: UUID
    practitioner_id: UUID | None
    appointment_id: UUID | None
    quote_id: UUID | None
    document_date: date
    due_date: date | None
    notes: str | None
    net_total: Decimal
    tax_total: Decimal
    total: Decimal
    items: list[DocumentItemOut]


class DocumentListing(Listing):
    kind: DocumentKind | None = None
    status: DocumentStatus | None = None
    number: Short | None = None
    patient_id: UUID | None = None
    document_date_from: Day | None = None
    document_date_before: Day | None = None


DOCUMENT = Shapes(DocumentCreate, changes(_DocumentChange), DocumentOut, DocumentListing)


# -- consents and records --------------------------------------------------------------------------------------------------------------


class ConsentTemplateCreate(Input):
    title: Title
    body: Body


class ConsentTemplateOut(Stored):
    title: str
    body: str


class ConsentCreate(Input):
    """From a template, whose words are copied, or in words of its own."""

    patient_id: UUID
    template_id: UUID | None = None
    title: Title | None = None
    body: Body | None = None
    signed_at: Moment | None = None

    @model_validator(mode="after")
    def _has_words(self) -> ConsentCreate:
        if self.template_id is None and (self.title is None or self.body is None):
            raise ValueError("a consent without template_id needs title and body")
        return self


class ConsentUpdate(Input):
    """What was agreed to cannot be rewritten, only signed or withdrawn."""

    signed_at: Moment | None = None
    withdrawn_at: Moment | None = None


class ConsentOut(Stored):
    patient_id: UUID
    template_id: UUID | None
    title: str
    body: str
    signed_at: datetime | None
    withdrawn_at: datetime | None


class ConsentListing(Search):
    patient_id: UUID | None = None
    template_id: UUID | None = None


class MedicalRecordCreate(Input):
    patient_id: UUID
    practitioner_id: UUID | None = None
    appointment_id: UUID | None = None
    recorded_at: Moment = Field(default_factory=lambda: datetime.now(timezone.utc))
    title: Title
    content: Body


class MedicalRecordOut(Stored):
    patient_id: UUID
    practitioner_id: UUID | None
    appointment_id: UUID | None
    recorded_at: datetime
    title: str
    content: str


class MedicalRecordListing(Search):
    patient_id: UUID | None = None
    practitioner_id: UUID | None = None
    recorded_at_from: Moment | None = None
    recorded_at_before: Moment | None = None


CONSENT_TEMPLATE = Shapes(ConsentTemplateCreate, changes(ConsentTemplateCreate), ConsentTemplateOut, Search)
CONSENT = Shapes(ConsentCreate, ConsentUpdate, ConsentOut, ConsentListing)
MEDICAL_RECORD = Shapes(MedicalRecordCreate, changes(MedicalRecordCreate), MedicalRecordOut, MedicalRecordListing)


class PatientFile(Output):
    """All that the clinic keeps about a patient."""

    patient: PatientOut
    appointments: list[AppointmentOut]
    documents: list[DocumentOut]
    consents: list[ConsentOut]
    medical_records: list[MedicalRecordOut]


# -- signing up and in -----------------------------------------------------------------------------------------------------------------


class NewAccount(Input):
    email: Email
    password: str = Field(min_length=1, max_length=1024, repr=False)
    first_name: Name | None = None
    last_name: Name | None = None


class NewClinic(Input):
    slug: str = Field(min_length=1, max_length=200, description="the clinic's public name in addresses, e.g. `sunrise-dental`")
    name: Title | None = None
    email: Email | None = None
    phone: Phone | None = None
    country: Country | None = None


class Registration(Input):
    user: NewAccount
    clinic: NewClinic


class Login(Input):
    email: str = Field(min_length=1, max_length=254)
    password: str = Field(min_length=1, max_length=1024, repr=False)
    clinic: str | None = Field(None, max_length=200, description="slug; needed only by those who work for several clinics")


class Refresh(Input):
    refresh_token: str = Field(min_length=1, max_length=1024, repr=False)


class EmailToken(Input):
    token: str = Field(min_length=1, max_length=1024, repr=False)


class UserOut(Output):
    id: UUID
    email: str
    first_name: str | None
    last_name: str | None
    email_verified_at: datetime | None


class ClinicOut(Output):
    id: UUID
    slug: str
    name: str
    state: str
    role: str


class SignedIn(Output):
    """What signing in gives: a token for the next minutes, and one to get the next with."""

    access_token: str
    refresh_token: str
    token_type: Literal["bearer"] = "bearer"
    expires_in: int = Field(description="seconds")
    clinic: ClinicOut | None


class Me(Output):
    user: UserOut
    clinic: ClinicOut | None = Field(description="the clinic that the token names")
    clinics: list[ClinicOut]
