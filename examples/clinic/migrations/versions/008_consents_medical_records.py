"""Consents, their templates, and medical records.

Revision: 008, after 007.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "008"
down_revision = "007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    living = sa.text("deleted_at IS NULL")  # a deleted row gives its name free
    op.create_table(
        "consent_templates",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("title", sa.String(200), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="pk_consent_templates"),
    )
    op.create_index("uq_consent_templates_title", "consent_templates", ["title"], unique=True, postgresql_where=living, sqlite_where=living)
    op.create_table(
        "consents",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("patient_id", sa.Uuid(), nullable=False),
        sa.Column("template_id", sa.Uuid()),
        sa.Column("title", sa.String(200), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("signed_at", sa.DateTime(timezone=True)),
        sa.Column("withdrawn_at", sa.DateTime(timezone=True)),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="pk_consents"),
        sa.ForeignKeyConstraint(["patient_id"], ["patients.id"], name="fk_consents_patient_id_patients"),
        sa.ForeignKeyConstraint(["template_id"], ["consent_templates.id"], name="fk_consents_template_id_consent_templates"),
    )
    op.create_index("ix_consents_patient_id", "consents", ["patient_id"])
    op.create_table(
        "medical_records",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("patient_id", sa.Uuid(), nullable=False),
        sa.Column("practitioner_id", sa.Uuid()),
        sa.Column("appointment_id", sa.Uuid()),
        sa.Column("recorded_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("title", sa.String(200), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="pk_medical_records"),
        sa.ForeignKeyConstraint(["patient_id"], ["patients.id"], name="fk_medical_records_patient_id_patients"),
        sa.ForeignKeyConstraint(["practitioner_id"], ["practitioners.id"], name="fk_medical_records_practitioner_id_practitioners"),
        sa.ForeignKeyConstraint(["appointment_id"], ["appointments.id"], name="fk_medical_records_appointment_id_appointments"),
    )
    op.create_index("ix_medical_records_patient_id", "medical_records", ["patient_id"])


def downgrade() -> None:
    op.drop_table("medical_records")
    op.drop_table("consents")
    op.drop_table("consent_templates")
