"""The clinic's work behind the scenes: `celery -A examples.clinic.worker worker -B`.

Reminds the patients of every clinic of tomorrow's appointments, and confirms what was booked. A web process makes the same application
to publish with, where CLINIC_BROKER_URL is set. No task is tried again: a reminder that is not marked as sent is found the next time, and a
confirmation that fails is lost.
"""

from __future__ import annotations

import logging
import os
from typing import Any
from uuid import UUID

from celery import Celery
from kombu.exceptions import OperationalError

from examples.clinic import reminders
from examples.clinic.mail import Mailer, Outbox
from examples.clinic.models import now
from tenantdb import TenantDB, current_tenant
from tenantdb.celery import AllTenantsTask, TenantTask, setup

log = logging.getLogger("clinic.worker")


class Announcement(TenantTask):
    """What it tells of stands, whether anybody can be told or not: a broker that is down is logged, and fails no booking."""

    def apply_async(self, *args: Any, **options: Any) -> Any:
        try:
            return super().apply_async(*args, **options)
        except OperationalError:
            log.exception("%s was not published", self.name)
            return None


def create_worker(db: TenantDB | None = None, *, broker: str | None = None, mailer: Mailer | None = None) -> Celery:
    """The application over `db`, by default the one of db.py; `broker` by default from CLINIC_BROKER_URL. Connects to nothing yet."""
    if db is None:
        from examples.clinic.db import db
    every = float(os.environ.get("CLINIC_REMIND_EVERY", "900"))
    app = Celery("clinic", broker=broker or os.environ.get("CLINIC_BROKER_URL", "redis://127.0.0.1:6379/0"), set_as_current=False)
    app.conf.update(
        task_ignore_result=True,
        task_publish_retry=False,  # whoever books waits for the broker, and by default 6 seconds for one that is down
        broker_transport_options={"max_retries": 0, "socket_connect_timeout": 2},
        broker_connection_retry_on_startup=True,
        beat_scheduler="celery.beat:Scheduler",  # nothing to remember in a file: a clinic's own rows say what was done
        beat_schedule={"reminders": {"task": "clinic.find_due", "schedule": every, "options": {"expires": every}}},
    )
    setup(app, db, signing_key=os.environ.get("CLINIC_TASK_KEY"))
    _add_tasks(app, db, mailer or Outbox(os.environ.get("CLINIC_OUTBOX", "data/outbox")), expires=every)
    return app


def _add_tasks(app: Celery, db: TenantDB, mailer: Mailer, *, expires: float) -> None:
    """Tasks of this application alone, of which a process may have several."""

    def send(session: Any, letter: reminders.Letter, action: str) -> None:
        """Within the transaction, so that who was written to is in the clinic's audit log, or was not written to."""
        db.audit.record(session, f"patient.{action}", letter.patient_id)
        session.flush()
        mailer.send(letter.to, letter.subject, letter.text, key=letter.key)

    @app.task(name="clinic.find_due", base=AllTenantsTask, shared=False)
    def find_due() -> None:
        """For each clinic, a task for each appointment: one that fails keeps no other patient waiting."""
        with db.session() as session:
            found = reminders.due(session, now())
        for appointment_id in found:
            remind.apply_async([str(appointment_id)], expires=expires)

    @app.task(name="clinic.remind", base=TenantTask, shared=False)
    def remind(appointment_id: str) -> None:
        with db.begin() as session:
            if (letter := reminders.claim(session, UUID(appointment_id), now(), clinic=current_tenant().name)) is not None:
                send(session, letter, "remind")

    @app.task(name="clinic.confirm_appointment", base=Announcement, shared=False)
    def confirm_appointment(appointment_id: str) -> None:
        with db.begin() as session:
            if (letter := reminders.confirmation(session, UUID(appointment_id), clinic=current_tenant().name)) is not None:
                send(session, letter, "confirm")


def __getattr__(name: str) -> Celery:
    """Make `app` when `celery` asks for it, and once, so that importing this module needs no environment."""
    if name == "app":
        app = globals()["app"] = create_worker()
        return app
    raise AttributeError(name)
