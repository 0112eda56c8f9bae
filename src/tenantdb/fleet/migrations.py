"""`TenantDB.migrations`: the fleet's plan, its rollouts, and where everyone is."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from tenantdb.backends import backend
from tenantdb.errors import BudgetExhausted, ConfigError, MigrationError, RegistryError, RolloutConflict, ServerUnavailable, describe
from tenantdb.fleet.plan import Options, Plan, Runner, Way, arrange
from tenantdb.fleet.proof import Proofs
from tenantdb.fleet.rollouts import Execution, Progress
from tenantdb.fleet.upgrade import Ended, Upgrader
from tenantdb.migrations.local import LocalScripts
from tenantdb.migrations.sqlplan import SQLPlan
from tenantdb.migrations.tenants import TenantMigrations
from tenantdb.model import TenantState
from tenantdb.provisioning.hooks import Hooks
from tenantdb.provisioning.lease import LEASE, dead, worker
from tenantdb.registry.records import TenantRecord
from tenantdb.registry.rollouts import Attempt, AttemptState, Candidate, NewAttempt, Rollout, RolloutState
from tenantdb.settings import SQLITE

if TYPE_CHECKING:
    from tenantdb.fleet.drift import DriftReport
    from tenantdb.provisioning.spares import Spares

logger = logging.getLogger("tenantdb.fleet")

_PAGE = 1000
_LATECOMERS = 5  # rounds in which a rollout looks for tenants that came while it ran


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a rollout has come to. ``failed``: errors by slug, the first thousand; ``slowest``: (slug, seconds), the slowest first."""

    rollout: UUID | None
    target: str | None
    state: RolloutState
    done: int = 0
    failed: Mapping[str, str] = field(default_factory=dict)
    failures: int = 0
    waiting: int = 0
    skipped: int = 0
    refused: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    slowest: Sequence[tuple[str, float]] = ()
    spares: int = 0
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Everybody who was meant is at the target."""
        return self.state is RolloutState.DONE and not self.failures and not self.waiting and not self.refused


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetStatus:
    """Where everyone is, by the registry's records: ``counts`` of tenants by (server, state, revision), what failed in the last rollout."""

    head: str | None
    counts: Mapping[tuple[str, str, str | None], int]
    behind: int
    rollout: Rollout | None = None
    attempts: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)


class FleetMigrations(TenantMigrations):
    """The tenants' schema: one tenant's upgrade, the fleet's rollouts, and sight of both."""

    def __init__(self, *parts: Any, hooks: Hooks, spares: Callable[[], Spares], prepare: Callable[[], object]) -> None:
        super().__init__(*parts)
        self._hooks, self._spares, self._prepare = hooks, spares, prepare
        self._loaded: tuple[object, LocalScripts] | None = None
        self._proofs = Proofs(self._registry, self._engines, self._settings)
        self._loading = threading.Lock()
        self._rendered: dict[tuple[LocalScripts, str | None, str | None], SQLPlan] = {}

    # -- planning ----------------------------------------------------------------------------------------------------------------------

    def plan(self, *, tenants: Sequence[str] | None = None, target: str = "head", verify: bool = False, **options: Any) -> Plan:
        """What `run` would do with the same arguments. Changes nothing.

        Who is where is read from the registry; ``verify`` asks every tenant's database, with one cheap read each. Raises: `MigrationError`
        for a target that is none, branches or several heads; `ConfigError` for options that cannot be; `TenantNotFound`.
        """
        plan = self._plan(tenants, target, verify, Options(**options))
        there = [count for _, state, revision, count in self._registry.rollouts.fleet() if revision == plan.target and state in _COUNTED]
        return replace(plan, at_target=sum(there))

    def sql(self, *, tenants: Sequence[str] | None = None, target: str = "head", **options: Any) -> dict[str | None, str]:
        """The SQL that would be sent, by the revision that it starts from. Raises: as `plan`; `MigrationError` where
        a path is no pure SQL."""
        plan = self._plan(tenants, target, False, Options(**options))
        local, found = self._local(), {}
        for start, way in plan.ways.items():
            rendered = self._render(local, start, way.to_revision)
            if rendered.problem is not None:
                raise MigrationError(f"from {start or 'base'} the migrations are no pure SQL: {rendered.problem}")
            found[start] = ";\n".join(rendered.statements) + ";"
        return found

    def _plan(self, tenants: Sequence[str] | None, target: str, verify: bool, options: Options) -> Plan:
        local = self._local()
        wanted = local.resolve(target)
        candidates = list(self._candidates(tenants, wanted, everybody=verify))
        spares = [each for each in candidates if each.state is TenantState.SPARE]
        candidates = [each for each in candidates if each.state is not TenantState.SPARE]
        mistaken: dict[str, str | None] = {}
        unreachable: dict[str, str] = {}
        if verify:
            candidates = self._verified(candidates, wanted, options, mistaken, unreachable)
        ways, problems = self._ways(local, wanted, Counter(each.revision for each in candidates), options)
        refused = {each.slug: problems[each.revision] for each in candidates if each.revision in problems}
        arranged, missing = arrange((each for each in candidates if each.revision in ways), options, size=self._size(options, candidates))
        for slug in missing:
            self._registry.tenants.get(slug)  # at its target already, or a slip of the pen
        return Plan(
            target=wanted,
            ways=ways,
            tenants=arranged,
            refused=refused,
            mistaken=mistaken,
            unreachable=unreachable,
            spares=len(spares) if options.spares and wanted == local.head else 0,
        )

    def _candidates(self, tenants: Sequence[str] | None, target: str | None, *, everybody: bool) -> Iterator[Candidate]:
        slugs = None if tenants is None else [self._registry.tenants.get(slug).slug for slug in tenants]
        last: UUID | None = None
        while True:
            page = self._registry.rollouts.candidates(target=target, including_at_target=everybody, slugs=slugs, limit=_PAGE, after=last)
            yield from page
            if len(page) < _PAGE:
                return
            last = page[-1].id

    def _ways(
        self, local: LocalScripts, target: str | None, starts: Mapping[str | None, int], options: Options
    ) -> tuple[dict[str | None, Way], dict[str | None, str]]:
        """From each of the revisions where so many ``starts`` are; and why there is none."""
        ways: dict[str | None, Way] = {}
        problems: dict[str | None, str] = {}
        for start, count in starts.items():
            if start == target:
                continue
            try:
                steps = local.path(start, target)
                if any(step.down for step in steps) and not options.allow_downgrade:
                    raise MigrationError(
                        f"it is at {start}, ahead of {target or 'base'}; a downgrade must be allowed (allow_downgrade=True)"
                    )
            except MigrationError as error:
                problems[start] = error.problem
                continue
            runner, why, rendered = self._choose(local, start, target, count, options)
            ways[start] = Way(from_revision=start, to_revision=target, steps=steps, runner=runner, why=why, sql=rendered)
        return ways, problems

    def _choose(
        self, local: LocalScripts, start: str | None, target: str | None, count: int, options: Options
    ) -> tuple[Runner, str, SQLPlan | None]:
        """Raises: `MigrationError` where a runner is demanded that cannot do it."""
        demanded = None if options.engine == "auto" else Runner(options.engine)
        why = ""
        if demanded in (None, Runner.SQL):
            rendered = self._render(local, start, target)
            problem = rendered.problem
            if problem is None and demanded is None and count < _WORTH_A_PROOF:
                problem = f"fewer than {_WORTH_A_PROOF} tenants are not worth a proof"
            elif problem is None:
                problem = self._proofs.problem(local, rendered)
            if problem is None:
                return Runner.SQL, "", rendered
            if demanded is Runner.SQL:
                raise MigrationError(f"from {start or 'base'} the migrations cannot be sent as SQL: {problem}")
            why = f"not sent as SQL: {problem}"
        if demanded in (None, Runner.PYTHON):
            if local.problem is None:
                return Runner.PYTHON, why, None
            if demanded is Runner.PYTHON:
                raise MigrationError(f"the migrations cannot be run in threads: {local.problem}")
            why = f"{why}; not run in threads: {local.problem}"
        return Runner.PROCESSES, why, None

    def _render(self, local: LocalScripts, start: str | None, target: str | None) -> SQLPlan:
        from tenantdb.migrations.sqlplan import render

        if self.dialect_name == SQLITE:
            return SQLPlan(start, target, (), "SQLite's tables are rebuilt by reading them")
        key = local, start, target
        with self._loading:
            if key not in self._rendered:
                self._rendered[key] = render(local, start, target, self.dialect_name)
            return self._rendered[key]

    def _local(self) -> LocalScripts:
        scripts = self.scripts
        identity = scripts.identity()
        with self._loading:
            if self._loaded is None or self._loaded[0] != identity:
                self._loaded = identity, LocalScripts(scripts)
                self._rendered.clear()
            return self._loaded[1]

    def _size(self, options: Options, candidates: Sequence[Candidate]) -> Callable[[Candidate], int] | None:
        if options.order == "name":
            return None
        sizes: dict[str, int] = {}
        for name in sorted({each.server for each in candidates if each.server is not None}):
            url = self._settings.provisioners.get(name)
            if url is None:
                raise ConfigError(f"order='size' asks server {name!r} as the provisioner, and this process has none for it")
            server = self._registry.servers.get(name)
            with backend(server.backend).workshop(server, url, self._settings) as workshop:
                sizes |= workshop.sizes()
        return lambda each: sizes.get(each.database or "", 0)

    def _verified(
        self,
        candidates: Sequence[Candidate],
        target: str | None,
        options: Options,
        mistaken: dict[str, str | None],
        unreachable: dict[str, str],
    ) -> list[Candidate]:
        """Those that are not at the target by their own word."""
        from tenantdb.fleet.verify import revisions

        found, problems = revisions(
            self._registry, self._engines, self._settings, candidates, self._local().version_table_name, options.concurrency
        )
        unreachable.update(problems)
        behind = []
        for each in candidates:
            if each.slug in problems:
                continue
            actual = found[each.slug]
            if actual != each.revision:
                mistaken[each.slug] = actual
            if actual != target:
                behind.append(each.at(actual))
        return behind

    # -- rollouts ----------------------------------------------------------------------------------------------------------------------

    def run(
        self,
        *,
        tenants: Sequence[str] | None = None,
        target: str = "head",
        verify: bool = False,
        stop: threading.Event | None = None,
        progress: Callable[[Progress], object] | None = None,
        **options: Any,
    ) -> Report:
        """Bring tenants to a revision: all that are active, suspended or under maintenance, and the spares; or the named ones.

        ``options`` are those of `tenantdb.fleet.plan.Options`. Tenants that fail are reported and the others go on, up to the limits.
        ``stop`` pauses: what is under way is finished, and `resume` goes on. ``progress`` gets a `Progress`, in this thread.

        Raises: `RolloutConflict` where another rollout is at some of them; what `plan` raises; `RegistryUnavailable`.
        """
        chosen = Options(**options)
        plan = self._plan(tenants, target, verify, chosen)
        for slug, revision in plan.mistaken.items():
            self._registry.tenants.set_revision(self._registry.tenants.get(slug), revision)
        whole = tenants is None
        if not plan.tenants:
            refreshed = self._refresh(plan.target, chosen) if whole else 0
            return Report(
                rollout=None, target=plan.target, state=RolloutState.DONE, refused={**plan.refused, **plan.unreachable}, spares=refreshed
            )
        entries = [
            NewAttempt(
                tenant_id=each.id,
                wave=each.wave,
                position=position,
                from_revision=each.from_revision,
                engine=str(plan.ways[each.from_revision].runner),
            )
            for position, each in enumerate(plan.tenants)
        ]
        told = {**chosen.as_json(), "whole": whole, "canaries": chosen.canary if isinstance(chosen.canary, int) else len(chosen.canary)}
        rollout = self._registry.rollouts.create(target=plan.target, options=told, entries=entries, worker=worker(), lease=LEASE)
        waves = {wave: {AttemptState.WAITING: size} for wave, size in Counter(each.wave for each in plan.tenants).items()}
        return self._carry_out(rollout, stop, progress, plan.ways, waves, {**plan.refused, **plan.unreachable})

    def resume(
        self,
        rollout: UUID | None = None,
        *,
        stop: threading.Event | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> Report:
        """Go on with a rollout that was paused, halted or left by a process that died; None: the newest one.

        Raises: `RolloutNotFound`; `RolloutConflict` where another process is at it; what `run` raises.
        """
        return self._go_on(self._registry.rollouts.get(rollout), stop, progress)

    def retry(
        self,
        rollout: UUID | None = None,
        *,
        stop: threading.Event | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> Report:
        """Try the failed tenants of a rollout again, and those that it has not come to; nobody else is touched. Raises: as `resume`."""
        found = self._registry.rollouts.get(rollout)
        self._registry.rollouts.retry_failed(found, _dead(found))
        return self._go_on(self._registry.rollouts.get(found.id), stop, progress)

    def pause(self, rollout: UUID | None = None) -> Rollout:
        """Ask whoever runs it to stop after what is under way. `resume` goes on. Raises: `RolloutNotFound`."""
        return self._ask(rollout, RolloutState.PAUSED)

    def cancel(self, rollout: UUID | None = None) -> Rollout:
        """The same for good: who has not been migrated stays where it is, and is free for another rollout. Raises: `RolloutNotFound`."""
        return self._ask(rollout, RolloutState.CANCELLED)

    def _ask(self, rollout: UUID | None, state: RolloutState) -> Rollout:
        found = self._registry.rollouts.get(rollout)
        return self._registry.rollouts.ask(found, state, _dead(found))

    def _go_on(self, rollout: Rollout, stop: threading.Event | None, progress: Callable[[Progress], object] | None) -> Report:
        store = self._registry.rollouts
        claimed = store.claim(rollout, worker(), LEASE, _dead(rollout))
        if claimed is not None:
            return self._carry_out(claimed, stop, progress)
        if rollout.state in (RolloutState.DONE, RolloutState.CANCELLED):
            return self._report(store.get(rollout.id), {}, 0)
        raise RolloutConflict(str(rollout.id), ())

    def _carry_out(
        self,
        claimed: Rollout,
        stop: threading.Event | None,
        progress: Callable[[Progress], object] | None,
        ways: Mapping[str | None, Way] | None = None,
        waves: Mapping[int, Mapping[AttemptState, int]] | None = None,
        refused: Mapping[str, str] | None = None,
    ) -> Report:
        """``ways`` and ``waves``: of a rollout that was planned a moment ago."""
        store, whole = self._registry.rollouts, claimed.options["whole"]
        options = Options.from_json(claimed.options)
        try:
            local = self._local()
            if ways is None:
                ways, _ = self._ways(local, claimed.target, store.starts(claimed), options)
            self._hooks.tell("before_rollout", claimed)
            state: RolloutState | None = RolloutState.HALTED
            why = self._unprepared() if whole and claimed.target == local.head else None
            if why is None:
                state, why = self._execute(
                    claimed, options, store.wave_counts(claimed) if waves is None else waves, ways, local, stop, progress
                )
            if state is RolloutState.DONE and whole:
                state, why = self._latecomers(claimed, options, local, stop, progress)
        except BaseException as error:
            try:
                store.finish(claimed, claimed.worker or "", RolloutState.PAUSED, f"interrupted: {describe(error)}")
            except RegistryError as problem:  # then its lease ends by itself
                logger.warning("a rollout that was interrupted could not be let go of: %s", problem.explain())
            raise
        refreshed = self._refresh(claimed.target, options) if state is RolloutState.DONE and whole else 0
        ended = store.finish(claimed, claimed.worker or "", RolloutState.PAUSED if state is None else state, why)
        report = self._report(ended, refused or {}, refreshed)
        self._hooks.tell("after_rollout", report)
        return report

    def _unprepared(self) -> str | None:
        """Golden databases first: whoever signs up from now on begins at the head, and what fails there fails before a tenant's database
        was touched. Returns why there are none."""
        try:
            self._prepare()
        except RegistryError:
            raise
        except (ServerUnavailable, BudgetExhausted) as error:  # which says nothing of the migrations; the next sign-up makes one
            logger.warning("a rollout begins without golden databases at the head: %s", error.explain())
            return None
        except Exception as error:  # whatever a migration raises on an empty database
            return f"the migrations fail on an empty database: {describe(error)}"
        return None

    def _execute(
        self,
        rollout: Rollout,
        options: Options,
        waves: Mapping[int, Mapping[AttemptState, int]],
        ways: Mapping[str | None, Way],
        local: LocalScripts,
        stop: threading.Event | None,
        progress: Callable[[Progress], object] | None,
    ) -> tuple[RolloutState | None, str | None]:
        upgrader = Upgrader(self._registry, self._engines, self._settings, local, options, rollout.target, ways)
        hooked = self._hooks.wants("before_migrate", "after_migrate")
        execution = Execution(
            self._registry,
            rollout,
            options,
            upgrader,
            stop=stop,
            progress=progress,
            before=self._before_tenant if hooked else None,
            after=self._after_tenant if hooked else None,
            forget=self._engines.forget,  # what is open has prepared statements for the tables as they were
        )
        return execution.run(waves)

    def _before_tenant(self, record: TenantRecord) -> None:
        self._hooks.tell("before_migrate", record.tenant)

    def _after_tenant(self, record: TenantRecord, ended: Ended) -> None:
        if ended.error is None:
            self._hooks.tell("after_migrate", replace(record.tenant, revision=ended.to_revision))

    def _latecomers(
        self,
        rollout: Rollout,
        options: Options,
        local: LocalScripts,
        stop: threading.Event | None,
        progress: Callable[[Progress], object] | None,
    ) -> tuple[RolloutState | None, str | None]:
        """Tenants that were made, restored or finished from an older template while the rollout ran."""
        store = self._registry.rollouts
        for _ in range(_LATECOMERS):
            candidates = [each for each in self._candidates(None, rollout.target, everybody=False) if each.state is not TenantState.SPARE]
            ways, _ = self._ways(local, rollout.target, Counter(each.revision for each in candidates), options)
            late = [(each.id, each.revision) for each in candidates if each.revision in ways]
            if not late or not (added := store.add(rollout, late)):
                break
            rollout = replace(rollout, total=rollout.total + added)
            state, why = self._execute(rollout, options, store.wave_counts(rollout), ways, local, stop, progress)
            if state is not RolloutState.DONE:
                return state, why
        return RolloutState.DONE, None

    def _refresh(self, target: str | None, options: Options) -> int:
        """Spares are migrated by their own procedure, so that nobody takes one meanwhile. Without a provisioner a worker does it. They are
        for sign-ups, which begin at the head."""
        meant = options.spares and target == self._local().head
        return self._spares().refresh() if meant and self._settings.provisioners else 0

    # -- sight -------------------------------------------------------------------------------------------------------------------------

    def _report(self, rollout: Rollout, refused: Mapping[str, str], spares: int) -> Report:
        store = self._registry.rollouts
        counts = store.counts(rollout)
        failures = counts.get(AttemptState.FAILED, 0)
        failed = store.attempts(rollout, state=AttemptState.FAILED, limit=1000) if failures else []
        slowest = store.attempts(rollout, slowest=True, limit=10)
        began, ended = rollout.created_at, rollout.finished_at or rollout.updated_at
        return Report(
            rollout=rollout.id,
            target=rollout.target,
            state=rollout.state,
            done=counts.get(AttemptState.DONE, 0),
            failed={each.slug: each.error or "" for each in failed},
            failures=failures,
            waiting=counts.get(AttemptState.WAITING, 0) + counts.get(AttemptState.RUNNING, 0),
            skipped=counts.get(AttemptState.SKIPPED, 0),
            refused=refused,
            seconds=(ended - began).total_seconds(),
            slowest=tuple((each.slug, each.seconds or 0.0) for each in slowest),
            spares=spares,
            error=rollout.error,
        )

    def rollouts(self, *, limit: int = 20) -> list[Rollout]:
        """The last ones, the newest first."""
        return self._registry.rollouts.list(limit=limit)

    def report(self, rollout: UUID | None = None) -> Report:
        """What a rollout has come to by now; None: the newest. Raises: `RolloutNotFound`."""
        return self._report(self._registry.rollouts.get(rollout), {}, 0)

    def attempts(self, rollout: UUID | None = None, *, slowest: bool = False, limit: int = 1000, after: int = -1) -> list[Attempt]:
        """A rollout's tenants with their timings, in order or the slowest first; pages by ``after``, a position.

        Raises: `RolloutNotFound`."""
        return self._registry.rollouts.attempts(self._registry.rollouts.get(rollout), slowest=slowest, limit=limit, after=after)

    def drift(
        self,
        *,
        tenants: Sequence[str] | None = None,
        concurrency: int = 8,
        progress: Callable[[int, int], object] | None = None,
    ) -> DriftReport:
        """Compare tenants' schemas with what the migrations make, and name what differs: an index made by hand, a revision half applied.

        All that are served, suspended or under maintenance, or the named ones. ``progress(done, total)`` counts them. Changes nothing.
        Raises: as `tenantdb.fleet.drift.drift`.
        """
        from tenantdb.fleet.drift import drift

        scripts = None if self._settings.migrations is None else self.scripts
        return drift(self._registry, self._engines, self._settings, scripts, tenants=tenants, concurrency=concurrency, progress=progress)

    def status(self) -> FleetStatus:
        """Where everyone is, in a few queries of the registry. Raises: `MigrationError`, `RegistryUnavailable`."""
        head, store = self.head, self._registry.rollouts
        counts: dict[tuple[str, str, str | None], int] = {}
        for server, state, revision, count in store.fleet():
            counts[server or "", str(state), revision] = count
        newest = next(iter(store.list(limit=1)), None)
        return FleetStatus(
            head=head,
            counts=counts,
            behind=sum(count for (_, state, revision), count in counts.items() if revision != head and state in _COUNTED),
            rollout=newest,
            attempts={} if newest is None else {str(state): count for state, count in store.counts(newest).items()},
            failed={}
            if newest is None
            else {each.slug: each.error or "" for each in store.attempts(newest, state=AttemptState.FAILED, limit=100)},
        )


def _dead(rollout: Rollout) -> Sequence[str]:
    return dead([rollout.worker] if rollout.worker else [])


_COUNTED = frozenset({"active", "suspended", "maintenance", "spare"})
_WORTH_A_PROOF = 10  # tenants; rendering, two empty databases and migrating them takes longer than a few tenants do
