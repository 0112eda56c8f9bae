"""An application that uses its database before gunicorn forks. Run by test_processes.py, which says with what in PRELOADED."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import text

from tenantdb import Budget, TenantDB
from tenantdb.resolvers import header
from tenantdb.wsgi import TenantMiddleware

WHERE = text("SELECT current_database(), pg_backend_pid()")
ORDER = json.loads(os.environ["PRELOADED"])

db = TenantDB(ORDER["url"], secret_keys=ORDER["secret_keys"], budget=Budget(connections=ORDER["connections"], processes=3))


def where(*tenant: str) -> tuple[str, int]:
    with db.session(*tenant) as session:
        database, backend = session.execute(WHERE).one()
    return database, backend


before = {slug: where(slug) for slug in ORDER["databases"]}


def tell(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("200 OK", [("content-type", "application/json")])
    return [json.dumps({"process": os.getpid(), "before": before, "here": where()}).encode()]


app = TenantMiddleware(tell, db=db, resolver=header())
