"""The exception tree: each error has a code of its own, says what happened, and survives a trip to another process."""

from __future__ import annotations

import copy
import pickle
import re
import sqlite3
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError

from tenantdb import errors
from tenantdb.errors import TenantDBError, all_errors, describe
from tenantdb.model import BudgetStats, TenantUse

STATS = BudgetStats(
    server="default",
    total=91,
    processes=4,
    limit=22,
    per_tenant=10,
    in_use=17,
    idle=5,
    opening=0,
    closing=0,
    detached=0,
    waiting=33,
    opens=120,
    reuses=9000,
    waits=600,
    timeouts=1,
    refusals=0,
    closes={"evicted": 98},
    tenants=(TenantUse("acme", 10, 0, 33),),
)
DOCS = Path(__file__).parents[2] / "docs" / "reference" / "errors.md"
ARGUMENTS: dict[type[TenantDBError], tuple[Any, ...]] = {
    TenantDBError: ("something", "happened"),
    errors.ConfigError: ("cache_size is wrong",),
    errors.SecretKeyError: ("there is none",),
    errors.InsecureTransport: ("db1.example", "sslmode=disable"),
    errors.RegistryError: ("it cannot serve",),
    errors.RegistryUnavailable: ("nothing listens there",),
    errors.RegistryNotInitialized: (),
    errors.RegistryOutOfRange: ("0009", "0001", "0002"),
    errors.CredentialTampered: ("acme", "runtime_secret"),
    errors.KeyServiceUnavailable: ("it raised TimeoutError",),
    errors.TenantError: ("acme",),
    errors.InvalidSlug: ("Acme", "lower case only"),
    errors.TenantNotFound: ("acme", "acne"),
    errors.InvalidTenantKey: ("Acme", "lower case only"),
    errors.TenantExists: ("acme",),
    errors.InvalidDomain: ("Acme.example", "lower case only"),
    errors.DomainTaken: ("acme.example",),
    errors.TenantSuspended: ("acme",),
    errors.TenantNotReady: ("acme", "active", "its schema is at revision '0001'"),
    errors.SubscriptionExpired: ("acme", "trial", datetime(2030, 1, 31, tzinfo=timezone.utc)),
    errors.IllegalTransition: ("acme", "active", "purged"),
    errors.ProvisioningError: ("acme", "seed", "it raised"),
    errors.ExportError: ("acme", "the disk is full"),
    errors.ImportRefused: ("its hash is another",),
    errors.ToolNotFound: ("pg_dump", 18, "there is none"),
    errors.OperationFailed: ("acme", "purge", "database", "it raised"),
    errors.AdoptRefused: ("old", ("it has no schema public",), "given back"),
    errors.PurgeRefused: ("acme", "there is a legal hold on it"),
    errors.OperationInProgress: ("acme",),
    errors.RateLimited: ("10 an hour for each actor", 360),
    errors.NoServerAvailable: ("eu-1",),
    errors.HardeningFailed: (("PUBLIC may connect", "the role is a superuser"),),
    errors.MigrationError: ("there is no env.py",),
    errors.RolloutConflict: ("0b1c", ("acme", "beta")),
    errors.RolloutNotFound: ("0b1c",),
    errors.ServerUnavailable: ("default", "nothing listens there"),
    errors.ServerStartFailed: ("it ended", ("line 1", "line 2")),
    errors.BudgetExhausted: ("acme", 30.02, STATS, ("globex",), False),
    errors.EngineRetired: ("acme",),
    errors.WrongDatabase: ("acme", "another stamp"),
    errors.ContextError: ("a bug",),
    errors.NoTenantBound: (),
    errors.TenantAlreadyBound: ("acme", "beta"),
    errors.TenantContextClosed: ("acme",),
    errors.LeftBehind: ("acme", 2, 0, "  File shop.py"),
    errors.CrossTenantError: ("Patient", "0b1c", "7f3e"),
    errors.NotATenantsSession: ("Session",),
    errors.AuditNotReady: ("acme",),
    errors.SomeTenantsFailed: (98, {"acme": "ServerUnavailable", "beta": "ValueError: no"}),
    errors.AccessError: ("no",),
    errors.AuthenticationRequired: ("sign in",),
    errors.InvalidToken: ("it has expired",),
    errors.InvalidCredentials: ("wrong",),
    errors.NotAMember: ("no",),
    errors.TenantMismatch: ("the host names another tenant",),
    errors.TokenKeysUnavailable: ("it answered 500",),
    errors.TaskRefused: ("the header is forged",),
    errors.RoleRequired: ("user", ("owner", "admin")),
    errors.InvalidPath: ("dot segments",),
    errors.InvalidUser: ("the password is too short",),
    errors.UserExists: (),
    errors.UserNotFound: ("7",),
}
"""What each is made with. A new error without an entry fails the first test."""

every_error = pytest.mark.parametrize("kind", list(dict.fromkeys(all_errors())), ids=lambda kind: kind.__name__)


def test_every_error_of_the_module_is_in_the_tree_and_has_an_example() -> None:
    public = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert public == {kind for kind in all_errors() if kind.__module__ == errors.__name__} == set(ARGUMENTS)


@every_error
def test_an_error_comes_back_from_pickling_and_copying_the_same(kind: type[TenantDBError]) -> None:
    error = kind(*ARGUMENTS[kind])
    for back in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(back) is kind
        assert back.args == error.args == ARGUMENTS[kind]
        assert str(back) == str(error)
        assert vars(back) == vars(error)


@every_error
def test_an_error_says_its_facts_and_ends_with_the_place_in_the_docs(kind: type[TenantDBError]) -> None:
    error = kind(*ARGUMENTS[kind])
    text = str(error)
    assert text.endswith(f"(docs: errors#{kind.code})")
    assert error.explain() in text and error.explain()
    for fact in ARGUMENTS[kind]:
        for part in [fact] if isinstance(fact, (str, int)) and not isinstance(fact, bool) else fact if isinstance(fact, tuple) else []:
            assert str(part) in text


def test_no_two_errors_share_a_code_and_a_code_can_be_an_anchor() -> None:
    codes = [kind.code for kind in dict.fromkeys(all_errors())]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)


@every_error
def test_an_error_has_a_status_and_says_when_to_come_back_only_where_that_can_help(kind: type[TenantDBError]) -> None:
    assert 400 <= kind.http_status <= 599
    assert "code" in vars(kind), "a subclass that inherits its code cannot be told from its base"
    assert kind.__doc__
    if kind.retry_after is not None:
        assert kind.retryable and kind.http_status in (409, 503)
    assert not (kind.retryable and kind.http_status < 409)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (errors.AuthenticationRequired, 401),
        (errors.InvalidToken, 401),
        (errors.NotAMember, 403),
        (errors.TenantNotFound, 404),
        (errors.TenantSuspended, 403),
        (errors.TenantNotReady, 503),
        (errors.BudgetExhausted, 503),
        (errors.EngineRetired, 503),
        (errors.ServerUnavailable, 503),
        (errors.RegistryUnavailable, 503),
        (errors.WrongDatabase, 503),
        (errors.TenantExists, 409),
        (errors.NoTenantBound, 500),
        (errors.TenantAlreadyBound, 500),
        (errors.TenantContextClosed, 500),
    ],
)
def test_the_statuses_are_the_designs(kind: type[TenantDBError], status: int) -> None:
    assert kind.http_status == status


def test_an_exhausted_budget_shows_both_numbers_and_everything_that_tells_a_leak_from_a_crowd() -> None:
    error = errors.BudgetExhausted("acme", 30.02, STATS)

    text = str(error)

    assert "after 30.0 s" in text
    assert "17 of 22 in use (91 for server 'default' between 4 processes, at most 10 per tenant), 5 idle, 33 waiting" in text
    assert "Budget(connections=...)" in text
    assert error.held == () and "already holds" not in text


def test_an_exhausted_budget_names_what_the_one_who_asked_holds_already() -> None:
    error = errors.BudgetExhausted("acme", 0.5, STATS, ["globex", "initech"])

    assert error.held == ("globex", "initech")
    assert "already holds a connection of 'globex', 'initech': finish with it first" in str(error)


def test_a_full_queue_is_told_from_a_long_wait() -> None:
    error = errors.BudgetExhausted("acme", 0.0, STATS, queue_full=True)

    assert "the queue is full" in str(error) and "after 0.0 s" not in str(error)


def test_unknown_not_servable_and_out_of_reach_are_three_errors() -> None:
    three = (errors.TenantNotFound, errors.TenantSuspended, errors.RegistryUnavailable)
    assert not any(issubclass(one, other) for one in three for other in three if one is not other)


def test_the_docs_page_has_every_code_once_and_no_other() -> None:
    anchors = re.findall(r"^#+ .*?\{ *#([\w-]+) *\}", DOCS.read_text(), flags=re.MULTILINE)
    codes = {kind.code for kind in all_errors()}
    assert [code for code in codes if anchors.count(code) != 1] == []


def test_describe_keeps_our_words_and_of_a_drivers_the_names_alone_because_the_rest_may_quote_a_row() -> None:
    assert describe(errors.TenantSuspended("acme")) == errors.TenantSuspended("acme").explain()
    assert describe(ValueError("three beds")) == "ValueError: three beds"
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE patients (name TEXT UNIQUE)")
    connection.execute("INSERT INTO patients VALUES ('canary')")
    with pytest.raises(sqlite3.IntegrityError) as caught:
        connection.execute("INSERT INTO patients VALUES ('canary')")
    with pytest.raises(sqlite3.OperationalError) as malformed:
        connection.execute("SELECT json_extract('{}', 'canary')")
    connection.close()
    wrapped = IntegrityError("INSERT INTO patients VALUES ('canary')", None, caught.value)
    assert describe(wrapped).startswith("IntegrityError")
    assert describe(wrapped).endswith(": UNIQUE constraint failed: patients.name")
    assert "canary" in str(malformed.value) and "canary" not in describe(malformed.value)
