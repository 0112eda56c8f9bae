"""Details of practitioners.

Revision: 004, after 003.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "004"
down_revision = "003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("practitioners", sa.Column("title", sa.String(50)))
    op.add_column("practitioners", sa.Column("specialty", sa.String(100)))
    op.add_column("practitioners", sa.Column("email", sa.String(254)))
    op.add_column("practitioners", sa.Column("phone", sa.String(30)))
    op.add_column("practitioners", sa.Column("license_number", sa.String(50)))


def downgrade() -> None:
    op.drop_column("practitioners", "license_number")
    op.drop_column("practitioners", "phone")
    op.drop_column("practitioners", "email")
    op.drop_column("practitioners", "specialty")
    op.drop_column("practitioners", "title")
