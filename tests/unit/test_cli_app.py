"""Where the command finds the application's TenantDB, and what it says when it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tenantdb.cli.app import UsageProblem, load
from tenantdb.cli.group import cli
from tests.unit.test_import import heavy_modules_after

APP = "from tenantdb import AsyncTenantDB, TenantDB\ndb = TenantDB('sqlite:///{name}.sqlite3')\nadb = AsyncTenantDB(db)\nnumber = 7\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder; what a test imports from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("clinic_app", "other_app", "broken_app"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def write_app(folder: Path, module: str) -> None:
    (folder / f"{module}.py").write_text(APP.format(name=module))


def run(*words: str, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == exit_code, f"{result.output}\n{result.exception!r}"
    return result


def registry_made(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.sqlite3"))


def test_the_option_goes_before_the_variable_before_pyproject_before_plain_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("by_option", "by_variable", "by_pyproject"):
        write_app(folder, name)
    monkeypatch.setenv("TENANTDB_URL", "sqlite:///by_url.sqlite3")
    made = []

    for prepare, words in (
        (lambda: None, []),
        (lambda: (folder / "pyproject.toml").write_text('[tool.tenantdb]\napp = "by_pyproject:db"\n'), []),
        (lambda: monkeypatch.setenv("TENANTDB_APP", "by_variable:db"), []),
        (lambda: None, ["--app", "by_option:db"]),
    ):
        prepare()
        run(*words, "init")
        (name,) = registry_made(folder)
        made.append(name)
        for path in folder.glob("*.sqlite3*"):
            path.unlink()

    assert made == ["by_url.sqlite3", "by_pyproject.sqlite3", "by_variable.sqlite3", "by_option.sqlite3"]
    for name in ("by_option", "by_variable", "by_pyproject"):
        del sys.modules[name]


def test_an_async_view_is_as_good(folder: Path) -> None:
    write_app(folder, "clinic_app")

    assert load("clinic_app:adb") is load("clinic_app:db")


def test_a_pyproject_without_the_setting_changes_nothing(folder: Path) -> None:
    (folder / "pyproject.toml").write_text('[tool.other]\napp = "x"\n')

    assert "TENANTDB_URL" in run("list", exit_code=2).stderr


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("clinic_app", "module:name"),
        (":db", "module:name"),
        ("clinic_app:", "module:name"),
        ("nowhere_app:db", "no module 'nowhere_app'"),
        ("clinic_app.sub:db", "no module 'clinic_app.sub'"),
        ("clinic_app:nothing", "has no 'nothing'"),
        ("clinic_app:db.nothing", "has no 'db.nothing'"),
        ("clinic_app:number", "is a int, not a TenantDB"),
    ],
)
def test_a_reference_that_leads_nowhere_is_one_line_and_a_usage_error(folder: Path, reference: str, says: str) -> None:
    write_app(folder, "clinic_app")

    result = run("--app", reference, "list", exit_code=2)

    assert says in result.stderr and result.stderr.startswith("Error: ") and len(result.stderr.splitlines()) == 1
    assert json.loads(run("--app", reference, "--json", "list", exit_code=2).stderr)["error"]["code"] == "usage"


@pytest.mark.parametrize("text", ["[tool.tenantdb\n", "[tool.tenantdb]\napp = 7\n"])
def test_a_pyproject_that_cannot_be_meant_is_told(folder: Path, text: str) -> None:
    (folder / "pyproject.toml").write_text(text)

    assert "pyproject.toml" in run("list", exit_code=2).stderr


def test_a_module_that_breaks_on_import_keeps_its_traceback(folder: Path) -> None:
    (folder / "broken_app.py").write_text("import a_module_that_is_not_installed\n")

    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_installed"):
        load("broken_app:db")
    with pytest.raises(UsageProblem):  # the negative twin: the module named is the one that is missing
        load("broken_app_too:db")


def test_a_setting_that_the_module_gives_wrongly_is_told_in_one_line(folder: Path) -> None:
    (folder / "broken_app.py").write_text("from tenantdb import TenantDB\ndb = TenantDB('postgresql://app:canary-pw@127.0.0.1/central')\n")

    result = run("--app", "broken_app:db", "list", exit_code=1)

    assert "generate-key" in result.stderr and "canary-pw" not in result.output


# -- what is loaded --------------------------------------------------------------------------------------------------------------------


def python(source: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False, **options)


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    assert heavy_modules_after("import tenantdb.cli") == []
    assert heavy_modules_after("import tenantdb.cli.group") == ["click"]


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_its_libraries_it_says_what_to_install(missing: str) -> None:
    done = python(f"import sys; sys.modules[{missing!r}] = None\nfrom tenantdb.cli import main\nmain()")

    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"tenantdb: the command line needs {missing}: pip install 'tenantdb[cli]'\n"
