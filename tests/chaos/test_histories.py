"""Whatever sessions begin and end, and whoever is evicted, disposed of or given a new generation meanwhile: each is in its own database.

The ledger alone has a state machine (tests/unit/test_ledger_machine.py). This one has fifty databases, and asks them.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError

from tenantdb import Tenant, TenantDB, TenantState, errors
from tests.chaos.town import HERE, Town, at_rest, stats_of
from tests.conformance.colours import MakeProcess

LIMIT, LEASES = 6, 4
HISTORY = st.lists(
    st.tuples(st.sampled_from("begin begin begin end commit keep kept dispose change change".split()), st.integers(0, 49)),
    min_size=20,
    max_size=60,
)
few = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def play(db: TenantDB, tenants: list[Tenant], history: list[tuple[str, int]]) -> None:
    """Do all of it, and ask every open session after each step where it is."""
    kept: dict[int, Any] = {}
    leases: list[tuple[Tenant, Any]] = []
    with ExitStack() as at_the_end:
        for step, number in history:
            tenant = tenants[number]
            if step == "begin":
                if len(leases) == LEASES:
                    leases.pop(0)[1].close()
                leases.append((tenant, at_the_end.enter_context(db.session(tenant))))
            elif step == "end" and leases:
                leases.pop(number % len(leases))[1].close()
            elif step == "commit" and leases:  # its next transaction is on another connection, perhaps of another engine
                leases[number % len(leases)][1].commit()
            elif step == "keep":
                kept[number] = db.engine(tenant)
            elif step == "kept":
                for other, engine in kept.items():
                    try:
                        with engine.connect() as connection:
                            assert connection.scalar(HERE) == tenants[other].database
                    except errors.EngineRetired:
                        assert other != number or engine is not db.engine(tenant)
            elif step == "dispose":
                db.engine(tenant).dispose()
            elif step == "change":  # of generation, in the registry alone: what is leased goes on
                for state in (TenantState.SUSPENDED, TenantState.ACTIVE):
                    now = db.tenants.get(tenant.id)
                    db.tenants.transition(now, state, action=f"tenant.{state}", bump_generation=True)
            for owner, session in leases:
                assert session.scalar(HERE) == owner.database, step
            assert stats_of(db).held <= LIMIT
    assert at_rest(db)


def test_no_history_leads_a_session_into_another_database(process: MakeProcess, town: Town) -> None:
    db = process(LIMIT, acquire_timeout=5.0)

    @few
    @given(HISTORY)
    def whatever_happens(history: list[tuple[str, int]]) -> None:
        play(db, town.fifty, history)

    whatever_happens()
    assert stats_of(db).evictions > 10


def test_an_engine_under_another_tenants_name_would_be_seen(process: MakeProcess, town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    db = process(LIMIT, acquire_timeout=5.0)
    engine_of, first = db._engines.engine_of, db._lookups.record(town.fifty[0].id)
    monkeypatch.setattr(db._engines, "engine_of", lambda record, *how, **more: engine_of(first, *how, **more))

    with pytest.raises((AssertionError, OperationalError)):
        play(db, town.fifty, [("begin", 1), ("begin", 2)])
