"""Details of patients.

Revision: 002, after 001.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "002"
down_revision = "001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("patients", sa.Column("gender", sa.String(20)))
    op.add_column("patients", sa.Column("email", sa.String(254)))
    op.add_column("patients", sa.Column("phone", sa.String(30)))
    op.add_column("patients", sa.Column("address", sa.String(200)))
    op.add_column("patients", sa.Column("postal_code", sa.String(20)))
    op.add_column("patients", sa.Column("city", sa.String(100)))
    op.add_column("patients", sa.Column("country", sa.String(2)))
    op.add_column("patients", sa.Column("insurance_number", sa.String(50)))
    op.add_column("patients", sa.Column("notes", sa.Text()))
    op.create_index("ix_patients_email", "patients", ["email"])


def downgrade() -> None:
    op.drop_index("ix_patients_email", "patients")
    op.drop_column("patients", "notes")
    op.drop_column("patients", "insurance_number")
    op.drop_column("patients", "country")
    op.drop_column("patients", "city")
    op.drop_column("patients", "postal_code")
    op.drop_column("patients", "address")
    op.drop_column("patients", "phone")
    op.drop_column("patients", "email")
    op.drop_column("patients", "gender")
