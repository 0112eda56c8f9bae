"""What a provisioning script usually is: a role, a database of its own, and Alembic with an ``env.py`` that reads the URL."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from psycopg import sql
from sqlalchemy import make_url

ENV = """
from alembic import context
from sqlalchemy import create_engine, pool

engine = create_engine(context.config.get_main_option("sqlalchemy.url"), poolclass=pool.NullPool)
with engine.connect() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
"""


class AlembicByHand:
    """With a superuser's URL, as such scripts have, and the revisions of ``location``."""

    def __init__(self, superuser: str, location: str) -> None:
        self._url = make_url(superuser).set(drivername="postgresql+psycopg")
        self._connection = psycopg.connect(superuser, autocommit=True)
        self._folder = tempfile.TemporaryDirectory()
        self._script = Path(self._folder.name) / "alembic"
        self._script.mkdir()
        (self._script / "env.py").write_text(ENV)
        given = Config()
        given.set_main_option("script_location", location)
        self._versions = str(Path(ScriptDirectory.from_config(given).dir) / "versions")

    def in_process(self, name: str) -> None:
        self._create(name)
        command.upgrade(self._config(name), "head")

    def by_subprocess(self, name: str) -> None:
        self._create(name)
        ini = Path(self._folder.name) / f"{name}.ini"
        url = self._url.set(database=name).render_as_string(hide_password=False).replace("%", "%%")
        ini.write_text(
            f"[alembic]\nscript_location = {self._script}\nversion_locations = {self._versions}\nsqlalchemy.url = {url}\n"
            "path_separator = os\n"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))}
        subprocess.run(
            [sys.executable, "-m", "alembic", "-c", str(ini), "upgrade", "head"], check=True, capture_output=True, env=environment
        )

    def _create(self, name: str) -> None:
        self._connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), sql.Literal("a password")))
        self._connection.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(name), sql.Identifier(name)))

    def _config(self, name: str) -> Config:
        config = Config()
        config.set_main_option("script_location", str(self._script))
        config.set_main_option("version_locations", self._versions)
        config.set_main_option("path_separator", "os")
        config.set_main_option("sqlalchemy.url", self._url.set(database=name).render_as_string(hide_password=False).replace("%", "%%"))
        return config
