"""The whole idea in one command: three clinics sign up over HTTP, each gets a database of its own, and none reaches another's.

``python -m examples.clinic.demo`` on a PostgreSQL that it brings along; ``--sqlite`` without one; ``--serve`` leaves the application up.
Every line that is printed with a check mark was checked; the exit code is 0 only if all were.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn
from rich.console import Console

if TYPE_CHECKING:
    from tenantdb import TenantDB

CLINICS = {"acme-dental": "Maya Bauer", "blue-river": "Noah Fischer", "cedar-health": "Lina Weber"}
out = Console(highlight=False)


class Claims:
    """Prints what was shown, with the time it took, and remembers what was not true."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self._since = time.perf_counter()

    def title(self, text: str) -> None:
        out.print(f"\n[bold]{text}[/bold]")
        self._since = time.perf_counter()

    def check(self, claim: str, held: object, detail: object = "") -> None:
        took = (time.perf_counter() - self._since) * 1000
        mark = "[green]✓[/green]" if held else "[red]✗[/red]"
        out.print(f"  {mark} {claim} [dim]{took:.0f} ms[/dim]" + (f"  {detail}" if not held else ""), soft_wrap=True)
        if not held:
            self.failed.append(claim)
        self._since = time.perf_counter()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.clinic.demo", description=__doc__)
    parser.add_argument("--sqlite", action="store_true", help="on SQLite files instead of PostgreSQL")
    parser.add_argument("--serve", action="store_true", help="leave the application up, with two ready tokens, until Ctrl-C")
    arguments = parser.parse_args()
    began = time.perf_counter()
    claims = Claims()
    with tempfile.TemporaryDirectory(prefix="tenantdb-demo-") as folder, contextlib.ExitStack() as stack:
        os.environ |= {"CLINIC_TOKEN_KEY": secrets.token_urlsafe(48), "CLINIC_OUTBOX": f"{folder}/outbox"}
        if arguments.sqlite:
            os.environ["TENANTDB_URL"] = f"sqlite:///{folder}/central.sqlite3"
        else:
            stack.enter_context(postgresql(claims))
        from examples.clinic.db import db  # reads the environment that was just set

        claims.title("The registry")
        db.init()
        problems = [finding for finding in db.check() if str(finding.severity) == "problem"]
        claims.check("tables made, keys and rights in order", not problems, problems)
        with serving() as base, httpx.Client(base_url=base, timeout=60) as http:
            tokens = register(http, claims, db)
            patients = write_and_read(http, claims, tokens)
            isolation(http, claims, tokens, patients)
            if not arguments.sqlite:
                passwords(claims, db)
            suspension(http, claims, db, tokens)
            out.print(f"\n{'All of it held' if not claims.failed else 'NOT all of it held'}, in {time.perf_counter() - began:.1f} s.")
            if arguments.serve:
                serve(base, tokens)
        db.close()
    return 1 if claims.failed else 0


@contextlib.contextmanager
def postgresql(claims: Claims) -> Iterator[None]:
    """A PostgreSQL of our own, set up as an operator would: a superuser works once, and nobody needs to be one afterwards."""
    import psycopg
    from psycopg import sql

    from tenantdb.backends.postgresql.bootstrap import bootstrap
    from tenantdb.registry.secrets import generate_key
    from tenantdb.settings import ConnectionURL, Settings
    from tenantdb.testing.postgres import EmbeddedServer

    claims.title("PostgreSQL, from the wheel, with passwords required")
    with EmbeddedServer() as server:
        logins = {name: secrets.token_urlsafe(24) for name in ("app", "admin", "provisioner")}
        with psycopg.connect(server.url(), autocommit=True) as connection:
            version = connection.info.parameter_status("server_version")
            claims.check(f"PostgreSQL {version} started on {server.host}:{server.port}", True)
            for name in ("app", "admin"):
                connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), sql.Literal(logins[name])))
            connection.execute("CREATE DATABASE central OWNER admin")
            connection.execute("REVOKE ALL ON DATABASE central FROM PUBLIC")
            connection.execute("GRANT CONNECT ON DATABASE central TO app")
            os.environ |= {
                "TENANTDB_URL": server.url("app", logins["app"], "central"),
                "TENANTDB_REGISTRY_ADMIN": server.url("admin", logins["admin"], "central"),
                "TENANTDB_SERVER": server.url("provisioner", logins["provisioner"]),
                "TENANTDB_SECRET_KEYS": generate_key(),
            }
            bootstrap(ConnectionURL.parse(server.url()), "provisioner", logins["provisioner"], Settings.from_env())
            row = connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = 'provisioner'").fetchone()
            claims.check("a provisioner that is not a superuser", row == (False,), row)
        yield


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The clinic's application on a free port of this machine."""
    from examples.clinic.app import create_app

    # The protocol is named because asyncio switches Nagle's algorithm off only where it is: 40 ms for each answer otherwise.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise SystemExit("the application did not start; its log says why")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def register(http: httpx.Client, claims: Claims, db: TenantDB) -> dict[str, str]:
    from examples.clinic.db import CATEGORIES, CONSENT_TEMPLATES

    claims.title("Three clinics sign up: POST /auth/register makes user, clinic and database")
    tokens = {}
    wanted = {"categories": len(CATEGORIES), "consent-templates": len(CONSENT_TEMPLATES)}
    for slug in CLINICS:
        answer = http.post(
            "/auth/register",
            json={
                "user": {"email": f"owner@{slug}.example", "password": secrets.token_urlsafe(12)},
                "clinic": {"slug": slug, "name": slug.replace("-", " ").title()},
            },
        )
        tokens[slug] = answer.json().get("access_token", "")
        revision = db.tenants.get(slug).revision
        made = answer.status_code == 201 and revision == db.migrations.head
        claims.check(f"{slug}: {answer.status_code}, its database is at revision {revision}", made, answer.text)
        rows = {path: http.get(f"/api/v1/{path}", headers=bearer(tokens[slug])).json().get("total") for path in wanted}
        told = ", ".join(f"{count} {path}" for path, count in rows.items())
        claims.check(f"{slug}: its first rows are there, {told}", rows == wanted, wanted)
    return tokens


def write_and_read(http: httpx.Client, claims: Claims, tokens: dict[str, str]) -> dict[str, Any]:
    claims.title("Each writes to its own database and reads it back")
    patients = {}
    for slug, name in CLINICS.items():
        first, last = name.split()
        made = http.post("/api/v1/patients", json={"first_name": first, "last_name": last}, headers=bearer(tokens[slug]))
        patients[slug] = made.json().get("id")
        listed = http.get("/api/v1/patients", headers=bearer(tokens[slug])).json()
        names = [f"{item['first_name']} {item['last_name']}" for item in listed["items"]]
        claims.check(f"{slug}: its patients are {', '.join(names)}", made.status_code == 201 and names == [name], listed)
    return patients


def isolation(http: httpx.Client, claims: Claims, tokens: dict[str, str], patients: dict[str, Any]) -> None:
    claims.title("A token of one clinic reaches nothing of another")
    mine, theirs = list(CLINICS)[:2]
    for slug, status in ((theirs, 200), (mine, 404)):  # ids are random, so an id that is found is the row itself
        found = http.get(f"/api/v1/patients/{patients[theirs]}", headers=bearer(tokens[slug]))
        claims.check(f"{slug} asks for the patient of {theirs}: {status}", found.status_code == status, found.text)
    head, payload, signature = tokens[mine].split(".")
    forged = ".".join((head, payload, signature[::-1]))
    claims.check("a forged token is refused: 401", http.get("/api/v1/patients", headers=bearer(forged)).status_code == 401)
    claims.check("no token: 401", http.get("/api/v1/patients").status_code == 401)


def passwords(claims: Claims, db: TenantDB) -> None:
    """With what a thief of one tenant's credentials would have."""
    import psycopg

    from tenantdb.model import DatabaseRole

    claims.title("A clinic's own database password opens no other database")
    mine, theirs = (db.tenants.record(slug) for slug in list(CLINICS)[:2])
    location = db._locator.locate(mine, DatabaseRole.RUNTIME)

    def opens(database: str | None) -> bool:
        try:
            psycopg.connect(
                host=location.server.host,
                port=location.server.port,
                user=mine.tenant.runtime_role,
                password=location.password(),
                dbname=database,
            ).close()
        except psycopg.OperationalError:
            return False
        return True

    claims.check("its own: opens", opens(mine.tenant.database))
    for name, database in (
        ("another clinic's", theirs.tenant.database),
        ("the registry", "central"),
        ("postgres", "postgres"),
        ("template1", "template1"),
    ):
        claims.check(f"{name}: refused", not opens(database))


def suspension(http: httpx.Client, claims: Claims, db: TenantDB, tokens: dict[str, str]) -> None:
    claims.title("Suspending")
    slug, other = list(CLINICS)[:2]

    def status(of: str) -> int:
        return http.get("/api/v1/patients", headers=bearer(tokens[of])).status_code

    db.suspend(slug)
    claims.check(f"{slug} is suspended: 403", status(slug) == 403)
    claims.check(f"{other} is served: 200", status(other) == 200)
    db.activate(slug)
    again = http.get("/api/v1/patients", headers=bearer(tokens[slug]))
    names = [f"{item['first_name']} {item['last_name']}" for item in again.json().get("items", [])]
    claims.check(f"{slug} is active again, its data is there: {', '.join(names)}", names == [CLINICS[slug]], again.text)


def serve(base: str, tokens: dict[str, str]) -> None:
    out.print(f"\nThe application is up: {base}/docs (Ctrl-C ends it). Two tokens, good for 15 minutes:")
    for slug in list(CLINICS)[:2]:
        out.print(f"\n[bold]{slug}[/bold]\n{tokens[slug]}", soft_wrap=True)
    out.print(f"\n  curl -s {base}/api/v1/patients -H 'authorization: Bearer ...'")
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


if __name__ == "__main__":
    sys.exit(main())
