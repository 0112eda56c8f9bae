"""Taking a tenant out into a file, making a tenant of one, and copying a tenant.

What is exported leaves the installation, so nobody gets a file that the audit log does not tell of: the entry is committed in the moment in
which the file gets its name.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from tenantdb.backends import CarryFailed, backend
from tenantdb.errors import (
    ConfigError,
    ExportError,
    ImportRefused,
    OperationInProgress,
    RegistryError,
    SecretKeyError,
    TenantExists,
    TenantNotFound,
    UserExists,
)
from tenantdb.migrations.scripts import current_revision
from tenantdb.model import DatabaseRole, NewUser, Tenant, TenantState, User
from tenantdb.provisioning import archive, importing, rows
from tenantdb.provisioning.archive import Export
from tenantdb.provisioning.lease import LEASE, worker
from tenantdb.provisioning.procedures import Runner
from tenantdb.provisioning.rows import ExportedRows
from tenantdb.registry import Hands, SignUp, audit
from tenantdb.registry.operations import CLONE, IMPORT, Operation
from tenantdb.registry.records import TenantRecord
from tenantdb.registry.tables import utcnow
from tenantdb.resolvers import canonical_slug

Progress = Callable[[int, int], object]
Owner = User | UUID | NewUser | None

_CARRIED = frozenset({TenantState.ACTIVE, TenantState.SUSPENDED, TenantState.MAINTENANCE})
"""Whose database the owner role may enter."""


def version() -> str:
    """Of tenantdb, for manifests."""
    try:
        return importlib.metadata.version("tenantdb")
    except importlib.metadata.PackageNotFoundError:  # from a checkout that was never installed
        return "unknown"


class Transfer:
    """The verbs that carry tenants' data in and out."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._registry = runner.shop.registry
        self._engines = runner.shop.engines
        self._settings = runner.shop.settings
        self._hooks = runner.shop.hooks

    # -- out ---------------------------------------------------------------------------------------------------------------------------

    def export(self, tenant: Tenant, path: str | os.PathLike[str], *, overwrite: bool, progress: Progress | None = None) -> Export:
        target = Path(path)
        record = self._record(tenant)
        slug = record.tenant.slug
        try:
            with archive.new_file(target, overwrite=overwrite) as file:
                made = self._write(record, file, target, progress or (lambda *_: None))
                details = {"sha256": made.sha256, "bytes": sum(member.size for member in made.members), "revision": made.revision}
                with self._registry.write() as connection:
                    audit.record(connection, "tenant.export", tenant_id=tenant.id, details=details)
        except FileExistsError:
            raise ExportError(slug, f"{target.name!r} is there already; overwrite=True replaces it") from None
        except OSError as error:
            raise ExportError(slug, f"{target.name!r} cannot be written ({error.strerror or error})") from error
        except CarryFailed as error:
            raise ExportError(slug, error.problem) from error
        return made

    def _write(self, record: TenantRecord, file: Any, target: Path, progress: Progress) -> Export:
        assert record.server is not None
        carrier = backend(record.server.backend).carrier(self._locate(record), self._settings)
        with self._inside(record) as connection:
            there, revision = carrier.look(connection), current_revision(connection)
        about = archive.About(
            tenant=record.tenant.id,
            made_at=utcnow(),
            backend=record.server.backend,
            server_version=there.version,
            tenantdb_version=version(),
            revision=revision,
        )

        def tell(done: int) -> None:
            progress(min(done, there.size), there.size)

        with self._engines.place(record.server, "an export"):
            made = archive.write(file, target, about, carrier.member, lambda out: carrier.dump(out, target.parent, there), tell)
        with self._inside(record) as connection:
            if current_revision(connection) != revision:
                raise ExportError(record.tenant.slug, "it was migrated meanwhile; export it again")
        return made

    @contextmanager
    def _inside(self, record: TenantRecord) -> Iterator[Connection]:
        with self._engines.passing(record, DatabaseRole.OWNER) as engine, engine.connect() as connection:
            yield connection

    def _locate(self, record: TenantRecord) -> Any:
        """Where the owner role enters. Raises: `ExportError` in a process that has not its secrets."""
        location = self._engines.locate(record, DatabaseRole.OWNER)
        if record.server is not None and record.server.backend == "postgresql":
            try:
                location.password()
            except (RegistryError, SecretKeyError) as error:
                if getattr(error, "retryable", False):
                    raise
                problem = "this process may not read its owner role's password; export where registry_admin= and the root secret keys are"
                raise ExportError(record.tenant.slug, problem) from error
        return location

    def _record(self, tenant: Tenant) -> TenantRecord:
        record = self._registry.tenants.row(tenant.id)
        if record.server is None or record.tenant.state not in _CARRIED:
            raise ExportError(tenant.slug, f"it is {record.tenant.state}")
        return record

    def export_rows(
        self,
        tenant: Tenant,
        folder: str | os.PathLike[str],
        *,
        tables: Any,
        format: str,
        overwrite: bool,
        progress: Progress | None = None,
    ) -> ExportedRows:
        record = self._record(tenant)
        assert record.server is not None
        # A server that refuses the runtime role of a suspended tenant lets the owner role in; it reads too, and no more.
        role = DatabaseRole.OWNER if record.tenant.state is TenantState.SUSPENDED else DatabaseRole.RUNTIME
        if role is DatabaseRole.OWNER:
            self._locate(record)
        target = Path(folder)
        try:
            with rows.new_folder(target, overwrite=overwrite) as scratch:
                with self._engines.passing(record, role) as engine, engine.connect() as connection:
                    reader = backend(record.server.backend).rows(connection, record.server.schemas)
                    writer = rows.Writer(scratch, reader, format=format, progress=progress or (lambda *_: None))
                    made = writer.write(target, record.tenant, version(), wanted=tables)
                details = {"sha256": made.sha256, "tables": len(made.tables), "rows": sum(made.tables.values()), "format": format}
                with self._registry.write() as registry:
                    audit.record(registry, "tenant.export_rows", tenant_id=tenant.id, details=details)
        except FileExistsError:
            raise ExportError(tenant.slug, f"{target.name!r} is there already; overwrite=True replaces it") from None
        except OSError as error:
            raise ExportError(tenant.slug, f"{target.name!r} cannot be written ({error.strerror or error})") from error
        except SQLAlchemyError as error:
            raise ExportError(tenant.slug, f"a table could not be read ({type(getattr(error, 'orig', error)).__name__})") from error
        return made

    # -- in ----------------------------------------------------------------------------------------------------------------------------

    def import_(
        self,
        slug: str,
        path: str | os.PathLike[str],
        *,
        owner: Owner,
        server: str | None,
        region: str | None,
        progress: Progress | None = None,
        **details: Any,
    ) -> Tenant:
        file = Path(path).absolute()
        self._ready(slug)
        with archive.opened(file) as source:
            export = source.export
            importing.check(export, self._registry, self._settings)
            self._check_backend(export, server)
            source.verify(progress or (lambda *_: None))
        payload = {"server": server, "region": region, "path": str(file), "sha256": export.sha256}
        return self._make(SignUp(slug=slug, owner=owner, payload=payload, kind=IMPORT, **details))

    def clone(
        self,
        tenant: Tenant,
        slug: str,
        *,
        owner: Owner,
        neutralised: bool,
        server: str | None,
        region: str | None,
        progress: Progress | None = None,
        **details: Any,
    ) -> Tenant:
        self._ready(slug)
        if neutralised and not self._hooks.neutralisers:
            raise ConfigError(
                "nothing is registered with @db.neutralise, so the clone would send mail and call other systems as the original does;"
                " neutralised=False wants it so"
            )
        folder = Path(tempfile.mkdtemp(prefix=importing.TEMPORARY))
        file = folder / f"{importing.TEMPORARY}{tenant.id}.tar"
        try:
            export = self.export(tenant, file, overwrite=False, progress=progress)
            self._check_backend(export, server)
            payload = {"server": server, "region": region, "path": str(file), "sha256": export.sha256, "neutralise": neutralised}
            return self._make(SignUp(slug=slug, owner=owner, payload=payload, kind=CLONE, **details))
        finally:  # after a kill the file stays for whoever resumes, who removes it when it is loaded
            shutil.rmtree(folder, ignore_errors=True)

    def _ready(self, slug: str) -> None:
        canonical_slug(slug)
        if not self._settings.provisioners:
            raise ConfigError("a file is imported by a process with a provisioner; give server=... or TENANTDB_SERVER")

    def _check_backend(self, export: Export, server: str | None) -> None:
        urls = self._settings.provisioners
        backends = {url.backend for name, url in urls.items() if server in (None, name)}
        if backends and export.backend not in backends:
            raise ImportRefused(f"it was made on {export.backend}, and there is no such server here")

    def _make(self, request: SignUp) -> Tenant:
        """As `Provisioner` does, but here and now: only this machine has the file."""
        with self._runner.turns:
            hands = Hands(worker(), LEASE, makes=True)
            try:
                _, operation = self._registry.sign_up(request, hands=hands)
            except (TenantExists, UserExists) as error:
                operation = self._again(request, error)
            return self._runner.carry_out(operation, request.payload)

    def _again(self, request: SignUp, error: TenantExists | UserExists) -> Operation:
        """The same import, which failed or was interrupted. Raises: ``error``, `OperationInProgress`."""
        try:
            tenant = self._registry.tenants.get(request.slug)
        except TenantNotFound:
            raise error from None
        known = self._registry.operations.for_tenant(tenant.id, kinds=[IMPORT, CLONE])
        unfinished = tenant.state in (TenantState.FAILED, TenantState.PROVISIONING)
        if known is None or not unfinished or known.kind != request.kind or known.request_hash != request.fingerprint():
            raise error
        if known.kind == IMPORT and known.payload.get("sha256") != request.payload["sha256"]:
            raise error
        if isinstance(request.owner, NewUser) and not self._registry.users.verifies(request.owner.email, request.owner.password):
            raise error
        claimed = self._registry.operations.claim(known.id, worker(), LEASE, dead=self._runner.dead_workers())
        if claimed is None:
            raise OperationInProgress(request.slug)
        return claimed
