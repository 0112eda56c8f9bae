"""A token of one clinic reaches nothing of another, at both front ends."""

from __future__ import annotations

from uuid import UUID, uuid4

import httpx
import pytest

from examples.clinic.access import access_tokens
from tests.clinic.people import TOKEN_KEY, Person, Reception, either_front
from tests.clinic.rows import CHANGES, RESOURCES, referred_to, sample

pytestmark = either_front


@pytest.fixture
async def beta(reception: Reception) -> Person:
    return await reception.sign_up("beta-clinic")


async def test_rows_of_another_clinic_do_not_exist(acme: Person, beta: Person) -> None:
    ids = await referred_to(acme)
    for resource in RESOURCES:
        theirs = (await acme.create(resource, **sample(resource, ids)))["id"]
        path = f"{resource}/{theirs}"

        assert theirs not in await beta.ids(resource)
        answers = [
            await beta.get(path),
            await beta.patch(path, CHANGES[resource]),
            await beta.delete(path),
            await beta.post(f"{path}/restore"),
        ]
        assert [answer.status_code for answer in answers] == [404] * 4, resource
        assert (await acme.get(path)).status_code == 200


async def test_rows_of_another_clinic_cannot_be_referred_to(acme: Person, beta: Person) -> None:
    theirs = await referred_to(acme)
    for resource in ("appointments", "medical-records", "documents", "consents", "products", "services"):
        refused = await beta.post(resource, sample(resource, theirs))

        assert (refused.status_code, refused.json()["code"]) == (422, "invalid"), resource


async def test_each_clinic_numbers_its_own_documents(acme: Person, beta: Person) -> None:
    numbers = [(await person.create("documents", **sample("documents", await referred_to(person))))["number"] for person in (acme, beta)]

    assert numbers[0] == numbers[1]


async def test_a_foreign_and_an_unknown_clinic_look_the_same(acme: Person, beta: Person, front: httpx.AsyncClient) -> None:
    tokens = access_tokens(TOKEN_KEY)
    user = UUID((await front.get("/auth/me", headers=acme.headers)).json()["user"]["id"])

    async def patients_of(tenant: UUID | None) -> tuple[int, bytes]:
        token = tokens.issue(user, tenant, role="owner")
        answer = await front.get("/api/v1/patients", headers={"Authorization": f"Bearer {token}"})
        return answer.status_code, answer.content

    assert (await patients_of(UUID(acme.clinic["id"])))[0] == 200
    foreign, unknown = await patients_of(UUID(beta.clinic["id"])), await patients_of(uuid4())
    assert foreign == unknown
    assert foreign[0] == 403
    assert (await patients_of(None))[0] == 403


async def test_a_member_who_left_reaches_nothing(acme: Person, reception: Reception) -> None:
    person = await reception.hire("acme-dental", "admin")
    reception.db.memberships.remove(person.email, "acme-dental")

    assert (await person.get("patients")).status_code == 403
    again = await reception.client.post("/auth/refresh", json={"refresh_token": person.session["refresh_token"]})
    assert again.status_code == 401


async def test_without_a_good_token_nothing_is_answered(front: httpx.AsyncClient) -> None:
    for authorization in (None, "Bearer", "Bearer x", "Bearer a.b.c", "Basic YTpi", "bearer "):
        headers = {"Authorization": authorization} if authorization else {}
        for path in ("/api/v1/patients", "/auth/me", "/api/v2/nothing"):
            answer = await front.get(path, headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"][:6]) == (401, "Bearer"), (authorization, path)


async def test_a_token_signed_by_somebody_else_is_refused(acme: Person, front: httpx.AsyncClient) -> None:
    token = access_tokens("somebody else's key, just as long as the real one").issue(uuid4(), UUID(acme.clinic["id"]), role="owner")

    answer = await front.get("/api/v1/patients", headers={"Authorization": f"Bearer {token}"})

    assert answer.status_code == 401
