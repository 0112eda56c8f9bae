"""The nouns: one table of transitions, frozen records, no secret in sight."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import uuid

import pytest

from tenantdb.model import (
    TRANSITIONS,
    DatabaseRole,
    Identity,
    MemberRole,
    Membership,
    NewUser,
    Server,
    Subscription,
    Tenant,
    TenantState,
    User,
)

S = TenantState
LEGAL = {
    (S.SPARE, S.PROVISIONING),
    (S.SPARE, S.ACTIVE),
    (S.SPARE, S.PURGING),
    (S.PROVISIONING, S.ACTIVE),
    (S.PROVISIONING, S.FAILED),
    (S.FAILED, S.PROVISIONING),
    (S.FAILED, S.DELETED),
    (S.ACTIVE, S.SUSPENDED),
    (S.ACTIVE, S.MAINTENANCE),
    (S.ACTIVE, S.DELETED),
    (S.SUSPENDED, S.ACTIVE),
    (S.SUSPENDED, S.DELETED),
    (S.MAINTENANCE, S.ACTIVE),
    (S.MAINTENANCE, S.DELETED),
    (S.DELETED, S.ACTIVE),
    (S.DELETED, S.PURGING),
    (S.PURGING, S.PURGED),
}


def tenant(**changes: object) -> Tenant:
    return dataclasses.replace(Tenant(id=uuid.UUID(int=7), slug="acme", name="Acme", state=S.ACTIVE), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("state", TenantState)
@pytest.mark.parametrize("to", TenantState)
def test_the_table_of_transitions_is_the_designs(state: TenantState, to: TenantState) -> None:
    assert (to in TRANSITIONS[state]) == ((state, to) in LEGAL)


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TRANSITIONS[S.PURGED] = frozenset({S.ACTIVE})  # type: ignore[index]


def test_every_state_but_a_spare_can_be_reached_and_a_purged_tenant_stays_purged() -> None:
    reached = {to for targets in TRANSITIONS.values() for to in targets}
    assert reached == set(TenantState) - {S.SPARE}
    assert not TRANSITIONS[S.PURGED]


@pytest.mark.parametrize("state", TenantState)
def test_only_an_active_tenant_is_servable(state: TenantState) -> None:
    assert tenant(state=state).servable is (state is S.ACTIVE)


@pytest.mark.parametrize(
    "record",
    [
        tenant(metadata={"beds": 4}),
        Server(id=uuid.UUID(int=1), name="default", backend="sqlite", path="tenants"),
        User(id=uuid.UUID(int=2), email="ann@acme.example"),
        NewUser(email="ann@acme.example", password="correct horse"),
        Membership(user_id=uuid.UUID(int=2), tenant_id=uuid.UUID(int=7), role=MemberRole.OWNER),
        Identity("7", tenant="acme", role="owner"),
    ],
    ids=lambda record: type(record).__name__,
)
def test_a_record_is_frozen_and_survives_pickling_and_copying(record: object) -> None:
    field = dataclasses.fields(record)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, field, "another")
    assert pickle.loads(pickle.dumps(record)) == record
    assert copy.deepcopy(record) == record


def test_a_new_users_password_does_not_show() -> None:
    assert "canary" not in repr(NewUser(email="ann@acme.example", password="canary"))


@pytest.mark.parametrize("kind", [TenantState, Subscription, MemberRole, DatabaseRole])
def test_a_state_is_its_word_in_text_and_json(kind: type[TenantState]) -> None:
    for member in kind:
        assert str(member) == f"{member}" == member.value == member
        assert kind(member.value) is member
