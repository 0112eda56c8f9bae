"""People and their roles on the command line: no password on it, and nothing is ended without a yes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tenantdb import TenantDB, errors
from tenantdb.cli import ask
from tests.unit.test_cli import document, run

URL = "sqlite:///data/central.sqlite3"
PASSWORD = "correct horse battery"
EMAIL = "ada@clinic.example"


@pytest.fixture(autouse=True)
def db(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cheap_hashing: None) -> Iterator[TenantDB]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENANTDB_URL", URL)
    with TenantDB(URL) as db:
        db.init()
        yield db


@pytest.fixture
def ada(db: TenantDB) -> Any:
    return db.users.create(EMAIL, PASSWORD, first_name="Ada", last_name="Lovelace")


@pytest.fixture
def acme(db: TenantDB) -> Any:
    return db.provision("acme")


def refused(*words: str, exit_code: int, stdin: str | None = None) -> Result:
    return run(*words, exit_code=exit_code, stdin=stdin)


def test_a_user_from_the_first_password_to_the_end(db: TenantDB) -> None:
    made = run("users", "create", EMAIL, "--first-name", "Ada", "--password-stdin", stdin=f"{PASSWORD}\nanother line\n")
    assert made.stdout == f"{EMAIL} is a user now\n"
    assert db.users.authenticate(EMAIL, PASSWORD).first_name == "Ada"

    token = db.refresh_tokens.create(db.users.get(EMAIL))
    run("users", "set-password", EMAIL, "--password-stdin", stdin="another long password\n")
    assert db.users.authenticate(EMAIL, "another long password").email == EMAIL
    with pytest.raises(errors.InvalidCredentials):
        db.users.authenticate(EMAIL, PASSWORD)
    with pytest.raises(errors.InvalidToken):
        db.refresh_tokens.rotate(token)

    assert document("users", "show", EMAIL)["email_verified_at"] is None
    run("users", "verify", EMAIL)
    assert document("users", "show", EMAIL)["email_verified_at"] is not None

    run("users", "delete", EMAIL, "--yes")
    with pytest.raises(errors.UserNotFound):
        db.users.get(EMAIL)


def test_users_are_listed_by_e_mail_in_pages(db: TenantDB, ada: Any) -> None:
    for name in ("zoe", "Bob"):
        db.users.create(f"{name}@clinic.example", PASSWORD)
    gone = db.users.create("gone@clinic.example", PASSWORD)
    db.users.delete(gone)

    assert [line.split("\t")[:3] for line in run("users", "list").stdout.splitlines()] == [
        [EMAIL, "Ada Lovelace", "unverified"],
        ["Bob@clinic.example", "-", "unverified"],
        ["zoe@clinic.example", "-", "unverified"],
    ]
    assert [user["email"] for user in document("users", "list", "--limit", "2")] == [EMAIL, "Bob@clinic.example"]
    assert [user["email"] for user in document("users", "list", "--after", "BOB@clinic.example")] == ["zoe@clinic.example"]


def test_without_anybody_it_says_so() -> None:
    assert run("users", "list").stderr == "No users.\n"
    assert run("memberships", "list").stderr == "No memberships.\n"


def test_a_password_may_come_from_the_environment_and_stands_nowhere(monkeypatch: pytest.MonkeyPatch, db: TenantDB) -> None:
    monkeypatch.setenv("TENANTDB_USER_PASSWORD", PASSWORD)

    made = run("users", "create", EMAIL, "--platform-admin", "--json")

    assert db.users.authenticate(EMAIL, PASSWORD).platform_admin
    for printed in (made.output, run("users", "show", EMAIL).output, run("users", "list", "--json").output):
        assert PASSWORD not in printed and "argon2" not in printed and "hash" not in printed


@pytest.mark.parametrize("words", [["users", "create", EMAIL], ["users", "set-password", EMAIL]])
def test_without_a_terminal_nobody_is_asked_for_a_password(words: list[str], db: TenantDB, request: pytest.FixtureRequest) -> None:
    if words[1] == "set-password":
        request.getfixturevalue("ada")
    result = refused(*words, exit_code=2, stdin=f"{PASSWORD}\n{PASSWORD}\n")

    assert "TENANTDB_USER_PASSWORD" in result.stderr and "--password-stdin" in result.stderr


@pytest.mark.parametrize("words", [["users", "create", EMAIL, PASSWORD], ["users", "create", EMAIL, "--password", PASSWORD]])
def test_a_password_on_the_command_line_is_refused(words: list[str], db: TenantDB) -> None:
    refused(*words, exit_code=2)
    assert db.users.list() == []


def test_a_bad_password_and_a_taken_e_mail_are_one_line(db: TenantDB, ada: Any) -> None:
    assert "password" in refused("users", "create", "bob@clinic.example", "--password-stdin", exit_code=1, stdin="short\n").stderr
    assert "exists" in refused("users", "create", EMAIL.upper(), "--password-stdin", exit_code=1, stdin=f"{PASSWORD}\n").stderr


@pytest.mark.parametrize("verb", ["show", "verify", "delete", "set-password"])
def test_an_unknown_user_is_one_line(verb: str) -> None:
    assert "no user 'bob@clinic.example'" in refused("users", verb, "bob@clinic.example", exit_code=1).stderr


# -- memberships -----------------------------------------------------------------------------------------------------------------------


def test_a_membership_from_its_beginning_to_its_end(db: TenantDB, ada: Any, acme: Any) -> None:
    assert run("memberships", "add", EMAIL, "acme").stdout == f"{EMAIL} is user in acme\n"
    assert run("memberships", "change", str(ada.id), "acme", "--role", "admin").stdout == f"{EMAIL} is admin in acme\n"

    (listed,) = document("memberships", "list", "--tenant", "acme")
    assert (listed["user"], listed["tenant"], listed["role"], listed["user_id"]) == (EMAIL, "acme", "admin", str(ada.id))
    assert document("memberships", "list", "--user", EMAIL) == [listed] == document("users", "show", EMAIL)["memberships"]
    assert run("memberships", "list").stdout == f"{EMAIL}\tacme\tadmin\n"
    assert "acme (admin)" in run("users", "show", EMAIL).stdout

    assert run("memberships", "remove", EMAIL, "acme", "--yes").stdout == f"{EMAIL} is no member of acme any more\n"
    assert db.memberships.list() == []


def test_changing_a_role_makes_nobody_a_member(db: TenantDB, ada: Any, acme: Any) -> None:
    assert "not a member" in refused("memberships", "change", EMAIL, "acme", "--role", "owner", exit_code=1).stderr
    assert db.memberships.list() == []


@pytest.mark.parametrize("words", [["add", EMAIL, "acne"], ["change", EMAIL, "acne", "--role", "user"], ["list", "--tenant", "acne"]])
def test_an_unknown_tenant_gets_did_you_mean(words: list[str], ada: Any, acme: Any) -> None:
    assert "did you mean 'acme'" in refused("memberships", *words, exit_code=1).stderr


def test_a_role_that_does_not_exist_is_a_usage_error(ada: Any, acme: Any) -> None:
    refused("memberships", "add", EMAIL, "acme", "--role", "king", exit_code=2)


def test_a_tenant_that_is_gone_is_shown_by_its_id(db: TenantDB, ada: Any, acme: Any) -> None:
    db.memberships.add(ada, acme)
    with db._registry.admin_write() as connection:
        connection.exec_driver_sql("UPDATE tenantdb_tenants SET state = 'purged', slug = NULL")

    assert run("memberships", "list").stdout == f"{EMAIL}\t{acme.id}\tuser\n"


# -- a yes -----------------------------------------------------------------------------------------------------------------------------

ENDING = [["users", "delete", EMAIL], ["memberships", "remove", EMAIL, "acme"]]


@pytest.fixture
def member(db: TenantDB, ada: Any, acme: Any) -> None:
    db.memberships.add(ada, acme)


class Terminal:
    """Standard input for the questions of `tenantdb.cli.ask`, which looks only whether it is a terminal; click reads the answer."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("words", ENDING)
def test_without_a_terminal_nothing_is_ended_whatever_comes_in(words: list[str], db: TenantDB, member: None) -> None:
    result = refused(*words, exit_code=2, stdin="y\n")

    assert "--yes" in result.stderr
    assert len(db.memberships.list(user=EMAIL)) == 1


@pytest.mark.parametrize("words", ENDING)
@pytest.mark.parametrize(("answer", "ended"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_on_a_terminal_only_a_yes_ends_anything(
    words: list[str], answer: str, ended: bool, db: TenantDB, member: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ask, "sys", type("sys", (), {"stdin": Terminal()}))

    result = run(*words, stdin=answer, exit_code=0 if ended else 1)

    assert EMAIL in result.stderr
    assert (db.memberships.list() == []) is ended


@pytest.mark.parametrize("words", ENDING)
def test_what_was_ended_is_told_as_json(words: list[str], member: None) -> None:
    ended = document(*words, "--yes")
    assert EMAIL in (ended.get("email"), ended.get("user"))


# -- tenantdb update -------------------------------------------------------------------------------------------------------------------


def test_update_changes_what_is_given_and_clears_what_is_named(db: TenantDB, acme: Any) -> None:
    db.update("acme", email="old@clinic.example", phone="1")
    words = ["--name", "Acme Clinic", "--plan", "pro", "--subscription", "active", "--subscription-expires-at", "2030-01-31T00:00:00Z"]

    shown = document("update", "acme", *words, "--clear", "email")

    assert [shown[name] for name in ("name", "plan", "subscription", "subscription_expires_at", "email", "phone")] == [
        "Acme Clinic",
        "pro",
        "active",
        "2030-01-31T00:00:00+00:00",
        None,
        "1",
    ]
    assert "Acme Clinic" in run("update", "acme", "--clear", "subscription-expires-at").stdout
    assert db.tenants.get("acme").subscription_expires_at is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "what to change"),
        (["--plan", "pro", "--clear", "plan"], "plan cannot be both"),
        (["--subscription-expires-at", "2030-01-31"], "time zone"),
        (["--subscription-expires-at", "soon"], "time zone"),
        (["--name", "a\nb"], "control characters"),
        (["--clear", "name"], "name"),
    ],
)
def test_an_update_that_cannot_be_meant_changes_nothing(words: list[str], says: str, db: TenantDB, acme: Any) -> None:
    assert says in refused("update", "acme", *words, exit_code=2).stderr
    assert db.tenants.get("acme") == acme


def test_an_update_of_an_unknown_slug_gets_did_you_mean(acme: Any) -> None:
    assert "did you mean 'acme'" in refused("update", "acne", "--plan", "pro", exit_code=1).stderr


# -- domains and tokens ----------------------------------------------------------------------------------------------------------------


def test_a_domain_is_added_listed_and_taken_away(db: TenantDB, acme: Any) -> None:
    assert run("domains", "list").stderr == "No domains.\n"
    assert run("domains", "add", "clinic.example", "acme").stdout == "clinic.example leads to acme\n"
    assert document("domains", "add", "acme.example", "acme") == {"domain": "acme.example", "tenant": "acme"}
    assert run("domains", "list").stdout == "acme.example\tacme\nclinic.example\tacme\n"
    assert [each["domain"] for each in document("domains", "list", "--tenant", "acme")] == ["acme.example", "clinic.example"]
    assert db.domains.tenant_of("clinic.example") == acme.id

    refused("domains", "remove", "clinic.example", exit_code=2)  # nobody there to say yes
    assert run("domains", "remove", "clinic.example", "--yes").stdout == "clinic.example leads no more to acme\n"
    assert document("domains", "remove", "acme.example", "--yes") == {"domain": "acme.example", "tenant": "acme"}
    assert db.domains.list() == []


def test_what_is_no_domain_or_anothers_is_refused_in_one_line(db: TenantDB, acme: Any) -> None:
    db.provision("beta")
    db.domains.add("beta.example", "beta")
    assert "lower-case ASCII" in refused("domains", "add", "Clinic.example", "acme", exit_code=1).stderr
    assert "belongs to another tenant" in refused("domains", "add", "beta.example", "acme", exit_code=1).stderr
    assert "no tenant" in refused("domains", "remove", "clinic.example", "--yes", exit_code=1).stderr


def test_tokens_of_a_user_or_a_tenant_are_revoked(db: TenantDB, ada: Any, acme: Any) -> None:
    db.memberships.add(ada, acme)
    token = db.refresh_tokens.create(ada, acme)
    assert run("revoke", "--tenant", "acme").stdout == "tokens of acme from before now are refused\n"
    assert db.tenants.get("acme").tokens_valid_from is not None
    with pytest.raises(errors.InvalidToken):
        db.refresh_tokens.rotate(token)
    assert document("revoke", "--user", EMAIL) == {"user": str(ada.id)}
    assert db._registry.standings.get(ada.id, None).tokens_valid_from is not None


@pytest.mark.parametrize("words", [[], ["--user", EMAIL, "--tenant", "acme"]])
def test_what_is_revoked_is_said_in_one_way(words: list[str]) -> None:
    refused("revoke", *words, exit_code=2)
