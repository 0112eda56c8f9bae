"""What a bound tenant costs: a session on it against a plain SQLAlchemy session on one engine with the same options."""

from __future__ import annotations

import asyncio
import select as selecting
import subprocess
import sys
import time
from typing import Any

from sqlalchemy import URL, Engine, String, Update, create_engine, select, update
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import AsyncAdaptedQueuePool

from benchmarks.measure import Result, async_ratio, ratio
from benchmarks.world import embedded_db
from tenantdb import AsyncTenantDB, TenantDB
from tenantdb.backends.postgresql.connect import session_options, transport
from tenantdb.connections.sqla import wire_of
from tenantdb.model import DatabaseRole

_ROWS = 1000
_PLAIN_IMPORT = "import sqlalchemy.orm, sqlalchemy.ext.asyncio, pydantic"


class Base(DeclarativeBase):
    pass


class Patient(Base):
    __tablename__ = "patients"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))


def run(*, quick: bool) -> Result:
    result = Result()
    rounds, repeats = (11, 100) if quick else (61, 300)
    with embedded_db() as db:
        db.provision("acme")
        _make_rows(db)
        read, commit = _sync_ratios(db, rounds, repeats)
        async_read, async_commit = asyncio.run(_async_ratios(db, rounds, repeats))
        note = "bound tenant, session, one primary-key read, ended without commit / the same on a plain engine"
        result.add("session_ratio", read, bar="<= 0.95", note=note)
        result.add("async_session_ratio", async_read, bar="<= 0.95", note="the same in asyncio")
        result.add("commit_ratio", commit, bar="<= 1.12", note="the same with one update and a commit")
        result.add("async_commit_ratio", async_commit, bar="<= 1.12", note="the same in asyncio")
        note = "loading 1,000 rows as objects that are kept until the session is closed / the same without the guard of objects"
        result.add("guard_bulk_ratio", _guard_ratio(db, 201 if quick else 601), bar="<= 1.1", note=note)
        result.add("reset_us", _reset_us(db, 2000 if quick else 10_000), note="sending the reset and reading its answer, for orientation")
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
        session.add_all(Patient(id=n, name=f"patient {n}") for n in range(1, _ROWS + 1))


def _sync_ratios(db: TenantDB, rounds: int, repeats: int) -> tuple[float, float]:
    plain = _plain_engine(db)

    def ours() -> None:
        for n in range(repeats):
            with db.tenant_context("acme"), db.session() as session:
                _must(session.get(Patient, n % 100 + 1))

    def theirs() -> None:
        for n in range(repeats):
            with Session(plain) as session:
                _must(session.get(Patient, n % 100 + 1))

    def ours_committed() -> None:
        for n in range(repeats):
            with db.tenant_context("acme"), db.session() as session:
                session.execute(_rename(n))
                session.commit()

    def theirs_committed() -> None:
        for n in range(repeats):
            with Session(plain) as session:
                session.execute(_rename(n))
                session.commit()

    try:
        return ratio(ours, theirs, rounds=rounds), ratio(ours_committed, theirs_committed, rounds=rounds)
    finally:
        plain.dispose()


def _guard_ratio(db: TenantDB, rounds: int) -> float:
    guarded: Any = db._pinned

    class Unguarded(guarded):  # type: ignore[misc]
        """Loading asks nothing of anybody; what it costs is the stamp of each object that leaves."""

        expunge_all = Session.expunge_all
        _expunge_states = Session._expunge_states

    def load() -> None:
        with db.session("acme") as session:
            patients = session.scalars(select(Patient)).all()
            _must(len(patients) == _ROWS)

    def load_unguarded() -> None:
        db._pinned = Unguarded
        try:
            load()
        finally:
            db._pinned = guarded

    return ratio(load, load_unguarded, rounds=rounds)


def _rename(n: int) -> Update:
    return update(Patient).where(Patient.id == n % 100 + 1).values(name=f"patient {n}")


def _reset_us(db: TenantDB, repeats: int) -> float:
    """Per lease, by the clock of the process that pays it; what the server does meanwhile costs the request nothing."""
    with db.engine("acme").connect() as connection:
        wire = wire_of(connection)
        began = time.perf_counter()
        spent = 0.0
        for _ in range(repeats):
            began = time.perf_counter()
            _must(wire.send_reset())
            spent += time.perf_counter() - began
            wait_until_readable(wire.pgconn.socket)
            began = time.perf_counter()
            _must(wire.settled())
            spent += time.perf_counter() - began
    return spent / repeats * 1e6


def wait_until_readable(descriptor: int) -> None:
    """The pause between two requests, in which the answer arrives."""
    selecting.select([descriptor], [], [], 5)
    time.sleep(0.0002)


def _plain_engine(db: TenantDB) -> Engine:
    url, arguments = _same_options(db)
    return create_engine(url, connect_args=arguments, pool_size=db.settings.budget.per_tenant, max_overflow=0, use_native_hstore=False)


def _same_options(db: TenantDB) -> tuple[URL, dict[str, object]]:
    """The tenant's own URL, login and connection arguments, as a user with a single database would give them."""
    engine = db.engine("acme")
    location = db._locator.locate(db._registry.lookup("acme"), DatabaseRole.RUNTIME)
    options = transport(location.server.host, db.settings) | session_options(DatabaseRole.RUNTIME, db.settings)
    return engine.url, options | {"password": location.password()}


async def _async_ratios(db: TenantDB, rounds: int, repeats: int) -> tuple[float, float]:
    adb = AsyncTenantDB(db)
    url, arguments = _same_options(db)
    plain = create_async_engine(
        url,
        connect_args=arguments,
        pool_size=db.settings.budget.per_tenant,
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

    async def ours_committed() -> None:
        for n in range(repeats):
            async with adb.tenant_context("acme"), adb.session() as session:
                await session.execute(_rename(n))
                await session.commit()

    async def theirs_committed() -> None:
        for n in range(repeats):
            async with AsyncSession(plain) as session:
                await session.execute(_rename(n))
                await session.commit()

    try:
        return await async_ratio(ours, theirs, rounds=rounds), await async_ratio(ours_committed, theirs_committed, rounds=rounds)
    finally:
        await plain.dispose()
        db._engines.close_loop()


def _must(found: object) -> None:
    if not found:
        raise AssertionError("what was measured is not what was meant to be")


def _python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)
