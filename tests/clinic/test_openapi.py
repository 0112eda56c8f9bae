"""Whatever the OpenAPI document allows, and much that it does not, is answered without a 500."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings

from examples.clinic.app import create_app
from examples.clinic.db import first_rows
from tenantdb import TenantDB
from tests.clinic.people import TOKEN_KEY, Mails, registration


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The clinic's address, under uvicorn."""
    with TenantDB(f"sqlite:///{tmp_path}/central.sqlite3", migrations="examples.clinic:migrations") as db:
        db.init()
        db.seed(first_rows)
        listener = socket.create_server(("127.0.0.1", 0))
        app = create_app(db, token_key=TOKEN_KEY, mailer=Mails())
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            listener.close()


def hammer(url: str, examples: int) -> Counter[int]:
    """Send what the document describes for every operation, as the owner of a clinic; how often each status came back."""
    answered: Counter[int] = Counter()
    with requests.Session() as session:
        signed_up = session.post(f"{url}/auth/register", json=registration("acme-dental", "owner@acme-dental.example"), timeout=30)
        assert signed_up.status_code == 201, signed_up.text
        session.headers["Authorization"] = f"Bearer {signed_up.json()['access_token']}"
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        for result in schema.get_all_operations():
            operation = result.ok()
            if operation.path == "/auth/register" and operation.method.upper() == "POST":
                continue  # each makes a database

            @settings(
                max_examples=examples,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy())
            def send(case: Any) -> None:
                answer = case.call(session=session, timeout=30)
                answered[answer.status_code] += 1
                assert answer.status_code < 500, f"{case.method} {case.path}: {answer.status_code} {answer.text}\n{case.as_curl_command()}"

            send()
    return answered


@pytest.mark.timeout(300)
def test_nothing_that_the_document_describes_is_a_500(served: str) -> None:
    answered = hammer(served, examples=4)

    assert answered[200] > 10 and answered[422] > 10  # it got past the door, and said no as well


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_nothing_that_the_document_describes_is_a_500_for_long(served: str) -> None:
    assert hammer(served, examples=60)[200] > 100
