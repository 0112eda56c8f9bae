"""What `create_app` and tenantdb put on the application, as FastAPI dependencies."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from examples.clinic.mail import Mailer
from tenantdb import AsyncTenantDB
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


Registry = Annotated[AsyncTenantDB, Depends(_adb)]
AccessTokens = Annotated[Tokens, Depends(_tokens)]
CurrentMailer = Annotated[Mailer, Depends(_mailer)]
