"""Verbs over many tenants: migrations as rollouts, and where everyone is."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import click

from tenantdb.cli import output
from tenantdb.cli.app import Invocation, UsageProblem, json_option, pass_invocation
from tenantdb.cli.progress import progress
from tenantdb.cli.signals import stop_event

if TYPE_CHECKING:
    from tenantdb.database import TenantDB
    from tenantdb.fleet.migrations import Report
    from tenantdb.fleet.plan import Plan
    from tenantdb.fleet.rollouts import Progress
    from tenantdb.registry.rollouts import Attempt, Rollout

F = TypeVar("F", bound=Callable[..., Any])

_EVENTS = "Print what happens on stderr, a line of JSON each, and the end as with --json."
_SLOWEST = 20


def _canary(ctx: click.Context, parameter: click.Parameter, value: str) -> int | tuple[str, ...]:
    if value.isdecimal():
        return int(value)
    slugs = tuple(slug.strip() for slug in value.split(","))
    if not all(slugs) or any(slug.lstrip("-").isdecimal() for slug in slugs):
        raise click.BadParameter(f"{value!r} is neither a number of tenants nor a list of slugs, such as acme,globex")
    return slugs


def _failures(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value.isdecimal():
        return None if value is None else int(value)
    percentage = value.removesuffix("%")
    if percentage == value or not percentage.isdecimal() or int(percentage) > 100:
        raise click.BadParameter(f"{value!r} is neither a number of tenants nor a percentage, such as 5%")
    return value


def _rollout_options(command: F) -> F:
    from_left = (
        click.option(
            "--canary", metavar="COUNT|SLUG,...", callback=_canary, default="0", help="These go first; one that fails stops the rest."
        ),
        click.option("--wave", "waves", type=click.IntRange(min=1), multiple=True, help="Size of the next wave; may be repeated."),
        click.option("--max-failures", metavar="COUNT|PERCENT%", callback=_failures, help="More failures in one wave halt the rollout."),
        click.option("--max-consecutive", type=click.IntRange(min=0), help="So many failing alike in a row halt it; 0: never."),
        click.option("--concurrency", type=click.IntRange(min=1), help="Tenants at once on each server."),
        click.option("--total-concurrency", type=click.IntRange(min=1), help="Tenants at once on all servers together."),
        click.option("--order", type=click.Choice(["name", "size"]), help="Who goes first: by name, or the smallest."),
        click.option("--engine", type=click.Choice(["auto", "sql", "python", "processes"]), help="How the migrations are run."),
        click.option(
            "--lock-timeout", type=click.FloatRange(min=0), help="Seconds to wait for a lock before the tenant is tried again later."
        ),
        click.option("--statement-timeout", type=click.FloatRange(min=0), help="Seconds that one statement may take."),
        click.option("--retries", type=click.IntRange(min=0), help="More tries of a tenant that is locked or out of reach."),
        click.option("--pause", type=click.FloatRange(min=0), help="Seconds between waves."),
        click.option("--allow-downgrade", is_flag=True, help="Go back to an earlier revision, which may lose data."),
        click.option("--no-spares", is_flag=True, help="Leave spares to the worker."),
    )
    for option in reversed(from_left):
        command = option(command)
    return command


@click.command()
@click.option("--tenant", "tenants", metavar="SLUG", multiple=True, help="This one alone; may be repeated.")
@click.option("--to", "target", metavar="REVISION", default="head", help="Another revision than the newest.")
@click.option("--plan", "plan_only", is_flag=True, help="Print what would be done, and do nothing.")
@click.option("--sql", "sql_only", is_flag=True, help="Print the SQL that would be sent, and do nothing.")
@click.option("--verify", is_flag=True, help="Ask every tenant's database for its revision instead of believing the registry.")
@_rollout_options
@click.option("--events", is_flag=True, help=_EVENTS)
@json_option
@pass_invocation
def migrate(
    invocation: Invocation,
    /,
    tenants: tuple[str, ...],
    target: str,
    plan_only: bool,
    sql_only: bool,
    verify: bool,
    events: bool,
    no_spares: bool,
    waves: tuple[int, ...],
    **given: Any,
) -> None:
    """Bring all tenants to the newest revision.

    Many at once, in waves if you say so. One that fails stays where it was, with nothing of the failed migration left behind, and the
    others go on; the exit code is 3 then. Ctrl-C finishes what is under way; `tenantdb rollouts resume` goes on.
    """
    if sql_only and (plan_only or verify):
        raise UsageProblem("--sql stands alone: it goes by the registry, and --plan and --verify print something else")
    db = invocation.database()
    slugs = [db.tenants.get(slug, suggest=True).slug for slug in tenants] or None
    options = {name: value for name, value in given.items() if value is not None}
    options |= {"spares": not no_spares, **({"waves": waves} if waves else {})}
    if sql_only:
        _print_sql(invocation, db.migrations.sql(tenants=slugs, target=target, **options))
        return
    if plan_only:
        plan = db.migrations.plan(tenants=slugs, target=target, verify=verify, **options)
        _print_plan(invocation, plan)
        if plan.refused or plan.unreachable:
            click.get_current_context().exit(output.SOME_FAILED)
        return
    run = functools.partial(db.migrations.run, tenants=slugs, target=target, verify=verify, **options)
    _carry_out(invocation, run, events=events)


def _carry_out(invocation: Invocation, run: Callable[..., Report], *, events: bool) -> None:
    with stop_event() as stop, _watching(invocation, events=events) as watch:
        report = run(stop=stop, progress=watch)
    _print_report(invocation, report)


@click.group()
def rollouts() -> None:
    """Runs of migrations: list, look at, go on with, stop."""


@rollouts.command("list")
@json_option
@pass_invocation
def list_rollouts(invocation: Invocation) -> None:
    """The last rollouts, the newest first."""
    found = invocation.database().migrations.rollouts()
    if invocation.json:
        output.document([asdict(each) for each in found])
        return
    output.table(
        ["id", "target", "state", "tenants", "began", "why"],
        [[str(each.id), each.target, str(each.state), str(each.total), f"{each.created_at:%Y-%m-%d %H:%M}", each.error] for each in found],
    )


_ID = click.argument("rollout", type=click.UUID, required=False)


@rollouts.command("show")
@_ID
@click.option("--slowest", is_flag=True, help=f"The {_SLOWEST} tenants that took longest.")
@json_option
@pass_invocation
def show_rollout(invocation: Invocation, rollout: UUID | None, slowest: bool) -> None:
    """A rollout's tenants, with their timings; of the newest one without an id."""
    found = list(_attempts(invocation.database(), rollout, slowest))
    if invocation.json:
        output.document([asdict(each) for each in found])
        return
    output.table(
        ["tenant", "wave", "state", "from", "to", "seconds", "tries", "error"],
        [
            [
                each.slug,
                str(each.wave),
                str(each.state),
                each.from_revision,
                each.to_revision,
                None if each.seconds is None else f"{each.seconds:.3f}",
                str(each.tries),
                each.error,
            ]
            for each in found
        ],
    )


def _attempts(db: TenantDB, rollout: UUID | None, slowest: bool) -> Iterator[Attempt]:
    if slowest:
        yield from db.migrations.attempts(rollout, slowest=True, limit=_SLOWEST)
        return
    last = -1
    while page := db.migrations.attempts(rollout, after=last):
        yield from page
        rollout, last = page[-1].rollout_id, page[-1].position


@rollouts.command("resume")
@_ID
@click.option("--events", is_flag=True, help=_EVENTS)
@json_option
@pass_invocation
def resume_rollout(invocation: Invocation, rollout: UUID | None, events: bool) -> None:
    """Go on with a rollout that was paused, halted, or left by a process that died; the newest one without an id."""
    _carry_out(invocation, functools.partial(invocation.database().migrations.resume, rollout), events=events)


@rollouts.command("retry")
@_ID
@click.option("--events", is_flag=True, help=_EVENTS)
@json_option
@pass_invocation
def retry_rollout(invocation: Invocation, rollout: UUID | None, events: bool) -> None:
    """Try the failed tenants of a rollout again, and those that it has not come to."""
    _carry_out(invocation, functools.partial(invocation.database().migrations.retry, rollout), events=events)


@rollouts.command("pause")
@_ID
@json_option
@pass_invocation
def pause_rollout(invocation: Invocation, rollout: UUID | None) -> None:
    """Ask whoever runs a rollout to stop after what is under way."""
    _say_state(invocation, invocation.database().migrations.pause(rollout))


@rollouts.command("cancel")
@_ID
@json_option
@pass_invocation
def cancel_rollout(invocation: Invocation, rollout: UUID | None) -> None:
    """Stop a rollout for good. Who was not migrated stays where it is."""
    _say_state(invocation, invocation.database().migrations.cancel(rollout))


def _say_state(invocation: Invocation, rollout: Rollout) -> None:
    if invocation.json:
        output.document(asdict(rollout))
    else:
        click.echo(f"rollout {rollout.id}: {rollout.state}")


@click.command()
@click.option("--drift", is_flag=True, help="Compare every tenant's schema with what the migrations make.")
@click.option("--tenant", "tenants", metavar="SLUG", multiple=True, help="With --drift: this one alone; may be repeated.")
@json_option
@pass_invocation
def status(invocation: Invocation, drift: bool, tenants: tuple[str, ...]) -> None:
    """Where everyone is: tenants by revision.

    And how the last rollout went. With --drift the exit code is 3 where something differs, or could not be looked at.
    """
    db = invocation.database()
    if tenants and not drift:
        raise UsageProblem("--tenant belongs to --drift; one tenant's revision is in `tenantdb show`")
    if drift:
        slugs = [db.tenants.get(slug, suggest=True).slug for slug in tenants] or None
        with progress("comparing", quiet=invocation.json) as tell:
            found = db.migrations.drift(tenants=slugs, progress=tell)
        if invocation.json:
            output.document(asdict(found))
        else:
            for slug, differences in sorted(found.drifted.items()):
                for each in differences:
                    click.echo(f"{slug}: {each}")
            for slug, problem in sorted(found.unreachable.items()):
                output.say(f"{slug}: could not be looked at: {problem}")
            click.echo(f"compared: {found.checked}; drifted: {len(found.drifted)}; not looked at: {len(found.unreachable)}")
        if not found.ok:
            click.get_current_context().exit(output.SOME_FAILED)
        return
    now = db.migrations.status()
    if invocation.json:
        output.document(
            {
                "head": now.head,
                "behind": now.behind,
                "counts": [
                    {"server": server, "state": state, "revision": revision, "tenants": count}
                    for (server, state, revision), count in sorted(now.counts.items(), key=str)
                ],
                "rollout": None if now.rollout is None else asdict(now.rollout),
                "attempts": now.attempts,
                "failed": now.failed,
            }
        )
        return
    output.table(
        ["server", "state", "revision", "tenants"],
        [[server, state, revision, str(count)] for (server, state, revision), count in sorted(now.counts.items(), key=str)],
    )
    click.echo(f"head {now.head or '(there are no revisions)'}; behind it: {now.behind}")
    if now.rollout is not None:
        told = ", ".join(f"{state} {count}" for state, count in now.attempts.items() if count)
        click.echo(f"last rollout {now.rollout.id} to {now.rollout.target or 'base'}: {now.rollout.state}; {told}")
        for slug, problem in now.failed.items():
            output.say(f"{slug}: {problem}")


@contextmanager
def _watching(invocation: Invocation, *, events: bool) -> Iterator[Callable[[Progress], None]]:
    """Progress for whoever watches: a bar on a terminal, lines elsewhere, JSON for programs."""
    invocation.json |= events  # who reads stderr as JSON can do nothing with remarks and errors in words
    with progress("migrating", quiet=invocation.json) as tell:

        def watch(told: Progress) -> None:
            if events:
                click.echo(json.dumps(asdict(told), default=str), err=True)
            elif not invocation.json:
                if told.event == "wave" and told.wave > 0:
                    output.say(f"wave {told.wave}")
                elif told.event == "tenant" and told.error is not None:
                    output.say(f"{told.tenant}: failed: {told.error}")
                tell(told.done + told.failed, told.total)

        yield watch


def _print_sql(invocation: Invocation, sql: dict[str | None, str]) -> None:
    if invocation.json:
        output.document([{"from": start, "sql": text} for start, text in sql.items()])
        return
    for start, text in sql.items():
        click.echo(f"-- from {start or 'base'}\n{text}\n")


def _print_plan(invocation: Invocation, plan: Plan) -> None:
    if invocation.json:
        output.document(
            {
                "target": plan.target,
                "at_target": plan.at_target,
                "spares": plan.spares,
                "waves": plan.waves,
                "ways": [
                    {
                        "from": way.from_revision,
                        "to": way.to_revision,
                        "revisions": [step.revision for step in way.steps],
                        "engine": way.runner,
                        "why": way.why,
                        "tenants": sum(count for (_, start), count in plan.counts().items() if start == way.from_revision),
                    }
                    for way in plan.ways.values()
                ],
                "tenants": [
                    {"tenant": each.slug, "server": each.server, "from": each.from_revision, "wave": each.wave} for each in plan.tenants
                ],
                "refused": dict(plan.refused),
                "mistaken": dict(plan.mistaken),
                "unreachable": dict(plan.unreachable),
            }
        )
        return
    for (server, start), count in sorted(plan.counts().items(), key=str):
        way = plan.ways[start]
        steps = ", ".join(f"{'undo ' if step.down else ''}{step.revision}" for step in way.steps)
        click.echo(f"{server}: {count} from {start or 'base'} to {way.to_revision or 'base'} ({steps}), engine {way.runner}")
        if way.why:
            output.say(f"  {way.why}")
    for slug, problem in sorted({**plan.refused, **plan.unreachable}.items()):
        output.say(f"{slug}: {problem}")
    for slug, actual in sorted(plan.mistaken.items()):
        output.say(f"{slug}: its database is at {actual or 'base'}, not where the registry had it")
    waves = ", ".join(map(str, plan.waves)) or "none"
    click.echo(f"waves: {waves}; at {plan.target or 'base'} already: {plan.at_target}; spares: {plan.spares}")


def _print_report(invocation: Invocation, report: Report) -> None:
    if invocation.json:
        output.document({**asdict(report), "slowest": [{"tenant": slug, "seconds": seconds} for slug, seconds in report.slowest]})
    else:
        for slug, problem in sorted(report.refused.items()):
            output.say(f"{slug}: {problem}")
        rest = f"; waiting: {report.waiting}" if report.waiting else ""
        spares = f"; spares: {report.spares}" if report.spares else ""
        click.echo(
            f"{report.target or '(there are no revisions)'}: {report.state}; migrated: {report.done};"
            f" failed: {report.failures + len(report.refused)}{rest}{spares}"
        )
        if report.error:
            output.say(f"{report.state}: {report.error}")
        if report.state != "cancelled" and report.failures:
            output.say(f"When the cause is mended: tenantdb rollouts retry {report.rollout}")
        if report.state != "cancelled" and report.waiting:
            without = ", without those that failed" if report.failures else ""
            output.say(f"Go on with the rest{without}: tenantdb rollouts resume {report.rollout}")
    if not report.ok:
        click.get_current_context().exit(output.SOME_FAILED)
