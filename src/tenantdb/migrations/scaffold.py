"""Writes a script location for an application that has none."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from string import Template

from tenantdb.errors import MigrationError

_REFERENCE = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)((?:\.[A-Za-z_]\w*)*)", re.ASCII)
_INI = """\
# Read by the `alembic` command only; tenantdb itself takes the script location from its settings.
[alembic]
script_location = {location}
prepend_sys_path = .
path_separator = os
"""


def init(directory: Path, *, app: str, metadata: str) -> list[Path]:
    """Write ``env.py``, ``script.py.mako``, ``versions/`` and, where there is none beside it, ``alembic.ini``; return what was written.

    ``app`` and ``metadata`` say where the `TenantDB` and the `MetaData` are, as ``module:name``: ``clinic.db:db``,
    ``clinic.models:Base.metadata``. Raises: `MigrationError` where a file is in the way; nothing is overwritten.
    """
    app_module, app_name, app_rest = _reference(app)
    metadata_module, metadata_name, metadata_rest = _reference(metadata)
    if app_rest:
        raise MigrationError(f"--app names a TenantDB as module:name, not {app!r}")
    if (directory / "env.py").exists():
        raise MigrationError(f"{directory} holds an env.py already; nothing was written")
    templates = resources.files("tenantdb.migrations").joinpath("templates")
    environment = Template(templates.joinpath("env.py.txt").read_text()).substitute(
        app_module=app_module,
        app_name=app_name,
        metadata_module=metadata_module,
        metadata_name=metadata_name,
        metadata_expression=metadata_name + metadata_rest,
    )
    (directory / "versions").mkdir(parents=True, exist_ok=True)
    files = {
        directory / "env.py": environment,
        directory / "script.py.mako": templates.joinpath("script.py.mako").read_text(),
    }
    ini = Path("alembic.ini")
    if not ini.exists():
        files[ini] = _INI.format(location=directory.as_posix())
    for path, text in files.items():
        path.write_text(text)
    return list(files)


def _reference(text: str) -> tuple[str, str, str]:
    match = _REFERENCE.fullmatch(text)
    if match is None:
        raise MigrationError(f"{text!r} is not of the form module:name")
    return match.group(1), match.group(2), match.group(3)
