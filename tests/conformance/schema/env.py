from tenantdb.migrations import run_env
from tests.conformance.app import db, metadata

run_env(db, target_metadata=metadata)
