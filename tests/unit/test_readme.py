"""The README's code runs as pasted, and its commands are the ones that CI runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
OPENING = BLOCKS[0]


def run(source: str, folder: Path) -> str:
    """Run a script in a folder, without any setting from outside, every warning an error."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TENANTDB_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_opening_is_twelve_lines_that_run_as_pasted_and_run_again(tmp_path: Path) -> None:
    assert sum(bool(line.strip()) for line in OPENING.splitlines()) == 12

    once = run(OPENING, tmp_path)
    again = run(OPENING, tmp_path)

    assert once == "[('a patient of acme',)]\n"
    assert "globex" not in once + again


def test_the_fastapi_example_serves_each_clinic_its_own_patients(tmp_path: Path) -> None:
    ask = """
import asyncio
import httpx

async def main() -> None:
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://clinic") as client:
        for clinic in ("acme", "globex"):
            ada = await adb.users.create(f"ada@{clinic}.example", "correct horse battery staple")
            tenant = await adb.provision(clinic, owner=ada)
            async with adb.begin(clinic) as session:
                await session.execute(text("CREATE TABLE patients (name TEXT)"))
                await session.execute(text("INSERT INTO patients VALUES (:name)"), {"name": f"a patient of {clinic}"})
            answer = await client.get("/patients", headers={"Authorization": f"Bearer {tokens.issue(ada.id, tenant.id)}"})
            print(answer.status_code, answer.json())
        print((await client.get("/patients")).status_code)

db.init()
asyncio.run(main())
"""
    served = BLOCKS[1]
    assert 'os.environ["TOKEN_KEY"]' in served
    settings = "import os\nos.environ.update(TOKEN_KEY='k' * 32, TENANTDB_URL='sqlite:///data/central.sqlite3')\n"

    assert run(settings + served + ask, tmp_path) == "200 ['a patient of acme']\n200 ['a patient of globex']\n401\n"


def test_ci_runs_the_readmes_test_command_word_for_word() -> None:
    command = "python3 -m venv .venv && .venv/bin/pip install nox && .venv/bin/nox -s tests"

    assert f"\n{command}\n" in README
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
