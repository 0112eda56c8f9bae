"""Whose idle connection is closed when another tenant needs one: the eviction policy.

An opened connection costs milliseconds, so what counts is to open few. The best choice is the tenant that will not be back for longest
(Belady 1966), which nobody knows. Two guesses each fail on the other's traffic. Where every tenant comes at its own steady rate, *counting*
its uses is nearly as good as knowing the rate. Where users come in sessions, counts keep tenants whose users have left long ago, and *how
long a tenant has been away* says more. So both guess, on the side, about a pretended cache each of as many slots as the real one, and the
one whose cache misses less decides (set duelling: Qureshi et al., ISCA 2007; over all tenants here, as a cache of connections is small).

1. **Counts**: uses, each worth half after 16,000 further uses by anybody.
2. **Returns**: how soon tenants come back, learned. Tenants are put into classes by how long they lately stayed away between two uses; each
   class keeps a table of how many came back after being away for so long. From it follows, for a tenant that has been away for some time,
   the best ratio of returns to waiting that lies ahead: what holding its connection yields per slot and unit of time (as in hit density:
   Beckmann, Chen, Cidon, NSDI 2018). Sessions give the order of recency. Who comes round like clockwork, a job over all tenants that is not
   tagged as one for example, is kept or let go by its period, where recency would give up each tenant just before its turn.

A checkout tagged as a *scan* (a job that visits every tenant) is no use: it says nothing about the tenant. The connection that it opened is
given up first, whatever the two think, so that a scan takes no more room than it uses at a time.

Time is counted in uses, not in seconds: a night in which nobody comes must not make anybody look colder than the others. No I/O, no lock,
no clock. ``used`` is on the way of every checkout and does the same few steps however many tenants there are; ``victim`` looks once at each
idle tenant.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from math import exp, isqrt, log, log1p
from operator import attrgetter
from typing import Any

__all__ = ["DuelPolicy"]

_HALF_LIFE = 16_000  # uses; half or twice as long makes less than 1 % of difference in benchmarks/eviction.py
_RATE = log(2) / _HALF_LIFE
_SURPLUS = 4.0  # each further idle connection of a tenant is worth this many times less than the one before
_LOG_SURPLUS = log(_SURPLUS)
_CREDIT = 50  # misses by which one side must have been better to have the say for good; the other wins it back by as many
_LONGEST = 1 << 20  # uses; whoever stays away longer counts as away for so long
_BINS = (_LONGEST**2).bit_length() + 1  # half octaves: the bin of an absence is the bit length of its square
_REFRESH = 400  # uses of a class after which its table is read again, sooner while it is young
_MEMORY = 4_000  # absences that a class remembers before it halves them all
# how many lengths of absence fall into each bin
_WIDTHS = [isqrt((1 << b) - 1) - isqrt((1 << b >> 1) - 1) if b else 0 for b in range(_BINS)]


class _Class:
    """Tenants that lately came back after about as long. ``worth[bin]``: returns per use of waiting that lie ahead of a member that has
    been away for so long; ``after[bin]``: the class of a member that comes back just then."""

    __slots__ = ("after", "began", "due", "returned", "worth")

    def __init__(self) -> None:
        self.began = 0.0  # absences that began in this class
        self.returned = [0.0] * _BINS  # and how long those that ended have lasted
        self.worth = [0.0] * _BINS
        self.after: list[_Class] = []
        self.due = 4.0

    def refresh(self) -> None:
        """Where the future has a peak, the wait for it counts from here: the best ratio over all horizons. Going back from the longest
        absence and merging a bin with the next while that one pays better finds them all in one pass."""
        if self.began > _MEMORY:
            self.began /= 2
            self.returned = [count / 2 for count in self.returned]
        away, waits = self.began, []
        for count, width in zip(self.returned, _WIDTHS, strict=True):
            stay = max(0.0, away - count)
            waits.append(((away + stay) / 2 + 1) * width + 1e-9)  # the one more is a doubt that fades
            away = stay
        blocks: list[tuple[float, float]] = []
        for bin_ in range(_BINS - 1, -1, -1):
            returns, wait = self.returned[bin_], waits[bin_]
            while blocks and blocks[-1][0] * wait > returns * blocks[-1][1]:
                more, longer = blocks.pop()
                returns, wait = returns + more, wait + longer
            blocks.append((returns, wait))
            self.worth[bin_] = returns / wait
        self.due = self.began + min(_REFRESH, max(4, self.began // 4))


class _Known:
    """What is kept about a tenant. ``weight`` is the logarithm of its decayed count, moved up to the first use of all, so that it changes
    only when the tenant is used, and those of two tenants can be compared at any time."""

    __slots__ = ("class_", "held", "in_counts", "in_returns", "last", "weight")

    def __init__(self, class_: _Class, now: int) -> None:
        self.class_, self.last, self.weight = class_, now, now * _RATE
        self.in_counts = self.in_returns = False  # whether a pretended cache has it
        self.held = True  # has a connection that a foreground use wanted; stays when one is closed for its age, and does no harm


_weight = attrgetter("weight")


class _Pretended:
    """A cache that follows one side alone. It may grow a little above its slots and is then cut to as much below, because one sort of all
    is cheaper than a search at every miss."""

    def __init__(self, slots: int) -> None:
        self.resize(slots)
        self.kept: list[_Known] = []

    def resize(self, slots: int) -> None:
        self.most, self.least = slots + slots // 8, max(0, slots - slots // 8 - 1)

    def cut(self, order: Callable[[_Known], Any]) -> list[_Known]:
        """Cut back what has grown to the most; returns who had to go."""
        self.kept.sort(key=order)
        gone = self.kept[: len(self.kept) - self.least]
        del self.kept[: len(gone)]
        return gone


class DuelPolicy:
    """Chooses whose idle connection is closed, see above. ``slots`` is how many connections the budget has.

    Not safe for threads: the caller has a lock. Keeps about 160 bytes per tenant ever used, until ``forget``.
    """

    def __init__(self, slots: int) -> None:
        self._now = 0  # uses so far
        self._known: dict[Hashable, _Known] = {}
        self._cold: dict[Hashable, int] = {}  # tenants whose connection a scan opened, with a number that grows
        self._scanned = 0
        self._new = _Class()  # used once
        self._classes = [_Class() for _ in range(_BINS)]
        self._new.after = self._classes
        for number, class_ in enumerate(self._classes):
            class_.after = [self._classes[(number + bin_ + 1) // 2] for bin_ in range(_BINS)]
        self._counts, self._returns = _Pretended(slots), _Pretended(slots)
        self._credit = 0  # misses that counting would have saved lately; returns have the say until it has saved one

    def used(self, tenant: Hashable, *, scan: bool = False) -> None:
        """A checkout, whether it found a connection or not; to be called before ``victim`` makes room for it. ``scan``: by a fleet job."""
        known = self._known.get(tenant)
        if scan:
            if known is None or not known.held:
                self._scanned += 1
                self._cold[tenant] = self._scanned
            return
        self._now = now = self._now + 1
        if known is None:
            known = self._known[tenant] = _Known(self._new, now)
            class_ = self._new
        else:
            away = now - known.last
            bin_ = (away * away).bit_length() if away < _LONGEST else _BINS - 1
            class_ = known.class_
            class_.returned[bin_] += 1
            known.class_ = class_ = class_.after[bin_]
            known.last = now
            moved = now * _RATE
            known.weight = moved + log1p(exp(known.weight - moved))
            known.held = True
        class_.began += 1
        if class_.began >= class_.due:
            class_.refresh()
        if not (known.in_counts and known.in_returns):
            self._judge(known)
        if self._cold:
            self._cold.pop(tenant, None)

    def victim(self, idle: Mapping[Hashable, int]) -> Hashable:
        """Which of the tenants in ``idle`` loses one of its idle connections, whose number ``idle`` says (at least one each).

        The connection counts as closed from now on. What a scan has opened goes first, the oldest first of all; then a tenant of which
        nothing is known.
        """
        chosen = self._coldest(idle) if self._cold else None
        if chosen is None:
            chosen = self._least_counted(idle) if self._credit > 0 else self._least_worth(idle)
        if idle[chosen] == 1:
            self._cold.pop(chosen, None)
            if known := self._known.get(chosen):
                known.held = False
        return chosen

    def resize(self, slots: int) -> None:
        """The budget has another size from now on; what was learned stays."""
        self._counts.resize(slots)
        self._returns.resize(slots)
        self._cut_counts()
        self._cut_returns()

    def forget(self, tenant: Hashable) -> None:
        """The tenant is gone for good. What its class has learned from it stays, as a number among many."""
        self._cold.pop(tenant, None)
        known = self._known.pop(tenant, None)
        if known is not None and known.in_counts:
            self._counts.kept.remove(known)
        if known is not None and known.in_returns:
            self._returns.kept.remove(known)

    def _judge(self, known: _Known) -> None:
        """A miss in a pretended cache. One that both have missed tells nothing about which is better."""
        if known.in_counts:
            if self._credit < _CREDIT:
                self._credit += 1
        else:
            if known.in_returns and self._credit > -_CREDIT:
                self._credit -= 1
            if len(self._counts.kept) >= self._counts.most:
                self._cut_counts()
            known.in_counts = True
            self._counts.kept.append(known)
        if not known.in_returns:
            if len(self._returns.kept) >= self._returns.most:
                self._cut_returns()
            known.in_returns = True
            self._returns.kept.append(known)

    def _cut_counts(self) -> None:
        for gone in self._counts.cut(_weight):
            gone.in_counts = False

    def _cut_returns(self) -> None:
        for gone in self._returns.cut(self._worth):
            gone.in_returns = False

    def _worth(self, known: _Known) -> tuple[float, int]:
        away = self._now - known.last
        return known.class_.worth[(away * away).bit_length() if away < _LONGEST else _BINS - 1], known.last

    def _coldest(self, idle: Mapping[Hashable, int]) -> Hashable | None:
        left = [tenant for tenant in idle if tenant in self._cold]
        return min(left, key=self._cold.__getitem__) if left else None

    def _least_counted(self, idle: Mapping[Hashable, int]) -> Hashable:
        chosen, least = None, float("inf")
        for tenant, connections in idle.items():
            known = self._known.get(tenant)
            if known is None:
                return tenant
            weight = known.weight if connections == 1 else known.weight - (connections - 1) * _LOG_SURPLUS
            if weight < least:
                chosen, least = tenant, weight
        return chosen

    def _least_worth(self, idle: Mapping[Hashable, int]) -> Hashable:
        chosen, least, oldest = None, float("inf"), 0
        for tenant, connections in idle.items():
            known = self._known.get(tenant)
            if known is None:
                return tenant
            away = self._now - known.last
            worth = known.class_.worth[(away * away).bit_length() if away < _LONGEST else _BINS - 1]
            if connections > 1:
                worth /= _SURPLUS ** (connections - 1)
            if worth < least or (worth == least and known.last < oldest):  # nobody knows: the one longest away
                chosen, least, oldest = tenant, worth, known.last
        return chosen
