"""Everything that is run on a checkout, here and in CI: ``nox -l`` lists it.

Only Python and pip are needed, but for the sessions that say otherwise. What is printed to stdout is the tools' own; nox talks to stderr.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["tests", "lint"]
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True
nox.options.download_python = "never"  # a missing interpreter is an error, not a download

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)
HERE = ".".join(platform.python_version_tuple()[:2])
PLAIN = "not services and not long"  # the tests that need nothing but Python and pip


def install(session: nox.Session, *groups: str, extras: str = "all", also: tuple[str, ...] = ()) -> None:
    session.install("--editable", f".[{extras}]", *nox.project.dependency_groups(PYPROJECT, *groups), *also)


def pytest(session: nox.Session, *args: str, env: dict[str, str] | None = None) -> None:
    # A file's tests stay in one process, because they share servers; two processes wait less for servers and children than one. In the
    # order of their folders the unit tests come last, and no process is left alone with a long file.
    arguments = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", *args, *session.posargs]
    session.run("python", "-m", "pytest", *arguments, env=env)


@nox.session
def demo(session: nox.Session) -> None:
    """Three clinics sign up and get databases of their own. ``-- --sqlite`` without PostgreSQL, ``-- --serve`` stays up."""
    install(session, "example", extras="postgresql,sqlite,cli,embedded,fastapi")
    session.run("python", "-m", "examples.clinic.demo", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All that Python and pip alone can test, real PostgreSQL included. Further arguments go to pytest."""
    install(session, "test")
    try:
        pytest(session, "-m", PLAIN)
    finally:
        others = ", ".join(f"tests-{version}" for version in PYTHONS if version != HERE)
        print(
            f"Not run by this session: a server with TLS and Redis (tests-services), long sweeps (tests-long),"
            f" other Pythons ({others}), SQLAlchemy 2.0 (tests-sqlalchemy-2.0).",
            flush=True,
        )


def _tests_on(version: str) -> None:
    @nox.session(name=f"tests-{version}", python=version)
    def tests_on(session: nox.Session) -> None:
        install(session, "test")
        pytest(session, "-m", PLAIN)

    tests_on.__doc__ = f"As tests, on Python {version}, which must be there."


for _version in PYTHONS:
    _tests_on(_version)


@nox.session(name="tests-sqlalchemy-2.0", python=PYTHONS[0])
def tests_sqlalchemy_20(session: nox.Session) -> None:
    """Unit and conformance tests on the oldest Python with SQLAlchemy 2.0; 2.1 has left that Python, so it is what its users get."""
    install(session, "test", also=("sqlalchemy[asyncio]<2.1",))
    session.run("python", "-c", "import sqlalchemy as s; print('SQLAlchemy', s.__version__); assert s.__version__.startswith('2.0.')")
    pytest(session, "-m", PLAIN, "tests/unit", "tests/conformance")


@nox.session(name="tests-services")
def tests_services(session: nox.Session) -> None:
    """The tests that need the distribution's PostgreSQL, which has TLS, and Redis. Installed by apt-get if we are root."""
    install(session, "test")
    services = {"TEST_POSTGRES_BINDIR": str(_distribution_postgres(session)), "TEST_REDIS_SERVER": _distribution_redis(session)}
    pytest(session, "-m", "services", env=services)


def _distribution_postgres(session: nox.Session) -> Path:
    """The folder of the newest PostgreSQL server of this machine, installed when it is missing and that is possible."""
    if not (found := _postgres_bindirs()):
        _apt_get_install(session, "postgresql", "no PostgreSQL server found. Install one that has TLS")
        found = _postgres_bindirs()
    if not found:
        session.error("apt-get installed postgresql, but no initdb was found in /usr/lib/postgresql/*/bin or on the PATH")
    return found[-1]


def _distribution_redis(session: nox.Session) -> str:
    """The Redis server of this machine, likewise."""
    if shutil.which("redis-server") is None:
        _apt_get_install(session, "redis-server", "no Redis server found. Install one")
    if (found := shutil.which("redis-server")) is None:
        session.error("apt-get installed redis-server, but it is not on the PATH")
    return found


def _apt_get_install(session: nox.Session, package: str, otherwise: str) -> None:
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        session.error(f"{otherwise} (Debian: apt-get install {package}), or be root on Debian")
    env = {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # RUNLEVEL: the package is not to start a server of its own
    session.run("apt-get", "update", "-qq", external=True, env=env)
    session.run("apt-get", "install", "-qq", "--no-install-recommends", package, external=True, env=env)


def _postgres_bindirs() -> list[Path]:
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda initdb: int(initdb.parent.parent.name))
    on_path = shutil.which("initdb")
    return [initdb.parent for initdb in debian] or ([Path(on_path).resolve().parent] if on_path else [])


@nox.session(name="tests-long")
def tests_long(session: nox.Session) -> None:
    """The long sweeps in full: many minutes."""
    install(session, "test")
    pytest(session, "-m", "long", "--timeout=3600")


@nox.session
def lint(session: nox.Session) -> None:
    """Format, lint, types, layering."""
    install(session, "lint")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")
    session.run("python", "-m", "pytest", "-q", "tests/unit/test_layering.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site into site/; ``-- --serve`` shows it while you write."""
    install(session, "docs")
    if "--serve" in session.posargs:
        session.run("mkdocs", "serve")
    else:
        session.run("mkdocs", "build", "--strict", "--quiet", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def bench(session: nox.Session) -> None:
    """Measure side by side: ``-- NAME --quick --json -``. The JSON line is all that reaches stdout."""
    if sys.version_info < (3, 11):
        session.error(f"benchmarks need Python 3.11 or later (their peer does); this is {platform.python_version()}")
    install(session, "test", "bench")
    env = {"TEST_REDIS_SERVER": _distribution_redis(session)} if "middleware" in session.posargs else None
    session.run("python", "-m", "benchmarks", *session.posargs, env=env)
