"""How many connections the eviction policy opens, beside LRU and beside the best that foresight could do.

One connection per tenant, given back before the next request; every open counts, first ones too. OPT is Belady's choice under the same
rule: a miss must get a slot, and takes it from the tenant that is not needed for longest.
"""

from __future__ import annotations

import csv
import math
import sys
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Result
from benchmarks.traces import SUITE, Trace, make
from tenantdb.connections.eviction import DuelPolicy

SEED = 20  # the policy's constants were tried on others
_HEADER = ["time", "tenant", "tag"]
_NEVER = sys.maxsize


@dataclass(frozen=True)
class Score:
    trace: Trace
    requests: int
    ours: int
    lru: int
    opt: int

    def per_1000(self, opens: int) -> float:
        return 1000 * opens / self.requests


def run(*, quick: bool, trace: Path | None = None, slots: int | None = None) -> Result:
    if trace is not None:
        return _own(trace, slots if slots is not None else 0)
    requests = 80_000 if quick else 240_000
    scores = [score(make(fleet, requests=requests, seed=SEED)) for fleet in SUITE]
    _print(scores)
    result = Result()
    result.add(
        "geomean_vs_opt",
        _geomean(each.ours / each.opt for each in scores),
        bar="<= 1.38",
        note="connections opened / with foresight, geometric mean of A1 to A14",
    )
    result.add("vs_lru", _geomean(each.ours / each.lru for each in scores), bar="<= 0.84", note="connections opened / by LRU, likewise")
    result.add(
        "scan_foreground_ratio",
        _disturbance(requests),
        bar="<= 1.10",
        note="A10: opens per foreground request while a tagged job visits all tenants / outside",
    )
    return result


def _own(path: Path, slots: int) -> Result:
    own = score(read(path, slots=slots))
    result = Result()
    result.add("opens_per_1000", own.per_1000(own.ours), note=f"connections opened per 1,000 of {own.requests} requests, {slots} slots")
    result.add("opt_per_1000", own.per_1000(own.opt), note="with foresight (Belady)")
    result.add("lru_per_1000", own.per_1000(own.lru), note="by least recent use")
    return result


def read(path: Path, *, slots: int) -> Trace:
    """A trace from a file. Raises ``SystemExit`` (code 2), after a line on stderr, that says what is wrong with it and where."""
    try:
        if slots < 1:
            raise ValueError(f"--slots {slots}: at least 1")
        with path.open(newline="", encoding="utf-8-sig") as lines:
            return _parse(csv.reader(lines), path, slots)
    except (OSError, ValueError, csv.Error) as error:  # a UnicodeDecodeError is a ValueError
        print(f"benchmarks: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _parse(rows: Iterator[list[str]], path: Path, slots: int) -> Trace:
    header = next(rows, None)
    if header is None:
        raise ValueError(f"{path} is empty")
    if [name.strip() for name in header] != _HEADER:
        raise ValueError(f"{path}:1: the header must be {','.join(_HEADER)}, not {','.join(header)}")
    trace, before = Trace(path.name, slots), -math.inf
    for number, row in enumerate(rows, start=2):
        if not row:
            continue
        where = f"{path}:{number}"
        if len(row) != len(_HEADER):
            raise ValueError(f"{where}: {len(row)} fields, not {len(_HEADER)}")
        time, tenant, tag = (value.strip() for value in row)
        try:
            seconds = float(time)
        except ValueError:
            raise ValueError(f"{where}: the time {time!r} is not a number of seconds") from None
        if not math.isfinite(seconds):
            raise ValueError(f"{where}: the time {time!r} is not a number of seconds")
        if seconds < before:
            raise ValueError(f"{where}: the time {time} lies before the one above it")
        if not tenant:
            raise ValueError(f"{where}: no tenant")
        if tag not in ("fg", "scan"):
            raise ValueError(f"{where}: the tag {tag!r} is neither fg nor scan")
        before = seconds
        trace.add(tenant, scan=tag == "scan", during=False)
    if not trace.tenants:
        raise ValueError(f"{path} has no requests")
    return trace


def score(trace: Trace) -> Score:
    return Score(trace, len(trace.tenants), sum(ours(trace)), lru(trace), opt(trace))


def ours(trace: Trace) -> list[bool]:
    """For each request, whether it opened a connection."""
    policy, idle, opened = DuelPolicy(trace.slots), dict[Hashable, int](), list[bool]()
    for tenant, scan in zip(trace.tenants, trace.scans, strict=True):
        policy.used(tenant, scan=scan)
        opened.append(tenant not in idle)
        if tenant not in idle:
            if len(idle) == trace.slots:
                del idle[policy.victim(idle)]
            idle[tenant] = 1
    return opened


def lru(trace: Trace) -> int:
    kept, opens = OrderedDict[str, None](), 0
    for tenant in trace.tenants:
        if tenant in kept:
            kept.move_to_end(tenant)
            continue
        opens += 1
        if len(kept) == trace.slots:
            kept.popitem(last=False)
        kept[tenant] = None
    return opens


def opt(trace: Trace) -> int:
    following, seen = [_NEVER] * len(trace.tenants), dict[str, int]()
    for n in range(len(trace.tenants) - 1, -1, -1):
        following[n] = seen.get(trace.tenants[n], _NEVER)
        seen[trace.tenants[n]] = n
    kept, opens = dict[str, int](), 0  # tenant: its next request
    for tenant, again in zip(trace.tenants, following, strict=True):
        if tenant not in kept:
            opens += 1
            if len(kept) == trace.slots:
                del kept[max(kept, key=kept.__getitem__)]
        kept[tenant] = again
    return opens


def _disturbance(requests: int) -> float:
    """Once the cache is warm. Over a few days of A10, because sessions make that of a single one uncertain by a tenth."""
    (fleet,) = (fleet for fleet in SUITE if fleet.name == "A10")
    counts = {True: [0, 0], False: [0, 0]}  # during a job or not: foreground requests, opens
    for day in range(4):
        trace = make(fleet, requests=requests, seed=SEED + day)
        for n, opened in enumerate(ours(trace)):
            if n >= requests // 20 and not trace.scans[n]:
                counts[trace.during[n]][0] += 1
                counts[trace.during[n]][1] += opened
    (during, during_opens), (outside, outside_opens) = counts[True], counts[False]
    return (during_opens / during) / (outside_opens / outside)


def _geomean(ratios: Iterator[float]) -> float:
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs))


def _print(scores: list[Score]) -> None:
    table = Table("trace", "slots", "OPT", "LRU", "ours", "ours/OPT", "ours/LRU", title="connections opened per 1,000 requests")
    for each in scores:
        opens = (f"{each.per_1000(count):.1f}" for count in (each.opt, each.lru, each.ours))
        name = f"{each.trace.name} {each.trace.about}"
        table.add_row(name, str(each.trace.slots), *opens, f"{each.ours / each.opt:.3f}", f"{each.ours / each.lru:.3f}")
    Console(file=sys.stdout).print(table)
