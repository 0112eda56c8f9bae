"""On PostgreSQL a tenant's own roles may add to the log of its records and read it, and change nothing in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from tenantdb import Tenant, TenantDB
from tenantdb.model import DatabaseRole
from tests.world import PostgreSQLWorld

COLUMNS = "at, actor, action, outcome, details, seq"
VALUES = "now(), 'eve', 'forged', 'done', '{}', 99"
FORBIDDEN = [
    "UPDATE tenantdb.audit SET actor = 'nobody'",
    "DELETE FROM tenantdb.audit",
    "TRUNCATE tenantdb.audit",
    f"INSERT INTO tenantdb.audit (id, {COLUMNS}) OVERRIDING SYSTEM VALUE VALUES (1, {VALUES})",
    "ALTER TABLE tenantdb.audit DISABLE TRIGGER ALL",
    "ALTER TABLE tenantdb.audit ADD COLUMN x int",
    "DROP TABLE tenantdb.audit",
    "DELETE FROM tenantdb.audit_head",
    "INSERT INTO tenantdb.audit_head (id, seq) VALUES (2, 0)",
    "UPDATE tenantdb.audit_head SET id = 2",
    "SELECT setval(pg_get_serial_sequence('tenantdb.audit', 'id'), 1000)",
    "CREATE RULE r AS ON INSERT TO tenantdb.audit DO INSTEAD NOTHING",
]


@pytest.fixture(scope="module")
def made(postgresql_world: PostgreSQLWorld) -> Iterator[tuple[TenantDB, Tenant]]:
    db = postgresql_world.make_db()
    yield db, db.provision("walls")


@pytest.mark.parametrize("role", [DatabaseRole.RUNTIME, DatabaseRole.OWNER])
@pytest.mark.parametrize("statement", FORBIDDEN)
def test_a_tenants_role_may_not(made: tuple[TenantDB, Tenant], role: DatabaseRole, statement: str) -> None:
    db, _ = made
    with db._engines.passing(db._registry.lookup("walls"), role) as engine, engine.connect() as connection:
        with pytest.raises(ProgrammingError) as caught:
            connection.execute(text(statement))
    assert getattr(caught.value.orig, "sqlstate", None) == "42501"


def test_the_runtime_role_may_add_and_read_and_the_owner_role_read_alone(made: tuple[TenantDB, Tenant]) -> None:
    db, tenant = made
    forge = text(f"INSERT INTO tenantdb.audit ({COLUMNS}) VALUES ({VALUES})")
    with db.connect(tenant) as connection:
        connection.execute(forge)  # rolled back
    record = db._registry.lookup("walls")
    with db._engines.passing(record, DatabaseRole.OWNER) as engine, engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM tenantdb.audit")).scalar() == 0
        with pytest.raises(ProgrammingError):
            connection.execute(forge)


def test_an_entry_forged_with_the_runtime_roles_own_rights_is_found(made: tuple[TenantDB, Tenant]) -> None:
    db, tenant = made
    with db.begin(tenant) as session:
        db.audit.record(session, "note.read", 1)
    assert db.audit.verify(tenant, records=True).ok
    with db.engine(tenant).begin() as connection:
        connection.execute(text(f"INSERT INTO tenantdb.audit ({COLUMNS}) VALUES ({VALUES})"))
        connection.execute(text("UPDATE tenantdb.audit_head SET seq = 99, mac = NULL"))

    assert not db.audit.verify(tenant, records=True).ok


def test_a_process_with_what_derive_prints_writes_and_one_with_the_runtime_key_alone_does_not(
    made: tuple[TenantDB, Tenant], postgresql_world: PostgreSQLWorld
) -> None:
    from tenantdb.errors import SecretKeyError
    from tenantdb.registry.secrets import Keyring

    db, _ = made
    keys = Keyring([postgresql_world.key]).derive("runtime")
    web = postgresql_world.twin(db, secret_keys=keys)
    assert web.tenants.update("walls", plan="pro").plan == "pro"
    half = postgresql_world.twin(db, secret_keys=[key for key in keys if key.startswith("runtime:")])
    with pytest.raises(SecretKeyError, match="derive runtime"):
        half.tenants.update("walls", plan="free")

    assert db.tenants.get("walls").plan == "pro"
    assert db.audit.verify("walls").ok
