"""What a rollout would do, decided before anything is done: who goes from where to where, how, in what order and in which waves. Pure."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from tenantdb.errors import ConfigError
from tenantdb.model import StrEnum

if TYPE_CHECKING:
    from tenantdb.migrations.local import Step
    from tenantdb.migrations.sqlplan import SQLPlan
    from tenantdb.registry.rollouts import Candidate

_GROWTH = 10  # how much larger each wave is than the one before, where there is a canary


class Runner(StrEnum):
    """How a database is brought to a revision: by SQL that was rendered once, by Alembic in threads of this process, or in child
    processes, one tenant at a time in each."""

    SQL = "sql"
    PYTHON = "python"
    PROCESSES = "processes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a rollout goes about it. Seconds where times are meant.

    ``canary``: slugs, or how many, that go first; what fails among them halts the rollout. ``waves``: sizes of the waves after them, and
    whoever is left makes one more. Left out: a single wave, or after a canary waves of tenfold size. ``max_failures``: how many
    may fail in one wave; a percentage is of the wave. ``max_consecutive``: so many of one kind in a row halt it, 0 never.
    ``concurrency``: on each server. ``retries``: of a tenant that was locked or out of reach, at the end of its wave's queue.
    """

    canary: int | tuple[str, ...] = 0
    waves: tuple[int, ...] | None = None
    max_failures: int | str | None = None
    max_consecutive: int = 5
    concurrency: int = 8
    total_concurrency: int | None = None
    order: Literal["name", "size"] = "name"
    engine: Literal["auto", "sql", "python", "processes"] = "auto"
    lock_timeout: float = 0.1
    statement_timeout: float | None = None
    retries: int = 3
    pause: float = 0.0
    allow_downgrade: bool = False
    spares: bool = True

    def __post_init__(self) -> None:
        """Raises: `ConfigError`."""
        least = {"concurrency": 1, "max_consecutive": 0, "retries": 0, "pause": 0, "lock_timeout": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ConfigError(f"{name} of a rollout is at least {smallest}, not {getattr(self, name)!r}")
        if self.total_concurrency is not None and self.total_concurrency < 1:
            raise ConfigError("total_concurrency of a rollout is at least 1")
        if isinstance(self.canary, int) and self.canary < 0:
            raise ConfigError("canary is a number of tenants, or their slugs")
        if self.waves is not None and any(size < 1 for size in self.waves):
            raise ConfigError("waves are numbers of tenants, each at least 1")
        if self.order not in ("name", "size"):
            raise ConfigError(f"order is 'name' or 'size', not {self.order!r}")
        if self.engine not in ("auto", *Runner):
            raise ConfigError(f"engine is 'auto', 'sql', 'python' or 'processes', not {self.engine!r}")
        self.limit(100)

    def limit(self, of: int) -> int | None:
        """How many of so many tenants may fail; None: any number. Raises: `ConfigError`."""
        if self.max_failures is None or (isinstance(self.max_failures, int) and self.max_failures >= 0):
            return self.max_failures
        text = str(self.max_failures)
        number = text.removesuffix("%")
        if text == number or not number.isdecimal() or int(number) > 100:
            raise ConfigError(f"max_failures is a number of tenants or a percentage such as '5%', not {self.max_failures!r}")
        return math.floor(of * int(number) / 100)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Options:
        """Of what was written down with a rollout, these; JSON makes lists of tuples."""
        own: dict[str, Any] = {each.name: told[each.name] for each in fields(cls) if each.name in told}
        own |= {name: tuple(value) for name, value in own.items() if isinstance(value, list)}
        return cls(**own)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """From one revision to the target: ``steps`` in order, the ``runner`` chosen, and ``why`` it is not a faster one. ``sql`` is what is
    sent where SQL is."""

    from_revision: str | None
    to_revision: str | None
    steps: tuple[Step, ...]
    runner: Runner
    why: str = ""
    sql: SQLPlan | None = field(default=None, repr=False)

    @property
    def down(self) -> bool:
        return any(step.down for step in self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One tenant's place in a rollout."""

    id: UUID
    slug: str
    server: str
    from_revision: str | None
    wave: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `run` would do now. ``tenants`` in order; ``refused``: problems by slug, of those that stay out; ``mistaken``: slugs whose
    database was found at another revision than the registry had recorded, and ``unreachable``: problems by slug of those that could not be
    asked, where that was verified. ``spares``: how many are behind."""

    target: str | None
    ways: Mapping[str | None, Way]
    tenants: tuple[Planned, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    at_target: int = 0
    mistaken: Mapping[str, str | None] = field(default_factory=dict)
    unreachable: Mapping[str, str] = field(default_factory=dict)
    spares: int = 0

    @property
    def waves(self) -> list[int]:
        """The size of each wave."""
        return [size for _, size in sorted(Counter(tenant.wave for tenant in self.tenants).items())]

    def counts(self) -> dict[tuple[str, str | None], int]:
        """How many tenants of each server are at each revision."""
        return Counter((tenant.server, tenant.from_revision) for tenant in self.tenants)


def arrange(
    candidates: Iterable[Candidate], options: Options, *, size: Callable[[Candidate], int] | None = None
) -> tuple[tuple[Planned, ...], list[str]]:
    """Order and waves. The second value: canary slugs that are not among the candidates, for the caller to judge."""
    key: Callable[[Candidate], Any] = (lambda each: each.slug) if size is None else (lambda each: (size(each), each.slug))
    ordered = sorted(candidates, key=key)
    if isinstance(options.canary, int):
        canaries, rest, missing = ordered[: options.canary], ordered[options.canary :], []
    else:
        named = dict.fromkeys(options.canary)
        by_slug = {each.slug: each for each in ordered if each.slug in named}
        canaries = [by_slug[slug] for slug in named if slug in by_slug]
        rest = [each for each in ordered if each.slug not in named]
        missing = [slug for slug in named if slug not in by_slug]
    return tuple(_in_waves(canaries, rest, options)), missing


def _in_waves(canaries: Sequence[Candidate], rest: Sequence[Candidate], options: Options) -> Iterator[Planned]:
    for each in canaries:
        yield _planned(each, 0)
    wave, done = 1 if canaries else 0, 0
    sizes = _sizes(len(canaries), options)
    while done < len(rest):
        size = next(sizes, len(rest))
        for each in rest[done : done + size]:
            yield _planned(each, wave)
        done += size
        wave += 1


def _sizes(canaries: int, options: Options) -> Iterator[int]:
    if options.waves is not None:
        yield from options.waves
    elif canaries:
        yield from (canaries * _GROWTH**exponent for exponent in itertools.count(1))


def _planned(candidate: Candidate, wave: int) -> Planned:
    return Planned(id=candidate.id, slug=candidate.slug, server=candidate.server or "", from_revision=candidate.revision, wave=wave)


@dataclass(slots=True)
class Verdict:
    """Whether a wave goes on, decided from what has ended so far."""

    options: Options
    canary: bool
    size: int
    failed: int = 0
    in_a_row: int = 0
    kind: str | None = None

    def settle(self, kind: str | None, *, passing: bool = False) -> str | None:
        """One tenant has ended: None where it is at its target, else what kind of failure it was. ``passing``: a lock or an outage, which
        says nothing about the migration. Returns why to halt, if so."""
        if kind is None:
            self.in_a_row, self.kind = 0, None
            return None
        self.failed += 1
        if not passing:
            self.in_a_row = self.in_a_row + 1 if kind == self.kind else 1
            self.kind = kind
        if self.canary:
            return f"a canary failed ({kind})"
        limit = self.options.limit(self.size)
        if limit is not None and self.failed > limit:
            return f"{self.failed} tenants failed in one wave, more than max_failures={self.options.max_failures!r} allows"
        most = self.options.max_consecutive
        if most and self.in_a_row >= most:
            return f"{self.in_a_row} tenants in a row failed the same way ({kind}): the migration is wrong rather than they"
        return None
