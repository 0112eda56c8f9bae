"""E-mail verification of patients' addresses.

Revision: 009, after 008.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "009"
down_revision = "008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("patients", sa.Column("email_verified_at", sa.DateTime(timezone=True)))
    op.add_column("patients", sa.Column("email_code_hash", sa.String(64)))
    op.add_column("patients", sa.Column("email_code_expires_at", sa.DateTime(timezone=True)))


def downgrade() -> None:
    op.drop_column("patients", "email_code_expires_at")
    op.drop_column("patients", "email_code_hash")
    op.drop_column("patients", "email_verified_at")
