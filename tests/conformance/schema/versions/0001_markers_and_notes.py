"""Markers and notes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table("markers", sa.Column("slug", sa.String, primary_key=True))
    op.create_table("notes", sa.Column("id", sa.Integer, primary_key=True), sa.Column("about", sa.String, sa.ForeignKey("markers.slug")))
