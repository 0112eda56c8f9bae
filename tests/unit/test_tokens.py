from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenantdb.errors import ConfigError, InvalidToken
from tenantdb.tokens import MAX_SIZE, Tokens

KEY = b"k" * 32
NOW = 1_800_000_000
FULL_WIDTH = str(NOW + 900).translate({ord(digit): ord(digit) + 0xFEE0 for digit in "0123456789"})
TENANT = UUID("0190f3a1-7c2e-7b51-9c43-5d1c2f3a4b5c")

HEADER: dict[str, Any] = {"alg": "HS256", "typ": "at+jwt"}
CLAIMS: dict[str, Any] = {
    "iss": "clinic",
    "aud": "clinic-api",
    "sub": "u1",
    "iat": NOW,
    "exp": NOW + 900,
    "jti": "j1",
    "tenant_id": str(TENANT),
}


class Clock:
    now: float = NOW

    def __call__(self) -> float:
        return self.now


def tokens(**changes: Any) -> Tokens:
    return Tokens(**{"key": KEY, "issuer": "clinic", "audience": "clinic-api", "clock": Clock(), **changes})


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def sign(header: Mapping[str, Any] | str, claims: Mapping[str, Any] | str, *, key: bytes = KEY, hash_name: str = "sha256") -> str:
    """A token with a good signature over whatever it is given: what only a holder of the key, or a broken issuer, can make."""
    parts = [part if isinstance(part, str) else json.dumps(part) for part in (header, claims)]
    signed = ".".join(b64(part.encode()) for part in parts)
    return f"{signed}.{b64(hmac.new(key, signed.encode(), hash_name).digest())}"


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in CLAIMS.items() if key != name}


def refused(token: Any, by: Tokens | None = None) -> str:
    with pytest.raises(InvalidToken) as caught:
        (by or tokens()).verify(token)
    return caught.value.problem


def test_a_token_holds_what_it_was_issued_with() -> None:
    user = uuid4()

    claims = tokens().verify(tokens().issue(user, TENANT, role="admin", claims={"locale": "de"}))

    assert claims["sub"] == str(user) and claims["tenant_id"] == str(TENANT) and claims["role"] == "admin" and claims["locale"] == "de"
    assert (claims["iss"], claims["aud"], claims["iat"], claims["exp"]) == ("clinic", "clinic-api", NOW, NOW + 900)


def test_a_token_without_a_tenant_has_no_tenant_claim() -> None:
    assert "tenant_id" not in tokens().verify(tokens().issue("u1"))


def test_every_token_has_an_id_of_its_own() -> None:
    issued = tokens()

    assert issued.verify(issued.issue("u1"))["jti"] != issued.verify(issued.issue("u1"))["jti"]


def test_the_tenants_claim_may_be_named_differently() -> None:
    other = tokens(claim="org")

    assert other.verify(other.issue("u1", TENANT))["org"] == str(TENANT)


def test_the_hand_made_token_of_these_tests_is_good_before_it_is_spoilt() -> None:
    assert tokens().verify(sign(HEADER, CLAIMS)) == CLAIMS


# -- J1, J2, J3: algorithms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alg", ["none", "NoNe", "NONE", "", None, "HS384", "HS512", "RS256", "ES256", 256, ["HS256"], {}])
def test_another_algorithm_than_the_keys_is_refused(alg: Any) -> None:
    refused(sign({**HEADER, "alg": alg}, CLAIMS))


def test_a_token_without_a_signature_is_refused() -> None:
    head, body, _ = sign(HEADER, CLAIMS).split(".")

    refused(f"{head}.{body}.")
    refused(f"{head}.{body}")
    refused(f"{b64(json.dumps({'alg': 'none', 'typ': 'at+jwt'}).encode())}.{body}.")


def test_a_token_really_signed_with_a_longer_hash_is_refused_by_a_key_pinned_to_another() -> None:
    long_key = b"k" * 64
    token = sign({**HEADER, "alg": "HS512"}, CLAIMS, key=long_key, hash_name="sha512")

    assert tokens(key=long_key, algorithm="HS512").verify(token) == CLAIMS
    refused(token, tokens(key=long_key))


def test_a_changed_payload_or_another_key_breaks_the_signature() -> None:
    head, _, signature = sign(HEADER, CLAIMS).split(".")
    forged = b64(json.dumps({**CLAIMS, "tenant_id": str(uuid4())}).encode())

    refused(f"{head}.{forged}.{signature}")
    refused(sign(HEADER, CLAIMS, key=b"x" * 32))


PEM = "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE\n-----END PUBLIC KEY-----\n"


@pytest.mark.parametrize("key", [PEM, json.dumps({"kty": "oct", "k": b64(b"k" * 32)}), "ssh-rsa " + "A" * 64])
def test_a_public_key_or_a_jwk_cannot_be_the_secret_of_a_symmetric_algorithm(key: str) -> None:
    with pytest.raises(ConfigError, match="random bytes"):
        tokens(key=key)


@pytest.mark.parametrize("algorithm", ["none", "RS256", "ES256", "EdDSA", "hs256", ""])
def test_an_algorithm_that_is_not_offered_is_a_configuration_error(algorithm: str) -> None:
    with pytest.raises(ConfigError, match="algorithm="):
        tokens(algorithm=algorithm)


@pytest.mark.parametrize(("algorithm", "size"), [("HS256", 32), ("HS384", 48), ("HS512", 64)])
def test_a_key_shorter_than_its_hash_is_refused_and_not_shown(algorithm: str, size: int) -> None:
    Tokens("s" * size, issuer="i", audience="a", algorithm=algorithm)
    with pytest.raises(ConfigError, match=f"{size - 1} bytes.* needs {size}") as caught:
        Tokens("s" * (size - 1), issuer="i", audience="a", algorithm=algorithm)
    assert "sss" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"issuer": ""},
        {"audience": ""},
        {"lifetime": timedelta(0)},
        {"lifetime": timedelta(hours=24, seconds=1)},
        {"leeway": timedelta(seconds=-1)},
        {"leeway": timedelta(seconds=61)},
        {"claim": ""},
        {"claim": "sub"},
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        tokens(**changes)


# -- J4, J14: headers ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        {"crit": ["x"], "x": 1},
        {"crit": ["exp"]},
        {"crit": []},
        {"crit": ["b64"], "b64": False},
        {"b64": False},
        {"b64": True},
        {"jku": "https://evil.example/keys"},
        {"x5u": "file:///dev/null"},
        {"jwk": {"kty": "oct", "k": "a2s"}},
        {"x5c": []},
        {"zip": "DEF"},
    ],
)
def test_a_header_that_says_how_to_read_the_token_is_refused(header: dict[str, Any]) -> None:
    refused(sign({**HEADER, **header}, CLAIMS))


@pytest.mark.parametrize("kid", ["../../dev/null", "1' OR '1'='1", "k" * 5000])
def test_a_key_id_is_never_looked_up(kid: str) -> None:
    token = sign({**HEADER, "kid": kid}, CLAIMS)

    if len(token) <= MAX_SIZE:
        assert tokens().verify(token) == CLAIMS  # one key: the id chooses nothing, opens nothing
    else:
        refused(token)


@pytest.mark.parametrize("kid", [{"a": 1}, 7, None, ["x"]])
def test_a_key_id_that_is_no_string_is_refused(kid: Any) -> None:
    refused(sign({**HEADER, "kid": kid}, CLAIMS))


# -- J5, J6, J8, J9: claims ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exp", "iat", "aud", "iss", "sub"])
def test_a_token_without_a_required_claim_is_refused(name: str) -> None:
    refused(sign(HEADER, without(name)))
    refused(sign(HEADER, {**CLAIMS, name: None}))


@pytest.mark.parametrize("name", ["exp", "iat", "nbf"])
@pytest.mark.parametrize("value", [str(NOW), FULL_WIDTH, True, False, None, [], {}, -1, 10**400, 1e308])
def test_a_time_that_is_not_a_json_number_of_seconds_is_refused(name: str, value: Any) -> None:
    refused(sign(HEADER, {**CLAIMS, name: value}))


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000])
def test_a_time_that_only_a_lax_parser_reads_is_refused(literal: str) -> None:
    refused(sign(HEADER, json.dumps({**CLAIMS, "exp": "?"}).replace('"?"', literal)))


def test_a_payload_that_is_not_json_by_its_rfc_is_refused() -> None:
    refused(sign(HEADER, json.dumps({**CLAIMS, "weight": float("nan")})))


def test_a_fraction_of_a_second_is_a_number_too() -> None:
    assert tokens().verify(sign(HEADER, {**CLAIMS, "iat": NOW - 0.5, "exp": NOW + 60.5}))["exp"] == NOW + 60.5


@pytest.mark.parametrize(("late", "good"), [(29, True), (30, False), (31, False)])
def test_a_token_expires_at_the_end_of_the_leeway(late: int, good: bool) -> None:
    clock = Clock()
    clock.now = CLAIMS["exp"] + late

    if good:
        assert tokens(clock=clock).verify(sign(HEADER, CLAIMS))
    else:
        assert "expired" in refused(sign(HEADER, CLAIMS), tokens(clock=clock))


@pytest.mark.parametrize("name", ["iat", "nbf"])
@pytest.mark.parametrize(("early", "good"), [(30, True), (31, False)])
def test_a_token_from_the_future_is_refused(name: str, early: int, good: bool) -> None:
    token = sign(HEADER, {**CLAIMS, name: NOW + early})

    if good:
        assert tokens().verify(token)
    else:
        refused(token)


def test_a_token_that_lives_longer_than_a_day_is_refused() -> None:
    assert tokens().verify(sign(HEADER, {**CLAIMS, "exp": NOW + 86_400}))
    refused(sign(HEADER, {**CLAIMS, "exp": NOW + 86_401}))
    refused(sign(HEADER, {**CLAIMS, "iat": NOW + 20, "exp": NOW + 20}))


@pytest.mark.parametrize("aud", [["clinic-api"], ["clinic-api", "other"], "clinic-api ", "other", "", {}, 1])
def test_only_our_audience_alone_is_accepted(aud: Any) -> None:
    refused(sign(HEADER, {**CLAIMS, "aud": aud}))


@pytest.mark.parametrize("iss", [["clinic"], {"clinic": 1}, "clini", "clinic.evil", "", 1])
def test_only_our_issuer_is_accepted(iss: Any) -> None:
    refused(sign(HEADER, {**CLAIMS, "iss": iss}))


@pytest.mark.parametrize("claims", [{"sub": ""}, {"sub": 7}, {"sub": ["u1"]}, {"jti": 7}, {"jti": None}])
def test_a_user_or_an_id_that_is_no_string_is_refused(claims: dict[str, Any]) -> None:
    refused(sign(HEADER, {**CLAIMS, **claims}))


# -- J10, J11, J12, J13 ----------------------------------------------------------------------------------------------------------------


def test_a_claim_given_twice_is_refused_whichever_comes_last() -> None:
    text = json.dumps(CLAIMS)
    twice = text[:-1] + f', "tenant_id": "{TENANT}"}}'

    assert json.loads(twice) == CLAIMS  # what a parser that keeps the last one sees
    refused(sign(HEADER, twice))
    refused(sign(HEADER, text[:-1] + ', "deep": {"a": 1, "a": 2}}'))


@pytest.mark.parametrize("typ", ["JWT", "rt+jwt", "AT+JWT", "", None, 1, ["at+jwt"]])
def test_a_token_of_another_type_is_no_access_token(typ: Any) -> None:
    refused(sign({**HEADER, "typ": typ}, CLAIMS))
    refused(sign({"alg": "HS256"}, CLAIMS))


def test_a_token_over_eight_kilobytes_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = tokens()
    monkeypatch.setattr(verifier, "_jws", None)  # whoever parses now fails otherwise

    refused(sign(HEADER, {**CLAIMS, "x": "x" * MAX_SIZE}), verifier)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_nesting_is_refused_like_any_other_nonsense(opening: str) -> None:
    nested = opening * (6000 // len(opening))

    refused(sign(nested, CLAIMS))
    refused(sign(HEADER, nested))
    refused(sign(HEADER, "[" * 2900 + "]" * 2900))


@pytest.mark.parametrize("payload", ["[]", "1", '"text"', "null", "", "{", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")])
def test_a_payload_that_is_no_object_is_refused(payload: str) -> None:
    refused(sign(HEADER, payload))


def test_a_token_has_one_spelling() -> None:
    token = sign(HEADER, CLAIMS)

    assert tokens().verify(token)
    for more in ("=", "==", "\n", ".", "é", "\0"):
        refused(token + more)
    refused(" " + token)
    refused(token.replace(".", "..", 1))


@pytest.mark.parametrize("token", ["", ".", "..", "a.b.c", "Bearer x", None, 7, b"a.b.c", "\ud800.a.b", "🦊.🦊.🦊", "\uff05.\uff05.\uff05"])
def test_what_is_no_token_is_refused(token: Any) -> None:
    refused(token)


@given(st.text(max_size=200) | st.from_regex(r"[A-Za-z0-9_-]{1,80}\.[A-Za-z0-9_-]{1,80}\.[A-Za-z0-9_-]{1,80}", fullmatch=True))
def test_whatever_comes_is_an_invalid_token_and_never_another_error(text: str) -> None:
    refused(text)


@given(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8) | st.lists(st.text(max_size=8), max_size=3))
def test_whatever_a_claim_holds_is_never_another_error(value: Any) -> None:
    for name in CLAIMS:
        try:
            tokens().verify(sign(HEADER, {**CLAIMS, name: value}))
        except InvalidToken:
            continue
        assert isinstance(value, str if name not in {"exp", "iat"} else int | float)


# -- J22: the tenant -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        str(TENANT).upper(),
        "{" + str(TENANT) + "}",
        f"urn:uuid:{TENANT}",
        TENANT.hex,
        str(TENANT).replace("-", "_"),
        " " + str(TENANT),
        str(TENANT) + "\n",
        "+" + str(TENANT)[1:],
        "0x" + str(TENANT)[2:],
        FULL_WIDTH[2] + str(TENANT)[1:],
        "0-190f3a17c2e7b519c435d1c2f3a4b5c---",
        "acme",
        "",
        None,
        7,
        [str(TENANT)],
        {"id": str(TENANT)},
    ],
)
def test_a_tenant_in_another_form_than_the_canonical_one_is_refused(value: Any) -> None:
    refused(sign(HEADER, {**CLAIMS, "tenant_id": value}))


# -- issuing ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["iss", "aud", "sub", "iat", "exp", "nbf", "jti", "role", "tenant_id"])
def test_further_claims_cannot_take_the_place_of_ours(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        tokens().issue("u1", claims={name: "x"})


def test_a_token_that_would_be_refused_is_not_issued() -> None:
    for wrong in ({"claims": {"x": "x" * MAX_SIZE}}, {"claims": {"x": float("nan")}}, {"tenant": "acme"}):
        with pytest.raises(ValueError, match=r"characters|JSON|UUID|hexadecimal"):
            tokens().issue("u1", **wrong)
    with pytest.raises(ValueError, match="user"):
        tokens().issue("")


def test_neither_key_nor_token_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = hashlib.sha256(b"canary").hexdigest()
    issued = tokens(key=secret)
    token = issued.issue("u1", TENANT)

    problem = refused(token[:-2] + "AA", issued)

    assert secret not in repr(issued) + problem + caplog.text and token[:40] not in problem + caplog.text
