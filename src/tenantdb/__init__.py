"""A database for every tenant of a SaaS application.

    db = TenantDB("sqlite:///data/central.sqlite3")
    db.init()
    db.provision("acme")
    with db.begin("acme") as session:
        ...

Importing this loads no framework and opens nothing.
"""

from tenantdb import errors
from tenantdb.aio import AsyncTenantDB
from tenantdb.context import TenantLogFilter, acting, bind_tenant, current_tenant
from tenantdb.database import TenantDB
from tenantdb.model import BudgetStats, Identity, MemberRole, Membership, NewUser, Server, Subscription, Tenant, TenantState, User
from tenantdb.settings import Budget, Settings

__all__ = [
    "AsyncTenantDB",
    "Budget",
    "BudgetStats",
    "Identity",
    "MemberRole",
    "Membership",
    "NewUser",
    "Server",
    "Settings",
    "Subscription",
    "Tenant",
    "TenantDB",
    "TenantLogFilter",
    "TenantState",
    "User",
    "acting",
    "bind_tenant",
    "current_tenant",
    "errors",
]
