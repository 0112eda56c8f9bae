"""Ratios of two things measured alternately: on shared, noisy machines an absolute figure says little, a ratio of neighbours much."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field


@dataclass
class Result:
    """``figures`` by key; ``bars`` are what they must reach, ``notes`` what they are, for the table."""

    figures: dict[str, float] = field(default_factory=dict)
    bars: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    environment: dict[str, object] = field(default_factory=dict)

    def add(self, key: str, value: float, *, bar: str = "", note: str = "") -> None:
        self.figures[key] = value
        self.bars[key] = bar
        self.notes[key] = note


def ratio(ours: Callable[[], object], theirs: Callable[[], object], *, rounds: int) -> float:
    """Median over the rounds of our time / their time; who goes first alternates, and a first round is thrown away."""
    return _median([_timed_pair(ours, theirs, ours_first=n % 2 == 0) for n in range(rounds + 1)])


async def async_ratio(ours: Callable[[], Awaitable[object]], theirs: Callable[[], Awaitable[object]], *, rounds: int) -> float:
    """The same for coroutines."""
    pairs = []
    for n in range(rounds + 1):
        first, second = (ours, theirs) if n % 2 == 0 else (theirs, ours)
        one, two = await _atimed(first), await _atimed(second)
        pairs.append((one, two) if n % 2 == 0 else (two, one))
    return _median(pairs)


def _timed_pair(ours: Callable[[], object], theirs: Callable[[], object], *, ours_first: bool) -> tuple[float, float]:
    first, second = (ours, theirs) if ours_first else (theirs, ours)
    one, two = _timed(first), _timed(second)
    return (one, two) if ours_first else (two, one)


def _timed(fn: Callable[[], object]) -> float:
    began = time.perf_counter()
    fn()
    return time.perf_counter() - began


async def _atimed(fn: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await fn()
    return time.perf_counter() - began


def _median(pairs: list[tuple[float, float]]) -> float:
    return statistics.median(ours / theirs for ours, theirs in pairs[1:])
