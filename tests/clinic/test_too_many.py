"""Whoever signs clinics up in a loop: 429 and nothing made, while everybody else goes on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from examples.clinic.app import create_app
from tenantdb import TenantDB, errors
from tests.clinic.people import TOKEN_KEY, Mails
from tests.clinic.test_signing_in import registration
from tests.world import World


@pytest.fixture
async def visit(db: TenantDB, world: World) -> AsyncIterator[Callable[[str], Any]]:
    """A browser at some address, on an application that lets two sign up in an hour."""
    app = create_app(world.twin(db, signups_per_actor=2), token_key=TOKEN_KEY, mailer=Mails())
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))

        async def make(address: str) -> httpx.AsyncClient:
            transport = httpx.ASGITransport(app, client=(address, 50_000))
            return await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://clinic.test"))

        yield make


async def test_the_third_clinic_from_one_address_is_refused_and_nothing_is_made(visit: Callable[[str], Any], db: TenantDB) -> None:
    here, elsewhere = await visit("203.0.113.7"), await visit("203.0.113.8")
    made = [await here.post("/auth/register", json=registration(f"clinic-{n}", f"ada-{n}@acme.example")) for n in range(2)]
    assert [answer.status_code for answer in made] == [201, 201]

    refused = await here.post("/auth/register", json=registration("clinic-2", "ada-2@acme.example"))

    assert (refused.status_code, refused.json()["code"]) == (429, "rate-limited")
    assert refused.headers["content-type"] == "application/problem+json"
    assert 0 < int(refused.headers["retry-after"]) <= 1800
    assert "signups" not in refused.text  # what the limits are is nobody's business
    assert [tenant.slug for tenant in db.tenants.list()] == ["clinic-0", "clinic-1"]
    with pytest.raises(errors.UserNotFound):
        db.users.get("ada-2@acme.example")
    other = await elsewhere.post("/auth/register", json=registration("clinic-2", "ada-2@acme.example"))
    assert other.status_code == 201


async def test_a_repeated_registration_is_answered_when_nothing_else_is(visit: Callable[[str], Any]) -> None:
    here = await visit("203.0.113.7")
    headers = {"Idempotency-Key": "4bd1a8c2-sign-up"}
    body = registration("acme-dental", "ada@acme.example")
    first = await here.post("/auth/register", json=body, headers=headers)
    await here.post("/auth/register", json=registration("acme-dental", "eve@evil.example"))

    assert (await here.post("/auth/register", json=registration("acme-two", "bob@acme.example"))).status_code == 429
    again = await here.post("/auth/register", json=body, headers=headers)

    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json()["clinic"] == again.json()["clinic"]


async def test_who_has_an_account_signs_in_all_the_same(visit: Callable[[str], Any]) -> None:
    here = await visit("203.0.113.7")
    body = registration("clinic-0", "ada@acme.example")
    for _ in range(3):
        last = await here.post("/auth/register", json=body)
    assert last.status_code == 429
    answer = await here.post("/auth/login", json={"email": "ada@acme.example", "password": body["user"]["password"]})
    assert answer.status_code == 200
