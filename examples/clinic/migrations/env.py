"""How Alembic reaches the clinics' databases: tenantdb finds them, one at a time (`alembic -x tenant=acme ...`)."""

from __future__ import annotations

from examples.clinic.db import db
from examples.clinic.models import Base
from tenantdb.migrations import run_env

run_env(db, target_metadata=Base.metadata)
