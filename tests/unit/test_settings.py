"""Settings: every bad value is refused by its name, from wherever it came, and no password is ever shown."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sqlalchemy.engine import URL

from tenantdb import Budget, Settings, TenantDB
from tenantdb.backends.postgresql.connect import session_options
from tenantdb.errors import ConfigError, InsecureTransport, SecretKeyError
from tenantdb.registry.secrets import generate_key
from tenantdb.settings import ConnectionURL, is_local

KEY = generate_key()
CANARY = "canary-3f9a"
SQLITE = "sqlite:///data/central.sqlite3"
POSTGRESQL = f"postgresql://app:{CANARY}@localhost:5433/central"


def postgresql(**values: Any) -> Settings:
    return Settings(**{"url": POSTGRESQL, "secret_keys": [KEY], **values})


# -- values ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("url", "mysql://root@db/x"),
        ("url", "central.sqlite3"),
        ("url", ""),
        ("url", None),
        ("url", "sqlite://"),
        ("url", "sqlite:///:memory:"),
        ("url", "sqlite:///x.sqlite3?mode=ro"),
        ("registry_admin", "not a url"),
        ("server", 7),
        ("servers", {"eu": "not a url"}),
        ("servers", "{not json"),
        ("secret_keys", "[not json"),
        ("hardening", "none"),
        ("insecure_transport", "perhaps"),
        ("temporary_tables", 2),
        ("budget", "{not json"),
        ("budget", "7"),
        ("budget", "null"),
        ("budget", None),
        ("budget", 90),
        ("budget", [("connections", 90)]),
        ("registry_pool_size", 0),
        ("registry_pool_size", "many"),
        ("registry_pool_size", 2.5),
        ("pool_size", 5),  # gone
        ("max_engines", 100),
        ("processes", 4),
        ("acquire_timeout", 30),
        ("connect_timeout", 1),
        ("statement_timeout", -0.1),
        ("statement_timeout", float("inf")),
        ("lock_timeout", -1),
        ("idle_in_transaction_timeout", -1),
        ("cache_size", 0),
        ("cache_ttl", 0),
        ("cache_ttl", 5.1),
        ("cache_ttl", float("nan")),
        ("poolsize", 5),
        ("compatible_revisions", ["0001", "head"]),
        ("compatible_revisions", "base"),
        ("compatible_revisions", [""]),
        ("compatible_revisions", [2]),
        ("compatible_revisions", "[not json"),
    ],
)
def test_a_bad_value_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings(**{"url": SQLITE, name: value})
    assert name in str(caught.value) or "URL" in str(caught.value)
    assert not isinstance(caught.value.__cause__, ValidationError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("registry_pool_size", 1),
        ("connect_timeout", 2),
        ("statement_timeout", 0),
        ("lock_timeout", 0),
        ("idle_in_transaction_timeout", 0),
        ("cache_ttl", 5),
        ("cache_ttl", 0.01),
        ("cache_size", 1),
    ],
)
def test_the_value_at_the_edge_is_taken(name: str, value: Any) -> None:
    assert getattr(Settings(**{"url": SQLITE, name: value}), name) == value


def test_a_limit_shorter_than_a_millisecond_is_a_limit_still() -> None:
    """PostgreSQL counts whole milliseconds and reads 0 as no limit."""
    for seconds, milliseconds in ((0.0001, 1), (0.07, 70), (30, 30000), (0, 0)):
        options = session_options(None, postgresql(statement_timeout=seconds))["options"]
        assert f"statement_timeout={milliseconds}" in options.split()


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Settings(url=SQLITE).cache_size = 7  # type: ignore[misc]


def test_one_server_and_several_are_refused_together_by_both_names() -> None:
    with pytest.raises(ConfigError, match=r"server=.*servers="):
        postgresql(server="postgresql://prov@localhost/postgres", servers={"eu": "postgresql://prov@localhost/postgres"})


def test_both_logins_lead_to_one_kind_of_registry() -> None:
    with pytest.raises(ConfigError, match="registry_admin"):
        Settings(url=SQLITE, registry_admin=POSTGRESQL, secret_keys=[KEY])


def test_postgresql_needs_a_key_and_says_how_to_make_one_and_sqlite_needs_none() -> None:
    for values in ({"url": POSTGRESQL}, {"url": SQLITE, "server": "postgresql://prov@localhost/postgres"}):
        with pytest.raises(SecretKeyError, match="tenantdb generate-key"):
            Settings(**values)
    assert Settings(url=SQLITE).secret_keys == ()


def test_where_databases_are_made_is_given_by_server_by_servers_or_by_the_folder_of_the_registry() -> None:
    assert Settings(url=SQLITE).provisioners == {"default": ConnectionURL("sqlite", path=str(Path("data/tenants")))}
    assert postgresql().provisioners == {}
    assert list(postgresql(server="postgresql://prov@localhost/postgres").provisioners) == ["default"]
    assert list(postgresql(servers={"eu": "postgresql://prov@localhost/postgres"}).provisioners) == ["eu"]


# -- the budget ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_web_concurrency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)


@pytest.mark.parametrize("value", [-1, 2.5, "90", True, None, float("nan")])
@pytest.mark.parametrize("name", ["connections", "per_tenant", "max_waiting", "background", "administration"])
def test_what_is_counted_in_a_budget_is_a_whole_number(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"budget\.{name} must be a whole number"):
        Budget(**{name: value})


@pytest.mark.parametrize("name", ["connections", "processes", "per_tenant"])
def test_a_budget_without_a_connection_a_process_or_room_for_a_tenant_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"budget\.{name} must be a whole number, 1 or more"):
        Budget(**{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-0.1, "30", True, None, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["acquire_timeout", "idle_timeout", "max_lifetime", "check_after", "leak_after"])
def test_what_is_measured_in_a_budget_is_seconds(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"budget\.{name} must be a number of seconds"):
        Budget(**{name: value})


def test_the_smallest_budget_is_taken() -> None:
    nothing = {"max_waiting": 0, "background": 0, "administration": 0}
    seconds = dict.fromkeys(("acquire_timeout", "idle_timeout", "max_lifetime", "check_after", "leak_after"), 0)

    smallest = Budget(connections=1, processes=1, per_tenant=1, **nothing, **seconds)  # type: ignore[arg-type]

    assert Settings(url=SQLITE, budget=smallest).budget is smallest


def test_a_budget_cannot_be_changed_and_survives_a_trip_to_another_process() -> None:
    budget = Budget(connections=40)
    with pytest.raises(dataclasses.FrozenInstanceError):
        budget.connections = 41  # type: ignore[misc]
    with pytest.raises(TypeError):
        Budget(40)  # type: ignore[misc]

    assert pickle.loads(pickle.dumps(budget)) == copy.deepcopy(budget) == budget != Budget()


def test_a_budget_is_given_as_itself_as_a_mapping_or_as_json() -> None:
    given = {"connections": 40, "processes": 2, "strict": True}
    for value in (Budget(**given), given, json.dumps(given)):  # type: ignore[arg-type]
        assert Settings(url=SQLITE, budget=value).budget == Budget(connections=40, processes=2, strict=True)


@pytest.mark.parametrize("value", [{"conections": 90}, '{"conections": 90}'])
def test_a_field_that_a_budget_does_not_have_is_named(value: Any) -> None:
    with pytest.raises(ConfigError, match="budget has no conections"):
        Settings(url=SQLITE, budget=value)


def test_bad_json_is_refused_with_an_example_of_what_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENANTDB_URL", SQLITE)
    for text, problem in (("connections=90", "budget is not JSON"), ("", "budget is not JSON"), ("[90]", "budget must be a Budget")):
        monkeypatch.setenv("TENANTDB_BUDGET", text)
        with pytest.raises(ConfigError, match=problem) as caught:
            Settings.from_env()
        assert '{"connections": 90, "processes": 4}' in str(caught.value)


def test_fewer_connections_than_processes_are_refused_by_both_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Budget(connections=4, processes=4).share_of == 4
    with pytest.raises(ConfigError, match=r"budget\.connections=3 .* budget\.processes=4: each"):
        Budget(connections=3, processes=4)
    with pytest.raises(ConfigError, match=r"budget\.connections=3 .* budget\.processes=4 \(not given: WEB_CONCURRENCY, or 4\)"):
        Budget(connections=3)
    monkeypatch.setenv("WEB_CONCURRENCY", "100")
    with pytest.raises(ConfigError, match=r"budget\.connections=90 .* budget\.processes=100 \(not given: WEB_CONCURRENCY"):
        Budget()


@pytest.mark.parametrize(("told", "processes"), [(None, 4), ("", 4), ("1", 1), ("8", 8)])
def test_how_many_processes_share_it_is_what_web_servers_are_told(
    monkeypatch: pytest.MonkeyPatch, told: str | None, processes: int
) -> None:
    if told is not None:
        monkeypatch.setenv("WEB_CONCURRENCY", told)

    assert Budget().share_of == processes
    assert Budget(processes=2).share_of == 2


@pytest.mark.parametrize("told", ["auto", "0", "-1", "2.5", " "])
def test_a_number_of_processes_that_is_none_is_not_guessed_at(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", told)

    with pytest.raises(ConfigError, match=r"WEB_CONCURRENCY must be a whole number, 1 or more; or give budget\.processes"):
        Budget()
    assert Budget(processes=2).share_of == 2


# -- URLs ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_the_usual_spellings_of_postgresql_are_one(scheme: str) -> None:
    found = ConnectionURL.parse(f"{scheme}://app:{CANARY}@localhost:5433/central")
    assert (found.backend, found.host, found.port, found.database, found.username) == ("postgresql", "localhost", 5433, "central", "app")
    assert found.password is not None
    assert found.password.get_secret_value() == CANARY
    assert ConnectionURL.parse(found) is found


def test_a_password_with_any_character_is_taken_as_it_is() -> None:
    password = "p@ss:w/o?r#d %&="
    found = ConnectionURL.parse(URL.create("postgresql", "app", password, "db1", 5432, "central"))
    assert found.password is not None
    assert found.password.get_secret_value() == password
    assert found.host == "db1"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://app@db1/central?password={CANARY}",  # K6
        f"postgresql://app:{CANARY}@db1/central?hostaddr=192.0.2.1",  # K15
        f"postgresql://app:{CANARY}@db1/central?options=-csearch_path%3Devil",
        f"postgresql://app:{CANARY}@db1/central?service=evil",
        f"postgresql://app:{CANARY}@db1/central?passfile=/tmp/x",
        f"postgresql://app:{CANARY}@db1/central?user=postgres",
        f"postgresql://app:{CANARY}@db1/central?dbname=postgres",
        f"postgresql://app:{CANARY}@db1/central?port=1",
        f"postgresql://app:{CANARY}@db1,db2/central",
        f"postgresql://app:{CANARY}@/central?host=db1,db2",
        f"postgresql://app:{CANARY}@/central?host=db1&host=db2",
        f"postgresql://app:{CANARY}@db1/central?sslmode=verify-full&sslmode=disable",
        f"postgresql://app:{CANARY}@db1:0/central",
        f"postgresql://app:{CANARY}@db1:65536/central",
        f"postgresql://app:{CANARY}@db1:port/central",
        f"postgresql+asyncpg://app:{CANARY}@db1/central",
        f"mysql://app:{CANARY}@db1/central",
        f"{CANARY}",
        f"postgresql:/{CANARY}@db1",
    ],
)
def test_a_url_that_could_lead_elsewhere_is_refused_without_being_shown(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for make in (
        ConnectionURL.parse,
        lambda value: Settings(url=value, secret_keys=[KEY]),
        lambda value: TenantDB(value, secret_keys=[KEY]),
    ):
        with pytest.raises(ConfigError) as caught:
            make(url)
        shown = "".join(traceback.format_exception(caught.value.with_traceback(None))) + repr(caught.value) + caplog.text
        assert CANARY not in shown


def test_a_name_that_libpq_would_read_more_into_stays_a_name() -> None:
    """K13: what is after the slash is a database's name and never an option."""
    found = ConnectionURL.parse("postgresql://app@db1/ta host=evil")
    assert (found.host, found.database) == ("db1", "ta host=evil")


def test_a_socket_folder_is_a_host() -> None:
    found = ConnectionURL.parse("postgresql://app@/central?host=/var/run/postgresql")
    assert found.host == "/var/run/postgresql"
    assert found.is_local


@given(st.text(max_size=80))
def test_whatever_is_given_as_a_url_is_a_url_or_a_config_error(text: str) -> None:
    for value in (text, f"postgresql://{text}", f"postgresql://app@db1/{text}", f"sqlite:///{text}"):
        try:
            ConnectionURL.parse(value)
        except ConfigError as error:
            assert len(text) < 8 or text not in str(error)


# -- transport -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "local"),
    [
        (None, True),
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("/var/run/postgresql", True),
        ("db1", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("192.0.2.1", False),
        ("0.0.0.0", False),
    ],
)
def test_local_is_loopback_or_a_socket_and_no_name_server_is_asked(host: str | None, local: bool) -> None:
    assert is_local(host) is local


@pytest.mark.parametrize("mode", ["disable", "allow", "prefer", "require", "verify-ca"])
def test_weaker_transport_than_verified_tls_is_refused_off_this_machine_unless_it_is_said(mode: str) -> None:
    weak = f"postgresql://app:{CANARY}@db1.example/central?sslmode={mode}"
    with pytest.raises(InsecureTransport, match="insecure_transport=True") as caught:
        postgresql(url=weak)
    assert "verify-full" in str(caught.value)
    assert CANARY not in str(caught.value)
    assert postgresql(url=weak, insecure_transport=True).url.tls == {"sslmode": mode}
    assert postgresql(url=weak.replace("db1.example", "localhost")).url.is_local


def test_verified_transport_is_taken_with_its_certificates() -> None:
    found = postgresql(url="postgresql://app@db1.example/central?sslmode=verify-full&sslrootcert=/ca.crt").url
    assert found.tls == {"sslmode": "verify-full", "sslrootcert": "/ca.crt"}


@pytest.mark.parametrize(
    ("rule", "host", "allowed"),
    [
        ("db1.example", "db1.example", True),
        ("db1.example", "db2.example", False),
        ("db1.example", "xdb1.example", False),
        (".example", "db1.example", True),
        (".example", "db1.example.evil", False),
        (".example", "example", False),
        ("192.0.2.0/24", "192.0.2.77", True),
        ("192.0.2.0/24", "192.0.3.1", False),
        ("192.0.2.0/24", "db1.example", False),
    ],
)
def test_allowed_hosts_are_names_suffixes_and_blocks(rule: str, host: str, allowed: bool) -> None:
    url = f"postgresql://app@{host}/central"
    if allowed:
        assert postgresql(url=url, allowed_hosts=[rule]).url.host == host
    else:
        with pytest.raises(ConfigError, match="allowed_hosts"):
            postgresql(url=url, allowed_hosts=[rule])


RULES = ("127.0.0.1", "10.0.0.0/8", ".good.example")


@pytest.mark.parametrize(
    "where",
    [
        "169.254.169.254",  # where a cloud tells its secrets
        "localhost",  # the same machine by another name
        "127.0.0.2",
        "127.0.0.1.good.example.evil",
        "[::ffff:127.0.0.1]",
        "[::ffff:10.1.2.3]",
        "[::1]",
        "0x7f000001",
        "2130706433",
        "127.1",
        "good.example",
        "DB1.GOOD.EXAMPLE",
        "db1.good.example.",
        "evil.example,db1.good.example",
        "db1.good.example,evil.example",
        "127.0.0.1:0",
        "127.0.0.1:99999",
        "/central?host=/tmp",
        "/central?host=evil.example,db1.good.example",
    ],
)
def test_only_what_stands_in_allowed_hosts_is_allowed_however_it_is_spelled(where: str) -> None:
    with pytest.raises(ConfigError):
        postgresql(url=f"postgresql://app@{where}/central" if "/" not in where else f"postgresql://app@{where}", allowed_hosts=RULES)


@pytest.mark.parametrize("where", ["127.0.0.1", "127.0.0.1:65535", "10.255.0.1", "db1.good.example"])
def test_and_what_stands_there_is(where: str) -> None:
    assert postgresql(url=f"postgresql://app@{where}/central", allowed_hosts=RULES).url.host == where.partition(":")[0]


def test_allowed_hosts_hold_for_every_url() -> None:
    elsewhere = "postgresql://prov@db9.evil/postgres"
    for values in ({"server": elsewhere}, {"servers": {"eu": elsewhere}}, {"registry_admin": elsewhere}):
        with pytest.raises(ConfigError, match="allowed_hosts"):
            postgresql(allowed_hosts=["localhost"], **values)


# -- the environment -------------------------------------------------------------------------------------------------------------------


def test_settings_come_from_the_environment_and_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "URL": POSTGRESQL,
        "SERVERS": json.dumps({"eu": "postgresql://prov@localhost/postgres"}),
        "SECRET_KEYS": f"{KEY}, {KEY}",
        "ALLOWED_HOSTS": '["localhost", ".example"]',
        "REGISTRY_POOL_SIZE": "7",
        "INSECURE_TRANSPORT": "true",
        "BUDGET": '{"connections": 40, "processes": 2, "acquire_timeout": 0.5}',
        "HARDENING": "managed",
        "MIGRATIONS": "clinic:migrations",
        "COMPATIBLE_REVISIONS": "0001, 0002",
    }
    for name, value in given.items():
        monkeypatch.setenv(f"TENANTDB_{name}", value)
    monkeypatch.setenv("TENANTDB_UNKNOWN", "is no setting of this version")
    found = Settings.from_env(cache_size=3, registry_pool_size=8)
    assert found.url.username == "app"
    assert list(found.servers) == ["eu"]
    assert [key.get_secret_value() for key in found.secret_keys] == [KEY, KEY]
    assert found.allowed_hosts == ("localhost", ".example")
    assert found.compatible_revisions == ("0001", "0002")
    assert (found.registry_pool_size, found.cache_size) == (8, 3)
    assert found.budget == Budget(connections=40, processes=2, acquire_timeout=0.5)
    assert (found.insecure_transport, found.hardening, found.migrations) == (True, "managed", "clinic:migrations")
    assert TenantDB.from_env(budget=Budget(connections=7, processes=1)).settings.budget.connections == 7


def test_the_environment_reads_every_setting_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {
        "registry_pool_size": "many",
        "budget": "{",
        "cache_ttl": "9",
        "hardening": "none",
        "servers": "{",
        "secret_keys": "[",
        "connect_timeout": "1",
        "compatible_revisions": "0001 head",
    }
    for name, value in bad.items():
        with monkeypatch.context() as patch:
            patch.setenv("TENANTDB_URL", SQLITE)
            patch.setenv(f"TENANTDB_{name.upper()}", value)
            with pytest.raises(ConfigError, match=name):
                Settings.from_env()


def test_without_a_url_the_error_names_the_variable() -> None:
    with pytest.raises(ConfigError, match="TENANTDB_URL"):
        Settings.from_env()


# -- nothing shows a secret ------------------------------------------------------------------------------------------------------------


def test_no_password_and_no_key_shows_in_any_rendering() -> None:
    settings = postgresql(
        registry_admin=POSTGRESQL.replace("app:", "admin:"),
        servers={"eu": f"postgresql://prov:{CANARY}@localhost/postgres"},
    )
    db = TenantDB(settings)
    shown = [repr(thing) + str(thing) for thing in (settings, settings.url, settings.servers, settings.secret_keys, db, vars(settings))]
    shown += [str(settings.model_dump()), settings.model_dump_json(), f"{settings.url}", str(dict(settings)), str(copy.deepcopy(settings))]
    shown += [str(dataclasses.asdict(settings.url)), str(vars(db))]
    assert [text for text in shown if CANARY in text or KEY in text] == []
    assert settings.url.password is not None
    assert settings.url.password.get_secret_value() == CANARY  # and it is there
    assert str(settings.url) == "postgresql://app@localhost:5433/central"
    db.close()


@pytest.mark.parametrize(
    "values",
    [
        {"url": POSTGRESQL},
        {"url": POSTGRESQL, "secret_keys": [KEY], "registry_pool_size": 0},
        {"url": POSTGRESQL, "secret_keys": [KEY], "budget": f'{{"connections": "{CANARY}'},
        {"url": POSTGRESQL, "secret_keys": [KEY], "budget": f'{{"connections": "{CANARY}"}}'},
        {"url": POSTGRESQL, "secret_keys": [KEY], "budget": f'"{CANARY}"'},
        {"url": POSTGRESQL, "secret_keys": [KEY], "budget": CANARY},
        {"url": POSTGRESQL, "secret_keys": [KEY], "registry_admin": SQLITE},
        {"url": POSTGRESQL, "secret_keys": [KEY], "allowed_hosts": ["db9"]},
        {"url": POSTGRESQL, "secret_keys": [KEY], CANARY: POSTGRESQL},
        {"url": POSTGRESQL, "secret_keys": {"not": CANARY}},
        {"url": [POSTGRESQL], "secret_keys": [KEY]},
        {"url": POSTGRESQL, "secret_keys": [KEY], "servers": {"eu": f"x://{CANARY}"}},
        {"url": POSTGRESQL, "secret_keys": [KEY], "servers": f'{{"eu": "{CANARY}'},
    ],
)
def test_no_refusal_shows_what_was_given(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings(**values)
    name_is_the_canary = CANARY in values
    shown = "".join(traceback.format_exception(caught.value.with_traceback(None)))
    assert name_is_the_canary or CANARY not in shown
    assert KEY not in shown
    assert "localhost:5433" not in shown


def test_a_malformed_key_is_refused_when_the_object_is_made_without_being_shown() -> None:
    for bad in (CANARY, "", KEY[:-4], KEY + KEY, "owner:" + CANARY):
        with pytest.raises(SecretKeyError) as caught:
            TenantDB(POSTGRESQL, secret_keys=[bad])
        assert CANARY not in str(caught.value) + repr(caught.value)
    TenantDB(POSTGRESQL, secret_keys=[KEY]).close()
