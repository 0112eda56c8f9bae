"""``python -m tenantdb.cli`` is the ``tenantdb`` command."""

from tenantdb.cli import main

if __name__ == "__main__":
    main()
