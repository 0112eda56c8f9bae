"""Signing up and in. These routes run without a tenant: they reach the registry and `provision`, and no clinic's data.

Signing in is written once for all front ends, in accounts.py, and blocks; so its routes are `def`, which FastAPI calls in threads.
"""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, BackgroundTasks, Header, Response
from fastapi.concurrency import run_in_threadpool

from examples.clinic import accounts
from examples.clinic.api.depends import AccessTokens, CurrentMailer, Registry
from examples.clinic.schemas import ClinicOut, EmailToken, Login, Me, Refresh, Registration, SignedIn, UserOut
from tenantdb import NewUser, TenantState, errors
from tenantdb.fastapi import CurrentIdentity

RETRY_AFTER = "2"  # seconds between two looks at a clinic that is being made

router = APIRouter(prefix="/auth", tags=["auth"])

IdempotencyKey = Annotated[str | None, Header(min_length=8, max_length=100, description="the same key: the same clinic, made once")]


# -- signing up ------------------------------------------------------------------------------------------------------------------------


@router.post(
    "/register",
    status_code=201,
    responses={
        202: {"model": SignedIn, "description": "the clinic is still being made"},
        429: {"description": "too many sign-ups, from this address or of all; Retry-After says when it is worth another try"},
    },
)
async def register(
    adb: Registry,
    tokens: AccessTokens,
    mailer: CurrentMailer,
    tasks: BackgroundTasks,
    response: Response,
    data: Registration,
    idempotency_key: IdempotencyKey = None,
) -> SignedIn:
    """Make a user, a clinic and its database. Whoever has an account gives its e-mail and password, and owns one clinic more."""
    account, clinic = data.user, data.clinic
    wanted = {**clinic.model_dump(), "idempotency_key": idempotency_key}
    try:
        tenant = await adb.provision(owner=NewUser(**account.model_dump()), **wanted)
    except (errors.UserExists, errors.TenantExists) as refused:
        try:
            user = await adb.users.authenticate(account.email, account.password)
        except errors.InvalidCredentials:
            raise refused from None
        tenant = await adb.provision(owner=user, **wanted)
    user = await adb.users.get(account.email)
    membership = await adb.memberships.get(user, tenant)
    if tenant.state is TenantState.SUSPENDED:
        raise errors.TenantSuspended(tenant.slug)
    if tenant.state not in {TenantState.ACTIVE, TenantState.PROVISIONING}:  # a repeated request may find that its clinic failed
        raise errors.TenantNotReady(tenant.slug, str(tenant.state))
    if user.email_verified_at is None:
        token = await adb.users.verification_token(user)
        tasks.add_task(mailer.send, user.email, "Please verify your e-mail address", f"POST this token to /auth/verify-email: {token}")
    if tenant.state is TenantState.PROVISIONING:
        response.status_code = 202
        response.headers.update({"Location": f"/auth/register/{tenant.id}", "Retry-After": RETRY_AFTER})
    return await run_in_threadpool(accounts.sign_in, adb.sync_db, tokens, user, accounts.clinic_out(tenant, membership))


@router.get("/register/{tenant_id}")
async def registration_status(adb: Registry, identity: CurrentIdentity, tenant_id: UUID, response: Response) -> ClinicOut:
    """How far a clinic is: `provisioning`, then `active` or `failed`. For its members only."""
    membership = await adb.memberships.get(UUID(identity.user), tenant_id)
    tenant = await adb.tenants.get(tenant_id)
    if tenant.state is TenantState.PROVISIONING:
        response.headers["Retry-After"] = RETRY_AFTER
    return accounts.clinic_out(tenant, membership)


@router.post("/verify-email")
async def verify_email(adb: Registry, data: EmailToken) -> UserOut:
    """The token that was mailed came back, so the address is the user's."""
    return UserOut.model_validate(await adb.users.verify_email(data.token))


# -- signing in and out ----------------------------------------------------------------------------------------------------------------


@router.post("/login")
def login(adb: Registry, tokens: AccessTokens, data: Login) -> SignedIn:
    """Sign in to the one clinic that the user works for, or to the one that is named. 409 lists the user's clinics to choose from."""
    return accounts.log_in(adb.sync_db, tokens, data)


@router.post("/refresh")
def refresh(adb: Registry, tokens: AccessTokens, data: Refresh) -> SignedIn:
    """The next pair of tokens. The refresh token that was given is used up."""
    return accounts.refresh(adb.sync_db, tokens, data)


@router.post("/logout", status_code=204)
async def logout(adb: Registry, data: Refresh) -> None:
    """End a session: its refresh token serves no more, and its access token ends within minutes."""
    await adb.refresh_tokens.revoke(data.refresh_token)


@router.get("/me")
def me(adb: Registry, identity: CurrentIdentity) -> Me:
    """Who the token is for, and the clinics that this user works for."""
    return accounts.me(adb.sync_db, identity)
