from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import secrets
import string
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import jwt
import jwt.algorithms
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x25519
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import example, given
from hypothesis import strategies as st

from tenantdb.errors import ConfigError, InvalidToken
from tenantdb.jwks import JWKS
from tenantdb.tokens import MAX_SIZE, Key, Tokens

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
    free = tokens(tenant_required=False)

    assert "tenant_id" not in free.verify(free.issue("u1"))


def test_a_token_without_a_tenant_is_neither_issued_nor_accepted_unless_it_is_said_to_be_enough() -> None:
    with pytest.raises(ValueError, match="tenant_required=False"):
        tokens().issue("u1")
    refused(sign(HEADER, without("tenant_id")))
    assert tokens(tenant_required=False).verify(sign(HEADER, without("tenant_id"))) == without("tenant_id")


def test_a_tenant_that_is_no_id_is_refused_also_where_none_is_required() -> None:
    for value in ("acme", None, "", 7):
        refused(sign(HEADER, {**CLAIMS, "tenant_id": value}), tokens(tenant_required=False))


def test_every_token_has_an_id_of_its_own() -> None:
    issued = tokens()

    assert issued.verify(issued.issue("u1", TENANT))["jti"] != issued.verify(issued.issue("u1", TENANT))["jti"]


@pytest.mark.parametrize("now", [NOW + 0.0006, NOW + 0.9999, NOW + 0.5, float(NOW)])
def test_a_token_is_good_at_once_and_says_when_it_was_issued_more_finely_than_in_seconds(now: float) -> None:
    clock = Clock()
    clock.now = now
    strict = tokens(clock=clock, leeway=timedelta(0), lifetime=timedelta(hours=24))

    claims = strict.verify(strict.issue("u1", TENANT))

    assert now - 0.0011 < claims["iat"] <= now < claims["exp"] <= claims["iat"] + 86_400


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


@pytest.mark.parametrize("algorithm", ["none", "ES256K", "ES521", "Ed25519", "hs256", " HS256"])
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
        {"typ": ""},
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        tokens(**changes)


# -- keys ------------------------------------------------------------------------------------------------------------------------------


def pem(private: Any) -> str:
    return str(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode())


def public_pem(private: Any) -> str:
    return str(private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode())


RSA = rsa.generate_private_key(65537, 2048)
SHORT_RSA = rsa.generate_private_key(65537, 1024)
CURVES: dict[str, ec.EllipticCurve] = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}
PRIVATE: dict[str, Any] = {
    **dict.fromkeys(["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"], RSA),
    **{algorithm: ec.generate_private_key(curve) for algorithm, curve in CURVES.items()},
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}


@pytest.mark.parametrize("algorithm", PRIVATE)
def test_a_private_key_issues_what_its_public_key_verifies_and_cannot_issue(algorithm: str) -> None:
    issuing = tokens(key=Key(pem(PRIVATE[algorithm]), algorithm))
    verifying = tokens(key=Key(public_pem(PRIVATE[algorithm]), algorithm))

    token = issuing.issue("u1", TENANT)

    assert verifying.verify(token) == issuing.verify(token)
    assert jwt.get_unverified_header(token)["alg"] == algorithm
    refused(token, tokens())
    refused(token[:-4] + ("AAAA" if token[-4:] != "AAAA" else "AAAE"), verifying)
    with pytest.raises(ConfigError, match="private key"):
        verifying.issue("u1", TENANT)


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512", *PRIVATE])
def test_pyjwt_reads_our_tokens_and_we_read_pyjwts(algorithm: str) -> None:
    secret: Any = "s" * 64 if algorithm.startswith("HS") else pem(PRIVATE[algorithm])
    public: Any = secret if algorithm.startswith("HS") else public_pem(PRIVATE[algorithm])
    ours = tokens(key=secret, algorithm=algorithm)
    theirs = jwt.encode(CLAIMS, secret, algorithm, {"typ": "at+jwt"})

    assert ours.verify(theirs) == CLAIMS
    options: Any = {"verify_exp": False, "verify_iat": False}
    token = ours.issue("u1", TENANT)
    assert jwt.decode(token, public, [algorithm], audience="clinic-api", issuer="clinic", options=options) == ours.verify(token)


@pytest.mark.parametrize("theirs", PRIVATE)
@pytest.mark.parametrize("ours", PRIVATE)
def test_a_token_of_another_algorithm_than_its_keys_is_refused_though_the_key_could_verify_it(ours: str, theirs: str) -> None:
    verifying = tokens(key=Key(public_pem(PRIVATE[ours]), ours))
    token = jwt.encode(CLAIMS, pem(PRIVATE[theirs]), theirs, {"typ": "at+jwt"})

    if ours == theirs:
        assert verifying.verify(token) == CLAIMS
    else:
        refused(token, verifying)


def spki(private: Any, encoding: Encoding) -> bytes:
    return bytes(private.public_key().public_bytes(encoding, PublicFormat.SubjectPublicKeyInfo))


@pytest.mark.parametrize("private", [RSA, PRIVATE["ES256"], PRIVATE["EdDSA"]])
@pytest.mark.parametrize("hash_name", ["sha256", "sha384", "sha512"])
def test_a_public_key_as_the_secret_of_a_forged_token_opens_nothing(private: Any, hash_name: str) -> None:
    algorithm = next(name for name, key in PRIVATE.items() if key is private)
    verifying = tokens(key=Key(public_pem(private), algorithm, kid="k1"))
    header = {"alg": f"HS{hash_name[3:]}", "typ": "at+jwt", "kid": "k1"}
    spellings = [public_pem(private).encode(), public_pem(private).strip().encode(), spki(private, Encoding.DER)]
    spellings += [jwt.algorithms.get_default_algorithms()[algorithm].to_jwk(private.public_key()).encode()]

    for secret in spellings:
        refused(sign(header, CLAIMS, key=secret, hash_name=hash_name), verifying)


@pytest.mark.parametrize("private", [RSA, PRIVATE["ES512"], PRIVATE["EdDSA"]])
def test_a_public_key_in_any_wrapping_cannot_be_the_secret_of_a_symmetric_algorithm(private: Any) -> None:
    armoured = public_pem(private)
    algorithm = next(name for name, key in PRIVATE.items() if key is private)
    der = spki(private, Encoding.DER)
    jwk = jwt.algorithms.get_default_algorithms()[algorithm].to_jwk(private.public_key())
    bare = "".join(armoured.splitlines()[1:-1])  # as consoles of identity providers show it

    wrappings: list[str | bytes] = [
        armoured,
        armoured.replace("\n", "\r\n"),
        "  " + armoured,
        der,
        jwk,
        bare,
        "\n".join(armoured.splitlines()[1:-1]),
    ]
    wrappings += [json.dumps({"keys": [json.loads(jwk)]}), pem(private)]
    for wrapping in wrappings:
        with pytest.raises(ConfigError, match="random bytes"):
            tokens(key=Key(wrapping))


def test_a_bare_public_key_would_be_a_secret_that_everybody_knows_if_nobody_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = "".join(public_pem(RSA).splitlines()[1:-1])
    monkeypatch.setattr("tenantdb.jwks._refuse_unarmoured", lambda method, raw: None)

    assert tokens(key=bare).verify(sign(HEADER, CLAIMS, key=bare.encode())) == CLAIMS


@pytest.mark.parametrize("make", [lambda: secrets.token_urlsafe(48), lambda: secrets.token_hex(32), lambda: secrets.token_bytes(32)])
def test_a_secret_that_is_really_random_is_taken_in_every_spelling(make: Callable[[], str | bytes]) -> None:
    for _ in range(50):
        issued = tokens(key=make())
        assert issued.verify(issued.issue("u1", TENANT))
    tokens(key=base64.b64encode(secrets.token_bytes(48)))


@pytest.mark.parametrize(
    ("algorithm", "key", "why"),
    [
        ("RS256", pem(SHORT_RSA), "too weak"),
        ("RS256", public_pem(SHORT_RSA), "too weak"),
        ("PS512", pem(SHORT_RSA), "too weak"),
        ("ES256", pem(PRIVATE["ES384"]), "own kind"),
        ("ES256", public_pem(PRIVATE["ES384"]), "own kind"),
        ("ES384", public_pem(PRIVATE["ES256"]), "own kind"),
        ("ES256", pem(ec.generate_private_key(ec.SECP256K1())), "own kind"),
        ("ES256", pem(RSA), "own kind"),
        ("RS256", pem(PRIVATE["ES256"]), "own kind"),
        ("RS256", pem(PRIVATE["EdDSA"]), "own kind"),
        ("EdDSA", pem(RSA), "own kind"),
        ("EdDSA", public_pem(PRIVATE["ES256"]), "own kind"),
        ("EdDSA", pem(x25519.X25519PrivateKey.generate()), "own kind"),
        ("RS256", "s" * 64, "own kind"),
        ("EdDSA", "s" * 64, "own kind"),
        ("ES256", b"\xff\xfe" * 40, "own kind"),
        ("EdDSA", b"\xff\xfe" * 40, "own kind"),
        ("RS256", "", "own kind"),
        ("HS256", "", "0 bytes"),
    ],
)
def test_a_key_that_does_not_go_with_its_algorithm_is_refused_at_the_start(algorithm: str, key: str | bytes, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        tokens(key=Key(key, algorithm))
    assert "BEGIN" not in str(caught.value)


def test_a_private_key_with_a_password_is_refused_and_the_password_is_not_asked_for() -> None:
    locked = RSA.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))

    for algorithm in ("RS256", "ES256", "EdDSA"):
        with pytest.raises(ConfigError, match="without a password"):
            tokens(key=Key(locked, algorithm))


@pytest.mark.parametrize("several", [[Key(KEY), Key(pem(RSA), "RS256")], [Key(public_pem(RSA), "RS256"), Key(b"x" * 64, "HS512")]])
def test_symmetric_and_asymmetric_keys_do_not_go_together(several: list[Key]) -> None:
    with pytest.raises(ConfigError, match="not both"):
        tokens(key=several)


@pytest.mark.parametrize("several", [[Key(KEY), Key(KEY)], [Key(KEY, kid="a"), Key(b"x" * 32, kid="a")]])
def test_two_keys_with_one_name_are_refused(several: list[Key]) -> None:
    with pytest.raises(ConfigError, match="one name"):
        tokens(key=several)


@pytest.mark.parametrize("nothing", [None, [], (), 7 * [KEY], [None], Key(None), Key(KEY, kid="")])  # type: ignore[arg-type]
def test_what_is_no_key_is_a_configuration_error(nothing: Any) -> None:
    with pytest.raises(ConfigError, match="key"):
        tokens(key=nothing)


def test_an_algorithm_beside_a_key_that_has_its_own_is_refused_rather_than_ignored() -> None:
    for key in (Key(KEY), [Key(KEY)], JWKS("https://issuer.example/jwks.json")):
        with pytest.raises(ConfigError, match="algorithm="):
            tokens(key=key, algorithm="HS256")


def test_another_issuers_key_set_issues_nothing() -> None:
    with pytest.raises(ConfigError, match="another's to issue"):
        tokens(key=JWKS("https://issuer.example/jwks.json")).issue("u1", TENANT)


# -- several keys ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [(Key(KEY), Key(b"x" * 32)), (Key(pem(RSA), "RS256"), Key(pem(PRIVATE["EdDSA"]), "EdDSA"))])
def test_a_key_is_replaced_without_a_token_that_fails_meanwhile(old: Key, new: Key) -> None:
    before, told, replaced, after = tokens(key=old), tokens(key=[old, new]), tokens(key=[new, old]), tokens(key=[new])
    of_old, of_new = before.issue("u1", TENANT), replaced.issue("u1", TENANT)

    for who in (before, told, replaced):
        assert who.verify(of_old)
    for who in (told, replaced, after):
        assert who.verify(of_new)
    assert told.verify(told.issue("u1", TENANT)) and before.verify(told.issue("u1", TENANT))  # the first one issues
    assert "key" in refused(of_old, after) and "key" in refused(of_new, before)


def test_the_name_of_a_key_chooses_it_and_not_who_signed() -> None:
    verifier = tokens(key=[Key(KEY, kid="a"), Key(b"x" * 32, kid="b")])

    assert verifier.verify(sign({**HEADER, "kid": "a"}, CLAIMS)) == CLAIMS
    assert verifier.verify(sign({**HEADER, "kid": "b"}, CLAIMS, key=b"x" * 32)) == CLAIMS
    refused(sign({**HEADER, "kid": "b"}, CLAIMS), verifier)
    refused(sign({**HEADER, "kid": "A"}, CLAIMS), verifier)


def test_a_token_that_names_no_key_is_accepted_only_where_there_is_no_choice() -> None:
    token = sign(HEADER, CLAIMS)

    assert tokens().verify(token) == CLAIMS
    assert "key" in refused(token, tokens(key=[Key(KEY), Key(b"x" * 32)]))


def test_each_of_several_keys_keeps_its_own_algorithm() -> None:
    long = b"k" * 64
    verifier = tokens(key=[Key(long, "HS512", kid="new"), Key(long[:32], "HS256", kid="old")])

    assert verifier.verify(sign({**HEADER, "alg": "HS512", "kid": "new"}, CLAIMS, key=long, hash_name="sha512")) == CLAIMS
    refused(sign({**HEADER, "alg": "HS256", "kid": "new"}, CLAIMS, key=long), verifier)
    refused(sign({**HEADER, "alg": "HS512", "kid": "old"}, CLAIMS, key=long[:32], hash_name="sha512"), verifier)


def test_a_key_without_a_name_has_the_same_one_in_every_process_and_shows_nothing_of_itself() -> None:
    first, second = tokens(key=Key(KEY)), tokens(key=Key(KEY))
    name = jwt.get_unverified_header(first.issue("u1", TENANT))["kid"]

    assert name == jwt.get_unverified_header(second.issue("u1", TENANT))["kid"] and len(name) == 8
    assert "kkk" not in repr(Key(KEY)) and "PRIVATE" not in repr(Key(pem(RSA), "RS256"))
    public = tokens(key=[Key(b"x" * 32), Key(KEY)])
    assert public.verify(first.issue("u1", TENANT))


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


@pytest.mark.parametrize(
    "kid", ["../../dev/null", "1' OR '1'='1", "https://evil.example/key", "k" * 5000, "k" * 10_000, "", {"a": 1}, 7, None, ["x"]]
)
@pytest.mark.parametrize("several", [True, False])
def test_a_key_id_is_only_compared_with_the_names_of_our_keys(kid: Any, several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = tokens(key=[Key(KEY, kid="k1"), Key(b"x" * 32, kid="k2")] if several else Key(KEY, kid="k1"))
    for name in ("builtins.open", "socket.socket", "socket.getaddrinfo", "threading.Thread.start"):
        monkeypatch.setattr(name, None)  # whoever opens, connects or starts something now fails otherwise

    assert verifier.verify(sign({**HEADER, "kid": "k1"}, CLAIMS)) == CLAIMS
    refused(sign({**HEADER, "kid": kid}, CLAIMS), verifier)


def test_what_only_names_a_certificate_is_no_harm_because_nobody_reads_it() -> None:
    assert tokens().verify(sign({**HEADER, "x5t": "c2hhMQ"}, CLAIMS)) == CLAIMS


def test_a_name_given_twice_in_the_header_is_refused_whichever_comes_last() -> None:
    text = json.dumps(HEADER)

    assert tokens().verify(sign(text, CLAIMS)) == CLAIMS
    refused(sign(text[:-1] + ', "alg": "HS256"}', CLAIMS))
    refused(sign('{"alg": "none", ' + text[1:], CLAIMS))


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


@pytest.mark.parametrize("value", ["", 7, ["u1"], None, "u\0", "u\n1", "\ud800", "\N{RIGHT-TO-LEFT OVERRIDE}u1", "u" * 256])
@pytest.mark.parametrize("claim", ["sub", "jti"])
def test_a_user_or_an_id_that_no_log_and_no_database_could_hold_is_refused(claim: str, value: Any) -> None:
    refused(sign(HEADER, {**CLAIMS, claim: value}))


def test_a_token_need_not_have_an_id() -> None:
    assert tokens().verify(sign(HEADER, without("jti"))) == without("jti")


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
    parsed: list[object] = []

    def parse(segment: object) -> dict[str, Any]:
        parsed.append(segment)
        return {}

    monkeypatch.setattr("tenantdb.tokens._decoded", parse)

    for large in (sign(HEADER, {**CLAIMS, "x": "x" * MAX_SIZE}), "a.b." + "c" * 50_000_000, sign(HEADER, "[" * 100_000)):
        assert "at most" in refused(large)
    assert parsed == []
    refused(sign(HEADER, {**CLAIMS, "x": "x" * (MAX_SIZE // 2)}))
    assert len(parsed) == 1


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_nesting_is_refused_like_any_other_nonsense(opening: str) -> None:
    nested = opening * (6000 // len(opening))

    refused(sign(nested, CLAIMS))
    refused(sign(HEADER, nested))
    refused(sign(HEADER, "[" * 2900 + "]" * 2900))
    refused(sign(HEADER, json.dumps(CLAIMS)[:-1] + ', "x": ' + "[" * 2700 + "]" * 2700 + "}"))


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


def test_the_bits_that_a_signature_has_to_spare_give_a_token_no_second_spelling() -> None:
    token = sign(HEADER, CLAIMS)
    alphabet = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
    neighbour = token[:-1] + alphabet[alphabet.index(token[-1]) ^ 1]

    assert base64.urlsafe_b64decode(neighbour.split(".")[2] + "=") == base64.urlsafe_b64decode(token.split(".")[2] + "=")
    refused(neighbour)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-32"])
def test_what_is_not_utf_8_is_refused_where_a_lax_parser_guesses(encoding: str) -> None:
    encoded = json.dumps(CLAIMS).encode(encoding)
    signed = f"{b64(json.dumps(HEADER).encode())}.{b64(encoded)}"

    assert json.loads(encoded) == CLAIMS
    refused(f"{signed}.{b64(hmac.new(KEY, signed.encode(), 'sha256').digest())}")


@pytest.mark.parametrize("token", ["", ".", "..", "a.b.c", "Bearer x", None, 7, b"a.b.c", "\ud800.a.b", "🦊.🦊.🦊", "\uff05.\uff05.\uff05"])
def test_what_is_no_token_is_refused(token: Any) -> None:
    refused(token)


@given(st.text(max_size=200) | st.from_regex(r"[A-Za-z0-9_-]{1,80}\.[A-Za-z0-9_-]{1,80}\.[A-Za-z0-9_-]{1,80}", fullmatch=True))
def test_whatever_comes_is_an_invalid_token_and_never_another_error(text: str) -> None:
    refused(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    JSON | st.dictionaries(st.sampled_from([*HEADER, "kid", "crit", "b64", "jku"]), JSON).map(lambda changes: {**HEADER, **changes}),
    JSON | st.dictionaries(st.sampled_from([*CLAIMS, "nbf"]), JSON).map(lambda changes: {**CLAIMS, **changes}),
)
@example(HEADER, CLAIMS)
def test_whatever_the_holder_of_the_key_signs_is_good_or_an_invalid_token(header: Any, payload: Any) -> None:
    for verifier in (tokens(), tokens(key=[Key(KEY, kid="k1"), Key(b"x" * 32)])):
        try:
            claims = verifier.verify(sign(json.dumps(header), json.dumps(payload)))
        except InvalidToken:
            continue
        assert (
            claims == payload
            and header["typ"] == "at+jwt"
            and header["alg"] == "HS256"
            and str(UUID(claims["tenant_id"])) == claims["tenant_id"]
        )


@given(st.data())
def test_a_token_of_which_anything_was_changed_is_invalid(data: st.DataObject) -> None:
    token = sign(HEADER, CLAIMS)
    start = data.draw(st.integers(0, len(token)))
    end = data.draw(st.integers(start, min(len(token), start + 5)))
    changed = token[:start] + data.draw(st.text("abcAZ09-_.=+/ \0é", max_size=5)) + token[end:]

    assert tokens().verify(token)
    if changed != token:
        refused(changed)


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
    faults: list[dict[str, Any]] = [{"claims": {"x": "x" * MAX_SIZE}}, {"claims": {"x": float("nan")}}, {"tenant": "acme"}]
    for wrong in faults:
        with pytest.raises(ValueError, match=r"characters|JSON|UUID|hexadecimal"):
            tokens().issue("u1", **{"tenant": TENANT, **wrong})
    for user in ("", "u\n", "u" * 256):
        with pytest.raises(ValueError, match="user"):
            tokens().issue(user, TENANT)


def test_neither_key_nor_token_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = hashlib.sha256(b"canary").hexdigest()
    issued = tokens(key=secret)
    token = issued.issue("u1", TENANT)

    problem = refused(token[:-2] + "AA", issued)

    assert secret not in repr(issued) + problem + caplog.text and token[:40] not in problem + caplog.text
