"""Signing up and in. These routes run without a tenant: they reach the registry and `provision`, and no clinic's data.

Access tokens live 15 minutes and name user and clinic; what the user may do there is asked of the registry with each request. Refresh
tokens serve once.
"""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, BackgroundTasks, Header, Response

from examples.clinic.access import LIFETIME
from examples.clinic.api.depends import AccessTokens, CurrentMailer, Registry
from examples.clinic.problems import ClinicRequired
from examples.clinic.schemas import ClinicOut, EmailToken, Login, Me, Refresh, Registration, SignedIn, UserOut
from tenantdb import AsyncTenantDB, Membership, NewUser, Tenant, TenantState, User, errors
from tenantdb.fastapi import CurrentIdentity
from tenantdb.tokens import Tokens

RETRY_AFTER = "2"  # seconds between two looks at a clinic that is being made
_GONE = frozenset({TenantState.DELETED, TenantState.PURGING, TenantState.PURGED})

router = APIRouter(prefix="/auth", tags=["auth"])

IdempotencyKey = Annotated[str | None, Header(min_length=8, max_length=100, description="the same key: the same clinic, made once")]


async def _clinics(adb: AsyncTenantDB, user: User) -> list[ClinicOut]:
    """The clinics that the user works for and that still exist."""
    found = [(membership, await adb.tenants.get(membership.tenant_id)) for membership in await adb.memberships.list(user=user)]
    return [_clinic(tenant, membership) for membership, tenant in found if tenant.state not in _GONE]


def _clinic(tenant: Tenant, membership: Membership) -> ClinicOut:
    return ClinicOut(id=tenant.id, slug=tenant.slug, name=tenant.name, state=str(tenant.state), role=str(membership.role))


def _access_token(tokens: Tokens, user_id: UUID, clinic: ClinicOut | None) -> str:
    return tokens.issue(user_id) if clinic is None else tokens.issue(user_id, clinic.id, role=clinic.role)


async def _sign_in(adb: AsyncTenantDB, tokens: Tokens, user: User, clinic: ClinicOut | None) -> SignedIn:
    return SignedIn(
        access_token=_access_token(tokens, user.id, clinic),
        refresh_token=await adb.refresh_tokens.create(user, clinic and clinic.id),
        expires_in=int(LIFETIME.total_seconds()),
        clinic=clinic,
    )


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
    return await _sign_in(adb, tokens, user, _clinic(tenant, membership))


@router.get("/register/{tenant_id}")
async def registration_status(adb: Registry, identity: CurrentIdentity, tenant_id: UUID, response: Response) -> ClinicOut:
    """How far a clinic is: `provisioning`, then `active` or `failed`. For its members only."""
    membership = await adb.memberships.get(UUID(identity.user), tenant_id)
    tenant = await adb.tenants.get(tenant_id)
    if tenant.state is TenantState.PROVISIONING:
        response.headers["Retry-After"] = RETRY_AFTER
    return _clinic(tenant, membership)


@router.post("/verify-email")
async def verify_email(adb: Registry, data: EmailToken) -> UserOut:
    """The token that was mailed came back, so the address is the user's."""
    return UserOut.model_validate(await adb.users.verify_email(data.token))


# -- signing in and out ----------------------------------------------------------------------------------------------------------------


@router.post("/login")
async def login(adb: Registry, tokens: AccessTokens, data: Login) -> SignedIn:
    """Sign in to the one clinic that the user works for, or to the one that is named. 409 lists the user's clinics to choose from."""
    user = await adb.users.authenticate(data.email, data.password)
    clinics = await _clinics(adb, user)
    if data.clinic is not None:
        clinics = [clinic for clinic in clinics if clinic.slug == data.clinic]
        if not clinics:
            raise errors.NotAMember  # whether there is such a clinic is nobody else's business
    if len(clinics) > 1:
        raise ClinicRequired("say which clinic you want to sign in to", clinics=[clinic.model_dump(mode="json") for clinic in clinics])
    return await _sign_in(adb, tokens, user, clinics[0] if clinics else None)


@router.post("/refresh")
async def refresh(adb: Registry, tokens: AccessTokens, data: Refresh) -> SignedIn:
    """The next pair of tokens. The refresh token that was given is used up."""
    refresh_token, grant = await adb.refresh_tokens.rotate(data.refresh_token)
    clinic = None
    if grant.tenant_id is not None:
        membership = await adb.memberships.get(grant.user_id, grant.tenant_id)
        clinic = _clinic(await adb.tenants.get(grant.tenant_id), membership)
    return SignedIn(
        access_token=_access_token(tokens, grant.user_id, clinic),
        refresh_token=refresh_token,
        expires_in=int(LIFETIME.total_seconds()),
        clinic=clinic,
    )


@router.post("/logout", status_code=204)
async def logout(adb: Registry, data: Refresh) -> None:
    """End a session: its refresh token serves no more, and its access token ends within minutes."""
    await adb.refresh_tokens.revoke(data.refresh_token)


@router.get("/me")
async def me(adb: Registry, identity: CurrentIdentity) -> Me:
    """Who the token is for, and the clinics that this user works for."""
    user = await adb.users.get(UUID(identity.user))
    clinics = await _clinics(adb, user)
    signed_in_to = next((clinic for clinic in clinics if clinic.id == identity.tenant), None)
    return Me(user=UserOut.model_validate(user), clinic=signed_in_to, clinics=clinics)
