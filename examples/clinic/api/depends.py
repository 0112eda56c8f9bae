"""What `create_app` and tenantdb put on the application, as FastAPI dependencies."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request

from examples.clinic.mail import Mailer
from examples.clinic.roles import Action, allowed
from tenantdb import AsyncTenantDB
from tenantdb.fastapi import require_role
from tenantdb.tokens import Tokens


async def _adb(request: Request) -> AsyncTenantDB:
    adb: AsyncTenantDB = request.app.state.tenantdb
    return adb


async def _tokens(request: Request) -> Tokens:
    tokens: Tokens = request.app.state.tokens
    return tokens


async def _mailer(request: Request) -> Mailer:
    mailer: Mailer = request.app.state.mailer
    return mailer


async def _worker(request: Request) -> Any:
    return request.app.state.worker


Registry = Annotated[AsyncTenantDB, Depends(_adb)]
AccessTokens = Annotated[Tokens, Depends(_tokens)]
CurrentMailer = Annotated[Mailer, Depends(_mailer)]
Worker = Annotated[Any, Depends(_worker)]
"""The Celery application to publish with, or None: it is not needed to serve."""


def may(resource: str, action: Action) -> Any:
    """A route dependency that refuses every role that may not."""
    return Depends(require_role(*allowed(resource, action)))
