"""The ``tenantdb`` command. Importing this loads neither click nor a database driver.

Exit codes: 0 done; 1 failed; 2 the command line itself is wrong (an unknown option, a malformed slug, an ``--app`` that is not there);
3 some tenants failed; 75 try again later (`errors.TenantDBError.retryable`).

With ``--json`` one JSON document goes to stdout, and an error as ``{"error": {"code": ..., "message": ...}}`` to stderr.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line of this process."""
    if missing := [name for name in ("click", "rich") if find_spec(name) is None]:
        print(f"tenantdb: the command line needs {' and '.join(missing)}: pip install 'tenantdb[cli]'", file=sys.stderr)
        sys.exit(2)
    from tenantdb.cli.group import cli

    cli.main(prog_name="tenantdb")
