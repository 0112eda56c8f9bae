"""The name of a worker is nobody else's, and a dead one is told from one that may be alive."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tenantdb.provisioning import lease
from tenantdb.provisioning.lease import dead, heartbeat, worker


def test_threads_that_ask_first_and_at_once_get_whole_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name without its first half would be that of a thread of another process too, which would take the other's work for its own."""
    for _ in range(20):
        monkeypatch.setattr(lease, "_worker", lease._Worker())
        namespace, inside = lease._namespace, threading.Event()

        def slow(namespace: object = namespace, inside: threading.Event = inside) -> str:
            inside.wait(0.001)
            return namespace()  # type: ignore[operator, no-any-return]

        monkeypatch.setattr(lease, "_namespace", slow)
        together = threading.Barrier(8)

        def ask(_: int, together: threading.Barrier = together) -> str:
            together.wait(10)
            return worker()

        with ThreadPoolExecutor(8) as threads:
            names = list(threads.map(ask, range(8)))
        monkeypatch.setattr(lease, "_namespace", namespace)
        assert len(set(names)) == 8
        for name in names:
            assert name.startswith(f"{socket.gethostname()}/") and name.split("/")[2] == str(os.getpid())


def test_a_process_that_is_gone_is_dead_and_one_that_is_there_or_elsewhere_is_not() -> None:
    mine = worker()
    child = subprocess.run(
        [sys.executable, "-c", "from tenantdb.provisioning.lease import worker; print(worker())"],
        capture_output=True,
        text=True,
        check=True,
    )
    gone = child.stdout.strip()
    host, namespace, _, rest = mine.split("/", 3)
    elsewhere = f"another-host/{namespace}/{gone.split('/')[2]}/{rest}"
    in_a_container = f"{host}/4026000000/{gone.split('/')[2]}/{rest}"
    assert dead([mine, gone, elsewhere, in_a_container, "", "nonsense", "a/b/c"]) == [gone]


def test_after_a_fork_the_name_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = worker()
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert worker().split("/")[2:4] != mine.split("/")[2:4]


def test_a_heartbeat_renews_until_the_block_ends_and_survives_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import timedelta

    from tenantdb.errors import RegistryUnavailable

    monkeypatch.setattr(lease, "LEASE", timedelta(milliseconds=3))
    beats, enough = [0], threading.Event()

    def renew() -> None:
        beats[0] += 1
        if beats[0] > 3:
            enough.set()
        raise RegistryUnavailable("out of reach")

    with heartbeat(renew, "a test"):
        assert enough.wait(10)
    so_far = beats[0]
    assert not [thread for thread in threading.enumerate() if thread.name == "tenantdb-lease"]
    assert beats[0] == so_far
