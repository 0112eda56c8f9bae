"""The clinic over HTTP, each test with a registry and clinics of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from fastapi import FastAPI

from examples.clinic.app import create_app
from examples.clinic.db import first_rows
from examples.clinic.flask_app import create_app as create_flask_app
from tenantdb import TenantDB
from tests.clinic.people import TOKEN_KEY, Mails, Person, Reception, Threaded
from tests.world import World


@pytest.fixture(params=["sqlite", "postgresql"])
def world(request: pytest.FixtureRequest) -> World:
    made: World = request.getfixturevalue(f"{request.param}_world")
    return made


@pytest.fixture
def db(world: World) -> Iterator[TenantDB]:
    with world.make_db(migrations="examples.clinic:migrations") as db:
        db.seed(first_rows)
        yield db


@pytest.fixture
def mails() -> Mails:
    return Mails()


@pytest.fixture
def app(db: TenantDB, mails: Mails) -> FastAPI:
    return create_app(db, token_key=TOKEN_KEY, mailer=mails)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://clinic.test") as client:
        yield client


@pytest.fixture(params=["fastapi"])
async def front(request: pytest.FixtureRequest, client: httpx.AsyncClient, db: TenantDB) -> AsyncIterator[httpx.AsyncClient]:
    """Where people go once they have signed up: `either_front` makes a module's tests run with both front ends."""
    if request.param == "fastapi":
        yield client
        return
    app = create_flask_app(db, token_key=TOKEN_KEY)
    async with httpx.AsyncClient(transport=Threaded(app), base_url="http://clinic.test") as by_flask:
        yield by_flask


@pytest.fixture
def reception(client: httpx.AsyncClient, db: TenantDB, front: httpx.AsyncClient) -> Reception:
    return Reception(client, db, front)


@pytest.fixture
async def acme(reception: Reception) -> Person:
    """The owner of a clinic."""
    return await reception.sign_up("acme-dental")
