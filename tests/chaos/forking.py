"""A process that forks in the middle of everything, and one that ends there. Its standard input says with which settings and tenants; what
it found out is the JSON on its standard output. Run by test_processes.py."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from tenantdb import Budget, TenantDB, errors
from tenantdb.backends.postgresql import PostgreSQL

WHERE = text("SELECT current_database(), pg_backend_pid()")


def read(db: TenantDB, slug: str) -> tuple[str, int]:
    with db.session(slug) as session:
        database, pid = session.execute(WHERE).one()
    return database, pid


def until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come to hold in time"
        time.sleep(0.005)


def in_the_child(db: TenantDB, databases: dict[str, str], inherited: dict[str, Any]) -> dict[str, Any]:
    """Leaves the blocks that the fork found it in, and works."""
    found: dict[str, Any] = {"held": sum(stats.held for stats in db.stats())}
    for lease in (inherited["session"], inherited["connection"]):
        with contextlib.suppress(OperationalError):  # the child's copy of it is lost, and it may say so
            lease.close()
    try:
        with inherited["engine"].connect() as connection:
            found["engine"] = connection.execute(WHERE).one()[1]
    except errors.EngineRetired:
        found["engine"] = "retired"
    seen = {slug: read(db, slug) for slug in databases for _ in range(2)}
    assert {slug: database for slug, (database, _) in seen.items()} == databases, seen
    found["pids"] = [pid for _, pid in seen.values()]
    [stats] = db.stats()
    found["rest"] = [stats.in_use, stats.opening, stats.closing, stats.waiting, stats.detached]
    db.close()
    return found


def fork(db: TenantDB, databases: dict[str, str], how: str) -> dict[str, Any]:
    busy, idle, slow, other = databases
    go_on, connecting = threading.Event(), threading.Event()
    really = PostgreSQL.open

    def slowly(self: Any, dialect: Any, location: Any, *args: Any, **kwargs: Any) -> Any:
        connection = really(self, dialect, location, *args, **kwargs)
        if location.tenant.slug == slow and os.getpid() == parent:
            connecting.set()
            go_on.wait(30)
        return connection

    parent = os.getpid()
    PostgreSQL.open = slowly  # type: ignore[method-assign]
    inherited: dict[str, Any] = {"session": db.session(busy), "engine": db.engine(idle), "connection": db.engine(busy).connect()}
    pids = [session.execute(WHERE).one()[1] for session in (inherited["session"], inherited["connection"])]
    inherited["session"].execute(text("UPDATE markers SET name = 'changed'"))
    pids.append(read(db, idle)[1])
    later: list[tuple[str, int]] = []
    threads = [threading.Thread(target=lambda: later.append(read(db, slow))) for _ in range(2)]
    threads[0].start()
    connecting.wait(20)
    threads[1].start()
    until(lambda: db.stats()[0].waiting == 1)

    def child() -> dict[str, Any]:
        faulthandler.dump_traceback_later(15, exit=True)
        return in_the_child(db, databases, inherited)

    children = []
    for _ in range(1 if how == "fork" else 3):
        mine, theirs = os.pipe()
        if how == "fork":
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    os.write(theirs, json.dumps(child()).encode())
                    code = 0
                except BaseException:
                    os.write(theirs, json.dumps({"error": traceback.format_exc()}).encode())
                finally:
                    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
                    if code:
                        os._exit(code)
                sys.exit(0)  # as a program ends
            exit_code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        else:
            process = multiprocessing.get_context("fork").Process(target=lambda to=theirs: os.write(to, json.dumps(child()).encode()))
            process.start()
            process.join(45)
            exit_code = process.exitcode or 0
        os.close(theirs)
        children.append({"exit": exit_code, **json.loads(os.read(mine, 1 << 20) or b"{}")})
        os.close(mine)
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert [database for database, _ in later] == [databases[slow]] * 2, later
    assert inherited["session"].execute(WHERE).one() == (databases[busy], pids[0])  # still in its transaction, on its connection
    assert inherited["session"].scalar(text("SELECT name FROM markers")) == "changed"
    assert inherited["connection"].execute(WHERE).one() == (databases[busy], pids[1])
    inherited["session"].rollback()
    inherited["session"].close()
    inherited["connection"].close()
    assert read(db, idle) == (databases[idle], pids[2])
    assert read(db, other)[0] == databases[other]
    pids += [pid for _, pid in later]
    db.close()
    until(lambda: db.stats()[0].held == 0)
    return {"parent": pids, "children": children}


def end(db: TenantDB, databases: dict[str, str], how: str) -> dict[str, Any]:
    """Ends with a lease out, an idle connection, and perhaps somebody in the queue."""
    slugs = list(databases)
    kept.append(db.session(slugs[0]))
    assert kept[0].execute(WHERE).one()[0] == databases[slugs[0]]
    read(db, slugs[1])
    with db.session(slugs[1]), db.session(slugs[2]) as third:
        third.execute(WHERE)
    if how == "asyncio":
        import asyncio

        from tenantdb import AsyncTenantDB

        adb = AsyncTenantDB(db)

        async def leave() -> None:
            session = adb.session(slugs[0])
            await session.execute(WHERE)
            kept.append(session)

        asyncio.run(leave())
    return {}


kept: list[Any] = []


def main() -> None:
    order = json.load(sys.stdin)
    budget = Budget(processes=1, background=0, administration=0, **order["budget"])
    db = TenantDB(order["url"], secret_keys=order["secret_keys"], budget=budget)
    found = {"fork": fork, "end": end}[order["what"]](db, order["databases"], order["how"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
