"""Every verb of the command line on SQLite, and every mistake: exit codes, what is said, and where."""

from __future__ import annotations

import getpass
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from tenantdb import TenantDB, errors
from tenantdb.cli import output
from tenantdb.cli.group import SECTIONS, cli
from tenantdb.context import acting, current_actor
from tenantdb.registry import SignUp
from tenantdb.registry.secrets import Keyring, generate_key

URL = "sqlite:///data/central.sqlite3"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TENANTDB_URL", URL)
    return URL


@pytest.fixture
def db(url: str) -> Iterator[TenantDB]:
    """The same installation seen from Python, with a registry that is ready."""
    with TenantDB(url) as db:
        db.init()
        yield db


def run(*words: str, exit_code: int = 0, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(cli, words, input=stdin, prog_name="tenantdb")
    assert result.exit_code == exit_code, f"{result.output}\n{result.exception!r}"
    return result


def document(*words: str, exit_code: int = 0) -> Any:
    return json.loads(run(*words, "--json", exit_code=exit_code).stdout)


# -- help and the next step ------------------------------------------------------------------------------------------------------------


def test_help_lists_every_verb_in_its_section() -> None:
    text = run("--help").stdout

    assert [line[:-1] for line in text.splitlines() if line.endswith(":") and line[:-1].lower() in SECTIONS] == [
        "Start",
        "Tenants",
        "Fleet",
        "Security",
        "Operate",
    ]
    assert all(f"  {command.name} " in text for commands in SECTIONS.values() for command in commands)
    assert "..." not in text.partition("Start:")[2]  # no explanation is cut off at 80 columns


def test_every_verb_that_prints_data_has_json() -> None:
    verbs = [command for commands in SECTIONS.values() for command in commands]
    verbs += [command for verb in verbs if isinstance(verb, click.Group) for command in verb.commands.values()]
    verbs = [verb for verb in verbs if not isinstance(verb, click.Group)]

    without = [verb.name for verb in verbs if not any("--json" in parameter.opts for parameter in verb.params)]

    assert without == ["shell"]  # somebody else's program


def test_without_a_verb_it_says_how_to_begin() -> None:
    text = run().stdout

    assert "TENANTDB_URL" in text and "tenantdb dev" in text


def test_without_a_verb_it_leads_from_nothing_to_a_checked_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps = [document()["next"]]
    monkeypatch.setenv("TENANTDB_URL", "postgresql://app@127.0.0.1:1/central")
    steps.append(document()["next"])
    monkeypatch.setenv("TENANTDB_URL", URL)
    steps.append(document()["next"])
    run("init")
    steps.append(document()["next"])
    run("provision", "acme")
    steps.append(document()["next"])
    write_revision(tmp_path, "001")
    monkeypatch.setenv("TENANTDB_MIGRATIONS", "scripts")
    steps.append(document()["next"])

    assert steps == [
        "tenantdb dev",
        "tenantdb generate-key",
        "tenantdb init",
        "tenantdb provision SLUG",
        "tenantdb check",
        "tenantdb migrate",
    ]


def test_without_a_verb_a_failed_tenant_comes_first(db: TenantDB) -> None:
    fail_at_seed(db, "acme")

    assert document()["next"] == "tenantdb provision acme"


def test_without_a_verb_nothing_is_made(url: str, tmp_path: Path) -> None:
    run()

    assert list(tmp_path.iterdir()) == []


# -- one tenant's life -----------------------------------------------------------------------------------------------------------------


def test_init_provision_list_show_suspend_activate(url: str) -> None:
    assert "default" in run("init").stdout
    assert run("provision", "acme", "--name", "Acme Clinic").stdout == "acme is active\n"
    assert run("provision", "beta").stdout == "beta is active\n"
    assert run("suspend", "acme").stdout == "acme is suspended\n"

    lines = run("list").stdout.splitlines()
    assert lines[0].split("\t")[:3] == ["acme", "suspended", "Acme Clinic"]
    assert lines[1].split("\t")[:3] == ["beta", "active", "beta"]
    assert [tenant["slug"] for tenant in document("list", "--state", "active")] == ["beta"]
    assert "No tenants that are failed" in run("list", "--state", "failed").stderr

    shown = document("show", "acme")
    assert (shown["name"], shown["state"]) == ("Acme Clinic", "suspended")
    assert document("show", shown["id"]) == shown
    assert "Acme Clinic" in run("show", "acme").stdout
    assert document("activate", "acme")["state"] == "active"
    assert document("init") == {"servers": ["default"]}


def test_json_may_stand_before_the_verb(db: TenantDB) -> None:
    assert json.loads(run("--json", "list").stdout) == []


def test_provision_passes_its_details_on(db: TenantDB) -> None:
    owner = db.users.create("ann@acme.example", "correct horse battery")
    details = {"email": "desk@acme.example", "phone": "+44 1", "country": "GB", "plan": "pro", "subscription": "active"}

    words = [word for name, value in details.items() for word in (f"--{name}", value)]
    made = document("provision", "acme", "--owner-email", "Ann@acme.example", "--server", "default", *words)

    assert {name: made[name] for name in details} == details
    assert [(member.user_id, str(member.role)) for member in db.memberships.list(tenant="acme")] == [(owner.id, "owner")]


def test_a_server_or_a_region_that_is_not_there_is_no_server(db: TenantDB) -> None:
    assert error("provision", "acme", "--server", "moon")["code"] == "provisioning"
    assert error("provision", "beta", "--region", "mars")["code"] == "provisioning"


def test_an_owner_who_is_not_there_is_told_and_nothing_is_made(db: TenantDB) -> None:
    assert error("provision", "acme", "--owner-email", "nobody@acme.example")["code"] == "user-not-found"
    assert db.tenants.list() == []


def test_a_taken_slug_is_an_error_and_exist_ok_takes_what_is_there(db: TenantDB) -> None:
    made = db.provision("acme", name="First")

    assert error("provision", "acme", "--name", "Second")["code"] == "tenant-exists"
    again = document("provision", "acme", "--name", "Second", "--exist-ok")
    assert (again["id"], again["name"]) == (str(made.id), "First")


def test_a_failed_tenant_is_continued_whatever_details_are_given_now(db: TenantDB) -> None:
    fail_at_seed(db, "acme", name="Acme")

    assert document("provision", "acme", "--name", "Another")["state"] == "active"
    assert db.tenants.get("acme").name == "Acme"


def test_the_audit_log_says_who_sat_at_the_command_line(db: TenantDB) -> None:
    run("provision", "acme")
    run("suspend", "acme")

    actors = {entry.action: entry.actor for entry in db.audit.list(tenant="acme")}
    assert actors["tenant.sign_up"] == actors["tenant.suspend"] == f"cli:{getpass.getuser()}"
    with acting("somebody"):
        run("activate", "acme")
        assert current_actor().actor == "somebody"


def test_a_system_user_without_a_name_acts_under_its_number(db: TenantDB, monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(getpass, "getuser", nameless)
    run("provision", "acme")

    assert db.audit.list(tenant="acme")[0].actor.startswith("cli:uid-")


# -- mistakes --------------------------------------------------------------------------------------------------------------------------


def error(*words: str, exit_code: int = 1) -> dict[str, str]:
    """What a command that fails says in JSON; its stdout must be empty."""
    result = run("--json", *words, exit_code=exit_code)
    assert result.stdout == ""
    told: dict[str, dict[str, str]] = json.loads(result.stderr)
    assert list(told) == ["error"] and set(told["error"]) == {"code", "message"}
    return told["error"]


@pytest.mark.parametrize("verb", ["show", "suspend", "activate", "shell"])
def test_an_unknown_slug_gets_did_you_mean(db: TenantDB, verb: str) -> None:
    db.provision("acme-dental")

    result = run(verb, "acme-dentl", exit_code=1)

    assert "did you mean 'acme-dental'?" in result.stderr and len(result.stderr.splitlines()) == 1
    assert "did you mean" not in run(verb, "zzzzzz", exit_code=1).stderr


@pytest.mark.parametrize(
    "slug",
    [
        "",
        "A",
        "Acme",
        "a'b",
        'a"b',
        "a.b",
        "a/b",
        "../x",
        "acme\0",
        "acme-🙂",
        "a" * 200,
        "postgres",
        "template1",
        "pg_x",
        "acme;drop",
        "-acme",
    ],
)
def test_a_bad_slug_is_refused_by_its_rule_before_anything_is_asked(url: str, tmp_path: Path, slug: str) -> None:
    told = error("provision", "--", slug, exit_code=2)

    assert told["code"] == "invalid-slug"
    assert "\0" not in told["message"] and len(told["message"]) < 300
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "key", ["Acme", "a.b", "", "urn:uuid:6ba7b810-9dad-11d1-80b4-00c04fd430c8", "{6ba7b810-9dad-11d1-80b4-00c04fd430c8}"]
)
def test_what_can_name_no_tenant_is_a_mistake_of_the_command_line(db: TenantDB, key: str) -> None:
    assert error("show", key, exit_code=2)["code"] == "invalid-tenant-key"


def test_details_that_no_row_may_hold_are_refused_by_name(url: str) -> None:
    for value in ("", "a\x1b[31mb", "x" * 201):
        assert "--name" in error("provision", "acme", "--name", value, exit_code=2)["message"]
    assert "subscription" in error("provision", "acme", "--subscription", "gold", exit_code=2)["message"]


def test_an_unknown_verb_or_option_is_a_usage_error_in_json_too(url: str) -> None:
    assert json.loads(run("--json", "purgee", exit_code=2).stderr)["error"]["code"] == "usage"
    assert error("list", "--bogus", exit_code=2)["code"] == "usage"
    assert json.loads(run("show", "--json", exit_code=2).stderr)["error"]["message"] == "Missing argument 'SLUG'."
    assert "No such command" in run("purgee", exit_code=2).stderr


def test_missing_settings_are_told_with_the_ways_to_give_them() -> None:
    told = error("list", exit_code=2)

    assert told["code"] == "usage"
    assert all(way in told["message"] for way in ("TENANTDB_URL", "--app", "tenantdb dev"))


def test_a_registry_without_tables_is_told_with_the_command_that_makes_them(url: str) -> None:
    told = error("list")

    assert told["code"] == "registry-not-initialized" and "tenantdb init" in told["message"]


def test_an_illegal_change_of_state_is_one_line(db: TenantDB) -> None:
    db.provision("acme")

    result = run("activate", "acme", exit_code=1)

    assert result.stderr.startswith("Error: ") and len(result.stderr.splitlines()) == 1


def test_traceback_shows_where_an_error_arose_and_only_then(db: TenantDB, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" not in run("show", "acme", exit_code=1).stderr
    assert "Traceback" in run("--traceback", "show", "acme", exit_code=1).stderr
    monkeypatch.setenv("TENANTDB_TRACEBACK", "1")
    assert "Traceback" in run("show", "acme", exit_code=1).stderr


def test_what_nobody_expected_keeps_its_traceback(db: TenantDB, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("tenantdb.registry.tenants.TenantStore.list", broken)

    assert isinstance(run("list", exit_code=1).exception, ZeroDivisionError)


@pytest.mark.parametrize("kind", [kind for kind in errors.all_errors() if kind.retryable])
def test_what_may_succeed_later_says_so_by_its_exit_code(kind: type[errors.TenantDBError]) -> None:
    assert output.exit_code(kind.__new__(kind)) == 75


def test_a_registry_out_of_reach_means_try_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENANTDB_URL", "postgresql://app:canary-password@127.0.0.1:1/central")
    monkeypatch.setenv("TENANTDB_SECRET_KEYS", generate_key())

    result = run("--traceback", "list", exit_code=75)

    assert "canary-password" not in result.output
    run(exit_code=75)


def test_a_name_cannot_steer_the_terminal() -> None:
    assert output.shown("a\x1b]0;b\x07\nc\u202e") == "a?]0;b?\nc?"


# -- keys ------------------------------------------------------------------------------------------------------------------------------


def test_generate_key_prints_a_new_key_each_time() -> None:
    first, second = run("generate-key").stdout.strip(), document("generate-key")["keys"][0]

    assert first != second
    assert Keyring([first, second]).holds("owner")


def test_derived_keys_are_the_runtime_keys_of_the_given_ones_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [generate_key(), generate_key()]
    monkeypatch.setenv("TENANTDB_SECRET_KEYS", ",".join(keys))

    derived = run("generate-key", "--derive", "runtime").stdout.split()

    assert derived == Keyring(keys).derive("runtime")
    assert not Keyring(derived).holds("owner")
    assert not any(key in " ".join(derived) for key in keys)


def test_deriving_without_a_key_or_from_a_bad_one_fails_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert error("generate-key", "--derive", "runtime")["code"] == "secret-key"
    monkeypatch.setenv("TENANTDB_SECRET_KEYS", "canary-key")
    assert "canary-key" not in error("generate-key", "--derive", "runtime")["message"]


# -- check, worker, shell --------------------------------------------------------------------------------------------------------------


def test_check_passes_with_warnings_and_fails_with_problems(url: str) -> None:
    found = document("check", exit_code=1)
    assert not found["ok"] and found["findings"][0]["severity"] == "problem"
    assert run("check", exit_code=1).stdout.startswith("problem: registry: ")

    run("init")

    found = document("check")
    assert found["ok"] and {finding["severity"] for finding in found["findings"]} == {"warning"}
    assert "problems: 0; warnings: 1" in run("check").stdout


def test_worker_once_makes_what_waits_and_tells_what_failed(db: TenantDB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at_seed(db, "old")  # failed before, so not this worker's failure
    db._registry.sign_up(SignUp(slug="acme"))
    assert document("worker", "--once") == {"done": 1, "failed": []}
    assert db.tenants.get("acme").state == "active"

    db._registry.sign_up(SignUp(slug="beta"))
    write_revision(tmp_path, "001", "raise RuntimeError('no')")
    monkeypatch.setenv("TENANTDB_MIGRATIONS", "scripts")
    assert document("worker", "--once", exit_code=3) == {"done": 0, "failed": ["beta"]}
    assert run("worker", "--once").stdout == "carried out: 0; failed: 0\n"


def test_shell_runs_a_script_with_the_tenant_bound_and_commits_only_when_told(db: TenantDB) -> None:
    db.provision("acme")
    make = "from sqlalchemy import text\nsession.execute(text('CREATE TABLE t (x int)'))\n"
    look = "from sqlalchemy import inspect\nprint(inspect(session.connection()).has_table('t'))\n"

    run("shell", "acme", stdin=make)
    assert run("shell", "acme", stdin=look).stdout == "False\n"
    run("shell", "acme", stdin=make + "session.commit()\n")
    assert run("shell", "acme", stdin=look).stdout == "True\n"
    bound = "from tenantdb import current_tenant\nprint(tenant.slug, current_tenant().slug, db.session().connection() is not None)\n"
    assert run("shell", "acme", stdin=bound).stdout == "acme acme True\n"


def test_a_script_that_raises_fails_with_its_own_lines(db: TenantDB) -> None:
    db.provision("acme")

    result = run("shell", "acme", stdin="x = 1\nx / 0\n", exit_code=1)

    assert 'File "<stdin>", line 2' in result.stderr and "ZeroDivisionError" in result.stderr
    assert "SyntaxError" in run("shell", "acme", stdin="x =\n", exit_code=1).stderr
    run("shell", "acme", stdin="raise SystemExit(7)\n", exit_code=7)


def test_no_command_works_on_a_tenant_that_nobody_named(db: TenantDB) -> None:
    """C1. An option ``--tenant`` narrows what a command looks at; whom one works on is an argument."""
    db.provision("acme")

    def commands(group: click.Group, name: str = "") -> Iterator[tuple[str, click.Command]]:
        for each, command in group.commands.items():
            if isinstance(command, click.Group):
                yield from commands(command, f"{name}{each} ")
            else:
                yield f"{name}{each}", command

    arguments = {name: parameter.required for name, command in commands(cli) for parameter in command.params if parameter.opts == ["slug"]}

    assert {name for name, required in arguments.items() if not required} == {"purge", "rotate-credentials"}
    for verb, said in {
        "shell": "Missing argument 'SLUG'",
        "purge": "say which tenant",
        "rotate-credentials": "the slug of one tenant",
    }.items():
        result = run(verb, exit_code=2, stdin="print(session)")
        assert said in result.stderr and not result.stdout


def test_shell_opens_no_tenant_that_is_not_served(db: TenantDB) -> None:
    db.provision("acme")
    db.suspend("acme")

    assert "suspended" in run("shell", "acme", stdin="print('inside')", exit_code=1).stderr


# -- migrate ---------------------------------------------------------------------------------------------------------------------------


def test_migrate_brings_every_tenant_to_head_and_goes_on_past_one_that_fails(
    db: TenantDB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for slug in ("acme", "beta", "gamma"):
        db.provision(slug)
    with db.begin("beta") as session:
        session.connection().exec_driver_sql("CREATE TABLE t001 (x int)")  # in the way of the migration
    write_revision(tmp_path, "001")
    monkeypatch.setenv("TENANTDB_MIGRATIONS", "scripts")

    result = run("migrate", exit_code=3)

    assert result.stdout == "001: done; migrated: 2; failed: 1\n"
    assert "beta: failed: " in result.stderr and "table t001 already exists" in result.stderr and "tenantdb rollouts retry" in result.stderr
    told = document("migrate", exit_code=3)
    assert (told["target"], told["state"], told["done"], list(told["failed"])) == ("001", "done", 0, ["beta"])
    assert {slug: db.tenants.get(slug).revision for slug in ("acme", "beta", "gamma")} == {"acme": "001", "beta": None, "gamma": "001"}

    with db.begin("beta") as session:
        session.connection().exec_driver_sql("DROP TABLE t001")
    told = document("migrate")
    assert {name: told[name] for name in ("target", "state", "done", "failed", "waiting", "refused", "spares", "error")} == {
        "target": "001",
        "state": "done",
        "done": 1,
        "failed": {},
        "waiting": 0,
        "refused": {},
        "spares": 0,
        "error": None,
    }
    assert document("migrate")["rollout"] is None  # nobody is behind


def test_migrate_of_one_tenant_leaves_the_others(db: TenantDB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    db.provision("acme")
    db.provision("beta")
    write_revision(tmp_path, "001")
    monkeypatch.setenv("TENANTDB_MIGRATIONS", "scripts")

    assert document("migrate", "--tenant", "acme")["done"] == 1
    assert db.tenants.get("acme").revision == "001"
    assert db.tenants.get("beta").revision is None
    assert error("migrate", "--tenant", "bet")["message"].endswith("did you mean 'beta'?")


def test_migrate_without_a_script_location_is_told(db: TenantDB) -> None:
    assert error("migrate")["code"] == "migration"


def test_migrations_init_writes_a_script_location_and_never_over_one(tmp_path: Path) -> None:
    words = ("migrations", "init", "clinic/migrations", "--app", "clinic.db:db", "--metadata", "clinic.models:Base.metadata")

    written = document(*words)["written"]

    assert written == ["clinic/migrations/env.py", "clinic/migrations/script.py.mako", "alembic.ini"]
    assert all((tmp_path / name).is_file() for name in written)
    environment = (tmp_path / "clinic/migrations/env.py").read_text()
    assert "run_env(db, target_metadata=Base.metadata)" in environment
    compile(environment, "env.py", "exec")
    assert error(*words)["code"] == "migration"
    assert (tmp_path / "clinic/migrations/env.py").read_text() == environment


def test_migrations_init_takes_the_app_of_the_whole_command_or_asks_for_one(tmp_path: Path) -> None:
    run("--app", "clinic.db:db", "migrations", "init", "scripts", "--metadata", "clinic.models:metadata")
    assert "from clinic.db import db" in (tmp_path / "scripts/env.py").read_text()
    assert "--app" in error("migrations", "init", "other", "--metadata", "clinic.models:metadata", exit_code=2)["message"]
    assert error("migrations", "init", "other", "--app", "clinic", "--metadata", "m:m")["code"] == "migration"


# -- bootstrap-server ------------------------------------------------------------------------------------------------------------------

CANARY = "canary-0f2c"


def test_bootstrap_server_prints_a_script_without_any_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENANTDB_PROVISIONER_PASSWORD", CANARY)

    text = run("bootstrap-server", "--print", "--provisioner", "prov").stdout

    assert "SCRAM-SHA-256$" in text and '"prov"' in text and CANARY not in text
    told = document("bootstrap-server", "--print", "--provisioner", "prov")
    assert told["provisioner"] == "prov" and "SCRAM-SHA-256$" in told["sql"] and CANARY not in told["sql"]


def test_bootstrap_server_takes_the_provisioner_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENANTDB_URL", "postgresql://app@127.0.0.1:1/central")
    monkeypatch.setenv("TENANTDB_SECRET_KEYS", generate_key())
    servers = {name: f"postgresql://{name}_prov:{CANARY}@127.0.0.1:1/postgres" for name in ("east", "west")}
    monkeypatch.setenv("TENANTDB_SERVERS", json.dumps(servers))

    result = run("bootstrap-server", "--print", "--server", "west")

    assert "west_prov" in result.stdout and CANARY not in result.output
    assert "east, west" in error("bootstrap-server", "--print", exit_code=2)["message"]
    assert "north" in error("bootstrap-server", "--print", "--server", "north", exit_code=2)["message"]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ([], "TENANTDB_SUPERUSER_URL"),
        (["--print"], "--provisioner"),
        (["--print", "--provisioner", "prov"], "TENANTDB_PROVISIONER_PASSWORD"),
        (["--superuser-url", "sqlite:///x", "--provisioner", "prov"], "TENANTDB_PROVISIONER_PASSWORD"),
    ],
)
def test_bootstrap_server_says_what_it_misses(words: list[str], hint: str) -> None:
    assert hint in error("bootstrap-server", *words, exit_code=2)["message"]


def test_bootstrap_server_sends_no_password_where_anybody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENANTDB_PROVISIONER_PASSWORD", CANARY)
    for weak, code, exit_code in (
        (f"postgresql://root:{CANARY}@db.example.com/postgres?sslmode=require", "insecure-transport", 1),
        (f"mysql://root:{CANARY}@db/x", "config", 1),
        ("sqlite:///data", "usage", 2),
    ):
        monkeypatch.setenv("TENANTDB_SUPERUSER_URL", weak)
        told = error("bootstrap-server", "--provisioner", "prov", exit_code=exit_code)
        assert told["code"] == code and CANARY not in told["message"]


# -- help for the tests above ----------------------------------------------------------------------------------------------------------


def fail_at_seed(db: TenantDB, slug: str, **details: Any) -> None:
    """A tenant that failed half-way."""
    with TenantDB(db.settings) as broken:

        @broken.seed
        def raises(session: Any, tenant: Any) -> None:
            raise RuntimeError("the seed is broken")

        with pytest.raises(errors.ProvisioningError):
            broken.provision(slug, **details)


def write_revision(folder: Path, revision: str, body: str = "op.execute('CREATE TABLE t001 (x int)')") -> None:
    """A script location ``scripts`` whose head is ``revision``."""
    versions = folder / "scripts" / "versions"
    versions.mkdir(parents=True)
    (folder / "scripts" / "env.py").write_text(
        "from types import SimpleNamespace\nfrom tenantdb.migrations import run_env\n"
        "run_env(SimpleNamespace(migrations=None), target_metadata=None)\n"
    )
    (versions / f"{revision}.py").write_text(
        f"from alembic import op\nrevision, down_revision, branch_labels, depends_on = {revision!r}, None, None, None\n"
        f"def upgrade():\n    {body}\n"
    )
