"""Who holds what: the name of this process in the registry, a sign of life while it works, and telling a dead worker from a slow one."""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

logger = logging.getLogger("tenantdb.provisioning")

LEASE = timedelta(minutes=1)
"""How long a worker that gives no sign of life is waited for."""


def _namespace() -> str:
    """Where process numbers mean what they mean here: two machines or containers may have one host name, and a process 7 each. Empty where
    that cannot be told; then nobody is taken for dead."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}-{os.readlink('/proc/self/ns/pid').strip('pid:[]')}"
    except OSError:
        return ""


class _Worker:
    """The name of this process in the registry; another one after a fork. The random part tells it from an earlier process with the same
    number."""

    def __init__(self) -> None:
        self._named = (0, "")

    def __str__(self) -> str:
        pid, name = self._named
        if pid != os.getpid():
            pid = os.getpid()
            name = f"{socket.gethostname()}/{_namespace()}/{pid}/{secrets.token_hex(4)}"
            self._named = pid, name  # at once: a thread that saw the number without the name would call itself what others are called
        return name


_worker = _Worker()


def worker() -> str:
    """The name of this process in the registry, with a number of its own for every call: who claims something knows it again by that."""
    return f"{_worker}/{next(_numbers)}"


_numbers = itertools.count(1)


def dead(workers: Iterable[str]) -> list[str]:
    """Those of the workers that ran on this machine and are there no more: nobody needs to wait for their leases to end."""
    here, namespace = socket.gethostname(), _namespace()
    gone = []
    for name in workers:
        host, _, rest = name.partition("/")
        inside, _, rest = rest.partition("/")
        pid = rest.partition("/")[0]
        if host == here and namespace and inside == namespace and pid.isdecimal() and not _alive(int(pid)):
            gone.append(name)
    return gone


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def heartbeat(renew: Callable[[], object], what: str) -> Iterator[None]:
    """Renew a lease while the block lasts."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(LEASE.total_seconds() / 3):
            try:
                renew()
            except Exception:  # whatever it is, the next beat may come through
                logger.warning("the lease of %s could not be renewed; its next write will tell", what)

    thread = threading.Thread(target=beat, name="tenantdb-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
