"""Appointments and what is planned for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from examples.clinic.models import Appointment, AppointmentItem, Patient, Practitioner, Product, Service
from examples.clinic.problems import Invalid
from examples.clinic.store import Store, load


class AppointmentStore(Store[Appointment]):
    def assign(self, session: Session, row: Appointment, values: Mapping[str, Any]) -> None:
        """Items, where given, replace those that are there. Who was reminded of another time was not reminded of this one."""
        values = dict(values)
        items: list[dict[str, Any]] | None = values.pop("items", None)
        if values.get("starts_at", row.starts_at) != row.starts_at:
            row.reminded_at = None
        super().assign(session, row, values)
        if row.ends_at <= row.starts_at:
            raise Invalid("ends_at must be after starts_at")
        if items is not None:
            load(session, Product, "items.product_id", {item["product_id"] for item in items if item["product_id"]})
            load(session, Service, "items.service_id", {item["service_id"] for item in items if item["service_id"]})
            row.items = [AppointmentItem(position=position, **item) for position, item in enumerate(items)]


appointments = AppointmentStore(
    Appointment, order=(Appointment.starts_at,), references={"patient_id": Patient, "practitioner_id": Practitioner}
)
