"""Alembic's own command on a small application: what it may do with a tenant named, without one, and on a scratch database."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url, select

from tenantdb.migrations import init
from tenantdb.registry.tables import templates
from tests.cli_process import PRICE, Shell, write_shop
from tests.world import PostgreSQLWorld, pg_world

METADATA = "shop.models:Base.metadata"


@pytest.fixture(scope="module")
def world() -> Iterator[PostgreSQLWorld]:
    with pg_world() as world:
        yield world


INITIAL = """
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "001", None, None, None


def upgrade() -> None:
    op.create_table("products", sa.Column("id", sa.Integer, primary_key=True), sa.Column("name", sa.String, nullable=False))


def downgrade() -> None:
    op.drop_table("products")
"""
PREPARE = """
from shop.db import db

db.init()
db.provision("acme")
db.provision("beta")
"""
LOOK = """
import json
from sqlalchemy import inspect
from shop.db import db

found = {}
for tenant in db.tenants.list():
    with db.connect(tenant) as connection:
        look = inspect(connection)
        names = [column["name"] for column in look.get_columns("products")] if look.has_table("products") else []
        found[tenant.slug] = (tenant.revision, names)
print(json.dumps(found))
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shell]:
    """An application with models and settings, and nothing else. Whatever is run there shows no password and no key."""
    scratch = tmp_path / "temporary"
    scratch.mkdir()
    exports = {"TENANTDB_URL": "sqlite:///data/central.sqlite3"}
    if request.param == "postgresql":
        given = request.getfixturevalue("world")._new_registry()
        exports = {f"TENANTDB_{name.upper()}": ",".join(value) if isinstance(value, list) else value for name, value in given.items()}
    write_shop(tmp_path)
    shell = Shell(tmp_path, {**exports, "TENANTDB_APP": "shop.db:db", "TMPDIR": str(scratch)})
    yield shell
    shell.assert_no_secret_printed()


@pytest.fixture
def grown(empty: Shell, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """The application with a first revision, two tenants at it, and a column that no revision knows yet."""
    monkeypatch.chdir(empty.folder)
    init(Path("shop/migrations"), app="shop.db:db", metadata=METADATA)
    (empty.folder / "shop/migrations/versions/001_initial.py").write_text(INITIAL)
    empty.python(PREPARE)
    add_price(empty)
    return empty


def add_price(shell: Shell) -> None:
    with (shell.folder / "shop" / "models.py").open("a") as models:
        models.write(PRICE)


def generate(shell: Shell, message: str) -> str:
    """``alembic revision --autogenerate``; gives the upgrade it wrote."""
    before = set(versions(shell))
    shell.alembic("revision", "--autogenerate", "-m", message)
    (made,) = set(versions(shell)) - before
    body = re.search(r"def upgrade\(\) -> None:\n(.*?)\n\n", made.read_text(), re.DOTALL)
    assert body
    return body[1]


def versions(shell: Shell) -> list[Path]:
    return sorted((shell.folder / "shop" / "migrations" / "versions").glob("*.py"))


def state(shell: Shell) -> dict[str, tuple[str | None, list[str]]]:
    """Of each tenant the revision that the registry holds and the columns that are really there."""
    return {slug: (revision, columns) for slug, (revision, columns) in json.loads(shell.python(LOOK).stdout).items()}


OLD, NEW = ["id", "name"], ["id", "name", "price"]
UNTOUCHED = {"acme": ("001", OLD), "beta": ("001", OLD)}


@pytest.fixture
def nothing_left(empty: Shell, request: pytest.FixtureRequest) -> Iterator[None]:
    """No scratch database survives the test: neither a file nor a database on the server that is no tenant's and no golden one."""
    postgresql: PostgreSQLWorld | None = request.getfixturevalue("world") if "TENANTDB_SERVER" in empty.exports else None
    before = databases(postgresql)
    yield
    assert list((empty.folder / "temporary").iterdir()) == []
    if postgresql is not None:
        tenants = {tenant["database"] for tenant in empty.json("list")}
        central = make_url(empty.exports["TENANTDB_URL"]).database or ""
        with postgresql.connect(central) as registry:
            golden = set(registry.scalars(select(templates.c.database)))
        assert tenants and databases(postgresql) - before == tenants | golden


def databases(world: PostgreSQLWorld | None) -> set[str]:
    if world is None:
        return set()
    return {name for (name,) in world.superuser.execute("SELECT datname FROM pg_database WHERE datname LIKE 't\\_%'").fetchall()}


def test_from_nothing_to_migrated_tenants_with_the_commands_alone(nothing_left: None, empty: Shell) -> None:
    empty.tenantdb("migrations", "init", "shop/migrations", "--metadata", METADATA)
    empty.tenantdb("init")

    diff = generate(empty, "initial")
    assert "op.create_table('products'" in diff and "tenantdb" not in diff
    assert empty.json("provision", "acme")["revision"]

    add_price(empty)
    assert "New upgrade operations detected" in said(empty.alembic("check", exit_code=255))
    diff = generate(empty, "price")
    assert "add_column(" in diff and "'price'" in diff
    assert not re.search(r"(create|drop)_table|drop_column", diff)
    assert "No new upgrade operations detected" in said(empty.alembic("check"))
    assert state(empty)["acme"][1] == OLD  # comparing touched no tenant

    told = empty.json("migrate")
    assert (told["state"], told["done"], told["failed"]) == ("done", 1, {})
    assert state(empty)["acme"] == (told["target"], NEW)
    assert empty.json("migrate")["rollout"] is None


def said(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout + done.stderr


def test_with_a_tenant_named_alembic_works_on_that_one_and_the_registry_knows(grown: Shell) -> None:
    generate(grown, "price")

    grown.alembic("-x", "tenant=acme", "upgrade", "head")
    after = state(grown)
    head = after["acme"][0]
    assert after == {"acme": (head, NEW), "beta": ("001", OLD)} and head != "001"
    assert f"{head} (head)" in grown.alembic("-x", "tenant=acme", "current").stdout

    grown.alembic("-x", "tenant=acme", "downgrade", "-1")
    assert state(grown) == UNTOUCHED
    grown.alembic("-x", "tenant=acme", "stamp", "head")
    assert state(grown) == {"acme": (head, OLD), "beta": ("001", OLD)}


def test_without_a_tenant_alembic_refuses_and_names_the_command_for_all(grown: Shell) -> None:
    for words in ("upgrade head", "downgrade -1", "downgrade base", "stamp head", "current"):
        text = said(grown.alembic(*words.split(), exit_code=255))
        assert "tenantdb migrate" in text and "-x tenant=" in text and "Traceback" not in text

    assert state(grown) == UNTOUCHED


def test_a_tenant_that_is_not_there_is_refused_in_one_line(grown: Shell) -> None:
    for slug, says in (("nobody", "no tenant 'nobody'"), ("No-Body", "names no tenant")):
        text = said(grown.alembic("-x", f"tenant={slug}", "upgrade", "head", exit_code=255))
        assert says in text and "Traceback" not in text


def test_offline_mode_prints_the_sql_and_touches_nothing(grown: Shell) -> None:
    assert "CREATE TABLE products" in grown.alembic("upgrade", "head", "--sql").stdout
    assert state(grown) == UNTOUCHED


def test_a_migration_that_raises_leaves_nothing_and_no_scratch_database(nothing_left: None, grown: Shell) -> None:
    generate(grown, "price")
    last = next(path for path in versions(grown) if "_price" in path.name)
    last.write_text(last.read_text().replace("\n\n\ndef downgrade", "\n    raise RuntimeError('half-way')\n\n\ndef downgrade"))

    assert "half-way" in grown.alembic("revision", "--autogenerate", "-m", "more", exit_code=1).stderr
    assert "half-way" in grown.alembic("-x", "tenant=acme", "upgrade", "head", exit_code=1).stderr
    told = grown.json("migrate", exit_code=3)

    assert told["error"] == "the migrations fail on an empty database: RuntimeError: half-way"
    assert (told["state"], told["done"], told["waiting"]) == ("halted", 0, 2)
    grown.tenantdb("rollouts", "cancel")
    alone = grown.json("migrate", "--tenant", "acme", exit_code=3)  # a rollout of named tenants prepares nothing
    assert alone["failed"] == {"acme": "RuntimeError: half-way"}
    assert state(grown) == UNTOUCHED
    assert len(versions(grown)) == 2
