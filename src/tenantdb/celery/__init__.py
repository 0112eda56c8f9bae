"""Celery: every task runs for the tenant that it was published for, and for no other.

``setup(app, db)`` where the application is made; then ``@app.task(base=TenantTask)``. See docs/howto/celery.md.
"""

from __future__ import annotations

from .commits import delay_on_commit
from .setting_up import setup
from .stamps import EVERY_TENANT
from .tasks import AllTenantsTask, TenantTask, all_tenants_task, tenant_task

__all__ = ["EVERY_TENANT", "AllTenantsTask", "TenantTask", "all_tenants_task", "delay_on_commit", "setup", "tenant_task"]
