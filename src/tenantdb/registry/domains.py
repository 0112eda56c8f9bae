"""Custom domains: host names of the customers' own that lead to their tenants. One name, one tenant.

Whether the domain is the customer's to give is the application's to find out, before it is added; see the how-to.
"""

from __future__ import annotations

import builtins
import hashlib
from collections.abc import Callable, Mapping, Sequence
from uuid import UUID

from sqlalchemy import delete, insert, select
from sqlalchemy.exc import IntegrityError

from tenantdb.errors import DomainTaken, InvalidDomain, InvalidTenantKey, TenantNotFound
from tenantdb.model import Domain, Tenant
from tenantdb.registry import audit, tables
from tenantdb.registry.answers import Answers
from tenantdb.registry.ids import chunks, tenant_id_of
from tenantdb.registry.names import KnownNames
from tenantdb.registry.transactions import Transactions
from tenantdb.resolvers import is_domain

RULE = (
    "a domain is a host name of at least two labels in lower-case ASCII (xn-- for other letters), without scheme, port, path or final dot,"
    " at most 253 characters, and no IP address"
)
_NOBODY = UUID(int=0)  # no tenant has this id

_domains = tables.domains


class DomainStore:
    """Reads and writes domains; `tenant_of` is for every request. Safe to share between threads.

    Whoever calls us chooses the host, so `KnownNames` bounds what unknown ones cost, as it does for tenants' own names.
    """

    def __init__(self, transactions: Transactions, *, size: int, ttl: float, clock: Callable[[], float]) -> None:
        self._transactions = transactions
        self._answers: Answers[str, UUID] = Answers(
            size=size, ttl=ttl, clock=clock, is_absent=lambda tenant_id: tenant_id == _NOBODY, subjects=lambda domain: (domain,)
        )
        self._names = KnownNames(self._read_names, ttl=ttl, clock=clock)
        self.clear = self._answers.clear

    # -- the data path --

    def peek(self, domain: str) -> UUID | None:
        """The tenant's id without I/O, or None where only `tenant_of` can tell. Raises: `InvalidTenantKey` for what is no domain in its
        canonical form; `TenantNotFound` where it is remembered that nobody has it."""
        if not is_domain(domain):
            raise InvalidTenantKey(_shown(domain), RULE)
        return _somebody(domain, self._answers.peek(domain))

    def tenant_of(self, domain: str) -> UUID:
        """The id of the tenant that a domain leads to, from memory or by one query. Raises: as `peek`; `RegistryUnavailable`."""
        found = self.peek(domain)
        if found is not None:
            return found
        if self._names.rule_out(domain):  # and not remembered: what the list rules out is as old as the list
            raise TenantNotFound(domain)
        return _somebody(domain, self._answers.get(domain, self._load)) or _NOBODY

    def _load(self, domain: str) -> UUID:
        with self._transactions.read() as connection:
            found: UUID | None = connection.scalar(select(_domains.c.tenant_id).where(_domains.c.domain == domain))
        if found is None:
            self._names.missed()
            return _NOBODY
        return found

    def _read_names(self) -> builtins.list[str]:
        with self._transactions.read() as connection:
            return builtins.list(connection.scalars(select(_domains.c.domain)))

    def forget(self, domain: str) -> None:
        """The domain was added or removed: the next look-up asks the database."""
        self._answers.forget(domain)
        self._names.add(domain)

    def check(self, *, everything: bool) -> builtins.list[str]:
        """Compare what is in use with the registry; see `Answers.check`."""
        return self._answers.check(self._ask, everything=everything)

    def _ask(self, names: Sequence[str]) -> Mapping[str, UUID]:
        found: dict[str, UUID] = {}
        with self._transactions.read() as connection:
            for some in chunks(names):
                rows = connection.execute(select(_domains.c.domain, _domains.c.tenant_id).where(_domains.c.domain.in_(some)))
                found |= {row.domain: row.tenant_id for row in rows}
        return found

    # -- managing --

    def add(self, domain: str, tenant: Tenant | UUID | str) -> Domain:
        """Lead a domain to a tenant. May run again.

        Raises: `InvalidDomain`; `DomainTaken`, where it is another tenant's; `TenantNotFound`.
        """
        if not is_domain(domain):
            raise InvalidDomain(_shown(domain), RULE)
        try:
            added = self._add(domain, tenant)
        except IntegrityError:  # another process added it at once; the second look finds it
            added = self._add(domain, tenant)
        self.forget(domain)
        return added

    def _add(self, domain: str, tenant: Tenant | UUID | str) -> Domain:
        with self._transactions.write() as connection:
            tenant_id = tenant_id_of(connection, tenant)
            known = connection.execute(select(_domains).where(_domains.c.domain == domain)).mappings().first()
            if known is not None:
                if known["tenant_id"] != tenant_id:
                    raise DomainTaken(domain)
                return Domain(**known)
            made = Domain(domain=domain, tenant_id=tenant_id, created_at=tables.utcnow())
            connection.execute(insert(_domains).values(domain=domain, tenant_id=tenant_id, created_at=made.created_at))
            audit.record(connection, "domain.add", tenant_id=tenant_id, object=_digest(domain))
            return made

    def remove(self, domain: str) -> None:
        """Lead a domain nowhere. Raises: `TenantNotFound`, where nobody has it."""
        with self._transactions.write() as connection:
            tenant_id = connection.scalar(delete(_domains).where(_domains.c.domain == domain).returning(_domains.c.tenant_id))
            if tenant_id is None:
                raise TenantNotFound(_shown(domain))
            audit.record(connection, "domain.remove", tenant_id=tenant_id, object=_digest(domain))
        self.forget(domain)

    def list(self, tenant: Tenant | UUID | str | None = None) -> list[Domain]:
        """A tenant's domains, or all, by name. Raises: `TenantNotFound`."""
        query = select(_domains).order_by(_domains.c.domain)
        with self._transactions.read() as connection:
            if tenant is not None:
                query = query.where(_domains.c.tenant_id == tenant_id_of(connection, tenant))
            return [Domain(**row) for row in connection.execute(query).mappings()]


def _somebody(domain: str, found: UUID | None) -> UUID | None:
    if found == _NOBODY:
        raise TenantNotFound(domain)
    return found


def _digest(domain: str) -> str:
    """How the audit log names a domain: the log outlives the tenant, and a domain is most often the customer's name. Whoever has a domain
    in mind finds what was done with it all the same."""
    return f"sha256:{hashlib.sha256(domain.encode()).hexdigest()[:16]}"


def _shown(value: object) -> str:
    """Bad input in an error message: printable, on one line, and short."""
    return ascii(value)[1:-1][:80] if isinstance(value, str) else type(value).__name__
