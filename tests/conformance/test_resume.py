"""One tenant however many ask for it at once, what lost its other half is told and left alone, and who may be asked to go on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from psycopg import sql

from tenantdb import Tenant, TenantDB, TenantState, errors
from tenantdb.model import TRANSITIONS, Fence
from tenantdb.provisioning.golden import draw_name
from tenantdb.provisioning.lease import LEASE
from tenantdb.provisioning.procedures import PROCEDURES
from tenantdb.provisioning.worker import Orphan
from tenantdb.registry import SignUp, operations
from tests.conformance.app import MARKER
from tests.conformance.colours import Face
from tests.conformance.conftest import Estate
from tests.world import PostgreSQLWorld, SQLiteWorld

CHILD = """
import json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from tenantdb import TenantDB, errors
from tests.conformance.app import write_marker
order = json.load(sys.stdin)
db = TenantDB(**order["settings"])
db.seed(write_marker)
print("ready", flush=True)
while not os.path.exists(order["gate"]):
    time.sleep(0.005)
def provision(number):
    try:
        return str(db.provision(order["slug"], idempotency_key=order["key"]).id)
    except errors.TenantExists:
        return "exists"
    except Exception as error:
        return repr(error)
with ThreadPoolExecutor(5) as threads:
    print(*threads.map(provision, range(5)), sep="|")
db.close()
"""


@pytest.mark.parametrize("key", [None, "one-request"])
def test_of_twenty_in_four_processes_who_want_one_slug_one_gets_a_tenant(
    estate: Estate, db: TenantDB, tmp_path: Path, key: str | None
) -> None:
    slug = f"wanted-{'by-key' if key else 'by-all'}"
    gate = tmp_path / "go"
    order = json.dumps({"settings": estate.world.given(estate.db), "slug": slug, "key": key and f"{key} {slug}", "gate": str(gate)})
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for _ in range(4)
    ]
    try:
        for child in children:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(order)
            child.stdin.close()
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        gate.touch()
        said: list[str] = []
        for child in children:
            assert child.stdout is not None and child.stderr is not None
            said += child.stdout.read().strip().split("|")
            assert child.wait(60) == 0, child.stderr.read()
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
            for pipe in (child.stdout, child.stderr):
                assert pipe is not None
                pipe.close()

    tenant = db.tenants.get(slug)
    estate.tenants.append(tenant)
    assert tenant.state is TenantState.ACTIVE
    assert set(said) <= {str(tenant.id), "exists"} and str(tenant.id) in said
    if key is None:
        assert said.count(str(tenant.id)) == 1
    assert len(said) == 20
    with db.session(slug) as session:
        assert session.scalars(MARKER).all() == [slug]


# -- what has lost its other half ----------------------------------------------------------------------------------------------------


@pytest.fixture
def strangers(estate: Estate) -> Iterator[list[tuple[str, str]]]:
    """A database, and on PostgreSQL a role, that look like ours and that no registry knows: (kind, name)."""
    world, name = estate.world, draw_name()
    if isinstance(world, SQLiteWorld):
        path = Path(estate.db.servers.get("default").path or "") / f"{name}.sqlite3"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"somebody's data")
        yield [("database", name)]
        assert path.read_bytes() == b"somebody's data"
        path.unlink()
        return
    assert isinstance(world, PostgreSQLWorld)
    world.superuser.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
    world.superuser.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(name)))
    yield [("database", name), ("role", name)]
    world.superuser.execute(sql.SQL("DROP DATABASE {}").format(sql.Identifier(name)))  # fails where it is not there any more
    world.superuser.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


async def test_what_no_registry_knows_is_told_and_never_dropped(face: Face, acme: Tenant, strangers: list[tuple[str, str]]) -> None:
    for _ in range(2):
        orphans = (await face.do.resume()).orphans
        assert {(orphan.kind, orphan.name) for orphan in orphans} >= set(strangers)
    known = {acme.database, acme.owner_role, acme.runtime_role}
    assert not [orphan for orphan in orphans if orphan.name in known]


async def test_a_tenant_whose_database_is_gone_is_told_and_left_as_it_is(face: Face, estate: Estate) -> None:
    tenant = estate.db.provision(f"robbed-{face.colour}")
    with face.db._runner.shop.workshop(face.db.servers.get("default")) as workshop:
        workshop.drop_database(tenant)

    report = await face.do.resume()

    assert Orphan("default", "row", tenant.database or "", tenant.slug) in report.orphans
    assert await face.do.tenants.get(tenant.id) == tenant
    await face.do.delete(tenant)
    await face.do.purge(tenant, confirm=tenant.slug, immediately=True)
    assert not [orphan for orphan in (await face.do.resume()).orphans if orphan.name == tenant.database]


def test_golden_databases_and_spares_are_no_orphans(db: TenantDB, estate: Estate, acme: Tenant) -> None:
    [spare] = [each for each in db.spares.fill(1) if each.ready_at]
    golden = db._registry.templates.list()
    names = {spare.database, spare.owner_role, spare.runtime_role}
    names |= {name for template in golden for name in (template.database, template.owner_role)}
    assert golden and not [orphan for orphan in db.resume().orphans if orphan.name in names]
    db.spares.drain()


# -- the tables ------------------------------------------------------------------------------------------------------------------------


def test_every_state_has_its_row_and_leads_to_the_end() -> None:
    assert set(TRANSITIONS) == set(TenantState)
    reached = {TenantState.PURGED}
    while more := {state for state, to in TRANSITIONS.items() if to & reached} - reached:
        reached |= more
    assert reached == set(TenantState)
    assert TRANSITIONS[TenantState.PURGED] == frozenset()
    into = {state: {each for each, to in TRANSITIONS.items() if state in to} for state in TenantState}
    assert into[TenantState.PURGED] == {TenantState.PURGING}
    assert into[TenantState.PURGING] == {TenantState.DELETED, TenantState.SPARE}
    assert into[TenantState.SPARE] == set()


def test_every_kind_of_operation_has_its_procedure_and_steps_of_different_names() -> None:
    kinds = {value for name, value in vars(operations).items() if name.isupper() and isinstance(value, str)}
    assert kinds == set(PROCEDURES)
    for kind, procedure in PROCEDURES.items():
        names = [step.name for step in procedure.steps]
        assert len(set(names)) == len(names) > 0, kind
        assert all(len(name) <= 40 for name in names)  # the journal's column
        assert not (procedure.makes and procedure.insists)


@pytest.mark.parametrize("then", [TenantState.SUSPENDED, TenantState.DELETED])
def test_an_old_wish_to_serve_again_undoes_no_newer_decision(db: TenantDB, fresh: Tenant, then: TenantState) -> None:
    suspended = db.suspend(fresh)
    with db._registry.write() as connection:  # written down by a process that died right after
        generation = db._registry.tenants.still(connection, suspended)
        db._registry.operations.create(connection, operations.ACTIVATE, fresh.id, payload={"generation": generation})
    if then is TenantState.SUSPENDED:
        db.activate(fresh)
        db.suspend(fresh)
    else:
        db.delete(fresh)

    assert (fresh.slug, operations.ACTIVATE) in db.resume().finished

    assert db.tenants.get(fresh).state is then and db.tenants.get(fresh).fence is Fence.DONE


def test_a_sign_up_that_was_deleted_while_it_waited_for_its_turn_is_not_made(db: TenantDB) -> None:
    slug = f"t-{draw_name()[2:14]}"
    tenant, operation = db._registry.sign_up(SignUp(slug=slug))
    failed = db._registry.tenants.transition(tenant, TenantState.FAILED, action="test")
    db.delete(failed)

    claimed = db._registry.operations.claim(operation.id, "w", LEASE)
    assert claimed is not None
    with pytest.raises(errors.ProvisioningError, match="is deleted and cannot become active"):
        db._runner.carry_out(claimed)

    assert db.tenants.get(slug).state is TenantState.DELETED
    assert db.purge(slug, confirm=slug, immediately=True).state is TenantState.PURGED
