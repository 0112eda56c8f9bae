"""Quotes, invoices and their items, and the counters that number them.

Revision: 007, after 006.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "007"
down_revision = "006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "document_counters",
        sa.Column("kind", sa.String(10), nullable=False),
        sa.Column("year", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("last", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("kind", "year", name="pk_document_counters"),
    )
    op.create_table(
        "documents",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.String(10), nullable=False),
        sa.Column("number", sa.String(20), nullable=False),
        sa.Column("status", sa.String(20), nullable=False),
        sa.Column("patient_id", sa.Uuid(), nullable=False),
        sa.Column("practitioner_id", sa.Uuid()),
        sa.Column("appointment_id", sa.Uuid()),
        sa.Column("quote_id", sa.Uuid()),
        sa.Column("document_date", sa.Date(), nullable=False),
        sa.Column("due_date", sa.Date()),
        sa.Column("notes", sa.Text()),
        sa.Column("net_total", sa.Numeric(12, 2), nullable=False),
        sa.Column("tax_total", sa.Numeric(12, 2), nullable=False),
        sa.Column("total", sa.Numeric(12, 2), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="pk_documents"),
        sa.CheckConstraint("kind IN ('quote', 'invoice')", name=op.f("ck_documents_kind")),
        sa.CheckConstraint("status IN ('draft', 'issued', 'accepted', 'declined', 'paid', 'cancelled')", name=op.f("ck_documents_status")),
        sa.UniqueConstraint("number", name="uq_documents_number"),
        sa.UniqueConstraint("quote_id", name="uq_documents_quote_id"),
        sa.ForeignKeyConstraint(["patient_id"], ["patients.id"], name="fk_documents_patient_id_patients"),
        sa.ForeignKeyConstraint(["practitioner_id"], ["practitioners.id"], name="fk_documents_practitioner_id_practitioners"),
        sa.ForeignKeyConstraint(["appointment_id"], ["appointments.id"], name="fk_documents_appointment_id_appointments"),
        sa.ForeignKeyConstraint(["quote_id"], ["documents.id"], name="fk_documents_quote_id_documents"),
    )
    op.create_index("ix_documents_patient_id", "documents", ["patient_id"])
    op.create_table(
        "document_items",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("document_id", sa.Uuid(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("product_id", sa.Uuid()),
        sa.Column("service_id", sa.Uuid()),
        sa.Column("description", sa.String(200), nullable=False),
        sa.Column("quantity", sa.Numeric(10, 2), nullable=False),
        sa.Column("unit_price", sa.Numeric(12, 2), nullable=False),
        sa.Column("tax_rate", sa.Numeric(5, 2), nullable=False),
        sa.Column("net", sa.Numeric(12, 2), nullable=False),
        sa.Column("tax", sa.Numeric(12, 2), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_document_items"),
        sa.ForeignKeyConstraint(["document_id"], ["documents.id"], name="fk_document_items_document_id_documents", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["product_id"], ["products.id"], name="fk_document_items_product_id_products"),
        sa.ForeignKeyConstraint(["service_id"], ["services.id"], name="fk_document_items_service_id_services"),
    )
    op.create_index("ix_document_items_document_id", "document_items", ["document_id"])


def downgrade() -> None:
    op.drop_table("document_items")
    op.drop_table("documents")
    op.drop_table("document_counters")
