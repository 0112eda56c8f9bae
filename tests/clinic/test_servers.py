"""Both front ends as they are deployed: uvicorn and gunicorn, processes of their own, over real sockets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import psycopg
import pytest

from examples.clinic.access import access_tokens
from examples.clinic.db import first_rows
from tenantdb import TenantDB
from tests.clinic.people import PASSWORD, TOKEN_KEY, registration
from tests.clinic.processes import PATIENCE, environment, fastapi_served, flask_served, started
from tests.world import PostgreSQLWorld, World

CLINICS = ("acme-dental", "beta-clinic")


@dataclass
class Deployment:
    world: World
    db: TenantDB
    fronts: dict[str, httpx.Client]
    tokens: dict[str, str]
    """Of each clinic's owner, by slug."""

    def get(self, front: str, clinic: str, path: str = "patients") -> httpx.Response:
        return self.fronts[front].get(f"/api/v1/{path}", headers={"Authorization": f"Bearer {self.tokens[clinic]}"})

    def post(self, front: str, clinic: str, path: str, **body: Any) -> httpx.Response:
        return self.fronts[front].post(f"/api/v1/{path}", json=body, headers={"Authorization": f"Bearer {self.tokens[clinic]}"})


def founded(world: World) -> TenantDB:
    db = world.make_db(migrations="examples.clinic:migrations")
    db.seed(first_rows)
    return db


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def there(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    """Two clinics that have signed up over HTTP, with a patient each."""
    world: World = request.getfixturevalue(f"{request.param}_world")
    db = founded(world)
    env = environment(world, db)
    with fastapi_served(env) as by_fastapi, flask_served(env) as by_flask:
        with httpx.Client(base_url=by_fastapi, timeout=PATIENCE) as fastapi, httpx.Client(base_url=by_flask, timeout=PATIENCE) as flask:
            made = Deployment(world, db, {"fastapi": fastapi, "flask": flask}, {})
            for slug in CLINICS:
                answer = fastapi.post("/auth/register", json=registration(slug, f"owner@{slug}.example"))
                assert answer.status_code == 201, answer.text
                made.tokens[slug] = answer.json()["access_token"]
                assert made.post("flask", slug, "patients", first_name="Maya", last_name=slug).status_code == 201
            yield made


def test_the_command_for_development_serves_it_too(there: Deployment) -> None:
    words = ("flask", "--app", "examples.clinic.flask_app", "run", "--port", "0")
    with started(*words, env=environment(there.world, there.db), until=r"Running on (http://[\d.:]+)") as process:
        headers = {"Authorization": f"Bearer {there.tokens['acme-dental']}"}
        answer = httpx.get(f"{process.found}/api/v1/patients", headers=headers, timeout=PATIENCE)

    assert [row["last_name"] for row in answer.json()["items"]] == ["acme-dental"]


def test_a_clinic_is_the_same_and_alone_at_both(there: Deployment) -> None:
    for slug, other in (CLINICS, CLINICS[::-1]):
        lists = [there.get(front, slug).json() for front in there.fronts]
        assert [[row["last_name"] for row in found["items"]] for found in lists] == [[slug], [slug]]
        row = lists[0]["items"][0]["id"]
        for front in there.fronts:
            assert there.get(front, slug, f"patients/{row}").status_code == 200
            assert there.get(front, other, f"patients/{row}").status_code == 404


def test_a_token_of_the_one_serves_at_the_other(there: Deployment) -> None:
    for issuing, serving in (("fastapi", "flask"), ("flask", "fastapi")):
        login = {"email": "owner@acme-dental.example", "password": PASSWORD}
        answer = there.fronts[issuing].post("/auth/login", json=login)
        assert answer.status_code == 200, answer.text
        me = there.fronts[serving].get("/auth/me", headers={"Authorization": f"Bearer {answer.json()['access_token']}"})
        assert me.json()["clinic"]["slug"] == "acme-dental"


def test_a_crowd_of_requests_reaches_each_its_own_clinic(there: Deployment) -> None:
    def ask(number: int) -> tuple[str, list[str]]:
        slug, front = CLINICS[number % 2], ("fastapi", "flask")[number // 2 % 2]
        return slug, [row["last_name"] for row in there.get(front, slug).json()["items"]]

    with ThreadPoolExecutor(8) as crowd:
        for slug, found in crowd.map(ask, range(120)):
            assert found == [slug]


def test_neither_answers_without_a_good_token_and_both_answer_a_balancer(there: Deployment) -> None:
    forged = access_tokens("somebody else's key, just as long as the real one").issue(
        there.db.users.list()[0].id, there.db.tenants.list()[0].id
    )
    for client in there.fronts.values():
        assert client.get("/healthz").status_code == 200
        assert client.get("/api/v1/patients").status_code == 401
        assert client.get("/api/v1/patients", headers={"Authorization": f"Bearer {forged}"}).status_code == 401


def test_a_suspension_by_another_process_reaches_every_worker_in_time(there: Deployment) -> None:
    def status(front: str) -> int:
        return there.get(front, "beta-clinic").status_code

    assert {status(front) for front in there.fronts for _ in range(8)} == {200}  # every worker has it in its memory
    there.db.suspend("beta-clinic")
    suspended = time.monotonic()
    try:
        for front in there.fronts:
            refused = 0
            while refused < 8:  # in a row, of any worker
                asked = time.monotonic()
                if status(front) == 403:
                    refused += 1
                else:
                    refused = 0
                    assert asked - suspended < there.db.settings.cache_ttl
            assert there.get(front, "acme-dental").status_code == 200
    finally:
        there.db.activate("beta-clinic")


def test_workers_that_were_forked_from_a_used_parent_share_no_connection_with_it(postgresql_world: PostgreSQLWorld) -> None:
    db = founded(postgresql_world)
    acme = db.provision("acme-dental")
    user = db.users.create("owner@acme-dental.example", PASSWORD)
    db.memberships.add(user, acme, role="owner")
    headers = {"Authorization": f"Bearer {access_tokens(TOKEN_KEY).issue(user.id, acme.id)}"}
    seen: dict[int, set[int]] = {}
    with flask_served(environment(postgresql_world, db), "tests.clinic.preloaded:app", "--preload") as base:

        def look(_: int) -> dict[str, Any]:
            answer = httpx.get(f"{base}/api/v1/where", headers=headers, timeout=PATIENCE)
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()
            return found

        deadline = time.monotonic() + PATIENCE
        with ThreadPoolExecutor(4) as crowd:
            while len(seen) < 2 and time.monotonic() < deadline:
                for found in crowd.map(look, range(16)):
                    seen.setdefault(found["pid"], set()).add(found["backend"])
                    parent = found["parent"]
        with psycopg.connect(postgresql_world.superuser_url) as superuser:
            alive = superuser.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", [parent["backend"]]).fetchone()

    assert len(seen) == 2 and parent["pid"] not in seen
    one, other = seen.values()
    assert one.isdisjoint(other) and parent["backend"] not in one | other
    assert alive == (1,)  # what the children have done has not ended it
