"""As whom a database is handed over and back: a superuser whose login was given, or the provisioner as a member of the owner's role.

What was found out on PostgreSQL 15 and 18: a plain owner can neither give its database away (that takes CREATEDB and SET ROLE to the new
owner) nor make anybody a member of its own role. Before 16 a provisioner with CREATEROLE makes itself one, and leaves again in the
transaction that does the work. From 16 on it takes a superuser, or a login with ADMIN OPTION on the role, such as the master user of a
cloud's server that made it; and only who granted a membership can revoke it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psycopg

from tenantdb.backends.base import FailureClass, Survey
from tenantdb.backends.postgresql import adoption
from tenantdb.backends.postgresql.adoption import Connection, Login
from tenantdb.backends.postgresql.bootstrap import TEMPLATE
from tenantdb.backends.postgresql.connect import connect_failure, is_refused_password, provisioner_connection
from tenantdb.errors import AdoptRefused, ServerUnavailable
from tenantdb.model import Tenant
from tenantdb.settings import ConnectionURL, check_host

if TYPE_CHECKING:
    from tenantdb.backends.postgresql.workshop import PostgreSQLWorkshop

logger = logging.getLogger("tenantdb.provisioning")

_NOBODYS = frozenset({"postgres", "template0", "template1", TEMPLATE})
_OPTIONS = "-c search_path=pg_catalog -c lock_timeout=5s"
_DENIED = psycopg.errors.InsufficientPrivilege
_BACK = "given back"


class Handover:
    """The part of a `PostgreSQLWorkshop` that deals with what somebody else made. It uses the workshop's one connection, and puts another
    login's in its place for a while."""

    def __init__(self, workshop: PostgreSQLWorkshop) -> None:
        self._shop = workshop
        self._settings = workshop.settings
        self._server = workshop.server

    def survey(self, slug: str, database: str, url: ConnectionURL | None, *, opaque: bool) -> Survey:
        if url is None:
            raise AdoptRefused(slug, ["it takes owner_url=..., a login that owns the database, or a superuser's"])
        check_host(url, self._settings, "owner_url")
        outside = self._shop.outside()
        me, found = Login.of(outside).name, adoption.facts(outside, database)
        if found is None:
            raise AdoptRefused(slug, [f"there is no database {database!r} on server {self._server.name!r}"])
        if found.template or not found.accepts or database in _NOBODYS or opaque:
            raise AdoptRefused(slug, [f"{database!r} is PostgreSQL's or tenantdb's own, or accepts no connections"])
        if found.owner == me:
            raise AdoptRefused(
                slug, [f"{database!r} belongs to the provisioner itself, whom nobody could shut out; give it to another role"]
            )
        with self._login(slug, url, database) as (connection, login):
            there = adoption.facts(connection, database)
            if there is None or (there.id, there.started) != (found.id, found.started):
                raise AdoptRefused(slug, [f"owner_url leads to another server than the provisioner's of {self._server.name!r}"])
            if not (login.is_super or login.may_use(connection, found.owner)):
                raise AdoptRefused(slug, [f"the login of owner_url does not own {database!r}"])
            surveyed, problems = adoption.survey(
                connection, database, found, provisioner=me, server=self._server, settings=self._settings, by_superuser=login.is_super
            )
            can_grant = login.is_super or login.may_grant(connection, found.owner)
        if not can_grant and (refused := self._refused_to_join(found.owner)):
            problems.append(refused)
        if problems:
            raise AdoptRefused(slug, problems)
        return surveyed

    def hand_over(self, tenant: Tenant, url: ConnectionURL | None, *, limit: int) -> None:
        outside = self._shop.outside()
        me, database = Login.of(outside).name, tenant.database or ""
        found = adoption.facts(outside, database)
        if found is None:
            raise AdoptRefused(tenant.slug, [f"there is no database {database!r} any more"])
        if found.owner == me:
            if not adoption.is_handed_over(self._shop.inside(database), tenant, me):
                raise AdoptRefused(tenant.slug, [f"{database!r} belongs to the provisioner, and it was not handed over for this tenant"])
        elif (superuser := self._superuser(tenant.slug, url)) is not None:
            full = self._settings.hardening == "full"
            with self._login(tenant.slug, superuser, database) as (connection, _):
                with connection.transaction():
                    adoption.hand_over(connection, tenant, self._server, provisioner=me, limit=limit, close_doors=full)
                adoption.end_sessions(connection)
        else:
            with self._joined(tenant, url, tenant.owner_role or "") as connection:
                adoption.hand_over(connection, tenant, self._server, provisioner=me, limit=limit, close_doors=False)
        if not adoption.is_super(self._shop.outside(), tenant.adopted_from or ""):  # whom nothing shuts out
            self._shop.end_sessions(tenant, roles=[tenant.adopted_from or ""])

    def may_hand_back(self, tenant: Tenant, url: ConnectionURL | None) -> ConnectionURL | None:
        """A superuser's login, where it is one. Raises: `AdoptRefused`."""
        old = tenant.adopted_from or ""
        self._shop.outside()
        if not self._shop.find_roles([old]):
            raise AdoptRefused(tenant.slug, [f"the role {old} that owned it is not there any more; make it again first"], _BACK)
        superuser = self._superuser(tenant.slug, url)
        if superuser is None and url is None and (refused := self._refused_to_join(old)):
            raise AdoptRefused(tenant.slug, [refused], _BACK)
        if superuser is None and adoption.is_super(self._shop.outside(), old):
            raise AdoptRefused(tenant.slug, [f"it goes back to {old}, a superuser, so it takes a superuser's owner_url"], _BACK)
        return superuser

    def hand_back(self, tenant: Tenant, url: ConnectionURL | None) -> None:
        superuser, me = self.may_hand_back(tenant, url), Login.of(self._shop.outside()).name
        if not adoption.is_handed_over(self._shop.inside(tenant.database or ""), tenant, me):
            raise AdoptRefused(tenant.slug, ["what was written down in it when it was adopted is gone"], _BACK)
        if superuser is not None:
            with self._login(tenant.slug, superuser, tenant.database) as (connection, _), connection.transaction():
                adoption.hand_back(connection, tenant, closed_by_us=True)
        elif adoption.closed_doors(self._shop.inside(tenant.database or "")):
            problem = "a superuser closed doors in it, which only a superuser can open again: give a superuser's owner_url"
            raise AdoptRefused(tenant.slug, [problem], _BACK)
        else:
            with self._joined(tenant, url, tenant.owner_role or "", tenant.runtime_role or "") as connection:
                adoption.hand_back(connection, tenant, closed_by_us=False)

    # -- logins ------------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _login(self, slug: str, url: ConnectionURL, database: str | None) -> Iterator[tuple[Connection, Login]]:
        self._shop.close()
        try:
            connection = provisioner_connection(url, self._settings, self._server.name, database=database, options=_OPTIONS)
        except ServerUnavailable as error:
            cause = error.__cause__
            if isinstance(cause, Exception) and connect_failure(cause) is FailureClass.TENANT:
                raise AdoptRefused(slug, [f"owner_url does not lead there: {error.problem}"]) from cause
            raise
        with connection:
            yield connection, Login.of(connection)

    def _superuser(self, slug: str, url: ConnectionURL | None) -> ConnectionURL | None:
        """The given login, where it is a superuser on this very server. A plain owner has no business outside its own database."""
        if url is None:
            return None
        check_host(url, self._settings, "owner_url")
        try:
            with self._login(slug, url, "postgres") as (connection, login):
                started = adoption.started(connection)
        except AdoptRefused as error:
            if isinstance(error.__cause__, Exception) and is_refused_password(error.__cause__):
                raise
            return None
        if login.is_super and started != adoption.started(self._shop.outside()):
            raise AdoptRefused(slug, [f"owner_url leads to another server than the provisioner's of {self._server.name!r}"])
        return url if login.is_super else None

    # -- memberships -------------------------------------------------------------------------------------------------------------------

    def _refused_to_join(self, role: str) -> str | None:
        """Why the provisioner neither is nor can make itself a member of a role."""
        connection = self._shop.outside()
        if adoption.is_member(connection, role):
            return None
        me = Login.of(connection).name
        try:
            with connection.transaction(force_rollback=True):
                connection.execute(adoption.join(connection, role, me))
        except _DENIED:
            return (
                f"the provisioner must be a member of {role} meanwhile, and a superuser must grant that: {self._how(role, me)};"
                " or give a superuser's owner_url"
            )
        return None

    def _how(self, role: str, member: str) -> str:
        grant = adoption.join(self._shop.outside(), role, member).as_string(None)
        return f"{grant}; and when it is done {adoption.leave(role, member).as_string(None)}"

    @contextmanager
    def _joined(self, tenant: Tenant, url: ConnectionURL | None, *roles: str) -> Iterator[Connection]:
        """A transaction inside, of the provisioner as a member of the old owner's role and of the tenant's own."""
        old, me = tenant.adopted_from or "", Login.of(self._shop.outside()).name
        if not adoption.is_member(self._shop.outside(), old) and not self._grant(tenant, url, old, me):
            raise AdoptRefused(tenant.slug, [f"a superuser must run {self._how(old, me)}; or give a superuser's owner_url"])
        try:
            connection = self._shop.inside(tenant.database or "")
            with connection.transaction():
                for role in roles:
                    connection.execute(adoption.join(connection, role, me))
                yield connection
                for role in roles:
                    connection.execute(adoption.leave(role, me))
                if connection.info.server_version < 160000:  # with what it was for, or not at all
                    connection.execute(adoption.leave(old, me))
        finally:
            if adoption.is_member(self._shop.outside(), old) and not self._revoke(tenant, url, old, me):
                told = adoption.leave(old, me).as_string(None)
                logger.warning("the provisioner is still a member of role %s; as a superuser: %s", old, told)

    def _grant(self, tenant: Tenant, url: ConnectionURL | None, role: str, member: str) -> bool:
        try:
            self._shop.outside().execute(adoption.join(self._shop.outside(), role, member))
            return True
        except _DENIED:
            pass
        return url is not None and self._as_owner(tenant, url, "GRANT", role, member)

    def _revoke(self, tenant: Tenant, url: ConnectionURL | None, role: str, member: str) -> bool:
        try:
            self._shop.outside().execute(adoption.leave(role, member))
            return True
        except _DENIED:
            pass
        return url is not None and self._as_owner(tenant, url, "REVOKE", role, member)

    def _as_owner(self, tenant: Tenant, url: ConnectionURL, verb: str, role: str, member: str) -> bool:
        """With the given login, which may hold ADMIN OPTION on the role. It may be shut out of the database by now."""
        for database in (tenant.database, "postgres"):
            try:
                with self._login(tenant.slug, url, database) as (connection, _):
                    connection.execute(adoption.join(connection, role, member) if verb == "GRANT" else adoption.leave(role, member))
                    return True
            except _DENIED:
                return False
            except AdoptRefused:
                continue
        return False
