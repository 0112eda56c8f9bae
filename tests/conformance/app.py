"""The application of these tests, as its migrations and tenants see it: every tenant's database holds one marker, its own slug."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Column, ForeignKey, Insert, Integer, MetaData, String, Table, insert, select
from sqlalchemy.orm import Session

from tenantdb import Tenant, TenantDB

MIGRATIONS = str(Path(__file__).parent / "schema")

metadata = MetaData()
markers = Table("markers", metadata, Column("slug", String, primary_key=True))
notes = Table("notes", metadata, Column("id", Integer, primary_key=True), Column("about", ForeignKey("markers.slug")))

MARKER = select(markers.c.slug)
NOTES = select(notes.c.id).order_by(notes.c.id)

db = TenantDB("sqlite:///never/opened.sqlite3")  # what env.py imports; these tests always say which database is migrated


def note(number: int, about: str | None = None) -> Insert:
    """A statement that adds a note."""
    return insert(notes).values(id=number, about=about)


def write_marker(session: Session, tenant: Tenant) -> None:
    """The seed."""
    if session.scalar(MARKER) is None:
        session.execute(insert(markers).values(slug=tenant.slug))
