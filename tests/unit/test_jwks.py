"""Another issuer's key set, fetched over real sockets from servers that behave as badly as they can."""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import logging
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa, x25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import get_default_algorithms

from tenantdb import jwks
from tenantdb.errors import ConfigError, InvalidToken, TokenKeysUnavailable
from tenantdb.jwks import JWKS, LONGEST_STALE, MAX_BYTES
from tenantdb.tokens import Tokens
from tests.world import eventually

NOW = 1_800_000_000
TENANT = UUID("0190f3a1-7c2e-7b51-9c43-5d1c2f3a4b5c")
METHODS = get_default_algorithms()
FIRST, SECOND = rsa.generate_private_key(65537, 2048), rsa.generate_private_key(65537, 2048)


class Clock:
    """Seconds that pass when a test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Issuer:
    """A server that answers what it is told to, counts who asks, and can keep an asker waiting for as long as a test likes."""

    def __init__(self) -> None:
        self.asked = 0
        self.arrived = threading.Event()  # somebody waits for an answer
        self.go = threading.Event()  # and gets it
        self.go.set()
        self.answer: Callable[[BaseHTTPRequestHandler], None] = lambda request: None
        self.url = ""

    def serves(self, body: object, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()

        def answer(request: BaseHTTPRequestHandler) -> None:
            request.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                request.send_header(name, value)
            request.end_headers()
            request.wfile.write(data)

        self.answer = answer


@contextmanager
def serving(context: ssl.SSLContext | None = None) -> Iterator[Issuer]:
    issuer = Issuer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            issuer.asked += 1
            issuer.arrived.set()
            issuer.go.wait(60)
            try:
                issuer.answer(self)
            except OSError:  # the client has gone
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None: ...

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None: ...  # a client that goes away is no news

    with Server(("127.0.0.1", 0), Handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        issuer.url = f"{'http' if context is None else 'https'}://127.0.0.1:{server.server_port}/keys"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield issuer
        finally:
            issuer.go.set()
            server.shutdown()
            thread.join()


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with serving() as found:
        found.serves({"keys": [public(FIRST, "RS256", "k1")]})
        yield found


@pytest.fixture
def clock() -> Clock:
    return Clock()


def public(private: Any, algorithm: str, kid: str | None, **changes: Any) -> dict[str, Any]:
    """The public half as a JWK, with what is changed; None leaves a member out."""
    data: dict[str, Any] = METHODS[algorithm].to_jwk(private.public_key(), as_dict=True)
    data = {**data, "kid": kid, "alg": algorithm, "use": "sig", **changes}
    return {name: value for name, value in data.items() if value is not None}


def keys_of(issuer: Issuer, clock: Clock, **changes: Any) -> JWKS:
    return JWKS(issuer.url, **{"clock": clock, **changes})


def tokens_of(keys: JWKS) -> Tokens:
    return Tokens(keys, issuer="https://issuer.example/", audience="clinic-api", typ="JWT", clock=lambda: NOW)


def signed(private: Any, algorithm: str, kid: str | None) -> str:
    claims = {
        "iss": "https://issuer.example/",
        "aud": "clinic-api",
        "sub": "auth0|1",
        "iat": NOW,
        "exp": NOW + 900,
        "tenant_id": str(TENANT),
    }
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return jwt.encode(claims, pem, algorithm, {} if kid is None else {"kid": kid})


def knows(keys: JWKS, kid: str) -> bool:
    try:
        return keys.key(kid).kid == kid
    except InvalidToken:
        return False


def idle(keys: JWKS) -> None:
    """Wait until nobody fetches."""
    eventually(lambda: not keys._turn.locked())


# -- what is fetched -------------------------------------------------------------------------------------------------------------------


def test_a_token_of_the_issuer_is_good_once_its_keys_were_fetched(issuer: Issuer, clock: Clock) -> None:
    tokens = tokens_of(keys_of(issuer, clock))

    tokens.start()

    assert tokens.verify(signed(FIRST, "RS256", "k1"))["sub"] == "auth0|1"
    for wrong in (signed(SECOND, "RS256", "k1"), signed(FIRST, "RS256", "k2"), signed(FIRST, "RS256", None), signed(FIRST, "RS512", "k1")):
        with pytest.raises(InvalidToken):
            tokens.verify(wrong)


OTHERS: dict[str, Any] = {
    "PS256": FIRST,
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "ES384": ec.generate_private_key(ec.SECP384R1()),
    "ES512": ec.generate_private_key(ec.SECP521R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("algorithm", OTHERS)
def test_a_key_that_does_not_say_its_algorithm_takes_the_one_that_fits(algorithm: str, says: bool, issuer: Issuer, clock: Clock) -> None:
    data = public(OTHERS[algorithm], algorithm, "k1")
    issuer.serves({"keys": [data if says else {name: value for name, value in data.items() if name not in ("alg", "use")}]})
    keys = keys_of(issuer, clock, algorithms=list(OTHERS))

    assert keys.refresh()
    assert keys.key("k1").algorithm == algorithm
    assert tokens_of(keys).verify(signed(OTHERS[algorithm], algorithm, "k1"))


WEAK = rsa.generate_private_key(65537, 1024)
UNUSABLE: dict[str, Any] = {
    "symmetric": {"kty": "oct", "k": base64.urlsafe_b64encode(b"k" * 32).decode(), "kid": "bad", "alg": "HS256", "use": "sig"},
    "symmetric, posing as RSA": {"kty": "oct", "k": "a2s", "kid": "bad", "alg": "RS256"},
    "symmetric in an RSA key": public(FIRST, "RS256", "bad", alg="HS256"),
    "private": {**METHODS["RS256"].to_jwk(FIRST, as_dict=True), "kid": "bad", "alg": "RS256"},
    "private EC": {**METHODS["ES256"].to_jwk(OTHERS["ES256"], as_dict=True), "kid": "bad", "alg": "ES256"},
    "for encryption": public(FIRST, "RS256", "bad", use="enc"),
    "for encryption, by its algorithm": public(FIRST, "RS256", "bad", alg="RSA-OAEP"),
    "for signing alone": public(FIRST, "RS256", "bad", key_ops=["sign"]),
    "of an algorithm that we did not ask for": public(FIRST, "RS256", "bad", alg="PS512"),
    "an algorithm that is none": public(FIRST, "RS256", "bad", alg="none"),
    "EC of another curve": public(ec.generate_private_key(ec.SECP256K1()), "ES256K", "bad", alg=None),
    "EC that says another curve's algorithm": public(OTHERS["ES384"], "ES384", "bad", alg="ES256"),
    "a point that is not on the curve": {**public(OTHERS["ES256"], "ES256", "bad"), "y": "A" * 43},
    "RSA of 1024 bits": public(WEAK, "RS256", "bad"),
    "RSA that says an EC algorithm": public(FIRST, "RS256", "bad", alg="ES256"),
    "RSA without a modulus": {"kty": "RSA", "kid": "bad", "alg": "RS256", "e": "AQAB"},
    "RSA with a modulus that is a number": {"kty": "RSA", "kid": "bad", "alg": "RS256", "e": "AQAB", "n": 7},
    "RSA with an exponent of one": public(FIRST, "RS256", "bad", e="AQ"),
    "a key exchange": {
        "kty": "OKP",
        "crv": "X25519",
        "x": base64.urlsafe_b64encode(x25519.X25519PrivateKey.generate().public_key().public_bytes_raw()).decode(),
        "kid": "bad",
        "alg": "EdDSA",
    },
    "without a name": public(FIRST, "RS256", None),
    "with a name that is a list": {**public(FIRST, "RS256", "bad"), "kid": ["bad"]},
    "an algorithm that is a list": public(FIRST, "RS256", "bad", alg=["RS256"]),
    "operations that are a number": public(FIRST, "RS256", "bad", key_ops=7),
    "no object": "bad",
    "a list": ["bad"],
    "null": None,
    "empty": {},
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_key_that_cannot_be_used_is_left_out_and_spoils_no_other(what: str, issuer: Issuer, clock: Clock) -> None:
    issuer.serves({"keys": [UNUSABLE[what], public(FIRST, "RS256", "k1"), UNUSABLE[what]]})
    keys = keys_of(issuer, clock, algorithms=["RS256", "ES256", "EdDSA"])

    assert keys.refresh()

    assert keys.key("k1").algorithm == "RS256"
    with pytest.raises(InvalidToken):
        keys.key("bad")


def test_the_secret_of_a_symmetric_key_in_the_set_signs_nothing(issuer: Issuer, clock: Clock) -> None:
    issuer.serves({"keys": [UNUSABLE["symmetric"], public(FIRST, "RS256", "k1")]})
    keys = keys_of(issuer, clock)
    keys.refresh()

    for kid in ("bad", "k1"):
        with pytest.raises(InvalidToken):
            tokens_of(keys).verify(jwt.encode({"sub": "x"}, b"k" * 32, "HS256", {"kid": kid}))


def test_of_two_keys_with_one_name_the_first_holds(issuer: Issuer, clock: Clock) -> None:
    issuer.serves({"keys": [public(FIRST, "RS256", "k1"), public(OTHERS["ES256"], "ES256", "k1"), public(SECOND, "RS256", "k1")]})
    keys = keys_of(issuer, clock, algorithms=["RS256", "ES256"])
    keys.refresh()
    tokens = tokens_of(keys)

    assert tokens.verify(signed(FIRST, "RS256", "k1"))
    for wrong in (signed(SECOND, "RS256", "k1"), signed(OTHERS["ES256"], "ES256", "k1")):
        with pytest.raises(InvalidToken):
            tokens.verify(wrong)


def test_an_ed448_key_is_an_edwards_key_too(issuer: Issuer, clock: Clock) -> None:
    private = ed448.Ed448PrivateKey.generate()
    issuer.serves({"keys": [public(private, "EdDSA", "k1")]})
    keys = keys_of(issuer, clock, algorithms=["EdDSA"])

    assert keys.refresh() and tokens_of(keys).verify(signed(private, "EdDSA", "k1"))


# -- what is not fetched ---------------------------------------------------------------------------------------------------------------

GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "HTML": b"<html>down for maintenance</html>",
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "no keys": b"{}",
    "keys that are null": b'{"keys": null}',
    "keys that are a number": b'{"keys": 7}',
    "keys that are text": b'{"keys": "keys"}',
    "keys that are an object": b'{"keys": {"kid": "k1"}}',
    "an empty list": b'{"keys": []}',
    "a bomb of lists": b'{"keys": ' + b"[" * 100_000,
    "a bomb of objects": b'{"keys":' * 100_000,
    "a number of a million digits": b'{"keys": ' + b"9" * 1_000_000 + b"}",
    "what is not UTF-8": b'{"keys": "\xff\xfe"}',
    "too much": json.dumps({"keys": [public(FIRST, "RS256", "k1")]}).encode() + b" " * MAX_BYTES,
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_in_place_of_a_key_set_leaves_the_known_keys(what: str, issuer: Issuer, clock: Clock) -> None:
    keys = keys_of(issuer, clock)
    assert keys.refresh()
    issuer.serves(GARBAGE[what])

    assert keys.refresh() is False

    assert tokens_of(keys).verify(signed(FIRST, "RS256", "k1"))


@pytest.mark.parametrize("status", [201, 204, 206, 301, 302, 303, 307, 308, 400, 401, 404, 429, 500, 502, 503])
def test_any_other_answer_than_a_200_is_none_and_no_redirect_is_followed(status: int, issuer: Issuer, clock: Clock) -> None:
    with serving() as elsewhere:
        elsewhere.serves({"keys": [public(SECOND, "RS256", "k2")]})
        issuer.serves({"keys": [public(SECOND, "RS256", "k2")]}, status=status, headers={"Location": elsewhere.url, "Content-Length": "0"})
        keys = keys_of(issuer, clock)

        assert keys.refresh() is False

        assert elsewhere.asked == 0
        with pytest.raises(TokenKeysUnavailable):
            keys.key("k2")


def test_a_server_that_is_not_there_is_an_outage_and_no_refusal(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:  # bound and not listening
        taken.bind(("127.0.0.1", 0))
        keys = JWKS(f"http://127.0.0.1:{taken.getsockname()[1]}/keys", clock=clock)
        tokens = tokens_of(keys)

        tokens.start()

        with pytest.raises(TokenKeysUnavailable, match="ConnectionRefusedError"):
            tokens.verify(signed(FIRST, "RS256", "k1"))
    assert "ConnectionRefusedError" in caplog.text


@contextmanager
def raw_server(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that says what it likes, byte by byte."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with listening.accept()[0] as connection:
                try:
                    connection.recv(65536)
                    talk(connection)
                except OSError:
                    pass  # the client had enough

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/keys"
        thread.join(60)
        assert not thread.is_alive()


def drip(first: bytes, again: bytes) -> Callable[[socket.socket], None]:
    """Never silent for long enough to time out, and never done."""

    def talk(connection: socket.socket) -> None:
        connection.sendall(first)
        stop = threading.Event()
        while not stop.wait(0.02):
            connection.sendall(again)

    return talk


DRIPS = {
    "a status line": (b"HTTP/1.1 200", b" "),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"A"),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a body": (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
    "a body without a length": (b"HTTP/1.1 200 OK\r\n\r\n", b" "),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
}


@pytest.mark.parametrize("what", DRIPS)
def test_a_server_that_sends_a_byte_at_a_time_for_ever_is_given_up(what: str, clock: Clock) -> None:
    with raw_server(drip(*DRIPS[what])) as url:
        keys = JWKS(url, clock=clock, timeout=0.3)

        assert keys.refresh() is False  # or this test never ends

        with pytest.raises(TokenKeysUnavailable, match="TimeoutError"):
            keys.key("k1")


@pytest.mark.parametrize("bounded", [True, False])
def test_what_bounds_an_answer_as_a_whole_is_the_clock_and_not_the_sockets_timeout(
    bounded: bool, issuer: Issuer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()
    monkeypatch.setattr(jwks, "time", SimpleNamespace(monotonic=lambda: 100.0 * next(calls)))  # a slow answer, in a moment
    if not bounded:
        monkeypatch.setattr(jwks._HTTPConnection, "response_class", http.client.HTTPResponse)

    assert keys_of(issuer, clock).refresh() is not bounded


# -- when it is fetched ----------------------------------------------------------------------------------------------------------------


def test_before_the_first_fetch_nobody_is_told_that_his_token_is_bad(issuer: Issuer, clock: Clock) -> None:
    keys = keys_of(issuer, clock)
    tokens = tokens_of(keys)

    with pytest.raises(TokenKeysUnavailable) as caught:
        tokens.verify(signed(FIRST, "RS256", "k1"))
    assert (caught.value.http_status, caught.value.retryable) == (503, True)

    idle(keys)  # the question has fetched them
    assert tokens.verify(signed(FIRST, "RS256", "k1")) and issuer.asked == 1


def test_what_is_no_token_of_this_kind_asks_nobody(issuer: Issuer, clock: Clock) -> None:
    tokens = tokens_of(keys_of(issuer, clock))

    for wrong in ("", "a.b.c", jwt.encode({}, b"k" * 32, "HS256", {"typ": "at+jwt", "kid": "k1"}), "x" * 9000):
        with pytest.raises(InvalidToken):
            tokens.verify(wrong)

    assert issuer.asked == 0


@pytest.mark.parametrize("trouble", ["500", "garbage", "hangs"])
def test_a_flood_of_unknown_key_ids_is_one_fetch_per_cooldown_and_waits_for_none(trouble: str, issuer: Issuer, clock: Clock) -> None:
    keys = keys_of(issuer, clock, cooldown=10.0)
    tokens = tokens_of(keys)
    tokens.start()
    good = signed(FIRST, "RS256", "k1")
    if trouble == "hangs":
        issuer.go.clear()
    else:
        issuer.serves(b"garbage", status=500 if trouble == "500" else 200)
    clock.now += 10.0
    body, signature = good.split(".")[1:]

    for number in range(1000):
        header = base64.urlsafe_b64encode(json.dumps({"alg": "RS256", "typ": "JWT", "kid": f"u{number}"}).encode()).rstrip(b"=").decode()
        with pytest.raises(InvalidToken):  # also while the server is asked
            tokens.verify(f"{header}.{body}.{signature}")
    if trouble != "hangs":
        idle(keys)
    eventually(lambda: issuer.asked > 1)
    assert issuer.asked == 2  # once at the start

    clock.now += 9.9
    with pytest.raises(InvalidToken):
        keys.key("unknown")
    clock.now += 0.2
    with pytest.raises(InvalidToken):
        keys.key("unknown")
    if trouble == "hangs":
        assert issuer.asked == 2  # one at a time, however long it takes
        issuer.go.set()
    idle(keys)
    assert issuer.asked == (2 if trouble == "hangs" else 3)
    assert tokens.verify(good)


def test_without_a_cooldown_every_unknown_key_id_is_a_fetch(issuer: Issuer, clock: Clock) -> None:
    keys = keys_of(issuer, clock)
    keys.refresh()
    issuer.serves(b"", status=500)

    for number in range(5):
        keys._not_before = 0.0
        with pytest.raises(InvalidToken):
            keys.key(f"u{number}")
        idle(keys)

    assert issuer.asked == 6


def test_a_known_key_verifies_while_a_refresh_hangs(issuer: Issuer, clock: Clock) -> None:
    keys = keys_of(issuer, clock, refresh=300.0, timeout=60.0)
    tokens = tokens_of(keys)
    tokens.start()
    good = signed(FIRST, "RS256", "k1")
    issuer.go.clear()
    issuer.arrived.clear()
    clock.now += 300.0

    for _ in range(100):
        assert tokens.verify(good)
    assert issuer.arrived.wait(10) and keys._turn.locked()  # it is asked all the while, by one thread
    assert tokens.verify(good) and issuer.asked == 2
    assert [thread.name for thread in threading.enumerate()].count("tenantdb-jwks") == 1

    issuer.go.set()
    idle(keys)
    assert keys._loaded is not None and keys._loaded.fetched_at == clock.now


def test_keys_are_fetched_anew_after_a_while_and_what_was_withdrawn_is_refused(issuer: Issuer, clock: Clock) -> None:
    keys = keys_of(issuer, clock, refresh=300.0)
    keys.refresh()
    issuer.serves({"keys": [public(SECOND, "RS256", "k2")]})

    clock.now += 299.0
    assert knows(keys, "k1") and issuer.asked == 1
    clock.now += 1.0
    assert knows(keys, "k1")  # stale, while it is asked for anew
    idle(keys)

    assert knows(keys, "k2") and issuer.asked == 2
    with pytest.raises(InvalidToken):
        keys.key("k1")


def test_a_new_key_is_found_because_somebody_shows_its_name(issuer: Issuer, clock: Clock) -> None:
    keys = keys_of(issuer, clock, cooldown=10.0)
    keys.refresh()
    issuer.serves({"keys": [public(SECOND, "RS256", "k2"), public(FIRST, "RS256", "k1")]})
    clock.now += 10.0

    with pytest.raises(InvalidToken):
        keys.key("k2")
    idle(keys)

    assert knows(keys, "k2") and knows(keys, "k1")


def test_keys_that_could_not_be_fetched_again_serve_for_a_day_and_not_longer(issuer: Issuer, clock: Clock) -> None:
    keys = keys_of(issuer, clock)
    keys.refresh()
    issuer.serves(b"", status=500)

    clock.now += LONGEST_STALE
    assert knows(keys, "k1")
    idle(keys)
    clock.now += 1.0
    with pytest.raises(TokenKeysUnavailable, match="HTTPError 500"):
        keys.key("k1")
    issuer.serves({"keys": [public(FIRST, "RS256", "k1")]})
    clock.now += 60.0
    with pytest.raises(TokenKeysUnavailable):
        keys.key("k1")
    idle(keys)
    assert knows(keys, "k1")


def test_whoever_waits_for_a_refresh_waits_for_one_that_is_on_its_way_too(issuer: Issuer, clock: Clock) -> None:
    keys = keys_of(issuer, clock, timeout=60.0)
    issuer.go.clear()
    with pytest.raises(TokenKeysUnavailable):
        keys.key("k1")
    assert issuer.arrived.wait(10)
    done: list[bool] = []
    waiting = threading.Thread(target=lambda: done.append(keys.refresh()))
    waiting.start()

    issuer.go.set()
    waiting.join(30)

    assert done == [True] and knows(keys, "k1") and not keys._turn.locked()


def test_without_a_thread_to_be_had_what_is_known_still_serves(issuer: Issuer, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = keys_of(issuer, clock)
    keys.refresh()
    clock.now += 400.0

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        assert knows(keys, "k1") and not keys._turn.locked()
        with pytest.raises(InvalidToken):
            keys.key("unknown")

    clock.now += 10.0
    assert knows(keys, "k1")
    idle(keys)
    assert issuer.asked == 2


FORKING = """
import os, sys
from tenantdb.jwks import JWKS

now = 1000.0
keys = JWKS(sys.argv[1], timeout=60.0, clock=lambda: now)
assert keys.refresh()
print("fetched", flush=True)
sys.stdin.readline()
now += 400.0
keys.key("k1")  # begins to fetch, in a thread that the child will not have
sys.stdin.readline()
child = os.fork()
if child == 0:
    assert keys.key("k1").kid == "k1"
    print("known", flush=True)
    came = keys._turn.acquire(timeout=60)
    os._exit(0 if came and keys._loaded.fetched_at == now else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_believes_the_keys_and_fetches_for_itself(issuer: Issuer) -> None:
    command = [sys.executable, "-c", FORKING, issuer.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "fetched\n"
        issuer.go.clear()
        process.stdin.write("\n")
        process.stdin.flush()
        eventually(lambda: issuer.asked == 2)

        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "known\n"
        eventually(lambda: issuer.asked == 3)
        issuer.go.set()

        assert process.wait(60) == 0


# -- where it is fetched ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://issuer.example/keys",
        "http://127.0.0.1.evil.example/keys",
        "http://localhost.evil.example/keys",
        "http://127.0.0.1@evil.example/keys",
        "http://10.0.0.1/keys",
        "http://0.0.0.0/keys",
        "ftp://issuer.example/keys",
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "data:application/json,{}",
        "https:///keys",
        "//issuer.example/keys",
        "issuer.example/keys",
        "https://user:canary@issuer.example/keys",
        "https://canary@issuer.example/keys",
        "https://issuer.example:x/keys",
        "https://[::1/keys",
        "",
    ],
)
def test_a_key_set_is_fetched_with_tls_or_from_this_machine_only(url: str) -> None:
    with pytest.raises(ConfigError, match="URL") as caught:
        JWKS(url)
    assert "canary" not in str(caught.value)


def test_the_other_urls_are_taken_and_nothing_is_opened_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", None)

    for url in ("https://issuer.example/keys", "HTTPS://issuer.example:8443/keys?x=1", "http://localhost:1/k", "http://[::1]:1/k"):
        JWKS(url)


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithms": []},
        {"algorithms": "RS256"},
        {"algorithms": ["HS256"]},
        {"algorithms": ["RS256", "none"]},
        {"refresh": 0},
        {"timeout": -1},
        {"cooldown": 0},
        {"cooldown": float("nan")},
        {"refresh": float("inf")},
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(changes))}="):
        JWKS("https://issuer.example/keys", **changes)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """A certificate for this machine that no authority knows, and what a server does with it."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    today = datetime.now(timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(1)
        .not_valid_before(today - timedelta(days=1))
        .not_valid_after(today + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_bytes(made.public_bytes(Encoding.PEM))
    key = path.with_name("key.pem")
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, key)
    return path, context


def test_a_certificate_that_no_known_authority_signed_ends_the_fetch(
    certificate: tuple[Path, ssl.SSLContext], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, context = certificate
    monkeypatch.setattr(ssl, "_create_default_https_context", ssl._create_unverified_context)  # what a careless application does
    with serving(context) as issuer:
        issuer.serves({"keys": [public(FIRST, "RS256", "k1")]})
        keys = keys_of(issuer, clock)

        assert keys.refresh() is False
        with pytest.raises(TokenKeysUnavailable, match="SSLCertVerificationError"):
            keys.key("k1")
        assert issuer.asked == 0

        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        assert keys.refresh() and knows(keys, "k1")


def test_what_goes_to_this_machine_in_the_clear_goes_to_no_proxy(issuer: Issuer, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serving() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("https_proxy", proxy.url)

        assert keys_of(issuer, clock).refresh() and proxy.asked == 0
        JWKS("https://issuer.example/keys", clock=clock).refresh()  # asks the proxy for a tunnel, which it does not make

        assert issuer.asked == 1


# -- whatever comes --------------------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
MEMBERS = st.sampled_from([*public(FIRST, "RS256", "k1"), *public(OTHERS["ES256"], "ES256", "k1"), "key_ops", "d", "x5c"])
VALUES = JSON | st.sampled_from(["RSA", "EC", "OKP", "oct", "RS256", "ES256", "EdDSA", "P-256", "Ed25519", "AQAB"])


@given(
    st.dictionaries(MEMBERS, VALUES, max_size=8)
    | st.dictionaries(MEMBERS, VALUES, max_size=2).map(lambda changes: {**public(FIRST, "RS256", "k1"), **changes})
    | st.dictionaries(MEMBERS, VALUES, max_size=2).map(lambda changes: {**public(OTHERS["ES256"], "ES256", "k1"), **changes})
)
def test_whatever_a_key_holds_the_set_beside_it_is_read(data: dict[str, Any]) -> None:
    keys = JWKS("https://issuer.example/keys", algorithms=["RS256", "ES256", "EdDSA"])
    logging.getLogger("tenantdb.tokens").disabled = True
    try:
        found = keys._read(json.dumps({"keys": [data, public(SECOND, "RS256", "good")]}).encode())
    finally:
        logging.getLogger("tenantdb.tokens").disabled = False

    assert "good" in found
    assert all(key.algorithm in ("RS256", "ES256", "EdDSA") and key.signing is None for key in found.values())
    assert not any(hasattr(key.verifying, "private_bytes") for key in found.values())
