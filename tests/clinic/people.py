"""People who use the clinic over HTTP, and where they sign up."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tenantdb import TenantDB

TOKEN_KEY = "a key of access tokens, for tests and for nothing else"
PASSWORD = "correct horse battery staple"


@dataclass
class Mails:
    """A mailer that keeps what it should send."""

    sent: list[tuple[str, str, str]] = field(default_factory=list)

    def send(self, to: str, subject: str, text: str, *, key: str | None = None) -> None:
        self.sent.append((to, subject, text))

    def last_word(self, to: str) -> str:
        """The token or code at the end of the last mail to somebody."""
        return next(text for recipient, _, text in reversed(self.sent) if recipient == to).split()[-1]


class Threaded(httpx.AsyncBaseTransport):
    """A WSGI application under an asynchronous client, each request in a thread as with a server that has threads."""

    def __init__(self, app: Any) -> None:
        self._transport = httpx.WSGITransport(app)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        blocking = httpx.Request(request.method, request.url, headers=request.headers, content=request.content)
        answer = await asyncio.to_thread(self._transport.handle_request, blocking)
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.read())


either_front = pytest.mark.parametrize(
    ("world", "front"), [("sqlite", "fastapi"), ("postgresql", "fastapi"), ("sqlite", "flask")], indirect=True
)
"""Both front ends; Flask on PostgreSQL is what test_servers has."""


@dataclass
class Person:
    """Somebody who is signed in. Paths are below /api/v1."""

    client: httpx.AsyncClient
    email: str
    session: dict[str, Any]

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.session['access_token']}"}

    @property
    def clinic(self) -> dict[str, Any]:
        clinic: dict[str, Any] = self.session["clinic"]
        return clinic

    async def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return await self.client.request(method, f"/api/v1/{path}", headers=self.headers, **options)

    async def get(self, path: str, **params: Any) -> httpx.Response:
        return await self.request("GET", path, params=params)

    async def post(self, path: str, json: Any = None) -> httpx.Response:
        return await self.request("POST", path, json=json)

    async def patch(self, path: str, json: Any) -> httpx.Response:
        return await self.request("PATCH", path, json=json)

    async def delete(self, path: str) -> httpx.Response:
        return await self.request("DELETE", path)

    async def create(self, resource: str, **values: Any) -> dict[str, Any]:
        """A new row; the test fails if it cannot be made."""
        answer = await self.post(resource, values)
        assert answer.status_code == 201, answer.text
        row: dict[str, Any] = answer.json()
        return row

    async def ids(self, resource: str, **params: Any) -> list[str]:
        """The ids that a list shows."""
        answer = await self.get(resource, **params)
        assert answer.status_code == 200, answer.text
        return [row["id"] for row in answer.json()["items"]]


@dataclass
class Reception:
    """Where people sign up and in, before they go to the front end that the test is about."""

    client: httpx.AsyncClient
    db: TenantDB
    front: httpx.AsyncClient

    async def sign_up(self, slug: str, **options: Any) -> Person:
        email = f"owner@{slug}.example"
        answer = await self.client.post("/auth/register", json=registration(slug, email), **options)
        assert answer.status_code == 201, answer.text
        return Person(self.front, email, answer.json())

    async def sign_in(self, email: str, clinic: str | None = None) -> httpx.Response:
        return await self.client.post("/auth/login", json={"email": email, "password": PASSWORD, "clinic": clinic})

    async def hire(self, clinic: str, role: str) -> Person:
        """A new user with a role in a clinic."""
        email = f"new-{role}@{clinic}.example"
        user = self.db.users.create(email, PASSWORD)
        self.db.memberships.add(user, clinic, role=role)
        answer = await self.sign_in(email)
        assert answer.status_code == 200, answer.text
        return Person(self.front, email, answer.json())


def registration(slug: str, owner: str, **clinic: Any) -> dict[str, Any]:
    return {
        "user": {"email": owner, "password": PASSWORD, "first_name": "Ada", "last_name": "Okafor"},
        "clinic": {"slug": slug, "name": f"The {slug} clinic", **clinic},
    }
