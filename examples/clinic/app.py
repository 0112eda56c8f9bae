"""The FastAPI application: `uvicorn examples.clinic.app:app`.

/auth/* runs without a tenant. What is under /api/v1 belongs to the clinic that the access token names; the middleware finds and binds it.
"""

from __future__ import annotations

import os
from typing import Any

from fastapi import FastAPI

from examples.clinic.access import access_tokens
from examples.clinic.api import answers, auth, v1
from examples.clinic.mail import Mailer, Outbox
from tenantdb import AsyncTenantDB, TenantDB
from tenantdb.asgi import RegistryAuth
from tenantdb.fastapi import install


def create_app(db: TenantDB | None = None, *, token_key: str | None = None, mailer: Mailer | None = None, worker: Any = None) -> FastAPI:
    """The application over `db`, by default the one of db.py; `token_key` by default from CLINIC_TOKEN_KEY. Opens nothing yet.

    `worker` is a Celery application to publish with, by default that of worker.py where CLINIC_BROKER_URL is set, or else none.
    """
    if db is None:
        from examples.clinic.db import adb
    else:
        adb = AsyncTenantDB(db)
    if worker is None and os.environ.get("CLINIC_BROKER_URL"):
        from examples.clinic.worker import create_worker

        worker = create_worker(adb.sync_db)
    tokens = access_tokens(token_key)
    app = FastAPI(title="Clinic", redoc_url=None, lifespan=adb.lifespan)
    app.state.tokens = tokens
    app.state.mailer = mailer or Outbox(os.environ.get("CLINIC_OUTBOX", "data/outbox"))
    app.state.worker = worker
    install(app, adb, authenticate=RegistryAuth(tokens, adb), exempt=["/auth/*", "/healthz"])
    answers.install(app)
    app.include_router(auth.router)
    app.include_router(v1.router)

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    return app


def __getattr__(name: str) -> FastAPI:
    """Make `app` when a server asks for it, so that importing this module needs no environment."""
    if name == "app":
        return create_app()
    raise AttributeError(name)
