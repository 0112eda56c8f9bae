"""The registry's history makes what the code expects, and code and registry of different ages know how far they can work together."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Engine, Integer, MetaData, Table, inspect, select, update
from sqlalchemy.exc import OperationalError, ProgrammingError, StatementError, TimeoutError

from tenantdb.errors import RegistryError, RegistryNotInitialized, RegistryOutOfRange, RegistryUnavailable, SecretKeyError, TenantNotFound
from tenantdb.registry import Keyring, Registry, SignUp, schema, tables
from tenantdb.registry.secrets import RUNTIME, generate_key
from tenantdb.registry.transactions import Transactions, mapped_errors
from tenantdb.settings import Settings
from tests.unit.registry_fixtures import KEY

Engines = tuple[Engine, Engine]


def differences(engine: Engine, metadata: MetaData) -> list[object]:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": tables.VERSION_TABLE, "compare_type": True})
        return list(compare_metadata(context, metadata))


def set_meta(registry: Registry, **values: str) -> None:
    with registry.admin_write() as connection:
        connection.execute(update(tables.meta).values(**values))


def again(engines: Engines, settings: Settings, *keys: str) -> Registry:
    """The same registry in another process."""
    return Registry(*engines, settings, Keyring(keys or [KEY]))


def test_the_history_makes_the_tables_that_the_code_knows(registry: Registry, registry_engines: Engines) -> None:
    assert differences(registry_engines[1], tables.metadata) == []


def test_the_comparison_would_see_a_difference(registry: Registry, registry_engines: Engines) -> None:
    changed = MetaData(naming_convention=tables.metadata.naming_convention)
    for table in tables.metadata.tables.values():
        table.to_metadata(changed)
    changed.tables["tenantdb_tenants"].append_column(Column("forgotten", Integer))
    Table("tenantdb_forgotten", changed, Column("id", Integer, primary_key=True))
    assert len(differences(registry_engines[1], changed)) == 2


def test_it_can_live_in_an_applications_database(empty_registry: Registry, registry_engines: Engines) -> None:
    with registry_engines[1].begin() as connection:
        connection.exec_driver_sql("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        connection.exec_driver_sql("INSERT INTO alembic_version VALUES ('theirs')")
        connection.exec_driver_sql("CREATE TABLE patients (id INTEGER)")
    empty_registry.init()
    with registry_engines[1].begin() as connection:
        assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() == "theirs"
    ours = {name for name in inspect(registry_engines[1]).get_table_names() if name not in ("alembic_version", "patients")}
    assert ours == {*tables.metadata.tables, tables.VERSION_TABLE}


def test_init_may_run_again(registry: Registry) -> None:
    registry.sign_up(SignUp(slug="acme"))
    registry.init()
    assert registry.tenants.get("acme").slug == "acme"


def test_two_processes_may_init_at_once(registry_engines: Engines, registry_settings: Settings) -> None:
    barrier = threading.Barrier(3)

    def init() -> None:
        barrier.wait(10)
        again(registry_engines, registry_settings).init()

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(init) for _ in range(3)]:
            done.result(60)
    with pytest.raises(TenantNotFound):
        again(registry_engines, registry_settings).lookup("acme")


def test_init_leaves_the_applications_logging_alone(empty_registry: Registry) -> None:
    logger = logging.getLogger("clinic")
    level, handlers = logging.getLogger().level, list(logging.getLogger().handlers)
    empty_registry.init()
    assert not logger.disabled
    assert (logging.getLogger().level, logging.getLogger().handlers) == (level, handlers)


def test_a_registry_without_tables_says_so_and_is_asked_again(empty_registry: Registry) -> None:
    with pytest.raises(RegistryNotInitialized):
        empty_registry.lookup("acme")
    empty_registry.init()
    with pytest.raises(TenantNotFound):
        empty_registry.lookup("acme")


def test_a_registry_whose_making_was_interrupted_is_not_initialized(registry: Registry, registry_engines: Engines) -> None:
    with registry.admin_write() as connection:
        connection.execute(tables.meta.delete())
    with registry_engines[0].connect() as connection, pytest.raises(RegistryNotInitialized):
        schema.check_range(connection)
    registry.init()
    with registry_engines[0].connect() as connection:
        schema.check_range(connection)


def test_a_newer_registry_is_served_as_long_as_it_says_this_code_may(
    registry: Registry, registry_engines: Engines, registry_settings: Settings
) -> None:
    set_meta(registry, revision="9999", oldest_reader=schema.NEWEST)
    with pytest.raises(TenantNotFound):
        again(registry_engines, registry_settings).lookup("acme")
    set_meta(registry, oldest_reader="9998")
    with pytest.raises(RegistryOutOfRange) as caught:
        again(registry_engines, registry_settings).lookup("acme")
    assert caught.value.args == ("9999", schema.OLDEST, schema.NEWEST)


def test_an_older_registry_than_this_code_can_serve_is_refused(
    registry: Registry, registry_engines: Engines, registry_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "OLDEST", "9999")
    with pytest.raises(RegistryOutOfRange):
        again(registry_engines, registry_settings).lookup("acme")


def test_init_by_older_code_leaves_a_newer_registry_as_it_is(registry: Registry) -> None:
    set_meta(registry, revision="9999")
    with registry.admin_write() as connection:
        connection.exec_driver_sql(f"UPDATE {tables.VERSION_TABLE} SET version_num = '9999'")
    registry.init()
    with registry.read() as connection:
        assert connection.scalar(select(tables.meta.c.revision)) == "9999"
    set_meta(registry, oldest_reader="9999")
    with pytest.raises(RegistryOutOfRange):
        registry.init()


def test_the_range_is_looked_at_once(registry: Registry) -> None:
    with pytest.raises(TenantNotFound):
        registry.lookup("acme")
    set_meta(registry, oldest_reader="9999")  # this process works on, the next does not start
    with pytest.raises(TenantNotFound):
        registry.lookup("beta")


def test_many_first_users_look_once(registry_engines: Engines) -> None:
    looks = []
    barrier = threading.Barrier(4)
    looking, go = threading.Event(), threading.Event()

    def check(connection: object) -> None:
        looks.append(1)
        looking.set()
        assert go.wait(10)

    transactions = Transactions(*registry_engines, check, Keyring())

    def use() -> None:
        barrier.wait(10)
        with transactions.read():
            pass

    with ThreadPoolExecutor(3) as pool:
        uses = [pool.submit(use) for _ in range(3)]
        barrier.wait(10)
        assert looking.wait(10)
        go.set()
        for done in uses:
            done.result(10)
    assert len(looks) == 1


def test_foreign_keys_are_an_error_before_any_secret_is_touched(
    registry: Registry, registry_engines: Engines, registry_settings: Settings
) -> None:
    with pytest.raises(SecretKeyError):
        again(registry_engines, registry_settings, generate_key()).lookup("acme")
    with pytest.raises(SecretKeyError):
        again(registry_engines, registry_settings, generate_key()).init()
    with pytest.raises(TenantNotFound):  # the twins: the old key beside a new one, and the derived key alone
        again(registry_engines, registry_settings, generate_key(), KEY).lookup("acme")
    with pytest.raises(TenantNotFound):
        again(registry_engines, registry_settings, *Keyring([KEY]).derive(RUNTIME)).lookup("acme")


def test_keys_that_come_later_are_remembered_from_then_on(registry_engines: Engines, registry_settings: Settings) -> None:
    Registry(*registry_engines, registry_settings, Keyring()).init()
    again(registry_engines, registry_settings).init()
    with pytest.raises(SecretKeyError):
        again(registry_engines, registry_settings, generate_key()).lookup("acme")


class Failure(Exception):
    """A driver's error, with what PostgreSQL would tell."""

    def __init__(self, sqlstate: str | None = None) -> None:
        super().__init__("connection to server at 10.0.0.9, user app password hunter2 failed")
        self.sqlstate = sqlstate


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        (OperationalError("SELECT secret", {}, Failure()), RegistryUnavailable),
        (OperationalError("SELECT secret", {}, Failure("57P01"), connection_invalidated=True), RegistryUnavailable),
        (ProgrammingError("SELECT secret", {}, Failure("08006"), connection_invalidated=True), RegistryUnavailable),
        (TimeoutError("QueuePool limit of size 5"), RegistryUnavailable),
        (ProgrammingError("SELECT secret", {}, Failure("42P01")), RegistryNotInitialized),
        (ProgrammingError("SELECT secret", {}, Failure("42501")), RegistryError),
        (ProgrammingError("SELECT secret", {}, Failure("42601")), ProgrammingError),
    ],
)
def test_foreign_errors_become_ours_without_their_text(foreign: Exception, ours: type[Exception]) -> None:
    with pytest.raises(ours) as caught, mapped_errors():
        raise foreign
    assert type(caught.value) is ours
    if caught.value is not foreign:
        assert caught.value.__cause__ is foreign
        assert "hunter2" not in str(caught.value)
        assert "secret" not in str(caught.value)


def test_a_damaged_registry_is_an_outage_not_an_absence(registry: Registry, registry_engines: Engines, registry_settings: Settings) -> None:
    path = registry_settings.url.path
    assert path is not None
    registry.close()
    with open(path, "wb") as file:
        file.write(b"this is no database" * 1000)
    with pytest.raises(RegistryUnavailable):
        again(registry_engines, registry_settings).lookup("acme")


def test_a_locked_registry_is_an_outage_not_an_absence(registry: Registry, registry_engines: Engines, registry_settings: Settings) -> None:
    impatient = registry_settings.model_copy(update={"lock_timeout": 0.05})
    from tenantdb.backends.sqlite import SQLite

    engine = SQLite().registry_engine(registry_settings.url, impatient)
    other = Registry(engine, engine, impatient, Keyring([KEY]))
    with registry.write(), pytest.raises(RegistryUnavailable):
        other.users.create("ada@example.org", "correct horse")
    assert other.users.create("ada@example.org", "correct horse").email == "ada@example.org"
    other.close()


def test_times_come_back_aware_and_in_utc(registry: Registry) -> None:
    east = datetime(2030, 1, 1, 12, tzinfo=timezone(timedelta(hours=5)))
    tenant, _ = registry.sign_up(SignUp(slug="acme"))
    found = registry.tenants.update(tenant, subscription_expires_at=east).subscription_expires_at
    assert found == east
    assert found is not None
    assert found.tzinfo is timezone.utc
    with pytest.raises(ValueError, match="time zone"):
        registry.tenants.update(tenant, subscription_expires_at=datetime(2030, 1, 1))  # noqa: DTZ001


def test_a_naive_time_is_refused_by_the_column_too(registry: Registry) -> None:
    naive = datetime(2030, 1, 1)  # noqa: DTZ001
    with registry.write() as connection, pytest.raises(StatementError, match="time zone"):
        connection.execute(update(tables.tenants).values(deleted_at=naive))
