"""The paths of test_verdicts.py once more, in raw bytes over real sockets: uvicorn and gunicorn decode and pass on what no test made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.adapters.faces import FACES
from tests.adapters.served import serve
from tests.adapters.world import World

REFUSED: list[str | bytes] = [
    "/auth/../patients",  # P1
    "/auth/./patients",
    "/auth/%2e%2e/patients",  # P2
    "/auth/..%2fpatients",
    "/auth/login%2f..%2f..%2fpatients",
    "/auth/%252e%252e/patients",
    "//auth/login",  # P3
    "/auth//login",
    "//evil.example/auth/login",
    "/auth/login%00",  # P6
    "/auth/login%0d%0a",
    b"/auth/login\x00",
    b"/auth/login\t",
    "/auth\\..\\patients",
    "/auth%5c..%5cpatients",
    "/auth/..;/patients",
    "http://evil/auth/login",
    "http://clinic.example//auth/login",
]
ASKED_WHO_IT_IS = [
    "/authors",
    "/auth-admin",
    "/auth",
    "/auth/",
    "/AUTH/login",
    "/auth;x=1/login",
    "/auth/login;x",
    "/auth?/login",
    "/patients",
]


@pytest.mark.parametrize("face", list(FACES))
def test_no_request_line_gets_past_the_exempt_list_of_a_real_server(world: World, tmp_path: Path, face: str) -> None:
    with serve(face, world, tmp_path / "server.log") as server:
        for target in ("/auth/login", "/%61uth/login", "/auth/login?next=//evil/../x"):
            answer = server.ask(target)
            assert (answer.status, json.loads(answer.body)["bound"]) == (200, None), target
        for target in REFUSED:
            for headers in ({}, world.as_ann):
                assert server.ask(target, headers).status == 400, target
        for target in ASKED_WHO_IT_IS:
            assert server.ask(target).status == 401, target
        answer = server.ask("/patients", world.as_ann)
        assert (answer.status, json.loads(answer.body)["bound"]) == (200, "acme")
        assert server.ask("/read", world.as_bob).body == b"globex"


@pytest.mark.parametrize("face", list(FACES))
def test_a_real_server_sends_one_head_and_the_length_of_its_body(world: World, tmp_path: Path, face: str) -> None:
    """Also where the application had begun its response before it failed: gunicorn would send both heads."""
    with serve(face, world, tmp_path / "server.log") as server:
        for target in ("/stream/fails", "/raises"):
            answer = server.ask(target, world.as_ann)
            names = [line.partition(":")[0].lower() for line in answer.head.splitlines()[1:]]
            assert answer.status == 403 and json.loads(answer.body)["code"] == "tenant-suspended"
            assert (names.count("content-type"), names.count("content-length")) == (1, 1)
            assert f"content-length: {len(answer.body)}" in answer.head.lower()
        refused = server.ask("/patients", method="HEAD")
        assert (refused.status, refused.body) == (401, b"") and "content-length: " in refused.head.lower()
        assert server.ask("/stream", world.as_bob).body == b"globex" * 3
