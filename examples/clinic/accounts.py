"""Who signs in, and for which clinic. Reaches the registry and no clinic's data; every front end signs people in through here.

Access tokens live 15 minutes and name user and clinic; what the user may do there is asked of the registry with each request. Refresh
tokens serve once.
"""

from __future__ import annotations

from uuid import UUID

from examples.clinic.access import LIFETIME
from examples.clinic.problems import ClinicRequired
from examples.clinic.schemas import ClinicOut, Login, Me, Refresh, SignedIn, UserOut
from tenantdb import Identity, Membership, Tenant, TenantDB, TenantState, User, errors
from tenantdb.tokens import Tokens

_GONE = frozenset({TenantState.DELETED, TenantState.PURGING, TenantState.PURGED})


def clinic_out(tenant: Tenant, membership: Membership) -> ClinicOut:
    return ClinicOut(id=tenant.id, slug=tenant.slug, name=tenant.name, state=str(tenant.state), role=str(membership.role))


def clinics_of(db: TenantDB, user: User) -> list[ClinicOut]:
    """The clinics that the user works for and that still exist."""
    found = [(db.tenants.get(membership.tenant_id), membership) for membership in db.memberships.list(user=user)]
    return [clinic_out(tenant, membership) for tenant, membership in found if tenant.state not in _GONE]


def sign_in(db: TenantDB, tokens: Tokens, user: User, clinic: ClinicOut | None) -> SignedIn:
    """A pair of tokens for somebody who has proved who it is."""
    return _signed_in(tokens, user.id, clinic, db.refresh_tokens.create(user, None if clinic is None else clinic.id))


def log_in(db: TenantDB, tokens: Tokens, data: Login) -> SignedIn:
    """Sign in to the one clinic that the user works for, or to the one that is named.

    Raises: `InvalidCredentials`, `NotAMember`; `ClinicRequired` with the user's clinics to choose from.
    """
    user = db.users.authenticate(data.email, data.password)
    clinics = clinics_of(db, user)
    if data.clinic is not None:
        clinics = [clinic for clinic in clinics if clinic.slug == data.clinic]
        if not clinics:
            raise errors.NotAMember  # whether there is such a clinic is nobody else's business
    if len(clinics) > 1:
        raise ClinicRequired("say which clinic you want to sign in to", clinics=[clinic.model_dump(mode="json") for clinic in clinics])
    return sign_in(db, tokens, user, clinics[0] if clinics else None)


def refresh(db: TenantDB, tokens: Tokens, data: Refresh) -> SignedIn:
    """The next pair of tokens; the refresh token that was given is used up. Raises: `InvalidToken`, `NotAMember`."""
    refresh_token, grant = db.refresh_tokens.rotate(data.refresh_token)
    clinic = None
    if grant.tenant_id is not None:
        clinic = clinic_out(db.tenants.get(grant.tenant_id), db.memberships.get(grant.user_id, grant.tenant_id))
    return _signed_in(tokens, grant.user_id, clinic, refresh_token)


def me(db: TenantDB, identity: Identity) -> Me:
    """Who the token is for, and the clinics that this user works for."""
    user = db.users.get(UUID(identity.user))
    clinics = clinics_of(db, user)
    signed_in_to = next((clinic for clinic in clinics if clinic.id == identity.tenant), None)
    return Me(user=UserOut.model_validate(user), clinic=signed_in_to, clinics=clinics)


def _signed_in(tokens: Tokens, user_id: UUID, clinic: ClinicOut | None, refresh_token: str) -> SignedIn:
    access_token = tokens.issue(user_id) if clinic is None else tokens.issue(user_id, clinic.id, role=clinic.role)
    return SignedIn(access_token=access_token, refresh_token=refresh_token, expires_in=int(LIFETIME.total_seconds()), clinic=clinic)
