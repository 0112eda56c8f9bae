"""Requests of made-up fleets, for trying whose connection to give up: seeded, so that a trace is the same on every machine.

Two shapes of traffic disagree about what is worth keeping. Independent requests (each tenant at its own steady rate) reward counting uses;
users in sessions (many requests, then silence) reward recency. Fleets have both, and on top of it jobs that visit every tenant once, cron
jobs on the hour, and a working day that begins elsewhere for every tenant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

_HOURS = 24  # a trace is one day, however many requests it has


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """``zipf`` is the exponent of the tenants' popularity; ``sessions`` how many are open at any time, 0 for independent requests."""

    name: str
    about: str
    tenants: int
    zipf: float
    slots: int
    sessions: int = 0
    session_length: float = 10.0  # requests, on average
    scans: int = 0  # tagged jobs over the day, each visits every tenant once while the users go on
    cron: bool = False  # on the hour, a tenth of the tenants ask once, all together, without a tag
    drift: bool = False  # every tenant has its own office hours


SUITE = (
    Fleet(name="A1", about="steady, Zipf 0.8, 1,000 tenants", tenants=1_000, zipf=0.8, slots=90),
    Fleet(name="A2", about="steady, Zipf 1.0, 1,000", tenants=1_000, zipf=1.0, slots=90),
    Fleet(name="A3", about="steady, Zipf 1.2, 1,000", tenants=1_000, zipf=1.2, slots=90),
    Fleet(name="A4", about="steady, Zipf 1.0, 5,000", tenants=5_000, zipf=1.0, slots=90),
    Fleet(name="A5", about="steady, Zipf 1.0, 10,000", tenants=10_000, zipf=1.0, slots=200),
    Fleet(name="A6", about="A4 and two scans", tenants=5_000, zipf=1.0, slots=90, scans=2),
    Fleet(name="A7", about="steady, Zipf 1.2, 10,000, a scan", tenants=10_000, zipf=1.2, slots=200, scans=1),
    Fleet(name="A8", about="60 sessions, 5,000", tenants=5_000, zipf=1.0, slots=90, sessions=60),
    Fleet(name="A9", about="140 sessions, 5,000", tenants=5_000, zipf=1.0, slots=90, sessions=140),
    Fleet(name="A10", about="A9 and a scan", tenants=5_000, zipf=1.0, slots=90, sessions=140, scans=1),
    Fleet(name="A11", about="A10, cron, office hours", tenants=5_000, zipf=1.0, slots=90, sessions=140, scans=1, cron=True, drift=True),
    Fleet(name="A12", about="A4, a scan, office hours", tenants=5_000, zipf=1.0, slots=90, scans=1, drift=True),
    Fleet(name="A13", about="320 sessions, scan, hours", tenants=10_000, zipf=1.2, slots=200, sessions=320, scans=1, drift=True),
    Fleet(name="A14", about="60 sessions, 1,000, scan, cron", tenants=1_000, zipf=1.0, slots=50, sessions=60, scans=1, cron=True),
)


@dataclass
class Trace:
    """Who asks, in order. ``scans[n]``: request n is tagged as a job's. ``during[n]``: a job is under way."""

    name: str
    slots: int
    about: str = ""
    tenants: list[str] = field(default_factory=list)
    scans: list[bool] = field(default_factory=list)
    during: list[bool] = field(default_factory=list)

    def add(self, tenant: str, *, scan: bool, during: bool) -> None:
        self.tenants.append(tenant)
        self.scans.append(scan)
        self.during.append(during)


def make(fleet: Fleet, *, requests: int, seed: int) -> Trace:
    rng = Random(f"{seed}/{fleet.name}")
    names = [f"t{n}" for n in range(fleet.tenants)]
    popular = rng.sample(names, len(names))
    foreground = _sessions(fleet, popular, requests, rng) if fleet.sessions else _steady(fleet, popular, requests, rng)
    with_cron = popular[::10]
    hours = {requests * hour // _HOURS for hour in range(1, _HOURS)} if fleet.cron else set()
    starts = {requests * (6 * n + 2) // (6 * fleet.scans + 1) for n in range(fleet.scans)}  # not on the hour
    trace = Trace(fleet.name, fleet.slots, fleet.about)
    job, burst = list[str](), list[str]()
    for n in range(requests):
        if n in starts:
            job = names[::-1]
        if n in hours:
            burst = rng.sample(with_cron, len(with_cron))
        during = bool(job)
        if job and rng.random() < 0.5:
            trace.add(job.pop(), scan=True, during=during)
        elif burst and rng.random() < 0.5:
            trace.add(burst.pop(), scan=False, during=during)
        else:
            trace.add(next(foreground), scan=False, during=during)
    return trace


def _steady(fleet: Fleet, popular: list[str], requests: int, rng: Random) -> Iterator[str]:
    draw = _draw(fleet, popular, rng)
    for n in itertools.count():
        yield draw(n / requests)


def _sessions(fleet: Fleet, popular: list[str], requests: int, rng: Random) -> Iterator[str]:
    draw = _draw(fleet, popular, rng)
    opened = [draw(0.0) for _ in range(fleet.sessions)]
    ends = 1 / fleet.session_length
    for n in itertools.count():
        which = rng.randrange(fleet.sessions)
        yield opened[which]
        if rng.random() < ends:
            opened[which] = draw(n / requests)


def _draw(fleet: Fleet, popular: list[str], rng: Random) -> Callable[[float], str]:
    """A tenant by popularity; with drift, one that is asleep at that time of the day is mostly passed over."""
    weights = list(itertools.accumulate((rank + 1) ** -fleet.zipf for rank in range(len(popular))))
    numbers = range(len(popular))
    noon = [rng.random() for _ in popular]

    def draw(day: float) -> str:
        while True:
            (number,) = rng.choices(numbers, cum_weights=weights)
            if not fleet.drift or rng.random() < 0.1 + 0.9 * max(0.0, math.cos(2 * math.pi * (day - noon[number]))):
                return popular[number]

    return draw
