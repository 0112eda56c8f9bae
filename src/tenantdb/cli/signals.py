"""Ctrl-C and SIGTERM as an event: what is under way is finished first, and a second signal interrupts that too."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_event() -> Iterator[threading.Event]:
    """An event that is set by SIGINT or SIGTERM inside the block. In the main thread only."""
    stop = threading.Event()
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def ask_to_stop(signum: int, frame: FrameType | None) -> None:
        stop.set()
        restore()

    for signum in before:
        signal.signal(signum, ask_to_stop)
    try:
        yield stop
    finally:
        restore()
