"""One canonical form for what names a tenant: odd spellings are refused, never folded."""

from __future__ import annotations

import re
import string
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenantdb.errors import InvalidSlug, InvalidTenantKey
from tenantdb.model import Tenant, TenantState
from tenantdb.resolvers import RESERVED_SLUGS, canonical_slug, tenant_key

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
