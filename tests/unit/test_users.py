"""Users sign in with the right password only, their mailed tokens work once, and a deleted user is gone in every way."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select, update

from tenantdb.errors import InvalidCredentials, InvalidToken, InvalidUser, NotAMember, TenantNotFound, UserExists, UserNotFound
from tenantdb.model import MemberRole, Tenant, User
from tenantdb.registry import RefreshGrant, Registry, SignUp, fields, passwords, tables
from tests.unit.registry_fixtures import PASSWORD

PAST = datetime(2020, 1, 1, tzinfo=timezone.utc)


@pytest.fixture
def ada(registry: Registry) -> User:
    return registry.users.create("Ada@Example.org", PASSWORD, first_name="Ada", last_name="Lovelace")


def expire(registry: Registry, column: str) -> None:
    with registry.write() as connection:
        connection.execute(update(tables.users).values(**{column: PAST}))


def stored(registry: Registry, column: str) -> object:
    with registry.read() as connection:
        return connection.scalar(select(tables.users.c[column]))


def test_a_user_is_found_by_id_record_and_e_mail_in_any_case(registry: Registry, ada: User) -> None:
    for key in (ada, ada.id, str(ada.id), "ada@example.org", "ADA@EXAMPLE.ORG"):
        assert registry.users.get(key) == ada
    assert ada.email == "Ada@Example.org"
    for nobody in (uuid4(), "eve@example.org", "no e-mail", "@", ""):
        with pytest.raises(UserNotFound):
            registry.users.get(nobody)


@pytest.mark.parametrize("email", ["Ada@Example.org", "ada@example.org", "ADA@EXAMPLE.ORG"])
def test_one_e_mail_is_one_user_whatever_the_case(registry: Registry, ada: User, email: str) -> None:
    with pytest.raises(UserExists):
        registry.users.create(email, PASSWORD)
    assert registry.users.create("ada@example.com", PASSWORD).id != ada.id


@pytest.mark.parametrize(
    "email",
    [
        "",
        "ada",
        "@example.org",
        "ada@",
        "a@b@c",
        "a b@c.org",
        "a@c.org\n",
        "a\0@c.org",
        "x" * 250 + "@c.org",
        "\ud800@c.org",
        "ﬁ@c.org",
        "mi\u212ae@c.org",
    ],
)
def test_what_is_no_e_mail_is_refused(registry: Registry, email: str) -> None:
    with pytest.raises(InvalidUser):
        registry.users.create(email, PASSWORD)
    with pytest.raises(InvalidCredentials):
        registry.users.authenticate(email, PASSWORD)
    assert registry.users.password_reset_token(email) is None


def test_addresses_that_only_look_alike_stay_apart() -> None:
    assert fields.email_key("straße@c.org") != fields.email_key("strasse@c.org")
    assert fields.email_key("Émile@c.org") == fields.email_key("émile@c.org")


@pytest.mark.parametrize("password", ["", "1234567", "x" * 1025, "\ud800" * 10])
def test_a_password_that_is_too_short_too_long_or_no_text_is_refused(registry: Registry, password: str) -> None:
    with pytest.raises(InvalidUser):
        registry.users.create("ada@example.org", password)
    with pytest.raises(InvalidCredentials):
        registry.users.authenticate("ada@example.org", password)


@pytest.mark.parametrize("password", ["12345678", "x" * 1024, "пароль, dlouhé heslo"])
def test_passwords_at_the_limits_work(registry: Registry, password: str) -> None:
    user = registry.users.create("ada@example.org", password)
    assert registry.users.authenticate("ADA@example.org", password) == user


def test_a_wrong_password_and_an_unknown_e_mail_look_the_same(registry: Registry, ada: User) -> None:
    with pytest.raises(InvalidCredentials) as wrong:
        registry.users.authenticate(ada.email, "not the password")
    with pytest.raises(InvalidCredentials) as unknown:
        registry.users.authenticate("eve@example.org", PASSWORD)
    assert str(wrong.value) == str(unknown.value)
    assert registry.users.authenticate(ada.email, PASSWORD) == ada


@pytest.mark.parametrize("email", ["ada@example.org", "eve@example.org", "no e-mail"])
def test_an_unknown_e_mail_costs_as_much_work_as_a_known_one(
    registry: Registry, ada: User, email: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = passwords._hasher()
    checked: list[str] = []

    class Counting:
        def verify(self, stored: str, password: str) -> bool:
            checked.append(stored)
            return real.verify(stored, password)

    monkeypatch.setattr(passwords, "_hasher", Counting)
    with pytest.raises(InvalidCredentials):
        registry.users.authenticate(email, "not the password")
    assert len(checked) == 1
    assert checked[0].split("$")[:4] == passwords._dummy().split("$")[:4]  # the same parameters


def test_the_dummy_opens_no_door(registry: Registry) -> None:
    with pytest.raises(InvalidCredentials):
        registry.users.authenticate("eve@example.org", "nobody's password")


def test_the_real_hasher_is_argon2id_with_a_dummy_of_the_same_parameters() -> None:
    passwords._hasher.cache_clear()
    passwords._dummy.cache_clear()
    hashed = passwords.hash_password(PASSWORD)
    assert hashed.startswith("$argon2id$")
    assert hashed.split("$")[:4] == passwords._dummy().split("$")[:4]
    assert passwords.verify_password(hashed, PASSWORD)
    assert not passwords.verify_password(hashed, PASSWORD + "x")
    assert not passwords.verify_password("not a hash", PASSWORD)


def test_an_old_hash_is_made_anew_at_the_next_sign_in(registry: Registry, ada: User, monkeypatch: pytest.MonkeyPatch) -> None:
    from argon2 import PasswordHasher

    before = stored(registry, "password_hash")
    registry.users.authenticate(ada.email, PASSWORD)
    assert stored(registry, "password_hash") == before  # the twin: today's parameters stay
    stronger = PasswordHasher(time_cost=2, memory_cost=8, parallelism=1)
    monkeypatch.setattr(passwords, "_hasher", lambda: stronger)
    registry.users.authenticate(ada.email, PASSWORD)
    assert stored(registry, "password_hash") != before
    assert "t=2" in str(stored(registry, "password_hash"))
    registry.users.authenticate(ada.email, PASSWORD)


def test_a_deleted_user_is_gone_and_the_e_mail_free(registry: Registry, ada: User, acme: Tenant) -> None:
    registry.memberships.add(ada, acme)
    token = registry.refresh_tokens.create(ada, acme)
    mailed, reset = registry.users.verification_token(ada), registry.users.password_reset_token(ada.email)
    assert reset is not None

    registry.users.delete(ada)

    with pytest.raises(UserNotFound):
        registry.users.get(ada)
    with pytest.raises(UserNotFound):
        registry.users.delete(ada)
    with pytest.raises(InvalidCredentials):
        registry.users.authenticate(ada.email, PASSWORD)
    with pytest.raises(InvalidToken):
        registry.refresh_tokens.rotate(token)
    with pytest.raises(InvalidToken):
        registry.users.verify_email(mailed)
    with pytest.raises(InvalidToken):
        registry.users.reset_password(reset, PASSWORD)
    with pytest.raises(NotAMember):
        registry.memberships.get(ada, acme)
    assert registry.memberships.list(tenant=acme) == []
    assert registry.users.password_reset_token(ada.email) is None
    assert registry.users.create("ada@example.org", PASSWORD).id != ada.id


def test_an_e_mail_is_verified_by_the_newest_token_once(registry: Registry, ada: User) -> None:
    old = registry.users.verification_token(ada)
    token = registry.users.verification_token(ada.id)
    with pytest.raises(InvalidToken):
        registry.users.verify_email(old)
    verified = registry.users.verify_email(token)
    assert verified.id == ada.id
    assert verified.email_verified_at is not None
    assert ada.email_verified_at is None
    for used in (token, "", "\ud800", "x" * 1000):
        with pytest.raises(InvalidToken):
            registry.users.verify_email(used)


@pytest.mark.parametrize("expired", [True, False])
def test_mailed_tokens_expire(registry: Registry, ada: User, expired: bool) -> None:
    mailed, reset = registry.users.verification_token(ada), registry.users.password_reset_token(ada.email)
    assert reset is not None
    if not expired:
        assert registry.users.verify_email(mailed).id == registry.users.reset_password(reset, "another password").id
        return
    expire(registry, "verification_expires_at")
    expire(registry, "reset_expires_at")
    with pytest.raises(InvalidToken):
        registry.users.verify_email(mailed)
    with pytest.raises(InvalidToken):
        registry.users.reset_password(reset, "another password")


def test_a_reset_changes_the_password_once_and_ends_every_session(registry: Registry, ada: User) -> None:
    refresh = registry.refresh_tokens.create(ada)
    other = registry.users.create("eve@example.org", PASSWORD)
    others = registry.refresh_tokens.create(other)
    token = registry.users.password_reset_token("ADA@example.org")
    assert token is not None
    with pytest.raises(InvalidUser):
        registry.users.reset_password(token, "short")

    assert registry.users.reset_password(token, "another password").id == ada.id

    with pytest.raises(InvalidToken):
        registry.users.reset_password(token, "a third password")
    with pytest.raises(InvalidCredentials):
        registry.users.authenticate(ada.email, PASSWORD)
    assert registry.users.authenticate(ada.email, "another password").id == ada.id
    with pytest.raises(InvalidToken):
        registry.refresh_tokens.rotate(refresh)
    assert registry.refresh_tokens.rotate(others)[1] == RefreshGrant(other.id)


def test_a_token_for_one_thing_is_none_for_the_other(registry: Registry, ada: User) -> None:
    mailed, reset = registry.users.verification_token(ada), registry.users.password_reset_token(ada.email)
    assert reset is not None
    with pytest.raises(InvalidToken):
        registry.users.verify_email(reset)
    with pytest.raises(InvalidToken):
        registry.users.reset_password(mailed, "another password")


def test_nothing_that_opens_a_door_is_stored_or_audited_in_the_clear(registry: Registry, ada: User) -> None:
    secrets = [PASSWORD, registry.users.verification_token(ada), registry.refresh_tokens.create(ada)]
    secrets.append(registry.users.password_reset_token(ada.email) or "")
    rows: list[object] = []
    with registry.read() as connection:
        for table in (tables.users, tables.refresh_tokens, tables.audit):
            rows += connection.execute(select(table)).all()
    written = repr(rows)
    assert all(secret and secret not in written for secret in secrets)
    log = repr(registry.audit.list())
    assert not re.search("lovelace|example", log, re.IGNORECASE)


def test_only_who_is_made_one_is_a_platform_administrator(registry: Registry, ada: User) -> None:
    assert not ada.platform_admin
    assert registry.users.create("root@example.org", PASSWORD, platform_admin=True).platform_admin


# -- memberships --


def test_a_user_has_a_role_in_each_of_several_tenants(registry: Registry, ada: User, acme: Tenant) -> None:
    beta, _ = registry.sign_up(SignUp(slug="beta"))
    registry.memberships.add(ada, "acme", role="admin")
    registry.memberships.add("ada@example.org", beta.id)
    assert {(each.tenant_id, each.role) for each in registry.memberships.list(user=ada)} == {
        (acme.id, MemberRole.ADMIN),
        (beta.id, MemberRole.USER),
    }
    assert [each.user_id for each in registry.memberships.list(tenant="beta")] == [ada.id]
    assert len(registry.memberships.list()) == 2
    assert registry.memberships.get(str(ada.id), "acme").role is MemberRole.ADMIN


def test_adding_again_changes_the_role_and_its_version(registry: Registry, ada: User, acme: Tenant) -> None:
    first = registry.memberships.add(ada, acme, role="readonly")
    assert registry.memberships.add(ada, acme, role=MemberRole.READONLY) == first
    changed = registry.memberships.add(ada, acme, role="owner")
    assert (changed.role, changed.version) == (MemberRole.OWNER, 2)
    actions = [entry.action for entry in registry.audit.list(acme)]
    assert actions[:2] == ["membership.change", "membership.add"]


def test_unknown_users_tenants_and_roles_are_told_apart_when_adding(registry: Registry, ada: User, acme: Tenant) -> None:
    with pytest.raises(UserNotFound):
        registry.memberships.add(uuid4(), acme)
    with pytest.raises(TenantNotFound):
        registry.memberships.add(ada, "nobody")
    with pytest.raises(ValueError, match="god"):
        registry.memberships.add(ada, acme, role="god")


@pytest.mark.parametrize("user", ["ada", "eve@example.org", UUID(int=1)])
def test_whoever_is_no_member_is_told_nothing_more(registry: Registry, ada: User, acme: Tenant, user: str | UUID) -> None:
    with pytest.raises(NotAMember):
        registry.memberships.get(user, acme)
    with pytest.raises(NotAMember):
        registry.memberships.get(ada, acme)
    with pytest.raises(NotAMember):
        registry.memberships.get(ada, "nobody")


def test_a_removed_member_is_none_and_cannot_refresh(registry: Registry, ada: User, acme: Tenant) -> None:
    registry.memberships.add(ada, acme)
    inside, outside = registry.refresh_tokens.create(ada, acme), registry.refresh_tokens.create(ada)
    registry.memberships.remove(ada, acme)
    with pytest.raises(NotAMember):
        registry.memberships.get(ada, acme)
    with pytest.raises(NotAMember):
        registry.memberships.remove(ada, acme)
    with pytest.raises(InvalidToken):
        registry.refresh_tokens.rotate(inside)
    assert registry.refresh_tokens.rotate(outside)[1] == RefreshGrant(ada.id)


# -- refresh tokens --


def test_a_refresh_token_works_once_and_gives_the_next(registry: Registry, ada: User, acme: Tenant) -> None:
    token = registry.refresh_tokens.create(ada, "acme")
    following, grant = registry.refresh_tokens.rotate(token)
    assert grant == RefreshGrant(ada.id, acme.id)
    assert following != token
    with pytest.raises(InvalidToken):
        registry.refresh_tokens.rotate(token)
    assert registry.refresh_tokens.rotate(following)[1] == grant


def test_signing_out_ends_a_refresh_token_and_may_happen_twice(registry: Registry, ada: User) -> None:
    token, other = registry.refresh_tokens.create(ada), registry.refresh_tokens.create(ada)
    registry.refresh_tokens.revoke(token)
    registry.refresh_tokens.revoke(token)
    with pytest.raises(InvalidToken):
        registry.refresh_tokens.rotate(token)
    registry.refresh_tokens.rotate(other)
    assert [entry.action for entry in registry.audit.list()].count("refresh_token.revoke") == 1


def test_an_expired_refresh_token_is_refused_and_swept_away(registry: Registry, ada: User) -> None:
    token = registry.refresh_tokens.create(ada)
    with registry.write() as connection:
        connection.execute(update(tables.refresh_tokens).values(expires_at=PAST))
    with pytest.raises(InvalidToken):
        registry.refresh_tokens.rotate(token)
    registry.refresh_tokens.create(ada)
    with registry.read() as connection:
        assert len(connection.execute(select(tables.refresh_tokens)).all()) == 1


def test_a_refresh_token_lives_for_days_not_for_ever(registry: Registry, ada: User) -> None:
    registry.refresh_tokens.create(ada)
    with registry.read() as connection:
        row = connection.execute(select(tables.refresh_tokens)).one()
    assert timedelta(days=29) < row.expires_at - row.created_at <= timedelta(days=30)


def test_nobody_gets_a_refresh_token_for_nobody(registry: Registry, ada: User) -> None:
    with pytest.raises(UserNotFound):
        registry.refresh_tokens.create(uuid4())
    with pytest.raises(TenantNotFound):
        registry.refresh_tokens.create(ada, "nobody")
