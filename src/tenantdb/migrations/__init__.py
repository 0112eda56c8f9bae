"""The tenants' schema: an ordinary Alembic script location of the application, run on one database at a time.

An application's ``env.py`` is two lines::

    from tenantdb.migrations import run_env
    run_env(db, target_metadata=Base.metadata)
"""

from __future__ import annotations

from tenantdb.migrations.env import run_env
from tenantdb.migrations.scaffold import init
from tenantdb.migrations.scripts import Scripts

__all__ = ["Scripts", "init", "run_env"]
