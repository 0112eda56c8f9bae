"""A sign-up is one thing: all of it or nothing, once per idempotency key, and never somebody else's tenant."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from uuid import uuid4

import pytest
from sqlalchemy import func, select

from tenantdb.errors import InvalidSlug, InvalidUser, TenantExists, TenantNotFound, UserExists, UserNotFound
from tenantdb.model import MemberRole, NewUser, Subscription, Tenant, TenantState
from tenantdb.registry import Operation, Registry, SignUp, tables
from tests.unit.registry_fixtures import PASSWORD

ADA = NewUser(email="ada@example.org", password=PASSWORD, first_name="Ada")
REQUEST = SignUp(
    slug="acme",
    name="Acme Clinic",
    owner=ADA,
    email="office@acme.example",
    country="DE",
    plan="pro",
    subscription="active",
    metadata={"beds": 3},
    payload={"region": "eu"},
    idempotency_key="key-1",
)
WRITTEN = (tables.users, tables.tenants, tables.memberships, tables.operations, tables.audit)


def counts(registry: Registry) -> list[int | None]:
    with registry.read() as connection:
        return [connection.scalar(select(func.count()).select_from(table)) for table in WRITTEN]


def test_one_sign_up_makes_user_tenant_membership_and_operation(registry: Registry) -> None:
    tenant, operation = registry.sign_up(REQUEST)
    assert (tenant.slug, tenant.name, tenant.state, tenant.server, tenant.database) == (
        "acme",
        "Acme Clinic",
        TenantState.PROVISIONING,
        None,
        None,
    )
    assert (tenant.email, tenant.country, tenant.plan, tenant.subscription) == ("office@acme.example", "DE", "pro", Subscription.ACTIVE)
    assert tenant.metadata == {"beds": 3}
    assert (operation.tenant_id, operation.payload, operation.idempotency_key) == (tenant.id, {"region": "eu"}, "key-1")
    user = registry.users.authenticate("ada@example.org", PASSWORD)
    assert user.first_name == "Ada"
    assert registry.memberships.get(user, tenant).role is MemberRole.OWNER
    assert [entry.action for entry in registry.audit.list()] == ["tenant.sign_up", "membership.add", "user.create"]


def test_the_owner_may_exist_already_or_not_at_all(registry: Registry) -> None:
    ada = registry.users.create("ada@example.org", PASSWORD)
    for slug, owner in (("acme", ada), ("beta", ada.id)):
        tenant, _ = registry.sign_up(SignUp(slug=slug, owner=owner))
        assert registry.memberships.get(ada, tenant).role is MemberRole.OWNER
    tenant, _ = registry.sign_up(SignUp(slug="gamma"))
    assert registry.memberships.list(tenant=tenant) == []
    assert tenant.name == "gamma"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"slug": "taken"}, TenantExists),
        ({"owner": NewUser(email="TAKEN@example.org", password=PASSWORD)}, UserExists),
        ({"owner": NewUser(email="no e-mail", password=PASSWORD)}, InvalidUser),
        ({"owner": NewUser(email="ada@example.org", password="short")}, InvalidUser),
        ({"owner": uuid4()}, UserNotFound),
        ({"slug": "Acme"}, InvalidSlug),
        ({"slug": "postgres"}, InvalidSlug),
        ({"name": "x" * 201}, ValueError),
        ({"idempotency_key": ""}, ValueError),
        ({"idempotency_key": "k" * 201}, ValueError),
        ({"subscription": "gold"}, ValueError),
        ({"metadata": {"x": object()}}, TypeError),
    ],
)
def test_a_refused_sign_up_leaves_nothing_behind(registry: Registry, change: dict[str, object], error: type[Exception]) -> None:
    registry.sign_up(SignUp(slug="taken", owner=NewUser(email="taken@example.org", password=PASSWORD)))
    before = counts(registry)
    with pytest.raises(error):
        registry.sign_up(replace(REQUEST, **change))  # type: ignore[arg-type]
    assert counts(registry) == before
    registry.sign_up(REQUEST)


def test_a_strangers_sign_up_for_a_taken_slug_gets_nothing(registry: Registry) -> None:
    registry.sign_up(REQUEST)
    with pytest.raises(TenantExists):
        registry.sign_up(SignUp(slug="acme"))
    with pytest.raises(TenantExists):
        registry.sign_up(SignUp(slug="acme", idempotency_key="another"))


def test_the_same_request_again_is_the_same_tenant(registry: Registry) -> None:
    first, operation = registry.sign_up(REQUEST)
    before = counts(registry)
    registry.tenants.transition(first, TenantState.ACTIVE, action="tenant.activate")
    again, same = registry.sign_up(REQUEST)
    assert (again.id, again.state, same.id) == (first.id, TenantState.ACTIVE, operation.id)
    assert counts(registry)[:4] == before[:4]


@pytest.mark.parametrize(
    "change",
    [
        {"slug": "beta"},
        {"name": "Other"},
        {"owner": NewUser(email="eve@example.org", password=PASSWORD)},
        {"owner": NewUser(email="ada@example.org", password="a guess that is wrong")},
        {"owner": None},
        {"plan": None},
        {"metadata": {"beds": 4}},
    ],
)
def test_a_key_that_was_used_for_another_request_gives_no_tenant(registry: Registry, change: dict[str, object]) -> None:
    registry.sign_up(REQUEST)
    before = counts(registry)
    with pytest.raises(TenantExists):
        registry.sign_up(replace(REQUEST, **change))  # type: ignore[arg-type]
    assert counts(registry) == before


def test_the_fingerprint_does_not_depend_on_the_password(registry: Registry) -> None:
    other = replace(REQUEST, owner=replace(ADA, password="something else"))
    assert other.fingerprint() == REQUEST.fingerprint()
    assert PASSWORD not in repr(REQUEST)


@pytest.mark.parametrize("key", ["key-1", None])
def test_the_same_request_from_many_threads_makes_one_tenant(registry: Registry, key: str | None) -> None:
    barrier = threading.Barrier(4)
    request = replace(REQUEST, idempotency_key=key)

    def run() -> tuple[Tenant, Operation] | Exception:
        barrier.wait(10)
        try:
            return registry.sign_up(request)
        except (TenantExists, UserExists) as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        outcomes = [done.result(60) for done in [pool.submit(run) for _ in range(4)]]
    made = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
    assert len({tenant.id for tenant, _ in made}) == 1
    assert len(made) == (4 if key else 1)  # the twin: without a key, all but one are strangers
    assert counts(registry)[:4] == [1, 1, 1, 1]


def test_a_name_that_was_unknown_is_found_at_once_after_sign_up(registry: Registry) -> None:
    with pytest.raises(TenantNotFound):
        registry.lookup("acme")
    tenant, _ = registry.sign_up(REQUEST)
    assert registry.lookup("acme").tenant == tenant
