"""Secrets open in their place and nowhere else, with the right key and no other, and never show."""

from __future__ import annotations

import base64
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenantdb.errors import CredentialTampered, SecretKeyError
from tenantdb.registry.secrets import OWNER, RUNTIME, Keyring, generate_key, password

PLACE = ("tenant-1", "runtime_secret", "server-1", "t_1", "t_1_rt")


def test_what_is_sealed_opens_in_its_place() -> None:
    ring = Keyring([generate_key()])
    assert ring.open(RUNTIME, ring.seal(RUNTIME, b"pw", *PLACE), *PLACE) == b"pw"


@pytest.mark.parametrize("part", range(len(PLACE)))
def test_a_secret_moved_to_another_tenant_column_server_database_or_role_does_not_open(part: int) -> None:
    ring = Keyring([generate_key()])
    blob = ring.seal(RUNTIME, b"pw", *PLACE)
    elsewhere = [*PLACE]
    elsewhere[part] += "x"
    with pytest.raises(CredentialTampered) as caught:
        ring.open(RUNTIME, blob, *elsewhere)
    assert caught.value.args == (elsewhere[0], elsewhere[1])


def test_two_contexts_that_read_alike_when_joined_are_two() -> None:
    ring = Keyring([generate_key()])
    blob = ring.seal(RUNTIME, b"pw", "t", "c", "ab", "c")
    with pytest.raises(CredentialTampered):
        ring.open(RUNTIME, blob, "t", "c", "a", "bc")


@given(st.integers(0, 40), st.integers(0, 7))
def test_no_single_bit_can_be_changed(position: int, bit: int) -> None:
    ring = Keyring([generate_key()])
    blob = bytearray(ring.seal(RUNTIME, b"pw", *PLACE))
    blob[position % len(blob)] ^= 1 << bit
    with pytest.raises((CredentialTampered, SecretKeyError)):
        ring.open(RUNTIME, bytes(blob), *PLACE)


@pytest.mark.parametrize("blob", [b"", b"\x01", b"\x01" + b"x" * 35, b"\x02" + b"x" * 60])
def test_a_truncated_or_unknown_blob_is_tampered(blob: bytes) -> None:
    with pytest.raises(CredentialTampered):
        Keyring([generate_key()]).open(RUNTIME, blob, *PLACE)


def test_the_newest_key_seals_and_the_old_one_still_opens() -> None:
    old, new = generate_key(), generate_key()
    before = Keyring([old]).seal(RUNTIME, b"pw", *PLACE)
    both = Keyring([new, old])
    assert both.open(RUNTIME, before, *PLACE) == b"pw"
    assert Keyring([new]).open(RUNTIME, both.seal(RUNTIME, b"pw", *PLACE), *PLACE) == b"pw"


def test_a_foreign_key_says_that_no_given_key_opens_it() -> None:
    blob = Keyring([generate_key()]).seal(RUNTIME, b"pw", *PLACE)
    with pytest.raises(SecretKeyError, match="no given key opens the runtime_secret of tenant-1"):
        Keyring([generate_key()]).open(RUNTIME, blob, *PLACE)


def test_a_derived_key_opens_its_purpose_alone() -> None:
    root = Keyring([generate_key()])
    web = Keyring(root.derive(RUNTIME))
    runtime, owner = (root.seal(purpose, b"pw", *PLACE) for purpose in (RUNTIME, OWNER))

    assert web.open(RUNTIME, runtime, *PLACE) == b"pw"
    assert root.open(RUNTIME, web.seal(RUNTIME, b"pw", *PLACE), *PLACE) == b"pw"
    with pytest.raises(SecretKeyError):
        web.open(OWNER, owner, *PLACE)
    with pytest.raises(SecretKeyError):
        web.seal(OWNER, b"pw", *PLACE)
    assert web.holds(RUNTIME)
    assert not web.holds(OWNER)
    assert root.open(OWNER, owner, *PLACE) == b"pw"  # the twin: the root key does


def test_a_derived_key_of_one_purpose_is_none_of_another() -> None:
    key = generate_key()
    assert {text.split(":")[1] for text in Keyring([key]).derive(RUNTIME)}.isdisjoint(
        {text.split(":")[1] for text in Keyring([key]).derive(OWNER)}
    )


def test_who_serves_can_sign_tasks_with_the_same_keys_and_who_has_older_derived_keys_is_told_where_to_get_them() -> None:
    root = Keyring([generate_key(), generate_key()])
    derived = root.derive(RUNTIME)

    assert Keyring(derived).task_keys() == root.task_keys()
    assert len(set(root.task_keys())) == 2
    assert Keyring().task_keys() == []
    with pytest.raises(SecretKeyError, match="generate-key --derive runtime"):
        Keyring([key for key in derived if not key.startswith("tasks:")]).task_keys()


def test_derived_keys_keep_their_order() -> None:
    keys = [generate_key(), generate_key()]
    root, web = Keyring(keys), Keyring(Keyring(keys).derive(RUNTIME))
    blob = web.seal(RUNTIME, b"pw", *PLACE)
    assert Keyring(keys[:1]).open(RUNTIME, blob, *PLACE) == b"pw"
    assert web.derive(RUNTIME) == root.derive(RUNTIME)


SHORT, LONG = (base64.urlsafe_b64encode(b"k" * size).decode() for size in (31, 32))


@pytest.mark.parametrize("bad", ["", "geheim", SHORT, "runtme:" + LONG, "runtime:" + SHORT, LONG + "A", " " + LONG])
def test_a_malformed_key_is_refused_without_being_shown(bad: str) -> None:
    with pytest.raises(SecretKeyError) as caught:
        Keyring([generate_key(), bad])
    assert "secret key 2" in str(caught.value)
    assert not bad or bad not in str(caught.value)


def test_a_key_may_come_without_its_padding() -> None:
    key = generate_key()
    assert repr(Keyring([key.rstrip("=")])) == repr(Keyring([key]))


def test_an_empty_ring_neither_seals_nor_opens() -> None:
    empty = Keyring()
    with pytest.raises(SecretKeyError):
        empty.seal(RUNTIME, b"pw", *PLACE)
    with pytest.raises(SecretKeyError):
        empty.open(RUNTIME, Keyring([generate_key()]).seal(RUNTIME, b"pw", *PLACE), *PLACE)


def test_a_ring_shows_no_key_and_does_not_travel() -> None:
    key = generate_key()
    ring = Keyring([key])
    shown = repr(ring)
    for secret in (key, *(text.split(":")[1] for text in ring.derive(RUNTIME) + ring.derive(OWNER))):
        assert secret not in shown
        assert base64.urlsafe_b64decode(secret).hex() not in shown
    with pytest.raises(TypeError):
        pickle.dumps(ring)


def test_keys_and_passwords_are_32_random_bytes() -> None:
    assert len(base64.urlsafe_b64decode(generate_key())) == 32
    assert len(base64.urlsafe_b64decode(password() + "=")) == 32
    assert len({password() for _ in range(100)}) == 100


def test_sealing_twice_gives_two_ciphertexts() -> None:
    ring = Keyring([generate_key()])
    assert ring.seal(RUNTIME, b"pw", *PLACE) != ring.seal(RUNTIME, b"pw", *PLACE)
