"""Two clinics in two databases, a member of each, and a way to call an ASGI application that no client library tidies up."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import ForeignKey, event
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from tenantdb.aio import AsyncTenantDB
from tenantdb.database import TenantDB
from tenantdb.model import Tenant, User
from tenantdb.tokens import Tokens


class Base(DeclarativeBase):
    pass


class Patient(Base):
    """A doctor that does not exist is noticed by COMMIT and not before: how these tests make COMMIT fail."""

    __tablename__ = "patients"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    doctor: Mapped[int | None] = mapped_column(ForeignKey("patients.id", deferrable=True, initially="DEFERRED"))


@dataclass
class World:
    """Patient 1 of each clinic has the clinic's slug as its name."""

    db: TenantDB
    adb: AsyncTenantDB
    tokens: Tokens
    acme: Tenant
    globex: Tenant
    ann: User  # admin of acme
    bob: User  # user of globex

    def bearer(self, user: User, tenant: Tenant | None = None, **claims: Any) -> dict[str, str]:
        return {"authorization": "Bearer " + self.tokens.issue(user.id, tenant.id if tenant else None, **claims)}

    @property
    def as_ann(self) -> dict[str, str]:
        return self.bearer(self.ann, self.acme)

    @property
    def as_bob(self) -> dict[str, str]:
        return self.bearer(self.bob, self.globex)

    def patients(self, slug: str) -> list[str]:
        with self.db.session(slug) as session:
            return [patient.name for patient in session.query(Patient).order_by(Patient.id)]


TOKEN_KEY = "a key for these tests of 32 bytes"


def new_tokens() -> Tokens:
    return Tokens(TOKEN_KEY, issuer="clinic", audience="clinic-api", tenant_required=False)


@contextmanager
def new_world(folder: Path) -> Iterator[World]:
    with TenantDB(f"sqlite:///{folder}/central.sqlite3") as db:
        db.init()
        yield peopled(db)


def peopled(db: TenantDB) -> World:
    """A new installation with its clinics and their people."""
    ann = db.users.create("ann@acme.example", "correct horse battery")
    bob = db.users.create("bob@globex.example", "correct horse battery")
    acme, globex = (add_tenant(db, slug) for slug in ("acme", "globex"))
    db.memberships.add(ann, acme, role="admin")
    db.memberships.add(bob, globex, role="user")
    return World(db, AsyncTenantDB(db), new_tokens(), acme, globex, ann, bob)


def add_tenant(db: TenantDB, slug: str) -> Tenant:
    tenant = db.provision(slug)
    with db.migrations.owner_connection(tenant) as connection:
        Base.metadata.create_all(connection)
        connection.commit()
    with db.begin(slug) as session:
        session.add(Patient(id=1, name=slug))
    return tenant


@contextmanager
def queries(db: TenantDB) -> Iterator[list[str]]:
    """What the registry is asked in the block, other than by the thread that watches it."""
    asked: list[str] = []

    def count(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if not threading.current_thread().name.startswith("tenantdb-watch"):
            asked.append(statement)

    engine = db._registry._transactions.engine
    event.listen(engine, "before_cursor_execute", count)
    try:
        yield asked
    finally:
        event.remove(engine, "before_cursor_execute", count)


Message = MutableMapping[str, Any]
App = Callable[[MutableMapping[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


@dataclass
class Answer:
    messages: list[Message] = field(default_factory=list)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def http_scope(
    path: str,
    headers: dict[str, str] | None = None,
    *,
    method: str = "GET",
    raw_path: bytes | None = None,
    root_path: str = "",
    more: Iterable[tuple[bytes, bytes]] = (),
) -> dict[str, Any]:
    """A request's scope with exactly these paths; a client library would have normalised them."""
    pairs = [(name.encode(), value.encode()) for name, value in {"host": "clinic.example", **(headers or {})}.items()]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode() if raw_path is None else raw_path,
        "query_string": b"",
        "root_path": root_path,
        "headers": [*pairs, *more],
        "server": ("clinic.example", 80),
        "client": ("192.0.2.1", 5000),
    }


async def send_scope(app: App, scope: dict[str, Any], body: bytes = b"") -> Answer:
    """Call ``app`` with a scope and a body, and collect what it sends."""
    answer = Answer()

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        answer.messages.append(message)

    await app(scope, receive, send)
    return answer


async def request(app: App, path: str, headers: dict[str, str] | None = None, *, json_body: Any = None, **how: Any) -> Answer:
    if json_body is None:
        return await send_scope(app, http_scope(path, headers, **how))
    headers = {**(headers or {}), "content-type": "application/json"}
    return await send_scope(app, http_scope(path, headers, method="POST", **how), json.dumps(json_body).encode())


class WebSocketPeer:
    """The client's end of a websocket."""

    def __init__(self, app: App, path: str, headers: dict[str, str]) -> None:
        scope = {**http_scope(path, headers), "type": "websocket", "scheme": "ws", "subprotocols": []}
        self._to_app: asyncio.Queue[Message] = asyncio.Queue()
        self._from_app: asyncio.Queue[Message] = asyncio.Queue()
        self.served = asyncio.ensure_future(app(scope, self._to_app.get, self._from_app.put))

    async def ask(self, kind: str, **what: Any) -> Message | None:
        """Send an event and wait for the application's next one; None where it ends without one."""
        self.say(kind, **what)
        return await self.next()

    def say(self, kind: str, **what: Any) -> None:
        """Send an event."""
        self._to_app.put_nowait({"type": kind, **what})

    @property
    def listened_to(self) -> bool:
        """Whether the application waits for an event."""
        return bool(self._to_app._getters)  # type: ignore[attr-defined]

    async def next(self) -> Message | None:
        """Wait for the application's next event; None where it ends without one."""
        answer = asyncio.ensure_future(self._from_app.get())
        await asyncio.wait({answer, self.served}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done() or not self._from_app.empty():
            return await answer
        answer.cancel()
        return None

    def sent(self) -> list[Message]:
        """What the application has sent and nobody has waited for."""
        return [self._from_app.get_nowait() for _ in range(self._from_app.qsize())]
