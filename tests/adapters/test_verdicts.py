"""Requests and verdicts that hold behind every face: in ASGI, FastAPI, WSGI and Flask alike."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import jwt
import pytest
from sqlalchemy.exc import OperationalError

from tenantdb import errors
from tenantdb.aio import AsyncTenantDB
from tenantdb.auth import RegistryAuth
from tenantdb.context import bound_or_none
from tenantdb.database import TenantDB
from tenantdb.jwks import JWKS
from tenantdb.model import Tenant
from tenantdb.requests import Gate
from tenantdb.resolvers import all_agree, custom_domain, header, path_prefix, subdomain
from tenantdb.tokens import Tokens
from tests.adapters.faces import FACES, Face
from tests.adapters.world import TOKEN_KEY, World, peopled, queries
from tests.conformance.watching import restrict, settled
from tests.unit.test_jwks import FIRST, Clock, idle, public, serving
from tests.world import PostgreSQLWorld, eventually

Make = Callable[..., Face]

EVERYWHERE = all_agree(header(), subdomain("clinic.example"), path_prefix("/t"))


@pytest.fixture(params=list(FACES))
def make(request: pytest.FixtureRequest, world: World) -> Make:
    """Makes the application behind one face: ``make(**options of the middleware)``."""

    def made(world: World = world, **options: Any) -> Face:
        return FACES[request.param](world, options)

    return made


def refusals(world: World) -> list[tuple[str, str, UUID | None]]:
    """What the audit log tells of refused requests: kind, actor and tenant."""
    world.db._registry.audit._refusals.flush()
    entries = world.db.audit.list(limit=100)
    return [(entry.action, entry.actor, entry.tenant_id) for entry in entries if entry.action.startswith("refused.")]


# -- who asks, and for whom ------------------------------------------------------------------------------------------------------------


async def test_a_request_runs_for_the_tenant_of_its_token_and_nothing_stays_behind(make: Make, world: World) -> None:
    face = make()

    ann = await face.ask("/patients", {**world.as_ann, "x-request-id": "req-7"})
    bob = await face.ask("/patients", world.as_bob)

    user = str(world.ann.id)
    seen = {"bound": "acme", "tenant": "acme", "user": user, "role": "admin", "actor": user, "request_id": "req-7", "source": "192.0.2.1"}
    assert ann.json == seen
    assert (bob.json["bound"], bob.json["tenant"], bob.json["role"], bob.json["request_id"]) == ("globex", "globex", "user", None)
    assert bound_or_none() is None


async def test_a_session_reads_the_tenants_own_database(make: Make, world: World) -> None:
    face = make()

    assert (await face.ask("/read", world.as_ann)).body == b"acme"
    assert (await face.ask("/read", world.as_bob)).body == b"globex"


async def test_what_is_bound_around_the_application_is_not_bound_in_it(make: Make, world: World) -> None:
    face = make()

    with world.db.tenant_context("globex"):
        exempt, ann = await face.ask("/healthz"), await face.ask("/patients", world.as_ann)
        assert bound_or_none() == world.globex

    assert exempt.json["bound"] is None and ann.json["bound"] == "acme"


async def test_the_role_is_the_registrys_whatever_the_token_says(make: Make, world: World) -> None:
    """J17."""
    assert (await make().ask("/", world.bearer(world.bob, world.globex, role="owner"))).json["role"] == "user"


def signed(world: World, **changes: Any) -> dict[str, str]:
    """Ann's token with other claims; None leaves one out."""
    token = world.as_ann["authorization"].removeprefix("Bearer ")
    claims = {**jwt.decode(token, options={"verify_signature": False}), **changes}
    kid = jwt.get_unverified_header(token)
    given = {name: value for name, value in claims.items() if value is not None}
    return {"authorization": "Bearer " + jwt.encode(given, TOKEN_KEY, headers={"kid": kid["kid"], "typ": kid["typ"]})}


async def test_only_a_good_token_is_a_credential(make: Make, world: World) -> None:
    """J5, J8, J11, a token of each; `tests/unit/test_tokens.py` has the others."""
    face = make()
    good = world.as_ann["authorization"].removeprefix("Bearer ")
    bad = [
        signed(world, exp=None),  # J5
        signed(world, exp=signed_at(good) + 90_000),  # J8: it lives for more than a day
        {"authorization": "Bearer " + jwt.encode({"sub": "x"}, TOKEN_KEY, headers={"typ": "rt+jwt"})},  # J11
        *(
            {"authorization": value}
            for value in ("Bearer", "Bearer ", "Bearer x", "Bearer a.b.c", "Bearer ü", "Bearer a b", f"Bearer {good},{good}")
        ),
        {"authorization": "Bearer " + "a" * 9000},
    ]

    assert (await face.ask("/", signed(world))).status == 200
    for headers in bad:
        reply = await face.ask("/", headers)
        assert (reply.status, reply.code, reply.headers["www-authenticate"]) == (401, "invalid-token", 'Bearer error="invalid_token"')
    for headers in ({}, {"authorization": "Basic YTpi"}, {"authorization": good}):
        reply = await face.ask("/", headers)
        assert (reply.status, reply.code, reply.headers["www-authenticate"]) == (401, "authentication-required", "Bearer")
    assert face.ran == ["/"]
    assert {kind for kind, *_ in refusals(world)} == {"refused.invalid-token", "refused.authentication-required"}


@pytest.mark.parametrize("trouble", ["500", "hangs"])
async def test_a_flood_of_unknown_key_ids_asks_the_issuer_once_and_keeps_nobody_waiting(make: Make, world: World, trouble: str) -> None:
    """J15, J16; `tests/unit/test_jwks.py` has the twin."""

    def bearer(kid: str) -> dict[str, str]:
        claims = jwt.decode(world.as_ann["authorization"].removeprefix("Bearer "), options={"verify_signature": False})
        return {"authorization": "Bearer " + jwt.encode(claims, FIRST, "RS256", {"kid": kid, "typ": "at+jwt"})}

    with serving() as issuer:
        issuer.serves({"keys": [public(FIRST, "RS256", "k1")]})
        clock = Clock()
        keys = JWKS(issuer.url, cooldown=10.0, timeout=60.0, clock=clock)
        tokens = Tokens(keys, issuer="clinic", audience="clinic-api")
        tokens.start()
        face = make(authenticate=RegistryAuth(tokens, world.db))
        assert (await face.ask("/", bearer("k1"))).json["bound"] == "acme"  # the first request, at which WSGI makes all ready
        before = issuer.asked
        if trouble == "hangs":
            issuer.go.clear()
        else:
            issuer.serves(b"", status=500)
        clock.now += 10.0
        unknown = bearer("unknown")

        for _ in range(100):
            assert (await face.ask("/", unknown)).code == "invalid-token"
        eventually(lambda: issuer.asked == before + 1)  # for all of the flood
        assert (await face.ask("/", bearer("k1"))).json["bound"] == "acme"

        issuer.go.set()
        idle(keys)
        assert issuer.asked == before + 1


async def test_what_no_key_of_ours_signed_asks_the_registry_nothing(make: Make, world: World) -> None:
    """N3, from the front: who invents tenants and users in tokens costs no query."""
    face = make()
    assert (await face.ask("/", world.as_ann)).status == 200

    with queries(world.db) as asked:
        for _ in range(200):
            claims = {"sub": str(uuid4()), "tenant_id": str(uuid4()), "exp": 2**40}
            reply = await face.ask("/", {"authorization": "Bearer " + jwt.encode(claims, "f" * 32, headers={"typ": "at+jwt"})})
            assert reply.code == "invalid-token"
        assert reads(asked) == 0


async def test_names_that_nobody_has_ask_the_registry_less_and_less(make: Make, world: World) -> None:
    """N3, from the front; `tests/unit/test_names.py` has the numbers and the twin."""
    face = make(authenticate=None, resolver=subdomain("clinic.example"))

    with queries(world.db) as asked:
        for number in range(1_500):
            assert (await face.ask("/", {"host": f"nobody-{number}.clinic.example"})).status == 404

    assert 0 < reads(asked) < 500
    assert (await face.ask("/read", {"host": "globex.clinic.example"})).body == b"globex"


def reads(asked: list[str]) -> int:
    """Without what the audit log needs to write down, now and then, that somebody was refused."""
    return sum(statement.startswith("SELECT") and "audit" not in statement for statement in asked)


def signed_at(token: str) -> int:
    return int(jwt.decode(token, options={"verify_signature": False})["iat"])


async def test_no_tenant_is_told_from_another_by_who_has_no_access(make: Make, world: World) -> None:
    """J18, J19: unknown, foreign, deleted and purged ones give the same bytes."""
    unknown = {"authorization": "Bearer " + world.tokens.issue(world.ann.id, uuid4())}
    foreign = world.bearer(world.ann, world.globex)
    gone = []
    for slug in ("deleted", "purged"):
        tenant = world.db.provision(slug)
        world.db.memberships.add(world.ann, tenant, role="admin")
        gone.append(world.bearer(world.ann, tenant))
        world.db.delete(slug)
    world.db.purge("purged", confirm="purged", immediately=True)
    face = make()

    replies = [await face.ask("/", headers) for headers in (unknown, foreign, *gone)]

    assert {(reply.status, reply.body, tuple(reply.headers.items())) for reply in replies} == {
        (403, replies[0].body, tuple(replies[0].headers.items()))
    }
    assert replies[0].code == "no-access" and face.ran == []


async def test_membership_is_what_keeps_strangers_out(make: Make, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of J18: a registry that takes everybody for a member lets them in."""
    stranger = world.bearer(world.ann, world.globex)
    assert (await make().ask("/read", stranger)).status == 403

    standings = type(world.db._registry.standings)
    get = standings.get
    monkeypatch.setattr(standings, "peek", lambda *_: None)
    monkeypatch.setattr(standings, "get", lambda self, user, tenant: replace(get(self, user, tenant), role="user"))

    assert (await make().ask("/read", stranger)).body == b"globex"


async def test_who_is_no_member_any_more_is_out_at_the_next_request(make: Make, world: World) -> None:
    """J18."""
    face = make()
    assert (await face.ask("/", world.as_ann)).status == 200

    world.db.memberships.remove(world.ann, world.acme)

    assert (await face.ask("/", world.as_ann)).code == "no-access"


def elsewhere(world: World, **options: Any) -> World:
    """Another process of the application."""
    db = TenantDB(str(world.db.settings.url), **options)
    return replace(world, db=db, adb=AsyncTenantDB(db))


@pytest.mark.parametrize("way", ["looking", "nothing"])
async def test_who_is_put_out_by_another_process_is_out_here_once_it_has_looked(make: Make, world: World, way: str) -> None:
    """J18; and its twin: a process that nobody tells and that does not look goes on."""
    with (here := elsewhere(world)).db:
        restrict(here.db, way)
        face = make(here)
        settled(here.db, way)
        assert (await face.ask("/", world.as_ann)).status == 200

        world.db.memberships.remove(world.ann, world.acme)

        async def refused() -> str | None:
            while (reply := await face.ask("/", world.as_ann)).status == 200:
                await asyncio.sleep(0.01)
            return reply.code

        if way == "looking":
            assert await asyncio.wait_for(refused(), 30) == "no-access"
        else:
            assert (await face.ask("/", world.as_ann)).status == 200


def put_into(world: World, state: str) -> World:
    """Another process of the application, where acme is in this state already."""
    with world.db._registry._transactions.write() as connection:
        connection.exec_driver_sql("UPDATE tenantdb_tenants SET state = ? WHERE slug = 'acme'", (state,))
    return elsewhere(world)


async def test_a_tenant_that_is_not_served_is_refused_with_a_good_token(make: Make, world: World) -> None:
    """J19."""
    for state, expected in {
        "suspended": (403, "tenant-suspended", None),
        "maintenance": (503, "tenant-not-ready", "5"),
        "provisioning": (503, "tenant-not-ready", "5"),
        "failed": (503, "tenant-not-ready", "5"),
        "deleted": (403, "no-access", None),
        "purging": (403, "no-access", None),
        "purged": (403, "no-access", None),
    }.items():
        with (now := put_into(world, state)).db:
            face = make(now)

            reply = await face.ask("/", world.as_ann)

            assert (reply.status, reply.code, reply.headers.get("retry-after")) == expected, state
            assert face.ran == [] and (await face.ask("/read", world.as_bob)).body == b"globex"


@pytest.mark.parametrize(
    ("policy", "expected"), [("refuse", (402, "subscription-expired")), ("readonly", (200, None)), ("allow", (200, None))]
)
async def test_who_has_not_paid_is_answered_as_the_policy_says(
    make: Make, world: World, policy: str, expected: tuple[int, str | None]
) -> None:
    """J19; what may be written is in `tests/conformance/test_subscriptions.py`."""
    world.db.update("acme", subscription="past_due")
    with (now := elsewhere(world, past_due=policy)).db:
        face = make(now)

        reply = await face.ask("/read", world.as_ann)

        assert (reply.status, reply.code if reply.status != 200 else None) == expected
        assert (reply.body == b"acme") is (reply.status == 200)
        assert (await face.ask("/read", world.as_bob)).body == b"globex"


async def test_an_outage_is_no_absence(make: Make, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: Any) -> None:
        raise errors.RegistryUnavailable("no answer")

    face = make()
    with monkeypatch.context() as outage:
        for how in ("peek", "get"):
            outage.setattr(type(world.db._registry.standings), how, down)
        reply = await face.ask("/", world.as_ann)
        assert (reply.status, reply.headers["retry-after"]) == (503, "5") and face.ran == []

    assert (await face.ask("/", world.as_ann)).status == 200


# -- other sources that name a tenant --------------------------------------------------------------------------------------------------

SPELLINGS = (
    "{}",
    "{{{}}}",
    "urn:uuid:{}",
    "{:upper}",
    "{:plain}",
    "{:moved}",
    " {}",
    "{} ",
    "+{}",
    "0x{}",
    "{:underscored}",
    "{:wide}",
)


def spelt(spelling: str, tenant: Tenant) -> str:
    text = str(tenant.id)
    return (
        spelling.replace("{:upper}", text.upper())
        .replace("{:plain}", text.replace("-", ""))
        .replace("{:moved}", text.replace("-", "")[:4] + "-" + text.replace("-", "")[4:])
        .replace("{:underscored}", text.replace("-", "_"))
        .replace("{:wide}", "".join(chr(ord(letter) + 0xFEE0) if letter.isdigit() else letter for letter in text))
        .replace("{{", "{")
        .replace("{}", text)
        .replace("}}", "}")
    )


@pytest.mark.parametrize("by", ["header", "path"])
async def test_a_tenant_has_one_name_however_it_is_spelt(make: Make, world: World, by: str) -> None:
    """J22: the same tenant, or refused; and never another one's."""
    face = make(resolver=all_agree(header(), path_prefix("/t")))
    for spelling in SPELLINGS:
        for tenant in (world.acme, world.globex):
            name = spelt(spelling, tenant)
            path, more = ("/", {"x-tenant-id": name.encode().decode("latin-1")}) if by == "header" else (f"/t/{name}/patients", {})

            reply = await face.ask(path, {**world.as_ann, **more})

            if tenant is world.acme and spelling in ("{}", "{:upper}"):
                assert reply.json["bound"] == "acme"
            else:
                assert (reply.status, reply.code) == (403, "tenant-mismatch"), name
    assert len(face.ran) == 2


async def test_a_token_of_one_tenant_is_refused_where_another_is_named(make: Make, world: World) -> None:
    """J23."""
    face = make(resolver=EVERYWHERE)
    named_elsewhere: list[tuple[str, dict[str, str]]] = [
        ("/", {"x-tenant-id": "globex"}),
        ("/", {"x-tenant-id": str(world.globex.id)}),
        ("/", {"host": "globex.clinic.example"}),
        ("/t/globex/patients", {}),
        ("/t/acme/patients", {"host": "globex.clinic.example"}),
        ("/", {"x-tenant-id": "initech"}),
        ("/", {"x-tenant-id": "Robert'); DROP TABLE"}),
    ]

    for path, headers in named_elsewhere:
        reply = await face.ask(path, {**world.as_ann, **headers})
        assert (reply.status, reply.code) == (403, "tenant-mismatch") and face.ran == []
        assert refusals(world)[:1] == [("refused.tenant-mismatch", str(world.ann.id), world.acme.id)]
    assert len(refusals(world)) == len(named_elsewhere)
    assert (await face.ask("/t/acme/patients", {**world.as_ann, "host": "ACME.clinic.example.:80"})).json["bound"] == "acme"


async def test_agreement_is_what_refuses_the_other_name(make: Make, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of J23."""
    monkeypatch.setattr(Gate, "agreed", staticmethod(lambda tenant, names, owners: tenant))

    reply = await make(resolver=EVERYWHERE).ask("/", {**world.as_ann, "x-tenant-id": "globex"})

    assert (reply.status, reply.json["bound"]) == (200, "acme")


async def test_where_nobody_signs_in_the_host_alone_decides(make: Make, world: World) -> None:
    face = make(authenticate=None, resolver=subdomain("clinic.example"))

    acme = await face.ask("/read", {"host": "acme.clinic.example"})
    unknown = await face.ask("/read", {"host": "initech.clinic.example"})
    nobody = await face.ask("/read", {"host": "clinic.example"})
    malformed = await face.ask("/read", {"host": "a_b.clinic.example"})

    assert acme.body == b"acme"
    for reply in (unknown, nobody):
        assert (reply.status, reply.code) == (404, "tenant-not-found")
    assert unknown.body == nobody.body and b"initech" not in unknown.body
    assert malformed.status in (400, 404, 422) and malformed.code is not None
    assert (await face.ask("/healthz")).json["bound"] is None


async def test_a_domain_of_its_own_leads_to_its_tenant(make: Make, world: World) -> None:
    world.db.domains.add("praxis.example", "globex")
    open_to_all = make(authenticate=None, resolver=custom_domain("clinic.example"))
    signed_in = make(resolver=custom_domain("clinic.example"))

    assert (await open_to_all.ask("/read", {"host": "praxis.example"})).body == b"globex"
    assert (await open_to_all.ask("/read", {"host": "other.example"})).status == 404
    assert (await signed_in.ask("/read", {**world.as_bob, "host": "praxis.example"})).body == b"globex"
    for host in ("praxis.example", "other.example"):
        assert (await signed_in.ask("/read", {**world.as_ann, "host": host})).code == "tenant-mismatch"


# -- without credentials, without a tenant -----------------------------------------------------------------------------------------------


async def test_where_credentials_are_optional_a_request_without_runs_unbound(make: Make, world: World) -> None:
    face = make(required=False)

    nobody, bob = await face.ask("/front"), await face.ask("/front", world.as_bob)

    assert (nobody.json["bound"], nobody.json["user"], nobody.json["actor"]) == (None, None, "anonymous")
    assert bob.json["bound"] == "globex"
    assert (await face.ask("/front", {"authorization": "Bearer a.b.c"})).code == "invalid-token"
    assert (await face.ask("/front", world.bearer(world.ann, world.globex))).code == "no-access"


@pytest.mark.parametrize("make", ["fastapi", "flask"], indirect=True)
async def test_a_framework_refuses_the_tenants_session_to_who_has_no_tenant(make: Make, world: World) -> None:
    face = make(required=False)

    assert ((await face.ask("/read")).status, (await face.ask("/read")).code) == (401, "authentication-required")
    assert (await face.ask("/read", world.bearer(world.ann))).code == "no-access"
    open_to_all = make(authenticate=None, resolver=subdomain("clinic.example"), required=False)
    assert ((await open_to_all.ask("/read")).status, (await open_to_all.ask("/read")).code) == (404, "tenant-not-found")


async def test_an_identity_without_a_tenant_gets_none_that_it_asks_for(make: Make, world: World) -> None:
    face = make(resolver=EVERYWHERE)

    reply = await face.ask("/", {**world.bearer(world.ann), "x-tenant-id": "globex"})

    assert (reply.json["bound"], reply.json["user"]) == (None, str(world.ann.id))


async def test_a_session_on_an_exempt_route_is_refused_and_never_anybodys_data(make: Make, world: World) -> None:
    """P9: with a good token too, and whatever is bound around."""
    face = make()

    with world.db.tenant_context("globex"):
        reply = await face.ask("/auth/read", world.as_ann)

    assert (reply.status, reply.code) == (500, "no-tenant-bound") and b"globex" not in reply.body


# -- paths -------------------------------------------------------------------------------------------------------------------------------

AMBIGUOUS = [  # what a server decodes it to, and what was sent
    ("/auth/../patients", None),  # P1
    ("/auth/../patients", "/auth/%2e%2e/patients"),  # P2
    ("/auth/../patients", "/auth/..%2fpatients"),
    ("/auth/login/../../patients", "/auth/login%2f..%2f..%2fpatients"),
    ("/auth/%2e%2e/patients", "/auth/%252e%252e/patients"),
    ("//auth/login", None),  # P3
    ("/auth//login", None),
    ("//patients", None),
    ("/auth/login\x00", "/auth/login%00"),  # P6
    ("/auth\\..\\patients", None),
    ("/auth/login", "http://evil/auth/login"),
    ("/auth/..;/patients", None),
    ("auth/login", "auth/login"),
]


async def test_a_path_that_two_programs_read_differently_is_refused(make: Make, world: World) -> None:
    """P1, P2, P3, P6: whoever asks."""
    face = make()
    for path, raw in AMBIGUOUS:
        for headers in ({}, world.as_ann):
            reply = await face.ask(path, headers, raw=raw)
            assert (reply.status, reply.code) == (400, "invalid-path"), path
    assert face.ran == []


async def test_the_check_of_paths_is_what_refuses_them(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of P1: without it a catch-all route takes what begins like an exempt one, unasked."""
    monkeypatch.setattr("tenantdb.requests.check_path", lambda path, raw_path: None)

    assert (await make().ask("/auth/../patients")).status == 200


async def test_what_only_looks_like_an_exempt_route_is_not_one(make: Make) -> None:
    """P4, P5, P6."""
    face = make()
    similar = "/authors /auth-admin /authx /auth /auth/ /AUTH/login /healthz/ /auth;x=1/login /auth/login;x /healthz;x /auth/%41"

    for path in similar.split():
        assert (await face.ask(path)).status == 401, path
    assert face.ran == []


async def test_an_exempt_route_runs_unasked_and_unbound(make: Make, world: World) -> None:
    face = make(exempt=["/auth/*", "/healthz", "GET /docs"])
    unbound = {"bound": None, "tenant": None, "user": None, "role": None, "actor": "anonymous", "request_id": None, "source": "192.0.2.1"}

    for path in ("/auth/login", "/auth/a/b", "/auth/login/", "/healthz", "/docs"):
        for headers in ({}, world.as_ann, {"authorization": "Bearer a.b.c"}):
            assert (await face.ask(path, headers)).json == unbound
    assert (await face.ask("/docs", method="POST")).status == 401
    assert (await face.ask("/auth/login", method="POST")).json == unbound


@pytest.mark.parametrize("mount", ["/api", "/api/v1"])
async def test_a_mount_changes_nothing_and_opens_nothing(make: Make, world: World, mount: str) -> None:
    """P8: the exempt list says what the router sees, below where the application is mounted."""
    face = make(resolver=path_prefix("/t"))

    assert (await face.ask("/auth/login", mount=mount)).json["bound"] is None
    assert (await face.ask("/t/acme/patients", world.as_ann, mount=mount)).json["bound"] == "acme"
    assert (await face.ask("/t/globex/patients", world.as_ann, mount=mount)).code == "tenant-mismatch"
    assert (await face.ask("/patients", mount="/auth")).status == 401
    for path in ("/auth/../patients", "//auth/login", "/authors", ""):
        assert (await face.ask(path, mount=mount)).status in (400, 401)
    assert face.ran == ["/auth/login", "/t/acme/patients"] or face.ran == [f"{mount}/auth/login", f"{mount}/t/acme/patients"]


async def test_a_preflight_is_a_request_like_another(make: Make, world: World) -> None:
    """P14: let through, and unbound, only where it is exempt."""
    preflight = {"origin": "https://clinic.example", "access-control-request-method": "GET"}

    assert (await make().ask("/patients", preflight, method="OPTIONS")).status == 401
    face = make(exempt=["OPTIONS /patients"])
    assert (await face.ask("/patients", preflight, method="OPTIONS")).json["bound"] is None
    assert (await face.ask("/patients")).status == 401
    head = await make(exempt=["GET /patients"]).ask("/patients", method="HEAD")
    assert (head.status, head.body) == (200, b"")


async def test_a_refused_head_has_the_headers_of_a_get_and_no_body(make: Make) -> None:
    get, head = await make().ask("/patients"), await make().ask("/patients", method="HEAD")

    assert (head.status, head.headers, head.body) == (get.status, get.headers, b"")
    assert int(get.headers["content-length"]) == len(get.body)


# -- answers and bodies ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/raises", "/stream/fails"])
async def test_an_error_of_ours_that_comes_before_the_body_becomes_a_problem(make: Make, world: World, path: str) -> None:
    face = make()

    reply = await face.ask(path, world.as_ann)

    assert (reply.status, reply.code, reply.headers["cache-control"]) == (403, "tenant-suspended", "no-store")
    assert int(reply.headers["content-length"]) == len(reply.body)


async def test_a_refusal_has_the_same_bytes_whoever_sends_it(make: Make, world: World) -> None:
    """The middleware, or a framework's error handler."""
    raised = await make().ask("/raises", world.as_ann)
    with (suspended := put_into(world, "suspended")).db:
        refused = await make(suspended).ask("/patients", world.as_ann)

    assert raised == refused


async def test_a_streamed_body_reads_from_its_own_tenant_until_its_end(make: Make, world: World) -> None:
    """P11, P12."""
    face = make()

    assert (await face.ask("/stream", world.as_ann)).body == b"acme" * 3
    assert (await face.ask("/stream", world.as_bob)).body == b"globex" * 3
    assert in_use(world) == 0


async def test_a_client_that_leaves_in_the_middle_of_a_body_gives_its_connection_back(make: Make, world: World) -> None:
    """P11, P12."""
    assert await make().leave("/stream", world.as_ann) == b"acme"

    def given_back() -> bool:
        gc.collect()  # to which Starlette leaves generators
        return in_use(world) == 0

    eventually(given_back, within=10)
    assert bound_or_none() is None


# -- a suspension in the middle of a body ----------------------------------------------------------------------------------------------


@pytest.fixture
def operator(postgresql_world: PostgreSQLWorld) -> Iterator[World]:
    """An installation on PostgreSQL, in a process that manages it."""
    with postgresql_world.make_db() as db:
        yield peopled(db)


async def test_a_tenant_suspended_in_the_middle_of_a_body_gets_no_more_of_it(
    make: Make, operator: World, postgresql_world: PostgreSQLWorld
) -> None:
    """J20: suspended by another process, of which this one hears nothing. The server ends the sessions, and lets none in again."""
    with postgresql_world.twin(operator.db, server=None) as db:
        serving_process = replace(operator, db=db, adb=AsyncTenantDB(db))
        face = make(serving_process)

        body, error = await face.halfway("/stream", operator.as_ann, lambda: operator.db.suspend("acme"))

        assert body == b"acme"  # of three
        assert isinstance(error, errors.TenantSuspended | OperationalError)
        assert postgresql_world.open_connections(operator.db, [operator.acme]) == 0
        eventually(lambda: in_use(serving_process) == 0)
        assert (await face.ask("/read", operator.as_ann)).code == "tenant-suspended"
        assert (await face.ask("/stream", operator.as_bob)).body == b"globex" * 3
        await serving_process.adb.close()


async def test_a_body_of_a_tenant_that_is_served_is_sent_to_its_end(make: Make, world: World) -> None:
    """The twin of J20: it is the suspension that breaks it off."""
    assert await make().halfway("/stream", world.as_ann, lambda: None) == (b"acme" * 3, None)


def in_use(world: World) -> int:
    return sum(server.in_use for server in world.db.stats())
