"""One canonical form for what names a tenant: odd spellings are refused, never folded."""

from __future__ import annotations

import re
import string
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tenantdb.errors import ConfigError, InvalidPath, InvalidSlug, InvalidTenantKey, TenantMismatch, TenantNotFound
from tenantdb.model import Facts, Identity, Tenant, TenantState
from tenantdb.requests import Gate, check_path, host_name
from tenantdb.resolvers import (
    RESERVED_SLUGS,
    DomainName,
    Resolver,
    all_agree,
    canonical_slug,
    claim,
    custom_domain,
    first_of,
    header,
    names_of,
    path_prefix,
    subdomain,
    tenant_key,
)
from tests.world import SQLiteWorld

ID = uuid.UUID("0f5a61f2-6c53-4f1b-9d2e-9f1df1a0c001")
BAD_SLUGS = [
    "",
    "a",
    "ab",
    "Acme",
    "ACME",
    "1acme",
    "-acme",
    "acme-",
    "ac me",
    " acme",
    "acme ",
    "acme\n",
    "ac\nme",
    "ac'me",
    'ac"me',
    'a"; DROP ROLE x;--',
    "ac.me",
    "ac/me",
    "../acme",
    "ac\\me",
    "ac\0me",
    "ac_me",
    "pg_x",
    "\N{HOSPITAL}acme",
    "\N{LATIN SMALL LETTER A WITH DIAERESIS}cme",
    "\N{CYRILLIC SMALL LETTER A}cme",
    "\N{FULLWIDTH LATIN SMALL LETTER A}cme",
    "a" * 41,
    "a" * 200,
]
SPELLINGS = [
    "{0f5a61f2-6c53-4f1b-9d2e-9f1df1a0c001}",
    "urn:uuid:0f5a61f2-6c53-4f1b-9d2e-9f1df1a0c001",
    "0f5a61f26c534f1b9d2e9f1df1a0c001",
    "0f5a61f2-6c534f1b-9d2e-9f1d-f1a0c001",
    "0f5a-61f2-6c53-4f1b-9d2e-9f1d-f1a0-c001",
    "0f5a61f2_6c53_4f1b_9d2e_9f1df1a0c001",
    " 0f5a61f2-6c53-4f1b-9d2e-9f1df1a0c001",
    "0f5a61f2-6c53-4f1b-9d2e-9f1df1a0c001\n",
    "+0f5a61f2-6c53-4f1b-9d2e-9f1df1a0c01",
    "0x5a61f2-6c53-4f1b-9d2e-9f1df1a0c001",
    "\N{FULLWIDTH DIGIT ZERO}f5a61f2-6c53-4f1b-9d2e-9f1df1a0c001",
    "\N{ARABIC-INDIC DIGIT ZERO}f5a61f2-6c53-4f1b-9d2e-9f1df1a0c001",
]


@pytest.mark.parametrize("slug", ["acme", "a1c", "acme-clinic", "a--b", "a" * 40, "z9-9z"])
def test_a_good_slug_is_itself(slug: str) -> None:
    assert canonical_slug(slug) == tenant_key(slug) == slug


@pytest.mark.parametrize("slug", BAD_SLUGS)
def test_a_bad_slug_is_refused_with_the_rule_and_in_printable_words(slug: str) -> None:
    with pytest.raises(InvalidSlug) as caught:
        canonical_slug(slug)
    assert "3 to 40 characters" in str(caught.value)
    assert str(caught.value).isascii() and str(caught.value).isprintable() and len(str(caught.value)) < 300
    with pytest.raises(InvalidTenantKey):
        tenant_key(slug)


@pytest.mark.parametrize("slug", sorted(RESERVED_SLUGS))
def test_a_reserved_name_cannot_be_signed_up(slug: str) -> None:
    with pytest.raises(InvalidSlug, match=r"reserved|3 to 40"):
        canonical_slug(slug)


def test_postgresqls_own_names_are_among_the_reserved() -> None:
    assert {"postgres", "template0", "template1", "all", "replication"} <= RESERVED_SLUGS


@pytest.mark.parametrize(
    "slug", ["af5a61f2-6c53-4f1b-9d2e-9f1df1a0c001", "af5a61f26c534f1b9d2e9f1df1a0c001", "af5a61f26c534f1b-9d2e9f1df1a0c001"]
)
def test_a_slug_cannot_look_like_a_tenants_id(slug: str) -> None:
    assert str(uuid.UUID(slug)).replace("-", "") == slug.replace("-", "")
    with pytest.raises(InvalidSlug, match="UUID"):
        canonical_slug(slug)


def test_a_tenant_is_keyed_by_its_id() -> None:
    tenant = Tenant(id=ID, slug="acme", name="Acme", state=TenantState.ACTIVE)
    assert tenant_key(tenant) == tenant_key(ID) == tenant_key(str(ID)) == tenant_key(str(ID).upper()) == ID


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_odd_spelling_of_an_id_names_no_tenant(spelling: str) -> None:
    with pytest.raises(InvalidTenantKey) as caught:
        tenant_key(spelling)
    assert str(caught.value).isascii() and str(caught.value).isprintable()


@pytest.mark.parametrize("value", [None, 7, b"acme", 1.5, ("acme",), ["acme"], object()])
def test_what_is_no_text_names_no_tenant(value: object) -> None:
    with pytest.raises(InvalidTenantKey):
        tenant_key(value)  # type: ignore[arg-type]


@given(st.one_of(st.text(max_size=60), st.from_regex(r"[{+ ]?[0-9a-fA-F_-]{30,38}[}\n]?", fullmatch=True), st.uuids().map(str)))
def test_whatever_is_accepted_has_one_form_only(text: str) -> None:
    try:
        key = tenant_key(text)
    except InvalidTenantKey:
        return
    if isinstance(key, uuid.UUID):
        assert text.lower() == str(key)
    else:
        assert text == key
        assert re.fullmatch("[a-z][a-z0-9-]*[a-z0-9]", key) and 3 <= len(key) <= 40
        assert re.fullmatch("[0-9a-f]{32}", key.replace("-", "")) is None
    assert tenant_key(key) == key


@given(st.text(alphabet=string.ascii_letters + string.digits + "-._/'\"\0\n ", max_size=45))
def test_what_may_be_signed_up_can_be_looked_up(text: str) -> None:
    try:
        slug = canonical_slug(text)
    except InvalidSlug:
        return
    assert tenant_key(slug) == slug == text


@given(st.uuids())
def test_every_id_is_found_by_its_text(value: uuid.UUID) -> None:
    assert tenant_key(str(value)) == tenant_key(str(value).upper()) == value


# -- from a request to a tenant ----------------------------------------------------------------------------------------------------------


def request(host: str = "", path: str = "/", claims: Mapping[str, Any] | None = None, **headers: str) -> Facts:
    """The facts that an adapter makes of a request with this Host header."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return Facts("https", host_name(host), path, "GET", given, claims or {})


def found(resolver: Resolver, facts: Facts) -> object:
    """What a resolver names in the end: nothing, one name, several, or no name at all."""
    try:
        names = names_of(resolver, facts)
    except InvalidTenantKey:
        return "refused"
    return names[0] if len(names) == 1 else names


NOTHING = ()


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("acme.clinic.example", "acme"),
        ("acme.clinic.example:8443", "acme"),
        ("acme.clinic.example:", "acme"),
        ("acme.clinic.example.", "acme"),
        ("acme.clinic.example.:80", "acme"),
        ("ACME.Clinic.EXAMPLE", "acme"),
        (" acme.clinic.example\t", "acme"),
        (f"{ID}.clinic.example", ID),
        (f"{str(ID).upper()}.clinic.example", ID),
        ("clinic.example", NOTHING),
        ("clinic.example.", NOTHING),
        ("www.clinic.example", NOTHING),
        ("api.clinic.example:443", NOTHING),
        ("evil-clinic.example", NOTHING),
        ("evilclinic.example", NOTHING),
        ("acme.clinic.example.evil.example", NOTHING),
        ("acme.clinic.example.evil", NOTHING),
        ("other.example", NOTHING),
        ("example", NOTHING),
        ("localhost", NOTHING),
        ("127.0.0.1:8000", NOTHING),
        ("[::1]:8000", NOTHING),
        ("[::1]", NOTHING),
        ("", NOTHING),
        (".", NOTHING),
        (":80", NOTHING),
        ("acme.clinic.example..", NOTHING),
        ("[::1].clinic.example", "refused"),
        (".clinic.example", "refused"),
        ("..clinic.example", "refused"),
        ("a.b.clinic.example", "refused"),
        ("www.acme.clinic.example", "refused"),
        ("acme..clinic.example", "refused"),
        ("ac.clinic.example", "refused"),
        ("1acme.clinic.example", "refused"),
        ("ac_me.clinic.example", "refused"),
        ("*.clinic.example", "refused"),
        ("globex@acme.clinic.example", "refused"),
        ("globex:x@acme.clinic.example", "refused"),
        ("acme.clinic.example@evil.example", NOTHING),
        ("acme.clinic.example, globex.clinic.example", "refused"),
        ("acme.clinic.example,acme.clinic.example", "refused"),
        ("acme.clinic.example:80, globex.clinic.example", "refused"),
        ("acme.clinic.example:80:80", NOTHING),
        ("acme.clinic.example:evil", NOTHING),
        ("acme.clinic.example:80.evil.example", NOTHING),
        ("acme.clinic.example/../x", NOTHING),
        ("acme\0.clinic.example", "refused"),
        ("acme .clinic.example", "refused"),
        ("acme%2e.clinic.example", "refused"),
        ("\N{KELVIN SIGN}linic.clinic.example", "refused"),
        ("\N{FULLWIDTH LATIN SMALL LETTER A}cme.clinic.example", "refused"),
        ("acme.clinic\N{IDEOGRAPHIC FULL STOP}example", NOTHING),
        ("acm\xe9.clinic.example", "refused"),
        (f"{ID.hex}.clinic.example", "refused"),
        ("x" * 100_000 + ".clinic.example", "refused"),
    ],
)
def test_a_subdomain_names_a_tenant_below_its_own_base_domain_only(host: str, name: object) -> None:
    assert found(subdomain("clinic.example"), request(host)) == name


def test_a_forwarded_host_is_not_read() -> None:
    facts = request("acme.clinic.example", x_forwarded_host="globex.clinic.example", forwarded="host=globex.clinic.example")

    assert found(subdomain("clinic.example"), facts) == "acme"


@pytest.mark.parametrize("bases", [("clinic.example", "eu.clinic.example"), ("eu.clinic.example", "clinic.example")])
def test_of_two_base_domains_the_longer_one_counts_in_whichever_order_they_are_given(bases: tuple[str, ...]) -> None:
    by_host = subdomain(*bases)

    assert found(by_host, request("acme.clinic.example")) == "acme"
    assert found(by_host, request("acme.eu.clinic.example")) == "acme"
    assert found(by_host, request("eu.clinic.example")) == NOTHING
    assert found(custom_domain(*bases), request("eu.clinic.example")) == NOTHING


def test_a_base_domain_that_could_be_a_tenant_is_none() -> None:
    by_host = subdomain("clinic.example", "clinics.clinic.example")

    assert found(subdomain("clinic.example"), request("clinics.clinic.example")) == "clinics"
    assert found(by_host, request("clinics.clinic.example")) == NOTHING


def test_in_development_tenants_are_below_localhost() -> None:
    assert found(subdomain("localhost"), request("acme.localhost:8000")) == "acme"


@pytest.mark.parametrize("make", [subdomain, custom_domain])
@pytest.mark.parametrize(
    "base",
    [
        "",
        ".",
        "example",
        ".clinic.example",
        "*.clinic.example",
        "clinic.example:80",
        "https://clinic.example",
        "clinic .example",
        "127.0.0.1",
        "clinic..example",
        "cl\xefnic.example",
    ],
)
def test_what_is_no_base_domain_is_a_configuration_error(make: Callable[..., Resolver], base: str) -> None:
    with pytest.raises(ConfigError, match=r"clinic\.example"):
        make(base)


def test_subdomains_of_nothing_are_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="base domains"):
        subdomain()


@pytest.mark.parametrize("written", ["Clinic.Example", "clinic.example.", "CLINIC.EXAMPLE."])
def test_a_base_domain_may_be_written_as_a_browser_would(written: str) -> None:
    assert found(subdomain(written), request("acme.clinic.example")) == "acme"
    assert found(custom_domain(written), request("acme.clinic.example")) == NOTHING


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("praxis.example", DomainName("praxis.example")),
        ("PRAXIS.example.:443", DomainName("praxis.example")),
        ("xn--rztin-ira.example", DomainName("xn--rztin-ira.example")),
        ("clinic.example.evil.example", DomainName("clinic.example.evil.example")),
        ("evil-clinic.example", DomainName("evil-clinic.example")),
        ("clinic.example", NOTHING),
        ("acme.clinic.example", NOTHING),
        ("a.b.clinic.example", NOTHING),
        ("CLINIC.example.", NOTHING),
        ("localhost", NOTHING),
        ("127.0.0.1", NOTHING),
        ("127.1", NOTHING),
        ("0x7f.0.0.0x1", NOTHING),
        ("[::1]", NOTHING),
        ("", NOTHING),
        ("praxis.example, clinic.example", NOTHING),
        ("praxis.example:80, clinic.example:80", NOTHING),
        ("user@praxis.example", NOTHING),
        ("praxis..example", NOTHING),
        ("-praxis.example", NOTHING),
        ("prax_is.example", NOTHING),
        ("\xe4rztin.example", NOTHING),
        ("praxis.example/x", NOTHING),
        ("a." * 126 + "example", NOTHING),
        ("a" * 64 + ".example", NOTHING),
    ],
)
def test_a_custom_domain_is_a_whole_host_that_is_not_ours(host: str, name: object) -> None:
    assert found(custom_domain("clinic.example"), request(host)) == name


def test_without_our_own_domains_every_host_name_is_somebodys() -> None:
    assert found(custom_domain(), request("clinic.example")) == DomainName("clinic.example")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/t/acme", "acme"),
        ("/t/acme/", "acme"),
        ("/t/acme/patients/7", "acme"),
        (f"/t/{ID}/patients", ID),
        (f"/t/{str(ID).upper()}", ID),
        ("/t", NOTHING),
        ("/t/", NOTHING),
        ("/", NOTHING),
        ("", NOTHING),
        ("/tt/acme", NOTHING),
        ("/T/acme", NOTHING),
        ("/x/t/acme", NOTHING),
        ("t/acme", NOTHING),
        ("/t/ACME", "refused"),
        ("/t/%61cme", "refused"),
        ("/t/ac%6de/x", "refused"),
        ("/t/acme;x=1/patients", "refused"),
        ("/t/acme%2fpatients", "refused"),
        ("/t/acme\0", "refused"),
        ("/t/acme\\patients", "refused"),
        ("/t/ac me", "refused"),
        ("/t/../acme", "refused"),
        ("/t/\N{FULLWIDTH LATIN SMALL LETTER A}cme", "refused"),
        (f"/t/{ID.hex}", "refused"),
    ],
)
def test_a_path_names_a_tenant_by_the_segment_behind_its_prefix(path: str, name: object) -> None:
    assert found(path_prefix("/t"), request(path=path)) == name


def test_every_spelling_of_a_path_that_is_resolved_by_two_programs_differently_is_refused_before_a_resolver_sees_it() -> None:
    for path, raw in [("/t//acme", None), ("/t/../t/acme", None), ("/t/acme/x", "/t/acme%2fx"), ("/t/acme", "/t/./acme")]:
        with pytest.raises(InvalidPath):
            check_path(path, raw)


def test_the_tenant_may_be_the_first_segment_of_all() -> None:
    assert found(path_prefix(""), request(path="/acme/patients")) == "acme"
    assert found(path_prefix("/api/v1"), request(path="/api/v1/acme")) == "acme"


@pytest.mark.parametrize("prefix", ["t", "/", "/t/", "//t", "/t/{tenant}", "/t x", "/\xe4", "/t%2f"])
def test_what_is_no_path_before_a_tenant_is_a_configuration_error(prefix: str) -> None:
    with pytest.raises(ConfigError, match="path"):
        path_prefix(prefix)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("acme", "acme"),
        (str(ID), ID),
        (str(ID).upper(), ID),
        (None, NOTHING),
        ("", "refused"),
        ("ACME", "refused"),
        ("acme, acme", "refused"),  # given twice, and joined
        ("acme, globex", "refused"),
        ("acme,", "refused"),
        *((spelling, "refused") for spelling in SPELLINGS),
    ],
)
def test_a_header_names_a_tenant_by_its_canonical_name_and_once(value: str | None, name: object) -> None:
    facts = request() if value is None else request(x_tenant_id=value)

    assert found(header(), facts) == found(header("x-tenant-id"), facts) == name
    assert found(header("X-Other"), facts) == NOTHING


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("acme", "acme"),
        (str(ID), ID),
        (ID, ID),
        (None, NOTHING),
        ("", "refused"),
        (7, "refused"),
        (["acme"], "refused"),
        ({}, "refused"),
        (True, "refused"),
    ],
)
def test_a_claim_names_a_tenant_by_its_canonical_name(value: object, name: object) -> None:
    assert found(claim("org"), request(claims={"org": value})) == name
    assert found(claim(), request(claims={"org": value})) == NOTHING


def test_a_function_of_the_application_is_a_resolver_and_held_to_the_same_names() -> None:
    def by_cookie(facts: Facts) -> str | None:
        return facts.cookies.get("clinic")

    assert found(by_cookie, request(cookie="clinic=acme")) == "acme"
    assert found(by_cookie, request()) == NOTHING
    assert found(by_cookie, request(cookie="clinic=ACME")) == "refused"
    assert found(lambda facts: (None,), request()) == "refused"  # type: ignore[arg-type,return-value]


# -- several sources ---------------------------------------------------------------------------------------------------------------------

BY_HOST, BY_PATH, BY_HEADER = subdomain("clinic.example"), path_prefix("/t"), header()


def test_the_first_of_several_that_names_a_tenant_is_enough() -> None:
    either = first_of(BY_HOST, BY_PATH)

    assert found(either, request("acme.clinic.example", "/t/globex")) == "acme"
    assert found(either, request("clinic.example", "/t/globex")) == "globex"
    assert found(either, request("clinic.example", "/")) == NOTHING
    assert found(either, request("a.b.clinic.example", "/t/globex")) == "refused"  # bad is not absent


def test_all_that_several_name_is_named() -> None:
    both = all_agree(BY_HOST, BY_PATH, BY_HEADER)

    assert found(both, request("acme.clinic.example", "/t/globex")) == ("acme", "globex")
    assert found(both, request("acme.clinic.example", "/t/acme", x_tenant_id=str(ID))) == ("acme", "acme", ID)
    assert found(both, request("acme.clinic.example")) == "acme"
    assert found(both, request()) == NOTHING
    assert found(both, request("acme.clinic.example", x_tenant_id="ACME")) == "refused"


def test_they_can_stand_inside_one_another() -> None:
    nested = all_agree(first_of(BY_HOST, custom_domain("clinic.example")), first_of(all_agree(BY_PATH, BY_HEADER)))

    assert found(nested, request("praxis.example", "/t/acme", x_tenant_id="acme")) == (DomainName("praxis.example"), "acme", "acme")
    assert found(nested, request("acme.clinic.example", "/t/acme")) == ("acme", "acme")
    assert found(first_of(all_agree(BY_PATH, BY_HEADER), BY_HOST), request("acme.clinic.example")) == "acme"


# -- beside credentials, and without ---------------------------------------------------------------------------------------------------

ACME = Tenant(id=ID, slug="acme", name="Acme", state=TenantState.ACTIVE)
GLOBEX = uuid.UUID("0f5a61f2-6c53-4f1b-9d2e-9f1df1a0c002")
OWNERS = {DomainName("praxis.example"): ID, DomainName("globex.example"): GLOBEX, DomainName("nobody.example"): None}


def admitted(resolver: Resolver | None, facts: Facts, *, identity: Identity | None = None) -> bool:
    """Whether Acme may be served to a request: with an identity beside which the resolver has to agree, or by the resolver alone."""
    gate = Gate(exempt=[], resolver=resolver, required=True, authenticates=identity is not None)
    names = gate.names(facts, identity)
    return gate.agreed(ACME, names, OWNERS) is ACME


@pytest.mark.parametrize("given", [ID, str(ID), str(ID).upper(), "acme"])
def test_what_stands_beside_credentials_has_to_name_the_same_tenant_by_slug_id_or_domain(given: str | uuid.UUID) -> None:
    me = Identity("u1", tenant=given)
    everything = all_agree(first_of(BY_HOST, custom_domain("clinic.example")), BY_PATH, BY_HEADER)

    assert admitted(None, request("globex.clinic.example", "/t/globex", x_tenant_id="globex"), identity=me)  # nobody asked them
    assert admitted(everything, request(), identity=me)
    assert admitted(everything, request("acme.clinic.example", f"/t/{ID}", x_tenant_id="acme"), identity=me)
    assert admitted(everything, request("praxis.example", "/t/acme", x_tenant_id=str(ID).upper()), identity=me)
    for other in (
        request("globex.clinic.example"),
        request("globex.example"),
        request("nobody.example"),
        request(path="/t/globex"),
        request(path=f"/t/{GLOBEX}"),
        request(x_tenant_id="globex"),
        request(x_tenant_id="acme, acme"),
        request(x_tenant_id=""),
        request("acme.clinic.example", "/t/acme", x_tenant_id="globex"),
        request("acme.clinic.example:80, globex.clinic.example"),
    ):
        with pytest.raises(TenantMismatch):
            admitted(everything, other, identity=me)


def test_without_credentials_the_resolver_alone_decides_and_must_agree_with_itself() -> None:
    everything = all_agree(first_of(BY_HOST, custom_domain("clinic.example")), BY_PATH)

    assert admitted(everything, request("acme.clinic.example", "/t/acme"))
    assert admitted(everything, request("praxis.example"))
    with pytest.raises(TenantMismatch):
        admitted(everything, request("acme.clinic.example", "/t/globex"))
    for nobodys in (request(), request("clinic.example"), request("a.b.clinic.example"), request(path="/t/ACME")):
        with pytest.raises(TenantNotFound):
            admitted(everything, nobodys)


def test_a_tenant_has_one_entry_in_memory_however_it_is_named(sqlite_world: SQLiteWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    here = sqlite_world.make_db()
    acme = here.provision("acme")
    db = sqlite_world.twin(here)
    asked: list[object] = []
    look_up = db._registry.tenants.record

    def counted(key: Any) -> Any:
        asked.append(key)
        return look_up(key)

    monkeypatch.setattr(db._registry.tenants, "record", counted)
    spellings = [str(acme.id), str(acme.id).upper(), "acme", str(acme.id).title(), *[str(acme.id).replace("-", sign) for sign in "_ +"]]
    spellings += [acme.id.hex, f"urn:uuid:{acme.id}", f"{{{acme.id}}}", "ACME", "acme ", " acme", "\N{FULLWIDTH LATIN SMALL LETTER A}cme"]
    everywhere = all_agree(BY_HOST, BY_PATH, BY_HEADER)

    for spelling in spellings:
        for facts in (request(f"{spelling}.clinic.example"), request(path=f"/t/{spelling}"), request(x_tenant_id=spelling)):
            try:
                names = names_of(everywhere, facts)
            except InvalidTenantKey:
                continue
            assert {db.resolve(name).id for name in names if not isinstance(name, DomainName)} == {acme.id}

    assert len(asked) == 1


# -- whatever comes ----------------------------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    ["acme", "globex", ".", "clinic.example", "evil", "-", ":80", ":", ",", " ", "@", "[::1]", "www", "\N{KELVIN SIGN}", "A", "/", str(ID)]
)


@given(st.lists(PIECES, max_size=6).map("".join) | st.text(max_size=30) | st.text(max_size=10).map(lambda text: text + ".clinic.example"))
@example("acme.clinic.example")
def test_whatever_host_is_sent_a_tenant_is_named_only_by_the_host_that_is_its_own(host: str) -> None:
    name = found(BY_HOST, request(host))
    domain = found(custom_domain("clinic.example"), request(host))

    assert name in (NOTHING, "refused") or re.fullmatch(
        rf"[ \t]*{name}\.clinic\.example\.?(:[0-9]*)?[ \t]*", host, re.ASCII | re.IGNORECASE
    )
    assert domain == NOTHING or re.fullmatch(rf"[ \t]*{re.escape(str(domain))}\.?(:[0-9]*)?[ \t]*", host, re.ASCII | re.IGNORECASE)
    assert domain == NOTHING or name == NOTHING  # never both


@given(st.text(max_size=20) | st.lists(st.sampled_from(["/t", "/", "acme", "%61", "..", ";", str(ID)]), max_size=5).map("".join))
def test_whatever_path_is_sent_a_tenant_is_named_only_by_a_segment_that_is_its_name(path: str) -> None:
    name = found(BY_PATH, request(path=path))

    assert name in (NOTHING, "refused") or path.split("/")[2].lower() == str(name)
