"""Tasks that are published when a transaction has committed, and not before.

A task that is published inside a transaction may run before the commit, and not find the row that it is about; or the transaction is
rolled back, and it should never have run. SQLAlchemy's hooks tell how each transaction of a session ends. A savepoint's tasks pass to the
transaction around it when it is released, and are dropped with it otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from tenantdb.connections.session import PinnedSession
from tenantdb.errors import NotATenantsSession

from .publishing import Decided, office_of

log = logging.getLogger("tenantdb.tasks")

_KEY = "tenantdb_on_commit"


def delay_on_commit(session: Session | AsyncSession, task: Any, *args: Any, **kwargs: Any) -> None:
    """``task.delay(*args, **kwargs)`` once the outermost transaction of ``session`` has committed; never if it, or the savepoint that this
    is called in, is rolled back.

    ``session``: of `TenantDB` or `AsyncTenantDB`; the task runs for its tenant. ``task``: one, or a signature with options and followers.
    It is published by the thread that commits, after the connection was given back; an event loop waits meanwhile, a millisecond or so.
    Where the broker cannot be reached, what it raises comes out of the commit, which stands all the same.

    Raises: `NotATenantsSession`, `TenantNotFound`, `RegistryUnavailable`; `TaskRefused` for a task that runs for every tenant.
    """
    sync = session.sync_session if isinstance(session, AsyncSession) else session
    if not isinstance(sync, PinnedSession):
        raise NotATenantsSession(type(session).__name__)
    office = office_of(task.app)
    tenant = Decided(office.id_of(sync._tenantdb_pin._key))
    office.decide(task.name, tenant)  # what it cannot run for is refused here, and not in the commit
    publish = task.apply_async

    def call() -> None:
        publish(args, kwargs, tenant=tenant)

    _OnCommit.of(sync).add(call)


class _OnCommit:
    """What is to be done after the transactions of one session."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._calls: dict[SessionTransaction, list[Callable[[], None]]] = {}
        self._committed: SessionTransaction | None = None
        event.listen(session, "after_commit", self._after_commit)
        event.listen(session, "after_transaction_end", self._after_end)

    @classmethod
    def of(cls, session: Any) -> _OnCommit:
        found: _OnCommit | None = session.info.get(_KEY)
        if found is None:
            found = session.info[_KEY] = cls(session)
        return found

    def add(self, call: Callable[[], None]) -> None:
        if not self._session.in_transaction():
            self._session.begin()
        self._calls.setdefault(self._innermost(), []).append(call)

    def _innermost(self) -> SessionTransaction:
        transaction: SessionTransaction = self._session.get_nested_transaction() or self._session.get_transaction()
        return transaction

    def _after_commit(self, session: Session) -> None:
        self._committed = self._innermost()

    def _after_end(self, session: Session, transaction: SessionTransaction) -> None:
        calls = self._calls.pop(transaction, [])
        committed, self._committed = self._committed is transaction, None
        if not committed:
            return
        if transaction.parent is not None:
            self._calls.setdefault(transaction.parent, []).extend(calls)
            return
        errors: list[Exception] = []
        for call in calls:
            try:
                call()
            except Exception as error:  # the others have been promised too
                if errors:  # only one can come out of the commit
                    log.error("one more task was not published after a commit", exc_info=error)
                errors.append(error)
        if errors:
            raise errors[0]
