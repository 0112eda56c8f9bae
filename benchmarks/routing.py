"""What a bound tenant costs: a session on it against a plain SQLAlchemy session on one engine with the same options."""

from __future__ import annotations

import asyncio
import subprocess
import sys

from sqlalchemy import URL, Engine, String, create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import AsyncAdaptedQueuePool

from benchmarks.measure import Result, async_ratio, ratio
from benchmarks.world import embedded_db
from tenantdb import AsyncTenantDB, TenantDB
from tenantdb.backends.postgresql.connect import session_options, transport
from tenantdb.model import DatabaseRole

_PLAIN_IMPORT = "import sqlalchemy.orm, sqlalchemy.ext.asyncio, pydantic"


class Base(DeclarativeBase):
    pass


class Patient(Base):
    __tablename__ = "patients"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))


def run(*, quick: bool) -> Result:
    result = Result()
    rounds, repeats = (15, 150) if quick else (61, 300)
    with embedded_db() as db:
        db.provision("acme")
        _make_rows(db)
        result.add(
            "session_ratio",
            _sync_ratio(db, rounds, repeats),
            bar="<= 1.15",
            note="bound tenant, session, one primary-key read, rolled back / the same on a plain engine",
        )
        result.add("async_session_ratio", asyncio.run(_async_ratio(db, rounds, repeats)), bar="<= 1.15", note="the same in asyncio")
    result.add(
        "import_ratio",
        ratio(lambda: _python("import tenantdb"), lambda: _python(_PLAIN_IMPORT), rounds=9 if quick else 31),
        bar="<= 1.5",
        note=f"import tenantdb / {_PLAIN_IMPORT}",
    )
    return result


def _make_rows(db: TenantDB) -> None:
    with db.migrations.owner_connection("acme") as connection:
        Base.metadata.create_all(connection)
        connection.commit()
    with db.begin("acme") as session:
        session.add_all(Patient(id=n, name=f"patient {n}") for n in range(1, 101))


def _sync_ratio(db: TenantDB, rounds: int, repeats: int) -> float:
    plain = _plain_engine(db)

    def ours() -> None:
        for n in range(repeats):
            with db.tenant_context("acme"), db.session() as session:
                _must(session.get(Patient, n % 100 + 1))

    def theirs() -> None:
        for n in range(repeats):
            with Session(plain) as session:
                _must(session.get(Patient, n % 100 + 1))

    try:
        return ratio(ours, theirs, rounds=rounds)
    finally:
        plain.dispose()


def _plain_engine(db: TenantDB) -> Engine:
    url, arguments = _same_options(db)
    return create_engine(url, connect_args=arguments, pool_size=db.settings.pool_size, max_overflow=0, use_native_hstore=False)


def _same_options(db: TenantDB) -> tuple[URL, dict[str, object]]:
    """The tenant's own URL, login and connection arguments, as a user with a single database would give them."""
    engine = db.engine("acme")
    location = db._locator.locate(db._registry.lookup("acme"), DatabaseRole.RUNTIME)
    options = transport(location.server.host, db.settings) | session_options(DatabaseRole.RUNTIME, db.settings)
    return engine.url, options | {"password": location.password()}


async def _async_ratio(db: TenantDB, rounds: int, repeats: int) -> float:
    adb = AsyncTenantDB(db)
    url, arguments = _same_options(db)
    plain = create_async_engine(
        url,
        connect_args=arguments,
        pool_size=db.settings.pool_size,
        max_overflow=0,
        poolclass=AsyncAdaptedQueuePool,
        use_native_hstore=False,
    )

    async def ours() -> None:
        for n in range(repeats):
            async with adb.tenant_context("acme"), adb.session() as session:
                _must(await session.get(Patient, n % 100 + 1))

    async def theirs() -> None:
        for n in range(repeats):
            async with AsyncSession(plain) as session:
                _must(await session.get(Patient, n % 100 + 1))

    try:
        return await async_ratio(ours, theirs, rounds=rounds)
    finally:
        await plain.dispose()
        await db._engines.aclose()


def _must(patient: Patient | None) -> None:
    if patient is None:
        raise AssertionError("the row is missing: what was measured is not a read")


def _python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)
