"""Out into a file, in from a file, copied, and row by row: what arrives is what left, and nothing else leaves."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import secrets
import shutil
import sqlite3
import stat
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from tenantdb import Tenant, TenantDB, TenantState, errors
from tenantdb.provisioning import archive
from tenantdb.provisioning.archive import Export
from tenantdb.registry import operations as kinds
from tenantdb.registry.tables import utcnow
from tests import procedures
from tests.conformance.app import MARKER, NOTES, markers, note
from tests.conformance.colours import Face, MakeProcess
from tests.conformance.conftest import Estate

MEMBER = {"postgresql": "data.dump", "sqlite": "data.sqlite3"}


class Boom(Exception):
    """What nobody expects."""


@pytest.fixture
def slug() -> str:
    return f"in-{secrets.token_hex(5)}"


@pytest.fixture
def noted(db: TenantDB, fresh: Tenant) -> Tenant:
    """A tenant with three notes."""
    with db.begin(fresh) as session:
        for number in (1, 2, 7):
            session.execute(note(number))
    return fresh


@pytest.fixture
def exported(db: TenantDB, noted: Tenant, tmp_path: Path) -> Export:
    return db.export(noted, tmp_path / "acme.tar")


@pytest.fixture
def kept(estate: Estate, db: TenantDB) -> Iterator[Callable[[str], Tenant]]:
    """Looks a tenant up, so that the end of the test waits for its connections too."""

    def look(slug: str) -> Tenant:
        tenant = db.tenants.get(slug)
        estate.tenants.append(tenant)
        return tenant

    yield look


def members(path: Path | str) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]


def rewritten(path: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> Path:
    """A copy of an export with other members."""
    target = path.with_name(f"changed-{path.name}")
    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in change(members(path)).items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return target


def with_manifest(content: dict[str, bytes], **changes: Any) -> dict[str, bytes]:
    return {**content, "manifest.json": json.dumps({**json.loads(content["manifest.json"]), **changes}).encode()}


def resealed(content: dict[str, bytes], member: str, data: bytes) -> dict[str, bytes]:
    """Other data with hashes that fit: what a forger makes."""
    return {**with_manifest(content, members={member: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}}), member: data}


# -- export ----------------------------------------------------------------------------------------------------------------------------


def test_an_export_is_one_private_file_with_the_hash_of_all_that_is_in_it(estate: Estate, exported: Export, noted: Tenant) -> None:
    content = members(exported.path)
    told = json.loads(content["manifest.json"])

    assert set(content) == {"manifest.json", MEMBER[estate.backend]}
    assert stat.S_IMODE(os.stat(exported.path).st_mode) == 0o600
    assert (exported.tenant, exported.revision, exported.backend) == (noted.id, "0001", estate.backend)
    assert exported.sha256 == hashlib.sha256(content["manifest.json"]).hexdigest()
    assert {m.name: (m.size, m.sha256) for m in exported.members} == {
        name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in content.items() if name != "manifest.json"
    }
    assert told["made_with"].startswith({"postgresql": "pg_dump ", "sqlite": "SQLite "}[estate.backend])
    assert os.listdir(Path(exported.path).parent) == ["acme.tar"]


def test_nothing_that_is_tenantdbs_own_and_no_secret_is_in_it(estate: Estate, db: TenantDB, noted: Tenant, tmp_path: Path) -> None:
    with db.begin(noted) as session:
        db.audit.record(session, "note.read", "canary-of-the-audit-log")
    content = b"".join(members(db.export(noted, tmp_path / "acme.tar").path).values())

    for secret in (b"canary-of-the-audit-log", b"tenantdb_identity", b"CREATE TABLE tenantdb."):
        assert secret not in content
    assert noted.slug.encode() not in json.dumps(json.loads(members(tmp_path / "acme.tar")["manifest.json"])).encode()
    if estate.backend == "postgresql":
        record = db._registry.lookup(noted.id)
        for password in (db._registry.owner_password(record), db._registry.runtime_password(record)):
            assert password.encode() not in content


def test_a_file_that_is_there_is_replaced_only_when_that_is_said(db: TenantDB, noted: Tenant, tmp_path: Path) -> None:
    target = tmp_path / "acme.tar"
    target.write_text("precious")
    with pytest.raises(errors.ExportError, match="overwrite"):
        db.export(noted, target)
    assert target.read_text() == "precious"

    db.export(noted, target, overwrite=True)

    assert set(members(target)) > {"manifest.json"}
    assert os.listdir(tmp_path) == ["acme.tar"]


def test_every_export_is_in_the_audit_log_and_without_an_entry_there_is_no_file(
    db: TenantDB, noted: Tenant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = db.export(noted, tmp_path / "acme.tar")
    db.export_rows(noted, tmp_path / "rows")
    whole, rows = (db.audit.search(noted, action=f"tenant.{verb}")[0] for verb in ("export", "export_rows"))
    assert (whole.details["sha256"], rows.details["rows"]) == (made.sha256, 4)

    def refuse(*_: Any, **__: Any) -> None:
        raise errors.RegistryUnavailable("it is gone")

    with monkeypatch.context() as patch:
        patch.setattr("tenantdb.provisioning.transfer.audit.record", refuse)
        for call in (lambda: db.export(noted, tmp_path / "second.tar"), lambda: db.export_rows(noted, tmp_path / "second")):
            with pytest.raises(errors.RegistryUnavailable):
                call()
    assert sorted(os.listdir(tmp_path)) == ["acme.tar", "rows"]


@pytest.mark.parametrize("where", ["no/such/folder/acme.tar", "a-file/acme.tar"])
def test_a_place_that_cannot_be_written_is_told_and_nothing_is_left(db: TenantDB, noted: Tenant, tmp_path: Path, where: str) -> None:
    (tmp_path / "a-file").touch()
    with pytest.raises(errors.ExportError, match="cannot be written"):
        db.export(noted, tmp_path / where)
    with pytest.raises(errors.ExportError, match="cannot be written"):
        db.export_rows(noted, tmp_path / where)
    assert os.listdir(tmp_path) == ["a-file"]


def test_a_disk_that_is_full_is_told_and_nothing_is_left(
    db: TenantDB, noted: Tenant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = db.audit.search(noted, action="tenant.export")
    with open("/dev/full", "wb", buffering=0) as full:

        def write(self: Any, data: Any) -> int:
            return full.write(data)

        monkeypatch.setattr(archive._Hashing, "write", write)
        with pytest.raises(errors.ExportError, match="No space left"):
            db.export(noted, tmp_path / "acme.tar")
    assert os.listdir(tmp_path) == []
    assert db.audit.search(noted, action="tenant.export") == told


@pytest.mark.parametrize("state", ["suspended", "maintenance"])
def test_who_is_not_served_can_still_take_his_data_with_him(db: TenantDB, noted: Tenant, tmp_path: Path, state: str) -> None:
    {"suspended": db.suspend, "maintenance": db.maintenance}[state](noted)
    try:
        db.export(noted, tmp_path / "acme.tar")
        assert db.export_rows(noted, tmp_path / "rows").tables["notes"] == 3
    finally:
        db.activate(noted)


# -- import ----------------------------------------------------------------------------------------------------------------------------


async def test_a_file_becomes_a_tenant_with_every_row_that_is_served_like_any_other(
    face: Face, exported: Export, kept: Callable[[str], Tenant], slug: str
) -> None:
    made = await face.do.import_(slug, exported.path, name="Moved", plan="pro")
    kept(slug)

    assert (made.state, made.name, made.plan, made.revision) == (TenantState.ACTIVE, "Moved", "pro", "0001")
    assert made.id != exported.tenant
    assert await face.rows(NOTES, slug) == [1, 2, 7]
    await face.write(note(8), slug)
    assert await face.rows(NOTES, slug) == [1, 2, 7, 8]
    (entry,) = await face.do.audit.search(slug, action="tenant.import")
    assert (entry.object, entry.details["sha256"]) == (str(exported.tenant), exported.sha256)


def test_a_file_is_imported_where_nobody_knows_the_tenant(new_estate: Estate, exported: Export, slug: str) -> None:
    elsewhere = new_estate.db

    made = elsewhere.import_(slug, exported.path)

    with elsewhere.session(made) as session:
        assert session.scalars(NOTES).all() == [1, 2, 7]
    assert elsewhere.audit.verify().ok
    elsewhere.close()


DAMAGES: dict[str, Callable[[dict[str, bytes], str], dict[str, bytes]]] = {
    "a byte is another": lambda content, member: {**content, member: content[member][:-9] + b"?" + content[member][-8:]},
    "its end is missing": lambda content, member: {**content, member: content[member][:-1]},
    "another hash": lambda content, member: with_manifest(content, members={member: {"size": len(content[member]), "sha256": "0" * 64}}),
    "no manifest": lambda content, member: {member: content[member]},
    "a manifest that is none": lambda content, member: {**content, "manifest.json": b"[]"},
    "a newer format": lambda content, member: with_manifest(content, version=2),
    "something beside": lambda content, member: {**content, "../../etc/passwd": b"root"},
    "another product": lambda content, member: with_manifest(content, backend="oracle"),
    "no such revision": lambda content, member: with_manifest(content, revision="9999"),
    "no tenant": lambda content, member: with_manifest(content, tenant="acme"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_what_was_exported_is_refused_before_anything_is_made(
    estate: Estate, db: TenantDB, exported: Export, slug: str, damage: str
) -> None:
    path = rewritten(Path(exported.path), lambda content: DAMAGES[damage](content, MEMBER[estate.backend]))

    with pytest.raises(errors.ImportRefused):
        db.import_(slug, path)
    with pytest.raises(errors.TenantNotFound):
        db.tenants.get(slug)


def test_what_is_no_export_at_all_is_refused(db: TenantDB, tmp_path: Path, slug: str) -> None:
    for content in (b"", b"PGDMP", os.urandom(5000), bytes(1 << 16)):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(errors.ImportRefused):
            db.import_(slug, tmp_path / "file")
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(errors.ImportRefused, match="cannot be opened"):
            db.import_(slug, path)


def test_data_that_is_no_database_makes_no_tenant_even_where_the_hashes_fit(
    estate: Estate, db: TenantDB, exported: Export, kept: Callable[[str], Tenant], slug: str
) -> None:
    member = MEMBER[estate.backend]
    path = rewritten(Path(exported.path), lambda content: resealed(content, member, content[member][:16] + os.urandom(4096)))

    with pytest.raises(errors.ProvisioningError) as caught:
        db.import_(slug, path)

    assert (caught.value.step, type(caught.value.__cause__)) == ("load", errors.ImportRefused)
    assert kept(slug).state is TenantState.FAILED


def test_data_at_another_revision_than_the_manifest_says_makes_no_tenant(
    db: TenantDB, exported: Export, kept: Callable[[str], Tenant], slug: str
) -> None:
    path = rewritten(Path(exported.path), lambda content: with_manifest(content, revision=None))

    with pytest.raises(errors.ProvisioningError, match="manifest"):
        db.import_(slug, path)

    assert kept(slug).state is TenantState.FAILED


def test_a_tenant_that_is_migrated_while_it_is_exported_is_not_exported(
    db: TenantDB, noted: Tenant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter(["0001", "0002"])
    monkeypatch.setattr("tenantdb.provisioning.transfer.current_revision", lambda _: next(found))

    with pytest.raises(errors.ExportError, match="migrated meanwhile"):
        db.export(noted, tmp_path / "acme.tar")

    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("planted", ["TABLE tenantdb_identity (tenant_id, stamped_at)", "VIEW TENANTDB_identity AS SELECT 1"])
def test_a_file_of_sqlite_brings_no_identity_stamp_of_its_own(
    estate: Estate, db: TenantDB, exported: Export, kept: Callable[[str], Tenant], slug: str, tmp_path: Path, planted: str
) -> None:
    if estate.backend != "sqlite":
        pytest.skip("tests/integration/test_hostile_dump.py has those of PostgreSQL")
    (tmp_path / "data").write_bytes(members(exported.path)["data.sqlite3"])
    with closing(sqlite3.connect(tmp_path / "data")) as connection:
        connection.execute(f"CREATE {planted}")
    data = (tmp_path / "data").read_bytes()
    path = rewritten(Path(exported.path), lambda content: resealed(content, "data.sqlite3", data))

    with pytest.raises(errors.ProvisioningError, match="own"):
        db.import_(slug, path)

    assert kept(slug).state is TenantState.FAILED


def test_a_purged_tenant_does_not_come_back_from_a_file(new_estate: Estate, tmp_path: Path) -> None:
    db = new_estate.db
    db.provision("gone")
    db.provision("other")
    path = db.export("gone", tmp_path / "gone.tar").path
    db.delete("gone")
    db.purge("gone", confirm="gone", immediately=True)

    with pytest.raises(errors.ImportRefused, match="purged"):
        db.import_("gone", path)
    db.import_("fine", db.export("other", tmp_path / "other.tar").path)  # whoever was not purged may come
    db.close()


def test_an_older_file_is_brought_to_head(world: Any, tmp_path: Path, slug: str) -> None:
    folder = tmp_path / "schema"
    shutil.copytree(Path(__file__).parent / "schema", folder)
    db = world.make_db(migrations=str(folder))
    db.provision("old")
    path = db.export("old", tmp_path / "old.tar").path
    (folder / "versions" / "0002_more.py").write_text(
        "from alembic import op\n\nrevision, down_revision, branch_labels, depends_on = '0002', '0001', None, None\n\n\n"
        "def upgrade() -> None:\n    op.execute('CREATE TABLE later (id int)')\n"
    )

    made = db.import_(slug, path)

    assert made.revision == "0002"
    with db.begin(made) as session:
        session.execute(text("INSERT INTO later VALUES (1)"))
    db.close()


POINTS = [(step, when) for step in ("reserve", "database", "open", "load", "migrate") for when in ("before", "after")]


@pytest.mark.parametrize(("step", "when"), POINTS)
def test_after_an_error_anywhere_the_same_call_goes_on(
    db: TenantDB, exported: Export, kept: Callable[[str], Tenant], slug: str, step: str, when: str
) -> None:
    def boom(*_: Any) -> None:
        raise Boom

    with getattr(procedures, when)(step, boom, kind=kinds.IMPORT), pytest.raises(errors.ProvisioningError):
        db.import_(slug, exported.path)
    assert kept(slug).state is TenantState.FAILED
    with pytest.raises(errors.TenantExists):
        db.import_(slug, exported.path, plan="another request")

    made = db.import_(slug, exported.path)

    assert made.state is TenantState.ACTIVE
    with db.session(made) as session:
        assert session.scalars(NOTES).all() == [1, 2, 7]


def test_a_file_that_was_changed_or_taken_away_before_it_was_loaded_leaves_a_failed_tenant_that_says_so(
    db: TenantDB, exported: Export, kept: Callable[[str], Tenant], slug: str, noted: Tenant
) -> None:
    path = Path(exported.path)
    with procedures.before("load", lambda work: path.rename(path.with_suffix(".aside")), kind=kinds.IMPORT):
        with pytest.raises(errors.ProvisioningError, match="not on this machine"):
            db.import_(slug, path)
    assert "not on this machine" in str(kept(slug).reason)

    db.export(noted, path)  # the same name, and another file
    with pytest.raises(errors.TenantExists):
        db.import_(slug, path)

    path.with_suffix(".aside").replace(path)
    assert db.import_(slug, path).state is TenantState.ACTIVE


def test_who_wants_whatever_is_there_has_an_import_too_and_who_signs_up_has_not(
    db: TenantDB, exported: Export, kept: Callable[[str], Tenant], slug: str
) -> None:
    def boom(*_: Any) -> None:
        raise Boom

    with procedures.before("migrate", boom, kind=kinds.IMPORT), pytest.raises(errors.ProvisioningError):
        db.import_(slug, exported.path)
    with pytest.raises(errors.TenantExists):
        db.provision(slug)

    made = db.provision(slug, exist_ok=True)

    assert made.state is TenantState.ACTIVE
    assert db.provision(slug, exist_ok=True).id == made.id
    with pytest.raises(errors.TenantExists):
        db.provision(slug)
    with db.session(kept(slug)) as session:
        assert session.scalars(NOTES).all() == [1, 2, 7]


def test_importing_without_a_provisioner_is_refused_before_anything_is_made(estate: Estate, process: MakeProcess, exported: Export) -> None:
    if estate.backend == "sqlite":
        pytest.skip("there is always a provisioner")
    with pytest.raises(errors.ConfigError, match="provisioner"):
        process(server=None).import_("nowhere", exported.path)


# -- clone -----------------------------------------------------------------------------------------------------------------------------


def muffle(session: Session, tenant: Tenant) -> None:
    session.execute(markers.update().values(slug=f"copy-for-{tenant.slug}"))


async def test_a_clone_is_neutralised_before_it_is_served_and_the_original_is_not(
    face: Face, noted: Tenant, kept: Callable[[str], Tenant], slug: str
) -> None:
    face.db.neutralise(muffle)
    began = utcnow()

    made = await face.do.clone(noted, slug, name="Staging")
    kept(slug)

    assert (made.state, made.name, made.email) == (TenantState.ACTIVE, "Staging", None)
    assert await face.rows(NOTES, slug) == [1, 2, 7]
    assert await face.marker(slug) == f"copy-for-{slug}"
    assert await face.marker(noted) == noted.slug
    (entry,) = await face.do.audit.search(slug, action="tenant.clone")
    assert entry.object == str(noted.id)
    told = [entry.at for entry in await face.do.audit.search(noted, action="tenant.export")]
    assert began < told[0]


def test_a_clone_that_nobody_neutralises_is_refused_unless_it_is_meant(
    db: TenantDB, noted: Tenant, kept: Callable[[str], Tenant], slug: str
) -> None:
    with pytest.raises(errors.ConfigError, match="neutralise"):
        db.clone(noted, slug)
    with pytest.raises(errors.TenantNotFound):
        db.tenants.get(slug)

    db.clone(noted, slug, neutralised=False)

    with db.session(kept(slug)) as session:
        assert session.scalar(MARKER) == noted.slug


def test_a_neutraliser_that_raises_keeps_the_clone_from_being_served_and_undoes_the_others(
    db: TenantDB, noted: Tenant, kept: Callable[[str], Tenant], slug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    broken = True
    db.neutralise(muffle)

    @db.neutralise
    def second(session: Session, tenant: Tenant) -> None:
        assert session.scalar(MARKER) == f"copy-for-{slug}"
        if broken:
            raise Boom

    with pytest.raises(errors.ProvisioningError) as caught:
        db.clone(noted, slug)
    assert caught.value.step == "neutralise"
    with pytest.raises(errors.TenantNotReady), db.session(kept(slug)) as session:
        session.scalar(MARKER)
    assert os.listdir(tmp_path) == []  # the copy of the data as well

    broken = False
    assert db.clone(noted, slug).state is TenantState.ACTIVE
    assert os.listdir(tmp_path) == []


# -- rows ------------------------------------------------------------------------------------------------------------------------------

ODDITIES = [
    "",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2.50",
    "@SUM(A1)",
    'quote " comma , back \\ slash',
    "line\nfeed\r\nand\ttab",
    "\N{HOSPITAL} \u2028 \u0085",
    "null",
]


def test_the_rows_of_every_table_of_the_application_are_exported_and_nothing_else(
    estate: Estate, db: TenantDB, noted: Tenant, tmp_path: Path
) -> None:
    made = db.export_rows(noted, tmp_path / "rows")
    told = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    schema = json.loads((tmp_path / "rows" / "schema.json").read_text())["tables"]

    assert made.tables == {"markers": 1, "notes": 3}
    assert sorted(os.listdir(tmp_path / "rows")) == ["manifest.json", "markers.jsonl", "notes.jsonl", "schema.json"]
    lines = (tmp_path / "rows" / "notes.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"id": number, "about": None} for number in (1, 2, 7)]
    assert schema["notes"]["primary_key"] == ["id"]
    assert [(key["columns"], key["table"], key["refers_to"]) for key in schema["notes"]["foreign_keys"]] == [
        (["about"], "markers", ["slug"])
    ]
    assert [(column["name"], column["kind"]) for column in schema["notes"]["columns"]] == [("id", "integer"), ("about", "text")]
    assert told["members"] == {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in (tmp_path / "rows").iterdir()
        if path.name != "manifest.json"
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "rows").iterdir()} == {0o600}
    assert stat.S_IMODE((tmp_path / "rows").stat().st_mode) == 0o700


def test_text_of_every_kind_comes_back_from_json_lines_as_it_was(db: TenantDB, fresh: Tenant, tmp_path: Path) -> None:
    with db.begin(fresh) as session:
        session.execute(markers.insert(), [{"slug": odd} for odd in ODDITIES])

    db.export_rows(fresh, tmp_path / "rows", tables=["markers"])

    with open(tmp_path / "rows" / "markers.jsonl", encoding="utf-8", newline="\n") as lines:
        assert {json.loads(line)["slug"] for line in lines} == {*ODDITIES, fresh.slug}
    with db.begin(fresh) as session:
        session.execute(markers.delete().where(markers.c.slug.in_(ODDITIES)))


def test_csv_holds_no_formula(db: TenantDB, fresh: Tenant, tmp_path: Path) -> None:
    with db.begin(fresh) as session:
        session.execute(markers.insert(), [{"slug": odd} for odd in ODDITIES])

    db.export_rows(fresh, tmp_path / "rows", tables=["markers"], format="csv")

    with open(tmp_path / "rows" / "markers.csv", encoding="utf-8", newline="") as file:
        (header, *rows) = csv.reader(file)
    cells = {row[0] if row else "" for row in rows}
    assert header == ["slug"]
    assert {"'=cmd|' /C calc'!A0", "'+1+1", "'@SUM(A1)", "-2.50"} <= cells
    assert not any(cell.startswith(("=", "+", "@")) for cell in cells)
    with db.begin(fresh) as session:
        session.execute(markers.delete().where(markers.c.slug.in_(ODDITIES)))


def test_a_table_that_is_not_there_and_a_folder_that_is_are_refused(db: TenantDB, noted: Tenant, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="no table"):
        db.export_rows(noted, tmp_path / "rows", tables=["notes", "secrets"])
    with pytest.raises(errors.ConfigError, match="xml"):
        db.export_rows(noted, tmp_path / "rows", format="xml")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    for overwrite in (False, True):
        with pytest.raises(errors.ExportError):
            db.export_rows(noted, tmp_path / "full", overwrite=overwrite)
    assert os.listdir(tmp_path / "full") == ["precious"]
    db.export_rows(noted, tmp_path / "rows")
    with pytest.raises(errors.ExportError, match="overwrite"):
        db.export_rows(noted, tmp_path / "rows")
    db.export_rows(noted, tmp_path / "rows", tables=["notes"], overwrite=True)
    assert "markers.jsonl" not in os.listdir(tmp_path / "rows")


async def test_rows_are_exported_in_both_colours_and_are_of_one_moment(face: Face, noted: Tenant, tmp_path: Path) -> None:
    """Whoever writes while the export reads is in none of its tables."""
    from tenantdb.provisioning import rows

    first_table = rows.Writer._table
    written = 0

    def then_write(self: Any, table: Any) -> int:
        nonlocal written
        count = first_table(self, table)
        if not written:
            with face.db.begin(noted) as session:
                session.execute(note(100))
            written = 1
        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows.Writer, "_table", then_write)
        made = await face.do.export_rows(noted, tmp_path / "rows")

    assert made.tables == {"markers": 1, "notes": 3}
    with face.db.session(noted) as session:
        assert session.scalars(select(text("count(*)")).select_from(text("notes"))).one() == 4


def test_an_unknown_tenant_is_not_found(db: TenantDB, tmp_path: Path) -> None:
    for call in (db.export, db.export_rows):
        with pytest.raises(errors.TenantNotFound):
            call(uuid4(), tmp_path / "x")
