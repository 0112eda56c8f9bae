"""The table of roles, tried over HTTP, cell by cell, at both front ends."""

from __future__ import annotations

import pytest

from examples.clinic.roles import Action, allowed
from tests.clinic.people import Person, Reception, either_front
from tests.clinic.rows import CHANGES, RESOURCES, referred_to, sample

ACTIONS: tuple[Action, ...] = ("read", "create", "update", "delete", "restore")
REFUSED = 403


@either_front
@pytest.mark.parametrize("role", ["owner", "admin", "user", "readonly"])
async def test_a_role_may_do_what_the_table_says_and_nothing_else(acme: Person, reception: Reception, role: str) -> None:
    ids = await referred_to(acme)
    person = await reception.hire("acme-dental", role)
    said, done = {}, {}
    for resource in RESOURCES:
        row, gone = [(await acme.create(resource, **sample(resource, ids, mark)))["id"] for mark in ("one", "two")]
        await acme.delete(f"{resource}/{gone}")
        answers = {
            "read": await person.get(f"{resource}/{row}"),
            "create": await person.post(resource, sample(resource, ids, "three")),
            "update": await person.patch(f"{resource}/{row}", CHANGES[resource]),
            "delete": await person.delete(f"{resource}/{row}"),
            "restore": await person.post(f"{resource}/{gone}/restore"),
        }
        assert {answer.status_code for answer in answers.values()} <= {200, 201, 204, REFUSED}
        assert (await person.get(resource)).status_code == answers["read"].status_code
        done[resource] = {action for action, answer in answers.items() if answer.status_code != REFUSED}
        said[resource] = {action for action in ACTIONS if role in allowed(resource, action)}

    assert done == said


async def test_readonly_reads_everything_and_writes_nothing(acme: Person, reception: Reception) -> None:
    assert all([str(role) for role in allowed(resource, "read")] == ["owner", "admin", "user", "readonly"] for resource in RESOURCES)
    assert not any("readonly" in allowed(resource, action) for resource in RESOURCES for action in ACTIONS if action != "read")
    quote_of = sample("documents", await referred_to(acme))
    quote = await acme.create("documents", **quote_of)
    patient = await acme.create("patients", first_name="Maya", last_name="Bauer", email="maya@mail.example")
    reader = await reception.hire("acme-dental", "readonly")

    answers = [
        await reader.post(f"documents/{quote['id']}/invoice"),
        await reader.post(f"patients/{patient['id']}/email-verification"),
        await reader.post(f"patients/{patient['id']}/email-verification/confirm", {"code": "x"}),
        await reader.post("patients", {"not": "even valid"}),
    ]

    assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(403, "role-required")] * 4


@either_front
async def test_the_role_that_counts_is_the_registry_s_and_not_the_token_s(acme: Person, reception: Reception) -> None:
    person = await reception.hire("acme-dental", "admin")
    reception.db.memberships.add(person.email, "acme-dental", role="readonly")

    assert (await person.post("categories", {"name": "Implants"})).status_code == REFUSED
