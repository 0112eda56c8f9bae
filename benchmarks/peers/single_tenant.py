"""The application before it had tenants: one database, one engine, and a token that is checked in a dependency.

`check` is what a careful user passes to PyJWT, and the measure of what tenantdb adds to a request. Run as a program, this is one uvicorn
worker: see `benchmarks.serving`.
"""

from collections.abc import AsyncIterator
from typing import Annotated, Any

import jwt
from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from benchmarks.serving import AUDIENCE, ISSUER, Named, Served, serve
from benchmarks.world import Marker

_RULES = {"require": ["exp", "iat", "iss", "aud", "sub"]}


def check(token: str, key: str) -> dict[str, Any]:
    """The claims of an access token."""
    return jwt.decode(token, key, algorithms=["HS256"], audience=AUDIENCE, issuer=ISSUER, options=_RULES)


def application(served: Served) -> FastAPI:
    engine = create_async_engine(
        served.url,
        connect_args=served.connect_args,
        pool_size=served.pool_size,
        max_overflow=0,
        poolclass=AsyncAdaptedQueuePool,
        use_native_hstore=False,
    )
    bearer = HTTPBearer()

    async def current_user(given: Annotated[HTTPAuthorizationCredentials, Depends(bearer)]) -> str:
        try:
            return str(check(given.credentials, served.key)["sub"])
        except jwt.PyJWTError as error:
            raise HTTPException(401) from error

    async def new_session() -> AsyncIterator[AsyncSession]:
        async with AsyncSession(engine) as session:
            yield session

    app = FastAPI(dependencies=[Depends(current_user)])

    @app.get("/markers/{number}")
    async def marker(number: int, session: Annotated[AsyncSession, Depends(new_session)]) -> Named:
        return Named(name=await session.scalar(select(Marker.name).where(Marker.id == number)))

    return app


if __name__ == "__main__":
    serve(application)
