"""Signing up, in and out, over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from examples.clinic.app import create_app
from tenantdb import Settings, Tenant, TenantDB, errors
from tenantdb.provisioning.provisioner import Provisioner
from tests.clinic.people import PASSWORD, Person, Reception, registration

pytestmark = pytest.mark.parametrize("world", ["sqlite"], indirect=True)  # the registry has tests of its own, on both


async def test_a_clinic_signs_up_and_is_served_at_once(client: httpx.AsyncClient) -> None:
    body = registration("acme-dental", "ada@acme.example", email="desk@acme.example", phone="+33 1 23 45 67", country="FR")

    answer = await client.post("/auth/register", json=body)

    assert answer.status_code == 201
    session = answer.json()
    assert (session["clinic"]["slug"], session["clinic"]["state"], session["clinic"]["role"]) == ("acme-dental", "active", "owner")
    assert (session["token_type"], session["expires_in"]) == ("bearer", 900)
    assert PASSWORD not in answer.text
    patients = await client.get("/api/v1/patients", headers={"Authorization": f"Bearer {session['access_token']}"})
    assert (patients.status_code, patients.json()["total"]) == (200, 0)


async def test_a_name_that_cannot_be_is_refused(client: httpx.AsyncClient, db: TenantDB) -> None:
    for slug in ("", "Acme", "a", "acme'", "acme.dental", "a/b", "a\0b", "clinic\U0001f9b7", "x" * 200, "postgres", "pg_x", "admin"):
        answer = await client.post("/auth/register", json=registration(slug, "ada@acme.example"))
        assert answer.status_code == 422, slug
    assert db.tenants.list() == []
    with pytest.raises(errors.UserNotFound):
        db.users.get("ada@acme.example")


async def test_a_name_that_is_taken_is_refused_and_nothing_is_kept(acme: Person, client: httpx.AsyncClient, db: TenantDB) -> None:
    answer = await client.post("/auth/register", json=registration("acme-dental", "eve@evil.example"))

    assert (answer.status_code, answer.json()["code"]) == (409, "tenant-exists")
    assert acme.clinic["id"] not in answer.text
    with pytest.raises(errors.UserNotFound):
        db.users.get("eve@evil.example")


async def test_an_address_that_is_taken_is_refused_without_its_password(acme: Person, client: httpx.AsyncClient, db: TenantDB) -> None:
    body = registration("acme-two", acme.email.upper())
    body["user"]["password"] = "a wrong password, long enough"

    answer = await client.post("/auth/register", json=body)

    assert (answer.status_code, answer.json()["code"]) == (409, "user-exists")
    assert [tenant.slug for tenant in db.tenants.list()] == ["acme-dental"]


async def test_a_request_that_is_repeated_makes_one_clinic(client: httpx.AsyncClient, db: TenantDB) -> None:
    headers = {"Idempotency-Key": "4bd1a8c2-sign-up"}
    body = registration("acme-dental", "ada@acme.example")

    first, second = [await client.post("/auth/register", json=body, headers=headers) for _ in range(2)]

    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["clinic"] == second.json()["clinic"]
    assert len(db.tenants.list()) == 1


async def test_a_repeated_request_is_not_told_of_success_when_its_clinic_is_suspended(client: httpx.AsyncClient, db: TenantDB) -> None:
    headers = {"Idempotency-Key": "4bd1a8c2-sign-up"}
    body = registration("acme-dental", "ada@acme.example")
    await client.post("/auth/register", json=body, headers=headers)
    db.suspend("acme-dental")

    answer = await client.post("/auth/register", json=body, headers=headers)

    assert (answer.status_code, answer.json()["code"]) == (403, "tenant-suspended")


async def test_a_clinic_that_failed_is_not_called_made(client: httpx.AsyncClient, db: TenantDB, monkeypatch: pytest.MonkeyPatch) -> None:
    @db.on("before_activate")
    def refuse(tenant: Tenant) -> None:
        raise ValueError("not this one")

    body = registration("acme-dental", "ada@acme.example")
    first = await client.post("/auth/register", json=body)
    monkeypatch.setattr(Provisioner, "provision", lambda *args, **options: db.tenants.get("acme-dental"))  # another process was quicker
    second = await client.post("/auth/register", json=body)

    assert [(answer.status_code, answer.json()["code"]) for answer in (first, second)] == [(503, "provisioning"), (503, "tenant-not-ready")]
    assert "access_token" not in first.text + second.text


async def test_a_clinic_that_failed_elsewhere_is_promised_again(
    client: httpx.AsyncClient, db: TenantDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = ["not yet"]

    @db.on("before_activate")
    def refuse_once(tenant: Tenant) -> None:
        if reasons:
            raise ValueError(reasons.pop())

    body, states = registration("acme-dental", "ada@acme.example"), []
    for _ in range(2):
        with monkeypatch.context() as web_process:
            web_process.setattr(Settings, "provisioners", property(lambda settings: {}))
            answer = await client.post("/auth/register", json=body)
        assert (answer.status_code, answer.json()["clinic"]["state"]) == (202, "provisioning")
        db.work()
        states.append(str(db.tenants.get("acme-dental").state))

    assert states == ["failed", "active"]


async def test_somebody_who_knows_the_idempotency_key_gets_no_tokens(client: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "4bd1a8c2-sign-up"}
    body = registration("acme-dental", "ada@acme.example")
    await client.post("/auth/register", json=body, headers=headers)

    wrong_password = {**body, "user": {**body["user"], "password": "a wrong password, long enough"}}
    stranger = registration("acme-dental", "eve@evil.example")

    for attempt in (wrong_password, stranger):
        answer = await client.post("/auth/register", json=attempt, headers=headers)
        assert answer.status_code in (401, 403, 409)
        assert "access_token" not in answer.text


async def test_somebody_with_an_account_signs_up_a_second_clinic_and_chooses_when_signing_in(acme: Person, reception: Reception) -> None:
    second = await reception.client.post("/auth/register", json=registration("beta-clinic", acme.email))
    assert (second.status_code, second.json()["clinic"]["role"]) == (201, "owner")

    which = await reception.sign_in(acme.email)
    assert (which.status_code, which.json()["code"]) == (409, "clinic-required")
    assert [(clinic["slug"], clinic["role"]) for clinic in which.json()["clinics"]] == [("acme-dental", "owner"), ("beta-clinic", "owner")]

    chosen = await reception.sign_in(acme.email, "beta-clinic")
    assert (chosen.status_code, chosen.json()["clinic"]["slug"]) == (200, "beta-clinic")
    await acme.create("patients", first_name="Maya", last_name="Bauer")
    assert await Person(reception.client, acme.email, chosen.json()).ids("patients") == []


async def test_a_clinic_that_is_not_the_user_s_cannot_be_signed_in_to(acme: Person, reception: Reception) -> None:
    await reception.sign_up("beta-clinic")

    foreign, unknown, odd = [await reception.sign_in(acme.email, clinic) for clinic in ("beta-clinic", "no-such-clinic", "' OR 1=1")]

    assert [answer.status_code for answer in (foreign, unknown, odd)] == [403] * 3
    assert foreign.content == unknown.content == odd.content


async def test_wrong_password_and_unknown_address_look_the_same(acme: Person, client: httpx.AsyncClient) -> None:
    attempts = [{"email": acme.email, "password": "wrong"}, {"email": "nobody@acme.example", "password": PASSWORD}]

    answers = [await client.post("/auth/login", json=attempt) for attempt in attempts]

    assert [answer.status_code for answer in answers] == [401, 401]
    assert answers[0].content == answers[1].content


async def test_case_does_not_count_in_an_address(acme: Person, reception: Reception) -> None:
    assert (await reception.sign_in(acme.email.upper())).status_code == 200


async def test_a_refresh_token_serves_once(acme: Person, client: httpx.AsyncClient) -> None:
    body = {"refresh_token": acme.session["refresh_token"]}

    first, second = [await client.post("/auth/refresh", json=body) for _ in range(2)]

    assert (first.status_code, second.status_code) == (200, 401)
    renewed = Person(client, acme.email, first.json())
    assert renewed.clinic == acme.clinic
    assert (await renewed.get("patients")).status_code == 200
    assert (await client.post("/auth/refresh", json={"refresh_token": first.json()["refresh_token"]})).status_code == 200


async def test_of_two_who_bring_one_refresh_token_at_once_one_is_served(acme: Person, client: httpx.AsyncClient) -> None:
    body = {"refresh_token": acme.session["refresh_token"]}

    answers = await asyncio.gather(*(client.post("/auth/refresh", json=body) for _ in range(4)))

    assert sorted(answer.status_code for answer in answers) == [200, 401, 401, 401]


async def test_after_signing_out_the_refresh_token_serves_no_more(acme: Person, client: httpx.AsyncClient) -> None:
    body = {"refresh_token": acme.session["refresh_token"]}

    answers = [await client.post(f"/auth/{path}", json=body) for path in ("logout", "logout", "refresh")]

    assert [answer.status_code for answer in answers] == [204, 204, 401]


async def test_an_access_token_is_no_refresh_token_and_the_other_way_round(acme: Person, client: httpx.AsyncClient) -> None:
    assert (await client.post("/auth/refresh", json={"refresh_token": acme.session["access_token"]})).status_code == 401
    answer = await client.get("/api/v1/patients", headers={"Authorization": f"Bearer {acme.session['refresh_token']}"})
    assert answer.status_code == 401


async def test_me_says_who_and_where(acme: Person, reception: Reception) -> None:
    await reception.client.post("/auth/register", json=registration("beta-clinic", acme.email))

    me = (await reception.client.get("/auth/me", headers=acme.headers)).json()

    assert (me["user"]["email"], me["user"]["first_name"], me["user"]["email_verified_at"]) == (acme.email, "Ada", None)
    assert me["clinic"] == acme.clinic
    assert [clinic["slug"] for clinic in me["clinics"]] == ["acme-dental", "beta-clinic"]
    assert "password" not in str(me)


async def test_somebody_without_a_clinic_can_sign_in_and_reaches_no_data(reception: Reception, db: TenantDB) -> None:
    db.users.create("new@mail.example", PASSWORD)

    answer = await reception.sign_in("new@mail.example")

    assert (answer.status_code, answer.json()["clinic"]) == (200, None)
    person = Person(reception.client, "new@mail.example", answer.json())
    assert (await person.get("patients")).status_code == 403
    assert (await reception.client.get("/auth/me", headers=person.headers)).json()["clinics"] == []


async def test_a_user_s_address_is_verified_by_the_token_that_was_mailed(acme: Person, client: httpx.AsyncClient, mails: Any) -> None:
    token = mails.last_word(acme.email)

    answers = [await client.post("/auth/verify-email", json={"token": given}) for given in ("wrong", token, token)]

    assert [answer.status_code for answer in answers] == [401, 200, 401]
    assert answers[1].json()["email_verified_at"] is not None
    assert (await client.get("/auth/me", headers=acme.headers)).json()["user"]["email_verified_at"] is not None


async def test_a_deleted_user_is_nobody(acme: Person, reception: Reception, db: TenantDB) -> None:
    db.users.delete(acme.email)

    assert (await reception.sign_in(acme.email)).status_code == 401
    assert (await reception.client.get("/auth/me", headers=acme.headers)).status_code == 401


async def test_a_suspended_clinic_is_refused_until_it_is_active_again(acme: Person, reception: Reception, db: TenantDB) -> None:
    db.suspend("acme-dental")

    refused = await acme.get("patients")
    assert (refused.status_code, refused.json()["code"]) == (403, "tenant-suspended")
    assert (await reception.sign_in(acme.email)).json()["clinic"]["state"] == "suspended"  # who may sign in learns why

    db.activate("acme-dental")
    assert (await acme.get("patients")).status_code == 200


async def test_the_status_of_a_registration_is_its_members_own(acme: Person, reception: Reception) -> None:
    beta = await reception.sign_up("beta-clinic")
    path = f"/auth/register/{acme.clinic['id']}"

    assert (await reception.client.get(path, headers=acme.headers)).json() == acme.clinic
    assert (await reception.client.get(path, headers=beta.headers)).status_code == 403
    assert (await reception.client.get(path)).status_code == 401


async def test_where_this_process_makes_no_databases_the_clinic_is_promised(
    client: httpx.AsyncClient, db: TenantDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as web_process:
        web_process.setattr(Settings, "provisioners", property(lambda settings: {}))
        answer = await client.post("/auth/register", json=registration("acme-dental", "ada@acme.example"))
    assert (answer.status_code, answer.json()["clinic"]["state"]) == (202, "provisioning")
    status, headers = answer.headers["location"], {"Authorization": f"Bearer {answer.json()['access_token']}"}
    assert int(answer.headers["retry-after"]) > 0

    waiting = await client.get(status, headers=headers)
    assert (waiting.json()["state"], int(waiting.headers["retry-after"]) > 0) == ("provisioning", True)
    early = await client.get("/api/v1/patients", headers=headers)
    assert (early.status_code, early.json()["code"], int(early.headers["retry-after"]) > 0) == (503, "tenant-not-ready", True)

    assert db.work() == 1  # a worker does
    made = await client.get(status, headers=headers)
    assert (made.json()["state"], "retry-after" in made.headers) == ("active", False)
    assert (await client.get("/api/v1/patients", headers=headers)).status_code == 200


async def test_the_documentation_shows_how_to_sign_in(client: httpx.AsyncClient) -> None:
    assert "swagger" in (await client.get("/docs")).text.lower()
    schema = (await client.get("/openapi.json")).json()
    (name,) = schema["components"]["securitySchemes"]
    assert schema["components"]["securitySchemes"][name]["scheme"] == "bearer"
    secured = {
        path for path, methods in schema["paths"].items() if all({name: []} in each.get("security", []) for each in methods.values())
    }
    assert secured == {path for path in schema["paths"] if path.startswith("/api/v1")} | {"/auth/me", "/auth/register/{tenant_id}"}
    assert (await client.get("/healthz")).json() == {"status": "ok"}


def test_without_a_key_for_tokens_nothing_starts(db: TenantDB, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLINIC_TOKEN_KEY", raising=False)
    with pytest.raises(errors.ConfigError, match="CLINIC_TOKEN_KEY"):
        create_app(db)
    with pytest.raises(errors.ConfigError):
        create_app(db, token_key="short")
