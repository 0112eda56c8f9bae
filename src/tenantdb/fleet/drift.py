"""Whose schema is not what the migrations make: hand-made indexes, altered columns, revisions that were half applied.

A tenant is compared with a scratch database that is migrated to the tenant's own revision, for nobody may connect to the golden one. Where
none can be made, because this process has no provisioner or these migrations do not know the revision, what most tenants at that revision
have in common must do, and the report says so.

Rights are never compared with the scratch database: it has no runtime role, and the provisioner owns all of it. Those of most tenants that
have the right schema are the measure, where there are enough of them. Rows are no schema, so static seeds are not compared.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from uuid import UUID

from tenantdb.backends import backend
from tenantdb.backends.base import RIGHTS, SchemaLine, fingerprint
from tenantdb.connections.engines import Engines
from tenantdb.connections.ledger import Work
from tenantdb.errors import RegistryError, describe
from tenantdb.migrations.scripts import Scripts, current_revision
from tenantdb.migrations.tenants import MIGRATED
from tenantdb.model import DatabaseRole, Server, StrEnum, Tenant, TenantState
from tenantdb.registry import Registry
from tenantdb.registry.records import TenantRecord
from tenantdb.settings import Settings

QUORUM = 3  # tenants that must be looked at before most of them can be right about anything
_WITNESSES = 8  # other tenants that are looked at with a named one
_PAGE = 500
_SHORT = 160  # characters of a definition on one line


class Change(StrEnum):
    """How a database differs from what is expected."""

    MISSING = "missing"
    UNEXPECTED = "unexpected"
    DIFFERENT = "different"


class Basis(StrEnum):
    """What tenants were compared with."""

    MIGRATIONS = "migrations"
    MAJORITY = "majority"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One object that is not as it should be. ``kind`` is "table", "column", "index" ..., "rights", or "revision" where the registry and
    the database do not agree on it. ``expected`` and ``found`` are definitions, None where there is none. ``ahead``: the head revision has
    it just so, which is what a revision leaves that was applied in part, or without its number."""

    change: Change
    kind: str
    name: str
    expected: str | None = None
    found: str | None = None
    ahead: bool = False

    def __str__(self) -> str:
        text = f"{self.change} {self.kind} {self.name}"
        if self.change is Change.DIFFERENT:
            text += f": {_short(self.found)} instead of {_short(self.expected)}"
        elif definition := self.found or self.expected:
            text += f": {_short(definition)}"
        return f"{text} (as the head revision has it)" if self.ahead else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What the tenants of one server at one revision were compared with: ``tenants`` of them, of which ``alike`` have the expected schema.
    ``problem`` says why it was not the migrations. ``rights``: whether enough were alike for their rights to be compared too."""

    server: str
    revision: str | None
    basis: Basis
    tenants: int
    alike: int
    rights: bool
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftReport:
    """What `drift` found. ``drifted``: differences by slug, or by id for a spare. ``unreachable``: why a tenant could not be looked at, or
    not be compared with anything. ``checked`` tenants were compared."""

    checked: int
    drifted: Mapping[str, Sequence[Difference]]
    unreachable: Mapping[str, str]
    references: Sequence[Reference] = ()

    @property
    def ok(self) -> bool:
        """Everybody was compared, and nobody differs."""
        return not self.drifted and not self.unreachable


def drift(
    registry: Registry,
    engines: Engines,
    settings: Settings,
    scripts: Scripts | None,
    *,
    tenants: Sequence[str] | None = None,
    concurrency: int = 8,
    progress: Callable[[int, int], object] | None = None,
) -> DriftReport:
    """Compare every tenant that is active, suspended or under maintenance, and the spares, or the named ones. Changes nothing.

    ``scripts`` None where there are no migrations. ``concurrency`` databases are entered at once, in the background class of the budget;
    one scratch database per server and revision is made and dropped. ``progress(done, total)`` counts tenants, in this thread.

    Raises: `TenantNotFound`, `RegistryUnavailable`, `MigrationError` for a script location that cannot be used.
    """
    return _Comparison(registry, engines, settings, scripts, concurrency).run(tenants, progress)


def differences(expected: Iterable[SchemaLine], found: Iterable[SchemaLine], head: Iterable[SchemaLine] | None = None) -> list[Difference]:
    """What makes a schema another one, by kind and name. What is part of an object that is missing or unexpected goes without saying.

    ``head``: the lines of the head revision, where ``expected`` are those of an earlier one.
    """
    wanted, there = _by_name(expected), _by_name(found)
    later = None if head is None else _by_name(head)
    wholes = {name for kind, name in wanted.keys() ^ there.keys() if kind != RIGHTS}
    made = []
    for key in sorted(wanted.keys() | there.keys()):
        old, new = wanted.get(key), there.get(key)
        either = new or old
        if old == new or either is None or (either.part_of in wholes and (old is None or new is None or either.kind == RIGHTS)):
            continue
        made.append(
            Difference(
                change=Change.UNEXPECTED if old is None else Change.MISSING if new is None else Change.DIFFERENT,
                kind=either.kind,
                name=either.name,
                expected=None if old is None else old.definition,
                found=None if new is None else new.definition,
                ahead=later is not None and either.kind != RIGHTS and later.get(key) == new,
            )
        )
    return made


def _by_name(lines: Iterable[SchemaLine]) -> dict[tuple[str, str], SchemaLine]:
    return {(line.kind, line.name): line for line in lines}


@dataclass(slots=True)
class _Alike:
    """Tenants whose databases are the same, line by line."""

    schema: str  # fingerprints
    rights: str
    lines: Sequence[SchemaLine]
    tenants: list[Tenant] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Expected:
    """``lines`` None where nobody knows. ``rights`` None where they are not compared."""

    basis: Basis
    problem: str | None
    lines: Sequence[SchemaLine] | None
    rights: Sequence[SchemaLine] | None
    alike: int


_Place = tuple[UUID, "str | None"]  # a server and a revision
_Looked = tuple[Tenant, Server, "str | None", Sequence[SchemaLine]]


class _Comparison:
    def __init__(self, registry: Registry, engines: Engines, settings: Settings, scripts: Scripts | None, concurrency: int) -> None:
        self._registry, self._engines, self._settings, self._scripts = registry, engines, settings, scripts
        self._concurrency = concurrency
        self._servers: dict[UUID, Server] = {}
        self._found: dict[_Place, dict[tuple[str, str], _Alike]] = defaultdict(dict)
        self._made: dict[_Place, tuple[Sequence[SchemaLine] | None, str | None]] = {}
        self._expected: dict[_Place, _Expected] = {}
        self._lines: dict[SchemaLine, SchemaLine] = {}  # each is kept once, or a large fleet would fill the memory

    def run(self, names: Sequence[str] | None, progress: Callable[[int, int], object] | None) -> DriftReport:
        unreachable: dict[str, str] = {}
        chosen, witnesses = self._everybody() if names is None else self._named(names, unreachable)
        total = len(chosen) + len(witnesses)
        asked = set(chosen)
        for done, (tenant, looked) in enumerate(self._look_at([*chosen, *witnesses]), 1):
            if isinstance(looked, str):
                if tenant.id in asked:
                    unreachable[tenant.slug] = looked
            else:
                self._keep(*looked)
            if progress is not None:
                progress(done, total)
        drifted, checked = self._compare(asked, unreachable)
        return DriftReport(checked=checked, drifted=drifted, unreachable=unreachable, references=self._references())

    # -- who is looked at --------------------------------------------------------------------------------------------------------------

    def _everybody(self) -> tuple[list[UUID], list[UUID]]:
        chosen = [tenant.id for state in MIGRATED for tenant in self._in_state(state)]
        return chosen + [spare.id for spare in self._registry.tenants.spares() if spare.ready_at is not None], []

    def _in_state(self, state: TenantState) -> Iterator[Tenant]:
        last: str | None = None
        while page := self._registry.tenants.list(state, limit=_PAGE, after=last):
            yield from page
            last = page[-1].slug

    def _named(self, names: Sequence[str], unreachable: dict[str, str]) -> tuple[list[UUID], list[UUID]]:
        """The named ones, and for each place some others to ask what is usual there."""
        chosen: dict[UUID, Tenant] = {}
        for name in names:
            tenant = self._registry.tenants.get(name)
            if tenant.state in MIGRATED:
                chosen[tenant.id] = tenant
            else:
                unreachable[tenant.slug] = f"it is {tenant.state}"
        witnesses: list[UUID] = []
        for server, revision in {(tenant.server, tenant.revision) for tenant in chosen.values()}:
            others = (
                tenant.id
                for tenant in self._in_state(TenantState.ACTIVE)
                if (tenant.server, tenant.revision) == (server, revision) and tenant.id not in chosen
            )
            witnesses += islice(others, _WITNESSES)
        return list(chosen), witnesses

    # -- looking -----------------------------------------------------------------------------------------------------------------------

    def _look_at(self, tenant_ids: Sequence[UUID]) -> Iterator[tuple[Tenant, _Looked | str]]:
        """What each says of itself, or why it did not, in the order of the answers. Raises: `RegistryError`."""
        running: dict[Future[_Looked], Tenant] = {}

        def settled(done: set[Future[_Looked]]) -> Iterator[tuple[Tenant, _Looked | str]]:
            for future in done:
                tenant, error = running.pop(future), future.exception()
                if error is None:
                    yield tenant, future.result()
                elif isinstance(error, RegistryError) or not isinstance(error, Exception):
                    raise error
                else:
                    yield tenant, describe(error)

        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="tenantdb-drift") as executor:
            for first in range(0, len(tenant_ids), _PAGE):
                for record in self._registry.tenants.owners(tenant_ids[first : first + _PAGE]):
                    if record.tenant.state not in (*MIGRATED, TenantState.SPARE):
                        yield record.tenant, f"it is {record.tenant.state}"
                        continue
                    if len(running) >= self._concurrency:
                        yield from settled(wait(running, return_when=FIRST_COMPLETED).done)
                    running[executor.submit(self._look, record)] = record.tenant
            yield from settled(wait(running).done)

    def _look(self, record: TenantRecord) -> _Looked:
        """In a thread."""
        server = self._engines.locate(record, DatabaseRole.OWNER).server
        with self._engines.passing(record, DatabaseRole.OWNER, Work.BACKGROUND) as engine, engine.connect() as connection:
            revision = current_revision(connection)
            return record.tenant, server, revision, backend(server.backend).schema_lines(connection, record.tenant)

    def _keep(self, tenant: Tenant, server: Server, revision: str | None, lines: Sequence[SchemaLine]) -> None:
        self._servers[server.id] = server
        schema = fingerprint(line for line in lines if line.kind != RIGHTS)
        rights = fingerprint(line for line in lines if line.kind == RIGHTS)
        at_place = self._found[server.id, revision]
        if (schema, rights) not in at_place:
            at_place[schema, rights] = _Alike(schema, rights, [self._lines.setdefault(line, line) for line in lines])
        at_place[schema, rights].tenants.append(tenant)

    # -- comparing ---------------------------------------------------------------------------------------------------------------------

    def _compare(self, asked: set[UUID], unreachable: dict[str, str]) -> tuple[dict[str, Sequence[Difference]], int]:
        checked = 0
        suspects: dict[UUID, str] = {}
        for place, at_place in list(self._found.items()):
            for alike in at_place.values():
                tenants = [tenant for tenant in alike.tenants if tenant.id in asked]
                if not tenants:
                    continue
                if self._expectation(place).lines is None:
                    unreachable.update((tenant.slug, self._unknown(place)) for tenant in tenants)
                    continue
                checked += len(tenants)
                differs = bool(self._differences(place, alike.lines))
                suspects |= {tenant.id: tenant.slug for tenant in tenants if differs or tenant.revision != place[1]}
        drifted: dict[str, Sequence[Difference]] = {}
        # A migration may have run between two of the questions, so who differs is asked again.
        for tenant, looked in self._look_at(list(suspects)):
            if isinstance(looked, str):
                checked -= 1
                unreachable[tenant.slug] = looked
                continue
            tenant, server, revision, lines = looked
            self._servers[server.id] = server
            place = server.id, revision
            if self._expectation(place).lines is None:
                checked -= 1
                unreachable[tenant.slug] = self._unknown(place)
                continue
            found = self._differences(place, lines)
            if tenant.revision != revision:
                found.insert(0, _revision(tenant.revision, revision))
            if found:
                drifted[tenant.slug] = found
        return drifted, checked

    def _differences(self, place: _Place, lines: Sequence[SchemaLine]) -> list[Difference]:
        expected = self._expectation(place)
        wanted = [*(expected.lines or ()), *(expected.rights or ())]
        there = lines if expected.rights is not None else [line for line in lines if line.kind != RIGHTS]
        found = differences(wanted, there)
        return differences(wanted, there, self._head(place)) if found else found

    def _head(self, place: _Place) -> Sequence[SchemaLine] | None:
        """The schema of the head revision, if the place is at another one."""
        head = None if self._scripts is None else self._scripts.identity()[0]
        return None if head is None or head == place[1] else self._expectation((place[0], head)).lines

    def _expectation(self, place: _Place) -> _Expected:
        if place not in self._expected:
            self._expected[place] = self._decide(place)
        return self._expected[place]

    def _decide(self, place: _Place) -> _Expected:
        there = list(self._found.get(place, {}).values())
        lines, problem = self._migrated(place)
        if lines is not None:
            basis, right = Basis.MIGRATIONS, fingerprint(lines)
        else:
            usual = _usual((alike.schema, len(alike.tenants)) for alike in there)
            if usual is None:
                return _Expected(Basis.NOTHING, problem, None, None, 0)
            basis, right = Basis.MAJORITY, usual
            lines = [line for alike in there if alike.schema == right for line in alike.lines if line.kind != RIGHTS]
        those = [alike for alike in there if alike.schema == right]
        usual_rights = _usual((alike.rights, len(alike.tenants)) for alike in those)
        rights = next(([line for line in alike.lines if line.kind == RIGHTS] for alike in those if alike.rights == usual_rights), None)
        return _Expected(basis, problem, lines, rights, sum(len(alike.tenants) for alike in those))

    def _migrated(self, place: _Place) -> tuple[Sequence[SchemaLine] | None, str | None]:
        """What the migrations make of an empty database on this server; or why that cannot be told."""
        server, revision = self._servers[place[0]], place[1]
        if self._scripts is None:
            return None, "no migrations are configured"
        if server.name not in self._settings.provisioners:
            return None, "this process has no provisioner for the server, to make a database for comparison"
        if revision is not None and not self._scripts.knows(revision):
            return None, f"these migrations do not know the revision {revision!r}"
        try:
            with self._engines.scratch(server) as engine:
                if revision is not None:
                    self._scripts.upgrade(engine, revision)
                with engine.connect() as connection:
                    return [self._lines.setdefault(line, line) for line in backend(server.backend).schema_lines(connection)], None
        except Exception as error:  # whatever a migration raises on an empty database
            return None, f"no database for comparison could be made: {describe(error)}"

    def _unknown(self, place: _Place) -> str:
        looked_at = sum(len(alike.tenants) for alike in self._found.get(place, {}).values())
        return (
            f"there is nothing to compare it with: {self._expected[place].problem}, and of {looked_at} at its revision no majority is alike"
        )

    def _references(self) -> tuple[Reference, ...]:
        made = [
            Reference(
                server=self._servers[place[0]].name,
                revision=place[1],
                basis=expected.basis,
                tenants=sum(len(alike.tenants) for alike in self._found[place].values()),
                alike=expected.alike,
                rights=expected.rights is not None,
                problem=expected.problem,
            )
            for place, expected in self._expected.items()
            if place in self._found
        ]
        return tuple(sorted(made, key=lambda reference: (reference.server, reference.revision or "")))


def _usual(votes: Iterable[tuple[str, int]]) -> str | None:
    """What more than half have, of enough."""
    counted: Counter[str] = Counter()
    for what, count in votes:
        counted[what] += count
    if counted.total() < QUORUM:
        return None
    what, count = counted.most_common(1)[0]
    return what if 2 * count > counted.total() else None


def _revision(recorded: str | None, found: str | None) -> Difference:
    return Difference(
        change=Change.DIFFERENT,
        kind="revision",
        name="alembic_version",
        expected=recorded or "none, by the registry",
        found=found or "none",
    )


def _short(definition: str | None) -> str:
    text = " ".join((definition or "").split())
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 3]}..."
