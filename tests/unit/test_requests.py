from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import pytest

from tenantdb import errors
from tenantdb.errors import ConfigError, InvalidPath, InvalidToken, TenantDBError
from tenantdb.model import BudgetStats
from tenantdb.requests import ExemptRoutes, Facts, bearer_token, check_path, host_name, problem_for

STATS = BudgetStats(
    server="default",
    **dict.fromkeys(["total", "processes", "limit", "per_tenant", "in_use", "idle", "opening", "closing", "detached", "waiting"], 1),
    **dict.fromkeys(["opens", "reuses", "waits", "timeouts", "refusals"], 1),
)

# -- paths (P1 to P6) ------------------------------------------------------------------------------------------------------------------

CANARY = "canary-3f9a"


@pytest.mark.parametrize(
    ("path", "raw"),
    [
        ("/auth/../patients", "/auth/../patients"),
        ("/auth/../patients", "/auth/%2e%2e/patients"),
        ("/auth/../patients", "/auth/%2E./patients"),
        ("/auth/../patients", "/auth/..%2fpatients"),
        ("/auth/login/../../patients", "/auth/login%2f..%2f..%2fpatients"),
        ("/auth/..", "/auth/.."),
        ("/auth/.", "/auth/."),
        ("/auth/./login", "/auth/./login"),
        ("/auth/..;x=1/patients", "/auth/..;x=1/patients"),
        ("//auth/login", "//auth/login"),
        ("/auth//login", "/auth//login"),
        ("/auth/login", "/auth%2flogin"),
        ("/auth/login\0", "/auth/login%00"),
        ("/auth/login\n", "/auth/login%0A"),
        ("/auth/login\x7f", "/auth/login%7f"),
        ("/auth\\..\\patients", "/auth\\..\\patients"),
        ("/auth\\login", "/auth%5Clogin"),
        ("/auth/%2e%2e/patients", "/auth/%252e%252e/patients"),
        ("/auth/..%2fpatients", "/auth/..%252fpatients"),
        ("http://evil/auth/login", "http://evil/auth/login"),
        ("/auth/login", "http://evil/auth/login"),
        ("/auth/login", "auth/login"),
        ("*", "*"),
        ("", ""),
        ("auth/login", "auth/login"),
    ],
)
def test_a_path_with_two_readings_is_refused(path: str, raw: str) -> None:
    with pytest.raises(InvalidPath):
        check_path(path, raw)


@pytest.mark.parametrize("path", ["/auth/../patients", "//auth", "/a\\b", "/a\0", "", "/a/%2e%2e/b"])
def test_a_path_with_two_readings_is_refused_where_the_server_tells_only_the_decoded_one(path: str) -> None:
    with pytest.raises(InvalidPath):
        check_path(path, None)


@pytest.mark.parametrize(
    ("path", "raw"),
    [
        ("/", "/"),
        ("/auth/login/", "/auth/login/"),
        ("/a b/ü", "/a%20b/%C3%BC"),
        ("/files/.hidden/..name/name..", "/files/.hidden/..name/name.."),
        ("/files/...", "/files/..."),
        ("/patients;version=2", "/patients;version=2"),
        ("/100%", "/100%25"),
        ("/auth/login", "/%61uth/login"),
        ("/~user/@me:x", "/~user/@me:x"),
    ],
)
def test_a_path_with_one_reading_passes(path: str, raw: str) -> None:
    check_path(path, raw)
    check_path(path, None)


@pytest.mark.parametrize(
    ("method", "path", "exempt"),
    [
        ("GET", "/healthz", True),
        ("POST", "/healthz", True),
        ("GET", "/healthz/", False),
        ("GET", "/healthz/x", False),
        ("GET", "/healthzz", False),
        ("GET", "/HEALTHZ", False),
        ("POST", "/auth/login", True),
        ("POST", "/auth/login/x", True),
        ("POST", "/auth/login/", True),
        ("POST", "/auth", False),
        ("POST", "/auth/", False),
        ("GET", "/authors", False),
        ("GET", "/auth-admin", False),
        ("GET", "/authx", False),
        ("POST", "/AUTH/login", False),
        ("GET", "/x/auth/login", False),
        ("POST", "/auth/login;x=1", False),
        ("POST", "/auth;x=1/login", False),
        ("POST", "/auth/100%", False),
        ("GET", "/docs", True),
        ("POST", "/docs", False),
        ("HEAD", "/docs", True),
        ("GET", "/public/a", True),
        ("POST", "/public/a", False),
        ("GET", "", False),
        ("GET", "/", False),
    ],
)
def test_a_route_is_exempt_exactly_as_listed(method: str, path: str, exempt: bool) -> None:
    routes = ExemptRoutes(["/healthz", "/auth/*", "GET /docs", "GET /public/*"])

    assert routes.matches(method, path) is exempt


def test_a_whole_method_may_be_exempt_so_that_preflights_pass() -> None:
    routes = ExemptRoutes(["OPTIONS /*"])

    assert routes.matches("OPTIONS", "/patients/1") and not routes.matches("GET", "/patients/1")


def test_the_root_and_a_slash_at_the_end_are_listed_as_they_are() -> None:
    routes = ExemptRoutes(["/", "/login/"])

    assert routes.matches("GET", "/") and routes.matches("GET", "/login/")
    assert not routes.matches("GET", "/login") and not routes.matches("GET", "/x")


def test_nothing_is_exempt_by_default() -> None:
    assert not any(ExemptRoutes([]).matches("GET", path) for path in ("/", "/docs", "/healthz", ""))


@pytest.mark.parametrize(
    "pattern",
    [
        *("", "*", "auth", "auth/*", "/auth*", "/a/*/b", "/auth/**", "//auth", "/auth/../x", "/./x", "http://x/auth"),
        *("get /docs", "GET  /docs", "GET", "/a b", "/a;b", "/%61uth", "/a\\b", "/auth\n"),
    ],
)
def test_an_entry_that_could_be_read_otherwise_is_a_configuration_error(pattern: str) -> None:
    with pytest.raises(ConfigError, match="exempt route"):
        ExemptRoutes([pattern])


def test_one_string_in_place_of_a_list_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="list"):
        ExemptRoutes("/auth/*")


# -- facts -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "host"),
    [
        ("Acme.Example.COM:8443", "acme.example.com"),
        ("acme.example.com.", "acme.example.com"),
        ("acme.example.com.:80", "acme.example.com"),
        ("[::1]:8000", "[::1]"),
        ("[::1]", "[::1]"),
        ("localhost", "localhost"),
        ("", ""),
    ],
)
def test_a_host_is_its_lower_case_name_alone(header: str, host: str) -> None:
    assert host_name(header) == host


def test_cookies_are_read_by_name_and_the_first_of_two_counts() -> None:
    facts = Facts("https", "h", "/", "GET", {"cookie": "a=1; b = x=y ;a=2; broken; c="})

    assert facts.cookies == {"a": "1", "b": "x=y", "c": ""}
    assert Facts("https", "h", "/", "GET", {}).cookies == {}


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("Bearer a.b.c", "a.b.c"),
        ("bearer  a.b.c ", "a.b.c"),
        ("BEARER x", "x"),
        ("Basic YTpi", None),
        ("a.b.c", None),
        ("", None),
    ],
)
def test_a_bearer_token_is_what_follows_the_scheme(header: str, token: str | None) -> None:
    assert bearer_token(Facts("https", "h", "/", "GET", {"authorization": header})) == token
    assert bearer_token(Facts("https", "h", "/", "GET", {})) is None


@pytest.mark.parametrize("header", ["Bearer", "Bearer ", "Bearer a b", "Bearer a.b.c, Bearer d.e.f", "Bearer a,b"])
def test_a_header_with_no_token_or_two_is_refused(header: str) -> None:
    with pytest.raises(InvalidToken):
        bearer_token(Facts("https", "h", "/", "GET", {"authorization": header}))


# -- problems --------------------------------------------------------------------------------------------------------------------------


def examples() -> list[TenantDBError]:
    """Every error of the tree, filled with a canary where it takes a text."""
    found: list[TenantDBError] = []
    for kind in errors.all_errors():
        texts = ((CANARY,) * number for number in range(5))
        for arguments in (*texts, (CANARY, 1.0, STATS), (1, {CANARY: CANARY})):
            try:
                error = kind(*arguments)
                str(error)
            except (TypeError, ValueError, AttributeError):
                continue
            found.append(error)
            break
        else:
            raise AssertionError(f"no example of {kind}")
    return found


@pytest.mark.parametrize("error", examples(), ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("identity_asked", [True, False])
def test_every_error_has_a_problem_of_its_status(error: TenantDBError, identity_asked: bool) -> None:
    problem = problem_for(error, identity_asked=identity_asked)

    assert problem.status == problem.body["status"] and set(problem.body) - {"detail"} == {"type", "title", "status", "code"}
    assert problem.headers["content-type"] == "application/problem+json" and problem.headers["cache-control"] == "no-store"
    assert problem.status == error.http_status or problem.body["code"] == "no-access"
    assert ("retry-after" in problem.headers) is (problem.status == 503 or error.retry_after is not None)
    assert ("www-authenticate" in problem.headers) is (problem.status == 401)
    json.dumps(problem.body)
    if problem.status >= 500:
        assert CANARY not in json.dumps(problem.body) and "detail" not in problem.body


def test_an_unknown_a_foreign_a_malformed_and_a_deleted_tenant_look_the_same() -> None:
    answers: list[Any] = [
        problem_for(error, identity_asked=True)
        for error in (
            errors.TenantNotFound("acme"),
            errors.TenantNotFound(str(uuid4()), suggestion="acme-2"),
            errors.NotAMember(),
            errors.NotAMember("something else"),
            errors.InvalidTenantKey("A C M E", "a rule"),
        )
    ]

    assert answers[0].status == 403 and answers.count(answers[0]) == len(answers)


def test_where_nobody_is_asked_who_he_is_an_unknown_tenant_is_not_found() -> None:
    problem = problem_for(errors.TenantNotFound("acme", suggestion="acme-2"), identity_asked=False)

    assert problem.status == 404 and problem.body["code"] == "tenant-not-found" and "acme" not in json.dumps(problem.body)


def test_a_suspended_tenant_is_not_hidden_from_its_own_members() -> None:
    problem = problem_for(errors.TenantSuspended("acme"), identity_asked=True)

    assert problem.status == 403 and problem.body["code"] == "tenant-suspended" and "acme" not in json.dumps(problem.body)


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (errors.TenantNotReady("acme", "provisioning"), 503, "5"),
        (errors.BudgetExhausted("acme", 1.0, STATS), 503, "1"),
        (errors.RegistryUnavailable("x"), 503, "5"),
        (errors.WrongDatabase("acme", "x"), 503, "30"),
        (errors.OperationInProgress("acme"), 409, "5"),
        (errors.NoTenantBound(), 500, None),
    ],
)
def test_what_may_be_tried_again_says_when(error: TenantDBError, status: int, retry_after: str | None) -> None:
    problem = problem_for(error, identity_asked=True)

    assert (problem.status, problem.headers.get("retry-after")) == (status, retry_after)


def test_a_bad_token_is_told_from_a_missing_one_and_neither_says_why() -> None:
    missing = problem_for(errors.AuthenticationRequired(), identity_asked=True)
    bad = problem_for(errors.InvalidToken("the token has expired"), identity_asked=True)

    assert missing.headers["www-authenticate"] == "Bearer" and bad.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    assert "detail" not in missing.body and "detail" not in bad.body


def test_an_error_about_what_the_client_sent_says_what_is_wrong() -> None:
    assert "lower-case" in problem_for(errors.InvalidSlug("ACME", "lower-case letters only"), identity_asked=False).body["detail"]
    assert "admin" in problem_for(errors.RoleRequired("readonly", ["admin"]), identity_asked=True).body["detail"]


def test_an_error_class_of_an_application_takes_the_face_of_its_base() -> None:
    class TooManySeats(errors.AccessError):
        code = "too-many-seats"

    problem = problem_for(TooManySeats(CANARY), identity_asked=True)

    assert (problem.status, problem.body["code"], problem.body["title"]) == (403, "too-many-seats", "You may not do this")
    assert CANARY not in json.dumps(problem.body)
