"""Services and products of an appointment.

Revision: 006, after 005.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "006"
down_revision = "005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "appointment_items",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("appointment_id", sa.Uuid(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("product_id", sa.Uuid()),
        sa.Column("service_id", sa.Uuid()),
        sa.Column("quantity", sa.Numeric(10, 2), nullable=False),
        sa.Column("notes", sa.String(200)),
        sa.PrimaryKeyConstraint("id", name="pk_appointment_items"),
        sa.CheckConstraint("(product_id IS NULL) <> (service_id IS NULL)", name=op.f("ck_appointment_items_product_or_service")),
        sa.ForeignKeyConstraint(
            ["appointment_id"], ["appointments.id"], name="fk_appointment_items_appointment_id_appointments", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["product_id"], ["products.id"], name="fk_appointment_items_product_id_products"),
        sa.ForeignKeyConstraint(["service_id"], ["services.id"], name="fk_appointment_items_service_id_services"),
    )
    op.create_index("ix_appointment_items_appointment_id", "appointment_items", ["appointment_id"])


def downgrade() -> None:
    op.drop_table("appointment_items")
