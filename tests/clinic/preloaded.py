"""The clinic by Flask as `gunicorn --preload` loads it: once, in the parent, which here has used a clinic's database before it forks."""

from __future__ import annotations

import os
from typing import Any

from sqlalchemy import text

from examples.clinic.db import db
from examples.clinic.flask_app import create_app

app = create_app()


def where() -> dict[str, Any]:
    """This process, and the PostgreSQL backend that its session on the bound clinic's database reached."""
    with db.session() as session:
        return {"pid": os.getpid(), "backend": session.scalar(text("SELECT pg_backend_pid()"))}


with db.tenant_context(db.tenants.list()[0]):
    parent = where()


@app.get("/api/v1/where")
def tell_where() -> dict[str, Any]:
    return {"parent": parent, **where()}
