"""A process that works on a tenant and is killed at a step. Its standard input says which tenant, with which settings, where."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import nullcontext
from typing import Any, NoReturn
from unittest.mock import patch

from sqlalchemy import text
from sqlalchemy.orm import Session

from tenantdb import Tenant, TenantDB
from tenantdb.backends.postgresql.workshop import PostgreSQLWorkshop
from tenantdb.provisioning.procedures import Runner
from tests.procedures import after, before


def die(*_: Any, **__: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nobody survives that")


def main() -> None:
    order = json.load(sys.stdin)
    step, point, kind = order["step"], order["point"], order["kind"]
    db = TenantDB(**order["settings"])

    @db.seed
    def sow(session: Session, tenant: Tenant) -> None:
        session.execute(text("INSERT INTO notes (line) VALUES ('seeded') ON CONFLICT (line) DO NOTHING"))
        if (step, point) == ("seed", "inside"):
            session.flush()
            die()

    if step == "sign-up":
        patch.object(Runner, "carry_out", die).start()
    elif (step, point) == ("database", "inside"):
        name = "create_database" if kind == "provision" else "drop_database"
        act = getattr(PostgreSQLWorkshop, name)
        patch.object(PostgreSQLWorkshop, name, lambda self, *arguments: (act(self, *arguments), die())).start()
    dying = nullcontext() if step == "sign-up" or point == "inside" else (before if point == "before" else after)(step, die, kind=kind)
    with dying:
        getattr(db, order["verb"])(order["slug"], **order["arguments"])


main()
