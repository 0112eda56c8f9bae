"""The clinic by Flask: the same tokens, the same rows, the same answers. Isolation and roles are tried in test_isolation
and test_roles, PostgreSQL in test_servers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from tenantdb import TenantDB
from tests.clinic.people import PASSWORD, Person, Reception
from tests.clinic.rows import CHANGES, RESOURCES, referred_to, sample

pytestmark = pytest.mark.parametrize(("world", "front"), [("sqlite", "flask")], indirect=True)


def by_fastapi(person: Person, reception: Reception) -> Person:
    """The same person, with the same token, at the other front end."""
    return replace(person, client=reception.client)


async def test_what_one_front_end_writes_the_other_reads(acme: Person, reception: Reception) -> None:
    other = by_fastapi(acme, reception)
    ids = await referred_to(acme)
    for resource in RESOURCES:
        row = await acme.create(resource, **sample(resource, ids))
        path = f"{resource}/{row['id']}"
        assert (await other.get(path)).json() == (await acme.get(path)).json() == row

        changed = await other.patch(path, CHANGES[resource])
        assert (await acme.get(path)).json() == changed.json() != row
        lists = [(await person.get(resource, limit=2)).json() for person in (acme, other)]
        assert lists[0] == lists[1]

        assert (await acme.delete(path)).status_code == 204
        assert (await other.get(path)).status_code == 404
        assert (await other.post(f"{path}/restore")).json()["id"] == (await acme.get(path)).json()["id"]


async def test_a_token_of_either_serves_at_both(acme: Person, reception: Reception, front: httpx.AsyncClient) -> None:
    credentials = {"email": acme.email, "password": PASSWORD}
    for issuing, other in ((front, reception.client), (reception.client, front)):
        signed_in = (await issuing.post("/auth/login", json=credentials)).json()
        headers = {"Authorization": f"Bearer {signed_in['access_token']}"}

        assert signed_in["clinic"] == acme.clinic
        assert (await other.get("/auth/me", headers=headers)).json() == (await issuing.get("/auth/me", headers=headers)).json()
        assert (await other.get("/api/v1/categories", headers=headers)).json()["total"] == 3


async def test_both_refuse_alike(acme: Person, reception: Reception, front: httpx.AsyncClient) -> None:
    requests: list[tuple[str, str, Any]] = [
        ("POST", "/api/v1/patients", {"first_name": "Maya"}),
        ("POST", "/api/v1/patients", {"first_name": "Maya", "last_name": "Bauer", "shoe_size": 38}),
        ("POST", "/api/v1/patients", ["Maya"]),
        ("GET", "/api/v1/patients?limit=1000", None),
        ("GET", "/api/v1/patients?shoe_size=38", None),
        ("GET", "/api/v1/patients/00000000-0000-4000-8000-000000000000", None),
        ("POST", "/api/v1/categories", {"name": "Supplies"}),
        ("POST", "/auth/login", {"email": "x@acme.example"}),
        ("POST", "/auth/login", {"email": "x@acme.example", "password": "wrong"}),
    ]
    for method, path, body in requests:
        here, there = [await client.request(method, path, headers=acme.headers, json=body) for client in (front, reception.client)]

        assert here.status_code == there.status_code >= 400, path
        assert here.headers["content-type"] == there.headers["content-type"] == "application/problem+json"
        told = [{name: answer.json()[name] for name in ("type", "title", "status", "code")} for answer in (here, there)]
        assert told[0] == told[1]


async def test_what_is_no_json_is_bad_input(acme: Person, front: httpx.AsyncClient) -> None:
    refused = await front.post("/api/v1/patients", content=b"{not json", headers=acme.headers)

    assert (refused.status_code, refused.json()["code"]) == (422, "invalid")
    assert "not json" not in refused.text


async def test_what_is_done_by_flask_is_in_the_clinics_own_log(acme: Person, db: TenantDB) -> None:
    patient = await acme.create("patients", first_name="Maya", last_name="Bauer")
    await acme.get(f"patients/{patient['id']}")
    await acme.get("patients")

    entries = list(reversed(db.audit.search("acme-dental", records=True, action="patient.")))
    user = str(db.users.get(acme.email).id)
    assert [(entry.action, entry.object, entry.actor) for entry in entries] == [
        ("patient.create", patient["id"], user),
        ("patient.read", patient["id"], user),
        ("patient.list", None, user),
    ]
    assert entries[-1].details["shown"] == [patient["id"]]


async def test_a_row_is_erased_only_by_who_may(acme: Person, reception: Reception) -> None:
    user = await reception.hire("acme-dental", "user")
    patient = await acme.create("patients", first_name="Maya", last_name="Bauer")
    path = f"patients/{patient['id']}"

    assert (await user.request("DELETE", path, params={"permanent": "true"})).status_code == 403
    assert (await acme.request("DELETE", path, params={"permanently": "yes"})).status_code == 422
    assert (await acme.get(path)).status_code == 200
    assert (await acme.request("DELETE", path, params={"permanent": "true"})).status_code == 204
    assert (await acme.post(f"{path}/restore")).status_code == 404


async def test_a_write_whose_commit_fails_is_no_success(acme: Person) -> None:
    def fail(session: Session) -> None:
        raise RuntimeError("the server is gone")

    event.listen(Session, "before_commit", fail)
    try:
        answer = await acme.post("categories", {"name": "Orthodontics"})
    finally:
        event.remove(Session, "before_commit", fail)

    assert answer.status_code == 500
    assert (await acme.get("categories", q="Orthodontics")).json()["total"] == 0


async def test_a_balancer_is_answered_without_a_token(front: httpx.AsyncClient) -> None:
    answer = await front.get("/healthz")

    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
