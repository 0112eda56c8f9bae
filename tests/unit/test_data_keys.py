"""Secrets whose keys a key service wraps: bound to their place, asked for once in a while, and an outage is told as one."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenantdb import TenantDB
from tenantdb.errors import ConfigError, CredentialTampered, KeyServiceUnavailable, SecretKeyError
from tenantdb.provisioning.check import _settings
from tenantdb.registry.data_keys import DataKeys
from tenantdb.registry.secrets import AUDIT, OWNER, RUNTIME, Keyring, generate_key, key_id_of
from tenantdb.settings import Settings
from tests.kms import LocalKms
from tests.unit.registry_fixtures import Clock

PLACE = ("tenant-1", "runtime_secret", "server-1", "t_1", "t_1_rt")


@pytest.fixture
def kms() -> LocalKms:
    return LocalKms()


def ring_of(kms: LocalKms, clock: Clock, **options: Any) -> Keyring:
    return Keyring([], DataKeys(kms, clock=clock, **options))


# -- in its place ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("purpose", [OWNER, RUNTIME])
def test_what_is_sealed_opens_in_its_place_with_a_key_of_its_own(kms: LocalKms, purpose: str) -> None:
    ring = Keyring([], kms)
    blobs = [ring.seal(purpose, b"pw", *PLACE) for _ in range(3)]

    assert [ring.open(purpose, blob, *PLACE) for blob in blobs] == [b"pw"] * 3
    assert kms.calls("wrap") == 3
    assert kms.contexts[0] == {"purpose": purpose, "tenant": "tenant-1", "column": "runtime_secret"}


@pytest.mark.parametrize("part", range(len(PLACE)))
def test_a_secret_moved_elsewhere_does_not_open(kms: LocalKms, part: int) -> None:
    ring = Keyring([], kms)
    blob = ring.seal(RUNTIME, b"pw", *PLACE)
    elsewhere = [*PLACE]
    elsewhere[part] += "x"
    with pytest.raises(CredentialTampered):
        ring.open(RUNTIME, blob, *elsewhere)


def test_a_secret_of_one_purpose_opens_for_no_other_though_one_service_keeps_both(kms: LocalKms) -> None:
    ring = Keyring([], kms)
    blob = ring.seal(OWNER, b"pw", *PLACE)
    with pytest.raises(CredentialTampered):
        ring.open(RUNTIME, blob, *PLACE)


class Careless:
    """A service that binds nothing."""

    def wrap(self, data_key: bytes, context: Mapping[str, str]) -> bytes:
        return data_key[::-1]

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        return wrapped[::-1]


@pytest.mark.parametrize("part", range(len(PLACE)))
def test_even_where_the_service_binds_nothing_the_secret_is_bound(part: int) -> None:
    ring = Keyring([], Careless())
    blob = ring.seal(RUNTIME, b"pw", *PLACE)
    elsewhere = [*PLACE]
    elsewhere[part] += "x"
    with pytest.raises(CredentialTampered):
        ring.open(RUNTIME, blob, *elsewhere)
    assert ring.open(RUNTIME, blob, *PLACE) == b"pw"


@given(st.integers(0, 200), st.integers(0, 7))
def test_no_single_bit_can_be_changed(position: int, bit: int) -> None:
    ring = Keyring([], LocalKms())
    blob = bytearray(ring.seal(RUNTIME, b"pw", *PLACE))
    blob[position % len(blob)] ^= 1 << bit
    with pytest.raises((CredentialTampered, SecretKeyError)):
        ring.open(RUNTIME, bytes(blob), *PLACE)


def test_a_truncated_blob_is_tampered(kms: LocalKms) -> None:
    ring = Keyring([], kms)
    blob = ring.seal(RUNTIME, b"pw", *PLACE)
    for length in range(len(blob)):
        with pytest.raises(CredentialTampered):
            ring.open(RUNTIME, blob[:length], *PLACE)


def test_without_the_service_the_secret_says_what_is_missing(kms: LocalKms) -> None:
    blob = Keyring([], kms).seal(RUNTIME, b"pw", *PLACE)
    with pytest.raises(SecretKeyError, match="key service"):
        Keyring([generate_key()]).open(RUNTIME, blob, *PLACE)


# -- who seals -------------------------------------------------------------------------------------------------------------------------


def test_the_newest_seals_be_it_a_key_or_the_service_and_each_opens_what_the_other_sealed(kms: LocalKms) -> None:
    key = generate_key()
    rings = {name: Keyring(keys, kms) for name, keys in {"left out": [key], "first": ["kms", key], "second": [key, "kms"]}.items()}
    blobs = {name: ring.seal(RUNTIME, b"pw", *PLACE) for name, ring in rings.items()}

    assert {name: blob[0] for name, blob in blobs.items()} == {"left out": 2, "first": 2, "second": 1}
    assert all(ring.open(RUNTIME, blob, *PLACE) == b"pw" for ring in rings.values() for blob in blobs.values())
    assert {name: ring.newest(RUNTIME) == key_id_of(blobs[name]) for name, ring in rings.items()} == dict.fromkeys(rings, True)


def test_a_key_of_another_purpose_before_it_leaves_the_service_the_newest_for_the_rest(kms: LocalKms) -> None:
    ring = Keyring([*Keyring([generate_key()]).derive(OWNER), "kms"], kms)

    assert [ring.seal(purpose, b"pw", *PLACE)[0] for purpose in (OWNER, RUNTIME)] == [1, 2]


def test_the_service_wraps_keys_and_signs_nothing(kms: LocalKms) -> None:
    ring = Keyring([], kms)

    assert ring.holds(OWNER) and ring.holds(RUNTIME) and not ring.holds(AUDIT)
    with pytest.raises(SecretKeyError):
        ring.newest(AUDIT)


def test_keys_are_known_by_their_place_in_the_list(kms: LocalKms) -> None:
    first, second = generate_key(), generate_key()
    ring = Keyring([first, "kms", second], kms)

    names = [
        ring.name(Keyring([first]).newest(RUNTIME)),
        ring.name(Keyring([second]).newest(OWNER)),
        ring.name(Keyring([], kms).newest(OWNER)),
        ring.name(Keyring([generate_key()]).newest(RUNTIME)),
    ]
    assert names == ["key 1", "key 3", "kms", None]


def test_another_key_of_the_service_has_another_id(kms: LocalKms) -> None:
    ring = Keyring([], kms)
    blob = ring.seal(RUNTIME, b"pw", *PLACE)
    kms.key_id = "two"

    assert key_id_of(blob) != ring.newest(RUNTIME)
    assert ring.open(RUNTIME, blob, *PLACE) == b"pw"


# -- in memory -------------------------------------------------------------------------------------------------------------------------


def test_a_runtime_key_is_asked_for_once_in_its_time_and_an_owners_each_time(kms: LocalKms, clock: Clock) -> None:
    ring = ring_of(kms, clock, ttl=60)
    blobs = {purpose: ring.seal(purpose, b"pw", *PLACE) for purpose in (OWNER, RUNTIME)}
    for _ in range(3):
        assert [ring.open(purpose, blob, *PLACE) for purpose, blob in blobs.items()] == [b"pw", b"pw"]
    assert (kms.calls("unwrap", RUNTIME), kms.calls("unwrap", OWNER)) == (1, 3)

    clock.now += 60
    ring.open(RUNTIME, blobs[RUNTIME], *PLACE)
    assert kms.calls("unwrap", RUNTIME) == 2


def test_what_is_kept_is_bounded(kms: LocalKms, clock: Clock) -> None:
    ring = ring_of(kms, clock, size=2)
    blobs = {name: ring.seal(RUNTIME, b"pw", name, "runtime_secret") for name in ("a", "b", "c")}
    for name in ("a", "b", "c", "c", "a"):
        ring.open(RUNTIME, blobs[name], name, "runtime_secret")
    assert kms.calls("unwrap") == 4


def test_what_is_kept_for_one_place_opens_nothing_in_another(kms: LocalKms) -> None:
    ring = Keyring([], kms)
    blob = ring.seal(RUNTIME, b"pw", *PLACE)
    ring.open(RUNTIME, blob, *PLACE)
    with pytest.raises(CredentialTampered):
        ring.open(RUNTIME, blob, "tenant-2", *PLACE[1:])
    assert kms.calls("unwrap") == 2  # the service was asked, rather than the memory


def test_warming_fetches_ahead_so_that_opening_asks_nobody(kms: LocalKms, clock: Clock) -> None:
    ring = ring_of(kms, clock, ttl=60)
    blob = ring.seal(RUNTIME, b"pw", *PLACE)
    for after in (0, 29, 2):  # at once; still half of its time left; less than that
        clock.now += after
        ring.warm(RUNTIME, blob, *PLACE[:2])
    assert kms.calls("unwrap") == 2

    clock.now += 59
    kms.down = True
    assert ring.open(RUNTIME, blob, *PLACE) == b"pw"


def test_warming_during_an_outage_raises_nothing_and_asks_once_in_a_while(kms: LocalKms, clock: Clock) -> None:
    ring = ring_of(kms, clock, ttl=60)
    blob = ring.seal(RUNTIME, b"pw", *PLACE)
    kms.down = True
    for _ in range(10):
        ring.warm(RUNTIME, blob, *PLACE[:2])
    assert kms.calls("unwrap") == 1

    clock.now += 5
    kms.down = False
    ring.warm(RUNTIME, blob, *PLACE[:2])
    assert kms.calls("unwrap") == 2


def test_warming_what_no_service_sealed_does_nothing(kms: LocalKms) -> None:
    key = generate_key()
    for ring, blob in (
        (Keyring([key]), Keyring([key]).seal(RUNTIME, b"pw", *PLACE)),
        (Keyring([key], kms), Keyring([key]).seal(RUNTIME, b"pw", *PLACE)),
        (Keyring([key], kms), None),
        (Keyring([key], kms), b"\x02"),
        (Keyring([key]), Keyring([], kms).seal(RUNTIME, b"pw", *PLACE)),
    ):
        ring.warm(RUNTIME, blob, *PLACE[:2])
    assert kms.calls("unwrap") == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where a process can fork")
def test_a_child_can_open_though_the_lock_was_held_when_it_was_forked(kms: LocalKms) -> None:
    keys = DataKeys(kms)
    with keys._lock:
        inherited = keys.start_empty()
        assert keys._lock is not inherited and not keys._lock.locked()


# -- outages ---------------------------------------------------------------------------------------------------------------------------


def test_an_outage_is_told_as_one_and_not_remembered(kms: LocalKms) -> None:
    ring = Keyring([], kms)
    blob = ring.seal(RUNTIME, b"pw", *PLACE)
    kms.down = True
    calls: list[Callable[[], bytes]] = [lambda: ring.open(RUNTIME, blob, *PLACE), lambda: ring.seal(RUNTIME, b"pw", *PLACE)]
    for call in calls:
        with pytest.raises(KeyServiceUnavailable) as caught:
            call()
        assert caught.value.retryable and caught.value.http_status == 503
        assert "TimeoutError" in str(caught.value) and "canary" not in str(caught.value)
        assert isinstance(caught.value.__cause__, TimeoutError)
        assert "canary" not in str(pickle.loads(pickle.dumps(caught.value)))
    kms.down = False
    assert ring.open(RUNTIME, blob, *PLACE) == b"pw"


class Odd:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def wrap(self, data_key: bytes, context: Mapping[str, str]) -> Any:
        return self.answer if self.answer != b"short" else b"w"

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> Any:
        return self.answer


@pytest.mark.parametrize("answer", [None, "text", b"", b"w" * (1 << 16), b"short"])
def test_an_answer_that_is_no_key_is_an_outage(answer: Any) -> None:
    ring = Keyring([], Odd(answer))
    with pytest.raises(KeyServiceUnavailable):
        ring.open(RUNTIME, ring.seal(RUNTIME, b"pw", *PLACE), *PLACE)


# -- settings --------------------------------------------------------------------------------------------------------------------------

URL = "postgresql://app@127.0.0.1/central"
here = LocalKms()


def test_a_key_service_stands_in_for_a_secret_key(kms: LocalKms) -> None:
    assert Settings(url=URL, kms=kms).kms is kms
    with pytest.raises(SecretKeyError):  # the twin
        Settings(url=URL)


def test_a_key_service_is_imported_where_a_variable_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENANTDB_URL", URL)
    monkeypatch.setenv("TENANTDB_KMS", f"{__name__}:here")
    assert Settings.from_env().kms is here


@pytest.mark.parametrize("value", [7, "nowhere_module:kms", f"{__name__}:nothing", f"{__name__}:URL", "no name"])
def test_what_is_no_key_service_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ConfigError, match="kms"):
        Settings(url=URL, kms=value)


def test_a_place_for_a_service_that_is_not_given_is_refused() -> None:
    with pytest.raises(ConfigError, match="kms="):
        Settings(url=URL, secret_keys=["kms", generate_key()])


def test_settings_do_not_show_the_service(kms: LocalKms) -> None:
    assert "canary" not in repr(Settings(url=URL, kms=kms)) + repr(Keyring([], kms))


def test_check_says_that_nothing_vouches_for_the_audit_log(tmp_path: Path, kms: LocalKms) -> None:
    def warnings(*keys: str) -> str:
        with TenantDB(f"sqlite:///{tmp_path}/central.sqlite3", secret_keys=keys, kms=kms) as db:
            db.init()
            return " ".join(finding.text for finding in db.check())

    assert "vouches for the audit log" in warnings()
    assert "vouches for the audit log" not in warnings("kms", f"audit:{generate_key()}")


def test_the_place_of_the_service_is_no_root_key(kms: LocalKms) -> None:
    def warnings(*keys: str) -> str:
        return " ".join(finding.text for finding in _settings(Settings(url=URL, secret_keys=keys, kms=kms)))

    derived = Keyring([generate_key()]).derive(RUNTIME)
    assert "root keys" not in warnings("kms", *derived)
    assert "root keys" in warnings("kms", generate_key())  # the twin
