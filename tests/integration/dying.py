"""A process that provisions a tenant and is killed at a step. Its standard input says which tenant, with which settings, where."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any, NoReturn
from unittest.mock import patch

from sqlalchemy import text
from sqlalchemy.orm import Session

from tenantdb import Tenant, TenantDB
from tenantdb.backends.postgresql.workshop import PostgreSQLWorkshop
from tenantdb.provisioning import journal
from tenantdb.provisioning.steps import STEPS, Work


def die(*_: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nobody survives that")


def main() -> None:
    order = json.load(sys.stdin)
    step, point = order["step"], order["point"]
    db = TenantDB(**order["settings"])

    @db.seed
    def sow(session: Session, tenant: Tenant) -> None:
        session.execute(text("INSERT INTO notes (line) VALUES ('seeded') ON CONFLICT (line) DO NOTHING"))
        if (step, point) == ("seed", "inside"):
            session.flush()
            die()

    def dying(work: Work) -> None:
        if point == "after":
            dict(STEPS)[step](work)
        die()

    if step == "sign-up":
        patch.object(db._registry.operations, "claim", die).start()
    elif (step, point) == ("database", "inside"):
        create = PostgreSQLWorkshop.create_database
        patch.object(PostgreSQLWorkshop, "create_database", lambda self, tenant: (create(self, tenant), die())).start()
    elif step != "seed":
        patch.object(journal, "STEPS", tuple((name, dying if name == step else fn) for name, fn in STEPS)).start()
    db.provision(order["slug"])


main()
