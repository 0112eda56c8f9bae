"""When a server is down: who still tries it, and who is told at once.

Pure, and the clock is an argument. A breaker counts failures of the *server* class in a row: refused, unanswered, starting up, shutting
down. Failures of one tenant (a wrong password, a missing database) and of capacity (too many connections) are other people's business: the
first is remembered for that tenant only, the second is waited out inside the budget.

Closed, everybody may connect. After ``THRESHOLD`` failures in a row it opens for a while that doubles with every failed probe: who needs a
new connection gets the last failure again without waiting for one of its own. Then a single probe is let through; it closes the breaker or
opens it for longer. So a server that comes back is not stormed, and no more than one caller at a time waits for one that does not.
"""

from __future__ import annotations

THRESHOLD = 3
FIRST_PAUSE = 0.25  # seconds
LONGEST_PAUSE = 10.0
PROBE_TIMEOUT = 30.0  # seconds after which a probe that never reported is no longer waited for


class Breaker:
    """One server's. Not locked: a race costs a probe too many."""

    def __init__(self) -> None:
        self._failures = 0
        self._pause = 0.0
        self._open_until = 0.0
        self._probing_until = 0.0
        self._problem = ""

    @property
    def is_open(self) -> bool:
        """Whether connects are refused, but for a probe now and then."""
        return self._failures >= THRESHOLD

    def refusal(self, now: float) -> str | None:
        """The last failure, for who may not connect now; None for who may, and who then owes `succeeded`, `failed` or `gave_up`."""
        problem = self.would_refuse(now)
        if problem is None and self.is_open:
            self._probing_until = now + PROBE_TIMEOUT
        return problem

    def would_refuse(self, now: float) -> str | None:
        """The same without the right to connect: for who would have to wait for it."""
        return self._problem if self.is_open and (now < self._open_until or now < self._probing_until) else None

    def succeeded(self) -> bool:
        """A connection stands. True where that closed the breaker."""
        was_open = self.is_open
        self._failures, self._pause, self._probing_until = 0, 0.0, 0.0
        return was_open

    def failed(self, now: float, problem: str, spread: float) -> bool:
        """A connect failed through the server; ``spread`` between 0 and 1 keeps processes from probing in step. True where that opened the
        breaker."""
        if self.is_open and now < self._open_until:  # it was under way when the breaker opened, and tells nothing new
            return False
        was_open = self.is_open
        self._failures += 1
        self._problem = problem
        self._probing_until = 0.0
        if self.is_open:
            self._pause = min(LONGEST_PAUSE, 2 * self._pause or FIRST_PAUSE)
            self._open_until = now + self._pause * (0.75 + spread / 2)
        return self.is_open and not was_open

    def gave_up(self) -> None:
        """A connect ended without saying anything about the server: cancelled, or failed through the tenant."""
        self._probing_until = 0.0
