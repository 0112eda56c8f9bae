"""`tenantdb rotate-keys`: what it prints, and with which code it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import update

from tenantdb import TenantDB
from tenantdb.registry import tables
from tenantdb.registry.secrets import Keyring, generate_key
from tests.unit.test_cli import document, run

URL = "sqlite:///data/central.sqlite3"
OLD, NEW = generate_key(), generate_key()


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENANTDB_URL", URL)
    with TenantDB(URL, secret_keys=[OLD]) as db:
        db.init()
        db.provision("acme")
    give(monkeypatch, NEW, OLD)


def give(monkeypatch: pytest.MonkeyPatch, *keys: str) -> None:
    monkeypatch.setenv("TENANTDB_SECRET_KEYS", " ".join(keys))


def damage(blob: bytes) -> None:
    with TenantDB(URL, secret_keys=[NEW, OLD]) as db, db._registry.admin_write() as connection:
        connection.execute(update(tables.tenants).values(runtime_secret=blob))


def test_check_fails_until_the_rotation_and_the_old_key_can_go_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = run("rotate-keys", "--check", exit_code=1)
    assert [line.split("\t")[2:] for line in before.stdout.splitlines() if line.startswith("runtime")] == [["key 2", "1", "older"]]
    assert "tenantdb rotate-keys" in before.stderr

    assert run("rotate-keys").stdout == "sealed anew: 1; already: 0; failed: 0\n"
    assert run("rotate-keys").stdout == "sealed anew: 0; already: 1; failed: 0\n"

    after = run("rotate-keys", "--check")
    assert [line.split("\t")[2:] for line in after.stdout.splitlines() if line.startswith("runtime")] == [["key 1", "1", "newest"]]
    assert "No secret needs an older key." in after.stderr
    give(monkeypatch, NEW)
    run("list")
    give(monkeypatch, OLD)
    run("list", exit_code=1)


def test_it_prints_json(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {purpose: Keyring([NEW]).newest(purpose).hex() for purpose in ("owner", "runtime")}
    checked = document("rotate-keys", "--check", exit_code=1)
    assert checked["ok"] is False
    assert [use for use in checked["keys"] if use["purpose"] == "runtime"] == [
        {"purpose": "runtime", "key_id": Keyring([OLD]).newest("runtime").hex(), "name": "key 2", "secrets": 1, "newest": False}
    ]

    assert document("rotate-keys") == {
        "resealed": 1,
        "already": 0,
        "failed": [],
        "keys": ids,
        "replaced": [Keyring([OLD]).newest("runtime").hex()],
    }
    assert document("rotate-keys", "--check")["ok"] is True


def test_a_secret_that_does_not_open_is_named_and_the_code_is_3() -> None:
    damage(b"\x01damaged")

    result = run("rotate-keys", exit_code=3)
    assert result.stderr.startswith("acme: runtime_secret: ")
    assert result.stdout == "sealed anew: 1; already: 0; failed: 1\n"
    assert document("rotate-keys", exit_code=3)["failed"][0]["error"]["code"] == "credential-tampered"


def test_a_wrong_key_and_no_key_are_one_line_that_shows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = generate_key()
    give(monkeypatch, stranger)
    result = run("rotate-keys", exit_code=1)
    assert "no given key opens" in result.stderr and stranger not in result.stderr
    monkeypatch.delenv("TENANTDB_SECRET_KEYS")
    assert "no owner key" in run("rotate-keys", exit_code=1).stderr


def test_the_keys_of_the_audit_log_can_be_kept_alone() -> None:
    derived = run("generate-key", "--derive", "audit").stdout.split()

    assert derived == Keyring([NEW, OLD]).derive("audit")
    assert not Keyring(derived).holds("runtime")


def test_a_key_service_may_stand_among_the_keys_to_derive_from(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, NEW, "kms", OLD)
    monkeypatch.setenv("TENANTDB_KMS", f"{__name__}:service")

    assert run("generate-key", "--derive", "runtime").stdout.split() == Keyring([NEW, OLD]).derive("runtime")


class _Service:
    def wrap(self, data_key: bytes, context: object) -> bytes:
        return data_key

    def unwrap(self, wrapped: bytes, context: object) -> bytes:
        return wrapped


service = _Service()
