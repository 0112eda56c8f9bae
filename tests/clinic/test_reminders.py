"""Patients are reminded once, whatever happens; with the broker in memory, and with a real one further down."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from email import message_from_bytes
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from celery import Celery
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from examples.clinic import reminders
from examples.clinic.app import create_app
from examples.clinic.appointments import appointments
from examples.clinic.flask_app import create_app as create_flask_app
from examples.clinic.mail import Mailer, Outbox
from examples.clinic.models import Appointment, Patient, Practitioner, now
from examples.clinic.schemas import APPOINTMENT
from examples.clinic.worker import create_worker
from tenantdb import TenantDB
from tests.adapters.little_worker import Loop
from tests.adapters.redis_server import redis_server
from tests.clinic.people import TOKEN_KEY, Mails, Person, Threaded, either_front
from tests.clinic.processes import PATIENCE, Process, environment, started
from tests.clinic.rows import referred_to, sample
from tests.world import World

on_sqlite = pytest.mark.parametrize("world", ["sqlite"], indirect=True)  # where nothing is asked of the database that differs
KEY = "a key of tasks, for tests and for nothing else"


class Behind(Loop):
    """The clinic's worker as a loop in the test's own thread."""

    def sweep(self) -> None:
        """What beat asks for, and what follows from it."""
        self.app.tasks["clinic.find_due"].delay()
        self.work()


@dataclass
class Keyed(Mails):
    """A mail service that knows idempotency keys; ``forgetful`` is one that does not. ``dies`` at the next mail, which is under way."""

    forgetful: bool = False
    dies: bool = False

    def __post_init__(self) -> None:
        self.keys: set[str | None] = set()

    def send(self, to: str, subject: str, text: str, *, key: str | None = None) -> None:
        if self.forgetful or key not in self.keys:
            super().send(to, subject, text)
        self.keys.add(key)
        if self.dies:
            self.dies = False
            raise SystemExit("killed between the mail and the commit")

    @property
    def reached(self) -> list[str]:
        return sorted(to for to, _, _ in self.sent)


@pytest.fixture
def service() -> Keyed:
    return Keyed()


def behind(db: TenantDB, mailer: Mailer) -> Behind:
    made = Behind(create_worker(db, broker="memory://", mailer=mailer))
    made.waiting()  # what another test left in the broker of this process
    return made


@pytest.fixture
def worker(db: TenantDB, service: Keyed, monkeypatch: pytest.MonkeyPatch) -> Iterator[Behind]:
    monkeypatch.setenv("CLINIC_TASK_KEY", KEY)
    made = behind(db, service)
    yield made
    made.app.close()


@pytest.fixture
def clinics(db: TenantDB) -> list[str]:
    return [db.provision(slug, name=slug.title()).slug for slug in ("acme", "beta")]


def book(db: TenantDB, clinic: str, name: str = "maya", *, hours: float = 20, **values: Any) -> UUID:
    """An appointment of somebody who can be written to, so many hours from now."""
    with db.begin(clinic) as session:
        patient = Patient(first_name=name, last_name="Bauer", email=f"{name}@{clinic}.example")
        practitioner = Practitioner(first_name="Jon", last_name="Reyes")
        session.add_all([patient, practitioner])
        session.flush()
        starts_at = now() + timedelta(hours=hours)
        times = {"starts_at": starts_at, "ends_at": starts_at + timedelta(minutes=30)}
        appointment = Appointment(patient_id=patient.id, practitioner_id=practitioner.id, **{"status": "planned", **times, **values})
        session.add(appointment)
        session.flush()
        return appointment.id


def marked(db: TenantDB, clinic: str) -> int:
    with db.session(clinic) as session:
        return len(session.scalars(select(Appointment.id).where(Appointment.reminded_at.is_not(None))).all())


def test_every_clinics_patients_of_the_next_day_are_reminded_once(worker: Behind, service: Keyed, db: TenantDB, clinics: list[str]) -> None:
    for clinic in clinics:
        book(db, clinic)

    for _ in range(3):
        worker.sweep()

    assert service.reached == ["maya@acme.example", "maya@beta.example"]
    assert {subject for _, subject, _ in service.sent} == {"Acme: your appointment", "Beta: your appointment"}
    assert [marked(db, clinic) for clinic in clinics] == [1, 1]


def test_who_is_not_expected_or_cannot_be_reached_is_not_reminded(worker: Behind, service: Keyed, db: TenantDB, clinics: list[str]) -> None:
    book(db, "acme", "early", hours=25)
    book(db, "acme", "late", hours=-1)
    for status in ("cancelled", "missed", "done"):
        book(db, "acme", status, status=status)
    book(db, "acme", "withdrawn", deleted_at=now())
    book(db, "acme", "left")
    book(db, "acme", "silent")
    with db.begin("acme") as session:
        session.execute(text("UPDATE patients SET deleted_at = created_at WHERE first_name = 'left'"))
        session.execute(text("UPDATE patients SET email = NULL WHERE first_name = 'silent'"))
    book(db, "acme", "expected", status="confirmed")

    worker.sweep()

    assert service.reached == ["expected@acme.example"]
    assert marked(db, "acme") == 1


@on_sqlite
def test_what_was_cancelled_since_it_was_found_is_let_be(worker: Behind, service: Keyed, db: TenantDB, clinics: list[str]) -> None:
    appointment_id = book(db, "acme")
    worker.app.tasks["clinic.remind"].apply_async([str(appointment_id)], tenant="acme")
    with db.begin("acme") as session:
        session.get_one(Appointment, appointment_id).status = "cancelled"

    worker.work()

    assert (service.reached, marked(db, "acme")) == ([], 0)


@on_sqlite
def test_two_that_were_told_of_the_same_appointment_remind_once(worker: Behind, service: Keyed, db: TenantDB, clinics: list[str]) -> None:
    service.forgetful = True
    book(db, "acme")
    for _ in range(2):  # beat was quicker than the workers
        worker.app.tasks["clinic.find_due"].delay()

    worker.work()

    assert service.reached == ["maya@acme.example"]


@pytest.mark.parametrize(("forgetful", "mails"), [(False, 1), (True, 2)])
def test_a_worker_that_dies_after_the_mail_leaves_no_mark_and_the_key_keeps_it_one_mail(
    worker: Behind, service: Keyed, db: TenantDB, clinics: list[str], *, forgetful: bool, mails: int
) -> None:
    book(db, "acme")
    service.forgetful, service.dies = forgetful, True
    with pytest.raises(SystemExit):
        worker.sweep()
    assert (len(service.sent), marked(db, "acme")) == (1, 0)

    worker.sweep()

    assert (len(service.sent), marked(db, "acme")) == (mails, 1)


def test_a_clinic_that_fails_does_not_stop_the_others(
    worker: Behind, service: Keyed, db: TenantDB, world: World, clinics: list[str]
) -> None:
    for clinic in clinics:
        book(db, clinic)
    with world.inside(db.tenants.get("acme"), db) as connection:
        connection.execute(text("ALTER TABLE appointments RENAME TO lost"))

    worker.sweep()

    assert service.reached == ["maya@beta.example"]


@on_sqlite
def test_a_suspended_clinics_patients_are_left_alone_until_it_is_back(
    worker: Behind, service: Keyed, db: TenantDB, clinics: list[str]
) -> None:
    book(db, "acme")
    worker.app.tasks["clinic.find_due"].delay()
    (sweep,) = worker.waiting()
    worker.execute(sweep)
    db.suspend("acme")  # between the sweep and the task
    worker.work()
    worker.sweep()
    assert service.reached == []

    db.activate("acme")
    worker.sweep()
    assert service.reached == ["maya@acme.example"]


@on_sqlite
def test_an_appointment_at_another_time_is_worth_another_reminder(worker: Behind, service: Keyed, db: TenantDB, clinics: list[str]) -> None:
    appointment_id = book(db, "acme", hours=20)
    worker.sweep()
    starts_at = now() + timedelta(hours=3)

    def change(session: Session, **values: Any) -> None:
        appointments.update(session, appointment_id, APPOINTMENT.update.model_validate(values))

    with db.begin("acme") as session:
        change(session, notes="brings the X-rays")
    worker.sweep()
    assert len(service.sent) == 1
    with db.begin("acme") as session:
        change(session, starts_at=starts_at, ends_at=starts_at + timedelta(minutes=30))
    worker.sweep()

    assert len(service.sent) == 2
    assert f"{starts_at:%H:%M}" in service.sent[-1][2]


@on_sqlite
def test_who_was_written_to_is_in_the_clinics_own_log(worker: Behind, db: TenantDB, clinics: list[str]) -> None:
    book(db, "acme")

    worker.sweep()

    (entry,) = db.audit.search("acme", records=True, action="patient.")
    assert (entry.action, entry.actor) == ("patient.remind", "system")
    assert db.audit.search("beta", records=True, action="patient.") == []


@on_sqlite
def test_the_file_that_a_mail_becomes_is_there_once(
    db: TenantDB, clinics: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLINIC_TASK_KEY", KEY)
    appointment_id = book(db, "acme")
    worker = behind(db, Outbox(tmp_path / "outbox"))
    worker.sweep()

    (file,) = (tmp_path / "outbox").iterdir()
    assert file.name.startswith(f"reminder-{appointment_id}-")
    worker.app.close()


# -- bookings --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def front(request: pytest.FixtureRequest, db: TenantDB, mails: Mails, worker: Behind) -> AsyncIterator[httpx.AsyncClient]:
    """A front end that publishes to the worker."""
    async with served(request.param, db, worker.app) as client:
        yield client


@asynccontextmanager
async def served(front: str, db: TenantDB, worker: Celery) -> AsyncIterator[httpx.AsyncClient]:
    if front == "flask":
        transport: Any = Threaded(create_flask_app(db, token_key=TOKEN_KEY, worker=worker))
    else:
        transport = httpx.ASGITransport(create_app(db, token_key=TOKEN_KEY, mailer=Mails(), worker=worker))
    async with httpx.AsyncClient(transport=transport, base_url="http://clinic.test") as client:
        yield client


async def appointment(person: Person) -> dict[str, Any]:
    return {**sample("appointments", await referred_to(person)), "patient_id": (await person.create("patients", **MAYA))["id"]}


MAYA = {"first_name": "Maya", "last_name": "Bauer", "email": "maya@acme.example"}


@either_front
async def test_what_was_booked_is_confirmed_once_it_is_committed(acme: Person, worker: Behind, service: Keyed, db: TenantDB) -> None:
    wanted = await appointment(acme)
    assert (await acme.post("appointments", {**wanted, "ends_at": wanted["starts_at"]})).status_code == 422
    assert worker.waiting() == []  # rolled back

    await acme.create("appointments", **wanted)
    worker.work()

    assert [(to, "2026-05-04 at 07:00 UTC" in text) for to, _, text in service.sent] == [("maya@acme.example", True)]
    (entry,) = db.audit.search("acme-dental", records=True, action="patient.confirm")
    assert entry.actor == str(db.users.get(acme.email).id)  # who booked it


@either_front
async def test_a_booking_stands_where_the_broker_does_not(acme: Person, db: TenantDB, front: httpx.AsyncClient, request: Any) -> None:
    nobody = create_worker(db, broker="redis://127.0.0.1:1/0", mailer=Mails())
    async with served(request.node.callspec.params["front"], db, nobody) as client:
        made = await replace(acme, client=client).post("appointments", await appointment(acme))
    nobody.close()

    assert made.status_code == 201
    assert await acme.ids("appointments") == [made.json()["id"]]


async def test_of_two_claims_at_once_one_waits_and_gets_nothing(db: TenantDB, clinics: list[str]) -> None:
    appointment_id = book(db, "acme")

    def claim() -> reminders.Letter | None:
        with db.begin("acme") as session:
            return reminders.claim(session, appointment_id, now(), clinic="Acme")

    with ThreadPoolExecutor(1) as other, db.begin("acme") as session:
        assert reminders.claim(session, appointment_id, now(), clinic="Acme") is not None
        late = other.submit(claim)
        session.commit()
        assert late.result() is None


# -- real processes --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def redis() -> Iterator[str]:
    with redis_server() as url:
        yield url


@contextmanager
def working(env: dict[str, str]) -> Iterator[Process]:
    words = (
        "celery",
        "-A",
        "examples.clinic.worker",
        "worker",
        "-B",
        "--concurrency=2",
        "-l",
        "INFO",
        "--without-gossip",
        "--without-mingle",
    )
    with started(*words, env=env, until=r" ready\.") as process:
        yield process


def wait_for(what: Callable[[], bool], process: Process) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline and process.popen.poll() is None, process.output
        time.sleep(0.05)


@pytest.mark.services
def test_a_worker_with_beat_reminds_every_clinic_and_one_that_is_killed_leaves_nobody_out_and_nobody_twice(
    world: World, db: TenantDB, clinics: list[str], redis: str, tmp_path: Path
) -> None:
    for clinic in clinics:
        for number in range(20):
            book(db, clinic, f"patient-{number}")
    broken = db.provision("broken")
    with world.inside(broken, db) as connection:
        connection.execute(text("ALTER TABLE appointments RENAME TO lost"))
    outbox = tmp_path / "outbox"
    number = 1 if world.backend == "postgresql" else 2
    more = {"CLINIC_BROKER_URL": redis.replace("/0", f"/{number}"), "CLINIC_OUTBOX": str(outbox), "CLINIC_REMIND_EVERY": "1"}
    env = environment(world, db, CLINIC_TASK_KEY=KEY, **more)

    with working(env) as first:
        wait_for(lambda: outbox.is_dir() and any(outbox.glob("*.eml")), first)
        os.killpg(first.popen.pid, signal.SIGKILL)
        first.popen.wait()
    with working(env) as second:
        wait_for(lambda: sum(marked(db, clinic) for clinic in clinics) == 40, second)

    mails = [message_from_bytes(file.read_bytes()) for file in outbox.glob("*.eml")]
    assert sorted(mail["To"] for mail in mails) == sorted(
        f"patient-{number}@{clinic}.example" for clinic in clinics for number in range(20)
    )
    for clinic in clinics:  # written in the transaction that marks, so twice for whoever was marked twice
        assert len(db.audit.search(clinic, records=True, action="patient.remind")) == 20
    assert "SomeTenantsFailed" in second.output and "broken" in second.output
