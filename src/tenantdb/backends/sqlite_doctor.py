"""The doctor's rounds on a folder of SQLite files: who may read them, whether they are whole, whose they are."""

from __future__ import annotations

import functools
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from tenantdb.backends import recordlog
from tenantdb.backends.sqlite import IDENTITY_TABLE, database_path
from tenantdb.backends.weakness import Diagnosis, Patient, ServerExamination, Severity, Weakness, treat
from tenantdb.model import Server, Template, Tenant

_OURS = re.compile(r"t_[0-9a-f]{16}", re.ASCII)


class SQLiteDoctor:
    """See `tenantdb.backends.protocols.Doctor`."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._folder = Path(server.path or "").absolute()

    def examine_server(self, patients: Sequence[Patient], templates: Sequence[Template], *, whole: bool, repair: bool) -> ServerExamination:
        def look() -> list[Weakness]:
            return [_missing(patient.tenant) for patient in patients if patient.must_be_whole and patient.tenant.database not in files]

        names = {path.stem for path in self._folder.glob("*.sqlite3")}
        files = {name for name in names if _OURS.fullmatch(name)} | {patient.tenant.database or "" for patient in patients} & names
        found = treat(look, self, repair=repair)
        return ServerExamination(found, frozenset(files), {name: "file" for name in files if whole and _OURS.fullmatch(name)})

    def examine_inside(self, patient: Patient, *, repair: bool) -> list[Diagnosis]:
        path = database_path(self._server, patient.tenant)
        return treat(
            lambda: [*look_at_file(path, patient.tenant), *_stamp(path, patient.tenant), *_record_log(path, patient.tenant)],
            self,
            repair=repair,
        )


def look_at_file(path: Path, tenant: Tenant) -> Iterator[Weakness]:
    """Whether the file is whole, and nobody else's to read."""
    problem = functools.partial(Weakness, severity=Severity.PROBLEM, subject=f"file {path.name}", tenant=tenant.id)
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True)) as connection:
            result = connection.execute("PRAGMA quick_check").fetchone()[0]
            dangling = connection.execute("PRAGMA foreign_key_check").fetchall()
    except sqlite3.DatabaseError as error:
        result, dangling = str(error), []
    if result != "ok":
        yield problem(code="file-damaged", text=f"the file is damaged: {result}", repair="restore it from a backup")
    for text in sorted({f"rows of {table} refer to rows of {parent} that are not there" for table, _, parent, _ in dangling}):
        yield problem(code="dangling-rows", text=text, repair="mend the rows; PRAGMA foreign_key_check lists them")
    if path.stat().st_mode & 0o077:
        text = "others may read the file; its mode must be 0600"
        yield problem(code="file-mode", text=text, repair=f"chmod 600 {path.name}", mend=lambda _: path.chmod(0o600))


def _stamp(path: Path, tenant: Tenant) -> Iterator[Weakness]:
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True)) as connection:
            rows = connection.execute(f"SELECT tenant_id FROM {IDENTITY_TABLE}").fetchall()
    except sqlite3.DatabaseError:
        rows = []
    if rows != [(str(tenant.id),)]:
        text, repair = "the identity stamp is not the tenant's", "find out which tenant's file this is before anybody uses it"
        yield Weakness("identity", Severity.PROBLEM, f"file {path.name}", text, repair, tenant.id)


def _record_log(path: Path, tenant: Tenant) -> Iterator[Weakness]:
    def make(_: object) -> None:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True)) as connection, connection:
            recordlog.make(connection)

    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True)) as connection:
            found = connection.execute("SELECT count(*) FROM sqlite_master WHERE name = ?", (recordlog.TABLES[0],)).fetchone()[0]
    except sqlite3.DatabaseError:
        return  # damaged, which is told already
    if not found:
        text = "the file has no audit log of its records, as those made before there was one"
        repair = "`tenantdb doctor --repair` makes it"
        yield Weakness("record-log-missing", Severity.PROBLEM, f"file {path.name}", text, repair, tenant.id, mend=make)


def _missing(tenant: Tenant) -> Weakness:
    text = "the registry says that the file is here, and it is not"
    repair = "restore it from a backup, or delete and purge the tenant"
    return Weakness("database-missing", Severity.PROBLEM, f"file {tenant.database}.sqlite3", text, repair, tenant.id)
