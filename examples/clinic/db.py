"""One object for web, worker, command line, Alembic and tests: `tenantdb --app examples.clinic.db:db ...`."""

from __future__ import annotations

import os

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from examples.clinic.models import Category, ConsentTemplate, Patient, Practitioner
from tenantdb import AsyncTenantDB, Tenant, TenantDB

db = TenantDB.from_env(
    url=os.environ.get("TENANTDB_URL", "sqlite:///data/central.sqlite3"),
    migrations="examples.clinic:migrations",
)
adb = AsyncTenantDB(db)

CATEGORIES = ("Consultation", "Treatment", "Supplies")
CONSENT_TEMPLATES = {
    "Treatment": "I have been told about the treatment, its risks and the alternatives, and I agree to it.",
    "Personal data": "I agree that the clinic keeps and uses the data about my health that my treatment needs.",
}


@db.seed
def first_rows(session: Session, tenant: Tenant) -> None:
    """What a new clinic finds in its database. May run again: a name that was ever there, deleted since or not, is left alone."""
    categories = set(session.scalars(select(Category.name)))
    session.add_all(Category(name=name) for name in CATEGORIES if name not in categories)
    templates = set(session.scalars(select(ConsentTemplate.title)))
    session.add_all(ConsentTemplate(title=title, body=body) for title, body in CONSENT_TEMPLATES.items() if title not in templates)


@db.neutralise
def reach_nobody(session: Session, tenant: Tenant) -> None:
    """A copy of a clinic, for staging, must write to nobody: no address is left in it, and no code that was sent serves there."""
    void = {"email_verified_at": None, "email_code_hash": None, "email_code_expires_at": None}
    session.execute(update(Patient).values(email=None, phone=None, **void))
    session.execute(update(Practitioner).values(email=None))
