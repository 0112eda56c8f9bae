from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters.world import World, new_world


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr("tenantdb.registry.users.hash_password", lambda password: "unusable")  # nobody signs in by password here
    with new_world(tmp_path) as made:
        yield made
