"""Every block of every other page runs as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import psycopg
import pytest

from tenantdb.registry.secrets import Keyring
from tenantdb.testing.postgres import EmbeddedServer
from tests.docs.reader import DOCS, ROOT, Reader, blocks, pages
from tests.world import PostgreSQLWorld

ELSEWHERE = {
    "tutorial.md",
    "howto/postgresql.md",
    "howto/tests.md",
    "howto/workers.md",
    "howto/rotate-keys.md",
    "howto/rotate-passwords.md",
    "howto/spares.md",
    "howto/adopt.md",
    "howto/migrate-a-fleet.md",
    "howto/long-data-migrations.md",
    "howto/celery.md",
}  # followed by a test of their own
IN_THE_SHOP = [
    "howto/alembic.md",
    "howto/drift.md",
    "howto/expand-and-contract.md",
    "howto/scripts.md",
    "howto/context.md",
    "howto/logging.md",
    "howto/audit.md",
    "howto/lifecycle.md",
    "howto/export-and-clone.md",
    "howto/sign-ups.md",
    "howto/subscriptions.md",
    "howto/domains.md",
    "howto/revoke.md",
]


@pytest.mark.parametrize("page", IN_THE_SHOP)
@pytest.mark.timeout(300)
def test_the_how_to_pages_work_in_the_shop_of_the_tutorial(page: str, shop: Reader) -> None:
    shop.follow(page)


@pytest.mark.parametrize("page", [page for page in pages() if page not in {*ELSEWHERE, *IN_THE_SHOP}])
def test_the_other_pages_work_in_an_empty_folder(page: str, tmp_path: Path) -> None:
    with Reader(tmp_path) as reader:
        reader.follow(page)


@pytest.mark.timeout(300)
def test_tasks_are_published_and_run_as_the_page_says(shop: Reader) -> None:
    shop.replace["redis://localhost:6379/0"] = "memory://"
    shop.replace['backend="memory://"'] = 'backend="cache+memory://"'

    shop.follow("howto/celery.md")

    shop.run("celery -A shop.schedule report")


@pytest.mark.timeout(300)
def test_the_fixtures_test_the_shop_on_sqlite_and_on_postgresql(shop: Reader) -> None:
    # A plugin of these tests, not of the reader's, which warns where it finds no configuration.
    shop.environment["PYTEST_ADDOPTS"] = "-p no:asyncio"

    shop.follow("howto/tests.md")


@pytest.mark.parametrize("page", ["howto/workers.md", "howto/spares.md"])
@pytest.mark.timeout(300)
def test_a_web_process_and_a_worker_do_together_what_neither_may_alone(page: str, shop: Reader, postgresql_world: PostgreSQLWorld) -> None:
    settings = postgresql_world._new_registry()
    runtime_keys = Keyring(settings["secret_keys"]).derive("runtime")
    web = {"TENANTDB_URL": settings["url"], "TENANTDB_SECRET_KEYS": " ".join(runtime_keys)}
    worker = {
        "TENANTDB_SECRET_KEYS": " ".join(settings["secret_keys"]),
        "TENANTDB_SERVER": settings["server"],
        "TENANTDB_REGISTRY_ADMIN": settings["registry_admin"],
    }
    shop.write("worker.env", "".join(f"export {name}={shlex.quote(value)}\n" for name, value in worker.items()))
    shop.environment |= {**web, **worker}
    shop.run("tenantdb init; tenantdb provision acme --name 'Acme Ltd'; tenantdb provision globex --name 'Globex Inc'")
    for name in worker:
        del shop.environment[name]
    shop.environment |= web

    shop.follow(page)


@pytest.mark.parametrize("page", ["howto/migrate-a-fleet.md", "howto/long-data-migrations.md"])
@pytest.mark.timeout(300)
def test_a_fleet_on_postgresql_is_migrated_as_the_pages_say(page: str, shop: Reader, postgresql_world: PostgreSQLWorld) -> None:
    settings = postgresql_world._new_registry()
    shop.environment |= {
        "TENANTDB_URL": settings["url"],
        "TENANTDB_REGISTRY_ADMIN": settings["registry_admin"],
        "TENANTDB_SERVER": settings["server"],
        "TENANTDB_SECRET_KEYS": settings["secret_keys"][0],
    }
    shop.run("tenantdb init; tenantdb provision acme --name 'Acme Ltd'; tenantdb provision globex --name 'Globex Inc'; python move.py")

    shop.follow(page)


@pytest.mark.parametrize("page", ["howto/rotate-keys.md", "howto/rotate-passwords.md"])
@pytest.mark.timeout(300)
def test_keys_and_passwords_are_rotated_as_the_pages_say(page: str, tmp_path: Path, postgresql_world: PostgreSQLWorld) -> None:
    settings = postgresql_world._new_registry()
    exports = {
        "TENANTDB_URL": settings["url"],
        "TENANTDB_REGISTRY_ADMIN": settings["registry_admin"],
        "TENANTDB_SERVER": settings["server"],
        "TENANTDB_SECRET_KEYS": settings["secret_keys"][0],
    }
    with Reader(tmp_path, exports) as reader:
        reader.run("tenantdb init; tenantdb provision acme")

        reader.follow(page)


@pytest.mark.timeout(300)
def test_a_database_of_a_map_is_adopted_and_given_back(tmp_path: Path, postgresql_world: PostgreSQLWorld) -> None:
    settings = postgresql_world._new_registry()
    exports = {
        "TENANTDB_URL": settings["url"],
        "TENANTDB_REGISTRY_ADMIN": settings["registry_admin"],
        "TENANTDB_SERVER": settings["server"],
        "TENANTDB_SECRET_KEYS": settings["secret_keys"][0],
        "TENANTDB_ADOPT_URL": postgresql_world.superuser_url,
    }
    postgresql_world.superuser.execute("CREATE ROLE clinics LOGIN")
    for name in ("clinic_north", "clinic_south"):
        postgresql_world.superuser.execute(f"CREATE DATABASE {name} OWNER clinics".encode())
        with psycopg.connect(postgresql_world.server.url(database=name), autocommit=True) as inside:
            inside.execute("SET ROLE clinics; CREATE TABLE patients (name text); INSERT INTO patients VALUES ('Ada'), ('Bob')")
    with Reader(tmp_path, exports, {}, postgresql_world.superuser.execute) as reader:
        reader.run("tenantdb init")

        reader.follow("howto/adopt.md")


@pytest.mark.timeout(300)
def test_a_postgresql_server_is_set_up_as_the_page_says(tmp_path: Path) -> None:
    with EmbeddedServer(fsync=False) as server, psycopg.connect(server.url(), autocommit=True) as superuser:
        here = {"127.0.0.1:5432": f"127.0.0.1:{server.port}"}
        with Reader(tmp_path, {"PGPASSWORD": server.password}, here, superuser.execute) as reader:
            reader.follow("howto/postgresql.md")


def test_the_twelve_lines_are_those_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = next(block.text for block in blocks("index.md") if block.language == "python")

    assert f"```python\n{first}```" in readme


def test_every_reason_not_to_run_a_block_is_a_sentence_and_rare() -> None:
    reasons = [block.reason for page in pages() for block in blocks(page) if block.reason is not None]

    assert all(len(reason.split()) > 3 for reason in reasons)
    assert len(reasons) <= 12


def test_packages_are_installed_with_extras_that_exist() -> None:
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    wanted = [
        extra for path in DOCS.rglob("*.md") for found in re.findall(r"\[([a-z,]+)\]'", path.read_text()) for extra in found.split(",")
    ]

    assert wanted
    assert set(wanted) <= set(extras)
